//! Launching flows, stopping them, and asking how they stand.
//!
//! An execution of a flow is a job of its own kind that is never claimed. Its steps are ordinary jobs of its user, and the function that
//! ends one queues those that follow it in the same step. So a flow is run by no process of its own, and survives any.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::calls::{Fields, FlowAbandoned, FlowLaunch, FlowLaunched, FlowStep, FlowStopped, Inspected, Span};
use crate::error::Error;
use crate::handle::{JobError, JobHandle};
use crate::ids::{FlowName, IdError, JobId, StepName, User};
use crate::model::Status;
use crate::model::batch::{BATCH_ID_MAX_BYTES, Counts};
use crate::model::chunk::{ChunkInput, ItemWriter};
use crate::model::flow::{Flow, FlowError, On, Params, Step, StepWork, fill, filled};
use crate::model::task::Payload;
use crate::producer::{Database, NewJob, SqlWork, Work};
use crate::store::Store;

/// Longest id of an execution, in bytes: the ids of its steps' jobs are made of it.
pub const EXECUTION_ID_MAX_BYTES: usize = 64;
/// Most executions that a list gives.
pub const LISTED_MAX: usize = 10_000;

/// How a flow is to be launched.
#[derive(Debug, Clone, Default)]
pub struct LaunchOptions {
    /// The id of the execution, of at most [`EXECUTION_ID_MAX_BYTES`] bytes and without a colon; a new one, if not said. A repeated
    /// launch with the same id changes nothing.
    pub id: Option<JobId>,
    /// All steps run, whatever is done; also where the instance is done, or was abandoned.
    pub force: bool,
    /// W3C trace context of whoever launches it.
    pub traceparent: Option<String>,
}

/// What a launch did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Launched {
    /// The execution runs.
    New {
        /// Its id.
        id: JobId,
        /// The execution that it goes on from: what was done there is not repeated.
        goes_on_from: Option<String>,
    },
    /// An execution of this id was launched before; nothing was changed.
    Before {
        /// Its id.
        id: JobId,
        /// How it stands.
        status: Status,
    },
}

impl Launched {
    /// The execution's id.
    pub fn id(&self) -> &JobId {
        match self {
            Launched::New { id, .. } | Launched::Before { id, .. } => id,
        }
    }
}

/// Why something was not done with a flow.
#[derive(Debug, thiserror::Error)]
pub enum FlowsError {
    /// The parameters do not fit the flow.
    #[error(transparent)]
    Flow(#[from] FlowError),
    /// The id can't be that of an execution.
    #[error("an execution's id has at most {EXECUTION_ID_MAX_BYTES} bytes and no colon")]
    InvalidId,
    /// With that of a step it makes an id that is too long for a batch.
    #[error("with the name of step {step}, the execution's id makes the id of a batch of more than {most} bytes")]
    LongId {
        /// The step.
        step: StepName,
        /// How many bytes are allowed.
        most: usize,
    },
    /// There is no such execution, or its record has expired.
    #[error("there is no execution {0} (any more)")]
    NotFound(JobId),
    /// The instance runs: it can't be launched a second time meanwhile.
    #[error("the instance is running as execution {0}; stop it, or wait until it has ended")]
    Running(String),
    /// The instance is done.
    #[error("the instance was done by execution {0}; --force runs all its steps again")]
    Done(String),
    /// The instance's last execution was abandoned.
    #[error("execution {0} of the instance was abandoned; --force runs all its steps again")]
    Abandoned(String),
    /// It has ended.
    #[error("the execution has ended: it is {0}")]
    Over(Status),
    /// The id is taken.
    #[error("{0}")]
    Refused(String),
    /// The server's memory is nearly full.
    #[error("redis uses {used} bytes of memory, and nothing new is accepted above {mark}; try again later")]
    NoRoom {
        /// Bytes that it uses.
        used: u64,
        /// Bytes above which nothing new is accepted.
        mark: u64,
    },
    /// The record does not say what it should.
    #[error("the record of execution {id} can't be read: {reason}")]
    Unreadable {
        /// The execution.
        id: JobId,
        /// What is wrong.
        reason: String,
    },
    /// Redis was not there, or refused.
    #[error(transparent)]
    Redis(#[from] Error),
}

/// How an execution stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FlowStatus {
    /// Its steps run.
    Running,
    /// It is to stop, and waits for the steps that run.
    Stopping,
    /// It ended, and nothing failed that no step took care of.
    Done,
    /// A step failed.
    Failed,
    /// It was stopped, or one of its steps was cancelled.
    Stopped,
    /// It failed or was stopped, and nobody is to go on from there.
    Abandoned,
}

impl FlowStatus {
    /// Every status.
    pub const ALL: [FlowStatus; 6] = [
        FlowStatus::Running,
        FlowStatus::Stopping,
        FlowStatus::Done,
        FlowStatus::Failed,
        FlowStatus::Stopped,
        FlowStatus::Abandoned,
    ];

    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            FlowStatus::Running => "running",
            FlowStatus::Stopping => "stopping",
            FlowStatus::Done => "done",
            FlowStatus::Failed => "failed",
            FlowStatus::Stopped => "stopped",
            FlowStatus::Abandoned => "abandoned",
        }
    }

    /// Whether it has ended.
    pub const fn is_over(self) -> bool {
        !matches!(self, FlowStatus::Running | FlowStatus::Stopping)
    }
}

