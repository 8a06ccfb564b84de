//! A step that works in chunks, as a definition describes it: where items come from, what is made of them, and where they go.
//!
//! An item is a JSON object. Workers read, process and write them; here is only what may be said, and the job that it makes.

use std::collections::HashSet;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::{Component, Path};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Number, Value};

use super::flow::{fill, filled, is_database, named, strings};
use super::retry::RetryChoice;
use crate::ids::{App, IdError, Op};

/// Most items of a chunk.
pub const CHUNK_SIZE_MAX: usize = 100_000;
/// The application of the built-in handler, which runs what needs no other one.
pub const APP: &str = "drayman";
/// Its operation.
pub const OP: &str = "chunk";

/// Reads, processes and writes items in chunks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChunkWork {
    /// Where items come from.
    pub reader: ItemReader,
    /// What is made of each; without one it is passed through.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processor: Option<ItemProcessor>,
    /// Where items go.
    pub writer: ItemWriter,
    /// How many items are read for a chunk.
    #[serde(default = "default_chunk_size")]
    pub chunk_size: NonZeroUsize,
    /// How many items may be passed over that can't be read, processed or written.
    #[serde(default)]
    pub skip_limit: u64,
    /// How often an item is processed at most whose handler asks for another attempt.
    #[serde(default = "once")]
    pub item_attempts: NonZeroU32,
    /// The pause between these attempts.
    #[serde(default, with = "humantime_serde")]
    pub item_delay: Duration,
}

fn default_chunk_size() -> NonZeroUsize {
    NonZeroUsize::new(1000).expect("is not zero")
}

fn once() -> NonZeroU32 {
    NonZeroU32::MIN
}

/// Where items come from, always in the same order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum ItemReader {
    /// The definition itself.
    List {
        /// The items.
        items: Vec<Value>,
    },
    /// The records of a CSV file with a header. The values are texts.
    Csv {
        /// The file, within the workers' folder.
        file: String,
    },
    /// The lines of a file, each a JSON value.
    JsonLines {
        /// The file, within the workers' folder.
        file: String,
    },
    /// What a query returns, page by page in the order of a key.
    Sql {
        /// A database that the workers' configuration names.
        database: String,
        /// The query, without an order or a limit of its own.
        query: String,
        /// The columns that tell its rows apart, none of them null.
        key: Vec<String>,
        /// Whether a step that goes on reads again what it has read, and fails if that has changed. `false` for a query whose rows may
        /// change or go once they are read.
        #[serde(default = "is_compared", skip_serializing_if = "Clone::clone")]
        compare: bool,
    },
}

fn is_compared() -> bool {
    true
}

/// What is made of an item.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum ItemProcessor {
    /// A handler gets each as a row: its result is what is written; without one, or with null, nothing is.
    Handler {
        /// The application.
        app: App,
        /// The operation.
        op: Op,
    },
    /// Only items of which all this holds are written.
    Filter {
        /// What is to hold.
        keep: Vec<Condition>,
    },
}

/// What is to hold of a field of an item.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Condition {
    /// The field.
    pub field: String,
    /// The only values that it may have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub values: Option<Vec<Value>>,
    /// Its least value. A text that is a number counts as one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<Number>,
    /// Its greatest value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<Number>,
}

/// Where items go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum ItemWriter {
    /// The step's result: for few and small ones.
    List,
    /// A CSV file that is this step's alone.
    Csv {
        /// The file, within the workers' folder.
        file: String,
        /// The fields that become its columns.
        columns: Vec<String>,
    },
    /// A file that is this step's alone, an item a line.
    JsonLines {
        /// The file, within the workers' folder.
        file: String,
    },
    /// A statement for each item, a chunk in one transaction with the checkpoint.
    Sql {
        /// A database that the workers' configuration names.
        database: String,
        /// The statement: `:name` stands for a field of the item.
        query: String,
    },
    /// A handler gets each chunk as a task: a list of items.
    Handler {
        /// The application.
        app: App,
        /// The operation.
        op: Op,
    },
    /// The batch of the step: its items are rows, and the step ends with them.
    Rows(Box<RowsTo>),
}

