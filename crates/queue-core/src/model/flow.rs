//! A flow: steps in an order, with parameters. What its definition may say, what a launch may give it, and the jobs that its steps are.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::num::{NonZeroU32, NonZeroUsize};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Number, Value};
use sha2::{Digest, Sha256};

use super::Status;
use super::chunk::{ChunkWork, ItemProcessor, ItemReader, ItemWriter, RowTarget};
use super::retry::{Backoff, RetryChoice};
use super::sql::SqlJob;
use crate::ids::{App, FlowName, IdError, Op, StepName, User};

/// Most steps of a flow.
pub const STEPS_MAX: usize = 200;
/// Most parameters of a flow.
pub const PARAMS_MAX: usize = 100;
/// Most bytes of all parameters of a launch, written as JSON.
pub const PARAMS_MAX_BYTES: usize = 1 << 15;
/// Most bytes of a definition, written as JSON.
pub const DEFINITION_MAX_BYTES: usize = 1 << 18;
/// How long the record of an execution is kept if its definition does not say.
pub const KEEP: Duration = Duration::from_secs(30 * 86_400);

/// The definition of a flow. Made by [`Flow::builder`] or read from TOML; either way it is whole: its steps exist, have different
/// names, and come after each other without a cycle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "FlowText", into = "FlowText")]
pub struct Flow {
    name: FlowName,
    description: Option<String>,
    restartable: bool,
    any_params: bool,
    keep: Option<Duration>,
    params: BTreeMap<String, Param>,
    /// Each behind those that it comes after.
    steps: Vec<Step>,
}

/// A parameter as a definition describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Param {
    /// What its values are.
    #[serde(rename = "type")]
    pub kind: ParamKind,
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Launches that differ in it are of different instances.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub identifying: bool,
    /// Its value where a launch gives none. Without one it must be given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default: Option<Value>,
    /// The only values that it may have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub values: Option<Vec<Value>>,
    /// Its least value; of a number or a date-time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<Value>,
    /// Its greatest value; of a number or a date-time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<Value>,
}

fn yes() -> bool {
    true
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands it over so")]
fn is_yes(yes: &bool) -> bool {
    *yes
}

impl Param {
    /// One of a kind, identifying, without a default.
    pub fn new(kind: ParamKind) -> Self {
        Self { kind, description: None, identifying: true, default: None, values: None, min: None, max: None }
    }
}

/// What the values of a parameter are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ParamKind {
    /// Any text.
    String,
    /// A whole number of 64 bits.
    Integer,
    /// A number.
    Float,
    /// Yes or no.
    Boolean,
    /// A date, or a date and a time, in ISO 8601: `2026-03-01`, `2026-03-01T04:00:00+01:00`.
    DateTime,
}

impl ParamKind {
    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            ParamKind::String => "string",
            ParamKind::Integer => "integer",
            ParamKind::Float => "float",
            ParamKind::Boolean => "boolean",
            ParamKind::DateTime => "date-time",
        }
    }

    /// What a value is that nobody has described: a text in the form of a date-time is one.
    fn of(value: &Value) -> Option<Self> {
        match value {
            Value::Bool(_) => Some(ParamKind::Boolean),
            Value::Number(number) if number.is_i64() => Some(ParamKind::Integer),
            Value::Number(_) => Some(ParamKind::Float),
            Value::String(text) if instant(text).is_some() => Some(ParamKind::DateTime),
            Value::String(_) => Some(ParamKind::String),
            Value::Null | Value::Array(_) | Value::Object(_) => None,
        }
    }

    /// A value of this kind, made of what was given: a text may stand for any of them.
    fn read(self, value: &Value) -> Option<Value> {
        Some(match (self, value) {
            (ParamKind::String, Value::String(_)) | (ParamKind::Boolean, Value::Bool(_)) => value.clone(),
            (ParamKind::String, Value::Number(number)) => number.to_string().into(),
            (ParamKind::Integer, Value::Number(number)) if number.is_i64() => value.clone(),
            (ParamKind::Integer, Value::String(text)) => text.parse::<i64>().ok()?.into(),
            (ParamKind::Float, Value::Number(number)) => Number::from_f64(number.as_f64()?)?.into(),
            (ParamKind::Float, Value::String(text)) => Number::from_f64(text.parse().ok()?)?.into(),
            (ParamKind::Boolean, Value::String(text)) => text.parse::<bool>().ok()?.into(),
            (ParamKind::DateTime, Value::String(text)) => instant(text).map(|_| value.clone())?,
            _ => return None,
        })
    }

    /// How two values of this kind stand to each other.
    fn compare(self, one: &Value, two: &Value) -> Option<std::cmp::Ordering> {
        match self {
            ParamKind::Integer => Some(one.as_i64()?.cmp(&two.as_i64()?)),
            ParamKind::Float => one.as_f64()?.partial_cmp(&two.as_f64()?),
            ParamKind::DateTime => Some(instant(one.as_str()?)?.cmp(&instant(two.as_str()?)?)),
            ParamKind::String | ParamKind::Boolean => None,
        }
    }
}

/// The moment that a text in ISO 8601 names, a date or a date and a time; one without a zone is in UTC.
pub fn moment(text: &str) -> Option<SystemTime> {
    instant(text).map(SystemTime::from)
}

/// The moment that a text in ISO 8601 names; one without a zone is in UTC.
fn instant(text: &str) -> Option<jiff::Timestamp> {
    if let Ok(at) = text.parse::<jiff::Timestamp>() {
        return Some(at);
    }
    // A date-time reads a date, too; but more than either is no moment.
    let at = text.parse::<jiff::civil::DateTime>().ok()?;
    at.to_zoned(jiff::tz::TimeZone::UTC).ok().map(|at| at.timestamp())
}

/// A parameter of a launch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Given {
    /// What it is.
    #[serde(rename = "type")]
    pub kind: ParamKind,
    /// Its value.
    pub value: Value,
    /// Launches that differ in it are of different instances.
    pub identifying: bool,
}

/// The parameters of a launch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Params(pub BTreeMap<String, Given>);

impl Params {
    /// Their values by name.
    pub fn values(&self) -> Map<String, Value> {
        self.0.iter().map(|(name, given)| (name.clone(), given.value.clone())).collect()
    }

