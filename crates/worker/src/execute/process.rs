//! The processes that handlers in other languages run in: how one is started, heard, and ended with all that it has started.
//!
//! Each process leads a group of its own. Whoever gives up a [`Process`], by dropping it or by ending itself, leaves nothing of
//! that group behind: a drop kills the group, and the kernel kills the process when the worker has gone, however it went.
//! Out of reach is what has left the group (`setsid`), and what the process had started when the *worker* was killed: it is
//! the service manager's, which ends it with the service. Neither can hold the worker up.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{LazyLock, mpsc};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{AccessFlags, Pid, access, getpid, getppid};
use queue_core::config::ByteSize;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

/// Most bytes of one line of standard error that are kept.
const SAID_MAX_BYTES: usize = 8 * 1024;
/// So many of the last lines are told with a failure.
const LAST_WORDS: usize = 5;
/// So many bytes of each.
const LAST_WORDS_MAX_BYTES: usize = 400;
/// How long the pipes of a process that has ended are read. What it has written lies there already; longer they stay open only
/// because somebody else holds them.
pub const LEFTOVERS: Duration = Duration::from_millis(500);
/// How long a killed process may take to be gone. Longer takes only one that hangs in the kernel.
const DEATH: Duration = Duration::from_secs(1);

/// How processes of one handler are started.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// A name to be looked up in the process's own `PATH`, or an absolute path.
    pub program: String,
    /// Variables that are passed on from the worker, as far as it has them. No others are.
    pub env: Vec<String>,
    /// Variables with their values.
    pub set_env: Vec<(String, String)>,
    /// The folder in which it starts; the worker's own if none is named.
    pub dir: Option<PathBuf>,
    /// How much address space each process may have.
    pub memory: Option<ByteSize>,
}

/// A process that has just been started, with its pipes.
pub struct Started {
    /// The process.
    pub process: Process,
    /// Its standard input, if it has one.
    pub stdin: Option<ChildStdin>,
    /// Its standard output.
    pub stdout: ChildStdout,
    /// Its standard error.
    pub stderr: ChildStderr,
}

impl Recipe {
    fn variables(&self) -> impl Iterator<Item = (OsString, OsString)> {
        let passed = self.env.iter().filter_map(|name| Some((name.into(), std::env::var_os(name)?)));
        passed.chain(self.set_env.iter().map(|(name, value)| (name.into(), value.into())))
    }

    /// Whether there is such a program at all, and its folder. Nothing is started.
    pub fn look(&self) -> Result<(), String> {
        if let Some(dir) = self.dir.as_ref().filter(|dir| !dir.is_dir()) {
            return Err(format!("{} is no folder", dir.display()));
        }
        let runs = |path: &Path| path.is_file() && access(path, AccessFlags::X_OK).is_ok();
        let found = if self.program.contains('/') {
            runs(Path::new(&self.program))
        } else {
            let path = self.variables().filter(|(name, _)| name == "PATH").map(|(_, value)| value).last();
            let path = path.unwrap_or_else(|| "/bin:/usr/bin".into());
            std::env::split_paths(&path).any(|folder| runs(&folder.join(&self.program)))
        };
        if found { Ok(()) } else { Err(format!("there is no program {}", self.program)) }
    }

    /// Starts a process.
    pub async fn start<'a>(&self, args: impl IntoIterator<Item = &'a str>, stdin: Stdio) -> io::Result<Started> {
        let mut command = Command::new(&self.program);
        command.args(args).stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.env_clear().envs(self.variables()).process_group(0);
        if let Some(dir) = &self.dir {
            command.current_dir(dir);
        }
        arrange(&mut command, self.memory);
        let (reply, started) = oneshot::channel();
        let order = Order { command, runtime: Handle::current(), reply };
        STARTER.send(order).map_err(|_| io::Error::other("the thread that starts processes has ended"))?;
        started.await.map_err(|_| io::Error::other("the thread that starts processes has ended"))?
    }
}

/// What the process does itself before it becomes the program: no other process can do this for it without a moment in which
/// it is not done yet, and util-linux's `setpriv` and `prlimit` are not everywhere and would stand in for its errors.
fn arrange(command: &mut Command, memory: Option<ByteSize>) {
    let worker = getpid();
    let in_the_child = move || {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        // The worker may have ended before the line above.
        if getppid() != worker {
            return Err(Errno::ESRCH.into());
        }
        if let Some(ByteSize(bytes)) = memory {
            setrlimit(Resource::RLIMIT_AS, bytes, bytes)?;
        }
        Ok(())
    };
    #[expect(unsafe_code, reason = "the only way to run code in the child; it makes three system calls, no allocation")]
    unsafe {
        command.pre_exec(in_the_child);
    }
}

struct Order {
    command: Command,
    runtime: Handle,
    reply: oneshot::Sender<io::Result<Started>>,
}

