//! `drayman result`: what a task hands back, as it is.

use std::io::Write;

use console::{Common, Failure, Out, complain, one_line};
use queue_core::handle::{JobError, JobHandle};
use queue_core::ids::JobId;
use queue_core::inspect::Kind;
use queue_core::model::task::Payload;
use queue_core::objects::{Objects, ObjectsError};
use serde_json::{Value, json};

use crate::cli::{FAILED, NOT_OVER, ResultArgs};
use crate::watch::not_found;

/// Writes a result, or a file.
pub async fn run(common: &Common, args: ResultArgs) -> Result<u8, Failure> {
    let id = JobId::new(args.id).map_err(Failure::usage)?;
    let (config, store) = common.connect().await?;
    let handle = JobHandle::new(store, id).with_objects(Objects::open(&config.objects)?);
    if let Some(limit) = args.wait
        && let Err(error) = handle.wait(limit).await
    {
        return fault(&handle, error);
    }
    if args.file.is_none() && handle.view().await.is_ok_and(|view| view.kind() == Kind::Batch) {
        return Err(Failure::usage(
            "it is a batch: `drayman batch rows` and `drayman batch files` show what became of it",
        ));
    }
    let bytes = match args.file {
        None => handle.payload().await.map(|payload| payload.bytes),
        Some(name) => match handle.files().await {
            Ok(files) => match files.get(&name) {
                Some(file) => handle.file(file).await,
                None => Err(JobError::Unreadable(format!("the job has no file {}", one_line(&name)))),
            },
            Err(error) => Err(error),
        },
    };
    match bytes {
        Ok(bytes) => {
            let mut out = std::io::stdout().lock();
            // Who reads it may go at any time.
            let _ = out.write_all(&bytes).and_then(|()| out.flush());
            Ok(console::OK)
        }
        Err(error) => fault(&handle, error),
    }
}

/// Shows how a task has ended that was waited for: its result on standard output, anything else on standard error.
pub async fn show(handle: &JobHandle, many: bool, json: bool, out: &mut Out) -> Result<u8, Failure> {
    let id = handle.id();
    match handle.payload().await {
        Ok(payload) => {
            let text = match (readable(&payload), json, many) {
                (Ok(value), true, _) => json!({ "id": id, "output": value }).to_string(),
                (Ok(value), false, true) => format!("{id}\t{value}"),
                (Ok(value), false, false) => value.to_string(),
                (Err(fault), ..) => {
                    complain(format_args!("{id}: {fault}"));
                    return Ok(console::OK);
                }
            };
            out.line(text);
            Ok(console::OK)
        }
        Err(JobError::NoResult) => Ok(console::OK),
        Err(error) => fault(handle, error),
    }
}

/// A result as JSON.
fn readable(payload: &Payload) -> Result<Value, String> {
    let size = payload.bytes.len();
    payload.read().map_err(|_| format!("its result of {size} bytes is not to be shown: `drayman result` writes it"))
}

fn fault(handle: &JobHandle, error: JobError) -> Result<u8, Failure> {
    let (code, message) = match error {
        JobError::NotFound => (console::NOT_FOUND, not_found(handle.id().as_str())),
        // There is nothing to write.
        JobError::NoResult => return Ok(console::OK),
        JobError::NotOver(_) => (NOT_OVER, error.to_string()),
        JobError::Failed { .. } | JobError::Cancelled | JobError::Unreadable(_) => {
            (FAILED, one_line(&error.to_string()))
        }
        JobError::Objects(ObjectsError::Config(fault)) => (console::USAGE, fault.to_string()),
        JobError::Objects(error) => (console::UNREACHABLE, one_line(&error.to_string())),
        JobError::Redis(error) => return Err(error.into()),
    };
    complain(message);
    Ok(code)
}
