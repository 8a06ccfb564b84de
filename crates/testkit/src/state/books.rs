//! The books that must balance at every moment: all that counts or lists something says the same as what it counts.

use std::collections::{BTreeMap, BTreeSet};

use super::{Piece, State};
use crate::redis::Value;

/// What packed results of rows say, as a test's own reader of them has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowEnds {
    /// How many rows have ended.
    pub ended: u64,
    /// How many of them failed.
    pub failed: u64,
}

impl State {
    /// Keys, with their types, that a pattern finds.
    fn keys(&self, pattern: &str) -> Vec<(String, String)> {
        let keys = self.ask(&["KEYS", pattern]).texts();
        keys.into_iter().map(|key| (self.ask(&["TYPE", &key]).text(), key)).map(|(kind, key)| (key, kind)).collect()
    }

    /// Checks that the counters, the work lists, the batches and what foreign readers see all say the same as the claims.
    ///
    /// # Panics
    ///
    /// If they do not: with what says what. `row_ends` reads the results of a batch's rows.
    #[track_caller]
    pub fn check_books(&self, row_ends: impl Fn(&[u8]) -> Result<RowEnds, String>) {
        let (claims, due) = self.check_books_of_jobs();
        self.check_batches(&claims, &due, &row_ends);
        self.check_schedules();
        self.check_trackers();
    }

    /// Checks that each schedule stands among the schedules where its next tick says.
    #[track_caller]
    fn check_schedules(&self) {
        for (key, _) in self.keys("drayman:schedule:*").into_iter().filter(|(_, kind)| kind == "hash") {
            let schedule = self.ask(&["HGETALL", &key]).map();
            let stands = self.ask(&["ZSCORE", "drayman:schedules", &key["drayman:schedule:".len()..]]).text();
            let due = if schedule.contains_key("paused") { "inf" } else { &schedule["due"] };
            assert_eq!(stands, due, "{key}");
        }
    }

    /// Checks that the indexes of trackers say the same as the records.
    #[track_caller]
    fn check_trackers(&self) {
        let mut wanted: BTreeSet<(String, String)> = BTreeSet::new();
        for (key, _) in self.keys("drayman:track:*").into_iter().filter(|(_, kind)| kind == "hash") {
            let record = self.ask(&["HGETALL", &key]).map();
            let (tracker, id) = key["drayman:track:".len()..].split_once(':').expect("a tracker and an id");
            let mut stands = |index: String| wanted.insert((index, id.to_owned()));
            stands(format!("drayman:track_status:{tracker}:{}", record["status"]));
            if record.contains_key("lock") {
                stands(format!("drayman:track_locks:{tracker}"));
            }
            if self.ask(&["PTTL", &key]).int() > 0 {
                stands(format!("drayman:track_expiring:{tracker}"));
            }
            assert_eq!(record.contains_key("lock"), record["status"] == "in_progress", "the lock of {key}");
        }
        let indexes = self.keys("drayman:track_*").into_iter().filter(|(_, kind)| kind == "zset");
        let entries = indexes.flat_map(|(index, _)| {
            let ids = self.ask(&["ZRANGE", &index, "0", "-1"]).texts();
            ids.into_iter().map(move |id| (index.clone(), id))
        });
        assert_eq!(entries.collect::<BTreeSet<_>>(), wanted, "the indexes of trackers and the records");
    }

