//! Items in the hands of a handler, of whatever form: as rows that it makes something of, or as a task that writes a chunk.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use queue_core::model::batch::{Row, RowEnd, RowResult};
use queue_core::model::task::Payload;
use serde_json::json;
use serde_json::value::RawValue;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::{BoxReader, Item, Unwell};
use crate::execute::chunks::position::{Identity, Position};
use crate::execute::chunks::{Checkpoint, Reader, Writer};
use crate::execute::rows::{Feed, NoDesk, RowAnswer, RowsEnd, RowsOf};
use crate::execute::task::{Handler, Outcome, Problem, Task, Wish};

/// A handler, and what it is told of whom it works for.
pub(super) struct Hands {
    pub(super) handler: Arc<dyn Handler>,
    pub(super) stop_grace: Duration,
    pub(super) of: RowsOf,
    pub(super) stop: CancellationToken,
    pub(super) hard_stop: CancellationToken,
    pub(super) unwell: Unwell,
}

impl Hands {
    /// Waits for what a handler does, as long as it may take: `overdue` says when that is over. Nothing if it is dropped.
    async fn wait<T>(
        &self,
        stop: CancellationToken,
        doing: impl Future<Output = T>,
        overdue: impl Fn() -> Option<Instant>,
    ) -> Option<T> {
        let mut doing = std::pin::pin!(doing);
        // Its time runs anew with each row, so it is looked at again when it was to be over.
        while !stop.is_cancelled() {
            let ends = overdue().unwrap_or_else(|| Instant::now() + self.of.timeout);
            tokio::select! {
                biased;
                done = &mut doing => return Some(done),
                () = stop.cancelled() => {}
                () = tokio::time::sleep_until(ends.into()) => {
                    if overdue().is_some_and(|ends| ends <= Instant::now()) {
                        stop.cancel();
                    }
                }
            }
        }
        tokio::time::timeout(self.stop_grace, doing).await.ok()
    }

    /// What a handler makes of rows, by their places; nothing for those that it was not done with.
    fn rows(&self, rows: Vec<Option<Row>>) -> Result<Vec<Option<RowAnswer>>, Problem> {
        let feed = Arc::new(Feed::new(self.of.clone(), rows));
        let stop = self.stop.child_token();
        let working = self.handler.run_rows(feed.clone(), stop.clone());
        let ended = Handle::current().block_on(self.wait(stop.clone(), working, || feed.overdue_at()));
        if let Some(RowsEnd::NotReady(reason)) = ended {
            return Err(self.unwell.is(&reason));
        }
        let is_late = stop.is_cancelled() && !self.stop.is_cancelled();
        let begun = feed.shorten();
        let mut answers = feed.take_answers();
        // The first that was begun and not answered is the one that took too long.
        if is_late && let Some(late) = answers.iter_mut().take(begun).find(|answer| answer.is_none()) {
            let limit = humantime::format_duration(self.of.timeout);
            *late = Some(RowAnswer::Failed(Problem::retry(format!("it was worked on for longer than {limit}"))));
        }
        Ok(answers)
    }
}

/// What became of an item: what is to be written, nothing, or why neither.
type Made = Result<Option<Item>, Problem>;

/// Reads what a handler makes of another reader's items. It gets as many at once as a chunk has.
pub(super) struct Processed {
    reader: BoxReader,
    hands: Hands,
    size: usize,
    attempts: u32,
    pause: Duration,
    /// What was made of items, and the position behind each of them.
    ready: VecDeque<(Made, Position)>,
    /// The position behind those that were handed on. `None` where the reader stands, too.
    position: Option<Position>,
    /// What kept the reader from reading on.
    broken: Option<Problem>,
}

impl Processed {
    pub(super) fn new(reader: BoxReader, hands: Hands, size: usize, attempts: u32, pause: Duration) -> Self {
        Self { reader, hands, size, attempts, pause, ready: VecDeque::new(), position: None, broken: None }
    }

    /// Reads some items and has them worked on.
    fn fill(&mut self) -> Result<(), Problem> {
        if let Some(problem) = self.broken.take() {
            return Err(problem);
        }
        let mut taken: Vec<(Result<Item, Made>, Position)> = Vec::new();
        while taken.len() < self.size {
            match self.reader.read() {
                None => break,
                Some(Err(problem)) if matches!(problem.wish, Wish::Retry { .. }) => {
                    self.broken = Some(problem);
                    break;
                }
                Some(Err(problem)) => taken.push((Err(Err(problem)), self.reader.position())),
                Some(Ok(item)) => taken.push((Ok(item), self.reader.position())),
            }
        }
        if taken.is_empty() {
            return self.broken.take().map_or(Ok(()), Err);
        }
        let mut attempts = vec![0; taken.len()];
        loop {
            let row = |(at, (item, _)): (usize, &(Result<Item, Made>, Position))| {
                let item = item.as_ref().ok()?;
                Some(Row { line: at as u64 + 1, input: item.get().as_bytes().to_vec() })
            };
            let rows: Vec<Option<Row>> = taken.iter().enumerate().map(row).collect();
            if rows.iter().all(Option::is_none) {
                break;
            }
            let (mut is_any, mut is_again) = (false, false);
            for (at, answer) in self.hands.rows(rows)?.into_iter().enumerate() {
                let Some(answer) = answer else { continue };
                is_any = true;
                attempts[at] += 1;
                match made_of(answer) {
                    Err(Problem { wish: Wish::Retry { .. }, .. }) if attempts[at] < self.attempts => is_again = true,
                    made => taken[at].0 = Err(made),
                }
            }
            if self.hands.stop.is_cancelled() {
                break;
            }
            if !is_any {
                return Err(Problem::retry("its handler worked on no item"));
            }
            if is_again {
                thread::sleep(self.pause);
            }
        }
        // Told to stop, it leaves what it has not come to: that is read again.
        self.ready = taken.into_iter().map_while(|(made, behind)| Some((made.err()?, behind))).collect();
        match self.ready.is_empty() {
            true => Err(Problem::retry("it was told to stop")),
            false => Ok(()),
        }
    }
}

