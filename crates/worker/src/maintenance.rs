//! What the leader among the workers does for all: each task takes no input, may be repeated, is bounded and reports.
//!
//! Losing the leader delays housekeeping and nothing else.

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use queue_core::Store;
use queue_core::calls::{Budget, NotLeader, Upkeep};
use queue_core::config::Limits;
use queue_core::export::Feed;
use queue_core::ids::{JobId, SessionId};
use queue_core::inspect::Inspect;
use queue_core::leader::{self, Leadership, Led, Lengths, SessionWatch};
use queue_core::objects::{Objects, SHARDS};
use queue_core::reconcile::{Fate, Reconciler};
use queue_core::schedule;
use queue_core::store::Message;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::export;
use crate::metrics::Unserved;

/// How long a host's lock is held after there was last something to take for it.
const HOST_FORGOTTEN_AFTER: Duration = Duration::from_secs(600);
/// The pause before announcements are listened to again.
const LISTEN_AGAIN_AFTER: Duration = Duration::from_secs(5);
/// The longest pause between two looks at the schedules: so soon an operator's change is heard of.
const LOOK_AT_SCHEDULES_AFTER: Duration = Duration::from_secs(1);
/// How many chunks of records one pass removes before their time.
const EVICTIONS_MAX: usize = 20;
/// How long an object is kept at least, whatever becomes of its job's record.
const OBJECTS_GRACE: Duration = Duration::from_secs(3_600);
/// The pause between two looks for objects without a job. Each looks at one part of 256: all are seen in four and a half hours.
const OBJECTS_INTERVAL: Duration = Duration::from_secs(60);
/// How long what the users of an idle pool owe is remembered.
const POOL_FORGOTTEN_AFTER: Duration = Duration::from_secs(24 * 3600);

/// How the maintenance is done.
#[derive(Clone)]
pub struct Settings {
    /// How long a silent leader leads.
    pub leader_ttl: Duration,
    /// How long a silent session keeps its jobs.
    pub session_lifetime: Duration,
    /// How often the index of queues is looked through for pushes whose announcement was lost.
    pub scan_interval: Duration,
    /// How often the keyspace is looked through for queues that no index names.
    pub discovery_interval: Duration,
    /// How often old hashes are looked for.
    pub sweep_interval: Duration,
    /// How often all keys are compared.
    pub reconcile_interval: Duration,
    /// How long the record of a finished job is kept.
    pub keep: Duration,
    /// Most records of finished jobs.
    pub keep_count: u64,
    /// Most bytes of them.
    pub keep_bytes: u64,
    /// How much memory Redis may use before nothing new is accepted, and what else is accepted of recurring jobs.
    pub limits: Limits,
    /// How long an untouched hash that nothing refers to is kept.
    pub keep_untouched: Duration,
    /// How long the foreign layout's lock of a host lives unless renewed.
    pub host_lock_ttl: Duration,
    /// Where large results lie.
    pub objects: Objects,
    /// What a collector is told of jobs that nobody serves, where there is one.
    pub unserved: Option<Unserved>,
    /// How often such jobs are looked for.
    pub unserved_interval: Duration,
    /// Where records are written of what has ended, if anywhere.
    pub export: Option<export::Target>,
}

/// Stands for leadership until `stop` fires, and does the maintenance while it leads; then hands over at once.
pub async fn run(store: Store, id: SessionId, settings: Settings, stop: CancellationToken) {
    let mut term: Option<Term> = None;
    // Renewed often enough that a few lost replies do no harm.
    let mut ticks = tokio::time::interval(settings.leader_ttl / 5);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            _ = ticks.tick() => {
                match leader::hold(&store, &id, settings.leader_ttl).await {
                    Ok(Some(leadership)) => {
                        if term.as_ref().is_none_or(|term| term.leadership.term() != leadership.term()) {
                            tracing::info!(term = leadership.term(), "leading");
                            term = Some(Term::begin(&store, leadership, &settings));
                        }
                    }
                    Ok(None) => {
                        if term.take().is_some() {
                            tracing::info!("another worker leads");
                        }
                    }
                    Err(error) => {
                        tracing::debug!(%error, "the leadership could not be confirmed");
                        // Beats that were missed while Redis did not answer are nobody's fault.
                        if let Some(term) = &mut term {
                            term.watch.restart();
                        }
                        continue;
                    }
                }
                if let Some(current) = &mut term {
                    match current.pass(&settings).await {
                        Ok(Ok(())) => {}
                        Ok(Err(NotLeader)) => term = None,
                        Err(error) => {
                            tracing::warn!(%error, "maintenance was interrupted, it goes on with the next pass");
                            current.watch.restart();
                        }
                    }
                }
            }
        }
    }
    if let Err(error) = leader::resign(&store, &id).await {
        tracing::debug!(%error, "the leadership could not be handed over, it will expire");
    }
}

/// Stops at `NotLeader` as `?` stops at an error.
macro_rules! led {
    ($call:expr) => {
        match $call.await? {
            Ok(value) => value,
            Err(NotLeader) => return Ok(Err(NotLeader)),
        }
    };
}

