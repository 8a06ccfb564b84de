//! Flows under the same faults, and what must be true of them.
//!
//! A user launches flows of random shapes by `drayman flow`, whose steps are tasks, statements and steps in chunks. Some steps fail; some
//! executions are stopped and gone on with, and some instances are launched a second time while they run.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::random::Random;
use super::stage::{self, Stage, connect};
use super::state::{self, status};
use super::verdict::Violation;
use super::workload::APP;
use super::{HAND_IN_LIMIT, Run};
use crate::process::{Daemon, bin};

/// The database that steps name.
pub const DATABASE: &str = "flows";
/// How many users launch flows.
pub const USERS: usize = 1;
/// Most executions of one user that are not over.
const OPEN_PER_USER: usize = 3;
/// Items of a step in chunks, and how many are in a chunk.
const ITEMS: usize = 12;
const CHUNK: usize = 5;

const OVER: &str = "an acknowledged execution of a flow has an end";
const TURNS: &str = "a step runs if what it comes after has ended so, and else does not";
const ENDS: &str = "an execution ends as its steps have";
const ONCE: &str = "a step that is done has taken effect: a statement once, an item once, a task at least once";
const ALONE: &str = "an instance has one execution at a time";

/// The tables in which steps leave their effects.
pub const SCHEMA: &str =
    "CREATE TABLE flow_steps (job text); CREATE TABLE flow_items (instance text, step text, n int);";

/// What a step does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    Task,
    Failing,
    Statement,
    Chunks,
}

/// A flow to launch; its steps are called `s0`, `s1`, ….
#[derive(Clone, Debug)]
struct Plan {
    id: String,
    user: String,
    pause: Duration,
    steps: Vec<(Deed, Vec<usize>, &'static str)>,
    /// When it is stopped, and gone on with.
    stop_after: Option<Duration>,
    /// When its instance is launched under another id.
    rival_after: Option<Duration>,
}

impl Plan {
    fn of(seed: u64, user: usize, number: u64) -> Self {
        let mut random = Random::of(seed, &[11, user as u64, number]);
        let count = random.between(1, 7) as usize;
        let steps = (0..count).map(|at| {
            let deed = [Deed::Task, Deed::Failing, Deed::Statement, Deed::Chunks][random.weighted(&[4, 2, 3, 2])];
            let before = if at == 0 { 0 } else { random.between(0, 3.min(at as u64 + 1)) };
            let mut after: Vec<usize> = (0..before).map(|_| random.between(0, at as u64) as usize).collect();
            after.sort_unstable();
            after.dedup();
            let on = if after.is_empty() { "done" } else { ["done", "failed", "ended"][random.weighted(&[6, 2, 2])] };
            (deed, after, on)
        });
        let steps = steps.collect();
        Self {
            id: format!("f{user}-{number}"),
            user: format!("flows-{user}"),
            pause: random.ms(0, 1_500),
            steps,
            stop_after: random.chance(40).then(|| random.ms(0, 700)),
            rival_after: random.chance(30).then(|| random.ms(0, 700)),
        }
    }

    fn text(&self) -> String {
        let mut text = "name = \"chaos\"\nparams.instance = { type = \"string\" }\n".to_owned();
        for (number, (deed, after, on)) in self.steps.iter().enumerate() {
            let names: Vec<String> = after.iter().map(|at| format!("\"s{at}\"")).collect();
            let names = names.join(", ");
            let ms = 60 * (number + 1);
            let task = |deed| {
                format!(
                    "kind = \"task\"\napp = \"{APP}\"\nop = \"program\"\ninput = {{ deed = \"{deed}\", ms = {ms} }}"
                )
            };
            let work = match deed {
                Deed::Task => task("done"),
                Deed::Failing => task("fail"),
                Deed::Statement => format!(
                    "kind = \"sql\"\ndatabase = \"{DATABASE}\"\nquery = \"INSERT INTO flow_steps VALUES (<%= job_id %>)\""
                ),
                Deed::Chunks => {
                    let items: Vec<String> = (0..ITEMS).map(|n| format!("{{ n = {n} }}")).collect();
                    format!(
                        "kind = \"chunk\"\nchunk_size = {CHUNK}\nreader = {{ kind = \"list\", items = [{}] }}\n\
                         writer = {{ kind = \"sql\", database = \"{DATABASE}\", \
                         query = \"INSERT INTO flow_items VALUES (<%= instance %>, 's{number}', :n)\" }}",
                        items.join(", ")
                    )
                }
            };
            let on = if after.is_empty() { String::new() } else { format!("on = \"{on}\"\n") };
            let _ = write!(text, "[[steps]]\nname = \"s{number}\"\nafter = [{names}]\n{on}max_attempts = 12\n{work}\n");
        }
        text
    }
}

/// What is known of an instance.
#[derive(Clone, Debug)]
struct Known {
    plan: Plan,
    /// Ids under which it was launched, or may have been.
    ids: Vec<String>,
    acknowledged: HashSet<String>,
}

/// All flows of a run.
#[derive(Debug, Default)]
pub struct Flows(Mutex<BTreeMap<String, Known>>);

impl Flows {
    fn with(&self, id: &str, change: impl FnOnce(&mut Known)) {
        if let Some(known) = self.0.lock().expect("no thread panics").get_mut(id) {
            change(known);
        }
    }

