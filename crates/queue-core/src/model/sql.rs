//! SQL jobs: one statement or many, run one at a time, some of them only because of how others ended.
//!
//! The layouts and the moves are those of CARTO's Batch Queries, whose producers and readers share our job hashes: what a
//! reader finds after each step is what that system would have written. Three layouts of the hash field `query` are its own:
//!
//! * simple: the SQL text as it is;
//! * multiple: `["SELECT 1", …]`, kept as `[{"query": "SELECT 1", "status": "pending"}, …]`;
//! * fallback: `{"query": [{"query", "onsuccess"?, "onerror"?, "timeout"?, "id"?}, …], "onsuccess"?, "onerror"?}`.
//!
//! What its users asked for besides is read too, and kept in the fallback layout from then on: `onsuccess` and `onerror`
//! beside one text or a list of texts, in the JSON object or as hash fields of their own, and lists that mix texts with
//! entries. A list of entries with nothing but a `query` and what we write there ourselves is a multiple job.
//!
//! A run goes: [`SqlJob::parse`], then for each turn [`SqlJob::next`], [`SqlJob::start`], the statement itself somewhere
//! else, [`SqlJob::finish`]; until [`SqlJob::is_over`].

use std::fmt;

use serde_json::{Map, Value};

use super::{MoveRefused, Status};

/// Most entries that one job may have.
pub const ENTRIES_MAX: usize = 1_000;

const QUERY: &str = "query";
const ON_SUCCESS: &str = "onsuccess";
const ON_ERROR: &str = "onerror";
const TIMEOUT: &str = "timeout";
const ID: &str = "id";

/// Why a text is no SQL job. Says where, and never repeats SQL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("You must indicate a valid SQL: {reason}")]
pub struct SqlJobError {
    reason: String,
}

fn invalid<T>(reason: impl Into<String>) -> Result<T, SqlJobError> {
    Err(SqlJobError { reason: reason.into() })
}

/// The layout of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// One SQL text.
    Simple,
    /// Texts that run in order until one fails.
    Multiple,
    /// Texts with others that run when those succeed or fail.
    Fallback,
}

/// How one statement ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It ran to its end.
    Done,
    /// It failed, with the database's message.
    Failed(String),
    /// It was cancelled.
    Cancelled,
    /// Nobody can say, and why.
    Unknown(String),
}

/// The statement to run next.
#[derive(Clone, PartialEq, Eq)]
pub struct Statement<'a> {
    /// Its name within the job, the same at every attempt: `0`, `0.onsuccess`, `0.onerror`, `onsuccess`, `onerror`.
    pub step: String,
    /// The SQL text as the producer wrote it.
    pub sql: &'a str,
    /// Whether `<%= … %>` in the text is to be filled in. So it is in an entry's fallbacks, and nowhere else.
    pub templated: bool,
    /// Why the entry failed, for `<%= error_message %>`.
    pub error_message: Option<&'a str>,
    /// How long the producer lets it run, in milliseconds.
    pub timeout_ms: Option<u64>,
    /// What the producer calls the entry.
    pub id: Option<&'a str>,
}

/// A SQL job and how far it has come. `Debug` shows no SQL.
#[derive(Clone, PartialEq)]
pub struct SqlJob {
    kind: Kind,
    status: Status,
    failed_reason: Option<String>,
    entries: Vec<Entry>,
    /// The job's own `onsuccess` and `onerror`, with whatever else the producer put beside them. Its `query` is empty and
    /// only keeps the place.
    given: Map<String, Value>,
    fallback: Option<Status>,
}

/// One statement of the list, with what may follow it.
#[derive(Clone, PartialEq)]
struct Entry {
    /// All that the producer wrote, in the producer's order; the fields below are not in it.
    given: Map<String, Value>,
    main: Status,
    /// Stands only where `given` has an `onsuccess` or `onerror`; one status for both, since only one of them can run.
    fallback: Option<Status>,
    started_at: Option<String>,
    ended_at: Option<String>,
    failed_reason: Option<String>,
}

/// Which status of an entry, or of the job, a move was made on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum On {
    Main,
    Fallback,
}

