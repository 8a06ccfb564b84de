//! Tasks of a worker around which something fails: it is killed, it is cut off from Redis, its handlers are not well.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use queue_core::cancel::Canceller;
use queue_core::config::{Limits, Url};
use queue_core::ids::{App, Op, User};
use queue_core::inspect::Inspect;
use queue_core::model::task::Payload;
use queue_core::producer::{NewJob, Producer};
use serde_json::json;
use support::handlers::{Notes, task};
use support::{DB, PATIENCE, config, ended, job_id, running, store};
use testkit::state::Piece;
use testkit::{Daemon, Proxy, RedisServer, Signal, end_of, eventually};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use worker::builder::{Worker, WorkerBuilder};
use worker::execute::function::{Application, BoxError, Context, Resource};
use worker::execute::task::{Outcome, Problem};
use worker::shutdown::Shutdown;

struct House {
    redis: RedisServer,
    inspect: Inspect,
    producer: Producer,
    canceller: Canceller,
}

impl House {
    async fn build() -> Self {
        let redis = RedisServer::start();
        let store = store(&redis).await;
        let (inspect, producer) = (Inspect::new(store.clone()), Producer::new(store.clone(), Limits::default()));
        Self { redis, inspect, producer, canceller: Canceller::new(store, PATIENCE) }
    }

    async fn submit(&self, id: &str, op: &str) {
        let (app, op) = (App::new("shop").unwrap(), Op::new(op).unwrap());
        let job = NewJob::task(User::new("ann").unwrap(), app, op, Payload::json(&()).unwrap());
        self.producer.enqueue(NewJob { id: job_id(id), ..job }).await.expect("redis answers");
    }

    /// A worker of handlers in this process.
    fn worker(&self) -> WorkerBuilder {
        let mut config = config(&self.redis);
        config.worker.pools.clear();
        Worker::builder().config(config)
    }

    /// The daemon, with a command for `shop.pay`.
    fn daemon(&self, command: &[&str], settings: &[(&str, &str)]) -> Daemon {
        let path = self.redis.dir().join("worker.toml");
        let handler = "[[handlers]]\napp = 'shop'\nop = 'pay'\nkind = 'command'";
        let text = format!("[worker]\npools = []\n{handler}\ncommand = {command:?}\n");
        std::fs::write(&path, text).unwrap();
        let settings = [&[("DRAYMAN_CONFIG", path.to_str().unwrap())], settings].concat();
        support::daemon(&self.redis.url_db(DB), &settings)
    }

    async fn status(&self, id: &str) -> String {
        self.inspect.job(id).await.expect("redis answers").expect("is known").status()
    }

    /// Whether some session serves a pool.
    fn is_served(&self, pool: &str) -> bool {
        let sessions = self.redis.state(DB).sessions();
        let service = |id: &String| self.redis.state(DB).fields(Piece::Session(id))["service"].clone();
        sessions.iter().any(|id| service(id).split(' ').any(|served| served == pool))
    }
}

fn start(worker: WorkerBuilder) -> (Shutdown, JoinHandle<Result<(), BoxError>>) {
    let shutdown = Shutdown::new();
    (shutdown.clone(), tokio::spawn(worker.run(shutdown)))
}