    fn executions(&self, user: Option<&str>) -> Vec<String> {
        let flows = self.0.lock().expect("no thread panics");
        let of = flows.values().filter(|known| user.is_none_or(|user| known.plan.user == user));
        of.flat_map(|known| known.ids.clone()).collect()
    }

    /// The ids of executions that there are, and of the jobs of their steps.
    pub fn ids(&self, stage: &Stage) -> io::Result<Vec<String>> {
        let mut redis = connect(&stage.redis)?;
        let mut ids = Vec::new();
        for id in self.executions(None) {
            if status(&mut redis, &id)?.is_some() {
                ids.extend(state::jobs_of(&mut redis, &format!("{id}:"))?);
                ids.push(id);
            }
        }
        Ok(ids)
    }

    /// Those of them that have not ended.
    pub fn open(&self, stage: &Stage, user: Option<&str>) -> io::Result<Vec<String>> {
        let mut redis = connect(&stage.redis)?;
        let mut open = Vec::new();
        for id in self.executions(user) {
            if status(&mut redis, &id)?.is_some_and(|status| !is_over(&status)) {
                open.push(id);
            }
        }
        Ok(open)
    }
}

fn is_over(status: &str) -> bool {
    ["done", "failed", "cancelled"].contains(&status)
}

/// A step as `drayman flow steps` tells of it.
#[derive(Clone, Debug, Deserialize)]
struct Step {
    name: String,
    job: String,
    after: Vec<String>,
    on: String,
    status: String,
    from: Option<String>,
    error: Option<String>,
}

/// What was counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Executions.
    pub executions: usize,
    /// Those that were done.
    pub done: usize,
    /// Those that failed.
    pub failed: usize,
    /// Those that were stopped.
    pub stopped: usize,
    /// Executions that went on from others.
    pub went_on: usize,
    /// Steps that are done.
    pub steps: usize,
    /// Steps that were not to fail, and did.
    pub failed_by_faults: usize,
}

