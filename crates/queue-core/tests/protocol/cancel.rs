//! Cancelling: the state first, the message second, and one word about who won.

use std::collections::BTreeSet;
use std::time::Duration;

use queue_core::calls::{Beat, CancelOrder, CancelReply, Fields, Finished, Mark, Verdict};
use queue_core::cancel::{Cancelled, Canceller};
use queue_core::config::Limits;
use queue_core::ids::{JobId, SessionId, User};
use queue_core::producer::{Database, NewJob, Producer};
use serde_json::{Value, json};
use testkit::end_of;

use crate::support::*;

fn canceller(rig: &Rig) -> Canceller {
    Canceller::new(rig.store.clone(), Duration::from_secs(3_600))
}

fn job_id(id: &str) -> JobId {
    JobId::new(id).unwrap()
}

#[tokio::test]
async fn a_waiting_job_is_cancelled_at_once_and_never_runs() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    for id in ["a1", "a2"] {
        rig.submit("alice", id, "h");
        rig.state().set_field(id, "pass", "secret");
    }
    rig.notice(&["alice"]).await;
    for id in ["a1", "a2"] {
        assert_eq!(canceller(&rig).cancel(&job_id(id)).await.unwrap(), Cancelled::AtOnce);
        let hash = rig.hash(id);
        assert_eq!(hash["status"], "cancelled");
        assert!(hash.contains_key("ended_at") && !hash.contains_key("pass"));
        let left = rig.state().expires_in_ms(Piece::Job(id)).expect("it goes");
        assert!((1..=3_600_000).contains(&left), "{left} ms");
        rig.balanced();
    }
    assert!(take(&session, 4).await.is_empty());
    assert!(!rig.state().has_any(&[Piece::Queue("alice"), Piece::QueuedUsers]));
    assert_eq!(canceller(&rig).cancel(&job_id("a1")).await.unwrap(), Cancelled::TooLate("cancelled".into()));
}

#[tokio::test]
async fn a_job_deep_in_a_long_queue_is_dropped_when_its_turn_comes() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    let jobs: Vec<_> = (0..1_050).map(|i| submission("alice", &format!("j{i}"), "h")).collect();
    for chunk in jobs.chunks(100) {
        rig.store.enqueue(&most(10_000, 16_384), chunk).await.unwrap();
    }
    assert_eq!(canceller(&rig).cancel(&job_id("j1")).await.unwrap(), Cancelled::AtOnce);
    assert_eq!(rig.queue("alice").len(), 1_050, "a long queue is not searched");
    for expected in ["j0", "j2"] {
        let claim = take_one(&session).await;
        assert_eq!(id(&claim), expected);
        end(claim, "done").await;
    }
    assert_eq!(rig.status("j1"), "cancelled");
    rig.balanced();
}

#[tokio::test]
async fn a_running_job_is_asked_for_by_hash_message_and_every_heartbeat() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    rig.submit("alice", "a1", "h");
    rig.notice(&["alice"]).await;
    let mut ear = rig.store.subscribe(&[rig.store.keys().cancel(session.id().as_str())], &[]).await.unwrap();
    let claim = take_one(&session).await;
    for _ in 0..2 {
        assert_eq!(canceller(&rig).cancel(&job_id("a1")).await.unwrap(), Cancelled::Requested);
        assert_eq!(end_of("an answer", ear.recv()).await.unwrap().text, "a1");
    }
    assert_eq!(rig.status("a1"), "running", "its worker says how it ends");
    let asked_at = rig.hash("a1")["cancel_requested_at"].clone();
    for _ in 0..2 {
        assert_eq!(session.beat().await.unwrap(), Beat::Alive { cancels: vec!["a1".into()], claims: vec![] });
    }
    assert_eq!(claim.pen().mark(&Fields::new()).await.unwrap(), Mark::CancelAsked);
    assert_eq!(end(claim, "cancelled").await, Finished::Ended);
    assert_eq!(session.beat().await.unwrap(), Beat::Alive { cancels: vec![], claims: vec![] });
    assert_eq!(rig.hash("a1")["cancel_requested_at"], asked_at);
}

#[tokio::test]
async fn a_cancel_that_somebody_writes_into_the_hash_of_a_running_job_is_heard() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    for (user, hear) in [("alice", "beat"), ("bob", "mark")] {
        rig.submit(user, user, "h");
        rig.notice(&[user]).await;
        let claim = take_one(&session).await;
        assert_eq!(session.beat().await.unwrap(), Beat::Alive { cancels: vec![], claims: vec![] });
        rig.state().set_field(user, "status", "cancelled");
        let running = Fields::new().with("status", "running");
        match hear {
            "beat" => {
                let told = Beat::Alive { cancels: vec![user.into()], claims: vec![] };
                assert_eq!(session.beat().await.unwrap(), told);
            }
            _ => assert_eq!(claim.pen().mark(&running).await.unwrap(), Mark::CancelAsked),
        }
        assert_eq!(claim.pen().mark(&running).await.unwrap(), Mark::CancelAsked);
        assert_eq!(end(claim, "cancelled").await, Finished::Ended);
        assert_eq!(session.beat().await.unwrap(), Beat::Alive { cancels: vec![], claims: vec![] });
        rig.balanced();
    }
}

