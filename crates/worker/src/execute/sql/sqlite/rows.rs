//! A statement for rows in a SQLite file: each row in a savepoint of its own, for there is no way to the server that it could cost.

use std::sync::Arc;
use std::time::{Duration, Instant};

use queue_core::model::batch::RowResult;
use rusqlite::ffi::ErrorCode;
use rusqlite::hooks::{AuthContext, Authorization};
use rusqlite::types::{ToSqlOutput, Value as Stored, ValueRef};
use rusqlite::{Connection, Statement, ToSql};

use super::super::rows::{JsonObject, Returned, Value, failed, hexadecimal, parameters, refused, same_name};
use super::super::template::Dialect;
use super::super::{QUERY_CANCELED, STATEMENT_TIMEOUT, commented};
use super::{Run, Watch, describe};
use crate::execute::rows::ANSWERS_MAX_BYTES;
use crate::execute::{End, Failure, RowAnswers, SqlRow, Work};

const SAVEPOINT: &str = "SAVEPOINT drayman_rows";
const UNDO: &str = "ROLLBACK TO drayman_rows";
const RELEASE: &str = "RELEASE drayman_rows";

/// Values keep the kind that they have in JSON: SQLite's columns take what they are given.
impl ToSql for Value {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(match self {
            Value::Null => ToSqlOutput::Owned(Stored::Null),
            Value::Bool(is) => ToSqlOutput::Owned(Stored::Integer((*is).into())),
            Value::Number(digits) => match (digits.parse(), digits.parse()) {
                (Ok(whole), _) => ToSqlOutput::Owned(Stored::Integer(whole)),
                (_, Ok(real)) => ToSqlOutput::Owned(Stored::Real(real)),
                _ => ToSqlOutput::Borrowed(ValueRef::Text(digits.as_bytes())),
            },
            Value::Text(text) => ToSqlOutput::Borrowed(ValueRef::Text(text.as_bytes())),
        })
    }
}

/// What came of one try of the transaction.
enum Tried {
    /// All rows have an answer, as far as there was room; tells too whether the statement only reads.
    Through(RowAnswers, bool),
    /// The row at this place took too long. SQLite undoes the whole transaction when it interrupts a statement that writes.
    Undone(usize),
}

impl Run {
    /// Runs the statement for all rows and commits, or leaves nothing.
    pub(super) fn run_rows(&self, rows: &[SqlRow]) -> Result<(RowAnswers, Duration), End> {
        let mut connection = self.open()?;
        let mut overdue = Vec::new();
        loop {
            self.begin(&connection)?;
            let begin = Instant::now();
            match self.try_rows(&mut connection, rows, &overdue)? {
                Tried::Through(answers, read_only) => {
                    let took = begin.elapsed();
                    if !read_only {
                        self.commit(&connection, answers.clone())?;
                    }
                    return Ok((answers, took));
                }
                // The others are run again, without it.
                Tried::Undone(place) => overdue.push(place),
            }
        }
    }

