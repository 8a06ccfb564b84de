//! Tasks that work in chunks, in a worker of their own: what they count, pass over, write once and go on from.

mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use queue_core::Store;
use queue_core::config::{Limits, Url};
use queue_core::ids::{App, Op, User};
use queue_core::inspect::{Inspect, JobView};
use queue_core::model::task::Payload;
use queue_core::producer::{NewJob, Producer};
use queue_core::retry::Retrier;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use support::{DB, config, ended, job_id, store};
use testkit::state::Piece;
use testkit::{RedisServer, end_of, eventually};
use worker::builder::{Worker, WorkerBuilder};
use worker::execute::chunks::files::{csv, csv_to, json_lines, json_lines_to};
use worker::execute::chunks::sqlite::sqlite;
use worker::execute::chunks::{Chunks, Counts, call, items};
use worker::execute::function::{Application, BoxError, Context};
use worker::execute::task::Problem;
use worker::shutdown::Shutdown;

struct House {
    redis: RedisServer,
    store: Store,
    inspect: Inspect,
}

impl House {
    async fn build() -> Self {
        let redis = RedisServer::start();
        let store = store(&redis).await;
        Self { inspect: Inspect::new(store.clone()), redis, store }
    }

    fn worker(&self) -> WorkerBuilder {
        let mut config = config(&self.redis);
        config.objects.url = Url::new(format!("file://{}/objects", self.redis.dir().display()));
        config.worker.pools.clear();
        Worker::builder().config(config)
    }

    async fn submit(&self, id: &str) {
        let input = Payload::json(&()).unwrap();
        let job = NewJob::task(User::new("ann").unwrap(), App::new("etl").unwrap(), Op::new("load").unwrap(), input);
        let producer = Producer::new(self.store.clone(), Limits::default());
        producer.enqueue(NewJob { id: job_id(id), ..job }).await.expect("redis answers");
    }

    /// A new run of it, that goes on.
    async fn again(&self, id: &str) {
        Retrier::new(self.store.clone()).retry(&[job_id(id)]).await.expect("redis answers");
    }

    async fn ended(&self, id: &str) -> JobView {
        ended(&self.inspect, id).await
    }

    /// The job's own word of what it has done.
    fn checkpoint(&self, id: &str) -> Value {
        serde_json::from_slice(&self.redis.state(DB).field_of(Piece::Job(id), "checkpoint").unwrap()).unwrap()
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.redis.dir().join(name)
    }
}

struct Running {
    shutdown: Shutdown,
    handle: tokio::task::JoinHandle<Result<(), BoxError>>,
}

impl Running {
    /// A worker whose one handler works in chunks.
    fn start(house: &House, work: impl Fn(Context) -> Result<Counts, Problem> + Send + Sync + 'static) -> Self {
        let shutdown = Shutdown::new();
        let etl = Application::new("etl").unwrap();
        let etl = etl.blocking_handler("load", move |_, _: (), context: Context| work(context)).unwrap();
        // One at a time: who sleeps over a task takes no other.
        let worker = house.worker().slots(1.try_into().unwrap()).app(Ok(etl));
        Self { handle: tokio::spawn(worker.run(shutdown.clone())), shutdown }
    }

    async fn stop(self) {
        self.shutdown.drain().cancel();
        end_of("the worker stops", self.handle).await.expect("no panic").expect("no error");
    }
}

fn chunks(size: usize) -> Chunks {
    Chunks::of(size.try_into().unwrap())
}

fn counts(read: u64, write: u64, filter: u64, skip: u64, commit: u64, rollback: u64) -> Counts {
    Counts {
        read_count: read,
        write_count: write,
        filter_count: filter,
        skip_count: skip,
        commit_count: commit,
        rollback_count: rollback,
    }
}

