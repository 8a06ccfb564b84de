//! Steps that work in chunks, declared in definitions and run by real workers: what is read, made and written, counted and passed over,
//! and what a killed worker costs.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};
use testkit::{Daemon, Postgres, RedisServer, Signal, bin};

mod support;

use support::{COMMAND_TIMEOUT, DB, Program, Ran, until, until_there};

const PROGRAM: &str = env!("CARGO_BIN_EXE_drayman");
const PAGE: &str = include_str!("../../../docs/flows.md");
const ORDERS: &str = include_str!("../../worker/examples/orders-declared.toml");

/// Makes something of items, and writes chunks.
const STEP: &str = r#"
import json, os, sys, time
home = sys.argv[1]
seen = {}

def made(item):
    n = int(item["n"])
    if item.get("do") == "bad" and not os.path.exists(os.path.join(home, "mended")):
        return {"status": "failed", "error": f"{n} is no good"}
    if item.get("do") == "none":
        return {}
    if item.get("do") == "flaky":
        seen[n] = seen.get(n, 0) + 1
        if seen[n] < 3:
            return {"status": "retry", "error": "not yet"}
    while item.get("do") == "wait" and not os.path.exists(os.path.join(home, "go")):
        time.sleep(0.01)
    return {"result": {"n": n, "square": n * n}}

for line in sys.stdin:
    call = json.loads(line)
    if call["type"] == "rows":
        with open(os.path.join(home, "made"), "a") as out:
            for row in call["rows"]:
                print(row["input"]["n"], file=out)
        say = {"type": "rows", "id": call["id"], "results": [made(row["input"]) for row in call["rows"]]}
    elif call["type"] == "job":
        with open(os.path.join(home, "handed"), "a") as out:
            print(json.dumps([call["context"]["chunk"], [item["n"] for item in call["input"]]]), file=out)
        say = {"type": "result", "id": call["id"]}
    else:
        continue
    print(json.dumps(say), flush=True)
"#;

struct House {
    server: RedisServer,
    postgres: Option<Postgres>,
    drayman: Program,
}

impl House {
    fn build() -> Self {
        Self::with(None)
    }

    fn with(postgres: Option<Postgres>) -> Self {
        let server = RedisServer::start();
        let home = server.dir().to_owned();
        fs::write(home.join("step.py"), STEP).unwrap();
        let mut config = format!(
            "[redis]\nurl = '{url}'\ncommand_timeout = '{COMMAND_TIMEOUT}'\n\
             [worker]\npools = ['db:shop']\nsession_lifetime = '2s'\n\
             [objects]\nurl = 'file://{home}/objects'\n[chunks]\nserve = true\nfolder = '{home}/files'\n\
             [databases.shop]\nkind = 'sqlite'\npath = '{home}/shop.db'\ncreate = true\n\
             [[handlers]]\napp = 'etl'\nop = 'step'\nkind = 'program'\nrows = 50\n\
             command = ['/usr/bin/env', 'python3', '{home}/step.py', '{home}']\n",
            url = server.url_db(DB),
            home = home.display(),
        );
        if let Some(postgres) = &postgres {
            block_on(async {
                postgres.create_database("bank").await;
                postgres.create_user("teller", "secret").await;
            });
            let (host, port) = postgres.host_port();
            fs::write(home.join("password"), "secret").unwrap();
            config.push_str(&format!(
                "[databases.bank]\nkind = 'postgres'\nhost = '{host}'\nport = {port}\ndbname = 'bank'\nuser = 'teller'\n\
                 password_file = '{home}/password'\ntls = 'disable'\n",
                home = home.display(),
            ));
        }
        fs::create_dir(home.join("files")).unwrap();
        fs::write(home.join("worker.toml"), config).unwrap();
        let drayman = Program::new(PROGRAM, &server);
        Self { server, postgres, drayman }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.server.dir().join(name)
    }

