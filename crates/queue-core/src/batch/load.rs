//! Handing rows over: they are packed into blocks as they come, and a block leaves while the next one fills. Of a load of millions
//! of rows some hundred KiB are in memory at a time.

use std::time::Duration;

use serde::de::IgnoredAny;
use tokio::task::JoinHandle;

use super::{BatchError, Batches};
use crate::calls::{self, Fields, Load, PackedBlock};
use crate::error::Error;
use crate::ids::{JobId, User};
use crate::model::Status;
use crate::model::batch::{BLOCK_MAX_BYTES, BLOCK_MAX_ROWS, LINE_MAX, ROW_MAX_BYTES, Row, pack_rows, packed_bytes};
use crate::model::task::{Encoding, read_msgpack};
use crate::store::Store;

/// So many bytes of blocks leave in one call.
const CALL_BYTES: usize = 4 * BLOCK_MAX_BYTES;
/// The pauses before a call is sent again that Redis did not answer.
const PAUSES: [Duration; 4] = [
    Duration::from_millis(100),
    Duration::from_millis(400),
    Duration::from_millis(1_500),
    Duration::from_millis(4_000),
];

/// What a load that is complete has done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// The batch.
    pub id: JobId,
    /// How many rows it has.
    pub rows: u64,
    /// The same load was complete before, and nothing was written; how the batch stands.
    pub before: Option<Status>,
}

/// Hands rows over to a batch. What was handed over counts once [`finish`](Loader::finish) has answered; a loader that is
/// dropped before leaves the batch as it was.
#[derive(Debug)]
pub struct Loader {
    batches: Batches,
    encoding: Encoding,
    /// What leaves with the next call, but for its blocks.
    next: Load,
    waiting: Vec<Row>,
    waiting_bytes: usize,
    blocks_bytes: usize,
    rows: u64,
    bytes: u64,
    under_way: Option<JoinHandle<Result<calls::Loaded, Error>>>,
    has_sent: bool,
    before: Option<(Status, u64)>,
}

impl Loader {
    pub(super) fn new(
        batches: Batches,
        batch: JobId,
        user: User,
        encoding: Encoding,
        key: String,
        new: Option<Fields>,
        is_release: bool,
    ) -> Self {
        let next = Load {
            batch,
            user,
            key,
            place: 0,
            blocks: Vec::new(),
            is_end: false,
            is_release,
            max_rows: batches.limits.max_batch_rows.get(),
            max_bytes: batches.limits.max_batch_bytes.0,
            keep_ms: batches.keep_ms(),
            new,
        };
        Self {
            batches,
            encoding,
            next,
            waiting: Vec::new(),
            waiting_bytes: 0,
            blocks_bytes: 0,
            rows: 0,
            bytes: 0,
            under_way: None,
            has_sent: false,
            before: None,
        }
    }

    /// The batch.
    pub fn id(&self) -> &JobId {
        &self.next.batch
    }

    /// How many rows were handed over.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Hands one row over. After an error nothing of the load is left in the batch.
    pub async fn push(&mut self, row: Row) -> Result<(), BatchError> {
        let pushed = self.push_row(row).await;
        if pushed.is_err() {
            self.take_back().await;
        }
        pushed
    }

    /// Ends the load: its rows are the batch's now, and are worked on unless it is held.
    pub async fn finish(mut self) -> Result<Loaded, BatchError> {
        let finished = self.send_rest().await;
        if finished.is_err() {
            self.take_back().await;
        }
        finished
    }

    /// Takes back what was handed over.
    pub async fn give_up(mut self) {
        self.take_back().await;
    }

    /// Whether these rows could be handed over next, all of them.
    pub fn check_all(&self, rows: &[Row]) -> Result<(), BatchError> {
        let mut bytes = self.bytes;
        for (row, count) in rows.iter().zip(self.rows + 1..) {
            bytes += packed_bytes(row) as u64;
            self.check(row, count, bytes)?;
        }
        Ok(())
    }

    fn check(&self, row: &Row, rows: u64, bytes: u64) -> Result<(), BatchError> {
        let fault = |reason: String| Err(BatchError::Row { line: row.line, reason });
        if row.line == 0 || row.line > LINE_MAX {
            return fault(format!("the number of a line is from 1 to {LINE_MAX}"));
        }
        let most = self.batches.limits.max_row_bytes.get().min(ROW_MAX_BYTES as u64);
        if row.input.len() as u64 > most {
            return fault(format!("it has {} bytes, at most {most} are allowed", row.input.len()));
        }
        let readable = match self.encoding {
            Encoding::Json => {
                serde_json::from_slice::<IgnoredAny>(&row.input).map(drop).map_err(|error| error.to_string())
            }
            Encoding::MsgPack => read_msgpack::<IgnoredAny>(&row.input).map(drop).map_err(|error| error.to_string()),
        };
        if let Err(reason) = readable {
            return fault(format!("it is no {}: {reason}", self.encoding));
        }
        let Load { max_rows, max_bytes, .. } = self.next;
        if rows > max_rows {
            return Err(BatchError::TooMany { what: "rows".into(), most: max_rows });
        }
        if bytes > max_bytes {
            return Err(BatchError::TooMany { what: "bytes".into(), most: max_bytes });
        }
        Ok(())
    }

