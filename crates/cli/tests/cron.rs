//! `drayman cron` against a real Redis.

use queue_core::config::Limits;
use queue_core::ids::SessionId;
use queue_core::{leader, schedule};
use serde_json::json;
use std::time::Duration;
use testkit::RedisServer;
use testkit::state::Piece;

mod support;

use support::{DB, Program, Ran, hash, store};

const PROGRAM: &str = env!("CARGO_BIN_EXE_drayman");
const JOB: [&str; 4] = ["--user", "ana", "--database", "app"];

fn cron(server: &RedisServer, args: &[&str]) -> Ran {
    Program::new(PROGRAM, server).run(&[&["cron"], args].concat())
}

fn add(server: &RedisServer, args: &[&str]) -> Ran {
    cron(server, &[&["add"], &JOB[..], args].concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_is_defined_shown_paused_run_and_removed() {
    let server = RedisServer::start();
    let berlin =
        ["nightly", "--cron", "30 2 * * *", "--zone", "Europe/Berlin", "--timeout", "5m", "secret", "select 2"];
    let ran = add(&server, &berlin);
    assert!(ran.code == 0 && ran.out.starts_with("nightly created, next at 20") && ran.err.is_empty(), "{ran:?}");
    let before = server.dump_db(DB);
    let ran = add(&server, &berlin);
    assert!(ran.code == 0 && ran.out.starts_with("nightly was so already, next at 20"), "{ran:?}");
    assert_eq!(server.dump_db(DB), before);
    let ran = add(&server, &["often", "--cron", "*/20 * * * * *", "--missed", "catch-up", "--json", "q"]);
    assert_eq!((ran.code, &ran.json()[0]["result"]), (0, &json!("created")), "{ran:?}");

    let shown = &cron(&server, &["show", "nightly", "--json"]).json()[0];
    assert_eq!(
        (&shown["zone"], &shown["missed"], &shown["grace_ms"], &shown["state"], &shown["misses"]),
        (&json!("Europe/Berlin"), &json!("skip"), &json!(600_000), &json!("active"), &json!(0))
    );
    assert_eq!(shown["job"], json!({ "kind": "sql", "database": "app", "timeout": "300000" }));
    let next: Vec<&str> = shown["next"].as_array().unwrap().iter().map(|tick| tick.as_str().unwrap()).collect();
    // By day a spring morning may come at three.
    assert!(next.len() == 5 && next.iter().all(|tick| tick.contains("T02:30:00+") || tick.contains("T03:00:00+02")));
    let ran = cron(&server, &["show", "nightly"]);
    assert!(ran.code == 0 && !ran.out.contains("secret"), "{ran:?}");
    for line in
        ["cron          30 2 * * *", "missed ticks  skip, none older than 10m", &format!("next          {}", next[4])]
    {
        assert!(ran.lines().contains(&line), "{line}: {ran:?}");
    }
    let ran = cron(&server, &["list"]);
    let lines = ran.lines();
    assert!(lines.len() == 3 && lines[1].contains("often") && lines[2].contains("nightly"), "the one due next first");

    // One at once is the job that submit would make, but for what only the latter knows.
    let ran = cron(&server, &["run", "nightly"]);
    assert_eq!((ran.code, ran.lines().len()), (0, 1), "{ran:?}");
    let id = ran.lines()[0].to_owned();
    assert!(id.starts_with("nightly:"), "{id}");
    let submitted = [&["submit"], &JOB[..], &["--timeout", "5m", "--id", "same", "secret", "select 2"]].concat();
    assert_eq!(Program::new(PROGRAM, &server).run(&submitted).code, 0);
    let without_times = |id: &str| {
        let mut fields = hash(&server, id);
        fields.retain(|name, _| !name.ends_with("_at"));
        fields
    };
    assert_eq!(without_times(&id), without_times("same"));

    for (command, state, next) in [("pause", "paused", "-"), ("pause", "paused", "-"), ("resume", "active", "T0")] {
        let ran = cron(&server, &[command, "nightly"]);
        assert_eq!((ran.code, ran.out.trim()), (0, &*format!("nightly {command}d")), "{ran:?}");
        let ran = cron(&server, &["list"]);
        let line = ran.lines().into_iter().find(|line| line.contains("nightly")).unwrap().to_owned();
        assert!(line.contains(state) && line.contains(next), "{line}");
    }

    // What a leader could not make is told.
    let store = store(&server).await;
    let session = SessionId::new("leader:1:a").unwrap();
    let leadership = leader::hold(&store, &session, Duration::from_secs(60)).await.unwrap().unwrap();
    server.state(DB).move_tick("often", 1_000_000_000_000);
    let limits = Limits { max_queued_per_user: 1.try_into().unwrap(), ..Limits::default() };
    assert!(schedule::tick(&leadership, &limits).await.unwrap().unwrap().more, "the years are passed over");
    let shown = &cron(&server, &["show", "often", "--json"]).json()[0];
    assert!(shown["misses"].as_u64() > Some(1_000), "{shown}");
    assert_eq!(shown["missed_because"], json!("it was paused, or no leader made it in time"));
    server.state(DB).set(Piece::Schedule("nightly"), &[("grace", "99999999999999")]);
    server.state(DB).move_tick("nightly", 1_000_000_000_000);
    schedule::tick(&leadership, &limits).await.unwrap().unwrap();
    let ran = cron(&server, &["show", "nightly"]);
    assert!(ran.out.contains("state         waiting\n"), "{ran:?}");
    assert!(ran.out.contains("waits for     its user has 1 jobs queued, as many as are allowed\n"), "{ran:?}");
    server.state(DB).set(Piece::Schedule("nightly"), &[("zone", "Mars/\u{1b}[31m")]);
    let ran = cron(&server, &["show", "nightly"]);
    assert!(ran.out.contains("unreadable    no IANA time zone") && !ran.out.contains('\u{1b}'), "{ran:?}");
    assert_eq!(cron(&server, &["run", "nightly"]).code, 4);

    assert_eq!(cron(&server, &["remove", "nightly"]).out, "nightly removed\n");
    for command in ["show", "pause", "resume", "remove", "run"] {
        let ran = cron(&server, &[command, "nightly"]);
        assert_eq!((ran.code, ran.err.as_str()), (3, "there is no schedule nightly\n"), "{command}");
    }
    assert_eq!(cron(&server, &["list", "--json"]).json().len(), 1);
}

#[test]
fn what_can_be_no_schedule_is_refused_before_anything_is_stored() {
    let server = RedisServer::start();
    let at_two = ["s", "--cron", "0 2 * * *"];
    for (args, code, words) in [
        (&["s", "--cron", "61 * * * *", "q"][..], 2, "no cron expression: "),
        (&["s", "--cron", "* * *", "q"], 2, "no cron expression: it has 3 fields instead of 5 or 6"),
        (&["s", "--cron", "0 0 31 2 *", "q"], 2, "the expression \"0 0 31 2 *\" matches no time"),
        (&["s", "--cron", "@daily", "--zone", "Berlin", "q"], 2, "no IANA time zone is called \"Berlin\""),
        (&["a:b", "--cron", "@daily", "q"], 2, "schedule name has the character ':'"),
        (&["s", "--cron", "@daily", "--missed", "never", "q"], 2, "by skip or catch-up"),
        (&["s", "--cron", "@daily", "--grace", "long", "q"], 2, "--grace"),
        (&["s", "q"], 2, "--cron"),
        (&at_two, 2, "there is no query"),
        (&["s", "--cron", "@daily", "[1]"], 2, "You must indicate a valid SQL"),
        (&["s", "--cron", "@daily", "--id", "x", "q"], 2, "a recurring job takes no --id"),
        (&["s", "--cron", "@daily", "--delay", "1s", "q"], 2, "a recurring job takes no --delay"),
        (&["s", "--cron", "@daily", "--run-at", "2027-01-01T00:00:00Z", "q"], 2, "a recurring job takes no --run-at"),
        (&["s", "--cron", "@daily", "--wait", "q"], 2, "a recurring job takes no --wait"),
        (&["s", "--cron", "@daily", "--replicas", "1", "q"], 2, "a recurring job takes no --replicas"),
        (&["s", "--cron", "@daily", "--jsonl"], 2, "a recurring job takes no --jsonl"),
        (&["s", "--cron", "@daily", &"x".repeat(20_000)], 4, "its jobs would be too large: "),
    ] {
        let ran = add(&server, args);
        assert!(ran.code == code && ran.err.contains(words) && ran.out.is_empty(), "{words}: {ran:?}");
    }
    let task = ["add", "s", "--cron", "@daily", "--user", "ana", "--app", "shop", "--op", "tidy", "1"];
    let ran = cron(&server, &[&task[..], &["--deadline", "2027-01-01T00:00:00Z"]].concat());
    assert!(ran.code == 2 && ran.err.contains("a recurring job takes no --deadline"), "{ran:?}");
    assert!(!server.state(DB).has(Piece::Schedules) && !server.state(DB).has(Piece::Schedule("s")));
}
