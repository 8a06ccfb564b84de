//! Steps that work in chunks as definitions declare them: readers, processors and writers by name, and handlers in any language between
//! them.
//!
//! An item is the text of a JSON value. It is not taken apart where nobody looks into it, so its numbers keep their digits.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use queue_core::ids::{App, Op, Pool};
use queue_core::model::batch::Row;
use queue_core::model::chunk::{
    ChunkInput, Condition, ItemProcessor, ItemReader, ItemWriter, RowsTo, built_in, is_inside,
};
use queue_core::model::task::{Encoding, Payload};
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value, json};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use self::handed::{Handed, Hands, Processed};
use super::files::{columns_to, csv_objects, json_values, json_values_to};
use super::position::Identity;
use super::sql::{sql_query, sql_to};
use super::{Checkpoint, Chunks, Reader, Writer, items, list_to};
use crate::execute::function::{Context, on_its_own_thread};
use crate::execute::handlers::{Handlers, Registration};
use crate::execute::rows::RowsOf;
use crate::execute::sql::chunk::rendered;
use crate::execute::sql::{SqlExecutor, chunk};
use crate::execute::task::{Desk, Handler, Outcome, Output, Problem, RowSink, Task};

mod handed;

/// How long a chunk that is under way may take to be written, once the step is told to stop.
const LAST_CHUNK: Duration = Duration::from_secs(3);

/// The text of a JSON value.
type Item = Box<RawValue>;

/// Runs them.
pub struct Declared {
    sql: Arc<SqlExecutor>,
    /// Where files are.
    folder: Option<PathBuf>,
    /// The handlers beside which it runs: they may be named as processors and writers.
    handlers: OnceLock<Weak<Handlers>>,
}

impl Declared {
    /// On the databases of a configuration, and on files in a folder.
    pub fn new(sql: Arc<SqlExecutor>, folder: Option<PathBuf>) -> Self {
        Self { sql, folder, handlers: OnceLock::new() }
    }

    /// As a handler of its own, for steps that name no other one.
    pub fn registration(self: Arc<Self>, concurrency: NonZeroUsize) -> Registration {
        let (app, op) = built_in().expect("both are valid names");
        Registration { concurrency: Some(concurrency), ..Registration::new(app, op, self) }
    }

    /// Beside which handlers it runs.
    pub fn beside(&self, handlers: &Arc<Handlers>) {
        let _ = self.handlers.set(Arc::downgrade(handlers));
    }

    fn file(&self, name: &str) -> Result<PathBuf, Problem> {
        let Some(folder) = &self.folder else {
            return Err(Problem::fail("this worker has no folder for files (chunks.folder)"));
        };
        match is_inside(name) {
            true => Ok(folder.join(name)),
            false => Err(Problem::fail(format!("the file {name:?} is no path within the workers' folder"))),
        }
    }
}

#[async_trait]
impl Handler for Declared {
    async fn run(&self, task: Task, desk: Arc<dyn Desk>, stop: CancellationToken) -> Outcome {
        let input = match task.input.read::<ChunkInput>() {
            Ok(input) => input,
            Err(error) => return Outcome::Failed(Problem::fail(format!("its input is no chunk step: {error}"))),
        };
        let handlers = self.handlers.get().and_then(Weak::upgrade);
        // Whoever drops this interrupts what its thread waits for.
        let hard_stop = CancellationToken::new();
        let _interrupted = hard_stop.clone().drop_guard();
        let job = task.job.clone();
        let context = Context::new(task, desk, stop.clone(), Instant::now());
        let unwell = Unwell::default();
        let step = Step {
            context,
            input,
            handlers,
            hard_stop: hard_stop.clone(),
            unwell: unwell.clone(),
            sink: SharedSink::default(),
        };
        let pieces = match step.pieces(self) {
            Ok(pieces) => pieces,
            Err(problem) => return Outcome::Failed(problem),
        };
        let working = on_its_own_thread(job, move || step.run(pieces));
        let stopping = async {
            stop.cancelled().await;
            tokio::time::sleep(LAST_CHUNK).await;
            hard_stop.cancel();
            std::future::pending::<()>().await;
        };
        let ended = tokio::select! {
            ended = working => ended,
            () = stopping => None,
        };
        match (ended, unwell.take()) {
            (Some(Ok(result)), _) => Outcome::Done(Output { result: Some(result), ..Output::default() }),
            (_, Some(reason)) => Outcome::NotReady(reason),
            (Some(Err(problem)), None) => Outcome::Failed(problem),
            (None, None) => Outcome::Failed(Problem::retry("the worker stopped")),
        }
    }
}

