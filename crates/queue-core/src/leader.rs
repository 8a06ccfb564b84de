//! The maintenance that one worker at a time does for all. Every task takes no input but the leadership itself, may be
//! repeated, is bounded, and does no harm if two believe that they lead: the functions compare the term first.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::calls::{Budget, Lead, NotLeader, SessionEnd, Upkeep};
use crate::error::Error;
use crate::ids::SessionId;
use crate::reply::{Reply, info_field};
use crate::store::Store;

/// How many entries one round trip of a scan looks at.
const SCAN_COUNT: &[u8] = b"500";

/// One term of leadership.
#[derive(Debug, Clone)]
pub struct Leadership {
    store: Store,
    session: SessionId,
    term: u64,
}

/// Takes or renews the leadership.
pub async fn hold(store: &Store, session: &SessionId, ttl: Duration) -> Result<Option<Leadership>, Error> {
    Ok(match store.lead(session, Some(ttl.as_millis() as u64)).await? {
        Lead::Leader(term) => Some(Leadership { store: store.clone(), session: session.clone(), term }),
        Lead::Follower(_) | Lead::Nobody => None,
    })
}

/// Gives the leadership up, if it is held, so that another takes it at once.
pub async fn resign(store: &Store, session: &SessionId) -> Result<(), Error> {
    store.lead(session, None).await.map(drop)
}

/// What a task of the leader says: a result, or that another leads.
pub type Led<T> = Result<Result<T, NotLeader>, Error>;

/// Stops at `NotLeader` as `?` stops at an error.
macro_rules! led {
    ($call:expr) => {
        match $call? {
            Ok(value) => value,
            Err(NotLeader) => return Ok(Err(NotLeader)),
        }
    };
}

impl Leadership {
    /// Its number.
    pub fn term(&self) -> u64 {
        self.term
    }

    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    pub(crate) fn session(&self) -> &SessionId {
        &self.session
    }

    /// Jobs that became due, hashes that came late, the index of finished jobs.
    pub async fn upkeep(&self, retention: Duration) -> Led<Upkeep> {
        self.store.upkeep(&self.session, self.term, retention.as_millis() as u64).await
    }

    /// The same within a budget.
    pub async fn upkeep_within(&self, budget: &Budget) -> Led<Upkeep> {
        self.store.upkeep_within(&self.session, self.term, budget).await
    }

    /// How many bytes of memory the server uses, and its limit, 0 if it has none. `None` where that may not be asked.
    pub async fn memory(&self) -> Result<Option<(u64, u64)>, Error> {
        let text = match self.store.command("INFO", &[b"memory"]).await {
            Ok(reply) => reply.lossy().unwrap_or_default(),
            Err(error @ Error::Refused(_)) if !error.is_transient() => return Ok(None),
            Err(error) => return Err(error),
        };
        let says = |field| info_field(&text, field)?.parse().ok();
        Ok(says("used_memory").zip(says("maxmemory")))
    }

    /// Gives back the jobs of a session whose beat stands still at `beat`. Returns how many, or `None` if it beat again.
    async fn reclaim(&self, session: &str, beat: u64) -> Led<Option<u64>> {
        let mut returned = 0;
        loop {
            match led!(self.store.session_reclaim(session, beat, &self.session, self.term).await) {
                SessionEnd::More(count) => returned += count,
                SessionEnd::Ended(count) => return Ok(Ok(Some(returned + count))),
                SessionEnd::Alive => return Ok(Ok(None)),
            }
        }
    }

