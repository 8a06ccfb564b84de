//! Submitting jobs.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::config::Limits;
use crate::error::Error;
use crate::group::{Group, Stopped};
use crate::ids::{JobId, User};
use crate::job::{CALL_MAX, PAYLOAD_MAX};
use crate::model::Status;
use crate::model::retry::{Backoff, RetryChoice};
use crate::model::sql::{SqlJob, SqlJobError};
use crate::scripts::{Enqueued, Fields, Submission};
use crate::store::Store;

/// Where a SQL job runs.
#[derive(Clone, PartialEq, Eq)]
pub enum Database {
    /// A database that the workers' configuration names; the job carries no credentials.
    Named(String),
    /// A connection that the job itself carries. Its host must be on the workers' list of allowed hosts.
    Connection {
        /// Host name or address.
        host: String,
        /// TCP port.
        port: u16,
        /// Database name.
        dbname: String,
        /// Role.
        dbuser: String,
        /// Password. It stands in the job's hash until the job ends: prefer [`Database::Named`].
        pass: String,
    },
}

impl std::fmt::Debug for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Database::Named(name) => write!(f, "Named({name})"),
            Database::Connection { host, port, .. } => write!(f, "Connection({host}:{port})"),
        }
    }
}

/// A SQL job to submit.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// Its id; a repeated submission with the same id changes nothing.
    pub id: JobId,
    /// Its owner.
    pub user: User,
    /// SQL text, or JSON of one of the other job forms.
    pub query: String,
    /// Run when the job is done.
    pub onsuccess: Option<String>,
    /// Run when the job failed.
    pub onerror: Option<String>,
    /// Where it runs.
    pub database: Database,
    /// How long each of its statements may run; the user's and the worker's limits hold all the same.
    pub timeout: Option<Duration>,
    /// What it says of its retries besides.
    pub retry: RetryChoice,
    /// Running a statement twice does no harm: it may be tried again when nobody can know what an attempt did.
    pub idempotent: bool,
    /// How long it waits before it may be taken.
    pub delay: Duration,
    /// Not before this time, by the clock of Redis.
    pub run_at: Option<SystemTime>,
    /// W3C trace context of whoever submits it.
    pub traceparent: Option<String>,
}

impl NewJob {
    /// A job with a new id and nothing special about it.
    pub fn new(user: User, database: Database, query: impl Into<String>) -> Self {
        Self {
            id: JobId::generate(),
            user,
            query: query.into(),
            onsuccess: None,
            onerror: None,
            database,
            timeout: None,
            retry: RetryChoice::default(),
            idempotent: false,
            delay: Duration::ZERO,
            run_at: None,
            traceparent: None,
        }
    }

    fn into_submission(self) -> Result<Submission, EnqueueError> {
        let parsed = SqlJob::parse(
            &self.query,
            Status::Pending,
            None,
            self.onsuccess.as_deref(),
            self.onerror.as_deref(),
            None,
        )?;
        let fields = Fields::new()
            .with("kind", "sql")
            .with("query", &self.query)
            .with_some("onsuccess", self.onsuccess.as_ref())
            .with_some("onerror", self.onerror.as_ref())
            .with_some("fallback_status", parsed.fallback_status().map(|status| status.to_string()))
            .with_some("timeout", self.timeout.map(|timeout| timeout.as_millis().to_string()))
            .with_some("max_attempts", self.retry.max_attempts.map(|attempts| attempts.to_string()))
            .with_some("backoff", self.retry.backoff.map(Backoff::as_str))
            .with_some("retry_delay", self.retry.delay.map(|delay| delay.as_millis().to_string()))
            .with_some("retry_delay_max", self.retry.delay_max.map(|delay| delay.as_millis().to_string()))
            .with_some("retry_on", self.retry.on.map(|states| states.to_string()))
            .with_some("idempotent", self.idempotent.then_some("1"))
            .with_some("traceparent", self.traceparent.as_ref());
        let fields = match &self.database {
            Database::Named(name) => fields.with("database", name),
            Database::Connection { host, port, dbname, dbuser, pass } => fields
                .with("host", host)
                .with("port", port.to_string())
                .with("dbname", dbname)
                .with("dbuser", dbuser)
                .with("pass", pass),
        };
        let delay_ms = self.delay.as_millis() as u64;
        let run_at_ms = self.run_at.map(|at| at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64);
        Ok(Submission { id: self.id, user: self.user, delay_ms, run_at_ms, fields })
    }
}

/// What a submission did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Submitted {
    /// The job is queued.
    Queued(JobId),
    /// A job with this id had been submitted before; nothing was changed.
    AlreadyThere(JobId),
}

impl Submitted {
    /// The job's id.
    pub fn id(&self) -> &JobId {
        match self {
            Submitted::Queued(id) | Submitted::AlreadyThere(id) => id,
        }
    }
}

