//! A chunk's attempt: its rows go to their handler, are watched, and what came of them decides how the chunk ends.
//!
//! A chunk ends once all its rows have ended. Rows that are to be tried again keep it, with what became of the others; rows that
//! nobody has begun when it has run for long, or must end, are cut off: they are another chunk then, for whoever is free.

use std::sync::Arc;
use std::time::{Duration, Instant};

use queue_core::batch::BatchError;
use queue_core::batch::work::{Facts, Pace, end_fields, partial_fields};
use queue_core::calls::{Fields, Mark, Taken, Verdict};
use queue_core::error::Error;
use queue_core::model::batch::{Chunk, Row, RowResult};
use queue_core::session::Claim;

use super::task::{call_limit, given_back};
use super::{Clock, Ending, History, Means, Retries, Rules, set_aside_reason, sql, sql_rows};
use crate::execute::handlers::Registered;
use crate::execute::rows::{Feed, RowAnswer, RowsEnd, RowsOf};
use crate::execute::task::{Problem, Wish};
use crate::stop::{Cause, Stop};

/// A chunk that has run for so long leaves the rows that nobody has begun to others.
const CUT_AFTER: Duration = Duration::from_secs(1);
/// How often the rows at work are looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// The pause before a chunk is tried again when Redis did not do what is needed to begin.
const BEGIN_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// How long a handler that was dropped may take to be gone before its thread counts as lost.
const DROP_GRACE: Duration = Duration::from_secs(1);

/// Runs the chunk and says how its claim is to end; `None` if the claim was lost on the way.
pub(super) async fn settle(
    claim: &Claim,
    chunk: Chunk,
    means: &Means,
    rules: &Rules,
    stop: &Stop,
    clock: &Clock,
) -> Option<Ending> {
    let taken = claim.job();
    let retries = match Retries::of(claim, rules) {
        Ok(retries) => retries,
        Err(reason) => return Some(all_failed(chunk.count, "invalid", &reason, rules)),
    };
    let read = read(claim, &chunk, means).await;
    let (facts, mut rows, mut results) = match read {
        Ok(Some(read)) => read,
        // The batch is gone: there is nobody to tell.
        Ok(None) => return Some(all_failed(chunk.count, "gone", "its batch is gone", rules)),
        Err(BatchError::Redis(error)) if error.is_worth_repeating() => {
            tracing::warn!(%error, "rows can't be read, they are tried again");
            return Some(soon(Fields::new()));
        }
        Err(error) => return Some(all_failed(chunk.count, "unreadable", &error.to_string(), rules)),
    };
    let is_statement = taken.pool.handler().is_none();
    if taken.number("unclean") > 0 && rows.len() > 1 && !is_statement {
        // One at a time from here on, so that a row that ends its worker is found. What a lost worker did for a statement is
        // settled for the chunk as it was.
        match cut_patiently(claim, 1, &results, rules.session_lifetime).await {
            Ok(Mark::Held) => {
                rows.truncate(1);
                results.truncate(1);
            }
            Ok(Mark::CancelAsked) => return Some(ended(&results, rules)),
            Ok(Mark::Stale) => return None,
            // Whether they are is not known: the record alone says which rows are whose.
            Err(error) if error.is_worth_repeating() => {
                tracing::warn!(%error, "whether rows were set apart is not known");
                return None;
            }
            Err(error) => {
                tracing::warn!(%error, "rows could not be set apart, they are tried again");
                return Some(soon(partial_fields(&chunk, &results)));
            }
        }
    }
    if taken.number("unclean") >= rules.max_unclean {
        if !is_statement {
            set_aside(taken, &mut results);
            return Some(ended(&results, rules));
        }
        // What was begun is settled, and nothing more of it is run.
        stop.ask(Cause::SetAside);
    }
    let open: Vec<Option<Row>> =
        rows.into_iter().zip(&results).map(|(row, result)| result.is_none().then_some(row)).collect();
    let started = clock.now();
    if is_statement {
        let facts = match statement(claim, &facts, rules) {
            Ok(facts) => facts,
            Err(reason) => return Some(all_failed(chunk.count, "invalid", &reason, rules)),
        };
        let ran = match sql_rows::run(claim, &*means.sql, facts, open, stop).await {
            sql_rows::Ran::ClaimLost => return None,
            sql_rows::Ran::Answered(answers, pace) => Ran::answered(answers, pace),
            sql_rows::Ran::Stopped => Ran::answered(results.iter().map(|_| None).collect(), None),
            sql_rows::Ran::Failed(problem) => {
                Ran::answered(results.iter().map(|_| Some(RowAnswer::Failed(problem.clone()))).collect(), None)
            }
            // With its trace: the database must be asked before any of the rows ends.
            sql_rows::Ran::Unsettled(problem) => {
                let at = clock.now();
                let tried = History { step: None, started: &started, ended: &at, error: &problem.reason };
                return Some(retries.later(
                    Fields::new(),
                    tried,
                    "a lost worker's execution could not be asked for",
                    None,
                ));
            }
        };
        if stop.cause() == Some(Cause::SetAside) {
            ran.fill(&mut results);
            set_aside(taken, &mut results);
        }
        let mut ending = settle_answers(claim, chunk, ran, results, &retries, &started, (rules, stop, clock))?;
        ending.fields = ending.fields.with("trace", "");
        return Some(ending);
    }
    let Some(registered) = means.handlers.get(&taken.pool) else {
        // Its configuration has changed since it opened its session. Others serve it.
        return Some(next(&chunk, &results));
    };
    let of = match rows_of(claim, &chunk, &facts, &retries, registered, rules) {
        Ok(of) => of,
        Err(reason) => return Some(all_failed(chunk.count, "invalid", &reason, rules)),
    };
    let ran = run(claim, means, registered, Feed::new(of, open), &results, stop, rules.session_lifetime).await;
    if let Some(reason) = &ran.not_ready {
        tracing::warn!(reason, "the handler is not well, rows go back");
        means.handlers.fell_ill(&taken.pool);
    }
    settle_answers(claim, chunk, ran, results, &retries, &started, (rules, stop, clock))
}

