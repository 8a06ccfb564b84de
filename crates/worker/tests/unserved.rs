//! Workers with other handlers, or with handlers that can't run for a while, or gone: what they can't run stays for those who
//! can, and nothing is ever failed for want of a handler.

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use queue_core::Store;
use queue_core::config::Limits;
use queue_core::ids::{App, Op, User};
use queue_core::model::task::Payload;
use queue_core::producer::{NewJob, Producer, Submitted};
use queue_core::reconcile;
use serde_json::Value;
use support::handlers::{PYTHON, example};
use support::{DB, config, job_id, store};
use testkit::chaos::Random;
use testkit::state::Piece;
use testkit::{RedisServer, Scratch, end_of, eventually};
use tokio::task::JoinHandle;
use worker::builder::{Worker, WorkerBuilder};
use worker::config::Config;
use worker::execute::function::{Application, BoxError, Resource};
use worker::shutdown::Shutdown;

/// How many tasks each operation gets.
const EACH: usize = 150;
const OPS: [&str; 4] = ["rust", "program", "command", "other"];

/// Can't be opened so many times.
struct Away(AtomicUsize);

#[async_trait]
impl Resource for Away {
    type Of = ();

    async fn open(&self) -> Result<(), BoxError> {
        match self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)) {
            Ok(_) => Err("the database is away".into()),
            Err(_) => Ok(()),
        }
    }
}

struct House {
    redis: RedisServer,
    store: Store,
    scratch: Scratch,
}

impl House {
    /// A worker without a handler.
    fn config(&self) -> Config {
        let mut config = config(&self.redis);
        config.worker.pools.clear();
        config.worker.slots = 4.try_into().unwrap();
        config.worker.drain_grace = Duration::from_millis(50);
        config
    }

    /// One with three handlers, none of which can start at first.
    fn three(&self) -> WorkerBuilder {
        let folder = self.scratch.path().display();
        let mut config = self.config();
        for text in [
            format!(
                "op = 'program'\nkind = 'program'\nsize = 2\ncommand = ['{}', '-I', '-S', '{folder}/program']",
                *PYTHON
            ),
            format!("op = 'command'\nkind = 'command'\ncommand = ['{folder}/command']"),
        ] {
            config.handlers.push(toml::from_str(&format!("app = 'mixed'\n{text}")).expect("a handler"));
        }
        let application = Application::sharing("mixed", Away(AtomicUsize::new(2)));
        Worker::builder()
            .config(config)
            .app(application.and_then(|it| it.handler("rust", |_, _: Value, _| async { Ok(()) })))
    }

    /// One that has none of the three.
    fn other(&self) -> WorkerBuilder {
        Worker::builder().config(self.config()).handler("mixed", "other", |_: Value, _| async { Ok(()) })
    }
}