impl Run<'_> {
    /// Launches one user's flows, one after the other.
    pub(super) fn flow_user<'scope>(&'scope self, user: usize, scope: &'scope thread::Scope<'scope, '_>) {
        for number in 0.. {
            let plan = Plan::of(self.options.seed, user, number);
            self.wait(plan.pause);
            // While Redis is away, nothing more is handed in.
            let is_full =
                || self.flows.open(&self.stage, Some(&plan.user)).map_or(true, |open| open.len() >= OPEN_PER_USER);
            while !self.is_closed() && is_full() {
                thread::sleep(Duration::from_millis(100));
            }
            if !self.is_wanted() {
                return;
            }
            let file = self.stage.folder().join(format!("{}.toml", plan.id));
            fs::write(&file, plan.text()).expect("a file of ours");
            let known = Known { plan: plan.clone(), ids: vec![plan.id.clone()], acknowledged: HashSet::new() };
            self.flows.0.lock().expect("no thread panics").insert(plan.id.clone(), known);
            self.launch(&plan, &plan.id);
            if plan.stop_after.is_some() || plan.rival_after.is_some() {
                scope.spawn(move || self.trouble(&plan));
            }
        }
    }

    /// Stops an execution and goes on with it, and launches the instance beside it.
    fn trouble(&self, plan: &Plan) {
        if let Some(after) = plan.rival_after {
            self.wait(after);
            self.launch(plan, &format!("{}-x", plan.id));
        }
        if let Some(after) = plan.stop_after {
            self.wait(after);
            // It may be over, or another execution may have gone on.
            self.flow(&["stop", &plan.id], &[0, 4]);
            let is_open = || connect(&self.stage.redis).and_then(|mut redis| status(&mut redis, &plan.id));
            let begun = Instant::now();
            while is_open().map_or(true, |status| status.is_some_and(|status| !is_over(&status)))
                && begun.elapsed() < HAND_IN_LIMIT
            {
                thread::sleep(Duration::from_millis(100));
            }
            self.launch(plan, &format!("{}-r", plan.id));
        }
    }

    fn launch(&self, plan: &Plan, id: &str) {
        self.flows.with(&plan.id, |known| {
            if !known.ids.iter().any(|known| known == id) {
                known.ids.push(id.to_owned());
            }
        });
        let file = self.stage.folder().join(format!("{}.toml", plan.id)).display().to_string();
        let instance = format!("instance={}", plan.id);
        let args = ["launch", &file, "--user", &plan.user, "--id", id, "-p", &instance];
        // An instance that runs, or is done, is refused.
        let allowed: &[i32] = if id == plan.id { &[0] } else { &[0, 4] };
        if self.flow(&args, allowed) == Some(0) {
            self.flows.with(&plan.id, |known| _ = known.acknowledged.insert(id.to_owned()));
        }
    }

    /// A command of `drayman flow`, again and again until it answers.
    fn flow(&self, args: &[&str], allowed: &[i32]) -> Option<i32> {
        let url = self.stage.clients_url();
        let all: Vec<&str> =
            ["flow", args[0], "--redis-url", &url].into_iter().chain(args[1..].iter().copied()).collect();
        let env = [("DRAYMAN_REDIS__COMMAND_TIMEOUT", "1s"), ("DRAYMAN_REDIS__CONNECT_TIMEOUT", "1s")];
        let mut calm_since: Option<Instant> = None;
        loop {
            let program = Daemon::spawn(bin("drayman"), &all, &env);
            match self.until_it_ends(&program, self.stage.take_kill(1)) {
                None | Some(5) => {}
                Some(code) if allowed.contains(&code) => return Some(code),
                Some(code) => {
                    let found = format!("{all:?} ended with {code}: {}", program.output());
                    self.complain(Violation::new("a producer tells what it may", found));
                    return None;
                }
            }
            match calm_since {
                _ if !self.is_calm() => calm_since = None,
                None => calm_since = Some(Instant::now()),
                Some(since) if since.elapsed() > HAND_IN_LIMIT => return None,
                Some(_) => {}
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Looks at all executions once nothing is left to do.
    pub(super) fn judge_flows(&self) -> (Vec<Violation>, Counts) {
        let (mut violations, mut counts) = (Vec::new(), Counts::default());
        let counted = |sql: &str| -> HashMap<String, Vec<usize>> {
            let rows = self.stage.sql(sql).expect("nothing fails any more").into_iter();
            let row = |row: Vec<Option<String>>| {
                let mut texts = row.into_iter().flatten();
                Some((texts.next()?, texts.filter_map(|count| count.parse().ok()).collect()))
            };
            rows.filter_map(row).collect()
        };
        let items = "SELECT what, count(*)::text, min(times)::text, max(times)::text FROM \
                     (SELECT instance || ' ' || step AS what, n, count(*) AS times FROM flow_items GROUP BY 1, 2) AS t GROUP BY 1";
        let effects = Effects {
            statements: counted("SELECT job, count(*)::text FROM flow_steps GROUP BY 1"),
            items: counted(items),
            tasks: self.stage.flow_effects().into_iter().collect(),
        };
        for known in self.flows.0.lock().expect("no thread panics").values() {
            for (promise, found) in self.judge_instance(known, &effects, &mut counts) {
                violations.push(Violation { promise, job: None, found: format!("{}: {found}", known.plan.id) });
            }
        }
        (violations, counts)
    }

    fn judge_instance(&self, known: &Known, effects: &Effects, counts: &mut Counts) -> Vec<(&'static str, String)> {
        let mut found = Vec::new();
        let mut redis = connect(&self.stage.redis).expect("nothing fails any more");
        let mut lives: Vec<(String, String, String)> = Vec::new();
        // Of each step how often it was done, and whether it ever was not.
        let mut runs: HashMap<usize, (usize, bool)> = HashMap::new();
        for id in &known.ids {
            let hash = state::hash(&mut redis, id).expect("it answers");
            let text = |name: &str| hash.get(name).map_or("", String::as_str).to_owned();
            if hash.is_empty() {
                if known.acknowledged.contains(id) {
                    found.push((OVER, format!("{id} is gone")));
                }
                continue;
            }
            let status = text("status");
            if !is_over(&status) {
                found.push((OVER, format!("{id} is {status:?}")));
                continue;
            }
            counts.executions += 1;
            *match &*status {
                "done" => &mut counts.done,
                "failed" => &mut counts.failed,
                _ => &mut counts.stopped,
            } += 1;
            counts.went_on += usize::from(!text("goes_on_from").is_empty());
            lives.push((text("created_at"), text("ended_at"), id.clone()));
            let steps = self.steps_of(id);
            self.judge_steps(id, &status, !text("stop_requested_at").is_empty(), &steps, &mut found);
            for step in &steps {
                let number: usize = step.name[1..].parse().expect("s0, s1, …");
                let (deed, ..) = known.plan.steps[number];
                counts.steps += usize::from(step.status == "done" && step.from.is_none());
                let is_planned = step.error.as_ref().is_some_and(|error| error.contains("planned"));
                counts.failed_by_faults += usize::from(step.status == "failed" && !is_planned);
                let of_step = runs.entry(number).or_default();
                of_step.0 += usize::from(step.status == "done" && step.from.is_none());
                of_step.1 |= step.from.is_none() && ["failed", "cancelled"].contains(&&*step.status);
                let is_run = step.from.is_none() && ["done", "failed", "cancelled"].contains(&&*step.status);
                let begun = effects.tasks.contains(&format!("{} begun", step.job));
                let ended = effects.tasks.contains(&format!("{} done", step.job));
                let statements = effects.statements.get(&step.job).map_or(0, |counts| counts[0]);
                let right = match (deed, &*step.status) {
                    (Deed::Failing, "done") => false,
                    (Deed::Task, "done") => ended,
                    (Deed::Statement, "done") => statements == 1,
                    (Deed::Statement, _) if is_run => statements <= 1,
                    _ => is_run || step.from.is_some() || (!begun && statements == 0),
                };
                if !right {
                    let told = format!(
                        "{id}: {step:?} was to be {deed:?}: begun {begun}, ended {ended}, {statements} effects"
                    );
                    found.push((ONCE, told));
                }
            }
        }
        for (number, (deed, ..)) in known.plan.steps.iter().enumerate().filter(|(_, (deed, ..))| *deed == Deed::Chunks)
        {
            // One that follows a failure, or any end, is run by each execution.
            let (done, is_left) = runs.get(&number).copied().unwrap_or_default();
            let key = format!("{} s{number}", known.plan.id);
            let [different, least, most] =
                effects.items.get(&key).map_or([0; 3], |counts| [counts[0], counts[1], counts[2]]);
            let least = if different == ITEMS { least } else { 0 };
            if least < done || most > done + usize::from(is_left) {
                let times = format!("{different} items, each {least} to {most} times");
                found.push((
                    ONCE,
                    format!("s{number} to {deed:?} was done {done} times, and once not {is_left}: {times}"),
                ));
            }
        }
        lives.sort();
        for pair in lives.windows(2) {
            if pair[0].1 > pair[1].0 {
                found.push((ALONE, format!("{pair:?}")));
            }
        }
        found
    }

    /// Whether each step had its turn, and the end is that of the steps.
    fn judge_steps(
        &self,
        id: &str,
        status: &str,
        is_stopped: bool,
        steps: &[Step],
        found: &mut Vec<(&'static str, String)>,
    ) {
        let state = |name: &String| steps.iter().find(|step| step.name == *name).map_or("", |step| &*step.status);
        for step in steps.iter().filter(|step| step.from.is_none()) {
            let before: Vec<&str> = step.after.iter().map(state).collect();
            let has = |states: &[&str]| before.iter().any(|before| states.contains(before));
            let is_open = has(&["waiting", "pending", "scheduled", "running"]);
            let is_turn = match &*step.on {
                "ended" => true,
                "failed" => has(&["failed"]),
                _ => !has(&["failed", "cancelled"]) && (has(&["done"]) || before.is_empty()),
            };
            let right = match &*step.status {
                "waiting" => is_stopped,
                "skipped" => !is_open && !is_turn,
                "done" | "failed" | "cancelled" => !is_open && is_turn,
                _ => false,
            };
            if !right {
                found.push((TURNS, format!("{id}: {step:?}, behind {before:?}")));
            }
        }
        let has = |wanted: &str| steps.iter().any(|step| step.status == wanted);
        let is_forgiven = |failed: &Step| {
            let follows =
                |step: &&Step| step.on == "failed" && step.status == "done" && step.after.contains(&failed.name);
            steps.iter().any(|step| follows(&step))
        };
        let wanted = if has("cancelled") || has("waiting") {
            "cancelled"
        } else if steps.iter().any(|step| step.status == "failed" && !is_forgiven(step)) {
            "failed"
        } else {
            "done"
        };
        if status != wanted {
            found.push((ENDS, format!("{id} is {status}, and by its steps {wanted}: {steps:?}")));
        }
    }

    fn steps_of(&self, id: &str) -> Vec<Step> {
        let url = self.stage.redis.url_db(stage::DB);
        let program = Daemon::spawn(bin("drayman"), &["flow", "steps", "--redis-url", &url, "--json", id], &[]);
        program.wait();
        program.output().lines().map(|line| serde_json::from_str(line).expect("a step is JSON")).collect()
    }
}

/// What the steps have left behind.
struct Effects {
    /// By jobs, how many there are.
    statements: HashMap<String, Vec<usize>>,
    /// By instances and steps, how many different ones there are, and how often each at least and at most.
    items: HashMap<String, Vec<usize>>,
    /// `<job> begun`, `<job> done`.
    tasks: HashSet<String>,
}