    /// Runs the rows under the authorizer, but those that are known to take too long.
    fn try_rows(&self, connection: &mut Connection, rows: &[SqlRow], overdue: &[usize]) -> Result<Tried, End> {
        let watch = Arc::new(Watch::default());
        let watching = watch.clone();
        let ours = |error| self.failed(&error, true);
        connection.authorizer(Some(move |context: AuthContext<'_>| watching.judge(&context, true))).map_err(ours)?;
        let tried = self.rows_in_transaction(connection, &watch, rows, overdue)?;
        connection.authorizer(None::<fn(AuthContext<'_>) -> Authorization>).map_err(ours)?;
        Ok(tried)
    }

    fn rows_in_transaction(
        &self,
        connection: &Connection,
        watch: &Watch,
        rows: &[SqlRow],
        overdue: &[usize],
    ) -> Result<Tried, End> {
        let (sql, parameters) =
            parameters(&self.work.sql, Dialect::Sqlite).map_err(|reason| End::Failed(refused(&reason)))?;
        let text = commented(&Work { sql, ..self.work.clone() });
        let mut statement = connection.prepare(&text).map_err(|error| match watch.denied() {
            Some(message) => End::Failed(Failure { message, undone: true, ..Failure::default() }),
            None => self.failed(&error, true),
        })?;
        if statement.parameter_count() != parameters.count() {
            return Err(End::Failed(refused("the database counts its parameters otherwise")));
        }
        if let Some(reason) = same_name(statement.column_names()) {
            return Err(End::Failed(refused(&reason)));
        }
        let (mut answers, mut answered_bytes) = (RowAnswers::new(), 0);
        for row in rows {
            if answered_bytes >= ANSWERS_MAX_BYTES {
                break;
            }
            let answer = match parameters.values(&row.input) {
                Ok(_) if overdue.contains(&row.place) => too_long(),
                Ok(values) => match self.run_row(connection, watch, &mut statement, &values)? {
                    Some(answer) => answer,
                    None => return Ok(Tried::Undone(row.place)),
                },
                Err(unfit) => unfit,
            };
            answered_bytes += answer.bytes();
            answers.push((row.place, answer));
        }
        Ok(Tried::Through(answers, statement.readonly()))
    }

    /// Runs the statement for one row. `None` if it took too long and nothing is left of the others' either.
    fn run_row(
        &self,
        connection: &Connection,
        watch: &Watch,
        statement: &mut Statement<'_>,
        values: &[Value],
    ) -> Result<Option<RowResult>, End> {
        self.ours(connection, SAVEPOINT, [])?;
        self.brake.set_deadline(self.deadline());
        let ran = returned(connection, statement, values);
        let overdue = self.brake.is_overdue();
        self.brake.set_deadline(None);
        if self.brake.is_pulled() {
            return Err(self.brake.end());
        }
        let error = match ran {
            Ok(returned) => {
                self.ours(connection, RELEASE, [])?;
                return Ok(Some(returned.result(statement.column_count() > 0).checked()));
            }
            Err(error) => error,
        };
        let answer = match error.sqlite_error_code() {
            Some(ErrorCode::OperationInterrupted) if overdue && connection.is_autocommit() => return Ok(None),
            Some(ErrorCode::OperationInterrupted) if overdue => too_long(),
            Some(code) if OF_THE_DATABASE.contains(&code) => {
                // The whole transaction is undone: want of room is worth another attempt.
                let wanting = matches!(code, ErrorCode::DiskFull | ErrorCode::OutOfMemory);
                return Err(match self.failed(&error, true) {
                    End::Failed(failure) => End::Failed(Failure { retryable: failure.retryable || wanting, ..failure }),
                    end => end,
                });
            }
            // OR ROLLBACK, and what a trigger may do.
            _ if connection.is_autocommit() => {
                return Err(End::Failed(refused("it undid the transaction of all rows")));
            }
            _ => {
                let code = error.sqlite_error().map(|error| format!("sqlite_{}", error.extended_code));
                let message = watch.denied().unwrap_or_else(|| describe(&error));
                failed(code.as_deref().unwrap_or("processing_error"), None, message)
            }
        };
        self.ours(connection, UNDO, [])?;
        self.ours(connection, RELEASE, [])?;
        Ok(Some(answer))
    }
}

/// Troubles of the database, for which no row is to blame.
const OF_THE_DATABASE: [ErrorCode; 7] = [
    ErrorCode::DiskFull,
    ErrorCode::OutOfMemory,
    ErrorCode::SystemIoFailure,
    ErrorCode::DatabaseCorrupt,
    ErrorCode::NotADatabase,
    ErrorCode::DatabaseBusy,
    ErrorCode::DatabaseLocked,
];

fn too_long() -> RowResult {
    failed(QUERY_CANCELED, None, STATEMENT_TIMEOUT.into())
}

fn returned(connection: &Connection, statement: &mut Statement<'_>, values: &[Value]) -> rusqlite::Result<Returned> {
    for (index, value) in values.iter().enumerate() {
        statement.raw_bind_parameter(index + 1, value)?;
    }
    let names: Vec<String> = statement.column_names().map(str::to_owned).collect();
    let read_only = statement.readonly();
    let before = connection.total_changes();
    let (mut returned, mut found) = (Returned::default(), 0);
    let mut rows = statement.raw_query();
    while let Some(row) = rows.next()? {
        found += 1;
        returned
            .add(|out| names.iter().enumerate().for_each(|(index, name)| write(out, name, row.get_ref(index).ok())));
    }
    drop(rows);
    // What others did before counts still where this one changed nothing.
    let changed = if connection.total_changes() == before { 0 } else { connection.changes() };
    returned.affected = if read_only { found } else { changed };
    Ok(returned)
}

pub(super) fn write(out: &mut JsonObject, name: &str, value: Option<ValueRef<'_>>) {
    match value {
        Some(ValueRef::Integer(number)) => out.json(name, &number.to_string()),
        Some(ValueRef::Real(number)) => match serde_json::Number::from_f64(number) {
            Some(json) => out.json(name, &json.to_string()),
            None => out.text(name, &number.to_string()),
        },
        Some(ValueRef::Text(text)) => out.text(name, &String::from_utf8_lossy(text)),
        Some(ValueRef::Blob(bytes)) => out.text(name, &hexadecimal(bytes)),
        Some(ValueRef::Null) | None => out.json(name, "null"),
    }
}
