//! A SQL job's next statement. One take runs one statement. If more are to come, the job goes back to the front of its queue, so
//! that a long chain can be interrupted between statements and other users get their turn.

use std::time::Duration;

use async_trait::async_trait;
use futures::FutureExt;
use queue_core::calls::{Fields, Taken, Verdict};
use queue_core::model::Status;
use queue_core::model::sql::{SqlJob, Verdict as StatementVerdict};
use queue_core::session::Claim;
use tracing::Instrument;

use super::page::{self, Page, SETTLE_ATTEMPTS, could_not_ask, earlier, left_behind};
use super::{Clock, Ending, History, Retries, Rules, final_verdict, set_aside_reason};
use crate::execute::sql::template;
use crate::execute::{ClaimLost, End, Executor, Failure, Ledger, Report, Target, Trace, Work};
use crate::stop::{Cause, Stop};

/// Most bytes of command tags and notices that are kept with a job.
const RESULTS_MAX_BYTES: usize = 64 * 1024;

/// Runs the job's next statement and says how the claim is to end; `None` if the claim was lost on the way.
pub(super) async fn settle(
    claim: &Claim,
    executor: &dyn Executor,
    rules: &Rules,
    stop: &Stop,
    clock: &Clock,
) -> Option<Ending> {
    let taken = claim.job();
    let mut job = match parse(taken) {
        Ok(job) => job,
        Err(reason) => return Some(failed_as_a_whole(taken, &reason, rules)),
    };
    let retries = match Retries::of(claim, rules) {
        Ok(retries) => retries,
        Err(reason) => return Some(failed_as_a_whole(taken, &reason, rules)),
    };
    let cancel_was_asked =
        taken.bytes("cancel_requested_at").is_some_and(|value| !value.is_empty()) || is_cancelled(taken);
    // What a worker that was lost left running must be settled first: its statement may have taken effect.
    let left_behind = left_behind(taken);
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
    let params = match params(taken) {
        Ok(params) => params,
        Err(reason) => return Some(failed_as_a_whole(taken, &reason, rules)),
    };
    let sql = if statement.templated || params.is_some() {
        let dialect = executor.dialect(&target);
        let (job_id, error_message) = (taken.id.as_str(), statement.error_message);
        let vars = template::Vars { job_id, error_message, params: params.as_ref() };
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
            let page = StatementPage {
                page: Page::of(claim, stop, rules.session_lifetime),
                running: progress(&job),
                step: step.clone(),
            };
            let span = tracing::info_span!("statement", step);
            let run = executor.execute(work, &page, stop.token()).instrument(span);
            // A bug in an executor must not take the worker's other jobs with it, nor leave this one without an end.
            let end = std::panic::AssertUnwindSafe(run).catch_unwind().await.unwrap_or_else(|_| {
                End::Unknown("the worker panicked while the statement ran; whether it took effect is not known".into())
            });
            asked = page.page.was_asked();
            end
        }
    };
    let at = clock.now();
    let tried = |error| History { step: Some(&step), started: &started, ended: &at, error };
    let mut extra = Fields::new().with("trace", "");
    // Every attempt that the job was allowed ended in an error that would have allowed another one.
    let mut exhausted = false;
    let verdict = match end {
        End::ClaimLost => return None,
        End::Done(report) => {
            extra = extra.with("results", results(taken, &step, &report));
            StatementVerdict::Done
        }
        End::Failed(failure) if stop.cause().is_none() && again(&retries, &failure) => {
            let known = asked && !could_not_ask(&failure);
            let mut ending = scheduled(&retries, &mut job, tried(&failure.message), &failure);
            if known {
                ending.fields = ending.fields.and(extra);
            }
            return Some(ending);
        }
        End::Unknown(reason) if stop.cause().is_none() && retries.idempotent && retries.left() => {
            let failure = Failure { message: reason, ..Failure::default() };
            let mut ending = scheduled(&retries, &mut job, tried(&failure.message), &failure);
            ending.fields = ending.fields.and(extra);
            return Some(ending);
        }
        End::Failed(failure) if earlier.is_some() && (!asked || could_not_ask(&failure)) => {
            // Nothing was tried now, but an earlier execution may have taken effect: that is asked for until it is answered.
            if taken.number("attempts") < SETTLE_ATTEMPTS {
                return Some(scheduled(&retries, &mut job, tried(&failure.message), &failure));
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
                extra = extra.with("history", retries.history(tried(&failure.message)));
                extra = extra.with("attempts", (retries.attempts + 1).to_string());
            }
            exhausted = retries.more_than_one() && wanted(&retries, &failure);
            StatementVerdict::Failed(failure.message)
        }
        End::Stopped => match stop.cause() {
            Some(Cause::ClaimLost) => return None,
            Some(Cause::Draining) => return Some(given_back(&mut job)),
            Some(Cause::Cancelled | Cause::SetAside | Cause::TimedOut) | None => StatementVerdict::Cancelled,
        },
        End::CancelledElsewhere => StatementVerdict::Cancelled,
        End::Unknown(reason) => {
            if retries.more_than_one() {
                extra = extra.with("history", retries.history(tried(&reason)));
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

/// Whether somebody has written that it is cancelled while a worker had it that is lost: what that one did is still to be found out.
fn is_cancelled(taken: &Taken) -> bool {
    taken.bytes("status") == Some(b"cancelled")
}

fn parse(taken: &Taken) -> Result<SqlJob, String> {
    let status = taken.text("status")?.and_then(|text| text.parse().ok()).unwrap_or(Status::Pending);
    let status = if is_cancelled(taken) { Status::Running } else { status };
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

/// The parameters that its statements may name.
fn params(taken: &Taken) -> Result<Option<serde_json::Map<String, serde_json::Value>>, String> {
    match taken.bytes("params").filter(|text| !text.is_empty()) {
        None => Ok(None),
        Some(text) => {
            serde_json::from_slice(text).map(Some).map_err(|error| format!("its params are no JSON object: {error}"))
        }
    }
}

fn target(taken: &Taken) -> Result<Target, String> {
    target_in(|name| Ok(taken.text(name)?.map(str::to_owned)), taken.bytes("pass"))
}

/// Where SQL runs, by the fields that say so.
pub(super) fn target_in(
    text: impl Fn(&'static str) -> Result<Option<String>, String>,
    pass: Option<&[u8]>,
) -> Result<Target, String> {
    if let Some(name) = text("database")? {
        return Ok(Target::Named(name));
    }
    let property = |name: &'static str| match text(name) {
        // It would end the property, and what follows it would be another one.
        Ok(Some(text)) if text.contains('\0') => Err(format!("Batch Job DB misconfiguration: {name} has a NUL byte")),
        Ok(Some(text)) => Ok(text),
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
        pass: pass.ok_or("Batch Job DB misconfiguration: pass is missing")?.to_vec(),
    })
}

/// The statement's own limit, the job's, and the user's or else the worker's: the least of them. Zero means no limit said.
pub(super) fn timeout(taken: &Taken, statement_ms: Option<u64>, rules: &Rules) -> Duration {
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

/// A failure as it may be logged: a database's message may quote SQL and data.
fn reason(failure: &Failure) -> &str {
    failure.sqlstate.as_deref().unwrap_or(&failure.message)
}

/// The end of a job that has ended too many workers.
fn put_aside(job: &mut SqlJob, taken: &Taken, rules: &Rules) -> Ending {
    if job.put_back().is_err() {
        tracing::debug!("nothing was running");
    }
    let reason = set_aside_reason(taken);
    let mut fields = progress(job)
        .and(Fields::new().with("status", Status::Ignored.as_str()).with("failed_reason", reason).with("trace", ""));
    if job.fallback_status().is_some() {
        fields = fields.and(Fields::new().with("fallback_status", Status::Skipped.as_str()));
    }
    let verdict = Verdict::Final { keep_ms: rules.keep_ignored.as_millis() as u64 };
    Ending { verdict, fields, status: Status::Ignored.to_string() }
}

/// Whether the policy takes this error for one after which another attempt may help.
fn wanted(retries: &Retries<'_>, failure: &Failure) -> bool {
    let named = failure.sqlstate.as_deref().is_some_and(|code| retries.policy.on.contains(code));
    failure.retryable || named && (failure.undone || retries.idempotent)
}

fn again(retries: &Retries<'_>, failure: &Failure) -> bool {
    wanted(retries, failure) && retries.left()
}

/// Another attempt, after a pause.
fn scheduled(retries: &Retries<'_>, job: &mut SqlJob, tried: History<'_>, failure: &Failure) -> Ending {
    if job.put_back().is_err() {
        tracing::debug!("nothing was running");
    }
    retries.later(progress(job), tried, reason(failure), None)
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

/// The page of a statement.
struct StatementPage {
    page: Page,
    /// Written when the claim is confirmed: readers see the statement running from then on.
    running: Fields,
    step: String,
}

#[async_trait]
impl Ledger for StatementPage {
    async fn confirm(&self) -> Result<(), ClaimLost> {
        self.page.write(&self.running).await
    }

    async fn note(&self, trace: Trace) -> Result<(), ClaimLost> {
        self.page.write(&Fields::new().with("trace", page::trace(&self.step, &trace))).await
    }
}