impl SqlJob {
    /// Reads a job from the fields of its hash: `query`, `status`, `fallback_status`, `failed_reason`, and the `onsuccess`
    /// and `onerror` that may stand beside them.
    ///
    /// What is found running counts as pending: whether something runs is decided by the job's claim, and a reader who
    /// holds it has not started yet. A job said to be pending with nothing left to run takes the status of its entries.
    pub fn parse(
        query_text: &str,
        status: Status,
        fallback_status: Option<Status>,
        onsuccess: Option<&str>,
        onerror: Option<&str>,
        failed_reason: Option<&str>,
    ) -> Result<SqlJob, SqlJobError> {
        let status = at_rest(status);
        let mut given = Map::from_iter([(QUERY.to_owned(), Value::Null)]);
        let (mut kind, mut entries) = match query_text.trim_start().chars().next() {
            Some('[' | '{') => match serde_json::from_str(query_text) {
                Ok(Value::Array(list)) => parse_list(list)?,
                Ok(Value::Object(object)) => {
                    given = object;
                    (Kind::Fallback, parse_object(&mut given)?)
                }
                Ok(_) => return invalid("the JSON is neither a list nor an object"),
                Err(fault) => return invalid(format!("malformed JSON, {fault}")),
            },
            _ => (Kind::Simple, vec![Entry::of_text(query_text.to_owned(), "the text")?]),
        };
        for (name, text) in [(ON_SUCCESS, onsuccess), (ON_ERROR, onerror)] {
            // An empty hash field is how a producer without `null` says "none". After the first run both places hold the
            // text; the JSON then is the one we keep.
            let Some(text) = text.filter(|text| !text.trim().is_empty()) else { continue };
            if given.get(name).is_none_or(Value::is_null) {
                given.insert(name.to_owned(), text.into());
            }
            kind = Kind::Fallback;
        }
        check_fallbacks(&given, "the job")?;
        let failed_reason = failed_reason.map(str::to_owned);
        if kind == Kind::Simple {
            entries[0].main = status;
            entries[0].failed_reason.clone_from(&failed_reason);
        }
        let fallback = has_fallback(&given).then(|| at_rest(fallback_status.unwrap_or(Status::Pending)));
        let mut job = SqlJob { kind, status, failed_reason, entries, given, fallback };
        if status == Status::Pending && !job.entries_have_next() {
            job.status = job.last_ended();
        }
        Ok(job)
    }

