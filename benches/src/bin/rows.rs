//! Batches of rows end to end: handing a million rows over, working on them, reading them, aborting them, and what that costs in
//! memory; and how long another user's single task waits behind them.
//!
//! Client and worker are processes of their own: this program again, told what to be. `benches/run-rows` builds everything and prints
//! what `benches/RESULTS.md` records.

use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use benches::{cpu_seconds, line, percentiles};
use clap::Parser;
use queue_core::Store;
use queue_core::batch::{BatchView, Batches, NewBatch, Which};
use queue_core::config::{Limits, RedisConfig, Url};
use queue_core::events::Events;
use queue_core::ids::{App, JobId, Op, User};
use queue_core::model::batch::Row;
use queue_core::model::task::Payload;
use queue_core::producer::{NewJob, Producer};
use testkit::{RedisServer, bin};
use worker::builder::Worker;
use worker::config::Config;
use worker::execute::function::Context as Of;
use worker::shutdown::Shutdown;

const DB: u8 = 5;

/// Measures rows that do nothing.
#[derive(Debug, Clone, Parser)]
struct Options {
    /// Rows of a batch
    #[arg(long, default_value_t = 1_000_000)]
    rows: u64,
    /// Rows of the batch for the handler in Python
    #[arg(long, default_value_t = 300_000)]
    python_rows: u64,
    /// Chunks that are worked on at once
    #[arg(long, default_value_t = 4)]
    slots: usize,
    /// How often each measurement is repeated, in turn with the others
    #[arg(long, default_value_t = 3)]
    repetitions: usize,
    /// Samples of the time that a single task waits behind the rows
    #[arg(long, default_value_t = 300)]
    samples: usize,
    /// Be another process, on this Redis: `work`, `submit`, `read` or `abort`
    #[arg(long, hide = true, num_args = 2)]
    be: Vec<String>,
    /// The operation
    #[arg(long, hide = true, default_value = "rust")]
    op: String,
    /// Where output files go
    #[arg(long, hide = true, default_value = "file:///nowhere")]
    objects: String,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async move {
        match options.be.clone().as_slice() {
            [] => measure(options).await,
            [what, url] => be(what, url, &options).await,
            _ => bail!("what to be, and where"),
        }
    })
}

async fn be(what: &str, url: &str, options: &Options) -> anyhow::Result<()> {
    if what == "work" {
        return work(url, options).await;
    }
    let config = RedisConfig { url: Url::new(url), ..RedisConfig::default() };
    let batches = Batches::new(Store::connect(&config).await?, Limits::default());
    let id = JobId::new("bench")?;
    let before = peak_rss(std::process::id())?;
    let start = Instant::now();
    let count = match what {
        "submit" => {
            let new = NewBatch::handler(User::new("bulk")?, App::new("bench")?, Op::new(options.op.as_str())?);
            let mut loader = batches.open(NewBatch { id, held: true, ..new })?;
            for line in 1..=options.rows {
                loader.push(Row { line, input: row(line) }).await?;
            }
            loader.finish().await?.rows
        }
        "read" => {
            let reader = batches.reader(&id).await?;
            let (mut count, mut after) = (0, None);
            loop {
                let page = reader.page(Which::All, after, 1_000).await?;
                count += page.rows.len() as u64;
                after = page.next;
                if after.is_none() {
                    break count;
                }
            }
        }
        "abort" => batches.abort(&id).await?.counts.aborted,
        other => bail!("no such thing: {other}"),
    };
    println!("{count} {} {}", start.elapsed().as_secs_f64(), peak_rss(std::process::id())?.max(before));
    Ok(())
}

/// A JSON text of 100 bytes.
fn row(line: u64) -> Vec<u8> {
    format!("\"{line:098}\"").into_bytes()
}

async fn work(url: &str, options: &Options) -> anyhow::Result<()> {
    let mut config = Config::default();
    config.worker.pools.clear();
    config.objects.url = Url::new(options.objects.as_str());
    let worker = Worker::builder()
        .config(config)
        .redis(url)
        .slots(options.slots.try_into()?)
        .handler("bench", "rust", |_: String, _| async { Ok(()) })
        .handler("bench", "files", |text: String, of: Of| async move {
            of.file("all", text);
            Ok(())
        })
        .handler("bench", "single", |_: String, _| async { Ok(()) });
    worker.run(Shutdown::on_signals()?).await.map_err(anyhow::Error::from_boxed)
}

