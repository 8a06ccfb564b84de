//! Commands: a process for each task, its arguments and its standard input made from the task, its exit code the outcome.
//!
//! An argument of the configuration becomes exactly one argument of the process, whatever is put into it; no shell reads it.
//! A row of a batch is a task here, and the end of a batch is one for a command of its own.

use std::fmt;
use std::process::Stdio;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use nix::errno::Errno;
use queue_core::ids::{App, JobId, Op, User};
use queue_core::model::task::Payload;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::process::{End, LEFTOVERS, Outbox, Recipe, Said, Started};
use super::rows::{BatchEnd, NoDesk};
use super::task::{Desk, Handler, Outcome, Output, Problem, Task};

/// How long a task is kept whose process could not be started.
const PAUSE: Duration = Duration::from_secs(1);

/// How a command is run.
#[derive(Debug, Clone, PartialEq)]
pub struct CommandSettings {
    /// How its processes are started.
    pub recipe: Recipe,
    /// Their arguments.
    pub args: Vec<Template>,
    /// What they read.
    pub stdin: Stdin,
    /// What their standard output is.
    pub output: OutputForm,
    /// Exit codes after which another attempt may go better.
    pub retry_codes: Vec<u8>,
    /// Exit codes about which nobody needs to care.
    pub ignore_codes: Vec<u8>,
    /// How long a process group may go on after SIGTERM, before it gets SIGKILL.
    pub kill_grace: Duration,
    /// How much of the standard output is kept, in bytes.
    pub max_output: usize,
}

/// What a command reads.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Stdin {
    /// `none`: nothing.
    #[default]
    None,
    /// `json`: the whole input, as JSON.
    Json,
    /// `row`: a row of a batch, as JSON: its batch, its line, and its input.
    Row,
    /// `field:<path>`: a part of the input, a text as it is, other values as JSON.
    Field(Path),
}

/// What a command's standard output is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OutputForm {
    /// A text, cut if it is too long.
    #[default]
    Text,
    /// One value.
    Json,
}

/// A text for one argument, with places such as `{input.file}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template(Vec<Part>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Place(Place),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Job,
    User,
    App,
    Op,
    Attempt,
    Batch,
    Line,
    Input(Path),
    Context(Path),
}

/// The way to a part of a value: names of fields and numbers of elements, with dots between.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Path(Vec<String>);

impl FromStr for Path {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let steps: Vec<String> = text.split('.').map(str::to_owned).collect();
        if steps.iter().any(String::is_empty) { Err(format!("{text:?} is no path of names")) } else { Ok(Self(steps)) }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("."))
    }
}

impl Path {
    fn of<'a>(&self, whole: &'a Value) -> Option<&'a Value> {
        self.0.iter().try_fold(whole, |value, step| match value {
            Value::Object(fields) => fields.get(step),
            Value::Array(items) => items.get(step.parse::<usize>().ok()?),
            _ => None,
        })
    }
}

impl TryFrom<String> for Stdin {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match (&*text, text.strip_prefix("field:")) {
            ("none", _) => Ok(Stdin::None),
            ("json", _) => Ok(Stdin::Json),
            ("row", _) => Ok(Stdin::Row),
            (_, Some(path)) => path.parse().map(Stdin::Field),
            _ => Err(format!("{text:?} is none of none, json, row, field:<path>")),
        }
    }
}

impl From<Stdin> for String {
    fn from(stdin: Stdin) -> String {
        match stdin {
            Stdin::None => "none".into(),
            Stdin::Json => "json".into(),
            Stdin::Row => "row".into(),
            Stdin::Field(path) => format!("field:{path}"),
        }
    }
}

impl FromStr for Template {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut plain = String::new();
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            plain.push_str(&rest[..at]);
            let brace = &rest[at..=at];
            rest = &rest[at + 1..];
            if let Some(after) = rest.strip_prefix(brace) {
                plain.push_str(brace);
                rest = after;
                continue;
            }
            let place = rest.split_once('}').filter(|_| brace == "{").and_then(|(name, after)| {
                rest = after;
                Place::named(name)
            });
            let Some(place) = place else {
                return Err(format!(
                    "{text:?} has a brace that encloses none of job, user, app, op, attempt, batch, line, input.<path>, \
                     context.<path>; a brace that stands for itself is written twice"
                ));
            };
            parts.push(Part::Text(std::mem::take(&mut plain)));
            parts.push(Part::Place(place));
        }
        parts.push(Part::Text(plain + rest));
        Ok(Self(parts))
    }
}

