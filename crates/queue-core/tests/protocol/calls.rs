//! The functions of the library: each loads, none minds being forgotten, a stale caller changes nothing, every reply is known.

use queue_core::calls::{
    Beat, CancelOrder, CancelReply, Enqueued, Fields, Finish, Finished, Lead, Mark, NotLeader, SessionEnd, TakeReply,
    Upkeep, Verdict,
};
use queue_core::ids::{Fence, JobId, SessionId};
use queue_core::leader;
use queue_core::library;
use testkit::end_of;

use crate::support::*;

#[tokio::test]
async fn each_function_loads_by_itself_too() {
    let rig = Rig::start().await;
    for function in library::TABLE {
        let text = function.script();
        assert_eq!(rig.redis(&["SCRIPT", "LOAD", text.as_str()]).text().len(), 40, "{}", function.name);
    }
}

#[tokio::test]
async fn functions_that_the_server_forgot_between_any_two_calls_run_all_the_same() {
    let rig = Rig::start().await;
    let flush = || rig.redis(&["FUNCTION", "FLUSH"]);
    flush();
    let session = rig.session("sql:*", 4).await;
    flush();
    let enqueued = rig.store.enqueue(&most(64, 16_384), &[submission("alice", "a1", "h")]).await.unwrap();
    assert_eq!(enqueued, [Enqueued::Queued]);
    flush();
    let claim = take_one(&session).await;
    flush();
    assert_eq!(claim.pen().mark(&Fields::new().with("trace", "t")).await.unwrap(), Mark::Held);
    flush();
    assert_eq!(end(claim, "done").await, Finished::Ended);
    assert_eq!(rig.status("a1"), "done");
    assert_eq!(rig.hash("a1")["trace"], "t");
    rig.balanced();
}

#[tokio::test]
async fn a_stale_holder_is_told_so_and_changes_nothing() {
    let rig = Rig::start().await;
    let (holder, other) = (rig.session("sql:*", 4).await, rig.session("sql:*", 4).await);
    rig.submit("alice", "a1", "h");
    rig.submit("alice", "a2", "h");
    rig.notice(&["alice"]).await;
    let claim = take_one(&holder).await;
    let (id, fence) = (claim.job().id.clone(), claim.job().fence);
    let nobody = SessionId::new("nobody:1:x").unwrap();
    let unclaimed = JobId::new("a2").unwrap();
    let cases = [
        (holder.id(), &id, Fence(fence.0 - 1)),
        (holder.id(), &id, Fence(fence.0 + 1)),
        (other.id(), &id, fence),
        (&nobody, &id, fence),
        (holder.id(), &unclaimed, fence),
    ];
    let before = rig.dump();
    for (session, id, fence) in cases {
        let fields = Fields::new().with("status", "done").with("trace", "stale");
        assert_eq!(rig.store.mark(session, id, fence, &fields).await.unwrap(), Mark::Stale);
        assert_eq!(rig.store.mark(session, id, fence, &Fields::new()).await.unwrap(), Mark::Stale);
        for verdict in [final_verdict(), Verdict::Next, Verdict::Back, Verdict::Later { after_ms: 5 }] {
            let finish = Finish { id: id.clone(), fence, verdict, ran_us: 7, fields: fields.clone() };
            assert_eq!(rig.store.finish(session, true, &[finish]).await.unwrap(), [Finished::Stale]);
        }
    }
    assert_eq!(rig.dump(), before);
    assert_eq!(end(claim, "done").await, Finished::Ended, "the holder's own word still counts");
}

