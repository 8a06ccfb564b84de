//! Messages make things sooner; looking makes them right.

use queue_core::Store;
use queue_core::calls::SessionEnd;
use queue_core::config::{Limits, RedisConfig};
use queue_core::ids::{App, Op, PoolPattern, User};
use queue_core::model::task::Payload;
use queue_core::producer::{NewJob, Producer};
use queue_core::session::Session;
use queue_core::store::Message;
use testkit::{end_of, eventually};
use tokio::sync::mpsc::Receiver;

use crate::support::*;

/// A session that found nothing, and what it hears.
pub async fn parked(rig: &Rig, pools: &str) -> (Session, Receiver<Message>) {
    let session = rig.session(pools, 4).await;
    let ear = rig.store.subscribe(&[rig.store.keys().wake(session.id().as_str())], &[]).await.unwrap();
    assert!(take(&session, 4).await.is_empty());
    (session, ear)
}

/// How often a session was woken until now: whatever was said before the question has come before the answer.
pub async fn woken(rig: &Rig, session: &Session, ear: &mut Receiver<Message>) -> usize {
    let channel = rig.store.keys().wake(session.id().as_str());
    assert_eq!(rig.redis(&["PUBLISH", &channel, "the test asks"]).int(), 1);
    let mut count = 0;
    loop {
        let message = end_of("an answer", ear.recv()).await.expect("a connection");
        if message.text == "the test asks" {
            return count;
        }
        count += 1;
    }
}

#[tokio::test]
async fn one_job_wakes_one_of_those_who_serve_it_and_the_one_who_waits_longest() {
    let rig = Rig::start().await;
    let (first, mut first_ear) = parked(&rig, "sql:*").await;
    let (second, mut second_ear) = parked(&rig, "sql:*").await;
    let (other, mut other_ear) = parked(&rig, "db:*").await;
    rig.state().park("sql:*", first.id().as_str(), 1);
    rig.store.enqueue(&most(64, 16_384), &[submission("alice", "a1", "h")]).await.unwrap();
    assert_eq!(woken(&rig, &first, &mut first_ear).await, 1);
    assert_eq!(woken(&rig, &second, &mut second_ear).await, 0);
    // A second job of a user at the front already is no new work for anybody.
    rig.store.enqueue(&most(64, 16_384), &[submission("alice", "a2", "h")]).await.unwrap();
    assert_eq!(woken(&rig, &second, &mut second_ear).await, 0);
    rig.store.enqueue(&most(64, 16_384), &[submission("bob", "b1", "h")]).await.unwrap();
    assert_eq!(woken(&rig, &second, &mut second_ear).await, 1);
    assert_eq!(woken(&rig, &other, &mut other_ear).await, 0);
}

#[tokio::test]
async fn who_takes_all_it_can_wakes_the_next_while_there_is_more() {
    let rig = Rig::start().await;
    let (first, mut first_ear) = parked(&rig, "sql:*").await;
    let (second, mut second_ear) = parked(&rig, "sql:*").await;
    let (third, mut third_ear) = parked(&rig, "sql:*").await;
    for (score, session) in [(1, &first), (2, &second), (3, &third)] {
        rig.state().park("sql:*", session.id().as_str(), score);
    }
    let jobs = ["u1", "u2", "u3"].map(|user| submission(user, user, "h"));
    rig.store.enqueue(&most(64, 16_384), &jobs).await.unwrap();
    assert_eq!(woken(&rig, &first, &mut first_ear).await, 1);
    assert_eq!(woken(&rig, &second, &mut second_ear).await, 0, "three jobs, one call, one hint");
    assert_eq!(take(&first, 2).await.len(), 2);
    assert_eq!(woken(&rig, &second, &mut second_ear).await, 1);
    assert_eq!(take(&second, 2).await.len(), 1);
    assert_eq!(woken(&rig, &third, &mut third_ear).await, 0, "nothing is left");
}

