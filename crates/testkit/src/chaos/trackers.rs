//! Tracked jobs, whose holders are killed, and whose ends come late, and what must be true of their records.

use std::thread;
use std::time::Duration;

use super::Run;
use super::random::Random;
use super::stage::{self, connect};
use super::state::{self, Call, Tracked};
use super::verdict::Violation;
use crate::process::{Daemon, Signal, bin};
use crate::proxy::{Point, Proxy};

/// The tracker of all of them.
pub const TRACKER: &str = "chaos";
/// How long the lock of a holder lives that is lost.
const EXPIRE: Duration = Duration::from_secs(1);
/// When the end comes in that its holder has sent before it was killed: the next one is at work.
const LATE: Duration = Duration::from_secs(4);

const ENDS: &str = "a tracked job ends as the last to start it says, and succeeds once";

/// What was counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Tracked jobs.
    pub jobs: usize,
    /// Starts that were followed by others.
    pub lost: usize,
}

/// What becomes of the first holder of a job.
#[derive(Clone, Copy, Debug)]
enum First {
    Ends,
    IsKilled,
    EndsLate,
}

impl Run<'_> {
    /// Runs tracked jobs, one after the other.
    pub(super) fn tracker_user(&self) {
        let proxy = Proxy::start(self.stage.redis.addr());
        for number in 0.. {
            let mut random = Random::of(self.options.seed, &[19, number]);
            self.wait(random.ms(500, 3_000));
            if !self.is_wanted() {
                return;
            }
            let id = format!("t-{number}");
            self.tracked.lock().expect("no thread panics").push(id.clone());
            let first = [First::Ends, First::IsKilled, First::EndsLate][random.weighted(&[2, 2, 3])];
            self.first_holder(&id, first, &proxy);
            // Who comes next waits for the lock of the first to expire.
            loop {
                let next = self.holder(&id, &self.stage.redis.url_db(stage::DB), Duration::from_secs(30), "4");
                match next.wait().code() {
                    // Done, or done before.
                    Some(0 | 118) => break,
                    // Redis is away, the lock is held, or was lost while Redis was away.
                    Some(117 | 124 | 125) => thread::sleep(Duration::from_millis(200)),
                    code => {
                        let found = format!("it ended with {code:?}: {}", next.output());
                        self.complain(Violation::of(&id, ENDS, found));
                        break;
                    }
                }
            }
        }
    }

    fn holder(&self, id: &str, url: &str, expire: Duration, seconds: &str) -> Daemon {
        let expire = humantime::format_duration(expire).to_string();
        let args =
            ["track", "run", id, "--redis-url", url, "--tracker", TRACKER, "--create", "--expire", &expire, "--"];
        Daemon::spawn(bin("drayman"), &[&args[..], &["sleep", seconds]].concat(), &[])
    }

    fn first_holder(&self, id: &str, first: First, proxy: &Proxy) {
        let (ending, end) = std::sync::mpsc::channel();
        proxy.gate(move |words| {
            let is_end = matches!(state::call(words), Some(Call::TrackerEnd));
            // Sent once: what follows is stopped until its sender is dead.
            let point = || if ending.send(()).is_ok() { Point::Late(LATE) } else { Point::BeforeCall };
            (is_end && matches!(first, First::EndsLate)).then(point)
        });
        let holder = self.holder(id, &proxy.redis_url(stage::DB), EXPIRE, "0.3");
        match first {
            First::Ends => drop(holder.wait()),
            First::IsKilled => {
                thread::sleep(Duration::from_millis(200));
                holder.kill9();
            }
            First::EndsLate => {
                // It comes to its end, unless Redis is away.
                while end.recv_timeout(Duration::from_millis(50)).is_err() && holder.try_wait().is_none() {}
                holder.signal(Signal::SIGKILL);
                drop(end);
                holder.wait();
            }
        }
        proxy.cut();
    }

    /// Looks at the records of all tracked jobs.
    pub(super) fn judge_tracked(&self) -> (Vec<Violation>, Counts) {
        let (mut found, mut counts) = (Vec::new(), Counts::default());
        let mut redis = connect(&self.stage.redis).expect("nothing fails any more");
        for id in self.tracked.lock().expect("no thread panics").iter() {
            counts.jobs += 1;
            let record = state::tracked(&mut redis, TRACKER, id).expect("it answers");
            let Some(Tracked { status, fence, attempts }) = record else {
                found.push(Violation::of(id, ENDS, "it has no record"));
                continue;
            };
            counts.lost += attempts.iter().filter(|(_, outcome)| outcome == "lost").count();
            let succeeded: Vec<u64> =
                attempts.iter().filter(|(_, outcome)| outcome == "succeeded").map(|(fence, _)| *fence).collect();
            if status != "succeeded" || succeeded != [fence] {
                let told = format!("it is {status} and was last started under {fence}, its attempts are {attempts:?}");
                found.push(Violation::of(id, ENDS, told));
            }
        }
        (found, counts)
    }
}
