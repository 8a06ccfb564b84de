//! Ten thousand tasks in Rust, in Python and as commands, of which many do what a task should not. Each knows from its plan
//! what must come of it. The worker is a process of its own, so that what it keeps and leaves is seen from outside.

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use queue_core::config::{ByteSize, Limits, Url};
use queue_core::ids::{App, Op, Pool, User};
use queue_core::model::retry::{Backoff, RetryChoice};
use queue_core::model::task::{Encoding, Payload};
use queue_core::producer::{NewJob, Producer, Submitted};
use queue_core::reconcile;
use serde::{Deserialize, Serialize};
use support::handlers::{PYTHON, file};
use support::{DB, PATIENCE, job_id, store};
use testkit::chaos::Random;
use testkit::state::{Piece, State};
use testkit::{Daemon, RedisServer, Signal, eventually, eventually_blocking};
use worker::builder::Worker;
use worker::config::Config;
use worker::execute::function::{Application, Context};
use worker::execute::task::Problem;
use worker::shutdown::Shutdown;

const TEST: &str = "ten_thousand_tasks_that_do_whatever_they_like_end_rightly_and_leave_nothing";
const ALL: u64 = 10_000;
/// So many are handed in together, and end before the next.
const ROUND: u64 = 2_000;
const USERS: u64 = 7;
const SLOTS: usize = 32;
const PROGRAMS: usize = 6;
/// What the worker may have more after all of them than after the first round, in KiB.
const GROWTH: u64 = 12 * 1024;
/// The attempt from which on a task goes well that never does.
const NEVER: u32 = 9;
/// The environment of the worker's process: its Redis, and the folder for all that it writes.
const REDIS: &str = "MIXED_REDIS";
const FOLDER: &str = "GATE";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Rust,
    Blocking,
    Python,
    Text,
    Json,
}

impl Form {
    fn op(self) -> &'static str {
        match self {
            Form::Rust => "rust",
            Form::Blocking => "blocking",
            Form::Python => "python",
            Form::Text => "text",
            Form::Json => "json",
        }
    }
}

