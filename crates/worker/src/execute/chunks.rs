//! Tasks that work on many items in chunks: read, process, write, and save behind each chunk how far they have come.
//!
//! Another attempt goes on behind the last chunk that was committed: after an error, the loss of the worker, a drain,
//! or in a later execution of its flow. A chunk whose writing was not followed by its checkpoint is undone by a writer
//! that can (a file is shortened), or was committed together with it (a database); any other writer sees it again.
//!
//! All this is code that blocks: it belongs into a
//! [`blocking_handler`](super::function::Application::blocking_handler).

use std::num::NonZeroUsize;
use std::thread;
use std::time::Duration;

use queue_core::ids::JobId;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::position::{Identity, Position, Seen};
use super::function::Context;
use super::task::{Problem, Wish};

pub mod declared;
pub mod files;
pub mod position;
#[cfg(test)]
mod resumption;
pub mod sql;
pub mod sqlite;

/// Most skipped items whose errors are kept.
const SKIPPED_KEPT: usize = 100;
/// Most bytes of one such error.
const ERROR_MAX_BYTES: usize = 256;

/// What a task has done, over all its attempts. It stands in the task's checkpoint, so it tells of what was committed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Items that were read.
    pub read_count: u64,
    /// Items that were written.
    pub write_count: u64,
    /// Items of which the processor made nothing.
    pub filter_count: u64,
    /// Items that could not be read, processed or written, and were passed over.
    pub skip_count: u64,
    /// Chunks that were written.
    pub commit_count: u64,
    /// Chunks that were not, and undone.
    pub rollback_count: u64,
}

/// An item that was passed over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Which one it was, from 1 on in the order of reading.
    pub item: u64,
    /// Why.
    pub error: String,
}

/// How far a task has come.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The same over all attempts of one run through the items, and of no other.
    pub run: String,
    /// What is read. The positions are of this and of nothing else.
    #[serde(default)]
    pub source: Identity,
    /// What is written to.
    #[serde(default)]
    pub target: Identity,
    /// What was done.
    #[serde(flatten)]
    pub counts: Counts,
    /// Where the reader goes on. `None` before the first chunk.
    pub reader: Option<Position>,
    /// Behind what the writer goes on.
    pub writer: Value,
    /// The first of the items that were passed over.
    #[serde(default)]
    pub skipped: Vec<Skipped>,
}

/// Where items come from, always in the same order.
pub trait Reader {
    /// An item.
    type Item;

    /// What it reads and how: all that its items depend on, but for the content. An attempt that is to go on with
    /// another one fails.
    fn source(&self) -> Identity;

    /// How it counts what its positions have before them: `bytes`, `rows`.
    fn unit(&self) -> &'static str;

    /// Begins at the beginning, or behind a position. It goes there by reading again all that lies before, if there is
    /// so much: what [`position`](Reader::position) says then is compared with where it was to go, and if they differ
    /// the attempt fails.
    fn open(&mut self, behind: Option<&Position>) -> Result<(), Problem>;

    /// The next item; none at the end. An error that is no wish to retry is of this one item: the next call goes on
    /// behind it.
    fn read(&mut self) -> Option<Result<Self::Item, Problem>>;

    /// The position behind the items that were read.
    fn position(&self) -> Position;
}

/// Where items go.
pub trait Writer {
    /// An item.
    type Item;

    /// What it writes to and how. An attempt that is to go on with another one fails. `None`: each attempt begins anew,
    /// for it writes all or nothing.
    fn target(&self) -> Option<Identity>;

    /// Begins behind what was committed. A writer that keeps checkpoints beside its items hands back its own: it may be
    /// later. One that keeps what it has written elsewhere finds out whether that is what it was.
    fn open(&mut self, committed: &Checkpoint) -> Result<Option<Checkpoint>, Problem>;

    /// Writes a chunk: all of it, or after an error nothing. `checkpoint` is what is saved behind it; the writer says
    /// in it behind what it goes on.
    fn write(&mut self, items: &[Self::Item], checkpoint: &mut Checkpoint) -> Result<(), Problem>;
}

impl<R: Reader + ?Sized> Reader for Box<R> {
    type Item = R::Item;

    fn source(&self) -> Identity {
        (**self).source()
    }

    fn unit(&self) -> &'static str {
        (**self).unit()
    }

    fn open(&mut self, behind: Option<&Position>) -> Result<(), Problem> {
        (**self).open(behind)
    }

    fn read(&mut self) -> Option<Result<R::Item, Problem>> {
        (**self).read()
    }

    fn position(&self) -> Position {
        (**self).position()
    }
}

