//! `drayman cron`: jobs that recur.

use console::{Common, Failure, Out, complain, one_line, span};
use queue_core::Error;
use queue_core::calls::SchedulePause;
use queue_core::ids::ScheduleName;
use queue_core::inspect::Inspect;
use queue_core::model::cron::Cron;
use queue_core::schedule::{self, Definition, Put, PutError, Ran, Schedule, Schedules};
use serde_json::{Map, Value, json};

use crate::cli::{CronAdd, CronCommand, REFUSED};
use crate::list::{show as show_table, table};
use crate::submit;

/// How many ticks to come are shown.
const NEXT: usize = 5;

/// Fields of its jobs that may be shown: no SQL, no payload, no connection.
const JOB_SHOWN: [&str; 11] = [
    "kind",
    "app",
    "op",
    "database",
    "timeout",
    "max_attempts",
    "backoff",
    "retry_delay",
    "retry_delay_max",
    "retry_on",
    "idempotent",
];

/// Does what is asked for.
pub async fn run(common: &Common, command: CronCommand) -> Result<u8, Failure> {
    let mut out = Out::default();
    match command {
        CronCommand::Add(args) => add(common, *args, &mut out).await,
        CronCommand::List => list(common, &mut out).await,
        CronCommand::Show(args) => show(common, &args.name, &mut out).await,
        CronCommand::Pause(args) => pause(common, &args.name, true, &mut out).await,
        CronCommand::Resume(args) => pause(common, &args.name, false, &mut out).await,
        CronCommand::Remove(args) => {
            let (_, store) = common.connect().await?;
            match Schedules::new(store).remove(&args.name).await? {
                true => Ok(done(common, &args.name, "removed", &mut out)),
                false => Ok(not_found(&args.name)),
            }
        }
        CronCommand::Run(args) => run_now(common, &args.name, &mut out).await,
    }
}

fn not_found(name: &ScheduleName) -> u8 {
    complain(format_args!("there is no schedule {name}"));
    console::NOT_FOUND
}

fn done(common: &Common, name: &ScheduleName, result: &str, out: &mut Out) -> u8 {
    if common.json {
        out.json(&json!({ "name": name.as_str(), "result": result }));
    } else {
        out.line(format_args!("{name} {result}"));
    }
    console::OK
}

/// What can't be a schedule is refused before anything is connected to.
fn definition(args: &CronAdd) -> Result<Definition, Failure> {
    let of_one_job = [
        (args.job.id.is_some(), "--id: each of its jobs has an id of its own"),
        (args.job.delay.is_some(), "--delay: the expression says when"),
        (args.job.run_at.is_some(), "--run-at: the expression says when"),
        (args.job.deadline.is_some(), "--deadline: one moment can't be that of all its jobs"),
        (args.job.wait.is_some(), "--wait: no job is submitted now"),
        (args.job.replicas.is_some(), "--replicas: no job is submitted now"),
        (args.job.jsonl, "--jsonl: a schedule has one job"),
    ];
    if let Some((_, why)) = of_one_job.iter().find(|(given, _)| *given) {
        return Err(Failure::usage(format!("a recurring job takes no {why}")));
    }
    let cron = Cron::parse(&args.expression, &args.zone).map_err(Failure::usage)?;
    let job = submit::job(&args.job)?.into_submission().map_err(Failure::usage)?;
    let grace = args.grace.unwrap_or(args.missed.default_grace());
    Ok(Definition { cron, missed: args.missed, grace, user: job.user, job: job.fields })
}

