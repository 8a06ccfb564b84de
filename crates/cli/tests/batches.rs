//! `drayman batch` through the real program, with a real worker where rows are to be worked on.

use std::process::Stdio;

use serde_json::{Value, json};
use testkit::state::Piece;
use testkit::{Daemon, RedisServer, bin};

mod support;

use support::{DB, Program, Ran, hash, until};

const PROGRAM: &str = env!("CARGO_BIN_EXE_drayman");
const SUBMIT: [&str; 8] = ["batch", "submit", "--user", "ana", "--app", "bank", "--op", "post"];

/// Posts `{"n": N}`: of every tenth it says that it failed, of every third it writes a line into a file.
const POST: &str = r#"
import json, sys
for line in sys.stdin:
    job = json.loads(line)
    if job["type"] != "job":
        continue
    n = int(job["input"]["n"])
    if n % 10 == 0:
        messages = [{"msgid": 7, "errcode": "ten", "field": "n", "vals": [str(n)]}]
        answer = {"type": "error", "id": job["id"], "error": "a ten", "messages": messages}
    else:
        answer = {"type": "result", "id": job["id"], "result": {"twice": 2 * n}}
        if n % 3 == 0:
            answer["files"] = {"threes.txt": "line %d" % n}
    print(json.dumps(answer), flush=True)
"#;

struct House {
    server: RedisServer,
    drayman: Program,
}

impl House {
    fn build() -> Self {
        let server = RedisServer::start();
        let objects = format!("file://{}/objects", server.dir().display());
        let drayman = Program::new(PROGRAM, &server).env("DRAYMAN_OBJECTS__URL", &objects);
        Self { server, drayman }
    }

    /// Starts a worker that posts.
    fn worker(&self) -> Daemon {
        let folder = self.server.dir();
        std::fs::write(folder.join("post.py"), POST).unwrap();
        let config = format!(
            "[redis]\nurl = \"{}\"\n[worker]\npools = []\n[objects]\nurl = \"file://{folder}/objects\"\n[[handlers]]\napp = \"bank\"\n\
             op = \"post\"\nkind = \"program\"\ncommand = [\"/usr/bin/env\", \"python3\", \"{folder}/post.py\"]\n",
            self.server.url_db(DB),
            folder = folder.display()
        );
        std::fs::write(folder.join("worker.toml"), config).unwrap();
        let config = folder.join("worker.toml").display().to_string();
        Daemon::spawn(bin("drayman-worker"), &["--config", &config], &[])
    }

    fn run(&self, args: &[&str]) -> Ran {
        self.drayman.run(args)
    }

    fn ok(&self, args: &[&str]) -> Ran {
        let ran = self.run(args);
        assert_eq!(ran.code, 0, "{args:?} {ran:?}");
        ran
    }

    fn submit(&self, args: &[&str]) -> Ran {
        self.run(&[&SUBMIT[..], args].concat())
    }

    fn submit_with(&self, args: &[&str], stdin: impl AsRef<[u8]>) -> Ran {
        self.drayman.run_with(&[&SUBMIT[..], args].concat(), stdin.as_ref())
    }

    /// A file with this content.
    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.server.dir().join(name);
        std::fs::write(&path, content).unwrap();
        path.display().to_string()
    }

    fn view(&self, id: &str) -> Value {
        self.ok(&["batch", "status", id, "--json"]).json().remove(0)
    }

    /// Line and input of all its rows.
    fn rows(&self, id: &str) -> Vec<(u64, Value)> {
        let rows = self.ok(&["batch", "rows", id, "--all", "--json"]).json();
        rows.into_iter().map(|row| (row["line"].as_u64().unwrap(), row["input"].clone())).collect()
    }

    /// What the server holds, but for the version that each program notes there.
    fn keys(&self) -> Vec<String> {
        let keys = self.server.state(DB).digest().into_keys();
        keys.filter(|key| *key != Piece::Version.name()).collect()
    }
}

fn lines(n: std::ops::RangeInclusive<u64>) -> String {
    n.map(|n| format!("{{\"n\":{n}}}\n")).collect()
}