impl<W: Writer + ?Sized> Writer for Box<W> {
    type Item = W::Item;

    fn target(&self) -> Option<Identity> {
        (**self).target()
    }

    fn open(&mut self, committed: &Checkpoint) -> Result<Option<Checkpoint>, Problem> {
        (**self).open(committed)
    }

    fn write(&mut self, items: &[W::Item], checkpoint: &mut Checkpoint) -> Result<(), Problem> {
        (**self).write(items, checkpoint)
    }
}

/// How items are worked on.
#[derive(Debug, Clone, Copy)]
pub struct Chunks {
    size: NonZeroUsize,
    skip_limit: u64,
    item_attempts: u32,
    pause: Duration,
}

impl Chunks {
    /// In chunks of so many items that are read, none passed over, each tried once.
    pub fn of(size: NonZeroUsize) -> Self {
        Self { size, skip_limit: 0, item_attempts: 1, pause: Duration::ZERO }
    }

    /// With so many items that may be passed over. One more fails the task. What is passed over is kept with its error;
    /// where a chunk can't be written, its halves are, and the halves of those, to find out which.
    #[must_use]
    pub fn skip_limit(self, skip_limit: u64) -> Self {
        Self { skip_limit, ..self }
    }

    /// With so many attempts at processing an item that asks for it by [`Problem::retry`], and a pause between them.
    #[must_use]
    pub fn item_attempts(self, item_attempts: u32, pause: Duration) -> Self {
        Self { item_attempts: item_attempts.max(1), pause, ..self }
    }

    /// Works through all items, and says what was done over all attempts. The processor hands back nothing for what is
    /// not to be written.
    pub fn run<R, W>(
        &self,
        context: &Context,
        reader: R,
        process: impl FnMut(&R::Item) -> Result<Option<W::Item>, Problem>,
        writer: W,
    ) -> Result<Counts, Problem>
    where
        R: Reader,
        W: Writer,
    {
        self.run_through(context, reader, process, writer).map(|ended| ended.counts)
    }

    /// The same, and says what stands behind the last item.
    pub(crate) fn run_through<R, W>(
        &self,
        context: &Context,
        mut reader: R,
        mut process: impl FnMut(&R::Item) -> Result<Option<W::Item>, Problem>,
        mut writer: W,
    ) -> Result<Checkpoint, Problem>
    where
        R: Reader,
        W: Writer,
    {
        let mut saved = opened(context, &mut reader, &mut writer)?;
        loop {
            let mut chunk = Chunk { items: Vec::with_capacity(self.size.get()), marks: Vec::new() };
            let mut next = saved.clone();
            let read = self.read(context, &mut reader, &mut process, &mut chunk, &mut next);
            let is_last = match read {
                Ok(is_last) => is_last,
                Err(problem) => return Err(undone(context, saved, problem)),
            };
            if next.counts.read_count > saved.counts.read_count {
                saved = self.commit(context, &mut writer, chunk, saved, next)?;
                context.progress(saved.counts.read_count, None, None);
            }
            if is_last {
                return Ok(saved);
            }
            if context.stop().is_cancelled() {
                return Err(Problem::retry("it was told to stop, and goes on behind what it has committed"));
            }
        }
    }

    /// Fills a chunk. Whether nothing is behind it.
    fn read<R: Reader, O>(
        &self,
        context: &Context,
        reader: &mut R,
        process: &mut impl FnMut(&R::Item) -> Result<Option<O>, Problem>,
        chunk: &mut Chunk<O>,
        next: &mut Checkpoint,
    ) -> Result<bool, Problem> {
        let mut is_last = false;
        for _ in 0..self.size.get() {
            // What was read so far is a chunk, too.
            if context.stop().is_cancelled() {
                break;
            }
            let Some(item) = reader.read() else {
                is_last = true;
                break;
            };
            next.counts.read_count += 1;
            let processed = match item {
                // It is not the item that is to blame.
                Err(problem) if matches!(problem.wish, Wish::Retry { .. }) => return Err(problem),
                Err(problem) => Err(problem),
                Ok(item) => self.processed(context, &item, process),
            };
            match processed {
                Ok(None) => next.counts.filter_count += 1,
                Ok(Some(output)) => {
                    chunk.items.push(output);
                    // Where a chunk may be written in parts, it is known behind what each stands.
                    if self.skip_limit > 0 {
                        chunk.marks.push(Mark {
                            reader: reader.position(),
                            counts: next.counts,
                            skipped: next.skipped.len(),
                        });
                    }
                }
                Err(problem) => self.skip(next, problem)?,
            }
        }
        next.reader = Some(reader.position());
        Ok(is_last)
    }

