//! Runs jobs taken from Drayman's queues: the library behind `drayman-worker`.

pub mod app;
pub mod attempt;
pub mod builder;
pub mod config;
pub mod dispatch;
pub mod execute;
pub mod export;
pub mod maintenance;
pub mod metrics;
pub mod stop;

pub use daemon::{notify, shutdown};
