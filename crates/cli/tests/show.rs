//! `drayman status`, `list` and `watch` against a real Redis.

use std::time::Duration;

use queue_core::calls::{Fields, Verdict};
use serde_json::Value;
use testkit::RedisServer;
use testkit::state::Piece;

mod support;

use support::{DB, Program, Ran, finish, hash, push, store, take_one, until, worker};

const PROGRAM: &str = env!("CARGO_BIN_EXE_drayman");

fn drayman(server: &RedisServer, args: &[&str]) -> Ran {
    Program::new(PROGRAM, server).run(args)
}

const CONNECTION: &[(&str, &str)] = &[
    ("host", "127.0.0.1"),
    ("port", "7777"),
    ("dbname", "marker_db"),
    ("dbuser", "marker_role"),
    ("pass", "marker_pass"),
];

#[test]
fn status_shows_everything_but_secrets() {
    let server = RedisServer::start();
    let query = r#"{"query":[
        {"query":"select 'marker_sql'","id":"first","status":"done","started_at":"2024-01-01T00:00:01.000Z",
         "ended_at":"2024-01-01T00:00:02.000Z"},
        {"query":"select 'marker_sql'","onerror":"insert 'marker_sql'","status":"failed","fallback_status":"done",
         "failed_reason":"no such \u001b[31mtable"}],
        "onsuccess":"select 'marker_sql'"}"#;
    let fields = [
        ("status", "failed"),
        ("query", query),
        ("fallback_status", "skipped"),
        ("failed_reason", "no such table"),
        ("created_at", "2024-01-01T00:00:00.000Z"),
        ("started_at", "2024-01-01T00:00:01.000Z"),
        ("ended_at", "2024-01-01T00:01:03.500Z"),
        ("worker", "host:1:abc"),
        ("results", r#"{"0":{"tag":"UPDATE 3","notices":["NOTICE: hello"]},"1.onerror":{"tag":"INSERT 0 1"}}"#),
    ];
    push(&server, "a", "ana", &[CONNECTION, &fields].concat());

    let ran = drayman(&server, &["status", "a"]);
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    for line in [
        "user          ana",
        "pool          sql:127.0.0.1",
        "status        failed",
        "fallback      skipped",
        "reason        no such table",
        "submitted     2024-01-01T00:00:00.000Z",
        "waited        1s",
        "ran           1m 2s",
        "worker        host:1:abc",
        "statement 0   done, id first, started 2024-01-01T00:00:01.000Z, ended 2024-01-01T00:00:02.000Z",
        "                result: UPDATE 3; NOTICE: hello",
        "statement 1   failed, fallback done, reason: no such \u{fffd}[31mtable",
        "                onerror: INSERT 0 1",
    ] {
        assert!(ran.lines().contains(&line), "{line:?} is not in:\n{}", ran.out);
    }
    let json = drayman(&server, &["--json", "status", "a"]);
    let value = &json.json()[0];
    assert_eq!(value["statements"][1]["fallback_status"], "done");
    assert_eq!(value["results"]["0"]["tag"], "UPDATE 3");
    for shown in [&ran.out, &json.out] {
        assert!(!shown.contains("marker") && !shown.contains("7777"), "{shown}");
    }

    for args in [&["status", "a", "--show-query"][..], &["status", "a", "--show-query", "--json"]] {
        let ran = drayman(&server, args);
        assert!(ran.out.contains("marker_sql"), "{ran:?}");
        for secret in ["marker_pass", "marker_role", "marker_db", "7777"] {
            assert!(!ran.out.contains(secret), "{ran:?}");
        }
    }
}

