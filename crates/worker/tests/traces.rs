//! Traces as a collector gets them.

mod support;

use support::collector::{Collector, all, number, text};
use support::house::{DATABASE, House};
use support::*;
use testkit::{Daemon, Signal, bin, eventually};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

#[derive(Debug, Clone)]
struct Span {
    trace: String,
    id: String,
    parent: String,
    name: String,
    nanos: (u64, u64),
}

fn spans(collector: &Collector) -> Vec<Span> {
    // TracesData.resource_spans = 1, ResourceSpans.scope_spans = 2, ScopeSpans.spans = 2
    let requests = collector.traces();
    let spans = requests.iter().flat_map(|body| all(body, 1)).flat_map(|r| all(r, 2)).flat_map(|s| all(s, 2));
    spans.map(span).collect()
}

fn span(message: &[u8]) -> Span {
    let bytes = |number| all(message, number).first().copied().unwrap_or_default();
    let hex = |number| bytes(number).iter().map(|byte| format!("{byte:02x}")).collect();
    let nanos = (number(message, 7), number(message, 8));
    Span { trace: hex(1), id: hex(2), parent: hex(4), name: text(message, 5), nanos }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_becomes_of_a_job_is_one_trace_with_its_producers() {
    let house = House::build().await;
    let (collector, url) = Collector::start();
    let daemon = house.daemon(&[("DRAYMAN_TELEMETRY__OTLP_ENDPOINT", &url), ("DRAYMAN_LOG__LEVEL", "warn")]);
    house.job("traced", "SELECT 1").with("traceparent", format!("00-{TRACE}-{PARENT}-01")).push();
    house.job("alone", "SELECT 1").push();
    for id in ["traced", "alone"] {
        assert_eq!(house.ended(id).await.status(), "done");
    }
    // What has not left yet leaves before the end.
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
    eventually("the traces of two jobs", async || {
        (spans(&collector).iter().filter(|span| span.name == "job").count() == 2).then_some(())
    })
    .await;

    let (traced, others): (Vec<Span>, Vec<Span>) = spans(&collector).into_iter().partition(|span| span.trace == TRACE);
    let job = traced.iter().find(|span| span.name == "job").expect("the job");
    assert_eq!(job.parent, PARENT);
    for name in ["wait", "take", "statement", "finish"] {
        let span = traced.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("no span {name}"));
        assert_eq!(span.parent, job.id, "{name}");
        assert!(span.nanos.0 <= span.nanos.1, "{name}");
    }
    assert_eq!(traced.len(), 5, "{traced:?}");
    // One that follows nobody begins a trace of its own.
    let alone = others.iter().find(|span| span.name == "job").expect("the other job");
    assert_eq!(alone.parent, "");
    assert!(others.iter().all(|span| span.trace == alone.trace), "{others:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_of_statements_waits_once() {
    let house = House::build().await;
    let (collector, url) = Collector::start();
    let daemon = house.daemon(&[("DRAYMAN_TELEMETRY__OTLP_ENDPOINT", &url)]);
    let chain = r#"{"query": [{"query": "SELECT 1/0", "onerror": "SELECT 1"}], "onerror": "SELECT 2"}"#;
    house.job("chain", chain).with("traceparent", format!("00-{TRACE}-{PARENT}-01")).push();
    assert_eq!(house.ended("chain").await.status(), "failed");
    daemon.signal(Signal::SIGTERM);
    daemon.wait();
    let count = |name: &str| spans(&collector).iter().filter(|span| span.trace == TRACE && span.name == name).count();
    eventually("all statements", async || (count("job") == 3).then_some(())).await;
    assert_eq!([count("wait"), count("take"), count("statement"), count("finish")], [1, 3, 3, 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_submission_by_command_stands_between_its_caller_and_the_job() {
    let house = House::build().await;
    let (collector, url) = Collector::start();
    let endpoint = ("DRAYMAN_TELEMETRY__OTLP_ENDPOINT", url.as_str());
    let daemon = house.daemon(&[endpoint]);
    let (host, port) = house.postgres.host_port();
    let redis = house.redis.url_db(DB);
    let port = port.to_string();
    let submit = [
        "submit",
        "--redis-url",
        &redis,
        "--user",
        "ann",
        "--host",
        &host,
        "--port",
        &port,
        "--dbname",
        DATABASE,
        "--dbuser",
        "postgres",
        "--id",
        "by-command",
        "SELECT 1",
    ];
    let caller = format!("00-{TRACE}-{PARENT}-01");
    let program = Daemon::spawn(bin("drayman"), &submit, &[endpoint, ("TRACEPARENT", &caller)]);
    assert_eq!(program.wait().code(), Some(0), "{}", program.output());
    assert_eq!(house.ended("by-command").await.status(), "done");
    daemon.signal(Signal::SIGTERM);
    daemon.wait();
    let named = |name: &str| spans(&collector).into_iter().find(|span| span.trace == TRACE && span.name == name);
    let job = eventually("the job's span", async || named("job")).await;
    let submitted = named("submit").expect("it left before the program ended");
    assert_eq!((submitted.parent.as_str(), job.parent), (PARENT, submitted.id));
}
