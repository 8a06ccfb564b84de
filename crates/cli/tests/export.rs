//! Records written through to a database by the leader, through the real programs: what is there, and that it is there once.

use std::fs;
use std::path::PathBuf;

use testkit::state::Piece;
use testkit::{Daemon, Postgres, RedisServer, Signal, bin};

mod support;

use support::{COMMAND_TIMEOUT, DB, Program, Ran, push, until, until_all, until_there};

const PROGRAM: &str = env!("CARGO_BIN_EXE_drayman");

/// Ends well, unless it is told to fail.
const STEP: &str = r#"
import json, sys
for line in sys.stdin:
    call = json.loads(line)
    if call["type"] == "rows":
        results = [{"status": "failed", "error": "bad"} if row["input"] == "bad" else {} for row in call["rows"]]
        print(json.dumps({"type": "rows", "id": call["id"], "results": results}), flush=True)
    elif call["type"] == "job":
        said = {"type": "result", "id": call["id"]}
        if call["input"] == "bad":
            said = {"type": "error", "id": call["id"], "error": "it's bad", "wish": "retry"}
        print(json.dumps(said), flush=True)
"#;

struct House {
    server: RedisServer,
    postgres: Option<Postgres>,
    drayman: Program,
}

impl House {
    /// With a database of history on PostgreSQL, or in a file.
    fn build(postgres: Option<Postgres>, max_pending: u64) -> Self {
        let server = RedisServer::start();
        let home = server.dir().to_owned();
        fs::write(home.join("step.py"), STEP).unwrap();
        let history = match &postgres {
            None => format!("kind = 'sqlite'\npath = '{}/history/records.db'\ncreate = true\n", home.display()),
            Some(postgres) => {
                block_on(async {
                    postgres.create_database("history").await;
                    postgres.create_user("scribe", "secret").await;
                });
                let (host, port) = postgres.host_port();
                fs::write(home.join("password"), "secret").unwrap();
                format!(
                    "kind = 'postgres'\nhost = '{host}'\nport = {port}\ndbname = 'history'\nuser = 'scribe'\n\
                     password_file = '{}/password'\ntls = 'disable'\n",
                    home.display()
                )
            }
        };
        let config = format!(
            "[redis]\nurl = '{url}'\ncommand_timeout = '{COMMAND_TIMEOUT}'\n\
             [worker]\npools = []\nsession_lifetime = '2s'\n\
             [objects]\nurl = 'file://{home}/objects'\n[chunks]\nserve = true\n\
             [export]\ndatabase = 'history'\nmax_pending = {max_pending}\n[databases.history]\n{history}\
             [databases.shop]\nkind = 'sqlite'\npath = '{home}/shop.db'\ncreate = true\n\
             [[handlers]]\napp = 'etl'\nop = 'step'\nkind = 'program'\nsize = 4\nrows = 50\n\
             command = ['/usr/bin/env', 'python3', '{home}/step.py']\n",
            url = server.url_db(DB),
            home = home.display(),
        );
        fs::write(home.join("worker.toml"), config).unwrap();
        let drayman = Program::new(PROGRAM, &server);
        Self { server, postgres, drayman }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.server.dir().join(name)
    }

    fn worker(&self) -> Daemon {
        let config = self.path("worker.toml").display().to_string();
        Daemon::spawn(bin("drayman-worker"), &["--config", &config], &[])
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) -> Ran {
        let ran = self.drayman.run(args);
        assert_eq!(ran.code, 0, "{args:?}: {ran:?}");
        ran
    }

    /// What a query of history finds, a line a row; nothing while there is no such table.
    fn ask(&self, sql: &str) -> Vec<String> {
        match &self.postgres {
            Some(postgres) => {
                let rows = block_on(postgres.try_query("history", sql)).unwrap_or_default();
                let text =
                    |row: Vec<Option<String>>| row.into_iter().map(Option::unwrap_or_default).collect::<Vec<_>>();
                rows.into_iter().map(|row| text(row).join("|")).collect()
            }
            None => {
                let path = self.path("history/records.db");
                let Ok(database) = rusqlite::Connection::open(path) else { return Vec::new() };
                database.busy_timeout(testkit::PATIENCE).unwrap();
                let Ok(mut statement) = database.prepare(sql) else { return Vec::new() };
                let width = statement.column_count();
                let text = |value: rusqlite::types::Value| match value {
                    rusqlite::types::Value::Integer(number) => number.to_string(),
                    rusqlite::types::Value::Text(text) => text,
                    _ => String::new(),
                };
                let row = |row: &rusqlite::Row<'_>| {
                    let columns = (0..width).map(|at| row.get(at).map(text)).collect::<Result<Vec<_>, _>>()?;
                    Ok(columns.join("|"))
                };
                statement.query_map([], row).unwrap().map(Result::unwrap).collect()
            }
        }
    }

    fn count(&self, table: &str) -> u64 {
        let found = self.ask(&format!("SELECT count(*) FROM {table}"));
        found.first().and_then(|count| count.parse().ok()).unwrap_or(0)
    }

    /// Tasks, each with an id of its own.
    fn submit(&self, from: u64, to: u64) {
        let lines: String = (from..=to).map(|n| format!("{{\"id\": \"t{n}\", \"input\": {n}}}\n")).collect();
        let args = ["submit", "--user", "ann", "--app", "etl", "--op", "step", "--jsonl"];
        let ran = self.drayman.run_with(&args, lines.as_bytes());
        assert_eq!(ran.code, 0, "{}", ran.err);
    }

    fn pending(&self) -> usize {
        self.server.state(DB).to_export()
    }

    fn stop(&self, worker: &Daemon) {
        worker.signal(Signal::SIGTERM);
        assert!(worker.wait().success(), "{}", worker.output());
    }
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Runtime::new().unwrap().block_on(work)
}

