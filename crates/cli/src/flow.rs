//! `drayman flow`: jobs made of steps, launched from definitions, looked at, stopped and gone on with.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use console::{Common, Failure, Out, complain, one_line};
use queue_core::Store;
use queue_core::flow::{FlowFilter, FlowStatus, FlowView, Flows, FlowsError, LaunchOptions, Launched, StepView};
use queue_core::follow::Move;
use queue_core::ids::{JobId, Pool};
use queue_core::model::chunk::{ItemWriter, RowTarget};
use queue_core::model::flow::{Flow as Definition, StepWork};
use queue_core::overview;
use serde_json::{Map, Value, json};

use crate::cli::{FAILED, NOT_OVER, REFUSED};
use crate::follow::{away, follow};
use crate::list::{show as show_table, table};
use args::{Check, Command, Executions, Flow, How, Launch, List, Restart, Show, Stop, Which};

pub mod args;
mod draw;

/// Longest definition that is read, in bytes.
const DEFINITION_MAX_BYTES: u64 = 1 << 20;
/// How often a drawing is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// Does what is asked for.
pub async fn run(common: &Common, flow: Flow) -> Result<u8, Failure> {
    let mut out = Out::default();
    match flow.command {
        Command::Check(args) => check(common, &args, &mut out).await,
        Command::Launch(args) => launch(common, args, &mut out).await,
        Command::Restart(args) => restart(common, args, &mut out).await,
        Command::Stop(args) => stop(common, &args, &mut out).await,
        Command::Abandon(args) => abandon(common, &args.execution, &mut out).await,
        Command::Executions(args) => executions(common, args, &mut out).await,
        Command::Steps(args) => steps(common, &args.execution, &mut out).await,
        Command::Params(args) => params(common, &args.execution, &mut out).await,
        Command::List(args) => list(common, args, &mut out).await,
        Command::Show(args) => show(common, &args, &mut out).await,
    }
}

async fn connect(common: &Common) -> Result<(Store, Flows), Failure> {
    let (_, store) = common.connect().await?;
    Ok((store.clone(), Flows::new(store)))
}

/// What a call ends with that was not answered as it should be.
fn failure(error: FlowsError) -> Failure {
    let code = match error {
        FlowsError::Redis(error) => return error.into(),
        FlowsError::Flow(_) | FlowsError::InvalidId | FlowsError::LongId { .. } => console::USAGE,
        FlowsError::NotFound(_) => console::NOT_FOUND,
        FlowsError::Running(_)
        | FlowsError::Done(_)
        | FlowsError::Abandoned(_)
        | FlowsError::Over(_)
        | FlowsError::Refused(_)
        | FlowsError::NoRoom { .. } => REFUSED,
        FlowsError::Unreadable { .. } => console::UNREACHABLE,
    };
    Failure::new(code, one_line(&error.to_string()))
}

/// The definition that a file holds.
fn read(path: &Path) -> Result<Definition, Failure> {
    let fault = |fault: &dyn std::fmt::Display| Failure::usage(format!("{}: {fault}", path.display()));
    let bytes = fs::metadata(path).map_err(|error| fault(&error))?.len();
    if bytes > DEFINITION_MAX_BYTES {
        return Err(fault(&format_args!("it has {bytes} bytes, at most {DEFINITION_MAX_BYTES} are allowed")));
    }
    let text = fs::read_to_string(path).map_err(|error| fault(&error))?;
    Definition::from_toml(&text).map_err(|error| fault(&error))
}

/// The pools that a step needs: that of its job, and those of what it hands its items to.
fn pools_of(work: &StepWork) -> Result<Vec<Pool>, Failure> {
    let of_database = |name: &str| Pool::of_database(name).map_err(Failure::usage);
    let mut pools = Vec::new();
    match work {
        StepWork::Sql { database, .. } => pools.push(of_database(database)?),
        StepWork::Task { app, op, .. } | StepWork::Command { app, op, .. } => pools.push(Pool::of_handler(app, op)),
        StepWork::Chunk(work) => {
            let (app, op) = work.handler();
            pools.push(Pool::of_handler(&app, &op));
            match &work.writer {
                ItemWriter::Handler { app, op } => pools.push(Pool::of_handler(app, op)),
                ItemWriter::Rows(rows) => pools.push(match &rows.work {
                    RowTarget::Handler { app, op } => Pool::of_handler(app, op),
                    RowTarget::Sql { database, .. } => of_database(database)?,
                }),
                ItemWriter::List | ItemWriter::Csv { .. } | ItemWriter::JsonLines { .. } | ItemWriter::Sql { .. } => {}
            }
            pools.dedup();
        }
    }
    Ok(pools)
}

