//! Items in files: CSV with a header, and JSON values on lines.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Seek, SeekFrom, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::{Checkpoint, Reader, Writer};
use crate::execute::task::Problem;

/// How long a file is waited for that another attempt writes to, and how often it is looked at.
const LOCK_WAIT: Duration = Duration::from_secs(30);
const LOCK_LOOK: Duration = Duration::from_millis(20);
/// Longest line of JSON that is read, in bytes.
const LINE_MAX_BYTES: u64 = 16 << 20;

/// What went wrong with a file; another attempt may find it mended.
fn fault(path: &Path, error: impl std::fmt::Display) -> Problem {
    Problem::retry(format!("{}: {error}", path.display()))
}

/// Reads the records of a CSV file with a header, each as a value.
pub fn csv<T: DeserializeOwned>(path: impl Into<PathBuf>) -> impl Reader<Item = T> {
    CsvReader { path: path.into(), open: None, of: PhantomData }
}

struct CsvReader<T> {
    path: PathBuf,
    open: Option<(csv::Reader<File>, csv::StringRecord, csv::StringRecord)>,
    of: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Reader for CsvReader<T> {
    type Item = T;

    fn open(&mut self, behind: &Value) -> Result<(), Problem> {
        let mut reader = csv::Reader::from_path(&self.path).map_err(|error| fault(&self.path, error))?;
        let header = reader.headers().map_err(|error| fault(&self.path, error))?.clone();
        if let Some(behind) = behind.as_object() {
            let number = |name| behind.get(name).and_then(Value::as_u64).unwrap_or(0);
            let mut place = csv::Position::new();
            place.set_byte(number("byte")).set_line(number("line")).set_record(number("record"));
            reader.seek(place).map_err(|error| fault(&self.path, error))?;
        }
        self.open = Some((reader, header, csv::StringRecord::new()));
        Ok(())
    }

    fn read(&mut self) -> Option<Result<T, Problem>> {
        let (reader, header, record) = self.open.as_mut()?;
        let line = reader.position().line();
        match reader.read_record(record) {
            Ok(false) => None,
            Ok(true) => {
                let bad = |error: csv::Error| Problem::fail(format!("line {line}: {error}"));
                Some(record.deserialize(Some(header)).map_err(bad))
            }
            Err(error) if error.is_io_error() => Some(Err(fault(&self.path, error))),
            // The record is behind us.
            Err(error) => Some(Err(Problem::fail(error.to_string()))),
        }
    }

    fn place(&self) -> Value {
        match &self.open {
            Some((reader, ..)) => {
                let place = reader.position();
                json!({ "byte": place.byte(), "line": place.line(), "record": place.record() })
            }
            None => Value::Null,
        }
    }
}

/// Reads a JSON value from each line of a file; blank lines are none.
pub fn json_lines<T: DeserializeOwned>(path: impl Into<PathBuf>) -> impl Reader<Item = T> {
    JsonReader { path: path.into(), open: None, text: Vec::new(), of: PhantomData }
}

struct JsonReader<T> {
    path: PathBuf,
    /// The file, and how many bytes and lines of it are behind us.
    open: Option<(BufReader<File>, u64, u64)>,
    text: Vec<u8>,
    of: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Reader for JsonReader<T> {
    type Item = T;

    fn open(&mut self, behind: &Value) -> Result<(), Problem> {
        let number = |name| behind.get(name).and_then(Value::as_u64).unwrap_or(0);
        let mut file = File::open(&self.path).map_err(|error| fault(&self.path, error))?;
        file.seek(SeekFrom::Start(number("byte"))).map_err(|error| fault(&self.path, error))?;
        self.open = Some((BufReader::new(file), number("byte"), number("line")));
        Ok(())
    }

    fn read(&mut self) -> Option<Result<T, Problem>> {
        let (file, byte, line) = self.open.as_mut()?;
        loop {
            self.text.clear();
            let mut limited = std::io::Read::take(&mut *file, LINE_MAX_BYTES + 1);
            match limited.read_until(b'\n', &mut self.text) {
                Ok(0) => return None,
                Ok(read) => *byte += read as u64,
                Err(error) => return Some(Err(fault(&self.path, error))),
            }
            *line += 1;
            if self.text.len() as u64 > LINE_MAX_BYTES {
                return Some(Err(fault(&self.path, format_args!("line {line} has more than {LINE_MAX_BYTES} bytes"))));
            }
            if self.text.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let bad = |error| Problem::fail(format!("line {line}: {error}"));
            return Some(serde_json::from_slice(&self.text).map_err(bad));
        }
    }

    fn place(&self) -> Value {
        self.open.as_ref().map_or(Value::Null, |(_, byte, line)| json!({ "byte": byte, "line": line }))
    }
}

/// Writes each item as JSON on a line of a file that is this task's alone. What was not committed is cut off when it is opened again.
pub fn json_lines_to<T: Serialize>(path: impl Into<PathBuf>) -> impl Writer<Item = T> {
    let encode = |item: &T, out: &mut Vec<u8>, _| {
        serde_json::to_writer(&mut *out, item).map_err(|error| Problem::fail(error.to_string()))?;
        out.push(b'\n');
        Ok(())
    };
    FileWriter { path: path.into(), open: None, encode, of: PhantomData }
}

/// Writes each item as a record of a CSV file that is this task's alone; the names of its fields are the header. What was not committed is
/// cut off when it is opened again.
pub fn csv_to<T: Serialize>(path: impl Into<PathBuf>) -> impl Writer<Item = T> {
    let encode = |item: &T, out: &mut Vec<u8>, is_first| {
        let mut writer = csv::WriterBuilder::new().has_headers(is_first).from_writer(&mut *out);
        writer.serialize(item).map_err(|error| Problem::fail(error.to_string()))?;
        writer.flush().map_err(|error| Problem::fail(error.to_string()))
    };
    FileWriter { path: path.into(), open: None, encode, of: PhantomData }
}

/// Writes objects, texts in JSON, as records of a CSV file that is this task's alone: these of their fields, in this order. What was not
/// committed is cut off when it is opened again.
pub(super) fn columns_to(path: impl Into<PathBuf>, columns: Vec<String>) -> impl Writer<Item = Box<RawValue>> {
    #[expect(clippy::borrowed_box, reason = "a writer is handed its items so")]
    let encode = move |item: &Box<RawValue>, out: &mut Vec<u8>, is_first| {
        let wrong = |error: &dyn std::fmt::Display| Problem::fail(format!("the item can't be written as CSV: {error}"));
        let fields: HashMap<String, &RawValue> = serde_json::from_str(item.get()).map_err(|error| wrong(&error))?;
        let field = |name| match fields.get(name).map(|value| value.get()) {
            None | Some("null") => Ok(String::new()),
            Some(text) if text.starts_with('"') => serde_json::from_str(text).map_err(|error| wrong(&error)),
            Some(text) => Ok(text.to_owned()),
        };
        let record = columns.iter().map(field).collect::<Result<Vec<String>, _>>()?;
        let mut writer = csv::Writer::from_writer(&mut *out);
        if is_first {
            writer.write_record(&columns).map_err(|error| wrong(&error))?;
        }
        writer.write_record(&record).map_err(|error| wrong(&error))?;
        writer.flush().map_err(|error| wrong(&error))
    };
    FileWriter { path: path.into(), open: None, encode, of: PhantomData }
}

struct FileWriter<T, E> {
    path: PathBuf,
    open: Option<BufWriter<File>>,
    encode: E,
    of: PhantomData<fn(T)>,
}

impl<T, E: FnMut(&T, &mut Vec<u8>, bool) -> Result<(), Problem>> FileWriter<T, E> {
    fn begin(&mut self, committed: &Value) -> Result<u64, Problem> {
        let wrong = |error: &dyn std::fmt::Display| fault(&self.path, error);
        if let Some(folder) = self.path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            fs::create_dir_all(folder).map_err(|error| wrong(&error))?;
        }
        let mut file = OpenOptions::new()
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
        let length = committed.as_u64().unwrap_or(0);
        let there = file.metadata().map_err(|error| wrong(&error))?.len();
        if there < length {
            return Err(Problem::fail(format!(
                "{}: it has {there} bytes, and {length} were committed",
                self.path.display()
            )));
        }
        file.set_len(length).map_err(|error| wrong(&error))?;
        file.seek(SeekFrom::End(0)).map_err(|error| wrong(&error))?;
        self.open = Some(BufWriter::new(file));
        Ok(length)
    }

