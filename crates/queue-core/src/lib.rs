//! Drayman's protocol on Redis, in reading order: words, the door, verbs.
//!
//! The one crate that knows Redis. A job's state changes only inside a function of
//! the library; only the holder of a claim ends a run.

// Words: no I/O.
pub mod config;
pub mod error;
pub mod ids;
pub mod job;
pub mod keys;
pub mod model;

// The door.
pub mod calls;
pub mod group;
pub mod library;
pub mod objects;
pub mod reply;
pub mod store;

// Verbs.
pub mod batch;
pub mod cancel;
pub mod events;
pub mod export;
pub mod flow;
pub mod follow;
pub mod handle;
pub mod inspect;
pub mod leader;
pub mod limits;
pub mod overview;
pub mod producer;
pub mod reconcile;
pub mod retry;
pub mod schedule;
pub mod session;
pub mod slow_query;
pub mod tracker;

pub use error::Error;
pub use store::Store;

/// Programs of another major version refuse to work on the same keys.
pub const VERSION_MAJOR: u32 = 1;
/// Raised by additions that older programs may ignore.
pub const VERSION_MINOR: u32 = 0;
