//! Tasks: each goes to the line of its user and handler, whoever pushed it, and only who serves that handler takes it.

use std::collections::BTreeSet;

use queue_core::config::Limits;
use queue_core::ids::{App, JobId, Op, Pool, PoolPattern, User};
use queue_core::model::task::Payload;
use queue_core::producer::{NewJob, Producer};
use testkit::end_of;

use crate::support::*;

fn task(user: &str, id: &str, app: &str, op: &str) -> NewJob {
    let input = Payload::json(&id).unwrap();
    let job = NewJob::task(User::new(user).unwrap(), App::new(app).unwrap(), Op::new(op).unwrap(), input);
    NewJob { id: JobId::new(id).unwrap(), ..job }
}

fn producer(rig: &Rig) -> Producer {
    Producer::new(rig.store.clone(), Limits::default())
}

/// What a foreign producer writes.
fn push(rig: &Rig, user: &str, id: &str, app: &str, op: &str) {
    let input = format!("\"{id}\"");
    rig.state().foreign().submit(user, id, &[("kind", "task"), ("app", app), ("op", op), ("input", &input)]);
}

#[tokio::test]
async fn a_task_is_taken_by_who_serves_its_handler_and_by_nobody_else() {
    let rig = Rig::start().await;
    let producer = producer(&rig);
    for job in [task("ann", "a1", "Bank", "PAY"), task("ann", "a2", "Bank", "pay"), task("ann", "b1", "bank", "pay")] {
        producer.enqueue(job).await.unwrap();
    }
    let other = rig.session("sql:* db:* bank.payout Bank.p", 8).await;
    assert!(take(&other, 8).await.is_empty());
    let serving = rig.session("Bank.pay", 8).await;
    let claims = take(&serving, 8).await;
    assert_eq!(ids(&claims), ["a1", "a2"], "several of one user at once");
    assert_eq!(claims[0].job().pool.as_str(), "Bank.pay");
    assert_eq!(claims[0].job().text("input"), Ok(Some("\"a1\"")));
    assert_eq!(claims[0].job().text("encoding"), Ok(Some("json")));
    assert_eq!(claims[0].job().text("status"), Ok(Some("running")));
    rig.balanced();
    for claim in claims {
        end(claim, "done").await;
    }
    let all = rig.session("*", 8).await;
    end(take_one(&all).await, "done").await;
    let state = rig.state();
    assert!(!state.is_any_waiting() && !state.has_any(&[Piece::QueuesOfTasks, Piece::RunningByUser]));
    rig.balanced();
}

#[tokio::test]
async fn foreign_tasks_join_their_lines_in_order_and_wait_behind_no_statement() {
    let rig = Rig::start().await;
    for number in 0..3 {
        rig.submit("ann", &format!("s{number}"), "h");
    }
    for id in ["t1", "t2", "t3"] {
        push(&rig, "ann", id, "bank", "Pay");
    }
    assert_eq!(rig.notice(&["ann"]).await, 1, "ready for a statement; the tasks have told of themselves");
    assert_eq!(rig.queue("ann"), ["s0", "s1", "s2"]);
    let session = rig.session("bank.pay", 8).await;
    assert_eq!(ids(&take(&session, 8).await), ["t1", "t2", "t3"]);
    // One that stands among statements is found when its turn comes.
    push(&rig, "ann", "t4", "bank", "pay");
    rig.submit("ann", "s4", "h");
    rig.notice(&["ann"]).await;
    assert!(take(&session, 8).await.is_empty());
    let sql = rig.session("sql:h", 8).await;
    for _ in 0..3 {
        end(take_one(&sql).await, "done").await;
    }
    assert_eq!(ids(&take(&session, 8).await), ["t4"]);
    assert_eq!(ids(&take(&sql, 8).await), ["s4"]);
    rig.balanced();
}

#[tokio::test]
async fn a_task_that_names_no_handler_is_set_aside_with_its_reason() {
    let rig = Rig::start().await;
    let long = "x".repeat(200);
    let names =
        [("", "pay"), ("a.b", "pay"), ("a b", "pay"), ("bank", ""), ("bank", "p:q"), (&long, "pay"), ("bank", &long)];
    for (number, (app, op)) in names.iter().enumerate() {
        push(&rig, "ann", &format!("t{number}"), app, op);
    }
    rig.state().foreign().submit("ann", "odd", &[("kind", "dream")]);
    push(&rig, "ann", "good", "bank", "pay");
    rig.notice(&["ann"]).await;
    let session = rig.session("*", 8).await;
    assert_eq!(ids(&take(&session, 8).await), ["good"]);
    let rejected = rig.rejected();
    assert_eq!(rejected.len(), names.len() + 1, "{rejected:?}");
    for id in (0..names.len()).map(|number| format!("t{number}")).chain(["odd".to_owned()]) {
        assert_eq!(rig.status(&id), "failed", "{id}");
    }
    rig.balanced();
}

