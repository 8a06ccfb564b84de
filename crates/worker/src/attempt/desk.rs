//! What a handler tells while it works, kept until it is written: thinned out and cut here, so that no handler can flood
//! Redis or wait for it.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use queue_core::calls::{Fields, Mark};
use queue_core::ids::Pool;
use queue_core::job::{CHECKPOINT_MAX_BYTES, TOLD};
use queue_core::model::chunk::RowsTo;
use queue_core::model::task::{Payload, Progress};
use queue_core::session::Pen;
use tokio::sync::Notify;

use super::Clock;
use super::load::Loads;
use crate::execute::chunks::position::{Identity, same};
use crate::execute::task::{Desk, Problem, RowSink};
use crate::stop::{Cause, Stop};

/// Most bytes of one line.
const LINE_MAX_BYTES: usize = 1024;
/// Most bytes of what a handler says that it is doing.
const NOTE_MAX_BYTES: usize = 1024;

/// The work to which a checkpoint belongs: one handler's, on one input. For any other one it is a place in something else.
pub(super) struct WorkOf {
    pool: Pool,
    input: Payload,
    in_chunks: bool,
}

impl WorkOf {
    pub(super) fn new(pool: Pool, input: Payload, in_chunks: bool) -> Self {
        Self { pool, input, in_chunks }
    }

    fn identity(&self) -> Identity {
        // Such a step compares by itself what it reads and writes; the rest of its input may be mended.
        if self.in_chunks {
            return Identity::of("a step in chunks");
        }
        let mut content = self.input.bytes.clone();
        // Parameters may be given in another order the next time.
        if let Ok(mut value) = serde_json::from_slice::<serde_json::Value>(&content) {
            value.sort_all_objects();
            content = value.to_string().into_bytes();
        }
        Identity::of(&self.pool.to_string()).with_digest("input", content)
    }

    fn text(&self) -> String {
        serde_json::to_string(&self.identity()).expect("texts can be written to memory")
    }

    /// Why what was saved for another work can't be gone on from here.
    pub(super) fn differs_from(&self, saved: &str) -> Option<String> {
        let was: Identity = serde_json::from_str(saved).unwrap_or_default();
        same("its handler", &self.identity(), &was).err().map(|problem| problem.reason)
    }
}

/// The desk of one attempt.
pub(super) struct Notebook {
    clock: Clock,
    /// What is saved is written at once, under the claim; and what its writing tells stops the attempt.
    pen: Option<(Pen, Stop, WorkOf)>,
    loads: Option<Loads>,
    log_max_bytes: usize,
    pages: Mutex<Pages>,
    changed: Notify,
}

#[derive(Default)]
struct Pages {
    progress: Option<Progress>,
    lines: VecDeque<String>,
    bytes: usize,
    left_out: u64,
    is_new: bool,
}

impl Notebook {
    pub(super) fn new(clock: Clock, pen: Option<(Pen, Stop, WorkOf)>, loads: Option<Loads>) -> Self {
        let log_max_bytes = TOLD.iter().find(|(name, _)| *name == "log").map_or(0, |(_, most)| *most);
        // The line that tells how many others were left out has its place too.
        Self { clock, pen, loads, log_max_bytes: log_max_bytes - 64, pages: Mutex::default(), changed: Notify::new() }
    }

    /// Waits until there is something that was not written yet.
    pub(super) async fn changed(&self) {
        while !self.pages().is_new {
            self.changed.notified().await;
        }
    }

    /// What is to be written now.
    pub(super) fn fields(&self) -> Fields {
        let mut pages = self.pages();
        pages.is_new = false;
        let progress = pages.progress.as_ref().and_then(|progress| serde_json::to_string(progress).ok());
        let mut fields = Fields::new().with_some("progress", progress);
        if !pages.lines.is_empty() {
            let mut log = String::new();
            if pages.left_out > 0 {
                log = format!("({} earlier lines are left out)\n", pages.left_out);
            }
            pages.lines.iter().for_each(|line| log.extend([line, "\n"]));
            fields = fields.with("log", log);
        }
        fields
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        // Nothing in here panics half way.
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, change: impl FnOnce(&mut Pages)) {
        let mut pages = self.pages();
        change(&mut pages);
        pages.is_new = true;
        drop(pages);
        self.changed.notify_one();
    }
}

#[async_trait]
impl Desk for Notebook {
    fn progress(&self, mut progress: Progress) {
        if let Some(note) = &mut progress.note {
            note.truncate(note.floor_char_boundary(NOTE_MAX_BYTES));
        }
        self.tell(|pages| pages.progress = Some(progress));
    }

