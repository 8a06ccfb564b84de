//! Handlers in Rust, from the submission to the end of the job: what each thing that a handler may do comes to.

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use queue_core::Store;
use queue_core::cancel::Canceller;
use queue_core::config::{ByteSize, Limits, Url};
use queue_core::handle::JobHandle;
use queue_core::ids::{App, Op, PoolPattern, User};
use queue_core::inspect::{Inspect, JobView};
use queue_core::model::retry::{Backoff, RetryChoice};
use queue_core::model::task::{Message, Payload};
use queue_core::objects::Objects;
use queue_core::producer::{NewJob, Producer, Work};
use serde::{Deserialize, Serialize};
use support::handlers::{Notes, task};
use support::{DB, PATIENCE, config, ended, job_id, running, store};
use testkit::{RedisServer, end_of, eventually};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use worker::builder::{Worker, WorkerBuilder};
use worker::config::Config;
use worker::execute::function::{Application, BoxError, Context, Resource};
use worker::execute::handlers::{Handlers, Registration};
use worker::execute::task::{Desk, Handler, Outcome, Output, Problem, Task};
use worker::shutdown::Shutdown;

struct House {
    redis: RedisServer,
    store: Store,
    inspect: Inspect,
    producer: Producer,
}

impl House {
    async fn build() -> Self {
        let redis = RedisServer::start();
        let store = store(&redis).await;
        let (inspect, producer) = (Inspect::new(store.clone()), Producer::new(store.clone(), Limits::default()));
        Self { redis, store, inspect, producer }
    }

    /// A worker of handlers, with everything that takes time made short.
    fn worker(&self) -> WorkerBuilder {
        self.worker_with(|_| ())
    }

    fn worker_with(&self, change: impl FnOnce(&mut Config)) -> WorkerBuilder {
        let mut config = config(&self.redis);
        config.objects.url = Url::new(format!("file://{}/objects", self.redis.dir().display()));
        config.worker.pools.clear();
        config.tasks.threads = Some(4.try_into().unwrap());
        change(&mut config);
        Worker::builder().config(config)
    }

    async fn submit(&self, id: &str, op: &str, input: impl Serialize) {
        self.enqueue(id, self.task(op, input)).await;
    }

    fn task(&self, op: &str, input: impl Serialize) -> NewJob {
        let input = Payload::json(&input).unwrap();
        NewJob::task(User::new("ann").unwrap(), App::new("shop").unwrap(), Op::new(op).unwrap(), input)
    }

    async fn enqueue(&self, id: &str, job: NewJob) {
        self.producer.enqueue(NewJob { id: job_id(id), ..job }).await.expect("redis answers");
    }

    async fn ended(&self, id: &str) -> JobView {
        ended(&self.inspect, id).await
    }

    /// Status, reason and result of a job that has ended.
    async fn end_of(&self, id: &str) -> (String, Option<String>, Option<String>) {
        let view = self.ended(id).await;
        (view.status(), view.text("failed_reason"), view.text("result"))
    }

    fn nothing_runs(&self) {
        assert!(self.redis.state(DB).is_idle());
    }
}

struct Running {
    shutdown: Shutdown,
    handle: tokio::task::JoinHandle<Result<(), BoxError>>,
}

impl Running {
    fn start(worker: WorkerBuilder) -> Self {
        let shutdown = Shutdown::new();
        Self { handle: tokio::spawn(worker.run(shutdown.clone())), shutdown }
    }

    async fn stop(self) {
        self.shutdown.drain().cancel();
        end_of("the worker stops", self.handle).await.expect("no panic").expect("no error");
    }
}

fn some(text: &str) -> Option<String> {
    Some(text.to_owned())
}