#[track_caller]
fn counted(view: &JobView) -> Counts {
    assert_eq!(view.status(), "done", "{:?}", view.text("failed_reason"));
    serde_json::from_str(&view.text("result").unwrap()).unwrap()
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Order {
    id: i64,
    name: String,
}

fn orders(numbers: impl IntoIterator<Item = i64>) -> Vec<Order> {
    numbers.into_iter().map(|id| Order { id, name: format!("o, {id}\"") }).collect()
}

fn write_csv(path: &Path, orders: &[Order]) {
    let mut writer = ::csv::Writer::from_path(path).unwrap();
    orders.iter().for_each(|order| writer.serialize(order).unwrap());
    writer.flush().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_numbers_are_squared_filtered_and_written_ten_at_a_time() {
    let house = House::build().await;
    let written = Arc::new(std::sync::Mutex::new(Vec::<Vec<u64>>::new()));
    let shared = written.clone();
    let worker = Running::start(&house, move |context| {
        let square = |number: &u64| Ok(Some(number * number).filter(|square| square % 2 == 0));
        let write = |squares: &[u64]| {
            shared.lock().unwrap().push(squares.to_vec());
            Ok(())
        };
        chunks(10).run(&context, items(|| 1..=50_u64), square, call(write))
    });
    house.submit("t1").await;
    assert_eq!(counted(&house.ended("t1").await), counts(50, 25, 25, 0, 5, 0));
    worker.stop().await;
    let written = written.lock().unwrap();
    assert_eq!(written.len(), 5);
    assert_eq!(written.concat(), (1..=50).map(|n| n * n).filter(|n| n % 2 == 0).collect::<Vec<u64>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_failure_a_new_run_goes_on_behind_the_last_chunk_that_was_saved_and_files_and_databases_are_exact() {
    let house = House::build().await;
    let input = house.path("in.csv");
    write_csv(&input, &orders(1..=100));
    // The same with each reader and each writer, and where they were written and the worker ended before it saved that.
    let mended = Arc::new(AtomicBool::new(false));
    let kinds = ["csv", "json", "sqlite"];
    for (kind, is_unsaved) in kinds.map(|kind| (kind, false)).into_iter().chain(kinds.map(|kind| (kind, true))) {
        let id = format!("{kind}-{is_unsaved}");
        mended.store(false, Ordering::SeqCst);
        let out = house.path(&format!("out-{id}"));
        let middle = house.path("middle.jsonl");
        let read_again = Arc::new(AtomicU64::new(0));
        let (is_mended, again, to, from) = (mended.clone(), read_again.clone(), out.clone(), input.clone());
        let worker = Running::start(&house, move |context| {
            let process = |order: &Order| {
                again.fetch_add(1, Ordering::SeqCst);
                match order.id == 57 && !is_mended.load(Ordering::SeqCst) {
                    true => Err(Problem::fail("no such customer")),
                    false => Ok(Some(order.clone())),
                }
            };
            match kind {
                "csv" => chunks(10).run(&context, csv(&from), process, csv_to(&to)),
                "json" => {
                    let lines: Vec<String> =
                        orders(1..=100).iter().map(|order| serde_json::to_string(order).unwrap()).collect();
                    std::fs::write(&middle, lines.join("\n")).unwrap();
                    chunks(10).run(&context, json_lines(&middle), process, json_lines_to(&to))
                }
                _ => {
                    let db = rusqlite::Connection::open(&to).unwrap();
                    db.execute("CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY, name TEXT)", []).unwrap();
                    let write = sqlite(&to, "INSERT INTO orders VALUES (?1, ?2)", |statement, order: &Order| {
                        statement.execute((order.id, &order.name)).map(drop)
                    });
                    chunks(10).run(&context, csv(&from), process, write)
                }
            }
        });
        house.submit(&id).await;
        let view = house.ended(&id).await;
        assert_eq!(view.status(), "failed");
        assert_eq!(view.text("failed_reason").as_deref(), Some("item 57: no such customer"), "{kind}");
        let mut saved = house.checkpoint(&id);
        assert_eq!((&saved["read_count"], &saved["rollback_count"]), (&json!(50), &json!(1)), "{kind}: {saved}");
        if is_unsaved {
            // As it was before the first chunk.
            for count in ["read_count", "write_count", "commit_count"] {
                saved[count] = json!(0);
            }
            (saved["reader"], saved["writer"]) = (Value::Null, Value::Null);
            house.redis.state(DB).set_field(&id, "checkpoint", saved.to_string());
        }
        assert_eq!(read_again.swap(0, Ordering::SeqCst), 57);
        mended.store(true, Ordering::SeqCst);
        house.again(&id).await;
        assert_eq!(counted(&house.ended(&id).await), counts(100, 100, 0, 0, 10, 1), "{id}");
        // The database knows better than Redis.
        let again = if is_unsaved && kind != "sqlite" { 100 } else { 50 };
        assert_eq!(
            read_again.load(Ordering::SeqCst),
            again,
            "{id}: what is known to be committed is not worked on again"
        );
        let found: Vec<Order> = match kind {
            "csv" => ::csv::Reader::from_path(&out).unwrap().deserialize().map(Result::unwrap).collect(),
            "json" => {
                let text = std::fs::read_to_string(&out).unwrap();
                text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
            }
            _ => {
                let db = rusqlite::Connection::open(&out).unwrap();
                let mut rows = db.prepare("SELECT id, name FROM orders ORDER BY id").unwrap();
                let order = |row: &rusqlite::Row<'_>| Ok(Order { id: row.get(0)?, name: row.get(1)? });
                rows.query_map([], order).unwrap().map(Result::unwrap).collect()
            }
        };
        assert_eq!(found, orders(1..=100), "{kind}");
        worker.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_processed_or_written_is_passed_over_up_to_a_limit_and_kept_with_its_error() {
    let house = House::build().await;
    let lines: Vec<String> = (1..=40)
        .map(|id| match id {
            7 => "{nonsense".to_owned(),
            _ => serde_json::to_string(&Order { id, name: "x".into() }).unwrap(),
        })
        .collect();
    std::fs::write(house.path("in.jsonl"), lines.join("\n")).unwrap();
    let (from, to) = (house.path("in.jsonl"), house.path("out.db"));
    let db = rusqlite::Connection::open(&to).unwrap();
    db.execute(
        "CREATE TABLE orders (id INTEGER PRIMARY KEY CHECK (id <> 18 AND id <> 20 AND id <> 40), tries INTEGER)",
        [],
    )
    .unwrap();
    let limit = Arc::new(AtomicU64::new(4));
    let limits = limit.clone();
    let worker = Running::start(&house, move |context| {
        let tries = std::cell::RefCell::new(BTreeMap::<i64, i64>::new());
        let process = |order: &Order| {
            let mut tries = tries.borrow_mut();
            let tried = tries.entry(order.id).or_default();
            *tried += 1;
            match order.id {
                // The third attempt goes well; another one never does.
                12 if *tried < 3 => Err(Problem::retry("busy")),
                25 => Err(Problem::retry("always busy")),
                30 => Err(Problem::ignore("a comment")),
                _ => Ok(Some((order.id, *tried))),
            }
        };
        let write = sqlite(&to, "INSERT INTO orders VALUES (?1, ?2)", |statement, (id, tries): &(i64, i64)| {
            statement.execute((*id, *tries)).map(drop)
        });
        chunks(10).skip_limit(limits.load(Ordering::SeqCst)).item_attempts(3, Duration::ZERO).run(
            &context,
            json_lines(&from),
            process,
            write,
        )
    });
    house.submit("t1").await;
    let view = house.ended("t1").await;
    assert_eq!(view.status(), "failed");
    let reason = view.text("failed_reason").unwrap();
    assert!(reason.starts_with("item 40 is one too many to be passed over, 4 may be: sqlite: "), "{reason}");
    limit.store(5, Ordering::SeqCst);
    house.again("t1").await;
    let all = counted(&house.ended("t1").await);
    let (written, filtered, skipped) = (all.write_count, all.filter_count, all.skip_count);
    assert_eq!((all.read_count, written, filtered, skipped), (40, 34, 1, 5));
    assert!(all.rollback_count >= 2, "{all:?}");
    let skipped = house.checkpoint("t1")["skipped"].clone();
    let at: Vec<u64> = skipped.as_array().unwrap().iter().map(|one| one["item"].as_u64().unwrap()).collect();
    assert_eq!(at, [7, 18, 20, 25, 40], "{skipped}");
    assert!(
        skipped[0]["error"].as_str().unwrap().starts_with("line 7: it is no JSON: key must be a string"),
        "{skipped}"
    );
    let ids: Vec<i64> = db
        .prepare("SELECT id FROM orders ORDER BY id")
        .unwrap()
        .query_map([], |row| row.get(0))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    let wanted: Vec<i64> = (1..=40).filter(|id| ![7, 18, 20, 25, 30, 40].contains(id)).collect();
    assert_eq!(ids, wanted, "each once");
    let tries: i64 = db.query_row("SELECT tries FROM orders WHERE id = 12", [], |row| row.get(0)).unwrap();
    assert_eq!(tries, 3);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_stops_behind_the_chunk_and_another_worker_goes_on() {
    let house = House::build().await;
    let begun = Arc::new(AtomicU64::new(0));
    let to = house.path("out.jsonl");
    let work = |slow: bool| {
        let (begun, to) = (begun.clone(), to.clone());
        move |context: Context| {
            let process = |number: &u64| {
                begun.fetch_max(*number, Ordering::SeqCst);
                if slow && *number >= 30 {
                    // A chunk that lasts until somebody wants it to end.
                    while !context.stop().is_cancelled() {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
                Ok(Some(*number))
            };
            chunks(10).run(&context, items(|| 1..=100_u64), process, json_lines_to(&to))
        }
    };
    let first = Running::start(&house, work(true));
    house.submit("t1").await;
    eventually("the fourth chunk", async || (begun.load(Ordering::SeqCst) >= 30).then_some(())).await;
    first.stop().await;
    let status = house.inspect.job("t1").await.unwrap().unwrap().status();
    assert_eq!((status.as_str(), &house.checkpoint("t1")["read_count"]), ("pending", &json!(30)));
    let second = Running::start(&house, work(false));
    assert_eq!(counted(&house.ended("t1").await), counts(100, 100, 0, 0, 10, 0));
    let text = std::fs::read_to_string(house.path("out.jsonl")).unwrap();
    assert_eq!(text, (1..=100).map(|n| format!("{n}\n")).collect::<String>());
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_that_was_given_up_writes_nothing_more_into_the_database() {
    let house = House::build().await;
    let to = house.path("out.db");
    let db = rusqlite::Connection::open(&to).unwrap();
    db.execute("CREATE TABLE numbers (n INTEGER)", []).unwrap();
    let gate = Arc::new(AtomicBool::new(false));
    let reached = Arc::new(AtomicBool::new(false));
    let work = |waits: bool| {
        let (gate, reached, to) = (gate.clone(), reached.clone(), to.clone());
        move |context: Context| {
            let process = |number: &i64| {
                if waits && *number == 25 {
                    reached.store(true, Ordering::SeqCst);
                    // Like a machine that sleeps: it hears of no stop.
                    while !gate.load(Ordering::SeqCst) {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
                Ok(Some(*number))
            };
            let write = sqlite(&to, "INSERT INTO numbers VALUES (?1)", |statement, number: &i64| {
                statement.execute([number]).map(drop)
            });
            chunks(10).run(&context, items(|| 1..=50_i64), process, write)
        }
    };
    let sleeping = Running::start(&house, work(true));
    house.submit("t1").await;
    eventually("the sleeper to sleep", async || reached.load(Ordering::SeqCst).then_some(())).await;
    // Its job is another's: as after the end of its session.
    let state = house.redis.state(DB);
    state.lose_claim_and_holder("t1");
    state.set_field("t1", "status", "pending");
    state.foreign().push("ann", "t1");
    state.foreign().announce("ann");
    let awake = Running::start(&house, work(false));
    assert_eq!(counted(&house.ended("t1").await).write_count, 50);
    gate.store(true, Ordering::SeqCst);
    sleeping.stop().await;
    awake.stop().await;
    let numbers = |sql: &str| db.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
    assert_eq!((numbers("SELECT count(*) FROM numbers"), numbers("SELECT count(DISTINCT n) FROM numbers")), (50, 50));
}