/// What one call comes to.
enum End {
    /// It goes well; how its result begins, if it has one.
    Done(Option<String>),
    /// It is worth another attempt; how the reason begins.
    Retry(&'static str),
    /// No other attempt is made; status, how the reason begins, and the result all the same.
    Over(&'static str, &'static str, Option<&'static str>),
}

/// One task, and what must come of it.
#[derive(Debug)]
struct Plan {
    id: String,
    form: Form,
    input: serde_json::Value,
    max_attempts: u32,
    timeout: Duration,
    status: &'static str,
    reason: Option<&'static str>,
    result: Option<String>,
    attempts: Option<u64>,
}

impl Plan {
    fn of(seed: u64, number: u64) -> Self {
        let mut random = Random::of(seed, &[number]);
        let forms = [Form::Rust, Form::Blocking, Form::Python, Form::Text, Form::Json];
        let form = forms[random.weighted(&[45, 8, 32, 9, 6])];
        let well = random.chance(85);
        let (mut input, end) = match form {
            Form::Rust | Form::Blocking => in_rust(number, well, &mut random),
            Form::Python => in_python(number, well, &mut random),
            Form::Text | Form::Json => as_command(form, number, well, &mut random),
        };
        let max_attempts = if random.chance(50) { 3 } else { 1 };
        // What hangs ends by its timeout. A second attempt that goes well might not do so in that time.
        let hangs = matches!(end, End::Retry("it ran longer than"));
        let good_at = match form {
            _ if hangs => NEVER,
            // Processes that end one after the other are started ever later: many such attempts would only take long.
            Form::Python if random.chance(90) => 2,
            _ if random.chance(60) => random.between(2, 5) as u32,
            _ => NEVER,
        };
        input["good_at"] = good_at.into();
        let answer = if form == Form::Text { format!("\"{number}\"") } else { number.to_string() };
        let tries = |count: u32| (max_attempts > 1).then_some(u64::from(count));
        let (status, reason, result, attempts) = match end {
            End::Done(result) => ("done", None, result, None),
            End::Retry(_) if good_at <= max_attempts => ("done", None, Some(answer), tries(good_at - 1)),
            End::Retry(reason) if max_attempts == 1 => ("failed", Some(reason), None, None),
            End::Retry(reason) => ("ignored", Some(reason), None, tries(max_attempts)),
            End::Over(status, reason, result) => (status, Some(reason), result.map(str::to_owned), tries(1)),
        };
        let timeout = if hangs { random.ms(150, 300) } else { PATIENCE };
        Self { id: format!("m-{number}"), form, input, max_attempts, timeout, status, reason, result, attempts }
    }

    fn job(&self, number: u64) -> NewJob {
        let input = match &self.input {
            input if input["do"] == "no-json" => Payload { encoding: Encoding::Json, bytes: b"{\"do\":\xff".to_vec() },
            input if number.is_multiple_of(3) => Payload::msgpack(input).expect("it can be written"),
            input => Payload::json(input).expect("it can be written"),
        };
        let user = User::new(format!("user-{}", number % USERS)).expect("a name");
        NewJob {
            id: job_id(&self.id),
            timeout: Some(self.timeout),
            retry: RetryChoice {
                max_attempts: self.max_attempts.try_into().ok(),
                backoff: Some(Backoff::Fixed),
                delay: Some(Duration::from_millis(1)),
                ..RetryChoice::default()
            },
            ..task(user, self.form.op(), input)
        }
    }

    /// What is not as it must be.
    fn fault(&self, state: &State) -> Option<String> {
        let [status, reason, attempts, object, encoding] =
            ["status", "failed_reason", "attempts", "result_object", "result_encoding"]
                .map(|name| state.field(&self.id, name));
        let result = state.field_of(Piece::Job(&self.id), "result").map(|bytes| {
            let encoding = encoding.expect("it is told").parse().expect("it is known");
            Payload { encoding, bytes }.to_json_line().expect("it can be read")
        });
        let begins = |text: &Option<String>, with: Option<&str>| match (text, with) {
            (Some(text), Some(with)) => text.starts_with(with),
            (None, None) => true,
            _ => false,
        };
        let result = result.or(object.map(|_| "an object".to_owned()));
        let right = status.as_deref() == Some(self.status)
            && begins(&reason, self.reason)
            && begins(&result, self.result.as_deref())
            && attempts.as_ref().and_then(|text| text.parse().ok()) == self.attempts;
        (!right).then(|| format!("{self:?}\n    ended {status:?}, {reason:?}, {result:?}, attempts {attempts:?}"))
    }
}

fn task(user: User, op: &str, input: Payload) -> NewJob {
    NewJob::task(user, App::new("mixed").expect("a name"), Op::new(op).expect("a name"), input)
}

fn done(result: impl Into<String>) -> End {
    End::Done(Some(result.into()))
}

fn in_rust(number: u64, well: bool, random: &mut Random) -> (serde_json::Value, End) {
    let plan = |what: &str, end| (serde_json::json!({ "do": what, "n": number }), end);
    if well {
        return plan(["answer", "tell"][random.weighted(&[9, 1])], done(number.to_string()));
    }
    match random.weighted(&[4, 4, 4, 4, 1, 4, 2, 4]) {
        0 => plan("fail", End::Over("failed", "planned", None)),
        1 => plan("ignore", End::Over("ignored", "planned", None)),
        2 => plan("retry", End::Retry("planned")),
        3 => plan("panic", End::Retry("the handler panicked: planned")),
        4 => plan("hang", End::Retry("it ran longer than")),
        5 => plan("huge", done("an object")),
        6 => plan("too-huge", End::Over("failed", "its result can't be kept: ", None)),
        _ => plan("no-json", End::Over("failed", "its input is no mixed::Order: ", None)),
    }
}

fn in_python(number: u64, well: bool, random: &mut Random) -> (serde_json::Value, End) {
    let plan = |mut input: serde_json::Value, end| {
        input["n"] = number.into();
        (input, end)
    };
    let json = |text: &str| serde_json::from_str(text).expect("it is JSON");
    if well {
        return plan(json(r#"{"do": "answer"}"#), done(number.to_string()));
    }
    let answer = |wish: &str| format!(r#"{{"type":"error","id":$ID,"error":"planned","wish":"{wish}"}}"#);
    let say = |line: &str, then: &str| serde_json::json!({ "do": "say", "lines": [line], "then": then });
    match random.weighted(&[6, 6, 6, 6, 6, 1, 1, 6, 6, 1, 6, 4, 1, 6, 4]) {
        0 => plan(say(&answer("fail"), ""), End::Over("failed", "planned", None)),
        1 => plan(say(&answer("ignore"), ""), End::Over("ignored", "planned", None)),
        2 => plan(say(&answer("retry"), ""), End::Retry("planned")),
        3 => plan(
            json(r#"{"do": "exit", "code": 7}"#),
            End::Retry("the program ended with exit code 7 before it had answered; it said last: about to leave"),
        ),
        4 => plan(json(r#"{"do": "kill"}"#), End::Retry("the program was ended by SIGKILL before it had answered")),
        5 => plan(json(r#"{"do": "hang"}"#), End::Retry("it ran longer than")),
        6 => plan(json(r#"{"do": "hang", "deaf": true}"#), End::Retry("it ran longer than")),
        7 => plan(json(r#"{"do": "huge"}"#), End::Over("failed", "the program wrote a line of more than", None)),
        8 => plan(say("no message", "wait"), End::Over("failed", "the program", None)),
        9 => plan(
            json(r#"{"do": "close", "fd": 1}"#),
            End::Retry("the program closed its standard output before it had answered"),
        ),
        // With the pipes in a child's hands, nobody could see that a later task closes one.
        10 => plan(json(r#"{"do": "fork", "leaves": false, "quiet": true}"#), done(r#"{"pid":"#)),
        11 => plan(json(r#"{"do": "fork", "leaves": true, "seconds": 3, "quiet": true}"#), done(r#"{"pid":"#)),
        12 => plan(
            json(r#"{"do": "fork", "leaves": true, "seconds": 3, "exit": true}"#),
            End::Retry("the program ended with exit code 3 before it had answered"),
        ),
        13 => plan(json(r#"{"do": "answer", "afterwards": "exit"}"#), done(number.to_string())),
        _ => plan(json(r#"{"do": "deafen"}"#), done(r#"{"pid":"#)),
    }
}

fn as_command(form: Form, number: u64, well: bool, random: &mut Random) -> (serde_json::Value, End) {
    let is_text = form == Form::Text;
    let plan = |what: &str, end| (serde_json::json!({ "do": what, "n": number }), end);
    let answer = || done(if is_text { format!("\"{number}\"") } else { number.to_string() });
    let no_json = |result| End::Over("failed", "the command wrote what is no JSON: ", result);
    if well {
        return plan("answer", answer());
    }
    match random.weighted(&[4, 4, 4, 4, 1, 1, 3, 4, 3, 4, 1]) {
        0 => plan("fail", End::Over("failed", "the command ended with exit code 3; it said last: planned", None)),
        1 => plan("ignore", End::Over("ignored", "the command ended with exit code 8", None)),
        2 => plan("retry", End::Retry("the command ended with exit code 75")),
        3 => plan("kill", End::Retry("the command was ended by SIGKILL")),
        4 => plan("hang", End::Retry("it ran longer than")),
        5 => plan("deaf", End::Retry("it ran longer than")),
        6 if is_text => plan("huge", done("\"xxxx")),
        6 => plan("huge", End::Over("failed", "the command wrote more than 10000 bytes of JSON", Some("\"xxxx"))),
        7 if is_text => plan("garbage", done("\"{\\\"\u{fffd}\"")),
        7 => plan("garbage", no_json(Some("\"{\\\"\u{fffd}\""))),
        8 if is_text => plan("close", End::Done(None)),
        8 => plan("close", no_json(None)),
        9 => plan("fork", answer()),
        _ => plan("leave", answer()),
    }
}

/// What the handlers in Rust are given.
#[derive(Deserialize, Serialize)]
struct Order {
    #[serde(rename = "do")]
    what: String,
    n: u64,
    good_at: u64,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Answer {
    Number(u64),
    Text(String),
}

/// All but what takes time.
fn behave(order: &Order, context: &Context) -> Result<Answer, Problem> {
    let what = if context.attempt() >= order.good_at { "answer" } else { &*order.what };
    match what {
        "fail" => return Err(Problem::fail("planned")),
        "ignore" => return Err(Problem::ignore("planned")),
        "retry" => return Err(Problem::retry("planned")),
        "panic" => panic!("planned"),
        "huge" => return Ok(Answer::Text("x".repeat(100_000))),
        "too-huge" => return Ok(Answer::Text("x".repeat(200_001))),
        "tell" => (0..40).for_each(|line| {
            context.log(&format!("line {line}"));
            context.progress(line, Some(40), Some("telling"));
        }),
        _ => {}
    }
    Ok(Answer::Number(order.n))
}

/// The worker's process.
async fn work(url: &str, folder: PathBuf) {
    let mut config = Config::default();
    config.redis.url = Url::new(url);
    config.worker.slots = SLOTS.try_into().expect("more than none");
    config.worker.pools.clear();
    config.worker.scan_interval = Duration::from_millis(500);
    config.capacity.default = (SLOTS as u32).try_into().expect("more than none");
    // More than there are processes, so that some wait for one, and not so many that no place is left for others.
    let python = Pool::of_handler(&App::new("mixed").expect("a name"), &Op::new("python").expect("a name"));
    config.capacity.pools.insert(python, (PROGRAMS as u32 + 2).try_into().expect("more than none"));
    config.objects.url = Url::new(format!("file://{}/objects", folder.display()));
    config.objects.max_object_bytes = ByteSize(200_000);
    let common = format!("set_env = {{ {FOLDER} = {folder:?} }}\nkill_grace = '50ms'\n");
    let behave_py = [&PYTHON, "-I", "-S", &file("behave.py")].map(str::to_owned);
    let behave_sh = ["sh", &file("behave.sh"), "{input.do}", "{input.good_at}", "{attempt}", "{input.n}"];
    for text in [
        format!(
            "op = 'python'\nkind = 'program'\ncommand = {behave_py:?}\nsize = {PROGRAMS}\ncancel_grace = '50ms'\n\
             max_output = 50000\n{common}"
        ),
        format!(
            "op = 'text'\nkind = 'command'\ncommand = {behave_sh:?}\nmax_output = 10000\nignore_codes = [8]\n{common}"
        ),
        format!(
            "op = 'json'\nkind = 'command'\ncommand = {behave_sh:?}\nmax_output = 10000\nignore_codes = [8]\n\
             output = 'json'\n{common}"
        ),
    ] {
        config.handlers.push(toml::from_str(&format!("app = 'mixed'\n{text}")).expect("a handler"));
    }
    let application = Application::new("mixed").and_then(|it| {
        it.handler("rust", move |_, order: Order, context| {
            let folder = folder.clone();
            async move {
                match &*order.what {
                    "hang" => std::future::pending().await,
                    "gate" => {
                        fs::write(folder.join(format!("up-{}", order.n)), "")?;
                        while !folder.join("open").exists() {
                            tokio::time::sleep(Duration::from_millis(20)).await;
                        }
                    }
                    _ => {}
                }
                behave(&order, &context)
            }
        })
        .map(|it| it.stop_grace(Duration::from_millis(100)))
    });
    let application = application.and_then(|it| {
        it.blocking_handler("blocking", |_, order: Order, context| {
            if order.what == "hang" {
                while !context.stop().is_cancelled() {
                    std::thread::sleep(Duration::from_millis(5));
                }
                return Err(Problem::retry("it was told to stop"));
            }
            behave(&order, &context)
        })
    });
    let worker = Worker::builder().config(config).app(application);
    worker.run(Shutdown::on_signals().expect("signals")).await.expect("it runs");
}

/// What is seen of a process from outside.
struct Looks {
    pid: u32,
}

impl Looks {
    /// Its children, and whether each is a zombie.
    fn children(&self) -> Vec<(i32, bool)> {
        let child = |entry: fs::DirEntry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let mut fields = stat.rsplit_once(") ")?.1.split(' ');
            let (state, parent) = (fields.next()?, fields.next()?);
            (parent == self.pid.to_string()).then_some((pid, state == "Z"))
        };
        fs::read_dir("/proc").expect("it can be read").flatten().filter_map(child).collect()
    }

    fn files(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid)).expect("it can be read").count()
    }

    /// Its memory in KiB.
    fn resident(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).expect("it can be read");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it has one");
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    }

    /// Waits until it has no other children than its programs, and none that nobody has waited for.
    fn settled(&self) {
        eventually_blocking("only programs to be left", || {
            let children = self.children();
            (children.len() <= PROGRAMS && children.iter().all(|(_, zombie)| !zombie)).then_some(())
        });
    }
}

/// The processes of this test's handlers and all that they have started, wherever these are now.
fn marked(folder: &str) -> BTreeSet<i32> {
    let mark = format!("{FOLDER}={folder}");
    let is_marked = |pid: &i32| {
        let variables = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        variables.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
    };
    let all = fs::read_dir("/proc").expect("it can be read").flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_marked).collect()
}

#[test]
fn ten_thousand_tasks_that_do_whatever_they_like_end_rightly_and_leave_nothing() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    if let Ok(url) = std::env::var(REDIS) {
        let folder = PathBuf::from(std::env::var(FOLDER).expect("it is given"));
        return runtime.block_on(work(&url, folder));
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    let seed = std::env::var("DRAYMAN_MIXED_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or(now.as_nanos() as u64 % 1_000_000);
    println!("DRAYMAN_MIXED_SEED={seed}");

    let redis = RedisServer::start();
    let scratch = testkit::Scratch::new("mixed");
    let folder = scratch.path().to_str().expect("a text").to_owned();
    let args = ["--exact", "--nocapture", TEST];
    let exe = std::env::current_exe().expect("this program");
    // The worker has the mark itself: it is looked for only once that has ended.
    // What a panic prints with all its frames takes more time and memory than all tasks.
    let env = [(REDIS, &*redis.url_db(DB)), (FOLDER, &folder), ("RUST_BACKTRACE", "0")];
    let worker = Daemon::spawn(exe, &args, &env);
    let looks = Looks { pid: worker.pid() };
    let (store, producer) = runtime.block_on(async {
        let store = store(&redis).await;
        (store.clone(), Producer::new(store, Limits::default()))
    });
    let state = redis.state(DB);
    let finished = |number: u64| {
        eventually_blocking(&format!("{number} tasks to end"), || {
            assert!(worker.try_wait().is_none(), "the worker ended");
            (state.count_finished() == number).then_some(())
        });
    };

    let mut measured = Vec::new();
    for round in 0..ALL / ROUND {
        let begun = Instant::now();
        let numbers = round * ROUND..(round + 1) * ROUND;
        let jobs = numbers.map(|number| Plan::of(seed, number).job(number)).collect();
        for submitted in runtime.block_on(producer.enqueue_many(jobs)) {
            assert!(matches!(submitted, Ok(Submitted::Queued(_))), "{submitted:?}");
        }
        finished((round + 1) * ROUND);
        looks.settled();
        measured.push((looks.resident(), looks.files()));
        println!("round {round}: {:.1} s, KiB and open files {:?}", begun.elapsed().as_secs_f64(), measured.last());
    }
    let faults: Vec<String> = (0..ALL).filter_map(|number| Plan::of(seed, number).fault(&state)).collect();
    assert!(faults.is_empty(), "{} of {ALL}:\n{}", faults.len(), faults[..faults.len().min(20)].join("\n"));
    let (first, last) = (measured[0], measured[measured.len() - 1]);
    assert!(last.0 < first.0 + GROWTH, "{measured:?}");
    // There may be other numbers of programs, each with its three pipes and what waits for its end.
    assert!(last.1 <= first.1 + 4 * PROGRAMS, "{measured:?}");

    // Every place is free: as many tasks as there are run at once, and in each of the programs one.
    let ops = (0..SLOTS).map(|at| if at < PROGRAMS { "python" } else { ["rust", "text"][at % 2] });
    let gates = ops.enumerate().map(|(at, op)| {
        let input = serde_json::json!({ "do": "gate", "n": at, "good_at": NEVER });
        NewJob {
            id: job_id(&format!("gate-{at}")),
            ..task(User::new("ann").unwrap(), op, Payload::json(&input).unwrap())
        }
    });
    for submitted in runtime.block_on(producer.enqueue_many(gates.collect())) {
        assert!(matches!(submitted, Ok(Submitted::Queued(_))), "{submitted:?}");
    }
    eventually_blocking("all places to be taken at once", || {
        (0..SLOTS).all(|at| scratch.path().join(format!("up-{at}")).exists()).then_some(())
    });
    assert_eq!(state.running(), SLOTS);
    fs::write(scratch.path().join("open"), "").expect("it can be written");
    finished(ALL + SLOTS as u64);
    looks.settled();

    // Nothing is left in Redis, and all that is there agrees.
    assert!(state.is_drained());
    let keep = Config::default().retention.finished;
    assert_eq!(runtime.block_on(reconcile::check(&store, keep)).expect("redis answers"), []);

    worker.signal(Signal::SIGTERM);
    assert!(worker.wait().success(), "{}", worker.output());
    runtime.block_on(eventually("all processes to be gone", async || marked(&folder).is_empty().then_some(())));
}
