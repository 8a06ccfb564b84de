//! A database in the hands of a step that works in chunks: it reads a query page by page, and writes items in the same transaction as
//! the step's checkpoint.
//!
//! The table `drayman_checkpoints` says how far each run has come. A chunk's transaction moves its row on from the number of commits
//! that this attempt has seen: so an attempt that was given up writes nothing once another has gone on.

use queue_core::ids::User;
use serde_json::value::RawValue;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::databases::{DatabaseSettings, Databases};
use super::rows::{Parameters, Value, parameters};
use super::template::{self, Dialect};
use super::{Place, SettingsError, SqlExecutor, postgres, sqlite};
use crate::execute::task::Problem;

/// How many rows are handed out of those that are read at once, which are one more.
pub(in crate::execute) const PAGE: usize = 500;

/// A database, as one user sees it.
#[derive(Clone)]
pub struct Database {
    place: Place,
    /// What tells it from others, also after the end of this program.
    label: String,
}

impl Database {
    /// One of a program's own.
    pub fn new(settings: DatabaseSettings, user: &User) -> Result<Self, DatabaseError> {
        const NAME: &str = "own";
        let databases = [(NAME.to_owned(), settings)].into();
        let sql = SqlExecutor::new(Databases { databases, ..Databases::default() })?;
        let place = sql.named(NAME, user).map_err(DatabaseError::Place)?;
        Ok(Self { label: place.label(), place })
    }

    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    pub(in crate::execute) fn label(&self) -> &str {
        &self.label
    }

    /// Whose rules its SQL follows.
    pub(crate) fn dialect(&self) -> Dialect {
        match self.place {
            Place::Postgres(_) => Dialect::Postgres,
            Place::Sqlite(_) => Dialect::Sqlite,
        }
    }

    /// Connects, for code that blocks. `name` is what others see of it; what runs on it is interrupted when `stop` fires.
    pub(in crate::execute) fn connect(
        &self,
        name: &str,
        purpose: Purpose,
        stop: CancellationToken,
    ) -> Result<Connection, Problem> {
        match &self.place {
            Place::Postgres(server) => {
                let runtime = Handle::current();
                let link = runtime.block_on(postgres::chunk::Connection::open(server, name, purpose, stop))?;
                Ok(Connection::Postgres(Box::new(link), runtime))
            }
            Place::Sqlite(file) => Ok(Connection::Sqlite(sqlite::chunk::Connection::open(file, stop)?)),
        }
    }
}

/// A database can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DatabaseError {
    /// Its settings are wrong.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// There is none for this user.
    #[error("{0}")]
    Place(String),
}

impl SqlExecutor {
    /// A database that the configuration names, as a user sees it.
    pub(crate) fn database(&self, name: &str, user: &User) -> Result<Database, String> {
        Ok(Database { place: self.named(name, user)?, label: name.to_owned() })
    }
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::execute) enum Purpose {
    Read,
    Write,
}

/// An open database.
pub(in crate::execute) enum Connection {
    Postgres(Box<postgres::chunk::Connection>, Handle),
    Sqlite(sqlite::chunk::Connection),
}

impl Connection {
    /// The next rows of a query, each as a JSON object.
    pub fn page(&mut self, query: &Query, behind: Option<&[String]>) -> Result<Vec<Box<RawValue>>, Problem> {
        let page = match self {
            Connection::Postgres(link, runtime) => runtime.block_on(link.page(&query.page(behind, true))),
            Connection::Sqlite(file) => file.page(&query.page(behind, false), &query.key),
        }?;
        // All rows have the columns of the first.
        match page.first().and_then(|row| rows::fault_of_json(row.get())) {
            Some(fault) => Err(Problem::fail(format!("a row of the query is no item: {fault}"))),
            None => Ok(page),
        }
    }

    /// Makes the table of checkpoints, and says what it knows of a run.
    pub fn checkpoint(&mut self, run: &str) -> Result<Option<String>, Problem> {
        match self {
            Connection::Postgres(link, runtime) => runtime.block_on(link.checkpoint(run)),
            Connection::Sqlite(file) => file.checkpoint(run),
        }
    }

    /// Has a statement for items made ready, so that what is wrong with it is no fault of an item.
    pub fn prepare(&mut self, sql: &str, parameters: &Parameters) -> Result<(), Problem> {
        match self {
            Connection::Postgres(link, runtime) => runtime.block_on(link.prepare(sql, parameters.count())),
            Connection::Sqlite(file) => file.prepare(sql, parameters.count()),
        }
    }

    /// Runs the statement for each item and moves the run on, all of it or nothing.
    pub fn write(&mut self, sql: &str, items: &[Vec<Value>], step: &Advance<'_>) -> Result<(), Problem> {
        match self {
            Connection::Postgres(link, runtime) => runtime.block_on(link.write(items, step)),
            Connection::Sqlite(file) => file.write(sql, items, step),
        }
    }
}

