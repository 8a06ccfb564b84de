//! A task's attempt: its handler is called, watched, told to stop if it must, and what comes of it decides the end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use queue_core::calls::{Fields, Mark, Taken, Verdict};
use queue_core::model::Status;
use queue_core::model::task::{Encoding, Payload};
use queue_core::session::Claim;
use tokio::task::JoinError;
use tracing::Instrument;

use super::desk::{Notebook, WorkOf};
use super::load::Loads;
use super::results::list;
use super::{Clock, Ending, History, Means, Retries, Rules, final_verdict, set_aside_reason, sleep_until};
use crate::execute::handlers::Registered;
use crate::execute::task::{Handler, Outcome, Problem, Task, Wish};
use crate::stop::{Cause, Stop};

/// The least time between two writes of progress and log lines.
const WRITE_INTERVAL: Duration = Duration::from_millis(500);
/// How long a handler that was dropped may take to be gone before its thread counts as lost.
const DROP_GRACE: Duration = Duration::from_secs(1);

/// Runs the task and says how the claim is to end; `None` if the claim was lost on the way.
pub(super) async fn settle(claim: &Claim, means: &Means, rules: &Rules, stop: &Stop, clock: &Clock) -> Option<Ending> {
    let taken = claim.job();
    if taken.bytes("cancel_requested_at").is_some_and(|at| !at.is_empty()) {
        return Some(over(Status::Cancelled, Fields::new(), rules));
    }
    if taken.number("unclean") >= rules.max_unclean {
        let fields = Fields::new().with("failed_reason", set_aside_reason(taken));
        return Some(over(Status::Ignored, fields, rules));
    }
    let failed = |reason: &str| over(Status::Failed, Fields::new().with("failed_reason", reason), rules);
    let retries = match Retries::of(claim, rules) {
        Ok(retries) => retries,
        Err(reason) => return Some(failed(&reason)),
    };
    let Some(registered) = means.handlers.get(&taken.pool) else {
        // Its configuration has changed since it opened its session. Others serve it.
        return Some(given_back());
    };
    let callee = Callee::of(taken, means, registered);
    let (task, has_deadline) = match task(taken, &retries, &callee, rules, clock) {
        Ok(task) => task,
        Err(reason) => return Some(failed(&reason)),
    };
    if task.timeout.is_zero() {
        return Some(failed("its deadline passed before it was begun"));
    }
    let of = WorkOf::new(taken.pool.clone(), task.input.clone(), callee.in_chunks);
    if let (Some(_), Ok(Some(saved))) = (&task.checkpoint, taken.text("checkpoint_of"))
        && let Some(reason) = of.differs_from(saved)
    {
        return Some(failed(&reason));
    }
    let started = clock.now();
    let timeout = task.timeout;
    let loads = callee.in_chunks.then(|| Loads::of(taken, &means.batches));
    let notebook = Arc::new(Notebook::new(*clock, Some((claim.pen(), stop.clone(), of)), loads));
    let outcome = execute(claim, means, callee, task, &notebook, stop).await;
    let at = clock.now();
    let told = notebook.fields();
    let problem = match (outcome, stop.cause()) {
        (_, Some(Cause::ClaimLost)) => return None,
        (Outcome::Done(kept), _) => return Some(over(Status::Done, told.and(kept), rules)),
        // Whatever a handler makes of being told to stop, that is why it ended.
        (_, Some(Cause::Cancelled)) => return Some(over(Status::Cancelled, told, rules)),
        (Outcome::NotReady(reason), _) => {
            tracing::warn!(reason, "the handler is not well, the task goes back");
            means.handlers.fell_ill(&taken.pool);
            return Some(given_back());
        }
        (_, Some(Cause::Draining)) => return Some(given_back()),
        (_, Some(Cause::TimedOut)) if has_deadline => Problem::fail("its deadline passed while it ran"),
        (_, Some(Cause::TimedOut)) => {
            Problem::retry(format!("it ran longer than {}", humantime::format_duration(timeout)))
        }
        (Outcome::Failed(problem), _) => problem,
        (Outcome::Stopped, _) => Problem::retry("its handler stopped without being told to"),
    };
    let result = problem.result.as_ref().and_then(|result| means.results.inline(result));
    Some(failed_attempt(problem, told, result, &retries, rules, &started, &at))
}

