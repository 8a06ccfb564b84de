//! The command line of `drayman`.

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use console::Common;
use queue_core::ids::{App, Op, Pool, ScheduleName, User};
use queue_core::limits::{Concurrency, Period, Rate, Reason, Set, Weight};
use queue_core::model::Status;
use queue_core::model::task::Encoding;
use queue_core::schedule::Missed;

/// A job that was waited for did not end well.
pub const FAILED: u8 = 1;
/// A job was refused: it is larger than allowed, its user has too many, another holds its unique key, Redis has no room, or
/// it can't be retried.
pub const REFUSED: u8 = 4;
/// A job is queued, but fewer replicas than wanted have confirmed it in time.
pub const UNCONFIRMED: u8 = 7;
/// A job was not over when the time to wait for it was.
pub const NOT_OVER: u8 = 6;
/// Keys do not agree, and were not repaired.
pub const WRONG: u8 = 8;

pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0  all went as asked
  1  a job that was waited for, or asked for its result, ended otherwise than done
  2  wrong command line, configuration or query
  3  no such job, batch, flow, file or schedule
  4  refused: too many jobs queued, too large, its unique key held by another, no room in Redis, not to be retried, or a
     key that can't hold limits; of a batch: too many rows or bytes, or its status forbids it;
     of a flow: its instance runs, is done or was abandoned, or nobody serves a step
  5  Redis or the object store can't be reached or refused; whether a job was submitted may be unknown: ask with its id
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
    /// Write the result of a task, or one of its files, as it is
    Result(ResultArgs),
    /// List jobs: those that run, wait, are scheduled, have ended
    List(List),
    /// Start new runs of jobs that have ended
    Retry(RetryArgs),
    /// Define jobs that recur, list, pause and remove them, run one now
    Cron(CronArgs),
    /// Show the moves of jobs as they happen
    Watch(Watch),
    /// Submit batches of rows, hold, release and abort them, read what became of their rows
    Batch(crate::batch::args::Batch),
    /// Launch jobs made of steps, look at them, stop them and go on with them
    Flow(crate::flow::args::Flow),
    /// Keep the books of jobs that you run yourself
    Track(crate::track::args::Track),
    /// Show the state of server, workers and work, and find what is wrong with it
    Doctor(DoctorArgs),
    /// Show which library of functions Redis has, or load this program's
    Library(LibraryArgs),
    /// Show and change what limits users and pools, while everything runs
    Limits(LimitsArgs),
    /// Start nothing more of a user, a pool, or at all; what runs goes on
    Pause(PauseArgs),
    /// End a pause
    Resume(ResumeArgs),
}

/// `drayman submit`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Submit {
    /// Whose job it is
    #[arg(long)]
    pub user: Option<String>,
    /// The application whose handler is to be called: the job is a task, its input the argument, the file or standard input
    #[arg(long, requires = "op", conflicts_with_all = ["database", "host", "dbname", "dbuser", "pass_file", "onsuccess", "onerror", "retry_on", "idempotent"])]
    pub app: Option<String>,
    /// The operation of the application
    #[arg(long, requires = "app")]
    pub op: Option<String>,
    /// What else the handler is to know, in JSON
    #[arg(long, value_name = "JSON", requires = "app")]
    pub context: Option<String>,
    /// How the task's input is written: json, or msgpack (a file or standard input is MessagePack as it is, an argument is JSON
    /// and written as MessagePack)
    #[arg(long, requires = "app")]
    pub encoding: Option<Encoding>,
    /// A task is not begun after this time, by the clock of Redis, and ended if it runs: 2027-01-31T08:00:00Z
    #[arg(long, value_name = "TIME", requires = "app")]
    pub deadline: Option<String>,
    /// Its place among the user's own waiting jobs: high, normal or low
    #[arg(long, value_name = "BAND")]
    pub priority: Option<String>,
    /// A key that no other job may hold: while it is queued, until it is done (if nothing is said), or for a time
    #[arg(long, value_name = "KEY[=queued|done|1h]")]
    pub unique: Option<String>,
    /// What it is filed under; may be said several times
    #[arg(long = "tag", value_name = "TAG")]
    pub tags: Vec<String>,
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
    /// Wait until it is over, for so long if said; a task's result is printed then
    #[arg(long, value_name = "DURATION", num_args = 0..=1, require_equals = true, value_parser = humantime::parse_duration)]
    pub wait: Option<Option<Duration>>,
    /// Read the query, or a task's input, from a file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["sql", "jsonl"])]
    pub file: Option<PathBuf>,
    /// Read jobs from standard input, a JSON object a line, with the names of these flags (but `pass` for a password) and
    /// `query`, or `input`; what a line does not say is taken from the flags
    #[arg(long, conflicts_with = "sql")]
    pub jsonl: bool,
    /// SQL, or JSON of one of the other job forms; several SQL texts are one job; a task's input; - reads
    /// standard input
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

