//! How long after an outage of Redis the next job is taken, with the settings that a worker has by default.
//!
//! `cargo build --workspace --bins && cargo run -p benches --bin resumption` prints what `benches/RESULTS.md` records. It
//! waits for connections to come back, so the profile of the build does not matter.

use std::time::{Duration, Instant};

use clap::Parser;
use testkit::{Daemon, RedisServer, Scratch, bin, eventually};

const DB: u8 = 5;
/// What is asked for: from the server's first answer to the next take.
const BOUND: Duration = Duration::from_secs(2);

/// Measures how soon work goes on after outages of Redis.
#[derive(Debug, Parser)]
struct Options {
    /// Outages of each kind
    #[arg(long, default_value_t = 5)]
    outages: usize,
}

/// A way to be away, and to come back.
type Outage = (&'static str, fn(&RedisServer), fn(&RedisServer), Duration);

const OUTAGES: [Outage; 4] = [
    ("killed, restarted at once", RedisServer::kill, RedisServer::restart, Duration::ZERO),
    ("killed, away for 3 s", RedisServer::kill, RedisServer::restart, Duration::from_secs(3)),
    ("killed, away for 20 s", RedisServer::kill, RedisServer::restart, Duration::from_secs(20)),
    ("hangs for 8 s", RedisServer::pause, RedisServer::resume, Duration::from_secs(8)),
];

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let redis = RedisServer::with_config(&[("appendonly", "yes"), ("appendfsync", "always")]);
    let folder = Scratch::new("resumption");
    let (config, database) = (folder.path().join("worker.toml"), folder.path().join("db"));
    std::fs::write(&database, "")?;
    std::fs::write(&config, format!("[databases.main]\nkind = 'sqlite'\npath = '{}'\n", database.display()))?;
    let flags = ["--config", config.to_str().expect("a path of ours"), "--redis-url", &redis.url_db(DB)];
    let worker = Daemon::spawn(bin("drayman-worker"), &flags, &[]);
    worker.wait_for_line("serving");
    taken(&redis, "before").await;
    println!("from Redis' first answer to the next take, default settings, a foreign submission at that moment");
    for (name, leave, come_back, away) in OUTAGES {
        let mut seconds = Vec::new();
        for number in 0..options.outages {
            leave(&redis);
            // The outage takes so long; nothing is waited for.
            tokio::time::sleep(away).await;
            come_back(&redis);
            seconds.push(taken(&redis, &format!("{name} {number}").replace([' ', ','], "-")).await.as_secs_f64());
        }
        seconds.sort_by(f64::total_cmp);
        let (best, median, worst) = (seconds[0], seconds[seconds.len() / 2], seconds[seconds.len() - 1]);
        let bound = BOUND.as_secs();
        println!(
            "  {name:<28} median {median:.2} s, worst {worst:.2} s, best {best:.2} s (of {}); bound {bound} s",
            seconds.len()
        );
    }
    Ok(())
}

/// Submits a job with plain commands, and says how long it took until it was taken.
async fn taken(redis: &RedisServer, id: &str) -> Duration {
    let state = redis.state(DB);
    let begin = Instant::now();
    state.foreign().submit("ann", id, &[("status", "pending"), ("database", "main"), ("query", "SELECT 1")]);
    eventually("a take", async || state.field(id, "started_at").map(drop)).await;
    begin.elapsed()
}
