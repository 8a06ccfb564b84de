//! Calls that break off. Each function meets an error at each of its commands, one after the other; and the same where a command's key has
//! become one of another type and stays so until the call is over. Where it had written nothing before, nothing has happened; else one
//! comparison of the keys puts right what was left half done, the caller asks again, and all that there is ends.

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
use queue_core::ids::{App, JobId, Op, Pool, ScheduleName, SessionId, User};
use queue_core::leader::Leadership;
use queue_core::library::{self, Effect, Function, Library, TABLE, Version};
use queue_core::limits::{self, OfUser, Set};
use queue_core::model::batch::{Part, Row, RowEnd, RowResult};
use queue_core::model::cron::Cron;
use queue_core::model::flow::{Flow, Step};
use queue_core::reconcile::{self, Fate};
use queue_core::reply::Reply;
use queue_core::retry::Retrier;
use queue_core::schedule::{self, Definition, Missed, Schedules};
use queue_core::session::{Claim, Session};
use testkit::chaos::Random;
use testkit::{Proxy, RedisServer, Value};

use crate::support::*;

const POOLS: &str = "sql:* db:* app.op bank.post etl.step";
const KEEP: Duration = Duration::from_millis(KEEP_MS);

/// Stands before the library: it counts the commands of a call, and has one of them fail. What is written down of each are its name and
/// its key. The clock of such calls stands still, so that what they leave can be compared.
const FAULTS: &str = "
local faults = {at = 0, how = '', seen = {}}
-- They ask nothing of a key's type.
local untyped = {DEL = true, UNLINK = true, EXISTS = true, PEXPIRE = true, PTTL = true, PERSIST = true, TIME = true, PUBLISH = true,
  PUBSUB = true, MEMORY = true, OBJECT = true, SET = true}
