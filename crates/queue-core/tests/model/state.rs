//! What there is: Redis, two workers, the database, what may still go wrong, and what the checker remembers.
//!
//! Everything is small and `Copy`: a check visits hundreds of thousands of states.

use stateright::Representative;

/// The jobs, in the order in which they are submitted: two of user 0 and one of user 1.
pub const OWNER: [usize; JOBS] = [0, 0, 1];
pub const JOBS: usize = 3;
pub const USERS: usize = 2;
pub const WORKERS: usize = 2;
/// A worker that lost its session opens another: the number is `worker + WORKERS * life`.
pub const SESSIONS: usize = WORKERS * 3;

/// A few numbers in order, the first at the front.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Line([Option<u8>; JOBS]);

impl Line {
    pub fn first(&self) -> Option<usize> {
        self.0[0].map(usize::from)
    }

    pub fn pop_first(&mut self) {
        self.0.rotate_left(1);
        self.0[JOBS - 1] = None;
    }

    pub fn push_first(&mut self, item: usize) {
        self.0.rotate_right(1);
        self.0[0] = Some(item as u8);
    }

    pub fn push_last(&mut self, item: usize) {
        let free = self.0.iter().position(Option::is_none).expect("a line is as long as there are jobs");
        self.0[free] = Some(item as u8);
    }

    pub fn remove(&mut self, item: usize) {
        if let Some(at) = self.0.iter().position(|other| *other == Some(item as u8)) {
            self.0[at..].rotate_left(1);
            self.0[JOBS - 1] = None;
        }
    }

    pub fn count(&self, item: usize) -> usize {
        self.0.iter().filter(|other| **other == Some(item as u8)).count()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Status {
    Pending,
    Running,
    Scheduled,
    Done,
    Failed,
    Cancelled,
}

impl Status {
    pub fn is_final(self) -> bool {
        matches!(self, Status::Done | Status::Failed | Status::Cancelled)
    }
}

/// `batch:jobs:<id>`. No fence is 0, so a trace or a fence of 0 is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Job {
    pub status: Status,
    pub fence: u8,
    /// The fence whose finish was applied last.
    pub settled: u8,
    /// The transaction that may have taken effect: that of the execution with this fence.
    pub trace: u8,
    pub unclean: bool,
    pub cancel_requested: bool,
}

/// A field of `drayman:claims`, with what stands of it in the session's work list and cancels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Claim {
    pub session: usize,
    pub fence: u8,
    pub take: u8,
    pub cancel: bool,
}

/// `drayman:session:<session>`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Registration {
    pub beat: u8,
    pub take: u8,
}

/// All that the scripts read and write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Redis {
    pub jobs: [Option<Job>; JOBS],
    pub queues: [Line; USERS],
    pub due: [bool; JOBS],
    pub claims: [Option<Claim>; JOBS],
    /// The pool: its ready users, and what it counts.
    pub ready: Line,
    pub running: u8,
    pub busy: [u8; USERS],
    pub sessions: [Option<Registration>; SESSIONS],
    /// Session and term.
    pub leader: Option<(usize, u8)>,
    pub term: u8,
}

/// How an attempt is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    Final(Status),
    Later,
}

/// How far an attempt is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum At {
    /// It connects and asks for the job's lock.
    Taken,
    /// Another execution has the lock, and the claim held when it was asked for: now that one is terminated.
    Confirmed,
    /// It has the lock, and knows that nothing of an earlier execution took effect.
    Locked,
    /// The claim held; the statement runs in a transaction.
    Begun,
    /// The transaction is noted with the job, and COMMIT is sent.
    Committing,
    Ending(Verdict),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Attempt {
    pub job: usize,
    pub fence: u8,
    /// The trace that the take handed out.
    pub earlier: u8,
    /// It has heard that it is to be cancelled.
    pub cancel: bool,
    pub at: At,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Worker {
    pub alive: bool,
    pub session: usize,
    pub take_number: u8,
    /// The answer of the last take got lost.
    pub take_open: bool,
    pub attempt: Option<Attempt>,
    /// It believes that it leads, in this term.
    pub term: Option<u8>,
    /// As the leader it has found a session dead at this beat, and is about to say so.
    pub sentence: Option<(usize, u8)>,
}

/// A worker's connection to the database, which outlives a worker that died. It holds the lock of its job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Backend {
    pub job: usize,
    pub fence: u8,
    pub begun: bool,
    pub commit_sent: bool,
}

/// What may still go wrong, and what others may still ask for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Budget {
    /// Answers of enqueue, take, mark and finish that get lost.
    pub lost_replies: u8,
    /// Heartbeats of a living worker that do not arrive.
    pub missed_beats: u8,
    pub deaths: u8,
    /// Leaders that lose the leadership though they live.
    pub depositions: u8,
    pub cancels: u8,
    /// Statements that fail and are tried again later.
    pub failures: u8,
    pub failovers: u8,
}

/// What no process knows: kept to judge by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Memory {
    /// The greatest fence of each job that was ever handed out. Also the clock: TIME is beyond it.
    pub handed_out: [u8; JOBS],
    /// Jobs that were taken at least once.
    pub started: [bool; JOBS],
    /// Jobs whose producer knows that they are queued.
    pub acknowledged: [bool; JOBS],
    /// Acknowledged jobs whose enqueue a failover has lost.
    pub enqueue_lost: [bool; JOBS],
    /// Jobs of which a transaction was noted and COMMIT sent, and a failover has lost the note.
    pub note_lost: [bool; JOBS],
    pub failed_over: bool,
    pub broken: Broken,
}

/// Rules that one step has broken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Broken {
    pub final_changed: bool,
    pub stale_wrote: bool,
    pub deposed_wrote: bool,
    pub fence_fell: bool,
    pub overtaken: bool,
    pub needless_end: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct State {
    pub redis: Redis,
    /// Redis before its latest writes, the latest first: where a failover may go back to.
    pub past: [Option<Redis>; 2],
    pub workers: [Worker; WORKERS],
    pub backends: [Option<Backend>; WORKERS],
    /// For each job the executions that have committed, a bit for each fence.
    pub committed: [u16; JOBS],
    /// For how many intervals each session's beat has stood still.
    pub still: [u8; SESSIONS],
    pub budget: Budget,
    pub memory: Memory,
}

impl State {
    /// How many executions of a job took effect.
    pub fn effects(&self, job: usize) -> u32 {
        self.committed[job].count_ones()
    }

    /// The same with the two workers exchanged: what can happen is the same.
    fn exchanged(&self) -> Self {
        let mut other = *self;
        let session = |session: usize| session ^ 1;
        other.workers.swap(0, 1);
        other.backends.swap(0, 1);
        for pair in other.still.chunks_exact_mut(WORKERS) {
            pair.swap(0, 1);
        }
        for worker in &mut other.workers {
            worker.session = session(worker.session);
            worker.sentence = worker.sentence.map(|(dead, beat)| (session(dead), beat));
        }
        for redis in std::iter::once(&mut other.redis).chain(other.past.iter_mut().flatten()) {
            for pair in redis.sessions.chunks_exact_mut(WORKERS) {
                pair.swap(0, 1);
            }
            for claim in redis.claims.iter_mut().flatten() {
                claim.session = session(claim.session);
            }
            redis.leader = redis.leader.map(|(leader, term)| (session(leader), term));
        }
        other
    }
}

impl Representative for State {
    fn representative(&self) -> Self {
        (*self).min(self.exchanged())
    }
}
