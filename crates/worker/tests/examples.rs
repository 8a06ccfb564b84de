//! The examples run as programs of their own on a Redis of their own, and the pages show them as they are.

use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use support::handlers::{Handled, PYTHON};
use support::{DB, LONG};
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
        let wait = format!("--wait={}s", LONG.as_secs());
        let call = ["submit", "--user", "ana", "--app", app, "--op", op, "--id", op, &wait, &input.to_string()];
        let Output { status, stdout, stderr } = self.drayman(&call);
        let said = String::from_utf8_lossy(&stderr).lines().last().unwrap_or_default().to_owned();
        (status.code().expect("no signal"), serde_json::from_slice(&stdout).unwrap_or_default(), said)
    }

    fn stop(&self) {
        self.worker.signal(Signal::SIGTERM);
        assert_eq!(self.worker.wait(LONG).code(), Some(0), "{}", self.worker.output());
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
