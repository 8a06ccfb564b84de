//! Black box: what is compared may not change while the core is rebuilt.
//!
//! Recorded outcomes of the system whose SQL jobs these are, replayed without a database.

use queue_core::model::Status;
use queue_core::model::sql::{SqlJob, Verdict};
use serde_json::{Map, Value, json};

#[test]
fn every_recorded_outcome_is_ours() {
    let recorded: Value = serde_json::from_str(include_str!("conformance/job-outcomes.json")).unwrap();
    let cases = recorded["cases"].as_array().unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        let (executed, ended) = replay(case);
        assert_eq!(json!(executed), case["executed"], "{case}");
        assert_eq!(ended, case["final"], "{case}");
    }
}

/// Runs one case as workers would: each turn starts from what the turn before has saved.
fn replay(case: &Value) -> (Vec<String>, Value) {
    let text = |query: &Value| query.as_str().map_or_else(|| query.to_string(), str::to_owned);
    let mut job = SqlJob::parse(&text(&case["query"]), Status::Pending, None, None, None, None).unwrap();
    let mut executed = Vec::new();
    while let Some(statement) = job.next() {
        let sql = match statement.templated {
            true => fill(statement.sql, statement.error_message),
            false => statement.sql.to_owned(),
        };
        let verdict = if case["cancel_during_execution"] == executed.len() {
            Verdict::Cancelled
        } else if let Some(table) = sql.split_whitespace().find(|word| word.starts_with("missing_")) {
            Verdict::Failed(format!("relation \"{table}\" does not exist"))
        } else {
            Verdict::Done
        };
        executed.push(sql);
        job.start("2026-11-23T00:00:00.000Z").unwrap();
        job.finish(verdict, "2026-11-23T00:00:01.000Z").unwrap();
        job = SqlJob::parse(&job.query_text(), job.status(), job.fallback_status(), None, None, job.failed_reason())
            .unwrap();
    }
    assert!(job.is_over(), "{case}");
    (executed, fields(&job))
}

fn fill(sql: &str, error_message: Option<&str>) -> String {
    sql.replace("<%= job_id %>", "JOB").replace("<%= error_message %>", error_message.unwrap_or_default())
}

/// The fields of the hash as the recording has them.
fn fields(job: &SqlJob) -> Value {
    let mut fields = Map::new();
    fields.insert("status".into(), job.status().as_str().into());
    if let Some(status) = job.fallback_status() {
        fields.insert("fallback_status".into(), status.as_str().into());
    }
    if let Some(reason) = job.failed_reason() {
        fields.insert("failed_reason".into(), reason.into());
    }
    let text = job.query_text();
    let mut query = serde_json::from_str(&text).unwrap_or(Value::String(text));
    if let Some(entries) = query.get_mut("query").and_then(Value::as_array_mut) {
        for entry in entries {
            entry.as_object_mut().unwrap().retain(|name, _| name != "started_at" && name != "ended_at");
        }
    }
    fields.insert("query".into(), query);
    fields.into()
}
