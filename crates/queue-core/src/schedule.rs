//! Recurring jobs: what operators say about them, and the ticks that the leader makes.
//!
//! A tick is made in one function, which submits its job and moves the schedule on, if the schedule still stands where the caller
//! has read it. So any number of leaders make it once, and it does not matter where one of them is killed or how long the
//! record of the job is kept. When a tick comes is computed here; whether it has come is said by the server's clock.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, UNIX_EPOCH};

use crate::calls::{
    Enqueued, Fields, NotLeader, QueueLimits, SchedulePause, SchedulePut, ScheduleRead, ScheduleStep, ScheduleStepped,
    Submission,
};
use crate::config::Limits;
use crate::error::Error;
use crate::ids::{JobId, ScheduleName, User};
use crate::inspect::Inspect;
use crate::leader::{Leadership, Led};
use crate::model::cron::{Cron, CronError};
use crate::store::Store;

/// Most schedules in one round trip.
const PAGE: usize = 50;
/// Most jobs of one schedule that one pass submits.
pub const MADE_MAX: usize = 100;
/// Most ticks of one schedule that one pass counts as missed.
const MISSED_MAX: u64 = 10_000;
/// What the fields of the jobs are called in the hash of a schedule, before their own names.
const JOB_FIELD: &str = "job.";
/// Why a tick is missed that nobody has refused.
const NOT_MADE: &str = "it was paused, or no leader made it in time";

/// What becomes of ticks that could not be made when they were due: there was no leader, the schedule was paused, Redis was
/// away, or the job was refused. None is made when it is older than the schedule's grace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missed {
    /// Of several only the newest is made.
    Skip,
    /// All are made, the oldest first.
    CatchUp,
}

impl Missed {
    /// How old a tick may be and still be made, if nothing is said about it.
    pub fn default_grace(self) -> Duration {
        match self {
            Missed::Skip => Duration::from_secs(600),
            Missed::CatchUp => Duration::from_secs(24 * 3_600),
        }
    }
}

impl fmt::Display for Missed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Missed::Skip => "skip",
            Missed::CatchUp => "catch-up",
        })
    }
}

/// A text that is neither `skip` nor `catch-up`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("missed ticks can be treated by skip or catch-up, and by nothing else")]
pub struct NoMissed;

impl FromStr for Missed {
    type Err = NoMissed;
    fn from_str(text: &str) -> Result<Self, NoMissed> {
        [Missed::Skip, Missed::CatchUp].into_iter().find(|missed| missed.to_string() == text).ok_or(NoMissed)
    }
}

/// What is said about a recurring job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Definition {
    /// When it recurs.
    pub cron: Cron,
    /// What becomes of missed ticks.
    pub missed: Missed,
    /// How old a tick may be and still be made.
    pub grace: Duration,
    /// The owner of its jobs.
    pub user: User,
    /// What its jobs are, as they are submitted. Read back, its fields stand in the order of their names.
    pub job: Fields,
}

impl Definition {
    fn submission(&self, id: JobId) -> Submission {
        Submission { id, user: self.user.clone(), delay_ms: 0, run_at_ms: None, fields: self.job.clone() }
    }
}

/// Why a schedule was not defined.
#[derive(Debug, thiserror::Error)]
pub enum PutError {
    /// Its jobs would be too large to be submitted.
    #[error("its jobs would be too large: {bytes} bytes, at most {limit} are allowed")]
    TooLarge {
        /// Bytes of a job's fields.
        bytes: u64,
        /// Most bytes that are allowed.
        limit: u64,
    },
    /// It matches no time to come.
    #[error(transparent)]
    Never(CronError),
    /// Redis holds something that makes it impossible.
    #[error("{0}")]
    Refused(String),
    /// Redis failed. Defining it again does no harm.
    #[error(transparent)]
    Failed(#[from] Error),
}

/// What a definition did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// The schedule is new.
    Created,
    /// It was defined otherwise.
    Replaced,
    /// It was defined so; nothing was changed.
    Same,
}

/// A schedule as it stands.
#[derive(Debug, Clone)]
pub struct Schedule {
    /// Its name.
    pub name: ScheduleName,
    /// What is said about it, or why that can't be read.
    pub definition: Result<Definition, String>,
    /// The next tick, in ms since 1970. Where that is over, it has not been made yet.
    pub due_ms: Option<u64>,
    /// Somebody paused it.
    pub paused: bool,
    /// What the next tick waits for beside its time: why its job was refused.
    pub waiting: Option<String>,
    /// The latest tick that was made, in ms.
    pub last_tick_ms: Option<u64>,
    /// Its job.
    pub last_job: Option<String>,
    /// How many ticks were missed.
    pub misses: u64,
    /// The latest of them, in ms.
    pub last_missed_ms: Option<u64>,
    /// Why that one was missed.
    pub missed_because: Option<String>,
    /// Of the definition, and the due tick, as they are written.
    revision: Vec<u8>,
    due: Vec<u8>,
}

