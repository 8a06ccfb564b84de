//! Calls that break off. Each function meets an error at each of its commands, one after the other. Where it had written nothing
//! before, nothing has happened; else one comparison of the keys puts right what was left half done, the caller asks again, and all that
//! there is ends.
//!
//! What does not hold yet stands in `breaks.txt`, which may only shrink.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use queue_core::Store;
use queue_core::batch::work::{end_fields, partial_fields};
use queue_core::batch::{Batches, NewBatch};
use queue_core::calls::{Fields, Submission, Verdict};
use queue_core::cancel::Canceller;
use queue_core::config::Limits;
use queue_core::flow::{Flows, LaunchOptions};
use queue_core::ids::{App, JobId, Op, Pool, SessionId, User};
use queue_core::leader::Leadership;
use queue_core::library::{self, Effect, Function, Library, TABLE, Version};
use queue_core::limits::{self, OfUser, Set};
use queue_core::model::batch::{Part, Row, RowEnd, RowResult};
use queue_core::model::flow::{Flow, Step};
use queue_core::reconcile::{self, Fate};
use queue_core::retry::Retrier;
use queue_core::session::{Claim, Session};
use testkit::{Proxy, RedisServer, Value};

use crate::support::*;

const POOLS: &str = "sql:* db:* app.op bank.post etl.step";
const KEEP: Duration = Duration::from_millis(KEEP_MS);

