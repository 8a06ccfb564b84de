//! Items in files: CSV with a header, and JSON values on lines. They are read as rows of batches are, by the rules of
//! `rows`.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rows::{Format, RowError, RowSource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::value::RawValue;

use super::position::{self, Identity, Position, Seen, Watched, disagreement};
use super::{Checkpoint, Reader, Writer};
use crate::execute::task::Problem;

/// How long a file is waited for that another attempt writes to, and how often it is looked at.
const LOCK_WAIT: Duration = Duration::from_secs(30);
const LOCK_LOOK: Duration = Duration::from_millis(20);
/// Longest row that is read, in bytes.
const ROW_MAX_BYTES: usize = 16 << 20;
/// So much of a file is read at once.
const BUFFER_BYTES: usize = 64 << 10;

/// What went wrong with a file; another attempt may find it mended.
fn fault(path: &Path, error: impl std::fmt::Display) -> Problem {
    Problem::retry(format!("{}: {error}", path.display()))
}

/// Reads the records of a CSV file with a header, each as a value.
pub fn csv<T: DeserializeOwned>(path: impl Into<PathBuf>) -> impl Reader<Item = T> {
    let path = path.into();
    let item = |rows: &mut Rows, scratch: &mut CsvScratch| {
        let line = rows.next_record()?;
        Some(line.map(|line| {
            if scratch.names.is_none() {
                scratch.names = Some(rows.names().iter().map(String::as_str).collect());
            }
            scratch.record.clear();
            rows.fields().for_each(|field| scratch.record.push_field(field));
            let value = scratch.record.deserialize(scratch.names.as_ref());
            value.map_err(|error| Problem::fail(format!("line {line}: {error}")))
        }))
    };
    FileReader { name: path.display().to_string(), path, format: CSV, open: None, scratch: CsvScratch::default(), item }
}

/// Reads a JSON value from each line of a file; blank lines are none.
pub fn json_lines<T: DeserializeOwned>(path: impl Into<PathBuf>) -> impl Reader<Item = T> {
    let path = path.into();
    json_items(path.display().to_string(), path)
}

/// The records of a CSV file in the workers' folder as objects of texts. `name` is the same on all workers, wherever
/// the folder is.
pub(super) fn csv_objects(path: PathBuf, name: &str) -> impl Reader<Item = Box<RawValue>> + use<> {
    FileReader { path, name: name.to_owned(), format: CSV, open: None, scratch: (), item: json_item }
}

/// The lines of a file in the workers' folder.
pub(super) fn json_values(path: PathBuf, name: &str) -> impl Reader<Item = Box<RawValue>> + use<> {
    json_items(name.to_owned(), path)
}

fn json_items<T: DeserializeOwned>(name: String, path: PathBuf) -> impl Reader<Item = T> {
    FileReader { path, name, format: Format::JsonLines, open: None, scratch: (), item: json_item }
}

fn json_item<T: DeserializeOwned>(rows: &mut Rows, (): &mut ()) -> Option<Result<Result<T, Problem>, RowError>> {
    let row = rows.next()?;
    Some(row.map(|row| {
        serde_json::from_slice(&row.input).map_err(|error| Problem::fail(format!("line {}: {error}", row.line)))
    }))
}

const CSV: Format = Format::Csv { delimiter: b',' };

type Rows = RowSource<Watched<BufReader<File>>>;

#[derive(Default)]
struct CsvScratch {
    names: Option<csv::StringRecord>,
    record: csv::StringRecord,
}

/// Reads rows of a file, and makes items of them.
struct FileReader<S, F> {
    path: PathBuf,
    /// How the file is called in a position.
    name: String,
    format: Format,
    open: Option<Rows>,
    scratch: S,
    item: F,
}

impl<T, S, F> Reader for FileReader<S, F>
where
    F: FnMut(&mut Rows, &mut S) -> Option<Result<Result<T, Problem>, RowError>>,
{
    type Item = T;

    fn source(&self) -> Identity {
        let file = |kind| Identity::of(kind).with("file", self.name.as_str());
        match self.format {
            Format::Csv { delimiter } => file("csv").with("delimiter", char::from(delimiter).to_string()),
            Format::JsonLines => file("json-lines"),
            Format::Lines => file("lines"),
        }
    }

    fn unit(&self) -> &'static str {
        "bytes"
    }

    fn open(&mut self, behind: Option<&Position>) -> Result<(), Problem> {
        let wrong = |error: &dyn std::fmt::Display| fault(&self.path, error);
        let file = File::open(&self.path).map_err(|error| wrong(&error))?;
        let file = Watched::new(BufReader::with_capacity(BUFFER_BYTES, file));
        let mut rows = RowSource::new(self.format, file, ROW_MAX_BYTES).map_err(|error| match error {
            RowError::Io(error) => wrong(&error),
            // Of a file that has another header nothing can be read.
            error => Problem::fail(format!("{}: {error}", self.path.display())),
        })?;
        if let Some(behind) = behind {
            let begun = rows.input().seen().length();
            rows.pass_over(behind.length.saturating_sub(begun)).map_err(|error| wrong(&error))?;
            // All of it is as it was, but where the file ended a line goes on.
            if position_of(&rows) == *behind && rows.input_mut().is_within_a_line().map_err(|error| wrong(&error))? {
                let (line, name) = (rows.lines_ended() + 1, &self.name);
                return Err(disagreement(format_args!("line {line} of {name:?} was the last, and is longer now")));
            }
        }
        self.open = Some(rows);
        Ok(())
    }

    fn read(&mut self) -> Option<Result<T, Problem>> {
        match (self.item)(self.open.as_mut()?, &mut self.scratch)? {
            Ok(item) => Some(item),
            Err(RowError::Bad(row)) => Some(Err(Problem::fail(row.to_string()))),
            // No item is to blame, so none is to be passed over.
            Err(error @ (RowError::Lost(_) | RowError::Io(_))) => Some(Err(fault(&self.path, error))),
        }
    }

    fn position(&self) -> Position {
        self.open.as_ref().map_or_else(|| Seen::default().position(Value::Null), position_of)
    }
}

