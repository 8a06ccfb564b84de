//! The status tracker: each scenario of the reference, each of its weaknesses, and what befalls holders, answers and keys.

use std::fmt::Write as _;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use queue_core::Store;
use queue_core::library::{Function, TRACKER_END, TRACKER_RENEW, TRACKER_START, Version};
use queue_core::model::track::{Codes, DataError, Failure, Lock, Outcome, Record, TrackStatus};
use queue_core::reply::Reply;
use queue_core::tracker::{Ended, Guard, NewRecord, Order, RunError, Selection, StartOptions, TrackError, Tracker};
use serde_json::{Value, json};
use testkit::{Point, Proxy, end_of, eventually};

use crate::support::*;

/// A life of a lock that can be waited for, and that a busy machine does not miss.
const SHORT: Duration = Duration::from_secs(1);

fn tracker(rig: &Rig) -> Tracker {
    Tracker::new(rig.store.clone(), "invoices").unwrap()
}

fn data(value: Value) -> NewRecord {
    NewRecord { data: value.as_object().cloned().unwrap_or_default(), code: None }
}

fn with_code(code: u32) -> NewRecord {
    NewRecord { code: Some(code), ..NewRecord::default() }
}

fn options() -> StartOptions {
    StartOptions::default()
}

fn expire(expire: Duration) -> StartOptions {
    StartOptions { expire, ..options() }
}

fn at_most(max_retry: u32) -> StartOptions {
    StartOptions { max_retry: NonZeroU32::new(max_retry), ..options() }
}

async fn record(tracker: &Tracker, id: &str) -> Record {
    tracker.get(id).await.unwrap().expect("there is a record")
}

async fn ids(tracker: &Tracker, selection: Selection, limit: usize, order: Order) -> Vec<String> {
    tracker.list(selection, limit, order).await.unwrap().into_iter().map(|record| record.id).collect()
}

/// Calls a script with a lock of the test's own, as a program that is killed before it does anything more.
async fn call(store: &Store, function: &'static Function, args: &[&str]) -> Reply {
    let args = ["invoices"].iter().chain(args).map(|arg| arg.as_bytes().to_vec()).collect();
    store.call(function, args).await.unwrap()
}

/// Starts a job and is gone; its lock has expired on return. Returns its fence.
async fn ghost(rig: &Rig, id: &str, lock: &str) -> String {
    let Reply::Array(started) = call(&rig.store, &TRACKER_START, &[id, lock, "1", "0"]).await else {
        panic!("no start")
    };
    let tracker = tracker(rig);
    eventually("the lock expires", async || record(&tracker, id).await.lock?.expired.then_some(())).await;
    started[1].lossy().unwrap()
}

#[tokio::test]
async fn a_job_that_succeeds_has_its_updates_and_is_never_started_again() {
    let rig = Rig::start().await;
    let tracker = tracker(&rig);
    assert!(tracker.create("job-1", data(json!({ "customer": 7, "pages": [] }))).await.unwrap());
    let new = record(&tracker, "job-1").await;
    assert_eq!((new.status, new.code, new.retry, &new.lock), (TrackStatus::Pending, 10, 0, &None));
    assert!(!tracker.create("job-1", data(json!({ "customer": 8 }))).await.unwrap(), "the id is taken");
    assert_eq!(record(&tracker, "job-1").await, new);

    let mut guard = tracker.start("job-1", options()).await.unwrap();
    assert_eq!(guard.data(), &json!({ "customer": 7, "pages": [] }));
    let begun = record(&tracker, "job-1").await;
    assert_eq!((begun.status, begun.code), (TrackStatus::InProgress, 20));
    let lock = begun.lock.unwrap();
    assert!(!lock.expired && lock.until_ms > 0 && lock.holder.contains(&std::process::id().to_string()), "{lock:?}");
    assert!(matches!(guard.updates().set("status", 40), Err(DataError::Bookkeeping(name)) if name == "status"));
    guard.updates().set("pages", [1, 2]).unwrap();
    guard.updates().set("big", u64::MAX).unwrap();
    assert_eq!(record(&tracker, "job-1").await.data["pages"], json!([]), "updates are written with the success");
    assert_eq!(guard.succeed().await.unwrap(), Ended { status: TrackStatus::Succeeded, retry: 0 });

    let done = record(&tracker, "job-1").await;
    assert_eq!((done.status, done.code, done.retry, &done.lock), (TrackStatus::Succeeded, 40, 0, &None));
    assert_eq!(done.data, json!({ "customer": 7, "pages": [1, 2], "big": u64::MAX }));
    assert_eq!(done.create_at, new.create_at);
    assert!(done.update_at >= begun.update_at && begun.update_at >= new.update_at);
    assert!(matches!(tracker.start("job-1", options()).await, Err(TrackError::AlreadySucceeded)));
    assert_eq!(record(&tracker, "job-1").await, done);
}

