//! Traces as a collector gets them.

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

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

/// A collector that takes OTLP over HTTP and understands as much of it as is asked for here.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Span>>>);

impl Collector {
    fn start() -> (Self, String) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let collector = Self::default();
        let spans = collector.0.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let found = request(BufReader::new(stream.expect("a connection")));
                spans.lock().expect("no panic").extend(found);
            }
        });
        (collector, url)
    }

    fn spans(&self) -> Vec<Span> {
        self.0.lock().expect("no panic").clone()
    }
}

fn request(mut stream: BufReader<std::net::TcpStream>) -> Vec<Span> {
    let mut length = 0;
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).expect("a header");
        match line.trim().to_ascii_lowercase().split_once(": ") {
            Some(("content-length", value)) => length = value.parse().expect("a number"),
            None if line.trim().is_empty() => break,
            _ => {}
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).expect("a body");
    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    stream.get_mut().write_all(answer).expect("it listens");
    // TracesData.resource_spans = 1, ResourceSpans.scope_spans = 2, ScopeSpans.spans = 2
    let spans = all(&body, 1).into_iter().flat_map(|r| all(r, 2)).flat_map(|s| all(s, 2));
    spans.map(span).collect()
}

fn span(message: &[u8]) -> Span {
    let bytes = |number| all(message, number).first().copied().unwrap_or_default();
    let hex = |number| bytes(number).iter().map(|byte| format!("{byte:02x}")).collect();
    let time = |number| u64::from_le_bytes(bytes(number).try_into().expect("a fixed64"));
    Span {
        trace: hex(1),
        id: hex(2),
        parent: hex(4),
        name: String::from_utf8(bytes(5).to_vec()).expect("a name"),
        nanos: (time(7), time(8)),
    }
}

/// The values of one field of a message of protocol buffers, without those that are varints.
fn all(mut message: &[u8], wanted: u64) -> Vec<&[u8]> {
    fn varint(message: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = message.split_first().expect("a byte");
            *message = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
        }
        value
    }
    let mut found = Vec::new();
    while !message.is_empty() {
        let tag = varint(&mut message);
        let length = match tag & 7 {
            0 => {
                varint(&mut message);
                continue;
            }
            1 => 8,
            2 => varint(&mut message) as usize,
            5 => 4,
            other => panic!("no wire type: {other}"),
        };
        let (value, rest) = message.split_at(length);
        message = rest;
        if tag >> 3 == wanted {
            found.push(value);
        }
    }
    found
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
    assert_eq!(daemon.wait(LONG).code(), Some(0));
    eventually("the traces of two jobs", LONG, async || {
        (collector.spans().iter().filter(|span| span.name == "job").count() == 2).then_some(())
    })
    .await;

    let (traced, others): (Vec<Span>, Vec<Span>) = collector.spans().into_iter().partition(|span| span.trace == TRACE);
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
    daemon.wait(LONG);
    let count = |name: &str| collector.spans().iter().filter(|span| span.trace == TRACE && span.name == name).count();
    eventually("all statements", LONG, async || (count("job") == 3).then_some(())).await;
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
    assert_eq!(program.wait(LONG).code(), Some(0), "{}", program.output());
    assert_eq!(house.ended("by-command").await.status(), "done");
    daemon.signal(Signal::SIGTERM);
    daemon.wait(LONG);
    let named = |name: &str| collector.spans().into_iter().find(|span| span.trace == TRACE && span.name == name);
    let job = eventually("the job's span", LONG, async || named("job")).await;
    let submitted = named("submit").expect("it left before the program ended");
    assert_eq!((submitted.parent.as_str(), job.parent), (PARENT, submitted.id));
}
