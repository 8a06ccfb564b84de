//! A worker for a flow: orders in a CSV go into SQLite in chunks, and a report is made of them. `orders.toml` is the flow.

use std::collections::BTreeMap;
use std::fs;
use std::num::NonZeroUsize;

use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};
use worker::builder::Worker;
use worker::config::{Config, Layers};
use worker::execute::chunks::files::{csv, csv_to};
use worker::execute::chunks::sqlite::sqlite;
use worker::execute::chunks::{Chunks, Counts, items};
use worker::execute::function::{Application, BoxError, Context};
use worker::execute::task::Problem;
use worker::shutdown::Shutdown;

const CHUNK: NonZeroUsize = NonZeroUsize::new(1_000).unwrap();

/// Where everything lies.
#[derive(Debug, Deserialize)]
struct Places {
    orders: String,
    database: String,
    report: String,
}

#[derive(Debug, Deserialize)]
struct Order {
    id: i64,
    customer: String,
    cents: i64,
}

/// Some orders have no price: up to a hundred of them are passed over.
fn load(places: Places, context: Context) -> Result<Counts, Problem> {
    let database = Connection::open(&places.database).map_err(|error| Problem::retry(error.to_string()))?;
    let table = "CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY, customer TEXT, cents INTEGER)";
    database.execute(table, []).map_err(|error| Problem::retry(error.to_string()))?;
    let with_tax = |order: &Order| match order.cents {
        ..0 => Err(Problem::fail("it has no price")),
        0 => Ok(None),
        cents => Ok(Some((order.id, order.customer.clone(), cents + cents / 5))),
    };
    let insert =
        sqlite(&places.database, "INSERT INTO orders VALUES (?1, ?2, ?3)", |statement, order: &(i64, _, i64)| {
            let (id, customer, cents): &(i64, String, i64) = order;
            statement.execute(params![id, customer, cents]).map(drop)
        });
    Chunks::of(CHUNK).skip_limit(100).run(&context, csv(places.orders), with_tax, insert)
}

#[derive(Debug, Clone, Serialize)]
struct Line {
    customer: String,
    orders: u64,
    cents: i64,
}

fn report(places: Places, context: Context) -> Result<Counts, Problem> {
    let wrong = |error: rusqlite::Error| Problem::retry(error.to_string());
    let database = Connection::open(&places.database).map_err(wrong)?;
    let mut rows = database.prepare("SELECT customer, cents FROM orders").map_err(wrong)?;
    let rows = rows.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?))).map_err(wrong)?;
    let mut customers: BTreeMap<String, (u64, i64)> = BTreeMap::new();
    for row in rows {
        let (customer, cents) = row.map_err(wrong)?;
        let sum = customers.entry(customer).or_default();
        *sum = (sum.0 + 1, sum.1 + cents);
    }
    let lines: Vec<Line> =
        customers.into_iter().map(|(customer, (orders, cents))| Line { customer, orders, cents }).collect();
    let counts = Chunks::of(CHUNK).run(
        &context,
        items(|| lines.iter().cloned()),
        |line| Ok(Some(line.clone())),
        csv_to(&places.report),
    )?;
    let text = fs::read(&places.report).map_err(|error| Problem::retry(error.to_string()))?;
    context.file("report.csv", text);
    Ok(counts)
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    // As the daemon does: /etc/drayman/worker.toml, then variables such as DRAYMAN_REDIS__URL.
    let mut config = Config::load(&Layers::of_process(None))?;
    // Its own handlers and nothing else.
    config.worker.pools.clear();
    let shop = Application::new("shop")
        .and_then(|shop| shop.blocking_handler("load", |_, places, context| load(places, context)))
        .and_then(|shop| shop.blocking_handler("report", |_, places, context| report(places, context)));
    Worker::builder().config(config).app(shop).run(Shutdown::on_signals()?).await
}
