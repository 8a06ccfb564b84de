//! Programs as handlers: real Python and Node processes, with everything that they may do wrong.

use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use queue_core::config::Limits;
use queue_core::ids::{App, Op, User};
use queue_core::inspect::Inspect;
use queue_core::model::task::{Encoding, Message, Payload, Progress};
use queue_core::producer::{NewJob, Producer};
use serde_json::{Value, json};
use testkit::{Daemon, RedisServer, eventually, eventually_blocking};
use worker::execute::task::{Outcome, Wish};

use support::handlers::*;
use support::{Running, ended, job_id, store};

mod support;

fn pid(value: &Value) -> i32 {
    value["pid"].as_i64().expect("a pid") as i32
}

/// A worker with one program, which has one process, and room for more tasks.
struct House {
    worker: Running,
    inspect: Inspect,
    producer: Producer,
    redis: RedisServer,
}

impl House {
    async fn serve(file: &str, timeout: &str) -> Self {
        let redis = RedisServer::start();
        let mut config = support::config(&redis);
        config.capacity.default = 8.try_into().unwrap();
        let command = [&**PYTHON, "-I", "-S", file];
        let keys = format!("app = 'app'\nop = 'op'\nkind = 'program'\ncommand = {command:?}\ntimeout = '{timeout}'");
        config.handlers = vec![toml::from_str(&keys).unwrap()];
        let worker = Running::start(config);
        let store = store(&redis).await;
        let (inspect, producer) = (Inspect::new(store.clone()), Producer::new(store, Limits::default()));
        Self { worker, inspect, producer, redis }
    }

    async fn submit(&self, id: &str, input: &Value, deadline: Option<SystemTime>) {
        let (user, app, op) = (User::new("ann").unwrap(), App::new("app").unwrap(), Op::new("op").unwrap());
        let job = NewJob::task(user, app, op, Payload::json(input).unwrap());
        self.producer.enqueue(NewJob { id: job_id(id), deadline, ..job }).await.expect("redis answers");
    }

    /// Waits until a job has been taken, and returns the latest holder's fence.
    async fn taken(&self, id: &str) -> String {
        let fence = async || self.redis.state(support::DB).field(id, "fence");
        eventually(&format!("job {id} to be taken"), fence).await
    }

    /// Status and reason of a job that has ended.
    async fn end_of(&self, id: &str) -> (String, Option<String>) {
        let view = ended(&self.inspect, id).await;
        (view.status(), view.text("failed_reason"))
    }
}

