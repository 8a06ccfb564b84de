//! What there is to see of the server, the workers and their work, by plain commands that read. What the ACL user may not
//! ask is left out and told.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::error::Error;
use crate::ids::{Pool, PoolPattern};
use crate::reply::Reply;
use crate::store::Store;

/// Clocks that differ by more than this are told.
const CLOCKS_DIFFER: Duration = Duration::from_secs(1);
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
    looker.leader().await?;
    looker.sessions(now_ms).await?;
    looker.jobs(now_ms).await?;
    looker.pools().await?;
    Ok(looker.overview)
}

struct Looker<'a> {
    store: &'a Store,
    overview: Overview,
}

impl Looker<'_> {
    /// One command that reads. What is refused, or a key of another type, gives nothing.
    async fn ask(&mut self, what: &str, command: &'static str, args: &[&[u8]]) -> Result<Option<Reply>, Error> {
        match self.store.command(command, args).await {
            Ok(reply) => Ok(Some(reply)),
            Err(error) if error.is_wrong_type() => Ok(None),
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
            let says = |field: &str| {
                info.lines()
                    .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
                    .map(|text| text.trim().to_owned())
            };
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

    async fn jobs(&mut self, now_ms: u64) -> Result<(), Error> {
        let keys = self.store.keys().clone();
        self.overview.jobs = Jobs {
            queued: None,
            running: self.count("running jobs", "HLEN", &keys.claims()).await?,
            scheduled: self.count("scheduled jobs", "ZCARD", &keys.due()).await?,
            finished: self.count("ended jobs", "ZCARD", &keys.finished()).await?,
            missing: self.count("ids without a hash", "ZCARD", &keys.missing()).await?,
            rejected: self.count("rejected ids", "XLEN", &keys.rejected()).await?,
        };
        let Some(queues) = self.keys(&keys.queue("*")).await? else { return Ok(()) };
        let mut queued = 0;
        for key in queues {
            queued += match self.ask("the queues", "LLEN", &[&key]).await? {
                Some(length) => length.int("LLEN")? as u64,
                None => continue,
            };
            let Some(Reply::Bytes(id)) = self.ask("the queues", "LINDEX", &[&key, b"-1"]).await? else { continue };
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
                self.overview.oldest_waiting = Some(Waiting {
                    id: String::from_utf8_lossy(&id).into_owned(),
                    user: String::from_utf8_lossy(&key[keys.queue("").len()..]).into_owned(),
                    waited_ms,
                });
            }
        }
        self.overview.jobs.queued = Some(queued);
        Ok(())
    }

    async fn pools(&mut self) -> Result<(), Error> {
        let keys = self.store.keys().clone();
        let mut names = std::collections::BTreeSet::new();
        for (pattern, prefix) in [(keys.pool("*"), keys.pool("").len()), (keys.ready("*"), keys.ready("").len())] {
            let Some(found) = self.keys(&pattern).await? else { return Ok(()) };
            names.extend(found.iter().map(|key| String::from_utf8_lossy(&key[prefix..]).into_owned()));
        }
        let patterns: Vec<PoolPattern> = (self.overview.sessions.iter())
            .flat_map(|session| session.service.split_whitespace())
            .filter_map(|pattern| PoolPattern::new(pattern).ok())
            .collect();
        for name in names {
            let key = keys.pool(&name);
            let fields: [&[u8]; 4] = [key.as_bytes(), b"running", b"capacity", b"blocked"];
            let Some(values) = self.ask("the pools", "HMGET", &fields).await? else { continue };
            let values: Vec<Option<String>> = values.array("HMGET")?.iter().map(Reply::lossy).collect();
            let text = |at: usize| values.get(at).cloned().flatten();
            let ready = self.count("the pools", "ZCARD", &keys.ready(&name)).await?.unwrap_or(0);
            let served =
                Pool::new(name.as_str()).is_ok_and(|pool| patterns.iter().any(|pattern| pattern.covers(&pool)));
            let running = text(0).and_then(|number| number.parse().ok()).unwrap_or(0);
            let capacity = text(1).and_then(|number| number.parse().ok());
            let view = PoolView { pool: name, running, capacity, ready, blocked: text(2), served };
            if ready > 0 && !served {
                self.warn(format!("{ready} users are ready in pool {}, which no worker serves", view.pool));
            }
            if let Some(reason) = &view.blocked {
                self.warn(format!("takes from pool {} pause: {reason}", view.pool));
            }
            if view.running > 0 || view.ready > 0 || view.blocked.is_some() {
                self.overview.pools.push(view);
            }
        }
        Ok(())
    }

    /// All keys of a pattern.
    async fn keys(&mut self, pattern: &str) -> Result<Option<Vec<Vec<u8>>>, Error> {
        let mut found = std::collections::BTreeSet::new();
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

fn time_ms(text: &str) -> Option<u64> {
    let time = humantime::parse_rfc3339(text.trim()).ok()?;
    Some(time.duration_since(UNIX_EPOCH).ok()?.as_millis() as u64)
}