/// Why a job was not submitted.
#[derive(Debug, thiserror::Error)]
pub enum EnqueueError {
    /// The query is none.
    #[error(transparent)]
    Invalid(#[from] SqlJobError),
    /// The user has too many jobs waiting.
    #[error("Failed to create job. Max number of jobs ({limit}) queued reached")]
    Full {
        /// Most jobs that may wait.
        limit: u64,
    },
    /// The payload is too large.
    #[error("Your payload is too large: {bytes} bytes. Max size allowed is {limit} bytes")]
    TooLarge {
        /// Bytes of the job's fields.
        bytes: u64,
        /// Most bytes that are allowed.
        limit: u64,
    },
    /// The server's memory is nearly full: nothing new is queued until there is room again.
    #[error("redis uses {used} bytes of memory, and accepts no new jobs above {mark}")]
    NoRoom {
        /// Bytes that it uses.
        used: u64,
        /// Bytes above which nothing new is accepted.
        mark: u64,
    },
    /// Redis has no memory left: nothing was queued. Jobs that end make room.
    #[error("redis has no memory left for new jobs: {0}")]
    OutOfMemory(std::sync::Arc<Error>),
    /// Redis holds something that makes it impossible.
    #[error("{0}")]
    Refused(String),
    /// Whether the job was queued is not known. Ask, or submit again, with the same id: it will not be queued twice.
    #[error("whether job {id} was queued is unknown: {source}")]
    Unknown {
        /// The job's id.
        id: JobId,
        /// What went wrong.
        source: std::sync::Arc<Error>,
    },
    /// The request failed for sure.
    #[error(transparent)]
    Failed(std::sync::Arc<Error>),
}

/// Submits jobs. Cheap to clone; submissions of many tasks share round trips.
#[derive(Debug, Clone)]
pub struct Producer {
    store: Store,
    limits: Limits,
    group: Group<Submission, Result<Submitted, EnqueueError>>,
}

impl Producer {
    /// A producer on a connection.
    pub fn new(store: Store, limits: Limits) -> Self {
        let group = {
            let (store, limits) = (store.clone(), limits.clone());
            Group::start(CALL_MAX, move |jobs| {
                let (store, limits) = (store.clone(), limits.clone());
                async move { send(&store, &limits, &jobs).await }
            })
        };
        Self { store, limits, group }
    }

    /// A producer with a connection of its own whose submissions wait until so many replicas have confirmed them, or for so
    /// long.
    pub async fn confirmed_by(&self, replicas: u32, patience: Duration) -> Result<ConfirmedProducer, Error> {
        let confirming = Confirming {
            store: self.store.aside(patience).await?,
            limits: self.limits.clone(),
            wanted: replicas,
            patience,
            turn: Default::default(),
        };
        let group = {
            let confirming = confirming.clone();
            Group::start(CALL_MAX, move |jobs: Vec<Submission>| {
                let confirming = confirming.clone();
                async move { confirming.send(&jobs).await }
            })
        };
        Ok(ConfirmedProducer { confirming, group })
    }

    /// Submits one job.
    pub async fn enqueue(&self, job: NewJob) -> Result<Submitted, EnqueueError> {
        let submission = job.into_submission()?;
        let id = submission.id.clone();
        match self.group.ask(submission).await {
            Ok(result) => result,
            Err(Stopped) => Err(EnqueueError::Unknown { id, source: Error::Unavailable("stopping".into()).into() }),
        }
    }

    /// Submits many jobs; one result each, in order.
    pub async fn enqueue_many(&self, jobs: Vec<NewJob>) -> Vec<Result<Submitted, EnqueueError>> {
        let (submissions, mut results) = submissions(jobs);
        let mut sent = Vec::with_capacity(submissions.len());
        for chunk in submissions.chunks(CALL_MAX) {
            sent.extend(send(&self.store, &self.limits, chunk).await);
        }
        fill(&mut results, sent)
    }
}

/// The submissions that jobs make, and for each job the error if it makes none.
fn submissions(jobs: Vec<NewJob>) -> (Vec<Submission>, Vec<Option<EnqueueError>>) {
    let mut submissions = Vec::with_capacity(jobs.len());
    let errors = jobs.into_iter().map(|job| job.into_submission().map(|made| submissions.push(made)).err()).collect();
    (submissions, errors)
}

/// One result for each job, of those that were sent and those that were not.
fn fill<T>(errors: &mut [Option<EnqueueError>], sent: Vec<Result<T, EnqueueError>>) -> Vec<Result<T, EnqueueError>> {
    let mut sent = sent.into_iter();
    let next = |error: &mut Option<EnqueueError>| match error.take() {
        Some(error) => Err(error),
        None => sent.next().expect("one result a submission"),
    };
    errors.iter_mut().map(next).collect()
}

/// A submission that replicas were asked to confirm. Queued it is in either case.
#[must_use = "too few replicas may have it"]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Confirmed {
    /// As many replicas as wanted have it, or more.
    Enough {
        /// What the submission did.
        submitted: Submitted,
        /// How many replicas have confirmed it.
        by: u32,
    },
    /// Fewer have confirmed it in time; it may reach them later, or be lost with the primary.
    TooFew {
        /// What the submission did.
        submitted: Submitted,
        /// How many replicas have confirmed it.
        by: u32,
        /// How many were wanted.
        wanted: u32,
    },
}

