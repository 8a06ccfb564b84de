//! Submissions that replicas confirm: as many as say so, and never more.

use std::time::Duration;

use queue_core::Store;
use queue_core::config::Limits;
use queue_core::ids::{JobId, User};
use queue_core::producer::{Confirmed, ConfirmedProducer, Database, EnqueueError, NewJob, Producer, Submitted};
use testkit::{Proxy, RedisServer, Value, eventually};

use crate::support::*;

/// Replicas report by themselves once a second.
const PATIENCE: Duration = Duration::from_millis(2_500);

fn job(id: &str) -> NewJob {
    let user = User::new("alice").unwrap();
    NewJob { id: JobId::new(id).unwrap(), ..NewJob::sql(user, Database::Named("main".into()), "select 1") }
}

/// A primary with two replicas.
struct Set {
    primary: RedisServer,
    replicas: [RedisServer; 2],
}

impl Set {
    fn start() -> Self {
        let primary = RedisServer::with_config(&[("repl-diskless-sync-delay", "0")]);
        let of = format!("127.0.0.1 {}", primary.addr().port());
        let replicas = [(); 2].map(|()| RedisServer::with_config(&[("replicaof", &of)]));
        let mut client = primary.client(0);
        testkit::eventually_blocking("two replicas", || {
            client.call(&["SET", "x", "y"]);
            (client.call(&["WAIT", "2", "100"]) == Value::Int(2)).then_some(())
        });
        Self { primary, replicas }
    }

    async fn producer(&self, replicas: u32) -> ConfirmedProducer {
        confirmed(self.primary.url_db(DB), replicas).await
    }
}

async fn confirmed(url: String, replicas: u32) -> ConfirmedProducer {
    let config = queue_core::config::RedisConfig { command_timeout: Duration::from_millis(800), ..config(url) };
    let store = Store::connect(&config).await.unwrap();
    Producer::new(store, Limits::default()).confirmed_by(replicas, PATIENCE).await.unwrap()
}

fn queued(id: &str) -> Submitted {
    Submitted::Queued(JobId::new(id).unwrap())
}

fn there(id: &str) -> Submitted {
    Submitted::AlreadyThere(JobId::new(id).unwrap())
}

#[tokio::test]
async fn a_submission_says_how_many_replicas_have_it_and_too_few_is_no_plain_yes() {
    let set = Set::start();
    let (one, two) = (set.producer(1).await, set.producer(2).await);
    // The server does not know the script yet, and forgets it again.
    assert_eq!(two.enqueue(job("a")).await.unwrap(), Confirmed::Enough { submitted: queued("a"), by: 2 });
    set.primary.raw(&["FUNCTION", "FLUSH"]);
    assert_eq!(two.enqueue(job("b")).await.unwrap(), Confirmed::Enough { submitted: queued("b"), by: 2 });
    for replica in &set.replicas {
        assert!(replica.state(DB).has(Piece::Job("b")));
    }

    set.replicas[0].pause();
    assert_eq!(two.enqueue(job("c")).await.unwrap(), Confirmed::TooFew { submitted: queued("c"), by: 1, wanted: 2 });
    assert!(set.primary.state(DB).has(Piece::Job("c")), "it is queued all the same");
    assert_eq!(one.enqueue(job("d")).await.unwrap(), Confirmed::Enough { submitted: queued("d"), by: 1 });

    // That it exists is no confirmation either: another connection wrote it, and a replica does not have it.
    assert_eq!(two.enqueue(job("c")).await.unwrap(), Confirmed::TooFew { submitted: there("c"), by: 1, wanted: 2 });
    let fresh = set.producer(2).await;
    assert_eq!(fresh.enqueue(job("c")).await.unwrap(), Confirmed::TooFew { submitted: there("c"), by: 1, wanted: 2 });
    set.replicas[0].resume();
    let submitted = eventually("the replica to catch up", async || match fresh.enqueue(job("c")).await.unwrap() {
        Confirmed::Enough { submitted, by: 2 } => Some(submitted),
        _ => None,
    })
    .await;
    assert_eq!(submitted, there("c"));
    assert!(set.replicas[0].state(DB).has(Piece::Job("c")));
}

