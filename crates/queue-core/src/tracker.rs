//! The books of jobs that an application runs itself: who works on which, what has failed how often, what is done.
//!
//! A [`Tracker`] keeps a record for each job, under the application's own id. [`Tracker::start`] locks it and gives a [`Guard`];
//! ending the guard writes the outcome and consumes it. Everything is decided on the server, in one step each.
//!
//! The lock is renewed for as long as the guard lives. If the holder is gone it expires, and the next start takes it over;
//! what the former holder says after that changes nothing. Work that touches other systems can pass [`Guard::fence`] on to
//! them: a later holder always has the greater one.

use std::fmt;
use std::num::NonZeroU32;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::str::FromStr;
use std::task::Poll;
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::calls::{TrackCreated, TrackEnded, TrackHold, TrackSet, TrackStarted, read_data};
use crate::error::Error;
use crate::ids::{Fence, IdError, SessionId, TrackId, TrackerName};
use crate::model::track::{Codes, DataError, Failure, NoTrackStatus, Record, TrackStatus, Updates, check_data};
use crate::store::Store;

/// How long a lock lives unless a start says otherwise.
pub const EXPIRE: Duration = Duration::from_secs(60);
/// Shorter lives than this could not be renewed in time.
const EXPIRE_MIN: Duration = Duration::from_millis(100);
/// Longer ones would keep a job from everybody whose holder was killed.
const EXPIRE_MAX: Duration = Duration::from_secs(30 * 86_400);
/// How many records one call reads.
const PAGE: usize = 50;

/// Why the tracker did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The name or id can't be used.
    #[error(transparent)]
    Id(#[from] IdError),
    /// The data can't be kept.
    #[error(transparent)]
    Data(#[from] DataError),
    /// There is no record of this id.
    #[error("there is no such record")]
    NotFound,
    /// Another works on it.
    #[error("it is locked by {by}")]
    Locked {
        /// Who: host, pid, and a nonce of that attempt.
        by: String,
        /// Until when unless the lock is renewed, in ms since 1970 by the clock of Redis.
        until_ms: u64,
    },
    /// It has succeeded before: nothing starts it again.
    #[error("it has succeeded already")]
    AlreadySucceeded,
    /// It is set aside, because it failed too often or somebody said so. A reset readies it.
    #[error("it is ignored")]
    Ignored,
    /// Its status is a number of the application's own that this start does not name.
    #[error("it is not ready to start: its code is {0}")]
    NotReady(u32),
    /// The lock expired and was taken, or the record was reset meanwhile: nothing was written.
    #[error("the lock is lost")]
    LockLost,
    /// Only an attempt gives a job this status.
    #[error("only an attempt gives a job this status")]
    OnlyByAttempt,
    /// The server's memory is nearly full: nothing new is accepted.
    #[error("redis has no room: it uses {used} bytes, above {mark} nothing new is accepted")]
    NoRoom {
        /// Bytes that it uses.
        used: u64,
        /// Bytes above which nothing new is accepted.
        mark: u64,
    },
    /// Redis failed. What was asked for may have happened if [`Error::is_outcome_unknown`].
    #[error(transparent)]
    Redis(#[from] Error),
}

/// How [`Tracker::run`] ended, if not well. What failed is recorded unless this says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum RunError<E> {
    /// The work was not begun.
    #[error(transparent)]
    Start(TrackError),
    /// The work failed.
    #[error("{0}")]
    Failed(E),
    /// The work panicked.
    #[error("panicked: {0}")]
    Panicked(String),
    /// The lock was lost; the work was dropped at its next await.
    #[error("the lock is lost")]
    LockLost,
    /// The work succeeded, and that could not be recorded.
    #[error("it succeeded, but that is not recorded: {0}")]
    End(TrackError),
}

/// The records of one application, or of one kind of its jobs. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Tracker {
    store: Store,
    name: TrackerName,
    codes: Codes,
    keep: Option<Duration>,
}

/// A new record.
#[derive(Debug, Clone, Default)]
pub struct NewRecord {
    /// The application's data: a JSON object.
    pub data: Map<String, Value>,
    /// The application's number for the status that it begins with; pending if it says none.
    pub code: Option<u32>,
}

/// How an attempt goes about its job.
#[derive(Debug, Clone)]
pub struct StartOptions {
    /// How long the lock lives unless it is renewed, which it is after each third. From 100 ms to 30 days.
    pub expire: Duration,
    /// How many attempts may fail: the job is ignored when its `retry` reaches this. Without it, none is one too many.
    pub max_retry: Option<NonZeroU32>,
    /// Numbers of the application's own from which the job may start, besides pending and failed.
    pub ready_codes: Vec<u32>,
}

impl Default for StartOptions {
    fn default() -> Self {
        Self { expire: EXPIRE, max_retry: None, ready_codes: Vec::new() }
    }
}