#[tokio::test]
async fn failures_are_counted_kept_and_in_the_end_ignored() {
    let rig = Rig::start().await;
    let tracker = tracker(&rig);
    tracker.create("j", data(json!({ "n": 1 }))).await.unwrap();
    for retry in 1..=2 {
        let mut guard = tracker.start("j", at_most(3)).await.unwrap();
        assert_eq!(guard.retry(), retry - 1);
        guard.updates().set("n", 2).unwrap();
        let failure = Failure { error: format!("no paper {retry}"), trace: "tray 1\ntray 2".into() };
        assert_eq!(guard.fail(failure.clone()).await.unwrap(), Ended { status: TrackStatus::Failed, retry });
        let failed = record(&tracker, "j").await;
        assert_eq!((failed.status, failed.code, failed.retry, &failed.lock), (TrackStatus::Failed, 30, retry, &None));
        assert_eq!((failed.errors.unwrap(), failed.data), (failure, json!({ "n": 1 })));
    }
    tracker.start("j", at_most(3)).await.unwrap().succeed().await.unwrap();
    assert_eq!(record(&tracker, "j").await.retry, 0);

    tracker.create("k", NewRecord::default()).await.unwrap();
    tracker.start("k", at_most(2)).await.unwrap().fail("first").await.unwrap();
    let ended = tracker.start("k", at_most(2)).await.unwrap().fail("second").await.unwrap();
    assert_eq!(ended, Ended { status: TrackStatus::Ignored, retry: 2 });
    assert_eq!(record(&tracker, "k").await.code, 50);
    assert!(matches!(tracker.start("k", options()).await, Err(TrackError::Ignored)));
    // An operator's word makes it what it was at first, but for its history.
    tracker.reset("k").await.unwrap();
    tracker.reset("k").await.unwrap();
    let again = record(&tracker, "k").await;
    assert_eq!((again.status, again.retry, again.history.len()), (TrackStatus::Pending, 0, 2));
    tracker.start("k", at_most(2)).await.unwrap().fail("third").await.unwrap();
    assert_eq!(record(&tracker, "k").await.status, TrackStatus::Failed);
}

#[tokio::test]
async fn each_refusal_says_why_and_changes_nothing() {
    let rig = Rig::start().await;
    let tracker = tracker(&rig);
    for id in ["locked", "done", "ignored", "own"] {
        tracker.create(id, NewRecord::default()).await.unwrap();
    }
    let guard = tracker.start("locked", options()).await.unwrap();
    tracker.start("done", options()).await.unwrap().succeed().await.unwrap();
    tracker.set_status("ignored", TrackStatus::Ignored).await.unwrap();
    tracker.set_status("own", TrackStatus::Own(60)).await.unwrap();
    let Lock { holder, until_ms, .. } = record(&tracker, "locked").await.lock.unwrap();
    let before = rig.dump();
    for _ in 0..2 {
        match tracker.start("locked", options()).await {
            Err(TrackError::Locked { by, until_ms: until }) => assert_eq!((by, until), (holder.clone(), until_ms)),
            other => panic!("{other:?}"),
        }
        assert!(matches!(tracker.start("done", options()).await, Err(TrackError::AlreadySucceeded)));
        assert!(matches!(tracker.start("ignored", options()).await, Err(TrackError::Ignored)));
        assert!(matches!(tracker.start("own", options()).await, Err(TrackError::NotReady(60))));
        assert!(matches!(tracker.start("nobody", options()).await, Err(TrackError::NotFound)));
        assert!(matches!(tracker.start("a\nb", options()).await, Err(TrackError::Id(_))));
        assert!(matches!(tracker.reset("locked").await, Err(TrackError::Locked { .. })));
        assert!(matches!(tracker.reset("done").await, Err(TrackError::AlreadySucceeded)));
        assert!(matches!(tracker.reset("nobody").await, Err(TrackError::NotFound)));
        for to in [TrackStatus::Succeeded, TrackStatus::Own(40), TrackStatus::Own(20)] {
            assert!(matches!(tracker.set_status("own", to).await, Err(TrackError::OnlyByAttempt)), "{to}");
        }
        let wrong = NewRecord { data: json!({ "lock": 1 }).as_object().cloned().unwrap(), code: None };
        assert!(matches!(tracker.create("new", wrong).await, Err(TrackError::Data(DataError::Bookkeeping(_)))));
        assert!(matches!(tracker.create("new", with_code(20)).await, Err(TrackError::OnlyByAttempt)));
    }
    assert_eq!(rig.dump(), before);
    guard.succeed().await.unwrap();
}

#[tokio::test]
async fn the_applications_codes_stay_with_the_record_whoever_changes_it() {
    let rig = Rig::start().await;
    let coded = tracker(&rig).codes(Codes::new([1, 2, 3, 4, 5]).unwrap());
    coded.create("j", NewRecord::default()).await.unwrap();
    coded.create("approved", with_code(15)).await.unwrap();
    coded.create("imported", with_code(4)).await.unwrap();
    // One that knows nothing of them.
    let plain = tracker(&rig);
    let codes = async |id: &str| record(&plain, id).await.code;
    assert_eq!((codes("j").await, codes("approved").await, codes("imported").await), (1, 15, 4));
    assert!(matches!(plain.start("imported", options()).await, Err(TrackError::AlreadySucceeded)));
    let guard = plain.start("j", at_most(2)).await.unwrap();
    assert_eq!(codes("j").await, 2);
    guard.fail("x").await.unwrap();
    assert_eq!(codes("j").await, 3);
    plain.start("j", at_most(2)).await.unwrap().fail("y").await.unwrap();
    assert_eq!(codes("j").await, 5);
    // The number for pending is pending.
    plain.set_status("j", TrackStatus::Own(1)).await.unwrap();
    assert_eq!(record(&plain, "j").await.status, TrackStatus::Pending);
    plain.start("j", options()).await.unwrap().succeed().await.unwrap();
    assert_eq!(codes("j").await, 4);

    // A start names the application's own codes from which it begins.
    assert!(matches!(plain.start("approved", options()).await, Err(TrackError::NotReady(15))));
    assert_eq!(ids(&plain, Selection::Status(TrackStatus::Own(15)), 9, Order::Oldest).await, ["approved"]);
    let ready = StartOptions { ready_codes: vec![14, 15], ..options() };
    plain.start("approved", ready).await.unwrap().fail("z").await.unwrap();
    assert_eq!(codes("approved").await, 3);
    assert!(ids(&plain, Selection::Status(TrackStatus::Own(15)), 9, Order::Oldest).await.is_empty());
}

