//! The calls of the library's functions: each with typed arguments and a typed reply.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::config::Limits;
use crate::error::Error;
use crate::ids::{Fence, IdError, JobId, Pool, ScheduleName, SessionId, User};
use crate::job::{FIELDS, Of, PAYLOAD_MAX};
use crate::library::{
    ADMIT, ADMIT_WHEN_FULL, CANCEL, COMPARE, FINISH, HOST_LOCK, INSPECT, LEADER_LEASE, MARK_READY, OLD_QUEUE,
    PROMOTE_AND_EXPIRE, PURGE_IDLE_POOLS, PURGE_STALE_JOBS, PURGE_WIP, READ_LIMITS, READ_QUEUES, RECONCILE, REFUSE,
    RETRY, SCHEDULE_DUE, SCHEDULE_PASS, SCHEDULE_PAUSE, SCHEDULE_PUT, SCHEDULE_READ, SCHEDULE_REMOVE, SCHEDULE_TICK,
    SESSION_BEAT, SESSION_END, SESSION_OPEN, SESSION_SERVE, SET_CAPACITIES, SET_LIMITS, SUBMIT, TAKE, UPDATE_CLAIMED,
};
use crate::reply::Reply;
use crate::store::Store;

mod batch;
mod flow;
mod tracker;

pub(crate) use batch::{Aborted, Load, Loaded, PackedBlock, Released};
pub(crate) use flow::{FlowAbandoned, FlowLaunch, FlowLaunched, FlowStep, FlowStopped};
pub(crate) use tracker::{TrackCreated, TrackEnded, TrackHold, TrackSet, TrackStarted, read_data};

/// When something was made.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Span {
    /// Within this time, by the clock of Redis.
    pub(crate) age: Option<Duration>,
    /// Then or later.
    pub(crate) since: Option<SystemTime>,
    /// Before.
    pub(crate) until: Option<SystemTime>,
}

/// How many jobs of an index are looked at in one round trip.
const NEWEST_PAGE: usize = 200;

/// How often a user of whom more is to be looked at than one call bears is looked at in a row.
const LOOKS_AT_USER: usize = 10;

/// How many jobs of a session that ends one call gives back.
const RETURNED_PAGE: usize = 50;

/// Arguments of a call, in order.
#[derive(Debug, Default)]
pub struct Args(Vec<Vec<u8>>);

impl Args {
    fn new() -> Self {
        Self::default()
    }

    fn text(mut self, text: impl AsRef<[u8]>) -> Self {
        self.0.push(text.as_ref().to_vec());
        self
    }

    fn number(self, number: impl Into<i128>) -> Self {
        self.text(number.into().to_string())
    }

    fn fields(self, fields: &Fields) -> Self {
        fields.iter().fold(self, |args, (name, value)| args.text(name).text(value))
    }

    fn counted_fields(self, fields: &Fields) -> Self {
        self.number(fields.0.len() as u64 * 2).fields(fields)
    }
}

/// Fields to write into a job's hash. `Debug` shows their names alone.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Fields(Vec<(Cow<'static, str>, Vec<u8>)>);

impl std::fmt::Debug for Fields {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

impl Fields {
    /// No fields.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a field.
    pub fn with(mut self, name: impl Into<Cow<'static, str>>, value: impl AsRef<[u8]>) -> Self {
        self.0.push((name.into(), value.as_ref().to_vec()));
        self
    }

    /// Adds a field if there is a value for it.
    pub fn with_some(self, name: &'static str, value: Option<impl AsRef<[u8]>>) -> Self {
        match value {
            Some(value) => self.with(name, value),
            None => self,
        }
    }

    /// These fields and then those: of two with one name the later counts.
    pub fn and(mut self, more: Fields) -> Self {
        self.0.extend(more.0);
        self
    }

    /// The value of a field.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.0.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_slice())
    }

    /// Names and values, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.0.iter().map(|(name, value)| (name.as_ref(), value.as_slice()))
    }

    /// Bytes of all values.
    pub fn bytes(&self) -> usize {
        self.0.iter().map(|(_, value)| value.len()).sum()
    }
}

/// A job to submit, as the function takes it.
#[derive(Debug, Clone)]
pub struct Submission {
    /// Its id.
    pub id: JobId,
    /// Its owner.
    pub user: User,
    /// How long it waits before it may be taken.
    pub delay_ms: u64,
    /// Not before this time, in ms since 1970 by the server's clock.
    pub run_at_ms: Option<u64>,
    /// Its other fields.
    pub fields: Fields,
}

/// How much may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueLimits {
    /// Most SQL jobs of one user.
    pub sql_jobs: u64,
    /// Most tasks of one user for one handler.
    pub tasks: u64,
    /// Most bytes of a SQL job's fields.
    pub sql_bytes: u64,
    /// Most bytes of a task's fields.
    pub task_bytes: u64,
}

impl From<&Limits> for QueueLimits {
    fn from(limits: &Limits) -> Self {
        Self {
            sql_jobs: limits.max_queued_per_user.get().into(),
            tasks: limits.max_queued_tasks.get().into(),
            sql_bytes: limits.max_payload_bytes.get(),
            task_bytes: limits.max_task_bytes.get(),
        }
    }
}

impl QueueLimits {
    /// Most bytes that the fields of this job may have.
    pub fn bytes_of(&self, fields: &Fields) -> u64 {
        let own = if fields.get("kind") == Some(b"task") { self.task_bytes } else { self.sql_bytes };
        own.min(PAYLOAD_MAX)
    }
}

/// What became of a submission.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Enqueued {
    /// It is queued.
    Queued,
    /// A job with this id exists; nothing was written.
    Exists,
    /// This other job holds its unique key.
    Held(String),
    /// The user has as many jobs queued as are allowed.
    Full(u64),
    /// The fields are larger than allowed.
    TooLarge {
        /// Bytes that they have.
        bytes: u64,
        /// Most bytes that are allowed.
        most: u64,
    },
    /// The server's memory is nearly full.
    NoRoom {
        /// Bytes that it uses.
        used: u64,
        /// Bytes above which nothing new is accepted.
        mark: u64,
    },
    /// The queue's key can't be used.
    Refused(String),
}

/// One job as a take hands it out. `Debug` shows no value of its fields.
#[derive(Clone)]
pub struct Taken {
    /// Its id.
    pub id: JobId,
    /// Its owner.
    pub user: User,
    /// The pool whose capacity it uses.
    pub pool: Pool,
    /// The fence of this claim.
    pub fence: Fence,
    /// The user's own statement timeout in ms, if one is set.
    pub user_timeout_ms: Option<u64>,
    values: Vec<Option<Vec<u8>>>,
}

impl std::fmt::Debug for Taken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { id, user, pool, fence, .. } = self;
        write!(f, "Taken({id} of {user} in {pool}, fence {fence})")
    }
}

