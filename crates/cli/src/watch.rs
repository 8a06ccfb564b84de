//! `drayman watch`: the moves of jobs as they happen.

use std::time::{Duration, SystemTime};

use console::{Common, Failure, Out, complain, one_line};
use queue_core::Store;
use queue_core::events::{Event, Events};
use queue_core::follow::Move;
use queue_core::inspect::Inspect;
use serde_json::json;

use crate::cli::Watch;
use crate::follow::{self, follow};

/// How often the connection is tried that brings nothing but events.
const PROBE: Duration = Duration::from_secs(5);

/// Shows moves, and says by its exit code how the jobs ended.
pub async fn run(common: &Common, args: Watch) -> Result<u8, Failure> {
    let (_, store) = common.connect().await?;
    let mut out = Out::default();
    if args.ids.is_empty() {
        return endless(&store, args.user.as_deref(), &mut out, common.json).await;
    }
    let ended = follow(&store, args.ids, None, |movement| show(&mut out, common.json, movement)).await?;
    Ok(ended.code())
}

/// Shows one move; also what `submit --wait` shows.
pub fn show(out: &mut Out, json: bool, movement: &Move) {
    match movement {
        Move::To { id, user, status } => show_status(out, json, id, user, status),
        Move::Over { told: true, .. } => {}
        Move::Over { view, told: false } => show_status(out, json, &view.id, &view.user(), &view.status()),
        Move::Gone(id) => complain(not_found(id)),
    }
}

fn show_status(out: &mut Out, json: bool, id: &str, user: &str, status: &str) {
    let at = humantime::format_rfc3339_millis(SystemTime::now());
    if json {
        out.json(&json!({ "at": at.to_string(), "id": id, "user": user, "status": status }));
    } else {
        out.line(format_args!("{at}  {}  {}  {}", one_line(id), one_line(user), one_line(status)));
    }
}

/// The words for an id without a job.
pub fn not_found(id: &str) -> String {
    format!("Job with id {} not found", one_line(id))
}

async fn endless(store: &Store, user: Option<&str>, out: &mut Out, json: bool) -> Result<u8, Failure> {
    let inspect = Inspect::new(store.clone());
    let mut events = Events::listen(store, user.as_slice()).await?;
    let mut away_since = None;
    let mut probe = tokio::time::interval(PROBE);
    while !out.is_gone() {
        tokio::select! {
            event = events.next() => {
                let Some(event) = event else { return Err(Failure::new(console::UNREACHABLE, "the connection was closed")) };
                let Event { user, id, status } = event;
                show_status(out, json, &id, &user, &status);
            }
            _ = probe.tick() => match inspect.now_ms().await {
                Ok(_) => away_since = None,
                Err(error) => follow::away(&error, &mut away_since)?,
            },
        }
    }
    Ok(console::OK)
}
