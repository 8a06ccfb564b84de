//! What stands in `deploy/` works.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use testkit::{RedisServer, Scratch};

fn deploy(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy").join(file)
}

/// What `systemd-analyze verify` says about the unit after `change`; empty if it has nothing to say.
fn verify(change: impl FnOnce(String) -> String) -> String {
    let scratch = Scratch::new("unit");
    let unit = fs::read_to_string(deploy("drayman-worker@.service")).unwrap();
    // The program is not installed here, and a path that does not exist is an error.
    let unit = unit.replace("/usr/bin/drayman-worker", "/bin/true");
    let path = scratch.path().join("drayman-worker@main.service");
    fs::write(&path, change(unit)).unwrap();
    let output = Command::new("systemd-analyze")
        .args(["verify", "--man=no", "--recursive-errors=no"])
        .arg(&path)
        .env("SYSTEMD_LOG_LEVEL", "warning")
        .output()
        .expect("systemd-analyze starts: scripts/setup installs it");
    let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.success(), text.is_empty(), "{text}");
    // Other units of this machine are not ours to judge.
    text.lines().filter(|line| line.contains("drayman")).map(|line| format!("{line}\n")).collect()
}

#[test]
fn systemd_accepts_the_unit_without_a_warning() {
    assert_eq!(verify(|unit| unit), "");
}

#[test]
fn systemd_would_tell_of_mistakes() {
    let unknown = verify(|unit| unit.replace("WatchdogSec=", "WatchdogSeconds="));
    assert!(unknown.contains("WatchdogSeconds"), "{unknown}");
    let missing = verify(|unit| unit.replace("/bin/true", "/bin/no-such-program"));
    assert!(missing.contains("no-such-program"), "{missing}");
}

#[test]
fn the_unit_gives_the_worker_what_it_counts_on() {
    let unit = fs::read_to_string(deploy("drayman-worker@.service")).unwrap();
    let has = |line: &str| assert!(unit.lines().any(|l| l == line), "{line} is missing");
    has("Type=notify");
    has("NotifyAccess=main");
    has("KillSignal=SIGTERM");
    has("KillMode=mixed");
    has("OOMPolicy=continue");
    has("Restart=on-failure");
    has("StartLimitIntervalSec=0");
    has("User=drayman");
    has("ExecStart=/usr/bin/drayman-worker --config /etc/drayman/%i.toml");
    assert!(unit.lines().any(|line| line.starts_with("WatchdogSec=")));
    // Where large results lie by default is a folder that the worker may make.
    has("StateDirectory=drayman");
    let settings = fs::read_to_string(deploy("worker.toml")).unwrap();
    assert!(settings.contains("\nurl = \"file:///var/lib/drayman/objects\"\n"));
    // A worker that drains, and the handlers that it stops then, have the time that they may take.
    let seconds = |text: &str, key: &str| -> u64 {
        let line = text.lines().find_map(|line| line.trim_start_matches("# ").strip_prefix(key)).expect(key);
        line.trim_matches(['=', ' ', '"', 's']).parse().expect("seconds")
    };
    let graces = ["drain_grace", "cancel_grace", "kill_grace"].map(|key| seconds(&settings, key)).iter().sum::<u64>();
    assert!(seconds(&unit, "TimeoutStopSec") > 2 * graces, "{graces}");
}

#[test]
fn redis_starts_with_our_settings() {
    // Port, socket and folder are the fixture's.
    let server = RedisServer::with_config_file(Some(&deploy("redis.conf")), &[]);
    let setting = |name: &str| server.raw(&["CONFIG", "GET", name]).map()[name].clone();
    for (name, value) in [
        ("maxmemory-policy", "noeviction"),
        ("appendonly", "yes"),
        ("appendfsync", "everysec"),
        ("no-appendfsync-on-rewrite", "no"),
        ("hash-max-listpack-value", "256"),
        ("save", "3600 1"),
        ("stop-writes-on-bgsave-error", "yes"),
        ("protected-mode", "yes"),
        ("timeout", "0"),
        ("tcp-keepalive", "60"),
    ] {
        assert_eq!(setting(name), value, "{name}");
    }

    // What the settings are for.
    server.raw(&["HSET", "job", "query", &"x".repeat(256)]);
    assert_eq!(server.raw(&["OBJECT", "ENCODING", "job"]).text(), "listpack");
    server.kill();
    server.restart();
    assert_eq!(server.raw(&["HLEN", "job"]).int(), 1);
}
