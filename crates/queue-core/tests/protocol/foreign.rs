//! What foreign producers write and foreign readers read.

use std::collections::HashSet;
use std::time::Duration;

use queue_core::calls::{Finished, Verdict};
use queue_core::leader::Lengths;

use crate::support::*;
use crate::wakeups::{parked, woken};

fn orders() -> Vec<[usize; 4]> {
    let mut all = Vec::new();
    for a in 0..4 {
        for b in (0..4).filter(|b| *b != a) {
            for c in (0..4).filter(|c| *c != a && *c != b) {
                all.push([a, b, c, 6 - a - b - c]);
            }
        }
    }
    all
}

#[tokio::test]
async fn the_four_commands_are_a_submission_in_any_order_with_a_look_after_each() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    let leadership = rig.lead().await;
    for (number, order) in orders().into_iter().enumerate() {
        let (user, id) = (format!("user {number}"), format!("job-{number}"));
        let (job, queue) = (job_key(&id), queue_key(&user));
        let commands: [&[&str]; 4] = [
            &["HSET", &job, "user", &user, "status", "pending", "query", "select 1", "host", "h"],
            &["LPUSH", &queue, &id],
            &["SADD", "batch:indexes:queue", &user],
            &["PUBLISH", "batch:users", &user],
        ];
        for (done, at) in order.into_iter().enumerate() {
            let mut args = vec!["-n", "5"];
            args.extend(commands[at]);
            rig.server.cli(&args);
            rig.notice(&[&user]).await;
            leadership.upkeep(Duration::from_secs(60)).await.unwrap().unwrap();
            scan_index(&leadership).await.unwrap();
            let (hashed, pushed) = (order[..=done].contains(&0), order[..=done].contains(&1));
            for claim in take(&session, 4).await {
                assert!(hashed && pushed, "{order:?}: taken before it was complete");
                assert_eq!(id, claim.job().id.as_str());
                assert_eq!(end(claim, "done").await, Finished::Ended);
            }
        }
        assert_eq!(rig.status(&id), "done", "{order:?}");
        // SADD as the last word may name a user with nothing left; the next look puts it right.
        scan_index(&leadership).await.unwrap();
        rig.balanced();
    }
    assert_eq!(rig.rejected(), []);
}

#[tokio::test]
async fn a_queue_that_nobody_announced_or_indexed_is_found_by_its_key() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    let leadership = rig.lead().await;
    rig.redis(&["HSET", "batch:jobs:a1", "user", "alice", "status", "pending", "query", "select 1", "host", "h"]);
    rig.redis(&["LPUSH", "batch:queue:alice", "a1"]);
    assert_eq!(scan_index(&leadership).await.unwrap(), 0);
    assert!(take(&session, 1).await.is_empty());
    assert_eq!(leadership.scan_queues().await.unwrap(), Ok(1));
    assert_eq!(rig.redis(&["SMEMBERS", "batch:indexes:queue"]).texts(), ["alice"]);
    assert_eq!(id(&take_one(&session).await), "a1");
    rig.balanced();
}

#[tokio::test]
async fn an_indexed_queue_is_found_though_its_announcement_was_lost() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    let leadership = rig.lead().await;
    rig.submit("alice", "a1", "h");
    assert!(take(&session, 1).await.is_empty(), "nobody has looked yet");
    assert_eq!(scan_index(&leadership).await.unwrap(), 1);
    assert_eq!(id(&take_one(&session).await), "a1");
}

#[tokio::test]
async fn a_scan_looks_at_the_queues_that_have_changed_since_the_last_one() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    let leadership = rig.lead().await;
    rig.submit("alice", "a1", "h");
    rig.submit("bob", "b1", "h");
    let mut seen = Lengths::default();
    assert_eq!(leadership.scan_changes(&mut seen).await.unwrap(), Ok(2));
    rig.redis(&["CONFIG", "RESETSTAT"]);
    assert_eq!(leadership.scan_changes(&mut seen).await.unwrap(), Ok(0));
    assert_eq!(function_calls(&rig), 0, "nothing has changed");
    rig.submit("carol", "c1", "h");
    rig.submit("alice", "a2", "h");
    assert_eq!(leadership.scan_changes(&mut seen).await.unwrap(), Ok(1));
    assert_eq!(function_calls(&rig), 1, "those two are looked at");
    let taken = take(&session, 4).await;
    assert_eq!(ids(&taken).into_iter().collect::<HashSet<_>>(), HashSet::from(["a1", "b1", "c1"]));
    rig.balanced();
}