    /// What tells the instances of a user's flow apart, as a digest in hex.
    pub fn instance(&self, user: &User, flow: &FlowName) -> String {
        let mut digest = Sha256::new();
        let identifying = self.0.iter().filter(|(_, given)| given.identifying);
        // Texts with their lengths, so that no two lists of them read the same.
        let texts = [user.as_str().to_owned(), flow.to_string()].into_iter();
        for text in texts.chain(
            identifying
                .flat_map(|(name, given)| [name.clone(), given.kind.as_str().to_owned(), given.value.to_string()]),
        ) {
            digest.update((text.len() as u64).to_be_bytes());
            digest.update(text);
        }
        digest.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Which ends of the steps before it a step follows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum On {
    /// All of them that ran are done, and one did.
    #[default]
    Done,
    /// One of them failed. A failure that somebody follows so, and is done, does not fail the flow.
    Failed,
    /// All of them have ended, or were not to run.
    Ended,
}

impl On {
    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            On::Done => "done",
            On::Failed => "failed",
            On::Ended => "ended",
        }
    }
}

/// A step of a flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    name: StepName,
    work: StepWork,
    after: Option<Vec<StepName>>,
    on: On,
    timeout: Option<Duration>,
    retry: RetryChoice,
}

/// What a step does. Its texts may name parameters as `<%= name %>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StepWork {
    /// Runs SQL on a database that the workers' configuration names. Parameters are quoted for the place where they stand.
    Sql {
        /// The database.
        database: String,
        /// SQL text, or JSON of one of the other forms of a SQL job.
        query: String,
        /// Running it twice does no harm.
        idempotent: bool,
    },
    /// Calls a handler, of whatever form.
    Task {
        /// The application.
        app: App,
        /// The operation.
        op: Op,
        /// What the handler gets; all parameters, if not said. A text that is nothing but a parameter becomes its value.
        input: Option<Value>,
    },
    /// Runs a command that a worker's configuration has as a handler: it gets `{"args": […]}`.
    Command {
        /// The application.
        app: App,
        /// The operation.
        op: Op,
        /// Its arguments.
        args: Vec<String>,
    },
    /// Reads, processes and writes items in chunks. Where it writes them as rows, the step is a batch: it ends with them.
    Chunk(Box<ChunkWork>),
}

impl StepWork {
    /// Whether it ends with the rows of a batch.
    pub fn is_batch(&self) -> bool {
        matches!(self, StepWork::Chunk(work) if matches!(work.writer, ItemWriter::Rows(_)))
    }
}

impl Step {
    fn of(name: &str, work: StepWork) -> Result<Self, FlowError> {
        let retry = RetryChoice::default();
        Ok(Self { name: StepName::new(name)?, work, after: None, on: On::Done, timeout: None, retry })
    }

    /// One that runs SQL on a named database.
    pub fn sql(name: &str, database: &str, query: impl Into<String>) -> Result<Self, FlowError> {
        Self::of(name, StepWork::Sql { database: database.into(), query: query.into(), idempotent: false })
    }

    /// One that calls a handler with all parameters.
    pub fn task(name: &str, app: &str, op: &str) -> Result<Self, FlowError> {
        Self::of(name, StepWork::Task { app: App::new(app)?, op: Op::new(op)?, input: None })
    }

    /// One that runs a command with arguments.
    pub fn command(name: &str, app: &str, op: &str, args: &[&str]) -> Result<Self, FlowError> {
        let args = args.iter().map(|arg| (*arg).to_owned()).collect();
        Self::of(name, StepWork::Command { app: App::new(app)?, op: Op::new(op)?, args })
    }

    /// One that works in chunks.
    pub fn chunk(name: &str, work: ChunkWork) -> Result<Self, FlowError> {
        Self::of(name, StepWork::Chunk(Box::new(work)))
    }

    /// One that is a batch: what a reader reads are its rows. The step's time is that of a row, and its retries are theirs.
    pub fn batch(name: &str, reader: ItemReader, to: RowTarget) -> Result<Self, FlowError> {
        Self::chunk(name, ChunkWork::new(reader, ItemWriter::rows(to)))
    }

    /// With what its handler gets.
    pub fn input(mut self, value: Value) -> Self {
        if let StepWork::Task { input, .. } = &mut self.work {
            *input = Some(value);
        }
        self
    }

    /// After these steps, instead of the one before it; after none, it is among the first.
    pub fn after(mut self, names: &[&str]) -> Result<Self, FlowError> {
        self.after = Some(names.iter().map(|name| StepName::new(*name)).collect::<Result<_, _>>()?);
        Ok(self)
    }

    /// On which of their ends.
    pub fn on(self, on: On) -> Self {
        Self { on, ..self }
    }

    /// With how long it may run.
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { timeout: Some(timeout), ..self }
    }

    /// With what becomes of it after an error.
    pub fn retry(self, retry: RetryChoice) -> Self {
        Self { retry, ..self }
    }

    /// Its name.
    pub fn name(&self) -> &StepName {
        &self.name
    }

    /// What it does.
    pub fn work(&self) -> &StepWork {
        &self.work
    }

    /// The steps that it comes after.
    pub fn follows(&self) -> &[StepName] {
        self.after.as_deref().unwrap_or_default()
    }

    /// On which of their ends.
    pub fn follows_on(&self) -> On {
        self.on
    }

    /// How long it may run.
    pub fn may_take(&self) -> Option<Duration> {
        self.timeout
    }

    /// What it says of its retries.
    pub fn retries(&self) -> &RetryChoice {
        &self.retry
    }

    /// The texts of it in which parameters are looked for.
    fn texts(&self) -> Vec<&str> {
        match &self.work {
            StepWork::Sql { query, .. } => vec![query],
            StepWork::Task { input, .. } => {
                let mut texts = Vec::new();
                input.iter().for_each(|input| strings(input, &mut texts));
                texts
            }
            StepWork::Command { args, .. } => args.iter().map(String::as_str).collect(),
            StepWork::Chunk(work) => work.texts(),
        }
    }
}

