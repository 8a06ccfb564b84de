//! What stands in `deploy/` works, and so do the pages' examples of configuration.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use testkit::{RedisServer, Scratch, bin};

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

/// The files of configuration that are shipped, and the pages' examples of such: where each stands, and its text.
fn configurations() -> Vec<(String, String)> {
    let mut found = Vec::new();
    let files = fs::read_dir(deploy("")).unwrap().chain(fs::read_dir(deploy("../docs")).unwrap());
    for path in files.map(|entry| entry.unwrap().path()).chain([deploy("../README.md")]) {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        match path.extension().and_then(|ending| ending.to_str()) {
            Some("toml") => found.push((name, fs::read_to_string(path).unwrap())),
            Some("md") => {
                let page = fs::read_to_string(path).unwrap();
                let blocks = page.split("\n```toml\n").skip(1).map(|rest| rest.split("\n```").next().unwrap());
                // The others are flows.
                let blocks = blocks.filter(|block| !block.contains("[[steps]]"));
                found.extend(blocks.enumerate().map(|(at, block)| (format!("{name}, block {at}"), block.into())));
            }
            _ => {}
        }
    }
    assert!(found.len() > 8, "{found:?}");
    found
}

#[test]
fn each_program_reads_each_file_that_is_shipped_and_each_example_of_the_pages() {
    let (redis, scratch) = (RedisServer::start(), Scratch::new("shipped"));
    let path = scratch.path().join("drayman.toml");
    let url = redis.url_db(5);
    let run = |program: &str, args: &[&str]| -> (Option<i32>, String) {
        let mut command = Command::new(bin(program));
        let output = command.env_clear().arg("--config").arg(&path).args(args).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let programs: [(&str, &[&str]); 4] = [
        ("drayman", &["--redis-url", &url, "submit", "--user", "ann", "--database", "trips", "SELECT 1"]),
        ("drayman-canceller", &["--redis-url", &url, "--user", "ann", "--dry-run"]),
        ("drayman-worker", &["--print-config"]),
        ("drayman-intake", &["--print-config"]),
    ];
    for (name, text) in configurations() {
        for (program, args) in programs {
            fs::write(&path, &text).unwrap();
            let (code, said) = run(program, args);
            if program == "drayman-intake" && !text.contains("[[folders]]") {
                // It has nothing to do then, and that is all that is wrong.
                assert!(code == Some(2) && said.contains("folders there are none"), "{program}, {name}: {said}");
            } else {
                assert_eq!(code, Some(0), "{program}, {name}: {said}");
            }
            // What no program knows is refused by each.
            fs::write(&path, format!("[wroker]\nslots = 1\n{text}")).unwrap();
            let (code, said) = run(program, args);
            assert!(code == Some(2) && said.contains("unknown key wroker in"), "{program}, {name}: {said}");
        }
    }
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
