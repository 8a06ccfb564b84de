//! What each function of the library costs Redis where little is there, and the same call where much is: a thousand jobs of ten users in
//! ten pools beside a million jobs of a hundred thousand users in ten thousand pools. Both in one run, in turn. `benches/run-bounds`
//! builds everything.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use queue_core::Store;
use queue_core::calls::{Fields, QueueLimits, Submission, Verdict};
use queue_core::cancel::Canceller;
use queue_core::config::{RedisConfig, Url};
use queue_core::ids::{JobId, PoolPattern, SessionId, User};
use queue_core::inspect::{Filter, Inspect};
use queue_core::leader::{self, Leadership, Lengths};
use queue_core::library::{Library, TABLE};
use queue_core::retry::Retrier;
use queue_core::session::{Claim, Fairness, Service, Session};
use queue_core::{overview, reconcile};
use testkit::{RedisServer, Value};

const DB: u8 = 5;
const KEEP: Duration = Duration::from_secs(86_400);
const KEEP_MS: u64 = KEEP.as_millis() as u64;
/// Jobs that are submitted in a call while it is filled.
const TOGETHER: usize = 200;
/// Those whose cost must not follow what else there is, and by how much it may at most.
const HOT: [&str; 4] = ["submit", "take", "finish", "session_beat"];
const RATIO_MAX: f64 = 1.5;
/// No call takes longer, wherever.
const CALL_MAX: Duration = Duration::from_millis(5);

/// Measures what each function costs Redis where little is there, and where much is
#[derive(Debug, Clone, Parser)]
struct Options {
    /// Jobs of the large one: a tenth of them has ended, a hundredth runs, the others wait
    #[arg(long, default_value_t = 1_000_000)]
    jobs: usize,
    /// Users of the large one
    #[arg(long, default_value_t = 100_000)]
    users: usize,
    /// Pools of the large one
    #[arg(long, default_value_t = 10_000)]
    pools: usize,
    /// Calls of each kind in a row
    #[arg(long, default_value_t = 200)]
    calls: usize,
    /// How often all is measured, in turn; the least counts
    #[arg(long, default_value_t = 5)]
    repetitions: usize,
}

#[derive(Debug, Clone, Copy)]
struct Size {
    jobs: usize,
    users: usize,
    pools: usize,
}

const SMALL: Size = Size { jobs: 1_000, users: 10, pools: 10 };

/// What a function has cost, in µs.
#[derive(Debug, Clone, Copy)]
struct Cost {
    /// The least of all its calls.
    least: f64,
    /// Of the longest call of each round the least.
    longest: f64,
}

/// A server that holds so much, and what calls cost there.
struct Place {
    size: Size,
    redis: RedisServer,
    store: Store,
    session: Session,
    leadership: Leadership,
    seen: Lengths,
    costs: BTreeMap<String, Cost>,
    submitted: usize,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let large = Size { jobs: options.jobs, users: options.users, pools: options.pools };
    let mut places = Vec::new();
    for size in [SMALL, large] {
        let begin = std::time::Instant::now();
        places.push(Place::fill(size).await?);
        eprintln!("{} jobs of {} users in {} pools after {:.0?}", size.jobs, size.users, size.pools, begin.elapsed());
    }
    for _ in 0..options.repetitions {
        for place in &mut places {
            place.measure(options.calls).await?;
        }
    }
    let [small, large] = &places[..] else { unreachable!("there are two") };
    println!(
        "Redis' time for a call, least of {} rounds, in µs: {} jobs, {} users, {} pools beside {} jobs, {} users, {} pools",
        options.repetitions,
        small.size.jobs,
        small.size.users,
        small.size.pools,
        large.size.jobs,
        large.size.users,
        large.size.pools
    );
    println!("{:<20}{:>10}{:>10}{:>8}{:>12}{:>12}", "", "small", "large", "ratio", "longest", "longest");
    let mut broken = Vec::new();
    for (name, few) in &small.costs {
        let many = large.costs.get(name).with_context(|| format!("{name} was called in one place alone"))?;
        let ratio = many.least / few.least;
        println!(
            "{name:<20}{:>10.0}{:>10.0}{ratio:>8.2}{:>12.0}{:>12.0}",
            few.least, many.least, few.longest, many.longest
        );
        if HOT.contains(&&**name) && ratio > RATIO_MAX {
            broken.push(format!("{name} costs {ratio:.2} times as much, of {RATIO_MAX} at most"));
        }
        if many.longest > CALL_MAX.as_micros() as f64 {
            broken.push(format!("a call of {name} takes {:.1} ms, of {CALL_MAX:?} at most", many.longest / 1_000.0));
        }
    }
    let uncalled: Vec<&str> =
        TABLE.iter().map(|function| function.name).filter(|name| !small.costs.contains_key(*name)).collect();
    println!("\nnot called: {}", uncalled.join(", "));
    broken.iter().for_each(|what| println!("NOT KEPT: {what}"));
    Ok(())
}