struct Running {
    shutdown: Shutdown,
    handle: JoinHandle<Result<(), BoxError>>,
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

#[tokio::test(flavor = "multi_thread")]
async fn however_workers_come_and_go_and_handlers_fail_to_start_no_task_is_failed_for_want_of_a_handler() {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos() as u64 % 1_000_000;
    println!("seed {now}");
    let mut random = Random::of(now, &[]);
    let redis = RedisServer::start();
    let house = House { store: store(&redis).await, redis, scratch: Scratch::new("unserved") };
    let producer = Producer::new(house.store.clone(), Limits::default());
    let ids: Vec<(String, &str)> = (0..EACH).flat_map(|number| OPS.map(|op| (format!("{op}-{number}"), op))).collect();
    let jobs = ids.iter().enumerate().map(|(at, (id, op))| {
        let user = User::new(format!("user-{}", at % 5)).unwrap();
        // The example of the documentation greets.
        let input = Payload::json(&serde_json::json!({ "name": "Ana" })).unwrap();
        let job = NewJob::task(user, App::new("mixed").unwrap(), Op::new(op).unwrap(), input);
        NewJob { id: job_id(id), ..job }
    });
    for submitted in producer.enqueue_many(jobs.collect()).await {
        assert!(matches!(submitted, Ok(Submitted::Queued(_))), "{submitted:?}");
    }
    let ended = || house.redis.state(DB).finished().len();
    let field = |id: &str, field: &str| house.redis.state(DB).field(id, field);

    // Nobody has the three, and then somebody whose handlers can't start.
    let mut workers = vec![Running::start(house.other())];
    eventually("all that it has to end", async || (ended() == EACH).then_some(())).await;
    workers.push(Running::start(house.three()));
    eventually("its first handler to start", async || (ended() > EACH).then_some(())).await;
    for (id, op) in &ids {
        let expected = match *op {
            "other" => "done",
            "rust" => continue,
            _ => "pending",
        };
        assert_eq!(field(id, "status").as_deref(), Some(expected), "{id}");
    }

    for turn in 0.. {
        if ended() == ids.len() {
            break;
        }
        assert!(turn < 1_000, "{} of {} have ended", ended(), ids.len());
        match random.between(0, 6) {
            0 | 1 if workers.len() < 5 => workers.push(Running::start(house.three())),
            2 if workers.len() < 5 => workers.push(Running::start(house.other())),
            3 | 4 if !workers.is_empty() => {
                let at = random.between(0, workers.len() as u64) as usize;
                workers.swap_remove(at).stop().await;
            }
            // What the handlers need comes late, the one before the other.
            _ if turn < 8 => {}
            _ if !house.scratch.path().join("command").exists() => {
                symlink("/bin/true", house.scratch.path().join("command")).expect("a link");
            }
            _ if turn < 16 => {}
            _ => {
                fs::write(house.scratch.path().join("new"), example("python")).expect("it can be written");
                let (new, program) = (house.scratch.path().join("new"), house.scratch.path().join("program"));
                fs::rename(new, program).expect("it can be renamed");
            }
        }
        tokio::time::sleep(random.ms(0, 500)).await;
    }
    for worker in workers {
        worker.stop().await;
    }
    for (id, _) in &ids {
        assert_eq!(field(id, "status").as_deref(), Some("done"), "{id}");
        for never in ["failed_reason", "attempts", "unclean", "history"] {
            assert_eq!(field(id, never), None, "{id}: {never}");
        }
    }
    assert!(!house.redis.state(DB).has_any(&[Piece::Claims, Piece::RunningByUser, Piece::QueuesOfTasks]));
    let keep = Config::default().retention.finished;
    assert_eq!(reconcile::check(&house.store, keep).await.expect("redis answers"), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_is_away_for_a_while_costs_no_task_an_attempt() {
    let redis = RedisServer::start();
    let house = House { store: store(&redis).await, redis, scratch: Scratch::new("unserved") };
    let producer = Producer::new(house.store.clone(), Limits::default());
    let command = house.scratch.path().join("command");
    symlink("/bin/true", &command).expect("a link");
    let submit = async |name: &str| {
        let job = NewJob::task(
            User::new("ann").unwrap(),
            App::new("mixed").unwrap(),
            Op::new("command").unwrap(),
            Payload::json(&()).unwrap(),
        );
        let jobs = (0..20).map(|number| NewJob { id: job_id(&format!("{name}-{number}")), ..job.clone() }).collect();
        for submitted in producer.enqueue_many(jobs).await {
            assert!(matches!(submitted, Ok(Submitted::Queued(_))), "{submitted:?}");
        }
    };
    let ended = || house.redis.state(DB).finished().len();
    let field = |id: &str, field: &str| house.redis.state(DB).field(id, field);
    let worker = Running::start(house.three());
    submit("before").await;
    eventually("all to end while it is there", async || (ended() == 20).then_some(())).await;
    fs::remove_file(&command).expect("it is there");
    submit("after").await;
    eventually("one to be taken and given back", async || {
        let back = field("after-0", "fence").is_some() && field("after-0", "status").as_deref() == Some("pending");
        (back && !house.redis.state(DB).has(Piece::Claims)).then_some(())
    })
    .await;
    symlink("/bin/true", &command).expect("a link");
    eventually("all to end", async || (ended() == 40).then_some(())).await;
    for number in 0..20 {
        let id = format!("after-{number}");
        assert_eq!(field(&id, "status").as_deref(), Some("done"), "{id}");
        assert!(field(&id, "attempts").is_none() && field(&id, "unclean").is_none(), "{id}");
    }
    worker.stop().await;
}
