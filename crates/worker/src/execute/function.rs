//! Handlers in Rust: closures over what their application has opened, with typed input and output.
//!
//! The same closure runs tasks and rows of batches. Of rows there may be millions, so what they have in common is fetched
//! once for many of them, and a row that asks for nothing special costs little more than its own work.

use std::any::type_name;
use std::collections::BTreeMap;
use std::future::Future;
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::FutureExt;
use queue_core::ids::{App, IdError, JobId, Op, User};
use queue_core::model::chunk::RowsTo;
use queue_core::model::task::{Message, Payload, Progress};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::handlers::Registration;
use super::rows::{BatchEnd, BegunRow, Feed, NoDesk, RowAnswer, RowsEnd};
use super::task::{Desk, Handler, Outcome, Output, Problem, RowOf, RowSink, Task, Wish};

/// What went wrong, of any type.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What the handlers of an application share: a pool of connections, a client, a model in memory.
#[async_trait]
pub trait Resource: Send + Sync + 'static {
    /// What is shared.
    type Of: Send + Sync + 'static;

    /// Whether there is anything to share.
    const IS_SHARED: bool = true;

    /// Opens it: once for all handlers of the application. A failure is tried again, and no task is taken meanwhile.
    async fn open(&self) -> Result<Self::Of, BoxError>;

    /// Whether it is still of use. One that is not is opened anew; tasks that run keep the old one until they end.
    async fn check(&self, _of: &Self::Of) -> Result<(), BoxError> {
        Ok(())
    }

    /// Closes one that nobody uses any more.
    async fn close(&self, _of: Self::Of) {}
}

#[async_trait]
impl<R, F, Fut> Resource for F
where
    R: Send + Sync + 'static,
    F: Fn() -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<R, BoxError>> + Send,
{
    type Of = R;

    async fn open(&self) -> Result<R, BoxError> {
        self().await
    }
}

/// Nothing is shared.
#[derive(Debug, Clone, Copy)]
pub struct Nothing;

#[async_trait]
impl Resource for Nothing {
    type Of = ();
    const IS_SHARED: bool = false;

    async fn open(&self) -> Result<(), BoxError> {
        Ok(())
    }
}

/// An application's open resource, in the hands of a handler. It is not closed while somebody holds one.
pub struct Shared<R: Resource>(Arc<Open<R>>);

impl<R: Resource> Clone for Shared<R> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<R: Resource> Deref for Shared<R> {
    type Target = R::Of;

    fn deref(&self) -> &R::Of {
        self.0.of.as_ref().expect("is open until nobody holds it")
    }
}

struct Open<R: Resource> {
    /// `None` once it is on its way to be closed.
    of: Option<R::Of>,
    /// A check has found it of no use: whoever asks next opens another one.
    is_spent: AtomicBool,
    resource: Arc<R>,
    closing: TaskTracker,
}

impl<R: Resource> Drop for Open<R> {
    fn drop(&mut self) {
        if let (Some(of), Ok(runtime)) = (self.of.take(), tokio::runtime::Handle::try_current()) {
            let resource = self.resource.clone();
            self.closing.spawn_on(async move { resource.close(of).await }, &runtime);
        }
    }
}

/// Opens an application's resource once, for all its handlers.
struct Opener<R: Resource> {
    resource: Arc<R>,
    open: tokio::sync::Mutex<Option<Arc<Open<R>>>>,
    closing: TaskTracker,
}

impl<R: Resource> Opener<R> {
    async fn get(&self) -> Result<Shared<R>, String> {
        let mut open = self.open.lock().await;
        open.take_if(|open| open.is_spent.load(Ordering::SeqCst));
        if open.is_none() {
            // No task is to pay for a panic of what was there before it.
            let opened = AssertUnwindSafe(self.resource.open()).catch_unwind().await;
            let of =
                opened.map_err(|_| "what it shares panicked when it was opened")?.map_err(|error| chain(&*error))?;
            let (resource, closing) = (self.resource.clone(), self.closing.clone());
            *open = Some(Arc::new(Open { of: Some(of), is_spent: false.into(), resource, closing }));
        }
        Ok(Shared(open.clone().expect("was opened")))
    }

