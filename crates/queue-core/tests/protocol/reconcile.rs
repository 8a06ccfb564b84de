//! Layout: the keys themselves are the subject here, so these tests go or change with them.
//!
//! Keys that must agree: whatever makes them disagree is found, repaired and not found again, and a healthy system is left alone.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;
use queue_core::calls::{Beat, Finished, NotLeader, Verdict};
use queue_core::ids::SessionId;
use queue_core::reconcile::{self, Fate, Finding, Kind, Reconciler};
use queue_core::session::{Claim, Session};

use crate::support::*;

const KEEP: Duration = Duration::from_millis(KEEP_MS);

/// What goes on before something is damaged: two sessions with a running job each, jobs that wait, one that is scheduled,
/// one that has ended, one without a hash, a session that is parked.
struct Scene {
    rig: Rig,
    one: Session,
    two: Session,
    claims: Vec<Claim>,
}

impl Scene {
    async fn start() -> Self {
        let rig = Rig::start().await;
        let one = rig.session("sql:*", 4).await;
        let ended = native(&rig, "dave", "d1", 0).await;
        assert_eq!(end(take_one(&one).await, "done").await, Finished::Ended, "{ended}");
        for (user, id) in [("alice", "a1"), ("alice", "a2"), ("bob", "b1"), ("bob", "b2")] {
            native(&rig, user, id, 0).await;
        }
        native(&rig, "carol", "c1", 3_600_000).await;
        rig.redis(&["LPUSH", "batch:queue:erin", "late"]);
        let two = rig.session("sql:*", 4).await;
        let mut claims = vec![take_one(&one).await];
        rig.notice(&["erin"]).await;
        claims.extend(take(&two, 4).await);
        assert_eq!(ids(&claims), ["a1", "b1"]);
        rig.balanced();
        Self { rig, one, two, claims }
    }

    async fn check(&self) -> Vec<Finding> {
        let before = self.rig.dump();
        age(&self.rig);
        let found = reconcile::check(&self.rig.store, KEEP).await.unwrap();
        assert_eq!(self.rig.dump(), before, "a check changes nothing");
        found
    }

    async fn repair(&self) -> Vec<Finding> {
        age(&self.rig);
        reconcile::repair(&self.rig.store, KEEP).await.unwrap()
    }

    #[track_caller]
    fn expect_kinds(found: &[Finding], expected: &[Kind], fate: Fate) {
        let kinds: BTreeSet<Kind> = found.iter().map(|finding| finding.kind).collect();
        assert_eq!(kinds, expected.iter().copied().collect(), "{found:#?}");
        for finding in found {
            assert!(finding.fate == fate || finding.fate == Fate::Reported, "{finding:?}");
            assert!(!finding.sentence.is_empty() && !finding.what.is_empty(), "{finding:?}");
        }
    }
}

async fn native(rig: &Rig, user: &str, id: &str, delay_ms: u64) -> String {
    let mut job = submission(user, id, "h");
    job.delay_ms = delay_ms;
    let enqueued = rig.store.enqueue(&most(1_000, 16_384), &[job]).await.unwrap();
    format!("{enqueued:?}")
}

/// Makes all jobs and queues ones that nobody has touched for long, until the next read. Records keep their lifetime, so they stay as they are.
fn age(rig: &Rig) {
    for pattern in ["batch:jobs:*", "batch:queue:*"] {
        for key in rig.redis(&["KEYS", pattern]).texts() {
            if rig.redis(&["PTTL", &key]).int() == -1 {
                rig.idle(&key, 100);
            }
        }
    }
}

/// Lets a worker of its own end all that it gets, and says which jobs have not ended.
async fn work(rig: &Rig, ids: &[&str]) -> Vec<String> {
    let worker = rig.session("sql:*", 8).await;
    let leadership = rig.lead().await;
    let unended = || -> Vec<String> {
        let ended = |id: &str| matches!(rig.status_or_none(id).as_deref(), Some("done" | "failed" | "cancelled"));
        ids.iter().filter(|id| !ended(id)).map(|id| (*id).to_owned()).collect()
    };
    for _ in 0..20 {
        leadership.upkeep(KEEP).await.unwrap().unwrap();
        scan_index(&leadership).await.unwrap();
        leadership.scan_queues().await.unwrap().unwrap();
        for claim in take(&worker, 8).await {
            end(claim, "done").await;
        }
        if unended().is_empty() {
            break;
        }
    }
    worker.close().await.unwrap();
    unended()
}