/// Why a handler that was named could not begin, if that is why the step ends.
#[derive(Clone, Default)]
struct Unwell(Arc<Mutex<Option<String>>>);

impl Unwell {
    fn is(&self, reason: &str) -> Problem {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason.to_owned());
        Problem::retry(reason)
    }

    fn take(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// One attempt at a step.
struct Step {
    context: Context,
    input: ChunkInput,
    handlers: Option<Arc<Handlers>>,
    /// Interrupts what is under way; the context's own stop lets the present chunk come to its end.
    hard_stop: CancellationToken,
    unwell: Unwell,
    /// Where rows go, if it loads some.
    sink: SharedSink,
}

type SharedSink = Arc<Mutex<Option<Box<dyn RowSink>>>>;
type BoxReader = Box<dyn Reader<Item = Item> + Send>;
type BoxWriter = Box<dyn Writer<Item = Item> + Send>;
type Keep = Box<dyn Fn(&Item) -> Result<Option<Item>, Problem> + Send>;

/// What it is put together from.
struct Pieces {
    reader: BoxReader,
    process: Process,
    writer: BoxWriter,
}

enum Process {
    Each(Keep),
    Handed(Box<Hands>),
}

impl Step {
    fn pieces(&self, declared: &Declared) -> Result<Pieces, Problem> {
        let process = match &self.input.work.processor {
            None => Process::Each(Box::new(|item| Ok(Some(item.clone())))),
            Some(ItemProcessor::Filter { keep }) => {
                let keep = keep.clone();
                Process::Each(Box::new(move |item| Ok(holds(&keep, item)?.then(|| item.clone()))))
            }
            Some(ItemProcessor::Handler { app, op }) => Process::Handed(Box::new(self.hands(app, op)?)),
        };
        Ok(Pieces { reader: self.reader(declared)?, process, writer: self.writer(declared)? })
    }

    fn run(self, Pieces { reader, process, writer }: Pieces) -> Result<Payload, Problem> {
        let work = &self.input.work;
        let chunks = Chunks::of(work.chunk_size).skip_limit(work.skip_limit);
        let ended = match process {
            Process::Each(keep) => chunks.run_through(&self.context, reader, keep, writer),
            Process::Handed(hands) => {
                let (attempts, pause) = (work.item_attempts.get(), work.item_delay);
                let reader = Processed::new(reader, *hands, work.chunk_size.get(), attempts, pause);
                chunks.run_through(&self.context, reader, |made| made.clone(), writer)
            }
        }?;
        let sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(sink) = sink {
            Handle::current().block_on(sink.end())?;
        }
        let mut result = json!(ended.counts);
        if matches!(work.writer, ItemWriter::List) {
            result["items"] = ended.writer;
        }
        Payload::json(&result).map_err(|error| Problem::fail(error.to_string()))
    }

    fn reader(&self, declared: &Declared) -> Result<BoxReader, Problem> {
        Ok(match &self.input.work.reader {
            ItemReader::List { items: list } => {
                let raw = list.iter().map(to_raw_value).collect::<Result<Vec<Item>, _>>();
                let list: Arc<[Item]> = raw.map_err(|error| Problem::fail(error.to_string()))?.into();
                let make = move || {
                    let list = list.clone();
                    (0..list.len()).map(move |at| list[at].clone())
                };
                Box::new(items(make))
            }
            ItemReader::Csv { file } => Box::new(csv_objects(declared.file(file)?, file)),
            ItemReader::JsonLines { file } => Box::new(json_values(declared.file(file)?, file)),
            ItemReader::Sql { database, query, key, compare } => {
                let database = self.database(declared, database)?;
                let query = self.sql(&database, query)?;
                let reader = sql_query::<Item>(&database, &query, key, self.hard_stop.clone());
                Box::new(if *compare { reader } else { reader.uncompared() })
            }
        })
    }

    fn writer(&self, declared: &Declared) -> Result<BoxWriter, Problem> {
        Ok(match &self.input.work.writer {
            ItemWriter::List => Box::new(list_to::<Item>()),
            ItemWriter::Csv { file, columns } => Box::new(columns_to(declared.file(file)?, file, columns.clone())),
            ItemWriter::JsonLines { file } => Box::new(json_values_to(declared.file(file)?, file)),
            ItemWriter::Sql { database, query } => {
                let database = self.database(declared, database)?;
                let query = self.sql(&database, query)?;
                Box::new(sql_to::<Item>(&database, &query, self.hard_stop.clone()))
            }
            ItemWriter::Handler { app, op } => Box::new(Handed(self.hands(app, op)?)),
            ItemWriter::Rows(to) => {
                let params = Payload::json(&self.input.params).map_err(|error| Problem::fail(error.to_string()))?;
                Box::new(Loading { context: self.context.clone(), to: (**to).clone(), params, sink: self.sink.clone() })
            }
        })
    }

    fn database(&self, declared: &Declared, name: &str) -> Result<chunk::Database, Problem> {
        declared.sql.database(name, self.context.user()).map_err(Problem::fail)
    }

    fn sql(&self, database: &chunk::Database, text: &str) -> Result<String, Problem> {
        rendered(text, database.dialect(), self.context.job().as_str(), &self.input.params)
    }

    /// A handler that this worker has.
    fn hands(&self, app: &App, op: &Op) -> Result<Hands, Problem> {
        let handlers = self.handlers.as_ref().ok_or_else(|| Problem::retry("the worker stops"))?;
        let pool = Pool::of_handler(app, op);
        let registered = handlers.get(&pool);
        let registered = registered.ok_or_else(|| Problem::fail(format!("this worker has no handler for {pool}")))?;
        let task = self.context.task();
        let params = Payload::json(&self.input.params).map_err(|error| Problem::fail(error.to_string()))?;
        let of = RowsOf {
            batch: task.job.clone(),
            user: task.user.clone(),
            app: app.clone(),
            op: op.clone(),
            encoding: Encoding::Json,
            context: Some(params),
            fence: task.fence,
            attempt: task.attempt,
            max_attempts: task.max_attempts,
            timeout: registered.timeout.map_or(task.timeout, |own| own.min(task.timeout)),
            traceparent: task.traceparent.clone(),
        };
        Ok(Hands {
            handler: registered.handler.clone(),
            stop_grace: registered.stop_grace,
            of,
            stop: self.context.stop().clone(),
            hard_stop: self.hard_stop.clone(),
            unwell: self.unwell.clone(),
        })
    }
}

/// Whether all conditions hold of an item.
fn holds(keep: &[Condition], item: &Item) -> Result<bool, Problem> {
    let fields: Map<String, Value> =
        serde_json::from_str(item.get()).map_err(|error| Problem::fail(format!("the item is no object: {error}")))?;
    let number = |value: &Value| match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let is_met = |condition: &Condition| {
        let value = fields.get(&condition.field).unwrap_or(&Value::Null);
        let is_allowed = |allowed: &Vec<Value>| allowed.iter().any(|one| one == value || text(one) == text(value));
        let bound = |bound: &serde_json::Number, reaches: fn(f64, f64) -> bool| {
            number(value).zip(bound.as_f64()).is_some_and(|(value, bound)| reaches(value, bound))
        };
        condition.values.as_ref().is_none_or(is_allowed)
            && condition.min.as_ref().is_none_or(|min| bound(min, |value, min| value >= min))
            && condition.max.as_ref().is_none_or(|max| bound(max, |value, max| value <= max))
    };
    Ok(keep.iter().all(is_met))
}

/// Hands items over as rows of the step's batch. Their lines are their numbers among what is written.
struct Loading {
    context: Context,
    to: RowsTo,
    params: Payload,
    sink: SharedSink,
}

impl Writer for Loading {
    type Item = Item;

    /// Rows count once all are there: whoever takes over hands over all of them.
    fn target(&self) -> Option<Identity> {
        None
    }

    fn open(&mut self, _: &Checkpoint) -> Result<Option<Checkpoint>, Problem> {
        let sink = self.context.load_blocking(&self.to, self.params.clone())?;
        *self.sink.lock().unwrap_or_else(PoisonError::into_inner) = Some(sink);
        Ok(None)
    }

    fn write(&mut self, items: &[Item], checkpoint: &mut Checkpoint) -> Result<(), Problem> {
        let first = checkpoint.counts.write_count - items.len() as u64 + 1;
        let row = |(line, item): (u64, &Item)| Row { line, input: item.get().as_bytes().to_vec() };
        let rows = (first..).zip(items).map(row).collect();
        let mut sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner);
        let sink = sink.as_mut().ok_or_else(|| Problem::retry("its batch is not open"))?;
        Handle::current().block_on(sink.add(rows))
    }
}
