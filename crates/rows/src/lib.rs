//! Reads rows out of what people hand over: CSV with a header, lines of JSON, or plain lines. One row is in memory at a
//! time, and none is longer than the reader was told to allow.
//!
//! The number of a row is that of the line in the file on which it begins, whatever stands before it: blank lines, rows
//! of several lines, and rows that are bad.
//!
//! No byte of a file is lost without a word: what can't stand in a row is refused with its line. `docs/batches.md`
//! lists it.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;
use std::io::{self, BufRead};

use csv_core::ReadRecordResult;
use queue_core::model::batch::Row;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use tokio::sync::mpsc;

/// Rows go to whoever hands them over in pieces of about so many bytes, of which a few wait.
const PIECE_BYTES: usize = 64 << 10;
const PIECES_MAX: usize = 8;
/// How deep a JSON value may be nested: no deeper than those who read it later can follow.
const DEPTH_MAX: usize = 127;

/// What the rows are written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Fields with a delimiter between them; the first row names them. Each row becomes a JSON object of texts.
    Csv {
        /// What stands between two fields.
        delimiter: u8,
    },
    /// A JSON value on each line.
    JsonLines,
    /// A text on each line. Each becomes a JSON string.
    Lines,
}

/// The byte for a delimiter; `None` for what can't be one.
pub fn delimiter(character: char) -> Option<u8> {
    u8::try_from(character).ok().filter(|byte| byte.is_ascii() && !matches!(byte, b'"' | b'\r' | b'\n'))
}

/// A row that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub struct BadLine {
    /// The line on which it begins.
    pub line: u64,
    /// What is wrong with it.
    pub reason: String,
    /// The row as it stands there; cut where it is too long.
    pub text: Vec<u8>,
}

/// Why there is no row.
#[derive(Debug, thiserror::Error)]
pub enum RowError {
    /// This row is bad. What follows it can be read.
    #[error(transparent)]
    Bad(BadLine),
    /// It is bad, and nobody knows where the next one begins: a header that names nothing, or quotes that span lines.
    /// Who passed over it would lose rows. Nothing more is read.
    #[error(transparent)]
    Lost(BadLine),
    /// Nothing more can be read.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
}

/// The rows of a file, one after the other.
pub struct RowSource<R> {
    input: R,
    format: Format,
    most: usize,
    lines: Lines,
    /// The row as it stands in the file.
    text: Vec<u8>,
    csv: Csv,
    is_over: bool,
}

/// How many lines have ended behind us.
#[derive(Debug, Clone, Copy, Default)]
struct Lines {
    ended: u64,
    /// A line break that follows belongs to the carriage return before it.
    is_behind_cr: bool,
}

impl Lines {
    /// Counts what lies behind us now. In CSV a carriage return ends a line, with or without a line break.
    fn pass(&mut self, bytes: &[u8], seen: &Glance, format: Format) {
        if !matches!(format, Format::Csv { .. }) || !(self.is_behind_cr || seen.has_cr) {
            self.ended += seen.line_breaks;
            return;
        }
        for byte in bytes {
            self.ended += u64::from(*byte == b'\r' || (*byte == b'\n' && !self.is_behind_cr));
            self.is_behind_cr = *byte == b'\r';
        }
    }
}

/// What there is to know of bytes, found in one go: rows are short, and each search costs more than to look at them.
#[derive(Default)]
struct Glance {
    line_breaks: u64,
    has_cr: bool,
    has_quote: bool,
    has_nul: bool,
}

impl Glance {
    fn at(bytes: &[u8]) -> Self {
        let mut seen = Self::default();
        // So few that a byte counts them, for then the compiler looks at many at once.
        for some in bytes.chunks(255) {
            let (mut line_breaks, mut crs, mut quotes, mut nuls) = (0_u8, 0_u8, 0_u8, 0_u8);
            for byte in some {
                line_breaks += u8::from(*byte == b'\n');
                crs |= u8::from(*byte == b'\r');
                quotes |= u8::from(*byte == b'"');
                nuls |= u8::from(*byte == 0);
            }
            seen.line_breaks += u64::from(line_breaks);
            seen.has_cr |= crs > 0;
            seen.has_quote |= quotes > 0;
            seen.has_nul |= nuls > 0;
        }
        seen
    }
}

/// What reading CSV needs besides.
struct Csv {
    reader: csv_core::Reader,
    fields: Vec<u8>,
    ends: Vec<usize>,
    names: Vec<String>,
    /// The same as they stand in an object.
    keys: Vec<Vec<u8>>,
    /// How many fields the present record has, and whether a quote or a NUL byte is in its text.
    count: usize,
    has_quote: bool,
    has_nul: bool,
}

