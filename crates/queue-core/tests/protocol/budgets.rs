//! Nothing grows for ever: records by age, number and size, payloads, delayed jobs, and new work on a server that is nearly
//! full.

use std::time::Duration;

use queue_core::calls::{Budget, Enqueued, Fields, Submission, Verdict};
use queue_core::cancel::{Cancelled, Canceller};
use queue_core::config::Limits;
use queue_core::ids::{JobId, User};
use queue_core::producer::{Database, EnqueueError, NewJob, Producer, Submitted};
use queue_core::retry::Retrier;
use queue_core::session::Session;
use testkit::{RedisServer, eventually};

use crate::support::*;

const HOUR_MS: u64 = 3_600_000;

async fn ended(rig: &Rig, session: &Session, id: &str, bytes: usize) {
    let mut job = submission("alice", id, "h");
    job.fields = job.fields.and(Fields::new().with("onerror", "x".repeat(bytes)));
    assert_eq!(rig.store.enqueue(&most(64, 1 << 20), &[job]).await.unwrap(), [Enqueued::Queued]);
    end(take_one(session).await, "done").await;
}

fn kept(rig: &Rig) -> Vec<String> {
    rig.state().jobs()
}

#[tokio::test]
async fn of_more_records_than_may_be_kept_the_oldest_go_in_bounded_steps() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    let leadership = rig.lead().await;
    for i in 0..8 {
        ended(&rig, &session, &format!("j{i}"), 10).await;
        // Ends within one ms have no order of age.
        rig.state().move_end(&format!("j{i}"), 4_000_000_000_000 + i);
    }
    let budget = Budget { retention_ms: HOUR_MS, count: 5, ..Budget::default() };
    let done = leadership.upkeep_within(&budget).await.unwrap().unwrap();
    assert_eq!((done.evicted, done.trimmed), (3, 0));
    assert_eq!(kept(&rig), ["j3", "j4", "j5", "j6", "j7"]);
    rig.balanced();
    assert_eq!(leadership.upkeep_within(&budget).await.unwrap().unwrap().evicted, 0);

    // More than one step removes.
    rig.state().fill_finished("f", 2_500, 3_000_000_000_000);
    let mut steps = Vec::new();
    loop {
        let evicted = leadership.upkeep_within(&budget).await.unwrap().unwrap().evicted;
        steps.push(evicted);
        if evicted < Budget::EVICTED_MAX {
            break;
        }
    }
    assert_eq!(steps, [1_000, 1_000, 500]);
    assert_eq!(kept(&rig), ["j3", "j4", "j5", "j6", "j7"]);
    rig.balanced();
}

#[tokio::test]
async fn records_that_need_more_memory_than_they_may_go_too_and_the_books_know_what_redis_knows() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    let leadership = rig.lead().await;
    for (i, bytes) in [10, 50_000, 10, 40_000].into_iter().enumerate() {
        ended(&rig, &session, &format!("j{i}"), bytes).await;
        rig.state().move_end(&format!("j{i}"), 4_000_000_000_000 + i as u64);
    }
    for id in ["j0", "j1", "j2", "j3"] {
        let measured = rig.state().occupied_bytes(id);
        let booked = rig.state().booked_bytes(id).expect("it is booked");
        assert!(booked.abs_diff(measured) < 64, "{id}: {booked} and {measured}");
    }
    let budget = Budget { retention_ms: HOUR_MS, bytes: 60_000, ..Budget::default() };
    assert_eq!(leadership.upkeep_within(&budget).await.unwrap().unwrap().evicted, 2);
    assert_eq!(kept(&rig), ["j2", "j3"]);
    rig.balanced();

    // A job that somebody has begun anew is no record, though its old end stands in the index.
    rig.state().set_field("j2", "status", "pending");
    rig.state().foreign().push("alice", "j2");
    let budget = Budget { bytes: 1, ..budget };
    assert_eq!(leadership.upkeep_within(&budget).await.unwrap().unwrap().evicted, 2);
    assert_eq!(kept(&rig), ["j2"]);
    rig.notice(&["alice"]).await;
    end(take_one(&session).await, "done").await;
    rig.balanced();
}

