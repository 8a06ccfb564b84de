//! Hostile submissions that nobody has thought of: each field that a script reads, with each value that is none, in a hash of each kind;
//! the same while such a job runs, and in records that our own scripts have made; keys of other types; kinds that change while a job runs;
//! jobs that have the id of a part, of a step; random hashes. Whatever it is, Redis answers, no script does more than its jobs are worth, the
//! books balance, none of it is left unlooked at, and the jobs of somebody beside it are taken in their turn, run and end.
//!
//! What fails stands in `generated.txt`, which may only shrink: an input that is listed there and passes fails the test, too.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use queue_core::Store;
use queue_core::batch::work::end_fields;
use queue_core::batch::{Batches, NewBatch};
use queue_core::calls::{Fields, Submission, Verdict};
use queue_core::cancel::Canceller;
use queue_core::config::{Limits, RedisConfig};
use queue_core::flow::{Flows, LaunchOptions};
use queue_core::ids::{App, JobId, Op, SessionId, User};
use queue_core::library::Library;
use queue_core::model::batch::{Part, Row, RowEnd, RowResult};
use queue_core::model::flow::{Flow, Step};
use queue_core::reconcile;
use queue_core::retry::Retrier;
use queue_core::session::{Claim, Session};

use testkit::RedisServer;

use crate::support::*;

const KINDS: [&str; 7] = ["", "sql", "task", "batch", "part", "flow", "odd"];
const VALUES: [&str; 8] = ["-1", "0", "1.5", "1e18", "99999999999999999999", "", "text", LARGE];
/// Stands for a text of that size.
const LARGE: &str = "4 MiB";
/// What scripts read as more than a number or a word, and what nearly is.
const SHAPES: [&str; 10] = [
    "0 0 0 1",
    "99999999999999999999 0 0 1",
    "rows b 0.0 0 4000000000",
    "rows b 0.0 0 5 partial",
    "files b",
    "done b",
    "9 9 9 1",
    "running",
    "done",
    "b",
];
/// How many inputs are tried at once, and by how many users.
const TOGETHER: usize = 200;
const EVES: usize = 16;
/// What has these ids is somebody's batch, flow, part or step.
const TAKEN_IDS: [&str; 7] = ["b", "b:0.0:0", "b:cut", "b:done", "f", "f:one", "f:two"];
/// The most commands that all scripts together may do for one input, and for what stands beside them.
const COMMANDS_EACH: u64 = 600;
const COMMANDS_BESIDE: u64 = 30_000;
const POOLS: &str = "sql:* db:* app.op bank.post etl.step";
const KEEP: Duration = Duration::from_secs(7_200);
/// Jobs of somebody beside them, and which turn in its pool each has.
const CANARIES: [(&str, usize); 3] = [("canary-foreign", 1), ("canary-native", 2), ("canary-task", 1)];

/// What somebody does who may write the open layout and nothing else.
struct Stranger<'a>(&'a Rig);

impl Stranger<'_> {
    fn edit(&self, id: &str, field: &str, value: &[u8]) {
        self.ignoring_the_type(&[b"HSET", job_key(id).as_bytes(), field.as_bytes(), value]);
    }

    fn push(&self, user: &str, id: &str) {
        self.0.redis(&["LPUSH", &queue_key(user), id]);
        self.0.redis(&["SADD", "batch:indexes:queue", user]);
    }

    fn limit(&self, user: &str, field: &str, value: &[u8]) {
        self.ignoring_the_type(&[b"HSET", format!("limits:batch:{user}").as_bytes(), field.as_bytes(), value]);
    }

    /// Makes a key of another type of a job's, or of its user's limits.
    fn replace(&self, id: &str, user: &str, kind: &str) {
        for key in [job_key(id), format!("limits:batch:{user}")] {
            self.0.redis(&["DEL", &key]);
            match kind {
                "string" => self.0.redis(&["SET", &key, "x"]),
                "list" => self.0.redis(&["RPUSH", &key, "x"]),
                "set" => self.0.redis(&["SADD", &key, "x"]),
                "zset" => self.0.redis(&["ZADD", &key, "1", "x"]),
                _ => self.0.redis(&["XADD", &key, "*", "x", "x"]),
            };
        }
    }

    fn ignoring_the_type(&self, args: &[&[u8]]) {
        self.0.server.raw_db(DB, args);
    }
}

