//! Compares from both sides the keys that must agree, and repairs those that do not.
//!
//! A healthy system gives no finding, whatever goes on in it: functions change all that belongs together in one step. Keys can
//! disagree after a restore from a backup, a failover that lost writes, hands that edited keys, or a fault of ours.
//!
//! Rust only finds where to look, by scans in bounded pages. Whether something is wrong is decided, and repaired, in one
//! function and in one step, so a finding is true at its moment and a repair is safe whoever makes it. What a live session has
//! claimed stays its own, and what a producer may be writing just now is left alone for a minute.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::hash::BuildHasher;
use std::time::{Duration, Instant};

use futures::future::{self, BoxFuture};
use serde::Serialize;

use crate::calls::NotLeader;
use crate::error::Error;
use crate::ids::SessionId;
use crate::inspect::{Inspect, Place};
use crate::keys::{Holds, TABLE};
use crate::leader::{KEYS_COUNT, Leadership, Led, Pace};
use crate::reply::Reply;
use crate::store::Store;

/// How many entries of a hash or sorted set one round trip of a scan looks at.
const SCAN_COUNT: &[u8] = b"500";

/// Most items that one call compares; of jobs that stand in no place fewer, for each may need a search through a queue.
const PAGE: usize = 50;
const JOBS_PAGE: usize = 10;
/// How often a sum is compared with its entries, both of which change all the time, before it is added up anew.
const LOOKS_AT_SUMS: usize = 3;

/// How long what can only be reported is not looked at again by the same leader. Each look counts as a touch of the job's
/// hash, and the removal of old hashes waits for those that nobody touches.
const KNOWN_FOR: Duration = Duration::from_secs(3_600);

