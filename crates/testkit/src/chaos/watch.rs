//! What can be seen of the jobs from outside while they run.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::random::Random;
use super::rules;
use super::stage::{Stage, connect};
use super::state::{self, Claim};
use super::workload::Job;
use crate::redis::{RawClient, Value};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(40);
/// Ended jobs that are looked at again with each look.
const SECOND_LOOKS: usize = 10;

/// What makes a record final, and what must not change afterwards: status, fallback_status, ended_at.
pub type Record = [Option<String>; 3];

/// All that is known of one job.
#[derive(Clone, Debug)]
pub struct Life {
    /// Its plan.
    pub job: Job,
    /// When it was acknowledged, if it was.
    pub acknowledged: Option<Instant>,
    /// The claims that were seen: fence, session, when.
    pub claims: Vec<(u64, String, Instant)>,
    /// Its final record and when it was first seen.
    pub ended: Option<(Record, Instant)>,
    /// Somebody was told that it is cancelled.
    pub told_cancelled: bool,
    /// Whatever else happened.
    pub notes: Vec<(Instant, String)>,
}

/// A claim of a worker that was killed, until the job is taken again.
#[derive(Debug)]
struct Orphan {
    fence: u64,
    since: Instant,
}

#[derive(Debug, Default)]
struct State {
    lives: HashMap<String, Life>,
    open: Vec<String>,
    over: Vec<String>,
    orphans: HashMap<String, Orphan>,
    recoveries: Vec<Duration>,
    changed: Vec<String>,
    /// All claims that were ever seen.
    starts: BTreeSet<Claim>,
    /// More at once than may be.
    crowds: BTreeSet<String>,
}

/// The book of all jobs.
#[derive(Debug, Default)]
pub struct Watch {
    state: Mutex<State>,
}

impl Watch {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    /// A job that is about to be handed in.
    pub fn enter(&self, job: &Job) {
        let life = Life {
            job: job.clone(),
            acknowledged: None,
            claims: Vec::new(),
            ended: None,
            told_cancelled: false,
            notes: Vec::new(),
        };
        let mut state = self.state();
        state.lives.insert(job.id.clone(), life);
        state.open.push(job.id.clone());
    }

    /// Changes what is known of a job.
    pub fn with(&self, id: &str, change: impl FnOnce(&mut Life)) {
        if let Some(life) = self.state().lives.get_mut(id) {
            change(life);
        }
    }

    /// Adds to a job's history.
    pub fn note(&self, id: &str, text: impl Into<String>) {
        self.with(id, |life| life.notes.push((Instant::now(), text.into())));
    }

    /// How many jobs of a user have not ended.
    pub fn open_of(&self, user: &str) -> usize {
        let state = self.state();
        state.open.iter().filter(|id| state.lives[*id].job.user == user).count()
    }

    /// Jobs that have not ended.
    pub fn open(&self) -> Vec<String> {
        self.state().open.clone()
    }

    /// How many jobs have ended.
    pub fn ended(&self) -> usize {
        self.state().over.len()
    }

    /// All jobs.
    pub fn lives(&self) -> Vec<Life> {
        self.state().lives.values().cloned().collect()
    }

    /// Final records that changed: ids with what they were and became.
    pub fn changed(&self) -> Vec<String> {
        self.state().changed.clone()
    }

    /// All claims that were seen, and where there were more at once than may be.
    pub fn starts_and_crowds(&self) -> (Vec<Claim>, Vec<String>) {
        let state = self.state();
        (state.starts.iter().cloned().collect(), state.crowds.iter().cloned().collect())
    }

    /// A job that was refused: it is none.
    pub fn forget(&self, id: &str) {
        let mut state = self.state();
        state.lives.remove(id);
        state.open.retain(|open| open != id);
    }

    /// How long it took until jobs of killed workers were taken again.
    pub fn recoveries(&self) -> Vec<Duration> {
        self.state().recoveries.clone()
    }

    /// The job that was seen to be taken most often since then, and how often.
    pub fn most_taken_since(&self, when: Instant) -> Option<(String, usize)> {
        let state = self.state();
        let takes = |life: &Life| life.claims.iter().filter(|(_, _, at)| *at > when).count();
        state.lives.iter().map(|(id, life)| (id.clone(), takes(life))).max_by_key(|(_, takes)| *takes)
    }