impl Schedule {
    fn of(name: ScheduleName, read: ScheduleRead) -> Option<Self> {
        let (mut pairs, unreadable) = match read {
            ScheduleRead::Missing => return None,
            ScheduleRead::Unreadable(why) => (Vec::new(), Some(why)),
            ScheduleRead::Found(pairs) => (pairs, None),
        };
        // A hash has no order.
        pairs.sort();
        let bytes = |field: &str| pairs.iter().find(|(name, _)| name == field.as_bytes()).map(|(_, value)| &value[..]);
        let text = |field| bytes(field).map(|value| String::from_utf8_lossy(value).into_owned());
        let number = |field| text(field)?.parse().ok();
        Some(Self {
            definition: unreadable.map_or_else(|| definition(&pairs), Err),
            due_ms: number("due"),
            paused: bytes("paused").is_some(),
            waiting: text("waiting"),
            last_tick_ms: number("last_tick"),
            last_job: text("last_job"),
            misses: number("misses").unwrap_or(0),
            last_missed_ms: number("last_missed"),
            missed_because: text("missed_because"),
            revision: bytes("revision").unwrap_or_default().to_vec(),
            due: bytes("due").unwrap_or_default().to_vec(),
            name,
        })
    }
}

fn definition(pairs: &[(Vec<u8>, Vec<u8>)]) -> Result<Definition, String> {
    let text = |field: &str| match pairs.iter().find(|(name, _)| name == field.as_bytes()) {
        Some((_, value)) => std::str::from_utf8(value).map_err(|_| format!("its field {field} is not valid UTF-8")),
        None => Err(format!("it has no field {field}")),
    };
    let mut job = Fields::new();
    for (name, value) in pairs {
        if let Some(field) = name.strip_prefix(JOB_FIELD.as_bytes()) {
            let field = std::str::from_utf8(field).map_err(|_| "the name of a field is not valid UTF-8")?;
            job = job.with(field.to_owned(), value);
        }
    }
    Ok(Definition {
        cron: Cron::parse(text("cron")?, text("zone")?).map_err(|error| error.to_string())?,
        missed: text("missed")?.parse().map_err(|error: NoMissed| error.to_string())?,
        grace: Duration::from_millis(text("grace")?.parse().map_err(|_| "its field grace is no number of ms")?),
        user: User::new(text("user")?).map_err(|error| error.to_string())?,
        job,
    })
}

/// What operators do with schedules.
#[derive(Debug, Clone)]
pub struct Schedules {
    store: Store,
}

impl Schedules {
    /// On a connection.
    pub fn new(store: Store) -> Self {
        Self { store }
    }

    /// Creates a schedule, or replaces its definition. Its first tick is the next one from now on; one whose expression and zone
    /// stay the same goes on where it stands, paused if it was.
    pub async fn put(&self, name: &ScheduleName, definition: &Definition, limits: &Limits) -> Result<Put, PutError> {
        let Definition { cron, missed, grace, user, job } = definition;
        let (bytes, limit) = (job.bytes() as u64, QueueLimits::from(limits).bytes_of(job));
        if bytes > limit {
            return Err(PutError::TooLarge { bytes, limit });
        }
        let fields = Fields::new()
            .with("cron", cron.expression())
            .with("zone", cron.zone())
            .with("missed", missed.to_string())
            .with("grace", grace.as_millis().to_string())
            .with("user", user.as_str());
        let fields = job.iter().fold(fields, |fields, (name, value)| fields.with(format!("{JOB_FIELD}{name}"), value));
        let first = cron.after(self.now_ms().await?);
        let first = first.ok_or_else(|| PutError::Never(CronError::Never(cron.expression().into())))?;
        let revision = uuid::Uuid::new_v4().simple().to_string();
        match self.store.schedule_put(name, &revision, first, &fields).await? {
            SchedulePut::Created => Ok(Put::Created),
            SchedulePut::Replaced => Ok(Put::Replaced),
            SchedulePut::Same => Ok(Put::Same),
            SchedulePut::Refused(why) => Err(PutError::Refused(why)),
        }
    }

    /// Removes a schedule; whether there was one. The jobs that it has made stay.
    pub async fn remove(&self, name: &ScheduleName) -> Result<bool, Error> {
        self.store.schedule_remove(name).await
    }

