//! A PostgreSQL database in the hands of a step that works in chunks.

use std::time::Duration;

use serde_json::value::RawValue;
use tokio::time::Instant;
use tokio_postgres::Statement;
use tokio_postgres::error::SqlState;
use tokio_util::sync::CancellationToken;

use super::super::chunk::{Advance, OVERTAKEN, Purpose};
use super::super::rows::Value;
use super::link::{Fault, Link, Request, Server};
use super::rows::{BEGIN, GROUP_MAX, group_len, is_of_the_row};
use crate::execute::task::Problem;

/// How long a statement may run, as long as the step itself may.
const TIME_MAX: Duration = Duration::from_secs(7 * 86_400);

/// An attempt that sleeps in the midst of a transaction must not keep the next one waiting for ever.
const SETTINGS: &str = "SET standard_conforming_strings = on; SET idle_in_transaction_session_timeout = '60s'";
const READ_ONLY: &str = "; SET default_transaction_read_only = on";
/// Since 14 a backend can notice by itself that its client is gone.
const NOTICES_GONE: &str = "SET client_connection_check_interval = '2s'";

const IS_THERE: &str = "SELECT pg_catalog.to_regclass('drayman_checkpoints')";
const TABLE: &str = "CREATE TABLE IF NOT EXISTS drayman_checkpoints (run text PRIMARY KEY, commits bigint NOT NULL, \
    checkpoint text NOT NULL, at timestamptz NOT NULL)";
/// A row stays for longer than any attempt that was given up may sleep before it tries to write.
const FORGET: &str = "DELETE FROM drayman_checkpoints WHERE at < pg_catalog.now() - interval '90 days'";

/// An open connection.
pub(in crate::execute) struct Connection {
    link: Link,
    stop: CancellationToken,
    statement: Option<Statement>,
}

/// What is no fault of an item may be gone at another attempt; so may what somebody interrupts.
fn problem(fault: &Fault) -> Problem {
    let is_interrupted = fault.code().is_some_and(|code| code.code().starts_with("57"));
    match is_of_the_row(fault) && !is_interrupted {
        true => Problem::fail(fault.message()),
        false => Problem::retry(fault.message()),
    }
}

/// A text in SQL of ours.
fn text(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

impl Connection {
    pub async fn open(server: &Server, name: &str, purpose: Purpose, stop: CancellationToken) -> Result<Self, Problem> {
        let opening = async {
            let link = server.connect(name).await.map_err(|failure| match failure.retryable {
                true => Problem::retry(failure.message),
                false => Problem::fail(failure.message),
            })?;
            let read_only = if purpose == Purpose::Read { READ_ONLY } else { "" };
            link.command(&format!("{SETTINGS}{read_only}")).await.map_err(|fault| problem(&fault))?;
            if link.version.is_some_and(|version| version >= 14) {
                // Not every platform that PostgreSQL runs on can.
                let _ = link.command(NOTICES_GONE).await;
            }
            Ok(link)
        };
        let link =
            stop.run_until_cancelled(opening).await.unwrap_or_else(|| Err(Problem::retry("it was told to stop")))?;
        Ok(Self { link, stop, statement: None })
    }

    pub async fn page(&mut self, sql: &str) -> Result<Vec<Box<RawValue>>, Problem> {
        let read = self.link.rows(sql, &self.stop).await.map_err(|fault| problem(&fault))?;
        let item = |row: Option<String>| {
            let text = row.ok_or_else(|| Problem::fail("the query returned no row where one was counted"))?;
            RawValue::from_string(text).map_err(|error| Problem::fail(format!("a row can't be read: {error}")))
        };
        read.into_iter().map(|columns| item(columns.into_iter().next().flatten())).collect()
    }

    pub async fn checkpoint(&mut self, run: &str) -> Result<Option<String>, Problem> {
        let ours = |fault: Fault| Problem::retry(fault.message());
        let there = self.link.row(IS_THERE).await.map_err(ours)?;
        if there == [None] {
            match self.link.command(TABLE).await {
                // Another one makes it in this very moment.
                Err(Fault::Database(error)) if error.code() == &SqlState::UNIQUE_VIOLATION => {}
                made => made.map_err(ours)?,
            }
        }
        self.link.command(FORGET).await.map_err(ours)?;
        let sql = format!("SELECT checkpoint FROM drayman_checkpoints WHERE run = {}", text(run));
        let found = self.link.rows(&sql, &self.stop).await.map_err(ours)?;
        Ok(found.into_iter().next().and_then(|columns| columns.into_iter().next().flatten()))
    }

    pub async fn prepare(&mut self, sql: &str, parameters: usize) -> Result<(), Problem> {
        let prepared = self.link.prepare(sql, &self.stop, Instant::now() + TIME_MAX).await;
        let statement = prepared.map_err(|fault| problem(&fault))?;
        if statement.params().len() != parameters {
            return Err(Problem::fail("the database counts the statement's parameters otherwise"));
        }
        self.statement = Some(statement);
        Ok(())
    }

    pub async fn write(&mut self, items: &[Vec<Value>], step: &Advance<'_>) -> Result<(), Problem> {
        self.link.command(BEGIN).await.map_err(|fault| problem(&fault))?;
        match self.write_in_transaction(items, step).await {
            // Whether a COMMIT took effect whose answer is lost, the row of the run will tell.
            Ok(()) => self.link.command("COMMIT").await.map_err(|fault| Problem::retry(fault.message())),
            Err(problem) => {
                // One that fails leaves a connection that nothing can be written on.
                let _ = self.link.command("ROLLBACK").await;
                Err(problem)
            }
        }
    }

    async fn write_in_transaction(&mut self, items: &[Vec<Value>], step: &Advance<'_>) -> Result<(), Problem> {
        let Advance { run, before, commits, checkpoint } = step;
        let (run, checkpoint) = (text(run), text(checkpoint));
        let sql = format!(
            "INSERT INTO drayman_checkpoints AS own VALUES ({run}, {commits}, {checkpoint}, pg_catalog.now()) \
             ON CONFLICT (run) DO UPDATE SET commits = excluded.commits, checkpoint = excluded.checkpoint, at = excluded.at \
             WHERE own.commits = {before} RETURNING 1"
        );
        let moved = self.link.rows(&sql, &self.stop).await.map_err(|fault| Problem::retry(fault.message()))?;
        if moved.is_empty() {
            return Err(Problem::retry(OVERTAKEN));
        }
        let statement = self.statement.as_ref().ok_or_else(|| Problem::retry("no statement is ready"))?;
        let mut next = 0;
        while next < items.len() {
            let group = &items[next..next + group_len(&items[next..], GROUP_MAX)];
            let requests: Vec<Request<'_>> = group.iter().map(|item| Request::Row(item)).collect();
            let deadline = Instant::now() + TIME_MAX;
            let ran = self.link.run_rows(statement, &requests, &self.stop, deadline).await;
            if let (_, Some(fault)) = ran.map_err(|fault| problem(&fault))? {
                return Err(problem(&fault));
            }
            if self.link.interrupt.is_some() {
                return Err(Problem::retry("it was told to stop"));
            }
            next += group.len();
        }
        Ok(())
    }
}
