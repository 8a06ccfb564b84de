//! What goes wrong, and when: a function of the seed.

use std::time::Duration;

use super::random::Random;
use crate::proxy::Direction;

/// What tasks that need not be to blame are failed by.
pub const HANDLERS_KILLED: &str = "handlers' processes killed";

/// A fault, with how long it lasts where it lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL to a worker, and when another takes its place.
    KillWorker(usize, Duration),
    /// SIGTERM to a worker, and when another takes its place once it has ended.
    EndWorker(usize, Duration),
    /// SIGSTOP to a worker, and when it gets SIGCONT.
    StopWorker(usize, Duration),
    /// SIGKILL to the processes of a worker's handlers.
    KillHandlers(usize),
    /// SIGKILL to whoever leads.
    KillLeader(Duration),
    /// SIGSTOP to whoever leads.
    StopLeader(Duration),
    /// SIGKILL to the next canceller, so long after its start.
    KillCanceller(Duration),
    /// SIGKILL to the next `drayman submit`, so long after its start.
    KillProducer(Duration),
    /// SIGKILL to Redis, which is started again after this time.
    KillRedis(Duration),
    /// Redis answers nobody.
    StopRedis(Duration),
    /// Redis forgets the library.
    ForgetLibrary,
    /// All connections of one proxy end: those of a worker, or (the last) those of producers and cancellers.
    Cut(usize),
    /// The same after so many bytes more.
    CutAfter(usize, Direction, u64),
    /// Replies are lost, requests are not.
    DropReplies(usize, Duration),
    /// Connections are refused, and those that are open end.
    Refuse(usize, Duration),
    /// Replies come late by the second time.
    Delay(usize, Duration, Duration),
    /// So many of the backends of jobs are terminated.
    Terminate(u64),
    /// Connections to PostgreSQL that lead through the proxy end after so many bytes more.
    CutDatabase(Direction, u64),
    /// PostgreSQL crashes and starts again.
    RestartDatabase,
    /// The next replies to a worker's takes are lost, one of each take, for so long.
    LoseTakes(usize, Duration),
    /// Redis gets a worker's takes and finishes twice, for so long: what was sent again comes in before what was late.
    Double(usize, Duration),
    /// SIGKILL to a worker whose next finish of a statement is on its way and never comes; and when another takes its place. What it
    /// has committed is not recorded.
    KillAtFinish(usize, Duration),
    /// The same, of a job that takes long, and the finish comes when another worker is at work on that job.
    FinishLate(usize, Duration),
}

impl Fault {
    /// Its kind, for the report.
    pub fn kind(&self) -> &'static str {
        match self {
            Fault::KillWorker(..) => "worker killed",
            Fault::EndWorker(..) => "worker told to stop",
            Fault::StopWorker(..) => "worker paused",
            Fault::KillHandlers(..) => HANDLERS_KILLED,
            Fault::KillLeader(..) => "leader killed",
            Fault::StopLeader(..) => "leader paused",
            Fault::KillCanceller(..) => "canceller killed",
            Fault::KillProducer(..) => "producer killed",
            Fault::KillRedis(..) => "redis killed",
            Fault::StopRedis(..) => "redis paused",
            Fault::ForgetLibrary => "library forgotten",
            Fault::Cut(..) => "connections cut",
            Fault::CutAfter(..) => "connections cut at a byte",
            Fault::DropReplies(..) => "replies dropped",
            Fault::Refuse(..) => "connections refused",
            Fault::Delay(..) => "replies delayed",
            Fault::Terminate(..) => "backends terminated",
            Fault::CutDatabase(..) => "database cut at a byte",
            Fault::RestartDatabase => "database crashed",
            Fault::LoseTakes(..) => "replies of takes lost",
            Fault::Double(..) => "calls doubled",
            Fault::KillAtFinish(..) => "worker killed at a finish",
            Fault::FinishLate(..) => "finish of a killed worker late",
        }
    }
}

/// The pause before a fault. Most of it are jobs that come to their ends, so that a slow machine gets no more faults for its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pause {
    /// The least time.
    pub time: Duration,
    /// How many jobs end.
    pub ends: usize,
}

/// The faults of a seed in their order, each with the pause before it. It never ends.
#[derive(Debug)]
pub struct Schedule {
    random: Random,
    workers: usize,
}

impl Schedule {
    /// Of a seed, for so many workers.
    pub fn of(seed: u64, workers: usize) -> Self {
        Self { random: Random::of(seed, &[2]), workers }
    }
}

impl Iterator for Schedule {
    type Item = (Pause, Fault);

    fn next(&mut self) -> Option<Self::Item> {
        let random = &mut self.random;
        let pause = if random.chance(15) {
            Pause { time: Duration::ZERO, ends: 0 }
        } else {
            Pause { time: random.ms(100, 700), ends: random.between(0, 4) as usize }
        };
        let worker = random.between(0, self.workers as u64) as usize;
        let proxy = random.between(0, self.workers as u64 + 1) as usize;
        let direction = if random.chance(50) { Direction::ToServer } else { Direction::ToClient };
        let fault = match random.weighted(&[8, 6, 7, 4, 3, 3, 3, 3, 3, 2, 5, 7, 5, 4, 4, 6, 5, 1, 6, 8, 8, 10, 10]) {
            0 => Fault::KillWorker(worker, random.ms(0, 3_000)),
            1 => Fault::EndWorker(worker, random.ms(0, 1_000)),
            2 => Fault::StopWorker(worker, random.ms(100, 6_000)),
            3 => Fault::KillLeader(random.ms(0, 3_000)),
            4 => Fault::StopLeader(random.ms(500, 8_000)),
            5 => Fault::KillCanceller(random.ms(0, 60)),
            6 => Fault::KillProducer(random.ms(0, 40)),
            7 => Fault::KillRedis(random.ms(0, 2_500)),
            8 => Fault::StopRedis(random.ms(100, 3_000)),
            9 => Fault::ForgetLibrary,
            10 => Fault::Cut(proxy),
            11 => Fault::CutAfter(proxy, direction, random.between(0, 3_000)),
            12 => Fault::DropReplies(proxy, random.ms(20, 1_500)),
            13 => Fault::Refuse(proxy, random.ms(50, 4_000)),
            14 => Fault::Delay(proxy, random.ms(200, 3_000), random.ms(5, 1_500)),
            15 => Fault::Terminate(random.between(1, 4)),
            16 => Fault::CutDatabase(direction, random.between(0, 2_500)),
            17 => Fault::RestartDatabase,
            19 => Fault::LoseTakes(worker, random.ms(1_000, 4_000)),
            20 => Fault::Double(worker, random.ms(1_000, 4_000)),
            21 => Fault::KillAtFinish(worker, random.ms(0, 1_500)),
            22 => Fault::FinishLate(worker, random.ms(0, 1_500)),
            _ => Fault::KillHandlers(worker),
        };
        Some((pause, fault))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_seed_is_one_schedule_and_every_kind_comes_up() {
        let first: Vec<_> = Schedule::of(9, 4).take(2_000).collect();
        assert_eq!(first, Schedule::of(9, 4).take(2_000).collect::<Vec<_>>());
        assert_ne!(first, Schedule::of(10, 4).take(2_000).collect::<Vec<_>>());
        assert_eq!(first.iter().map(|(_, fault)| fault.kind()).collect::<BTreeSet<_>>().len(), 23);
    }
}
