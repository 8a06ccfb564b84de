//! What the scripts do, told once more with plain maps and lists: for SQL jobs of one statement, pools of a given capacity,
//! fairness by jobs and users of weight 1.
//!
//! It predicts every reply and every key that decides. What time decides it does not predict but is told: which scheduled
//! jobs are due and in which order, in which order ids without a hash were missed, and the numbers of fences (of which it
//! knows that they grow). So is the order in which one call of the leader comes to users, for that is no order at all.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use queue_core::model::retry::{SUSPECT_AFTER, UNCLEAN_MAX};

pub const CAPACITY: usize = 2;
/// What a job costs its user, in the unit of virtual time.
const COST: i64 = 1_000_000;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    pub owner: String,
    pub pool: String,
    /// A foreign producer may have written none.
    pub status: Option<String>,
    pub fence: u64,
    pub unclean: u64,
    pub trace: bool,
    pub cancel_requested: bool,
}

impl Job {
    pub fn new(owner: &str, host: &str, status: Option<&str>) -> Self {
        Self {
            owner: owner.to_owned(),
            pool: format!("sql:{host}"),
            status: status.map(str::to_owned),
            fence: 0,
            unclean: 0,
            trace: false,
            cancel_requested: false,
        }
    }

    pub fn final_status(&self) -> Option<&str> {
        let status = self.status.as_deref()?;
        ["done", "failed", "cancelled", "ignored", "unknown"].contains(&status).then_some(status)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    pub session: String,
    pub pool: String,
    pub user: String,
    pub tag: i64,
    take: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pool {
    pub running: usize,
    pub v: i64,
    pub newest: Option<i64>,
    /// Where its last job has left its turn.
    pub pass: i64,
    /// Start tags.
    pub ready: BTreeMap<String, i64>,
    /// Finish tags.
    pub debt: BTreeMap<String, i64>,
    pub busy: BTreeMap<String, usize>,
}

#[derive(Clone, Debug, Default)]
pub struct Session {
    pub cancels: BTreeSet<String>,
    suspect: Option<String>,
}

/// What `cancel` answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cancel {
    Cancelled,
    Requested,
    Over(String),
}

/// How a claim ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Final(&'static str),
    Next,
    Back,
    Later,
}

#[derive(Clone, Debug, Default)]
pub struct Reference {
    pub jobs: BTreeMap<String, Job>,
    /// The heads first.
    pub queues: BTreeMap<String, VecDeque<String>>,
    pub claims: BTreeMap<String, Claim>,
    pub pools: BTreeMap<String, Pool>,
    pub sessions: BTreeMap<String, Session>,
    pub due: BTreeSet<String>,
    /// Id and user.
    pub missing: BTreeSet<(String, String)>,
    pub finished: BTreeSet<String>,
    pub rejected: Vec<(String, String)>,
    /// Pools that may have something to take, by their turns.
    turns: BTreeMap<String, i64>,
    /// The greatest turn so far.
    turn: i64,
}

/// `common.lua`
impl Reference {
    fn pool(&mut self, pool: &str) -> &mut Pool {
        self.pools.entry(pool.to_owned()).or_default()
    }

    fn list(&mut self, pool: &str) {
        let start = self.pool(pool).pass.max(self.turn);
        self.turns.entry(pool.to_owned()).or_insert(start);
    }

    /// The pools that may have something to take, whose turn it is first.
    pub fn listed(&self) -> Vec<String> {
        let mut pools: Vec<_> = self.turns.iter().map(|(pool, turn)| (*turn, pool.clone())).collect();
        pools.sort();
        pools.into_iter().map(|(_, pool)| pool).collect()
    }

    fn head(&mut self, user: &str) -> Option<(String, String)> {
        loop {
            let id = self.queues.get(user)?.front()?.clone();
            let job = self.jobs.get(&id);
            let claimed = self.claims.contains_key(&id);
            if let Some(job) = job
                && !claimed
                && job.owner == user
                && job.final_status().is_none()
            {
                return Some((id, job.pool.clone()));
            }
            if !claimed && job.is_none() {
                self.missing.insert((id.clone(), user.to_owned()));
            } else if !claimed && job.is_some_and(|job| job.owner != user) {
                self.rejected.push((id, "it belongs to another user than its queue".to_owned()));
            }
            self.pop(user);
        }
    }

