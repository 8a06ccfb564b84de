//! A SQLite file in the hands of a step that works in chunks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rusqlite::hooks::{AuthContext, Authorization};
use rusqlite::types::ValueRef;
use rusqlite::{Connection as Open, ErrorCode, OptionalExtension, Transaction, TransactionBehavior};
use serde_json::value::RawValue;
use tokio_util::sync::CancellationToken;

use super::super::chunk::{Advance, OVERTAKEN};
use super::super::rows::{JsonObject, Value};
use super::{BUSY_MAX, BUSY_POLL, File, STEPS_BETWEEN_LOOKS, Watch, describe, guarded, open, rows};
use crate::execute::task::Problem;

const TABLE: &str = "CREATE TABLE IF NOT EXISTS drayman_checkpoints \
    (run TEXT PRIMARY KEY, commits INTEGER NOT NULL, checkpoint TEXT NOT NULL, at INTEGER NOT NULL)";
/// A row stays for longer than any attempt that was given up may sleep before it tries to write.
const FORGET: &str = "DELETE FROM drayman_checkpoints WHERE at < unixepoch() - 90 * 86400";
const FIND: &str = "SELECT checkpoint FROM drayman_checkpoints WHERE run = ?1";
const ADVANCE: &str = "INSERT INTO drayman_checkpoints VALUES (?1, ?2, ?3, unixepoch()) \
    ON CONFLICT (run) DO UPDATE SET commits = ?2, checkpoint = ?3, at = unixepoch() WHERE commits = ?4";

/// What is no fault of the items may be gone at another attempt.
pub(in crate::execute) fn problem(error: &rusqlite::Error) -> Problem {
    let reason = format!("sqlite: {}", describe(error));
    match error.sqlite_error_code() {
        Some(ErrorCode::ConstraintViolation | ErrorCode::TypeMismatch | ErrorCode::TooBig) => Problem::fail(reason),
        _ => Problem::retry(reason),
    }
}

/// Makes the table of checkpoints, and says what it knows of a run.
pub(in crate::execute) fn checkpoint(connection: &Open, run: &str) -> rusqlite::Result<Option<String>> {
    connection.execute(TABLE, [])?;
    connection.execute(FORGET, [])?;
    connection.query_row(FIND, [run], |row| row.get(0)).optional()
}

/// Begins a transaction that moves a run on.
pub(in crate::execute) fn advance<'a>(
    connection: &'a mut Open,
    step: &Advance<'_>,
) -> Result<Transaction<'a>, Problem> {
    let transaction =
        connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(|error| problem(&error))?;
    let Advance { run, before, commits, checkpoint } = *step;
    let values = rusqlite::params![run, commits as i64, checkpoint, before as i64];
    match transaction.execute(ADVANCE, values).map_err(|error| problem(&error))? {
        0 => Err(Problem::retry(format!("sqlite: {OVERTAKEN}"))),
        _ => Ok(transaction),
    }
}

/// An open file. Others' SQL runs on it under the same watch as that of SQL jobs.
pub(in crate::execute) struct Connection {
    open: Open,
    watch: Arc<Watch>,
    /// SQL of ours runs.
    ours: Arc<AtomicBool>,
}

