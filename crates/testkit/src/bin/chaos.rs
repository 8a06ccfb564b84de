//! Random work under random faults, for as many jobs as wanted: `cargo run -p testkit --bin chaos -- --jobs 10000`.
//!
//! Needs the programs of the workspace: `cargo build --workspace --bins`.

use std::panic::catch_unwind;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Parser;
use testkit::chaos::{Options, Random, run};

const EXIT_CODES: &str = "\
Exit codes:
  0  every promise was kept
  1  some were broken: a line with VIOLATION for each, and the command that does the same again
  2  it could not be run to its end: wrong command line, a program or a server is missing";

/// Runs random jobs under random faults against real servers, and looks from outside whether every promise was kept.
#[derive(Debug, Parser)]
#[command(after_help = EXIT_CODES)]
struct Cli {
    /// What decides over work and faults; a new one each time if absent
    #[arg(long)]
    seed: Option<u64>,
    /// How many jobs are handed in
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u64).range(1..))]
    jobs: u64,
    /// After so many of them everything is drained and looked at; if all is well, new servers are started for the next ones
    #[arg(long, default_value_t = 400, value_parser = clap::value_parser!(u64).range(1..))]
    round: u64,
    /// Workers at the same time
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..))]
    workers: u64,
    /// Users who hand in jobs
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u64).range(1..))]
    users: u64,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let first = cli.seed.unwrap_or(now.as_nanos() as u64 % 1_000_000);
    let mut left = cli.jobs;
    for round in 0.. {
        // The first round of a seed is what one of its rounds is called by.
        let seed = if round == 0 { first } else { Random::of(first, &[13, round]).next() % 1_000_000 };
        let jobs = left.min(cli.round);
        let options = Options {
            seed,
            jobs: jobs as usize,
            workers: cli.workers as usize,
            users: cli.users as usize,
            worker: None,
        };
        println!("seed {seed}, {jobs} jobs: work and faults are a function of it, their timing is not");
        let Ok(report) = catch_unwind(|| run(&options)) else {
            eprintln!("it could not be run to its end");
            return ExitCode::from(2);
        };
        println!("{report}");
        if !report.violations.is_empty() {
            return ExitCode::FAILURE;
        }
        left -= jobs;
        if left == 0 {
            break;
        }
    }
    ExitCode::SUCCESS
}
