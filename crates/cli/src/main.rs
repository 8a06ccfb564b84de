//! `drayman`: submits, shows, lists, watches and retries jobs, and looks after what they are kept in.

use std::process::ExitCode;

use clap::Parser;
use console::Failure;

mod cli;
mod doctor;
mod follow;
mod list;
mod retry;
mod status;
mod submit;
mod watch;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    console::exit(run(cli::Cli::parse()).await)
}

async fn run(cli: cli::Cli) -> Result<u8, Failure> {
    match cli.command {
        cli::Command::Submit(args) => submit::run(&cli.common, *args).await,
        cli::Command::Status(args) => status::run(&cli.common, args).await,
        cli::Command::List(args) => list::run(&cli.common, args).await,
        cli::Command::Retry(args) => retry::run(&cli.common, args).await,
        cli::Command::Watch(args) => watch::run(&cli.common, args).await,
        cli::Command::Doctor(args) => doctor::run(&cli.common, args).await,
    }
}