impl Connection {
    pub fn open(file: &File, stop: CancellationToken) -> Result<Self, Problem> {
        let wrong = |error: rusqlite::Error| problem(&error);
        let mut connection = open(file).map_err(Problem::fail)?;
        guarded(&connection).map_err(wrong)?;
        let stopping = stop.clone();
        connection.progress_handler(STEPS_BETWEEN_LOOKS, Some(move || stopping.is_cancelled())).map_err(wrong)?;
        let waits = (BUSY_MAX.as_millis() / BUSY_POLL.as_millis()) as i32;
        let busy = move |count: i32| {
            std::thread::sleep(BUSY_POLL);
            count < waits && !stop.is_cancelled()
        };
        connection.busy_handler(Some(busy)).map_err(wrong)?;
        let (watch, ours) = (Arc::new(Watch::default()), Arc::new(AtomicBool::new(false)));
        let (watching, is_ours) = (watch.clone(), ours.clone());
        let judge = move |context: AuthContext<'_>| match is_ours.load(Ordering::Relaxed) {
            true => Authorization::Allow,
            false => watching.judge(&context, true),
        };
        connection.authorizer(Some(judge)).map_err(wrong)?;
        Ok(Self { open: connection, watch, ours })
    }

    /// Has SQL of ours done.
    fn ours<T>(&mut self, work: impl FnOnce(&mut Open) -> T) -> T {
        self.ours.store(true, Ordering::Relaxed);
        let done = work(&mut self.open);
        self.ours.store(false, Ordering::Relaxed);
        done
    }

    /// What is wrong with others' SQL that is not run for a single item.
    fn refused(&self, error: &rusqlite::Error) -> Problem {
        match self.watch.denied() {
            Some(reason) => Problem::fail(reason),
            None if error.sqlite_error_code().is_some_and(|code| code != ErrorCode::Unknown) => problem(error),
            None => Problem::fail(format!("sqlite: {}", describe(error))),
        }
    }

    /// Rows as JSON objects. Bytes have no form there that could be compared: a key must hold none.
    pub fn page(&mut self, sql: &str, key: &[String]) -> Result<Vec<Box<RawValue>>, Problem> {
        let mut statement = self.open.prepare(sql).map_err(|error| self.refused(&error))?;
        if !statement.readonly() {
            return Err(Problem::fail("the query of a reader must not write"));
        }
        let names: Vec<String> = statement.column_names().map(str::to_owned).collect();
        let (mut read, mut items) = (statement.raw_query(), Vec::new());
        while let Some(row) = read.next().map_err(|error| self.refused(&error))? {
            let is_bytes = |name: &&String| matches!(row.get_ref(name.as_str()), Ok(ValueRef::Blob(_)));
            if let Some(name) = key.iter().find(is_bytes) {
                return Err(Problem::fail(format!(
                    "a row has bytes in the column {name:?}, which is a part of the key"
                )));
            }
            let mut object = JsonObject::default();
            names.iter().enumerate().for_each(|(at, name)| rows::write(&mut object, name, row.get_ref(at).ok()));
            let item = RawValue::from_string(object.end());
            items.push(item.map_err(|error| Problem::fail(format!("a row can't be read: {error}")))?);
        }
        Ok(items)
    }

    pub fn checkpoint(&mut self, run: &str) -> Result<Option<String>, Problem> {
        self.ours(|open| checkpoint(open, run)).map_err(|error| problem(&error))
    }

    pub fn prepare(&mut self, sql: &str, parameters: usize) -> Result<(), Problem> {
        let statement = self.open.prepare_cached(sql).map_err(|error| self.refused(&error))?;
        match statement.parameter_count() == parameters {
            true => Ok(()),
            false => Err(Problem::fail("the database counts the statement's parameters otherwise")),
        }
    }

    pub fn write(&mut self, sql: &str, items: &[Vec<Value>], step: &Advance<'_>) -> Result<(), Problem> {
        let is_ours = self.ours.clone();
        self.ours(|open| {
            let transaction = advance(open, step)?;
            is_ours.store(false, Ordering::Relaxed);
            let statement = transaction.prepare_cached(sql);
            is_ours.store(true, Ordering::Relaxed);
            let mut statement = statement.map_err(|error| problem(&error))?;
            for item in items {
                for (at, value) in item.iter().enumerate() {
                    statement.raw_bind_parameter(at + 1, value).map_err(|error| problem(&error))?;
                }
                let mut returned = statement.raw_query();
                while returned.next().map_err(|error| problem(&error))?.is_some() {}
            }
            drop(statement);
            // OR ROLLBACK, and what a trigger may do.
            if transaction.is_autocommit() {
                return Err(Problem::fail("sqlite: the statement undid the transaction of its chunk"));
            }
            transaction.commit().map_err(|error| problem(&error))
        })
    }
}