    fn processed<I, O>(
        &self,
        context: &Context,
        item: &I,
        process: &mut impl FnMut(&I) -> Result<Option<O>, Problem>,
    ) -> Result<Option<O>, Problem> {
        let mut attempt = 1;
        loop {
            match process(item) {
                Err(Problem { wish: Wish::Retry { after }, .. }) if attempt < self.item_attempts => {
                    if context.stop().is_cancelled() {
                        return Err(Problem::retry("it was told to stop"));
                    }
                    thread::sleep(after.unwrap_or(self.pause));
                    attempt += 1;
                }
                // Nobody needs to care.
                Err(Problem { wish: Wish::Ignore, .. }) => return Ok(None),
                ended => return ended,
            }
        }
    }

    /// Passes over an item, if that is allowed still.
    fn skip(&self, next: &mut Checkpoint, problem: Problem) -> Result<(), Problem> {
        let item = next.counts.read_count;
        if next.counts.skip_count >= self.skip_limit {
            let reason = match self.skip_limit {
                0 => format!("item {item}: {}", problem.reason),
                limit => format!("item {item} is one too many to be passed over, {limit} may be: {}", problem.reason),
            };
            return Err(Problem { reason, ..problem });
        }
        next.pass_over(item, &problem.reason);
        Ok(())
    }

    /// Writes a chunk and saves what is behind it.
    fn commit<W: Writer>(
        &self,
        context: &Context,
        writer: &mut W,
        chunk: Chunk<W::Item>,
        saved: Checkpoint,
        mut next: Checkpoint,
    ) -> Result<Checkpoint, Problem> {
        next.counts.write_count += chunk.items.len() as u64;
        next.counts.commit_count += 1;
        match writer.write(&chunk.items, &mut next) {
            Ok(()) => {
                context.save_blocking(&next)?;
                Ok(next)
            }
            Err(problem) if matches!(problem.wish, Wish::Retry { .. }) || self.skip_limit == 0 => {
                Err(undone(context, saved, problem))
            }
            Err(_) => self.commit_in_parts(context, writer, chunk, saved, next),
        }
    }

    /// Writes the halves of a chunk that was undone, and of those that are undone the halves again, down to the items
    /// that can't be written: they are passed over.
    fn commit_in_parts<W: Writer>(
        &self,
        context: &Context,
        writer: &mut W,
        Chunk { items, marks }: Chunk<W::Item>,
        mut saved: Checkpoint,
        whole: Checkpoint,
    ) -> Result<Checkpoint, Problem> {
        saved.counts.rollback_count += 1;
        let mut bad: Vec<(u64, String)> = Vec::new();
        // The next one last.
        let middle = items.len() / 2;
        let mut parts = vec![middle..items.len(), 0..middle];
        while let Some(part) = parts.pop() {
            let Some(mark) = part.clone().next_back().map(|last| &marks[last]) else { continue };
            let at = mark.counts.read_count;
            let skipped = whole.skipped[..mark.skipped].to_vec();
            let reader = Some(mark.reader.clone());
            let mut next =
                Checkpoint { reader, counts: mark.counts, skipped, ..Checkpoint::beginning(&whole) }.standing(&saved);
            bad.iter().for_each(|(at, error)| next.pass_over(*at, error));
            next.counts.write_count += part.len() as u64;
            next.counts.commit_count += 1;
            match writer.write(&items[part.clone()], &mut next) {
                Ok(()) => {
                    context.save_blocking(&next)?;
                    saved = next;
                }
                Err(problem) if matches!(problem.wish, Wish::Retry { .. }) => {
                    return Err(undone(context, saved, problem));
                }
                Err(problem) if part.len() == 1 => {
                    self.skip(&mut next, problem.clone()).map_err(|problem| undone(context, saved.clone(), problem))?;
                    bad.push((at, problem.reason));
                }
                Err(_) => {
                    let middle = part.start + part.len() / 2;
                    parts.extend([middle..part.end, part.start..middle]);
                }
            }
        }
        // What stands behind the last item that was written.
        let mut last = whole.standing(&saved);
        bad.iter().for_each(|(at, error)| last.pass_over(*at, error));
        writer.write(&[], &mut last)?;
        context.save_blocking(&last)?;
        Ok(last)
    }
}