impl Place {
    fn named(name: &str) -> Option<Self> {
        match name.split_once('.') {
            None => match name {
                "job" => Some(Place::Job),
                "user" => Some(Place::User),
                "app" => Some(Place::App),
                "op" => Some(Place::Op),
                "attempt" => Some(Place::Attempt),
                "batch" => Some(Place::Batch),
                "line" => Some(Place::Line),
                _ => None,
            },
            Some(("input", path)) => path.parse().ok().map(Place::Input),
            Some(("context", path)) => path.parse().ok().map(Place::Context),
            Some(_) => None,
        }
    }
}

impl Template {
    /// Whether nothing is put into it.
    pub fn is_plain(&self) -> bool {
        self.0.iter().all(|part| matches!(part, Part::Text(_)))
    }

    /// Whether the line of a row is put into it.
    pub fn names_line(&self) -> bool {
        self.0.contains(&Part::Place(Place::Line))
    }

    fn fill(&self, values: &Values<'_>) -> Result<String, String> {
        let mut text = String::new();
        for part in &self.0 {
            match part {
                Part::Text(plain) => text.push_str(plain),
                Part::Place(Place::Job) => text.push_str(values.job.as_str()),
                Part::Place(Place::User) => text.push_str(values.user.as_str()),
                Part::Place(Place::App) => text.push_str(values.app.as_str()),
                Part::Place(Place::Op) => text.push_str(values.op.as_str()),
                Part::Place(Place::Attempt) => text.push_str(&values.attempt.to_string()),
                Part::Place(Place::Batch) => text.push_str(values.batch()?.as_str()),
                Part::Place(Place::Line) => text.push_str(&values.line()?.to_string()),
                Part::Place(Place::Input(path)) => text.push_str(&part_of("input", &values.input, path)?),
                Part::Place(Place::Context(path)) => text.push_str(&part_of("context", &values.context, path)?),
            }
        }
        if text.contains('\0') { Err("an argument would have a zero byte".into()) } else { Ok(text) }
    }
}

/// A text as it is, other values as JSON.
fn part_of(what: &str, whole: &Value, path: &Path) -> Result<String, String> {
    match path.of(whole) {
        None | Some(Value::Null) => Err(format!("the {what} has no {path}")),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(value) => Ok(value.to_string()),
    }
}

/// What can be put into arguments, and be read.
struct Values<'a> {
    job: &'a JobId,
    user: &'a User,
    app: &'a App,
    op: &'a Op,
    attempt: u64,
    /// The batch that it belongs to, if it belongs to one.
    batch: Option<&'a JobId>,
    /// Its line there, if it is a row.
    line: Option<u64>,
    input: Value,
    /// The same as it was written.
    input_text: String,
    context: Value,
}

fn text_of(what: &str, payload: &Payload) -> Result<String, String> {
    payload.to_json_line().map_err(|error| format!("the {what} cannot be read as JSON: {error}"))
}

fn value_of(what: &str, text: &str) -> Result<Value, String> {
    // Of a depth that JSON readers refuse.
    serde_json::from_str(text).map_err(|error| format!("the {what} cannot be read as JSON: {error}"))
}

impl<'a> Values<'a> {
    fn of(task: &'a Task) -> Result<Self, String> {
        let input_text = text_of("input", &task.input)?;
        let context = match &task.context {
            Some(context) => value_of("context", &text_of("context", context)?)?,
            None => Value::Null,
        };
        Ok(Self {
            job: &task.job,
            user: &task.user,
            app: &task.app,
            op: &task.op,
            attempt: task.attempt,
            batch: task.row.map(|_| &task.job),
            line: task.row.map(|row| row.line),
            input: value_of("input", &input_text)?,
            input_text,
            context,
        })
    }

