//! The output files of a batch whose rows have all ended: their texts, in the order of lines, become one file for each logical name.
//!
//! Rows are read page by page and their texts appended to files on this machine, so that memory stays the same however much
//! they wrote. Then each file goes to the object store under a name that batch and logical name alone decide: whoever does this
//! again, after a crash, replaces what was there. Last the record names them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use queue_core::batch::{BatchError, Which};
use queue_core::calls::{Fields, Verdict};
use queue_core::ids::JobId;
use queue_core::model::task::File;
use queue_core::objects::ObjectsError;
use queue_core::session::Claim;
use tokio::io::AsyncWriteExt;

use super::{Ending, Means, Rules, set_aside_reason};
use crate::stop::{Cause, Stop};

/// Most rows of a page.
const PAGE_ROWS: usize = 10_000;
/// Most bytes of the record's list of files.
const LIST_MAX_BYTES: usize = 1 << 20;
/// The longest pause before another try.
const AGAIN_AFTER_MAX: Duration = Duration::from_secs(60);

/// Assembles them and says how the claim is to end; `None` if the claim was lost on the way.
pub(super) async fn settle(claim: &Claim, batch: &JobId, means: &Means, rules: &Rules, stop: &Stop) -> Option<Ending> {
    let taken = claim.job();
    if taken.number("unclean") >= rules.max_unclean {
        return Some(given_up(&set_aside_reason(taken), rules));
    }
    let token = stop.token();
    let assembled = tokio::select! {
        biased;
        assembled = assemble(claim, batch, means) => assembled,
        () = token.cancelled() => {
            return (stop.cause() != Some(Cause::ClaimLost)).then(|| Ending {
                verdict: Verdict::Back,
                fields: Fields::new(),
                status: "given back".into(),
            });
        }
    };
    match assembled {
        Ok(files) => {
            Some(Ending { verdict: verdict(rules), fields: Fields::new().with("files", files), status: "done".into() })
        }
        Err(Fault::Hopeless(reason)) => Some(given_up(&reason, rules)),
        Err(Fault::Passing(reason)) => {
            let attempts = taken.number("attempts") + 1;
            let pause = Duration::from_millis(500 << attempts.min(7)).min(AGAIN_AFTER_MAX);
            tracing::warn!(reason, pause_ms = pause.as_millis() as u64, "output files are not assembled yet");
            let fields = Fields::new().with("attempts", attempts.to_string()).with("failed_reason", reason);
            let verdict = Verdict::Later { after_ms: pause.as_millis() as u64 };
            Some(Ending { verdict, fields, status: "scheduled".into() })
        }
    }
}

fn verdict(rules: &Rules) -> Verdict {
    Verdict::Part { keep_ms: rules.keep.as_millis() as u64 }
}

/// The batch ends without its files, and says why.
fn given_up(reason: &str, rules: &Rules) -> Ending {
    let reason = format!("its output files could not be assembled: {reason}");
    tracing::error!(reason);
    Ending { verdict: verdict(rules), fields: Fields::new().with("failed_reason", reason), status: "failed".into() }
}

/// What keeps files from being assembled.
enum Fault {
    /// Another try may not meet it.
    Passing(String),
    /// Every try would.
    Hopeless(String),
}

impl From<BatchError> for Fault {
    fn from(error: BatchError) -> Self {
        match error {
            BatchError::Redis(error) => Fault::Passing(error.to_string()),
            other => Fault::Hopeless(other.to_string()),
        }
    }
}

impl From<ObjectsError> for Fault {
    fn from(error: ObjectsError) -> Self {
        match error {
            ObjectsError::Config(_) | ObjectsError::TooLarge { .. } => Fault::Hopeless(error.to_string()),
            _ => Fault::Passing(error.to_string()),
        }
    }
}

impl From<std::io::Error> for Fault {
    fn from(error: std::io::Error) -> Self {
        Fault::Passing(error.to_string())
    }
}

/// The record's list of files, in JSON.
async fn assemble(claim: &Claim, batch: &JobId, means: &Means) -> Result<String, Fault> {
    let folder = tempfile::Builder::new().prefix("drayman-").tempdir()?;
    let reader = claim.pen().batch_reader(batch).await?;
    let mut spool = Spool { folder: folder.path(), files: BTreeMap::new() };
    let mut after = None;
    loop {
        let page = reader.page(Which::WithFiles, after, PAGE_ROWS).await?;
        let mut texts: BTreeMap<String, String> = BTreeMap::new();
        for (name, text) in page.rows.into_iter().flat_map(|row| row.files) {
            if text.is_empty() {
                continue;
            }
            let lines = texts.entry(name).or_default();
            let text = text.trim();
            if !text.is_empty() {
                lines.extend([text, "\n"]);
            }
        }
        spool.append(texts).await?;
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    let mut files = BTreeMap::new();
    for (name, path) in spool.files {
        let (object, bytes) = means.results.objects.put_batch_file(batch, &name, &path).await?;
        files.insert(name, File { object, bytes });
    }
    let list = serde_json::to_string(&files).map_err(|error| Fault::Hopeless(error.to_string()))?;
    match list.len() {
        0..=LIST_MAX_BYTES => Ok(list),
        bytes => Err(Fault::Hopeless(format!("the names of its files have {bytes} bytes"))),
    }
}

/// Files on this machine that grow. Their own names are numbers: what they stand for may be any text.
struct Spool<'a> {
    folder: &'a Path,
    files: BTreeMap<String, PathBuf>,
}

impl Spool<'_> {
    async fn append(&mut self, texts: BTreeMap<String, String>) -> Result<(), std::io::Error> {
        for (name, lines) in texts {
            let number = self.files.len();
            let path = self.files.entry(name).or_insert_with(|| self.folder.join(number.to_string()));
            // Not kept open: there may be more files than a process may have open.
            let mut file = tokio::fs::OpenOptions::new().create(true).append(true).open(path).await?;
            file.write_all(lines.as_bytes()).await?;
            file.flush().await?;
        }
        Ok(())
    }
}
