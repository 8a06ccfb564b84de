//! `drayman submit`: one job from the command line, or many from standard input.

use std::io::{BufRead, Read};
use std::num::NonZeroU32;
use std::time::{Duration, SystemTime};

use console::{Common, Failure, Out, complain};
use queue_core::Store;
use queue_core::config::{self, Limits, TelemetryConfig};
use queue_core::follow::Move;
use queue_core::handle::JobHandle;
use queue_core::ids::{App, JobId, Op, User};
use queue_core::job::CALL_MAX;
use queue_core::model::retry::{NoBackoff, NoSqlState, RetryChoice};
use queue_core::model::task::{Encoding, Payload};
use queue_core::objects::Objects;
use queue_core::producer::{
    Confirmed, ConfirmedProducer, Database, EnqueueError, NewJob, NoPriority, NoUniqueScope, Priority, Producer,
    SqlWork, Submitted, TaskWork, Unique, UniqueScope, Work,
};
use serde::Deserialize;
use serde_json::{Value, json};
use telemetry::{LogConfig, LogLevel, Telemetry};
use tokio::sync::mpsc;
use tracing::Instrument;

use crate::cli::{FAILED, NOT_OVER, REFUSED, Submit, UNCONFIRMED};
use crate::follow::follow;
use crate::result;
use crate::watch;

/// Longest line of `--jsonl`. More than any limit on payloads lets through.
const LINE_MAX_BYTES: u64 = 16 << 20;

/// Where a calling program says in which trace it calls.
const TRACEPARENT_VARIABLE: &str = "TRACEPARENT";

/// Exit codes, the one that counts first where several apply.
const PRECEDENCE: [u8; 7] =
    [console::UNREACHABLE, console::USAGE, REFUSED, console::NOT_FOUND, UNCONFIRMED, FAILED, NOT_OVER];

/// What the command line or a line of JSON says about a job.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Order {
    id: Option<String>,
    user: Option<String>,
    database: Option<String>,
    host: Option<String>,
    port: Option<u16>,
    dbname: Option<String>,
    dbuser: Option<String>,
    pass: Option<String>,
    query: Option<Value>,
    onsuccess: Option<String>,
    onerror: Option<String>,
    timeout: Option<String>,
    max_attempts: Option<NonZeroU32>,
    backoff: Option<String>,
    retry_delay: Option<String>,
    retry_delay_max: Option<String>,
    retry_on: Option<String>,
    idempotent: Option<bool>,
    delay: Option<String>,
    run_at: Option<String>,
    priority: Option<String>,
    unique: Option<String>,
    tags: Option<Vec<String>>,
    app: Option<String>,
    op: Option<String>,
    #[serde(deserialize_with = "said")]
    input: Option<Value>,
    /// The input as it is written, from the command line.
    #[serde(skip)]
    written_input: Option<Vec<u8>>,
    #[serde(deserialize_with = "said")]
    context: Option<Value>,
    encoding: Option<Encoding>,
    deadline: Option<String>,
}

/// A value that is said, be it `null`.
fn said<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(from).map(Some)
}

