//! What passes between a worker and a program, line by line: `docs/handlers.md` in types.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use queue_core::ids::{App, Fence, JobId, Op, User};
use queue_core::model::batch::{RowEnd, RowResult};
use queue_core::model::task::{Encoding, Message, Payload, Progress};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::execute::process::Line;
use crate::execute::rows::{BatchEnd, BegunRow, RowAnswer, RowsOf};
use crate::execute::task::{Desk, Outcome, Output, Problem, Task, Wish};

/// The version of the protocol, told with each task. It changes when a program of today would not understand.
const VERSION: u32 = 1;
/// Longest line that a program gets. An input may be a megabyte, and may be longer in JSON than it was.
const TASK_MAX_BYTES: usize = 16 << 20;
/// So much of a line that is no message is shown.
const SHOWN_MAX_BYTES: usize = 200;

/// The head of a task's line; its input and context follow as they are.
#[derive(Serialize)]
struct Head<'a> {
    r#type: &'static str,
    v: u32,
    id: u64,
    job: &'a JobId,
    #[serde(skip_serializing_if = "Option::is_none")]
    batch: Option<&'a JobId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<u64>,
    user: &'a User,
    app: &'a App,
    op: &'a Op,
    fence: Fence,
    attempt: u64,
    max_attempts: u32,
    timeout_ms: u64,
    tags: &'a [String],
    traceparent: Option<&'a str>,
}

/// What a line of a program says.
pub(super) enum Says<T> {
    /// Something by the way.
    Aside,
    /// How far the work has come.
    Save(Value),
    /// What became of the call.
    Answer(Outcome<T>),
}

/// What a program may say.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
enum Word {
    Ready,
    Progress {
        id: u64,
        done: u64,
        total: Option<u64>,
        note: Option<String>,
    },
    Log {
        id: u64,
        line: String,
    },
    Checkpoint {
        id: u64,
        value: Value,
    },
    Result {
        id: u64,
        result: Option<Value>,
        #[serde(default)]
        messages: Vec<Message>,
        #[serde(default)]
        files: BTreeMap<String, File>,
    },
    Error {
        id: u64,
        error: String,
        #[serde(default)]
        wish: Wanted,
        after_ms: Option<u64>,
        #[serde(default)]
        messages: Vec<Message>,
        result: Option<Value>,
    },
    Stopped {
        id: u64,
    },
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Wanted {
    Retry,
    #[default]
    Fail,
    Ignore,
}

/// A file in a line: its text, or its bytes in Base64.
#[derive(Deserialize)]
#[serde(untagged)]
enum File {
    Text(String),
    Bytes { base64: String },
}

impl File {
    fn read(self) -> Result<Vec<u8>, String> {
        match self {
            File::Text(text) => Ok(text.into_bytes()),
            File::Bytes { base64 } => BASE64_STANDARD.decode(base64).map_err(|error| error.to_string()),
        }
    }
}

fn payload(value: Option<Value>) -> Option<Payload> {
    // A value can always be written.
    value.and_then(|value| Payload::json(&value).ok())
}

/// The line that hands a task over.
pub(super) fn line_of(call: u64, task: &Task) -> Result<String, String> {
    let head = Head {
        r#type: "job",
        v: VERSION,
        id: call,
        job: &task.job,
        batch: task.row.map(|_| &task.job),
        line: task.row.map(|row| row.line),
        user: &task.user,
        app: &task.app,
        op: &task.op,
        fence: task.fence,
        attempt: task.attempt,
        max_attempts: task.max_attempts,
        timeout_ms: millis(task.timeout),
        tags: &task.tags,
        traceparent: task.traceparent.as_deref(),
    };
    let context = context_text(task.context.as_ref())?;
    let input = text("input", &task.input)?;
    let checkpoint = task.checkpoint.as_ref().map(|checkpoint| text("checkpoint", checkpoint)).transpose()?;
    let checkpoint = checkpoint.map_or(String::new(), |checkpoint| format!(",\"checkpoint\":{checkpoint}"));
    let head = serde_json::to_string(&head).map_err(|error| error.to_string())?;
    let head = head.trim_end_matches('}');
    of_length(format!("{head}{checkpoint},\"context\":{context},\"input\":{input}}}\n"))
}

fn text(what: &str, payload: &Payload) -> Result<String, String> {
    payload.to_json_line().map_err(|error| format!("the {what} cannot be handed over as JSON: {error}"))
}

fn context_text(context: Option<&Payload>) -> Result<String, String> {
    context.map_or(Ok("null".into()), |context| text("context", context))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn of_length(line: String) -> Result<String, String> {
    match line.len() {
        ..=TASK_MAX_BYTES => Ok(line),
        length => Err(format!("the task would be a line of {length} bytes, at most {TASK_MAX_BYTES} are handed over")),
    }
}

/// What rows have in common, in each line that hands some of them over.
#[derive(Serialize)]
struct RowsHead<'a> {
    batch: &'a JobId,
    user: &'a User,
    app: &'a App,
    op: &'a Op,
    fence: Fence,
    attempt: u64,
    max_attempts: u32,
    timeout_ms: u64,
    traceparent: Option<&'a str>,
}

/// Writes lines that hand rows over. What their rows have in common is written down once.
pub(super) struct RowsWriter {
    common: String,
}

impl RowsWriter {
    pub(super) fn new(of: &RowsOf) -> Result<Self, String> {
        let head = RowsHead {
            batch: &of.batch,
            user: &of.user,
            app: &of.app,
            op: &of.op,
            fence: of.fence,
            attempt: of.attempt,
            max_attempts: of.max_attempts,
            timeout_ms: millis(of.timeout),
            traceparent: of.traceparent.as_deref(),
        };
        let head = serde_json::to_string(&head).map_err(|error| error.to_string())?;
        let head = head.trim_matches(['{', '}']);
        let context = context_text(of.context.as_ref())?;
        Ok(Self { common: format!("{head},\"context\":{context},\"rows\":[") })
    }

