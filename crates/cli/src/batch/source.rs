//! Where the rows of a batch come from: a file or standard input, and in what they are written.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

use console::Failure;
use rows::{Piece, RowSource};
use tokio::sync::mpsc;

use super::args::{Format, Source};

/// A file that could be opened, and of which nothing was read.
pub struct Opened {
    input: Box<dyn Read + Send>,
    format: rows::Format,
}

impl Opened {
    /// Reads its rows, none of which has more than so many bytes.
    pub fn read(self, most_bytes: u64) -> mpsc::Receiver<Piece> {
        let most_bytes = usize::try_from(most_bytes).unwrap_or(usize::MAX);
        rows::pieces(move || RowSource::new(self.format, BufReader::new(self.input), most_bytes))
    }
}

/// Opens what the command line names.
pub fn open(source: &Source) -> Result<Opened, Failure> {
    let format = format(source)?;
    let input: Box<dyn Read + Send> = if is_stdin(&source.file) {
        Box::new(io::stdin())
    } else {
        let fault = |fault| Failure::usage(format!("cannot read {}: {fault}", source.file.display()));
        Box::new(File::open(&source.file).map_err(fault)?)
    };
    Ok(Opened { input, format })
}

/// Whether the rows come from standard input.
pub fn is_stdin(path: &Path) -> bool {
    path.as_os_str() == "-"
}

fn format(source: &Source) -> Result<rows::Format, Failure> {
    let ending = source.file.extension().map(|ending| ending.to_string_lossy().to_ascii_lowercase());
    let format = match (source.format, ending.as_deref()) {
        (Some(format), _) => format,
        (None, Some("csv")) => Format::Csv,
        (None, Some("jsonl" | "ndjson")) => Format::Jsonl,
        _ if is_stdin(&source.file) => {
            return Err(Failure::usage("of standard input, say --format csv or --format jsonl"));
        }
        _ => {
            return Err(Failure::usage(format!(
                "{} ends with none of .csv, .jsonl, .ndjson: say --format",
                source.file.display()
            )));
        }
    };
    Ok(match format {
        Format::Jsonl => rows::Format::JsonLines,
        Format::Csv => {
            let delimiter = rows::delimiter(source.delimiter).ok_or_else(|| {
                Failure::usage("the delimiter is one character of ASCII, but no quote and no line break")
            })?;
            rows::Format::Csv { delimiter }
        }
    })
}
