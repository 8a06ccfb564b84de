//! The handlers of a worker: which tasks it can run, and which of them now.
//!
//! Handlers run on threads of their own. One that blocks its thread can't hold up the worker's heartbeat, and one that
//! panics or hangs costs its own task. A handler that can't start, or says that it is not well, takes no tasks meanwhile:
//! they stay for other workers.

use std::collections::{BTreeSet, HashMap};
use std::future::Future;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;
use queue_core::ids::{App, Op, Pool};
use tokio::runtime::Runtime;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use super::task::Handler;

/// The pause after a first failure to start; it doubles with each.
const START_AGAIN_AFTER: Duration = Duration::from_millis(250);
/// The longest such pause.
const START_AGAIN_AFTER_MAX: Duration = Duration::from_secs(30);
/// How often a handler that runs is asked whether it is well.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);
/// How long a check may take.
const CHECK_PATIENCE: Duration = Duration::from_secs(10);

/// A handler and what it runs.
pub struct Registration {
    /// The application.
    pub app: App,
    /// The operation.
    pub op: Op,
    /// Runs its tasks.
    pub handler: Arc<dyn Handler>,
    /// Longest that one may take; the worker's default holds all the same.
    pub timeout: Option<Duration>,
    /// How long it may take to stop, where that is not the handler's own [`stop_grace`](Handler::stop_grace).
    pub stop_grace: Option<Duration>,
    /// Most tasks at the same time in this worker, where that is not the handler's own [`concurrency`](Handler::concurrency).
    pub concurrency: Option<NonZeroUsize>,
}

impl Registration {
    /// A handler without limits of its own.
    pub fn new(app: App, op: Op, handler: Arc<dyn Handler>) -> Self {
        Self { app, op, handler, timeout: None, stop_grace: None, concurrency: None }
    }
}

/// A handler was registered twice.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("handler already registered for this app and op: app={app}, op={op}")]
pub struct Duplicate {
    app: App,
    op: Op,
}

/// What runs the tasks of one pool.
pub struct Registered {
    /// The handler.
    pub handler: Arc<dyn Handler>,
    /// Longest that one of its tasks may take.
    pub timeout: Option<Duration>,
    /// How long one may take to stop.
    pub stop_grace: Duration,
    /// Most of them at the same time in this worker.
    pub concurrency: Option<usize>,
    /// It could not begin a task.
    ill: Notify,
}

/// All handlers of a worker.
pub struct Handlers {
    by_pool: HashMap<Pool, Registered>,
    serving: watch::Sender<BTreeSet<Pool>>,
    threads: usize,
    /// `None` once it is dropped.
    runtime: Option<Runtime>,
    lost_threads: Arc<AtomicUsize>,
    exhausted: CancellationToken,
}

impl Handlers {
    /// Registers handlers, to run on so many threads; as many as there are cores if not said. None of them is started yet.
    pub fn new(registrations: Vec<Registration>, threads: Option<NonZeroUsize>) -> Result<Self, Duplicate> {
        let mut by_pool = HashMap::new();
        for Registration { app, op, handler, timeout, stop_grace, concurrency } in registrations {
            let stop_grace = stop_grace.unwrap_or_else(|| handler.stop_grace());
            let concurrency = concurrency.map(NonZeroUsize::get).or_else(|| handler.concurrency());
            let registered = Registered { handler, timeout, stop_grace, concurrency, ill: Notify::new() };
            if by_pool.insert(Pool::of_handler(&app, &op), registered).is_some() {
                return Err(Duplicate { app, op });
            }
        }
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let threads = threads.map_or(cores, NonZeroUsize::get);
        let runtime = (!by_pool.is_empty()).then(|| {
            let mut builder = tokio::runtime::Builder::new_multi_thread();
            builder.worker_threads(threads).thread_name("handler").enable_all();
            builder.build().expect("threads can be started")
        });
        Ok(Self {
            by_pool,
            serving: watch::Sender::new(BTreeSet::new()),
            threads,
            runtime,
            lost_threads: Arc::default(),
            exhausted: CancellationToken::new(),
        })
    }

    /// What runs the tasks of a pool, whether or not it is well now.
    pub fn get(&self, pool: &Pool) -> Option<&Registered> {
        self.by_pool.get(pool)
    }

    /// The pools in which this worker runs only so many tasks at the same time.
    pub fn limited(&self) -> impl Iterator<Item = (&Pool, usize)> {
        self.by_pool.iter().filter_map(|(pool, registered)| Some((pool, registered.concurrency?)))
    }

