//! The maintenance that one worker at a time does for all. Every task takes no input but the leadership itself, may be
//! repeated, is bounded, and does no harm if two believe that they lead: the functions compare the term first.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use futures::future::{self, BoxFuture};

use crate::calls::{Budget, Lead, NotLeader, SessionEnd, Upkeep};
use crate::error::Error;
use crate::ids::SessionId;
use crate::reply::{Reply, info_field};
use crate::store::Store;

/// How many entries of a set one round trip looks at, and how many keys: most of these may be others'.
const SCAN_COUNT: &[u8] = b"500";
pub(crate) const KEYS_COUNT: &[u8] = b"2000";

/// How many users, lines, hashes and pools one call looks at: each takes Redis a few ms at most, whatever stands there.
const USERS_PAGE: usize = 25;
const LINES_PAGE: usize = 200;
const HASHES_PAGE: usize = 20;
const POOLS_PAGE: usize = 200;

/// One term of leadership.
#[derive(Debug, Clone)]
pub struct Leadership {
    store: Store,
    session: SessionId,
    term: u64,
    /// Nobody waits for what the leader does, but who asks for it by hand.
    pace: Option<Arc<Pace>>,
}

/// What goes through all keys takes this share of Redis' time in all, however many there are.
const SHARE: f64 = 0.01;
/// So much of its time is taken at once where there was nothing to do before: what is small is soon done.
const AT_ONCE: Duration = Duration::from_millis(200);

/// The pace of what goes through all keys. A call costs as long as its answer takes: a Redis that is busy, or far away, is asked less.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// When all that was done has been waited for; the past where there is something to spare.
    even: Mutex<Option<Instant>>,
}

impl Pace {
    /// Makes a call, and where there is a pace to keep waits until the next one may be made. On the heap, for calls are large futures.
    pub(crate) fn keep<'a, T: Send + 'a>(
        pace: Option<&'a Self>,
        call: impl Future<Output = T> + Send + 'a,
    ) -> BoxFuture<'a, T> {
        let Some(pace) = pace else { return call.boxed() };
        async move {
            let begun = Instant::now();
            let done = call.await;
            tokio::time::sleep(pace.owes(begun.elapsed(), Instant::now())).await;
            done
        }
        .boxed()
    }

    /// How long is to be waited behind a call that took so long.
    fn owes(&self, took: Duration, now: Instant) -> Duration {
        let mut even = self.even.lock().unwrap_or_else(PoisonError::into_inner);
        let spare = now.checked_sub(AT_ONCE.div_f64(SHARE));
        let next = even.or(spare).max(spare).unwrap_or(now) + took.div_f64(SHARE);
        *even = Some(next);
        next.saturating_duration_since(now)
    }
}

/// What the leader knows of queues that anybody pushes to: how long each was when it was looked at last.
#[derive(Debug, Default)]
pub struct Lengths(HashMap<Vec<u8>, u64>);

