//! Metrics as a collector gets them.

mod support;

use std::collections::BTreeMap;

use queue_core::inspect::Inspect;
use serde_json::Value;
use support::collector::{Collector, all, number, text};
use support::*;
use testkit::{Daemon, RedisServer, Signal, eventually};
use worker::builder::Worker;
use worker::execute::function::Context;
use worker::execute::task::Problem;
use worker::shutdown::Shutdown;

const ENDPOINT: &str = "DRAYMAN_TELEMETRY__OTLP_ENDPOINT";

/// The numbers of one request, by metric, unit and pool.
fn numbers(body: &[u8]) -> BTreeMap<(String, String, String), u64> {
    let mut numbers = BTreeMap::new();
    // MetricsData.resource_metrics = 1, ResourceMetrics.scope_metrics = 2, ScopeMetrics.metrics = 2
    for metric in all(body, 1).into_iter().flat_map(|r| all(r, 2)).flat_map(|s| all(s, 2)) {
        // Metric.name = 1, unit = 3, gauge = 5, Gauge.data_points = 1
        for point in all(metric, 5).into_iter().flat_map(|gauge| all(gauge, 1)) {
            // NumberDataPoint.as_int = 6, attributes = 7, KeyValue.key = 1, value = 2, AnyValue.string_value = 1
            let attributes = all(point, 7);
            assert_eq!(attributes.len(), 1, "{metric:?}");
            assert_eq!(text(attributes[0], 1), "pool");
            let pool = text(all(attributes[0], 2)[0], 1);
            numbers.insert((text(metric, 1), text(metric, 3), pool), number(point, 6));
        }
    }
    numbers
}

/// Jobs and longest wait of a pool that nobody serves, as they were told last.
fn unserved(collector: &Collector, pool: &str) -> Option<(u64, u64)> {
    let numbers = numbers(collector.metrics().last()?);
    let of = |name: &str, unit: &str| {
        numbers.get(&(format!("drayman.unserved.{name}"), unit.to_owned(), pool.to_owned())).copied()
    };
    of("jobs", "{job}").zip(of("oldest_wait", "s"))
}

/// A worker that tells its numbers to this endpoint all the time, if the variable is the one to say so.
fn telling(server: &RedisServer, variable: &str, endpoint: &str) -> Daemon {
    let often = [("OTEL_METRIC_EXPORT_INTERVAL", "50"), ("DRAYMAN_WORKER__SCAN_INTERVAL", "50ms")];
    daemon(&server.url_db(DB), &[often[0], often[1], (variable, endpoint)])
}

fn push(server: &RedisServer, id: &str, user: &str, fields: &[(&str, &str)]) {
    server.state(DB).foreign().submit(user, id, &[&[("status", "pending")], fields].concat());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leads_tells_what_nobody_serves_and_that_it_is_over() {
    let server = RedisServer::start();
    let (collector, url) = Collector::start();
    let leader = telling(&server, ENDPOINT, &url);
    eventually("a leader that tells", async || (unserved(&collector, "(others)")? == (0, 0)).then_some(())).await;
    let (collector_2, url_2) = Collector::start();
    let other = telling(&server, ENDPOINT, &url_2);
    other.wait_for_line("serving");

    let print = [
        ("kind", "task"),
        ("app", "shop"),
        ("op", "print"),
        ("input", "{}"),
        ("created_at", "2024-01-01T00:00:00.000Z"),
    ];
    for (id, user) in [("marked-a", "ann-marked"), ("marked-b", "ann-marked"), ("marked-c", "bob-marked")] {
        push(&server, id, user, &print);
    }
    let (_, wait) = eventually("three jobs that nobody serves", async || {
        unserved(&collector, "shop.print").filter(|(jobs, _)| *jobs == 3)
    })
    .await;
    assert!(wait > 86_400, "{wait} s since 2024");

    let mut config = config(&server);
    config.worker.pools.clear();
    let shutdown = Shutdown::new();
    let print = async |_: Value, _: Context| Ok::<_, Problem>(());
    let worker = Worker::builder().config(config).handler("shop", "print", print).run(shutdown.clone());
    let worker = tokio::spawn(worker);
    eventually("a zero", async || (unserved(&collector, "shop.print")? == (0, 0)).then_some(())).await;
    let inspect = Inspect::new(store(&server).await);
    for id in ["marked-a", "marked-b", "marked-c"] {
        assert_eq!(ended(&inspect, id).await.status(), "done");
    }
    let marked = |body: &Vec<u8>| body.windows(6).any(|bytes| bytes == b"marked");
    assert!(!collector.metrics().iter().any(marked), "a user or a job is told");

    // The other one has said nothing so far, and does once it leads.
    assert_eq!(collector_2.metrics().len(), 0);
    shutdown.drain().cancel();
    worker.await.expect("no panic").expect("no error");
    leader.signal(Signal::SIGTERM);
    assert_eq!(leader.wait().code(), Some(0), "{}", leader.output());
    eventually("the other one to tell", async || unserved(&collector_2, "(others)")).await;
    other.signal(Signal::SIGTERM);
    assert_eq!(other.wait().code(), Some(0), "{}", other.output());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_exported_without_an_endpoint_of_ours() {
    let server = RedisServer::start();
    let (collector, url) = Collector::start();
    let worker = telling(&server, "OTEL_EXPORTER_OTLP_ENDPOINT", &url);
    // One that is refused, and leaves a span.
    push(&server, "a", "ann", &[("query", "SELECT 1"), ("host", "192.0.2.1")]);
    let inspect = Inspect::new(store(&server).await);
    assert_eq!(ended(&inspect, "a").await.status(), "failed");
    worker.signal(Signal::SIGTERM);
    assert_eq!(worker.wait().code(), Some(0), "{}", worker.output());
    assert_eq!((collector.metrics().len(), collector.traces().len()), (0, 0));
}