/// What is broken by plain commands, and the kinds that tell of it. `{one}` and `{two}` stand for the sessions.
const REPAIRED: &[(&[Kind], &[&str])] = &[
    (&[Kind::LeaderLasting], &["SET drayman:leader gone:1:x\t7"]),
    (&[Kind::SessionGone, Kind::ClaimOrphaned, Kind::ParkedStray], &["DEL drayman:session:{two} drayman:work:{two}"]),
    (&[Kind::SessionGone, Kind::ClaimOrphaned, Kind::ParkedStray], &["DEL drayman:session:{two}"]),
    (
        &[Kind::SessionGone, Kind::ClaimOrphaned, Kind::ParkedStray],
        &["DEL drayman:session:{two}", "SREM drayman:sessions {two}"],
    ),
    (&[Kind::SessionGone, Kind::ClaimOrphaned, Kind::ParkedStray], &["HDEL drayman:session:{two} take"]),
    (&[Kind::SessionGone], &["SADD drayman:cancels:nobody:1:x z1"]),
    (&[Kind::SessionGone], &["HSET drayman:work:nobody:1:x z1 3"]),
    (&[Kind::SessionGone], &["SADD drayman:sessions nobody:1:x"]),
    (&[Kind::SessionUnlisted], &["SREM drayman:sessions {one}"]),
    (&[Kind::SessionUnlisted], &["DEL drayman:sessions"]),
    (
        &[Kind::ClaimMalformed, Kind::WorkUnclaimed, Kind::PoolMiscount, Kind::UserMiscount],
        &["HSET drayman:claims a1 nonsense"],
    ),
    (&[Kind::ClaimUnlisted], &["HDEL drayman:work:{one} a1"]),
    (&[Kind::ClaimUnlisted], &["DEL drayman:work:{one}"]),
    (&[Kind::WorkUnclaimed, Kind::RunningLost, Kind::PoolMiscount, Kind::UserMiscount], &["DEL drayman:claims"]),
    (&[Kind::WorkUnclaimed], &["HSET drayman:work:{two} a1 1"]),
    (&[Kind::WorkUnclaimed], &["HSET drayman:work:{two} a2 1"]),
    (&[Kind::CancelStray], &["SADD drayman:cancels:{one} b1 z1"]),
    (
        &[Kind::RunningLost, Kind::PoolMiscount, Kind::UserMiscount],
        &["DEL drayman:claims drayman:work:{one} drayman:work:{two}"],
    ),
    (&[Kind::PendingLost], &["DEL batch:queue:alice"]),
    (&[Kind::ScheduledLost], &["DEL drayman:due"]),
    (&[Kind::FinalKept], &["PERSIST batch:jobs:d1"]),
    (&[Kind::FinalKept], &["PERSIST batch:jobs:d1", "DEL drayman:finished"]),
    (&[Kind::DueStray], &["ZADD drayman:due 99999999999999 nothing"]),
    (&[Kind::DueStray], &["ZADD drayman:due 99999999999999 b2", "DEL batch:queue:bob"]),
    (&[Kind::MissingMalformed], &["ZADD drayman:missing 1 word"]),
    (&[Kind::FinishedStray, Kind::PendingLost], &["HSET batch:jobs:d1 status pending", "PERSIST batch:jobs:d1"]),
    (&[Kind::FinishedStray], &["DEL batch:jobs:d1"]),
    (&[Kind::FinalUnbooked], &["ZREM drayman:expiring d1"]),
    (&[Kind::FinalUnbooked, Kind::SumWrong], &["HDEL drayman:kept d1"]),
    (&[Kind::SumWrong], &["HINCRBY drayman:kept * 1000"]),
    (&[Kind::SumWrong], &["HSET drayman:delays alice 7"]),
    (&[Kind::DelayedStray], &["HSET drayman:delayed nobody alice"]),
    (&[Kind::WipStray], &["LPUSH batch:wip:user:alice b2 nothing"]),
    (
        &[Kind::WipMissing, Kind::WipStray],
        &["LREM batch:wip:user:alice 0 a1", "LPUSH batch:wip:user:alice b1", "HSET batch:jobs:b1 status running"],
    ),
    (&[Kind::WipMissing, Kind::WipIndex], &["DEL batch:wip:user:alice batch:wip:users"]),
    (&[Kind::WipIndex], &["SREM batch:wip:users alice", "SADD batch:wip:users zoe"]),
    (&[Kind::LineIndex], &["SADD drayman:lines app.op:zoe"]),
    (&[Kind::UserMiscount], &["HSET drayman:active zoe 0"]),
    (&[Kind::PoolMalformed], &["HSET drayman:pool:sql:h capacity many user_limit some"]),
    (&[Kind::PoolMalformed, Kind::PoolMiscount], &["HSET drayman:pool:sql:h running some"]),
    (&[Kind::PoolMalformed, Kind::PoolTimeless], &["HSET drayman:pool:sql:h v nan-ish"]),
    (&[Kind::PoolMiscount], &["HSET drayman:pool:sql:h running 9"]),
    (&[Kind::PoolMiscount], &["HSET drayman:pool:sql:h running 0"]),
    (&[Kind::PoolMiscount, Kind::PoolTimeless], &["DEL drayman:pool:sql:h"]),
    (&[Kind::UserMiscount, Kind::QueueUnnoticed], &["HDEL drayman:busy:sql:h alice"]),
    (&[Kind::UserMiscount], &["HSET drayman:busy:sql:h alice 7 zoe 2"]),
    (
        &[Kind::UserMiscount, Kind::ReadyBeyondLimit, Kind::QueueUnnoticed],
        &["DEL drayman:busy:sql:h", "ZADD drayman:ready:sql:h 1 alice", "ZADD drayman:pools:sql: 1 sql:h"],
    ),
    (&[Kind::ReadyBeyondLimit], &["ZADD drayman:ready:sql:h 1 alice", "ZADD drayman:pools:sql: 1 sql:h"]),
    (
        &[Kind::PoolUnlisted],
        &[
            "HSET batch:jobs:zz user zoe host z",
            "ZADD drayman:ready:sql:z 1 zoe",
            "LPUSH batch:queue:zoe zz",
            "SADD batch:indexes:queue zoe",
        ],
    ),
    (&[Kind::PoolUnlisted], &["ZADD drayman:pools:sql: 1 sql:h", "SREM drayman:classes sql:"]),
    (&[Kind::ParkedStray], &["ZADD drayman:parked:sql:* 1 nobody:1:x"]),
    (&[Kind::ServiceUnlisted], &["SREM drayman:services sql:*"]),
    (&[Kind::LineBarred], &["SADD drayman:barred:alice sql:alice"]),
    (&[Kind::UniqueStray], &["SET drayman:unique:key nonsense"]),
    (&[Kind::ScheduleUnlisted], &["HSET drayman:schedule:nightly cron x due 17", "ZADD drayman:schedules 18 nightly"]),
    (&[Kind::ScheduleUnlisted], &["HSET drayman:schedule:nightly cron x due 17 paused then"]),
    (
        &[Kind::TrackIndex],
        &["HSET drayman:track:invoices:a status pending was failed", "ZADD drayman:track_status:invoices:failed 1 a"],
    ),
    (&[Kind::TrackIndex], &["HSET drayman:track:invoices:a status in_progress lock l lock_until 5 fence 1"]),
    (&[Kind::TrackIndex], &["HSET drayman:track:invoices:a status ignored keep_ms 9000000 lock l"]),
    (&[Kind::QueueUnnoticed], &["HSET batch:jobs:zz user zoe host z", "LPUSH batch:queue:zoe zz"]),
];

