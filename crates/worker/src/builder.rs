//! A worker in one's own program: handlers are registered, then it runs until it is told to stop.

use std::collections::BTreeSet;

use tokio::sync::watch;

use crate::app;
use crate::config::Config;
use crate::execute::function::{Application, BoxError, Context, Nothing, Resource};
use crate::execute::handlers::Registration;
use crate::execute::rows::BatchEnd;
use crate::execute::task::Problem;
use crate::shutdown::Shutdown;
use queue_core::config::{Configuration, Url};
use queue_core::ids::{App, IdError, PoolPattern};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Builds a [`Worker`]. What is wrong with a name or the configuration is told by [`WorkerBuilder::run`].
pub struct WorkerBuilder {
    config: Config,
    registrations: Vec<Registration>,
    /// Applications whose handlers share something.
    sharing: BTreeSet<App>,
    fault: Option<BoxError>,
}

/// Something to be shared was registered a second time for an application.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("resource already registered for this app: app={0}")]
pub struct SharedTwice(App);

/// A worker in this program.
pub struct Worker;

impl Worker {
    /// A worker with the default configuration that serves no databases, only its handlers.
    pub fn builder() -> WorkerBuilder {
        let mut config = Config::default();
        config.worker.pools = Vec::new();
        WorkerBuilder { config, registrations: Vec::new(), sharing: BTreeSet::new(), fault: None }
    }
}

impl WorkerBuilder {
    /// Takes a whole configuration, with the pools that it serves.
    #[must_use]
    pub fn config(mut self, config: Config) -> Self {
        self.config = config;
        self
    }

    /// Where Redis is.
    #[must_use]
    pub fn redis(mut self, url: impl Into<String>) -> Self {
        self.config.redis.url = Url::new(url);
        self
    }

    /// Serves databases besides: pools that begin with `sql:` or `db:`. Of handlers it serves those that it has.
    #[must_use]
    pub fn pools(mut self, pools: impl IntoIterator<Item = PoolPattern>) -> Self {
        self.config.worker.pools.extend(pools);
        self
    }

    /// Most jobs at the same time.
    #[must_use]
    pub fn slots(mut self, slots: std::num::NonZeroUsize) -> Self {
        self.config.worker.slots = slots;
        self
    }

    /// Registers a handler that shares nothing with others.
    #[must_use]
    pub fn handler<I, O, F, Fut>(self, app: &str, op: &str, handler: F) -> Self
    where
        I: DeserializeOwned + Send + 'static,
        O: Serialize + Send + 'static,
        F: Fn(I, Context) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<O, Problem>> + Send + 'static,
    {
        let application = Application::<Nothing>::new(app);
        self.app(application.and_then(|it| it.handler(op, move |_, input, context| handler(input, context))))
    }

    /// Registers a handler of rows that shares nothing with others, and what is called when a batch of them is over: see
    /// [`Application::mark_done`].
    #[must_use]
    pub fn batch_handler<I, O, F, Fut, M, Told>(self, app: &str, op: &str, handler: F, mark_done: M) -> Self
    where
        I: DeserializeOwned + Send + 'static,
        O: Serialize + Send + 'static,
        F: Fn(I, Context) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<O, Problem>> + Send + 'static,
        M: Fn(BatchEnd) -> Told + Send + Sync + 'static,
        Told: Future<Output = Result<(), Problem>> + Send + 'static,
    {
        let application = Application::<Nothing>::new(app);
        let application = application.and_then(|it| it.handler(op, move |_, input, context| handler(input, context)));
        self.app(application.map(|it| it.mark_done(move |_, end| mark_done(end))))
    }

    /// Registers the handlers of an application.
    #[must_use]
    pub fn app<R: Resource>(mut self, application: Result<Application<R>, IdError>) -> Self {
        let fault = match application {
            Err(fault) => Some(fault.into()),
            // Two that nothing is shared in are as good as one.
            Ok(application) if R::IS_SHARED && !self.sharing.insert(application.app().clone()) => {
                Some(SharedTwice(application.app().clone()).into())
            }
            Ok(application) => {
                self.registrations.extend(application.into_registrations());
                None
            }
        };
        self.fault = self.fault.or(fault);
        self
    }

    /// Runs until `shutdown` says stop and everything is given back.
    pub async fn run(self, shutdown: Shutdown) -> Result<(), BoxError> {
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        if self.registrations.is_empty() { self.config.validate() } else { self.config.check_values() }?;
        let (_limits, limits_now) = watch::channel(app::limits(&self.config));
        app::run(self.config, self.registrations, limits_now, shutdown).await.map_err(Into::into)
    }
}
