//! Flows end to end: how many of ten steps that do nothing one worker brings to their ends in a second, and how long one takes alone; and
//! how fast a step works through items in chunks, beside a bare loop that does the same.
//!
//! The worker is a process of its own: this program again, told to work. `benches/run-flows` builds everything and prints what
//! `benches/RESULTS.md` records.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use benches::{cpu_seconds, line, percentiles};
use clap::Parser;
use queue_core::Store;
use queue_core::config::{RedisConfig, Url};
use queue_core::flow::{FlowFilter, FlowStatus, Flows, LaunchOptions};
use queue_core::handle::JobHandle;
use queue_core::ids::User;
use queue_core::model::flow::{Flow, Step};
use rusqlite::{Connection, Statement, params};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use testkit::{Postgres, RedisServer, Scratch};
use worker::builder::Worker;
use worker::config::{ChunksConfig, Config};
use worker::execute::chunks::Chunks;
use worker::execute::chunks::files::csv;
use worker::execute::chunks::sqlite::sqlite;
use worker::execute::function::{Application, Context};
use worker::execute::task::Problem;
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
    /// Items of the step that works in chunks
    #[arg(long, default_value_t = 1_000_000)]
    items: i64,
    /// Items in a chunk
    #[arg(long, default_value_t = 5_000)]
    chunk: usize,
    /// Items of the same step where it is declared
    #[arg(long, default_value_t = 200_000)]
    declared: i64,
    /// Be the worker, on this Redis
    #[arg(long, hide = true)]
    work_on: Option<String>,
    /// With files in this folder
    #[arg(long, hide = true)]
    folder: Option<PathBuf>,
    /// With PostgreSQL on this port
    #[arg(long, hide = true)]
    postgres: Option<u16>,
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
    let size: NonZeroUsize = options.chunk.try_into()?;
    let bench = Application::new("bench")
        .and_then(|bench| bench.handler("step", |_, _params: Value, _| async { Ok(()) }))
        .and_then(|bench| {
            bench.blocking_handler("chunks", move |_, places, context| chunks(&places, size, Some(&context)))
        })
        .and_then(|bench| bench.blocking_handler("bare", move |_, places, _| chunks(&places, size, None)))
        .and_then(|bench| {
            bench.handler("tax", |_, order: TextOrder, _| async move {
                let cents: i64 = order.cents.parse()?;
                Ok((cents > 0).then(|| Order {
                    id: order.id.parse().unwrap_or(0),
                    customer: order.customer,
                    cents: cents * 6 / 5,
                }))
            })
        });
    let mut config = Config::default();
    config.worker.pools.clear();
    if let (Some(folder), Some(port)) = (&options.folder, options.postgres) {
        let sqlite = format!(r#"{{"kind": "sqlite", "path": "{}/declared.db", "create": true}}"#, folder.display());
        let postgres = format!(
            r#"{{"kind": "postgres", "host": "127.0.0.1", "port": {port}, "dbname": "bench", "user": "bench",
                "password_env": "BENCH_PASSWORD", "tls": "disable"}}"#
        );
        config.databases.insert("lite".into(), serde_json::from_str(&sqlite)?);
        config.databases.insert("pg".into(), serde_json::from_str(&postgres)?);
        config.chunks = ChunksConfig { serve: true, folder: Some(folder.clone()), ..ChunksConfig::default() };
    }
    let worker = Worker::builder().config(config).redis(url).slots(options.slots.try_into()?).app(bench);
    worker.run(Shutdown::on_signals()?).await.map_err(anyhow::Error::from_boxed)
}

/// Where the items lie, and where they go.
#[derive(Debug, Deserialize, Serialize)]
struct Places {
    csv: PathBuf,
    database: PathBuf,
}

#[derive(Debug, Serialize, Deserialize)]
struct Order {
    id: i64,
    customer: String,
    cents: i64,
}

/// As a declared reader hands it on.
#[derive(Debug, Deserialize)]
struct TextOrder {
    id: String,
    customer: String,
    cents: String,
}