/// The texts in a value.
pub(super) fn strings<'a>(value: &'a Value, into: &mut Vec<&'a str>) {
    match value {
        Value::String(text) => into.push(text),
        Value::Array(items) => items.iter().for_each(|item| strings(item, into)),
        Value::Object(fields) => fields.values().for_each(|item| strings(item, into)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Builds a flow, step by step.
#[derive(Debug)]
pub struct FlowBuilder {
    flow: Result<Flow, FlowError>,
}

impl FlowBuilder {
    fn with(mut self, change: impl FnOnce(&mut Flow)) -> Self {
        if let Ok(flow) = &mut self.flow {
            change(flow);
        }
        self
    }

    /// With another step: after the one before it, if it does not say otherwise.
    pub fn step(self, step: Result<Step, FlowError>) -> Self {
        match step {
            Ok(step) => self.with(|flow| flow.steps.push(step)),
            Err(error) => Self { flow: self.flow.and(Err(error)) },
        }
    }

    /// With a parameter.
    pub fn param(self, name: &str, param: Param) -> Self {
        self.with(|flow| {
            flow.params.insert(name.to_owned(), param);
        })
    }

    /// Launches may give parameters that nobody has described. They are identifying.
    pub fn any_params(self) -> Self {
        self.with(|flow| flow.any_params = true)
    }

    /// An instance that is done may be launched again.
    pub fn restartable(self) -> Self {
        self.with(|flow| flow.restartable = true)
    }

    /// With how long the records of its executions are kept once they are over: [`KEEP`] if not said.
    pub fn keep(self, keep: Duration) -> Self {
        self.with(|flow| flow.keep = Some(keep))
    }

    /// With a text for people.
    pub fn description(self, text: &str) -> Self {
        self.with(|flow| flow.description = Some(text.to_owned()))
    }

    /// The flow, if all that was said of it goes together.
    pub fn build(self) -> Result<Flow, FlowError> {
        self.flow?.checked()
    }
}

/// What is wrong with a flow or with a launch of one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FlowError {
    /// A name is none.
    #[error(transparent)]
    Name(#[from] IdError),
    /// The text is no definition.
    #[error("{0}")]
    Text(String),
    /// It has no step, or too many.
    #[error("a flow has 1 to {STEPS_MAX} steps, not {0}")]
    Count(usize),
    /// Two steps have one name.
    #[error("two steps are called {0}")]
    Twice(StepName),
    /// A step comes after one that is not there.
    #[error("step {step} comes after {after:?}, which is none of the steps")]
    NoSuchStep {
        /// The step.
        step: StepName,
        /// What it comes after.
        after: String,
    },
    /// Steps come after each other in a circle.
    #[error("steps come after each other in a circle: {0}")]
    Circle(String),
    /// A step names a parameter that nobody has described.
    #[error("step {step} names the parameter {param:?}, which the flow does not have")]
    UnknownParam {
        /// The step.
        step: StepName,
        /// The name.
        param: String,
    },
    /// What is said of a step does not go together.
    #[error("step {step:?}: {reason}")]
    Step {
        /// The step.
        step: String,
        /// What is wrong.
        reason: String,
    },
    /// What is said of a parameter does not go together, or a value does not fit.
    #[error("parameter {name:?} {reason}")]
    Param {
        /// The parameter.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// Something is too large.
    #[error("{what} has {bytes} bytes, at most {most} are allowed")]
    TooLarge {
        /// What.
        what: &'static str,
        /// Its bytes.
        bytes: usize,
        /// How many are allowed.
        most: usize,
    },
}

impl Flow {
    /// Begins to build a flow.
    pub fn builder(name: &str) -> FlowBuilder {
        let flow = FlowName::new(name).map_err(FlowError::from).map(|name| Flow {
            name,
            description: None,
            restartable: false,
            any_params: false,
            keep: None,
            params: BTreeMap::new(),
            steps: Vec::new(),
        });
        FlowBuilder { flow }
    }

    /// Reads a definition in TOML.
    pub fn from_toml(text: &str) -> Result<Self, FlowError> {
        let text: FlowText =
            toml::from_str(text).map_err(|error| FlowError::Text(error.to_string().trim_end().into()))?;
        text.try_into()
    }

    /// Its name.
    pub fn name(&self) -> &FlowName {
        &self.name
    }

    /// A text for people.
    pub fn description(&self) -> Option<&str> {
        self.description.as_deref()
    }

    /// Its steps, each behind those that it comes after.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// The parameters that it describes.
    pub fn params(&self) -> &BTreeMap<String, Param> {
        &self.params
    }

    /// An instance of it that is done may be launched again.
    pub fn is_restartable(&self) -> bool {
        self.restartable
    }

    /// How long the record of an execution is kept once it is over.
    pub fn keeps(&self) -> Duration {
        self.keep.unwrap_or(KEEP)
    }

    /// The same flow, if it is whole, with its steps in an order.
    fn checked(mut self) -> Result<Self, FlowError> {
        if self.steps.is_empty() || self.steps.len() > STEPS_MAX {
            return Err(FlowError::Count(self.steps.len()));
        }
        if self.params.len() > PARAMS_MAX {
            return Err(FlowError::Param {
                name: self.params.keys().nth(PARAMS_MAX).cloned().unwrap_or_default(),
                reason: format!("is one too many: a flow has {PARAMS_MAX} at most"),
            });
        }
        for (name, param) in &self.params {
            check_param(name, param)?;
        }
        let mut names = HashSet::new();
        for step in &self.steps {
            if !names.insert(step.name.clone()) {
                return Err(FlowError::Twice(step.name.clone()));
            }
        }
        let mut before: Option<StepName> = None;
        for step in &mut self.steps {
            step.after.get_or_insert_with(|| before.iter().cloned().collect());
            before = Some(step.name.clone());
            if let Some(after) = step.follows().iter().find(|after| !names.contains(*after)) {
                return Err(FlowError::NoSuchStep { step: step.name.clone(), after: after.to_string() });
            }
            if step.on != On::Done && step.follows().is_empty() {
                return Err(step_fault(&step.name, "it follows no step, so `on` has no meaning"));
            }
        }
        self.steps = in_order(std::mem::take(&mut self.steps))?;
        for step in &self.steps {
            for text in step.texts() {
                for name in named(text) {
                    if !self.any_params && !self.params.contains_key(name) && !is_ours(&step.work, name) {
                        return Err(FlowError::UnknownParam { step: step.name.clone(), param: name.to_owned() });
                    }
                }
            }
            match &step.work {
                StepWork::Sql { database, .. } if !is_database(database) => {
                    return Err(step_fault(&step.name, "its database is no valid name"));
                }
                StepWork::Sql { query, .. } => {
                    SqlJob::parse(query, Status::Pending, None, None, None, None)
                        .map_err(|error| step_fault(&step.name, &error.to_string()))?;
                }
                StepWork::Chunk(work) => {
                    if let Some(fault) = work.fault() {
                        return Err(step_fault(&step.name, &fault));
                    }
                }
                StepWork::Task { .. } | StepWork::Command { .. } => {}
            }
        }
        let bytes = serde_json::to_vec(&self).map_or(0, |text| text.len());
        if bytes > DEFINITION_MAX_BYTES {
            return Err(FlowError::TooLarge { what: "the definition", bytes, most: DEFINITION_MAX_BYTES });
        }
        Ok(self)
    }

    /// The parameters of a launch: what was given, checked, and the defaults of the others.
    pub fn launch_params(&self, given: &Map<String, Value>) -> Result<Params, FlowError> {
        let mut params = BTreeMap::new();
        for (name, value) in given {
            let fault = |reason: String| FlowError::Param { name: name.clone(), reason };
            let taken = match self.params.get(name) {
                Some(param) => {
                    let value =
                        param.kind.read(value).ok_or_else(|| fault(format!("is no {}: {value}", param.kind)))?;
                    Given { kind: param.kind, value, identifying: param.identifying }
                }
                None if self.any_params => {
                    check_name(name)?;
                    let kind = ParamKind::of(value)
                        .ok_or_else(|| fault(format!("is neither a text, a number nor a boolean: {value}")))?;
                    Given { kind, value: value.clone(), identifying: true }
                }
                None => return Err(fault("is none of the flow's".into())),
            };
            params.insert(name.clone(), taken);
        }
        for (name, param) in &self.params {
            let fault = |reason: String| FlowError::Param { name: name.clone(), reason };
            if !params.contains_key(name) {
                let default = param.default.as_ref().ok_or_else(|| fault("is missing".into()))?;
                let value = param.kind.read(default).ok_or_else(|| fault("has a default of another type".into()))?;
                params.insert(name.clone(), Given { kind: param.kind, value, identifying: param.identifying });
            }
            check_value(name, param, &params[name].value)?;
        }
        if params.len() > PARAMS_MAX {
            return Err(FlowError::Text(format!("a launch has {PARAMS_MAX} parameters at most")));
        }
        let params = Params(params);
        let bytes = serde_json::to_vec(&params).map_or(0, |text| text.len());
        match bytes > PARAMS_MAX_BYTES {
            true => Err(FlowError::TooLarge { what: "the parameters", bytes, most: PARAMS_MAX_BYTES }),
            false => Ok(params),
        }
    }
}

impl fmt::Display for ParamKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

fn step_fault(step: &StepName, reason: &str) -> FlowError {
    FlowError::Step { step: step.to_string(), reason: reason.to_owned() }
}

/// Whether a text can be the name of a database.
pub(super) fn is_database(name: &str) -> bool {
    !name.is_empty() && name.len() <= 128 && !name.chars().any(char::is_control)
}

/// Names that SQL knows anyway.
fn is_ours(work: &StepWork, name: &str) -> bool {
    matches!(work, StepWork::Sql { .. } | StepWork::Chunk(_)) && matches!(name, "job_id" | "error_message")
}

fn check_name(name: &str) -> Result<(), FlowError> {
    let fault = |reason: &str| Err(FlowError::Param { name: name.to_owned(), reason: reason.into() });
    let is_word = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    if name.is_empty() || name.len() > 64 || !is_word || name.starts_with(|c: char| c.is_ascii_digit()) {
        return fault("has no valid name: up to 64 letters, digits and _, no digit first");
    }
    if matches!(name, "job_id" | "error_message") {
        return fault("has a name that means something else in SQL");
    }
    Ok(())
}

fn check_param(name: &str, param: &Param) -> Result<(), FlowError> {
    check_name(name)?;
    let fault = |reason: String| Err(FlowError::Param { name: name.to_owned(), reason });
    let bounds = [("min", &param.min), ("max", &param.max)];
    for (what, bound) in bounds {
        let Some(bound) = bound else { continue };
        if matches!(param.kind, ParamKind::String | ParamKind::Boolean) {
            return fault(format!("has a {what}, which a {} does not have", param.kind));
        }
        if param.kind.read(bound).is_none() {
            return fault(format!("has a {what} that is no {}: {bound}", param.kind));
        }
    }
    for value in param.values.iter().flatten() {
        if param.kind.read(value).is_none() {
            return fault(format!("has among its values what is no {}: {value}", param.kind));
        }
    }
    let Some(default) = &param.default else { return Ok(()) };
    let Some(value) = param.kind.read(default) else {
        return fault(format!("has a default that is no {}: {default}", param.kind));
    };
    check_value(name, param, &value)
}

fn check_value(name: &str, param: &Param, value: &Value) -> Result<(), FlowError> {
    let fault = |reason: String| Err(FlowError::Param { name: name.to_owned(), reason });
    if let Some(values) = &param.values
        && !values.iter().any(|allowed| param.kind.read(allowed).as_ref() == Some(value))
    {
        let allowed: Vec<String> = values.iter().map(Value::to_string).collect();
        return fault(format!("is {value}, and may be {}", allowed.join(", ")));
    }
    let beyond = |bound: &Option<Value>, side| {
        let bound = param.kind.read(bound.as_ref()?)?;
        (param.kind.compare(value, &bound)? == side).then_some(bound)
    };
    if let Some(min) = beyond(&param.min, std::cmp::Ordering::Less) {
        return fault(format!("is {value}, less than {min}"));
    }
    if let Some(max) = beyond(&param.max, std::cmp::Ordering::Greater) {
        return fault(format!("is {value}, more than {max}"));
    }
    Ok(())
}

/// Steps, each behind those that it comes after; else as they were.
fn in_order(steps: Vec<Step>) -> Result<Vec<Step>, FlowError> {
    let mut sorted: Vec<Step> = Vec::with_capacity(steps.len());
    let mut there: HashSet<StepName> = HashSet::new();
    let mut left = steps;
    while !left.is_empty() {
        let is_next = |step: &Step| step.follows().iter().all(|after| there.contains(after));
        let Some(at) = left.iter().position(is_next) else {
            return Err(FlowError::Circle(circle(&left)));
        };
        let step = left.remove(at);
        there.insert(step.name.clone());
        sorted.push(step);
    }
    Ok(sorted)
}

/// A circle among steps of which each comes after another.
fn circle(steps: &[Step]) -> String {
    let before: HashMap<&StepName, &StepName> = steps
        .iter()
        .filter_map(|step| {
            let after = step.follows().iter().find(|after| steps.iter().any(|other| other.name == **after))?;
            Some((&step.name, after))
        })
        .collect();
    let mut seen: Vec<&StepName> = Vec::new();
    let mut at = &steps[0].name;
    while !seen.contains(&at) {
        seen.push(at);
        let Some(next) = before.get(at) else { break };
        at = next;
    }
    let from = seen.iter().position(|name| *name == at).unwrap_or(0);
    let names: Vec<&str> = seen[from..].iter().chain([&at]).rev().map(|name| name.as_str()).collect();
    names.join(" → ")
}

/// The place of the first `<%= name %>` in a text, and the name.
fn placeholder(text: &str) -> Option<(std::ops::Range<usize>, &str)> {
    text.match_indices("<%=").find_map(|(at, _)| {
        let inner = &text[at + 3..];
        let length = inner.find("%>")?;
        let name = inner[..length].trim();
        let is_word = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        is_word.then_some((at..at + 3 + length + 2, name))
    })
}

/// The names that a text has places for.
pub(super) fn named(mut text: &str) -> Vec<&str> {
    let mut names = Vec::new();
    while let Some((range, name)) = placeholder(text) {
        names.push(name);
        text = &text[range.end..];
    }
    names
}

/// The text of a value where it stands in another text.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// A text with the values of parameters in their places.
pub(crate) fn fill(text: &str, values: &Map<String, Value>) -> String {
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    while let Some((range, name)) = placeholder(rest) {
        out.push_str(&rest[..range.start]);
        match values.get(name) {
            Some(value) => out.push_str(&plain(value)),
            None => out.push_str(&rest[range.clone()]),
        }
        rest = &rest[range.end..];
    }
    out.push_str(rest);
    out
}

/// The same for every text in a value. One that is nothing but a place becomes what is put there, with its type.
pub(crate) fn filled(value: &Value, values: &Map<String, Value>) -> Value {
    match value {
        Value::String(text) => match placeholder(text) {
            Some((range, name)) if range == (0..text.len()) && values.contains_key(name) => values[name].clone(),
            _ => fill(text, values).into(),
        },
        Value::Array(items) => items.iter().map(|item| filled(item, values)).collect(),
        Value::Object(fields) => fields.iter().map(|(name, item)| (name.clone(), filled(item, values))).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) => value.clone(),
    }
}

/// A definition as it is written.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FlowText {
    name: FlowName,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    description: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    restartable: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    any_params: bool,
    #[serde(default, with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    keep: Option<Duration>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    params: BTreeMap<String, Param>,
    #[serde(default)]
    steps: Vec<StepText>,
}

/// A step as it is written.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StepText {
    name: String,
    kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    after: Option<Vec<String>>,
    #[serde(default)]
    on: On,
    #[serde(default, with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    timeout: Option<Duration>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_attempts: Option<NonZeroU32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    backoff: Option<Backoff>,
    #[serde(default, with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    retry_delay: Option<Duration>,
    #[serde(default, with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    retry_delay_max: Option<Duration>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    database: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    query: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    idempotent: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    app: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    op: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    input: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    args: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reader: Option<ItemReader>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    processor: Option<ItemProcessor>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    writer: Option<ItemWriter>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    chunk_size: Option<NonZeroUsize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    skip_limit: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    item_attempts: Option<NonZeroU32>,
    #[serde(default, with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    item_delay: Option<Duration>,
}

