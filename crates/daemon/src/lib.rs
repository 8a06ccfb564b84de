//! What the daemons share at their edges: how the world tells them to stop, and what they tell systemd.

pub mod notify;
pub mod shutdown;
