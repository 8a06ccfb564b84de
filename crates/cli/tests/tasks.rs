//! Tasks on the command line: submitted, waited for, shown, and their results written.

use std::time::Duration;

use queue_core::calls::{Fields, Verdict};
use queue_core::config::{ObjectsConfig, Url};
use queue_core::model::task::{File, Payload};
use queue_core::objects::Objects;
use queue_core::session::Claim;
use serde_json::{Value, json};
use testkit::RedisServer;
use testkit::state::{Piece, Priority};

mod support;

use support::{DB, Program, Ran, hash, store, take_one, until, worker};

const PROGRAM: &str = env!("CARGO_BIN_EXE_drayman");
const CALL: [&str; 7] = ["submit", "--user", "ana", "--app", "bank", "--op", "Pay"];

fn drayman(server: &RedisServer, args: &[&str]) -> Ran {
    Program::new(PROGRAM, server).run(args)
}

fn submit(server: &RedisServer, args: &[&str]) -> Ran {
    drayman(server, &[&CALL[..], args].concat())
}

async fn finish(claim: Claim, fields: Fields) {
    let verdict = Verdict::Final { keep_ms: 600_000 };
    claim.finish(verdict, Duration::from_millis(5), fields, false).await.unwrap();
}

fn done(result: &Value) -> Fields {
    Fields::new().with("status", "done").with("result", result.to_string()).with("result_encoding", "json")
}