impl Csv {
    /// The fields of the present record, one behind the other, if each of them is UTF-8.
    fn text(&self) -> Option<&str> {
        let ends = &self.ends[..self.count];
        let text = std::str::from_utf8(&self.fields[..ends.last().copied().unwrap_or(0)]).ok()?;
        ends.iter().all(|end| text.is_char_boundary(*end)).then_some(text)
    }
}

/// How a line came to its end.
enum Extent {
    Whole,
    TooLong,
}

impl<R: BufRead> RowSource<R> {
    /// Reads rows of at most so many bytes, of CSV the header at once.
    pub fn new(format: Format, input: R, most_bytes: usize) -> Result<Self, RowError> {
        let delimiter = if let Format::Csv { delimiter } = format { delimiter } else { b',' };
        let reader = csv_core::ReaderBuilder::new().delimiter(delimiter).build();
        let (fields, ends, names, keys) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let csv = Csv { reader, fields, ends, names, keys, count: 0, has_quote: false, has_nul: false };
        let (lines, text) = (Lines::default(), Vec::new());
        let mut source = Self { input, format, most: most_bytes, lines, text, csv, is_over: false };
        // Three bytes that some programs put before a text, to say that it is UTF-8.
        if source.input.fill_buf()?.starts_with(b"\xef\xbb\xbf") {
            source.input.consume(3);
        }
        if matches!(format, Format::Csv { .. }) {
            source.read_header()?;
        }
        Ok(source)
    }

    /// Passes over bytes whose rows were read before, and counts their lines.
    pub fn pass_over(&mut self, bytes: u64) -> io::Result<()> {
        let mut left = bytes;
        while left > 0 {
            let chunk = self.input.fill_buf()?;
            if chunk.is_empty() {
                break;
            }
            let taken = chunk.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            self.lines.pass(&chunk[..taken], &Glance::at(&chunk[..taken]), self.format);
            self.input.consume(taken);
            left -= taken as u64;
        }
        Ok(())
    }

    /// What it reads from.
    pub fn input(&self) -> &R {
        &self.input
    }

    /// The same, to look at what comes next.
    pub fn input_mut(&mut self) -> &mut R {
        &mut self.input
    }

    /// How many lines have ended before what comes next.
    pub fn lines_ended(&self) -> u64 {
        self.lines.ended
    }

    /// The names of the fields of CSV.
    pub fn names(&self) -> &[String] {
        &self.csv.names
    }

    /// Reads the next record of CSV, for those who want its [`fields`](Self::fields) rather than an object. Says on
    /// which line it begins.
    pub fn next_record(&mut self) -> Option<Result<u64, RowError>> {
        if self.is_over {
            return None;
        }
        let read = self.record();
        self.unless_over(read)
    }

    /// The fields of the record that was read last.
    pub fn fields(&self) -> impl Iterator<Item = &str> {
        let ends = &self.csv.ends[..self.csv.count];
        let text = self.csv.text().expect("was looked at");
        let begins = std::iter::once(0).chain(ends.iter().copied());
        begins.zip(ends).map(|(begin, end)| &text[begin..*end])
    }

    fn read_header(&mut self) -> Result<(), RowError> {
        let bad = |line, reason, text| RowError::Lost(BadLine { line, reason, text });
        let Some(line) = self.raw_record().map_err(lost)? else {
            return Err(bad(1, "there is no header".into(), Vec::new()));
        };
        if let Some(reason) = self.unfit_text() {
            return Err(bad(line, format!("the header can't be used: {reason}"), self.text.clone()));
        }
        let mut seen = HashSet::new();
        for (at, name) in self.fields().enumerate() {
            if name.is_empty() {
                return Err(bad(line, format!("field {} of the header has no name", at + 1), self.text.clone()));
            }
            if !seen.insert(name) {
                return Err(bad(line, format!("the header names {name:?} twice"), self.text.clone()));
            }
        }
        self.csv.names = self.fields().map(str::to_owned).collect();
        let key = |name: &String| [json_text(name), b":".to_vec()].concat();
        self.csv.keys = self.csv.names.iter().map(key).collect();
        Ok(())
    }