    /// Looks at all lines that the indexes name: the queues of users, and the lines of tasks.
    pub async fn scan_index(&self) -> Led<u64> {
        let mut ready = 0;
        let keys = self.store.keys().clone();
        for (index, is_tasks) in [(keys.queued_users(), false), (keys.lines(), true)] {
            let mut cursor = Some(b"0".to_vec());
            while let Some(at) = cursor {
                let args: [&[u8]; 4] = [index.as_bytes(), &at, b"COUNT", SCAN_COUNT];
                let (next, found) = match scan(&self.store, "SSCAN", &args).await {
                    // Others have made something else of the index: the queues are found by their keys.
                    Err(error) if error.is_wrong_type() => break,
                    other => other?,
                };
                if !found.is_empty() {
                    ready += if is_tasks { self.store.place(&found).await? } else { self.store.look(&found).await? };
                }
                cursor = (next != b"0").then_some(next);
            }
        }
        Ok(Ok(ready))
    }

    /// Finds queues that no index names, by their keys.
    pub async fn scan_queues(&self) -> Led<u64> {
        let prefix = self.store.keys().queue("").len();
        let mut ready = 0;
        let mut found = Scan::new(self.store.keys().queue("*"), "list");
        while let Some(keys) = found.next(&self.store).await? {
            let users: Vec<Vec<u8>> = keys.into_iter().map(|key| key[prefix..].to_vec()).collect();
            ready += self.store.look(&users).await?;
        }
        Ok(Ok(ready))
    }

    /// Empties queues of the layout that is older than per-user lists.
    pub async fn move_old_queues(&self) -> Led<u64> {
        let prefix = self.store.keys().old_queue("").len();
        let mut moved = 0;
        let mut found = Scan::new(self.store.keys().old_queue("*"), "list");
        while let Some(keys) = found.next(&self.store).await? {
            for key in keys {
                loop {
                    let (count, more) = led!(self.store.old_queue(&self.session, self.term, &key[prefix..]).await);
                    moved += count;
                    if !more {
                        break;
                    }
                }
            }
        }
        Ok(Ok(moved))
    }

    /// Removes hashes that nobody has touched for so long and that are final or referenced by nothing.
    pub async fn sweep(&self, untouched: Duration) -> Led<u64> {
        let prefix = self.store.keys().job("").len();
        let mut removed = 0;
        let mut found = Scan::new(self.store.keys().job("*"), "hash");
        while let Some(keys) = found.next(&self.store).await? {
            let ids: Vec<Vec<u8>> = keys.into_iter().map(|key| key[prefix..].to_vec()).collect();
            removed += led!(self.store.sweep(&self.session, self.term, untouched.as_millis() as u64, &ids).await);
        }
        Ok(Ok(removed))
    }

    /// Forgets pools in which nothing has run and nobody was ready for so long.
    pub async fn forget_idle_pools(&self, idle: Duration) -> Led<u64> {
        let prefix = self.store.keys().pool("").len();
        let mut forgotten = 0;
        let mut found = Scan::new(self.store.keys().pool("*"), "hash");
        while let Some(keys) = found.next(&self.store).await? {
            let pools: Vec<Vec<u8>> = keys.into_iter().map(|key| key[prefix..].to_vec()).collect();
            let idle_ms = idle.as_millis() as u64;
            forgotten += led!(self.store.pool_sweep(&self.session, self.term, idle_ms, &pools).await);
        }
        Ok(Ok(forgotten))
    }

    /// Clears work-in-progress lists of what is not being worked on.
    pub async fn clear_wip(&self) -> Led<u64> {
        let mut removed = 0;
        for user in self.store.members(&self.store.keys().wip_users()).await? {
            removed += led!(self.store.wip(&self.session, self.term, &user.into_bytes().unwrap_or_default()).await);
        }
        Ok(Ok(removed))
    }

    /// Holds the foreign layout's scheduling locks of these hosts; returns those that a foreign worker holds.
    pub async fn hold_host_locks(&self, ttl: Duration, hosts: Vec<String>) -> Led<Vec<String>> {
        if hosts.is_empty() {
            return Ok(Ok(Vec::new()));
        }
        self.store.host_lock(&self.session, self.term, ttl.as_millis() as u64, &hosts).await
    }

