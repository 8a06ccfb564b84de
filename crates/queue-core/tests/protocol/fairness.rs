//! Users take turns, in proportion to their weights; capacities hold exactly; the price of a take does not depend on how
//! much waits.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use queue_core::calls::{Fields, Verdict};
use queue_core::ids::Pool;
use queue_core::session::{Claim, Fairness, Service, Session};
use testkit::end_of;

use crate::support::*;

async fn enqueue(rig: &Rig, jobs: &[(&str, String)]) {
    let jobs: Vec<_> = jobs.iter().map(|(user, id)| submission(user, id, "h")).collect();
    for chunk in jobs.chunks(100) {
        rig.store.enqueue(&most(1_000_000, 16_384), chunk).await.unwrap();
    }
}

fn many(user: &'static str, count: usize) -> Vec<(&'static str, String)> {
    (0..count).map(|i| (user, format!("{user}-{i}"))).collect()
}

/// Ends a job after so many µs, and says whose it was.
async fn run(claim: Claim, ran_us: u64) -> String {
    let user = claim.job().user.to_string();
    let fields = Fields::new().with("status", "done");
    claim.finish(final_verdict(), Duration::from_micros(ran_us), fields, false).await.unwrap();
    user
}

#[tokio::test]
async fn users_with_few_jobs_finish_in_their_turn_beside_one_with_many() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 2).await;
    enqueue(&rig, &many("big", 50)).await;
    enqueue(&rig, &many("small", 5)).await;
    enqueue(&rig, &many("tiny", 5)).await;
    let mut order = Vec::new();
    let mut running = std::collections::VecDeque::new();
    while order.len() < 60 {
        let claims = take(&session, 2).await;
        running.extend(claims);
        let mut users: Vec<_> = running.iter().map(|claim| claim.job().user.as_str()).collect();
        users.dedup();
        assert_eq!(users.len(), running.len(), "one running job a user");
        order.push(run(running.pop_front().expect("something runs while anything waits"), 0).await);
    }
    for user in ["small", "tiny"] {
        let last = order.iter().rposition(|ended| ended == user).unwrap();
        let of_big = order[..last].iter().filter(|ended| *ended == "big").count();
        assert!(of_big <= 6, "{of_big} jobs of the big one went before the last of {user}: {order:?}");
    }
    rig.balanced();
}

#[tokio::test]
async fn ties_go_to_who_has_waited_longest() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 1).await;
    let users = ["zoe", "mia", "bob", "ann", "yan"];
    for user in users {
        enqueue(&rig, &many(user, 2)).await;
    }
    let mut order = Vec::new();
    for _ in 0..10 {
        order.push(run(take_one(&session).await, 0).await);
    }
    assert_eq!(order[..5], users);
    assert_eq!(order[5..], users);
}

#[tokio::test]
async fn neither_idling_nor_an_empty_queue_sheds_debt_or_earns_credit() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 1).await;
    rig.state().set(Piece::Limits("heavy"), &[("weight", "0.1")]);
    enqueue(&rig, &many("heavy", 1)).await;
    enqueue(&rig, &many("other", 20)).await;
    // The heavy one has had its job, which is worth ten of the other, and empties its queue with it; it comes back at once.
    assert_eq!(run(take_one(&session).await, 0).await, "heavy");
    enqueue(&rig, &[("heavy", "again".to_owned())]).await;
    let mut before = 0;
    while run(take_one(&session).await, 0).await != "heavy" {
        before += 1;
    }
    assert!((9..=10).contains(&before), "{before} of the other first: the debt was kept");

    // Who idled while the other was served 10 more times has earned nothing by it: they take turns at once.
    for _ in 0..5 {
        assert_eq!(run(take_one(&session).await, 0).await, "other");
    }
    enqueue(&rig, &many("idler", 5)).await;
    let mut turns = BTreeMap::<String, i32>::new();
    for _ in 0..8 {
        *turns.entry(run(take_one(&session).await, 0).await).or_default() += 1;
    }
    assert!((3..=5).contains(&turns["idler"]), "{turns:?}");
}

