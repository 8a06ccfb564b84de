//! What a tracker keeps of a job that its application runs itself: status and code, lock, failures, attempts.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value};

/// Most bytes of a job's data as JSON. It must fit into one variable of a program's environment.
pub const DATA_MAX_BYTES: usize = 64 * 1024;
/// Most bytes of an error's text.
pub const ERROR_MAX_BYTES: usize = 4 * 1024;
/// Most bytes of an error's trace. Of a longer one the end is kept.
pub const TRACE_MAX_BYTES: usize = 16 * 1024;
/// Most bytes of an error in the history.
const HISTORY_ERROR_MAX_BYTES: usize = 512;

/// Names that the record itself uses. Data has no such members, so that nobody takes one for the other.
pub const BOOKKEEPING: &[&str] = &[
    "id",
    "status",
    "code",
    "codes",
    "create_at",
    "update_at",
    "lock",
    "lock_at",
    "lock_until",
    "fence",
    "retry",
    "max_retry",
    "keep_ms",
    "data",
    "errors",
    "history",
];

/// Where a tracked job stands. Written as its name, or as the application's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TrackStatus {
    /// Waits for its first start, or was reset.
    Pending,
    /// Locked by who works on it; or was, if the lock has expired.
    InProgress,
    /// The last attempt failed. It may be started again.
    Failed,
    /// An attempt succeeded. Nothing starts it again.
    Succeeded,
    /// Set aside: it failed as often as it may, or somebody said so. Starts again after a reset.
    Ignored,
    /// A number that has a meaning to the application alone. It starts only if the start names it.
    Own(u32),
}

/// A text that names no status of tracked jobs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no such status: pending, in_progress, failed, succeeded, ignored, or a number")]
pub struct NoTrackStatus;

impl TrackStatus {
    /// The statuses that have a name, in the order in which their numbers are written.
    pub const NAMED: [TrackStatus; 5] = [
        TrackStatus::Pending,
        TrackStatus::InProgress,
        TrackStatus::Failed,
        TrackStatus::Succeeded,
        TrackStatus::Ignored,
    ];
}

impl fmt::Display for TrackStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            TrackStatus::Pending => "pending",
            TrackStatus::InProgress => "in_progress",
            TrackStatus::Failed => "failed",
            TrackStatus::Succeeded => "succeeded",
            TrackStatus::Ignored => "ignored",
            TrackStatus::Own(code) => return f.pad(&code.to_string()),
        })
    }
}

impl FromStr for TrackStatus {
    type Err = NoTrackStatus;
    fn from_str(text: &str) -> Result<Self, NoTrackStatus> {
        let named = Self::NAMED.into_iter().find(|status| status.to_string() == text);
        named.or_else(|| text.parse().ok().map(TrackStatus::Own)).ok_or(NoTrackStatus)
    }
}

impl Serialize for TrackStatus {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// An application's numbers for the five statuses. They are kept with each record, so that whoever changes its status
/// writes the right one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Codes([u32; 5]);

/// Numbers that can't stand for the five statuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CodesError {
    /// Two statuses have the same.
    #[error("two statuses have the code {0}")]
    Clash(u32),
    /// They are not five numbers.
    #[error("the codes are not five numbers separated by commas: 10,20,30,40,50")]
    NotFive,
}

impl Default for Codes {
    fn default() -> Self {
        Self([10, 20, 30, 40, 50])
    }
}

impl Codes {
    /// The numbers of [`TrackStatus::NAMED`], in that order.
    pub fn new(codes: [u32; 5]) -> Result<Self, CodesError> {
        match codes.iter().enumerate().find(|(at, code)| codes[..*at].contains(code)) {
            Some((_, code)) => Err(CodesError::Clash(*code)),
            None => Ok(Self(codes)),
        }
    }

    /// The status that a number stands for.
    pub fn status(&self, code: u32) -> TrackStatus {
        let at = self.0.iter().position(|one| *one == code);
        at.map_or(TrackStatus::Own(code), |at| TrackStatus::NAMED[at])
    }
}

impl fmt::Display for Codes {
    /// As a record has them: separated by blanks.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.map(|code| code.to_string()).join(" "))
    }
}