impl TryFrom<FlowText> for Flow {
    type Error = FlowError;
    fn try_from(text: FlowText) -> Result<Self, FlowError> {
        let FlowText { name, description, restartable, any_params, keep, params, steps } = text;
        let steps = steps.into_iter().map(Step::try_from).collect::<Result<_, _>>()?;
        Self { name, description, restartable, any_params, keep, params, steps }.checked()
    }
}

impl From<Flow> for FlowText {
    fn from(flow: Flow) -> Self {
        let Flow { name, description, restartable, any_params, keep, params, steps } = flow;
        let steps = steps.into_iter().map(StepText::from).collect();
        Self { name, description, restartable, any_params, keep, params, steps }
    }
}

impl TryFrom<StepText> for Step {
    type Error = FlowError;
    fn try_from(text: StepText) -> Result<Self, FlowError> {
        let name = StepName::new(text.name.as_str())
            .map_err(|error| FlowError::Step { step: text.name.clone(), reason: error.to_string() })?;
        const CHUNKS: &[&str] = &["chunk", "batch"];
        let said = [
            ("database", text.database.is_some(), &["sql", "batch"][..]),
            ("query", text.query.is_some(), &["sql", "batch"]),
            ("idempotent", text.idempotent.is_some(), &["sql"]),
            ("app", text.app.is_some(), &["task", "command", "batch"]),
            ("op", text.op.is_some(), &["task", "command", "batch"]),
            ("input", text.input.is_some(), &["task"]),
            ("args", text.args.is_some(), &["command"]),
            ("reader", text.reader.is_some(), CHUNKS),
            ("processor", text.processor.is_some(), CHUNKS),
            ("writer", text.writer.is_some(), &["chunk"]),
            ("chunk_size", text.chunk_size.is_some(), CHUNKS),
            ("skip_limit", text.skip_limit.is_some(), CHUNKS),
            ("item_attempts", text.item_attempts.is_some(), CHUNKS),
            ("item_delay", text.item_delay.is_some(), CHUNKS),
        ];
        let kind = text.kind.as_str();
        if !["sql", "task", "command", "chunk", "batch"].contains(&kind) {
            return Err(step_fault(&name, &format!("its kind {kind:?} is none of sql, task, command, chunk, batch")));
        }
        if let Some((field, ..)) = said.iter().find(|(_, is_said, kinds)| *is_said && !kinds.contains(&kind)) {
            return Err(step_fault(&name, &format!("a {kind} step has no `{field}`")));
        }
        let missing = |field: &str| step_fault(&name, &format!("a {kind} step needs `{field}`"));
        let needs = |field: &str, value: Option<String>| value.ok_or_else(|| missing(field));
        let fault = |error: IdError| step_fault(&name, &error.to_string());
        let handler = |app, op| {
            let (app, op) = (needs("app", app)?, needs("op", op)?);
            Ok::<_, FlowError>((App::new(app).map_err(fault)?, Op::new(op).map_err(fault)?))
        };
        let work = match kind {
            "sql" => StepWork::Sql {
                database: needs("database", text.database)?,
                query: needs("query", text.query)?,
                idempotent: text.idempotent.unwrap_or_default(),
            },
            "task" => {
                let (app, op) = handler(text.app, text.op)?;
                StepWork::Task { app, op, input: text.input }
            }
            "chunk" | "batch" => {
                let writer = match (kind, text.writer, text.database, text.app) {
                    ("batch", _, Some(_), Some(_)) => {
                        return Err(step_fault(&name, "its rows are for a handler or for a database, not for both"));
                    }
                    ("batch", _, Some(database), None) => {
                        let statement = needs("query", text.query)?;
                        ItemWriter::rows(RowTarget::Sql { database, statement })
                    }
                    ("batch", _, None, app) => {
                        let (app, op) = handler(app, text.op)?;
                        ItemWriter::rows(RowTarget::Handler { app, op })
                    }
                    (_, Some(ItemWriter::Rows(_)), ..) => {
                        return Err(step_fault(&name, "a step that writes rows is of the kind batch"));
                    }
                    (_, writer, ..) => writer.ok_or_else(|| missing("writer"))?,
                };
                let work = ChunkWork::new(text.reader.ok_or_else(|| missing("reader"))?, writer);
                StepWork::Chunk(Box::new(ChunkWork {
                    processor: text.processor,
                    chunk_size: text.chunk_size.unwrap_or(work.chunk_size),
                    skip_limit: text.skip_limit.unwrap_or(work.skip_limit),
                    item_attempts: text.item_attempts.unwrap_or(work.item_attempts),
                    item_delay: text.item_delay.unwrap_or(work.item_delay),
                    ..work
                }))
            }
            _ => {
                let (app, op) = handler(text.app, text.op)?;
                StepWork::Command { app, op, args: text.args.unwrap_or_default() }
            }
        };
        let after = text.after.map(|names| {
            let name_of = |after: String| {
                let fault = |_| FlowError::NoSuchStep { step: name.clone(), after: after.clone() };
                StepName::new(after.as_str()).map_err(fault)
            };
            names.into_iter().map(name_of).collect::<Result<Vec<_>, _>>()
        });
        let retry = RetryChoice {
            max_attempts: text.max_attempts,
            backoff: text.backoff,
            delay: text.retry_delay,
            delay_max: text.retry_delay_max,
            on: None,
        };
        Ok(Self { after: after.transpose()?, name, work, on: text.on, timeout: text.timeout, retry })
    }
}