    fn read(&mut self) -> Result<Option<Row>, RowError> {
        if let Format::Csv { .. } = self.format {
            let Some(line) = self.record()? else { return Ok(None) };
            let input = self.object();
            return if input.len() > self.most {
                Err(self.bad(line, self.too_long()))
            } else {
                Ok(Some(Row { line, input }))
            };
        }
        while let Some((line, extent)) = self.line()? {
            if let Extent::TooLong = extent {
                return Err(self.bad(line, self.too_long()));
            }
            let Ok(text) = std::str::from_utf8(&self.text) else {
                return Err(self.bad(line, NOT_UTF8.into()));
            };
            let trimmed = text.trim_ascii();
            if trimmed.is_empty() {
                continue;
            }
            let input = match self.format {
                Format::Lines if text.contains('\0') => return Err(self.bad(line, NUL.into())),
                Format::Lines => json_text(text),
                _ => match fault_of_json(trimmed) {
                    None => trimmed.as_bytes().to_vec(),
                    Some(reason) => return Err(self.bad(line, reason)),
                },
            };
            if input.len() > self.most {
                return Err(self.bad(line, self.too_long()));
            }
            return Ok(Some(Row { line, input }));
        }
        Ok(None)
    }

    fn bad(&self, line: u64, reason: String) -> RowError {
        let is_csv = matches!(self.format, Format::Csv { .. });
        // Its end is the first that has come since it began, if it has one.
        let spans_lines = self.lines.ended > line || self.text.iter().any(|byte| matches!(byte, b'\n' | b'\r'));
        let is_open = reason == OPEN;
        let row = BadLine { line, reason, text: self.text.clone() };
        // A quote that is wrong makes the lines behind it a part of this row: who passed over it would lose them.
        if is_csv && (spans_lines || is_open) { RowError::Lost(row) } else { RowError::Bad(row) }
    }

    fn too_long(&self) -> String {
        format!("it has more than {} bytes", self.most)
    }

    /// The next line, without its end, and its number.
    fn line(&mut self) -> io::Result<Option<(u64, Extent)>> {
        self.text.clear();
        let (number, mut extent, mut is_there) = (self.lines.ended + 1, Extent::Whole, false);
        loop {
            let chunk = self.input.fill_buf()?;
            if chunk.is_empty() {
                break;
            }
            is_there = true;
            let end = chunk.iter().position(|byte| *byte == b'\n');
            let part = &chunk[..end.unwrap_or(chunk.len())];
            let room = self.most.saturating_sub(self.text.len());
            // One byte more is allowed for a carriage return.
            if part.len() > room + 1 {
                extent = Extent::TooLong;
            }
            self.text.extend_from_slice(&part[..part.len().min(room + 1)]);
            let taken = part.len() + usize::from(end.is_some());
            self.input.consume(taken);
            if end.is_some() {
                self.lines.ended += 1;
                break;
            }
        }
        if self.text.last() == Some(&b'\r') {
            self.text.pop();
        }
        if self.text.len() > self.most {
            extent = Extent::TooLong;
        }
        Ok(is_there.then_some((number, extent)))
    }

    /// The next record of CSV, as one that can be used: the number of its first line.
    fn record(&mut self) -> Result<Option<u64>, RowError> {
        let Some(line) = self.raw_record()? else { return Ok(None) };
        let (count, names) = (self.csv.count, self.csv.names.len());
        let reason = if count == names {
            self.unfit_text()
        } else {
            Some(format!("it has {count} fields, the header has {names}"))
        };
        reason.map_or(Ok(Some(line)), |reason| Err(self.bad(line, reason)))
    }

    /// The same whatever its fields are.
    fn raw_record(&mut self) -> Result<Option<u64>, RowError> {
        // The reader would pass over blank lines itself, and nobody would know on which line the record begins.
        loop {
            let blank = match self.input.fill_buf()?.first() {
                Some(byte @ (b'\n' | b'\r')) => *byte,
                Some(_) => break,
                None => return Ok(None),
            };
            self.lines.pass(&[blank], &Glance::at(&[blank]), self.format);
            self.input.consume(1);
        }
        let line = self.lines.ended + 1;
        let reason = match self.read_fields()? {
            Some(reason) => reason,
            None if self.goes_on_behind_a_quote() => "text follows a closing quote".into(),
            None => return Ok(Some(line)),
        };
        Err(self.bad(line, reason))
    }

