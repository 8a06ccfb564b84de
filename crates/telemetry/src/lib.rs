//! Logs to stderr and, where a collector is configured, traces and metrics to it.
//!
//! A trace goes through Redis as a `traceparent` text (W3C Trace Context): [`traceparent`] writes the one of a span, and
//! [`follow`] makes a span the child of one that was read.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::time::{Duration, SystemTime};

use opentelemetry::KeyValue;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{Span as _, TraceContextExt, Tracer, TracerProvider};
use opentelemetry_otlp::{MetricExporter, Protocol, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::metrics::SdkMeterProvider;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use queue_core::config::{TelemetryConfig, Url};
use tracing::level_filters::LevelFilter;
use tracing::{Span, Subscriber};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::filter::{FilterExt, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

mod log;

pub use log::{LogConfig, LogFormat, LogLevel};

/// How long the last spans may take to leave; the last metrics have as long. A collector that is away must not hold up a stop.
const FLUSH_MAX: Duration = Duration::from_secs(5);

/// The field that carries a trace from process to process.
const TRACEPARENT: &str = "traceparent";

/// Why logging or exporting could not be started.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The exporter does not accept its configuration.
    #[error("cannot export traces and metrics")]
    Exporter(#[from] opentelemetry_otlp::ExporterBuildError),
    /// This process logs already.
    #[error("cannot start the log")]
    Subscriber(#[from] tracing_subscriber::util::TryInitError),
}

/// Logs, traces and metrics of this process, for as long as it runs.
#[must_use = "the last spans are lost unless it is stopped"]
pub struct Telemetry {
    filter: reload::Handle<EnvFilter, Registry>,
    export: Option<Export>,
}

/// What leaves for the collector.
struct Export {
    traces: SdkTracerProvider,
    metrics: SdkMeterProvider,
}

impl Telemetry {
    /// Starts all for the whole process. To be called once.
    pub fn start(log: &LogConfig, telemetry: &TelemetryConfig) -> Result<Telemetry, TelemetryError> {
        let (subscriber, started) = build(log, telemetry, std::io::stderr, std::io::stderr().is_terminal())?;
        subscriber.try_init()?;
        if let Some(export) = &started.export {
            opentelemetry::global::set_tracer_provider(export.traces.clone());
            opentelemetry::global::set_meter_provider(export.metrics.clone());
        }
        Ok(started)
    }

    /// Changes which lines are logged from now on.
    pub fn set_level(&self, level: &LogLevel) {
        // Fails only if the subscriber is gone, and then nothing is logged anyway.
        let _ = self.filter.reload(level.filter());
    }

    /// Sends what has not left yet. The log goes on.
    pub async fn stop(self) {
        let Some(Export { traces, metrics }) = self.export else { return };
        // They wait for threads that speak HTTP: that must not stop a thread of the runtime.
        let traces = tokio::task::spawn_blocking(move || traces.shutdown_with_timeout(FLUSH_MAX));
        let metrics = tokio::task::spawn_blocking(move || metrics.shutdown_with_timeout(FLUSH_MAX));
        if let Ok(Err(fault)) = traces.await {
            tracing::warn!(error = %fault, "the last spans could not be exported");
        }
        if let Ok(Err(fault)) = metrics.await {
            tracing::warn!(error = %fault, "the last metrics could not be exported");
        }
    }
}

/// The subscriber that writes lines to `writer` and spans to the collector, if there is one.
fn build<W>(
    log: &LogConfig,
    telemetry: &TelemetryConfig,
    writer: W,
    colours: bool,
) -> Result<(impl Subscriber + Send + Sync, Telemetry), TelemetryError>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    let lines: Box<dyn Layer<Registry> + Send + Sync> = match log.format {
        LogFormat::Text => lines.with_ansi(colours).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    // The level is the log's alone: a quiet log must not thin out traces.
    let (level, filter) = reload::Layer::new(log.level.filter());

    let export = telemetry.otlp_endpoint.as_ref().map(|url| export(url, &telemetry.service_name)).transpose()?;
    let spans = export.as_ref().map(|export| {
        // What the exporter does itself would be traced and exported for ever.
        let own = ["opentelemetry", "hyper", "hyper_util", "reqwest", "h2", "tower"];
        let filter =
            Targets::new().with_default(LevelFilter::INFO).with_targets(own.map(|target| (target, LevelFilter::OFF)));
        tracing_opentelemetry::layer().with_tracer(export.traces.tracer("drayman")).with_filter(filter)
    });

    // Further down, these tell the SQL texts, values and commands that pass through them, whatever level is asked for.
    let talkative = [("tokio_postgres", LevelFilter::WARN), ("fred", LevelFilter::INFO)];
    let discreet = Targets::new().with_default(LevelFilter::TRACE).with_targets(talkative);
    let lines = lines.with_filter(level.and(discreet));

    let subscriber = tracing_subscriber::registry().with(lines).with(spans);
    Ok((subscriber, Telemetry { filter, export }))
}

fn export(endpoint: &Url, service_name: &str) -> Result<Export, TelemetryError> {
    let resource = Resource::builder()
        .with_service_name(service_name.to_owned())
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build();
    let spans = SpanExporter::builder()
        .with_http()
        .with_protocol(Protocol::HttpBinary)
        .with_endpoint(signal_url(endpoint, "traces"))
        .build()?;
    let metrics = MetricExporter::builder()
        .with_http()
        .with_protocol(Protocol::HttpBinary)
        .with_endpoint(signal_url(endpoint, "metrics"))
        .build()?;
    Ok(Export {
        traces: SdkTracerProvider::builder().with_resource(resource.clone()).with_batch_exporter(spans).build(),
        // How often metrics leave is OTEL_METRIC_EXPORT_INTERVAL, a minute by default.
        metrics: SdkMeterProvider::builder().with_resource(resource).with_periodic_exporter(metrics).build(),
    })
}

/// Where traces or metrics go: the endpoint is the collector's, and the protocol fixes the paths below it.
fn signal_url(endpoint: &Url, signal: &str) -> String {
    let text = endpoint.expose().trim_end_matches('/');
    let collector = text.strip_suffix("/v1/traces").unwrap_or(text);
    format!("{collector}/v1/{signal}")
}

/// Tells the collector numbers as they stand, each with the value of `label` that it is for, until the process ends. What
/// `numbers` leaves out is not told (any more). Nothing happens where nothing is exported.
pub fn gauge(
    name: &'static str,
    unit: &'static str,
    description: &'static str,
    label: &'static str,
    numbers: impl Fn() -> Vec<(String, u64)> + Send + Sync + 'static,
) {
    let meter = opentelemetry::global::meter("drayman");
    let gauge = meter.u64_observable_gauge(name).with_unit(unit).with_description(description);
    gauge
        .with_callback(move |observer| {
            for (value, number) in numbers() {
                observer.observe(number, &[KeyValue::new(label, value)]);
            }
        })
        .build();
}

/// The `traceparent` of a span, if it is traced. After that the span can't follow another one.
pub fn traceparent(span: &Span) -> Option<String> {
    let mut carrier = HashMap::new();
    TraceContextPropagator::new().inject_context(&span.context(), &mut carrier);
    carrier.remove(TRACEPARENT)
}

/// Makes a new span the child of the one that `traceparent` names, in another process or another time. Tells whether it
/// did: not if the text is malformed, and not if nothing is traced here or the span has begun already.
pub fn follow(span: &Span, traceparent: &str) -> bool {
    let carrier = HashMap::from([(TRACEPARENT.to_owned(), traceparent.to_owned())]);
    let parent = TraceContextPropagator::new().extract(&carrier);
    parent.span().span_context().is_valid() && span.set_parent(parent).is_ok()
}

/// Records, as a child of `span`, how long a job waited since it was submitted at a time written as ISO 8601.
pub fn waited(span: &Span, submitted: &str, until: SystemTime) {
    let Ok(start) = humantime::parse_rfc3339(submitted) else { return };
    record(span, "wait", start, until);
}

/// Records something that is over as a child of `span`. Nothing happens where nothing is traced.
pub fn record(span: &Span, name: &'static str, start: SystemTime, end: SystemTime) {
    let context = span.context();
    if !context.span().span_context().is_valid() {
        return;
    }
    let tracer = opentelemetry::global::tracer("drayman");
    let builder = tracer.span_builder(name).with_start_time(start.min(end));
    tracer.build_with_context(builder, &context).end_with_timestamp(end);
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::TcpListener;
    use std::sync::mpsc::{Receiver, channel};
    use std::sync::{Arc, Mutex};

    use testkit::{PATIENCE, end_of};
    use tracing::instrument::WithSubscriber;

    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Lines {
        fn take(&self) -> String {
            String::from_utf8(std::mem::take(&mut *self.0.lock().unwrap())).unwrap()
        }
    }

    /// A collector: accepts everything, and tells what it got.
    fn collector() -> (Url, Receiver<(String, Vec<u8>)>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = Url::new(format!("http://{}", listener.local_addr().unwrap()));
        let (sender, receiver) = channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut reader = BufReader::new(stream.unwrap());
                let (mut request, mut length) = (String::new(), 0);
                reader.read_line(&mut request).unwrap();
                loop {
                    let mut header = String::new();
                    reader.read_line(&mut header).unwrap();
                    match header.trim().split_once(": ") {
                        Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                            length = value.parse().unwrap();
                        }
                        Some(_) => {}
                        None => break,
                    }
                }
                let mut body = vec![0; length];
                reader.read_exact(&mut body).unwrap();
                let answer = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
                reader.get_mut().write_all(answer.as_bytes()).unwrap();
                if sender.send((request, body)).is_err() {
                    return;
                }
            }
        });
        (url, receiver)
    }

    fn log(format: LogFormat, level: &str) -> LogConfig {
        LogConfig { format, level: level.to_owned().try_into().unwrap() }
    }

    fn contains(body: &[u8], part: &[u8]) -> bool {
        body.windows(part.len()).any(|window| window == part)
    }

    #[test]
    fn lines_are_text_or_json_and_their_level_can_be_changed() {
        let lines = Lines::default();
        let writer = lines.clone();
        let (subscriber, telemetry) =
            build(&log(LogFormat::Json, "info"), &TelemetryConfig::default(), move || writer.clone(), false).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(job = "a", "seen");
            tracing::debug!("not seen");
            telemetry.set_level(&"debug".to_owned().try_into().unwrap());
            tracing::debug!("seen now");
            telemetry.set_level(&"error".to_owned().try_into().unwrap());
            tracing::warn!("not seen");
        });
        let text = lines.take();
        let seen: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(seen.len(), 2, "{text}");
        assert_eq!((&seen[0]["message"], &seen[0]["job"]), (&"seen".into(), &"a".into()));
        assert_eq!(seen[1]["message"], "seen now");

        let writer = lines.clone();
        let (subscriber, _telemetry) =
            build(&log(LogFormat::Text, "info"), &TelemetryConfig::default(), move || writer.clone(), false).unwrap();
        tracing::subscriber::with_default(subscriber, || tracing::info!(job = "a", "seen"));
        assert!(lines.take().trim_end().ends_with("seen job=\"a\""));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn spans_reach_the_collector_in_the_trace_that_they_follow() {
        let (url, received) = collector();
        let config = TelemetryConfig { otlp_endpoint: Some(url), service_name: "drayman-test".into() };
        // Traces do not depend on what is logged.
        let (subscriber, telemetry) = build(&log(LogFormat::Text, "off"), &config, std::io::sink, false).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            let span = tracing::info_span!("take");
            assert!(!follow(&span, "nonsense"));
            assert!(follow(&span, PARENT));
            let passed_on = traceparent(&span).unwrap();
            assert!(passed_on.starts_with("00-0af7651916cd43dd8448eb211c80319c-") && passed_on != PARENT);
            assert!(!follow(&span, PARENT), "it has begun");
            span.in_scope(|| tracing::info_span!("statement").in_scope(|| ()));
        });
        telemetry.stop().await;
        let (request, body) = received.recv_timeout(PATIENCE).unwrap();
        assert!(request.starts_with("POST /v1/traces "), "{request}");
        let trace = 0x0af7651916cd43dd8448eb211c80319c_u128.to_be_bytes();
        for part in [&trace[..], &0xb7ad6b7169203331_u64.to_be_bytes(), b"drayman-test", b"take", b"statement"] {
            assert!(contains(&body, part));
        }
    }

    #[test]
    fn nothing_is_traced_without_a_collector() {
        let (subscriber, _telemetry) =
            build(&log(LogFormat::Text, "info"), &TelemetryConfig::default(), std::io::sink, false).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            let span = tracing::info_span!("take");
            assert!(!follow(&span, PARENT));
            assert_eq!(traceparent(&span), None);
        });
    }

    #[tokio::test]
    async fn a_collector_that_is_away_or_silent_holds_no_stop_up_and_what_is_lost_is_said() {
        let away = Url::new("http://127.0.0.1:9");
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // The kernel accepts its connections, and nobody ever reads from them.
        let silent = Url::new(format!("http://{}", listener.local_addr().unwrap()));
        // By the time that a stop has, not the exporter's own, which is longer.
        for (url, loss) in [(away, [""; 2]), (silent, ["the last spans could not be exported", "Timeout(5s)"])] {
            let config = TelemetryConfig { otlp_endpoint: Some(url), ..TelemetryConfig::default() };
            let (subscriber, telemetry) = build(&log(LogFormat::Text, "off"), &config, std::io::sink, false).unwrap();
            tracing::subscriber::with_default(subscriber, || tracing::info_span!("take").in_scope(|| ()));
            let lines = Lines::default();
            let writer = lines.clone();
            let said = tracing_subscriber::fmt().with_writer(move || writer.clone()).with_ansi(false).finish();
            end_of("the stop", telemetry.stop().with_subscriber(said)).await;
            let said = lines.take();
            assert!(loss.iter().all(|part| said.contains(part)), "{said}");
        }
    }

    #[test]
    fn each_signal_has_its_path_below_the_collectors_endpoint() {
        let of = |url: &str| ["traces", "metrics"].map(|signal| signal_url(&Url::new(url), signal));
        for url in ["http://h:4318", "http://h:4318/", "http://h:4318/v1/traces"] {
            assert_eq!(of(url), ["http://h:4318/v1/traces", "http://h:4318/v1/metrics"]);
        }
        assert_eq!(of("http://h/otlp/"), ["http://h/otlp/v1/traces", "http://h/otlp/v1/metrics"]);
    }
}
