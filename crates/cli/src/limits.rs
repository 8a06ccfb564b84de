//! `drayman limits`, `drayman pause` and `drayman resume`: what limits users and pools, and what nothing starts of.

use std::time::Duration;

use comfy_table::Table;
use console::{Common, Failure, Out, complain, iso, one_line, span};
use queue_core::Error;
use queue_core::limits::{InForce, Limits, OfPool, OfUser, Set, View, Whose};
use serde_json::json;

use crate::cli::{LimitsArgs, PauseArgs, REFUSED, ResumeArgs, Target};
use crate::list::{show, table};

/// Changes limits if told to, and shows them.
pub async fn run(common: &Common, args: LimitsArgs) -> Result<u8, Failure> {
    let (_, store) = common.connect().await?;
    let limits = Limits::new(store);
    let mut out = Out::default();
    if let Some(user) = &args.user {
        let change = match args.clear {
            true => OfUser { weight: Set::Clear, concurrency: Set::Clear, rate: Set::Clear, timeout: Set::Clear },
            false => OfUser {
                weight: args.weight.unwrap_or_default(),
                concurrency: args.concurrency.unwrap_or_default(),
                rate: args.rate.unwrap_or_default(),
                timeout: args.timeout.unwrap_or_default(),
            },
        };
        if change != OfUser::default() {
            limits.set_user(user, change).await.map_err(refused)?;
        }
        let users = vec![limits.user(user).await?];
        tell(&InForce { users, ..InForce::default() }, common.json, &mut out);
    } else if let Some(pool) = &args.pool {
        let change = match args.clear {
            true => OfPool { weight: Set::Clear, concurrency: Set::Clear, rate: Set::Clear, per_user: Set::Clear },
            false => OfPool {
                weight: args.weight.unwrap_or_default(),
                concurrency: args.concurrency.unwrap_or_default(),
                rate: args.rate.unwrap_or_default(),
                per_user: args.per_user.unwrap_or_default(),
            },
        };
        if change != OfPool::default() {
            limits.set_pool(pool, change).await.map_err(refused)?;
        }
        let pools = vec![limits.pool(pool).await?];
        tell(&InForce { pools, ..InForce::default() }, common.json, &mut out);
    } else {
        tell(&limits.all().await?, common.json, &mut out);
    }
    Ok(console::OK)
}

/// Starts nothing more of something.
pub async fn pause(common: &Common, args: PauseArgs) -> Result<u8, Failure> {
    let (_, store) = common.connect().await?;
    let limits = Limits::new(store);
    limits.pause(&whose(&args.target), &args.reason).await.map_err(refused)?;
    tell(&limits.all().await?, common.json, &mut Out::default());
    Ok(console::OK)
}

/// Ends a pause.
pub async fn resume(common: &Common, args: ResumeArgs) -> Result<u8, Failure> {
    let (_, store) = common.connect().await?;
    let limits = Limits::new(store);
    limits.resume(&whose(&args.target)).await.map_err(refused)?;
    tell(&limits.all().await?, common.json, &mut Out::default());
    Ok(console::OK)
}

fn whose(target: &Target) -> Whose {
    match (&target.user, &target.pool) {
        (Some(user), _) => Whose::User(user.clone()),
        (_, Some(pool)) => Whose::Pool(pool.clone()),
        // The command line has one of the three.
        (None, None) => Whose::All,
    }
}

fn refused(error: Error) -> Failure {
    match error {
        Error::Request(why) => Failure::new(REFUSED, why),
        error => error.into(),
    }
}

fn tell(in_force: &InForce, as_json: bool, out: &mut Out) {
    let views = || in_force.users.iter().chain(&in_force.pools);
    if as_json {
        if let Some(paused) = &in_force.paused {
            out.json(&json!({ "kind": "all", "paused": paused }));
        }
        views().for_each(|view| out.json(&json!(view)));
        return;
    }
    if let Some(pause) = &in_force.paused {
        out.line(one_line(&format!("all is {pause}")));
    }
    if views().next().is_some() {
        let mut table = table(&["OF", "NAME", "WEIGHT", "RUNNING", "STARTS", "TIMEOUT", "PER USER", "NOW"]);
        views().for_each(|view| add(&mut table, view));
        show(&table, out);
    }
    for view in views().filter(|view| !view.ignored.is_empty()) {
        let ignored = view.ignored.join(", ");
        complain(format_args!(
            "of {} {} counts for nothing, for it is no valid number: {ignored}",
            view.kind, view.name
        ));
    }
}

fn add(table: &mut Table, view: &View) {
    let text = |number: Option<u64>| number.map_or("-".into(), |number| number.to_string());
    let time = |ms: Option<u64>| ms.map_or("-".into(), |ms| span(Duration::from_millis(ms)));
    let running = view.concurrency.map_or(view.running.to_string(), |most| format!("{} of {most}", view.running));
    let starts = match (view.rate, view.period_ms) {
        (Some(most), period) => format!("{} of {most} in {}", view.starts, time(period)),
        _ => "-".into(),
    };
    table.add_row(
        [
            view.kind.to_owned(),
            view.name.clone(),
            view.weight.unwrap_or(1.0).to_string(),
            running,
            starts,
            time(view.timeout_ms),
            text(view.per_user),
            now(view),
        ]
        .map(|cell| one_line(&cell)),
    );
}

/// What keeps it from its turn now, in words.
pub fn now(view: &View) -> String {
    match (view.kept_by.as_deref(), &view.paused, view.kept_until_ms) {
        (Some("paused"), Some(pause), _) => pause.to_string(),
        (Some("concurrency"), ..) => "runs as many as it may".into(),
        (Some("rate"), _, Some(until)) => format!("may start the next at {}", iso(until)),
        _ => "may start more".into(),
    }
}
