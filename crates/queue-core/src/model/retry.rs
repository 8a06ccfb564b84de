//! Whether a job is tried again after an error, and when; and what is kept of each try.

use std::num::NonZeroU32;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How many unclean ends make a job a suspect: a session runs one suspect at a time, so that the next end of a worker tells
/// which one it was.
pub const SUSPECT_AFTER: u64 = 2;

/// How many unclean ends end a job whatever the workers' configuration says, even if it kills them before they can look
/// at it.
pub const UNCLEAN_MAX: u64 = 20;

/// Most bytes of a job's history. The oldest entries go first.
pub const HISTORY_MAX_BYTES: usize = 32 * 1024;

/// Most bytes of one error in a history.
const HISTORY_ERROR_MAX_BYTES: usize = 512;

/// How the pause between attempts grows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backoff {
    /// Always the same.
    Fixed,
    /// Twice as long after each attempt, up to a limit, and up to a half of it less by chance: jobs that failed together do
    /// not come back together.
    #[default]
    Exponential,
}

impl Backoff {
    /// The word for it, in configurations and in the hash of a job.
    pub const fn as_str(self) -> &'static str {
        match self {
            Backoff::Fixed => "fixed",
            Backoff::Exponential => "exponential",
        }
    }
}

/// A text that names no kind of backoff.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("backoff is neither fixed nor exponential")]
pub struct NoBackoff;

impl FromStr for Backoff {
    type Err = NoBackoff;
    fn from_str(text: &str) -> Result<Self, NoBackoff> {
        [Backoff::Fixed, Backoff::Exponential].into_iter().find(|kind| kind.as_str() == text).ok_or(NoBackoff)
    }
}

/// SQLSTATEs by code (`23505`) or by class (`23`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
pub struct SqlStates(Vec<String>);

/// A text that is no SQLSTATE and no class of them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither a SQLSTATE of five characters nor a class of two")]
pub struct NoSqlState(String);

impl SqlStates {
    /// Whether a code is one of them.
    pub fn contains(&self, code: &str) -> bool {
        self.0.iter().any(|one| code.starts_with(one.as_str()))
    }

    /// With those of another set.
    pub fn and(mut self, other: &SqlStates) -> Self {
        self.0.extend(other.0.iter().cloned());
        self
    }
}

impl TryFrom<Vec<String>> for SqlStates {
    type Error = NoSqlState;
    fn try_from(codes: Vec<String>) -> Result<Self, NoSqlState> {
        let fits = |code: &str| {
            matches!(code.len(), 2 | 5) && code.bytes().all(|b| b.is_ascii_digit() || b.is_ascii_uppercase())
        };
        match codes.iter().find(|code| !fits(code)) {
            Some(code) => Err(NoSqlState(code.chars().take(20).collect())),
            None => Ok(Self(codes)),
        }
    }
}

impl From<SqlStates> for Vec<String> {
    fn from(states: SqlStates) -> Self {
        states.0
    }
}

impl FromStr for SqlStates {
    type Err = NoSqlState;
    /// Separated by blanks or commas, as a job's hash has them.
    fn from_str(text: &str) -> Result<Self, NoSqlState> {
        let words = text.split([' ', ',']).filter(|word| !word.is_empty());
        words.map(str::to_owned).collect::<Vec<_>>().try_into()
    }
}

impl std::fmt::Display for SqlStates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.join(" "))
    }
}

/// When a job is tried again. Errors that prove that nothing was done and that trying again may help are always retryable:
/// no connection, serialization failures, deadlocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetryPolicy {
    /// How often a statement is tried in all.
    pub max_attempts: NonZeroU32,
    /// How the pause grows.
    pub backoff: Backoff,
    /// The pause before the second attempt.
    pub delay: Duration,
    /// The longest pause.
    pub delay_max: Duration,
    /// Errors that are retryable besides, where the statement was rolled back or its job is idempotent.
    pub on: SqlStates,
}

impl Default for RetryPolicy {
    /// One attempt, as the layout of foreign producers has it.
    fn default() -> Self {
        Self {
            max_attempts: NonZeroU32::MIN,
            backoff: Backoff::Exponential,
            delay: Duration::from_secs(1),
            delay_max: Duration::from_secs(300),
            on: SqlStates::default(),
        }
    }
}

/// What a pool or a job says of its retries; what it does not say is as elsewhere.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetryChoice {
    /// See [`RetryPolicy::max_attempts`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_attempts: Option<NonZeroU32>,
    /// See [`RetryPolicy::backoff`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backoff: Option<Backoff>,
    /// See [`RetryPolicy::delay`].
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub delay: Option<Duration>,
    /// See [`RetryPolicy::delay_max`].
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub delay_max: Option<Duration>,
    /// Joins those that are retryable anyway, see [`RetryPolicy::on`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on: Option<SqlStates>,
}

