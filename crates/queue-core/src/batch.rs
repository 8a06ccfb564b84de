//! Batches: rows that a user hands over as one, to be worked on by a handler or a statement, watched, appended to, held and
//! aborted as one.
//!
//! A batch is a job of its own kind. Its record counts its rows and says how it stands at every moment; workers take its rows in
//! chunks. [`Batches`] submits and answers; a [`Loader`] hands over rows of which only some are in memory at a time.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::calls::{Aborted, Fields, Inspected, Released, Span};
use crate::config::{Limits, RetentionConfig};
use crate::error::Error;
use crate::handle::{JobError, JobHandle};
use crate::ids::{App, IdError, JobId, Op, User};
use crate::job::{FIELDS, TAGS_MAX_BYTES};
use crate::model::Status;
use crate::model::batch::{BATCH_ID_MAX_BYTES, Counts, LINE_MAX, Row};
use crate::model::retry::{Backoff, RetryChoice};
use crate::model::task::{Encoding, File, Payload};
use crate::objects::{Objects, ObjectsError};
use crate::producer::{Database, Priority};
use crate::store::Store;

mod load;
mod read;
pub mod work;

pub use load::{Loaded, Loader};
pub use read::{BatchReader, RowCursor, RowView, RowsPage, Which};

/// Most batches of one list.
pub const LISTED_MAX: usize = 10_000;
/// Most bytes of what a submitter says besides the rows.
pub const CONTEXT_MAX_BYTES: usize = 1 << 18;
/// Most bytes of a statement for rows.
pub const STATEMENT_MAX_BYTES: usize = 1 << 16;
/// The key of the load with which a batch is submitted.
const FIRST_LOAD: &str = "first";

/// What is done with each row.
#[derive(Debug, Clone)]
pub enum RowWork {
    /// A handler works on it.
    Handler {
        /// The application.
        app: App,
        /// The operation.
        op: Op,
    },
    /// A statement runs with its values.
    Sql {
        /// The statement, with parameters.
        statement: String,
        /// Where it runs.
        database: Database,
    },
}

/// A batch to submit.
#[derive(Debug, Clone)]
pub struct NewBatch {
    /// Its id, of at most [`BATCH_ID_MAX_BYTES`] bytes. A repeated submission with the same id changes nothing.
    pub id: JobId,
    /// Its owner.
    pub user: User,
    /// What is done with each row.
    pub work: RowWork,
    /// How its rows, its context and its results are written.
    pub encoding: Encoding,
    /// What else the handler is to know.
    pub context: Option<Payload>,
    /// Its rows wait until it is released; until then more can be appended.
    pub held: bool,
    /// How long each row may take; the handler's and the worker's limits hold all the same.
    pub row_timeout: Option<Duration>,
    /// What it says of the retries of its rows besides.
    pub retry: RetryChoice,
    /// Its place among the user's own jobs: behind them, if not said otherwise.
    pub priority: Priority,
    /// How long it is kept once it is over; as long as other jobs, if not said.
    pub keep: Option<Duration>,
    /// What it is filed under.
    pub tags: Vec<String>,
    /// The file that its rows come from, for people.
    pub source: Option<String>,
    /// W3C trace context of whoever submits it.
    pub traceparent: Option<String>,
}

impl NewBatch {
    /// A batch for a handler, with a new id and nothing special about it.
    pub fn handler(user: User, app: App, op: Op) -> Self {
        Self::of(user, RowWork::Handler { app, op })
    }

    /// A batch of statements, with a new id and nothing special about it.
    pub fn sql(user: User, database: Database, statement: impl Into<String>) -> Self {
        Self::of(user, RowWork::Sql { statement: statement.into(), database })
    }

    /// A batch with a new id and nothing special about it.
    pub fn of(user: User, work: RowWork) -> Self {
        Self {
            id: JobId::generate(),
            user,
            work,
            encoding: Encoding::Json,
            context: None,
            held: false,
            row_timeout: None,
            retry: RetryChoice::default(),
            priority: Priority::Low,
            keep: None,
            tags: Vec::new(),
            source: None,
            traceparent: None,
        }
    }

