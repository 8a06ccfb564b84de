//! End-to-end measurements of SQL jobs: a real Redis, a real PostgreSQL, the daemon as a process, all on this machine.
//!
//! Each figure stands beside a limit or a peer of the same run, since machines differ and drift. `benches/run` builds
//! everything and prints what `benches/RESULTS.md` records.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use benches::{cpu_seconds, line, percentiles, stat};
use clap::Parser;
use queue_core::Store;
use queue_core::config::{Limits, RedisConfig, Url};
use queue_core::events::Events;
use queue_core::ids::User;
use queue_core::producer::{Database, NewJob, Producer};
use testkit::{Daemon, Postgres, RedisServer, bin};

/// The database that the reference's layout uses.
const DB: u8 = 5;

/// Measures end-to-end throughput and pick-up latency of SQL jobs.
#[derive(Debug, Parser)]
struct Options {
    /// Users who submit
    #[arg(long, default_value_t = 100)]
    users: usize,
    /// Jobs of each user in a repetition
    #[arg(long, default_value_t = 60)]
    jobs: usize,
    /// Jobs that run at once: the pool's capacity, the peer's concurrency, the clients of the limit
    #[arg(long, default_value_t = 16)]
    capacity: usize,
    /// How often each measurement is repeated, in turn with the others
    #[arg(long, default_value_t = 3)]
    repetitions: usize,
    /// Samples of the pick-up latency
    #[arg(long, default_value_t = 500)]
    samples: usize,
    /// The folder in which the peer's packages are installed; without it the peer is left out
    #[arg(long)]
    peer: Option<PathBuf>,
}

struct Bench {
    redis: RedisServer,
    postgres: Postgres,
    options: Options,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let redis = RedisServer::with_config(&[("appendonly", "yes"), ("appendfsync", "everysec")]);
    let postgres = Postgres::start();
    postgres.query("postgres", "ALTER SYSTEM SET log_statement = 'none'; ").await;
    postgres.query("postgres", "SELECT pg_reload_conf()").await;
    postgres.create_database("bench").await;
    let bench = Bench { redis, postgres, options };

    let mut ours = Vec::new();
    let mut cpu = Vec::new();
    let mut peers = Vec::new();
    let mut limits = Vec::new();
    for _ in 0..bench.options.repetitions {
        limits.push(bench.limit()?);
        let (rate, spent) = bench.throughput().await?;
        ours.push(rate);
        cpu.push(spent);
        if let Some(folder) = &bench.options.peer {
            peers.push(bench.peer(folder)?);
        }
    }
    let jobs = bench.options.users * bench.options.jobs;
    println!(
        "no-op SQL statement, {} users x {} jobs = {jobs}, {} at once, a connection for each job",
        bench.options.users, bench.options.jobs, bench.options.capacity
    );
    line("  drayman (exactly once)", "jobs/s", ours);
    cpu.sort_by(|a, b| a.total().total_cmp(&b.total()));
    let median = cpu[cpu.len() / 2];
    println!(
        "    CPU seconds per 10,000 jobs: worker {:.1}, redis {:.1}, postgresql {:.1}",
        median.worker, median.redis, median.postgres
    );
    if !peers.is_empty() {
        line("  bullmq + pg (at least once)", "jobs/s", peers);
    }
    line("  limit: pgbench -C, no queue", "connections/s", limits);

    let (commands, native) = bench.pick_up(true).await?;
    let (_, foreign) = bench.pick_up(false).await?;
    println!("idle pick-up, from the submission's call to the event that the job runs, {} samples", native.len());
    percentiles("  native (one script)", native);
    percentiles("  foreign (HSET, LPUSH, SADD, PUBLISH)", foreign);
    println!("redis commands that a job costs outside scripts, idle worker: {commands:.1}");
    Ok(())
}

/// CPU seconds per 10,000 jobs.
#[derive(Debug, Clone, Copy)]
struct Cpu {
    worker: f64,
    redis: f64,
    postgres: f64,
}

