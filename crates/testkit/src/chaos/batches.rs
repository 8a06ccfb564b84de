//! Batches of rows under the same faults, and what must be true of them.
//!
//! Some users hand in batches by `drayman batch`: at once, or held, appended to and released; for a program that writes output
//! files, or for a statement. Some rows fail, are skipped, want another attempt or end their process; some batches are aborted.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::random::Random;
use super::stage::{self, Stage, connect};
use super::state;
use super::verdict::Violation;
use super::workload::{APP, HOSTS};
use super::{HAND_IN_LIMIT, Run};
use crate::process::{Daemon, bin};

/// The operation of the handler that works on rows.
pub const OP: &str = "rows";
/// How many users hand in batches.
pub const USERS: usize = 2;
/// Most batches of one user that are not over.
const OPEN_PER_USER: usize = 3;

const COUNTS: &str = "the rows of a batch are its rows done, failed and aborted";
const ROWS: &str = "each row of a batch has one end, and it is that of its line";
const ONCE: &str = "a row for a statement takes effect once if it is done, and not at all if it failed";
const FILES: &str = "the files of a batch are the texts of its rows that are done, in the order of their lines";
const TOLD: &str = "every end of a batch is told at least once, and none that it did not have";
const OVER: &str = "an acknowledged batch has an end";

/// What a row does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    Done,
    Fail,
    Skip,
    /// It wants another attempt after its first.
    Retry,
    /// Its process ends at its first attempt.
    Exit,
}

impl Deed {
    fn word(self) -> &'static str {
        match self {
            Deed::Done => "done",
            Deed::Fail => "fail",
            Deed::Skip => "skip",
            Deed::Retry => "retry",
            Deed::Exit => "exit",
        }
    }
}

/// A batch to hand in.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Its id.
    pub id: String,
    user: String,
    pause: Duration,
    /// Where its statement runs: a host, and whether through the proxy. None for a program.
    statement: Option<(usize, bool)>,
    /// The deeds of its rows; row `n` is that of line `n + 1`.
    deeds: Vec<Deed>,
    /// How many of the rows come with the submission; the others are appended.
    submitted: usize,
    abort_after: Option<Duration>,
}

impl Batch {
    fn plan(seed: u64, user: usize, number: u64) -> Self {
        let mut random = Random::of(seed, &[7, user as u64, number]);
        let statement = random.chance(35).then(|| (random.between(0, HOSTS.len() as u64) as usize, random.chance(50)));
        let count = [random.between(1, 30), random.between(30, 400), 0][random.weighted(&[4, 6, 1])] as usize;
        let deed = |random: &mut Random| match (random.weighted(&[900, 40, 30, 25, 5]), statement) {
            (1, _) => Deed::Fail,
            (2, None) => Deed::Skip,
            (3, None) => Deed::Retry,
            (4, None) => Deed::Exit,
            _ => Deed::Done,
        };
        let deeds: Vec<Deed> = (0..count).map(|_| deed(&mut random)).collect();
        let submitted = if count > 1 && random.chance(40) { random.between(1, count as u64) as usize } else { count };
        Self {
            id: format!("b{user}-{number}"),
            user: format!("batches-{user}"),
            pause: random.ms(0, 1_500),
            statement,
            deeds,
            submitted,
            abort_after: random.chance(20).then(|| random.ms(0, 3_000)),
        }
    }

    fn is_held(&self) -> bool {
        self.submitted < self.deeds.len()
    }

    /// Rows as lines of JSON, each on the line of its number: blank lines stand for those before.
    fn text(&self, rows: std::ops::Range<usize>) -> String {
        let blank = "\n".repeat(rows.start);
        rows.fold(blank, |mut text, n| {
            let row = json!({ "batch": self.id, "n": n, "deed": self.deeds[n].word() });
            writeln!(text, "{row}").expect("a text grows");
            text
        })
    }
}

/// What is known of a batch.
#[derive(Clone, Debug)]
struct Known {
    batch: Batch,
    acknowledged: bool,
    abort_asked: bool,
}

/// All batches of a run.
#[derive(Debug, Default)]
pub struct Batches(Mutex<BTreeMap<String, Known>>);

impl Batches {
    fn with(&self, id: &str, change: impl FnOnce(&mut Known)) {
        if let Some(known) = self.0.lock().expect("no thread panics").get_mut(id) {
            change(known);
        }
    }

