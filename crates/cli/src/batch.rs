//! `drayman batch`: batches of rows, handed over from files, watched, ended, and read again.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use comfy_table::CellAlignment;
use console::{Common, Failure, Out, complain, one_line};
use queue_core::Store;
use queue_core::batch::{BatchError, BatchFilter, BatchView, Batches, CONTEXT_MAX_BYTES, NewBatch, RowWork};
use queue_core::config::{self, ClientConfig};
use queue_core::follow::Move;
use queue_core::ids::JobId;
use queue_core::inspect::Kind;
use queue_core::model::Status;
use queue_core::model::retry::RetryChoice;
use queue_core::model::task::{Encoding, File, Payload};
use queue_core::objects::{Objects, ObjectsError};
use queue_core::producer::Database;
use serde_json::{Value, json};
use tokio::io::AsyncWrite;

use crate::cli::{FAILED, NOT_OVER, REFUSED};
use crate::follow::{away, follow};
use crate::list::{show as show_table, table};
use args::{Abort, Append, Batch, Command, Files, List, Release, StatusArgs, Submit};
use progress::Progress;

pub mod args;
mod load;
mod progress;
mod rows;
mod source;

/// How often counters are looked at while somebody waits for a batch.
const LOOK: Duration = Duration::from_millis(500);

/// Does what is asked for.
pub async fn run(common: &Common, batch: Batch) -> Result<u8, Failure> {
    let mut out = Out::default();
    match batch.command {
        Command::Submit(args) => submit(common, *args, &mut out).await,
        Command::Append(args) => append(common, args, &mut out).await,
        Command::Release(args) => release(common, args, &mut out).await,
        Command::Abort(args) => abort(common, args, &mut out).await,
        Command::Status(args) => status(common, args, &mut out).await,
        Command::Rows(args) => rows::rows(common, args, &mut out).await,
        Command::Files(args) => files(common, args, &mut out).await,
        Command::List(args) => list(common, args, &mut out).await,
        Command::Export(args) => rows::export(common, args).await,
    }
}

async fn connect(common: &Common) -> Result<(ClientConfig, Store, Batches), Failure> {
    let (config, store) = common.connect().await?;
    let batches = Batches::new(store.clone(), config.limits.clone()).keeping(config.retention.finished);
    Ok((config, store, batches))
}

/// What a call ends with that was not answered as it should be.
fn failure(error: BatchError) -> Failure {
    let code = match error {
        BatchError::Redis(error) => return error.into(),
        BatchError::Objects(error @ ObjectsError::Config(_)) => return error.into(),
        BatchError::InvalidId(_) | BatchError::Invalid(_) | BatchError::Row { .. } => console::USAGE,
        BatchError::NotFound(_) | BatchError::NoFile(_) => console::NOT_FOUND,
        BatchError::TooMany { .. }
        | BatchError::NotHeld(_)
        | BatchError::Over(_)
        | BatchError::Differs
        | BatchError::NoRoom { .. }
        | BatchError::Refused(_) => REFUSED,
        BatchError::Unreadable { .. } | BatchError::Objects(_) => console::UNREACHABLE,
    };
    Failure::new(code, one_line(&error.to_string()))
}

async fn submit(common: &Common, args: Submit, out: &mut Out) -> Result<u8, Failure> {
    // What can't be a batch is refused before anything is connected to or read.
    let new = new_batch(&args)?;
    let source = source::open(&args.source)?;
    let (config, store, batches) = connect(common).await?;
    let id = new.id.clone();
    let loader = batches.open(new).map_err(failure)?;
    let loaded =
        load::load(loader, source.read(config.limits.max_row_bytes.get()), "submitted").await.map_err(|failure| {
            let advice = match failure.code {
                console::UNREACHABLE => {
                    format!("; ask with `drayman batch status {id}`, or submit it again with --id {id}")
                }
                _ => String::new(),
            };
            Failure::new(failure.code, format!("{}{advice}", failure.message))
        })?;
    if common.json {
        let result = if loaded.before.is_some() { "already_there" } else { "submitted" };
        out.json(&json!({ "id": id, "result": result, "rows": loaded.rows }));
    } else {
        out.line(&id);
        if loaded.before.is_some() {
            complain(format_args!("batch {id} was there already, nothing was changed"));
        }
    }
    let Some(limit) = args.wait else { return Ok(console::OK) };
    let (view, code) = wait(&store, &batches, &id, limit, common.json).await?;
    match common.json {
        true => out.json(&as_json(&view)),
        false => complain(format_args!("{id} {}", summary(&view))),
    }
    Ok(code)
}