/// Takes or renews the leadership.
pub async fn hold(store: &Store, session: &SessionId, ttl: Duration) -> Result<Option<Leadership>, Error> {
    Ok(match store.lead(session, Some(ttl.as_millis() as u64)).await? {
        Lead::Leader(term) => {
            Some(Leadership { store: store.clone(), session: session.clone(), term, pace: Some(Arc::default()) })
        }
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

    /// The same for who waits for what it does: it takes as much of Redis' time as there is.
    pub fn in_haste(self) -> Self {
        Self { pace: None, ..self }
    }

    pub(crate) fn pace(&self) -> Option<&Pace> {
        self.pace.as_deref()
    }

    fn paced<'a, T: Send + 'a>(&'a self, call: impl Future<Output = T> + Send + 'a) -> BoxFuture<'a, T> {
        Pace::keep(self.pace(), call)
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
        Ok(Ok(match led!(self.store.session_reclaim(session, beat, &self.session, self.term).await) {
            SessionEnd::Ended(count) => Some(count),
            SessionEnd::Alive => None,
        }))
    }

    /// Looks at the queues that the index names and that have become longer or shorter since. Where nobody pushes or takes, that is
    /// one question for each queue.
    pub async fn scan_changes(&self, seen: &mut Lengths) -> Led<u64> {
        let keys = self.store.keys().clone();
        let (mut ready, mut now) = (0, HashMap::new());
        let mut users = Scan::members(keys.queued_users());
        while let Some(page) = users.next(&self.store).await? {
            let lengths = page.iter().map(|user| async {
                let queue = [keys.queue("").as_bytes(), user].concat();
                match self.store.command("LLEN", &[&queue]).await {
                    // Others have made something else of it: the look says so.
                    Err(error) if error.is_wrong_type() => Ok(None),
                    reply => Ok::<_, Error>(Some(reply?.int("LLEN")? as u64)),
                }
            });
            let lengths = future::try_join_all(lengths).await?;
            let is_new =
                |(user, length): &(&Vec<u8>, &Option<u64>)| length.is_none() || seen.0.get(*user) != length.as_ref();
            let changed: Vec<Vec<u8>> =
                page.iter().zip(&lengths).filter(is_new).map(|(user, _)| user.clone()).collect();
            for users in changed.chunks(USERS_PAGE) {
                ready += self.store.look(users).await?;
            }
            now.extend(page.into_iter().zip(lengths).filter_map(|(user, length)| Some((user, length?))));
        }
        seen.0 = now;
        Ok(Ok(ready))
    }

    /// Looks at all lines of tasks. Nobody else pushes to them: what is found was lost.
    pub async fn scan_lines(&self) -> Led<u64> {
        let mut ready = 0;
        let mut lines = Scan::members(self.store.keys().lines());
        while let Some(page) = lines.next(&self.store).await? {
            for lines in page.chunks(LINES_PAGE) {
                ready += self.paced(self.store.place(lines)).await?;
            }
        }
        Ok(Ok(ready))
    }

    /// Looks at all queues, found by their keys: also at those that no index names.
    pub async fn scan_queues(&self) -> Led<u64> {
        let mut ready = 0;
        let mut found = Scan::keys(self.store.keys().queue(""), "list");
        while let Some(users) = self.paced(found.next(&self.store)).await? {
            for users in users.chunks(USERS_PAGE) {
                ready += self.paced(self.store.look(users)).await?;
            }
        }
        Ok(Ok(ready))
    }

    /// Empties queues of the layout that is older than per-user lists.
    pub async fn move_old_queues(&self) -> Led<u64> {
        let mut moved = 0;
        let mut found = Scan::keys(self.store.keys().old_queue(""), "list");
        while let Some(hosts) = self.paced(found.next(&self.store)).await? {
            for host in hosts {
                loop {
                    // Not at the pace: these are jobs that wait.
                    let (count, more) = led!(self.store.old_queue(&self.session, self.term, &host).await);
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
        let (mut removed, untouched_ms) = (0, untouched.as_millis() as u64);
        let mut found = Scan::keys(self.store.keys().job(""), "hash");
        while let Some(ids) = self.paced(found.next(&self.store)).await? {
            for ids in ids.chunks(HASHES_PAGE) {
                removed += led!(self.paced(self.store.sweep(&self.session, self.term, untouched_ms, ids)).await);
            }
        }
        Ok(Ok(removed))
    }

    /// Forgets pools in which nothing has run and nobody was ready for so long.
    pub async fn forget_idle_pools(&self, idle: Duration) -> Led<u64> {
        let (mut forgotten, idle_ms) = (0, idle.as_millis() as u64);
        let mut found = Scan::keys(self.store.keys().pool(""), "hash");
        while let Some(pools) = self.paced(found.next(&self.store)).await? {
            for pools in pools.chunks(POOLS_PAGE) {
                forgotten += led!(self.paced(self.store.pool_sweep(&self.session, self.term, idle_ms, pools)).await);
            }
        }
        Ok(Ok(forgotten))
    }

    /// Clears work-in-progress lists of what is not being worked on.
    pub async fn clear_wip(&self) -> Led<u64> {
        let mut removed = 0;
        let mut users = Scan::members(self.store.keys().wip_users());
        while let Some(page) = users.next(&self.store).await? {
            for user in page {
                removed += led!(self.paced(self.store.wip(&self.session, self.term, &user)).await);
            }
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
        let pools = self.store.keys().pools("sql:");
        let pools = self.store.command("ZRANGE", &[pools.as_bytes(), b"0", b"999"]).await?.texts("ZRANGE")?;
        Ok(pools
            .iter()
            .filter_map(|pool| pool.strip_prefix("sql:"))
            .filter(|host| !host.is_empty())
            .map(str::to_owned)
            .collect())
    }
}

/// What a cursor goes through, a chunk of it each round trip.
struct Scan {
    command: &'static str,
    /// What is asked of, before the cursor, and how, behind it.
    of: Option<String>,
    how: Vec<Vec<u8>>,
    /// What each found text begins with, and is left out.
    stem: usize,
    /// Where to go on; `None` at the end.
    cursor: Option<Vec<u8>>,
}

impl Scan {
    /// The names behind a stem in all keys of a type that begin with it.
    fn keys(stem: String, holds: &'static str) -> Self {
        let pattern = format!("{stem}*").into_bytes();
        let how =
            vec![b"MATCH".to_vec(), pattern, b"COUNT".to_vec(), KEYS_COUNT.to_vec(), b"TYPE".to_vec(), holds.into()];
        Self { command: "SCAN", of: None, how, stem: stem.len(), cursor: Some(b"0".to_vec()) }
    }

    /// The members of a set; none where others have made something else of it.
    fn members(set: String) -> Self {
        let how = vec![b"COUNT".to_vec(), SCAN_COUNT.to_vec()];
        Self { command: "SSCAN", of: Some(set), how, stem: 0, cursor: Some(b"0".to_vec()) }
    }

    /// The next of them, which may be none.
    async fn next(&mut self, store: &Store) -> Result<Option<Vec<Vec<u8>>>, Error> {
        let Some(cursor) = self.cursor.take() else { return Ok(None) };
        let mut args: Vec<&[u8]> = self.of.iter().map(String::as_bytes).collect();
        args.push(&cursor);
        args.extend(self.how.iter().map(Vec::as_slice));
        let (next, found) = store.scan(self.command, &args).await?;
        self.cursor = next;
        Ok(Some(found.into_iter().map(|text| text[self.stem..].to_vec()).collect()))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_through_all_keys_takes_its_share_of_the_time_and_what_is_small_does_not_wait() {
        let (pace, begun) = (Pace::default(), Instant::now() + Duration::from_secs(3_600));
        let call = Duration::from_millis(5);
        let mut now = begun;
        for calls in 1..=2_000 {
            now += call;
            let wait = pace.owes(call, now);
            if call * calls < AT_ONCE {
                assert_eq!(wait, Duration::ZERO, "{calls}");
            }
            now += wait;
        }
        let share = (call * 2_000 - AT_ONCE).div_duration_f64(now - begun);
        assert!((share - SHARE).abs() < SHARE / 20.0, "{share}");
        // Who has paused may go on at once, but not for longer than at first.
        now += Duration::from_secs(3_600);
        assert_eq!(pace.owes(AT_ONCE - call, now), Duration::ZERO);
        assert!(pace.owes(2 * call, now) > Duration::ZERO);
    }
}
