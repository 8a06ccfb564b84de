//! Real servers for tests, and the ways in which they and the network fail.
//!
//! - [`RedisServer`] and [`Postgres`]: private servers, each in a folder of its own, gone when dropped;
//! - [`state`]: what they hold, seen and set in the words of the protocol;
//! - [`Sentinel`]: two of them, and three sentinels that replace the one by the other;
//! - [`Proxy`]: a network between client and server that loses, delays and cuts;
//! - [`Daemon`] and [`bin`]: this workspace's programs as child processes, with their output;
//! - [`NotifySocket`]: systemd's end of the readiness protocol;
//! - [`chaos`]: all of these together for hundreds of jobs or more, with random work and random faults;
//! - [`eventually`]: wait for a state, never for a time.
//!
//! A fixture that cannot be set up panics with the reason: a test has no better answer to it. The servers, the
//! proxy and the notify socket run outside the test's async runtime, so blocking calls to them cannot deadlock it.

pub mod chaos;
mod notify;
mod ports;
mod postgres;
mod process;
mod proxy;
mod redis;
mod resp;
mod scratch;
mod sentinel;
pub mod state;
mod wait;

pub use notify::NotifySocket;
pub use postgres::{Postgres, Rows};
pub use process::{Daemon, Signal, bin, spawn_child};
pub use proxy::{Direction, Point, Proxy};
pub use redis::{RawClient, RedisServer, Value};
pub use scratch::Scratch;
pub use sentinel::Sentinel;
pub use wait::{Answer, PATIENCE, end_of, eventually, eventually_blocking};