impl Order {
    /// This order, with what it does not say taken from another.
    fn or(self, other: &Order) -> Order {
        let other = other.clone();
        let names_host = [&self.host, &self.dbname, &self.dbuser, &self.pass].iter().any(|field| field.is_some());
        // What it is and where it runs is said in one way or in the other.
        let other = match (self.app.is_some(), self.database.is_some() || names_host || self.query.is_some()) {
            (true, _) => Order { database: None, query: None, ..other.without_connection() },
            (_, true) => Order { app: None, op: None, input: None, written_input: None, context: None, ..other },
            _ => other,
        };
        let connection = if self.database.is_some() { Order::default() } else { other.clone() };
        Order {
            id: self.id,
            user: self.user.or(other.user),
            database: self.database.or(if names_host { None } else { other.database }),
            host: self.host.or(connection.host),
            port: self.port.or(connection.port),
            dbname: self.dbname.or(connection.dbname),
            dbuser: self.dbuser.or(connection.dbuser),
            pass: self.pass.or(connection.pass),
            query: self.query.or(other.query),
            onsuccess: self.onsuccess.or(other.onsuccess),
            onerror: self.onerror.or(other.onerror),
            timeout: self.timeout.or(other.timeout),
            max_attempts: self.max_attempts.or(other.max_attempts),
            backoff: self.backoff.or(other.backoff),
            retry_delay: self.retry_delay.or(other.retry_delay),
            retry_delay_max: self.retry_delay_max.or(other.retry_delay_max),
            retry_on: self.retry_on.or(other.retry_on),
            idempotent: self.idempotent.or(other.idempotent),
            delay: self.delay.or(other.delay),
            run_at: self.run_at.or(other.run_at),
            priority: self.priority.or(other.priority),
            unique: self.unique.or(other.unique),
            tags: self.tags.or(other.tags),
            app: self.app.or(other.app),
            op: self.op.or(other.op),
            written_input: if self.input.is_some() { None } else { self.written_input.or(other.written_input) },
            input: self.input.or(other.input),
            context: self.context.or(other.context),
            encoding: self.encoding.or(other.encoding),
            deadline: self.deadline.or(other.deadline),
        }
    }

    fn without_connection(self) -> Order {
        Order { host: None, port: None, dbname: None, dbuser: None, pass: None, ..self }
    }

    fn into_job(mut self) -> Result<NewJob, String> {
        let user = User::new(self.user.take().ok_or("user is missing")?).map_err(|fault| fault.to_string())?;
        let work = if self.app.is_some() { Work::Task(self.take_task()?) } else { Work::Sql(self.take_sql()?) };
        let mut job = NewJob::of(user, work);
        if let Some(id) = self.id {
            job.id = JobId::new(id).map_err(|fault| fault.to_string())?;
        }
        job.timeout = duration("timeout", self.timeout)?;
        job.retry = RetryChoice {
            max_attempts: self.max_attempts,
            backoff: self.backoff.map(|word| word.parse()).transpose().map_err(|fault: NoBackoff| fault.to_string())?,
            delay: duration("retry_delay", self.retry_delay)?,
            delay_max: duration("retry_delay_max", self.retry_delay_max)?,
            on: self
                .retry_on
                .map(|text| text.parse())
                .transpose()
                .map_err(|fault: NoSqlState| format!("retry_on: {fault}"))?,
        };
        job.run_at = time("run_at", self.run_at)?;
        job.deadline = time("deadline", self.deadline)?;
        job.delay = duration("delay", self.delay)?.unwrap_or_default();
        job.priority = self
            .priority
            .map_or(Ok(Priority::Normal), |word| word.parse())
            .map_err(|fault: NoPriority| fault.to_string())?;
        job.unique = self.unique.map(unique).transpose()?;
        job.tags = self.tags.unwrap_or_default();
        Ok(job)
    }

    /// The call of a handler that it describes.
    fn take_task(&mut self) -> Result<TaskWork, String> {
        let of_sql = [
            ("database", self.database.is_some()),
            ("host", self.host.is_some()),
            ("query", self.query.is_some()),
            ("onsuccess", self.onsuccess.is_some()),
            ("onerror", self.onerror.is_some()),
            ("retry_on", self.retry_on.is_some()),
            ("idempotent", self.idempotent.is_some()),
        ];
        if let Some((name, _)) = of_sql.iter().find(|(_, said)| *said) {
            return Err(format!("{name} is for SQL jobs, app for tasks"));
        }
        let app = App::new(self.app.take().unwrap_or_default()).map_err(|fault| fault.to_string())?;
        let op = Op::new(self.op.take().ok_or("op is missing")?).map_err(|fault| fault.to_string())?;
        let encoding = self.encoding.unwrap_or_default();
        let write = |value: Value| Payload::write(encoding, &value).map_err(|fault| fault.to_string());
        let input = match self.written_input.take() {
            Some(bytes) => Payload { encoding, bytes },
            // A handler that needs no input is given none.
            None => write(self.input.take().unwrap_or(Value::Null))?,
        };
        let readable = input.read::<serde::de::IgnoredAny>();
        readable.map_err(|fault| format!("the input is no {encoding}: {}", without_values(&fault.to_string())))?;
        let context = self.context.take().map(write).transpose()?;
        Ok(TaskWork { app, op, input, context })
    }