    /// Reads the fields of a record. Says what is wrong with it.
    fn read_fields(&mut self) -> io::Result<Option<String>> {
        self.text.clear();
        let Csv { reader, fields, ends, .. } = &mut self.csv;
        reader.reset();
        // The reader needs room for what it is given, even where it writes nothing.
        let (room_max, ends_max) = (self.most + 1, self.most + 2);
        fields.resize(fields.len().max(room_max.min(4096)), 0);
        ends.resize(ends.len().max(ends_max.min(256)), 0);
        let (mut written, mut count, mut is_too_long, mut is_open) = (0, 0, false, false);
        let (mut has_quote, mut has_nul) = (false, false);
        loop {
            let chunk = self.input.fill_buf()?;
            // Behind the last line stands a line break, if need be: a record that it does not end is within quotes.
            let is_last = chunk.is_empty();
            let given = if is_last { b"\n".as_slice() } else { chunk };
            let (result, taken, bytes, found) = reader.read_record(given, &mut fields[written..], &mut ends[count..]);
            (written, count) = (written + bytes, count + found);
            if !is_last {
                let seen = Glance::at(&given[..taken]);
                (has_quote, has_nul) = (has_quote | seen.has_quote, has_nul | seen.has_nul);
                self.lines.pass(&given[..taken], &seen, self.format);
                let room = self.most.saturating_sub(self.text.len());
                self.text.extend_from_slice(&given[..taken.min(room)]);
                self.input.consume(taken);
            }
            match result {
                ReadRecordResult::Record | ReadRecordResult::End => break,
                ReadRecordResult::InputEmpty if is_last => {
                    is_open = true;
                    break;
                }
                ReadRecordResult::InputEmpty => {}
                ReadRecordResult::OutputFull if fields.len() < room_max => {
                    fields.resize((fields.len() * 2).min(room_max), 0);
                }
                // The rest of it is read into the same place, again and again.
                ReadRecordResult::OutputFull => (is_too_long, written) = (true, 0),
                ReadRecordResult::OutputEndsFull if ends.len() < ends_max => {
                    ends.resize((ends.len() * 2).min(ends_max), 0);
                }
                ReadRecordResult::OutputEndsFull => (is_too_long, count) = (true, 0),
            }
        }
        (self.csv.count, self.csv.has_quote, self.csv.has_nul) = (count, has_quote, has_nul);
        // The line break after a carriage return is the next record's first byte, and is passed over there.
        while matches!(self.text.last(), Some(b'\n' | b'\r')) {
            self.text.pop();
        }
        Ok(match (is_open, is_too_long) {
            (true, _) => Some(OPEN.into()),
            (false, true) => Some(self.too_long()),
            (false, false) => None,
        })
    }

    /// Whether text stands between a closing quote and the end of its field. The reader would add it to the field: it
    /// is the trace of a quote that is missing before.
    fn goes_on_behind_a_quote(&self) -> bool {
        let Format::Csv { delimiter } = self.format else { return false };
        if !self.csv.has_quote {
            return false;
        }
        #[derive(Clone, Copy)]
        enum At {
            Begin,
            Plain,
            Quoted,
            Closed,
        }
        let mut at = At::Begin;
        for byte in &self.text {
            at = match (at, *byte) {
                (At::Begin | At::Closed, b'"') => At::Quoted,
                (At::Quoted, b'"') => At::Closed,
                (At::Quoted, _) => At::Quoted,
                (_, byte) if byte == delimiter => At::Begin,
                (At::Closed, _) => return true,
                (At::Begin | At::Plain, _) => At::Plain,
            };
        }
        false
    }

    /// What is wrong with the text of the present record.
    fn unfit_text(&self) -> Option<String> {
        match (self.csv.text(), self.csv.has_nul) {
            (None, _) => Some(NOT_UTF8.into()),
            (Some(_), true) => Some(NUL.into()),
            (Some(_), false) => None,
        }
    }

    /// The record as a JSON object.
    fn object(&self) -> Vec<u8> {
        let keys = &self.csv.keys;
        let mut object = Vec::with_capacity(self.text.len() + keys.iter().map(|key| key.len() + 3).sum::<usize>());
        object.push(b'{');
        for (key, value) in keys.iter().zip(self.fields()) {
            if object.len() > 1 {
                object.push(b',');
            }
            object.extend_from_slice(key);
            serde_json::to_writer(&mut object, value).expect("a text can be written to memory");
        }
        object.push(b'}');
        object
    }

    /// Remembers that nothing follows.
    fn unless_over<T>(&mut self, read: Result<Option<T>, RowError>) -> Option<Result<T, RowError>> {
        let read = read.transpose();
        self.is_over = matches!(read, None | Some(Err(RowError::Io(_) | RowError::Lost(_))));
        read
    }
}

