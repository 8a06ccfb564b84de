//! One job in the hands of whoever submitted it: waiting for its end, its result, and calling it off.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::de::DeserializeOwned;

use crate::cancel::{Cancelled, Canceller};
use crate::config::RetentionConfig;
use crate::error::Error;
use crate::follow::{Follow, Move};
use crate::ids::JobId;
use crate::inspect::{Inspect, JobView};
use crate::model::Status;
use crate::model::task::{File, Message, Payload, Progress};
use crate::objects::{Objects, ObjectsError};
use crate::store::Store;

/// The pause before a record is asked for again that Redis did not give.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(500);

/// Why a job has no result to give.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// There is no such job, or its record has expired.
    #[error("there is no such job (any more)")]
    NotFound,
    /// It is not over.
    #[error("the job is not over: it is {0}")]
    NotOver(Status),
    /// It ended otherwise than well: `failed`, `ignored`, or `unknown`, when nobody can say how.
    #[error("the job is {status}: {reason}")]
    Failed {
        /// Its status.
        status: Status,
        /// Why, for people.
        reason: String,
        /// The same for programs.
        messages: Vec<Message>,
    },
    /// It was cancelled.
    #[error("the job was cancelled")]
    Cancelled,
    /// It is done, and hands back nothing.
    #[error("the job hands back nothing")]
    NoResult,
    /// Its result is not what was asked for, or its hash holds nonsense there.
    #[error("the result can't be read: {0}")]
    Unreadable(String),
    /// Its result or file is in the object store, which did not give it.
    #[error(transparent)]
    Objects(#[from] ObjectsError),
    /// Redis was not there, or refused.
    #[error(transparent)]
    Redis(#[from] Error),
}

/// A job. Cheap to clone; holds nothing of the job but its id.
#[derive(Debug, Clone)]
pub struct JobHandle {
    store: Store,
    inspect: Inspect,
    id: JobId,
    objects: Option<Objects>,
    keep: Duration,
}

impl JobHandle {
    /// The job of this id. Whether there is one is not asked.
    pub fn new(store: Store, id: JobId) -> Self {
        let keep = RetentionConfig::default().finished;
        Self { inspect: Inspect::new(store.clone()), store, id, objects: None, keep }
    }

    /// With the store in which large results and files lie.
    #[must_use]
    pub fn with_objects(self, objects: Objects) -> Self {
        Self { objects: Some(objects), ..self }
    }

    /// With how long the record is to be kept if this handle cancels the job; 2 h by default.
    #[must_use]
    pub fn keeping(self, keep: Duration) -> Self {
        Self { keep, ..self }
    }

    /// The job's id.
    pub fn id(&self) -> &JobId {
        &self.id
    }

    /// All that its record tells.
    pub async fn view(&self) -> Result<JobView, JobError> {
        self.inspect.job(self.id.as_str()).await?.ok_or(JobError::NotFound)
    }

    /// Where it stands.
    pub async fn status(&self) -> Result<Status, JobError> {
        let view = self.inspect.brief(&[self.id.as_str()]).await?.remove(0);
        Ok(view.ok_or(JobError::NotFound)?.stand())
    }

    /// Waits until it is over, however it ends, and returns its record. While Redis is away it goes on waiting. With a limit it
    /// gives up after that time: with [`JobError::NotOver`], or with what kept it from knowing.
    pub async fn wait(&self, limit: Option<Duration>) -> Result<JobView, JobError> {
        let mut follow = Follow::of(self.store.clone(), [self.id.to_string()]);
        let end = async {
            loop {
                match follow.next().await {
                    Ok(Some(Move::To { .. })) => {}
                    Ok(Some(Move::Over { .. })) => break,
                    Ok(Some(Move::Gone(_)) | None) => return Err(JobError::NotFound),
                    Err(error) if error.is_transient() => {}
                    Err(error) => return Err(error.into()),
                }
            }
            loop {
                match self.view().await {
                    Err(JobError::Redis(error)) if error.is_transient() => tokio::time::sleep(LOOK_AGAIN_AFTER).await,
                    view => return view,
                }
            }
        };
        match limit {
            None => end.await,
            Some(limit) => match tokio::time::timeout(limit, end).await {
                Ok(ended) => ended,
                Err(_) => {
                    let view = self.view().await?;
                    if view.is_over() { Ok(view) } else { Err(JobError::NotOver(view.stand())) }
                }
            },
        }
    }

    /// What a job that is done hands back.
    pub async fn result<T: DeserializeOwned>(&self) -> Result<T, JobError> {
        let payload = self.payload().await?;
        payload.read().map_err(|fault| JobError::Unreadable(fault.to_string()))
    }

    /// The same as it is written.
    pub async fn payload(&self) -> Result<Payload, JobError> {
        let view = self.view().await?;
        let reason = || view.text("failed_reason").unwrap_or_default();
        match view.stand() {
            Status::Done => {}
            Status::Cancelled => return Err(JobError::Cancelled),
            status if view.is_over() => {
                return Err(JobError::Failed { status, reason: reason(), messages: view.messages() });
            }
            status => return Err(JobError::NotOver(status)),
        }
        self.payload_of(&view).await?.ok_or(JobError::NoResult)
    }

    /// What a task hands back, however it ended; `None` if it handed back nothing.
    pub async fn payload_of(&self, view: &JobView) -> Result<Option<Payload>, JobError> {
        let Some(object) = view.result_object() else {
            let is_there = view.bytes("result").is_some() || view.too_large.iter().any(|(field, _)| *field == "result");
            return match view.result() {
                None if is_there => Err(JobError::Unreadable("it is too long, or in no known encoding".into())),
                result => Ok(result),
            };
        };
        let encoding = view.text("result_encoding").unwrap_or_default();
        let encoding = encoding.parse().map_err(|_| JobError::Unreadable("it is in no known encoding".into()))?;
        Ok(Some(Payload { encoding, bytes: self.object(&object).await? }))
    }

    /// What it says about its work, for programs.
    pub async fn messages(&self) -> Result<Vec<Message>, JobError> {
        Ok(self.view().await?.messages())
    }

    /// Its output files by their logical names.
    pub async fn files(&self) -> Result<BTreeMap<String, File>, JobError> {
        Ok(self.view().await?.files())
    }

    /// The content of an output file.
    pub async fn file(&self, file: &File) -> Result<Vec<u8>, JobError> {
        self.object(&file.object).await
    }

    async fn object(&self, name: &str) -> Result<Vec<u8>, JobError> {
        let Some(objects) = &self.objects else {
            return Err(JobError::Unreadable("it is in the object store, which this handle was not given".into()));
        };
        Ok(objects.get(&self.id, name).await?)
    }

    /// How far it has come, if it says so.
    pub async fn progress(&self) -> Result<Option<Progress>, JobError> {
        Ok(self.view().await?.progress())
    }

    /// The lines that it has told, the latest of them.
    pub async fn log(&self) -> Result<Vec<String>, JobError> {
        Ok(self.view().await?.log())
    }

    /// Calls it off: at once if it waits, else its worker is asked to stop it. Asking again does no harm.
    pub async fn cancel(&self) -> Result<Cancelled, JobError> {
        match Canceller::new(self.store.clone(), self.keep).cancel(&self.id).await? {
            Cancelled::NotFound => Err(JobError::NotFound),
            cancelled => Ok(cancelled),
        }
    }
}
