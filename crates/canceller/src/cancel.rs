//! Cancelling: what waits at once, what runs by asking its worker, and then looking until it has ended.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use console::{Failure, Out, complain, one_line, span};
use queue_core::cancel::{Cancelled, Canceller};
use queue_core::events::Events;
use queue_core::ids::JobId;
use queue_core::inspect::{Inspect, JobView};
use queue_core::model::Status;
use queue_core::{Error, Store};
use serde_json::{Map, Value, json};

use crate::cli::{Cli, TOO_LATE, UNCONFIRMED};
use crate::select::{PAGE, Selection};
use crate::{confirm, select};

/// Most passes over everything. Each finds what moved while the one before was under way; who still finds jobs after so
/// many is not the faster one.
const PASSES: usize = 50;

/// How long between two looks at the jobs that were asked to stop, at first and at most.
const LOOK_FIRST: Duration = Duration::from_millis(100);
const LOOK_LAST: Duration = Duration::from_secs(2);

/// Stands in place of the status of a job whose hash can't be worked on.
const UNREADABLE: &str = "unreadable";

/// What became of one job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate<'a> {
    /// It waited.
    AtOnce,
    /// It ran, and its record says that it was cancelled.
    WhileRunning,
    /// It runs and is asked to stop.
    Asked,
    /// It was asked to stop and has not ended in time.
    Unconfirmed,
    /// It had ended, or ended otherwise, with this status.
    TooLate(&'a str),
    /// There is no such job.
    NotFound,
}

/// The jobs that were asked to stop: those that run, so never more than the pools' capacities together.
type Asked = HashMap<JobId, Option<JobView>>;

/// Cancels what the command line means.
pub async fn run(cli: Cli) -> Result<u8, Failure> {
    let selects = cli.user.is_some() || cli.pool.is_some() || cli.older_than.is_some() || cli.status.is_some();
    if cli.ids.is_empty() && !selects && !cli.all {
        return Err(Failure::usage("nothing is selected: give ids, selectors or --all"));
    }
    let (config, store) = cli.common.connect().await?;
    let inspect = Inspect::new(store.clone());
    let selection = Selection::of(&cli, inspect.now_ms().await?)?;
    let canceller = Canceller::new(store.clone(), config.retention.finished);
    let mut work = Work { report: Report::new(cli.common.json), asked: Asked::new(), store, inspect, canceller };
    if cli.dry_run {
        return work.list(&selection).await;
    }
    if selection.is_mass() && !cli.yes {
        let count = work.count(&selection).await?;
        if count == 0 {
            return Ok(work.report.code());
        }
        confirm::many(count)?;
    }
    // Heard of before the first is asked to stop, so that nothing is missed. Without events it only takes longer.
    let events = if cli.wait.is_zero() { None } else { work.listen(&selection).await };
    if selection.is_mass() {
        work.cancel_selected(&selection).await?
    } else {
        work.cancel_named(&selection).await?
    }
    if cli.wait.is_zero() {
        work.leave(Fate::Asked);
    } else {
        work.confirm(events, cli.wait).await?;
    }
    work.store.close().await;
    Ok(work.report.code())
}

struct Work {
    store: Store,
    inspect: Inspect,
    canceller: Canceller,
    asked: Asked,
    report: Report,
}

impl Work {
    /// Jobs by their names; `None` for those that there are not.
    async fn named(&self, ids: &[JobId]) -> Result<Vec<Option<JobView>>, Error> {
        let names: Vec<&str> = ids.iter().map(JobId::as_str).collect();
        self.inspect.brief(&names).await
    }

    async fn listen(&self, selection: &Selection) -> Option<Events> {
        let mut users: Vec<String> = match &selection.filter.user {
            Some(user) => vec![user.clone()],
            None => self.named(&selection.ids).await.ok()?.iter().flatten().map(JobView::user).collect(),
        };
        users.sort();
        users.dedup();
        let users: Vec<&str> = users.iter().map(String::as_str).collect();
        Events::listen(&self.store, &users).await.ok()
    }

    async fn list(&mut self, selection: &Selection) -> Result<u8, Failure> {
        let now_ms = self.inspect.now_ms().await?;
        if selection.is_mass() {
            let mut pass = selection.pass(&self.inspect);
            while let Some(views) = pass.next().await? {
                views.iter().for_each(|view| self.report.would(view, now_ms));
            }
            return Ok(self.report.code());
        }
        for ids in selection.ids.chunks(PAGE) {
            for (id, view) in ids.iter().zip(self.named(ids).await?) {
                match view {
                    None => self.report.tell(id, None, Fate::NotFound),
                    Some(view) if !selection.filter.covers(&view) => {}
                    Some(view) if view.is_over() => self.report.tell(id, Some(&view), Fate::TooLate(&view.status())),
                    Some(view) => self.report.would(&view, now_ms),
                }
            }
        }
        Ok(self.report.code())
    }

