//! What each function of the library costs Redis where little is there, and the same call where much is: a thousand jobs of ten users in
//! ten pools beside a million jobs of a hundred thousand users in ten thousand pools. Both in one run, in turn. `benches/run-bounds`
//! builds everything.

use std::collections::{BTreeMap, BTreeSet};
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
use queue_core::session::{Claim, Fairness, Service, Session, TAKE_MAX};
use queue_core::{overview, reconcile};
use testkit::{RedisServer, Value};

const DB: u8 = 5;
const KEEP: Duration = Duration::from_secs(86_400);
const KEEP_MS: u64 = KEEP.as_millis() as u64;
const HANDLERS: [&str; 4] = ["mail", "image", "report", "sync"];
/// Most jobs of one call.
const TOGETHER: usize = 100;
/// By how much more a call may cost where much is.
const RATIO_MAX: f64 = 1.5;
/// No call takes longer, wherever, in µs.
const CALL_MAX: f64 = 5_000.0;
/// Calls that take less are not told one by one, in µs.
const TOLD_FROM: &str = "500";

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

/// A server that holds so much, and what calls cost there.
struct Place {
    size: Size,
    redis: RedisServer,
    store: Store,
    /// One runs SQL, the other one tasks: both places measure as much of either.
    sessions: [Session; 2],
    leadership: Leadership,
    seen: Lengths,
    /// What a call of each kind costs, in µs: of the means of the rounds the least.
    costs: BTreeMap<&'static str, f64>,
    /// How long each command takes that takes long, in µs: of the longest of each round the least.
    longest: BTreeMap<String, Vec<f64>>,
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
    println!("\n{:<24}{:>10}{:>10}{:>8}", "one call, mean", "small", "large", "ratio");
    let mut broken = Vec::new();
    for (kind, few) in &small.costs {
        let many = large.costs[kind];
        println!("{kind:<24}{few:>10.0}{many:>10.0}{:>8.2}", many / few);
        if many / few > RATIO_MAX {
            broken.push(format!("{kind} costs {:.2} times as much, of {RATIO_MAX} at most", many / few));
        }
    }
    println!("\n{:<24}{:>10}{:>10}", "the longest call", "small", "large");
    let least = |place: &Place, name: &str| {
        let rounds = place.longest.get(name).filter(|rounds| rounds.len() == options.repetitions)?;
        rounds.iter().copied().reduce(f64::min)
    };
    let names: BTreeSet<&String> = small.longest.keys().chain(large.longest.keys()).collect();
    for name in names {
        let (few, many) = (least(small, name), least(large, name));
        let shown = |us: Option<f64>| us.map_or("-".into(), |us| format!("{us:.0}"));
        println!("{name:<24}{:>10}{:>10}", shown(few), shown(many));
        if let Some(us) = many.filter(|us| *us > CALL_MAX) {
            broken.push(format!("a call of {name} takes {us:.0} µs, of {CALL_MAX} at most"));
        }
    }
    println!("(-: below {TOLD_FROM} µs in some round)");
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
        let handlers = HANDLERS.map(|op| PoolPattern::new(format!("bench.{op}")));
        let tasks: Vec<PoolPattern> = handlers.into_iter().collect::<Result<_, _>>()?;
        let sql = vec![PoolPattern::new("sql:*")?];
        let open = async |name: &str, pools: &[PoolPattern]| -> anyhow::Result<Session> {
            let service = Service {
                pools: pools.to_vec(),
                default_capacity: 1_000_000,
                capacities: Vec::new(),
                fairness: Fairness::Jobs,
            };
            Ok(Session::open(store.clone(), SessionId::generate(name, 1), service, name, 1).await?)
        };
        let sessions = [open("sql", &sql).await?, open("tasks", &tasks).await?];
        // Of SQL a user runs one at a time in a pool: where users are few, none would be left.
        let holder = open("holder", &tasks).await?;
        let leads = leader::hold(&store, &SessionId::new("leader:1:a")?, KEEP).await?.context("nobody else leads")?;
        let mut place = Self {
            size,
            redis,
            store,
            sessions,
            leadership: leads.in_haste(),
            seen: Lengths::default(),
            costs: BTreeMap::new(),
            longest: BTreeMap::new(),
            submitted: 0,
        };
        while place.submitted < size.jobs {
            place.submit(TOGETHER.min(size.jobs - place.submitted)).await?;
        }
        let (ended, running) = (size.jobs / 10, size.jobs / 100);
        let (mut done, mut turn) = (0, 0);
        while done < ended {
            done += place.work_off(turn, TAKE_MAX.min(ended - done)).await?.len();
            turn += 1;
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

    /// Two and two: SQL at one of the hosts, and tasks of a few handlers.
    fn job(&self, number: usize) -> anyhow::Result<Submission> {
        let fields = if (number / 2).is_multiple_of(2) {
            let host = (number / 4 * 7_919 + number / self.size.users) % self.size.pools;
            Fields::new().with("query", "SELECT 1").with("host", format!("h{host}"))
        } else {
            let op = HANDLERS[number / 4 % HANDLERS.len()];
            Fields::new().with("kind", "task").with("app", "bench").with("op", op).with("input", "{}")
        };
        Ok(Submission {
            id: JobId::new(format!("job-{number}"))?,
            user: User::new(format!("user-{}", number / 4 % self.size.users))?,
            delay_ms: 0,
            run_at_ms: None,
            fields: fields.with("tags", format!("t{}", number % 7)),
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

    async fn take(&self, turn: usize, count: usize) -> anyhow::Result<Vec<Claim>> {
        let claims = self.sessions[turn % 2].take(count).await?.context("it is served")?.claims;
        anyhow::ensure!(
            !claims.is_empty(),
            "nothing was taken, of {} jobs: {:?}",
            self.size.jobs,
            self.redis
                .state(DB)
                .queues()
                .iter()
                .map(|(user, ids)| (user.clone(), ids.len()))
                .take(5)
                .collect::<Vec<_>>()
        );
        Ok(claims)
    }

    async fn end(claim: Claim, status: &'static str) -> anyhow::Result<JobId> {
        let id = claim.job().id.clone();
        let verdict = Verdict::Final { keep_ms: KEEP_MS };
        claim.finish(verdict, Duration::from_millis(1), Fields::new().with("status", status), false).await?;
        Ok(id)
    }

    async fn work_off(&self, turn: usize, count: usize) -> anyhow::Result<Vec<JobId>> {
        let mut ended = Vec::new();
        for claim in self.take(turn, count).await? {
            ended.push(Self::end(claim, "done").await?);
        }
        Ok(ended)
    }

    /// One round: each kind of call, so often in a row; then many jobs a call, and all that the leader and a reader do.
    async fn measure(&mut self, calls: usize) -> anyhow::Result<()> {
        self.redis.raw(&["CONFIG", "SET", "slowlog-max-len", "100000"]);
        self.redis.raw(&["CONFIG", "SET", "slowlog-log-slower-than", TOLD_FROM]);
        self.redis.raw(&["SLOWLOG", "RESET"]);
        let canceller = Canceller::new(self.store.clone(), KEEP);
        let retrier = Retrier::new(self.store.clone());
        let mut round = Round::start(&self.redis);
        let mut failed = Vec::new();
        for turn in 0..calls {
            let submitted = self.submit(1).await?;
            round.ends(&self.redis, "submit");
            canceller.cancel(&submitted[0]).await?;
            round.ends(&self.redis, "cancel, waiting");
            // As many as are taken.
            self.submit(1).await?;
            round.passes(&self.redis);
            self.sessions[turn % 2].beat().await?;
            round.ends(&self.redis, "beat");
            let claim = self.take(turn, 1).await?.remove(0);
            round.ends(&self.redis, "take");
            claim.pen().mark(&Fields::new().with("progress", "1")).await?;
            round.ends(&self.redis, "mark");
            failed.push(Self::end(claim, "failed").await?);
            round.ends(&self.redis, "finish");
            retrier.retry(&failed[failed.len() - 1..]).await?;
            round.ends(&self.redis, "retry");
            let claim = self.take(turn, 1).await?.remove(0);
            round.passes(&self.redis);
            canceller.cancel(&claim.job().id).await?;
            round.ends(&self.redis, "cancel, running");
            Self::end(claim, "cancelled").await?;
            round.passes(&self.redis);
        }
        for (kind, us) in round.kinds {
            let least = self.costs.entry(kind).or_insert(f64::INFINITY);
            *least = least.min(us / calls as f64);
        }

        canceller.cancel_many(&failed).await?;
        // As many as are gone.
        for _ in 0..calls.div_ceil(TOGETHER) + 1 {
            self.submit(TOGETHER).await?;
        }
        for turn in 0..self.sessions.len() {
            let claims = self.take(turn, TAKE_MAX).await?;
            let ids: Vec<JobId> = claims.iter().map(|claim| claim.job().id.clone()).collect();
            canceller.cancel_many(&ids).await?;
            // All at once: the session sends them together.
            let ends = claims.into_iter().map(|claim| tokio::spawn(Self::end(claim, "failed")));
            for end in ends.collect::<Vec<_>>() {
                end.await??;
            }
            retrier.retry(&ids).await?;
        }
        self.sessions[0].set_capacities(1_000_001, &[]).await?;
        self.lead().await?;
        self.look().await?;
        self.redis.raw(&["CONFIG", "SET", "slowlog-log-slower-than", "-1"]);
        self.note_longest();
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

    /// Notes what has taken long in this round.
    fn note_longest(&mut self) {
        let Value::Array(calls) = self.redis.raw(&["SLOWLOG", "GET", "-1"]) else { return };
        let names: BTreeMap<String, &str> =
            (TABLE.iter()).map(|function| (function.qualified(Library::ours().version), function.name)).collect();
        let mut longest: BTreeMap<String, f64> = BTreeMap::new();
        for call in &calls {
            let Value::Array(call) = call else { continue };
            let Value::Array(words) = &call[3] else { continue };
            let command = words[0].text().to_ascii_uppercase();
            let name = match &*command {
                "CONFIG" | "SLOWLOG" => continue,
                "FCALL" | "FCALL_RO" => {
                    let name = names.get(&words[1].text()).map_or(&*command, |name| *name);
                    // What it compares stands among its arguments.
                    if name == "reconcile" { format!("{name} {}", words[9].text()) } else { name.to_owned() }
                }
                _ => command,
            };
            let longest = longest.entry(name).or_default();
            *longest = longest.max(call[2].int() as f64);
        }
        for (name, us) in longest {
            self.longest.entry(name).or_default().push(us);
        }
    }
}

/// What calls cost, kind by kind.
struct Round {
    /// So much time Redis has spent in functions so far, in µs.
    at: f64,
    kinds: BTreeMap<&'static str, f64>,
}

impl Round {
    fn start(redis: &RedisServer) -> Self {
        Self { at: us_in_functions(redis), kinds: BTreeMap::new() }
    }

    /// What came since was a call of this kind.
    fn ends(&mut self, redis: &RedisServer, kind: &'static str) {
        let now = us_in_functions(redis);
        *self.kinds.entry(kind).or_default() += now - self.at;
        self.at = now;
    }

    /// What came since does not count.
    fn passes(&mut self, redis: &RedisServer) {
        self.at = us_in_functions(redis);
    }
}

fn us_in_functions(redis: &RedisServer) -> f64 {
    let stats = redis.raw(&["INFO", "commandstats"]).text();
    let functions = stats.lines().filter(|line| line.starts_with("cmdstat_fcall"));
    functions.filter_map(|line| line.split("usec=").nth(1)?.split(',').next()?.parse::<f64>().ok()).sum()
}
