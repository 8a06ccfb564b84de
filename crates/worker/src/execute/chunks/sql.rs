//! Items out of a query and into a table, on PostgreSQL or SQLite.

use std::collections::VecDeque;
use std::marker::PhantomData;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::position::{Identity, Position, Seen};
use super::{Checkpoint, Reader, Writer};
use crate::execute::sql::chunk::{Advance, Connection, PAGE, Purpose, Query, statement, values};
pub use crate::execute::sql::chunk::{Database, DatabaseError};
use crate::execute::sql::rows::Parameters;
use crate::execute::task::Problem;

/// What others see of our connections to PostgreSQL.
const NAME: &str = "drayman:chunks";

/// Reads what a query returns, in the order of a key: columns that together tell its rows apart and are never null. The
/// query has no order and no limit of its own. It is asked for some hundred rows at a time, each time for those behind
/// the last: an index on the key makes that cheap, and a row that comes meanwhile is read if its key is greater. `stop`
/// interrupts what is under way.
pub fn sql_query<T: DeserializeOwned>(
    database: &Database,
    query: &str,
    key: &[String],
    stop: CancellationToken,
) -> SqlReader<T> {
    let query = Query::new(query, key);
    SqlReader { database: database.clone(), query, stop, is_compared: true, open: None, of: PhantomData }
}

/// Reads the rows of a query.
pub struct SqlReader<T> {
    database: Database,
    query: Query,
    stop: CancellationToken,
    is_compared: bool,
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
    /// The rows that were handed out, if they are compared.
    seen: Option<Seen>,
    /// Where it was told to go on without comparing.
    told: Option<Position>,
}

impl<T> SqlReader<T> {
    /// Goes on behind the last key without reading again what lies before it: for a query whose rows may change or go
    /// once they are read.
    #[must_use]
    pub fn uncompared(self) -> Self {
        Self { is_compared: false, ..self }
    }

    fn next_row(&mut self) -> Result<Option<Box<RawValue>>, Problem> {
        let Some(open) = &mut self.open else { return Ok(None) };
        if open.page.is_empty() && !open.is_last {
            if let Some(last) = &open.last {
                open.behind = Some(self.query.key_of(last)?);
            }
            let behind = open.behind.as_ref().map(|key| self.query.in_sql(key)).transpose()?;
            // One more than is handed out: so it is seen, also where a page ends, that the key does not tell rows
            // apart.
            let mut page = open.connection.page(&self.query, behind.as_deref())?;
            self.query.tells_apart(&page)?;
            open.is_last = page.len() <= PAGE;
            page.truncate(PAGE);
            open.page = page.into();
        }
        let row = open.page.pop_front();
        if let Some(row) = &row {
            if let Some(seen) = &mut open.seen {
                seen.add_item(row.get().as_bytes());
            }
            open.last = Some(row.clone());
        }
        Ok(row)
    }
}

impl<T: DeserializeOwned> Reader for SqlReader<T> {
    type Item = T;

    fn source(&self) -> Identity {
        let Query { sql, key } = &self.query;
        Identity::of("sql").with("database", self.database.label()).with_digest("query", sql).with("key", key.clone())
    }

    fn unit(&self) -> &'static str {
        "rows"
    }

    fn open(&mut self, behind: Option<&Position>) -> Result<(), Problem> {
        let connection = self.database.connect(NAME, Purpose::Read, self.stop.clone())?;
        // What was not compared before can't be now.
        let is_compared = self.is_compared && behind.is_none_or(|behind| !behind.digest.is_empty());
        let told = behind.filter(|_| !is_compared).cloned();
        let key = told.as_ref().and_then(|told| told.at.get("key")).map(|key| serde_json::from_value(key.clone()));
        let unread = |error| Problem::fail(format!("the place in the query can't be read: {error}"));
        self.open = Some(Reading {
            connection,
            page: VecDeque::new(),
            is_last: false,
            last: None,
            behind: key.transpose().map_err(unread)?,
            seen: is_compared.then(Seen::default),
            told,
        });
        let is_before =
            |open: &Reading| behind.is_some_and(|to| open.seen.as_ref().is_some_and(|s| s.length() < to.length));
        while self.open.as_ref().is_some_and(is_before) && self.next_row()?.is_some() {}
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

    fn position(&self) -> Position {
        let Some(Reading { last, behind, seen, told, .. }) = &self.open else {
            return Seen::default().position(Value::Null);
        };
        let key = match last {
            Some(last) => self.query.key_of(last).ok(),
            None => behind.clone(),
        };
        let at = key.map_or(Value::Null, |key| json!({ "key": key }));
        match (seen, told, last) {
            (Some(seen), ..) => seen.position(at),
            (None, Some(told), None) => told.clone(),
            (None, ..) => Position { length: 0, digest: String::new(), at },
        }
    }
}

/// Runs a statement for each item, which it names as `:field`; a chunk is one transaction, in which the table
/// `drayman_checkpoints` of the same database says how far the task has come. Its row is kept for 90 days. `stop`
/// interrupts what is under way.
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

    fn target(&self) -> Option<Identity> {
        Some(Identity::of("sql").with("database", self.database.label()).with_digest("statement", &self.sql))
    }

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
