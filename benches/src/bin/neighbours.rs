//! How long the tasks of one user wait, alone and beside somebody who submits what nobody should: forged batches, parts and flows, keys of
//! other types, large fields, users by the hundred. Both in one run, in turn.
//!
//! The worker is a process of its own: this program again, told to work. `benches/run-neighbours` builds everything.

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use benches::percentiles;
use clap::Parser;
use queue_core::Store;
use queue_core::config::{Limits, RedisConfig, Url};
use queue_core::events::Events;
use queue_core::ids::{App, Op, User};
use queue_core::model::task::Payload;
use queue_core::producer::{NewJob, Producer};
use testkit::RedisServer;
use testkit::state::{Piece, State};
use worker::builder::Worker;
use worker::config::Config;
use worker::shutdown::Shutdown;

const DB: u8 = 5;
/// Fields of a hostile hash beside its user.
const HOSTILE: [&[(&str, &str)]; 6] = [
    &[("kind", "batch"), ("cursor", "0 0 0 1"), ("loads", "1000000000000")],
    &[("kind", "part"), ("part", "rows b 0.0 0 4000000000")],
    &[("kind", "flow"), ("status", "running")],
    &[("kind", "unknown")],
    &[("host", "nobody-serves-it"), ("fence", "99999999999999999999"), ("unclean", "19")],
    &[("kind", "task"), ("app", "bench"), ("op", "rust"), ("encoding", "msgpack")],
];

/// Measures the waits of one user's tasks beside a hostile neighbour.
#[derive(Debug, Clone, Parser)]
struct Options {
    /// Samples of each measurement, one after the other
    #[arg(long, default_value_t = 300)]
    samples: usize,
    /// How often both are measured, in turn
    #[arg(long, default_value_t = 3)]
    repetitions: usize,
    /// Names under which the neighbour submits
    #[arg(long, default_value_t = 200)]
    users: u64,
    /// Bytes of the large field of each of its jobs
    #[arg(long, default_value_t = 4_096)]
    bytes: usize,
    /// Be the worker, on this Redis
    #[arg(long, hide = true)]
    work_on: Option<String>,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    match options.work_on.clone() {
        Some(url) => runtime.block_on(work(&url)),
        None => runtime.block_on(measure(&options)),
    }
}

async fn work(url: &str) -> anyhow::Result<()> {
    let mut config = Config::default();
    config.worker.pools.clear();
    let worker = Worker::builder().config(config).redis(url).handler("bench", "rust", |_: String, _| async { Ok(()) });
    worker.run(Shutdown::on_signals()?).await.map_err(anyhow::Error::from_boxed)
}

/// The worker's process, killed when it is dropped.
struct Working(Child);

impl Drop for Working {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Submits as fast as it is answered, until it is dropped.
struct Neighbour {
    over: Arc<AtomicBool>,
    submitted: Arc<AtomicU64>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Neighbour {
    fn start(state: State, options: &Options) -> Self {
        let (over, submitted) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stop, count, users, large) = (over.clone(), submitted.clone(), options.users, "x".repeat(options.bytes));
        let thread = thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let at = count.fetch_add(1, Ordering::Relaxed);
                let (id, user) = (format!("hostile-{at}"), format!("eve{}", at % users));
                if at.is_multiple_of(50) {
                    state.spoil(Piece::Job(&id));
                } else {
                    let fields = HOSTILE[at as usize % HOSTILE.len()];
                    state.foreign().write(&id, &[&[("user", &*user), ("query", &*large)], fields].concat());
                }
                state.foreign().push(&user, &id);
                state.foreign().announce(&user);
            }
        });
        Self { over, submitted, thread: Some(thread) }
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

async fn measure(options: &Options) -> anyhow::Result<()> {
    let redis = RedisServer::start();
    let config = RedisConfig { url: Url::new(redis.url_db(DB)), ..RedisConfig::default() };
    let store = Store::connect(&config).await?;
    let mut command = Command::new(std::env::current_exe()?);
    let _worker = Working(command.args(["--work-on", &redis.url_db(DB)]).stdin(Stdio::null()).spawn()?);
    // The first ones pay for connections and for a library not yet loaded.
    waits(&store, 20).await?;
    let (mut alone, mut beside, mut submitted, mut took) = (vec![], vec![], 0, Duration::ZERO);
    for _ in 0..options.repetitions {
        alone.extend(waits(&store, options.samples).await?);
        let start = Instant::now();
        let neighbour = Neighbour::start(redis.state(DB), options);
        beside.extend(waits(&store, options.samples).await?);
        submitted += neighbour.submitted.load(Ordering::Relaxed);
        took += start.elapsed();
    }
    println!("a task from its submission to its end, {} samples each", alone.len());
    percentiles("  alone", alone);
    percentiles("  beside a hostile neighbour", beside);
    println!("  who submitted {:.0} jobs/s under {} names", submitted as f64 / took.as_secs_f64(), options.users);
    Ok(())
}

async fn waits(store: &Store, samples: usize) -> anyhow::Result<Vec<Duration>> {
    let producer = Producer::new(store.clone(), Limits::default());
    let (app, op) = (App::new("bench")?, Op::new("rust")?);
    let mut events = Events::listen(store, &["canary"]).await?;
    let mut waits = Vec::new();
    for _ in 0..samples {
        let job = NewJob::task(User::new("canary")?, app.clone(), op.clone(), Payload::json("x")?);
        let (id, start) = (job.id.clone(), Instant::now());
        producer.enqueue(job).await?;
        loop {
            let event = tokio::time::timeout(Duration::from_secs(300), events.next()).await.context("no event came")?;
            match event {
                Some(event) if event.id == id.as_str() && event.status == "done" => break,
                Some(_) => {}
                None => bail!("the connection closed"),
            }
        }
        waits.push(start.elapsed());
    }
    Ok(waits)
}
