//! A server, a connection, a foreign producer's hands, and the books that must balance at every moment.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use queue_core::Store;
use queue_core::config::{RedisConfig, Url};
use queue_core::ids::{JobId, PoolPattern, SessionId, User};
use queue_core::leader::{self, Leadership};
use queue_core::model::batch::{RowEnd, unpack_results};
use queue_core::scripts::{Fields, Finished, QueueLimits, Submission, Verdict};
use queue_core::session::{Claim, Fairness, Service, Session};
pub use testkit::PATIENCE;
use testkit::{Proxy, RedisServer, Value};

pub const DB: u8 = 5;
pub const KEEP_MS: u64 = 7_200_000;

/// A server and a connection to it.
pub struct Rig {
    pub server: RedisServer,
    pub store: Store,
}

impl Rig {
    pub async fn start() -> Self {
        let server = RedisServer::start();
        let store = Store::connect(&config(server.url_db(DB))).await.expect("the server answers");
        Self { server, store }
    }

    /// A connection through a network that can fail, with a short patience.
    pub async fn connect_through(&self, proxy: &Proxy) -> Store {
        let url = format!("redis://{}/{DB}", proxy.addr());
        let config = RedisConfig { command_timeout: Duration::from_millis(800), ..config(url) };
        Store::connect(&config).await.expect("the proxy passes everything")
    }

    /// A session that serves pools (patterns, separated by blanks), each with room for `capacity` jobs.
    pub async fn session(&self, pools: &str, capacity: u32) -> Session {
        open(&self.store, service(pools, capacity)).await
    }

    /// One command; an error is the test's.
    #[track_caller]
    pub fn redis<A: AsRef<[u8]>>(&self, args: &[A]) -> Value {
        let reply = self.server.raw_db(DB, args);
        if let Value::Error(error) = &reply {
            let words: Vec<_> = args.iter().map(|arg| String::from_utf8_lossy(arg.as_ref())).collect();
            panic!("{words:?}: {error}");
        }
        reply
    }

    /// A whole foreign submission.
    pub fn submit(&self, user: &str, id: &str, host: &str) {
        self.redis(&["HSET", &job_key(id), "user", user, "status", "pending", "query", "select 1", "host", host]);
        self.redis(&["LPUSH", &queue_key(user), id]);
        self.redis(&["SADD", "batch:indexes:queue", user]);
        self.redis(&["PUBLISH", "batch:users", user]);
    }

    /// What the leader does when it hears users announced.
    pub async fn notice(&self, users: &[&str]) -> u64 {
        let users: Vec<Vec<u8>> = users.iter().map(|user| user.as_bytes().to_vec()).collect();
        self.store.notice(&users).await.expect("users can be looked at")
    }

    /// Makes a key one that nobody has touched for so many seconds.
    pub fn idle(&self, key: &str, seconds: u32) {
        let dump = self.redis(&["DUMP", key]);
        let seconds = seconds.to_string();
        let args = [b"RESTORE", key.as_bytes(), b"0", dump.bytes(), b"REPLACE", b"IDLETIME", seconds.as_bytes()];
        self.redis(&args);
    }

    pub async fn lead(&self) -> Leadership {
        let session = SessionId::new("leader:1:a").unwrap();
        leader::hold(&self.store, &session, Duration::from_secs(60)).await.unwrap().expect("nobody else leads")
    }

    pub fn hash(&self, id: &str) -> BTreeMap<String, String> {
        self.redis(&["HGETALL", &job_key(id)]).map()
    }

    #[track_caller]
    pub fn status(&self, id: &str) -> String {
        self.redis(&["HGET", &job_key(id), "status"]).text()
    }

    pub fn status_or_none(&self, id: &str) -> Option<String> {
        self.hash(id).remove("status")
    }

    /// A user's queue, its head first.
    pub fn queue(&self, user: &str) -> Vec<String> {
        let mut ids = self.redis(&["LRANGE", &queue_key(user), "0", "-1"]).texts();
        ids.reverse();
        ids
    }

    /// Ids that were set aside, with their reasons, the oldest first.
    pub fn rejected(&self) -> Vec<(String, String)> {
        let Value::Array(entries) = self.redis(&["XRANGE", "batch:rejected", "-", "+"]) else { panic!("no stream") };
        entries
            .iter()
            .map(|entry| {
                let Value::Array(parts) = entry else { panic!("no entry") };
                let fields = parts[1].map();
                (fields["id"].clone(), fields["reason"].clone())
            })
            .collect()
    }

