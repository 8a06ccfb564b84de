//! Black box: the page's examples and what is asserted of them may not change while the core is rebuilt.
//!
//! The page for producers: each of its examples is run, and what it submitted is taken as a worker would.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::Duration;

use queue_core::calls::{Fields, Verdict};
use queue_core::job::FIELDS;
use queue_core::model::Status;
use queue_core::model::sql::{Kind, SqlJob};
use testkit::RedisServer;
use testkit::state::Priority;

#[path = "support/submit_example.rs"]
mod submit_example;
mod support;
#[path = "support/task_example.rs"]
mod task_example;

use support::{DB, finish, hash, store, take_one, until, worker};

const PAGE: &str = include_str!("../../../docs/producers.md");
const INPUT: &str = r#"{"invoice":7}"#;
const SQL: &str = "UPDATE trips SET km = 1.6 * miles";

/// An example: in which language, what it shows, its text.
struct Example {
    language: String,
    shows: String,
    text: String,
}

/// The examples of the page: fenced blocks after a comment `<!-- test: LANGUAGE WHAT -->`.
fn examples() -> Vec<Example> {
    let mut examples = Vec::new();
    for part in PAGE.split("<!-- test: ").skip(1) {
        let (mark, rest) = part.split_once(" -->\n```").expect("a block follows its mark");
        let (language, shows) = mark.split_once(' ').expect("a mark has two words");
        let (_, rest) = rest.split_once('\n').expect("a block has lines");
        let (text, _) = rest.split_once("\n```").expect("a block ends");
        examples.push(Example { language: language.into(), shows: shows.into(), text: format!("{text}\n") });
    }
    examples
}

/// A variable that tells where a client of another language is.
fn installed(variable: &str) -> PathBuf {
    let path = std::env::var_os(variable).map(PathBuf::from).filter(|path| path.exists());
    path.unwrap_or_else(|| {
        panic!("{variable} does not say where it is: run the tests by scripts/test, which installs it")
    })
}

fn run(example: &Example, server: &RedisServer, job: &str) -> Output {
    let file = |name: &str| {
        let path = server.dir().join(name);
        std::fs::write(&path, &example.text).unwrap();
        path
    };
    let mut command = match example.language.as_str() {
        "redis-cli" => {
            let mut command = Command::new("bash");
            command.arg("-e").arg(file("example.sh"));
            command
        }
        "python" => {
            let mut command = Command::new(installed("DRAYMAN_TEST_PYTHON"));
            command.arg(file("example.py"));
            command
        }
        "node" => {
            let mut command = Command::new("node");
            command.arg(file("example.cjs")).env("NODE_PATH", installed("DRAYMAN_TEST_NODE_MODULES"));
            command
        }
        other => panic!("nobody runs {other}"),
    };
    let output = command.env("REDIS_URL", server.url_db(DB)).env("JOB", job).output();
    let output = output.unwrap_or_else(|error| panic!("{} does not start: {error}", example.language));
    let ended = format!("{} {}: {output:?}", example.language, example.shows);
    assert!(output.status.success(), "{ended}");
    output
}

/// The fields that a producer writes to show something.
fn expected(shows: &str) -> BTreeMap<&'static str, String> {
    let connection =
        [("host", "127.0.0.1"), ("port", "5432"), ("dbname", "trips"), ("dbuser", "ana"), ("pass", "secret")];
    let fields: Vec<(&str, &str)> = match shows {
        "connection" => [&[("query", SQL)][..], &connection].concat(),
        "named" => vec![("query", SQL), ("database", "trips")],
        "multiple" => vec![
            ("query", r#"["DELETE FROM totals", "INSERT INTO totals SELECT sum(km) FROM trips"]"#),
            ("database", "trips"),
        ],
        "fallback" => vec![
            (
                "query",
                concat!(
                    r#"{"query":[{"query":"UPDATE trips SET km = 1.6 * miles","#,
                    r#""onerror":"INSERT INTO problems VALUES (<%= job_id %>, <%= error_message %>)","timeout":60000}],"#,
                    r#""onsuccess":"INSERT INTO news VALUES ('trips are in km')"}"#
                ),
            ),
            ("database", "trips"),
        ],
        "task" => vec![("encoding", "json"), ("input", INPUT), ("tags", "monthly")],
        other => panic!("nobody knows what {other} is to submit"),
    };
    fields.into_iter().map(|(name, value)| (name, value.to_owned())).collect()
}

