//! What a worker reads and writes of a batch while it holds a claim on a part of it.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{BatchError, BatchView, VIEW, view_of};
use crate::calls::{Fields, Mark};
use crate::error::Error;
use crate::ids::JobId;
use crate::model::batch::{BlockName, Chunk, Row, RowResult, pack_results, unpack_results, unpack_rows};
use crate::model::task::{Encoding, Payload};
use crate::session::Pen;

/// What all rows of a batch have in common. It never changes.
#[derive(Debug, Clone)]
pub struct Facts {
    /// How inputs, context and results are written.
    pub encoding: Encoding,
    /// What the submitter says besides.
    pub context: Option<Payload>,
    /// The statement that runs for each row, if no handler works on them.
    pub statement: Option<String>,
    /// Where it runs: the fields that a SQL job has for that.
    pub connection: BTreeMap<String, Vec<u8>>,
}

/// How long a chunk took that was run: what the size of those to come follows from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    row: Duration,
    fixed: Duration,
}

impl Pace {
    /// Of `rows` rows that took so long together, and what the chunk cost besides however many there are. `None` without rows.
    pub fn of(took: Duration, rows: usize, fixed: Duration) -> Option<Self> {
        let rows = u32::try_from(rows).ok().filter(|rows| *rows > 0)?;
        Some(Self { row: took / rows, fixed })
    }

    /// The fields that say so.
    pub fn with(self, fields: Fields) -> Fields {
        let micros = |time: Duration| format!("{:.2}", time.as_secs_f64() * 1e6);
        fields.with("row_us", micros(self.row)).with("fixed_us", micros(self.fixed))
    }
}

/// The fields of a batch that say where a statement runs.
const CONNECTION: [&str; 6] = ["database", "host", "port", "dbname", "dbuser", "pass"];

/// How many rows of a chunk have ended, and how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ended {
    /// Done, with those that were skipped.
    pub done: u64,
    /// Failed.
    pub failed: u64,
    /// Skipped.
    pub skipped: u64,
    /// Some of them wrote output text.
    pub has_files: bool,
}

impl Ended {
    /// Counts results.
    pub fn of(results: &[Option<RowResult>]) -> Self {
        use crate::model::batch::RowEnd;
        let mut ended = Self::default();
        for result in results.iter().flatten() {
            match result.end {
                RowEnd::Done => ended.done += 1,
                RowEnd::Skipped => (ended.done, ended.skipped) = (ended.done + 1, ended.skipped + 1),
                RowEnd::Failed => ended.failed += 1,
            }
            ended.has_files |= !result.files.is_empty();
        }
        ended
    }

    fn text(&self) -> String {
        format!("{} {} {} {}", self.done, self.failed, self.skipped, u8::from(self.has_files))
    }
}

/// The fields with which a chunk ends whose rows have all ended.
pub fn end_fields(results: &[Option<RowResult>]) -> Fields {
    let ended = Ended::of(results);
    let fields = Fields::new()
        .with("results", pack_results(results))
        .with("done", ended.done.to_string())
        .with("failed", ended.failed.to_string())
        .with("skipped", ended.skipped.to_string());
    fields.with_some("has_files", ended.has_files.then_some("1"))
}

/// The fields that a chunk keeps while some of its rows wait for another attempt.
pub fn partial_fields(chunk: &Chunk, results: &[Option<RowResult>]) -> Fields {
    let chunk = Chunk { has_partial: true, ..chunk.clone() };
    Fields::new()
        .with("part", chunk.to_string())
        .with("partial", pack_results(results))
        .with("partial_counts", Ended::of(results).text())
}

impl Pen {
    /// When a batch was made, as its record says; `None` if it is gone. Another batch may have its id later.
    pub async fn batch_made(&self, batch: &JobId) -> Result<Option<Vec<u8>>, Error> {
        let key = self.store().keys().job(batch.as_str());
        Ok(self.store().command("HGET", &[key.as_bytes(), b"created_at"]).await?.into_bytes())
    }

    /// What all rows of a batch have in common; `None` if it is gone.
    pub async fn batch_facts(&self, batch: &JobId) -> Result<Option<Facts>, Error> {
        let key = self.store().keys().job(batch.as_str());
        let mut args: Vec<&[u8]> = vec![key.as_bytes(), b"encoding", b"batch_context", b"statement"];
        args.extend(CONNECTION.iter().map(|name| name.as_bytes()));
        let mut values = self.store().command("HMGET", &args).await?.array("HMGET")?.into_iter();
        let mut next = || values.next().and_then(crate::reply::Reply::into_bytes);
        let Some(encoding) = next() else { return Ok(None) };
        let encoding = String::from_utf8_lossy(&encoding).parse().unwrap_or_default();
        let context = next().map(|bytes| Payload { encoding, bytes });
        let statement = next().map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let connection =
            CONNECTION.iter().filter_map(|name| Some(((*name).to_owned(), next()?))).collect::<BTreeMap<_, _>>();
        Ok(Some(Facts { encoding, context, statement, connection }))
    }

    /// The rows of a block; `None` if it is gone.
    pub async fn block(&self, batch: &JobId, block: BlockName) -> Result<Option<Vec<Row>>, BatchError> {
        let read = self.store().batch_read(batch, true, false, &[block]).await?.pop().unwrap_or_default();
        if read.rows.is_empty() {
            return Ok(None);
        }
        let unreadable =
            |error| BatchError::Unreadable { id: batch.clone(), reason: format!("block {block}: {error}") };
        unpack_rows(&read.rows).map(Some).map_err(unreadable)
    }

    /// What became of the rows of this chunk at earlier attempts.
    pub async fn partial(&self) -> Result<Vec<Option<RowResult>>, Error> {
        let key = self.store().keys().job(self.job().as_str());
        let packed = self.store().command("HGET", &[key.as_bytes(), b"partial"]).await?.into_bytes();
        // What nobody can read was not worked on.
        Ok(packed.and_then(|packed| unpack_results(&packed).ok()).unwrap_or_default())
    }

    /// Leaves the rows of this chunk behind the first `keep` to others. `results` say what became of all of them at earlier attempts.
    pub async fn cut(&self, keep: usize, results: &[Option<RowResult>]) -> Result<Mark, Error> {
        let partial = |results: &[Option<RowResult>]| match results.iter().any(Option::is_some) {
            true => (pack_results(results), Ended::of(results).text()),
            false => (Vec::new(), String::new()),
        };
        let (kept, rest) = results.split_at(keep.min(results.len()));
        self.cut_chunk(keep, partial(kept), partial(rest)).await
    }

    /// How the batch stands.
    pub async fn batch_view(&self, batch: &JobId) -> Result<Option<BatchView>, Error> {
        let found = self.store().inspect(VIEW, [batch.as_str()]).await?.pop();
        Ok(found.and_then(|found| view_of(batch.as_str(), &found)).map(|(view, _)| view))
    }

    /// Reads the rows of a batch in the order of their lines.
    pub async fn batch_reader(&self, batch: &JobId) -> Result<super::BatchReader, BatchError> {
        super::BatchReader::open(self.store().clone(), batch.clone(), Encoding::default(), false).await
    }
}
