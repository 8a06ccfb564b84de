//! Limits hold over all workers, waste nothing, keep nobody else waiting, and change while everything runs.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use queue_core::Store;
use queue_core::calls::{Fields, Submission, Verdict};
use queue_core::ids::{Pool, SessionId, User};
use queue_core::limits::{InForce, Limits, OfPool, OfUser, Reason, Set, Whose};
use queue_core::reconcile;
use queue_core::session::{Claim, Session};
use testkit::{RedisServer, end_of};

use crate::support::*;
use crate::wakeups::{parked, woken};

async fn rig_with_clock() -> Rig {
    let server = RedisServer::with_clock(&[]);
    let store = Store::connect(&config(server.url_db(DB))).await.expect("the server answers");
    Rig { server, store }
}

fn limits(rig: &Rig) -> Limits {
    Limits::new(rig.store.clone())
}

fn user(name: &str) -> User {
    User::new(name).unwrap()
}

fn pool(name: &str) -> Pool {
    Pool::new(name).unwrap()
}

/// A limit, as it is typed.
fn to<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> Set<T> {
    text.parse::<Set<T>>().unwrap()
}

fn rate_of_user(text: &str) -> OfUser {
    OfUser { rate: to(text), ..OfUser::default() }
}

fn rate_of_pool(text: &str) -> OfPool {
    OfPool { rate: to(text), ..OfPool::default() }
}

fn at_once(text: &str) -> OfUser {
    OfUser { concurrency: to(text), ..OfUser::default() }
}

/// A job in a pool: `sql:<host>`, or a task of a handler. The band is `high`, `low` or none.
fn job(user: &str, id: &str, pool: &str, band: &str) -> Submission {
    let mut job = submission(user, id, pool.trim_start_matches("sql:"));
    if let Some((app, op)) = pool.split_once('.') {
        job.fields = Fields::new().with("kind", "task").with("app", app).with("op", op).with("input", "1");
    }
    if !band.is_empty() {
        job.fields = job.fields.with("priority", band);
    }
    job
}

async fn enqueue(rig: &Rig, user: &str, pool: &str, ids: &[&str]) {
    let jobs: Vec<_> = ids.iter().map(|id| job(user, id, pool, "")).collect();
    rig.store.enqueue(&most(100_000, 16_384), &jobs).await.unwrap();
}

/// So many jobs, named after their user and pool.
async fn enqueue_many(rig: &Rig, user: &str, pool: &str, count: usize) {
    let names: Vec<String> = (0..count).map(|number| format!("{user}-{pool}-{number}")).collect();
    for chunk in names.chunks(100) {
        enqueue(rig, user, pool, &chunk.iter().map(String::as_str).collect::<Vec<_>>()).await;
    }
}

/// No key is found to disagree with another one.
async fn agreed(rig: &Rig) {
    rig.balanced();
    let findings = reconcile::check(&rig.store, Duration::from_secs(7_200)).await.unwrap();
    assert!(findings.is_empty(), "{findings:?}");
}

async fn findings(rig: &Rig) -> Vec<String> {
    let findings = reconcile::repair(&rig.store, Duration::from_secs(7_200)).await.unwrap();
    findings.iter().map(|finding| finding.kind.to_string()).collect()
}

// Random work under random limits.

const USERS: [&str; 3] = ["ann", "bob", "cyd"];
const POOLS: [&str; 3] = ["app.x", "app.y", "sql:h"];

#[derive(Debug, Clone)]
enum Step {
    Enqueue { user: usize, pool: usize, jobs: usize },
    Take { session: usize, n: usize },
    End { which: usize, verdict: Verdict },
    Lose,
    Wait { seconds: i64 },
    UserRate { user: usize, rate: Option<(usize, i64)> },
    PoolRate { pool: usize, rate: Option<(usize, i64)> },
    Concurrency { user: usize, most: Option<usize> },
    Pause { user: usize, paused: bool },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let rate = || prop::option::of((1_usize..6, 1_i64..20));
    let verdict = prop_oneof![
        4 => Just(final_verdict()),
        1 => Just(Verdict::Back),
        1 => Just(Verdict::Next),
    ];
    let step = prop_oneof![
        5 => (0_usize..3, 0_usize..3, 1_usize..6).prop_map(|(user, pool, jobs)| Step::Enqueue { user, pool, jobs }),
        8 => (0_usize..2, prop_oneof![Just(1), Just(2), Just(100)]).prop_map(|(session, n)| Step::Take { session, n }),
        8 => (0_usize..50, verdict).prop_map(|(which, verdict)| Step::End { which, verdict }),
        1 => Just(Step::Lose),
        5 => (0_i64..8).prop_map(|seconds| Step::Wait { seconds }),
        2 => (0_usize..3, rate()).prop_map(|(user, rate)| Step::UserRate { user, rate }),
        2 => (0_usize..3, rate()).prop_map(|(pool, rate)| Step::PoolRate { pool, rate }),
        2 => (0_usize..3, prop::option::of(1_usize..4)).prop_map(|(user, most)| Step::Concurrency { user, most }),
        1 => (0_usize..3, any::<bool>()).prop_map(|(user, paused)| Step::Pause { user, paused }),
    ];
    prop::collection::vec(step, 10..60)
}

