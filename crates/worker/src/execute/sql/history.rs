//! A database to which records are written: text goes in, in one transaction with how far the feed of records is written.
//!
//! The row of `drayman_export` is moved on from where this writer has seen it last: so a former leader that wakes up writes nothing.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rusqlite::TransactionBehavior;
use tokio_util::sync::CancellationToken;

use super::postgres::Link;
use super::template::Dialect;
use super::{Place, chunk::Database, sqlite};

/// What others see of the connection.
const NAME: &str = "drayman:export";
/// How long another connection's transaction is waited for.
const BUSY: Duration = Duration::from_secs(30);
/// The tables that this program writes. Others are another program's.
const SCHEMA: u64 = 1;

const CURSOR: &str = "SELECT feed_at, feed_number, dropped, schema_version FROM drayman_export";

/// How far the feed is written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cursor {
    /// The place of the last entry that was; empty before the first.
    pub at: String,
    /// Its number.
    pub number: u64,
    /// How many entries were dropped before they could be written.
    pub dropped: u64,
}

/// An open database.
pub struct History(Open);

enum Open {
    Postgres(Box<Link>),
    Sqlite(Arc<Mutex<rusqlite::Connection>>),
}

/// Another writer has gone on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overtaken;

impl History {
    /// Opens it, makes the tables that are missing, and says how far the feed is written.
    pub async fn open(database: &Database, tables: &str) -> Result<(Self, Cursor), String> {
        let numbers = match database.dialect() {
            Dialect::Postgres => "bigint",
            Dialect::Sqlite => "INTEGER",
        };
        let begin = format!(
            "CREATE TABLE IF NOT EXISTS drayman_export (one {numbers} PRIMARY KEY CHECK (one = 1), schema_version {numbers} NOT NULL, \
             feed_at text NOT NULL, feed_number {numbers} NOT NULL, dropped {numbers} NOT NULL);\n\
             INSERT INTO drayman_export VALUES (1, {SCHEMA}, '', 0, 0) ON CONFLICT DO NOTHING;\n{tables}"
        );
        let (open, row) = match database.place() {
            Place::Postgres(server) => {
                let mut link = server.connect(NAME).await.map_err(|failure| failure.message)?;
                link.command("SET standard_conforming_strings = on").await.map_err(|fault| fault.message())?;
                link.command(&begin).await.map_err(|fault| fault.message())?;
                let rows = link.rows(CURSOR, &CancellationToken::new()).await.map_err(|fault| fault.message())?;
                let row = rows.into_iter().next().unwrap_or_default();
                let row = row.into_iter().map(Option::unwrap_or_default).collect();
                (Open::Postgres(Box::new(link)), row)
            }
            Place::Sqlite(file) => {
                let file = file.clone();
                let opened = blocking(move || {
                    let connection = sqlite::open(&file)?;
                    connection.busy_timeout(BUSY).map_err(|error| error.to_string())?;
                    connection.execute_batch(&begin).map_err(|error| error.to_string())?;
                    let row = connection
                        .query_row(CURSOR, [], |row| {
                            (0..4).map(|at| row.get::<_, rusqlite::types::Value>(at).map(text)).collect()
                        })
                        .map_err(|error| error.to_string())?;
                    Ok((connection, row))
                });
                let (connection, row): (_, Vec<String>) = opened.await?;
                (Open::Sqlite(Arc::new(Mutex::new(connection))), row)
            }
        };
        let [at, number, dropped, schema] = <[String; 4]>::try_from(row).map_err(|_| "drayman_export has no row")?;
        if schema != SCHEMA.to_string() {
            return Err(format!("its tables are of version {schema}, and this program writes version {SCHEMA}"));
        }
        let number_of = |text: String| text.parse().map_err(|_| "drayman_export can't be read".to_owned());
        Ok((Self(open), Cursor { at, number: number_of(number)?, dropped: number_of(dropped)? }))
    }

    /// Runs SQL and moves the cursor, all of it or nothing.
    pub async fn append(
        &mut self,
        sql: String,
        before: &Cursor,
        after: &Cursor,
    ) -> Result<Result<(), Overtaken>, String> {
        let step = format!(
            "UPDATE drayman_export SET feed_at = '{}', feed_number = {}, dropped = {} WHERE feed_at = '{}' RETURNING 1",
            after.at, after.number, after.dropped, before.at
        );
        match &mut self.0 {
            Open::Postgres(link) => {
                link.command("BEGIN").await.map_err(|fault| fault.message())?;
                let moved = link.rows(&step, &CancellationToken::new()).await.map_err(|fault| fault.message())?;
                if moved.is_empty() {
                    link.command("ROLLBACK").await.map_err(|fault| fault.message())?;
                    return Ok(Err(Overtaken));
                }
                link.command(&sql).await.map_err(|fault| fault.message())?;
                link.command("COMMIT").await.map_err(|fault| fault.message())?;
                Ok(Ok(()))
            }
            Open::Sqlite(connection) => {
                let connection = connection.clone();
                let appended = blocking(move || {
                    let mut connection = connection.lock().unwrap_or_else(PoisonError::into_inner);
                    let append = |connection: &mut rusqlite::Connection| {
                        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
                        let moved = transaction.prepare(&step)?.query([])?.next()?.is_some();
                        if !moved {
                            return Ok(Err(Overtaken));
                        }
                        transaction.execute_batch(&sql)?;
                        transaction.commit()?;
                        Ok(Ok(()))
                    };
                    append(&mut connection).map_err(|error: rusqlite::Error| error.to_string())
                });
                appended.await
            }
        }
    }
}

fn text(value: rusqlite::types::Value) -> String {
    match value {
        rusqlite::types::Value::Text(text) => text,
        rusqlite::types::Value::Integer(number) => number.to_string(),
        _ => String::new(),
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, String> + Send + 'static) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(error.to_string()))
}