    async fn count(&self, selection: &Selection) -> Result<usize, Failure> {
        let mut count = 0;
        let mut pass = selection.pass(&self.inspect);
        while let Some(views) = pass.next().await? {
            count += views.len();
        }
        Ok(count)
    }

    async fn cancel_named(&mut self, selection: &Selection) -> Result<(), Failure> {
        for ids in selection.ids.chunks(PAGE) {
            let views = self.named(ids).await?;
            let meant = |view: &Option<JobView>| view.as_ref().is_none_or(|view| selection.filter.covers(view));
            let jobs = ids.iter().cloned().zip(views).filter(|(_, view)| meant(view)).collect();
            self.cancel(jobs).await?;
        }
        Ok(())
    }

    /// Passes over everything until there is nothing left that was not asked to stop.
    async fn cancel_selected(&mut self, selection: &Selection) -> Result<(), Failure> {
        for _ in 0..PASSES {
            let mut acted = false;
            let mut pass = selection.pass(&self.inspect);
            while let Some(views) = pass.next().await? {
                let jobs = views.into_iter().filter_map(|view| Some((JobId::new(view.id.as_str()).ok()?, Some(view))));
                let jobs: Vec<_> = jobs.filter(|(id, _)| !self.asked.contains_key(id)).collect();
                acted |= !jobs.is_empty();
                self.cancel(jobs).await?;
            }
            if !acted {
                return Ok(());
            }
        }
        Err(Failure::new(UNCONFIRMED, "jobs come faster than they are cancelled"))
    }

    async fn cancel(&mut self, jobs: Vec<(JobId, Option<JobView>)>) -> Result<(), Failure> {
        let ids: Vec<JobId> = jobs.iter().map(|(id, _)| id.clone()).collect();
        let results = self.canceller.cancel_many(&ids).await?;
        for ((id, view), result) in jobs.into_iter().zip(results) {
            match result {
                Cancelled::AtOnce => self.report.tell(&id, view.as_ref(), Fate::AtOnce),
                Cancelled::TooLate(status) => self.report.tell(&id, view.as_ref(), Fate::TooLate(&status)),
                Cancelled::NotFound => self.report.tell(&id, None, Fate::NotFound),
                Cancelled::Unreadable => self.report.tell(&id, view.as_ref(), Fate::TooLate(UNREADABLE)),
                Cancelled::Requested => _ = self.asked.insert(id, view),
            }
        }
        Ok(())
    }

