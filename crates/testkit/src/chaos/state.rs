//! What the harness knows of the state in Redis: every key that it reads or writes by its name, and how a worker's calls look.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::rules::LIMITED_USERS;
use super::stage::{ask, connect};
use super::trackers::TRACKER;
use super::verdict::{KEYS, Violation};
use super::workload::{APP, HOSTS, Handler};
use crate::redis::{RawClient, RedisServer, Value};

/// A job's hash.
pub type Hash = BTreeMap<String, String>;

/// Whoever is to hear of a job that was pushed.
pub const ANNOUNCEMENTS: &str = "batch:users";
/// The users whose queues are not empty.
pub const QUEUED_USERS: &str = "batch:indexes:queue";
const CLAIMS: &str = "drayman:claims";
const FINISHED: &str = "drayman:finished";
const LEADER: &str = "drayman:leader";
const MISSING: &str = "drayman:missing";
const SESSIONS: &str = "drayman:sessions";
const JOBS: &str = "batch:jobs:";

/// The hash of a job.
pub fn job(id: &str) -> String {
    format!("{JOBS}{id}")
}

/// Where producers push a user's jobs.
pub fn queue(user: &str) -> String {
    format!("batch:queue:{user}")
}

/// All that a job's hash says; empty if it has none.
pub fn hash(redis: &mut RawClient, id: &str) -> io::Result<Hash> {
    Ok(ask(redis, &["HGETALL", &job(id)])?.map())
}

/// How a job stands, if it is there.
pub fn status(redis: &mut RawClient, id: &str) -> io::Result<Option<String>> {
    field(redis, id, "status")
}

/// A field of a job, if it is there.
pub fn field(redis: &mut RawClient, id: &str, name: &str) -> io::Result<Option<String>> {
    let value = ask(redis, &["HGET", &job(id), name])?;
    Ok((!value.is_nil()).then(|| value.text()))
}

/// The ids of the jobs whose ids begin so.
pub fn jobs_of(redis: &mut RawClient, prefix: &str) -> io::Result<Vec<String>> {
    let keys = ask(redis, &["KEYS", &job(&format!("{prefix}*"))])?.texts();
    Ok(keys.into_iter().filter_map(|key| Some(key.strip_prefix(JOBS)?.to_owned())).collect())
}

/// The batches that were files, with the names of these.
pub fn batches_of_files(redis: &mut RawClient) -> io::Result<Vec<(String, String)>> {
    let mut batches = Vec::new();
    // A batch of a file has an id as programs make them.
    for id in jobs_of(redis, "????????-????-????-????-????????????")?.into_iter().filter(|id| !id.contains(':')) {
        if let Some(source) = field(redis, &id, "source")? {
            batches.push((id, source));
        }
    }
    Ok(batches)
}

/// Whether a job was taken, or waits where its producer pushed it.
pub fn is_queued(redis: &mut RawClient, user: &str, id: &str) -> io::Result<bool> {
    Ok(field(redis, id, "fence")?.is_some()
        || !ask(redis, &["LPOS", &queue(user), id])?.is_nil()
        || !ask(redis, &["ZSCORE", MISSING, &format!("{id} {user}")])?.is_nil())
}

/// The session that leads.
pub fn leader(redis: &mut RawClient) -> io::Result<Option<String>> {
    let leader = ask(redis, &["GET", LEADER])?;
    Ok((!leader.is_nil()).then(|| leader.text().split('\t').next().unwrap_or_default().to_owned()))
}

/// A session's right to end a job.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Claim {
    /// The job.
    pub job: String,
    /// Who has it.
    pub session: String,
    /// When it was taken, in µs since 1970 by the clock of Redis.
    pub fence: u64,
    /// Where it runs.
    pub pool: String,
    /// Whose it is.
    pub user: String,
}

/// All claims at one moment.
pub fn claims(redis: &mut RawClient) -> io::Result<Vec<Claim>> {
    let claims = ask(redis, &["HGETALL", CLAIMS])?.map();
    let claim = |(job, text): (String, String)| {
        let mut words = text.split('\t').map(str::to_owned);
        let (session, fence) = (words.next()?, words.next()?.parse().ok()?);
        Some(Claim { job, session, fence, pool: words.next()?, user: words.next()? })
    };
    Ok(claims.into_iter().filter_map(claim).collect())
}

