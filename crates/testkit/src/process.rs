//! Child processes: the programs under test, and the servers that tests start.

use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::{prctl, signal};
use nix::unistd::{Pid, getpid, getppid};

pub use nix::sys::signal::Signal;

use crate::wait::eventually_blocking;

/// Starts `command` so that the child gets `signal` when this process ends, however it ends.
///
/// The kernel sends that signal when the *thread* that started the child ends. Test threads and a runtime's blocking
/// threads end long before the process does, so a thread of this module, which never ends, starts all children.
///
/// # Errors
///
/// Those of [`Command::spawn`].
pub fn spawn_child(command: Command, signal: Signal) -> io::Result<Child> {
    type Order = (Command, Signal, mpsc::Sender<io::Result<Child>>);
    static SPAWNER: LazyLock<mpsc::Sender<Order>> = LazyLock::new(|| {
        let (orders, inbox) = mpsc::channel::<Order>();
        let run = move || {
            for (mut command, signal, reply) in inbox {
                die_with_parent(&mut command, signal);
                // The asker waits for the answer; if it is gone there is nobody to tell.
                let _ = reply.send(command.spawn());
            }
        };
        thread::Builder::new().name("spawner".into()).spawn(run).expect("a thread");
        orders
    });
    let (reply, answer) = mpsc::channel();
    SPAWNER.send((command, signal, reply)).expect("the spawner never ends");
    answer.recv().expect("the spawner answers every order")
}

fn die_with_parent(command: &mut Command, signal: Signal) {
    let parent = getpid();
    let arrange = move || {
        prctl::set_pdeathsig(signal)?;
        // The parent may have ended before the line above.
        if getppid() == parent { Ok(()) } else { Err(io::Error::other("the parent is gone")) }
    };
    #[expect(unsafe_code, reason = "the only way to run code in the child; it makes two system calls, no allocation")]
    unsafe {
        command.pre_exec(arrange);
    }
}

/// The path of a program of this workspace, in the `target/<profile>` of the running test or program.
///
/// # Panics
///
/// If it has not been built: tests build nothing, `scripts/test` builds all programs first.
pub fn bin(name: &str) -> PathBuf {
    let this = std::env::current_exe().expect("this program's own path");
    let folder = this.parent().expect("a program lies in a folder");
    // Tests lie in target/<profile>/deps, programs beside that.
    let folder = if folder.ends_with("deps") { folder.parent().expect("deps lies in a folder") } else { folder };
    let path = folder.join(name);
    assert!(path.is_file(), "{} is missing: run `cargo build --workspace --bins`, or scripts/test", path.display());
    path
}

/// A running program with its output. Killed on drop; if the test is failing then, its output is printed.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    pid: u32,
    child: Mutex<Child>,
    output: Arc<Output>,
}

#[derive(Debug, Default)]
struct Output {
    lines: Mutex<Lines>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Lines {
    text: Vec<String>,
    open_pipes: usize,
}

impl Daemon {
    /// Starts `program` with `env` added to this process's environment.
    ///
    /// Variables whose names begin with `DRAYMAN_` (a daemon would read them as its configuration) and those of systemd's
    /// notify protocol are not inherited. Standard input is empty.
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    pub fn spawn<A: AsRef<OsStr>>(program: impl AsRef<Path>, args: &[A], env: &[(&str, &str)]) -> Self {
        let program = program.as_ref();
        let name = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        for (key, _) in std::env::vars_os() {
            let text = key.to_string_lossy();
            if text.starts_with("DRAYMAN_") || ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"].contains(&&*text) {
                command.env_remove(key);
            }
        }
        command.envs(env.iter().copied());
        let mut child = spawn_child(command, Signal::SIGKILL)
            .unwrap_or_else(|error| panic!("cannot start {}: {error}", program.display()));
        let output = Arc::new(Output::default());
        output.lines().open_pipes = 2;
        keep_lines(child.stdout.take().expect("piped"), Arc::clone(&output));
        keep_lines(child.stderr.take().expect("piped"), Arc::clone(&output));
        Self { name, pid: child.id(), child: Mutex::new(child), output }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// All lines of standard output and standard error so far, in the order of their arrival.
    pub fn lines(&self) -> Vec<String> {
        self.output.lines().text.clone()
    }

    /// [`Daemon::lines`] as one text.
    pub fn output(&self) -> String {
        self.lines().join("\n")
    }

    /// The first line so far that contains `text`; for use with [`crate::eventually`].
    pub fn line(&self, text: &str) -> Option<String> {
        self.output.lines().text.iter().find(|line| line.contains(text)).cloned()
    }

    /// Waits for a line that contains `text`, blocking the thread.
    ///
    /// # Panics
    ///
    /// When the program has said nothing for [`crate::PATIENCE`], or closed its output without that line. The drop that
    /// follows prints its output.
    #[track_caller]
    pub fn wait_for_line(&self, text: &str) -> String {
        let line = eventually_blocking(&format!("a line of {} with {text:?}", self.name), || {
            // In this order: what comes before the end is seen.
            let closed = self.output.lines().open_pipes == 0;
            match self.line(text) {
                None if closed => Ok(None),
                line => line.map(Some).ok_or_else(|| self.output.lines().text.len()),
            }
        });
        line.unwrap_or_else(|| panic!("{} ended without a line with {text:?}", self.name))
    }