/// Which records to list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selection {
    /// Those with a status, by when they came to it.
    Status(TrackStatus),
    /// Those in progress whose lock has expired, by when it did: their holders are lost.
    Expired,
}

impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Selection::Status(status) => status.fmt(f),
            Selection::Expired => f.pad("expired"),
        }
    }
}

impl FromStr for Selection {
    type Err = NoTrackStatus;
    fn from_str(text: &str) -> Result<Self, NoTrackStatus> {
        if text == "expired" { Ok(Selection::Expired) } else { text.parse().map(Selection::Status) }
    }
}

/// In which order to list.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Order {
    /// The oldest first.
    #[default]
    Oldest,
    /// The newest first.
    Newest,
}

impl Tracker {
    /// The tracker of this name. Trackers know nothing of each other.
    pub fn new(store: Store, name: &str) -> Result<Self, IdError> {
        Ok(Self { store, name: TrackerName::new(name)?, codes: Codes::default(), keep: None })
    }

    /// Records that are created from now on have these numbers for their statuses. A record keeps its own, whoever changes it.
    pub fn codes(self, codes: Codes) -> Self {
        Self { codes, ..self }
    }

    /// Records that are created from now on are removed so long after they succeeded or were ignored; without this never. A job
    /// whose record is gone can be created, and run, again.
    pub fn keep(self, keep: Duration) -> Self {
        Self { keep: Some(keep), ..self }
    }

    /// Creates a record. Returns false, and changes nothing, if there is one of this id.
    pub async fn create(&self, id: &str, new: NewRecord) -> Result<bool, TrackError> {
        let id = TrackId::new(id)?;
        let data = check_data(&new.data)?;
        let status = new.code.map_or(TrackStatus::Pending, |code| self.codes.status(code));
        if status == TrackStatus::InProgress {
            return Err(TrackError::OnlyByAttempt);
        }
        let keep_ms = self.keep.map_or(0, |keep| millis(keep).max(1));
        match self.store.tracker_create(&self.name, &id, status, &self.codes, keep_ms, &data).await? {
            TrackCreated::Created => {
                tracing::debug!(tracker = %self.name, id = %id, status = %status, "tracked job created");
                Ok(true)
            }
            TrackCreated::Exists => Ok(false),
            TrackCreated::NoRoom { used, mark } => Err(TrackError::NoRoom { used, mark }),
        }
    }

    /// Starts an attempt. If the answer of Redis gets lost twice the job may stay locked until the lock expires; so it does if
    /// whoever called stops waiting.
    pub async fn start(&self, id: &str, options: StartOptions) -> Result<Guard, TrackError> {
        let id = TrackId::new(id)?;
        let lock = SessionId::generate(&hostname(), std::process::id()).to_string();
        let expire = options.expire.clamp(EXPIRE_MIN, EXPIRE_MAX);
        let most = options.max_retry.map_or(0, NonZeroU32::get);
        let send = async || {
            let sent = Instant::now();
            let ready = &options.ready_codes;
            let reply = self.store.tracker_start(&self.name, &id, &lock, millis(expire), most, ready).await;
            reply.map(|reply| (reply, sent))
        };
        let (reply, sent) = match send().await {
            // It may have the lock: the same start again tells.
            Err(error) if error.is_transient() && error.is_outcome_unknown() => send().await?,
            answered => answered?,
        };
        let refused = match reply {
            TrackStarted::Started { fence, retry, data } => {
                tracing::debug!(tracker = %self.name, id = %id, holder = lock, fence = fence.0, retry, "tracked job started");
                let hold = TrackHold { tracker: self.name.clone(), id, lock, fence };
                return Ok(Guard::new(self.store.clone(), hold, expire, sent + expire, retry, read_data(&data)));
            }
            TrackStarted::Locked { by, until_ms } => TrackError::Locked { by, until_ms },
            TrackStarted::Succeeded => TrackError::AlreadySucceeded,
            TrackStarted::Ignored => TrackError::Ignored,
            TrackStarted::NotReady(code) => TrackError::NotReady(code),
            TrackStarted::Missing => TrackError::NotFound,
            TrackStarted::Lost => TrackError::LockLost,
        };
        tracing::debug!(tracker = %self.name, id = %id, "tracked job not started: {refused}");
        Err(refused)
    }

