//! Hours of random work under random faults: `cargo run -p testkit --bin chaos -- --duration 1h`.
//!
//! Needs the programs of the workspace: `cargo build --workspace --bins`.

use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Parser;
use testkit::chaos::{Options, run};

/// Runs random jobs under random faults against real servers, and looks from outside whether every promise was kept.
#[derive(Debug, Parser)]
struct Cli {
    /// What decides over work and faults; a new one each time if absent
    #[arg(long)]
    seed: Option<u64>,
    /// How long they go on: 10m, 1h
    #[arg(long, default_value = "1m", value_parser = humantime::parse_duration)]
    duration: Duration,
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
    let seed = cli.seed.unwrap_or(now.as_nanos() as u64 % 1_000_000);
    let options = Options {
        seed,
        duration: cli.duration,
        workers: cli.workers as usize,
        users: cli.users as usize,
        worker: None,
    };
    println!("seed {seed}: work and faults are a function of it, their timing is not");
    let report = run(&options);
    println!("{report}");
    if report.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