    /// Asks whether the resource is of use. One whose check fails, panics, or is given up is not.
    async fn check(&self) -> Result<(), String> {
        let shared = self.get().await?;
        let asked = Asked(&shared.0);
        self.resource.check(&shared).await.map_err(|error| chain(&*error))?;
        asked.answered_well();
        Ok(())
    }

    async fn close(&self) {
        drop(self.open.lock().await.take());
        self.closing.close();
        self.closing.wait().await;
    }
}

/// A question to a resource how it is: spent, unless it says that it is well.
struct Asked<'a, R: Resource>(&'a Open<R>);

impl<R: Resource> Asked<'_, R> {
    fn answered_well(self) {
        std::mem::forget(self);
    }
}

impl<R: Resource> Drop for Asked<'_, R> {
    fn drop(&mut self) {
        self.0.is_spent.store(true, Ordering::SeqCst);
    }
}

/// An error with its causes.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// Any error is a problem that another attempt may not have. Say [`Problem::fail`] or [`Problem::ignore`] where that is known
/// better.
impl<E: std::error::Error + 'static> From<E> for Problem {
    fn from(error: E) -> Self {
        Problem::retry(chain(&error))
    }
}

impl Problem {
    /// The same, and not before so long.
    #[must_use]
    pub fn after(self, pause: Duration) -> Self {
        Self { wish: Wish::Retry { after: Some(pause) }, ..self }
    }

    /// The same with a message for programs.
    #[must_use]
    pub fn with(mut self, message: Message) -> Self {
        self.messages.push(message);
        self
    }
}

/// What a handler knows of the task that it runs, and how it tells of its work.
#[derive(Clone)]
pub struct Context(Arc<Call>);

struct Call {
    task: Task,
    desk: Arc<dyn Desk>,
    stop: CancellationToken,
    ends: Instant,
    said: Mutex<Said>,
}

#[derive(Default)]
struct Said {
    messages: Vec<Message>,
    files: BTreeMap<String, Vec<u8>>,
}

impl Context {
    /// Its time runs from `begun` on.
    pub(super) fn new(task: Task, desk: Arc<dyn Desk>, stop: CancellationToken, begun: Instant) -> Self {
        let ends = end_of(begun, task.timeout);
        Self(Arc::new(Call { task, desk, stop, ends, said: Mutex::default() }))
    }

    /// The job's id; of a row, its batch's.
    pub fn job(&self) -> &JobId {
        &self.0.task.job
    }

    /// Its owner.
    pub fn user(&self) -> &User {
        &self.0.task.user
    }

    /// The row's line in its batch, from 1 on; `None` for a task that is no row.
    pub fn line(&self) -> Option<u64> {
        self.0.task.row.map(|row| row.line)
    }

    /// Greater than that of every earlier holder of the job, see [`Task::fence`].
    pub fn fence(&self) -> u64 {
        self.0.task.fence.0
    }

    /// Which attempt this is, from 1 on.
    pub fn attempt(&self) -> u64 {
        self.0.task.attempt
    }

    /// Whether another attempt is allowed after this one.
    pub fn is_last_attempt(&self) -> bool {
        self.0.task.attempt >= u64::from(self.0.task.max_attempts)
    }

    /// All that the task says.
    pub fn task(&self) -> &Task {
        &self.0.task
    }

    /// What the submitter says besides the input.
    pub fn context<T: DeserializeOwned>(&self) -> Result<Option<T>, Problem> {
        let read = |payload: &Payload| payload.read().map_err(|error| Problem::fail(format!("its context: {error}")));
        self.0.task.context.as_ref().map(read).transpose()
    }

    /// Fires when the task is to stop: somebody cancels it, its time is over, the worker ends.
    pub fn stop(&self) -> &CancellationToken {
        &self.0.stop
    }

