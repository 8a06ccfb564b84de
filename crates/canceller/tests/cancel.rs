//! `drayman-canceller` against a real Redis, with a worker made of its session.

use std::io::Read;

use queue_core::session::Session;
use serde_json::Value;
use testkit::RedisServer;
use testkit::state::Piece;

#[path = "../../cli/tests/support/mod.rs"]
mod support;

use support::{DB, Program, Ran, finish, hash, push, store, take_one, worker};

const PROGRAM: &str = env!("CARGO_BIN_EXE_drayman-canceller");

fn program(server: &RedisServer) -> Program {
    Program::new(PROGRAM, server)
}

/// One job on a database of its own name, waiting.
fn submit(server: &RedisServer, id: &str, user: &str) {
    push(
        server,
        id,
        user,
        &[("query", "select 'marker'"), ("database", "app"), ("created_at", "2024-01-01T00:00:00.000Z")],
    );
}

/// The worker has been asked to cancel something.
async fn is_asked(session: &Session) {
    testkit::eventually("the worker is asked to cancel", async || {
        let queue_core::calls::Beat::Alive { cancels, .. } = session.beat().await.unwrap() else { panic!("lost") };
        (!cancels.is_empty()).then_some(())
    })
    .await;
}

async fn blocking(work: impl FnOnce() -> Ran + Send + 'static) -> Ran {
    tokio::task::spawn_blocking(work).await.unwrap()
}

#[test]
fn a_waiting_job_is_cancelled_at_once() {
    let server = RedisServer::start();
    submit(&server, "a", "ana");
    let ran = program(&server).run(&["a"]);
    assert_eq!((ran.code, ran.out.as_str()), (0, "a  cancelled at once\n"), "{ran:?}");
    assert_eq!(hash(&server, "a")["status"], "cancelled");
    assert!(!server.state(DB).has(Piece::Queue("ana")));

    let again = program(&server).run(&["a", "--json"]);
    assert_eq!(again.code, 1);
    assert_eq!((&again.json()[0]["result"], &again.json()[0]["status"]), (&"too_late".into(), &"cancelled".into()));
}