/// Stands before the library: it counts the commands of a call, and has one of them fail. What is written down of each are its name and
/// its key.
const FAULTS: &str = "
local faults = {at = 0, seen = {}}
local real = {
  call = function(...) return redis.call(...) end,
  pcall = function(...) return redis.pcall(...) end,
  error_reply = function(...) return redis.error_reply(...) end,
  acl_check_cmd = function(...) return redis.acl_check_cmd(...) end,
  register_function = redis.register_function,
}
local function fails(command, key)
  faults.seen[#faults.seen + 1] = command .. ' ' .. (key or '')
  return #faults.seen == faults.at
end
real.register_function{function_name = 'faults', callback = function(_, args)
  faults = {at = tonumber(args[1]), seen = {}}
  return 'OK'
end}
real.register_function{function_name = 'faults_seen', callback = function() return faults.seen end}
local redis = {
  call = function(...)
    if fails(...) then error({err = 'ERR an injected fault'}) end
    return real.call(...)
  end,
  pcall = function(...)
    if fails(...) then return {err = 'ERR an injected fault'} end
    return real.pcall(...)
  end,
  error_reply = real.error_reply, acl_check_cmd = real.acl_check_cmd, register_function = real.register_function,
}
";

/// Commands that change nothing.
const READS: &[&str] = &[
    "EXISTS",
    "GET",
    "HEXISTS",
    "HGET",
    "HGETALL",
    "HKEYS",
    "HLEN",
    "HMGET",
    "HSTRLEN",
    "HVALS",
    "LINDEX",
    "LLEN",
    "LPOS",
    "LRANGE",
    "MEMORY",
    "OBJECT",
    "PTTL",
    "PUBSUB",
    "PUBLISH",
    "SCARD",
    "SISMEMBER",
    "SMEMBERS",
    "SMISMEMBER",
    "STRLEN",
    "TIME",
    "TYPE",
    "ZCARD",
    "ZCOUNT",
    "ZRANGE",
    "ZRANGEBYSCORE",
    "ZREVRANGE",
    "ZREVRANGEBYSCORE",
    "ZSCORE",
    "ZMSCORE",
    "SRANDMEMBER",
    "HSCAN",
    "SSCAN",
    "ZSCAN",
];

/// A call of each function that changes what jobs are, by what it does: the word that [`Scene::act`] knows it by.
const CALLS: &[(&str, &Function)] = &[
    ("submit statements", &library::SUBMIT),
    ("submit a task for later", &library::SUBMIT),
    ("admit", &library::ADMIT),
    ("admit when full", &library::ADMIT_WHEN_FULL),
    ("mark ready", &library::MARK_READY),
    ("take", &library::TAKE),
    ("refuse", &library::REFUSE),
    ("update", &library::UPDATE_CLAIMED),
    ("finish", &library::FINISH),
    ("finish a statement", &library::FINISH),
    ("finish for later", &library::FINISH),
    ("finish a chunk", &library::FINISH),
    ("finish a part of a chunk", &library::FINISH),
    ("finish a step", &library::FINISH),
    ("finish several", &library::FINISH),
    ("cancel what waits", &library::CANCEL),
    ("cancel what runs", &library::CANCEL),
    ("cancel what is scheduled", &library::CANCEL),
    ("retry", &library::RETRY),
    ("open a session", &library::SESSION_OPEN),
    ("serve other pools", &library::SESSION_SERVE),
    ("beat", &library::SESSION_BEAT),
    ("end a session", &library::SESSION_END),
    ("lead", &library::LEADER_LEASE),
    ("promote and expire", &library::PROMOTE_AND_EXPIRE),
    ("load a batch", &library::BATCH_LOAD),
    ("release a batch", &library::BATCH_RELEASE),
    ("abort a batch", &library::BATCH_ABORT),
    ("cut a chunk", &library::BATCH_CUT),
    ("launch a flow", &library::FLOW_LAUNCH),
    ("stop a flow", &library::FLOW_STOP),
];

/// Functions whose breaking off is not tried here, each with its reason.
const ELSEWHERE: &[(&Function, &str)] = &[
    (&library::HOST_LOCK, "sets keys with a short life, each for itself"),
    (&library::OLD_QUEUE, "moves ids of an old layout one by one"),
    (&library::PURGE_STALE_JOBS, "removes hashes that nothing refers to, each for itself"),
    (&library::PURGE_IDLE_POOLS, "removes pools that nothing refers to, each for itself"),
    (&library::PURGE_WIP, "removes entries of a foreign list, each for itself"),
    (&library::RECONCILE, "is what puts things right, and goes on where it broke off"),
    (&library::SET_CAPACITIES, "sets fields of pools, each for itself"),
    (&library::SET_LIMITS, "sets fields of one hash, and is repeated by hand"),
    (&library::BATCH_UNLOAD, "takes back rows that were never released; sent again by the loader"),
    (&library::FLOW_ABANDON, "writes the record of a flow of which nothing runs"),
    (&library::SCHEDULE_DUE, "not yet"),
    (&library::SCHEDULE_PASS, "not yet"),
    (&library::SCHEDULE_PUT, "not yet"),
    (&library::SCHEDULE_PAUSE, "not yet"),
    (&library::SCHEDULE_REMOVE, "not yet"),
    (&library::SCHEDULE_TICK, "not yet"),
    (&library::TRACKER_CREATE, "not yet"),
    (&library::TRACKER_START, "not yet"),
    (&library::TRACKER_RENEW, "not yet"),
    (&library::TRACKER_END, "not yet"),
    (&library::TRACKER_SET, "not yet"),
];

type Words = Vec<Vec<u8>>;

/// Work of every kind: some of it runs in one session, some waits, some is scheduled, some has ended.
struct Scene {
    rig: Rig,
    /// What the calls of functions were, in the order in which they were made.
    calls: Arc<Mutex<Vec<Words>>>,
    one: Session,
    claims: BTreeMap<String, Claim>,
    leadership: Leadership,
    _proxy: Proxy,
}

fn job(id: &str) -> JobId {
    JobId::new(id).unwrap()
}

fn bob() -> User {
    User::new("bob").unwrap()
}

fn task(id: &str) -> Submission {
    let fields = Fields::new().with("kind", "task").with("app", "app").with("op", "op").with("input", "1");
    Submission { fields, ..submission("alice", id, "h") }
}

fn rows(count: u64) -> Vec<Row> {
    (1..=count).map(|line| Row { line, input: b"1".to_vec() }).collect()
}

fn batch(id: &str) -> NewBatch {
    NewBatch { id: job(id), ..NewBatch::handler(bob(), App::new("bank").unwrap(), Op::new("post").unwrap()) }
}

fn done(count: usize) -> Vec<Option<RowResult>> {
    vec![Some(RowResult::of(RowEnd::Done)); count]
}

impl Scene {
    async fn build() -> Self {
        let server = RedisServer::start();
        let (header, rest) = Library::ours().text.as_str().split_once('\n').expect("a library says its name");
        let text = format!("{header}\n{FAULTS}{rest}");
        let loaded = server.raw_db(DB, &["FUNCTION", "LOAD", &text]);
        assert!(!matches!(loaded, Value::Error(_)), "{loaded:?}");
        let proxy = Proxy::start(server.addr());
        let calls = Arc::<Mutex<Vec<Words>>>::default();
        let heard = calls.clone();
        proxy.gate(move |words| {
            if words[0].eq_ignore_ascii_case(b"FCALL") {
                heard.lock().unwrap().push(words.to_vec());
            }
            None
        });
        let store = Store::connect(&config(proxy.redis_url(DB))).await.expect("the proxy passes everything");
        let rig = Rig { server, store };

        let one = rig.session(POOLS, 8).await;
        rig.store.enqueue(&most(64, 16_384), &[submission("dave", "ended", "h")]).await.unwrap();
        end(take_one(&one).await, "failed").await;
        let few = OfUser { concurrency: Set::To("6".parse().unwrap()), ..OfUser::default() };
        limits::Limits::new(rig.store.clone()).set_user(&User::new("alice").unwrap(), few).await.unwrap();
        rig.store.enqueue(&most(64, 16_384), &[submission("alice", "running", "h"), task("task")]).await.unwrap();
        let mut claims = take(&one, 2).await;
        let batches = Batches::new(rig.store.clone(), Limits::default());
        batches.submit(batch("batch"), rows(25)).await.unwrap();
        let flows = Flows::new(rig.store.clone());
        let options = LaunchOptions { id: Some(job("flow")), ..LaunchOptions::default() };
        flows.launch(&flow(), &bob(), &Default::default(), options).await.unwrap();
        claims.extend(take(&one, 2).await);
        let claims = claims.into_iter().map(|claim| (id(&claim).to_owned(), claim)).collect();

        let later = Submission { delay_ms: 3_600_000, ..submission("carol", "scheduled", "h") };
        let due = Submission { delay_ms: 3_600_000, ..submission("carol", "due", "h") };
        let waiting = [submission("alice", "waiting", "h"), submission("alice", "waiting-too", "h2")];
        rig.store.enqueue(&most(64, 16_384), &[later, due]).await.unwrap();
        rig.store.enqueue(&most(64, 16_384), &waiting).await.unwrap();
        rig.store.enqueue(&most(64, 16_384), &[task("task-2")]).await.unwrap();
        rig.state().make_due("due");
        rig.submit("erin", "foreign", "h");
        rig.notice(&["erin"]).await;
        rig.submit("frank", "unnoticed", "h");
        batches.submit(NewBatch { held: true, ..batch("held") }, rows(5)).await.unwrap();
        let leadership = rig.lead().await;
        rig.balanced();
        Self { rig, calls, one, claims, leadership, _proxy: proxy }
    }

    fn claim(&mut self, id: &str) -> Claim {
        let known: Vec<String> = self.claims.keys().cloned().collect();
        self.claims.remove(id).unwrap_or_else(|| panic!("{id} does not run: {known:?}"))
    }

    /// Makes a call.
    async fn act(&mut self, what: &str) {
        let store = self.rig.store.clone();
        let canceller = Canceller::new(store.clone(), KEEP);
        let batches = Batches::new(store.clone(), Limits::default());
        match what {
            "submit statements" => {
                let jobs = [submission("gina", "new", "h"), submission("alice", "new-too", "h")];
                store.enqueue(&most(64, 16_384), &jobs).await.map(drop).unwrap();
            }
            "submit a task for later" => {
                let mut task = Submission { delay_ms: 1_000, ..task("new") };
                task.fields = task.fields.with("unique_key", "only").with("unique_ms", "600000");
                store.enqueue(&most(64, 16_384), &[task]).await.map(drop).unwrap();
            }
            "admit" => _ = store.notice(&[b"frank".to_vec()]).await.unwrap(),
            "admit when full" => _ = store.look(&[b"frank".to_vec()]).await.unwrap(),
            "mark ready" => _ = store.place(&[b"alice\tsql:h".to_vec(), b"alice".to_vec()]).await.unwrap(),
            "take" => _ = take(&self.one, 6).await,
            "refuse" => {
                let read = vec![(**self.claim("running").job()).clone()];
                _ = store.refuse(self.one.id(), 2, "it can't be read", &read).await.unwrap();
            }
            "update" => {
                let fields = Fields::new().with("progress", "50");
                self.claim("running").pen().mark(&fields).await.map(drop).unwrap();
            }
            "finish" => _ = end(self.claim("task"), "done").await,
            "finish a statement" => _ = put(self.claim("running"), Verdict::Next).await,
            "finish for later" => _ = put(self.claim("running"), Verdict::Later { after_ms: 5_000 }).await,
            "finish a chunk" => _ = finish(self.claim("batch:0.0:0")).await,
            "finish a part of a chunk" => {
                let claim = self.claim("batch:0.0:0");
                let Part::Rows(chunk) = part(&claim).unwrap() else { panic!("no rows") };
                let mut results = done(chunk.count);
                results[0] = None;
                let fields = partial_fields(&chunk, &results).with("attempts", "1").with("status", "scheduled");
                claim.finish(Verdict::Later { after_ms: 0 }, Duration::ZERO, fields, false).await.map(drop).unwrap();
            }
            "finish a step" => _ = end(self.claim("flow:one"), "done").await,
            "finish several" => {
                let ends: Vec<Claim> = ["running", "task", "flow:one"].map(|id| self.claim(id)).into();
                futures::future::join_all(ends.into_iter().map(|claim| end(claim, "done"))).await;
            }
            "cancel what waits" => _ = canceller.cancel_many(&[job("waiting"), job("foreign")]).await.unwrap(),
            "cancel what runs" => _ = canceller.cancel_many(&[job("running"), job("task")]).await.unwrap(),
            "cancel what is scheduled" => _ = canceller.cancel(&job("scheduled")).await.unwrap(),
            "retry" => _ = Retrier::new(store.clone()).retry(&[job("ended")]).await.unwrap(),
            "open a session" => {
                let id = SessionId::new("other:1:x").unwrap();
                let capacities = [(Pool::new("sql:h").unwrap(), 3)];
                store.session_open(&id, "sql:* bank.post", "other", 1, &capacities).await.map(drop).unwrap();
            }
            "serve other pools" => _ = store.session_serve(self.one.id(), "sql:*").await.unwrap(),
            "beat" => _ = self.one.beat().await.unwrap(),
            "end a session" => _ = store.session_close(self.one.id()).await.unwrap(),
            "lead" => {
                let leader = SessionId::new("leader:1:a").unwrap();
                store.lead(&leader, None).await.map(drop).unwrap();
            }
            "promote and expire" => {
                self.rig.state().move_end("ended", 1);
                _ = self.leadership.upkeep(KEEP).await.unwrap().unwrap();
            }
            "load a batch" => _ = batches.submit(batch("loaded"), rows(3)).await.unwrap(),
            "release a batch" => _ = batches.release(&job("held")).await.unwrap(),
            "abort a batch" => _ = batches.abort(&job("batch")).await.unwrap(),
            "cut a chunk" => {
                let claim = self.claim("batch:0.0:0");
                _ = claim.pen().cut(4, &vec![None; 10]).await.unwrap();
            }
            "launch a flow" => {
                let options = LaunchOptions { id: Some(job("launched")), ..LaunchOptions::default() };
                let flows = Flows::new(store.clone());
                _ = flows.launch(&flow(), &User::new("gina").unwrap(), &Default::default(), options).await.unwrap();
            }
            "stop a flow" => _ = Flows::new(store.clone()).stop(&job("flow")).await.unwrap(),
            other => panic!("nobody knows how to {other}"),
        }
    }

    /// Has the `nth` command of the next calls fail; none where that is 0.
    fn fault(&self, nth: usize) {
        self.rig.redis(&["FCALL", "faults", "0", &nth.to_string()]);
    }

    fn call(&self, words: &Words) -> Value {
        self.rig.server.raw_db(DB, words)
    }

    /// What a leader does all the time.
    async fn round(&self, leadership: &Leadership) -> Result<(), String> {
        let said = |error: queue_core::Error| error.to_string();
        leadership.upkeep(KEEP).await.map_err(said)?.map_err(|_| "nobody leads")?;
        leadership.scan_index().await.map_err(said)?.map_err(|_| "nobody leads")?;
        leadership.scan_queues().await.map_err(said)?.map_err(|_| "nobody leads")?;
        Ok(())
    }

    /// Puts right what was left, has the caller ask again and everything end; says what can't be so.
    async fn heal(&self, words: &Words) -> Result<(), String> {
        let (rig, store) = (&self.rig, &self.rig.store);
        let said = |error: queue_core::Error| error.to_string();
        rig.age();
        let leadership = rig.lead().await;
        reconcile::repair(store, KEEP).await.map_err(said)?;
        self.round(&leadership).await?;
        rig.age();
        let found = reconcile::check(store, KEEP).await.map_err(said)?;
        if let Some(finding) = found.iter().find(|finding| finding.fate != Fate::Reported) {
            return Err(format!("not repaired: {} {}", finding.kind.word(), finding.sentence));
        }
        books(rig)?;
        self.call(words);
        Batches::new(store.clone(), Limits::default())
            .release(&job("held"))
            .await
            .map_err(|error| error.to_string())?;
        let leader = SessionId::new("leader:1:a").unwrap();
        for session in rig.state().sessions() {
            let beat = rig.state().beat(&session);
            _ = store.session_reclaim(&session, beat, &leader, leadership.term()).await.map_err(said)?;
        }
        let worker = rig.session(POOLS, 8).await;
        for _ in 0..40 {
            rig.state().scheduled().iter().for_each(|id| rig.state().make_due(id));
            self.round(&leadership).await?;
            let claims = worker.take(8).await.map_err(said)?.map_err(|lost| lost.to_string())?.claims;
            if claims.is_empty() && rig.state().is_drained() {
                break;
            }
            for claim in claims {
                finish(claim).await?;
            }
        }
        let is_over = |id: &String| matches!(rig.status_or_none(id).as_deref(), Some("done" | "failed" | "cancelled"));
        let unended: Vec<String> = rig.state().jobs().into_iter().filter(|id| !is_over(id)).collect();
        if !unended.is_empty() {
            return Err(format!("never end: {unended:?}"));
        }
        books(rig)
    }
}

fn flow() -> Flow {
    let builder =
        Flow::builder("nightly").step(Step::task("one", "etl", "step")).step(Step::task("two", "etl", "step"));
    builder.build().unwrap()
}

fn part(claim: &Claim) -> Option<Part> {
    claim.job().text("part").unwrap().map(|text| text.parse().expect("a part of a batch"))
}

/// Ends a job as a worker would for which all goes well.
async fn finish(claim: Claim) -> Result<(), String> {
    let (verdict, fields) = match part(&claim) {
        Some(Part::Rows(chunk)) => (Verdict::Part { keep_ms: KEEP_MS }, end_fields(&done(chunk.count))),
        Some(Part::Files(_)) => (Verdict::Part { keep_ms: KEEP_MS }, Fields::new().with("files", "{}")),
        Some(Part::Done(_)) | None => (final_verdict(), Fields::new().with("status", "done")),
    };
    let ended = claim.finish(verdict, Duration::from_millis(1), fields, false).await;
    ended.map(drop).map_err(|error| format!("a finish: {error}"))
}

fn books(rig: &Rig) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(|| rig.balanced())).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        format!("the books: {}", text.unwrap_or_else(|| "they do not balance".into()))
    })
}