    fn file(&self, name: &str, text: &str) {
        fs::write(self.path("files").join(name), text).unwrap();
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    fn worker(&self) -> Daemon {
        let config = self.path("worker.toml").display().to_string();
        Daemon::spawn(bin("drayman-worker"), &["--config", &config], &[])
    }

    /// It leads, and runs nothing: so what a killed one leaves is found at once.
    fn leader(&self) -> Daemon {
        let idle = self.path("idle.toml");
        let url = self.server.url_db(DB);
        let config = format!(
            "[redis]\nurl = '{url}'\ncommand_timeout = '{COMMAND_TIMEOUT}'\n\
             [worker]\npools = ['db:none']\nsession_lifetime = '2s'\n"
        );
        fs::write(&idle, config).unwrap();
        let leader = Daemon::spawn(bin("drayman-worker"), &["--config", &idle.display().to_string()], &[]);
        until("it leads", || leader.output().contains("leading"));
        leader
    }

    fn sqlite(&self) -> rusqlite::Connection {
        let connection = rusqlite::Connection::open(self.path("shop.db")).unwrap();
        connection.busy_timeout(testkit::PATIENCE).unwrap();
        connection
    }

    /// Runs SQL on PostgreSQL, and gives the rows with blanks between their columns.
    fn bank(&self, sql: &str) -> Vec<String> {
        let rows = block_on(self.postgres.as_ref().unwrap().query("bank", sql));
        let text =
            |row: Vec<Option<String>>| row.into_iter().map(Option::unwrap_or_default).collect::<Vec<_>>().join(" ");
        rows.into_iter().map(text).collect()
    }

    /// Launches a flow of these steps; `id` is that of the execution.
    fn launch(&self, id: &str, steps: &str, more: &[&str]) -> Ran {
        let path = self.path(&format!("{id}.toml"));
        fs::write(&path, format!("name = 'flow'\nany_params = true\n{steps}")).unwrap();
        let path = path.display().to_string();
        self.drayman.run(&[&["flow", "launch", &path, "--user", "ann", "--id", id], more].concat())
    }

    fn step(&self, id: &str, name: &str) -> Value {
        let steps = self.drayman.run(&["flow", "steps", id, "--json"]).json();
        steps.into_iter().find(|step| step["name"] == name).unwrap_or_else(|| panic!("no step {name}"))
    }

    fn result(&self, id: &str, step: &str) -> Value {
        let ran = self.drayman.run(&["result", &format!("{id}:{step}")]);
        assert_eq!(ran.code, 0, "{ran:?} {:?}", self.step(id, step));
        serde_json::from_str(&ran.out).unwrap()
    }

    fn counts(&self, id: &str, step: &str) -> [u64; 6] {
        counts(&self.result(id, step))
    }

    fn stop(&self, worker: &Daemon) {
        worker.signal(Signal::SIGTERM);
        assert!(worker.wait().success(), "{}", worker.output());
    }
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Runtime::new().unwrap().block_on(work)
}

/// Read, written, filtered, passed over, committed, rolled back.
fn counts(of: &Value) -> [u64; 6] {
    let names = ["read_count", "write_count", "filter_count", "skip_count", "commit_count", "rollback_count"];
    names.map(|name| of[name].as_u64().unwrap_or_else(|| panic!("{of} has no {name}")))
}

fn csv(rows: impl Iterator<Item = (u64, &'static str)>) -> String {
    rows.fold("n,do\n".into(), |text, (n, what)| text + &format!("{n},{what}\n"))
}

#[test]
fn the_definition_that_the_page_shows_is_whole() {
    let house = House::build();
    let (_, rest) = PAGE.split_once("<!-- test: flow load -->\n```toml\n").expect("it is marked");
    let path = house.path("page.toml");
    fs::write(&path, rest.split_once("```").expect("it ends").0).unwrap();
    let ran = house.drayman.run(&["flow", "check", &path.display().to_string()]);
    assert_eq!((ran.code, ran.out.ends_with("load with 2 steps\n")), (0, true), "{ran:?}");
    fs::write(&path, format!("name = 'batch'\n{BATCH}")).unwrap();
    let ran = house.drayman.run(&["flow", "check", "--served", &path.display().to_string()]);
    assert_eq!(ran.code, 4, "{ran:?}");
    for missing in [
        "step square: no worker serves drayman.chunk",
        "step square: no worker serves etl.step",
        "step insert: no worker serves db:shop",
    ] {
        assert!(ran.err.contains(missing), "{ran:?}");
    }
}

#[test]
fn items_go_from_every_reader_through_every_processor_to_every_writer() {
    let house = House::with(Some(Postgres::start()));
    house.bank("CREATE TABLE squares (n bigint PRIMARY KEY, square numeric, day date); GRANT ALL ON squares TO teller");
    let what = |n| match n {
        7 => "bad",
        n if n % 10 == 3 => "none",
        _ => "",
    };
    house.file("numbers-2026-03-01.csv", &csv((1..=100).map(|n| (n, what(n)))));
    house.file("lines.jsonl", "{\"n\": 1, \"big\": 12345678901234567890.10}\n\nno json\n{\"n\": 2}\n{\"n\": 3}\n");
    let worker = house.worker();
    let steps = r#"
        [[steps]]
        name = "list"
        kind = "chunk"
        chunk_size = 10
        reader = { kind = "list", items = [{ n = 1 }, { n = 2, day = "<%= day %>" }, { n = 30 }] }
        processor = { kind = "filter", keep = [{ field = "n", min = 2, max = 29.5 }] }
        writer = { kind = "list" }

        [[steps]]
        name = "load"
        kind = "chunk"
        chunk_size = 30
        skip_limit = 1
        reader = { kind = "csv", file = "numbers-<%= day %>.csv" }
        processor = { kind = "handler", app = "etl", op = "step" }
        writer = { kind = "sql", database = "bank", query = "INSERT INTO squares VALUES (:n, :square, <%= day %>)" }

        [[steps]]
        name = "export"
        kind = "chunk"
        reader = { kind = "sql", database = "bank", query = "SELECT *, n::text || ';\"' AS label FROM squares WHERE day = <%= day %>;", key = ["n"] }
        writer = { kind = "csv", file = "out/squares.csv", columns = ["label", "square", "none"] }

        [[steps]]
        name = "lines"
        kind = "chunk"
        skip_limit = 1
        reader = { kind = "json-lines", file = "lines.jsonl" }
        writer = { kind = "json-lines", file = "out/lines.jsonl" }

        [[steps]]
        name = "table"
        kind = "sql"
        database = "shop"
        query = "CREATE TABLE t (label TEXT, square REAL, n INTEGER)"

        [[steps]]
        name = "copy"
        kind = "chunk"
        chunk_size = 40
        reader = { kind = "csv", file = "out/squares.csv" }
        writer = { kind = "sql", database = "shop", query = "INSERT INTO t VALUES (:label, :square, length(<%= day %>))" }

        [[steps]]
        name = "hand"
        kind = "chunk"
        chunk_size = 40
        reader = { kind = "sql", database = "shop", query = "SELECT rowid AS n, label FROM t", key = ["label", "n"] }
        writer = { kind = "handler", app = "etl", op = "step" }
    "#;
    let ran = house.launch("day", steps, &["-p", "day=2026-03-01", "--wait"]);
    assert_eq!(ran.code, 0, "{ran:?}\n{}", house.drayman.run(&["flow", "show", "day"]).out);

    let list = house.result("day", "list");
    assert_eq!((counts(&list), &list["items"]), ([3, 1, 2, 0, 1, 0], &json!([{ "n": 2, "day": "2026-03-01" }])));
    assert_eq!(house.counts("day", "load"), [100, 89, 10, 1, 4, 0]);
    let skipped = house.step("day", "load")["checkpoint"]["skipped"].clone();
    assert_eq!(skipped, json!([{ "item": 7, "error": "7 is no good" }]));
    let sum: u64 = (1..=100).filter(|n| what(*n).is_empty()).map(|n| n * n).sum();
    assert_eq!(house.bank("SELECT count(*), sum(square), max(day) FROM squares"), [format!("89 {sum} 2026-03-01")]);
    assert_eq!(house.counts("day", "export"), [89, 89, 0, 0, 1, 0]);
    let squares = house.text("files/out/squares.csv");
    assert!(squares.starts_with("label,square,none\n\"1;\"\"\",1,\n\"2;\"\"\",4,\n"), "{squares:?}");
    assert_eq!(house.counts("day", "lines"), [4, 3, 0, 1, 1, 0]);
    let lines = house.text("files/out/lines.jsonl");
    assert_eq!(
        lines, "{\"n\": 1, \"big\": 12345678901234567890.10}\n{\"n\": 2}\n{\"n\": 3}\n",
        "numbers keep their digits"
    );
    assert_eq!(house.counts("day", "copy"), [89, 89, 0, 0, 3, 0]);
    let copied: (i64, f64, i64) = house
        .sqlite()
        .query_row("SELECT count(*), sum(square), max(n) FROM t", [], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        .unwrap();
    assert_eq!(copied, (89, sum as f64, 10));
    assert_eq!(house.counts("day", "hand"), [89, 89, 0, 0, 3, 0]);
    let handed: Vec<(u64, Vec<u64>)> =
        house.text("handed").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(
        handed.iter().map(|(chunk, items)| (*chunk, items.len())).collect::<Vec<_>>(),
        [(1, 40), (2, 40), (3, 9)]
    );
    let all: BTreeSet<u64> = handed.into_iter().flat_map(|(_, items)| items).collect();
    assert_eq!(all, (1..=89).collect());
    house.stop(&worker);
}

#[test]
fn a_worker_that_is_killed_again_and_again_writes_each_item_once() {
    const ITEMS: u64 = 6_000;
    let house = House::with(Some(Postgres::start()));
    house.bank("CREATE TABLE squares (n bigint, square bigint); GRANT ALL ON squares TO teller");
    house.sqlite().execute_batch("CREATE TABLE squares (n INTEGER, square INTEGER)").unwrap();
    let what = |n| if n % 100 == 50 { "bad" } else { "" };
    house.file("numbers.csv", &csv((1..=ITEMS).map(|n| (n, what(n)))));
    let step = |name: &str, writer: &str| {
        format!(
            "[[steps]]\nname = '{name}'\nkind = 'chunk'\nchunk_size = 100\nskip_limit = 1000\n\
             reader = {{ kind = 'csv', file = 'numbers.csv' }}\n\
             processor = {{ kind = 'handler', app = 'etl', op = 'step' }}\nwriter = {{ {writer} }}\n"
        )
    };
    let sql =
        |database| format!("kind = 'sql', database = '{database}', query = 'INSERT INTO squares VALUES (:n, :square)'");
    let steps = [
        step("bank", &sql("bank")),
        step("shop", &sql("shop")),
        step("file", "kind = 'json-lines', file = 'squares.jsonl'"),
    ];
    assert_eq!(house.launch("run", &steps.concat(), &[]).code, 0);
    let committed = |step: &str| house.step("run", step)["checkpoint"]["commit_count"].as_u64().unwrap_or(0);
    let total = || ["bank", "shop", "file"].map(committed).iter().sum::<u64>();
    let leader = house.leader();
    let mut kills = 0;
    while total() < 150 {
        let before = total();
        let worker = house.worker();
        until_there("some more chunks are committed", before + 15, total);
        worker.signal(Signal::SIGKILL);
        worker.wait();
        kills += 1;
    }
    assert!(kills >= 3, "{kills} kills");
    let worker = house.worker();
    assert_eq!(house.drayman.start(&["watch", "run"]).end_with(&worker).code, 0);
    house.stop(&worker);
    house.stop(&leader);
    let good: Vec<u64> = (1..=ITEMS).filter(|n| what(*n).is_empty()).collect();
    let (count, sum): (u64, u64) = (good.len() as u64, good.iter().map(|n| n * n).sum());
    assert_eq!(
        house.bank("SELECT count(*), count(DISTINCT n), sum(square) FROM squares"),
        [format!("{count} {count} {sum}")]
    );
    let in_shop: (i64, i64, i64) = house
        .sqlite()
        .query_row("SELECT count(*), count(DISTINCT n), sum(square) FROM squares", [], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?))
        })
        .unwrap();
    assert_eq!(in_shop, (count as i64, count as i64, sum as i64));
    let lines: Vec<u64> = house
        .text("files/squares.jsonl")
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["n"].as_u64().unwrap())
        .collect();
    assert_eq!(lines, good);
    for step in ["bank", "shop", "file"] {
        let [read, write, filter, skip, commit, _] = house.counts("run", step);
        assert_eq!((read, write, filter, skip, commit), (ITEMS, count, 0, ITEMS - count, ITEMS / 100), "{step}");
    }
}

