//! The command line of `drayman`.

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use console::Common;
use queue_core::model::Status;

/// A job that was waited for did not end well.
pub const FAILED: u8 = 1;
/// A job was refused: it is larger than allowed, its user has too many, Redis has no room, or it can't be retried.
pub const REFUSED: u8 = 4;
/// A job is queued, but fewer replicas than wanted have confirmed it in time.
pub const UNCONFIRMED: u8 = 7;
/// A job was not over when the time to wait for it was.
pub const NOT_OVER: u8 = 6;
/// Keys do not agree, and were not repaired.
pub const WRONG: u8 = 8;

const EXIT_CODES: &str = "\
Exit codes:
  0  all went as asked
  1  a job that was waited for ended otherwise than done
  2  wrong command line, configuration or query
  3  no such job
  4  refused: too many jobs queued, too large, no room in Redis, or not to be retried
  5  Redis can't be reached or refused; whether a job was submitted may be unknown: ask with its id
  6  a job was not over when the time to wait for it was
  7  queued, but confirmed by fewer replicas than wanted
  8  the doctor found keys that do not agree, and did not repair all of them

Where several apply, the first of 5, 2, 4, 3, 7, 1, 6, 8 counts.";

/// Submits, shows, lists, watches and retries jobs.
#[derive(Debug, Parser)]
#[command(name = "drayman", version, after_help = EXIT_CODES, arg_required_else_help = true)]
pub struct Cli {
    /// Flags of every program.
    #[command(flatten)]
    pub common: Common,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Submit a job, or many, and print the ids
    Submit(Box<Submit>),
    /// Show all about jobs, but for SQL text and connections
    Status(StatusArgs),
    /// List jobs: those that run, wait, are scheduled, have ended
    List(List),
    /// Start new runs of jobs that have ended
    Retry(RetryArgs),
    /// Show the moves of jobs as they happen
    Watch(Watch),
    /// Show the state of server, workers and work, and find what is wrong with it
    Doctor(DoctorArgs),
}

/// `drayman submit`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Submit {
    /// Whose job it is
    #[arg(long)]
    pub user: Option<String>,
    /// A database that the workers' configuration names
    #[arg(long, value_name = "NAME", conflicts_with_all = ["host", "port", "dbname", "dbuser", "pass_file"])]
    pub database: Option<String>,
    /// PostgreSQL's host; the workers must allow it
    #[arg(long)]
    pub host: Option<String>,
    /// PostgreSQL's port [default: 5432]
    #[arg(long)]
    pub port: Option<u16>,
    /// Database on that host
    #[arg(long)]
    pub dbname: Option<String>,
    /// Role on that host
    #[arg(long)]
    pub dbuser: Option<String>,
    /// A file that holds the role's password [else: the variable DRAYMAN_PASS]
    #[arg(long, value_name = "FILE")]
    pub pass_file: Option<PathBuf>,
    /// Run this when the job is done
    #[arg(long, value_name = "SQL")]
    pub onsuccess: Option<String>,
    /// Run this when the job failed
    #[arg(long, value_name = "SQL")]
    pub onerror: Option<String>,
    /// How long each of its statements may run: 5m
    #[arg(long, value_name = "DURATION")]
    pub timeout: Option<String>,
    /// How often a statement is tried in all, if its errors allow it
    #[arg(long, value_name = "N")]
    pub max_attempts: Option<NonZeroU32>,
    /// How the pause between attempts grows: fixed or exponential
    #[arg(long, value_name = "KIND")]
    pub backoff: Option<String>,
    /// The pause after the first attempt: 1s
    #[arg(long, value_name = "DURATION")]
    pub retry_delay: Option<String>,
    /// The longest pause: 5m
    #[arg(long, value_name = "DURATION")]
    pub retry_delay_max: Option<String>,
    /// SQLSTATEs or their classes after which it is tried again too: 55P03,53
    #[arg(long, value_name = "CODES")]
    pub retry_on: Option<String>,
    /// Running a statement twice does no harm: it is tried again even if nobody knows what an attempt did
    #[arg(long)]
    pub idempotent: bool,
    /// How long to wait before it may run: 10s
    #[arg(long, value_name = "DURATION")]
    pub delay: Option<String>,
    /// The time from which on it may run, by the clock of Redis: 2027-01-31T08:00:00Z
    #[arg(long, value_name = "TIME")]
    pub run_at: Option<String>,
    /// Its id; submitting the same id again changes nothing [default: a new one]
    #[arg(long, conflicts_with = "jsonl")]
    pub id: Option<String>,
    /// Wait until so many replicas of Redis have confirmed that they have it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub replicas: Option<u32>,
    /// How long to wait for them
    #[arg(long, value_name = "DURATION", requires = "replicas", default_value = "1s", value_parser = humantime::parse_duration)]
    pub replicas_timeout: Duration,
    /// Wait until it is over, for so long if said
    #[arg(long, value_name = "DURATION", num_args = 0..=1, require_equals = true, value_parser = humantime::parse_duration)]
    pub wait: Option<Option<Duration>>,
    /// Read the query from a file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["sql", "jsonl"])]
    pub file: Option<PathBuf>,
    /// Read jobs from standard input, a JSON object a line, with the names of these flags (but `pass` for a password) and
    /// `query`; what a line does not say is taken from the flags
    #[arg(long, conflicts_with = "sql")]
    pub jsonl: bool,
    /// SQL, or JSON of one of the other job forms; several SQL texts are one job; - reads standard input
    pub sql: Vec<String>,
}

/// `drayman status`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct StatusArgs {
    /// The jobs
    #[arg(required = true)]
    pub ids: Vec<String>,
    /// Show the SQL text too
    #[arg(long)]
    pub show_query: bool,
}

/// `drayman list`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct List {
    /// Jobs of this user
    #[arg(long)]
    pub user: Option<String>,
    /// Jobs that are pending, running, scheduled, done, failed, ignored, cancelled, unknown
    #[arg(long)]
    pub status: Option<Status>,
    /// Jobs of this pool: `sql:HOST` or `db:NAME`
    #[arg(long)]
    pub pool: Option<String>,
    /// At most so many
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub limit: usize,
    /// Ids that were set aside because no job could be made of them, with the reasons
    #[arg(long, conflicts_with_all = ["status", "pool"])]
    pub rejected: bool,
}

/// `drayman retry`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
#[command(group = clap::ArgGroup::new("which").required(true).multiple(true).args(["ids", "user", "status", "pool"]))]
pub struct RetryArgs {
    /// The jobs
    #[arg(conflicts_with_all = ["user", "status", "pool"])]
    pub ids: Vec<String>,
    /// Jobs of this user
    #[arg(long)]
    pub user: Option<String>,
    /// Jobs that ended so [default: failed and ignored]
    #[arg(long)]
    pub status: Option<Status>,
    /// Jobs of this pool: `sql:HOST` or `db:NAME`
    #[arg(long)]
    pub pool: Option<String>,
    /// Repeat what was done too; else a run begins with the first statement that was not
    #[arg(long)]
    pub from_start: bool,
}

/// `drayman watch`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Watch {
    /// The jobs; ends when all of them are over [default: everybody's jobs, without an end]
    pub ids: Vec<String>,
    /// All jobs of this user, without an end
    #[arg(long, conflicts_with = "ids")]
    pub user: Option<String>,
}

/// `drayman doctor`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct DoctorArgs {
    /// Repair keys that do not agree; the leader among the workers does the same, every minute
    #[arg(long)]
    pub repair: bool,
}
