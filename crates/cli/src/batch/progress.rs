//! A bar on standard error, if that is a terminal; else nothing.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use queue_core::batch::BatchView;

/// How often a bar moves whose length is not known.
const TICK: Duration = Duration::from_millis(200);

/// What a person sees who waits.
pub struct Progress(ProgressBar);

impl Progress {
    /// Of rows that are handed over. How many will come is not known.
    pub fn of_load(done: &'static str) -> Self {
        let bar = ProgressBar::new_spinner();
        bar.set_style(style("{spinner} {human_pos} rows {msg}, {per_sec}, {elapsed}"));
        bar.set_message(done);
        bar.enable_steady_tick(TICK);
        Self(bar)
    }

    /// Of rows that are worked on.
    pub fn of_work() -> Self {
        let bar = ProgressBar::new(0);
        bar.set_style(style("{bar:30} {percent:>3} %  {msg}, {per_sec}, {elapsed}"));
        Self(bar)
    }

    /// Whether anybody sees it.
    pub fn is_shown(&self) -> bool {
        !self.0.is_hidden()
    }

    /// So many rows more were handed over.
    pub fn more(&self, rows: usize) {
        self.0.inc(rows as u64);
    }

    /// How the work stands.
    pub fn work(&self, view: &BatchView) {
        self.0.set_length(view.counts.rows);
        self.0.set_position(view.counts.rows - view.counts.pending);
        self.0.set_message(super::summary(view));
    }

    /// Takes it away: what is said in the end is said in a line.
    pub fn end(self) {
        self.0.finish_and_clear();
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("a template that is written above")
}