const INSERT: &str = "INSERT INTO orders VALUES (?1, ?2, ?3)";

fn insert(statement: &mut Statement<'_>, order: &Order) -> rusqlite::Result<()> {
    statement.execute(params![order.id, order.customer, order.cents]).map(drop)
}

fn with_tax(order: &Order) -> Option<Order> {
    (order.cents > 0).then(|| Order { customer: order.customer.clone(), cents: order.cents * 6 / 5, ..*order })
}

/// CSV to SQLite, in chunks under a claim, or in a loop that only commits as often. Says how many seconds that took.
fn chunks(places: &Places, size: NonZeroUsize, context: Option<&Context>) -> Result<f64, Problem> {
    let wrong = |error: &dyn std::fmt::Display| Problem::fail(error.to_string());
    let database = Connection::open(&places.database).map_err(|error| wrong(&error))?;
    let table = "PRAGMA journal_mode = WAL; \
                 CREATE TABLE orders (id INTEGER PRIMARY KEY, customer TEXT, cents INTEGER)";
    database.execute_batch(table).map_err(|error| wrong(&error))?;
    let begun = Instant::now();
    if let Some(context) = context {
        let write = sqlite(&places.database, INSERT, insert);
        Chunks::of(size).run(context, csv(&places.csv), |order| Ok(with_tax(order)), write)?;
        return Ok(begun.elapsed().as_secs_f64());
    }
    let mut reader = ::csv::Reader::from_path(&places.csv).map_err(|error| wrong(&error))?;
    let mut orders = reader.deserialize::<Order>();
    loop {
        database.execute_batch("BEGIN IMMEDIATE").map_err(|error| wrong(&error))?;
        let mut statement = database.prepare_cached(INSERT).map_err(|error| wrong(&error))?;
        let mut count = 0;
        for order in orders.by_ref().take(size.get()) {
            count += 1;
            if let Some(order) = with_tax(&order.map_err(|error| wrong(&error))?) {
                insert(&mut statement, &order).map_err(|error| wrong(&error))?;
            }
        }
        drop(statement);
        database.execute_batch("COMMIT").map_err(|error| wrong(&error))?;
        if count < size.get() {
            return Ok(begun.elapsed().as_secs_f64());
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

fn start(url: &str, options: &Options) -> anyhow::Result<Working> {
    let (slots, chunk) = (options.slots.to_string(), options.chunk.to_string());
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--work-on", url, "--slots", &slots, "--chunk", &chunk]);
    command.env("DRAYMAN_CONFIG", "/dev/null").env("BENCH_PASSWORD", "bench");
    if let (Some(folder), Some(port)) = (&options.folder, options.postgres) {
        command.arg("--folder").arg(folder).args(["--postgres", &port.to_string()]);
    }
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
        let worker = start(&url, &options)?;
        let before = cpu_seconds(server)?;
        let begun = Instant::now();
        // What has not ended keeps no record that expires.
        while open(&redis, options.steps) > 0 {
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
    let worker = start(&url, &options)?;
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
    in_chunks(&flows, &worker, &options).await?;
    drop(worker);
    declared(&flows, &url, options).await
}

/// The items of the reader, as the definition declares them, written by each kind of writer and handed to a handler.
async fn declared(flows: &Flows, url: &str, options: Options) -> anyhow::Result<()> {
    let (folder, postgres) = (Scratch::new("bench-declared"), Postgres::start());
    postgres.create_database("bench").await;
    postgres.create_user("bench", "bench").await;
    write_orders(&folder.path().join("orders.csv"), options.declared)?;
    let port = Some(postgres.host_port().1);
    let options = Options { folder: Some(folder.path().to_owned()), postgres: port, ..options };
    let _worker = start(url, &options)?;
    println!("one declared step, {} items in chunks of {}, CSV → …", options.declared, options.chunk);
    let keep = r#"processor = { kind = "filter", keep = [{ field = "cents", min = 1 }] }"#;
    let hand = r#"processor = { kind = "handler", app = "bench", op = "tax" }"#;
    let sql = |database| {
        format!(
            r#"kind = "sql", database = "{database}", query = "INSERT INTO orders VALUES (:id, :customer, :cents)""#
        )
    };
    let lines = r#"kind = "json-lines", file = "orders.jsonl""#.to_owned();
    let steps = [
        ("  filter → JSON lines", keep, lines.clone()),
        ("  handler in Rust → JSON lines", hand, lines),
        ("  filter → SQLite", keep, sql("lite")),
        ("  filter → PostgreSQL", keep, sql("pg")),
    ];
    for (number, (what, processor, writer)) in steps.into_iter().enumerate() {
        let mut rates = Vec::new();
        for repetition in 0..options.repetitions {
            const TABLE: &str = "CREATE TABLE orders (id BIGINT PRIMARY KEY, customer TEXT, cents BIGINT)";
            postgres
                .query("bench", &format!("DROP TABLE IF EXISTS orders; {TABLE}; GRANT ALL ON orders TO bench"))
                .await;
            let lite = Connection::open(folder.path().join("declared.db"))?;
            lite.execute_batch(&format!("PRAGMA journal_mode = WAL; DROP TABLE IF EXISTS orders; {TABLE}"))?;
            let flow = Flow::from_toml(&format!(
                "name = \"declared\"\nany_params = true\n[[steps]]\nname = \"only\"\nkind = \"chunk\"\nchunk_size = {}\n\
                 reader = {{ kind = \"csv\", file = \"orders.csv\" }}\n{processor}\nwriter = {{ {writer} }}\n",
                options.chunk
            ))?;
            let id = format!("declared-{number}-{repetition}");
            let begun = Instant::now();
            launch(flows, &flow, 0, &id).await?;
            wait(flows, &id).await?;
            rates.push(options.declared as f64 / begun.elapsed().as_secs_f64());
        }
        line(what, "items/s", rates);
    }
    Ok(())
}

fn write_orders(path: &std::path::Path, count: i64) -> anyhow::Result<()> {
    let mut writer = ::csv::Writer::from_path(path)?;
    for id in 1..=count {
        writer.serialize(Order { id, customer: format!("customer {}", id % 1_000), cents: id % 10_000 })?;
    }
    Ok(writer.flush()?)
}

/// A flow of one step that works in chunks, in turn with the bare loop.
async fn in_chunks(flows: &Flows, worker: &Working, options: &Options) -> anyhow::Result<()> {
    let folder = Scratch::new("bench-chunks");
    let source = folder.path().join("orders.csv");
    write_orders(&source, options.items)?;
    let (mut rates, mut bare_rates) = (Vec::new(), Vec::new());
    for repetition in 0..options.repetitions {
        for (op, rates) in [("bare", &mut bare_rates), ("chunks", &mut rates)] {
            let database = folder.path().join(format!("{op}-{repetition}.db"));
            let places = serde_json::to_value(Places { csv: source.clone(), database })?;
            let step = Step::task("only", "bench", op).map(|step| step.input(places));
            let flow = Flow::builder(op).any_params().step(step).build()?;
            let id = format!("{op}-{repetition}");
            launch(flows, &flow, 0, &id).await?;
            wait(flows, &id).await?;
            let job = JobHandle::new(flows.store().clone(), format!("{id}:only").parse()?);
            let seconds: f64 = job.result().await?;
            rates.push(options.items as f64 / seconds);
        }
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", worker.0.id()))?;
    let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("").trim();
    println!("one step, {} items in chunks of {}, CSV → function → SQLite (WAL)", options.items, options.chunk);
    line("  a loop that does the same", "items/s", bare_rates);
    line("  in chunks, each with its checkpoint", "items/s", rates);
    println!("  most memory of the worker: {most}");
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
fn open(redis: &RedisServer, steps: usize) -> usize {
    let state = redis.state(DB);
    // Each flow that has ended stands among the ended jobs with its steps, and nothing else does.
    let ended = state.count_finished() as usize / (steps + 1);
    state.flows().len().saturating_sub(ended).max(state.running())
}
