//! Sessions live by their heartbeat, the leader buries the dead, and nobody who is wrong about either does harm.

use std::time::{Duration, Instant};

use queue_core::calls::{Beat, Fields, Finish, Finished, Lead, Mark, NotLeader, SessionEnd, TakeReply, Verdict};
use queue_core::cancel::{Cancelled, Canceller};
use queue_core::ids::SessionId;
use queue_core::leader::{self, SessionWatch};
use testkit::{Proxy, eventually};

use crate::support::*;

const LIFETIME: Duration = Duration::from_millis(800);

fn leader_id() -> SessionId {
    SessionId::new("leader:1:a").unwrap()
}

#[tokio::test]
async fn a_session_that_stands_still_for_a_lifetime_is_dead_and_one_that_beats_is_not() {
    let rig = Rig::start().await;
    let (alive, dead) = (rig.session("sql:*", 4).await, rig.session("sql:*", 4).await);
    rig.submit("alice", "a1", "h");
    rig.notice(&["alice"]).await;
    let claim = take_one(&dead).await;
    let leadership = rig.lead().await;
    let mut watch = SessionWatch::default();
    let start = Instant::now();
    let buried = eventually("the dead to be found", async || {
        assert!(matches!(alive.beat().await.unwrap(), Beat::Alive { .. }));
        let buried = watch.pass(&leadership, LIFETIME).await.unwrap().unwrap();
        (!buried.is_empty()).then_some(buried)
    })
    .await;
    assert!(start.elapsed() >= LIFETIME, "after {:?}", start.elapsed());
    assert_eq!(buried, [(dead.id().to_string(), 1)]);
    assert_eq!(rig.state().sessions(), [alive.id().as_str()]);
    assert_eq!(rig.queue("alice"), ["a1"]);
    drop(claim);
    rig.balanced();
}

#[tokio::test]
async fn a_watch_that_was_interrupted_begins_anew() {
    let rig = Rig::start().await;
    let leadership = rig.lead().await;
    for paused in [false, true] {
        let silent = rig.session("sql:*", 4).await;
        let mut watch = SessionWatch::default();
        let begin = Instant::now();
        // Nearly a lifetime of silence is seen …
        assert_eq!(watch.pass(&leadership, LIFETIME).await.unwrap().unwrap(), []);
        let nearly = if paused { LIFETIME * 2 } else { LIFETIME / 2 };
        eventually("a part of a lifetime without a look", async || (begin.elapsed() > nearly).then_some(())).await;
        // … then the watch is told of an outage, or was itself asleep.
        if !paused {
            watch.restart();
        }
        let again = Instant::now();
        let buried = eventually("the session's end", async || {
            let buried = watch.pass(&leadership, LIFETIME).await.unwrap().unwrap();
            (!buried.is_empty()).then_some(buried)
        });
        assert_eq!(buried.await, [(silent.id().to_string(), 0)]);
        assert!(again.elapsed() >= LIFETIME, "paused: {paused}: after {:?}", again.elapsed());
    }
}

#[tokio::test]
async fn jobs_of_a_dead_session_go_back_first_in_their_order_and_say_what_happened() {
    let rig = Rig::start().await;
    let doomed = rig.session("sql:*", 8).await;
    // One user, three hosts: all three are taken at once.
    for (id, host) in [("a1", "h1"), ("a2", "h2"), ("a3", "h3"), ("a4", "h1")] {
        rig.submit("alice", id, host);
    }
    rig.state().set_field("a2", "unclean", "4");
    rig.state().set(Piece::Job("a3"), &[("status", "failed"), ("fallback_status", "pending")]);
    rig.notice(&["alice"]).await;
    let claims = take(&doomed, 8).await;
    assert_eq!(ids(&claims), ["a1", "a2", "a3"]);
    claims[2].pen().mark(&Fields::new().with("fallback_status", "running")).await.unwrap();
    let canceller = Canceller::new(rig.store.clone(), PATIENCE);
    assert_eq!(canceller.cancel(&claims[1].job().id).await.unwrap(), Cancelled::Requested);
    let term = rig.lead().await.term();
    let reply = rig.store.session_reclaim(doomed.id().as_str(), 0, &leader_id(), term).await.unwrap();
    assert_eq!(reply, Ok(SessionEnd::Ended(3)));
    assert_eq!(rig.queue("alice"), ["a1", "a2", "a3", "a4"]);
    let field = |id: &str, field: &str| rig.hash(id).get(field).cloned().unwrap_or_default();
    assert_eq!(["a1", "a2", "a3"].map(|id| field(id, "unclean")), ["1", "5", "1"]);
    assert_eq!(["a1", "a2", "a3"].map(|id| field(id, "status")), ["pending", "pending", "failed"]);
    assert_eq!(field("a3", "fallback_status"), "pending");
    assert_eq!(field("a1", "lost_worker"), doomed.id().as_str());
    rig.balanced();

    let heir = rig.session("sql:*", 8).await;
    let claims = take(&heir, 8).await;
    assert_eq!(ids(&claims), ["a1", "a2", "a3"]);
    assert!(claims[1].job().bytes("cancel_requested_at").is_some(), "the wish to cancel is passed on");
    assert_eq!(claims[1].job().number("unclean"), 5);
}