async fn add(common: &Common, args: CronAdd, out: &mut Out) -> Result<u8, Failure> {
    let definition = definition(&args)?;
    let (config, store) = common.connect().await?;
    let schedules = Schedules::new(store);
    let result = match schedules.put(&args.name, &definition, &config.limits).await {
        Ok(Put::Created) => "created",
        Ok(Put::Replaced) => "replaced",
        Ok(Put::Same) => "same",
        Err(error @ PutError::TooLarge { .. }) => return Err(Failure::new(REFUSED, error)),
        Err(error @ PutError::Never(_)) => return Err(Failure::usage(error)),
        Err(error @ PutError::Refused(_)) => return Err(Failure::new(console::UNREACHABLE, error)),
        Err(PutError::Failed(error)) => return Err(error.into()),
    };
    let due = schedules.get(&args.name).await?.and_then(|schedule| schedule.due_ms);
    let next = due.map(|tick| definition.cron.local(tick));
    if common.json {
        out.json(&json!({ "name": args.name.as_str(), "result": result, "next": next }));
    } else {
        let what = if result == "same" { "was so already" } else { result };
        out.line(format_args!("{} {what}, next at {}", args.name, next.unwrap_or_default()));
    }
    Ok(console::OK)
}

async fn pause(common: &Common, name: &ScheduleName, pause: bool, out: &mut Out) -> Result<u8, Failure> {
    let (_, store) = common.connect().await?;
    let schedules = Schedules::new(store);
    let paused = if pause { schedules.pause(name).await? } else { schedules.resume(name).await? };
    Ok(match paused {
        SchedulePause::Missing => not_found(name),
        // It stands as asked for in either case.
        SchedulePause::Changed | SchedulePause::Same => {
            done(common, name, if pause { "paused" } else { "resumed" }, out)
        }
    })
}

async fn run_now(common: &Common, name: &ScheduleName, out: &mut Out) -> Result<u8, Failure> {
    let (config, store) = common.connect().await?;
    let id = schedule::id_beside_ticks(name);
    let ran =
        Schedules::new(store).run_now(name, id.clone(), &config.limits).await.map_err(|error: Error| {
            match error.is_outcome_unknown() {
                true => Failure::new(
                    console::UNREACHABLE,
                    format!("whether job {id} was queued is unknown: {error}; ask with `drayman status {id}`"),
                ),
                false => error.into(),
            }
        })?;
    match ran {
        None => Ok(not_found(name)),
        Some(Ran::Refused(why)) => Err(Failure::new(REFUSED, one_line(&why))),
        Some(Ran::Queued) => {
            if common.json {
                out.json(&json!({ "name": name.as_str(), "id": id.as_str(), "result": "queued" }));
            } else {
                out.line(id);
            }
            Ok(console::OK)
        }
    }
}

/// How it stands, in a word.
fn state(schedule: &Schedule) -> &'static str {
    match schedule {
        Schedule { definition: Err(_), .. } => "unreadable",
        Schedule { paused: true, .. } => "paused",
        Schedule { waiting: Some(_), .. } => "waiting",
        _ => "active",
    }
}

/// The next ticks: the one that is due, unless the schedule is paused, and those after it.
fn next(schedule: &Schedule, now_ms: u64) -> Vec<u64> {
    let Ok(Definition { cron, .. }) = &schedule.definition else { return Vec::new() };
    let first = if schedule.paused { cron.after(now_ms) } else { schedule.due_ms };
    std::iter::successors(first, |tick| cron.after(*tick)).take(NEXT).collect()
}

/// A tick on the wall clock of its schedule.
fn local(schedule: &Schedule, tick_ms: u64) -> String {
    match &schedule.definition {
        Ok(definition) => definition.cron.local(tick_ms),
        Err(_) => console::iso(tick_ms),
    }
}