    /// The same but for what the records of batches say, which others may have rewritten. The claims, and what is
    /// scheduled.
    ///
    /// # Panics
    ///
    /// As [`State::check_books`] does.
    #[track_caller]
    pub fn check_books_of_jobs(&self) -> (BTreeMap<String, String>, BTreeSet<String>) {
        let claims = self.ask(&["HGETALL", "drayman:claims"]).map();
        let mut running: BTreeMap<String, i64> = BTreeMap::new();
        let mut busy: BTreeMap<(String, String), i64> = BTreeMap::new();
        let mut active: BTreeMap<String, u64> = BTreeMap::new();
        let mut work: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        let mut wip: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (id, claim) in &claims {
            let parts: Vec<&str> = claim.split('\t').collect();
            let (session, pool, user) = (parts[0], parts[2], parts[3]);
            *running.entry(pool.into()).or_default() += 1;
            *busy.entry((pool.into(), user.into())).or_default() += 1;
            work.entry(session.into()).or_default().insert(id.clone());
            *active.entry(user.into()).or_default() += 1;
            if pool.starts_with("sql:") || pool.starts_with("db:") {
                wip.entry(user.into()).or_default().insert(id.clone());
            }
        }
        let said = self.ask(&["HGETALL", "drayman:active"]).map();
        let said: BTreeMap<String, u64> =
            said.into_iter().map(|(user, count)| (user, count.parse().unwrap())).collect();
        assert_eq!(said, active, "running jobs of users over all pools");
        for (key, _) in self.keys("drayman:pool:*") {
            let pool = key.strip_prefix("drayman:pool:").unwrap();
            let counted = match self.ask(&["HGET", &key, "running"]) {
                Value::Nil => 0,
                number => number.text().parse().unwrap(),
            };
            assert_eq!(counted, running.remove(pool).unwrap_or(0), "running of {pool}");
        }
        assert!(running.is_empty(), "claims in pools that count nothing: {running:?}");
        for (key, _) in self.keys("drayman:busy:*") {
            let pool = key.strip_prefix("drayman:busy:").unwrap();
            for (user, count) in self.ask(&["HGETALL", &key]).map() {
                let claimed = busy.remove(&(pool.to_owned(), user.clone())).unwrap_or(0);
                assert_eq!(count, claimed.to_string(), "busy of {user:?} in {pool}");
            }
        }
        assert!(busy.is_empty(), "claims of users that count nothing: {busy:?}");
        for (key, _) in self.keys("drayman:work:*") {
            let ids = self.ask(&["HKEYS", &key]).texts().into_iter().collect();
            assert_eq!(Some(ids), work.remove(key.strip_prefix("drayman:work:").unwrap()), "{key}");
        }
        assert!(work.is_empty(), "claims in no work list: {work:?}");

        // The index of ended jobs, its order by expiry and the books of what the records occupy name the same jobs.
        let ended: BTreeSet<String> =
            self.ask(&["ZRANGE", "drayman:finished", "0", "-1"]).texts().into_iter().collect();
        let expiring = self.ask(&["ZRANGE", "drayman:expiring", "0", "-1"]).texts().into_iter().collect();
        assert_eq!(ended, expiring, "the ended jobs and when they expire");
        let mut kept = self.ask(&["HGETALL", "drayman:kept"]).map();
        let sum: u64 = kept.remove("*").map_or(0, |sum| sum.parse().unwrap());
        assert_eq!(kept.values().map(|bytes| bytes.parse::<u64>().unwrap()).sum::<u64>(), sum, "bytes of ended jobs");
        assert_eq!(ended, kept.into_keys().collect(), "the ended jobs and what they occupy");
        // Each job that was submitted with a delay is on the schedule, and counts for its user.
        let due: BTreeSet<String> = self.ask(&["ZRANGE", "drayman:due", "0", "-1"]).texts().into_iter().collect();
        let mut delays: BTreeMap<String, String> = self.ask(&["HGETALL", "drayman:delays"]).map();
        let mut delayed: BTreeMap<String, u64> = BTreeMap::new();
        for (id, user) in self.ask(&["HGETALL", "drayman:delayed"]).map() {
            assert!(due.contains(&id), "{id} counts as delayed and is not due");
            *delayed.entry(user).or_default() += 1;
        }
        for (user, count) in delayed {
            assert_eq!(delays.remove(&user), Some(count.to_string()), "delayed jobs of {user:?}");
        }
        assert!(delays.is_empty(), "users of whom nothing is delayed: {delays:?}");

        let tasks: BTreeSet<String> = ["tasks", "high", "low"]
            .iter()
            .flat_map(|list| self.keys(&format!("drayman:{list}:*")))
            .filter_map(|(key, _)| key.splitn(3, ':').nth(2).map(str::to_owned))
            .filter(|line| !line.starts_with("sql:"))
            .collect();
        let lines = self.ask(&["SMEMBERS", "drayman:lines"]).texts().into_iter().collect();
        assert_eq!(tasks, lines, "the lines of tasks that are not empty and their index");

        let index_kind = self.ask(&["TYPE", "batch:indexes:queue"]).text();
        // What somebody has made of another type says nothing.
        if ["set", "none"].contains(&&*index_kind) {
            // A queue has its bands beside it.
            let queued: BTreeSet<String> = ["batch:queue:", "drayman:high:sql:", "drayman:low:sql:"]
                .into_iter()
                .flat_map(|stem| self.keys(&format!("{stem}*")).into_iter().map(move |found| (stem, found)))
                .filter(|(_, (_, kind))| kind == "list")
                .map(|(stem, (key, _))| key[stem.len()..].to_owned())
                .collect();
            let indexed = self.ask(&["SMEMBERS", "batch:indexes:queue"]).texts().into_iter().collect();
            assert_eq!(queued, indexed, "the index and the queues that are not empty");
        }
        let lists: BTreeMap<String, BTreeSet<String>> = (self.keys("batch:wip:user:*").into_iter())
            .filter(|(_, kind)| kind == "list")
            .map(|(key, _)| {
                let ids = self.ask(&["LRANGE", &key, "0", "-1"]).texts().into_iter().collect();
                (key["batch:wip:user:".len()..].to_owned(), ids)
            })
            .collect();
        let is_own = |(key, kind): &(String, String)| *kind == if key == "batch:wip:users" { "set" } else { "list" };
        if self.keys("batch:wip:*").iter().all(is_own) {
            assert_eq!(lists, wip, "the lists of work in progress and the claims");
            let users: BTreeSet<String> = self.ask(&["SMEMBERS", "batch:wip:users"]).texts().into_iter().collect();
            assert_eq!(users, wip.into_keys().collect(), "the index of work in progress");
        }
        (claims, due)
    }