/// The batch that the command line describes.
fn new_batch(args: &Submit) -> Result<NewBatch, Failure> {
    let work = match (&args.app, &args.op, &args.statement) {
        (Some(app), Some(op), _) => RowWork::Handler { app: app.clone(), op: op.clone() },
        (_, _, Some(statement)) => RowWork::Sql { statement: statement.clone(), database: database(args)? },
        _ => return Err(Failure::usage("give --app and --op, or --statement")),
    };
    let context = args.context.as_ref().map(|text| {
        let payload = Payload { encoding: Encoding::Json, bytes: text.clone().into_bytes() };
        let fault = |fault| Failure::usage(format!("the context is no JSON: {fault}"));
        payload.read::<serde::de::IgnoredAny>().map_err(fault)?;
        match text.len() {
            0..=CONTEXT_MAX_BYTES => Ok(payload),
            bytes => {
                Err(Failure::usage(format!("the context has {bytes} bytes, at most {CONTEXT_MAX_BYTES} are allowed")))
            }
        }
    });
    let file = &args.source.file;
    let new = NewBatch {
        context: context.transpose()?,
        held: args.held,
        row_timeout: args.row_timeout,
        retry: RetryChoice {
            max_attempts: args.max_attempts,
            backoff: args.backoff,
            delay: args.retry_delay,
            delay_max: args.retry_delay_max,
            ..RetryChoice::default()
        },
        priority: args.priority,
        keep: args.keep,
        tags: args.tags.clone(),
        source: (!source::is_stdin(file)).then(|| name_of(file)),
        ..NewBatch::of(args.user.clone(), work)
    };
    Ok(match (&args.id, &args.key) {
        (Some(id), _) => NewBatch { id: id.clone(), ..new },
        (_, Some(key)) => new.keyed(key),
        _ => new,
    })
}

/// A file's own name: where it lies on this machine says nothing to others.
fn name_of(file: &Path) -> String {
    file.file_name().unwrap_or(file.as_os_str()).to_string_lossy().into_owned()
}

fn database(args: &Submit) -> Result<Database, Failure> {
    match (&args.database, &args.host, &args.dbname, &args.dbuser) {
        (Some(name), ..) => Ok(Database::Named(name.clone())),
        (None, Some(host), Some(dbname), Some(dbuser)) => Ok(Database::Connection {
            host: host.clone(),
            port: args.port.unwrap_or(5432),
            dbname: dbname.clone(),
            dbuser: dbuser.clone(),
            pass: match &args.pass_file {
                Some(path) => {
                    let fault = |fault| Failure::usage(format!("cannot read {}: {fault}", path.display()));
                    let text = std::fs::read_to_string(path).map_err(fault)?;
                    text.trim_end_matches(['\r', '\n']).to_owned()
                }
                None => std::env::var(config::PASS_VARIABLE).unwrap_or_default(),
            },
        }),
        _ => Err(Failure::usage("a statement needs --database, or --host, --dbname and --dbuser")),
    }
}

async fn append(common: &Common, args: Append, out: &mut Out) -> Result<u8, Failure> {
    let source = source::open(&args.source)?;
    let (config, _, batches) = connect(common).await?;
    let loader = batches.append(&args.id, args.key.as_deref(), args.release).await.map_err(failure)?;
    let loaded = load::load(loader, source.read(config.limits.max_row_bytes.get()), "appended").await?;
    let was_there = loaded.before.is_some();
    if was_there && !common.json {
        complain("rows were appended under this key before, nothing was changed");
    }
    let result = if was_there { "already_there" } else { "appended" };
    tell(&batches, &args.id, result, common.json, out).await
}