    /// The statement whose turn it is; none while one runs, and when the job is over.
    pub fn next(&self) -> Option<Statement<'_>> {
        if self.status == Status::Pending {
            return self.entries.iter().enumerate().find_map(|(position, entry)| entry.next(position));
        }
        let (name, sql) = self.due_fallback()?;
        Some(Statement {
            step: name.to_owned(),
            sql,
            templated: false,
            error_message: None,
            timeout_ms: None,
            id: None,
        })
    }

    /// The statement that [`next`](Self::next) names starts to run, at a time written as ISO 8601.
    pub fn start(&mut self, at: &str) -> Result<(), MoveRefused> {
        self.apply(Status::Running, None, Some(at))
    }

    /// The running statement has ended. Why it failed, or why that is unknown, is kept as `failed_reason`.
    pub fn finish(&mut self, verdict: Verdict, at: &str) -> Result<(), MoveRefused> {
        let (to, reason) = match &verdict {
            Verdict::Done => (Status::Done, None),
            Verdict::Failed(reason) => (Status::Failed, Some(reason.as_str())),
            Verdict::Cancelled => (Status::Cancelled, None),
            Verdict::Unknown(reason) => (Status::Unknown, Some(reason.as_str())),
        };
        self.apply(to, reason, Some(at))
    }

    /// The job is cancelled before its next statement starts. A job that has ended and only waits for its own fallback
    /// keeps its status: it is the fallback that is cancelled.
    pub fn cancel_pending(&mut self) -> Result<(), MoveRefused> {
        self.apply(Status::Cancelled, None, None)
    }

    /// The running statement goes back to pending: its worker stops, or is gone and the statement took no effect.
    pub fn put_back(&mut self) -> Result<(), MoveRefused> {
        self.apply(Status::Pending, None, None)
    }

    /// A job that has ended starts a new run. What is done stays so, and the run begins with the first statement that is not;
    /// or all of it runs again. Tells whether there is anything to run.
    pub fn rerun(&mut self, from_start: bool) -> bool {
        let done = |entry: &Entry| entry.main == Status::Done && entry.fallback.is_none_or(settled);
        let kept = if from_start { 0 } else { self.entries.iter().take_while(|entry| done(entry)).count() };
        let all_kept = kept == self.entries.len();
        if all_kept && self.fallback.is_none_or(settled) {
            return false;
        }
        for entry in &mut self.entries[kept..] {
            // Of an entry that did its work, only what should have followed is left to do.
            if from_start || entry.main != Status::Done {
                entry.main = Status::Pending;
                (entry.started_at, entry.ended_at) = (None, None);
            }
            entry.failed_reason = None;
            entry.fallback = entry.fallback.map(|_| Status::Pending);
        }
        self.fallback = self.fallback.map(|_| Status::Pending);
        self.failed_reason = None;
        self.status = if self.entries_have_next() { Status::Pending } else { self.last_ended() };
        true
    }

    /// The layout in which the job is kept.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The job's status. It becomes final before the job's own fallback runs and stays so meanwhile.
    pub fn status(&self) -> Status {
        self.status
    }

    /// The status of the job's own fallback, if it has one.
    pub fn fallback_status(&self) -> Option<Status> {
        self.fallback
    }

    /// Why the job failed, or why that is unknown.
    pub fn failed_reason(&self) -> Option<&str> {
        self.failed_reason.as_deref()
    }

    /// Whether nothing of the job runs or is to run any more.
    pub fn is_over(&self) -> bool {
        self.status.moves().is_empty() && self.fallback != Some(Status::Running) && self.next().is_none()
    }

    /// The hash field `query`: the text of a simple job, JSON of the others.
    pub fn query_text(&self) -> String {
        let entries = || self.entries.iter().map(Entry::to_json).collect::<Vec<_>>();
        match self.kind {
            Kind::Simple => self.entries[0].sql().to_owned(),
            Kind::Multiple => Value::from(entries()).to_string(),
            Kind::Fallback => {
                let mut object = self.given.clone();
                object.insert(QUERY.to_owned(), entries().into());
                Value::from(object).to_string()
            }
        }
    }

    /// Gives the job the status `to` wherever the table of moves lets it go first, and draws the consequences.
    fn apply(&mut self, to: Status, reason: Option<&str>, at: Option<&str>) -> Result<(), MoveRefused> {
        let from = self.status;
        // Entries that stay pending in a job that has ended would accept a move, and must not.
        let accepted = !self.is_over()
            && (to != Status::Running || self.next().is_some())
            && match self.kind {
                Kind::Simple | Kind::Multiple => self.apply_to_list(to, reason),
                Kind::Fallback => self.apply_with_fallbacks(to, reason, at),
            };
        if accepted { Ok(()) } else { Err(MoveRefused { from, to }) }
    }

    /// Later entries are left as they are, whatever happens to the one that moves: that is how this layout is read.
    fn apply_to_list(&mut self, to: Status, reason: Option<&str>) -> bool {
        let Some(mover) = self.entries.iter().position(|entry| entry.main.may_become(to)) else { return false };
        let more = self.entries.iter().enumerate().any(|(at, entry)| at != mover && entry.main == Status::Pending);
        if !self.status.shift(if to == Status::Done && more { Status::Pending } else { to }) {
            return false;
        }
        self.entries[mover].main.shift(to);
        if let Some(reason) = reason {
            self.entries[mover].failed_reason = Some(reason.to_owned());
            self.failed_reason = Some(reason.to_owned());
        }
        true
    }

    fn apply_with_fallbacks(&mut self, to: Status, reason: Option<&str>, at: Option<&str>) -> bool {
        // The entries: the first that can make the move makes it.
        let mut mover = None;
        for entry in &mut self.entries {
            match mover {
                None => mover = entry.apply(to, reason, at),
                Some(On::Main) if matches!(to, Status::Failed | Status::Cancelled) => entry.skip(),
                // After a statement whose effect is not known, none may rely on it.
                Some(_) if to == Status::Unknown => entry.skip(),
                Some(_) => {}
            }
        }

        // The job: pending while an entry has something left. The end of an entry's fallback does not decide how the job
        // ended: the entries' own statements did.
        let more = self.entries_have_next();
        let job_to = match (mover, to) {
            (Some(On::Fallback), Status::Done | Status::Failed) if !more => self.last_ended(),
            (Some(On::Fallback), Status::Done | Status::Failed) => Status::Pending,
            (Some(On::Fallback), _) | (_, Status::Running) => to,
            _ if more => Status::Pending,
            _ => to,
        };
        if self.status.shift(job_to) {
            if job_to == to && mover != Some(On::Fallback) && reason.is_some() {
                self.failed_reason = reason.map(str::to_owned);
            }
            mover = Some(On::Main);
        }

        // The job's fallback, once the entries are through: it learns that it won't run, or it is what moves.
        if !more && mover != Some(On::Fallback) {
            let due = self.due_fallback().is_some();
            if let Some(fallback) = &mut self.fallback {
                match mover {
                    None => return fallback.shift(to),
                    Some(_) if to.is_final() && !due => _ = fallback.shift(Status::Skipped),
                    Some(_) => {}
                }
            }
        }
        mover.is_some()
    }

    fn entries_have_next(&self) -> bool {
        self.entries.iter().any(Entry::has_next)
    }

    /// How the list of entries ended: as the last of them that did.
    fn last_ended(&self) -> Status {
        self.entries.iter().rev().map(|entry| entry.main).find(|main| main.is_final()).unwrap_or(Status::Done)
    }

    fn due_fallback(&self) -> Option<(&'static str, &str)> {
        due(&self.given, self.status, self.fallback).filter(|_| !self.entries_have_next())
    }
}