#[tokio::test]
async fn run_records_how_the_work_ended() {
    let rig = Rig::start().await;
    let tracker = tracker(&rig);
    tracker.create("j", NewRecord::default()).await.unwrap();
    let error = tracker.run("j", options(), async |_| "x".parse::<u32>()).await.unwrap_err();
    assert!(matches!(error, RunError::Failed(_)), "{error:?}");
    let errors = record(&tracker, "j").await.errors.unwrap();
    assert!(errors.error.contains("invalid digit") && errors.trace.contains("ParseIntError"), "{errors:?}");

    let fall = async |_: &mut Guard| -> Result<(), String> { panic!("over the edge {}", 7) };
    let error = tracker.run("j", options(), fall).await.unwrap_err();
    assert!(matches!(&error, RunError::Panicked(text) if text == "over the edge 7"), "{error:?}");
    let fallen = record(&tracker, "j").await;
    assert_eq!((fallen.status, fallen.retry), (TrackStatus::Failed, 2));
    assert_eq!(fallen.errors.unwrap().error, "panicked: over the edge 7");

    // It can be spawned.
    let value = tokio::spawn({
        let tracker = tracker.clone();
        async move {
            let pages = Arc::new(3);
            let work = async |job: &mut Guard| {
                assert_eq!(*pages, 3);
                job.updates().set("pages", 3)?;
                tokio::task::yield_now().await;
                Ok::<_, DataError>(job.retry())
            };
            tracker.run("j", StartOptions::default(), work).await
        }
    });
    assert_eq!(value.await.unwrap().unwrap(), 2);
    let done = record(&tracker, "j").await;
    assert_eq!((done.status, done.data), (TrackStatus::Succeeded, json!({ "pages": 3 })));
    let refused = tracker.run("j", options(), async |_| Ok::<_, String>(())).await.unwrap_err();
    assert!(matches!(refused, RunError::Start(TrackError::AlreadySucceeded)));
    let outcomes: Vec<Outcome> = done.history.iter().map(|attempt| attempt.outcome).collect();
    assert_eq!(outcomes, [Outcome::Failed, Outcome::Failed, Outcome::Succeeded]);
}

#[path = "../../examples/tracker.rs"]
#[allow(dead_code, reason = "its main is not run here")]
mod example;

#[tokio::test]
async fn the_example_of_the_documentation_keeps_its_books() {
    let rig = Rig::start().await;
    example::keep_books(rig.store.clone()).await.unwrap();
    let tracker = tracker(&rig);
    assert_eq!(record(&tracker, "job-1").await.data, json!({ "pages": 2 }));
    assert_eq!(record(&tracker, "job-2").await.errors.unwrap().error, "there is nothing to print");
    let page = include_str!("../../../../docs/tracker.md");
    let shown = page.split("```rust\n").nth(1).unwrap().split("```").next().unwrap();
    let example = include_str!("../../examples/tracker.rs");
    for line in shown.lines().map(str::trim) {
        assert!(example.lines().any(|one| one.trim() == line), "{line}");
    }
}

#[tokio::test]
async fn a_guard_that_is_dropped_is_a_failure() {
    let rig = Rig::start().await;
    let tracker = tracker(&rig);
    tracker.create("j", NewRecord::default()).await.unwrap();
    drop(tracker.start("j", options()).await.unwrap());
    let failed = eventually("the failure is recorded", async || {
        Some(record(&tracker, "j").await).filter(|record| record.lock.is_none())
    });
    let failed = failed.await;
    assert_eq!((failed.status, failed.retry), (TrackStatus::Failed, 1));
    assert_eq!(failed.errors.unwrap().error, "dropped before it was ended");
    // Whoever stops waiting for the end does not stop it.
    let mut end = Box::pin(tracker.start("j", options()).await.unwrap().succeed());
    let none = futures_now(end.as_mut());
    assert!(none.is_none());
    drop(end);
    eventually("the success is recorded", async || {
        (record(&tracker, "j").await.status == TrackStatus::Succeeded).then_some(())
    })
    .await;
}

/// One poll.
fn futures_now<F: Future>(future: std::pin::Pin<&mut F>) -> Option<F::Output> {
    match future.poll(&mut std::task::Context::from_waker(std::task::Waker::noop())) {
        std::task::Poll::Ready(value) => Some(value),
        std::task::Poll::Pending => None,
    }
}

