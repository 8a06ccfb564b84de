//! What the leader sees of pools that nobody serves. All else that an overview shows is tested with the programs that show it.

use queue_core::Error;
use queue_core::ids::SessionId;
use queue_core::overview::{look, unserved_pools};

use crate::support::*;

/// Pool, users, jobs and whether the longest wait is known.
async fn unserved(rig: &Rig) -> Vec<(String, u64, u64, bool)> {
    let mut pools = unserved_pools(&rig.store).await.unwrap();
    pools.sort_by(|a, b| a.pool.cmp(&b.pool));
    pools.into_iter().map(|pool| (pool.pool, pool.users, pool.jobs, pool.oldest_waited_ms.is_some())).collect()
}

fn push(rig: &Rig, user: &str, id: &str, fields: &[&str]) {
    let state = rig.state();
    state.foreign().write(id, &[&[("user", user), ("status", "pending")], &pairs(fields)[..]].concat());
    state.foreign().push(user, id);
    state.foreign().index(user);
}

#[tokio::test]
async fn pools_that_nobody_serves_are_seen_where_takes_look() {
    let rig = Rig::start().await;
    assert_eq!(unserved(&rig).await, []);
    let task = ["kind", "task", "app", "Bank", "op", "pay", "created_at", "2024-01-01T00:00:00.000Z"];
    for (user, id) in [("ann", "t1"), ("ann", "t2"), ("bob", "t3")] {
        push(&rig, user, id, &task);
    }
    push(&rig, "ann", "s1", &["query", "select 1", "host", "h"]);
    push(&rig, "cyd", "s2", &["query", "select 1", "database", "main"]);
    rig.notice(&["ann", "bob", "cyd"]).await;
    let seen = |pool: &str, users, jobs, waited| (pool.to_owned(), users, jobs, waited);
    let bank = || seen("Bank.pay", 2, 3, true);
    assert_eq!(unserved(&rig).await, [bank(), seen("db:main", 1, 1, false), seen("sql:h", 1, 1, false)]);
    let pools = unserved_pools(&rig.store).await.unwrap();
    assert!(pools.iter().filter_map(|pool| pool.oldest_waited_ms).all(|waited| waited > 86_400_000), "{pools:?}");

    let _sql = rig.session("sql:* db:main", 8).await;
    assert_eq!(unserved(&rig).await, [bank()]);
    // Somebody who is silent serves nothing, whatever it says.
    let silent = SessionId::generate("test", 2);
    rig.store.session_open(&silent, "Bank.*", "test", 2, &[]).await.unwrap();
    assert_eq!(unserved(&rig).await, []);
    rig.state().set(Piece::Session(silent.as_str()), &[("beat_at", "2024-01-01T00:00:00.000Z")]);
    assert_eq!(unserved(&rig).await, [bank()]);
    // Who is still ready there and has nothing (any more) does not count.
    rig.state().lose(Piece::Tasks("ann", "Bank.pay", Priority::Normal));
    rig.state().list_ready("Bank.pay", "nobody", 5);
    assert_eq!(unserved(&rig).await, [seen("Bank.pay", 1, 1, true)]);
}

#[tokio::test]
async fn a_session_is_silent_since_its_last_beat_and_not_since_its_start() {
    let rig = Rig::start().await;
    let session = rig.session("Bank.*", 8).await;
    push(&rig, "ann", "t1", &["kind", "task", "app", "Bank", "op", "pay"]);
    rig.notice(&["ann"]).await;
    let long_ago = [("started_at", "2024-01-01T00:00:00.000Z"), ("beat_at", "2024-01-01T00:00:00.000Z")];
    rig.state().set(Piece::Session(session.id().as_str()), &long_ago);
    let silent_ms = async || look(&rig.store).await.unwrap().sessions[0].silent_ms.unwrap();
    assert!(silent_ms().await > 86_400_000);
    assert_eq!(unserved(&rig).await, [("Bank.pay".into(), 1, 1, false)]);
    session.beat().await.unwrap();
    let silent = silent_ms().await;
    assert!(silent < 60_000, "it beat {silent} ms ago");
    assert_eq!(unserved(&rig).await, [], "who beats serves its pools");
}

#[tokio::test]
async fn of_very_many_users_some_count_for_one_job_and_no_pool_is_overlooked() {
    let rig = Rig::start().await;
    rig.state().fill_tasks("Bank", "pay", 10_100);
    push(&rig, "ann", "a", &["kind", "task", "app", "Shop", "op", "print"]);
    rig.notice(&["ann"]).await;
    let seen = unserved(&rig).await;
    assert_eq!(seen[0], ("Bank.pay".into(), 10_100, 2 * 10_001 + 99, false));
    assert_eq!(seen[1], ("Shop.print".into(), 1, 1, false));
}

#[tokio::test]
async fn who_may_not_see_the_sessions_takes_no_pool_for_unserved() {
    let rig = Rig::start().await;
    rig.submit("ann", "s1", "h");
    rig.notice(&["ann"]).await;
    let _session = rig.session("sql:*", 8).await;
    rig.redis(&["ACL", "SETUSER", "default", "-smembers"]);
    let refused = unserved_pools(&rig.store).await;
    assert!(matches!(&refused, Err(Error::Refused(reason)) if reason.contains("the sessions")), "{refused:?}");
}
