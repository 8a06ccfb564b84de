//! What readers are shown.

use std::collections::BTreeSet;

use queue_core::calls::{Fields, Submission, Verdict};
use queue_core::events::Events;
use queue_core::ids::{App, Op};
use queue_core::inspect::{Filter, Inspect};
use queue_core::model::Status;
use testkit::end_of;

use crate::support::*;

#[tokio::test]
async fn a_listing_shows_each_job_once_wherever_it_stands_and_no_secret() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    for (user, id) in [("bob", "ended"), ("alice", "runs"), ("alice", "waits"), ("alice", "waits-longer")] {
        rig.submit(user, id, "h");
        rig.state().set(Piece::Job(id), &[("pass", "secret"), ("dbuser", "role")]);
    }
    let mut scheduled = submission("carol", "scheduled", "other");
    scheduled.delay_ms = 3_600_000;
    rig.store.enqueue(&most(64, 16_384), &[scheduled]).await.unwrap();
    rig.notice(&["bob"]).await;
    end(take_one(&session).await, "failed").await;
    rig.notice(&["alice"]).await;
    let claim = take_one(&session).await;
    let inspect = Inspect::new(rig.store.clone());
    let list = async |filter: Filter| -> Vec<String> {
        inspect.list(&filter, 100).await.unwrap().into_iter().map(|view| view.id).collect()
    };
    let all = Filter::default();
    assert_eq!(list(all.clone()).await, ["runs", "waits", "waits-longer", "scheduled", "ended"]);
    let two_of_alice = Filter { user: Some("alice".into()), ..all.clone() };
    let two_of_alice: Vec<_> = inspect.list(&two_of_alice, 2).await.unwrap().into_iter().map(|view| view.id).collect();
    assert_eq!(two_of_alice, ["runs", "waits"]);
    assert_eq!(list(Filter { status: Some(Status::Failed), ..all.clone() }).await, ["ended"]);
    assert_eq!(list(Filter { status: Some(Status::Running), ..all.clone() }).await, ["runs"]);
    assert_eq!(list(Filter { pool: Some("sql:other".into()), ..all.clone() }).await, ["scheduled"]);
    for view in inspect.list(&all, 100).await.unwrap() {
        assert_eq!((view.text("pass"), view.text("dbuser")), (None, None), "{}", view.id);
    }
    // What others have spoiled hides nothing else.
    rig.state().spoil(Piece::QueuedUsers);
    rig.state().spoil(Piece::Job("ended"));
    assert_eq!(list(all).await, ["runs", "scheduled"]);
    end(claim, "done").await;
}

#[tokio::test]
async fn a_filter_chooses_what_is_read_and_what_waits_elsewhere_costs_nothing() {
    let rig = Rig::start().await;
    rig.state().fill_tasks("app", "other", 2_000);
    for (user, id) in [("ann", "sql-1"), ("bob", "sql-2")] {
        rig.submit(user, id, "h");
    }
    let task = |id: &str, op: &str| {
        let fields = Fields::new().with("kind", "task").with("app", "app").with("op", op).with("input", "1");
        Submission { fields, ..submission("ann", id, "h") }
    };
    rig.store.enqueue(&most(64, 16_384), &[task("one", "rare"), task("two", "rare")]).await.unwrap();
    let inspect = Inspect::new(rig.store.clone());
    let (app, op) = (App::new("app").unwrap(), Op::new("rare").unwrap());
    let all = Filter::default();
    for (filter, ids) in [
        (Filter { op: Some(op.clone()), ..all.clone() }, ["one", "two"]),
        (Filter { app: Some(app), op: Some(op), ..all.clone() }, ["one", "two"]),
        (Filter { pool: Some("app.rare".into()), ..all.clone() }, ["one", "two"]),
        (Filter { pool: Some("sql:h".into()), ..all.clone() }, ["sql-1", "sql-2"]),
    ] {
        rig.redis(&["CONFIG", "RESETSTAT"]);
        let found: BTreeSet<String> =
            inspect.list(&filter, 100).await.unwrap().into_iter().map(|view| view.id).collect();
        assert_eq!(found, ids.map(str::to_owned).into(), "{filter:?}");
        let calls = rig.server.function_calls();
        assert!(calls <= 4, "{calls} calls for {filter:?}");
    }
}

#[tokio::test]
async fn the_rejected_are_listed_newest_first() {
    let rig = Rig::start().await;
    rig.state().foreign().push("alice", "no id");
    rig.state().foreign().push("bob", b"\xff");
    rig.notice(&["alice"]).await;
    rig.notice(&["bob"]).await;
    let inspect = Inspect::new(rig.store.clone());
    let rejected = inspect.rejected(10).await.unwrap();
    let shown: Vec<_> = rejected.iter().map(|entry| (entry.id.as_str(), entry.user.as_str())).collect();
    assert_eq!(shown, [("\u{fffd}", "bob"), ("no id", "alice")]);
    assert!(rejected[0].at_ms >= rejected[1].at_ms && rejected[1].at_ms > 1_600_000_000_000);
    assert_eq!(inspect.rejected(1).await.unwrap().len(), 1);
}

#[tokio::test]
async fn listeners_hear_every_move_of_a_users_jobs_and_no_others() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    let mut of_alice = Events::listen(&rig.store, &["alice"]).await.unwrap();
    let mut of_all = Events::listen(&rig.store, &[]).await.unwrap();
    rig.store
        .enqueue(&most(64, 16_384), &[submission("bob: x", "b1", "h"), submission("alice", "a1", "h")])
        .await
        .unwrap();
    for verdict in [Verdict::Next, Verdict::Back, Verdict::Later { after_ms: 0 }] {
        let claims = take(&session, 4).await;
        for claim in claims {
            if claim.job().user.as_str() == "alice" {
                put(claim, verdict.clone()).await;
            } else {
                end(claim, "failed").await;
            }
        }
    }
    let claim = testkit::eventually("the job to be due", async || take(&session, 1).await.pop()).await;
    end(claim, "done").await;
    let expected =
        ["pending", "running", "pending", "running", "pending", "running", "scheduled", "pending", "running", "done"];
    for status in expected {
        let event = end_of("an event", of_alice.next()).await.unwrap();
        assert_eq!((event.user.as_str(), event.id.as_str(), event.status.as_str()), ("alice", "a1", status));
    }
    let mut of_bob = Vec::new();
    for _ in 0..expected.len() + 3 {
        let event = end_of("an event", of_all.next()).await.unwrap();
        if event.user == "bob: x" {
            of_bob.push(event.status);
        }
    }
    assert_eq!(of_bob, ["pending", "running", "failed"]);
}
