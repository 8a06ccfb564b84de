//! One claim's life: from the taken job over one statement to the end of the claim.
//!
//! One take runs one statement. If more are to come, the job goes back to the front of its queue, so that a long chain can
//! be interrupted between statements and other users get their turn.

use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use futures::FutureExt;
use queue_core::model::Status;
use queue_core::model::retry::{self, NoBackoff, NoSqlState, RetryChoice, RetryPolicy, Try};
use queue_core::model::sql::{SqlJob, Verdict as StatementVerdict};
use queue_core::scripts::{Fields, Finished, Mark, Taken, Verdict};
use queue_core::session::{Claim, Pen};
use tracing::Instrument;

use crate::config::RetryConfig;
use crate::execute::sql::template;
use crate::execute::{ClaimLost, End, Executor, Failure, Ledger, Report, Target, Trace, Work};
use crate::stop::{Cause, Stop};

/// Most bytes of command tags and notices that are kept with a job.
const RESULTS_MAX_BYTES: usize = 64 * 1024;

/// How often the database is tried that alone can tell what became of a lost worker's execution.
const SETTLE_ATTEMPTS: u64 = 12;

/// What holds for every SQL job of a worker.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Longest that a statement may run, where the user has no limit of its own.
    pub statement_timeout: Duration,
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