#[tokio::test]
async fn records_that_expire_by_themselves_leave_the_books_as_they_go() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    let leadership = rig.lead().await;
    for (id, keep_ms) in [("short", 20), ("long", HOUR_MS), ("again", 20)] {
        rig.store.enqueue(&most(64, 16_384), &[submission(id, id, "h")]).await.unwrap();
        let fields = Fields::new().with("status", "done");
        take_one(&session).await.finish(Verdict::Final { keep_ms }, Duration::ZERO, fields, false).await.unwrap();
    }
    // Ended once more, by a cancel, it has one entry of the new size.
    rig.state().lose(Piece::Job("again"));
    rig.store.enqueue(&most(64, 16_384), &[submission("again", "again", "h")]).await.unwrap();
    let canceller = Canceller::new(rig.store.clone(), Duration::from_secs(3_600));
    assert_eq!(canceller.cancel(&JobId::new("again").unwrap()).await.unwrap(), Cancelled::AtOnce);
    rig.balanced();
    let budget = Budget { retention_ms: HOUR_MS, count: 10, ..Budget::default() };
    eventually("the record to leave the books", async || {
        let done = leadership.upkeep_within(&budget).await.unwrap().unwrap();
        assert_eq!(done.evicted, 0);
        (done.trimmed == 1).then_some(())
    })
    .await;
    assert_eq!(rig.state().finished().len(), 2);
    // It may outlive its entry by the millisecond that the call took.
    eventually("the record to go", async || (!rig.state().has(Piece::Job("short"))).then_some(())).await;
    rig.balanced();
    // What the sweep removes leaves them, too.
    rig.state().set_field("long", "updated_at", "2001-01-01T00:00:00.000Z");
    rig.state().leave_untouched(Piece::Job("long"), 100);
    assert_eq!(leadership.sweep(Duration::from_secs(60)).await.unwrap(), Ok(1));
    rig.balanced();
}

#[tokio::test]
async fn above_the_mark_nothing_new_is_accepted_until_there_is_some_room_below_it() {
    let rig = Rig::start().await;
    let leadership = rig.lead().await;
    let producer = Producer::new(rig.store.clone(), Limits::default());
    let job = |id: &str| NewJob {
        id: JobId::new(id).unwrap(),
        ..NewJob::sql(User::new("alice").unwrap(), Database::Named("main".into()), "select 1")
    };
    producer.enqueue(job("before")).await.unwrap();
    let at = async |used| {
        let budget = Budget { retention_ms: HOUR_MS, used, mark: 1_000, mark_ms: 60_000, ..Budget::default() };
        leadership.upkeep_within(&budget).await.unwrap().unwrap().full
    };
    assert!(!at(999).await);
    producer.enqueue(job("a")).await.unwrap();
    assert!(at(1_000).await);
    let before = rig.dump();
    let refused = producer.enqueue(job("b")).await.unwrap_err();
    assert!(matches!(refused, EnqueueError::NoRoom { used: 1_000, mark: 1_000 }), "{refused}");
    assert_eq!(refused.to_string(), "redis uses 1000 bytes of memory, and accepts no new jobs above 1000");
    assert!(matches!(producer.enqueue(job("before")).await.unwrap(), Submitted::AlreadyThere(_)), "that is no new one");
    assert_eq!(rig.dump(), before);
    assert!(at(960).await, "not yet");
    assert!(!at(949).await);
    assert!(!at(999).await, "once lifted, up to the mark again");
    producer.enqueue(job("b")).await.unwrap();

    // What the leader said ends by itself.
    let short = Budget { retention_ms: HOUR_MS, used: 2, mark: 1, mark_ms: 30, ..Budget::default() };
    assert!(leadership.upkeep_within(&short).await.unwrap().unwrap().full);
    eventually("the word to expire", async || producer.enqueue(job("c")).await.ok()).await;

    // What the server itself says.
    let (used, maxmemory) = leadership.memory().await.unwrap().unwrap();
    assert!(used > 100_000 && maxmemory == 0);
    rig.redis(&["CONFIG", "SET", "maxmemory", "1gb"]);
    assert_eq!(leadership.memory().await.unwrap().unwrap().1, 1 << 30);
}