#[tokio::test]
async fn each_kind_is_found_repaired_and_not_found_again_and_all_jobs_end() {
    for (kinds, commands) in REPAIRED {
        let scene = Scene::start().await;
        let rig = &scene.rig;
        for command in *commands {
            let command = command.replace("{one}", scene.one.id().as_str()).replace("{two}", scene.two.id().as_str());
            rig.redis(&command.split(' ').collect::<Vec<_>>());
        }
        let found = scene.check().await;
        Scene::expect_kinds(&found, kinds, Fate::Repairable);
        let repaired = scene.repair().await;
        // One repair may put right what another would have, or show what is left to do.
        assert!(!repaired.is_empty() && repaired.iter().all(|f| f.fate == Fate::Repaired), "{repaired:#?}");
        assert_eq!(scene.check().await, []);
        rig.balanced();

        // What a live session has claimed is still its own.
        let lost = [Kind::ClaimMalformed, Kind::ClaimOrphaned, Kind::WorkUnclaimed, Kind::RunningLost];
        let lost_claims = repaired.iter().any(|finding| lost.contains(&finding.kind));
        rig.redis(&["ZADD", "drayman:due", "XX", "1", "c1"]);
        rig.redis(&["DEL", "drayman:leader"]);
        for claim in scene.claims {
            let ended = end(claim, "done").await;
            assert!(lost_claims || ended == Finished::Ended, "{commands:?}");
        }
        assert_eq!(work(rig, &["a1", "a2", "b1", "b2", "c1"]).await, Vec::<String>::new(), "{commands:?}");
        rig.balanced();
    }
}

