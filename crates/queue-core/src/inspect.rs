//! Reading what is there: jobs, queues, the rejected. Changes nothing.
//!
//! Others write these keys too, so nothing is taken for granted: keys may hold another type, fields any bytes of any length.
//! What is larger than the protocol accepts is not read, and what is found comes in pages, so that no reading is unbounded.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, UNIX_EPOCH};

use serde::Serialize;
use serde_json::Value;

use crate::calls::{Inspected, Inspection};
use crate::error::Error;
use crate::ids::{App, JobId, Op};
use crate::job::{FIELDS, TOLD};
use crate::model::Status;
use crate::model::retry::{Try, read_history};
use crate::model::sql::SqlJob;
use crate::model::task::{File, Message, Payload, Progress};
use crate::reply::Reply;
use crate::store::Store;

/// Fields that tell what a job is and where it stands. Connection properties are never among them but for the host's name.
const BRIEF: &[&str] = &[
    "user",
    "kind",
    "status",
    "fallback_status",
    "host",
    "database",
    "app",
    "op",
    "priority",
    "tags",
    "created_at",
    "updated_at",
    "started_at",
    "ended_at",
    "worker",
    "attempts",
    "unclean",
    "cancel_requested_at",
    "flow",
    "name",
];

/// The fields of a whole view, besides those.
const MORE: &[&str] = &[
    "query",
    "onsuccess",
    "onerror",
    "failed_reason",
    "results",
    "timeout",
    "deadline",
    "max_attempts",
    "history",
    "run",
    "part",
    "unique",
    "unique_scope",
    "unique_ms",
    "encoding",
    "result",
    "result_encoding",
    "result_object",
    "result_bytes",
    "messages",
    "files",
    "progress",
    "log",
];

/// Most bytes of a field that the table of the protocol's fields does not name.
const OTHER_MAX_BYTES: usize = 1_024;

/// Most jobs that one call reads: in brief, and whole, when each may be some MiB.
const BRIEF_PAGE: usize = 50;
const WHOLE_PAGE: usize = 20;

/// Most ids that are read of a list in one round trip. At least as many as a queue may have for a cancel to take its ids
/// out of it at once: so a queue that shrinks while it is read has been read whole.
const IDS_PAGE: usize = 1_000;

fn with_limits(names: impl IntoIterator<Item = &'static &'static str>) -> Vec<(&'static str, usize)> {
    let limits =
        || FIELDS.iter().map(|(field, most, _)| (field, most)).chain(TOLD.iter().map(|(field, most)| (field, most)));
    let limit = |name: &str| limits().find(|(field, _)| **field == name).map_or(OTHER_MAX_BYTES, |(_, most)| *most);
    names.into_iter().map(|name| (*name, limit(name))).collect()
}

/// A job as it can be shown. It holds no connection property; its SQL is there for who asks for it.
#[derive(Clone)]
pub struct JobView {
    /// Its id.
    pub id: String,
    /// A worker has claimed it: it runs, whatever its hash says.
    pub claimed: bool,
    /// Fields that are longer than the protocol accepts, with their length in bytes. A job that has one will be refused.
    pub too_large: Vec<(&'static str, u64)>,
    fields: HashMap<&'static str, Vec<u8>>,
}

impl std::fmt::Debug for JobView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JobView").field("id", &self.id).field("status", &self.status()).finish_non_exhaustive()
    }
}

