//! What the daemon does while Redis is in trouble and afterwards: work goes on by itself and not by a scan,
//! what was acknowledged ends once, and what a producer was told for sure is true.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use queue_core::Store;
use queue_core::config::{Limits, RedisConfig, Url};
use queue_core::ids::{JobId, User};
use queue_core::inspect::{Inspect, JobView};
use queue_core::producer::{Database, EnqueueError, NewJob, Producer, Submitted};
use support::{DB, running};
use testkit::state::Piece;
use testkit::{Daemon, Direction, Proxy, RedisServer, Scratch, Sentinel, Signal, Value, bin, eventually};

const ALWAYS: [(&str, &str); 3] = [("appendonly", "yes"), ("appendfsync", "always"), ("enable-debug-command", "yes")];

/// A daemon on a database of its own, and a producer that submits all the time.
struct Yard {
    url: String,
    folder: Scratch,
    daemon: Daemon,
}

impl Yard {
    /// Its scans are an hour apart: what resumes does so by itself or by a message.
    fn on(url: String) -> Self {
        let folder = Scratch::new("trouble");
        let (config, path) = (folder.path().join("worker.toml"), folder.path().join("db"));
        rusqlite::Connection::open(&path).unwrap().execute("CREATE TABLE effects (what TEXT)", ()).unwrap();
        let text = format!(
            "[worker]\nsession_lifetime = '6s'\nscan_interval = '1h'\n[redis]\ncommand_timeout = '2s'\n\
             [retry]\nmax_attempts = 100\ndelay = '100ms'\ndelay_max = '1s'\n\
             [databases.main]\nkind = 'sqlite'\npath = '{}'\n",
            path.display()
        );
        std::fs::write(&config, text).unwrap();
        let args = ["--config", config.to_str().unwrap(), "--redis-url", &url];
        let daemon = Daemon::spawn(bin("drayman-worker"), &args, &[]);
        daemon.wait_for_line("serving");
        Self { url, folder, daemon }
    }

    async fn store(&self) -> Store {
        let url = Url::new(self.url.clone());
        let config = RedisConfig { url, command_timeout: Duration::from_secs(1), ..RedisConfig::default() };
        Store::connect(&config).await.expect("redis answers")
    }

    async fn produce(&self) -> Load {
        let limits = Limits { max_queued_per_user: 10_000.try_into().unwrap(), ..Limits::default() };
        let producer = Producer::new(self.store().await, limits);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut answers = BTreeMap::new();
            for number in 0.. {
                if stopped.load(Ordering::SeqCst) {
                    break;
                }
                let id = format!("load-{number}");
                answers.insert(id.clone(), producer.enqueue(job(&id, &format!("user{}", number % 5))).await);
                // A steady stream, not a flood: what is measured is the trouble.
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            answers
        });
        Load { stop, task }
    }

    fn effects(&self) -> Vec<String> {
        let database = rusqlite::Connection::open(self.folder.path().join("db")).unwrap();
        let mut statement = database.prepare("SELECT what FROM effects").unwrap();
        statement.query_map((), |row| row.get(0)).unwrap().map(Result::unwrap).collect()
    }

    /// Submits a job by hand, with nothing but plain commands, as soon as the server answers, and waits for its take.
    async fn resumes(&self, server: &RedisServer, id: &str) {
        push(server, id);
        eventually("a take", async || server.state(DB).field(id, "started_at")).await;
    }

    async fn stops(&self) {
        self.daemon.signal(Signal::SIGTERM);
        assert_eq!(self.daemon.wait().code(), Some(0), "{}", self.daemon.output());
    }
}

struct Load {
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<BTreeMap<String, Result<Submitted, EnqueueError>>>,
}