#[test]
fn statements_of_a_waiting_job_say_so_too() {
    let server = RedisServer::start();
    push(&server, "a", "ana", &[("query", r#"["select 1","select 2"]"#), ("host", "h")]);
    assert_eq!(program(&server).run(&["a"]).code, 0);
    let query: Value = serde_json::from_str(&hash(&server, "a")["query"]).unwrap();
    assert_eq!(query[0]["status"], "cancelled");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_job_is_confirmed_by_its_record() {
    for (status, code, words) in [("cancelled", 0, "cancelled while running"), ("done", 1, "too late: done")] {
        let server = RedisServer::start();
        let store = store(&server).await;
        let session = worker(&store).await;
        submit(&server, "a", "ana");
        let claim = take_one(&store, &session).await;
        let running = program(&server).start(&["a"]);
        is_asked(&session).await;
        // The job may have come to its end in the same moment: its record says which of them was first.
        finish(claim, status).await;
        let ran = blocking(|| running.end()).await;
        assert_eq!((ran.code, ran.out), (code, format!("a  {words}\n")));
        assert_eq!(hash(&server, "a")["status"], status);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_messages_only_cost_time() {
    let server = RedisServer::start();
    let store = store(&server).await;
    let session = worker(&store).await;
    submit(&server, "a", "ana");
    let claim = take_one(&store, &session).await;
    let running = program(&server).start(&["a", "--wait", "10m"]);
    is_asked(&session).await;
    server.raw(&["CLIENT", "KILL", "TYPE", "pubsub"]);
    finish(claim, "cancelled").await;
    let ran = blocking(|| running.end()).await;
    assert_eq!((ran.code, ran.out.as_str()), (0, "a  cancelled while running\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_worker_is_gone_is_cancelled_in_its_queue() {
    let server = RedisServer::start();
    let store = store(&server).await;
    let session = worker(&store).await;
    submit(&server, "a", "ana");
    let claim = take_one(&store, &session).await;
    let running = program(&server).start(&["a", "--wait", "10m"]);
    is_asked(&session).await;
    session.close().await.unwrap();
    let ran = blocking(|| running.end()).await;
    assert_eq!((ran.code, ran.out.as_str()), (0, "a  cancelled while running\n"));
    assert_eq!(hash(&server, "a")["status"], "cancelled");
    drop(claim);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_end_in_time_is_told() {
    let server = RedisServer::start();
    let store = store(&server).await;
    let session = worker(&store).await;
    submit(&server, "a", "ana");
    let claim = take_one(&store, &session).await;
    submit(&server, "b", "ana");
    let ran = program(&server).run(&["a", "b", "--wait", "300ms", "--json"]);
    assert_eq!(ran.code, 4, "{ran:?}");
    let results: Vec<Value> = ran.json().iter().map(|line| line["result"].clone()).collect();
    assert_eq!(results, ["cancelled", "unconfirmed"]);
    assert!(hash(&server, "a").contains_key("cancel_requested_at"));

    let ran = program(&server).run(&["a", "--wait", "0s"]);
    assert_eq!((ran.code, ran.out.as_str()), (0, "a  asked to stop, not waited for\n"));

    let running = program(&server).start(&["a", "--wait", "2s"]);
    is_asked(&session).await;
    server.kill();
    assert_eq!(blocking(|| running.end()).await.code, 5);
    drop(claim);
}

#[test]
fn ids_that_are_not_found_are_named() {
    let server = RedisServer::start();
    submit(&server, "a", "ana");
    let ran = program(&server).run(&["x"]);
    assert_eq!((ran.code, ran.err.as_str()), (3, "Job with id x not found\n"));
    let ran = program(&server).run(&["x", "a", "--json"]);
    assert_eq!((ran.code, ran.json()[1]["result"].clone()), (1, "not_found".into()));
    assert_eq!(program(&server).run(&["--user", "nobody", "--yes"]).code, 3);
}

#[test]
fn a_dry_run_lists_and_changes_nothing() {
    let server = RedisServer::start();
    submit(&server, "a", "ana");
    submit(&server, "b", "bo");
    let before = server.dump_db(DB);
    let ran = program(&server).run(&["--user", "ana", "--dry-run"]);
    assert_eq!(ran.code, 0);
    assert!(ran.out.starts_with("a  ana  db:app  pending  submitted ") && ran.lines().len() == 1, "{ran:?}");
    let ran = program(&server).run(&["b", "x", "--dry-run", "--json"]);
    assert_eq!((ran.code, ran.json()[0]["result"].clone()), (1, "would_cancel".into()));
    assert_eq!(program(&server).run(&["--all", "--dry-run"]).lines().len(), 2);
    assert_eq!(server.dump_db(DB), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn selectors_combine() {
    let server = RedisServer::start();
    let store = store(&server).await;
    let session = worker(&store).await;
    submit(&server, "runs", "ana");
    let claim = take_one(&store, &session).await;
    submit(&server, "old", "ana");
    push(&server, "elsewhere", "ana", &[("query", "q"), ("host", "h"), ("created_at", "2024-01-01T00:00:00Z")]);
    push(&server, "ageless", "ana", &[("query", "q"), ("database", "app")]);
    push(&server, "new", "ana", &[("query", "q"), ("database", "app"), ("created_at", "2999-01-01T00:00:00.000Z")]);
    submit(&server, "hers", "bo");

    let select = |args: &[&str]| {
        let ran = program(&server).run(&[args, &["--dry-run", "--json"]].concat());
        let mut ids: Vec<String> = ran.json().iter().map(|line| line["id"].as_str().unwrap().into()).collect();
        ids.sort();
        ids.join(" ")
    };
    assert_eq!(select(&["--all"]), "ageless elsewhere hers new old runs");
    assert_eq!(select(&["--user", "ana", "--pool", "db:app"]), "ageless new old runs");
    assert_eq!(select(&["--user", "ana", "--pool", "db:app", "--status", "pending"]), "ageless new old");
    assert_eq!(select(&["--user", "ana", "--pool", "db:app", "--status", "pending", "--older-than", "10m"]), "old");
    assert_eq!(select(&["--pool", "sql:h"]), "elsewhere");
    assert_eq!(select(&["--status", "running"]), "runs");
    assert_eq!(select(&["old", "hers", "--user", "bo"]), "hers");

    let ran = program(&server).run(&[
        "--user",
        "ana",
        "--pool",
        "db:app",
        "--status",
        "pending",
        "--older-than",
        "10m",
        "--yes",
    ]);
    assert_eq!((ran.code, ran.out.as_str()), (0, "old  cancelled at once\n"));
    finish(claim, "done").await;
}

#[test]
fn a_mass_cancel_asks_and_without_a_terminal_refuses() {
    let server = RedisServer::start();
    submit(&server, "a", "ana");
    for args in [&["--all"][..], &["--user", "ana"], &["--older-than", "1s"]] {
        let ran = program(&server).run(args);
        assert_eq!(ran.code, 2, "{ran:?}");
        assert!(ran.err.contains("1 jobs are selected; without a terminal this needs --yes"), "{ran:?}");
    }
    assert_eq!(program(&server).run(&[]).code, 2);
    assert_eq!(program(&server).run(&["--yes"]).code, 2);
    assert_eq!(program(&server).run(&["--all", "--user", "ana", "--yes"]).code, 2);
    assert_eq!(hash(&server, "a")["status"], "pending");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mass_cancel_misses_nothing() {
    let server = RedisServer::start();
    let state = server.state(DB);
    // More than a page, in a queue that no index names, and a queue that shrinks while it is read.
    for (user, count) in [("long", 2_300), ("short", 900)] {
        let ids: Vec<String> = (0..count).map(|at| format!("{user}-{at}")).collect();
        state.foreign().submit_many(user, &ids, &[("query", "q"), ("host", "h")]);
    }
    // What others leave lying about.
    state.spoil(Piece::Queue("broken"));
    for id in [&b"\xff\xfe"[..], b"a b", b"no-hash"] {
        state.foreign().push("odd", id);
    }
    state.spoil(Piece::Job("no-hash"));
    state.set(Piece::Job("big"), &[("user", "odd"), ("host", "h"), ("query", "x".repeat(10 << 20).as_str())]);
    state.foreign().push("odd", "big");
    let store = store(&server).await;
    let session = worker(&store).await;
    submit(&server, "due", "ana");
    state.foreign().pull("ana", "due");
    state.set_field("due", "status", "scheduled");
    state.schedule_job("due", 9_999_999_999_999);

    let ran = program(&server).run(&["--all", "--yes", "--json"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let mut ids: Vec<String> = ran.json().iter().map(|line| line["id"].as_str().unwrap().into()).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 2_300 + 900 + 2);
    assert!(ids.iter().all(|id| state.status(id).unwrap() == "cancelled"));
    assert!(session.take(10).await.unwrap().unwrap().claims.is_empty());
}

#[test]
fn a_reader_that_goes_does_not_stop_the_work() {
    let server = RedisServer::start();
    (0..500).for_each(|at| submit(&server, &format!("job-{at}"), "ana"));
    let mut running = program(&server).start(&["--all", "--yes"]);
    let mut first = [0; 4];
    running.0.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let ran = running.end();
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    assert_eq!(hash(&server, "job-0")["status"], "cancelled");
    assert_eq!(hash(&server, "job-499")["status"], "cancelled");
}

#[test]
fn without_redis_it_says_so() {
    let ran = Program::at(PROGRAM, "redis://127.0.0.1:1/5").run(&["a"]);
    assert_eq!(ran.code, 5, "{ran:?}");
    let ran = Program::at(PROGRAM, "nonsense").run(&["a"]);
    assert_eq!(ran.code, 2, "{ran:?}");
    let ran = Program::at(PROGRAM, "redis://:marker@127.0.0.1:1/5").run(&["a"]);
    assert!(!ran.err.contains("marker"), "{ran:?}");
}

#[test]
fn help_tells_the_exit_codes() {
    let ran = Program::at(PROGRAM, "nonsense").run(&["--help"]);
    assert!(ran.code == 0 && ran.out.contains("4  some jobs were not confirmed"), "{ran:?}");
}