#[test]
fn rows_come_from_csv_json_lines_and_standard_input_with_the_lines_of_their_file() {
    let house = House::build();
    let csv = house.file("July.CSV", "n,who\r\n1,\"a \"\"b\"\"\r\nc\"\r\n\r\n2,\r\n");
    let ran = house.submit(&["--id", "csv", "--held", &csv]);
    assert_eq!((ran.code, ran.out.as_str(), ran.err.as_str()), (0, "csv\n", ""));
    let wanted = [(2, json!({ "n": "1", "who": "a \"b\"\r\nc" })), (5, json!({ "n": "2", "who": "" }))];
    assert_eq!(house.rows("csv"), wanted);
    assert_eq!(house.view("csv")["source"], "July.CSV");

    let jsonl = house.file("rows.jsonl", "{\"n\": 1.50}\n\n[1]\n");
    assert_eq!(house.submit(&["--id", "jsonl", "--held", &jsonl]).code, 0);
    assert_eq!(house.rows("jsonl"), [(1, json!({ "n": 1.5 })), (3, json!([1]))]);
    let exported = house.ok(&["batch", "export", "jsonl"]).out;
    assert!(exported.starts_with(r#"{"line":1,"status":"pending","input":{"n": 1.50},"#), "digits stay: {exported}");

    let semicolons = ["--id", "stdin", "--held", "--format", "csv", "--delimiter", ";", "-"];
    assert_eq!(house.submit_with(&semicolons, "a;b\n1,5;2\n").code, 0);
    assert_eq!(house.rows("stdin"), [(2, json!({ "a": "1,5", "b": "2" }))]);

    let statement = ["batch", "submit", "--user", "ana", "--statement", "select :n", "--held", "--id", "sql"];
    assert_eq!(house.run(&[&statement[..], &[&csv]].concat()).code, 2, "it must say where");
    house.ok(&[&statement[..], &["--database", "app", &csv]].concat());
    let hash = hash(&house.server, "sql");
    assert_eq!((hash["statement"].as_str(), hash["database"].as_str()), ("select :n", "app"));
}

#[test]
fn what_is_said_of_a_batch_stands_in_its_hash_and_the_same_again_is_the_same_batch() {
    let house = House::build();
    let more = ["--row-timeout", "5s", "--priority", "high", "--keep", "1h", "--tag", "a", "--tag", "b"];
    let retry = ["--max-attempts", "3", "--backoff", "fixed", "--retry-delay", "2s", "--retry-delay-max", "9s"];
    let all =
        [&["--held", "--key", "july", "--context", r#"{"x":1.0}"#, "--format", "jsonl"], &more[..], &retry].concat();
    let ran = house.submit_with(&all, lines(1..=3));
    let id = ran.out.trim_end().to_owned();
    assert!(ran.code == 0 && id.starts_with("k-"), "{ran:?}");
    let fields = hash(&house.server, &id);
    for (name, value) in [
        ("kind", "batch"),
        ("batch_context", r#"{"x":1.0}"#),
        ("timeout", "5000"),
        ("priority", "high"),
        ("keep", "3600000"),
        ("tags", "a,b"),
        ("max_attempts", "3"),
        ("backoff", "fixed"),
        ("retry_delay", "2000"),
        ("retry_delay_max", "9000"),
    ] {
        assert_eq!(fields.get(name).map(String::as_str), Some(value), "{name}");
    }
    let again = house.submit_with(&[&all[..], &["--json"]].concat(), lines(1..=3));
    assert_eq!(again.json(), [json!({ "id": id, "result": "already_there", "rows": 3 })]);
    assert_eq!(house.view(&id)["counts"]["rows"], 3);
}

#[test]
fn what_is_wrong_is_named_and_leaves_nothing() {
    let house = House::build();
    let nowhere = Program::at(PROGRAM, "redis://127.0.0.1:1/5");
    let csv = house.file("a.csv", "n\n1\n");
    for (args, words) in [
        (&["--id", "a b", &csv][..], "invalid value"),
        (&["--context", "{", &csv], "the context is no JSON"),
        (&["--database", "app", &csv], "cannot be used with"),
        (&["--priority", "urgent", &csv], "no such priority"),
        (&["--held", "--wait", &csv], "cannot be used with"),
        (&["--format", "xml", &csv], "invalid value"),
        (&["--delimiter", "é", &csv], "one character of ASCII"),
        (&["/no/such.csv"], "cannot read /no/such.csv"),
        (&["/etc/passwd"], "ends with none of .csv"),
        (&["-"], "say --format"),
    ] {
        let ran = nowhere.run(&[&SUBMIT[..], args].concat());
        assert!(ran.code == 2 && ran.err.contains(words), "{args:?} {ran:?}");
    }
    let ran = nowhere.run(&[&SUBMIT[..], &["--id", "b", &csv]].concat());
    assert_eq!(ran.code, 5, "{ran:?}");

    // Behind many that are right, and have left already.
    let many = lines(1..=100_000);
    for (args, text, words, code) in [
        (&["--format", "jsonl"][..], format!("{many}{{\"n\":}}\n"), "line 100001: it is no JSON", 2),
        (&["--format", "csv"], "n\n1\n2,3\n".into(), "line 3: it has 2 fields, the header has 1", 2),
        (&["--format", "csv"], String::new(), "line 1: there is no header", 2),
        (&["--format", "csv"], "n,m\n1,2\n3,\"4\n5,6\n".into(), "line 3: a quote is not closed", 2),
        (&["--format", "csv"], "n,m\n1,\"2\n3,\"4\"\n".into(), "line 2: text follows a closing quote", 2),
        (&["--format", "csv"], "n,m,n\n1,2,3\n".into(), "line 1: the header names \"n\" twice", 2),
        (&["--format", "jsonl"], "{\"n\":1}\n{\"n\":1,\"n\":2}\n".into(), "line 2: it names \"n\" twice", 2),
        (&["--format", "jsonl"], "1\n2 3\n".into(), "line 2: it is no JSON: trailing characters", 2),
        (&["--format", "jsonl"], format!("1\n\"{}\"\n", "x".repeat(2 << 20)), "line 2: it has", 2),
        (&["--format", "jsonl", "--tag", "a,b"], "1\n".into(), "a comma", 2),
    ] {
        let ran = house.submit_with(args, &text);
        assert!(ran.code == code && ran.err.contains(words), "{ran:?}");
        assert_eq!((ran.out.as_str(), house.keys()), ("", vec![]));
    }
    let limited = |name: &str, most: &str| Program::new(PROGRAM, &house.server).env(name, most);
    for (name, most, words, code) in [
        ("DRAYMAN_LIMITS__MAX_BATCH_ROWS", "99999", "a batch has at most 99999 rows", 4),
        ("DRAYMAN_LIMITS__MAX_BATCH_BYTES", "1MiB", "a batch has at most 1048576 bytes", 4),
        ("DRAYMAN_LIMITS__MAX_ROW_BYTES", "7", "line 10: it has more than 7 bytes", 2),
    ] {
        let ran = limited(name, most).run_with(&[&SUBMIT[..], &["--format", "jsonl"]].concat(), many.as_bytes());
        assert!(ran.code == code && ran.err.contains(words), "{ran:?}");
        assert_eq!(house.keys(), Vec::<String>::new());
    }
}

#[test]
fn an_interrupted_submission_leaves_nothing() {
    let house = House::build();
    let mut child = house.drayman.command(&[&SUBMIT[..], &["--format", "jsonl"]].concat());
    let mut child = child.stdin(Stdio::piped()).spawn().unwrap();
    let mut pipe = child.stdin.take().unwrap();
    std::io::Write::write_all(&mut pipe, lines(1..=60_000).as_bytes()).unwrap();
    until("rows have left", || !house.keys().is_empty());
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), nix::sys::signal::Signal::SIGINT).unwrap();
    let ran = support::Running(child).end();
    assert_eq!((ran.code, ran.err.as_str()), (130, "interrupted: no row was submitted\n"), "{ran:?}");
    assert_eq!(house.keys(), Vec::<String>::new());
}

#[test]
fn a_held_batch_is_appended_to_and_released_and_takes_no_more_then() {
    let house = House::build();
    let append = |args: &[&str], rows: &str| {
        house.drayman.run_with(&[&["batch", "append", "b", "--format", "jsonl"][..], args].concat(), rows.as_bytes())
    };
    assert_eq!(house.submit_with(&["--id", "b", "--held", "--format", "jsonl"], lines(1..=3)).code, 0);
    let ran = house.ok(&["batch", "status", "b"]);
    for line in ["status        held", "work          bank.post", "rows          3", "pending       3 (100.0 %)"] {
        assert!(ran.lines().contains(&line), "{line:?} is not in {}", ran.out);
    }
    let ran = append(&["--key", "k"], &lines(4..=5));
    assert_eq!((ran.code, ran.out.as_str()), (0, "b held: 5 rows, 5 pending\n"), "{ran:?}");
    let ran = append(&["--key", "k"], &lines(4..=5));
    assert!(ran.code == 0 && ran.out == "b held: 5 rows, 5 pending\n" && ran.err.contains("before"), "{ran:?}");
    let ran = append(&["--key", "k"], &lines(1..=9));
    assert_eq!(ran.out, "b held: 5 rows, 5 pending\n", "nothing under the same key");
    let ran = append(&["--release"], "1\nx\n2\n");
    assert!(ran.code == 2 && ran.err.starts_with("line 2: it is no JSON"), "{ran:?}");
    assert_eq!(house.view("b")["counts"]["rows"], 5, "of a load with a bad line no row joins");
    assert_eq!(house.view("b")["status"], "held");
    let ran = append(&["--release", "--json"], &lines(6..=7));
    let wanted = json!([{ "id": "b", "result": "appended", "status": "pending", "counts":
        { "rows": 7, "pending": 7, "done": 0, "skipped": 0, "failed": 0, "aborted": 0 } }]);
    assert_eq!(Value::from(ran.json()), wanted);
    let ran = append(&[], &lines(8..=8));
    assert_eq!((ran.code, ran.err.as_str()), (4, "the batch is pending: its status must be held for that\n"));
    let ran = house.ok(&["batch", "release", "b"]);
    assert_eq!(
        (ran.out.as_str(), ran.err.as_str()),
        ("b pending: 7 rows, 7 pending\n", "it was released before, nothing was changed\n")
    );
    let lines: Vec<u64> = house.rows("b").into_iter().map(|(line, _)| line).collect();
    assert_eq!(lines, [1, 1, 1, 2, 2, 2, 3], "the lines are those of each file");

    let ran = house.ok(&["batch", "abort", "b", "--json"]);
    assert_eq!((&ran.json()[0]["result"], &ran.json()[0]["counts"]["aborted"]), (&json!("aborted"), &json!(7)));
    assert_eq!(house.ok(&["batch", "abort", "b"]).out, "b cancelled: 7 rows, 7 aborted\n", "again it stays as it is");
    assert_eq!(house.run(&["batch", "release", "b"]).code, 4);
    assert_eq!(house.run(&["batch", "status", "b", "--wait"]).code, 1);
    for (command, code) in [("release", 3), ("abort", 3), ("status", 3), ("rows", 3), ("files", 3), ("export", 3)] {
        let ran = house.run(&["batch", command, "none"]);
        assert_eq!((ran.code, ran.err.as_str()), (code, "there is no batch none (any more)\n"), "{command}");
        assert_eq!(house.run(&["batch", command, "no id"]).code, 2);
    }
}

#[test]
fn rows_are_worked_on_watched_and_read_in_pages() {
    let house = House::build();
    let _worker = house.worker();
    let ran = house.submit_with(&["--id", "b", "--format", "jsonl", "--wait=10m"], lines(1..=250));
    assert_eq!((ran.code, ran.out.as_str()), (1, "b\n"), "some rows failed: {ran:?}");
    assert!(ran.err.ends_with("b failed: 250 rows, 225 done, 25 failed\n"), "{ran:?}");

    let ran = house.run(&["batch", "rows", "b", "--failed", "--limit", "2"]);
    let words: Vec<Vec<&str>> = ran.out.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(words[0], ["LINE", "STATUS", "INPUT", "RESULT", "MESSAGES"]);
    assert_eq!((words.len(), &words[1][..4]), (3, &["10", "failed", "{\"n\":10}", "-"][..]), "{ran:?}");
    assert!(words[1][4].starts_with(r#"[{"msgid":7,"errcode":"ten""#), "{ran:?}");
    let next = ran.err.strip_prefix("there are more: --after ").and_then(|rest| rest.split_once(' ')).unwrap().0;
    let ran = house.ok(&["batch", "rows", "b", "--failed", "--after", next, "--limit", "1", "--json"]);
    assert_eq!((ran.json().len(), &ran.json()[0]["line"]), (1, &json!(30)));
    let cursor = ran.json()[0]["cursor"].as_str().unwrap().to_owned();
    let ran = house.ok(&["batch", "rows", "b", "--after", &cursor, "--all", "--json"]);
    let read: Vec<u64> = ran.json().iter().map(|row| row["line"].as_u64().unwrap()).collect();
    assert_eq!(read, (31..=250).collect::<Vec<_>>());
    assert_eq!(house.run(&["batch", "rows", "b", "--after", "7"]).code, 2);
    assert_eq!(house.ok(&["batch", "rows", "b", "--all"]).lines().len(), 251);

    let wanted: String = (1..=250).filter(|n| n % 3 == 0 && n % 10 != 0).map(|n| format!("line {n}\n")).collect();
    let ran = house.ok(&["batch", "files", "b"]);
    assert_eq!(
        ran.out.lines().nth(1).unwrap().split_whitespace().collect::<Vec<_>>(),
        [&wanted.len().to_string(), "threes.txt"]
    );
    assert_eq!(house.ok(&["batch", "files", "b", "--get", "threes.txt"]).out, wanted);
    let path = house.server.dir().join("threes");
    house.ok(&["batch", "files", "b", "--get", "threes.txt", "--output", path.to_str().unwrap()]);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), wanted);
    let ran = house.run(&["batch", "files", "b", "--get", "fours.txt"]);
    assert_eq!((ran.code, ran.err.as_str()), (3, "the batch has no file \"fours.txt\"\n"));

    // The other commands know what it is.
    let ran = house.ok(&["status", "b"]);
    assert!(ran.out.contains("batch         b\n") && ran.out.contains("failed        25 (10.0 %)"), "{}", ran.out);
    assert_eq!(house.ok(&["status", "b", "--json"]).json()[0]["counts"]["done"], 225);
    assert_eq!(house.run(&["watch", "b"]).code, 1);
    let ran = house.run(&["result", "b"]);
    assert!(ran.code == 2 && ran.err.contains("drayman batch rows"), "{ran:?}");
    assert_eq!(house.ok(&["result", "b", "--file", "threes.txt"]).out, wanted);
    let ran = house.run(&["retry", "b"]);
    assert!(ran.code == 4 && ran.err.contains("it is a batch"), "{ran:?}");
    let ran = house.ok(&["retry", "--user", "ana"]);
    assert_eq!((ran.out.as_str(), ran.err.as_str()), ("", ""), "who selects jobs does not mean batches");
    let ran = house.run(&["batch", "status", "b", "--wait", "--json"]);
    assert_eq!((ran.code, &ran.json()[0]["status"]), (1, &json!("failed")));
}

#[test]
fn ten_thousand_rows_come_out_as_they_went_in() {
    let house = House::build();
    let _worker = house.worker();
    let rows: String =
        (1..=10_000).map(|n| format!("{{\"n\":{},\"text\":\"row, \\\"{n}\\\"\"}}\n", 10 * n + 1)).collect();
    let path = house.file("rows.jsonl", rows);
    let ran = house.submit(&["--id", "b", "--wait=10m", "--json", &path]);
    assert_eq!((ran.code, &ran.json()[1]["counts"]["done"]), (0, &json!(10_000)), "{ran:?}");
    let wanted = |n: u64| json!({ "n": 10 * n + 1, "text": format!("row, \"{n}\"") });
    let exported = house.ok(&["batch", "export", "b"]).json();
    assert_eq!(exported.len(), 10_000);
    for (row, n) in exported.iter().zip(1..) {
        let result = json!({ "twice": 2 * (10 * n + 1) });
        assert_eq!(*row, json!({ "line": n, "status": "done", "input": wanted(n), "result": result, "messages": [] }));
    }
    let path = house.server.dir().join("out.csv");
    house.ok(&["batch", "export", "b", "--format", "csv", "--output", path.to_str().unwrap()]);
    let mut reader = csv::Reader::from_path(&path).unwrap();
    assert_eq!(reader.headers().unwrap(), vec!["line", "status", "input", "result", "messages"]);
    let records: Vec<csv::StringRecord> = reader.records().map(Result::unwrap).collect();
    assert_eq!(records.len(), 10_000);
    for (record, n) in records.iter().zip(1..) {
        let input: Value = serde_json::from_str(&record[2]).unwrap();
        assert_eq!((&record[0], &record[1], input, &record[4]), (&*n.to_string(), "done", wanted(n), ""));
    }
    let folder = house.server.dir();
    let names: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!names.iter().any(|name| name.to_string_lossy().ends_with(".part")), "{names:?}");
}

#[test]
fn batches_are_listed_by_what_they_are_and_how_they_stand() {
    let house = House::build();
    let submit = |id: &str, user: &str, op: &str, held: bool| {
        let args = ["batch", "submit", "--user", user, "--app", "bank", "--op", op, "--format", "jsonl", "--id", id];
        let args = [&args[..], if held { &["--held"] } else { &[] }].concat();
        assert_eq!(house.drayman.run_with(&args, b"1\n").code, 0);
    };
    submit("a", "ana", "Post", true);
    submit("b", "ana", "check", false);
    submit("c", "bo", "post", false);
    house.ok(&["batch", "abort", "c"]);
    let ids = |args: &[&str]| {
        let listed = house.ok(&[&["batch", "list", "--json"][..], args].concat()).json();
        let mut ids: Vec<String> = listed.iter().map(|view| view["id"].as_str().unwrap().to_owned()).collect();
        ids.sort();
        ids.concat()
    };
    assert_eq!(ids(&[]), "abc");
    assert_eq!(ids(&["--user", "ana"]), "ab");
    assert_eq!(ids(&["--app", "bank", "--op", "POST"]), "ac");
    assert_eq!(ids(&["--status", "held"]), "a");
    assert_eq!(ids(&["--status", "cancelled"]), "c");
    assert_eq!(ids(&["--age", "1h"]), "abc");
    assert_eq!(ids(&["--age", "1ms"]), "");
    let ran = house.ok(&["batch", "list", "--limit", "2"]);
    assert_eq!((ran.lines().len(), ran.err.as_str()), (3, "there are more than 2: see --limit\n"), "{ran:?}");

    // Among all jobs.
    let ran = house.ok(&["list", "--json"]).json();
    let mut found: Vec<String> = ran
        .iter()
        .map(|job| format!("{} {} {} {}", job["id"], job["kind"], job["pool"], job["status"]).replace('"', ""))
        .collect();
    found.sort();
    // The application of c is to be told, once somebody serves it.
    let told = "c:done part bank.post pending";
    assert_eq!(found, ["a batch bank.post held", "b batch bank.check pending", "c batch bank.post cancelled", told]);
    assert_eq!(house.ok(&["list", "--status", "held"]).lines().len(), 2);
}

#[test]
fn the_memory_of_a_submission_does_not_grow_with_its_rows() {
    let house = House::build();
    let mut command = house.drayman.command(&[&SUBMIT[..], &["--id", "b", "--held", "--format", "jsonl"]].concat());
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut pipe = child.stdin.take().unwrap();
    let peak = |pid: u32| -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    let text = "x".repeat(90);
    for from in (0..300_000).step_by(1_000) {
        let rows: String = (from..from + 1_000).map(|n| format!("{{\"n\":{n},\"text\":\"{text}\"}}\n")).collect();
        std::io::Write::write_all(&mut pipe, rows.as_bytes()).unwrap();
    }
    // All but what the pipe holds has been read.
    let peak = peak(child.id());
    drop(pipe);
    let ran = support::Running(child).end();
    assert_eq!((ran.code, ran.out.as_str()), (0, "b\n"), "{ran:?}");
    assert!(peak < 100 * 1024, "{peak} KiB");
    assert_eq!(house.view("b")["counts"]["rows"], 300_000);
}
