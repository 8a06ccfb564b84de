//! The command line of `drayman batch`.

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use queue_core::batch::RowCursor;
use queue_core::ids::{App, JobId, Op, User};
use queue_core::model::Status;
use queue_core::model::retry::Backoff;
use queue_core::producer::Priority;

use crate::cli::EXIT_CODES;

/// `drayman batch`
#[derive(Debug, Args)]
#[command(arg_required_else_help = true, after_help = EXIT_CODES)]
pub struct Batch {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Submit a batch with the rows of a file or of standard input, and print its id
    Submit(Box<Submit>),
    /// Add rows to a batch that is held: all of them, or none
    Append(Append),
    /// Let the rows of a held batch be worked on
    Release(Release),
    /// End batches early: rows that have not ended are aborted
    Abort(Abort),
    /// Show how a batch stands: its counters and its files
    Status(StatusArgs),
    /// Show rows in the order of their lines, with what became of them
    Rows(Rows),
    /// List the output files of a batch, or write one of them
    Files(Files),
    /// List batches, the latest first
    List(List),
    /// Write all rows with their results, as JSON lines or CSV
    Export(Export),
}

/// How rows are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A header, then a row a record; each row becomes an object of strings
    Csv,
    /// A JSON value a line
    Jsonl,
}

/// Where rows come from.
#[derive(Debug, Args)]
pub struct Source {
    /// How the rows are written [default: by the end of the file's name: .csv, .jsonl or .ndjson]
    #[arg(long)]
    pub format: Option<Format>,
    /// What stands between the fields of a CSV
    #[arg(long, value_name = "CHAR", default_value_t = ',')]
    pub delimiter: char,
    /// The file; - is standard input
    #[arg(default_value = "-")]
    pub file: PathBuf,
}

/// `drayman batch submit`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
#[command(group = clap::ArgGroup::new("work").required(true).args(["app", "statement"]))]
pub struct Submit {
    /// Whose batch it is
    #[arg(long)]
    pub user: User,
    /// The application whose handler works on the rows
    #[arg(long, requires = "op", conflicts_with_all = ["database", "host", "port", "dbname", "dbuser", "pass_file"])]
    pub app: Option<App>,
    /// The operation of the application
    #[arg(long, requires = "app")]
    pub op: Option<Op>,
    /// What else the handler is to know, in JSON
    #[arg(long, value_name = "JSON", requires = "app")]
    pub context: Option<String>,
    /// Or a statement that runs with the values of each row
    #[arg(long, value_name = "SQL")]
    pub statement: Option<String>,
    /// A database that the workers' configuration names
    #[arg(long, value_name = "NAME", conflicts_with_all = ["host", "port", "dbname", "dbuser", "pass_file"])]
    pub database: Option<String>,
    /// PostgreSQL's host; the workers must allow it
    #[arg(long, requires_all = ["dbname", "dbuser"])]
    pub host: Option<String>,
    /// PostgreSQL's port [default: 5432]
    #[arg(long, requires = "host")]
    pub port: Option<u16>,
    /// Database on that host
    #[arg(long, requires = "host")]
    pub dbname: Option<String>,
    /// Role on that host
    #[arg(long, requires = "host")]
    pub dbuser: Option<String>,
    /// A file that holds the role's password [else: the variable DRAYMAN_PASS]
    #[arg(long, value_name = "FILE", requires = "host")]
    pub pass_file: Option<PathBuf>,
    /// Its rows wait until it is released; until then more can be appended
    #[arg(long)]
    pub held: bool,
    /// Its id; submitting the same id again changes nothing [default: a new one]
    #[arg(long, conflicts_with = "key")]
    pub id: Option<JobId>,
    /// Make the id of this key, the user and the work: the same again is the same batch
    #[arg(long)]
    pub key: Option<String>,
    /// How long each row may take: 5s
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub row_timeout: Option<Duration>,
    /// How often a row is tried in all, if its errors allow it
    #[arg(long, value_name = "N")]
    pub max_attempts: Option<NonZeroU32>,
    /// How the pause between attempts grows: fixed or exponential
    #[arg(long, value_name = "KIND")]
    pub backoff: Option<Backoff>,
    /// The pause after the first attempt: 1s
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub retry_delay: Option<Duration>,
    /// The longest pause: 5m
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub retry_delay_max: Option<Duration>,
    /// Its place among the user's own waiting jobs: high, normal or low
    #[arg(long, value_name = "BAND", default_value = "low")]
    pub priority: Priority,
    /// How long it is kept once it is over [default: as the configuration says]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub keep: Option<Duration>,
    /// What it is filed under; may be said several times
    #[arg(long = "tag", value_name = "TAG")]
    pub tags: Vec<String>,
    /// Wait until it is over, for so long if said
    #[arg(long, value_name = "DURATION", num_args = 0..=1, require_equals = true, value_parser = humantime::parse_duration, conflicts_with = "held")]
    pub wait: Option<Option<Duration>>,
    /// Its rows.
    #[command(flatten)]
    pub source: Source,
}