    /// The same under an id that is made of the user, the work and a key of the caller's: so a submission that is repeated with the
    /// same key is the same batch, whoever repeats it.
    #[must_use]
    pub fn keyed(self, key: &str) -> Self {
        let work = match &self.work {
            RowWork::Handler { app, op } => format!("{app}.{op}"),
            RowWork::Sql { statement, .. } => format!("sql:{statement}"),
        };
        let mut digest = Sha256::new();
        for part in [self.user.as_str(), &work, key] {
            digest.update((part.len() as u64).to_be_bytes());
            digest.update(part);
        }
        let hex: String = digest.finalize()[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        Self { id: JobId::new(format!("k-{hex}")).expect("letters and digits"), ..self }
    }

    /// What is written of it, if it can be.
    fn fields(&self) -> Result<Fields, BatchError> {
        let ms = |duration: Duration| duration.as_millis().max(1).to_string();
        let invalid = |reason: String| Err(BatchError::Invalid(reason));
        check_id(&self.id)?;
        let mut fields = match &self.work {
            RowWork::Handler { app, op } => Fields::new().with("app", app.as_str()).with("op", op.as_str()),
            RowWork::Sql { .. } if self.encoding != Encoding::Json => {
                return invalid("rows for a statement are written in JSON".into());
            }
            RowWork::Sql { statement, .. } if statement.trim().is_empty() => {
                return invalid("the statement is empty".into());
            }
            RowWork::Sql { statement, .. } if statement.len() > STATEMENT_MAX_BYTES => {
                return invalid(format!("the statement has more than {} bytes", STATEMENT_MAX_BYTES));
            }
            RowWork::Sql { statement, database } => Fields::new().with("statement", statement).and(database.fields()),
        };
        if let Some(context) = &self.context {
            if context.encoding != self.encoding {
                return invalid("context and rows are not in the same encoding".into());
            }
            if context.bytes.len() > CONTEXT_MAX_BYTES {
                let bytes = context.bytes.len();
                return invalid(format!("the context has {bytes} bytes, at most {CONTEXT_MAX_BYTES} are allowed"));
            }
            if let Err(fault) = context.to_json_line() {
                return invalid(format!("the context can't be read: {fault}"));
            }
            fields = fields.with("batch_context", &context.bytes);
        }
        let tags = self.tags.join(",");
        if self.tags.iter().any(|tag| tag.is_empty() || tag.contains(',') || tag.chars().any(char::is_control)) {
            return invalid("a tag is empty, or has a comma or a control character".into());
        }
        if tags.len() > TAGS_MAX_BYTES {
            return invalid(format!("the tags have more than {TAGS_MAX_BYTES} bytes"));
        }
        if self.source.as_ref().is_some_and(|source| source.len() > 1024) {
            return invalid("the name of the file has more than 1024 bytes".into());
        }
        let fields = fields
            .with("encoding", self.encoding.as_str())
            .with("priority", self.priority.as_str())
            .with_some("timeout", self.row_timeout.map(ms))
            .with_some("max_attempts", self.retry.max_attempts.map(|attempts| attempts.to_string()))
            .with_some("backoff", self.retry.backoff.map(Backoff::as_str))
            .with_some("retry_delay", self.retry.delay.map(ms))
            .with_some("retry_delay_max", self.retry.delay_max.map(ms))
            .with_some("keep", self.keep.map(ms))
            .with_some("tags", Some(tags).filter(|tags| !tags.is_empty()))
            .with_some("source", self.source.as_ref())
            .with_some("traceparent", self.traceparent.as_ref());
        for (name, most, _) in FIELDS {
            if let Some(value) = fields.get(name).filter(|value| value.len() > *most) {
                return invalid(format!("{name} has {} bytes, at most {most} are allowed", value.len()));
            }
        }
        Ok(fields)
    }
}

fn check_id(id: &JobId) -> Result<(), BatchError> {
    match id.as_str().len() {
        0..=BATCH_ID_MAX_BYTES => Ok(()),
        bytes => Err(BatchError::Invalid(format!(
            "the id of a batch has {bytes} bytes, at most {BATCH_ID_MAX_BYTES} are allowed"
        ))),
    }
}

/// Why a question about a batch has no answer, or a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    /// The text is no id.
    #[error("no id of a batch: {0}")]
    InvalidId(#[from] IdError),
    /// What the batch says does not fit together.
    #[error("{0}")]
    Invalid(String),
    /// A row can't be taken. No row of the load was.
    #[error("line {line}: {reason}")]
    Row {
        /// Its line.
        line: u64,
        /// Why.
        reason: String,
    },
    /// There are more than are allowed. No row of the load was taken.
    #[error("a batch has at most {most} {what}")]
    TooMany {
        /// Rows or bytes.
        what: String,
        /// How many may be.
        most: u64,
    },
    /// There is no such batch, or its record has expired.
    #[error("there is no batch {0} (any more)")]
    NotFound(JobId),
    /// Its status must be held for that.
    #[error("the batch is {0}: its status must be held for that")]
    NotHeld(Status),
    /// It has ended.
    #[error("the batch is {0} already")]
    Over(Status),
    /// Other rows were handed over under this key.
    #[error("other rows were handed over before under the same key")]
    Differs,
    /// The server's memory is nearly full. No row of the load was taken.
    #[error("redis uses {used} bytes of memory, and accepts nothing new above {mark}")]
    NoRoom {
        /// Bytes that it uses.
        used: u64,
        /// Bytes above which nothing new is accepted.
        mark: u64,
    },
    /// Redis holds something that makes it impossible.
    #[error("{0}")]
    Refused(String),
    /// The batch has no output file of this name.
    #[error("the batch has no file {0:?}")]
    NoFile(String),
    /// Its record holds nonsense.
    #[error("batch {id} can't be read: {reason}")]
    Unreadable {
        /// The batch.
        id: JobId,
        /// What is wrong.
        reason: String,
    },
    /// The object store did not give a file.
    #[error(transparent)]
    Objects(#[from] ObjectsError),
    /// Redis was not there, or refused. The same call again, with the same key, does no harm.
    #[error(transparent)]
    Redis(#[from] Error),
}

/// How a batch stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BatchView {
    /// Its id.
    pub id: String,
    /// Its owner.
    pub user: String,
    /// The application; none where a statement runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub app: Option<String>,
    /// The operation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub op: Option<String>,
    /// Where it stands: `held`, `pending`, `running`, `done`, `failed` or `cancelled`.
    pub status: Status,
    /// All its rows have ended, and its output files are being assembled.
    pub finishing: bool,
    /// What became of its rows so far.
    pub counts: Counts,
    /// Its output files by their logical names.
    pub files: BTreeMap<String, File>,
    /// Why it failed, where that is not for its rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The file that its rows came from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// What it is filed under.
    pub tags: Vec<String>,
    /// How its rows and results are written.
    pub encoding: &'static str,
    /// Bytes of its rows and results.
    pub bytes: u64,
    /// When it was submitted, in ISO 8601.
    pub created_at: Option<String>,
    /// When the first of its rows was taken.
    pub started_at: Option<String>,
    /// When it ended.
    pub ended_at: Option<String>,
}

impl BatchView {
    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        self.status.is_final()
    }
}

/// Fields that are read for a view, with the most bytes of each.
const VIEW: &[(&str, usize)] = &[
    ("kind", 16),
    ("user", 128),
    ("app", 128),
    ("op", 128),
    ("status", 32),
    ("rows", 20),
    ("left", 20),
    ("done", 20),
    ("skipped", 20),
    ("failed", 20),
    ("aborted", 20),
    ("files", 1 << 20),
    ("failed_reason", 1 << 16),
    ("source", 1024),
    ("tags", TAGS_MAX_BYTES),
    ("encoding", 16),
    ("bytes", 20),
    ("created_at", 64),
    ("started_at", 64),
    ("ended_at", 64),
    ("aborted_at", 64),
];

/// Which batches to list.
#[derive(Debug, Clone, Default)]
pub struct BatchFilter {
    /// Of this application.
    pub app: Option<App>,
    /// Of this operation.
    pub op: Option<Op>,
    /// Of this user.
    pub user: Option<User>,
    /// In this status.
    pub status: Option<Status>,
    /// Submitted within this time.
    pub age: Option<Duration>,
}

/// What a release did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Release {
    /// How many rows the batch has.
    pub rows: u64,
    /// It had been released before, and stands here.
    pub before: Option<Status>,
}