/// `drayman result`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct ResultArgs {
    /// The task
    pub id: String,
    /// Wait until it is over, for so long if said
    #[arg(long, value_name = "DURATION", num_args = 0..=1, require_equals = true, value_parser = humantime::parse_duration)]
    pub wait: Option<Option<Duration>>,
    /// Write the output file of this name instead
    #[arg(long, value_name = "NAME")]
    pub file: Option<String>,
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
    /// Jobs of this pool: `sql:HOST`, `db:NAME` or `APP.OP`
    #[arg(long)]
    pub pool: Option<Pool>,
    /// Tasks of this application
    #[arg(long)]
    pub app: Option<App>,
    /// Tasks of this operation
    #[arg(long)]
    pub op: Option<Op>,
    /// Jobs that are filed under this tag
    #[arg(long)]
    pub tag: Option<String>,
    /// At most so many
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub limit: usize,
    /// Ids that were set aside because no job could be made of them, with the reasons
    #[arg(long, conflicts_with_all = ["status", "pool", "app", "op", "tag"])]
    pub rejected: bool,
    /// Pools that no worker serves, with the users whose jobs wait for them
    #[arg(long, conflicts_with_all = ["status", "rejected"])]
    pub unserved: bool,
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
    /// Jobs of this pool: `sql:HOST`, `db:NAME` or `APP.OP`
    #[arg(long)]
    pub pool: Option<Pool>,
    /// Repeat what was done too; else a run begins with the first statement that was not
    #[arg(long)]
    pub from_start: bool,
}

/// `drayman cron`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct CronArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: CronCommand,
}

/// What to do with schedules.
#[derive(Debug, Subcommand)]
pub enum CronCommand {
    /// Define a schedule, or define it anew; the same again changes nothing
    Add(Box<CronAdd>),
    /// List all schedules, the one due next first
    List,
    /// Show all about a schedule and its next ticks, but for SQL text and connections
    Show(CronName),
    /// Keep a schedule from making jobs
    Pause(CronName),
    /// Let it go on; the ticks of the pause count as missed
    Resume(CronName),
    /// Forget a schedule; its jobs stay
    Remove(CronName),
    /// Submit one job of it at once, and print the id
    Run(CronName),
}

/// A schedule.
#[derive(Debug, Args)]
pub struct CronName {
    /// Its name
    pub name: ScheduleName,
}

/// `drayman cron add`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct CronAdd {
    /// Its name: letters, digits, `_`, `-` and `.`
    pub name: ScheduleName,
    /// When: minute hour day month weekday, with a second before them if wanted, or @hourly, @daily, @weekly, @monthly, @yearly
    #[arg(long = "cron", value_name = "EXPRESSION")]
    pub expression: String,
    /// The IANA time zone of the expression
    #[arg(long, value_name = "ZONE", default_value = "UTC")]
    pub zone: String,
    /// What becomes of ticks that could not be made in time: `skip` makes the newest, `catch-up` one after the other
    #[arg(long, value_name = "HOW", default_value = "skip")]
    pub missed: Missed,
    /// How late a tick may be made [default: 10m, with catch-up 1day]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub grace: Option<Duration>,
    /// The job, as `drayman submit` has it.
    #[command(flatten)]
    pub job: Submit,
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

/// `drayman limits`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
#[command(group = clap::ArgGroup::new("whose").args(["user", "pool"]))]
pub struct LimitsArgs {
    /// Of this user, over all pools [default: show all limits]
    #[arg(long)]
    pub user: Option<User>,
    /// Of this pool: `sql:HOST`, `db:NAME` or `APP.OP`
    #[arg(long)]
    pub pool: Option<Pool>,
    /// Its share: 2 gets twice what 1 gets; or none, which is 1
    #[arg(long, value_name = "N", requires = "whose")]
    pub weight: Option<Set<Weight>>,
    /// Most of its jobs that run at once, or none
    #[arg(long, value_name = "N", requires = "whose")]
    pub concurrency: Option<Set<Concurrency>>,
    /// Most of its jobs that start in any period of a length, or none: 100/1m
    #[arg(long, value_name = "N/TIME", requires = "whose")]
    pub rate: Option<Set<Rate>>,
    /// How long each statement of the user, and each call of a handler, may run, or none: 10m
    #[arg(long, value_name = "DURATION", requires = "whose", conflicts_with = "pool")]
    pub timeout: Option<Set<Period>>,
    /// Most jobs of each user that run in the pool at once, or none
    #[arg(long, value_name = "N", requires = "whose", conflicts_with = "user")]
    pub per_user: Option<Set<Concurrency>>,
    /// Remove all of its limits; a pause stays
    #[arg(long, requires = "whose", conflicts_with_all = ["weight", "concurrency", "rate", "timeout", "per_user"])]
    pub clear: bool,
}

/// What is paused or resumed: one of these.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct Target {
    /// A user's jobs
    #[arg(long)]
    pub user: Option<User>,
    /// The jobs of a pool: `sql:HOST`, `db:NAME` or `APP.OP`
    #[arg(long)]
    pub pool: Option<Pool>,
    /// Everybody's jobs in all pools
    #[arg(long)]
    pub all: bool,
}

/// `drayman pause`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct PauseArgs {
    /// What is paused
    #[command(flatten)]
    pub target: Target,
    /// Why, for whoever looks later
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub reason: Reason,
}

/// `drayman resume`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct ResumeArgs {
    /// What is resumed
    #[command(flatten)]
    pub target: Target,
}

/// `drayman library`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct LibraryArgs {
    /// What to do [default: show]
    #[command(subcommand)]
    pub command: Option<LibraryCommand>,
}

/// `drayman library …`
#[derive(Debug, Clone, Copy, Subcommand)]
pub enum LibraryCommand {
    /// Show the version that Redis has, and that of this program
    Show,
    /// Load this program's, unless Redis has a later one; workers do so when they start
    Load,
}

/// `drayman doctor`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct DoctorArgs {
    /// Repair keys that do not agree; the leader among the workers does the same, every minute
    #[arg(long)]
    pub repair: bool,
}