    /// Keeps a schedule from making ticks.
    pub async fn pause(&self, name: &ScheduleName) -> Result<SchedulePause, Error> {
        self.store.schedule_pause(name, true).await
    }

    /// Lets a schedule go on. The ticks of the pause are missed ones.
    pub async fn resume(&self, name: &ScheduleName) -> Result<SchedulePause, Error> {
        self.store.schedule_pause(name, false).await
    }

    /// One schedule.
    pub async fn get(&self, name: &ScheduleName) -> Result<Option<Schedule>, Error> {
        let read = self.store.schedule_read(&[name.as_str().into()]).await?;
        Ok(read.into_iter().next().and_then(|read| Schedule::of(name.clone(), read)))
    }

    /// All schedules, the one due next first, those that are paused last.
    pub async fn list(&self) -> Result<Vec<Schedule>, Error> {
        let key = self.store.keys().schedules();
        let names = self.store.command("ZRANGE", &[key.as_bytes(), b"0", b"-1"]).await?.array("ZRANGE")?;
        let names: Vec<Vec<u8>> = names.into_iter().filter_map(|name| name.into_bytes()).collect();
        let mut found = Vec::with_capacity(names.len());
        for page in names.chunks(PAGE) {
            found.extend(read(&self.store, page).await?);
        }
        Ok(found)
    }

    /// Submits one job of a schedule at once, beside its ticks and also while it is paused. `None` if there is no such
    /// schedule. The same id again changes nothing.
    pub async fn run_now(&self, name: &ScheduleName, id: JobId, limits: &Limits) -> Result<Option<Ran>, Error> {
        let definition = match self.get(name).await?.map(|schedule| schedule.definition) {
            None => return Ok(None),
            Some(Err(why)) => return Ok(Some(Ran::Refused(why))),
            Some(Ok(definition)) => definition,
        };
        let enqueued = self.store.enqueue(&limits.into(), &[definition.submission(id)]).await?.remove(0);
        Ok(Some(refusal(&enqueued).map_or(Ran::Queued, Ran::Refused)))
    }

    async fn now_ms(&self) -> Result<u64, Error> {
        Inspect::new(self.store.clone()).now_ms().await
    }
}

/// What became of a job that was asked for beside the ticks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ran {
    /// It is queued.
    Queued,
    /// It was refused: why.
    Refused(String),
}

/// A new id for a job beside the ticks.
pub fn id_beside_ticks(name: &ScheduleName) -> JobId {
    id_of(name, uuid::Uuid::now_v7())
}

fn id_of_tick(name: &ScheduleName, tick_ms: u64) -> JobId {
    id_of(name, humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_millis(tick_ms)))
}

fn id_of(name: &ScheduleName, which: impl fmt::Display) -> JobId {
    JobId::new(format!("{name}:{which}")).expect("short, and of characters that an id has")
}

async fn read(store: &Store, names: &[Vec<u8>]) -> Result<Vec<Schedule>, Error> {
    let read = store.schedule_read(names).await?;
    // What is no name was written by others, and is nobody's schedule.
    let name = |bytes: &Vec<u8>| ScheduleName::new(String::from_utf8(bytes.clone()).ok()?).ok();
    Ok(names.iter().zip(read).filter_map(|(bytes, read)| Schedule::of(name(bytes)?, read)).collect())
}

/// Why a job was refused, if it was.
fn refusal(enqueued: &Enqueued) -> Option<String> {
    match enqueued {
        Enqueued::Queued | Enqueued::Exists => None,
        Enqueued::Full(limit) => Some(format!("its user has {limit} jobs queued, as many as are allowed")),
        Enqueued::TooLarge { bytes, most } => {
            Some(format!("its job is too large: {bytes} bytes, at most {most} are allowed"))
        }
        Enqueued::NoRoom { used, mark } => {
            Some(format!("redis uses {used} bytes of memory, and accepts no new jobs above {mark}"))
        }
        Enqueued::Held(holder) => Some(format!("job {holder} holds its unique key")),
        Enqueued::Refused(why) => Some(why.clone()),
    }
}

/// What is to be done about a schedule whose tick is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    /// How many ticks are missed, and the latest of them.
    missed: u64,
    last_missed_ms: u64,
    /// The tick to make.
    tick_ms: Option<u64>,
    /// Where the schedule stands then.
    following_ms: Option<u64>,
}