#[tokio::test]
async fn a_lost_worker_s_tasks_go_back_to_the_front_of_their_line() {
    let rig = Rig::start().await;
    let producer = producer(&rig);
    for id in ["a1", "a2", "a3"] {
        producer.enqueue(task("ann", id, "bank", "pay")).await.unwrap();
    }
    let lost = rig.session("bank.*", 8).await;
    assert_eq!(ids(&take(&lost, 2).await), ["a1", "a2"]);
    let leadership = rig.lead().await;
    let leader = queue_core::ids::SessionId::new("leader:1:a").unwrap();
    rig.store.session_reclaim(lost.id().as_str(), 0, &leader, leadership.term()).await.unwrap().unwrap();
    assert_eq!((rig.hash("a1")["unclean"].as_str(), rig.status("a1").as_str()), ("1", "pending"));
    let next = rig.session("bank.pay", 8).await;
    assert_eq!(ids(&take(&next, 8).await), ["a1", "a2", "a3"]);
    rig.balanced();
}

#[tokio::test]
async fn a_session_takes_no_more_of_a_pool_than_it_has_room_for_and_others_hear_of_the_rest() {
    let rig = Rig::start().await;
    let producer = producer(&rig);
    let pool = Pool::new("bank.pay").unwrap();
    let (small, large) = (rig.session("bank.* shop.*", 8).await, rig.session("bank.*", 8).await);
    // Named, as a worker names its handlers: a pattern with a star has no room of its own.
    let small_serves = [PoolPattern::new("bank.pay").unwrap(), PoolPattern::new("shop.buy").unwrap()];
    small.serve(&small_serves).await.unwrap().unwrap();
    for id in ["a1", "a2", "a3", "b1", "b2"] {
        producer.enqueue(task(if id < "b" { "ann" } else { "bob" }, id, "bank", "pay")).await.unwrap();
    }
    let channel = rig.store.keys().wake(large.id().as_str());
    let mut woken = rig.store.subscribe(std::slice::from_ref(&channel), &[]).await.unwrap();
    let within = async |room: usize| {
        let batch = small.take_within(8, &[(pool.clone(), room)]).await.unwrap().unwrap();
        batch.claims
    };
    assert_eq!(within(0).await.len(), 0);
    let first = within(2).await;
    assert_eq!(ids(&first), ["a1", "b1"]);
    // Full now: it is parked for the other pool alone.
    assert!(within(0).await.is_empty());
    assert_eq!(rig.state().services(), ["shop.buy"]);
    assert_eq!(ids(&take(&large, 1).await), ["a2"]);
    assert_eq!(ids(&take(&large, 8).await), ["b2", "a3"]);
    assert!(take(&large, 8).await.is_empty(), "it is parked");
    producer.enqueue(task("cleo", "c1", "bank", "pay")).await.unwrap();
    let hint = end_of("a hint for who has room", woken.recv()).await.unwrap();
    assert_eq!(hint.text, "bank.pay");
    // Parked for both, nobody is for the one alone, and no trace of that is left.
    let third = take(&large, 8).await;
    assert_eq!(ids(&third), ["c1"]);
    assert!(within(2).await.is_empty());
    let services = rig.state().services();
    assert!(
        services.contains(&"bank.pay shop.buy".to_owned()) && !services.contains(&"shop.buy".to_owned()),
        "{services:?}"
    );
    small.close().await.unwrap();
    large.close().await.unwrap();
    assert_eq!(rig.state().awaited(), [""; 0]);
    assert_eq!(rig.state().services(), [""; 0], "nobody is left who could be woken");
    rig.balanced();
}

/// What that costs Redis is measured in `benches/run-calls`.
#[tokio::test]
async fn who_has_a_thousand_handlers_is_dealt_from_all_of_them() {
    let rig = Rig::start().await;
    let jobs = (0..1_000).map(|number| task("ann", &format!("j{number}"), "app", &format!("op{number}"))).collect();
    assert!(producer(&rig).enqueue_many(jobs).await.iter().all(Result::is_ok));
    let pools: Vec<String> = (0..1_000).map(|number| format!("app.op{number}")).collect();
    let session = rig.session(&pools.join(" "), 8).await;
    let mut claims = take(&session, 8).await;
    assert_eq!(claims.len(), 8);
    loop {
        let more = take(&session, 100).await;
        if more.is_empty() {
            break;
        }
        claims.extend(more);
    }
    let taken: BTreeSet<&str> = claims.iter().map(|claim| claim.job().pool.as_str()).collect();
    assert_eq!((claims.len(), taken.len()), (1_000, 1_000));
    rig.balanced();
}
