//! What can happen next, and what comes of it.

use stateright::{Model, Property};

use crate::calls::{BeatReply, Mark, TakeReply, Taken};
use crate::properties;
use crate::state::*;

/// For how many intervals a beat must stand still before its session is dead.
pub const LIFETIME: u8 = 2;

/// One rule of the protocol left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// `finish` does not compare the claim.
    FinishWithoutClaim,
    /// A fence is the stored one plus one, whatever the time.
    FenceWithoutTime,
    /// A session is dead after one missed beat.
    DeadAtOneMissedBeat,
    /// A take that is asked for again is a new one.
    TakeNumberIgnored,
    /// The leader's scripts do not compare the term.
    TermIgnored,
    /// `finish` does not ready the user's next job.
    NextNotReadied,
    /// `cancel` of a waiting job does not ask what a lost worker has left.
    CancelOverTrace,
    /// The transaction is not noted with the job before its commit.
    CommitWithoutNote,
    /// Who takes a job over does not end the earlier execution.
    BackendLeftAlone,
}

/// One check: its size, what may go wrong in it, and what is left out.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    pub capacity: u8,
    /// The jobs are submitted one after the other while others run; else they are all queued at the start.
    pub producer: bool,
    /// For how many writes a replica may be behind at a failover.
    pub lag: usize,
    pub budget: Budget,
    pub bug: Option<Bug>,
    /// What a failover can break is checked as well.
    pub strict: bool,
}

impl Rules {
    pub fn new(capacity: u8, budget: Budget) -> Self {
        Self { capacity, producer: false, lag: 2, budget, bug: None, strict: false }
    }

    pub fn strict(self) -> Self {
        Self { strict: true, ..self }
    }

    pub fn without(self, bug: Bug) -> Self {
        Self { bug: Some(bug), ..self }
    }

    fn patience(&self) -> u8 {
        if self.bug == Some(Bug::DeadAtOneMissedBeat) { 1 } else { LIFETIME }
    }
}

/// Whether the caller of a script hears its answer. It ran in either case, and is asked again where it was not heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Answer {
    Heard,
    Lost,
}

/// A number is a worker's, but for `MissBeat` (a session's) and `Cancel`, `Promote` (a job's).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    // A producer.
    Enqueue(Answer),
    // A worker and Redis.
    Take(usize, Answer),
    /// `mark` without fields: does the claim hold?
    Confirm(usize),
    /// `mark` with the transaction, and then COMMIT is sent.
    Note(usize, Answer),
    Finish(usize, Answer),
    /// A heartbeat, with what its answer tells to do: to give back, to stop, or to register anew.
    Beat(usize),
    // A worker and the database.
    /// It connects, and gets the job's lock if nobody has it; then it asks what an earlier transaction has come to.
    Lock(usize),
    /// It ends the other execution first.
    Terminate(usize),
    /// The statement fails, and is to be tried again.
    Fail(usize),
    /// It has heard of the cancel: the statement is stopped.
    Stop(usize),
    /// It finds its connection closed.
    Broken(usize),
    /// The database carries out the COMMIT that this worker has sent.
    Commit(usize),
    /// The database notices that a dead worker's connection is closed.
    Hangup(usize),
    // The leader.
    Lead(usize),
    /// It finds that a beat has stood still for a lifetime.
    Sentence(usize, usize),
    Reclaim(usize),
    /// The leader's key expires.
    Depose,
    // Time, and others.
    MissBeat(usize),
    Promote(usize),
    Cancel(usize),
    Die(usize),
    /// A replica that has not received the latest write, or the latest two, becomes the primary.
    Failover(usize),
}

