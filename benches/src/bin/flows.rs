//! Flows end to end: how many of ten steps that do nothing one worker brings to their ends in a second, and how long one takes alone.
//!
//! The worker is a process of its own: this program again, told to work. `benches/run-flows` builds everything and prints what
//! `benches/RESULTS.md` records.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use benches::{cpu_seconds, line, percentiles};
use clap::Parser;
use queue_core::Store;
use queue_core::config::{RedisConfig, Url};
use queue_core::flow::{FlowFilter, FlowStatus, Flows, LaunchOptions};
use queue_core::ids::User;
use queue_core::model::flow::{Flow, Step};
use serde_json::{Map, Value};
use testkit::RedisServer;
use worker::builder::Worker;
use worker::shutdown::Shutdown;

const DB: u8 = 5;
/// The longest that anything measured may take.
const LIMIT: Duration = Duration::from_secs(300);

/// Measures flows whose steps do nothing.
#[derive(Debug, Clone, Parser)]
struct Options {
    /// Flows in a repetition
    #[arg(long, default_value_t = 2_000)]
    flows: usize,
    /// Steps of a flow, each after the one before
    #[arg(long, default_value_t = 10)]
    steps: usize,
    /// Steps that run at once
    #[arg(long, default_value_t = 64)]
    slots: usize,
    /// How often each measurement is repeated
    #[arg(long, default_value_t = 3)]
    repetitions: usize,
    /// Samples of a flow that runs alone
    #[arg(long, default_value_t = 300)]
    samples: usize,
    /// Be the worker, on this Redis
    #[arg(long, hide = true)]
    work_on: Option<String>,
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
    let worker = Worker::builder().redis(url).slots(options.slots.try_into()?).handler(
        "bench",
        "step",
        |_params: Value, _| async { Ok(()) },
    );
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

fn start(url: &str, slots: usize) -> anyhow::Result<Working> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--work-on", url, "--slots", &slots.to_string()]).env("DRAYMAN_CONFIG", "/dev/null");
    Ok(Working(command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().context("the worker")?))
}

async fn measure(options: Options) -> anyhow::Result<()> {
    // As deploy/redis.conf has it.
    let redis = RedisServer::with_config(&[
        ("appendonly", "yes"),
        ("appendfsync", "everysec"),
        ("hash-max-listpack-value", "256"),
    ]);
    let url = redis.url_db(DB);
    let store = Store::connect(&RedisConfig { url: Url::new(&url), ..RedisConfig::default() }).await?;
    let flows = Flows::new(store.clone());
    let server = store.command("INFO", &[b"server"]).await?.lossy().unwrap_or_default();
    let server: u32 = server
        .lines()
        .find_map(|line| line.strip_prefix("process_id:"))
        .and_then(|pid| pid.trim().parse().ok())
        .context("redis tells its process id")?;
    let steps = (0..options.steps).fold(Flow::builder("bench").any_params(), |builder, number| {
        builder.step(Step::task(&format!("s{number}"), "bench", "step"))
    });
    let flow = steps.build()?;
    let mut launched_rates = Vec::new();
    let mut rates = Vec::new();
    let mut cpu = Vec::new();
    for repetition in 0..options.repetitions {
        let begun = Instant::now();
        for number in 0..options.flows {
            launch(&flows, &flow, number % 100, &format!("r{repetition}-{number}")).await?;
        }
        launched_rates.push(options.flows as f64 / begun.elapsed().as_secs_f64());
        let worker = start(&url, options.slots)?;
        let before = cpu_seconds(server)?;
        let begun = Instant::now();
        // What has not ended keeps no record that expires.
        while open(&store, options.steps).await? > 0 {
            ensure!(begun.elapsed() < LIMIT, "the flows do not end");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        rates.push(options.flows as f64 / begun.elapsed().as_secs_f64());
        cpu.push((cpu_seconds(worker.0.id())?, cpu_seconds(server)? - before));
        let filter = FlowFilter { status: Some(FlowStatus::Done), ..FlowFilter::default() };
        let done = flows.list(&filter, 10_000).await?.len();
        ensure!(done >= options.flows.min(10_000), "{done} flows are done");
        redis.client(DB).call(&["FLUSHDB"]);
    }
    let Options { flows: count, steps, slots, .. } = options;
    println!("flows of {steps} steps that do nothing, 100 users, {count} flows, {slots} steps at once, AOF everysec");
    line("  launched, one at a time", "flows/s", launched_rates);
    line("  brought to their ends by one worker", "flows/s", rates);
    cpu.sort_by(|a, b| (a.0 + a.1).total_cmp(&(b.0 + b.1)));
    let (worker, server_cpu) = cpu[cpu.len() / 2];
    println!("    CPU seconds for all of them: worker {worker:.2}, redis {server_cpu:.2}");

    let store = Store::connect(&RedisConfig { url: Url::new(&url), ..RedisConfig::default() }).await?;
    let flows = Flows::new(store);
    let _worker = start(&url, options.slots)?;
    launch(&flows, &flow, 0, "first").await?;
    wait(&flows, "first").await?;
    let mut samples = Vec::new();
    for number in 0..options.samples {
        let id = format!("alone-{number}");
        let begun = Instant::now();
        launch(&flows, &flow, 0, &id).await?;
        wait(&flows, &id).await?;
        samples.push(begun.elapsed());
    }
    percentiles("  one alone, from the launch to its end", samples);
    Ok(())
}

async fn launch(flows: &Flows, flow: &Flow, user: usize, id: &str) -> anyhow::Result<()> {
    let params: Map<String, Value> = [("run".to_owned(), id.into())].into_iter().collect();
    let options = LaunchOptions { id: Some(id.parse()?), ..LaunchOptions::default() };
    flows.launch(flow, &User::new(format!("u{user}"))?, &params, options).await?;
    Ok(())
}

async fn wait(flows: &Flows, id: &str) -> anyhow::Result<()> {
    let view = flows.wait(&id.parse()?, Some(LIMIT)).await?;
    ensure!(view.status == FlowStatus::Done, "{view:?}");
    Ok(())
}

/// How many flows have not ended.
async fn open(store: &Store, steps: usize) -> anyhow::Result<i64> {
    let keys = store.keys();
    let launched = store.command("ZCARD", &[keys.flows().as_bytes()]).await?.int("ZCARD")?;
    // Each flow that has ended stands there with its steps, and nothing else does.
    let ended = store.command("ZCARD", &[keys.finished().as_bytes()]).await?.int("ZCARD")?;
    let claims = store.command("HLEN", &[keys.claims().as_bytes()]).await?.int("HLEN")?;
    Ok((launched - ended / (steps as i64 + 1)).max(claims))
}
