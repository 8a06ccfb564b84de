//! Cancelling jobs: state first, message second.
//!
//! A waiting job is cancelled at once, unless a lost worker has left a trace with it: then whoever takes it next settles what
//! that has come to, and cancels what is left. A running one carries the request in its hash; its worker hears of it by a message
//! or with its next heartbeat, stops the work and records what really happened. Asking again does no harm: it repeats the
//! message, cancels what has gone back to its queue meanwhile, and tells how the job has ended once it has.

use std::time::Duration;

use crate::calls::{CancelOrder, CancelReply, Fields};
use crate::error::Error;
use crate::ids::JobId;
use crate::inspect::{Inspect, JobView};
use crate::store::Store;

/// How often a job that keeps changing is looked at again before its cancel is given up for now.
const LOOKS: usize = 10;

/// Most jobs in one round trip. Each goes there and back with its SQL.
const PAGE: usize = 20;

/// What became of a cancel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cancelled {
    /// It waited, and is cancelled.
    AtOnce,
    /// It runs, and its worker has been told; or a lost worker may have carried it out, and whoever takes it next finds out.
    Requested,
    /// It had ended before, with this status.
    TooLate(String),
    /// There is no such job.
    NotFound,
    /// What others have made of its hash can't be worked on; it is in the rejected list.
    Unreadable,
}

/// Cancels jobs.
#[derive(Debug, Clone)]
pub struct Canceller {
    store: Store,
    inspect: Inspect,
    keep: Duration,
}

impl Canceller {
    /// A canceller on a connection; the records of the jobs that it cancels are kept for `keep`.
    pub fn new(store: Store, keep: Duration) -> Self {
        Self { inspect: Inspect::new(store.clone()), store, keep }
    }

    /// Cancels one job.
    pub async fn cancel(&self, id: &JobId) -> Result<Cancelled, Error> {
        Ok(self.cancel_many(std::slice::from_ref(id)).await?.remove(0))
    }

    /// Cancels many jobs; one result each, in order.
    pub async fn cancel_many(&self, ids: &[JobId]) -> Result<Vec<Cancelled>, Error> {
        let mut results = Vec::with_capacity(ids.len());
        for page in ids.chunks(PAGE) {
            results.extend(self.cancel_page(page).await?);
        }
        Ok(results)
    }

    async fn cancel_page(&self, ids: &[JobId]) -> Result<Vec<Cancelled>, Error> {
        let mut results: Vec<Option<Cancelled>> = vec![None; ids.len()];
        for _ in 0..LOOKS {
            let open: Vec<usize> = (0..ids.len()).filter(|at| results[*at].is_none()).collect();
            if open.is_empty() {
                break;
            }
            let names: Vec<&str> = open.iter().map(|at| ids[*at].as_str()).collect();
            let views = self.inspect.jobs(&names).await?;
            let orders: Vec<CancelOrder> = open
                .iter()
                .zip(&views)
                .map(|(at, view)| CancelOrder {
                    id: ids[*at].clone(),
                    seen_query: view.as_ref().map(|view| view.query_bytes().to_vec()).unwrap_or_default(),
                    fields: view.as_ref().map(waiting_fields).unwrap_or_default(),
                })
                .collect();
            let replies = self.store.cancel(self.keep.as_millis() as u64, &orders).await?;
            for (at, reply) in open.into_iter().zip(replies) {
                results[at] = match reply {
                    CancelReply::Cancelled => Some(Cancelled::AtOnce),
                    CancelReply::Requested => Some(Cancelled::Requested),
                    CancelReply::Over(status) => Some(Cancelled::TooLate(status)),
                    CancelReply::Missing => Some(Cancelled::NotFound),
                    CancelReply::Unreadable => Some(Cancelled::Unreadable),
                    CancelReply::Changed => None,
                };
            }
        }
        let unsettled =
            |id: &JobId| Error::Unavailable(format!("job {id} changed {LOOKS} times while it was looked at"));
        results.into_iter().zip(ids).map(|(result, id)| result.ok_or_else(|| unsettled(id))).collect()
    }
}

/// What to write into the hash of a job that is cancelled while it waits: its statements say so too. A hash that holds no
/// valid job is simply cancelled.
fn waiting_fields(view: &JobView) -> Fields {
    let Some(mut job) = view.sql_job() else { return Fields::new() };
    if job.cancel_pending().is_err() {
        return Fields::new();
    }
    Fields::new()
        .with("status", job.status().to_string())
        .with("query", job.query_text())
        .with_some("fallback_status", job.fallback_status().map(|status| status.to_string()))
}
