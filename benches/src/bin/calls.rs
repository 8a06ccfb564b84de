//! What single calls cost Redis: as functions of the library, and as scripts, each with all that it shares with others. Both in one
//! run, in turn. `benches/run-calls` builds everything.

use std::time::Duration;

use clap::Parser;
use queue_core::Store;
use queue_core::calls::{Fields, QueueLimits, Submission, Verdict};
use queue_core::config::{RedisConfig, Url};
use queue_core::ids::{Fence, JobId, PoolPattern, SessionId, User};
use queue_core::session::{Fairness, Service, Session};
use testkit::RedisServer;

const DB: u8 = 5;
const KINDS: [&str; 6] = [
    "heartbeat",
    "a stale word of a job",
    "a word of a job",
    "submission of one",
    "take and finish of one",
    "take of 8, 1,000 handlers",
];
/// How many handlers a worker has for the last of them. To compare each pool that has work with each of them would cost above 100 ms.
const HANDLERS: usize = 1_000;

/// Measures what single calls cost Redis, as functions and as scripts.
#[derive(Debug, Clone, Parser)]
struct Options {
    /// Calls of each kind in a row
    #[arg(long, default_value_t = 1_000)]
    calls: usize,
    /// How often all are measured, in turn; the least counts
    #[arg(long, default_value_t = 7)]
    repetitions: usize,
}

/// A way to call, and what it has cost so far: the least µs of a call of each kind.
struct Form {
    name: &'static str,
    store: Store,
    session: Session,
    /// One with many handlers.
    wide: Session,
    least: [f64; KINDS.len()],
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let redis = RedisServer::start();
    let mut forms = Vec::new();
    for (name, functions) in [("functions", true), ("scripts", false)] {
        let config = RedisConfig { url: Url::new(redis.url_db(DB)), functions, ..RedisConfig::default() };
        let store = Store::connect(&config).await?;
        let serving = async |pools: Vec<PoolPattern>| {
            let (default_capacity, capacities, fairness) = (1_000_000, Vec::new(), Fairness::Jobs);
            let service = Service { pools, default_capacity, capacities, fairness };
            Session::open(store.clone(), SessionId::generate(name, 1), service, name, 1).await
        };
        let session = serving(vec![PoolPattern::new(format!("bench.{name}"))?]).await?;
        let many = (0..HANDLERS).map(|number| PoolPattern::new(format!("wide.{name}-{number}")));
        let wide = serving(many.collect::<Result<_, _>>()?).await?;
        forms.push(Form { name, store, session, wide, least: [f64::INFINITY; KINDS.len()] });
    }
    for round in 0..options.repetitions {
        for form in &mut forms {
            form.measure(&redis, round, options.calls).await?;
        }
    }
    let [functions, scripts] = &forms[..] else { unreachable!("there are two") };
    println!("Redis' time for a call, least of {} times {} in a row, in µs", options.repetitions, options.calls);
    println!("{:<26}{:>12}{:>12}{:>8}", "", scripts.name, functions.name, "ratio");
    for (at, kind) in KINDS.iter().enumerate() {
        let (before, after) = (scripts.least[at], functions.least[at]);
        println!("{kind:<26}{before:>12.1}{after:>12.1}{:>8.1}", before / after);
    }
    Ok(())
}