    /// How long the task may still run.
    pub fn time_left(&self) -> Duration {
        self.0.ends.saturating_duration_since(Instant::now())
    }

    /// Tells how far the work has come: so much of so much. A row has no progress of its own.
    pub fn progress(&self, done: u64, total: Option<u64>, note: Option<&str>) {
        self.0.desk.progress(Progress { done, total, note: note.map(str::to_owned) });
    }

    /// What an earlier attempt saved, if one did: the work goes on from there.
    pub fn checkpoint<T: DeserializeOwned>(&self) -> Result<Option<T>, Problem> {
        let read =
            |payload: &Payload| payload.read().map_err(|error| Problem::fail(format!("its checkpoint: {error}")));
        self.0.task.checkpoint.as_ref().map(read).transpose()
    }

    /// Saves how far the work has come, so that another attempt goes on from there: after an error, the loss of this worker, a drain, or
    /// in a later execution of its flow. At most [`queue_core::job::CHECKPOINT_MAX_BYTES`]. It is kept when this returns. After an error the
    /// work must not go on: hand it back with `?`. A row has no checkpoint.
    pub async fn save<T: Serialize + ?Sized>(&self, checkpoint: &T) -> Result<(), Problem> {
        let encoding = self.0.task.input.encoding;
        let checkpoint = Payload::write(encoding, checkpoint)
            .map_err(|error| Problem::fail(format!("its checkpoint can't be written: {error}")))?;
        self.0.desk.save(checkpoint).await
    }

    /// The same for code that blocks.
    pub fn save_blocking<T: Serialize + ?Sized>(&self, checkpoint: &T) -> Result<(), Problem> {
        tokio::runtime::Handle::current().block_on(self.save(checkpoint))
    }

    /// Keeps a line with the job. The newest some KiB of them are kept; those of rows are not.
    pub fn log(&self, line: &str) {
        self.0.desk.log(line);
    }

    /// Adds a message to those that the job ends with.
    pub fn message(&self, message: Message) {
        self.said(|said| said.messages.push(message));
    }

    /// Hands back an output file under a name. The same name again replaces it. What a row hands back is text, which becomes
    /// its part of the batch's file of that name.
    pub fn file(&self, name: impl Into<String>, content: impl Into<Vec<u8>>) {
        self.said(|said| drop(said.files.insert(name.into(), content.into())));
    }

    /// Begins to load the rows of the batch that belongs to the task. For code that blocks.
    pub(super) fn load_blocking(&self, to: &RowsTo, context: Payload) -> Result<Box<dyn RowSink>, Problem> {
        tokio::runtime::Handle::current().block_on(self.0.desk.load(to, context))
    }