macro_rules! kinds {
    ($($(#[doc = $doc:literal])+ $kind:ident = $word:literal;)+) => {
        /// What is wrong.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Kind {
            $($(#[doc = $doc])+ $kind,)+
        }

        impl Kind {
            /// Every kind.
            pub const ALL: &[Kind] = &[$(Kind::$kind),+];

            /// The stable word for it.
            pub fn word(self) -> &'static str {
                match self {
                    $(Kind::$kind => $word,)+
                }
            }
        }
    };
}

kinds! {
    /// A key of ours holds another type than its row of the table says. Reported.
    WrongType = "wrong-type";
    /// A key begins as ours do and is in no row of the table. Reported.
    UnknownKey = "unknown-key";
    /// The leader's key would never expire. Repaired: it gets a lifetime, which a leader that lives renews.
    LeaderLasting = "leader-lasting";
    /// A session has work, cancels or an entry among the sessions, and no registration. Repaired: its jobs go back to the
    /// front of their queues as after a lost worker, and the keys go.
    SessionGone = "session-gone";
    /// A session lives and does not stand among the sessions. Repaired: entered.
    SessionUnlisted = "session-unlisted";
    /// A claim's text can't be read. Repaired: removed; its job goes back by what its work list says.
    ClaimMalformed = "claim-malformed";
    /// A claim is held by a session that does not exist. Repaired: its job goes back.
    ClaimOrphaned = "claim-orphaned";
    /// A claimed job has no hash. Reported: the worker that holds the claim ends it.
    ClaimJobless = "claim-jobless";
    /// A claim is missing from its session's work list. Repaired: entered.
    ClaimUnlisted = "claim-unlisted";
    /// A work list names what its session has not claimed. Repaired: removed; a job that ran goes back.
    WorkUnclaimed = "work-unclaimed";
    /// A session is asked to cancel what it has not claimed. Repaired: removed.
    CancelStray = "cancel-stray";
    /// A job says that it runs, was taken by us, and is neither claimed nor queued. Repaired: it goes back.
    RunningLost = "running-lost";
    /// A job says that it runs, and we have not taken it. Reported: nobody can know what became of it.
    RunningForeign = "running-foreign";
    /// A job waits that stood in a queue before and is in none. Repaired: to the front of its queue.
    PendingLost = "pending-lost";
    /// A job waits that its producer has not pushed. Reported.
    PendingUnqueued = "pending-unqueued";
    /// A job is scheduled for no time. Repaired: it is due now.
    ScheduledLost = "scheduled-lost";
    /// A batch has rows to deal and stands in no line. Repaired: to the front of its own.
    BatchLost = "batch-lost";
    /// A batch waits for rows, or for the end of its files, that nobody has any more. Reported: it can be aborted.
    BatchPartsLost = "batch-parts-lost";
    /// Something was done to a batch, like a chunk dealt or ended, a release, an abort, and that broke off half way. Repaired: brought to its
    /// end.
    BatchBroken = "batch-broken";
    /// A job is a part of a batch that does not know it. Repaired: removed.
    PartStray = "part-stray";
    /// The record of a batch shows other counts than it has. Repaired: written anew.
    BatchView = "batch-view";
    /// All rows of a batch have ended, and it has not. Repaired: its files are assembled, and it ends.
    BatchUnsettled = "batch-unsettled";
    /// A step of a flow has ended, or its job is gone, and the flow does not know. Repaired: it goes on; a step whose job is gone has failed.
    FlowStuck = "flow-stuck";
    /// A job of ours has not ended and names no valid user. Reported.
    JobOwnerless = "job-ownerless";
    /// The record of an ended job has no lifetime. Repaired: it gets one.
    FinalKept = "final-kept";
    /// What is scheduled has no hash, or another status and no place in a queue. Repaired: removed from the schedule.
    DueStray = "due-stray";
    /// An entry of the ids without a hash can't be read. Repaired: removed.
    MissingMalformed = "missing-malformed";
    /// The index of ended jobs names one that has not ended, or whose record is gone too early. Repaired: removed.
    FinishedStray = "finished-stray";
    /// The books of ended jobs do not agree about a record that is there. Repaired: entered in all of them.
    FinalUnbooked = "final-unbooked";
    /// A job counts as delayed and is not scheduled. Repaired: it counts no more.
    DelayedStray = "delayed-stray";
    /// A sum is not what its parts add up to: the bytes of ended jobs, or the delayed jobs of a user. Repaired: counted.
    SumWrong = "sum-wrong";
    /// A user's list of work in progress names what nobody works on. Repaired: removed.
    WipStray = "wip-stray";
    /// A user's list of work in progress misses a running job. Repaired: entered.
    WipMissing = "wip-missing";
    /// The index of users with work in progress is wrong. Repaired.
    WipIndex = "wip-index";
    /// A number of a pool is none. Repaired: removed, so that the default counts.
    PoolMalformed = "pool-malformed";
    /// A pool's count of running jobs is not that of its claims. Repaired: counted.
    PoolMiscount = "pool-miscount";
    /// A user's count of running jobs, in a pool or over all, is not that of the claims. Repaired: counted.
    UserMiscount = "user-miscount";
    /// A pool's users owe something, and its virtual time is lost. Repaired: it goes on from the least of their times.
    PoolTimeless = "pool-timeless";
    /// Users are ready in a pool that takes do not look at. Repaired: entered.
    PoolUnlisted = "pool-unlisted";
    /// A user is ready and has as many running jobs as it may. Repaired: removed until one of them ends.
    ReadyBeyondLimit = "ready-beyond-limit";
    /// A session that does not exist is parked. Repaired: removed.
    ParkedStray = "parked-stray";
    /// Sessions are parked where no wake-up looks. Repaired: entered.
    ServiceUnlisted = "service-unlisted";
    /// A user has waiting jobs and has not been ready for a minute. Repaired: made ready.
    QueueUnnoticed = "queue-unnoticed";
    /// The index of the lines of tasks that are not empty is wrong. Repaired.
    LineIndex = "line-index";
    /// Lines of a user are kept from their turn by limits that allow it. Repaired: they get it.
    LineBarred = "line-barred";
    /// A unique key names a job that does not hold it any more. Repaired: removed.
    UniqueStray = "unique-stray";
    /// A schedule stands elsewhere in the order of ticks than its own next one says, or nowhere. Repaired: entered.
    ScheduleUnlisted = "schedule-unlisted";
    /// The indexes of a tracker do not agree with a record. Repaired: they follow the record.
    TrackIndex = "track-index";
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.word())
    }
}

