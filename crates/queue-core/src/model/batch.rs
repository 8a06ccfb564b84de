//! Batches: rows that are worked on by one handler, or one statement each, and what becomes of them.
//!
//! Rows are stored in blocks, packed as MessagePack and sorted by line. What a worker takes is a chunk: some rows of one
//! block that follow each other. What became of a chunk's rows is packed in the same order.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::de::{self, IgnoredAny, SeqAccess, Visitor};
use serde::ser::SerializeSeq;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_bytes::{ByteBuf, Bytes};

use super::task::Message;
use crate::ids::{IdError, JobId};

/// Longest id of a batch, in bytes. The ids of its parts are made of it.
pub const BATCH_ID_MAX_BYTES: usize = 90;
/// Most rows of a block.
pub const BLOCK_MAX_ROWS: usize = 1_000;
/// Most packed bytes of a block, but for one that holds a single large row. A little below a size that allocators have.
pub const BLOCK_MAX_BYTES: usize = (112 << 10) - 64;
/// Most bytes of one row's input, whatever a producer's limits are.
pub const ROW_MAX_BYTES: usize = 1 << 20;
/// The greatest number of a line: whole numbers up to here are exact in every language.
pub const LINE_MAX: u64 = (1 << 53) - 1;
/// Most bytes that one row hands back: its result, messages and output texts together.
pub const ROW_RESULT_MAX_BYTES: usize = 1 << 20;
/// Longest logical name of an output file, in bytes.
pub const FILE_NAME_MAX_BYTES: usize = 255;

/// One row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Its line, from 1 on. Lines may come in any order, and more than once.
    pub line: u64,
    /// What to work on, in the encoding of the batch.
    pub input: Vec<u8>,
}

/// What has become of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RowStatus {
    /// Nobody has said yet.
    Pending,
    /// It did what it was to do.
    Done,
    /// Nothing was to be done. Counts as done.
    Skipped,
    /// It did not.
    Failed,
    /// Its batch was aborted before it had ended.
    Aborted,
}

impl RowStatus {
    /// The status as a word.
    pub const fn as_str(self) -> &'static str {
        match self {
            RowStatus::Pending => "pending",
            RowStatus::Done => "done",
            RowStatus::Skipped => "skipped",
            RowStatus::Failed => "failed",
            RowStatus::Aborted => "aborted",
        }
    }
}

impl fmt::Display for RowStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// How a row ended, as its handler says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowEnd {
    /// It did what it was to do.
    Done,
    /// Nothing was to be done.
    Skipped,
    /// It did not.
    Failed,
}

impl RowEnd {
    const fn code(self) -> u8 {
        match self {
            RowEnd::Done => 1,
            RowEnd::Failed => 2,
            RowEnd::Skipped => 3,
        }
    }
}

impl From<RowEnd> for RowStatus {
    fn from(end: RowEnd) -> Self {
        match end {
            RowEnd::Done => RowStatus::Done,
            RowEnd::Skipped => RowStatus::Skipped,
            RowEnd::Failed => RowStatus::Failed,
        }
    }
}

/// What a row hands back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowResult {
    /// How it ended.
    pub end: RowEnd,
    /// Its result, in the encoding of the batch.
    pub result: Option<Vec<u8>>,
    /// What is to be said about it.
    pub messages: Vec<Message>,
    /// Text for output files, by their logical names. Each text becomes one or more lines of its file, in the order of lines.
    pub files: BTreeMap<String, String>,
}

impl RowResult {
    /// A row that ended so, and hands back nothing.
    pub fn of(end: RowEnd) -> Self {
        Self { end, result: None, messages: Vec::new(), files: BTreeMap::new() }
    }

    /// A row that failed, with its reason as a message.
    pub fn failed(errcode: &str, reason: impl Into<String>) -> Self {
        let message = Message { msgid: 10, errcode: errcode.into(), field: None, vals: vec![reason.into()] };
        Self { messages: vec![message], ..Self::of(RowEnd::Failed) }
    }