    fn said<T>(&self, with: impl FnOnce(&mut Said) -> T) -> T {
        with(&mut self.0.said.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn end_of(begun: Instant, timeout: Duration) -> Instant {
    begun.checked_add(timeout).unwrap_or_else(|| begun + Duration::from_secs(1 << 30))
}

/// An application: its resource and its handlers.
pub struct Application<R: Resource = Nothing> {
    app: App,
    opener: Arc<Opener<R>>,
    added: Vec<Added<R>>,
}

/// A handler that was added. More may be said about it, so it is not built yet.
struct Added<R: Resource> {
    op: Op,
    build: Box<Build<R>>,
    mark_done: Option<MarkDone<R>>,
    timeout: Option<Duration>,
    stop_grace: Option<Duration>,
    concurrency: Option<NonZeroUsize>,
}

impl Application {
    /// An application whose handlers share nothing.
    pub fn new(app: impl Into<String>) -> Result<Self, IdError> {
        Self::sharing(app, Nothing)
    }
}

impl<R: Resource> Application<R> {
    /// An application whose handlers share a resource. A closure that opens it is one, too.
    pub fn sharing(app: impl Into<String>, resource: R) -> Result<Self, IdError> {
        let opener = Opener { resource: Arc::new(resource), open: Default::default(), closing: TaskTracker::new() };
        Ok(Self { app: App::new(app)?, opener: Arc::new(opener), added: Vec::new() })
    }

    /// Its name.
    pub fn app(&self) -> &App {
        &self.app
    }

    /// Adds a handler that is given the shared resource, the input, and the context of the task, or of the row of a batch.
    pub fn handler<I, O, F, Fut>(self, op: &str, handler: F) -> Result<Self, IdError>
    where
        I: DeserializeOwned + Send + 'static,
        O: Serialize + Send + 'static,
        F: Fn(Shared<R>, I, Context) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<O, Problem>> + Send + 'static,
    {
        self.add(op, Code::Waits(Box::new(move |shared, input, context| Box::pin(handler(shared, input, context)))))
    }

    /// The same for code that blocks: each call gets a thread of its own, as do rows that follow each other. It can't be
    /// dropped, so it must look at [`Context::stop`] by itself.
    pub fn blocking_handler<I, O, F>(self, op: &str, handler: F) -> Result<Self, IdError>
    where
        I: DeserializeOwned + Send + 'static,
        O: Serialize + Send + 'static,
        F: Fn(Shared<R>, I, Context) -> Result<O, Problem> + Send + Sync + 'static,
    {
        self.add(op, Code::Blocks(Arc::new(handler)))
    }

    /// Calls a function when a batch of rows of the handler added last is over, whatever its end. It is called at least once:
    /// an error that wants another attempt gets one.
    #[must_use]
    pub fn mark_done<F, Fut>(mut self, mark_done: F) -> Self
    where
        F: Fn(Shared<R>, BatchEnd) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<(), Problem>> + Send + 'static,
    {
        if let Some(last) = self.added.last_mut() {
            last.mark_done = Some(Box::new(move |shared, end| Box::pin(mark_done(shared, end))));
        }
        self
    }

    /// How long a task of the handler added last may take to stop, before it is dropped.
    #[must_use]
    pub fn stop_grace(mut self, grace: Duration) -> Self {
        if let Some(last) = self.added.last_mut() {
            last.stop_grace = Some(grace);
        }
        self
    }

    /// Most tasks of the handler added last that a worker runs at the same time.
    #[must_use]
    pub fn concurrency(mut self, most: NonZeroUsize) -> Self {
        if let Some(last) = self.added.last_mut() {
            last.concurrency = Some(most);
        }
        self
    }

    /// The longest that a task of the handler added last may run.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        if let Some(last) = self.added.last_mut() {
            last.timeout = Some(timeout);
        }
        self
    }

    fn add<I, O>(mut self, op: &str, code: Code<R, I, O>) -> Result<Self, IdError>
    where
        I: DeserializeOwned + Send + 'static,
        O: Serialize + Send + 'static,
    {
        let opener = self.opener.clone();
        let build = Box::new(move |mark_done| Arc::new(Function { opener, code, mark_done }) as Arc<dyn Handler>);
        let op = Op::new(op)?;
        self.added.push(Added { op, build, mark_done: None, timeout: None, stop_grace: None, concurrency: None });
        Ok(self)
    }

    /// The handlers.
    pub fn into_registrations(self) -> Vec<Registration> {
        let built = |Added { op, build, mark_done, timeout, stop_grace, concurrency }| {
            let registration = Registration::new(self.app.clone(), op, build(mark_done));
            Registration { timeout, stop_grace, concurrency, ..registration }
        };
        self.added.into_iter().map(built).collect()
    }
}

/// Tells of blocking code that its call has outlived: it goes on beside whatever is tried next.
struct Deaf {
    job: JobId,
    has_ended: bool,
}

impl Drop for Deaf {
    fn drop(&mut self) {
        if !self.has_ended {
            tracing::error!(job = %self.job, "blocking code does not look at its stop and goes on");
        }
    }
}

type BoxFuture<O> = std::pin::Pin<Box<dyn Future<Output = Result<O, Problem>> + Send>>;
/// Makes the handler, with what is called at the end of a batch.
type Build<R> = dyn FnOnce(Option<MarkDone<R>>) -> Arc<dyn Handler> + Send + Sync;
type MarkDone<R> = Box<dyn Fn(Shared<R>, BatchEnd) -> BoxFuture<()> + Send + Sync>;

/// The code of a handler.
enum Code<R: Resource, I, O> {
    /// It waits where it has to.
    Waits(Box<dyn Fn(Shared<R>, I, Context) -> BoxFuture<O> + Send + Sync>),
    /// It blocks its thread.
    Blocks(Arc<Blocking<R, I, O>>),
}

type Blocking<R, I, O> = dyn Fn(Shared<R>, I, Context) -> Result<O, Problem> + Send + Sync;

struct Function<R: Resource, I, O> {
    opener: Arc<Opener<R>>,
    code: Code<R, I, O>,
    mark_done: Option<MarkDone<R>>,
}

/// The typed input of a call.
fn given<I: DeserializeOwned>(context: &Context) -> Result<I, Problem> {
    let input = context.0.task.input.read();
    input.map_err(|error| Problem::fail(format!("its input is no {}: {error}", type_name::<I>())))
}

/// What a call hands back, written as its input was.
fn written<O: Serialize>(context: &Context, output: &O) -> Result<Option<Payload>, Problem> {
    let written = Payload::write(context.0.task.input.encoding, output);
    written.map(Some).map_err(|error| Problem::fail(format!("its result can't be written: {error}")))
}

/// Runs something that blocks on a thread of its own.
pub(super) async fn on_its_own_thread<T: Send + 'static>(
    job: JobId,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let mut call = Deaf { job, has_ended: false };
    let ended = tokio::task::spawn_blocking(work).await;
    call.has_ended = true;
    match ended {
        Ok(ended) => Some(ended),
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime ends.
            Err(_) => None,
        },
    }
}

