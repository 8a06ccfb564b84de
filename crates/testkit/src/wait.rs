//! Waiting for states.
//!
//! No wait has a limit of its own: how long something takes depends on the machine. A wait goes on while anything moves,
//! and gives up when nothing has moved for long. What promises a time is measured in `benches`.

use std::fmt::Debug;
use std::future::Future;
use std::panic::Location;
use std::pin::pin;
use std::thread;
use std::time::{Duration, Instant};

const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// How long a wait goes on while nothing moves.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// What a probe says: there it is, or how things stand meanwhile.
pub trait Answer {
    /// What was waited for.
    type Value;

    /// # Errors
    ///
    /// The state so far. As long as it changes there is progress, and the wait goes on.
    fn or_state(self) -> Result<Self::Value, String>;
}

/// Not yet, and nothing else to see.
impl<T> Answer for Option<T> {
    type Value = T;

    fn or_state(self) -> Result<T, String> {
        self.ok_or_else(String::new)
    }
}

/// Not yet, but this is how far it has come.
impl<T, S: Debug> Answer for Result<T, S> {
    type Value = T;

    fn or_state(self) -> Result<T, String> {
        self.map_err(|state| format!("{state:?}"))
    }
}

/// Asks `probe` until it gives a value.
///
/// # Panics
///
/// When nothing has moved for [`PATIENCE`], or a probe hangs for so long: with `what`, the time waited, the last state
/// and the caller's line.
#[track_caller]
pub fn eventually<A: Answer>(what: &str, mut probe: impl AsyncFnMut() -> A) -> impl Future<Output = A::Value> {
    let mut wait = Wait::new(what, PATIENCE, Location::caller());
    async move {
        loop {
            let Ok(answer) = tokio::time::timeout(wait.patience, probe()).await else {
                wait.give_up("the probe was still running")
            };
            match wait.hear(answer) {
                Ok(value) => return value,
                Err(pause) => tokio::time::sleep(pause).await,
            }
        }
    }
}

/// [`eventually`] for tests without a runtime.
///
/// # Panics
///
/// As [`eventually`] does, except that nothing ends a probe that hangs.
#[track_caller]
pub fn eventually_blocking<A: Answer>(what: &str, mut probe: impl FnMut() -> A) -> A::Value {
    let mut wait = Wait::new(what, PATIENCE, Location::caller());
    loop {
        match wait.hear(probe()) {
            Ok(value) => return value,
            Err(pause) => thread::sleep(pause),
        }
    }
}

/// Waits for a future that shows nothing of its progress.
///
/// # Panics
///
/// When it has not ended within [`PATIENCE`].
#[track_caller]
pub fn end_of<F: Future>(what: &str, future: F) -> impl Future<Output = F::Output> {
    let mut wait = Wait::new(what, PATIENCE, Location::caller());
    async move {
        let mut future = pin!(future);
        loop {
            let Err(pause) = wait.hear(None::<()>) else { unreachable!("nothing was heard") };
            if let Ok(output) = tokio::time::timeout(pause, &mut future).await {
                return output;
            }
        }
    }
}

/// A wait under way.
pub(crate) struct Wait<'a> {
    what: &'a str,
    caller: &'static Location<'static>,
    patience: Duration,
    since: Instant,
    state: String,
    /// The pauses since the state changed. Not the time since then: on a slow or busy machine the next probe comes later,
    /// and that is no reason to ask fewer times.
    still: Duration,
    pause: Duration,
}

impl<'a> Wait<'a> {
    pub(crate) fn new(what: &'a str, patience: Duration, caller: &'static Location<'static>) -> Self {
        let (state, still, pause) = (String::new(), Duration::ZERO, FIRST_PAUSE);
        Self { what, caller, patience, since: Instant::now(), state, still, pause }
    }

    /// The value, or the pause before the next probe.
    pub(crate) fn hear<A: Answer>(&mut self, answer: A) -> Result<A::Value, Duration> {
        let state = match answer.or_state() {
            Ok(value) => return Ok(value),
            Err(state) => state,
        };
        if state != self.state {
            (self.state, self.still) = (state, Duration::ZERO);
        }
        if self.still >= self.patience {
            self.give_up(&format!("for {:.1} s nothing has moved", self.patience.as_secs_f64()));
        }
        let pause = self.pause;
        self.still += pause;
        self.pause = (pause * 2).min(LONGEST_PAUSE);
        Err(pause)
    }

    fn give_up(&self, why: &str) -> ! {
        let Self { what, caller, state, .. } = self;
        let waited = self.since.elapsed().as_secs_f64();
        let state = if state.is_empty() { String::new() } else { format!("; it stands at {state}") };
        panic!("waited {waited:.1} s in vain for: {what} (at {caller}; {why}{state})");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(20);

    fn short(what: &str) -> Wait<'_> {
        Wait::new(what, SHORT, Location::caller())
    }

    /// How often it asks.
    fn asked(mut wait: Wait<'_>, mut probe: impl FnMut(u32) -> Result<(), u32>) -> u32 {
        (1..).find(|turn| wait.hear(probe(*turn)).is_ok()).unwrap()
    }

    #[tokio::test]
    async fn gives_the_value_as_soon_as_there_is_one() {
        let mut asked = 0;
        let value = eventually("the third answer", async || {
            asked += 1;
            (asked == 3).then_some(asked)
        });
        assert_eq!(value.await, 3);
        assert_eq!(eventually_blocking("at once", || Some(1)), 1);
        assert_eq!(end_of("a future", async { 2 }).await, 2);
    }

    #[test]
    fn goes_on_while_something_moves() {
        // A thousand turns take longer than the patience, unless each shows something new.
        assert_eq!(asked(short("a thousand"), |turn| if turn < 1_000 { Err(turn) } else { Ok(()) }), 1_000);
    }

    #[test]
    #[should_panic(expected = "nothing has moved; it stands at 10)")]
    fn gives_up_when_nothing_moves_and_says_where_it_stands() {
        asked(short("a thousand"), |turn| if turn < 1_000 { Err(turn.min(10)) } else { Ok(()) });
    }

    #[test]
    #[should_panic(expected = "in vain for: pigs to fly (at crates/testkit/src/wait.rs:")]
    fn says_what_it_waited_for() {
        let mut wait = short("pigs to fly");
        loop {
            let _ = wait.hear(None::<()>);
        }
    }
}
