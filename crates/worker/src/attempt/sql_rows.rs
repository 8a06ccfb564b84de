//! A chunk of rows in the hands of a statement: one transaction for all of them, applied exactly once.
//!
//! Its trace and the answers to its rows are noted together before COMMIT. So a chunk whose worker was lost is either run again, or
//! ends with the answers that its transaction had.

use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::FutureExt;
use queue_core::batch::work::Pace;
use queue_core::calls::Fields;
use queue_core::model::batch::{self, Row, RowResult};
use queue_core::model::task::Message;
use queue_core::session::Claim;
use tracing::Instrument;

use super::page::{self, Page, SETTLE_ATTEMPTS, could_not_ask, earlier, left_behind};
use crate::execute::rows::RowAnswer;
use crate::execute::task::{Problem, Wish};
use crate::execute::{
    ClaimLost, Executor, Failure, RowAnswers, RowsLedger, RowsWork, SqlRow, SqlRowsEnd, Target, Trace, Work,
};
use crate::stop::Stop;

/// The name of the one step of a chunk, in its trace and in a SQLite file's marker.
const STEP: &str = "rows";

/// What the rows of a chunk have in common.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The statement, with its parameters as `$1` or as `:name`.
    pub statement: String,
    /// Where it runs.
    pub target: Target,
    /// How long it may run for one row.
    pub row_timeout: Duration,
    /// How long Redis may be silent before the claim has to be taken for lost.
    pub session_lifetime: Duration,
}

/// What became of a chunk.
#[derive(Debug, PartialEq)]
pub enum Ran {
    /// The answers to its rows, by their places. Rows without one were not begun, or had ended before. Rows that were run now say
    /// how long they took.
    Answered(Vec<Option<RowAnswer>>, Option<Pace>),
    /// Nothing took effect, because the stop was asked for. What an earlier execution began had none either.
    Stopped,
    /// The claim is another's: nothing may be recorded.
    ClaimLost,
    /// Nothing took effect, of no row.
    Failed(Problem),
    /// What an earlier execution did could not be asked for yet. The chunk must come again, with its trace as it is and one attempt
    /// more on its books: none of its rows may end otherwise.
    Unsettled(Problem),
}

/// Runs the statement for the rows of the chunk that the claim is to; `None` stands for rows that have ended before.
pub async fn run(claim: &Claim, executor: &dyn Executor, facts: Facts, rows: Vec<Option<Row>>, stop: &Stop) -> Ran {
    let taken = claim.job();
    let earlier = earlier(taken, STEP);
    let open: Vec<bool> = rows.iter().map(Option::is_some).collect();
    let all = |answer: RowResult| {
        Ran::Answered(open.iter().map(|open| open.then(|| RowAnswer::Ended(answer.clone()))).collect(), None)
    };
    let unknown = |reason: String| all(RowResult::failed("unknown", reason));
    let work = RowsWork {
        each: Work {
            job: taken.id.clone(),
            user: taken.user.clone(),
            fence: taken.fence,
            step: STEP.into(),
            sql: facts.statement,
            timeout: facts.row_timeout,
            target: facts.target,
            earlier: earlier.clone(),
            takes_over: left_behind(taken),
        },
        rows: rows
            .into_iter()
            .enumerate()
            .filter_map(|(place, row)| row.map(|Row { input, .. }| SqlRow { place, input }))
            .collect(),
    };
    let page = RowsPage { page: Page::of(claim, stop, facts.session_lifetime), places: open.len() };
    let begin = Instant::now();
    let running =
        executor.execute_rows(work, &page, stop.token()).instrument(tracing::info_span!("statement", step = STEP));
    // A bug in an executor must not take the worker's other jobs with it, nor leave these rows without an end.
    let end = std::panic::AssertUnwindSafe(running).catch_unwind().await.unwrap_or_else(|_| {
        SqlRowsEnd::Unknown("the worker panicked while the statement ran; whether it took effect is not known".into())
    });
    match end {
        SqlRowsEnd::Committed(answers, took) => {
            let pace = Pace::of(took, answers.len(), begin.elapsed().saturating_sub(took));
            Ran::Answered(by_place(answers, open.len(), RowAnswer::Ended), pace)
        }
        SqlRowsEnd::EarlierCommitted => match page.noted().await {
            Ok(answers) => {
                Ran::Answered(answers.into_iter().map(|answer| answer.map(RowAnswer::Ended)).collect(), None)
            }
            Err(reason) => unknown(format!("the rows were worked on by a worker that was lost, and {reason}")),
        },
        SqlRowsEnd::Stopped => Ran::Stopped,
        SqlRowsEnd::ClaimLost => Ran::ClaimLost,
        // Nothing was tried now, but an earlier execution may have taken effect: that is asked for until it is answered.
        SqlRowsEnd::Failed(failure) if earlier.is_some() && (!page.page.was_asked() || could_not_ask(&failure)) => {
            if taken.number("attempts") < SETTLE_ATTEMPTS {
                return Ran::Unsettled(Problem { wish: Wish::Retry { after: None }, ..problem(failure) });
            }
            let why = failure.message;
            unknown(format!("whether the lost worker's execution took effect could not be asked: {why}"))
        }
        SqlRowsEnd::Failed(failure) => Ran::Failed(problem(failure)),
        SqlRowsEnd::Unknown(reason) => unknown(reason),
    }
}

fn problem(failure: Failure) -> Problem {
    let Failure { message, sqlstate, retryable, .. } = failure;
    let errcode = sqlstate.unwrap_or_else(|| "processing_error".into());
    let messages = vec![Message { msgid: 10, errcode, field: None, vals: vec![message.clone()] }];
    let wish = if retryable { Wish::Retry { after: None } } else { Wish::Fail };
    Problem { wish, reason: message, messages, result: None }
}

fn by_place<T>(answers: RowAnswers, places: usize, of: impl Fn(RowResult) -> T) -> Vec<Option<T>> {
    let mut all: Vec<Option<T>> = (0..places).map(|_| None).collect();
    for (place, answer) in answers {
        all[place] = Some(of(answer));
    }
    all
}

/// The page of a chunk.
struct RowsPage {
    page: Page,
    places: usize,
}

impl RowsPage {
    /// What became of the rows of a transaction that is committed.
    async fn noted(&self) -> Result<Vec<Option<RowResult>>, String> {
        let packed = self.page.noted().await.map_err(|error| format!("their answers could not be read: {error}"))?;
        let packed = packed.ok_or("their answers are lost")?;
        let answers =
            batch::unpack_results(&packed).map_err(|fault| format!("their answers can't be read: {fault}"))?;
        if answers.len() == self.places { Ok(answers) } else { Err("their answers are those of other rows".into()) }
    }
}

#[async_trait]
impl RowsLedger for RowsPage {
    async fn confirm(&self) -> Result<(), ClaimLost> {
        self.page.write(&Fields::new()).await
    }

    async fn note(&self, trace: Trace, answers: &RowAnswers) -> Result<(), ClaimLost> {
        let packed = batch::pack_results(&by_place(answers.clone(), self.places, |answer| answer));
        self.page.write(&Fields::new().with("trace", page::trace(STEP, &trace)).with("noted", packed)).await
    }
}