async fn release(common: &Common, args: Release, out: &mut Out) -> Result<u8, Failure> {
    let (_, _, batches) = connect(common).await?;
    let release = batches.release(&args.id).await.map_err(failure)?;
    if release.before.is_some() && !common.json {
        complain("it was released before, nothing was changed");
    }
    let result = if release.before.is_some() { "already_released" } else { "released" };
    tell(&batches, &args.id, result, common.json, out).await
}

/// Shows what was done to a batch, and how it stands now.
async fn tell(batches: &Batches, id: &JobId, result: &str, json: bool, out: &mut Out) -> Result<u8, Failure> {
    let view = batches.view(id).await.map_err(failure)?;
    match json {
        true => out.json(&json!({ "id": id, "result": result, "status": view.status, "counts": view.counts })),
        false => out.line(format_args!("{id} {}", summary(&view))),
    }
    Ok(console::OK)
}

async fn abort(common: &Common, args: Abort, out: &mut Out) -> Result<u8, Failure> {
    let (_, _, batches) = connect(common).await?;
    let mut code = console::OK;
    for id in &args.ids {
        let view = match batches.abort(id).await {
            Ok(view) => view,
            Err(error @ BatchError::NotFound(_)) => {
                complain(error);
                code = console::NOT_FOUND;
                continue;
            }
            Err(error) => return Err(failure(error)),
        };
        // One that had ended stays as it was, and so does one of which only the files are missing.
        let result = if view.status == Status::Cancelled || view.counts.aborted > 0 { "aborted" } else { "too_late" };
        match common.json {
            true => out.json(&json!({ "id": id, "result": result, "status": view.status, "counts": view.counts })),
            false => out.line(format_args!("{id} {}", summary(&view))),
        }
    }
    Ok(code)
}

async fn status(common: &Common, args: StatusArgs, out: &mut Out) -> Result<u8, Failure> {
    let (_, store, batches) = connect(common).await?;
    let id = &args.id;
    let (view, code) = match (args.watch, args.wait) {
        (true, _) => return watch(&batches, id, common.json, out).await,
        (false, Some(limit)) => wait(&store, &batches, id, limit, true).await?,
        (false, None) => (batches.view(id).await.map_err(failure)?, console::OK),
    };
    match common.json {
        true => out.json(&as_json(&view)),
        false => show(&view, out),
    }
    Ok(code)
}

/// Waits until a batch is over or the time is, with a bar on a terminal; without one its moves are told, unless they are to be left out.
async fn wait(
    store: &Store,
    batches: &Batches,
    id: &JobId,
    limit: Option<Duration>,
    quiet: bool,
) -> Result<(BatchView, u8), Failure> {
    let progress = Progress::of_work();
    let is_told = !quiet && !progress.is_shown();
    let following = follow(store, [id.to_string()], limit, |movement| match movement {
        Move::To { id, status, .. } if is_told => complain(format_args!("{id} {status}")),
        _ => {}
    });
    tokio::pin!(following);
    let mut look = tokio::time::interval(LOOK);
    let ended = loop {
        tokio::select! {
            ended = &mut following => break ended?,
            // A Redis that is away is told of by who follows.
            _ = look.tick(), if progress.is_shown() => if let Ok(view) = batches.view(id).await { progress.work(&view) },
        }
    };
    progress.end();
    let view = batches.view(id).await.map_err(failure)?;
    if ended.open > 0 && !view.is_over() {
        complain(format_args!("batch {id} is not over"));
    }
    let code = match view.status {
        status if !status.is_final() => NOT_OVER,
        Status::Done => console::OK,
        _ => FAILED,
    };
    Ok((view, code))
}