#[test]
fn a_job_that_is_none_is_not_found() {
    let server = RedisServer::start();
    push(&server, "a", "ana", CONNECTION);
    server.state(DB).spoil(Piece::Job("text"));
    let ran = drayman(&server, &["status", "x", "a", "text"]);
    assert_eq!((ran.code, ran.err.as_str()), (3, "Job with id x not found\nJob with id text not found\n"));
    assert!(ran.out.contains("status        pending"), "{ran:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn whether_a_job_runs_is_told_by_its_claim() {
    let server = RedisServer::start();
    let store = store(&server).await;
    let session = worker(&store).await;
    push(&server, "a", "ana", &[CONNECTION, &[("query", "q"), ("status", "running")]].concat());
    let status = || drayman(&server, &["status", "a", "--json"]).json()[0]["status"].clone();
    assert_eq!(status(), "pending");
    let claim = take_one(&store, &session).await;
    assert_eq!(status(), "running");
    finish(claim, "done").await;
    assert_eq!(status(), "done");
}

#[tokio::test(flavor = "multi_thread")]
async fn list_filters() {
    let server = RedisServer::start();
    let store = store(&server).await;
    let session = worker(&store).await;
    let fields: &[(&str, &str)] =
        &[("query", "marker"), ("database", "app"), ("created_at", "2024-01-01T00:00:00.000Z")];
    push(&server, "over", "ana", fields);
    finish(take_one(&store, &session).await, "done").await;
    push(&server, "runs", "ana", fields);
    let claim = take_one(&store, &session).await;
    push(&server, "waits", "ana", fields);
    push(&server, "hers", "bo", &[("query", "q"), ("host", "h")]);

    let ids = |args: &[&str]| {
        let ran = drayman(&server, &[&["list", "--json"], args].concat());
        assert_eq!(ran.code, 0);
        let mut ids: Vec<String> = ran.json().iter().map(|job| job["id"].as_str().unwrap().to_owned()).collect();
        ids.sort();
        ids.join(" ")
    };
    assert_eq!(ids(&[]), "hers over runs waits");
    assert_eq!(ids(&["--user", "ana"]), "over runs waits");
    assert_eq!(ids(&["--status", "running"]), "runs");
    assert_eq!(ids(&["--status", "pending"]), "hers waits");
    assert_eq!(ids(&["--status", "done"]), "over");
    assert_eq!(ids(&["--pool", "sql:h"]), "hers");
    assert_eq!(ids(&["--user", "bo", "--pool", "db:app"]), "");

    let ran = drayman(&server, &["list", "--limit", "2"]);
    assert_eq!(ran.err, "there are more than 2: see --limit\n");
    let words: Vec<Vec<&str>> = ran.out.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(words.len(), 3, "{}", ran.out);
    assert_eq!(words[0], ["ID", "KIND", "USER", "POOL", "STATUS", "WAITED", "RAN"]);
    assert_eq!(words[1][..5], ["runs", "sql", "ana", "db:app", "running"]);
    assert!(!ran.out.contains("marker"));
    finish(claim, "done").await;
}

#[test]
fn a_long_list_is_read_in_pages() {
    let server = RedisServer::start();
    let state = server.state(DB);
    let ids: Vec<String> = (0..2_500).map(|at| at.to_string()).collect();
    state.foreign().submit_many("ana", &ids, &[("host", "h")]);
    state.foreign().index("ana");
    let ran = drayman(&server, &["list", "--limit", "5000", "--json"]);
    let listed = ran.json();
    assert_eq!(listed.len(), 2_500);
    // In the order in which they will run.
    assert!(listed.iter().enumerate().all(|(at, job)| job["id"].as_str() == Some(&at.to_string())));
}

#[test]
fn what_others_wrote_hurts_nobody() {
    let server = RedisServer::start();
    let state = server.state(DB);
    for piece in [Piece::Claims, Piece::Scheduled, Piece::Finished, Piece::Queue("set"), Piece::Rejected] {
        state.spoil(piece);
    }
    for user in ["set", "odd", "none"] {
        state.foreign().index(user);
    }
    let big = "x".repeat(10 << 20);
    state.set(
        Piece::Job("big"),
        &[("user", "odd"), ("query", big.as_str()), ("host", &big), ("created_at", "yesterday")],
    );
    let bytes: [(&str, &[u8]); 3] = [("user", b"odd"), ("host", b"\xff\xfe\x1b[2J"), ("query", b"\xff")];
    state.set(Piece::Job("bytes"), &bytes);
    state.set(Piece::Job("nested"), &[("user", "odd"), ("query", "[".repeat(100_000).as_str()), ("status", "no such")]);
    for id in [&b"\xff"[..], b"a b", b"", b"big", b"bytes", b"nested", b"missing"] {
        state.foreign().push("odd", id);
    }
    let ran = drayman(&server, &["list"]);
    assert_eq!((ran.code, ran.lines().len()), (0, 4), "{ran:?}");
    assert!(!ran.out.contains('\x1b') && ran.out.len() < 2_000);
    for id in ["big", "bytes", "nested"] {
        let ran = drayman(&server, &["status", id, "--show-query"]);
        assert_eq!(ran.code, 0, "{ran:?}");
    }
    let ran = drayman(&server, &["status", "big"]);
    assert!(ran.out.contains("query         is 10485760 bytes long, too long for a job"), "{}", ran.out);
    assert_eq!(drayman(&server, &["list", "--rejected"]).code, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_set_aside_is_listed_with_its_reason() {
    let server = RedisServer::start();
    let store = store(&server).await;
    let session = worker(&store).await;
    server.state(DB).set(Piece::Job("theirs"), &[("user", "bo"), ("host", "h"), ("query", "q")]);
    server.state(DB).foreign().push("ana", "theirs");
    server.state(DB).foreign().push("ana", "a b");
    store.notice(&[b"ana".to_vec()]).await.unwrap();
    assert!(session.take(1).await.unwrap().unwrap().claims.is_empty());

    let ran = drayman(&server, &["list", "--rejected", "--json"]);
    let mut reasons: Vec<(String, String)> = ran
        .json()
        .iter()
        .map(|entry| {
            let text = |name: &str| entry[name].as_str().unwrap().to_owned();
            assert_eq!(text("user"), "ana");
            (text("id"), text("reason"))
        })
        .collect();
    reasons.sort();
    assert_eq!(reasons[0].0, "a b");
    assert_eq!(reasons[1], ("theirs".into(), "it belongs to another user than its queue".into()));
    let ran = drayman(&server, &["list", "--rejected", "--user", "ana", "--limit", "1"]);
    assert_eq!(ran.lines().len(), 2);
    assert_eq!(drayman(&server, &["list", "--rejected", "--user", "bo"]).lines().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_shows_each_move_and_ends_with_the_last() {
    let server = RedisServer::start();
    let store = store(&server).await;
    let session = worker(&store).await;
    let fields: &[(&str, &str)] = &[("query", "q"), ("database", "app")];
    push(&server, "a", "ana", fields);
    push(&server, "b", "bo", fields);
    let mut running = Program::new(PROGRAM, &server).start(&["watch", "a", "b", "--json"]);
    until("it listens", || server.state(DB).listeners("ana") == 1);
    store.notice(&[b"ana".to_vec(), b"bo".to_vec()]).await.unwrap();
    let mut claims = session.take(2).await.unwrap().unwrap().claims;
    claims.sort_by_key(|claim| claim.job().id.clone());
    let (a, b) = (claims.remove(0), claims.remove(0));
    a.finish(Verdict::Next, Duration::ZERO, Fields::new(), false).await.unwrap();
    finish(take_one(&store, &session).await, "done").await;
    assert!(!running.has_ended());
    finish(b, "failed").await;
    let ran = tokio::task::spawn_blocking(|| running.end()).await.unwrap();
    assert_eq!(ran.code, 1, "{ran:?}");
    let moves = |id: &str| {
        let moves = ran.json().into_iter().filter(|line| line["id"] == id).map(|line| line["status"].clone());
        moves.collect::<Vec<Value>>()
    };
    assert_eq!(moves("a"), ["pending", "running", "pending", "running", "done"]);
    assert_eq!(moves("b"), ["pending", "running", "failed"]);

    assert_eq!(drayman(&server, &["watch", "a"]).code, 0);
    let ran = drayman(&server, &["watch", "a", "x"]);
    assert_eq!((ran.code, ran.err.as_str()), (3, "Job with id x not found\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_needs_no_events() {
    let server = RedisServer::start();
    // Nothing may be listened to: all that is left is looking.
    server.raw(&["ACL", "SETUSER", "deaf", "on", ">pw", "~*", "+@all", "resetchannels"]);
    let store = store(&server).await;
    let session = worker(&store).await;
    push(&server, "a", "ana", &[("query", "q"), ("database", "app")]);
    let url = server.url_db(DB).replace("//", "//deaf:pw@");
    let claim = take_one(&store, &session).await;
    let watching = Program::at(PROGRAM, &url).daemon(&["watch", "a"]);
    watching.wait_for_line("a  ana  running");
    // Its second look comes at once. From here on only the watcher asks anything of Redis.
    let before = server.function_calls();
    until("it looks again and again", || server.function_calls() >= before + 2);
    finish(claim, "done").await;
    assert_eq!(watching.wait().code(), Some(0), "{}", watching.output());
    assert!(watching.output().ends_with("a  ana  done"), "{}", watching.output());
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_lives_through_a_short_outage() {
    let server = RedisServer::start();
    let store = store(&server).await;
    let session = worker(&store).await;
    push(&server, "a", "ana", &[("query", "q"), ("database", "app")]);
    let claim = take_one(&store, &session).await;
    let program = Program::new(PROGRAM, &server).env("DRAYMAN_REDIS__COMMAND_TIMEOUT", "500ms");
    let watching = program.daemon(&["watch", "a"]);
    until("it listens", || server.state(DB).listeners("ana") == 1);
    server.pause();
    watching.wait_for_line("still trying");
    server.resume();
    finish(claim, "done").await;
    assert_eq!(watching.wait().code(), Some(0), "{}", watching.output());
    assert_eq!(hash(&server, "a")["status"], "done");
}

#[test]
fn watch_of_a_user_goes_on_until_nobody_reads() {
    let server = RedisServer::start();
    let mut running = Program::new(PROGRAM, &server).start(&["watch", "--user", "ana"]);
    until("it listens", || server.state(DB).listeners("ana") == 1);
    server.state(DB).publish_event("bo", "b", "running");
    server.state(DB).publish_event("ana", "a", "running");
    let mut line = String::new();
    let out = running.0.stdout.take().unwrap();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).unwrap();
    assert!(line.ends_with("a  ana  running\n"), "{line}");
    until("it has ended", || {
        server.state(DB).publish_event("ana", "a", "done");
        running.has_ended()
    });
    let ran = running.end();
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
}

#[test]
fn help_tells_the_exit_codes() {
    for args in [&["--help"][..], &["submit", "--help"], &["watch", "--help"]] {
        let ran = Program::at(PROGRAM, "nonsense").run(args);
        assert!(ran.code == 0 && ran.out.contains("4  refused: too many jobs"), "{ran:?}");
    }
}
