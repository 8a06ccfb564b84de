//! Every call that a worker makes in a job's life is found out, and then the worker is killed at each of them: before the
//! call, between the call and its reply, and after the reply. Another one brings the job to the same end, and every
//! statement that is recorded as done has taken effect once, every task and every row of a handler at least once, and every
//! batch has its files and is told. Likewise for those who submit.

mod support;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use queue_core::Store;
use queue_core::batch::{Batches, NewBatch};
use queue_core::cancel::Canceller;
use queue_core::config::{Limits, ObjectsConfig, RedisConfig, Url};
use queue_core::flow::{Flows, LaunchOptions, StepStatus};
use queue_core::ids::{App, Op, SessionId, User};
use queue_core::inspect::{Inspect, JobView};
use queue_core::leader::{self, SessionWatch};
use queue_core::library::{TABLE, Version};
use queue_core::model::batch::{Counts, Row};
use queue_core::model::chunk::{ChunkWork, ItemReader, ItemWriter, RowTarget};
use queue_core::model::flow::{Flow, On, Step};
use queue_core::model::task::Payload;
use queue_core::objects::Objects;
use queue_core::producer::{Database, EnqueueError, NewJob, Producer, Submitted};
use support::{PATIENCE, daemon, ended, job_id};
use testkit::state::{Piece, State};
use testkit::{Daemon, Point, Postgres, Proxy, RedisServer, Scratch, Signal, bin, eventually};

const DATABASE: &str = "steps";
const POINTS: [Point; 3] = [Point::BeforeCall, Point::BeforeReply, Point::AfterReply];
/// Runs at the same time, each on a database of its own of the one Redis. They mostly wait for sessions to expire. On a
/// machine that is slow there are fewer, but so many at least.
const LANES: u8 = 14;
const FEWEST_LANES: u8 = 2;
/// What a worker calls in a job's life, beside its housekeeping.
const OF_A_JOB: [&str; 5] = ["session_open", "take", "update_claimed", "finish", "session_end"];
/// What it calls for a batch beside that.
const OF_A_BATCH: [&str; 2] = ["batch_cut", "batch_load"];
const SETTINGS: [(&str, &str); 3] = [
    ("DRAYMAN_WORKER__SCAN_INTERVAL", "300ms"),
    ("DRAYMAN_WORKER__DRAIN_GRACE", "100ms"),
    ("DRAYMAN_REDIS__COMMAND_TIMEOUT", "30s"),
];
/// Of a worker's session, where the machine is quick.
const LIFETIME: Duration = Duration::from_millis(2_000);
/// How long the leader of a lane waits for a worker, where the machine is quick.
const LEADERS_PATIENCE: Duration = Duration::from_millis(1_000);
/// It looks more often than a worker's maintenance would.
const LOOK: Duration = Duration::from_millis(100);
/// What comes by itself comes within this, where the machine is quick: a leader's whole round is a second away at most.
const HOUSEKEEPING: Duration = Duration::from_secs(4);

/// A job that is brought to its end again and again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Case {
    Simple,
    List,
    Fallback,
    Cancel,
    /// A task, run by a command that says something and goes on for a while.
    Task,
    /// A batch for a program that works on its rows for longer than a chunk may last, writes a file and is told of the end.
    Rows,
    /// A batch of statements.
    RowsSql,
    /// A statement, a task that follows it, and a task that is not to run.
    Flow,
    /// A step in chunks with a checkpoint beside its items, and a step that is a batch: both as definitions declare them.
    Declared,
    /// A task that writes items in chunks into a database, each chunk with its checkpoint.
    Chunks,
    /// A simple one whose worker leads.
    Leading,
}

impl Case {
    const JOBS: [Case; 6] = [Case::Simple, Case::List, Case::Fallback, Case::Cancel, Case::Task, Case::Leading];
    const BATCHES: [Case; 2] = [Case::Rows, Case::RowsSql];
    const FLOWS: [Case; 2] = [Case::Flow, Case::Declared];
    const CHUNKS: [Case; 1] = [Case::Chunks];

    fn is_batch(self) -> bool {
        matches!(self, Case::Rows | Case::RowsSql)
    }