#[tokio::test]
async fn what_is_given_back_untouched_costs_nothing() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 1).await;
    enqueue(&rig, &many("alice", 3)).await;
    enqueue(&rig, &many("bob", 3)).await;
    let owes = |user: &str| rig.state().finish_tags("sql:h").contains_key(user);
    let claim = take_one(&session).await;
    assert!(owes("alice"));
    put(claim, Verdict::Back).await;
    assert!(!owes("alice"));
    let closing = rig.session("sql:*", 1).await;
    let claim = take_one(&closing).await;
    let user = claim.job().user.to_string();
    closing.close().await.unwrap();
    assert!(!owes(&user));
    // A statement of several that was run is paid for.
    let claim = take_one(&session).await;
    let user = claim.job().user.to_string();
    put(claim, Verdict::Next).await;
    assert!(owes(&user));
}

#[tokio::test]
async fn a_run_that_takes_longer_than_all_others_is_charged_for_what_it_took_and_no_more() {
    let rig = Rig::start().await;
    let mut service = service("sql:*", 2);
    service.fairness = Fairness::Time;
    let session = open(&rig.store, service).await;
    enqueue(&rig, &many("slow", 2)).await;
    enqueue(&rig, &many("quick", 200)).await;
    let mut claims = take(&session, 2).await;
    claims.sort_by_key(|claim| claim.job().user.to_string());
    let slow = claims.pop().unwrap();
    run(claims.pop().unwrap(), 1_000_000).await;
    for _ in 0..99 {
        run(take_one(&session).await, 1_000_000).await;
    }
    // Both have now had 100 s.
    run(slow, 100_000_000).await;
    let v = rig.state().virtual_time("sql:h");
    let start = rig.state().start_tags("sql:h")["slow"];
    assert!((start - v).abs() <= 2e6, "it starts {} s behind", (start - v) / 1e6);
}

#[tokio::test]
async fn what_a_run_took_moves_the_turn_of_a_user_who_waits_for_another() {
    let rig = Rig::start().await;
    let session = open(&rig.store, Service { fairness: Fairness::Time, ..service("app.x", 1) }).await;
    // A handler may run several jobs of a user: so the slow one stands for its next turn while its first job runs.
    for (user, jobs) in [("slow", 2), ("quick", 5)] {
        for number in 0..jobs {
            let mut job = submission(user, &format!("{user}-{number}"), "");
            job.fields = Fields::new().with("kind", "task").with("app", "app").with("op", "x").with("input", "1");
            rig.store.enqueue(&most(64, 16_384), &[job]).await.unwrap();
        }
    }
    assert_eq!(run(take_one(&session).await, 100_000_000).await, "slow");
    let mut order = Vec::new();
    for _ in 0..6 {
        order.push(run(take_one(&session).await, 1_000_000).await);
    }
    assert_eq!(order, ["quick", "quick", "quick", "quick", "quick", "slow"]);
}

#[derive(Clone, Debug)]
enum Step {
    Arrive { user: usize, jobs: usize },
    Serve { ran_us: u64, arrives_meanwhile: usize },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        1 => (0..4_usize, 1..8_usize).prop_map(|(user, jobs)| Step::Arrive { user, jobs }),
        3 => (1..3_000_000_u64, 0..8_usize).prop_map(|(ran_us, arrives_meanwhile)| Step::Serve { ran_us, arrives_meanwhile }),
    ];
    prop::collection::vec(step, 20..80)
}

const USERS: [&str; 4] = ["u0", "u1", "u2", "u3"];