impl Taken {
    /// The bytes of one of the [`FIELDS`] of its kind; `None` if it is absent.
    pub fn bytes(&self, field: &str) -> Option<&[u8]> {
        let place = fields_of(&self.pool).position(|name| name == field)?;
        self.values.get(place)?.as_deref()
    }

    /// The text of one of [`FIELDS`], `None` if it is absent or empty; the error names the field that is not UTF-8.
    pub fn text(&self, field: &'static str) -> Result<Option<&str>, String> {
        match self.bytes(field).filter(|bytes| !bytes.is_empty()) {
            None => Ok(None),
            Some(bytes) => match std::str::from_utf8(bytes) {
                Ok(text) => Ok(Some(text)),
                Err(_) => Err(format!("field {field} is not valid UTF-8")),
            },
        }
    }

    /// The number in one of [`FIELDS`]; 0 if it is absent or none.
    pub fn number(&self, field: &'static str) -> u64 {
        self.text(field).ok().flatten().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }
}

/// What a take returns.
#[derive(Debug)]
pub enum TakeReply {
    /// The session is not registered any more.
    Lost,
    /// Jobs, and when the next scheduled job of any pool is due.
    Taken {
        /// The jobs, now claimed.
        jobs: Vec<Taken>,
        /// Why others that are claimed now, too, can't be read.
        unreadable: Vec<String>,
        /// In ms from now.
        due_in_ms: Option<u64>,
    },
}

/// What a write under a claim returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// Written; the claim is held.
    Held,
    /// Written; the claim is held, and a cancel of the job is asked for.
    CancelAsked,
    /// Nothing was written: the claim is not ours any more.
    Stale,
}

/// How a claim ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The fields carry the job's final status; the record is kept this long.
    Final {
        /// In ms.
        keep_ms: u64,
    },
    /// More statements are to come: back to the front of its queue.
    Next,
    /// Given back untouched, to the front of its queue.
    Back,
    /// To be tried again.
    Later {
        /// In ms from now.
        after_ms: u64,
    },
    /// A part of a batch is done: the fields say what came of it.
    Part {
        /// How long the batch's record is kept, should it be over now, in ms.
        keep_ms: u64,
    },
}

/// The end of one claim.
#[derive(Debug, Clone)]
pub struct Finish {
    /// The job.
    pub id: JobId,
    /// The claim's fence.
    pub fence: Fence,
    /// How it ends.
    pub verdict: Verdict,
    /// How long the job ran, in µs.
    pub ran_us: u64,
    /// Fields to write.
    pub fields: Fields,
}

/// What became of a finish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finished {
    /// It is recorded.
    Ended,
    /// It had been recorded before: an earlier answer was lost.
    Repeated,
    /// The claim is not ours any more; nothing was written.
    Stale,
}

/// What a heartbeat returns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Beat {
    /// The session is not registered any more: all its claims are others' or nobody's.
    Lost,
    /// The session lives.
    Alive {
        /// Jobs of this session that are to be cancelled.
        cancels: Vec<String>,
        /// All claims of the session, where their number is not the believed one.
        claims: Vec<(String, Fence)>,
    },
}

/// A waiting job's cancel: what to write if its `query` field is still as seen.
#[derive(Debug, Clone)]
pub struct CancelOrder {
    /// The job.
    pub id: JobId,
    /// Its `query` field when the caller looked.
    pub seen_query: Vec<u8>,
    /// What to write if it still waits.
    pub fields: Fields,
}

/// What became of a cancel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CancelReply {
    /// It waited and is cancelled now.
    Cancelled,
    /// It runs, and its worker is told; or a lost worker has left a trace, and who takes it next is told.
    Requested,
    /// It had ended before, with this status.
    Over(String),
    /// It changed since the caller looked.
    Changed,
    /// There is no such job.
    Missing,
    /// Its hash can't be worked on.
    Unreadable,
}

/// A new run of a job, as the function takes it.
#[derive(Clone)]
pub struct RetryOrder {
    /// The job.
    pub id: JobId,
    /// Its `query` field when the caller looked.
    pub seen_query: Vec<u8>,
    /// For a connection that the job carries.
    pub password: Option<Vec<u8>>,
    /// What the run starts from.
    pub fields: Fields,
}

/// What became of a wish for a new run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RetryReply {
    /// It is queued.
    Queued,
    /// It has not ended: its status.
    NotOver(String),
    /// It changed since the caller looked.
    Changed,
    /// There is no such job.
    Missing,
    /// Its password was removed when it ended.
    NoPassword,
    /// It can't be queued.
    Refused(String),
}

/// One job as it is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Inspected {
    /// There is no hash of it.
    Missing,
    /// There is one.
    Found {
        /// Some session holds its claim: it runs.
        claimed: bool,
        /// The fields that were asked for, in order.
        values: Vec<Inspection>,
    },
}

impl Inspected {
    /// A field as text, by its name among those that were asked for; what is not UTF-8 in it becomes a replacement character.
    pub(crate) fn text(&self, fields: &[(&'static str, usize)], name: &str) -> Option<String> {
        let Inspected::Found { values, .. } = self else { return None };
        match values.get(fields.iter().position(|(field, _)| *field == name)?)? {
            Inspection::Bytes(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
            Inspection::Absent | Inspection::TooLarge(_) => None,
        }
    }
}

/// One field of a job as it is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Inspection {
    /// It is not there.
    Absent,
    /// Its bytes.
    Bytes(Vec<u8>),
    /// It is larger than was asked for, and was not read; how many bytes it has.
    TooLarge(u64),
}

/// Whether the maintenance is ours to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lead {
    /// We lead, in this term.
    Leader(u64),
    /// Another session leads.
    Follower(String),
    /// Nobody leads: we resigned.
    Nobody,
}

/// What a function of the leader says to one that does not lead (any more).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("another worker leads")]
pub struct NotLeader;

/// What limits a user or a pool, as the functions read it.
#[derive(Debug, Clone, PartialEq)]
pub struct Limited {
    /// Its weight; 1 if none is set.
    pub weight: Option<f64>,
    /// Most of its jobs that may run at once.
    pub concurrency: Option<u64>,
    /// Most starts in a period, and its length in ms.
    pub rate: Option<(u64, u64)>,
    /// A user's timeout in ms, or the most jobs of one user in a pool.
    pub own: Option<u64>,
    /// Since when and why it is paused.
    pub paused: Option<String>,
    /// Its jobs that run.
    pub running: u64,
    /// Its starts in the period that ends now.
    pub starts: u64,
    /// What keeps it from its turn: `paused`, `concurrency` or `rate`.
    pub kept_by: Option<String>,
    /// When its rate allows another start, in ms since 1970.
    pub kept_until_ms: Option<u64>,
    /// Fields that count for nothing, for they hold no number within their bounds.
    pub ignored: Vec<String>,
}

/// Where a line stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// The pool of its head; `None` if it has none that can run.
    pub pool: Option<String>,
    /// How many ids it has, in all bands.
    pub jobs: u64,
    /// When its head was submitted, as its hash says it.
    pub created_at: Option<String>,
}

