//! The command line of `drayman-canceller`.

use std::time::Duration;

use clap::{Parser, ValueEnum};
use console::Common;
use queue_core::model::Status;

/// Not every job that was meant is cancelled.
pub const TOO_LATE: u8 = 1;
/// The end of a running job was not confirmed in time.
pub const UNCONFIRMED: u8 = 4;

const EXIT_CODES: &str = "\
Exit codes:
  0  every job that was meant is cancelled; with --wait 0s: or is asked to stop
  1  some were too late: they had ended, or ended otherwise; or some ids were not found
  2  wrong command line or configuration, or a mass cancel was not confirmed
  3  no job was found
  4  some jobs were not confirmed to have ended in time; they are still asked to stop
  5  Redis can't be reached or refused; some jobs may be cancelled: run it again

Where several apply, the first of 5, 4, 3, 1 counts.";

/// Cancels jobs: waiting ones at once, running ones through their workers.
///
/// Jobs are named by their ids, or selected: those for which all selectors hold. Both together cancel those of the ids that
/// are selected.
#[derive(Debug, Parser)]
#[command(name = "drayman-canceller", version, after_help = EXIT_CODES, arg_required_else_help = true)]
pub struct Cli {
    /// Flags of every program.
    #[command(flatten)]
    pub common: Common,
    /// The jobs
    pub ids: Vec<String>,
    /// Jobs of this user
    #[arg(long, help_heading = "Selectors")]
    pub user: Option<String>,
    /// Jobs of this pool: `sql:HOST` or `db:NAME`
    #[arg(long, help_heading = "Selectors")]
    pub pool: Option<String>,
    /// Jobs submitted longer ago than this: 10m
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration, help_heading = "Selectors")]
    pub older_than: Option<Duration>,
    /// Jobs that stand so
    #[arg(long, help_heading = "Selectors")]
    pub status: Option<Stand>,
    /// Every job
    #[arg(long, conflicts_with_all = ["ids", "user", "pool", "older_than", "status"], help_heading = "Selectors")]
    pub all: bool,
    /// List what would be cancelled, and cancel nothing
    #[arg(long)]
    pub dry_run: bool,
    /// How long to wait for running jobs to end; 0s asks them to stop and does not wait
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = humantime::parse_duration)]
    pub wait: Duration,
    /// Don't ask before cancelling what was selected rather than named
    #[arg(long)]
    pub yes: bool,
}

/// How a job can stand that can be cancelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Stand {
    /// Is a batch that waits to be released
    Held,
    /// Waits for its turn
    Pending,
    /// Waits for a time
    Scheduled,
    /// Runs
    Running,
}

impl From<Stand> for Status {
    fn from(stand: Stand) -> Status {
        match stand {
            Stand::Held => Status::Held,
            Stand::Pending => Status::Pending,
            Stand::Scheduled => Status::Scheduled,
            Stand::Running => Status::Running,
        }
    }
}
