//! Submitting jobs.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::calls::{Enqueued, Fields, Submission};
use crate::config::Limits;
use crate::error::Error;
use crate::group::{Group, Stopped};
use crate::handle::JobHandle;
use crate::ids::{App, JobId, Op, User};
use crate::job::{CALL_MAX, FIELDS, TAGS_MAX_BYTES, UNIQUE_MAX_BYTES, UNIQUE_PERIOD_MAX_MS};
use crate::model::Status;
use crate::model::retry::{Backoff, RetryChoice};
use crate::model::sql::{SqlJob, SqlJobError};
use crate::model::task::Payload;
use crate::store::Store;

/// Where a SQL job runs.
#[derive(Clone, PartialEq, Eq)]
pub enum Database {
    /// A database that the workers' configuration names; the job carries no credentials.
    Named(String),
    /// A connection that the job itself carries. Its host must be on the workers' list of allowed hosts.
    Connection {
        /// Host name or address.
        host: String,
        /// TCP port.
        port: u16,
        /// Database name.
        dbname: String,
        /// Role.
        dbuser: String,
        /// Password. It stands in the job's hash until the job ends: prefer [`Database::Named`].
        pass: String,
    },
}

impl Database {
    /// The fields that say where a job runs.
    pub(crate) fn fields(&self) -> Fields {
        match self {
            Database::Named(name) => Fields::new().with("database", name),
            Database::Connection { host, port, dbname, dbuser, pass } => Fields::new()
                .with("host", host)
                .with("port", port.to_string())
                .with("dbname", dbname)
                .with("dbuser", dbuser)
                .with("pass", pass),
        }
    }
}

impl std::fmt::Debug for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Database::Named(name) => write!(f, "Named({name})"),
            Database::Connection { host, port, .. } => write!(f, "Connection({host}:{port})"),
        }
    }
}

/// What a job does.
#[derive(Debug, Clone)]
pub enum Work {
    /// Runs statements on a database.
    Sql(SqlWork),
    /// Calls a handler.
    Task(TaskWork),
}

/// A SQL job's statements, and where they run.
#[derive(Debug, Clone)]
pub struct SqlWork {
    /// SQL text, or JSON of one of the other job forms.
    pub query: String,
    /// Run when the job is done.
    pub onsuccess: Option<String>,
    /// Run when the job failed.
    pub onerror: Option<String>,
    /// Where it runs.
    pub database: Database,
    /// Running a statement twice does no harm: it may be tried again when nobody can know what an attempt did.
    pub idempotent: bool,
}

/// The handler that a task calls, and with what.
#[derive(Debug, Clone)]
pub struct TaskWork {
    /// The application.
    pub app: App,
    /// The operation.
    pub op: Op,
    /// What to work on.
    pub input: Payload,
    /// What else the handler is to know, in the encoding of the input.
    pub context: Option<Payload>,
}

/// Where a job stands among the waiting jobs of its own line: those of one user for one handler, or all SQL jobs of one
/// user. While all bands have work, of 25 jobs 20 are of the high one, 4 of the normal one and 1 is of the low one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// Before the others.
    High,
    /// In the order of submission.
    #[default]
    Normal,
    /// Behind the others.
    Low,
}

impl Priority {
    /// The priority as a word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Priority::High => "high",
            Priority::Normal => "normal",
            Priority::Low => "low",
        }
    }
}

/// A text that names no priority.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no such priority: high, normal or low")]
pub struct NoPriority;

impl std::str::FromStr for Priority {
    type Err = NoPriority;
    fn from_str(text: &str) -> Result<Self, NoPriority> {
        match text {
            "high" => Ok(Priority::High),
            "normal" => Ok(Priority::Normal),
            "low" => Ok(Priority::Low),
            _ => Err(NoPriority),
        }
    }
}

/// A key that only one job at a time may hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unique {
    /// The key, of at most [`UNIQUE_MAX_BYTES`] bytes.
    pub key: String,
    /// For how long.
    pub scope: UniqueScope,
}

/// How long a job holds its unique key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UniqueScope {
    /// Until a worker takes it.
    WhileQueued,
    /// Until it has ended.
    UntilDone,
    /// So long from its submission on, whatever becomes of it. At most [`UNIQUE_PERIOD_MAX_MS`].
    For(Duration),
}

/// A text that names no scope of a unique key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no such scope of a unique key: queued, done, or a duration")]
pub struct NoUniqueScope;

