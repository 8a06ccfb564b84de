//! A Redis, a PostgreSQL and workers of this test's own.

#![allow(dead_code)] // each test file uses its part

pub mod collector;
pub mod handlers;
pub mod house;

use std::time::Duration;

use queue_core::Store;
use queue_core::config::{RedisConfig, Url};
use queue_core::ids::{JobId, PoolPattern};
use queue_core::inspect::{Inspect, JobView};
pub use testkit::PATIENCE;
use testkit::Postgres;
use testkit::RedisServer;
use testkit::{Daemon, bin, end_of, eventually};
use tokio::sync::watch;
use worker::config::Config;
use worker::dispatch::Limits;
use worker::shutdown::Shutdown;

/// The database of the reference layout.
pub const DB: u8 = 5;

pub fn redis_config(server: &RedisServer) -> RedisConfig {
    RedisConfig { url: Url::new(server.url_db(DB)), ..RedisConfig::default() }
}

/// A worker's configuration for this server with everything that takes time made short.
pub fn config(server: &RedisServer) -> Config {
    let mut config = Config { redis: redis_config(server), ..Config::default() };
    config.worker.pools = vec![PoolPattern::new("sql:*").unwrap()];
    config.worker.scan_interval = Duration::from_millis(500);
    config.worker.session_lifetime = Duration::from_secs(2);
    config.worker.drain_grace = Duration::from_secs(1);
    config
}

/// A worker in this process.
pub struct Running {
    pub shutdown: Shutdown,
    pub limits: watch::Sender<Limits>,
    handle: tokio::task::JoinHandle<anyhow::Result<()>>,
}

impl Running {
    pub fn start(config: Config) -> Self {
        let shutdown = Shutdown::new();
        let (limits, limits_now) = watch::channel(worker::app::limits(&config));
        let handle = tokio::spawn(worker::app::run(config, Vec::new(), limits_now, shutdown.clone()));
        Self { shutdown, limits, handle }
    }

    pub async fn stop(self) {
        self.shutdown.drain().cancel();
        end_of("the worker stops", self.handle).await.expect("no panic").expect("no error");
    }
}

/// The connection fields of a job for this PostgreSQL.
pub struct Target<'a> {
    pub postgres: &'a Postgres,
    pub dbname: &'a str,
}

/// Submits a job as a foreign producer does.
pub fn push(server: &RedisServer, id: &str, user: &str, query: &str, target: &Target<'_>) {
    let (host, port) = target.postgres.host_port();
    let port = port.to_string();
    let fields = [
        ("status", "pending"),
        ("query", query),
        ("host", &host),
        ("port", &port),
        ("dbname", target.dbname),
        ("dbuser", "postgres"),
        ("pass", ""),
        ("created_at", "2026-01-01T00:00:00.000Z"),
        ("updated_at", "2026-01-01T00:00:00.000Z"),
    ];
    server.state(DB).foreign().submit(user, id, &fields);
}

pub async fn store(server: &RedisServer) -> Store {
    // A server that stands still for a while is no fault of what is tested.
    let config = RedisConfig { command_timeout: Duration::from_secs(60), ..redis_config(server) };
    Store::connect(&config).await.expect("redis answers")
}

/// Waits until nothing more of a job will run.
pub async fn ended(inspect: &Inspect, id: &str) -> JobView {
    eventually(&format!("job {id} to end"), async || {
        inspect.job(id).await.expect("redis answers").filter(JobView::is_over)
    })
    .await
}

/// Waits until a job runs.
pub async fn running(inspect: &Inspect, id: &str) -> JobView {
    eventually(&format!("job {id} to run"), async || {
        inspect.job(id).await.expect("redis answers").filter(|view| view.status() == "running")
    })
    .await
}

pub fn job_id(id: &str) -> JobId {
    JobId::new(id).expect("a valid id")
}

/// The daemon itself, as a process, on this Redis (or on a proxy before it).
pub fn daemon(redis_url: &str, settings: &[(&str, &str)]) -> Daemon {
    let mut env = vec![
        ("DRAYMAN_WORKER__SESSION_LIFETIME", "2s"),
        ("DRAYMAN_WORKER__SCAN_INTERVAL", "500ms"),
        ("DRAYMAN_REDIS__COMMAND_TIMEOUT", "2s"),
    ];
    env.extend_from_slice(settings);
    Daemon::spawn(bin("drayman-worker"), &["--redis-url", redis_url], &env)
}