impl JobView {
    fn new(id: &str, fields: &[(&'static str, usize)], found: Inspected) -> Option<Self> {
        let Inspected::Found { claimed, values } = found else { return None };
        let mut view = Self { id: id.to_owned(), claimed, too_large: Vec::new(), fields: HashMap::new() };
        for ((name, _), value) in fields.iter().zip(values) {
            match value {
                Inspection::Absent => {}
                Inspection::Bytes(bytes) => _ = view.fields.insert(name, bytes),
                Inspection::TooLarge(bytes) => view.too_large.push((name, bytes)),
            }
        }
        Some(view)
    }

    /// The text of a field, if it is there and not empty.
    pub fn text(&self, field: &str) -> Option<String> {
        let bytes = self.fields.get(field).filter(|bytes| !bytes.is_empty())?;
        Some(String::from_utf8_lossy(bytes).into_owned())
    }

    /// A time that a field holds, in ms since 1970.
    pub fn time_ms(&self, field: &str) -> Option<u64> {
        let time = humantime::parse_rfc3339(self.text(field)?.trim()).ok()?;
        Some(time.duration_since(UNIX_EPOCH).ok()?.as_millis() as u64)
    }

    /// Its owner.
    pub fn user(&self) -> String {
        self.text("user").unwrap_or_default()
    }

    /// Its status, as the hash has it; but whether it runs is decided by its claim alone. Of a batch the parts are claimed, and it
    /// says itself how it stands; so does a flow.
    pub fn status(&self) -> String {
        let status = self.text("status").unwrap_or_else(|| "pending".into());
        match status.parse() {
            _ if matches!(self.kind(), Kind::Batch | Kind::Flow) => status,
            Ok(Status::Running) if !self.claimed => Status::Pending.to_string(),
            Ok(Status::Pending | Status::Scheduled) if self.claimed => Status::Running.to_string(),
            _ => status,
        }
    }

    /// Where it stands: running if it is claimed, its status if it is over, else scheduled or pending. So a job whose status
    /// is decided is pending again while it waits for its own fallback.
    pub fn stand(&self) -> Status {
        match self.status().parse::<Status>() {
            _ if self.claimed => Status::Running,
            Ok(status) if self.is_over() || !status.is_final() => status,
            _ => Status::Pending,
        }
    }

    /// What sort of job it is.
    pub fn kind(&self) -> Kind {
        match self.text("kind").as_deref() {
            Some("task") => Kind::Task,
            Some("batch") => Kind::Batch,
            Some("part") => Kind::Part,
            Some("flow") => Kind::Flow,
            _ => Kind::Sql,
        }
    }

    /// It calls a handler.
    pub fn is_task(&self) -> bool {
        self.kind() == Kind::Task
    }

    /// The bytes of a field; none if it is not there.
    pub fn bytes(&self, field: &str) -> Option<&[u8]> {
        self.fields.get(field).map(Vec::as_slice)
    }

    /// The pool that it belongs to.
    pub fn pool(&self) -> String {
        if let Some((app, op)) = self.handler() {
            return format!("{app}.{op}");
        }
        if self.kind() == Kind::Flow {
            return Kind::Flow.as_str().into();
        }
        let pool = match (self.text("database"), self.text("host")) {
            (Some(name), _) => format!("db:{name}"),
            (None, host) => format!("sql:{}", host.unwrap_or_default()),
        };
        pool.replace(|c: char| c.is_ascii_control() || c == ' ', "?")
    }

    /// The application and the operation that it calls; `None` for SQL.
    pub fn handler(&self) -> Option<(String, String)> {
        let name = |field| self.text(field).unwrap_or_default();
        let calls = match self.kind() {
            Kind::Task => true,
            Kind::Batch | Kind::Part => self.text("app").is_some(),
            Kind::Sql | Kind::Flow => false,
        };
        calls.then(|| (name("app"), name("op").to_ascii_lowercase()))
    }

    /// What it is filed under.
    pub fn tags(&self) -> Vec<String> {
        let tags = self.text("tags").unwrap_or_default();
        tags.split(',').filter(|tag| !tag.is_empty()).map(str::to_owned).collect()
    }

    /// What a task hands back, where its hash holds it whole: see [`Self::result_object`] for the others. What is written
    /// in no known encoding is none.
    pub fn result(&self) -> Option<Payload> {
        let encoding = self.text("result_encoding").unwrap_or_default().parse().ok()?;
        Some(Payload { encoding, bytes: self.bytes("result")?.to_vec() })
    }

    /// The name of a task's result in the object store, if it is there.
    pub fn result_object(&self) -> Option<String> {
        self.text("result_object")
    }

    /// What a task says about its work, for programs. What others have written there and is no list of messages is none.
    pub fn messages(&self) -> Vec<Message> {
        self.json("messages").unwrap_or_default()
    }

    /// A task's output files by their logical names.
    pub fn files(&self) -> BTreeMap<String, File> {
        self.json("files").unwrap_or_default()
    }

    /// How far a task has come, if it says so.
    pub fn progress(&self) -> Option<Progress> {
        self.json("progress")
    }

    /// The lines that a task has told, the latest of them.
    pub fn log(&self) -> Vec<String> {
        self.text("log").unwrap_or_default().lines().map(str::to_owned).collect()
    }

    fn json<T: serde::de::DeserializeOwned>(&self, field: &str) -> Option<T> {
        serde_json::from_slice(self.bytes(field)?).ok()
    }

    /// Nothing more of it will run.
    pub fn is_over(&self) -> bool {
        let final_status = self.status().parse::<Status>().is_ok_and(Status::is_final);
        let waits = matches!(self.text("fallback_status").as_deref(), Some("pending" | "running"));
        final_status && (self.status() == "cancelled" || !waits)
    }

    /// How long it waited for its first start, or has waited until now; if it says when it was submitted.
    pub fn waited(&self, now_ms: u64) -> Option<Duration> {
        let until = self.time_ms("started_at").or(self.time_ms("ended_at")).unwrap_or(now_ms);
        Some(Duration::from_millis(until.saturating_sub(self.time_ms("created_at")?)))
    }

    /// The time from its first start to its end, or until now; if it was started.
    pub fn ran(&self, now_ms: u64) -> Option<Duration> {
        let until = self.time_ms("ended_at").unwrap_or(now_ms);
        Some(Duration::from_millis(until.saturating_sub(self.time_ms("started_at")?)))
    }

    /// The bytes of its `query` field.
    pub fn query_bytes(&self) -> &[u8] {
        self.fields.get("query").map_or(&[], Vec::as_slice)
    }

    /// The SQL job that its fields describe, if they describe one. What runs counts as pending in it.
    pub fn sql_job(&self) -> Option<SqlJob> {
        let utf8 = |field: &str| self.fields.get(field).and_then(|value| std::str::from_utf8(value).ok());
        SqlJob::parse(
            utf8("query")?,
            self.status().parse().unwrap_or(Status::Pending),
            utf8("fallback_status").and_then(|text| text.parse().ok()),
            utf8("onsuccess"),
            utf8("onerror"),
            utf8("failed_reason"),
        )
        .ok()
    }

    /// Its statements in order, as its hash has them; none where it holds no valid job.
    pub fn statements(&self) -> Vec<StatementView> {
        if self.sql_job().is_none() {
            return Vec::new();
        }
        let text = String::from_utf8_lossy(self.query_bytes());
        let json = if text.trim_start().starts_with(['[', '{']) { serde_json::from_str(&text).ok() } else { None };
        let list = match json {
            Some(Value::Array(list)) => list,
            Some(Value::Object(mut object)) => match object.shift_remove("query") {
                Some(Value::Array(list)) => list,
                Some(text) => vec![text],
                None => Vec::new(),
            },
            // The one statement of a simple job has no status but the job's.
            _ => {
                let text = text.into_owned();
                return vec![StatementView {
                    status: Some(self.status()),
                    query: Some(text),
                    ..StatementView::default()
                }];
            }
        };
        list.into_iter().map(StatementView::of).collect()
    }

    /// The tries that did not end it well: attempts that ended in an error, and workers that were lost; the oldest first.
    pub fn history(&self) -> Vec<Try> {
        read_history(&self.text("history").unwrap_or_default())
    }

    /// Command tag and notices by step, as the worker wrote them.
    pub fn results(&self) -> Option<Value> {
        serde_json::from_str(&self.text("results")?).ok()
    }
}

/// What sort of job a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Statements.
    Sql,
    /// A call of a handler.
    Task,
    /// Rows that are worked on as one.
    Batch,
    /// Some rows of a batch, or what is to be done when all of them have ended.
    Part,
    /// An execution of a flow. Its steps are jobs of their own.
    Flow,
}

impl Kind {
    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::Sql => "sql",
            Kind::Task => "task",
            Kind::Batch => "batch",
            Kind::Part => "part",
            Kind::Flow => "flow",
        }
    }
}

