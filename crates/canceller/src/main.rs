//! `drayman-canceller`: cancels jobs, waiting or running, and confirms that they ended.

use std::process::ExitCode;

use clap::Parser;

mod cancel;
mod cli;
mod confirm;
mod select;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    console::exit(cancel::run(cli::Cli::parse()).await)
}