/// What one pass over the waiting jobs did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Upkeep {
    /// Scheduled jobs that joined their queues.
    pub promoted: u64,
    /// Ids whose hash came late.
    pub found: u64,
    /// Ids whose hash never came.
    pub given_up: u64,
    /// Entries of the index of finished jobs that outlived the retention.
    pub trimmed: u64,
    /// Records that were removed because there were too many, or too large ones.
    pub evicted: u64,
    /// Nothing new is accepted until memory is freed.
    pub full: bool,
}

/// What may be kept, and how much memory there is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Budget {
    /// How long records of ended jobs are kept.
    pub retention_ms: u64,
    /// Most of these records; 0 for no limit.
    pub count: u64,
    /// Most bytes of them; 0 for no limit.
    pub bytes: u64,
    /// Bytes of memory that the server uses.
    pub used: u64,
    /// Bytes of memory above which nothing new is accepted; 0 for no limit.
    pub mark: u64,
    /// For how long that holds unless it is said again.
    pub mark_ms: u64,
}

impl Budget {
    /// Most records that one pass removes before their time. A pass that removed so many may have left some.
    pub const EVICTED_MAX: u64 = 1_000;
}

/// What became of the definition of a schedule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SchedulePut {
    /// It is new.
    Created,
    /// There was another definition.
    Replaced,
    /// It was defined so; nothing was changed.
    Same,
    /// Its key can't be used.
    Refused(String),
}

/// What became of a wish to pause a schedule or to let it go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SchedulePause {
    /// It does.
    Changed,
    /// It did before.
    Same,
    /// There is no such schedule.
    Missing,
}

/// A schedule as it is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ScheduleRead {
    /// There is none.
    Missing,
    /// It can't be read: why.
    Unreadable(String),
    /// Its fields and values in turn.
    Found(Vec<(Vec<u8>, Vec<u8>)>),
}

/// The schedules whose next tick is due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchedulesDue {
    /// The server's time, in ms since 1970.
    pub now_ms: u64,
    /// When the next tick of any other is due.
    pub next_ms: Option<u64>,
    /// Their names.
    pub names: Vec<Vec<u8>>,
}

/// One step of a schedule from the tick that is due.
#[derive(Debug, Clone)]
pub struct ScheduleStep {
    /// Its name.
    pub name: ScheduleName,
    /// The revision of its definition, as it was read.
    pub revision: Vec<u8>,
    /// The tick that is due, as it was read.
    pub due: Vec<u8>,
    /// The tick that follows, in ms; none after the last.
    pub following_ms: Option<u64>,
    /// How many ticks are missed.
    pub missed: u64,
    /// The latest of them, in ms.
    pub last_missed_ms: u64,
    /// Why.
    pub because: String,
    /// What the tick that follows waits for, beside its time.
    pub waiting: Option<String>,
    /// The tick that is made, in ms, with its job.
    pub tick: Option<(u64, Submission)>,
}

/// What became of a step of a schedule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ScheduleStepped {
    /// The schedule is not as it was read any more; nothing was written.
    Changed,
    /// It moved on without a job.
    Passed,
    /// What became of the job; the schedule moved on if it is queued, or was there.
    Tick(Enqueued),
}

/// How the leader's attempt to end a session went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionEnd {
    /// It is gone; this many jobs went back to their queues.
    Ended(u64),
    /// It beat again: nothing was done.
    Alive,
}

/// How many jobs of a pool may run at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capacity {
    /// So many.
    Of(u32),
    /// As many as whoever takes has for its default.
    Default,
    /// As was said before. The default may be another.
    AsBefore,
}

type Led<T> = Result<Result<T, NotLeader>, Error>;

fn id<T, E: Into<IdError>>(parsed: Result<T, E>, function: &'static str) -> Result<T, Error> {
    parsed.map_err(|error| Error::Reply { function, reply: error.into().to_string() })
}

impl Store {
    /// Submits jobs; one result each, in order.
    pub async fn enqueue(&self, most: &QueueLimits, jobs: &[Submission]) -> Result<Vec<Enqueued>, Error> {
        enqueued(self.call(&SUBMIT, enqueue_args(most, false, jobs)).await?, jobs.len())
    }

    /// The same, and waits until `replicas` have confirmed it, or for `patience`; returns how many have. Blocks this
    /// connection: see [`Store::aside`].
    pub async fn enqueue_confirmed(
        &self,
        most: &QueueLimits,
        jobs: &[Submission],
        replicas: u32,
        patience: Duration,
    ) -> Result<(Vec<Enqueued>, u32), Error> {
        let args = enqueue_args(most, true, jobs);
        let (reply, confirmed) = self.call_and_wait(&SUBMIT, args, replicas, patience).await?;
        Ok((enqueued(reply, jobs.len())?, confirmed))
    }

    /// Looks at the queues of users; returns how many of them became ready.
    pub async fn notice(&self, users: &[Vec<u8>]) -> Result<u64, Error> {
        self.look_at(&ADMIT, users).await
    }

    /// The same for the leader, also while memory is full.
    pub async fn look(&self, users: &[Vec<u8>]) -> Result<u64, Error> {
        self.look_at(&ADMIT_WHEN_FULL, users).await
    }

    async fn look_at(&self, function: &'static crate::library::Function, mut users: &[Vec<u8>]) -> Result<u64, Error> {
        let (mut ready, mut again) = (0, 0);
        while !users.is_empty() {
            let args = std::iter::once(Vec::new()).chain(users.iter().cloned()).collect();
            let reply = self.call(function, args).await?;
            if let Reply::Int(count) = reply {
                // An earlier library has looked at them all.
                return Ok(ready + count as u64);
            }
            let numbers = reply.array(function.name)?;
            expect_len(&numbers, 2, function.name)?;
            ready += numbers[0].int(function.name)? as u64;
            let looked_at = numbers[1].int(function.name)? as usize;
            again = if looked_at == 0 { again + 1 } else { 0 };
            // One who has pushed very much is looked at again the next time.
            let passed = if again == LOOKS_AT_USER { 1 } else { looked_at.min(users.len()) };
            if passed > 0 {
                again = 0;
            }
            users = &users[passed..];
        }
        Ok(ready)
    }

    /// Looks at lines of tasks; returns how many of their users became ready.
    pub async fn place(&self, lines: &[Vec<u8>]) -> Result<u64, Error> {
        Ok(self.call(&MARK_READY, lines.to_vec()).await?.int("mark_ready")? as u64)
    }