/// One statement of a job as its hash has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct StatementView {
    /// What the producer calls it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Its status.
    pub status: Option<String>,
    /// The status of what is to run after it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fallback_status: Option<String>,
    /// When it started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<String>,
    /// When it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<String>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed_reason: Option<String>,
    /// Its SQL.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub query: Option<String>,
    /// The SQL that runs when it succeeds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub onsuccess: Option<String>,
    /// The SQL that runs when it fails.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub onerror: Option<String>,
}

impl StatementView {
    fn of(entry: Value) -> Self {
        let text = |name: &str| entry.get(name).and_then(Value::as_str).map(str::to_owned);
        Self {
            id: text("id"),
            status: Some(text("status").unwrap_or_else(|| Status::Pending.to_string())),
            fallback_status: text("fallback_status"),
            started_at: text("started_at"),
            ended_at: text("ended_at"),
            failed_reason: text("failed_reason"),
            query: text("query").or_else(|| entry.as_str().map(str::to_owned)),
            onsuccess: text("onsuccess"),
            onerror: text("onerror"),
        }
    }

    /// The same without its SQL.
    #[must_use]
    pub fn without_sql(self) -> Self {
        Self { query: None, onsuccess: None, onerror: None, ..self }
    }
}

/// An id that was set aside.
#[derive(Debug, Clone, Serialize)]
pub struct Rejected {
    /// When, in Unix time in ms.
    pub at_ms: u64,
    /// The id.
    pub id: String,
    /// In whose queue it stood.
    pub user: String,
    /// Why.
    pub reason: String,
}