/// How the chunk is to end after a run; `None` if the claim was lost.
fn settle_answers(
    claim: &Claim,
    chunk: Chunk,
    ran: Ran,
    mut results: Vec<Option<RowResult>>,
    retries: &Retries<'_>,
    started: &str,
    (rules, stop, clock): (&Rules, &Stop, &Clock),
) -> Option<Ending> {
    let count = results.len();
    match stop.cause() {
        Some(Cause::ClaimLost) => return None,
        // Its batch was aborted: nothing that comes now counts.
        Some(Cause::Cancelled) => {
            tracing::debug!(job = %claim.job().id, "its batch was aborted");
            return Some(ended(&results, rules));
        }
        _ => {}
    }
    let draining = stop.cause() == Some(Cause::Draining);
    let mut again: Option<Problem> = None;
    for (place, answer) in ran.answers.into_iter().enumerate().filter(|(place, _)| *place < ran.kept) {
        if results[place].is_some() {
            continue;
        }
        let answer = match answer {
            Some(answer) => answer,
            None if place >= ran.begun || draining || ran.not_ready.is_some() => continue,
            None => RowAnswer::Failed(ran.unanswered.clone()),
        };
        match answer {
            RowAnswer::Failed(problem) if matches!(problem.wish, Wish::Retry { .. }) && retries.left() => {
                again.get_or_insert(problem);
            }
            answer => results[place] = Some(answer.last()),
        }
    }
    results.truncate(ran.kept);
    if ran.kept < count && ran.kept == 0 {
        return Some(given_back());
    }
    let kept_chunk = Chunk { count: results.len(), ..chunk };
    Some(match again {
        Some(Problem { wish: Wish::Retry { after }, reason, .. }) => {
            let at = clock.now();
            let tried = History { step: None, started, ended: &at, error: &super::task::cut(&reason) };
            retries.later(partial_fields(&kept_chunk, &results), tried, "rows failed", after)
        }
        _ if results.iter().all(Option::is_some) => {
            let mut ending = ended(&results, rules);
            if let Some(pace) = ran.pace {
                ending.fields = pace.with(ending.fields);
            }
            ending
        }
        _ if results.iter().all(Option::is_none) => given_back(),
        _ => next(&kept_chunk, &results),
    })
}

/// The statement for the rows, and where it runs.
fn statement(claim: &Claim, facts: &Facts, rules: &Rules) -> Result<sql_rows::Facts, String> {
    let field = |name: &'static str| match facts.connection.get(name).filter(|value| !value.is_empty()) {
        None => Ok(None),
        Some(value) => match std::str::from_utf8(value) {
            Ok(text) => Ok(Some(text.to_owned())),
            Err(_) => Err(format!("field {name} is not valid UTF-8")),
        },
    };
    Ok(sql_rows::Facts {
        statement: facts.statement.clone().ok_or("its batch has no statement")?,
        target: sql::target_in(field, facts.connection.get("pass").map(Vec::as_slice))?,
        row_timeout: sql::timeout(claim.job(), None, rules),
        session_lifetime: rules.session_lifetime,
    })
}