    /// The SQL job that it describes.
    fn take_sql(&mut self) -> Result<SqlWork, String> {
        let of_tasks = [
            ("op", self.op.is_some()),
            ("input", self.input.is_some()),
            ("context", self.context.is_some()),
            ("encoding", self.encoding.is_some()),
            ("deadline", self.deadline.is_some()),
        ];
        if let Some((name, _)) = of_tasks.iter().find(|(_, said)| *said) {
            return Err(format!("{name} is for tasks, and app is missing"));
        }
        let database = match (self.database.take(), self.host.take()) {
            (Some(_), Some(_)) => return Err("database and host exclude each other".into()),
            (Some(name), None) => Database::Named(name),
            (None, Some(host)) => Database::Connection {
                host,
                port: self.port.unwrap_or(5432),
                dbname: self.dbname.take().ok_or("dbname is missing")?,
                dbuser: self.dbuser.take().ok_or("dbuser is missing")?,
                pass: self.pass.take().unwrap_or_default(),
            },
            (None, None) => return Err("database or host is missing".into()),
        };
        let query = match self.query.take().ok_or("query is missing")? {
            Value::String(text) => text,
            form => form.to_string(),
        };
        Ok(SqlWork {
            query,
            onsuccess: self.onsuccess.take(),
            onerror: self.onerror.take(),
            database,
            idempotent: self.idempotent.unwrap_or(false),
        })
    }
}

fn duration(name: &str, text: Option<String>) -> Result<Option<Duration>, String> {
    let parsed = text.map(|text| humantime::parse_duration(&text)).transpose();
    parsed.map_err(|fault| format!("{name} is no duration: {fault}"))
}

fn time(name: &str, text: Option<String>) -> Result<Option<SystemTime>, String> {
    let parsed = text.map(|text| humantime::parse_rfc3339_weak(&text)).transpose();
    parsed.map_err(|fault| format!("{name} is no time: {fault}"))
}

/// A unique key, and behind a last `=` its scope.
fn unique(text: String) -> Result<Unique, String> {
    let Some((key, scope)) = text.rsplit_once('=') else {
        return Ok(Unique { key: text, scope: UniqueScope::UntilDone });
    };
    let scope = scope.parse().map_err(|fault: NoUniqueScope| format!("unique: {fault}"))?;
    Ok(Unique { key: key.to_owned(), scope })
}

/// What happened to what was submitted.
struct Report {
    json: bool,
    many: bool,
    result_only: bool,
    out: Out,
    codes: Vec<u8>,
    ids: Vec<String>,
}