/// Which jobs are meant: those for which all of it is true.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Jobs of this user.
    pub user: Option<String>,
    /// Jobs of this pool.
    pub pool: Option<String>,
    /// Jobs that stand so.
    pub status: Option<Status>,
    /// Jobs submitted before this time, in Unix time in ms. A job that does not say when is never meant.
    pub before_ms: Option<u64>,
    /// Jobs submitted at this time or later, in Unix time in ms. A job that does not say when is never meant.
    pub since_ms: Option<u64>,
    /// Tasks of this application.
    pub app: Option<App>,
    /// Tasks of this operation.
    pub op: Option<Op>,
    /// Jobs that are filed under this tag.
    pub tag: Option<String>,
}

impl Filter {
    /// Whether a job is meant.
    pub fn covers(&self, view: &JobView) -> bool {
        self.user.as_ref().is_none_or(|user| *user == view.user())
            && self.pool.as_ref().is_none_or(|pool| *pool == view.pool())
            && self.status.is_none_or(|status| status == view.stand())
            && self.before_ms.is_none_or(|before| view.time_ms("created_at").is_some_and(|at| at < before))
            && self.since_ms.is_none_or(|since| view.time_ms("created_at").is_some_and(|at| at >= since))
            && self.app.as_ref().is_none_or(|app| view.handler().is_some_and(|(name, _)| name == app.as_str()))
            && self.op.as_ref().is_none_or(|op| view.handler().is_some_and(|(_, name)| name == op.as_str()))
            && self.tag.as_ref().is_none_or(|tag| view.tags().contains(tag))
    }
}

/// A reader.
#[derive(Debug, Clone)]
pub struct Inspect {
    store: Store,
}

