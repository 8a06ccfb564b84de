//! The daemon as a process: its flags and exit codes, what it tells systemd, how it stops and what it does when Redis comes
//! and goes.

mod support;

use std::path::PathBuf;
use std::time::Duration;

use queue_core::inspect::JobView;
use support::house::{Gate, House};
use support::*;
use testkit::state::Piece;
use testkit::{Daemon, NotifySocket, Proxy, RedisServer, Scratch, Signal, bin, eventually, eventually_blocking};

const ENDLESS: &str = "SELECT pg_sleep(600)";

/// The program with these flags and nothing else, until it ends: its exit code and its output.
fn run(flags: &[&str], env: &[(&str, &str)]) -> (Option<i32>, String) {
    let daemon = Daemon::spawn(bin("drayman-worker"), flags, env);
    let status = daemon.wait();
    (status.code(), daemon.output())
}

fn file(folder: &Scratch, text: &str) -> PathBuf {
    let path = folder.path().join("worker.toml");
    std::fs::write(&path, text).expect("a file in a folder of ours");
    path
}

fn stop(daemon: &Daemon) {
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.output());
}

/// Waits until so many takes more have failed, after one that has. The daemon logs at `debug`.
async fn takes_fail(daemon: &Daemon, more: usize) {
    let failed = || daemon.lines().iter().filter(|line| line.contains("a take has failed again")).count();
    let before = failed();
    eventually("takes fail", async || (failed() >= before + more).then_some(()).ok_or_else(failed)).await;
}

