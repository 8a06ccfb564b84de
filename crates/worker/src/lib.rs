//! Runs jobs taken from Drayman's queues: the library behind `drayman-worker`.

pub mod app;
pub mod attempt;
pub mod config;
pub mod dispatch;
pub mod execute;
pub mod maintenance;
pub mod notify;
pub mod shutdown;
pub mod stop;
