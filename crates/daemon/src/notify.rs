//! What systemd is told: ready, a status line, stopping, and that the daemon's loop makes progress. Without systemd, nothing.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use sd_notify::NotifyState;

/// A busy worker takes thousands of times a second, and whoever listens has other things to do.
const PAUSE: Duration = Duration::from_millis(500);

/// The line to systemd.
#[derive(Debug, Clone, Default)]
pub struct Notify {
    said: Arc<Mutex<Said>>,
}

#[derive(Debug, Default)]
struct Said {
    watchdog_at: Option<Instant>,
    status_at: Option<Instant>,
    status: String,
}

impl Notify {
    /// The daemon works from now on.
    pub fn ready(&self) {
        send(&[NotifyState::Ready]);
    }

    /// It takes nothing more.
    pub fn stopping(&self) {
        send(&[NotifyState::Stopping]);
    }

    /// The loop went round: it, what it needs and this process are alive.
    pub fn watchdog(&self) {
        if is_time(&mut self.said().watchdog_at) {
            send(&[NotifyState::Watchdog]);
        }
    }

    /// How busy the daemon is. Said only when it changes; a change that follows another at once is left for the next call.
    pub fn status(&self, status: String) {
        let mut said = self.said();
        if said.status != status && is_time(&mut said.status_at) {
            send(&[NotifyState::Status(&status)]);
            said.status = status;
        }
    }

    fn said(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Whether nothing was said for a while; from now on something was.
fn is_time(last: &mut Option<Instant>) -> bool {
    let now = Instant::now();
    let is_time = last.is_none_or(|last| now - last >= PAUSE);
    if is_time {
        *last = Some(now);
    }
    is_time
}

fn send(states: &[NotifyState<'_>]) {
    // Without a socket this does nothing; with one that fails, the watchdog will tell.
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "systemd could not be told");
    }
}