#[tokio::test]
async fn no_late_end_overwrites_a_cancel_that_somebody_wrote_into_the_hash() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    let ends = [
        ("final", final_verdict(), "done"),
        ("next", Verdict::Next, "pending"),
        ("back", Verdict::Back, "pending"),
        ("later", Verdict::Later { after_ms: 60_000 }, "scheduled"),
    ];
    for (user, verdict, status) in ends {
        rig.submit(user, user, "h");
        rig.notice(&[user]).await;
        let claim = take_one(&session).await;
        rig.state().set_field(user, "status", "cancelled");
        let fields = Fields::new().with("status", status).with("query", "as far as it came");
        assert_eq!(claim.finish(verdict, Duration::ZERO, fields, false).await.unwrap(), Finished::Ended);
        let hash = rig.hash(user);
        assert_eq!((&*hash["status"], &*hash["query"]), ("cancelled", "as far as it came"), "{user}");
        assert!(hash.contains_key("ended_at") && rig.state().expires_in_ms(Piece::Job(user)).is_some(), "{user}");
        assert!(take(&session, 4).await.is_empty(), "{user}");
        rig.balanced();
    }
}

#[tokio::test]
async fn a_waiting_job_that_somebody_else_cancelled_is_filed_when_its_turn_comes() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    rig.submit("alice", "a1", "h");
    rig.state().set(Piece::Job("a1"), &[("status", "cancelled"), ("pass", "secret")]);
    rig.notice(&["alice"]).await;
    assert!(take(&session, 4).await.is_empty());
    assert_eq!(rig.status("a1"), "cancelled");
    assert!(!rig.hash("a1").contains_key("pass"));
    assert!(rig.state().expires_in_ms(Piece::Job("a1")).is_some());
    rig.balanced();
}

#[tokio::test]
async fn when_a_job_ends_first_the_cancel_is_too_late_and_the_record_stays() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    for (user, status) in [("alice", "done"), ("bob", "failed"), ("carol", "unknown")] {
        rig.submit(user, user, "h");
        rig.notice(&[user]).await;
        end(take_one(&session).await, status).await;
        let before = rig.dump();
        assert_eq!(canceller(&rig).cancel(&job_id(user)).await.unwrap(), Cancelled::TooLate(status.into()));
        assert_eq!(rig.dump(), before);
    }
    assert_eq!(canceller(&rig).cancel(&job_id("nobody")).await.unwrap(), Cancelled::NotFound);
    rig.state().spoil(Piece::Job("text"));
    assert_eq!(canceller(&rig).cancel(&job_id("text")).await.unwrap(), Cancelled::NotFound);
    assert!(rig.state().is_spoiled(Piece::Job("text")));
}

#[tokio::test]
async fn a_job_that_changed_since_it_was_looked_at_is_not_overwritten() {
    let rig = Rig::start().await;
    rig.submit("alice", "a1", "h");
    rig.state().set_field("a1", "query", r#"[{"query":"select 1","status":"done"}]"#);
    let before = rig.dump();
    let order = CancelOrder {
        id: job_id("a1"),
        seen_query: b"select 1".to_vec(),
        fields: Fields::new().with("query", "what an older look would write"),
    };
    assert_eq!(rig.store.cancel(KEEP_MS, &[order]).await.unwrap(), [CancelReply::Changed]);
    assert_eq!(rig.dump(), before);
}

#[tokio::test]
async fn a_scheduled_job_is_cancelled_and_does_not_come_back() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    let mut job = submission("alice", "a1", "h");
    job.delay_ms = 3_600_000;
    rig.store.enqueue(&most(64, 16_384), &[job]).await.unwrap();
    assert_eq!(rig.status("a1"), "scheduled");
    assert_eq!(canceller(&rig).cancel(&job_id("a1")).await.unwrap(), Cancelled::AtOnce);
    assert!(!rig.state().has(Piece::Scheduled));
    assert!(take(&session, 1).await.is_empty());
    assert_eq!(rig.status("a1"), "cancelled");
}