async fn stop((shutdown, worker): (Shutdown, JoinHandle<Result<(), BoxError>>)) {
    shutdown.drain().cancel();
    end_of("the worker stops", worker).await.expect("no panic").expect("no error");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_whose_worker_is_killed_is_run_by_the_next_and_set_aside_when_it_has_ended_too_many() {
    let house = House::build().await;
    for (id, command, max_unclean) in [("once", ["echo", "paid"], "5"), ("killer", ["false", ""], "1")] {
        house.submit(id, "pay").await;
        let daemon = house.daemon(&["sleep", "1000"], &[]);
        running(&house.inspect, id).await;
        daemon.kill9();
        let next = house.daemon(&command, &[("DRAYMAN_WORKER__MAX_UNCLEAN", max_unclean)]);
        let view = ended(&house.inspect, id).await;
        // Nobody's error: no attempt is used up.
        assert_eq!((view.text("unclean"), view.text("attempts")), (Some("1".into()), None));
        if id == "once" {
            assert_eq!((view.status().as_str(), view.text("result")), ("done", Some("\"paid\\n\"".into())));
        } else {
            let reason = view.text("failed_reason").unwrap();
            assert!(view.status() == "ignored" && reason.starts_with("set aside: it ended 1 workers"), "{reason}");
        }
        next.kill9();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_cannot_reach_redis_stops_its_tasks_when_they_may_be_anothers() {
    let house = House::build().await;
    let proxy = Proxy::start(house.redis.addr());
    let (calls, told) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let (counting, telling) = (calls.clone(), told.clone());
    let mut config = config(&house.redis);
    config.worker.pools.clear();
    config.redis.url = Url::new(proxy.redis_url(DB));
    let worker = Worker::builder().config(config).handler("shop", "pay", move |(): (), context: Context| {
        let (call, told) = (counting.fetch_add(1, Ordering::SeqCst), telling.clone());
        async move {
            if call == 0 {
                context.stop().cancelled().await;
                told.store(true, Ordering::SeqCst);
            }
            Ok(call)
        }
    });
    let worker = start(worker);
    house.submit("one", "pay").await;
    // It stands among the claims before the worker has heard of it.
    eventually("the task to run", async || (calls.load(Ordering::SeqCst) > 0).then_some(())).await;
    proxy.refuse(true);
    proxy.cut();
    eventually("the task to be told to stop", async || told.load(Ordering::SeqCst).then_some(())).await;
    assert_eq!(house.status("one").await, "running", "nothing was recorded");
    proxy.refuse(false);
    let view = ended(&house.inspect, "one").await;
    assert_eq!((view.status().as_str(), view.text("result")), ("done", Some("1".into())), "of the second call");
    assert_eq!((calls.load(Ordering::SeqCst), view.text("attempts")), (2, None));
    stop(worker).await;
}

/// Can be ill; then it can neither be used nor opened.
#[derive(Clone, Default)]
struct Health {
    ill: Arc<AtomicBool>,
    opened: Arc<AtomicUsize>,
    closed: Arc<AtomicUsize>,
}

#[async_trait]
impl Resource for Health {
    type Of = usize;

    async fn open(&self) -> Result<usize, BoxError> {
        if self.ill.load(Ordering::SeqCst) {
            return Err("the database is away".into());
        }
        Ok(self.opened.fetch_add(1, Ordering::SeqCst) + 1)
    }

    async fn check(&self, _: &usize) -> Result<(), BoxError> {
        if self.ill.load(Ordering::SeqCst) { Err("it does not answer".into()) } else { Ok(()) }
    }

    async fn close(&self, _: usize) {
        self.closed.fetch_add(1, Ordering::SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_is_not_well_takes_no_tasks_until_it_is_opened_anew_and_fails_none() {
    let house = House::build().await;
    let health = Health::default();
    let application = || {
        let application = Application::sharing("shop", health.clone());
        application.and_then(|it| it.handler("pay", |opened, (): (), _| async move { Ok(*opened) }))
    };
    let worker = house.worker().app(application()).handler("shop2", "other", |(): (), _| async { Ok(()) });
    let worker = start(worker);
    house.submit("before", "pay").await;
    assert_eq!(ended(&house.inspect, "before").await.text("result"), Some("1".into()));

    health.ill.store(true, Ordering::SeqCst);
    // A task that is on its way to it then goes back, with nothing used up.
    let handler = application().unwrap().into_registrations().remove(0).handler;
    let outcome = handler.run(task(&json!(null)), Arc::new(Notes::default()), CancellationToken::new()).await;
    assert_eq!(outcome, Outcome::NotReady("the database is away".into()));
    eventually("it to be asked how it is", async || (!house.is_served("shop.pay")).then_some(())).await;
    assert!(house.is_served("shop2.other"), "others go on");
    house.submit("meanwhile", "pay").await;
    assert_eq!(house.status("meanwhile").await, "pending");
    assert_eq!(health.closed.load(Ordering::SeqCst), 1);

    health.ill.store(false, Ordering::SeqCst);
    let view = ended(&house.inspect, "meanwhile").await;
    assert_eq!((view.status().as_str(), view.text("result")), ("done", Some("2".into())));
    assert_eq!((view.text("attempts"), view.text("history")), (None, None));
    stop(worker).await;
    assert_eq!(health.closed.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn blocking_code_that_is_told_to_stop_ends_as_it_says_and_one_that_is_deaf_is_left_behind() {
    let house = House::build().await;
    let (release, left) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (released, leaves) = (release.clone(), left.clone());
    let application = Application::new("shop")
        .and_then(|it| {
            it.blocking_handler("hears", |_, (): (), context| {
                while !context.stop().is_cancelled() {
                    std::thread::park_timeout(Duration::from_millis(5));
                }
                Err::<(), _>(Problem::retry("told to stop"))
            })
        })
        .and_then(|it| {
            it.blocking_handler("deaf", move |_, (): (), _| {
                while !released.load(Ordering::SeqCst) {
                    std::thread::park_timeout(Duration::from_millis(5));
                }
                leaves.store(true, Ordering::SeqCst);
                Ok(())
            })
        })
        .map(|it| it.stop_grace(Duration::from_millis(50)));
    let worker = start(house.worker().app(application));
    for op in ["hears", "deaf"] {
        house.submit(op, op).await;
        running(&house.inspect, op).await;
        house.canceller.cancel(&job_id(op)).await.unwrap();
        assert_eq!(ended(&house.inspect, op).await.status(), "cancelled", "{op}");
    }
    // Its job is over, and it goes on: nothing can end a thread.
    assert!(!left.load(Ordering::SeqCst));
    release.store(true, Ordering::SeqCst);
    eventually("it to end by itself", async || left.load(Ordering::SeqCst).then_some(())).await;
    stop(worker).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_of_a_command_that_this_machine_lacks_wait_for_a_worker_that_has_it() {
    let house = House::build().await;
    let lacks = house.daemon(&["no-such-program"], &[]);
    lacks.wait_for_line("a handler can't start");
    house.submit("one", "pay").await;
    assert!(!house.is_served("shop.pay"));
    assert_eq!(house.status("one").await, "pending");
    let has = house.daemon(&["echo", "paid"], &[]);
    let view = ended(&house.inspect, "one").await;
    assert_eq!((view.status().as_str(), view.text("attempts")), ("done", None));
    for daemon in [lacks, has] {
        daemon.signal(Signal::SIGTERM);
        assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.output());
    }
}