    /// The hosts of the pools that have something to take now.
    pub async fn active_hosts(&self) -> Result<Vec<String>, Error> {
        let pools = self.store.keys().pools();
        let pools = self.store.command("ZRANGE", &[pools.as_bytes(), b"0", b"999"]).await?.texts("ZRANGE")?;
        Ok(pools
            .iter()
            .filter_map(|pool| pool.strip_prefix("sql:"))
            .filter(|host| !host.is_empty())
            .map(str::to_owned)
            .collect())
    }
}

/// All keys of a pattern and a type, a chunk of them each round trip.
struct Scan {
    pattern: String,
    holds: &'static str,
    /// Where to go on; `None` at the end.
    cursor: Option<Vec<u8>>,
}

impl Scan {
    fn new(pattern: String, holds: &'static str) -> Self {
        Self { pattern, holds, cursor: Some(b"0".to_vec()) }
    }

    /// The next keys, which may be none.
    async fn next(&mut self, store: &Store) -> Result<Option<Vec<Vec<u8>>>, Error> {
        let Some(cursor) = &self.cursor else { return Ok(None) };
        let args: [&[u8]; 7] =
            [cursor, b"MATCH", self.pattern.as_bytes(), b"COUNT", SCAN_COUNT, b"TYPE", self.holds.as_bytes()];
        let (next, keys) = scan(store, "SCAN", &args).await?;
        self.cursor = (next != b"0").then_some(next);
        Ok(Some(keys))
    }
}

/// One step of a scan: the next cursor, and what was found.
pub(crate) async fn scan(
    store: &Store,
    command: &'static str,
    args: &[&[u8]],
) -> Result<(Vec<u8>, Vec<Vec<u8>>), Error> {
    let mut items = store.command(command, args).await?.array(command)?.into_iter();
    match (items.next().and_then(Reply::into_bytes), items.next()) {
        (Some(cursor), Some(found)) => {
            Ok((cursor, found.array(command)?.into_iter().filter_map(Reply::into_bytes).collect()))
        }
        _ => Err(Reply::Nil.unexpected(command)),
    }
}

/// Watches the heartbeats of all sessions on this process's own monotonic clock.
///
/// A session is dead when its beat stood still for one lifetime while Redis answered all along: an outage, a failover or a
/// jump of anybody's clock starts the watch anew and kills nobody. So does a pause of the watching process itself.
#[derive(Debug, Default)]
pub struct SessionWatch {
    seen: HashMap<String, (u64, Instant)>,
    last_pass: Option<Instant>,
}

impl SessionWatch {
    /// Forgets all that was seen, after an error or a change of role.
    pub fn restart(&mut self) {
        self.seen.clear();
    }

    /// Looks at all beats, and reclaims the sessions whose beat stood still for `lifetime`. Returns those sessions with how
    /// many jobs went back to their queues.
    pub async fn pass(&mut self, leadership: &Leadership, lifetime: Duration) -> Led<Vec<(String, u64)>> {
        if self.last_pass.replace(Instant::now()).is_some_and(|last| last.elapsed() >= lifetime) {
            self.restart();
        }
        let store = &leadership.store;
        let sessions = store.command("SMEMBERS", &[store.keys().sessions().as_bytes()]).await?.texts("SMEMBERS")?;
        self.seen.retain(|session, _| sessions.contains(session));
        let mut dead = Vec::new();
        for session in sessions {
            let key = store.keys().session(&session);
            let beat = store.command("HGET", &[key.as_bytes(), b"beat"]).await?;
            // A registration that has no hash is one that was half removed: it never beats.
            let beat = if beat == Reply::Nil { 0 } else { beat.int("HGET")? as u64 };
            match self.seen.get(&session) {
                Some((last, since)) if *last == beat => {
                    if since.elapsed() >= lifetime
                        && let Some(jobs) = led!(leadership.reclaim(&session, beat).await)
                    {
                        self.seen.remove(&session);
                        dead.push((session, jobs));
                    }
                }
                _ => {
                    self.seen.insert(session, (beat, Instant::now()));
                }
            }
        }
        Ok(Ok(dead))
    }
}
