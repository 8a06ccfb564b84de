//! Reading rows in the order of their lines, with what became of them.
//!
//! Rows came in any order, so blocks may overlap. A page is chosen by going through the blocks that can have rows of it, each
//! of which is in order; of what was read only the first rows are kept. Where lines rise, as those of a file do, a page takes
//! the few blocks that hold it; whatever their order, memory stays within a page and some blocks.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::str::FromStr;

use super::BatchError;
use crate::ids::JobId;
use crate::model::batch::{BlockName, NoPart, RowEnd, RowResult, RowStatus, unpack_results, unpack_rows};
use crate::model::task::{Encoding, Message};
use crate::store::Store;

/// Blocks that are read in one call.
const BLOCKS_A_CALL: usize = 4;
/// Most bytes of a page, but for a single row that is larger.
const PAGE_MAX_BYTES: usize = 8 << 20;

/// Which rows to read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Which {
    /// All.
    #[default]
    All,
    /// Those that failed.
    Failed,
    /// Those that wrote output texts. Their inputs, results and messages are left out.
    WithFiles,
}

/// A row, and what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowView {
    /// Where it stands.
    pub at: RowCursor,
    /// What became of it.
    pub status: RowStatus,
    /// Its input, in the encoding of the batch.
    pub input: Vec<u8>,
    /// Its result, in the encoding of the batch.
    pub result: Option<Vec<u8>>,
    /// What is to be said about it.
    pub messages: Vec<Message>,
    /// What it wrote to output files, by their logical names.
    pub files: BTreeMap<String, String>,
}

/// Where a row stands among all rows of its batch: by its line; of rows with the same line, the one that came first is first.
/// Written `<line>:<block>:<place>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RowCursor {
    /// The line.
    pub line: u64,
    block: BlockName,
    place: usize,
}

impl fmt::Display for RowCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.line, self.block, self.place)
    }
}

impl FromStr for RowCursor {
    type Err = NoPart;
    fn from_str(text: &str) -> Result<Self, NoPart> {
        let mut parts = text.split(':');
        let (Some(line), Some(block), Some(place), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(NoPart);
        };
        let (line, place) = (line.parse().map_err(|_| NoPart)?, place.parse().map_err(|_| NoPart)?);
        Ok(Self { line, block: block.parse()?, place })
    }
}

/// Some rows, in the order of their lines.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RowsPage {
    /// The rows.
    pub rows: Vec<RowView>,
    /// Where the next page begins; `None` behind the last.
    pub next: Option<RowCursor>,
}

/// Reads the rows of one batch. It knows the blocks that were complete when it was made; what became of their rows it reads
/// anew with each page.
#[derive(Debug)]
pub struct BatchReader {
    store: Store,
    id: JobId,
    encoding: Encoding,
    is_aborted: bool,
    /// By their first lines.
    blocks: Vec<Block>,
}

#[derive(Debug, Clone, Copy)]
struct Block {
    first_line: u64,
    last_line: u64,
    name: BlockName,
}

impl BatchReader {
    pub(super) async fn open(
        store: Store,
        id: JobId,
        encoding: Encoding,
        is_aborted: bool,
    ) -> Result<Self, BatchError> {
        let key = store.keys().batch_blocks(id.as_str());
        let fields = store.command("HGETALL", &[key.as_bytes()]).await?.texts("HGETALL")?;
        let fields: HashMap<&str, &str> = fields.chunks_exact(2).map(|pair| (&*pair[0], &*pair[1])).collect();
        let mut blocks = Vec::new();
        for (name, text) in &fields {
            let Ok(name) = name.parse::<BlockName>() else { continue };
            // Loads that are not complete are nobody's.
            if !fields.contains_key(name.load.to_string().as_str()) {
                continue;
            }
            let numbers: Vec<u64> = text.split(' ').filter_map(|word| word.parse().ok()).collect();
            let [_, _, first_line, last_line] = numbers[..] else {
                return Err(BatchError::Unreadable { id, reason: format!("of block {name} it says {text:?}") });
            };
            blocks.push(Block { first_line, last_line, name });
        }
        blocks.sort_by_key(|block| (block.first_line, block.name));
        Ok(Self { store, id, encoding, is_aborted, blocks })
    }