#[test]
fn a_step_that_is_stopped_goes_on_behind_its_last_chunk() {
    let house = House::build();
    house.sqlite().execute_batch("CREATE TABLE squares (n INTEGER, square INTEGER)").unwrap();
    house.file("numbers.csv", &csv((1..=100).map(|n| (n, if n == 42 { "wait" } else { "" }))));
    let steps = "[[steps]]\nname = 'load'\nkind = 'chunk'\nchunk_size = 10\n\
        reader = { kind = 'csv', file = 'numbers.csv' }\nprocessor = { kind = 'handler', app = 'etl', op = 'step' }\n\
        writer = { kind = 'sql', database = 'shop', query = 'INSERT INTO squares VALUES (:n, :square)' }\n";
    let worker = house.worker();
    assert_eq!(house.launch("one", steps, &[]).code, 0);
    until("it is at the item that waits", || house.text("made").lines().any(|n| n == "42"));
    assert_eq!(house.drayman.run(&["flow", "stop", "one"]).code, 0);
    until("it is stopped", || house.step("one", "load")["status"] == "cancelled");
    assert_eq!(house.step("one", "load")["checkpoint"]["write_count"], 40);
    fs::write(house.path("go"), "").unwrap();
    let ran = house.drayman.run(&["flow", "restart", "one", "--id", "two", "--wait"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let [read, write, ..] = house.counts("two", "load");
    assert_eq!((read, write), (100, 100));
    let written: (i64, i64) = house
        .sqlite()
        .query_row("SELECT count(*), count(DISTINCT n) FROM squares", [], |row| Ok((row.get(0)?, row.get(1)?)))
        .unwrap();
    assert_eq!(written, (100, 100));
    let firsts = house.text("made").lines().filter(|n| *n == "1").count();
    assert_eq!(firsts, 1, "what was committed is not worked on again");
    house.stop(&worker);
}

/// Each way in refuses it with the same words, and passes over nothing of it however much may be passed over.
#[test]
fn a_file_that_can_not_be_read_whole_is_refused_by_its_line_by_chunk_and_batch_steps() {
    let house = House::build();
    let worker = house.worker();
    for (number, (kind, text, wanted)) in [
        ("csv", "n,do\n1,\n2,\"\n3,\n4,\n", "line 3: a quote is not closed"),
        ("csv", "n,do\n1,\"\n2,\"x\"\n3,\n", "line 2: text follows a closing quote"),
        ("csv", "n,do,n\n1,,2\n", "line 1: the header names \"n\" twice"),
        ("csv", "", "line 1: there is no header"),
    ]
    .into_iter()
    .enumerate()
    {
        house.file("bad", text);
        for step in [
            "kind = 'chunk'\nwriter = { kind = 'json-lines', file = 'out.jsonl' }\n",
            "kind = 'batch'\napp = 'etl'\nop = 'step'\n",
        ] {
            let id = format!("{}-{number}", &step[8..13]);
            let step = format!(
                "[[steps]]\nname = 'a'\n{step}skip_limit = 100\nreader = {{ kind = '{kind}', file = 'bad' }}\n"
            );
            let ran = house.launch(&id, &step, &["-p", &format!("id={id}"), "--wait"]);
            let step = house.step(&id, "a");
            assert_eq!((ran.code, &step["status"]), (1, &json!("failed")), "{text:?}: {step}");
            let error = step["error"].as_str().unwrap();
            assert!(error.ends_with(&format!("files/bad: {wanted}")), "{text:?}: {error:?}");
        }
    }
    // What is wrong with one row alone is that row's fault.
    for (number, (kind, text, wanted)) in [
        (
            "csv",
            "n,do\n1,\n2\n3,,\n4,\0\n",
            [
                "line 3: it has 1 fields, the header has 2",
                "line 4: it has 3 fields, the header has 2",
                "line 5: it has a NUL byte",
            ],
        ),
        (
            "json-lines",
            "{\"n\":1}\n{\"n\":1,\"n\":2}\n3 4\n{\"n\":",
            [
                "line 2: it names \"n\" twice",
                "line 3: it is no JSON: trailing characters",
                "line 4: it is no JSON: EOF while parsing a value",
            ],
        ),
    ]
    .into_iter()
    .enumerate()
    {
        house.file("bad", text);
        let step = format!(
            "[[steps]]\nname = 'a'\nkind = 'chunk'\nskip_limit = 100\nreader = {{ kind = '{kind}', file = 'bad' }}\nwriter = {{ kind = 'list' }}\n"
        );
        let id = format!("rows-{number}");
        assert_eq!(house.launch(&id, &step, &["-p", &format!("id={id}"), "--wait"]).code, 0, "{text:?}");
        let step = house.step(&id, "a");
        let skipped: Vec<&str> =
            step["checkpoint"]["skipped"].as_array().unwrap().iter().map(|s| s["error"].as_str().unwrap()).collect();
        assert_eq!(skipped, wanted, "{step}");
        let items = &house.result(&id, "a")["items"];
        assert_eq!(items.as_array().map(Vec::len), Some(1), "{items}");
    }
    house.stop(&worker);
}

/// The operator mends something and launches again.
#[test]
fn a_step_goes_on_only_in_the_file_that_it_has_read_and_says_so_otherwise() {
    let house = House::build();
    house.sqlite().execute_batch("CREATE TABLE squares (n INTEGER, square INTEGER)").unwrap();
    let rows = |rows: &[u64]| csv(rows.iter().map(|n| (*n, if *n == 6 { "bad" } else { "" })));
    let step = |file: &str, query: &str| {
        format!(
            "[[steps]]\nname = 'load'\nkind = 'chunk'\nchunk_size = 2\nreader = {{ kind = 'csv', file = '{file}' }}\n\
             processor = {{ kind = 'handler', app = 'etl', op = 'step' }}\n\
             writer = {{ kind = 'sql', database = 'shop', query = 'INSERT INTO squares VALUES ({query})' }}\n"
        )
    };
    const BOTH: &str = ":n, :square";
    let worker = house.worker();
    house.file("numbers.csv", &rows(&[1, 2, 3, 4, 5, 6, 7]));
    house.file("other.csv", &rows(&[1, 2, 3, 4, 5, 6, 7]));
    assert_eq!(house.launch("first", &step("numbers.csv", BOTH), &["--wait"]).code, 1);
    let saved = house.step("first", "load")["checkpoint"].clone();
    let (written, read) = (saved["write_count"].as_i64().unwrap(), saved["reader"]["length"].as_u64().unwrap());
    // The row before the bad one is a chunk of its own where the attempt lost its claim at it.
    assert!([4, 5].contains(&written), "{saved}");
    fs::write(house.path("mended"), "").unwrap();
    let refused = |id: &str, step: &str, wanted: &str| {
        assert_eq!(house.launch(id, step, &["--wait"]).code, 1, "{id}");
        let error = house.step(id, "load")["error"].as_str().unwrap().to_owned();
        let wanted =
            format!("it can't go on from its checkpoint: {wanted}. Put back what it began with; or begin anew: ");
        assert!(error.starts_with(&wanted), "{id}: {error:?}");
    };
    let count = || -> i64 { house.sqlite().query_row("SELECT count(*) FROM squares", [], |row| row.get(0)).unwrap() };
    let same = step("numbers.csv", BOTH);
    house.file("numbers.csv", &rows(&[1, 2, 3, 8, 5, 6, 7]));
    refused("edited", &same, &format!("the first {read} bytes of \"numbers.csv\" are not what they were"));
    house.file("numbers.csv", &rows(&[1, 2]));
    refused("shorter", &same, &format!("\"numbers.csv\" has 11 bytes, and had at least {read} before"));
    house.file("numbers.csv", &rows(&[1, 2, 3, 4, 5, 6, 7]));
    refused("other", &step("other.csv", BOTH), "its reader's file was \"numbers.csv\", and is \"other.csv\" now");
    let file = "writer = { kind = 'json-lines', file = 'squares.jsonl' }\n";
    let into_file = format!("{}{file}", same.split("writer").next().unwrap());
    refused("file", &into_file, "its writer was sql, and is json-lines now");
    assert_eq!(count(), written, "nothing was written meanwhile");
    // What lies behind may change as it likes.
    house.file("numbers.csv", &rows(&[1, 2, 3, 4, 5, 60, 7, 8]));
    assert_eq!(house.launch("mended", &same, &["--wait"]).code, 0, "{:?}", house.step("mended", "load"));
    let written: Vec<i64> = {
        let open = house.sqlite();
        let mut query = open.prepare("SELECT n FROM squares ORDER BY rowid").unwrap();
        query.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect()
    };
    assert_eq!(written, [1, 2, 3, 4, 5, 60, 7, 8]);
    house.stop(&worker);
}

#[test]
fn rows_that_another_statement_has_done_are_not_left_out() {
    let house = House::build();
    house.sqlite().execute_batch("CREATE TABLE t (n INTEGER CHECK (n <> 3)); CREATE TABLE u (n INTEGER)").unwrap();
    house.file("numbers.csv", &csv((1..=5).map(|n| (n, ""))));
    let step = |table: &str| {
        format!(
            "[[steps]]\nname = 'insert'\nkind = 'batch'\ndatabase = 'shop'\nquery = 'INSERT INTO {table} VALUES (:n)'\n\
             reader = {{ kind = 'csv', file = 'numbers.csv' }}\n"
        )
    };
    let worker = house.worker();
    assert_eq!(house.launch("none", &step("missing"), &["--wait"]).code, 1);
    assert_eq!(
        house.launch("one", &step("t"), &["--wait"]).code,
        1,
        "of the first nothing was done, so it may be mended"
    );
    assert_eq!(house.step("one", "insert")["rows"], rows(4, 0, 1, 0));
    assert_eq!(house.launch("two", &step("u"), &["--wait"]).code, 1);
    let error = house.step("two", "insert")["error"].as_str().unwrap().to_owned();
    let wanted =
        "it can't go on from its checkpoint: rows of one:insert:rows were done by another handler or statement. Put";
    assert!(error.starts_with(wanted), "{error:?}");
    house.file("numbers.csv", &csv([1, 2, 30, 4, 5].map(|n| (n, "")).into_iter()));
    assert_eq!(house.launch("three", &step("t"), &["--wait"]).code, 0, "{:?}", house.step("three", "insert"));
    assert_eq!(house.step("three", "insert")["rows"], rows(1, 0, 0, 0));
    house.stop(&worker);
}

#[test]
fn an_item_is_tried_again_and_one_that_the_database_refuses_is_passed_over() {
    let house = House::build();
    house.sqlite().execute_batch("CREATE TABLE t (n INTEGER CHECK (n <> 13) UNIQUE)").unwrap();
    house.file("numbers.csv", &csv((1..=20).map(|n| (n, if n % 5 == 0 { "flaky" } else { "" }))));
    let step = |attempts: u32, limit: u64| {
        format!(
            "[[steps]]\nname = 'load'\nkind = 'chunk'\nchunk_size = 8\nskip_limit = {limit}\nitem_attempts = {attempts}\n\
             item_delay = '1ms'\nreader = {{ kind = 'csv', file = 'numbers.csv' }}\n\
             processor = {{ kind = 'handler', app = 'etl', op = 'step' }}\n\
             writer = {{ kind = 'sql', database = 'shop', query = 'INSERT INTO t VALUES (:n)' }}\n"
        )
    };
    let worker = house.worker();
    assert_eq!(house.launch("strict", &step(1, 0), &["--wait"]).code, 1);
    let strict = house.step("strict", "load");
    assert_eq!((&strict["status"], &strict["error"]), (&json!("failed"), &json!("item 5: not yet")));
    assert_eq!(house.launch("lenient", &step(3, 1), &["--wait"]).code, 0, "{:?}", house.step("lenient", "load"));
    let [read, write, filter, skip, _, rollback] = house.counts("lenient", "load");
    // The first attempt was undone as well, in the execution before.
    assert_eq!((read, write, filter, skip, rollback), (20, 19, 0, 1, 2));
    let skipped = &house.step("lenient", "load")["checkpoint"]["skipped"][0];
    assert_eq!(skipped["item"], 13);
    assert!(skipped["error"].as_str().unwrap().contains("CHECK constraint failed"), "{skipped}");
    house.stop(&worker);
}

#[test]
fn what_cannot_be_done_is_refused_with_a_reason_and_passes_nothing_over() {
    let house = House::with(Some(Postgres::start()));
    house
        .sqlite()
        .execute_batch(
            "CREATE TABLE t (n INTEGER); CREATE TABLE n (k INTEGER); INSERT INTO n VALUES (NULL); \
                 CREATE TABLE d AS WITH RECURSIVE c(k) AS (SELECT 1 UNION ALL SELECT k + 1 FROM c WHERE k < 600) \
                 SELECT min(k, 500) AS k FROM c WHERE k < 502",
        )
        .unwrap();
    house.file("numbers.csv", "n\n1\n2\n");
    fs::write(house.path("secret.csv"), "n\n1\n").unwrap();
    let csv = "kind = 'csv', file = 'numbers.csv'";
    let sql = |query: &str| format!("kind = 'sql', database = 'shop', query = \"{query}\"");
    let list = "kind = 'list'".to_owned();
    let key = ", key = ['k']";
    let step = |reader: &str, writer: &str| {
        format!(
            "[[steps]]\nname = 'a'\nkind = 'chunk'\nskip_limit = 100\nreader = {{ {reader} }}\nwriter = {{ {writer} }}\n"
        )
    };
    let ran = house.launch("out", &step("kind = 'csv', file = '<%= file %>'", &list), &["-p", "file=../secret.csv"]);
    assert_eq!(ran.code, 2);
    assert!(ran.err.contains("its file \"../secret.csv\" is no path within the workers' folder"), "{}", ran.err);
    let worker = house.worker();
    for (id, reader, writer, wanted) in [
        ("table", csv, sql("INSERT INTO missing VALUES (:n)"), "no such table: missing"),
        ("syntax", csv, sql("INSERT INTO t VALUES (:n"), "incomplete input"),
        ("two", csv, sql("INSERT INTO t VALUES (:n); DELETE FROM t"), "it is more than one statement"),
        (
            "own",
            csv,
            sql("DELETE FROM drayman_checkpoints WHERE run <> :n"),
            "the table drayman_checkpoints is Drayman's own",
        ),
        ("attach", csv, sql("ATTACH :n AS other"), "a job may use its own database file only"),
        (
            "database",
            csv,
            "kind = 'sql', database = 'none', query = 'SELECT 1'".into(),
            "database 'none' is not known to this worker",
        ),
        ("handler", csv, "kind = 'handler', app = 'etl', op = 'step'".into(), ""),
        ("file", "kind = 'csv', file = 'missing.csv'", list.clone(), "No such file"),
        ("null", &(sql("SELECT k FROM n") + key), list.clone(), ""),
        ("twice", &(sql("SELECT k FROM d") + key), list.clone(), "two rows of the query have the same key, 500"),
        ("bytes", &(sql("SELECT x'00' AS k") + key), list.clone(), "a row has bytes in the column"),
        (
            "names",
            &("kind = 'sql', database = 'bank', query = 'SELECT 1 AS k, 2 AS b, 3 AS b'".to_owned() + key),
            list.clone(),
            "it names \"b\" twice",
        ),
        ("column", &(sql("SELECT 1 AS x") + key), list.clone(), "no such column: items.k"),
        ("writes", &(sql("DELETE FROM t RETURNING n AS k") + key), list, "syntax error"),
    ] {
        let ran = house.launch(id, &step(reader, &writer), &["-p", &format!("id={id}"), "--wait"]);
        let step = house.step(id, "a");
        let error = step["error"].as_str().unwrap_or_default();
        if wanted.is_empty() {
            assert_eq!(ran.code, 0, "{id}: {step}");
        } else {
            assert_eq!(ran.code, 1, "{id}: {step}");
            assert!(error.contains(wanted), "{id}: {error:?} does not say {wanted:?}");
        }
    }
    let count: i64 = house.sqlite().query_row("SELECT count(*) FROM t", [], |row| row.get(0)).unwrap();
    assert_eq!(count, 0);
    house.stop(&worker);
}

/// A flow whose rows are a file's, and are worked on by the program.
const BATCH: &str = "[[steps]]\nname = 'square'\nkind = 'batch'\napp = 'etl'\nop = 'step'\n\
    reader = { kind = 'csv', file = 'numbers.csv' }\nprocessor = { kind = 'filter', keep = [{ field = 'n', min = 3 }] }\n\
    [[steps]]\nname = 'insert'\nkind = 'batch'\ndatabase = 'shop'\nquery = 'INSERT INTO t VALUES (:n)'\n\
    reader = { kind = 'json-lines', file = 'numbers.jsonl' }\n";

fn rows(done: u64, skipped: u64, failed: u64, aborted: u64) -> Value {
    let all = done + failed + aborted;
    json!({ "rows": all, "pending": 0, "done": done, "skipped": skipped, "failed": failed, "aborted": aborted })
}

#[test]
fn a_step_that_is_a_batch_ends_with_its_rows_and_repeats_none_that_are_done() {
    let house = House::build();
    house.sqlite().execute_batch("CREATE TABLE t (n INTEGER)").unwrap();
    house.file("numbers.csv", &csv((1..=500).map(|n| (n, if n == 77 { "bad" } else { "" }))));
    house.file("numbers.jsonl", &(1..=300).map(|n| format!("{{\"n\": {n}}}\n")).collect::<String>());
    let worker = house.worker();
    assert_eq!(house.launch("one", BATCH, &["--wait"]).code, 1);
    let square = house.step("one", "square");
    assert_eq!((&square["status"], &square["rows"]), (&json!("failed"), &rows(497, 0, 1, 0)), "{square}");
    assert_eq!(square["error"], "1 of 498 rows failed");
    assert_eq!(house.step("one", "insert")["status"], "skipped");
    let failed = house.drayman.run(&["batch", "rows", "one:square:rows", "--failed", "--json"]).json();
    assert_eq!(failed.len(), 1);

    fs::write(house.path("mended"), "").unwrap();
    assert_eq!(house.drayman.run(&["flow", "restart", "one", "--id", "two", "--wait"]).code, 0);
    assert_eq!(house.step("two", "square")["rows"], rows(1, 0, 0, 0), "the one that had failed");
    assert_eq!(house.step("two", "insert")["rows"], rows(300, 0, 0, 0));
    let mut made: Vec<u64> = house.text("made").lines().map(|n| n.parse().unwrap()).collect();
    made.sort_unstable();
    let mut expected: Vec<u64> = (3..=500).chain([77]).collect();
    expected.sort_unstable();
    assert_eq!(made, expected);
    let inserted: (i64, i64) = house
        .sqlite()
        .query_row("SELECT count(*), count(DISTINCT n) FROM t", [], |row| Ok((row.get(0)?, row.get(1)?)))
        .unwrap();
    assert_eq!(inserted, (300, 300));
    house.stop(&worker);
}

#[test]
fn a_batch_that_is_stopped_goes_on_with_the_rows_that_are_not_done() {
    let house = House::build();
    house.sqlite().execute_batch("CREATE TABLE t (n INTEGER)").unwrap();
    house.file("numbers.csv", &csv((1..=400).map(|n| (n, if n == 200 { "wait" } else { "" }))));
    house.file("numbers.jsonl", "");
    let worker = house.worker();
    assert_eq!(house.launch("one", BATCH, &[]).code, 0);
    until("a row waits", || house.text("made").lines().any(|n| n == "200"));
    until("it shows how far it is", || house.step("one", "square")["progress"].to_string().contains("398"));
    assert_eq!(house.step("one", "square")["status"], "running");
    let healthy = house.drayman.run(&["doctor"]);
    assert_eq!(healthy.code, 0, "{healthy:?}");
    assert_eq!(house.drayman.run(&["flow", "stop", "one"]).code, 0);
    fs::write(house.path("go"), "").unwrap();
    until("it is stopped", || house.step("one", "square")["status"] == "cancelled");
    let before = &house.step("one", "square")["rows"];
    let (done, aborted) = (before["done"].as_u64().unwrap(), before["aborted"].as_u64().unwrap());
    assert!(aborted > 0 && done + aborted == 398, "{before}");
    assert_eq!(house.drayman.run(&["flow", "restart", "one", "--id", "two", "--wait"]).code, 0);
    assert_eq!(house.step("two", "square")["rows"], rows(aborted, 0, 0, 0));
    assert_eq!(house.step("two", "insert")["rows"], rows(0, 0, 0, 0), "of nothing nothing is left to do");
    house.stop(&worker);
}

#[test]
fn a_worker_that_is_killed_while_it_loads_or_works_on_rows_loses_none_and_doubles_none() {
    const ROWS: u64 = 30_000;
    let house = House::build();
    house.sqlite().execute_batch("CREATE TABLE t (n INTEGER)").unwrap();
    house.file("numbers.jsonl", &(1..=ROWS).map(|n| format!("{{\"n\": {n}}}\n")).collect::<String>());
    let step = "[[steps]]\nname = 'insert'\nkind = 'batch'\ndatabase = 'shop'\nquery = 'INSERT INTO t VALUES (:n)'\n\
        processor = { kind = 'handler', app = 'etl', op = 'step' }\nreader = { kind = 'json-lines', file = 'numbers.jsonl' }\n";
    assert_eq!(house.launch("run", step, &[]).code, 0);
    let leader = house.leader();
    let read = || house.step("run", "insert")["checkpoint"]["read_count"].as_u64().unwrap_or(0);
    let count = |what| -> u64 {
        house.sqlite().query_row(&format!("SELECT {what} FROM t"), [], |row| row.get::<_, i64>(0)).unwrap() as u64
    };
    let inserted = || count("count(*)");
    for at in [2_000, 5_000] {
        let worker = house.worker();
        until_there("some are loaded", at, read);
        worker.signal(Signal::SIGKILL);
        worker.wait();
    }
    for at in [1, 8_000] {
        let worker = house.worker();
        until_there("some are inserted", at, inserted);
        worker.signal(Signal::SIGKILL);
        worker.wait();
    }
    let worker = house.worker();
    assert_eq!(house.drayman.start(&["watch", "run"]).end_with(&worker).code, 0);
    assert_eq!((inserted(), count("count(DISTINCT n)")), (ROWS, ROWS));
    assert_eq!(house.step("run", "insert")["rows"], rows(ROWS, 0, 0, 0));
    house.stop(&worker);
    house.stop(&leader);
}

#[test]
fn the_orders_of_a_day_become_a_report_in_either_database() {
    const ORDERS_OF_THE_DAY: u64 = 100_000;
    let counts = |id: &u64| id % 1000 != 7 && !id.is_multiple_of(50);
    let house = House::with(Some(Postgres::start()));
    let orders = (1..=ORDERS_OF_THE_DAY).map(|id| {
        let customer = format!("\"Customer, {}\"", id % 800);
        let cents = if id % 1000 == 7 { "n/a".to_owned() } else { (id % 50).to_string() };
        // One of them comes twice.
        format!("{},{customer},{cents}\n", if id == ORDERS_OF_THE_DAY - 1 { 5 } else { id })
    });
    house.file("orders-2026-03-01.csv", &format!("id,customer,cents\n{}", orders.collect::<String>()));
    let worker = house.worker();
    let mut reports = Vec::new();
    for database in ["shop", "bank"] {
        let path = house.path(&format!("{database}.toml"));
        fs::write(&path, ORDERS.replace("\"shop\"", &format!("\"{database}\""))).unwrap();
        let path = path.display().to_string();
        let launch = ["flow", "launch", &path, "--user", database, "-p", "day=2026-03-01", "--id", database, "--wait"];
        let ran = house.drayman.run(&launch);
        assert_eq!(ran.code, 0, "{ran:?}\n{}", house.drayman.run(&["flow", "show", database]).out);
        let [read, write, filter, skip, ..] = house.counts(database, "load");
        let all = (1..=ORDERS_OF_THE_DAY).filter(counts).count() as u64;
        assert_eq!((read, write, filter, skip), (ORDERS_OF_THE_DAY, all - 1, ORDERS_OF_THE_DAY - all, 1), "{database}");
        assert_eq!(house.counts(database, "report")[0], 784, "{database}: the others ordered nothing");
        reports.push(house.text("files/report-2026-03-01.csv"));
        fs::remove_file(house.path("files/report-2026-03-01.csv")).unwrap();
    }
    assert_eq!(reports[0].lines().count(), 785);
    let sorted = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
    assert_eq!(sorted(&reports[0]), sorted(&reports[1]), "but for the order of texts, which is the database's");
    let customer = reports[0].lines().find(|line| line.starts_with("\"Customer, 3\"")).expect("it has ordered");
    let (count, cents) = (1..=ORDERS_OF_THE_DAY)
        .filter(|id| id % 800 == 3 && counts(id))
        .fold((0, 0), |(count, cents), id| (count + 1, cents + id % 50));
    assert_eq!(customer, format!("\"Customer, 3\",{count},{cents}"));
    house.stop(&worker);
}
