//! What must be true in the end, asked from outside: of the records, of the database, and of every key that is left.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::{self, Write as _};
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value as Json;

use super::faults::HANDLERS_KILLED;
use super::rules;
use super::stage::{MAX_UNCLEAN, Stage, connect};
use super::state::{Hash, hash};
use super::watch::{Life, Watch};
use super::workload::{Deed, Handler, POISON};

/// Something that must not be.
#[derive(Clone, Debug)]
pub struct Violation {
    /// What was promised.
    pub promise: &'static str,
    /// The job, where it is about one.
    pub job: Option<String>,
    /// What is there instead.
    pub found: String,
}

/// In one line.
impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let job = self.job.as_deref().map(|job| format!(" (job {job})")).unwrap_or_default();
        write!(f, "VIOLATION: {}{job}: {}", self.promise, self.found.replace('\n', " | "))
    }
}

impl Violation {
    pub(super) fn new(promise: &'static str, found: impl Into<String>) -> Self {
        Self { promise, job: None, found: found.into() }
    }

    pub(super) fn of(job: &str, promise: &'static str, found: impl Into<String>) -> Self {
        Self { promise, job: Some(job.into()), found: found.into() }
    }
}

/// The promises, as they stand in the report.
pub const LOST: &str = "an acknowledged job has an end";
/// The end of a run comes.
pub const STUCK: &str = "once the faults have ended, everything comes to its end";
/// The look at all keys.
pub const AGREE: &str = "keys agree";
/// A final record.
pub const TWICE: &str = "a final record never changes";
/// Effects.
pub const EFFECTS: &str = "a statement takes effect once if it is recorded as done, and else not at all";
const UNKNOWN: &str = "no statement in a transaction ends unknown while the database stands";
const PLANNED: &str = "a statement ends as its SQL says";
const CANCELLED: &str = "what somebody was told is cancelled is recorded so";
const CAPACITY: &str = "no pool exceeds its capacity";
const TURNS: &str = "a user's jobs start first in the order in which they were handed in";
/// What a look at all keys finds.
pub const KEYS: &str = "every key that is left has an owner";
const DONE: &str = "a task that is recorded as done was done at least once, and ends as it says";
const ATTEMPTS: &str =
    "a task is begun once, and again for each error and each time that its worker or its process was lost";
const OWNER: &str = "a task has the result of the worker that its record names";
const POISONED: &str = "a task that kills its workers is set aside after as many as the configuration says";
const BLAMED: &str = "no other task is set aside with it";
const PROCESSES: &str = "no process of a handler outlives its worker";

/// How long before a job was acknowledged a fault still meets it: some of them last.
const REACH: Duration = Duration::from_secs(10);

/// What whoever caused the faults knows of them.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    /// Where it was.
    pub stage: &'a Stage,
    /// The database's crashes.
    pub crashes: &'a [(Instant, Instant)],
    /// When faults of which kind began.
    pub struck: &'a [(Instant, &'static str)],
    /// The workers that were there at the end.
    pub alive: &'a [String],
}

impl Seen<'_> {
    /// The kinds of the faults that may have met a job.
    fn in_its_life(&self, acknowledged: Instant, ended: Instant) -> Vec<&'static str> {
        let met = |(at, _): &&(Instant, &str)| *at + REACH >= acknowledged && *at <= ended;
        self.struck.iter().filter(met).map(|(_, kind)| *kind).collect()
    }
}

/// The processes of handlers whose worker is gone.
pub fn of_processes(stage: &Stage) -> Option<Violation> {
    // The kernel kills them in its own time.
    let end = Instant::now() + REACH;
    while !stage.orphans().is_empty() {
        if Instant::now() > end {
            return Some(Violation::new(PROCESSES, format!("{:?} run", stage.orphans())));
        }
        thread::sleep(Duration::from_millis(50));
    }
    None
}