#[tokio::test]
async fn delayed_jobs_count_as_queued_until_they_are_due_or_cancelled() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 8).await;
    let job = |id: &str, delay_ms| {
        let mut job = submission("alice", id, "h");
        job.delay_ms = delay_ms;
        job
    };
    let jobs = [job("d1", HOUR_MS), job("d2", HOUR_MS), job("q1", 0), job("q2", 0), job("d3", HOUR_MS)];
    let full = Enqueued::Full(3);
    let queued = Enqueued::Queued;
    let replies = rig.store.enqueue(&most(3, 16_384), &jobs).await.unwrap();
    assert_eq!(replies, [queued.clone(), queued.clone(), queued.clone(), full.clone(), full.clone()]);
    rig.balanced();

    // Due, it is in the queue and counts there.
    rig.state().make_due("d1");
    let claim = take_one(&session).await;
    assert_eq!(id(&claim), "d1");
    rig.balanced();
    // What is tried again later is no submission.
    put(claim, Verdict::Later { after_ms: HOUR_MS }).await;
    rig.balanced();
    assert_eq!(
        rig.store.enqueue(&most(3, 16_384), &[job("q3", 0), job("q4", 0)]).await.unwrap(),
        [queued.clone(), full.clone()]
    );
    rig.state().make_due("d1");
    let claim = take_one(&session).await;
    end(claim, "done").await;

    let canceller = Canceller::new(rig.store.clone(), PATIENCE);
    assert_eq!(canceller.cancel(&JobId::new("d2").unwrap()).await.unwrap(), Cancelled::AtOnce);
    rig.balanced();
    assert_eq!(rig.store.enqueue(&most(3, 16_384), &[job("q5", 0), job("q6", 0)]).await.unwrap(), [queued, full]);

    // A hash that is gone when its job is due is gone from the count, too.
    rig.store.enqueue(&most(64, 16_384), &[job("lost", HOUR_MS)]).await.unwrap();
    rig.state().lose(Piece::Job("lost"));
    rig.state().make_due("lost");
    rig.lead().await.upkeep(Duration::from_secs(3_600)).await.unwrap().unwrap();
    assert!(!rig.state().has(Piece::ScheduledByUser));
    rig.balanced();
}

#[tokio::test]
async fn no_caller_exceeds_the_hard_limit_on_payloads() {
    let rig = Rig::start().await;
    let mut job = submission("alice", "big", "h");
    job.fields = Fields::new().with("query", "x".repeat(1 << 20));
    let replies = rig.store.enqueue(&most(u64::MAX, u64::MAX), &[job.clone()]).await.unwrap();
    assert_eq!(replies, [Enqueued::TooLarge { bytes: (1 << 20) + 5, most: 1 << 20 }]);
    job.fields = Fields::new().with("query", "x".repeat((1 << 20) - 5));
    assert_eq!(rig.store.enqueue(&most(64, u64::MAX), &[job]).await.unwrap(), [Enqueued::Queued]);
}

/// Without the right to ask for sizes, records count by their number.
#[tokio::test]
async fn who_may_not_measure_still_ends_jobs() {
    let server = RedisServer::start();
    let rig = Rig { store: queue_core::Store::connect(&config(server.url_db(DB))).await.unwrap(), server };
    rig.redis(&["ACL", "SETUSER", "worker", "on", ">secret", "~*", "&*", "+@all", "-memory", "-info"]);
    let url = rig.server.url_db(DB).replace("redis://", "redis://worker:secret@");
    let store = queue_core::Store::connect(&config(url)).await.unwrap();
    let session = open(&store, service("sql:*", 4)).await;
    rig.store.enqueue(&most(64, 16_384), &[submission("alice", "a1", "h")]).await.unwrap();
    end(take_one(&session).await, "done").await;
    assert_eq!(rig.state().booked_bytes("a1"), Some(0));
    let leader = queue_core::ids::SessionId::new("leader:1:a").unwrap();
    let leadership = queue_core::leader::hold(&store, &leader, PATIENCE).await.unwrap().unwrap();
    assert_eq!(leadership.memory().await.unwrap(), None);
    rig.balanced();
}