    /// The line with these rows, and the places of those that are in it. What can't be said of a row is told instead.
    pub(super) fn line(
        &self,
        call: u64,
        rows: Vec<BegunRow>,
        of: &RowsOf,
        refuse: impl Fn(usize, String),
    ) -> (Result<String, String>, Vec<usize>) {
        let bytes: usize = rows.iter().map(|row| row.input.len() + 32).sum();
        let mut line = String::with_capacity(self.common.len() + bytes + 64);
        let mut places = Vec::with_capacity(rows.len());
        // A text takes whatever is written to it.
        let _ = write!(line, "{{\"type\":\"rows\",\"v\":{VERSION},\"id\":{call},{}", self.common);
        for BegunRow { place, line: number, input } in rows {
            match text("input", &Payload { encoding: of.encoding, bytes: input }) {
                Ok(input) => {
                    let comma = if places.is_empty() { "" } else { "," };
                    let _ = write!(line, "{comma}{{\"line\":{number},\"input\":{input}}}");
                    places.push(place);
                }
                Err(reason) => refuse(place, reason),
            }
        }
        line.push_str("]}\n");
        (of_length(line), places)
    }
}

/// The line that says that a checkpoint is kept.
pub(super) fn saved_line(call: u64) -> String {
    format!("{{\"type\":\"saved\",\"id\":{call}}}\n")
}

/// The line that tells of the end of a batch.
pub(super) fn mark_done_line(call: u64, end: &BatchEnd) -> Result<String, String> {
    let end = end.to_json_line()?;
    let end = end.trim_start_matches('{');
    of_length(format!("{{\"type\":\"mark_done\",\"v\":{VERSION},\"id\":{call},{end}\n"))
}

fn whole(line: &Line) -> Result<&[u8], Problem> {
    match line {
        Line { bytes, cut: false } => Ok(bytes),
        Line { bytes, .. } => {
            Err(Problem::fail(format!("the program wrote a line of more than {} bytes", bytes.len())))
        }
    }
}

fn no_message(line: &[u8], error: &serde_json::Error) -> Problem {
    let error = error.to_string();
    let error = &error[..error.floor_char_boundary(SHOWN_MAX_BYTES)];
    Problem::fail(format!("the program wrote what is no message: {}: {error}", shown(line)))
}

/// Who speaks of another call than the one that runs can't be trusted. The task that runs is not to blame.
fn ours(id: u64, call: u64) -> Result<(), Problem> {
    if id == call {
        return Ok(());
    }
    Err(Problem::retry(format!("the program spoke of call {id}, and call {call} runs")))
}

/// Reads a line that came while a task runs: an answer, or something by the way.
pub(super) fn read(line: &Line, call: u64, desk: &dyn Desk) -> Result<Says<Output>, Problem> {
    let line = whole(line)?;
    let word = serde_json::from_slice(line).map_err(|error| no_message(line, &error))?;
    let ours = |id| ours(id, call);
    match word {
        Word::Ready => Ok(Says::Aside),
        Word::Progress { id, done, total, note } => {
            ours(id)?;
            desk.progress(Progress { done, total, note });
            Ok(Says::Aside)
        }
        Word::Log { id, line } => {
            ours(id)?;
            desk.log(&line);
            Ok(Says::Aside)
        }
        Word::Checkpoint { id, value } => {
            ours(id)?;
            Ok(Says::Save(value))
        }
        Word::Result { id, result, messages, files } => {
            ours(id)?;
            let read = |(name, file): (String, File)| match file.read() {
                Ok(bytes) => Ok((name, bytes)),
                Err(error) => Err(Problem::fail(format!("the program's file {name:?} is not Base64: {error}"))),
            };
            let files = files.into_iter().map(read).collect::<Result<_, _>>()?;
            Ok(Says::Answer(Outcome::Done(Output { result: payload(result), messages, files })))
        }
        Word::Error { id, error, wish, after_ms, messages, result } => {
            ours(id)?;
            let wish = match wish {
                Wanted::Retry => Wish::Retry { after: after_ms.map(Duration::from_millis) },
                Wanted::Fail => Wish::Fail,
                Wanted::Ignore => Wish::Ignore,
            };
            Ok(Says::Answer(Outcome::Failed(Problem { wish, reason: error, messages, result: payload(result) })))
        }
        Word::Stopped { id } => {
            ours(id)?;
            Ok(Says::Answer(Outcome::Stopped))
        }
    }
}

/// The answer to a line of rows.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RowsSaid<'a> {
    #[serde(rename = "type")]
    _type: RowsType,
    id: u64,
    #[serde(borrow)]
    results: Vec<RowSaid<'a>>,
}

