//! New runs of jobs that have ended, and jobs that wait for a time of their own.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use queue_core::calls::{Fields, Finished, RetryOrder, RetryReply};
use queue_core::config::Limits;
use queue_core::ids::{JobId, User};
use queue_core::producer::{Database, NewJob, Producer};
use queue_core::retry::{Retried, Retrier};

use crate::support::*;

fn job(id: &str) -> NewJob {
    let mut job = NewJob::sql(User::new("alice").unwrap(), Database::Named("main".into()), "select 1");
    job.id = JobId::new(id).unwrap();
    job
}

#[tokio::test]
async fn a_new_run_is_a_job_like_any_other_and_owes_nothing_to_the_last_one() {
    let rig = Rig::start().await;
    let producer = Producer::new(rig.store.clone(), Limits::default());
    let retrier = Retrier::new(rig.store.clone());
    let session = rig.session("db:*", 4).await;
    let j = JobId::new("j").unwrap();
    let retry = async || retrier.retry(std::slice::from_ref(&j)).await.unwrap().remove(0);
    assert_eq!(retry().await, Retried::NotFound);
    producer.enqueue(job("j")).await.unwrap();
    assert_eq!(retry().await, Retried::NotOver("pending".into()));
    let claim = take_one(&session).await;
    let fence = claim.job().fence;
    assert_eq!(retry().await, Retried::NotOver("running".into()));
    rig.state()
        .set(Piece::Job("j"), &[("attempts", "4"), ("unclean", "5"), ("trace", "x"), ("cancel_requested_at", "now")]);
    assert_eq!(end(claim, "failed").await, Finished::Ended);
    assert!(rig.state().expires_in_ms(Piece::Job("j")).is_some());
    // A copy of its id that somebody left in the queue is no second job.
    rig.state().foreign().push("alice", "j");
    assert_eq!(retry().await, Retried::Queued);
    assert_eq!(rig.queue("alice"), ["j"]);
    let hash = rig.hash("j");
    assert_eq!((hash["status"].as_str(), hash["run"].as_str()), ("pending", "2"));
    for gone in ["attempts", "unclean", "trace", "cancel_requested_at", "started_at", "ended_at"] {
        assert!(!hash.contains_key(gone), "{gone}");
    }
    assert!(rig.state().stays(Piece::Job("j")));
    assert_eq!(rig.state().finished().len(), 0);
    rig.balanced();
    assert_eq!(retry().await, Retried::NotOver("pending".into()), "asked for twice, it runs once");
    let again = take_one(&session).await;
    assert!(again.job().fence > fence);
    assert_eq!(end(again, "done").await, Finished::Ended);
    assert_eq!(retry().await, Retried::NothingFailed);
    rig.balanced();
}

#[tokio::test]
async fn what_can_not_be_run_anew_is_refused_and_left_as_it_is() {
    let rig = Rig::start().await;
    for (id, fields) in [
        ("carried", &["user", "alice", "status", "failed", "query", "q", "host", "h"][..]),
        ("no-user", &["status", "failed", "query", "q", "database", "d"]),
        ("bad-query", &["user", "alice", "status", "failed", "query", "[", "database", "d"]),
        (
            "waits-for-fallback",
            &["user", "alice", "status", "failed", "query", "q", "onerror", "e", "fallback_status", "pending"],
        ),
        ("of-a-text", &["user", "text", "status", "failed", "query", "q", "database", "d"]),
    ] {
        rig.state().set(Piece::Job(id), &pairs(fields));
    }
    rig.state().spoil(Piece::Queue("text"));
    let before = rig.dump();
    let retrier = Retrier::new(rig.store.clone());
    let retry = async |id: &str| retrier.retry(&[JobId::new(id).unwrap()]).await.unwrap().remove(0);
    assert_eq!(retry("carried").await, Retried::PasswordMissing);
    assert_eq!(retry("no-user").await, Retried::Refused("it names no valid user".into()));
    assert_eq!(retry("bad-query").await, Retried::Refused("it holds no valid SQL job".into()));
    assert_eq!(retry("waits-for-fallback").await, Retried::NotOver("failed".into()));
    let refused = Retried::Refused("the key of the queue holds a string, not a list".into());
    assert_eq!(retry("of-a-text").await, refused);
    let changed = RetryOrder {
        id: JobId::new("carried").unwrap(),
        seen_query: b"another".to_vec(),
        password: Some(b"p".to_vec()),
        fields: Fields::new().with("status", "pending"),
    };
    assert_eq!(rig.store.retry(&[changed]).await.unwrap(), [RetryReply::Changed]);
    assert_eq!(rig.dump(), before);
    let with_password = Retrier::new(rig.store.clone()).password(Some("p".to_owned().into()));
    assert_eq!(with_password.retry(&[JobId::new("carried").unwrap()]).await.unwrap(), [Retried::Queued]);
    assert_eq!(rig.hash("carried")["pass"], "p");
}

#[tokio::test]
async fn a_job_runs_not_before_its_time_by_the_clock_of_redis() {
    let rig = Rig::start().await;
    let producer = Producer::new(rig.store.clone(), Limits::default());
    let time: i64 = rig.redis(&["TIME"]).texts()[0].parse().unwrap();
    let at = |offset: i64| UNIX_EPOCH.checked_add(Duration::from_secs((time + offset) as u64));
    for (id, run_at, delay, due_s) in [
        ("past", at(-100), 0, None),
        ("dawn", Some(SystemTime::UNIX_EPOCH), 0, None),
        ("later", at(500), 0, Some(500)),
        ("both", at(500), 900, Some(900)),
    ] {
        let mut job = job(id);
        (job.run_at, job.delay) = (run_at, Duration::from_secs(delay));
        producer.enqueue(job).await.unwrap();
        let due = rig.state().due_at_ms(id);
        match due_s {
            None => assert!(due.is_none() && rig.status(id) == "pending", "{id}"),
            Some(seconds) => {
                let late = due.unwrap() as i64 - (time + seconds) * 1_000;
                assert!((-1..30_000).contains(&late), "{id}: {late}");
                assert_eq!(rig.status(id), "scheduled");
            }
        }
    }
}

#[tokio::test]
async fn a_new_run_of_a_job_that_was_ended_while_it_was_scheduled_takes_it_off_the_schedule() {
    let rig = Rig::start().await;
    let producer = Producer::new(rig.store.clone(), Limits::default());
    let mut delayed = job("j");
    delayed.delay = Duration::from_secs(86_400);
    producer.enqueue(delayed).await.unwrap();
    rig.state().set_field("j", "status", "cancelled");
    let retried = Retrier::new(rig.store.clone()).retry(&[JobId::new("j").unwrap()]).await.unwrap();
    assert_eq!(retried, [Retried::Queued]);
    assert_eq!(rig.state().due_at_ms("j"), None);
    assert!(!rig.state().has(Piece::ScheduledByUser));
    rig.balanced();
}
