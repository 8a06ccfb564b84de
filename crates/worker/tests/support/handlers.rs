//! Handlers from a piece of configuration, called as a worker would, and the look for processes that they leave.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use queue_core::ids::{App, Fence, JobId, Op, User};
use queue_core::model::Status;
use queue_core::model::batch::{Counts, Row};
use queue_core::model::task::{Encoding, File, Payload, Progress};
use serde_json::Value;
use testkit::{end_of, eventually};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use worker::config::handlers::{HandlerConfig, build};
use worker::execute::rows::{BatchEnd, Feed, RowAnswer, RowsEnd, RowsOf};
use worker::execute::task::{Desk, Handler, Outcome, Problem, Task};

/// The interpreter itself: what is found in PATH may be a script that looks for it each time.
pub static PYTHON: LazyLock<String> = LazyLock::new(|| {
    let output = Command::new("python3").args(["-c", "import sys; print(sys.executable)"]).output().expect("a python3");
    String::from_utf8(output.stdout).expect("a path").trim().to_owned()
});

/// A file of `tests/handlers`.
pub fn file(name: &str) -> String {
    format!("{}/tests/handlers/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// An example of docs/handlers.md.
pub fn example(name: &str) -> String {
    let page = include_str!("../../../../docs/handlers.md");
    let (_, rest) = page.split_once(&format!("<!-- test: {name} -->\n```")).expect("it is marked");
    let (text, _) = rest.split_once('\n').expect("a block").1.split_once("\n```").expect("it ends");
    format!("{text}\n")
}

/// A handler whose processes can be told from all others by a variable of their own, which their children inherit.
pub struct Handled {
    pub handler: Arc<dyn Handler>,
    pub mark: String,
}

impl Handled {
    /// From the keys of `[[handlers]]`, without its names.
    pub fn new(keys: &str) -> Self {
        let mark = format!("DRAYMAN_TEST_MARK={}", JobId::generate());
        let value = mark.split_once('=').unwrap().1;
        let text = format!("app = 'App'\nop = 'Op'\nset_env = {{ DRAYMAN_TEST_MARK = '{value}' }}\n{keys}");
        let config: HandlerConfig = toml::from_str(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
        let handler = build(&[config], std::time::Duration::MAX).expect("a handler").remove(0).handler;
        Self { handler, mark }
    }

    /// A program of `tests/handlers/rows.py` with more keys.
    pub fn of_rows(keys: &str) -> Self {
        Self::program(&[&PYTHON, "-I", "-S", &file("rows.py")], keys)
    }

    /// A program of `tests/handlers/behave.py` with more keys.
    pub fn behaving(keys: &str) -> Self {
        // Without what it loads for people at a prompt, it starts in half the time.
        Self::program(&[&PYTHON, "-I", "-S", &file("behave.py")], keys)
    }

    pub fn program(command: &[&str], keys: &str) -> Self {
        Self::new(&format!("kind = 'program'\ncommand = {command:?}\n{keys}"))
    }

    pub fn command(command: &[&str], keys: &str) -> Self {
        Self::new(&format!("kind = 'command'\ncommand = {command:?}\n{keys}"))
    }

    pub fn start(&self, task: Task) -> Call {
        let (desk, stop) = (Arc::new(Notes::default()), CancellationToken::new());
        let (handler, notes, token) = (Arc::clone(&self.handler), Arc::clone(&desk), stop.clone());
        let end = tokio::spawn(async move { handler.run(task, notes, token).await });
        Call { desk, stop, end }
    }

    /// A call from its beginning to its end.
    pub async fn call(&self, input: Value) -> Outcome {
        self.start(task(&input)).end().await
    }

    /// A call that must end well.
    pub async fn result(&self, input: Value) -> Value {
        result(self.call(input).await)
    }

    /// A call that must not.
    pub async fn problem(&self, input: Value) -> Problem {
        problem(self.call(input).await)
    }

    /// The processes of this handler, and theirs.
    pub fn processes(&self) -> BTreeSet<i32> {
        let marked = |pid: &i32| {
            let variables = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            variables.split(|byte| *byte == 0).any(|variable| variable == self.mark.as_bytes())
        };
        let all = std::fs::read_dir("/proc").unwrap();
        all.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok()).filter(marked).collect()
    }

    #[track_caller]
    pub fn nobody_left(&self) -> impl Future<Output = ()> {
        eventually("the end of all processes", async || self.processes().is_empty().then_some(()))
    }
}

impl Drop for Handled {
    fn drop(&mut self) {
        for pid in self.processes() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// A call that goes on.
pub struct Call {
    pub desk: Arc<Notes>,
    pub stop: CancellationToken,
    pub end: JoinHandle<Outcome>,
}

impl Call {
    pub async fn end(self) -> Outcome {
        end_of("the call ends", self.end).await.expect("no panic")
    }

    /// Waits for its first progress.
    pub async fn progress(&self) -> Progress {
        eventually("some progress", async || self.desk.progress.lock().unwrap().first().cloned()).await
    }
}

/// What a handler has told.
#[derive(Default)]
pub struct Notes {
    pub progress: Mutex<Vec<Progress>>,
    pub lines: Mutex<Vec<String>>,
}

impl Notes {
    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }
}

#[async_trait::async_trait]
impl Desk for Notes {
    fn progress(&self, progress: Progress) {
        self.progress.lock().unwrap().push(progress);
    }

    fn log(&self, line: &str) {
        self.lines.lock().unwrap().push(line.to_owned());
    }

    async fn save(&self, _: Payload) -> Result<(), Problem> {
        Ok(())
    }
}

pub fn task(input: &Value) -> Task {
    Task {
        job: JobId::new("job-1").unwrap(),
        user: User::new("ana").unwrap(),
        app: App::new("App").unwrap(),
        op: Op::new("Op").unwrap(),
        input: Payload::json(input).unwrap(),
        context: None,
        checkpoint: None,
        fence: Fence(7),
        attempt: 2,
        max_attempts: 3,
        timeout: Duration::from_secs(30),
        tags: vec!["monthly".into()],
        row: None,
        traceparent: None,
    }
}

/// What the rows of tests have in common.
pub fn rows_of() -> RowsOf {
    RowsOf {
        batch: JobId::new("batch-1").unwrap(),
        user: User::new("ana").unwrap(),
        app: App::new("App").unwrap(),
        op: Op::new("Op").unwrap(),
        encoding: Encoding::Json,
        context: None,
        fence: Fence(7),
        attempt: 1,
        max_attempts: 3,
        timeout: Duration::from_secs(30),
        traceparent: None,
    }
}

/// Rows with these inputs, from line 1 on.
pub fn feed_of(of: RowsOf, inputs: &[Value]) -> Arc<Feed> {
    let row = |(number, input): (usize, &Value)| {
        let input = Payload::write(of.encoding, input).unwrap().bytes;
        Some(Row { line: number as u64 + 1, input })
    };
    let rows = inputs.iter().enumerate().map(row).collect();
    Arc::new(Feed::new(of, rows))
}

pub fn feed(inputs: &[Value]) -> Arc<Feed> {
    feed_of(rows_of(), inputs)
}

/// Rows that are worked on, to be stopped.
pub fn start_rows(handler: &Arc<dyn Handler>, feed: &Arc<Feed>) -> (CancellationToken, JoinHandle<RowsEnd>) {
    let (stop, handler, feed) = (CancellationToken::new(), handler.clone(), feed.clone());
    let token = stop.clone();
    (stop, tokio::spawn(async move { handler.run_rows(feed, token).await }))
}

pub async fn end_of_rows(end: JoinHandle<RowsEnd>) -> RowsEnd {
    end_of("the rows end", end).await.expect("no panic")
}

/// Works on rows until there are no more, and tells what became of each.
pub async fn work(handler: &Arc<dyn Handler>, feed: Arc<Feed>) -> Vec<RowAnswer> {
    let (_stop, end) = start_rows(handler, &feed);
    assert_eq!(end_of_rows(end).await, RowsEnd::Over);
    feed.take_answers().into_iter().map(|answer| answer.expect("an answer to each")).collect()
}

/// A batch that is over.
pub fn batch_end() -> BatchEnd {
    let RowsOf { batch, user, app, op, .. } = rows_of();
    let counts = Counts { rows: 3, done: 1, failed: 2, ..Counts::default() };
    let file = File { object: "o1".into(), bytes: 9 };
    let files = [("out.csv".to_owned(), file)].into();
    BatchEnd { batch, user, app, op, status: Status::Failed, counts, files, context: None, attempt: 1 }
}

#[track_caller]
pub fn result(outcome: Outcome) -> Value {
    match outcome {
        Outcome::Done(output) => output.result.map_or(Value::Null, |result| result.read().unwrap()),
        other => panic!("no result: {other:?}"),
    }
}

#[track_caller]
pub fn problem(outcome: Outcome) -> Problem {
    match outcome {
        Outcome::Failed(problem) => problem,
        other => panic!("no problem: {other:?}"),
    }
}

/// Whether there is such a process, dead ones that nobody has waited for included.
pub fn exists(pid: i32) -> bool {
    PathBuf::from(format!("/proc/{pid}")).exists()
}

/// Runs the test again in a process of its own, with no other test beside it; true in that process.
pub fn alone(test: &str) -> bool {
    const INNER: &str = "HANDLERS_TEST_ALONE";
    if std::env::var_os(INNER).is_some() {
        return true;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    let output = command.args(["--exact", "--nocapture", test]).env(INNER, "1").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    false
}