    /// Starts an attempt, does the work, and records how it ended: well, with an error, or in a panic. When the lock is lost the
    /// work is dropped at its next await.
    pub async fn run<T, E: fmt::Display + fmt::Debug>(
        &self,
        id: &str,
        options: StartOptions,
        work: impl AsyncFnOnce(&mut Guard) -> Result<T, E>,
    ) -> Result<T, RunError<E>> {
        let mut guard = self.start(id, options).await.map_err(RunError::Start)?;
        let lost = guard.lost().clone();
        let result = {
            let caught = catching(work(&mut guard));
            tokio::select! {
                biased;
                () = lost.cancelled() => None,
                result = caught => Some(result),
            }
        };
        let (failure, error) = match result {
            Some(Ok(Ok(value))) => {
                return match guard.succeed().await {
                    Ok(_) => Ok(value),
                    Err(TrackError::LockLost) => Err(RunError::LockLost),
                    Err(error) => Err(RunError::End(error)),
                };
            }
            Some(Ok(Err(error))) => (Failure::of(&error), RunError::Failed(error)),
            Some(Err(panic)) => {
                let text = panic_text(panic);
                (Failure::from(format!("panicked: {text}")), RunError::Panicked(text))
            }
            // Nobody may have taken it yet: then this attempt failed.
            None => (Failure::from("its lock could not be renewed"), RunError::LockLost),
        };
        match guard.fail(failure).await {
            Ok(_) => Err(error),
            Err(TrackError::LockLost) => Err(RunError::LockLost),
            Err(unrecorded) => {
                tracing::warn!(error = %unrecorded, "the failure of a tracked job could not be recorded");
                Err(error)
            }
        }
    }

    /// One record.
    pub async fn get(&self, id: &str) -> Result<Option<Record>, TrackError> {
        Ok(self.store.tracker_get(&self.name, &TrackId::new(id)?).await?)
    }

    /// Records, found by an index. One that changes its status meanwhile may be left out.
    pub async fn list(&self, selection: Selection, limit: usize, order: Order) -> Result<Vec<Record>, TrackError> {
        let index = selection.to_string();
        let mut found = Vec::new();
        let mut behind = String::new();
        while found.len() < limit {
            let most = PAGE.min(limit - found.len());
            let page = self.store.tracker_list(&self.name, &index, order == Order::Newest, &behind, most).await?;
            found.extend(page.records);
            match page.last {
                Some(last) => behind = last,
                None => break,
            }
        }
        Ok(found)
    }

    /// Readies a job that failed, is ignored, has a status of the application's own, or whose holder is lost: pending, without
    /// failures. One that is pending stays so.
    pub async fn reset(&self, id: &str) -> Result<(), TrackError> {
        self.set_status(id, TrackStatus::Pending).await
    }

    /// Gives a job that nobody works on another status: pending, ignored, or a number of the application's own.
    pub async fn set_status(&self, id: &str, to: TrackStatus) -> Result<(), TrackError> {
        let id = TrackId::new(id)?;
        if matches!(to, TrackStatus::InProgress | TrackStatus::Failed | TrackStatus::Succeeded) {
            return Err(TrackError::OnlyByAttempt);
        }
        match self.store.tracker_set(&self.name, &id, to).await? {
            TrackSet::Set => {
                tracing::debug!(tracker = %self.name, id = %id, status = %to, "tracked job set");
                Ok(())
            }
            TrackSet::Missing => Err(TrackError::NotFound),
            TrackSet::Succeeded => Err(TrackError::AlreadySucceeded),
            TrackSet::Locked { by, until_ms } => Err(TrackError::Locked { by, until_ms }),
            TrackSet::Taken => Err(TrackError::OnlyByAttempt),
        }
    }
}

/// Where a job stands after an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Succeeded, failed, or ignored.
    pub status: TrackStatus,
    /// How many attempts have failed since the last that succeeded.
    pub retry: u32,
}

/// The right to work on one job. It renews its lock in the background.
///
/// Dropped without an end it counts as a failure, which is sent in the background; if that can't be, the lock expires.
#[derive(Debug)]
pub struct Guard {
    store: Store,
    hold: TrackHold,
    expire: Duration,
    retry: u32,
    data: Value,
    updates: Updates,
    lost: CancellationToken,
    renewal: JoinHandle<()>,
    ended: bool,
}

impl Guard {
    fn new(store: Store, hold: TrackHold, expire: Duration, until: Instant, retry: u32, data: Value) -> Self {
        let lost = CancellationToken::new();
        let renewal = tokio::spawn(renew(store.clone(), hold.clone(), expire, until, lost.clone()));
        let updates = Updates::of(&data);
        Self { store, hold, expire, retry, data, updates, lost, renewal, ended: false }
    }

    /// The job's id.
    pub fn id(&self) -> &str {
        self.hold.id.as_str()
    }

    /// The application's data, as it was at the start.
    pub fn data(&self) -> &Value {
        &self.data
    }

    /// How many attempts before this one have failed.
    pub fn retry(&self) -> u32 {
        self.retry
    }

    /// Greater than that of any holder before: systems that remember it can refuse a late one.
    pub fn fence(&self) -> Fence {
        self.hold.fence
    }

    /// What is to be written into the data if the attempt succeeds.
    pub fn updates(&mut self) -> &mut Updates {
        &mut self.updates
    }

