//! What limits users and pools, pauses and unique keys, while jobs run, and what must be true of them.

use std::collections::BTreeMap;
use std::io;
use std::sync::Mutex;
use std::time::Duration;

use super::Run;
use super::random::Random;
use super::stage::{self, Stage, connect};
use super::state::{self, Claim};
use super::verdict::Violation;
use super::watch::Life;
use super::workload::{APP, CAPACITY, HOSTS};
use crate::process::{Daemon, bin};
use crate::redis::RawClient;

/// Of this user so many jobs run at once.
const FEW_AT_ONCE: (&str, usize) = ("user-1", 2);
/// Of this user so many start within a time.
const FEW_IN_TIME: (&str, usize, Duration) = ("user-2", 6, Duration::from_secs(2));
/// All of them.
pub const LIMITED_USERS: [&str; 2] = [FEW_AT_ONCE.0, FEW_IN_TIME.0];

const AT_ONCE: &str = "of a pool and of a user no more jobs run at once than may";
const RATE: &str = "of a user no more jobs start within a time than may";
const PAUSED: &str = "nothing starts of what is paused";
const UNIQUE: &str = "no two jobs hold a unique key at the same time";

/// Pauses that were: the pool, and from when to when by the clock of Redis.
#[derive(Debug, Default)]
pub struct Pauses(Mutex<Vec<(String, u64, u64)>>);

/// Of what more is claimed at this moment than may be.
pub fn crowds(claims: &[Claim]) -> Vec<String> {
    let mut counts: BTreeMap<(&str, usize), Vec<&str>> = BTreeMap::new();
    for claim in claims {
        if claim.pool.starts_with("sql:") {
            counts.entry((&claim.pool, CAPACITY)).or_default().push(&claim.job);
        }
        if claim.user == FEW_AT_ONCE.0 {
            counts.entry(FEW_AT_ONCE).or_default().push(&claim.job);
        }
    }
    let crowds = counts.into_iter().filter(|((_, most), jobs)| jobs.len() > *most);
    crowds.map(|((whose, most), jobs)| format!("{whose} has {jobs:?}, and may have {most}")).collect()
}

/// A command of `drayman` without arguments that a fault could meet: again and again until it is done.
pub fn until_done(stage: &Stage, args: &[&str]) {
    let url = stage.redis.url_db(stage::DB);
    let all: Vec<&str> = [args[0], "--redis-url", &url].into_iter().chain(args[1..].iter().copied()).collect();
    while !Daemon::spawn(bin("drayman"), &all, &[]).wait().success() {
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Limits users, before anything runs.
pub fn limit_users(stage: &Stage) {
    let (user, most) = FEW_AT_ONCE;
    until_done(stage, &["limits", "--user", user, "--concurrency", &most.to_string()]);
    let (user, most, time) = FEW_IN_TIME;
    until_done(stage, &["limits", "--user", user, "--rate", &format!("{most}/{}s", time.as_secs())]);
}

fn now(stage: &Stage) -> u64 {
    loop {
        if let Ok(time) = connect(&stage.redis).and_then(|mut redis| state::time(&mut redis)) {
            return time;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

impl Run<'_> {
    /// Pauses pools, one after the other.
    pub(super) fn pauser(&self) {
        let mut random = Random::of(self.options.seed, &[17]);
        let pools = [format!("{APP}.program"), format!("{APP}.command"), format!("sql:{}", HOSTS[0])];
        while !self.is_closed() {
            self.wait(random.ms(1_000, 5_000));
            let pool = &pools[random.between(0, pools.len() as u64) as usize];
            until_done(&self.stage, &["pause", "--pool", pool]);
            let from = now(&self.stage);
            self.wait(random.ms(200, 1_200));
            let to = now(&self.stage);
            until_done(&self.stage, &["resume", "--pool", pool]);
            self.pauses.0.lock().expect("no thread panics").push((pool.clone(), from, to));
        }
    }

    /// Looks at all that was ever seen to start. A claim's fence is when it was taken.
    pub(super) fn judge_rules(&self) -> Vec<Violation> {
        let (starts, crowds) = self.watch.starts_and_crowds();
        let mut found: Vec<Violation> = crowds.into_iter().map(|found| Violation::new(AT_ONCE, found)).collect();
        for (pool, from, to) in self.pauses.0.lock().expect("no thread panics").iter() {
            let is_within = |start: &&Claim| start.pool == *pool && (from..to).contains(&&start.fence);
            for start in starts.iter().filter(is_within) {
                let found_there =
                    format!("{pool} was paused from {from} to {to} µs, and it was taken at {}", start.fence);
                found.push(Violation::of(&start.job, PAUSED, found_there));
            }
        }
        let (user, most, time) = FEW_IN_TIME;
        let mut times: Vec<u64> = starts.iter().filter(|start| start.user == user).map(|start| start.fence).collect();
        times.sort_unstable();
        for few in times.windows(most + 1) {
            // The rate counts in ms.
            let took = Duration::from_micros(few[most] - few[0]) + Duration::from_millis(1);
            if took < time {
                found.push(Violation::new(RATE, format!("{} jobs of {user} started within {took:.1?}", most + 1)));
            }
        }
        found
    }
}

/// Looks at when jobs held their unique keys, by their records.
pub fn unique_keys(redis: &mut RawClient, lives: &[Life]) -> io::Result<Vec<Violation>> {
    let mut held: BTreeMap<&str, Vec<(String, String, &str)>> = BTreeMap::new();
    for life in lives {
        let Some((key, scope)) = &life.job.unique else { continue };
        let mut hash = state::hash(redis, &life.job.id)?;
        let last = if *scope == "queued" { hash.remove("started_at") } else { None };
        if let (Some(from), Some(to)) = (hash.remove("created_at"), last.or(hash.remove("ended_at"))) {
            held.entry(key).or_default().push((from, to, &life.job.id));
        }
    }
    let mut found = Vec::new();
    for (key, mut times) in held {
        times.sort();
        // Times in ISO 8601 are in the order of their texts.
        for pair in times.windows(2).filter(|pair| pair[0].1 > pair[1].0) {
            found.push(Violation::of(pair[1].2, UNIQUE, format!("{key}: {pair:?}")));
        }
    }
    Ok(found)
}