/// Serves one job at a time and measures between jobs: there, every waiting user's next start tag Ti lies in
/// [v, v + ci/wi], and over an interval in which a user always has jobs waiting its tags are contiguous, Si/wi = Ti' - Ti.
/// So for two users |Si/wi - Sj/wj| = |(Ti' - Tj') - (Ti - Tj)| <= ci/wi + cj/wj, plus the ticks that break ties: one
/// for each arrival, and one for each job, whose charge is rounded down.
async fn check_bound(rig: &Rig, fairness: Fairness, weights: [f64; 4], steps: &[Step]) -> Result<(), TestCaseError> {
    rig.redis(&["FLUSHDB"]);
    for (user, weight) in USERS.iter().zip(weights) {
        rig.state().set(Piece::Limits(user), &[("weight", &weight.to_string())]);
    }
    let mut service = service("sql:*", 1);
    service.fairness = fairness;
    let session = open(&rig.store, service).await;
    let mut waiting = [0_usize; 4];
    let mut served = [0_f64; 4];
    let mut dearest = [0_f64; 4];
    let mut ticks = 0.0;
    let mut number = 0;
    // For each pair, while both have had jobs waiting all along: the least and the greatest lead of one over the other.
    let mut leads = BTreeMap::<(usize, usize), (f64, f64)>::new();
    let mut arrive = async |user: usize, jobs: usize| {
        let jobs: Vec<_> = (0..jobs).map(|i| (USERS[user], format!("j{}-{i}", number))).collect();
        number += 1;
        enqueue(rig, &jobs).await;
    };
    for step in steps {
        match step {
            Step::Arrive { user, jobs } => {
                arrive(*user, *jobs).await;
                waiting[*user] += jobs;
                ticks += 1.0;
            }
            Step::Serve { ran_us, arrives_meanwhile } => {
                let Some(claim) = take(&session, 1).await.pop() else {
                    prop_assert_eq!(waiting, [0; 4], "nothing is taken and something waits");
                    continue;
                };
                if *arrives_meanwhile < 4 {
                    arrive(*arrives_meanwhile, 1).await;
                    waiting[*arrives_meanwhile] += 1;
                    ticks += 1.0;
                }
                let user = run(claim, *ran_us).await;
                let user = USERS.iter().position(|name| *name == user).unwrap();
                let cost = if fairness == Fairness::Jobs { 1e6 } else { *ran_us as f64 };
                waiting[user] -= 1;
                served[user] += cost / weights[user];
                dearest[user] = dearest[user].max(cost / weights[user]);
                ticks += 1.0;
            }
        }
        for i in 0..4 {
            for j in i + 1..4 {
                if waiting[i] == 0 || waiting[j] == 0 {
                    leads.remove(&(i, j));
                    continue;
                }
                let lead = served[i] - served[j];
                let (least, greatest) = leads.entry((i, j)).or_insert((lead, lead));
                *least = least.min(lead);
                *greatest = greatest.max(lead);
                let bound = dearest[i] + dearest[j] + 4.0 * ticks;
                prop_assert!(*greatest - *least <= bound, "{} and {}: {} > {bound}", i, j, *greatest - *least);
            }
        }
    }
    rig.balanced();
    Ok(())
}