impl FromStr for Codes {
    type Err = CodesError;
    /// Separated by commas.
    fn from_str(text: &str) -> Result<Self, CodesError> {
        let codes: Result<Vec<u32>, _> = text.split(',').map(str::parse).collect();
        Self::new(codes.ok().and_then(|codes| codes.try_into().ok()).ok_or(CodesError::NotFive)?)
    }
}

/// What an attempt failed of.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Failure {
    /// The error, for people.
    pub error: String,
    /// Where it comes from: causes, a backtrace, the last lines of a program's output.
    pub trace: String,
}

impl Failure {
    /// Of an error: its text, and as the trace what `Debug` shows of it.
    pub fn of<E: fmt::Display + fmt::Debug + ?Sized>(error: &E) -> Self {
        Self { error: error.to_string(), trace: format!("{error:?}") }
    }

    /// As it is kept: long texts are cut.
    pub fn cut(mut self) -> Self {
        self.error.truncate(self.error.floor_char_boundary(ERROR_MAX_BYTES));
        if self.trace.len() > TRACE_MAX_BYTES {
            let from = self.trace.ceil_char_boundary(self.trace.len() - TRACE_MAX_BYTES);
            self.trace.drain(..from);
        }
        self
    }

    /// The error as the history has it.
    pub fn for_history(&self) -> &str {
        &self.error[..self.error.floor_char_boundary(HISTORY_ERROR_MAX_BYTES)]
    }
}

impl From<&str> for Failure {
    fn from(error: &str) -> Self {
        Self { error: error.to_owned(), trace: String::new() }
    }
}

impl From<String> for Failure {
    fn from(error: String) -> Self {
        Self { error, trace: String::new() }
    }
}

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Its holder said that it succeeded.
    Succeeded,
    /// Its holder said that it failed.
    Failed,
    /// Its lock expired and was taken. Counts as a failure.
    Lost,
}

/// One attempt that is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// Who held the lock: host, pid, and a nonce of this attempt.
    pub holder: String,
    /// When it began, ISO 8601.
    pub started_at: String,
    /// When it ended, or was found to be lost.
    pub ended_at: String,
    /// How it ended.
    pub outcome: Outcome,
    /// What it failed of, cut short.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The attempts that a history tells of, a JSON object a line, the oldest first. Lines that are none are left out.
pub fn read_attempts(text: &str) -> Vec<Attempt> {
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// The right of one holder to work on a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Lock {
    /// Who holds it: host, pid, and a nonce of this attempt.
    pub holder: String,
    /// Since when, ISO 8601.
    pub at: String,
    /// Until when unless it is renewed, in ms since 1970 by the clock of Redis.
    pub until_ms: u64,
    /// Whether that time has come: anybody may take it.
    pub expired: bool,
}

/// All that is kept of one job.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Record {
    /// The application's own id.
    pub id: String,
    /// Where it stands.
    pub status: TrackStatus,
    /// The application's number for that.
    pub code: u32,
    /// When the record was created, ISO 8601.
    pub create_at: String,
    /// When it came to its status.
    pub update_at: String,
    /// Who works on it.
    pub lock: Option<Lock>,
    /// How many attempts have failed since the last that succeeded, or since a reset.
    pub retry: u32,
    /// The application's data.
    pub data: Value,
    /// The latest failure. A success leaves it.
    pub errors: Option<Failure>,
    /// Attempts that are over, the oldest first. Old ones go where there are many.
    pub history: Vec<Attempt>,
}

/// Why a value can't become part of a job's data.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DataError {
    /// The name is one that the record itself uses.
    #[error("{0} belongs to the bookkeeping and can't be set")]
    Bookkeeping(String),
    /// The data is no JSON object.
    #[error("the data is no JSON object")]
    NoObject,
    /// The value can't be written as JSON.
    #[error("the value can't be written as JSON: {0}")]
    NoJson(String),
    /// There would be too much of it; how many bytes.
    #[error("the data is {0} bytes long, at most {DATA_MAX_BYTES} are allowed")]
    TooLarge(usize),
}