fn position_of(rows: &Rows) -> Position {
    rows.input().seen().position(rows.lines_ended().into())
}

/// Writes each item as JSON on a line of a file that is this task's alone. What was not committed is cut off when it is
/// opened again.
pub fn json_lines_to<T: Serialize>(path: impl Into<PathBuf>) -> impl Writer<Item = T> {
    let path = path.into();
    file_writer(path.display().to_string(), path, JsonForm)
}

/// The same for a file in the workers' folder.
pub(super) fn json_values_to(path: PathBuf, name: &str) -> impl Writer<Item = Box<RawValue>> + use<> {
    file_writer(name.to_owned(), path, JsonForm)
}

/// Writes each item as a record of a CSV file that is this task's alone; the names of its fields are the header. What
/// was not committed is cut off when it is opened again.
pub fn csv_to<T: Serialize>(path: impl Into<PathBuf>) -> impl Writer<Item = T> {
    let path = path.into();
    file_writer(path.display().to_string(), path, RecordForm)
}

/// Writes objects, texts in JSON, as records of a CSV file in the workers' folder that is this task's alone: these of
/// their fields, in this order. What was not committed is cut off when it is opened again.
pub(super) fn columns_to(path: PathBuf, name: &str, columns: Vec<String>) -> impl Writer<Item = Box<RawValue>> + use<> {
    file_writer(name.to_owned(), path, ColumnsForm(columns))
}

/// How items are written.
trait Form<T> {
    fn target(&self) -> Identity;

    /// What stands before the first item.
    fn header(&self, _first: &T) -> Result<Vec<u8>, Problem> {
        Ok(Vec::new())
    }

    fn write(&self, item: &T, out: &mut Vec<u8>) -> Result<(), Problem>;
}

fn unwritten(error: impl std::fmt::Display) -> Problem {
    Problem::fail(error.to_string())
}

struct JsonForm;

impl<T: Serialize> Form<T> for JsonForm {
    fn target(&self) -> Identity {
        Identity::of("json-lines")
    }

    fn write(&self, item: &T, out: &mut Vec<u8>) -> Result<(), Problem> {
        serde_json::to_writer(&mut *out, item).map_err(unwritten)?;
        out.push(b'\n');
        Ok(())
    }
}

struct RecordForm;

impl RecordForm {
    fn write<T: Serialize>(item: &T, has_header: bool, out: &mut Vec<u8>) -> Result<(), Problem> {
        let mut writer = csv::WriterBuilder::new().has_headers(has_header).from_writer(out);
        writer.serialize(item).map_err(unwritten)?;
        writer.flush().map_err(unwritten)
    }
}

impl<T: Serialize> Form<T> for RecordForm {
    fn target(&self) -> Identity {
        Identity::of("csv")
    }

    fn header(&self, first: &T) -> Result<Vec<u8>, Problem> {
        let (mut with, mut without) = (Vec::new(), Vec::new());
        Self::write(first, true, &mut with)?;
        Self::write(first, false, &mut without)?;
        with.truncate(with.len() - without.len());
        Ok(with)
    }

    fn write(&self, item: &T, out: &mut Vec<u8>) -> Result<(), Problem> {
        Self::write(item, false, out)
    }
}

struct ColumnsForm(Vec<String>);

impl ColumnsForm {
    fn record<'a>(fields: impl Iterator<Item = &'a str>, out: &mut Vec<u8>) -> Result<(), Problem> {
        let mut writer = csv::Writer::from_writer(out);
        writer.write_record(fields).map_err(unwritten)?;
        writer.flush().map_err(unwritten)
    }
}

impl Form<Box<RawValue>> for ColumnsForm {
    fn target(&self) -> Identity {
        Identity::of("csv").with("columns", self.0.clone())
    }

    fn header(&self, _: &Box<RawValue>) -> Result<Vec<u8>, Problem> {
        let mut header = Vec::new();
        Self::record(self.0.iter().map(String::as_str), &mut header)?;
        Ok(header)
    }