impl Inspect {
    /// A reader on a connection.
    pub fn new(store: Store) -> Self {
        Self { store }
    }

    /// What time it is at the server, in ms since 1970.
    pub async fn now_ms(&self) -> Result<u64, Error> {
        self.store.now_ms().await
    }

    /// One job; `None` if there is no hash of it.
    pub async fn job(&self, id: &str) -> Result<Option<JobView>, Error> {
        Ok(self.jobs(&[id]).await?.remove(0))
    }

    /// Jobs with all that can be shown of them; one result each, in order.
    pub async fn jobs(&self, ids: &[&str]) -> Result<Vec<Option<JobView>>, Error> {
        self.read(&with_limits(BRIEF.iter().chain(MORE)), WHOLE_PAGE, ids).await
    }

    /// Jobs without SQL, reasons and results; one result each, in order.
    pub async fn brief(&self, ids: &[&str]) -> Result<Vec<Option<JobView>>, Error> {
        self.read(&with_limits(BRIEF), BRIEF_PAGE, ids).await
    }

    /// Which jobs have a hash; one answer each, in order.
    pub async fn exist(&self, ids: &[JobId]) -> Result<Vec<bool>, Error> {
        let found = self.store.inspect(&[], ids.iter().map(JobId::as_str)).await?;
        Ok(found.iter().map(|found| matches!(found, Inspected::Found { .. })).collect())
    }