/// The protocol as something that can be explored.
#[derive(Clone, Copy, Debug)]
pub struct Protocol(pub Rules);

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let mut redis = Redis::default();
        let worker = |session| Worker {
            alive: true,
            session,
            take_number: 0,
            take_open: false,
            attempt: None,
            term: None,
            sentence: None,
        };
        let mut memory = Memory::default();
        (0..WORKERS).for_each(|session| redis.session_open(session));
        if !self.0.producer {
            (0..JOBS).for_each(|job| redis.enqueue(job));
            memory.acknowledged = [true; JOBS];
        }
        vec![State {
            redis,
            past: [None; 2],
            workers: [worker(0), worker(1)],
            backends: [None; WORKERS],
            committed: [0; JOBS],
            still: [0; SESSIONS],
            budget: self.0.budget,
            memory,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let budget = &state.budget;
        let both = |action: fn(Answer) -> Action, actions: &mut Vec<Action>| {
            actions.push(action(Answer::Heard));
            if budget.lost_replies > 0 {
                actions.push(action(Answer::Lost));
            }
        };
        if state.memory.acknowledged.contains(&false) {
            both(Action::Enqueue, actions);
        }
        for at in 0..WORKERS {
            let worker = &state.workers[at];
            if let Some(backend) = &state.backends[at] {
                if backend.commit_sent {
                    actions.push(Action::Commit(at));
                }
                if !worker.alive {
                    actions.push(Action::Hangup(at));
                }
            }
            if !worker.alive {
                continue;
            }
            actions.push(Action::Beat(at));
            self.attempt_actions(state, at, actions);
            if budget.deaths > 0 {
                actions.push(Action::Die(at));
            }
            if state.still.iter().any(|still| *still >= self.0.patience()) {
                actions.push(Action::Lead(at));
            }
            if worker.sentence.is_some() {
                actions.push(Action::Reclaim(at));
            } else if worker.term.is_some() {
                actions.extend((0..SESSIONS).map(|session| Action::Sentence(at, session)));
            }
        }
        actions.extend((0..SESSIONS).map(Action::MissBeat));
        actions.push(Action::Depose);
        actions.extend((0..JOBS).filter(|job| state.redis.due[*job]).map(Action::Promote));
        if budget.cancels > 0 {
            actions.extend((0..JOBS).map(Action::Cancel));
        }
        if budget.failovers > 0 {
            actions.extend((0..self.0.lag).map(Action::Failover));
        }
    }

    fn next_state(&self, before: &State, action: Action) -> Option<State> {
        let mut state = *before;
        self.act(&mut state, action)?;
        (state != *before).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = properties::all();
        if self.0.strict {
            properties.extend(properties::broken_by_failovers());
        }
        properties
    }
}

impl Protocol {
    fn attempt_actions(&self, state: &State, at: usize, actions: &mut Vec<Action>) {
        let answers = if state.budget.lost_replies > 0 { &[Answer::Heard, Answer::Lost][..] } else { &[Answer::Heard] };
        let Some(attempt) = &state.workers[at].attempt else {
            actions.extend(answers.iter().map(|answer| Action::Take(at, *answer)));
            return;
        };
        let connected = state.backends[at].is_some();
        match attempt.at {
            At::Taken if other_execution(state, at).is_some() && self.0.bug != Some(Bug::BackendLeftAlone) => {
                actions.push(Action::Confirm(at));
            }
            At::Taken => actions.push(Action::Lock(at)),
            At::Confirmed => actions.push(Action::Terminate(at)),
            At::Locked | At::Begun if attempt.cancel => actions.push(Action::Stop(at)),
            At::Locked | At::Begun if !connected => actions.push(Action::Broken(at)),
            At::Locked => actions.push(Action::Confirm(at)),
            At::Begun => {
                actions.extend(answers.iter().map(|answer| Action::Note(at, *answer)));
                if state.budget.failures > 0 {
                    actions.push(Action::Fail(at));
                }
            }
            At::Committing if connected => {}
            At::Committing | At::Ending(_) => actions.extend(answers.iter().map(|answer| Action::Finish(at, *answer))),
        }
    }