    fn pop(&mut self, user: &str) {
        let queue = self.queues.get_mut(user).expect("a queue with a head");
        queue.pop_front();
        if queue.is_empty() {
            self.queues.remove(user);
        }
    }

    fn ready(&mut self, pool: &str, user: &str) -> bool {
        let p = self.pool(pool);
        if p.busy.contains_key(user) {
            return false;
        }
        let new = !p.ready.contains_key(user);
        if new {
            let mut start = p.debt.get(user).copied().unwrap_or(0);
            if start <= p.v {
                start = p.v.max(p.newest.unwrap_or(-1) + 1);
                p.newest = Some(start);
            }
            p.ready.insert(user.to_owned(), start);
        }
        self.list(pool);
        new
    }

    /// The pool of the user's head, if the user is new there.
    fn place(&mut self, user: &str) -> Option<String> {
        let (_, pool) = self.head(user)?;
        self.ready(&pool, user).then_some(pool)
    }

    fn recharge(&mut self, claim: &Claim) {
        let p = self.pool(&claim.pool);
        let tag = p.debt.get(&claim.user).copied().unwrap_or(claim.tag) - COST;
        if tag > p.v {
            p.debt.insert(claim.user.clone(), tag);
        } else {
            p.debt.remove(&claim.user);
        }
        let v = p.v;
        if let Some(start) = p.ready.get_mut(&claim.user) {
            *start = v.max(tag);
        }
    }

    fn release(&mut self, id: &str) -> Claim {
        let claim = self.claims.remove(id).expect("a claim");
        let session = self.sessions.get_mut(&claim.session).expect("a session that holds a claim");
        session.cancels.remove(id);
        session.suspect.take_if(|suspect| suspect == id);
        let p = self.pool(&claim.pool);
        p.running -= 1;
        let left = p.busy[&claim.user] - 1;
        p.busy.insert(claim.user.clone(), left);
        p.busy.retain(|_, count| *count > 0);
        if !p.ready.is_empty() {
            self.list(&claim.pool);
        }
        claim
    }

    fn set_status(&mut self, id: &str, status: &str) {
        self.jobs.get_mut(id).expect("a job").status = Some(status.to_owned());
    }

    fn file(&mut self, id: &str, status: &str) {
        self.set_status(id, status);
        self.finished.insert(id.to_owned());
    }

    fn put_first(&mut self, id: &str, user: &str) {
        self.queues.entry(user.to_owned()).or_default().push_front(id.to_owned());
    }

    fn give_back(&mut self, id: &str) {
        let claim = self.release(id);
        self.set_status(id, "pending");
        self.put_first(id, &claim.user);
        self.place(&claim.user);
    }

    fn promote_due(&mut self, due: &[String]) {
        for id in due.iter().rev() {
            assert!(self.due.remove(id), "{id} is due");
            if !self.claims.contains_key(id) && self.jobs[id].status.as_deref() == Some("scheduled") {
                let user = self.jobs[id].owner.clone();
                self.set_status(id, "pending");
                self.put_first(id, &user);
                self.place(&user);
            }
        }
    }
}

impl Reference {
    /// `submit`, of one job. Whether it is queued: else its id exists.
    pub fn enqueue(&mut self, id: &str, user: &str, host: &str, delayed: bool) -> bool {
        if self.jobs.contains_key(id) {
            return false;
        }
        let status = if delayed { "scheduled" } else { "pending" };
        self.jobs.insert(id.to_owned(), Job::new(user, host, Some(status)));
        if delayed {
            self.due.insert(id.to_owned());
        } else {
            self.push(user, id, false);
            self.place(user);
        }
        true
    }

    /// What a foreign producer does: to the right end, `first`, or to the left one.
    pub fn push(&mut self, user: &str, id: &str, first: bool) {
        let queue = self.queues.entry(user.to_owned()).or_default();
        if first { queue.push_front(id.to_owned()) } else { queue.push_back(id.to_owned()) }
    }