/// The command as it stands in the list: without what tells one job or user from another.
fn label(command: &str) -> String {
    let (name, key) = command.split_once(' ').unwrap_or((command, ""));
    let stem: Vec<&str> = key.split(':').take(2).collect();
    format!("{name} {}", stem.join(":"))
}

/// The commands at which the call does not break off as it should, each with what is wrong then.
async fn failing(what: &str, function: &'static Function) -> BTreeMap<String, String> {
    let mut scene = Scene::build().await;
    let state = scene.rig.state();
    scene.calls.lock().unwrap().clear();
    let before = match what {
        // It changes something first by hand.
        "promote and expire" => {
            state.move_end("ended", 1);
            state.save()
        }
        _ => state.save(),
    };
    scene.act(what).await;
    // Nobody has to hear the rest.
    scene.rig.store = Store::connect(&config(scene.rig.server.url_db(DB))).await.expect("the server answers");
    let name = function.qualified(Version::OURS).into_bytes();
    let words = scene.calls.lock().unwrap().iter().rev().find(|words| words[1] == name).cloned();
    let words = words.unwrap_or_else(|| panic!("{what} does not call {}", function.name));
    state.bring_back(&before);
    let digest = scene.rig.dump();
    scene.fault(0);
    let reply = scene.call(&words);
    assert!(!matches!(reply, Value::Error(_)), "{what}: {reply:?}");
    let commands = scene.rig.redis(&["FCALL", "faults_seen", "0"]).texts();
    let mut met: BTreeMap<String, usize> = BTreeMap::new();
    let mut failing = BTreeMap::new();
    // Calls that end at the same write leave the same: one of them is enough.
    let mut known: BTreeMap<Vec<String>, Result<(), String>> = BTreeMap::new();
    for (at, command) in commands.iter().enumerate() {
        let times = met.entry(label(command)).and_modify(|times| *times += 1).or_insert(1);
        let name = format!("{what}: {} #{times}", label(command));
        state.bring_back(&before);
        scene.fault(at + 1);
        let reply = scene.call(&words);
        let seen = scene.rig.redis(&["FCALL", "faults_seen", "0"]).texts();
        scene.fault(0);
        if scene.rig.dump() == digest {
            continue;
        }
        let is_write = |command: &&String| !READS.contains(&command.split(' ').next().unwrap_or_default());
        let written: Vec<String> = seen[..at].iter().filter(is_write).cloned().collect();
        let healed = match reply {
            Value::Error(_) if written.is_empty() => Err("it changed something".to_owned()),
            Value::Error(_) => match known.get(&written) {
                Some(verdict) => verdict.clone(),
                None => {
                    let verdict = scene.heal(&words).await;
                    known.insert(written, verdict.clone());
                    verdict
                }
            },
            _ => scene.heal(&words).await,
        };
        if let Err(why) = healed {
            failing.insert(name, why);
        }
    }
    failing
}