impl std::fmt::Display for FlowStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// A text that names no status of an execution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no such status: running, stopping, done, failed, stopped or abandoned")]
pub struct NoFlowStatus;

impl std::str::FromStr for FlowStatus {
    type Err = NoFlowStatus;
    fn from_str(text: &str) -> Result<Self, NoFlowStatus> {
        FlowStatus::ALL.into_iter().find(|status| status.as_str() == text).ok_or(NoFlowStatus)
    }
}

/// An execution.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FlowView {
    /// Its id.
    pub id: String,
    /// The flow's name.
    pub flow: String,
    /// Its owner.
    pub user: String,
    /// Its instance: executions with the same are of the same flow, user and identifying parameters.
    pub instance: String,
    /// How it stands.
    pub status: FlowStatus,
    /// Its parameters.
    pub params: Params,
    /// The execution that it went on from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub goes_on_from: Option<String>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// When it was launched, in ISO 8601.
    pub created_at: Option<String>,
    /// When it ended.
    pub ended_at: Option<String>,
}

/// How a step of an execution stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum StepStatus {
    /// What it comes after has not ended.
    Waiting,
    /// It waits for a worker.
    Pending,
    /// It waits for its next attempt.
    Scheduled,
    /// It runs.
    Running,
    /// It ended, and did what it was to do.
    Done,
    /// It ended with an error.
    Failed,
    /// It was cancelled.
    Cancelled,
    /// It was not to run.
    Skipped,
}

impl StepStatus {
    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            StepStatus::Waiting => "waiting",
            StepStatus::Pending => "pending",
            StepStatus::Scheduled => "scheduled",
            StepStatus::Running => "running",
            StepStatus::Done => "done",
            StepStatus::Failed => "failed",
            StepStatus::Cancelled => "cancelled",
            StepStatus::Skipped => "skipped",
        }
    }
}

impl std::fmt::Display for StepStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// A step of an execution.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StepView {
    /// Its name.
    pub name: String,
    /// The id of its job.
    pub job: String,
    /// The steps that it comes after.
    pub after: Vec<String>,
    /// On which of their ends.
    pub on: String,
    /// How it stands.
    pub status: StepStatus,
    /// The execution in which it was done, where that is an earlier one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// When its job was queued, in ISO 8601.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queued_at: Option<String>,
    /// When it was first begun.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<String>,
    /// When it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<String>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The tries that did not end it well, the oldest first: each with when it began and ended, and its error.
    pub attempts: Vec<Value>,
    /// What its handler says of how far it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<String>,
    /// Of a batch that has ended, what became of its rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rows: Option<Counts>,
    /// What its handler saved last: of one that works in chunks its counts, and what it passed over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<Value>,
}