impl std::str::FromStr for UniqueScope {
    type Err = NoUniqueScope;
    fn from_str(text: &str) -> Result<Self, NoUniqueScope> {
        match text {
            "queued" => Ok(UniqueScope::WhileQueued),
            "done" => Ok(UniqueScope::UntilDone),
            period => humantime::parse_duration(period).map(UniqueScope::For).map_err(|_| NoUniqueScope),
        }
    }
}

/// A job to submit.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// Its id; a repeated submission with the same id changes nothing.
    pub id: JobId,
    /// Its owner.
    pub user: User,
    /// What it does.
    pub work: Work,
    /// How long each of its statements, or its handler, may run; the user's and the worker's limits hold all the same.
    pub timeout: Option<Duration>,
    /// After this time, by the clock of Redis, it is not begun any more, and ended if it runs. For tasks only.
    pub deadline: Option<SystemTime>,
    /// What it says of its retries besides.
    pub retry: RetryChoice,
    /// How long it waits before it may be taken.
    pub delay: Duration,
    /// Not before this time, by the clock of Redis.
    pub run_at: Option<SystemTime>,
    /// Its place among the user's own jobs.
    pub priority: Priority,
    /// The key that no other job may hold meanwhile.
    pub unique: Option<Unique>,
    /// What it is filed under, without commas; at most 1024 bytes in all.
    pub tags: Vec<String>,
    /// W3C trace context of whoever submits it.
    pub traceparent: Option<String>,
}

impl NewJob {
    /// A SQL job with a new id and nothing special about it.
    pub fn sql(user: User, database: Database, query: impl Into<String>) -> Self {
        let query = query.into();
        let work = SqlWork { query, onsuccess: None, onerror: None, database, idempotent: false };
        Self::of(user, Work::Sql(work))
    }

    /// A task with a new id and nothing special about it.
    pub fn task(user: User, app: App, op: Op, input: Payload) -> Self {
        Self::of(user, Work::Task(TaskWork { app, op, input, context: None }))
    }

    /// A job with a new id and nothing special about it.
    pub fn of(user: User, work: Work) -> Self {
        Self {
            id: JobId::generate(),
            user,
            work,
            timeout: None,
            deadline: None,
            retry: RetryChoice::default(),
            delay: Duration::ZERO,
            run_at: None,
            priority: Priority::default(),
            unique: None,
            tags: Vec::new(),
            traceparent: None,
        }
    }

    /// What is submitted of it.
    pub fn into_submission(self) -> Result<Submission, EnqueueError> {
        // In whole ms; zero would say that there is none.
        let ms = |duration: Duration| duration.as_millis().max(1).to_string();
        let time_ms = |at: SystemTime| at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        let fields = match &self.work {
            Work::Sql(work) => sql_fields(work)?,
            Work::Task(work) => task_fields(work)?,
        };
        if self.deadline.is_some() && matches!(self.work, Work::Sql(_)) {
            return Err(EnqueueError::Invalid("a SQL job has no deadline".into()));
        }
        let period_max = Duration::from_millis(UNIQUE_PERIOD_MAX_MS);
        let tags = self.tags.join(",");
        if self.tags.iter().any(|tag| tag.is_empty() || tag.contains(',') || tag.chars().any(char::is_control)) {
            return Err(EnqueueError::Invalid("a tag is empty, or has a comma or a control character".into()));
        }
        if tags.len() > TAGS_MAX_BYTES {
            return Err(EnqueueError::Invalid(format!("the tags have more than {TAGS_MAX_BYTES} bytes")));
        }
        let priority = Some(self.priority.as_str()).filter(|_| self.priority != Priority::Normal);
        let mut fields = fields
            .with_some("timeout", self.timeout.map(ms))
            .with_some("deadline", self.deadline.map(|at| time_ms(at).max(1).to_string()))
            .with_some("max_attempts", self.retry.max_attempts.map(|attempts| attempts.to_string()))
            .with_some("backoff", self.retry.backoff.map(Backoff::as_str))
            .with_some("retry_delay", self.retry.delay.map(ms))
            .with_some("retry_delay_max", self.retry.delay_max.map(ms))
            .with_some("retry_on", self.retry.on.map(|states| states.to_string()))
            .with_some("priority", priority)
            .with_some("tags", Some(tags).filter(|tags| !tags.is_empty()))
            .with_some("traceparent", self.traceparent.as_ref());
        if let Some(Unique { key, scope }) = &self.unique {
            if key.is_empty() || key.len() > UNIQUE_MAX_BYTES {
                let reason = format!("a unique key has 1 to {UNIQUE_MAX_BYTES} bytes");
                return Err(EnqueueError::Invalid(reason));
            }
            fields = fields.with("unique", key);
            fields = match scope {
                UniqueScope::WhileQueued => fields.with("unique_scope", "queued"),
                UniqueScope::UntilDone => fields.with("unique_scope", "done"),
                UniqueScope::For(period) if *period > period_max => {
                    let most = humantime::format_duration(period_max);
                    return Err(EnqueueError::Invalid(format!("a unique key is held for {most} at most")));
                }
                UniqueScope::For(period) => fields.with("unique_scope", "period").with("unique_ms", ms(*period)),
            };
        }
        // What a worker would refuse is refused at once.
        for (name, most, _) in FIELDS {
            if let Some(value) = fields.get(name).filter(|value| value.len() > *most) {
                let reason = format!("{name} has {} bytes, at most {most} are allowed", value.len());
                return Err(EnqueueError::Invalid(reason));
            }
        }
        let delay_ms = self.delay.as_millis() as u64;
        Ok(Submission { id: self.id, user: self.user, delay_ms, run_at_ms: self.run_at.map(time_ms), fields })
    }
}

