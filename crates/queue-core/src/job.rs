//! The hash of a job: which fields the protocol reads and writes, and how large they may be.

/// The fields that are read of a job, each with the most bytes that are accepted. Others are kept and never read.
///
/// A take hands out their values in this order.
pub const FIELDS: &[(&str, usize)] = &[
    ("query", 1 << 20),
    ("onsuccess", 1 << 20),
    ("onerror", 1 << 20),
    ("status", 32),
    ("fallback_status", 32),
    ("failed_reason", 1 << 16),
    ("database", 128),
    ("host", 255),
    ("port", 16),
    ("dbname", 1024),
    ("dbuser", 1024),
    ("pass", 8192),
    ("timeout", 32),
    ("max_attempts", 16),
    ("backoff", 16),
    ("retry_delay", 16),
    ("retry_delay_max", 16),
    ("retry_on", 256),
    ("idempotent", 8),
    ("attempts", 16),
    ("unclean", 16),
    ("trace", 256),
    ("results", 1 << 17),
    ("traceparent", 128),
    ("cancel_requested_at", 64),
    ("created_at", 64),
    ("lost_worker", 512),
    ("history", 1 << 16),
];

/// Most bytes of a job's fields and their names, whatever limits a producer has.
pub const PAYLOAD_MAX: u64 = 1 << 20;

/// How long a queued id may wait for its hash, in ms.
pub const MISSING_MS: u64 = 60_000;

/// How long the hash of a job that was set aside is kept, in ms.
pub const REJECTED_MS: u64 = 2 * 3_600_000;

/// Most jobs in one call of a script.
pub const CALL_MAX: usize = 100;
