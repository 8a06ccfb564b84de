//! Submitting jobs.

use std::time::Duration;

use crate::config::Limits;
use crate::error::Error;
use crate::group::{Group, Stopped};
use crate::ids::{JobId, User};
use crate::job::{CALL_MAX, PAYLOAD_MAX};
use crate::model::Status;
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
    /// How many times it may be tried when an error proves that nothing was done. One if not said.
    pub max_attempts: Option<u32>,
    /// How long it waits before it may be taken.
    pub delay: Duration,
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
            max_attempts: None,
            delay: Duration::ZERO,
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
            .with_some("max_attempts", self.max_attempts.map(|attempts| attempts.to_string()))
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
        Ok(Submission { id: self.id, user: self.user, delay_ms: self.delay.as_millis() as u64, fields })
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
        let mut results: Vec<Option<Result<Submitted, EnqueueError>>> = Vec::with_capacity(jobs.len());
        let mut submissions = Vec::with_capacity(jobs.len());
        for job in jobs {
            match job.into_submission() {
                Ok(submission) => {
                    submissions.push(submission);
                    results.push(None);
                }
                Err(error) => results.push(Some(Err(error))),
            }
        }
        let mut sent = Vec::with_capacity(submissions.len());
        for chunk in submissions.chunks(CALL_MAX) {
            sent.extend(send(&self.store, &self.limits, chunk).await);
        }
        let mut sent = sent.into_iter();
        results.into_iter().map(|done| done.unwrap_or_else(|| sent.next().expect("one result a submission"))).collect()
    }
}

async fn send(store: &Store, limits: &Limits, jobs: &[Submission]) -> Vec<Result<Submitted, EnqueueError>> {
    match store.enqueue(limits.max_queued_per_user.get().into(), limits.max_payload_bytes.get(), jobs).await {
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
