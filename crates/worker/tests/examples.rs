//! The examples run as programs of their own on a Redis of their own, and the pages show them as they are.

use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use support::handlers::{Handled, PYTHON};
use support::{DB, PATIENCE};
use testkit::{Daemon, RedisServer, Scratch, Signal, bin};

mod support;

const README: &str = include_str!("../../../README.md");
const PAGE: &str = include_str!("../../../docs/handlers.md");

/// The one block of code of a page behind the comment `<!-- test: NAME -->`.
fn shown(page: &str, name: &str) -> String {
    let (_, rest) = page.split_once(&format!("<!-- test: {name} -->\n```")).expect("it is marked");
    let (text, _) = rest.split_once('\n').expect("a block").1.split_once("\n```").expect("it ends");
    format!("{text}\n")
}

/// A worker that is one of the examples.
struct Example {
    redis: RedisServer,
    objects: Scratch,
    worker: Daemon,
}

impl Example {
    fn start(name: &str) -> Self {
        let (redis, objects) = (RedisServer::start(), Scratch::new("objects"));
        let (url, place) = (redis.url_db(DB), format!("file://{}", objects.path().display()));
        let env = [
            ("REDIS_URL", &*url),
            ("DRAYMAN_REDIS__URL", &url),
            ("DRAYMAN_OBJECTS__URL", &place),
            ("DRAYMAN_CONFIG", "/dev/null"),
            // As a leader it sees soon that another one is gone.
            ("DRAYMAN_WORKER__SESSION_LIFETIME", "2s"),
        ];
        let worker = Daemon::spawn(bin(&format!("examples/{name}")), &[""; 0], &env);
        Self { redis, objects, worker }
    }

    fn drayman(&self, args: &[&str]) -> Output {
        let place = format!("file://{}", self.objects.path().display());
        let mut command = Command::new(bin("drayman"));
        command.args(args).env("DRAYMAN_CONFIG", "/dev/null").env("DRAYMAN_OBJECTS__URL", place);
        command.args(["--redis-url", &self.redis.url_db(DB)]).stdin(Stdio::null()).output().expect("it starts")
    }

    /// What a task comes to: the exit code, its result, and the last line on standard error.
    fn call(&self, app: &str, op: &str, input: Value) -> (i32, Value, String) {
        let wait = format!("--wait={}s", PATIENCE.as_secs());
        let call = ["submit", "--user", "ana", "--app", app, "--op", op, "--id", op, &wait, &input.to_string()];
        let Output { status, stdout, stderr } = self.drayman(&call);
        let said = String::from_utf8_lossy(&stderr).lines().last().unwrap_or_default().to_owned();
        (status.code().expect("no signal"), serde_json::from_slice(&stdout).unwrap_or_default(), said)
    }

    fn stop(&self) {
        self.worker.signal(Signal::SIGTERM);
        assert_eq!(self.worker.wait().code(), Some(0), "{}", self.worker.output());
    }
}

