//! Rows of a batch in the hands of a handler: what it is given, and where it says what became of each.
//!
//! A handler draws rows from a [`Feed`] at its own pace. So whoever watches it sees how far it is, and can keep the rows that it
//! has not begun from it: they are for others then.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use queue_core::ids::{App, Fence, JobId, Op, User};
use queue_core::model::Status;
use queue_core::model::batch::{Counts, Row, RowEnd, RowResult};
use queue_core::model::task::{Encoding, File, Payload, Progress};
use serde::Serialize;
use serde_json::value::RawValue;
use tokio_util::sync::CancellationToken;

use super::task::{Desk, Outcome, Output, Problem, RowOf, Task, Wish};

/// Most bytes that the rows of a chunk may hand back before the rest of it is left to another one.
pub(crate) const ANSWERS_MAX_BYTES: usize = 4 << 20;

/// What the rows of a chunk have in common.
#[derive(Debug, Clone)]
pub struct RowsOf {
    /// The batch.
    pub batch: JobId,
    /// Its owner.
    pub user: User,
    /// The application.
    pub app: App,
    /// The operation.
    pub op: Op,
    /// How inputs, context and results are written.
    pub encoding: Encoding,
    /// What the submitter says besides.
    pub context: Option<Payload>,
    /// Greater than that of every earlier holder of these rows.
    pub fence: Fence,
    /// Which attempt this is, from 1 on.
    pub attempt: u64,
    /// How many there may be.
    pub max_attempts: u32,
    /// How long a row may take.
    pub timeout: Duration,
    /// W3C trace context.
    pub traceparent: Option<String>,
}

/// What became of a row, as its handler says.
#[derive(Debug, Clone, PartialEq)]
pub enum RowAnswer {
    /// It has ended.
    Ended(RowResult),
    /// It did not go well, and this is to be done about it.
    Failed(Problem),
}

impl From<RowResult> for RowAnswer {
    fn from(result: RowResult) -> Self {
        RowAnswer::Ended(result)
    }
}

impl From<Output> for RowAnswer {
    fn from(Output { result, messages, files }: Output) -> Self {
        match texts(files) {
            Ok(files) => {
                let result = result.filter(|payload| !payload.is_null()).map(|payload| payload.bytes);
                RowAnswer::Ended(RowResult { end: RowEnd::Done, result, messages, files })
            }
            Err(problem) => RowAnswer::Failed(problem),
        }
    }
}

/// Files are bytes, what a row writes is text: its lines become part of a file.
fn texts(files: BTreeMap<String, Vec<u8>>) -> Result<BTreeMap<String, String>, Problem> {
    let text = |(name, content)| match String::from_utf8(content) {
        Ok(text) => Ok((name, text)),
        Err(_) => Err(Problem::fail(format!("what it writes to the file {name:?} is no UTF-8"))),
    };
    files.into_iter().map(text).collect()
}

impl RowAnswer {
    /// A row that did not go well, and what it writes to files all the same. A row that is to be tried again has written nothing.
    pub fn failed(problem: Problem, files: BTreeMap<String, Vec<u8>>) -> Self {
        if files.is_empty() || matches!(problem.wish, Wish::Retry { .. }) {
            return RowAnswer::Failed(problem);
        }
        match texts(files) {
            Ok(files) => RowAnswer::Ended(RowResult { files, ..RowAnswer::Failed(problem).last() }),
            Err(problem) => RowAnswer::Failed(problem),
        }
    }

    /// How the row ends if there is no other attempt.
    pub fn last(self) -> RowResult {
        match self {
            RowAnswer::Ended(result) => result.checked(),
            RowAnswer::Failed(Problem { wish, reason, messages, result }) => {
                let end = if wish == Wish::Ignore { RowEnd::Skipped } else { RowEnd::Failed };
                let messages = if messages.is_empty() && end == RowEnd::Failed {
                    RowResult::failed("processing_error", reason).messages
                } else {
                    messages
                };
                let result = result.map(|payload| payload.bytes);
                RowResult { end, result, messages, files: BTreeMap::new() }.checked()
            }
        }
    }

    fn bytes(&self) -> usize {
        match self {
            RowAnswer::Ended(result) => result.bytes(),
            RowAnswer::Failed(problem) => problem.reason.len() + 200,
        }
    }
}

