//! `drayman track`: the books of jobs that an application runs itself.

use console::{Common, Failure, Out, complain, iso, one_line};
use queue_core::model::track::{DataError, Record};
use queue_core::tracker::{NewRecord, Order, TrackError, Tracker};
use serde_json::json;

use crate::cli::REFUSED;
use crate::list::{show as show_table, table};
use args::{Add, Command, List, New, Reset, Show, Track};

pub mod args;
mod run;

/// Does what is asked for.
pub async fn run(common: &Common, track: Track) -> Result<u8, Failure> {
    let connecting = async {
        let (_, store) = common.connect().await?;
        Tracker::new(store, &track.tracker).map_err(Failure::usage)
    };
    let mut out = Out::default();
    match track.command {
        Command::Add(args) => add(&connecting.await?, args, common.json, &mut out).await,
        Command::Run(args) => run::run(connecting, args).await,
        Command::List(args) => list(&connecting.await?, args, common.json, &mut out).await,
        Command::Show(args) => show(&connecting.await?, args, common.json, &mut out).await,
        Command::Reset(args) => reset(&connecting.await?, args, common.json, &mut out).await,
    }
}

async fn add(tracker: &Tracker, args: Add, json: bool, out: &mut Out) -> Result<u8, Failure> {
    let created = create(tracker, &args.id, &args.new).await?;
    match json {
        true => out.json(&json!({ "id": args.id, "result": if created { "created" } else { "exists" } })),
        false => out.line(one_line(&args.id)),
    }
    Ok(console::OK)
}

/// Creates a record; whether there was none.
async fn create(tracker: &Tracker, id: &str, new: &New) -> Result<bool, Failure> {
    let mut tracker = tracker.clone().codes(new.codes.unwrap_or_default());
    if let Some(keep) = new.keep {
        tracker = tracker.keep(keep);
    }
    let data = match &new.data {
        Some(text) => serde_json::from_str(text).map_err(|_| Failure::usage(DataError::NoObject))?,
        None => serde_json::Map::new(),
    };
    tracker.create(id, NewRecord { data, code: new.code }).await.map_err(|error| failure(id, error))
}

/// What a refused call ends with.
fn failure(id: &str, error: TrackError) -> Failure {
    let code = match error {
        TrackError::Redis(error) => return error.into(),
        TrackError::Id(_) | TrackError::Data(_) => console::USAGE,
        TrackError::NotFound => console::NOT_FOUND,
        _ => REFUSED,
    };
    Failure::new(code, describe(id, &error))
}

/// A refusal as a sentence about a job.
fn describe(id: &str, error: &TrackError) -> String {
    let until = match error {
        TrackError::Locked { until_ms, .. } => format!(" until {}", iso(*until_ms)),
        _ => String::new(),
    };
    format!("{}: {error}{until}", one_line(id))
}

async fn list(tracker: &Tracker, args: List, json: bool, out: &mut Out) -> Result<u8, Failure> {
    let order = if args.newest { Order::Newest } else { Order::Oldest };
    let records = tracker.list(args.status, args.limit.saturating_add(1), order).await;
    let mut records = records.map_err(|error| failure("list", error))?;
    let more = records.len() > args.limit;
    records.truncate(args.limit);
    if json {
        records.iter().for_each(|record| out.json(&json!(record)));
    } else {
        let mut table = table(&["ID", "STATUS", "CODE", "SINCE", "RETRY", "LOCK", "ERROR"]);
        for record in &records {
            let error = record.errors.as_ref().map_or("-", |errors| &errors.error).chars().take(80).collect();
            let (status, code, retry) = (record.status.to_string(), record.code.to_string(), record.retry.to_string());
            let cells = [record.id.clone(), status, code, record.update_at.clone(), retry, lock(record), error];
            table.add_row(cells.map(|cell: String| one_line(&cell)));
        }
        show_table(&table, out);
    }
    if more {
        complain(format_args!("there are more than {}: see --limit", args.limit));
    }
    Ok(console::OK)
}

/// Who holds a job, in short.
fn lock(record: &Record) -> String {
    match &record.lock {
        None => "-".into(),
        Some(lock) if lock.expired => format!("{}, expired {}", lock.holder, iso(lock.until_ms)),
        Some(lock) => format!("{} until {}", lock.holder, iso(lock.until_ms)),
    }
}

async fn show(tracker: &Tracker, args: Show, json: bool, out: &mut Out) -> Result<u8, Failure> {
    let mut code = console::OK;
    for (position, id) in args.ids.iter().enumerate() {
        let Some(record) = tracker.get(id).await.map_err(|error| failure(id, error))? else {
            complain(describe(id, &TrackError::NotFound));
            code = console::NOT_FOUND;
            continue;
        };
        if json {
            out.json(&json!(record));
            continue;
        }
        if position > 0 {
            out.line("");
        }
        as_text(&record, out);
    }
    Ok(code)
}

fn as_text(record: &Record, out: &mut Out) {
    let mut line = |name: &str, text: &str| out.line(format_args!("{name:<14}{}", one_line(text)));
    line("job", &record.id);
    line("status", &format!("{} ({})", record.status, record.code));
    line("created", &record.create_at);
    line("updated", &record.update_at);
    line("lock", &lock(record));
    line("retry", &record.retry.to_string());
    line("data", &record.data.to_string());
    for attempt in &record.history {
        let outcome = match attempt.error.as_deref() {
            None => "succeeded".to_owned(),
            Some(error) => error.to_owned(),
        };
        line("tried", &format!("by {} from {} to {}: {outcome}", attempt.holder, attempt.started_at, attempt.ended_at));
    }
    if let Some(errors) = &record.errors {
        line("last error", &errors.error);
        errors.trace.lines().for_each(|text| line("", text));
    }
}

async fn reset(tracker: &Tracker, args: Reset, json: bool, out: &mut Out) -> Result<u8, Failure> {
    let (mut refused, mut missing) = (false, false);
    for id in &args.ids {
        let error = match tracker.set_status(id, args.to).await {
            Ok(()) => None,
            Err(error @ (TrackError::Redis(_) | TrackError::Id(_))) => return Err(failure(id, error)),
            Err(error) => Some(error),
        };
        missing |= matches!(error, Some(TrackError::NotFound));
        refused |= error.as_ref().is_some_and(|error| !matches!(error, TrackError::NotFound));
        match (json, error) {
            (true, error) => out.json(&json!({
                "id": id,
                "result": if error.is_none() { "set" } else { "refused" },
                "reason": error.map(|error| error.to_string()),
            })),
            (false, None) => out.line(one_line(id)),
            (false, Some(error)) => complain(describe(id, &error)),
        }
    }
    Ok(match (refused, missing) {
        (true, _) => REFUSED,
        (_, true) => console::NOT_FOUND,
        _ => console::OK,
    })
}