/// Runs one claim to its end.
pub async fn run(claim: Claim, take: Asked, executor: Arc<dyn Executor>, rules: Arc<Rules>, stop: Stop) {
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
        let Some(ending) = settle(&claim, &*executor, &rules, &stop, &clock).await else {
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
                tracing::info!(status, ran_ms = clock.elapsed().as_millis() as u64, "statement ended");
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
}

/// Runs the job's next statement and says how the claim is to end; `None` if the claim was lost on the way.
async fn settle(claim: &Claim, executor: &dyn Executor, rules: &Rules, stop: &Stop, clock: &Clock) -> Option<Ending> {
    let taken = claim.job();
    let mut job = match parse(taken) {
        Ok(job) => job,
        Err(reason) => return Some(failed_as_a_whole(taken, &reason, rules)),
    };
    let retries = match Retries::of(claim, rules) {
        Ok(retries) => retries,
        Err(reason) => return Some(failed_as_a_whole(taken, &reason, rules)),
    };
    let cancel_was_asked = taken.bytes("cancel_requested_at").is_some_and(|value| !value.is_empty());
    // What a worker that was lost left running must be settled first: its statement may have taken effect.
    let left_behind = taken.number("unclean") > 0 || taken.bytes("trace").is_some_and(|trace| !trace.is_empty());
    if cancel_was_asked {
        stop.ask(Cause::Cancelled);
        if !left_behind {
            return Some(cancelled_while_waiting(&mut job, rules));
        }
    }
    // What an earlier execution did is still settled, but nothing of a job that keeps ending its workers is run again.
    let set_aside = taken.number("unclean") >= rules.max_unclean;
    if set_aside {
        stop.ask(Cause::SetAside);
    }
    let Some(statement) = job.next() else { return Some(ending(&job, rules, Fields::new())) };
    let step = statement.step.clone();
    let target = match target(taken) {
        Ok(target) => target,
        Err(reason) => return Some(failed_as_a_whole(taken, &reason, rules)),
    };
    let timeout = timeout(taken, statement.timeout_ms, rules);
    let sql = if statement.templated {
        let dialect = executor.dialect(&target);
        let vars = template::Vars { job_id: taken.id.as_str(), error_message: statement.error_message };
        template::render(statement.sql, dialect, &vars).map_err(|error| error.to_string())
    } else {
        Ok(statement.sql.to_owned())
    };
    let earlier = earlier(taken, &step);
    let started = clock.now();
    if let Err(refused) = job.start(&started) {
        return Some(failed_as_a_whole(taken, &refused.to_string(), rules));
    }
    // Whether the executor came as far as its claim: what an earlier execution left is settled by then.
    let mut asked = false;
    let end = match sql {
        Err(reason) => End::Failed(Failure { message: reason, ..Failure::default() }),
        Ok(sql) => {
            let work = Work {
                job: taken.id.clone(),
                user: taken.user.clone(),
                fence: taken.fence,
                earlier: earlier.clone(),
                takes_over: left_behind,
                step: step.clone(),
                sql,
                timeout,
                target,
            };
            let page = Page {
                pen: claim.pen(),
                running: progress(&job),
                step: step.clone(),
                stop: stop.clone(),
                lifetime: rules.session_lifetime,
                asked: AtomicBool::new(false),
            };
            let span = tracing::info_span!("statement", step);
            let run = executor.execute(work, &page, stop.token()).instrument(span);
            // A bug in an executor must not take the worker's other jobs with it, nor leave this one without an end.
            let end = std::panic::AssertUnwindSafe(run).catch_unwind().await.unwrap_or_else(|_| {
                End::Unknown("the worker panicked while the statement ran; whether it took effect is not known".into())
            });
            asked = page.asked.load(Ordering::SeqCst);
            end
        }
    };
    let at = clock.now();
    let mut extra = Fields::new().with("trace", "");
    // Every attempt that the job was allowed ended in an error that would have allowed another one.
    let mut exhausted = false;
    let verdict = match end {
        End::ClaimLost => return None,
        End::Done(report) => {
            extra = extra.with("results", results(taken, &step, &report));
            StatementVerdict::Done
        }
        End::Failed(failure) if stop.cause().is_none() && retries.again(&failure) => {
            let known = asked && !could_not_ask(&failure);
            let mut ending = retries.scheduled(&mut job, &step, &started, &at, failure);
            if known {
                ending.fields = ending.fields.and(extra);
            }
            return Some(ending);
        }
        End::Unknown(reason) if stop.cause().is_none() && retries.idempotent && retries.left() => {
            let failure = Failure { message: reason, ..Failure::default() };
            let mut ending = retries.scheduled(&mut job, &step, &started, &at, failure);
            ending.fields = ending.fields.and(extra);
            return Some(ending);
        }
        End::Failed(failure) if earlier.is_some() && (!asked || could_not_ask(&failure)) => {
            // Nothing was tried now, but an earlier execution may have taken effect: that is asked for until it is answered.
            if taken.number("attempts") < SETTLE_ATTEMPTS {
                return Some(retries.scheduled(&mut job, &step, &started, &at, failure));
            }
            let why = failure.message;
            StatementVerdict::Unknown(format!(
                "whether the lost worker's execution took effect could not be asked: {why}"
            ))
        }
        // What was to be cancelled and then could not even be tried has been cancelled.
        End::Failed(failure) if failure.retryable && stop.cause() == Some(Cause::Cancelled) => {
            tracing::debug!(reason = reason(&failure), "failed while it was being cancelled");
            StatementVerdict::Cancelled
        }
        End::Failed(failure) if failure.retryable && stop.cause() == Some(Cause::Draining) => {
            return Some(given_back(&mut job));
        }
        End::Failed(_) | End::Stopped if stop.cause() == Some(Cause::SetAside) => {
            return Some(put_aside(&mut job, taken, rules));
        }
        End::Failed(failure) => {
            if retries.more_than_one() {
                extra = extra.with("history", retries.history(&step, &started, &at, &failure.message));
                extra = extra.with("attempts", (retries.attempts + 1).to_string());
            }
            exhausted = retries.more_than_one() && retries.wanted(&failure);
            StatementVerdict::Failed(failure.message)
        }
        End::Stopped => match stop.cause() {
            Some(Cause::ClaimLost) => return None,
            Some(Cause::Draining) => return Some(given_back(&mut job)),
            Some(Cause::Cancelled | Cause::SetAside) | None => StatementVerdict::Cancelled,
        },
        End::CancelledElsewhere => StatementVerdict::Cancelled,
        End::Unknown(reason) => {
            if retries.more_than_one() {
                extra = extra.with("history", retries.history(&step, &started, &at, &reason));
                extra = extra.with("attempts", (retries.attempts + 1).to_string());
            }
            StatementVerdict::Unknown(reason)
        }
    };
    if let Err(refused) = job.finish(verdict, &at) {
        return Some(failed_as_a_whole(taken, &refused.to_string(), rules));
    }
    // The statement got through before the cancel, what follows it does not.
    if !job.is_over() && stop.cause() == Some(Cause::Cancelled) && job.cancel_pending().is_err() {
        tracing::debug!("nothing was left to cancel");
    }
    if !job.is_over() {
        // The next statement has attempts of its own, and a worker that is lost then is lost to that one.
        for counter in ["attempts", "unclean"] {
            if taken.number(counter) > 0 && !set_aside {
                extra = extra.with(counter, "0");
            }
        }
    }
    let mut ending = ending(&job, rules, extra);
    if exhausted && job.is_over() && job.status() == Status::Failed {
        ending.verdict = Verdict::Final { keep_ms: rules.keep_ignored.as_millis() as u64 };
        ending.fields = ending.fields.and(Fields::new().with("status", Status::Ignored.as_str()));
        ending.status = Status::Ignored.to_string();
    }
    Some(ending)
}

fn parse(taken: &Taken) -> Result<SqlJob, String> {
    let status = taken.text("status")?.and_then(|text| text.parse().ok()).unwrap_or(Status::Pending);
    let fallback_status = taken.text("fallback_status")?.and_then(|text| text.parse().ok());
    SqlJob::parse(
        taken.text("query")?.unwrap_or(""),
        status,
        fallback_status,
        taken.text("onsuccess")?,
        taken.text("onerror")?,
        taken.text("failed_reason")?,
    )
    .map_err(|error| error.to_string())
}

fn target(taken: &Taken) -> Result<Target, String> {
    if let Some(name) = taken.text("database")? {
        return Ok(Target::Named(name.to_owned()));
    }
    let property = |name: &'static str| match taken.text(name) {
        // It would end the property, and what follows it would be another one.
        Ok(Some(text)) if text.contains('\0') => Err(format!("Batch Job DB misconfiguration: {name} has a NUL byte")),
        Ok(Some(text)) => Ok(text.to_owned()),
        Ok(None) => Err(format!("Batch Job DB misconfiguration: {name} is missing")),
        Err(reason) => Err(format!("Batch Job DB misconfiguration: {reason}")),
    };
    let port = property("port")?;
    Ok(Target::Host {
        host: property("host")?,
        port: port.parse().map_err(|_| "Batch Job DB misconfiguration: port is not a port number".to_owned())?,
        dbname: property("dbname")?,
        dbuser: property("dbuser")?,
        // A password may be empty and hold any bytes; it may not be left out.
        pass: taken.bytes("pass").ok_or("Batch Job DB misconfiguration: pass is missing")?.to_vec(),
    })
}

