//! `drayman track run`: any program as an attempt of a tracked job.
//!
//! The program runs in a process group of its own for as long as this process holds the job's lock. When the lock is lost the group
//! is told to end, and killed if it does not: another may have begun. If this process is killed, the kernel kills the program.

use std::ffi::OsString;
use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use console::{Failure, complain, one_line};
use nix::sys::prctl;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, getpid, getppid};
use queue_core::config::TRACK_PREFIX;
use queue_core::model::track::{self, TRACE_MAX_BYTES, TrackStatus};
use queue_core::tracker::{Ended, Guard, StartOptions, TrackError, Tracker};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

use super::args::*;
use super::{create, describe};
use crate::cli::REFUSED;

/// How long the last of the program's standard error may take to come once the program has ended: a process that it left
/// behind may hold the pipe open.
const REST: Duration = Duration::from_millis(500);

/// How long recording may take once this process is told to stop, or the lock is another's.
const RECORD_WITHIN: Duration = Duration::from_secs(2);

/// Signals that are passed on.
const PASSED_ON: [Signal; 4] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT];

/// Runs a command as an attempt, and ends as it does.
pub async fn run(connecting: impl Future<Output = Result<Tracker, Failure>>, args: Run) -> Result<u8, Failure> {
    attempt(connecting, args).await.map_err(|failure| match failure.code {
        // The small numbers are the command's.
        console::UNREACHABLE | REFUSED => Failure::new(UNRECORDED, failure.message),
        _ => failure,
    })
}

async fn attempt(connecting: impl Future<Output = Result<Tracker, Failure>>, args: Run) -> Result<u8, Failure> {
    if !args.create && !args.new.is_empty() {
        return Err(Failure::usage("--data, --code, --codes and --keep are for a record that --create creates"));
    }
    let tracker = connecting.await?;
    let id = args.id.as_str();
    if args.create {
        create(&tracker, id, &args.new).await?;
    }
    // Before the start: a signal that comes in between reaches the program, and its end is recorded.
    let mut signals = listen().map_err(|error| Failure::new(UNRECORDED, error))?;
    let options = StartOptions { expire: args.expire, max_retry: args.max_retry, ready_codes: args.ready };
    let guard = match tracker.start(id, options).await {
        Ok(guard) => guard,
        Err(error) => return Err(Failure::new(refusal(&error), describe(id, &error))),
    };
    let (mut child, stderr) = match start(&args.command, &guard) {
        Ok(started) => started,
        Err(error) => {
            let name = args.command[0].to_string_lossy();
            let text = format!("{} cannot be run: {error}", one_line(&name));
            // Where it can't be recorded, the lock expires.
            let _ = record(id, guard.fail(text.as_str())).await;
            let code = if error.kind() == ErrorKind::NotFound { NO_COMMAND } else { CANNOT_RUN };
            return Err(Failure::new(code, text));
        }
    };
    let (status, lost) = watch(&mut child, &guard, &mut signals, args.grace).await;
    let trace = stderr.text().await;
    let text = match (&status, lost) {
        (_, true) => "the lock was lost".to_owned(),
        (Ok(status), false) => how(*status),
        (Err(error), false) => format!("nobody knows how it ended: {error}"),
    };
    let code = match &status {
        Ok(status) => status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1) as u8,
        Err(_) => UNRECORDED,
    };
    let well = code == 0 && !lost;
    let recording = async {
        match well {
            true => guard.succeed().await,
            false => guard.fail(track::Failure { error: text.clone(), trace }).await,
        }
    };
    let mut recording = std::pin::pin!(record(id, recording));
    // Who is told to stop now does not wait for Redis any longer, and who has lost the lock has nothing more to say there.
    let hurry = async {
        if !lost {
            signals.recv().await;
        }
    };
    let ended = tokio::select! {
        ended = &mut recording => Some(ended),
        () = hurry => timeout(RECORD_WITHIN, recording).await.ok(),
    };
    Ok(match ended {
        _ if lost => {
            complain(format_args!("{}: {text}; the command was stopped", one_line(id)));
            LOST
        }
        Some(Err(TrackError::LockLost)) => LOST,
        Some(Ok(Ended { status: TrackStatus::Succeeded, .. })) => console::OK,
        Some(Ok(Ended { status, retry })) => {
            complain(format_args!("{}: {text}; {status} after {retry} in a row", one_line(id)));
            if args.skip_error { console::OK } else { code }
        }
        _ => {
            complain(format_args!("{}: {text}; that is not recorded", one_line(id)));
            UNRECORDED
        }
    })
}

/// Says why an end is not recorded.
async fn record(id: &str, end: impl Future<Output = Result<Ended, TrackError>>) -> Result<Ended, TrackError> {
    end.await.inspect_err(|error| complain(describe(id, error)))
}