    /// A worker was killed: what it had claimed waits to be taken again.
    pub fn killed(&self, name: &str, when: Instant) {
        let mut state = self.state();
        let claimed = |id: &String| {
            let (fence, session, _) = state.lives[id].claims.last()?;
            (session.split(':').next() == Some(name)).then(|| (id.clone(), *fence))
        };
        let lost: Vec<_> = state.open.iter().filter_map(claimed).collect();
        for (id, fence) in lost {
            state.orphans.entry(id).or_insert(Orphan { fence, since: when });
        }
    }

    /// Looks until `done` says so. A server that does not answer is asked again.
    pub fn run(&self, stage: &Stage, seed: u64, done: impl Fn() -> bool) {
        let mut random = Random::of(seed, &[3]);
        let mut redis = None;
        while !done() {
            let looked = match &mut redis {
                Some(redis) => self.look(redis, &mut random),
                None => connect(&stage.redis).map(|client| redis = Some(client)),
            };
            if looked.is_err() {
                redis = None;
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn look(&self, redis: &mut RawClient, random: &mut Random) -> io::Result<()> {
        let claims = state::claims(redis)?;
        let seen = Instant::now();
        {
            let mut state = self.state();
            state.crowds.extend(rules::crowds(&claims));
            state.starts.extend(claims.iter().cloned());
            for Claim { job: id, session, fence, .. } in claims {
                if let Some(orphan) = state.orphans.remove(&id) {
                    if fence > orphan.fence {
                        state.recoveries.push(seen - orphan.since);
                    } else {
                        state.orphans.insert(id.clone(), orphan);
                    }
                }
                if let Some(life) = state.lives.get_mut(&id)
                    && life.claims.last().is_none_or(|(last, _, _)| *last < fence)
                {
                    life.claims.push((fence, session, seen));
                }
            }
        }
        let mut ids = self.open();
        {
            let state = self.state();
            let many = state.over.len() as u64;
            ids.extend(
                (0..SECOND_LOOKS.min(state.over.len())).map(|_| state.over[random.between(0, many) as usize].clone()),
            );
        }
        for page in ids.chunks(100) {
            self.read(redis, page)?;
        }
        Ok(())
    }

    /// Looks at the records of these jobs now.
    pub fn read(&self, redis: &mut RawClient, ids: &[String]) -> io::Result<()> {
        for id in ids {
            redis.send(&["HMGET", &state::job(id), "status", "fallback_status", "ended_at"])?;
        }
        for id in ids {
            let values = match redis.receive()? {
                Value::Array(values) => values,
                Value::Error(text) => return Err(io::Error::other(text)),
                other => panic!("HMGET gave {other}"),
            };
            let record: Record = std::array::from_fn(|at| (!values[at].is_nil()).then(|| values[at].text()));
            self.seen(id, record);
        }
        Ok(())
    }

    fn seen(&self, id: &str, record: Record) {
        let mut state = self.state();
        let over = is_over(&record);
        let Some(life) = state.lives.get_mut(id) else { return };
        match &life.ended {
            // Whoever cancels by plain commands does not say when it ended, nor that nothing runs in its stead.
            Some(([status, _, None], at)) if *status == record[0] => {
                life.ended = Some((record, *at));
            }
            Some((earlier, at)) if *earlier != record => {
                let text =
                    format!("{id}: {earlier:?}, seen {:.1} s ago, is now {record:?}", at.elapsed().as_secs_f64());
                if !state.changed.contains(&text) && state.changed.len() < 20 {
                    state.changed.push(text);
                }
            }
            Some(_) => {}
            None if over => {
                life.ended = Some((record, Instant::now()));
                state.open.retain(|open| open != id);
                state.over.push(id.into());
                // It was cancelled before anybody took it again.
                state.orphans.remove(id);
            }
            None => {}
        }
    }
}

/// Nothing more of the job will run.
fn is_over([status, fallback, _]: &Record) -> bool {
    let Some(status) = status.as_deref() else { return false };
    let ends = ["done", "failed", "cancelled", "ignored", "unknown"].contains(&status);
    ends && (status == "cancelled" || !matches!(fallback.as_deref(), Some("pending" | "running")))
}