    /// The ids of those that were handed in, and those of the jobs by which their ends are told.
    pub fn ids(&self) -> Vec<String> {
        let batches = self.0.lock().expect("no thread panics");
        let told = |known: &Known| known.batch.statement.is_none().then(|| format!("{}:done", known.batch.id));
        batches.values().flat_map(|known| [Some(known.batch.id.clone()), told(known)]).flatten().collect()
    }

    /// Those of them that have not ended, with how many rows of them have not.
    pub fn open(&self, stage: &Stage) -> io::Result<Vec<String>> {
        open_of(&self.ids(), stage)
    }

    fn open_of(&self, user: &str, stage: &Stage) -> usize {
        let ids: Vec<String> = {
            let batches = self.0.lock().expect("no thread panics");
            batches.values().filter(|known| known.batch.user == user).map(|known| known.batch.id.clone()).collect()
        };
        // While Redis is away, nothing more is handed in.
        open_of(&ids, stage).map_or(OPEN_PER_USER, |open| open.len())
    }
}

fn open_of(ids: &[String], stage: &Stage) -> io::Result<Vec<String>> {
    let mut redis = connect(&stage.redis)?;
    let mut open = Vec::new();
    for id in ids {
        if !state::status(&mut redis, id)?.is_some_and(|status| is_over(&status)) {
            let left = state::field(&mut redis, id, "left")?.unwrap_or_default();
            open.push(format!("{id} {left}").trim_end().to_owned());
        }
    }
    Ok(open)
}

fn is_over(status: &str) -> bool {
    ["done", "failed", "cancelled"].contains(&status)
}

/// How often the rows of batches took effect in the database.
type Effects = HashMap<(String, usize), usize>;

/// What was counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Batches handed in.
    pub batches: usize,
    /// Batches that were aborted.
    pub aborted: usize,
    /// Rows by their ends.
    pub done: usize,
    /// Rows that failed.
    pub failed: usize,
    /// Rows that were aborted.
    pub rows_aborted: usize,
    /// Rows that a program began.
    pub begun: usize,
    /// Rows that were to be done and were failed by a fault.
    pub failed_by_faults: usize,
    /// Output files.
    pub files: usize,
    /// How often ends were told.
    pub told: usize,
}