impl Plan {
    fn new(definition: &Definition, due_ms: u64, now_ms: u64) -> Self {
        let oldest_ms = now_ms.saturating_sub(definition.grace.as_millis() as u64);
        let mut plan = Plan { missed: 0, last_missed_ms: 0, tick_ms: None, following_ms: Some(due_ms) };
        while let Some(tick_ms) = plan.following_ms.filter(|tick| *tick <= now_ms && plan.missed < MISSED_MAX) {
            plan.following_ms = definition.cron.after(tick_ms);
            let is_newest = plan.following_ms.is_none_or(|following| following > now_ms);
            if tick_ms >= oldest_ms && (is_newest || definition.missed == Missed::CatchUp) {
                plan.tick_ms = Some(tick_ms);
                break;
            }
            plan.missed += 1;
            plan.last_missed_ms = tick_ms;
        }
        plan
    }
}

/// What one pass over the schedules did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ticked {
    /// How many ticks were made.
    pub made: u64,
    /// How many ticks were missed, and why, by schedule.
    pub missed: Vec<(ScheduleName, u64, String)>,
    /// The schedules that wait now for something other than time, and for what.
    pub waiting: Vec<(ScheduleName, String)>,
    /// When the next tick is due.
    pub next_in: Option<Duration>,
    /// More ticks are due than one pass makes.
    pub more: bool,
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

/// One pass of the leader over the schedules whose tick is due.
pub async fn tick(leadership: &Leadership, limits: &Limits) -> Led<Ticked> {
    let mut pass = Pass { leadership, limits, now_ms: 0, next_ms: None, ticked: Ticked::default() };
    let mut left = 0;
    loop {
        let due = led!(leadership.store().schedule_due(leadership.session(), leadership.term(), left, PAGE));
        pass.now_ms = due.now_ms;
        pass.expects(due.next_ms);
        let schedules = read(leadership.store(), &due.names).await?;
        left += due.names.len() - schedules.len();
        for schedule in schedules {
            left += usize::from(!led!(pass.advance(schedule)));
        }
        if due.names.len() < PAGE {
            let next_in = pass.next_ms.map(|next| Duration::from_millis(next.saturating_sub(pass.now_ms)));
            return Ok(Ok(Ticked { next_in, ..pass.ticked }));
        }
    }
}

struct Pass<'a> {
    leadership: &'a Leadership,
    limits: &'a Limits,
    /// By the server's clock.
    now_ms: u64,
    next_ms: Option<u64>,
    ticked: Ticked,
}

impl Pass<'_> {
    fn expects(&mut self, tick_ms: Option<u64>) {
        self.next_ms = [self.next_ms, tick_ms].into_iter().flatten().filter(|tick| *tick > self.now_ms).min();
    }

    async fn step(&self, step: &ScheduleStep) -> Led<ScheduleStepped> {
        self.leadership
            .store()
            .schedule_step(self.leadership.session(), self.leadership.term(), &self.limits.into(), step)
            .await
    }

    /// Makes and passes ticks of a schedule. Says whether it stands behind now for sure: if not, the next page leaves it out.
    async fn advance(&mut self, mut schedule: Schedule) -> Led<bool> {
        for _ in 0..MADE_MAX {
            let (definition, due_ms) = match (&schedule.definition, schedule.due_ms) {
                (Ok(definition), Some(due_ms)) => (definition, due_ms),
                (Ok(_), None) => return self.waits(&schedule, None, "its next tick is no time".into()).await,
                (Err(why), _) => {
                    return self.waits(&schedule, None, format!("its definition can't be read: {why}")).await;
                }
            };
            let plan = Plan::new(definition, due_ms, self.now_ms);
            let because = schedule.waiting.clone().unwrap_or_else(|| NOT_MADE.into());
            let step = ScheduleStep {
                following_ms: plan.following_ms,
                missed: plan.missed,
                last_missed_ms: plan.last_missed_ms,
                because: because.clone(),
                tick: plan.tick_ms.map(|tick| (tick, definition.submission(id_of_tick(&schedule.name, tick)))),
                ..stay(&schedule)
            };
            let refused = match self.step(&step).await {
                Ok(Ok(ScheduleStepped::Changed)) => return Ok(Ok(false)),
                Ok(Ok(ScheduleStepped::Passed)) => None,
                Ok(Ok(ScheduleStepped::Tick(enqueued))) => refusal(&enqueued),
                Ok(Err(NotLeader)) => return Ok(Err(NotLeader)),
                Err(Error::Refused(text)) if text.starts_with("OOM") && step.tick.is_some() => {
                    Some("redis has no memory left for new jobs".into())
                }
                // Whatever is wrong with this one keeps no other waiting.
                Err(error) if !error.is_transient() && step.tick.is_some() => Some(error.to_string()),
                Err(error) => return Err(error),
            };
            if let Some(why) = refused {
                return self.waits(&schedule, Some(plan), why).await;
            }
            self.ticked.made += u64::from(plan.tick_ms.is_some());
            if plan.missed > 0 {
                self.ticked.missed.push((schedule.name.clone(), plan.missed, because));
            }
            let Some(following) = plan.following_ms.filter(|following| *following <= self.now_ms) else {
                self.expects(plan.following_ms);
                return Ok(Ok(true));
            };
            // As many are missed as one pass counts.
            if plan.tick_ms.is_none() {
                break;
            }
            (schedule.due_ms, schedule.due, schedule.waiting) = (Some(following), following.to_string().into(), None);
        }
        self.ticked.more = true;
        Ok(Ok(false))
    }

    /// Says with a schedule what its tick waits for. What is missed before that tick is missed for good.
    async fn waits(&mut self, schedule: &Schedule, plan: Option<Plan>, why: String) -> Led<bool> {
        let stands_ms = plan.map_or(schedule.due_ms, |plan| plan.tick_ms);
        let missed = plan.map_or(0, |plan| plan.missed);
        let news = schedule.waiting.as_ref() != Some(&why);
        if !news && missed == 0 {
            return Ok(Ok(false));
        }
        let because = schedule.waiting.clone().unwrap_or_else(|| NOT_MADE.into());
        let step = ScheduleStep {
            following_ms: stands_ms,
            missed,
            last_missed_ms: plan.map_or(0, |plan| plan.last_missed_ms),
            because: because.clone(),
            waiting: Some(why.clone()),
            ..stay(schedule)
        };
        if led!(self.step(&step)) == ScheduleStepped::Passed {
            if missed > 0 {
                self.ticked.missed.push((schedule.name.clone(), missed, because));
            }
            if news {
                self.ticked.waiting.push((schedule.name.clone(), why));
            }
        }
        Ok(Ok(false))
    }
}