/// Which executions to list.
#[derive(Debug, Clone, Default)]
pub struct FlowFilter {
    /// Of this flow.
    pub flow: Option<FlowName>,
    /// Of this user.
    pub user: Option<User>,
    /// In this status.
    pub status: Option<FlowStatus>,
    /// Of this instance.
    pub instance: Option<String>,
    /// Launched within this time.
    pub age: Option<Duration>,
    /// Launched then or later.
    pub since: Option<SystemTime>,
    /// Launched before.
    pub until: Option<SystemTime>,
}

impl FlowFilter {
    fn allows(&self, view: &FlowView) -> bool {
        self.flow.as_ref().is_none_or(|flow| view.flow == flow.as_str())
            && self.user.as_ref().is_none_or(|user| view.user == user.as_str())
            && self.status.is_none_or(|status| view.status == status)
            && self.instance.as_ref().is_none_or(|instance| view.instance == *instance)
    }
}

/// Launches flows and answers for them. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Flows {
    store: Store,
}

const VIEW: &[(&str, usize)] = &[
    ("kind", 16),
    ("name", 64),
    ("user", 128),
    ("instance", 64),
    ("status", 32),
    ("params", 1 << 16),
    ("goes_on_from", 128),
    ("failed_reason", 1 << 16),
    ("created_at", 64),
    ("ended_at", 64),
    ("stop_requested_at", 64),
    ("abandoned_at", 64),
];

impl Flows {
    /// On a connection.
    pub fn new(store: Store) -> Self {
        Self { store }
    }

    /// The connection.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Launches a flow for a user. The instance is made of user, flow and identifying parameters: where its last execution failed or
    /// was stopped, this one goes on from there. One that runs, is done or was abandoned is refused.
    pub async fn launch(
        &self,
        flow: &Flow,
        user: &User,
        given: &Map<String, Value>,
        options: LaunchOptions,
    ) -> Result<Launched, FlowsError> {
        let params = flow.launch_params(given)?;
        let id = options.id.unwrap_or_else(JobId::generate);
        if id.as_str().len() > EXECUTION_ID_MAX_BYTES || id.as_str().contains(':') {
            return Err(FlowsError::InvalidId);
        }
        let is_long = |step: &&Step| rows_of(&id, step.name().as_str()).len() > BATCH_ID_MAX_BYTES;
        if let Some(step) = flow.steps().iter().filter(|step| step.work().is_batch()).find(is_long) {
            let step = step.name().clone();
            return Err(FlowsError::LongId { step, most: BATCH_ID_MAX_BYTES });
        }
        let jobs = flow.steps().iter().map(|step| job_of(step, user, &params, options.traceparent.as_ref()));
        let json = |value: Result<String, serde_json::Error>| value.expect("texts, numbers and lists can be written");
        let launch = FlowLaunch {
            instance: params.instance(user, flow.name()),
            id: id.clone(),
            user: user.clone(),
            force: options.force,
            may_repeat: flow.is_restartable(),
            fields: Fields::new()
                .with("name", flow.name().as_str())
                .with("params", json(serde_json::to_string(&params)))
                .with("definition", json(serde_json::to_string(flow)))
                .with("keep", flow.keeps().as_millis().max(1).to_string())
                .with_some("traceparent", options.traceparent.as_ref()),
            plan: plan_of(flow),
            jobs: jobs.collect::<Result<_, _>>()?,
        };
        match self.store.flow_launch(&launch).await? {
            FlowLaunched::Launched(goes_on_from) => Ok(Launched::New { id, goes_on_from }),
            FlowLaunched::Exists(status) => Ok(Launched::Before { id, status }),
            FlowLaunched::Running(id) => Err(FlowsError::Running(id)),
            FlowLaunched::Done(id) => Err(FlowsError::Done(id)),
            FlowLaunched::Abandoned(id) => Err(FlowsError::Abandoned(id)),
            FlowLaunched::Refused(reason) => Err(FlowsError::Refused(reason)),
            FlowLaunched::NoRoom { used, mark } => Err(FlowsError::NoRoom { used, mark }),
        }
    }

