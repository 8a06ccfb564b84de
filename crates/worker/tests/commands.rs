//! Commands as handlers: real processes, with everything that they may do wrong.

use std::collections::BTreeSet;

use queue_core::model::task::Payload;
use serde_json::{Value, json};
use testkit::eventually;
use worker::execute::task::{Outcome, Wish};

use support::handlers::*;

mod support;

fn shell(script: &str, keys: &str) -> Handled {
    Handled::command(&["sh", "-c", script], keys)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_argument_stays_one_whatever_is_put_into_it() {
    let args = ["{input.text}", "--n={input.list.1.n}", "{input.flag}/{job}/{user}/{app}.{op}/{attempt}", "{{}}"];
    let show = [&["printf", "%s\\n"], &args[..], &["{input.list}", "{context.page}"]].concat();
    let handled = Handled::command(&show, "");
    handled.handler.start().await.unwrap();
    let hostile = "$(touch /tmp/x) `id` \"'; rm -rf / #\n* ä";
    let mut task = task(&json!({ "text": hostile, "list": [1, { "n": 2.5 }], "flag": true }));
    task.context = Some(Payload::msgpack(&json!({ "page": 7 })).unwrap());
    let text = result(handled.start(task).end().await);
    assert_eq!(text, format!("{hostile}\n--n=2.5\ntrue/job-1/ana/App.op/2\n{{}}\n[1,{{\"n\":2.5}}]\n7\n"));
    handled.nobody_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_command_cannot_be_told_fails_the_task_before_anything_is_started() {
    let cases = [
        ("{input.file}", json!({ "files": 1 }), "the input has no file"),
        ("{input.file}", json!({ "file": null }), "the input has no file"),
        ("{input.file.0}", json!({ "file": "text" }), "the input has no file.0"),
        ("{context.page}", json!({}), "the context has no page"),
        ("{input.file}", json!({ "file": "a\0b" }), "an argument would have a zero byte"),
        (
            "{input.file}",
            json!({ "file": "x".repeat(1 << 20) }),
            "echo cannot be started: Argument list too long (os error 7)",
        ),
    ];
    for (argument, input, reason) in cases {
        let problem = Handled::command(&["echo", argument], "").problem(input).await;
        assert_eq!((problem.wish, &*problem.reason), (Wish::Fail, reason));
    }
    let mut task = task(&Value::Null);
    task.input = Payload { bytes: b"{".into(), ..task.input };
    let problem = problem(Handled::command(&["echo"], "").start(task).end().await);
    assert_eq!(problem.wish, Wish::Fail);
    assert!(problem.reason.starts_with("the input cannot be read as JSON: "), "{}", problem.reason);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_reads_what_it_is_given_or_not() {
    let input = json!({ "text": "a\nb", "list": [1, 2], "empty": "" });
    let cases = [
        ("none", Value::Null),
        ("json", json!(input.to_string())),
        ("field:text", json!("a\nb")),
        ("field:list", json!("[1,2]")),
        ("field:empty", Value::Null),
    ];
    for (stdin, expected) in cases {
        let handled = Handled::command(&["cat"], &format!("stdin = '{stdin}'"));
        assert_eq!(handled.result(input.clone()).await, expected, "{stdin}");
    }
    let problem = Handled::command(&["cat"], "stdin = 'field:file'").problem(input).await;
    assert_eq!((problem.wish, &*problem.reason), (Wish::Fail, "the input has no file"));
    // More than a pipe holds: it need not read that.
    let big = json!("x".repeat(1 << 20));
    assert_eq!(shell("echo done", "stdin = 'json'").result(big.clone()).await, json!("done\n"));
    assert_eq!(shell("exec <&-; echo done", "stdin = 'json'").result(big.clone()).await, json!("done\n"));
    // And it may write while it does.
    let copied = Handled::command(&["cat"], "stdin = 'json'\nmax_output = '2MiB'").result(big.clone()).await;
    assert_eq!(copied, json!(big.to_string()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_exit_code_decides() {
    let keys = "retry_codes = [75, 7]\nignore_codes = [8]";
    for (code, wish) in [(7, Wish::Retry { after: None }), (8, Wish::Ignore), (9, Wish::Fail), (127, Wish::Fail)] {
        let problem = shell("echo some; echo why >&2; exit {input.code}", keys).problem(json!({ "code": code })).await;
        assert_eq!(problem.wish, wish, "{code}");
        assert_eq!(problem.reason, format!("the command ended with exit code {code}; it said last: why"));
        assert_eq!(problem.result.unwrap().bytes, b"\"some\\n\"");
    }
    assert_eq!(shell("exit 75", "").problem(json!({})).await.wish, Wish::Retry { after: None });
    let problem = shell("kill -9 $$", "").problem(json!({})).await;
    assert_eq!(problem.wish, Wish::Retry { after: None });
    assert_eq!(problem.reason, "the command was ended by SIGKILL");
    let handled = Handled::command(&["no-such-program"], "");
    assert_eq!(handled.handler.start().await.unwrap_err(), "there is no program no-such-program");
    assert_eq!(handled.handler.check().await.unwrap_err(), "there is no program no-such-program");
    let outcome = handled.call(json!({})).await;
    let Outcome::NotReady(reason) = outcome else { panic!("{outcome:?}") };
    assert!(reason.starts_with("no-such-program cannot be started: "), "{reason}");
}

#[tokio::test(flavor = "multi_thread")]
async fn output_is_kept_within_bounds() {
    let text = async |script: &str, keys: &str| shell(script, keys).call(json!({})).await;
    assert_eq!(result(text("printf '\\377x'", "").await), json!("\u{fffd}x"));
    assert_eq!(result(text("true", "").await), Value::Null);
    let keys = "max_output = 10";
    assert_eq!(result(text("printf 1234567890", keys).await), json!("1234567890"));
    assert_eq!(
        result(text("head -c 1000010 /dev/zero | tr '\\0' x", keys).await),
        json!("xxxxxxxxxx… (1000000 bytes more)")
    );
    let as_json = "output = 'json'\nmax_output = 10";
    assert_eq!(result(text("echo '{{\"a\":1}}'", as_json).await), json!({ "a": 1 }));
    for (script, reason) in [
        ("echo '{{\"a\":'", "the command wrote what is no JSON: EOF"),
        ("true", "the command wrote what is no JSON: EOF"),
        ("echo '[1,2,3,4,5,6]'", "the command wrote more than 10 bytes of JSON"),
    ] {
        let problem = problem(text(script, as_json).await);
        assert_eq!(problem.wish, Wish::Fail);
        assert!(problem.reason.starts_with(reason), "{}", problem.reason);
    }
    // Standard error is told line by line, and its end with a failure.
    let handled = shell("seq 1000 >&2; head -c 100000 /dev/zero >&2; exit 1", "");
    let call = handled.start(task(&json!({})));
    let desk = call.desk.clone();
    let problem = problem(call.end().await);
    let lines = desk.lines();
    assert_eq!((lines.len(), &*lines[999]), (1001, "1000"));
    assert!(lines[1000].len() < 9_000 && problem.reason.len() < 2_500, "{}", problem.reason.len());
    assert!(problem.reason.contains("it said last: 997\n998\n999\n1000\n"), "{}", problem.reason);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_is_ended_with_its_whole_group() {
    // By SIGTERM; by SIGKILL; and as it itself says.
    let cases = [
        ("sleep 1000 & echo up >&2; sleep 1000", "kill_grace = '1m'", Outcome::Stopped),
        (
            "trap '' TERM; sleep 1000 & echo up >&2; while :; do sleep 1000; done",
            "kill_grace = '50ms'",
            Outcome::Stopped,
        ),
        ("trap 'exit 3' TERM; echo up >&2; while :; do sleep 0.01; done", "", Outcome::Stopped),
        ("trap 'exit 0' TERM; echo up >&2; while :; do sleep 0.01; done", "", Outcome::Done(Default::default())),
    ];
    for (script, keys, outcome) in cases {
        let handled = shell(script, keys);
        let call = handled.start(task(&json!({})));
        eventually("it to be up", async || (!call.desk.lines().is_empty()).then_some(())).await;
        call.stop.cancel();
        assert_eq!(call.end().await, outcome, "{script}");
        handled.nobody_left().await;

        let call = handled.start(task(&json!({})));
        eventually("it to be up", async || (!call.desk.lines().is_empty()).then_some(())).await;
        call.end.abort();
        handled.nobody_left().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_command_leaves_behind_holds_nobody_up() {
    let handled = shell("sleep 1000 & echo $!", "output = 'json'");
    let left = handled.result(json!({})).await.as_i64().unwrap() as i32;
    eventually("what it left to be gone", async || (!exists(left)).then_some(())).await;
    // Out of its group, and with its pipes.
    let handled = shell("setsid sleep 1000 & echo up", "");
    eventually("one that got away", async || {
        assert_eq!(handled.result(json!({})).await, json!("up\n"));
        (handled.processes() != BTreeSet::new()).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_starts_where_and_with_what_it_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let keys = format!("dir = {:?}\nenv = []\nmemory = '256MiB'", folder.path().to_str().unwrap());
    let handled = shell("pwd; env; ulimit -v", &keys);
    let text = handled.result(json!({})).await;
    let lines: Vec<&str> = text.as_str().unwrap().lines().collect();
    assert_eq!(lines[0], folder.path().to_str().unwrap());
    assert_eq!(lines.last(), Some(&"262144"));
    let own = ["PWD=", "OLDPWD=", "SHLVL=", "_="];
    let given: Vec<_> =
        lines[1..lines.len() - 1].iter().filter(|line| !own.iter().any(|o| line.starts_with(o))).collect();
    assert_eq!(given, [&&*handled.mark]);
}
