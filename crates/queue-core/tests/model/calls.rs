//! The functions, each by its name, reduced to what decides: hashes, queues, claims, the pool, sessions, the leader.

use crate::protocol::{Bug, Rules};
use crate::state::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    pub job: usize,
    pub fence: u8,
    pub trace: u8,
    pub unclean: bool,
    pub cancel_requested: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TakeReply {
    Lost,
    Taken(Option<Taken>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    Held,
    Cancel,
    Stale,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BeatReply {
    Lost,
    Alive,
}

/// `common.lua`
impl Redis {
    pub fn job(&self, job: usize) -> Option<&Job> {
        self.jobs[job].as_ref()
    }

    fn is_over(&self, job: usize) -> bool {
        self.job(job).is_none_or(|job| job.status.is_final())
    }

    fn head(&mut self, user: usize) -> Option<usize> {
        while let Some(job) = self.queues[user].first() {
            if self.claims[job].is_none() && !self.is_over(job) {
                return Some(job);
            }
            self.queues[user].pop_first();
        }
        None
    }

    fn place(&mut self, user: usize) {
        if self.head(user).is_some() && self.busy[user] == 0 && self.ready.count(user) == 0 {
            self.ready.push_last(user);
        }
    }

    fn release(&mut self, job: usize) {
        self.claims[job] = None;
        self.running = self.running.saturating_sub(1);
        self.busy[OWNER[job]] = self.busy[OWNER[job]].saturating_sub(1);
    }

    fn give_back(&mut self, job: usize) {
        self.release(job);
        if let Some(hash) = &mut self.jobs[job] {
            hash.status = Status::Pending;
            self.queues[OWNER[job]].push_first(job);
        }
        self.place(OWNER[job]);
    }

    fn holds(&self, session: usize, job: usize, fence: u8) -> bool {
        self.claims[job].is_some_and(|claim| claim.session == session && claim.fence == fence)
    }

    /// The claims of a session.
    pub fn work(&self, session: usize) -> impl Iterator<Item = (usize, Claim)> + use<> {
        let claims = self.claims;
        (0..JOBS).filter_map(move |job| claims[job].filter(|claim| claim.session == session).map(|claim| (job, claim)))
    }
}

impl Redis {
    /// `submit`
    pub fn enqueue(&mut self, job: usize) {
        if self.jobs[job].is_none() {
            self.jobs[job] = Some(Job {
                status: Status::Pending,
                fence: 0,
                settled: 0,
                trace: 0,
                unclean: false,
                cancel_requested: false,
            });
            self.queues[OWNER[job]].push_last(job);
            self.place(OWNER[job]);
        }
    }

    /// `take`, of at most one job. `clock` is beyond every fence that was handed out before.
    pub fn take(&mut self, rules: &Rules, session: usize, number: u8, clock: &[u8; JOBS]) -> TakeReply {
        let Some(registration) = &mut self.sessions[session] else { return TakeReply::Lost };
        if registration.take == number && rules.bug != Some(Bug::TakeNumberIgnored) {
            let same = self.work(session).find(|(_, claim)| claim.take == number);
            return TakeReply::Taken(same.map(|(job, claim)| self.hand_out(job, claim.fence)));
        }
        registration.take = number;
        if self.running >= rules.capacity {
            return TakeReply::Taken(None);
        }
        while let Some(user) = self.ready.first() {
            self.ready.pop_first();
            if let Some(job) = self.head(user) {
                return TakeReply::Taken(Some(self.claim_head(rules, session, number, job, clock[job])));
            }
        }
        TakeReply::Taken(None)
    }

    fn claim_head(&mut self, rules: &Rules, session: usize, take: u8, job: usize, clock: u8) -> Taken {
        let hash = self.jobs[job].as_mut().expect("a head has a hash");
        let time = if rules.bug == Some(Bug::FenceWithoutTime) { 0 } else { clock + 1 };
        let fence = time.max(hash.fence + 1);
        (hash.status, hash.fence) = (Status::Running, fence);
        self.queues[OWNER[job]].pop_first();
        self.claims[job] = Some(Claim { session, fence, take, cancel: false });
        self.running += 1;
        self.busy[OWNER[job]] += 1;
        self.place(OWNER[job]);
        self.hand_out(job, fence)
    }

    fn hand_out(&self, job: usize, fence: u8) -> Taken {
        let hash = self.job(job).expect("a claimed job has a hash");
        Taken { job, fence, trace: hash.trace, unclean: hash.unclean, cancel_requested: hash.cancel_requested }
    }

    /// `update_claimed`, with a trace or only to ask.
    pub fn mark(&mut self, session: usize, job: usize, fence: u8, trace: Option<u8>) -> Mark {
        if !self.holds(session, job, fence) {
            return Mark::Stale;
        }
        if let (Some(hash), Some(trace)) = (&mut self.jobs[job], trace) {
            hash.trace = trace;
        }
        if self.claims[job].is_some_and(|claim| claim.cancel) { Mark::Cancel } else { Mark::Held }
    }

    /// `finish`, of one job. Whether it answers `ended`, `repeated` or `stale`, the worker is done with it.
    pub fn finish(&mut self, rules: &Rules, session: usize, job: usize, fence: u8, verdict: Verdict) {
        if !self.holds(session, job, fence) && rules.bug != Some(Bug::FinishWithoutClaim) {
            return;
        }
        let cancel = self.claims[job].is_some_and(|claim| claim.cancel);
        self.release(job);
        if let Some(hash) = &mut self.jobs[job] {
            hash.settled = fence;
            match verdict {
                Verdict::Final(status) => (hash.status, hash.trace) = (status, 0),
                Verdict::Later => {
                    hash.status = Status::Scheduled;
                    hash.cancel_requested |= cancel;
                    self.due[job] = true;
                }
            }
        }
        if rules.bug != Some(Bug::NextNotReadied) {
            self.place(OWNER[job]);
        }
    }

    /// `finish` with the verdict `back`: a claim that its session knows nothing of.
    pub fn finish_back(&mut self, session: usize, job: usize, fence: u8) {
        if self.holds(session, job, fence) {
            if let Some(hash) = &mut self.jobs[job] {
                hash.settled = fence;
            }
            self.give_back(job);
        }
    }

    /// `cancel`, of one job.
    pub fn cancel(&mut self, rules: &Rules, job: usize) {
        let Some(hash) = &mut self.jobs[job] else { return };
        if let Some(claim) = &mut self.claims[job] {
            (claim.cancel, hash.cancel_requested) = (true, true);
        } else if hash.trace != 0 && !hash.status.is_final() && rules.bug != Some(Bug::CancelOverTrace) {
            hash.cancel_requested = true;
        } else if !hash.status.is_final() {
            (hash.status, hash.cancel_requested) = (Status::Cancelled, true);
            self.queues[OWNER[job]].remove(job);
            self.due[job] = false;
            self.place(OWNER[job]);
        }
    }

    /// What `take` and `promote_and_expire` do with a job that is due.
    pub fn promote(&mut self, job: usize) {
        self.due[job] = false;
        if let Some(hash) = self.jobs[job].as_mut().filter(|hash| hash.status == Status::Scheduled) {
            hash.status = Status::Pending;
            self.queues[OWNER[job]].push_first(job);
            self.place(OWNER[job]);
        }
    }

    /// `session_open`
    pub fn session_open(&mut self, session: usize) {
        self.sessions[session] = Some(Registration::default());
    }

    /// `session_beat`. What it tells of cancels and claims the caller reads off [`Redis::work`].
    pub fn session_beat(&mut self, session: usize) -> BeatReply {
        let Some(registration) = &mut self.sessions[session] else { return BeatReply::Lost };
        registration.beat += 1;
        BeatReply::Alive
    }

    /// Whether the scripts of the leader do what this session asks in this term.
    pub fn leads(&self, session: usize, term: u8) -> bool {
        self.leader == Some((session, term))
    }

    /// `session_end`, the leader's form. Returns whether it ended the session.
    pub fn session_reclaim(&mut self, rules: &Rules, dead: usize, beat: u8, leader: usize, term: u8) -> bool {
        let leads = self.leads(leader, term) || rules.bug == Some(Bug::TermIgnored);
        if !leads || self.sessions[dead].is_none_or(|stands| stands.beat != beat) {
            return false;
        }
        for (job, _) in self.work(dead) {
            if let Some(hash) = &mut self.jobs[job] {
                hash.unclean = true;
            }
            self.give_back(job);
        }
        self.sessions[dead] = None;
        true
    }

    /// `leader_lease`. Returns the term if the session leads.
    pub fn lead(&mut self, session: usize) -> Option<u8> {
        match self.leader {
            Some((holder, term)) if holder == session => Some(term),
            Some(_) => None,
            None => {
                self.term += 1;
                self.leader = Some((session, self.term));
                Some(self.term)
            }
        }
    }
}