#[test]
fn all_that_can_be_said_of_a_task_stands_in_its_hash() {
    let server = RedisServer::start();
    let options = ["--context", r#"{"lang":"de"}"#, "--priority", "low", "--unique", "order=7=1h"];
    let more =
        ["--deadline", "2027-01-31T08:00:00Z", "--tag", "nightly", "--tag", "b", "--max-attempts", "3", "--id", "a"];
    let ran = submit(&server, &[&options[..], &more, &[r#"{ "sum": 1.50 }"#]].concat());
    assert_eq!((ran.code, ran.out.as_str()), (0, "a\n"), "{ran:?}");
    let fields = hash(&server, "a");
    for (name, value) in [
        ("kind", "task"),
        ("app", "bank"),
        ("op", "pay"),
        ("input", r#"{ "sum": 1.50 }"#),
        ("encoding", "json"),
        ("context", r#"{"lang":"de"}"#),
        ("priority", "low"),
        ("unique", "order=7"),
        ("unique_scope", "period"),
        ("unique_ms", "3600000"),
        ("deadline", "1801382400000"),
        ("tags", "nightly,b"),
        ("max_attempts", "3"),
    ] {
        assert_eq!(fields.get(name).map(String::as_str), Some(value), "{name}");
    }
    assert_eq!(server.state(DB).waiting_tasks("ana", "bank.pay", Priority::Low), ["a"]);
    let ran = submit(&server, &["--unique", "order=7=done", "{}"]);
    assert_eq!((ran.code, ran.err.as_str()), (4, "job a holds its unique key\n"));
}

#[test]
fn an_input_is_an_argument_a_file_or_standard_input() {
    let server = RedisServer::start();
    let packed = Payload::msgpack(&json!({ "n": [1, 2] })).unwrap().bytes;
    let file = server.dir().join("input");
    std::fs::write(&file, &packed).unwrap();
    let file = file.to_str().unwrap();
    let program = Program::new(PROGRAM, &server);
    let ran = |id: &str, args: &[&str], stdin: &[u8]| {
        let ran = program.run_with(&[&CALL[..], &["--id", id], args].concat(), stdin);
        assert_eq!(ran.code, 0, "{ran:?}");
        let input = server.state(DB).field_of(Piece::Job(id), "input").unwrap();
        (input, hash(&server, id)["encoding"].clone())
    };
    let as_msgpack = (packed.clone(), "msgpack".to_owned());
    assert_eq!(ran("a", &["--encoding", "msgpack", "--file", file], b""), as_msgpack);
    assert_eq!(ran("b", &["--encoding", "msgpack", "-"], &packed), as_msgpack);
    assert_eq!(ran("c", &["--encoding", "msgpack", r#"{"n":[1,2]}"#], b""), as_msgpack);
    assert_eq!(ran("d", &["-"], b"[1]\n"), (b"[1]\n".to_vec(), "json".into()));
    assert_eq!(ran("e", &[], b""), (b"null".to_vec(), "json".into()), "a handler that needs no input is given none");
}

#[test]
fn what_is_no_task_is_refused_before_anything_is_connected_to() {
    let nowhere = Program::at(PROGRAM, "redis://127.0.0.1:1/5");
    for (args, words) in [
        (&["{"][..], "the input is no json"),
        (&["--encoding", "msgpack", "{"], "the input is no JSON"),
        (&["--encoding", "yaml", "{}"], "no such encoding"),
        (&["--context", "{", "{}"], "the context is no JSON"),
        (&["{}", "{}"], "a task has one input"),
        (&["--database", "app", "{}"], "cannot be used with"),
        (&["--onerror", "x", "{}"], "cannot be used with"),
        (&["--priority", "urgent", "{}"], "no such priority"),
        (&["--unique", "k=until", "{}"], "no such scope"),
        (&["--deadline", "soon", "{}"], "deadline is no time"),
    ] {
        let ran = nowhere.run(&[&CALL[..], args].concat());
        assert!(ran.code == 2 && ran.err.contains(words), "{args:?} {ran:?}");
    }
    let ran = nowhere.run(&["submit", "--user", "ana", "--app", "bank", "{}"]);
    assert!(ran.code == 2 && ran.err.contains("--op"), "{ran:?}");
    // These the library finds.
    let server = RedisServer::start();
    for (args, words) in [(["--unique", "k=999years", "{}"], "is held for"), (["--tag", "a,b", "{}"], "a comma")] {
        let ran = submit(&server, &args);
        assert!(ran.code == 2 && ran.err.contains(words), "{args:?} {ran:?}");
    }
}

#[test]
fn lines_may_be_tasks_and_statements() {
    let server = RedisServer::start();
    let lines = [
        json!({ "id": "t", "app": "bank", "op": "Pay", "input": [1], "tags": ["x"], "unique": "k", "priority": "high" }),
        json!({ "id": "s", "query": "select 1" }),
        json!({ "id": "n", "app": "bank", "op": "pay", "input": null, "encoding": "msgpack" }),
        json!({ "id": "held", "app": "bank", "op": "pay", "unique": "k=queued" }),
        json!({ "id": "both", "app": "bank", "op": "pay", "query": "select 1" }),
        json!({ "id": "lost", "app": "bank" }),
    ];
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let program = Program::new(PROGRAM, &server);
    let ran = program.run_with(&["submit", "--jsonl", "--user", "ana", "--database", "app", "--json"], text.as_bytes());
    assert_eq!(ran.code, 2, "{ran:?}");
    let results: Vec<Value> = ran.json().iter().map(|line| line["result"].clone()).collect();
    assert_eq!(results, ["queued", "queued", "queued", "held", "invalid", "invalid"]);
    assert_eq!((hash(&server, "t")["input"].as_str(), hash(&server, "t")["unique_scope"].as_str()), ("[1]", "done"));
    assert!(!hash(&server, "t").contains_key("database"));
    assert_eq!(hash(&server, "s")["database"], "app");
    assert_eq!(server.state(DB).field_of(Piece::Job("n"), "input").unwrap(), b"\xc0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_is_waited_for_writes_its_result_alone() {
    let server = RedisServer::start();
    let store = store(&server).await;
    let session = worker(&store).await;
    let program = Program::new(PROGRAM, &server);
    let run = async |args: &[&str], fields: Fields| {
        let running = program.start(&[&CALL[..], args, &["--wait", "{}"]].concat());
        until("it is queued", || server.state(DB).waiting_tasks("ana", "bank.pay", Priority::Normal).len() == 1);
        finish(take_one(&store, &session).await, fields).await;
        tokio::task::spawn_blocking(|| running.end()).await.unwrap()
    };
    let ran = run(&["--id", "a"], done(&json!([1, { "x": "y" }]))).await;
    assert_eq!((ran.code, ran.out.as_str()), (0, "[1,{\"x\":\"y\"}]\n"), "{ran:?}");
    assert!(ran.err.ends_with("a done\n"), "{ran:?}");
    let ran = run(&["--id", "b", "--json"], done(&json!(7))).await;
    assert_eq!(ran.json().last(), Some(&json!({ "id": "b", "output": 7 })));
    let ran = run(&["--id", "c"], Fields::new().with("status", "failed").with("failed_reason", "no money")).await;
    assert_eq!((ran.code, ran.out.as_str()), (1, ""), "{ran:?}");
    assert!(ran.err.ends_with("the job is failed: no money\n"), "{ran:?}");
    let ran = run(&["--id", "d"], Fields::new().with("status", "done")).await;
    assert_eq!((ran.code, ran.out.as_str()), (0, ""), "it hands back nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_is_shown_listed_and_its_result_written() {
    let server = RedisServer::start();
    let store = store(&server).await;
    let session = worker(&store).await;
    let url = format!("file://{}/objects", server.dir().display());
    let objects = Objects::open(&ObjectsConfig { url: Url::new(&url), ..ObjectsConfig::default() }).unwrap();
    let program = Program::new(PROGRAM, &server).env("DRAYMAN_OBJECTS__URL", &url);
    submit(&server, &["--id", "small", "--tag", "x", "--unique", "k", "{}"]);
    assert_eq!(program.run(&["result", "small"]).code, 6, "it is not over");
    let claim = take_one(&store, &session).await;
    let told = Fields::new().with("progress", r#"{"done":2,"total":5,"note":"rows"}"#).with("log", "one\ntwo");
    claim.pen().mark(&told).await.unwrap();
    let messages = r#"[{"msgid":7,"errcode":"odd","field":"sum","vals":["a"]}]"#;
    finish(claim, done(&json!({ "a": [1, 2] })).with("messages", messages)).await;

    let ran = program.run(&["status", "small"]);
    for line in [
        "pool          bank.pay",
        "unique key    k",
        "tags          x",
        "progress      2 of 5, rows",
        "message       7 odd sum a",
        "result        {\"a\":[1,2]}",
        "log           one",
        "log           two",
    ] {
        assert!(ran.lines().contains(&line), "{line:?} is not in:\n{}", ran.out);
    }
    let shown = &program.run(&["--json", "status", "small"]).json()[0];
    assert_eq!(shown["result"]["value"], json!({ "a": [1, 2] }));
    assert_eq!(
        (&shown["op"], &shown["progress"]["done"], &shown["log"]),
        (&json!("pay"), &json!(2), &json!(["one", "two"]))
    );
    assert!(shown.get("statements").is_none());

    submit(&server, &["--id", "large", "--tag", "y", "{}"]);
    let claim = take_one(&store, &session).await;
    let job = claim.job().clone();
    let bytes: Vec<u8> = (0..100_000u32).map(|at| at as u8).collect();
    let object = objects.put_result(&job.id, 1, job.fence, bytes.clone()).await.unwrap();
    let file =
        File { object: objects.put_file(&job.id, 1, job.fence, "../r", b"rows".to_vec()).await.unwrap(), bytes: 4 };
    let fields = Fields::new().with("status", "done").with("result_object", object).with("result_encoding", "msgpack");
    finish(claim, fields.with("result_bytes", "100000").with("files", json!({ "../r": file }).to_string())).await;
    assert!(program.run(&["status", "large"]).out.contains("result        100000 bytes, "));

    assert_eq!(program.run(&["result", "small"]).out, r#"{"a":[1,2]}"#, "as it is");
    let output = program.command(&["result", "large"]).output().unwrap();
    assert!(output.status.success() && output.stdout == bytes);
    assert_eq!(program.run(&["result", "large", "--file", "../r"]).out, "rows");
    assert_eq!(program.run(&["result", "large", "--file", "r"]).code, 1);
    assert_eq!(program.run(&["result", "nobody"]).code, 3);
    objects.delete_of(&job.id).await.unwrap();
    assert_eq!(program.run(&["result", "large"]).code, 5);

    let ids = |args: &[&str]| {
        let lines = program.run(&[&["list", "--json"], args].concat()).json();
        lines.iter().map(|line| line["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(ids(&["--tag", "x"]), ["small"]);
    assert_eq!(ids(&["--app", "bank", "--op", "PAY"]), ["large", "small"]);
    assert!(ids(&["--app", "Bank"]).is_empty() && ids(&["--op", "other"]).is_empty());
}