impl Serialize for Kind {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.word())
    }
}

/// What became of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Fate {
    /// Nobody but an operator can put it right.
    Reported,
    /// It was left as it is, because only a look was asked for.
    Repairable,
    /// It is repaired.
    Repaired,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Its kind.
    pub kind: Kind,
    /// The id, user, session, pool or key that it is about. Others may have written it: any text.
    pub what: String,
    /// A sentence for an operator.
    pub sentence: String,
    /// What became of it.
    pub fate: Fate,
}

impl Finding {
    fn read(reply: Reply) -> Result<Self, Error> {
        let unexpected = reply.unexpected("reconcile");
        let [kind, what, sentence, fate] = &reply.texts("reconcile")?[..] else { return Err(unexpected) };
        let Some(kind) = Kind::ALL.iter().copied().find(|known| known.word() == kind) else { return Err(unexpected) };
        let fate = match fate.as_str() {
            "reported" => Fate::Reported,
            "repairable" => Fate::Repairable,
            "repaired" => Fate::Repaired,
            _ => return Err(unexpected),
        };
        Ok(Self { kind, what: what.clone(), sentence: sentence.clone(), fate })
    }
}

/// Compares, and changes nothing.
pub async fn check(store: &Store, retention: Duration) -> Result<Vec<Finding>, Error> {
    anybody(Round::new(store, false, None, retention).run().await)
}

/// Compares and repairs. Needs no leadership.
pub async fn repair(store: &Store, retention: Duration) -> Result<Vec<Finding>, Error> {
    anybody(Round::new(store, true, None, retention).run().await)
}

fn anybody<T>(led: Led<T>) -> Result<T, Error> {
    led?.map_err(|NotLeader| Error::Reply { function: "reconcile", reply: "not_leader".into() })
}

/// What a leader remembers from round to round.
#[derive(Debug, Default)]
pub struct Reconciler {
    /// What was only reported, by when.
    known: HashMap<(Kind, String), Instant>,
}