#[test]
fn the_smallest_worker_of_the_readme_greets() {
    assert_eq!(shown(README, "rust worker"), include_str!("../examples/greet.rs"), "the page shows another text");
    let greet = Example::start("greet");
    assert_eq!(greet.call("welcome", "greet", json!("Ana")).1, json!("Hello, Ana"));
    greet.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_smallest_program_of_the_readme_greets() {
    let folder = Scratch::new("readme");
    let path = folder.path().join("greet.py");
    std::fs::write(&path, shown(README, "python handler")).unwrap();
    let python = Handled::program(&[&PYTHON, path.to_str().unwrap()], "");
    for name in ["Ana", "Bob"] {
        assert_eq!(python.result(json!(name)).await, json!(format!("Hello, {name}")));
    }
    python.handler.close().await;
}

#[test]
fn the_worker_of_the_page_posts_counts_and_says_what_went_wrong() {
    assert_eq!(shown(PAGE, "rust"), include_str!("../examples/mail.rs"), "the page shows another text");
    let mail = Example::start("mail");
    assert_eq!(mail.call("mail", "count", json!("one two  three")).1, json!(3));
    assert_eq!(mail.call("mail", "post", json!({ "to": ["ana", "bob"], "text": "Hi" })).1, json!({ "letters": 2 }));
    let shown = String::from_utf8(mail.drayman(&["status", "post"]).stdout).unwrap();
    assert!(shown.contains("2 of 2") && shown.contains("posted to bob"), "{shown}");
    let cases = [
        (json!({ "to": [], "text": "Hi" }), "the job is failed: nobody is to get it"),
        (json!({ "to": ["ana"], "text": "" }), "the job is ignored: there is nothing to say"),
    ];
    for (op, (input, said)) in ["Post", "POST"].into_iter().zip(cases) {
        assert_eq!(mail.call("mail", op, input), (1, Value::Null, said.into()));
    }
    mail.stop();
    assert!(mail.worker.output().contains("the counter is closed"), "{}", mail.worker.output());
}

#[test]
fn the_worker_of_bookings_runs_tasks_as_it_does_rows() {
    assert_eq!(shown(PAGE, "rust rows"), include_str!("../examples/bookings.rs"), "the page shows another text");
    let bank = Example::start("bookings");
    assert_eq!(bank.call("bank", "book", json!({ "account": "a1", "cents": 5 })).1, json!({ "cents": 5 }));
    let said = "the job is ignored: nothing is to be moved";
    assert_eq!(bank.call("bank", "Book", json!({ "account": "a1", "cents": 0 })), (1, Value::Null, said.into()));
    bank.stop();
}

#[test]
fn the_worker_of_invoices_hands_back_a_result_and_a_file() {
    let invoices = Example::start("invoices");
    let invoice = json!({ "number": 7, "lines": [["book", 1250], ["pen", 90]] });
    assert_eq!(invoices.call("invoices", "render", invoice).1, json!({ "number": 7, "total_cents": 1340 }));
    assert_eq!(invoices.call("invoices", "total", json!(7)).1, json!(1340));
    let file = invoices.drayman(&["result", "render", "--file", "invoice.txt"]).stdout;
    assert_eq!(String::from_utf8(file).unwrap().lines().count(), 2);
    invoices.stop();
}

#[test]
fn the_worker_of_orders_loads_each_once_and_reports_however_often_it_is_killed() {
    const ORDERS: i64 = 40_000;
    let leader = Example::start("mail");
    let home = leader.objects.path();
    let place = |name: &str| home.join(name).display().to_string();
    // Some have no price, some cost nothing.
    let cents = |id: i64| if id % 1_000 == 7 { -1 } else { id % 5 * 100 };
    let text: String = (1..=ORDERS).map(|id| format!("{id},\"c, {}\",{}\n", id % 13, cents(id))).collect();
    std::fs::write(place("orders.csv"), format!("id,customer,cents\n{text}")).unwrap();
    let url = leader.redis.url_db(DB);
    let env =
        [("DRAYMAN_REDIS__URL", &*url), ("DRAYMAN_CONFIG", "/dev/null"), ("DRAYMAN_WORKER__SESSION_LIFETIME", "2s")];
    let start = || Daemon::spawn(bin("examples/orders"), &[""; 0], &env);
    let definition = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/orders.toml");
    let [orders, database, report] = ["orders.csv", "orders.db", "report.csv"].map(place);
    let params = json!({ "orders": orders, "database": database, "report": report }).to_string();
    let launch = ["flow", "launch", definition, "--user", "ana", "--id", "day", "--params-json", &params];
    assert_eq!(leader.drayman(&launch).status.code(), Some(0));
    let steps = || -> Vec<Value> {
        let said = leader.drayman(&["flow", "steps", "day", "--json"]).stdout;
        String::from_utf8(said).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let read = || steps()[0]["checkpoint"]["read_count"].as_u64().unwrap_or(0);
    let mut behind = 0;
    for _ in 0..4 {
        let worker = start();
        testkit::eventually_blocking("some chunks", || {
            (read() > behind || steps()[0]["status"] == "done").then_some(())
        });
        worker.kill9();
        behind = read();
    }
    let worker = start();
    let is_over = || (steps()[1]["status"] == "done").then_some(());
    testkit::eventually_blocking("the report", is_over);
    let counts = steps()[0]["checkpoint"].clone();
    let told = ["read_count", "write_count", "filter_count", "skip_count"].map(|name| counts[name].as_i64().unwrap());
    assert_eq!(told, [ORDERS, ORDERS - ORDERS / 5 - ORDERS / 1_000, ORDERS / 5, ORDERS / 1_000], "{counts}");
    let db = rusqlite::Connection::open(place("orders.db")).unwrap();
    let one = |sql: &str| db.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
    assert_eq!(one("SELECT count(*) FROM orders"), told[1]);
    let sum = |customer: i64| -> (i64, i64) {
        let of = (1..=ORDERS).filter(|id| id % 13 == customer && cents(*id) > 0);
        of.fold((0, 0), |(count, sum), id| (count + 1, sum + cents(id) + cents(id) / 5))
    };
    let mut wanted: Vec<String> = (0..13)
        .map(|customer| {
            let (orders, cents) = sum(customer);
            format!("\"c, {customer}\",{orders},{cents}")
        })
        .collect();
    wanted.sort_by(|a, b| a.split('"').nth(1).cmp(&b.split('"').nth(1)));
    let text = std::fs::read_to_string(place("report.csv")).unwrap();
    assert_eq!(text, format!("customer,orders,cents\n{}\n", wanted.join("\n")));
    // It may have been started for nothing, and just now.
    worker.kill9();
    leader.stop();
}

#[test]
fn the_samples_of_flows_do_what_they_are_there_to_show() {
    let samples = Example::start("samples");
    let wait = format!("--wait={}s", PATIENCE.as_secs());
    let launch = |name: &str, more: &[&str]| {
        let file = format!("{}/examples/samples/{name}.toml", env!("CARGO_MANIFEST_DIR"));
        let args = ["flow", "launch", &file, "--user", "ana", "--id", name, &wait];
        samples.drayman(&[&args[..], more].concat()).status.code()
    };
    let json = |args: &[&str]| -> Vec<Value> {
        let said = samples.drayman(&[args, &["--json"]].concat()).stdout;
        String::from_utf8(said).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let steps = |name: &str| json(&["flow", "steps", name]);
    let stand = |name: &str| -> Vec<String> {
        steps(name).iter().map(|step| format!("{} {}", step["name"], step["status"]).replace('"', "")).collect()
    };
    assert_eq!(
        (launch("sample_job", &[]), stand("sample_job")),
        (Some(0), vec!["step1 done".into(), "step2 done".into()])
    );
    assert_eq!(launch("failing_job", &[]), Some(1));
    assert_eq!(stand("failing_job"), ["fails failed", "never skipped", "cleanup done"]);
    assert_eq!(steps("failing_job")[0]["error"], "this step always fails");
    assert_eq!(launch("retry_job", &[]), Some(0));
    assert_eq!(steps("retry_job")[0]["attempts"].as_array().unwrap().len(), 2);
    let given = ["-p", "name=Ana", "-p", "date=2026-03-01", "-p", "count=7"];
    assert_eq!(launch("parameterized_job", &given), Some(0));
    let result = samples.drayman(&["result", "parameterized_job:shows"]).stdout;
    let result: Value = serde_json::from_slice(&result).unwrap();
    assert_eq!(result, json!({ "greeting": "Ana, it is 2026-03-01", "count": 7, "rate": 0.5 }));
    let params = json(&["flow", "params", "parameterized_job"]).remove(0);
    assert_eq!(params["rate"], json!({ "type": "float", "value": 0.5, "identifying": false }));
    assert_eq!(launch("chunk_job", &[]), Some(0));
    let counts = steps("chunk_job")[0]["checkpoint"].clone();
    let told = ["read_count", "write_count", "filter_count", "commit_count"].map(|name| counts[name].as_i64().unwrap());
    assert_eq!(told, [50, 25, 25, 5]);
    samples.stop();
}