/// Shows a line whenever the counters have moved.
async fn watch(batches: &Batches, id: &JobId, json: bool, out: &mut Out) -> Result<u8, Failure> {
    let mut shown = None;
    let mut away_since = None;
    let mut look = tokio::time::interval(LOOK);
    while !out.is_gone() {
        look.tick().await;
        let view = match batches.view(id).await {
            Ok(view) => view,
            Err(BatchError::Redis(error)) => {
                away(&error, &mut away_since)?;
                continue;
            }
            Err(error) => return Err(failure(error)),
        };
        away_since = None;
        let stand = (view.status, view.finishing, view.counts);
        if shown.replace(stand) != Some(stand) {
            let at = humantime::format_rfc3339_millis(SystemTime::now());
            match json {
                true => {
                    out.json(&json!({ "at": at.to_string(), "id": id, "status": view.status, "counts": view.counts }))
                }
                false => out.line(format_args!("{at}  {}", summary(&view))),
            }
        }
        if view.is_over() {
            return Ok(if view.status == Status::Done { console::OK } else { FAILED });
        }
    }
    Ok(console::OK)
}

/// How a batch stands, in a few words.
pub fn summary(view: &BatchView) -> String {
    let counts = &view.counts;
    let parts = [
        (counts.done, "done"),
        (counts.skipped, "of them skipped"),
        (counts.failed, "failed"),
        (counts.aborted, "aborted"),
        (counts.pending, "pending"),
    ];
    let parts = parts.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!(", {count} {what}"));
    let finishing = if view.finishing { ", its files are being assembled" } else { "" };
    format!("{}: {} rows{}{finishing}", view.status, counts.rows, parts.collect::<String>())
}

/// What `drayman status` shows of a batch.
pub async fn show_by_id(batches: &Batches, id: &str, json: bool, out: &mut Out) -> Result<(), Failure> {
    let id = JobId::new(id).map_err(Failure::usage)?;
    let view = batches.view(&id).await.map_err(failure)?;
    match json {
        true => out.json(&as_json(&view)),
        false => show(&view, out),
    }
    Ok(())
}

/// A batch as the other kinds of jobs are shown.
fn as_json(view: &BatchView) -> Value {
    let mut object = json!(view);
    object["kind"] = Kind::Batch.as_str().into();
    object
}

/// Shows all about a batch.
fn show(view: &BatchView, out: &mut Out) {
    let mut line = |name: &str, text: &str| out.line(format_args!("{name:<14}{}", one_line(text)));
    line("batch", &view.id);
    line("user", &view.user);
    line("work", &work_of(view));
    line(
        "status",
        &if view.finishing { format!("{}, files are being assembled", view.status) } else { view.status.to_string() },
    );
    if let Some(reason) = &view.reason {
        line("reason", reason);
    }
    let counts = &view.counts;
    line("rows", &counts.rows.to_string());
    for (name, count) in
        [("pending", counts.pending), ("done", counts.done), ("failed", counts.failed), ("aborted", counts.aborted)]
    {
        let percent = if counts.rows == 0 { 0.0 } else { 100.0 * count as f64 / counts.rows as f64 };
        let skipped = match name {
            "done" if counts.skipped > 0 => format!(", {} of them skipped", counts.skipped),
            _ => String::new(),
        };
        line(name, &format!("{count} ({percent:.1} %){skipped}"));
    }
    let times = [("submitted", &view.created_at), ("started", &view.started_at), ("ended", &view.ended_at)];
    for (name, text) in times.into_iter().chain([("source", &view.source)]) {
        if let Some(text) = text {
            line(name, text);
        }
    }
    if !view.tags.is_empty() {
        line("tags", &view.tags.join(", "));
    }
    line("bytes", &view.bytes.to_string());
    for (name, file) in &view.files {
        line("file", &format!("{name}, {} bytes", file.bytes));
    }
}

fn work_of(view: &BatchView) -> String {
    match (&view.app, &view.op) {
        (Some(app), Some(op)) => format!("{app}.{op}"),
        _ => "sql".into(),
    }
}

