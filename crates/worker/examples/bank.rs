//! A worker that posts a day's transactions: each moves money on one account, once, whatever becomes of the worker.
//!
//! A row may be worked on twice, when a worker is lost before its result is recorded. So the account moves in one transaction with a
//! note that this line of this batch was posted, and a line that was posted before only says again what it wrote.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use queue_core::model::task::Message;
use rusqlite::{Connection, TransactionBehavior, params};
use serde::{Deserialize, Serialize};
use telemetry::Telemetry;
use worker::builder::Worker;
use worker::config::{Config, Layers};
use worker::execute::function::{Application, BoxError, Context, Resource, Shared};
use worker::execute::rows::BatchEnd;
use worker::execute::task::Problem;
use worker::shutdown::Shutdown;

/// The accounts, in a SQLite database that all workers of this machine share.
struct Accounts(PathBuf);

#[async_trait]
impl Resource for Accounts {
    type Of = Mutex<Connection>;

    async fn open(&self) -> Result<Mutex<Connection>, BoxError> {
        let database = Connection::open(&self.0)?;
        database.busy_timeout(Duration::from_secs(10))?;
        database.pragma_update(None, "journal_mode", "wal")?;
        database.pragma_update(None, "synchronous", "normal")?;
        Ok(Mutex::new(database))
    }
}

/// A row of the file: its columns are texts.
#[derive(Deserialize)]
struct Transaction {
    account: String,
    branch: String,
    cents: String,
}

#[derive(Serialize)]
struct Posted {
    balance: i64,
}

fn post(accounts: Shared<Accounts>, row: Transaction, context: Context) -> Result<Posted, Problem> {
    let line = context.line().ok_or_else(|| Problem::fail("it is no row of a batch"))?.cast_signed();
    let cents: i64 = row.cents.parse().map_err(|_| Problem::fail(format!("{:?} is no number of cents", row.cents)))?;
    if cents == 0 {
        return Err(Problem::ignore("nothing is to be moved"));
    }
    let mut accounts = accounts.lock().unwrap_or_else(PoisonError::into_inner);
    let transaction = accounts.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let is_new = transaction.execute(
        "insert into posted (batch, line) values (?, ?) on conflict do nothing",
        params![context.job().as_str(), line],
    )?;
    if is_new == 1 {
        transaction.execute("update accounts set balance = balance + ? where id = ?", params![cents, row.account])?;
    }
    let balance = transaction.query_row("select balance from accounts where id = ?", [&row.account], |row| row.get(0));
    let balance = match balance {
        Ok(balance) => balance,
        Err(rusqlite::Error::QueryReturnedNoRows) => {
            let message = Message {
                msgid: 404,
                errcode: "no_account".into(),
                field: Some("account".into()),
                vals: vec![row.account.clone()],
            };
            return Err(Problem::fail(format!("there is no account {}", row.account)).with(message));
        }
        Err(error) => return Err(error.into()),
    };
    transaction.commit()?;
    context.file(format!("branch-{}.csv", row.branch), format!("{line},{},{cents}", row.account));
    Ok(Posted { balance })
}

/// At least once for each batch: what is written is the same however often.
async fn tell(accounts: Shared<Accounts>, end: BatchEnd) -> Result<(), Problem> {
    let accounts = accounts.lock().unwrap_or_else(PoisonError::into_inner);
    let BatchEnd { batch, status, counts, .. } = end;
    accounts.execute(
        "insert or replace into ended (batch, status, done, failed) values (?, ?, ?, ?)",
        params![batch.as_str(), status.as_str(), counts.done.cast_signed(), counts.failed.cast_signed()],
    )?;
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let database = std::env::args_os().nth(1).ok_or("say which database: bank DATABASE")?;
    let mut config = Config::load(&Layers::of_process(None))?;
    config.worker.pools.clear();
    let telemetry = Telemetry::start(&config.log, &config.telemetry)?;
    let bank = Application::sharing("bank", Accounts(database.into()))
        .and_then(|bank| bank.blocking_handler("post", post))
        .map(|bank| bank.mark_done(tell));
    Worker::builder().config(config).app(bank).run(Shutdown::on_signals()?).await?;
    telemetry.stop().await;
    Ok(())
}
