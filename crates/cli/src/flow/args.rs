//! The command line of `drayman flow`.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};
use queue_core::flow::FlowStatus;
use queue_core::ids::{FlowName, JobId, User};

use crate::cli::EXIT_CODES;

/// `drayman flow`
#[derive(Debug, Args)]
#[command(arg_required_else_help = true, after_help = EXIT_CODES)]
pub struct Flow {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Say what is wrong with definitions
    Check(Check),
    /// Launch a flow, and print the execution's id; goes on where the last execution with the same parameters failed or was stopped
    Launch(Launch),
    /// Launch the instance of an execution again, as it was defined then: what is done is not repeated
    Restart(Restart),
    /// Begin no more steps; those that run come to their ends (drayman-canceller stops these, too)
    Stop(Stop),
    /// Have no launch go on from an execution that failed or was stopped
    Abandon(Execution),
    /// List executions, the latest first
    Executions(Executions),
    /// List the steps of an execution, with what became of them
    Steps(Execution),
    /// Show the parameters of an execution
    Params(Execution),
    /// List instances, each with its latest execution
    List(List),
    /// Draw the steps of an execution with their states
    Show(Show),
}

/// `drayman flow check`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Check {
    /// Ask Redis, too, whether workers serve what the steps need
    #[arg(long)]
    pub served: bool,
    /// Definitions in TOML
    #[arg(required = true)]
    pub files: Vec<PathBuf>,
}

/// How a launch is to be made.
#[derive(Debug, Args)]
pub struct How {
    /// The execution's id, made up if not given. The same launch again changes nothing
    #[arg(long)]
    pub id: Option<JobId>,
    /// Run all steps, whatever is done
    #[arg(long)]
    pub force: bool,
    /// Wait until it has ended, for so long if said
    #[arg(long, value_name = "DURATION", num_args = 0..=1, require_equals = true, value_parser = humantime::parse_duration)]
    pub wait: Option<Option<Duration>>,
}

/// `drayman flow launch`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Launch {
    /// Whose flow it is: its steps are jobs of this user
    #[arg(long)]
    pub user: User,
    /// A parameter: day=2026-03-01. May be said several times
    #[arg(short, long = "param", value_name = "NAME=VALUE", value_parser = pair)]
    pub params: Vec<(String, String)>,
    /// Parameters as a JSON object
    #[arg(long, value_name = "JSON")]
    pub params_json: Option<String>,
    /// How.
    #[command(flatten)]
    pub how: How,
    /// The definition in TOML
    pub file: PathBuf,
}

/// `drayman flow restart`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Restart {
    /// How.
    #[command(flatten)]
    pub how: How,
    /// The execution
    pub execution: JobId,
}

/// `drayman flow stop`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Stop {
    /// Wait until it has stopped, for so long if said
    #[arg(long, value_name = "DURATION", num_args = 0..=1, require_equals = true, value_parser = humantime::parse_duration)]
    pub wait: Option<Option<Duration>>,
    /// The execution
    pub execution: JobId,
}

/// One execution.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Execution {
    /// The execution
    pub execution: JobId,
}

/// `drayman flow show`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Show {
    /// Draw it anew whenever a step has moved, until it has ended
    #[arg(long)]
    pub watch: bool,
    /// The execution
    pub execution: JobId,
}

fn moment(text: &str) -> Result<SystemTime, String> {
    queue_core::model::flow::moment(text)
        .ok_or_else(|| "no date and no date-time, as 2026-03-01T04:00:00Z is one".into())
}

/// Which executions.
#[derive(Debug, Args)]
pub struct Which {
    /// Of this flow
    #[arg(long)]
    pub flow: Option<FlowName>,
    /// Of this user
    #[arg(long)]
    pub user: Option<User>,
    /// Those that are running, stopping, done, failed, stopped or abandoned
    #[arg(long)]
    pub status: Option<FlowStatus>,
    /// Launched within this time: 7d
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub age: Option<Duration>,
    /// Launched then or later: a date, or a date and a time: 2026-03-01, 2026-03-01T04:00:00+01:00
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub since: Option<SystemTime>,
    /// Launched before
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub until: Option<SystemTime>,
    /// At most so many
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub limit: usize,
}

/// `drayman flow executions`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Executions {
    /// Which.
    #[command(flatten)]
    pub which: Which,
    /// Of this instance
    #[arg(long)]
    pub instance: Option<String>,
}

/// `drayman flow list`
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct List {
    /// Which.
    #[command(flatten)]
    pub which: Which,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("a parameter is NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}