impl Report {
    fn done(&mut self, place: usize, id: &str, result: Result<Accepted, EnqueueError>) {
        match result {
            Ok(Accepted { submitted, replicas }) => {
                let there = matches!(submitted, Submitted::AlreadyThere(_));
                if self.json {
                    let mut line = json!({ "id": id, "result": if there { "already_there" } else { "queued" } });
                    if let Some((by, wanted)) = replicas {
                        line["replicas"] = json!({ "confirmed": by, "wanted": wanted });
                    }
                    self.out.json(&line);
                } else {
                    if !self.result_only {
                        self.out.line(id);
                    }
                    if there {
                        complain(format_args!("job {id} was there already, nothing was changed"));
                    }
                }
                if let Some((by, wanted)) = replicas.filter(|(by, wanted)| by < wanted) {
                    if !self.json {
                        complain(format_args!("job {id} is queued, but confirmed by {by} of {wanted} replicas only"));
                    }
                    self.codes.push(UNCONFIRMED);
                }
                self.ids.push(id.to_owned());
            }
            Err(error) => {
                let (code, word) = match &error {
                    EnqueueError::Invalid(_) | EnqueueError::InvalidSql(_) => (console::USAGE, "invalid"),
                    EnqueueError::Held { .. } => (REFUSED, "held"),
                    EnqueueError::Full { .. }
                    | EnqueueError::TooLarge { .. }
                    | EnqueueError::NoRoom { .. }
                    | EnqueueError::OutOfMemory(_) => (REFUSED, "refused"),
                    EnqueueError::Refused(_) | EnqueueError::Failed(_) => (console::UNREACHABLE, "failed"),
                    EnqueueError::Unknown { .. } => (console::UNREACHABLE, "unknown"),
                };
                let advice = match &error {
                    EnqueueError::Unknown { .. } => {
                        format!("; ask with `drayman status {id}`, or submit it again with this id")
                    }
                    _ => String::new(),
                };
                self.fault(place, Some(id), code, word, &format!("{error}{advice}"));
            }
        }
    }

    fn fault(&mut self, place: usize, id: Option<&str>, code: u8, word: &str, message: &str) {
        if self.json {
            let line = self.many.then_some(place);
            self.out.json(&json!({ "line": line, "id": id, "result": word, "error": message }));
        } else if self.many {
            complain(format_args!("line {place}: {message}"));
        } else {
            complain(message);
        }
        self.codes.push(code);
    }

    fn code(&self) -> u8 {
        PRECEDENCE.into_iter().find(|code| self.codes.contains(code)).unwrap_or(console::OK)
    }
}

/// What was accepted, and of how many replicas that were to confirm it how many have.
struct Accepted {
    submitted: Submitted,
    replicas: Option<(u32, u32)>,
}

/// Who submits, as asked for: with replicas or without.
enum Way {
    Plain(Producer),
    Confirmed(ConfirmedProducer, u32),
}

impl Way {
    async fn of(store: Store, limits: Limits, args: (Option<u32>, Duration)) -> Result<Self, Failure> {
        let producer = Producer::new(store, limits);
        Ok(match args {
            (Some(replicas), patience) => Way::Confirmed(producer.confirmed_by(replicas, patience).await?, replicas),
            (None, _) => Way::Plain(producer),
        })
    }

    async fn enqueue_many(&self, jobs: Vec<NewJob>) -> Vec<Result<Accepted, EnqueueError>> {
        let plain = |submitted| Accepted { submitted, replicas: None };
        match self {
            Way::Plain(producer) => {
                producer.enqueue_many(jobs).await.into_iter().map(|result| result.map(plain)).collect()
            }
            Way::Confirmed(producer, wanted) => {
                let accepted = |confirmed: Confirmed| {
                    let (Confirmed::Enough { by, .. } | Confirmed::TooFew { by, .. }) = &confirmed;
                    Accepted { replicas: Some((*by, *wanted)), submitted: confirmed.submitted().clone() }
                };
                producer.enqueue_many(jobs).await.into_iter().map(|result| result.map(accepted)).collect()
            }
        }
    }
}

