//! The functions of the status tracker: typed calls and replies.

use serde_json::Value;

use super::{Args, expect_len};
use crate::error::Error;
use crate::ids::{Fence, TrackId, TrackerName};
use crate::library::{TRACKER_CREATE, TRACKER_END, TRACKER_READ, TRACKER_RENEW, TRACKER_SET, TRACKER_START};
use crate::model::track::{Codes, Failure, Lock, Record, TrackStatus, read_attempts};
use crate::reply::Reply;
use crate::store::Store;

/// What became of a new record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TrackCreated {
    /// It is there now.
    Created,
    /// There was one of this id; nothing was written.
    Exists,
    /// The server's memory is nearly full.
    NoRoom {
        /// Bytes that it uses.
        used: u64,
        /// Bytes above which nothing new is accepted.
        mark: u64,
    },
}

/// What became of a start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TrackStarted {
    /// It is in progress and locked.
    Started {
        /// Greater than that of any start before.
        fence: Fence,
        /// How many attempts have failed.
        retry: u32,
        /// The data, whatever others have made of it.
        data: Vec<u8>,
    },
    /// Another holds it.
    Locked {
        /// Who.
        by: String,
        /// Until when unless the lock is renewed, in ms since 1970.
        until_ms: u64,
    },
    /// It has succeeded.
    Succeeded,
    /// It is ignored.
    Ignored,
    /// Its status is a number from which this start may not begin.
    NotReady(u32),
    /// There is no record.
    Missing,
    /// The lock of this very start was held and lost before.
    Lost,
}

/// What became of an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TrackEnded {
    /// It is recorded.
    Ended {
        /// Where the job stands now.
        status: TrackStatus,
        /// How many attempts have failed.
        retry: u32,
    },
    /// The lock is another's or nobody's; nothing was written.
    Lost,
}

/// What became of a wish for another status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TrackSet {
    /// It has it.
    Set,
    /// There is no record.
    Missing,
    /// It has succeeded, which is final.
    Succeeded,
    /// Somebody works on it.
    Locked {
        /// Who.
        by: String,
        /// Until when unless the lock is renewed, in ms since 1970.
        until_ms: u64,
    },
    /// The number stands for a status that only an attempt gives.
    Taken,
}

/// Who holds the lock of a tracked job.
#[derive(Debug, Clone)]
pub(crate) struct TrackHold {
    pub tracker: TrackerName,
    pub id: TrackId,
    pub lock: String,
    pub fence: Fence,
}

/// Some records, and where to go on.
pub(crate) struct TrackPage {
    pub records: Vec<Record>,
    /// The score of the last entry of the index, if there was any.
    pub last: Option<String>,
}

fn args(tracker: &TrackerName, id: &TrackId) -> Args {
    Args::new().text(tracker.as_str()).text(id.as_str())
}

impl Store {
    /// Creates a record.
    pub(crate) async fn tracker_create(
        &self,
        tracker: &TrackerName,
        id: &TrackId,
        status: TrackStatus,
        codes: &Codes,
        keep_ms: u64,
        data: &str,
    ) -> Result<TrackCreated, Error> {
        let args = args(tracker, id).text(status.to_string()).text(codes.to_string()).number(keep_ms).text(data);
        let reply = self.call(&TRACKER_CREATE, args.0).await?;
        match (reply.text(), &reply) {
            (Some("created"), _) => Ok(TrackCreated::Created),
            (Some("exists"), _) => Ok(TrackCreated::Exists),
            (_, Reply::Array(items)) if word(items) == Some("no_room") => {
                expect_len(items, 3, "tracker_create")?;
                let bytes = |at: usize| items[at].int("tracker_create").map(|bytes| bytes as u64);
                Ok(TrackCreated::NoRoom { used: bytes(1)?, mark: bytes(2)? })
            }
            _ => Err(reply.unexpected("tracker_create")),
        }
    }

    /// Starts an attempt. The same lock again returns the same.
    pub(crate) async fn tracker_start(
        &self,
        tracker: &TrackerName,
        id: &TrackId,
        lock: &str,
        expire_ms: u64,
        max_retry: u32,
        ready: &[u32],
    ) -> Result<TrackStarted, Error> {
        const NAME: &str = "tracker_start";
        let args = args(tracker, id).text(lock).number(expire_ms).number(max_retry);
        let args = ready.iter().fold(args, |args, code| args.number(*code));
        let reply = self.call(&TRACKER_START, args.0).await?;
        match (reply.text(), &reply) {
            (Some("succeeded"), _) => Ok(TrackStarted::Succeeded),
            (Some("ignored"), _) => Ok(TrackStarted::Ignored),
            (Some("missing"), _) => Ok(TrackStarted::Missing),
            (Some("lost"), _) => Ok(TrackStarted::Lost),
            (_, Reply::Array(items)) => match (word(items), &items[..]) {
                (Some("started"), [_, fence, retry, data]) => Ok(TrackStarted::Started {
                    fence: Fence(fence.int(NAME)? as u64),
                    retry: retry.int(NAME)? as u32,
                    data: data.clone().into_bytes().unwrap_or_default(),
                }),
                (Some("locked"), [_, by, until]) => {
                    Ok(TrackStarted::Locked { by: by.lossy().unwrap_or_default(), until_ms: until.int(NAME)? as u64 })
                }
                // Whatever others have written there: it is nothing to start from.
                (Some("not_ready"), [_, code]) => Ok(TrackStarted::NotReady(code.int(NAME).unwrap_or(0) as u32)),
                _ => Err(reply.unexpected(NAME)),
            },
            _ => Err(reply.unexpected(NAME)),
        }
    }

