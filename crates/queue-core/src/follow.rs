//! Following jobs until they are over. Events make it quick, looks at the hashes make it right.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::events::{Event, Events, Heard};
use crate::inspect::{Inspect, JobView};
use crate::model::Status;
use crate::store::Store;

/// The pause before jobs are looked at again of which no event tells. It doubles while nothing moves.
const PAUSE_MIN: Duration = Duration::from_millis(500);
/// The longest such pause: so late is a move seen at worst, whose event got lost.
const PAUSE_MAX: Duration = Duration::from_secs(4);

/// A job that is followed has moved.
#[derive(Debug)]
pub enum Move {
    /// It has this status now, and is not over.
    To {
        /// Which job.
        id: String,
        /// Whose.
        user: String,
        /// Its status.
        status: String,
    },
    /// It is over.
    Over {
        /// The job as it has ended.
        view: Box<JobView>,
        /// Its last status was told before.
        told: bool,
    },
    /// There is no such job, or none any more.
    Gone(String),
}

/// Some jobs that are followed.
#[derive(Debug)]
pub struct Follow {
    store: Store,
    inspect: Inspect,
    /// Each job that is not over, with the status that was told last.
    open: HashMap<String, Option<String>>,
    /// Those to look at without waiting.
    hinted: HashSet<String>,
    /// Moves that were seen and are still to be told.
    seen: VecDeque<Move>,
    ears: Ears,
    pause: Duration,
    next_look: Instant,
}

#[derive(Debug)]
enum Ears {
    /// Whose events to listen to, the first look tells.
    ToOpen,
    Open(Events),
    /// Without events everything is seen all the same, a little later.
    Closed,
}

impl Follow {
    /// Starts to follow jobs.
    pub fn of(store: Store, ids: impl IntoIterator<Item = String>) -> Self {
        let open: HashMap<String, Option<String>> = ids.into_iter().map(|id| (id, None)).collect();
        Self {
            inspect: Inspect::new(store.clone()),
            store,
            hinted: open.keys().cloned().collect(),
            open,
            seen: VecDeque::new(),
            ears: Ears::ToOpen,
            pause: PAUSE_MIN,
            next_look: Instant::now(),
        }
    }

    /// How many jobs are not over, as far as was told.
    pub fn open(&self) -> usize {
        self.open.len() + self.seen.iter().filter(|seen| !matches!(seen, Move::To { .. })).count()
    }

    /// The next move; `None` when all are over. A job that comes and goes between two looks and whose events got lost shows
    /// its end only. After an error that is transient it may be called again, and goes on after a pause; so it does when
    /// a call was dropped before it returned.
    pub async fn next(&mut self) -> Result<Option<Move>, Error> {
        loop {
            if let Some(seen) = self.seen.pop_front() {
                return Ok(Some(seen));
            }
            if self.open.is_empty() {
                return Ok(None);
            }
            if self.hinted.is_empty() {
                self.listen().await;
                continue;
            }
            tokio::time::sleep_until(self.next_look.into()).await;
            self.look().await?;
        }
    }

    /// Looks at the jobs that are hinted at.
    async fn look(&mut self) -> Result<(), Error> {
        let ids: Vec<String> = self.hinted.iter().cloned().collect();
        let names: Vec<&str> = ids.iter().map(String::as_str).collect();
        let looked = self.inspect.brief(&names).await;
        let views = looked.inspect_err(|_| self.next_look = Instant::now() + PAUSE_MIN)?;
        if matches!(self.ears, Ears::ToOpen) {
            let users: HashSet<String> = views.iter().flatten().map(JobView::user).collect();
            let users: Vec<&str> = users.iter().map(String::as_str).collect();
            self.ears = match users.is_empty() {
                true => Ears::Closed,
                false => Events::listen(&self.store, &users).await.map_or(Ears::Closed, Ears::Open),
            };
            // Another look at once, for what has moved since this one and was said before we listened.
            self.pause = Duration::ZERO;
        }
        self.hinted.clear();
        for (id, view) in ids.into_iter().zip(views) {
            self.settle(id, view);
        }
        Ok(())
    }

    fn settle(&mut self, id: String, view: Option<JobView>) {
        let Some(view) = view else {
            self.open.remove(&id);
            return self.seen.push_back(Move::Gone(id));
        };
        let status = view.status();
        if view.is_over() {
            let told = self.open.remove(&id).flatten().as_ref() == Some(&status);
            return self.seen.push_back(Move::Over { view: Box::new(view), told });
        }
        if self.open.insert(id.clone(), Some(status.clone())).flatten().as_ref() != Some(&status) {
            self.seen.push_back(Move::To { id, user: view.user(), status });
        }
    }

    /// Waits for an event, or for the time to look at all again.
    async fn listen(&mut self) {
        let look_at = Instant::now() + self.pause;
        let heard = tokio::select! {
            // What was heard first, so that a look does not overtake it.
            biased;
            heard = self.ears.hear() => heard,
            () = tokio::time::sleep_until(look_at.into()) => {
                self.pause = (self.pause * 2).clamp(PAUSE_MIN, PAUSE_MAX);
                Heard::Gap
            }
        };
        self.next_look = Instant::now();
        match heard {
            Heard::Gap => self.hinted.extend(self.open.keys().cloned()),
            // What a job has been through between two looks is told from the events; how it ended, from its hash.
            Heard::Move(Event { user, id, status }) => {
                let Some(told) = self.open.get_mut(&id) else { return };
                self.pause = PAUSE_MIN;
                if status.parse().is_ok_and(Status::is_final) {
                    self.hinted.insert(id);
                } else if told.as_deref() != Some(&status) {
                    *told = Some(status.clone());
                    self.seen.push_back(Move::To { id, user, status });
                }
            }
        }
    }
}

impl Ears {
    async fn hear(&mut self) -> Heard {
        if let Ears::Open(events) = self {
            if let Some(heard) = events.hear().await {
                return heard;
            }
            *self = Ears::Closed;
        }
        std::future::pending().await
    }
}