impl Checkpoint {
    /// Before the first item of a run.
    fn beginning(of: &Self) -> Self {
        let Self { run, source, target, .. } = of;
        let (run, source, target) = (run.clone(), source.clone(), target.clone());
        let (counts, skipped) = (Counts::default(), Vec::new());
        Self { run, source, target, counts, reader: None, writer: Value::Null, skipped }
    }

    /// Whether it is of the same source and target, if it says of either how far that has come.
    fn belongs_to(&self, source: &Identity, target: &Identity) -> Result<(), Problem> {
        if self.reader.is_none() {
            return Ok(());
        }
        position::same("its reader", source, &self.source)?;
        position::same("its writer", target, &self.target)
    }

    /// The checkpoint that a database has of the same run, which is this one or a later one.
    fn beside(&self, own: Option<String>) -> Result<Option<Checkpoint>, Problem> {
        let read = |text: String| serde_json::from_str(&text);
        let own = own.map(read).transpose();
        let own =
            own.map_err(|error| Problem::fail(format!("its checkpoint in the database can't be read: {error}")))?;
        match (&own, self.counts.commit_count) {
            (None, 1..) => Err(Problem::fail(format!(
                "{} chunks were committed, and the database knows of none",
                self.counts.commit_count
            ))),
            _ => Ok(own),
        }
    }

    /// This place among the items, with what was really written so far.
    fn standing(mut self, saved: &Checkpoint) -> Self {
        self.writer.clone_from(&saved.writer);
        self.counts.write_count = saved.counts.write_count;
        self.counts.commit_count = saved.counts.commit_count;
        self.counts.rollback_count = saved.counts.rollback_count;
        self
    }

    fn pass_over(&mut self, item: u64, error: &str) {
        self.counts.skip_count += 1;
        if self.skipped.len() < SKIPPED_KEPT {
            let error = error[..error.floor_char_boundary(ERROR_MAX_BYTES)].to_owned();
            self.skipped.push(Skipped { item, error });
        }
    }
}

struct Chunk<T> {
    items: Vec<T>,
    /// For each item what is known behind it, where that may be needed.
    marks: Vec<Mark>,
}

/// A place within a chunk.
struct Mark {
    reader: Position,
    counts: Counts,
    /// How many of the items that were passed over stand before it.
    skipped: usize,
}

/// Opens both where they were, if that is still there. Says how far they have come.
fn opened(context: &Context, reader: &mut impl Reader, writer: &mut impl Writer) -> Result<Checkpoint, Problem> {
    let before = context.checkpoint::<Checkpoint>()?;
    let run = || JobId::generate().to_string();
    let (source, goes_on) = (reader.source(), writer.target());
    let target = goes_on.clone().unwrap_or_default();
    let run = before.as_ref().map_or_else(run, |before| before.run.clone());
    let begun = Checkpoint { run, source, target, ..Checkpoint::default() };
    let Checkpoint { source, target, .. } = &begun;
    let mut saved = match (before, &goes_on) {
        (Some(before), Some(_)) if before.reader.is_some() => before,
        (before, _) => {
            let rollback_count = before.map_or(0, |before| before.counts.rollback_count);
            Checkpoint { counts: Counts { rollback_count, ..Counts::default() }, ..begun.clone() }
        }
    };
    saved.belongs_to(source, target)?;
    // Before anything is written, so that whoever writes knows its own again.
    context.save_blocking(&saved)?;
    if let Some(own) = writer.open(&saved)? {
        own.belongs_to(source, target)?;
        let rollback_count = saved.counts.rollback_count.max(own.counts.rollback_count);
        let own = Checkpoint { counts: Counts { rollback_count, ..own.counts }, ..own };
        // What was committed counts, also if nothing more is.
        if own != saved {
            context.save_blocking(&own)?;
            saved = own;
        }
    }
    reader.open(saved.reader.as_ref())?;
    if let Some(was) = &saved.reader {
        position::agree(&source.subject(), reader.unit(), &reader.position(), was)?;
    }
    Ok(saved)
}