#[tokio::test]
async fn a_head_that_comes_to_another_pool_wakes_who_serves_that() {
    let rig = Rig::start().await;
    let first = rig.session("sql:h1", 4).await;
    let (second, mut ear) = parked(&rig, "sql:h2").await;
    let jobs = [submission("alice", "a1", "h1"), submission("alice", "a2", "h2"), submission("alice", "a3", "h1")];
    rig.store.enqueue(&most(64, 16_384), &jobs).await.unwrap();
    assert_eq!(woken(&rig, &second, &mut ear).await, 0);
    let claim = take_one(&first).await;
    assert_eq!(woken(&rig, &second, &mut ear).await, 1, "by the take");
    assert_eq!(ids(&take(&second, 4).await), ["a2"]);
    end(claim, "done").await;
    drop(first);

    // The same when the head is cancelled.
    let canceller = queue_core::cancel::Canceller::new(rig.store.clone(), PATIENCE);
    rig.store
        .enqueue(&most(64, 16_384), &[submission("bob", "b1", "h1"), submission("bob", "b2", "h2")])
        .await
        .unwrap();
    assert_eq!(woken(&rig, &second, &mut ear).await, 0);
    canceller.cancel(&"b1".parse().unwrap()).await.unwrap();
    assert_eq!(woken(&rig, &second, &mut ear).await, 1, "by the cancel");
}

#[tokio::test]
async fn what_becomes_free_wakes_another_where_the_finisher_will_not_take() {
    let rig = Rig::start().await;
    let leaving = rig.session("sql:*", 1).await;
    let jobs = [submission("alice", "a1", "h"), submission("bob", "b1", "h")];
    rig.store.enqueue(&most(64, 16_384), &jobs).await.unwrap();
    let claim = take_one(&leaving).await;
    let narrow = rig.session("sql:*", 1).await;
    let mut ear = rig.store.subscribe(&[rig.store.keys().wake(narrow.id().as_str())], &[]).await.unwrap();
    assert!(take(&narrow, 1).await.is_empty(), "no room");
    claim
        .finish(final_verdict(), PATIENCE, queue_core::calls::Fields::new().with("status", "done"), true)
        .await
        .unwrap();
    assert_eq!(woken(&rig, &narrow, &mut ear).await, 1);
    assert_eq!(id(&take_one(&narrow).await), "b1");
}

#[tokio::test]
async fn what_an_ended_session_leaves_wakes_another_whether_it_closed_or_was_lost() {
    let rig = Rig::start().await;
    let term = rig.lead().await.term();
    for how in ["closed", "lost"] {
        let leaving = rig.session("sql:*", 4).await;
        rig.store.enqueue(&most(64, 16_384), &[submission("alice", how, "h")]).await.unwrap();
        let _claim = take_one(&leaving).await;
        let (other, mut ear) = parked(&rig, "sql:*").await;
        if how == "closed" {
            leaving.close().await.unwrap();
        } else {
            let leader = "leader:1:a".parse().unwrap();
            let reply = rig.store.session_reclaim(leaving.id().as_str(), 0, &leader, term).await.unwrap();
            assert_eq!(reply, Ok(SessionEnd::Ended(1)));
        }
        assert_eq!(woken(&rig, &other, &mut ear).await, 1, "{how}");
        let claim = take_one(&other).await;
        assert_eq!(id(&claim), how);
        end(claim, "done").await;
    }
}

#[tokio::test]
async fn a_foreign_push_wakes_once_the_announcement_is_heard() {
    let rig = Rig::start().await;
    let (session, mut ear) = parked(&rig, "sql:*").await;
    let mut announcements = rig.store.subscribe(&[rig.store.keys().announcements()], &[]).await.unwrap();
    rig.submit("alice", "a1", "h");
    assert_eq!(woken(&rig, &session, &mut ear).await, 0);
    let heard = end_of("an answer", announcements.recv()).await.unwrap();
    rig.notice(&[&heard.text]).await;
    assert_eq!(woken(&rig, &session, &mut ear).await, 1);
    assert_eq!(id(&take_one(&session).await), "a1");
}

