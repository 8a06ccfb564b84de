//! Records of what has ended, written through to a database for whoever asks its questions in SQL. The leader does it.
//!
//! The feed is in Redis, how far it is written is in the database, and both move on together: each record is there once, whoever is
//! killed when. Nothing waits for it.

use std::time::Duration;

use queue_core::export::{Feed, Record};

use crate::execute::sql::chunk::Database;
use crate::execute::sql::history::{Cursor, History, Overtaken};

mod records;

/// How many records are written at once.
const TOGETHER: usize = 1000;
/// The pause where there is nothing to write.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(500);
/// The pause after an error.
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(5);
/// How many looks pass before the feed is told again that somebody reads it: it is on for a day.
const LOOKS_PER_RENEWAL: u32 = 7_200;

/// Where records are written.
#[derive(Clone)]
pub struct Target {
    /// The database.
    pub database: Database,
    /// Most records that wait to be written.
    pub max_pending: u64,
}

/// Writes what ends, until it is dropped.
pub async fn run(feed: Feed, target: Target) {
    let mut is_told = false;
    loop {
        match write(&feed, &target, &mut is_told).await {
            Ok(Overtaken) => tracing::info!("another worker exports records, looking how far it is"),
            Err(reason) => {
                // What does not change is said once.
                if !std::mem::replace(&mut is_told, true) {
                    tracing::warn!(reason, "records can't be exported now, they wait in Redis");
                }
                tokio::time::sleep(TRY_AGAIN_AFTER).await;
            }
        }
    }
}

/// Writes on one connection until that ends.
async fn write(feed: &Feed, target: &Target, is_told: &mut bool) -> Result<Overtaken, String> {
    let lost = |error: queue_core::Error| error.to_string();
    // Also while the database is away: what ends meanwhile is written when it is back.
    feed.turn_on(target.max_pending).await.map_err(lost)?;
    let dialect = target.database.dialect();
    let (mut history, mut cursor) = History::open(&target.database, &records::tables(dialect)).await?;
    if std::mem::take(is_told) {
        tracing::info!("records are exported again");
    }
    let mut looks = 0;
    loop {
        let read = feed.read(&cursor.at, TOGETHER).await.map_err(lost)?;
        let Some(last) = read.last() else {
            tokio::time::sleep(LOOK_AGAIN_AFTER).await;
            looks += 1;
            if looks % LOOKS_PER_RENEWAL == 0 {
                feed.turn_on(target.max_pending).await.map_err(lost)?;
            }
            continue;
        };
        let dropped = missing_before(&read, cursor.number);
        if dropped > 0 {
            tracing::warn!(
                dropped,
                "records were dropped before they could be exported: export.max_pending is too small"
            );
        }
        let after = Cursor { at: last.at.clone(), number: last.number, dropped: cursor.dropped + dropped };
        if let Err(Overtaken) = history.append(records::insert(&read, dialect), &cursor, &after).await? {
            return Ok(Overtaken);
        }
        cursor = after;
        feed.trim(&cursor.at).await.map_err(lost)?;
        looks += 1;
        if looks % LOOKS_PER_RENEWAL == 0 {
            feed.turn_on(target.max_pending).await.map_err(lost)?;
        }
    }
}

/// How many entries were dropped among these and before them. Numbers that begin anew are those of another Redis.
fn missing_before(read: &[Record], number: u64) -> u64 {
    let mut before = number;
    read.iter()
        .map(|record| {
            let missing = if before > 0 { record.number.saturating_sub(before + 1) } else { 0 };
            before = record.number;
            missing
        })
        .sum()
}