async fn check(common: &Common, args: &Check, out: &mut Out) -> Result<u8, Failure> {
    let mut code = console::OK;
    let mut whole = Vec::new();
    for path in &args.files {
        match read(path) {
            Ok(flow) => whole.push((path, flow)),
            Err(failure) => {
                complain(failure.message);
                code = console::USAGE;
            }
        }
    }
    let served = match args.served {
        true => Some(overview::served(&common.connect().await?.1).await?),
        false => None,
    };
    for (path, flow) in whole {
        let mut missing = Vec::new();
        for step in flow.steps() {
            for pool in pools_of(step.work())? {
                if served.as_ref().is_some_and(|served| !served.iter().any(|pattern| pattern.covers(&pool))) {
                    missing.push((step.name(), pool));
                }
            }
        }
        // Of several faults a definition that is none comes first.
        if !missing.is_empty() && code == console::OK {
            code = REFUSED;
        }
        for (step, pool) in &missing {
            complain(format_args!("{}: step {step}: no worker serves {pool}", path.display()));
        }
        if missing.is_empty() {
            match common.json {
                true => out.json(&json!({ "file": path, "flow": flow.name(), "steps": flow.steps().len() })),
                false => {
                    out.line(format_args!("{}: {} with {} steps", path.display(), flow.name(), flow.steps().len()))
                }
            }
        }
    }
    Ok(code)
}

async fn launch(common: &Common, args: Launch, out: &mut Out) -> Result<u8, Failure> {
    // What can't be launched is refused before anything is connected to.
    let flow = read(&args.file)?;
    let mut given: Map<String, Value> = match &args.params_json {
        None => Map::new(),
        Some(text) => serde_json::from_str(text)
            .map_err(|error| Failure::usage(format!("the parameters are no JSON object: {error}")))?,
    };
    for (name, value) in args.params {
        if given.insert(name.clone(), value.into()).is_some() {
            return Err(Failure::usage(format!("parameter {name} is given twice")));
        }
    }
    flow.launch_params(&given).map_err(Failure::usage)?;
    let (store, flows) = connect(common).await?;
    let launched = flows.launch(&flow, &args.user, &given, options(&args.how)).await.map_err(failure)?;
    launched_as(common, &store, &flows, launched, &args.how, out).await
}

async fn restart(common: &Common, args: Restart, out: &mut Out) -> Result<u8, Failure> {
    let (store, flows) = connect(common).await?;
    let launched = flows.restart(&args.execution, options(&args.how)).await.map_err(failure)?;
    launched_as(common, &store, &flows, launched, &args.how, out).await
}

fn options(how: &How) -> LaunchOptions {
    LaunchOptions { id: how.id.clone(), force: how.force, traceparent: None }
}

/// Says what a launch did, and waits for the execution if that is wanted.
async fn launched_as(
    common: &Common,
    store: &Store,
    flows: &Flows,
    launched: Launched,
    how: &How,
    out: &mut Out,
) -> Result<u8, Failure> {
    let id = launched.id().clone();
    if common.json {
        out.json(&match &launched {
            Launched::New { id, goes_on_from } => {
                json!({ "id": id, "result": "launched", "goes_on_from": goes_on_from })
            }
            Launched::Before { id, status } => json!({ "id": id, "result": "already_there", "status": status }),
        });
    } else {
        out.line(&id);
        match &launched {
            Launched::New { goes_on_from: Some(from), .. } => complain(format_args!("goes on from {from}")),
            Launched::New { .. } => {}
            Launched::Before { .. } => complain(format_args!("{id} was launched before, nothing was changed")),
        }
    }
    match how.wait {
        None => Ok(console::OK),
        Some(limit) => {
            let (view, code) = wait(store, flows, &id, limit, common.json).await?;
            match common.json {
                true => out.json(&json!(view)),
                false => complain(summary(&view)),
            }
            Ok(code)
        }
    }
}