    /// The end of a batch is itself what there is to read.
    fn of_end(end: &'a BatchEnd) -> Result<Self, String> {
        let input_text = end.to_json_line()?;
        let input = value_of("end", &input_text)?;
        let context = input.get("context").cloned().unwrap_or_default();
        let BatchEnd { batch, user, app, op, attempt, .. } = end;
        Ok(Self {
            job: batch,
            user,
            app,
            op,
            attempt: *attempt,
            batch: Some(batch),
            line: None,
            input,
            input_text,
            context,
        })
    }

    fn batch(&self) -> Result<&JobId, String> {
        self.batch.ok_or_else(|| "it belongs to no batch".into())
    }

    fn line(&self) -> Result<u64, String> {
        self.line.ok_or_else(|| "it is no row of a batch".into())
    }
}

/// A [`Handler`] that runs a command for each task.
pub struct Command {
    settings: CommandSettings,
    mark_done: Option<Box<Command>>,
}

impl Command {
    /// A command with these settings.
    pub fn new(settings: CommandSettings) -> Self {
        Self { settings, mark_done: None }
    }

    /// The same, and another command that is run when a batch is over.
    #[must_use]
    pub fn telling(self, mark_done: Command) -> Self {
        Self { mark_done: Some(Box::new(mark_done)), ..self }
    }

    fn look(&self) -> Result<(), String> {
        self.settings.recipe.look()?;
        self.mark_done.as_ref().map_or(Ok(()), |command| command.look())
    }

    /// The arguments, and what the process reads.
    fn prepare(&self, values: Values<'_>) -> Result<(Vec<String>, Option<String>), String> {
        let args = self.settings.args.iter().map(|template| template.fill(&values)).collect::<Result<_, _>>()?;
        let stdin = match &self.settings.stdin {
            Stdin::None => None,
            Stdin::Json => Some(values.input_text),
            Stdin::Row => {
                let (batch, line, input) = (values.batch()?, values.line()?, &values.input_text);
                // An id has no character that JSON writes in another way.
                Some(format!("{{\"batch\":\"{batch}\",\"line\":{line},\"input\":{input}}}"))
            }
            Stdin::Field(path) => Some(part_of("input", &values.input, path)?),
        };
        Ok((args, stdin))
    }

    /// What a process that has ended by itself makes of its task.
    fn outcome(&self, end: End, stdout: Kept, stderr: &Said) -> Outcome {
        let settings = &self.settings;
        let code = end.code();
        let within = |codes: &[u8]| code.is_some_and(|code| codes.iter().any(|known| i32::from(*known) == code));
        let reason = || format!("the command {end}{}", stderr.last_words());
        let problem = match code {
            Some(0) => {
                return match stdout.read(settings.output) {
                    Ok(result) => Outcome::Done(Output { result, ..Output::default() }),
                    Err(problem) => Outcome::Failed(*problem),
                };
            }
            // A signal says nothing about the task.
            None => Problem::retry(reason()),
            _ if within(&settings.retry_codes) => Problem::retry(reason()),
            _ if within(&settings.ignore_codes) => Problem::ignore(reason()),
            _ => Problem::fail(reason()),
        };
        Outcome::Failed(Problem { result: stdout.text(), ..problem })
    }

