//! `drayman-worker`: takes jobs from Redis and runs them. Parses, logs, loads its configuration, runs, says how it ended.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use telemetry::Telemetry;
use tokio::sync::watch;
use worker::config::{Config, Layers};
use worker::shutdown::Shutdown;

/// Exit code for a configuration that can't be used.
const EXIT_CONFIG: u8 = 2;
/// Exit code for everything else that makes work impossible.
const EXIT_FAILURE: u8 = 1;

/// Takes jobs from Redis, fair between users, and runs them.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    /// Configuration file [default: /etc/drayman/worker.toml, if it exists]
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
    let layers = Layers::of_process(cli.config).flag("--redis-url", "redis.url", cli.redis_url);
    if cli.print_config {
        return match Config::load(&layers) {
            Ok(config) => {
                print!("{}", config.print());
                ExitCode::SUCCESS
            }
            Err(error) => refuse(&error),
        };
    }
    let config = match Config::check(&layers) {
        Ok(config) => config,
        Err(error) => return refuse(&error),
    };
    if cli.check_config {
        println!("the configuration can be used");
        return ExitCode::SUCCESS;
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("drayman-worker: no threads can be started: {error}");
            return ExitCode::from(EXIT_FAILURE);
        }
    };
    runtime.block_on(serve(config, layers))
}

async fn serve(config: Config, layers: Layers) -> ExitCode {
    let telemetry = match Telemetry::start(&config.log, &config.telemetry) {
        Ok(telemetry) => telemetry,
        Err(error) => return refuse(&error),
    };
    let shutdown = match Shutdown::on_signals() {
        Ok(shutdown) => shutdown,
        Err(error) => return refuse(&error),
    };
    let (limits, limits_now) = watch::channel(worker::app::limits(&config));
    let run = worker::app::run(config, Vec::new(), limits_now, shutdown.clone());
    let reload = async {
        loop {
            shutdown.reload().await;
            match Config::load(&layers) {
                Ok(config) => {
                    telemetry.set_level(&config.log.level);
                    limits.send_replace(worker::app::limits(&config));
                    tracing::info!("the log level and the limits were read again");
                }
                Err(error) => tracing::error!(%error, "the configuration could not be read again, nothing changes"),
            }
        }
    };
    let result = tokio::select! {
        result = run => result,
        () = reload => unreachable!("it waits for ever"),
    };
    let code = match result {
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
    eprintln!("drayman-worker: {text}");
    ExitCode::from(EXIT_CONFIG)
}