/// The most memory that a process has had, in MiB.
fn peak_rss(pid: u32) -> anyhow::Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
    kib.map(|kib: f64| kib / 1024.0).context("no VmHWM")
}

/// The worker's process, killed when it is dropped.
struct Working(Child);

impl Drop for Working {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What another process has measured.
struct Told {
    count: u64,
    seconds: f64,
    mib: f64,
}

struct Bench {
    redis: RedisServer,
    store: Store,
    batches: Batches,
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
    let store = Store::connect(&config).await?;
    let bench = Bench { batches: Batches::new(store.clone(), Limits::default()), store, redis, options };
    let Options { rows, python_rows, slots, repetitions, samples, .. } = bench.options;
    let (mut submitted, mut client, mut bytes) = (vec![], vec![], vec![]);
    let (mut rates, mut cpu, mut resident, mut small) = (vec![], vec![], vec![], vec![]);
    let (mut read, mut reader, mut aborted, mut files, mut files_resident, mut python) =
        (vec![], vec![], vec![], vec![], vec![], vec![]);
    let mut waits = Vec::new();
    for _ in 0..repetitions {
        bench.redis.raw_db(DB, &["FLUSHALL"]);
        let empty: f64 = bench.info("memory", "used_memory")?;
        let told = bench.be("submit", "rust", rows)?;
        submitted.push(told.count as f64 / told.seconds);
        client.push(told.mib);
        bytes.push((bench.info::<f64>("memory", "used_memory")? - empty) / rows as f64);
        let ran = bench.run("rust", rows, 0).await?;
        rates.push(ran.rate);
        cpu.push(ran.cpu);
        resident.push(ran.mib);
        let told = bench.be("read", "rust", rows)?;
        ensure!(told.count == rows, "{} rows were read", told.count);
        read.push(told.count as f64 / told.seconds);
        reader.push(told.mib);

        bench.prepare("rust", 10_000)?;
        small.push(bench.run("rust", 10_000, 0).await?.mib);
        bench.prepare("rust", rows)?;
        waits.extend(bench.run("rust", rows, samples).await?.waits);
        bench.prepare("rust", rows)?;
        aborted.push(bench.be("abort", "rust", rows)?.seconds * 1e3);
        bench.prepare("files", rows)?;
        let ran = bench.run("files", rows, 0).await?;
        files.push(ran.rate);
        files_resident.push(ran.mib);
        bench.prepare("python", python_rows)?;
        python.push(bench.run("python", python_rows, 0).await?.rate);
    }
    println!("{rows} rows of 100 bytes, no-op handler, {slots} chunks at once, one worker, AOF everysec");
    line("handed over by one client", "rows/s", submitted);
    line("  most memory of the client", "MiB", client);
    line("memory of Redis", "bytes per pending row", bytes);
    line("worked on by a Rust handler", "rows/s", rates);
    cpu.sort_by(|a, b| (a.0 + a.1).total_cmp(&(b.0 + b.1)));
    let (worker, redis) = cpu[cpu.len() / 2];
    println!("    CPU seconds per 1,000,000 rows: worker {worker:.2}, redis {redis:.2}");
    line("  most memory of the worker", "MiB", resident);
    line("  the same with 10,000 rows", "MiB", small);
    line("each row writes a line of an output file", "rows/s", files);
    line("  most memory of the worker", "MiB", files_resident);
    line("read in pages of 1,000, in order", "rows/s", read);
    line("  most memory of the reader", "MiB", reader);
    line("aborted while all rows are pending", "ms", aborted);
    line("worked on by a Python program", "rows/s", python);
    percentiles("a single task of another user begins in", waits);
    Ok(())
}

/// What came of a run.
struct Ran {
    rate: f64,
    cpu: (f64, f64),
    mib: f64,
    waits: Vec<Duration>,
}

impl Bench {
    fn be(&self, what: &str, op: &str, rows: u64) -> anyhow::Result<Told> {
        let Output { status, stdout, .. } = Command::new(std::env::current_exe()?)
            .args(["--be", what, &self.redis.url_db(DB), "--op", op, "--rows", &rows.to_string()])
            .stderr(Stdio::inherit())
            .output()?;
        ensure!(status.success(), "{what}: {status}");
        let text = String::from_utf8(stdout)?;
        let numbers: Vec<f64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let [count, seconds, mib] = numbers[..] else { bail!("{what} said {text:?}") };
        Ok(Told { count: count as u64, seconds, mib })
    }