    fn write(&self, item: &Box<RawValue>, out: &mut Vec<u8>) -> Result<(), Problem> {
        let wrong = |error: &dyn std::fmt::Display| Problem::fail(format!("the item can't be written as CSV: {error}"));
        let fields: HashMap<String, &RawValue> = serde_json::from_str(item.get()).map_err(|error| wrong(&error))?;
        let field = |name| match fields.get(name).map(|value| value.get()) {
            None | Some("null") => Ok(String::new()),
            Some(text) if text.starts_with('"') => serde_json::from_str(text).map_err(|error| wrong(&error)),
            Some(text) => Ok(text.to_owned()),
        };
        let record = self.0.iter().map(field).collect::<Result<Vec<String>, _>>()?;
        Self::record(record.iter().map(String::as_str), out)
    }
}

fn file_writer<T, F: Form<T>>(name: String, path: PathBuf, form: F) -> FileWriter<T, F> {
    FileWriter { path, name, form, open: None, of: PhantomData }
}

struct FileWriter<T, F> {
    path: PathBuf,
    /// How the file is called in a position.
    name: String,
    form: F,
    open: Option<Writing>,
    of: PhantomData<fn(T)>,
}

struct Writing {
    file: BufWriter<File>,
    /// What was committed.
    written: Seen,
    /// The header is there, and is that of the items.
    has_header: bool,
}

impl<T, F: Form<T>> FileWriter<T, F> {
    fn begin(&mut self, committed: Option<&Position>) -> Result<Writing, Problem> {
        let wrong = |error: &dyn std::fmt::Display| fault(&self.path, error);
        if let Some(folder) = self.path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            fs::create_dir_all(folder).map_err(|error| wrong(&error))?;
        }
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&self.path)
            .map_err(|error| wrong(&error))?;
        // An attempt that was given up may not have noticed yet; when it saves the next time it does.
        let begun = Instant::now();
        while file.try_lock().is_err() {
            if begun.elapsed() >= LOCK_WAIT {
                return Err(wrong(&"another attempt still writes to it"));
            }
            thread::sleep(LOCK_LOOK);
        }
        let mut written = Seen::default();
        if let Some(committed) = committed {
            let mut before = Watched::new(BufReader::with_capacity(BUFFER_BYTES, &file));
            let length = committed.length;
            std::io::copy(&mut (&mut before).take(length), &mut std::io::sink()).map_err(|error| wrong(&error))?;
            written = before.seen().clone();
            let name = format!("{:?}", self.name);
            position::agree(&name, "bytes", &written.position(Value::Null), committed)?;
        }
        file.set_len(written.length()).map_err(|error| wrong(&error))?;
        file.seek(SeekFrom::End(0)).map_err(|error| wrong(&error))?;
        Ok(Writing { file: BufWriter::new(file), written, has_header: false })
    }

    /// Whether the file, which has items already, has this header.
    fn begins_with(&self, header: &[u8]) -> Result<bool, Problem> {
        let mut there = Vec::new();
        let file = File::open(&self.path).map_err(|error| fault(&self.path, error))?;
        file.take(header.len() as u64).read_to_end(&mut there).map_err(|error| fault(&self.path, error))?;
        Ok(there == header)
    }
}

impl<T, F: Form<T>> Writer for FileWriter<T, F> {
    type Item = T;

    fn target(&self) -> Option<Identity> {
        Some(self.form.target().with("file", self.name.as_str()))
    }

    fn open(&mut self, committed: &Checkpoint) -> Result<Option<Checkpoint>, Problem> {
        let position = Some(&committed.writer).filter(|position| !position.is_null());
        let position = position.map(|position| serde_json::from_value(position.clone())).transpose();
        let position = position.map_err(|error| Problem::fail(format!("its position in the file: {error}")))?;
        self.open = Some(self.begin(position.as_ref())?);
        Ok(None)
    }

    fn write(&mut self, items: &[T], checkpoint: &mut Checkpoint) -> Result<(), Problem> {
        let is_empty = self.open.as_ref().is_none_or(|open| open.written.length() == 0);
        let has_header = self.open.as_ref().is_some_and(|open| open.has_header);
        let mut bytes = Vec::new();
        if let Some(first) = items.first().filter(|_| !has_header) {
            let header = self.form.header(first)?;
            if is_empty {
                bytes = header;
            } else if !self.begins_with(&header)? {
                return Err(disagreement(format_args!("the columns of {:?} are not those of the items", self.name)));
            }
        }
        for item in items {
            self.form.write(item, &mut bytes)?;
        }
        let path = &self.path;
        let Writing { file, written, has_header } = self.open.as_mut().ok_or_else(|| fault(path, "it is not open"))?;
        let appended = (|| {
            file.write_all(&bytes)?;
            file.flush()?;
            file.get_ref().sync_data()
        })();
        if let Err(error) = appended {
            // All of it or nothing.
            let _ = file.get_ref().set_len(written.length());
            let _ = file.seek(SeekFrom::Start(written.length()));
            return Err(fault(path, error));
        }
        written.add(&bytes);
        *has_header |= !items.is_empty();
        checkpoint.writer = serde_json::to_value(written.position(Value::Null)).map_err(unwritten)?;
        Ok(())
    }
}