/// Submits, and waits if asked to.
pub async fn run(common: &Common, args: Submit) -> Result<u8, Failure> {
    let wait = args.wait;
    let replicas = (args.replicas, args.replicas_timeout);
    let many = args.jsonl;
    // Of one task that is waited for, standard output has the result alone.
    let result_only = !many && !common.json && wait.is_some() && args.app.is_some();
    let (out, codes, ids) = (Out::default(), vec![], vec![]);
    let mut report = Report { json: common.json, many, result_only, out, codes, ids };
    let (config, store) = if many {
        let order = order(&args)?;
        let (config, store) = common.connect().await?;
        submit_lines(&Way::of(store.clone(), config.limits.clone(), replicas).await?, &order, &mut report).await;
        (config, store)
    } else {
        // What can't be a job is refused before anything is connected to.
        let job = job(&args)?;
        let id = job.id.clone();
        let (config, store) = common.connect().await?;
        let traces = traces(&config.telemetry)?;
        let result = enqueue(&Way::of(store.clone(), config.limits.clone(), replicas).await?, job).await;
        if let Some(traces) = traces {
            traces.stop().await;
        }
        report.done(1, id.as_str(), result);
        (config, store)
    };
    if let Some(limit) = wait {
        let (ids, json) = (std::mem::take(&mut report.ids), report.json);
        let mut done = Vec::new();
        let out = &mut report.out;
        let ended = follow(&store, ids, limit, |movement| {
            match movement {
                // Standard output has the ids, or a result, alone, for scripts.
                Move::To { id, status, .. } if !json => complain(format_args!("{id} {status}")),
                Move::Over { view, told: false } if !json => complain(format_args!("{} {}", view.id, view.status())),
                _ => watch::show(out, json, movement),
            }
            if let Move::Over { view, .. } = movement
                && view.is_task()
            {
                done.extend(JobId::new(view.id.as_str()).ok());
            }
        });
        report.codes.push(ended.await?.code());
        for id in done {
            let handle = JobHandle::new(store.clone(), id).with_objects(Objects::open(&config.objects)?);
            let code = result::show(&handle, many, json, &mut report.out).await?;
            report.codes.push(code);
        }
    }
    store.close().await;
    Ok(report.code())
}

/// Starts to export traces, if a collector is configured. Nothing is logged.
fn traces(config: &TelemetryConfig) -> Result<Option<Telemetry>, Failure> {
    if config.otlp_endpoint.is_none() {
        return Ok(None);
    }
    let log = LogConfig { level: LogLevel::off(), ..LogConfig::default() };
    Telemetry::start(&log, config).map(Some).map_err(Failure::usage)
}

/// Submits a job under a span, whose trace the job carries on. The span belongs to the trace of who called this program,
/// if the environment names one.
async fn enqueue(way: &Way, mut job: NewJob) -> Result<Accepted, EnqueueError> {
    let caller = std::env::var(TRACEPARENT_VARIABLE).ok();
    let span = tracing::info_span!("submit", job = %job.id, user = %job.user);
    if let Some(caller) = &caller {
        telemetry::follow(&span, caller);
    }
    job.traceparent = telemetry::traceparent(&span).or(caller);
    way.enqueue_many(vec![job]).instrument(span).await.remove(0)
}

/// The job that the command line describes.
pub fn job(args: &Submit) -> Result<NewJob, Failure> {
    order(args)?.into_job().map_err(Failure::usage)
}