    async fn push_row(&mut self, row: Row) -> Result<(), BatchError> {
        let size = packed_bytes(&row);
        self.check(&row, self.rows + 1, self.bytes + size as u64)?;
        if self.waiting.len() == BLOCK_MAX_ROWS || self.waiting_bytes + size + 5 > BLOCK_MAX_BYTES {
            self.pack().await?;
        }
        self.rows += 1;
        self.bytes += size as u64;
        self.waiting_bytes += size;
        self.waiting.push(row);
        Ok(())
    }

    /// Makes a block of the rows that wait.
    async fn pack(&mut self) -> Result<(), BatchError> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let packed = pack_rows(&mut self.waiting);
        let line = |row: Option<&Row>| row.map_or(0, |row| row.line);
        self.blocks_bytes += packed.len();
        self.next.blocks.push(PackedBlock {
            packed,
            rows: self.waiting.len(),
            first_line: line(self.waiting.first()),
            last_line: line(self.waiting.last()),
        });
        self.waiting.clear();
        self.waiting_bytes = 0;
        if self.blocks_bytes >= CALL_BYTES { self.send().await } else { Ok(()) }
    }

    /// Sends the blocks that are packed. One call is under way at a time: blocks arrive in their order.
    async fn send(&mut self) -> Result<(), BatchError> {
        self.answered().await?;
        let load = self.next.clone_for_call();
        self.next.place += load.blocks.len() as u64;
        self.blocks_bytes = 0;
        self.has_sent = true;
        let store = self.batches.store.clone();
        self.under_way = Some(tokio::spawn(async move { send_again_and_again(&store, &load).await }));
        Ok(())
    }

    async fn answered(&mut self) -> Result<u64, BatchError> {
        let Some(under_way) = self.under_way.take() else { return Ok(0) };
        match under_way.await.map_err(|error| Error::Unavailable(error.to_string()))?? {
            calls::Loaded::Taken(rows) => Ok(rows),
            calls::Loaded::Exists(status, rows) => {
                self.before = Some((status, rows));
                Ok(rows)
            }
            calls::Loaded::Missing => Err(BatchError::NotFound(self.next.batch.clone())),
            calls::Loaded::Refused(reason) => Err(BatchError::Refused(reason)),
            calls::Loaded::Over(status) => Err(BatchError::NotHeld(status)),
            calls::Loaded::Differs => Err(BatchError::Differs),
            calls::Loaded::TooMany { what, most } => Err(BatchError::TooMany { what, most }),
            calls::Loaded::NoRoom { used, mark } => Err(BatchError::NoRoom { used, mark }),
        }
    }

    async fn send_rest(&mut self) -> Result<Loaded, BatchError> {
        self.pack().await?;
        self.next.is_end = true;
        self.send().await?;
        let rows = self.answered().await?;
        let before = self.before.map(|(status, _)| status);
        Ok(Loaded { id: self.next.batch.clone(), rows, before })
    }

    async fn take_back(&mut self) {
        // What is still under way would come behind it.
        let _ = self.answered().await;
        self.next.blocks.clear();
        self.waiting.clear();
        if self.has_sent
            && let Err(error) = self.batches.store.batch_unload(&self.next.batch, &self.next.key).await
        {
            tracing::warn!(batch = %self.next.batch, %error, "rows of a load that failed are left until the batch is released");
        }
    }
}

impl Load {
    /// The call that leaves now; the blocks go with it.
    fn clone_for_call(&mut self) -> Load {
        let blocks = std::mem::take(&mut self.blocks);
        Load { blocks, ..self.clone() }
    }
}

/// A call that was answered by nobody is sent again: what has arrived is not stored twice.
async fn send_again_and_again(store: &Store, load: &Load) -> Result<calls::Loaded, Error> {
    for pause in PAUSES {
        match store.batch_load(load).await {
            Err(error) if error.is_transient() => {
                tracing::debug!(%error, "rows were not handed over, trying again");
                tokio::time::sleep(pause).await;
            }
            answer => return answer,
        }
    }
    store.batch_load(load).await
}
