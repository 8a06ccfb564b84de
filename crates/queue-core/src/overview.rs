//! What there is to see of the server, the workers and their work, by plain commands that read. What the ACL user may not
//! ask is left out and told.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::calls::Line;
use crate::error::Error;
use crate::ids::{Pool, PoolPattern};
use crate::library::Version;
use crate::limits::{InForce, Limits};
use crate::reply::{Reply, info_field};
use crate::store::{NO_FUNCTIONS, Store};

/// Clocks that differ by more than this are told.
const CLOCKS_DIFFER: Duration = Duration::from_secs(1);
/// A session that was silent for so long is none that lives, though nobody may have ended it.
const SILENT_FOR: Duration = Duration::from_secs(60);
/// How many lines one call looks at.
const LINES_PAGE: usize = 50;
/// How many pools with something to take [`unserved_pools`] looks at.
const POOLS_MAX: usize = 10_000;
/// How many lines it looks at, but one of each pool. Each of the others counts for one job.
const LINES_MAX: usize = 10_000;
/// Above this share of the memory that it may use, the server will soon refuse to write.
const MEMORY_SHARE: f64 = 0.9;

/// Everything at one glance.
#[derive(Debug, Default, Serialize)]
pub struct Overview {
    /// The server.
    pub server: Server,
    /// The leader among the workers.
    pub leader: Option<Leader>,
    /// The workers' sessions.
    pub sessions: Vec<SessionView>,
    /// How many jobs there are.
    pub jobs: Jobs,
    /// The job that stands first in its queue and was submitted first of those that do.
    pub oldest_waiting: Option<Waiting>,
    /// Pools with something running or ready.
    pub pools: Vec<PoolView>,
    /// Pools that no live session serves and that jobs wait for.
    pub unserved: Vec<UnservedPool>,
    /// Limits and pauses.
    pub limits: InForce,
    /// What is no disagreement of keys and should not stay.
    pub warnings: Vec<String>,
    /// What could not be seen, with Redis' reason.
    pub unseen: Vec<String>,
}

/// The server and its settings.
#[derive(Debug, Default, Serialize)]
pub struct Server {
    /// Redis or Valkey, and its version.
    pub version: Option<String>,
    /// What it does when its memory is full.
    pub maxmemory_policy: Option<String>,
    /// Whether it writes a log of changes.
    pub appendonly: Option<String>,
    /// How often that log reaches the disk.
    pub appendfsync: Option<String>,
    /// How many replicas are connected.
    pub replicas: Option<u64>,
    /// Bytes in use.
    pub used_memory: Option<u64>,
    /// Most bytes that it may use; 0 for no limit.
    pub maxmemory: Option<u64>,
    /// How far its clock is ahead of ours, in ms.
    pub clock_ahead_ms: Option<i64>,
    /// The version of the library of functions; `None` if there is none, or calls go as scripts.
    pub library: Option<String>,
}

/// Who leads.
#[derive(Debug, Serialize)]
pub struct Leader {
    /// Its session.
    pub session: String,
    /// How long it still leads unless it renews, in ms.
    pub ttl_ms: i64,
}

/// One session.
#[derive(Debug, Serialize)]
pub struct SessionView {
    /// Its id.
    pub session: String,
    /// The pools that it serves.
    pub service: String,
    /// How many claims it believes to hold.
    pub held: u64,
    /// The time since its last heartbeat, or since its start, in ms.
    pub silent_ms: Option<u64>,
}

/// Counts.
#[derive(Debug, Default, Serialize)]
pub struct Jobs {
    /// Ids in queues.
    pub queued: Option<u64>,
    /// Claims.
    pub running: Option<u64>,
    /// Jobs that wait for a time.
    pub scheduled: Option<u64>,
    /// Jobs that have ended and are not forgotten.
    pub finished: Option<u64>,
    /// Ids that wait for their hash.
    pub missing: Option<u64>,
    /// Ids that were set aside.
    pub rejected: Option<u64>,
}

/// A job that waits.
#[derive(Debug, Serialize)]
pub struct Waiting {
    /// Its id.
    pub id: String,
    /// Its user.
    pub user: String,
    /// For how long, in ms.
    pub waited_ms: u64,
}

/// What waits for a pool that no live session serves.
#[derive(Debug, Default, Serialize)]
pub struct UnservedPool {
    /// The pool.
    pub pool: String,
    /// Users whose next job is one of it.
    pub users: u64,
    /// Jobs that wait there, those behind the next one too.
    pub jobs: u64,
    /// The longest wait of a next job, in ms, if one says when it was submitted.
    pub oldest_waited_ms: Option<u64>,
}