fn listed() -> impl Iterator<Item = &'static str> {
    include_str!("breaks.txt").lines().filter(|line| !line.starts_with('#') && !line.is_empty())
}

/// Compares what fails of some calls with the list.
async fn calls_break_off_as_they_should(part: usize) {
    let ours: Vec<_> = CALLS.iter().enumerate().filter(|(at, _)| at % PARTS == part).map(|(_, call)| call).collect();
    let mut all = BTreeMap::new();
    for (what, function) in &ours {
        all.extend(failing(what, function).await);
    }
    let listed: BTreeSet<&str> =
        listed().filter(|line| ours.iter().any(|(what, _)| line.starts_with(&format!("{what}: ")))).collect();
    let unlisted: BTreeMap<_, _> = all.iter().filter(|(name, _)| !listed.contains(name.as_str())).collect();
    assert!(unlisted.is_empty(), "these fail: {unlisted:#?}");
    let passing: Vec<_> = listed.iter().filter(|name| !all.contains_key(**name)).collect();
    assert!(passing.is_empty(), "these pass now: strike them from breaks.txt: {passing:#?}");
}

const PARTS: usize = 6;

macro_rules! parts {
    ($($name:ident = $part:literal),+) => {
        $(#[tokio::test]
        async fn $name() {
            calls_break_off_as_they_should($part).await;
        })+
    };
}

parts! { calls_of_part_0 = 0, calls_of_part_1 = 1, calls_of_part_2 = 2, calls_of_part_3 = 3, calls_of_part_4 = 4, calls_of_part_5 = 5 }

/// Nobody adds a function without saying what becomes of it half way.
#[test]
fn each_function_that_writes_is_tried_or_has_a_reason() {
    for function in TABLE.iter().filter(|function| function.effect != Effect::Reads) {
        let is_tried = CALLS.iter().any(|(_, tried)| std::ptr::eq(*tried, *function));
        let is_excused = ELSEWHERE.iter().any(|(excused, _)| std::ptr::eq(*excused, *function));
        assert!(is_tried != is_excused, "{}", function.name);
    }
    let unknown: Vec<&str> =
        listed().filter(|line| !CALLS.iter().any(|(what, _)| line.starts_with(&format!("{what}: ")))).collect();
    assert!(unknown.is_empty(), "{unknown:#?}");
}
