//! What a task hands back, on its way to where it is kept: small results in the job's hash, large ones and files in the object
//! store, before the hash names them.

use std::collections::BTreeMap;

use queue_core::calls::{Fields, Taken};
use queue_core::job::TOLD;
use queue_core::model::task::{File, Payload};
use queue_core::objects::{Objects, ObjectsError};

use crate::execute::task::{Output, Problem};

/// Where the results of tasks go.
#[derive(Debug, Clone)]
pub struct Results {
    /// Large ones, and files.
    pub objects: Objects,
    /// Results up to so many bytes stay in the job's hash.
    pub max_inline_bytes: u64,
}

impl Results {
    /// The fields that tell of what a task that went well hands back. What is too large fails it; a store that fails may not the
    /// next time.
    pub(super) async fn keep(&self, taken: &Taken, output: Output) -> Result<Fields, Problem> {
        let Output { result, messages, files } = output;
        let mut fields = Fields::new().with_some("messages", list("messages", &messages));
        if let Some(result) = result {
            fields = fields.and(self.keep_result(taken, result).await?);
        }
        if files.is_empty() {
            return Ok(fields);
        }
        let run = run_of(taken);
        let mut kept = BTreeMap::new();
        for (name, content) in files {
            let bytes = content.len() as u64;
            let object = self.objects.put_file(&taken.id, run, taken.fence, &name, content).await;
            kept.insert(name.clone(), File { object: object.map_err(|error| problem(&name, &error))?, bytes });
        }
        let text = serde_json::to_string(&kept).unwrap_or_default();
        if text.len() > most_bytes("files") {
            return Err(Problem::fail("the names of its files have too many bytes"));
        }
        Ok(fields.with("files", text))
    }

    async fn keep_result(&self, taken: &Taken, result: Payload) -> Result<Fields, Problem> {
        let bytes = result.bytes.len() as u64;
        if let Some(inline) = self.inline(&result) {
            return Ok(inline);
        }
        let object = self.objects.put_result(&taken.id, run_of(taken), taken.fence, result.bytes).await;
        Ok(Fields::new()
            .with("result_object", object.map_err(|error| problem("its result", &error))?)
            .with("result_bytes", bytes.to_string())
            .with("result_encoding", result.encoding.as_str()))
    }

    /// The fields of a result that is small enough for the job's hash.
    pub(super) fn inline(&self, result: &Payload) -> Option<Fields> {
        let most = self.max_inline_bytes.min(most_bytes("result") as u64);
        let fields = Fields::new().with("result", &result.bytes).with("result_encoding", result.encoding.as_str());
        (result.bytes.len() as u64 <= most).then_some(fields)
    }
}

fn problem(what: &str, error: &ObjectsError) -> Problem {
    let reason = format!("{what} can't be kept: {error}");
    match error {
        ObjectsError::TooLarge { .. } | ObjectsError::Config(_) => Problem::fail(reason),
        ObjectsError::NotFound(_) | ObjectsError::Redis(_) | ObjectsError::Failed(_) => Problem::retry(reason),
    }
}

fn run_of(taken: &Taken) -> u64 {
    taken.number("run").max(1)
}

fn most_bytes(field: &str) -> usize {
    TOLD.iter().find(|(name, _)| *name == field).map_or(0, |(_, most)| *most)
}

/// As many of the items as fit into a field, as JSON; nothing if there are none.
pub(super) fn list<T: serde::Serialize>(field: &str, items: &[T]) -> Option<String> {
    let mut count = items.len();
    while count > 0 {
        let text = serde_json::to_string(&items[..count]).ok()?;
        if text.len() <= most_bytes(field) {
            return Some(text);
        }
        count /= 2;
    }
    None
}