const OPEN: &str = "a quote is not closed";
const NOT_UTF8: &str = "it is not UTF-8";
const NUL: &str = "it has a NUL byte";

/// Without this row nothing behind it has a meaning.
fn lost(error: RowError) -> RowError {
    match error {
        RowError::Bad(row) => RowError::Lost(row),
        error => error,
    }
}

impl<R: BufRead> Iterator for RowSource<R> {
    type Item = Result<Row, RowError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_over {
            return None;
        }
        let row = self.read();
        self.unless_over(row)
    }
}

/// Some rows, or why there is none here. Behind a bad line more may follow.
pub type Piece = Result<Vec<Row>, RowError>;

/// Reads in a thread of its own, for a file may block for as long as it likes. The reading ends with the rows, or with
/// the receiver.
pub fn pieces<R: BufRead + Send + 'static>(
    open: impl FnOnce() -> Result<RowSource<R>, RowError> + Send + 'static,
) -> mpsc::Receiver<Piece> {
    let (sender, receiver) = mpsc::channel(PIECES_MAX);
    std::thread::spawn(move || {
        let source = match open() {
            Ok(source) => source,
            Err(error) => {
                let _ = sender.blocking_send(Err(error));
                return;
            }
        };
        let (mut rows, mut bytes) = (Vec::new(), 0);
        for row in source {
            let error = match row {
                Ok(row) => {
                    bytes += row.input.len() + size_of::<Row>();
                    rows.push(row);
                    None
                }
                Err(error) => Some(error),
            };
            if (bytes >= PIECE_BYTES || error.is_some()) && !rows.is_empty() {
                bytes = 0;
                if sender.blocking_send(Ok(std::mem::take(&mut rows))).is_err() {
                    return;
                }
            }
            if error.is_some_and(|error| sender.blocking_send(Err(error)).is_err()) {
                return;
            }
        }
        if !rows.is_empty() {
            let _ = sender.blocking_send(Ok(rows));
        }
    });
    receiver
}

fn json_text(text: &str) -> Vec<u8> {
    serde_json::to_vec(text).expect("a text can be written to memory")
}

/// What is wrong with the text of a value in a line of JSON, if anything is: it is none, it is nested too deep, or an object in it has a
/// name twice.
#[must_use]
pub fn fault_of_json(text: &str) -> Option<String> {
    json_fault(text, 0)
}

/// What is wrong with the text of a JSON value: none at all, nested too deep, or an object that has a name twice, of
/// which whoever reads it would keep one value and lose the other.
fn json_fault(text: &str, depth: usize) -> Option<String> {
    let no_json = |error: serde_json::Error| Some(format!("it is no JSON: {}", without_line(&error)));
    match text.as_bytes().first() {
        Some(b'{' | b'[') if depth == DEPTH_MAX => Some(format!("it is nested more than {DEPTH_MAX} deep")),
        Some(b'{') => match serde_json::from_str::<Fields<'_>>(text) {
            Err(error) => no_json(error),
            Ok(Fields(fields)) => {
                let inner = || fields.iter().find_map(|(_, value)| json_fault(value.get(), depth + 1));
                twice(&fields).map(|name| format!("it names {name:?} twice")).or_else(inner)
            }
        },
        Some(b'[') => match serde_json::from_str::<Vec<&RawValue>>(text) {
            Err(error) => no_json(error),
            Ok(items) => items.iter().find_map(|item| json_fault(item.get(), depth + 1)),
        },
        // What stands within another value was read with it.
        _ if depth > 0 => None,
        _ => serde_json::from_str::<&RawValue>(text).err().and_then(no_json),
    }
}

/// A name that two of these fields have.
fn twice<'a>(fields: &'a [(Cow<'_, str>, &RawValue)]) -> Option<&'a str> {
    // Few are compared sooner than they are hashed.
    const FEW: usize = 16;
    let mut names = fields.iter().map(|(name, _)| name.as_ref());
    if fields.len() <= FEW {
        return names
            .enumerate()
            .find(|(at, name)| fields[..*at].iter().any(|(other, _)| other == name))
            .map(|(_, n)| n);
    }
    let mut seen = HashSet::with_capacity(fields.len());
    names.find(|name| !seen.insert(*name))
}

/// The fields of an object as they stand there.
struct Fields<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct All;
        impl<'de> Visitor<'de> for All {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
                let mut fields = Vec::new();
                while let Some((Name(name), value)) = map.next_entry()? {
                    fields.push((name, value));
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(All)
    }
}

/// The name of a field, taken from the text where it stands there as it is.
struct Name<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Name<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl<'de> Visitor<'de> for Text {
            type Value = Name<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name")
            }

            fn visit_borrowed_str<E>(self, name: &'de str) -> Result<Name<'de>, E> {
                Ok(Name(Cow::Borrowed(name)))
            }

            fn visit_str<E>(self, name: &str) -> Result<Name<'de>, E> {
                Ok(Name(Cow::Owned(name.to_owned())))
            }
        }
        deserializer.deserialize_str(Text)
    }
}