    /// `admit`: how many users became ready. Of users who enter a pool together, the one with the least of `tags` did so
    /// first.
    pub fn notice(&mut self, users: &BTreeSet<String>, tags: &BTreeMap<(String, String), i64>) -> u64 {
        self.place_all(users, tags)
    }

    fn place_all(&mut self, users: &BTreeSet<String>, tags: &BTreeMap<(String, String), i64>) -> u64 {
        let mut heads: Vec<_> = users.iter().filter_map(|user| Some((self.head(user)?.1, user.clone()))).collect();
        heads.sort_by_key(|head| tags.get(head));
        heads.iter().filter(|(pool, user)| self.ready(pool, user)).count() as u64
    }

    /// `take` with a new number: ids with their users and pools, in their order.
    pub fn take(&mut self, session: &str, number: u64, n: usize, due: &[String]) -> Vec<(String, String, String)> {
        self.promote_due(due);
        let (mut taken, mut opened) = (Vec::new(), Vec::new());
        // The pools that are still to be asked.
        let mut pools: BTreeSet<(i64, String)> = self.turns.iter().map(|(pool, turn)| (*turn, pool.clone())).collect();
        while taken.len() < n
            && let Some((pass, pool)) = pools.pop_first()
        {
            match self.take_one(session, number, &pool, &mut opened) {
                One::Taken(job) => {
                    taken.push(job);
                    self.turn = self.turn.max(pass);
                    self.pool(&pool).pass = pass + COST;
                    self.turns.insert(pool.clone(), pass + COST);
                    pools.insert((pass + COST, pool));
                }
                One::Nothing => drop(self.turns.remove(&pool)),
                One::SuspectsOnly => {}
            }
            for pool in opened.drain(..) {
                if pools.iter().all(|(_, listed)| *listed != pool) {
                    pools.insert((self.turns[&pool], pool));
                }
            }
        }
        taken
    }

    fn take_one(&mut self, session: &str, number: u64, pool: &str, opened: &mut Vec<String>) -> One {
        if self.pool(pool).running >= CAPACITY {
            return One::Nothing;
        }
        let mut passed_over = 0;
        loop {
            let mut ready: Vec<_> = self.pool(pool).ready.iter().map(|(user, start)| (*start, user.clone())).collect();
            ready.sort();
            let Some((start, user)) = ready.into_iter().nth(passed_over) else {
                return if passed_over > 0 { One::SuspectsOnly } else { One::Nothing };
            };
            let head = self.head(&user);
            let suspect = head.as_ref().is_some_and(|(id, actual)| {
                actual == pool && self.is_suspect(id) && self.sessions[session].suspect.is_some()
            });
            if suspect {
                passed_over += 1;
                continue;
            }
            self.pool(pool).ready.remove(&user);
            match head {
                Some((id, actual)) if actual == pool => {
                    self.claim_head(session, number, &id, &user, pool, start);
                    opened.extend(self.place(&user).filter(|at| at != pool));
                    return One::Taken((id, user, pool.to_owned()));
                }
                Some((_, actual)) => opened.extend(self.ready(&actual, &user).then_some(actual)),
                None => {}
            }
        }
    }

    fn is_suspect(&self, id: &str) -> bool {
        self.jobs[id].unclean >= SUSPECT_AFTER
    }

    fn claim_head(&mut self, session: &str, take: u64, id: &str, user: &str, pool: &str, start: i64) {
        self.pop(user);
        let tag = start + COST;
        let claim = Claim { session: session.to_owned(), pool: pool.to_owned(), user: user.to_owned(), tag, take };
        self.claims.insert(id.to_owned(), claim);
        if self.is_suspect(id) {
            self.sessions.get_mut(session).expect("a session").suspect = Some(id.to_owned());
        }
        // Others may have queued it before it was due.
        self.due.remove(id);
        self.set_status(id, "running");
        let p = self.pool(pool);
        p.running += 1;
        *p.busy.entry(user.to_owned()).or_default() += 1;
        p.v = p.v.max(start);
        p.debt.insert(user.to_owned(), tag);
        let v = p.v;
        p.debt.retain(|_, tag| *tag > v);
    }