    /// About how many bytes it takes.
    pub fn bytes(&self) -> usize {
        let messages: usize = self.messages.iter().map(message_bytes).sum();
        let files: usize = self.files.iter().map(|(name, text)| name.len() + text.len() + 10).sum();
        self.result.as_ref().map_or(0, |result| result.len() + 5) + messages + files + 2
    }

    /// The same, or a failed row that says why it can't be kept.
    #[must_use]
    pub fn checked(self) -> Self {
        let bytes = self.bytes();
        if bytes > ROW_RESULT_MAX_BYTES {
            let reason = format!("it hands back {bytes} bytes, at most {ROW_RESULT_MAX_BYTES} are allowed");
            return Self::failed("too_large", reason);
        }
        match self.files.keys().find(|name| name.is_empty() || name.len() > FILE_NAME_MAX_BYTES) {
            Some(_) => Self::failed("file_name", format!("the name of a file has 1 to {FILE_NAME_MAX_BYTES} bytes")),
            None => self,
        }
    }
}

fn message_bytes(message: &Message) -> usize {
    let vals: usize = message.vals.iter().map(|val| val.len() + 5).sum();
    message.errcode.len() + message.field.as_ref().map_or(0, String::len) + vals + 40
}

/// What is packed is no such thing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unreadable(String);

/// Packs a block: its rows by line, those of one line in the order in which they came.
pub fn pack_rows(rows: &mut [Row]) -> Vec<u8> {
    rows.sort_by_key(|row| row.line);
    let packed: Vec<(u64, &Bytes)> = rows.iter().map(|row| (row.line, Bytes::new(&row.input))).collect();
    rmp_serde::to_vec(&packed).expect("rows are numbers and bytes")
}

/// At most how many bytes a row takes in a block.
pub fn packed_bytes(row: &Row) -> usize {
    row.input.len() + 15
}

/// The rows of a block.
pub fn unpack_rows(packed: &[u8]) -> Result<Vec<Row>, Unreadable> {
    let rows: Vec<(u64, ByteBuf)> = rmp_serde::from_slice(packed).map_err(|error| Unreadable(error.to_string()))?;
    Ok(rows.into_iter().map(|(line, input)| Row { line, input: input.into_vec() }).collect())
}

/// Packs what became of rows that follow each other; `None` of one that nothing became of yet.
pub fn pack_results(results: &[Option<RowResult>]) -> Vec<u8> {
    let packed: Vec<Option<Packed<&RowResult>>> = results.iter().map(|result| result.as_ref().map(Packed)).collect();
    rmp_serde::to_vec(&packed).expect("results are texts and numbers")
}

/// What became of rows that follow each other.
pub fn unpack_results(packed: &[u8]) -> Result<Vec<Option<RowResult>>, Unreadable> {
    let results: Vec<Option<Packed<RowResult>>> =
        rmp_serde::from_slice(packed).map_err(|error| Unreadable(error.to_string()))?;
    Ok(results.into_iter().map(|result| result.map(|Packed(result)| result)).collect())
}

/// A result as an array of as many parts as it has: status, result, messages, files.
struct Packed<T>(T);

impl Serialize for Packed<&RowResult> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let RowResult { end, result, messages, files } = self.0;
        let parts = match (result, messages.is_empty(), files.is_empty()) {
            (None, true, true) => 1,
            (_, true, true) => 2,
            (_, false, true) => 3,
            (_, _, false) => 4,
        };
        let mut seq = serializer.serialize_seq(Some(parts))?;
        seq.serialize_element(&end.code())?;
        if parts > 1 {
            seq.serialize_element(&result.as_ref().map(|result| Bytes::new(result)))?;
        }
        if parts > 2 {
            let named: Vec<NamedMessage<'_>> = messages.iter().map(NamedMessage).collect();
            seq.serialize_element(&named)?;
        }
        if parts > 3 {
            seq.serialize_element(files)?;
        }
        seq.end()
    }
}

/// A message as a map with the names of its fields: an older reader survives a new one.
struct NamedMessage<'a>(&'a Message);