/// Submits batches and answers for them. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Batches {
    store: Store,
    limits: Limits,
    objects: Option<Objects>,
    keep: Duration,
}

impl Batches {
    /// On a connection.
    pub fn new(store: Store, limits: Limits) -> Self {
        Self { store, limits, objects: None, keep: RetentionConfig::default().finished }
    }

    /// With the store in which output files lie.
    #[must_use]
    pub fn with_objects(self, objects: Objects) -> Self {
        Self { objects: Some(objects), ..self }
    }

    /// With how long the record of a batch is kept that ends by a call of ours; 2 h by default.
    #[must_use]
    pub fn keeping(self, keep: Duration) -> Self {
        Self { keep, ..self }
    }

    /// How long that is.
    pub fn keeps(&self) -> Duration {
        self.keep
    }

    /// Submits a batch with all its rows. All of them are looked at before anything is stored.
    pub async fn submit(&self, new: NewBatch, rows: Vec<Row>) -> Result<Loaded, BatchError> {
        let mut loader = self.open(new)?;
        loader.check_all(&rows)?;
        for row in rows {
            loader.push(row).await?;
        }
        loader.finish().await
    }

    /// Begins to submit a batch row by row. It is there for others once the loader has finished.
    pub fn open(&self, new: NewBatch) -> Result<Loader, BatchError> {
        let fields = new.fields()?;
        let is_release = !new.held;
        Ok(Loader::new(self.clone(), new.id, new.user, new.encoding, FIRST_LOAD.into(), Some(fields), is_release))
    }