    /// Checks that each batch counts what its blocks, its chunks and its results say.
    #[track_caller]
    fn check_batches(
        &self,
        claims: &BTreeMap<String, String>,
        due: &BTreeSet<String>,
        row_ends: &dyn Fn(&[u8]) -> Result<RowEnds, String>,
    ) {
        let listed: BTreeSet<String> =
            self.ask(&["ZRANGE", "drayman:batches", "0", "-1"]).texts().into_iter().collect();
        let mut parts: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        let mut batches: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
        for (key, _) in self.keys("batch:jobs:*").into_iter().filter(|(_, kind)| kind == "hash") {
            let id = key["batch:jobs:".len()..].to_owned();
            match self.ask(&["HGET", &key, "kind"]) {
                // What others have written that it is one counts for nothing.
                Value::Bulk(kind) if kind == b"batch" && listed.contains(&id) => {
                    batches.insert(id, self.ask(&["HGETALL", &key]).map());
                }
                Value::Bulk(kind)
                    if kind == b"part" && !matches!(self.status(&id).as_deref(), Some("failed" | "cancelled")) =>
                {
                    let part = self.ask(&["HGET", &key, "part"]).text();
                    let words: Vec<&str> = part.split(' ').collect();
                    if words[0] != "done" {
                        parts.entry(words[1].to_owned()).or_default().insert(id);
                    }
                }
                _ => {}
            }
        }
        assert_eq!(listed, batches.keys().cloned().collect(), "the batches and their list");
        for (id, batch) in batches {
            let own = self.ask(&["HGETALL", &format!("drayman:batch:{id}")]).map();
            let number = |name: &str| -> u64 { own[name].parse().unwrap_or_else(|_| panic!("{name} of {id}")) };
            let status = batch["status"].as_str();
            let (rows, left) = (number("rows"), number("left"));
            let (done, failed, aborted) = (number("done"), number("failed"), number("aborted"));
            assert_eq!(rows, left + done + failed + aborted, "rows of {id}: {batch:?}");
            assert!(number("skipped") <= done, "{id}");
            let counts = self.ask(&["HGETALL", &format!("drayman:batch_parts:{id}")]).map();
            let said: BTreeSet<String> = counts.keys().cloned().collect();
            let is_over = ["done", "failed", "cancelled"].contains(&status);
            let is_aborted = batch.contains_key("aborted_at");
            for name in ["user", "rows", "left", "done", "skipped", "failed", "aborted"] {
                assert_eq!(own[name], batch[name], "{name} of {id}, as we count it and as readers see it");
            }
            if is_over || is_aborted || status == "held" {
                assert!(!own.contains_key("cursor"), "{id} is {status} and has rows to deal");
            }
            let there = parts.remove(&id).unwrap_or_default();
            if is_over {
                assert!(said.is_empty() && left == 0, "{id} is over: {said:?}, {left}");
                assert!(self.ask(&["PTTL", &Piece::Job(&id).name()]).int() > 0, "{id} has an end");
            } else if is_aborted {
                assert_eq!(said, [format!("{id}:files")].into(), "{id} waits for its files");
            } else {
                assert_eq!(said, there, "the parts of {id}");
            }
            // What an aborted batch has left is dropped where somebody meets it: so it must stand somewhere.
            for part in there.iter().chain(&said) {
                let user = &batch["user"];
                let pool = format!("{}.{}", batch["app"], batch["op"]);
                let waits = ["high", "tasks", "low"].iter().any(|list| {
                    let key = format!("drayman:{list}:{pool}:{user}");
                    self.ask(&["LRANGE", &key, "0", "-1"]).texts().contains(part)
                });
                let places = [claims.contains_key(part), due.contains(part), waits];
                assert!(places.contains(&true), "{part} stands nowhere");
            }
            let undealt = self.undealt(&id, own.get("cursor"));
            let (mut ended, mut wrong) = (0, 0);
            for (field, packed) in self.results(&id) {
                let ends = row_ends(&packed).unwrap_or_else(|error| panic!("results {field} of {id}: {error}"));
                ended += ends.ended;
                wrong += ends.failed;
            }
            assert_eq!((ended, wrong), (done + failed, failed), "the results of {id} and its counts");
            match status {
                "held" => assert!(said.is_empty() && left == rows, "{id} is held"),
                "pending" | "running" if !is_aborted => {
                    let at_work: u64 = counts.values().map(|count| count.parse::<u64>().unwrap()).sum();
                    assert_eq!(left, undealt + at_work, "what is left of {id}");
                    assert!(left > 0 || said.contains(&format!("{id}:files")), "{id} is {status} and nothing is left");
                }
                _ => {}
            }
        }
    }