#[test]
fn users_that_always_have_jobs_waiting_are_served_by_their_weights() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let rig = runtime.block_on(Rig::start());
    let weights = prop::array::uniform4(prop::sample::select(vec![0.25, 0.5, 1.0, 2.0, 7.0]));
    let fairness = prop::sample::select(vec![Fairness::Jobs, Fairness::Time]);
    let config = ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(fairness in fairness, weights in weights, steps in steps())| {
        runtime.block_on(check_bound(&rig, fairness, weights, &steps))?;
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn four_racing_sessions_never_exceed_a_capacity_and_use_it_all() {
    let rig = Arc::new(Rig::start().await);
    const CAPACITY: usize = 5;
    let users: Vec<String> = (0..20).map(|i| format!("u{i}")).collect();
    let jobs: Vec<(&str, String)> =
        users.iter().flat_map(|user| (0..15).map(move |i| (user.as_str(), format!("{user}-{i}")))).collect();
    enqueue(&rig, &jobs).await;
    let (running, most, ended) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let counters = Arc::new((running, most, ended));
    let mut racers = Vec::new();
    for _ in 0..4 {
        let (rig, counters) = (rig.clone(), counters.clone());
        racers.push(tokio::spawn(async move {
            let store = queue_core::Store::connect(&config(rig.server.url_db(DB))).await.unwrap();
            let session = Arc::new(open(&store, service("sql:*", CAPACITY as u32)).await);
            let state = rig.state();
            let mut work = tokio::task::JoinSet::new();
            while counters.2.load(Ordering::SeqCst) < 300 {
                for claim in take(&session, 3).await {
                    // Counted after the take and before the finish: an over-capacity in Redis shows here for sure only if
                    // it lasts; the pool's own counter is looked at beside it.
                    let now = counters.0.fetch_add(1, Ordering::SeqCst) + 1;
                    counters.1.fetch_max(now, Ordering::SeqCst);
                    let counters = counters.clone();
                    work.spawn(async move {
                        for _ in 0..3 {
                            assert_eq!(claim.pen().mark(&Fields::new()).await.unwrap(), queue_core::calls::Mark::Held);
                        }
                        counters.0.fetch_sub(1, Ordering::SeqCst);
                        run(claim, 0).await;
                        counters.2.fetch_add(1, Ordering::SeqCst);
                    });
                }
                let counted = state.count_running("sql:h").map_or(0, |text| text.parse::<usize>().unwrap());
                assert!(counted <= CAPACITY, "{counted} running");
                tokio::task::yield_now().await;
            }
            while let Some(done) = work.join_next().await {
                done.unwrap();
            }
        }));
    }
    for racer in racers {
        end_of("every job is taken in the end", racer).await.unwrap();
    }
    assert_eq!(counters.2.load(Ordering::SeqCst), 300, "each job ran once");
    assert_eq!(counters.1.load(Ordering::SeqCst), CAPACITY);
    rig.balanced();
}

#[tokio::test]
async fn a_pool_with_a_number_of_its_own_keeps_to_it_and_so_does_each_user() {
    let rig = Rig::start().await;
    let mut service = service("sql:*", 2);
    service.capacities = vec![(Pool::of_host("narrow").unwrap(), 1), (Pool::of_host("wide").unwrap(), 7)];
    let session = open(&rig.store, service).await;
    let mut jobs = Vec::new();
    for host in ["narrow", "wide", "plain"] {
        for user in 0..10 {
            jobs.push(submission(&format!("{host}-{user}"), &format!("{host}-{user}"), host));
        }
    }
    rig.store.enqueue(&most(64, 16_384), &jobs).await.unwrap();
    let claims = take(&session, 100).await;
    let count = |pool: &str| claims.iter().filter(|claim| claim.job().pool.as_str() == pool).count();
    assert_eq!([count("sql:narrow"), count("sql:wide"), count("sql:plain")], [1, 7, 2]);
    assert!(take(&session, 100).await.is_empty());
    for claim in claims {
        run(claim, 0).await;
    }

    rig.state().set(Piece::Pool("sql:wide"), &[("user_limit", "3")]);
    let jobs: Vec<_> = (0..9).map(|i| submission("one", &format!("one-{i}"), "wide")).collect();
    rig.store.enqueue(&most(64, 16_384), &jobs).await.unwrap();
    let claims = take(&session, 100).await;
    let of_one = claims.iter().filter(|claim| claim.job().user.as_str() == "one").count();
    assert_eq!(of_one, 3, "the pool's own limit for each user");
    rig.balanced();
}

#[tokio::test]
async fn a_full_pool_gives_its_next_job_as_soon_as_it_may_have_more() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 1).await;
    enqueue(&rig, &["ann", "bob", "cyd"].map(|user| (user, user.to_owned()))).await;
    let mut held = take(&session, 4).await;
    let pool = Pool::of_host("h").unwrap();
    for (default, own) in [(2, vec![]), (2, vec![(pool, 3)])] {
        assert_eq!(rig.state().turns(), Vec::<String>::new(), "who is full stands in no list");
        session.set_capacities(default, &own).await.unwrap();
        held.extend(take(&session, 4).await);
    }
    assert_eq!(ids(&held), ["ann", "bob", "cyd"]);
    rig.balanced();
}

/// Commands that Redis has run so far, those that scripts call included.
fn commands(rig: &Rig) -> u64 {
    let stats = rig.redis(&["INFO", "commandstats"]).text();
    let calls = stats.lines().filter_map(|line| line.split_once(":calls=")).filter(|(name, _)| !name.contains("info"));
    calls.map(|(_, rest)| rest.split(',').next().unwrap().parse::<u64>().unwrap()).sum()
}