/// What time it is, in µs since 1970 by the clock of Redis.
pub fn time(redis: &mut RawClient) -> io::Result<u64> {
    let time = ask(redis, &["TIME"])?.texts();
    let number = |at: usize| time.get(at).and_then(|text| text.parse::<u64>().ok()).unwrap_or_default();
    Ok(number(0) * 1_000_000 + number(1))
}

/// What the record of a tracked job says.
#[derive(Debug)]
pub struct Tracked {
    /// How it stands.
    pub status: String,
    /// The fence of its last start.
    pub fence: u64,
    /// Of each attempt that has ended its fence and its outcome.
    pub attempts: Vec<(u64, String)>,
}

/// The record of a tracked job, if there is one.
pub fn tracked(redis: &mut RawClient, tracker: &str, id: &str) -> io::Result<Option<Tracked>> {
    let record = ask(redis, &["HGETALL", &format!("drayman:track:{tracker}:{id}")])?.map();
    let text = |name: &str| record.get(name).cloned().unwrap_or_default();
    let attempt = |line: &str| {
        let attempt: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
        let fence = attempt["fence"].as_str().and_then(|fence| fence.parse().ok()).unwrap_or_default();
        (fence, attempt["outcome"].as_str().unwrap_or_default().to_owned())
    };
    let attempts = text("history").lines().map(attempt).collect();
    let tracked = Tracked { status: text("status"), fence: text("fence").parse().unwrap_or_default(), attempts };
    Ok((!record.is_empty()).then_some(tracked))
}

/// A call of a worker, as the harness tells them apart on the wire.
#[derive(Debug, PartialEq, Eq)]
pub enum Call<'a> {
    /// It ends an attempt at a tracked job.
    TrackerEnd,
    /// It asks for jobs. Asked again after a lost reply it has the same number.
    Take { number: &'a [u8] },
    /// It ends its claim on this job, and perhaps on others.
    Finish { job: &'a [u8], is_statement: bool },
}

/// What a command calls, if it is one of these.
pub fn call(words: &[Vec<u8>]) -> Option<Call<'_>> {
    // What the call is named, how many keys, what these begin with, the version.
    let [command, _, keys, _, _, args @ ..] = words else { return None };
    if !command.eq_ignore_ascii_case(b"FCALL") || keys != b"1" {
        return None;
    }
    let arg = |at: usize| args.get(at).map_or(&[][..], Vec::as_slice);
    match (arg(4), arg(5)) {
        (b"succeeded" | b"failed", _) if args.len() == 8 => Some(Call::TrackerEnd),
        (b"final" | b"next" | b"back" | b"later" | b"part", _) => Some(Call::Finish {
            job: arg(2),
            // Its trace has served its purpose then.
            is_statement: args.iter().any(|arg| arg == b"trace"),
        }),
        (_, b"jobs" | b"time") => Some(Call::Take { number: arg(2) }),
        _ => None,
    }
}

/// Whether what ends is entered for the database of what has ended: from when a worker first leads.
pub fn is_exporting(redis: &mut RawClient) -> io::Result<bool> {
    Ok(ask(redis, &["EXISTS", "drayman:exporting"])?.int() == 1)
}

/// What is claimed, and how many have ended: it changes while there is progress.
pub fn books(redis: &mut RawClient) -> io::Result<Vec<String>> {
    let mut books: Vec<String> = claims(redis)?.into_iter().map(|claim| format!("{claim:?}")).collect();
    books.sort();
    books.push(ask(redis, &["ZCARD", FINISHED])?.to_string());
    Ok(books)
}

/// A key's place in the layout: its text with `{}` for its one parameter, and what it holds.
pub type KeyRule = (&'static str, &'static str);

