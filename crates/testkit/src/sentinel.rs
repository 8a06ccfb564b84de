//! A primary, its replica and three sentinels that watch them.

use std::fs;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::ports::Port;
use crate::process::spawn_child;
use crate::redis::{RawClient, RedisServer, Value, find_program};
use crate::scratch::Scratch;
use crate::wait::eventually_blocking;

const NAME: &str = "drayman";

/// Two Redis servers, one the other's replica, under the care of three sentinels. All killed on drop.
#[derive(Debug)]
pub struct Sentinel {
    servers: [RedisServer; 2],
    sentinels: Vec<Watcher>,
}

#[derive(Debug)]
struct Watcher {
    child: Child,
    port: Port,
    // Last: the folder goes after the process.
    _scratch: Scratch,
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Sentinel {
    /// Returns when each of the three knows the replica and the other two. A primary that is silent for `down_after` is
    /// given up; on a busy machine less than two seconds are too few.
    pub fn start(down_after: Duration) -> Self {
        // AOF, so that what a killed server held can be looked at; replicas are served at once.
        let config = [("appendonly", "yes"), ("appendfsync", "always"), ("repl-diskless-sync-delay", "0")];
        let primary = RedisServer::with_config(&config);
        let of = format!("127.0.0.1 {}", primary.addr().port());
        let replica = RedisServer::with_config(&[&config[..], &[("replicaof", &of)]].concat());
        eventually_blocking("the replica to be in step", || {
            let says = replica.raw(&["INFO", "replication"]).text();
            says.contains("master_link_status:up").then_some(())
        });
        let sentinels = (0..3).map(|_| Watcher::start(primary.addr(), down_after)).collect();
        let all = Self { servers: [primary, replica], sentinels };
        for watcher in &all.sentinels {
            eventually_blocking("the sentinels to know each other and the replica", || {
                let state = RawClient::connect(watcher.addr()).ok()?.try_call(&["SENTINEL", "MASTER", NAME]).ok()?;
                let Value::Array(_) = state else { return None };
                let state = state.map();
                (state["num-slaves"] == "1" && state["num-other-sentinels"] == "2").then_some(())
            });
        }
        all
    }

    /// The URL of a database of whatever server is the primary.
    pub fn url_db(&self, db: u8) -> String {
        let [first, others @ ..] = &self.sentinels[..] else { unreachable!("there are three") };
        let nodes: String = others.iter().map(|other| format!("&node={}", other.addr())).collect();
        format!("redis-sentinel://{}/{db}?sentinelServiceName={NAME}{nodes}", first.addr())
    }

    /// The server that was the primary in the beginning, and the other one.
    pub fn first_and_second(&self) -> (&RedisServer, &RedisServer) {
        (&self.servers[0], &self.servers[1])
    }

    /// Waits until `server` is the primary by its own word and that of all sentinels.
    pub fn wait_for_primary(&self, server: &RedisServer) {
        eventually_blocking("the other server to become the primary", || {
            let role = server.client(0).try_call(&["ROLE"]).ok()?;
            let Value::Array(role) = role else { return None };
            (role.first()?.text() == "master").then_some(())
        });
        for watcher in &self.sentinels {
            eventually_blocking("the sentinels to agree on the primary", || {
                let mut client = RawClient::connect(watcher.addr()).ok()?;
                let address = client.try_call(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME]).ok()?.texts();
                (address[1] == server.addr().port().to_string()).then_some(())
            });
        }
    }
}

impl Watcher {
    fn start(primary: SocketAddr, down_after: Duration) -> Self {
        let (scratch, port) = (Scratch::new("sentinel"), Port::lease());
        let file = scratch.path().join("sentinel.conf");
        let text = format!(
            "port {}\nbind 127.0.0.1\ndir {}\nsentinel monitor {NAME} 127.0.0.1 {} 2\n\
             sentinel down-after-milliseconds {NAME} {}\nsentinel failover-timeout {NAME} 10000\n",
            port.number(),
            scratch.path().display(),
            primary.port(),
            down_after.as_millis(),
        );
        fs::write(&file, text).expect("a file in a fresh folder");
        let mut command = Command::new(find_program(&["redis-server", "valkey-server"]));
        command.arg(&file).arg("--sentinel").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = spawn_child(command, Signal::SIGKILL).expect("a sentinel starts");
        Self { child, port, _scratch: scratch }
    }

    fn addr(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.port.number()).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_replica_takes_over_from_a_primary_that_is_gone_with_what_it_held() {
        let sentinel = Sentinel::start(Duration::from_secs(2));
        let (first, second) = sentinel.first_and_second();
        let mut client = first.client(0);
        client.call(&["SET", "a", "1"]);
        assert_eq!(client.call(&["WAIT", "1", "5000"]), Value::Int(1));
        first.kill();
        sentinel.wait_for_primary(second);
        assert_eq!(second.raw(&["GET", "a"]).text(), "1");
    }
}