/// The statement's own limit, the job's, and the user's or else the worker's: the least of them. Zero means no limit said.
fn timeout(taken: &Taken, statement_ms: Option<u64>, rules: &Rules) -> Duration {
    let general = match taken.user_timeout_ms {
        Some(ms) if ms > 0 => Duration::from_millis(ms),
        _ => rules.statement_timeout,
    };
    [statement_ms, Some(taken.number("timeout"))]
        .into_iter()
        .flatten()
        .filter(|ms| *ms > 0)
        .map(Duration::from_millis)
        .fold(general, Duration::min)
}

/// The trace of this step, if the last execution left one. A trace is `step`, a word and perhaps a transaction id.
fn earlier(taken: &Taken, step: &str) -> Option<Trace> {
    let mut words = taken.text("trace").ok().flatten()?.split(' ');
    if words.next() != Some(step) {
        return None;
    }
    match (words.next(), words.next()) {
        (Some("transaction"), Some(id)) => Some(Trace::Transaction(id.to_owned())),
        (Some("untransacted"), None) => Some(Trace::Untransacted),
        _ => None,
    }
}

/// The fields that tell how far the job is.
fn progress(job: &SqlJob) -> Fields {
    let fields = Fields::new()
        .with("status", job.status().to_string())
        .with_some("fallback_status", job.fallback_status().map(|status| status.to_string()))
        .with_some("failed_reason", job.failed_reason());
    match job.kind() {
        // The text of a simple job never changes.
        queue_core::model::sql::Kind::Simple => fields,
        _ => fields.with("query", job.query_text()),
    }
}