#[tokio::test]
async fn hashes_that_come_late_find_their_ids_waiting_in_their_order() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    let leadership = rig.lead().await;
    for id in ["z-first", "m-second", "a-third"] {
        rig.redis(&["LPUSH", "batch:queue:alice", id]);
    }
    rig.notice(&["alice"]).await;
    assert!(take(&session, 1).await.is_empty());
    assert_eq!(rig.redis(&["ZCARD", "drayman:missing"]).int(), 3);
    rig.submit("alice", "later", "h");
    for id in ["a-third", "z-first", "m-second"] {
        rig.redis(&["HSET", &job_key(id), "user", "alice", "host", "h"]);
    }
    assert_eq!(leadership.upkeep(Duration::from_secs(60)).await.unwrap().unwrap().found, 3);
    assert_eq!(rig.queue("alice"), ["z-first", "m-second", "a-third", "later"]);
    for expected in ["z-first", "m-second", "a-third", "later"] {
        let claim = take_one(&session).await;
        assert_eq!(id(&claim), expected);
        end(claim, "done").await;
    }
    rig.balanced();
}

#[tokio::test]
async fn an_id_whose_hash_does_not_come_in_time_is_set_aside() {
    let rig = Rig::start().await;
    let leadership = rig.lead().await;
    rig.redis(&["LPUSH", "batch:queue:alice", "a1"]);
    rig.notice(&["alice"]).await;
    let given_up_at = rig.redis(&["ZSCORE", "drayman:missing", "a1 alice"]).text().parse::<f64>().unwrap();
    let time = rig.redis(&["TIME"]).texts();
    let now = time[0].parse::<f64>().unwrap() * 1e3 + time[1].parse::<f64>().unwrap() / 1e3;
    assert!((given_up_at - now - 60_000.0).abs() < 5_000.0, "{} s from now", (given_up_at - now) / 1e3);
    assert_eq!(leadership.upkeep(Duration::from_secs(60)).await.unwrap().unwrap().given_up, 0);
    rig.redis(&["ZADD", "drayman:missing", "XX", "1", "a1 alice"]);
    assert_eq!(leadership.upkeep(Duration::from_secs(60)).await.unwrap().unwrap().given_up, 1);
    let reason = "it was queued, but no hash of it came within 60 s";
    assert_eq!(rig.rejected(), [("a1".to_owned(), reason.to_owned())]);
    assert_eq!(rig.redis(&["EXISTS", "drayman:missing", "batch:jobs:a1"]).int(), 0);
}

#[tokio::test]
async fn what_readers_see_is_true_at_every_moment_of_a_jobs_life() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    let other = rig.session("sql:*", 4).await;
    let leadership = rig.lead().await;
    let wip = |user: &str| rig.redis(&["LRANGE", &format!("batch:wip:user:{user}"), "0", "-1"]).texts();
    for (user, id) in [("alice", "a1"), ("alice", "a2"), ("bob", "b1")] {
        rig.submit(user, id, if id == "a2" { "h2" } else { "h1" });
        rig.balanced();
    }
    rig.notice(&["alice", "bob"]).await;
    rig.balanced();
    let mut claims = take(&session, 4).await;
    claims.sort_by_key(|claim| claim.job().id.to_string());
    assert_eq!(ids(&claims), ["a1", "a2", "b1"]);
    assert_eq!(wip("alice").len(), 2, "one a host");
    rig.balanced();
    let mut claims = claims.into_iter();
    put(claims.next().unwrap(), Verdict::Next).await;
    assert_eq!(wip("alice"), ["a2"], "the user stays in the index as long as one of its jobs runs");
    rig.balanced();
    put(claims.next().unwrap(), Verdict::Later { after_ms: 3_600_000 }).await;
    rig.balanced();
    put(claims.next().unwrap(), Verdict::Back).await;
    rig.balanced();
    let claims = take(&other, 4).await;
    assert_eq!(claims.len(), 2);
    other.close().await.unwrap();
    rig.balanced();
    assert_eq!(rig.redis(&["EXISTS", "batch:wip:users"]).int(), 0);
    for claim in take(&session, 4).await {
        end(claim, "done").await;
        rig.balanced();
    }
    // Entries of a foreign worker that died, and one that may still be at work.
    rig.redis(&["HSET", "batch:jobs:f1", "user", "alice", "status", "done"]);
    rig.redis(&["HSET", "batch:jobs:f2", "user", "alice", "status", "running"]);
    rig.redis(&["LPUSH", "batch:wip:user:alice", "f1", "f2", "gone"]);
    rig.redis(&["SADD", "batch:wip:users", "alice", "empty"]);
    assert_eq!(leadership.clear_wip().await.unwrap(), Ok(2));
    assert_eq!(wip("alice"), ["f2"]);
    assert_eq!(rig.redis(&["SMEMBERS", "batch:wip:users"]).texts(), ["alice"]);
}