impl From<Step> for StepText {
    fn from(step: Step) -> Self {
        let text = StepText {
            name: step.name.to_string(),
            after: step.after.map(|names| names.iter().map(StepName::to_string).collect()),
            on: step.on,
            timeout: step.timeout,
            max_attempts: step.retry.max_attempts,
            backoff: step.retry.backoff,
            retry_delay: step.retry.delay,
            retry_delay_max: step.retry.delay_max,
            ..StepText::default()
        };
        let handler = |kind: &str, app: App, op: Op| StepText {
            kind: kind.into(),
            app: Some(app.into()),
            op: Some(op.into()),
            ..text.clone()
        };
        match step.work {
            StepWork::Sql { database, query, idempotent } => StepText {
                kind: "sql".into(),
                database: Some(database),
                query: Some(query),
                idempotent: Some(idempotent).filter(|idempotent| *idempotent),
                ..text
            },
            StepWork::Task { app, op, input } => StepText { input, ..handler("task", app, op) },
            StepWork::Command { app, op, args } => StepText { args: Some(args), ..handler("command", app, op) },
            StepWork::Chunk(work) => {
                let ChunkWork { reader, processor, writer, chunk_size, skip_limit, item_attempts, item_delay } = *work;
                let text = match writer {
                    ItemWriter::Rows(rows) => match rows.work {
                        RowTarget::Handler { app, op } => handler("batch", app, op),
                        RowTarget::Sql { database, statement } => {
                            StepText { kind: "batch".into(), database: Some(database), query: Some(statement), ..text }
                        }
                    },
                    writer => StepText { kind: "chunk".into(), writer: Some(writer), ..text },
                };
                StepText {
                    reader: Some(reader),
                    processor,
                    chunk_size: Some(chunk_size),
                    skip_limit: Some(skip_limit),
                    item_attempts: Some(item_attempts),
                    item_delay: Some(item_delay),
                    ..text
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::chunk::Condition;
    use super::*;

    fn toml(steps: &str) -> Result<Flow, FlowError> {
        Flow::from_toml(&format!("name = 'f'\n{steps}"))
    }

    fn task(name: &str, more: &str) -> String {
        format!("[[steps]]\nname = '{name}'\nkind = 'task'\napp = 'etl'\nop = '{name}'\n{more}\n")
    }

    const LIST: &str = "writer = { kind = 'list' }";

    fn chunk(file: &str, more: &str) -> String {
        format!("[[steps]]\nname = 'a'\nkind = 'chunk'\nreader = {{ kind = 'csv', file = '{file}' }}\n{more}\n")
    }

    fn batch(more: &str) -> String {
        format!("[[steps]]\nname = 'a'\nkind = 'batch'\nreader = {{ kind = 'list', items = [] }}\n{more}\n")
    }

    fn given(text: &str) -> Map<String, Value> {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn a_definition_says_the_same_in_toml_in_rust_and_in_json() {
        let text = r#"
            name = "nightly"
            description = "of each day"
            restartable = true
            keep = "7days"

            [params.day]
            type = "date-time"
            min = "2020-01-01"
            [params.chunk]
            type = "integer"
            identifying = false
            default = 100

            [[steps]]
            name = "report"
            kind = "command"
            app = "tools"
            op = "report"
            args = ["--day", "<%= day %>"]
            after = ["load"]

            [[steps]]
            name = "extract"
            kind = "sql"
            database = "shop"
            query = "INSERT INTO days VALUES (<%= day %>, <%= job_id %>)"
            timeout = "5m"
            after = []

            [[steps]]
            name = "load"
            kind = "task"
            app = "etl"
            op = "load"
            input = { day = "<%= day %>", note = "<%= chunk %> of <%= day %>" }
            max_attempts = 3
            retry_delay = "2s"

            [[steps]]
            name = "alarm"
            kind = "task"
            app = "etl"
            op = "alarm"
            after = ["extract", "load"]
            on = "failed"

            [[steps]]
            name = "copy"
            kind = "chunk"
            after = []
            chunk_size = 50
            skip_limit = 2
            reader = { kind = "csv", file = "in-<%= day %>.csv" }
            processor = { kind = "filter", keep = [{ field = "state", values = ["paid"] }] }
            writer = { kind = "sql", database = "shop", query = "INSERT INTO t VALUES (:id, <%= day %>)" }

            [[steps]]
            name = "charge"
            kind = "batch"
            app = "billing"
            op = "charge"
            reader = { kind = "json-lines", file = "charges.jsonl" }
        "#;
        let read = Flow::from_toml(text).unwrap();
        let names = |flow: &Flow| flow.steps().iter().map(|step| step.name().to_string()).collect::<Vec<_>>();
        assert_eq!(
            names(&read),
            ["extract", "load", "report", "alarm", "copy", "charge"],
            "each behind what it comes after"
        );
        let input = serde_json::json!({ "day": "<%= day %>", "note": "<%= chunk %> of <%= day %>" });
        let retry = RetryChoice {
            max_attempts: NonZeroU32::new(3),
            delay: Some(Duration::from_secs(2)),
            ..RetryChoice::default()
        };
        let day = Param { min: Some("2020-01-01".into()), ..Param::new(ParamKind::DateTime) };
        let chunk = Param { identifying: false, default: Some(100.into()), ..Param::new(ParamKind::Integer) };
        let copy = ChunkWork::new(
            ItemReader::Csv { file: "in-<%= day %>.csv".into() },
            ItemWriter::Sql { database: "shop".into(), query: "INSERT INTO t VALUES (:id, <%= day %>)".into() },
        );
        let paid = Condition { field: "state".into(), values: Some(vec!["paid".into()]), min: None, max: None };
        let copy = ChunkWork {
            processor: Some(ItemProcessor::Filter { keep: vec![paid] }),
            chunk_size: NonZeroUsize::new(50).unwrap(),
            skip_limit: 2,
            ..copy
        };
        let built = Flow::builder("nightly")
            .description("of each day")
            .restartable()
            .keep(Duration::from_secs(7 * 86_400))
            .param("day", day)
            .param("chunk", chunk)
            .step(
                Step::sql("extract", "shop", "INSERT INTO days VALUES (<%= day %>, <%= job_id %>)")
                    .map(|step| step.timeout(Duration::from_secs(300))),
            )
            .step(Step::task("load", "etl", "load").map(|step| step.input(input).retry(retry)))
            .step(Step::command("report", "tools", "report", &["--day", "<%= day %>"]))
            .step(Step::task("alarm", "etl", "alarm").and_then(|step| step.on(On::Failed).after(&["extract", "load"])))
            .step(Step::chunk("copy", copy).and_then(|step| step.after(&[])))
            .step(Step::batch(
                "charge",
                ItemReader::JsonLines { file: "charges.jsonl".into() },
                RowTarget::Handler { app: App::new("billing").unwrap(), op: Op::new("charge").unwrap() },
            ))
            .build()
            .unwrap();
        assert_eq!(built, read);
        let json = serde_json::to_string(&read).unwrap();
        assert_eq!(serde_json::from_str::<Flow>(&json).unwrap(), read);
    }

    #[test]
    fn what_is_wrong_with_a_definition_is_named() {
        let many: String = (0..=STEPS_MAX).map(|n| task(&format!("s{n}"), "")).collect();
        let faults = [
            (String::new(), "a flow has 1 to 200 steps, not 0"),
            (many, "a flow has 1 to 200 steps, not 201"),
            ("stepz = 1".into(), "unknown field `stepz`"),
            (task("a", "wait = 1"), "unknown field `wait`"),
            (task("a", "") + &task("a", ""), "two steps are called a"),
            (task("a b", ""), "step \"a b\": step has the character ' '"),
            (task("a", "after = ['z']"), "comes after \"z\", which is none of the steps"),
            (task("a", "after = ['c']") + &task("b", "") + &task("c", "after = ['b']"), "in a circle: a → b → c → a"),
            (task("a", "after = ['a']"), "in a circle: a → a"),
            (task("a", "on = 'failed'"), "it follows no step"),
            (task("a", "on = 'sometimes'"), "unknown variant `sometimes`"),
            (task("a", "query = 'x'"), "a task step has no `query`"),
            (task("a", "input = { x = '<%= day %>' }"), "names the parameter \"day\", which the flow does not have"),
            ("[[steps]]\nname = 'a'\nkind = 'sql'\nquery = 'x'".into(), "a sql step needs `database`"),
            ("[[steps]]\nname = 'a'\nkind = 'sql'\nquery = '[]'\ndatabase = 'd'".into(), "step"),
            (
                "[[steps]]\nname = 'a'\nkind = 'dance'".into(),
                "its kind \"dance\" is none of sql, task, command, chunk, batch",
            ),
            (task("a", "chunk_size = 5"), "a task step has no `chunk_size`"),
            (chunk("a.csv", ""), "a chunk step needs `writer`"),
            (chunk("../a.csv", LIST), "no path within the workers' folder"),
            (chunk("/etc/passwd", LIST), "no path within the workers' folder"),
            (chunk("a.csv", "writer = { kind = 'csv', file = 'b.csv', columns = [] }"), "its writer needs `columns`"),
            (
                chunk("a.csv", "writer = { kind = 'csv', file = 'b.csv', columns = ['n', 'm', 'n'] }"),
                "its writer names the column \"n\" twice",
            ),
            (chunk("a.csv", "writer = { kind = 'json-lines', file = 'a.csv' }"), "reads and writes the same file"),
            (chunk("a.csv", "writer = { kind = 'dance' }"), "unknown variant `dance`"),
            (
                chunk("a.csv", "writer = { kind = 'rows', by = 'handler', app = 'a', op = 'b' }"),
                "a step that writes rows is of the kind batch",
            ),
            (batch("app = 'a'"), "a batch step needs `op`"),
            (batch("app = 'a'\nop = 'b'\ndatabase = 'd'"), "for a handler or for a database, not for both"),
            (batch("database = 'd'"), "a batch step needs `query`"),
            (batch("database = 'd'\nquery = 'SELECT <%= job_id %>'"), "its query has a place for a parameter"),
            (chunk("<%= day %>.csv", LIST), "names the parameter \"day\", which the flow does not have"),
            (
                chunk("a.csv", &format!("{LIST}\nprocessor = {{ kind = 'filter', keep = [{{ field = 'x' }}] }}")),
                "its filter says nothing of \"x\"",
            ),
            (
                "params.x = { type = 'integer', default = 'many' }\n".to_owned() + &task("a", ""),
                "default that is no integer",
            ),
            (
                "params.x = { type = 'string', min = 'a' }\n".to_owned() + &task("a", ""),
                "has a min, which a string does not have",
            ),
            (
                "params.x = { type = 'integer', min = 2, default = 1 }\n".to_owned() + &task("a", ""),
                "is 1, less than 2",
            ),
            ("params.job_id = { type = 'string' }\n".to_owned() + &task("a", ""), "means something else in SQL"),
            ("params.1x = { type = 'string' }\n".to_owned() + &task("a", ""), "has no valid name"),
        ];
        for (text, wanted) in faults {
            let error = toml(&text).expect_err(wanted).to_string();
            assert!(error.contains(wanted), "{error:?} does not say {wanted:?}");
        }
    }

    #[test]
    fn a_launch_gives_values_that_fit_and_gets_the_defaults_of_the_others() {
        let flow = toml(
            &(r#"
                params.day = { type = "date-time", min = "2026-01-01" }
                params.count = { type = "integer", default = 5, max = 10 }
                params.rate = { type = "float", identifying = false, default = 1 }
                params.dry = { type = "boolean", default = false }
                params.mode = { type = "string", default = "full", values = ["full", "delta"] }
            "#
            .to_owned()
                + &task("a", "")),
        )
        .unwrap();
        let params = flow.launch_params(&given(r#"{"day": "2026-03-01T04:00:00+01:00", "count": "7"}"#)).unwrap();
        let values = serde_json::to_string(&params.values()).unwrap();
        assert_eq!(values, r#"{"count":7,"day":"2026-03-01T04:00:00+01:00","dry":false,"mode":"full","rate":1.0}"#);
        let text = serde_json::to_string(&params).unwrap();
        assert!(text.contains(r#""day":{"type":"date-time","value":"2026-03-01T04:00:00+01:00","identifying":true}"#));
        let faults = [
            ("{}", r#"parameter "day" is missing"#),
            (r#"{"day": "tomorrow"}"#, r#"parameter "day" is no date-time: "tomorrow""#),
            (r#"{"day": "2025-12-31T23:59:59Z"}"#, "less than"),
            (r#"{"day": "2026-02-01", "count": 11}"#, r#"parameter "count" is 11, more than 10"#),
            (r#"{"day": "2026-02-01", "count": 1.5}"#, "is no integer: 1.5"),
            (r#"{"day": "2026-02-01", "mode": "half"}"#, r#"is "half", and may be "full", "delta""#),
            (r#"{"day": "2026-02-01", "dry": "maybe"}"#, "is no boolean"),
            (r#"{"day": "2026-02-01", "more": 1}"#, r#"parameter "more" is none of the flow's"#),
        ];
        for (text, wanted) in faults {
            let error = flow.launch_params(&given(text)).expect_err(wanted).to_string();
            assert!(error.contains(wanted), "{error:?} does not say {wanted:?}");
        }
        let ann = User::new("ann").unwrap();
        let instance = |text: &str| flow.launch_params(&given(text)).unwrap().instance(&ann, flow.name());
        let one = instance(r#"{"day": "2026-03-01"}"#);
        assert_eq!(one, instance(r#"{"day": "2026-03-01", "rate": 2.5, "count": 5}"#), "it does not identify");
        assert_ne!(one, instance(r#"{"day": "2026-03-02"}"#));
        assert_ne!(
            one,
            flow.launch_params(&given(r#"{"day": "2026-03-01"}"#))
                .unwrap()
                .instance(&User::new("bob").unwrap(), flow.name())
        );
    }

    #[test]
    fn parameters_that_nobody_described_have_the_types_of_their_values() {
        let flow = Flow::builder("f").any_params().step(Step::task("a", "x", "y")).build().unwrap();
        let text =
            r#"{"a": "x", "b": 1, "c": 1.5, "d": true, "e": "2026-03-01", "f": "2026-03-01T10:00:00Z", "g": "2026"}"#;
        let kinds: Vec<_> = flow.launch_params(&given(text)).unwrap().0.into_values().map(|given| given.kind).collect();
        use ParamKind::*;
        assert_eq!(kinds, [String, Integer, Float, Boolean, DateTime, DateTime, String]);
        let error = flow.launch_params(&given(r#"{"a": [1]}"#)).unwrap_err().to_string();
        assert_eq!(error, r#"parameter "a" is neither a text, a number nor a boolean: [1]"#);
    }

    #[test]
    fn a_text_that_is_nothing_but_a_place_becomes_the_value() {
        let values = given(r#"{"n": 5, "day": "2026-03-01", "yes": true}"#);
        let input = serde_json::json!({ "n": "<%= n %>", "t": ["<%=n%> on <%= day %>", "<%= who %>", 7], "<%= n %>": "<%=yes%>" });
        let wanted = serde_json::json!({ "n": 5, "t": ["5 on 2026-03-01", "<%= who %>", 7], "<%= n %>": true });
        assert_eq!(filled(&input, &values), wanted);
    }
}
