//! The command line of `drayman track`, and how `drayman track run` ends.

use std::num::NonZeroU32;
use std::time::Duration;

use clap::{Args, Subcommand};
use queue_core::model::track::{Codes, TrackStatus};
use queue_core::tracker::Selection;

use crate::cli::EXIT_CODES;

/// `track run`: there is no such record.
pub const MISSING: u8 = 116;
/// `track run`: another works on the job.
pub const LOCKED: u8 = 117;
/// `track run`: the job has succeeded before.
pub const ALREADY: u8 = 118;
/// `track run`: the job is ignored.
pub const IGNORED: u8 = 119;
/// `track run`: the job has a status from which it does not start.
pub const NOT_READY: u8 = 120;
/// `track run`: the lock was lost, and the command stopped.
pub const LOST: u8 = 124;
/// `track run`: Redis failed: the command was not run, or how it ended is not recorded.
pub const UNRECORDED: u8 = 125;
/// `track run`: the command can't be run.
pub const CANNOT_RUN: u8 = 126;
/// `track run`: there is no such command.
pub const NO_COMMAND: u8 = 127;

const RUN_EXIT_CODES: &str = "\
Exit codes: those of the command, 128 and its number if a signal ended it, or 0 with --skip-error if the command failed and
that is recorded. Else:
    2  wrong command line or configuration
  116  there is no such record: see --create
  117  the job is locked: another works on it
  118  the job has succeeded already
  119  the job is ignored: it failed too often, or somebody said so
  120  the job is not ready: it has a status of the application's own that --ready does not name
  124  the lock was lost while the command ran, and the command was stopped
  125  Redis can't be reached or refused: the command was not run, or how it ended is not recorded; the message says which
  126  the command can't be run
  127  there is no such command";

/// `drayman track`
#[derive(Debug, Args)]
#[command(arg_required_else_help = true)]
pub struct Track {
    /// Jobs that belong together; trackers know nothing of each other
    #[arg(long, value_name = "NAME", default_value = "default", global = true)]
    pub tracker: String,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create a record, and print its id
    Add(Add),
    /// Run a command as an attempt of a job
    Run(Run),
    /// List jobs by status
    List(List),
    /// Show all about jobs
    Show(Show),
    /// Ready jobs that failed, are ignored, or lost their holders
    Reset(Reset),
}

/// What a new record begins with.
#[derive(Debug, Args)]
pub struct New {
    /// The application's data: a JSON object
    #[arg(long, value_name = "JSON")]
    pub data: Option<String>,
    /// A status of the application's own, or one of --codes, to begin with
    #[arg(long, value_name = "N")]
    pub code: Option<u32>,
    /// The application's numbers for pending, in progress, failed, succeeded, ignored [default: 10,20,30,40,50]
    #[arg(long, value_name = "N,N,N,N,N")]
    pub codes: Option<Codes>,
    /// How long the record is kept once the job succeeded or is ignored [default: for ever]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub keep: Option<Duration>,
}

impl New {
    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        self.data.is_none() && self.code.is_none() && self.codes.is_none() && self.keep.is_none()
    }
}

/// `drayman track add`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Add {
    /// The application's own id; adding the same id again changes nothing
    pub id: String,
    /// What it begins with.
    #[command(flatten)]
    pub new: New,
}

/// `drayman track run`
#[derive(Debug, Args)]
#[command(after_help = RUN_EXIT_CODES)]
pub struct Run {
    /// The job
    pub id: String,
    /// Create its record if there is none
    #[arg(long)]
    pub create: bool,
    /// What it begins with.
    #[command(flatten)]
    pub new: New,
    /// How long the lock lives if it is not renewed
    #[arg(long, value_name = "DURATION", default_value = "1m", value_parser = humantime::parse_duration)]
    pub expire: Duration,
    /// Ignore the job once so many attempts have failed
    #[arg(long, value_name = "N")]
    pub max_retry: Option<NonZeroU32>,
    /// Statuses of the application's own from which it may start too
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    pub ready: Vec<u32>,
    /// End with 0 if the command fails and that is recorded
    #[arg(long)]
    pub skip_error: bool,
    /// How long the command may take to end after SIGTERM when the lock is lost; then it is killed
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = humantime::parse_duration)]
    pub grace: Duration,
    /// The command and its arguments
    #[arg(last = true, required = true)]
    pub command: Vec<std::ffi::OsString>,
}

/// `drayman track list`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct List {
    /// Jobs that are pending, in_progress, failed, succeeded, ignored, a number of the application's own, or expired: in
    /// progress, but their locks have expired
    #[arg(long)]
    pub status: Selection,
    /// Those that came to the status last first, instead of those that are longest in it
    #[arg(long)]
    pub newest: bool,
    /// At most so many
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub limit: usize,
}

/// `drayman track show`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Show {
    /// The jobs
    #[arg(required = true)]
    pub ids: Vec<String>,
}

/// `drayman track reset`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Reset {
    /// The jobs
    #[arg(required = true)]
    pub ids: Vec<String>,
    /// Give them this status instead of pending: ignored, or a number of the application's own
    #[arg(long, value_name = "STATUS", default_value = "pending", hide_default_value = true)]
    pub to: TrackStatus,
}
