//! A worker that renders invoices: two handlers that share what their application has opened.
//!
//! ```sh
//! export DRAYMAN_OBJECTS__URL=file:///tmp/objects     # where the files of tasks lie
//! cargo run -p worker --example invoices &
//! drayman submit --user ana --app invoices --op render --wait '{"number": 7, "lines": [["book", 1250], ["pen", 90]]}'
//! ```

use std::collections::HashMap;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};
use worker::builder::Worker;
use worker::config::{Config, Layers};
use worker::execute::function::{Application, BoxError, Context, Resource, Shared};
use worker::execute::task::Problem;
use worker::shutdown::Shutdown;

/// What both handlers use. Here a table in memory; in life a pool of connections.
#[derive(Default)]
struct Ledger {
    totals: Mutex<HashMap<u32, u64>>,
}

#[derive(Deserialize)]
struct Invoice {
    number: u32,
    /// What, and for how many cents.
    lines: Vec<(String, u64)>,
}

#[derive(Serialize)]
struct Rendered {
    number: u32,
    total_cents: u64,
}

async fn open() -> Result<Ledger, BoxError> {
    Ok(Ledger::default())
}

async fn render<R>(ledger: Shared<R>, invoice: Invoice, context: Context) -> Result<Rendered, Problem>
where
    R: Resource<Of = Ledger>,
{
    if invoice.lines.is_empty() {
        // Another attempt would find no lines either.
        return Err(Problem::fail("an invoice needs a line"));
    }
    let mut text = String::new();
    let mut total_cents = 0;
    for (at, (what, cents)) in invoice.lines.iter().enumerate() {
        text.push_str(&format!("{what:<30}{cents:>10}\n"));
        total_cents += cents;
        context.progress(at as u64 + 1, Some(invoice.lines.len() as u64), None);
    }
    context.file("invoice.txt", text);
    ledger.totals.lock().map_err(|_| Problem::retry("another invoice broke off"))?.insert(invoice.number, total_cents);
    Ok(Rendered { number: invoice.number, total_cents })
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    // As the daemon does: /etc/drayman/worker.toml, then variables such as DRAYMAN_REDIS__URL.
    let mut config = Config::load(&Layers::of_process(None))?;
    // Its own handlers and nothing else.
    config.worker.pools.clear();
    let invoices =
        Application::sharing("invoices", open).and_then(|app| app.handler("render", render)).and_then(|app| {
            app.handler("total", |ledger, number: u32, _| async move {
                let totals = ledger.totals.lock().map_err(|_| Problem::retry("another invoice broke off"))?;
                totals.get(&number).copied().ok_or_else(|| Problem::fail("no such invoice"))
            })
        });
    Worker::builder().config(config).app(invoices).run(Shutdown::on_signals()?).await
}