/// A rate, and the starts under it, in ms, the latest first.
#[derive(Debug, Default)]
struct Rate {
    rate: Option<(usize, i64)>,
    starts: VecDeque<i64>,
    /// How many of them were before the period got its present length: they count only as far as they are remembered.
    before: usize,
}

impl Rate {
    fn set(&mut self, rate: Option<(usize, i64)>) {
        if rate.map(|(_, seconds)| seconds) != self.rate.map(|(_, seconds)| seconds) {
            self.before = self.starts.len();
        }
        self.rate = rate;
    }

    fn room(&self, starts: usize, at: i64) -> bool {
        let Some((most, seconds)) = self.rate else { return true };
        self.starts.iter().take(starts).filter(|start| **start + seconds * 1_000 > at).count() < most
    }

    fn may_allow(&self, at: i64) -> bool {
        self.room(self.starts.len() - self.before, at)
    }

    fn must_allow(&self, at: i64) -> bool {
        self.room(self.starts.len(), at)
    }

    fn count(&mut self, at: i64) {
        if self.rate.is_some() {
            self.starts.push_front(at);
        }
    }
}

/// Checks after each take that it started nothing that a limit forbids and, where it could take enough, left nothing that all limits
/// allow.
async fn check_limits(rig: &Rig, clock: &mut i64, steps: &[Step]) -> Result<(), TestCaseError> {
    rig.redis(&["FLUSHDB"]);
    let limits = limits(rig);
    let mut sessions = [rig.session("*", 1_000).await, rig.session("*", 1_000).await];
    let mut waiting: BTreeMap<(String, String), usize> = BTreeMap::new();
    let mut held: Vec<Claim> = Vec::new();
    let (mut user_rates, mut pool_rates): ([Rate; 3], [Rate; 3]) = Default::default();
    let (mut most, mut paused, mut number, mut lost) = ([None; 3], [false; 3], 0, false);
    let running = |held: &[Claim], user: &str| held.iter().filter(|claim| claim.job().user.as_str() == user).count();
    for step in steps {
        match step {
            Step::Enqueue { user, pool, jobs } => {
                for _ in 0..*jobs {
                    number += 1;
                    enqueue(rig, USERS[*user], POOLS[*pool], &[&format!("j{number}")]).await;
                }
                *waiting.entry((USERS[*user].into(), POOLS[*pool].into())).or_default() += jobs;
            }
            Step::Take { session, n } => {
                let time = rig.redis(&["TIME"]).texts();
                let before = time[0].parse::<i64>().unwrap() * 1_000 + time[1].parse::<i64>().unwrap() / 1_000;
                let claims = take(&sessions[*session], *n).await;
                let got = claims.len();
                for claim in claims {
                    let job = claim.job().clone();
                    let at = job.fence.0 as i64 / 1_000;
                    let user = USERS.iter().position(|user| *user == job.user.as_str()).unwrap();
                    let pool = POOLS.iter().position(|pool| *pool == job.pool.as_str()).unwrap();
                    prop_assert!(!paused[user], "{job:?} is paused");
                    prop_assert!(user_rates[user].may_allow(at), "{job:?} at {at}: {:?}", user_rates[user]);
                    prop_assert!(pool_rates[pool].may_allow(at), "{job:?} at {at}: {:?}", pool_rates[pool]);
                    user_rates[user].count(at);
                    pool_rates[pool].count(at);
                    *waiting.get_mut(&(job.user.to_string(), job.pool.to_string())).unwrap() -= 1;
                    held.push(claim);
                    prop_assert!(most[user].is_none_or(|most| running(&held, USERS[user]) <= most), "{job:?}");
                }
                for ((user, pool), count) in waiting.iter().filter(|_| got < *n) {
                    let (u, p) = (USERS.iter().position(|u| u == user), POOLS.iter().position(|p| p == pool));
                    let (u, p) = (u.unwrap(), p.unwrap());
                    let in_sql = pool.starts_with("sql:")
                        && held
                            .iter()
                            .any(|claim| claim.job().user.as_str() == user && claim.job().pool.as_str() == pool);
                    let forbidden = paused[u]
                        || in_sql
                        || most[u].is_some_and(|most| running(&held, user) >= most)
                        || !user_rates[u].must_allow(before)
                        || !pool_rates[p].must_allow(before);
                    prop_assert!(*count == 0 || forbidden, "{count} jobs of {user} in {pool} are left");
                }
            }
            Step::End { which, verdict } => {
                if held.is_empty() {
                    continue;
                }
                let claim = held.swap_remove(which % held.len());
                if *verdict == final_verdict() {
                    end(claim, "done").await;
                } else {
                    *waiting.get_mut(&(claim.job().user.to_string(), claim.job().pool.to_string())).unwrap() += 1;
                    put(claim, verdict.clone()).await;
                }
            }
            // Once: jobs of two lost workers are suspects, which a session runs one at a time.
            Step::Lose if lost => {}
            Step::Lose => {
                lost = true;
                let leadership = rig.lead().await;
                let (leader, dead) = (SessionId::new("leader:1:a").unwrap(), sessions[0].id().clone());
                rig.store.session_reclaim(dead.as_str(), 0, &leader, leadership.term()).await.unwrap().unwrap();
                let (gone, kept): (Vec<_>, Vec<_>) = held.into_iter().partition(|claim| *claim.session() == dead);
                for claim in gone {
                    *waiting.get_mut(&(claim.job().user.to_string(), claim.job().pool.to_string())).unwrap() += 1;
                }
                held = kept;
                sessions[0] = rig.session("*", 1_000).await;
            }
            Step::Wait { seconds } => {
                *clock += seconds;
                rig.server.shift_clock(*clock);
            }
            Step::UserRate { user: at, rate } => {
                user_rates[*at].set(*rate);
                let text = rate.map_or("none".into(), |(most, seconds)| format!("{most}/{seconds}s"));
                limits.set_user(&user(USERS[*at]), rate_of_user(&text)).await.unwrap();
            }
            Step::PoolRate { pool: at, rate } => {
                pool_rates[*at].set(*rate);
                let text = rate.map_or("none".into(), |(most, seconds)| format!("{most}/{seconds}s"));
                limits.set_pool(&pool(POOLS[*at]), rate_of_pool(&text)).await.unwrap();
            }
            Step::Concurrency { user: at, most: said } => {
                most[*at] = *said;
                let text = said.map_or("none".into(), |most| most.to_string());
                limits.set_user(&user(USERS[*at]), at_once(&text)).await.unwrap();
            }
            Step::Pause { user: at, paused: wish } => {
                paused[*at] = *wish;
                let whose = Whose::User(user(USERS[*at]));
                match wish {
                    true => limits.pause(&whose, &Reason::default()).await.unwrap(),
                    false => limits.resume(&whose).await.unwrap(),
                }
            }
        }
        rig.balanced();
    }
    agreed(rig).await;
    Ok(())
}

