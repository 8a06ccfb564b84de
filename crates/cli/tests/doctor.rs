//! `drayman doctor` against a real Redis.

use queue_core::leader;
use testkit::RedisServer;
use testkit::state::Piece;

mod support;

use support::{DB, Program, Ran, finish, hash, push, store, take_one, worker};

const PROGRAM: &str = env!("CARGO_BIN_EXE_drayman");

fn doctor(server: &RedisServer, args: &[&str]) -> Ran {
    Program::new(PROGRAM, server).run(&[&["doctor"], args].concat())
}

/// The values that `--json` wrote under a name.
fn values(ran: &Ran, name: &str) -> Vec<serde_json::Value> {
    ran.json().iter().filter(|line| !line[name].is_null()).map(|line| line[name].clone()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_healthy_system_is_shown_and_found_healthy() {
    let server = RedisServer::with_config(&[("appendonly", "yes"), ("maxmemory", "100mb")]);
    let store = store(&server).await;
    let session = worker(&store).await;
    leader::hold(&store, session.id(), std::time::Duration::from_secs(60)).await.unwrap().unwrap();
    push(&server, "a", "ana", &[("host", "h"), ("created_at", "2024-01-01T00:00:00.000Z"), ("pass", "marker")]);
    let claim = take_one(&store, &session).await;
    push(&server, "b", "ana", &[("host", "h"), ("created_at", "2024-01-01T00:00:00.000Z")]);
    session.beat().await.unwrap();
    let before = server.dump_db(DB);
    let ran = doctor(&server, &[]);
    assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{ran:?}");
    for text in [
        "server        Redis ",
        "maxmemory-policy noeviction",
        "durability    appendonly yes, appendfsync everysec, replicas 0",
        "leader        test:1:",
        "session       test:1:",
        "serves *, holds 1",
        "1 queued, 1 running, 0 scheduled, 0 ended",
        "oldest        b of ana, waits for ",
        "pool          sql:h, 1 running, 0 users ready",
        "keys          all agree",
    ] {
        assert!(ran.out.replace("Valkey", "Redis").contains(text), "{text:?} is not in:\n{}", ran.out);
    }
    assert!(!ran.out.contains("marker") && !ran.out.contains("warning"), "{}", ran.out);
    let ran = doctor(&server, &["--json"]);
    let overview = &values(&ran, "overview")[0];
    assert_eq!((ran.code, overview["jobs"]["running"].as_u64()), (0, Some(1)));
    assert_eq!((overview["warnings"].as_array().unwrap().len(), values(&ran, "finding").len()), (0, 0), "{overview}");
    assert_eq!(doctor(&server, &["--repair"]).code, 0);
    assert_eq!(server.dump_db(DB), before);
    finish(claim, "done").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_disagrees_is_found_and_repaired_if_asked() {
    let server = RedisServer::start();
    let store = store(&server).await;
    let session = worker(&store).await;
    push(&server, "a", "ana", &[("host", "h")]);
    let claim = take_one(&store, &session).await;
    server.state(DB).lose(Piece::Session(session.id().as_str()));
    let odd = server.state(DB).put_unknown("odd\x1b[31m");
    let before = server.dump_db(DB);
    let ran = doctor(&server, &[]);
    assert_eq!((ran.code, server.dump_db(DB) == before), (8, true), "{ran:?}");
    for text in [
        "claim-orphaned a: ",
        "[--repair]",
        &format!("unknown-key {}: ", odd.replace('\x1b', "\u{fffd}")),
        "disagreements",
    ] {
        assert!(ran.out.contains(text), "{text:?} is not in:\n{}", ran.out);
    }
    let ran = doctor(&server, &["--repair", "--json"]);
    let findings = values(&ran, "finding");
    let fate =
        |kind: &str| findings.iter().find(|finding| finding["kind"] == kind).map(|finding| finding["fate"].clone());
    assert_eq!(fate("claim-orphaned").unwrap(), "repaired");
    assert_eq!((ran.code, fate("unknown-key").unwrap()), (8, "reported".into()), "one is left to the operator");
    assert_eq!(hash(&server, "a")["status"], "pending");
    server.state(DB).lose_unknown("odd\x1b[31m");
    assert_eq!(doctor(&server, &[]).code, 0);
    drop(claim);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_should_not_stay_is_a_warning() {
    let server = RedisServer::with_config(&[("appendonly", "no"), ("maxmemory-policy", "allkeys-lru")]);
    let store = store(&server).await;
    push(&server, "a", "ana", &[("host", "h")]);
    store.notice(&[b"ana".to_vec()]).await.unwrap();
    server.state(DB).set(Piece::Pool("sql:far"), &[("blocked", "a foreign worker schedules this host")]);
    let ran = doctor(&server, &[]);
    for text in [
        "maxmemory-policy is not noeviction",
        "appendonly is no",
        "nobody leads",
        "1 jobs of 1 users wait for pool sql:h, which no worker serves",
        "takes from pool sql:far pause: a foreign worker schedules this host",
    ] {
        assert!(
            ran.lines().iter().any(|line| line.starts_with("warning ") && line.contains(text)),
            "{text}: {}",
            ran.out
        );
    }
    assert_eq!(ran.code, 0, "keys agree");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_may_only_read_sees_what_it_may() {
    let server = RedisServer::start();
    let store = store(&server).await;
    let session = worker(&store).await;
    push(&server, "a", "ana", &[("host", "h")]);
    let claim = take_one(&store, &session).await;
    let as_user = |name: &str, rights: &[&str]| {
        server.raw(&[&["ACL", "SETUSER", name, "on", ">secret", "~*", "&*"], rights].concat());
        let url = server.url_db(DB).replace("redis://", &format!("redis://{name}:secret@"));
        Program::at(PROGRAM, &url)
    };
    // All that it needs.
    let full = ["+@read", "+@connection", "+fcall_ro", "+info", "+time", "+config|get"];
    let ran = as_user("looker", &full).run(&["doctor"]);
    assert_eq!((ran.code, ran.out.contains("not seen"), ran.out.contains("all agree")), (0, false, true), "{ran:?}");
    let ran = as_user("looker", &full).run(&["doctor", "--repair"]);
    assert_eq!(ran.code, 5, "{ran:?}");
    // Nothing but reading.
    let ran = as_user("reader", &["+@read", "+@connection"]).run(&["doctor"]);
    assert_eq!(ran.code, 5, "{ran:?}");
    assert!(ran.out.contains("not seen      version, memory and replicas"), "{ran:?}");
    assert!(ran.out.contains("not seen      whether keys agree"), "{ran:?}");
    assert!(ran.out.contains("0 queued, 1 running") && ran.out.contains("session       test:1:"), "{ran:?}");
    drop(claim);
}