impl Confirmed {
    /// What the submission did.
    pub fn submitted(&self) -> &Submitted {
        match self {
            Confirmed::Enough { submitted, .. } | Confirmed::TooFew { submitted, .. } => submitted,
        }
    }
}

/// Submits jobs and waits until replicas have them. Cheap to clone; submissions of many tasks share round trips.
///
/// A confirmation counts for the replicas that there are: a failover keeps what it covers if the one that takes over is
/// among those that confirmed. Ask for all of them, or see that Sentinel has no other to choose.
#[derive(Debug, Clone)]
pub struct ConfirmedProducer {
    confirming: Confirming,
    group: Group<Submission, Result<Confirmed, EnqueueError>>,
}

/// A connection that waits for replicas. One call at a time: each holds it up.
#[derive(Debug, Clone)]
struct Confirming {
    store: Store,
    limits: Limits,
    wanted: u32,
    patience: Duration,
    turn: std::sync::Arc<tokio::sync::Mutex<()>>,
}

impl Confirming {
    async fn send(&self, jobs: &[Submission]) -> Vec<Result<Confirmed, EnqueueError>> {
        let Self { store, limits, wanted, patience, turn } = self;
        let (most, largest) = (limits.max_queued_per_user.get().into(), limits.max_payload_bytes.get());
        let _turn = turn.lock().await;
        let (replies, by) = match store.enqueue_confirmed(most, largest, jobs, *wanted, *patience).await {
            Ok((replies, by)) => (Ok(replies), by),
            Err(error) => (Err(error), 0),
        };
        let confirmed = |submitted| match by >= *wanted {
            true => Confirmed::Enough { submitted, by },
            false => Confirmed::TooFew { submitted, by, wanted: *wanted },
        };
        results(replies, limits, jobs).into_iter().map(|result| result.map(confirmed)).collect()
    }
}

impl ConfirmedProducer {
    /// Submits one job.
    pub async fn enqueue(&self, job: NewJob) -> Result<Confirmed, EnqueueError> {
        let submission = job.into_submission()?;
        let id = submission.id.clone();
        match self.group.ask(submission).await {
            Ok(result) => result,
            Err(Stopped) => Err(EnqueueError::Unknown { id, source: Error::Unavailable("stopping".into()).into() }),
        }
    }

    /// Submits many jobs; one result each, in order.
    pub async fn enqueue_many(&self, jobs: Vec<NewJob>) -> Vec<Result<Confirmed, EnqueueError>> {
        let (submissions, mut results) = submissions(jobs);
        let mut sent = Vec::with_capacity(submissions.len());
        for chunk in submissions.chunks(CALL_MAX) {
            sent.extend(self.confirming.send(chunk).await);
        }
        fill(&mut results, sent)
    }
}

async fn send(store: &Store, limits: &Limits, jobs: &[Submission]) -> Vec<Result<Submitted, EnqueueError>> {
    let replies = store.enqueue(limits.max_queued_per_user.get().into(), limits.max_payload_bytes.get(), jobs).await;
    results(replies, limits, jobs)
}

fn results(
    replies: Result<Vec<Enqueued>, Error>,
    limits: &Limits,
    jobs: &[Submission],
) -> Vec<Result<Submitted, EnqueueError>> {
    match replies {
        Ok(replies) => replies
            .into_iter()
            .zip(jobs)
            .map(|(reply, job)| match reply {
                Enqueued::Queued => Ok(Submitted::Queued(job.id.clone())),
                Enqueued::Exists => Ok(Submitted::AlreadyThere(job.id.clone())),
                Enqueued::Full(limit) => Err(EnqueueError::Full { limit }),
                Enqueued::TooLarge(bytes) => {
                    let limit = limits.max_payload_bytes.get().min(PAYLOAD_MAX);
                    Err(EnqueueError::TooLarge { bytes, limit })
                }
                Enqueued::NoRoom { used, mark } => Err(EnqueueError::NoRoom { used, mark }),
                Enqueued::Refused(reason) => Err(EnqueueError::Refused(reason)),
            })
            .collect(),
        Err(error) => {
            let source = std::sync::Arc::new(error);
            let unknown = source.is_outcome_unknown();
            let full = matches!(&*source, Error::Refused(text) if text.starts_with("OOM"));
            jobs.iter()
                .map(|job| {
                    let source = source.clone();
                    Err(if unknown {
                        EnqueueError::Unknown { id: job.id.clone(), source }
                    } else if full {
                        EnqueueError::OutOfMemory(source)
                    } else {
                        EnqueueError::Failed(source)
                    })
                })
                .collect()
        }
    }
}
