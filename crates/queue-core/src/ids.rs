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
/// Longest pool name, in bytes: a host name of 253 bytes and its prefix.
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
    ($(#[$doc:meta])* $name:ident, $kind:literal, $max:expr, $allowed:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks and wraps a text.
            pub fn new(text: impl Into<String>) -> Result<Self, IdError> {
                let text = text.into();
                check($kind, &text, $max, $allowed)?;
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
    /// A set of jobs that share a capacity, and the unit of routing: `sql:<host>` for databases that a job names by its
    /// connection, `db:<name>` for databases that the worker's configuration names.
    Pool, "pool", POOL_MAX_BYTES, |c| !c.is_control() && c != ' '
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

impl Pool {
    /// The pool of a database host that jobs name in their connection fields.
    pub fn of_host(host: &str) -> Result<Self, IdError> {
        Self::new(format!("sql:{host}"))
    }

    /// The pool of a database that the worker's configuration names.
    pub fn of_database(name: &str) -> Result<Self, IdError> {
        Self::new(format!("db:{name}"))
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
    fn patterns_cover_by_prefix_or_exactly() {
        let pool = Pool::of_host("10.0.0.1").unwrap();
        assert!(PoolPattern::new("sql:*").unwrap().covers(&pool));
        assert!(PoolPattern::new("sql:10.0.0.1").unwrap().covers(&pool));
        assert!(!PoolPattern::new("sql:10").unwrap().covers(&pool));
        assert!(PoolPattern::new("a*b").is_err());
    }
}