    fn log(&self, line: &str) {
        let text = line[..line.floor_char_boundary(LINE_MAX_BYTES)].replace(['\n', '\r'], " ");
        let line = format!("{} {text}", self.clock.now());
        self.tell(|pages| {
            pages.bytes += line.len() + 1;
            pages.lines.push_back(line);
            while pages.bytes > self.log_max_bytes
                && let Some(first) = pages.lines.pop_front()
            {
                pages.bytes -= first.len() + 1;
                pages.left_out += 1;
            }
        });
    }

    async fn save(&self, checkpoint: Payload) -> Result<(), Problem> {
        if checkpoint.bytes.len() > CHECKPOINT_MAX_BYTES {
            let bytes = checkpoint.bytes.len();
            return Err(Problem::fail(format!(
                "its checkpoint has {bytes} bytes, at most {CHECKPOINT_MAX_BYTES} are allowed"
            )));
        }
        let Some((pen, stop, of)) = &self.pen else { return Ok(()) };
        let fields = Fields::new().with("checkpoint", checkpoint.bytes).with("checkpoint_of", of.text());
        match pen.mark(&fields).await {
            Ok(Mark::Held) => Ok(()),
            // It is kept, and the handler hears of the cancel as of any other.
            Ok(Mark::CancelAsked) => {
                stop.ask(Cause::Cancelled);
                Ok(())
            }
            Ok(Mark::Stale) => {
                stop.ask(Cause::ClaimLost);
                Err(Problem::retry("the task is another worker's by now"))
            }
            Err(error) => Err(Problem::retry(format!("its checkpoint could not be saved: {error}"))),
        }
    }

    async fn load(&self, to: &RowsTo, context: Payload) -> Result<Box<dyn RowSink>, Problem> {
        match &self.loads {
            Some(loads) => loads.begin(to, context).await,
            None => Err(Problem::fail("the task has no batch of its own")),
        }
    }
}

#[cfg(test)]
mod tests {
    use queue_core::model::task::Encoding;

    use super::*;

    #[test]
    fn the_newest_lines_stay_and_never_are_more_than_a_job_may_keep() {
        let notebook = Notebook::new(Clock::starting_at(0), None, None);
        for number in 0..1_000 {
            notebook.log(&format!("{number} {}\nnot a line of its own", "ä".repeat(number)));
        }
        let fields = notebook.fields();
        let log = String::from_utf8(fields.get("log").unwrap().to_vec()).unwrap();
        assert!(log.len() <= 1 << 14, "{}", log.len());
        let lines: Vec<&str> = log.lines().collect();
        assert!(lines[0].ends_with("earlier lines are left out)") && lines.last().unwrap().contains(" 999 ä"), "{log}");
        assert!(lines.iter().all(|line| line.len() <= LINE_MAX_BYTES + 32));
    }

    #[test]
    fn a_checkpoint_belongs_to_one_handler_and_one_input_whatever_the_order_of_its_fields() {
        let of = |pool: &str, input: &str, in_chunks| {
            let input = Payload { encoding: Encoding::Json, bytes: input.into() };
            WorkOf::new(pool.parse().unwrap(), input, in_chunks)
        };
        let saved = of("etl.load", r#"{"day": 1, "mode": "full"}"#, false).text();
        let said =
            |now: WorkOf| now.differs_from(&saved).map(|reason| reason.split(". Put").next().unwrap().to_owned());
        assert_eq!(said(of("etl.load", r#"{"mode":"full","day":1}"#, false)), None);
        let begin = "it can't go on from its checkpoint: its handler";
        for (now, wanted) in [
            (of("etl.load", r#"{"day":2,"mode":"full"}"#, false), "'s input is another one than before"),
            (of("etl.step", r#"{"day":1,"mode":"full"}"#, false), " was etl.load, and is etl.step now"),
            (of("etl.load", "{}", true), " was etl.load, and is a step in chunks now"),
        ] {
            assert_eq!(said(now), Some(format!("{begin}{wanted}")));
        }
        let in_chunks = of("etl.load", "1", true);
        assert_eq!(in_chunks.differs_from(&of("etl.step", "2", true).text()), None);
    }

    #[tokio::test]
    async fn what_was_told_before_somebody_listened_is_heard() {
        let notebook = Notebook::new(Clock::starting_at(0), None, None);
        notebook.progress(Progress { done: 1, total: Some(2), note: Some("x".repeat(5_000)) });
        notebook.changed().await;
        assert!(notebook.fields().get("progress").unwrap().len() < 1 << 12);
        tokio::select! {
            biased;
            () = notebook.changed() => panic!("there is nothing new"),
            () = std::future::ready(()) => {}
        }
    }
}