/// What runs a task: the handler of its pool, or what works in chunks beside it.
struct Callee {
    handler: Arc<dyn Handler>,
    timeout: Option<Duration>,
    stop_grace: Duration,
    in_chunks: bool,
}

impl Callee {
    fn of(taken: &Taken, means: &Means, registered: &Registered) -> Self {
        let stop_grace = registered.stop_grace;
        let in_chunks = taken.bytes("chunk").is_some_and(|chunk| !chunk.is_empty());
        if in_chunks {
            // The handler's own time is that of one item.
            let (handler, stop_grace) = (means.chunks.clone(), stop_grace.max(means.chunks.stop_grace()));
            return Self { handler, timeout: None, stop_grace, in_chunks };
        }
        Self { handler: registered.handler.clone(), timeout: registered.timeout, stop_grace, in_chunks }
    }
}

/// How long one call of a handler may take, by the job's, the user's, the handler's and the worker's limits.
pub(super) fn call_limit(taken: &Taken, own: Option<Duration>, rules: &Rules) -> Duration {
    let limits = [Some(taken.number("timeout")), taken.user_timeout_ms].into_iter().flatten().filter(|ms| *ms > 0);
    let limits = limits.map(Duration::from_millis).chain(own);
    limits.fold(rules.task_timeout, |least, limit| least.min(limit))
}

/// What the handler is given. Its timeout is zero if its deadline has passed, and whether it is the deadline's.
fn task(
    taken: &Taken,
    retries: &Retries<'_>,
    callee: &Callee,
    rules: &Rules,
    clock: &Clock,
) -> Result<(Task, bool), String> {
    let (app, op) = taken.pool.handler().ok_or("it names no handler")?;
    let encoding: Encoding = match taken.text("encoding")? {
        Some(word) => word.parse().map_err(|_| "its encoding is none that is known: json or msgpack".to_owned())?,
        None => Encoding::default(),
    };
    let payload = |field| taken.bytes(field).map(|bytes| Payload { encoding, bytes: bytes.to_vec() });
    let limit = call_limit(taken, callee.timeout, rules);
    let left = match taken.number("deadline") {
        0 => Duration::MAX,
        at_ms => Duration::from_millis(at_ms.saturating_sub(clock.now_ms())),
    };
    let tags = taken.text("tags")?.unwrap_or_default();
    let task = Task {
        job: taken.id.clone(),
        user: taken.user.clone(),
        app,
        op,
        input: payload("input").unwrap_or(Payload { encoding: Encoding::Json, bytes: b"null".to_vec() }),
        context: payload("context").filter(|context| !context.bytes.is_empty()),
        checkpoint: payload("checkpoint").filter(|checkpoint| !checkpoint.bytes.is_empty()),
        fence: taken.fence,
        attempt: retries.attempts + 1,
        max_attempts: retries.policy.max_attempts.get(),
        timeout: limit.min(left),
        tags: tags.split(',').filter(|tag| !tag.is_empty()).map(str::to_owned).collect(),
        row: None,
        traceparent: telemetry::traceparent(&tracing::Span::current()),
    };
    Ok((task, left <= limit))
}