#[tokio::test]
async fn who_does_not_lead_is_told_so_and_changes_nothing() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    let leadership = rig.lead().await;
    let leader = SessionId::new("leader:1:a").unwrap();
    // Something to do for every task of the leader.
    rig.submit("alice", "a1", "h");
    rig.notice(&["alice"]).await;
    let claim = take_one(&session).await;
    rig.state().set(Piece::Job("due"), &[("user", "bob"), ("status", "scheduled")]);
    rig.state().schedule_job("due", 1);
    rig.state().foreign().push_to_host("h", "old");
    rig.state()
        .set(Piece::Job("old"), &[("user", "bob"), ("status", "done"), ("updated_at", "2001-01-01T00:00:00.000Z")]);
    rig.state().foreign().show_working("alice", "gone");
    let beat = rig.state().beat(session.id().as_str());
    let before = rig.dump();
    let store = &rig.store;
    for (who, term) in [(&leader, leadership.term() + 1), (&leader, 0), (session.id(), leadership.term())] {
        assert_eq!(store.upkeep(who, term, 0).await.unwrap(), Err(NotLeader));
        assert_eq!(store.host_lock(who, term, 5_000, &["h".into()]).await.unwrap(), Err(NotLeader));
        assert_eq!(store.old_queue(who, term, b"h").await.unwrap(), Err(NotLeader));
        assert_eq!(store.sweep(who, term, 0, &[b"old".to_vec()]).await.unwrap(), Err(NotLeader));
        assert_eq!(store.wip(who, term, b"alice").await.unwrap(), Err(NotLeader));
        assert_eq!(store.schedule_due(who, term, 0, 1).await.unwrap(), Err(NotLeader));
        assert_eq!(store.session_reclaim(session.id().as_str(), beat, who, term).await.unwrap(), Err(NotLeader));
    }
    assert_eq!(rig.dump(), before);

    // The leader itself finds something to do in each of them.
    let term = leadership.term();
    assert_eq!(store.upkeep(&leader, term, KEEP_MS).await.unwrap().unwrap().promoted, 1);
    assert_eq!(store.host_lock(&leader, term, 5_000, &["h".into()]).await.unwrap().unwrap(), Vec::<String>::new());
    assert_eq!(rig.state().foreign().host_lock("h").as_deref(), Some(&*format!("drayman:{}", leader.as_str())));
    assert_eq!(store.old_queue(&leader, term, b"h").await.unwrap(), Ok((1, false)));
    assert_eq!(store.sweep(&leader, term, 0, &[b"old".to_vec()]).await.unwrap(), Ok(1));
    assert_eq!(store.wip(&leader, term, b"alice").await.unwrap(), Ok(1));
    let reclaimed = store.session_reclaim(session.id().as_str(), beat, &leader, term).await.unwrap();
    assert_eq!(reclaimed, Ok(SessionEnd::Ended(1)));
    drop(claim);
}

