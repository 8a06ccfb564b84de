//! The feed of records for whoever writes them to a database: turned on while somebody does, read in the order in which things ended, and
//! cut off behind what is written there.
//!
//! An entry is the record as it was when it ended. Who writes it keeps beside it how far the feed is written, for a reader may be
//! lost between the two.

use std::collections::HashMap;
use std::time::Duration;

use crate::error::Error;
use crate::reply::Reply;
use crate::store::Store;

/// How long the feed is on without being told again.
const ON: Duration = Duration::from_secs(86_400);

/// What a record is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A SQL job.
    Sql,
    /// A task.
    Task,
    /// A batch.
    Batch,
    /// An execution of a flow, with its steps.
    Flow,
    /// A job that an application runs itself, under a tracker.
    Tracked,
}

impl Kind {
    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::Sql => "sql",
            Kind::Task => "task",
            Kind::Batch => "batch",
            Kind::Flow => "flow",
            Kind::Tracked => "tracked",
        }
    }

    fn of(word: &str) -> Option<Self> {
        [Kind::Sql, Kind::Task, Kind::Batch, Kind::Flow, Kind::Tracked].into_iter().find(|kind| kind.as_str() == word)
    }
}

/// A record that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its place in the feed.
    pub at: String,
    /// Its number in the feed. Where one is missing, an entry was dropped because there were too many. They begin anew where the feed does.
    pub number: u64,
    /// What it is of; nothing for a kind that this program does not know.
    pub kind: Option<Kind>,
    /// The id; of a tracked job, its tracker's name and its own with a colon between.
    pub id: String,
    /// What it says.
    pub fields: HashMap<String, String>,
}

impl Record {
    /// When it was entered, in ms since 1970, by the clock of Redis.
    pub fn at_ms(&self) -> u64 {
        self.at.split('-').next().and_then(|ms| ms.parse().ok()).unwrap_or(0)
    }
}

/// The feed.
#[derive(Debug, Clone)]
pub struct Feed {
    store: Store,
}

impl Feed {
    /// On a connection.
    pub fn new(store: Store) -> Self {
        Self { store }
    }

    /// Has what ends from now on entered, for a day. Of more entries than so many the oldest are dropped.
    pub async fn turn_on(&self, max_pending: u64) -> Result<(), Error> {
        let key = self.store.keys().exporting();
        let most = max_pending.to_string();
        self.store.command("HSET", &[key.as_bytes(), b"max_pending", most.as_bytes()]).await?;
        let ms = ON.as_millis().to_string();
        self.store.command("PEXPIRE", &[key.as_bytes(), ms.as_bytes()]).await.map(drop)
    }

    /// The first so many entries behind a place; an empty one is before all.
    pub async fn read(&self, behind: &str, most: usize) -> Result<Vec<Record>, Error> {
        const COMMAND: &str = "XRANGE";
        let (key, most) = (self.store.keys().export(), most.to_string());
        let from = if behind.is_empty() { "-".to_owned() } else { format!("({behind}") };
        let args: [&[u8]; 5] = [key.as_bytes(), from.as_bytes(), b"+", b"COUNT", most.as_bytes()];
        let read = |entry: Reply| {
            let mut parts = entry.array(COMMAND)?.into_iter();
            let at = parts.next().and_then(|at| at.lossy()).unwrap_or_default();
            let flat = parts.next().unwrap_or(Reply::Nil).array(COMMAND)?;
            let mut fields: HashMap<String, String> = flat
                .chunks_exact(2)
                .map(|pair| (pair[0].lossy().unwrap_or_default(), pair[1].lossy().unwrap_or_default()))
                .collect();
            let mut text = |name: &str| fields.remove(name).unwrap_or_default();
            let (number, kind, id) = (text("number").parse().unwrap_or(0), Kind::of(&text("kind")), text("id"));
            Ok(Record { at, number, kind, id, fields })
        };
        self.store.command(COMMAND, &args).await?.array(COMMAND)?.into_iter().map(read).collect()
    }

    /// Removes the entries up to a place, and that one.
    pub async fn trim(&self, up_to: &str) -> Result<(), Error> {
        let (ms, sequence) = up_to.split_once('-').unwrap_or((up_to, "0"));
        let next =
            sequence.parse::<u64>().map_or_else(|_| up_to.to_owned(), |sequence| format!("{ms}-{}", sequence + 1));
        let key = self.store.keys().export();
        self.store.command("XTRIM", &[key.as_bytes(), b"MINID", next.as_bytes()]).await.map(drop)
    }

    /// How many entries wait.
    pub async fn pending(&self) -> Result<u64, Error> {
        let key = self.store.keys().export();
        Ok(self.store.command("XLEN", &[key.as_bytes()]).await?.int("XLEN")?.max(0) as u64)
    }
}