fn sql_fields(work: &SqlWork) -> Result<Fields, EnqueueError> {
    let SqlWork { query, onsuccess, onerror, database, idempotent } = work;
    let parsed = SqlJob::parse(query, Status::Pending, None, onsuccess.as_deref(), onerror.as_deref(), None)
        .map_err(EnqueueError::InvalidSql)?;
    let fields = Fields::new()
        .with("kind", "sql")
        .with("query", query)
        .with_some("onsuccess", onsuccess.as_ref())
        .with_some("onerror", onerror.as_ref())
        .with_some("fallback_status", parsed.fallback_status().map(|status| status.to_string()))
        .with_some("idempotent", idempotent.then_some("1"));
    Ok(fields.and(database.fields()))
}

fn task_fields(work: &TaskWork) -> Result<Fields, EnqueueError> {
    let TaskWork { app, op, input, context } = work;
    if context.as_ref().is_some_and(|context| context.encoding != input.encoding) {
        return Err(EnqueueError::Invalid("input and context are not in the same encoding".into()));
    }
    Ok(Fields::new()
        .with("kind", "task")
        .with("app", app.as_str())
        .with("op", op.as_str())
        .with("encoding", input.encoding.as_str())
        .with("input", &input.bytes)
        .with_some("context", context.as_ref().map(|context| &context.bytes)))
}

/// What a submission did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Submitted {
    /// The job is queued.
    Queued(JobId),
    /// A job with this id had been submitted before; nothing was changed.
    AlreadyThere(JobId),
}

impl Submitted {
    /// The job's id.
    pub fn id(&self) -> &JobId {
        match self {
            Submitted::Queued(id) | Submitted::AlreadyThere(id) => id,
        }
    }
}

/// Why a job was not submitted.
#[derive(Debug, thiserror::Error)]
pub enum EnqueueError {
    /// The query is none.
    #[error(transparent)]
    InvalidSql(SqlJobError),
    /// What the job says does not fit together.
    #[error("{0}")]
    Invalid(String),
    /// Another job holds its unique key.
    #[error("job {holder} holds its unique key")]
    Held {
        /// That job.
        holder: String,
    },
    /// The user has too many jobs waiting.
    #[error("Failed to create job. Max number of jobs ({limit}) queued reached")]
    Full {
        /// Most jobs that may wait.
        limit: u64,
    },
    /// The payload is too large.
    #[error("Your payload is too large: {bytes} bytes. Max size allowed is {limit} bytes")]
    TooLarge {
        /// Bytes of the job's fields.
        bytes: u64,
        /// Most bytes that are allowed.
        limit: u64,
    },
    /// The server's memory is nearly full: nothing new is queued until there is room again.
    #[error("redis uses {used} bytes of memory, and accepts no new jobs above {mark}")]
    NoRoom {
        /// Bytes that it uses.
        used: u64,
        /// Bytes above which nothing new is accepted.
        mark: u64,
    },
    /// Redis has no memory left: nothing was queued. Jobs that end make room.
    #[error("redis has no memory left for new jobs: {0}")]
    OutOfMemory(std::sync::Arc<Error>),
    /// Redis holds something that makes it impossible.
    #[error("{0}")]
    Refused(String),
    /// Whether the job was queued is not known. Ask, or submit again, with the same id: it will not be queued twice.
    #[error("whether job {id} was queued is unknown: {source}")]
    Unknown {
        /// The job's id.
        id: JobId,
        /// What went wrong.
        source: std::sync::Arc<Error>,
    },
    /// The request failed for sure.
    #[error(transparent)]
    Failed(std::sync::Arc<Error>),
}