/// The contexts of rows that come one after the other. Most handlers drop theirs at the end, and the next row gets the same one:
/// a task is not put together anew for each.
struct Contexts {
    feed: Arc<Feed>,
    stop: CancellationToken,
    desk: Arc<dyn Desk>,
    last: Option<Context>,
}

impl Contexts {
    fn new(feed: Arc<Feed>, stop: CancellationToken) -> Self {
        Self { feed, stop, desk: Arc::new(NoDesk), last: None }
    }

    /// Begins the next row, if there is one and nothing speaks against it. Says its place in the chunk.
    fn next(&mut self) -> Option<(usize, Context)> {
        if self.stop.is_cancelled() {
            return None;
        }
        let row = self.feed.next()?;
        let place = row.place;
        let mut last = self.last.take();
        if let Some(call) = last.as_mut().and_then(|context| Arc::get_mut(&mut context.0)) {
            call.turn_to(row);
            return last.map(|context| (place, context));
        }
        let task = self.feed.task_of(row);
        Some((place, Context::new(task, self.desk.clone(), self.stop.clone(), Instant::now())))
    }

    /// Says what became of the row.
    fn answer(&mut self, place: usize, context: Context, ended: thread::Result<Result<Option<Payload>, Problem>>) {
        let Said { messages, files } = context.said(std::mem::take);
        let answer = match ended {
            Ok(Ok(result)) => Output { result, messages, files }.into(),
            Ok(Err(mut problem)) => {
                problem.messages.splice(0..0, messages);
                RowAnswer::failed(problem, files)
            }
            Err(panic) => RowAnswer::Failed(Problem::panicked(&*panic)),
        };
        self.feed.answer_unless_cut_short(place, answer, &self.stop);
        self.last = Some(context);
    }
}

impl Call {
    fn turn_to(&mut self, row: BegunRow) {
        self.task.input.bytes = row.input;
        self.task.row = Some(RowOf { line: row.line });
        self.ends = end_of(Instant::now(), self.task.timeout);
    }
}

