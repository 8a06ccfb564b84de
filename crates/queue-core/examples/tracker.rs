//! Keeps the books of jobs that an application runs itself: `cargo run -p queue-core --example tracker`, at the Redis
//! of the configuration, or of the URL that it is given.

use std::error::Error;

use queue_core::Store;
use queue_core::config::ClientConfig;
use queue_core::model::track::{Failure, TrackStatus};
use queue_core::tracker::{NewRecord, Order, Selection, StartOptions, Tracker};
use serde_json::Value;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let config = ClientConfig::of_process(None, std::env::args().nth(1))?;
    keep_books(Store::connect(&config.redis).await?).await
}

/// Two jobs, of which the second fails and is listed.
pub async fn keep_books(store: Store) -> Result<(), Box<dyn Error>> {
    let tracker = Tracker::new(store, "invoices")?;
    // False if there is one of this id.
    tracker.create("job-1", NewRecord::default()).await?;

    let mut job = tracker.start("job-1", StartOptions::default()).await?;
    match print(job.data()).await {
        Ok(pages) => {
            job.updates().set("pages", pages)?;
            job.succeed().await?;
        }
        Err(error) => drop(job.fail(Failure::of(&error)).await?),
    }

    // Or all of this in one: an error and a panic are failures, and a lost lock ends the work.
    tracker.create("job-2", NewRecord::default()).await?;
    let printed = tracker.run("job-2", StartOptions::default(), async |job| print(&job.data()["pages"]).await).await;
    printed.unwrap_or_else(|error| {
        eprintln!("job-2: {error}");
        0
    });

    for failed in tracker.list(Selection::Status(TrackStatus::Failed), 100, Order::Oldest).await? {
        println!("{} has failed {} times", failed.id, failed.retry);
    }
    Ok(())
}

/// The application's own work.
async fn print(data: &Value) -> Result<u32, String> {
    if data.is_object() { Ok(2) } else { Err("there is nothing to print".into()) }
}