/// The data of a new record, checked.
pub fn check_data(data: &Map<String, Value>) -> Result<String, DataError> {
    if let Some(name) = data.keys().find(|name| BOOKKEEPING.contains(&name.as_str())) {
        return Err(DataError::Bookkeeping(name.clone()));
    }
    let text = serde_json::to_string(data).map_err(|error| DataError::NoJson(error.to_string()))?;
    if text.len() > DATA_MAX_BYTES { Err(DataError::TooLarge(text.len())) } else { Ok(text) }
}

/// A job's data with what an attempt wants to change of it. It is written when the attempt succeeds, in the same step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Updates {
    data: Map<String, Value>,
    changed: bool,
}

impl Updates {
    /// Nothing changed yet.
    pub(crate) fn of(data: &Value) -> Self {
        Self { data: data.as_object().cloned().unwrap_or_default(), changed: false }
    }

    /// Gives a member of the data a value. An error changes nothing.
    pub fn set(&mut self, key: &str, value: impl Serialize) -> Result<(), DataError> {
        let value = serde_json::to_value(value).map_err(|error| DataError::NoJson(error.to_string()))?;
        let before = self.data.insert(key.to_owned(), value);
        if let Err(error) = check_data(&self.data) {
            match before {
                Some(before) => drop(self.data.insert(key.to_owned(), before)),
                None => drop(self.data.shift_remove(key)),
            }
            return Err(error);
        }
        self.changed = true;
        Ok(())
    }

    /// The data as it will be, if anything changes.
    pub(crate) fn text(&self) -> Option<String> {
        self.changed.then(|| serde_json::to_string(&self.data).expect("a JSON value"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_status_is_written_and_read_as_the_same_text() {
        for status in TrackStatus::NAMED.into_iter().chain([TrackStatus::Own(0), TrackStatus::Own(u32::MAX)]) {
            assert_eq!(status.to_string().parse(), Ok(status));
        }
        for bad in ["Pending", "", "-1", "4294967296"] {
            assert_eq!(bad.parse::<TrackStatus>(), Err(NoTrackStatus), "{bad:?}");
        }
    }

    #[test]
    fn a_code_stands_for_one_status() {
        assert_eq!(Codes::new([1, 2, 3, 2, 5]), Err(CodesError::Clash(2)));
        let codes = Codes::new([1, 2, 3, 4, 5]).unwrap();
        assert_eq!((codes.status(4), codes.status(10)), (TrackStatus::Succeeded, TrackStatus::Own(10)));
        assert_eq!((codes.to_string().as_str(), "1,2,3,4,5".parse()), ("1 2 3 4 5", Ok(codes)));
        assert_eq!("1,2,3,4".parse::<Codes>(), Err(CodesError::NotFive));
    }

    #[test]
    fn updates_refuse_bookkeeping_and_too_much_and_keep_what_was_set() {
        let mut updates = Updates::of(&json!({ "a": 1, "big": "x" }));
        assert_eq!(updates.text(), None);
        for name in BOOKKEEPING {
            assert_eq!(updates.set(name, 1), Err(DataError::Bookkeeping((*name).into())));
        }
        assert!(matches!(updates.set("big", "x".repeat(DATA_MAX_BYTES)), Err(DataError::TooLarge(_))));
        assert!(matches!(updates.set("new", "x".repeat(DATA_MAX_BYTES)), Err(DataError::TooLarge(_))));
        assert_eq!(updates.text(), None, "what was refused changes nothing");
        updates.set("b", [1, 2]).unwrap();
        assert_eq!(updates.text().unwrap(), r#"{"a":1,"big":"x","b":[1,2]}"#);
    }

    #[test]
    fn of_a_long_failure_the_begin_of_the_error_and_the_end_of_the_trace_stay() {
        let long = Failure { error: "é".repeat(ERROR_MAX_BYTES), trace: "é".repeat(TRACE_MAX_BYTES) + "x" }.cut();
        assert!(long.error.len() <= ERROR_MAX_BYTES && long.trace.len() <= TRACE_MAX_BYTES);
        assert!(long.trace.ends_with("éx") && long.for_history().len() == 512);
    }
}
