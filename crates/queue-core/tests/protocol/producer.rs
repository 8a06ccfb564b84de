//! Submitting: limits, once by id, and honest about what is not known.

use std::time::Duration;

use queue_core::config::Limits;
use queue_core::ids::{JobId, User};
use queue_core::producer::{Database, EnqueueError, NewJob, Producer, Submitted};
use testkit::{Proxy, eventually};

use crate::support::*;

fn job(user: &str, query: &str) -> NewJob {
    NewJob::sql(User::new(user).unwrap(), Database::Named("main".into()), query)
}

fn producer(rig: &Rig) -> Producer {
    Producer::new(rig.store.clone(), Limits::default())
}

#[tokio::test]
async fn the_64th_job_of_a_user_is_queued_and_the_65th_refused() {
    let rig = Rig::start().await;
    let producer = producer(&rig);
    for result in producer.enqueue_many((0..64).map(|_| job("alice", "select 1")).collect()).await {
        assert!(matches!(result, Ok(Submitted::Queued(_))), "{result:?}");
    }
    let before = rig.dump();
    let refused = producer.enqueue(job("alice", "select 1")).await.unwrap_err();
    assert_eq!(refused.to_string(), "Failed to create job. Max number of jobs (64) queued reached");
    assert_eq!(rig.dump(), before);
    producer.enqueue(job("bob", "select 1")).await.expect("another user has room");
    // What runs is not queued.
    let session = rig.session("db:*", 1).await;
    let claim = take_one(&session).await;
    let free = claim.job().user.to_string();
    producer.enqueue(job(&free, "select 1")).await.expect("room again");
    rig.balanced();
}

#[tokio::test]
async fn a_payload_over_the_limit_is_refused_with_its_size() {
    let rig = Rig::start().await;
    let producer = producer(&rig);
    let before = rig.dump();
    let refused = producer.enqueue(job("alice", &"x".repeat(16_385))).await.unwrap_err();
    let EnqueueError::TooLarge { bytes, limit: 16_384 } = refused else { panic!("{refused}") };
    assert!(bytes >= 16_385);
    let text = format!("Your payload is too large: {bytes} bytes. Max size allowed is 16384 bytes");
    assert_eq!(refused.to_string(), text);
    assert_eq!(rig.dump(), before);
    producer.enqueue(job("alice", &"x".repeat(16_000))).await.expect("this one fits");
}

#[tokio::test]
async fn a_query_that_is_none_never_reaches_redis() {
    let rig = Rig::start().await;
    let producer = producer(&rig);
    let before = rig.dump();
    for query in ["", "  ", "[]", "{}", "[1]", "{"] {
        assert!(matches!(producer.enqueue(job("alice", query)).await, Err(EnqueueError::InvalidSql(_))), "{query:?}");
    }
    assert_eq!(rig.dump(), before);
    let mixed = vec![job("alice", ""), job("alice", "select 1"), job("bob", "[]")];
    let results = producer.enqueue_many(mixed).await;
    assert!(matches!(results[..], [Err(EnqueueError::InvalidSql(_)), Ok(_), Err(EnqueueError::InvalidSql(_))]));
}

#[tokio::test]
async fn the_same_id_again_changes_nothing_whatever_became_of_the_job() {
    let rig = Rig::start().await;
    let producer = producer(&rig);
    let session = rig.session("db:*", 4).await;
    let again = || NewJob { id: JobId::new("a1").unwrap(), ..job("alice", "select 2") };
    producer.enqueue(NewJob { id: JobId::new("a1").unwrap(), ..job("alice", "select 1") }).await.unwrap();
    let check = async |what: &str| {
        let before = rig.dump();
        let submitted = producer.enqueue(again()).await.unwrap();
        assert_eq!(submitted, Submitted::AlreadyThere(JobId::new("a1").unwrap()), "{what}");
        assert_eq!(rig.dump(), before, "{what}");
    };
    check("while it waits").await;
    let claim = take_one(&session).await;
    check("while it runs").await;
    end(claim, "done").await;
    check("when it is over").await;
    assert_eq!(rig.hash("a1")["query"], "select 1");
}

#[tokio::test]
async fn a_submission_whose_answer_was_lost_is_unknown_by_its_id_and_can_be_repeated() {
    let rig = Rig::start().await;
    let proxy = Proxy::start(rig.server.addr());
    let store = rig.connect_through(&proxy).await;
    let producer = Producer::new(store.clone(), Limits::default());
    producer.enqueue(job("bob", "select 1")).await.expect("and the server knows the script");
    let new = job("alice", "select 1");
    proxy.drop_replies(true);
    let error = producer.enqueue(new.clone()).await.unwrap_err();
    let EnqueueError::Unknown { id, source } = &error else { panic!("{error}") };
    assert_eq!(*id, new.id);
    assert!(source.is_transient());
    assert!(error.to_string().contains(new.id.as_str()));
    proxy.drop_replies(false);
    proxy.cut();
    let submitted = eventually("the connection to come back", async || producer.enqueue(new.clone()).await.ok()).await;
    assert_eq!(submitted, Submitted::AlreadyThere(new.id.clone()), "it had been queued");
    assert_eq!(rig.queue("alice"), [new.id.as_str()]);

    // Whatever the network does to it, each of many is queued at most once.
    proxy.drop_replies(true);
    let many: Vec<NewJob> = (0..3).map(|_| job("carol", "select 1")).collect();
    for (result, new) in producer.enqueue_many(many.clone()).await.iter().zip(&many) {
        assert!(matches!(result, Err(EnqueueError::Unknown { id, .. }) if *id == new.id), "{result:?}");
    }
    assert_eq!(rig.queue("carol").len(), 3);
}