/// Calls the handler, keeps what it hands back, and waits for the end of both, or of everybody's patience with them.
async fn execute(
    claim: &Claim,
    means: &Means,
    callee: Callee,
    task: Task,
    notebook: &Arc<Notebook>,
    stop: &Stop,
) -> Outcome<Fields> {
    let handlers = &means.handlers;
    let timeout = task.timeout;
    let span = tracing::info_span!("handler", app = %task.app, op = %task.op);
    let begun = Instant::now();
    let handler_stop = stop.token().child_token();
    let handler = callee.handler;
    let work = {
        let (notebook, handler_stop) = (notebook.clone(), handler_stop.clone());
        let (taken, results) = (claim.job().clone(), means.results.clone());
        async move {
            match handler.run(task, notebook, handler_stop).await {
                // A store that hangs costs the task its time, as the handler would, and not the worker its place.
                Outcome::Done(output) => results.keep(&taken, output).await.map_or_else(Outcome::Failed, Outcome::Done),
                Outcome::Failed(problem) => Outcome::Failed(problem),
                Outcome::NotReady(reason) => Outcome::NotReady(reason),
                Outcome::Stopped => Outcome::Stopped,
            }
        }
        .instrument(span)
    };
    let mut running = handlers.spawn(work);
    let token = stop.token();
    let (mut patience_ends, mut next_write) = (None, Instant::now());
    let mut writing = None;
    loop {
        tokio::select! {
            biased;
            ended = &mut running => return ended.unwrap_or_else(|error| Outcome::Failed(panicked(error))),
            () = token.cancelled(), if patience_ends.is_none() => {
                patience_ends = Some(Instant::now() + callee.stop_grace);
            }
            () = sleep_until(begun.checked_add(timeout)), if patience_ends.is_none() => stop.ask(Cause::TimedOut),
            () = sleep_until(patience_ends), if patience_ends.is_some() => break,
            mark = async { writing.as_mut().expect("is there").await }, if writing.is_some() => {
                writing = None;
                next_write = Instant::now() + WRITE_INTERVAL;
                match mark {
                    Ok(Mark::Held) => {}
                    Ok(Mark::CancelAsked) => stop.ask(Cause::Cancelled),
                    Ok(Mark::Stale) => stop.ask(Cause::ClaimLost),
                    Err(error) => tracing::debug!(%error, "progress could not be written, the next will be"),
                }
            }
            () = async { sleep_until(Some(next_write)).await; notebook.changed().await }, if writing.is_none() => {
                let (pen, fields) = (claim.pen(), notebook.fields());
                writing = Some(Box::pin(async move { pen.mark(&fields).await }));
            }
        }
    }
    running.abort();
    match tokio::time::timeout(DROP_GRACE, &mut running).await {
        // It came to its end in the last moment.
        Ok(Ok(outcome)) => outcome,
        Ok(Err(error)) if error.is_panic() => Outcome::Failed(panicked(error)),
        Ok(Err(_)) => {
            tracing::warn!("the handler did not stop in time and was dropped");
            Outcome::Stopped
        }
        Err(_) => {
            handlers.abandon(running);
            Outcome::Stopped
        }
    }
}

pub(super) fn panicked(error: JoinError) -> Problem {
    tracing::warn!("the handler panicked");
    match error.try_into_panic() {
        Ok(payload) => Problem::panicked(&*payload),
        // Its runtime is gone.
        Err(_) => Problem::retry("the worker stopped"),
    }
}

/// Another attempt, or the end.
pub(super) fn failed_attempt(
    problem: Problem,
    told: Fields,
    result: Option<Fields>,
    retries: &Retries<'_>,
    rules: &Rules,
    started: &str,
    at: &str,
) -> Ending {
    let reason = cut(&problem.reason);
    let tried = History { step: None, started, ended: at, error: &reason };
    if let Wish::Retry { after } = problem.wish
        && retries.left()
    {
        // Without its messages: they would stand beside the result of an attempt that goes well.
        return retries.later(told, tried, "the handler failed", after);
    }
    let messages = list("messages", &problem.messages);
    let mut fields = told.with("failed_reason", &reason).with_some("messages", messages);
    if let Some(result) = result {
        fields = fields.and(result);
    }
    if retries.more_than_one() {
        fields = fields.with("history", retries.history(tried)).with("attempts", (retries.attempts + 1).to_string());
    }
    let status = match problem.wish {
        Wish::Ignore => Status::Ignored,
        // All the attempts that it was allowed would have allowed another one.
        Wish::Retry { .. } if retries.more_than_one() => Status::Ignored,
        Wish::Retry { .. } | Wish::Fail => Status::Failed,
    };
    over(status, fields, rules)
}

/// A handler's own words, as long as they may be kept.
pub(super) fn cut(text: &str) -> String {
    const MOST: usize = 4096;
    text[..text.floor_char_boundary(MOST)].to_owned()
}

pub(super) fn over(status: Status, fields: Fields, rules: &Rules) -> Ending {
    let verdict = match status {
        Status::Ignored => Verdict::Final { keep_ms: rules.keep_ignored.as_millis() as u64 },
        _ => final_verdict(rules),
    };
    Ending { verdict, fields: fields.with("status", status.as_str()), status: status.to_string() }
}

pub(super) fn given_back() -> Ending {
    Ending { verdict: Verdict::Back, fields: Fields::new(), status: "given back".into() }
}
