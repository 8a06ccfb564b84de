//! `drayman retry` against a real Redis.

use testkit::RedisServer;

mod support;

use support::{DB, Program, Ran, finish, hash, push, store, take_one, worker};

const PROGRAM: &str = env!("CARGO_BIN_EXE_drayman");

fn drayman(server: &RedisServer, args: &[&str]) -> Ran {
    Program::new(PROGRAM, server).run(args)
}

const NAMED: &[(&str, &str)] = &[("status", "pending"), ("query", "select 1"), ("database", "app")];
const CARRIED: &[(&str, &str)] = &[("status", "pending"), ("query", "select 1"), ("host", "h"), ("pass", "old")];

#[tokio::test(flavor = "multi_thread")]
async fn what_failed_is_run_anew_by_name_or_by_selection() {
    let server = RedisServer::start();
    let store = store(&server).await;
    for (user, id, fields, end) in [
        ("ana", "a1", NAMED, "failed"),
        ("ana", "a2", NAMED, "done"),
        ("ana", "a3", NAMED, "ignored"),
        ("ana", "a4", NAMED, "unknown"),
        ("bob", "b1", NAMED, "failed"),
        ("bob", "b2", CARRIED, "failed"),
    ] {
        let session = worker(&store).await;
        push(&server, id, user, fields);
        finish(take_one(&store, &session).await, end).await;
        session.close().await.unwrap();
    }
    let status = |id: &str| hash(&server, id)["status"].clone();

    let ran = drayman(&server, &["retry", "--user", "ana"]);
    assert_eq!((ran.code, ran.lines()), (0, vec!["a1", "a3"]), "{ran:?}");
    assert_eq!(["a1", "a2", "a3", "a4", "b1"].map(status), ["pending", "done", "pending", "unknown", "failed"]);

    let ran = drayman(&server, &["retry", "a1", "a2", "nobody", "b2", "a4"]);
    assert_eq!((ran.code, ran.lines()), (4, vec!["a4"]), "{ran:?}");
    for line in [
        "a1: it has not ended: it is pending",
        "a2: all of it is done; --from-start repeats it",
        "nobody: Job with id nobody not found",
        "b2: its password was removed when it ended: say it in DRAYMAN_PASS",
    ] {
        assert!(ran.err.lines().any(|found| found == line), "{line}: {ran:?}");
    }
    let ran = Program::new(PROGRAM, &server).env("DRAYMAN_PASS", "new").run(&["retry", "--status", "failed", "--json"]);
    let mut results: Vec<String> = ran.json().iter().map(|line| format!("{} {}", line["id"], line["result"])).collect();
    results.sort();
    assert_eq!(results, [r#""b1" "queued""#, r#""b2" "queued""#]);
    assert_eq!(hash(&server, "b2")["pass"], "new");
    assert_eq!(drayman(&server, &["retry", "--from-start", "a2"]).code, 0);
    assert_eq!(status("a2"), "pending");
    assert_eq!(drayman(&server, &["retry", "nobody"]).code, 3);
    for wrong in
        [&["retry"][..], &["retry", "a1", "--user", "ana"], &["retry", "--status", "running"], &["retry", "a b"]]
    {
        assert_eq!(drayman(&server, wrong).code, 2, "{wrong:?}");
    }
    assert_eq!(server.state(DB).waiting("ana").len(), 4);
}