    /// Takes up to `n` jobs, of some pools no more than said. The same `number` again returns the same jobs.
    #[allow(clippy::too_many_arguments)] // those of the function
    pub async fn take(
        &self,
        session: &SessionId,
        service: &str,
        number: u64,
        n: usize,
        default_capacity: u32,
        fairness: &str,
        room: &[(Pool, usize)],
    ) -> Result<TakeReply, Error> {
        let args = Args::new()
            .text(session.as_str())
            .text(service)
            .number(number)
            .number(n as u64)
            .number(default_capacity)
            .text(fairness);
        let args = room.iter().fold(args, |args, (pool, most)| args.text(pool.as_str()).number(*most as u64));
        let mut items = self.call(&TAKE, args.0).await?.array("take")?.into_iter();
        match items.next().as_ref().and_then(Reply::text) {
            Some("lost") => return Ok(TakeReply::Lost),
            Some("taken") => {}
            _ => return Err(Reply::Array(items.collect()).unexpected("take")),
        }
        let due_in_ms =
            items.next().as_ref().and_then(Reply::text).and_then(|text| text.parse::<f64>().ok()).map(|ms| ms as u64);
        let (mut jobs, mut unreadable) = (Vec::new(), Vec::new());
        for item in items {
            match taken(item) {
                Ok(job) => jobs.push(job),
                Err(error) => unreadable.push(error.to_string()),
            }
        }
        Ok(TakeReply::Taken { jobs, unreadable, due_in_ms })
    }

    /// Sets aside what a take has claimed besides these jobs, since it can't be read here; how many that were.
    pub async fn refuse(&self, session: &SessionId, take: u64, reason: &str, read: &[Taken]) -> Result<u64, Error> {
        let args = Args::new().text(session.as_str()).number(take).text(reason);
        let args = read.iter().fold(args, |args, job| args.text(job.id.as_str()));
        Ok(self.call(&REFUSE, args.0).await?.int("refuse")? as u64)
    }

    /// Writes fields of a running job under its claim; with none, asks whether the claim holds.
    pub async fn mark(&self, session: &SessionId, id: &JobId, fence: Fence, fields: &Fields) -> Result<Mark, Error> {
        let args = Args::new().text(session.as_str()).text(id.as_str()).number(fence.0).fields(fields);
        let reply = self.call(&UPDATE_CLAIMED, args.0).await?;
        match reply.text() {
            Some("held") => Ok(Mark::Held),
            Some("cancel") => Ok(Mark::CancelAsked),
            Some("stale") => Ok(Mark::Stale),
            _ => Err(reply.unexpected("update_claimed")),
        }
    }

    /// Ends claims; one result each, in order. `wake` tells another session about what becomes free.
    pub async fn finish(&self, session: &SessionId, wake: bool, ends: &[Finish]) -> Result<Vec<Finished>, Error> {
        let mut args = Args::new().text(session.as_str()).number(u8::from(wake));
        for end in ends {
            let (verdict, ms) = match end.verdict {
                Verdict::Final { keep_ms } => ("final", keep_ms),
                Verdict::Next => ("next", 0),
                Verdict::Back => ("back", 0),
                Verdict::Later { after_ms } => ("later", after_ms),
                Verdict::Part { keep_ms } => ("part", keep_ms),
            };
            args = args
                .text(end.id.as_str())
                .number(end.fence.0)
                .text(verdict)
                .number(end.ran_us)
                .number(ms)
                .counted_fields(&end.fields);
        }
        let replies = self.call(&FINISH, args.0).await?.array("finish")?;
        expect_len(&replies, ends.len(), "finish")?;
        replies
            .iter()
            .map(|reply| match reply.text() {
                Some("ended") => Ok(Finished::Ended),
                Some("repeated") => Ok(Finished::Repeated),
                Some("stale") => Ok(Finished::Stale),
                _ => Err(reply.unexpected("finish")),
            })
            .collect()
    }

    /// Cancels jobs; one result each, in order.
    pub async fn cancel(&self, keep_ms: u64, orders: &[CancelOrder]) -> Result<Vec<CancelReply>, Error> {
        let mut args = Args::new().number(keep_ms);
        for order in orders {
            args = args.text(order.id.as_str()).text(&order.seen_query).counted_fields(&order.fields);
        }
        let replies = self.call(&CANCEL, args.0).await?.array("cancel")?;
        expect_len(&replies, orders.len(), "cancel")?;
        replies
            .iter()
            .map(|reply| match (reply, reply.text()) {
                (_, Some("cancelled")) => Ok(CancelReply::Cancelled),
                (_, Some("requested")) => Ok(CancelReply::Requested),
                (_, Some("changed")) => Ok(CancelReply::Changed),
                (_, Some("missing")) => Ok(CancelReply::Missing),
                (_, Some("unreadable")) => Ok(CancelReply::Unreadable),
                (Reply::Array(items), _) if items.first().and_then(Reply::text) == Some("over") => {
                    Ok(CancelReply::Over(items.get(1).and_then(Reply::lossy).unwrap_or_default()))
                }
                _ => Err(reply.unexpected("cancel")),
            })
            .collect()
    }

    /// Starts new runs; one result each, in order.
    pub async fn retry(&self, orders: &[RetryOrder]) -> Result<Vec<RetryReply>, Error> {
        let args = orders.iter().fold(Args::new(), |args, order| {
            args.text(order.id.as_str())
                .text(&order.seen_query)
                .text(order.password.as_ref().map(|pass| [b"=", &pass[..]].concat()).unwrap_or_default())
                .counted_fields(&order.fields)
        });
        let replies = self.call(&RETRY, args.0).await?.array("retry")?;
        expect_len(&replies, orders.len(), "retry")?;
        let detail = |items: &[Reply]| items.get(1).and_then(Reply::lossy).unwrap_or_default();
        replies
            .iter()
            .map(|reply| match (reply, reply.text()) {
                (_, Some("queued")) => Ok(RetryReply::Queued),
                (_, Some("changed")) => Ok(RetryReply::Changed),
                (_, Some("missing")) => Ok(RetryReply::Missing),
                (_, Some("no_password")) => Ok(RetryReply::NoPassword),
                (Reply::Array(items), _) => match items.first().and_then(Reply::text) {
                    Some("not_over") => Ok(RetryReply::NotOver(detail(items))),
                    Some("refused") => Ok(RetryReply::Refused(detail(items))),
                    _ => Err(reply.unexpected("retry")),
                },
                _ => Err(reply.unexpected("retry")),
            })
            .collect()
    }