/// Every key that may be there, and nothing else: what a look from outside expects of the layout.
pub const LAYOUT: &[KeyRule] = &[
    ("batch:jobs:{}", "hash"),
    ("batch:queue:{}", "list"),
    ("batch:indexes:queue", "set"),
    ("batch:wip:user:{}", "list"),
    ("batch:wip:users", "set"),
    ("batch:locks:{}", "string"),
    ("limits:batch:{}", "hash"),
    ("batch:queues:{}", "list"),
    ("batch:rejected", "stream"),
    ("drayman:version", "string"),
    ("drayman:tasks:{}", "list"),
    ("drayman:high:{}", "list"),
    ("drayman:low:{}", "list"),
    ("drayman:bands", "hash"),
    ("drayman:lines", "set"),
    ("drayman:unique:{}", "string"),
    ("drayman:active", "hash"),
    ("drayman:barred:{}", "set"),
    ("drayman:throttled", "zset"),
    ("drayman:starts:{}", "list"),
    ("drayman:paused", "string"),
    ("drayman:turn", "string"),
    ("drayman:track:{}", "hash"),
    ("drayman:track_status:{}", "zset"),
    ("drayman:track_locks:{}", "zset"),
    ("drayman:track_expiring:{}", "zset"),
    ("drayman:schedule:{}", "hash"),
    ("drayman:schedules", "zset"),
    ("drayman:pool:{}", "hash"),
    ("drayman:ready:{}", "zset"),
    ("drayman:debt:{}", "zset"),
    ("drayman:busy:{}", "hash"),
    ("drayman:pace:{}", "hash"),
    ("drayman:pools:{}", "zset"),
    ("drayman:classes", "set"),
    ("drayman:claims", "hash"),
    ("drayman:work:{}", "hash"),
    ("drayman:cancels:{}", "set"),
    ("drayman:session:{}", "hash"),
    ("drayman:sessions", "set"),
    ("drayman:parked:{}", "zset"),
    ("drayman:services", "set"),
    ("drayman:leader", "string"),
    ("drayman:term", "string"),
    ("drayman:due", "zset"),
    ("drayman:missing", "zset"),
    ("drayman:finished", "zset"),
    ("drayman:expiring", "zset"),
    ("drayman:kept", "hash"),
    ("drayman:delayed", "hash"),
    ("drayman:delays", "hash"),
    ("drayman:batches", "zset"),
    ("drayman:batch:{}", "hash"),
    ("drayman:batch_rows:{}", "hash"),
    ("drayman:batch_blocks:{}", "hash"),
    ("drayman:batch_results:{}", "hash"),
    ("drayman:batch_parts:{}", "hash"),
    ("drayman:flows", "zset"),
    ("drayman:flow_steps:{}", "hash"),
    ("drayman:flow_instance:{}", "hash"),
    ("drayman:export", "stream"),
    ("drayman:exporting", "hash"),
    ("drayman:full", "string"),
    ("drayman:confirming", "string"),
    ("drayman:lost:{}", "string"),
];

/// The row of a key and its parameter.
fn rule(key: &str) -> Option<(&'static KeyRule, &str)> {
    LAYOUT.iter().find_map(|rule| match rule.0.strip_suffix("{}") {
        Some(prefix) => key.strip_prefix(prefix).map(|parameter| (rule, parameter)),
        None => (rule.0 == key).then_some((rule, "")),
    })
}

