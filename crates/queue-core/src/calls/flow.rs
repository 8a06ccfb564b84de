//! The functions of flows: typed calls and replies.

use super::{Args, Fields};
use crate::error::Error;
use crate::ids::{JobId, User};
use crate::library::{FLOW_ABANDON, FLOW_LAUNCH, FLOW_READ, FLOW_STOP};
use crate::model::Status;
use crate::reply::Reply;
use crate::store::Store;

/// A launch on its way.
#[derive(Debug, Clone)]
pub(crate) struct FlowLaunch {
    pub(crate) instance: String,
    pub(crate) id: JobId,
    pub(crate) user: User,
    /// All steps run, whatever is done.
    pub(crate) force: bool,
    /// An instance that is done may be launched again.
    pub(crate) may_repeat: bool,
    pub(crate) fields: Fields,
    /// The steps' names, what they come after and on which end, packed.
    pub(crate) plan: Vec<u8>,
    /// The fields of each step's job.
    pub(crate) jobs: Vec<Fields>,
}

/// What became of a launch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum FlowLaunched {
    /// It runs; it goes on from this execution.
    Launched(Option<String>),
    Exists(Status),
    Running(String),
    Done(String),
    Abandoned(String),
    Refused(String),
    NoRoom {
        used: u64,
        mark: u64,
    },
}

/// What became of a stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FlowStopped {
    Now,
    /// Some steps still run.
    Asked,
    Over(Status),
    Missing,
}

/// What became of an abandonment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FlowAbandoned {
    Now,
    Running,
    Done,
    Missing,
}

/// One step as it is read.
#[derive(Debug, Clone, Default)]
pub(crate) struct FlowStep {
    pub(crate) name: String,
    pub(crate) after: Vec<usize>,
    pub(crate) on: String,
    pub(crate) state: String,
    pub(crate) facts: String,
    /// Of its job, while that is there.
    pub(crate) status: String,
    pub(crate) claimed: bool,
    pub(crate) started_at: String,
    pub(crate) history: String,
    pub(crate) progress: String,
    pub(crate) checkpoint: String,
}

fn text(items: &[Reply], at: usize) -> String {
    items.get(at).and_then(Reply::lossy).unwrap_or_default()
}

fn status(items: &[Reply], at: usize, function: &'static str) -> Result<Status, Error> {
    let text = text(items, at);
    text.parse().map_err(|_| Error::Reply { function, reply: text })
}

impl Store {
    pub(crate) async fn flow_launch(&self, launch: &FlowLaunch) -> Result<FlowLaunched, Error> {
        const NAME: &str = "flow_launch";
        let args = Args::new()
            .text(&launch.instance)
            .text(launch.id.as_str())
            .text(launch.user.as_str())
            .text(if launch.force { "force" } else { "" })
            .number(u8::from(launch.may_repeat))
            .counted_fields(&launch.fields)
            .text(&launch.plan);
        let args = launch.jobs.iter().fold(args, |args, fields| args.text(packed(fields)));
        let items = self.call(&FLOW_LAUNCH, args.0).await?.array(NAME)?;
        let number = |at: usize| Ok::<_, Error>(items.get(at).unwrap_or(&Reply::Nil).int(NAME)?.max(0) as u64);
        match items.first().and_then(Reply::text) {
            Some("launched") => Ok(FlowLaunched::Launched(Some(text(&items, 1)).filter(|from| !from.is_empty()))),
            Some("exists") => Ok(FlowLaunched::Exists(status(&items, 1, NAME)?)),
            Some("running") => Ok(FlowLaunched::Running(text(&items, 1))),
            Some("done") => Ok(FlowLaunched::Done(text(&items, 1))),
            Some("abandoned") => Ok(FlowLaunched::Abandoned(text(&items, 1))),
            Some("refused") => Ok(FlowLaunched::Refused(text(&items, 1))),
            Some("no_room") => Ok(FlowLaunched::NoRoom { used: number(1)?, mark: number(2)? }),
            _ => Err(Reply::Array(items).unexpected(NAME)),
        }
    }

    pub(crate) async fn flow_stop(&self, flow: &JobId) -> Result<FlowStopped, Error> {
        const NAME: &str = "flow_stop";
        let items = self.call(&FLOW_STOP, Args::new().text(flow.as_str()).0).await?.array(NAME)?;
        match items.first().and_then(Reply::text) {
            Some("stopped") => Ok(FlowStopped::Now),
            Some("stopping") => Ok(FlowStopped::Asked),
            Some("over") => Ok(FlowStopped::Over(status(&items, 1, NAME)?)),
            Some("missing") => Ok(FlowStopped::Missing),
            _ => Err(Reply::Array(items).unexpected(NAME)),
        }
    }

    pub(crate) async fn flow_abandon(&self, flow: &JobId) -> Result<FlowAbandoned, Error> {
        let reply = self.call(&FLOW_ABANDON, Args::new().text(flow.as_str()).0).await?;
        match reply.text() {
            Some("abandoned") => Ok(FlowAbandoned::Now),
            Some("running") => Ok(FlowAbandoned::Running),
            Some("done") => Ok(FlowAbandoned::Done),
            Some("missing") => Ok(FlowAbandoned::Missing),
            _ => Err(reply.unexpected("flow_abandon")),
        }
    }

    /// The steps of an execution; `None` where there is none.
    pub(crate) async fn flow_read(&self, flow: &JobId) -> Result<Option<Vec<FlowStep>>, Error> {
        const NAME: &str = "flow_read";
        let reply = self.call(&FLOW_READ, Args::new().text(flow.as_str()).0).await?;
        if matches!(reply, Reply::Nil) {
            return Ok(None);
        }
        let read = |reply: Reply| {
            let items = reply.array(NAME)?;
            Ok(FlowStep {
                name: text(&items, 0),
                after: text(&items, 1).split(' ').filter_map(|number| number.parse().ok()).collect(),
                on: text(&items, 2),
                state: text(&items, 3),
                facts: text(&items, 4),
                status: text(&items, 5),
                claimed: text(&items, 6) == "1",
                started_at: text(&items, 7),
                history: text(&items, 8),
                progress: text(&items, 9),
                checkpoint: text(&items, 10),
            })
        };
        reply.array(NAME)?.into_iter().map(read).collect::<Result<_, Error>>().map(Some)
    }
}

/// Names and values in turn, as Lua unpacks them. All are texts: the kind for bytes is one that Redis' MessagePack does not know.
fn packed(fields: &Fields) -> Vec<u8> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let flat: Vec<String> = fields.iter().flat_map(|(name, value)| [name.to_owned(), text(value)]).collect();
    rmp_serde::to_vec(&flat).expect("texts can be packed")
}