/// `drayman batch append`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Append {
    /// The batch
    pub id: JobId,
    /// Rows that were appended under this key before are not appended again
    #[arg(long)]
    pub key: Option<String>,
    /// Release the batch in the same step
    #[arg(long)]
    pub release: bool,
    /// The rows.
    #[command(flatten)]
    pub source: Source,
}

/// `drayman batch release`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Release {
    /// The batch
    pub id: JobId,
}

/// `drayman batch abort`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Abort {
    /// The batches
    #[arg(required = true)]
    pub ids: Vec<JobId>,
}

/// `drayman batch status`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct StatusArgs {
    /// The batch
    pub id: JobId,
    /// Wait until it is over, for so long if said
    #[arg(long, value_name = "DURATION", num_args = 0..=1, require_equals = true, value_parser = humantime::parse_duration)]
    pub wait: Option<Option<Duration>>,
    /// Show a line whenever its counters have moved, until it is over
    #[arg(long, conflicts_with = "wait")]
    pub watch: bool,
}

/// `drayman batch rows`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Rows {
    /// The batch
    pub id: JobId,
    /// Those that failed alone
    #[arg(long)]
    pub failed: bool,
    /// Those behind this one: the cursor of a row, as a call before has told it
    #[arg(long, value_name = "CURSOR")]
    pub after: Option<RowCursor>,
    /// At most so many
    #[arg(long, value_name = "N", default_value_t = 100, conflicts_with = "all", value_parser = clap::value_parser!(u64).range(1..))]
    pub limit: u64,
    /// All of them
    #[arg(long)]
    pub all: bool,
}

/// `drayman batch files`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Files {
    /// The batch
    pub id: JobId,
    /// Write the file of this name
    #[arg(long, value_name = "NAME")]
    pub get: Option<String>,
    /// Where to; - is standard output
    #[arg(long, value_name = "PATH", default_value = "-", requires = "get")]
    pub output: PathBuf,
}

/// `drayman batch list`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct List {
    /// Batches of this application
    #[arg(long)]
    pub app: Option<App>,
    /// Batches of this operation
    #[arg(long)]
    pub op: Option<Op>,
    /// Batches of this user
    #[arg(long)]
    pub user: Option<User>,
    /// Batches that are held, pending, running, done, failed, cancelled
    #[arg(long)]
    pub status: Option<Status>,
    /// Batches that were submitted within this time: 7d
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub age: Option<Duration>,
    /// At most so many
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub limit: usize,
}

/// `drayman batch export`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Export {
    /// The batch
    pub id: JobId,
    /// How to write: csv has the columns line, status, input, result and messages, the last three in JSON
    #[arg(long, default_value = "jsonl")]
    pub format: Format,
    /// Where to; - is standard output. A file is there once it is whole
    #[arg(long, value_name = "PATH", default_value = "-")]
    pub output: PathBuf,
}