impl Reconciler {
    /// One round of a leader: compares and repairs. Returns what is new.
    pub async fn round(&mut self, leadership: &Leadership, retention: Duration) -> Led<Vec<Finding>> {
        self.known.retain(|_, since| since.elapsed() < KNOWN_FOR);
        let leader = Some((leadership.session(), leadership.term()));
        let mut round = Round::new(leadership.store(), true, leader, retention);
        round.pace = leadership.pace();
        round.known_jobs = self.known.keys().map(|(_, what)| what.as_bytes().to_vec()).collect();
        let findings = match round.run().await? {
            Ok(findings) => findings,
            Err(NotLeader) => return Ok(Err(NotLeader)),
        };
        let now = Instant::now();
        let new = |finding: &Finding| {
            finding.fate != Fate::Reported || self.known.insert((finding.kind, finding.what.clone()), now).is_none()
        };
        Ok(Ok(findings.into_iter().filter(new).collect()))
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

/// One comparison of everything.
struct Round<'a> {
    store: &'a Store,
    repair: bool,
    leader: Option<(&'a SessionId, u64)>,
    retention_ms: u64,
    /// Nobody waits for a leader's.
    pace: Option<&'a Pace>,
    /// Jobs that are not looked at again yet.
    known_jobs: HashSet<Vec<u8>>,
    findings: Vec<Finding>,
}

impl<'a> Round<'a> {
    fn new(store: &'a Store, repair: bool, leader: Option<(&'a SessionId, u64)>, retention: Duration) -> Self {
        let retention_ms = retention.as_millis() as u64;
        Self { store, repair, leader, retention_ms, pace: None, known_jobs: HashSet::new(), findings: Vec::new() }
    }

    /// What others rest on comes first: numbers that functions compute with, then claims, then what names them.
    async fn run(mut self) -> Led<Vec<Finding>> {
        let keys = self.store.keys().clone();
        let ours = led!(self.key_table());
        led!(self.look("leader", &[Vec::new()]));
        led!(self.look("classes", &ours.classes));
        led!(self.look("numbers", &ours.pools));
        led!(self.sums(Book::Running(&ours.pools)));
        led!(self.look("pools", &ours.pools));
        led!(self.busy_in(&ours.pools));
        led!(self.walk("claims", "HSCAN", &keys.claims()));
        let sessions = self.set_members(&keys.sessions()).await?;
        let sessions: Vec<Vec<u8>> =
            ours.sessions.into_iter().chain(sessions).collect::<BTreeSet<_>>().into_iter().collect();
        led!(self.look("sessions", &sessions));
        led!(self.held_by(&sessions));
        led!(self.walk("due", "ZSCAN", &keys.due()));
        led!(self.walk("missing", "ZSCAN", &keys.missing()));
        led!(self.walk("batches", "ZSCAN", &keys.batches()));
        // Before the walk through the queues, which counts as a touch.
        let (queues, wip) = self.open_keys().await?;
        let mut lines: BTreeSet<Vec<u8>> = ours.lines.into_iter().collect();
        lines.extend(queues.iter().map(|user| [b"sql:", user.as_slice()].concat()));
        lines.extend(self.set_members(&keys.lines()).await?);
        led!(self.look("barred", &ours.barred));
        led!(self.look("lines", &lines.into_iter().collect::<Vec<_>>()));
        led!(self.look("uniques", &ours.uniques));
        led!(self.unplaced_jobs());
        for (command, key) in [("ZSCAN", keys.finished()), ("ZSCAN", keys.expiring()), ("HSCAN", keys.kept())] {
            led!(self.walk("finished", command, &key));
        }
        led!(self.walk("delayed", "HSCAN", &keys.delayed()));
        led!(self.sums(Book::Delayed));
        led!(self.sums(Book::Kept));
        let mut users: BTreeSet<Vec<u8>> = self.set_members(&keys.wip_users()).await?.into_iter().collect();
        users.extend(self.claims().await?.into_iter().map(|(_, user)| user));
        users.extend(wip);
        led!(self.look("wip", &users.into_iter().collect::<Vec<_>>()));
        led!(self.look("parked", &ours.services));
        Ok(Ok(self.findings))
    }

    /// Has the server compare items, a page of them each call.
    async fn look(&mut self, aspect: &'static str, items: &[Vec<u8>]) -> Led<()> {
        let page = if aspect == "jobs" { JOBS_PAGE } else { PAGE };
        for page in items.chunks(page) {
            led!(self.compare(aspect, page));
        }
        Ok(Ok(()))
    }

    async fn compare(&mut self, aspect: &'static str, items: &[Vec<u8>]) -> Led<()> {
        let compared = self.store.reconcile(self.repair, self.leader, self.retention_ms, aspect, items);
        match self.paced(compared).await {
            Ok(Ok(found)) => {
                for finding in found {
                    self.findings.push(Finding::read(finding)?);
                }
            }
            Ok(Err(NotLeader)) => return Ok(Err(NotLeader)),
            // The look at the key table has told of it; the rest can be compared all the same.
            Err(error) if error.is_wrong_type() => {}
            Err(error) => return Err(error),
        }
        Ok(Ok(()))
    }

    /// Looks at what stands in the work lists of sessions, and at what they are asked to cancel.
    async fn held_by(&mut self, sessions: &[Vec<u8>]) -> Led<()> {
        for session in sessions {
            let name = String::from_utf8_lossy(session);
            let (work, cancels) = (self.store.keys().work(&name), self.store.keys().cancels(&name));
            // A work list says of each id in which take it came.
            led!(self.members_of("work", session, "HSCAN", &work, 2));
            led!(self.members_of("cancels", session, "SSCAN", &cancels, 1));
        }
        Ok(Ok(()))
    }

    /// Looks at the users who have jobs that run in a pool, where there are many: those of others are looked at with their pool.
    async fn busy_in(&mut self, pools: &[Vec<u8>]) -> Led<()> {
        for page in pools.chunks(PAGE) {
            let counts = page.iter().map(|pool| async {
                let busy = self.store.keys().busy(&String::from_utf8_lossy(pool));
                match self.store.command("HLEN", &[busy.as_bytes()]).await {
                    Err(error) if error.is_wrong_type() => Ok((busy, 0)),
                    reply => Ok::<_, Error>((busy, reply?.int("HLEN")? as usize)),
                }
            });
            let counts = future::try_join_all(counts).await?;
            for (pool, (busy, count)) in page.iter().zip(counts) {
                if count > PAGE {
                    led!(self.members_of("busy", pool, "HSCAN", &busy, 2));
                }
            }
        }
        Ok(Ok(()))
    }

    /// Looks at all members of what somebody has, of a hash at every second text: a page of them each call.
    async fn members_of(
        &mut self,
        aspect: &'static str,
        owner: &[u8],
        command: &'static str,
        key: &str,
        every: usize,
    ) -> Led<()> {
        let mut cursor = Some(b"0".to_vec());
        while let Some(at) = cursor {
            let (next, found) = self.step(command, &[key.as_bytes(), &at, b"COUNT", SCAN_COUNT]).await?;
            let members: Vec<Vec<u8>> = found.into_iter().step_by(every).collect();
            for page in members.chunks(PAGE) {
                let items: Vec<Vec<u8>> = std::iter::once(owner.to_vec()).chain(page.iter().cloned()).collect();
                led!(self.compare(aspect, &items));
            }
            cursor = next;
        }
        Ok(Ok(()))
    }

    /// Looks at all members of a hash or sorted set.
    async fn walk(&mut self, aspect: &'static str, command: &'static str, key: &str) -> Led<()> {
        let mut cursor = Some(b"0".to_vec());
        while let Some(at) = cursor {
            let (next, found) = self.step(command, &[key.as_bytes(), &at, b"COUNT", SCAN_COUNT]).await?;
            let members: Vec<Vec<u8>> = found.into_iter().step_by(2).collect();
            led!(self.look(aspect, &members));
            cursor = next;
        }
        Ok(Ok(()))
    }

    /// One step of a scan, as [`Store::scan`] has it.
    async fn step(&self, command: &'static str, args: &[&[u8]]) -> Result<(Option<Vec<u8>>, Vec<Vec<u8>>), Error> {
        self.paced(self.store.scan(command, args)).await
    }

    fn paced<'b, T: Send + 'b>(&'b self, call: impl Future<Output = T> + Send + 'b) -> BoxFuture<'b, T> {
        Pace::keep(self.pace, call)
    }