#[tokio::test]
async fn a_user_is_served_in_strict_order_over_hosts_and_what_was_put_first_is_first() {
    let rig = Rig::start().await;
    let (both, second) = (rig.session("sql:*", 4).await, rig.session("sql:h2", 4).await);
    rig.submit("alice", "a1", "h1");
    rig.submit("alice", "a2", "h2");
    rig.submit("alice", "a3", "h1");
    rig.redis(&["HSET", "batch:jobs:a0", "user", "alice", "host", "h1"]);
    rig.redis(&["RPUSH", "batch:queue:alice", "a0"]);
    rig.notice(&["alice"]).await;
    assert!(take(&second, 4).await.is_empty(), "the head is of another host");
    let first = take(&both, 4).await;
    assert_eq!(ids(&first), ["a0"], "a1 is of the same host, and a2 stands behind a1");
    for claim in first {
        end(claim, "done").await;
    }
    let claims = take(&both, 4).await;
    assert_eq!(ids(&claims), ["a1", "a2"], "the second host has room");
    for claim in claims {
        end(claim, "done").await;
    }
    assert_eq!(ids(&take(&both, 4).await), ["a3"]);
}

#[tokio::test]
async fn old_layout_queues_are_moved_before_what_users_have_queued_and_keep_their_order() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    let leadership = rig.lead().await;
    for (id, user) in [("o1", "alice"), ("o2", "bob"), ("o3", "alice"), ("bad", "")] {
        rig.redis(&["HSET", &job_key(id), "user", user, "status", "pending", "host", "h"]);
        rig.redis(&["LPUSH", "batch:queues:h", id]);
    }
    rig.redis(&["LPUSH", "batch:queues:h2", "gone"]);
    rig.submit("alice", "a1", "h");
    assert_eq!(leadership.move_old_queues().await.unwrap(), Ok(3));
    assert_eq!(rig.queue("alice"), ["o1", "o3", "a1"]);
    assert_eq!(rig.queue("bob"), ["o2"]);
    assert_eq!(rig.redis(&["KEYS", "batch:queues:*"]).texts(), Vec::<String>::new());
    let set_aside: HashSet<String> = rig.rejected().into_iter().map(|(id, _)| id).collect();
    assert_eq!(set_aside, HashSet::from(["bad".to_owned(), "gone".to_owned()]));
    let mut taken = take(&session, 4).await;
    taken.sort_by_key(|claim| claim.job().id.to_string());
    assert_eq!(ids(&taken), ["o1", "o2"]);
    rig.balanced();
}

#[tokio::test]
async fn a_host_that_a_foreign_worker_schedules_is_left_to_it_until_it_lets_go() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    let leadership = rig.lead().await;
    let ttl = Duration::from_secs(5);
    rig.submit("alice", "a1", "theirs");
    rig.submit("bob", "b1", "ours");
    rig.redis(&["SET", "batch:locks:theirs", "some-token", "PX", "5000"]);
    rig.notice(&["alice", "bob"]).await;
    let hosts = async || leadership.active_hosts().await.unwrap();
    let mut active = hosts().await;
    active.sort();
    assert_eq!(active, ["ours", "theirs"]);
    assert_eq!(leadership.hold_host_locks(ttl, active).await.unwrap(), Ok(vec!["theirs".to_owned()]));
    assert_eq!(rig.redis(&["GET", "batch:locks:theirs"]).text(), "some-token");
    assert_eq!(rig.redis(&["GET", "batch:locks:ours"]).text(), "drayman:leader:1:a");
    let left = rig.redis(&["PTTL", "batch:locks:ours"]).int();
    assert!(left > 0 && left <= 5_000, "ours lives {left} ms");
    assert_eq!(ids(&take(&session, 4).await), ["b1"]);
    assert!(take(&session, 4).await.is_empty());
    // A new leader knows nothing of the host but what the keys say.
    assert!(hosts().await.contains(&"theirs".to_owned()), "a blocked host is still looked after");

    rig.redis(&["DEL", "batch:locks:theirs"]);
    assert_eq!(leadership.hold_host_locks(ttl, hosts().await).await.unwrap(), Ok(vec![]));
    assert_eq!(rig.redis(&["GET", "batch:locks:theirs"]).text(), "drayman:leader:1:a");
    assert_eq!(ids(&take(&session, 4).await), ["a1"]);
    // Ours, and that of a leader before us, is renewed.
    rig.redis(&["SET", "batch:locks:ours", "drayman:someone-before", "PX", "50000"]);
    leadership.hold_host_locks(ttl, vec!["ours".to_owned()]).await.unwrap().unwrap();
    assert_eq!(rig.redis(&["GET", "batch:locks:ours"]).text(), "drayman:leader:1:a");
    assert!(rig.redis(&["PTTL", "batch:locks:ours"]).int() <= 5_000);
}

