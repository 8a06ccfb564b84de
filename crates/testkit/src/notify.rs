//! systemd's end of the readiness protocol (sd_notify): a datagram socket.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::scratch::Scratch;
use crate::wait::eventually_blocking;

/// Receives what a daemon tells systemd.
#[derive(Debug)]
pub struct NotifySocket {
    path: PathBuf,
    messages: Arc<Mutex<Vec<(Instant, String)>>>,
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
    _scratch: Scratch,
}

impl NotifySocket {
    /// Listens on a socket in a folder of its own.
    #[expect(clippy::new_without_default, reason = "binds a socket")]
    pub fn new() -> Self {
        let scratch = Scratch::new("notify");
        let path = scratch.path().join("notify.sock");
        let socket = UnixDatagram::bind(&path).expect("a socket in a fresh folder");
        // So that the reader notices the end; the kernel queues only a few datagrams, so someone must always read.
        socket.set_read_timeout(Some(Duration::from_millis(50))).expect("a timeout above zero");
        let messages = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let reader = thread::spawn({
            let (messages, stop) = (Arc::clone(&messages), Arc::clone(&stop));
            move || receive(&socket, &messages, &stop)
        });
        Self { path, messages, stop, reader: Some(reader), _scratch: scratch }
    }

    /// The value for the environment variable `NOTIFY_SOCKET`.
    pub fn path(&self) -> &str {
        self.path.to_str().expect("the folder's name is ASCII")
    }

    /// All messages so far with their times. One message may be several lines.
    pub fn messages(&self) -> Vec<(Instant, String)> {
        self.messages.lock().unwrap_or_else(|poison| poison.into_inner()).clone()
    }

    /// The first line so far that begins with `start`; for use with [`crate::eventually`].
    pub fn line(&self, start: &str) -> Option<String> {
        self.messages().iter().flat_map(|(_, text)| text.lines()).find(|line| line.starts_with(start)).map(String::from)
    }

    /// How many lines so far begin with `start`: `WATCHDOG=1`, say.
    pub fn count(&self, start: &str) -> usize {
        self.messages().iter().flat_map(|(_, text)| text.lines()).filter(|line| line.starts_with(start)).count()
    }

    /// Ends when all that was sent before this call has been received: until then a count may be too small.
    pub fn catch_up(&self) {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let marker = format!("X_MARKER={};", NUMBER.fetch_add(1, Ordering::Relaxed));
        let sender = UnixDatagram::unbound().expect("a socket without a name");
        sender.send_to(marker.as_bytes(), &self.path).expect("someone always reads");
        self.wait_for(&marker);
    }

    /// Waits for a line that begins with `start`, blocking the thread.
    ///
    /// # Panics
    ///
    /// When none has come and nothing else was said for [`crate::PATIENCE`].
    #[track_caller]
    pub fn wait_for(&self, start: &str) -> String {
        eventually_blocking(&format!("the notification {start}"), || {
            self.line(start).ok_or_else(|| self.messages().len())
        })
    }
}

impl Drop for NotifySocket {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

fn receive(socket: &UnixDatagram, messages: &Mutex<Vec<(Instant, String)>>, stop: &AtomicBool) {
    let mut buffer = [0; 64 * 1024];
    while !stop.load(Ordering::Relaxed) {
        match socket.recv(&mut buffer) {
            Ok(length) => messages
                .lock()
                .unwrap_or_else(|poison| poison.into_inner())
                .push((Instant::now(), String::from_utf8_lossy(&buffer[..length]).into_owned())),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => panic!("the notify socket broke: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_messages_in_order_and_finds_lines() {
        let socket = NotifySocket::new();
        let client = UnixDatagram::unbound().unwrap();
        client.send_to(b"STATUS=starting\nMAINPID=7", socket.path()).unwrap();
        client.send_to(b"READY=1\n", socket.path()).unwrap();
        assert_eq!(socket.wait_for("READY=1"), "READY=1");
        assert_eq!(socket.wait_for("MAINPID="), "MAINPID=7");
        assert_eq!(socket.line("STOPPING"), None);
        let texts: Vec<_> = socket.messages().into_iter().map(|(_, text)| text).collect();
        assert_eq!(texts, ["STATUS=starting\nMAINPID=7", "READY=1\n"]);
    }

    #[test]
    fn a_flood_of_watchdog_messages_does_not_block_the_sender() {
        let socket = NotifySocket::new();
        let client = UnixDatagram::unbound().unwrap();
        client.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
        for _ in 0..2000 {
            client.send_to(b"WATCHDOG=1", socket.path()).unwrap();
        }
        eventually_blocking("all messages", || (socket.count("WATCHDOG=1") == 2000).then_some(()));
    }
}