    async fn set_members(&self, key: &str) -> Result<Vec<Vec<u8>>, Error> {
        let (mut members, mut cursor) = (Vec::new(), Some(b"0".to_vec()));
        while let Some(at) = cursor {
            let (next, found) = self.step("SSCAN", &[key.as_bytes(), &at, b"COUNT", SCAN_COUNT]).await?;
            members.extend(found);
            cursor = next;
        }
        Ok(members)
    }

    /// The users who have a queue that anybody pushes to, and those who have a list of work in progress.
    async fn open_keys(&self) -> Result<(BTreeSet<Vec<u8>>, BTreeSet<Vec<u8>>), Error> {
        let (queue, wip) = (self.store.keys().queue(""), self.store.keys().wip(""));
        let (mut queues, mut lists) = (BTreeSet::new(), BTreeSet::new());
        let mut cursor = Some(b"0".to_vec());
        while let Some(at) = cursor {
            // Both at once, for what takes long is to go through all keys.
            let (next, keys) = self.step("SCAN", &[&at, b"MATCH", b"batch:[qw]*", b"COUNT", KEYS_COUNT]).await?;
            for (stem, named) in [(&queue, &mut queues), (&wip, &mut lists)] {
                named.extend(keys.iter().filter_map(|key| Some(key.strip_prefix(stem.as_bytes())?.to_vec())));
            }
            cursor = next;
        }
        Ok((queues, lists))
    }