impl RetryPolicy {
    /// This policy with a choice over it.
    pub fn with(&self, choice: &RetryChoice) -> Self {
        Self {
            max_attempts: choice.max_attempts.unwrap_or(self.max_attempts),
            backoff: choice.backoff.unwrap_or(self.backoff),
            delay: choice.delay.unwrap_or(self.delay),
            delay_max: choice.delay_max.unwrap_or(self.delay_max),
            on: match &choice.on {
                Some(more) => self.on.clone().and(more),
                None => self.on.clone(),
            },
        }
    }

    /// Whether another attempt is allowed after so many that ended in an error.
    pub fn allows_after(&self, attempts: u64) -> bool {
        attempts < u64::from(self.max_attempts.get())
    }

    /// The pause after so many attempts; `chance` is any number, another one for each.
    pub fn pause(&self, attempts: u64, chance: u64) -> Duration {
        match self.backoff {
            Backoff::Fixed => self.delay.min(self.delay_max),
            Backoff::Exponential => {
                let doublings = attempts.saturating_sub(1).min(30) as u32;
                let whole = self.delay.saturating_mul(1 << doublings).min(self.delay_max);
                let half = whole / 2;
                half + Duration::from_secs_f64((whole - half).as_secs_f64() * (chance % 1_001) as f64 / 1_000.0)
            }
        }
    }
}

/// One try of a job that did not end it well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Try {
    /// The step that was tried: see [`crate::model::sql::Statement::step`]. Absent where the worker was lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
    /// The session that tried.
    pub worker: String,
    /// When it began, ISO 8601.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<String>,
    /// When it ended, or was given up.
    pub ended_at: String,
    /// What went wrong.
    pub error: String,
    /// Whether the worker was lost, so that this was no attempt of the job's own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unclean: bool,
}

/// The tries that a job's hash tells of, a JSON object a line, the oldest first. Lines that are none are left out.
pub fn read_history(text: &str) -> Vec<Try> {
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// A history with one more try. Functions append to it in the same way.
pub fn write_history(text: &str, mut one: Try) -> String {
    one.error.truncate(one.error.floor_char_boundary(HISTORY_ERROR_MAX_BYTES));
    let line = serde_json::to_string(&one).expect("texts can be written as JSON");
    let mut all = if text.is_empty() { line } else { format!("{text}\n{line}") };
    while all.len() > HISTORY_MAX_BYTES {
        match all.find('\n') {
            Some(end) => drop(all.drain(..=end)),
            None => all.clear(),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_grows_to_its_limit_and_is_no_shorter_than_a_half() {
        let policy =
            RetryPolicy { delay: Duration::from_secs(1), delay_max: Duration::from_secs(60), ..RetryPolicy::default() };
        for (attempts, whole) in [(1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (1_000_000, 60)] {
            for chance in [0, 1, 500, 1_000, u64::MAX] {
                let pause = policy.pause(attempts, chance).as_secs_f64();
                assert!(pause >= f64::from(whole) / 2.0 && pause <= f64::from(whole), "{attempts}: {pause}");
            }
        }
        assert!(policy.pause(3, 0) < policy.pause(3, 1_000), "chance counts");
        let fixed = RetryPolicy { backoff: Backoff::Fixed, ..policy };
        assert_eq!((fixed.pause(1, 7), fixed.pause(9, 8)), (Duration::from_secs(1), Duration::from_secs(1)));
    }

    #[test]
    fn codes_and_classes_are_told_apart_from_other_texts() {
        let states: SqlStates = "23505, 55P03 53".parse().unwrap();
        for (code, wanted) in [("23505", true), ("23503", false), ("53100", true), ("55P03", true), ("5", false)] {
            assert_eq!(states.contains(code), wanted, "{code}");
        }
        assert!(!SqlStates::default().contains("40001"));
        for bad in ["4000", "x", "ab", "23505;", "234567"] {
            assert!(bad.parse::<SqlStates>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_job_says_more_than_its_pool_and_a_pool_more_than_the_rest() {
        let pool = RetryChoice { max_attempts: NonZeroU32::new(5), on: "53".parse().ok(), ..RetryChoice::default() };
        let job = RetryChoice { max_attempts: NonZeroU32::new(2), on: "23505".parse().ok(), ..RetryChoice::default() };
        let policy = RetryPolicy::default().with(&pool).with(&job);
        assert_eq!(policy.max_attempts.get(), 2);
        assert!(policy.on.contains("53200") && policy.on.contains("23505"));
        assert_eq!(policy.delay, RetryPolicy::default().delay);
        assert!(policy.allows_after(1) && !policy.allows_after(2));
    }

    #[test]
    fn a_history_keeps_the_newest_and_stays_small() {
        let one = |n: usize| Try {
            step: Some("0".into()),
            worker: format!("w{n}"),
            started_at: None,
            ended_at: "2026-01-01T00:00:00.000Z".into(),
            error: "é".repeat(1_000),
            unclean: false,
        };
        let text = (0..200).fold(String::new(), |text, n| write_history(&text, one(n)));
        assert!(text.len() <= HISTORY_MAX_BYTES);
        let tries = read_history(&text);
        assert_eq!(tries.last().unwrap().worker, "w199");
        assert!(tries.len() > 40 && tries[0].error.len() <= 512);
        assert_eq!(read_history("junk\n{}\n"), []);
    }
}