    /// Launches the instance of an execution again, as it was defined then.
    pub async fn restart(&self, id: &JobId, options: LaunchOptions) -> Result<Launched, FlowsError> {
        let (flow, view) = (self.definition(id).await?, self.view(id).await?);
        let unreadable = |reason: String| FlowsError::Unreadable { id: id.clone(), reason };
        let user = User::new(view.user.clone()).map_err(|error| unreadable(error.to_string()))?;
        self.launch(&flow, &user, &view.params.values(), options).await
    }

    /// Stops an execution: steps that run come to their ends, no other is begun. A cancel by its id stops those that run, too.
    pub async fn stop(&self, id: &JobId) -> Result<FlowView, FlowsError> {
        match self.store.flow_stop(id).await? {
            FlowStopped::Now | FlowStopped::Asked => self.view(id).await,
            FlowStopped::Over(status) => Err(FlowsError::Over(status)),
            FlowStopped::Missing => Err(FlowsError::NotFound(id.clone())),
        }
    }

    /// Abandons an execution that failed or was stopped: no launch of its instance goes on from it.
    pub async fn abandon(&self, id: &JobId) -> Result<FlowView, FlowsError> {
        match self.store.flow_abandon(id).await? {
            FlowAbandoned::Now => self.view(id).await,
            FlowAbandoned::Running => Err(FlowsError::Running(id.to_string())),
            FlowAbandoned::Done => Err(FlowsError::Over(Status::Done)),
            FlowAbandoned::Missing => Err(FlowsError::NotFound(id.clone())),
        }
    }

    /// How an execution stands.
    pub async fn view(&self, id: &JobId) -> Result<FlowView, FlowsError> {
        let found = self.store.inspect(VIEW, [id.as_str()]).await?.pop();
        found.and_then(|found| view_of(id.as_str(), &found)).ok_or_else(|| FlowsError::NotFound(id.clone()))
    }

    /// The flow as it was when an execution was launched.
    pub async fn definition(&self, id: &JobId) -> Result<Flow, FlowsError> {
        const FIELDS: &[(&str, usize)] = &[("kind", 16), ("definition", 1 << 19)];
        let found = self.store.inspect(FIELDS, [id.as_str()]).await?.pop();
        let not_found = || FlowsError::NotFound(id.clone());
        let Some(found) = found.filter(|found| found.text(FIELDS, "kind").as_deref() == Some("flow")) else {
            return Err(not_found());
        };
        let text = found.text(FIELDS, "definition").ok_or_else(not_found)?;
        serde_json::from_str(&text)
            .map_err(|error| FlowsError::Unreadable { id: id.clone(), reason: error.to_string() })
    }

    /// The steps of an execution, each behind those that it comes after.
    pub async fn steps(&self, id: &JobId) -> Result<Vec<StepView>, FlowsError> {
        let steps = self.store.flow_read(id).await?.ok_or_else(|| FlowsError::NotFound(id.clone()))?;
        let names: Vec<String> = steps.iter().map(|step| step.name.clone()).collect();
        Ok(steps.into_iter().map(|step| step_view(id, &names, step)).collect())
    }