/// Looks at all keys once every job has ended. `workers` are the names of those that run.
pub fn leftovers(redis: &RedisServer, jobs: &BTreeSet<String>, workers: &[String]) -> io::Result<Vec<Violation>> {
    let mut redis = connect(redis)?;
    let mut found = Vec::new();
    let sessions: BTreeSet<String> = ask(&mut redis, &["SMEMBERS", SESSIONS])?.texts().into_iter().collect();
    let mut members =
        |key: &str| -> io::Result<Vec<String>> { Ok(ask(&mut redis, &["ZRANGE", key, "0", "-1"])?.texts()) };
    let finished: BTreeSet<String> = members(FINISHED)?.into_iter().collect();
    let handlers = [Handler::Program, Handler::Command, Handler::Rust].map(|handler| format!("{APP}.{}", handler.op()));
    let others =
        [format!("{APP}.{}", super::batches::OP), "drayman.chunk".into(), format!("db:{}", super::flows::DATABASE)];
    let handlers = handlers.into_iter().chain(others);
    let pools: BTreeSet<String> = HOSTS.iter().map(|host| format!("sql:{host}")).chain(handlers).collect();
    if finished != *jobs {
        let odd: Vec<_> = finished.symmetric_difference(jobs).take(5).collect();
        found.push(format!("drayman:finished and the ended jobs differ: {odd:?}"));
    }
    for class in ["sql:", "db:", &format!("{APP}."), "drayman."] {
        for pool in members(&format!("drayman:pools:{class}"))? {
            if !pools.contains(&pool) {
                found.push(format!("drayman:pools:{class} names {pool}"));
            }
        }
    }
    for session in &sessions {
        if !workers.iter().any(|name| session.split(':').next() == Some(name)) {
            found.push(format!("drayman:sessions names {session}, of which no worker runs"));
        }
    }
    for key in ask(&mut redis, &["KEYS", "*"])?.texts() {
        let Some((rule, parameter)) = rule(&key) else {
            found.push(format!("{key} is in no table"));
            continue;
        };
        let kind = ask(&mut redis, &["TYPE", &key])?.text();
        if kind != rule.1 {
            // It may have expired since.
            if kind != "none" {
                found.push(format!("{key} holds a {kind}"));
            }
            continue;
        }
        let lives_ms = ask(&mut redis, &["PTTL", &key])?.int();
        let mut field = |name: &str| ask(&mut redis, &["HGET", &key, name]);
        let owned = match rule.0 {
            "batch:jobs:{}" => jobs.contains(parameter) && lives_ms > 0,
            "batch:locks:{}"
            | "drayman:leader"
            | "drayman:pace:{}"
            | "drayman:confirming"
            | "drayman:lost:{}"
            | "drayman:flow_instance:{}" => lives_ms > 0,
            "drayman:session:{}" => sessions.contains(parameter) && field("dead")?.is_nil(),
            "drayman:pool:{}" => {
                let idle = field("running")?.text() == "0" && field("blocked")?.is_nil();
                pools.contains(parameter) && idle
            }
            "drayman:batch:{}"
            | "drayman:batch_rows:{}"
            | "drayman:batch_blocks:{}"
            | "drayman:batch_results:{}"
            | "drayman:flow_steps:{}" => jobs.contains(parameter),
            "limits:batch:{}" => LIMITED_USERS.contains(&parameter),
            "drayman:starts:{}" => lives_ms > 0,
            // What waits to be written to the database.
            "drayman:export" => ask(&mut redis, &["XLEN", &key])?.int() == 0,
            "drayman:exporting" => true,
            "drayman:track:{}" | "drayman:track_status:{}" => parameter.starts_with(TRACKER),
            "drayman:debt:{}" => pools.contains(parameter),
            "drayman:parked:{}" => {
                let parked = ask(&mut redis, &["ZRANGE", &key, "0", "-1"])?.texts();
                parked.iter().all(|session| sessions.contains(session))
            }
            "drayman:services" => !sessions.is_empty(),
            "drayman:sessions" | "drayman:version" | "drayman:term" | "drayman:pools:{}" | "drayman:classes"
            | "drayman:turn" | "drayman:batches" | "drayman:flows" | "drayman:finished" | "drayman:expiring"
            | "drayman:kept" => true,
            // Queues, claims, work lists, the due, the busy, the lost and the rejected: nothing is left to do.
            _ => false,
        };
        if !owned {
            let contents = contents(&mut redis, &key, rule.1)?;
            found.push(format!("{key} (lives {lives_ms} ms): {contents}"));
        }
    }
    Ok(found.into_iter().map(|found| Violation::new(KEYS, found)).collect())
}

fn contents(redis: &mut RawClient, key: &str, kind: &str) -> io::Result<String> {
    let command: &[&str] = match kind {
        "hash" => &["HGETALL", key],
        "list" => &["LRANGE", key, "0", "9"],
        "set" => &["SMEMBERS", key],
        "zset" => &["ZRANGE", key, "0", "9", "WITHSCORES"],
        "stream" => &["XRANGE", key, "-", "+", "COUNT", "10"],
        _ => &["GET", key],
    };
    Ok(ask(redis, command).unwrap_or(Value::Nil).to_string())
}
