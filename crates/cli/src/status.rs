//! `drayman status`: everything about a job, but for its connection, and its SQL unless asked for.

use console::{Common, Failure, Out, complain, one_line, plain, span};
use queue_core::batch::Batches;
use queue_core::inspect::{Inspect, JobView, Kind, StatementView};
use serde_json::{Map, Value, json};

use crate::batch;
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
    ("part", "part"),
    ("timeout", "timeout, ms"),
    ("deadline", "deadline, ms"),
    ("priority", "priority"),
    ("unique", "unique key"),
    ("unique_scope", "its scope"),
];

/// So much of a result is shown. `drayman result` writes all of it.
const RESULT_SHOWN_BYTES: usize = 4_096;

/// Shows jobs.
pub async fn run(common: &Common, args: StatusArgs) -> Result<u8, Failure> {
    let (config, store) = common.connect().await?;
    let batches = Batches::new(store.clone(), config.limits);
    let inspect = Inspect::new(store);
    let mut out = Out::default();
    let mut code = console::OK;
    for (position, id) in args.ids.iter().enumerate() {
        let Some(view) = inspect.job(id).await? else {
            complain(not_found(id));
            code = console::NOT_FOUND;
            continue;
        };
        if position > 0 && !common.json {
            out.line("");
        }
        if view.kind() == Kind::Batch {
            batch::show_by_id(&batches, id, common.json, &mut out).await?;
        } else if common.json {
            out.json(&as_json(&view, args.show_query));
        } else {
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
    object.insert("kind".into(), view.kind().as_str().into());
    object.insert("user".into(), view.user().into());
    object.insert("pool".into(), view.pool().into());
    object.insert("status".into(), view.status().into());
    for (field, _) in SHOWN {
        if let Some(text) = view.text(field) {
            object.insert((*field).into(), text.into());
        }
    }
    let tags = view.tags();
    if !tags.is_empty() {
        object.insert("tags".into(), json!(tags));
    }
    if let Some((app, op)) = view.handler().filter(|_| view.is_task()) {
        object.insert("app".into(), app.into());
        object.insert("op".into(), op.into());
        object.insert("progress".into(), json!(view.progress()));
        object.insert("messages".into(), json!(view.messages()));
        object.insert("files".into(), json!(view.files()));
        object.insert("log".into(), json!(view.log()));
        object.insert("result".into(), result_json(view));
    } else if view.kind() == Kind::Sql {
        object.insert("statements".into(), json!(statements(view, show_query)));
    }
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
    if view.is_task() {
        task_lines(view, out);
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

/// What a task has told and handed back.
fn task_lines(view: &JobView, out: &mut Out) {
    let mut line = |name: &str, text: &str| out.line(format_args!("{name:<14}{}", one_line(text)));
    let tags = view.tags();
    if !tags.is_empty() {
        line("tags", &tags.join(", "));
    }
    if let Some(progress) = view.progress() {
        let total = progress.total.map(|total| format!(" of {total}")).unwrap_or_default();
        let note = progress.note.map(|note| format!(", {note}")).unwrap_or_default();
        line("progress", &format!("{}{total}{note}", progress.done));
    }
    for message in view.messages() {
        let field = message.field.map(|field| format!(" {field}")).unwrap_or_default();
        line("message", &format!("{} {}{field} {}", message.msgid, message.errcode, message.vals.join(", ")));
    }
    for (name, file) in view.files() {
        line("file", &format!("{name}, {} bytes", file.bytes));
    }
    if let Some(object) = view.result_object() {
        let bytes = view.text("result_bytes").unwrap_or_else(|| "?".into());
        line("result", &format!("{bytes} bytes, {object} in the object store"));
    } else if let Some(payload) = view.result() {
        match payload.read::<Value>() {
            Ok(value) => line("result", &cut(value.to_string())),
            Err(_) => line("result", &format!("{} bytes of {}", payload.bytes.len(), payload.encoding)),
        }
    }
    for told in view.log() {
        line("log", &told);
    }
}

/// A result as JSON, if it is small; else what there is to say of it.
fn result_json(view: &JobView) -> Value {
    if let Some(object) = view.result_object() {
        return json!({ "object": object, "bytes": view.text("result_bytes"), "encoding": view.text("result_encoding") });
    }
    let Some(payload) = view.result() else { return Value::Null };
    let (bytes, encoding) = (payload.bytes.len(), payload.encoding);
    match payload.read::<Value>() {
        Ok(value) if bytes <= RESULT_SHOWN_BYTES => json!({ "value": value, "bytes": bytes, "encoding": encoding }),
        _ => json!({ "bytes": bytes, "encoding": encoding }),
    }
}

fn cut(mut text: String) -> String {
    if text.len() > RESULT_SHOWN_BYTES {
        text.truncate(text.floor_char_boundary(RESULT_SHOWN_BYTES));
        text.push('…');
    }
    text
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