impl Serialize for NamedMessage<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Message { msgid, errcode, field, vals } = self.0;
        let mut map = BTreeMap::from([("msgid", Value::Number(*msgid)), ("errcode", Value::Text(errcode))]);
        if let Some(field) = field {
            map.insert("field", Value::Text(field));
        }
        if !vals.is_empty() {
            map.insert("vals", Value::Texts(vals));
        }
        map.serialize(serializer)
    }
}

#[derive(Serialize)]
#[serde(untagged)]
enum Value<'a> {
    Number(i64),
    Text(&'a str),
    Texts(&'a [String]),
}

impl<'de> Deserialize<'de> for Packed<RowResult> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(PackedVisitor).map(Packed)
    }
}

struct PackedVisitor;

impl<'de> Visitor<'de> for PackedVisitor {
    type Value = RowResult;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("what became of a row")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<RowResult, A::Error> {
        let code: u8 = parts.next_element()?.ok_or_else(|| de::Error::invalid_length(0, &self))?;
        let end = match code {
            1 => RowEnd::Done,
            2 => RowEnd::Failed,
            3 => RowEnd::Skipped,
            other => return Err(de::Error::custom(format!("{other} is no end of a row"))),
        };
        let result = parts.next_element::<Option<ByteBuf>>()?.flatten().map(ByteBuf::into_vec);
        let messages = parts.next_element()?.unwrap_or_default();
        let files = parts.next_element()?.unwrap_or_default();
        while parts.next_element::<IgnoredAny>()?.is_some() {}
        Ok(RowResult { end, result, messages, files })
    }
}

/// Names a block: which load of rows it came with, and its place in it, both from 0 on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockName {
    /// The load.
    pub load: u32,
    /// The place in it.
    pub place: u32,
}

impl fmt::Display for BlockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.load, self.place)
    }
}

/// A text that names no block, or no part of a batch.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("it names no part of a batch")]
pub struct NoPart;

impl FromStr for BlockName {
    type Err = NoPart;
    fn from_str(text: &str) -> Result<Self, NoPart> {
        let (load, place) = text.split_once('.').ok_or(NoPart)?;
        Ok(Self { load: load.parse().map_err(|_| NoPart)?, place: place.parse().map_err(|_| NoPart)? })
    }
}

/// A job that is a part of a batch, as its field `part` says: `rows <batch> <block> <first> <count>`, with `partial` behind it where
/// something became of some of them, `files <batch>` or `done <batch>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Rows to work on.
    Rows(Chunk),
    /// All rows have ended, and their output files are to be assembled.
    Files(JobId),
    /// It is over, and its application is to be told.
    Done(JobId),
}

/// Some rows of one block that follow each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// The batch.
    pub batch: JobId,
    /// The block.
    pub block: BlockName,
    /// The first of them, counted in the block from 0 on.
    pub first: usize,
    /// How many they are.
    pub count: usize,
    /// Something became of some of them at an earlier attempt.
    pub has_partial: bool,
}

impl fmt::Display for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { batch, block, first, count, has_partial } = self;
        write!(f, "rows {batch} {block} {first} {count}{}", if *has_partial { " partial" } else { "" })
    }
}

impl FromStr for Part {
    type Err = NoPart;
    fn from_str(text: &str) -> Result<Self, NoPart> {
        let words: Vec<&str> = text.split(' ').collect();
        let id = |text: &str| JobId::new(text).map_err(|_: IdError| NoPart);
        match words[..] {
            ["rows", batch, block, first, count, ref partial @ ..] if matches!(partial, [] | ["partial"]) => {
                let number = |text: &str| text.parse().map_err(|_| NoPart);
                let (first, count): (usize, usize) = (number(first)?, number(count)?);
                // No block has others, and what is done with a chunk takes room for each of its rows.
                if first >= BLOCK_MAX_ROWS || !(1..=BLOCK_MAX_ROWS - first).contains(&count) {
                    return Err(NoPart);
                }
                let (batch, block, has_partial) = (id(batch)?, block.parse()?, !partial.is_empty());
                Ok(Part::Rows(Chunk { batch, block, first, count, has_partial }))
            }
            ["files", batch] => id(batch).map(Part::Files),
            ["done", batch] => id(batch).map(Part::Done),
            _ => Err(NoPart),
        }
    }
}