    /// `None` if it can't happen, or would tell nobody anything.
    fn act(&self, state: &mut State, action: Action) -> Option<()> {
        let rules = &self.0;
        match action {
            Action::Enqueue(answer) => {
                let job = state.memory.acknowledged.iter().position(|known| !known)?;
                self.call(state, |redis| redis.enqueue(job));
                match answer {
                    Answer::Heard => state.memory.acknowledged[job] = true,
                    Answer::Lost => state.budget.lost_replies -= 1,
                }
            }
            Action::Take(at, answer) => self.take(state, at, answer)?,
            Action::Confirm(at) => {
                let attempt = state.workers[at].attempt?;
                match self.mark(state, at, attempt, None) {
                    Mark::Stale => drop_attempt(state, at),
                    reply => {
                        let attempt = state.workers[at].attempt.as_mut()?;
                        attempt.cancel |= reply == Mark::Cancel;
                        match (attempt.at, &mut state.backends[at]) {
                            (At::Taken, _) => attempt.at = At::Confirmed,
                            (_, Some(backend)) => (attempt.at, backend.begun) = (At::Begun, true),
                            (_, None) => return None,
                        }
                    }
                }
            }
            Action::Note(at, answer) => {
                let attempt = state.workers[at].attempt?;
                let trace = (rules.bug != Some(Bug::CommitWithoutNote)).then_some(attempt.fence);
                let reply = self.mark(state, at, attempt, trace);
                match (reply, answer) {
                    (_, Answer::Lost) => state.budget.lost_replies -= 1,
                    (Mark::Stale, _) => drop_attempt(state, at),
                    (Mark::Held | Mark::Cancel, _) => {
                        state.backends[at].as_mut()?.commit_sent = true;
                        state.workers[at].attempt.as_mut()?.at = At::Committing;
                    }
                }
            }
            Action::Finish(at, answer) => self.finish(state, at, answer)?,
            Action::Beat(at) => self.beat(state, at)?,
            Action::Lock(at) => lock(state, at)?,
            Action::Terminate(at) => {
                if let Some(other) = other_execution(state, at) {
                    state.backends[other] = None;
                }
                lock(state, at)?;
            }
            Action::Fail(at) => {
                state.budget.failures -= 1;
                end_attempt(state, at, Verdict::Later)?;
            }
            Action::Stop(at) => end_attempt(state, at, Verdict::Final(Status::Cancelled))?,
            Action::Broken(at) => {
                let attempt = state.workers[at].attempt?;
                match self.mark(state, at, attempt, None) {
                    Mark::Stale => drop_attempt(state, at),
                    Mark::Held | Mark::Cancel => end_attempt(state, at, Verdict::Final(Status::Failed))?,
                }
            }
            Action::Commit(at) => {
                let backend = state.backends[at].take()?;
                state.committed[backend.job] |= 1 << backend.fence;
            }
            Action::Hangup(at) => state.backends[at] = None,
            Action::Lead(at) => {
                let session = state.workers[at].session;
                let term = self.call(state, |redis| redis.lead(session));
                state.workers[at].term = term.or(state.workers[at].term);
            }
            Action::Sentence(at, session) => {
                let stands = state.redis.sessions[session]?;
                if state.still[session] >= rules.patience() {
                    state.workers[at].sentence = Some((session, stands.beat));
                }
            }
            Action::Reclaim(at) => self.reclaim(state, at)?,
            Action::Depose => {
                let (holder, term) = state.redis.leader?;
                let worker = &state.workers[holder % WORKERS];
                if worker.alive && worker.session == holder && worker.term == Some(term) {
                    state.budget.depositions = state.budget.depositions.checked_sub(1)?;
                }
                state.redis.leader = None;
            }
            Action::MissBeat(session) => {
                state.redis.sessions[session]?;
                if serves(state, session) {
                    if state.still[session] < LIFETIME {
                        state.budget.missed_beats = state.budget.missed_beats.checked_sub(1)?;
                        state.still[session] += 1;
                    }
                } else {
                    state.still[session] = LIFETIME;
                }
            }
            Action::Promote(job) => self.call(state, |redis| redis.promote(job)),
            Action::Cancel(job) => {
                let before = state.redis;
                self.call(state, |redis| redis.cancel(rules, job));
                if state.redis == before {
                    return None;
                }
                state.budget.cancels -= 1;
            }
            Action::Die(at) => {
                state.budget.deaths -= 1;
                let Worker { session, .. } = state.workers[at];
                state.workers[at] = Worker {
                    alive: false,
                    session,
                    take_number: 0,
                    take_open: false,
                    attempt: None,
                    term: None,
                    sentence: None,
                };
            }
            Action::Failover(back) => failover(state, back)?,
        }
        Some(())
    }

    /// A script runs: Redis remembers what a replica may not have received, and a final record must be as it was.
    fn call<R>(&self, state: &mut State, script: impl FnOnce(&mut Redis) -> R) -> R {
        let before = state.redis;
        let reply = script(&mut state.redis);
        if state.redis != before {
            if state.budget.failovers > 0 {
                state.past = [Some(before), state.past[0].filter(|_| self.0.lag > 1)];
            }
            for job in 0..JOBS {
                let was_final = before.job(job).is_some_and(|job| job.status.is_final());
                state.memory.broken.final_changed |= was_final && state.redis.jobs[job] != before.jobs[job];
            }
        }
        reply
    }

