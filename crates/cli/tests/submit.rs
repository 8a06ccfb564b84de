//! `drayman submit` against a real Redis.

use std::io::{Read, Write};
use std::process::Stdio;

use serde_json::{Value, json};
use testkit::{Proxy, RedisServer};

mod support;

use support::{DB, Program, Ran, finish, hash, store, take_one, until, worker};

const PROGRAM: &str = env!("CARGO_BIN_EXE_drayman");

fn submit(server: &RedisServer, args: &[&str]) -> Ran {
    Program::new(PROGRAM, server).run(&[&["submit"], args].concat())
}

fn id(ran: &Ran) -> String {
    assert_eq!((ran.code, ran.err.as_str(), ran.lines().len()), (0, "", 1), "{ran:?}");
    ran.out.trim().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_form_becomes_its_job() {
    let server = RedisServer::start();
    let store = store(&server).await;
    let session = worker(&store).await;
    let base = ["--user", "ana", "--database", "app"];
    let file = server.dir().join("query.sql");
    std::fs::write(&file, "select 'file'").unwrap();
    let file = file.to_str().unwrap();

    type Case<'a> = (Vec<&'a str>, Vec<(&'static str, &'a str)>);
    let cases: Vec<Case> = vec![
        (vec!["select 1"], vec![("query", "select 1")]),
        (vec!["select 1", "select 2"], vec![("query", r#"["select 1","select 2"]"#)]),
        (vec![r#"{"query":[{"query":"q"}]}"#], vec![("query", r#"{"query":[{"query":"q"}]}"#)]),
        (vec!["--onsuccess", "s", "q"], vec![("onsuccess", "s"), ("fallback_status", "pending")]),
        (vec!["--onerror", "e", "q"], vec![("onerror", "e")]),
        (vec!["--timeout", "5m", "--max-attempts", "3", "q"], vec![("timeout", "300000"), ("max_attempts", "3")]),
        (
            vec!["--backoff", "fixed", "--retry-delay", "2s", "--retry-delay-max", "1m", "--retry-on", "53,23505", "q"],
            vec![("backoff", "fixed"), ("retry_delay", "2000"), ("retry_delay_max", "60000"), ("retry_on", "53 23505")],
        ),
        (vec!["--idempotent", "--run-at", "2020-01-01T00:00:00Z", "q"], vec![("idempotent", "1")]),
        (vec!["--file", file], vec![("query", "select 'file'")]),
        (vec!["--id", "mine", "q"], vec![("query", "q")]),
    ];
    for (args, fields) in cases {
        let id = id(&submit(&server, &[&base[..], &args].concat()));
        let claim = take_one(&store, &session).await;
        assert_eq!((claim.job().id.as_str(), claim.job().pool.as_str()), (id.as_str(), "db:app"));
        for (field, value) in fields {
            assert_eq!(claim.job().text(field).unwrap(), Some(value), "{args:?}");
        }
        finish(claim, "done").await;
    }

    let ran =
        Program::new(PROGRAM, &server).run_with(&["submit", "--user", "ana", "--database", "app", "-"], b"select 'in'");
    assert_eq!(hash(&server, &id(&ran))["query"], "select 'in'");
}

#[test]
fn a_connection_takes_its_password_from_a_file_or_a_variable() {
    let server = RedisServer::start();
    let file = server.dir().join("pass");
    std::fs::write(&file, "from file\n").unwrap();
    let args = ["--user", "ana", "--host", "127.0.0.1", "--port", "5433", "--dbname", "d", "--dbuser", "r"];
    let ran = submit(&server, &[&args[..], &["--pass-file", file.to_str().unwrap(), "q"]].concat());
    let fields = hash(&server, &id(&ran));
    assert_eq!(
        (fields["pass"].as_str(), fields["port"].as_str(), fields["host"].as_str()),
        ("from file", "5433", "127.0.0.1")
    );
    let program = Program::new(PROGRAM, &server).env("DRAYMAN_PASS", "from variable");
    let ran = program.run(&[&["submit"], &args[..], &["q"]].concat());
    assert_eq!(hash(&server, &id(&ran))["pass"], "from variable");
}

#[test]
fn what_is_refused_is_refused_in_the_librarys_words() {
    let server = RedisServer::start();
    let base = ["--user", "ana", "--database", "app"];
    let ran = submit(&server, &[&base[..], &[&"x".repeat(20_000)]].concat());
    assert_eq!(ran.code, 4);
    assert_eq!(ran.err, "Your payload is too large: 20006 bytes. Max size allowed is 16384 bytes\n");
    let most = "{\"query\":\"q\"}\n".repeat(64);
    let ran = Program::new(PROGRAM, &server).run_with(&[&["submit", "--jsonl"], &base[..]].concat(), most.as_bytes());
    assert_eq!(ran.code, 0, "{ran:?}");
    let ran = submit(&server, &[&base[..], &["q"]].concat());
    assert_eq!((ran.code, ran.err.as_str()), (4, "Failed to create job. Max number of jobs (64) queued reached\n"));

    for (args, words) in [
        (&["--user", "ana", "--database", "app", " "][..], "You must indicate a valid SQL"),
        (&["--user", "ana", "--database", "app", "[1]"], "You must indicate a valid SQL: entry 0"),
        (&["--user", "ana", "--database", "app"], "there is no query"),
        (&["--user", "ana", "q"], "database or host is missing"),
        (&["--database", "app", "q"], "user is missing"),
        (&["--user", "ana", "--database", "app", "--timeout", "5 parsecs", "q"], "timeout is no duration"),
        (&["--user", "ana", "--database", "app", "--id", "a b", "q"], "job id has the character"),
        (&["--user", "ana", "--database", "app", "--host", "h", "q"], "cannot be used with"),
    ] {
        let ran = submit(&server, args);
        assert!(ran.code == 2 && ran.err.contains(words), "{args:?} {ran:?}");
    }
}

#[test]
fn the_same_id_again_changes_nothing() {
    let server = RedisServer::start();
    let args = ["--user", "ana", "--database", "app", "--id", "mine", "q"];
    id(&submit(&server, &args));
    let before = server.dump_db(DB);
    let ran = submit(&server, &args);
    assert_eq!((ran.code, ran.out.as_str()), (0, "mine\n"));
    assert!(ran.err.contains("was there already"), "{ran:?}");
    assert_eq!(server.dump_db(DB), before);
}

#[test]
fn many_jobs_come_as_lines() {
    let server = RedisServer::start();
    let mut lines = String::new();
    for at in 0..250 {
        lines +=
            &format!("{}\n", json!({ "user": format!("user-{}", at % 5), "query": "q", "id": format!("job-{at}") }));
    }
    lines += "\n{\"user\": \"marker\n";
    lines += &format!("{}\n", json!({ "user": "ana", "query": [], "id": "empty" }));
    lines += &format!("{}\n", json!({ "query": "q", "id": "ownerless" }));
    lines += &json!({ "user": "ana", "query": ["a", { "query": "b" }], "host": "h", "dbname": "d", "dbuser": "r", "delay": "1h" }).to_string();
    let ran = Program::new(PROGRAM, &server)
        .run_with(&["submit", "--jsonl", "--database", "app", "--json"], lines.as_bytes());
    assert_eq!(ran.code, 2, "{}", ran.err);
    let results = ran.json();
    assert_eq!(results.len(), 254);
    assert!(results.iter().take(250).all(|result| result["result"] == "queued"));
    let faults: Vec<&Value> =
        results.iter().filter(|result| result["result"] == "invalid").map(|result| &result["line"]).collect();
    assert_eq!(faults.len(), 3);
    for line in [252, 253, 254] {
        assert!(faults.contains(&&json!(line)), "{faults:?}");
    }
    assert!(!ran.out.contains("marker"));
    assert_eq!(hash(&server, "job-249")["user"], "user-4");
    let last = results.iter().rev().find(|result| result["result"] == "queued").unwrap();
    assert_eq!(hash(&server, last["id"].as_str().unwrap())["status"], "scheduled");
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_tells_how_it_ended() {
    let server = RedisServer::start();
    let store = store(&server).await;
    let session = worker(&store).await;
    for (status, code) in [("done", 0), ("failed", 1), ("cancelled", 1)] {
        let program = Program::new(PROGRAM, &server);
        let running = program.start(&["submit", "--user", "ana", "--database", "app", "--id", status, "--wait", "q"]);
        until("it is queued", || server.state(DB).waiting("ana").len() == 1);
        finish(take_one(&store, &session).await, status).await;
        let ran = tokio::task::spawn_blocking(|| running.end()).await.unwrap();
        assert_eq!((ran.code, ran.out.trim()), (code, status));
        assert!(ran.err.ends_with(&format!("{status} {status}\n")), "{ran:?}");
    }
    let ran = submit(&server, &["--user", "ana", "--database", "app", "--wait=200ms", "q"]);
    assert_eq!(ran.code, 6, "{ran:?}");
}

#[test]
fn a_lost_answer_is_told_as_unknown() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.addr());
    let url = proxy.redis_url(DB);
    let program = Program::at(PROGRAM, &url).env("DRAYMAN_REDIS__COMMAND_TIMEOUT", "1s");
    let mut child = program.command(&["submit", "--jsonl", "--database", "app"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut pipe = child.stdin.take().unwrap();
    let mut line = |id: &str| writeln!(pipe, "{}", json!({ "user": "ana", "query": "q", "id": id })).unwrap();
    line("first");
    // Its id is written when the answer has come: no sooner may answers be lost.
    let mut told = [0; 6];
    child.stdout.as_mut().unwrap().read_exact(&mut told).unwrap();
    assert_eq!(&told, b"first\n");
    proxy.drop_replies(true);
    line("second");
    until("the second is there", || !hash(&server, "second").is_empty());
    drop(pipe);
    let ran = support::Running(child).end();
    assert_eq!((ran.code, ran.out.as_str()), (5, ""), "{ran:?}");
    assert!(ran.err.contains("line 2: whether job second was queued is unknown: "), "{ran:?}");
    assert!(ran.err.contains("ask with `drayman status second`"), "{ran:?}");
    assert!(ran.err.contains("stopped after line 2"), "{ran:?}");
}

#[test]
fn without_redis_it_says_so() {
    let program = Program::at(PROGRAM, "redis://:marker@127.0.0.1:1/5");
    let ran = program.run(&["submit", "--user", "ana", "--database", "app", "q"]);
    assert_eq!(ran.code, 5, "{ran:?}");
    assert!(ran.err.starts_with("redis does not answer") && !ran.err.contains("marker"), "{ran:?}");
}

#[test]
fn another_version_of_the_keys_is_refused() {
    let server = RedisServer::start();
    server.state(DB).set_version("9.1");
    let ran = submit(&server, &["--user", "ana", "--database", "app", "q"]);
    assert_eq!(
        (ran.code, ran.err.as_str()),
        (2, "the keys on this server are of protocol version 9.1, this program speaks 1.0\n")
    );
}

#[test]
fn replicas_that_are_to_confirm_are_counted_and_too_few_have_a_code_of_their_own() {
    let server = RedisServer::with_config(&[("repl-diskless-sync-delay", "0")]);
    let base = ["--user", "ana", "--database", "app", "--replicas", "1"];
    let ran = submit(&server, &[&base[..], &["--replicas-timeout", "100ms", "--id", "lonely", "q"]].concat());
    assert_eq!((ran.code, ran.out.as_str()), (7, "lonely\n"));
    assert_eq!(ran.err, "job lonely is queued, but confirmed by 0 of 1 replicas only\n");
    assert_eq!(hash(&server, "lonely")["status"], "pending");

    let of = format!("127.0.0.1 {}", server.addr().port());
    let replica = RedisServer::with_config(&[("replicaof", &of)]);
    let args = [&base[..], &["--replicas-timeout", "30s", "--json", "--id", "kept", "q"]].concat();
    // The first to ask waits until the replica has begun to follow.
    let ran = submit(&server, &args);
    let expected = json!({ "id": "kept", "result": "queued", "replicas": { "confirmed": 1, "wanted": 1 } });
    assert_eq!((ran.code, ran.json()), (0, vec![expected]));
    assert_eq!(hash(&replica, "kept")["status"], "pending");
    let ran = submit(&server, &args);
    assert_eq!(ran.json()[0]["result"], "already_there");
    assert_eq!(ran.json()[0]["replicas"]["confirmed"], 1);

    let ran = submit(&server, &["--user", "ana", "--database", "app", "--replicas-timeout", "1s", "q"]);
    assert_eq!(ran.code, 2, "how long to wait for nobody");
}
