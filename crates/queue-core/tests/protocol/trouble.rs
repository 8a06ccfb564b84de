//! What a producer is told while Redis is in trouble: never a false yes, a definite no where it is one, and otherwise that
//! the outcome is unknown. And what holds among sessions and the leader when clocks jump or memory is full.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use queue_core::Store;
use queue_core::calls::{Beat, Finished, Lead, Mark};
use queue_core::cancel::{Cancelled, Canceller};
use queue_core::config::{Limits, RedisConfig};
use queue_core::ids::{JobId, SessionId, User};
use queue_core::leader::{self, SessionWatch};
use queue_core::library::{self, Effect};
use queue_core::producer::{Database, EnqueueError, NewJob, Producer, Submitted};
use testkit::{Direction, Proxy, RedisServer, Sentinel, Value, eventually};

use crate::support::*;

fn job(user: &str) -> NewJob {
    NewJob::sql(User::new(user).unwrap(), Database::Named("main".into()), "select 1")
}

fn impatient(url: String) -> RedisConfig {
    RedisConfig { command_timeout: Duration::from_millis(800), ..config(url) }
}

async fn producer(url: String) -> Producer {
    let store = Store::connect(&impatient(url)).await.expect("the server answers");
    Producer::new(store, Limits::default())
}

/// Submits one job; whether its definite answers are true is looked up in `server` once it can tell.
struct Asked {
    id: JobId,
    result: Result<Submitted, EnqueueError>,
}

impl Asked {
    async fn by(producer: &Producer, user: &str) -> Self {
        let job = job(user);
        Self { id: job.id.clone(), result: producer.enqueue(job).await }
    }

    #[track_caller]
    fn is_unknown(&self) {
        assert!(matches!(&self.result, Err(EnqueueError::Unknown { id, .. }) if *id == self.id), "{:?}", self.result);
    }

    #[track_caller]
    fn is_refused(&self, word: &str) {
        let Err(EnqueueError::Failed(error)) = &self.result else { panic!("{:?}", self.result) };
        assert!(matches!(&**error, queue_core::Error::Refused(text) if text.starts_with(word)), "{error}");
        assert!(error.is_transient(), "{error}");
    }

    /// A definite failure has left nothing.
    #[track_caller]
    fn left_nothing(&self, server: &RedisServer) {
        assert!(!server.state(DB).has(Piece::Job(self.id.as_str())), "{:?}", self.result);
    }

    #[track_caller]
    fn is_queued(&self, server: &RedisServer, user: &str) {
        assert!(matches!(&self.result, Ok(Submitted::Queued(_))), "{:?}", self.result);
        let queue = server.state(DB).waiting(user);
        assert_eq!(queue.iter().filter(|id| *id == self.id.as_str()).count(), 1);
    }
}

/// The same producer submits again by itself once the trouble is over.
async fn goes_on(producer: &Producer, server: &RedisServer, user: &str) {
    let asked = eventually("a submission to be accepted", async || {
        let asked = Asked::by(producer, user).await;
        asked.result.is_ok().then_some(asked)
    })
    .await;
    asked.is_queued(server, user);
}