    async fn read(
        &self,
        fields: &[(&'static str, usize)],
        page: usize,
        ids: &[&str],
    ) -> Result<Vec<Option<JobView>>, Error> {
        let mut views = Vec::with_capacity(ids.len());
        for page in ids.chunks(page) {
            let found = self.store.inspect(fields, page.iter().copied()).await?;
            views.extend(page.iter().zip(found).map(|(id, found)| JobView::new(id, fields, found)));
        }
        Ok(views)
    }

    /// Up to `limit` jobs in brief: first those that run, then those that wait, those that are scheduled, batches
    /// and flows that are elsewhere, and jobs that ended, the latest first.
    pub async fn list(&self, filter: &Filter, limit: usize) -> Result<Vec<JobView>, Error> {
        let places = match filter.status {
            None => &[Place::Claims, Place::Queues, Place::Schedule, Place::Open, Place::Ended][..],
            Some(Status::Held) => &[Place::Open],
            Some(Status::Running) => &[Place::Claims, Place::Open],
            Some(Status::Scheduled) => &[Place::Schedule],
            Some(status) if status.is_final() => &[Place::Ended],
            Some(_) => &[Place::Queues],
        };
        let mut walk = self.walk(filter.user.as_deref(), places).only(filter);
        let mut found: Vec<JobView> = Vec::new();
        // A job that moves while we read is met twice.
        let mut seen = HashSet::new();
        while let Some(ids) = walk.next().await? {
            for page in ids.chunks(BRIEF_PAGE) {
                let names: Vec<&str> = page.iter().map(JobId::as_str).collect();
                for view in self.brief(&names).await?.into_iter().flatten() {
                    if found.len() < limit && filter.covers(&view) && seen.insert(view.id.clone()) {
                        found.push(view);
                    }
                }
                if found.len() >= limit {
                    return Ok(found);
                }
            }
        }
        Ok(found)
    }

    /// Starts to go through the ids that stand in some places, for one user's queue or everybody's.
    pub fn walk(&self, user: Option<&str>, places: &[Place]) -> Walk {
        let keys = self.store.keys();
        let cursor = || b"0".to_vec();
        let queues = match user {
            Some(user) => {
                vec![
                    Stop::Lines { cursor: cursor(), user: Some(user.to_owned()), app: None, op: None },
                    Stop::Line(format!("sql:{user}")),
                ]
            }
            None if places.contains(&Place::AllQueues) => {
                let patterns = [keys.low("*"), keys.tasks("*"), keys.queue("*"), keys.high("*")];
                patterns.into_iter().map(|pattern| Stop::Keys { cursor: cursor(), pattern }).collect()
            }
            None => vec![
                Stop::Lines { cursor: cursor(), user: None, app: None, op: None },
                Stop::Users { cursor: cursor() },
            ],
        };
        let stops = places.iter().rev().flat_map(|place| match place {
            Place::Claims => vec![Stop::Claims { cursor: cursor() }],
            Place::Queues | Place::AllQueues => queues.clone(),
            Place::Schedule => vec![Stop::Schedule { at: 0 }],
            Place::Open => vec![Stop::Open { key: keys.flows(), at: 0 }, Stop::Open { key: keys.batches(), at: 0 }],
            Place::Ended => vec![Stop::Ended { at: 0, since_ms: 0 }],
        });
        Walk { store: self.store.clone(), stops: stops.collect() }
    }

    /// Ids that were set aside, the newest first.
    pub async fn rejected(&self, limit: usize) -> Result<Vec<Rejected>, Error> {
        let key = self.store.keys().rejected();
        let count = limit.to_string();
        let args: &[&[u8]] = &[key.as_bytes(), b"+", b"-", b"COUNT", count.as_bytes()];
        let Some(entries) = typed(self.store.command("XREVRANGE", args).await)? else { return Ok(Vec::new()) };
        entries
            .array("XREVRANGE")?
            .into_iter()
            .map(|entry| {
                let mut parts = entry.array("XREVRANGE")?.into_iter();
                let at = parts.next().as_ref().and_then(Reply::lossy).unwrap_or_default();
                let flat = parts.next().unwrap_or(Reply::Array(Vec::new())).texts("XREVRANGE")?;
                let field = |name: &str| {
                    flat.chunks_exact(2).find(|pair| pair[0] == name).map(|pair| pair[1].clone()).unwrap_or_default()
                };
                Ok(Rejected {
                    at_ms: at.split('-').next().and_then(|ms| ms.parse().ok()).unwrap_or(0),
                    id: field("id"),
                    user: field("user"),
                    reason: field("reason"),
                })
            })
            .collect()
    }
}

/// Where ids of jobs stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Those that run.
    Claims,
    /// The queues of users who are known to have one.
    Queues,
    /// The queues among all keys of the server: also those that a producer has told nobody of.
    AllQueues,
    /// Those that wait for a time.
    Schedule,
    /// Batches and flows that have not ended, the latest first: also batches that are held, and those whose rows are all dealt.
    Open,
    /// Those that have ended and are not yet forgotten, the latest first.
    Ended,
}

/// Goes through ids, a page at a time, while others go on changing what is there. What stays where it is will be met; what
/// moves may be met twice or not at all.
#[derive(Debug)]
pub struct Walk {
    store: Store,
    /// What is still to be read; the last one next.
    stops: Vec<Stop>,
}

#[derive(Debug, Clone)]
enum Stop {
    Claims {
        cursor: Vec<u8>,
    },
    /// The users of the index of queues.
    Users {
        cursor: Vec<u8>,
    },
    /// The index of lines of tasks: those of a user, an application or an operation, or all.
    Lines {
        cursor: Vec<u8>,
        user: Option<String>,
        app: Option<String>,
        op: Option<String>,
    },
    /// All keys of a pattern.
    Keys {
        cursor: Vec<u8>,
        pattern: String,
    },
    /// The lists of one line.
    Line(String),
    Queue {
        key: Vec<u8>,
        at: usize,
    },
    Schedule {
        at: usize,
    },
    /// An index of what is never claimed itself.
    Open {
        key: String,
        at: usize,
    },
    Ended {
        at: usize,
        since_ms: u64,
    },
}

impl Walk {
    /// The next ids; `None` at the end. What is no job id is left out, so a page may be empty.
    pub async fn next(&mut self) -> Result<Option<Vec<JobId>>, Error> {
        let Some(stop) = self.stops.pop() else { return Ok(None) };
        let keys = self.store.keys().clone();
        let ids = match stop {
            Stop::Claims { cursor } => {
                let claims = keys.claims();
                let (next, found) = self.store.scan("HSCAN", &[claims.as_bytes(), &cursor, b"COUNT", b"500"]).await?;
                self.stops.extend(next.map(|cursor| Stop::Claims { cursor }));
                found.into_iter().step_by(2).collect()
            }
            Stop::Users { cursor } => {
                let users = keys.queued_users();
                let (next, found) = self.store.scan("SSCAN", &[users.as_bytes(), &cursor, b"COUNT", b"500"]).await?;
                self.stops.extend(next.map(|cursor| Stop::Users { cursor }));
                let line = |user| Some(Stop::Line(format!("sql:{}", String::from_utf8(user).ok()?)));
                self.stops.extend(found.into_iter().filter_map(line));
                Vec::new()
            }
            Stop::Lines { cursor, user, app, op } => {
                let lines = keys.lines();
                let (next, found) = self.store.scan("SSCAN", &[lines.as_bytes(), &cursor, b"COUNT", b"500"]).await?;
                let is_one = |name: &str, wanted: &Option<String>| wanted.as_ref().is_none_or(|wanted| name == wanted);
                let is_wanted = |line: &String| {
                    let (handler, whose) = line.split_once(':').unwrap_or_default();
                    let (of, does) = handler.split_once('.').unwrap_or_default();
                    is_one(whose, &user) && is_one(of, &app) && is_one(does, &op)
                };
                let found = found.into_iter().filter_map(|line| String::from_utf8(line).ok()).filter(is_wanted);
                let found: Vec<Stop> = found.map(Stop::Line).collect();
                self.stops.extend(next.map(|cursor| Stop::Lines { cursor, user, app, op }));
                self.stops.extend(found);
                Vec::new()
            }
            Stop::Keys { cursor, pattern } => {
                let args: [&[u8]; 5] = [&cursor, b"MATCH", pattern.as_bytes(), b"COUNT", b"1000"];
                let (next, found) = self.store.scan("SCAN", &args).await?;
                self.stops.extend(next.map(|cursor| Stop::Keys { cursor, pattern }));
                self.stops.extend(found.into_iter().map(|key| Stop::Queue { key, at: 0 }));
                Vec::new()
            }
            Stop::Line(line) => {
                let middle = match line.strip_prefix("sql:") {
                    Some(user) => keys.queue(user),
                    None => keys.tasks(&line),
                };
                let bands = [keys.low(&line), middle, keys.high(&line)];
                self.stops.extend(bands.into_iter().map(|key| Stop::Queue { key: key.into_bytes(), at: 0 }));
                Vec::new()
            }
            Stop::Queue { key, at } => {
                // From the right, where the job stands whose turn is next: what is pushed meanwhile moves nothing.
                let (from, to) = ((-((at + IDS_PAGE) as i64)).to_string(), (-(at as i64) - 1).to_string());
                let mut ids = self.page("LRANGE", &[&key, from.as_bytes(), to.as_bytes()]).await?;
                ids.reverse();
                self.more(&ids, Stop::Queue { key, at: at + ids.len() });
                ids
            }
            Stop::Schedule { at } => {
                let ids = self.ranks(&keys.due(), at, "ZRANGE").await?;
                self.more(&ids, Stop::Schedule { at: at + ids.len() });
                ids
            }
            Stop::Open { key, at } => {
                let ids = self.ranks(&key, at, "ZREVRANGE").await?;
                self.more(&ids, Stop::Open { key, at: at + ids.len() });
                self.open(ids).await?
            }
            Stop::Ended { at, since_ms } => {
                let (from, to) = (at.to_string(), (at + IDS_PAGE - 1).to_string());
                let args = [keys.finished().into_bytes(), from.into_bytes(), to.into_bytes(), b"WITHSCORES".to_vec()];
                let args: Vec<&[u8]> = args.iter().map(Vec::as_slice).collect();
                let flat = self.page("ZREVRANGE", &args).await?;
                let is_wanted = |pair: &&[Vec<u8>]| {
                    let ended_ms: f64 = std::str::from_utf8(&pair[1]).unwrap_or_default().parse().unwrap_or(0.0);
                    ended_ms >= since_ms as f64
                };
                let ids: Vec<Vec<u8>> =
                    flat.chunks_exact(2).take_while(is_wanted).map(|pair| pair[0].clone()).collect();
                self.more(&ids, Stop::Ended { at: at + ids.len(), since_ms });
                ids
            }
        };
        Ok(Some(ids.into_iter().filter_map(|id| JobId::new(String::from_utf8(id).ok()?).ok()).collect()))
    }

