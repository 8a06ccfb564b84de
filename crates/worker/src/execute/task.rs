//! Tasks: what a handler is given, what it may tell while it works, and what it answers.
//!
//! All forms of handlers implement [`Handler`]: closures in Rust, programs that stay and talk in lines, commands that run once.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use queue_core::ids::{App, Fence, JobId, Op, User};
use queue_core::model::batch::Row;
use queue_core::model::chunk::RowsTo;
use queue_core::model::task::{Message, Payload, Progress};
use tokio_util::sync::CancellationToken;

use super::rows::{BatchEnd, Feed, NoDesk, RowsEnd, answer_of};

/// So much of a panic's message is told.
const PANIC_MAX_BYTES: usize = 4096;

/// One call of a handler.
#[derive(Debug, Clone)]
pub struct Task {
    /// The job.
    pub job: JobId,
    /// Its owner.
    pub user: User,
    /// The application.
    pub app: App,
    /// The operation.
    pub op: Op,
    /// What to work on.
    pub input: Payload,
    /// What the submitter says besides, the same for all tasks of one kind of request.
    pub context: Option<Payload>,
    /// What an earlier attempt saved, to go on from: see [`Desk::save`].
    pub checkpoint: Option<Payload>,
    /// Greater than that of every earlier holder of the job: who writes elsewhere can have it compared there, so that an attempt
    /// that was given up does no harm.
    pub fence: Fence,
    /// Which attempt this is, from 1 on.
    pub attempt: u64,
    /// How many there may be.
    pub max_attempts: u32,
    /// How long it may run, by its own limit and its deadline.
    pub timeout: Duration,
    /// What its submitter filed it under.
    pub tags: Vec<String>,
    /// Where it stands in its batch, if it is a row of one.
    pub row: Option<RowOf>,
    /// W3C trace context of this call.
    pub traceparent: Option<String>,
}

/// Where a row stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowOf {
    /// Its line in the batch, from 1 on.
    pub line: u64,
}

/// What a handler may tell while it works. But for saving it never waits: what comes too fast is thinned out, what is too long is cut.
#[async_trait]
pub trait Desk: Send + Sync {
    /// How far the work has come. The latest counts.
    fn progress(&self, progress: Progress);
    /// A line to be kept with the job.
    fn log(&self, line: &str);
    /// Keeps how far the work has come, so that another attempt goes on from there, by whomever. It is kept when this returns; an error
    /// says that it may not be, or that the task is another worker's by now, and the handler must not go on.
    async fn save(&self, checkpoint: Payload) -> Result<(), Problem>;
    /// Begins to load the rows of the batch that belongs to this task, if one does. `context` is what their handler is to know besides.
    async fn load(&self, _to: &RowsTo, _context: Payload) -> Result<Box<dyn RowSink>, Problem> {
        Err(Problem::fail("the task has no batch of its own"))
    }
}

/// Where a task hands over the rows of its batch.
#[async_trait]
pub trait RowSink: Send {
    /// Hands over rows whose lines follow each other, but for those that are done already. A problem of a row leaves all as it was.
    async fn add(&mut self, rows: Vec<Row>) -> Result<(), Problem>;
    /// All rows are there. They count from now on; what another attempt hands over again is the same, or is none of the batch.
    async fn end(self: Box<Self>) -> Result<(), Problem>;
}

/// How one call ended, and what has become of its output.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome<Of = Output> {
    /// It did what it was to do.
    Done(Of),
    /// It did not.
    Failed(Problem),
    /// It was not begun, since the handler is not well: another worker's may be. It takes no more tasks until
    /// [`start`](Handler::start) goes well again.
    NotReady(String),
    /// It ended early because it was told to stop, and has nothing to say.
    Stopped,
}

/// What a call that went well hands back.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Output {
    /// Its result.
    pub result: Option<Payload>,
    /// What it says about it.
    pub messages: Vec<Message>,
    /// Output files by their logical names.
    pub files: BTreeMap<String, Vec<u8>>,
}

/// Why a call did not go well.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    /// What the handler thinks should be done about it.
    pub wish: Wish,
    /// What went wrong, for people.
    pub reason: String,
    /// The same for programs.
    pub messages: Vec<Message>,
    /// What there is of a result.
    pub result: Option<Payload>,
}

/// What is to become of a task that did not go well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// Another attempt may go better: after the pause of the retry policy, or at least this long.
    Retry {
        /// The least pause.
        after: Option<Duration>,
    },
    /// Another attempt would fail too.
    Fail,
    /// Nobody needs to care: the job ends as ignored, a row as skipped.
    Ignore,
}

impl Problem {
    /// A problem that another attempt may not have.
    pub fn retry(reason: impl Into<String>) -> Self {
        Self { wish: Wish::Retry { after: None }, reason: reason.into(), messages: Vec::new(), result: None }
    }

    /// A problem that another attempt would have too.
    pub fn fail(reason: impl Into<String>) -> Self {
        Self { wish: Wish::Fail, ..Self::retry(reason) }
    }

    /// A problem that nobody needs to care about: a row with nothing to be done for it.
    pub fn ignore(reason: impl Into<String>) -> Self {
        Self { wish: Wish::Ignore, ..Self::retry(reason) }
    }

    /// The handler panicked with this payload.
    pub fn panicked(payload: &(dyn Any + Send)) -> Self {
        let text =
            payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        let text = text.unwrap_or("no message");
        let text = &text[..text.floor_char_boundary(PANIC_MAX_BYTES)];
        Self::retry(format!("the handler panicked: {text}"))
    }
}

/// Code that runs tasks.
#[async_trait]
pub trait Handler: Send + Sync {
    /// Runs one task. When `stop` fires (a cancel, the timeout, a worker that ends), it ends the work and returns. Who has
    /// not returned [`stop_grace`](Self::stop_grace) later is dropped where it stands, and must leave nothing running then.
    /// A panic is an ordinary failure of the task.
    async fn run(&self, task: Task, desk: Arc<dyn Desk>, stop: CancellationToken) -> Outcome;

    /// Works on rows of a batch, until there are no more or `stop` fires. One after the other, as if each were a task, unless a
    /// handler knows better.
    async fn run_rows(&self, feed: Arc<Feed>, stop: CancellationToken) -> RowsEnd {
        while !stop.is_cancelled()
            && let Some(row) = feed.next()
        {
            let place = row.place;
            let outcome = self.run(feed.task_of(row), Arc::new(NoDesk), stop.clone()).await;
            match answer_of(outcome, feed.of().encoding) {
                Ok(answer) => feed.answer_unless_cut_short(place, answer, &stop),
                Err(end) => return end,
            }
        }
        RowsEnd::Over
    }

    /// Is told that a batch is over, whatever its end. At least once: what does not go well is tried again.
    async fn mark_done(&self, _end: BatchEnd, _stop: CancellationToken) -> Outcome {
        Outcome::Done(Output::default())
    }

    /// Most tasks that it runs at the same time, if it has a limit of its own. A worker takes no more: others can run them.
    fn concurrency(&self) -> Option<usize> {
        None
    }

    /// How long it may take to stop.
    fn stop_grace(&self) -> Duration {
        Duration::from_secs(5)
    }

    /// Starts what it needs before the first task. A failure is tried again, and no task is taken meanwhile.
    async fn start(&self) -> Result<(), String> {
        Ok(())
    }

    /// Whether it can run tasks now. Who says no takes none until [`start`](Self::start) goes well again.
    async fn check(&self) -> Result<(), String> {
        Ok(())
    }

    /// Ends what it has started. No task runs any more.
    async fn close(&self) {}
}