    /// How many rows of a batch stand at its cursor or behind it.
    fn undealt(&self, id: &str, cursor: Option<&String>) -> u64 {
        let Some(cursor) = cursor else { return 0 };
        let cursor: Vec<u64> = cursor.split(' ').map(|word| word.parse().unwrap()).collect();
        let blocks = self.ask(&["HGETALL", &format!("drayman:batch_blocks:{id}")]).map();
        let behind = blocks.iter().filter_map(|(field, said)| {
            let (load, place) = field.split_once('.')?;
            let at: (u64, u64) = (load.parse().ok()?, place.parse().ok()?);
            let rows: u64 = said.split(' ').next()?.parse().ok()?;
            (blocks.contains_key(load) && at > (cursor[0], cursor[1])).then_some(rows)
        });
        behind.sum::<u64>() + cursor[3] - cursor[2]
    }

    /// The packed results of a batch, by block and first row.
    fn results(&self, id: &str) -> Vec<(String, Vec<u8>)> {
        let Value::Array(flat) = self.ask(&["HGETALL", &format!("drayman:batch_results:{id}")]) else {
            panic!("no hash")
        };
        let pairs = flat.chunks_exact(2).map(|pair| (pair[0].text(), pair[1].bytes().to_vec()));
        pairs.filter(|(field, _)| field.contains(':')).collect()
    }
}
