//! A worker that books the rows of batches.

use serde::{Deserialize, Serialize};
use worker::builder::Worker;
use worker::execute::function::{BoxError, Context};
use worker::execute::rows::BatchEnd;
use worker::execute::task::Problem;
use worker::shutdown::Shutdown;

#[derive(Deserialize)]
struct Booking {
    account: String,
    cents: i64,
}

#[derive(Serialize)]
struct Booked {
    cents: i64,
}

async fn book(booking: Booking, context: Context) -> Result<Booked, Problem> {
    if booking.cents == 0 {
        // A row that is ignored is skipped.
        return Err(Problem::ignore("nothing is to be moved"));
    }
    if booking.account.is_empty() {
        return Err(Problem::fail("it names no account"));
    }
    // One line of the batch's file of this name.
    context.file("booked.csv", format!("{},{}", booking.account, booking.cents));
    Ok(Booked { cents: booking.cents })
}

async fn tell(end: BatchEnd) -> Result<(), Problem> {
    println!("batch {} is {}: {} of {} rows failed", end.batch, end.status, end.counts.failed, end.counts.rows);
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let url = std::env::var("REDIS_URL").unwrap_or_else(|_| "redis://127.0.0.1:6379/5".into());
    Worker::builder().redis(url).batch_handler("bank", "book", book, tell).run(Shutdown::on_signals()?).await
}