#[tokio::test]
async fn a_reclaimed_session_is_told_so_by_everything_it_asks_and_changes_nothing() {
    let rig = Rig::start().await;
    let doomed = rig.session("sql:*", 8).await;
    for user in ["alice", "bob"] {
        rig.submit(user, user, "h");
    }
    rig.notice(&["alice", "bob"]).await;
    let claims = take(&doomed, 8).await;
    let term = rig.lead().await.term();
    rig.store.session_reclaim(doomed.id().as_str(), 0, &leader_id(), term).await.unwrap().unwrap();
    // One of them runs again elsewhere, the other waits.
    let heir = rig.session("sql:*", 8).await;
    let retaken = take_one(&heir).await;
    let before = rig.dump();
    assert_eq!(doomed.beat().await.unwrap(), Beat::Lost);
    assert!(doomed.take(8).await.unwrap().is_err());
    for number in [1, 7] {
        let reply = rig.store.take(doomed.id(), "sql:*", number, 8, 8, "jobs", &[]).await.unwrap();
        assert!(matches!(reply, TakeReply::Lost));
    }
    for claim in claims {
        let fields = Fields::new().with("status", "done");
        assert_eq!(claim.pen().mark(&fields).await.unwrap(), Mark::Stale);
        for verdict in [Verdict::Next, Verdict::Back, Verdict::Later { after_ms: 0 }] {
            let (id, fence) = (claim.job().id.clone(), claim.job().fence);
            let finish = Finish { id, fence, verdict, ran_us: 0, fields: fields.clone() };
            assert_eq!(rig.store.finish(doomed.id(), true, &[finish]).await.unwrap(), [Finished::Stale]);
        }
        assert_eq!(end(claim, "done").await, Finished::Stale, "its result was not recorded");
    }
    assert_eq!(rig.dump(), before);
    assert_eq!(doomed.close().await.unwrap(), 0);
    assert_eq!(end(retaken, "done").await, Finished::Ended);
    rig.balanced();
}

#[tokio::test]
async fn thousands_of_jobs_go_back_in_several_calls_and_in_one_order() {
    let rig = Rig::start().await;
    let doomed = rig.session("sql:*", 10_000).await;
    rig.state().set(Piece::Pool("sql:h"), &[("user_limit", "10000")]);
    let jobs: Vec<_> = (0..2_500).map(|i| submission("alice", &format!("j{i:04}"), "h")).collect();
    for chunk in jobs.chunks(100) {
        rig.store.enqueue(&most(10_000, 16_384), chunk).await.unwrap();
    }
    let before = rig.queue("alice");
    let mut claims = Vec::new();
    while claims.len() < 2_500 {
        let more = take(&doomed, 100).await;
        assert!(!more.is_empty(), "only {} were to be had", claims.len());
        claims.extend(more);
    }
    let term = rig.lead().await.term();
    // The first leader dies half way.
    let proxy = Proxy::start(rig.server.addr());
    let (store, session) = (rig.connect_through(&proxy).await, doomed.id().to_string());
    proxy.delay(Duration::from_millis(20));
    let first = tokio::spawn(async move { store.session_reclaim(&session, 0, &leader_id(), term).await });
    eventually("the first of them to go back", async || (!rig.queue("alice").is_empty()).then_some(())).await;
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled(), "it was too quick to die");
    assert_eq!(doomed.beat().await.unwrap(), Beat::Lost, "half gone is gone");
    assert!(doomed.take(1).await.unwrap().is_err(), "it takes nothing of what it has just lost");
    let last = rig.store.session_reclaim(doomed.id().as_str(), 0, &leader_id(), term).await.unwrap().unwrap();
    assert!(matches!(last, SessionEnd::Ended(1..2_500)), "{last:?}");
    assert!(rig.queue("alice") == before, "the order has changed");
    rig.balanced();
}