/// A step that changes nothing.
fn stay(schedule: &Schedule) -> ScheduleStep {
    ScheduleStep {
        name: schedule.name.clone(),
        revision: schedule.revision.clone(),
        due: schedule.due.clone(),
        following_ms: schedule.due_ms,
        missed: 0,
        last_missed_ms: 0,
        because: String::new(),
        waiting: None,
        tick: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: u64 = 60_000;

    fn plan(missed: Missed, grace_min: u64, due_min: u64, now_ms: u64) -> (u64, u64, Option<u64>, Option<u64>) {
        let definition = Definition {
            cron: Cron::parse("*/10 * * * *", "UTC").unwrap(),
            missed,
            grace: Duration::from_secs(60 * grace_min),
            user: User::new("ana").unwrap(),
            job: Fields::new(),
        };
        let Plan { missed, last_missed_ms, tick_ms, following_ms } = Plan::new(&definition, due_min * MINUTE, now_ms);
        (missed, last_missed_ms / MINUTE, tick_ms.map(|ms| ms / MINUTE), following_ms.map(|ms| ms / MINUTE))
    }

    #[test]
    fn of_missed_ticks_the_newest_is_made_or_each_if_it_is_young_enough() {
        use Missed::{CatchUp, Skip};
        let now = 100 * MINUTE;
        for (missed, grace, due, now_ms, expected) in [
            (Skip, 5, 100, now, (0, 0, Some(100), Some(110))),
            (Skip, 5, 100, now + 5 * MINUTE, (0, 0, Some(100), Some(110))),
            (Skip, 5, 100, now + 5 * MINUTE + 1, (1, 100, None, Some(110))),
            (Skip, 60, 70, now + 1, (3, 90, Some(100), Some(110))),
            (Skip, 0, 70, now + 1, (4, 100, None, Some(110))),
            (CatchUp, 60, 70, now, (0, 0, Some(70), Some(80))),
            (CatchUp, 25, 70, now, (1, 70, Some(80), Some(90))),
            (CatchUp, 0, 70, now, (3, 90, Some(100), Some(110))),
            (CatchUp, 0, 70, now + 1, (4, 100, None, Some(110))),
            // Not due: where it stands it stays.
            (Skip, 5, 110, now, (0, 0, None, Some(110))),
        ] {
            assert_eq!(plan(missed, grace, due, now_ms), expected, "{missed} {grace} {due} {now_ms}");
        }
        let (missed, .., tick, following) = plan(Skip, 5, 0, 1_000_000 * MINUTE);
        assert_eq!((missed, tick, following), (MISSED_MAX, None, Some(10 * MISSED_MAX)), "a pass is bounded");
    }
}
