//! Identifiers, parsed at the border and never bare strings behind it.
//!
//! What a key or a SQL comment is built from must not be able to break out of it, so each kind states which bytes it allows.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest job id, in bytes. Ids are written into a SQL comment and into PostgreSQL's `application_name`.
pub const JOB_ID_MAX_BYTES: usize = 128;
/// Longest user name, in bytes.
pub const USER_MAX_BYTES: usize = 128;
/// Longest name of an application, in bytes.
pub const APP_MAX_BYTES: usize = 128;
/// Longest name of an operation, in bytes.
pub const OP_MAX_BYTES: usize = 128;
/// Longest name of a tracker, in bytes.
pub const TRACKER_MAX_BYTES: usize = 128;
/// Longest id of a tracked job, in bytes.
pub const TRACK_ID_MAX_BYTES: usize = 256;
/// Longest name of a schedule, in bytes. The ids of its jobs are made of it.
pub const SCHEDULE_MAX_BYTES: usize = 64;
/// Longest name of a flow, and of one of its steps, in bytes. The ids of its jobs are made of the latter.
pub const FLOW_MAX_BYTES: usize = 48;
/// Longest pool name, in bytes: a host name of 253 bytes and its prefix, or an application and its operation.
pub const POOL_MAX_BYTES: usize = 264;

/// Why a text is no identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {reason}")]
pub struct IdError {
    kind: &'static str,
    reason: String,
}

fn check(kind: &'static str, text: &str, max: usize, allowed: fn(char) -> bool) -> Result<(), IdError> {
    let fault = |reason: String| Err(IdError { kind, reason });
    if text.is_empty() {
        return fault("is empty".into());
    }
    if text.len() > max {
        return fault(format!("is {} bytes long, at most {max} are allowed", text.len()));
    }
    match text.chars().find(|c| !allowed(*c)) {
        Some(c) => fault(format!("has the character {c:?}, which is not allowed there")),
        None => Ok(()),
    }
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $max:expr, $allowed:expr $(, $canonical:expr)?) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks and wraps a text.
            pub fn new(text: impl Into<String>) -> Result<Self, IdError> {
                let text = text.into();
                check($kind, &text, $max, $allowed)?;
                $(let text = $canonical(text);)?
                Ok(Self(text))
            }

            /// The text itself.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                Self::new(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }
    };
}

id! {
    /// A job. Ours are UUIDs of version 7; a foreign producer's may be any text of letters, digits and `_ . : -`, so that
    /// it can stand in a SQL comment without ending it.
    JobId, "job id", JOB_ID_MAX_BYTES, |c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | ':' | '-')
}

id! {
    /// A tenant: the owner of jobs and the unit of fairness. Any printable text.
    User, "user", USER_MAX_BYTES, |c| !c.is_control()
}

id! {
    /// An application: whose handlers a task calls. Its letters keep their case. It has no dot, so that it ends where the
    /// pool's name has its first.
    App, "app", APP_MAX_BYTES, |c| c.is_ascii_graphic() && !matches!(c, '.' | ':' | '*')
}

id! {
    /// A set of jobs that share a capacity, and the unit of routing: `sql:<host>` for databases that a job names by its
    /// connection, `db:<name>` for databases that the worker's configuration names, `<app>.<op>` for the tasks of a handler,
    /// of which the operation may be written in any case.
    Pool, "pool", POOL_MAX_BYTES, |c| !c.is_control() && c != ' ', |text: String| match handler_in(&text) {
        Some((app, op)) => format!("{app}.{op}"),
        None => text,
    }
}

fn handler_in(pool: &str) -> Option<(App, Op)> {
    let (app, op) = pool.split_once('.')?;
    Some((App::new(app).ok()?, Op::new(op).ok()?))
}

id! {
    /// A flow: jobs made of steps. Letters, digits, `_` and `-`.
    FlowName, "flow", FLOW_MAX_BYTES, |c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-')
}

id! {
    /// A step of a flow. Letters, digits, `_` and `-`.
    StepName, "step", FLOW_MAX_BYTES, |c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-')
}

id! {
    /// A set of jobs whose status an application tracks. It has no colon, so that it ends where the record's key has its next.
    TrackerName, "tracker", TRACKER_MAX_BYTES, |c| c.is_ascii_graphic() && !matches!(c, ':' | '*')
}

id! {
    /// A tracked job, by the id that its application gives it. Any printable text.
    TrackId, "id", TRACK_ID_MAX_BYTES, |c| !c.is_control()
}

id! {
    /// A schedule: a job that recurs. It has no colon, so that it ends where the ids of its jobs have theirs.
    ScheduleName, "schedule name", SCHEDULE_MAX_BYTES, |c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-')
}

id! {
    /// One running worker's registration: host, pid and a nonce that no other start of it shares.
    SessionId, "session", 320, |c| c.is_ascii_graphic()
}

impl JobId {
    /// A new id, unique and roughly ordered by time.
    pub fn generate() -> Self {
        Self(uuid::Uuid::now_v7().to_string())
    }
}

/// An operation of an application. Upper and lower case are the same: it is kept in lower case.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Op(String);