/// What the command line says.
fn order(args: &Submit) -> Result<Order, Failure> {
    let pass = match (&args.pass_file, &args.database, &args.app) {
        (Some(path), ..) => {
            let read = std::fs::read_to_string(path);
            let text = read.map_err(|fault| Failure::usage(format!("cannot read {}: {fault}", path.display())))?;
            Some(text.trim_end_matches(['\r', '\n']).to_owned())
        }
        (None, None, None) => std::env::var(config::PASS_VARIABLE).ok(),
        (None, ..) => None,
    };
    let mut order = Order {
        id: args.id.clone(),
        user: args.user.clone(),
        database: args.database.clone(),
        host: args.host.clone(),
        port: args.port,
        dbname: args.dbname.clone(),
        dbuser: args.dbuser.clone(),
        pass,
        onsuccess: args.onsuccess.clone(),
        onerror: args.onerror.clone(),
        timeout: args.timeout.clone(),
        max_attempts: args.max_attempts,
        backoff: args.backoff.clone(),
        retry_delay: args.retry_delay.clone(),
        retry_delay_max: args.retry_delay_max.clone(),
        retry_on: args.retry_on.clone(),
        idempotent: args.idempotent.then_some(true),
        run_at: args.run_at.clone(),
        delay: args.delay.clone(),
        priority: args.priority.clone(),
        unique: args.unique.clone(),
        tags: Some(args.tags.clone()).filter(|tags| !tags.is_empty()),
        app: args.app.clone(),
        op: args.op.clone(),
        encoding: args.encoding,
        deadline: args.deadline.clone(),
        ..Order::default()
    };
    if let Some(context) = &args.context {
        let fault = |fault| Failure::usage(format!("the context is no JSON: {fault}"));
        order.context = Some(serde_json::from_str(context).map_err(fault)?);
    }
    if args.jsonl {
        return Ok(order);
    }
    let told = told(args)?;
    if args.app.is_none() {
        order.query = Some(match told {
            Told::Nothing => return Err(Failure::usage("there is no query: give SQL, --file or -")),
            Told::Bytes(bytes) => {
                String::from_utf8(bytes).map_err(|_| Failure::usage("the query is not UTF-8"))?.into()
            }
            Told::Texts(texts) if texts.len() == 1 => texts[0].clone().into(),
            Told::Texts(texts) => texts.into(),
        });
        return Ok(order);
    }
    match told {
        Told::Nothing => {}
        Told::Bytes(bytes) => order.written_input = Some(bytes),
        Told::Texts([text]) if args.encoding != Some(Encoding::MsgPack) => {
            order.written_input = Some(text.clone().into_bytes());
        }
        Told::Texts([text]) => {
            let fault = |fault| Failure::usage(format!("the input is no JSON: {fault}"));
            order.input = Some(serde_json::from_str(text).map_err(fault)?);
        }
        Told::Texts(_) => return Err(Failure::usage("a task has one input")),
    }
    Ok(order)
}

/// What a job is to work on, as the command line gives it.
enum Told<'a> {
    Nothing,
    /// Of a file, or of standard input.
    Bytes(Vec<u8>),
    Texts(&'a [String]),
}

fn told(args: &Submit) -> Result<Told<'_>, Failure> {
    Ok(match (&args.file, args.sql.as_slice()) {
        (Some(path), _) => {
            let fault = |fault| Failure::usage(format!("cannot read {}: {fault}", path.display()));
            Told::Bytes(std::fs::read(path).map_err(fault)?)
        }
        (None, []) => Told::Nothing,
        (None, [dash]) if dash == "-" => {
            let mut bytes = Vec::new();
            let read = std::io::stdin().lock().take(LINE_MAX_BYTES).read_to_end(&mut bytes);
            read.map_err(|fault| Failure::usage(format!("cannot read standard input: {fault}")))?;
            Told::Bytes(bytes)
        }
        (None, texts) => Told::Texts(texts),
    })
}

/// Submits a job a line, as many as have come in one round trip. Stops when Redis does.
async fn submit_lines(way: &Way, flags: &Order, report: &mut Report) {
    let mut lines = read_lines();
    let mut waiting = Vec::new();
    while lines.recv_many(&mut waiting, CALL_MAX).await > 0 {
        let last = waiting.last().map_or(0, |(place, _)| *place);
        let mut jobs = Vec::new();
        let mut read = Vec::new();
        for (place, line) in waiting.drain(..) {
            let job = line.and_then(|line| read_order(&line)).and_then(|order| order.or(flags).into_job());
            read.push((place, job.as_ref().map(|job| job.id.clone()).map_err(String::clone)));
            jobs.extend(job.ok());
        }
        let mut results = way.enqueue_many(jobs).await.into_iter();
        let mut lost = false;
        for (place, job) in read {
            match job {
                Ok(id) => {
                    let result = results.next().expect("one result a job");
                    lost |= matches!(&result, Err(EnqueueError::Unknown { .. } | EnqueueError::Failed(_)));
                    report.done(place, id.as_str(), result);
                }
                Err(fault) => report.fault(place, None, console::USAGE, "invalid", &fault),
            }
        }
        if lost {
            complain(format_args!("stopped after line {last}; what follows it was not submitted"));
            return;
        }
    }
}

