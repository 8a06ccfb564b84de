//! From a claimed file to a batch.

use std::fs::OpenOptions;
use std::io::{self, BufReader, BufWriter, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use queue_core::batch::{BatchError, Batches, Loader, NewBatch, RowWork};
use queue_core::config::Limits;
use queue_core::model::retry::RetryChoice;
use queue_core::model::task::Payload;
use queue_core::producer::{Database, Producer};
use queue_core::store::Store;
use rows::{BadLine, RowError, RowSource};
use serde_json::json;
use tokio::sync::Semaphore;

use crate::check::{Changes, check};
use crate::claim::{Claim, Verdict};
use crate::config::{BadLines, FolderConfig, Format};
use crate::place::shown;

/// So much of a bad line is reported.
const BAD_TEXT_BYTES: usize = 1_000;
/// So many bad lines are reported; more are counted.
const BAD_LINES_MAX: u64 = 10_000;

/// Why a file is no batch.
#[derive(Debug)]
pub enum Trouble {
    /// It can't be one.
    Bad(String),
    /// Not now.
    Later(String),
}

/// What is needed to hand files over.
#[derive(Debug, Clone)]
pub struct Means {
    /// The connection.
    pub store: Store,
    /// Submits batches.
    pub batches: Batches,
    /// Submits questions to checkers.
    pub producer: Producer,
    /// What a batch and a row may have.
    pub limits: Limits,
    /// So many files are read at the same time.
    pub turns: Arc<Semaphore>,
}

/// Makes a batch of the file. Doing it again with the same claim makes no other.
pub async fn hand_over(claim: &Claim, config: &FolderConfig, means: &Means) -> Result<Verdict, Trouble> {
    if claim.name().to_str().is_none() {
        return Err(Trouble::Bad("its name is not UTF-8".into()));
    }
    let format = format(claim, config)?;
    let changes = match &config.checker {
        Some(checker) => check(claim, config, checker, &means.store, &means.producer).await?,
        None => Changes::default(),
    };
    let _turn = means.turns.acquire().await.map_err(|_| Trouble::Later("it has no turn".into()))?;
    let file = claim.open().map_err(unreadable)?;
    let most = usize::try_from(means.limits.max_row_bytes.get()).unwrap_or(usize::MAX);
    let mut loader = means.batches.open(new_batch(claim, config, changes)?).map_err(trouble)?;
    let mut pieces = rows::pieces(move || RowSource::new(format, BufReader::new(file), most));
    let mut bad = BadReport::of(claim);
    while let Some(piece) = pieces.recv().await {
        match piece {
            Ok(rows) => {
                for row in rows {
                    loader.push(row).await.map_err(trouble)?;
                }
            }
            Err(RowError::Bad(line)) if config.bad_lines == BadLines::Skip => match bad.add(&line) {
                Ok(()) => {}
                Err(error) => {
                    return taken_back(loader, Trouble::Later(format!("bad lines can't be reported: {error}"))).await;
                }
            },
            Err(RowError::Bad(line) | RowError::Lost(line)) => {
                return taken_back(loader, Trouble::Bad(line.to_string())).await;
            }
            Err(RowError::Io(error)) => return taken_back(loader, unreadable(error)).await,
        }
    }
    let bad_lines = match bad.end() {
        Ok(bad_lines) => bad_lines,
        Err(error) => return taken_back(loader, Trouble::Later(format!("bad lines can't be reported: {error}"))).await,
    };
    if let (0, Some(first)) = (loader.rows(), bad.first) {
        return taken_back(loader, Trouble::Bad(format!("none of its lines can be used: {first}"))).await;
    }
    let loaded = loader.finish().await.map_err(trouble)?;
    Ok(Verdict::Good { rows: loaded.rows, bad_lines })
}

/// A file that nobody may read, or that is none, is bad. All else is the machine's fault, and may pass.
pub fn unreadable(error: io::Error) -> Trouble {
    let text = format!("it can't be read: {error}");
    match error.kind() {
        ErrorKind::PermissionDenied | ErrorKind::InvalidInput | ErrorKind::NotFound => Trouble::Bad(text),
        _ => Trouble::Later(text),
    }
}

async fn taken_back<T>(loader: Loader, trouble: Trouble) -> Result<T, Trouble> {
    loader.give_up().await;
    Err(trouble)
}

fn format(claim: &Claim, config: &FolderConfig) -> Result<rows::Format, Trouble> {
    let ending = claim.name().extension().map(|ending| ending.to_string_lossy().to_ascii_lowercase());
    let format = match (config.format, ending.as_deref()) {
        (Some(format), _) => format,
        (None, Some("csv")) => Format::Csv,
        (None, Some("jsonl" | "ndjson")) => Format::Jsonl,
        (None, Some("txt")) => Format::Lines,
        _ => {
            return Err(Trouble::Bad(
                "its name ends with none of .csv, .jsonl, .ndjson, .txt, and no format is configured".into(),
            ));
        }
    };
    Ok(match format {
        Format::Csv => rows::Format::Csv { delimiter: rows::delimiter(config.delimiter).unwrap_or(b',') },
        Format::Jsonl => rows::Format::JsonLines,
        Format::Lines => rows::Format::Lines,
    })
}

fn new_batch(claim: &Claim, config: &FolderConfig, changes: Changes) -> Result<NewBatch, Trouble> {
    let work = match (changes.app.or_else(|| config.app.clone()), changes.op.or_else(|| config.op.clone())) {
        (Some(app), Some(op)) => RowWork::Handler { app, op },
        _ => match (&config.statement, &config.database) {
            (Some(statement), Some(name)) => {
                RowWork::Sql { statement: statement.clone(), database: Database::Named(name.clone()) }
            }
            _ => return Err(Trouble::Bad("nobody says what is to work on its rows".into())),
        },
    };
    let context = Some(changes.context.unwrap_or_else(|| config.context.clone())).filter(|context| !context.is_null());
    let context = context.map(|context| Payload::json(&context)).transpose();
    Ok(NewBatch {
        id: claim.token().clone(),
        context: context.map_err(|error| Trouble::Bad(format!("its context can't be written: {error}")))?,
        held: config.held,
        row_timeout: config.row_timeout,
        retry: RetryChoice { max_attempts: config.max_attempts, ..RetryChoice::default() },
        priority: config.priority,
        keep: config.keep,
        tags: config.tags.clone(),
        source: Some(shown(claim.name())).filter(|source| source.len() <= 1024),
        ..NewBatch::of(config.user.clone(), work)
    })
}

fn trouble(error: BatchError) -> Trouble {
    match error {
        BatchError::Row { .. } | BatchError::TooMany { .. } | BatchError::Invalid(_) | BatchError::InvalidId(_) => {
            Trouble::Bad(error.to_string())
        }
        BatchError::Differs => Trouble::Bad("it has changed since it was handed over for the first time".into()),
        // Neither the file's fault nor for ever.
        _ => Trouble::Later(error.to_string()),
    }
}

/// Lines that could not be used, written as they are found.
struct BadReport {
    path: std::path::PathBuf,
    file: Option<BufWriter<std::fs::File>>,
    count: u64,
    first: Option<String>,
}

impl BadReport {
    fn of(claim: &Claim) -> Self {
        Self { path: claim.bad_lines(), file: None, count: 0, first: None }
    }

    fn add(&mut self, line: &BadLine) -> std::io::Result<()> {
        self.count += 1;
        self.first.get_or_insert_with(|| line.to_string());
        if self.count > BAD_LINES_MAX {
            return Ok(());
        }
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(BufWriter::new(
                OpenOptions::new().write(true).create(true).truncate(true).mode(0o640).open(&self.path)?,
            )),
        };
        let text = String::from_utf8_lossy(&line.text[..line.text.len().min(BAD_TEXT_BYTES)]);
        writeln!(file, "{}", json!({ "line": line.line, "reason": line.reason, "text": text }))
    }

    /// How many there were.
    fn end(&mut self) -> std::io::Result<u64> {
        if let Some(mut file) = self.file.take() {
            file.flush()?;
            file.get_ref().sync_all()?;
        }
        Ok(self.count)
    }
}