/// What the database holds of the run.
#[derive(Debug, Default)]
pub struct Effects {
    /// Names of the executions that committed, by job and step.
    by_step: HashMap<(String, String), Vec<String>>,
    crowds: Vec<(String, Vec<String>)>,
}

impl Effects {
    /// Reads them.
    pub fn read(stage: &Stage) -> Result<Self, tokio_postgres::Error> {
        let mut effects = Self::default();
        for row in stage.sql("SELECT job, step, name FROM effects")? {
            let [job, step, name] = row.map_text();
            effects.by_step.entry((job, step)).or_default().push(name);
        }
        for row in stage.sql("SELECT name, array_to_string(others, ' ') FROM crowds")? {
            let [name, others] = row.map_text();
            effects.crowds.push((name, others.split(' ').map(str::to_owned).collect()));
        }
        Ok(effects)
    }

    fn of(&self, job: &str, step: &str) -> &[String] {
        self.by_step.get(&(job.to_owned(), step.to_owned())).map_or(&[], Vec::as_slice)
    }

    /// How many statements took effect.
    pub fn count(&self) -> usize {
        self.by_step.values().map(Vec::len).sum()
    }
}

trait MapText {
    fn map_text<const N: usize>(self) -> [String; N];
}

impl MapText for Vec<Option<String>> {
    fn map_text<const N: usize>(self) -> [String; N] {
        let mut values = self.into_iter();
        std::array::from_fn(|_| values.next().flatten().unwrap_or_default())
    }
}

/// Looks at all jobs.
pub fn of_jobs(watch: &Watch, seen: &Seen<'_>) -> io::Result<(Vec<Violation>, Counts)> {
    let stage = seen.stage;
    let effects = Effects::read(stage).map_err(io::Error::other)?;
    let mut redis = connect(&stage.redis)?;
    let mut violations: Vec<Violation> = Vec::new();
    let mut runs: HashMap<String, Runs> = HashMap::new();
    let losses = Losses::of(stage, seen.alive);
    for line in stage.task_effects() {
        match line.split(' ').collect::<Vec<_>>()[..] {
            [job, _, "begun", worker] => {
                let runs = runs.entry(job.to_owned()).or_default();
                runs.begun += 1;
                runs.workers.insert(stage.name_of(worker).unwrap_or_default());
            }
            [job, _, "done", _] => runs.entry(job.to_owned()).or_default().done += 1,
            [_, _, POISON, _] => {}
            _ => violations.push(Violation::new(DONE, format!("a task wrote {line:?}"))),
        }
    }
    let mut counts = Counts { effects: effects.count(), ..Counts::default() };
    for text in watch.changed() {
        let job = text.split(':').next().unwrap_or_default().to_owned();
        violations.push(Violation::of(&job, TWICE, text));
    }
    let lives = watch.lives();
    let mut starts: BTreeMap<String, Vec<(Instant, String, String)>> = BTreeMap::new();
    for life in &lives {
        let id = &life.job.id;
        let hash = hash(&mut redis, id)?;
        let Some(acknowledged) = life.acknowledged else {
            violations.push(Violation::of(id, LOST, "it could not be handed in, though nothing failed any more"));
            continue;
        };
        if life.ended.is_none() {
            let status = hash.get("status").map_or("no record", String::as_str);
            violations.push(Violation::of(id, LOST, format!("it has {status}")));
            continue;
        }
        *counts.by_status.entry(hash.get("status").cloned().unwrap_or_default()).or_default() += 1;
        if life.job.task().is_some() {
            let runs = runs.remove(id).unwrap_or_default();
            let may_repeat = runs.workers.iter().map(|worker| losses.of_worker(worker)).sum();
            of_task(life, &hash, &runs, may_repeat, seen, &mut violations, &mut counts);
        } else {
            let crashed = seen.crashes.iter().any(|(_, up)| *up >= acknowledged);
            of_statements(life, &hash, &effects, crashed, &mut violations, &mut counts);
        }
        // Of a job that had ended but for its own fallback, that fallback is what was cancelled.
        let cancelled =
            ["status", "fallback_status"].iter().any(|field| hash.get(*field).is_some_and(|s| s == "cancelled"));
        if life.told_cancelled && !cancelled {
            violations.push(Violation::of(id, CANCELLED, format!("it is {:?}", hash.get("status"))));
        }
        if let Some(started) = hash.get("started_at")
            && !life.job.out_of_line()
        {
            starts.entry(life.job.line()).or_default().push((acknowledged, started.clone(), id.clone()));
        }
    }
    for (_, mut starts) in starts {
        starts.sort();
        for pair in starts.windows(2) {
            // Times in ISO 8601 are in the order of their texts.
            if pair[0].1 > pair[1].1 {
                let (earlier, later) = (&pair[0], &pair[1]);
                let found = format!("it started at {}, and {} after it at {}", earlier.1, later.2, later.1);
                violations.push(Violation::of(&earlier.2, TURNS, found));
            }
        }
    }
    violations.extend(rules::unique_keys(&mut redis, &lives)?);
    for (name, others) in &effects.crowds {
        let committed = |name: &String| effects.by_step.values().any(|names| names.contains(name));
        if committed(name) && others.iter().all(committed) {
            let found = format!("{name} worked beside {others:?}");
            violations.push(Violation::of(name.split(':').nth(1).unwrap_or_default(), CAPACITY, found));
        }
    }
    counts.jobs = lives.len();
    Ok((violations, counts))
}