/// How an execution stands, in a line.
fn summary(view: &FlowView) -> String {
    match &view.reason {
        Some(reason) => format!("{} {}: {}", view.id, view.status, one_line(reason)),
        None => format!("{} {}", view.id, view.status),
    }
}

/// Waits until an execution has ended, and tells the moves of its steps.
async fn wait(
    store: &Store,
    flows: &Flows,
    id: &JobId,
    limit: Option<Duration>,
    quiet: bool,
) -> Result<(FlowView, u8), Failure> {
    let ended = follow(store, [id.to_string()], limit, |movement| match movement {
        Move::To { id, status, .. } if !quiet => complain(format_args!("{id} {status}")),
        _ => {}
    });
    let ended = ended.await?;
    let view = flows.view(id).await.map_err(failure)?;
    if ended.open > 0 && !view.status.is_over() {
        complain(format_args!("{id} has not ended"));
    }
    let code = match view.status {
        FlowStatus::Done => console::OK,
        status if status.is_over() => FAILED,
        _ => NOT_OVER,
    };
    Ok((view, code))
}

async fn stop(common: &Common, args: &Stop, out: &mut Out) -> Result<u8, Failure> {
    let (store, flows) = connect(common).await?;
    let mut view = flows.stop(&args.execution).await.map_err(failure)?;
    let mut code = console::OK;
    if let (Some(limit), false) = (args.wait, view.status.is_over()) {
        (view, code) = wait(&store, &flows, &args.execution, limit, true).await?;
        // Stopped is what was asked for.
        code = if view.status.is_over() { console::OK } else { code };
    }
    match common.json {
        true => out.json(&json!(view)),
        false => out.line(summary(&view)),
    }
    Ok(code)
}

async fn abandon(common: &Common, id: &JobId, out: &mut Out) -> Result<u8, Failure> {
    let (_, flows) = connect(common).await?;
    let view = flows.abandon(id).await.map_err(failure)?;
    match common.json {
        true => out.json(&json!(view)),
        false => out.line(summary(&view)),
    }
    Ok(console::OK)
}

fn filter(which: &Which, instance: Option<String>) -> Result<FlowFilter, Failure> {
    let Which { flow, user, status, age, since, until, .. } = which;
    if since.zip(*until).is_some_and(|(since, until)| since >= until) {
        return Err(Failure::usage("--until is not after --since"));
    }
    let (flow, user) = (flow.clone(), user.clone());
    Ok(FlowFilter { flow, user, status: *status, instance, age: *age, since: *since, until: *until })
}

async fn executions(common: &Common, args: Executions, out: &mut Out) -> Result<u8, Failure> {
    let filter = filter(&args.which, args.instance)?;
    let (_, flows) = connect(common).await?;
    let limit = args.which.limit;
    let views = flows.list(&filter, limit.saturating_add(1)).await.map_err(failure)?;
    tell(common, &views, limit, out);
    Ok(console::OK)
}

/// The latest execution of each instance.
async fn list(common: &Common, args: List, out: &mut Out) -> Result<u8, Failure> {
    let wanted = filter(&args.which, None)?;
    let (_, flows) = connect(common).await?;
    // What an instance is, its latest execution says: that is chosen first.
    let all = FlowFilter { status: None, age: None, since: None, until: None, ..wanted };
    let views = flows.list(&all, usize::MAX).await.map_err(failure)?;
    let mut seen = HashSet::new();
    let mut latest: Vec<FlowView> = views.into_iter().filter(|view| seen.insert(view.instance.clone())).collect();
    let youngest = args.which.age.map(|age| SystemTime::now().checked_sub(age).unwrap_or(SystemTime::UNIX_EPOCH));
    let since = args.which.since.max(youngest).unwrap_or(SystemTime::UNIX_EPOCH);
    let is_within = |at: SystemTime| at >= since && args.which.until.is_none_or(|until| at < until);
    let launched = |view: &FlowView| humantime::parse_rfc3339(view.created_at.as_deref()?).ok();
    latest.retain(|view| launched(view).is_some_and(is_within));
    latest.retain(|view| args.which.status.is_none_or(|status| view.status == status));
    tell(common, &latest, args.which.limit, out);
    Ok(console::OK)
}