#[tokio::test]
async fn what_only_an_operator_can_put_right_is_reported_and_left() {
    let cases: &[(Kind, &str, &[&str])] = &[
        (Kind::WrongType, "drayman:services", &["DEL drayman:services", "SET drayman:services x"]),
        (Kind::WrongType, "drayman:claims", &["DEL drayman:claims", "LPUSH drayman:claims x"]),
        (Kind::UnknownKey, "drayman:what", &["SET drayman:what x"]),
        (Kind::ClaimJobless, "a1", &["DEL batch:jobs:a1"]),
        (Kind::ClaimJobless, "a1", &["SET batch:jobs:a1 x"]),
        (Kind::RunningForeign, "z1", &["HSET batch:jobs:z1 user zoe status running host h"]),
        (Kind::PendingUnqueued, "z1", &["HSET batch:jobs:z1 user zoe status pending host h"]),
        (Kind::JobOwnerless, "z1", &["HSET batch:jobs:z1 fence 3 status running host h"]),
    ];
    for (kind, what, commands) in cases {
        let scene = Scene::start().await;
        for command in *commands {
            scene.rig.redis(&command.split(' ').collect::<Vec<_>>());
        }
        for _ in 0..2 {
            let before = scene.rig.dump();
            age(&scene.rig);
            let found = reconcile::repair(&scene.rig.store, KEEP).await.unwrap();
            let told = found.iter().find(|finding| finding.kind == *kind);
            let told = told.unwrap_or_else(|| panic!("{commands:?}: {found:#?}"));
            assert_eq!((told.what.as_str(), told.fate), (*what, Fate::Reported));
            if found.iter().all(|finding| finding.fate == Fate::Reported) {
                assert_eq!(scene.rig.dump(), before, "{commands:?}");
            }
        }
    }
}

#[test]
fn the_script_names_the_kinds_that_there_are() {
    let script = include_str!("../../src/upkeep/look.lua");
    let named: BTreeSet<&str> = script.split("found('").skip(1).map(|rest| rest.split('\'').next().unwrap()).collect();
    assert_eq!(named, Kind::ALL.iter().map(|kind| kind.word()).collect());
}

#[test]
fn every_kind_has_a_damage_that_shows_it() {
    let shown: BTreeSet<Kind> = REPAIRED.iter().flat_map(|(kinds, _)| kinds.iter().copied()).collect();
    let reported = [
        Kind::WrongType,
        Kind::UnknownKey,
        Kind::ClaimJobless,
        Kind::RunningForeign,
        Kind::PendingUnqueued,
        Kind::JobOwnerless,
    ];
    // Those of batches and flows have scenes of their own.
    let batches = [
        Kind::BatchLost,
        Kind::BatchPartsLost,
        Kind::BatchUnsettled,
        Kind::BatchBroken,
        Kind::BatchView,
        Kind::PartStray,
    ];
    let elsewhere = batches.into_iter().chain([Kind::FlowStuck]);
    assert_eq!(
        shown.into_iter().chain(reported).chain(elsewhere).collect::<BTreeSet<_>>(),
        Kind::ALL.iter().copied().collect()
    );
}

