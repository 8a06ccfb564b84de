//! Programs that stay: a pool of processes, each of which gets one task after the other as a line of JSON and answers with
//! another. `docs/handlers.md` is the contract with their authors.
//!
//! A process is in one hand at a time: that of the task that it works on, or that of a small keeper while it waits for the
//! next. Whoever drops it kills it, so a task that is dropped in the middle leaves nothing behind.
//!
//! A process that breaks the rules (no JSON, a line without end, an answer to nobody) is killed, for what it says next can't be
//! trusted; the task fails and says why. One that ends in the middle of a task gets that task another attempt.
//!
//! Of rows it is given one after the other as if each were a task, or several in one line if it asks for that. A process keeps
//! the rows of one chunk to their end. When one ends in the middle of a line, all its rows are tried again, each in a line
//! of its own then: the one that ended it meets its fate alone.

use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroUsize;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use futures::FutureExt;
use futures::future::join_all;
use queue_core::model::retry::RetryPolicy;
use queue_core::model::task::{Encoding, Payload};
use serde_json::Value;
use tokio::process::ChildStdout;
use tokio::sync::{Mutex, Semaphore, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::process::{LEFTOVERS, Line, Lines, Outbox, Process, Recipe, Said};
use super::rows::{BatchEnd, Feed, NoDesk, RowAnswer, RowsEnd, answer_of};
use super::task::{Desk, Handler, Outcome, Output, Problem, Task, Wish};

mod lines;

use lines::{RowsWriter, Says, is_ready, line_of, mark_done_line, read, read_rows, saved_line, shown};

/// A process that is not heard of and still runs after this time has started: it need not say so.
const STARTED_AFTER: Duration = Duration::from_secs(1);
/// The first pause after a process that ended before it had answered anything, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));
/// After so many of them in a row no more tasks are taken until one has started.
const HOPELESS: u64 = 3;

/// About so many bytes of input go into one line of rows.
const ROWS_MAX_BYTES: usize = 256 << 10;

/// Why a task that was stopped before it had a process was not begun.
const IN_VAIN: &str = "it has waited for a process in vain";

/// How a program is run.
#[derive(Debug, Clone, PartialEq)]
pub struct ProgramSettings {
    /// What it is called in logs.
    pub name: String,
    /// How its processes are started.
    pub recipe: Recipe,
    /// Their arguments.
    pub args: Vec<String>,
    /// Most processes at the same time.
    pub size: NonZeroUsize,
    /// How long a task may go on after its cancel line, before its process group gets SIGTERM.
    pub cancel_grace: Duration,
    /// How long the group may go on after that, before it gets SIGKILL.
    pub kill_grace: Duration,
    /// Longest line that is read, in bytes.
    pub max_output: usize,
    /// Most rows in one line; without it each is handed over as a task.
    pub rows: Option<NonZeroUsize>,
    /// Whether it is told of the end of batches.
    pub mark_done: bool,
}

/// A [`Handler`] whose tasks go to processes that stay.
pub struct Program {
    settings: ProgramSettings,
    /// A permit for each process that may be at work. A process exists only in the hand of who holds one, or idle.
    size: Semaphore,
    idle: Mutex<Vec<Idle>>,
    backoff: Mutex<Backoff>,
    calls: AtomicU64,
}

/// When the next process may be started.
#[derive(Debug, Default)]
struct Backoff {
    /// So many processes in a row ended before they had answered anything.
    failed: u64,
    not_before: Option<Instant>,
}

/// A process of the pool.
struct Member {
    process: Process,
    stdin: Outbox,
    stdout: Lines<ChildStdout>,
    stderr: Said,
    /// It has answered a task.
    proven: bool,
    /// It has said something about the line that it has: it has read it.
    has_spoken: bool,
}

/// How a process's work on a line ended.
enum Turn<T> {
    /// With an answer; the process can go on.
    Answered(Outcome<T>),
    /// Without one, because of what the process did. It is done for.
    Broken(Problem),
    /// Without one, because it was told to stop.
    Stopped,
}

/// Reads a line: an answer, something by the way, or a breach of the rules.
trait Reader<T>: Fn(&Line) -> Result<Says<T>, Problem> + Sync {}
impl<T, F: Fn(&Line) -> Result<Says<T>, Problem> + Sync> Reader<T> for F {}

/// Saves what a program wants to go on from, as its task is written.
async fn save(desk: &dyn Desk, encoding: Encoding, value: &Value) -> Result<(), Problem> {
    let checkpoint = Payload::write(encoding, value)
        .map_err(|error| Problem::fail(format!("the program's checkpoint can't be written: {error}")))?;
    desk.save(checkpoint).await
}

/// How far the end of a task has come that is to stop.
#[derive(Clone, Copy, PartialEq)]
enum Stopping {
    No,
    Cancelled,
    Terminated,
}

impl Member {
    /// Has a line worked on, and each line that comes back read.
    async fn work<T>(
        &mut self,
        (call, line, encoding): (u64, &str, Encoding),
        settings: &ProgramSettings,
        desk: &dyn Desk,
        stop: &CancellationToken,
        read: &impl Reader<T>,
    ) -> Turn<T> {
        self.stderr.forget();
        self.has_spoken = false;
        self.stdin.push(line.as_bytes());
        let mut stopping = Stopping::No;
        let mut patience = Instant::now();
        let broken = loop {
            tokio::select! {
                () = stop.cancelled(), if stopping == Stopping::No => {
                    self.stdin.push(format!("{{\"type\":\"cancel\",\"id\":{call}}}\n").as_bytes());
                    stopping = Stopping::Cancelled;
                    patience = Instant::now() + settings.cancel_grace;
                }
                () = sleep_until(patience), if stopping == Stopping::Cancelled => {
                    self.process.terminate();
                    stopping = Stopping::Terminated;
                    patience = Instant::now() + settings.kill_grace;
                }
                () = sleep_until(patience), if stopping == Stopping::Terminated => return Turn::Stopped,
                written = self.stdin.flush(), if self.stdin.is_pending() => match written {
                    Err(_) if stopping == Stopping::No => {
                        break self.lost("closed its standard input", desk).await;
                    }
                    _ => {}
                },
                said = self.stderr.next(), if !self.stderr.is_closed() => {
                    said.inspect(|said| desk.log(said));
                }
                line = self.stdout.next() => {
                    let Some(line) = line else {
                        break self.lost("closed its standard output", desk).await;
                    };
                    let said = read(&line);
                    self.has_spoken |= said.is_ok();
                    match said {
                        Ok(Says::Aside) => {}
                        Ok(Says::Save(value)) => match save(desk, encoding, &value).await {
                            Ok(()) => self.stdin.push(saved_line(call).as_bytes()),
                            // It must not go on.
                            Err(problem) => break problem,
                        },
                        Ok(Says::Answer(outcome)) => {
                            self.hear(desk);
                            return Turn::Answered(outcome);
                        }
                        Err(problem) => break problem,
                    }
                }
                _ = self.process.ended() => match self.last_answer(desk, encoding, read).await {
                    Ok(Some(outcome)) => return Turn::Answered(outcome),
                    Ok(None) => break self.lost("", desk).await,
                    Err(problem) => break problem,
                },
            }
        };
        if stopping == Stopping::No { Turn::Broken(broken) } else { Turn::Stopped }
    }

    /// An answer that the process wrote before it ended.
    async fn last_answer<T>(
        &mut self,
        desk: &dyn Desk,
        encoding: Encoding,
        read: &impl Reader<T>,
    ) -> Result<Option<Outcome<T>>, Problem> {
        let rest = async {
            while let Some(line) = self.stdout.next().await {
                let said = read(&line)?;
                self.has_spoken = true;
                match said {
                    Says::Aside => {}
                    Says::Save(value) => save(desk, encoding, &value).await?,
                    Says::Answer(outcome) => return Ok(Some(outcome)),
                }
            }
            Ok(None)
        };
        timeout(LEFTOVERS, rest).await.unwrap_or(Ok(None))
    }

    /// The process is lost in the middle of a task. How it ended tells more than the pipe that closed first, but it may also
    /// live on without it.
    async fn lost(&mut self, closed: &str, desk: &dyn Desk) -> Problem {
        let what = match timeout(LEFTOVERS, self.process.ended()).await {
            Ok(end) => end.to_string(),
            Err(_) => closed.to_owned(),
        };
        let rest = async {
            while let Some(said) = self.stderr.next().await {
                desk.log(&said);
            }
        };
        let _ = timeout(LEFTOVERS, rest).await;
        Problem::retry(format!("the program {what} before it had answered{}", self.stderr.last_words()))
    }

    /// Passes on what lies in the pipe: it was said before the answer that has just been read.
    fn hear(&mut self, desk: &dyn Desk) {
        while let Some(Some(said)) = self.stderr.next().now_or_never() {
            desk.log(&said);
        }
    }

    /// Waits until it has started: it says that it is ready, or goes on for a moment.
    async fn started(&mut self, name: &str) -> Result<(), String> {
        let pid = self.process.id();
        let first = async {
            loop {
                tokio::select! {
                    said = self.stderr.next(), if !self.stderr.is_closed() => if let Some(line) = said {
                        tracing::info!(handler = name, pid, line, "a program says");
                    },
                    line = self.stdout.next() => return line,
                }
            }
        };
        let what = match timeout(STARTED_AFTER, first).await {
            Err(_) => return Ok(()),
            Ok(Some(line)) if is_ready(&line) => return Ok(()),
            Ok(Some(line)) => format!("said {} before it had a task", shown(&line.bytes)),
            Ok(None) => match timeout(LEFTOVERS, self.process.ended()).await {
                Ok(end) => end.to_string(),
                Err(_) => "closed its standard output".into(),
            },
        };
        let _ = timeout(LEFTOVERS, async { while self.stderr.next().await.is_some() {} }).await;
        Err(format!("the program {what}{}", self.stderr.last_words()))
    }

    /// Ends it: by the end of its input, SIGTERM, SIGKILL.
    async fn retire(mut self, settings: &ProgramSettings) {
        self.stdin.close();
        let mut end = async || {
            loop {
                tokio::select! {
                    _ = self.process.ended() => return,
                    // Read, lest it hang in a full pipe.
                    _ = self.stdout.next(), if !self.stdout.is_closed() => {}
                    _ = self.stderr.next(), if !self.stderr.is_closed() => {}
                }
            }
        };
        if timeout(settings.cancel_grace, end()).await.is_ok() {
            return;
        }
        self.process.terminate();
        if timeout(settings.kill_grace, self.process.ended()).await.is_err() {
            self.process.kill().await;
        }
    }
}

/// A process that waits for a task, with the keeper that has it.
struct Idle {
    claim: oneshot::Sender<()>,
    keeper: JoinHandle<Option<Member>>,
}

impl Idle {
    fn new(member: Member, name: String) -> Self {
        let (claim, claimed) = oneshot::channel();
        Self { claim, keeper: tokio::spawn(keep(member, name, claimed)) }
    }

    /// The process, if it can still be used.
    async fn take(self) -> Option<Member> {
        let _ = self.claim.send(());
        self.keeper.await.ok().flatten()
    }
}

/// Has a process until it is claimed or nobody will claim it any more; `None` if it can't be used any more.
async fn keep(mut member: Member, name: String, mut claimed: oneshot::Receiver<()>) -> Option<Member> {
    let pid = member.process.id();
    let what = loop {
        tokio::select! {
            biased;
            line = member.stdout.next() => match line {
                Some(line) if is_ready(&line) => {}
                Some(line) => break format!("said {} while it had no task", shown(&line.bytes)),
                None => match timeout(LEFTOVERS, member.process.ended()).await {
                    Ok(end) => break end.to_string(),
                    Err(_) => break "closed its standard output".into(),
                },
            },
            end = member.process.ended() => break end.to_string(),
            _ = &mut claimed => return Some(member),
            said = member.stderr.next(), if !member.stderr.is_closed() => if let Some(line) = said {
                tracing::info!(handler = name, pid, line, "a program says");
            },
        }
    };
    tracing::warn!(
        handler = name,
        pid,
        "an idle program {what}{}, another is started when it is needed",
        member.stderr.last_words()
    );
    member.process.kill().await;
    None
}

impl Program {
    /// A pool without a process: they are started when they are needed.
    pub fn new(settings: ProgramSettings) -> Self {
        Self {
            size: Semaphore::new(settings.size.get()),
            settings,
            idle: Mutex::default(),
            backoff: Mutex::default(),
            calls: AtomicU64::new(1),
        }
    }

    /// A process that waits, for whoever holds a permit.
    async fn idle_member(&self) -> Option<Member> {
        loop {
            let idle = self.idle.lock().await.pop()?;
            if let Some(member) = idle.take().await {
                return Some(member);
            }
        }
    }

    /// A process for whoever holds a permit: one that waits, or a new one; or why there is none.
    async fn member(&self, stop: &CancellationToken) -> Result<Member, String> {
        if let Some(member) = self.idle_member().await {
            return Ok(member);
        }
        let not_before = self.backoff.lock().await.not_before;
        if let Some(instant) = not_before
            && stop.run_until_cancelled(sleep_until(instant)).await.is_none()
        {
            return Err(IN_VAIN.into());
        }
        match self.spawn().await {
            Ok(member) => Ok(member),
            Err(reason) => {
                self.note(false).await;
                Err(reason)
            }
        }
    }

    async fn spawn(&self) -> Result<Member, String> {
        let ProgramSettings { name, recipe, args, max_output, .. } = &self.settings;
        let started = recipe.start(args.iter().map(String::as_str), Stdio::piped()).await;
        let started = started.map_err(|error| format!("{} cannot be started: {error}", recipe.program))?;
        tracing::debug!(handler = name, pid = started.process.id(), "a program was started");
        Ok(Member {
            process: started.process,
            stdin: Outbox::new(started.stdin),
            stdout: Lines::new(started.stdout, *max_output),
            stderr: Said::new(started.stderr),
            proven: false,
            has_spoken: false,
        })
    }

    /// Notes whether a process has answered something before it ended. If not, the next one waits a little, then longer: a
    /// program that cannot even start must not use up the machine, nor the attempts of all tasks at once.
    async fn note(&self, proven: bool) {
        let mut backoff = self.backoff.lock().await;
        if proven {
            *backoff = Backoff::default();
        } else {
            backoff.failed += 1;
            let policy = RetryPolicy { delay: PAUSE.0, delay_max: PAUSE.1, ..RetryPolicy::default() };
            let pause = policy.pause(backoff.failed, RandomState::new().hash_one(backoff.failed));
            backoff.not_before = Some(Instant::now() + pause);
        }
    }

    async fn shelve(&self, member: Member) {
        self.idle.lock().await.push(Idle::new(member, self.settings.name.clone()));
    }

    fn next_call(&self) -> u64 {
        self.calls.fetch_add(1, Ordering::Relaxed)
    }

    /// Has a line answered by the process in hand, or by another one that is then in hand, for whoever holds a permit.
    async fn ask<T>(
        &self,
        hand: &mut Option<Member>,
        line: (u64, &str, Encoding),
        desk: &dyn Desk,
        stop: &CancellationToken,
        read: impl Reader<T>,
    ) -> Outcome<T> {
        loop {
            let mut member = match hand.take() {
                Some(member) => member,
                None => match self.member(stop).await {
                    Ok(member) => member,
                    Err(reason) => return Outcome::NotReady(reason),
                },
            };
            let turn = member.work(line, &self.settings, desk, stop, &read).await;
            match turn {
                Turn::Answered(outcome) => {
                    member.proven = true;
                    self.note(true).await;
                    *hand = Some(member);
                    return outcome;
                }
                Turn::Broken(problem) => {
                    let Member { process, stdin, proven, has_spoken, .. } = member;
                    process.kill().await;
                    let unread = !has_spoken && stdin.is_unread();
                    // It was about to end when it was given the task, as one does that has answered enough, and has seen
                    // nothing of it.
                    if proven && unread {
                        continue;
                    }
                    if !proven {
                        self.note(false).await;
                    }
                    return match problem.wish {
                        // It could not even start: its file is gone, or has a fault.
                        Wish::Retry { .. } if unread => Outcome::NotReady(problem.reason),
                        _ => Outcome::Failed(problem),
                    };
                }
                Turn::Stopped => {
                    member.process.kill().await;
                    return Outcome::Stopped;
                }
            }
        }
    }

    /// Has one line answered.
    async fn ask_once(
        &self,
        (call, line, encoding): (u64, String, Encoding),
        desk: &dyn Desk,
        stop: &CancellationToken,
    ) -> Outcome {
        let Some(permit) = stop.run_until_cancelled(self.size.acquire()).await else {
            return Outcome::NotReady(IN_VAIN.into());
        };
        let _permit = permit.expect("the semaphore is never closed");
        let mut hand = None;
        let outcome =
            self.ask(&mut hand, (call, &line, encoding), desk, stop, |line: &Line| read(line, call, desk)).await;
        if let Some(member) = hand {
            self.shelve(member).await;
        }
        outcome
    }

    /// Works on rows until there are no more, with the process in hand or others.
    async fn rows(&self, hand: &mut Option<Member>, feed: &Feed, stop: &CancellationToken) -> RowsEnd {
        let writer = self.settings.rows.map(|most| (most.get(), RowsWriter::new(feed.of())));
        while !stop.is_cancelled() && feed.has_more() {
            // No row is begun before there is a process for it.
            if hand.is_none() {
                match self.member(stop).await {
                    Ok(member) => *hand = Some(member),
                    Err(_) if stop.is_cancelled() => return RowsEnd::Over,
                    Err(reason) => return RowsEnd::NotReady(reason),
                }
            }
            let handled = match &writer {
                Some((most, Ok(writer))) => self.some_rows(hand, *most, writer, feed, stop).await,
                Some((_, Err(reason))) => {
                    if let Some(row) = feed.next() {
                        feed.answer(row.place, RowAnswer::Failed(Problem::fail(reason)));
                    }
                    Ok(())
                }
                None => self.one_row(hand, feed, stop).await,
            };
            if let Err(end) = handled {
                return end;
            }
        }
        RowsEnd::Over
    }

    /// Hands over the next row as a task.
    async fn one_row(&self, hand: &mut Option<Member>, feed: &Feed, stop: &CancellationToken) -> Result<(), RowsEnd> {
        let Some(row) = feed.next() else { return Ok(()) };
        let (place, call) = (row.place, self.next_call());
        let outcome = match line_of(call, &feed.task_of(row)) {
            Ok(line) => {
                let line = (call, line.as_str(), feed.of().encoding);
                self.ask(hand, line, &NoDesk, stop, |line: &Line| read(line, call, &NoDesk)).await
            }
            Err(reason) => Outcome::Failed(Problem::fail(reason)),
        };
        feed.answer_unless_cut_short(place, answer_of(outcome, feed.of().encoding)?, stop);
        Ok(())
    }

    /// Hands over the next rows, up to so many, in one line. Rows that were tried before come one by one.
    async fn some_rows(
        &self,
        hand: &mut Option<Member>,
        most: usize,
        writer: &RowsWriter,
        feed: &Feed,
        stop: &CancellationToken,
    ) -> Result<(), RowsEnd> {
        let of = feed.of();
        let most = if of.attempt > 1 { 1 } else { most };
        let rows = feed.next_some(most, ROWS_MAX_BYTES);
        let call = self.next_call();
        let refuse = |place, reason: String| feed.answer(place, RowAnswer::Failed(Problem::fail(reason)));
        let (line, places) = writer.line(call, rows, of, refuse);
        if places.is_empty() {
            return Ok(());
        }
        let count = places.len();
        let outcome = match line {
            Ok(line) => {
                let read = |line: &Line| read_rows(line, call, count, of.encoding, &NoDesk);
                self.ask(hand, (call, &line, of.encoding), &NoDesk, stop, read).await
            }
            Err(reason) => Outcome::Failed(Problem::fail(reason)),
        };
        let answers = match outcome {
            Outcome::Done(answers) => answers,
            Outcome::Failed(problem) => vec![answer_of(Outcome::Failed(problem), of.encoding)?; count],
            Outcome::NotReady(reason) => return Err(RowsEnd::NotReady(reason)),
            Outcome::Stopped => return Err(RowsEnd::Over),
        };
        for (place, answer) in places.into_iter().zip(answers) {
            feed.answer_unless_cut_short(place, answer, stop);
        }
        Ok(())
    }
}

#[async_trait]
impl Handler for Program {
    async fn run(&self, task: Task, desk: Arc<dyn Desk>, stop: CancellationToken) -> Outcome {
        let call = self.next_call();
        match line_of(call, &task) {
            Ok(line) => {
                let encoding = task.input.encoding;
                drop(task);
                self.ask_once((call, line, encoding), &*desk, &stop).await
            }
            Err(reason) => Outcome::Failed(Problem::fail(reason)),
        }
    }

    async fn run_rows(&self, feed: Arc<Feed>, stop: CancellationToken) -> RowsEnd {
        let Some(permit) = stop.run_until_cancelled(self.size.acquire()).await else { return RowsEnd::Over };
        let _permit = permit.expect("the semaphore is never closed");
        let mut hand = None;
        let end = self.rows(&mut hand, &feed, &stop).await;
        if let Some(member) = hand {
            self.shelve(member).await;
        }
        end
    }

    async fn mark_done(&self, end: BatchEnd, stop: CancellationToken) -> Outcome {
        if !self.settings.mark_done {
            return Outcome::Done(Output::default());
        }
        let call = self.next_call();
        match mark_done_line(call, &end) {
            Ok(line) => self.ask_once((call, line, Encoding::Json), &NoDesk, &stop).await,
            Err(reason) => Outcome::Failed(Problem::fail(reason)),
        }
    }

    fn concurrency(&self) -> Option<usize> {
        Some(self.settings.size.get())
    }

    fn stop_grace(&self) -> Duration {
        self.settings.cancel_grace + self.settings.kill_grace + 4 * LEFTOVERS
    }

    /// Starts a process if none waits, to see whether that works at all.
    async fn start(&self) -> Result<(), String> {
        self.settings.recipe.look()?;
        let _permit = self.size.acquire().await.expect("the semaphore is never closed");
        let member = match self.idle_member().await {
            Some(member) => member,
            None => {
                let mut member = self.spawn().await?;
                member.started(&self.settings.name).await?;
                member
            }
        };
        self.note(true).await;
        self.shelve(member).await;
        Ok(())
    }

    async fn check(&self) -> Result<(), String> {
        self.settings.recipe.look()?;
        match self.backoff.lock().await.failed {
            0..HOPELESS => Ok(()),
            failed => Err(format!("{failed} processes in a row ended before they had answered anything")),
        }
    }

    async fn close(&self) {
        let idle = std::mem::take(&mut *self.idle.lock().await);
        let end = async |idle: Idle| {
            if let Some(member) = idle.take().await {
                member.retire(&self.settings).await;
            }
        };
        join_all(idle.into_iter().map(end)).await;
    }
}