async fn gone(pid: i32) {
    eventually("the process to be gone", async || (!exists(pid)).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_programs_of_the_page_work_as_they_stand() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let python = Handled::program(&[&PYTHON, &write("greet.py", example("python"))], "");
    python.handler.start().await.unwrap();
    assert_eq!(python.result(json!({ "name": "Änä\n" })).await, json!({ "greeting": "Hello, Änä\n" }));
    let problem = python.problem(json!({})).await;
    assert_eq!((problem.wish, &*problem.reason), (Wish::Fail, "KeyError('name')"));

    let node = Handled::program(&["node", &write("steps.cjs", example("node"))], "cancel_grace = '1m'");
    let call = node.start(task(&json!({ "steps": 3 })));
    assert_eq!(call.progress().await, Progress { done: 1, total: Some(3), note: None });
    assert_eq!(result(call.end().await), json!({ "steps": 3 }));
    let processes = node.processes();
    let call = node.start(task(&json!({ "steps": 1_000_000 })));
    call.progress().await;
    call.stop.cancel();
    assert_eq!(call.end().await, Outcome::Stopped);
    // It has ended the call by itself, and goes on.
    assert_eq!(node.result(json!({ "steps": 0 })).await, json!({ "steps": 0 }));
    assert_eq!(node.processes(), processes);
    for handled in [python, node] {
        handled.handler.close().await;
        assert_eq!(handled.processes(), BTreeSet::new());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_arrives_whole() {
    let handled = Handled::behaving("");
    let mut task = task(&Value::Null);
    task.input = Payload::msgpack(&json!({ "do": "echo", "ä": [1.5, null, "\n"] })).unwrap();
    task.context = Some(Payload { encoding: Encoding::Json, bytes: b"{\n\"page\": 12345678901234567890123\n}".into() });
    task.traceparent = Some("00-1-2-01".into());
    let mut arrived = result(handled.start(task).end().await);
    assert!(arrived["id"].take().is_u64());
    let expected = json!({
        "type": "job", "v": 1, "id": null, "job": "job-1", "user": "ana", "app": "App", "op": "op",
        "fence": 7, "attempt": 2, "max_attempts": 3, "timeout_ms": 30_000, "tags": ["monthly"], "traceparent": "00-1-2-01",
        "context": { "page": 12345678901234567890123.0 }, "input": { "do": "echo", "ä": [1.5, null, "\n"] },
    });
    assert_eq!(arrived, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_cannot_be_said_in_json_fails_before_anything_is_started() {
    let handled = Handled::behaving("");
    let mut task = task(&Value::Null);
    task.input = Payload { encoding: Encoding::MsgPack, bytes: vec![0xc4, 1, 0xff] };
    let problem = problem(handled.start(task.clone()).end().await);
    assert_eq!(problem.wish, Wish::Fail);
    assert!(problem.reason.starts_with("the input cannot be handed over as JSON: "), "{}", problem.reason);
    task.input = Payload::json(&"x".repeat(17 << 20)).unwrap();
    let problem = support::handlers::problem(handled.start(task).end().await);
    assert!(problem.reason.ends_with("at most 16777216 are handed over"), "{}", problem.reason);
    assert_eq!(handled.processes(), BTreeSet::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_become_outcomes() {
    let handled = Handled::behaving("");
    let answer = async |line: &str| handled.call(json!({ "do": "say", "lines": [line] })).await;
    let message = Message { msgid: 5, errcode: "missing".into(), field: Some("name".into()), vals: vec!["x".into()] };
    let messages = r#""messages":[{"msgid":5,"errcode":"missing","field":"name","vals":["x"]}]"#;

    let files = r#""files":{"a.csv":"1,2","b.bin":{"base64":"AP8="}}"#;
    let outcome = answer(&format!(r#"{{"type":"result","id":$ID,"result":[1],{messages},{files}}}"#)).await;
    let Outcome::Done(output) = outcome else { panic!("{outcome:?}") };
    assert_eq!(output.result.unwrap().bytes, b"[1]");
    assert_eq!(output.messages, std::slice::from_ref(&message));
    let files: Vec<_> = output.files.into_iter().collect();
    assert_eq!(files, [("a.csv".into(), b"1,2".to_vec()), ("b.bin".into(), vec![0, 0xff])]);

    let outcome = answer(r#"{"type":"result","id":$ID}"#).await;
    assert_eq!(result(outcome), Value::Null);

    let failed = problem(answer(r#"{"type":"error","id":$ID,"error":"no"}"#).await);
    assert_eq!((failed.wish, &*failed.reason, failed.result), (Wish::Fail, "no", None));
    let again = r#"{"type":"error","id":$ID,"error":"busy","wish":"retry""#;
    assert_eq!(problem(answer(&format!("{again}}}")).await).wish, Wish::Retry { after: None });
    let after = Some(Duration::from_millis(1_500));
    assert_eq!(problem(answer(&format!(r#"{again},"after_ms":1500}}"#)).await).wish, Wish::Retry { after });
    let ignored = format!(r#"{{"type":"error","id":$ID,"error":"old","wish":"ignore",{messages},"result":{{}}}}"#);
    let ignored = problem(answer(&ignored).await);
    assert_eq!((ignored.wish, ignored.messages), (Wish::Ignore, vec![message]));
    assert_eq!(ignored.result.unwrap().bytes, b"{}");
    assert_eq!(answer(r#"{"type":"stopped","id":$ID}"#).await, Outcome::Stopped);
    assert_eq!(handled.processes().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_said_by_the_way_reaches_the_desk() {
    let handled = Handled::behaving("");
    let lines = [
        r#"{"type":"ready"}"#,
        r#"{"type":"progress","id":$ID,"done":1}"#,
        r#"{"type":"log","id":$ID,"line":"half"}"#,
        r#"{"type":"progress","id":$ID,"done":2,"total":2,"note":"tidying"}"#,
        r#"{"type":"result","id":$ID}"#,
    ];
    let call = handled.start(task(&json!({ "do": "say", "lines": lines })));
    let desk = call.desk.clone();
    result(call.end().await);
    let progress = desk.progress.lock().unwrap().clone();
    assert_eq!(progress[0], Progress { done: 1, ..Progress::default() });
    assert_eq!(progress[1], Progress { done: 2, total: Some(2), note: Some("tidying".into()) });
    assert_eq!(desk.lines(), ["half"]);
    // Each line of standard error, though the answer comes by another pipe.
    let call = handled.start(task(&json!({ "do": "complain", "lines": 50 })));
    let desk = call.desk.clone();
    result(call.end().await);
    assert_eq!(desk.lines().len(), 50);
    assert_eq!(desk.lines()[49], "line 49");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_goes_on_after_its_cancel_is_ended_by_force() {
    for (deaf, graces) in
        [(false, "cancel_grace = '50ms'\nkill_grace = '1m'"), (true, "cancel_grace = '50ms'\nkill_grace = '50ms'")]
    {
        let handled = Handled::behaving(graces);
        let call = handled.start(task(&json!({ "do": "hang", "deaf": deaf })));
        let pid = call.progress().await.done as i32;
        call.stop.cancel();
        assert_eq!(call.end().await, Outcome::Stopped);
        gone(pid).await;
        // The next task gets another process, and need not wait: nobody takes this for a program that can't start.
        assert_ne!(support::handlers::result(handled.call(json!({ "do": "" })).await), json!({ "pid": pid }));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_is_dropped_leaves_nothing() {
    let handled = Handled::behaving("size = 2");
    let call = handled.start(task(&json!({ "do": "hang", "deaf": true })));
    let pid = call.progress().await.done as i32;
    call.end.abort();
    gone(pid).await;
    // Also while the process is being started.
    for _ in 0..20 {
        let call = handled.start(task(&json!({ "do": "hang", "deaf": true })));
        tokio::task::yield_now().await;
        call.end.abort();
        assert!(call.end.await.is_err());
    }
    handled.nobody_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_whose_process_ends_may_be_tried_again() {
    let handled = Handled::behaving("");
    let first = pid(&handled.result(json!({ "do": "" })).await);
    let problem = handled.problem(json!({ "do": "exit", "code": 3 })).await;
    assert_eq!(problem.wish, Wish::Retry { after: None });
    let reason = "the program ended with exit code 3 before it had answered; it said last: about to leave";
    assert_eq!(problem.reason, reason);
    gone(first).await;
    let problem = handled.problem(json!({ "do": "kill" })).await;
    assert_eq!(problem.wish, Wish::Retry { after: None });
    assert_eq!(problem.reason, "the program was ended by SIGKILL before it had answered");

    // Somebody kills it in the middle.
    let call = handled.start(task(&json!({ "do": "hang" })));
    let hanging = call.progress().await.done as i32;
    kill(Pid::from_raw(hanging), Signal::SIGKILL).unwrap();
    assert_eq!(support::handlers::problem(call.end().await).wish, Wish::Retry { after: None });
    gone(hanging).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_ends_between_two_tasks_costs_neither() {
    let handled = Handled::behaving("");
    for _ in 0..3 {
        let idle = pid(&handled.result(json!({ "do": "" })).await);
        kill(Pid::from_raw(idle), Signal::SIGKILL).unwrap();
        gone(idle).await;
        // By itself, right behind its answer.
        let value = handled.result(json!({ "do": "", "afterwards": "exit" })).await;
        assert_ne!(pid(&value), idle);
        gone(pid(&value)).await;
        // It doesn't listen any more, but lives.
        let deaf = pid(&handled.result(json!({ "do": "deafen" })).await);
        assert_ne!(pid(&handled.result(json!({ "do": "" })).await), deaf);
    }
    // By itself, while the next task is already on its way to it.
    let calls: Vec<Call> = (0..30).map(|_| handled.start(task(&json!({ "do": "", "afterwards": "exit" })))).collect();
    let mut pids = BTreeSet::new();
    for call in calls {
        pids.insert(pid(&result(call.end().await)));
    }
    assert_eq!(pids.len(), 30);
    handled.handler.close().await;
    handled.nobody_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_breaks_the_rules_fails_its_task_and_is_replaced() {
    let handled = Handled::behaving("max_output = 10000");
    let say = |line: &str| json!({ "do": "say", "lines": [line], "then": "wait" });
    let again = Wish::Retry { after: None };
    let cases = [
        (say("Traceback (most recent call last)"), Wish::Fail, "wrote what is no message: \"Traceback"),
        (say(""), Wish::Fail, "wrote what is no message: \"\""),
        (say("[]"), Wish::Fail, "wrote what is no message"),
        (say(r#"{"type":"result","id":$ID,"result":NaN}"#), Wish::Fail, "wrote what is no message"),
        (say(r#"{"type":"result","id":$ID,"reslut":1}"#), Wish::Fail, "unknown field `reslut`"),
        (say(r#"{"type":"result","result":1}"#), Wish::Fail, "missing field `id`"),
        (say(r#"{"type":"progress","id":$ID,"done":-1}"#), Wish::Fail, "wrote what is no message"),
        (say(r#"{"type":"dance","id":$ID}"#), Wish::Fail, "unknown variant `dance`"),
        (say(&format!(r#"{{"type":"{}"}}"#, "x".repeat(9_000))), Wish::Fail, "wrote what is no message"),
        (say(&format!("{{\"type\":\"log\",\"a\":{}", "[".repeat(9_000))), Wish::Fail, "recursion limit"),
        (say(r#"{"type":"result","id":$ID,"files":{"a":{"base64":"?"}}}"#), Wish::Fail, "file \"a\" is not Base64"),
        (say(&"x".repeat(10_001)), Wish::Fail, "wrote a line of more than 10000 bytes"),
        (
            json!({ "do": "say", "lines": ["bye"], "afterwards": "exit" }),
            Wish::Fail,
            "wrote what is no message: \"bye\"",
        ),
        (json!({ "do": "huge" }), Wish::Fail, "wrote a line of more than 10000 bytes"),
        (say(r#"{"type":"result","id":999}"#), again, "the program spoke of call 999, and call "),
        (say(r#"{"type":"log","id":0,"line":"x"}"#), again, "the program spoke of call 0, and call "),
        (json!({ "do": "close", "fd": 1 }), again, "the program closed its standard output before it had answered"),
    ];
    for (input, wish, reason) in cases {
        // A new process after each, and none that waits for longer than the last: each has answered something.
        let pid = pid(&handled.result(json!({ "do": "" })).await);
        let problem = handled.problem(input).await;
        assert_eq!(problem.wish, wish, "{}", problem.reason);
        assert!(problem.reason.contains(reason), "{reason}: {}", problem.reason);
        assert!(problem.reason.len() < 1_000, "{}", problem.reason.len());
        gone(pid).await;
    }
    handled.nobody_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_answer_is_taken_for_no_other_task() {
    let handled = Handled::behaving("");
    let twice = r#"{"type":"result","id":$ID,"result":"again"}"#;
    for _ in 0..8 {
        let first = pid(&handled.result(json!({ "do": "", "afterwards": twice })).await);
        match handled.call(json!({ "do": "" })).await {
            // It was heard before the task was on its way.
            Outcome::Done(output) => assert_ne!(pid(&output.result.unwrap().read().unwrap()), first),
            outcome => {
                let problem = problem(outcome);
                assert_eq!(problem.wish, Wish::Retry { after: None });
                assert!(problem.reason.starts_with("the program spoke of call "), "{}", problem.reason);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_program_has_started_ends_with_it() {
    let handled = Handled::behaving("");
    let value = handled.result(json!({ "do": "fork", "leaves": false })).await;
    assert_eq!(handled.processes().len(), 2);
    handled.problem(json!({ "do": "exit", "code": 0 })).await;
    gone(value["child"].as_i64().unwrap() as i32).await;
    handled.problem(json!({ "do": "fork", "leaves": false, "exit": true })).await;
    handled.nobody_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grandchild_that_left_the_group_and_holds_the_pipes_holds_up_nobody() {
    let handled = Handled::behaving("");
    let problem = handled.problem(json!({ "do": "fork", "leaves": true, "exit": true })).await;
    assert_eq!(problem.reason, "the program ended with exit code 3 before it had answered");
    let first = handled.result(json!({ "do": "fork", "leaves": true, "afterwards": "exit" })).await;
    gone(pid(&first)).await;
    assert_ne!(pid(&handled.result(json!({ "do": "" })).await), pid(&first));
    handled.handler.close().await;
    // Out of reach, as the page says.
    assert_eq!(handled.processes().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_reads_nothing_keeps_nobody_waiting() {
    let handled = Handled::program(&["sleep", "1000"], "size = 2\ncancel_grace = '50ms'");
    // More than a pipe holds.
    let calls = [(); 2].map(|()| handled.start(task(&json!("x".repeat(1 << 20)))));
    eventually("both processes", async || (handled.processes().len() == 2).then_some(())).await;
    for call in calls {
        call.stop.cancel();
        assert_eq!(call.end().await, Outcome::Stopped);
    }
    handled.nobody_left().await;
    let handled = Handled::program(&["sh", "-c", "exec <&-; sleep 1000"], "");
    let reason = "the program closed its standard input before it had answered";
    assert_eq!(handled.call(json!("x".repeat(1 << 20))).await, Outcome::NotReady(reason.into()));
    handled.nobody_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_processes_than_allowed_and_the_others_wait() {
    let handled = Handled::behaving("size = 2\ncancel_grace = '50ms'");
    let hanging = [(); 2].map(|()| handled.start(task(&json!({ "do": "hang" }))));
    for call in &hanging {
        call.progress().await;
    }
    let waiting = [(); 5].map(|()| handled.start(task(&json!({ "do": "" }))));
    let stopped = handled.start(task(&json!({ "do": "" })));
    stopped.stop.cancel();
    assert_eq!(stopped.end().await, Outcome::NotReady("it has waited for a process in vain".into()));
    assert_eq!(handled.processes().len(), 2);
    assert!(waiting.iter().all(|call| !call.end.is_finished()));
    hanging[0].stop.cancel();
    for call in waiting {
        result(call.end().await);
        assert!(handled.processes().len() <= 2);
    }
    hanging[1].end.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_of_a_program_that_is_gone_wait_for_its_return() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("program.py");
    std::fs::copy(file("behave.py"), &path).unwrap();
    let house = House::serve(path.to_str().unwrap(), "500ms").await;
    house.submit("before", &json!({ "do": "", "afterwards": "exit" }), None).await;
    assert_eq!(house.end_of("before").await, ("done".into(), None));

    std::fs::remove_file(&path).unwrap();
    let ids = ["1", "2", "3"];
    for id in ids {
        house.submit(id, &json!({ "do": "" }), None).await;
    }
    house.taken("1").await;
    let back = async || (house.inspect.job("1").await.unwrap().unwrap().status() == "pending").then_some(());
    eventually("the task to go back", back).await;
    std::fs::copy(file("behave.py"), &path).unwrap();
    for id in ids {
        assert_eq!(house.end_of(id).await, ("done".into(), None), "{id}");
    }
    house.worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_ends_at_its_start_is_started_ever_more_slowly() {
    let handled = Handled::program(&["sh", "-c", "echo no module >&2; exit 1"], "");
    let fault = handled.handler.start().await.unwrap_err();
    assert_eq!(fault, "the program ended with exit code 1; it said last: no module");
    assert_eq!(handled.handler.check().await, Ok(()));
    let start = Instant::now();
    for _ in 0..5 {
        // It has not read the task, which so has not been begun.
        let reason = "the program ended with exit code 1 before it had answered; it said last: no module";
        assert_eq!(handled.call(json!(1)).await, Outcome::NotReady(reason.into()));
    }
    // The first four pauses, without what chance adds to them.
    assert!(start.elapsed() >= Duration::from_millis(50 + 100 + 200 + 400), "{:?}", start.elapsed());
    let fault = "5 processes in a row ended before they had answered anything";
    assert_eq!(handled.handler.check().await, Err(fault.into()));
    // Who waits for the next can be stopped.
    let call = handled.start(task(&json!(1)));
    call.stop.cancel();
    assert_eq!(call.end().await, Outcome::NotReady("it has waited for a process in vain".into()));

    let handled = Handled::program(&["/nonexistent/program"], "");
    assert_eq!(handled.handler.start().await.unwrap_err(), "there is no program /nonexistent/program");
    let reason = "/nonexistent/program cannot be started: No such file or directory (os error 2)";
    assert_eq!(handled.call(json!(1)).await, Outcome::NotReady(reason.into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_waits_for_a_word_or_a_moment() {
    let text = "echo '{\"type\":\"ready\"}'; while read line; do :; done";
    let handled = Handled::program(&["sh", "-c", text], "");
    // Again, after it was not well: what waits is enough.
    for _ in 0..2 {
        handled.handler.start().await.unwrap();
        assert_eq!(handled.processes().len(), 1);
    }
    let handled = Handled::program(&["cat"], "");
    handled.handler.start().await.unwrap();
    let handled = Handled::program(&["sh", "-c", "echo hello; exec cat"], "");
    assert_eq!(handled.handler.start().await.unwrap_err(), "the program said \"hello\" before it had a task");
    handled.nobody_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn close_ends_idle_programs_also_those_that_will_not() {
    let graces = "cancel_grace = '50ms'\nkill_grace = '50ms'";
    for text in ["while read line; do :; done", "sleep 1000", "trap '' TERM; while :; do sleep 1000; done"] {
        let handled = Handled::program(&["sh", "-c", text], graces);
        handled.handler.start().await.unwrap();
        assert_ne!(handled.processes(), BTreeSet::new());
        handled.handler.close().await;
        handled.nobody_left().await;
    }
    // Who is not closed but dropped ends them, too.
    let mut handled = Handled::program(&["sh", "-c", "trap '' TERM; while :; do sleep 1000; done"], "");
    handled.handler.start().await.unwrap();
    handled.handler = Handled::program(&["cat"], "").handler.clone();
    handled.nobody_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_limited() {
    let allocate = json!({ "do": "allocate", "bytes": 512 << 20 });
    let handled = Handled::behaving("memory = '256MiB'");
    assert_eq!(handled.problem(allocate.clone()).await.reason, "MemoryError()");
    assert_eq!(Handled::behaving("").result(allocate).await, json!(512 << 20));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_sees_only_the_variables_that_it_is_given() {
    let handled = Handled::behaving("env = ['PATH', 'NOT_THERE']");
    let mut variables = handled.result(json!({ "do": "environment" })).await;
    // Python's own, in a locale that it does not like.
    variables.as_object_mut().unwrap().remove("LC_CTYPE");
    let (name, value) = handled.mark.split_once('=').unwrap();
    assert_eq!(variables, json!({ "PATH": std::env::var("PATH").unwrap(), name: value }));
}

#[test]
fn a_worker_that_is_killed_takes_its_programs_with_it() {
    const INNER: &str = "HANDLERS_TEST_WORKER";
    if std::env::var_os(INNER).is_some() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let handled = Handled::behaving("size = 2");
            let idle = handled.result(json!({ "do": "" })).await;
            let hanging = [(); 2].map(|()| handled.start(task(&json!({ "do": "hang", "deaf": true }))));
            let mut pids = vec![i64::from(pid(&idle))];
            for call in &hanging {
                pids.push(call.progress().await.done as i64);
            }
            let command = Handled::command(&["sh", "-c", "trap '' TERM; echo $$ >&2; while :; do sleep 0.1; done"], "");
            let call = command.start(task(&json!({})));
            let said = eventually("its pid", async || call.desk.lines().first().cloned()).await;
            pids.push(said.parse().unwrap());
            println!("pids {pids:?}");
            std::future::pending::<()>().await;
        });
    }
    let args = ["--exact", "--nocapture", "a_worker_that_is_killed_takes_its_programs_with_it"];
    let worker = Daemon::spawn(std::env::current_exe().unwrap(), &args, &[(INNER, "1")]);
    let line = worker.wait_for_line("pids ");
    let pids: BTreeSet<i32> = serde_json::from_str(line.split_once("pids ").unwrap().1).unwrap();
    assert_eq!(pids.len(), 3);
    let alive =
        |pid: &i32| std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
    assert!(pids.iter().all(alive));
    worker.kill9();
    eventually_blocking("the programs to end", || (!pids.iter().any(alive)).then_some(()));
}

#[test]
fn a_thousand_tasks_leave_nothing() {
    if !alone("a_thousand_tasks_leave_nothing") {
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let program = Handled::behaving("size = 4\ncancel_grace = '20ms'\nkill_grace = '20ms'\nmax_output = 100000");
        let command = Handled::command(&["sh", "-c", "echo $$"], "output = 'json'");
        let mut pids = BTreeSet::new();
        let mut measured = Vec::new();
        let round = async |number: usize, pids: &mut BTreeSet<i32>| {
            let some: Vec<Call> = (0..20)
                .map(|n| match (n, number % 3) {
                    (0, 0) => program.start(task(&json!({ "do": "kill" }))),
                    (0, 1) => program.start(task(&json!({ "do": "huge" }))),
                    (0, _) => {
                        let call = program.start(task(&json!({ "do": "hang", "deaf": true })));
                        call.stop.cancel();
                        call
                    }
                    (1..10, _) => program.start(task(&json!({ "do": "" }))),
                    _ => command.start(task(&json!({}))),
                })
                .collect();
            for call in some {
                if let Outcome::Done(output) = call.end().await {
                    let value: Value = output.result.unwrap().read().unwrap();
                    pids.insert(value.as_i64().map_or_else(|| pid(&value), |pid| pid as i32));
                }
            }
        };
        for number in 0..50 {
            round(number, &mut pids).await;
            if number == 9 || number == 49 {
                program.handler.close().await;
                program.nobody_left().await;
                let files = std::fs::read_dir("/proc/self/fd").unwrap().count();
                let status = std::fs::read_to_string("/proc/self/status").unwrap();
                let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
                let resident: u64 = resident.trim_end_matches("kB").trim().parse().unwrap();
                measured.push((files, resident));
            }
        }
        assert!(pids.len() > 500, "{}", pids.len());
        for pid in pids {
            gone(pid).await;
        }
        let [(files, resident), (files_later, resident_later)] = measured[..] else { panic!("{measured:?}") };
        assert!(files_later <= files && resident_later < resident + 8 * 1024, "{measured:?}");
    });
}