    /// Sends `signal`. Nothing happens if the program has ended.
    pub fn signal(&self, signal: Signal) {
        let mut child = self.child();
        // A process that has ended and was not waited for keeps its id, so this can't hit a stranger.
        if matches!(child.try_wait(), Ok(None)) {
            signal::kill(Pid::from_raw(self.pid as i32), signal).expect("a child may be signalled");
        }
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill9(&self) {
        self.signal(Signal::SIGKILL);
        self.wait();
    }

    /// How it ended, if it has; for use with [`crate::eventually`].
    pub fn try_wait(&self) -> Option<ExitStatus> {
        self.child().try_wait().expect("a child may be waited for")
    }

    /// Waits for its end, blocking the thread, and for the rest of its output.
    ///
    /// # Panics
    ///
    /// When it still runs, and has said nothing for [`crate::PATIENCE`].
    #[track_caller]
    pub fn wait(&self) -> ExitStatus {
        let status = eventually_blocking(&format!("the end of {}", self.name), || {
            self.try_wait().ok_or_else(|| self.output.lines().text.len())
        });
        // Bounded: a child of its own may have inherited the pipes and live on.
        let deadline = Instant::now() + Duration::from_secs(1);
        let mut lines = self.output.lines();
        while lines.open_pipes > 0 && Instant::now() < deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            lines = self.output.changed.wait_timeout(lines, left).unwrap_or_else(|poison| poison.into_inner()).0;
        }
        status
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let mut child = self.child();
        let _ = child.kill();
        let _ = child.wait();
        if thread::panicking() {
            for line in &self.output.lines().text {
                eprintln!("[{} {}] {line}", self.name, self.pid);
            }
        }
    }
}

impl Output {
    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

fn keep_lines(pipe: impl Read + Send + 'static, output: Arc<Output>) {
    thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut bytes = Vec::new();
        while matches!(pipe.read_until(b'\n', &mut bytes), Ok(1..)) {
            output.lines().text.push(String::from_utf8_lossy(&bytes).trim_end_matches(['\n', '\r']).to_owned());
            output.changed.notify_all();
            bytes.clear();
        }
        output.lines().open_pipes -= 1;
        output.changed.notify_all();
    });
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    fn sh(script: &str) -> Daemon {
        Daemon::spawn("/bin/sh", &["-c", script], &[("COLOUR", "blue")])
    }

    #[test]
    fn keeps_both_outputs_and_the_exit_status() {
        let daemon = sh("echo out $COLOUR; echo err >&2; exit 7");
        assert_eq!(daemon.wait().code(), Some(7));
        assert_eq!(daemon.line("out"), Some("out blue".into()));
        assert_eq!(daemon.line("err"), Some("err".into()));
        assert_eq!(daemon.lines().len(), 2);
        assert_eq!(daemon.output().len(), "out blue\nerr".len());
    }

    #[test]
    fn signals_reach_the_program() {
        let daemon = sh("trap 'echo asked to stop; exit 3' TERM; echo ready; while :; do sleep 0.05; done");
        daemon.wait_for_line("ready");
        assert_eq!(daemon.try_wait(), None);
        daemon.signal(Signal::SIGTERM);
        daemon.wait_for_line("asked to stop");
        assert_eq!(daemon.wait().code(), Some(3));
        daemon.signal(Signal::SIGTERM);

        let daemon = sh("exec sleep 100");
        daemon.kill9();
        assert_eq!(daemon.wait().signal(), Some(9));
    }

    #[test]
    #[should_panic(expected = "ended without a line with \"ready\"")]
    fn a_program_that_ends_without_the_line_fails_at_once() {
        sh("echo something else").wait_for_line("ready");
    }

    #[test]
    fn a_child_outlives_the_thread_that_asked_for_it() {
        let script = "trap 'echo alive' USR1; echo ready; while :; do sleep 0.05; done";
        let (daemon, asker) = thread::spawn(move || (sh(script), nix::unistd::gettid())).join().unwrap();
        daemon.wait_for_line("ready");
        // The kernel would send the signal before it forgets the thread, and nothing comes after that signal.
        let task = PathBuf::from(format!("/proc/self/task/{asker}"));
        eventually_blocking("the thread to be gone", || (!task.exists()).then_some(()));
        daemon.signal(Signal::SIGUSR1);
        daemon.wait_for_line("alive");
    }

    #[test]
    fn a_child_dies_with_its_process() {
        const INNER: &str = "TESTKIT_INNER";
        if std::env::var_os(INNER).is_some() {
            let mut command = Command::new("sleep");
            command.arg("100");
            println!("child {}", spawn_child(command, Signal::SIGKILL).unwrap().id());
            thread::sleep(Duration::from_secs(100));
        }
        // The process that dies is this very test once more.
        let args = ["--exact", "--nocapture", "process::tests::a_child_dies_with_its_process"];
        let daemon = Daemon::spawn(std::env::current_exe().unwrap(), &args, &[(INNER, "1")]);
        let line = daemon.wait_for_line("child ");
        let pid = line.rsplit(' ').next().unwrap();
        let alive = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
            stat.is_ok_and(|stat| !stat.contains(") Z "))
        };
        assert!(alive());
        daemon.kill9();
        eventually_blocking("the child to die", || (!alive()).then_some(()));
    }

    #[test]
    #[should_panic(expected = "no-such-program is missing: run `cargo build --workspace --bins`")]
    fn a_missing_program_says_how_to_build_it() {
        bin("no-such-program");
    }
}
