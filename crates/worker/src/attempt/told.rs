//! Telling the application that its batch is over, whatever its end: at least once, and again until the handler says that it has
//! heard.

use std::time::{Duration, Instant};

use queue_core::batch::BatchError;
use queue_core::calls::{Fields, Verdict};
use queue_core::ids::JobId;
use queue_core::model::Status;
use queue_core::session::Claim;

use super::task::{call_limit, failed_attempt, given_back, over, panicked};
use super::{Clock, Ending, Means, Retries, Rules, set_aside_reason, sleep_until};
use crate::execute::rows::BatchEnd;
use crate::execute::task::{Outcome, Problem};
use crate::stop::{Cause, Stop};

/// How long a handler that was dropped may take to be gone before its thread counts as lost.
const DROP_GRACE: Duration = Duration::from_secs(1);

/// Tells it and says how the claim is to end; `None` if the claim was lost on the way.
pub(super) async fn settle(
    claim: &Claim,
    batch: &JobId,
    means: &Means,
    rules: &Rules,
    stop: &Stop,
    clock: &Clock,
) -> Option<Ending> {
    let taken = claim.job();
    if taken.bytes("cancel_requested_at").is_some_and(|at| !at.is_empty()) {
        return Some(over(Status::Cancelled, Fields::new(), rules));
    }
    if taken.number("unclean") >= rules.max_unclean {
        let fields = Fields::new().with("failed_reason", set_aside_reason(taken));
        return Some(over(Status::Ignored, fields, rules));
    }
    let retries = match Retries::of(claim, rules) {
        Ok(retries) => retries,
        Err(reason) => return Some(failed(&reason, rules)),
    };
    let Some(registered) = means.handlers.get(&taken.pool) else { return Some(given_back()) };
    let end = match end_of(claim, batch, means, retries.attempts + 1).await {
        Ok(Some(end)) => end,
        Ok(None) => return Some(failed("the record of the batch is gone", rules)),
        Err(error) => {
            tracing::warn!(%error, "how the batch ended can't be read, it is tried again");
            let fields = Fields::new().with("status", Status::Scheduled.as_str());
            let verdict = Verdict::Later { after_ms: 1_000 };
            return Some(Ending { verdict, fields, status: Status::Scheduled.to_string() });
        }
    };
    let started = clock.now();
    let timeout = call_limit(taken, registered.timeout, rules);
    let (handler, handler_stop) = (registered.handler.clone(), stop.token().child_token());
    let mut running = means.handlers.spawn(async move { handler.mark_done(end, handler_stop).await });
    let timeout_at = Instant::now().checked_add(timeout);
    let token = stop.token();
    let mut patience_ends = None;
    let outcome = loop {
        tokio::select! {
            biased;
            ended = &mut running => break ended.unwrap_or_else(|error| Outcome::Failed(panicked(error))),
            () = token.cancelled(), if patience_ends.is_none() => {
                patience_ends = Some(Instant::now() + registered.stop_grace);
            }
            () = sleep_until(timeout_at), if patience_ends.is_none() => stop.ask(Cause::TimedOut),
            () = sleep_until(patience_ends), if patience_ends.is_some() => {
                running.abort();
                if tokio::time::timeout(DROP_GRACE, &mut running).await.is_err() {
                    means.handlers.abandon(running);
                }
                break Outcome::Stopped;
            }
        }
    };
    let at = clock.now();
    let problem = match (outcome, stop.cause()) {
        (_, Some(Cause::ClaimLost)) => return None,
        (Outcome::Done(_), _) => return Some(over(Status::Done, Fields::new(), rules)),
        (_, Some(Cause::Cancelled)) => return Some(over(Status::Cancelled, Fields::new(), rules)),
        (Outcome::NotReady(reason), _) => {
            tracing::warn!(reason, "the handler is not well, the batch's end is told later");
            means.handlers.fell_ill(&taken.pool);
            return Some(given_back());
        }
        (_, Some(Cause::Draining)) => return Some(given_back()),
        (_, Some(Cause::TimedOut)) => {
            Problem::retry(format!("it ran longer than {}", humantime::format_duration(timeout)))
        }
        (Outcome::Failed(problem), _) => problem,
        (Outcome::Stopped, _) => Problem::retry("its handler stopped without being told to"),
    };
    Some(failed_attempt(problem, Fields::new(), None, &retries, rules, &started, &at))
}

fn failed(reason: &str, rules: &Rules) -> Ending {
    over(Status::Failed, Fields::new().with("failed_reason", reason), rules)
}

async fn end_of(claim: &Claim, batch: &JobId, means: &Means, attempt: u64) -> Result<Option<BatchEnd>, BatchError> {
    let (pen, taken) = (claim.pen(), claim.job());
    let Some(view) = pen.batch_view(batch).await? else { return Ok(None) };
    let Some(made) = pen.batch_made(batch).await? else { return Ok(None) };
    let facts = means.blocks.facts(&pen, (batch, &made)).await?;
    let Some((app, op)) = taken.pool.handler() else { return Ok(None) };
    Ok(Some(BatchEnd {
        batch: batch.clone(),
        user: taken.user.clone(),
        app,
        op,
        status: view.status,
        counts: view.counts,
        files: view.files,
        context: facts.as_ref().as_ref().and_then(|facts| facts.context.clone()),
        attempt,
    }))
}
