//! Builds a worker from its configuration, starts its parts in order and stops them in order.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use queue_core::Store;
use queue_core::batch::Batches;
use queue_core::ids::{PoolPattern, SessionId, User};
use queue_core::objects::Objects;
use queue_core::session::{Service, Session};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::attempt::{Blocks, Means, Results, Rules};
use crate::config::Config;
use crate::dispatch::{self, Ended, Hints, Limits};
use crate::execute::Executor;
use crate::execute::chunks::declared::Declared;
use crate::execute::handlers::{Handlers, Registration};
use crate::execute::sql::SqlExecutor;
use crate::export;
use crate::maintenance;
use crate::metrics::Unserved;
use crate::notify::Notify;
use crate::shutdown::Shutdown;

/// How long a silent leader leads. Losing one delays housekeeping only, so this is no setting.
const LEADER_TTL: Duration = Duration::from_secs(5);
/// Lifetime of the foreign layout's host locks, fixed by that layout.
const HOST_LOCK_TTL: Duration = Duration::from_secs(5);
/// How often the keyspace is searched for queues that no index names, and lists of work in progress are cleared.
const DISCOVERY_INTERVAL: Duration = Duration::from_secs(60);
/// How often old hashes are looked for.
const SWEEP_INTERVAL: Duration = Duration::from_secs(600);
/// How many scans pass between two looks for jobs that nobody serves. They are told every minute as a rule.
const SCANS_PER_LOOK: u32 = 3;
/// The pause before a session that could not be opened is tried again.
const OPEN_AGAIN_AFTER: Duration = Duration::from_millis(250);
/// How long results that Redis does not answer for are still sent while the worker stops.
const LAST_RESULTS: Duration = Duration::from_secs(5);

/// How long handlers may take to end what they have started.
const HANDLERS_CLOSE: Duration = Duration::from_secs(10);

/// Runs a worker with the handlers of its configuration and others until `shutdown` says stop and everything is given back.
/// Of the configuration only the limits may change meanwhile.
pub async fn run(
    config: Config,
    handlers: Vec<Registration>,
    limits: watch::Receiver<Limits>,
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    let executor = Arc::new(SqlExecutor::new(config.databases()).context("databases")?);
    let sql: Arc<dyn Executor> = executor.clone();
    let chunks = Arc::new(Declared::new(executor.clone(), config.chunks.folder.clone()));
    let own = config.chunks.serve.then(|| chunks.clone().registration(config.chunks.concurrency));
    let handlers = config.handlers().context("handlers")?.into_iter().chain(handlers).chain(own).collect();
    let handlers = Arc::new(Handlers::new(handlers, config.tasks.threads).context("handlers")?);
    chunks.beside(&handlers);
    let objects = Objects::open(&config.objects)?;
    let store =
        Store::connect(&config.redis).await.with_context(|| format!("cannot connect to {}", config.redis.url))?;
    store.keep_library_from_now_on().await.context("the library can't be loaded")?;
    for warning in store.check_server().await.context("the server cannot be used")? {
        tracing::warn!("{warning}");
    }
    let notify = Notify::default();
    let host = config.worker.name.clone().unwrap_or_else(host_name);
    let results = Results { objects: objects.clone(), max_inline_bytes: config.objects.max_inline_bytes.0 };
    let batches = Batches::new(store.clone(), config.limits.clone()).keeping(config.retention.finished);
    let means = Means { sql, handlers: handlers.clone(), chunks, results, blocks: Blocks::default(), batches };
    let service = dispatch::Service { means, pools: pools(&config) };

    let export = export_target(&config, &executor)?;
    // The maintenance outlives sessions: a worker that lost its session may still lead.
    let maintenance_stop = CancellationToken::new();
    let leader_id = SessionId::generate(&host, std::process::id());
    let maintenance = tokio::spawn(maintenance::run(
        store.clone(),
        leader_id,
        maintenance_settings(&config, objects, export),
        maintenance_stop.clone(),
    ));

    // Handlers start while nothing depends on them, and end when no task runs any more.
    let handlers_stop = CancellationToken::new();
    let handlers_watch = tokio::spawn(handlers.clone().look_after(handlers_stop.clone()));

    let mut greeted = false;
    let mut exhausted = false;
    loop {
        let id = SessionId::generate(&host, std::process::id());
        // The channels before the session: what is said to it from its first moment on is heard.
        let cancel_channel = store.keys().cancel(id.as_str());
        let channels = [store.keys().wake(id.as_str()), cancel_channel.clone()];
        let registration = registration(&config, service.pools(), &limits.borrow());
        let pool_names = registration.text();
        let opened = async {
            let messages = store.subscribe(&channels, &[]).await?;
            let session = Session::open(store.clone(), id.clone(), registration, &host, std::process::id()).await?;
            Ok::<_, queue_core::Error>((messages, session))
        };
        let (messages, session) = match opened.await {
            Ok(opened) => opened,
            Err(error) if greeted && error.is_transient() => {
                tracing::warn!(%error, "no session could be opened, trying again");
                tokio::select! {
                    () = tokio::time::sleep(OPEN_AGAIN_AFTER) => continue,
                    () = shutdown.drain().cancelled() => break,
                }
            }
            Err(error) => return Err(error).context("no session could be opened"),
        };
        let session = Arc::new(session);
        tracing::info!(session = %id, pools = pool_names, slots = config.worker.slots, "serving");
        if !greeted {
            notify.ready();
            greeted = true;
        }
        let dispatch = dispatch::run(
            session.clone(),
            service.clone(),
            limits.clone(),
            dispatch_settings(&config),
            notify.clone(),
            Hints { messages, cancel_channel },
            &shutdown,
        );
        tokio::pin!(dispatch);
        let ended = tokio::select! {
            ended = &mut dispatch => ended,
            () = handlers.exhausted().cancelled() => {
                tracing::error!("handlers block all their threads: only a new process can go on");
                exhausted = true;
                shutdown.drain().cancel();
                dispatch.await
            }
        };
        match ended {
            Ended::SessionLost => continue,
            Ended::Stopped => {
                // All jobs have ended or are given back, so nothing is lost if Redis does not hear this.
                match tokio::time::timeout(LAST_RESULTS, session.close()).await {
                    Ok(Ok(returned)) => tracing::info!(returned, "session closed"),
                    Ok(Err(error)) => tracing::warn!(%error, "the session could not be closed, it will expire"),
                    Err(_) => tracing::warn!("the session could not be closed in time, it will expire"),
                }
                break;
            }
        }
    }

    handlers_stop.cancel();
    let _ = handlers_watch.await;
    // Where no thread is free, nothing can be closed.
    if !exhausted && tokio::time::timeout(HANDLERS_CLOSE, handlers.close()).await.is_err() {
        tracing::warn!("handlers did not close in time");
    }
    maintenance_stop.cancel();
    let _ = tokio::time::timeout(LAST_RESULTS, maintenance).await;
    store.close().await;
    if exhausted {
        anyhow::bail!("handlers block all their threads");
    }
    Ok(())
}