fn ending(job: &SqlJob, rules: &Rules, extra: Fields) -> Ending {
    let verdict = if job.is_over() { final_verdict(rules) } else { Verdict::Next };
    Ending { verdict, fields: progress(job).and(extra), status: job.status().to_string() }
}

fn final_verdict(rules: &Rules) -> Verdict {
    Verdict::Final { keep_ms: rules.keep.as_millis() as u64 }
}

/// The end of a job of which no statement can be run.
fn failed_as_a_whole(taken: &Taken, reason: &str, rules: &Rules) -> Ending {
    let mut fields = Fields::new().with("status", "failed").with("failed_reason", reason);
    if taken.bytes("fallback_status").is_some() {
        // Nothing is left to run: a job is over when this status is final, too.
        fields = fields.with("fallback_status", Status::Skipped.as_str());
    }
    Ending { verdict: final_verdict(rules), fields, status: "failed".into() }
}

fn cancelled_while_waiting(job: &mut SqlJob, rules: &Rules) -> Ending {
    match job.cancel_pending() {
        Ok(()) => ending(job, rules, Fields::new()),
        Err(_) => {
            let fields = Fields::new().with("status", "cancelled");
            Ending { verdict: final_verdict(rules), fields, status: "cancelled".into() }
        }
    }
}

fn given_back(job: &mut SqlJob) -> Ending {
    if job.put_back().is_err() {
        tracing::debug!("nothing was running");
    }
    Ending { verdict: Verdict::Back, fields: progress(job), status: "given back".into() }
}

/// Whether a failure came before the database could be asked anything.
fn could_not_ask(failure: &Failure) -> bool {
    failure.retryable && failure.sqlstate.as_deref().is_none_or(|state| state.starts_with("08") || state == "57P03")
}

/// A failure as it may be logged: a database's message may quote SQL and data.
fn reason(failure: &Failure) -> &str {
    failure.sqlstate.as_deref().unwrap_or(&failure.message)
}