    /// Has a handler that could not begin a task take no more of them until it has started anew.
    pub fn fell_ill(&self, pool: &Pool) {
        if let Some(registered) = self.by_pool.get(pool) {
            self.serving.send_modify(|pools| _ = pools.remove(pool));
            registered.ill.notify_one();
        }
    }

    /// The pools whose handlers are well.
    pub fn serving(&self) -> watch::Receiver<BTreeSet<Pool>> {
        self.serving.subscribe()
    }

    /// Fires when so many handlers block their threads for good that no task could run any more. Only a new process helps.
    pub fn exhausted(&self) -> &CancellationToken {
        &self.exhausted
    }

    /// Runs something on the handlers' threads.
    pub fn spawn<F>(&self, work: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        self.runtime.as_ref().expect("there are handlers").spawn(work)
    }

    /// Notes a task that was dropped and blocks its thread all the same.
    pub fn abandon<T: Send + 'static>(&self, running: JoinHandle<T>) {
        let lost = self.lost_threads.fetch_add(1, Ordering::SeqCst) + 1;
        tracing::error!(lost, threads = self.threads, "a handler blocks its thread and can't be stopped");
        if lost >= self.threads {
            self.exhausted.cancel();
        }
        let lost_threads = self.lost_threads.clone();
        tokio::spawn(async move {
            let _ = running.await;
            lost_threads.fetch_sub(1, Ordering::SeqCst);
        });
    }

    /// Starts all handlers, and looks after them until `stop` fires.
    pub async fn look_after(self: Arc<Self>, stop: CancellationToken) {
        let watches = TaskTracker::new();
        for pool in self.by_pool.keys() {
            let (handlers, pool, stop) = (self.clone(), pool.clone(), stop.clone());
            watches.spawn(async move {
                tokio::select! {
                    () = handlers.keep_well(&pool) => {}
                    () = stop.cancelled() => {}
                }
            });
        }
        watches.close();
        watches.wait().await;
    }

    /// Starts a handler, again and again if it fails, and has it take tasks while it is well.
    async fn keep_well(&self, pool: &Pool) {
        let Registered { handler, ill, .. } = &self.by_pool[pool];
        loop {
            let mut pause = START_AGAIN_AFTER;
            loop {
                let starting = handler.clone();
                match self.ask(async move { starting.start().await }).await {
                    Ok(()) => break,
                    Err(reason) => {
                        tracing::warn!(%pool, reason, pause_ms = pause.as_millis() as u64, "a handler can't start");
                    }
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(START_AGAIN_AFTER_MAX);
            }
            tracing::info!(%pool, "a handler is ready");
            self.serving.send_modify(|pools| _ = pools.insert(pool.clone()));
            loop {
                tokio::select! {
                    () = tokio::time::sleep(CHECK_INTERVAL) => {}
                    () = ill.notified() => {
                        // It may start at once and fall ill with the next task.
                        tokio::time::sleep(START_AGAIN_AFTER).await;
                        break;
                    }
                }
                let checking = handler.clone();
                let check = self.ask(async move { checking.check().await });
                let answer = tokio::time::timeout(CHECK_PATIENCE, check).await;
                if let Err(reason) = answer.unwrap_or_else(|_| Err("it does not say how it is".into())) {
                    tracing::warn!(%pool, reason, "a handler is not well and takes no more tasks until it is");
                    break;
                }
            }
            self.serving.send_modify(|pools| _ = pools.remove(pool));
        }
    }

    /// What a handler answers; a panic is an answer too. A question that nobody waits for any more ends.
    async fn ask(&self, question: impl Future<Output = Result<(), String>> + Send + 'static) -> Result<(), String> {
        AbortOnDropHandle::new(self.spawn(question)).await.unwrap_or_else(|error| Err(error.to_string()))
    }

    /// Ends what the handlers have started, all at the same time. No task runs any more.
    pub async fn close(&self) {
        let end = async |registered: &Registered| {
            let handler = registered.handler.clone();
            let closing = async move {
                handler.close().await;
                Ok(())
            };
            if let Err(reason) = self.ask(closing).await {
                tracing::warn!(reason, "a handler was not closed");
            }
        };
        join_all(self.by_pool.values().map(end)).await;
    }
}

impl Drop for Handlers {
    fn drop(&mut self) {
        // A runtime may not wait for its threads where others run.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
