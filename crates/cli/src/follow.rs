//! Following jobs until they are over. Events make it quick, polling makes it right.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use console::{Failure, complain};
use queue_core::events::Events;
use queue_core::inspect::{Inspect, JobView};
use queue_core::{Error, Store};

use crate::cli::{FAILED, NOT_OVER};

/// How often jobs are looked at that no event told of.
const POLL: Duration = Duration::from_secs(1);

/// How long Redis may be away before following is given up.
const AWAY_MAX: Duration = Duration::from_secs(60);

/// A job that is followed has moved.
#[derive(Debug)]
pub enum Move {
    /// It has this status now.
    To {
        /// Which job.
        id: String,
        /// Whose.
        user: String,
        /// Its status.
        status: String,
    },
    /// There is no such job, or none any more.
    Gone(String),
}

/// How the following ended.
#[derive(Debug, Default)]
pub struct Ended {
    /// Jobs that ended otherwise than done.
    pub not_done: usize,
    /// Ids without a job.
    pub gone: usize,
    /// Jobs that were not over in time.
    pub open: usize,
}

impl Ended {
    /// The exit code that says so.
    pub fn code(&self) -> u8 {
        match self {
            Ended { gone: 1.., .. } => console::NOT_FOUND,
            Ended { not_done: 1.., .. } => FAILED,
            Ended { open: 1.., .. } => NOT_OVER,
            _ => console::OK,
        }
    }
}

/// Follows jobs until all are over or the time is, and tells of each move. A job that comes and goes between two looks and
/// whose events got lost shows its latest status only.
pub async fn follow(
    store: &Store,
    ids: impl IntoIterator<Item = String>,
    limit: Option<Duration>,
    mut tell: impl FnMut(Move),
) -> Result<Ended, Failure> {
    let inspect = Inspect::new(store.clone());
    let deadline = limit.map(|limit| Instant::now() + limit);
    // Each open job with the status that was told last.
    let mut open: HashMap<String, Option<String>> = ids.into_iter().map(|id| (id, None)).collect();
    let mut ended = Ended::default();
    let mut events = None;
    let mut hinted: HashSet<String> = open.keys().cloned().collect();
    let mut next_poll = Instant::now() + POLL;
    let mut away_since: Option<Instant> = None;

    loop {
        let names: Vec<&str> = hinted.iter().map(String::as_str).collect();
        match inspect.brief(&names).await {
            Ok(views) => {
                if events.is_none() {
                    // Without events everything is seen all the same, a little later.
                    let users: HashSet<String> = views.iter().flatten().map(JobView::user).collect();
                    let users: Vec<&str> = users.iter().map(String::as_str).collect();
                    events = Some(if users.is_empty() { None } else { Events::listen(store, &users).await.ok() });
                    // What has moved since that look and was said before we listened.
                    next_poll = Instant::now();
                }
                for (id, view) in hinted.drain().zip(views) {
                    settle(&mut open, &mut ended, id, view, &mut tell);
                }
                away_since = None;
            }
            Err(error) => away(&error, &mut away_since)?,
        }
        if open.is_empty() {
            return Ok(ended);
        }
        while hinted.is_empty() {
            let wake = deadline.map_or(next_poll, |deadline| deadline.min(next_poll));
            let heard = tokio::select! {
                // What was heard first, so that a look does not overtake it.
                biased;
                event = next_event(&mut events) => Some(event),
                () = tokio::time::sleep_until(wake.into()) => None,
            };
            if let Some(event) = heard {
                // What a job has been through between two looks is told from the events; how it ended, from its hash.
                let Some(told) = open.get_mut(&event.id) else { continue };
                let ends = event.status.parse().is_ok_and(queue_core::model::Status::is_final);
                if ends {
                    hinted.insert(event.id);
                } else if told.as_deref() != Some(&event.status) {
                    *told = Some(event.status.clone());
                    tell(Move::To { id: event.id, user: event.user, status: event.status });
                }
            } else if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                ended.open = open.len();
                return Ok(ended);
            } else {
                hinted.extend(open.keys().cloned());
                next_poll = Instant::now() + POLL;
            }
        }
    }
}

fn settle(
    open: &mut HashMap<String, Option<String>>,
    ended: &mut Ended,
    id: String,
    view: Option<JobView>,
    tell: &mut impl FnMut(Move),
) {
    let Some(view) = view else {
        open.remove(&id);
        ended.gone += 1;
        return tell(Move::Gone(id));
    };
    let status = view.status();
    let over = view.is_over();
    if over {
        ended.not_done += usize::from(!matches!(status.as_str(), "done" | "ignored"));
    }
    let told = if over { open.remove(&id).flatten() } else { open.insert(id.clone(), Some(status.clone())).flatten() };
    if told.as_ref() != Some(&status) {
        tell(Move::To { id, user: view.user(), status });
    }
}

async fn next_event(events: &mut Option<Option<Events>>) -> queue_core::events::Event {
    if let Some(Some(listening)) = events {
        if let Some(event) = listening.next().await {
            return event;
        }
        *events = Some(None);
    }
    std::future::pending().await
}

/// A Redis that is away for a moment is waited for; any other error ends the following.
pub fn away(error: &Error, since: &mut Option<Instant>) -> Result<(), Failure> {
    if !error.is_transient() || since.is_some_and(|since| since.elapsed() >= AWAY_MAX) {
        return Err(Failure::new(console::UNREACHABLE, error));
    }
    if since.is_none() {
        complain(format_args!("{error}; still trying"));
        *since = Some(Instant::now());
    }
    Ok(())
}