impl Op {
    /// Checks a text and puts it into lower case.
    pub fn new(text: impl AsRef<str>) -> Result<Self, IdError> {
        let text = text.as_ref().to_ascii_lowercase();
        check("op", &text, OP_MAX_BYTES, |c| c.is_ascii_graphic() && !matches!(c, ':' | '*'))?;
        Ok(Self(text))
    }

    /// The text itself, in lower case.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Op {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        Self::new(text)
    }
}

impl TryFrom<String> for Op {
    type Error = IdError;
    fn try_from(text: String) -> Result<Self, IdError> {
        Self::new(text)
    }
}

impl From<Op> for String {
    fn from(op: Op) -> String {
        op.0
    }
}

impl Pool {
    /// The pool of a database host that jobs name in their connection fields.
    pub fn of_host(host: &str) -> Result<Self, IdError> {
        Self::new(format!("sql:{host}"))
    }

    /// The pool of a database that the worker's configuration names.
    pub fn of_database(name: &str) -> Result<Self, IdError> {
        Self::new(format!("db:{name}"))
    }

    /// The pool of the tasks that one handler runs.
    pub fn of_handler(app: &App, op: &Op) -> Self {
        // Shorter than a pool's name may be, and of fewer characters.
        Self(format!("{app}.{op}"))
    }

    /// The application and operation whose tasks the pool holds; `None` for a pool of SQL jobs.
    pub fn handler(&self) -> Option<(App, Op)> {
        handler_in(&self.0)
    }
}

impl SessionId {
    /// A registration for this process on `host`.
    pub fn generate(host: &str, pid: u32) -> Self {
        let host: String =
            host.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_')).take(253).collect();
        Self(format!("{host}:{pid}:{}", &uuid::Uuid::new_v4().simple().to_string()[..12]))
    }
}

/// Orders the holders of a job: a later take always has the greater fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Fence(pub u64);

impl fmt::Display for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Which pools a worker serves: an exact name, or a prefix followed by `*`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PoolPattern(String);

impl PoolPattern {
    /// Checks and wraps a pattern; a `*` may stand at its end only.
    pub fn new(text: impl Into<String>) -> Result<Self, IdError> {
        let text = text.into();
        check("pool pattern", &text, POOL_MAX_BYTES, |c| !c.is_control() && c != ' ')?;
        if text[..text.len() - 1].contains('*') {
            return Err(IdError { kind: "pool pattern", reason: "may have a '*' at its end only".into() });
        }
        Ok(Self(text))
    }

    /// The pattern that matches this pool alone.
    pub fn exactly(pool: &Pool) -> Self {
        Self(pool.as_str().to_owned())
    }

    /// The pattern's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the pattern covers a pool.
    pub fn covers(&self, pool: &Pool) -> bool {
        match self.0.strip_suffix('*') {
            Some(prefix) => pool.as_str().starts_with(prefix),
            None => self.0 == pool.as_str(),
        }
    }
}

impl TryFrom<String> for PoolPattern {
    type Error = IdError;
    fn try_from(text: String) -> Result<Self, IdError> {
        Self::new(text)
    }
}

impl FromStr for PoolPattern {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        Self::new(text)
    }
}

impl From<PoolPattern> for String {
    fn from(pattern: PoolPattern) -> String {
        pattern.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_id_cannot_end_the_comment_it_stands_in() {
        assert!(JobId::new("3f2a-aa").is_ok());
        for bad in ["", "*/ drop table t; --", "a b", "a\n", "ü", &"x".repeat(129)] {
            assert!(JobId::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_handler_and_its_pool_name_each_other() {
        let handler = |app: &str, op: &str| Some((App::new(app).unwrap(), Op::new(op).unwrap()));
        for (app, op, name) in
            [("Bank", "Pay", "Bank.pay"), ("a", "b.c", "a.b.c"), ("ab", "c", "ab.c"), ("a", "bc", "a.bc")]
        {
            let (the_app, the_op) = handler(app, op).unwrap();
            let pool = Pool::of_handler(&the_app, &the_op);
            assert_eq!((pool.as_str(), pool.handler()), (name, handler(app, op)));
            assert_eq!(Pool::new(format!("{app}.{op}")).unwrap(), pool);
        }
        for sql in [Pool::of_host("db.example.org").unwrap(), Pool::of_database("main.x").unwrap()] {
            assert_eq!(sql.handler(), None, "{sql}");
        }
        for bad in ["", "a.b", "a:b", "a b", "a*", "ä"] {
            assert!(App::new(bad).is_err(), "{bad}");
        }
        for bad in ["", "a:b", "a b", "a*", "ä"] {
            assert!(Op::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn patterns_cover_by_prefix_or_exactly() {
        let pool = Pool::of_host("10.0.0.1").unwrap();
        assert!(PoolPattern::new("sql:*").unwrap().covers(&pool));
        assert!(PoolPattern::new("sql:10.0.0.1").unwrap().covers(&pool));
        assert!(!PoolPattern::new("sql:10").unwrap().covers(&pool));
        assert!(PoolPattern::new("a*b").is_err());
    }
}