/// What is wrong with one job.
#[derive(Debug, Clone)]
enum Wrong {
    /// Fields of its hash.
    Fields(Vec<(String, String)>),
    /// A field of its user's limits.
    Limit(String, String),
    /// Its key is of this type.
    Type(&'static str),
    /// Once it runs it is of this kind.
    Becomes(&'static str),
    /// Its id is somebody else's.
    Id(&'static str),
}

#[derive(Debug, Clone)]
struct Input {
    /// As it stands in the list of those that fail.
    name: String,
    kind: String,
    wrong: Wrong,
}

impl Input {
    fn id(&self, at: usize) -> String {
        if let Wrong::Id(id) = self.wrong { id.into() } else { format!("hostile-{at}") }
    }

    fn user(&self, at: usize) -> String {
        if matches!(self.wrong, Wrong::Limit(..)) { format!("limited{at}") } else { format!("eve{}", at % EVES) }
    }

    /// Whether its user is paused, or is allowed none at a time.
    fn may_wait(&self) -> bool {
        matches!(&self.wrong, Wrong::Limit(limit, text) if limit == "paused" || (limit == "concurrency" && text == "0"))
    }

    fn submit(&self, stranger: &Stranger<'_>, at: usize) {
        let (id, user) = (self.id(at), self.user(at));
        let mut fields = vec![("user", user.as_str()), ("status", "pending"), ("query", "select 1"), ("host", "h")];
        if !self.kind.is_empty() {
            fields.push(("kind", &self.kind));
        }
        if self.kind == "task" || (at.is_multiple_of(2) && ["batch", "part"].contains(&self.kind.as_str())) {
            fields.extend([("app", "app"), ("op", "op")]);
        }
        for (name, value) in fields {
            stranger.edit(&id, name, value.as_bytes());
        }
        if !matches!(self.wrong, Wrong::Becomes(_)) {
            self.spoil(stranger, &id, &user);
        }
        stranger.push(&user, &id);
    }

    fn spoil(&self, stranger: &Stranger<'_>, id: &str, user: &str) {
        match &self.wrong {
            Wrong::Fields(fields) => fields.iter().for_each(|(name, text)| stranger.edit(id, name, &value(text))),
            Wrong::Limit(name, text) => stranger.limit(user, name, &value(text)),
            Wrong::Type(kind) => stranger.replace(id, user, kind),
            Wrong::Becomes(kind) => stranger.edit(id, "kind", kind.as_bytes()),
            Wrong::Id(_) => {}
        }
    }
}

fn value(text: &str) -> Vec<u8> {
    if text == LARGE { vec![b'9'; 4 << 20] } else { text.into() }
}

/// Names of fields of hashes in the text of the scripts: what stands in quotes in a command on a hash, or in a table of names.
fn fields_of_scripts() -> BTreeSet<String> {
    const COMMANDS: [&str; 9] =
        ["'HGET'", "'HMGET'", "'HSTRLEN'", "'HSET'", "'HSETNX'", "'HDEL'", "'HEXISTS'", "'HINCRBY'", "short("];
    let texts = [Library::ours().text.as_str()];
    let is_name = |word: &&str| word.len() > 1 && word.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
    let quoted =
        |text: &str| text.split('\'').skip(1).step_by(2).filter(is_name).map(str::to_owned).collect::<Vec<_>>();
    let mut names = BTreeSet::new();
    for text in texts {
        for command in COMMANDS {
            for (at, _) in text.match_indices(command) {
                let mut depth = 1;
                let rest = &text[at + command.len()..];
                let end = rest.find(|byte| {
                    depth += i32::from(byte == '(') - i32::from(byte == ')');
                    depth == 0
                });
                names.extend(quoted(&rest[..end.unwrap_or(0)]));
            }
        }
        // Tables in capitals: `NAMES = {'a', 'b'}` and `SIZES = {a = 1}`.
        for (at, _) in text.match_indices(" = {") {
            if text[..at].ends_with(|byte: char| byte.is_ascii_uppercase()) {
                let table = &text[at + 4..][..text[at + 4..].find('}').unwrap_or(0)];
                names.extend(quoted(table));
                let keyed = table.split(',').filter_map(|entry| Some(entry.split_once(" = ")?.0.trim()));
                names.extend(keyed.filter(is_name).map(str::to_owned));
            }
        }
    }
    for known in
        ["user", "status", "kind", "part", "cursor", "unclean", "fence", "weight", "timeout", "flow_step", "keep"]
    {
        assert!(names.contains(known), "{known} is not found in the scripts: {names:?}");
    }
    names
}

fn inputs() -> Vec<Input> {
    let mut inputs = Vec::new();
    for field in fields_of_scripts() {
        for text in VALUES {
            for kind in KINDS {
                // One of that size says as much as seven.
                if text == LARGE && kind != KINDS[field.len() % KINDS.len()] {
                    continue;
                }
                let name = format!("{field} {text:?} in kind {kind:?}");
                let wrong = Wrong::Fields(vec![(field.clone(), text.to_owned())]);
                inputs.push(Input { name, kind: kind.into(), wrong });
            }
        }
    }
    for field in ["timeout", "weight", "concurrency", "rate", "period", "paused"] {
        for text in VALUES {
            let wrong = Wrong::Limit(field.into(), text.into());
            inputs.push(Input { name: format!("limit {field} {text:?}"), kind: "sql".into(), wrong });
        }
    }
    for of in ["string", "list", "set", "zset", "stream"] {
        inputs.push(Input { name: format!("a {of}"), kind: "sql".into(), wrong: Wrong::Type(of) });
    }
    for kind in KINDS {
        for later in KINDS.into_iter().filter(|later| *later != kind) {
            let name = format!("kind {kind:?} that becomes {later:?}");
            inputs.push(Input { name, kind: kind.into(), wrong: Wrong::Becomes(later) });
        }
        for id in TAKEN_IDS {
            inputs.push(Input { name: format!("kind {kind:?} as {id}"), kind: kind.into(), wrong: Wrong::Id(id) });
        }
    }
    inputs
}

/// Numbers that look random, the same for the same seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, most: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % most
    }

    fn of<'a>(&mut self, texts: &[&'a str]) -> &'a str {
        texts[self.below(texts.len())]
    }
}