#[tokio::test]
async fn a_job_that_another_connection_wrote_is_confirmed_by_no_replica_that_lacks_it() {
    let set = Set::start();
    let (writer, other) = (set.producer(2).await, set.producer(2).await);
    // Replicas have all that the other connection has written until now, and nothing that it writes at its start follows the job.
    assert_eq!(other.enqueue(job("before")).await.unwrap(), Confirmed::Enough { submitted: queued("before"), by: 2 });
    set.replicas[0].pause();
    assert_eq!(writer.enqueue(job("a")).await.unwrap(), Confirmed::TooFew { submitted: queued("a"), by: 1, wanted: 2 });
    set.primary.state(DB).lose(Piece::Confirming);
    assert_eq!(other.enqueue(job("a")).await.unwrap(), Confirmed::TooFew { submitted: there("a"), by: 1, wanted: 2 });
    // WAIT of Valkey 9 counts only for what its own connection wrote, that of Redis 7.0 for all before it: there the confirmation alone
    // does not show that this connection has written anything.
    assert!(set.primary.state(DB).has(Piece::Confirming));
    set.replicas[0].resume();
    let confirmed = eventually("the replica to catch up", async || match other.enqueue(job("a")).await.unwrap() {
        Confirmed::Enough { submitted, by: 2 } => Some(submitted),
        _ => None,
    });
    assert_eq!(confirmed.await, there("a"));
    assert!(set.replicas[0].state(DB).has(Piece::Job("a")));
}

#[tokio::test]
async fn many_submissions_share_one_confirmation_and_keep_their_own_errors() {
    let set = Set::start();
    let producer = set.producer(2).await;
    let jobs = vec![
        job("a"),
        NewJob::sql(User::new("alice").unwrap(), Database::Named("main".into()), " "),
        job("a"),
        job("b"),
    ];
    let results = producer.enqueue_many(jobs).await;
    assert!(matches!(&results[0], Ok(Confirmed::Enough { submitted: Submitted::Queued(_), by: 2 })));
    assert!(matches!(&results[1], Err(EnqueueError::InvalidSql(_))));
    assert!(matches!(&results[2], Ok(Confirmed::Enough { submitted: Submitted::AlreadyThere(_), by: 2 })));
    assert!(matches!(&results[3], Ok(Confirmed::Enough { submitted: Submitted::Queued(_), by: 2 })));
    // Asked for one by one, they go together while one is waited for.
    set.replicas[1].pause();
    let asked: Vec<_> = (0..10)
        .map(|i| {
            let producer = producer.clone();
            tokio::spawn(async move { producer.enqueue(job(&format!("many-{i}"))).await })
        })
        .collect();
    let waits = || {
        let stats = set.primary.raw(&["INFO", "commandstats"]).text();
        let line = stats.lines().find_map(|line| line.strip_prefix("cmdstat_wait:calls="));
        line.map_or(0, |rest| rest.split(',').next().unwrap().parse::<u32>().unwrap())
    };
    let before = waits();
    for asked in asked {
        assert!(matches!(asked.await.unwrap(), Ok(Confirmed::TooFew { by: 1, wanted: 2, .. })));
    }
    assert!(waits() - before < 6, "{before}, {}", waits());
}

#[tokio::test]
async fn without_replicas_none_confirms_and_a_lost_answer_is_unknown() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.addr());
    let producer = confirmed(proxy.redis_url(DB), 1).await;
    let expected = Confirmed::TooFew { submitted: queued("a"), by: 0, wanted: 1 };
    assert_eq!(producer.enqueue(job("a")).await.unwrap(), expected);
    proxy.drop_replies(true);
    let lost = producer.enqueue(job("b")).await.unwrap_err();
    assert!(matches!(&lost, EnqueueError::Unknown { id, .. } if id.as_str() == "b"), "{lost:?}");
    assert!(server.state(DB).has(Piece::Job("b")));
    proxy.drop_replies(false);
    proxy.cut();
    let found = eventually("an answer", async || producer.enqueue(job("b")).await.ok()).await;
    assert_eq!(found, Confirmed::TooFew { submitted: there("b"), by: 0, wanted: 1 });
    server.raw(&["CONFIG", "SET", "maxmemory", "1"]);
    assert!(matches!(producer.enqueue(job("c")).await, Err(EnqueueError::OutOfMemory(_))));
}