/// A row that a handler has begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BegunRow {
    /// Its place in the chunk, to name it in the answer.
    pub place: usize,
    /// Its line in the batch.
    pub line: u64,
    /// What to work on, in the encoding of the batch.
    pub input: Vec<u8>,
}

/// The rows of one chunk, and the answers to them.
pub struct Feed {
    of: RowsOf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    rows: Vec<Option<Row>>,
    answers: Vec<Option<RowAnswer>>,
    /// The first row that was not looked at.
    next: usize,
    /// Behind the last that is to be begun.
    end: usize,
    answered_bytes: usize,
    /// Rows that are begun and not answered, and when the first of them was.
    open: usize,
    since: Option<Instant>,
    /// When the first row was begun, and the last answer came.
    begun_at: Option<Instant>,
    answered_at: Option<Instant>,
}

impl Feed {
    /// Rows that are to be worked on; `None` in place of those that have ended before.
    pub fn new(of: RowsOf, rows: Vec<Option<Row>>) -> Self {
        let (end, answers) = (rows.len(), rows.iter().map(|_| None).collect());
        Self { of, state: Mutex::new(State { rows, answers, end, ..State::default() }) }
    }

    /// What the rows have in common.
    pub fn of(&self) -> &RowsOf {
        &self.of
    }

    /// Begins the next row. `None` if no more are to be begun.
    pub fn next(&self) -> Option<BegunRow> {
        self.next_some(1, usize::MAX).pop()
    }

    /// Begins up to so many rows, with not much more than so many bytes of input together.
    pub fn next_some(&self, most: usize, most_bytes: usize) -> Vec<BegunRow> {
        let mut state = self.state();
        let mut begun = Vec::new();
        let mut bytes = 0;
        while begun.len() < most
            && bytes < most_bytes
            && state.next < state.end
            && state.answered_bytes < ANSWERS_MAX_BYTES
        {
            let place = state.next;
            state.next += 1;
            if let Some(Row { line, input }) = state.rows[place].take() {
                bytes += input.len();
                begun.push(BegunRow { place, line, input });
            }
        }
        state.open += begun.len();
        if !begun.is_empty() {
            let since = *state.since.get_or_insert_with(Instant::now);
            state.begun_at.get_or_insert(since);
        }
        begun
    }

    /// Says what became of a row, for a handler that may have been told to stop. One that wants another attempt then has not had
    /// this one: nothing is said of the row.
    pub fn answer_unless_cut_short(&self, place: usize, answer: RowAnswer, stop: &CancellationToken) {
        let wants_another = matches!(&answer, RowAnswer::Failed(Problem { wish: Wish::Retry { .. }, .. }));
        if !(wants_another && stop.is_cancelled()) {
            self.answer(place, answer);
        }
    }

    /// Says what became of a row that was begun. The first answer counts.
    pub fn answer(&self, place: usize, answer: impl Into<RowAnswer>) {
        let answer = answer.into();
        let mut state = self.state();
        if place < state.next && state.answers[place].is_none() {
            state.answered_bytes += answer.bytes();
            state.answers[place] = Some(answer);
            state.open = state.open.saturating_sub(1);
            let now = Instant::now();
            state.since = (state.open > 0).then_some(now);
            state.answered_at = Some(now);
        }
    }

    /// When the rows that are begun will have taken too long: each of them has its time.
    pub fn overdue_at(&self) -> Option<Instant> {
        let state = self.state();
        let patience = self.of.timeout.checked_mul(u32::try_from(state.open).ok()?)?;
        state.since?.checked_add(patience)
    }

    /// Lets no more rows be begun. Returns how many of the chunk's rows are or were looked at: the first ones.
    pub fn shorten(&self) -> usize {
        let mut state = self.state();
        state.end = state.next;
        state.end
    }

    /// Whether rows are left that may be begun.
    pub fn has_more(&self) -> bool {
        let state = self.state();
        state.next < state.end && state.answered_bytes < ANSWERS_MAX_BYTES
    }

    /// How long the rows that were answered took, from when the first of them was begun; `None` if there is none. What the chunk
    /// waited for before is not among it: a thread, a program, Redis.
    pub fn took(&self) -> Option<Duration> {
        let state = self.state();
        Some(state.answered_at?.duration_since(state.begun_at?))
    }

