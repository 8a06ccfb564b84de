//! TCP ports for servers that are stopped and started again.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::process;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::unistd::geteuid;
use tokio::net::TcpSocket;

use crate::scratch::short_temp_dir;

/// Below the range from which the kernel gives ports to outgoing connections (32768 and up). From there a client that
/// keeps trying a stopped server sooner or later is given that server's own port to call from, and then is
/// connected to itself.
const RANGE: std::ops::Range<u16> = 12_000..32_000;

/// A port that no other fixture of this account's test processes uses while this value lives, also while its server is down.
#[derive(Debug)]
pub(crate) struct Port {
    number: u16,
    _lock: File,
}

impl Port {
    pub(crate) fn lease() -> Self {
        let dir = short_temp_dir().join(format!("drayman-ports-{}", geteuid()));
        fs::create_dir_all(&dir).unwrap_or_else(|error| panic!("cannot make {}: {error}", dir.display()));
        let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.subsec_nanos());
        let size = u32::from(RANGE.end - RANGE.start);
        // A multiplicative hash spreads processes that start together over the range.
        let first = (nanos ^ process::id().rotate_left(16)).wrapping_mul(0x9E37_79B1) % size;
        (0..size)
            .map(|step| RANGE.start + ((first + step) % size) as u16)
            .find_map(|number| {
                let lock = File::create(dir.join(number.to_string())).ok()?;
                lock.try_lock().ok()?;
                is_free(number).then_some(())?;
                Some(Self { number, _lock: lock })
            })
            .expect("a free port")
    }

    pub(crate) fn number(&self) -> u16 {
        self.number
    }
}

/// Nobody listens there. Asked without listening: a process that is started at this moment has a copy of the socket until it
/// becomes another program, and one that listened would keep the port from its user for so long.
fn is_free(number: u16) -> bool {
    let bind = || {
        let socket = TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        socket.bind(SocketAddr::from(([127, 0, 0, 1], number)))
    };
    bind().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_leases_share_a_port() {
        let mut ports: Vec<_> = (0..50).map(|_| Port::lease()).collect();
        ports.sort_by_key(Port::number);
        ports.dedup_by_key(|port| port.number());
        assert_eq!(ports.len(), 50);
        assert!(ports.iter().all(|port| RANGE.contains(&port.number())));
        let _listener = std::net::TcpListener::bind(("127.0.0.1", ports[0].number())).unwrap();
        assert!(!is_free(ports[0].number()));
    }
}
