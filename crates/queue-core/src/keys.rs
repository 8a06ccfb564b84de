//! Every key and channel: one constructor, its Redis type, its owner and its lifetime.
//!
//! The table below is the only place where a key's text stands. Rust code builds keys through [`Keys`]; Lua code builds them
//! through the functions that `Keys::lua` renders from the same table, so the two can't differ.
//!
//! Keys that begin with `batch:` or `limits:` are the layout that foreign producers write and foreign readers read. All others
//! begin with `drayman:` and may carry a hash tag, `drayman:{tag}:…`, so that a partition of the keyspace can live on one
//! node of a cluster.

use std::fmt::Write as _;

/// What a key holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holds {
    /// A string.
    String,
    /// A list.
    List,
    /// A set.
    Set,
    /// A sorted set.
    SortedSet,
    /// A hash.
    Hash,
    /// A stream.
    Stream,
    /// Nothing: the name of a pub/sub channel.
    Channel,
}

impl Holds {
    /// The word that Redis answers to `TYPE`.
    pub fn type_name(self) -> &'static str {
        match self {
            Holds::String => "string",
            Holds::List => "list",
            Holds::Set => "set",
            Holds::SortedSet => "zset",
            Holds::Hash => "hash",
            Holds::Stream => "stream",
            Holds::Channel => "none",
        }
    }
}

/// One row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// Name of the constructor.
    pub name: &'static str,
    /// The key; `{}` stands for the one parameter, `{tag}` for the place of the hash tag.
    pub template: &'static str,
    /// What it holds.
    pub holds: Holds,
}