    /// Goes through a hash, a page at a time; nothing where the key is of another type. A field may come twice.
    async fn each_field(&self, key: &str, mut found: impl FnMut(Vec<u8>, Vec<u8>) + Send) -> Result<(), Error> {
        let mut cursor = Some(b"0".to_vec());
        while let Some(at) = cursor {
            let (next, pairs) = self.step("HSCAN", &[key.as_bytes(), &at, b"COUNT", SCAN_COUNT]).await?;
            let mut pairs = pairs.into_iter();
            while let (Some(name), Some(value)) = (pairs.next(), pairs.next()) {
                found(name, value);
            }
            cursor = next;
        }
        Ok(())
    }

    async fn fields(&self, key: &str) -> Result<HashMap<Vec<u8>, Vec<u8>>, Error> {
        let mut fields = HashMap::new();
        self.each_field(key, |name, value| _ = fields.insert(name, value)).await?;
        Ok(fields)
    }

    /// The pool and the user of each claim that names both.
    async fn claims(&self) -> Result<Vec<(Vec<u8>, Vec<u8>)>, Error> {
        let claims = self.fields(&self.store.keys().claims()).await?;
        let of = |text: Vec<u8>| {
            let mut parts = text.split(|byte| *byte == b'\t').skip(2).map(<[u8]>::to_vec);
            Some((parts.next()?, parts.next()?))
        };
        let named = claims.into_values().filter_map(of);
        Ok(named.filter(|(pool, user)| !pool.is_empty() && !user.is_empty()).collect())
    }

    /// Compares what is said of many entries with the entries. Between the looks at the one and at the other they change: only what differs
    /// each time by the same is added up at one instant, which takes as long as there are entries.
    async fn sums(&mut self, book: Book<'_>) -> Led<()> {
        let mut lasting = self.differences(book).await?;
        for _ in 1..LOOKS_AT_SUMS {
            if lasting.is_empty() {
                return Ok(Ok(()));
            }
            let again = self.differences(book).await?;
            lasting.retain(|sum, by| again.get(sum) == Some(by));
        }
        for aspect in ["counts", "active", "delays", "kept"] {
            let of: BTreeSet<Vec<u8>> =
                lasting.keys().filter(|sum| sum.aspect == aspect).map(|sum| sum.of.clone()).collect();
            led!(self.look(aspect, &of.into_iter().collect::<Vec<_>>()));
        }
        Ok(Ok(()))
    }

    /// By how much each sum that is told is more than its entries, but where it is not.
    async fn differences(&self, book: Book<'_>) -> Result<BTreeMap<Sum, i64>, Error> {
        let mut sums = Sums::default();
        match book {
            Book::Running(pools) => self.differences_of_running(pools, &mut sums).await?,
            Book::Delayed => {
                let keys = self.store.keys();
                self.each_field(&keys.delays(), |line, text| sums.said("delays", &line, b"", positive(&text))).await?;
                self.each_field(&keys.delayed(), |_, line| sums.has("delays", &line, b"", 1)).await?;
            }
            Book::Kept => {
                let (mut said, mut entries) = (None, 0);
                let add = |id: Vec<u8>, text: Vec<u8>| match &*id {
                    b"*" => said = Some(number(&text)),
                    _ => {
                        entries += 1;
                        sums.has("kept", b"", b"", number(&text).unwrap_or_default());
                    }
                };
                self.each_field(&self.store.keys().kept(), add).await?;
                // Of no entries nothing is told.
                said.into_iter().for_each(|said| sums.said("kept", b"", b"", said.filter(|_| entries > 0)));
            }
        }
        sums.0.retain(|_, by| *by != 0);
        Ok(sums.0)
    }