/// The limits that a configuration states.
pub fn limits(config: &Config) -> Limits {
    Limits {
        rules: Arc::new(rules(config)),
        default_capacity: config.capacity.default.get(),
        capacities: config.capacity.pools.iter().map(|(pool, capacity)| (pool.clone(), capacity.get())).collect(),
    }
}

/// The pools to serve: those that the configuration names, and those of its databases.
fn pools(config: &Config) -> Vec<PoolPattern> {
    let mut pools = config.worker.pools.clone();
    for name in config.databases.keys() {
        if let Ok(pool) = queue_core::ids::Pool::of_database(name)
            && !pools.iter().any(|pattern| pattern.covers(&pool))
        {
            pools.push(PoolPattern::exactly(&pool));
        }
    }
    pools
}

fn registration(config: &Config, pools: Vec<PoolPattern>, limits: &Limits) -> Service {
    Service {
        pools,
        default_capacity: limits.default_capacity,
        capacities: limits.capacities.clone(),
        fairness: config.worker.fairness,
    }
}

fn rules(config: &Config) -> Rules {
    Rules {
        statement_timeout: config.sql.statement_timeout,
        task_timeout: config.tasks.timeout,
        retry: config.retry.clone(),
        max_unclean: config.worker.max_unclean.get().into(),
        keep: config.retention.finished,
        keep_ignored: config.retention.ignored,
        session_lifetime: config.worker.session_lifetime,
    }
}

fn dispatch_settings(config: &Config) -> dispatch::Settings {
    dispatch::Settings {
        slots: config.worker.slots.get(),
        scan_interval: config.worker.scan_interval,
        session_lifetime: config.worker.session_lifetime,
        drain_grace: config.worker.drain_grace,
        last_results: LAST_RESULTS,
    }
}

fn export_target(config: &Config, executor: &SqlExecutor) -> anyhow::Result<Option<export::Target>> {
    let Some(name) = &config.export.database else { return Ok(None) };
    // Its settings have no place for a user, so any will do.
    let database = executor.database(name, &User::new("drayman")?).map_err(anyhow::Error::msg).context("export")?;
    Ok(Some(export::Target { database, max_pending: config.export.max_pending.get() }))
}

fn maintenance_settings(config: &Config, objects: Objects, export: Option<export::Target>) -> maintenance::Settings {
    maintenance::Settings {
        leader_ttl: LEADER_TTL,
        session_lifetime: config.worker.session_lifetime,
        scan_interval: config.worker.scan_interval,
        discovery_interval: DISCOVERY_INTERVAL,
        sweep_interval: SWEEP_INTERVAL,
        reconcile_interval: config.worker.reconcile_interval,
        // Each record has its own lifetime, and the index all of them.
        keep: config.retention.finished.max(config.retention.ignored),
        keep_count: config.retention.count.get(),
        keep_bytes: config.retention.bytes.0,
        limits: config.limits.clone(),
        keep_untouched: config.retention.untouched,
        host_lock_ttl: HOST_LOCK_TTL,
        objects,
        unserved: config.telemetry.otlp_endpoint.is_some().then(Unserved::register),
        unserved_interval: config.worker.scan_interval.saturating_mul(SCANS_PER_LOOK),
        export,
    }
}

fn host_name() -> String {
    nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_else(|| "unknown".into())
}
