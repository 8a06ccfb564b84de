//! Items into SQLite: a chunk and its checkpoint are one transaction, so that each item is written exactly once.

use std::path::PathBuf;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OptionalExtension, Statement, TransactionBehavior};

use super::{Checkpoint, Writer};
use crate::execute::task::Problem;

/// How long another connection's transaction is waited for.
const BUSY: Duration = Duration::from_secs(30);

/// Beside the items: how far each run has come, and when that was written.
const TABLE: &str = "CREATE TABLE IF NOT EXISTS drayman_checkpoints \
    (run TEXT PRIMARY KEY, commits INTEGER NOT NULL, checkpoint TEXT NOT NULL, at INTEGER NOT NULL)";
/// A row stays for longer than any attempt that was given up may sleep before it tries to write.
const FORGET: &str = "DELETE FROM drayman_checkpoints WHERE at < unixepoch() - 90 * 86400";

/// Writes items by a statement, which `execute` runs for each of them. The table `drayman_checkpoints` of the same database says how
/// far the task has come; its row is kept for 90 days.
pub fn sqlite<T>(
    path: impl Into<PathBuf>,
    sql: impl Into<String>,
    execute: impl FnMut(&mut Statement<'_>, &T) -> rusqlite::Result<()>,
) -> impl Writer<Item = T> {
    SqliteWriter { path: path.into(), sql: sql.into(), execute, open: None, of: std::marker::PhantomData }
}

struct SqliteWriter<T, F> {
    path: PathBuf,
    sql: String,
    execute: F,
    open: Option<Open>,
    of: std::marker::PhantomData<fn(T)>,
}

struct Open {
    connection: Connection,
    run: String,
    /// Chunks that were committed when this attempt last wrote, or looked. Whoever finds others there is not alone.
    commits: u64,
}

/// What is no fault of the items may be gone at another attempt.
fn problem(error: rusqlite::Error) -> Problem {
    let reason = format!("sqlite: {error}");
    match error.sqlite_error_code() {
        Some(ErrorCode::ConstraintViolation | ErrorCode::TypeMismatch | ErrorCode::TooBig) => Problem::fail(reason),
        _ => Problem::retry(reason),
    }
}

impl<T, F: FnMut(&mut Statement<'_>, &T) -> rusqlite::Result<()>> Writer for SqliteWriter<T, F> {
    type Item = T;

    fn open(&mut self, committed: &Checkpoint) -> Result<Option<Checkpoint>, Problem> {
        let connection = Connection::open(&self.path).map_err(problem)?;
        connection.busy_timeout(BUSY).map_err(problem)?;
        connection.execute(TABLE, []).map_err(problem)?;
        connection.execute(FORGET, []).map_err(problem)?;
        let own: Option<String> = connection
            .query_row("SELECT checkpoint FROM drayman_checkpoints WHERE run = ?1", [&committed.run], |row| row.get(0))
            .optional()
            .map_err(problem)?;
        let own: Option<Checkpoint> = own
            .map(|text| serde_json::from_str(&text))
            .transpose()
            .map_err(|error| Problem::fail(format!("its checkpoint in the database can't be read: {error}")))?;
        if own.is_none() && committed.counts.commit_count > 0 {
            let chunks = committed.counts.commit_count;
            return Err(Problem::fail(format!(
                "sqlite: {chunks} chunks were committed, and the database knows of none"
            )));
        }
        let commits = own.as_ref().map_or(0, |own| own.counts.commit_count);
        self.open = Some(Open { connection, run: committed.run.clone(), commits });
        Ok(own)
    }

    fn write(&mut self, items: &[T], checkpoint: &mut Checkpoint) -> Result<(), Problem> {
        let open = self.open.as_mut().ok_or_else(|| Problem::retry("sqlite: it is not open"))?;
        let transaction = open.connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(problem)?;
        let text = serde_json::to_string(checkpoint).map_err(|error| Problem::fail(error.to_string()))?;
        let commits = checkpoint.counts.commit_count as i64;
        let (run, before) = (&open.run, open.commits as i64);
        // Another attempt of this task may have gone on meanwhile: then this one must write nothing.
        let is_alone = transaction
            .execute(
                "INSERT INTO drayman_checkpoints VALUES (?1, ?2, ?3, unixepoch()) \
                 ON CONFLICT (run) DO UPDATE SET commits = ?2, checkpoint = ?3, at = unixepoch() WHERE commits = ?4",
                rusqlite::params![run, commits, text, before],
            )
            .map_err(problem)?;
        if is_alone == 0 {
            return Err(Problem::retry("sqlite: another attempt has gone on meanwhile"));
        }
        let mut statement =
            transaction.prepare(&self.sql).map_err(|error| Problem::fail(format!("sqlite: {error}")))?;
        for item in items {
            (self.execute)(&mut statement, item).map_err(problem)?;
        }
        drop(statement);
        transaction.commit().map_err(problem)?;
        open.commits = checkpoint.counts.commit_count;
        Ok(())
    }
}