impl UnservedPool {
    fn add(&mut self, jobs: u64, oldest_waited_ms: Option<u64>) {
        self.users += 1;
        self.jobs += jobs;
        self.oldest_waited_ms = self.oldest_waited_ms.max(oldest_waited_ms);
    }
}

/// One user's jobs that wait for such a pool.
#[derive(Debug, Serialize)]
pub struct UnservedLine {
    /// The pool of the user's next job.
    pub pool: String,
    /// The user.
    pub user: String,
    /// Jobs that wait, those behind the next one too.
    pub jobs: u64,
    /// For how long the next one has waited, in ms, if it says when it was submitted.
    pub oldest_waited_ms: Option<u64>,
}

/// One pool.
#[derive(Debug, Serialize)]
pub struct PoolView {
    /// Its name.
    pub pool: String,
    /// Jobs that run in it.
    pub running: u64,
    /// Most that may, if it has a number of its own.
    pub capacity: Option<u64>,
    /// Users with a job to take.
    pub ready: u64,
    /// Why takes from it pause.
    pub blocked: Option<String>,
    /// Whether some session serves it.
    pub served: bool,
}

/// Looks at everything.
pub async fn look(store: &Store) -> Result<Overview, Error> {
    let mut looker = Looker { store, overview: Overview::default() };
    let now_ms = looker.clock().await?;
    looker.server().await?;
    looker.library().await?;
    looker.leader().await?;
    looker.sessions(now_ms).await?;
    let queues = looker.queues().await?;
    if let Some(queues) = &queues {
        looker.jobs(now_ms, queues).await?;
    }
    looker.pools().await?;
    if let Some(queues) = queues {
        looker.unserved(now_ms, &queues).await?;
    }
    looker.limits().await?;
    Ok(looker.overview)
}

/// What live sessions serve.
pub async fn served(store: &Store) -> Result<Vec<PoolPattern>, Error> {
    let mut looker = Looker { store, overview: Overview::default() };
    let now_ms = looker.clock().await?;
    looker.sessions(now_ms).await?;
    Ok(looker.served())
}

/// Jobs that wait for pools that no live session serves, by pool and user; those that wait longest first.
pub async fn unserved(store: &Store) -> Result<Vec<UnservedLine>, Error> {
    let mut looker = Looker { store, overview: Overview::default() };
    let now_ms = looker.clock().await?;
    looker.sessions(now_ms).await?;
    let Some(queues) = looker.queues().await? else {
        return Err(Error::Refused(looker.overview.unseen.join("; ")));
    };
    let mut lines = looker.unserved_lines(now_ms, &queues).await?;
    lines.sort_by_key(|line| std::cmp::Reverse(line.oldest_waited_ms));
    Ok(lines)
}

/// The same by pool, for who asks again and again: it goes by what takes go by, and costs next to nothing where all is served. So it
/// does not see what nobody has noticed yet, and what a limit or a pause keeps from its turn may be missing.
pub async fn unserved_pools(store: &Store) -> Result<Vec<UnservedPool>, Error> {
    let mut looker = Looker { store, overview: Overview::default() };
    let now_ms = looker.clock().await?;
    looker.sessions(now_ms).await?;
    let served = looker.served();
    let mut listed = Vec::new();
    let mut classes = looker.members(&store.keys().classes()).await?;
    // A set has no order, and what is looked at closely should be the same each time.
    classes.sort();
    for class in classes {
        listed.extend(looker.range(&store.keys().pools(&class), POOLS_MAX - 1).await?);
    }
    listed.truncate(POOLS_MAX);
    let mut lines_left = LINES_MAX;
    let mut unserved = Vec::new();
    for pool in listed.iter().map(|pool| String::from_utf8_lossy(pool)).filter(|pool| !covers(&served, pool)) {
        let ready = store.keys().ready(&pool);
        let users = looker.range(&ready, lines_left).await?;
        let beyond = if users.len() > lines_left {
            let all = looker.count("the pools", "ZCARD", &ready).await?.unwrap_or(0);
            all.saturating_sub(users.len() as u64)
        } else {
            0
        };
        lines_left = lines_left.saturating_sub(users.len());
        let mut found = UnservedPool { pool: pool.into_owned(), users: beyond, jobs: beyond, oldest_waited_ms: None };
        let kind = if found.pool.starts_with("sql:") || found.pool.starts_with("db:") { "sql" } else { &found.pool };
        let lines: Vec<Vec<u8>> = users.iter().map(|user| [kind.as_bytes(), b":", user].concat()).collect();
        for page in lines.chunks(LINES_PAGE) {
            for line in store.lines(page).await? {
                // Some stand there from before their head changed, until somebody takes.
                if line.pool.as_deref() == Some(&found.pool) {
                    found.add(line.jobs, line.waited_ms(now_ms));
                }
            }
        }
        if found.jobs > 0 {
            unserved.push(found);
        }
    }
    // Without all of its sessions, what is served would look as if it were not.
    if looker.overview.unseen.is_empty() {
        Ok(unserved)
    } else {
        Err(Error::Refused(looker.overview.unseen.join("; ")))
    }
}

