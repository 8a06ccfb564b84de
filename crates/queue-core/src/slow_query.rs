//! Slow queries: a request that takes long becomes a ticket, whose holder asks now and then whether it is done.
//!
//! A thin view of tasks. The ticket is the job's id; the one record of the job answers every question, so that nothing has to
//! agree with anything else. Any task can be asked for so, whoever submitted it.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::cancel::Canceller;
use crate::config::{Limits, RetentionConfig};
use crate::error::Error;
use crate::handle::{JobError, JobHandle};
use crate::ids::{App, IdError, JobId, Op, User};
use crate::inspect::{Filter, Inspect, JobView};
use crate::model::Status;
use crate::model::task::{File, Message, Payload};
use crate::objects::{Objects, ObjectsError};
use crate::producer::{EnqueueError, NewJob, Producer, TaskWork, Work};
use crate::store::Store;

/// Most queries of one list.
pub const LISTED_MAX: usize = 10_000;

/// How many of them are read in one step.
const LIST_PAGE: usize = 200;

/// How a slow query stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SlowQueryStatus {
    /// It is not over. Ask again.
    TryLater,
    /// It did what it was to do.
    Success {
        /// What it hands back: any value, not objects alone. `None` if it hands back nothing.
        result: Option<Payload>,
        /// What it says about it.
        messages: Vec<Message>,
        /// Its output files by their logical names.
        files: BTreeMap<String, File>,
    },
    /// It did not.
    Failed {
        /// Why, for programs.
        messages: Vec<Message>,
        /// The same for people.
        reason: String,
        /// What there is of a result.
        result: Option<Payload>,
    },
    /// It was aborted.
    Aborted,
}

impl SlowQueryStatus {
    /// The status as a number: 0 to try later, 1 success, 2 failed, 3 aborted.
    pub fn code(&self) -> u8 {
        match self {
            SlowQueryStatus::TryLater => 0,
            SlowQueryStatus::Success { .. } => 1,
            SlowQueryStatus::Failed { .. } => 2,
            SlowQueryStatus::Aborted => 3,
        }
    }
}

/// A slow query in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its ticket.
    pub id: String,
    /// The application.
    pub app: String,
    /// The operation, in lower case.
    pub op: String,
    /// The status of its job.
    pub status: Status,
    /// When it was submitted, in ms since 1970.
    pub requested_ms: Option<u64>,
    /// When it ended, in ms since 1970.
    pub done_ms: Option<u64>,
    /// Its output files by their logical names.
    pub files: BTreeMap<String, File>,
}