fn as_json(schedule: &Schedule, now_ms: u64) -> Value {
    let tick = |ms: Option<u64>| ms.map(|ms| local(schedule, ms));
    let mut object = Map::new();
    object.insert("name".into(), schedule.name.as_str().into());
    match &schedule.definition {
        Ok(Definition { cron, missed, grace, user, job }) => {
            object.insert("cron".into(), cron.expression().into());
            object.insert("zone".into(), cron.zone().into());
            object.insert("user".into(), user.as_str().into());
            object.insert("missed".into(), missed.to_string().into());
            object.insert("grace_ms".into(), (grace.as_millis() as u64).into());
            let shown = job.iter().filter(|(name, _)| JOB_SHOWN.contains(name));
            let shown = shown.map(|(name, value)| (name.to_owned(), String::from_utf8_lossy(value).into()));
            object.insert("job".into(), Value::Object(shown.collect()));
        }
        Err(why) => {
            object.insert("unreadable".into(), why.as_str().into());
        }
    }
    object.insert("state".into(), state(schedule).into());
    let next: Vec<String> = next(schedule, now_ms).into_iter().map(|ms| local(schedule, ms)).collect();
    object.insert("next".into(), next.into());
    object.insert("waiting".into(), schedule.waiting.clone().into());
    object.insert("last_tick".into(), tick(schedule.last_tick_ms).into());
    object.insert("last_job".into(), schedule.last_job.clone().into());
    object.insert("misses".into(), schedule.misses.into());
    object.insert("last_missed".into(), tick(schedule.last_missed_ms).into());
    object.insert("missed_because".into(), schedule.missed_because.clone().into());
    object.into()
}

async fn list(common: &Common, out: &mut Out) -> Result<u8, Failure> {
    let (_, store) = common.connect().await?;
    let now_ms = Inspect::new(store.clone()).now_ms().await?;
    let schedules = Schedules::new(store).list().await?;
    if common.json {
        schedules.iter().for_each(|schedule| out.json(&as_json(schedule, now_ms)));
        return Ok(console::OK);
    }
    let mut rows = table(&["NAME", "CRON", "ZONE", "USER", "STATE", "NEXT", "LAST", "MISSED"]);
    for schedule in &schedules {
        let definition = schedule.definition.as_ref().ok();
        let text = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        let row = [
            schedule.name.to_string(),
            text(definition.map(|definition| definition.cron.expression().to_owned())),
            text(definition.map(|definition| definition.cron.zone().to_owned())),
            text(definition.map(|definition| definition.user.to_string())),
            state(schedule).to_owned(),
            text(next(schedule, now_ms).first().filter(|_| !schedule.paused).map(|ms| local(schedule, *ms))),
            text(schedule.last_tick_ms.map(|ms| local(schedule, ms))),
            schedule.misses.to_string(),
        ];
        rows.add_row(row.map(|cell| one_line(&cell)));
    }
    show_table(&rows, out);
    Ok(console::OK)
}

async fn show(common: &Common, name: &ScheduleName, out: &mut Out) -> Result<u8, Failure> {
    let (_, store) = common.connect().await?;
    let now_ms = Inspect::new(store.clone()).now_ms().await?;
    let Some(schedule) = Schedules::new(store).get(name).await? else { return Ok(not_found(name)) };
    if common.json {
        out.json(&as_json(&schedule, now_ms));
        return Ok(console::OK);
    }
    let mut line = |name: &str, text: &str| out.line(format_args!("{name:<14}{}", one_line(text)));
    line("schedule", name.as_str());
    match &schedule.definition {
        Ok(Definition { cron, missed, grace, user, job }) => {
            line("cron", cron.expression());
            line("zone", cron.zone());
            line("missed ticks", &format!("{missed}, none older than {}", span(*grace)));
            line("user", user.as_str());
            for (field, value) in job.iter().filter(|(field, _)| JOB_SHOWN.contains(field)) {
                line(field, &String::from_utf8_lossy(value));
            }
        }
        Err(why) => line("unreadable", why),
    }
    line("state", state(&schedule));
    if let Some(why) = &schedule.waiting {
        line("waits for", why);
    }
    for tick in next(&schedule, now_ms) {
        line("next", &local(&schedule, tick));
    }
    if let (Some(tick), Some(job)) = (schedule.last_tick_ms, &schedule.last_job) {
        line("last", &format!("{}, job {job}", local(&schedule, tick)));
    }
    line("misses", &schedule.misses.to_string());
    if let (Some(tick), Some(why)) = (schedule.last_missed_ms, &schedule.missed_because) {
        line("last missed", &format!("{}: {why}", local(&schedule, tick)));
    }
    Ok(console::OK)
}
