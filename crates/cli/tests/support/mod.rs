//! What the tests of the command-line programs share: running them, and a worker made of nothing but its session.

// Each test program uses its own part of this.
#![allow(dead_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use queue_core::Store;
use queue_core::calls::{Fields, Finished, Verdict};
use queue_core::config::{RedisConfig, Url};
use queue_core::ids::{PoolPattern, SessionId};
use queue_core::inspect::{Filter, Inspect};
use queue_core::model::Status;
use queue_core::session::{Claim, Fairness, Service, Session};
use testkit::{Daemon, RedisServer};

/// The database that the programs use here.
pub const DB: u8 = 5;

/// How long programs and workers wait for a reply of Redis where that is not what is tested.
pub const COMMAND_TIMEOUT: &str = "60s";

/// What a program did.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ran {
    /// The lines of its output.
    pub fn lines(&self) -> Vec<&str> {
        self.out.lines().collect()
    }

    /// Its output as JSON, an object a line.
    pub fn json(&self) -> Vec<serde_json::Value> {
        self.out
            .lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {self:?}")))
            .collect()
    }
}

/// A program of ours on a server.
pub struct Program {
    path: &'static str,
    url: String,
    env: Vec<(String, String)>,
}

impl Program {
    pub fn new(path: &'static str, server: &RedisServer) -> Self {
        Self { path, url: server.url_db(DB), env: Vec::new() }
    }

    pub fn at(path: &'static str, url: &str) -> Self {
        Self { path, url: url.into(), env: Vec::new() }
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.path);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("DRAYMAN_") {
                command.env_remove(name);
            }
        }
        // Not the configuration of the machine that the tests run on.
        command.env("DRAYMAN_CONFIG", "/dev/null").env("DRAYMAN_REDIS__URL", &self.url);
        // On a machine that is busy enough a reply takes longer than a program waits for it by default.
        command.env("DRAYMAN_REDIS__COMMAND_TIMEOUT", COMMAND_TIMEOUT);
        command.envs(self.env.iter().map(|(name, value)| (name, value))).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        self.start(args).end()
    }

    pub fn run_with(&self, args: &[&str], stdin: &[u8]) -> Ran {
        let mut child = self.command(args).stdin(Stdio::piped()).spawn().unwrap();
        let mut pipe = child.stdin.take().unwrap();
        let stdin = stdin.to_vec();
        // In a thread: a program that writes before it has read all must not block us.
        let writer = std::thread::spawn(move || pipe.write_all(&stdin));
        let ran = Running(child).end();
        let _ = writer.join();
        ran
    }

    /// The program with its lines as they come, those of both outputs together.
    pub fn daemon(&self, args: &[&str]) -> Daemon {
        let command = self.command(args);
        let env: Vec<(&str, &str)> =
            command.get_envs().filter_map(|(name, value)| Some((name.to_str()?, value?.to_str()?))).collect();
        Daemon::spawn(self.path, args, &env)
    }

    pub fn start(&self, args: &[&str]) -> Running {
        Running(self.command(args).spawn().unwrap())
    }
}

/// A program that runs.
pub struct Running(pub Child);

impl Running {
    pub fn end(self) -> Ran {
        let output = self.0.wait_with_output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Ran { code: output.status.code().unwrap_or(-1), out: text(output.stdout), err: text(output.stderr) }
    }

    pub fn has_ended(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }

    /// How it ended. It needs a worker for that: where that one has ended, or does nothing any more, it would wait for ever.
    /// What it writes meanwhile has room in a pipe.
    #[track_caller]
    pub fn end_with(mut self, worker: &Daemon) -> Ran {
        testkit::eventually_blocking("the end of a program that waits for a worker", || {
            if self.has_ended() {
                return Ok(());
            }
            assert!(worker.try_wait().is_none(), "its worker has ended: {}", worker.output());
            Err(worker.lines().len())
        });
        self.end()
    }
}

pub async fn store(server: &RedisServer) -> Store {
    // A server that stands still for a while is no fault of what is tested.
    let command_timeout = Duration::from_secs(60);
    let config = RedisConfig { url: Url::new(server.url_db(DB)), command_timeout, ..RedisConfig::default() };
    Store::connect(&config).await.unwrap()
}

/// A worker that serves every pool, and runs nothing.
pub async fn worker(store: &Store) -> Session {
    worker_of(store, &["*"]).await
}

pub async fn worker_of(store: &Store, pools: &[&str]) -> Session {
    let service = Service {
        pools: pools.iter().map(|pattern| PoolPattern::new(*pattern).unwrap()).collect(),
        default_capacity: 4,
        capacities: Vec::new(),
        fairness: Fairness::Jobs,
    };
    Session::open(store.clone(), SessionId::generate("test", 1), service, "test", 1).await.unwrap()
}

/// Takes the one job that there is to take. What foreign producers have pushed is noticed first.
pub async fn take_one(store: &Store, session: &Session) -> Claim {
    let waiting = Filter { status: Some(Status::Pending), ..Filter::default() };
    let jobs = Inspect::new(store.clone()).list(&waiting, 100).await.unwrap();
    let users: BTreeSet<Vec<u8>> = jobs.iter().map(|job| job.user().into_bytes()).collect();
    store.notice(&users.into_iter().collect::<Vec<_>>()).await.unwrap();
    let mut claims = session.take(10).await.unwrap().unwrap().claims;
    assert_eq!(claims.len(), 1, "{claims:?}");
    claims.remove(0)
}

/// Ends a job with a status.
pub async fn finish(claim: Claim, status: &str) {
    let verdict = Verdict::Final { keep_ms: 600_000 };
    let fields = Fields::new().with("status", status);
    let finished = claim.finish(verdict, Duration::from_millis(5), fields, false).await.unwrap();
    assert_eq!(finished, Finished::Ended);
}

/// The fields of a job.
pub fn hash(server: &RedisServer, id: &str) -> BTreeMap<String, String> {
    server.state(DB).record(id)
}

/// Submits by plain commands, as a foreign producer does.
pub fn push(server: &RedisServer, id: &str, user: &str, fields: &[(&str, &str)]) {
    server.state(DB).foreign().submit(user, id, &[&[("status", "pending")], fields].concat());
}

/// Waits for a state.
#[track_caller]
pub fn until(what: &str, mut reached: impl FnMut() -> bool) {
    testkit::eventually_blocking(what, || reached().then_some(()));
}

/// Waits until so many are there. While there are more and more of them, there is progress: that takes its time on a slow
/// machine.
#[track_caller]
pub fn until_there(what: &str, least: u64, mut count: impl FnMut() -> u64) {
    testkit::eventually_blocking(what, || {
        let there = count();
        (there >= least).then_some(()).ok_or(there)
    });
}

/// Waits as [`until_there`] does until all are there, and no more than all.
#[track_caller]
pub fn until_all(what: &str, all: u64, mut count: impl FnMut() -> u64) {
    until_there(what, all, &mut count);
    assert_eq!(count(), all, "{what}");
}