    /// Appends bytes to what was committed, and returns how many there are then.
    fn append(&mut self, bytes: &[u8], committed: &Value) -> Result<u64, Problem> {
        let path = &self.path;
        let file = self.open.as_mut().ok_or_else(|| fault(path, "it is not open"))?;
        let length = committed.as_u64().unwrap_or(0);
        let written = (|| {
            file.write_all(bytes)?;
            file.flush()?;
            file.get_ref().sync_data()
        })();
        if let Err(error) = written {
            // All of it or nothing.
            let _ = file.get_ref().set_len(length);
            let _ = file.seek(SeekFrom::Start(length));
            return Err(fault(path, error));
        }
        Ok(length + bytes.len() as u64)
    }
}

impl<T, E: FnMut(&T, &mut Vec<u8>, bool) -> Result<(), Problem>> Writer for FileWriter<T, E> {
    type Item = T;

    fn open(&mut self, committed: &Checkpoint) -> Result<Option<Checkpoint>, Problem> {
        self.begin(&committed.writer)?;
        Ok(None)
    }

    fn write(&mut self, items: &[T], checkpoint: &mut Checkpoint) -> Result<(), Problem> {
        let mut bytes = Vec::new();
        let is_empty = checkpoint.writer.as_u64().unwrap_or(0) == 0;
        for item in items {
            let is_first = is_empty && bytes.is_empty();
            (self.encode)(item, &mut bytes, is_first)?;
        }
        checkpoint.writer = self.append(&bytes, &checkpoint.writer)?.into();
        Ok(())
    }
}