/// What a refused start ends with.
fn refusal(error: &TrackError) -> u8 {
    match error {
        TrackError::NotFound => MISSING,
        TrackError::Locked { .. } => LOCKED,
        TrackError::AlreadySucceeded => ALREADY,
        TrackError::Ignored => IGNORED,
        TrackError::NotReady(_) => NOT_READY,
        TrackError::LockLost => LOST,
        TrackError::Id(_) | TrackError::Data(_) => console::USAGE,
        TrackError::OnlyByAttempt | TrackError::NoRoom { .. } | TrackError::Redis(_) => UNRECORDED,
    }
}

/// How a program ended, in words.
fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal().and_then(|signal| Signal::try_from(signal).ok())) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(signal)) => format!("was ended by {signal}"),
        (None, None) => "was ended by a signal".into(),
    }
}

/// The signals that this process gets from now on.
fn listen() -> io::Result<mpsc::Receiver<Signal>> {
    let (sender, receiver) = mpsc::channel(16);
    for name in PASSED_ON {
        let mut signals = signal(SignalKind::from_raw(name as i32))?;
        let sender = sender.clone();
        tokio::spawn(async move { while signals.recv().await.is_some() && sender.send(name).await.is_ok() {} });
    }
    Ok(receiver)
}

/// Starts the program.
fn start(command: &[OsString], guard: &Guard) -> io::Result<(Child, Tail)> {
    let (reader, writer) = io::pipe()?;
    let variable = |name: &str| format!("{TRACK_PREFIX}{name}");
    let mut process = Command::new(&command[0]);
    process
        .args(&command[1..])
        .env(variable("ID"), guard.id())
        .env(variable("DATA"), guard.data().to_string())
        .env(variable("FENCE"), guard.fence().to_string())
        .process_group(0)
        .stderr(writer);
    if io::stdin().is_terminal() {
        // A group that is not the terminal's own would be stopped when it reads.
        process.stdin(Stdio::null());
    }
    let us = getpid();
    let in_the_child = move || {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        // We may have ended before the line above.
        if getppid() == us { Ok(()) } else { Err(io::Error::other("drayman is gone")) }
    };
    #[expect(unsafe_code, reason = "the only way to run code in the child; it makes two system calls, no allocation")]
    unsafe {
        process.pre_exec(in_the_child);
    }
    // To the kernel we are this thread: the main one, which ends last.
    let child = process.spawn()?;
    Ok((child, Tail::of(reader)))
}

/// Waits for the program's end, and passes signals on. When the lock is lost the program is told to end. Returns how it ended, and
/// whether the lock was lost before.
async fn watch(
    child: &mut Child,
    guard: &Guard,
    signals: &mut mpsc::Receiver<Signal>,
    grace: Duration,
) -> (io::Result<ExitStatus>, bool) {
    let group = child.id().map(|id| Pid::from_raw(id as i32));
    // It fails where nobody is left, and for programs that have become another user's.
    let send = |signal| _ = group.map(|group| killpg(group, signal));
    let (mut lost, mut kill_at) = (false, None);
    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            Some(signal) = signals.recv() => send(signal),
            () = guard.lost().cancelled(), if !lost => {
                lost = true;
                kill_at = Some(Instant::now() + grace);
                send(Signal::SIGTERM);
            }
            () = sleep_until(kill_at.unwrap_or_else(Instant::now)), if kill_at.is_some() => {
                kill_at = None;
                send(Signal::SIGKILL);
            }
        }
    };
    // What the program left behind in its group would go on without the lock. At once, while nobody can have got its number.
    send(Signal::SIGKILL);
    (status, lost)
}

/// The end of a program's standard error, which is shown as it comes. A thread reads it, so that whoever does not read what we
/// show does not hold up the lock's renewal.
struct Tail {
    kept: Arc<Mutex<Vec<u8>>>,
    closed: oneshot::Receiver<()>,
}

impl Tail {
    fn of(mut pipe: io::PipeReader) -> Self {
        let kept = Arc::new(Mutex::new(Vec::new()));
        let (sender, closed) = oneshot::channel();
        let into = kept.clone();
        std::thread::spawn(move || {
            let mut bytes = [0; 8 * 1024];
            loop {
                match pipe.read(&mut bytes) {
                    Ok(0) => break,
                    Ok(read) => {
                        keep(&into, &bytes[..read]);
                        // If nobody wants to see it, it is kept all the same.
                        let _ = io::stderr().write_all(&bytes[..read]);
                    }
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(_) => break,
                }
            }
            let _ = sender.send(());
        });
        Self { kept, closed }
    }

    /// What there is once the program has ended.
    async fn text(self) -> String {
        let _ = timeout(REST, self.closed).await;
        let kept = self.kept.lock().unwrap_or_else(|poison| poison.into_inner());
        String::from_utf8_lossy(&kept).into_owned()
    }
}

fn keep(kept: &Mutex<Vec<u8>>, more: &[u8]) {
    let mut kept = kept.lock().unwrap_or_else(|poison| poison.into_inner());
    kept.extend_from_slice(more);
    let too_many = kept.len().saturating_sub(TRACE_MAX_BYTES);
    kept.drain(..too_many);
}
