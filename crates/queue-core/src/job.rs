//! The hash of a job: which fields the protocol reads and writes, and how large they may be.

/// The kinds of jobs that have a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Of {
    /// All jobs.
    Both,
    /// SQL jobs.
    Sql,
    /// Tasks.
    Task,
}

impl Of {
    /// The word for it in Lua.
    pub const fn as_str(self) -> &'static str {
        match self {
            Of::Both => "both",
            Of::Sql => "sql",
            Of::Task => "task",
        }
    }
}

/// The fields that are read of a job, each with the most bytes that are accepted. Others are kept and never read.
///
/// A take hands out the values of those that its kind has, in this order. The status comes first.
pub const FIELDS: &[(&str, usize, Of)] = &[
    ("status", 32, Of::Both),
    ("query", 1 << 20, Of::Sql),
    ("onsuccess", 1 << 20, Of::Sql),
    ("onerror", 1 << 20, Of::Sql),
    ("fallback_status", 32, Of::Sql),
    ("failed_reason", 1 << 16, Of::Sql),
    ("database", 128, Of::Sql),
    ("host", 255, Of::Sql),
    ("port", 16, Of::Sql),
    ("dbname", 1024, Of::Sql),
    ("dbuser", 1024, Of::Sql),
    ("pass", 8192, Of::Sql),
    ("retry_on", 256, Of::Sql),
    ("idempotent", 8, Of::Sql),
    ("trace", 256, Of::Sql),
    ("results", 1 << 17, Of::Sql),
    ("params", 1 << 16, Of::Sql),
    ("input", 1 << 20, Of::Task),
    ("encoding", 16, Of::Task),
    ("context", 1 << 18, Of::Task),
    ("checkpoint", CHECKPOINT_MAX_BYTES, Of::Task),
    ("checkpoint_of", 512, Of::Task),
    ("chunk", 8, Of::Task),
    ("earlier", EARLIER_MAX_BYTES, Of::Task),
    ("deadline", 32, Of::Task),
    ("tags", TAGS_MAX_BYTES, Of::Task),
    ("timeout", 32, Of::Both),
    ("max_attempts", 16, Of::Both),
    ("backoff", 16, Of::Both),
    ("retry_delay", 16, Of::Both),
    ("retry_delay_max", 16, Of::Both),
    ("attempts", 16, Of::Both),
    ("unclean", 16, Of::Both),
    ("unique", UNIQUE_MAX_BYTES, Of::Both),
    ("run", 16, Of::Both),
    ("traceparent", 128, Of::Both),
    ("cancel_requested_at", 64, Of::Both),
    ("created_at", 64, Of::Both),
    ("lost_worker", 512, Of::Both),
    ("history", 1 << 16, Of::Both),
    ("part", 512, Of::Both),
];

/// What workers write about a task, each with the most bytes that they write. Larger results go to the object store.
pub const TOLD: &[(&str, usize)] = &[
    ("result", RESULT_MAX_BYTES as usize),
    ("result_encoding", 16),
    ("result_object", 1024),
    ("result_bytes", 32),
    ("messages", 1 << 16),
    ("files", 1 << 16),
    ("progress", 1 << 12),
    ("log", 1 << 14),
];

/// Most bytes of what a task saves to go on from.
pub const CHECKPOINT_MAX_BYTES: usize = 1 << 16;
/// Most bytes of the ids of batches in which an earlier execution has done rows already, the latest last.
pub const EARLIER_MAX_BYTES: usize = 2048;

/// Most bytes of a result that a job's hash holds.
pub const RESULT_MAX_BYTES: u64 = 1 << 16;

/// Most bytes of all tags of a job, with the commas between them.
pub const TAGS_MAX_BYTES: usize = 1024;

/// Longest unique key, in bytes.
pub const UNIQUE_MAX_BYTES: usize = 256;

/// Longest time that a unique key may be held by its period, in ms: a year.
pub const UNIQUE_PERIOD_MAX_MS: u64 = 366 * 86_400_000;

/// Most starts in a period that a rate may allow: so many are remembered of whoever has one.
pub const RATE_MAX: u64 = 10_000;

/// Longest period of a rate, and longest timeout of a user, in ms.
pub const PERIOD_MAX_MS: u64 = 30 * 86_400_000;

/// Most jobs at once that a limit may name.
pub const CONCURRENCY_MAX: u32 = 1_000_000_000;

/// The least and the greatest weight of a user or a pool.
pub const WEIGHTS: (f64, f64) = (0.001, 1_000.0);

/// Most bytes of a job's fields and their names, whatever limits a producer has.
pub const PAYLOAD_MAX: u64 = 1 << 20;

/// How long a queued id may wait for its hash, in ms.
pub const MISSING_MS: u64 = 60_000;

/// How long the hash of a job that was set aside is kept, in ms.
pub const REJECTED_MS: u64 = 2 * 3_600_000;

/// Most jobs in one call of a function.
pub const CALL_MAX: usize = 100;