    /// Waits until an execution has ended, however it ends. With a limit it gives up after that time and tells how it stands then.
    pub async fn wait(&self, id: &JobId, limit: Option<Duration>) -> Result<FlowView, FlowsError> {
        match JobHandle::new(self.store.clone(), id.clone()).wait(limit).await {
            Ok(_) | Err(JobError::NotOver(_)) => self.view(id).await,
            Err(JobError::Redis(error)) => Err(error.into()),
            Err(_) => Err(FlowsError::NotFound(id.clone())),
        }
    }

    /// The executions that a filter finds, the latest first, at most so many.
    pub async fn list(&self, filter: &FlowFilter, most: usize) -> Result<Vec<FlowView>, FlowsError> {
        let view = |id: &str, found: &Inspected| view_of(id, found).filter(|view| filter.allows(view));
        let index = self.store.keys().flows();
        let span = Span { age: filter.age, since: filter.since, until: filter.until };
        Ok(self.store.newest(&index, span, most.min(LISTED_MAX), VIEW, view).await?)
    }
}

/// The names of the steps, the numbers of those that each comes after, on which end, and which are batches.
fn plan_of(flow: &Flow) -> Vec<u8> {
    let number = |name: &StepName| flow.steps().iter().position(|step| step.name() == name).map(|at| at + 1);
    let plan: Vec<(&str, Vec<usize>, &str, &str)> = flow
        .steps()
        .iter()
        .map(|step| {
            let after = step.follows().iter().filter_map(number).collect();
            let kind = if step.work().is_batch() { "batch" } else { "" };
            (step.name().as_str(), after, step.follows_on().as_str(), kind)
        })
        .collect();
    rmp_serde::to_vec(&plan).expect("texts and numbers can be packed")
}

fn rows_of(execution: &JobId, step: &str) -> String {
    format!("{execution}:{step}:rows")
}

/// The id of the batch that the job of a step loads.
pub fn rows_of_job(job: &JobId) -> Result<JobId, IdError> {
    JobId::new(format!("{job}:rows"))
}

/// What the job of a step says.
fn job_of(step: &Step, user: &User, params: &Params, traceparent: Option<&String>) -> Result<Fields, FlowError> {
    let fault = |reason: String| FlowError::Step { step: step.name().to_string(), reason };
    let values = params.values();
    let task = |app: &crate::ids::App, op: &crate::ids::Op, input: &Value| {
        let input = Payload::json(input).map_err(|error| fault(error.to_string()))?;
        Ok::<_, FlowError>(NewJob::task(user.clone(), app.clone(), op.clone(), input))
    };
    let mut more = Fields::new();
    let job = match step.work() {
        StepWork::Sql { database, query, idempotent } => {
            let database = Database::Named(database.clone());
            let (query, idempotent) = (query.clone(), *idempotent);
            let work = SqlWork { query, onsuccess: None, onerror: None, database, idempotent };
            // The worker puts them where they belong: how they are quoted is a matter of the database.
            more = more.with("params", Value::Object(values).to_string());
            NewJob::of(user.clone(), Work::Sql(work))
        }
        StepWork::Task { app, op, input: Some(input) } => task(app, op, &filled(input, &values))?,
        StepWork::Task { app, op, input: None } => task(app, op, &Value::Object(values))?,
        StepWork::Command { app, op, args } => {
            let args: Vec<String> = args.iter().map(|arg| fill(arg, &values)).collect();
            task(app, op, &serde_json::json!({ "args": args }))?
        }
        StepWork::Chunk(work) => {
            let (app, op) = work.handler();
            more = more.with("chunk", "1");
            let mut work = work.filled(&values).map_err(fault)?;
            if let ItemWriter::Rows(rows) = &mut work.writer {
                // What is said of the step is said of each row.
                (rows.row_timeout, rows.retry) = (step.may_take(), step.retries().clone());
            }
            let input = ChunkInput { work, params: values };
            task(&app, &op, &serde_json::to_value(input).map_err(|error| fault(error.to_string()))?)?
        }
    };
    let timeout = step.may_take().filter(|_| !step.work().is_batch());
    let job = NewJob { timeout, retry: step.retries().clone(), traceparent: traceparent.cloned(), ..job };
    let submission = job.into_submission().map_err(|error| fault(error.to_string()))?;
    Ok(submission.fields.and(more))
}

