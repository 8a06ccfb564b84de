//! Which jobs are meant.

use console::Failure;
use queue_core::Error;
use queue_core::ids::JobId;
use queue_core::inspect::{Filter, Inspect, JobView, Kind, Place, Walk};
use queue_core::model::Status;

use crate::cli::Cli;

/// Most jobs that are looked at at once.
pub const PAGE: usize = 200;

/// The jobs that the command line means.
#[derive(Debug)]
pub struct Selection {
    /// The ids that it names.
    pub ids: Vec<JobId>,
    /// What else must be true.
    pub filter: Filter,
}

impl Selection {
    /// Reads the command line; `now_ms` is the server's time.
    pub fn of(cli: &Cli, now_ms: u64) -> Result<Self, Failure> {
        let ids: Result<Vec<JobId>, _> = cli.ids.iter().map(|id| JobId::new(id.as_str())).collect();
        let mut ids = ids.map_err(Failure::usage)?;
        ids.sort();
        ids.dedup();
        let filter = Filter {
            user: cli.user.clone(),
            pool: cli.pool.clone(),
            status: cli.status.map(Status::from),
            before_ms: cli.older_than.map(|age| now_ms.saturating_sub(age.as_millis() as u64)),
            ..Filter::default()
        };
        Ok(Self { ids, filter })
    }

    /// Whether jobs are selected that nobody has named.
    pub fn is_mass(&self) -> bool {
        self.ids.is_empty()
    }

    /// Goes once through all that can be cancelled.
    pub fn pass(&self, inspect: &Inspect) -> Pass<'_> {
        let places = match self.filter.status {
            Some(Status::Running) => &[Place::Claims, Place::Open][..],
            Some(Status::Scheduled) => &[Place::Schedule],
            Some(Status::Held) => &[Place::Open],
            Some(_) => &[Place::AllQueues],
            None => &[Place::Claims, Place::AllQueues, Place::Schedule, Place::Open],
        };
        let walk = inspect.walk(self.filter.user.as_deref(), places);
        Pass { filter: &self.filter, inspect: inspect.clone(), walk, page: Vec::new() }
    }
}

/// One pass over all that can be cancelled: jobs that are meant and not over, a page at a time.
#[derive(Debug)]
pub struct Pass<'a> {
    filter: &'a Filter,
    inspect: Inspect,
    walk: Walk,
    page: Vec<JobId>,
}

impl Pass<'_> {
    /// The next jobs; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Vec<JobView>>, Error> {
        while self.page.is_empty() {
            let Some(page) = self.walk.next().await? else { return Ok(None) };
            self.page = page;
        }
        let rest = self.page.split_off(self.page.len().min(PAGE));
        let ids = std::mem::replace(&mut self.page, rest);
        let names: Vec<&str> = ids.iter().map(JobId::as_str).collect();
        let views = self.inspect.brief(&names).await?.into_iter().flatten();
        // A part of a batch is never meant: its batch is.
        let is_meant = |view: &JobView| !view.is_over() && view.kind() != Kind::Part && self.filter.covers(view);
        Ok(Some(views.filter(is_meant).collect()))
    }
}