    /// Passes over places where nothing is that a filter means. What ended before a time was submitted before it, too.
    fn only(mut self, filter: &Filter) -> Self {
        // Of SQL jobs the pool is a host or a database, of tasks their handler.
        let handler = filter.pool.as_deref().and_then(|pool| pool.split_once('.').filter(|_| !pool.contains(':')));
        let wanted = |name: Option<String>, of_pool: Option<&str>| name.or_else(|| of_pool.map(str::to_owned));
        let wanted_app = wanted(filter.app.as_ref().map(ToString::to_string), handler.map(|(app, _)| app));
        let wanted_op = wanted(filter.op.as_ref().map(ToString::to_string), handler.map(|(_, op)| op));
        let (tasks_only, sql_only) =
            (wanted_app.is_some() || wanted_op.is_some(), handler.is_none() && filter.pool.is_some());
        self.stops.retain(|stop| match stop {
            Stop::Users { .. } | Stop::Line(_) => !tasks_only,
            Stop::Lines { .. } => !sql_only,
            _ => true,
        });
        for stop in &mut self.stops {
            match stop {
                Stop::Lines { app, op, .. } => (*app, *op) = (wanted_app.clone(), wanted_op.clone()),
                Stop::Ended { since_ms, .. } => *since_ms = filter.since_ms.unwrap_or(0),
                _ => {}
            }
        }
        self
    }