fn random_inputs(seed: u64, count: usize) -> Vec<Input> {
    let mut dice = Dice(seed);
    let fields: Vec<String> = fields_of_scripts().into_iter().collect();
    let input = |at: usize, dice: &mut Dice| {
        let wrong = (0..1 + dice.below(8)).map(|_| {
            let shaped = dice.below(3) == 0;
            let text = if shaped { dice.of(&SHAPES) } else { dice.of(&VALUES[..7]) };
            (fields[dice.below(fields.len())].clone(), text.to_owned())
        });
        let wrong = Wrong::Fields(wrong.collect());
        Input { name: format!("random {seed} {at}: {wrong:?}"), kind: dice.of(&KINDS).into(), wrong }
    };
    (0..count).map(|at| input(at, &mut dice)).collect()
}

/// The names of those that fail, each with why: many are tried at once, and halves of them where they fail.
async fn failing(inputs: &[Input]) -> BTreeMap<String, String> {
    let mut failing = BTreeMap::new();
    for together in inputs.chunks(TOGETHER) {
        let Err(why) = try_all(together).await else { continue };
        eprintln!("{} inputs: {why}", together.len());
        let halves = match together {
            [one] => BTreeMap::from([(one.name.clone(), why)]),
            many => {
                let (left, right) = many.split_at(many.len() / 2);
                let mut halves = Box::pin(self::failing(left)).await;
                halves.extend(Box::pin(self::failing(right)).await);
                halves
            }
        };
        // None of them alone, and still: it takes several.
        if halves.is_empty()
            && let Err(why) = try_all(together).await
        {
            let name = format!("{} and {} behind it", together[0].name, together.len() - 1);
            failing.insert(name, why);
        }
        failing.extend(halves);
    }
    failing
}