#[test]
fn whatever_the_limits_are_nothing_more_starts_and_nothing_that_may_start_is_left() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let rig = runtime.block_on(rig_with_clock());
    let clock = std::cell::Cell::new(0);
    let config =
        ProptestConfig { cases: 30, failure_persistence: None, max_shrink_iters: 200, ..ProptestConfig::default() };
    proptest!(config, |(steps in steps())| {
        let mut seconds = clock.get();
        let result = runtime.block_on(check_limits(&rig, &mut seconds, &steps));
        clock.set(seconds);
        result?;
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn racing_sessions_never_run_more_of_a_user_than_it_may_and_others_do_not_wait() {
    const MOST: usize = 3;
    let rig = Arc::new(Rig::start().await);
    limits(&rig).set_user(&user("ann"), at_once("3")).await.unwrap();
    for pool in ["app.x", "app.y", "other.z"] {
        enqueue_many(&rig, "ann", pool, 50).await;
        enqueue_many(&rig, "bob", pool, 50).await;
    }
    let counters: Arc<[AtomicUsize; 3]> = Arc::default();
    let racers = (0..4).map(|_| {
        let (rig, counters) = (rig.clone(), counters.clone());
        tokio::spawn(async move {
            let [running, top, ended] = &*counters;
            let store = Store::connect(&config(rig.server.url_db(DB))).await.unwrap();
            let session = open(&store, service("*", 1_000)).await;
            let state = rig.state();
            while ended.load(Ordering::SeqCst) < 300 {
                let claims = take(&session, 7).await;
                let of_ann = claims.iter().filter(|claim| claim.job().user.as_str() == "ann").count();
                top.fetch_max(running.fetch_add(of_ann, Ordering::SeqCst) + of_ann, Ordering::SeqCst);
                assert!(state.count_running_of("ann") <= MOST);
                for claim in claims {
                    // Counted as ended before it ends: what is counted is never more than what runs.
                    if claim.job().user.as_str() == "ann" {
                        running.fetch_sub(1, Ordering::SeqCst);
                    }
                    end(claim, "done").await;
                    ended.fetch_add(1, Ordering::SeqCst);
                }
                tokio::task::yield_now().await;
            }
        })
    });
    for racer in racers.collect::<Vec<_>>() {
        end_of("every job is taken in the end", racer).await.unwrap();
    }
    assert_eq!(counters[1].load(Ordering::SeqCst), MOST, "all that may run do");
    agreed(&rig).await;
    assert!(!rig.state().has_any(&[Piece::Limited("ann"), Piece::RunningByUser]));
}

#[tokio::test]
async fn a_rate_keeps_nobody_else_waiting_and_tells_when_it_allows_more() {
    let rig = rig_with_clock().await;
    let session = rig.session("*", 1_000).await;
    limits(&rig).set_user(&user("ann"), rate_of_user("2/10h")).await.unwrap();
    limits(&rig).set_pool(&pool("app.y"), rate_of_pool("1/5m")).await.unwrap();
    enqueue_many(&rig, "ann", "sql:h", 2).await;
    enqueue_many(&rig, "ann", "app.x", 3).await;
    enqueue_many(&rig, "bob", "app.x", 3).await;
    enqueue_many(&rig, "bob", "app.y", 3).await;
    let batch = session.take(100).await.unwrap().unwrap();
    let of = |claims: &[Claim], user: &str, pool: &str| {
        let of = |claim: &&Claim| claim.job().user.as_str() == user && claim.job().pool.as_str() == pool;
        claims.iter().filter(of).count()
    };
    let count =
        [of(&batch.claims, "ann", "sql:h") + of(&batch.claims, "ann", "app.x"), of(&batch.claims, "bob", "app.x")];
    assert_eq!((count, of(&batch.claims, "bob", "app.y")), ([2, 3], 1));
    let hint = batch.due_in.expect("a rate allows more later");
    assert_eq!(hint, Duration::from_secs(300), "counted from that very take");
    let other = rig.session("other.z", 1_000).await;
    let told = other.take(1).await.unwrap().unwrap().due_in;
    assert!(told.is_some_and(|told| told <= hint), "whoever is parked is told, should this session be gone by then");
    agreed(&rig).await;
    // No leader, no scan, no message: only the next take at that time.
    rig.server.shift_clock(301);
    let batch = session.take(100).await.unwrap().unwrap();
    assert_eq!((batch.claims.len(), of(&batch.claims, "bob", "app.y")), (1, 1));
    assert_eq!(batch.due_in, Some(Duration::from_secs(300)));
    rig.server.shift_clock(36_302);
    let claims = take(&session, 100).await;
    assert_eq!((claims.len(), of(&claims, "bob", "app.y")), (3, 1));
}

#[tokio::test]
async fn a_longer_period_counts_what_has_started_in_the_shorter_one() {
    let rig = rig_with_clock().await;
    let session = rig.session("*", 1_000).await;
    limits(&rig).set_user(&user("ann"), rate_of_user("1/10m")).await.unwrap();
    limits(&rig).set_pool(&pool("app.y"), rate_of_pool("1/10m")).await.unwrap();
    enqueue_many(&rig, "ann", "app.x", 2).await;
    enqueue_many(&rig, "bob", "app.y", 2).await;
    assert_eq!(take(&session, 100).await.len(), 2);
    limits(&rig).set_user(&user("ann"), rate_of_user("1/1h")).await.unwrap();
    limits(&rig).set_pool(&pool("app.y"), rate_of_pool("1/1h")).await.unwrap();
    // Nobody looks before the shorter period is over.
    rig.server.shift_clock(601);
    assert_eq!(ids(&take(&session, 100).await), Vec::<&str>::new());
    rig.server.shift_clock(3_601);
    assert_eq!(take(&session, 100).await.len(), 2);
    agreed(&rig).await;
}

#[tokio::test]
async fn a_clock_that_is_set_back_prolongs_no_rate() {
    let rig = rig_with_clock().await;
    rig.server.shift_clock(3_600);
    let session = rig.session("*", 1_000).await;
    limits(&rig).set_user(&user("ann"), rate_of_user("2/10s")).await.unwrap();
    enqueue_many(&rig, "ann", "app.x", 9).await;
    assert_eq!(take(&session, 100).await.len(), 2);
    rig.server.shift_clock(0);
    assert!(take(&session, 100).await.is_empty(), "barred until a time that is far away now");
    assert_eq!(findings(&rig).await, ["line-barred"]);
    assert_eq!(take(&session, 100).await.len(), 2);
    assert!(take(&session, 100).await.is_empty());
    rig.server.shift_clock(11);
    assert_eq!(take(&session, 100).await.len(), 2);
    agreed(&rig).await;
}

/// Changes something while nothing may start, and looks whether who is parked hears of it, and how many jobs then start.
async fn after(rig: &Rig, held: &mut Vec<Claim>, change: impl AsyncFnOnce(&Limits)) -> (bool, usize) {
    let (session, mut ear) = parked(rig, "*").await;
    agreed(rig).await;
    change(&limits(rig)).await;
    let heard = woken(rig, &session, &mut ear).await > 0;
    let claims = take(&session, 100).await;
    let count = claims.len();
    held.extend(claims);
    agreed(rig).await;
    (heard, count)
}

#[tokio::test]
async fn a_change_counts_at_once_and_is_heard_by_who_is_parked() {
    let rig = Rig::start().await;
    let session = rig.session("*", 4).await;
    let (ann, x) = (user("ann"), pool("app.x"));
    // A configuration's own number; without one, a handler has room for all.
    rig.state().set(Piece::Pool("app.x"), &[("capacity", "4")]);
    limits(&rig).set_user(&ann, OfUser { rate: to("1/30d"), concurrency: to("1"), ..OfUser::default() }).await.unwrap();
    enqueue_many(&rig, "ann", "app.x", 20).await;
    let mut held = take(&session, 100).await;
    assert_eq!(held.len(), 1);
    for (change, starts, why) in [
        (at_once("2"), 0, "its rate allows no more"),
        (rate_of_user("2/30d"), 1, "a greater rate"),
        (rate_of_user("none"), 0, "its concurrency allows no more"),
        (at_once("3"), 1, "a greater concurrency"),
        (at_once("none"), 1, "the worker's capacity is left"),
    ] {
        let (heard, count) = after(&rig, &mut held, async |limits| limits.set_user(&ann, change).await.unwrap()).await;
        assert_eq!(count, starts, "{why}");
        assert!(heard || count == 0, "{why}");
    }
    let concurrency = |text: &str| OfPool { concurrency: to(text), ..OfPool::default() };
    let per_user = |text: &str| OfPool { per_user: to(text), ..OfPool::default() };
    for (change, starts, why) in [
        (concurrency("6"), 2, "an operator's word comes before a configuration's"),
        (per_user("3"), 0, "no more than before"),
        (concurrency("100"), 0, "the user runs more than it may now"),
        (per_user("8"), 2, "more for each user"),
        (rate_of_pool("1/30d"), 0, "the user's jobs are as many as they may be"),
        (per_user("none"), 1, "one start is left to the rate"),
        (rate_of_pool("3/30d"), 2, "a greater rate"),
        (rate_of_pool("none"), 9, "no rate"),
    ] {
        let (heard, count) = after(&rig, &mut held, async |limits| limits.set_pool(&x, change).await.unwrap()).await;
        assert_eq!(count, starts, "{why}");
        assert!(heard || count == 0, "{why}");
    }
}

#[tokio::test]
async fn a_pause_lasts_until_it_is_ended_says_why_and_lets_go_on_what_runs() {
    let rig = rig_with_clock().await;
    let limits = limits(&rig);
    let reason = |text: &str| text.parse::<Reason>().unwrap();
    for (number, whose) in
        [Whose::User(user("ann")), Whose::Pool(pool("app.x")), Whose::Pool(pool("sql:h")), Whose::All]
            .iter()
            .enumerate()
    {
        let pool = if number == 2 { "sql:h" } else { "app.x" };
        let ids = [0, 1, 2].map(|at| format!("{number}-{at}"));
        enqueue(&rig, "ann", pool, &[&ids[0], &ids[1]]).await;
        let session = rig.session("*", 100).await;
        let running = take_one(&session).await;
        enqueue(&rig, "bob", "app.y", &[&ids[2]]).await;
        limits.pause(whose, &reason("the bank said so")).await.unwrap();
        let others = take(&session, 100).await;
        let names: Vec<_> = others.iter().map(|claim| claim.job().user.as_str()).collect();
        assert_eq!(names, if *whose == Whose::All { vec![] } else { vec!["bob"] }, "{whose:?}");
        assert_eq!(running.job().user.as_str(), "ann");
        // What runs goes on, and does not go on to its next statement.
        assert_eq!(running.pen().mark(&Fields::new()).await.unwrap(), queue_core::calls::Mark::Held);
        put(running, Verdict::Next).await;
        assert!(take(&session, 100).await.is_empty());
        let in_force = limits.all().await.unwrap();
        let pause = in_force.paused.or(in_force.users.into_iter().chain(in_force.pools).find_map(|view| view.paused));
        let since = pause.clone().unwrap().since.unwrap();
        assert_eq!(pause.unwrap().reason, "the bank said so");
        // No time ends it, and who says it again changes the reason alone.
        rig.server.shift_clock(40 * 86_400 * (number as i64 + 1));
        limits.pause(whose, &reason("")).await.unwrap();
        let in_force = limits.all().await.unwrap();
        let pause = in_force.paused.or(in_force.users.into_iter().chain(in_force.pools).find_map(|view| view.paused));
        assert_eq!(pause.map(|pause| (pause.since, pause.reason)), Some((Some(since), String::new())));
        agreed(&rig).await;

        let (heard, count) = after(&rig, &mut Vec::new(), async |limits| limits.resume(whose).await.unwrap()).await;
        assert!(heard && count > 0, "{whose:?}");
        assert_eq!(limits.all().await.unwrap(), InForce::default());
        rig.redis(&["FLUSHDB"]);
    }
}

/// Takes one job at a time of pools that all have some, and counts them.
async fn shares(session: &Session, jobs: usize) -> BTreeMap<String, f64> {
    let mut counts = BTreeMap::new();
    for _ in 0..jobs {
        let claim = take_one(session).await;
        *counts.entry(claim.job().pool.to_string()).or_default() += 1.0;
        end(claim, "done").await;
    }
    counts
}

async fn check_weights(rig: &Rig, weights: [f64; 3]) -> Result<(), TestCaseError> {
    rig.redis(&["FLUSHDB"]);
    let session = rig.session("*", 10).await;
    for (name, weight) in POOLS.iter().zip(weights) {
        let change = OfPool { weight: to(&weight.to_string()), ..OfPool::default() };
        limits(rig).set_pool(&pool(name), change).await.unwrap();
        enqueue_many(rig, "ann", name, 120).await;
    }
    let mut counts = [0.0; 3];
    for _ in 0..100 {
        let claim = take_one(&session).await;
        counts[POOLS.iter().position(|pool| *pool == claim.job().pool.as_str()).unwrap()] += 1.0;
        end(claim, "done").await;
        for i in 0..3 {
            for j in 0..3 {
                // Start-time fair queueing: services of two that always have work differ by a job of each.
                let lead = counts[i] / weights[i] - counts[j] / weights[j];
                let bound = 1.0 / weights[i] + 1.0 / weights[j] + 1e-3;
                prop_assert!(lead <= bound, "{counts:?} for {weights:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn pools_that_always_have_jobs_are_served_by_their_weights() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let rig = runtime.block_on(Rig::start());
    let weights = prop::array::uniform3(prop::sample::select(vec![0.1, 0.5, 1.0, 3.0, 10.0]));
    let config = ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(weights in weights)| {
        runtime.block_on(check_weights(&rig, weights))?;
    });
}

#[tokio::test]
async fn a_pool_that_was_idle_or_that_nobody_served_neither_starves_others_nor_is_starved() {
    let rig = Rig::start().await;
    let session = rig.session("app.x app.y", 10).await;
    enqueue_many(&rig, "ann", "app.x", 2_000).await;
    // One waits all along for somebody who serves it, one comes late.
    enqueue_many(&rig, "ann", "late.z", 300).await;
    shares(&session, 400).await;
    enqueue_many(&rig, "ann", "app.y", 100).await;
    let counts = shares(&session, 20).await;
    assert_eq!((counts["app.x"], counts["app.y"]), (10.0, 10.0));
    let all = rig.session("app.x late.z", 10).await;
    let counts = shares(&all, 120).await;
    assert!(counts["late.z"] >= 100.0, "it has some claim to what it missed: {counts:?}");
    assert!(counts["app.x"] >= 5.0, "but not to all of it: {counts:?}");
    // A weight that was a mistake is forgotten with it.
    let weigh = async |text: &str| {
        let change = OfPool { weight: to(text), ..OfPool::default() };
        limits(&rig).set_pool(&pool("app.x"), change).await.unwrap();
    };
    weigh("0.001").await;
    while !shares(&all, 1).await.contains_key("app.x") {}
    assert!(!shares(&all, 10).await.contains_key("app.x"));
    weigh("none").await;
    assert!(shares(&all, 4).await.contains_key("app.x"));
}

#[tokio::test]
async fn bands_share_a_line_and_keep_their_order_and_their_jobs() {
    let rig = Rig::start().await;
    let session = rig.session("*", 1_000).await;
    for pool in ["app.x", "sql:h"] {
        let mut jobs = Vec::new();
        for band in ["low", "", "high"] {
            jobs.extend((0..30).map(|number| job("ann", &format!("{pool}-{band}-{number:02}"), pool, band)));
        }
        rig.store.enqueue(&most(1_000, 16_384), &jobs).await.unwrap();
        let mut taken = Vec::new();
        for _ in 0..25 {
            let claim = take_one(&session).await;
            taken.push(id(&claim).to_owned());
            end(claim, "done").await;
        }
        for (band, count) in [("high", 20), ("", 4), ("low", 1)] {
            let first: Vec<_> = (0..count).map(|number| format!("{pool}-{band}-{number:02}")).collect();
            let mine: Vec<_> = taken.iter().filter(|id| id.starts_with(&format!("{pool}-{band}-"))).collect();
            assert_eq!(mine, first.iter().collect::<Vec<_>>());
        }
        // What is given back, or has a next statement, comes again at the front of its own band.
        for verdict in [Verdict::Back, Verdict::Next] {
            let claim = take_one(&session).await;
            assert_eq!(id(&claim), format!("{pool}-high-20"));
            put(claim, verdict).await;
        }
        while let Some(claim) = take(&session, 1).await.pop() {
            end(claim, "done").await;
        }
        rig.balanced();
        assert!(!rig.state().has(Piece::PriorityTurns), "nothing is left of turns");
    }
}

#[tokio::test]
async fn a_lost_worker_s_jobs_count_no_more() {
    let rig = Rig::start().await;
    let (lost, next) = (rig.session("*", 100).await, rig.session("*", 100).await);
    limits(&rig).set_user(&user("ann"), at_once("2")).await.unwrap();
    enqueue_many(&rig, "ann", "app.x", 5).await;
    enqueue_many(&rig, "ann", "app.y", 5).await;
    let held = take(&lost, 100).await;
    assert_eq!((held.len(), take(&next, 100).await.len()), (2, 0));
    let leadership = rig.lead().await;
    let leader = SessionId::new("leader:1:a").unwrap();
    rig.store.session_reclaim(lost.id().as_str(), 0, &leader, leadership.term()).await.unwrap().unwrap();
    let again = take(&next, 100).await;
    assert_eq!(again.len(), 2);
    agreed(&rig).await;
    for claim in held {
        put(claim, final_verdict()).await;
    }
    assert!(take(&next, 100).await.is_empty(), "what a lost worker says frees no place");
}

#[tokio::test]
async fn what_the_books_of_limits_lose_is_found_and_mended() {
    let rig = Rig::start().await;
    let session = rig.session("*", 100).await;
    limits(&rig).set_user(&user("ann"), rate_of_user("1/30d")).await.unwrap();
    limits(&rig).set_pool(&pool("app.y"), rate_of_pool("1/30d")).await.unwrap();
    limits(&rig).set_user(&user("cyd"), at_once("1")).await.unwrap();
    for (user, pool) in [("ann", "app.x"), ("bob", "app.y"), ("cyd", "app.z")] {
        enqueue_many(&rig, user, pool, 3).await;
    }
    let held = take(&session, 100).await;
    assert_eq!(held.len(), 3);
    agreed(&rig).await;
    let (of_bob, held): (Vec<_>, Vec<_>) = held.into_iter().partition(|claim| claim.job().user.as_str() == "bob");
    for claim in of_bob {
        end(claim, "done").await;
    }
    assert!(take(&session, 100).await.is_empty());
    agreed(&rig).await;
    // Nobody would ever look at them again.
    rig.state().lose(Piece::RateLimited);
    let mut found = findings(&rig).await;
    found.sort();
    assert_eq!(found, ["line-barred", "pool-unlisted"]);
    assert!(take(&session, 100).await.is_empty(), "their limits are what they were");
    agreed(&rig).await;
    // By hand, and wrong.
    rig.state().miscount_user("cyd", 7);
    rig.state().miscount_user("zoe", 2);
    rig.state().unset(Piece::Limits("ann"), "rate");
    let mut found = findings(&rig).await;
    found.sort();
    assert_eq!(found, ["line-barred", "user-miscount", "user-miscount"]);
    let more = take(&session, 100).await;
    assert_eq!(more.len(), 2, "of ann, who has no rate any more");
    agreed(&rig).await;
    drop((held, more));
}

#[tokio::test]
async fn what_others_write_for_limits_stops_nobody() {
    let rig = Rig::start().await;
    let session = rig.session("*", 100).await;
    let huge = "9".repeat(400);
    let mut number = 0;
    for text in ["", "nan", "-nan", "inf", "-1", "1e300", "0x", "much", "1,5", "\u{ff}\u{0}", &huge] {
        rig.state().set(Piece::Limits("ann"), &[("weight", text), ("concurrency", text), ("timeout", text)]);
        rig.state().set(Piece::Limits("bob"), &[("rate", text), ("period", "60000")]);
        rig.state().set(Piece::Limits("cyd"), &[("rate", "1"), ("period", text)]);
        for (pool, field) in
            [("app.x", "concurrency"), ("app.y", "rate"), ("app.z", "user_limit"), ("sql:h", "capacity")]
        {
            rig.state().set(Piece::Pool(pool), &[(field, text), ("weight", text), ("period", text)]);
            for user in USERS {
                number += 1;
                let (one, two) = (format!("{user}-{number}-1"), format!("{user}-{number}-2"));
                enqueue(&rig, user, pool, &[&one, &two]).await;
            }
        }
        let claims = take(&session, 100).await;
        assert_eq!(claims.len(), 3 * (3 * 2 + 1), "{text:?}: one of a user in a pool of SQL jobs, else all");
        assert!(claims.iter().all(|claim| claim.job().user_timeout_ms.is_none()));
        for claim in claims.into_iter().chain(take(&session, 100).await) {
            end(claim, "done").await;
        }
        for claim in take(&session, 100).await {
            end(claim, "done").await;
        }
        rig.balanced();
        let view = limits(&rig).user(&user("ann")).await.unwrap();
        let ignored: &[&str] = if text.is_empty() { &[] } else { &["weight", "concurrency", "timeout"] };
        assert_eq!(
            (view.weight, view.concurrency, view.ignored),
            (None, None, ignored.iter().map(|&s| s.into()).collect())
        );
    }
    rig.state().spoil(Piece::Limits("ann"));
    enqueue(&rig, "ann", "app.x", &["last"]).await;
    end(take_one(&session).await, "done").await;
    let refused = limits(&rig).set_user(&user("ann"), at_once("1")).await;
    assert!(matches!(refused, Err(queue_core::Error::Request(_))), "{refused:?}");
    assert_eq!(limits(&rig).all().await.unwrap().users[0].ignored, ["all of them: the key holds a string"]);
    rig.state().spoil(Piece::PausedAll);
    assert!(limits(&rig).all().await.unwrap().paused.is_some());
    limits(&rig).resume(&Whose::All).await.unwrap();
    assert!(limits(&rig).all().await.unwrap().paused.is_none());
}

#[tokio::test]
async fn what_is_set_is_shown_as_it_counts() {
    let rig = Rig::start().await;
    let session = rig.session("*", 100).await;
    let change = OfUser { weight: to("2.5"), concurrency: to("4"), rate: to("3/1h"), timeout: to("10m") };
    limits(&rig).set_user(&user("ann"), change).await.unwrap();
    limits(&rig).set_user(&user("ann"), change).await.unwrap();
    enqueue_many(&rig, "ann", "app.x", 5).await;
    let claims = take(&session, 100).await;
    assert_eq!((claims.len(), claims[0].job().user_timeout_ms), (3, Some(600_000)));
    let view = limits(&rig).user(&user("ann")).await.unwrap();
    assert_eq!(
        (view.weight, view.concurrency, view.rate, view.period_ms),
        (Some(2.5), Some(4), Some(3), Some(3_600_000))
    );
    assert_eq!(
        (view.timeout_ms, view.running, view.starts, view.kept_by.as_deref()),
        (Some(600_000), 3, 3, Some("rate"))
    );
    let left = view.kept_until_ms.unwrap() as i64 - claims[2].job().fence.0 as i64 / 1_000;
    assert!((3_599_000..=3_601_000).contains(&left), "{left}");
    assert_eq!(limits(&rig).all().await.unwrap().users, [view]);
    let none = OfUser { weight: Set::Clear, concurrency: Set::Clear, rate: Set::Clear, timeout: Set::Clear };
    limits(&rig).set_user(&user("ann"), none).await.unwrap();
    assert!(!rig.state().has_any(&[Piece::Limits("ann"), Piece::RateLimited, Piece::Limited("ann")]));
    assert_eq!(limits(&rig).all().await.unwrap(), InForce::default());
}
