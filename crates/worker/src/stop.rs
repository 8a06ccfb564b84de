//! Why a running job is to stop. The first cause decides and is kept.

use std::sync::{Arc, OnceLock};

use tokio_util::sync::CancellationToken;

/// Why a job is to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// Somebody asked for it: the job ends `cancelled`.
    Cancelled,
    /// The worker stops: the job is given back.
    Draining,
    /// The claim is another's by now: nothing may be recorded.
    ClaimLost,
    /// It has run for as long as it may.
    TimedOut,
    /// The job has ended too many workers: what was begun is settled, and nothing more of it is run.
    SetAside,
}

/// A stop that may be asked for once.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    token: CancellationToken,
    cause: Arc<OnceLock<Cause>>,
}

impl Stop {
    /// Asks for it. A cause that came earlier stays.
    pub fn ask(&self, cause: Cause) {
        let _ = self.cause.set(cause);
        self.token.cancel();
    }

    /// Why it was asked for, if it was.
    pub fn cause(&self) -> Option<Cause> {
        self.cause.get().copied()
    }

    /// Fires when it is asked for.
    pub fn token(&self) -> CancellationToken {
        self.token.clone()
    }
}