#[tokio::test]
async fn lists_come_from_an_index_of_their_status_in_either_order_and_in_pages() {
    let rig = Rig::start().await;
    let tracker = tracker(&rig);
    let names: Vec<String> = (0..130).map(|i| format!("job {i:03}")).collect();
    for name in &names {
        tracker.create(name, NewRecord::default()).await.unwrap();
    }
    for name in [&names[7], &names[3], &names[99]] {
        tracker.start(name, options()).await.unwrap().fail("x").await.unwrap();
    }
    let other = Tracker::new(rig.store.clone(), "letters").unwrap();
    other.create("job 000", NewRecord::default()).await.unwrap();
    rig.redis(&["CONFIG", "RESETSTAT"]);
    let failed = Selection::Status(TrackStatus::Failed);
    assert_eq!(ids(&tracker, failed, 9, Order::Oldest).await, ["job 007", "job 003", "job 099"]);
    assert_eq!(ids(&tracker, failed, 2, Order::Newest).await, ["job 099", "job 003"]);
    assert_eq!(ids(&tracker, failed, 0, Order::Newest).await, [""; 0]);
    let mut pending: Vec<String> =
        names.iter().filter(|name| !["job 007", "job 003", "job 099"].contains(&name.as_str())).cloned().collect();
    assert_eq!(ids(&tracker, Selection::Status(TrackStatus::Pending), 1_000, Order::Oldest).await, pending);
    pending.reverse();
    assert_eq!(ids(&tracker, Selection::Status(TrackStatus::Pending), 101, Order::Newest).await, pending[..101]);
    let stats = rig.redis(&["INFO", "commandstats"]).text();
    assert!(stats.contains("cmdstat_zrangebyscore"), "{stats}");
    for scan in ["cmdstat_scan", "cmdstat_keys", "cmdstat_zscan", "cmdstat_hscan"] {
        assert!(!stats.contains(scan), "{stats}");
    }
    // What failed is run again from the list.
    for failed in tracker.list(failed, 9, Order::Oldest).await.unwrap() {
        assert_eq!(failed.errors.unwrap().error, "x");
        tracker.start(&failed.id, options()).await.unwrap().succeed().await.unwrap();
    }
    assert_eq!(
        ids(&tracker, Selection::Status(TrackStatus::Succeeded), 9, Order::Oldest).await,
        ["job 007", "job 003", "job 099"]
    );
    assert_eq!(ids(&other, Selection::Status(TrackStatus::Pending), 9, Order::Oldest).await, ["job 000"]);
}

/// In the reference an expired lock was seen as free, but could not be taken.
#[tokio::test]
async fn an_expired_lock_is_taken_and_its_holder_counts_as_failed() {
    let rig = Rig::start().await;
    let tracker = tracker(&rig);
    tracker.create("j", NewRecord::default()).await.unwrap();
    ghost(&rig, "j", "ghost").await;
    assert_eq!(ids(&tracker, Selection::Expired, 9, Order::Oldest).await, ["j"]);
    assert_eq!(ids(&tracker, Selection::Status(TrackStatus::InProgress), 9, Order::Oldest).await, ["j"]);
    let guard = tracker.start("j", at_most(3)).await.unwrap();
    assert_eq!(guard.retry(), 1, "a job that kills its holders is not started for ever");
    assert!(ids(&tracker, Selection::Expired, 9, Order::Oldest).await.is_empty());
    guard.fail("x").await.unwrap();
    ghost(&rig, "j", "another ghost").await;
    assert!(matches!(tracker.start("j", at_most(3)).await, Err(TrackError::Ignored)));
    let ignored = record(&tracker, "j").await;
    assert_eq!((ignored.status, ignored.retry, ignored.lock), (TrackStatus::Ignored, 3, None));
    let history: Vec<_> = ignored.history.iter().map(|attempt| (attempt.outcome, attempt.holder.as_str())).collect();
    assert_eq!((history[0], history[2]), ((Outcome::Lost, "ghost"), (Outcome::Lost, "another ghost")));
    assert_eq!(history[1].0, Outcome::Failed);
    assert_eq!(ignored.errors.unwrap().error, "its lock expired: the holder was lost");

    // So does a reset, which the job may be started after without a limit.
    tracker.create("k", NewRecord::default()).await.unwrap();
    ghost(&rig, "k", "ghost").await;
    tracker.reset("k").await.unwrap();
    let reset = record(&tracker, "k").await;
    assert_eq!((reset.status, reset.retry, reset.history.len()), (TrackStatus::Pending, 0, 1));
    assert!(ids(&tracker, Selection::Expired, 9, Order::Oldest).await.is_empty());
}