    pub fn dump(&self) -> BTreeMap<String, String> {
        self.server.dump_db(DB)
    }

    /// Keys, with their types, that a pattern finds.
    fn keys(&self, pattern: &str) -> Vec<(String, String)> {
        let keys = self.redis(&["KEYS", pattern]).texts();
        keys.into_iter().map(|key| (self.redis(&["TYPE", &key]).text(), key)).map(|(kind, key)| (key, kind)).collect()
    }

    /// Checks that the counters, the work lists and what foreign readers see all say the same as the claims.
    #[track_caller]
    pub fn balanced(&self) {
        let claims = self.redis(&["HGETALL", "drayman:claims"]).map();
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
        let said = self.redis(&["HGETALL", "drayman:active"]).map();
        let said: BTreeMap<String, u64> =
            said.into_iter().map(|(user, count)| (user, count.parse().unwrap())).collect();
        assert_eq!(said, active, "running jobs of users over all pools");
        for (key, _) in self.keys("drayman:pool:*") {
            let pool = key.strip_prefix("drayman:pool:").unwrap();
            let counted = match self.redis(&["HGET", &key, "running"]) {
                Value::Nil => 0,
                number => number.text().parse().unwrap(),
            };
            assert_eq!(counted, running.remove(pool).unwrap_or(0), "running of {pool}");
        }
        assert!(running.is_empty(), "claims in pools that count nothing: {running:?}");
        for (key, _) in self.keys("drayman:busy:*") {
            let pool = key.strip_prefix("drayman:busy:").unwrap();
            for (user, count) in self.redis(&["HGETALL", &key]).map() {
                let claimed = busy.remove(&(pool.to_owned(), user.clone())).unwrap_or(0);
                assert_eq!(count, claimed.to_string(), "busy of {user:?} in {pool}");
            }
        }
        assert!(busy.is_empty(), "claims of users that count nothing: {busy:?}");
        for (key, _) in self.keys("drayman:work:*") {
            let ids = self.redis(&["HKEYS", &key]).texts().into_iter().collect();
            assert_eq!(Some(ids), work.remove(key.strip_prefix("drayman:work:").unwrap()), "{key}");
        }
        assert!(work.is_empty(), "claims in no work list: {work:?}");

        // The index of ended jobs, its order by expiry and the books of what the records occupy name the same jobs.
        let ended: BTreeSet<String> =
            self.redis(&["ZRANGE", "drayman:finished", "0", "-1"]).texts().into_iter().collect();
        let expiring = self.redis(&["ZRANGE", "drayman:expiring", "0", "-1"]).texts().into_iter().collect();
        assert_eq!(ended, expiring, "the ended jobs and when they expire");
        let mut kept = self.redis(&["HGETALL", "drayman:kept"]).map();
        let sum: u64 = kept.remove("*").map_or(0, |sum| sum.parse().unwrap());
        assert_eq!(kept.values().map(|bytes| bytes.parse::<u64>().unwrap()).sum::<u64>(), sum, "bytes of ended jobs");
        assert_eq!(ended, kept.into_keys().collect(), "the ended jobs and what they occupy");
        // Each job that was submitted with a delay is on the schedule, and counts for its user.
        let due: BTreeSet<String> = self.redis(&["ZRANGE", "drayman:due", "0", "-1"]).texts().into_iter().collect();
        let mut delays: BTreeMap<String, String> = self.redis(&["HGETALL", "drayman:delays"]).map();
        let mut delayed: BTreeMap<String, u64> = BTreeMap::new();
        for (id, user) in self.redis(&["HGETALL", "drayman:delayed"]).map() {
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
        let lines = self.redis(&["SMEMBERS", "drayman:lines"]).texts().into_iter().collect();
        assert_eq!(tasks, lines, "the lines of tasks that are not empty and their index");

        let index_kind = self.redis(&["TYPE", "batch:indexes:queue"]).text();
        if index_kind != "string" {
            let queued: BTreeSet<String> = (self.keys("batch:queue:*").into_iter())
                .filter(|(_, kind)| kind == "list")
                .map(|(key, _)| key["batch:queue:".len()..].to_owned())
                .collect();
            let indexed = self.redis(&["SMEMBERS", "batch:indexes:queue"]).texts().into_iter().collect();
            assert_eq!(queued, indexed, "the index and the queues that are not empty");
        }
        let lists: BTreeMap<String, BTreeSet<String>> = (self.keys("batch:wip:user:*").into_iter())
            .filter(|(_, kind)| kind == "list")
            .map(|(key, _)| {
                let ids = self.redis(&["LRANGE", &key, "0", "-1"]).texts().into_iter().collect();
                (key["batch:wip:user:".len()..].to_owned(), ids)
            })
            .collect();
        if self.keys("batch:wip:*").iter().all(|(_, kind)| kind != "string") {
            assert_eq!(lists, wip, "the lists of work in progress and the claims");
            let users: BTreeSet<String> = self.redis(&["SMEMBERS", "batch:wip:users"]).texts().into_iter().collect();
            assert_eq!(users, wip.into_keys().collect(), "the index of work in progress");
        }
        self.batches_balanced(&claims, &due);
    }

    /// Checks that each batch counts what its blocks, its chunks and its results say.
    #[track_caller]
    fn batches_balanced(&self, claims: &BTreeMap<String, String>, due: &BTreeSet<String>) {
        let listed: BTreeSet<String> =
            self.redis(&["ZRANGE", "drayman:batches", "0", "-1"]).texts().into_iter().collect();
        let mut parts: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        let mut batches: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
        let mut counts: BTreeMap<String, u64> = BTreeMap::new();
        for (key, _) in self.keys("batch:jobs:*").into_iter().filter(|(_, kind)| kind == "hash") {
            let id = key["batch:jobs:".len()..].to_owned();
            match self.redis(&["HGET", &key, "kind"]) {
                // What others have written that it is one counts for nothing.
                Value::Bulk(kind) if kind == b"batch" && listed.contains(&id) => {
                    batches.insert(id, self.redis(&["HGETALL", &key]).map());
                }
                Value::Bulk(kind) if kind == b"part" && !["failed", "cancelled"].contains(&&*self.status(&id)) => {
                    let part = self.redis(&["HGET", &key, "part"]).text();
                    let words: Vec<&str> = part.split(' ').collect();
                    if words[0] != "done" {
                        counts.insert(id.clone(), words.get(4).map_or(0, |count| count.parse().unwrap()));
                        parts.entry(words[1].to_owned()).or_default().insert(id);
                    }
                }
                _ => {}
            }
        }
        assert_eq!(listed, batches.keys().cloned().collect(), "the batches and their list");
        for (id, batch) in batches {
            let own = self.redis(&["HGETALL", &format!("drayman:batch:{id}")]).map();
            let number = |name: &str| -> u64 { own[name].parse().unwrap_or_else(|_| panic!("{name} of {id}")) };
            let status = batch["status"].as_str();
            let (rows, left) = (number("rows"), number("left"));
            let (done, failed, aborted) = (number("done"), number("failed"), number("aborted"));
            assert_eq!(rows, left + done + failed + aborted, "rows of {id}: {batch:?}");
            assert!(number("skipped") <= done, "{id}");
            let said: BTreeSet<String> =
                self.redis(&["HKEYS", &format!("drayman:batch_parts:{id}")]).texts().into_iter().collect();
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
                assert!(self.redis(&["PTTL", &job_key(&id)]).int() > 0, "{id} has an end");
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
                    self.redis(&["LRANGE", &key, "0", "-1"]).texts().contains(part)
                });
                let places = [claims.contains_key(part), due.contains(part), waits];
                assert!(places.contains(&true), "{part} stands nowhere");
            }
            let undealt = self.undealt(&id, own.get("cursor"));
            let (mut ended, mut wrong) = (0, 0);
            for (field, packed) in self.results(&id) {
                let results =
                    unpack_results(&packed).unwrap_or_else(|error| panic!("results {field} of {id}: {error}"));
                let some: Vec<_> = results.into_iter().flatten().collect();
                ended += some.len() as u64;
                wrong += some.iter().filter(|result| result.end == RowEnd::Failed).count() as u64;
            }
            assert_eq!((ended, wrong), (done + failed, failed), "the results of {id} and its counts");
            match status {
                "held" => assert!(said.is_empty() && left == rows, "{id} is held"),
                "pending" | "running" if !is_aborted => {
                    let at_work: u64 = there.iter().map(|part| counts[part]).sum();
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
        let blocks = self.redis(&["HGETALL", &format!("drayman:batch_blocks:{id}")]).map();
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
        let Value::Array(flat) = self.redis(&["HGETALL", &format!("drayman:batch_results:{id}")]) else {
            panic!("no hash")
        };
        let pairs = flat.chunks_exact(2).map(|pair| (pair[0].text(), pair[1].bytes().to_vec()));
        pairs.filter(|(field, _)| field.contains(':')).collect()
    }

    /// Makes what waits one that nobody has touched for a while, so that a comparison of keys looks at it.
    pub fn age(&self) {
        for key in self.redis(&["KEYS", "batch:jobs:*"]).texts() {
            if self.redis(&["PTTL", &key]).int() == -1 {
                if self.redis(&["HEXISTS", &key, "updated_at"]).int() == 1 {
                    self.redis(&["HSET", &key, "updated_at", "2020-01-01T00:00:00.000Z"]);
                }
                self.idle(&key, 100);
            }
        }
    }
}

pub fn config(url: String) -> RedisConfig {
    RedisConfig { url: Url::new(url), ..RedisConfig::default() }
}

pub fn service(pools: &str, capacity: u32) -> Service {
    Service {
        pools: pools.split(' ').map(|pattern| PoolPattern::new(pattern).unwrap()).collect(),
        default_capacity: capacity,
        capacities: Vec::new(),
        fairness: Fairness::Jobs,
    }
}

pub async fn open(store: &Store, service: Service) -> Session {
    static PID: AtomicU32 = AtomicU32::new(1);
    let pid = PID.fetch_add(1, Ordering::Relaxed);
    let id = SessionId::generate("host", pid);
    Session::open(store.clone(), id, service, "host", pid).await.expect("a session opens")
}

pub fn job_key(id: &str) -> String {
    format!("batch:jobs:{id}")
}

pub fn queue_key(user: &str) -> String {
    format!("batch:queue:{user}")
}

/// So many jobs may wait in a line, of so many bytes.
pub fn most(jobs: u64, bytes: u64) -> QueueLimits {
    QueueLimits { sql_jobs: jobs, tasks: jobs, sql_bytes: bytes, task_bytes: bytes }
}

/// A native submission of a statement for a host.
pub fn submission(user: &str, id: &str, host: &str) -> Submission {
    let fields = Fields::new().with("query", "select 1").with("host", host);
    Submission { id: JobId::new(id).unwrap(), user: User::new(user).unwrap(), delay_ms: 0, run_at_ms: None, fields }
}

pub async fn take(session: &Session, n: usize) -> Vec<Claim> {
    session.take(n).await.expect("redis answers").expect("the session lives").claims
}

/// Takes one job, which must be there.
pub async fn take_one(session: &Session) -> Claim {
    let mut claims = take(session, 1).await;
    assert_eq!(claims.len(), 1, "there is a job to take");
    claims.remove(0)
}

pub fn ids(claims: &[Claim]) -> Vec<&str> {
    claims.iter().map(id).collect()
}

pub fn id(claim: &Claim) -> &str {
    claim.job().id.as_str()
}

pub fn final_verdict() -> Verdict {
    Verdict::Final { keep_ms: KEEP_MS }
}

pub async fn end(claim: Claim, status: &str) -> Finished {
    claim.finish(final_verdict(), Duration::ZERO, Fields::new().with("status", status), false).await.expect("an answer")
}

pub async fn put(claim: Claim, verdict: Verdict) -> Finished {
    claim.finish(verdict, Duration::ZERO, Fields::new(), false).await.expect("an answer")
}

/// How many scripts were called since the statistics were reset.
pub fn script_calls(rig: &Rig) -> u64 {
    let stats = rig.redis(&["INFO", "commandstats"]).text();
    let line = stats.lines().find_map(|line| line.strip_prefix("cmdstat_evalsha:calls="));
    line.map_or(0, |rest| rest.split(',').next().unwrap().parse().unwrap())
}