    /// Begins to append rows to a batch that is held. All of them join it once the loader has finished, or none. A key makes it
    /// safe to do the same again: rows that have joined under it do not join twice.
    pub async fn append(&self, id: &JobId, key: Option<&str>, release: bool) -> Result<Loader, BatchError> {
        let (view, encoding) = self.look(id).await?;
        let user = User::new(view.user.clone())
            .map_err(|fault| BatchError::Unreadable { id: id.clone(), reason: fault.to_string() })?;
        let key = match key {
            Some(key) if key.is_empty() || key.len() > 256 => {
                return Err(BatchError::Invalid("a key has 1 to 256 bytes".into()));
            }
            Some(key) => format!("key {key}"),
            None if view.status != Status::Held => return Err(BatchError::NotHeld(view.status)),
            None => format!("own {}", JobId::generate()),
        };
        Ok(Loader::new(self.clone(), id.clone(), user, encoding, key, None, release))
    }

    /// Lets the rows of a held batch be worked on. Doing it again does no harm.
    pub async fn release(&self, id: &JobId) -> Result<Release, BatchError> {
        match self.store.batch_release(id, self.keep_ms()).await? {
            Released::Now(rows) => Ok(Release { rows, before: None }),
            Released::Before(status, rows) => Ok(Release { rows, before: Some(status) }),
            Released::Over(status) => Err(BatchError::Over(status)),
            Released::Missing => Err(BatchError::NotFound(id.clone())),
        }
    }

    /// Aborts a batch, and tells how it stands then: rows of which nothing became yet are aborted at once. One that has ended, or
    /// was aborted before, stays as it is.
    pub async fn abort(&self, id: &JobId) -> Result<BatchView, BatchError> {
        match self.store.batch_abort(id, self.keep_ms()).await? {
            Aborted::Now | Aborted::Over(_) => self.view(id).await,
            Aborted::Missing => Err(BatchError::NotFound(id.clone())),
        }
    }

    /// How a batch stands. No row is read.
    pub async fn view(&self, id: &JobId) -> Result<BatchView, BatchError> {
        Ok(self.look(id).await?.0)
    }

    /// Whether this is what works on its rows.
    pub async fn has_work(&self, id: &JobId, work: &RowWork) -> Result<bool, BatchError> {
        const WORK: &[(&str, usize)] =
            &[("app", 128), ("op", 128), ("statement", STATEMENT_MAX_BYTES), ("database", 128)];
        let found = self.store.inspect(WORK, [id.as_str()]).await?.pop();
        let found = found.ok_or_else(|| BatchError::NotFound(id.clone()))?;
        let wanted = match work {
            RowWork::Handler { app, op } => [Some(app.as_str()), Some(op.as_str()), None, None],
            RowWork::Sql { statement, database: Database::Named(name) } => {
                [None, None, Some(statement.as_str()), Some(name.as_str())]
            }
            RowWork::Sql { statement, .. } => [None, None, Some(statement.as_str()), None],
        };
        Ok(WORK.iter().zip(wanted).all(|((name, _), wanted)| found.text(WORK, name).as_deref() == wanted))
    }

    async fn look(&self, id: &JobId) -> Result<(BatchView, Encoding), BatchError> {
        let found = self.store.inspect(VIEW, [id.as_str()]).await?.pop();
        found.and_then(|found| view_of(id.as_str(), &found)).ok_or_else(|| BatchError::NotFound(id.clone()))
    }