/// With a server of its own: one that a script has hung is killed with it.
async fn try_all(inputs: &[Input]) -> Result<(), String> {
    let inputs = inputs.to_vec();
    let tried = tokio::spawn(async move {
        let server = RedisServer::start();
        // So long is no script at work, and no server without the time for an answer.
        let patient = RedisConfig { command_timeout: Duration::from_secs(30), ..config(server.url_db(DB)) };
        let store = Store::connect(&patient).await.expect("the server answers");
        round(&Rig { server, store }, &inputs).await
    });
    tried.await.unwrap_or_else(|panicked| Err(panicked.to_string()))
}

/// One life of all these, with a canary and records of ours beside them; why it is not as it must be.
async fn round(rig: &Rig, inputs: &[Input]) -> Result<(), String> {
    let said = |what: &str, error: &dyn std::fmt::Display| format!("{what}: {error}");
    let stranger = Stranger(rig);
    let (session, lost) = (rig.session(POOLS, 8).await, rig.session(POOLS, 8).await);
    let before = commands(rig);
    ours(rig).await;
    for (at, input) in inputs.iter().enumerate() {
        input.submit(&stranger, at);
    }
    rig.submit("ann", CANARIES[0].0, "h");
    let task = Fields::new().with("kind", "task").with("app", "app").with("op", "op").with("input", "1");
    let task =
        Submission { id: JobId::new(CANARIES[2].0).unwrap(), fields: task, ..submission("ann", CANARIES[2].0, "h") };
    rig.store.enqueue(&most(64, 16_384), &[submission("ann", CANARIES[1].0, "h"), task]).await.unwrap();
    look(rig).await.map_err(|error| said("a look", &error))?;

    // Some are cancelled, by many in a call; some lose their worker.
    let some = |every: usize| -> Vec<JobId> {
        (0..inputs.len()).step_by(every).map(|at| JobId::new(inputs[at].id(at)).unwrap()).collect()
    };
    let canceller = Canceller::new(rig.store.clone(), KEEP);
    canceller.cancel_many(&some(7)).await.map_err(|error| said("a cancel", &error))?;
    drop(lost.take(8).await.map_err(|error| said("a take", &error))?);
    let (leadership, leader) = (rig.lead().await, SessionId::new("leader:1:a").unwrap());
    let end = rig.store.session_reclaim(lost.id().as_str(), 0, &leader, leadership.term()).await;
    end.map_err(|error| said("the end of a session", &error))?.map_err(|error| said("the end of a session", &error))?;

    let ran = work_off(&stranger, &session, inputs).await?;
    // Each job of theirs was handed out, ended or refused: none was left because nobody looked.
    let queues = rig.state().queues();
    let waits = |at: usize| queues.values().flatten().any(|id| *id == inputs[at].id(at));
    if let Some(at) = (0..inputs.len()).find(|at| !inputs[*at].may_wait() && waits(*at)) {
        return Err(format!("{} still waits", inputs[at].id(at)));
    }
    Retrier::new(rig.store.clone()).retry(&some(11)).await.map_err(|error| said("a retry", &error))?;
    canceller.cancel_many(&some(3)).await.map_err(|error| said("a cancel", &error))?;
    work_off(&stranger, &session, inputs).await?;
    look(rig).await.map_err(|error| said("a look", &error))?;

    // Each in its turn: all others come first once in each pool, for each turn that its user has had before.
    let limited = inputs.iter().filter(|input| matches!(input.wrong, Wrong::Limit(..))).count();
    let users = EVES + 2;
    for (canary, turns) in CANARIES {
        let status = rig.status_or_none(canary);
        let before: Vec<usize> = (0..ran.len()).filter(|at| ran[*at] == canary).collect();
        if status.as_deref() != Some("done") || before.len() != 1 {
            return Err(format!("{canary} is {status:?} and ran {} times", before.len()));
        }
        let most = turns * users * POOLS.split(' ').count() + limited;
        if before[0] > most {
            return Err(format!("{canary} ran behind {} others, of {most} at most", before[0]));
        }
    }
    let (claims, _) = rig.state().check_books_of_jobs();
    if !claims.is_empty() {
        return Err(format!("claims that nobody has: {claims:?}"));
    }
    let (spent, most) = (commands(rig) - before, COMMANDS_BESIDE + COMMANDS_EACH * inputs.len() as u64);
    if spent > most { Err(format!("{spent} commands, of {most} at most")) } else { Ok(()) }
}