impl Cpu {
    fn total(&self) -> f64 {
        self.worker + self.redis + self.postgres
    }
}

impl Bench {
    fn worker(&self) -> Daemon {
        let capacity = self.options.capacity.to_string();
        let worker = Daemon::spawn(
            bin("drayman-worker"),
            &["--redis-url", &self.redis.url_db(DB)],
            &[
                ("DRAYMAN_CAPACITY__DEFAULT", &capacity),
                ("DRAYMAN_LOG__LEVEL", "warn,worker::app=info"),
                ("DRAYMAN_SQL__TLS", "disable"),
            ],
        );
        worker.wait_for_line("serving");
        worker
    }

    async fn store(&self) -> anyhow::Result<Store> {
        let config = RedisConfig { url: Url::new(self.redis.url_db(DB)), ..RedisConfig::default() };
        Ok(Store::connect(&config).await?)
    }

    fn job(&self, user: usize) -> anyhow::Result<NewJob> {
        let (host, port) = self.postgres.host_port();
        let database =
            Database::Connection { host, port, dbname: "bench".into(), dbuser: "postgres".into(), pass: String::new() };
        Ok(NewJob::sql(User::new(format!("user-{user}"))?, database, "SELECT 1"))
    }

    /// Jobs per second, from the start of a worker that finds all queues full to the last job's end.
    async fn throughput(&self) -> anyhow::Result<(f64, Cpu)> {
        self.redis.raw_db(DB, &["FLUSHDB"]);
        let store = self.store().await?;
        let producer = Producer::new(store.clone(), Limits::default());
        let mut jobs = Vec::new();
        for _ in 0..self.options.jobs {
            for user in 0..self.options.users {
                jobs.push(self.job(user)?);
            }
        }
        let count = jobs.len();
        for result in producer.enqueue_many(jobs).await {
            result?;
        }
        let postmaster = self.postmaster().await?;
        let redis: u32 = self.redis_field("server", "process_id")?;
        let worker = self.worker();
        let before = (cpu_seconds(redis)?, cpu_seconds(postmaster)?);
        let state = self.redis.state(DB);
        let start = Instant::now();
        loop {
            let done = state.count_finished() as usize;
            if done == count {
                break;
            }
            ensure!(start.elapsed() < Duration::from_secs(300), "{done} of {count} jobs in 5 minutes");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let took = start.elapsed();
        // A queue that never acknowledges looks fast.
        ensure!(state.is_idle(), "jobs were left in flight");
        let per_10k = 10_000.0 / count as f64;
        // PostgreSQL's backends count once they have ended.
        let spent = Cpu {
            worker: cpu_seconds(worker.pid())? * per_10k,
            redis: (cpu_seconds(redis)? - before.0) * per_10k,
            postgres: (cpu_seconds(postmaster)? - before.1) * per_10k,
        };
        drop(worker);
        store.close().await;
        Ok((count as f64 / took.as_secs_f64(), spent))
    }

    /// Samples of how long an idle worker takes to start a job, and plain commands per job.
    async fn pick_up(&self, native: bool) -> anyhow::Result<(f64, Vec<Duration>)> {
        self.redis.raw_db(DB, &["FLUSHDB"]);
        let store = self.store().await?;
        let producer = Producer::new(store.clone(), Limits::default());
        let worker = self.worker();
        let mut events = Events::listen(&store, &[]).await?;
        let state = self.redis.state(DB);
        let (host, port) = self.postgres.host_port();
        let port = port.to_string();
        let mut samples = Vec::new();
        let before = self.function_calls();
        for sample in 0..self.options.samples {
            let job = self.job(0)?;
            let id = job.id.to_string();
            let start = Instant::now();
            if native {
                producer.enqueue(job).await?;
            } else {
                let sql = [("status", "pending"), ("query", "SELECT 1")];
                let connection =
                    [("host", &*host), ("port", &*port), ("dbname", "bench"), ("dbuser", "postgres"), ("pass", "")];
                state.foreign().submit("user-0", &id, &[&sql[..], &connection].concat());
            }
            loop {
                let event =
                    tokio::time::timeout(Duration::from_secs(30), events.next()).await.context("no event came")?;
                let Some(event) = event else { bail!("the connection closed") };
                if event.id == id && event.status == "running" {
                    // The first ones pay for connections and for a library not yet loaded.
                    if sample >= 10 {
                        samples.push(start.elapsed());
                    }
                } else if event.id == id && event.status == "done" {
                    break;
                }
            }
        }
        let calls = self.function_calls() - before;
        drop(worker);
        Ok((calls as f64 / self.options.samples as f64, samples))
    }

    fn redis_field<T: std::str::FromStr>(&self, section: &str, field: &str) -> anyhow::Result<T> {
        let info = self.redis.raw_db(DB, &["INFO", section]).text();
        let value = info.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')?.trim().parse().ok());
        value.with_context(|| format!("INFO {section} has no {field}"))
    }

    /// The process that all of PostgreSQL's are children of.
    async fn postmaster(&self) -> anyhow::Result<u32> {
        let client = self.postgres.client("bench").await?;
        let backend: i32 = client.query_one("SELECT pg_backend_pid()", &[]).await?.get(0);
        Ok(stat(backend as u32)?[1].parse()?)
    }

    fn function_calls(&self) -> i64 {
        let stats = self.redis.raw_db(DB, &["INFO", "commandstats"]).text();
        let calls = |line: &str| line.split("calls=").nth(1)?.split(',').next()?.parse::<i64>().ok();
        stats.lines().filter(|line| line.starts_with("cmdstat_fcall")).filter_map(calls).sum()
    }

    /// Connections per second with one statement each and no queue at all: what PostgreSQL and this machine allow.
    fn limit(&self) -> anyhow::Result<f64> {
        let script = self.redis.dir().join("noop.sql");
        std::fs::write(&script, "SELECT 1;\n")?;
        let (host, port) = self.postgres.host_port();
        let output = Command::new(pgbench()?)
            .args(["-n", "-C", "-T", "5", "-j", "2", "-c", &self.options.capacity.to_string()])
            .args(["-h", &host, "-p", &port.to_string(), "-U", "postgres", "-f"])
            .arg(&script)
            .arg("bench")
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let tps = text.lines().find_map(|line| line.strip_prefix("tps = ")?.split(' ').next()?.parse().ok());
        tps.with_context(|| format!("pgbench said: {text}{}", String::from_utf8_lossy(&output.stderr)))
    }

    /// The same work by BullMQ with node-postgres.
    fn peer(&self, folder: &PathBuf) -> anyhow::Result<f64> {
        self.redis.raw_db(DB, &["FLUSHDB"]);
        let (pg_host, pg_port) = self.postgres.host_port();
        let output = Command::new("node")
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/peers/bullmq.cjs"))
            .env("NODE_PATH", folder)
            .env("REDIS_PORT", self.redis.addr().port().to_string())
            .env("REDIS_DB", DB.to_string())
            .env("PG_HOST", pg_host)
            .env("PG_PORT", pg_port.to_string())
            .env("JOBS", (self.options.users * self.options.jobs).to_string())
            .env("CONCURRENCY", self.options.capacity.to_string())
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.trim().parse().with_context(|| format!("the peer said: {text}{}", String::from_utf8_lossy(&output.stderr)))
    }
}

fn pgbench() -> anyhow::Result<PathBuf> {
    let mut versions: Vec<_> = std::fs::read_dir("/usr/lib/postgresql")?.filter_map(Result::ok).collect();
    versions.sort_by_key(std::fs::DirEntry::file_name);
    let newest = versions.pop().context("no PostgreSQL is installed: scripts/setup installs it")?;
    Ok(newest.path().join("bin/pgbench"))
}