    /// `take` with the same number again.
    pub fn taken_by(&self, session: &str, number: u64) -> BTreeSet<String> {
        let same = |claim: &&Claim| claim.session == session && claim.take == number;
        self.claims.iter().filter(|(_, claim)| same(claim)).map(|(id, _)| id.clone()).collect()
    }

    /// `update_claimed` by the holder: whether a cancel is asked for.
    pub fn mark(&mut self, id: &str, trace: bool) -> bool {
        self.jobs.get_mut(id).expect("a job").trace |= trace;
        self.sessions[&self.claims[id].session].cancels.contains(id)
    }

    /// `finish` by the holder, with no fields but the status.
    pub fn finish(&mut self, id: &str, end: End) {
        if end == End::Back {
            self.recharge(&self.claims[id].clone());
            return self.give_back(id);
        }
        let claim = self.release(id);
        match end {
            End::Next => {
                self.set_status(id, "pending");
                self.put_first(id, &claim.user);
            }
            End::Later => {
                self.set_status(id, "scheduled");
                self.due.insert(id.to_owned());
            }
            End::Final(status) => self.file(id, status),
            End::Back => unreachable!("given back above"),
        }
        self.place(&claim.user);
    }

    /// `cancel`, of one job.
    pub fn cancel(&mut self, id: &str) -> Cancel {
        let job = self.jobs.get_mut(id).expect("a job");
        if let Some(claim) = self.claims.get(id) {
            job.cancel_requested = true;
            self.sessions.get_mut(&claim.session).expect("a session").cancels.insert(id.to_owned());
            return Cancel::Requested;
        }
        if let Some(status) = job.final_status() {
            return Cancel::Over(status.to_owned());
        }
        job.cancel_requested = true;
        if job.trace {
            return Cancel::Requested;
        }
        let user = job.owner.clone();
        self.queues.entry(user.clone()).or_default().retain(|other| other != id);
        self.queues.retain(|_, queue| !queue.is_empty());
        self.due.remove(id);
        self.file(id, "cancelled");
        self.place(&user);
        Cancel::Cancelled
    }

    /// `session_open`
    pub fn session_open(&mut self, session: &str) {
        self.sessions.insert(session.to_owned(), Session::default());
    }

    /// `session_end`: how many jobs are given back or, where their worker was lost once too often, set aside.
    pub fn session_end(&mut self, session: &str, lost: bool) -> u64 {
        let mut ids: Vec<String> = self.taken_of(session);
        // The one taken last goes back first.
        ids.sort_by_key(|id| std::cmp::Reverse(self.jobs[id].fence));
        for id in &ids {
            if lost {
                let job = self.jobs.get_mut(id).expect("a job");
                job.unclean += 1;
                if job.unclean >= UNCLEAN_MAX {
                    let status = if job.trace { "unknown" } else { "ignored" };
                    let claim = self.release(id);
                    self.file(id, status);
                    self.place(&claim.user);
                    continue;
                }
            } else {
                self.recharge(&self.claims[id].clone());
            }
            self.give_back(id);
        }
        self.sessions.remove(session);
        ids.len() as u64
    }

    fn taken_of(&self, session: &str) -> Vec<String> {
        self.claims.iter().filter(|(_, claim)| claim.session == session).map(|(id, _)| id.clone()).collect()
    }

    /// `promote_and_expire`: how many of the ids without a hash have theirs by now. `missed` names them, the latest first; `tags` as
    /// in [`Reference::notice`].
    pub fn upkeep(
        &mut self,
        due: &[String],
        missed: &[(String, String)],
        tags: &BTreeMap<(String, String), i64>,
    ) -> u64 {
        self.promote_due(due);
        let (mut found, mut users) = (0, BTreeSet::new());
        for (id, user) in missed {
            if self.jobs.contains_key(id) {
                assert!(self.missing.remove(&(id.clone(), user.clone())), "{id} is missed");
                self.put_first(id, user);
                users.insert(user.clone());
                found += 1;
            }
        }
        self.place_all(&users, tags);
        found
    }
}

/// What a pool has to give.
enum One {
    Taken((String, String, String)),
    Nothing,
    /// Jobs that this session may not run beside the one it has.
    SuspectsOnly,
}