    /// Those of some jobs that have not ended.
    async fn open(&self, ids: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, Error> {
        let ids: Vec<String> = ids.into_iter().filter_map(|id| String::from_utf8(id).ok()).collect();
        let names: Vec<&str> = ids.iter().map(String::as_str).collect();
        let views = Inspect::new(self.store.clone()).brief(&names).await?;
        Ok(views.into_iter().flatten().filter(|view| !view.is_over()).map(|view| view.id.into_bytes()).collect())
    }

    /// A page that is not full was the last.
    fn more(&mut self, page: &[Vec<u8>], stop: Stop) {
        if page.len() >= IDS_PAGE {
            self.stops.push(stop);
        }
    }

    async fn ranks(&self, key: &str, at: usize, command: &'static str) -> Result<Vec<Vec<u8>>, Error> {
        let (from, to) = (at.to_string(), (at + IDS_PAGE - 1).to_string());
        self.page(command, &[key.as_bytes(), from.as_bytes(), to.as_bytes()]).await
    }

    async fn page(&self, command: &'static str, args: &[&[u8]]) -> Result<Vec<Vec<u8>>, Error> {
        match typed(self.store.command(command, args).await)? {
            Some(items) => Ok(items.array(command)?.into_iter().filter_map(Reply::into_bytes).collect()),
            None => Ok(Vec::new()),
        }
    }
}

/// A key that others have made something else of holds nothing of ours.
fn typed(reply: Result<Reply, Error>) -> Result<Option<Reply>, Error> {
    match reply {
        Ok(reply) => Ok(Some(reply)),
        Err(error) if error.is_wrong_type() => Ok(None),
        Err(error) => Err(error),
    }
}
