//! Layout: the keys themselves are the subject here, so these tests go or change with them.
//!
//! Every key has an owner and an end.

use std::time::Duration;

use queue_core::calls::{Fields, SessionEnd, Verdict};
use queue_core::cancel::Canceller;
use queue_core::ids::{JobId, SessionId};
use queue_core::leader;

use crate::support::*;

/// What may stay when no job and no session is left, and why.
const MAY_STAY: &[&str] = &[
    "drayman:version", // one value
    "drayman:term",
    "drayman:turn",    // one value
    "drayman:pool:",   // a few numbers a pool
    "drayman:classes", // as long as there are pools of them
    "drayman:debt:",   // one number for each user that was served last: what it owes
    "drayman:pace:",   // expires
    "drayman:lost:",   // expires
    "batch:rejected",  // trimmed
    "limits:batch:",   // the operators'
];

#[tokio::test]
async fn nothing_is_left_of_jobs_that_ended_and_were_kept_long_enough() {
    let rig = Rig::start().await;
    let store = &rig.store;
    let mut service = service("sql:* db:*", 8);
    service.fairness = queue_core::session::Fairness::Time;
    let session = open(store, service.clone()).await;
    let doomed = open(store, service.clone()).await;
    let leadership = rig.lead().await;
    let leader = SessionId::new("leader:1:a").unwrap();
    rig.redis(&["HSET", "limits:batch:alice", "timeout", "5000", "weight", "2"]);

    for (user, id) in [("alice", "a1"), ("alice", "a2"), ("bob", "b1"), ("carol", "c1"), ("dave", "d1")] {
        rig.submit(user, id, "h");
    }
    let mut delayed = submission("erin", "e1", "h");
    delayed.delay_ms = 1;
    store.enqueue(&most(64, 16_384), &[delayed, submission("frank", "f1", "other")]).await.unwrap();
    rig.redis(&["LPUSH", "batch:queue:gus", "no such hash", "late", "never"]);
    leadership.scan_queues().await.unwrap().unwrap();
    rig.redis(&["HSET", "batch:jobs:late", "user", "gus", "host", "h"]);
    rig.redis(&["ZADD", "drayman:missing", "XX", "1", "never gus"]);
    rig.redis(&["HSET", "batch:jobs:big", "user", "hal", "query", &"x".repeat(2 << 20)]);
    rig.redis(&["LPUSH", "batch:queue:hal", "big"]);
    rig.notice(&["hal"]).await;

    // One session dies with what it holds, one job is cancelled while it waits and one while it runs.
    let lost = take(&doomed, 2).await;
    assert_eq!(lost.len(), 2);
    let reclaimed = store.session_reclaim(doomed.id().as_str(), 0, &leader, leadership.term()).await.unwrap();
    assert_eq!(reclaimed, Ok(SessionEnd::Ended(2)));
    drop(lost);
    let canceller = Canceller::new(store.clone(), Duration::from_millis(1));
    canceller.cancel(&JobId::new("a2").unwrap()).await.unwrap();

    // Each job goes through another end on its first turn, and ends on its second.
    let mut turns = 0;
    let mut verdicts = [Verdict::Next, Verdict::Back, Verdict::Later { after_ms: 1 }].into_iter();
    testkit::eventually("all jobs to end", async || {
        leadership.upkeep(Duration::ZERO).await.unwrap().unwrap();
        for claim in take(&session, 8).await {
            turns += 1;
            canceller.cancel(&claim.job().id).await.unwrap();
            let (verdict, fields) = match verdicts.next() {
                Some(verdict) => (verdict, Fields::new()),
                None => (Verdict::Final { keep_ms: 1 }, Fields::new().with("status", "done")),
            };
            claim.finish(verdict, Duration::from_millis(3), fields, true).await.unwrap();
        }
        (turns == 10).then_some(())
    })
    .await;
    rig.balanced();

    assert!(take(&session, 8).await.is_empty());
    rig.redis(&["PEXPIRE", "batch:jobs:big", "1"]);
    session.close().await.unwrap();
    testkit::eventually("records to expire", async || {
        leadership.upkeep(Duration::ZERO).await.unwrap().unwrap();
        rig.redis(&["KEYS", "batch:jobs:*"]).texts().is_empty().then_some(())
    })
    .await;
    // What expired before its time is found by comparing.
    queue_core::reconcile::repair(store, Duration::ZERO).await.unwrap();
    leader::resign(store, &leader).await.unwrap();
    let left: Vec<String> =
        rig.dump().into_keys().filter(|key| !MAY_STAY.iter().any(|may| key.starts_with(may))).collect();
    assert_eq!(left, Vec::<String>::new());
    for keys in ["drayman:pace:*", "drayman:lost:*"] {
        for key in rig.redis(&["KEYS", keys]).texts() {
            assert!(rig.redis(&["PTTL", &key]).int() > 0, "{key} has an end");
        }
    }
}

#[tokio::test]
async fn nothing_is_left_of_limits_and_bands_when_their_jobs_have_ended() {
    let rig = Rig::start().await;
    let session = rig.session("*", 8).await;
    let limits = ["concurrency", "2", "rate", "3", "period", "40"];
    rig.redis(&[&["HSET", "limits:batch:ann"], &limits[..]].concat());
    rig.redis(&[&["HSET", "drayman:pool:app.x"], &limits[..]].concat());
    let mut jobs = Vec::new();
    for (number, band) in ["high", "low", "", "high", "low", ""].iter().enumerate() {
        for user in ["ann", "bob"] {
            let mut task = submission(user, &format!("{user}-t{number}"), "h");
            task.fields = Fields::new().with("kind", "task").with("app", "app").with("op", "x").with("priority", band);
            let mut sql = submission(user, &format!("{user}-s{number}"), "h");
            sql.fields = sql.fields.with("priority", band);
            jobs.extend([task, sql]);
        }
    }
    rig.store.enqueue(&most(64, 16_384), &jobs).await.unwrap();
    let canceller = Canceller::new(rig.store.clone(), Duration::from_millis(1));
    for id in ["ann-t5", "bob-s3", "bob-t0", "bob-t3"] {
        canceller.cancel(&JobId::new(id).unwrap()).await.unwrap();
    }
    let mut ended = 0;
    testkit::eventually("all jobs to end", async || {
        for claim in take(&session, 8).await {
            ended += 1;
            end(claim, "done").await;
        }
        (ended == jobs.len() - 4).then_some(())
    })
    .await;
    testkit::eventually("what is kept of limits to go", async || {
        assert!(take(&session, 8).await.is_empty());
        let left =
            ["barred:*", "throttled", "starts:*", "bands", "active", "high:*", "low:*", "lines", "ready:*", "busy:*"];
        let left = left.iter().flat_map(|name| rig.redis(&["KEYS", &format!("drayman:{name}")]).texts());
        left.collect::<Vec<_>>().is_empty().then_some(())
    })
    .await;
    rig.balanced();
}