async fn submits(language: &str) {
    let mut count = 0;
    // Those that read, or do more, are run by tests of their own.
    let submits = |example: &&Example| {
        !["follow", "result"].contains(&&*example.shows) && (language, &*example.shows) != ("rust", "task")
    };
    for example in examples().iter().filter(|example| example.language == language).filter(submits) {
        let server = RedisServer::start();
        let store = store(&server).await;
        let session = worker(&store).await;
        if language == "rust" {
            assert_eq!(example.text, include_str!("support/submit_example.rs"), "the page shows another text");
            submit_example::submit(&server.url_db(DB)).await.unwrap();
        } else {
            run(example, &server, "");
        }

        let claim = take_one(&store, &session).await;
        let job = claim.job().clone();
        let expected = expected(&example.shows);
        assert_eq!(job.user.as_str(), "ana");
        let is_task = example.shows == "task";
        let pool = match expected.contains_key("database") {
            _ if is_task => "invoices.render",
            true => "db:trips",
            false => "sql:127.0.0.1",
        };
        assert_eq!(job.pool.as_str(), pool);
        let meant: Vec<&str> = FIELDS.iter().map(|(name, ..)| *name).filter(|name| !is_bookkeeping(name)).collect();
        for field in meant {
            let value = job.text(field).unwrap();
            // Languages differ in their blanks.
            if field == "input" && is_task {
                assert_eq!(value.unwrap().replace(' ', ""), INPUT);
                continue;
            }
            assert_eq!(value, expected.get(field).map(String::as_str), "{field} of {language} {}", example.shows);
        }
        if let Some(created_at) = job.text("created_at").unwrap() {
            assert!(created_at.len() == 24 && humantime::parse_rfc3339(created_at).is_ok(), "{created_at}");
        }
        let id = job.id.to_string();
        if is_task {
            finish(claim, "done").await;
            assert_eq!(hash(&server, &id)["status"], "done");
            count += 1;
            continue;
        }
        let sql = SqlJob::parse(&expected["query"], Status::Pending, None, None, None, None).unwrap();
        let kind = match example.shows.as_str() {
            "multiple" => Kind::Multiple,
            "fallback" => Kind::Fallback,
            _ => Kind::Simple,
        };
        assert_eq!(sql.kind(), kind);
        finish(claim, "done").await;
        // No password outlives its job.
        assert!(!hash(&server, &id).contains_key("pass"));
        count += 1;
    }
    assert!(count > 0, "the page has no example for {language}");
}

/// Fields that producers leave alone, or that differ from job to job.
fn is_bookkeeping(field: &str) -> bool {
    matches!(field, "status" | "created_at")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_examples_for_redis_cli_submit() {
    submits("redis-cli").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_examples_for_python_submit() {
    submits("python").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_examples_for_node_submit() {
    submits("node").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_for_rust_submits() {
    submits("rust").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_examples_that_call_a_handler_get_its_result() {
    let examples = examples();
    let of = |language: &str, shows: &str| {
        examples.iter().find(|example| example.language == language && example.shows == shows).unwrap()
    };
    assert_eq!(of("rust", "task").text, include_str!("support/task_example.rs"), "the page shows another text");
    let server = RedisServer::start();
    let store = store(&server).await;
    let session = worker(&store).await;
    let url = server.url_db(DB);
    let calling = tokio::spawn(async move { task_example::call(&url).await.map_err(|error| error.to_string()) });
    until("it is queued", || server.state(DB).waiting_tasks("ana", "invoices.render", Priority::Normal).len() == 1);
    let claim = take_one(&store, &session).await;
    let id = claim.job().id.to_string();
    assert_eq!(hash(&server, &id)["unique"], "invoice-7");
    let fields = Fields::new().with("status", "done").with("result", "3").with("result_encoding", "json");
    claim.finish(Verdict::Final { keep_ms: 600_000 }, Duration::ZERO, fields, false).await.unwrap();
    assert_eq!(calling.await.unwrap(), Ok(3));
    assert_eq!(run(of("python", "result"), &server, &id).stdout, b"3\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_followed_to_its_end() {
    let examples = examples();
    let follow = examples.iter().find(|example| example.shows == "follow").unwrap();
    let server = RedisServer::start();
    let store = store(&server).await;
    let session = worker(&store).await;
    let id = submit_example::submit(&server.url_db(DB)).await.unwrap();
    let claim = take_one(&store, &session).await;
    let following = std::thread::scope(|scope| {
        let following = scope.spawn(|| run(follow, &server, &id));
        tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(finish(claim, "failed")));
        following.join().unwrap()
    });
    assert_eq!(following.stdout, b"failed\n");
}

#[test]
fn no_example_is_left_out() {
    let known = ["redis-cli", "python", "node", "rust"];
    assert!(examples().iter().all(|example| known.contains(&example.language.as_str())));
    let blocks = ["```python", "```js", "```rust"].map(|fence| PAGE.matches(fence).count()).iter().sum::<usize>();
    let marked = examples().iter().filter(|example| example.language != "redis-cli").count();
    assert_eq!(blocks, marked, "a block has no mark");
}

#[test]
fn the_table_of_fields_tells_the_limits() {
    for (name, most, _) in FIELDS {
        let row = PAGE.lines().find(|line| line.starts_with(&format!("| `{name}` |")));
        let row = row.unwrap_or_else(|| panic!("{name} stands in no table"));
        assert_eq!(row.split('|').nth(2).map(str::trim), Some(most.to_string().as_str()), "{row}");
    }
}