    /// The same of a script that ends or writes under a claim: without it, it must change nothing.
    fn call_under_claim<R>(
        &self,
        state: &mut State,
        at: usize,
        attempt: Attempt,
        script: impl FnOnce(&mut Redis, usize) -> R,
    ) -> R {
        let (before, session) = (state.redis, state.workers[at].session);
        let held =
            before.claims[attempt.job].is_some_and(|claim| (claim.session, claim.fence) == (session, attempt.fence));
        let reply = self.call(state, |redis| script(redis, session));
        state.memory.broken.stale_wrote |= !held && state.redis != before;
        reply
    }

    fn take(&self, state: &mut State, at: usize, answer: Answer) -> Option<()> {
        let Worker { session, take_open, take_number, .. } = state.workers[at];
        let number = if take_open { take_number } else { take_number + 1 };
        let (before, clock) = (state.redis, state.memory.handed_out);
        let reply = self.call(state, |redis| redis.take(&self.0, session, number, &clock));
        let taken = match reply {
            // The next heartbeat says it too.
            TakeReply::Lost => return None,
            TakeReply::Taken(taken) => taken,
        };
        match taken {
            // An empty answer to a new take changes nothing that matters.
            None if !take_open || answer == Answer::Lost => return None,
            Some(taken) if before.claims[taken.job].is_none() => self.judge_take(state, taken),
            _ => {}
        }
        let worker = &mut state.workers[at];
        worker.take_number = number;
        worker.take_open = answer == Answer::Lost;
        match answer {
            Answer::Lost => state.budget.lost_replies -= 1,
            Answer::Heard => worker.attempt = taken.map(begin),
        }
        Some(())
    }

    fn judge_take(&self, state: &mut State, taken: Taken) {
        let memory = &mut state.memory;
        memory.broken.fence_fell |= taken.fence <= memory.handed_out[taken.job];
        memory.handed_out[taken.job] = memory.handed_out[taken.job].max(taken.fence);
        let waits = |job: usize| {
            state.redis.job(job).is_some_and(|job| !job.status.is_final())
                && !state.redis.due[job]
                && !memory.started[job]
        };
        let earlier = (0..taken.job).filter(|job| OWNER[*job] == OWNER[taken.job]);
        memory.broken.overtaken |= !memory.started[taken.job] && earlier.into_iter().any(waits);
        memory.started[taken.job] = true;
    }

    fn mark(&self, state: &mut State, at: usize, attempt: Attempt, trace: Option<u8>) -> Mark {
        self.call_under_claim(state, at, attempt, |redis, session| {
            redis.mark(session, attempt.job, attempt.fence, trace)
        })
    }

    fn finish(&self, state: &mut State, at: usize, answer: Answer) -> Option<()> {
        let attempt = state.workers[at].attempt?;
        let verdict = match attempt.at {
            At::Ending(verdict) => verdict,
            _ if state.committed[attempt.job] & (1 << attempt.fence) != 0 => Verdict::Final(Status::Done),
            _ => Verdict::Final(Status::Failed),
        };
        self.call_under_claim(state, at, attempt, |redis, session| {
            redis.finish(&self.0, session, attempt.job, attempt.fence, verdict);
        });
        match answer {
            Answer::Heard => state.workers[at].attempt = None,
            Answer::Lost => {
                state.budget.lost_replies -= 1;
                state.workers[at].attempt.as_mut()?.at = At::Ending(verdict);
            }
        }
        Some(())
    }

    fn beat(&self, state: &mut State, at: usize) -> Option<()> {
        let Worker { session, attempt, take_open, .. } = state.workers[at];
        let mut redis = state.redis;
        if redis.session_beat(session) == BeatReply::Lost {
            // The process ends, but for a COMMIT under way, and is started anew.
            let committing =
                attempt.is_some_and(|attempt| attempt.at == At::Committing) && state.backends[at].is_some();
            if committing || session + WORKERS >= SESSIONS {
                return None;
            }
            drop_attempt(state, at);
            let worker = &mut state.workers[at];
            worker.session += WORKERS;
            (worker.take_number, worker.take_open, worker.term, worker.sentence) = (0, false, None, None);
            self.call(state, |redis| redis.session_open(session + WORKERS));
            return Some(());
        }
        let ours = |job: usize, claim: &Claim| {
            attempt.is_some_and(|attempt| (attempt.job, attempt.fence) == (job, claim.fence))
        };
        let cancel = redis.work(session).any(|(job, claim)| claim.cancel && ours(job, &claim));
        let news = cancel && attempt.is_some_and(|attempt| !attempt.cancel);
        // Claims are compared only where their number is not the believed one.
        let differs = redis.work(session).count() != usize::from(attempt.is_some());
        let unknown: Vec<_> =
            redis.work(session).filter(|(job, claim)| differs && !take_open && !ours(*job, claim)).collect();
        if state.still[session] == 0 && !news && unknown.is_empty() {
            return None;
        }
        // The number of a beat alone is no write that a failover could lose to any effect.
        state.redis = redis;
        state.still[session] = 0;
        if let Some(attempt) = &mut state.workers[at].attempt {
            attempt.cancel |= cancel;
        }
        for (job, claim) in unknown {
            self.call(state, |redis| redis.finish_back(session, job, claim.fence));
        }
        Some(())
    }