/// Starts all processes. "When the worker has gone" means to the kernel: when the *thread* that started the process has, so
/// it is one that never ends. And a fork of a large worker keeps no thread of the runtime waiting.
static STARTER: LazyLock<mpsc::Sender<Order>> = LazyLock::new(|| {
    let (orders, inbox) = mpsc::channel::<Order>();
    let run = move || {
        for Order { mut command, runtime, reply } in inbox {
            let _guard = runtime.enter();
            // Who has gone meanwhile drops what it gets here: the process is killed.
            let _ = reply.send(command.spawn().and_then(Started::new));
        }
    };
    thread::Builder::new().name("starter".into()).spawn(run).expect("a thread can be started");
    orders
});

impl Started {
    fn new(mut child: Child) -> io::Result<Self> {
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let id = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw);
        let process = Process { id: id.ok_or(Errno::ESRCH)?, child: Some(child), end: None };
        match (stdout, stderr) {
            (Some(stdout), Some(stderr)) => Ok(Self { process, stdin, stdout, stderr }),
            _ => Err(io::Error::other("a process without pipes")),
        }
    }
}

/// A process and the group that it leads.
pub struct Process {
    id: Pid,
    /// `None` once it has been waited for: its number may be another's by then.
    child: Option<Child>,
    end: Option<End>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End(Option<ExitStatus>);

impl End {
    /// The exit code; `None` if a signal ended it.
    pub fn code(self) -> Option<i32> {
        self.0?.code()
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(status) = self.0 else { return f.write_str("ended, nobody knows how") };
        match (status.code(), status.signal()) {
            (Some(code), _) => write!(f, "ended with exit code {code}"),
            (None, signal) => {
                let signal = signal.unwrap_or_default();
                let name =
                    Signal::try_from(signal).map_or_else(|_| format!("signal {signal}"), |name| name.to_string());
                write!(f, "was ended by {name}")
            }
        }
    }
}

impl Process {
    /// Its number.
    pub fn id(&self) -> i32 {
        self.id.as_raw()
    }

    /// Waits for its end. What is left of its group then is killed. May be called again, and dropped while it waits.
    pub async fn ended(&mut self) -> End {
        if let Some(child) = &mut self.child {
            let status = child.wait().await;
            // At once, while no other process can have got its number.
            self.signal(Signal::SIGKILL);
            self.child = None;
            self.end = Some(End(status.ok()));
        }
        self.end.unwrap_or(End(None))
    }

    /// Asks the whole group to end.
    pub fn terminate(&self) {
        self.signal(Signal::SIGTERM);
    }

    /// Kills the whole group, and waits until the process is gone.
    pub async fn kill(mut self) {
        self.signal(Signal::SIGKILL);
        let _ = tokio::time::timeout(DEATH, self.ended()).await;
    }

    fn signal(&self, signal: Signal) {
        if self.child.is_some() {
            // It fails where nobody is left, and for a process that has become another user's.
            let _ = killpg(self.id, signal);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
        // Waited for, or it would stay a zombie until some other process of ours ends.
        if let (Some(mut child), Ok(runtime)) = (self.child.take(), Handle::try_current()) {
            runtime.spawn(async move { child.wait().await });
        }
    }
}

/// What is still to be written to a process that may never read it.
pub struct Outbox {
    pipe: Option<ChildStdin>,
    text: Vec<u8>,
    written: usize,
}

impl Outbox {
    /// An empty one.
    pub fn new(pipe: Option<ChildStdin>) -> Self {
        Self { pipe, text: Vec::new(), written: 0 }
    }

    /// Adds a text.
    pub fn push(&mut self, text: &[u8]) {
        if !self.is_pending() {
            (self.text, self.written) = (Vec::new(), 0);
        }
        self.text.extend_from_slice(text);
    }

    /// Whether something is to be written.
    pub fn is_pending(&self) -> bool {
        self.written < self.text.len()
    }

    /// Whether the process has read nothing of the last text: all that was written of it lies in the pipe.
    pub fn is_unread(&self) -> bool {
        let unread = self.pipe.as_ref().and_then(|pipe| rustix::io::ioctl_fionread(pipe).ok());
        unread.is_some_and(|bytes| bytes >= self.written as u64)
    }

    /// Writes what there is; after an error nothing is left to be written, but the pipe is kept for the look into it. May be
    /// dropped while it waits.
    pub async fn flush(&mut self) -> io::Result<()> {
        while self.is_pending() {
            let written = match &mut self.pipe {
                Some(pipe) => pipe.write(&self.text[self.written..]).await,
                None => Err(io::ErrorKind::BrokenPipe.into()),
            };
            match written {
                Ok(bytes) => self.written += bytes,
                Err(error) => {
                    self.text.clear();
                    return Err(error);
                }
            }
        }
        // It may have been long, and the next one may be hours away.
        self.text = Vec::new();
        Ok(())
    }