#[tokio::test]
async fn who_may_not_publish_still_submits_takes_cancels_and_finishes() {
    let rig = Rig::start().await;
    let (session, mut ear) = parked(&rig, "sql:*").await;
    rig.redis(&["ACL", "SETUSER", "mute", "on", ">secret", "~*", "resetchannels", "+@all"]);
    let url = rig.server.url_db(DB).replace("redis://", "redis://mute:secret@");
    let store = Store::connect(&RedisConfig { ..config(url) }).await.unwrap();
    let jobs = [submission("alice", "a1", "h"), submission("bob", "b1", "h")];
    store.enqueue(&most(64, 16_384), &jobs).await.unwrap();
    assert_eq!(woken(&rig, &session, &mut ear).await, 0, "no hint came");
    let mute = open(&store, service("sql:*", 4)).await;
    let claim = take_one(&mute).await;
    let canceller = queue_core::cancel::Canceller::new(store.clone(), PATIENCE);
    assert_eq!(canceller.cancel(&claim.job().id).await.unwrap(), queue_core::cancel::Cancelled::Requested);
    let queue_core::calls::Beat::Alive { cancels, .. } = mute.beat().await.unwrap() else { panic!("alive") };
    assert_eq!(cancels, ["a1"]);
    end(claim, "cancelled").await;
    assert_eq!(ids(&take(&session, 4).await), ["b1"], "found by looking");
    rig.balanced();
}

#[tokio::test]
async fn a_hint_to_sessions_that_are_gone_goes_on_to_one_that_hears() {
    let rig = Rig::start().await;
    for i in 0..5 {
        rig.state().park("sql:*", &format!("gone:{i}:x"), i);
    }
    let (session, mut ear) = parked(&rig, "sql:*").await;
    rig.store.enqueue(&most(64, 16_384), &[submission("alice", "a1", "h")]).await.unwrap();
    assert_eq!(woken(&rig, &session, &mut ear).await, 1);
}

#[tokio::test]
async fn a_closed_session_is_woken_no_more() {
    let rig = Rig::start().await;
    let (closed, mut ear) = parked(&rig, "sql:*").await;
    closed.close().await.unwrap();
    rig.store.enqueue(&most(64, 16_384), &[submission("alice", "a1", "h")]).await.unwrap();
    assert_eq!(woken(&rig, &closed, &mut ear).await, 0);
    let worker = rig.session("sql:*", 4).await;
    assert_eq!(eventually("the job", async || take(&worker, 1).await.pop()).await.job().id.as_str(), "a1");
}

#[tokio::test]
async fn a_session_whose_change_of_pools_was_not_answered_is_not_woken_for_the_old_ones() {
    let rig = Rig::start().await;
    let (session, mut ear) = parked(&rig, "app.old").await;
    // Done, and the answer got lost: the session takes once more as it did, before it asks again.
    assert!(rig.store.session_serve(session.id(), "app.new").await.unwrap());
    assert!(take(&session, 4).await.is_empty());
    session.serve(&[PoolPattern::new("app.new").unwrap()]).await.unwrap().unwrap();
    assert!(!rig.state().has_any(&[Piece::Parked("app.old"), Piece::Services]));
    let (other, mut other_ear) = parked(&rig, "app.old").await;
    rig.state().park_last("app.old", other.id().as_str());
    let (user, app, op) = (User::new("ann").unwrap(), App::new("app").unwrap(), Op::new("old").unwrap());
    let job = NewJob::task(user, app, op, Payload::json(&()).unwrap());
    Producer::new(rig.store.clone(), Limits::default()).enqueue(job).await.unwrap();
    assert_eq!(woken(&rig, &session, &mut ear).await, 0);
    assert_eq!(woken(&rig, &other, &mut other_ear).await, 1);
}