local real = {
  call = function(...) return redis.call(...) end,
  pcall = function(...) return redis.pcall(...) end,
  error_reply = function(...) return redis.error_reply(...) end,
  acl_check_cmd = function(...) return redis.acl_check_cmd(...) end,
  register_function = redis.register_function,
}
local function fault_at(command, key)
  faults.seen[#faults.seen + 1] = command .. ' ' .. (key or '')
  local is_it = #faults.seen == faults.at
  if faults.how ~= 'type' then return is_it and {err = 'ERR an injected fault'} end
  if is_it and not untyped[command] then faults.key = key end
  if key == faults.key and not untyped[command] then
    return command == 'TYPE' and {ok = 'string'} or {err = 'WRONGTYPE Operation against a key holding the wrong kind of value'}
  end
end
local function call(how, ...)
  local command, key, ms = ...
  if command == 'TIME' and faults.clock then return faults.clock end
  if not faults.clock then return real[how](...) end
  local args = {...}
  if command == 'PEXPIRE' then args = {'PEXPIREAT', key, string.format('%.0f', faults.clock[1] * 1000 + ms)} end
  for i = 3, command == 'XADD' and #args or 0 do
    if args[i] == '*' then args[i] = faults.clock[1] .. '000-*' end
  end
  return real[how](unpack(args))
end
real.register_function{function_name = 'faults', callback = function(_, args)
  faults = {at = tonumber(args[1]), how = args[2], clock = args[3] and {args[3], args[4]}, seen = {}}
  return 'OK'
end}
real.register_function{function_name = 'faults_seen', callback = function() return faults.seen end}
local redis = {
  call = function(...)
    local fault = fault_at(...)
    if fault and fault.err then error(fault) end
    return fault or call('call', ...)
  end,
  pcall = function(...) return fault_at(...) or call('pcall', ...) end,
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

type Call = (&'static str, &'static Function);

// A call of each function that changes what jobs are, by what it does: the word that [`Scene::act`] knows it by.

const JOBS: &[Call] = &[
    ("submit statements", &library::SUBMIT),
    ("submit a task for later", &library::SUBMIT),
    ("admit", &library::ADMIT),
    ("admit when full", &library::ADMIT_WHEN_FULL),
    ("mark ready", &library::MARK_READY),
    ("take", &library::TAKE),
    ("cancel what waits", &library::CANCEL),
    ("cancel what runs", &library::CANCEL),
    ("retry", &library::RETRY),
];

const ENDS: &[Call] = &[
    ("refuse", &library::REFUSE),
    ("update", &library::UPDATE_CLAIMED),
    ("finish", &library::FINISH),
    ("finish a statement", &library::FINISH),
    ("finish for later", &library::FINISH),
    ("finish several", &library::FINISH),
];

const SESSIONS: &[Call] = &[
    ("open a session", &library::SESSION_OPEN),
    ("serve other pools", &library::SESSION_SERVE),
    ("beat", &library::SESSION_BEAT),
    ("end a session", &library::SESSION_END),
    ("lead", &library::LEADER_LEASE),
    ("promote and expire", &library::PROMOTE_AND_EXPIRE),
];

const BATCHES: &[Call] = &[
    ("finish a chunk", &library::FINISH),
    ("finish a part of a chunk", &library::FINISH),
    ("load a batch", &library::BATCH_LOAD),
    ("release a batch", &library::BATCH_RELEASE),
    ("abort a batch", &library::BATCH_ABORT),
    ("cut a chunk", &library::BATCH_CUT),
];

const ENDS_OF_BATCHES: &[Call] = &[
    ("finish the last chunk", &library::FINISH),
    ("finish the last chunk with files", &library::FINISH),
    ("finish the files", &library::FINISH),
    ("finish what was told", &library::FINISH),
];

const FLOWS: &[Call] = &[
    ("finish a step", &library::FINISH),
    ("launch a flow", &library::FLOW_LAUNCH),
    ("stop a flow", &library::FLOW_STOP),
];

const SCHEDULES: &[Call] = &[
    ("cancel what is scheduled", &library::CANCEL),
    ("put a schedule", &library::SCHEDULE_PUT),
    ("put a schedule anew", &library::SCHEDULE_PUT),
    ("pause a schedule", &library::SCHEDULE_PAUSE),
    ("resume a schedule", &library::SCHEDULE_PAUSE),
    ("remove a schedule", &library::SCHEDULE_REMOVE),
    ("look what is due", &library::SCHEDULE_DUE),
    ("make a tick", &library::SCHEDULE_TICK),
    ("pass a tick", &library::SCHEDULE_PASS),
];

const TRACKERS: &[Call] = &[
    ("create a record", &library::TRACKER_CREATE),
    ("start a record", &library::TRACKER_START),
    ("start a record of a lost holder", &library::TRACKER_START),
    ("renew a lock", &library::TRACKER_RENEW),
    ("end a record", &library::TRACKER_END),
    ("end a record with an error", &library::TRACKER_END),
    ("ignore a record", &library::TRACKER_SET),
];

fn calls() -> Vec<Call> {
    [JOBS, ENDS, SESSIONS, BATCHES, ENDS_OF_BATCHES, FLOWS, SCHEDULES, TRACKERS].concat()
}

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
];

type Words = Vec<Vec<u8>>;

/// Work of every kind: some of it runs in one session, some waits, some is scheduled, some has ended.
struct Scene {
    rig: Rig,
    /// What the calls of functions were, in the order in which they were made.
    calls: Arc<Mutex<Vec<Words>>>,
    one: Session,
    claims: BTreeMap<String, Claim>,
    /// Of tracked jobs.
    fences: BTreeMap<&'static str, String>,
    leadership: Leadership,
    _proxy: Proxy,
}

/// Loads the library, behind [`FAULTS`].
fn load(server: &RedisServer) {
    let (header, rest) = Library::ours().text.as_str().split_once('\n').expect("a library says its name");
    let loaded = server.raw_db(DB, &["FUNCTION", "LOAD", "REPLACE", &format!("{header}\n{FAULTS}{rest}")]);
    assert!(!matches!(loaded, Value::Error(_)), "{loaded:?}");
}

/// Calls a function of the tracker under a lock of the test's own.
async fn track(store: &Store, function: &'static Function, args: &[&str]) -> Reply {
    let args = ["invoices"].iter().chain(args).map(|arg| arg.as_bytes().to_vec()).collect();
    store.call(function, args).await.unwrap()
}

/// The server's clock: ms since 1970, and the µs behind them.
fn clock(rig: &Rig) -> (u64, u64) {
    let parts: Vec<u64> = rig.redis(&["TIME"]).texts().iter().map(|part| part.parse().unwrap()).collect();
    (parts[0] * 1_000 + parts[1] / 1_000, parts[1] % 1_000)
}

fn schedule(name: &str) -> ScheduleName {
    ScheduleName::new(name).unwrap()
}

fn hourly(user: &str) -> Definition {
    Definition {
        cron: Cron::parse("0 * * * *", "UTC").unwrap(),
        missed: Missed::Skip,
        grace: Duration::from_secs(3_600),
        user: User::new(user).unwrap(),
        job: Fields::new().with("host", "h").with("query", "select 1"),
    }
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
        load(&server);
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
        rig.store.enqueue(&most(64, 16_384), &[submission("dave", "ended", "h"), task("over")]).await.unwrap();
        for claim in take(&one, 2).await {
            end(claim, "failed").await;
        }
        let few = OfUser { concurrency: Set::To("6".parse().unwrap()), ..OfUser::default() };
        limits::Limits::new(rig.store.clone()).set_user(&User::new("alice").unwrap(), few).await.unwrap();
        rig.store.enqueue(&most(64, 16_384), &[submission("alice", "running", "h"), task("task")]).await.unwrap();
        let mut claims = take(&one, 2).await;
        let batches = Batches::new(rig.store.clone(), Limits::default());
        batches.submit(batch("batch"), rows(25)).await.unwrap();
        batches.submit(NewBatch { user: User::new("hugo").unwrap(), ..batch("small") }, rows(1)).await.unwrap();
        let flows = Flows::new(rig.store.clone());
        let options = LaunchOptions { id: Some(job("flow")), ..LaunchOptions::default() };
        flows.launch(&flow(), &bob(), &Default::default(), options).await.unwrap();
        claims.extend(take(&one, 3).await);
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
        let schedules = Schedules::new(rig.store.clone());
        for (name, user) in [("later", "carol"), ("ticks", "nina"), ("waits", "alice"), ("rests", "carol")] {
            schedules.put(&schedule(name), &hourly(user), &Limits::default()).await.unwrap();
        }
        schedules.pause(&schedule("rests")).await.unwrap();
        let now = clock(&rig).0;
        ["ticks", "waits"].iter().for_each(|name| rig.state().move_tick(name, now / 60_000 * 60_000));
        for (id, keep) in [("fresh", "0"), ("held", "60000"), ("lost", "0")] {
            track(&rig.store, &library::TRACKER_CREATE, &[id, "pending", "10 20 30 40 50", keep, "{}"]).await;
        }
        let mut fences = BTreeMap::new();
        for (id, lives) in [("held", "3600000"), ("lost", "1")] {
            let reply = track(&rig.store, &library::TRACKER_START, &[id, "a-lock", lives, "2"]).await;
            fences.insert(id, reply.array("start").unwrap()[1].lossy().unwrap());
        }
        rig.balanced();
        Self { rig, calls, one, claims, fences, leadership, _proxy: proxy }
    }

    fn claim(&mut self, id: &str) -> Claim {
        let known: Vec<String> = self.claims.keys().cloned().collect();
        self.claims.remove(id).unwrap_or_else(|| panic!("{id} does not run: {known:?}"))
    }

    /// What has to be done before a call, beside all that is there.
    async fn prepare(&mut self, what: &str) {
        if matches!(what, "finish the files" | "finish what was told") {
            let chunk = self.claim("small:0.0:0");
            match what {
                "finish the files" => finish_with_files(chunk).await,
                _ => finish(chunk).await.unwrap(),
            }
            let others = self.rig.session("bank.post", 8).await;
            self.claims.extend(take(&others, 8).await.into_iter().map(|claim| (id(&claim).to_owned(), claim)));
        }
        if what == "look what is due" {
            self.rig.state().misplace_tick("nobody", 1);
        }
        if what == "mark ready" {
            self.rig.state().lose(Piece::Ready("app.op"));
        }
        if what == "promote and expire" {
            self.rig.state().move_end("ended", 1);
        }
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
            "mark ready" => _ = store.place(&[b"app.op:alice".to_vec()]).await.unwrap(),
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
            "retry" => _ = Retrier::new(store.clone()).retry(&[job("over")]).await.unwrap(),
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
            "finish the last chunk" => finish(self.claim("small:0.0:0")).await.unwrap(),
            "finish the last chunk with files" => finish_with_files(self.claim("small:0.0:0")).await,
            "finish the files" => finish(self.claim("small:files")).await.unwrap(),
            "finish what was told" => finish(self.claim("small:done")).await.unwrap(),
            "put a schedule" => {
                let schedules = Schedules::new(store.clone());
                _ = schedules.put(&schedule("new"), &hourly("carol"), &Limits::default()).await.unwrap();
            }
            "put a schedule anew" => {
                let definition = Definition { grace: Duration::from_secs(5), ..hourly("carol") };
                let schedules = Schedules::new(store.clone());
                _ = schedules.put(&schedule("later"), &definition, &Limits::default()).await.unwrap();
            }
            "pause a schedule" => _ = Schedules::new(store.clone()).pause(&schedule("later")).await.unwrap(),
            "resume a schedule" => _ = Schedules::new(store.clone()).resume(&schedule("rests")).await.unwrap(),
            "remove a schedule" => _ = Schedules::new(store.clone()).remove(&schedule("later")).await.unwrap(),
            "look what is due" | "make a tick" => {
                _ = schedule::tick(&self.leadership, &Limits::default()).await.unwrap().unwrap();
            }
            "pass a tick" => {
                let few = Limits { max_queued_per_user: 1.try_into().unwrap(), ..Limits::default() };
                _ = schedule::tick(&self.leadership, &few).await.unwrap().unwrap();
            }
            "create a record" => {
                _ = track(&store, &library::TRACKER_CREATE, &["new", "pending", "10 20 30 40 50", "0", "{}"]).await;
            }
            "start a record" => _ = track(&store, &library::TRACKER_START, &["fresh", "b-lock", "3600000", "2"]).await,
            "start a record of a lost holder" => {
                _ = track(&store, &library::TRACKER_START, &["lost", "b-lock", "3600000", "2"]).await;
            }
            "renew a lock" => {
                let fence = self.fences["held"].clone();
                _ = track(&store, &library::TRACKER_RENEW, &["held", "a-lock", &fence, "7200000"]).await;
            }
            "end a record" => {
                let fence = self.fences["held"].clone();
                let args = ["held", "a-lock", &fence, "succeeded", r#"{"a":1}"#, "", ""];
                _ = track(&store, &library::TRACKER_END, &args).await;
            }
            "end a record with an error" => {
                let fence = self.fences["held"].clone();
                let args = ["held", "a-lock", &fence, "failed", "", r#"{"error":"it broke","trace":""}"#, "it broke"];
                _ = track(&store, &library::TRACKER_END, &args).await;
            }
            "ignore a record" => _ = track(&store, &library::TRACKER_SET, &["lost", "ignored"]).await,
            "stop a flow" => _ = Flows::new(store.clone()).stop(&job("flow")).await.unwrap(),
            other => panic!("nobody knows how to {other}"),
        }
    }

    /// Makes a call: its words.
    async fn words_of(&mut self, what: &str, function: &'static Function) -> Words {
        self.calls.lock().unwrap().clear();
        self.act(what).await;
        let name = function.qualified(Version::OURS).into_bytes();
        let words = self.calls.lock().unwrap().iter().rev().find(|words| words[1] == name).cloned();
        words.unwrap_or_else(|| panic!("{what} does not call {}", function.name))
    }

    /// Has the `nth` command of the next calls break off, none where that is 0, at a time by the server's clock.
    fn fault(&self, nth: usize, how: &str, (ms, micros): (u64, u64)) {
        let (seconds, micros) = (ms / 1_000, ms % 1_000 * 1_000 + micros);
        let args = ["FCALL", "faults", "0", &nth.to_string(), how, &seconds.to_string(), &micros.to_string()];
        self.rig.redis(&args);
    }

    fn faults_seen(&self) -> Vec<String> {
        self.rig.redis(&["FCALL", "faults_seen", "0"]).texts()
    }

    fn no_faults(&self) {
        self.rig.redis(&["FCALL", "faults", "0", "0", ""]);
    }

    fn call(&self, words: &Words) -> Value {
        self.rig.server.raw_db(DB, words)
    }

    /// What a leader does all the time.
    async fn round(&self, leadership: &Leadership) -> Result<(), String> {
        let said = |error: queue_core::Error| error.to_string();
        leadership.upkeep(KEEP).await.map_err(said)?.map_err(|_| "nobody leads")?;
        scan_index(leadership).await.map_err(said)?;
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
        let leadership = rig.lead().await;
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
        // Batches of which the application heard that they are over.
        let mut told: BTreeSet<String> = BTreeSet::new();
        for _ in 0..40 {
            rig.state().scheduled().iter().for_each(|id| rig.state().make_due(id));
            self.round(&leadership).await?;
            let claims = worker.take(8).await.map_err(said)?.map_err(|lost| lost.to_string())?.claims;
            if claims.is_empty() && rig.state().is_drained() {
                break;
            }
            for claim in claims {
                told.extend(part(&claim).and_then(|part| match part {
                    Part::Done(batch) => Some(batch.to_string()),
                    Part::Rows(_) | Part::Files(_) => None,
                }));
                finish(claim).await?;
            }
        }
        let is_over = |id: &String| matches!(rig.status_or_none(id).as_deref(), Some("done" | "failed" | "cancelled"));
        // What was met as a key of another type is set aside.
        let aside: BTreeSet<String> = rig.rejected().into_iter().map(|(id, _)| id).collect();
        let unended: Vec<String> =
            rig.state().jobs().into_iter().filter(|id| !is_over(id) && !aside.contains(id)).collect();
        if !unended.is_empty() {
            return Err(format!("never end: {unended:?}"));
        }
        // The call itself ends that.
        if words.iter().any(|word| word == b"small:done") {
            told.insert("small".into());
        }
        let is_batch = |id: &String| rig.hash(id).get("kind").is_some_and(|kind| kind == "batch");
        let untold: Vec<String> =
            rig.state().jobs().into_iter().filter(|id| is_batch(id) && !told.contains(id)).collect();
        if !untold.is_empty() {
            return Err(format!("their ends are not told: {untold:?}"));
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

/// Ends a chunk whose rows wrote text into a file.
async fn finish_with_files(claim: Claim) {
    let Some(Part::Rows(chunk)) = part(&claim) else { panic!("no rows") };
    let files = BTreeMap::from([("out".to_owned(), "a line".to_owned())]);
    let results = vec![Some(RowResult { files, ..RowResult::of(RowEnd::Done) }); chunk.count];
    let verdict = Verdict::Part { keep_ms: KEEP_MS };
    claim.finish(verdict, Duration::ZERO, end_fields(&results), false).await.map(drop).unwrap();
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
    scene.prepare(what).await;
    let state = scene.rig.state();
    let before = state.save();
    let clock = clock(&scene.rig);
    let words = scene.words_of(what, function).await;
    // Nobody has to hear the rest.
    scene.rig.store = Store::connect(&config(scene.rig.server.url_db(DB))).await.expect("the server answers");
    state.bring_back(&before);
    let digest = scene.rig.dump();
    scene.fault(0, "error", clock);
    let reply = scene.call(&words);
    assert!(!matches!(reply, Value::Error(_)), "{what}: {reply:?}");
    assert_ne!(scene.rig.dump(), digest, "{what}: {reply:?}");
    let commands = scene.faults_seen();
    let mut failing = BTreeMap::new();
    // Many calls that break off leave the same: one of them is enough.
    let mut known: BTreeMap<BTreeMap<String, String>, Result<(), String>> = BTreeMap::new();
    for how in ["error", "type"] {
        let mut met: BTreeMap<String, usize> = BTreeMap::new();
        for (at, command) in commands.iter().enumerate() {
            let times = met.entry(label(command)).and_modify(|times| *times += 1).or_insert(1);
            let name = format!("{what}: {} #{times}", label(command));
            state.bring_back(&before);
            scene.fault(at + 1, how, clock);
            let reply = scene.call(&words);
            let seen = scene.faults_seen();
            scene.no_faults();
            let left = scene.rig.dump();
            if left == digest {
                continue;
            }
            let is_write = |command: &String| !READS.contains(&command.split(' ').next().unwrap_or_default());
            let has_written = seen[..at].iter().any(is_write);
            let verdict = if matches!(reply, Value::Error(_)) && how == "error" && !has_written {
                Err("it changed something".to_owned())
            } else if let Some(verdict) = known.get(&left) {
                verdict.clone()
            } else {
                let verdict = scene.heal(&words).await;
                known.insert(left, verdict.clone());
                verdict
            };
            if let Err(why) = verdict {
                failing.insert(name, why);
            }
        }
    }
    failing
}

/// Has calls break off.
async fn they_break_off_as_they_should(calls: &[Call]) {
    let mut all = BTreeMap::new();
    for (what, function) in calls {
        all.extend(failing(what, function).await);
    }
    assert!(all.is_empty(), "{all:#?}");
}

#[tokio::test]
async fn submissions_takes_and_cancels_that_break_off_are_put_right() {
    they_break_off_as_they_should(JOBS).await;
}

#[tokio::test]
async fn ends_that_break_off_are_put_right() {
    they_break_off_as_they_should(ENDS).await;
}

#[tokio::test]
async fn sessions_and_upkeep_that_break_off_are_put_right() {
    they_break_off_as_they_should(SESSIONS).await;
}

#[tokio::test]
async fn batches_that_break_off_are_put_right() {
    they_break_off_as_they_should(BATCHES).await;
}

#[tokio::test]
async fn ends_of_batches_that_break_off_are_put_right() {
    they_break_off_as_they_should(ENDS_OF_BATCHES).await;
}

#[tokio::test]
async fn flows_that_break_off_are_put_right() {
    they_break_off_as_they_should(FLOWS).await;
}

#[tokio::test]
async fn schedules_that_break_off_are_put_right() {
    they_break_off_as_they_should(SCHEDULES).await;
}

#[tokio::test]
async fn trackers_that_break_off_are_put_right() {
    they_break_off_as_they_should(TRACKERS).await;
}

/// Calls that take nothing from each other.
const APART: &[&str] = &[
    "submit statements",
    "submit a task for later",
    "admit",
    "take",
    "finish",
    "finish a statement",
    "finish a chunk",
    "finish a step",
    "finish the last chunk with files",
    "cancel what waits",
    "retry",
    "beat",
    "end a session",
    "promote and expire",
    "load a batch",
    "abort a batch",
    "launch a flow",
    "stop a flow",
    "make a tick",
    "end a record",
];

/// No call finds anything in the library that another one has left there, however that ended.
#[tokio::test]
async fn a_call_behind_others_that_broke_off_is_the_same_as_in_a_fresh_library() {
    let mut scene = Scene::build().await;
    scene.prepare("promote and expire").await;
    let state = scene.rig.state();
    let before = state.save();
    let clock = clock(&scene.rig);
    let (known, mut calls) = (calls(), Vec::new());
    for what in APART {
        let (_, function) = known.iter().find(|(name, _)| name == what).expect("a call");
        let words = scene.words_of(what, function).await;
        load(&scene.rig.server);
        state.bring_back(&before);
        scene.fault(0, "error", clock);
        let reply = scene.call(&words);
        calls.push((what, words, reply, scene.rig.dump(), scene.faults_seen().len()));
        scene.no_faults();
        state.bring_back(&before);
    }
    let seed = u64::from(std::process::id());
    println!("seed {seed}");
    let mut random = Random::of(seed, &[]);
    load(&scene.rig.server);
    for _ in 0..300 {
        let (broken, words, .., commands) = &calls[random.between(0, calls.len() as u64) as usize];
        let at = 1 + random.between(0, *commands as u64) as usize;
        let how = ["error", "type"][random.between(0, 2) as usize];
        state.bring_back(&before);
        scene.fault(at, how, clock);
        scene.call(words);
        let (what, words, reply, left, _) = &calls[random.between(0, calls.len() as u64) as usize];
        state.bring_back(&before);
        scene.fault(0, "error", clock);
        assert_eq!(scene.call(words), *reply, "{what} behind {broken}, broken off at {at} by {how}");
        assert_eq!(scene.rig.dump(), *left, "{what} behind {broken}, broken off at {at} by {how}");
    }
}

/// Nobody adds a function without saying what becomes of it half way.
#[test]
fn each_function_that_writes_is_tried_or_has_a_reason() {
    for function in TABLE.iter().filter(|function| function.effect != Effect::Reads) {
        let is_tried = calls().iter().any(|(_, tried)| std::ptr::eq(*tried, *function));
        let is_excused = ELSEWHERE.iter().any(|(excused, _)| std::ptr::eq(*excused, *function));
        assert!(is_tried != is_excused, "{}", function.name);
    }
}
