//! `drayman track` against a real Redis, with real programs.

use std::fs;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use testkit::RedisServer;
use testkit::state::Piece;

mod support;

use support::{DB, Program, Ran, Running, until};

const PROGRAM: &str = env!("CARGO_BIN_EXE_drayman");

/// A server, and a folder for what programs leave.
struct House {
    server: RedisServer,
    folder: tempfile::TempDir,
}

impl House {
    fn new() -> Self {
        Self { server: RedisServer::start(), folder: tempfile::tempdir().unwrap() }
    }

    fn drayman(&self, args: &[&str]) -> Ran {
        Program::new(PROGRAM, &self.server).run(args)
    }

    /// Runs a script of the shell as an attempt, in the folder.
    fn start(&self, flags: &[&str], script: &str) -> Running {
        let program = Program::new(PROGRAM, &self.server);
        let args = [&["track", "run"], flags, &["--", "sh", "-c", script]].concat();
        Running(program.command(&args).current_dir(self.folder.path()).spawn().unwrap())
    }

    fn run(&self, flags: &[&str], script: &str) -> Ran {
        self.start(flags, script).end()
    }

    fn show(&self, id: &str) -> Value {
        let ran = self.drayman(&["track", "show", id, "--json"]);
        ran.json().pop().unwrap_or_else(|| panic!("{ran:?}"))
    }

    fn file(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    /// The number of a process that it has written into a file by now.
    fn pid(&self, name: &str) -> Pid {
        let mut found = None;
        until("a process writes its number", || {
            let text = fs::read_to_string(self.file(name)).unwrap_or_default();
            found = text.strip_suffix('\n').and_then(|line| line.parse().ok());
            found.is_some()
        });
        Pid::from_raw(found.unwrap())
    }
}

fn is_gone(pid: Pid) -> bool {
    // What nobody has waited for yet is gone too.
    let stat = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with(['Z', 'X']))
}

#[track_caller]
fn ended(ran: &Ran, code: i32, words: &str) {
    assert!(ran.code == code && ran.err.contains(words), "wanted {code} and {words:?}: {ran:?}");
}