    /// Waits until it is over, however it ends. With a limit it gives up after that time and tells how it stands then.
    pub async fn wait(&self, id: &JobId, limit: Option<Duration>) -> Result<BatchView, BatchError> {
        match JobHandle::new(self.store.clone(), id.clone()).wait(limit).await {
            Ok(_) | Err(JobError::NotOver(_)) => self.view(id).await,
            Err(JobError::Redis(error)) => Err(error.into()),
            Err(_) => Err(BatchError::NotFound(id.clone())),
        }
    }

    /// Reads the rows of a batch in the order of their lines.
    pub async fn reader(&self, id: &JobId) -> Result<BatchReader, BatchError> {
        let (view, encoding) = self.look(id).await?;
        BatchReader::open(self.store.clone(), id.clone(), encoding, view.counts.aborted > 0).await
    }

    /// A page of rows in the order of their lines: at most so many, from behind a cursor on.
    pub async fn rows(
        &self,
        id: &JobId,
        which: Which,
        after: Option<RowCursor>,
        most: usize,
    ) -> Result<RowsPage, BatchError> {
        self.reader(id).await?.page(which, after, most).await
    }

    /// The batches that a filter finds, the latest first, at most so many.
    pub async fn list(&self, filter: &BatchFilter, most: usize) -> Result<Vec<BatchView>, BatchError> {
        let view = |id: &str, found: &Inspected| Some(view_of(id, found)?.0).filter(|view| filter.allows(view));
        let index = self.store.keys().batches();
        let span = Span { age: filter.age, ..Span::default() };
        Ok(self.store.newest(&index, span, most.min(LISTED_MAX), VIEW, view).await?)
    }

    /// An output file, piece by piece, into whatever takes bytes. Returns how many they were.
    pub async fn file<W>(&self, id: &JobId, name: &str, into: &mut W) -> Result<u64, BatchError>
    where
        W: tokio::io::AsyncWrite + Unpin,
    {
        let view = self.view(id).await?;
        let file = view.files.get(name).ok_or_else(|| BatchError::NoFile(name.to_owned()))?;
        let objects = self.objects.as_ref().ok_or_else(|| BatchError::Invalid("no object store is known".into()))?;
        Ok(objects.copy_to(id, &file.object, into).await?)
    }

    fn keep_ms(&self) -> u64 {
        self.keep.as_millis() as u64
    }
}

impl BatchFilter {
    fn allows(&self, view: &BatchView) -> bool {
        self.app.as_ref().is_none_or(|app| view.app.as_deref() == Some(app.as_str()))
            && self.op.as_ref().is_none_or(|op| view.op.as_deref() == Some(op.as_str()))
            && self.user.as_ref().is_none_or(|user| view.user == user.as_str())
            && self.status.is_none_or(|status| view.status == status)
    }
}

fn view_of(id: &str, found: &Inspected) -> Option<(BatchView, Encoding)> {
    let text = |name: &str| found.text(VIEW, name);
    if text("kind")? != "batch" {
        return None;
    }
    // What others have written there is no count: sums of counts must not overflow.
    let count = |text: String| text.parse().ok().filter(|count| *count <= LINE_MAX);
    let number = |name| text(name).and_then(count).unwrap_or(0);
    let status: Status = text("status")?.parse().ok()?;
    let encoding = text("encoding").and_then(|word| word.parse().ok()).unwrap_or_default();
    let counts = Counts {
        rows: number("rows"),
        pending: number("left"),
        done: number("done"),
        skipped: number("skipped"),
        failed: number("failed"),
        aborted: number("aborted"),
    };
    let view = BatchView {
        id: id.to_owned(),
        user: text("user")?,
        app: text("app"),
        op: text("op"),
        status,
        finishing: status == Status::Running && (counts.pending == 0 || text("aborted_at").is_some()),
        counts,
        files: text("files").and_then(|files| serde_json::from_str(&files).ok()).unwrap_or_default(),
        reason: text("failed_reason"),
        source: text("source"),
        tags: text("tags").map(|tags| tags.split(',').map(str::to_owned).collect()).unwrap_or_default(),
        encoding: Encoding::as_str(encoding),
        bytes: number("bytes"),
        created_at: text("created_at"),
        started_at: text("started_at"),
        ended_at: text("ended_at"),
    };
    Some((view, encoding))
}
