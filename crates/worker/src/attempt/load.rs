//! The rows of a step that is a batch: loaded under the claim of the step's job, into a batch that is held until that is done.

use async_trait::async_trait;
use queue_core::batch::{BatchError, BatchReader, Batches, Loader, NewBatch, RowCursor, RowView, RowWork, Which};
use queue_core::calls::Taken;
use queue_core::flow::rows_of_job;
use queue_core::ids::{JobId, User};
use queue_core::model::batch::{Row, RowStatus};
use queue_core::model::chunk::{RowTarget, RowsTo};
use queue_core::model::task::Payload;
use queue_core::producer::Database;

use crate::execute::chunks::position::disagreement;
use crate::execute::task::{Problem, RowSink};

/// How many rows of an earlier batch are read at once.
const EARLIER_PAGE: usize = 1000;

/// What a task needs to load a batch.
pub(super) struct Loads {
    batches: Batches,
    job: JobId,
    user: User,
    /// The batches in which earlier executions have done some of the rows.
    earlier: Vec<JobId>,
    traceparent: Option<String>,
}

impl Loads {
    pub(super) fn of(taken: &Taken, batches: &Batches) -> Self {
        let text = |name| taken.text(name).ok().flatten().unwrap_or_default();
        let earlier = text("earlier").split(' ').filter_map(|id| JobId::new(id).ok()).collect();
        let traceparent = Some(text("traceparent").to_owned()).filter(|parent| !parent.is_empty());
        Self { batches: batches.clone(), job: taken.id.clone(), user: taken.user.clone(), earlier, traceparent }
    }

    pub(super) async fn begin(&self, to: &RowsTo, context: Payload) -> Result<Box<dyn RowSink>, Problem> {
        let work = match to.work.clone() {
            RowTarget::Handler { app, op } => RowWork::Handler { app, op },
            RowTarget::Sql { database, statement } => RowWork::Sql { statement, database: Database::Named(database) },
        };
        let earlier = self.earlier(&work).await?;
        let id = rows_of_job(&self.job).map_err(|error| Problem::fail(error.to_string()))?;
        let new = NewBatch {
            id,
            context: Some(context),
            held: true,
            row_timeout: to.row_timeout,
            retry: to.retry.clone(),
            keep: Some(self.batches.keeps()),
            traceparent: self.traceparent.clone(),
            ..NewBatch::of(self.user.clone(), work)
        };
        let loader = self.batches.open(new).map_err(problem)?;
        Ok(Box::new(Sink { loader: Some(loader), earlier }))
    }

    /// The batches of earlier executions, whose rows that are done are left out: so they must have been done by the same.
    async fn earlier(&self, work: &RowWork) -> Result<Vec<Earlier>, Problem> {
        let mut earlier = Vec::new();
        for id in &self.earlier {
            let looked = async {
                let is_same = self.batches.view(id).await?.counts.done == 0 || self.batches.has_work(id, work).await?;
                Ok((is_same, self.batches.reader(id).await?))
            };
            match looked.await {
                Ok((true, reader)) => {
                    earlier.push(Earlier { reader, rows: Vec::new().into_iter().peekable(), next: Next::First });
                }
                Ok((false, _)) => {
                    return Err(disagreement(format_args!("rows of {id} were done by another handler or statement")));
                }
                // Its time is over: what was done of its rows is done again.
                Err(BatchError::NotFound(_)) => {}
                Err(error) => return Err(problem(error)),
            }
        }
        Ok(earlier)
    }
}

fn problem(error: BatchError) -> Problem {
    match error {
        BatchError::Redis(_) | BatchError::NoRoom { .. } => Problem::retry(error.to_string()),
        _ => Problem::fail(error.to_string()),
    }
}

struct Sink {
    /// `None` once an error has taken back what was loaded.
    loader: Option<Loader>,
    earlier: Vec<Earlier>,
}

#[async_trait]
impl RowSink for Sink {
    async fn add(&mut self, mut rows: Vec<Row>) -> Result<(), Problem> {
        let loader = self.loader.as_mut().ok_or_else(|| Problem::retry("its rows were taken back"))?;
        for earlier in &mut self.earlier {
            earlier.leave_out_what_is_done(&mut rows).await?;
        }
        loader.check_all(&rows).map_err(problem)?;
        for row in rows {
            if let Err(error) = loader.push(row).await {
                // Nothing of the load is left.
                self.loader = None;
                return Err(Problem::retry(error.to_string()));
            }
        }
        Ok(())
    }

    async fn end(self: Box<Self>) -> Result<(), Problem> {
        let loader = self.loader.ok_or_else(|| Problem::retry("its rows were taken back"))?;
        loader.finish().await.map(drop).map_err(|error| Problem::retry(error.to_string()))
    }
}

/// A batch of an earlier execution, read in the order of lines as those of this one are loaded.
struct Earlier {
    reader: BatchReader,
    rows: std::iter::Peekable<std::vec::IntoIter<RowView>>,
    next: Next,
}

enum Next {
    First,
    Behind(RowCursor),
    Nothing,
}

impl Earlier {
    async fn leave_out_what_is_done(&mut self, rows: &mut Vec<Row>) -> Result<(), Problem> {
        let mut left = Vec::with_capacity(rows.len());
        for row in rows.drain(..) {
            match self.has_done(&row).await {
                Ok(true) => {}
                // Its time is over meanwhile.
                Ok(false) | Err(BatchError::NotFound(_)) => left.push(row),
                Err(error) => return Err(problem(error)),
            }
        }
        *rows = left;
        Ok(())
    }

    /// Whether a row of the same line and the same content is done there.
    async fn has_done(&mut self, row: &Row) -> Result<bool, BatchError> {
        loop {
            while let Some(there) = self.rows.next_if(|there| there.at.line <= row.line) {
                if there.at.line == row.line {
                    let is_done = matches!(there.status, RowStatus::Done | RowStatus::Skipped);
                    return Ok(is_done && there.input == row.input);
                }
            }
            if self.rows.peek().is_some() {
                return Ok(false);
            }
            let after = match &self.next {
                Next::First => None,
                Next::Behind(cursor) => Some(*cursor),
                Next::Nothing => return Ok(false),
            };
            let page = self.reader.page(Which::All, after, EARLIER_PAGE).await?;
            self.next = page.next.map_or(Next::Nothing, Next::Behind);
            self.rows = page.rows.into_iter().peekable();
        }
    }
}
