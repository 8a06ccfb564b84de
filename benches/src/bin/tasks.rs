//! Tasks end to end: submission, throughput and pick-up of handlers that do nothing, beside a peer of the same run.
//!
//! The worker is a process of its own: this program again, told to work. `benches/run-tasks` builds everything and prints what
//! `benches/RESULTS.md` records.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use benches::{cpu_seconds, line, percentiles};
use clap::Parser;
use queue_core::Store;
use queue_core::config::{Limits, RedisConfig, Url};
use queue_core::events::Events;
use queue_core::ids::{App, Op, User};
use queue_core::limits::Whose;
use queue_core::model::task::Payload;
use queue_core::producer::{NewJob, Producer};
use testkit::{RedisServer, bin};
use worker::builder::Worker;
use worker::config::Config;
use worker::shutdown::Shutdown;

const DB: u8 = 5;

/// Measures tasks that do nothing.
#[derive(Debug, Clone, Parser)]
struct Options {
    /// Users who submit
    #[arg(long, default_value_t = 100)]
    users: usize,
    /// Tasks in a repetition
    #[arg(long, default_value_t = 60_000)]
    tasks: usize,
    /// Tasks that run at once
    #[arg(long, default_value_t = 64)]
    slots: usize,
    /// How often each measurement is repeated, in turn with the others
    #[arg(long, default_value_t = 3)]
    repetitions: usize,
    /// Samples of the pick-up latency
    #[arg(long, default_value_t = 1_000)]
    samples: usize,
    /// The folder in which the peer's packages are installed; without it the peer is left out
    #[arg(long)]
    peer: Option<PathBuf>,
    /// Processes of the Python handler
    #[arg(long, default_value_t = 4)]
    processes: usize,
    /// Be the worker, on this Redis
    #[arg(long, hide = true)]
    work_on: Option<String>,
    /// And write records to this file
    #[arg(long, hide = true)]
    export: Option<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    match options.work_on.clone() {
        Some(url) => runtime.block_on(work(&url, &options)),
        None => runtime.block_on(measure(options)),
    }
}

async fn work(url: &str, options: &Options) -> anyhow::Result<()> {
    let mut config = Config::default();
    config.worker.pools.clear();
    if let Some(path) = &options.export {
        let sqlite = format!(r#"{{"kind": "sqlite", "path": "{}", "create": true}}"#, path.display());
        config.databases.insert("history".into(), serde_json::from_str(&sqlite)?);
        config.export.database = Some("history".into());
    }
    let worker = Worker::builder().config(config).redis(url).slots(options.slots.try_into()?).handler(
        "bench",
        "rust",
        |_input: String, _| async { Ok(()) },
    );
    worker.run(Shutdown::on_signals()?).await.map_err(anyhow::Error::from_boxed)
}

/// What runs the tasks.
#[derive(Debug, Clone, Copy)]
enum Form {
    /// A closure in this program.
    Rust,
    /// The same, in a worker that writes a record of each to SQLite.
    Exported,
    /// A program in Python that the daemon holds.
    Python,
}

impl Form {
    fn op(self) -> &'static str {
        match self {
            Form::Rust | Form::Exported => "rust",
            Form::Python => "python",
        }
    }
}

/// The worker's process, killed when it is dropped.
struct Working(Child);