#[tokio::test]
async fn what_the_worker_believes_it_holds_is_compared_with_what_it_holds() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    for user in ["alice", "bob"] {
        rig.submit(user, user, "h");
    }
    rig.notice(&["alice", "bob"]).await;
    let mut claims = take(&session, 4).await;
    assert_eq!(session.beat().await.unwrap(), Beat::Alive { cancels: vec![], claims: vec![] });
    // A claim that got lost in the worker.
    let forgotten = claims.remove(0);
    let (id, fence) = (forgotten.job().id.clone(), forgotten.job().fence);
    drop(forgotten);
    let Beat::Alive { claims: listed, .. } = session.beat().await.unwrap() else { panic!("alive") };
    assert_eq!(listed.len(), 2);
    assert!(listed.contains(&(id.to_string(), fence)));
    assert_eq!(session.give_back_unknown(id.clone(), fence).await.unwrap(), Finished::Ended);
    assert_eq!(rig.status(id.as_str()), "pending");
    assert_eq!(session.beat().await.unwrap(), Beat::Alive { cancels: vec![], claims: vec![] });
    // An entry of the work list that no claim stands behind is removed.
    rig.state().list_unclaimed(session.id().as_str(), "ghost");
    session.beat().await.unwrap();
    rig.balanced();
}

#[tokio::test]
async fn leadership_has_terms_is_handed_over_at_once_and_survives_two_who_believe_in_it() {
    let rig = Rig::start().await;
    let (one, two) = (SessionId::new("one:1:a").unwrap(), SessionId::new("two:1:a").unwrap());
    let ttl = Duration::from_secs(3_600);
    let first = leader::hold(&rig.store, &one, ttl).await.unwrap().unwrap();
    assert_eq!(leader::hold(&rig.store, &one, ttl).await.unwrap().unwrap().term(), first.term(), "renewed, same term");
    assert!(leader::hold(&rig.store, &two, ttl).await.unwrap().is_none());
    assert!(matches!(rig.store.lead(&two, Some(3_600_000)).await.unwrap(), Lead::Follower(who) if who == "one:1:a"));
    leader::resign(&rig.store, &two).await.unwrap();
    assert!(leader::hold(&rig.store, &two, ttl).await.unwrap().is_none(), "only the leader can resign");
    leader::resign(&rig.store, &one).await.unwrap();
    let second = leader::hold(&rig.store, &two, ttl).await.unwrap().unwrap();
    assert!(second.term() > first.term());

    // The first still believes it leads, and sees a session stand still that the second does not.
    let session = rig.session("sql:*", 4).await;
    rig.submit("alice", "a1", "h");
    rig.notice(&["alice"]).await;
    let claim = take_one(&session).await;
    let mut watch = SessionWatch::default();
    let told =
        eventually("the first to be told", async || watch.pass(&first, Duration::from_secs(2)).await.unwrap().err())
            .await;
    assert_eq!(told, NotLeader);
    assert_eq!(first.upkeep(ttl).await.unwrap(), Err(NotLeader));
    assert!(second.upkeep(ttl).await.unwrap().is_ok());
    assert_eq!(end(claim, "done").await, Finished::Ended);

    // The key's time runs out: whoever comes first leads, in a new term, even the same one.
    assert!(rig.state().expires_in_ms(Piece::Leader).unwrap() > 600_000);
    rig.state().lose(Piece::Leader);
    assert!(leader::hold(&rig.store, &two, ttl).await.unwrap().unwrap().term() > second.term());
    assert_eq!(second.upkeep(ttl).await.unwrap(), Err(NotLeader), "its term is over");
}