impl<R: Resource, I, O> Function<R, I, O>
where
    I: DeserializeOwned + Send + 'static,
    O: Serialize + Send + 'static,
{
    /// What the application shares. One that is opened anew may take its time, which is not the task's.
    async fn open(&self, stop: &CancellationToken) -> Result<Shared<R>, String> {
        let opened = stop.run_until_cancelled(self.opener.get()).await;
        opened.unwrap_or_else(|| Err("what it shares was not open in time".into()))
    }

    async fn call(&self, shared: Shared<R>, context: &Context) -> Result<Option<Payload>, Problem> {
        let (input, given_context) = (given(context)?, context.clone());
        let output = match &self.code {
            Code::Waits(code) => code(shared, input, given_context).await,
            Code::Blocks(code) => {
                let code = code.clone();
                let ended = on_its_own_thread(context.job().clone(), move || code(shared, input, given_context)).await;
                ended.unwrap_or_else(|| Err(Problem::retry("the worker stopped")))
            }
        };
        written(context, &output?)
    }
}

#[async_trait]
impl<R: Resource, I, O> Handler for Function<R, I, O>
where
    I: DeserializeOwned + Send + 'static,
    O: Serialize + Send + 'static,
{
    async fn run(&self, task: Task, desk: Arc<dyn Desk>, stop: CancellationToken) -> Outcome {
        let begun = Instant::now();
        let shared = match self.open(&stop).await {
            Ok(shared) => shared,
            Err(reason) => return Outcome::NotReady(reason),
        };
        let context = Context::new(task, desk, stop, begun);
        let result = self.call(shared, &context).await;
        let Said { messages, files } = context.said(std::mem::take);
        match result {
            Ok(result) => Outcome::Done(Output { result, messages, files }),
            Err(mut problem) => {
                problem.messages.splice(0..0, messages);
                Outcome::Failed(problem)
            }
        }
    }

    /// The resource is fetched once for all of them. Code that waits is dropped as soon as `stop` fires, once it has had the
    /// chance to notice; code that blocks ends the row that it is at.
    async fn run_rows(&self, feed: Arc<Feed>, stop: CancellationToken) -> RowsEnd {
        let shared = match self.open(&stop).await {
            Ok(shared) => shared,
            Err(_) if stop.is_cancelled() => return RowsEnd::Over,
            Err(reason) => return RowsEnd::NotReady(reason),
        };
        match &self.code {
            Code::Waits(_) => {
                let mut contexts = Contexts::new(feed, stop.clone());
                let rows = async {
                    while let Some((place, context)) = contexts.next() {
                        let ended = AssertUnwindSafe(self.call(shared.clone(), &context)).catch_unwind().await;
                        contexts.answer(place, context, ended);
                        // Rows that never wait share their thread with others all the same.
                        tokio::task::coop::consume_budget().await;
                    }
                };
                stop.run_until_cancelled(rows).await;
            }
            Code::Blocks(code) => {
                let (code, job) = (code.clone(), feed.of().batch.clone());
                // Who is dropped begins no more rows either.
                let stop = stop.child_token();
                let _stopped = stop.clone().drop_guard();
                let mut contexts = Contexts::new(feed, stop);
                let rows = move || {
                    while let Some((place, context)) = contexts.next() {
                        let row = || written(&context, &code(shared.clone(), given(&context)?, context.clone())?);
                        let ended = catch_unwind(AssertUnwindSafe(row));
                        contexts.answer(place, context, ended);
                    }
                };
                on_its_own_thread(job, rows).await;
            }
        }
        RowsEnd::Over
    }

    async fn mark_done(&self, end: BatchEnd, stop: CancellationToken) -> Outcome {
        let Some(mark_done) = &self.mark_done else { return Outcome::Done(Output::default()) };
        match self.open(&stop).await {
            Ok(shared) => match mark_done(shared, end).await {
                Ok(()) => Outcome::Done(Output::default()),
                Err(problem) => Outcome::Failed(problem),
            },
            Err(reason) => Outcome::NotReady(reason),
        }
    }

    async fn start(&self) -> Result<(), String> {
        self.opener.get().await.map(drop)
    }

    async fn check(&self) -> Result<(), String> {
        self.opener.check().await
    }

    async fn close(&self) {
        self.opener.close().await;
    }
}
