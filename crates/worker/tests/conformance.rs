//! Black box: what is compared may not change while the core is rebuilt.
//!
//! The recorded outcomes of the reference, run through a real worker, Redis and PostgreSQL.

mod support;

use serde_json::{Map, Value, json};
use support::*;

use queue_core::cancel::{Cancelled, Canceller};
use queue_core::inspect::Inspect;
use testkit::Postgres;
use testkit::RedisServer;
use testkit::eventually;

/// What makes the statement that is to be cancelled wait.
const WAIT: &str = "SELECT pg_sleep(600); ";

struct Case {
    id: String,
    query: Value,
    cancel_during: Option<usize>,
    executed: Vec<String>,
    last: Value,
}

fn cases() -> Vec<Case> {
    let text = include_str!("../../queue-core/tests/conformance/job-outcomes.json");
    let recorded: Value = serde_json::from_str(text).expect("the recording is JSON");
    let cases = recorded["cases"].as_array().expect("a list of cases");
    cases
        .iter()
        .enumerate()
        .map(|(position, case)| {
            let executed: Vec<String> = serde_json::from_value(case["executed"].clone()).expect("texts");
            Case {
                id: format!("00000000-0000-4000-8000-{position:012}"),
                query: case["query"].clone(),
                cancel_during: case["cancel_during_execution"].as_u64().map(|k| k as usize),
                executed,
                last: case["final"].clone(),
            }
        })
        .collect()
}

/// The text of the statement that is to be cancelled, as the job has it.
fn waiting(query: &Value, statement: &str) -> Value {
    match query {
        Value::String(text) if text == statement => json!(format!("{WAIT}{text}")),
        Value::Array(list) => list.iter().map(|item| waiting(item, statement)).collect(),
        Value::Object(object) => {
            object.iter().map(|(name, value)| (name.clone(), waiting(value, statement))).collect::<Map<_, _>>().into()
        }
        other => other.clone(),
    }
}

/// What the recording compares: without times, and without what made a statement wait.
fn comparable(value: Value) -> Value {
    match value {
        Value::String(text) => json!(text.replace(WAIT, "")),
        Value::Array(list) => list.into_iter().map(comparable).collect(),
        Value::Object(object) => object
            .into_iter()
            .filter(|(name, _)| name != "started_at" && name != "ended_at")
            .map(|(name, value)| (name, comparable(value)))
            .collect::<Map<_, _>>()
            .into(),
        other => other,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_recorded_job_ends_as_recorded_and_ran_the_recorded_statements() {
    let redis = RedisServer::start();
    let postgres = Postgres::start();
    postgres.create_database("conformance").await;
    // Room for all that wait to be cancelled at once, and one more.
    let mut config = config(&redis);
    config.capacity.default = 16.try_into().unwrap();
    let worker = Running::start(config);
    let store = store(&redis).await;
    let inspect = Inspect::new(store.clone());
    let canceller = Canceller::new(store, PATIENCE);
    let target = Target { postgres: &postgres, dbname: "conformance" };

    let cases = cases();
    assert_eq!(cases.len(), 80);
    for (position, case) in cases.iter().enumerate() {
        let query = match case.cancel_during {
            Some(k) => waiting(&case.query, &case.executed[k]),
            None => case.query.clone(),
        };
        let text = query.as_str().map_or_else(|| query.to_string(), str::to_owned);
        push(&redis, &case.id, &format!("user-{position}"), &text, &target);
    }
    for case in &cases {
        let Some(k) = case.cancel_during else { continue };
        eventually(&format!("statement {k} of {} to run", case.id), async || {
            (postgres.executed(&case.id).await.len() > k).then_some(())
        })
        .await;
        assert_eq!(canceller.cancel(&job_id(&case.id)).await.unwrap(), Cancelled::Requested);
    }
    for case in &cases {
        let view = ended(&inspect, &case.id).await;
        let query = view.text("query").expect("a query");
        let mut last = json!({
            "status": view.status(),
            "query": if case.query.is_string() { json!(query) } else { serde_json::from_str(&query).expect("JSON") },
        });
        for field in ["failed_reason", "fallback_status"] {
            if let Some(text) = view.text(field).filter(|text| !text.is_empty()) {
                last[field] = json!(text);
            }
        }
        assert_eq!(comparable(last), case.last, "{}", case.query);
        let ran: Vec<String> = postgres.executed(&case.id).await.into_iter().map(|sql| sql.replace(WAIT, "")).collect();
        let recorded: Vec<String> = case.executed.iter().map(|sql| sql.replace("JOB", &case.id)).collect();
        assert_eq!(ran, recorded, "{}", case.query);
    }
    worker.stop().await;
}