/// Rows that kept ending their workers have failed.
fn set_aside(taken: &Taken, results: &mut [Option<RowResult>]) {
    let reason = set_aside_reason(taken);
    for result in results.iter_mut().filter(|result| result.is_none()) {
        *result = Some(RowResult::failed("worker_lost", &reason));
    }
}

/// Facts of the batch, the chunk's rows, and what became of them at earlier attempts; nothing if they are gone.
async fn read(
    claim: &Claim,
    chunk: &Chunk,
    means: &Means,
) -> Result<Option<(Facts, Vec<Row>, Vec<Option<RowResult>>)>, BatchError> {
    let pen = claim.pen();
    let Some(made) = pen.batch_made(&chunk.batch).await? else { return Ok(None) };
    let batch = (&chunk.batch, made.as_slice());
    let Some(facts) = means.blocks.facts(&pen, batch).await?.as_ref().clone() else { return Ok(None) };
    let rows = means.blocks.rows(&pen, batch, chunk.block, chunk.first, chunk.count).await?;
    let Some(rows) = rows else { return Ok(None) };
    let mut results = if chunk.has_partial { pen.partial().await? } else { Vec::new() };
    results.resize_with(rows.len(), || None);
    Ok(Some((facts, rows, results)))
}

fn rows_of(
    claim: &Claim,
    chunk: &Chunk,
    facts: &Facts,
    retries: &Retries<'_>,
    registered: &Registered,
    rules: &Rules,
) -> Result<RowsOf, String> {
    let taken = claim.job();
    let (app, op) = taken.pool.handler().ok_or("it names no handler")?;
    Ok(RowsOf {
        batch: chunk.batch.clone(),
        user: taken.user.clone(),
        app,
        op,
        encoding: facts.encoding,
        context: facts.context.clone(),
        fence: taken.fence,
        attempt: retries.attempts + 1,
        max_attempts: retries.policy.max_attempts.get(),
        timeout: call_limit(taken, registered.timeout, rules),
        traceparent: telemetry::traceparent(&tracing::Span::current()),
    })
}

/// What came of a run.
struct Ran {
    answers: Vec<Option<RowAnswer>>,
    /// So many of the first rows were looked at; those of them without an answer were begun.
    begun: usize,
    /// So many of the first rows are the chunk's still.
    kept: usize,
    /// What is to be said of rows that were begun and not answered.
    unanswered: Problem,
    not_ready: Option<String>,
    /// How long they took.
    pace: Option<Pace>,
}

impl Ran {
    /// Nothing but answers: rows without one were not begun.
    fn answered(answers: Vec<Option<RowAnswer>>, pace: Option<Pace>) -> Self {
        let kept = answers.len();
        Self { answers, begun: 0, kept, unanswered: Problem::retry("it was not answered"), not_ready: None, pace }
    }

    /// Writes down the rows that have ended.
    fn fill(&self, results: &mut [Option<RowResult>]) {
        for (result, answer) in results.iter_mut().zip(&self.answers) {
            if let (None, Some(RowAnswer::Ended(ended))) = (&result, answer) {
                *result = Some(ended.clone());
            }
        }
    }
}

