//! A statement for rows, in one transaction.
//!
//! Rows are sent many at a time, without waiting for the answers in between. At first such a group stands in one savepoint: without a
//! bad row it costs one round trip and nothing else. If a row of it fails, the group is undone and run again, and from then on each row
//! has a savepoint of its own: a bad one costs a round trip, and what stands before it stays. So each row ends as if all had been run
//! one after the other.

use std::time::Duration;

use queue_core::model::batch::RowResult;
use tokio::time::Instant;
use tokio_postgres::Statement;

use super::super::rows::{Value, failed, parameters, refused};
use super::super::template::Dialect;
use super::super::{commented, timed_out};
use super::link::{Fault, Interrupt, Link, Request};
use super::{Execution, failure, loses_a_race, returned, transaction};
use crate::execute::rows::ANSWERS_MAX_BYTES;
use crate::execute::{End, Failure, RowAnswers, SqlRow, Work};

/// Most rows of a group, and how many the first one has. Each savepoint in which something is written is a transaction of its own
/// to the server, which remembers 64 of them without effort: a reason more for groups.
pub(super) const GROUP_MAX: usize = 128;
/// Most bytes of values of a group, but for one that holds a single large row.
const GROUP_MAX_BYTES: usize = 256 << 10;

/// Begins the transaction. A constraint that waits for the end of it would make a row's fate depend on its neighbours in the chunk.
pub(super) const BEGIN: &str = "BEGIN; SET CONSTRAINTS ALL IMMEDIATE";
const SAVEPOINT: &str = "SAVEPOINT drayman_rows";
/// Leaves the savepoint where it was, for the next group.
const UNDO: &str = "ROLLBACK TO SAVEPOINT drayman_rows";
const RELEASE: &str = "RELEASE SAVEPOINT drayman_rows";
const NEXT: &str = "RELEASE SAVEPOINT drayman_rows; SAVEPOINT drayman_rows";

impl Execution<'_> {
    pub(super) async fn run_rows(&self, rows: &[SqlRow]) -> Result<(RowAnswers, Duration), End> {
        let mut link = self.settled().await?;
        self.begin(&link, BEGIN).await?;
        match self.rows_in_transaction(&mut link, rows).await {
            Ok((answers, took)) => match transaction(&link).await {
                Ok(id) => match self.commit(link, id, &answers).await {
                    End::Done(_) => Ok((answers, took)),
                    end => Err(end),
                },
                Err(fault) => Err(self.broken(link, Broken::By(fault)).await),
            },
            Err(broken) => Err(self.broken(link, broken).await),
        }
    }

    async fn rows_in_transaction(&self, link: &mut Link, rows: &[SqlRow]) -> Result<(RowAnswers, Duration), Broken> {
        let (sql, parameters) =
            parameters(&self.work.sql, Dialect::Postgres).map_err(|reason| Broken::Refused(refused(&reason)))?;
        let text = commented(&Work { sql, ..self.work.clone() });
        let statement = link.prepare(&text, self.stop, self.rows_deadline(1)).await?;
        let refusal = match statement.params().len() == parameters.count() {
            true => returned::refusal(&statement),
            false => Some("the database counts its parameters otherwise".into()),
        };
        if let Some(reason) = refusal {
            return Err(Broken::Refused(refused(&reason)));
        }
        let (mut answers, mut places, mut values) = (RowAnswers::new(), Vec::new(), Vec::new());
        for row in rows {
            match parameters.values(&row.input) {
                Ok(of_row) => {
                    places.push(row.place);
                    values.push(of_row);
                }
                Err(unfit) => answers.push((row.place, unfit)),
            }
        }
        let begin = Instant::now();
        let ran = self.groups(link, &statement, &values).await?;
        let took = begin.elapsed();
        answers.extend(ran.into_iter().map(|(index, answer)| (places[index], answer)));
        answers.sort_by_key(|(place, _)| *place);
        Ok((answers, took))
    }

    /// Runs all rows, as far as there is room for what they return. The answers come by their places in `rows`.
    async fn groups(&self, link: &mut Link, statement: &Statement, rows: &[Vec<Value>]) -> Result<RowAnswers, Broken> {
        let returns = !statement.columns().is_empty();
        let (mut savepoints, mut before, mut at_once) = (Savepoints::One, SAVEPOINT, GROUP_MAX);
        let (mut answers, mut answered_bytes, mut next) = (RowAnswers::new(), 0, 0);
        let mut answer = |index, result: RowResult| {
            answered_bytes += result.bytes();
            answers.push((index, result));
            answered_bytes < ANSWERS_MAX_BYTES
        };
        let mut has_room = true;
        while next < rows.len() && has_room {
            let group = next..next + group_len(&rows[next..], at_once);
            let requests = savepoints.around(&rows[group.clone()], before);
            let deadline = self.rows_deadline(group.len());
            let (returned, fault) = link.run_rows(statement, &requests, self.stop, deadline).await?;
            // Whatever got through: it is not committed, and a late cancel would hit what follows.
            if let Some(interrupt) = link.interrupt {
                return Err(Broken::Interrupted(interrupt));
            }
            let went_well = returned.len();
            if fault.is_none() || savepoints == Savepoints::Each {
                next += went_well;
                for (index, of_row) in group.clone().zip(returned) {
                    has_room = answer(index, of_row.result(returns).checked());
                }
            }
            match fault {
                None => {
                    before = SAVEPOINT;
                    at_once = (at_once * 2).min(GROUP_MAX);
                }
                Some(fault) if is_of_the_row(&fault) => {
                    before = UNDO;
                    // About as many as go well before one does not.
                    at_once = (went_well * 2).clamp(2, GROUP_MAX);
                    if savepoints == Savepoints::Each || group.len() == 1 {
                        has_room = answer(next, row_failed(&fault));
                        next += 1;
                    }
                    savepoints = Savepoints::Each;
                }
                Some(fault) => return Err(Broken::By(fault)),
            }
        }
        if before == UNDO {
            link.command(UNDO).await?;
        }
        Ok(answers)
    }

    /// PostgreSQL watches over each row by itself. This is for a text that turns that off, and comes later.
    fn rows_deadline(&self, rows: usize) -> Instant {
        let far = Duration::from_secs(365 * 24 * 3600);
        Instant::now() + self.work.timeout.min(far) * (rows as u32 + 1)
    }

    async fn broken(&self, link: Link, broken: Broken) -> End {
        match broken {
            Broken::By(fault) => {
                let interrupt = link.interrupt;
                self.give_up(link, Some(&fault)).await;
                match self.rolled_back(fault, interrupt).await {
                    End::Failed(failure) => {
                        // The whole transaction was undone: want of memory or room is worth another attempt.
                        let wanting = failure.sqlstate.as_deref().is_some_and(is_want);
                        End::Failed(Failure { retryable: failure.retryable || wanting, ..failure })
                    }
                    end => end,
                }
            }
            Broken::Interrupted(interrupt) => {
                self.give_up(link, None).await;
                match interrupt {
                    Interrupt::Stop => End::Stopped,
                    Interrupt::Deadline => timed_out(),
                }
            }
            Broken::Refused(failure) => {
                self.give_up(link, None).await;
                End::Failed(failure)
            }
        }
    }
}