impl Drop for Working {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Bench {
    redis: RedisServer,
    store: Store,
    options: Options,
}

async fn measure(options: Options) -> anyhow::Result<()> {
    // As deploy/redis.conf has it.
    let redis = RedisServer::with_config(&[
        ("appendonly", "yes"),
        ("appendfsync", "everysec"),
        ("hash-max-listpack-value", "256"),
    ]);
    let config = RedisConfig { url: Url::new(redis.url_db(DB)), ..RedisConfig::default() };
    let bench = Bench { store: Store::connect(&config).await?, redis, options };
    let (mut exported, mut records) = (vec![], vec![]);
    let (mut submitted, mut alone, mut rates, mut cpu, mut python, mut bytes, mut peers) =
        (vec![], vec![], vec![], vec![], vec![], vec![], vec![]);
    for _ in 0..bench.options.repetitions {
        let (many, one, size) = bench.submissions().await?;
        submitted.push(many);
        alone.push(one);
        bytes.push(size);
        python.push(bench.throughput(Form::Python).await?.0);
        let (rate, worker, redis) = bench.throughput(Form::Rust).await?;
        rates.push(rate);
        cpu.push((worker, redis));
        let (rate, written) = bench.exported().await?;
        exported.push(rate);
        records.push(written);
        if let Some(folder) = &bench.options.peer {
            peers.push(bench.peer(folder)?);
        }
    }
    let Options { users, tasks, slots, .. } = bench.options;
    println!("no-op task of 100 bytes, {users} users, {tasks} tasks, {slots} at once, AOF everysec");
    line("  drayman, Rust handler", "tasks/s", rates);
    cpu.sort_by(|a, b| (a.0 + a.1).total_cmp(&(b.0 + b.1)));
    let (worker, redis) = cpu[cpu.len() / 2];
    println!("    CPU seconds per 10,000 tasks: worker {worker:.2}, redis {redis:.2}");
    line("  the same, with records exported to SQLite", "tasks/s", exported);
    line("    until the last record is written", "records/s", records);
    line("  drayman, Python handler", "tasks/s", python);
    if !peers.is_empty() {
        line("  bullmq, no-op", "tasks/s", peers);
    }
    line("submission, 100 a call", "tasks/s", submitted);
    line("submission, one at a time", "tasks/s", alone);
    line("memory of Redis", "bytes per queued task", bytes);
    println!("idle pick-up, from the submission's call to the event, {} samples", bench.options.samples);
    for form in [Form::Rust, Form::Python] {
        let (begun, ended) = bench.pick_up(form).await?;
        percentiles(&format!("  {}, until it runs", form.op()), begun);
        percentiles(&format!("  {}, until it is done", form.op()), ended);
    }
    Ok(())
}

impl Bench {
    fn worker(&self, form: Form) -> anyhow::Result<Working> {
        let slots = self.options.slots.to_string();
        if let Form::Python = form {
            let file = self.redis.dir().join("worker.toml");
            let program = concat!(env!("CARGO_MANIFEST_DIR"), "/handlers/noop.py");
            let size = self.options.processes;
            let handler = format!(
                "[worker]\npools = []\nslots = {slots}\n[log]\nlevel = 'error'\n[[handlers]]\napp = 'bench'\nop = 'python'\n\
                 kind = 'program'\ncommand = ['python3', '{program}']\nsize = {size}\n"
            );
            std::fs::write(&file, handler)?;
            let mut command = Command::new(bin("drayman-worker"));
            command.arg("--config").arg(file).args(["--redis-url", &self.redis.url_db(DB)]).stdin(Stdio::null());
            return Ok(Working(command.spawn()?));
        }
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--work-on", &self.redis.url_db(DB), "--slots", &slots]).stdin(Stdio::null());
        if let Form::Exported = form {
            command.arg("--export").arg(self.history());
        }
        Ok(Working(command.spawn()?))
    }

    fn history(&self) -> PathBuf {
        self.redis.dir().join("history.db")
    }

