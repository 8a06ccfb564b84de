//! `drayman flow` through the real program, with real workers: what their users want of jobs made of steps.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};
use testkit::{Daemon, RedisServer, Signal, bin};

mod support;

use support::{DB, Program, Ran, until};

const PROGRAM: &str = env!("CARGO_BIN_EXE_drayman");
const PAGE: &str = include_str!("../../../docs/flows.md");

/// The work of the steps: each says in a file of its own what it was given, and does what the name asks for.
const STEP: &str = r#"
import json, os, sys, time
home = sys.argv[1]
for line in sys.stdin:
    job = json.loads(line)
    if job["type"] != "job":
        continue
    what = job["input"].get("do", "")
    with open(os.path.join(home, "ran"), "a") as ran:
        print(job["job"].split(":")[1], json.dumps(job["input"], sort_keys=True), file=ran)
    answer = {"type": "result", "id": job["id"]}
    if what == "fail" and not os.path.exists(os.path.join(home, "mended")):
        answer = {"type": "error", "id": job["id"], "error": "no such file: prices.csv"}
    if what == "flaky" and job["attempt"] < 3:
        answer = {"type": "error", "id": job["id"], "error": f"busy {job['attempt']}", "wish": "retry"}
    if what == "quit":
        # Before it has read that it was saved.
        print(json.dumps({"type": "checkpoint", "id": job["id"], "value": job["attempt"]}), flush=True)
        os._exit(7)
    if what == "count":
        start = job.get("checkpoint", {"at": 0})["at"]
        for n in range(start, 50):
            if n % 10 == 0:
                print(json.dumps({"type": "checkpoint", "id": job["id"], "value": {"at": n}}), flush=True)
                assert json.loads(sys.stdin.readline()) == {"type": "saved", "id": job["id"]}
            if n == 25 and not os.path.exists(os.path.join(home, "mended")):
                os._exit(1)
            with open(os.path.join(home, "counted"), "a") as counted:
                print(n, file=counted)
        answer["result"] = start
    while what == "wait" and not os.path.exists(os.path.join(home, "go")):
        time.sleep(0.02)
    print(json.dumps(answer), flush=True)
"#;

struct House {
    server: RedisServer,
    drayman: Program,
}

impl House {
    fn build() -> Self {
        let server = RedisServer::start();
        let home = server.dir().to_owned();
        fs::write(home.join("step.py"), STEP).unwrap();
        let config = format!(
            "[redis]\nurl = '{url}'\n[worker]\npools = ['db:shop']\nsession_lifetime = '2s'\n\
             [objects]\nurl = 'file://{home}/objects'\n\
             [databases.shop]\nkind = 'sqlite'\npath = '{home}/shop.db'\ncreate = true\n\
             [[handlers]]\napp = 'etl'\nop = 'step'\nkind = 'program'\ncommand = ['/usr/bin/env', 'python3', '{home}/step.py', '{home}']\n\
             [[handlers]]\napp = 'etl'\nop = 'write'\nkind = 'command'\ncommand = ['/bin/sh', '-c', 'echo \"$1\" >> \"$0\"', '{home}/written', '{{input.args.0}}']\n",
            url = server.url_db(DB),
            home = home.display(),
        );
        fs::write(home.join("worker.toml"), config).unwrap();
        let drayman = Program::new(PROGRAM, &server);
        Self { server, drayman }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.server.dir().join(name)
    }

    fn worker(&self) -> Daemon {
        let config = self.path("worker.toml").display().to_string();
        Daemon::spawn(bin("drayman-worker"), &["--config", &config], &[])
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    /// A flow of calls of the one handler: `name` or `name do`.
    fn calls(&self, name: &str, steps: &[&str]) -> String {
        let steps = steps.iter().map(|text| {
            let (step, what) = text.split_once(' ').unwrap_or((text, ""));
            format!(
                "[[steps]]\nname = '{step}'\nkind = 'task'\napp = 'etl'\nop = 'step'\ninput = {{ do = '{what}' }}\n"
            )
        });
        self.file(&format!("{name}.toml"), &format!("name = '{name}'\n{}", steps.collect::<String>()))
    }

    fn run(&self, args: &[&str]) -> Ran {
        self.drayman.run(&[&["flow"], args].concat())
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) -> Ran {
        let ran = self.run(args);
        assert_eq!(ran.code, 0, "{args:?}: {ran:?}");
        ran
    }

    fn launch(&self, file: &str, more: &[&str]) -> Ran {
        self.run(&[&["launch", "--user", "ann", file], more].concat())
    }

    fn steps(&self, id: &str) -> Vec<(String, String)> {
        let text = |step: &Value, name: &str| step[name].as_str().unwrap().to_owned();
        let steps = self.ok(&["steps", id, "--json"]).json();
        steps.iter().map(|step| (text(step, "name"), text(step, "status"))).collect()
    }

    fn status(&self, id: &str) -> String {
        let found = self.ok(&["show", id, "--json"]).json().remove(0);
        found["execution"]["status"].as_str().unwrap().to_owned()
    }

    /// The steps that ran, in order, with how often each follows itself left as it is.
    fn ran(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("ran")).unwrap_or_default();
        text.lines().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
    }