#[tokio::test]
async fn a_cancel_asked_for_while_a_job_is_put_off_does_not_wait_for_the_retry() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    rig.submit("alice", "a1", "h");
    rig.notice(&["alice"]).await;
    let claim = take_one(&session).await;
    assert_eq!(canceller(&rig).cancel(&job_id("a1")).await.unwrap(), Cancelled::Requested);
    put(claim, Verdict::Later { after_ms: 3_600_000 }).await;
    let again = take_one(&session).await;
    assert!(again.job().bytes("cancel_requested_at").is_some());
    end(again, "cancelled").await;
}

/// Seen to go wrong in the model: the record said `cancelled`, and the statement of the lost worker had been committed.
#[tokio::test]
async fn a_waiting_job_that_a_lost_worker_may_have_carried_out_is_settled_before_it_is_cancelled() {
    let rig = Rig::start().await;
    let (doomed, heir) = (rig.session("sql:*", 4).await, rig.session("sql:*", 4).await);
    let leadership = rig.lead().await;
    for (user, delay_ms) in [("alice", 0), ("bob", 3_600_000)] {
        rig.submit(user, user, "h");
        rig.notice(&[user]).await;
        let claim = take_one(&doomed).await;
        assert_eq!(claim.pen().mark(&Fields::new().with("trace", "0 transaction 7")).await.unwrap(), Mark::Held);
        if delay_ms > 0 {
            put(claim, Verdict::Later { after_ms: delay_ms }).await;
        }
    }
    let leader = SessionId::new("leader:1:a").unwrap();
    rig.store.session_reclaim(doomed.id().as_str(), 0, &leader, leadership.term()).await.unwrap().unwrap();

    for (user, status) in [("alice", "pending"), ("bob", "scheduled")] {
        for _ in 0..2 {
            assert_eq!(canceller(&rig).cancel(&job_id(user)).await.unwrap(), Cancelled::Requested);
        }
        assert_eq!(rig.status(user), status);
        let claim = take_one(&heir).await;
        assert_eq!((id(&claim), claim.job().text("trace")), (user, Ok(Some("0 transaction 7"))));
        assert!(claim.job().bytes("cancel_requested_at").is_some());
        let found = Fields::new().with("status", "done").with("trace", "");
        claim.finish(final_verdict(), Duration::ZERO, found, false).await.unwrap();
        assert_eq!(canceller(&rig).cancel(&job_id(user)).await.unwrap(), Cancelled::TooLate("done".into()));
        rig.balanced();
    }
}

/// Seen to go wrong under faults: the record said `cancelled`, and its statement that it ran for ever.
#[tokio::test]
async fn what_a_lost_worker_may_have_done_is_found_out_though_somebody_wrote_that_it_is_cancelled() {
    let rig = Rig::start().await;
    let (doomed, heir) = (rig.session("sql:*", 4).await, rig.session("sql:*", 4).await);
    let leadership = rig.lead().await;
    let cancel = |id: &str| rig.state().set_field(id, "status", "cancelled");
    for user in ["claimed", "waiting", "scheduled"] {
        rig.submit(user, user, "h");
        rig.notice(&[user]).await;
        let claim = take_one(&doomed).await;
        assert_eq!(claim.pen().mark(&Fields::new().with("trace", "0 transaction 7")).await.unwrap(), Mark::Held);
        match user {
            "claimed" => cancel(user),
            "scheduled" => {
                put(claim, Verdict::Later { after_ms: 0 }).await;
                cancel(user);
            }
            _ => {}
        }
    }
    let leader = SessionId::new("leader:1:a").unwrap();
    rig.store.session_reclaim(doomed.id().as_str(), 0, &leader, leadership.term()).await.unwrap().unwrap();
    cancel("waiting");
    assert_eq!(leadership.upkeep(Duration::from_secs(60)).await.unwrap().unwrap().promoted, 1);

    let mut left = BTreeSet::from(["claimed".to_owned(), "waiting".into(), "scheduled".into()]);
    while !left.is_empty() {
        let claim = take_one(&heir).await;
        let user = id(&claim).to_owned();
        assert!(left.remove(&user), "{user} is taken once more");
        // The database could not be asked: that is no answer.
        let unknown = Fields::new().with("status", "scheduled");
        claim.finish(Verdict::Later { after_ms: 3_600_000 }, Duration::ZERO, unknown, false).await.unwrap();
        let claim = take_one(&heir).await;
        let seen = ["status", "trace"].map(|name| claim.job().text(name).unwrap().unwrap_or_default().to_owned());
        assert_eq!((id(&claim), seen), (&*user, ["cancelled".into(), "0 transaction 7".into()]));
        let found = Fields::new().with("status", "done").with("trace", "").with("query", "as far as it came");
        claim.finish(final_verdict(), Duration::ZERO, found, false).await.unwrap();
        let hash = rig.hash(&user);
        assert_eq!((&*hash["status"], &*hash["query"]), ("cancelled", "as far as it came"), "{user}");
        assert!(rig.state().expires_in_ms(Piece::Job(&user)).is_some(), "{user}");
    }
    assert!(take(&heir, 4).await.is_empty());
    rig.balanced();
}