/// In the reference a holder that outlived its lock still wrote its result.
#[tokio::test]
async fn a_holder_that_was_followed_by_another_writes_nothing() {
    let rig = Rig::start().await;
    let tracker = tracker(&rig);
    for id in ["j", "gone", "reset"] {
        tracker.create(id, NewRecord::default()).await.unwrap();
    }
    let fence = ghost(&rig, "j", "ghost").await;
    let next = tracker.start("j", options()).await.unwrap();
    assert!(next.fence().0 > fence.parse().unwrap(), "a later holder has the greater fence");
    let theirs = next.fence().to_string();
    let lock = record(&tracker, "j").await.lock.unwrap().holder;
    let gone = ghost(&rig, "gone", "ghost").await;
    rig.state().lose(Piece::Tracked("invoices", "gone"));
    let reset = ghost(&rig, "reset", "ghost").await;
    tracker.reset("reset").await.unwrap();
    let before = rig.dump();
    for (id, lock, fence) in [
        ("j", "ghost", fence.as_str()),
        ("j", "ghost", theirs.as_str()),
        ("j", lock.as_str(), fence.as_str()),
        ("gone", "ghost", gone.as_str()),
        ("reset", "ghost", reset.as_str()),
    ] {
        let done = call(&rig.store, &TRACKER_END, &[id, lock, fence, "succeeded", r#"{"a":1}"#, "", ""]).await;
        let failed = call(&rig.store, &TRACKER_END, &[id, lock, fence, "failed", "", "{}", "x"]).await;
        let renewed = call(&rig.store, &TRACKER_RENEW, &[id, lock, fence, "60000"]).await;
        assert_eq!([done, failed, renewed].map(|reply| reply.lossy().unwrap()), ["lost"; 3], "{id} {lock} {fence}");
    }
    // Its start, arriving only now, takes nothing either.
    assert_eq!(call(&rig.store, &TRACKER_START, &["reset", "ghost", "60000", "0"]).await.text(), Some("lost"));
    assert_eq!(rig.dump(), before);
    next.succeed().await.unwrap();
}

#[tokio::test]
async fn a_late_holder_that_nobody_followed_did_its_work_and_that_counts() {
    let rig = Rig::start().await;
    let tracker = tracker(&rig);
    tracker.create("j", NewRecord::default()).await.unwrap();
    let fence = ghost(&rig, "j", "ghost").await;
    assert_eq!(call(&rig.store, &TRACKER_RENEW, &["j", "ghost", &fence, "1"]).await.text(), Some("held"));
    let end = ["j", "ghost", &fence, "succeeded", r#"{"a":1}"#, "", ""];
    let Reply::Array(ended) = call(&rig.store, &TRACKER_END, &end).await else { panic!("refused") };
    assert_eq!(ended[1].text(), Some("succeeded"));
    assert_eq!(record(&tracker, "j").await.data, json!({ "a": 1 }));
}

/// In the reference the lock was not renewed.
#[tokio::test]
async fn a_lock_lives_as_long_as_its_guard() {
    let rig = Rig::start().await;
    let lines = Lines::default();
    let _on = tracing::subscriber::set_default(lines.clone());
    let tracker = tracker(&rig);
    tracker.create("later", NewRecord::default()).await.unwrap();
    // However busy this machine is, there is a life of which it does not miss a third.
    let mut life = SHORT / 2;
    let guard = eventually("a lock is renewed for longer than its life", async || {
        life *= 2;
        assert!(life < PATIENCE, "none is");
        let id = format!("j{}", life.as_secs());
        tracker.create(&id, NewRecord::default()).await.unwrap();
        let guard = tracker.start(&id, expire(life)).await.unwrap();
        let beyond = record(&tracker, &id).await.lock.map(|lock| lock.until_ms + life.as_millis() as u64);
        let outlived = eventually("it outlives itself, or another follows", async || {
            match tracker.start(&id, options()).await {
                Err(TrackError::Locked { .. }) => {}
                _ => return Some(false),
            }
            let until = record(&tracker, &id).await.lock.map(|lock| lock.until_ms);
            (until > beyond).then_some(true)
        });
        if outlived.await { Ok(guard) } else { Err(life) }
    })
    .await;
    let id = format!("j{}", life.as_secs());
    assert!(!guard.lost().is_cancelled());
    guard.succeed().await.unwrap();
    // Nothing renews what has ended: its next renewal would come before the first of a lock that is taken later.
    let tried = |id: &str| lines.count("lock renewed", id) + lines.count("lock lost", id);
    let before = tried(&id);
    let _later = tracker.start("later", expire(life)).await.unwrap();
    eventually("a later lock is renewed", async || (tried("later") > 0).then_some(())).await;
    assert_eq!(tried(&id), before);
}

#[tokio::test]
async fn a_holder_hears_that_its_lock_is_lost() {
    let rig = Rig::start().await;
    let tracker = tracker(&rig);
    tracker.create("j", NewRecord::default()).await.unwrap();
    // As if it had been paused beyond its time.
    let guard = tracker.start("j", expire(SHORT)).await.unwrap();
    let next = eventually("another follows", async || {
        // A renewal may come in between.
        rig.state().set(Piece::Tracked("invoices", "j"), &[("lock_until", "1")]);
        tracker.start("j", options()).await.ok()
    });
    let next = next.await;
    end_of("the renewal finds the lock lost", guard.lost().cancelled()).await;
    assert!(matches!(guard.succeed().await, Err(TrackError::LockLost)));
    assert_eq!(next.succeed().await.unwrap().status, TrackStatus::Succeeded);

    // Work that is run ends with its lock.
    tracker.create("k", NewRecord::default()).await.unwrap();
    let work = async |_: &mut Guard| -> Result<(), String> {
        rig.state().set(Piece::Tracked("invoices", "k"), &[("lock", "somebody")]);
        std::future::pending().await
    };
    let ended = end_of("the work is dropped", tracker.run("k", expire(SHORT), work)).await;
    assert!(matches!(ended, Err(RunError::LockLost)), "{ended:?}");
}

#[tokio::test]
async fn a_holder_that_cannot_reach_redis_stops_when_its_lock_may_be_anothers() {
    let rig = Rig::start().await;
    let proxy = Proxy::start(rig.server.addr());
    let far = Tracker::new(rig.connect_through(&proxy).await, "invoices").unwrap();
    let tracker = tracker(&rig);
    tracker.create("j", NewRecord::default()).await.unwrap();
    let guard = far.start("j", expire(SHORT)).await.unwrap();
    proxy.refuse(true);
    proxy.cut();
    end_of("it gives up by itself", guard.lost().cancelled()).await;
    let next = eventually("the lock to be free", async || match tracker.start("j", options()).await {
        Err(TrackError::Locked { .. }) => None,
        next => Some(next.unwrap()),
    })
    .await;
    proxy.refuse(false);
    assert!(matches!(guard.fail("late").await, Err(TrackError::LockLost)));
    next.succeed().await.unwrap();

    // A shorter outage costs nothing.
    tracker.create("k", NewRecord::default()).await.unwrap();
    let guard = far.start("k", options()).await.unwrap();
    proxy.refuse(true);
    proxy.cut();
    let end = tokio::spawn(guard.succeed());
    assert!(matches!(tracker.start("k", options()).await, Err(TrackError::Locked { .. })));
    proxy.refuse(false);
    assert_eq!(end.await.unwrap().unwrap().status, TrackStatus::Succeeded);
}

#[tokio::test]
async fn calls_that_are_cut_at_any_point_are_made_again_and_count_once() {
    let rig = Rig::start().await;
    let tracker = tracker(&rig);
    let points = [Point::BeforeCall, Point::BeforeReply, Point::AfterReply];
    let cases = points.into_iter().flat_map(|point| [&TRACKER_START, &TRACKER_END].map(|function| (function, point)));
    for (nth, (function, point)) in cases.enumerate() {
        let proxy = Proxy::start(rig.server.addr());
        let mut gate = Some(point);
        proxy.gate_calls(function.qualified(Version::OURS), move || gate.take());
        let far = Tracker::new(rig.connect_through(&proxy).await, "invoices").unwrap();
        let id = format!("job {nth}");
        tracker.create(&id, NewRecord::default()).await.unwrap();
        let cut = async {
            eventually("the call comes to its point", async || (proxy.stopped() > 0).then_some(())).await;
            proxy.cut();
        };
        let work = async {
            let mut guard = far.start(&id, options()).await?;
            guard.updates().set("done", nth)?;
            guard.succeed().await
        };
        let (ended, ()) = tokio::join!(work, cut);
        let ended = ended.unwrap_or_else(|error| panic!("{} {point:?}: {error}", function.name));
        assert_eq!(ended, Ended { status: TrackStatus::Succeeded, retry: 0 });
        let done = record(&tracker, &id).await;
        assert_eq!(
            (done.status, done.history.len(), done.lock),
            (TrackStatus::Succeeded, 1, None),
            "{} {point:?}",
            function.name
        );
        assert_eq!(done.data, json!({ "done": nth }));
    }
}

#[tokio::test]
async fn each_call_made_twice_answers_as_the_first_time_whatever_came_between() {
    let rig = Rig::start().await;
    let tracker = tracker(&rig);
    tracker.create("j", data(json!({ "a": 0 }))).await.unwrap();
    let start = ["j", "lock-1", "60000", "0"];
    let first = call(&rig.store, &TRACKER_START, &start).await;
    assert_eq!(call(&rig.store, &TRACKER_START, &start).await, first);
    let Reply::Array(started) = first else { panic!("no start") };
    let fence = started[1].lossy().unwrap();
    let end = ["j", "lock-1", &fence, "failed", "", r#"{"error":"x","trace":""}"#, "x"];
    let ended = call(&rig.store, &TRACKER_END, &end).await;
    assert_eq!(call(&rig.store, &TRACKER_END, &end).await, ended);
    tracker.start("j", options()).await.unwrap().fail("y").await.unwrap();
    let next = tracker.start("j", options()).await.unwrap();
    let before = rig.dump();
    assert_eq!(call(&rig.store, &TRACKER_END, &end).await, ended);
    // A start that was sent again, and arrives when all is over, does not lock.
    assert_eq!(call(&rig.store, &TRACKER_START, &start).await.text(), Some("lost"));
    assert_eq!(rig.dump(), before);
    assert_eq!(record(&tracker, "j").await.retry, 2);
    next.succeed().await.unwrap();
}

/// In the reference nothing told of earlier attempts.
#[tokio::test]
async fn the_history_tells_of_each_attempt_and_stays_small() {
    let rig = Rig::start().await;
    let tracker = tracker(&rig);
    tracker.create("j", NewRecord::default()).await.unwrap();
    for n in 0..80 {
        let error = format!("{n} \"\\/\u{1}{}", "é".repeat(3_000));
        tracker.start("j", options()).await.unwrap().fail(error).await.unwrap();
    }
    let failed = record(&tracker, "j").await;
    assert_eq!(failed.retry, 80);
    assert!(rig.state().field_of(Piece::Tracked("invoices", "j"), "history").unwrap().len() <= 32 * 1024);
    assert!(failed.history.len() > 20 && failed.history.len() < 80, "{}", failed.history.len());
    let last = failed.history.last().unwrap();
    assert!(last.error.as_ref().unwrap().starts_with("79 \"\\/\u{1}éé") && last.outcome == Outcome::Failed);
    assert!(last.started_at <= last.ended_at && last.ended_at == failed.update_at);
}

#[tokio::test]
async fn as_many_short_attempts_leave_the_history_as_a_long_one_needs() {
    let rig = Rig::start().await;
    let tracker = tracker(&rig);
    tracker.create("j", NewRecord::default()).await.unwrap();
    let fail = async |error: &str| tracker.start("j", options()).await.unwrap().fail(error).await.unwrap();
    let (mut short, mut failed) = (Vec::new(), 0);
    // Until the oldest makes way for the newest.
    while short.len() == failed {
        fail("x").await;
        failed += 1;
        short = record(&tracker, "j").await.history;
    }
    fail(&"x".repeat(1_000)).await;
    let size = rig.state().field_of(Piece::Tracked("invoices", "j"), "history").unwrap().len();
    assert!(size <= 32 * 1024, "{size} bytes");
    let history = record(&tracker, "j").await.history;
    assert!(history.len() < short.len() - 1, "{} after {}", history.len(), short.len());
    assert_eq!(history[..history.len() - 1], short[short.len() + 1 - history.len()..]);
}

#[tokio::test]
async fn records_stay_unless_their_tracker_says_how_long() {
    let rig = Rig::start().await;
    let tracker = tracker(&rig);
    let brief = tracker.clone().keep(SHORT);
    tracker.create("stays", NewRecord::default()).await.unwrap();
    for id in ["done", "ignored", "failed"] {
        brief.create(id, NewRecord::default()).await.unwrap();
    }
    let stays = |id: &str| rig.state().stays(Piece::Tracked("invoices", id));
    let goes = |id: &str| rig.state().expires_in_ms(Piece::Tracked("invoices", id)).is_some();
    // Whoever ends it.
    for id in ["stays", "done"] {
        tracker.start(id, options()).await.unwrap().succeed().await.unwrap();
    }
    tracker.start("failed", options()).await.unwrap().fail("x").await.unwrap();
    tracker.set_status("ignored", TrackStatus::Ignored).await.unwrap();
    assert!(goes("done") && goes("ignored"));
    assert!(stays("stays") && stays("failed"));
    tracker.reset("ignored").await.unwrap();
    assert!(stays("ignored"));
    eventually("the record expires", async || (!rig.state().has(Piece::Tracked("invoices", "done"))).then_some(()))
        .await;
    assert_eq!(tracker.get("done").await.unwrap(), None);
    let succeeded = Selection::Status(TrackStatus::Succeeded);
    assert_eq!(ids(&tracker, succeeded, 9, Order::Oldest).await, ["stays"]);
    // Its place in the index goes with the next that ends, or is made.
    tracker.start("failed", options()).await.unwrap().fail("x").await.unwrap();
    assert_eq!(rig.state().tracked("invoices")["succeeded"], ["stays"]);
    assert!(!rig.state().has(Piece::TrackedExpiring("invoices")));
    assert!(tracker.create("done", NewRecord::default()).await.unwrap());
}

#[tokio::test]
async fn a_record_that_is_made_anew_has_no_place_of_the_one_that_expired() {
    let rig = Rig::start().await;
    let tracker = tracker(&rig).keep(Duration::from_millis(1));
    tracker.create("j", NewRecord::default()).await.unwrap();
    tracker.start("j", options()).await.unwrap().succeed().await.unwrap();
    let has_record = || rig.state().has(Piece::Tracked("invoices", "j"));
    eventually("the record expires", async || (!has_record()).then_some(())).await;
    assert_eq!(rig.state().tracked("invoices")["succeeded"], ["j"], "its place outlives it");
    assert!(tracker.create("j", NewRecord::default()).await.unwrap());
    let places: Vec<_> = rig.state().tracked("invoices").into_iter().collect();
    assert_eq!(places, [("pending".to_owned(), vec!["j".to_owned()])]);
}

#[tokio::test]
async fn keys_that_others_have_made_something_else_of_are_told_and_left_alone() {
    let rig = Rig::start().await;
    let tracker = tracker(&rig);
    let pieces = [
        Piece::Tracked("invoices", "j"),
        Piece::TrackedByStatus("invoices", "in_progress"),
        Piece::TrackedLocks("invoices"),
        Piece::TrackedExpiring("invoices"),
    ];
    for (n, piece) in pieces.into_iter().enumerate() {
        let key = piece.name();
        tracker.create("j", NewRecord::default()).await.unwrap();
        let guard = tracker.start("j", options()).await.unwrap();
        rig.state().spoil(piece);
        let before = rig.dump();
        let is_wrong = |error: &TrackError| matches!(error, TrackError::Redis(error) if error.is_wrong_type());
        let started = tracker.start("j", options()).await.unwrap_err();
        assert!(is_wrong(&started), "{key}: {started}");
        if n == 0 {
            assert!(is_wrong(&tracker.create("j", NewRecord::default()).await.unwrap_err()));
            assert_eq!(tracker.get("j").await.unwrap(), None);
            assert!(matches!(guard.succeed().await, Err(TrackError::LockLost)));
        } else {
            assert!(is_wrong(&tracker.reset("j").await.unwrap_err()), "{key}");
            assert!(is_wrong(&guard.succeed().await.unwrap_err()), "{key}");
        }
        assert_eq!(rig.dump(), before, "{key}");
        let found = queue_core::reconcile::check(&rig.store, Duration::from_secs(60)).await.unwrap();
        assert_eq!(
            found.iter().map(|finding| (finding.kind.word(), finding.what.as_str())).collect::<Vec<_>>(),
            [("wrong-type", key.as_str())]
        );
        rig.redis(&["FLUSHDB"]);
    }
}

#[tokio::test]
async fn what_others_have_written_into_a_record_stops_nobody() {
    let rig = Rig::start().await;
    let tracker = tracker(&rig);
    tracker.create("j", NewRecord::default()).await.unwrap();
    let huge = "x".repeat(1 << 20);
    let fields: [(&str, &[u8]); 6] = [
        ("data", b"\xff{"),
        ("history", b"junk\n{\"holder\":1}\n\xff"),
        ("retry", b"many"),
        ("errors", huge.as_bytes()),
        ("keep_ms", b"-"),
        ("codes", b""),
    ];
    rig.state().set(Piece::Tracked("invoices", "j"), &fields);
    let odd = record(&tracker, "j").await;
    assert_eq!((odd.data, odd.errors, odd.history.len(), odd.retry), (json!("\u{fffd}{"), None, 0, 0));
    let mut guard = tracker.start("j", options()).await.unwrap();
    assert_eq!(guard.data(), &json!("\u{fffd}{"));
    guard.updates().set("a", 1).unwrap();
    guard.succeed().await.unwrap();
    let done = record(&tracker, "j").await;
    assert_eq!((done.status, done.data, done.history.len()), (TrackStatus::Succeeded, json!({ "a": 1 }), 1));
    rig.state().set(Piece::Tracked("invoices", "j"), &[("status", "nonsense")]);
    assert_eq!(tracker.get("j").await.unwrap(), None);
    assert!(matches!(tracker.start("j", options()).await, Err(TrackError::NotReady(_))));
}

#[tokio::test]
async fn nothing_new_is_kept_while_memory_is_nearly_full_and_what_runs_still_ends() {
    let rig = Rig::start().await;
    let tracker = tracker(&rig);
    tracker.create("j", NewRecord::default()).await.unwrap();
    rig.state().set_no_room(200, 100);
    let refused = tracker.create("k", NewRecord::default()).await.unwrap_err();
    assert!(matches!(refused, TrackError::NoRoom { used: 200, mark: 100 }), "{refused}");
    assert!(!tracker.create("j", NewRecord::default()).await.unwrap(), "what is there is there");
    rig.state().lose(Piece::NoRoom);
    rig.redis(&["CONFIG", "SET", "maxmemory", "1"]);
    let refused = tracker.create("k", NewRecord::default()).await.unwrap_err();
    assert!(matches!(&refused, TrackError::Redis(error) if error.is_transient()), "{refused}");
    tracker.start("j", options()).await.unwrap().succeed().await.unwrap();
}

#[tokio::test]
async fn the_books_agree_after_anything_and_the_doctor_finds_nothing() {
    let rig = Rig::start().await;
    let tracker = tracker(&rig);
    for n in 0..12 {
        let id = format!("j{n}");
        tracker.create(&id, NewRecord::default()).await.unwrap();
        let guard = tracker.start(&id, at_most(2)).await.unwrap();
        match n % 4 {
            0 => drop(guard.succeed().await.unwrap()),
            1 => drop(guard.fail("x").await.unwrap()),
            2 => drop(guard.fail("x").await.unwrap()),
            // Killed: its own end is never sent.
            _ => std::mem::forget(guard),
        }
        if n % 4 == 2 {
            tracker.start(&id, at_most(2)).await.unwrap().fail("x").await.unwrap();
        }
    }
    tracker.reset("j1").await.unwrap();
    tracker.set_status("j5", TrackStatus::Own(77)).await.unwrap();
    let mut indexed = String::new();
    for (index, ids) in rig.state().tracked("invoices") {
        for id in ids {
            let status = &rig.state().fields(Piece::Tracked("invoices", &id))["status"];
            assert_eq!(&index, status, "{id}");
            write!(indexed, "{id} ").unwrap();
        }
    }
    assert_eq!(indexed.split_whitespace().count(), 12, "each stands in one index: {indexed}");
    assert_eq!(rig.state().tracked_locks("invoices").len(), 3);
    assert_eq!(queue_core::reconcile::check(&rig.store, Duration::from_secs(60)).await.unwrap(), []);
}

#[tokio::test]
async fn a_clock_that_is_set_back_makes_no_fence_smaller() {
    let server = testkit::RedisServer::with_clock(&[]);
    let store = Store::connect(&config(server.url_db(DB))).await.unwrap();
    let tracker = Tracker::new(store, "invoices").unwrap();
    tracker.create("j", NewRecord::default()).await.unwrap();
    let first = tracker.start("j", options()).await.unwrap();
    let fence = first.fence();
    first.fail("x").await.unwrap();
    server.shift_clock(-3_600);
    let second = tracker.start("j", options()).await.unwrap();
    assert!(second.fence() > fence);
    second.succeed().await.unwrap();
}

#[tokio::test]
async fn each_transition_leaves_a_debug_trace_without_the_jobs_data() {
    let rig = Rig::start().await;
    let lines = Lines::default();
    let _on = tracing::subscriber::set_default(lines.clone());
    let tracker = tracker(&rig);
    tracker.create("j", data(json!({ "secret": "marker" }))).await.unwrap();
    tracker.start("j", options()).await.unwrap().fail("marker").await.unwrap();
    tracker.reset("j").await.unwrap();
    let mut life = SHORT / 2;
    let guard = eventually("a lock that is kept until its renewal", async || {
        life *= 2;
        assert!(life < PATIENCE, "none is");
        let guard = tracker.start("j", expire(life)).await.unwrap();
        let told = async || (lines.have("lock renewed") || guard.lost().is_cancelled()).then_some(());
        eventually("a renewal, or a loss", told).await;
        if guard.lost().is_cancelled() { Err(life) } else { Ok(guard) }
    });
    guard.await.succeed().await.unwrap();
    tracker.start("j", options()).await.unwrap_err();
    for line in [
        "tracked job created",
        "tracked job started",
        "tracked job ended",
        "tracked job set",
        "tracked job not started",
    ] {
        assert!(lines.have(line), "{line}: {lines:?}");
    }
    assert!(!lines.have("marker"), "{lines:?}");
}

/// The events of this thread as text.
#[derive(Debug, Clone, Default)]
struct Lines(Arc<Mutex<String>>);

impl Lines {
    fn have(&self, text: &str) -> bool {
        self.0.lock().unwrap().contains(text)
    }
    /// How many say `text` of a job.
    fn count(&self, text: &str, id: &str) -> usize {
        let id = format!(" id={id} ");
        self.0.lock().unwrap().lines().filter(|line| line.contains(text) && line.contains(&id)).count()
    }
}

impl tracing::Subscriber for Lines {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target().starts_with("queue_core")
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        struct Writer<'a>(&'a mut String);
        impl tracing::field::Visit for Writer<'_> {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                write!(self.0, " {field}={value:?}").unwrap();
            }
        }
        let mut lines = self.0.lock().unwrap();
        event.record(&mut Writer(&mut lines));
        lines.push('\n');
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}