#[tokio::test]
async fn a_producer_at_a_replica_is_refused_for_sure_and_goes_on_when_it_is_the_primary_again() {
    let rig = Rig::start().await;
    let producer = producer(rig.server.url_db(DB)).await;
    goes_on(&producer, &rig.server, "alice").await;
    rig.redis(&["REPLICAOF", "127.0.0.1", "1"]);
    let asked = Asked::by(&producer, "bob").await;
    asked.is_refused("READONLY");
    rig.redis(&["REPLICAOF", "NO", "ONE"]);
    goes_on(&producer, &rig.server, "bob").await;
    asked.left_nothing(&rig.server);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_producer_at_a_server_that_loads_is_told_that_nothing_was_sent() {
    let server = RedisServer::with_config(&[
        ("appendonly", "yes"),
        ("appendfsync", "always"),
        ("aof-use-rdb-preamble", "no"),
        ("enable-debug-command", "yes"),
    ]);
    let producer = producer(server.url_db(DB)).await;
    goes_on(&producer, &server, "alice").await;
    // Loading takes 2 ms a command, and meanwhile clients are answered.
    let mut client = server.client(DB);
    for i in 0..1_000 {
        client.call(&["SET", &format!("filler:{i}"), "x"]);
    }
    for (name, value) in [("key-load-delay", "2000"), ("loading-process-events-interval-bytes", "1024")] {
        assert_eq!(server.raw(&["CONFIG", "SET", name, value]), Value::Simple("OK".into()));
    }
    let loading = std::thread::scope(|scope| {
        scope.spawn(|| server.raw(&["DEBUG", "LOADAOF"]));
        let runtime = tokio::runtime::Handle::current();
        tokio::task::block_in_place(|| {
            runtime.block_on(eventually("a refusal", async || {
                let asked = Asked::by(&producer, "bob").await;
                asked.result.is_err().then_some(asked)
            }))
        })
    });
    match &loading.result {
        // On the connection that was there, or on a new one that gets no further than the greeting.
        Err(EnqueueError::Failed(_)) => loading.left_nothing(&server),
        other => assert!(matches!(other, Err(EnqueueError::Unknown { .. })), "{other:?}"),
    }
    goes_on(&producer, &server, "carol").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_producer_during_a_long_script_does_not_know_and_then_is_refused_for_sure() {
    let rig = Rig::start().await;
    let producer = producer(rig.server.url_db(DB)).await;
    goes_on(&producer, &rig.server, "alice").await;
    rig.redis(&["CONFIG", "SET", "busy-reply-threshold", "2500"]);
    let mut busy = rig.server.client(DB);
    busy.send(&["EVAL", "while true do end", "0"]).unwrap();
    // Until the threshold the server is simply silent, and what it was sent will run.
    let silent = Asked::by(&producer, "bob").await;
    silent.is_unknown();
    let refused = eventually("a refusal", async || {
        let asked = Asked::by(&producer, "bob").await;
        matches!(asked.result, Err(EnqueueError::Failed(_))).then_some(asked)
    })
    .await;
    // Over a new connection nothing is sent, for its greeting is refused.
    let Err(EnqueueError::Failed(error)) = &refused.result else { unreachable!() };
    assert!(error.to_string().contains("BUSY") || matches!(**error, queue_core::Error::Unreachable(_)), "{error}");
    assert_eq!(rig.server.raw(&["SCRIPT", "KILL"]), Value::Simple("OK".into()));
    goes_on(&producer, &rig.server, "carol").await;
    refused.left_nothing(&rig.server);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_producer_at_a_server_that_sleeps_does_not_know_and_what_it_sent_is_there_later() {
    let rig = Rig::start().await;
    let producer = producer(rig.server.url_db(DB)).await;
    goes_on(&producer, &rig.server, "alice").await;
    rig.server.pause();
    let asked = Asked::by(&producer, "bob").await;
    asked.is_unknown();
    rig.server.resume();
    eventually("the job that was sent", async || (rig.queue("bob").len() == 1).then_some(())).await;
    goes_on(&producer, &rig.server, "bob").await;
}

#[tokio::test]
async fn a_reply_that_is_cut_anywhere_leaves_it_unknown_and_the_job_there_once() {
    let rig = Rig::start().await;
    let proxy = Proxy::start(rig.server.addr());
    let producer = producer(format!("redis://{}/{DB}", proxy.addr())).await;
    for bytes in 0..12 {
        let user = format!("user{bytes}");
        goes_on(&producer, &rig.server, "warm").await;
        // `*1\r\n$6\r\nqueued\r\n`
        proxy.cut_after_bytes(Direction::ToClient, bytes);
        let asked = Asked::by(&producer, &user).await;
        asked.is_unknown();
        assert_eq!(rig.queue(&user), [asked.id.as_str()], "cut after {bytes} bytes");
        let again = NewJob { id: asked.id.clone(), ..job(&user) };
        let again = eventually("an answer", async || producer.enqueue(again.clone()).await.ok()).await;
        assert_eq!(again, Submitted::AlreadyThere(asked.id));
        assert_eq!(rig.queue(&user).len(), 1);
    }
    rig.balanced();
}

#[tokio::test]
async fn a_request_that_is_cut_is_unknown_and_queues_nothing_or_once() {
    let rig = Rig::start().await;
    let proxy = Proxy::start(rig.server.addr());
    let producer = producer(format!("redis://{}/{DB}", proxy.addr())).await;
    for bytes in [0, 1, 40, 200] {
        let user = format!("user{bytes}");
        goes_on(&producer, &rig.server, "warm").await;
        proxy.cut_after_bytes(Direction::ToServer, bytes);
        let asked = Asked::by(&producer, &user).await;
        asked.is_unknown();
        goes_on(&producer, &rig.server, "warm").await;
        assert_eq!(rig.queue(&user).len(), 0, "half a request is none");
    }
}

#[tokio::test]
async fn while_nothing_listens_a_producer_is_told_so_and_nothing_of_it_comes_later() {
    let rig = Rig::start().await;
    let proxy = Proxy::start(rig.server.addr());
    let producer = producer(format!("redis://{}/{DB}", proxy.addr())).await;
    goes_on(&producer, &rig.server, "alice").await;
    proxy.refuse(true);
    proxy.cut();
    let mut definite = Vec::new();
    while definite.len() < 3 {
        let asked = Asked::by(&producer, "bob").await;
        match &asked.result {
            Err(EnqueueError::Failed(error)) => {
                assert!(matches!(**error, queue_core::Error::Unreachable(_)), "{error}");
                definite.push(asked);
            }
            Err(EnqueueError::Unknown { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
    // Abandoned by its caller, it does not run later either.
    let abandoned = job("bob");
    let waiting = tokio::time::timeout(Duration::from_millis(100), producer.enqueue_many(vec![abandoned.clone()]));
    waiting.await.expect_err("there is no connection");
    proxy.refuse(false);
    goes_on(&producer, &rig.server, "carol").await;
    definite.iter().for_each(|asked| asked.left_nothing(&rig.server));
    assert!(!rig.state().has(Piece::Job(abandoned.id.as_str())));
}

#[tokio::test]
async fn killed_clients_and_a_forgotten_library_cost_a_producer_nothing_that_is_definite() {
    let rig = Rig::start().await;
    let producer = producer(rig.server.url_db(DB)).await;
    let mut queued = BTreeSet::new();
    for round in 0..20 {
        match round % 2 {
            0 => rig.redis(&["FUNCTION", "FLUSH"]),
            _ => rig.redis(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]),
        };
        let asked = Asked::by(&producer, &format!("user{round}")).await;
        match &asked.result {
            Ok(_) => {
                asked.is_queued(&rig.server, &format!("user{round}"));
                queued.insert(round);
            }
            Err(EnqueueError::Unknown { .. }) => assert_eq!(round % 2, 1),
            Err(EnqueueError::Failed(_)) => asked.left_nothing(&rig.server),
            other => panic!("{other:?}"),
        }
    }
    assert!(queued.len() >= 10, "{queued:?}");
    goes_on(&producer, &rig.server, "last").await;
}

/// The only writes are those of scripts that say of themselves that they may.
#[tokio::test]
async fn while_memory_is_full_work_ends_and_drains_and_nothing_new_comes_in() {
    let rig = Rig::start().await;
    let store = &rig.store;
    let producer = Producer::new(store.clone(), Limits::default());
    let session = rig.session("db:*", 2).await;
    let doomed = rig.session("db:*", 2).await;
    let leadership = rig.lead().await;
    for user in ["a", "b", "c", "d", "e"] {
        producer.enqueue(NewJob { id: JobId::new(user).unwrap(), ..job(user) }).await.unwrap();
    }
    let due = NewJob { id: JobId::new("due").unwrap(), delay: Duration::from_secs(60), ..job("f") };
    producer.enqueue(due).await.unwrap();
    rig.state().make_due("due");
    // Pushed by somebody else, and noticed by nobody yet.
    rig.state().set(Piece::Job("foreign"), &[("user", "g"), ("query", "q"), ("database", "main")]);
    rig.state().foreign().push("g", "foreign");
    let running = take_one(&session).await;
    let lost = take_one(&doomed).await;

    rig.redis(&["CONFIG", "SET", "maxmemory", "1"]);
    rig.redis(&["FUNCTION", "FLUSH"]);
    let before = rig.dump();
    let refused = producer.enqueue(job("new")).await.unwrap_err();
    assert!(matches!(&refused, EnqueueError::OutOfMemory(source) if source.is_transient()), "{refused:?}");
    assert_eq!(rig.dump(), before);
    assert!(store.notice(&[b"g".to_vec()]).await.unwrap_err().to_string().contains("OOM"));

    // What runs is recorded, by the worker and by the leader for one that is gone.
    assert_eq!(running.pen().mark(&queue_core::calls::Fields::new().with("trace", "t")).await.unwrap(), Mark::Held);
    assert!(matches!(session.beat().await.unwrap(), Beat::Alive { .. }));
    assert_eq!(end(running, "done").await, Finished::Ended);
    let leader = SessionId::new("leader:1:a").unwrap();
    assert_eq!(store.lead(&leader, Some(60_000)).await.unwrap(), Lead::Leader(leadership.term()));
    store.session_reclaim(doomed.id().as_str(), 0, &leader, leadership.term()).await.unwrap().unwrap();
    assert_eq!(end(lost, "done").await, Finished::Stale);
    let canceller = Canceller::new(store.clone(), PATIENCE);
    assert_eq!(canceller.cancel(&JobId::new("e").unwrap()).await.unwrap(), Cancelled::AtOnce);
    // A worker may even be started anew.
    let fresh = rig.session("db:*", 2).await;
    leadership.upkeep(Duration::from_secs(60)).await.unwrap().unwrap();
    leadership.scan_queues().await.unwrap().unwrap();
    let mut ended = BTreeSet::new();
    while let Some(claim) = take(&fresh, 1).await.pop() {
        ended.insert(id(&claim).to_owned());
        assert_eq!(end(claim, "done").await, Finished::Ended);
    }
    assert_eq!(ended.len(), 5, "{ended:?}");
    assert!(ended.contains("due") && ended.contains("foreign"));
    leadership.sweep(Duration::from_secs(60)).await.unwrap().unwrap();
    leadership.clear_wip().await.unwrap().unwrap();
    rig.balanced();

    rig.redis(&["CONFIG", "SET", "maxmemory", "0"]);
    goes_on(&producer, &rig.server, "new").await;
    let adds = library::TABLE.iter().filter(|function| function.effect == Effect::Adds).map(|function| function.name);
    assert_eq!(
        adds.collect::<Vec<_>>(),
        ["submit", "admit", "schedule_put", "schedule_tick", "batch_load", "flow_launch", "tracker_create"]
    );
}

#[tokio::test]
async fn a_clock_that_is_set_back_or_ahead_breaks_no_order_of_holders_and_keeps_nobody_waiting() {
    let server = RedisServer::with_clock(&[]);
    let store = Store::connect(&config(server.url_db(DB))).await.unwrap();
    let rig = Rig { server, store };
    let session = rig.session("sql:*", 8).await;
    let store = &rig.store;
    store.enqueue(&most(64, 16_384), &[submission("alice", "a1", "h")]).await.unwrap();
    let first = take_one(&session).await;
    let first_fence = first.job().fence;
    put(first, queue_core::calls::Verdict::Back).await;

    // Two pools, of which one has had its turn before the clock goes back: it is not passed over until the clock is there
    // again.
    rig.server.shift_clock(-3_600);
    let second = take_one(&session).await;
    assert!(second.job().fence > first_fence, "a later holder has the greater fence");
    put(second, queue_core::calls::Verdict::Back).await;
    let jobs = [submission("bob", "b1", "other"), submission("carol", "c1", "other")];
    store.enqueue(&most(64, 16_384), &jobs).await.unwrap();
    let mut pools = BTreeSet::new();
    for _ in 0..3 {
        let claim = take_one(&session).await;
        pools.insert(claim.job().pool.to_string());
        if claim.job().user.as_str() == "alice" {
            put(claim, queue_core::calls::Verdict::Back).await;
        } else {
            end(claim, "done").await;
        }
    }
    assert_eq!(pools.len(), 2, "{pools:?}");

    // A leader that died before the clock went back does not lead for ever.
    let (old, new) = (SessionId::new("old:1:a").unwrap(), SessionId::new("new:1:a").unwrap());
    rig.server.shift_clock(0);
    assert!(matches!(store.lead(&old, Some(500)).await.unwrap(), Lead::Leader(_)));
    rig.server.shift_clock(-3_600);
    eventually("another to lead", async || {
        matches!(store.lead(&new, Some(500)).await.unwrap(), Lead::Leader(_)).then_some(())
    })
    .await;

    // Nobody is taken for dead by a clock: only by a beat that stood still on the leader's own.
    let leadership = leader::hold(store, &new, Duration::from_secs(5)).await.unwrap().unwrap();
    let mut watch = SessionWatch::default();
    for hours in [-10, 10, -100, 100] {
        rig.server.shift_clock(hours * 3_600);
        let Some(leadership) = leader::hold(store, &new, Duration::from_secs(5)).await.unwrap() else {
            panic!("the leader stays one")
        };
        assert_eq!(watch.pass(&leadership, Duration::from_secs(60)).await.unwrap(), Ok(vec![]));
        session.beat().await.unwrap();
    }
    drop(leadership);
    let claim = take_one(&session).await;
    assert!(claim.job().fence > first_fence);
    end(claim, "done").await;
    rig.balanced();
}

#[tokio::test]
async fn a_fence_from_the_future_is_followed_by_a_greater_one() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 8).await;
    rig.submit("alice", "a1", "h");
    rig.state().set_field("a1", "fence", "8000000000000000");
    rig.notice(&["alice"]).await;
    let claim = take_one(&session).await;
    assert_eq!(claim.job().fence.0, 8_000_000_000_000_001);
    end(claim, "done").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_sentinel_a_producer_finds_the_new_primary_by_itself() {
    let sentinel = Sentinel::start(Duration::from_secs(2));
    let (first, second) = sentinel.first_and_second();
    let producer = producer(sentinel.url_db(DB)).await;
    goes_on(&producer, first, "alice").await;
    assert_eq!(first.client(DB).call(&["WAIT", "1", "5000"]), Value::Int(1));
    // It hangs: connections stay, and nothing answers.
    first.pause();
    Asked::by(&producer, "bob").await.is_unknown();
    sentinel.wait_for_primary(second);
    goes_on(&producer, second, "carol").await;
    // The old one wakes, and thinks for a while that it is the primary: nobody asks it any more.
    first.resume();
    goes_on(&producer, second, "carol").await;
}

/// Passes everything on to `target`, but for the next reply once `garbles` is set: that becomes `garbage`.
fn garbler(target: SocketAddr, garbles: Arc<AtomicBool>, garbage: &'static [u8]) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (mut client, mut server) = (client.unwrap(), TcpStream::connect(target).unwrap());
            let (mut asks, mut asked) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            std::thread::spawn(move || std::io::copy(&mut asks, &mut asked));
            let garbles = garbles.clone();
            std::thread::spawn(move || {
                let mut buffer = [0; 65_536];
                while let Ok(n @ 1..) = server.read(&mut buffer) {
                    let reply = if garbles.swap(false, Ordering::SeqCst) { garbage } else { &buffer[..n] };
                    if client.write_all(reply).is_err() {
                        break;
                    }
                }
            });
        }
    });
    port
}

#[tokio::test]
async fn after_an_answer_that_nobody_can_read_the_outcome_is_unknown() {
    for garbage in [&b"x\r\nfoo\r\n"[..], b"*z\r\n", b"*1\r\n:abc\r\n"] {
        let rig = Rig::start().await;
        let garbles = Arc::new(AtomicBool::new(false));
        let port = garbler(rig.server.addr(), garbles.clone(), garbage);
        let producer = producer(format!("redis://127.0.0.1:{port}/{DB}")).await;
        Asked::by(&producer, "alice").await.result.unwrap();
        garbles.store(true, Ordering::SeqCst);
        let asked = Asked::by(&producer, "alice").await;
        asked.is_unknown();
        assert!(rig.state().has(Piece::Job(asked.id.as_str())));
        eventually("an answer", async || Asked::by(&producer, "alice").await.result.ok()).await;
    }
}

#[tokio::test]
async fn a_submission_that_breaks_off_half_way_is_no_definite_failure() {
    let rig = Rig::start().await;
    let producer = producer(rig.server.url_db(DB)).await;
    rig.state().spoil(Piece::Ready("db:main"));
    let asked = Asked::by(&producer, "alice").await;
    assert!(rig.state().has(Piece::Job(asked.id.as_str())));
    asked.is_unknown();
}