/// Submits jobs. Cheap to clone; submissions of many tasks share round trips.
#[derive(Debug, Clone)]
pub struct Producer {
    store: Store,
    limits: Limits,
    group: Group<Submission, Result<Submitted, EnqueueError>>,
}

impl Producer {
    /// A producer on a connection.
    pub fn new(store: Store, limits: Limits) -> Self {
        let group = {
            let (store, limits) = (store.clone(), limits.clone());
            Group::start(CALL_MAX, move |jobs| {
                let (store, limits) = (store.clone(), limits.clone());
                async move { send(&store, &limits, &jobs).await }
            })
        };
        Self { store, limits, group }
    }

    /// A producer with a connection of its own whose submissions wait until so many replicas have confirmed them, or for so
    /// long.
    pub async fn confirmed_by(&self, replicas: u32, patience: Duration) -> Result<ConfirmedProducer, Error> {
        let confirming = Confirming {
            store: self.store.aside(patience).await?,
            limits: self.limits.clone(),
            wanted: replicas,
            patience,
            turn: Default::default(),
        };
        let group = {
            let confirming = confirming.clone();
            Group::start(CALL_MAX, move |jobs: Vec<Submission>| {
                let confirming = confirming.clone();
                async move { confirming.send(&jobs).await }
            })
        };
        Ok(ConfirmedProducer { confirming, group })
    }

    /// Submits one job.
    pub async fn enqueue(&self, job: NewJob) -> Result<Submitted, EnqueueError> {
        ask(&self.group, job).await
    }

    /// Submits one job, and hands out what its end can be waited for with. A job with this id that was there before is as
    /// good as a new one.
    pub async fn submit(&self, job: NewJob) -> Result<JobHandle, EnqueueError> {
        let submitted = self.enqueue(job).await?;
        Ok(JobHandle::new(self.store.clone(), submitted.id().clone()))
    }

    /// Submits many jobs; one result each, in order.
    pub async fn enqueue_many(&self, jobs: Vec<NewJob>) -> Vec<Result<Submitted, EnqueueError>> {
        let (submissions, mut results) = submissions(jobs);
        let mut sent = Vec::with_capacity(submissions.len());
        for chunk in submissions.chunks(CALL_MAX) {
            sent.extend(send(&self.store, &self.limits, chunk).await);
        }
        fill(&mut results, sent)
    }
}

/// Submits one job in the next call of a group.
async fn ask<T: Send + 'static>(
    group: &Group<Submission, Result<T, EnqueueError>>,
    job: NewJob,
) -> Result<T, EnqueueError> {
    let submission = job.into_submission()?;
    let id = submission.id.clone();
    match group.ask(submission).await {
        Ok(result) => result,
        Err(Stopped) => Err(EnqueueError::Unknown { id, source: Error::Unavailable("stopping".into()).into() }),
    }
}

/// The submissions that jobs make, and for each job the error if it makes none.
fn submissions(jobs: Vec<NewJob>) -> (Vec<Submission>, Vec<Option<EnqueueError>>) {
    let mut submissions = Vec::with_capacity(jobs.len());
    let errors = jobs.into_iter().map(|job| job.into_submission().map(|made| submissions.push(made)).err()).collect();
    (submissions, errors)
}

/// One result for each job, of those that were sent and those that were not.
fn fill<T>(errors: &mut [Option<EnqueueError>], sent: Vec<Result<T, EnqueueError>>) -> Vec<Result<T, EnqueueError>> {
    let mut sent = sent.into_iter();
    let next = |error: &mut Option<EnqueueError>| match error.take() {
        Some(error) => Err(error),
        None => sent.next().expect("one result a submission"),
    };
    errors.iter_mut().map(next).collect()
}