/// Counts that a chunk was undone. What can't be saved is not worth another error.
fn undone(context: &Context, mut saved: Checkpoint, problem: Problem) -> Problem {
    saved.counts.rollback_count += 1;
    if let Err(unsaved) = context.save_blocking(&saved) {
        tracing::debug!(reason = unsaved.reason, "a rollback was not counted");
    }
    problem
}

/// Reads what a function makes anew each time, in the same order: a list, a stream. Who goes on passes over what was
/// read, and compares it as JSON.
pub fn items<I>(make: impl Fn() -> I) -> impl Reader<Item = I::Item>
where
    I: Iterator,
    I::Item: Serialize,
{
    Items { make, from: None, seen: Seen::default() }
}

struct Items<F, I> {
    make: F,
    from: Option<I>,
    seen: Seen,
}

impl<F, I: Iterator> Items<F, I>
where
    I::Item: Serialize,
{
    fn next(&mut self) -> Result<Option<I::Item>, Problem> {
        let Some(item) = self.from.as_mut().and_then(Iterator::next) else { return Ok(None) };
        let unwritten = |error| Problem::retry(format!("an item that is read has no form in JSON: {error}"));
        // A map within it has its entries in another order each time.
        let mut value = serde_json::to_value(&item).map_err(unwritten)?;
        value.sort_all_objects();
        self.seen.add_item(value.to_string().as_bytes());
        Ok(Some(item))
    }
}

impl<I: Iterator, F: Fn() -> I> Reader for Items<F, I>
where
    I::Item: Serialize,
{
    type Item = I::Item;

    fn source(&self) -> Identity {
        Identity::of("items")
    }

    fn unit(&self) -> &'static str {
        "items"
    }

    fn open(&mut self, behind: Option<&Position>) -> Result<(), Problem> {
        self.from = Some((self.make)());
        self.seen = Seen::default();
        while behind.is_some_and(|behind| self.seen.length() < behind.length) && self.next()?.is_some() {}
        Ok(())
    }

    fn read(&mut self) -> Option<Result<I::Item, Problem>> {
        self.next().transpose()
    }

    fn position(&self) -> Position {
        self.seen.position(Value::Null)
    }
}

/// Gives each chunk to a function. It may get a chunk again whose checkpoint was not saved.
pub fn call<T>(write: impl FnMut(&[T]) -> Result<(), Problem>) -> impl Writer<Item = T> {
    Call { write, of: std::marker::PhantomData }
}

struct Call<F, T> {
    write: F,
    of: std::marker::PhantomData<fn(T)>,
}

impl<T, F: FnMut(&[T]) -> Result<(), Problem>> Writer for Call<F, T> {
    type Item = T;

    fn target(&self) -> Option<Identity> {
        Some(Identity::of("call"))
    }

    fn open(&mut self, _: &Checkpoint) -> Result<Option<Checkpoint>, Problem> {
        Ok(None)
    }

    fn write(&mut self, items: &[T], _: &mut Checkpoint) -> Result<(), Problem> {
        match items.is_empty() {
            true => Ok(()),
            false => (self.write)(items),
        }
    }
}

/// Most bytes of the items of a list, as JSON.
const LIST_MAX_BYTES: usize = 48 << 10;

/// Keeps items in the checkpoint, for few and small ones: each is there once, whatever happens. A step that is declared
/// so has them as its result.
pub fn list_to<T: Serialize>() -> impl Writer<Item = T> {
    List(std::marker::PhantomData)
}

struct List<T>(std::marker::PhantomData<fn(T)>);

impl<T: Serialize> Writer for List<T> {
    type Item = T;

    fn target(&self) -> Option<Identity> {
        Some(Identity::of("list"))
    }

    fn open(&mut self, _: &Checkpoint) -> Result<Option<Checkpoint>, Problem> {
        Ok(None)
    }

    fn write(&mut self, items: &[T], checkpoint: &mut Checkpoint) -> Result<(), Problem> {
        let unwritten = |error: serde_json::Error| Problem::fail(error.to_string());
        let new = items.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>().map_err(unwritten)?;
        let mut list = checkpoint.writer.as_array().cloned().unwrap_or_default();
        list.extend(new);
        let bytes = serde_json::to_vec(&list).map_err(unwritten)?.len();
        if bytes > LIST_MAX_BYTES {
            let reason = format!(
                "a list of {bytes} bytes is too long, {LIST_MAX_BYTES} are allowed: write to a file or a database"
            );
            return Err(Problem::fail(reason));
        }
        checkpoint.writer = list.into();
        Ok(())
    }
}