    fn reclaim(&self, state: &mut State, at: usize) -> Option<()> {
        let (dead, beat) = state.workers[at].sentence.take()?;
        let (session, term) = (state.workers[at].session, state.workers[at].term?);
        let (leads, before) = (state.redis.leads(session, term), state.redis);
        let ended = self.call(state, |redis| redis.session_reclaim(&self.0, dead, beat, session, term));
        state.memory.broken.needless_end |= ended && serves(state, dead) && state.still[dead] < LIFETIME;
        state.memory.broken.deposed_wrote |= !leads && state.redis != before;
        if !leads {
            state.workers[at].term = None;
        }
        if ended {
            state.still[dead] = 0;
        }
        Some(())
    }
}

/// A living worker works under this session.
fn serves(state: &State, session: usize) -> bool {
    let worker = &state.workers[session % WORKERS];
    worker.alive && worker.session == session
}

/// The other worker's connection, if it is there for the job that this one attempts.
fn other_execution(state: &State, at: usize) -> Option<usize> {
    let attempt = state.workers[at].attempt?;
    (0..WORKERS).find(|other| *other != at && state.backends[*other].is_some_and(|backend| backend.job == attempt.job))
}

fn begin(taken: Taken) -> Attempt {
    let Taken { job, fence, trace, unclean, cancel_requested } = taken;
    let left_behind = unclean || trace != 0;
    let at = match cancel_requested && !left_behind {
        true => At::Ending(Verdict::Final(Status::Cancelled)),
        false => At::Taken,
    };
    Attempt { job, fence, earlier: trace, cancel: cancel_requested, at }
}

/// Gets the lock, and settles what an earlier execution has left.
fn lock(state: &mut State, at: usize) -> Option<()> {
    let attempt = state.workers[at].attempt.as_mut()?;
    let Attempt { job, fence, earlier, .. } = *attempt;
    if earlier != 0 && state.committed[job] & (1 << earlier) != 0 {
        attempt.at = At::Ending(Verdict::Final(Status::Done));
    } else {
        attempt.at = At::Locked;
        state.backends[at] = Some(Backend { job, fence, begun: false, commit_sent: false });
    }
    Some(())
}

/// The attempt has its end, and its connection is closed: what has not been committed is rolled back.
fn end_attempt(state: &mut State, at: usize, verdict: Verdict) -> Option<()> {
    state.backends[at] = None;
    state.workers[at].attempt.as_mut()?.at = At::Ending(verdict);
    Some(())
}

/// The claim is another's: there is nothing to record.
fn drop_attempt(state: &mut State, at: usize) {
    state.backends[at] = None;
    state.workers[at].attempt = None;
}

fn failover(state: &mut State, back: usize) -> Option<()> {
    state.redis = state.past[back]?;
    state.budget.failovers -= 1;
    state.past = [None; 2];
    // Whoever watches the beats begins anew.
    state.still = [0; SESSIONS];
    for worker in &mut state.workers {
        worker.sentence = None;
    }
    let memory = &mut state.memory;
    memory.failed_over = true;
    for job in 0..JOBS {
        memory.enqueue_lost[job] |= memory.acknowledged[job] && state.redis.jobs[job].is_none();
        let in_flight = state.backends.iter().flatten().filter(|backend| backend.job == job && backend.commit_sent);
        let sent = in_flight.fold(state.committed[job], |sent, backend| sent | 1 << backend.fence);
        let known = |job: &Job| job.status.is_final() || sent & !(1 << job.trace) == 0;
        memory.note_lost[job] |= sent != 0 && !state.redis.job(job).is_some_and(known);
    }
    Some(())
}