async fn submit_chain(rig: &Rig, query: Value) -> JobId {
    let producer = Producer::new(rig.store.clone(), Limits::default());
    let job = NewJob::sql(User::new("alice").unwrap(), Database::Named("main".into()), query.to_string());
    producer.enqueue(job).await.unwrap().id().clone()
}

#[tokio::test]
async fn between_two_statements_the_rest_is_skipped_and_what_was_done_stays_done() {
    let rig = Rig::start().await;
    let session = rig.session("db:*", 4).await;
    let id =
        submit_chain(&rig, json!({"query": [{"query": "select 1"}, {"query": "select 2"}, {"query": "select 3"}]}))
            .await;
    let claim = take_one(&session).await;
    let stored = json!({"query": [
        {"query": "select 1", "status": "done"},
        {"query": "select 2", "status": "pending"},
        {"query": "select 3", "status": "pending"},
    ]});
    let fields = Fields::new().with("status", "pending").with("query", stored.to_string());
    claim.finish(Verdict::Next, Duration::ZERO, fields, false).await.unwrap();
    assert_eq!(canceller(&rig).cancel(&id).await.unwrap(), Cancelled::AtOnce);
    let hash = rig.hash(id.as_str());
    assert_eq!(hash["status"], "cancelled");
    let query: Value = serde_json::from_str(&hash["query"]).unwrap();
    let statuses: Vec<&str> =
        query["query"].as_array().unwrap().iter().map(|entry| entry["status"].as_str().unwrap()).collect();
    assert_eq!(statuses, ["done", "cancelled", "skipped"]);
    assert!(take(&session, 4).await.is_empty());
    rig.balanced();
}

#[tokio::test]
async fn a_job_that_failed_and_waits_for_its_fallback_stays_failed_and_the_fallback_does_not_run() {
    let rig = Rig::start().await;
    let session = rig.session("db:*", 4).await;
    let id = submit_chain(&rig, json!({"query": [{"query": "select 1"}], "onerror": "select 'oh'"})).await;
    assert_eq!(rig.hash(id.as_str())["fallback_status"], "pending");
    let claim = take_one(&session).await;
    let stored = json!({"query": [{"query": "select 1", "status": "failed"}], "onerror": "select 'oh'"});
    let fields = Fields::new().with("status", "failed").with("query", stored.to_string());
    claim.finish(Verdict::Next, Duration::ZERO, fields, false).await.unwrap();
    assert_eq!(rig.queue("alice"), [id.as_str()]);
    assert_eq!(canceller(&rig).cancel(&id).await.unwrap(), Cancelled::AtOnce);
    let hash = rig.hash(id.as_str());
    assert_eq!((hash["status"].as_str(), hash["fallback_status"].as_str()), ("failed", "cancelled"));
    assert!(take(&session, 4).await.is_empty());

    // The same where nobody can read what the fallback is: the final status is not written twice.
    rig.submit("bob", "b1", "h");
    rig.state().set(Piece::Job("b1"), &[("status", "failed"), ("fallback_status", "pending"), ("query", "{")]);
    assert_eq!(canceller(&rig).cancel(&job_id("b1")).await.unwrap(), Cancelled::TooLate("failed".into()));
    assert_eq!(rig.status("b1"), "failed");
}

#[tokio::test]
async fn a_waiting_job_that_nobody_can_read_is_cancelled_all_the_same() {
    let rig = Rig::start().await;
    for (id, query) in [("a1", &b"{"[..]), ("a2", b"\xff"), ("a3", b"")] {
        rig.submit("alice", id, "h");
        rig.state().set_field(id, "query", query);
        assert_eq!(canceller(&rig).cancel(&job_id(id)).await.unwrap(), Cancelled::AtOnce);
        assert_eq!(rig.status(id), "cancelled");
        assert_eq!(rig.state().field_of(Piece::Job(id), "query").unwrap(), query, "what it was is still to be seen");
    }
}

#[tokio::test]
async fn a_job_whose_hash_names_another_user_is_cancelled_in_no_other_users_queue() {
    let rig = Rig::start().await;
    rig.submit("alice", "a1", "h");
    rig.state().set(Piece::Job("m1"), &[("user", "alice"), ("status", "pending"), ("host", "h")]);
    assert_eq!(canceller(&rig).cancel(&job_id("m1")).await.unwrap(), Cancelled::AtOnce);
    assert_eq!(rig.queue("alice"), ["a1"]);
    rig.state().set(Piece::Job("m2"), &[("user", "tab\tin"), ("status", "pending")]);
    assert_eq!(canceller(&rig).cancel(&job_id("m2")).await.unwrap(), Cancelled::AtOnce);
}