/// A batch and a flow of somebody's.
async fn ours(rig: &Rig) {
    let bob = User::new("bob").unwrap();
    let batch = NewBatch::handler(bob.clone(), App::new("bank").unwrap(), Op::new("post").unwrap());
    let rows: Vec<Row> = (1..=25).map(|line| Row { line, input: b"1".to_vec() }).collect();
    let batches = Batches::new(rig.store.clone(), Limits::default());
    batches.submit(NewBatch { id: JobId::new("b").unwrap(), ..batch }, rows).await.unwrap();
    let flow = Flow::builder("nightly").step(Step::task("one", "etl", "step")).step(Step::task("two", "etl", "step"));
    let options = LaunchOptions { id: Some(JobId::new("f").unwrap()), ..LaunchOptions::default() };
    let flows = Flows::new(rig.store.clone());
    flows.launch(&flow.build().unwrap(), &bob, &Default::default(), options).await.unwrap();
}

/// Takes and ends all there is, some of it not at the first time. What is wrong with a job is written again while it runs, and into
/// what is ours, too. What was run, in its order.
async fn work_off(stranger: &Stranger<'_>, session: &Session, inputs: &[Input]) -> Result<Vec<String>, String> {
    let mut ran: Vec<String> = Vec::new();
    let mut turn = 0;
    for _ in 0..20 * (inputs.len() + 20) {
        let taken = session.take(8).await.map_err(|error| format!("a take: {error}"))?;
        let claims = taken.map_err(|lost| lost.to_string())?.claims;
        if claims.is_empty() {
            return Ok(ran);
        }
        for claim in claims {
            let name = id(&claim).to_owned();
            ran.push(name.clone());
            let times = ran.iter().filter(|ran| **ran == name).count();
            let at = name.strip_prefix("hostile-").and_then(|at| at.parse::<usize>().ok());
            if let Some((at, input)) = at.and_then(|at| Some((at, inputs.get(at)?))) {
                input.spoil(stranger, &name, &input.user(at));
            } else if !CANARIES.iter().any(|(canary, _)| *canary == name) {
                turn += 1;
                for id in [&name, "b", "f"] {
                    if let Wrong::Fields(_) = &inputs[turn % inputs.len()].wrong {
                        inputs[turn % inputs.len()].spoil(stranger, id, "bob");
                    }
                }
            }
            let verdict = match (at.unwrap_or(0) % 4, times) {
                (1, 1) => Verdict::Back,
                (2, 1) => Verdict::Next,
                (3, 1) => Verdict::Later { after_ms: 0 },
                _ => final_verdict(),
            };
            finish(claim, verdict).await?;
        }
    }
    Err("takes find something for ever".into())
}