#[tokio::test]
async fn a_job_that_goes_back_says_that_nobody_saw_its_end_and_keeps_its_trace() {
    for damage in ["DEL drayman:claims", "DEL drayman:session:{one}", "DEL drayman:claims drayman:work:{one}"] {
        let scene = Scene::start().await;
        let rig = &scene.rig;
        let one = scene.one.id().as_str().to_owned();
        rig.redis(&["HSET", "batch:jobs:a1", "trace", "something"]);
        rig.redis(&damage.replace("{one}", &one).split(' ').collect::<Vec<_>>());
        scene.repair().await;
        assert_eq!(rig.queue("alice"), ["a1", "a2"], "{damage}: it is the next");
        let hash = rig.hash("a1");
        let said = ["status", "unclean", "lost_worker", "trace"].map(|field| hash[field].as_str());
        assert_eq!(said, ["pending", "1", &one, "something"], "{damage}");
        // Its earlier holder has nothing more to say.
        let [first, ..] = <[Claim; 2]>::try_from(scene.claims).unwrap();
        assert_eq!(end(first, "done").await, Finished::Stale);
        let again = take_one(&scene.two).await;
        assert_eq!(id(&again), "a1");
        rig.balanced();
    }
}

#[tokio::test]
async fn what_a_producer_is_just_writing_is_no_finding() {
    let rig = Rig::start().await;
    let none = async || assert_eq!(reconcile::repair(&rig.store, KEEP).await.unwrap(), []);
    // A hash before its list, a list before its hash, a list that nobody has announced, an index before its list.
    rig.redis(&["HSET", "batch:jobs:a1", "user", "alice", "status", "pending", "host", "h"]);
    none().await;
    rig.redis(&["LPUSH", "batch:queue:alice", "a1"]);
    none().await;
    rig.redis(&["LPUSH", "batch:queue:bob", "b1"]);
    rig.redis(&["SADD", "batch:indexes:queue", "carol"]);
    none().await;
    // An ended job that is submitted anew.
    let session = rig.session("sql:*", 4).await;
    rig.notice(&["alice", "bob"]).await;
    none().await;
    end(take_one(&session).await, "done").await;
    rig.redis(&["HSET", "batch:jobs:a1", "status", "pending"]);
    none().await;
    rig.redis(&["LPUSH", "batch:queue:alice", "a1"]);
    rig.notice(&["alice"]).await;
    none().await;
    let claim = take_one(&session).await;
    none().await;
    end(claim, "done").await;
    none().await;
    // A foreign canceller, of a job that waits and of one that is scheduled.
    native(&rig, "alice", "a2", 3_600_000).await;
    native(&rig, "alice", "a3", 0).await;
    for id in ["a2", "a3"] {
        rig.redis(&["HSET", &job_key(id), "status", "cancelled"]);
    }
    age(&rig);
    assert_eq!(reconcile::repair(&rig.store, KEEP).await.unwrap(), []);
    rig.redis(&["ZADD", "drayman:due", "XX", "1", "a2"]);
    assert!(take(&session, 4).await.is_empty());
    for id in ["a2", "a3"] {
        assert!(rig.redis(&["PTTL", &job_key(id)]).int() > 0, "{id} has an end");
    }
    none().await;
}

#[tokio::test]
async fn a_host_that_a_foreign_worker_schedules_keeps_its_running_jobs() {
    let rig = Rig::start().await;
    rig.redis(&["SET", "batch:locks:theirs", "some-token"]);
    rig.redis(&["HSET", "batch:jobs:f1", "user", "fay", "status", "running", "host", "theirs", "fence", "7"]);
    rig.redis(&["LPUSH", "batch:wip:user:fay", "f1"]);
    rig.redis(&["SADD", "batch:wip:users", "fay"]);
    age(&rig);
    let found = reconcile::repair(&rig.store, KEEP).await.unwrap();
    Scene::expect_kinds(&found, &[Kind::RunningForeign], Fate::Reported);
    assert_eq!(rig.status("f1"), "running");
}