    async fn differences_of_running(&self, pools: &[Vec<u8>], sums: &mut Sums) -> Result<(), Error> {
        let keys = self.store.keys();
        self.each_field(&keys.active(), |user, text| sums.said("active", &user, b"", positive(&text))).await?;
        for page in pools.chunks(PAGE) {
            let said = page.iter().map(|pool| async move {
                let name = String::from_utf8_lossy(pool);
                let running = match self.store.command("HGET", &[keys.pool(&name).as_bytes(), b"running"]).await {
                    Err(error) if error.is_wrong_type() => None,
                    reply => reply?.into_bytes(),
                };
                Ok::<_, Error>((pool, running, self.fields(&keys.busy(&name)).await?))
            });
            for (pool, running, busy) in future::try_join_all(said).await? {
                running.iter().for_each(|text| sums.said("counts", pool, b"", number(text)));
                busy.iter().for_each(|(user, text)| sums.said("counts", pool, user, number(text)));
            }
        }
        let pools: HashSet<&[u8]> = pools.iter().map(Vec::as_slice).collect();
        for (pool, user) in self.claims().await? {
            sums.has("active", &user, b"", 1);
            if pools.contains(&*pool) {
                sums.has("counts", &pool, &user, 1);
                sums.has("counts", &pool, b"", 1);
            }
        }
        Ok(())
    }

    /// Compares our keys with the table of keys, and sorts out what the other looks need of them.
    async fn key_table(&mut self) -> Led<Ours> {
        let mut ours = Ours::default();
        let mut pools: BTreeSet<Vec<u8>> = self.claims().await?.into_iter().map(|(pool, _)| pool).collect();
        let mut services = BTreeSet::new();
        let prefix = self.store.keys().prefix();
        // Keys of another partition begin with its tag.
        let others = format!("{prefix}{{").into_bytes();
        let rows: Vec<(&str, Vec<u8>, bool, Holds)> = TABLE
            .iter()
            .filter(|row| row.template.contains("{tag}") && row.holds != Holds::Channel)
            .map(|row| {
                let text = row.template.replace("drayman:{tag}", &prefix);
                (row.name, text.trim_end_matches("{}").as_bytes().to_vec(), text.ends_with("{}"), row.holds)
            })
            .collect();
        let pattern = format!("{prefix}*");
        let mut cursor = Some(b"0".to_vec());
        while let Some(at) = cursor {
            // A page at a time: applications may track any number of jobs.
            let (next, keys) = self.step("SCAN", &[&at, b"MATCH", pattern.as_bytes(), b"COUNT", KEYS_COUNT]).await?;
            let (mut items, mut schedules, mut tracked) = (Vec::new(), Vec::new(), Vec::new());
            for key in keys.into_iter().filter(|key| !key.starts_with(&others)) {
                let row =
                    rows.iter().find(|(_, text, named, _)| if *named { key.starts_with(text) } else { key == *text });
                let wanted = row.map_or("", |(.., holds)| holds.type_name());
                if let Some((name, text, ..)) = row {
                    let named = key[text.len()..].to_vec();
                    match *name {
                        "session" | "work" | "cancels" => ours.sessions.push(named),
                        "pool" | "ready" | "debt" | "busy" => _ = pools.insert(named),
                        "parked" => _ = services.insert(named),
                        "tasks" | "high" | "low" => ours.lines.push(named),
                        "pools" => ours.classes.push(named),
                        "barred" => ours.barred.push(named),
                        "unique" => ours.uniques.push(named),
                        "schedule" => schedules.push(named),
                        "track" => tracked.push(named),
                        _ => {}
                    }
                }
                items.extend([key, wanted.as_bytes().to_vec()]);
            }
            led!(self.look("keys", &items));
            led!(self.look("schedules", &schedules));
            led!(self.look("tracked", &tracked));
            cursor = next;
        }
        // A scan may find a key twice.
        self.findings.sort_by(|a, b| a.what.cmp(&b.what));
        self.findings.dedup();
        ours.pools = pools.into_iter().collect();
        ours.services = services.into_iter().collect();
        Ok(Ok(ours))
    }

