//! Blocks of rows and facts about batches that this worker has read: chunks of one block are mostly taken one after the other, and a
//! block is read once for all of them. An id may be given to another batch once its record is gone, so what was read is known by
//! when its batch was made, too.

use std::collections::VecDeque;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use queue_core::batch::BatchError;
use queue_core::batch::work::Facts;
use queue_core::ids::JobId;
use queue_core::model::batch::{BlockName, Row};
use queue_core::session::Pen;
use tokio::sync::OnceCell;

/// How many of each are kept.
const KEPT: usize = 32;

/// A batch, and when it was made.
type Batch = (JobId, Vec<u8>);
/// A block of a batch.
type Key = (Batch, BlockName);

/// What was read lately. Cheap to clone.
#[derive(Clone, Default)]
pub struct Blocks {
    rows: Arc<Latest<Key, Option<Vec<Row>>>>,
    facts: Arc<Latest<Batch, Option<Facts>>>,
}

impl Blocks {
    /// Some rows of a block; nothing if it is gone.
    pub(super) async fn rows(
        &self,
        pen: &Pen,
        (batch, made): (&JobId, &[u8]),
        block: BlockName,
        first: usize,
        count: usize,
    ) -> Result<Option<Vec<Row>>, BatchError> {
        let rows = self.rows.get(((batch.clone(), made.to_vec()), block), pen.block(batch, block)).await?;
        Ok(rows.as_ref().as_ref().and_then(|rows| rows.get(first..first + count)).map(<[Row]>::to_vec))
    }

    /// What the rows of a batch have in common; nothing if it is gone.
    pub(super) async fn facts(
        &self,
        pen: &Pen,
        (batch, made): (&JobId, &[u8]),
    ) -> Result<Arc<Option<Facts>>, BatchError> {
        self.facts.get((batch.clone(), made.to_vec()), async { Ok(pen.batch_facts(batch).await?) }).await
    }
}

/// A key, and what was read under it, or is being read.
type Entry<K, V> = (K, Arc<OnceCell<Arc<V>>>);

/// The latest few of many.
struct Latest<K, V> {
    entries: Mutex<VecDeque<Entry<K, V>>>,
}

impl<K, V> Default for Latest<K, V> {
    fn default() -> Self {
        Self { entries: Mutex::default() }
    }
}

impl<K: Eq + Hash, V> Latest<K, V> {
    /// What is known, or is found out once for all who ask meanwhile.
    async fn get(&self, key: K, read: impl Future<Output = Result<V, BatchError>>) -> Result<Arc<V>, BatchError> {
        let cell = {
            let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
            match entries.iter().find(|(known, _)| *known == key) {
                Some((_, cell)) => cell.clone(),
                None => {
                    let cell = Arc::new(OnceCell::new());
                    entries.push_back((key, cell.clone()));
                    if entries.len() > KEPT {
                        entries.pop_front();
                    }
                    cell
                }
            }
        };
        cell.get_or_try_init(|| async { read.await.map(Arc::new) }).await.cloned()
    }
}
