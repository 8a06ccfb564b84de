//! Following jobs until they are over, and what their ends mean for an exit code.

use std::time::{Duration, Instant};

use console::{Failure, complain};
use queue_core::follow::{Follow, Move};
use queue_core::{Error, Store};

use crate::cli::{FAILED, NOT_OVER};

/// How long Redis may be away before following is given up.
const AWAY_MAX: Duration = Duration::from_secs(60);

/// How the following ended.
#[derive(Debug, Default)]
pub struct Ended {
    /// Jobs that ended otherwise than done.
    pub not_done: usize,
    /// Ids without a job.
    pub gone: usize,
    /// Jobs that were not over in time.
    pub open: usize,
}

impl Ended {
    /// The exit code that says so.
    pub fn code(&self) -> u8 {
        match self {
            Ended { gone: 1.., .. } => console::NOT_FOUND,
            Ended { not_done: 1.., .. } => FAILED,
            Ended { open: 1.., .. } => NOT_OVER,
            _ => console::OK,
        }
    }
}

/// Follows jobs until all are over or the time is, and tells of each move.
pub async fn follow(
    store: &Store,
    ids: impl IntoIterator<Item = String>,
    limit: Option<Duration>,
    mut tell: impl FnMut(&Move),
) -> Result<Ended, Failure> {
    let mut follow = Follow::of(store.clone(), ids);
    let mut ended = Ended::default();
    let mut away_since: Option<Instant> = None;
    let until = limit.map(|limit| tokio::time::Instant::now() + limit);
    loop {
        let next = async { follow.next().await };
        let next = match until {
            Some(until) => tokio::time::timeout_at(until, next).await,
            None => Ok(next.await),
        };
        match next {
            Err(_) => {
                ended.open = follow.open();
                return Ok(ended);
            }
            Ok(Err(error)) => away(&error, &mut away_since)?,
            Ok(Ok(None)) => return Ok(ended),
            Ok(Ok(Some(movement))) => {
                away_since = None;
                match &movement {
                    Move::To { .. } => {}
                    Move::Over { view, .. } => {
                        ended.not_done += usize::from(!matches!(view.status().as_str(), "done" | "ignored"));
                    }
                    Move::Gone(_) => ended.gone += 1,
                }
                tell(&movement);
            }
        }
    }
}

/// A Redis that is away for a moment is waited for; any other error ends the following.
pub fn away(error: &Error, since: &mut Option<Instant>) -> Result<(), Failure> {
    if !error.is_transient() || since.is_some_and(|since| since.elapsed() >= AWAY_MAX) {
        return Err(Failure::new(console::UNREACHABLE, error));
    }
    if since.is_none() {
        complain(format_args!("{error}; still trying"));
        *since = Some(Instant::now());
    }
    Ok(())
}
