//! The SQL executor on real databases, without Redis: a claim that does as a test says stands in for it.

mod cluster;
mod commit_proxy;
mod export;
mod postgres;
mod rows;
mod sqlite;
mod support;
mod tls;