/// One term of leadership and what it remembers.
struct Term {
    leadership: Leadership,
    watch: SessionWatch,
    /// Hosts whose locks are held, by when there was last something to take for them.
    hosts: HashMap<String, Instant>,
    foreign_hosts: Vec<String>,
    /// Nothing new is accepted for want of memory.
    full: bool,
    /// What takes the longer the more keys there are. It goes on beside the passes, for they renew the leadership.
    _rounds: Vec<AbortOnDropHandle<()>>,
}

impl Term {
    fn begin(store: &Store, leadership: Leadership, settings: &Settings) -> Self {
        let keep_untouched = settings.keep_untouched;
        let lengths = Arc::<Mutex<Lengths>>::default();
        let mut rounds = vec![
            AbortOnDropHandle::new(tokio::spawn(follow_announcements(
                store.clone(),
                leadership.clone(),
                lengths.clone(),
            ))),
            AbortOnDropHandle::new(tokio::spawn(make_ticks(leadership.clone(), settings.limits.clone()))),
            every(settings.scan_interval, &leadership, move |leadership| {
                let lengths = lengths.clone();
                async move {
                    led!(leadership.scan_changes(&mut *lengths.lock().await));
                    Ok(Ok(()))
                }
            }),
            every(settings.discovery_interval, &leadership, discover),
            every(settings.sweep_interval, &leadership, move |leadership| async move {
                let removed = led!(leadership.sweep(keep_untouched));
                if removed > 0 {
                    tracing::info!(removed, "old jobs removed");
                }
                Ok(Ok(()))
            }),
            every(settings.reconcile_interval, &leadership, reconciliation(settings.keep)),
            AbortOnDropHandle::new(tokio::spawn(sweep_objects(store.clone(), settings.objects.clone()))),
        ];
        if let Some(target) = settings.export.clone() {
            let feed = Feed::new(store.clone());
            rounds.push(AbortOnDropHandle::new(tokio::spawn(export::run(feed, target))));
        }
        if let Some(unserved) = settings.unserved.clone() {
            let telling = unserved.tell(store.clone(), settings.unserved_interval);
            rounds.push(AbortOnDropHandle::new(tokio::spawn(telling)));
        }
        Self {
            leadership,
            watch: SessionWatch::default(),
            hosts: HashMap::new(),
            foreign_hosts: Vec::new(),
            full: false,
            _rounds: rounds,
        }
    }

    async fn pass(&mut self, settings: &Settings) -> Led<()> {
        let leadership = self.leadership.clone();
        let done = led!(self.upkeep(settings));
        if done.found + done.given_up > 0 {
            tracing::info!(found = done.found, given_up = done.given_up, "ids that were queued before their hash");
        }
        for (session, jobs) in led!(self.watch.pass(&leadership, settings.session_lifetime)) {
            tracing::warn!(session, jobs, "a worker is gone, its jobs are back in their queues");
        }
        // First where the foreign layout's workers must not schedule, then where there may be something to schedule.
        let now = Instant::now();
        self.hosts.extend(leadership.active_hosts().await?.into_iter().map(|host| (host, now)));
        self.hosts.retain(|_, active| now - *active < HOST_FORGOTTEN_AFTER);
        let hosts = self.hosts.keys().cloned().collect();
        let foreign = led!(leadership.hold_host_locks(settings.host_lock_ttl, hosts));
        if foreign != self.foreign_hosts {
            tracing::warn!(hosts = ?foreign, "hosts that a foreign worker schedules; their jobs are left to it");
            self.foreign_hosts = foreign;
        }
        Ok(Ok(()))
    }

    async fn upkeep(&mut self, settings: &Settings) -> Led<Upkeep> {
        let (used, maxmemory) = self.leadership.memory().await?.unwrap_or_default();
        let budget = Budget {
            retention_ms: settings.keep.as_millis() as u64,
            count: settings.keep_count,
            bytes: settings.keep_bytes,
            used,
            mark: settings.limits.memory_high_water.bytes(maxmemory),
            // Longer than a leader's term without renewal: a change of leaders lifts nothing.
            mark_ms: 3 * settings.leader_ttl.as_millis() as u64,
        };
        let mut done = led!(self.leadership.upkeep_within(&budget));
        for _ in 1..EVICTIONS_MAX {
            if done.evicted % Budget::EVICTED_MAX != 0 || done.evicted == 0 {
                break;
            }
            let more = led!(self.leadership.upkeep_within(&budget));
            done.evicted += more.evicted;
            if more.evicted == 0 {
                break;
            }
        }
        if done.evicted > 0 {
            tracing::debug!(evicted = done.evicted, "records went before their time, there were more than may be kept");
        }
        if done.full != self.full {
            self.full = done.full;
            match done.full {
                true => tracing::warn!(used, mark = budget.mark, "redis is nearly full: no new jobs are accepted"),
                false => tracing::info!(used, mark = budget.mark, "redis has room again: new jobs are accepted"),
            }
        }
        Ok(Ok(done))
    }
}

