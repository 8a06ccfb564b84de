//! Reads rows out of what people hand over: CSV with a header, lines of JSON, or plain lines. One row is in memory at a time, and
//! none is longer than the reader was told to allow.
//!
//! The number of a row is that of the line in the file on which it begins, whatever stands before it: blank lines, rows of several
//! lines, and rows that are bad.

use std::io::{self, BufRead};

use csv_core::ReadRecordResult;
use queue_core::model::batch::Row;
use serde::de::IgnoredAny;
use tokio::sync::mpsc;

/// Rows go to whoever hands them over in pieces of about so many bytes, of which a few wait.
const PIECE_BYTES: usize = 64 << 10;
const PIECES_MAX: usize = 8;

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
    Bad(#[from] BadLine),
    /// Nothing more can be read.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
}

/// The rows of a file, one after the other.
pub struct RowSource<R> {
    input: R,
    format: Format,
    most: usize,
    /// How many line breaks lie behind us.
    lines: u64,
    /// The row as it stands in the file.
    text: Vec<u8>,
    csv: Csv,
    is_over: bool,
}

/// What reading CSV needs besides.
struct Csv {
    reader: csv_core::Reader,
    fields: Vec<u8>,
    ends: Vec<usize>,
    /// The names of the fields, as they stand in an object.
    names: Vec<Vec<u8>>,
}

/// How a row came to its end.
enum Extent {
    Whole,
    TooLong,
    /// The file ends within quotes.
    Open,
}

impl<R: BufRead> RowSource<R> {
    /// Reads rows of at most so many bytes, of CSV the header at once.
    pub fn new(format: Format, input: R, most_bytes: usize) -> Result<Self, RowError> {
        let delimiter = if let Format::Csv { delimiter } = format { delimiter } else { b',' };
        let reader = csv_core::ReaderBuilder::new().delimiter(delimiter).build();
        let csv = Csv { reader, fields: Vec::new(), ends: Vec::new(), names: Vec::new() };
        let mut source = Self { input, format, most: most_bytes, lines: 0, text: Vec::new(), csv, is_over: false };
        // Three bytes that some programs put before a text, to say that it is UTF-8.
        if source.input.fill_buf()?.starts_with(b"\xef\xbb\xbf") {
            source.input.consume(3);
        }
        if matches!(format, Format::Csv { .. }) {
            source.read_header()?;
        }
        Ok(source)
    }

    fn read_header(&mut self) -> Result<(), RowError> {
        let Some((line, fields)) = self.record()? else {
            return Err(BadLine { line: 1, reason: "there is no header".into(), text: Vec::new() }.into());
        };
        let Csv { fields: bytes, ends, .. } = &self.csv;
        let mut seen = std::collections::BTreeSet::new();
        let mut names = Vec::with_capacity(fields);
        for (at, name) in fields_of(bytes, &ends[..fields]).enumerate() {
            let bad = |reason| BadLine { line, reason, text: self.text.clone() };
            let name = std::str::from_utf8(name).map_err(|_| bad("the header is not UTF-8".into()))?;
            if name.is_empty() {
                return Err(bad(format!("field {} of the header has no name", at + 1)).into());
            }
            if !seen.insert(name) {
                return Err(bad(format!("the header names {name:?} twice")).into());
            }
            let mut key = json_text(name);
            key.push(b':');
            names.push(key);
        }
        self.csv.names = names;
        Ok(())
    }

