//! What an execution of SQL writes under its claim, and what an earlier one has left with the job.
//!
//! Before a transaction is committed its trace is noted with the job. So whoever takes the job after a worker was lost knows whether
//! there is something to ask the database about.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use queue_core::calls::{Fields, Mark, Taken};
use queue_core::error::Error;
use queue_core::session::{Claim, Pen};

use crate::execute::{ClaimLost, Failure, Trace};
use crate::stop::{Cause, Stop};

/// How often the database is tried that alone can tell what became of a lost worker's execution.
pub(super) const SETTLE_ATTEMPTS: u64 = 12;

/// The claim's page in the book, open while its SQL runs.
pub(super) struct Page {
    pen: Pen,
    stop: Stop,
    lifetime: Duration,
    asked: AtomicBool,
}

impl Page {
    /// `lifetime` is how long Redis may be silent before the claim has to be taken for lost.
    pub fn of(claim: &Claim, stop: &Stop, lifetime: Duration) -> Self {
        Self { pen: claim.pen(), stop: stop.clone(), lifetime, asked: AtomicBool::new(false) }
    }

    /// Whether the executor came as far as its claim: what an earlier execution left is settled by then.
    pub fn was_asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }

    /// Writes under the claim. A worker that Redis does not answer for its session's lifetime has to take the claim for lost.
    pub async fn write(&self, fields: &Fields) -> Result<(), ClaimLost> {
        self.asked.store(true, Ordering::SeqCst);
        match self.patiently(|| self.pen.mark(fields)).await {
            Ok(Mark::Held) => Ok(()),
            Ok(Mark::CancelAsked) => {
                self.stop.ask(Cause::Cancelled);
                Ok(())
            }
            Ok(Mark::Stale) => Err(ClaimLost),
            Err(error) => {
                tracing::warn!(%error, "the claim could not be confirmed");
                Err(ClaimLost)
            }
        }
    }

    /// The answers to rows that were noted with the trace.
    pub async fn noted(&self) -> Result<Option<Vec<u8>>, Error> {
        self.patiently(|| self.pen.noted()).await
    }

    async fn patiently<T, F: Future<Output = Result<T, Error>>>(&self, ask: impl Fn() -> F) -> Result<T, Error> {
        let since = Instant::now();
        let mut pause = Duration::from_millis(50);
        loop {
            match ask().await {
                Err(error) if error.is_worth_repeating() && since.elapsed() + pause < self.lifetime => {
                    tracing::debug!(%error, "Redis could not be asked under the claim, asking again");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(1));
                }
                answer => return answer,
            }
        }
    }
}

/// Whether an earlier execution may have left something: it must be settled first, for it may have taken effect.
pub(super) fn left_behind(taken: &Taken) -> bool {
    taken.number("unclean") > 0 || taken.bytes("trace").is_some_and(|trace| !trace.is_empty())
}

/// The trace of this step, if the last execution left one. A trace is `step`, a word and perhaps a transaction id.
pub(super) fn earlier(taken: &Taken, step: &str) -> Option<Trace> {
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

/// The same as it is written.
pub(super) fn trace(step: &str, trace: &Trace) -> String {
    match trace {
        Trace::Transaction(id) => format!("{step} transaction {id}"),
        Trace::Untransacted => format!("{step} untransacted"),
    }
}

/// Whether a failure came before the database could be asked anything.
pub(super) fn could_not_ask(failure: &Failure) -> bool {
    failure.retryable && failure.sqlstate.as_deref().is_none_or(|state| state.starts_with("08") || state == "57P03")
}