/// What was counted on the way.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Jobs handed in.
    pub jobs: usize,
    /// Their final statuses.
    pub by_status: BTreeMap<String, usize>,
    /// Statements that took effect.
    pub effects: usize,
    /// Statements in a transaction that ended `unknown` after a crash of the database.
    pub unknown: usize,
    /// Statements outside of transactions that ended so.
    pub unknown_bare: usize,
    /// Tasks, by what runs them.
    pub tasks: BTreeMap<&'static str, usize>,
    /// Tasks that kill their workers.
    pub poisons: usize,
    /// How often tasks were begun, and done.
    pub runs: Runs,
    /// Statements and tasks that were to succeed and were failed by a fault.
    pub failed_by_faults: BTreeMap<String, usize>,
}

/// How often something was begun and done.
#[derive(Clone, Debug, Default)]
pub struct Runs {
    /// Begun.
    pub begun: usize,
    /// Done.
    pub done: usize,
    /// By these workers.
    pub workers: BTreeSet<String>,
}

/// How often what a worker had begun may have been begun again: when it was gone or told to stop, when its handlers were killed,
/// and when it could not reach Redis for a session's lifetime, which it says itself.
struct Losses(HashMap<String, usize>);

impl Losses {
    fn of(stage: &Stage, alive: &[String]) -> Self {
        let cut_off = |line: &&String| line.contains("could not be confirmed") || line.contains("the session is lost");
        let mut losses = HashMap::new();
        for (worker, lines) in stage.said() {
            let gone = usize::from(!alive.contains(&worker));
            let count = gone + lines.iter().filter(cut_off).count() + stage.handlers_killed(&worker);
            losses.insert(worker, count);
        }
        Self(losses)
    }

    fn of_worker(&self, worker: &str) -> usize {
        self.0.get(worker).copied().unwrap_or_default()
    }
}

