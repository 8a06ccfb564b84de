//! Items into SQLite: a chunk and its checkpoint are one transaction, so that each item is written exactly once.

use std::path::PathBuf;
use std::time::Duration;

use rusqlite::{Connection, Statement};

use super::position::Identity;
use super::{Checkpoint, Writer};
use crate::execute::sql::chunk::Advance;
use crate::execute::sql::sqlite_chunk::{advance, checkpoint, problem};
use crate::execute::task::Problem;

/// How long another connection's transaction is waited for.
const BUSY: Duration = Duration::from_secs(30);

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

impl<T, F: FnMut(&mut Statement<'_>, &T) -> rusqlite::Result<()>> Writer for SqliteWriter<T, F> {
    type Item = T;

    fn target(&self) -> Option<Identity> {
        let file = self.path.display().to_string();
        Some(Identity::of("sqlite").with("file", file).with_digest("statement", &self.sql))
    }

    fn open(&mut self, committed: &Checkpoint) -> Result<Option<Checkpoint>, Problem> {
        let connection = Connection::open(&self.path).map_err(|error| problem(&error))?;
        connection.busy_timeout(BUSY).map_err(|error| problem(&error))?;
        let own = committed.beside(checkpoint(&connection, &committed.run).map_err(|error| problem(&error))?)?;
        // So that what is wrong with it is no fault of an item.
        connection.prepare(&self.sql).map_err(|error| Problem::fail(format!("sqlite: {error}")))?;
        let commits = own.as_ref().map_or(0, |own| own.counts.commit_count);
        self.open = Some(Open { connection, run: committed.run.clone(), commits });
        Ok(own)
    }

    fn write(&mut self, items: &[T], checkpoint: &mut Checkpoint) -> Result<(), Problem> {
        let open = self.open.as_mut().ok_or_else(|| Problem::retry("sqlite: it is not open"))?;
        let text = serde_json::to_string(checkpoint).map_err(|error| Problem::fail(error.to_string()))?;
        let commits = checkpoint.counts.commit_count;
        let step = Advance { run: &open.run, before: open.commits, commits, checkpoint: &text };
        let transaction = advance(&mut open.connection, &step)?;
        let mut statement =
            transaction.prepare(&self.sql).map_err(|error| Problem::fail(format!("sqlite: {error}")))?;
        for item in items {
            (self.execute)(&mut statement, item).map_err(|error| problem(&error))?;
        }
        drop(statement);
        transaction.commit().map_err(|error| problem(&error))?;
        open.commits = commits;
        Ok(())
    }
}