#[tokio::test]
async fn who_waits_hears_that_a_foreign_worker_has_let_go_of_a_host() {
    let rig = Rig::start().await;
    let leadership = rig.lead().await;
    rig.state().foreign().lock_host("theirs", "some-token");
    rig.submit("alice", "a1", "theirs");
    rig.notice(&["alice"]).await;
    let (session, mut ear) = parked(&rig, "sql:*").await;
    let hosts = async || leadership.active_hosts().await.unwrap();
    assert_eq!(leadership.hold_host_locks(PATIENCE, hosts().await).await.unwrap(), Ok(vec!["theirs".to_owned()]));
    assert_eq!(woken(&rig, &session, &mut ear).await, 0);
    rig.state().foreign().unlock_host("theirs");
    assert_eq!(leadership.hold_host_locks(PATIENCE, hosts().await).await.unwrap(), Ok(vec![]));
    assert_eq!(woken(&rig, &session, &mut ear).await, 1);
    assert_eq!(id(&take_one(&session).await), "a1");
}

#[tokio::test]
async fn a_host_that_a_foreign_worker_schedules_is_left_to_it_before_any_leader_has_looked() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    rig.submit("alice", "a1", "theirs");
    rig.submit("bob", "b1", "ours");
    rig.redis(&["SET", "batch:locks:theirs", "some-token", "PX", "60000"]);
    rig.redis(&["SET", "batch:locks:ours", "drayman:somebody", "PX", "60000"]);
    rig.notice(&["alice", "bob"]).await;
    assert_eq!(ids(&take(&session, 4).await), ["b1"]);
    rig.redis(&["DEL", "batch:locks:theirs"]);
    let leadership = rig.lead().await;
    let hosts = leadership.active_hosts().await.unwrap();
    assert_eq!(leadership.hold_host_locks(PATIENCE, hosts).await.unwrap(), Ok(vec![]));
    assert_eq!(ids(&take(&session, 4).await), ["a1"]);
}

#[tokio::test]
async fn a_pool_is_forgotten_when_it_was_idle_for_long_and_has_nothing_of_its_own() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    let leadership = rig.lead().await;
    rig.submit("alice", "a1", "used");
    rig.submit("bob", "b1", "busy");
    rig.redis(&["HSET", "drayman:pool:sql:kept", "capacity", "3"]);
    rig.notice(&["alice", "bob"]).await;
    let mut claims = take(&session, 4).await;
    claims.sort_by_key(|claim| claim.job().id.to_string());
    end(claims.remove(0), "done").await;
    let pools = || {
        let mut pools = rig.redis(&["KEYS", "drayman:pool:*"]).texts();
        pools.sort();
        pools
    };
    let all = ["drayman:pool:sql:busy", "drayman:pool:sql:kept", "drayman:pool:sql:used"];
    // The first pass sees that it is idle, a later one that it has been for long.
    assert_eq!(leadership.forget_idle_pools(Duration::ZERO).await.unwrap(), Ok(0));
    assert_eq!(leadership.forget_idle_pools(Duration::from_secs(3600)).await.unwrap(), Ok(0));
    assert_eq!(pools(), all);
    // Work in between begins the wait anew.
    rig.submit("alice", "a2", "used");
    rig.notice(&["alice"]).await;
    let again = take(&session, 4).await.remove(0);
    assert_eq!(leadership.forget_idle_pools(Duration::ZERO).await.unwrap(), Ok(0));
    end(again, "done").await;
    assert_eq!(leadership.forget_idle_pools(Duration::ZERO).await.unwrap(), Ok(0));
    assert_eq!(leadership.forget_idle_pools(Duration::ZERO).await.unwrap(), Ok(1));
    assert_eq!(pools(), all[..2]);
    assert!(rig.redis(&["EXISTS", "drayman:debt:sql:used", "drayman:busy:sql:used"]).int() == 0);
    end(claims.remove(0), "done").await;
    rig.balanced();
}