    /// Looks at the jobs that were asked to stop until all have ended. A look asks again: that repeats a message that got
    /// lost, and cancels at once what has gone back to its queue because its worker is gone or makes a pause.
    async fn confirm(&mut self, mut events: Option<Events>, limit: Duration) -> Result<(), Failure> {
        let deadline = Instant::now() + limit;
        let mut pause = LOOK_FIRST;
        let mut away: Option<Error> = None;
        while !self.asked.is_empty() && Instant::now() < deadline {
            let until = (Instant::now() + pause).min(deadline);
            if self.hear(&mut events, until).await {
                pause = LOOK_FIRST
            } else {
                pause = (pause * 2).min(LOOK_LAST)
            }
            match self.look().await {
                Ok(()) => away = None,
                Err(error) if error.is_transient() => {
                    if away.is_none() {
                        complain(format_args!("{error}; still trying"));
                    }
                    away = Some(error);
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.leave(Fate::Unconfirmed);
        away.map_or(Ok(()), |error| Err(error.into()))
    }

    /// Waits until an event tells that one of them has ended, or the time has come.
    async fn hear(&self, events: &mut Option<Events>, until: Instant) -> bool {
        let heard = async {
            while let Some(listening) = events {
                let Some(event) = listening.next().await else {
                    *events = None;
                    break;
                };
                let ends = event.status.parse().is_ok_and(Status::is_final);
                let known = JobId::new(event.id).is_ok_and(|id| self.asked.contains_key(&id));
                if ends && known {
                    return;
                }
            }
            std::future::pending().await
        };
        tokio::time::timeout_at(until.into(), heard).await.is_ok()
    }

    async fn look(&mut self) -> Result<(), Error> {
        let ids: Vec<JobId> = self.asked.keys().cloned().collect();
        for ids in ids.chunks(select::PAGE) {
            for (id, result) in ids.iter().zip(self.canceller.cancel_many(ids).await?) {
                let fate = match &result {
                    Cancelled::Requested => continue,
                    Cancelled::AtOnce => Fate::WhileRunning,
                    Cancelled::TooLate(status) if status == Status::Cancelled.as_str() => Fate::WhileRunning,
                    Cancelled::TooLate(status) => Fate::TooLate(status),
                    Cancelled::NotFound => Fate::NotFound,
                    Cancelled::Unreadable => Fate::TooLate(UNREADABLE),
                };
                let view = self.asked.remove(id).flatten();
                self.report.tell(id, view.as_ref(), fate);
            }
        }
        Ok(())
    }

    /// Reports those that have not ended.
    fn leave(&mut self, fate: Fate<'_>) {
        for (id, view) in self.asked.drain() {
            self.report.tell(&id, view.as_ref(), fate);
        }
    }
}

/// Tells what becomes of each job, as it becomes known.
struct Report {
    json: bool,
    out: Out,
    found: usize,
    missing: usize,
    too_late: usize,
    unconfirmed: usize,
}

impl Report {
    fn new(json: bool) -> Self {
        Self { json, out: Out::default(), found: 0, missing: 0, too_late: 0, unconfirmed: 0 }
    }

    fn code(&self) -> u8 {
        if self.unconfirmed > 0 {
            UNCONFIRMED
        } else if self.found == 0 {
            console::NOT_FOUND
        } else if self.too_late + self.missing > 0 {
            TOO_LATE
        } else {
            console::OK
        }
    }

    fn tell(&mut self, id: &JobId, view: Option<&JobView>, fate: Fate<'_>) {
        match fate {
            Fate::NotFound => self.missing += 1,
            _ => self.found += 1,
        }
        self.too_late += usize::from(matches!(fate, Fate::TooLate(_)));
        self.unconfirmed += usize::from(fate == Fate::Unconfirmed);
        let (result, words) = match fate {
            Fate::AtOnce => ("cancelled", "cancelled at once".to_owned()),
            Fate::WhileRunning => ("cancelled", "cancelled while running".to_owned()),
            Fate::Asked => ("asked", "asked to stop, not waited for".to_owned()),
            Fate::Unconfirmed => ("unconfirmed", "asked to stop, not confirmed in time".to_owned()),
            Fate::TooLate(status) => ("too_late", format!("too late: {}", one_line(status))),
            Fate::NotFound => return self.not_found(id),
        };
        if !self.json {
            return self.out.line(format_args!("{id}  {words}"));
        }
        let mut object = describe(id, view);
        object.insert("result".into(), result.into());
        match fate {
            Fate::AtOnce | Fate::WhileRunning => {
                object.insert("was".into(), if fate == Fate::AtOnce { "waiting" } else { "running" }.into());
            }
            Fate::TooLate(status) => _ = object.insert("status".into(), status.into()),
            _ => {}
        }
        self.out.json(&object.into());
    }

    fn not_found(&mut self, id: &JobId) {
        if self.json {
            self.out.json(&json!({ "id": id, "result": "not_found" }));
        } else {
            complain(format_args!("Job with id {id} not found"));
        }
    }

    /// A job that would be cancelled.
    fn would(&mut self, view: &JobView, now_ms: u64) {
        self.found += 1;
        let (user, pool, stand) = (view.user(), view.pool(), view.stand());
        if self.json {
            let created_at = view.text("created_at");
            self.out.json(
                &json!({ "id": view.id, "user": user, "pool": pool, "status": stand, "created_at": created_at, "result": "would_cancel" }),
            );
        } else {
            let age = view.time_ms("created_at").map(|at| Duration::from_millis(now_ms.saturating_sub(at)));
            let age = age.map_or("submitted at an unknown time".into(), |age| format!("submitted {} ago", span(age)));
            let (user, pool) = (one_line(&user), one_line(&pool));
            self.out.line(format_args!("{}  {user}  {pool}  {stand}  {age}", view.id));
        }
    }
}

fn describe(id: &JobId, view: Option<&JobView>) -> Map<String, Value> {
    let mut object = Map::new();
    object.insert("id".into(), id.as_str().into());
    if let Some(view) = view {
        object.insert("user".into(), view.user().into());
        object.insert("pool".into(), view.pool().into());
    }
    object
}
