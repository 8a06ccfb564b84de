//! How the world tells a daemon to stop, or to read its settings again.

use std::io;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook_tokio::Signals;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// What a daemon is told from outside. Clones are told the same.
#[derive(Debug, Clone)]
pub struct Shutdown {
    drain: CancellationToken,
    stop: CancellationToken,
    reload: Arc<Notify>,
}

impl Default for Shutdown {
    fn default() -> Self {
        Self::new()
    }
}

impl Shutdown {
    /// Listens to nobody: for tests, and for programs that handle signals themselves.
    pub fn new() -> Self {
        let stop = CancellationToken::new();
        // A child: who is to stop at once is to take no more work either.
        Self { drain: stop.child_token(), stop, reload: Arc::new(Notify::new()) }
    }

    /// Listens to signals for the rest of the process's life: the first SIGTERM or SIGINT drains, the second one stops,
    /// SIGHUP reloads. Needs a tokio runtime.
    pub fn on_signals() -> io::Result<Self> {
        let shutdown = Self::new();
        let signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
        tokio::spawn(shutdown.clone().obey(signals));
        Ok(shutdown)
    }

    /// Fires when no more work is to be taken, and what runs has the grace time to end.
    pub fn drain(&self) -> &CancellationToken {
        &self.drain
    }

    /// Fires when what runs is to be interrupted now. `drain` has fired then, too.
    pub fn stop(&self) -> &CancellationToken {
        &self.stop
    }

    /// Waits until settings are to be read again. Of several demands that nobody waited for, one is kept.
    pub async fn reload(&self) {
        self.reload.notified().await;
    }

    /// Asks for settings to be read again.
    pub fn ask_reload(&self) {
        self.reload.notify_one();
    }

    async fn obey(self, mut signals: impl Stream<Item = i32> + Unpin) {
        while let Some(signal) = signals.next().await {
            match signal {
                SIGHUP => self.ask_reload(),
                _ if self.drain.is_cancelled() => {
                    tracing::warn!(signal, "told to stop again: stopping at once");
                    self.stop.cancel();
                }
                _ => {
                    tracing::info!(signal, "told to stop: draining");
                    self.drain.cancel();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use futures::stream::iter;

    use super::*;

    async fn after(signals: &[i32]) -> Shutdown {
        let shutdown = Shutdown::new();
        shutdown.clone().obey(iter(signals.to_vec())).await;
        shutdown
    }

    fn state(shutdown: &Shutdown) -> (bool, bool) {
        (shutdown.drain().is_cancelled(), shutdown.stop().is_cancelled())
    }

    #[tokio::test]
    async fn the_first_signal_drains_and_the_second_stops() {
        assert_eq!(state(&after(&[]).await), (false, false));
        assert_eq!(state(&after(&[SIGTERM]).await), (true, false));
        assert_eq!(state(&after(&[SIGINT, SIGHUP]).await), (true, false));
        assert_eq!(state(&after(&[SIGINT, SIGTERM]).await), (true, true));
        assert_eq!(state(&after(&[SIGTERM, SIGTERM, SIGTERM]).await), (true, true));
    }

    #[test]
    fn to_stop_is_also_to_drain() {
        let shutdown = Shutdown::new();
        shutdown.stop().cancel();
        assert_eq!(state(&shutdown), (true, true));
    }

    #[tokio::test]
    async fn demands_to_reload_are_kept_as_one() {
        let shutdown = after(&[SIGHUP, SIGHUP]).await;
        assert_eq!(state(&shutdown), (false, false));
        assert_eq!(shutdown.reload().now_or_never(), Some(()));
        assert_eq!(shutdown.reload().now_or_never(), None);
    }
}
