//! The protocol against a real Redis, each test on a server of its own. One program, so that it is linked once.

mod anything;
mod budgets;
mod cancel;
mod fairness;
mod foreign;
mod hostile;
mod inspect;
mod leftovers;
mod producer;
mod reconcile;
mod reference;
mod replicas;
mod retry;
mod scripts;
mod sessions;
mod support;
mod take_finish;
mod trouble;
mod wakeups;