    /// Tasks per second while records are written, and those records per second, from the first end to the last that is written.
    async fn exported(&self) -> anyhow::Result<(f64, f64)> {
        let _ = std::fs::remove_file(self.history());
        self.redis.raw_db(DB, &["FLUSHALL"]);
        let worker = self.worker(Form::Exported)?;
        self.submit_paused(Form::Exported).await?;
        let start = Instant::now();
        let rate = self.run_all(start).await?;
        while self.redis.state(DB).to_export() > 0 {
            ensure!(start.elapsed() < Duration::from_secs(300), "the records are not written");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let written = self.options.tasks as f64 / start.elapsed().as_secs_f64();
        drop(worker);
        let history = rusqlite::Connection::open(self.history())?;
        let records: i64 = history.query_row("SELECT count(*) FROM drayman_jobs", [], |row| row.get(0))?;
        ensure!(records as usize == self.options.tasks, "{records} records");
        Ok((rate, written))
    }

    fn task(&self, form: Form, user: usize) -> anyhow::Result<NewJob> {
        let input = Payload::json(&"x".repeat(98))?;
        Ok(NewJob::task(User::new(format!("user-{user}"))?, App::new("bench")?, Op::new(form.op())?, input))
    }

    fn tasks(&self, form: Form, count: usize) -> anyhow::Result<Vec<NewJob>> {
        (0..count).map(|at| self.task(form, at % self.options.users)).collect()
    }

    fn producer(&self) -> Producer {
        let limits = Limits { max_queued_tasks: 10_000_000.try_into().expect("is not 0"), ..Limits::default() };
        Producer::new(self.store.clone(), limits)
    }

    /// Submissions per second, many a call and one at a time, and the bytes that a queued task occupies.
    async fn submissions(&self) -> anyhow::Result<(f64, f64, f64)> {
        self.redis.raw_db(DB, &["FLUSHALL"]);
        let producer = self.producer();
        let before: f64 = self.info("memory", "used_memory")?;
        let jobs = self.tasks(Form::Rust, self.options.tasks)?;
        let count = jobs.len() as f64;
        let start = Instant::now();
        for result in producer.enqueue_many(jobs).await {
            result?;
        }
        let many = count / start.elapsed().as_secs_f64();
        let used: f64 = self.info("memory", "used_memory")?;
        let start = Instant::now();
        for job in self.tasks(Form::Rust, 5_000)? {
            producer.enqueue(job).await?;
        }
        Ok((many, 5_000.0 / start.elapsed().as_secs_f64(), (used - before) / count))
    }

    /// Tasks per second, from the end of a pause to the last end; CPU seconds of the worker and Redis per 10,000. The worker is up
    /// before that, so that what a leader does when it begins is not measured along.
    async fn throughput(&self, form: Form) -> anyhow::Result<(f64, f64, f64)> {
        self.redis.raw_db(DB, &["FLUSHALL"]);
        let worker = self.worker(form)?;
        self.submit_paused(form).await?;
        let redis: u32 = self.info("server", "process_id")?;
        let before = (cpu_seconds(redis)?, cpu_seconds(worker.0.id())?);
        let rate = self.run_all(Instant::now()).await?;
        let per_10k = 10_000.0 / self.options.tasks as f64;
        let spent = (cpu_seconds(redis)? - before.0, cpu_seconds(worker.0.id())? - before.1);
        Ok((rate, spent.1 * per_10k, spent.0 * per_10k))
    }

    /// Waits until the worker leads, and submits all tasks in a pause.
    async fn submit_paused(&self, form: Form) -> anyhow::Result<()> {
        let leads = || self.redis.state(DB).leader().is_some();
        let begun = Instant::now();
        while !leads() || begun.elapsed() < Duration::from_secs(3) {
            ensure!(begun.elapsed() < Duration::from_secs(30), "the worker does not begin");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let limits = queue_core::limits::Limits::new(self.store.clone());
        limits.pause(&Whose::All, &"the bench".parse()?).await?;
        for result in self.producer().enqueue_many(self.tasks(form, self.options.tasks)?).await {
            result?;
        }
        Ok(())
    }

    /// Ends the pause, and says how many tasks ended in a second.
    async fn run_all(&self, start: Instant) -> anyhow::Result<f64> {
        let state = self.redis.state(DB);
        let done = || state.count_finished() as usize;
        queue_core::limits::Limits::new(self.store.clone()).resume(&Whose::All).await?;
        while done() < self.options.tasks {
            ensure!(start.elapsed() < Duration::from_secs(300), "{} of {} in 5 minutes", done(), self.options.tasks);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let rate = self.options.tasks as f64 / start.elapsed().as_secs_f64();
        // A queue that never acknowledges looks fast.
        ensure!(state.is_idle(), "tasks were left in flight");
        Ok(rate)
    }

    async fn pick_up(&self, form: Form) -> anyhow::Result<(Vec<Duration>, Vec<Duration>)> {
        self.redis.raw_db(DB, &["FLUSHALL"]);
        let producer = self.producer();
        let _worker = self.worker(form)?;
        let mut events = Events::listen(&self.store, &[]).await?;
        let (mut begun, mut ended) = (Vec::new(), Vec::new());
        for sample in 0..self.options.samples + 10 {
            let job = self.task(form, 0)?;
            let id = job.id.to_string();
            let start = Instant::now();
            producer.enqueue(job).await?;
            let mut running = None;
            loop {
                let event =
                    tokio::time::timeout(Duration::from_secs(30), events.next()).await.context("no event came")?;
                let Some(event) = event else { bail!("the connection closed") };
                match event.status.as_str() {
                    "running" if event.id == id => running = Some(start.elapsed()),
                    "done" if event.id == id => break,
                    _ => {}
                }
            }
            // The first ones pay for connections and for a library not yet loaded.
            if sample >= 10 {
                ended.push(start.elapsed());
                begun.extend(running);
            }
        }
        Ok((begun, ended))
    }

    fn info<T: std::str::FromStr>(&self, section: &str, field: &str) -> anyhow::Result<T> {
        let info = self.redis.raw_db(DB, &["INFO", section]).text();
        let value = info.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')?.trim().parse().ok());
        value.with_context(|| format!("INFO {section} has no {field}"))
    }

    /// The same number of tasks of the same size by BullMQ.
    fn peer(&self, folder: &PathBuf) -> anyhow::Result<f64> {
        self.redis.raw_db(DB, &["FLUSHALL"]);
        let output = Command::new("node")
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/peers/bullmq.cjs"))
            .env("NODE_PATH", folder)
            .env("REDIS_PORT", self.redis.addr().port().to_string())
            .env("REDIS_DB", DB.to_string())
            .env("JOBS", self.options.tasks.to_string())
            .env("CONCURRENCY", self.options.slots.to_string())
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.trim().parse().with_context(|| format!("the peer said: {text}{}", String::from_utf8_lossy(&output.stderr)))
    }
}
