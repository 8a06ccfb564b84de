//! One claim's life: from the taken job over its execution to the end of the claim.

use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use queue_core::batch::Batches;
use queue_core::calls::{Fields, Finished, Taken, Verdict};
use queue_core::model::Status;
use queue_core::model::batch::{NoPart, Part};
use queue_core::model::retry::{self, NoBackoff, NoSqlState, RetryChoice, RetryPolicy, Try};
use queue_core::session::Claim;
use tracing::Instrument;

use crate::config::RetryConfig;
use crate::execute::Executor;
use crate::execute::handlers::Handlers;
use crate::execute::task::Handler;
use crate::stop::{Cause, Stop};

mod blocks;
mod desk;
mod files;
mod load;
mod page;
mod results;
mod rows;
mod sql;
pub mod sql_rows;
mod task;
mod told;

pub use blocks::Blocks;
pub use results::Results;

/// What holds for every job of a worker.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Longest that a statement may run, where the user has no limit of its own.
    pub statement_timeout: Duration,
    /// Longest that a task may run, where its handler and its user say nothing less.
    pub task_timeout: Duration,
    /// When a job that says nothing else is tried again.
    pub retry: RetryConfig,
    /// How many workers a job may end before it is set aside.
    pub max_unclean: u64,
    /// How long the record of a finished job is kept.
    pub keep: Duration,
    /// How long that of a job is kept that ended after all its attempts, or was set aside.
    pub keep_ignored: Duration,
    /// How long a worker that Redis does not answer may take its claims for held.
    pub session_lifetime: Duration,
}

/// When a take was asked for and when it was answered.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// It was sent.
    pub asked: SystemTime,
    /// Its answer was read.
    pub answered: SystemTime,
}

/// What jobs are run with.
#[derive(Clone)]
pub struct Means {
    /// Runs statements.
    pub sql: Arc<dyn Executor>,
    /// Runs tasks.
    pub handlers: Arc<Handlers>,
    /// Runs the steps in chunks among them, with a handler or without.
    pub chunks: Arc<dyn Handler>,
    /// Keeps what tasks hand back.
    pub results: Results,
    /// What was read of batches.
    pub blocks: Blocks,
    /// Takes the rows of steps that are batches.
    pub batches: Batches,
}

/// Runs one claim to its end.
pub async fn run(claim: Claim, take: Asked, means: Means, rules: Arc<Rules>, stop: Stop) {
    let job = claim.job().clone();
    let span = tracing::info_span!(
        "job",
        job = %job.id,
        user = %job.user,
        pool = %job.pool,
        fence = job.fence.0,
    );
    if let Ok(Some(parent)) = job.text("traceparent") {
        telemetry::follow(&span, parent);
    }
    if is_first(&job)
        && let Ok(Some(submitted)) = job.text("created_at")
    {
        telemetry::waited(&span, submitted, take.answered);
    }
    telemetry::record(&span, "take", take.asked, take.answered);
    async move {
        let clock = Clock::starting_at(job.fence.0);
        let read =
            |part: Option<&str>| part.map(|part| part.parse().map_err(|fault: NoPart| fault.to_string())).transpose();
        let ending = match (job.text("part").and_then(read), job.pool.handler()) {
            (Err(reason), _) => Some(task::over(Status::Failed, Fields::new().with("failed_reason", reason), &rules)),
            (Ok(Some(Part::Rows(chunk))), _) => rows::settle(&claim, chunk, &means, &rules, &stop, &clock).await,
            (Ok(Some(Part::Files(batch))), _) => files::settle(&claim, &batch, &means, &rules, &stop).await,
            (Ok(Some(Part::Done(batch))), _) => told::settle(&claim, &batch, &means, &rules, &stop, &clock).await,
            (Ok(None), Some(_)) => task::settle(&claim, &means, &rules, &stop, &clock).await,
            (Ok(None), None) => sql::settle(&claim, &*means.sql, &rules, &stop, &clock).await,
        };
        let Some(ending) = ending else {
            // The executor or the ledger has said that the claim is another's. There is nothing to record.
            tracing::warn!("the claim was lost, the result is dropped");
            return;
        };
        let status = ending.status.clone();
        // A worker that is stopping will not take what becomes free.
        let wake = stop.cause() == Some(Cause::Draining);
        let finish = claim.finish(ending.verdict, clock.elapsed(), ending.fields, wake);
        match finish.instrument(tracing::info_span!("finish")).await {
            Ok(Finished::Ended | Finished::Repeated) => {
                tracing::info!(status, ran_ms = clock.elapsed().as_millis() as u64, "execution ended");
            }
            Ok(Finished::Stale) => tracing::warn!(status, "the claim was lost, the result was refused"),
            Err(error) => tracing::error!(%error, status, "the result could not be recorded"),
        }
    }
    .instrument(span)
    .await;
}