impl Place {
    async fn fill(size: Size) -> anyhow::Result<Self> {
        let redis = RedisServer::start();
        let config = RedisConfig {
            url: Url::new(redis.url_db(DB)),
            command_timeout: Duration::from_secs(60),
            ..RedisConfig::default()
        };
        let store = Store::connect(&config).await?;
        let open = async |name: &str| -> anyhow::Result<Session> {
            let service = Service {
                pools: vec![PoolPattern::new("sql:*")?],
                default_capacity: 1_000_000,
                capacities: Vec::new(),
                fairness: Fairness::Jobs,
            };
            Ok(Session::open(store.clone(), SessionId::generate(name, 1), service, name, 1).await?)
        };
        let (session, holder) = (open("measured").await?, open("holder").await?);
        let leads = leader::hold(&store, &SessionId::new("leader:1:a")?, KEEP).await?.context("nobody else leads")?;
        let mut place = Self {
            size,
            redis,
            store,
            session,
            leadership: leads.in_haste(),
            seen: Lengths::default(),
            costs: BTreeMap::new(),
            submitted: 0,
        };
        while place.submitted < size.jobs {
            place.submit(TOGETHER.min(size.jobs - place.submitted)).await?;
        }
        let (ended, running) = (size.jobs / 10, size.jobs / 100);
        let mut done = 0;
        while done < ended {
            done += place.work_off(TOGETHER.min(ended - done)).await?.len();
        }
        let mut held = 0;
        while held < running {
            let taken = holder.take(TOGETHER.min(running - held)).await?.context("it is served")?.claims;
            held += taken.len();
            // They go on running.
            taken.into_iter().for_each(std::mem::forget);
        }
        Ok(place)
    }

    fn job(&self, number: usize) -> anyhow::Result<Submission> {
        let fields = Fields::new()
            .with("query", "SELECT 1")
            .with("host", format!("h{}", number % self.size.pools))
            .with("tags", format!("t{}", number % 7));
        Ok(Submission {
            id: JobId::new(format!("job-{number}"))?,
            user: User::new(format!("user-{}", number % self.size.users))?,
            delay_ms: 0,
            run_at_ms: None,
            fields,
        })
    }

    /// Submits so many in one call, and says which.
    async fn submit(&mut self, count: usize) -> anyhow::Result<Vec<JobId>> {
        let most = QueueLimits { sql_jobs: 1 << 30, tasks: 1 << 30, sql_bytes: 16_384, task_bytes: 16_384 };
        let jobs: Vec<Submission> =
            (0..count).map(|at| self.job(self.submitted + at)).collect::<anyhow::Result<_>>()?;
        for result in self.store.enqueue(&most, &jobs).await? {
            anyhow::ensure!(matches!(result, queue_core::calls::Enqueued::Queued), "not queued: {result:?}");
        }
        self.submitted += count;
        Ok(jobs.into_iter().map(|job| job.id).collect())
    }

    async fn take(&self, count: usize) -> anyhow::Result<Vec<Claim>> {
        let claims = self.session.take(count).await?.context("it is served")?.claims;
        anyhow::ensure!(!claims.is_empty(), "nothing was taken");
        Ok(claims)
    }

    async fn end(claim: Claim, status: &'static str) -> anyhow::Result<JobId> {
        let id = claim.job().id.clone();
        let verdict = Verdict::Final { keep_ms: KEEP_MS };
        claim.finish(verdict, Duration::from_millis(1), Fields::new().with("status", status), false).await?;
        Ok(id)
    }