fn read_order(line: &str) -> Result<Order, String> {
    // The fault names the place, and fields or types at most: not the text, which may hold a password.
    serde_json::from_str(line).map_err(|fault| match fault.classify() {
        serde_json::error::Category::Data => format!("not a job: {}", without_values(&fault.to_string())),
        _ => "not a JSON object".to_owned(),
    })
}

/// serde repeats the value that has the wrong type; between `invalid type: ` and `, expected` it may be a secret.
fn without_values(fault: &str) -> String {
    match (fault.split_once(": "), fault.split_once(", expected")) {
        (Some((what, _)), Some((_, expected))) if what.starts_with("invalid") => format!("{what}, expected{expected}"),
        _ => fault.to_owned(),
    }
}

/// The lines of standard input, numbered, blank ones left out. Read by a thread of its own: it may block for ever.
fn read_lines() -> mpsc::Receiver<(usize, Result<String, String>)> {
    let (sender, receiver) = mpsc::channel(CALL_MAX);
    std::thread::spawn(move || {
        let mut input = std::io::stdin().lock();
        for place in 1.. {
            let mut bytes = Vec::new();
            let line = match (&mut input).take(LINE_MAX_BYTES).read_until(b'\n', &mut bytes) {
                Ok(0) => return,
                Ok(_) if bytes.len() as u64 == LINE_MAX_BYTES => Err("the line is too long".to_owned()),
                Ok(_) => String::from_utf8(bytes).map_err(|_| "the line is not UTF-8".to_owned()),
                Err(fault) => Err(format!("cannot read: {fault}")),
            };
            let broken = line.as_ref().is_err_and(|fault| !fault.contains("UTF-8"));
            let blank = line.as_ref().is_ok_and(|line| line.trim().is_empty());
            if !blank && sender.blocking_send((place, line)).is_err() || broken {
                return;
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sql(job: &NewJob) -> &SqlWork {
        let Work::Sql(work) = &job.work else { panic!("no SQL job") };
        work
    }

    fn order(line: &str) -> Order {
        read_order(line).unwrap()
    }

    #[test]
    fn a_line_wins_over_the_flags_and_names_its_database_whole() {
        let named = Order { user: Some("u".into()), database: Some("d".into()), ..Order::default() };
        let hosted = order(r#"{"user":"v","host":"h","port":1,"dbname":"n","dbuser":"r","pass":"p","timeout":"5s"}"#);
        let job = order(r#"{"query":"q"}"#).or(&named).into_job().unwrap();
        assert_eq!((job.user.as_str(), sql(&job).database.clone()), ("u", Database::Named("d".into())));
        let job = order(r#"{"query":"q","database":"d"}"#).or(&hosted).into_job().unwrap();
        assert_eq!((job.user.as_str(), sql(&job).database.clone()), ("v", Database::Named("d".into())));
        assert_eq!(job.timeout, Some(Duration::from_secs(5)));
        let whole = hosted.clone().or(&Order { query: Some("q".into()), ..named.clone() }).into_job().unwrap();
        assert!(matches!(sql(&whole).database, Database::Connection { port: 1, .. }));
        let part = order(r#"{"query":["a","b"],"host":"i"}"#).or(&hosted).into_job().unwrap();
        assert!(matches!(&sql(&part).database, Database::Connection { host, pass, .. } if host == "i" && pass == "p"));
        assert_eq!(sql(&part).query, r#"["a","b"]"#);
    }

    #[test]
    fn a_wrong_line_is_not_repeated() {
        for line in [r#"{"pass":"marker""#, r#"{"port":"marker"}"#, r#"{"user":{"marker":1}}"#, r#""marker""#] {
            let fault = read_order(line).unwrap_err();
            assert!(!fault.contains("marker"), "{fault}");
        }
        assert!(read_order(r#"{"queri":"x"}"#).unwrap_err().contains("unknown field `queri`"));
    }
}