#[tokio::test]
async fn only_the_leader_of_the_term_repairs_and_what_it_can_only_report_it_tells_once() {
    let scene = Scene::start().await;
    let rig = &scene.rig;
    let leadership = rig.lead().await;
    rig.redis(&["HSET", "batch:jobs:z1", "user", "zoe", "status", "pending"]);
    rig.redis(&["SREM", "drayman:sessions", scene.one.id().as_str()]);
    let before = rig.dump();
    let leader = SessionId::new("leader:1:a").unwrap();
    let reply = rig.store.reconcile(true, Some((&leader, leadership.term() + 1)), 0, "jobs", &[b"z1".to_vec()]).await;
    assert_eq!(reply.unwrap(), Err(NotLeader));
    assert_eq!(rig.dump(), before);

    age(rig);
    let mut reconciler = Reconciler::default();
    let found = reconciler.round(&leadership, KEEP).await.unwrap().unwrap();
    Scene::expect_kinds(&found, &[Kind::PendingUnqueued, Kind::SessionUnlisted], Fate::Repaired);
    age(rig);
    assert_eq!(reconciler.round(&leadership, KEEP).await.unwrap().unwrap(), []);
    // Old hashes that nothing refers to can still be removed: nobody looks at what is known.
    let idle = rig.redis(&["OBJECT", "IDLETIME", "batch:jobs:z1"]).int();
    assert!(idle >= 60, "touched {idle} s ago");
    queue_core::leader::resign(&rig.store, &leader).await.unwrap();
    assert_eq!(reconciler.round(&leadership, KEEP).await.unwrap(), Err(NotLeader));
}

#[tokio::test]
async fn many_keys_are_compared_in_pages() {
    let rig = Rig::start().await;
    let mut client = rig.server.client(DB);
    let mut jobs: Vec<_> = Vec::new();
    for number in 0..1_100 {
        jobs.push(submission(&format!("u{number}"), &format!("j{number}"), &format!("h{}", number % 300)));
    }
    for page in jobs.chunks(100) {
        rig.store.enqueue(&most(64, 16_384), page).await.unwrap();
    }
    assert_eq!(reconcile::repair(&rig.store, KEEP).await.unwrap(), []);
    for number in 0..1_100 {
        client.call(&["DEL", &format!("drayman:ready:sql:h{number}"), &queue_key(&format!("u{number}"))]);
        rig.idle(&format!("batch:jobs:j{number}"), 100);
    }
    let found = reconcile::repair(&rig.store, KEEP).await.unwrap();
    Scene::expect_kinds(&found, &[Kind::PendingLost], Fate::Repaired);
    assert_eq!(found.len(), 1_100);
    assert_eq!(reconcile::check(&rig.store, KEEP).await.unwrap(), []);
    rig.balanced();
}

#[derive(Clone, Debug)]
enum Step {
    Submit { user: u8, host: u8, delayed: bool },
    SubmitForeign { user: u8, host: u8 },
    PushAgain { job: u8, user: u8 },
    Take { session: u8, n: usize },
    End { session: u8, claim: u8, how: u8 },
    Cancel { job: u8 },
    Close { session: u8 },
    Beat { session: u8 },
    Lead,
}

fn steps(most: usize) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        5 => (0..4_u8, 0..3_u8, prop::bool::weighted(0.2))
            .prop_map(|(user, host, delayed)| Step::Submit { user, host, delayed }),
        2 => (0..4_u8, 0..3_u8).prop_map(|(user, host)| Step::SubmitForeign { user, host }),
        1 => (any::<u8>(), 0..4_u8).prop_map(|(job, user)| Step::PushAgain { job, user }),
        6 => (0..2_u8, 1..4_usize).prop_map(|(session, n)| Step::Take { session, n }),
        5 => (0..2_u8, any::<u8>(), 0..6_u8).prop_map(|(session, claim, how)| Step::End { session, claim, how }),
        1 => any::<u8>().prop_map(|job| Step::Cancel { job }),
        1 => (0..2_u8).prop_map(|session| Step::Close { session }),
        1 => (0..2_u8).prop_map(|session| Step::Beat { session }),
        1 => Just(Step::Lead),
    ];
    prop::collection::vec(step, 1..most)
}