    /// What became of the rows; the answers leave the feed. Rows that were begun and not answered have `None`, as those have that were
    /// not begun.
    pub fn take_answers(&self) -> Vec<Option<RowAnswer>> {
        std::mem::take(&mut self.state().answers)
    }

    /// The task that stands for a row where a handler knows of tasks alone.
    pub fn task_of(&self, row: BegunRow) -> Task {
        let of = &self.of;
        Task {
            job: of.batch.clone(),
            user: of.user.clone(),
            app: of.app.clone(),
            op: of.op.clone(),
            input: Payload { encoding: of.encoding, bytes: row.input },
            context: of.context.clone(),
            checkpoint: None,
            fence: of.fence,
            attempt: of.attempt,
            max_attempts: of.max_attempts,
            timeout: of.timeout,
            tags: Vec::new(),
            row: Some(RowOf { line: row.line }),
            traceparent: of.traceparent.clone(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The answer to a row that a handler of tasks gives, with its result in the encoding of the batch; an error is what keeps it
/// from going on with others.
pub fn answer_of(outcome: Outcome, encoding: Encoding) -> Result<RowAnswer, RowsEnd> {
    let written = |result: Option<Payload>| {
        let result = result.map(|result| result.into_encoding(encoding)).transpose();
        result.map_err(|error| Problem::fail(format!("its result can't be written as {encoding}: {error}")))
    };
    match outcome {
        Outcome::Done(output) => Ok(match written(output.result) {
            Ok(result) => Output { result, ..output }.into(),
            Err(problem) => RowAnswer::Failed(problem),
        }),
        Outcome::Failed(problem) => Ok(RowAnswer::Failed(match written(problem.result) {
            Ok(result) => Problem { result, ..problem },
            Err(problem) => problem,
        })),
        Outcome::NotReady(reason) => Err(RowsEnd::NotReady(reason)),
        Outcome::Stopped => Err(RowsEnd::Over),
    }
}

/// Why a handler draws no more rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RowsEnd {
    /// There are none, or it was told to stop.
    Over,
    /// It is not well. Rows that it has begun and not answered were not worked on.
    NotReady(String),
}

/// Rows keep no progress and no log lines: what they have to say is a message.
pub struct NoDesk;

#[async_trait]
impl Desk for NoDesk {
    fn progress(&self, _: Progress) {}
    fn log(&self, line: &str) {
        tracing::debug!(line, "a row says");
    }
    async fn save(&self, _: Payload) -> Result<(), Problem> {
        Err(Problem::fail("a row is tried again from its beginning: it saves no checkpoint"))
    }
}

/// A batch that is over, as its application is told.
#[derive(Debug, Clone)]
pub struct BatchEnd {
    /// The batch.
    pub batch: JobId,
    /// Its owner.
    pub user: User,
    /// The application.
    pub app: App,
    /// The operation.
    pub op: Op,
    /// How it ended: done, failed or cancelled.
    pub status: Status,
    /// What became of its rows.
    pub counts: Counts,
    /// Its output files by their logical names.
    pub files: BTreeMap<String, File>,
    /// What the submitter said besides.
    pub context: Option<Payload>,
    /// Which attempt to tell this is, from 1 on.
    pub attempt: u64,
}

/// The end of a batch for readers in other languages.
#[derive(Serialize)]
struct Told<'a> {
    batch: &'a JobId,
    user: &'a User,
    app: &'a App,
    op: &'a Op,
    attempt: u64,
    status: Status,
    counts: Counts,
    files: &'a BTreeMap<String, File>,
    context: Option<Box<RawValue>>,
}

impl BatchEnd {
    /// All of it as JSON on one line.
    pub fn to_json_line(&self) -> Result<String, String> {
        let context = self.context.as_ref().map(Payload::to_json_line).transpose();
        let context = context.map_err(|error| format!("the context cannot be handed over as JSON: {error}"))?;
        let context = context.map(RawValue::from_string).transpose().map_err(|error| error.to_string())?;
        let Self { batch, user, app, op, status, counts, files, attempt, .. } = self;
        let (attempt, status, counts) = (*attempt, *status, *counts);
        let told = Told { batch, user, app, op, attempt, status, counts, files, context };
        serde_json::to_string(&told).map_err(|error| error.to_string())
    }
}