/// One call for each reply that a script's header names and that no other test of this file has produced.
#[tokio::test]
async fn every_documented_reply_is_given_and_read() {
    let rig = Rig::start().await;
    let store = &rig.store;
    let session = rig.session("sql:*", 4).await;
    let leader = SessionId::new("leader:1:a").unwrap();
    let follower = SessionId::new("follower:1:a").unwrap();

    // lead
    assert_eq!(store.lead(&leader, None).await.unwrap(), Lead::Nobody);
    assert_eq!(store.lead(&leader, Some(60_000)).await.unwrap(), Lead::Leader(1));
    assert_eq!(store.lead(&follower, Some(60_000)).await.unwrap(), Lead::Follower("leader:1:a".into()));

    // session_open
    rig.state().set_version("7.3");
    let refused = store.session_open(&follower, "sql:*", "host", 1, &[]).await.unwrap_err();
    assert!(matches!(&refused, queue_core::Error::Version { found, .. } if found == "7.3"), "{refused}");
    rig.state().set_version("1.99");
    store.session_open(&follower, "sql:*", "host", 1, &[]).await.expect("a newer minor version is no hindrance");

    // enqueue
    rig.state().spoil(Piece::Queue("odd"));
    let jobs = ["a1", "a1", "a2", "a3"].map(|id| submission("alice", id, "h"));
    let replies = store.enqueue(&most(2, 16_384), &jobs).await.unwrap();
    assert_eq!(replies, [Enqueued::Queued, Enqueued::Exists, Enqueued::Queued, Enqueued::Full(2)]);
    let replies =
        store.enqueue(&most(2, 3), &[submission("bob", "b1", "h"), submission("odd", "o1", "h")]).await.unwrap();
    assert_eq!(replies[0], Enqueued::TooLarge { bytes: 9, most: 3 });
    assert!(matches!(&replies[1], Enqueued::Refused(reason) if reason.contains("holds a string")), "{replies:?}");

    // take, mark, cancel, finish
    let claim = take_one(&session).await;
    let pen = claim.pen();
    assert_eq!(pen.mark(&Fields::new()).await.unwrap(), Mark::Held);
    let order = |id: &str, seen: &str| CancelOrder {
        id: JobId::new(id).unwrap(),
        seen_query: seen.into(),
        // What was seen counts where there is something to write.
        fields: Fields::new().with("query", "select 2"),
    };
    let orders = [order("a1", ""), order("a2", "select 2"), order("a2", "select 1"), order("a2", ""), order("no", "")];
    assert_eq!(
        store.cancel(KEEP_MS, &orders).await.unwrap(),
        [
            CancelReply::Requested,
            CancelReply::Changed,
            CancelReply::Cancelled,
            CancelReply::Over("cancelled".into()),
            CancelReply::Missing
        ]
    );
    assert_eq!(pen.mark(&Fields::new()).await.unwrap(), Mark::CancelAsked);
    let finish = Finish {
        id: claim.job().id.clone(),
        fence: claim.job().fence,
        verdict: final_verdict(),
        ran_us: 0,
        fields: Fields::new().with("status", "done"),
    };
    let stale = Finish { fence: Fence(1), ..finish.clone() };
    let ends = [finish.clone(), finish, stale];
    let replies = store.finish(session.id(), false, &ends).await.unwrap();
    assert_eq!(replies, [Finished::Ended, Finished::Repeated, Finished::Stale]);

    // session_beat: the claim object still counts as held while Redis holds none.
    assert_eq!(session.beat().await.unwrap(), Beat::Alive { cancels: vec![], claims: vec![] });
    drop(claim);

    // upkeep, old_queue, session_end
    assert_eq!(store.upkeep(&leader, 1, KEEP_MS).await.unwrap(), Ok(Upkeep::default()));
    assert_eq!(store.old_queue(&leader, 1, b"none").await.unwrap(), Ok((0, false)));
    let name = session.id().as_str();
    assert_eq!(store.session_reclaim(name, 0, &leader, 1).await.unwrap(), Ok(SessionEnd::Alive), "it has beaten since");
    assert_eq!(store.session_reclaim(name, 1, &leader, 1).await.unwrap(), Ok(SessionEnd::Ended(0)));
    assert_eq!(session.beat().await.unwrap(), Beat::Lost);
    let reply = store.take(session.id(), "sql:*", 9, 1, 4, "jobs", &[]).await.unwrap();
    assert!(matches!(reply, TakeReply::Lost));
    leader::resign(store, &leader).await.unwrap();
}

#[tokio::test]
async fn an_old_queue_longer_than_one_call_says_that_there_is_more_and_keeps_its_order() {
    let rig = Rig::start().await;
    let leadership = rig.lead().await;
    let leader = SessionId::new("leader:1:a").unwrap();
    let state = rig.state();
    let names: Vec<String> = (0..1_200).map(|i| format!("j{i:04}")).collect();
    for name in &names {
        state.foreign().write(name, &[("user", "alice"), ("status", "pending"), ("host", "h")]);
        state.foreign().push_to_host("h", name);
    }
    state.foreign().push("alice", "later");
    assert_eq!(rig.store.old_queue(&leader, leadership.term(), b"h").await.unwrap(), Ok((1_000, true)));
    assert_eq!(leadership.move_old_queues().await.unwrap(), Ok(200));
    let queue = rig.queue("alice");
    assert_eq!(queue[..1_200], names, "the oldest of the old layout is the head");
    assert_eq!(queue[1_200..], ["later"]);
    assert_eq!(leadership.move_old_queues().await.unwrap(), Ok(0));
    end_of("an answer", rig.session("sql:*", 1)).await;
    rig.state().set_field("later", "user", "alice");
    rig.balanced();
}
