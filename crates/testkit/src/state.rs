//! What tests see and set of Drayman's state in Redis, in the words of the protocol.
//!
//! Tests name no keys. What a key is called and what it holds stands here, so that a core with another layout changes this module and
//! not the tests. What foreign producers write is a published contract: see [`Foreign`].

mod books;
mod foreign;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard};

pub use books::RowEnds;
pub use foreign::Foreign;

use crate::redis::{RawClient, RedisServer, Value, dump};

impl RedisServer {
    /// The state in one of its databases, over a connection of its own: after a restart ask for another.
    #[track_caller]
    pub fn state(&self, db: u8) -> State {
        State { client: Mutex::new(self.client(db)) }
    }
}

/// The state as a test sees and sets it.
///
/// # Panics
///
/// Each method, if Redis answers an error: what is there has another type, say.
#[derive(Debug)]
pub struct State {
    client: Mutex<RawClient>,
}

/// Declares [`Piece`]: what each piece is, and the keys in which it stands.
macro_rules! pieces {
    ($($(#[$doc:meta])* $name:ident $(($($of:ident: $type:ty),+))? = $($key:literal),+;)+) => {
        /// A piece of the state, for tests that look whether one is there, lose one, spoil one, or set its fields
        /// by hand.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Piece<'a> {
            $($(#[$doc])* $name $(($($type),+))?,)+
        }

        impl Piece<'_> {
            fn keys(self) -> Vec<String> {
                match self {
                    $(Piece::$name $(($($of),+))? => vec![$(format!($key)),+],)+
                }
            }
        }
    };
}

pieces! {
    /// A job's record.
    Job(id: &'a str) = "batch:jobs:{id}";
    /// What a user has waiting where any producer may push it.
    Queue(user: &'a str) = "batch:queue:{user}";
    /// The index of users who have something waiting there.
    QueuedUsers = "batch:indexes:queue";
    /// What foreign readers see of a user's running jobs.
    Working(user: &'a str) = "batch:wip:user:{user}";
    /// The index of users who have running jobs, for foreign readers.
    WorkingUsers = "batch:wip:users";
    /// The limits that operators set for a user.
    Limits(user: &'a str) = "limits:batch:{user}";
    /// What was set aside because no job could be made of it.
    Rejected = "batch:rejected";
    /// A user's waiting tasks of one handler (`<app>.<op>`).
    Tasks(user: &'a str, pool: &'a str, priority: Priority) = "drayman:{priority}:{pool}:{user}";
    /// The index of users and handlers with waiting tasks.
    QueuesOfTasks = "drayman:lines";
    /// Whose turn it is among the priorities of a queue.
    PriorityTurns = "drayman:bands";
    /// Ids that were pushed and have no record yet.
    Missing = "drayman:missing";
    /// The running jobs.
    Claims = "drayman:claims";
    /// What a session has running.
    HeldBy(session: &'a str) = "drayman:work:{session}";
    /// How many jobs each user has running.
    RunningByUser = "drayman:active";
    /// A pool with its numbers.
    Pool(pool: &'a str) = "drayman:pool:{pool}";
    /// The pools that may have something to take.
    Pools(class: &'a str) = "drayman:pools:{class}";
    /// The users of a pool who have something to take.
    Ready(pool: &'a str) = "drayman:ready:{pool}";
    /// What a user's limits keep from its turn.
    Limited(user: &'a str) = "drayman:barred:{user}";
    /// What a rate keeps from its turn.
    RateLimited = "drayman:throttled";
    /// That nothing is to be taken at all.
    PausedAll = "drayman:paused";
    /// The jobs that wait for a time.
    Scheduled = "drayman:due";
    /// How many jobs that wait for a time were submitted so by each user, and which.
    ScheduledByUser = "drayman:delays", "drayman:delayed";
    /// The ended jobs.
    Finished = "drayman:finished";
    /// When their records expire, and what these occupy.
    FinishedBooks = "drayman:expiring", "drayman:kept";
    /// Who holds a unique key.
    Unique(key: &'a str) = "drayman:unique:{key}";
    /// A session.
    Session(id: &'a str) = "drayman:session:{id}";
    /// The index of sessions.
    Sessions = "drayman:sessions";
    /// The sessions that wait for work of these pools.
    Parked(pools: &'a str) = "drayman:parked:{pools}";
    /// The index of pools that sessions may wait for.
    Services = "drayman:services";
    /// Who leads.
    Leader = "drayman:leader";
    /// The version of the protocol.
    Version = "drayman:version";
    /// The leader's word that memory is nearly full.
    NoRoom = "drayman:full";
    /// What a submission that replicas are to confirm writes behind all that others have written.
    Confirming = "drayman:confirming";
    /// A schedule.
    Schedule(name: &'a str) = "drayman:schedule:{name}";
    /// The order of the schedules.
    Schedules = "drayman:schedules";
    /// The record of a tracker's job.
    Tracked(tracker: &'a str, id: &'a str) = "drayman:track:{tracker}:{id}";
    /// A tracker's jobs that have a status.
    TrackedByStatus(tracker: &'a str, status: &'a str) = "drayman:track_status:{tracker}:{status}";
    /// A tracker's jobs that are locked.
    TrackedLocks(tracker: &'a str) = "drayman:track_locks:{tracker}";
    /// A tracker's jobs of which the records expire.
    TrackedExpiring(tracker: &'a str) = "drayman:track_expiring:{tracker}";
    /// The index of batches.
    Batches = "drayman:batches";
    /// What a batch counts, and how far its rows are dealt.
    Batch(id: &'a str) = "drayman:batch:{id}";
    /// A batch's rows.
    BatchRows(id: &'a str) = "drayman:batch_rows:{id}";
    /// The blocks in which a batch's rows came.
    BatchBlocks(id: &'a str) = "drayman:batch_blocks:{id}";
    /// What became of a batch's rows.
    BatchResults(id: &'a str) = "drayman:batch_results:{id}";
    /// The parts of a batch that were dealt and have not ended.
    BatchParts(id: &'a str) = "drayman:batch_parts:{id}";
    /// The index of executions of flows.
    Flows = "drayman:flows";
    /// The steps of an execution of a flow.
    FlowSteps(id: &'a str) = "drayman:flow_steps:{id}";
    /// What has ended and is to be exported.
    Feed = "drayman:export";
    /// That somebody exports.
    FeedOn = "drayman:exporting";
}

/// A job's priority in its queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// Before the rest.
    High,
    /// Without a word.
    Normal,
    /// Behind the rest.
    Low,
}

/// As its list is called.
impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Priority::High => "high",
            Priority::Normal => "tasks",
            Priority::Low => "low",
        })
    }
}

impl Piece<'_> {
    /// What a program says where it tells of this piece: the name of its first key.
    pub fn name(self) -> String {
        self.keys().remove(0)
    }

    /// Whether it is a text, so that another text would not spoil it.
    fn is_text(self) -> bool {
        matches!(
            self,
            Piece::Unique(_) | Piece::Leader | Piece::Version | Piece::NoRoom | Piece::PausedAll | Piece::Confirming
        )
    }
}

/// A running job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The job.
    pub id: String,
    /// Who runs it.
    pub session: String,
    /// The number of the take that gave it away.
    pub fence: u64,
    /// The pool in which it counts.
    pub pool: String,
    /// The user for whom it counts.
    pub user: String,
    /// The run time that its user was charged for it, in µs; a million where each job costs the same.
    pub charged: String,
    /// Where its user stands in the order of turns once it has had it.
    pub finish_tag: String,
    /// Whether turns are shared by `jobs` or by `time`.
    pub fairness: String,
}

impl Claim {
    fn read(id: &str, text: &str) -> Self {
        let mut parts = text.split('\t').map(str::to_owned);
        let mut next = |what: &str| parts.next().unwrap_or_else(|| panic!("the claim of {id} has no {what}: {text:?}"));
        Self {
            id: id.into(),
            session: next("session"),
            fence: next("fence").parse().unwrap_or_else(|_| panic!("the fence of {id}: {text:?}")),
            pool: next("pool"),
            user: next("user"),
            charged: next("cost"),
            finish_tag: next("finish tag"),
            fairness: next("kind of fairness"),
        }
    }

    fn write(&self) -> String {
        let Self { session, fence, pool, user, charged, finish_tag, fairness, .. } = self;
        format!("{session}\t{fence}\t{pool}\t{user}\t{charged}\t{finish_tag}\t{fairness}")
    }
}

/// What [`State::save`] has found: names, times of expiry in ms since 1970 or 0, values.
#[derive(Debug, Clone)]
pub struct Saved(Vec<(String, i64, Vec<u8>)>);

impl State {
    fn client(&self) -> MutexGuard<'_, RawClient> {
        self.client.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    #[track_caller]
    fn ask<A: AsRef<[u8]>>(&self, args: &[A]) -> Value {
        let reply = self.client().call(args);
        if let Value::Error(error) = &reply {
            let words: Vec<_> = args.iter().map(|arg| String::from_utf8_lossy(arg.as_ref())).collect();
            panic!("{words:?}: {error}");
        }
        reply
    }

    /// All keys that begin so, with what follows.
    #[track_caller]
    fn named(&self, stem: &str) -> Vec<String> {
        let keys = self.ask(&["KEYS", &format!("{stem}*")]).texts();
        keys.into_iter().map(|key| key[stem.len()..].to_owned()).collect()
    }

    /// The submissions of a producer that knows nothing but the published layout.
    pub fn foreign(&self) -> Foreign<'_> {
        Foreign(self)
    }

    /// Everything, to compare before and after: equal if and only if nothing was changed, except by writing the same again.
    #[track_caller]
    pub fn digest(&self) -> BTreeMap<String, String> {
        dump(&mut self.client())
    }

    /// All of it, to be brought back.
    #[track_caller]
    pub fn save(&self) -> Saved {
        let mut client = self.client();
        let keys = client.call(&["KEYS", "*"]).texts();
        let save = |key: String| {
            let expiry = client.call(&["PEXPIRETIME", &key]).int().max(0);
            let dump = client.call(&["DUMP", &key]).bytes().to_vec();
            (key, expiry, dump)
        };
        Saved(keys.into_iter().map(save).collect())
    }

    /// As it was when it was saved, also what expires.
    #[track_caller]
    pub fn bring_back(&self, saved: &Saved) {
        let mut client = self.client();
        client.call(&["FLUSHDB"]);
        for (key, expiry, dump) in &saved.0 {
            let expiry = expiry.to_string();
            let command = [b"RESTORE", key.as_bytes(), expiry.as_bytes(), dump, b"ABSTTL"];
            client.send(&command).expect("the server reads");
        }
        for (key, ..) in &saved.0 {
            let reply = client.receive().expect("the server answers");
            assert!(!matches!(reply, Value::Error(_)), "{key}: {reply:?}");
        }
    }

    // Any piece.

    /// Whether it is there.
    #[track_caller]
    pub fn has(&self, piece: Piece<'_>) -> bool {
        self.has_any(&[piece])
    }

    /// Whether any of them is there.
    #[track_caller]
    pub fn has_any(&self, pieces: &[Piece<'_>]) -> bool {
        let mut args = vec!["EXISTS".to_owned()];
        args.extend(pieces.iter().flat_map(|piece| piece.keys()));
        self.ask(&args).int() > 0
    }

    /// Makes it one that never was, though what refers to it remains.
    #[track_caller]
    pub fn lose(&self, piece: Piece<'_>) {
        for key in piece.keys() {
            self.ask(&["DEL", &key]);
        }
    }

    /// Puts something in its place that it can't be: a text, or a list where it is a text itself.
    #[track_caller]
    pub fn spoil(&self, piece: Piece<'_>) {
        self.spoil_as(piece, if piece.is_text() { "list" } else { "string" });
    }

    /// Puts a `string`, a `list` or a `set` in its place.
    #[track_caller]
    pub fn spoil_as(&self, piece: Piece<'_>, kind: &str) {
        let command = match kind {
            "string" => "SET",
            "list" => "RPUSH",
            "set" => "SADD",
            other => panic!("{other:?} is none of string, list and set"),
        };
        for key in piece.keys() {
            self.ask(&["DEL", &key]);
            self.ask(&[command, &key, "spoiled"]);
        }
    }

    /// Whether it is what [`State::spoil`] has put there.
    #[track_caller]
    pub fn is_spoiled(&self, piece: Piece<'_>) -> bool {
        let wanted = if piece.is_text() { "list" } else { "string" };
        piece.keys().iter().all(|key| self.ask(&["TYPE", key]).text() == wanted)
    }

    /// Puts something among the state that no protocol knows, and returns what a program calls it.
    #[track_caller]
    pub fn put_unknown(&self, name: &str) -> String {
        let key = unknown(name);
        self.ask(&["SET", &key, "x"]);
        key
    }

    /// Takes it away again.
    #[track_caller]
    pub fn lose_unknown(&self, name: &str) {
        self.ask(&["DEL", &unknown(name)]);
    }

    /// In how many ms it goes by itself; nothing for what stays, or is not there.
    #[track_caller]
    pub fn expires_in_ms(&self, piece: Piece<'_>) -> Option<u64> {
        self.ask(&["PTTL", &piece.name()]).int().try_into().ok()
    }

    /// Whether it is there and does not go by itself.
    #[track_caller]
    pub fn stays(&self, piece: Piece<'_>) -> bool {
        self.ask(&["PTTL", &piece.name()]).int() == -1
    }

    /// Makes it go by itself within a ms.
    #[track_caller]
    pub fn expire(&self, piece: Piece<'_>) {
        assert_eq!(self.ask(&["PEXPIRE", &piece.name(), "1"]).int(), 1, "{piece:?} is there");
    }

    /// Makes it one that nobody has touched for so long.
    #[track_caller]
    pub fn leave_untouched(&self, piece: Piece<'_>, seconds: u32) {
        self.leave_key_untouched(&piece.name(), seconds);
    }

    fn leave_key_untouched(&self, key: &str, seconds: u32) {
        let dump = self.ask(&["DUMP", key]);
        let seconds = seconds.to_string();
        let args = [b"RESTORE", key.as_bytes(), b"0", dump.bytes(), b"REPLACE", b"IDLETIME", seconds.as_bytes()];
        self.ask(&args);
    }

    /// The fields of a piece that has some: a job, a pool, limits, a session, a schedule, a tracked job.
    #[track_caller]
    pub fn fields(&self, piece: Piece<'_>) -> BTreeMap<String, String> {
        self.ask(&["HGETALL", &piece.name()]).map()
    }

    /// One of them, as bytes.
    #[track_caller]
    pub fn field_of(&self, piece: Piece<'_>, name: &str) -> Option<Vec<u8>> {
        match self.ask(&["HGET", &piece.name(), name]) {
            Value::Nil => None,
            value => Some(value.bytes().to_vec()),
        }
    }

    /// Sets some of them, and no more than these fields.
    #[track_caller]
    pub fn set<N: AsRef<[u8]>, V: AsRef<[u8]>>(&self, piece: Piece<'_>, fields: &[(N, V)]) {
        self.set_in(piece.name().as_bytes(), fields);
    }

    #[track_caller]
    fn set_in<N: AsRef<[u8]>, V: AsRef<[u8]>>(&self, key: &[u8], fields: &[(N, V)]) {
        let mut args: Vec<&[u8]> = vec![b"HSET", key];
        args.extend(fields.iter().flat_map(|(name, value)| [name.as_ref(), value.as_ref()]));
        self.ask(&args);
    }

    /// Removes one of them.
    #[track_caller]
    pub fn unset(&self, piece: Piece<'_>, name: &str) {
        self.ask(&["HDEL", &piece.name(), name]);
    }

    // Jobs.

    /// All ids of which there is a record, sorted.
    #[track_caller]
    pub fn jobs(&self) -> Vec<String> {
        let mut ids = self.named("batch:jobs:");
        ids.sort();
        ids
    }

    /// The record of a job, empty if there is none.
    #[track_caller]
    pub fn record(&self, id: &str) -> BTreeMap<String, String> {
        self.fields(Piece::Job(id))
    }

    /// A field of a job's record.
    #[track_caller]
    pub fn field(&self, id: &str, name: &str) -> Option<String> {
        self.field_of(Piece::Job(id), name).map(|value| String::from_utf8_lossy(&value).into_owned())
    }

    /// The status that a job's record says.
    #[track_caller]
    pub fn status(&self, id: &str) -> Option<String> {
        self.field(id, "status")
    }

    /// Writes into a job's record behind everybody's back.
    #[track_caller]
    pub fn set_field(&self, id: &str, name: &str, value: impl AsRef<[u8]>) {
        self.set(Piece::Job(id), &[(name, value)]);
    }

    /// Has it look as if so many workers had been lost while they ran a job.
    #[track_caller]
    pub fn lose_workers_of(&self, id: &str, count: &str) {
        self.set_field(id, "unclean", count);
        self.ask(&["SET", &format!("drayman:lost:{id}"), "once", "EX", "3600"]);
    }

    /// What a user has waiting where any producer may push it, the next first.
    #[track_caller]
    pub fn waiting(&self, user: &str) -> Vec<String> {
        self.list(Piece::Queue(user))
    }

    /// A user's waiting tasks of a handler (`<app>.<op>`), the next first.
    #[track_caller]
    pub fn waiting_tasks(&self, user: &str, pool: &str, priority: Priority) -> Vec<String> {
        self.list(Piece::Tasks(user, pool, priority))
    }

    #[track_caller]
    fn list(&self, piece: Piece<'_>) -> Vec<String> {
        let mut ids = self.ask(&["LRANGE", &piece.name(), "0", "-1"]).texts();
        ids.reverse();
        ids
    }

    /// What all users have waiting where any producer may push it, the next first.
    #[track_caller]
    pub fn queues(&self) -> BTreeMap<String, Vec<String>> {
        let users = self.named("batch:queue:");
        users.into_iter().map(|user| (user.clone(), self.waiting(&user))).collect()
    }

    /// Whether anything waits anywhere to be taken.
    #[track_caller]
    pub fn is_any_waiting(&self) -> bool {
        let stems = ["batch:queue:", "drayman:high:", "drayman:tasks:", "drayman:low:"];
        stems.iter().any(|stem| !self.named(stem).is_empty())
    }

    /// The users who are known to have something waiting.
    #[track_caller]
    pub fn queued_users(&self) -> Vec<String> {
        self.members(Piece::QueuedUsers)
    }

    /// Ids that were pushed and have no record yet, with their users, the first to be given up first.
    #[track_caller]
    pub fn missing(&self) -> Vec<(String, String)> {
        let entries = self.ordered(Piece::Missing);
        let split = |entry: &String| entry.split_once(' ').map(|(id, user)| (id.to_owned(), user.to_owned()));
        entries.iter().map(|entry| split(entry).unwrap_or_else(|| panic!("missing: {entry:?}"))).collect()
    }

    /// Makes an id that has no record one that has been waited for long enough.
    #[track_caller]
    pub fn end_wait_for(&self, id: &str, user: &str) {
        self.ask(&["ZADD", &Piece::Missing.name(), "XX", "1", &format!("{id} {user}")]);
    }

    /// What was set aside, with the reasons, the oldest first.
    #[track_caller]
    pub fn rejected(&self) -> Vec<(String, String)> {
        let Value::Array(entries) = self.ask(&["XRANGE", &Piece::Rejected.name(), "-", "+"]) else {
            panic!("no stream")
        };
        let read = |entry: &Value| {
            let Value::Array(parts) = entry else { panic!("no entry") };
            let fields = parts[1].map();
            (fields["id"].clone(), fields["reason"].clone())
        };
        entries.iter().map(read).collect()
    }

    /// The jobs that wait for a time, the first first.
    #[track_caller]
    pub fn scheduled(&self) -> Vec<String> {
        self.ordered(Piece::Scheduled)
    }

    /// Those of them whose time has come, in their order.
    #[track_caller]
    pub fn due(&self) -> Vec<String> {
        let time = self.ask(&["TIME"]).texts();
        let part = |at: usize| -> u64 { time[at].parse().expect("a time") };
        let now_ms = part(0) * 1_000 + part(1) / 1_000;
        self.ask(&["ZRANGEBYSCORE", &Piece::Scheduled.name(), "-inf", &now_ms.to_string()]).texts()
    }

    /// When a job is due, in ms since 1970.
    #[track_caller]
    pub fn due_at_ms(&self, id: &str) -> Option<u64> {
        self.score(Piece::Scheduled, id).map(|score| score.parse().expect("a whole number"))
    }

    /// Makes a scheduled job due now; no other.
    #[track_caller]
    pub fn make_due(&self, id: &str) {
        self.move_due(id, 1);
    }

    /// Moves the time of a scheduled job; of no other.
    #[track_caller]
    pub fn move_due(&self, id: &str, at_ms: u64) {
        self.ask(&["ZADD", &Piece::Scheduled.name(), "XX", &at_ms.to_string(), id]);
    }

    /// Puts an id among those that wait for a time.
    #[track_caller]
    pub fn schedule_job(&self, id: &str, at_ms: u64) {
        self.ask(&["ZADD", &Piece::Scheduled.name(), &at_ms.to_string(), id]);
    }

    /// The ended jobs, the one that ended first first.
    #[track_caller]
    pub fn finished(&self) -> Vec<String> {
        self.ordered(Piece::Finished)
    }

    /// How many they are.
    #[track_caller]
    pub fn count_finished(&self) -> u64 {
        self.ask(&["ZCARD", &Piece::Finished.name()]).int() as u64
    }

    /// Sets when an ended job has ended.
    #[track_caller]
    pub fn move_end(&self, id: &str, at_ms: u64) {
        self.ask(&["ZADD", &Piece::Finished.name(), "XX", &at_ms.to_string(), id]);
    }

    /// How many bytes the books count for the record of an ended job.
    #[track_caller]
    pub fn booked_bytes(&self, id: &str) -> Option<u64> {
        match self.ask(&["HGET", "drayman:kept", id]) {
            Value::Nil => None,
            bytes => Some(bytes.text().parse().expect("a number of bytes")),
        }
    }

    /// How many bytes a job's record occupies by what Redis says.
    #[track_caller]
    pub fn occupied_bytes(&self, id: &str) -> u64 {
        self.ask(&["MEMORY", "USAGE", &Piece::Job(id).name(), "SAMPLES", "0"]).int() as u64
    }

    /// Makes so many ended jobs at once, `<stem>1`, `<stem>2`, …, in an order of age from `ended_at_ms` on, each booked with 100 bytes.
    #[track_caller]
    pub fn fill_finished(&self, stem: &str, count: u32, ended_at_ms: u64) {
        let script = "for i = 1, ARGV[2] do local id = ARGV[1] .. i
            redis.call('HSET', 'batch:jobs:' .. id, 'user', 'u', 'status', 'done')
            redis.call('ZADD', 'drayman:finished', ARGV[3] + i, id)
            redis.call('ZADD', 'drayman:expiring', 4e12, id)
            redis.call('HSET', 'drayman:kept', id, 100)
            redis.call('HINCRBY', 'drayman:kept', '*', 100) end";
        self.ask(&["EVAL", script, "0", stem, &count.to_string(), &ended_at_ms.to_string()]);
    }

    /// Makes so many records that nothing refers to, `1`, `2`, ….
    #[track_caller]
    pub fn fill_records(&self, count: u32) {
        let script = "for i = 1, ARGV[1] do redis.call('HSET', 'batch:jobs:' .. i, 'status', 'done') end";
        self.ask(&["EVAL", script, "0", &count.to_string()]);
    }

    /// Makes so many users `u1`, `u2`, … with two waiting tasks each, all ready before any other pool's.
    #[track_caller]
    pub fn fill_tasks(&self, app: &str, op: &str, users: u32) {
        let script = "local pool = ARGV[1] .. '.' .. ARGV[2] for i = 1, ARGV[3] do
            redis.call('HSET', 'batch:jobs:j' .. i, 'user', 'u' .. i, 'kind', 'task', 'app', ARGV[1], 'op', ARGV[2])
            redis.call('LPUSH', 'drayman:tasks:' .. pool .. ':u' .. i, 'j' .. i, 'j' .. i)
            redis.call('ZADD', 'drayman:ready:' .. pool, i, 'u' .. i) end
            redis.call('ZADD', 'drayman:pools:' .. ARGV[1] .. '.', -1, pool)
            redis.call('SADD', 'drayman:classes', ARGV[1] .. '.')";
        self.ask(&["EVAL", script, "0", app, op, &users.to_string()]);
    }

    /// Makes all that waits or runs look as if nobody had touched it for long, so that a comparison of keys looks at it.
    #[track_caller]
    pub fn age(&self) {
        for id in self.jobs() {
            let piece = Piece::Job(&id);
            if self.stays(piece) {
                if self.field_of(piece, "updated_at").is_some() {
                    self.set_field(&id, "updated_at", "2020-01-01T00:00:00.000Z");
                }
                self.leave_untouched(piece, 100);
            }
        }
    }

    // What runs.

    /// The running jobs, by their ids.
    #[track_caller]
    pub fn claims(&self) -> Vec<Claim> {
        let claims = self.fields(Piece::Claims);
        claims.iter().map(|(id, text)| Claim::read(id, text)).collect()
    }

    /// The claim of a job, if it runs.
    #[track_caller]
    pub fn claim(&self, id: &str) -> Option<Claim> {
        let text = self.field_of(Piece::Claims, id)?;
        Some(Claim::read(id, &String::from_utf8_lossy(&text)))
    }

    /// How many jobs run.
    #[track_caller]
    pub fn running(&self) -> usize {
        self.ask(&["HLEN", &Piece::Claims.name()]).int() as usize
    }

    /// Whether nothing runs, nor counts as running.
    #[track_caller]
    pub fn is_idle(&self) -> bool {
        !self.has_any(&[Piece::Claims, Piece::RunningByUser])
    }

    /// Whether nothing waits and nothing runs, and nothing lists or counts what might.
    #[track_caller]
    pub fn is_drained(&self) -> bool {
        let stems = ["drayman:work:", "drayman:busy:"];
        self.is_idle() && !self.is_any_waiting() && stems.iter().all(|stem| self.named(stem).is_empty())
    }

    /// Forgets that a job runs; all that counts it remains.
    #[track_caller]
    pub fn lose_claim(&self, id: &str) {
        self.unset(Piece::Claims, id);
    }

    /// Forgets that a job runs, also for the session that runs it.
    #[track_caller]
    pub fn lose_claim_and_holder(&self, id: &str) {
        let claim = self.claim(id).unwrap_or_else(|| panic!("{id} does not run"));
        self.lose_claim(id);
        self.unset(Piece::HeldBy(&claim.session), id);
    }

    /// Puts another claim in the place of a job's.
    #[track_caller]
    pub fn set_claim(&self, claim: &Claim) {
        self.set(Piece::Claims, &[(&claim.id, claim.write())]);
    }

    /// Has a session's list of its jobs name one that does not run.
    #[track_caller]
    pub fn list_unclaimed(&self, session: &str, id: &str) {
        self.set(Piece::HeldBy(session), &[(id, "1")]);
    }

    /// How many jobs each user has running in a pool, by the pool's count.
    #[track_caller]
    pub fn running_in(&self, pool: &str) -> BTreeMap<String, u64> {
        let counts = self.ask(&["HGETALL", &format!("drayman:busy:{pool}")]).map();
        counts.into_iter().map(|(user, count)| (user, count.parse().expect("a count"))).collect()
    }

    /// How many jobs a pool counts as running.
    #[track_caller]
    pub fn count_running(&self, pool: &str) -> Option<String> {
        self.field_of(Piece::Pool(pool), "running").map(|count| String::from_utf8_lossy(&count).into_owned())
    }

    /// How many jobs count as running for a user, over all pools.
    #[track_caller]
    pub fn count_running_of(&self, user: &str) -> usize {
        let count = self.field_of(Piece::RunningByUser, user);
        count.map_or(0, |count| String::from_utf8_lossy(&count).parse().expect("a count"))
    }

    /// Makes a pool count something else than runs.
    #[track_caller]
    pub fn miscount_running(&self, pool: &str, count: u64) {
        self.set(Piece::Pool(pool), &[("running", count.to_string())]);
    }

    /// Makes a pool count something else for a user than it has running there.
    #[track_caller]
    pub fn miscount_running_of(&self, pool: &str, user: &str, count: u64) {
        self.ask(&["HSET", &format!("drayman:busy:{pool}"), user, &count.to_string()]);
    }

    /// Makes something else count for a user than it has running over all pools.
    #[track_caller]
    pub fn miscount_user(&self, user: &str, count: u64) {
        self.set(Piece::RunningByUser, &[(user, count.to_string())]);
    }

    // Turns.

    /// The pools that may have something to take, in the order of their turns.
    #[track_caller]
    pub fn turns(&self) -> Vec<String> {
        let keys = self.named("drayman:pools:");
        let mut turns: Vec<(f64, String)> = keys
            .iter()
            .flat_map(|class| self.scores(&Piece::Pools(class).name()).into_iter().map(|(pool, turn)| (turn, pool)))
            .collect();
        turns.sort_by(|(a, one), (b, other)| a.total_cmp(b).then_with(|| one.cmp(other)));
        turns.into_iter().map(|(_, pool)| pool).collect()
    }

    /// How far a pool is in its order of turns.
    #[track_caller]
    pub fn virtual_time(&self, pool: &str) -> f64 {
        self.fields(Piece::Pool(pool))["v"].parse().expect("a number")
    }

    /// The users of a pool who have something to take, and where they start in the order of turns.
    #[track_caller]
    pub fn start_tags(&self, pool: &str) -> BTreeMap<String, f64> {
        self.scores(&Piece::Ready(pool).name())
    }

    /// The users of a pool who were served of late, and where what they had ends in the order of turns.
    #[track_caller]
    pub fn finish_tags(&self, pool: &str) -> BTreeMap<String, f64> {
        self.scores(&format!("drayman:debt:{pool}"))
    }

    /// Has a user have something to take by the pool's index alone.
    #[track_caller]
    pub fn list_ready(&self, pool: &str, user: &str, start_tag: u64) {
        self.ask(&["ZADD", &Piece::Ready(pool).name(), &start_tag.to_string(), user]);
    }

    /// Has so many pools `<class><stem>1`, `<class><stem>2`, … stand before all others, with nothing to take.
    #[track_caller]
    pub fn fill_pools(&self, class: &str, stem: &str, count: u32) {
        let script = "redis.call('SADD', 'drayman:classes', ARGV[1])
            for i = 1, ARGV[3] do redis.call('ZADD', 'drayman:pools:' .. ARGV[1], 0, ARGV[1] .. ARGV[2] .. i) end";
        self.ask(&["EVAL", script, "0", class, stem, &count.to_string()]);
    }

    // Sessions and the leader.

    /// All sessions.
    #[track_caller]
    pub fn sessions(&self) -> Vec<String> {
        self.members(Piece::Sessions)
    }

    /// How often a session has said that it lives.
    #[track_caller]
    pub fn beat(&self, session: &str) -> u64 {
        self.fields(Piece::Session(session))["beat"].parse().expect("a number")
    }

    /// A session that nobody holds, as a worker that was killed has left it.
    #[track_caller]
    pub fn abandon_session(&self, id: &str, pools: &str) {
        self.set(Piece::Session(id), &[("beat", "7"), ("take", "1"), ("service", pools)]);
        self.ask(&["SADD", &Piece::Sessions.name(), id]);
    }

    /// Which jobs a session is asked to cancel.
    #[track_caller]
    pub fn asked_to_cancel(&self, session: &str) -> Vec<String> {
        self.ask(&["SMEMBERS", &format!("drayman:cancels:{session}")]).texts()
    }

    /// Asks the session that runs a job to cancel it, without the message that makes it hear at once.
    #[track_caller]
    pub fn ask_to_cancel_quietly(&self, session: &str, id: &str) {
        self.set_field(id, "cancel_requested_at", "2026-01-01T00:00:00.000Z");
        self.ask(&["SADD", &format!("drayman:cancels:{session}"), id]);
    }

    /// How many sessions wait for work of these pools (patterns, as they stand in their service).
    #[track_caller]
    pub fn parked(&self, pools: &str) -> usize {
        self.ask(&["ZCARD", &Piece::Parked(pools).name()]).int() as usize
    }

    /// Has a session wait for work of these pools, the least number longest.
    #[track_caller]
    pub fn park(&self, pools: &str, session: &str, since: u32) {
        self.ask(&["ZADD", &Piece::Parked(pools).name(), &since.to_string(), session]);
    }

    /// Has a session that waits for work of these pools wait no longer than any other; no session that does not.
    #[track_caller]
    pub fn park_last(&self, pools: &str, session: &str) {
        self.ask(&["ZADD", &Piece::Parked(pools).name(), "XX", "9e15", session]);
    }

    /// The pools (patterns) for which any session waits now.
    #[track_caller]
    pub fn awaited(&self) -> Vec<String> {
        self.named(&Piece::Parked("").name())
    }

    /// The pools (patterns) that sessions may wait for.
    #[track_caller]
    pub fn services(&self) -> Vec<String> {
        self.members(Piece::Services)
    }

    /// The session that leads.
    #[track_caller]
    pub fn leader(&self) -> Option<String> {
        let reply = self.ask(&["GET", &Piece::Leader.name()]);
        (!reply.is_nil()).then(|| reply.text().split('\t').next().unwrap_or_default().to_owned())
    }

    /// The latest leader's term.
    #[track_caller]
    pub fn term(&self) -> u64 {
        self.ask(&["GET", "drayman:term"]).text().parse().expect("a number")
    }

    /// The version of the protocol that the state is of.
    #[track_caller]
    pub fn version(&self) -> Option<String> {
        let reply = self.ask(&["GET", &Piece::Version.name()]);
        (!reply.is_nil()).then(|| reply.text())
    }

    /// Makes it the state of another version.
    #[track_caller]
    pub fn set_version(&self, version: &str) {
        self.ask(&["SET", &Piece::Version.name(), version]);
    }

    /// Says what a leader says when memory is nearly full.
    #[track_caller]
    pub fn set_no_room(&self, used: u64, mark: u64) {
        self.ask(&["SET", &Piece::NoRoom.name(), &format!("{used} {mark}")]);
    }

    // Schedules.

    /// Where a schedule stands in the order of schedules, as text; `inf` if it makes no tick.
    #[track_caller]
    pub fn tick_in_order(&self, schedule: &str) -> Option<String> {
        self.score(Piece::Schedules, schedule)
    }

    /// Makes a schedule's next tick one at this time.
    #[track_caller]
    pub fn move_tick(&self, schedule: &str, at_ms: u64) {
        self.set(Piece::Schedule(schedule), &[("due", at_ms.to_string())]);
        self.misplace_tick(schedule, at_ms);
    }

    /// Has the order of the schedules alone name a time for it.
    #[track_caller]
    pub fn misplace_tick(&self, schedule: &str, at_ms: u64) {
        self.ask(&["ZADD", &Piece::Schedules.name(), &at_ms.to_string(), schedule]);
    }

    // Trackers.

    /// The ids of a tracker that its indexes name, by status.
    #[track_caller]
    pub fn tracked(&self, tracker: &str) -> BTreeMap<String, Vec<String>> {
        let statuses = self.named(&Piece::TrackedByStatus(tracker, "").name());
        let ids = |status: &str| self.ordered(Piece::TrackedByStatus(tracker, status));
        statuses.iter().map(|status| (status.clone(), ids(status))).collect()
    }

    /// The ids of a tracker that are locked.
    #[track_caller]
    pub fn tracked_locks(&self, tracker: &str) -> Vec<String> {
        self.ordered(Piece::TrackedLocks(tracker))
    }

    /// Makes the lock of a tracked job one that has expired.
    #[track_caller]
    pub fn expire_lock(&self, tracker: &str, id: &str) {
        self.set(Piece::Tracked(tracker, id), &[("lock_until", "1")]);
        self.ask(&["ZADD", &Piece::TrackedLocks(tracker).name(), "XX", "1", id]);
    }

    // Events and the export.

    /// How many listen to the events of a user's jobs.
    #[track_caller]
    pub fn listeners(&self, user: &str) -> usize {
        self.subscribers(&format!("drayman:events:{user}"))
    }

    /// Publishes an event of a user's job.
    #[track_caller]
    pub fn publish_event(&self, user: &str, id: &str, status: &str) {
        self.ask(&["PUBLISH", &format!("drayman:events:{user}"), &format!("{id} {status}")]);
    }

    /// How many ends are to be exported.
    #[track_caller]
    pub fn to_export(&self) -> usize {
        self.ask(&["XLEN", &Piece::Feed.name()]).int() as usize
    }

    // Batches and flows.

    /// All batches, the one that was made first first.
    #[track_caller]
    pub fn batches(&self) -> Vec<String> {
        self.ordered(Piece::Batches)
    }

    /// The batches that have parts which were dealt and have not ended.
    #[track_caller]
    pub fn batches_at_work(&self) -> Vec<String> {
        self.named(&Piece::BatchParts("").name())
    }

    /// The batches of which rows are kept.
    #[track_caller]
    pub fn batches_with_rows(&self) -> Vec<String> {
        self.named(&Piece::BatchRows("").name())
    }

    /// Whether a batch has rows that are still to be dealt.
    #[track_caller]
    pub fn has_rows_to_deal(&self, batch: &str) -> bool {
        self.field_of(Piece::Batch(batch), "cursor").is_some()
    }

    /// All that there is of a batch and of its parts, by what a program calls it, with the ms after which it goes by
    /// itself; nothing for what stays.
    #[track_caller]
    pub fn left_of_batch(&self, batch: &str) -> BTreeMap<String, Option<u64>> {
        let mut keys = self.ask(&["KEYS", "drayman:batch*"]).texts();
        keys.extend(self.ask(&["KEYS", &Piece::Job("*").name()]).texts());
        keys.retain(|key| key.split(':').any(|word| word == batch));
        let expires = |key: &str| self.ask(&["PTTL", key]).int().try_into().ok();
        keys.into_iter().map(|key| (key.clone(), expires(&key))).collect()
    }

    /// How many bytes all that there is of a batch and of its parts occupies by what Redis says.
    #[track_caller]
    pub fn occupied_by_batch(&self, batch: &str) -> u64 {
        let bytes = |key: &String| self.ask(&["MEMORY", "USAGE", key, "SAMPLES", "0"]).int() as u64;
        self.left_of_batch(batch).keys().map(bytes).sum()
    }

    /// All executions of flows, the one that was launched first first.
    #[track_caller]
    pub fn flows(&self) -> Vec<String> {
        self.ordered(Piece::Flows)
    }

    /// All that there is of flows beside records of jobs, by what a program calls it.
    #[track_caller]
    pub fn left_of_flows(&self) -> Vec<String> {
        self.ask(&["KEYS", "drayman:flow*"]).texts()
    }

    // What these have in common.

    #[track_caller]
    fn members(&self, piece: Piece<'_>) -> Vec<String> {
        let mut members = self.ask(&["SMEMBERS", &piece.name()]).texts();
        members.sort();
        members
    }

    #[track_caller]
    fn ordered(&self, piece: Piece<'_>) -> Vec<String> {
        self.ask(&["ZRANGE", &piece.name(), "0", "-1"]).texts()
    }

    #[track_caller]
    fn score(&self, piece: Piece<'_>, member: &str) -> Option<String> {
        let reply = self.ask(&["ZSCORE", &piece.name(), member]);
        (!reply.is_nil()).then(|| reply.text())
    }

    #[track_caller]
    fn scores(&self, key: &str) -> BTreeMap<String, f64> {
        let flat = self.ask(&["ZRANGE", key, "0", "-1", "WITHSCORES"]).texts();
        flat.chunks_exact(2).map(|pair| (pair[0].clone(), pair[1].parse().expect("a score"))).collect()
    }

    #[track_caller]
    fn subscribers(&self, channel: &str) -> usize {
        let Value::Array(reply) = self.ask(&["PUBSUB", "NUMSUB", channel]) else { panic!("NUMSUB gave no array") };
        reply[1].int() as usize
    }
}

fn unknown(name: &str) -> String {
    format!("drayman:{name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_submission_is_seen_as_what_it_is() {
        let server = RedisServer::start();
        let state = server.state(5);
        let foreign = state.foreign();
        foreign.submit("ann", "a1", &[("status", "pending"), ("host", "h")]);
        foreign.submit("ann", "a2", &[("status", "pending")]);
        foreign.push_first("ann", "a0");
        assert_eq!(state.waiting("ann"), ["a0", "a1", "a2"], "the next first");
        assert_eq!(state.queued_users(), ["ann"]);
        assert_eq!(state.queues(), BTreeMap::from([("ann".into(), state.waiting("ann"))]));
        assert_eq!(state.jobs(), ["a1", "a2"]);
        assert_eq!(state.record("a1"), [("host", "h"), ("status", "pending"), ("user", "ann")].map(pair).into());
        assert_eq!((state.status("a1").as_deref(), state.status("none")), (Some("pending"), None));
        state.set_field("a1", "status", "done");
        assert_eq!(state.field("a1", "status").as_deref(), Some("done"));
        assert!(state.is_any_waiting() && state.is_idle());
        assert!(server.state(0).digest().is_empty(), "another database");
    }

    fn pair((name, value): (&str, &str)) -> (String, String) {
        (name.into(), value.into())
    }

    #[test]
    fn each_piece_is_lost_spoiled_and_left_alone_by_itself() {
        let server = RedisServer::start();
        let state = server.state(5);
        state.foreign().submit("ann", "a1", &[("status", "pending")]);
        let before = state.digest();
        let (job, queue) = (Piece::Job("a1"), Piece::Queue("ann"));
        state.lose(queue);
        assert!(state.has(job) && !state.has(queue) && state.has_any(&[queue, job]));
        state.foreign().push("ann", "a1");
        assert_eq!(state.digest(), before);
        for piece in [job, queue, Piece::Leader, Piece::ScheduledByUser] {
            assert!(!state.is_spoiled(piece));
            state.spoil(piece);
            assert!(state.is_spoiled(piece), "{piece:?}");
        }
        assert_ne!(state.digest(), before);
        state.lose(job);
        assert!(!state.stays(job) && state.expires_in_ms(job).is_none());
        state.set_field("a1", "user", "ann");
        assert!(state.stays(job) && state.expires_in_ms(job).is_none());
        state.leave_untouched(job, 100);
        assert!(state.ask(&["OBJECT", "IDLETIME", &job.name()]).int() >= 100);
        state.expire(job);
        crate::eventually_blocking("the record to expire", || (!state.has(job)).then_some(()));
    }

    #[test]
    fn a_claim_reads_as_it_was_written() {
        let server = RedisServer::start();
        let state = server.state(5);
        let claim = Claim {
            id: "a1".into(),
            session: "host:1:x".into(),
            fence: 7,
            pool: "sql:h".into(),
            user: "ann".into(),
            charged: "1000000".into(),
            finish_tag: "5".into(),
            fairness: "jobs".into(),
        };
        state.set_claim(&claim);
        state.list_unclaimed("host:1:x", "a1");
        assert_eq!((state.claims(), state.running()), (vec![claim.clone()], 1));
        assert_eq!(state.claim("a1"), Some(claim));
        state.lose_claim_and_holder("a1");
        assert!(state.is_idle() && state.digest().is_empty());
    }

    #[test]
    fn books_that_do_not_balance_are_found() {
        let server = RedisServer::start();
        let state = server.state(5);
        let no_rows = |_: &[u8]| Ok(RowEnds::default());
        state.check_books(no_rows);
        let finds = |what: &str| {
            let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| state.check_books(no_rows)));
            assert!(found.is_err(), "{what}");
            state.ask(&["FLUSHDB"]);
        };
        state.miscount_running("sql:h", 1);
        finds("a pool that counts what does not run");
        state.miscount_running_of("sql:h", "ann", 1);
        finds("a user of a pool");
        state.miscount_user("ann", 1);
        finds("a user");
        state.list_unclaimed("host:1:x", "a1");
        finds("a session's list");
        state.foreign().push("ann", "a1");
        finds("a queue that no index names");
        state.foreign().show_working("ann", "a1");
        finds("what foreign readers see running");
        state.fill_finished("f", 3, 1);
        state.check_books(no_rows);
        state.lose(Piece::Finished);
        finds("records that stand in one book only");
    }
}