/// Why a question about a slow query has no answer.
#[derive(Debug, thiserror::Error)]
pub enum SlowQueryError {
    /// The text is no ticket.
    #[error("no ticket: {0}")]
    InvalidId(#[from] IdError),
    /// There is no slow query of this ticket, or none any more.
    #[error("there is no slow query {0} (any more)")]
    NotFound(JobId),
    /// Its result can't be read: its record holds nonsense there, or the object store did not give it.
    #[error("the result of slow query {id} can't be read: {reason}")]
    Unreadable {
        /// The ticket.
        id: JobId,
        /// Why.
        reason: String,
    },
    /// The object store did not give its result. Trying again may help.
    #[error(transparent)]
    Objects(#[from] ObjectsError),
    /// Redis was not there, or refused.
    #[error(transparent)]
    Redis(#[from] Error),
}

/// Submits slow queries and answers for them. Cheap to clone.
#[derive(Debug, Clone)]
pub struct SlowQueries {
    store: Store,
    producer: Producer,
    inspect: Inspect,
    objects: Option<Objects>,
    keep: Duration,
}

impl SlowQueries {
    /// Slow queries on a connection. `objects` is where large results lie; without it they can't be read.
    pub fn new(store: Store, limits: Limits, objects: Option<Objects>) -> Self {
        let producer = Producer::new(store.clone(), limits);
        let keep = RetentionConfig::default().finished;
        Self { inspect: Inspect::new(store.clone()), store, producer, objects, keep }
    }

    /// Submits a query, and returns its ticket.
    pub async fn submit(
        &self,
        user: User,
        app: App,
        op: Op,
        context: Option<Payload>,
        input: Payload,
    ) -> Result<JobId, EnqueueError> {
        let job = NewJob::of(user, Work::Task(TaskWork { app, op, input, context }));
        Ok(self.producer.enqueue(job).await?.id().clone())
    }

    /// How a query stands. What has ended is seen at once, and stays so until its record expires.
    pub async fn done(&self, id: &str) -> Result<SlowQueryStatus, SlowQueryError> {
        let id = JobId::new(id)?;
        let view = self.view(&id).await?;
        let messages = view.messages();
        Ok(match view.stand() {
            status if !status.is_final() => SlowQueryStatus::TryLater,
            Status::Cancelled => SlowQueryStatus::Aborted,
            Status::Done => {
                SlowQueryStatus::Success { result: self.result(&id, &view).await?, messages, files: view.files() }
            }
            // However little can be read of a result, the failure is told.
            _ => SlowQueryStatus::Failed {
                messages,
                reason: view.text("failed_reason").unwrap_or_default(),
                result: self.result(&id, &view).await.unwrap_or_default(),
            },
        })
    }

    /// Aborts a query, and tells how it stands then: `Aborted` if it waited, `TryLater` if it runs, for its worker to stop it;
    /// or how it had ended. Asking again does no harm.
    pub async fn abort(&self, id: &str) -> Result<SlowQueryStatus, SlowQueryError> {
        let ticket = JobId::new(id)?;
        self.view(&ticket).await?;
        Canceller::new(self.store.clone(), self.keep).cancel(&ticket).await?;
        self.done(id).await
    }

    /// The queries of an application, and of one operation if it is named, that were submitted less than `newer_than` ago and
    /// have a record: first those that run, then those that wait, and those that ended, the latest first. At most
    /// [`LISTED_MAX`]. It goes through all of the application that is open, and all jobs that ended within that time.
    pub async fn list(&self, app: App, op: Option<Op>, newer_than: Duration) -> Result<Vec<Listed>, Error> {
        let since_ms = self.inspect.now_ms().await?.saturating_sub(newer_than.as_millis() as u64);
        let filter = Filter { app: Some(app), op, since_ms: Some(since_ms), ..Filter::default() };
        let brief = self.inspect.list(&filter, LISTED_MAX).await?;
        let mut listed = Vec::with_capacity(brief.len());
        for page in brief.chunks(LIST_PAGE) {
            let ids: Vec<&str> = page.iter().map(|view| view.id.as_str()).collect();
            listed.extend(self.inspect.jobs(&ids).await?.into_iter().flatten().map(Listed::of));
        }
        Ok(listed)
    }

    async fn view(&self, id: &JobId) -> Result<JobView, SlowQueryError> {
        let view = self.inspect.job(id.as_str()).await?;
        view.filter(JobView::is_task).ok_or_else(|| SlowQueryError::NotFound(id.clone()))
    }

    async fn result(&self, id: &JobId, view: &JobView) -> Result<Option<Payload>, SlowQueryError> {
        let mut handle = JobHandle::new(self.store.clone(), id.clone());
        if let Some(objects) = &self.objects {
            handle = handle.with_objects(objects.clone());
        }
        handle.payload_of(view).await.map_err(|error| match error {
            JobError::Redis(error) => error.into(),
            JobError::Objects(error) => error.into(),
            other => SlowQueryError::Unreadable { id: id.clone(), reason: other.to_string() },
        })
    }
}

impl Listed {
    fn of(view: JobView) -> Self {
        let (app, op) = view.handler().unwrap_or_default();
        Self {
            app,
            op,
            status: view.stand(),
            requested_ms: view.time_ms("created_at"),
            done_ms: view.time_ms("ended_at"),
            files: view.files(),
            id: view.id,
        }
    }
}