/// What is done with rows that a step loads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowsTo {
    /// What works on them.
    #[serde(flatten)]
    pub work: RowTarget,
    /// How long each may take.
    #[serde(default, with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub row_timeout: Option<Duration>,
    /// What is said of their retries.
    #[serde(default)]
    pub retry: RetryChoice,
}

/// What works on the rows of a batch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "kebab-case")]
pub enum RowTarget {
    /// A handler.
    Handler {
        /// The application.
        app: App,
        /// The operation.
        op: Op,
    },
    /// A statement, which names a row's fields.
    Sql {
        /// A database that the workers' configuration names.
        database: String,
        /// The statement.
        statement: String,
    },
}

impl ItemReader {
    fn file(&self) -> Option<&str> {
        match self {
            ItemReader::Csv { file } | ItemReader::JsonLines { file } => Some(file),
            ItemReader::List { .. } | ItemReader::Sql { .. } => None,
        }
    }
}

impl ItemWriter {
    /// Items as rows of the step's batch.
    pub fn rows(work: RowTarget) -> Self {
        ItemWriter::Rows(Box::new(RowsTo { work, row_timeout: None, retry: RetryChoice::default() }))
    }

    fn file(&self) -> Option<&str> {
        match self {
            ItemWriter::Csv { file, .. } | ItemWriter::JsonLines { file } => Some(file),
            ItemWriter::List | ItemWriter::Sql { .. } | ItemWriter::Handler { .. } | ItemWriter::Rows(_) => None,
        }
    }
}

impl ChunkWork {
    /// Passes items through in chunks of a thousand.
    pub fn new(reader: ItemReader, writer: ItemWriter) -> Self {
        let (chunk_size, item_attempts) = (default_chunk_size(), once());
        Self { reader, processor: None, writer, chunk_size, skip_limit: 0, item_attempts, item_delay: Duration::ZERO }
    }

    /// The handler whose workers run it: that of the processor, else that of the writer, else the built-in one.
    pub fn handler(&self) -> (App, Op) {
        match (&self.processor, &self.writer) {
            (Some(ItemProcessor::Handler { app, op }), _) | (_, ItemWriter::Handler { app, op }) => {
                (app.clone(), op.clone())
            }
            _ => built_in().expect("both are valid names"),
        }
    }

    /// What is wrong with it.
    pub(super) fn fault(&self) -> Option<String> {
        if self.chunk_size.get() > CHUNK_SIZE_MAX {
            return Some(format!("its chunk_size is more than {CHUNK_SIZE_MAX}"));
        }
        let (from, to) = (self.reader.file(), self.writer.file());
        if from.is_some() && from == to {
            return Some(format!("it reads and writes the same file {:?}", from.unwrap_or_default()));
        }
        if let Some(file) = from.into_iter().chain(to).find(|file| !is_inside(file)) {
            return Some(format!("its file {file:?} is no path within the workers' folder"));
        }
        match &self.reader {
            ItemReader::Sql { database, .. } if !is_database(database) => {
                return Some("its reader's database is no valid name".into());
            }
            ItemReader::Sql { key, .. } if key.is_empty() => return Some("its reader needs a `key`".into()),
            ItemReader::Sql { query, .. } if query.trim().is_empty() => return Some("its query is empty".into()),
            _ => {}
        }
        if let Some(ItemProcessor::Filter { keep }) = &self.processor {
            if keep.is_empty() {
                return Some("its filter says nothing to `keep`".into());
            }
            let says_nothing = |c: &&Condition| c.values.is_none() && c.min.is_none() && c.max.is_none();
            if let Some(Condition { field, .. }) = keep.iter().find(says_nothing) {
                return Some(format!("its filter says nothing of {field:?}: values, min or max"));
            }
        }
        if let ItemWriter::Csv { columns, .. } = &self.writer {
            let mut seen = HashSet::new();
            if let Some(name) = columns.iter().find(|name| !seen.insert(*name)) {
                return Some(format!("its writer names the column {name:?} twice"));
            }
        }
        match &self.writer {
            ItemWriter::Csv { columns, .. } if columns.is_empty() => Some("its writer needs `columns`".into()),
            ItemWriter::Sql { database, .. } if !is_database(database) => {
                Some("its writer's database is no valid name".into())
            }
            ItemWriter::Sql { query, .. } if query.trim().is_empty() => Some("its statement is empty".into()),
            ItemWriter::Rows(rows) => match &rows.work {
                RowTarget::Sql { database, .. } if !is_database(database) => {
                    Some("its database is no valid name".into())
                }
                RowTarget::Sql { statement, .. } if named(statement).is_empty() => None,
                // What is put into the text of a statement that runs for others' rows would have to be quoted before it is known where.
                RowTarget::Sql { .. } => {
                    Some("its query has a place for a parameter: its values come with the rows".into())
                }
                RowTarget::Handler { .. } => None,
            },
            _ => None,
        }
    }