    /// Runs a process to its end.
    async fn run_prepared(
        &self,
        prepared: Result<(Vec<String>, Option<String>), String>,
        desk: &dyn Desk,
        stop: &CancellationToken,
    ) -> Outcome {
        let settings = &self.settings;
        let (args, text) = match prepared {
            Ok(prepared) => prepared,
            Err(reason) => return Outcome::Failed(Problem::fail(reason)),
        };
        let stdin = if text.is_some() { Stdio::piped() } else { Stdio::null() };
        let start = settings.recipe.start(args.iter().map(String::as_str), stdin);
        let Started { mut process, stdin, mut stdout, stderr } = match stop.run_until_cancelled(start).await {
            None => return Outcome::Stopped,
            Some(Ok(started)) => started,
            Some(Err(error)) => {
                let reason = format!("{} cannot be started: {error}", settings.recipe.program);
                if error.raw_os_error() == Some(Errno::E2BIG as i32) {
                    return Outcome::Failed(Problem::fail(reason));
                }
                // Any other fault is this machine's. The task goes back, but would be here again at once.
                let _ = timeout(PAUSE, stop.cancelled()).await;
                return Outcome::NotReady(reason);
            }
        };
        let mut stdin = Outbox::new(stdin);
        stdin.push(text.unwrap_or_default().as_bytes());
        let mut stderr = Said::new(stderr);
        let mut kept = Kept { bytes: Vec::new(), more: 0, max: settings.max_output, closed: false };
        let mut patience = None;
        let end = loop {
            if !stdin.is_pending() {
                stdin.close();
            }
            tokio::select! {
                () = stop.cancelled(), if patience.is_none() => {
                    process.terminate();
                    patience = Some(Instant::now() + settings.kill_grace);
                }
                () = sleep_until(patience.unwrap_or_else(Instant::now)), if patience.is_some() => {
                    process.kill().await;
                    return Outcome::Stopped;
                }
                // It need not read, or not to the end.
                _ = stdin.flush(), if stdin.is_pending() => {}
                () = kept.read_from(&mut stdout), if !kept.closed => {}
                said = stderr.next(), if !stderr.is_closed() => { said.inspect(|said| desk.log(said)); }
                end = process.ended() => break end,
            }
        };
        let rest = async {
            while !kept.closed {
                kept.read_from(&mut stdout).await;
            }
        };
        let _ = timeout(LEFTOVERS, rest).await;
        let rest = async {
            while let Some(said) = stderr.next().await {
                desk.log(&said);
            }
        };
        let _ = timeout(LEFTOVERS, rest).await;
        // Its exit code decides here, too: it may have ended well before it heard of the stop.
        if patience.is_some() && end.code() != Some(0) {
            return Outcome::Stopped;
        }
        self.outcome(end, kept, &stderr)
    }
}

/// The beginning of an output, and how much more there was.
struct Kept {
    bytes: Vec<u8>,
    more: u64,
    max: usize,
    closed: bool,
}

impl Kept {
    /// Reads on. May be dropped while it waits.
    async fn read_from(&mut self, pipe: &mut (impl AsyncRead + Unpin)) {
        let mut chunk = [0; 16 * 1024];
        let read = pipe.read(&mut chunk).await.unwrap_or_default();
        self.closed = read == 0;
        let kept = read.min(self.max - self.bytes.len());
        self.bytes.extend_from_slice(&chunk[..kept]);
        self.more += (read - kept) as u64;
    }

    fn text(&self) -> Option<Payload> {
        let mut text = String::from_utf8_lossy(&self.bytes).into_owned();
        if self.more > 0 {
            text.push_str(&format!("… ({} bytes more)", self.more));
        }
        // A text can always be written.
        if text.is_empty() { None } else { Payload::json(&text).ok() }
    }

    fn read(&self, form: OutputForm) -> Result<Option<Payload>, Box<Problem>> {
        let fail = |reason| Err(Box::new(Problem { result: self.text(), ..Problem::fail(reason) }));
        match form {
            OutputForm::Text => Ok(self.text()),
            OutputForm::Json if self.more > 0 => {
                fail(format!("the command wrote more than {} bytes of JSON", self.max))
            }
            OutputForm::Json => match serde_json::from_slice::<Value>(&self.bytes) {
                Ok(value) => Ok(Payload::json(&value).ok()),
                Err(error) => fail(format!("the command wrote what is no JSON: {error}")),
            },
        }
    }
}

#[async_trait]
impl Handler for Command {
    async fn run(&self, task: Task, desk: Arc<dyn Desk>, stop: CancellationToken) -> Outcome {
        let prepared = Values::of(&task).and_then(|values| self.prepare(values));
        drop(task);
        self.run_prepared(prepared, &*desk, &stop).await
    }

    async fn mark_done(&self, end: BatchEnd, stop: CancellationToken) -> Outcome {
        let Some(command) = &self.mark_done else { return Outcome::Done(Output::default()) };
        let prepared = Values::of_end(&end).and_then(|values| command.prepare(values));
        command.run_prepared(prepared, &NoDesk, &stop).await
    }

    fn stop_grace(&self) -> Duration {
        self.settings.kill_grace + 4 * LEFTOVERS
    }

    /// Looks whether there is such a program at all.
    async fn start(&self) -> Result<(), String> {
        self.look()
    }

    async fn check(&self) -> Result<(), String> {
        self.look()
    }
}