fn of_task(
    life: &Life,
    hash: &Hash,
    runs: &Runs,
    may_repeat: usize,
    seen: &Seen<'_>,
    violations: &mut Vec<Violation>,
    counts: &mut Counts,
) {
    let (id, deed) = (&life.job.id, life.job.deed());
    *counts.tasks.entry(life.job.task().map_or("", Handler::op)).or_default() += 1;
    counts.runs.begun += runs.begun;
    counts.runs.done += runs.done;
    let text = |name: &str| hash.get(name).map_or("", String::as_str);
    let number = |name: &str| text(name).parse().unwrap_or(0);
    let reason = text("failed_reason");
    let planned = reason.contains("planned");
    let faults = match (life.acknowledged, &life.ended) {
        (Some(acknowledged), Some((_, ended))) => seen.in_its_life(acknowledged, *ended),
        _ => Vec::new(),
    };
    let is_killed = ["the program was ended by SIGKILL", "the command was ended by SIGKILL"];
    let killed = is_killed.iter().any(|words| reason.starts_with(words)) && faults.contains(&HANDLERS_KILLED);
    let right = match (text("status"), deed) {
        (status, Deed::Poison) => status == "ignored",
        ("done", Deed::Fail) => false,
        ("done", _) => runs.done >= 1,
        ("failed", Deed::Fail) => planned || killed,
        // It had one attempt.
        ("failed", _) => killed && life.job.max_attempts.is_none(),
        ("ignored", _) => reason.starts_with("set aside"),
        ("cancelled", _) => life.job.cancel_after.is_some(),
        _ => false,
    };
    if !right || (deed == Deed::Fail && runs.done > 0) {
        let found = format!("it is {:?} because of {reason:?}, and was done {} times", text("status"), runs.done);
        violations.push(Violation::of(id, DONE, found));
    }
    if killed {
        *counts.failed_by_faults.entry(reason.chars().take(90).collect()).or_default() += 1;
    }
    let unclean = number("unclean");
    if deed == Deed::Poison {
        counts.poisons += 1;
        if runs.begun > MAX_UNCLEAN || unclean != MAX_UNCLEAN {
            let found = format!("it was begun {} times, and its record counts {unclean} lost workers", runs.begun);
            violations.push(Violation::of(id, POISONED, found));
        }
    } else if text("status") == "ignored" && (unclean < MAX_UNCLEAN || may_repeat < MAX_UNCLEAN) {
        let found =
            format!("{unclean} lost workers are counted, and {may_repeat} were lost that had begun it: {reason}");
        violations.push(Violation::of(id, BLAMED, found));
    }
    let pids = |text: &str| text.chars().filter(char::is_ascii_digit).collect::<String>();
    let (worker, result) = (text("worker"), pids(text("result")));
    if text("status") == "done" && worker.split(':').nth(1) != Some(&result) {
        let of = seen.stage.name_of(&result).unwrap_or_default();
        violations.push(Violation::of(id, OWNER, format!("it names {worker}, and the result is of {of} ({result})")));
    }
    let errors = number("attempts");
    if runs.begun > 1 + errors + may_repeat {
        let found = format!(
            "it was begun {} times, with {errors} errors and {may_repeat} losses of {:?}",
            runs.begun, runs.workers
        );
        violations.push(Violation::of(id, ATTEMPTS, found));
    }
}

/// The statuses of a job's statements by step, as the record has them.
fn statuses(hash: &Hash) -> HashMap<String, (String, String)> {
    let text = |value: Option<&Json>| value.and_then(Json::as_str).unwrap_or_default().to_owned();
    let field = |name: &str| hash.get(name).cloned().unwrap_or_default();
    let (status, reason) = (field("status"), field("failed_reason"));
    let mut all = HashMap::new();
    let query = hash.get("query").map(String::as_str).unwrap_or_default();
    let parsed: Json = serde_json::from_str(query).unwrap_or_default();
    let list = parsed.get("query").unwrap_or(&parsed);
    let own = field("fallback_status");
    if let Some(entries) = list.as_array() {
        for (at, entry) in entries.iter().enumerate() {
            let (main, reason) = (text(entry.get("status")), text(entry.get("failed_reason")));
            all.insert(format!("{at}.{}", follows(&main)), (text(entry.get("fallback_status")), reason.clone()));
            all.insert(at.to_string(), (main, reason));
        }
    } else {
        all.insert("0".into(), (status.clone(), reason.clone()));
    }
    all.insert(follows(&status).into(), (own, reason));
    all
}