/// The one word that makes a line an answer to rows.
#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum RowsType {
    Rows,
}

/// What a program says of one row.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RowSaid<'a> {
    #[serde(default)]
    status: RowWord,
    #[serde(borrow)]
    result: Option<&'a RawValue>,
    error: Option<String>,
    after_ms: Option<u64>,
    #[serde(default)]
    messages: Vec<Message>,
    #[serde(default)]
    files: BTreeMap<String, String>,
}

#[derive(Default, Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RowWord {
    #[default]
    Done,
    Skipped,
    Failed,
    Retry,
}

/// The type of a line, whatever else is in it.
#[derive(Deserialize)]
struct AnyType<'a> {
    #[serde(borrow)]
    r#type: Option<&'a RawValue>,
}

impl RowSaid<'_> {
    fn answer(self, encoding: Encoding) -> Result<RowAnswer, Problem> {
        let Self { status, result, error, after_ms, messages, files, .. } = self;
        if status == RowWord::Done && error.is_some() {
            return Err(Problem::fail("the program says of a row that it is done, and has an error"));
        }
        if status != RowWord::Retry && after_ms.is_some() {
            return Err(Problem::fail("the program says when to try a row again that is not to be tried again"));
        }
        let written = |result: &RawValue| {
            Payload { encoding: Encoding::Json, bytes: result.get().into() }.into_encoding(encoding)
        };
        let result = match result.map(written).transpose() {
            Ok(result) => result,
            // It is this row's fault alone.
            Err(error) => {
                let reason = format!("its result can't be written as {encoding}: {error}");
                return Ok(RowAnswer::Failed(Problem::fail(reason)));
            }
        };
        let wish = match status {
            RowWord::Done => {
                let result = result.map(|result| result.bytes);
                return Ok(RowAnswer::Ended(RowResult { end: RowEnd::Done, result, messages, files }));
            }
            RowWord::Skipped => Wish::Ignore,
            RowWord::Failed => Wish::Fail,
            RowWord::Retry => Wish::Retry { after: after_ms.map(Duration::from_millis) },
        };
        let reason = error.unwrap_or_else(|| "the program gave no reason".into());
        let files = files.into_iter().map(|(name, text)| (name, text.into_bytes())).collect();
        Ok(RowAnswer::failed(Problem { wish, reason, messages, result }, files))
    }
}

/// Reads a line that came while so many rows are worked on: what became of each, or something by the way.
pub(super) fn read_rows(
    line: &Line,
    call: u64,
    count: usize,
    encoding: Encoding,
    desk: &dyn Desk,
) -> Result<Says<Vec<RowAnswer>>, Problem> {
    let bytes = whole(line)?;
    let RowsSaid { id, results, .. } = match serde_json::from_slice(bytes) {
        Ok(said) => said,
        Err(error) => {
            let any = serde_json::from_slice::<AnyType<'_>>(bytes).ok().and_then(|any| any.r#type);
            if any.is_some_and(|any| any.get() == "\"rows\"") {
                return Err(no_message(bytes, &error));
            }
            return match read(line, call, desk)? {
                Says::Aside => Ok(Says::Aside),
                Says::Save(value) => Ok(Says::Save(value)),
                // Of all rows.
                Says::Answer(Outcome::Failed(problem)) => Ok(Says::Answer(Outcome::Failed(problem))),
                Says::Answer(Outcome::Stopped) => Ok(Says::Answer(Outcome::Stopped)),
                Says::Answer(_) => Err(Problem::fail("the program answered rows as if they were one task")),
            };
        }
    };
    ours(id, call)?;
    if results.len() != count {
        let reason = format!("the program was given {count} rows, and says what became of {}", results.len());
        return Err(Problem::fail(reason));
    }
    let answers = results.into_iter().map(|said| said.answer(encoding)).collect::<Result<_, _>>()?;
    Ok(Says::Answer(Outcome::Done(answers)))
}

/// Whether it says that it is ready.
pub(super) fn is_ready(line: &Line) -> bool {
    matches!(serde_json::from_slice(&line.bytes), Ok(Word::Ready))
}

/// The beginning of a line, to be shown.
pub(super) fn shown(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    format!("{:?}", &text[..text.floor_char_boundary(SHOWN_MAX_BYTES)])
}