impl Load {
    /// Ends the stream, and waits until all that was acknowledged is done, once; what was refused for sure never was a job.
    async fn holds(self, yard: &Yard, server: &RedisServer) -> BTreeMap<String, Result<Submitted, EnqueueError>> {
        self.stop.store(true, Ordering::SeqCst);
        let answers = self.task.await.unwrap();
        let acknowledged = || answers.iter().filter(|(_, answer)| answer.is_ok()).map(|(id, _)| id);
        let state = server.state(DB);
        eventually("all that was acknowledged to end", async || {
            acknowledged()
                .all(|id| {
                    let status = state.status(id);
                    status.unwrap_or_else(|| panic!("{id} was acknowledged and is lost")) == "done"
                })
                .then_some(())
        })
        .await;
        let effects = yard.effects();
        let once: BTreeSet<&String> = effects.iter().collect();
        assert_eq!(once.len(), effects.len(), "nothing took effect twice");
        for (id, answer) in &answers {
            match answer {
                Ok(_) => assert!(once.contains(id), "{id}"),
                Err(EnqueueError::Unknown { .. }) => {}
                Err(error) => {
                    assert!(!once.contains(id), "{id} was refused for sure: {error}");
                    assert!(!state.has(Piece::Job(id)), "{id} was refused for sure: {error}");
                }
            }
        }
        // What nobody was told of may still run.
        eventually("all claims to end", async || (state.running() == 0).then_some(())).await;
        let count = |kind: fn(&Result<Submitted, EnqueueError>) -> bool| answers.values().filter(|a| kind(a)).count();
        let unknown = count(|answer| matches!(answer, Err(EnqueueError::Unknown { .. })));
        println!("submitted {}: {} acknowledged, {unknown} unknown", answers.len(), count(Result::is_ok));
        answers
    }
}

fn job(id: &str, user: &str) -> NewJob {
    job_of(id, user, &format!("INSERT INTO effects VALUES ('{id}')"))
}

fn job_of(id: &str, user: &str, query: &str) -> NewJob {
    let database = Database::Named("main".into());
    NewJob { id: JobId::new(id).unwrap(), ..NewJob::sql(User::new(user).unwrap(), database, query) }
}

/// A foreign producer's submission.
fn push(server: &RedisServer, id: &str) {
    let sql = format!("INSERT INTO effects VALUES ('{id}')");
    server.state(DB).foreign().submit(id, id, &[("status", "pending"), ("query", &sql), ("database", "main")]);
}

/// Trouble of one server: load before, during and after it; then the four promises.
async fn survives(server: &RedisServer, yard: Yard, trouble: impl AsyncFnOnce()) {
    let load = yard.produce().await;
    yard.resumes(server, "before").await;
    trouble().await;
    yard.resumes(server, "after").await;
    load.holds(&yard, server).await;
    yard.stops().await;
}