/// How many commands it costs to take a job, and to end it.
async fn cost(rig: &Rig, session: &Session) -> (u64, u64) {
    let start = commands(rig);
    let claim = take_one(session).await;
    let taken = commands(rig);
    run(claim, 0).await;
    (taken - start, commands(rig) - taken)
}

#[tokio::test]
async fn a_take_meets_only_pools_that_it_serves() {
    let rig = Rig::start().await;
    let session = rig.session("sql:* db:mine bank.pay", 2).await;
    let jobs: Vec<_> = (0..4).map(|i| submission("alice", &format!("j{i}"), "h")).collect();
    rig.store.enqueue(&most(64, 16_384), &jobs).await.unwrap();
    cost(&rig, &session).await;
    // Each class has one that nobody serves.
    for class in ["db:", "bank.", "app."] {
        rig.state().fill_pools(class, "one", 1);
    }
    let few = cost(&rig, &session).await;
    for class in ["db:", "bank.", "app."] {
        rig.state().fill_pools(class, "other", 10_000);
    }
    assert_eq!(cost(&rig, &session).await, few);
    // Each pattern finds what it covers, a class or a part of it.
    for pools in ["*", "s*", "sql:h*", "sql:*", "sql:h"] {
        rig.store
            .enqueue(&most(64, 16_384), &[submission("bob", &format!("b-{}", pools.replace("*", "all")), "h")])
            .await
            .unwrap();
        let claim = take_one(&rig.session(pools, 8).await).await;
        assert_eq!(claim.job().pool.as_str(), "sql:h", "{pools}");
        end(claim, "done").await;
    }
}

#[tokio::test]
async fn a_take_and_a_finish_cost_as_many_commands_for_20000_users_as_for_10() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 2).await;
    let users: Vec<String> = (0..20_000).map(|i| format!("u{i}")).collect();
    let jobs: Vec<(&str, String)> =
        users.iter().flat_map(|user| (0..2).map(move |i| (user.as_str(), format!("{user}-{i}")))).collect();
    enqueue(&rig, &jobs[..20]).await;
    cost(&rig, &session).await;
    let few = cost(&rig, &session).await;
    enqueue(&rig, &jobs[20..]).await;
    let many = cost(&rig, &session).await;
    assert_eq!(many, few);
    assert!(few.0 < 100 && few.1 < 65, "{few:?} commands");
}

#[tokio::test]
async fn pools_that_nobody_serves_do_not_hide_those_behind_them() {
    let rig = Rig::start().await;
    let session = rig.session("sql:served", 2).await;
    let jobs: Vec<_> =
        (0..1_500).map(|i| submission(&format!("u{i}"), &format!("j{i}"), &format!("host{i}"))).collect();
    for chunk in jobs.chunks(100) {
        rig.store.enqueue(&most(64, 16_384), chunk).await.unwrap();
    }
    rig.store.enqueue(&most(64, 16_384), &[submission("alice", "a1", "served")]).await.unwrap();
    end(take_one(&session).await, "done").await;
    // More than a take would ever page through, as of a producer that makes up operations.
    rig.state().fill_pools("sql:", "other", 20_000);
    rig.store.enqueue(&most(64, 16_384), &[submission("alice", "a2", "served")]).await.unwrap();
    assert_eq!(id(&take_one(&session).await), "a2");
}

#[tokio::test]
async fn pools_take_turns() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 100).await;
    let mut jobs = Vec::new();
    for host in ["h1", "h2", "h3"] {
        for user in 0..4 {
            jobs.push(submission(&format!("{host}-{user}"), &format!("{host}-{user}"), host));
        }
    }
    rig.store.enqueue(&most(64, 16_384), &jobs).await.unwrap();
    let mut held = Vec::new();
    for _ in 0..4 {
        let mut hosts = Vec::new();
        for _ in 0..3 {
            let claim = take_one(&session).await;
            hosts.push(claim.job().pool.to_string());
            held.push(claim);
        }
        hosts.sort();
        assert_eq!(hosts, ["sql:h1", "sql:h2", "sql:h3"]);
    }
}