    /// How its rows and results are written.
    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// A page of at most so many rows, from behind a cursor on.
    pub async fn page(&self, which: Which, after: Option<RowCursor>, most: usize) -> Result<RowsPage, BatchError> {
        let from = after.map_or(0, |after| after.line);
        let mut chosen = Chosen { most: most.max(1), after, ..Chosen::default() };
        let blocks: Vec<Block> = self.blocks.iter().filter(|block| block.last_line >= from).copied().collect();
        for some in blocks.chunks(BLOCKS_A_CALL) {
            if chosen.is_full_before(some[0].first_line) {
                break;
            }
            let some: Vec<BlockName> = some.iter().map(|block| block.name).collect();
            let read = self.store.batch_read(&self.id, true, true, &some).await?;
            for (name, read) in some.into_iter().zip(read) {
                let unreadable = |reason: String| BatchError::Unreadable {
                    id: self.id.clone(),
                    reason: format!("block {name}: {reason}"),
                };
                if read.rows.is_empty() {
                    // Its time is over.
                    return Err(BatchError::NotFound(self.id.clone()));
                }
                let rows = unpack_rows(&read.rows).map_err(|error| unreadable(error.to_string()))?;
                let mut results: Vec<Option<RowResult>> = Vec::new();
                results.resize_with(rows.len(), || None);
                for (first, packed) in read.results {
                    let some = unpack_results(&packed).map_err(|error| unreadable(error.to_string()))?;
                    for (place, result) in (first..).zip(some) {
                        match results.get_mut(place) {
                            Some(slot) => *slot = result,
                            None => return Err(unreadable("it has more results than rows".into())),
                        }
                    }
                }
                for (place, (row, result)) in rows.into_iter().zip(results).enumerate() {
                    let at = RowCursor { line: row.line, block: name, place };
                    chosen.offer(at, || self.view(which, at, row.input, result));
                }
            }
        }
        Ok(chosen.into_page())
    }

    /// What is shown of a row; nothing if it is not one of those that are asked for.
    fn view(&self, which: Which, at: RowCursor, input: Vec<u8>, result: Option<RowResult>) -> Option<RowView> {
        let status = match &result {
            Some(result) => result.end.into(),
            None if self.is_aborted => RowStatus::Aborted,
            None => RowStatus::Pending,
        };
        let RowResult { end, result, messages, files } = result.unwrap_or(RowResult::of(RowEnd::Done));
        match which {
            Which::All => Some(RowView { at, status, input, result, messages, files }),
            Which::Failed if status == RowStatus::Failed => {
                Some(RowView { at, status, input, result, messages, files })
            }
            Which::WithFiles if !files.is_empty() && end != RowEnd::Skipped => {
                Some(RowView { at, status, input: Vec::new(), result: None, messages: Vec::new(), files })
            }
            Which::Failed | Which::WithFiles => None,
        }
    }
}

/// The first rows of those that were offered.
#[derive(Default)]
struct Chosen {
    rows: BTreeMap<RowCursor, RowView>,
    bytes: usize,
    most: usize,
    after: Option<RowCursor>,
    /// The first row for which there was no room. None behind it is chosen, whatever room smaller ones would find: the next page
    /// begins behind the last row of this one.
    left_out: Option<RowCursor>,
    /// Others stand behind the last of them.
    has_more: bool,
}

impl Chosen {
    fn is_full(&self) -> bool {
        self.rows.len() >= self.most || self.bytes >= PAGE_MAX_BYTES
    }

    fn is_behind(&self, at: RowCursor) -> bool {
        self.left_out.is_some_and(|left_out| at >= left_out)
            || self.is_full() && self.rows.last_key_value().is_some_and(|(last, _)| at > *last)
    }

    /// Whether no row from this line on could be chosen.
    fn is_full_before(&mut self, line: u64) -> bool {
        let is_full = self.left_out.is_some_and(|left_out| left_out.line < line)
            || self.is_full() && self.rows.last_key_value().is_some_and(|(last, _)| last.line < line);
        self.has_more |= is_full;
        is_full
    }

    fn offer(&mut self, at: RowCursor, view: impl FnOnce() -> Option<RowView>) {
        if self.after.is_some_and(|after| at <= after) {
            return;
        }
        if self.is_behind(at) {
            self.has_more = true;
            return;
        }
        let Some(view) = view() else { return };
        self.bytes += bytes_of(&view);
        self.rows.insert(at, view);
        while self.rows.len() > 1 && (self.rows.len() > self.most || self.bytes > PAGE_MAX_BYTES) {
            let Some((at, last)) = self.rows.pop_last() else { return };
            self.bytes -= bytes_of(&last);
            self.left_out = Some(at);
            self.has_more = true;
        }
    }

    fn into_page(self) -> RowsPage {
        let next = self.rows.last_key_value().filter(|_| self.has_more).map(|(last, _)| *last);
        RowsPage { rows: self.rows.into_values().collect(), next }
    }
}

fn bytes_of(view: &RowView) -> usize {
    let files: usize = view.files.iter().map(|(name, text)| name.len() + text.len() + 100).sum();
    let messages: usize = view.messages.iter().map(|message| message.errcode.len() + 200).sum();
    view.input.len() + view.result.as_ref().map_or(0, Vec::len) + messages + files + 200
}