fn records_of_every_kind_are_there_once(house: &House) {
    let worker = house.worker();
    until("the feed is on", || house.server.state(DB).has(Piece::FeedOn));
    let submit = |id: &str, more: &[&str]| {
        let args = [&["submit", "--user", "o'neil", "--id", id, "--wait"], more].concat();
        house.drayman.start(&args).end_with(&worker)
    };
    let tags = ["--database", "shop", "--tag", "x", "CREATE TABLE t (n); INSERT INTO t VALUES (1)"];
    assert_eq!(submit("sql", &tags).code, 0);
    assert_eq!(submit("broken", &["--database", "shop", "SELECT * FROM nowhere"]).code, 1);
    let task = ["--app", "etl", "--op", "step", "--max-attempts", "3", "--retry-delay", "10ms"];
    assert_eq!(submit("task", &[&task[..], &["1"]].concat()).code, 0);
    assert_eq!(submit("tried", &[&task[..], &["\"bad\""]].concat()).code, 1);
    let rows = house.path("rows.jsonl");
    fs::write(&rows, "1\n2\n\"bad\"\n").unwrap();
    let rows = rows.display().to_string();
    let batch = [
        "batch", "submit", "--user", "ann", "--app", "etl", "--op", "step", "--id", "rows", "--format", "jsonl",
        "--wait", &rows,
    ];
    let ran = house.drayman.start(&batch).end_with(&worker);
    assert_ne!(ran.code, 2, "{ran:?}");
    fs::write(
        house.path("flow.toml"),
        "name = 'nightly'\nparams.day = { type = 'date-time' }\n[[steps]]\nname = 'copy'\nkind = 'chunk'\nchunk_size = 2\n\
         reader = { kind = 'list', items = [{ n = 1 }, { n = 2 }, { n = 3 }] }\nwriter = { kind = 'list' }\n\
         [[steps]]\nname = 'end'\nkind = 'task'\napp = 'etl'\nop = 'step'\n\
         [[steps]]\nname = 'alarm'\nkind = 'task'\napp = 'etl'\nop = 'step'\non = 'failed'\n",
    )
    .unwrap();
    let flow = house.path("flow.toml").display().to_string();
    let launch = ["flow", "launch", &flow, "--user", "ann", "-p", "day=2026-03-01", "--id", "night", "--wait"];
    let ran = house.drayman.start(&launch).end_with(&worker);
    assert_eq!(ran.code, 0, "{ran:?}");
    house.ok(&["track", "--tracker", "cron", "run", "--create", "backup", "--", "true"]);
    house.drayman.run(&["track", "--tracker", "cron", "run", "--create", "upload", "--", "false"]);

    until("all is written", || house.count("drayman_tracked") == 2 && house.pending() == 0);
    let jobs = house
        .ask("SELECT id, kind, owner, status, app, database_name, flow, tags, attempts FROM drayman_jobs ORDER BY id");
    assert_eq!(
        jobs,
        [
            "broken|sql|o'neil|failed||shop|||",
            "night:copy|task|ann|done|drayman||night||",
            "night:end|task|ann|done|etl||night||",
            "sql|sql|o'neil|done||shop||x|",
            "task|task|o'neil|done|etl||||",
            "tried|task|o'neil|ignored|etl||||3",
        ]
    );
    let tries = house.ask("SELECT id, number, error FROM drayman_attempts ORDER BY id, number");
    assert_eq!(tries, ["tried|1|it's bad", "tried|2|it's bad", "tried|3|it's bad"]);
    let times = "SELECT count(*) FROM drayman_jobs WHERE created_at <= started_at AND started_at <= ended_at";
    assert_eq!(house.ask(times), ["6"]);
    let batches = house.ask("SELECT id, owner, status, app, row_count, done, failed FROM drayman_batches");
    assert_eq!(batches, ["rows|ann|failed|etl|3|2|1"]);
    let flows = house.ask("SELECT id, flow, owner, status, params FROM drayman_flows");
    assert_eq!(
        flows,
        [r#"night|nightly|ann|done|{"day":{"type":"date-time","value":"2026-03-01","identifying":true}}"#]
    );
    let steps = house.ask(
        "SELECT number, name, status, read_count, write_count, commit_count FROM drayman_flow_steps ORDER BY number",
    );
    assert_eq!(steps, ["1|copy|done|3|3|2", "2|end|done|||", "3|alarm|skipped|||"]);
    let tracked = house.ask("SELECT tracker, id, status, failures FROM drayman_tracked ORDER BY id");
    assert_eq!(tracked, ["cron|backup|succeeded|0", "cron|upload|failed|1"]);

    // What there is of the feed is in order.
    house.ok(&["doctor"]);

    // Anybody may write anything into a hash: it costs nobody else's record.
    let long = "x".repeat(100_000);
    push(&house.server, "odd", "ann", &[("kind", "task"), ("app", "no app"), ("tags", &long), ("created_at", "never")]);
    submit("after", &[&task[..], &["1"]].concat());
    until("both are written", || house.ask("SELECT id FROM drayman_jobs WHERE id IN ('odd', 'after')").len() == 2);
    let odd = house.ask("SELECT status, tags, created_at, error FROM drayman_jobs WHERE id = 'odd'");
    assert_eq!(odd, ["failed|||its app is no valid name"]);
    house.stop(&worker);
}

#[test]
fn records_of_every_kind_are_there_once_in_sqlite() {
    let house = House::build(None, 1_000_000);
    fs::create_dir(house.path("history")).unwrap();
    records_of_every_kind_are_there_once(&house);
}

#[test]
fn records_of_every_kind_are_there_once_in_postgresql() {
    records_of_every_kind_are_there_once(&House::build(Some(Postgres::start()), 1_000_000));
}

#[test]
fn a_leader_that_is_killed_again_and_again_loses_no_record_and_writes_none_twice() {
    const JOBS: u64 = 4_000;
    let house = House::build(Some(Postgres::start()), 1_000_000);
    let first = house.worker();
    until("the feed is on", || house.server.state(DB).has(Piece::FeedOn));
    house.submit(1, JOBS);
    let mut worker = first;
    for part in 1..=3 {
        until_there("some more are written", part * JOBS / 5, || house.count("drayman_jobs"));
        worker.signal(Signal::SIGKILL);
        worker.wait();
        worker = house.worker();
    }
    let ends = || house.server.state(DB).finished().len() as u64;
    until_all("all have ended", JOBS, ends);
    until_all("all are written", JOBS, || house.count("drayman_jobs"));
    until("nothing is left to be written", || house.pending() == 0);
    assert_eq!(house.ask("SELECT count(DISTINCT id) FROM drayman_jobs"), [JOBS.to_string()]);
    assert_eq!(house.ask("SELECT dropped FROM drayman_export"), ["0"]);
    house.stop(&worker);
}

#[test]
fn records_wait_for_a_database_that_is_away_and_what_is_dropped_is_counted() {
    let house = House::build(None, 100);
    let worker = house.worker();
    until("it is said", || worker.output().contains("records can't be exported now"));
    house.submit(1, 50);
    until_all("they wait", 50, || house.pending() as u64);
    fs::create_dir(house.path("history")).unwrap();
    until_all("they are written", 50, || house.count("drayman_jobs"));
    house.stop(&worker);

    // Nobody reads, and more end than may wait.
    fs::rename(house.path("history"), house.path("away")).unwrap();
    let worker = house.worker();
    until("it is said again", || worker.output().contains("records can't be exported now"));
    house.submit(51, 1050);
    until_all("all have ended", 1050, || house.server.state(DB).finished().len() as u64);
    fs::rename(house.path("away"), house.path("history")).unwrap();
    let dropped = || house.ask("SELECT dropped FROM drayman_export").first().map_or(0, |text| text.parse().unwrap());
    until_all("what is left is written", 1050, || house.count("drayman_jobs") + dropped());
    assert!(dropped() > 500, "{} are dropped", dropped());
    assert!(worker.output().contains("records were dropped before they could be exported"));
    house.stop(&worker);
}

#[test]
fn without_an_exporter_nothing_is_kept_for_one() {
    let house = House::build(None, 100);
    let config = fs::read_to_string(house.path("worker.toml")).unwrap();
    fs::write(house.path("worker.toml"), config.replace("[export]\ndatabase = 'history'\nmax_pending = 100\n", ""))
        .unwrap();
    let worker = house.worker();
    house.submit(1, 20);
    until_all("they have ended", 20, || house.server.state(DB).finished().len() as u64);
    assert!(!house.server.state(DB).has_any(&[Piece::Feed, Piece::FeedOn]));
    house.stop(&worker);
}