/// Whether nothing of the job has been tried before, as far as its record tells.
fn is_first(taken: &Taken) -> bool {
    let left_nothing = |field| taken.bytes(field).is_none_or(<[u8]>::is_empty);
    // A statement that failed leaves no result, but its start stands in the list.
    let started = matches!(taken.text("query"), Ok(Some(query)) if query.contains(r#""started_at":"#));
    ["attempts", "unclean", "trace", "results"].into_iter().all(left_nothing) && !started
}

/// How a claim is to end.
struct Ending {
    verdict: Verdict,
    fields: Fields,
    /// For the log.
    status: String,
}

/// Redis' clock, read at the take and carried on by this machine's monotonic one. Only records are written with it.
#[derive(Clone, Copy)]
struct Clock {
    at_start: Duration,
    since: Instant,
}

impl Clock {
    fn starting_at(fence_us: u64) -> Self {
        Self { at_start: Duration::from_micros(fence_us), since: Instant::now() }
    }

    fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }

    fn now(&self) -> String {
        humantime::format_rfc3339_millis(UNIX_EPOCH + self.at_start + self.elapsed()).to_string()
    }

    fn now_ms(&self) -> u64 {
        (self.at_start + self.elapsed()).as_millis() as u64
    }
}

fn final_verdict(rules: &Rules) -> Verdict {
    Verdict::Final { keep_ms: rules.keep.as_millis() as u64 }
}

/// What a job may do after an error.
struct Retries<'a> {
    claim: &'a Claim,
    policy: RetryPolicy,
    /// Running a statement twice does no harm.
    idempotent: bool,
    /// How many attempts of the present statement have ended in an error.
    attempts: u64,
}

impl<'a> Retries<'a> {
    fn of(claim: &'a Claim, rules: &Rules) -> Result<Self, String> {
        let taken = claim.job();
        let given = |name| Ok::<_, String>(taken.text(name)?.filter(|text| !text.is_empty()));
        let duration = |name| Some(taken.number(name)).filter(|ms| *ms > 0).map(Duration::from_millis);
        let backoff = given("backoff")?.map(|word| word.parse().map_err(|fault: NoBackoff| fault.to_string()));
        let on = given("retry_on")?.map(|text| text.parse().map_err(|fault: NoSqlState| format!("retry_on: {fault}")));
        let choice = RetryChoice {
            max_attempts: u32::try_from(taken.number("max_attempts")).ok().and_then(NonZeroU32::new),
            backoff: backoff.transpose()?,
            delay: duration("retry_delay"),
            delay_max: duration("retry_delay_max"),
            on: on.transpose()?,
        };
        Ok(Self {
            claim,
            policy: rules.retry.of(&taken.pool).with(&choice),
            idempotent: matches!(given("idempotent")?, Some("1" | "true" | "yes")),
            attempts: taken.number("attempts"),
        })
    }

    fn more_than_one(&self) -> bool {
        self.policy.max_attempts.get() > 1
    }

    fn left(&self) -> bool {
        self.policy.allows_after(self.attempts + 1)
    }

    fn history(&self, History { step, started, ended, error }: History<'_>) -> String {
        let one = Try {
            step: step.map(str::to_owned),
            worker: self.claim.session().to_string(),
            started_at: Some(started.to_owned()),
            ended_at: ended.to_owned(),
            error: error.to_owned(),
            unclean: false,
        };
        retry::write_history(self.claim.job().text("history").ok().flatten().unwrap_or_default(), one)
    }

    /// Another attempt, after a pause of the policy's or at least so long. `reason` is for the log, `error` for the record.
    fn later(&self, fields: Fields, try_: History<'_>, reason: &str, at_least: Option<Duration>) -> Ending {
        let attempts = self.attempts + 1;
        let chance = BuildHasher::hash_one(&RandomState::new(), attempts);
        let pause = self.policy.pause(attempts, chance).max(at_least.unwrap_or_default());
        tracing::info!(
            attempt = attempts,
            pause_ms = pause.as_millis() as u64,
            reason,
            "it failed and will be tried again"
        );
        let fields = fields
            .with("attempts", attempts.to_string())
            .with("history", self.history(try_))
            .with("status", Status::Scheduled.as_str());
        Ending {
            verdict: Verdict::Later { after_ms: pause.as_millis() as u64 },
            fields,
            status: Status::Scheduled.to_string(),
        }
    }
}

/// One try that did not end well.
#[derive(Clone, Copy)]
struct History<'a> {
    /// The statement's name within its job; a task has none.
    step: Option<&'a str>,
    started: &'a str,
    ended: &'a str,
    error: &'a str,
}

/// What is left of an attempt on a job that has ended too many workers.
fn set_aside_reason(taken: &Taken) -> String {
    let lost = taken.text("lost_worker").ok().flatten().unwrap_or("unknown");
    let reason = format!("set aside: it ended {} workers, the last one {lost}", taken.number("unclean"));
    tracing::warn!(reason, "a job is set aside");
    reason
}

/// Waits until a time; for ever where there is none.
pub(crate) async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