    /// Renews a lock; whether it is held.
    pub(crate) async fn tracker_renew(&self, hold: &TrackHold, expire_ms: u64) -> Result<bool, Error> {
        let args = args(&hold.tracker, &hold.id).text(&hold.lock).number(hold.fence.0).number(expire_ms);
        let reply = self.call(&TRACKER_RENEW, args.0).await?;
        match reply.text() {
            Some("held") => Ok(true),
            Some("lost") => Ok(false),
            _ => Err(reply.unexpected("tracker_renew")),
        }
    }

    /// Ends an attempt: with the data from now on, if it changes, or with a failure. The same again returns the same.
    pub(crate) async fn tracker_end(
        &self,
        hold: &TrackHold,
        end: &Result<Option<String>, Failure>,
    ) -> Result<TrackEnded, Error> {
        const NAME: &str = "tracker_end";
        let args = args(&hold.tracker, &hold.id).text(&hold.lock).number(hold.fence.0);
        let args = match end {
            Ok(data) => args.text("succeeded").text(data.as_deref().unwrap_or_default()).text("").text(""),
            Err(failure) => {
                let errors = serde_json::to_string(failure).expect("texts can be written as JSON");
                args.text("failed").text("").text(errors).text(failure.for_history())
            }
        };
        let reply = self.call(&TRACKER_END, args.0).await?;
        match (reply.text(), &reply) {
            (Some("lost"), _) => Ok(TrackEnded::Lost),
            (_, Reply::Array(items)) if word(items) == Some("ended") => {
                expect_len(items, 3, NAME)?;
                let status = items[1].text().and_then(|text| text.parse().ok());
                let status = status.ok_or_else(|| items[1].unexpected(NAME))?;
                Ok(TrackEnded::Ended { status, retry: items[2].int(NAME)? as u32 })
            }
            _ => Err(reply.unexpected(NAME)),
        }
    }

    /// Gives a record that nobody works on another status.
    pub(crate) async fn tracker_set(
        &self,
        tracker: &TrackerName,
        id: &TrackId,
        to: TrackStatus,
    ) -> Result<TrackSet, Error> {
        let reply = self.call(&TRACKER_SET, args(tracker, id).text(to.to_string()).0).await?;
        match (reply.text(), &reply) {
            (Some("set"), _) => Ok(TrackSet::Set),
            (Some("missing"), _) => Ok(TrackSet::Missing),
            (Some("succeeded"), _) => Ok(TrackSet::Succeeded),
            (Some("taken"), _) => Ok(TrackSet::Taken),
            (_, Reply::Array(items)) if word(items) == Some("locked") => {
                expect_len(items, 3, "tracker_set")?;
                let until_ms = items[2].int("tracker_set")? as u64;
                Ok(TrackSet::Locked { by: items[1].lossy().unwrap_or_default(), until_ms })
            }
            _ => Err(reply.unexpected("tracker_set")),
        }
    }

    /// Reads one record.
    pub(crate) async fn tracker_get(&self, tracker: &TrackerName, id: &TrackId) -> Result<Option<Record>, Error> {
        let args = Args::new().text(tracker.as_str()).text("one").text(id.as_str());
        Ok(page(self.call(&TRACKER_READ, args.0).await?)?.records.pop())
    }

    /// Reads some records of an index: that of a status, or `expired`.
    pub(crate) async fn tracker_list(
        &self,
        tracker: &TrackerName,
        index: &str,
        newest_first: bool,
        behind: &str,
        most: usize,
    ) -> Result<TrackPage, Error> {
        let order = if newest_first { "newest" } else { "oldest" };
        let args = Args::new().text(tracker.as_str()).text("list").text(index).text(order).text(behind);
        page(self.call(&TRACKER_READ, args.number(most as u64).0).await?)
    }
}

fn word(items: &[Reply]) -> Option<&str> {
    items.first().and_then(Reply::text)
}

fn page(reply: Reply) -> Result<TrackPage, Error> {
    const NAME: &str = "tracker_read";
    let mut rows = reply.array(NAME)?.into_iter();
    let now_ms = rows.next().unwrap_or(Reply::Nil).int(NAME)? as u64;
    let mut page = TrackPage { records: Vec::new(), last: None };
    for row in rows {
        let row = row.array(NAME)?;
        expect_len(&row, 13, NAME)?;
        page.last = row[1].lossy();
        page.records.extend(record(&row, now_ms));
    }
    Ok(page)
}

/// A record as it is found; `None` if the id has none. What others may have made unreadable shows as absent.
fn record(row: &[Reply], now_ms: u64) -> Option<Record> {
    let text = |at: usize| row[at].lossy().unwrap_or_default();
    let number = |at: usize| row[at].int("tracker_read").unwrap_or(0);
    let until_ms = number(8) as u64;
    let lock = row[6].lossy().map(|holder| Lock { holder, at: text(7), until_ms, expired: until_ms <= now_ms });
    Some(Record {
        id: text(0),
        status: row[2].text()?.parse().ok()?,
        code: number(3) as u32,
        create_at: text(4),
        update_at: text(5),
        lock,
        retry: number(9) as u32,
        data: read_data(&row[10].clone().into_bytes().unwrap_or_default()),
        errors: row[11].text().and_then(|errors| serde_json::from_str(errors).ok()),
        history: read_attempts(&text(12)),
    })
}

/// Data that is no JSON was made so by others: its text.
pub(crate) fn read_data(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap_or_else(|_| String::from_utf8_lossy(bytes).into_owned().into())
}