impl fmt::Debug for SqlJob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqlJob")
            .field("kind", &self.kind)
            .field("status", &self.status)
            .field("fallback_status", &self.fallback)
            .field("entries", &self.entries.iter().map(|entry| (entry.main, entry.fallback)).collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Statement<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Statement").field("step", &self.step).finish_non_exhaustive()
    }
}

impl Entry {
    fn of_text(text: String, place: &str) -> Result<Entry, SqlJobError> {
        Entry::of_object(Map::from_iter([(QUERY.to_owned(), text.into())]), place)
    }

    fn of_object(mut given: Map<String, Value>, place: &str) -> Result<Entry, SqlJobError> {
        check_sql(given.get(QUERY), place)?;
        check_fallbacks(&given, place)?;
        // `remove` would put the last field in the place of the one taken out.
        let mut take = |name: &str| given.shift_remove(name);
        let main = read_status(take("status"), place)?;
        let fallback = read_status(take("fallback_status"), place)?;
        let mut text = |name: &str| take(name).and_then(|value| value.as_str().map(str::to_owned));
        let (started_at, ended_at, failed_reason) = (text("started_at"), text("ended_at"), text("failed_reason"));
        let fallback = has_fallback(&given).then_some(fallback);
        let mut entry = Entry { given, main, fallback, started_at, ended_at, failed_reason };
        if !entry.has_next() {
            // It waits for nothing, so it must not be taken for what runs.
            entry.fallback.as_mut().map(|fallback| fallback.shift(Status::Skipped));
        }
        Ok(entry)
    }

    fn sql(&self) -> &str {
        text_of(&self.given, QUERY).unwrap_or_default()
    }

    fn due_fallback(&self) -> Option<(&'static str, &str)> {
        due(&self.given, self.main, self.fallback)
    }

    fn has_next(&self) -> bool {
        self.main == Status::Pending || self.due_fallback().is_some()
    }

    fn next(&self, position: usize) -> Option<Statement<'_>> {
        let id = text_of(&self.given, ID);
        if self.main == Status::Pending {
            let timeout_ms = self.timeout_ms();
            let step = position.to_string();
            return Some(Statement { step, sql: self.sql(), templated: false, error_message: None, timeout_ms, id });
        }
        let (name, sql) = self.due_fallback()?;
        Some(Statement {
            step: format!("{position}.{name}"),
            sql,
            templated: true,
            error_message: self.failed_reason.as_deref(),
            timeout_ms: None,
            id,
        })
    }

    /// A limit that limits nothing is no fault: producers write 0 for "none".
    fn timeout_ms(&self) -> Option<u64> {
        let ms = self.given.get(TIMEOUT)?.as_f64().filter(|ms| ms.is_finite() && *ms > 0.0)?;
        Some(ms.ceil() as u64)
    }

    fn apply(&mut self, to: Status, reason: Option<&str>, at: Option<&str>) -> Option<On> {
        let on = if self.main.shift(to) {
            let time = if to == Status::Running { &mut self.started_at } else { &mut self.ended_at };
            if let Some(at) = at {
                *time = Some(at.to_owned());
            }
            On::Main
        } else if self.fallback.as_mut().is_some_and(|fallback| fallback.shift(to)) {
            On::Fallback
        } else {
            return None;
        };
        if let Some(reason) = reason {
            self.failed_reason = Some(reason.to_owned());
        }
        if on == On::Main && to.is_final() && self.due_fallback().is_none() {
            self.fallback.as_mut().map(|fallback| fallback.shift(Status::Skipped));
        }
        Some(on)
    }

    fn skip(&mut self) {
        self.main.shift(Status::Skipped);
        self.fallback.as_mut().map(|fallback| fallback.shift(Status::Skipped));
    }

    fn to_json(&self) -> Value {
        let mut object = self.given.clone();
        let mut put = |name: &str, text: Option<&str>| {
            if let Some(text) = text {
                object.insert(name.to_owned(), text.into());
            }
        };
        put("status", Some(self.main.as_str()));
        put("fallback_status", self.fallback.map(Status::as_str));
        put("started_at", self.started_at.as_deref());
        put("ended_at", self.ended_at.as_deref());
        put("failed_reason", self.failed_reason.as_deref());
        object.into()
    }
}