#[test]
fn records_are_added_listed_shown_and_reset() {
    let house = House::new();
    let drayman = |args: &[&str]| house.drayman(&[&["track", "--tracker", "invoices"], args].concat());
    let ran = drayman(&["add", "a", "--data", r#"{"customer":7}"#, "--codes", "1,2,3,4,5"]);
    assert_eq!((ran.code, ran.lines()), (0, vec!["a"]), "{ran:?}");
    assert_eq!(drayman(&["add", "a", "--json"]).json(), [json!({ "id": "a", "result": "exists" })]);
    assert_eq!(drayman(&["add", "b", "--code", "60"]).code, 0);
    assert_eq!(drayman(&["run", "a", "--", "sh", "-c", "echo paper is out >&2; exit 9"]).code, 9);

    let list = drayman(&["list", "--status", "failed", "--json"]).json();
    assert_eq!(list.len(), 1);
    assert_eq!((&list[0]["id"], &list[0]["code"], &list[0]["retry"]), (&json!("a"), &json!(3), &json!(1)));
    let table = drayman(&["list", "--status", "60"]);
    let cells: Vec<Vec<&str>> = table.out.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!((cells.len(), cells[0][0], &cells[1][..3]), (2, "ID", &["b", "60", "60"][..]), "{table:?}");
    assert_eq!(
        house.drayman(&["track", "list", "--status", "failed"]).lines().len(),
        1,
        "another tracker's are not seen"
    );

    let shown = drayman(&["show", "a", "nobody"]);
    ended(&shown, 3, "nobody: there is no such record");
    for line in ["status        failed (3)", r#"data          {"customer":7}"#, "last error    ended with exit code 9"]
    {
        assert!(shown.lines().contains(&line), "{line}: {shown:?}");
    }
    assert!(shown.out.contains("paper is out") && shown.out.contains("tried         by "), "{shown:?}");

    let reset = drayman(&["reset", "a", "b", "nobody"]);
    assert_eq!((reset.code, reset.lines()), (3, vec!["a", "b"]), "{reset:?}");
    let pending: Vec<Value> = drayman(&["list", "--status", "pending", "--newest", "--json"])
        .json()
        .iter()
        .map(|one| one["id"].clone())
        .collect();
    assert_eq!(pending, ["b", "a"]);
    ended(&drayman(&["list", "--status", "pending", "--limit", "1"]), 0, "there are more than 1");
    assert_eq!(drayman(&["run", "a", "--", "true"]).code, 0);
    ended(&drayman(&["reset", "a"]), 4, "a: it has succeeded already");
    assert_eq!(drayman(&["reset", "b", "--to", "ignored"]).code, 0);
    for wrong in [
        &["add", "c", "--data", "[1]"][..],
        &["add", "c", "--data", r#"{"status":1}"#],
        &["add", "c", "--codes", "1,1,2,3,4"],
        &["add", "c\n"],
        &["list"],
        &["list", "--status", "odd"],
        &["run", "c", "--data", "{}", "--", "true"],
        &["run", "c"],
    ] {
        assert_eq!(drayman(wrong).code, 2, "{wrong:?}");
    }
}

#[test]
fn a_command_runs_with_its_jobs_data_and_its_end_is_the_jobs() {
    let house = House::new();
    let data = r#"{"n":1}"#;
    let script =
        r#"printf '%s %s %s' "$DRAYMAN_TRACK_ID" "$DRAYMAN_TRACK_DATA" "$DRAYMAN_TRACK_FENCE"; echo warned >&2"#;
    let ran = house.run(&["job 1", "--create", "--data", data], script);
    assert_eq!((ran.code, ran.err.as_str()), (0, "warned\n"));
    let fence = ran.out.strip_prefix(r#"job 1 {"n":1} "#).unwrap_or_else(|| panic!("{ran:?}"));
    assert!(fence.parse::<u64>().unwrap() > 0);
    let done = house.show("job 1");
    assert_eq!((&done["status"], &done["code"], &done["errors"]), (&json!("succeeded"), &json!(40), &Value::Null));
    assert_eq!(done["history"][0]["outcome"], "succeeded");

    let ran = house.run(&["j", "--create"], "echo first; echo second >&2; exit 3");
    ended(&ran, 3, "second\nj: ended with exit code 3; failed after 1 in a row\n");
    assert_eq!(ran.out, "first\n");
    let failed = house.show("j");
    assert_eq!((&failed["status"], &failed["lock"]), (&json!("failed"), &Value::Null));
    assert_eq!(failed["errors"], json!({ "error": "ended with exit code 3", "trace": "second\n" }));
    // Programs of ours in it are not confused by what they are given.
    let nested = format!("{PROGRAM} track list --status in_progress --json");
    let ran = house.run(&["j"], &nested);
    assert_eq!((ran.code, &ran.json()[0]["id"]), (0, &json!("j")), "{ran:?}");

    house.run(&["k", "--create", "--max-retry", "2"], "kill -9 $$");
    assert_eq!(house.show("k")["errors"]["error"], "was ended by SIGKILL");
    let ran = house.run(&["k", "--max-retry", "2", "--skip-error"], "kill -TERM $$");
    ended(&ran, 0, "k: was ended by SIGTERM; ignored after 2 in a row");
    assert_eq!(house.run(&["l", "--create"], "kill -9 $$").code, 128 + 9);
}

#[test]
fn each_refusal_has_its_exit_code_and_nothing_is_run() {
    let house = House::new();
    let add = |args: &[&str]| assert_eq!(house.drayman(&[&["track", "add"], args].concat()).code, 0, "{args:?}");
    add(&["done", "--code", "40"]);
    add(&["ignored", "--code", "50"]);
    add(&["own", "--code", "15"]);
    add(&["busy"]);
    let busy = house.start(&["busy"], "echo $$ > holder; until test -e go; do sleep 0.02; done");
    house.pid("holder");
    for (id, code, words) in [
        ("nobody", 116, "nobody: there is no such record"),
        ("busy", 117, "busy: it is locked by "),
        ("done", 118, "done: it has succeeded already"),
        ("ignored", 119, "ignored: it is ignored"),
        ("own", 120, "own: it is not ready to start: its code is 15"),
    ] {
        ended(&house.run(&[id, "--skip-error"], "touch ran"), code, words);
    }
    assert!(!house.file("ran").exists());
    assert_eq!(house.run(&["own", "--ready", "14,15"], "touch ran").code, 0);

    let run = |command: &str| house.drayman(&["track", "run", "m", "--create", "--", command]);
    ended(&run("/no/such/program"), 127, "/no/such/program cannot be run: ");
    ended(&run("/etc/passwd"), 126, "/etc/passwd cannot be run: ");
    assert_eq!((&house.show("m")["status"], &house.show("m")["retry"]), (&json!("failed"), &json!(2)));
    let ran = Program::at(PROGRAM, "redis://127.0.0.1:1/5").run(&["track", "run", "m", "--", "touch", "ran"]);
    assert_eq!(ran.code, 125, "{ran:?}");
    fs::write(house.file("go"), "").unwrap();
    assert_eq!(busy.end().code, 0);
}

#[test]
fn a_lock_is_renewed_for_as_long_as_the_command_runs() {
    let house = House::new();
    let running =
        house.start(&["j", "--create", "--expire", "1s"], "echo $$ > pid; until test -e go; do sleep 0.02; done");
    house.pid("pid");
    let end = |record: &Value| record["lock"]["until_ms"].as_u64().unwrap();
    let first = end(&house.show("j"));
    until("the lock lives on", || {
        assert_eq!(house.run(&["j"], "true").code, 117);
        end(&house.show("j")) > first + 1_000
    });
    fs::write(house.file("go"), "").unwrap();
    assert_eq!(running.end().code, 0);
    assert_eq!(house.show("j")["status"], "succeeded");
}

#[test]
fn a_command_whose_lock_is_lost_is_stopped_with_all_that_it_started() {
    let house = House::new();
    let script = r#"trap '' TERM; sh -c 'trap "" TERM; echo $$ > inner; while :; do sleep 1; done' & echo $$ > outer; wait; wait"#;
    let running = house.start(&["j", "--create", "--expire", "1s", "--grace", "50ms"], script);
    let (outer, inner) = (house.pid("outer"), house.pid("inner"));
    // Another has followed.
    house.server.state(DB).set(Piece::Tracked("default", "j"), &[("lock", "somebody")]);
    ended(&running.end(), 124, "j: the lock was lost; the command was stopped");
    until("both are gone", || is_gone(outer) && is_gone(inner));
    let record = house.show("j");
    assert_eq!((&record["status"], &record["lock"]["holder"]), (&json!("in_progress"), &json!("somebody")));
    assert_eq!(record["history"], json!([]));

    // One that ends before it hears of it has changed nothing either.
    let running = house.start(&["k", "--create"], "echo $$ > pid; until test -e go; do sleep 0.02; done");
    house.pid("pid");
    house.server.state(DB).set(Piece::Tracked("default", "k"), &[("lock", "somebody")]);
    fs::write(house.file("go"), "").unwrap();
    ended(&running.end(), 124, "k: the lock is lost");
    assert_eq!(house.show("k")["status"], "in_progress");
}

#[test]
fn signals_are_passed_on_and_the_end_is_recorded() {
    let house = House::new();
    for (id, signal) in [("term", Signal::SIGTERM), ("int", Signal::SIGINT), ("hup", Signal::SIGHUP)] {
        let script = format!("trap 'exit 7' TERM INT HUP; echo $$ > {id}; while :; do sleep 0.02; done");
        let running = house.start(&[id, "--create"], &script);
        house.pid(id);
        kill(Pid::from_raw(running.0.id() as i32), signal).unwrap();
        ended(&running.end(), 7, "ended with exit code 7; failed");
        assert_eq!(house.show(id)["errors"]["error"], "ended with exit code 7");
    }
}

#[test]
fn a_killed_drayman_takes_the_command_with_it_and_the_next_one_follows() {
    let house = House::new();
    let running = house.start(&["j", "--create", "--expire", "1s"], "echo $$ > pid; while :; do sleep 0.05; done");
    let pid = house.pid("pid");
    kill(Pid::from_raw(running.0.id() as i32), Signal::SIGKILL).unwrap();
    running.end();
    until("the command is gone", || is_gone(pid));
    until("the lock expires", || house.drayman(&["track", "list", "--status", "expired"]).lines().len() == 2);
    assert_eq!(house.run(&["j"], "true").code, 0);
    let outcomes: Vec<Value> =
        house.show("j")["history"].as_array().unwrap().iter().map(|attempt| attempt["outcome"].clone()).collect();
    assert_eq!(outcomes, ["lost", "succeeded"]);
}

#[test]
fn what_a_command_leaves_running_in_its_group_ends_with_it() {
    let house = House::new();
    let ran = house.run(&["j", "--create"], "sleep 1000 & echo $! > left");
    assert_eq!(ran.code, 0, "{ran:?}");
    let left = house.pid("left");
    until("it is gone", || is_gone(left));
}

#[test]
fn of_a_long_standard_error_all_is_shown_and_the_end_is_kept() {
    let house = House::new();
    let script = "head -c 3000000 /dev/zero | tr '\\0' x >&2; printf 'last \\377 words' >&2; exit 1";
    let program = Program::new(PROGRAM, &house.server);
    let output = program.command(&["track", "run", "j", "--create", "--", "sh", "-c", script]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stderr.len() > 3_000_000, "{}", output.stderr.len());
    let record = house.show("j");
    let trace = record["errors"]["trace"].as_str().unwrap();
    assert!(trace.len() <= 16 * 1024 + 2 && trace.ends_with("xlast \u{fffd} words"), "{}", trace.len());
}

#[test]
fn a_command_that_outlives_redis_is_stopped_in_time_and_says_so() {
    let house = House::new();
    let running = house.start(&["j", "--create", "--expire", "1s"], "echo $$ > pid; while :; do sleep 0.05; done");
    let pid = house.pid("pid");
    house.server.kill();
    ended(&running.end(), 124, "j: the lock was lost; the command was stopped");
    assert!(is_gone(pid));
}