/// Which of its fallbacks a status calls for.
fn follows(status: &str) -> &'static str {
    match status {
        "done" => "onsuccess",
        "failed" => "onerror",
        _ => "none",
    }
}

fn of_statements(
    life: &Life,
    hash: &Hash,
    effects: &Effects,
    crashed: bool,
    violations: &mut Vec<Violation>,
    counts: &mut Counts,
) {
    let id = &life.job.id;
    let statuses = statuses(hash);
    for step in life.job.steps() {
        let (status, reason) = statuses.get(&step.name).cloned().unwrap_or_default();
        let count = effects.of(id, &step.name).len();
        let bare = step.deed == Deed::Vacuum;
        let allowed = match status.as_str() {
            "done" if !bare => 1..=1,
            "unknown" => 0..=1,
            // It may have been committed before its worker heard of that.
            "cancelled" if life.job.cancelled_plainly && life.told_cancelled => 0..=1,
            _ => 0..=0,
        };
        if !allowed.contains(&count) {
            let found = format!("step {} is {status:?} and took effect {count} times", step.name);
            violations.push(Violation::of(id, EFFECTS, found));
        }
        match status.as_str() {
            "unknown" if bare => counts.unknown_bare += 1,
            "unknown" if crashed => counts.unknown += 1,
            "unknown" => violations.push(Violation::of(id, UNKNOWN, format!("step {}: {reason}", step.name))),
            "done" if step.deed == Deed::Fail => {
                violations.push(Violation::of(id, PLANNED, format!("step {} was to fail and is done", step.name)));
            }
            "failed" if step.deed != Deed::Fail => {
                // Names and numbers differ from one to the next.
                let kind: String = reason.chars().filter(|c| !c.is_ascii_digit()).take(90).collect();
                *counts.failed_by_faults.entry(kind).or_default() += 1;
            }
            "running" => {
                violations.push(Violation::of(
                    id,
                    LOST,
                    format!("step {} is said to run in a final record", step.name),
                ));
            }
            _ => {}
        }
    }
}

/// All that is known of a job, for whoever has to find out.
pub fn account(stage: &Stage, watch: &Watch, id: &str) -> String {
    let mut text = format!("  job {id}\n");
    let at = |when: &Instant| when.saturating_duration_since(stage.begin()).as_secs_f64();
    if let Some(life) = watch.lives().into_iter().find(|life| life.job.id == id) {
        let _ = writeln!(text, "    plan: {:?}", life.job);
        let acknowledged = life.acknowledged.map(|when| format!("{} acknowledged", at(&when)));
        let mut moves: Vec<(Instant, String)> = life.notes.clone();
        moves.extend(
            life.claims.iter().map(|(fence, session, when)| (*when, format!("claimed by {session}, fence {fence}"))),
        );
        moves.extend(life.ended.map(|(record, when)| (when, format!("ended: {record:?}"))));
        moves.sort();
        let _ = writeln!(text, "    {}", acknowledged.unwrap_or("never acknowledged".into()));
        for (when, what) in moves {
            let _ = writeln!(text, "    {:9.3} s {what}", at(&when));
        }
    }
    match connect(&stage.redis).and_then(|mut redis| hash(&mut redis, id)) {
        Ok(hash) => {
            for (field, value) in hash {
                let _ = writeln!(text, "    {field}: {value}");
            }
        }
        Err(error) => drop(writeln!(text, "    its hash can't be read: {error}")),
    }
    for line in stage.task_effects().iter().filter(|line| line.starts_with(&format!("{id} "))) {
        let _ = writeln!(text, "    task: {line}");
    }
    match stage.sql(&format!("SELECT step, name FROM effects WHERE job = '{id}'")) {
        Ok(rows) => drop(writeln!(text, "    effects: {rows:?}")),
        Err(error) => drop(writeln!(text, "    its effects can't be read: {error}")),
    }
    let said = stage.said_of(&format!("job={id} "));
    for line in &said {
        let _ = writeln!(text, "    {line}");
    }
    text
}