/// The fallback that is to run now, beside a statement or a job whose status is `main`.
fn due(given: &Map<String, Value>, main: Status, fallback: Option<Status>) -> Option<(&'static str, &str)> {
    let name = match (main, fallback?) {
        (Status::Done, Status::Pending) => ON_SUCCESS,
        (Status::Failed, Status::Pending) => ON_ERROR,
        _ => return None,
    };
    Some((name, text_of(given, name)?))
}

/// A fallback that needs no other run.
fn settled(fallback: Status) -> bool {
    matches!(fallback, Status::Done | Status::Skipped)
}

fn has_fallback(given: &Map<String, Value>) -> bool {
    text_of(given, ON_SUCCESS).is_some() || text_of(given, ON_ERROR).is_some()
}

fn text_of<'a>(given: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    given.get(name)?.as_str()
}

fn at_rest(status: Status) -> Status {
    if status == Status::Running { Status::Pending } else { status }
}

fn parse_list(list: Vec<Value>) -> Result<(Kind, Vec<Entry>), SqlJobError> {
    let texts = list.iter().filter(|item| item.is_string()).count();
    let mixed = texts != 0 && texts != list.len();
    let entries = parse_entries(list)?;
    let plain = |entry: &Entry| {
        [ON_SUCCESS, ON_ERROR, TIMEOUT, ID].iter().all(|name| entry.given.get(*name).is_none_or(Value::is_null))
    };
    let kind = if !mixed && entries.iter().all(plain) { Kind::Multiple } else { Kind::Fallback };
    Ok((kind, entries))
}

/// Takes the entries out of a job's object; what is left in it is the job's own.
fn parse_object(object: &mut Map<String, Value>) -> Result<Vec<Entry>, SqlJobError> {
    match object.insert(QUERY.to_owned(), Value::Null) {
        Some(Value::Array(list)) => parse_entries(list),
        Some(text @ Value::String(_)) => {
            // The one statement is an entry: what says something about a statement goes with it.
            let mut entry = Map::from_iter([(QUERY.to_owned(), text)]);
            for name in [TIMEOUT, ID] {
                entry.extend(object.shift_remove_entry(name));
            }
            Ok(vec![Entry::of_object(entry, "the query")?])
        }
        Some(_) => invalid("the object's query is neither a text nor a list"),
        None => invalid("the object has no query"),
    }
}

fn parse_entries(list: Vec<Value>) -> Result<Vec<Entry>, SqlJobError> {
    if list.is_empty() {
        return invalid("the list is empty");
    }
    if list.len() > ENTRIES_MAX {
        return invalid(format!("the list has {} entries, at most {ENTRIES_MAX} are allowed", list.len()));
    }
    let entry = |(position, item)| {
        let place = format!("entry {position}");
        match item {
            Value::String(text) => Entry::of_text(text, &place),
            Value::Object(object) => Entry::of_object(object, &place),
            _ => invalid(format!("{place} is neither a text nor an object")),
        }
    };
    list.into_iter().enumerate().map(entry).collect()
}

fn check_sql(value: Option<&Value>, place: &str) -> Result<(), SqlJobError> {
    match value {
        None => invalid(format!("{place} has no query")),
        Some(Value::String(text)) if text.trim().is_empty() => invalid(format!("{place} is blank")),
        // PostgreSQL's protocol ends a text at a NUL: what follows it would be dropped in silence.
        Some(Value::String(text)) if text.contains('\0') => invalid(format!("{place} has a NUL byte")),
        Some(Value::String(_)) => Ok(()),
        Some(_) => invalid(format!("{place} is no text")),
    }
}

fn check_fallbacks(given: &Map<String, Value>, place: &str) -> Result<(), SqlJobError> {
    for name in [ON_SUCCESS, ON_ERROR] {
        match given.get(name) {
            None | Some(Value::Null) => {}
            value => check_sql(value, &format!("{name} of {place}"))?,
        }
    }
    Ok(())
}

/// A statement's status as the hash has it: one that a statement can have, pending if none is given.
fn read_status(value: Option<Value>, place: &str) -> Result<Status, SqlJobError> {
    let status = match value {
        None | Some(Value::Null) => return Ok(Status::Pending),
        Some(value) => value.as_str().and_then(|text| text.parse().ok()),
    };
    match status {
        Some(Status::Held | Status::Scheduled | Status::Ignored) | None => {
            invalid(format!("{place} has a status that no statement can have"))
        }
        Some(status) => Ok(at_rest(status)),
    }
}

#[cfg(test)]
mod tests;
