//! Items out of a query and into a table, on PostgreSQL or SQLite.

use std::collections::VecDeque;
use std::marker::PhantomData;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{Checkpoint, Reader, Writer};
use crate::execute::sql::chunk::{Advance, Connection, PAGE, Purpose, Query, statement, values};
pub use crate::execute::sql::chunk::{Database, DatabaseError};
use crate::execute::sql::rows::Parameters;
use crate::execute::task::Problem;

/// What others see of our connections to PostgreSQL.
const NAME: &str = "drayman:chunks";

/// Reads what a query returns, in the order of a key: columns that together tell its rows apart and are never null. The query has no order
/// and no limit of its own. It is asked for some hundred rows at a time, each time for those behind the last: an index on the key makes
/// that cheap, and a row that comes meanwhile is read if its key is greater. `stop` interrupts what is under way.
pub fn sql_query<T: DeserializeOwned>(
    database: &Database,
    query: &str,
    key: &[String],
    stop: CancellationToken,
) -> impl Reader<Item = T> + use<T> {
    SqlReader { database: database.clone(), query: Query::new(query, key), stop, open: None, of: PhantomData }
}

struct SqlReader<T> {
    database: Database,
    query: Query,
    stop: CancellationToken,
    open: Option<Reading>,
    of: PhantomData<fn() -> T>,
}

struct Reading {
    connection: Connection,
    /// The rows that were read and not handed out.
    page: VecDeque<Box<RawValue>>,
    /// Nothing is behind them.
    is_last: bool,
    /// The last row that was handed out; before that, the key behind which all began.
    last: Option<Box<RawValue>>,
    behind: Option<Vec<String>>,
}

impl<T> SqlReader<T> {
    fn next_row(&mut self) -> Result<Option<Box<RawValue>>, Problem> {
        let Some(open) = &mut self.open else { return Ok(None) };
        if open.page.is_empty() && !open.is_last {
            if let Some(last) = &open.last {
                open.behind = Some(self.query.key_of(last)?);
            }
            let behind = open.behind.as_ref().map(|key| self.query.in_sql(key)).transpose()?;
            // One more than is handed out: so it is seen, also where a page ends, that the key does not tell rows apart.
            let mut page = open.connection.page(&self.query, behind.as_deref())?;
            self.query.tells_apart(&page)?;
            open.is_last = page.len() <= PAGE;
            page.truncate(PAGE);
            open.page = page.into();
        }
        let row = open.page.pop_front();
        if let Some(row) = &row {
            open.last = Some(row.clone());
        }
        Ok(row)
    }
}

impl<T: DeserializeOwned> Reader for SqlReader<T> {
    type Item = T;

    fn open(&mut self, behind: &Value) -> Result<(), Problem> {
        let key = behind.get("key").map(|key| serde_json::from_value(key.clone())).transpose();
        let behind = key.map_err(|error| Problem::fail(format!("the place in the query can't be read: {error}")))?;
        let connection = self.database.connect(NAME, Purpose::Read, self.stop.clone())?;
        self.open = Some(Reading { connection, page: VecDeque::new(), is_last: false, last: None, behind });
        Ok(())
    }

    fn read(&mut self) -> Option<Result<T, Problem>> {
        match self.next_row() {
            Ok(row) => row.map(|row| {
                serde_json::from_str(row.get())
                    .map_err(|error| Problem::fail(format!("a row is no such item: {error}")))
            }),
            // No row is to blame, so none is to be passed over.
            Err(Problem { reason, .. }) => Some(Err(Problem::retry(reason))),
        }
    }

    fn place(&self) -> Value {
        let Some(open) = &self.open else { return Value::Null };
        let key = match &open.last {
            Some(last) => self.query.key_of(last).ok(),
            None => open.behind.clone(),
        };
        key.map_or(Value::Null, |key| json!({ "key": key }))
    }
}

/// Runs a statement for each item, which it names as `:field`; a chunk is one transaction, in which the table `drayman_checkpoints` of the
/// same database says how far the task has come. Its row is kept for 90 days. `stop` interrupts what is under way.
pub fn sql_to<T: Serialize>(database: &Database, sql: &str, stop: CancellationToken) -> impl Writer<Item = T> + use<T> {
    SqlWriter { database: database.clone(), sql: sql.to_owned(), stop, open: None, of: PhantomData }
}

struct SqlWriter<T> {
    database: Database,
    sql: String,
    stop: CancellationToken,
    open: Option<Writing>,
    of: PhantomData<fn(T)>,
}

struct Writing {
    connection: Connection,
    sql: String,
    parameters: Parameters,
    run: String,
    /// Chunks that were committed when this attempt last wrote, or looked.
    commits: u64,
}

impl<T: Serialize> Writer for SqlWriter<T> {
    type Item = T;

    fn open(&mut self, committed: &Checkpoint) -> Result<Option<Checkpoint>, Problem> {
        let (sql, parameters) = statement(&self.sql, self.database.dialect())?;
        let mut connection = self.database.connect(NAME, Purpose::Write, self.stop.clone())?;
        let own = committed.beside(connection.checkpoint(&committed.run)?)?;
        connection.prepare(&sql, &parameters)?;
        let commits = own.as_ref().map_or(0, |own| own.counts.commit_count);
        self.open = Some(Writing { connection, sql, parameters, run: committed.run.clone(), commits });
        Ok(own)
    }

    fn write(&mut self, items: &[T], checkpoint: &mut Checkpoint) -> Result<(), Problem> {
        let open = self.open.as_mut().ok_or_else(|| Problem::retry("the database is not open"))?;
        let unwritten = |error: serde_json::Error| Problem::fail(error.to_string());
        let of_item = |item| values(&open.parameters, &to_raw_value(item).map_err(unwritten)?);
        let items = items.iter().map(of_item).collect::<Result<Vec<_>, Problem>>()?;
        let text = serde_json::to_string(checkpoint).map_err(unwritten)?;
        let commits = checkpoint.counts.commit_count;
        let step = Advance { run: &open.run, before: open.commits, commits, checkpoint: &text };
        open.connection.write(&open.sql, &items, &step)?;
        open.commits = commits;
        Ok(())
    }
}