impl Run<'_> {
    /// Hands in one user's batches, one after the other.
    pub(super) fn batch_user<'scope>(&'scope self, user: usize, scope: &'scope thread::Scope<'scope, '_>) {
        for number in 0.. {
            let batch = Batch::plan(self.options.seed, user, number);
            self.wait(batch.pause);
            while !self.is_closed() && self.batches.open_of(&batch.user, &self.stage) >= OPEN_PER_USER {
                thread::sleep(Duration::from_millis(100));
            }
            if !self.is_wanted() {
                return;
            }
            let known = Known { batch: batch.clone(), acknowledged: false, abort_asked: false };
            self.batches.0.lock().expect("no thread panics").insert(batch.id.clone(), known);
            if self.hand_in_batch(&batch) {
                self.batches.with(&batch.id, |known| known.acknowledged = true);
            }
            if let Some(after) = batch.abort_after {
                scope.spawn(move || {
                    self.wait(after);
                    self.batches.with(&batch.id, |known| known.abort_asked = true);
                    self.until_done(&["abort", &batch.id], None);
                });
            }
        }
    }

    fn hand_in_batch(&self, batch: &Batch) -> bool {
        let file = |name: &str, rows| {
            let path = self.stage.folder().join(format!("{}.{name}.jsonl", batch.id));
            fs::write(&path, batch.text(rows)).expect("a file of ours");
            path
        };
        let submitted = file("submit", 0..batch.submitted);
        let mut args = vec!["submit", "--user", &batch.user, "--id", &batch.id, "--max-attempts", "12"];
        let port = batch.statement.map(|(_, proxied)| self.stage.database(proxied).port().to_string());
        match (&batch.statement, &port) {
            (Some((host, _)), Some(port)) => args.extend([
                "--statement",
                "SELECT row_of(:batch, :n, :deed)",
                "--host",
                HOSTS[*host],
                "--port",
                port,
                "--dbname",
                stage::DATABASE,
                "--dbuser",
                "postgres",
            ]),
            _ => args.extend(["--app", APP, "--op", OP]),
        }
        if batch.is_held() {
            args.push("--held");
        }
        let is_there = self.until_done(&args, Some(&submitted));
        if !is_there || !batch.is_held() {
            return is_there;
        }
        let appended = file("append", batch.submitted..batch.deeds.len());
        self.until_done(&["append", &batch.id, "--key", "the rest"], Some(&appended))
            && self.until_done(&["release", &batch.id], None)
    }

    /// A command of `drayman batch`, again and again until it says that it is done; false if it never does.
    fn until_done(&self, args: &[&str], file: Option<&Path>) -> bool {
        let url = self.stage.clients_url();
        let mut all: Vec<String> = ["batch", args[0], "--redis-url", &url].map(str::to_owned).to_vec();
        all.extend(args[1..].iter().map(|arg| (*arg).to_owned()));
        all.extend(file.map(|file| file.display().to_string()));
        let env = [("DRAYMAN_REDIS__COMMAND_TIMEOUT", "1s"), ("DRAYMAN_REDIS__CONNECT_TIMEOUT", "1s")];
        let mut calm_since: Option<Instant> = None;
        loop {
            let program = Daemon::spawn(bin("drayman"), &all, &env);
            match self.until_it_ends(&program, self.stage.take_kill(1)) {
                Some(0) => return true,
                None | Some(5) => {}
                Some(code) => {
                    let found = format!("{all:?} ended with {code}: {}", program.output());
                    self.complain(Violation::new("a producer tells what it may", found));
                    return false;
                }
            }
            match calm_since {
                _ if !self.is_calm() => calm_since = None,
                None => calm_since = Some(Instant::now()),
                Some(since) if since.elapsed() > HAND_IN_LIMIT => return false,
                Some(_) => {}
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Looks at all batches once nothing is left to do.
    pub(super) fn judge_batches(&self) -> (Vec<Violation>, Counts) {
        let (mut violations, mut counts) = (Vec::new(), Counts::default());
        let lines = self.stage.batch_effects();
        let told = told(&lines);
        let effects = self.stage.sql("SELECT batch, n::text, count(*)::text FROM rows GROUP BY 1, 2");
        let effects: Effects = effects
            .expect("nothing fails any more")
            .into_iter()
            .filter_map(|row| <[Option<String>; 3]>::try_from(row).ok())
            .filter_map(|[batch, n, count]| Some(((batch?, n?.parse().ok()?), count?.parse().ok()?)))
            .collect();
        counts.begun = lines.iter().filter(|line| line.starts_with("row ")).count();
        for known in self.batches.0.lock().expect("no thread panics").values() {
            let no_ends = Vec::new();
            let told = told.get(&known.batch.id).unwrap_or(&no_ends);
            for (promise, found) in self.judge_batch(known, told, &effects, &mut counts) {
                violations.push(Violation { promise, job: Some(known.batch.id.clone()), found });
            }
        }
        (violations, counts)
    }

    fn judge_batch(
        &self,
        known: &Known,
        told: &[String],
        effects: &Effects,
        counts: &mut Counts,
    ) -> Vec<(&'static str, String)> {
        let Known { batch, acknowledged, abort_asked } = known;
        let mut found = Vec::new();
        let mut redis = connect(&self.stage.redis).expect("nothing fails any more");
        let hash = state::hash(&mut redis, &batch.id).expect("it answers");
        if hash.is_empty() && !acknowledged {
            return found;
        }
        let text = |name: &str| hash.get(name).map_or("", String::as_str);
        let number = |name: &str| text(name).parse::<usize>().unwrap_or(0);
        let status = text("status");
        if !is_over(status) {
            return vec![(OVER, format!("it is {status:?}"))];
        }
        counts.batches += 1;
        counts.aborted += usize::from(status == "cancelled");
        let (rows, done, failed, aborted) = (number("rows"), number("done"), number("failed"), number("aborted"));
        if rows != done + failed + aborted || rows != batch.deeds.len() || number("left") != 0 {
            // An abort may come between the submission and the rows that are appended.
            if !(*abort_asked && rows == batch.submitted && rows == done + failed + aborted) {
                found.push((
                    COUNTS,
                    format!("{rows} rows, {done} done, {failed} failed, {aborted} aborted of {}", batch.deeds.len()),
                ));
            }
        }
        let wanted = if status == "cancelled" {
            "cancelled"
        } else if failed > 0 {
            "failed"
        } else {
            "done"
        };
        if status != wanted || (aborted > 0 && status != "cancelled") || (status == "cancelled" && !abort_asked) {
            found.push((COUNTS, format!("it is {status}, with {failed} rows failed and {aborted} aborted")));
        }

        let exported = self.ask_drayman(&["export", &batch.id]);
        let mut ends = BTreeMap::<&str, usize>::new();
        let mut files = BTreeMap::<&str, String>::new();
        let mut count = 0;
        for (n, line) in exported.lines().enumerate() {
            count += 1;
            let row: Value = serde_json::from_str(line).expect("an exported row is JSON");
            let deed = batch.deeds.get(n).copied().unwrap_or(Deed::Done);
            let end = row["status"].as_str().unwrap_or_default().to_owned();
            let is_its_own = row["line"] == json!(n + 1) && row["input"]["n"] == json!(n);
            let result_fits =
                batch.statement.is_some() || row["result"] == if end == "done" { json!(n) } else { json!(null) };
            let right = match (end.as_str(), deed) {
                ("aborted", _) => *abort_asked,
                ("skipped", deed) => deed == Deed::Skip,
                ("done", deed) => !matches!(deed, Deed::Fail | Deed::Skip),
                ("failed", Deed::Fail) => true,
                ("failed", _) => {
                    counts.failed_by_faults += 1;
                    // All its attempts met faults, or as many workers ended with it in hand as may.
                    true
                }
                _ => false,
            };
            if !is_its_own || !right || !result_fits {
                found.push((ROWS, format!("row {n} was to {deed:?}: {row}")));
            }
            *ends
                .entry(if end == "failed" {
                    "failed"
                } else if end == "aborted" {
                    "aborted"
                } else {
                    "done"
                })
                .or_default() += 1;
            if batch.statement.is_some() {
                let took = effects.get(&(batch.id.clone(), n)).copied().unwrap_or(0);
                let allowed = match end.as_str() {
                    "done" => 1..=1,
                    // Its transaction may have been under way.
                    "aborted" => 0..=1,
                    _ => 0..=0,
                };
                if !allowed.contains(&took) {
                    found.push((ONCE, format!("row {n} is {end} and took effect {took} times")));
                }
            } else if end == "done" {
                let name = if n % 2 == 0 { "even" } else { "odd/rows" };
                writeln!(files.entry(name).or_default(), "{}", n + 1).expect("a text grows");
            }
        }
        let of = |end: &str| ends.get(end).copied().unwrap_or(0);
        if count != rows || (of("done"), of("failed"), of("aborted")) != (done, failed, aborted) {
            found.push((
                COUNTS,
                format!("{count} rows exported, {ends:?}; its record says {done}, {failed}, {aborted} of {rows}"),
            ));
        }
        counts.done += done;
        counts.failed += failed;
        counts.rows_aborted += aborted;

        let listed = self.ask_drayman(&["files", &batch.id, "--json"]);
        let listed: Vec<Value> = listed.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        let names: Vec<&str> = listed.iter().filter_map(|file| file["name"].as_str()).collect();
        if names != files.keys().copied().collect::<Vec<_>>() {
            found.push((FILES, format!("there are {names:?}, and rows wrote {:?}", files.keys())));
        } else {
            for (name, wanted) in &files {
                counts.files += 1;
                let text = self.ask_drayman(&["files", &batch.id, "--get", name]);
                if text.trim_end() != wanted.trim_end() {
                    found.push((FILES, format!("{name:?} holds {text:?} instead of {wanted:?}")));
                }
            }
        }
        counts.told += told.len();
        if batch.statement.is_none() && (told.is_empty() || told.iter().any(|told| told != status)) {
            found.push((TOLD, format!("it is {status}, and that was told: {told:?}")));
        }
        found
    }

    fn ask_drayman(&self, args: &[&str]) -> String {
        let url = self.stage.redis.url_db(stage::DB);
        let mut all = vec!["batch", args[0], "--redis-url", &url];
        all.extend(&args[1..]);
        let objects = self.stage.objects_url();
        let program = Daemon::spawn(bin("drayman"), &all, &[("DRAYMAN_OBJECTS__URL", &objects)]);
        program.wait();
        program.output()
    }
}

/// The ends that were told, by batch.
fn told(lines: &[String]) -> HashMap<String, Vec<String>> {
    let mut told = HashMap::<String, Vec<String>>::new();
    for line in lines {
        if let ["end", batch, status] = line.split(' ').collect::<Vec<_>>()[..] {
            told.entry(batch.to_owned()).or_default().push(status.to_owned());
        }
    }
    told
}