async fn seconds(seconds: f64) {
    // The trouble itself takes so long; nothing is waited for.
    tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_of_redis_with_aof_loses_nothing_that_was_acknowledged() {
    let server = RedisServer::with_config(&ALWAYS);
    let yard = Yard::on(server.url_db(DB));
    survives(&server, yard, async || {
        for down in [0.0, 3.0] {
            server.kill();
            seconds(down).await;
            server.restart();
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_longer_than_a_session_lives_ends_none_and_work_resumes() {
    let server = RedisServer::with_config(&ALWAYS);
    let yard = Yard::on(server.url_db(DB));
    survives(&server, yard, async || {
        server.kill();
        // Longer than the session's lifetime and than all pauses between attempts grow.
        seconds(8.0).await;
        server.restart();
        assert_eq!(server.state(DB).sessions().len(), 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_comes_back_empty_is_worked_with_at_once() {
    let server = RedisServer::start();
    let yard = Yard::on(server.url_db(DB));
    yard.resumes(&server, "before").await;
    server.restart();
    assert!(server.dump_db(DB).len() < 5, "what is there is new");
    yard.resumes(&server, "after").await;
    let load = yard.produce().await;
    load.holds(&yard, &server).await;
    yard.stops().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_is_a_replica_for_a_while_is_worked_with_when_it_is_one_again() {
    let server = RedisServer::with_config(&ALWAYS);
    let yard = Yard::on(server.url_db(DB));
    survives(&server, yard, async || {
        server.raw(&["REPLICAOF", "127.0.0.1", "1"]);
        seconds(3.0).await;
        server.raw(&["REPLICAOF", "NO", "ONE"]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_redis_loads_its_file_the_worker_waits_and_then_works() {
    let server = RedisServer::with_config(&[&ALWAYS[..], &[("aof-use-rdb-preamble", "no")]].concat());
    let mut client = server.client(0);
    for i in 0..1_000 {
        client.call(&["SET", &format!("filler:{i}"), "x"]);
    }
    let yard = Yard::on(server.url_db(DB));
    survives(&server, yard, async || {
        for (name, value) in [("key-load-delay", "2000"), ("loading-process-events-interval-bytes", "1024")] {
            server.raw(&["CONFIG", "SET", name, value]);
        }
        assert_eq!(server.raw(&["DEBUG", "LOADAOF"]), Value::Simple("OK".into()));
        server.raw(&["CONFIG", "SET", "key-load-delay", "0"]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_script_of_others_that_runs_too_long_delays_work_and_no_more() {
    let server = RedisServer::with_config(&[&ALWAYS[..], &[("busy-reply-threshold", "500")]].concat());
    let yard = Yard::on(server.url_db(DB));
    survives(&server, yard, async || {
        let mut busy = server.client(0);
        busy.send(&["EVAL", "while true do end", "0"]).unwrap();
        seconds(4.0).await;
        assert_eq!(server.raw(&["SCRIPT", "KILL"]), Value::Simple("OK".into()));
        busy.receive().unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_sleeps_or_is_stopped_is_waited_for() {
    let server = RedisServer::with_config(&ALWAYS);
    let yard = Yard::on(server.url_db(DB));
    survives(&server, yard, async || {
        server.raw(&["DEBUG", "SLEEP", "1"]);
        server.raw(&["DEBUG", "SLEEP", "4"]);
        server.pause();
        seconds(5.0).await;
        server.resume();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_memory_is_full_what_waits_is_done_and_nothing_new_is_accepted() {
    let server = RedisServer::with_config(&ALWAYS);
    let yard = Yard::on(server.url_db(DB));
    let load = yard.produce().await;
    yard.resumes(&server, "before").await;
    let slow =
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 3000000) SELECT count(*) FROM c";
    let store = yard.store().await;
    let producer = Producer::new(store.clone(), Limits::default());
    producer.enqueue(job_of("slow", "slow", slow)).await.unwrap();
    let inspect = Inspect::new(store);
    running(&inspect, "slow").await;
    server.raw(&["CONFIG", "SET", "maxmemory", "1"]);
    let refused = producer.enqueue(job("refused", "late")).await.unwrap_err();
    assert!(matches!(refused, EnqueueError::OutOfMemory(_)), "{refused}");
    // It runs for as long as it takes, is recorded, and all that waited is done.
    let view: JobView =
        eventually("the slow one to end", async || inspect.job("slow").await.unwrap().filter(JobView::is_over)).await;
    assert_eq!((view.status().as_str(), view.text("failed_reason")), ("done", None));
    eventually("all queues to be empty", async || {
        let state = server.state(DB);
        (state.queues().is_empty() && state.running() == 0).then_some(())
    })
    .await;
    server.raw(&["CONFIG", "SET", "maxmemory", "0"]);
    yard.resumes(&server, "after").await;
    let answers = load.holds(&yard, &server).await;
    assert!(answers.values().any(|answer| matches!(answer, Err(EnqueueError::OutOfMemory(_)))));
    yard.stops().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_is_fifty_milliseconds_away_is_slow_and_nothing_else() {
    let server = RedisServer::with_config(&ALWAYS);
    let proxy = Proxy::start(server.addr());
    proxy.delay(Duration::from_millis(50));
    let yard = Yard::on(proxy.redis_url(DB));
    survives(&server, yard, async || {
        proxy.cut();
        seconds(1.0).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replies_that_are_cut_in_the_middle_lose_no_job_and_run_none_twice() {
    let server = RedisServer::with_config(&ALWAYS);
    let proxy = Proxy::start(server.addr());
    let yard = Yard::on(proxy.redis_url(DB));
    survives(&server, yard, async || {
        for bytes in (0..40).map(|step| step * 37) {
            proxy.cut_after_bytes(Direction::ToClient, bytes);
            seconds(0.1).await;
        }
        // Whatever budget is left cuts once more.
        proxy.cut();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_for_longer_than_all_pauses_grow_it_resumes_at_once() {
    let server = RedisServer::with_config(&ALWAYS);
    let proxy = Proxy::start(server.addr());
    let yard = Yard::on(proxy.redis_url(DB));
    survives(&server, yard, async || {
        proxy.refuse(true);
        proxy.cut();
        seconds(8.0).await;
        proxy.refuse(false);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_are_killed_and_a_library_that_is_forgotten_come_back() {
    let server = RedisServer::with_config(&ALWAYS);
    let yard = Yard::on(server.url_db(DB));
    survives(&server, yard, async || {
        for round in 0..15 {
            server.raw(&["FUNCTION", "FLUSH"]);
            seconds(0.1).await;
            server.raw(&["CLIENT", "KILL", "TYPE", if round % 2 == 0 { "normal" } else { "pubsub" }]);
            seconds(0.1).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_of_redis_that_jumps_kills_no_session_and_stops_no_work() {
    let server = RedisServer::with_clock(&[]);
    let yard = Yard::on(server.url_db(DB));
    let sessions = server.state(DB).sessions();
    let load = yard.produce().await;
    for (round, hours) in [1, -1, 0].into_iter().enumerate() {
        server.shift_clock(hours * 3_600);
        yard.resumes(&server, &format!("after-{round}")).await;
        // Longer than the leader leads unless it is renewed.
        seconds(6.0).await;
    }
    assert_eq!(server.state(DB).sessions(), sessions);
    load.holds(&yard, &server).await;
    yard.stops().await;
}

/// Behind Sentinel, what the replica had not got is lost with the primary: only what it had confirmed is held to its word.
async fn fails_over(down_after: Duration, kill: bool) {
    let sentinel = Sentinel::start(down_after);
    let (first, second) = sentinel.first_and_second();
    let yard = Yard::on(sentinel.url_db(DB));
    yard.resumes(first, "before").await;
    let producer = Producer::new(yard.store().await, Limits::default());
    for number in 0..20 {
        let id = format!("kept-{number}");
        producer.enqueue(job(&id, &format!("user{number}"))).await.unwrap();
    }
    // The WAIT of another client waits for its own writes.
    assert_eq!(first.client(DB).call(&["SET", "mark", "1"]), Value::Simple("OK".into()));
    let mut client = first.client(DB);
    client.call(&["SET", "mark", "2"]);
    assert_eq!(client.call(&["WAIT", "1", "5000"]), Value::Int(1));
    if kill {
        first.kill();
    } else {
        first.pause();
    }
    sentinel.wait_for_primary(second);
    yard.resumes(second, "after").await;
    let state = second.state(DB);
    for number in 0..20 {
        eventually("what the replica had to end", async || {
            let status = state.status(&format!("kept-{number}")).expect("the replica had it");
            (status == "done").then_some(())
        })
        .await;
    }
    let effects = yard.effects();
    assert_eq!(effects.iter().collect::<BTreeSet<_>>().len(), effects.len(), "nothing took effect twice");
    if !kill {
        // It wakes as a primary that nobody asks any more.
        first.resume();
        yard.resumes(second, "at-the-end").await;
    }
    yard.stops().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_failover_from_a_primary_that_died_work_goes_on_at_the_new_one() {
    fails_over(Duration::from_secs(2), true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_failover_from_a_primary_that_hangs_work_goes_on_at_the_new_one() {
    fails_over(Duration::from_secs(2), false).await;
}

/// The time that Sentinel takes by default to give a primary up.
#[tokio::test(flavor = "multi_thread")]
async fn after_the_thirty_seconds_that_sentinel_waits_by_default_work_goes_on() {
    fails_over(Duration::from_secs(30), true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_nearly_full_accepts_nothing_new_until_there_is_room() {
    let server = RedisServer::with_config(&ALWAYS);
    let yard = Yard::on(server.url_db(DB));
    let producer = Producer::new(yard.store().await, Limits::default());
    producer.enqueue(job("before", "ann")).await.unwrap();
    server.raw(&["SETRANGE", "filler", "50000000", "x"]);
    let info = server.raw(&["INFO", "memory"]).text();
    let used = info.lines().find_map(|line| line.strip_prefix("used_memory:")).unwrap();
    // The default mark is nine tenths.
    let limit = used.trim().parse::<u64>().unwrap() * 100 / 95;
    server.raw(&["CONFIG", "SET", "maxmemory", &limit.to_string()]);
    let refused = eventually("a refusal", async || {
        let number = server.raw(&["INCR", "number"]).int();
        producer.enqueue(job(&format!("job-{number}"), &format!("user{number}"))).await.err()
    })
    .await;
    assert!(matches!(refused, EnqueueError::NoRoom { used, mark } if used > mark), "{refused}");
    yard.daemon.wait_for_line("redis is nearly full");
    // Foreign producers are refused by Redis alone, and only when nothing is left.
    yard.resumes(&server, "foreign").await;
    server.raw(&["DEL", "filler"]);
    eventually("room", async || producer.enqueue(job("again", "ann")).await.ok()).await;
    yard.daemon.wait_for_line("redis has room again");
    yard.stops().await;
}