/// How many rows a batch has, and what became of them. At every moment `rows = pending + done + failed + aborted`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// All that were handed over.
    pub rows: u64,
    /// Those of which nothing became yet.
    pub pending: u64,
    /// Those that did what they were to do, with those that were skipped.
    pub done: u64,
    /// Those of the done that were skipped.
    pub skipped: u64,
    /// Those that did not.
    pub failed: u64,
    /// Those that had not ended when the batch was aborted.
    pub aborted: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn result(end: RowEnd) -> impl Strategy<Value = RowResult> {
        let message = (any::<i64>(), ".{0,9}", proptest::option::of(".{0,9}"), prop::collection::vec(".{0,9}", 0..3));
        let message = message.prop_map(|(msgid, errcode, field, vals)| Message { msgid, errcode, field, vals });
        (
            proptest::option::of(prop::collection::vec(any::<u8>(), 0..300)),
            prop::collection::vec(message, 0..3),
            prop::collection::btree_map(".{0,9}", ".{0,40}", 0..3),
        )
            .prop_map(move |(result, messages, files)| RowResult { end, result, messages, files })
    }

    proptest! {
        #[test]
        fn what_is_packed_is_unpacked(
            rows in prop::collection::vec((1..LINE_MAX, prop::collection::vec(any::<u8>(), 0..300)), 0..40),
            results in prop::collection::vec(proptest::option::of(prop_oneof![
                result(RowEnd::Done), result(RowEnd::Failed), result(RowEnd::Skipped)
            ]), 0..40),
        ) {
            let mut rows: Vec<Row> = rows.into_iter().map(|(line, input)| Row { line, input }).collect();
            let most: usize = rows.iter().map(packed_bytes).sum();
            let packed = pack_rows(&mut rows);
            prop_assert!(packed.len() <= most + 5);
            prop_assert_eq!(unpack_rows(&packed).unwrap(), rows);
            prop_assert_eq!(unpack_results(&pack_results(&results)).unwrap(), results);
        }
    }

    #[test]
    fn rows_of_one_line_stay_in_their_order_and_a_plain_row_costs_two_bytes() {
        let row = |line, input: &str| Row { line, input: input.into() };
        let mut rows = [row(7, "b"), row(3, "x"), row(7, "a")];
        pack_rows(&mut rows);
        assert_eq!(rows, [row(3, "x"), row(7, "b"), row(7, "a")]);
        assert_eq!(pack_results(&vec![Some(RowResult::of(RowEnd::Done)); 10]).len(), 1 + 10 * 2);
        assert!(unpack_results(&[0x91, 0x91, 9]).is_err() && unpack_rows(b"\x91\x01").is_err());
    }

    #[test]
    fn parts_are_read_from_their_field() {
        let part: Part = "rows b1 0.17 500 20".parse().unwrap();
        let block = BlockName { load: 0, place: 17 };
        let chunk = Chunk { batch: JobId::new("b1").unwrap(), block, first: 500, count: 20, has_partial: false };
        assert_eq!(part, Part::Rows(chunk.clone()));
        let chunk = Chunk { has_partial: true, ..chunk };
        assert_eq!(chunk.to_string().parse(), Ok(Part::Rows(chunk)));
        assert_eq!("done b1".parse(), Ok(Part::Done(JobId::new("b1").unwrap())));
        let no_rows_of_a_block =
            ["rows b1 0.1 -2 3", "rows b1 0.1 0 0", "rows b1 0.1 0 4000000000", "rows b1 0.1 999 2"];
        let unreadable = ["", "rows b1 0.1 2", "files", "files a b", "rows b1 01 2 3"];
        for bad in no_rows_of_a_block.into_iter().chain(unreadable) {
            assert_eq!(bad.parse::<Part>(), Err(NoPart), "{bad}");
        }
    }
}