/// Sessions with what they hold, and the jobs that were submitted.
struct Busy<'a> {
    rig: &'a Rig,
    sessions: Vec<(Session, Vec<Claim>)>,
    jobs: Vec<String>,
}

impl<'a> Busy<'a> {
    async fn start(rig: &'a Rig) -> Self {
        rig.redis(&["FLUSHDB"]);
        let sessions = vec![(rig.session("sql:*", 2).await, vec![]), (rig.session("sql:*", 2).await, vec![])];
        rig.lead().await;
        Self { rig, sessions, jobs: Vec::new() }
    }

    async fn step(&mut self, step: &Step) {
        let rig = self.rig;
        let next = format!("j{:03}", self.jobs.len());
        match step {
            Step::Submit { user, host, delayed } => {
                let mut job = submission(&format!("u{user}"), &next, &format!("h{host}"));
                job.delay_ms = if *delayed { 60_000 } else { 0 };
                rig.store.enqueue(&most(1_000, 16_384), &[job]).await.unwrap();
                self.jobs.push(next);
            }
            Step::SubmitForeign { user, host } => {
                rig.submit(&format!("u{user}"), &next, &format!("h{host}"));
                self.jobs.push(next);
            }
            Step::PushAgain { job, user } => {
                let Some(at) = usize::from(*job).checked_rem(self.jobs.len()) else { return };
                rig.redis(&["LPUSH", &format!("batch:queue:u{user}"), &self.jobs[at]]);
            }
            Step::Take { session, n } => {
                let (session, held) = &mut self.sessions[usize::from(*session)];
                held.extend(take(session, *n).await);
            }
            Step::End { session, claim, how } => {
                let held = &mut self.sessions[usize::from(*session)].1;
                let Some(at) = usize::from(*claim).checked_rem(held.len()) else { return };
                let claim = held.remove(at);
                match how {
                    0 => put(claim, Verdict::Next).await,
                    1 => put(claim, Verdict::Back).await,
                    2 => put(claim, Verdict::Later { after_ms: 60_000 }).await,
                    _ => end(claim, "done").await,
                };
            }
            Step::Cancel { job } => {
                let Some(at) = usize::from(*job).checked_rem(self.jobs.len()) else { return };
                let canceller = queue_core::cancel::Canceller::new(rig.store.clone(), Duration::from_secs(3_600));
                canceller.cancel(&queue_core::ids::JobId::new(self.jobs[at].as_str()).unwrap()).await.unwrap();
            }
            Step::Close { session } => {
                let fresh = (rig.session("sql:*", 2).await, Vec::new());
                let (session, _) = std::mem::replace(&mut self.sessions[usize::from(*session)], fresh);
                session.close().await.unwrap();
            }
            Step::Beat { session } => {
                let beat = self.sessions[usize::from(*session)].0.beat().await.unwrap();
                assert!(matches!(beat, Beat::Alive { .. }));
            }
            Step::Lead => {
                let leadership = rig.lead().await;
                leadership.upkeep(KEEP).await.unwrap().unwrap();
                leadership.scan_queues().await.unwrap().unwrap();
            }
        }
    }
}

/// Makes jobs old in the way that a check sees it, but not the queues: nobody leads here between the steps.
fn age_jobs(rig: &Rig) {
    for key in rig.redis(&["KEYS", "batch:jobs:*"]).texts() {
        if rig.redis(&["PTTL", &key]).int() == -1 {
            rig.idle(&key, 100);
        }
    }
}

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 200, ..ProptestConfig::default() }
}

#[test]
fn a_healthy_system_gives_no_finding_at_any_moment_and_a_repair_changes_nothing() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let rig = runtime.block_on(Rig::start());
    proptest!(cases(12), |(steps in steps(40))| {
        runtime.block_on(async {
            let mut busy = Busy::start(&rig).await;
            for step in &steps {
                busy.step(step).await;
                let before = rig.dump();
                age_jobs(&rig);
                assert_eq!(reconcile::check(&rig.store, KEEP).await.unwrap(), [], "after {step:?}");
                assert_eq!(rig.dump(), before);
                age_jobs(&rig);
                assert_eq!(reconcile::repair(&rig.store, KEEP).await.unwrap(), [], "after {step:?}");
                assert_eq!(rig.dump(), before);
            }
        });
    });
}

