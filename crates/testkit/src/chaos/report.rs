//! What a run has shown.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::Options;
use super::verdict::{Counts, EFFECTS, LOST, TWICE, Violation};

/// The outcome of one run.
#[derive(Clone, Debug)]
pub struct Report {
    /// What it was.
    pub options: Options,
    /// How long faults and work went on.
    pub lasted: Duration,
    /// How long what was left then took.
    pub drained: Duration,
    /// Jobs, by how they were handed in.
    pub routes: BTreeMap<String, usize>,
    /// What was counted.
    pub counts: Counts,
    /// What was counted of batches.
    pub batches: super::BatchCounts,
    /// What was counted of flows.
    pub flows: super::FlowCounts,
    /// What was counted of tracked jobs.
    pub tracked: super::TrackedCounts,
    /// What was counted of ticks, files and exported rows.
    pub sources: super::SourceCounts,
    /// Faults by kind.
    pub faults: BTreeMap<&'static str, usize>,
    /// From a worker's death to its job being taken again.
    pub recoveries: Vec<Duration>,
    /// What must not be.
    pub violations: Vec<Violation>,
    /// All that is known of the jobs that are concerned.
    pub accounts: Vec<String>,
}

impl Report {
    /// How often a promise was broken.
    pub fn broken(&self, promise: &str) -> usize {
        self.violations.iter().filter(|violation| violation.promise == promise).count()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |pairs: &mut dyn Iterator<Item = (String, usize)>| {
            pairs.map(|(what, count)| format!("{what} {count}")).collect::<Vec<_>>().join(", ")
        };
        let owned = |map: &BTreeMap<String, usize>| list(&mut map.iter().map(|(what, count)| (what.clone(), *count)));
        let seconds = |time: Duration| format!("{:.1} s", time.as_secs_f64());
        let Counts { jobs, by_status, effects, unknown, unknown_bare, tasks, poisons, runs, failed_by_faults } =
            &self.counts;
        writeln!(
            f,
            "seed {}, {} of work and faults, {} to drain",
            self.options.seed,
            seconds(self.lasted),
            seconds(self.drained)
        )?;
        writeln!(f, "jobs {jobs} ({})", owned(&self.routes))?;
        writeln!(f, "  ended: {}; statements that took effect: {effects}", owned(by_status))?;
        let kinds = list(&mut tasks.iter().map(|(what, count)| (what.to_string(), *count)));
        let all: usize = tasks.values().sum();
        writeln!(
            f,
            "  tasks among them {all} ({kinds}; {poisons} kill their workers), begun {} times, done {} times",
            runs.begun, runs.done
        )?;
        let batches = &self.batches;
        writeln!(
            f,
            "batches {} ({} aborted) with {} rows done, {} failed ({} by faults), {} aborted; begun {} times by the program; \
             {} files; ends told {} times",
            batches.batches,
            batches.aborted,
            batches.done,
            batches.failed,
            batches.failed_by_faults,
            batches.rows_aborted,
            batches.begun,
            batches.files,
            batches.told
        )?;
        let flows = &self.flows;
        writeln!(
            f,
            "executions of flows {} ({} done, {} failed, {} stopped; {} went on from others) with {} steps done, {} failed by faults",
            flows.executions,
            flows.done,
            flows.failed,
            flows.stopped,
            flows.went_on,
            flows.steps,
            flows.failed_by_faults
        )?;
        let tracked = &self.tracked;
        writeln!(f, "tracked jobs {}, {} attempts at them lost", tracked.jobs, tracked.lost)?;
        let sources = &self.sources;
        writeln!(f, "ticks {}, files {}, rows of what has ended {}", sources.ticks, sources.files, sources.exported)?;
        let faults: usize = self.faults.values().sum();
        let kinds = list(&mut self.faults.iter().map(|(what, count)| (what.to_string(), *count)));
        writeln!(f, "faults {faults} ({kinds})")?;
        writeln!(
            f,
            "lost {}, double-recorded {}, wrong effects {}",
            self.broken(LOST),
            self.broken(TWICE),
            self.broken(EFFECTS)
        )?;
        writeln!(
            f,
            "unknown after a crash of the database: {unknown} statements; outside of transactions: {unknown_bare}"
        )?;
        if !failed_by_faults.is_empty() {
            writeln!(f, "statements and tasks that a fault failed:")?;
            for (reason, count) in failed_by_faults {
                writeln!(f, "  {count:4} {reason}")?;
            }
        }
        let mut recoveries = self.recoveries.clone();
        recoveries.sort();
        match recoveries.last() {
            Some(longest) => writeln!(
                f,
                "recovery of a killed worker's job, faults going on: median {}, longest {} of {}",
                seconds(recoveries[recoveries.len() / 2]),
                seconds(*longest),
                recoveries.len()
            )?,
            None => writeln!(f, "no killed worker had a job")?,
        }
        if self.violations.is_empty() {
            return write!(f, "every promise was kept");
        }
        for account in &self.accounts {
            writeln!(f, "{account}")?;
        }
        for violation in self.violations.iter().take(40) {
            writeln!(f, "seed {}: {violation}", self.options.seed)?;
        }
        let Options { seed, jobs, workers, users, .. } = &self.options;
        write!(
            f,
            "{} VIOLATIONS; the same work and faults again: \
             cargo run -p testkit --bin chaos -- --seed {seed} --jobs {jobs} --workers {workers} --users {users}",
            self.violations.len()
        )
    }
}