#[tokio::test]
async fn the_sweep_removes_only_old_hashes_that_are_final_or_that_nothing_refers_to() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    let leadership = rig.lead().await;
    let old = "2001-01-01T00:00:00.000Z";
    let time = rig.redis(&["TIME"]).texts()[0].clone();
    assert!(time.parse::<u64>().unwrap() > 1_600_000_000, "the server's clock is later than the old hashes");
    // Name, fields, whether it goes.
    let cases: &[(&str, &[&str], bool)] = &[
        ("done", &["user", "alice", "status", "done", "updated_at", old], true),
        ("done-by-creation", &["user", "alice", "status", "failed", "created_at", old], true),
        ("orphan", &["user", "alice", "status", "pending", "updated_at", old], true),
        ("orphan-running", &["user", "alice", "status", "running", "updated_at", old], true),
        ("queued", &["user", "bob", "status", "pending", "updated_at", old], false),
        ("queued-and-done", &["user", "bob", "status", "done", "updated_at", old], true),
        ("scheduled", &["user", "bob", "status", "scheduled", "updated_at", old], false),
        (
            "fallback-waits",
            &["user", "bob", "status", "failed", "fallback_status", "pending", "updated_at", old],
            false,
        ),
        ("of-a-long-queue", &["user", "long", "status", "pending", "updated_at", old], false),
        ("no-user", &["status", "pending", "updated_at", old], false),
        ("fresh", &["user", "alice", "status", "done", "updated_at", "2999-01-01T00:00:00.000Z"], false),
        (
            "touched",
            &["user", "alice", "status", "done", "created_at", old, "updated_at", "2999-01-01T00:00:00.000Z"],
            false,
        ),
        ("no-time", &["user", "alice", "status", "done"], false),
        ("odd-time", &["user", "alice", "status", "done", "updated_at", "1"], false),
    ];
    for (id, fields, _) in cases {
        rig.state().set(Piece::Job(id), &pairs(fields));
    }
    for id in ["queued", "queued-and-done", "fallback-waits"] {
        rig.state().foreign().push("bob", id);
    }
    rig.state().schedule_job("scheduled", 9_000_000_000_000);
    let state = rig.state();
    for _ in 0..1_001 {
        state.foreign().push("long", "x");
    }
    rig.state().spoil(Piece::Job("text"));
    rig.submit("carol", "running", "h");
    rig.notice(&["carol"]).await;
    let claim = take_one(&session).await;
    rig.state().set(Piece::Job("running"), &[("updated_at", old), ("status", "done")]);
    // Whatever its times say, a hash that was written just now may be about to be queued.
    let two_days = Duration::from_secs(2 * 86_400);
    assert_eq!(leadership.sweep(two_days).await.unwrap(), Ok(0));
    for (id, ..) in cases {
        rig.state().leave_untouched(Piece::Job(id), 60);
    }
    rig.state().leave_untouched(Piece::Job("running"), 60);
    let removed = leadership.sweep(two_days).await.unwrap().unwrap();
    assert_eq!(removed, cases.iter().filter(|case| case.2).count() as u64);
    for (id, _, goes) in cases {
        assert_eq!(rig.state().has(Piece::Job(id)), !goes, "{id}");
    }
    assert!(rig.state().has(Piece::Job("running")) && rig.state().has(Piece::Job("text")));
    assert_eq!(end(claim, "done").await, Finished::Ended);
}

#[tokio::test]
async fn a_server_of_another_major_version_is_refused_and_left_as_it_is() {
    let rig = Rig::start().await;
    rig.state().set_version("2.0");
    let before = rig.dump();
    let id = SessionId::generate("host", 1);
    let refused = queue_core::session::Session::open(rig.store.clone(), id, service("sql:*", 4), "host", 1).await;
    let text = refused.map(drop).unwrap_err().to_string();
    assert_eq!(text, "the keys on this server are of protocol version 2.0, this program speaks 1.0");
    assert_eq!(rig.dump(), before);
    rig.state().lose(Piece::Version);
    rig.session("sql:*", 4).await;
    assert_eq!(rig.state().version().as_deref(), Some("1.0"));
}

#[tokio::test]
async fn a_session_runs_one_suspect_at_a_time_so_that_neighbours_are_not_blamed() {
    let rig = Rig::start().await;
    for (user, unclean) in [("alice", "2"), ("bob", "3"), ("cem", "1"), ("dan", "junk")] {
        rig.submit(user, user, "h");
        rig.state().lose_workers_of(user, unclean);
        rig.notice(&[user]).await;
    }
    let (one, two) = (rig.session("sql:*", 8).await, rig.session("sql:*", 8).await);
    let mut claims = take(&one, 8).await;
    assert_eq!(ids(&claims), ["alice", "cem", "dan"]);
    assert!(take(&one, 8).await.is_empty(), "bob waits for another session, or for this one's suspect to end");
    rig.balanced();
    let others = take(&two, 8).await;
    assert_eq!(ids(&others), ["bob"]);
    for claim in others {
        assert_eq!(put(claim, Verdict::Back).await, Finished::Ended);
    }
    assert!(take(&one, 8).await.is_empty());
    assert_eq!(end(claims.remove(0), "done").await, Finished::Ended);
    assert_eq!(ids(&take(&one, 8).await), ["bob"]);
    rig.balanced();
}

