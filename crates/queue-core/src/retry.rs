//! Starting new runs of jobs that have ended, as an operator does once the cause of a failure is mended.

use crate::calls::{Fields, RetryOrder, RetryReply};
use crate::config::Secret;
use crate::error::Error;
use crate::ids::JobId;
use crate::inspect::{Inspect, JobView, Kind};
use crate::model::Status;
use crate::store::Store;

/// How often a job that keeps changing is looked at again.
const LOOKS: usize = 3;

/// Most jobs in one round trip. Each goes there and back with its SQL.
pub const PAGE: usize = 20;

/// What became of a wish for a new run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Retried {
    /// It stands at the end of its user's queue.
    Queued,
    /// It has not ended: its present status.
    NotOver(String),
    /// All of it is done. Only a run from the start would do anything.
    NothingFailed,
    /// It carried a connection of its own, whose password was removed when it ended: it must be said again.
    PasswordMissing,
    /// There is no such job, or no more.
    NotFound,
    /// It can't run: why.
    Refused(String),
}

/// Starts new runs.
#[derive(Debug, Clone)]
pub struct Retrier {
    store: Store,
    inspect: Inspect,
    from_start: bool,
    password: Option<Secret>,
}

impl Retrier {
    /// A retrier on a connection. A new run leaves what was done as it is, and goes on from the first statement that was not.
    pub fn new(store: Store) -> Self {
        Self { inspect: Inspect::new(store.clone()), store, from_start: false, password: None }
    }

    /// New runs repeat what was done.
    pub fn from_start(self, from_start: bool) -> Self {
        Self { from_start, ..self }
    }

    /// The password for jobs that carry a connection of their own.
    pub fn password(self, password: Option<Secret>) -> Self {
        Self { password, ..self }
    }

    /// Starts new runs of jobs; one result each, in order. A job counts once, however often it is named.
    pub async fn retry(&self, ids: &[JobId]) -> Result<Vec<Retried>, Error> {
        let mut results = Vec::with_capacity(ids.len());
        for page in ids.chunks(PAGE) {
            results.extend(self.page(page).await?);
        }
        Ok(results)
    }

    async fn page(&self, ids: &[JobId]) -> Result<Vec<Retried>, Error> {
        let mut results: Vec<Option<Retried>> = vec![None; ids.len()];
        for _ in 0..LOOKS {
            let open: Vec<usize> = (0..ids.len()).filter(|at| results[*at].is_none()).collect();
            let names: Vec<&str> = open.iter().map(|at| ids[*at].as_str()).collect();
            let views = self.inspect.jobs(&names).await?;
            let mut orders = Vec::new();
            let mut places = Vec::new();
            for (at, view) in open.into_iter().zip(&views) {
                match view.as_ref().map(|view| self.start(view)) {
                    None => results[at] = Some(Retried::NotFound),
                    Some(Err(refused)) => results[at] = Some(refused),
                    Some(Ok((seen_query, fields))) => {
                        let id = ids[at].clone();
                        let password = self.password.as_ref().map(|pass| pass.expose().as_bytes().to_vec());
                        orders.push(RetryOrder { id, seen_query, password, fields });
                        places.push(at);
                    }
                }
            }
            if orders.is_empty() {
                break;
            }
            for (at, reply) in places.into_iter().zip(self.store.retry(&orders).await?) {
                results[at] = match reply {
                    RetryReply::Queued => Some(Retried::Queued),
                    RetryReply::NotOver(status) => Some(Retried::NotOver(status)),
                    RetryReply::Missing => Some(Retried::NotFound),
                    RetryReply::NoPassword => Some(Retried::PasswordMissing),
                    RetryReply::Refused(reason) => Some(Retried::Refused(reason)),
                    RetryReply::Changed => None,
                };
            }
        }
        Ok(results.into_iter().map(|result| result.unwrap_or(Retried::NotOver("changing".into()))).collect())
    }

    /// What a new run of a job starts from, beside the query that it was made of.
    fn start(&self, view: &JobView) -> Result<(Vec<u8>, Fields), Retried> {
        if !view.is_over() {
            return Err(Retried::NotOver(view.status()));
        }
        match view.kind() {
            Kind::Batch => {
                return Err(Retried::Refused(
                    "it is a batch, whose rows have ended: submit those that failed as another one".into(),
                ));
            }
            Kind::Flow => {
                return Err(Retried::Refused("it is a flow: restart it, and what is done is not repeated".into()));
            }
            _ if view.text("flow").is_some() => {
                return Err(Retried::Refused("it is a step of a flow: restart the flow".into()));
            }
            // Who is to be told that a batch is over may be told again.
            Kind::Part if !view.text("part").is_some_and(|part| part.starts_with("done ")) => {
                return Err(Retried::Refused("it is a part of a batch".into()));
            }
            Kind::Task | Kind::Sql | Kind::Part => {}
        }
        if view.is_task() {
            if view.stand() == Status::Done && !self.from_start {
                return Err(Retried::NothingFailed);
            }
            let fields = Fields::new().with("status", Status::Pending.as_str());
            // Else it goes on from what it has saved.
            let fields = if self.from_start { fields.with("checkpoint", "") } else { fields };
            return Ok((view.query_bytes().to_vec(), fields));
        }
        let Some(mut job) = view.sql_job() else {
            return Err(Retried::Refused("it holds no valid SQL job".into()));
        };
        if !job.rerun(self.from_start) {
            return Err(Retried::NothingFailed);
        }
        let fields = Fields::new()
            .with("status", job.status().to_string())
            .with("query", job.query_text())
            .with_some("fallback_status", job.fallback_status().map(|status| status.to_string()));
        Ok((view.query_bytes().to_vec(), fields))
    }
}