/// Removes something of ours, or a queue: numbers choose the key and what of it.
fn damage(rig: &Rig, key: u16, part: u16) {
    let mut keys = rig.redis(&["KEYS", "drayman:*"]).texts();
    keys.extend(rig.redis(&["KEYS", "batch:queue:*"]).texts());
    keys.sort();
    let Some(at) = usize::from(key).checked_rem(keys.len()) else { return };
    let key = &keys[at];
    let pick = |members: Vec<String>| members[usize::from(part / 2) % members.len()].clone();
    match (part % 2, rig.redis(&["TYPE", key]).text().as_str()) {
        (0, "hash") => drop(rig.redis(&["HDEL", key, &pick(rig.redis(&["HKEYS", key]).texts())])),
        (0, "set") => drop(rig.redis(&["SREM", key, &pick(rig.redis(&["SMEMBERS", key]).texts())])),
        (0, "zset") => drop(rig.redis(&["ZREM", key, &pick(rig.redis(&["ZRANGE", key, "0", "-1"]).texts())])),
        _ => drop(rig.redis(&["DEL", key])),
    }
}

#[test]
fn after_any_damage_and_a_repair_every_job_ends() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let rig = runtime.block_on(Rig::start());
    let damages = prop::collection::vec((any::<u16>(), any::<u16>()), 1..12);
    proptest!(cases(40), |(steps in steps(30), damages in damages)| {
        // What was never in our hands can't be told from what its producer holds back.
        let steps: Vec<Step> =
            steps.into_iter().filter(|step| !matches!(step, Step::SubmitForeign { .. } | Step::PushAgain { .. })).collect();
        runtime.block_on(async {
            let mut busy = Busy::start(&rig).await;
            for step in &steps {
                busy.step(step).await;
            }
            for (key, part) in &damages {
                damage(&rig, *key, *part);
            }
            age(&rig);
            let found = reconcile::repair(&rig.store, KEEP).await.unwrap();
            age(&rig);
            assert_eq!(reconcile::check(&rig.store, KEEP).await.unwrap(), [], "after {found:#?}");
            rig.balanced();
            // Workers notice that their sessions are gone, or end what they hold; the leader buries the others.
            for (session, claims) in busy.sessions {
                for claim in claims {
                    end(claim, "done").await;
                }
                session.close().await.unwrap();
            }
            for id in rig.redis(&["ZRANGE", "drayman:due", "0", "-1"]).texts() {
                rig.redis(&["ZADD", "drayman:due", "1", &id]);
            }
            let names: Vec<&str> = busy.jobs.iter().map(String::as_str).collect();
            assert_eq!(work(&rig, &names).await, Vec::<String>::new(), "{found:#?}");
            rig.balanced();
            let ended: BTreeMap<&str, String> = names.iter().map(|id| (*id, rig.status(id))).collect();
            assert!(ended.values().all(|status| status != "failed"), "{ended:?}");
        });
    });
}

#[tokio::test]
async fn who_is_ready_beyond_its_limit_is_found_among_many_whose_jobs_run() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 200).await;
    let jobs: Vec<_> = (0..120).map(|i| submission(&format!("u{i}"), &format!("j{i}"), "h")).collect();
    for jobs in jobs.chunks(100) {
        rig.store.enqueue(&most(64, 16_384), jobs).await.unwrap();
    }
    let mut claims = take(&session, 100).await;
    claims.extend(take(&session, 100).await);
    assert_eq!(claims.len(), 120);
    rig.state().list_ready("sql:h", "u77", 1);
    let found = reconcile::repair(&rig.store, KEEP).await.unwrap();
    let found: Vec<_> = found.iter().map(|finding| (finding.kind, &*finding.what, finding.fate)).collect();
    assert_eq!(found, [(Kind::ReadyBeyondLimit, "u77", Fate::Repaired)]);
    assert_eq!(reconcile::check(&rig.store, KEEP).await.unwrap(), []);
    rig.balanced();
}