    fn stop(&self, worker: &Daemon) {
        worker.signal(Signal::SIGTERM);
        assert!(worker.wait().success(), "{}", worker.output());
    }
}

#[test]
fn a_definition_is_checked_by_name_and_line_before_anything_runs() {
    let house = House::build();
    let good = house.calls("good", &["one", "two"]);
    let circle = "name = 'c'\n[[steps]]\nname = 'a'\nkind = 'task'\napp = 'x'\nop = 'y'\nafter = ['a']\n";
    let bad = [
        house.file("circle.toml", circle),
        house.file("key.toml", "name = 'k'\nsteps = []\nretries = 3\n"),
        house.file("none.toml", "name = 'n'\n"),
        house.path("missing.toml").display().to_string(),
    ];
    let ran = house.run(&["check", &bad[0], &good, &bad[1], &bad[2], &bad[3]]);
    assert_eq!(ran.code, 2);
    assert_eq!(ran.out, format!("{good}: good with 2 steps\n"));
    for (file, what) in bad.iter().zip(["in a circle: a → a", "unknown field `retries`", "not 0", "No such file"]) {
        let is_said = |line: &&str| line.contains(file.as_str());
        let line = ran.err.lines().find(is_said).unwrap_or_else(|| panic!("{file}: {}", ran.err));
        let at = ran.err.find(line).unwrap();
        assert!(ran.err[at..].contains(what), "{}", ran.err);
    }
    // The page shows one that is whole.
    let (_, rest) = PAGE.split_once("<!-- test: flow nightly -->\n```toml\n").expect("it is marked");
    let shown = house.file("nightly.toml", rest.split_once("```").expect("it ends").0);
    assert_eq!(house.ok(&["check", &shown]).out, format!("{shown}: nightly with 4 steps\n"));
    // What nobody serves is named, too.
    let ran = house.run(&["check", "--served", &good]);
    assert_eq!(ran.code, 4);
    assert!(ran.err.contains("step one: no worker serves etl.step"), "{}", ran.err);
    let worker = house.worker();
    until("the worker to serve", || house.run(&["check", "--served", &good]).code == 0);
    house.stop(&worker);
    assert_eq!(house.launch(&bad[0], &[]).code, 2);
    assert_eq!(house.ok(&["executions"]).lines().len(), 1, "nothing but the header");
}

