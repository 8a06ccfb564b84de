//! The checker: a handler that looks at a file before it becomes a batch, asked by an ordinary task.

use std::io::{Read, Seek};
use std::time::SystemTime;

use queue_core::handle::{JobError, JobHandle};
use queue_core::ids::{App, JobId, Op};
use queue_core::model::task::Payload;
use queue_core::producer::{EnqueueError, NewJob, Producer};
use queue_core::store::Store;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::claim::{Claim, changed_at};
use crate::config::{FolderConfig, HandlerName};
use crate::hand_over::{Trouble, unreadable};
use crate::place::shown;

/// So much of a file's beginning is shown to its checker.
const HEAD_LINES: usize = 20;
const HEAD_BYTES: u64 = 16 << 10;

/// What a checker answers; nothing at all means that the file is good.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Answer {
    ok: bool,
    #[serde(default)]
    reason: Option<String>,
    #[serde(default)]
    context: Option<Value>,
    #[serde(default)]
    app: Option<App>,
    #[serde(default)]
    op: Option<Op>,
}

/// What a checker wants to be otherwise than the configuration says.
#[derive(Debug, Default)]
pub struct Changes {
    /// The context.
    pub context: Option<Value>,
    /// The application.
    pub app: Option<App>,
    /// The operation.
    pub op: Option<Op>,
}

/// Asks the checker, and waits for its answer for as long as it takes: nobody may be there who could give it.
pub async fn check(
    claim: &Claim,
    config: &FolderConfig,
    checker: &HandlerName,
    store: &Store,
    producer: &Producer,
) -> Result<Changes, Trouble> {
    let id = JobId::new(format!("{}-check", claim.token())).expect("an id with a word behind it");
    let input = input(claim, config).map_err(unreadable)?;
    let payload = Payload::json(&input).map_err(|error| Trouble::Bad(format!("it can't be described: {error}")))?;
    let job = NewJob {
        id: id.clone(),
        ..NewJob::task(config.user.clone(), checker.app.clone(), checker.op.clone(), payload)
    };
    match producer.enqueue(job).await {
        Ok(_) => {}
        Err(error @ (EnqueueError::Invalid(_) | EnqueueError::TooLarge { .. })) => {
            return Err(Trouble::Bad(format!("its checker can't be asked: {error}")));
        }
        Err(error) => return Err(Trouble::Later(format!("its checker can't be asked: {error}"))),
    }
    let handle = JobHandle::new(store.clone(), id);
    let answer: Option<Answer> = match handle.wait(None).await.map(drop) {
        Ok(()) => match handle.result().await {
            Ok(answer) => answer,
            Err(JobError::NoResult) => None,
            Err(JobError::Redis(error)) => {
                return Err(Trouble::Later(format!("its checker's answer can't be read: {error}")));
            }
            Err(JobError::NotFound) => return Err(Trouble::Later("its checker's answer is gone".into())),
            Err(JobError::Failed { reason, .. }) => return Err(Trouble::Bad(format!("its checker failed: {reason}"))),
            Err(JobError::Cancelled) => return Err(Trouble::Bad("its checker was cancelled".into())),
            Err(error) => return Err(Trouble::Bad(format!("its checker's answer can't be read: {error}"))),
        },
        Err(error) => return Err(Trouble::Later(format!("its checker can't be waited for: {error}"))),
    };
    match answer {
        None => Ok(Changes::default()),
        Some(Answer { ok: true, context, app, op, .. }) => Ok(Changes { context, app, op }),
        Some(Answer { reason, .. }) => {
            Err(Trouble::Bad(format!("its checker refused it: {}", reason.as_deref().unwrap_or("no reason was given"))))
        }
    }
}

fn input(claim: &Claim, config: &FolderConfig) -> std::io::Result<Value> {
    let mut file = claim.open()?;
    let metadata = file.metadata()?;
    let mut head = Vec::new();
    file.rewind()?;
    file.take(HEAD_BYTES).read_to_end(&mut head)?;
    let head = String::from_utf8_lossy(&head).into_owned();
    let modified = metadata.modified().unwrap_or_else(|_| changed_at(&metadata));
    let seconds = modified.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    Ok(json!({
        "file": shown(claim.name()),
        "path": shown(&claim.file()),
        "bytes": metadata.len(),
        "modified_at": seconds,
        "batch": claim.token(),
        "context": config.context,
        "head": head.lines().take(HEAD_LINES).collect::<Vec<_>>(),
    }))
}