/// Looks at the queues of those whose pushes foreign producers announce.
async fn follow_announcements(store: Store, leadership: Leadership, lengths: Arc<Mutex<Lengths>>) {
    let channel = store.keys().announcements();
    loop {
        match store.subscribe(std::slice::from_ref(&channel), &[]).await {
            Ok(mut announcements) => {
                // What was announced before somebody listened was said to nobody.
                let mut messages = vec![Message::gap()];
                loop {
                    if messages.iter().any(Message::is_gap)
                        && let Err(error) = leadership.scan_changes(&mut *lengths.lock().await).await
                    {
                        tracing::debug!(%error, "what was announced meanwhile could not be looked for, the scan will");
                    }
                    // In the order in which they were announced: ties go to who came first.
                    let mut seen = HashSet::new();
                    let users: Vec<Vec<u8>> = messages
                        .drain(..)
                        .filter(|message| !message.is_gap())
                        .map(|message| message.text.into_bytes())
                        .filter(|user| seen.insert(user.clone()))
                        .collect();
                    if !users.is_empty()
                        && let Err(error) = store.notice(&users).await
                    {
                        tracing::debug!(%error, "an announcement could not be followed, the scan will");
                    }
                    if announcements.recv_many(&mut messages, 500).await == 0 {
                        break;
                    }
                }
            }
            Err(error) => {
                tracing::warn!(%error, "announcements of foreign producers can't be heard, their queues are found by scans");
            }
        }
        tokio::time::sleep(LISTEN_AGAIN_AFTER).await;
    }
}

/// Makes the ticks of recurring jobs, each when it is due.
async fn make_ticks(leadership: Leadership, limits: Limits) {
    let mut reachable = true;
    loop {
        let pause = match schedule::tick(&leadership, &limits).await {
            Ok(Ok(ticked)) => {
                reachable = true;
                for (schedule, missed, because) in ticked.missed {
                    tracing::warn!(%schedule, missed, because, "ticks of a recurring job were missed");
                }
                for (schedule, waiting) in ticked.waiting {
                    tracing::warn!(%schedule, "a tick of a recurring job is not made yet: {waiting}");
                }
                if ticked.more { Duration::ZERO } else { ticked.next_in.unwrap_or(LOOK_AT_SCHEDULES_AFTER) }
            }
            Ok(Err(NotLeader)) => return,
            Err(error) => {
                // Looked at every second: what does not change is said once.
                if std::mem::take(&mut reachable) {
                    tracing::warn!(%error, "recurring jobs were interrupted, they go on with the next look");
                }
                LOOK_AT_SCHEDULES_AFTER
            }
        };
        tokio::time::sleep(pause.min(LOOK_AT_SCHEDULES_AFTER)).await;
    }
}

/// Compares all keys, repairs those that do not agree, and tells what is new.
fn reconciliation(keep: Duration) -> impl Fn(Leadership) -> Pin<Box<dyn Future<Output = Led<()>> + Send>> {
    let reconciler = Arc::new(Mutex::new(Reconciler::default()));
    move |leadership| {
        let reconciler = reconciler.clone();
        Box::pin(async move {
            for finding in led!(reconciler.lock().await.round(&leadership, keep)) {
                let repaired = finding.fate == Fate::Repaired;
                tracing::warn!(kind = %finding.kind, what = finding.what, repaired, "keys disagree: {}", finding.sentence);
            }
            Ok(Ok(()))
        })
    }
}

/// Removes the objects of jobs that have no record any more, part by part.
async fn sweep_objects(store: Store, objects: Objects) {
    let inspect = Inspect::new(store);
    for shard in (0..SHARDS).cycle() {
        let exists = |ids: Vec<JobId>| {
            let inspect = inspect.clone();
            async move { inspect.exist(&ids).await }
        };
        match objects.sweep(shard, OBJECTS_GRACE, exists).await {
            Ok(swept) if swept.removed > 0 => tracing::info!(jobs = swept.removed, "objects of removed jobs removed"),
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "objects could not be looked through, another round will"),
        }
        tokio::time::sleep(OBJECTS_INTERVAL).await;
    }
}

/// Finds what no index names.
async fn discover(leadership: Leadership) -> Led<()> {
    let moved = led!(leadership.move_old_queues());
    if moved > 0 {
        tracing::info!(moved, "jobs of old-layout queues joined their users' queues");
    }
    led!(leadership.scan_queues());
    led!(leadership.scan_lines());
    led!(leadership.clear_wip());
    led!(leadership.forget_idle_pools(POOL_FORGOTTEN_AFTER));
    Ok(Ok(()))
}

/// Repeats a task, the first time at once, until another worker leads or the term ends.
fn every<F>(
    pause: Duration,
    leadership: &Leadership,
    task: impl Fn(Leadership) -> F + Send + 'static,
) -> AbortOnDropHandle<()>
where
    F: Future<Output = Led<()>> + Send + 'static,
{
    let leadership = leadership.clone();
    AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            match task(leadership.clone()).await {
                Ok(Ok(())) => {}
                Ok(Err(NotLeader)) => return,
                Err(error) => tracing::warn!(%error, "maintenance was interrupted, it begins anew with the next round"),
            }
            tokio::time::sleep(pause).await;
        }
    }))
}
