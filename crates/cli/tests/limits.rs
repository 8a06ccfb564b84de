//! `drayman limits`, `pause`, `resume` and `list --unserved` against a real Redis.

use queue_core::ids::SessionId;
use testkit::RedisServer;
use testkit::state::Piece;

mod support;

use support::{DB, Program, Ran, finish, hash, push, store, take_one, worker, worker_of};

const PROGRAM: &str = env!("CARGO_BIN_EXE_drayman");

fn drayman(server: &RedisServer, args: &[&str]) -> Ran {
    Program::new(PROGRAM, server).run(args)
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_are_set_shown_and_cleared() {
    let server = RedisServer::start();
    let store = store(&server).await;
    let session = worker(&store).await;
    let ran = drayman(&server, &["limits"]);
    assert_eq!((ran.code, ran.out.as_str(), ran.err.as_str()), (0, "", ""));
    let args = "limits --user ana --rate 1/1h --concurrency 4 --weight 2 --timeout 10m";
    let ran = drayman(&server, &args.split(' ').collect::<Vec<_>>());
    assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{ran:?}");
    let limits = server.state(DB).fields(Piece::Limits("ana"));
    let limits: Vec<_> = limits.iter().map(|(name, value)| format!("{name} {value}")).collect();
    assert_eq!(limits, ["concurrency 4", "period 3600000", "rate 1", "timeout 600000", "weight 2"]);
    for id in ["a", "b"] {
        push(&server, id, "ana", &[("host", "h")]);
    }
    finish(take_one(&store, &session).await, "done").await;
    assert!(session.take(4).await.unwrap().unwrap().claims.is_empty());
    drayman(&server, &["limits", "--pool", "sql:h", "--per-user", "2", "--rate", "none"]);
    let ran = drayman(&server, &["limits"]);
    let cells: Vec<Vec<&str>> = ran.lines().iter().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(cells[1][..10], ["user", "ana", "2", "0", "of", "4", "1", "of", "1", "in"], "{ran:?}");
    assert!(ran.lines()[1].contains("may start the next at 20"), "{ran:?}");
    assert_eq!(cells[2][..6], ["pool", "sql:h", "1", "0", "-", "-"], "{ran:?}");
    let json = drayman(&server, &["limits", "--json"]).json();
    assert_eq!((json[0]["rate"].as_u64(), json[0]["starts"].as_u64()), (Some(1), Some(1)), "{json:?}");
    assert_eq!((json[0]["kept_by"].as_str(), json[1]["per_user"].as_u64()), (Some("rate"), Some(2)), "{json:?}");

    assert_eq!(drayman(&server, &["limits", "--user", "ana", "--clear"]).code, 0);
    finish(take_one(&store, &session).await, "done").await;
    drayman(&server, &["limits", "--pool", "sql:h", "--per-user", "none"]);
    assert_eq!(drayman(&server, &["limits"]).out, "");

    for wrong in [
        "--rate 5",
        "--user ana --rate 0/1s",
        "--user ana --concurrency 0",
        "--user ana --weight nan",
        "--user ana --per-user 1",
        "--pool sql:h --timeout 1s",
        "--user ana --pool sql:h",
        "--user ana --clear --weight 1",
    ] {
        let ran = drayman(&server, &[&["limits"], &wrong.split(' ').collect::<Vec<_>>()[..]].concat());
        assert_eq!(ran.code, 2, "{wrong}: {ran:?}");
    }
    server.state(DB).spoil(Piece::Limits("ana"));
    let ran = drayman(&server, &["limits", "--user", "ana", "--weight", "2"]);
    assert_eq!((ran.code, ran.err.contains("holds a string")), (4, true), "{ran:?}");
    let ran = drayman(&server, &["limits"]);
    assert!(ran.code == 0 && ran.err.contains("counts for nothing"), "{ran:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_paused_starts_when_it_is_resumed_and_is_told_until_then() {
    let server = RedisServer::start();
    let store = store(&server).await;
    let session = worker(&store).await;
    for (number, target) in [&["--user", "ana"][..], &["--pool", "sql:h"], &["--all"]].into_iter().enumerate() {
        let id = format!("j{number}");
        push(&server, &id, "ana", &[("host", "h")]);
        let ran = drayman(&server, &[&["pause"], target, &["--reason", "the disk is full"]].concat());
        assert_eq!((ran.code, ran.out.contains("the disk is full")), (0, true), "{ran:?}");
        store.notice(&[b"ana".to_vec()]).await.unwrap();
        assert!(session.take(4).await.unwrap().unwrap().claims.is_empty(), "{target:?}");
        let warned = |text: &str| text.contains("paused since 20") && text.contains(": the disk is full");
        let ran = drayman(&server, &["doctor"]);
        assert!(ran.lines().iter().any(|line| line.starts_with("warning ") && warned(line)), "{ran:?}");
        assert_eq!(ran.code, 0, "a pause is no disagreement: {ran:?}");
        let ran = drayman(&server, &[&["resume"], target].concat());
        assert_eq!((ran.code, ran.out.as_str()), (0, ""), "{ran:?}");
        finish(take_one(&store, &session).await, "done").await;
        assert_eq!(hash(&server, &id)["status"], "done");
    }
    for wrong in
        [&["pause"][..], &["pause", "--user", "a", "--all"], &["resume"], &["pause", "--all", "--reason", "a\nb"]]
    {
        assert_eq!(drayman(&server, wrong).code, 2, "{wrong:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_pools_that_nobody_serves_is_listed() {
    let server = RedisServer::start();
    let store = store(&server).await;
    let session = worker_of(&store, &["sql:*", "db:*"]).await;
    let task = [("kind", "task"), ("app", "Bank"), ("op", "Pay"), ("created_at", "2024-01-01T00:00:00.000Z")];
    for (id, user) in [("t1", "ana"), ("t2", "ana"), ("t3", "bo")] {
        push(&server, id, user, &task);
    }
    push(&server, "odd", "\x1b[31m", &task);
    push(&server, "s1", "cyd", &[("host", "h")]);
    let unserved = |args: &[&str]| drayman(&server, &[&["list", "--unserved"], args].concat());
    // Noticed or not: the tasks still stand in the lists of foreign producers.
    for noticed in [false, true] {
        let mut rows = unserved(&["--json"]).json();
        rows.retain(|row| row["user"] == "ana" || row["user"] == "bo");
        rows.sort_by_key(|row| row["user"].to_string());
        assert_eq!(rows.len(), 2, "{rows:?}");
        assert_eq!((&rows[0]["pool"], &rows[0]["jobs"]), (&"Bank.pay".into(), &2.into()), "{noticed}");
        assert!(rows[1]["oldest_waited_ms"].as_u64().unwrap() > 86_400_000);
        assert!(!unserved(&[]).out.contains("cyd") && !unserved(&[]).out.contains('\x1b'));
        store.notice(&[b"ana".to_vec(), b"bo".to_vec(), b"cyd".to_vec()]).await.unwrap();
    }
    assert_eq!(unserved(&["--user", "bo"]).lines().len(), 2, "one and the header");
    assert_eq!(unserved(&["--pool", "sql:h"]).lines().len(), 1);
    // The case of an operation does not matter, here as little as anywhere.
    assert_eq!(unserved(&["--pool", "Bank.PAY", "--user", "bo"]).lines().len(), 2);
    drayman(&server, &["limits", "--pool", "Bank.PAY", "--concurrency", "3"]);
    assert_eq!(server.state(DB).fields(Piece::Pool("Bank.pay"))["concurrency"], "3");
    let overview = drayman(&server, &["doctor", "--json"]).json()[0]["overview"].clone();
    let pool =
        &overview["unserved"].as_array().unwrap().iter().find(|pool| pool["pool"] == "Bank.pay").unwrap().clone();
    assert!(pool["jobs"].as_u64() >= Some(3) && pool["users"].as_u64() >= Some(2), "{overview}");
    let warnings = overview["warnings"].to_string();
    assert!(warnings.contains("wait for pool Bank.pay, which no worker serves"), "{warnings}");

    // Somebody who serves it, and then is silent.
    let id = SessionId::generate("test", 2);
    store.session_open(&id, "Bank.*", "test", 2, &[]).await.unwrap();
    assert_eq!(unserved(&["--user", "ana"]).lines().len(), 1);
    server.state(DB).set(Piece::Session(id.as_str()), &[("beat_at", "2024-01-01T00:00:00.000Z")]);
    assert_eq!(unserved(&["--user", "ana"]).lines().len(), 2);
    // What is gone or of another type is nothing that waits.
    server.state(DB).spoil(Piece::Queue("bad"));
    server.state(DB).lose(Piece::Job("t3"));
    assert_eq!(unserved(&["--user", "bo"]).lines().len(), 1);
    store.session_close(session.id()).await.unwrap();
    assert!(unserved(&[]).out.contains("sql:h"), "nobody is left");
}