    fn prepare(&self, op: &str, rows: u64) -> anyhow::Result<()> {
        self.redis.raw_db(DB, &["FLUSHALL"]);
        self.be("submit", op, rows).map(drop)
    }

    fn worker(&self, op: &str) -> anyhow::Result<Working> {
        let slots = self.options.slots.to_string();
        let url = self.redis.url_db(DB);
        if op == "python" {
            let file = self.redis.dir().join("worker.toml");
            let program = concat!(env!("CARGO_MANIFEST_DIR"), "/handlers/rows.py");
            let handler = format!(
                "[worker]\npools = []\nslots = {slots}\n[log]\nlevel = 'error'\n[[handlers]]\napp = 'bench'\nop = 'python'\n\
                 kind = 'program'\ncommand = ['python3', '{program}']\nrows = 500\nsize = 2\n"
            );
            std::fs::write(&file, handler)?;
            let mut command = Command::new(bin("drayman-worker"));
            command.arg("--config").arg(file).args(["--redis-url", &url]).stdin(Stdio::null());
            return Ok(Working(command.spawn()?));
        }
        let objects = format!("file://{}/objects", self.redis.dir().display());
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--be", "work", &url, "--slots", &slots, "--objects", &objects]).stdin(Stdio::null());
        Ok(Working(command.spawn()?))
    }

    /// Releases the batch that is held, and waits for its end.
    async fn run(&self, op: &str, rows: u64, samples: usize) -> anyhow::Result<Ran> {
        let worker = self.worker(op)?;
        let begun = Instant::now();
        let leads = || self.redis.state(DB).leader().is_some();
        while !leads() || begun.elapsed() < Duration::from_secs(3) {
            ensure!(begun.elapsed() < Duration::from_secs(30), "the worker does not begin");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let redis: u32 = self.info("server", "process_id")?;
        let before = (cpu_seconds(worker.0.id())?, cpu_seconds(redis)?);
        let id = JobId::new("bench")?;
        let start = Instant::now();
        self.batches.release(&id).await?;
        let waits = self.single_tasks(&id, samples).await?;
        let view = self.over(&id).await?;
        let rate = rows as f64 / start.elapsed().as_secs_f64();
        ensure!(view.counts.done == rows, "{:?}", view.counts);
        let per_million = 1e6 / rows as f64;
        let cpu = (cpu_seconds(worker.0.id())? - before.0, cpu_seconds(redis)? - before.1);
        Ok(Ran { rate, cpu: (cpu.0 * per_million, cpu.1 * per_million), mib: peak_rss(worker.0.id())?, waits })
    }

    async fn over(&self, id: &JobId) -> anyhow::Result<BatchView> {
        let begun = Instant::now();
        loop {
            let view = self.batches.view(id).await?;
            if view.is_over() {
                return Ok(view);
            }
            ensure!(begun.elapsed() < Duration::from_secs(300), "not over: {view:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// How long single tasks of another user take until they run, while rows are left to deal.
    async fn single_tasks(&self, id: &JobId, samples: usize) -> anyhow::Result<Vec<Duration>> {
        let producer = Producer::new(self.store.clone(), Limits::default());
        let mut events = Events::listen(&self.store, &[]).await?;
        let mut waits = Vec::new();
        while waits.len() < samples && self.batches.view(id).await?.counts.pending > 0 {
            let input = Payload::json("x")?;
            let job = NewJob::task(User::new("single")?, App::new("bench")?, Op::new("single")?, input);
            let job_id = job.id.to_string();
            let start = Instant::now();
            producer.enqueue(job).await?;
            loop {
                let event =
                    tokio::time::timeout(Duration::from_secs(30), events.next()).await.context("no event came")?;
                let Some(event) = event else { bail!("the connection closed") };
                if event.id == job_id && event.status == "running" {
                    waits.push(start.elapsed());
                    break;
                }
            }
        }
        Ok(waits)
    }

    fn info<T: std::str::FromStr>(&self, section: &str, field: &str) -> anyhow::Result<T> {
        let info = self.redis.raw_db(DB, &["INFO", section]).text();
        let value = info.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')?.trim().parse().ok());
        value.with_context(|| format!("INFO {section} has no {field}"))
    }
}
