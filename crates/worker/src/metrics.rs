//! What a collector is told in numbers. None has a user or a job for a label: there are too many of them.
//!
//! What is true of all workers together is told by the one that leads, and by nobody while nobody does.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use queue_core::Store;
use queue_core::overview::{self, UnservedPool};

/// How many pools are told by name: each is a series for ever in whatever keeps them.
const POOLS_MAX: usize = 100;
/// The name of all other pools together. No pool can have it.
const OTHERS: &str = "(others)";

/// Jobs that wait for pools that no live session serves, by pool.
#[derive(Debug, Clone)]
pub struct Unserved(Arc<Mutex<Pools>>);

type Pools = BTreeMap<String, Waiting>;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Waiting {
    jobs: u64,
    oldest_wait_s: u64,
}

impl Unserved {
    /// Registers them. To be called once, after [`telemetry::Telemetry::start`].
    pub fn register() -> Self {
        let unserved = Self(Arc::default());
        let told = unserved.clone();
        telemetry::gauge(
            "drayman.unserved.jobs",
            "{job}",
            "Jobs that wait for a pool that no live worker serves",
            "pool",
            move || told.lock().iter().map(|(pool, waiting)| (pool.clone(), waiting.jobs)).collect(),
        );
        let told = unserved.clone();
        telemetry::gauge(
            "drayman.unserved.oldest_wait",
            "s",
            "The longest wait of a job that is next in its line for a pool that no live worker serves",
            "pool",
            move || told.lock().iter().map(|(pool, waiting)| (pool.clone(), waiting.oldest_wait_s)).collect(),
        );
        unserved
    }

    /// Looks again and again, and tells what it sees until it is dropped.
    pub async fn tell(self, store: Store, pause: Duration) {
        let told = Told(self);
        let mut pools = Pools::new();
        let mut visible = true;
        loop {
            match overview::unserved_pools(&store).await {
                Ok(found) => {
                    visible = true;
                    pools = tally(found, &pools);
                    *told.0.lock() = pools.clone();
                }
                Err(error) => {
                    // Old numbers would pass for new ones, and by now another worker may tell its own.
                    told.0.lock().clear();
                    if std::mem::take(&mut visible) {
                        tracing::warn!(%error, "what nobody serves can't be seen, it is not told until it can");
                    }
                }
            }
            tokio::time::sleep(pause).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Pools> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Nothing is told any more by who has stopped looking.
struct Told(Unserved);

impl Drop for Told {
    fn drop(&mut self) {
        self.0.lock().clear();
    }
}

/// What is to be told after a look, with a zero for whatever was told before and is served or empty now, so that alerts end. The others
/// are told always: that there are none is not the same as that nobody looks.
fn tally(mut found: Vec<UnservedPool>, before: &Pools) -> Pools {
    // Who has a name keeps it.
    found.sort_by_key(|pool| (!before.contains_key(&pool.pool), Reverse(pool.jobs)));
    let mut pools = Pools::from([(OTHERS.to_owned(), Waiting::default())]);
    for (place, pool) in found.into_iter().enumerate() {
        let name = if place < POOLS_MAX { pool.pool } else { OTHERS.to_owned() };
        let waiting = pools.entry(name).or_default();
        waiting.jobs += pool.jobs;
        waiting.oldest_wait_s = waiting.oldest_wait_s.max(pool.oldest_waited_ms.unwrap_or(0) / 1_000);
    }
    for name in before.keys() {
        if pools.len() <= POOLS_MAX {
            pools.entry(name.clone()).or_default();
        }
    }
    pools
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(name: &str, jobs: u64) -> UnservedPool {
        UnservedPool { pool: name.into(), users: 1, jobs, oldest_waited_ms: Some(jobs * 1_000) }
    }

    fn jobs(pools: &Pools) -> Vec<(&str, u64)> {
        pools.iter().map(|(name, waiting)| (name.as_str(), waiting.jobs)).collect()
    }

    #[test]
    fn what_was_told_once_is_told_to_be_over() {
        let pools = tally(Vec::new(), &Pools::new());
        assert_eq!(jobs(&pools), [(OTHERS, 0)]);
        let pools = tally(vec![pool("Bank.pay", 3)], &pools);
        assert_eq!(jobs(&pools), [(OTHERS, 0), ("Bank.pay", 3)]);
        assert_eq!(pools["Bank.pay"].oldest_wait_s, 3);
        let pools = tally(Vec::new(), &pools);
        assert_eq!(pools["Bank.pay"], Waiting::default());
        assert_eq!(jobs(&tally(Vec::new(), &pools)), [(OTHERS, 0), ("Bank.pay", 0)]);
    }

    #[test]
    fn of_many_pools_some_have_a_name_and_keep_it_while_jobs_wait_there() {
        let many = |from: u64| (from..from + 150).map(|number| pool(&format!("a.op{number}"), number)).collect();
        let first = tally(many(1), &Pools::new());
        assert_eq!(first.len(), POOLS_MAX + 1);
        assert_eq!(first[OTHERS], Waiting { jobs: (1..=50).sum(), oldest_wait_s: 50 });
        // The fifty least have no name; the ten greatest are new and get those of the ones that are gone.
        let second = tally(many(61), &first);
        assert_eq!(second.len(), POOLS_MAX + 1);
        assert!((61..=150).all(|number| second.contains_key(&format!("a.op{number}"))));
        assert!((201..=210).all(|number| second.contains_key(&format!("a.op{number}"))));
        assert_eq!(second[OTHERS], Waiting { jobs: (151..=200).sum(), oldest_wait_s: 200 });
    }
}
