//! `drayman retry`: new runs of jobs that have ended.

use console::{Common, Failure, Out, complain, one_line};
use queue_core::config::{self, Secret};
use queue_core::ids::JobId;
use queue_core::inspect::{Filter, Inspect, Kind};
use queue_core::model::Status;
use queue_core::retry::{PAGE, Retried, Retrier};
use serde_json::json;

use crate::cli::{REFUSED, RetryArgs};
use crate::watch::not_found;

/// Most jobs of one call that selects them.
const MOST: usize = 10_000;

/// Starts new runs.
pub async fn run(common: &Common, args: RetryArgs) -> Result<u8, Failure> {
    let (_, store) = common.connect().await?;
    let ids = match args.ids.is_empty() {
        false => args.ids.iter().map(|id| JobId::new(id.as_str())).collect::<Result<_, _>>().map_err(Failure::usage)?,
        true => selected(&Inspect::new(store.clone()), &args).await?,
    };
    let password = std::env::var(config::PASS_VARIABLE).ok().map(Secret::from);
    let retrier = Retrier::new(store).from_start(args.from_start).password(password);
    let mut out = Out::default();
    let (mut refused, mut missing) = (false, false);
    // A page at a time: whoever interrupts it sees what was done.
    for page in ids.chunks(PAGE) {
        for (id, result) in page.iter().zip(retrier.retry(page).await?) {
            let (word, why) = match &result {
                Retried::Queued => ("queued", None),
                Retried::NotOver(status) => ("not_over", Some(format!("it has not ended: it is {}", one_line(status)))),
                Retried::NothingFailed => ("nothing_failed", Some("all of it is done; --from-start repeats it".into())),
                Retried::PasswordMissing => (
                    "password_missing",
                    Some(format!("its password was removed when it ended: say it in {}", config::PASS_VARIABLE)),
                ),
                Retried::NotFound => ("not_found", Some(not_found(id.as_str()))),
                Retried::Refused(reason) => ("refused", Some(one_line(reason))),
            };
            missing |= result == Retried::NotFound;
            refused |= !matches!(result, Retried::Queued | Retried::NotFound);
            match (common.json, why) {
                (true, why) => out.json(&json!({ "id": id.as_str(), "result": word, "reason": why })),
                (false, None) => out.line(id),
                (false, Some(why)) => complain(format_args!("{id}: {why}")),
            }
        }
    }
    Ok(match (refused, missing) {
        (true, _) => REFUSED,
        (_, true) => console::NOT_FOUND,
        _ => console::OK,
    })
}

/// Jobs that nobody has named: those that failed, but for a status that is asked for.
async fn selected(inspect: &Inspect, args: &RetryArgs) -> Result<Vec<JobId>, Failure> {
    let statuses = match args.status {
        Some(status) if status.is_final() => vec![status],
        Some(status) => return Err(Failure::usage(format!("jobs that are {status} have not ended"))),
        None => vec![Status::Failed, Status::Ignored],
    };
    let mut ids = Vec::new();
    for status in statuses {
        let filter = Filter {
            user: args.user.clone(),
            pool: args.pool.clone().map(String::from),
            status: Some(status),
            ..Filter::default()
        };
        let views = inspect.list(&filter, MOST + 1).await?;
        if views.len() > MOST {
            complain(format_args!("there are more than {MOST} jobs that are {status}: call again for the rest"));
        }
        // Rows of batches are not tried again as jobs are: who selects jobs does not mean them.
        let jobs = views.iter().take(MOST).filter(|view| !matches!(view.kind(), Kind::Batch | Kind::Part));
        ids.extend(jobs.filter_map(|view| JobId::new(view.id.as_str()).ok()));
    }
    Ok(ids)
}