async fn files(common: &Common, args: Files, out: &mut Out) -> Result<u8, Failure> {
    let (config, _, batches) = connect(common).await?;
    let Some(name) = &args.get else {
        let view = batches.view(&args.id).await.map_err(failure)?;
        list_files(&view.files, common.json, out);
        if !view.is_over() {
            complain(format_args!("batch {} is {}: its files are there once it is over", args.id, view.status));
        }
        return Ok(console::OK);
    };
    let batches = batches.with_objects(Objects::open(&config.objects)?);
    if args.output.as_os_str() == "-" {
        let copied = batches.file(&args.id, name, &mut Stdout).await;
        return copied.map(|_| console::OK).map_err(failure);
    }
    let whole = Whole::new(&args.output)?;
    let mut file = tokio::fs::File::from_std(whole.file()?);
    batches.file(&args.id, name, &mut file).await.map_err(failure)?;
    whole.done()
}

fn list_files(files: &BTreeMap<String, File>, json: bool, out: &mut Out) {
    let mut rows = table(&["BYTES", "NAME"]);
    for (name, file) in files {
        match json {
            true => out.json(&json!({ "name": name, "bytes": file.bytes, "object": file.object })),
            false => _ = rows.add_row([file.bytes.to_string(), one_line(name)]),
        }
    }
    if !json {
        show_table(&rows, out);
    }
}

/// A file that is written beside its place, and stands there once it is whole.
struct Whole<'a> {
    path: &'a Path,
    beside: PathBuf,
}

impl<'a> Whole<'a> {
    fn new(path: &'a Path) -> Result<Self, Failure> {
        let mut name =
            path.file_name().ok_or_else(|| Failure::usage(format!("{} names no file", path.display())))?.to_owned();
        name.push(".part");
        Ok(Self { path, beside: path.with_file_name(name) })
    }

    fn fault(&self, error: io::Error) -> Failure {
        Failure::usage(format!("cannot write {}: {error}", self.path.display()))
    }

    fn file(&self) -> Result<std::fs::File, Failure> {
        std::fs::File::create(&self.beside).map_err(|error| self.fault(error))
    }

    fn done(self) -> Result<u8, Failure> {
        std::fs::rename(&self.beside, self.path).map_err(|error| self.fault(error))?;
        Ok(console::OK)
    }
}

impl Drop for Whole<'_> {
    fn drop(&mut self) {
        // It is not there any more if all went well.
        let _ = std::fs::remove_file(&self.beside);
    }
}

/// Standard output. Who reads it may go at any time.
struct Stdout;

impl AsyncWrite for Stdout {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(match io::stdout().lock().write_all(bytes) {
            Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error),
            _ => Ok(bytes.len()),
        })
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(match io::stdout().lock().flush() {
            Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error),
            _ => Ok(()),
        })
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(context)
    }
}

async fn list(common: &Common, args: List, out: &mut Out) -> Result<u8, Failure> {
    let (_, _, batches) = connect(common).await?;
    let filter = BatchFilter { app: args.app, op: args.op, user: args.user, status: args.status, age: args.age };
    let mut views = batches.list(&filter, args.limit.saturating_add(1)).await.map_err(failure)?;
    let more = views.len() > args.limit;
    views.truncate(args.limit);
    if common.json {
        views.iter().for_each(|view| out.json(&as_json(view)));
    } else {
        let mut rows =
            table(&["ID", "USER", "WORK", "STATUS", "ROWS", "PENDING", "DONE", "FAILED", "ABORTED", "SUBMITTED"]);
        for column in 4..=8 {
            rows.column_mut(column).expect("a column of the header").set_cell_alignment(CellAlignment::Right);
        }
        for view in &views {
            let counts = &view.counts;
            let numbers =
                [counts.rows, counts.pending, counts.done, counts.failed, counts.aborted].map(|n| n.to_string());
            let [id, user, work] = [&view.id, &view.user, &work_of(view)].map(|text| one_line(text));
            let at = view.created_at.as_deref().map(one_line).unwrap_or_default();
            rows.add_row([id, user, work, view.status.to_string()].into_iter().chain(numbers).chain([at]));
        }
        show_table(&rows, out);
    }
    if more {
        complain(format_args!("there are more than {}: see --limit", args.limit));
    }
    Ok(console::OK)
}