/// How rows that are sent together are kept apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Savepoints {
    /// Not: there is one savepoint for all of them.
    One,
    /// Each of them has its own.
    Each,
}

impl Savepoints {
    /// The rows with SQL of ours between them. `before` makes the first savepoint, or goes back to the one that stands.
    fn around<'a>(self, rows: &'a [Vec<Value>], before: &'a str) -> Vec<Request<'a>> {
        let mut requests = vec![Request::Ours(before)];
        for (index, row) in rows.iter().enumerate() {
            if index > 0 && self == Savepoints::Each {
                requests.push(Request::Ours(NEXT));
            }
            requests.push(Request::Row(row));
        }
        requests.push(Request::Ours(RELEASE));
        requests
    }
}

/// Why the transaction is not committed.
enum Broken {
    By(Fault),
    Interrupted(Interrupt),
    Refused(Failure),
}

impl From<Fault> for Broken {
    fn from(fault: Fault) -> Self {
        Broken::By(fault)
    }
}

/// How many of the first rows make a group.
pub(super) fn group_len(rows: &[Vec<Value>], most: usize) -> usize {
    let mut bytes = 0;
    let fits = |row: &&Vec<Value>| {
        bytes += row.iter().map(Value::bytes).sum::<usize>();
        bytes <= GROUP_MAX_BYTES
    };
    rows.iter().take(most).take_while(fits).count().max(1)
}

/// Whether an error is the row's own: what the statement makes of its values, and no want or trouble of the server.
pub(super) fn is_of_the_row(fault: &Fault) -> bool {
    !fault.is_fatal() && !loses_a_race(fault) && fault.code().is_some_and(|code| !is_want(code.code()))
}

/// Insufficient resources, errors of the system.
fn is_want(sqlstate: &str) -> bool {
    sqlstate.starts_with("53") || sqlstate.starts_with("58")
}

fn row_failed(fault: &Fault) -> RowResult {
    let Failure { message, sqlstate, .. } = failure(fault);
    failed(sqlstate.as_deref().unwrap_or("processing_error"), fault.column(), message)
}