/// How a run moves on.
#[derive(Debug, Clone, Copy)]
pub(in crate::execute) struct Advance<'a> {
    pub run: &'a str,
    /// How many chunks were committed when this attempt looked last. Who finds another number there is not alone.
    pub before: u64,
    /// How many are then.
    pub commits: u64,
    pub checkpoint: &'a str,
}

/// Said by who is not.
pub(super) const OVERTAKEN: &str = "another attempt has gone on meanwhile";

/// The statement for items: as the database takes it, and the values that it takes.
pub(in crate::execute) fn statement(sql: &str, dialect: Dialect) -> Result<(String, Parameters), Problem> {
    parameters(sql, dialect).map_err(|reason| Problem::fail(format!("the statement can't be run for items: {reason}")))
}

/// The values that an item gives.
pub(in crate::execute) fn values(parameters: &Parameters, item: &RawValue) -> Result<Vec<Value>, Problem> {
    parameters.values(item.get().as_bytes()).map_err(|unfit| {
        let reasons = unfit.messages.into_iter().flat_map(|message| message.vals);
        Problem::fail(reasons.collect::<Vec<_>>().join("; "))
    })
}

/// A query that is read in the order of a key.
#[derive(Debug, Clone)]
pub(in crate::execute) struct Query {
    pub sql: String,
    pub key: Vec<String>,
}

impl Query {
    pub fn new(sql: &str, key: &[String]) -> Self {
        // What ends a statement can't stand within one.
        let sql = sql.trim_end().trim_end_matches(';').to_owned();
        Self { sql, key: key.to_vec() }
    }

    /// The text of one page: behind the row whose key, in SQL, is given. The line's end is for a query that ends with a comment.
    fn page(&self, behind: Option<&[String]>, as_json: bool) -> String {
        let Self { sql, key } = self;
        let names: Vec<String> = key.iter().map(|name| format!("items.{}", quoted(name, '"'))).collect();
        let names = names.join(", ");
        let what = if as_json { "row_to_json(items)" } else { "*" };
        let from = match behind {
            Some(values) => format!("WHERE ({names}) > ({}) ", values.join(", ")),
            None => String::new(),
        };
        format!("SELECT {what} FROM (\n{sql}\n) AS items {from}ORDER BY {names} LIMIT {}", PAGE + 1)
    }

    /// The key of a row, each value as JSON.
    pub fn key_of(&self, row: &RawValue) -> Result<Vec<String>, Problem> {
        let fields: std::collections::HashMap<String, &RawValue> =
            serde_json::from_str(row.get()).map_err(|error| Problem::fail(format!("a row is no object: {error}")))?;
        let value = |name: &String| match fields.get(name) {
            Some(value) => Ok(value.get().to_owned()),
            None => Err(Problem::fail(format!("the query returns no column {name:?}, which is a part of the key"))),
        };
        self.key.iter().map(value).collect()
    }

    /// Whether no two rows that follow each other have the same key: what stands behind one of them would be taken for read.
    pub fn tells_apart(&self, rows: &[Box<RawValue>]) -> Result<(), Problem> {
        let mut before = None;
        for row in rows {
            let key = self.key_of(row)?;
            if before.as_ref() == Some(&key) {
                return Err(Problem::fail(format!("two rows of the query have the same key, {}", key.join(", "))));
            }
            before = Some(key);
        }
        Ok(())
    }

    /// The same values in SQL. A text is left for the database to read as what the column holds.
    pub fn in_sql(&self, values: &[String]) -> Result<Vec<String>, Problem> {
        let value = |(name, json): (&String, &String)| match serde_json::from_str(json) {
            Ok(serde_json::Value::String(text)) if !text.contains('\0') => Ok(quoted(&text, '\'')),
            Ok(serde_json::Value::Number(_) | serde_json::Value::Bool(_)) => Ok(json.clone()),
            _ => Err(Problem::fail(format!("a row has {json} in the column {name:?}, which is a part of the key"))),
        };
        self.key.iter().zip(values).map(value).collect()
    }
}

fn quoted(text: &str, quote: char) -> String {
    let doubled = text.replace(quote, &format!("{quote}{quote}"));
    format!("{quote}{doubled}{quote}")
}

/// A text with parameters in their places.
pub(in crate::execute) fn rendered(
    sql: &str,
    dialect: Dialect,
    job_id: &str,
    params: &serde_json::Map<String, serde_json::Value>,
) -> Result<String, Problem> {
    let vars = template::Vars { job_id, error_message: None, params: Some(params) };
    template::render(sql, dialect, &vars).map_err(|error| Problem::fail(error.to_string()))
}