    fn query(self, id: &str) -> String {
        let effect = |step: &str| format!("INSERT INTO effects VALUES ('{id}', '{step}')");
        match self {
            Case::Simple | Case::Leading => effect("0"),
            Case::List => format!(r#"["{}", "{}"]"#, effect("0"), effect("1")),
            Case::Fallback => {
                let (main, entry, own) = (effect("0"), effect("0.onerror"), effect("onerror"));
                format!(r#"{{"query": [{{"query": "{main}; SELECT 1/0", "onerror": "{entry}"}}], "onerror": "{own}"}}"#)
            }
            Case::Cancel => format!("{}; SELECT pg_sleep(600)", effect("0")),
            Case::RowsSql => format!("INSERT INTO effects VALUES ('{id}', $1)"),
            Case::Flow => effect("0"),
            Case::Task | Case::Rows | Case::Chunks | Case::Declared => unreachable!("it has none"),
        }
    }

    /// How it ends, and what takes effect.
    fn end(self) -> (&'static str, &'static [&'static str]) {
        match self {
            Case::Simple | Case::Leading | Case::Task => ("done", &["0"]),
            Case::List => ("done", &["0", "1"]),
            Case::Fallback => ("failed", &["0.onerror", "onerror"]),
            Case::Cancel => ("cancelled", &[]),
            Case::Rows | Case::RowsSql => ("done", &["1", "2", "3"]),
            // All items, and as many different ones.
            Case::Chunks => ("done", &["5000 5000"]),
            Case::Declared => ("done", &["103 103"]),
            // The task's effect stands in a file of its own.
            Case::Flow => ("done", &["0"]),
        }
    }
}

/// Works on rows: a line in the batch's own file of effects, and one in its output file; another file says how it ended.
const PROGRAM: &str = r#"
import json, os, sys, time
for line in sys.stdin:
    call = json.loads(line)
    if call["type"] == "job":
        print(call["line"], file=open(os.path.join(sys.argv[1], call["batch"]), "a"))
        time.sleep(0.6)
        said = {"type": "result", "id": call["id"], "files": {"lines": f"{call['line']}\n"}}
    elif call["type"] == "mark_done":
        print(call["status"], call["counts"]["done"], file=open(os.path.join(sys.argv[1], call["batch"] + ".told"), "a"))
        said = {"type": "result", "id": call["id"]}
    else:
        continue
    print(json.dumps(said), flush=True)
"#;

/// The call that hands the leadership over.
const RESIGN: &str = "leader_lease: resign";

/// One call: the function's name and which of its calls it is.
type Call = (&'static str, usize);

/// Which call of a worker is stopped and where, and what it has called so far.
#[derive(Debug, Default)]
struct Tap {
    calls: BTreeMap<&'static str, usize>,
    /// When it called for the first time.
    begun: Option<Instant>,
    stop: Option<(Call, Point)>,
}

/// Reads calls of functions off the wire.
#[derive(Debug)]
struct Reader {
    by_name: HashMap<String, &'static str>,
}

impl Reader {
    fn new() -> Self {
        Self { by_name: TABLE.iter().map(|function| (function.qualified(Version::OURS), function.name)).collect() }
    }

    /// The function that a command calls. The call that hands the leadership over counts apart: how many come before it is a
    /// matter of time.
    fn function(&self, words: &[Vec<u8>]) -> Option<&'static str> {
        if !words[0].eq_ignore_ascii_case(b"FCALL") {
            assert!(!words[0].starts_with(b"EVAL"), "the library is loaded");
            return None;
        }
        let name = self.by_name[std::str::from_utf8(&words[1]).expect("a name")];
        let resigns = name == "leader_lease" && words.last().is_some_and(|wish| wish == b"resign");
        Some(if resigns { RESIGN } else { name })
    }

    fn tap(self: &Arc<Self>, proxy: &Proxy, stop: Option<(Call, Point)>) -> Arc<Mutex<Tap>> {
        let tap = Arc::new(Mutex::new(Tap { stop, ..Tap::default() }));
        let (reader, shared) = (self.clone(), tap.clone());
        proxy.gate(move |words| {
            let name = reader.function(words)?;
            let mut tap = shared.lock().unwrap();
            tap.begun.get_or_insert_with(Instant::now);
            let count = tap.calls.entry(name).or_default();
            *count += 1;
            let call = (name, *count);
            tap.stop.filter(|(stopped, _)| *stopped == call).map(|(_, point)| point)
        });
        tap
    }
}

/// How slow the machine is, by how long workers take from their start to their first call while the others are at work. With
/// as many of them on a slow machine as on a quick one, and as short lifetimes, they would be taken for lost again and
/// again, and bring nothing to its end.
#[derive(Debug, Default)]
struct Pace {
    /// How long workers take to start, in microseconds. One that is slower counts at once, one that is quicker by and by.
    start_us: AtomicU64,
}

impl Pace {
    /// What one takes among all the others on a quick machine: up to here nothing is to be changed.
    const QUICK: Duration = Duration::from_millis(750);
    /// Lifetimes grow no longer than this.
    const SLOWEST: f64 = 10.0;

    fn saw(&self, took: Duration) {
        let took = took.as_micros() as u64;
        let add = |so_far: u64| Some(if took > so_far { took } else { (4 * so_far + took) / 5 });
        self.start_us.fetch_update(Ordering::SeqCst, Ordering::SeqCst, add).expect("it is never refused");
    }

    /// How many times slower than a quick one the machine is now.
    fn times(&self) -> f64 {
        let start = Duration::from_micros(self.start_us.load(Ordering::SeqCst));
        start.div_duration_f64(Self::QUICK).clamp(1.0, Self::SLOWEST)
    }

    /// How many lanes it has room for now.
    fn lanes(&self) -> u8 {
        ((f64::from(LANES) / self.times()) as u8).max(FEWEST_LANES)
    }
}

struct House {
    redis: RedisServer,
    postgres: Postgres,
    reader: Arc<Reader>,
    /// The workers' configuration, and a file for each task with a line for each time that it was run.
    scratch: Scratch,
    pace: Arc<Pace>,
}

impl House {
    async fn build() -> Arc<Self> {
        let redis = RedisServer::with_config(&[("databases", "64")]);
        let postgres = Postgres::with_config(&[("log_statement", "none")]);
        postgres.create_database(DATABASE).await;
        postgres.query(DATABASE, "CREATE TABLE effects (job text, step text)").await;
        connect(&redis.url_db(0)).await.keep_library().await.expect("redis has room for it");
        let reader = Arc::new(Reader::new());
        let scratch = Scratch::new("steps");
        let script = "echo 0 >> \"$0\"; echo told >&2; exec sleep 1";
        let effects = scratch.path().join("{job}");
        let program = scratch.path().join("rows.py");
        std::fs::write(&program, PROGRAM).expect("it can be written");
        let config = format!(
            "[worker]\npools = ['sql:*', 'db:*']\n[chunks]\nserve = true\n[objects]\nurl = 'file://{0}/objects'\n[databases.steps]\nkind = 'postgres'\nhost = '{3}'\nport = {4}\n\
             dbname = '{DATABASE}'\nuser = 'postgres'\ntls = 'disable'\n\
             [[handlers]]\napp = 'steps'\nop = 'task'\nkind = 'command'\n\
             command = ['sh', '-c', '{script}', '{1}']\n\
             [[handlers]]\napp = 'steps'\nop = 'rows'\nkind = 'program'\nmark_done = true\n\
             command = ['python3', '{2}', '{0}']\n",
            scratch.path().display(),
            effects.display(),
            program.display(),
            postgres.host_port().0,
            postgres.host_port().1,
        );
        std::fs::write(scratch.path().join("worker.toml"), config).expect("it can be written");
        let orders: String = (1..=5_000).map(|id| format!("{id},customer,{id}\n")).collect();
        std::fs::write(scratch.path().join("orders.csv"), format!("id,customer,cents\n{orders}"))
            .expect("it can be written");
        Arc::new(Self { redis, postgres, reader, scratch, pace: Arc::default() })
    }

    async fn submit(&self, store: &Store, case: Case, id: &str) {
        let ann = User::new("ann").unwrap();
        let (app, op) = (App::new("steps").unwrap(), |op| Op::new(op).unwrap());
        let job = match case {
            Case::Rows | Case::RowsSql => {
                let new = match case {
                    Case::Rows => NewBatch::handler(ann, app, op("rows")),
                    _ => NewBatch::sql(ann, self.database(), case.query(id)),
                };
                let rows = (1..=3).map(|line| Row { line, input: format!("[\"{line}\"]").into_bytes() }).collect();
                let batches = Batches::new(store.clone(), Limits::default());
                batches.submit(NewBatch { id: job_id(id), ..new }, rows).await.expect("redis answers");
                return;
            }
            Case::Flow => {
                let flow = Flow::builder("steps")
                    .any_params()
                    .step(Step::sql("sql", DATABASE, case.query(id)))
                    .step(Step::task("task", "steps", "task"))
                    .step(Step::task("alarm", "steps", "task").map(|step| step.on(On::Failed)))
                    .build()
                    .expect("it is one");
                // Each is an instance of its own.
                let given = [("run".to_owned(), id.into())].into_iter().collect();
                let options = LaunchOptions { id: Some(job_id(id)), ..LaunchOptions::default() };
                Flows::new(store.clone()).launch(&flow, &ann, &given, options).await.expect("redis answers");
                return;
            }
            Case::Declared => {
                let items = |from: u64, to: u64| ItemReader::List {
                    items: (from..=to).map(|n| serde_json::json!({ "n": n })).collect(),
                };
                let insert = format!("INSERT INTO effects VALUES ('{id}', :n)");
                let writer = ItemWriter::Sql { database: DATABASE.into(), query: insert.clone() };
                let copy = ChunkWork { chunk_size: 25.try_into().unwrap(), ..ChunkWork::new(items(1, 100), writer) };
                let rows = RowTarget::Sql { database: DATABASE.into(), statement: insert };
                let flow = Flow::builder("declared")
                    .any_params()
                    .step(Step::chunk("copy", copy))
                    .step(Step::batch("rows", items(101, 103), rows))
                    .build()
                    .expect("it is one");
                let given = [("run".to_owned(), id.into())].into_iter().collect();
                let options = LaunchOptions { id: Some(job_id(id)), ..LaunchOptions::default() };
                Flows::new(store.clone()).launch(&flow, &ann, &given, options).await.expect("redis answers");
                return;
            }
            Case::Chunks => {
                let place = |name: &str| self.scratch.path().join(name).display().to_string();
                let places = serde_json::json!({
                    "orders": place("orders.csv"),
                    "database": place(&format!("{id}.db")),
                    "report": place(&format!("{id}.csv")),
                });
                let (app, input) = (App::new("shop").unwrap(), Payload::json(&places).unwrap());
                NewJob { id: job_id(id), ..NewJob::task(ann, app, op("load"), input) }
            }
            Case::Task => NewJob { id: job_id(id), ..NewJob::task(ann, app, op("task"), Payload::json(&()).unwrap()) },
            _ => self.job(id, case.query(id)),
        };
        Producer::new(store.clone(), Limits::default()).enqueue(job).await.expect("redis answers");
    }

    fn database(&self) -> Database {
        let (host, port) = self.postgres.host_port();
        Database::Connection { host, port, dbname: DATABASE.into(), dbuser: "postgres".into(), pass: String::new() }
    }

    fn job(&self, id: &str, query: String) -> NewJob {
        NewJob { id: job_id(id), ..NewJob::sql(User::new("ann").unwrap(), self.database(), query) }
    }

    /// How often the application was told of the end of a batch, all with the same words.
    fn told(&self, id: &str) -> usize {
        let text = std::fs::read_to_string(self.scratch.path().join(format!("{id}.told"))).unwrap_or_default();
        assert!(text.lines().all(|line| line == "done 3"), "{id}: {text}");
        text.lines().count()
    }

    /// What took effect. Of a task or a row, which is run again when it has lost its worker, what any run did; `lost` is how
    /// often the record says that it has.
    async fn effects(&self, case: Case, id: &str, lost: usize) -> Vec<String> {
        if case == Case::Declared {
            let sql = format!("SELECT count(*) || ' ' || count(DISTINCT step) FROM effects WHERE job = '{id}'");
            return self.postgres.query(DATABASE, &sql).await.remove(0).into_iter().flatten().collect();
        }
        if let Ok(text) = std::fs::read_to_string(self.scratch.path().join(id)) {
            let lines: BTreeSet<&str> = text.lines().collect();
            // One worker is killed. On a busy machine others may be taken for lost, and the record tells of each.
            assert!(text.lines().count() <= (1 + lost.max(1)) * lines.len(), "{id}, lost {lost} times: {text}");
            return lines.into_iter().map(str::to_owned).collect();
        }
        let database = self.scratch.path().join(format!("{id}.db"));
        if database.exists() {
            let database = rusqlite::Connection::open(database).expect("it can be opened");
            let count = |what| database.query_row(what, [], |row| row.get::<_, i64>(0)).expect("a number");
            let (all, different) = ("SELECT count(*) FROM orders", "SELECT count(DISTINCT id) FROM orders");
            return vec![format!("{} {}", count(all), count(different))];
        }
        let sql = format!("SELECT step FROM effects WHERE job = '{id}' ORDER BY step");
        self.postgres.query(DATABASE, &sql).await.into_iter().map(|mut row| row.remove(0).unwrap()).collect()
    }
}

async fn connect(url: &str) -> Store {
    // As patient as the workers: what a reply takes is not what is looked at here.
    let config = RedisConfig { url: Url::new(url), command_timeout: PATIENCE / 2, ..RedisConfig::default() };
    Store::connect(&config).await.expect("redis answers")
}

/// One database of the Redis, with a leader that takes no jobs.
struct Lane {
    house: Arc<House>,
    db: u8,
    store: Store,
    inspect: Inspect,
    /// The lane's leader does not lead: the worker is to.
    aside: Arc<AtomicBool>,
    leader: tokio::task::JoinHandle<()>,
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.leader.abort();
    }
}

impl Lane {
    async fn open(house: &Arc<House>, db: u8) -> Self {
        let store = connect(&house.redis.url_db(db)).await;
        let aside = Arc::new(AtomicBool::new(false));
        let leader = tokio::spawn(lead(store.clone(), aside.clone(), house.pace.clone()));
        Self { house: house.clone(), db, inspect: Inspect::new(store.clone()), store, aside, leader }
    }

    fn worker(&self, case: Case, url: &str) -> Daemon {
        let lifetime = format!("{}ms", LIFETIME.mul_f64(self.house.pace.times()).as_millis());
        let settings = [&SETTINGS[..], &[("DRAYMAN_WORKER__SESSION_LIFETIME", &lifetime)]].concat();
        if case == Case::Chunks {
            let env = [&settings[..], &[("DRAYMAN_CONFIG", "/dev/null"), ("DRAYMAN_REDIS__URL", url)]].concat();
            return Daemon::spawn(bin("examples/orders"), &[""; 0], &env);
        }
        let config = self.house.scratch.path().join("worker.toml").display().to_string();
        daemon(url, &[&settings[..], &[("DRAYMAN_CONFIG", &config)]].concat())
    }

    /// Sees how long a worker takes to start that has nothing to do.
    async fn measure(&self) {
        let proxy = Proxy::start(self.house.redis.addr());
        let tap = self.house.reader.tap(&proxy, None);
        let started = Instant::now();
        let worker = self.worker(Case::Simple, &proxy.redis_url(self.db));
        let begun = eventually("a worker to call", async || tap.lock().unwrap().begun).await;
        self.house.pace.saw(begun - started);
        worker.signal(Signal::SIGTERM);
        assert!(end_of_daemon(&worker).await.success());
    }

    /// A job's record, if Redis answers. It need not: on a busy machine it may be silent for longer than is waited for.
    async fn view(&self, id: &str) -> Option<JobView> {
        match self.inspect.job(id).await {
            Ok(view) => Some(view.expect("it was submitted")),
            Err(error) if error.is_transient() => None,
            Err(error) => panic!("{id}: {error}"),
        }
    }

    fn state(&self) -> State {
        self.house.redis.state(self.db)
    }

    /// Brings one job to its end through a worker of which one call is stopped; what the worker has called by the time
    /// that it stopped or ended.
    async fn run(&self, case: Case, stop: Option<(Call, Point)>) -> (bool, BTreeMap<&'static str, usize>) {
        let id = match stop {
            Some(((name, number), point)) => format!("{case:?}-{name}-{number}-{point:?}").replace(": ", "-"),
            None => format!("{case:?}"),
        };
        let house = &self.house;
        self.aside.store(case == Case::Leading, Ordering::SeqCst);
        if case == Case::Leading {
            let none = async || (!self.state().has(Piece::Leader)).then_some(());
            eventually("the lane's leader to stand aside", none).await;
        }
        house.submit(&self.store, case, &id).await;
        let proxy = Proxy::start(house.redis.addr());
        let tap = house.reader.tap(&proxy, stop);
        let started = Instant::now();
        let worker = self.worker(case, &proxy.redis_url(self.db));
        let stopped = || proxy.stopped() > 0;
        // As long as it brings the job on, there is progress. Its housekeeping is none.
        let stands = || {
            let calls = tap.lock().unwrap().calls.clone();
            let is_progress = |name: &str| (OF_A_JOB.contains(&name) && name != "take") || OF_A_BATCH.contains(&name);
            // An idle worker takes again and again.
            let takes = calls.get("take").copied().unwrap_or(0).min(stop.map_or(0, |((_, number), _)| number));
            (takes, calls.into_iter().filter(|(name, _)| is_progress(name)).collect::<Vec<_>>())
        };

        if case == Case::Cancel {
            let sleeps =
                format!("SELECT 1 FROM pg_stat_activity WHERE query LIKE '%{id}%pg_sleep(600)' AND state = 'active'");
            eventually("the statement to run", async || {
                (stopped() || house.postgres.query("postgres", &sleeps).await.len() == 1)
                    .then_some(())
                    .ok_or_else(stands)
            })
            .await;
            Canceller::new(self.store.clone(), PATIENCE).cancel(&job_id(&id)).await.expect("redis answers");
        }
        let over = async || self.is_over(case, &id).await;
        // What housekeeping does comes in its own time.
        let patient = stop.is_some_and(|((name, _), _)| !OF_A_JOB.contains(&name) && name != RESIGN);
        let begun = Instant::now();
        eventually(&format!("{id} to stop or to end"), async || {
            if stopped() {
                return Ok(());
            }
            let waited = !patient || begun.elapsed() > HOUSEKEEPING.mul_f64(house.pace.times());
            // The take behind the job is part of its life.
            let takes = tap.lock().unwrap().calls.get("take").copied().unwrap_or(0);
            let takes_on = !matches!(stop, Some((("take", number), _)) if number > takes);
            (waited && takes_on && over().await).then_some(()).ok_or_else(stands)
        })
        .await;
        if !stopped() {
            worker.signal(Signal::SIGTERM);
            eventually(&format!("{id} to stop or its worker to end"), async || {
                (stopped() || worker.try_wait().is_some()).then_some(()).ok_or_else(|| worker.lines().len())
            })
            .await;
        }
        let was_stopped = stopped();
        if was_stopped {
            // The program first: its server hears of that later, or never.
            worker.signal(Signal::SIGKILL);
            end_of_daemon(&worker).await;
            proxy.cut();
        }
        let (calls, begun) = {
            let tap = tap.lock().unwrap();
            (tap.calls.clone(), tap.begun)
        };
        house.pace.saw(begun.map_or_else(|| started.elapsed(), |begun| begun - started));
        self.aside.store(false, Ordering::SeqCst);
        self.settle(case, &id).await;
        (was_stopped, calls)
    }

    /// Whether it has ended, and whoever is to be told was told.
    async fn is_over(&self, case: Case, id: &str) -> bool {
        self.view(id).await.is_some_and(|view| view.is_over()) && (case != Case::Rows || self.house.told(id) > 0)
    }

    /// How often a job's record says that it has lost its worker.
    fn lost(&self, id: &str) -> usize {
        self.state().field(id, "unclean").map_or(0, |times| times.parse().expect("a number"))
    }

    /// Another worker ends what is left, and then nothing is.
    async fn settle(&self, case: Case, id: &str) {
        // A job that is over at the first look needs nobody any more, unless a part of a batch is left.
        let left = self.state().running() > 0 || !self.is_over(case, id).await;
        let rescuer = left.then(|| self.worker(case, &self.house.redis.url_db(self.db)));
        // The parts of a batch and the steps of a flow are jobs of their own.
        let records = || self.state().jobs().into_iter().filter(|job| job.starts_with(id));
        let stands = || records().map(|job| self.state().record(&job)).collect::<Vec<_>>();
        let view = eventually(&format!("job {id} to end"), async || {
            self.view(id).await.filter(JobView::is_over).ok_or_else(stands)
        })
        .await;
        let (status, effects) = case.end();
        assert_eq!(view.status(), status, "{id}: {:?}", view.text("failed_reason"));
        assert_eq!(self.house.effects(case, id, self.lost(id)).await, effects, "{id}");
        let record = |name: &str| view.text(name);
        let first = [record("status"), record("fallback_status"), record("ended_at"), record("results")];
        eventually(&format!("nothing to be left of {id}"), async || {
            let state = self.state();
            let left = state.has_any(&[Piece::Claims, Piece::Queue("ann"), Piece::QueuesOfTasks]);
            (!left && state.batches_at_work().is_empty() && self.is_over(case, id).await)
                .then_some(())
                .ok_or_else(stands)
        })
        .await;
        if case.is_batch() {
            self.assert_whole(case, id).await;
        }
        if case == Case::Declared {
            let steps = Flows::new(self.store.clone()).steps(&job_id(id)).await.expect("they are kept");
            let counts = steps[0].checkpoint.as_ref().expect("it saved some");
            let counts = ["read_count", "write_count", "commit_count"].map(|name| counts[name].as_u64().unwrap());
            assert_eq!(counts, [100, 100, 4], "{id}");
            assert_eq!(steps[1].rows, Some(Counts { rows: 3, done: 3, ..Counts::default() }), "{id}");
        }
        if case == Case::Flow {
            let task = format!("{id}:task");
            assert_eq!(self.house.effects(case, &task, self.lost(&task)).await, ["0"], "{id}");
            let steps = Flows::new(self.store.clone()).steps(&job_id(id)).await.expect("they are kept");
            let stand: Vec<StepStatus> = steps.into_iter().map(|step| step.status).collect();
            assert_eq!(stand, [StepStatus::Done, StepStatus::Done, StepStatus::Skipped], "{id}");
        }
        if let Some(rescuer) = rescuer {
            rescuer.signal(Signal::SIGTERM);
            assert!(end_of_daemon(&rescuer).await.success());
        }
        let view = eventually("redis to answer", async || self.view(id).await).await;
        let record = |name: &str| view.text(name);
        assert_eq!([record("status"), record("fallback_status"), record("ended_at"), record("results")], first, "{id}");
    }

    /// The counters and the file of a batch are those of its rows.
    async fn assert_whole(&self, case: Case, id: &str) {
        let objects = format!("file://{}/objects", self.house.scratch.path().display());
        let objects = Objects::open(&ObjectsConfig { url: Url::new(objects), ..ObjectsConfig::default() }).unwrap();
        let batches = Batches::new(self.store.clone(), Limits::default()).with_objects(objects);
        let counts = batches.view(&job_id(id)).await.expect("it is kept").counts;
        assert_eq!(counts, Counts { rows: 3, done: 3, ..Counts::default() }, "{id}");
        if case == Case::Rows {
            let mut file = Vec::new();
            batches.file(&job_id(id), "lines", &mut file).await.expect("it has one");
            assert_eq!(String::from_utf8_lossy(&file), "1\n2\n3\n", "{id}");
        }
    }
}

/// The end of a process, without blocking the lane: its leader and its connections go on meanwhile.
async fn end_of_daemon(daemon: &Daemon) -> ExitStatus {
    eventually("the end of a worker", async || daemon.try_wait().ok_or_else(|| daemon.lines().len())).await
}

/// A leader that gives back what dead workers held, and does nothing else.
async fn lead(store: Store, aside: Arc<AtomicBool>, pace: Arc<Pace>) {
    let id = SessionId::generate("leader", 1);
    let mut watch = SessionWatch::default();
    loop {
        let patience = LEADERS_PATIENCE.mul_f64(pace.times());
        let round = async {
            if aside.load(Ordering::SeqCst) {
                leader::resign(&store, &id).await?;
            } else if let Some(leadership) = leader::hold(&store, &id, patience).await? {
                // Whoever took the leadership in between has it: then there is nothing to do.
                let _ = watch.pass(&leadership, patience).await?;
            }
            Ok::<_, queue_core::Error>(())
        };
        match round.await {
            Ok(()) => {}
            // As real ones do: what did not get through is done in the next round.
            Err(error) if error.is_transient() => {}
            Err(error) => panic!("the leader of a lane: {error}"),
        }
        tokio::time::sleep(LOOK).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_call_a_worker_leaves_a_job_that_ends_rightly_and_takes_effect_once() {
    let found = kill_everywhere(&Case::JOBS).await;
    assert_found(&found, Case::Simple, &[&OF_A_JOB[..], &["session_beat"]].concat());
    assert_found(&found, Case::Task, &["take", "update_claimed", "finish"]);
    assert_found(&found, Case::Leading, &["leader_lease", RESIGN, "promote_and_expire"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_call_a_worker_leaves_a_batch_that_ends_rightly_with_its_files_and_is_told() {
    let found = kill_everywhere(&Case::BATCHES).await;
    // A chunk and what was cut off it, the files, the word to the application.
    assert_found(&found, Case::Rows, &["take", "batch_cut", "finish"]);
    assert!(found.contains(&(Case::Rows, ("finish", 4))), "{found:?}");
    assert_found(&found, Case::RowsSql, &["take", "update_claimed", "finish"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_call_a_worker_leaves_a_flow_that_goes_on_and_whose_steps_end_once() {
    let found = kill_everywhere(&Case::FLOWS).await;
    assert_found(&found, Case::Flow, &["take", "update_claimed", "finish"]);
    assert!(found.contains(&(Case::Flow, ("finish", 2))), "{found:?}");
    // The first save of a step in chunks, and one behind each of four chunks.
    assert!(found.contains(&(Case::Declared, ("update_claimed", 5))), "{found:?}");
    assert_found(&found, Case::Declared, &["take", "batch_load", "finish"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_call_a_worker_leaves_a_task_in_chunks_that_writes_each_item_once() {
    let found = kill_everywhere(&Case::CHUNKS).await;
    // The first save, and one behind each of five chunks.
    assert!(found.contains(&(Case::Chunks, ("update_claimed", 6))), "{found:?}");
    assert_found(&found, Case::Chunks, &["take", "finish"]);
}

fn assert_found(found: &[(Case, Call)], case: Case, names: &[&'static str]) {
    for &name in names {
        assert!(found.contains(&(case, (name, 1))), "{name} is not among {found:?}");
    }
}

/// Brings the cases to their ends, and then again with a kill at each point of each call that was seen. Returns the calls.
async fn kill_everywhere(cases: &[Case]) -> Vec<(Case, Call)> {
    let house = House::build().await;
    let lane = Lane::open(&house, 0).await;
    lane.measure().await;
    let mut seen: Vec<(Case, Call)> = Vec::new();
    for &case in cases {
        let (_, calls) = lane.run(case, None).await;
        for (name, count) in calls {
            let of_a_job = OF_A_JOB.contains(&name);
            // Housekeeping is the same whatever the job is.
            let looked_at = match case {
                Case::Leading => !of_a_job,
                Case::Simple => of_a_job || name == "session_beat",
                _ => ["take", "update_claimed", "finish", "batch_cut", "batch_load"].contains(&name),
            };
            // The saves of its chunks, and not what is told of them now and then.
            let count = if case == Case::Chunks { count.min(6) } else { count };
            let count = if of_a_job || case.is_batch() || Case::FLOWS.contains(&case) { count } else { 1 };
            if looked_at {
                seen.extend((1..=count).map(|number| (case, (name, number))));
            }
        }
    }
    drop(lane);
    let mut runs: VecDeque<(Case, Call, Point)> =
        seen.iter().flat_map(|&(case, call)| POINTS.map(|point| (case, call, point))).collect();
    // The slow ones first, so that none is left alone at the end.
    runs.make_contiguous().sort_by_key(|(case, _, _)| *case != Case::Leading);
    let (all, runs, missed) = (runs.len(), Mutex::new(runs), Mutex::new(Vec::new()));
    let work = async |db: u8| {
        let lane = Lane::open(&house, db).await;
        let next = async || {
            let mut runs = runs.lock().unwrap();
            if runs.is_empty() {
                return Ok(None);
            }
            // Where the machine is slow, some lanes stand aside.
            if db <= house.pace.lanes() { Ok(runs.pop_front()) } else { Err(runs.len()) }
        };
        loop {
            let Some((case, call, point)) = eventually("a run of this lane", next).await else { return };
            if !lane.run(case, Some((call, point))).await.0 {
                missed.lock().unwrap().push((case, call, point));
            }
        }
    };
    // A thread each: waiting for the end of a process blocks it.
    std::thread::scope(|scope| {
        for db in 1..=LANES {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            let work = &work;
            scope.spawn(move || runtime.block_on(work(db)));
        }
    });
    let missed = missed.lock().unwrap();
    let pace = house.pace.times();
    println!("{all} kills at {pace:.1} times the time, {} of them not: {missed:?}", missed.len());
    // How often an idle worker looks is a matter of time; what a job's life needs is not.
    assert!(
        missed.iter().all(|(_, (name, _), _)| !["session_open", "update_claimed", "finish"].contains(name)),
        "{missed:?}"
    );
    assert!(missed.len() * 10 < all, "{missed:?}");
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_or_cut_at_any_call_a_producer_may_submit_the_same_id_again() {
    let house = House::build().await;
    for (db, point) in (1..).zip(POINTS) {
        let lane = Lane::open(&house, db).await;
        let url = house.redis.url_db(db);
        let (host, port) = house.postgres.host_port();
        let port = port.to_string();
        let submit = |url: &str, id: &str| {
            let args = ["submit", "--redis-url", url, "--user", "ann", "--id", id, "--host", &host, "--port", &port];
            let query = Case::Simple.query(id);
            let args = [&args[..], &["--dbname", DATABASE, "--dbuser", "postgres", &query]].concat();
            Daemon::spawn(bin("drayman"), &args, &[])
        };
        let queued = |id: &str| {
            let queue = house.redis.state(db).waiting("ann");
            queue.iter().filter(|queued| *queued == id).count()
        };
        for end in ["killed", "cut"] {
            let id = format!("{end}-{point:?}");
            let proxy = Proxy::start(house.redis.addr());
            house.reader.tap(&proxy, Some((("submit", 1), point)));
            let program = submit(&proxy.redis_url(db), &id);
            let stopped = async || (proxy.stopped() > 0).then_some(());
            eventually("the submission to stop", stopped).await;
            assert_eq!(queued(&id), usize::from(point != Point::BeforeCall), "{id}");
            if end == "killed" {
                program.kill9();
            }
            proxy.cut();
            let code = program.wait().code();
            let known: &[Option<i32>] = match (end, point) {
                // With its answer it may have come to its end by itself.
                ("killed", Point::AfterReply) => &[None, Some(0)],
                ("killed", _) => &[None],
                (_, Point::AfterReply) => &[Some(0)],
                _ => &[Some(5)],
            };
            assert!(known.contains(&code), "{id}: {code:?} {}", program.output());
            let before = house.redis.state(db).record(&id);
            for _ in 0..2 {
                assert_eq!(submit(&url, &id).wait().code(), Some(0), "{id}");
                assert_eq!(queued(&id), 1, "{id}");
            }
            if point != Point::BeforeCall {
                assert_eq!(house.redis.state(db).record(&id), before, "{id}");
            }
        }

        // The same from Rust.
        let id = format!("library-{point:?}");
        let proxy = Proxy::start(house.redis.addr());
        house.reader.tap(&proxy, Some((("submit", 1), point)));
        let producer = Producer::new(connect(&proxy.redis_url(db)).await, Limits::default());
        let job = || house.job(&id, Case::Simple.query(&id));
        let first = tokio::spawn({
            let (producer, job) = (producer.clone(), job());
            async move { producer.enqueue(job).await }
        });
        let stopped = async || (proxy.stopped() > 0).then_some(());
        eventually("the submission to stop", stopped).await;
        proxy.cut();
        match first.await.expect("no panic") {
            Ok(Submitted::Queued(_)) => assert_eq!(point, Point::AfterReply),
            Err(EnqueueError::Unknown { id: told, .. }) => {
                assert!(told.as_str() == id && point != Point::AfterReply, "{point:?}");
            }
            other => panic!("{point:?}: {other:?}"),
        }
        let again = eventually("redis to be reached again", async || producer.enqueue(job()).await.ok()).await;
        let there = matches!(again, Submitted::AlreadyThere(_));
        assert_eq!((there, queued(&id)), (point != Point::BeforeCall, 1), "{point:?}");

        let worker = lane.worker(Case::Simple, &url);
        for id in [format!("killed-{point:?}"), format!("cut-{point:?}"), id] {
            assert_eq!(ended(&lane.inspect, &id).await.status(), "done");
            assert_eq!(house.effects(Case::Simple, &id, 0).await, ["0"], "{id}");
        }
        worker.signal(Signal::SIGTERM);
        assert!(worker.wait().success());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_call_who_submits_a_batch_may_submit_it_again_and_has_each_row_once() {
    const ROWS: u64 = 20;
    let house = House::build().await;
    let url = house.redis.url_db(0);
    let batches = Batches::new(connect(&url).await, Limits::default());
    // More than go in two calls.
    let row = format!("[\"{}\"]\n", "x".repeat(60_000));
    let file = house.scratch.path().join("rows.jsonl");
    std::fs::write(&file, row.repeat(ROWS as usize)).expect("it can be written");
    let submit = |url: &str, id: &str| {
        let args =
            ["batch", "submit", "--redis-url", url, "--user", "ann", "--app", "steps", "--op", "rows", "--id", id];
        let args = [&args[..], &[file.to_str().expect("UTF-8")]].concat();
        Daemon::spawn(bin("drayman"), &args, &[])
    };
    let counts =
        async |id: &str| batches.view(&job_id(id)).await.map(|view| (view.status.to_string(), view.counts.rows));
    let proxy = Proxy::start(house.redis.addr());
    let tap = house.reader.tap(&proxy, None);
    let whole = submit(&proxy.redis_url(0), "whole");
    assert!(whole.wait().success(), "{}", whole.output());
    let calls = tap.lock().unwrap().calls.clone();
    assert!(calls["batch_load"] > 2, "{calls:?}");
    for (call, point) in calls
        .iter()
        .flat_map(|(&name, &count)| (1..=count).flat_map(move |number| POINTS.map(|point| ((name, number), point))))
    {
        let id = format!("{}-{}-{point:?}", call.0, call.1);
        let proxy = Proxy::start(house.redis.addr());
        house.reader.tap(&proxy, Some((call, point)));
        let program = submit(&proxy.redis_url(0), &id);
        eventually("the submission to stop", async || (proxy.stopped() > 0).then_some(())).await;
        program.kill9();
        proxy.cut();
        // What is there is the whole batch, or nothing that a worker would take.
        if let Ok(stands) = counts(&id).await {
            assert!([("held".into(), 0), ("pending".into(), ROWS)].contains(&stands), "{id}: {stands:?}");
        }
        for _ in 0..2 {
            let again = submit(&url, &id);
            assert!(again.wait().success(), "{id}: {}", again.output());
            assert_eq!(counts(&id).await.expect("it is there"), ("pending".into(), ROWS), "{id}");
        }
    }
}