    fn read(&mut self) -> Result<Option<Row>, RowError> {
        if let Format::Csv { .. } = self.format {
            let Some((line, fields)) = self.record()? else { return Ok(None) };
            return match self.object(fields) {
                Ok(input) => Ok(Some(Row { line, input })),
                Err(reason) => Err(self.bad(line, reason)),
            };
        }
        while let Some((line, extent)) = self.line()? {
            if let Extent::TooLong = extent {
                return Err(self.bad(line, self.too_long()));
            }
            let Ok(text) = std::str::from_utf8(&self.text) else {
                return Err(self.bad(line, "it is not UTF-8".into()));
            };
            if text.trim_ascii().is_empty() {
                continue;
            }
            let input = match self.format {
                Format::Lines => json_text(text),
                _ => match serde_json::from_str::<IgnoredAny>(text) {
                    Ok(_) => text.trim_ascii().as_bytes().to_vec(),
                    Err(error) => return Err(self.bad(line, format!("it is no JSON: {}", without_line(&error)))),
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
        BadLine { line, reason, text: self.text.clone() }.into()
    }

    fn too_long(&self) -> String {
        format!("it has more than {} bytes", self.most)
    }

    /// The next line, without its end, and its number.
    fn line(&mut self) -> io::Result<Option<(u64, Extent)>> {
        self.text.clear();
        let (number, mut extent, mut is_there) = (self.lines + 1, Extent::Whole, false);
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
                self.lines += 1;
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

    /// The next record of CSV: the number of its first line, and how many fields it has.
    fn record(&mut self) -> Result<Option<(u64, usize)>, RowError> {
        // The reader would pass over blank lines itself, and nobody would know on which line the record begins.
        loop {
            match self.input.fill_buf()?.first() {
                Some(b'\n') => self.lines += 1,
                Some(b'\r') => {}
                Some(_) => break,
                None => return Ok(None),
            }
            self.input.consume(1);
        }
        let line = self.lines + 1;
        let (extent, fields) = self.fields()?;
        match extent {
            Extent::Whole => Ok(Some((line, fields))),
            Extent::TooLong => Err(self.bad(line, self.too_long())),
            Extent::Open => Err(self.bad(line, "a quote is not closed".into())),
        }
    }

    fn fields(&mut self) -> io::Result<(Extent, usize)> {
        self.text.clear();
        let Csv { reader, fields, ends, .. } = &mut self.csv;
        reader.reset();
        // The reader needs room for what it is given, even where it writes nothing.
        fields.resize(self.most + 1, 0);
        ends.resize(self.most.min(4096) + 2, 0);
        let (mut written, mut count, mut extent) = (0, 0, Extent::Whole);
        loop {
            let chunk = self.input.fill_buf()?;
            // Behind the last line stands a line break, if need be: a record that it does not end is within quotes.
            let is_last = chunk.is_empty();
            let given = if is_last { b"\n".as_slice() } else { chunk };
            let (result, taken, bytes, found) = reader.read_record(given, &mut fields[written..], &mut ends[count..]);
            (written, count) = (written + bytes, count + found);
            if !is_last {
                self.lines += given[..taken].iter().filter(|byte| **byte == b'\n').count() as u64;
                let room = self.most.saturating_sub(self.text.len());
                self.text.extend_from_slice(&given[..taken.min(room)]);
                self.input.consume(taken);
            }
            match result {
                ReadRecordResult::Record | ReadRecordResult::End => break,
                ReadRecordResult::InputEmpty if is_last => {
                    extent = Extent::Open;
                    break;
                }
                ReadRecordResult::InputEmpty => {}
                // The rest of it is read into the same place, again and again.
                ReadRecordResult::OutputFull => (extent, written) = (Extent::TooLong, 0),
                ReadRecordResult::OutputEndsFull if ends.len() > self.most => (extent, count) = (Extent::TooLong, 0),
                ReadRecordResult::OutputEndsFull => ends.resize(self.most + 2, 0),
            }
        }
        // The line break after a carriage return is the next record's first byte, and is passed over and counted there.
        while matches!(self.text.last(), Some(b'\n' | b'\r')) {
            self.text.pop();
        }
        Ok((extent, count))
    }

    /// The record as a JSON object.
    fn object(&self, count: usize) -> Result<Vec<u8>, String> {
        let Csv { fields, ends, names, .. } = &self.csv;
        if count != names.len() {
            return Err(format!("it has {count} fields, the header has {}", names.len()));
        }
        let mut object = Vec::with_capacity(self.text.len() + names.iter().map(|name| name.len() + 3).sum::<usize>());
        object.push(b'{');
        for (name, value) in names.iter().zip(fields_of(fields, &ends[..count])) {
            if object.len() > 1 {
                object.push(b',');
            }
            object.extend_from_slice(name);
            let value = std::str::from_utf8(value).map_err(|_| "it is not UTF-8".to_owned())?;
            serde_json::to_writer(&mut object, value).expect("a text can be written to memory");
        }
        object.push(b'}');
        if object.len() > self.most { Err(self.too_long()) } else { Ok(object) }
    }
}

impl<R: BufRead> Iterator for RowSource<R> {
    type Item = Result<Row, RowError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_over {
            return None;
        }
        let row = self.read().transpose();
        self.is_over = matches!(row, None | Some(Err(RowError::Io(_))));
        row
    }
}

/// Some rows, or why there is none here. Behind a bad line more may follow.
pub type Piece = Result<Vec<Row>, RowError>;

/// Reads in a thread of its own, for a file may block for as long as it likes. The reading ends with the rows, or with the receiver.
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

fn fields_of<'a>(bytes: &'a [u8], ends: &'a [usize]) -> impl Iterator<Item = &'a [u8]> {
    let begins = std::iter::once(0).chain(ends.iter().copied());
    begins.zip(ends).map(|(begin, end)| &bytes[begin..*end])
}

fn json_text(text: &str) -> Vec<u8> {
    serde_json::to_vec(text).expect("a text can be written to memory")
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

    /// What is read, with a buffer of so many bytes: `line input` or `line! reason` of each row.
    fn read_with(buffer: usize, format: Format, text: &[u8], most: usize) -> Vec<String> {
        let told = |row: Result<Row, RowError>| match row {
            Ok(row) => format!("{} {}", row.line, String::from_utf8(row.input).unwrap()),
            Err(RowError::Bad(bad)) => format!("{}! {}", bad.line, bad.reason),
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
        assert_eq!(read(CSV, "a\n1\n\"never\nclosed\n", 99), [r#"2 {"a":"1"}"#, "3! a quote is not closed"]);
        assert_eq!(read_with(64, CSV, b"a\n\xff\nb\n", 99), ["2! it is not UTF-8", r#"3 {"a":"b"}"#]);
        let bad = RowSource::new(CSV, b"a\n1,2\n".as_slice(), 99).unwrap().next();
        assert!(matches!(bad, Some(Err(RowError::Bad(BadLine { text, .. }))) if text == b"1,2"));
    }

    #[test]
    fn a_header_that_can_not_be_one_is_refused_at_once() {
        assert_eq!(read(CSV, "a,a\n1,2\n", 99), [r#"1! the header names "a" twice"#]);
        assert_eq!(read(CSV, "\na,\n1,2\n", 99), ["2! field 2 of the header has no name"]);
        assert_eq!(read(CSV, "", 99), ["1! there is no header"]);
        assert_eq!(read(CSV, "\n\n", 99), ["1! there is no header"]);
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