    /// Closes the pipe: the process sees the end of its input.
    pub fn close(&mut self) {
        self.pipe = None;
    }
}

/// Lines from a pipe, of bounded length.
pub struct Lines<R> {
    pipe: BufReader<R>,
    line: Vec<u8>,
    max: usize,
    skipping: bool,
    closed: bool,
}

/// A line without its end.
#[derive(Debug, PartialEq, Eq)]
pub struct Line {
    /// The line, or as much of it as may be.
    pub bytes: Vec<u8>,
    /// It is longer than that.
    pub cut: bool,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", String::from_utf8_lossy(&self.bytes), if self.cut { "…" } else { "" })
    }
}

impl<R: AsyncRead + Unpin> Lines<R> {
    /// Lines of at most `max` bytes.
    pub fn new(pipe: R, max: usize) -> Self {
        Self { pipe: BufReader::new(pipe), line: Vec::new(), max, skipping: false, closed: false }
    }

    /// The next line; `None` at the end, where a pipe that cannot be read ends, too. One that is too long comes as soon as that
    /// is known, and its rest never. May be dropped while it waits.
    pub async fn next(&mut self) -> Option<Line> {
        loop {
            let chunk = self.pipe.fill_buf().await.unwrap_or_default();
            if chunk.is_empty() {
                self.closed = true;
                return (!self.line.is_empty()).then(|| self.take(false));
            }
            let end = chunk.iter().position(|byte| *byte == b'\n');
            let (part, used) = end.map_or((chunk, chunk.len()), |end| (&chunk[..end], end + 1));
            let room = self.max - self.line.len();
            let cut = part.len() > room;
            if !self.skipping {
                self.line.extend_from_slice(&part[..part.len().min(room)]);
            }
            self.pipe.consume(used);
            let skipped = self.skipping;
            self.skipping = end.is_none() && (cut || skipped);
            if !skipped && (cut || end.is_some()) {
                return Some(self.take(cut));
            }
        }
    }

    fn take(&mut self, cut: bool) -> Line {
        Line { bytes: std::mem::take(&mut self.line), cut }
    }

    /// Whether the end has been reached.
    pub fn is_closed(&self) -> bool {
        self.closed
    }
}

/// What a process says on its standard error. The last lines are kept, to be told if it fails.
pub struct Said {
    lines: Lines<ChildStderr>,
    last: VecDeque<String>,
}

impl Said {
    /// What comes from a pipe.
    pub fn new(pipe: ChildStderr) -> Self {
        Self { lines: Lines::new(pipe, SAID_MAX_BYTES), last: VecDeque::new() }
    }

    /// The next line; `None` at the end. May be dropped while it waits.
    pub async fn next(&mut self) -> Option<String> {
        let line = self.lines.next().await?.to_string();
        self.last.truncate(LAST_WORDS - 1);
        self.last.push_front(line[..line.floor_char_boundary(LAST_WORDS_MAX_BYTES)].to_owned());
        Some(line)
    }

    /// Whether the end has been reached.
    pub fn is_closed(&self) -> bool {
        self.lines.is_closed()
    }

    /// Forgets the lines so far.
    pub fn forget(&mut self) {
        self.last.clear();
    }

    /// The last lines, to be put behind what went wrong.
    pub fn last_words(&self) -> String {
        match self.last.iter().rev().map(String::as_str).collect::<Vec<_>>() {
            lines if lines.is_empty() => String::new(),
            lines => format!("; it said last: {}", lines.join("\n")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn lines(text: &str, max: usize) -> Vec<String> {
        let mut lines = Lines::new(text.as_bytes(), max);
        let mut all = Vec::new();
        while let Some(line) = lines.next().await {
            all.push(line.to_string());
        }
        all
    }

    #[tokio::test]
    async fn lines_are_cut_and_their_rest_is_passed_over() {
        assert_eq!(lines("a\n\nbcd\nbcde\nf\ng", 3).await, ["a", "", "bcd", "bcd…", "f", "g"]);
        // Longer than what is read at once.
        let long = "x".repeat(100_000);
        assert_eq!(lines(&format!("{long}\na\n{long}"), 10).await, ["xxxxxxxxxx…", "a", "xxxxxxxxxx…"]);
        assert_eq!(lines(&format!("{long}\na"), 100_000).await, [long.as_str(), "a"]);
    }

    #[test]
    fn a_program_is_looked_for_where_the_process_will_look() {
        let mut recipe =
            Recipe { program: "sh".into(), env: vec!["PATH".into()], set_env: vec![], dir: None, memory: None };
        assert!(recipe.look().is_ok());
        recipe.set_env = vec![("PATH".into(), "/nonexistent".into())];
        assert!(recipe.look().is_err());
        recipe.program = "/bin/sh".into();
        assert!(recipe.look().is_ok());
        recipe.program = "/etc/passwd".into();
        assert_eq!(recipe.look(), Err("there is no program /etc/passwd".into()));
        recipe.dir = Some("/nonexistent".into());
        assert_eq!(recipe.look(), Err("/nonexistent is no folder".into()));
    }
}