    /// Fires when the lock is lost, or was not renewed in time so that it may be: the work must stop.
    pub fn lost(&self) -> &CancellationToken {
        &self.lost
    }

    /// The attempt succeeded: writes the updates, forgets the failures, releases the lock.
    ///
    /// Tries for one life of the lock to reach Redis. Recording goes on if the caller stops waiting.
    pub async fn succeed(self) -> Result<Ended, TrackError> {
        let data = self.updates.text();
        self.end(Ok(data)).await
    }

    /// The attempt failed: writes the error, counts it, releases the lock. Updates are not written.
    ///
    /// Tries for one life of the lock to reach Redis. Recording goes on if the caller stops waiting.
    pub async fn fail(self, failure: impl Into<Failure>) -> Result<Ended, TrackError> {
        self.end(Err(failure.into().cut())).await
    }

    async fn end(mut self, end: Result<Option<String>, Failure>) -> Result<Ended, TrackError> {
        match self.send_end(end).await {
            Ok(ended) => ended,
            Err(error) if error.is_panic() => resume_unwind(error.into_panic()),
            Err(_) => Err(Error::Unavailable("the program is stopping".into()).into()),
        }
    }

    fn send_end(&mut self, end: Result<Option<String>, Failure>) -> JoinHandle<Result<Ended, TrackError>> {
        self.ended = true;
        self.renewal.abort();
        tokio::spawn(send_end(self.store.clone(), self.hold.clone(), self.expire, end))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.renewal.abort();
        if self.ended || tokio::runtime::Handle::try_current().is_err() {
            return;
        }
        let why = if std::thread::panicking() { "panicked" } else { "dropped before it was ended" };
        drop(self.send_end(Err(why.into())));
    }
}

/// Renews a lock after each third of its life until it is lost.
async fn renew(store: Store, hold: TrackHold, expire: Duration, mut until: Instant, lost: CancellationToken) {
    let mut next = until - expire + expire / 3;
    loop {
        sleep_until(next.min(until)).await;
        let sent = Instant::now();
        match timeout_at(until, store.tracker_renew(&hold, millis(expire))).await {
            Ok(Ok(true)) => {
                tracing::debug!(tracker = %hold.tracker, id = %hold.id, fence = hold.fence.0, "lock renewed");
                // Not later than the server's own reckoning: that begins when it has the call.
                until = sent + expire;
                next = sent + expire / 3;
                continue;
            }
            Ok(Err(error)) if Instant::now() < until => {
                tracing::warn!(tracker = %hold.tracker, id = %hold.id, error = %error, "lock could not be renewed, trying again");
                next = Instant::now() + (expire / 10).min(Duration::from_secs(1));
                continue;
            }
            _ => {}
        }
        tracing::debug!(tracker = %hold.tracker, id = %hold.id, fence = hold.fence.0, "lock lost");
        lost.cancel();
        return;
    }
}

/// Sends an end until it is answered, for one life of the lock. Repeating it is harmless: it is recorded once.
async fn send_end(
    store: Store,
    hold: TrackHold,
    expire: Duration,
    end: Result<Option<String>, Failure>,
) -> Result<Ended, TrackError> {
    let since = Instant::now();
    let mut pause = Duration::from_millis(50);
    loop {
        match store.tracker_end(&hold, &end).await {
            Ok(TrackEnded::Ended { status, retry }) => {
                tracing::debug!(tracker = %hold.tracker, id = %hold.id, fence = hold.fence.0, status = %status, retry, "tracked job ended");
                return Ok(Ended { status, retry });
            }
            Ok(TrackEnded::Lost) => {
                tracing::debug!(tracker = %hold.tracker, id = %hold.id, fence = hold.fence.0, "tracked job ended too late: lock lost");
                return Err(TrackError::LockLost);
            }
            Err(error) if error.is_transient() && since.elapsed() < expire => {
                tracing::warn!(tracker = %hold.tracker, id = %hold.id, error = %error, "end could not be recorded, trying again");
                sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(1));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Runs a future; a panic in it is an error.
async fn catching<T>(work: impl Future<Output = T>) -> std::thread::Result<T> {
    let mut work = std::pin::pin!(work);
    std::future::poll_fn(|context| match catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(context))) {
        Ok(Poll::Pending) => Poll::Pending,
        Ok(Poll::Ready(value)) => Poll::Ready(Ok(value)),
        Err(panic) => Poll::Ready(Err(panic)),
    })
    .await
}

fn panic_text(panic: Box<dyn std::any::Any + Send>) -> String {
    match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => panic.downcast_ref::<&str>().map_or_else(|| "no text".to_owned(), |text| (*text).to_owned()),
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX).min(100 * 365 * 86_400_000)
}

fn hostname() -> String {
    nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_else(|| "unknown".into())
}