    /// Reads fields of jobs, none of them larger than said; one result each, in order.
    pub async fn inspect<'a>(
        &self,
        fields: &[(&'static str, usize)],
        ids: impl IntoIterator<Item = &'a str>,
    ) -> Result<Vec<Inspected>, Error> {
        let mut args = Args::new().number(fields.len() as u64);
        for (name, most) in fields {
            args = args.text(name).number(*most as u64);
        }
        let before = args.0.len();
        args = ids.into_iter().fold(args, |args, id| args.text(id));
        let count = args.0.len() - before;
        let replies = self.call(&INSPECT, args.0).await?.array("inspect")?;
        expect_len(&replies, count, "inspect")?;
        replies.into_iter().map(|reply| inspected(reply, fields.len())).collect()
    }

    /// What a view makes of the jobs in an index by the time when they were made: the latest first, of those made within a span, at most so
    /// many.
    pub(crate) async fn newest<V>(
        &self,
        index: &str,
        span: Span,
        most: usize,
        fields: &[(&'static str, usize)],
        view: impl Fn(&str, &Inspected) -> Option<V>,
    ) -> Result<Vec<V>, Error> {
        const COMMAND: &str = "ZREVRANGEBYSCORE";
        let ms = |at: SystemTime| at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let youngest = match span.age {
            Some(age) => u128::from(self.now_ms().await?).saturating_sub(age.as_millis()),
            None => 0,
        };
        let since = span.since.map_or(0, ms).max(youngest).to_string();
        // The moment itself is behind it.
        let until = span.until.map_or("+inf".to_owned(), |until| format!("({}", ms(until)));
        let page = NEWEST_PAGE.to_string();
        let (mut found, mut from) = (Vec::new(), 0);
        while found.len() < most {
            let offset = from.to_string();
            let range: [&[u8]; 6] =
                [index.as_bytes(), until.as_bytes(), since.as_bytes(), b"LIMIT", offset.as_bytes(), page.as_bytes()];
            let ids = self.command(COMMAND, &range).await?.texts(COMMAND)?;
            let views = self.inspect(fields, ids.iter().map(String::as_str)).await?;
            found.extend(ids.iter().zip(&views).filter_map(|(id, found)| view(id, found)));
            if ids.len() < NEWEST_PAGE {
                break;
            }
            from += NEWEST_PAGE;
        }
        found.truncate(most);
        Ok(found)
    }

    /// The server's clock, in ms since 1970.
    pub(crate) async fn now_ms(&self) -> Result<u64, Error> {
        let items = self.command("TIME", &[]).await?.array("TIME")?;
        let part = |at: usize| items.get(at).map_or(Ok(0), |item| item.int("TIME"));
        Ok((part(0)? * 1_000 + part(1)? / 1_000) as u64)
    }

    /// Registers a session.
    pub async fn session_open(
        &self,
        session: &SessionId,
        service: &str,
        host: &str,
        pid: u32,
        capacities: &[(Pool, u32)],
    ) -> Result<(), Error> {
        let mut args = Args::new()
            .text(session.as_str())
            .text(service)
            .text(host)
            .number(pid)
            .number(crate::VERSION_MAJOR)
            .number(crate::VERSION_MINOR);
        for (pool, capacity) in capacities {
            args = args.text(pool.as_str()).number(*capacity);
        }
        let reply = self.call(&SESSION_OPEN, args.0).await?;
        match reply.text() {
            Some("open") => Ok(()),
            Some(version) => Err(Error::Version {
                found: version.to_owned(),
                ours: format!("{}.{}", crate::VERSION_MAJOR, crate::VERSION_MINOR),
            }),
            None => Err(reply.unexpected("session_open")),
        }
    }

    /// Has a session serve other pools from now on; false if it is not registered any more.
    pub async fn session_serve(&self, session: &SessionId, service: &str) -> Result<bool, Error> {
        let args = Args::new().text(session.as_str()).text(service);
        let reply = self.call(&SESSION_SERVE, args.0).await?;
        match reply.text() {
            Some("serving") => Ok(true),
            Some("lost") => Ok(false),
            _ => Err(reply.unexpected("session_serve")),
        }
    }

    /// Gives pools other capacities; what was full is looked at anew.
    pub async fn set_capacities(&self, pools: &[(Vec<u8>, Capacity)]) -> Result<(), Error> {
        let args = pools.iter().fold(Args::new(), |args, (pool, capacity)| {
            let capacity = match capacity {
                Capacity::Of(number) => number.to_string(),
                Capacity::Default => String::new(),
                Capacity::AsBefore => "=".into(),
            };
            args.text(pool).text(capacity)
        });
        self.call(&SET_CAPACITIES, args.0).await.map(drop)
    }

    /// One heartbeat. `held` is how many claims the worker believes it holds.
    pub async fn session_beat(&self, session: &SessionId, held: usize) -> Result<Beat, Error> {
        let args = Args::new().text(session.as_str()).number(held as u64);
        let mut items = self.call(&SESSION_BEAT, args.0).await?.array("session_beat")?.into_iter();
        match items.next().as_ref().and_then(Reply::text) {
            Some("lost") => Ok(Beat::Lost),
            Some("alive") => {
                let cancels = items.next().unwrap_or(Reply::Nil).texts("session_beat")?;
                let flat = items.next().unwrap_or(Reply::Nil).texts("session_beat")?;
                let claims = flat
                    .chunks_exact(2)
                    .filter_map(|pair| Some((pair[0].clone(), Fence(pair[1].parse().ok()?))))
                    .collect();
                Ok(Beat::Alive { cancels, claims })
            }
            _ => Err(Reply::Array(items.collect()).unexpected("session_beat")),
        }
    }

    /// The worker's own end of its session: what it still holds goes back to the queues. Returns how many jobs that are.
    pub async fn session_close(&self, session: &SessionId) -> Result<u64, Error> {
        let end = || Args::new().text("close").text(session.as_str());
        match self.session_end(session.as_str(), end).await? {
            Ok(SessionEnd::Ended(returned)) => Ok(returned),
            other => Err(Error::Reply { function: "session_end", reply: format!("{other:?}") }),
        }
    }

    /// The leader's end of a session whose beat stood still.
    pub async fn session_reclaim(&self, session: &str, beat: u64, leader: &SessionId, term: u64) -> Led<SessionEnd> {
        let end = || Args::new().text("reclaim").text(session).number(beat).text(leader.as_str()).number(term);
        self.session_end(session, end).await
    }

    /// A call that holds nobody up gives few jobs back: the first one none, but nothing is taken behind it.
    async fn session_end(&self, session: &str, end: impl Fn() -> Args + Send + Sync) -> Led<SessionEnd> {
        let mut pages: Option<VecDeque<Vec<Vec<u8>>>> = None;
        let mut returned = 0;
        loop {
            let page = pages.as_mut().and_then(VecDeque::pop_front).unwrap_or_default();
            let reply = self.call(&SESSION_END, page.into_iter().fold(end().text(""), Args::text).0).await?;
            match reply.text() {
                Some("not_leader") => return Ok(Err(NotLeader)),
                Some("alive") => return Ok(Ok(SessionEnd::Alive)),
                _ => {}
            }
            let unexpected = reply.unexpected("session_end");
            let items = reply.array("session_end")?;
            expect_len(&items, 2, "session_end")?;
            returned += items[1].int("session_end")? as u64;
            if items[0].text() != Some("more") {
                return Ok(Ok(SessionEnd::Ended(returned)));
            }
            match &pages {
                None => {
                    let held = self.held_by(session).await?;
                    pages = Some(held.chunks(RETURNED_PAGE).map(<[_]>::to_vec).collect());
                }
                Some(pages) if pages.is_empty() => return Err(unexpected),
                Some(_) => {}
            }
        }
    }

    /// The ids in a session's work list, the one taken last first.
    async fn held_by(&self, session: &str) -> Result<Vec<Vec<u8>>, Error> {
        let (work, claims) = (self.keys().work(session), self.keys().claims());
        let (mut held, mut cursor) = (Vec::new(), Some(b"0".to_vec()));
        while let Some(at) = cursor {
            let (next, found) = self.scan("HSCAN", &[work.as_bytes(), &at, b"COUNT", b"200"]).await?;
            let ids: Vec<Vec<u8>> = found.into_iter().step_by(2).collect();
            if !ids.is_empty() {
                let asked: Vec<&[u8]> =
                    std::iter::once(claims.as_bytes()).chain(ids.iter().map(Vec::as_slice)).collect();
                let texts = self.command("HMGET", &asked).await?.array("HMGET")?;
                let fences = texts.into_iter().map(|text| {
                    let text = text.lossy().unwrap_or_default();
                    text.split('\t').nth(1).and_then(|fence| fence.parse::<u64>().ok()).unwrap_or_default()
                });
                held.extend(fences.zip(ids));
            }
            cursor = next;
        }
        held.sort_unstable_by(|a, b| b.cmp(a));
        held.dedup();
        Ok(held.into_iter().map(|(_, id)| id).collect())
    }

    /// Takes, renews or (with no TTL) gives up the leadership.
    pub async fn lead(&self, session: &SessionId, ttl_ms: Option<u64>) -> Result<Lead, Error> {
        let wish = if ttl_ms.is_some() { "hold" } else { "resign" };
        let args = Args::new().text(session.as_str()).number(ttl_ms.unwrap_or(0)).text(wish);
        let items = self.call(&LEADER_LEASE, args.0).await?.array("leader_lease")?;
        match (items.first().and_then(Reply::text), items.get(1)) {
            (Some("leader"), Some(term)) => Ok(Lead::Leader(term.int("leader_lease")? as u64)),
            (Some("follower"), Some(holder)) => Ok(Lead::Follower(holder.lossy().unwrap_or_default())),
            (Some("none"), _) => Ok(Lead::Nobody),
            _ => Err(Reply::Array(items).unexpected("leader_lease")),
        }
    }

    /// One pass over scheduled jobs, ids without a hash, and the index of finished jobs.
    pub async fn upkeep(&self, leader: &SessionId, term: u64, retention_ms: u64) -> Led<Upkeep> {
        self.upkeep_within(leader, term, &Budget { retention_ms, ..Budget::default() }).await
    }

    /// The same, and the oldest records go where there are more than may be kept.
    pub async fn upkeep_within(&self, leader: &SessionId, term: u64, budget: &Budget) -> Led<Upkeep> {
        let Budget { retention_ms, count, bytes, used, mark, mark_ms } = *budget;
        let args = Args::new()
            .text(leader.as_str())
            .number(term)
            .number(retention_ms)
            .number(count)
            .number(bytes)
            .number(used)
            .number(mark)
            .number(mark_ms.max(1));
        let reply = self.call(&PROMOTE_AND_EXPIRE, args.0).await?;
        if reply.text() == Some("not_leader") {
            return Ok(Err(NotLeader));
        }
        let items = reply.array("promote_and_expire")?;
        expect_len(&items, 7, "promote_and_expire")?;
        let count = |at: usize| items[at].int("promote_and_expire").map(|number| number as u64);
        Ok(Ok(Upkeep {
            promoted: count(1)?,
            found: count(2)?,
            given_up: count(3)?,
            trimmed: count(4)?,
            evicted: count(5)?,
            full: count(6)? == 1,
        }))
    }

    /// Holds the foreign layout's locks of hosts; returns the hosts that a foreign worker schedules.
    pub async fn host_lock(&self, leader: &SessionId, term: u64, ttl_ms: u64, hosts: &[String]) -> Led<Vec<String>> {
        let args = Args::new().text(leader.as_str()).number(term).number(ttl_ms);
        let args = hosts.iter().fold(args, |args, host| args.text(host));
        led(self.call(&HOST_LOCK, args.0).await?, |reply| reply.texts("host_lock"))
    }

    /// Moves jobs from an old-layout queue; returns how many, and whether more are left.
    pub async fn old_queue(&self, leader: &SessionId, term: u64, host: &[u8]) -> Led<(u64, bool)> {
        let args = Args::new().text(leader.as_str()).number(term).text(host);
        led(self.call(&OLD_QUEUE, args.0).await?, |reply| {
            let items = reply.array("old_queue")?;
            expect_len(&items, 2, "old_queue")?;
            Ok((items[1].int("old_queue")? as u64, items[0].text() == Some("more")))
        })
    }

    /// Removes hashes untouched for so many ms that are final or referenced by nothing.
    pub async fn sweep(&self, leader: &SessionId, term: u64, untouched_ms: u64, ids: &[Vec<u8>]) -> Led<u64> {
        let args = Args::new().text(leader.as_str()).number(term).number(untouched_ms);
        let args = ids.iter().fold(args, |args, id| args.text(id));
        led(self.call(&PURGE_STALE_JOBS, args.0).await?, |reply| Ok(reply.int("purge_stale_jobs")? as u64))
    }

    /// Forgets pools that have been idle for so many ms.
    pub async fn pool_sweep(&self, leader: &SessionId, term: u64, idle_ms: u64, pools: &[Vec<u8>]) -> Led<u64> {
        let args = Args::new().text(leader.as_str()).number(term).number(idle_ms);
        let args = pools.iter().fold(args, |args, pool| args.text(pool));
        led(self.call(&PURGE_IDLE_POOLS, args.0).await?, |reply| Ok(reply.int("purge_idle_pools")? as u64))
    }

    /// Changes what limits a user or a pool, or what pauses: `kind` is `user`, `pool` or `all`. The text says why it is refused.
    pub async fn change_limits(
        &self,
        kind: &'static str,
        name: &str,
        fields: &[(&'static str, Option<String>)],
    ) -> Result<Result<(), String>, Error> {
        let args = fields.iter().fold(Args::new().text(kind).text(name), |args, (field, value)| {
            args.text(field).text(value.as_deref().unwrap_or_default())
        });
        match self.call(&SET_LIMITS, args.0).await? {
            reply if reply.text() == Some("changed") => Ok(Ok(())),
            Reply::Array(items) if items.first().and_then(Reply::text) == Some("refused") => {
                Ok(Err(items.get(1).and_then(Reply::lossy).unwrap_or_default()))
            }
            reply => Err(reply.unexpected("set_limits")),
        }
    }

    /// Tells what limits users or pools (`kind` says which); one answer each, in order.
    pub async fn limited(&self, kind: &'static str, names: &[Vec<u8>]) -> Result<Vec<Limited>, Error> {
        let args = names.iter().fold(Args::new().text(kind), |args, name| args.text(name));
        let replies = self.call(&READ_LIMITS, args.0).await?.array("read_limits")?;
        expect_len(&replies, names.len(), "read_limits")?;
        replies.into_iter().map(limited).collect()
    }

    /// Tells where lines stand; one answer each, in order.
    pub async fn lines(&self, lines: &[Vec<u8>]) -> Result<Vec<Line>, Error> {
        let replies = self.call(&READ_QUEUES, lines.to_vec()).await?.array("read_queues")?;
        expect_len(&replies, lines.len(), "read_queues")?;
        replies
            .into_iter()
            .map(|reply| {
                let items = reply.array("read_queues")?;
                expect_len(&items, 3, "read_queues")?;
                let jobs = items[1].int("read_queues")? as u64;
                Ok(Line { pool: items[0].lossy(), jobs, created_at: items[2].lossy() })
            })
            .collect()
    }

    /// Compares keys that must agree, and repairs if told to. `leader` is who leads, with its term, where a leader does it.
    pub async fn reconcile(
        &self,
        repair: bool,
        leader: Option<(&SessionId, u64)>,
        retention_ms: u64,
        aspect: &'static str,
        items: &[Vec<u8>],
    ) -> Led<Vec<Reply>> {
        let args = Args::new().text(if repair { "repair" } else { "check" });
        let args = match leader {
            Some((session, term)) => args.text(session.as_str()).number(term),
            None => args.text("").text(""),
        };
        let args = items.iter().fold(args.number(retention_ms).text(aspect), |args, item| args.text(item));
        let reply = if repair { self.call(&RECONCILE, args.0).await? } else { self.call(&COMPARE, args.0).await? };
        led(reply, |reply| reply.array("reconcile"))
    }

    /// Defines a schedule, with its first tick if it has none yet.
    pub async fn schedule_put(
        &self,
        name: &ScheduleName,
        revision: &str,
        first_ms: u64,
        definition: &Fields,
    ) -> Result<SchedulePut, Error> {
        let args = Args::new().text(name.as_str()).text(revision).number(first_ms).counted_fields(definition);
        let reply = self.call(&SCHEDULE_PUT, args.0).await?;
        match (&reply, reply.text()) {
            (_, Some("created")) => Ok(SchedulePut::Created),
            (_, Some("replaced")) => Ok(SchedulePut::Replaced),
            (_, Some("same")) => Ok(SchedulePut::Same),
            (Reply::Array(items), _) if items.first().and_then(Reply::text) == Some("refused") => {
                Ok(SchedulePut::Refused(items.get(1).and_then(Reply::lossy).unwrap_or_default()))
            }
            _ => Err(reply.unexpected("schedule_put")),
        }
    }

    /// Pauses a schedule, or lets it go on.
    pub async fn schedule_pause(&self, name: &ScheduleName, pause: bool) -> Result<SchedulePause, Error> {
        let args = Args::new().text(name.as_str()).text(if pause { "pause" } else { "resume" });
        let reply = self.call(&SCHEDULE_PAUSE, args.0).await?;
        match reply.text() {
            Some("changed") => Ok(SchedulePause::Changed),
            Some("same") => Ok(SchedulePause::Same),
            Some("missing") => Ok(SchedulePause::Missing),
            _ => Err(reply.unexpected("schedule_pause")),
        }
    }

    /// Removes a schedule; whether there was one.
    pub async fn schedule_remove(&self, name: &ScheduleName) -> Result<bool, Error> {
        let reply = self.call(&SCHEDULE_REMOVE, Args::new().text(name.as_str()).0).await?;
        match reply.text() {
            Some("removed") => Ok(true),
            Some("missing") => Ok(false),
            _ => Err(reply.unexpected("schedule_remove")),
        }
    }

    /// Reads schedules; one result each, in order.
    pub async fn schedule_read(&self, names: &[Vec<u8>]) -> Result<Vec<ScheduleRead>, Error> {
        let replies = self.call(&SCHEDULE_READ, names.to_vec()).await?.array("schedule_read")?;
        expect_len(&replies, names.len(), "schedule_read")?;
        replies
            .into_iter()
            .map(|reply| match (reply.text(), &reply) {
                (Some("missing"), _) => Ok(ScheduleRead::Missing),
                (_, Reply::Array(items)) => match items.first().and_then(Reply::text) {
                    Some("unreadable") => {
                        Ok(ScheduleRead::Unreadable(items.get(1).and_then(Reply::lossy).unwrap_or_default()))
                    }
                    Some("schedule") => {
                        let bytes = |item: &Reply| item.clone().into_bytes().unwrap_or_default();
                        let pairs = items[1..].chunks_exact(2).map(|pair| (bytes(&pair[0]), bytes(&pair[1])));
                        Ok(ScheduleRead::Found(pairs.collect()))
                    }
                    _ => Err(reply.unexpected("schedule_read")),
                },
                _ => Err(reply.unexpected("schedule_read")),
            })
            .collect()
    }

    /// Finds the schedules whose next tick is due, after those left out.
    pub async fn schedule_due(&self, leader: &SessionId, term: u64, left_out: usize, most: usize) -> Led<SchedulesDue> {
        let args = Args::new().text(leader.as_str()).number(term).number(left_out as u64).number(most as u64);
        led(self.call(&SCHEDULE_DUE, args.0).await?, |reply| {
            let mut items = reply.array("schedule_due")?;
            if items.len() < 2 {
                return Err(Reply::Array(items).unexpected("schedule_due"));
            }
            let names = items.split_off(2).into_iter().filter_map(Reply::into_bytes).collect();
            let next_ms = items[1].text().and_then(|text| text.parse::<f64>().ok()).map(|ms| ms as u64);
            Ok(SchedulesDue { now_ms: items[0].int("schedule_due")? as u64, next_ms, names })
        })
    }

    /// Moves a schedule on, if it is still as it was read.
    pub async fn schedule_step(
        &self,
        leader: &SessionId,
        term: u64,
        most: &QueueLimits,
        step: &ScheduleStep,
    ) -> Led<ScheduleStepped> {
        let args = Args::new()
            .text(leader.as_str())
            .number(term)
            .text(step.name.as_str())
            .text(&step.revision)
            .text(&step.due)
            .text(step.following_ms.map(|ms| ms.to_string()).unwrap_or_default())
            .number(step.missed)
            .number(step.last_missed_ms)
            .text(&step.because)
            .text(step.waiting.as_deref().unwrap_or_default());
        let (function, args) = match &step.tick {
            Some((tick_ms, job)) => {
                let job = std::slice::from_ref(job);
                let args = args.number(*tick_ms).text(job[0].id.as_str()).0;
                (&SCHEDULE_TICK, [args, enqueue_args(most, false, job)].concat())
            }
            None => (&SCHEDULE_PASS, args.text("").text("").0),
        };
        led(self.call(function, args).await?, |reply| match reply.text() {
            Some("changed") => Ok(ScheduleStepped::Changed),
            Some("passed") => Ok(ScheduleStepped::Passed),
            _ => Ok(ScheduleStepped::Tick(enqueued(Reply::Array(vec![reply]), 1)?.remove(0))),
        })
    }

    /// Clears a user's work-in-progress list of what is not being worked on.
    pub async fn wip(&self, leader: &SessionId, term: u64, user: &[u8]) -> Led<u64> {
        let args = Args::new().text(leader.as_str()).number(term).text(user);
        led(self.call(&PURGE_WIP, args.0).await?, |reply| Ok(reply.int("purge_wip")? as u64))
    }
}

fn enqueue_args(most: &QueueLimits, confirm: bool, jobs: &[Submission]) -> Vec<Vec<u8>> {
    let QueueLimits { sql_jobs, tasks, sql_bytes, task_bytes } = *most;
    let mut args = Args::new().number(sql_jobs).number(tasks).number(sql_bytes).number(task_bytes);
    args = args.number(u8::from(confirm));
    for job in jobs {
        args = args.text(job.id.as_str()).text(job.user.as_str()).number(job.delay_ms);
        args = args.number(job.run_at_ms.unwrap_or(0)).counted_fields(&job.fields);
    }
    args.0
}

fn enqueued(reply: Reply, jobs: usize) -> Result<Vec<Enqueued>, Error> {
    let replies = reply.array("submit")?;
    expect_len(&replies, jobs, "submit")?;
    replies
        .into_iter()
        .map(|reply| match &reply {
            Reply::Bytes(word) if word == b"queued" => Ok(Enqueued::Queued),
            Reply::Bytes(word) if word == b"exists" => Ok(Enqueued::Exists),
            Reply::Array(items) => match (items.first().and_then(Reply::text), items.get(1)) {
                (Some("full"), Some(limit)) => Ok(Enqueued::Full(limit.int("submit")? as u64)),
                (Some("too_large"), Some(bytes)) => Ok(Enqueued::TooLarge {
                    bytes: bytes.int("submit")? as u64,
                    most: items.get(2).unwrap_or(&Reply::Nil).int("submit")? as u64,
                }),
                (Some("no_room"), Some(used)) => Ok(Enqueued::NoRoom {
                    used: used.int("submit")? as u64,
                    mark: items.get(2).unwrap_or(&Reply::Nil).int("submit")? as u64,
                }),
                (Some("refused"), Some(reason)) => Ok(Enqueued::Refused(reason.lossy().unwrap_or_default())),
                (Some("held"), Some(holder)) => Ok(Enqueued::Held(holder.lossy().unwrap_or_default())),
                _ => Err(reply.unexpected("submit")),
            },
            _ => Err(reply.unexpected("submit")),
        })
        .collect()
}

fn led<T>(reply: Reply, read: impl FnOnce(Reply) -> Result<T, Error>) -> Led<T> {
    if reply.text() == Some("not_leader") { Ok(Err(NotLeader)) } else { read(reply).map(Ok) }
}

fn expect_len(items: &[Reply], n: usize, function: &'static str) -> Result<(), Error> {
    if items.len() == n { Ok(()) } else { Err(Reply::Array(items.to_vec()).unexpected(function)) }
}

fn inspected(reply: Reply, fields: usize) -> Result<Inspected, Error> {
    if reply.text() == Some("missing") {
        return Ok(Inspected::Missing);
    }
    let items = reply.array("inspect")?;
    expect_len(&items, 1 + fields, "inspect")?;
    let claimed = match items[0].text() {
        Some("claimed") => true,
        Some("free") => false,
        _ => return Err(items[0].unexpected("inspect")),
    };
    let read = |value: Reply| match value {
        Reply::Nil => Ok(Inspection::Absent),
        Reply::Bytes(bytes) => Ok(Inspection::Bytes(bytes)),
        Reply::Int(bytes) => Ok(Inspection::TooLarge(bytes as u64)),
        other => Err(other.unexpected("inspect")),
    };
    let values = items.into_iter().skip(1).map(read).collect::<Result<_, _>>()?;
    Ok(Inspected::Found { claimed, values })
}

fn limited(reply: Reply) -> Result<Limited, Error> {
    let items = reply.array("read_limits")?;
    expect_len(&items, 11, "read_limits")?;
    let number = |at: usize| match &items[at] {
        Reply::Nil => Ok(None),
        Reply::Int(number) => Ok(Some(*number as f64)),
        text => text.text().and_then(|text| text.parse().ok()).map(Some).ok_or_else(|| text.unexpected("read_limits")),
    };
    let whole = |at: usize| number(at).map(|number| number.map(|number: f64| number as u64));
    Ok(Limited {
        weight: number(0)?,
        concurrency: whole(1)?,
        rate: whole(2)?.zip(whole(3)?),
        own: whole(4)?,
        paused: items[5].lossy(),
        running: whole(6)?.unwrap_or(0),
        starts: whole(7)?.unwrap_or(0),
        kept_by: items[8].lossy(),
        kept_until_ms: whole(9)?,
        ignored: items[10].clone().texts("read_limits")?,
    })
}

/// The names of the fields that a take hands out of a job in a pool.
fn fields_of(pool: &Pool) -> impl Iterator<Item = &'static str> {
    let kind = if pool.handler().is_some() { Of::Task } else { Of::Sql };
    FIELDS.iter().filter(move |(.., of)| *of == Of::Both || *of == kind).map(|(name, ..)| *name)
}

fn taken(job: Reply) -> Result<Taken, Error> {
    let mut items = job.array("take")?;
    let pool = items.get(2).and_then(Reply::lossy).unwrap_or_default();
    let pool = id(Pool::new(pool), "take")?;
    expect_len(&items, 5 + fields_of(&pool).count(), "take")?;
    let values = items.split_off(5).into_iter().map(Reply::into_bytes).collect();
    let text = |at: usize| items[at].text().map(str::to_owned).ok_or_else(|| items[at].unexpected("take"));
    Ok(Taken {
        id: id(JobId::new(text(0)?), "take")?,
        user: id(User::new(items[1].lossy().unwrap_or_default()), "take")?,
        pool,
        fence: Fence(text(3)?.parse().map_err(|_| items[3].unexpected("take"))?),
        user_timeout_ms: items[4].text().and_then(|text| text.trim().parse().ok()),
        values,
    })
}