/// Three attempts without a pause worth naming.
fn three() -> RetryChoice {
    RetryChoice {
        max_attempts: std::num::NonZeroU32::new(3),
        backoff: Some(Backoff::Fixed),
        delay: Some(Duration::from_millis(1)),
        ..RetryChoice::default()
    }
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Order {
    number: u32,
    lines: Vec<String>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Invoice {
    total: usize,
}

#[tokio::test(flavor = "multi_thread")]
async fn typed_values_go_in_and_out_in_json_and_messagepack_and_the_op_s_case_does_not_matter() {
    let house = House::build().await;
    let worker = house.worker().handler("shop", "Render", |order: Order, context: Context| async move {
        let note: Option<String> = context.context()?;
        context.progress(1, Some(2), note.as_deref());
        context.log("half way");
        context.message(Message { msgid: 7, errcode: "half".into(), ..Message::default() });
        Ok(Invoice { total: order.lines.len() + order.number as usize })
    });
    let running = Running::start(worker);
    let order = Order { number: 40, lines: vec!["a".into(), "b".into()] };
    house.submit("json", "RENDER", &order).await;
    let mut packed = house.task("render", ());
    let Work::Task(work) = &mut packed.work else { unreachable!("it is a task") };
    work.input = Payload::msgpack(&order).unwrap();
    work.context = Some(Payload::msgpack("a note").unwrap());
    house.enqueue("packed", packed).await;
    house.submit("wrong", "render", "no order").await;

    assert_eq!(house.end_of("json").await, ("done".into(), None, some(r#"{"total":42}"#)));
    let view = house.ended("packed").await;
    let result = Payload {
        encoding: view.text("result_encoding").unwrap().parse().unwrap(),
        bytes: view.bytes("result").unwrap().to_vec(),
    };
    assert_eq!(result.read::<Invoice>(), Ok(Invoice { total: 42 }));
    assert_eq!(view.text("progress"), some(r#"{"done":1,"total":2,"note":"a note"}"#));
    assert!(view.text("log").unwrap().ends_with("Z half way\n"));
    assert_eq!(view.text("messages"), some(r#"[{"msgid":7,"errcode":"half"}]"#));
    let (status, reason, _) = house.end_of("wrong").await;
    assert!(status == "failed" && reason.as_ref().unwrap().starts_with("its input is no tasks::Order: "), "{reason:?}");
    house.nothing_runs();
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_results_and_files_lie_in_the_object_store_and_what_is_too_large_fails_its_task() {
    let house = House::build().await;
    let mut config = config(&house.redis);
    config.worker.pools.clear();
    config.objects.url = Url::new(format!("file://{}/objects", house.redis.dir().display()));
    config.objects.max_object_bytes = ByteSize(300_000);
    let objects = Objects::open(&config.objects).unwrap();
    let worker = Worker::builder().config(config).handler("shop", "big", |size: usize, context: Context| async move {
        context.file("../up", "a file");
        context.file("other", vec![7; size]);
        Ok("x".repeat(size))
    });
    let running = Running::start(worker);
    house.submit("fits", "big", 200_000).await;
    house.submit("does-not", "big", 300_001).await;
    let view = house.ended("fits").await;
    assert_eq!((view.status().as_str(), view.text("result")), ("done", None));
    let handle = JobHandle::new(house.store.clone(), job_id("fits")).with_objects(objects.clone());
    assert_eq!(handle.result::<String>().await.unwrap(), "x".repeat(200_000));
    let files = handle.files().await.unwrap();
    assert_eq!(files.keys().collect::<Vec<_>>(), ["../up", "other"]);
    assert_eq!(objects.get(&job_id("fits"), &files["../up"].object).await.unwrap(), b"a file".to_vec());
    let (status, reason, _) = house.end_of("does-not").await;
    assert!(status == "failed" && reason.as_ref().unwrap().contains("at most 300000 are allowed"), "{reason:?}");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_say_whether_to_try_again_to_fail_or_to_ignore_and_panics_are_ordinary() {
    let house = House::build().await;
    let tries = Arc::new(AtomicUsize::new(0));
    let counting = tries.clone();
    let worker = house
        .worker()
        .handler("shop", "third", move |(): (), context: Context| {
            let tries = counting.clone();
            async move {
                tries.fetch_add(1, Ordering::SeqCst);
                if context.attempt() < 3 {
                    context.message(Message { msgid: 7, errcode: "not yet".into(), ..Message::default() });
                    Err(std::io::Error::other("not yet"))?;
                }
                Ok(context.is_last_attempt())
            }
        })
        .handler("shop", "again", |(): (), _| async { Err::<(), _>(Problem::retry("never")) })
        .handler("shop", "fail", |(): (), _| async { Err::<(), _>(Problem::fail("no use")) })
        .handler("shop", "ignore", |(): (), _| async { Err::<(), _>(Problem::ignore("nobody cares")) })
        .handler("shop", "panic", |(): (), _| async {
            assert!(std::env::args().count() == 0, "something");
            Ok(())
        })
        .handler("shop", "later", |(): (), _| async {
            Err::<(), _>(Problem::retry("busy").after(Duration::from_secs(3600)))
        });
    let running = Running::start(worker);
    for op in ["third", "again", "fail", "ignore", "panic", "later"] {
        house.enqueue(op, NewJob { retry: three(), ..house.task(op, ()) }).await;
        house.submit(&format!("{op}-once"), op, ()).await;
    }
    assert_eq!(house.end_of("third").await, ("done".into(), None, some("true")));
    assert_eq!(tries.load(Ordering::SeqCst), 3 + 1);
    let third = house.ended("third").await;
    assert_eq!(third.messages(), [], "what failed attempts said is theirs");
    let history = third.history();
    assert_eq!(history.iter().map(|one| one.error.as_str()).collect::<Vec<_>>(), ["not yet", "not yet"]);
    let expected = [
        ("third-once", "failed", "not yet"),
        ("again", "ignored", "never"),
        ("again-once", "failed", "never"),
        ("fail", "failed", "no use"),
        ("fail-once", "failed", "no use"),
        ("ignore", "ignored", "nobody cares"),
        ("ignore-once", "ignored", "nobody cares"),
        ("panic", "ignored", "the handler panicked: something"),
        ("panic-once", "failed", "the handler panicked: something"),
        ("later-once", "failed", "busy"),
    ];
    for (id, status, reason) in expected {
        assert_eq!(house.end_of(id).await, (status.into(), some(reason), None), "{id}");
    }
    assert_eq!(house.ended("third-once").await.messages().len(), 1);
    assert_eq!(house.ended("again").await.history().len(), 3);
    eventually("the one that is for later", async || {
        let view = house.inspect.job("later").await.unwrap().unwrap();
        (view.status() == "scheduled").then_some(())
    })
    .await;
    house.nothing_runs();
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_hangs_is_ended_by_its_timeout_its_deadline_or_a_cancel_and_its_place_is_free_again() {
    let house = House::build().await;
    let polite = Arc::new(AtomicBool::new(false));
    let told = polite.clone();
    let application = Application::new("shop").unwrap();
    let application = application
        .handler("deaf", |_, (): (), _| std::future::pending::<Result<(), Problem>>())
        .and_then(|it| {
            it.handler("polite", move |_, (): (), context: Context| {
                let told = told.clone();
                async move {
                    context.stop().cancelled().await;
                    told.store(true, Ordering::SeqCst);
                    Err::<(), _>(Problem::retry("told to stop"))
                }
            })
        })
        .and_then(|it| it.handler("short", |_, (): (), _| std::future::pending::<Result<(), Problem>>()))
        .map(|it| it.timeout(Duration::from_millis(100)));
    let running_worker = Running::start(house.worker().slots(6.try_into().unwrap()).app(application));
    let timeout = Some(Duration::from_millis(200));
    house.enqueue("timeout", NewJob { timeout, ..house.task("polite", ()) }).await;
    house.enqueue("thrice", NewJob { timeout, retry: three(), ..house.task("polite", ()) }).await;
    house.submit("short", "short", ()).await;
    let past = Some(std::time::SystemTime::UNIX_EPOCH);
    house.enqueue("past", NewJob { deadline: past, ..house.task("polite", ()) }).await;
    house.submit("cancel", "deaf", ()).await;
    running(&house.inspect, "cancel").await;
    let canceller = Canceller::new(house.store.clone(), PATIENCE);
    canceller.cancel(&job_id("cancel")).await.unwrap();

    assert_eq!(house.end_of("timeout").await, ("failed".into(), some("it ran longer than 200ms"), None));
    assert_eq!(house.end_of("thrice").await, ("ignored".into(), some("it ran longer than 200ms"), None));
    let too_late = some("its deadline passed before it was begun");
    assert_eq!(house.end_of("past").await.1, too_late);
    // However long this machine takes to begin a task, there is a deadline that lies behind that.
    let mut left = Duration::from_millis(250);
    let end = eventually("a task is begun before its deadline", async || {
        left *= 2;
        assert!(left < PATIENCE, "it is never begun in time");
        let (id, deadline) = (format!("deadline-{left:?}"), Some(std::time::SystemTime::now() + left));
        house.enqueue(&id, NewJob { deadline, retry: three(), ..house.task("polite", ()) }).await;
        let end = house.end_of(&id).await;
        if end.1 == too_late { Err(left) } else { Ok(end) }
    });
    assert_eq!(end.await, ("failed".into(), some("its deadline passed while it ran"), None));
    assert_eq!(house.end_of("short").await.1, some("it ran longer than 100ms"));
    assert_eq!(house.end_of("cancel").await, ("cancelled".into(), None, None));
    assert!(polite.load(Ordering::SeqCst));
    house.nothing_runs();
    running_worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_takes_only_what_it_has_and_what_nobody_has_waits() {
    let house = House::build().await;
    let without = Running::start(house.worker().handler("shop", "other", |(): (), _| async { Ok(()) }));
    house.submit("waits", "pay", ()).await;
    house.submit("other", "other", ()).await;
    house.ended("other").await;
    assert_eq!(house.inspect.job("waits").await.unwrap().unwrap().status(), "pending");
    let with = Running::start(house.worker().handler("shop", "pay", |(): (), _| async { Ok(()) }));
    assert_eq!(house.end_of("waits").await.0, "done");
    with.stop().await;
    without.stop().await;
}

/// Opens after some failures, is ill when told, counts who has it.
#[derive(Clone, Default)]
struct Flaky {
    failures: Arc<AtomicUsize>,
    opened: Arc<AtomicUsize>,
    closed: Arc<AtomicUsize>,
}

#[async_trait]
impl Resource for Flaky {
    type Of = usize;

    async fn open(&self) -> Result<usize, BoxError> {
        if self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok() {
            return Err("the database is away".into());
        }
        Ok(self.opened.fetch_add(1, Ordering::SeqCst) + 1)
    }

    async fn close(&self, _of: usize) {
        self.closed.fetch_add(1, Ordering::SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_is_opened_once_however_often_that_fails_at_first_and_closed_at_the_end() {
    let house = House::build().await;
    let flaky = Flaky { failures: Arc::new(AtomicUsize::new(3)), ..Flaky::default() };
    let application = Application::sharing("shop", flaky.clone())
        .and_then(|it| it.handler("one", |shared, (): (), _| async move { Ok(*shared) }))
        .and_then(|it| it.handler("two", |shared, (): (), _| async move { Ok(*shared) }))
        .and_then(|it| it.blocking_handler("three", |shared, (): (), _| Ok(*shared)));
    for op in ["one", "two", "three"] {
        house.submit(op, op, ()).await;
    }
    let running = Running::start(house.worker().app(application));
    for op in ["one", "two", "three"] {
        assert_eq!(house.end_of(op).await, ("done".into(), None, some("1")), "{op}");
        assert!(house.ended(op).await.text("attempts").is_none());
    }
    assert_eq!(flaky.failures.load(Ordering::SeqCst), 0);
    running.stop().await;
    assert_eq!(flaky.opened.load(Ordering::SeqCst), 1);
    assert_eq!(flaky.closed.load(Ordering::SeqCst), 1);
}

/// The first is opened at once and soon of no use; the others never come, or panic.
#[derive(Clone, Default)]
struct Gone {
    opened: Arc<AtomicUsize>,
    answers: bool,
    panics: bool,
}

#[async_trait]
impl Resource for Gone {
    type Of = ();

    async fn open(&self) -> Result<(), BoxError> {
        match self.opened.fetch_add(1, Ordering::SeqCst) {
            0 => Ok(()),
            _ if self.panics => panic!("gone"),
            _ => std::future::pending().await,
        }
    }

    async fn check(&self, _of: &()) -> Result<(), BoxError> {
        if self.answers { Err("the database is away".into()) } else { std::future::pending().await }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resource_that_does_not_say_how_it_is_is_opened_anew_and_costs_no_task_meanwhile() {
    for (answers, panics) in [(true, false), (false, false), (true, true)] {
        let gone = Gone { answers, panics, ..Gone::default() };
        let application = Application::sharing("shop", gone.clone()).unwrap();
        let handler =
            application.handler("one", |_, (): (), _| async { Ok(()) }).unwrap().into_registrations().remove(0);
        let handler = handler.handler;
        handler.start().await.unwrap();
        if answers {
            let _ = end_of("an answer", handler.check()).await;
        } else {
            // Whoever asks gives up after a while.
            let check = tokio::time::timeout(Duration::from_millis(50), handler.check()).await;
            assert!(check.is_err(), "{check:?}");
        }
        let stop = CancellationToken::new();
        let call = tokio::spawn({
            let (handler, stop) = (handler.clone(), stop.clone());
            async move { handler.run(task(&().into()), Arc::<Notes>::default(), stop).await }
        });
        eventually("another try", async || (gone.opened.load(Ordering::SeqCst) == 2).then_some(())).await;
        stop.cancel();
        let outcome = end_of("it stops", call).await.unwrap();
        assert!(matches!(outcome, Outcome::NotReady(_)), "{outcome:?}");
    }
}

/// Starts once, and is not well from its first task on.
#[derive(Default)]
struct Ill {
    calls: AtomicUsize,
}

#[async_trait]
impl Handler for Ill {
    async fn run(&self, _: Task, _: Arc<dyn Desk>, _: CancellationToken) -> Outcome {
        self.calls.fetch_add(1, Ordering::SeqCst);
        Outcome::NotReady("ill".into())
    }

    async fn start(&self) -> Result<(), String> {
        self.check().await
    }

    async fn check(&self) -> Result<(), String> {
        if self.calls.load(Ordering::SeqCst) == 0 { Ok(()) } else { Err("ill".into()) }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_does_not_begin_a_task_takes_no_more_until_it_is_well() {
    let house = House::build().await;
    let ill = Arc::new(Ill::default());
    let mut config = config(&house.redis);
    config.worker.pools.clear();
    let (_limits, limits) = tokio::sync::watch::channel(worker::app::limits(&config));
    let ills = vec![Registration::new(App::new("shop").unwrap(), Op::new("one").unwrap(), ill.clone())];
    let shutdown = Shutdown::new();
    let running = tokio::spawn(worker::app::run(config, ills, limits, shutdown.clone()));
    house.submit("one", "one", ()).await;
    eventually("that nobody serves it", async || {
        let lines = queue_core::overview::unserved(&house.store).await.unwrap();
        (!lines.is_empty() && ill.calls.load(Ordering::SeqCst) > 0).then_some(())
    })
    .await;
    let calls = ill.calls.load(Ordering::SeqCst);
    assert!(calls < 100, "it was called {calls} times before the worker left it alone");
    let well = Running::start(house.worker().handler("shop", "one", |(): (), _| async { Ok(()) }));
    assert_eq!(house.end_of("one").await.0, "done");
    well.stop().await;
    shutdown.drain().cancel();
    running.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_stops_gives_back_what_does_not_end_in_time_and_another_one_runs_it() {
    let house = House::build().await;
    let gate = Arc::new(Semaphore::new(0));
    let waiting = |gate: Arc<Semaphore>| {
        move |(): (), _| {
            let gate = gate.clone();
            async move {
                gate.acquire().await.map_err(|_| Problem::fail("closed"))?.forget();
                Ok(())
            }
        }
    };
    let first = Running::start(house.worker().handler("shop", "wait", waiting(gate.clone())));
    house.submit("long", "wait", ()).await;
    running(&house.inspect, "long").await;
    first.stop().await;
    let view = house.inspect.job("long").await.unwrap().unwrap();
    assert_eq!((view.status().as_str(), view.text("unclean"), view.text("attempts")), ("pending", None, None));
    let second = Running::start(house.worker().handler("shop", "wait", waiting(gate.clone())));
    gate.add_permits(1);
    assert_eq!(house.end_of("long").await.0, "done");
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn handlers_that_block_all_their_threads_end_the_worker_with_an_error_and_cost_their_own_jobs_only() {
    let house = House::build().await;
    let release = Arc::new(AtomicBool::new(false));
    let released = release.clone();
    let mut config = config(&house.redis);
    config.worker.pools.clear();
    config.tasks.threads = Some(2.try_into().unwrap());
    let worker = Worker::builder().config(config).handler("shop", "block", move |(): (), _| {
        let released = released.clone();
        async move {
            while !released.load(Ordering::SeqCst) {
                std::thread::park_timeout(Duration::from_millis(10));
            }
            Ok(())
        }
    });
    let timeout = Some(Duration::from_millis(100));
    for id in ["one", "two"] {
        house.enqueue(id, NewJob { timeout, ..house.task("block", ()) }).await;
    }
    let running = Running::start(worker);
    for id in ["one", "two"] {
        assert_eq!(house.end_of(id).await.1, some("it ran longer than 100ms"), "{id}");
    }
    let error = end_of("it stops", running.handle).await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "handlers block all their threads");
    release.store(true, Ordering::SeqCst);
    house.nothing_runs();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_is_registered_once_and_names_must_be_names() {
    let house = House::build().await;
    let twice =
        house
            .worker()
            .handler("shop", "pay", |(): (), _| async { Ok(()) })
            .handler("shop", "PAY", |(): (), _| async { Ok(()) });
    let error = twice.run(Shutdown::new()).await.unwrap_err();
    assert!(format!("{error:#}").contains("handler"), "{error:#}");
    assert_eq!(error.source().unwrap().to_string(), "handler already registered for this app and op: app=shop, op=pay");
    let sharing = || Application::sharing("shop", Flaky::default());
    let error = house.worker().app(sharing()).app(sharing()).run(Shutdown::new()).await.unwrap_err();
    assert_eq!(error.to_string(), "resource already registered for this app: app=shop");
    let bad = house.worker().handler("sh.op", "pay", |(): (), _| async { Ok(()) });
    let error = bad.run(Shutdown::new()).await.unwrap_err();
    assert!(error.to_string().starts_with("app has the character '.'"), "{error}");
    // It would take tasks that it can't run, and give them back for ever.
    let all = house
        .worker()
        .handler("shop", "pay", |(): (), _| async { Ok(()) })
        .pools([PoolPattern::new("shop.*").unwrap()]);
    let error = all.run(Shutdown::new()).await.unwrap_err();
    assert!(error.to_string().starts_with("worker.pools"), "{error}");
    let nothing = house.worker().run(Shutdown::new()).await.unwrap_err();
    assert!(nothing.to_string().contains("names no pool"), "{nothing}");
    let names: BTreeMap<&str, bool> = BTreeMap::from([("a", true), ("", false), ("a b", false)]);
    for (name, is_good) in names {
        assert_eq!(Application::new(name).is_ok(), is_good, "{name:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_takes_no_more_than_a_handler_can_run_and_nothing_waits_in_it_with_its_time_running() {
    let house = House::build().await;
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (counting, seen) = (now.clone(), most.clone());
    let gate = Arc::new(Semaphore::new(0));
    let closed = gate.clone();
    let narrow = move |_, (): (), _: Context| {
        let (counting, seen, gate) = (counting.clone(), seen.clone(), closed.clone());
        async move {
            seen.fetch_max(counting.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            gate.acquire().await.expect("never closed").forget();
            counting.fetch_sub(1, Ordering::SeqCst);
            Ok(())
        }
    };
    let application = Application::new("shop")
        .and_then(|it| it.handler("narrow", narrow))
        .map(|it| it.concurrency(2.try_into().unwrap()))
        .and_then(|it| it.handler("wide", |_, (): (), _| async { Ok(()) }));
    let ids: Vec<String> = (0..40).map(|number| format!("t{number}")).collect();
    for id in &ids {
        house.submit(id, "narrow", ()).await;
    }
    let running = Running::start(house.worker().slots(64.try_into().unwrap()).app(application));
    let names: Vec<&str> = ids.iter().map(String::as_str).collect();
    let count = async |is: fn(&JobView) -> bool| {
        let views = house.inspect.brief(&names).await.unwrap();
        views.iter().flatten().filter(|view| is(view)).count()
    };
    for ended in 0..3 {
        eventually("as many run as may", async || {
            assert!(most.load(Ordering::SeqCst) <= 2, "{most:?}");
            let state = (count(JobView::is_over).await, now.load(Ordering::SeqCst));
            if state == (ended, 2) { Ok(()) } else { Err(state) }
        })
        .await;
        // It has slots for all of them, and takes again, for what comes later.
        let later = format!("later-{ended}");
        house.submit(&later, "wide", ()).await;
        assert_eq!(house.end_of(&later).await.0, "done");
        assert_eq!(count(|view| view.claimed).await, 2);
        gate.add_permits(1);
    }
    gate.add_permits(ids.len());
    for id in &ids {
        assert_eq!(house.end_of(id).await.0, "done", "{id}");
    }
    assert_eq!(most.load(Ordering::SeqCst), 2);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_stops_when_its_session_may_be_over_not_when_redis_is_given_up() {
    let house = House::build().await;
    let (sender, mut stopped) = tokio::sync::mpsc::unbounded_channel();
    let begun = Arc::new(AtomicUsize::new(0));
    let calls = begun.clone();
    let handler = move |(): (), context: Context| {
        let (sender, call) = (sender.clone(), calls.fetch_add(1, Ordering::SeqCst));
        async move {
            if call == 0 {
                context.stop().cancelled().await;
                let _ = sender.send(());
            }
            Ok(call)
        }
    };
    // Sessions live for 2 s here, and Redis is given up after an hour.
    let patient = house.worker_with(|config| config.redis.command_timeout = Duration::from_secs(3_600));
    let worker = Running::start(patient.handler("shop", "long", handler));
    house.submit("one", "long", ()).await;
    eventually("its begin", async || (begun.load(Ordering::SeqCst) == 1).then_some(())).await;
    house.redis.pause();
    end_of("the task to be stopped", stopped.recv()).await.unwrap();
    house.redis.resume();
    assert_eq!(house.end_of("one").await, ("done".into(), None, some("1")));
    worker.stop().await;
}

/// A handler that closes when another one does.
struct Together(tokio::sync::Barrier);

#[async_trait]
impl Handler for Together {
    async fn run(&self, _: Task, _: Arc<dyn Desk>, _: CancellationToken) -> Outcome {
        Outcome::Done(Output::default())
    }

    async fn close(&self) {
        self.0.wait().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn handlers_close_at_the_same_time() {
    let together = Arc::new(Together(tokio::sync::Barrier::new(2)));
    let register = |op| {
        Registration::new(App::new("shop").unwrap(), Op::new(op).unwrap(), Arc::clone(&together) as Arc<dyn Handler>)
    };
    let handlers = Handlers::new(vec![register("open"), register("close")], None).unwrap();
    end_of("one does not wait for the other", handlers.close()).await;
}

/// Counts from what was saved to a hundred, saves each ten, and says how often it began a number.
async fn count(context: Context, mut at: impl FnMut(u64) -> Result<(), Problem>) -> Result<u64, Problem> {
    let from: u64 = context.checkpoint()?.unwrap_or(0);
    for number in from..100 {
        if number % 10 == 0 {
            context.save(&number).await?;
        }
        at(number)?;
        if context.stop().is_cancelled() {
            return Err(Problem::retry("told to stop"));
        }
    }
    Ok(from)
}

#[tokio::test]
async fn an_attempt_goes_on_from_what_an_earlier_one_has_saved() {
    let house = House::build().await;
    let fails = Arc::new(AtomicUsize::new(0));
    let counted = fails.clone();
    let flaky = move |_: (), context: Context| {
        let counted = counted.clone();
        async move {
            let attempt = context.attempt();
            let at = |number: u64| match number == 25 + 30 * (attempt - 1) && attempt < 3 {
                true => Err(Problem::retry(format!("at {number}"))),
                false => {
                    counted.fetch_add(1, Ordering::SeqCst);
                    Ok(())
                }
            };
            count(context, at).await
        }
    };
    let too_large = |_: (), context: Context| async move { context.save(&"x".repeat(70_000)).await };
    let worker = Running::start(house.worker().handler("shop", "flaky", flaky).handler("shop", "large", too_large));
    house.enqueue("t1", NewJob { retry: three(), ..house.task("flaky", ()) }).await;
    assert_eq!(house.end_of("t1").await, ("done".into(), None, some("50")));
    // 0 to 24, 20 to 54, 50 to 99.
    assert_eq!(fails.load(Ordering::SeqCst), 25 + 35 + 50);
    house.submit("t2", "large", ()).await;
    let (status, reason, _) = house.end_of("t2").await;
    assert_eq!(status, "failed");
    assert!(reason.unwrap().starts_with("its checkpoint has 70002 bytes, at most 65536"));
    // A new run goes on, too, unless it is to begin anew.
    house.redis.state(DB).set_field("t1", "checkpoint", "90");
    for (from_start, wanted) in [(false, "90"), (true, "50")] {
        house.redis.state(DB).set_field("t1", "status", "failed");
        let retrier = queue_core::retry::Retrier::new(house.store.clone());
        retrier.from_start(from_start).retry(&[job_id("t1")]).await.unwrap();
        let result = async || Some(house.ended("t1").await.text("result")?).filter(|result| result == wanted);
        eventually(&format!("a last attempt from {wanted}"), result).await;
        house.redis.state(DB).set_field("t1", "checkpoint", "90");
    }
    worker.stop().await;
    house.nothing_runs();
}

#[tokio::test]
async fn what_was_saved_outlives_a_drain() {
    let house = House::build().await;
    let reached = Arc::new(Semaphore::new(0));
    let waits = {
        let reached = reached.clone();
        move |_: (), context: Context| {
            let reached = reached.clone();
            async move {
                let from: u64 = context.checkpoint()?.unwrap_or(0);
                context.save(&(from + 1)).await?;
                reached.add_permits(1);
                if from >= 2 {
                    return Ok(from);
                }
                context.stop().cancelled().await;
                Err(Problem::retry("stopped"))
            }
        }
    };
    let first = Running::start(house.worker().handler("shop", "waits", waits.clone()));
    house.submit("t1", "waits", ()).await;
    reached.acquire().await.unwrap().forget();
    first.stop().await;
    let saved = || house.redis.state(DB).field("t1", "checkpoint").unwrap();
    assert_eq!(saved(), "1");
    let second = Running::start(house.worker().handler("shop", "waits", waits.clone()));
    reached.acquire().await.unwrap().forget();
    assert_eq!(saved(), "2");
    second.stop().await;
    let third = Running::start(house.worker().handler("shop", "waits", waits));
    assert_eq!(house.end_of("t1").await, ("done".into(), None, some("2")));
    third.stop().await;
    house.nothing_runs();
}

#[tokio::test]
async fn a_task_whose_claim_is_lost_saves_nothing_more_and_hears_of_it() {
    let house = House::build().await;
    let (begun, go) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let (told, heard) = tokio::sync::mpsc::unbounded_channel();
    let saves = {
        let (begun, go) = (begun.clone(), go.clone());
        move |_: (), context: Context| {
            let (begun, go, told) = (begun.clone(), go.clone(), told.clone());
            async move {
                begun.add_permits(1);
                go.acquire().await.expect("is open").forget();
                let saved = context.save(&1).await;
                let _ = told.send((saved.clone().map_err(|problem| problem.reason), context.stop().is_cancelled()));
                saved
            }
        }
    };
    let worker = Running::start(house.worker().handler("shop", "saves", saves));
    house.submit("t1", "saves", ()).await;
    begun.acquire().await.unwrap().forget();
    let mut claim = house.redis.state(DB).claim("t1").unwrap();
    claim.fence += 1;
    house.redis.state(DB).set_claim(&claim);
    go.add_permits(1);
    let mut heard = heard;
    let lost = Err("the task is another worker's by now".to_owned());
    assert_eq!(heard.recv().await, Some((lost, true)));
    assert_eq!(house.redis.state(DB).field("t1", "checkpoint"), None);
    worker.stop().await;
}