/// The end of a job that has ended too many workers.
fn put_aside(job: &mut SqlJob, taken: &Taken, rules: &Rules) -> Ending {
    if job.put_back().is_err() {
        tracing::debug!("nothing was running");
    }
    let lost = taken.text("lost_worker").ok().flatten().unwrap_or("unknown");
    let reason = format!("set aside: it ended {} workers, the last one {lost}", taken.number("unclean"));
    tracing::warn!(reason, "a job is set aside");
    let mut fields = progress(job)
        .and(Fields::new().with("status", Status::Ignored.as_str()).with("failed_reason", reason).with("trace", ""));
    if job.fallback_status().is_some() {
        fields = fields.and(Fields::new().with("fallback_status", Status::Skipped.as_str()));
    }
    let verdict = Verdict::Final { keep_ms: rules.keep_ignored.as_millis() as u64 };
    Ending { verdict, fields, status: Status::Ignored.to_string() }
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

    /// Whether the policy takes this error for one after which another attempt may help.
    fn wanted(&self, failure: &Failure) -> bool {
        let named = failure.sqlstate.as_deref().is_some_and(|code| self.policy.on.contains(code));
        failure.retryable || named && (failure.undone || self.idempotent)
    }

    fn again(&self, failure: &Failure) -> bool {
        self.wanted(failure) && self.left()
    }

    fn history(&self, step: &str, started: &str, ended: &str, error: &str) -> String {
        let one = Try {
            step: Some(step.to_owned()),
            worker: self.claim.session().to_string(),
            started_at: Some(started.to_owned()),
            ended_at: ended.to_owned(),
            error: error.to_owned(),
            unclean: false,
        };
        retry::write_history(self.claim.job().text("history").ok().flatten().unwrap_or_default(), one)
    }

    /// Another attempt, after a pause.
    fn scheduled(&self, job: &mut SqlJob, step: &str, started: &str, ended: &str, failure: Failure) -> Ending {
        if job.put_back().is_err() {
            tracing::debug!("nothing was running");
        }
        let attempts = self.attempts + 1;
        let chance = BuildHasher::hash_one(&RandomState::new(), attempts);
        let pause = self.policy.pause(attempts, chance);
        tracing::info!(
            attempt = attempts,
            pause_ms = pause.as_millis() as u64,
            reason = reason(&failure),
            "it failed and will be tried again"
        );
        let fields = progress(job)
            .with("attempts", attempts.to_string())
            .with("history", self.history(step, started, ended, &failure.message))
            .with("status", Status::Scheduled.as_str());
        Ending {
            verdict: Verdict::Later { after_ms: pause.as_millis() as u64 },
            fields,
            status: Status::Scheduled.to_string(),
        }
    }
}

/// The job's command tags and notices so far, as JSON by step, with those of one more statement.
fn results(taken: &Taken, step: &str, report: &Report) -> String {
    let mut all: serde_json::Map<String, serde_json::Value> =
        taken.text("results").ok().flatten().and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    all.insert(step.to_owned(), serde_json::json!({ "tag": report.tag, "notices": report.notices }));
    let text = serde_json::Value::Object(all.clone()).to_string();
    if text.len() <= RESULTS_MAX_BYTES {
        return text;
    }
    all.insert(step.to_owned(), serde_json::json!({ "tag": report.tag }));
    let text = serde_json::Value::Object(all).to_string();
    if text.len() <= RESULTS_MAX_BYTES { text } else { "{}".to_owned() }
}

/// The claim's page in the book, open while its statement runs.
struct Page {
    pen: Pen,
    /// Written when the claim is confirmed: readers see the statement running from then on.
    running: Fields,
    step: String,
    stop: Stop,
    lifetime: Duration,
    asked: AtomicBool,
}

impl Page {
    /// Writes under the claim. A worker that Redis does not answer for its session's lifetime has to take the claim for lost.
    async fn write(&self, fields: &Fields) -> Result<(), ClaimLost> {
        self.asked.store(true, Ordering::SeqCst);
        let since = Instant::now();
        let mut pause = Duration::from_millis(50);
        loop {
            match self.pen.mark(fields).await {
                Ok(Mark::Held) => return Ok(()),
                Ok(Mark::CancelAsked) => {
                    self.stop.ask(Cause::Cancelled);
                    return Ok(());
                }
                Ok(Mark::Stale) => return Err(ClaimLost),
                Err(error) if error.is_transient() && since.elapsed() + pause < self.lifetime => {
                    tracing::debug!(%error, "the claim could not be confirmed, asking again");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(1));
                }
                Err(error) => {
                    tracing::warn!(%error, "the claim could not be confirmed");
                    return Err(ClaimLost);
                }
            }
        }
    }
}

#[async_trait]
impl Ledger for Page {
    async fn confirm(&self) -> Result<(), ClaimLost> {
        self.write(&self.running).await
    }

    async fn note(&self, trace: Trace) -> Result<(), ClaimLost> {
        let trace = match trace {
            Trace::Transaction(id) => format!("{} transaction {id}", self.step),
            Trace::Untransacted => format!("{} untransacted", self.step),
        };
        self.write(&Fields::new().with("trace", trace)).await
    }
}