macro_rules! keys {
    ($($(#[doc = $doc:literal])+ $name:ident $(($param:ident))? = $template:literal, $holds:ident;)+) => {
        /// Every key of the protocol.
        pub const TABLE: &[Key] = &[$(Key { name: stringify!($name), template: $template, holds: Holds::$holds }),+];

        impl Keys {
            $($(#[doc = $doc])+
            pub fn $name(&self $(, $param: &str)?) -> String {
                let parameter: Option<&str> = None $(.or(Some($param)))?;
                self.build($template, parameter)
            })+
        }
    };
}

/// Builds keys.
#[derive(Debug, Clone, Default)]
pub struct Keys {
    tag: Option<String>,
}

keys! {
    /// One job. Fields in [`crate::job::FIELDS`]. Written by producers, then by the claim's holder. Expires after its retention.
    job(id) = "batch:jobs:{}", Hash;
    /// A user's pending SQL jobs: pushed left, taken right. Empty means absent. Foreign producers push tasks here too: each
    /// moves to its own line when it is noticed.
    queue(user) = "batch:queue:{}", List;
    /// Users whose queue is not empty.
    queued_users = "batch:indexes:queue", Set;
    /// A user's jobs being worked on, for foreign readers: an id enters at take and leaves with its claim.
    wip(user) = "batch:wip:user:{}", List;
    /// Users who have jobs being worked on, for foreign readers.
    wip_users = "batch:wip:users", Set;
    /// Scheduling lock of a database host in the foreign layout; the leader holds it so that no foreign worker schedules the
    /// host too. Lives 5 s unless renewed.
    host_lock(host) = "batch:locks:{}", String;
    /// A user's limits: `timeout` in ms for a statement or a call of a handler, `weight` for its share, `concurrency` for its
    /// running jobs, `rate` for the starts in any `period` (in ms), `paused` (since when, and why). Written by operators; no expiry.
    limits(user) = "limits:batch:{}", Hash;
    /// Queue layout older than per-user lists: ids by database host. The leader empties it.
    old_queue(host) = "batch:queues:{}", List;
    /// Ids set aside because no job could be made of them: `id`, `user`, `reason`. Holds the newest 10,000 or so.
    rejected = "batch:rejected", Stream;
    /// Where foreign producers announce a push: the user's name.
    announcements = "batch:users", Channel;

    /// Version of this protocol, `major.minor`. Written by the first to connect; an unknown major is refused.
    version = "drayman:{tag}version", String;
    /// A user's waiting tasks of one handler, by line: `<app>.<op>:<user>`. Pushed left, taken right. Empty means absent.
    tasks(line) = "drayman:{tag}tasks:{}", List;
    /// What of a line (`sql:<user>` for SQL jobs) goes before the rest.
    high(line) = "drayman:{tag}high:{}", List;
    /// What of a line stands behind the rest.
    low(line) = "drayman:{tag}low:{}", List;
    /// How many jobs were taken of a line while it had such bands. Removed when the line is empty.
    bands = "drayman:{tag}bands", Hash;
    /// Lines of tasks that are not empty.
    lines = "drayman:{tag}lines", Set;
    /// The job that holds a unique key, behind its scope: `queued` (until it is taken), `done` (until it has ended), `period`
    /// (then the key lives that long). Removed when the job gives it up.
    unique(key) = "drayman:{tag}unique:{}", String;
    /// A pool: `v` its virtual time, `newest` the start tag of the latest newcomer, `running`, `capacity`, `user_limit`,
    /// `blocked` while a foreign worker schedules it, `idle_since`, `pass` its own turn among pools; an operator's `weight`,
    /// `concurrency`, `rate` and `period` in ms, `paused`. Made at first use, forgotten after a day of idleness unless it has a
    /// capacity or limit of its own.
    pool(pool) = "drayman:{tag}pool:{}", Hash;
    /// Users of a pool who have a job to take and are below their limit, by start tag.
    ready(pool) = "drayman:{tag}ready:{}", SortedSet;
    /// Users of a pool by finish tag, for as long as it is ahead of the pool's virtual time.
    debt(pool) = "drayman:{tag}debt:{}", SortedSet;
    /// How many jobs each user has running in a pool; no entry for none.
    busy(pool) = "drayman:{tag}busy:{}", Hash;
    /// A user's expected run time in a pool, in µs, where the pool is fair by time. Kept for a week after the last correction.
    pace(pool) = "drayman:{tag}pace:{}", Hash;
    /// How many jobs each user has running over all pools; no entry for none.
    active = "drayman:{tag}active", Hash;
    /// Lines of a user that are kept from their turn by the user's limits. Given another turn when one of its jobs ends, when
    /// its rate allows more, or when its limits change.
    barred(user) = "drayman:{tag}barred:{}", Set;
    /// What a rate keeps from its turn, `user:<user>` or `pool:<pool>`, by when it allows more, in ms. Removed by the first take
    /// after that, or when the limits change.
    throttled = "drayman:{tag}throttled", SortedSet;
    /// The latest starts of `user:<user>` or `pool:<pool>`, in ms, the newest first; as many as its rate allows in a period,
    /// and for so long.
    starts(whose) = "drayman:{tag}starts:{}", List;
    /// Nothing is taken while it is there. It says since when, and why. Set by operators; no expiry.
    paused = "drayman:{tag}paused", String;
    /// Pools of a class that may have something to take, by their turns: each job moves a pool by a million over its weight. A class is what
    /// a pattern covers whole: `sql:` the hosts, `db:` the databases, `<app>.` the handlers of an application.
    pools(class) = "drayman:{tag}pools:{}", SortedSet;
    /// The classes of which there are such pools. One that is empty is forgotten in time.
    classes = "drayman:{tag}classes", Set;
    /// The greatest turn that a pool has had.
    turn = "drayman:{tag}turn", String;
    /// Running jobs: id → session, fence, pool, user, charged cost, the user's finish tag and the kind of fairness,
    /// separated by tabs. A job runs if and only if it is here.
    claims = "drayman:{tag}claims", Hash;
    /// Ids claimed by a session → the number of the take that claimed them. Removed with the session.
    work(session) = "drayman:{tag}work:{}", Hash;
    /// Ids that a session is asked to cancel. Removed with the session.
    cancels(session) = "drayman:{tag}cancels:{}", Set;
    /// A session: `host`, `pid`, `started_at`, `service`, `beat`, `beat_at`, `take`, `held`, `suspect`, the job it runs that has
    /// lost several workers, and `parked`, for which service it was parked last. Removed when closed or reclaimed.
    session(session) = "drayman:{tag}session:{}", Hash;
    /// All sessions.
    sessions = "drayman:{tag}sessions", Set;
    /// Sessions with nothing to do that serve the same pool patterns, by since when. Emptied by wake-ups.
    parked(service) = "drayman:{tag}parked:{}", SortedSet;
    /// The services that somebody may be parked for.
    services = "drayman:{tag}services", Set;
    /// The leader: session and term, separated by a tab. Lives for the leader's TTL unless renewed.
    leader = "drayman:{tag}leader", String;
    /// The latest leader's term.
    term = "drayman:{tag}term", String;
    /// Scheduled jobs by when they are due, in ms.
    due = "drayman:{tag}due", SortedSet;
    /// Queued ids that have no hash yet, `id user` by when they are given up, in ms.
    missing = "drayman:{tag}missing", SortedSet;
    /// Jobs in a final status by when they ended, in ms. Trimmed to the retention.
    finished = "drayman:{tag}finished", SortedSet;
    /// The same jobs by when their records expire, in ms.
    expiring = "drayman:{tag}expiring", SortedSet;
    /// The same jobs: id → bytes of the record, and `*` → the sum of them.
    kept = "drayman:{tag}kept", Hash;
    /// Jobs of [`Keys::due`] that were submitted with a delay: id → line.
    delayed = "drayman:{tag}delayed", Hash;
    /// How many of them each line has; no entry for none. They count as queued.
    delays = "drayman:{tag}delays", Hash;
    /// A schedule: its definition (`cron`, `zone`, `missed`, `grace`, `user`, and `job.` with the name of each field of its jobs), the
    /// `revision` of it, the next tick `due` in ms, `paused`, and what became of the ticks before. Written by operators and the
    /// leader; no expiry.
    schedule(name) = "drayman:{tag}schedule:{}", Hash;
    /// All schedules by their next tick in ms; a paused one stands at infinity.
    schedules = "drayman:{tag}schedules", SortedSet;
    /// All batches, by when they were made, in ms. Removed with their records.
    batches = "drayman:{tag}batches", SortedSet;
    /// What a batch is, as our functions alone say it: that it is here shows that one was handed over under this id. `user`, `keep` in ms, how
    /// many `loads` it had, the counts that its record shows too, how far its rows are dealt (`cursor`: `<load> <place> <row> <rows of this
    /// block>`, absent once all are dealt and while it is held), the µs that a row counts for when the next chunk is dealt (`pace`), and the chunk that is being dealt (`dealing`), the chunk that `ended` last, which loads have
    /// `joined:<load>`, that it is `releasing`, `aborting` or `ending` while that lasts, and that it is `over`.
    batch(batch) = "drayman:{tag}batch:{}", Hash;
    /// Rows of a batch, packed, by block: `<load>.<place>`. Live as long as the batch's record, as all that belongs to it.
    batch_rows(batch) = "drayman:{tag}batch_rows:{}", Hash;
    /// The blocks of a batch: `<load>.<place>` → rows, bytes, first and last line; `<load>` → how many blocks it has, once it is complete;
    /// `load:<key>` → load, `open` or `done`, blocks, rows, bytes.
    batch_blocks(batch) = "drayman:{tag}batch_blocks:{}", Hash;
    /// What became of the rows of a batch: `<block>:<first row>` → results of a chunk, packed; `<block>` → the first rows of those of its
    /// chunks that are there.
    batch_results(batch) = "drayman:{tag}batch_results:{}", Hash;
    /// The parts of a batch that were dealt and have not ended: id → how many rows it has, 0 for what is none.
    batch_parts(batch) = "drayman:{tag}batch_parts:{}", Hash;
    /// What has ended and is to be written to a database, while somebody writes it: `number`, `kind`, `id`, and the record's own fields. An
    /// entry is removed once it is written there.
    export = "drayman:{tag}export", Stream;
    /// That somebody does: `max_pending` entries are kept at most; and the `number` of the latest. Lives for a day unless renewed.
    exporting = "drayman:{tag}exporting", Hash;
    /// All executions of flows, by when they were launched, in ms. Removed with their records.
    flows = "drayman:{tag}flows", SortedSet;
    /// The steps of an execution, by their numbers from 1 on: `<number>` → `waiting`, `queued`, `done`, `failed`, `cancelled` or `skipped`,
    /// and what else is known of it as JSON; `job:<number>` → the fields of its job, packed, until the execution is over; `plan` → packed,
    /// for each its name, those that it comes after, and on which end; the flow's `user`, `instance` and how long it is to `keep` in ms. That it
    /// is here shows that a flow was launched under this id. Lives as long as the execution's record.
    flow_steps(flow) = "drayman:{tag}flow_steps:{}", Hash;
    /// An instance of a flow, by its digest: its `last` execution, the one `before` while that is made, and how many `launches` it had. Expires with the record of the last one.
    flow_instance(instance) = "drayman:{tag}flow_instance:{}", Hash;
    /// The leader's word that memory is nearly full: bytes used and the mark above which nothing new is accepted. Lives for
    /// some seconds unless renewed.
    full = "drayman:{tag}full", String;
    /// When a worker was lost while it ran a job, whatever the job's hash says of that. Lives for a day.
    lost(job) = "drayman:{tag}lost:{}", String;
    /// A mark that stands in the stream to the replicas behind all that was written before it. Lives for a minute.
    confirming = "drayman:{tag}confirming", String;
    /// A job that an application runs itself, by `tracker:id`: `status` and `code`, `codes`, `keep_ms`, `create_at`, `update_at`, `lock`,
    /// `lock_at`, `lock_until` in ms, `fence`, `retry`, `max_retry`, `data`, `errors`, `history`. Written by the tracker's functions. Kept for
    /// ever, but where `keep_ms` says how long after its end.
    track(record) = "drayman:{tag}track:{}", Hash;
    /// Ids of a tracker that have a status, by `tracker:status` and when they came to it, in µs. An id enters and leaves with its
    /// record's status.
    track_status(index) = "drayman:{tag}track_status:{}", SortedSet;
    /// Ids of a tracker that are locked, by when their locks expire, in µs. An id enters and leaves with its lock.
    track_locks(tracker) = "drayman:{tag}track_locks:{}", SortedSet;
    /// Ids of a tracker whose records expire, by when, in ms. Trimmed, with the indexes, as jobs are created and end.
    track_expiring(tracker) = "drayman:{tag}track_expiring:{}", SortedSet;
    /// Where a parked session hears that there is work.
    wake(session) = "drayman:{tag}wake:{}", Channel;
    /// Where a session hears which job to cancel.
    cancel(session) = "drayman:{tag}cancel:{}", Channel;
    /// Where the moves of a user's jobs are published: `id status`.
    events(user) = "drayman:{tag}events:{}", Channel;
}

impl Keys {
    /// Keys of the one partition of a standalone server.
    pub fn new() -> Self {
        Self::default()
    }

    /// Keys of one partition of many: its tag stands in braces in each of them.
    pub fn with_tag(tag: impl Into<String>) -> Self {
        Self { tag: Some(tag.into()) }
    }

    /// What all keys but those of the foreign layout begin with.
    pub fn prefix(&self) -> String {
        format!("drayman:{}", self.tag_text())
    }

    fn tag_text(&self) -> String {
        self.tag.as_ref().map(|tag| format!("{{{tag}}}:")).unwrap_or_default()
    }

    fn build(&self, template: &str, parameter: Option<&str>) -> String {
        let key = template.replace("{tag}", &self.tag_text());
        match parameter {
            Some(parameter) => key.replacen("{}", parameter, 1),
            None => key,
        }
    }

    /// The same constructors as Lua functions in a table `K`. What begins our keys, the library is told at each call.
    pub(crate) fn lua() -> String {
        let mut lua = String::from("local K = {}\n");
        for key in TABLE {
            let (prefix, rest) = match key.template.strip_prefix("drayman:{tag}") {
                Some(rest) => ("this.prefix .. ", rest),
                None => ("", key.template),
            };
            let line = match rest.split_once("{}") {
                Some((before, "")) => format!("function K.{}(x) return {prefix}'{before}' .. x end", key.name),
                Some((before, after)) => {
                    format!("function K.{}(x) return {prefix}'{before}' .. x .. '{after}' end", key.name)
                }
                None => format!("function K.{}() return {prefix}'{rest}' end", key.name),
            };
            writeln!(lua, "{line}").expect("writing to a String can't fail");
        }
        lua
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tag_stands_in_our_keys_and_not_in_the_foreign_ones() {
        let plain = Keys::new();
        let tagged = Keys::with_tag("p3");
        assert_eq!(plain.job("x"), "batch:jobs:x");
        assert_eq!(tagged.job("x"), "batch:jobs:x");
        assert_eq!(plain.ready("sql:h"), "drayman:ready:sql:h");
        assert_eq!(tagged.ready("sql:h"), "drayman:{p3}:ready:sql:h");
        assert_eq!(tagged.prefix(), "drayman:{p3}:");
        assert!(Keys::lua().contains("function K.ready(x) return this.prefix .. 'ready:' .. x end"));
        assert!(Keys::lua().contains("function K.job(x) return 'batch:jobs:' .. x end"));
    }

    #[test]
    fn no_two_keys_can_meet() {
        for (i, a) in TABLE.iter().enumerate() {
            for b in &TABLE[i + 1..] {
                let stem = |key: &Key| key.template.replace("{tag}", "").trim_end_matches("{}").to_owned();
                let (a, b) = (stem(a), stem(b));
                assert!(a != b, "{a} stands twice");
            }
        }
    }
}