fn tell(common: &Common, views: &[FlowView], limit: usize, out: &mut Out) {
    let shown = &views[..views.len().min(limit)];
    if common.json {
        shown.iter().for_each(|view| out.json(&json!(view)));
    } else {
        let mut rows = table(&["EXECUTION", "FLOW", "USER", "STATUS", "LAUNCHED", "ENDED", "PARAMETERS"]);
        for view in shown {
            let at = |at: &Option<String>| at.clone().unwrap_or_else(|| "-".into());
            let params = view.params.0.iter().map(|(name, given)| format!("{name}={}", plain(&given.value)));
            let params = params.collect::<Vec<_>>().join(" ");
            let cells = [&view.id, &view.flow, &view.user, &view.status.to_string(), &at(&view.created_at)];
            rows.add_row(cells.into_iter().chain([&at(&view.ended_at), &params]).map(|cell| one_line(cell)));
        }
        show_table(&rows, out);
    }
    if views.len() > limit {
        complain(format_args!("there are more than {limit}: see --limit"));
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

async fn steps(common: &Common, id: &JobId, out: &mut Out) -> Result<u8, Failure> {
    let (_, flows) = connect(common).await?;
    let steps = flows.steps(id).await.map_err(failure)?;
    if common.json {
        steps.iter().for_each(|step| out.json(&json!(step)));
        return Ok(console::OK);
    }
    let mut rows = table(&["STEP", "STATUS", "JOB", "STARTED", "ENDED", "TRIES", "ERROR"]);
    for step in &steps {
        let text = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".into());
        let cells = [step.name.clone(), step.status.to_string(), step.job.clone(), text(&step.started_at)];
        let more = [text(&step.ended_at), step.attempts.len().to_string(), text(&step.error)];
        rows.add_row(cells.into_iter().chain(more).map(|cell| one_line(&cell)));
    }
    show_table(&rows, out);
    Ok(console::OK)
}

async fn params(common: &Common, id: &JobId, out: &mut Out) -> Result<u8, Failure> {
    let (_, flows) = connect(common).await?;
    let view = flows.view(id).await.map_err(failure)?;
    if common.json {
        out.json(&json!(view.params));
        return Ok(console::OK);
    }
    let mut rows = table(&["NAME", "TYPE", "VALUE", "IDENTIFYING"]);
    for (name, given) in &view.params.0 {
        let identifying = if given.identifying { "yes" } else { "no" };
        rows.add_row([one_line(name), given.kind.to_string(), one_line(&plain(&given.value)), identifying.into()]);
    }
    show_table(&rows, out);
    Ok(console::OK)
}

async fn show(common: &Common, args: &Show, out: &mut Out) -> Result<u8, Failure> {
    let (_, flows) = connect(common).await?;
    let id = &args.execution;
    let mut shown: Option<(FlowView, Vec<StepView>)> = None;
    let mut away_since = None;
    let mut look = tokio::time::interval(LOOK);
    loop {
        look.tick().await;
        let found = async { Ok((flows.view(id).await?, flows.steps(id).await?)) }.await;
        let found = match found {
            Ok(found) => found,
            Err(FlowsError::Redis(error)) if args.watch => {
                away(&error, &mut away_since)?;
                continue;
            }
            Err(error) => return Err(failure(error)),
        };
        away_since = None;
        let (view, steps) = &found;
        if shown.as_ref() != Some(&found) {
            if common.json {
                out.json(&json!({ "execution": view, "steps": steps }));
            } else {
                if shown.is_some() {
                    out.line("");
                }
                let params = view.params.0.iter().map(|(name, given)| format!("  {name}={}", plain(&given.value)));
                let params = one_line(&params.collect::<String>());
                out.line(format_args!("{} {} {}{params}", one_line(&view.flow), view.id, view.status));
                draw::draw(steps).iter().for_each(|line| out.line(line));
            }
        }
        let is_over = view.status.is_over();
        let is_done = view.status == FlowStatus::Done;
        if out.is_gone() || !args.watch {
            return Ok(console::OK);
        }
        if is_over {
            return Ok(if is_done { console::OK } else { FAILED });
        }
        shown = Some(found);
    }
}