/// Has the handler work on the rows, and waits for its end, or for the end of everybody's patience with it.
async fn run(
    claim: &Claim,
    means: &Means,
    registered: &Registered,
    feed: Feed,
    earlier: &[Option<RowResult>],
    stop: &Stop,
    lifetime: Duration,
) -> Ran {
    let (feed, begun_at) = (Arc::new(feed), Instant::now());
    let timeout = feed.of().timeout;
    let handler_stop = stop.token().child_token();
    let work = {
        let (feed, handler, handler_stop) = (feed.clone(), registered.handler.clone(), handler_stop.clone());
        async move { handler.run_rows(feed, handler_stop).await }
    };
    let mut running = means.handlers.spawn(work);
    let token = stop.token();
    let mut looks = tokio::time::interval(LOOK_INTERVAL);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut unanswered = Problem::retry("its handler did not answer");
    let mut kept = earlier.len();
    let mut patience_ends: Option<Instant> = None;
    let mut end = None;
    loop {
        tokio::select! {
            biased;
            ended = &mut running => {
                end = Some(ended);
                break;
            }
            () = token.cancelled(), if patience_ends.is_none() => {
                patience_ends = Some(Instant::now() + registered.stop_grace);
            }
            _ = looks.tick() => {
                let now = Instant::now();
                if patience_ends.is_some_and(|ends| ends <= now) {
                    break;
                }
                if patience_ends.is_none() && feed.overdue_at().is_some_and(|at| at <= now) {
                    unanswered = Problem::retry(format!("it ran longer than {}", humantime::format_duration(timeout)));
                    handler_stop.cancel();
                    patience_ends = Some(now + registered.stop_grace);
                }
                if kept == earlier.len() && patience_ends.is_none() && begun_at.elapsed() >= CUT_AFTER && feed.has_more() {
                    let first = feed.shorten();
                    kept = cut(claim, first, earlier, stop, lifetime).await;
                }
            }
        }
    }
    if end.is_none() {
        running.abort();
        match tokio::time::timeout(DROP_GRACE, &mut running).await {
            Ok(ended) => end = Some(ended),
            Err(_) => means.handlers.abandon(running),
        }
        tracing::warn!("the handler did not stop in time and was dropped");
    }
    let mut not_ready = None;
    match end {
        Some(Ok(RowsEnd::NotReady(reason))) => not_ready = Some(reason),
        Some(Err(error)) if error.is_panic() => unanswered = super::task::panicked(error),
        _ => {}
    }
    let begun = feed.shorten();
    if begun < kept && begun > 0 {
        kept = cut(claim, begun, earlier, stop, lifetime).await.min(kept);
    }
    let kept = if begun == 0 { 0 } else { kept };
    let (took, answers) = (feed.took(), feed.take_answers());
    let pace = took.and_then(|took| Pace::of(took, answers.iter().flatten().count(), Duration::ZERO));
    Ran { answers, begun, kept, unanswered, not_ready, pace }
}

/// Leaves all but the first rows to others. Returns how many the chunk has then.
async fn cut(claim: &Claim, keep: usize, earlier: &[Option<RowResult>], stop: &Stop, lifetime: Duration) -> usize {
    if keep == 0 || keep >= earlier.len() {
        return earlier.len();
    }
    match cut_patiently(claim, keep, earlier, lifetime).await {
        Ok(Mark::Held) => keep,
        Ok(Mark::CancelAsked) => {
            stop.ask(Cause::Cancelled);
            keep
        }
        Ok(Mark::Stale) => {
            stop.ask(Cause::ClaimLost);
            keep
        }
        Err(error) if error.is_worth_repeating() => {
            // They may be another chunk's by now, and would be counted twice.
            tracing::warn!(%error, "whether rows were left to others is not known");
            stop.ask(Cause::ClaimLost);
            keep
        }
        Err(error) => {
            // They stay this chunk's, and go back with it.
            tracing::warn!(%error, "rows could not be left to others");
            earlier.len()
        }
    }
}

/// Asks again while Redis does not answer, for as long as the claim can be held: a cut whose answer was lost has been made.
async fn cut_patiently(
    claim: &Claim,
    keep: usize,
    earlier: &[Option<RowResult>],
    lifetime: Duration,
) -> Result<Mark, Error> {
    let since = Instant::now();
    let mut pause = Duration::from_millis(50);
    loop {
        match claim.pen().cut(keep, earlier).await {
            Err(error) if error.is_worth_repeating() && since.elapsed() + pause < lifetime => {
                tracing::debug!(%error, "rows were not cut off, asking again");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(1));
            }
            answer => return answer,
        }
    }
}

fn ended(results: &[Option<RowResult>], rules: &Rules) -> Ending {
    let verdict = Verdict::Part { keep_ms: rules.keep.as_millis() as u64 };
    Ending { verdict, fields: end_fields(results), status: "done".into() }
}

fn all_failed(count: usize, errcode: &str, reason: &str, rules: &Rules) -> Ending {
    tracing::warn!(reason, "rows failed");
    ended(&vec![Some(RowResult::failed(errcode, reason)); count], rules)
}

/// After a pause.
fn soon(fields: Fields) -> Ending {
    let verdict = Verdict::Later { after_ms: BEGIN_AGAIN_AFTER.as_millis() as u64 };
    Ending { verdict, fields: fields.with("status", "scheduled"), status: "not begun".into() }
}

/// Back to the front of its line, with what became of its rows.
fn next(chunk: &Chunk, results: &[Option<RowResult>]) -> Ending {
    Ending { verdict: Verdict::Next, fields: partial_fields(chunk, results), status: "given back".into() }
}