/// What an error of JSON says, without its own idea of where.
fn without_line(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or(&text).to_owned()
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use proptest::prelude::*;

    use super::*;

    const CSV: Format = Format::Csv { delimiter: b',' };

    /// What is read, with a buffer of so many bytes: `line input`, or `line! reason` of a bad row, or `line!! reason`
    /// of one behind which nothing is read.
    fn read_with(buffer: usize, format: Format, text: &[u8], most: usize) -> Vec<String> {
        let told = |row: Result<Row, RowError>| match row {
            Ok(row) => format!("{} {}", row.line, String::from_utf8(row.input).unwrap()),
            Err(RowError::Bad(bad)) => format!("{}! {}", bad.line, bad.reason),
            Err(RowError::Lost(bad)) => format!("{}!! {}", bad.line, bad.reason),
            Err(RowError::Io(error)) => panic!("{error}"),
        };
        match RowSource::new(format, BufReader::with_capacity(buffer, text), most) {
            Ok(source) => source.map(told).collect(),
            Err(error) => vec![told(Err(error))],
        }
    }

    fn read(format: Format, text: &str, most: usize) -> Vec<String> {
        let read = read_with(1 << 16, format, text.as_bytes(), most);
        assert_eq!(read_with(3, format, text.as_bytes(), most), read, "a small buffer changes nothing");
        read
    }

    #[test]
    fn a_row_of_csv_has_the_number_of_the_line_on_which_it_begins() {
        let text = "\u{feff}\n\na,b\n1,2\n\n\"x\ny\",\"q\"\"\"\nlast,5";
        let rows = [r#"4 {"a":"1","b":"2"}"#, r#"6 {"a":"x\ny","b":"q\""}"#, r#"8 {"a":"last","b":"5"}"#];
        assert_eq!(read(CSV, text, 99), rows);
        let windows = read(CSV, "a,b\r\n1,2\r\n\r\n3,4\r\n", 99);
        assert_eq!(windows, [r#"2 {"a":"1","b":"2"}"#, r#"4 {"a":"3","b":"4"}"#]);
        assert_eq!(read(Format::Csv { delimiter: b';' }, "a;b\n1,5;2\n", 99), [r#"2 {"a":"1,5","b":"2"}"#]);
    }

    #[test]
    fn a_bad_row_of_csv_says_why_and_the_rows_behind_it_keep_their_numbers() {
        let text = "a,b\n1\n2,3,4\n5,6\nthis one is much too long to be read,8\n9,10\n";
        let rows = [
            "2! it has 1 fields, the header has 2",
            "3! it has 3 fields, the header has 2",
            r#"4 {"a":"5","b":"6"}"#,
            "5! it has more than 20 bytes",
            r#"6 {"a":"9","b":"10"}"#,
        ];
        assert_eq!(read(CSV, text, 20), rows);
        assert_eq!(read_with(64, CSV, b"a\n\xff\nb\n", 99), ["2! it is not UTF-8", r#"3 {"a":"b"}"#]);
        let bad = RowSource::new(CSV, b"a\n1,2\n".as_slice(), 99).unwrap().next();
        assert!(matches!(bad, Some(Err(RowError::Bad(BadLine { text, .. }))) if text == b"1,2"));
    }

    #[test]
    fn a_header_that_can_not_be_one_is_refused_at_once() {
        assert_eq!(read(CSV, "a,a\n1,2\n", 99), [r#"1!! the header names "a" twice"#]);
        assert_eq!(read(CSV, "\na,\n1,2\n", 99), ["2!! field 2 of the header has no name"]);
        assert_eq!(read(CSV, "", 99), ["1!! there is no header"]);
        assert_eq!(read(CSV, "\n\n", 99), ["1!! there is no header"]);
        assert_eq!(read(CSV, "a,b\n", 99), [""; 0]);
    }

    #[test]
    fn lines_are_checked_and_counted() {
        let text = "{\"n\": 1}\r\n\n   \n[2]\nnone\n\"0123456789\"\n4";
        let rows =
            [r#"1 {"n": 1}"#, "4 [2]", "5! it is no JSON: expected value", "6! it has more than 10 bytes", "7 4"];
        let read_rows = read(Format::JsonLines, text, 10);
        assert_eq!(read_rows[..2], rows[..2]);
        assert!(read_rows[2].starts_with("5! it is no JSON: "), "{read_rows:?}");
        assert_eq!(read_rows[3..], rows[3..]);
        assert_eq!(read(Format::Lines, "a \"b\"\n\nc\n", 10), [r#"1 "a \"b\"""#, r#"3 "c""#]);
    }

    /// `!` is a row that may be passed over, `!!` one behind which nothing is read.
    #[test]
    fn what_stands_in_a_file_is_read_whole_or_refused_by_its_line() {
        let json = Format::JsonLines;
        let table: &[(Format, &[u8], &[&str])] = &[
            // Quotes.
            (CSV, b"a,b\n1,2\n3,\"4\n5,6\n7,8\n", &[r#"2 {"a":"1","b":"2"}"#, "3!! a quote is not closed"]),
            (CSV, b"a,b\n1,\"2", &["2!! a quote is not closed"]),
            (CSV, b"a,\"b\n1,2\n", &["1!! a quote is not closed"]),
            (CSV, b"a,b\n1,\"2\n3,4\n5,\"6\"\n7,8\n", &["2!! text follows a closing quote"]),
            (CSV, b"a,b\n1,\"2\"x\n3,4\n", &["2! text follows a closing quote", r#"3 {"a":"3","b":"4"}"#]),
            (CSV, b"a,b\n1,\"2\" \n3,4\n", &["2! text follows a closing quote", r#"3 {"a":"3","b":"4"}"#]),
            (CSV, b"a,\"b\"x\n1,2\n", &["1!! text follows a closing quote"]),
            (CSV, b"a,b\n\"x\ny\",2,3\n4,5\n", &["2!! it has 3 fields, the header has 2"]),
            (CSV, b"a\n\"01234567890123456789\n01234567890123456789\n\"\n1\n", &["2!! it has more than 40 bytes"]),
            (CSV, b"a,b\n5\" pipe,\"say \"\"x\"\"\"\n", &[r#"2 {"a":"5\" pipe","b":"say \"x\""}"#]),
            (CSV, b"a\n\"\"\n\n1\n", &[r#"2 {"a":""}"#, r#"4 {"a":"1"}"#]),
            // Fields.
            (
                CSV,
                b"a,b\n1\n2,3,4\n5,6\n",
                &[
                    "2! it has 1 fields, the header has 2",
                    "3! it has 3 fields, the header has 2",
                    r#"4 {"a":"5","b":"6"}"#,
                ],
            ),
            // The header.
            (CSV, b"a,b,a\n1,2,3\n", &[r#"1!! the header names "a" twice"#]),
            (CSV, b"a,\n1,2\n", &["1!! field 2 of the header has no name"]),
            (CSV, b"a,\xff\n1,2\n", &["1!! the header can't be used: it is not UTF-8"]),
            (CSV, b"\xff\xfea\0\n\0", &["1!! the header can't be used: it is not UTF-8"]),
            (CSV, b"a\0,\0b\0\n\0", &["1!! the header can't be used: it has a NUL byte"]),
            (CSV, b"01234567890123456789,01234567890123456789,b\n1,2,3\n", &["1!! it has more than 40 bytes"]),
            (CSV, b"a,b\n", &[]),
            (CSV, b"a,b", &[]),
            (CSV, b"", &["1!! there is no header"]),
            (CSV, b"\xef\xbb\xbf", &["1!! there is no header"]),
            // Bytes.
            (CSV, b"\xef\xbb\xbfa\n1\n", &[r#"2 {"a":"1"}"#]),
            (CSV, b"a\n1\0\n2\n", &["2! it has a NUL byte", r#"3 {"a":"2"}"#]),
            (CSV, b"a\n\xff\n2", &["2! it is not UTF-8", r#"3 {"a":"2"}"#]),
            (CSV, b"a\n2\n\xc3", &[r#"2 {"a":"2"}"#, "3! it is not UTF-8"]),
            (CSV, b"a,b\n\xc3,\xa9\n", &["2! it is not UTF-8"]),
            (
                CSV,
                b"a\n0123456789012345678901234567890123456789x\n2\n",
                &["2! it has more than 40 bytes", r#"3 {"a":"2"}"#],
            ),
            // Ends of lines.
            (CSV, b"a\n1\n2", &[r#"2 {"a":"1"}"#, r#"3 {"a":"2"}"#]),
            (
                CSV,
                b"a\r1\r\r\"2\rx\"\r3\r\n4",
                &[r#"2 {"a":"1"}"#, r#"4 {"a":"2\rx"}"#, r#"6 {"a":"3"}"#, r#"7 {"a":"4"}"#],
            ),
            // JSON.
            (json, b"{\"a\":1,\"a\":2}\n3\n", &[r#"1! it names "a" twice"#, "2 3"]),
            (json, b"[{\"a\":{\"\\u0062\":1,\"b\":2}}]\n", &[r#"1! it names "b" twice"#]),
            (json, b"1 2\n3\n", &["1! it is no JSON: trailing characters", "2 3"]),
            (json, b"{}{}\n", &["1! it is no JSON: trailing characters"]),
            (
                json,
                b"{\"a\":\n1}\n",
                &["1! it is no JSON: EOF while parsing a value", "2! it is no JSON: trailing characters"],
            ),
            (json, b"\"\xc3", &["1! it is not UTF-8"]),
            (json, b"\"a\0\"", &["1! it is no JSON: control character (\\u0000-\\u001F) found while parsing a string"]),
            (json, b"\xef\xbb\xbf1e400\n12345678901234567.10", &["1 1e400", "2 12345678901234567.10"]),
            (json, b"\"0123456789012345678901234567890123456789\"\n1", &["1! it has more than 40 bytes", "2 1"]),
            (json, b"", &[]),
            // Lines.
            (Format::Lines, b"a\0\nb", &["1! it has a NUL byte", r#"2 "b""#]),
            (
                Format::Lines,
                b"\xff\n0123456789012345678901234567890123456789x\nb",
                &["1! it is not UTF-8", "2! it has more than 40 bytes", r#"3 "b""#],
            ),
        ];
        for (format, text, wanted) in table {
            let shown = String::from_utf8_lossy(text);
            for buffer in [1 << 16, 3] {
                assert_eq!(read_with(buffer, *format, text, 40), *wanted, "{format:?} {shown:?}");
            }
        }
    }

    #[test]
    fn json_is_as_deep_and_as_wide_as_others_can_read() {
        let deep = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert_eq!(read(Format::JsonLines, &deep(127), 999), [format!("1 {}", deep(127))]);
        assert!(serde_json::from_str::<serde_json::Value>(&deep(127)).is_ok());
        assert_eq!(read(Format::JsonLines, &deep(128), 999), ["1! it is nested more than 127 deep"]);
        assert_eq!(read(Format::JsonLines, &deep(400), 999), ["1! it is nested more than 127 deep"]);
        let wide = |last| format!("{{{}\"{last}\":0}}", (0..40).map(|n| format!("\"n{n}\":0,")).collect::<String>());
        assert_eq!(read(Format::JsonLines, &wide("n39"), 999), [r#"1! it names "n39" twice"#]);
        assert_eq!(read(Format::JsonLines, &wide("n40"), 999), [format!("1 {}", wide("n40"))]);
    }

    #[test]
    fn what_was_read_before_is_passed_over_and_its_lines_are_counted() {
        let text = "a\n1\n\"2\n2\"\r\n\n3\n".as_bytes();
        let mut first = RowSource::new(CSV, text, 99).unwrap();
        first.nth(1).unwrap().unwrap();
        let behind = text.len() - first.input().len();
        let mut second = RowSource::new(CSV, text, 99).unwrap();
        second.pass_over((behind - 2) as u64).unwrap();
        assert_eq!(second.lines_ended(), first.lines_ended());
        let rest = |source: RowSource<&[u8]>| source.map(Result::unwrap).collect::<Vec<Row>>();
        assert_eq!(rest(second), [Row { line: 6, input: br#"{"a":"3"}"#.to_vec() }]);
        assert_eq!(rest(first), [Row { line: 6, input: br#"{"a":"3"}"#.to_vec() }]);
    }

    proptest! {
        #[test]
        fn whatever_stands_in_a_file_is_read_alike_with_every_buffer(
            text in "([ab\",;\r\n{}\u{e9}]|\n){0,60}", most in 1usize..20, buffer in 1usize..9,
        ) {
            for format in [CSV, Format::JsonLines, Format::Lines] {
                let read = read_with(1 << 12, format, text.as_bytes(), most);
                prop_assert_eq!(&read_with(buffer.max(3), format, text.as_bytes(), most), &read);
            }
        }
    }
}