async fn finish(claim: Claim, verdict: Verdict) -> Result<(), String> {
    let part = claim.job().text("part").map_err(|error| error.to_string())?.map(str::parse);
    let done = Fields::new().with("status", "done");
    let (verdict, fields) = match part {
        Some(Err(fault)) => return Err(format!("{} was handed out: {fault:?}", id(&claim))),
        Some(Ok(Part::Rows(chunk))) => {
            let ends = vec![Some(RowResult::of(RowEnd::Done)); chunk.count];
            (Verdict::Part { keep_ms: KEEP_MS }, end_fields(&ends))
        }
        Some(Ok(Part::Files(_))) => (Verdict::Part { keep_ms: KEEP_MS }, Fields::new().with("files", "{}")),
        Some(Ok(Part::Done(_))) => (final_verdict(), done),
        None if verdict == final_verdict() => (verdict, done),
        None => (verdict, Fields::new()),
    };
    let end = claim.finish(verdict, Duration::from_millis(1), fields, false).await;
    end.map(drop).map_err(|error| format!("a finish: {error}"))
}

/// What the leader does for ever, once.
async fn look(rig: &Rig) -> Result<(), queue_core::Error> {
    let leadership = rig.lead().await;
    scan_index(&leadership).await?;
    leadership.scan_queues().await?.unwrap();
    leadership.upkeep(KEEP).await?.unwrap();
    leadership.clear_wip().await?.unwrap();
    leadership.sweep(KEEP).await?.unwrap();
    reconcile::repair(&rig.store, KEEP).await.map(drop)
}

/// How many commands the server has done, those in scripts among them.
fn commands(rig: &Rig) -> u64 {
    let stats = rig.redis(&["INFO", "commandstats"]).text();
    let calls = stats.lines().filter_map(|line| line.split_once(":calls=")?.1.split(',').next()?.parse::<u64>().ok());
    calls.sum()
}

/// Compares what fails of a part of all inputs with the list.
async fn no_field_does_harm_whatever_it_holds(part: usize) {
    let inputs: Vec<Input> =
        inputs().into_iter().enumerate().filter(|(at, _)| at % PARTS == part).map(|(_, it)| it).collect();
    let ours: BTreeSet<&str> = inputs.iter().map(|input| input.name.as_str()).collect();
    let lines = include_str!("generated.txt").lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    let listed: BTreeSet<&str> = lines.filter(|line| ours.contains(line)).collect();
    let failing = failing(&inputs).await;
    let unlisted: BTreeMap<_, _> = failing.iter().filter(|(name, _)| !listed.contains(name.as_str())).collect();
    assert!(unlisted.is_empty(), "these fail: {unlisted:#?}");
    let passing: Vec<_> = listed.iter().filter(|name| !failing.contains_key(**name)).collect();
    assert!(passing.is_empty(), "these pass now: strike them from generated.txt: {passing:#?}");
}

/// So many that each is over long before a test counts as slow.
const PARTS: usize = 12;

macro_rules! parts {
    ($($name:ident = $part:literal),+) => {
        $(#[tokio::test]
        async fn $name() {
            no_field_does_harm_whatever_it_holds($part).await;
        })+
    };
}

parts! {
    inputs_of_part_0 = 0, inputs_of_part_1 = 1, inputs_of_part_2 = 2, inputs_of_part_3 = 3, inputs_of_part_4 = 4, inputs_of_part_5 = 5,
    inputs_of_part_6 = 6, inputs_of_part_7 = 7, inputs_of_part_8 = 8, inputs_of_part_9 = 9, inputs_of_part_10 = 10, inputs_of_part_11 = 11
}

#[tokio::test]
async fn each_line_of_the_list_names_an_input() {
    let names: BTreeSet<String> = inputs().into_iter().map(|input| input.name).collect();
    let lines = include_str!("generated.txt").lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    let unknown: Vec<&str> = lines.filter(|line| !names.contains(*line)).collect();
    assert!(unknown.is_empty(), "{unknown:#?}");
}

#[tokio::test]
async fn random_hashes_do_no_harm() {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(now);
    println!("SEED={seed}");
    let failing = failing(&random_inputs(seed, 400)).await;
    assert!(failing.is_empty(), "SEED={seed}: {failing:#?}");
}