    /// Looks at the hashes of jobs that stand in no place. Ids are remembered by a hash of eight bytes whose key is another
    /// one in each round: a job that is mistaken for another one is seen in the next.
    async fn unplaced_jobs(&mut self) -> Led<()> {
        let hasher = RandomState::new();
        let mut placed: HashSet<u64> = HashSet::new();
        let inspect = Inspect::new(self.store.clone());
        let mut walk = inspect.walk(None, &[Place::AllQueues, Place::Schedule, Place::Claims, Place::Ended]);
        while let Some(ids) = walk.next().await? {
            placed.extend(ids.iter().map(|id| hasher.hash_one(id.as_str().as_bytes())));
        }
        let keys = self.store.keys().clone();
        let (pattern, prefix) = (keys.job("*"), keys.job("").len());
        let mut cursor = Some(b"0".to_vec());
        while let Some(at) = cursor {
            let args: [&[u8]; 7] = [&at, b"MATCH", pattern.as_bytes(), b"COUNT", KEYS_COUNT, b"TYPE", b"hash"];
            let (next, found) = self.step("SCAN", &args).await?;
            let ids: Vec<Vec<u8>> = found
                .into_iter()
                .map(|key| key[prefix..].to_vec())
                .filter(|id| !self.known_jobs.contains(id) && !placed.contains(&hasher.hash_one(id.as_slice())))
                .collect();
            led!(self.look("jobs", &ids));
            cursor = next;
        }
        Ok(Ok(()))
    }
}

/// Entries of which sums are told elsewhere.
#[derive(Debug, Clone, Copy)]
enum Book<'a> {
    /// Claims: how many there are in each of these pools, and of each user.
    Running(&'a [Vec<u8>]),
    /// Delayed jobs: how many each line has.
    Delayed,
    /// Ended jobs: how many bytes they have.
    Kept,
}

/// Something that is told of many entries.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Sum {
    /// What looks at it.
    aspect: &'static str,
    /// Which item of that.
    of: Vec<u8>,
    /// The user in a pool; empty for all.
    user: Vec<u8>,
}

/// By how much each is more than its entries.
#[derive(Debug, Default)]
struct Sums(BTreeMap<Sum, i64>);

impl Sums {
    /// What is no number differs, whatever there is.
    fn said(&mut self, aspect: &'static str, of: &[u8], user: &[u8], said: Option<i64>) {
        self.add(aspect, of, user, said.unwrap_or(i64::MIN));
    }

    fn has(&mut self, aspect: &'static str, of: &[u8], user: &[u8], has: i64) {
        self.add(aspect, of, user, has.saturating_neg());
    }

    fn add(&mut self, aspect: &'static str, of: &[u8], user: &[u8], by: i64) {
        let sum = self.0.entry(Sum { aspect, of: of.to_vec(), user: user.to_vec() }).or_default();
        *sum = sum.saturating_add(by);
    }
}

fn number(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Of that of which there is none, nothing is told.
fn positive(text: &[u8]) -> Option<i64> {
    number(text).filter(|number| *number > 0)
}

/// What the keys of ours name.
#[derive(Debug, Default)]
struct Ours {
    sessions: Vec<Vec<u8>>,
    pools: Vec<Vec<u8>>,
    services: Vec<Vec<u8>>,
    classes: Vec<Vec<u8>>,
    lines: Vec<Vec<u8>>,
    barred: Vec<Vec<u8>>,
    uniques: Vec<Vec<u8>>,
}
