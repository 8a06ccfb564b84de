//! What a job is, in words: its status and the moves between statuses, and the forms that its work can take. Nothing here
//! does I/O or asks for the time.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub mod batch;
pub mod chunk;
pub mod cron;
pub mod flow;
pub mod retry;
pub mod sql;
pub mod task;
pub mod track;

/// Where a job, or one statement of it, stands. Written as its name in lower case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Waits for something other than time: the steps before it.
    Held,
    /// Waits for a time: a delay or a retry.
    Scheduled,
    /// Waits for its turn.
    Pending,
    /// Some session has claimed it.
    Running,
    /// Ended, and did what it was to do.
    Done,
    /// Ended with an error.
    Failed,
    /// Ended because somebody asked for that.
    Cancelled,
    /// A statement that is not to run, because of how others ended.
    Skipped,
    /// Ended with an error after all the attempts that it was allowed, or set aside because it kept ending its workers.
    Ignored,
    /// Ended, and nobody can say how.
    Unknown,
}

/// A move between statuses that [`Status::may_become`] does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Cannot set status from {from} to {to}")]
pub struct MoveRefused {
    /// The present status.
    pub from: Status,
    /// The one that was asked for.
    pub to: Status,
}

/// A text that names no status.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no such status")]
pub struct NoSuchStatus;

impl Status {
    /// Every status.
    pub const ALL: [Status; 10] = [
        Status::Held,
        Status::Scheduled,
        Status::Pending,
        Status::Running,
        Status::Done,
        Status::Failed,
        Status::Cancelled,
        Status::Skipped,
        Status::Ignored,
        Status::Unknown,
    ];

    /// The status as it is written in Redis.
    pub const fn as_str(self) -> &'static str {
        match self {
            Status::Held => "held",
            Status::Scheduled => "scheduled",
            Status::Pending => "pending",
            Status::Running => "running",
            Status::Done => "done",
            Status::Failed => "failed",
            Status::Cancelled => "cancelled",
            Status::Skipped => "skipped",
            Status::Ignored => "ignored",
            Status::Unknown => "unknown",
        }
    }

    /// The statuses that may follow this one within a run: the one table of moves, for jobs and for statements. Final
    /// statuses lead nowhere: a job that is retried starts a new run.
    pub const fn moves(self) -> &'static [Status] {
        match self {
            Status::Held => &[Status::Pending, Status::Cancelled],
            Status::Scheduled => &[Status::Pending, Status::Cancelled],
            Status::Pending => &[Status::Running, Status::Cancelled, Status::Unknown, Status::Skipped],
            Status::Running => &[
                Status::Done,
                Status::Failed,
                Status::Cancelled,
                Status::Ignored,
                Status::Unknown,
                Status::Pending,
                Status::Scheduled,
            ],
            Status::Done | Status::Failed | Status::Cancelled | Status::Skipped | Status::Ignored | Status::Unknown => {
                &[]
            }
        }
    }

    /// Whether a job or a statement may move from this status to `to`.
    pub fn may_become(self, to: Status) -> bool {
        self.moves().contains(&to)
    }

    /// Whether a job that has this status has ended. `skipped` says that a statement never ran, not that it ended.
    pub const fn is_final(self) -> bool {
        matches!(self, Status::Done | Status::Failed | Status::Cancelled | Status::Ignored | Status::Unknown)
    }

    /// Makes the move if the table allows it, and tells whether it did. The only way in which this crate changes a status.
    pub(crate) fn shift(&mut self, to: Status) -> bool {
        let allowed = self.may_become(to);
        if allowed {
            *self = to;
        }
        allowed
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Status {
    type Err = NoSuchStatus;
    fn from_str(text: &str) -> Result<Self, NoSuchStatus> {
        Self::ALL.into_iter().find(|status| status.as_str() == text).ok_or(NoSuchStatus)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_is_written_and_read_as_the_same_text() {
        for status in Status::ALL {
            assert_eq!(status.as_str().parse(), Ok(status));
            assert_eq!(serde_json::to_value(status).unwrap(), status.as_str());
            assert_eq!(serde_json::from_value::<Status>(status.as_str().into()).unwrap(), status);
        }
        assert_eq!("Done".parse::<Status>(), Err(NoSuchStatus));
    }

    #[test]
    fn no_move_leaves_a_final_status_and_every_other_one_leads_on() {
        for status in Status::ALL {
            assert_eq!(status.moves().is_empty(), status.is_final() || status == Status::Skipped, "{status}");
            assert!(!status.may_become(status), "{status}");
        }
    }

    #[test]
    fn a_refusal_names_both_statuses() {
        let refusal = MoveRefused { from: Status::Done, to: Status::Cancelled };
        assert_eq!(refusal.to_string(), "Cannot set status from done to cancelled");
    }
}