fn delayed(id: &str, user: &str, delay_ms: u64) -> Submission {
    Submission { delay_ms, ..submission(user, id, "h") }
}

#[tokio::test]
async fn a_delayed_job_whose_hash_others_removed_counts_once_when_it_is_submitted_again() {
    let rig = Rig::start().await;
    let submit = async |job| rig.store.enqueue(&most(1, 16_384), &[job]).await.unwrap();
    submit(delayed("d", "alice", HOUR_MS)).await;
    rig.state().lose(Piece::Job("d"));
    assert_eq!(submit(delayed("d", "bob", HOUR_MS)).await, [Enqueued::Queued]);
    rig.balanced();
    rig.state().lose(Piece::Job("d"));
    assert_eq!(submit(delayed("d", "alice", 0)).await, [Enqueued::Queued]);
    assert!(!rig.state().has_any(&[Piece::Scheduled, Piece::ScheduledByUser]));
    rig.balanced();
}

#[tokio::test]
async fn a_delayed_job_that_others_queue_before_its_time_is_delayed_no_more() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 8).await;
    rig.store.enqueue(&most(1, 16_384), &[delayed("d", "alice", HOUR_MS)]).await.unwrap();
    rig.state().foreign().push("alice", "d");
    rig.state().foreign().index("alice");
    rig.notice(&["alice"]).await;
    end(take_one(&session).await, "done").await;
    assert!(!rig.state().has_any(&[Piece::Scheduled, Piece::ScheduledByUser]));
    assert_eq!(
        rig.store.enqueue(&most(1, 16_384), &[submission("alice", "e", "h")]).await.unwrap(),
        [Enqueued::Queued]
    );
    rig.balanced();
}

#[tokio::test]
async fn a_delayed_job_that_others_ended_and_somebody_runs_again_is_delayed_no_more() {
    let rig = Rig::start().await;
    rig.store.enqueue(&most(1, 16_384), &[delayed("d", "alice", HOUR_MS)]).await.unwrap();
    rig.state().set(Piece::Job("d"), &[("status", "cancelled"), ("database", "main")]);
    let retried = Retrier::new(rig.store.clone()).retry(&[JobId::new("d").unwrap()]).await.unwrap();
    assert_eq!(rig.queue("alice"), ["d"], "{retried:?}");
    assert!(!rig.state().has_any(&[Piece::Scheduled, Piece::ScheduledByUser]));
    rig.balanced();
}

#[tokio::test]
async fn a_record_that_others_begin_anew_does_not_expire_while_it_waits() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 8).await;
    let leadership = rig.lead().await;
    rig.store.enqueue(&most(9, 16_384), &[submission("alice", "d", "h")]).await.unwrap();
    let fields = Fields::new().with("status", "done");
    take_one(&session).await.finish(Verdict::Final { keep_ms: 20_000 }, Duration::ZERO, fields, false).await.unwrap();
    leadership.upkeep(Duration::from_secs(3_600)).await.unwrap().unwrap();
    assert!(rig.state().expires_in_ms(Piece::Job("d")).is_some(), "a record it is");
    rig.submit("alice", "d", "h");
    leadership.upkeep(Duration::from_secs(3_600)).await.unwrap().unwrap();
    assert!(rig.state().stays(Piece::Job("d")));
    rig.balanced();
    rig.notice(&["alice"]).await;
    end(take_one(&session).await, "done").await;
    rig.balanced();
}