impl Reader for Processed {
    type Item = Made;

    fn source(&self) -> Identity {
        self.reader.source()
    }

    fn unit(&self) -> &'static str {
        self.reader.unit()
    }

    fn open(&mut self, behind: Option<&Position>) -> Result<(), Problem> {
        self.reader.open(behind)?;
        self.position = Some(self.reader.position());
        Ok(())
    }

    fn read(&mut self) -> Option<Result<Made, Problem>> {
        if self.ready.is_empty()
            && let Err(problem) = self.fill()
        {
            return Some(Err(problem));
        }
        let (made, behind) = self.ready.pop_front()?;
        self.position = Some(behind);
        Some(Ok(made))
    }

    fn position(&self) -> Position {
        self.position.clone().unwrap_or_else(|| self.reader.position())
    }
}

fn made_of(answer: RowAnswer) -> Made {
    match answer {
        RowAnswer::Failed(Problem { wish: Wish::Ignore, .. }) => Ok(None),
        RowAnswer::Failed(problem) => Err(problem),
        RowAnswer::Ended(RowResult { end: RowEnd::Done, result, .. }) => result.map_or(Ok(None), item).map(not_null),
        RowAnswer::Ended(RowResult { end: RowEnd::Skipped, .. }) => Ok(None),
        RowAnswer::Ended(RowResult { messages, .. }) => {
            let reasons: Vec<String> = messages.into_iter().flat_map(|message| message.vals).collect();
            Err(Problem::fail(reasons.join("; ")))
        }
    }
}

fn not_null(item: Option<Item>) -> Option<Item> {
    item.filter(|item| item.get() != "null")
}

/// A result as an item, on a single line: within JSON a line's end stands between its parts alone.
fn item(result: Vec<u8>) -> Made {
    let unread = |error: &dyn std::fmt::Display| Problem::fail(format!("what its handler made can't be read: {error}"));
    let mut text = String::from_utf8(result).map_err(|error| unread(&error))?;
    if text.contains(['\n', '\r']) {
        text = text.replace(['\n', '\r'], " ");
    }
    RawValue::from_string(text).map(Some).map_err(|error| unread(&error))
}

/// Gives each chunk to a handler, as a task whose input is the list of its items. It may get a chunk again whose checkpoint was not saved;
/// the context tells which run and which chunk it is.
pub(super) struct Handed(pub(super) Hands);

impl Writer for Handed {
    type Item = Item;

    fn target(&self) -> Option<Identity> {
        let RowsOf { app, op, .. } = &self.0.of;
        Some(Identity::of("handler").with("name", format!("{app}.{op}")))
    }

    fn open(&mut self, _: &Checkpoint) -> Result<Option<Checkpoint>, Problem> {
        Ok(None)
    }

    fn write(&mut self, items: &[Item], checkpoint: &mut Checkpoint) -> Result<(), Problem> {
        if items.is_empty() {
            return Ok(());
        }
        let Hands { handler, of, hard_stop, unwell, .. } = &self.0;
        let context = json!({ "run": checkpoint.run, "chunk": checkpoint.counts.commit_count });
        let written = |value: Result<Payload, _>| value.map_err(|error| Problem::fail(format!("a chunk: {error}")));
        let task = Task {
            job: of.batch.clone(),
            user: of.user.clone(),
            app: of.app.clone(),
            op: of.op.clone(),
            input: written(Payload::json(items))?,
            context: Some(written(Payload::json(&context))?),
            checkpoint: None,
            fence: of.fence,
            attempt: of.attempt,
            max_attempts: of.max_attempts,
            timeout: of.timeout,
            tags: Vec::new(),
            row: None,
            traceparent: of.traceparent.clone(),
        };
        let (begun, stop) = (Instant::now(), hard_stop.child_token());
        let writing = handler.run(task, Arc::new(NoDesk), stop.clone());
        let overdue = || begun.checked_add(of.timeout);
        match Handle::current().block_on(self.0.wait(stop, writing, overdue)) {
            Some(Outcome::Done(_)) => Ok(()),
            Some(Outcome::Failed(problem)) => Err(problem),
            Some(Outcome::NotReady(reason)) => Err(unwell.is(&reason)),
            Some(Outcome::Stopped) | None => Err(Problem::retry("its writer did not come to an end in time")),
        }
    }
}
