//! `drayman list`: jobs as a table, the ids that were set aside, and what waits for pools that nobody serves.

use std::time::Duration;

use comfy_table::Table;
use comfy_table::presets::NOTHING;
use console::{Common, Failure, Out, complain, iso, one_line, span};
use queue_core::Store;
use queue_core::inspect::{Filter, Inspect, JobView, Rejected};
use queue_core::overview::{self, UnservedLine};
use serde_json::json;

use crate::cli::List;

/// At least as many as the list of rejected ids holds.
const REJECTED_MAX: usize = 20_000;

/// Lists jobs.
pub async fn run(common: &Common, args: List) -> Result<u8, Failure> {
    let (_, store) = common.connect().await?;
    let mut out = Out::default();
    if args.unserved {
        unserved(&store, &args, common.json, &mut out).await?;
        return Ok(console::OK);
    }
    let inspect = Inspect::new(store);
    if args.rejected {
        rejected(&inspect, &args, common.json, &mut out).await?;
        return Ok(console::OK);
    }
    let now_ms = inspect.now_ms().await?;
    let filter = Filter {
        user: args.user,
        pool: args.pool.map(String::from),
        status: args.status,
        app: args.app,
        op: args.op,
        tag: args.tag,
        ..Filter::default()
    };
    let mut views = inspect.list(&filter, args.limit.saturating_add(1)).await?;
    let more = views.len() > args.limit;
    views.truncate(args.limit);
    if common.json {
        for view in &views {
            out.json(&json!({
                "id": view.id,
                "kind": view.kind(),
                "user": view.user(),
                "pool": view.pool(),
                "status": view.status(),
                "tags": view.tags(),
                "fallback_status": view.text("fallback_status"),
                "created_at": view.text("created_at"),
                "started_at": view.text("started_at"),
                "ended_at": view.text("ended_at"),
                "waited_ms": view.waited(now_ms).map(|time| time.as_millis() as u64),
                "ran_ms": view.ran(now_ms).map(|time| time.as_millis() as u64),
            }));
        }
    } else {
        let mut table = table(&["ID", "KIND", "USER", "POOL", "STATUS", "WAITED", "RAN"]);
        for view in &views {
            let times = [view.waited(now_ms), view.ran(now_ms)].map(|time| time.map_or("-".into(), span));
            let [waited, ran] = times;
            table.add_row(
                [view.id.clone(), view.kind().as_str().to_owned(), view.user(), view.pool(), status(view), waited, ran]
                    .map(|cell| one_line(&cell)),
            );
        }
        show(&table, &mut out);
    }
    if more {
        complain(format_args!("there are more than {}: see --limit", args.limit));
    }
    Ok(console::OK)
}

/// A status that is decided while a fallback is still to run says so.
fn status(view: &JobView) -> String {
    match view.text("fallback_status") {
        Some(fallback) if !view.is_over() && view.stand().to_string() != view.status() => {
            format!("{}, fallback {fallback}", view.status())
        }
        _ => view.status(),
    }
}

async fn rejected(inspect: &Inspect, args: &List, json: bool, out: &mut Out) -> Result<(), Failure> {
    let look = if args.user.is_some() { REJECTED_MAX } else { args.limit };
    let entries = inspect.rejected(look).await?;
    let wanted = |entry: &&Rejected| args.user.as_ref().is_none_or(|user| *user == entry.user);
    let entries = entries.iter().filter(wanted).take(args.limit);
    if json {
        for entry in entries {
            out.json(&json!({ "at": iso(entry.at_ms), "id": entry.id, "user": entry.user, "reason": entry.reason }));
        }
        return Ok(());
    }
    let mut table = table(&["AT", "ID", "USER", "REASON"]);
    for entry in entries {
        table.add_row([iso(entry.at_ms), one_line(&entry.id), one_line(&entry.user), one_line(&entry.reason)]);
    }
    show(&table, out);
    Ok(())
}

async fn unserved(store: &Store, args: &List, json: bool, out: &mut Out) -> Result<(), Failure> {
    let lines = overview::unserved(store).await?;
    let wanted = |line: &&UnservedLine| {
        args.user.as_ref().is_none_or(|user| *user == line.user)
            && args.pool.as_ref().is_none_or(|pool| pool.as_str() == line.pool)
    };
    let mut lines = lines.iter().filter(wanted);
    let mut table = table(&["POOL", "USER", "JOBS", "OLDEST"]);
    for line in lines.by_ref().take(args.limit) {
        if json {
            out.json(&json!(line));
        }
        let oldest = line.oldest_waited_ms.map_or("-".into(), |ms| span(Duration::from_millis(ms)));
        table.add_row([one_line(&line.pool), one_line(&line.user), line.jobs.to_string(), oldest]);
    }
    if !json {
        show(&table, out);
    }
    if lines.next().is_some() {
        complain(format_args!("there are more than {}: see --limit", args.limit));
    }
    Ok(())
}

/// A table without frames. Programs are better served by `--json`.
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(header.iter().copied());
    table
}

/// Writes a table.
pub fn show(table: &Table, out: &mut Out) {
    for line in table.lines() {
        out.line(line.trim_end());
    }
}