#[test]
fn the_samples_of_steps_failures_retries_and_parameters() {
    let house = House::build();
    let worker = house.worker();
    // Two steps.
    let sample = house.calls("SampleJob", &["first", "second"]);
    let ran = house.launch(&sample, &["--id", "sample", "--wait=10m"]);
    assert_eq!((ran.code, ran.out.as_str()), (0, "sample\n"), "{ran:?}");
    assert_eq!(house.ran(), ["first", "second"]);
    // One that fails says why, and what follows does not run.
    let failing = house.calls("FailingJob", &["breaks fail", "never"]);
    let ran = house.launch(&failing, &["--id", "failing", "--wait=10m"]);
    assert_eq!(ran.code, 1);
    assert!(ran.err.ends_with("failing failed: step breaks failed: no such file: prices.csv\n"), "{}", ran.err);
    let steps = house.ok(&["steps", "failing", "--json"]).json();
    assert_eq!((&steps[0]["status"], &steps[0]["error"]), (&json!("failed"), &json!("no such file: prices.csv")));
    assert_eq!(steps[1]["status"], "skipped");
    // One that is tried again has the record of each attempt.
    let step = "[[steps]]\nname = 'flaky'\nkind = 'task'\napp = 'etl'\nop = 'step'\ninput = { do = 'flaky' }\n\
                max_attempts = 3\nretry_delay = '10ms'\n";
    let flaky = house.file("retry.toml", &format!("name = 'RetryJob'\n{step}"));
    assert_eq!(house.launch(&flaky, &["--id", "flaky", "--wait=10m"]).code, 0);
    let steps = house.ok(&["steps", "flaky", "--json"]).json();
    let errors: Vec<&str> =
        steps[0]["attempts"].as_array().unwrap().iter().map(|one| one["error"].as_str().unwrap()).collect();
    assert_eq!(errors, ["busy 1", "busy 2"]);
    // Parameters are typed and stored.
    let step = "[[steps]]\nname = 'p'\nkind = 'task'\napp = 'etl'\nop = 'step'\n";
    let params = house.file("params.toml", &format!("name = 'ParameterizedJob'\nany_params = true\n{step}"));
    let given = r#"{"name": "x", "count": 3, "rate": 1.5, "on": true, "day": "2026-03-01T00:00:00Z"}"#;
    assert_eq!(house.launch(&params, &["--id", "params", "--params-json", given, "--wait=10m"]).code, 0);
    let stored = house.ok(&["params", "params", "--json"]).json().remove(0);
    let kinds = ["count", "day", "name", "on", "rate"].map(|name| stored[name]["type"].as_str().unwrap().to_owned());
    assert_eq!(kinds, ["integer", "date-time", "string", "boolean", "float"]);
    let table = house.ok(&["params", "params"]).out;
    assert!(table.contains("day") && table.contains("date-time"), "{table}");
    let input = fs::read_to_string(house.path("ran")).unwrap();
    let wanted = r#"p {"count": 3, "day": "2026-03-01T00:00:00Z", "name": "x", "on": true, "rate": 1.5}"#;
    assert_eq!(input.lines().last(), Some(wanted));
    // The records outlive the service.
    house.stop(&worker);
    let listed = house.ok(&["executions", "--json"]).json();
    let stand: Vec<_> =
        listed.iter().map(|one| (one["id"].as_str().unwrap(), one["status"].as_str().unwrap())).collect();
    assert_eq!(stand, [("params", "done"), ("flaky", "done"), ("failing", "failed"), ("sample", "done")]);
    assert_eq!(house.ok(&["executions", "--status", "failed", "--flow", "FailingJob", "--json"]).json().len(), 1);
    let show = house.ok(&["show", "failing"]).out;
    assert_eq!(show, "FailingJob failing failed\n✘ breaks  failed  (no such file: prices.csv)\n– never   skipped\n");
    // They are jobs like others, too.
    let jobs = house.drayman.run(&["list", "--json"]).json();
    assert!(jobs.iter().any(|job| job["id"] == "sample" && job["kind"] == "flow"), "{jobs:?}");
}