    async fn work_off(&self, count: usize) -> anyhow::Result<Vec<JobId>> {
        let mut ended = Vec::new();
        for claim in self.take(count).await? {
            ended.push(Self::end(claim, "done").await?);
        }
        Ok(ended)
    }

    /// One round: each kind of call, singly; then all that the leader does.
    async fn measure(&mut self, calls: usize) -> anyhow::Result<()> {
        self.redis.raw(&["CONFIG", "SET", "slowlog-max-len", "1000000"]);
        self.redis.raw(&["CONFIG", "SET", "slowlog-log-slower-than", "0"]);
        self.redis.raw(&["SLOWLOG", "RESET"]);
        let canceller = Canceller::new(self.store.clone(), KEEP);
        let retrier = Retrier::new(self.store.clone());
        let mut failed = Vec::new();
        for _ in 0..calls {
            let mut submitted = self.submit(1).await?;
            canceller.cancel(&submitted.remove(0)).await?;
            self.submit(1).await?;
            self.session.beat().await?;
            let claim = self.take(1).await?.remove(0);
            claim.pen().mark(&Fields::new().with("progress", "1")).await?;
            failed.push(Self::end(claim, "failed").await?);
            let claim = self.take(1).await?.remove(0);
            canceller.cancel(&claim.job().id).await?;
            Self::end(claim, "cancelled").await?;
        }
        for ids in failed.chunks(2) {
            retrier.retry(ids).await?;
        }
        canceller.cancel_many(&failed).await?;
        self.submit(TOGETHER).await?;
        for claim in self.take(TOGETHER).await? {
            Self::end(claim, "done").await?;
        }
        self.lead().await?;
        self.look().await?;
        self.redis.raw(&["CONFIG", "SET", "slowlog-log-slower-than", "-1"]);
        self.count();
        Ok(())
    }

    /// All that a leader does, once.
    async fn lead(&mut self) -> anyhow::Result<()> {
        let leads = &self.leadership;
        let told = "it leads";
        leads.upkeep(KEEP).await?.context(told)?;
        leads.scan_changes(&mut self.seen).await?.context(told)?;
        leads.scan_lines().await?.context(told)?;
        leads.scan_queues().await?.context(told)?;
        leads.clear_wip().await?.context(told)?;
        leads.sweep(KEEP).await?.context(told)?;
        leads.forget_idle_pools(KEEP).await?.context(told)?;
        let findings = reconcile::repair(&self.store, KEEP).await?;
        anyhow::ensure!(findings.is_empty(), "the keys do not agree: {:?}", findings.first());
        Ok(())
    }

    /// What somebody who looks asks for.
    async fn look(&self) -> anyhow::Result<()> {
        overview::look(&self.store).await?;
        let inspect = Inspect::new(self.store.clone());
        for filter in [
            Filter::default(),
            Filter { user: Some("user-3".into()), ..Filter::default() },
            Filter { pool: Some("sql:h3".into()), ..Filter::default() },
        ] {
            inspect.list(&filter, 50).await?;
        }
        Ok(())
    }

    /// Takes what the calls of the round have cost into account.
    fn count(&mut self) {
        let Value::Array(calls) = self.redis.raw(&["SLOWLOG", "GET", "-1"]) else { return };
        let names: BTreeMap<String, String> = (TABLE.iter())
            .map(|function| (function.qualified(Library::ours().version), function.name.to_owned()))
            .collect();
        let mut round: BTreeMap<String, Cost> = BTreeMap::new();
        for call in &calls {
            let Value::Array(call) = call else { continue };
            let Value::Array(words) = &call[3] else { continue };
            let command = words[0].text().to_ascii_uppercase();
            let name = match &*command {
                "FCALL" | "FCALL_RO" => {
                    let name = words[1].text();
                    names.get(&name).cloned().unwrap_or(name)
                }
                "CONFIG" | "SLOWLOG" => continue,
                _ => command,
            };
            let us = call[2].int() as f64;
            let cost = round.entry(name).or_insert(Cost { least: f64::INFINITY, longest: 0.0 });
            *cost = Cost { least: cost.least.min(us), longest: cost.longest.max(us) };
        }
        for (name, of_round) in round {
            let cost = self.costs.entry(name).or_insert(of_round);
            *cost = Cost { least: cost.least.min(of_round.least), longest: cost.longest.min(of_round.longest) };
        }
    }
}
