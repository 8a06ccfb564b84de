//! `drayman`: submits, shows, lists, watches, retries and tracks jobs, also those that recur, and looks after what they are kept in.

use std::process::ExitCode;

use clap::Parser;
use console::Failure;

mod batch;
mod cli;
mod cron;
mod doctor;
mod flow;
mod follow;
mod library;
mod limits;
mod list;
mod result;
mod retry;
mod status;
mod submit;
mod track;
mod watch;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    console::exit(run(cli::Cli::parse()).await)
}

async fn run(cli: cli::Cli) -> Result<u8, Failure> {
    match cli.command {
        cli::Command::Submit(args) => submit::run(&cli.common, *args).await,
        cli::Command::Status(args) => status::run(&cli.common, args).await,
        cli::Command::Result(args) => result::run(&cli.common, args).await,
        cli::Command::List(args) => list::run(&cli.common, args).await,
        cli::Command::Retry(args) => retry::run(&cli.common, args).await,
        cli::Command::Cron(args) => cron::run(&cli.common, args.command).await,
        cli::Command::Watch(args) => watch::run(&cli.common, args).await,
        cli::Command::Batch(args) => batch::run(&cli.common, args).await,
        cli::Command::Flow(args) => flow::run(&cli.common, args).await,
        cli::Command::Track(args) => track::run(&cli.common, args).await,
        cli::Command::Doctor(args) => doctor::run(&cli.common, args).await,
        cli::Command::Library(args) => library::run(&cli.common, args).await,
        cli::Command::Limits(args) => limits::run(&cli.common, args).await,
        cli::Command::Pause(args) => limits::pause(&cli.common, args).await,
        cli::Command::Resume(args) => limits::resume(&cli.common, args).await,
    }
}