/// A list in which jobs wait.
struct Queue {
    key: Vec<u8>,
    /// The line that it is a band of.
    line: Vec<u8>,
    user: String,
}

struct Looker<'a> {
    store: &'a Store,
    overview: Overview,
}

impl Looker<'_> {
    /// One command that reads. What is refused, or a key of another type, gives nothing.
    async fn ask(&mut self, what: &str, command: &'static str, args: &[&[u8]]) -> Result<Option<Reply>, Error> {
        let reply = self.store.command(command, args).await;
        if reply.as_ref().is_err_and(Error::is_wrong_type) { Ok(None) } else { self.seen(what, reply) }
    }

    /// What was found; nothing, and that it could not be seen, where Redis refuses to show it.
    fn seen<T>(&mut self, what: &str, found: Result<T, Error>) -> Result<Option<T>, Error> {
        match found {
            Ok(found) => Ok(Some(found)),
            Err(error @ Error::Refused(_)) if !error.is_transient() => {
                let told = format!("{what}: {error}");
                if !self.overview.unseen.contains(&told) {
                    self.overview.unseen.push(told);
                }
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    async fn count(&mut self, what: &str, command: &'static str, key: &str) -> Result<Option<u64>, Error> {
        let reply = self.ask(what, command, &[key.as_bytes()]).await?;
        reply.map(|reply| Ok(reply.int(command)? as u64)).transpose()
    }

    fn warn(&mut self, warning: String) {
        self.overview.warnings.push(warning);
    }

    /// What time it is at the server, or here if it does not say.
    async fn clock(&mut self) -> Result<u64, Error> {
        let ours = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        let Some(reply) = self.ask("the server's clock", "TIME", &[]).await? else { return Ok(ours) };
        let items = reply.array("TIME")?;
        let part = |at: usize| items.get(at).map_or(Ok(0), |item| item.int("TIME"));
        let theirs = (part(0)? * 1_000 + part(1)? / 1_000) as u64;
        let ahead = theirs as i64 - ours as i64;
        self.overview.server.clock_ahead_ms = Some(ahead);
        if ahead.unsigned_abs() > CLOCKS_DIFFER.as_millis() as u64 {
            self.warn(format!("the server's clock and this machine's differ by {ahead} ms"));
        }
        Ok(theirs)
    }

    async fn server(&mut self) -> Result<(), Error> {
        if let Some(info) = self.ask("version, memory and replicas of the server", "INFO", &[]).await? {
            let info = info.lossy().unwrap_or_default();
            let says = |field: &str| info_field(&info, field).map(str::to_owned);
            let number = |field: &str| says(field)?.parse::<u64>().ok();
            let server = &mut self.overview.server;
            server.version = match says("valkey_version") {
                Some(version) => Some(format!("Valkey {version}")),
                None => says("redis_version").map(|version| format!("Redis {version}")),
            };
            server.replicas = number("connected_slaves");
            server.used_memory = number("used_memory");
            server.maxmemory = number("maxmemory");
            server.maxmemory_policy = says("maxmemory_policy");
            server.appendonly = says("aof_enabled").map(|on| if on == "1" { "yes" } else { "no" }.to_owned());
        }
        let fsync =
            self.ask("how often the log of changes reaches the disk", "CONFIG", &[b"GET", b"appendfsync"]).await?;
        let fsync = fsync.and_then(|reply| reply.texts("CONFIG").ok()?.into_iter().nth(1));
        self.overview.server.appendfsync = fsync;
        let server = &self.overview.server;
        let mut warnings = Vec::new();
        if server.maxmemory_policy.as_deref().is_some_and(|policy| policy != "noeviction") {
            warnings.push("maxmemory-policy is not noeviction: jobs may be evicted when memory runs out".into());
        }
        if server.appendonly.as_deref() == Some("no") {
            warnings
                .push("appendonly is no: a crash of the server loses what was written since its last snapshot".into());
        }
        if let (Some(used), Some(most @ 1..)) = (server.used_memory, server.maxmemory)
            && used as f64 > most as f64 * MEMORY_SHARE
        {
            warnings
                .push(format!("{used} of {most} bytes of memory are in use: writes will be refused when it is full"));
        }
        self.overview.warnings.extend(warnings);
        Ok(())
    }

    async fn library(&mut self) -> Result<(), Error> {
        if self.store.calls_scripts() {
            self.warn(format!("redis.functions is false: {NO_FUNCTIONS}"));
            return Ok(());
        }
        match self.store.library_version().await {
            Ok(found) => {
                if found.is_some_and(|found| found < Version::OURS) {
                    self.warn(format!(
                        "the library in Redis is older than this program's {}: workers of this version replace it",
                        Version::OURS
                    ));
                }
                self.overview.server.library = found.map(|found| found.to_string());
            }
            Err(Error::Refused(reason)) => self.overview.unseen.push(format!("the library of functions: {reason}")),
            Err(error) => return Err(error),
        }
        Ok(())
    }

    async fn leader(&mut self) -> Result<(), Error> {
        let key = self.store.keys().leader();
        if let Some(Reply::Bytes(text)) = self.ask("the leader", "GET", &[key.as_bytes()]).await? {
            let text = String::from_utf8_lossy(&text).into_owned();
            let ttl = self.ask("the leader's lifetime", "PTTL", &[key.as_bytes()]).await?;
            self.overview.leader = Some(Leader {
                session: text.split('\t').next().unwrap_or_default().to_owned(),
                ttl_ms: ttl.map_or(Ok(0), |ttl| ttl.int("PTTL"))?,
            });
        } else {
            self.warn(
                "nobody leads: lost workers, foreign pushes and disagreements of keys are not looked after".into(),
            );
        }
        Ok(())
    }

    async fn sessions(&mut self, now_ms: u64) -> Result<(), Error> {
        let key = self.store.keys().sessions();
        let Some(names) = self.ask("the sessions", "SMEMBERS", &[key.as_bytes()]).await? else { return Ok(()) };
        let mut names = names.texts("SMEMBERS")?;
        names.sort();
        for session in names {
            let key = self.store.keys().session(&session);
            let fields: [&[u8]; 5] = [key.as_bytes(), b"service", b"held", b"beat_at", b"started_at"];
            let Some(values) = self.ask("the sessions", "HMGET", &fields).await? else { continue };
            let values: Vec<Option<String>> = values.array("HMGET")?.iter().map(Reply::lossy).collect();
            let text = |at: usize| values.get(at).cloned().flatten();
            let heard = text(2).or(text(3)).and_then(|at| time_ms(&at));
            self.overview.sessions.push(SessionView {
                session,
                service: text(0).unwrap_or_default(),
                held: text(1).and_then(|held| held.parse().ok()).unwrap_or(0),
                silent_ms: heard.map(|at| now_ms.saturating_sub(at)),
            });
        }
        Ok(())
    }

    /// All lists in which jobs wait; `None` if they can't be seen.
    async fn queues(&mut self) -> Result<Option<Vec<Queue>>, Error> {
        let keys = self.store.keys().clone();
        let mut queues = Vec::new();
        for (pattern, prefix, is_line) in [
            (keys.queue("*"), keys.queue("").len(), false),
            (keys.tasks("*"), keys.tasks("").len(), true),
            (keys.high("*"), keys.high("").len(), true),
            (keys.low("*"), keys.low("").len(), true),
        ] {
            let Some(found) = self.keys(&pattern).await? else { return Ok(None) };
            queues.extend(found.into_iter().map(|key| {
                let name = key[prefix..].to_vec();
                let line = if is_line { name } else { [b"sql:", name.as_slice()].concat() };
                let user = line.splitn(2, |byte| *byte == b':').last().unwrap_or_default();
                let user = String::from_utf8_lossy(user).into_owned();
                Queue { key, line, user }
            }));
        }
        Ok(Some(queues))
    }

    async fn jobs(&mut self, now_ms: u64, queues: &[Queue]) -> Result<(), Error> {
        let keys = self.store.keys().clone();
        self.overview.jobs = Jobs {
            queued: None,
            running: self.count("running jobs", "HLEN", &keys.claims()).await?,
            scheduled: self.count("scheduled jobs", "ZCARD", &keys.due()).await?,
            finished: self.count("ended jobs", "ZCARD", &keys.finished()).await?,
            missing: self.count("ids without a hash", "ZCARD", &keys.missing()).await?,
            rejected: self.count("rejected ids", "XLEN", &keys.rejected()).await?,
        };
        let mut queued = 0;
        for Queue { key, user, .. } in queues {
            queued += match self.ask("the queues", "LLEN", &[key]).await? {
                Some(length) => length.int("LLEN")? as u64,
                None => continue,
            };
            let Some(Reply::Bytes(id)) = self.ask("the queues", "LINDEX", &[key, b"-1"]).await? else { continue };
            let job = [keys.job("").as_bytes(), &id].concat();
            // Others write it, so its size is asked first.
            let size = self.ask("when jobs were submitted", "HSTRLEN", &[&job, b"created_at"]).await?;
            if !matches!(size, Some(Reply::Int(1..=64))) {
                continue;
            }
            let at = self.ask("when jobs were submitted", "HGET", &[&job, b"created_at"]).await?;
            let Some(at) = at.as_ref().and_then(Reply::text).and_then(time_ms) else { continue };
            let waited_ms = now_ms.saturating_sub(at);
            if self.overview.oldest_waiting.as_ref().is_none_or(|oldest| oldest.waited_ms < waited_ms) {
                self.overview.oldest_waiting =
                    Some(Waiting { id: String::from_utf8_lossy(&id).into_owned(), user: user.clone(), waited_ms });
            }
        }
        self.overview.jobs.queued = Some(queued);
        Ok(())
    }

    async fn pools(&mut self) -> Result<(), Error> {
        let keys = self.store.keys().clone();
        let mut names = BTreeSet::new();
        for (pattern, prefix) in [(keys.pool("*"), keys.pool("").len()), (keys.ready("*"), keys.ready("").len())] {
            let Some(found) = self.keys(&pattern).await? else { return Ok(()) };
            names.extend(found.iter().map(|key| String::from_utf8_lossy(&key[prefix..]).into_owned()));
        }
        let served = self.served();
        for name in names {
            let key = keys.pool(&name);
            let fields: [&[u8]; 4] = [key.as_bytes(), b"running", b"capacity", b"blocked"];
            let Some(values) = self.ask("the pools", "HMGET", &fields).await? else { continue };
            let values: Vec<Option<String>> = values.array("HMGET")?.iter().map(Reply::lossy).collect();
            let text = |at: usize| values.get(at).cloned().flatten();
            let ready = self.count("the pools", "ZCARD", &keys.ready(&name)).await?.unwrap_or(0);
            let served = covers(&served, &name);
            let running = text(0).and_then(|number| number.parse().ok()).unwrap_or(0);
            let capacity = text(1).and_then(|number| number.parse().ok());
            let view = PoolView { pool: name, running, capacity, ready, blocked: text(2), served };
            if let Some(reason) = &view.blocked {
                self.warn(format!("takes from pool {} pause: {reason}", view.pool));
            }
            if view.running > 0 || view.ready > 0 || view.blocked.is_some() {
                self.overview.pools.push(view);
            }
        }
        Ok(())
    }

    /// What the sessions that live serve.
    fn served(&self) -> Vec<PoolPattern> {
        let silent = SILENT_FOR.as_millis() as u64;
        let alive = self.overview.sessions.iter().filter(|session| session.silent_ms.is_some_and(|ms| ms < silent));
        // Most serve what others serve.
        let patterns: BTreeSet<&str> = alive.flat_map(|session| session.service.split_whitespace()).collect();
        patterns.into_iter().filter_map(|pattern| PoolPattern::new(pattern).ok()).collect()
    }

    /// The first members of a sorted set, to the one at `last`.
    async fn members(&mut self, key: &str) -> Result<Vec<String>, Error> {
        let found = self.ask("the pools", "SMEMBERS", &[key.as_bytes()]).await?;
        found.map_or(Ok(Vec::new()), |found| found.texts("SMEMBERS"))
    }

    async fn range(&mut self, key: &str, last: usize) -> Result<Vec<Vec<u8>>, Error> {
        let last = last.to_string();
        let Some(found) = self.ask("the pools", "ZRANGE", &[key.as_bytes(), b"0", last.as_bytes()]).await? else {
            return Ok(Vec::new());
        };
        Ok(found.array("ZRANGE")?.into_iter().filter_map(Reply::into_bytes).collect())
    }

    async fn unserved_lines(&self, now_ms: u64, queues: &[Queue]) -> Result<Vec<UnservedLine>, Error> {
        let users: BTreeMap<&[u8], &str> =
            queues.iter().map(|queue| (queue.line.as_slice(), queue.user.as_str())).collect();
        let lines: Vec<Vec<u8>> = users.keys().map(|line| line.to_vec()).collect();
        let served = self.served();
        let mut unserved = Vec::new();
        for page in lines.chunks(LINES_PAGE) {
            for (line, found) in page.iter().zip(self.store.lines(page).await?) {
                let oldest_waited_ms = found.waited_ms(now_ms);
                let Some(pool) = found.pool.filter(|pool| !covers(&served, pool)) else { continue };
                let user = users[line.as_slice()].to_owned();
                unserved.push(UnservedLine { pool, user, jobs: found.jobs, oldest_waited_ms });
            }
        }
        Ok(unserved)
    }

    async fn unserved(&mut self, now_ms: u64, queues: &[Queue]) -> Result<(), Error> {
        let found = self.unserved_lines(now_ms, queues).await;
        let Some(lines) = self.seen("what waits for pools that nobody serves", found)? else { return Ok(()) };
        let mut pools: BTreeMap<String, UnservedPool> = BTreeMap::new();
        for line in lines {
            pools.entry(line.pool).or_default().add(line.jobs, line.oldest_waited_ms);
        }
        for (name, pool) in pools {
            let UnservedPool { users, jobs, .. } = pool;
            self.warn(format!("{jobs} jobs of {users} users wait for pool {name}, which no worker serves"));
            self.overview.unserved.push(UnservedPool { pool: name, ..pool });
        }
        Ok(())
    }

    async fn limits(&mut self) -> Result<(), Error> {
        let found = Limits::new(self.store.clone()).all().await;
        let Some(in_force) = self.seen("limits and pauses", found)? else { return Ok(()) };
        if let Some(pause) = &in_force.paused {
            self.warn(format!("nothing starts: all is {pause}"));
        }
        for view in in_force.users.iter().chain(&in_force.pools) {
            if let Some(pause) = &view.paused {
                self.warn(format!("{} {} is {pause}", view.kind, view.name));
            }
            if !view.ignored.is_empty() {
                let ignored = view.ignored.join(", ");
                self.warn(format!(
                    "limits of {} {} that are no valid numbers count for nothing: {ignored}",
                    view.kind, view.name
                ));
            }
        }
        self.overview.limits = in_force;
        Ok(())
    }

    /// All keys of a pattern.
    async fn keys(&mut self, pattern: &str) -> Result<Option<Vec<Vec<u8>>>, Error> {
        let mut found = BTreeSet::new();
        let mut cursor = b"0".to_vec();
        loop {
            let args: [&[u8]; 5] = [&cursor, b"MATCH", pattern.as_bytes(), b"COUNT", b"1000"];
            let Some(reply) = self.ask("keys by their names", "SCAN", &args).await? else { return Ok(None) };
            let mut items = reply.array("SCAN")?.into_iter();
            cursor = items.next().and_then(Reply::into_bytes).unwrap_or_else(|| b"0".to_vec());
            let page = items.next().unwrap_or(Reply::Array(Vec::new())).array("SCAN")?;
            found.extend(page.into_iter().filter_map(Reply::into_bytes));
            if cursor == b"0" {
                return Ok(Some(found.into_iter().collect()));
            }
        }
    }
}

impl Line {
    /// For how long its head has waited, if that says when it was submitted.
    fn waited_ms(&self, now_ms: u64) -> Option<u64> {
        Some(now_ms.saturating_sub(time_ms(self.created_at.as_deref()?)?))
    }
}

fn covers(patterns: &[PoolPattern], pool: &str) -> bool {
    Pool::new(pool).is_ok_and(|pool| patterns.iter().any(|pattern| pattern.covers(&pool)))
}

fn time_ms(text: &str) -> Option<u64> {
    let time = humantime::parse_rfc3339(text.trim()).ok()?;
    Some(time.duration_since(UNIX_EPOCH).ok()?.as_millis() as u64)
}