    /// The texts of it in which parameters are looked for.
    pub(super) fn texts(&self) -> Vec<&str> {
        let mut texts = Vec::new();
        match &self.reader {
            ItemReader::List { items } => items.iter().for_each(|item| strings(item, &mut texts)),
            ItemReader::Csv { file } | ItemReader::JsonLines { file } => texts.push(file),
            ItemReader::Sql { query, .. } => texts.push(query),
        }
        if let Some(ItemProcessor::Filter { keep }) = &self.processor {
            keep.iter().flat_map(|c| c.values.iter().flatten()).for_each(|v| strings(v, &mut texts));
        }
        match &self.writer {
            ItemWriter::Csv { file, .. } | ItemWriter::JsonLines { file } => texts.push(file),
            ItemWriter::Sql { query, .. } => texts.push(query),
            ItemWriter::List | ItemWriter::Handler { .. } | ItemWriter::Rows(_) => {}
        }
        texts
    }

    /// The same with the values of parameters in their places, or what is wrong with it then; but in SQL, where how they are quoted is a
    /// matter of the database.
    pub(crate) fn filled(&self, values: &Map<String, Value>) -> Result<Self, String> {
        let mut work = self.clone();
        match &mut work.reader {
            ItemReader::List { items } => items.iter_mut().for_each(|item| *item = filled(item, values)),
            ItemReader::Csv { file } | ItemReader::JsonLines { file } => *file = fill(file, values),
            ItemReader::Sql { .. } => {}
        }
        if let Some(ItemProcessor::Filter { keep }) = &mut work.processor {
            let allowed = keep.iter_mut().filter_map(|condition| condition.values.as_mut()).flatten();
            allowed.for_each(|value| *value = filled(value, values));
        }
        match &mut work.writer {
            ItemWriter::Csv { file, .. } | ItemWriter::JsonLines { file } => *file = fill(file, values),
            ItemWriter::Sql { .. } | ItemWriter::List | ItemWriter::Handler { .. } | ItemWriter::Rows(_) => {}
        }
        match work.fault() {
            Some(fault) => Err(fault),
            None => Ok(work),
        }
    }
}

/// The built-in handler.
pub fn built_in() -> Result<(App, Op), IdError> {
    Ok((App::new(APP)?, Op::new(OP)?))
}

/// Whether a path leads to no other place than one below a folder.
pub fn is_inside(path: &str) -> bool {
    let mut parts = Path::new(path).components();
    !path.is_empty() && !path.contains('\0') && parts.all(|part| matches!(part, Component::Normal(_)))
}

/// What the job of such a step is given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkInput {
    /// What is to be done.
    pub work: ChunkWork,
    /// The parameters, for the places in SQL.
    #[serde(default)]
    pub params: Map<String, Value>,
}