/// A submission that replicas were asked to confirm. Queued it is in either case.
#[must_use = "too few replicas may have it"]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Confirmed {
    /// As many replicas as wanted have it, or more.
    Enough {
        /// What the submission did.
        submitted: Submitted,
        /// How many replicas have confirmed it.
        by: u32,
    },
    /// Fewer have confirmed it in time; it may reach them later, or be lost with the primary.
    TooFew {
        /// What the submission did.
        submitted: Submitted,
        /// How many replicas have confirmed it.
        by: u32,
        /// How many were wanted.
        wanted: u32,
    },
}

impl Confirmed {
    /// What the submission did.
    pub fn submitted(&self) -> &Submitted {
        match self {
            Confirmed::Enough { submitted, .. } | Confirmed::TooFew { submitted, .. } => submitted,
        }
    }
}

/// Submits jobs and waits until replicas have them. Cheap to clone; submissions of many tasks share round trips.
///
/// A confirmation counts for the replicas that there are: a failover keeps what it covers if the one that takes over is
/// among those that confirmed. Ask for all of them, or see that Sentinel has no other to choose.
#[derive(Debug, Clone)]
pub struct ConfirmedProducer {
    confirming: Confirming,
    group: Group<Submission, Result<Confirmed, EnqueueError>>,
}

/// A connection that waits for replicas. One call at a time: each holds it up.
#[derive(Debug, Clone)]
struct Confirming {
    store: Store,
    limits: Limits,
    wanted: u32,
    patience: Duration,
    turn: std::sync::Arc<tokio::sync::Mutex<()>>,
}

impl Confirming {
    async fn send(&self, jobs: &[Submission]) -> Vec<Result<Confirmed, EnqueueError>> {
        let Self { store, limits, wanted, patience, turn } = self;
        let _turn = turn.lock().await;
        let (replies, by) = match store.enqueue_confirmed(&limits.into(), jobs, *wanted, *patience).await {
            Ok((replies, by)) => (Ok(replies), by),
            Err(error) => (Err(error), 0),
        };
        let confirmed = |submitted| match by >= *wanted {
            true => Confirmed::Enough { submitted, by },
            false => Confirmed::TooFew { submitted, by, wanted: *wanted },
        };
        results(replies, jobs).into_iter().map(|result| result.map(confirmed)).collect()
    }
}

impl ConfirmedProducer {
    /// Submits one job.
    pub async fn enqueue(&self, job: NewJob) -> Result<Confirmed, EnqueueError> {
        ask(&self.group, job).await
    }

    /// Submits many jobs; one result each, in order.
    pub async fn enqueue_many(&self, jobs: Vec<NewJob>) -> Vec<Result<Confirmed, EnqueueError>> {
        let (submissions, mut results) = submissions(jobs);
        let mut sent = Vec::with_capacity(submissions.len());
        for chunk in submissions.chunks(CALL_MAX) {
            sent.extend(self.confirming.send(chunk).await);
        }
        fill(&mut results, sent)
    }
}

async fn send(store: &Store, limits: &Limits, jobs: &[Submission]) -> Vec<Result<Submitted, EnqueueError>> {
    let replies = store.enqueue(&limits.into(), jobs).await;
    results(replies, jobs)
}

fn results(replies: Result<Vec<Enqueued>, Error>, jobs: &[Submission]) -> Vec<Result<Submitted, EnqueueError>> {
    match replies {
        Ok(replies) => replies
            .into_iter()
            .zip(jobs)
            .map(|(reply, job)| match reply {
                Enqueued::Queued => Ok(Submitted::Queued(job.id.clone())),
                Enqueued::Exists => Ok(Submitted::AlreadyThere(job.id.clone())),
                Enqueued::Held(holder) => Err(EnqueueError::Held { holder }),
                Enqueued::Full(limit) => Err(EnqueueError::Full { limit }),
                Enqueued::TooLarge { bytes, most } => Err(EnqueueError::TooLarge { bytes, limit: most }),
                Enqueued::NoRoom { used, mark } => Err(EnqueueError::NoRoom { used, mark }),
                Enqueued::Refused(reason) => Err(EnqueueError::Refused(reason)),
            })
            .collect(),
        Err(error) => {
            let source = std::sync::Arc::new(error);
            let unknown = source.is_outcome_unknown();
            let full = matches!(&*source, Error::Refused(text) if text.starts_with("OOM"));
            jobs.iter()
                .map(|job| {
                    let source = source.clone();
                    Err(if unknown {
                        EnqueueError::Unknown { id: job.id.clone(), source }
                    } else if full {
                        EnqueueError::OutOfMemory(source)
                    } else {
                        EnqueueError::Failed(source)
                    })
                })
                .collect()
        }
    }
}