impl Form {
    async fn measure(&mut self, redis: &RedisServer, round: usize, calls: usize) -> anyhow::Result<()> {
        let (store, session) = (self.store.clone(), self.session.id().clone());
        let user = User::new(format!("ann-{}", self.name))?;
        let fields = Fields::new().with("kind", "task").with("app", "bench").with("op", self.name).with("input", "{}");
        let most = QueueLimits { sql_jobs: 1 << 30, tasks: 1 << 30, sql_bytes: 16_384, task_bytes: 16_384 };
        let job = |number: usize| -> anyhow::Result<Submission> {
            let id = JobId::new(format!("{}-{round}-{number}", self.name))?;
            Ok(Submission { id, user: user.clone(), delay_ms: 0, run_at_ms: None, fields: fields.clone() })
        };
        let mut costs = [0.0; KINDS.len()];

        let clock = Clock::start(redis);
        for _ in 0..calls {
            store.session_beat(&session, 0).await?;
        }
        costs[0] = clock.us_a_call();

        let nobody = JobId::new("nobody")?;
        let clock = Clock::start(redis);
        for _ in 0..calls {
            store.mark(&session, &nobody, Fence(1), &Fields::new().with("progress", "1")).await?;
        }
        costs[1] = clock.us_a_call();

        let clock = Clock::start(redis);
        for number in 0..calls {
            store.enqueue(&most, &[job(number)?]).await?;
        }
        costs[3] = clock.us_a_call();

        let clock = Clock::start(redis);
        let mut held = Vec::new();
        for number in 0..calls {
            let taken = self.session.take(1).await?.map(|taken| taken.claims).unwrap_or_default();
            for claim in taken {
                if number == 0 {
                    held.push(claim);
                } else {
                    let verdict = Verdict::Final { keep_ms: 60_000 };
                    claim.finish(verdict, Duration::ZERO, Fields::new().with("status", "done"), false).await?;
                }
            }
        }
        costs[4] = 2.0 * clock.us_a_call();

        let claim = held.pop().ok_or_else(|| anyhow::anyhow!("nothing was taken"))?;
        let clock = Clock::start(redis);
        for _ in 0..calls {
            claim.pen().mark(&Fields::new().with("progress", "1")).await?;
        }
        costs[2] = clock.us_a_call();
        claim
            .finish(Verdict::Final { keep_ms: 60_000 }, Duration::ZERO, Fields::new().with("status", "done"), false)
            .await?;

        let wide = |number: usize| -> anyhow::Result<Submission> {
            let id = JobId::new(format!("{}-wide-{round}-{number}", self.name))?;
            let op = format!("{}-{number}", self.name);
            let fields = Fields::new().with("kind", "task").with("app", "wide").with("op", &*op).with("input", "{}");
            Ok(Submission { id, user: user.clone(), delay_ms: 0, run_at_ms: None, fields })
        };
        for number in 0..HANDLERS {
            store.enqueue(&most, &[wide(number)?]).await?;
        }
        let clock = Clock::start(redis);
        let mut held = Vec::new();
        for _ in 0..10 {
            held.extend(self.wide.take(8).await?.map(|taken| taken.claims).unwrap_or_default());
        }
        costs[5] = clock.us_a_call();
        held.extend(self.wide.take(HANDLERS).await?.map(|taken| taken.claims).unwrap_or_default());
        anyhow::ensure!(held.len() == HANDLERS, "{} of {HANDLERS} were taken", held.len());
        for claim in held {
            let verdict = Verdict::Final { keep_ms: 60_000 };
            claim.finish(verdict, Duration::ZERO, Fields::new().with("status", "done"), false).await?;
        }

        for (least, cost) in self.least.iter_mut().zip(costs) {
            *least = least.min(cost);
        }
        redis.raw_db(DB, &["SCRIPT", "FLUSH", "SYNC"]);
        Ok(())
    }
}

/// How busy Redis is with calls, of either form.
struct Clock<'a> {
    redis: &'a RedisServer,
}

impl<'a> Clock<'a> {
    fn start(redis: &'a RedisServer) -> Self {
        redis.raw(&["CONFIG", "RESETSTAT"]);
        Self { redis }
    }

    fn us_a_call(self) -> f64 {
        let stats = self.redis.raw(&["INFO", "commandstats"]).text();
        let (mut calls, mut usec) = (0.0, 0.0);
        for line in
            stats.lines().filter(|line| line.starts_with("cmdstat_fcall:") || line.starts_with("cmdstat_evalsha:"))
        {
            let number = |name: &str| -> f64 {
                let rest = line.split(name).nth(1).unwrap_or_default();
                rest.split(',').next().unwrap_or_default().parse().unwrap_or(0.0)
            };
            calls += number("calls=");
            usec += number("usec=");
        }
        usec / f64::max(calls, 1.0)
    }
}
