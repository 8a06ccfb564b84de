//! `drayman status`: everything about a job, but for its connection, and its SQL unless asked for.

use console::{Common, Failure, Out, complain, one_line, plain, span};
use queue_core::inspect::{Inspect, JobView, StatementView};
use serde_json::{Map, Value, json};

use crate::cli::StatusArgs;
use crate::watch::not_found;

/// Fields that are shown as they are, with what a person calls them.
const SHOWN: &[(&str, &str)] = &[
    ("fallback_status", "fallback"),
    ("failed_reason", "reason"),
    ("created_at", "submitted"),
    ("started_at", "started"),
    ("ended_at", "ended"),
    ("updated_at", "updated"),
    ("cancel_requested_at", "cancel asked"),
    ("worker", "worker"),
    ("attempts", "attempts"),
    ("unclean", "unclean ends"),
    ("max_attempts", "max attempts"),
    ("run", "run"),
    ("timeout", "timeout, ms"),
];

/// Shows jobs.
pub async fn run(common: &Common, args: StatusArgs) -> Result<u8, Failure> {
    let (_, store) = common.connect().await?;
    let inspect = Inspect::new(store);
    let mut out = Out::default();
    let mut code = console::OK;
    for (position, id) in args.ids.iter().enumerate() {
        let Some(view) = inspect.job(id).await? else {
            complain(not_found(id));
            code = console::NOT_FOUND;
            continue;
        };
        if common.json {
            out.json(&as_json(&view, args.show_query));
        } else {
            if position > 0 {
                out.line("");
            }
            as_text(&view, args.show_query, inspect.now_ms().await?, &mut out);
        }
    }
    Ok(code)
}

fn statements(view: &JobView, show_query: bool) -> Vec<StatementView> {
    let all = view.statements();
    if show_query { all } else { all.into_iter().map(StatementView::without_sql).collect() }
}

fn as_json(view: &JobView, show_query: bool) -> Value {
    let mut object = Map::new();
    object.insert("id".into(), view.id.clone().into());
    object.insert("user".into(), view.user().into());
    object.insert("pool".into(), view.pool().into());
    object.insert("status".into(), view.status().into());
    for (field, _) in SHOWN {
        if let Some(text) = view.text(field) {
            object.insert((*field).into(), text.into());
        }
    }
    object.insert("statements".into(), json!(statements(view, show_query)));
    if let Some(results) = view.results() {
        object.insert("results".into(), results);
    }
    let history = view.history();
    if !history.is_empty() {
        object.insert("history".into(), json!(history));
    }
    if !view.too_large.is_empty() {
        let sizes: Map<String, Value> =
            view.too_large.iter().map(|(field, bytes)| ((*field).to_owned(), (*bytes).into())).collect();
        object.insert("too_large_bytes".into(), sizes.into());
    }
    if show_query {
        for field in ["query", "onsuccess", "onerror"] {
            if let Some(text) = view.text(field) {
                object.insert(field.into(), text.into());
            }
        }
    }
    object.into()
}

fn as_text(view: &JobView, show_query: bool, now_ms: u64, out: &mut Out) {
    let mut line = |name: &str, text: &str| out.line(format_args!("{name:<14}{}", one_line(text)));
    line("job", &view.id);
    line("user", &view.user());
    line("pool", &view.pool());
    line("status", &view.status());
    for (field, name) in SHOWN {
        if let Some(text) = view.text(field) {
            line(name, &text);
        }
    }
    if let Some(waited) = view.waited(now_ms) {
        line("waited", &span(waited));
    }
    if let Some(ran) = view.ran(now_ms) {
        line("ran", &span(ran));
    }
    for one in view.history() {
        let began = one.started_at.map(|at| format!(" from {at}")).unwrap_or_default();
        let step = one.step.map(|step| format!("statement {step} ")).unwrap_or_default();
        line("tried", &format!("{step}by {}{began} to {}: {}", one.worker, one.ended_at, one.error));
    }
    for (field, bytes) in &view.too_large {
        line(field, &format!("is {bytes} bytes long, too long for a job"));
    }
    if show_query {
        for field in ["onsuccess", "onerror"] {
            if let Some(sql) = view.text(field) {
                line(field, &sql);
            }
        }
    }
    let results = view.results().unwrap_or_default();
    for (position, statement) in statements(view, show_query).iter().enumerate() {
        as_line(position, statement, &results, out);
    }
    for step in ["onsuccess", "onerror"] {
        if let Some(result) = results.get(step) {
            out.line(format_args!("{step:<14}{}", one_line(&result_text(result))));
        }
    }
}

fn as_line(position: usize, statement: &StatementView, results: &Value, out: &mut Out) {
    let mut parts = vec![statement.status.clone().unwrap_or_default()];
    parts.extend(statement.id.iter().map(|id| format!("id {id}")));
    parts.extend(statement.fallback_status.iter().map(|status| format!("fallback {status}")));
    parts.extend(statement.started_at.iter().map(|at| format!("started {at}")));
    parts.extend(statement.ended_at.iter().map(|at| format!("ended {at}")));
    parts.extend(statement.failed_reason.iter().map(|reason| format!("reason: {reason}")));
    out.line(format_args!("{:<14}{}", format!("statement {position}"), one_line(&parts.join(", "))));
    for (name, sql) in [("", &statement.query), ("onsuccess ", &statement.onsuccess), ("onerror ", &statement.onerror)]
    {
        for (at, text) in sql.iter().flat_map(|sql| sql.lines()).enumerate() {
            out.line(format_args!("{:<14}  {}{}", "", if at == 0 { name } else { "" }, plain(text)));
        }
    }
    for (suffix, name) in [("", "result"), (".onsuccess", "onsuccess"), (".onerror", "onerror")] {
        if let Some(result) = results.get(format!("{position}{suffix}")) {
            out.line(format_args!("{:<14}  {name}: {}", "", one_line(&result_text(result))));
        }
    }
}

/// A command tag and what the database had to say besides.
fn result_text(result: &Value) -> String {
    let tag = result.get("tag").and_then(Value::as_str);
    let notices = result.get("notices").and_then(Value::as_array);
    let notices = notices.into_iter().flatten().filter_map(Value::as_str);
    let parts: Vec<&str> = tag.into_iter().chain(notices).collect();
    if parts.is_empty() { "-".into() } else { parts.join("; ") }
}
