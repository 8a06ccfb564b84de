//! `drayman-intake`: makes a batch of each file that comes into a folder. Parses, logs, loads its configuration, runs, says how
//! it ended.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use config::{Config, DEFAULT_FILE};
use daemon::shutdown::Shutdown;
use queue_core::config::{Layers, to_toml};
use telemetry::Telemetry;

mod check;
mod claim;
mod config;
mod folders;
mod hand_over;
mod place;
mod run;

/// Exit code for a configuration that can't be used.
const EXIT_CONFIG: u8 = 2;
/// Exit code for everything else that makes work impossible.
const EXIT_FAILURE: u8 = 1;

/// Makes a batch of each file that comes into a folder.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    /// Configuration file [default: /etc/drayman/intake.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where Redis is, e.g. redis://127.0.0.1:6379/5
    #[arg(long, value_name = "URL")]
    redis_url: Option<String>,
    /// Say whether the configuration can be used, and exit
    #[arg(long)]
    check_config: bool,
    /// Print the configuration that applies, without secrets, and exit
    #[arg(long)]
    print_config: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut layers = Layers::of_process(cli.config).flag("--redis-url", "redis.url", cli.redis_url);
    layers.default_file = DEFAULT_FILE.into();
    let config = match Config::load(&layers) {
        Ok(config) => config,
        Err(error) => return refuse(&error),
    };
    if cli.print_config {
        print!("{}", to_toml(&config).unwrap_or_else(|fault| format!("# cannot be shown: {fault}\n")));
        return ExitCode::SUCCESS;
    }
    if cli.check_config {
        return match config.redis.password() {
            Ok(_) => {
                println!("the configuration can be used");
                ExitCode::SUCCESS
            }
            Err(fault) => refuse(&fault),
        };
    }
    match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime.block_on(serve(config)),
        Err(error) => {
            eprintln!("drayman-intake: no threads can be started: {error}");
            ExitCode::from(EXIT_FAILURE)
        }
    }
}

async fn serve(config: Config) -> ExitCode {
    let telemetry = match Telemetry::start(&config.log, &config.telemetry) {
        Ok(telemetry) => telemetry,
        Err(error) => return refuse(&error),
    };
    let shutdown = match Shutdown::on_signals() {
        Ok(shutdown) => shutdown,
        Err(error) => return refuse(&error),
    };
    let code = match run::run(config, shutdown).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "cannot go on");
            ExitCode::from(EXIT_FAILURE)
        }
    };
    telemetry.stop().await;
    code
}

fn refuse(error: &dyn std::error::Error) -> ExitCode {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    eprintln!("drayman-intake: {text}");
    ExitCode::from(EXIT_CONFIG)
}