#[test]
fn after_a_failure_is_mended_a_launch_repeats_nothing_that_is_done() {
    let house = House::build();
    let worker = house.worker();
    let text = r#"
        name = "nightly"
        [params.day]
        type = "date-time"
        [params.dry]
        type = "boolean"
        default = false
        identifying = false

        [[steps]]
        name = "prepare"
        kind = "sql"
        database = "shop"
        query = "CREATE TABLE days (day TEXT, dry INTEGER, note TEXT)"
        [[steps]]
        name = "note"
        kind = "sql"
        database = "shop"
        query = "INSERT INTO days VALUES (<%= day %>, <%= dry %>, 'of <%= day %>; it''s')"
        [[steps]]
        name = "load"
        kind = "task"
        app = "etl"
        op = "step"
        input = { do = "fail", day = "<%= day %>" }
        [[steps]]
        name = "write"
        kind = "command"
        app = "etl"
        op = "write"
        args = ["of <%= day %>; $(id)"]
        [[steps]]
        name = "alarm"
        kind = "task"
        app = "etl"
        op = "step"
        input = { do = "alarm" }
        after = ["load", "write"]
        on = "ended"
    "#;
    let file = house.file("nightly.toml", text);
    let day = ["-p", "day=2026-03-01T04:00:00Z"];
    let first = house.launch(&file, &[&day[..], &["--id", "n1", "--wait=10m"]].concat());
    assert_eq!(first.code, 1, "{first:?}");
    fs::write(house.path("mended"), "").unwrap();
    let second = house.launch(&file, &[&day[..], &["--id", "n2", "--wait=10m"]].concat());
    assert_eq!(second.code, 0, "{second:?}");
    assert!(second.err.contains("goes on from n1"), "{}", second.err);
    assert_eq!(house.ran(), ["load", "alarm", "load", "alarm"], "what follows any end follows each");
    assert_eq!(fs::read_to_string(house.path("written")).unwrap(), "of 2026-03-01T04:00:00Z; $(id)\n");
    let froms: Vec<Value> =
        house.ok(&["steps", "n2", "--json"]).json().iter().map(|step| step["from"].clone()).collect();
    assert_eq!(froms, [json!("n1"), json!("n1"), Value::Null, Value::Null, Value::Null]);

    // What is done is done, unless it is forced.
    let again = house.launch(&file, &day);
    assert_eq!(again.code, 4);
    assert!(again.err.contains("the instance was done by execution n2"), "{}", again.err);
    let again = house.launch(&file, &[&day[..], &["-p", "dry=true"]].concat());
    assert_eq!(again.code, 4, "it does not identify: {again:?}");
    let missing = house.launch(&file, &[]);
    assert_eq!((missing.code, missing.err.contains("parameter \"day\" is missing")), (2, true), "{missing:?}");
    let instances = house.ok(&["list", "--json"]).json();
    assert_eq!(instances.len(), 1);
    assert_eq!((&instances[0]["id"], &instances[0]["status"]), (&json!("n2"), &json!("done")));

    // By when they were launched.
    let launched = house.ok(&["executions", "--json"]).json();
    let at = |id: &str| {
        let found = launched.iter().find(|execution| execution["id"] == id).unwrap();
        found["created_at"].as_str().unwrap().to_owned()
    };
    let ids = |what: &[&str]| -> Vec<String> {
        let found = house.ok(&[what, &["--json"]].concat()).json();
        found.iter().map(|execution| execution["id"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(ids(&["executions", "--since", &at("n2")]), ["n2"]);
    assert_eq!(ids(&["executions", "--until", &at("n2")]), ["n1"]);
    assert_eq!(ids(&["executions", "--since", &at("n1"), "--until", "2999-01-01"]), ["n2", "n1"]);
    assert_eq!(ids(&["list", "--until", &at("n2")]), [""; 0], "its latest execution was launched later");
    for wrong in [&["--since", "soon"][..], &["--since", "2026-03-02", "--until", "2026-03-01T12:00:00Z"]] {
        assert_eq!(house.run(&[&["executions"], wrong].concat()).code, 2, "{wrong:?}");
    }
    house.stop(&worker);
}

#[test]
fn an_execution_is_stopped_restarted_and_abandoned() {
    let house = House::build();
    let worker = house.worker();
    let file = house.calls("slow", &["one", "two wait", "three"]);
    assert_eq!(house.launch(&file, &["--id", "s1"]).code, 0);
    until("the second step to run", || house.ran() == ["one", "two"]);
    let twice = house.launch(&file, &["--id", "s2"]);
    assert_eq!((twice.code, twice.err.contains("the instance is running as execution s1")), (4, true), "{twice:?}");
    assert_eq!(house.run(&["abandon", "s1"]).code, 4);
    let ran = house.ok(&["stop", "s1"]);
    assert_eq!(ran.out, "s1 stopping\n");
    fs::write(house.path("go"), "").unwrap();
    until("the flow to stop", || house.status("s1") == "stopped");
    let wanted = [("one", "done"), ("two", "done"), ("three", "waiting")];
    assert_eq!(house.steps("s1"), wanted.map(|(name, status)| (name.to_owned(), status.to_owned())));
    assert_eq!(house.run(&["stop", "s1"]).code, 4);
    let ran = house.ok(&["restart", "s1", "--id", "s2", "--wait=10m"]);
    assert_eq!(ran.out, "s2\n");
    assert_eq!(house.ran(), ["one", "two", "three"]);
    assert_eq!(house.run(&["restart", "s1"]).code, 4, "it is done");

    let failing = house.calls("broken", &["breaks fail"]);
    assert_eq!(house.launch(&failing, &["--id", "b1", "--wait=10m"]).code, 1);
    assert_eq!(house.ok(&["abandon", "b1"]).out, "b1 abandoned: step breaks failed: no such file: prices.csv\n");
    let again = house.launch(&failing, &[]);
    assert_eq!((again.code, again.err.contains("b1 of the instance was abandoned")), (4, true), "{again:?}");
    assert_eq!(house.launch(&failing, &["--force", "--wait=10m"]).code, 1);
    for command in ["steps", "params", "show", "stop", "abandon", "restart"] {
        assert_eq!(house.run(&[command, "nobody"]).code, 3, "{command}");
    }
    house.stop(&worker);
}

#[test]
fn a_program_saves_how_far_it_has_come_and_goes_on_from_there() {
    let house = House::build();
    let worker = house.worker();
    let file = house.calls("counts", &["counts count"]);
    let failed = house.launch(&file, &["--id", "c1", "--wait=10m"]);
    assert_eq!(failed.code, 1);
    assert!(failed.err.contains("the program ended with exit code 1 before it had answered"), "{}", failed.err);
    assert_eq!(house.ok(&["steps", "c1", "--json"]).json()[0]["checkpoint"], json!({ "at": 20 }));
    fs::write(house.path("mended"), "").unwrap();
    // It is a place in what this handler made of this input, and in nothing else.
    let counted = fs::read_to_string(house.path("counted")).unwrap();
    let text = fs::read_to_string(&file).unwrap();
    for (id, from, to, wanted) in [
        ("i1", "do = 'count'", "do = 'count', file = 'b.csv'", "its handler's input is another one than before"),
        ("i2", "op = 'step'", "op = 'write'", "its handler was etl.step, and is etl.write now"),
    ] {
        assert!(text.contains(from), "{text}");
        let other = house.file("other.toml", &text.replace(from, to));
        assert_eq!(house.launch(&other, &["--id", id, "--wait=10m"]).code, 1, "{id}");
        let error = house.ok(&["steps", id, "--json"]).json()[0]["error"].as_str().unwrap().to_owned();
        assert!(error.starts_with(&format!("it can't go on from its checkpoint: {wanted}. Put back")), "{error}");
    }
    assert_eq!(fs::read_to_string(house.path("counted")).unwrap(), counted, "it was not begun");
    assert_eq!(house.launch(&file, &["--id", "c2", "--wait=10m"]).code, 0);
    let counted = fs::read_to_string(house.path("counted")).unwrap();
    let wanted: String = (0..25).chain(20..50).map(|n| format!("{n}\n")).collect();
    assert_eq!(counted, wanted);
    assert_eq!(house.drayman.run(&["result", "c2:counts"]).out.trim(), "20");
    // One that ends before it has read that it was saved has begun all the same: it costs an attempt, and is not given back for ever.
    let step = "[[steps]]\nname = 'quits'\nkind = 'task'\napp = 'etl'\nop = 'step'\ninput = { do = 'quit' }\n\
                max_attempts = 3\nretry_delay = '10ms'\n";
    let quits = house.file("quits.toml", &format!("name = 'quits'\n{step}"));
    assert_eq!(house.launch(&quits, &["--id", "q1", "--wait=10m"]).code, 1);
    let step = house.ok(&["steps", "q1", "--json"]).json().remove(0);
    assert_eq!((step["attempts"].as_array().unwrap().len(), &step["checkpoint"]), (3, &json!(3)), "{step}");
    house.stop(&worker);
}

#[test]
fn a_worker_that_is_killed_in_any_kind_of_step_costs_the_flow_nothing() {
    let house = House::build();
    let text = r#"
        name = "kills"
        [[steps]]
        name = "table"
        kind = "sql"
        database = "shop"
        query = "CREATE TABLE IF NOT EXISTS t (n INTEGER)"
        [[steps]]
        name = "slow-sql"
        kind = "sql"
        database = "shop"
        query = "INSERT INTO t WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 2000000) SELECT count(*) FROM c"
        [[steps]]
        name = "task"
        kind = "task"
        app = "etl"
        op = "step"
        input = { do = "wait" }
        [[steps]]
        name = "write"
        kind = "command"
        app = "etl"
        op = "write"
        args = ["end"]
        [[steps]]
        name = "check"
        kind = "sql"
        database = "shop"
        query = "INSERT INTO t SELECT 1 FROM t GROUP BY 1 HAVING count(*) > 1"
    "#;
    let file = house.file("kills.toml", text);
    assert_eq!(house.launch(&file, &["--id", "k1"]).code, 0);
    for step in ["slow-sql", "task"] {
        let worker = house.worker();
        until(&format!("step {step} to run"), || {
            let is_at = |(name, status): &(String, String)| name == step && status == "running";
            house.steps("k1").iter().any(is_at)
        });
        worker.kill9();
    }
    fs::write(house.path("go"), "").unwrap();
    let worker = house.worker();
    until("the flow to end", || house.status("k1") == "done");
    assert_eq!(fs::read_to_string(house.path("written")).unwrap(), "end\n");
    let shop = rusqlite::Connection::open(house.path("shop.db")).unwrap();
    let rows: i64 = shop.query_row("SELECT count(*) FROM t", [], |row| row.get(0)).unwrap();
    assert_eq!(rows, 1, "the statement took effect once");
    house.stop(&worker);
}
