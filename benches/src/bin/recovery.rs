//! How long a killed worker's job waits until another worker takes it, with the settings that a worker has by default.
//!
//! `cargo build --workspace --bins && cargo run -p benches --bin recovery` prints what `benches/RESULTS.md` records. It
//! waits for sessions to expire, so the profile of the build does not matter, and many kills go on at the same time.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use queue_core::Store;
use queue_core::cancel::Canceller;
use queue_core::config::{Limits, RedisConfig, Url};
use queue_core::events::Events;
use queue_core::ids::{JobId, User};
use queue_core::producer::{Database, NewJob, Producer};
use testkit::{Daemon, Postgres, RedisServer, bin, eventually};
use tokio::task::{JoinSet, LocalSet};

/// Longest for anything to happen.
const LIMIT: Duration = Duration::from_secs(60);
/// A worker's own, by default.
const SESSION_LIFETIME: Duration = Duration::from_secs(15);
/// That of the leadership, which is no setting.
const LEADER_TTL: Duration = Duration::from_secs(5);
/// How often a leader looks at heartbeats, and others at the leadership.
const PASS: Duration = Duration::from_secs(1);

/// Measures the recovery of killed workers' jobs.
#[derive(Debug, Parser)]
struct Options {
    /// Kills, every other one of the worker that leads
    #[arg(long, default_value_t = 50)]
    kills: usize,
    /// Pairs of workers at the same time, each on a database of its own of one Redis
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u8).range(1..60))]
    rigs: u8,
}

/// Two workers that share a queue.
struct Rig {
    db: u8,
    url: String,
    store: Store,
    producer: Producer,
    canceller: Canceller,
    events: Events,
    database: Database,
    workers: Vec<Daemon>,
}

impl Rig {
    async fn build(redis: &RedisServer, postgres: &Postgres, db: u8) -> anyhow::Result<Self> {
        let url = redis.url_db(db);
        let store = Store::connect(&RedisConfig { url: Url::new(&url), ..RedisConfig::default() }).await?;
        let (host, port) = postgres.host_port();
        let (dbname, dbuser) = ("bench".into(), "postgres".into());
        Ok(Self {
            db,
            url,
            producer: Producer::new(store.clone(), Limits::default()),
            canceller: Canceller::new(store.clone(), LIMIT),
            events: Events::listen(&store, &[]).await?,
            store,
            database: Database::Connection { host, port, dbname, dbuser, pass: String::new() },
            workers: Vec::new(),
        })
    }

    /// Which worker a text of Redis names by its pid.
    fn named(&self, text: &str) -> Option<usize> {
        let pid = text.split(':').nth(1)?;
        self.workers.iter().position(|worker| worker.pid().to_string() == pid)
    }

    async fn leader(&self, redis: &RedisServer) -> usize {
        let state = redis.state(self.db);
        eventually("a leader", async || self.named(&state.leader()?)).await
    }

    /// Waits until some worker takes the job, and says when that was told.
    async fn taken(&mut self, id: &JobId) -> anyhow::Result<Instant> {
        loop {
            let event = tokio::time::timeout(LIMIT, self.events.next()).await.context("no event came")?;
            let event = event.context("the connection closed")?;
            if event.id == id.as_str() && event.status == "running" {
                return Ok(Instant::now());
            }
        }
    }

    async fn cancel(&self, redis: &RedisServer, id: &JobId) -> anyhow::Result<()> {
        self.canceller.cancel(id).await?;
        let state = redis.state(self.db);
        eventually("the job to end", async || state.is_idle().then_some(())).await;
        Ok(())
    }

    /// Kills the worker that leads, or the other one, while it has a job.
    async fn kill(&mut self, redis: &RedisServer, leading: bool) -> anyhow::Result<Duration> {
        while self.workers.len() < 2 {
            let worker = Daemon::spawn(bin("drayman-worker"), &["--redis-url", &self.url], &[]);
            eventually("a worker to serve", async || worker.line("serving")).await;
            self.workers.push(worker);
        }
        // Whoever has waited longest is woken, so the jobs go to both in turn.
        let (id, holder) = loop {
            let job = NewJob::sql(User::new("ann")?, self.database.clone(), "SELECT pg_sleep(3600)");
            let id = job.id.clone();
            self.producer.enqueue(job).await?;
            self.taken(&id).await?;
            let claim = redis.state(self.db).claim(id.as_str()).context("it runs")?;
            let holder = self.named(&claim.session).context("one of the two has it")?;
            let leader = self.leader(redis).await;
            if (holder == leader) == leading {
                break (id, holder);
            }
            self.cancel(redis, &id).await?;
        };
        let worker = self.workers.remove(holder);
        let killed = Instant::now();
        worker.kill9();
        let took = self.taken(&id).await? - killed;
        self.cancel(redis, &id).await?;
        Ok(took)
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let redis = RedisServer::with_config(&[("databases", "64"), ("appendonly", "yes"), ("appendfsync", "everysec")]);
    let postgres = Postgres::with_config(&[("log_statement", "none")]);
    postgres.create_database("bench").await;
    let (redis, postgres) = (std::sync::Arc::new(redis), std::sync::Arc::new(postgres));
    let (here, mut rigs) = (LocalSet::new(), JoinSet::new());
    for at in 0..usize::from(options.rigs) {
        let (redis, postgres) = (redis.clone(), postgres.clone());
        let mine: Vec<bool> = (at..options.kills).step_by(options.rigs.into()).map(|kill| kill % 4 < 2).collect();
        rigs.spawn_local_on(
            async move {
                let mut rig = Rig::build(&redis, &postgres, at as u8).await?;
                let mut samples = Vec::new();
                for (number, leading) in mine.into_iter().enumerate() {
                    // Not all at the same moment of a second.
                    tokio::time::sleep(Duration::from_millis((at * 370 + number * 290) as u64 % 3_000)).await;
                    samples.push((leading, rig.kill(&redis, leading).await?));
                }
                rig.store.close().await;
                anyhow::Ok(samples)
            },
            &here,
        );
    }
    let mut samples = Vec::new();
    while let Some(rig) = here.run_until(rigs.join_next()).await {
        samples.extend(rig??);
    }
    ensure!(samples.len() == options.kills, "{} of {} kills", samples.len(), options.kills);
    println!("from kill -9 to the job's next take by another worker, default settings, {} kills", samples.len());
    let of = |leading: bool| samples.iter().filter(move |(leads, _)| *leads == leading).map(|(_, took)| *took);
    line("  a worker that does not lead", of(false), SESSION_LIFETIME + PASS * 2);
    line("  the worker that leads", of(true), SESSION_LIFETIME + LEADER_TTL + PASS * 2);
    line("  all", samples.iter().map(|(_, took)| *took), SESSION_LIFETIME + LEADER_TTL + PASS * 2);
    Ok(())
}

fn line(what: &str, samples: impl Iterator<Item = Duration>, bound: Duration) {
    let mut seconds: Vec<f64> = samples.map(|took| took.as_secs_f64()).collect();
    seconds.sort_by(f64::total_cmp);
    let (Some(best), Some(worst)) = (seconds.first(), seconds.last()) else { return };
    println!(
        "{what:<32} median {:.1} s, worst {worst:.1} s, best {best:.1} s (of {}); bound {} s",
        seconds[seconds.len() / 2],
        seconds.len(),
        bound.as_secs()
    );
}
