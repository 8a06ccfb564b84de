//! Rows with what became of them: shown a page at a time, or written as a whole. A page is all that is in memory.

use std::io::{self, BufWriter, ErrorKind, Write};

use console::{Common, Failure, Out, complain, one_line};
use queue_core::batch::{RowView, Which};
use queue_core::model::task::{Encoding, Payload};
use serde_json::json;

use super::args::{Export, Format, Rows};
use super::{Whole, connect, failure};
use crate::list::{show as show_table, table};

/// Rows of a page.
const PAGE: usize = 1_000;
/// So much of a value is shown in a table.
const SHOWN_CHARS: usize = 60;

/// Shows rows.
pub async fn rows(common: &Common, args: Rows, out: &mut Out) -> Result<u8, Failure> {
    let (_, _, batches) = connect(common).await?;
    let reader = batches.reader(&args.id).await.map_err(failure)?;
    let which = if args.failed { Which::Failed } else { Which::All };
    let mut left = if args.all { u64::MAX } else { args.limit };
    let mut after = args.after;
    let mut is_first = true;
    loop {
        let page = reader.page(which, after, PAGE.min(usize::try_from(left).unwrap_or(PAGE))).await.map_err(failure)?;
        left -= page.rows.len() as u64;
        if common.json {
            page.rows.iter().for_each(|row| out.line(as_json(row, reader.encoding(), true)));
        } else {
            let mut rows = table(if is_first { &["LINE", "STATUS", "INPUT", "RESULT", "MESSAGES"] } else { &[] });
            for row in &page.rows {
                let [input, result, messages] =
                    values(row, reader.encoding()).map(|value| value.unwrap_or_else(|| "-".into()));
                let [input, result, messages] = [input, result, messages].map(|text| short(&text));
                rows.add_row([row.at.line.to_string(), row.status.to_string(), input, result, messages]);
            }
            show_table(&rows, out);
        }
        is_first = false;
        match page.next {
            Some(next) if left == 0 => {
                complain(format_args!("there are more: --after {next} goes on, --all shows all"));
                return Ok(console::OK);
            }
            Some(next) if !out.is_gone() => after = Some(next),
            _ => return Ok(console::OK),
        }
    }
}

/// Writes all rows.
pub async fn export(common: &Common, args: Export) -> Result<u8, Failure> {
    let (_, _, batches) = connect(common).await?;
    let reader = batches.reader(&args.id).await.map_err(failure)?;
    let whole = if args.output.as_os_str() == "-" { None } else { Some(Whole::new(&args.output)?) };
    let into: Box<dyn Write> = match &whole {
        Some(whole) => Box::new(whole.file()?),
        None => Box::new(io::stdout().lock()),
    };
    let mut into = Rest { format: args.format, into: BufWriter::new(into) };
    let written = async {
        into.begin()?;
        let mut after = None;
        loop {
            let page = reader.page(Which::All, after, PAGE).await.map_err(failure)?;
            for row in &page.rows {
                into.row(row, reader.encoding())?;
            }
            after = page.next;
            if after.is_none() {
                return into.into.flush().map_err(Unwritten::Write);
            }
        }
    };
    match written.await {
        Ok(()) => whole.map_or(Ok(console::OK), Whole::done),
        // Who reads it may go at any time.
        Err(Unwritten::Write(error)) if whole.is_none() && error.kind() == ErrorKind::BrokenPipe => Ok(console::OK),
        Err(Unwritten::Write(error)) => Err(Failure::usage(format!("cannot write {}: {error}", args.output.display()))),
        Err(Unwritten::Read(failure)) => Err(failure),
    }
}

enum Unwritten {
    Read(Failure),
    Write(io::Error),
}

impl From<Failure> for Unwritten {
    fn from(failure: Failure) -> Self {
        Self::Read(failure)
    }
}

/// What rows are written to.
struct Rest<W: Write> {
    format: Format,
    into: W,
}

impl<W: Write> Rest<W> {
    fn begin(&mut self) -> Result<(), Unwritten> {
        match self.format {
            Format::Csv => self.record(&["line", "status", "input", "result", "messages"]),
            Format::Jsonl => Ok(()),
        }
    }

    fn row(&mut self, row: &RowView, encoding: Encoding) -> Result<(), Unwritten> {
        match self.format {
            Format::Csv => {
                let [input, result, messages] = values(row, encoding).map(Option::unwrap_or_default);
                self.record(&[&row.at.line.to_string(), row.status.as_str(), &input, &result, &messages])
            }
            Format::Jsonl => writeln!(self.into, "{}", as_json(row, encoding, false)).map_err(Unwritten::Write),
        }
    }

    fn record(&mut self, fields: &[&str]) -> Result<(), Unwritten> {
        let mut writer = csv::WriterBuilder::new().buffer_capacity(256).from_writer(&mut self.into);
        let written = writer.write_record(fields).map_err(io::Error::from).and_then(|()| writer.flush());
        written.map_err(Unwritten::Write)
    }
}

/// A row as a line of JSON. What its values say is written as it stands, so that no number loses a digit.
fn as_json(row: &RowView, encoding: Encoding, with_cursor: bool) -> String {
    let [input, result, messages] = values(row, encoding);
    let cursor = if with_cursor { format!(r#","cursor":"{}""#, row.at) } else { String::new() };
    format!(
        r#"{{"line":{},"status":"{}","input":{},"result":{},"messages":{}{cursor}}}"#,
        row.at.line,
        row.status,
        input.as_deref().unwrap_or("null"),
        result.as_deref().unwrap_or("null"),
        messages.as_deref().unwrap_or("[]"),
    )
}

/// Input, result and messages of a row in JSON, where it has some.
fn values(row: &RowView, encoding: Encoding) -> [Option<String>; 3] {
    let messages = (!row.messages.is_empty()).then(|| json!(row.messages).to_string());
    [Some(in_json(encoding, &row.input)), row.result.as_ref().map(|bytes| in_json(encoding, bytes)), messages]
}

/// A value as one line of JSON. What JSON can't say, as bytes and keys that are no texts, is an object that tells its size.
fn in_json(encoding: Encoding, bytes: &[u8]) -> String {
    let payload = Payload { encoding, bytes: bytes.to_vec() };
    payload.to_json_line().unwrap_or_else(|_| json!({ "unreadable_bytes": bytes.len() }).to_string())
}

fn short(text: &str) -> String {
    let text = one_line(text);
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}