/// Waits until a queue holds exactly these ids, the head last.
async fn queue_is(house: &House, user: &str, ids: &[&str]) {
    eventually(&format!("the queue of {user} to be {ids:?}"), async || {
        (house.state().waiting(user).iter().rev().eq(ids)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_any_configuration_it_serves_databases_on_loopback() {
    let house = House::build().await;
    let daemon = Daemon::spawn(bin("drayman-worker"), &["--redis-url", &house.redis.url_db(DB)], &[]);
    house.goes_on("plain").await;
    house.job("elsewhere", "SELECT 1").with("host", "192.0.2.1").push();
    let view = house.ended("elsewhere").await;
    assert_eq!(view.status(), "failed");
    assert_eq!(
        view.text("failed_reason").unwrap(),
        "database host '192.0.2.1' is not allowed by this worker (sql.allowed_hosts)"
    );
    stop(&daemon);
}

#[test]
fn a_configuration_is_checked_without_a_server_and_refused_by_name() {
    let folder = Scratch::new("config");
    let ok = file(&folder, "[redis]\nurl = 'redis://127.0.0.1:1/5'\n[worker]\nslots = 3");
    let (code, output) = run(&["--config", ok.to_str().unwrap(), "--check-config"], &[]);
    assert_eq!((code, output.as_str()), (Some(0), "the configuration can be used"));

    for (text, env, refusal) in [
        ("[worker]\nslotz = 3", ("A", "b"), "unknown key worker.slotz in "),
        ("[woker]\nslots = 3", ("A", "b"), "unknown key woker in "),
        ("[worker]\nscan_interval = 5", ("A", "b"), "worker.scan_interval has an invalid type"),
        ("", ("DRAYMAN_WORKER__SLOTZ", "3"), "unknown key worker.slotz in DRAYMAN_WORKER__SLOTZ"),
        ("", ("DRAYMAN_REDIS_URL", "redis://h"), "unknown key redis_url in DRAYMAN_REDIS_URL"),
        ("[databases.x]\nkind = 'sqlite'\npath = 'relative'", ("A", "b"), "databases.x.path: must be absolute"),
        ("not toml", ("A", "b"), "is not TOML"),
    ] {
        let path = file(&folder, text);
        for flags in [&["--check-config"][..], &[]] {
            let flags = [&["--config", path.to_str().unwrap()], flags].concat();
            let (code, output) = run(&flags, &[env]);
            assert_eq!(code, Some(2), "{text}: {output}");
            assert!(output.starts_with("drayman-worker: ") && output.contains(refusal), "{text}: {output}");
        }
    }
    let (code, output) = run(&["--config", "/nonexistent/worker.toml"], &[]);
    assert_eq!(code, Some(2));
    assert!(output.contains("cannot read /nonexistent/worker.toml"), "{output}");
    let (code, output) = run(&["--slots", "3"], &[]);
    assert_eq!(code, Some(2));
    assert!(output.contains("--slots"), "{output}");
}

#[test]
fn the_configuration_that_applies_is_printed_without_secrets() {
    let folder = Scratch::new("config");
    let path = file(&folder, "[redis]\nurl = 'redis://ann:marker@h:1/2'\n[worker]\nslots = 3\nname = 'from the file'");
    let flags = ["--config", path.to_str().unwrap(), "--print-config"];
    let (code, output) = run(&flags, &[("DRAYMAN_WORKER__NAME", "from a variable")]);
    assert_eq!(code, Some(0));
    assert!(!output.contains("marker"), "{output}");
    for line in ["url = \"redis://ann:***@h:1/2\"", "slots = 3", "name = \"from a variable\""] {
        assert!(output.lines().any(|printed| printed == line), "{line} in {output}");
    }
    let flags = [&flags[..], &["--redis-url", "redis://flag:1/2"]].concat();
    assert!(run(&flags, &[]).1.contains("url = \"redis://flag:1/2\""));
}

#[test]
fn a_redis_that_cannot_be_used_ends_it_with_a_clear_message() {
    let (code, output) = run(&["--redis-url", "redis://127.0.0.1:1/5"], &[]);
    assert_eq!(code, Some(1));
    assert!(output.contains("cannot connect to redis://127.0.0.1:1/5: redis does not answer"), "{output}");

    let redis = RedisServer::with_config(&[("requirepass", "right")]);
    let wrong = redis.url_db(DB).replace("redis://", "redis://:wrong@");
    let (code, output) = run(&["--redis-url", &wrong], &[]);
    assert_eq!(code, Some(1));
    assert!(output.contains("cannot connect to redis://:***@") && !output.contains("wrong@"), "{output}");

    let redis = RedisServer::start();
    redis.state(DB).set_version("99.0");
    let (code, output) = run(&["--redis-url", &redis.url_db(DB)], &[]);
    assert_eq!(code, Some(1));
    assert!(output.contains("protocol version 99.0"), "{output}");

    // One that accepts connections and never answers.
    redis.pause();
    let timeouts = [("DRAYMAN_REDIS__CONNECT_TIMEOUT", "1s"), ("DRAYMAN_REDIS__COMMAND_TIMEOUT", "1s")];
    let (code, output) = run(&["--redis-url", &redis.url_db(DB)], &timeouts);
    assert_eq!(code, Some(1));
    assert!(output.contains("cannot connect to redis://127.0.0.1:"), "{output}");
}

#[tokio::test(flavor = "multi_thread")]
async fn systemd_is_told_that_it_is_ready_how_busy_it_is_and_that_it_stops() {
    let house = House::build().await;
    let systemd = NotifySocket::new();
    let daemon = house.daemon(&[("NOTIFY_SOCKET", systemd.path()), ("DRAYMAN_WORKER__SLOTS", "2")]);
    systemd.wait_for("READY=1");
    assert_eq!(systemd.count("STOPPING=1"), 0);
    house.job("busy", ENDLESS).push();
    systemd.wait_for("STATUS=1 of 2 slots busy");
    house.cancel("busy").await;
    systemd.wait_for("STATUS=0 of 2 slots busy");
    stop(&daemon);
    assert_eq!((systemd.count("READY=1"), systemd.count("STOPPING=1")), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_watchdog_is_fed_by_takes_that_are_answered_and_by_nothing_else() {
    let house = House::build().await;
    let systemd = NotifySocket::new();
    let settings = [
        ("NOTIFY_SOCKET", systemd.path()),
        ("DRAYMAN_WORKER__SLOTS", "1"),
        ("DRAYMAN_WORKER__SESSION_LIFETIME", "60s"),
        ("DRAYMAN_REDIS__COMMAND_TIMEOUT", "1s"),
        ("DRAYMAN_LOG__LEVEL", "worker=debug,info"),
    ];
    let daemon = house.daemon(&settings);
    let fed = async |why: &str| {
        let before = systemd.count("WATCHDOG=1");
        eventually(why, async || (systemd.count("WATCHDOG=1") >= before + 2).then_some(())).await;
    };
    fed("the watchdog to be fed while it is idle").await;
    house.job("long", ENDLESS).push();
    house.executing("long", "pg_sleep").await;
    fed("the watchdog to be fed while all slots are busy").await;

    house.redis.pause();
    daemon.wait_for_line("nothing can be taken");
    systemd.catch_up();
    let silent = systemd.count("WATCHDOG=1");
    // Several takes more, each of which would feed it if it were the trying that counts.
    takes_fail(&daemon, 2).await;
    systemd.catch_up();
    assert_eq!(systemd.count("WATCHDOG=1"), silent);
    house.redis.resume();
    fed("the watchdog to be fed again").await;

    daemon.signal(Signal::SIGTERM);
    systemd.wait_for("STOPPING=1");
    fed("the watchdog to be fed while it drains").await;
    house.cancel("long").await;
    assert_eq!(daemon.wait().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn told_to_stop_it_ends_what_is_short_and_gives_back_what_is_long_to_the_front() {
    let house = House::build().await;
    let gate = house.gate().await;
    let first = house.daemon(&[("DRAYMAN_WORKER__DRAIN_GRACE", "2s")]);
    house.job("short", &format!("INSERT INTO effects SELECT 'short' FROM {}", Gate::PASS)).of("bob").push();
    let long = house.gate_2().await;
    house.job("long", &format!("INSERT INTO effects SELECT 'long' FROM {}", Gate::PASS_2)).push();
    house.executing("short", "4711").await;
    house.executing("long", "4712").await;
    house.job("later", "INSERT INTO effects VALUES ('later')").push();
    first.signal(Signal::SIGTERM);
    first.wait_for_line("stopping");
    house.job("unseen", "SELECT 1").of("cem").push();
    gate.open().await;
    assert_eq!(house.ended("short").await.status(), "done");
    assert_eq!(first.wait().code(), Some(0), "{}", first.output());

    // Cancelled in the database, waiting again, and before what was behind it.
    assert_eq!(house.backends().await, 0);
    queue_is(&house, "ann", &["later", "long"]).await;
    queue_is(&house, "cem", &["unseen"]).await;
    let view = house.inspect.job("long").await.unwrap().unwrap();
    assert_eq!((view.status().as_str(), view.text("unclean")), ("pending", None));
    assert_eq!((house.claims(), house.state().sessions().len()), (0, 0));
    assert_eq!(house.all_effects().await, ["short"]);

    let _second = house.daemon(&[]);
    house.executing("long", "4712").await;
    long.open().await;
    for id in ["long", "later", "unseen"] {
        assert_eq!(house.ended(id).await.status(), "done", "{id}");
    }
    assert_eq!(house.all_effects().await, ["short", "long", "later"]);
}

/// The scan interval is an hour: whoever goes on learns by a message that there is room.
#[tokio::test(flavor = "multi_thread")]
async fn what_ends_while_it_stops_makes_room_for_others() {
    let house = House::build().await;
    let gate = house.gate().await;
    let settings = [
        ("DRAYMAN_WORKER__SCAN_INTERVAL", "1h"),
        ("DRAYMAN_WORKER__DRAIN_GRACE", "10m"),
        ("DRAYMAN_CAPACITY__DEFAULT", "1"),
    ];
    let first = house.daemon(&settings);
    let query =
        format!(r#"["INSERT INTO effects SELECT 'one' FROM {}", "INSERT INTO effects VALUES ('two')"]"#, Gate::PASS);
    house.job("chain", &query).push();
    house.executing("chain", "4711").await;
    let _second = house.daemon(&settings);
    eventually("the second to be parked", async || (house.state().parked("sql:*") >= 1).then_some(())).await;
    first.signal(Signal::SIGTERM);
    first.wait_for_line("stopping");
    gate.open().await;
    assert_eq!(first.wait().code(), Some(0), "{}", first.output());
    let view = eventually("the other to go on", async || {
        house.inspect.job("chain").await.expect("redis answers").filter(JobView::is_over)
    })
    .await;
    assert_eq!(view.status(), "done");
    assert_eq!(house.all_effects().await, ["one", "two"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn told_twice_it_gives_back_at_once() {
    let house = House::build().await;
    let daemon = house.daemon(&[("DRAYMAN_WORKER__DRAIN_GRACE", "10m")]);
    house.job("long", ENDLESS).push();
    house.executing("long", "pg_sleep").await;
    daemon.signal(Signal::SIGTERM);
    daemon.wait_for_line("told to stop: draining");
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.output());
    queue_is(&house, "ann", &["long"]).await;
    assert_eq!(house.backends().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn told_to_stop_while_redis_is_gone_it_ends_all_the_same() {
    let house = House::build().await;
    let proxy = Proxy::start(house.redis.addr());
    let gate = house.gate().await;
    let settings = [("DRAYMAN_WORKER__DRAIN_GRACE", "1s"), ("DRAYMAN_REDIS__COMMAND_TIMEOUT", "1s")];
    let first = daemon(&proxy.redis_url(DB), &settings);
    let query = format!("INSERT INTO effects SELECT 'unrecorded' FROM {}", Gate::PASS);
    house.job("unrecorded", &query).push();
    // Its backend waits before it has written: it is given back, but Redis can't hear that.
    house.executing("unrecorded", "4711").await;
    proxy.refuse(true);
    proxy.cut();
    first.wait_for_line("nothing can be taken");
    first.signal(Signal::SIGTERM);
    assert_eq!(first.wait().code(), Some(0), "{}", first.output());
    gate.open().await;
    let _second = house.daemon(&[]);
    assert_eq!(house.ended("unrecorded").await.status(), "done");
    assert_eq!(house.effects("unrecorded").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_changes_log_level_capacities_and_timeouts_and_nothing_breaks_it() {
    let house = House::build().await;
    let folder = Scratch::new("config");
    let text = |level: &str, capacity: u32, timeout: &str| {
        format!(
            "[log]\nlevel = '{level}'\nformat = 'json'\n[capacity]\ndefault = {capacity}\n[sql]\nstatement_timeout = '{timeout}'"
        )
    };
    let path = file(&folder, &text("error", 1, "1h"));
    let flags = ["--config", path.to_str().unwrap(), "--redis-url", &house.redis.url_db(DB)];
    // Only what the reload itself brings about can start the second job.
    let daemon = Daemon::spawn(bin("drayman-worker"), &flags, &[("DRAYMAN_WORKER__SCAN_INTERVAL", "1h")]);
    house.job("one", ENDLESS).of("bob").push();
    house.executing("one", "pg_sleep").await;
    house.job("two", ENDLESS).push();
    assert_eq!(house.inspect.job("two").await.unwrap().unwrap().status(), "pending");
    assert_eq!(daemon.output(), "", "nothing has gone wrong so far");

    file(&folder, "[log]\nlevel = 'loud'");
    daemon.signal(Signal::SIGHUP);
    daemon.wait_for_line("nothing changes");

    file(&folder, &text("info", 2, "1s"));
    daemon.signal(Signal::SIGHUP);
    let view = house.ended("two").await;
    assert_eq!(view.text("failed_reason").as_deref(), Some("canceling statement due to statement timeout"));
    assert_eq!(house.inspect.job("one").await.unwrap().unwrap().status(), "running");

    // A pool's own number: back to one place, which is taken.
    let (host, _) = house.postgres.host_port();
    file(&folder, &format!("{}\n[capacity.pools]\n'sql:{host}' = 1", text("info", 2, "1h")));
    daemon.signal(Signal::SIGHUP);
    let capacity = || house.state().field_of(Piece::Pool(&format!("sql:{host}")), "capacity");
    eventually("the capacity", async || capacity().map(drop)).await;
    house.job("three", "SELECT 1").push();
    house.job("four", "SELECT 1").of("bob").push();
    house.cancel("one").await;
    assert_eq!(house.ended("three").await.status(), "done");
    assert_eq!(house.ended("four").await.status(), "done");
    // And it has none of its own again.
    file(&folder, &text("error", 2, "1h"));
    daemon.signal(Signal::SIGHUP);
    eventually("no capacity", async || capacity().is_none().then_some(())).await;

    for line in daemon.lines() {
        let line: serde_json::Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("no JSON: {line}"));
        assert!(line["timestamp"].is_string() && line["level"].is_string() && line["message"].is_string(), "{line}");
    }
    assert!(daemon.line("\"INFO\"").is_some());
    let lines = daemon.lines().len();
    house.goes_on("silent").await;
    assert_eq!(daemon.lines().len(), lines, "{}", daemon.output());
    stop(&daemon);
}

#[tokio::test(flavor = "multi_thread")]
async fn results_of_statements_that_ran_while_redis_was_away_are_recorded() {
    let house = House::on(RedisServer::with_config(&[("appendonly", "yes"), ("appendfsync", "always")])).await;
    let gate = house.gate().await;
    let daemon = house.daemon(&[("DRAYMAN_WORKER__SESSION_LIFETIME", "30s")]);
    house.job("meanwhile", &format!("INSERT INTO effects SELECT 'meanwhile' FROM {}", Gate::PASS)).push();
    house.executing("meanwhile", "4711").await;
    // Its result needs Redis once more before the commit: for a session's lifetime it is asked again.
    house.redis.kill();
    daemon.wait_for_line("nothing can be taken");
    gate.open().await;
    house.redis.restart();
    let view: JobView = house.ended("meanwhile").await;
    assert_eq!((view.status().as_str(), view.text("unclean")), ("done", None));
    assert_eq!(house.effects("meanwhile").await, 1);
    house.goes_on("after").await;
    stop(&daemon);
}

#[tokio::test(flavor = "multi_thread")]
async fn takes_resume_after_connections_were_cut() {
    let house = House::build().await;
    let proxy = Proxy::start(house.redis.addr());
    let daemon = daemon(
        &proxy.redis_url(DB),
        &[
            ("DRAYMAN_WORKER__SESSION_LIFETIME", "30s"),
            ("DRAYMAN_REDIS__COMMAND_TIMEOUT", "5s"),
            ("DRAYMAN_LOG__LEVEL", "worker=debug,info"),
        ],
    );
    house.goes_on("before").await;
    for round in 0..2 {
        proxy.refuse(true);
        proxy.cut();
        if round > 0 {
            // Away for long enough that pauses between attempts have grown.
            takes_fail(&daemon, 1).await;
        }
        proxy.refuse(false);
        house.goes_on(&format!("after-{round}")).await;
    }
    stop(&daemon);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_forgets_scripts_or_everything_is_worked_with_on() {
    let house = House::build().await;
    let daemon = house.daemon(&[]);
    house.goes_on("first").await;
    house.command(&["FUNCTION", "FLUSH"]);
    house.goes_on("second").await;

    house.job("lost", ENDLESS).of("bob").push();
    house.executing("lost", "pg_sleep").await;
    house.command(&["FLUSHALL"]);
    daemon.wait_for_line("the session is lost");
    house.goes_on("third").await;
    // The statement that nobody can record any more was stopped.
    eventually("the backend to go", async || (house.backends().await == 0).then_some(())).await;
    assert!(house.inspect.job("lost").await.unwrap().is_none());
    stop(&daemon);
    assert_eq!(house.state().sessions().len(), 0);
}

/// Seen to go wrong: whoever led lost its term to the look through all keys, and began anew, and watched nobody for long enough.
#[test]
fn a_leader_leads_on_while_it_looks_through_many_keys() {
    let redis = RedisServer::start();
    redis.state(DB).fill_records(100_000);
    redis.state(DB).abandon_session("gone", "sql:*");
    // Each look at 500 keys takes a while, all of them together far longer than a term unless it is renewed.
    let proxy = Proxy::start(redis.addr());
    proxy.delay(Duration::from_millis(20));
    let daemon = daemon(&proxy.redis_url(DB), &[]);
    eventually_blocking("the dead session to be noticed", || {
        (!redis.state(DB).sessions().contains(&"gone".to_owned())).then_some(())
    });
    assert_eq!(redis.state(DB).term(), 1);
    stop(&daemon);
}

#[test]
fn the_leader_repairs_keys_that_disagree_and_tells_of_each() {
    let redis = RedisServer::start();
    redis.state(DB).miscount_running("sql:h", 3);
    let daemon = daemon(&redis.url_db(DB), &[("DRAYMAN_WORKER__RECONCILE_INTERVAL", "100ms")]);
    let line = daemon.wait_for_line("pool-miscount");
    assert!(line.contains("WARN") && line.contains("sql:h") && line.contains("repaired"), "{line}");
    assert_eq!(redis.state(DB).count_running("sql:h").as_deref(), Some("0"));
    // Not only once.
    redis.state(DB).miscount_running_of("sql:h", "ann", 2);
    daemon.wait_for_line("user-miscount");
    stop(&daemon);
}