#[tokio::test]
async fn an_unreachable_server_leaves_nothing_behind_that_runs_later() {
    let rig = Rig::start().await;
    let proxy = Proxy::start(rig.server.addr());
    let store = rig.connect_through(&proxy).await;
    let producer = Producer::new(store, Limits::default());
    proxy.refuse(true);
    proxy.cut();
    // At first it may not have been noticed that the connection is gone.
    let new = eventually("a definite failure", async || {
        let new = job("alice", "select 1");
        match producer.enqueue(new.clone()).await.unwrap_err() {
            EnqueueError::Unknown { .. } => None,
            EnqueueError::Failed(error) => {
                assert!(matches!(*error, queue_core::Error::Unreachable(_)), "{error}");
                Some(new)
            }
            error => panic!("{error}"),
        }
    })
    .await;
    proxy.refuse(false);
    eventually("the connection to come back", async || producer.enqueue(job("bob", "select 1")).await.ok()).await;
    assert!(!rig.state().has(Piece::Job(new.id.as_str())), "an abandoned command does not run late");
}

#[tokio::test]
async fn a_server_that_refuses_fails_for_sure() {
    let rig = Rig::start().await;
    rig.state().spoil(Piece::Queue("alice"));
    let producer = producer(&rig);
    let refused = producer.enqueue(job("alice", "select 1")).await.unwrap_err();
    assert!(matches!(&refused, EnqueueError::Refused(text) if text.contains("holds a string")), "{refused}");
    rig.redis(&["CONFIG", "SET", "maxmemory", "1"]);
    let failed = producer.enqueue(job("bob", "select 1")).await.unwrap_err();
    assert!(matches!(&failed, EnqueueError::OutOfMemory(_)), "{failed:?}");
    rig.redis(&["CONFIG", "SET", "maxmemory", "0"]);
    assert!(!rig.state().has(Piece::Queue("bob")));
}

#[tokio::test]
async fn delayed_jobs_come_when_they_are_due_by_a_take_alone_or_by_the_leader_in_their_order() {
    let rig = Rig::start().await;
    let session = rig.session("db:*", 4).await;
    let leadership = rig.lead().await;
    let producer = producer(&rig);
    for by_take in [true, false] {
        let user = if by_take { "alice" } else { "bob" };
        let mut expected = Vec::new();
        for after in [40, 20, 30] {
            let new = NewJob { delay: Duration::from_millis(after), ..job(user, "select 1") };
            expected.push((after, new.id.to_string()));
            producer.enqueue(new).await.unwrap();
        }
        let far = NewJob { delay: Duration::from_secs(3_600), ..job(user, "select 1") };
        producer.enqueue(far.clone()).await.unwrap();
        assert_eq!(rig.status(far.id.as_str()), "scheduled");
        expected.sort();
        // Made due together, in the order that they have.
        for (after, id) in &expected {
            rig.state().move_due(id, *after);
        }
        let mut order = Vec::new();
        if !by_take {
            assert_eq!(leadership.upkeep(Duration::from_secs(60)).await.unwrap().unwrap().promoted, 3);
            assert_eq!(rig.state().scheduled().len(), 2, "the far ones");
        }
        for _ in 0..3 {
            let batch = session.take(1).await.unwrap().unwrap();
            let due_in = batch.due_in.expect("one is still to come");
            assert!(due_in > Duration::from_secs(3_500) && due_in <= Duration::from_secs(3_600), "{due_in:?}");
            for claim in batch.claims {
                order.push(id(&claim).to_owned());
                end(claim, "done").await;
            }
        }
        assert_eq!(order, expected.into_iter().map(|(_, id)| id).collect::<Vec<_>>());
        assert!(take(&session, 4).await.is_empty());
        rig.balanced();
    }
}

#[tokio::test]
async fn submissions_of_many_tasks_share_round_trips() {
    let rig = Rig::start().await;
    let proxy = Proxy::start(rig.server.addr());
    let producer = Producer::new(rig.connect_through(&proxy).await, Limits::default());
    producer.enqueue(job("warm-up", "select 1")).await.unwrap();
    proxy.delay(Duration::from_millis(100));
    rig.redis(&["CONFIG", "RESETSTAT"]);
    let tasks: Vec<_> = (0..100)
        .map(|i| {
            let producer = producer.clone();
            tokio::spawn(async move { producer.enqueue(job(&format!("u{i}"), "select 1")).await })
        })
        .collect();
    for task in tasks {
        assert!(matches!(task.await.unwrap(), Ok(Submitted::Queued(_))));
    }
    let calls = function_calls(&rig);
    assert!((1..=3).contains(&calls), "{calls} calls for 100 submissions");
}