#[tokio::test]
async fn a_job_that_ends_its_workers_before_they_can_look_at_it_does_not_do_so_for_ever() {
    let rig = Rig::start().await;
    let term = rig.lead().await.term();
    for (id, trace, status) in [("untouched", "", "ignored"), ("begun", "0 transaction 7@1", "unknown")] {
        rig.submit("alice", id, "h");
        rig.submit("alice", "next", "h");
        rig.state().set(Piece::Job(id), &[("unclean", "19"), ("trace", trace), ("fallback_status", "pending")]);
        rig.notice(&["alice"]).await;
        let doomed = rig.session("sql:*", 8).await;
        assert_eq!(ids(&take(&doomed, 8).await), [id]);
        let ended = rig.store.session_reclaim(doomed.id().as_str(), 0, &leader_id(), term).await.unwrap().unwrap();
        assert_eq!(ended, SessionEnd::Ended(1));
        let hash = rig.hash(id);
        assert_eq!((hash["status"].as_str(), hash["fallback_status"].as_str()), (status, "skipped"));
        let reason = format!("it ended 20 workers, the last one {}", doomed.id());
        assert_eq!(hash["failed_reason"], reason);
        let history = queue_core::model::retry::read_history(&hash["history"]);
        assert!(history[0].unclean && history[0].worker == doomed.id().as_str());
        assert!(rig.state().expires_in_ms(Piece::Job(id)).is_some());
        rig.balanced();
        // Who stood behind it goes on.
        let heir = rig.session("sql:*", 8).await;
        assert_eq!(end(take_one(&heir).await, "done").await, Finished::Ended);
        rig.state().lose(Piece::Job("next"));
        heir.close().await.unwrap();
    }
}

#[tokio::test]
async fn many_suspects_keep_nobody_behind_them_from_a_turn() {
    let rig = Rig::start().await;
    for n in 0..200 {
        let user = format!("suspect{n}");
        rig.submit(&user, &user, "h");
        rig.state().lose_workers_of(&user, "2");
        rig.notice(&[user.as_str()]).await;
    }
    rig.submit("zoe", "zoe", "h");
    rig.notice(&["zoe"]).await;
    let session = rig.session("sql:*", 8).await;
    let first = take_one(&session).await;
    assert_eq!(id(&first), "suspect0");
    let claims = take(&session, 4).await;
    assert_eq!(ids(&claims), ["zoe"]);
    let taken = session.take(4).await.unwrap().unwrap();
    assert!(taken.claims.is_empty());
    assert_eq!(taken.due_in, None, "nothing is found by asking again at once");
    rig.balanced();
}

#[tokio::test]
async fn a_count_of_lost_workers_that_no_worker_wrote_hides_no_killer() {
    let rig = Rig::start().await;
    let term = rig.lead().await.term();
    for (id, unclean, after) in
        [("a", "-99999999999999", "1"), ("b", "nan", "1"), ("c", "0.5", "1"), ("d", "1e300", "1"), ("e", "0x3", "1")]
    {
        let session = rig.session("sql:*", 8).await;
        rig.submit(id, id, "h");
        rig.state().set_field(id, "unclean", unclean);
        rig.notice(&[id]).await;
        let _claim = take_one(&session).await;
        let reply = rig.store.session_reclaim(session.id().as_str(), 0, &leader_id(), term).await.unwrap();
        assert_eq!(reply, Ok(SessionEnd::Ended(1)));
        assert_eq!(rig.hash(id)["unclean"], after, "{id}");
        assert_eq!(rig.status(id), "pending", "{id}");
        rig.state().lose(Piece::Job(id));
        rig.state().lose(Piece::Queue(id));
    }
}

#[tokio::test]
async fn a_suspect_whose_claim_got_lost_does_not_keep_its_session_from_others() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 8).await;
    for user in ["alice", "bob"] {
        rig.submit(user, user, "h");
        rig.state().lose_workers_of(user, "2");
        rig.notice(&[user]).await;
    }
    let lost = take_one(&session).await;
    assert_eq!(id(&lost), "alice");
    rig.state().lose_claim("alice");
    let found = queue_core::reconcile::repair(&rig.store, Duration::from_millis(KEEP_MS)).await.unwrap();
    assert!(!found.is_empty());
    rig.balanced();
    assert_eq!(ids(&take(&session, 1).await), ["bob"]);
}
