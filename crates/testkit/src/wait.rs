//! Waiting for states.

use std::future::Future;
use std::panic::Location;
use std::thread;
use std::time::{Duration, Instant};

const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// Asks `probe` until it gives a value.
///
/// # Panics
///
/// When `limit` has passed, or while a probe hangs past it: with `what`, the time waited and the caller's line.
#[track_caller]
pub fn eventually<T>(
    what: &str,
    limit: Duration,
    mut probe: impl AsyncFnMut() -> Option<T>,
) -> impl Future<Output = T> {
    let caller = Location::caller();
    async move {
        let start = Instant::now();
        let mut pause = FIRST_PAUSE;
        loop {
            let left = limit.saturating_sub(start.elapsed());
            // One probe more after the limit: a slow machine must not fail a state that was reached in time.
            match tokio::time::timeout(left.max(LONGEST_PAUSE), probe()).await {
                Ok(Some(value)) => return value,
                Ok(None) if !left.is_zero() => {}
                Ok(None) => panic!("{}", too_late(what, start.elapsed(), caller)),
                Err(_) => panic!("{} (the probe was still running)", too_late(what, start.elapsed(), caller)),
            }
            tokio::time::sleep(pause.min(left)).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

/// [`eventually`] for tests without a runtime.
///
/// # Panics
///
/// When `limit` has passed: with `what`, the time waited and the caller's line.
#[track_caller]
pub fn eventually_blocking<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Option<T>) -> T {
    let caller = Location::caller();
    let start = Instant::now();
    let mut pause = FIRST_PAUSE;
    loop {
        let left = limit.saturating_sub(start.elapsed());
        if let Some(value) = probe() {
            return value;
        }
        assert!(!left.is_zero(), "{}", too_late(what, start.elapsed(), caller));
        thread::sleep(pause.min(left));
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

fn too_late(what: &str, waited: Duration, caller: &Location<'_>) -> String {
    format!("waited {:.1} s in vain for: {what} (at {caller})", waited.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn gives_the_value_as_soon_as_there_is_one() {
        let mut asked = 0;
        let value = eventually("the third answer", Duration::from_secs(5), async || {
            asked += 1;
            (asked == 3).then_some(asked)
        });
        assert_eq!(value.await, 3);
        assert_eq!(eventually_blocking("at once", Duration::ZERO, || Some(1)), 1);
    }

    #[tokio::test]
    #[should_panic(expected = "in vain for: pigs to fly (at crates/testkit/src/wait.rs:")]
    async fn says_what_it_waited_for() {
        eventually("pigs to fly", Duration::from_millis(20), async || None::<()>).await;
    }

    #[tokio::test]
    #[should_panic(expected = "the probe was still running")]
    async fn a_hanging_probe_ends_at_the_limit() {
        eventually("an answer", Duration::from_millis(20), async || std::future::pending::<Option<()>>().await).await;
    }

    #[test]
    #[should_panic(expected = "in vain for: pigs to fly")]
    fn blocking_says_it_too() {
        eventually_blocking("pigs to fly", Duration::from_millis(20), || None::<()>);
    }
}