fn view_of(id: &str, found: &Inspected) -> Option<FlowView> {
    let text = |name: &str| found.text(VIEW, name);
    if text("kind")? != "flow" {
        return None;
    }
    let is_set = |name| text(name).is_some();
    let status = match text("status")?.parse::<Status>().ok()? {
        Status::Done => FlowStatus::Done,
        _ if is_set("abandoned_at") => FlowStatus::Abandoned,
        Status::Cancelled => FlowStatus::Stopped,
        status if status.is_final() => FlowStatus::Failed,
        _ if is_set("stop_requested_at") => FlowStatus::Stopping,
        _ => FlowStatus::Running,
    };
    Some(FlowView {
        id: id.to_owned(),
        flow: text("name").unwrap_or_default(),
        user: text("user").unwrap_or_default(),
        instance: text("instance").unwrap_or_default(),
        status,
        params: text("params").and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default(),
        goes_on_from: text("goes_on_from"),
        reason: text("failed_reason"),
        created_at: text("created_at"),
        ended_at: text("ended_at"),
    })
}

/// What is written of a step, see `flow.lua`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Facts {
    queued_at: Option<String>,
    started_at: Option<String>,
    ended_at: Option<String>,
    error: Option<String>,
    history: Option<String>,
    from: Option<String>,
    rows: Option<String>,
    done: Option<String>,
    skipped: Option<String>,
    failed: Option<String>,
    aborted: Option<String>,
    /// To go on from, or for people alone.
    checkpoint: Option<String>,
    saved: Option<String>,
}

fn step_view(flow: &JobId, names: &[String], step: FlowStep) -> StepView {
    let facts: Facts = serde_json::from_str(&step.facts).unwrap_or_default();
    let status = match (step.state.as_str(), step.status.as_str()) {
        ("queued", _) if step.claimed => StepStatus::Running,
        ("queued", "scheduled") => StepStatus::Scheduled,
        ("queued", _) => StepStatus::Pending,
        ("done", _) => StepStatus::Done,
        ("failed", _) => StepStatus::Failed,
        ("cancelled", _) => StepStatus::Cancelled,
        ("skipped", _) => StepStatus::Skipped,
        _ => StepStatus::Waiting,
    };
    let said = |text: String| Some(text).filter(|text| !text.is_empty());
    let number = |text: &Option<String>| text.as_ref().and_then(|text| text.parse().ok());
    let rows = number(&facts.rows).map(|rows| {
        let [done, skipped, failed, aborted] =
            [&facts.done, &facts.skipped, &facts.failed, &facts.aborted].map(|text| number(text).unwrap_or(0));
        Counts { rows, pending: 0, done, skipped, failed, aborted }
    });
    let history = facts.history.unwrap_or(step.history);
    StepView {
        job: format!("{}:{}", facts.from.as_deref().unwrap_or(flow.as_str()), step.name),
        after: step.after.iter().filter_map(|number| names.get(number.checked_sub(1)?).cloned()).collect(),
        on: if step.on.is_empty() { On::Done.as_str().into() } else { step.on },
        status,
        from: facts.from,
        queued_at: facts.queued_at,
        started_at: facts.started_at.or(said(step.started_at)),
        ended_at: facts.ended_at,
        error: facts.error,
        attempts: history.lines().filter_map(|line| serde_json::from_str(line).ok()).collect(),
        progress: said(step.progress),
        rows,
        checkpoint: facts
            .saved
            .or(facts.checkpoint)
            .or(said(step.checkpoint))
            .and_then(|saved| serde_json::from_str(&saved).ok()),
        name: step.name,
    }
}
