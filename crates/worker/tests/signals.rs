//! Real signals, in a process of their own: other tests must not be hit by them.

use nix::sys::signal::{Signal, raise};
use worker::shutdown::Shutdown;

#[tokio::test]
async fn signals_reload_then_drain_then_stop() {
    let shutdown = Shutdown::on_signals().unwrap();
    raise(Signal::SIGHUP).unwrap();
    shutdown.reload().await;
    assert!(!shutdown.drain().is_cancelled());
    raise(Signal::SIGTERM).unwrap();
    shutdown.drain().cancelled().await;
    assert!(!shutdown.stop().is_cancelled());
    raise(Signal::SIGINT).unwrap();
    shutdown.stop().cancelled().await;
}
