//! A statement for rows, on a real PostgreSQL and on SQLite files: each row by itself, all in one transaction, exactly once.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use queue_core::ids::Fence;
use queue_core::model::batch::{RowEnd, RowResult};
use rusqlite::Connection;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use worker::execute::sql::SqlExecutor;
use worker::execute::sql::databases::{DatabaseSettings, Databases, SqlSettings, SqliteSettings, TlsMode};
use worker::execute::{
    ClaimLost, Executor, Failure, RowAnswers, RowsLedger, RowsWork, SqlRow, SqlRowsEnd, Target, Trace, Work,
};

use crate::cluster::{Cluster, count};
use crate::commit_proxy::{AtCommit, Proxy};
use crate::support::{eventually, executor, work};

/// Where an execution stops for ever, as if its worker had been killed there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hang {
    Nowhere,
    BeforeTheNote,
    AfterTheNote,
}

/// A claim to a chunk that keeps what is noted.
struct Chunk {
    hang: Hang,
    hanging: Notify,
    lost: AtomicBool,
    noted: Mutex<Option<(Trace, RowAnswers)>>,
}

impl Chunk {
    fn hanging(hang: Hang) -> Self {
        Self { hang, hanging: Notify::new(), lost: AtomicBool::new(false), noted: Mutex::default() }
    }

    fn new() -> Self {
        Self::hanging(Hang::Nowhere)
    }

    fn noted(&self) -> Option<(Trace, RowAnswers)> {
        self.noted.lock().unwrap().clone()
    }

    fn trace(&self) -> Option<Trace> {
        self.noted().map(|(trace, _)| trace)
    }

    fn answer(&self) -> Result<(), ClaimLost> {
        if self.lost.load(Ordering::SeqCst) { Err(ClaimLost) } else { Ok(()) }
    }

    async fn hang(&self) {
        self.hanging.notify_one();
        std::future::pending().await
    }
}

#[async_trait]
impl RowsLedger for Chunk {
    async fn confirm(&self) -> Result<(), ClaimLost> {
        self.answer()
    }

    async fn note(&self, trace: Trace, answers: &RowAnswers) -> Result<(), ClaimLost> {
        self.answer()?;
        if self.hang == Hang::BeforeTheNote {
            self.hang().await;
        }
        *self.noted.lock().unwrap() = Some((trace, answers.clone()));
        if self.hang == Hang::AfterTheNote {
            self.hang().await;
        }
        Ok(())
    }
}

fn rows_of(inputs: impl IntoIterator<Item = Value>) -> Vec<SqlRow> {
    let row = |(place, input): (usize, Value)| SqlRow { place, input: input.to_string().into_bytes() };
    inputs.into_iter().enumerate().map(row).collect()
}

fn rows_work(target: Target, sql: &str, inputs: impl IntoIterator<Item = Value>) -> RowsWork {
    RowsWork { each: Work { step: "rows".into(), ..work(target, sql) }, rows: rows_of(inputs) }
}

/// The same by whoever takes the chunk next.
fn taken_over(work: &RowsWork, earlier: Option<Trace>) -> RowsWork {
    let fence = Fence(work.each.fence.0 + 1);
    RowsWork { each: Work { earlier, fence, takes_over: true, ..work.each.clone() }, ..work.clone() }
}

async fn run(executor: &SqlExecutor, work: RowsWork) -> SqlRowsEnd {
    executor.execute_rows(work, &Chunk::new(), CancellationToken::new()).await
}

fn committed(end: SqlRowsEnd) -> RowAnswers {
    match end {
        SqlRowsEnd::Committed(answers, _) => answers,
        other => panic!("not committed: {other:?}"),
    }
}

fn failure(end: SqlRowsEnd) -> Failure {
    match end {
        SqlRowsEnd::Failed(failure) => failure,
        other => panic!("not failed: {other:?}"),
    }
}

fn results(answers: &RowAnswers) -> Vec<Value> {
    answers.iter().map(|(_, answer)| serde_json::from_slice(answer.result.as_ref().unwrap()).unwrap()).collect()
}

/// `done`, or the code of what the row failed of.
fn ends(answers: &RowAnswers) -> Vec<&str> {
    let end = |(place, (named, answer)): (usize, &(usize, RowResult))| {
        assert_eq!(place, *named, "answers come by their places");
        match answer.end {
            RowEnd::Done => "done",
            _ => Box::leak(answer.messages[0].errcode.clone().into_boxed_str()),
        }
    };
    answers.iter().enumerate().map(end).collect()
}

fn plain() -> SqlExecutor {
    executor(Databases::default())
}

/// Ends when a backend of the job is in this state.
async fn in_state(client: &tokio_postgres::Client, work: &RowsWork, condition: &str) {
    let sql = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'drayman:{}:%' AND {condition}",
        work.each.job
    );
    eventually(condition, || async { count(client, &sql).await == 1 }).await;
}

async fn gone(client: &tokio_postgres::Client, work: &RowsWork) {
    let sql =
        format!("SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'drayman:{}:%'", work.each.job);
    eventually("the backend is gone", || async { count(client, &sql).await == 0 }).await;
}

struct Files {
    folder: TempDir,
}

impl Files {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn executor(&self) -> SqlExecutor {
        let path = format!("{}/{{user}}.db", self.folder.path().display());
        executor(Databases {
            databases: BTreeMap::from([(
                "file".into(),
                DatabaseSettings::Sqlite(SqliteSettings { path, create: true }),
            )]),
            ..Databases::default()
        })
    }

    fn connection(&self) -> Connection {
        Connection::open(self.folder.path().join("ann.db")).unwrap()
    }

    fn count(&self, sql: &str) -> i64 {
        self.connection().query_row(sql, [], |row| row.get(0)).unwrap()
    }
}

fn file() -> Target {
    Target::Named("file".into())
}

const TRICKS: [&str; 6] =
    ["'; DROP TABLE t; --", "$1", ":a", "\\'); DELETE FROM t; --", "$$; COMMIT; $$", "{}' OR 'a'='a"];

#[tokio::test]
async fn values_of_every_type_come_to_their_columns_and_back() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client
        .batch_execute(
            "CREATE TYPE mood AS ENUM ('fine', 'bad'); CREATE DOMAIN positive AS int CHECK (value > 0);
             CREATE TABLE t(i int, b bigint, n numeric, f float8, d date, s timestamptz, l timestamp, j jsonb, o bool, \
                            c text, u uuid, m mood, p positive, r real, y bytea, a int[])",
        )
        .await
        .unwrap();
    let sql = "INSERT INTO t(i, b, n, f, d, s, l, j, o, c, u, m, p, r, y, a) VALUES \
               (:i, :b, :n, :f, :d, :s, :l, :j, :o, :c, :u, :m, :p, :r, :y, :a) \
               RETURNING i, b, n, f, d, s, l, j, o, c, u, m, p, r, y, to_json(a) AS a, :c || '!' AS \"more \"\"so\"";
    let row = r#"{"i": -5, "b": 9007199254740993, "n": 12345678901234567890.00012300, "f": 0.1, "d": "1999-12-31",
        "s": "2026-01-02 03:04:05.5+01", "l": "1969-07-20 20:17:40", "j": {"x": [1.50, null]}, "o": true, "c": "é'\"\\",
        "u": "0190c7a2-7f6e-7b4c-8a5d-1f2e3d4c5b6a", "m": "fine", "p": 7, "r": 0.1, "y": "\\x00ff", "a": "{1,2}",
        "not in the statement": 1}"#;
    let nothing: Value = "ibnfdsljocumprya".chars().map(|name| (name.to_string(), Value::Null)).collect();
    let special = r#"{"i": "2147483647", "b": "-1", "n": "NaN", "f": "-Infinity", "d": "infinity", "s": "-infinity",
        "l": "0044-03-15 12:00:00 BC", "j": "\"text\"", "o": "no", "c": 12.50, "u": null, "m": null, "p": null,
        "r": null, "y": "", "a": null}"#;
    let mut work = rows_work(cluster.target(&db), sql, [json!(null), nothing, json!(null)]);
    work.rows[0].input = row.into();
    work.rows[2].input = special.into();
    let answers = committed(run(&plain(), work).await);
    assert_eq!(ends(&answers), ["done"; 3], "{answers:?}");
    let text = |place: usize| String::from_utf8(answers[place].1.result.clone().unwrap()).unwrap();
    let expected = r#"{"rows_affected":1,"rows":[{"i":-5,"b":9007199254740993,"n":12345678901234567890.00012300,"f":0.1,"d":"1999-12-31","s":"2026-01-02T02:04:05.5Z","l":"1969-07-20T20:17:40","j":{"x": [1.50, null]},"o":true,"c":"é'\"\\","u":"0190c7a2-7f6e-7b4c-8a5d-1f2e3d4c5b6a","m":"fine","p":7,"r":0.1,"y":"\\x00ff","a":[1,2],"more \"so":"é'\"\\!"}]}"#;
    assert_eq!(text(0), expected);
    let returned = &results(&answers)[1]["rows"][0];
    assert!(returned.as_object().unwrap().values().all(Value::is_null) && returned.as_object().unwrap().len() == 17);
    let expected = r#"{"rows_affected":1,"rows":[{"i":2147483647,"b":-1,"n":"NaN","f":"-Infinity","d":"infinity","s":"-infinity","l":"-000043-03-15T12:00:00","j":"text","o":false,"c":"12.50","u":null,"m":null,"p":null,"r":null,"y":"\\x","a":null,"more \"so":"12.50!"}]}"#;
    assert_eq!(text(2), expected);
    // The server has the digits of the row, not those of a binary fraction.
    assert_eq!(count(&client, "SELECT count(*) FROM t WHERE n::text = '12345678901234567890.00012300'").await, 1);
}

#[tokio::test]
async fn numerics_come_back_as_the_server_would_write_them() {
    let cluster = Cluster::get();
    let numbers = [
        "0",
        "0.00",
        "-0.5",
        "1",
        "10",
        "10000",
        "9999",
        "100000000",
        "0.0001",
        "0.00001",
        "-123.4500",
        "1e-20",
        "1e30",
        "123456789.987654321",
    ];
    let work = rows_work(
        cluster.target("postgres"),
        "SELECT $1::numeric AS n, ($1::numeric)::text AS t",
        numbers.map(|n| json!([n])),
    );
    let answers = committed(run(&plain(), work).await);
    for (_, answer) in answers {
        let text = String::from_utf8(answer.result.unwrap()).unwrap();
        let (number, written) = text.split_once(r#","t":""#).unwrap();
        assert_eq!(number.rsplit(':').next().unwrap(), written.trim_end_matches(r#""}]}"#), "{text}");
    }
}

#[tokio::test]
async fn whatever_a_row_holds_is_a_value_and_no_sql() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client.batch_execute("CREATE TABLE t(a text)").await.unwrap();
    let numbered = rows_work(cluster.target(&db), "INSERT INTO t VALUES ($1)", TRICKS.map(|trick| json!([trick])));
    let named = rows_work(cluster.target(&db), "INSERT INTO t VALUES (:a)", TRICKS.map(|trick| json!({"a": trick})));
    for work in [numbered, named] {
        assert_eq!(ends(&committed(run(&plain(), work).await)), ["done"; 6]);
    }
    let found = client.query("SELECT a FROM t", &[]).await.unwrap();
    let found: Vec<String> = found.iter().map(|row| row.get(0)).collect();
    assert_eq!(found, [TRICKS, TRICKS].concat());

    let files = Files::new();
    files.connection().execute_batch("CREATE TABLE t(a)").unwrap();
    let work = rows_work(file(), "INSERT INTO t VALUES (:a)", TRICKS.map(|trick| json!({"a": trick})));
    assert_eq!(ends(&committed(run(&files.executor(), work).await)), ["done"; 6]);
    let connection = files.connection();
    let mut statement = connection.prepare("SELECT a FROM t").unwrap();
    let found: Vec<String> = statement.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect();
    assert_eq!(found, TRICKS);
}

#[tokio::test]
async fn a_bad_row_fails_alone_and_says_why() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client
        .batch_execute(
            "CREATE TABLE parent(id int PRIMARY KEY); INSERT INTO parent VALUES (1);
             CREATE TABLE t(id int PRIMARY KEY, parent int NOT NULL REFERENCES parent DEFERRABLE INITIALLY DEFERRED, \
                            amount numeric CHECK (amount >= 0))",
        )
        .await
        .unwrap();
    let sql = "INSERT INTO t VALUES (:id, :parent, :amount)";
    let row = |id: Value, parent: Value, amount: Value| json!({"id": id, "parent": parent, "amount": amount});
    let work = rows_work(
        cluster.target(&db),
        sql,
        [
            row(json!(1), json!(1), json!(0.1)),
            row(json!(2), json!(1), json!(-1)),
            row(json!(1), json!(1), json!(1)),
            row(json!("x"), json!(1), json!(1)),
            row(json!(3), Value::Null, json!(1)),
            // Its constraint would wait for COMMIT.
            row(json!(4), json!(99), json!(1)),
            json!({"id": 5}),
            json!([6, 1, 1]),
            row(json!("7\u{0}"), json!(1), json!(1)),
            row(json!(8), json!(1), json!(1e3)),
        ],
    );
    let answers = committed(run(&plain(), work).await);
    assert_eq!(
        ends(&answers),
        ["done", "23514", "23505", "22P02", "23502", "23503", "parameters", "parameters", "22021", "done"]
    );
    let message = |place: usize| &answers[place].1.messages[0];
    assert_eq!(message(2).vals, ["duplicate key value violates unique constraint \"t_pkey\""]);
    assert_eq!(message(4).field.as_deref(), Some("parent"));
    assert_eq!(message(6).field.as_deref(), Some("parent"));
    assert_eq!(results(&vec![answers[0].clone()]), [json!({"rows_affected": 1})]);
    assert_eq!(count(&client, "SELECT sum(id) FROM t").await, 9);
}

#[tokio::test]
async fn many_rows_end_as_if_each_had_been_run_alone_in_its_turn() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client.batch_execute("CREATE TABLE t(id int PRIMARY KEY, turn int); CREATE SEQUENCE turns").await.unwrap();
    let files = Files::new();
    files.connection().execute_batch("CREATE TABLE t(id INTEGER PRIMARY KEY, turn INTEGER)").unwrap();
    // Good ones, single bad ones, long runs of bad ones, and duplicates near and far.
    let ids: Vec<i64> = (0..1500_i64)
        .map(|n| match n {
            0..200 => n,
            200..300 if n % 7 == 0 => n - 200,
            400..600 => 5,
            600..1000 if n % 97 == 0 => n - 1,
            _ => n,
        })
        .collect();
    let mut seen = std::collections::HashSet::new();
    let expected: Vec<bool> = ids.iter().map(|id| seen.insert(*id)).collect();
    let rows: Vec<Value> = ids.iter().zip(0..).map(|(id, turn)| json!([id, turn])).collect();
    for (executor, target) in [(plain(), cluster.target(&db)), (files.executor(), file())] {
        let work = rows_work(target, "INSERT INTO t VALUES ($1, $2) RETURNING turn", rows.clone());
        let answers = committed(run(&executor, work).await);
        let done: Vec<bool> = answers.iter().map(|(_, answer)| answer.end == RowEnd::Done).collect();
        assert_eq!(done, expected);
        for (place, answer) in answers.iter().filter(|(_, answer)| answer.end == RowEnd::Done) {
            let result: Value = serde_json::from_slice(answer.result.as_ref().unwrap()).unwrap();
            assert_eq!(result, json!({"rows_affected": 1, "rows": [{"turn": place}]}));
        }
    }
    // Each by the first row that had it.
    let first = "SELECT count(*) FROM t WHERE turn = id";
    let good = expected.iter().filter(|good| **good).count() as i64;
    let moved = ids.iter().zip(0..).zip(&expected).filter(|((id, turn), good)| **good && **id != *turn).count() as i64;
    assert_eq!(count(&client, first).await, good - moved);
    assert_eq!(files.count(first), good - moved);
}

#[tokio::test]
async fn what_rows_return_is_kept_within_bounds_and_the_rest_of_a_large_chunk_is_left() {
    let cluster = Cluster::get();
    let target = || cluster.target("postgres");
    let sql = "SELECT n, repeat('x', $2::int) AS x FROM generate_series(1, $1::int) n";
    let rows =
        [json!([0, 1]), json!([3, 1]), json!([100, 1]), json!([101, 1]), json!([9, 10_000]), json!([2, 3_000_000])];
    let work = rows_work(target(), sql, rows);
    let found = results(&committed(run(&plain(), work).await));
    assert_eq!(found[0], json!({"rows_affected": 0, "rows": []}));
    assert_eq!(found[1]["rows"], json!([{"n": 1, "x": "x"}, {"n": 2, "x": "x"}, {"n": 3, "x": "x"}]));
    let summary: Vec<_> = found
        .iter()
        .map(|of| {
            (of["rows_affected"].as_u64().unwrap(), of["rows"].as_array().unwrap().len(), of["truncated"] == true)
        })
        .collect();
    let expected = [(0, 0, false), (3, 3, false), (100, 100, false), (101, 100, true), (9, 6, true), (2, 0, true)];
    assert_eq!(summary, expected);

    let files = Files::new();
    let lite = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < $1) SELECT x, printf('%.*c', $2, 'x') AS y FROM n";
    let found = results(&committed(
        run(&files.executor(), rows_work(file(), lite, [json!([101, 1]), json!([2, 50_000])])).await,
    ));
    assert_eq!(
        (&found[0]["rows_affected"], &found[0]["truncated"], &found[1]["truncated"]),
        (&json!(101), &json!(true), &json!(true))
    );

    // 60 KB for each of these.
    let many = (0..200).map(|_| json!([6, 10_000]));
    for (executor, target, sql) in [(plain(), target(), sql), (files.executor(), file(), lite)] {
        let answers = committed(run(&executor, rows_work(target, sql, many.clone())).await);
        assert!((50..200).contains(&answers.len()), "{}", answers.len());
        assert!(answers.iter().enumerate().all(|(place, (of, _))| place == *of));
    }
}

#[tokio::test]
async fn a_statement_that_no_row_can_be_run_for_fails_as_a_whole() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client.batch_execute("CREATE TABLE t(a int)").await.unwrap();
    let files = Files::new();
    files.connection().execute_batch("CREATE TABLE t(a)").unwrap();
    for (sql, message) in [
        ("INSERT INTO t VALUES (1); COMMIT", "it is more than one statement"),
        ("COMMIT", "it would end or undo"),
        ("ROLLBACK TO drayman_rows", "it would end or undo"),
        ("SAVEPOINT x", "it would end or undo"),
        ("VACUUM", "it can't run in a transaction"),
        ("INSERT INTO t VALUES ($1 + :a)", "some of its parameters have numbers"),
        ("INSERT INTO t VALUES ('x", "has no end"),
        ("INSERT INTO t VALUES (1\0)", "NUL byte"),
        ("SELECT 1 AS a, 2 AS b, 3 AS a", "two columns that are named \"a\""),
    ] {
        for (executor, target) in [(plain(), cluster.target(&db)), (files.executor(), file())] {
            let failure = failure(run(&executor, rows_work(target, sql, [json!([])])).await);
            assert!(failure.message.contains(message) && !failure.retryable, "{sql}: {failure:?}");
        }
    }
    for (sql, code) in
        [("INSERT INTO missing VALUES ($1)", "42P01"), ("SELEC", "42601"), ("SELECT json_build_array($1)", "42P18")]
    {
        let failure = failure(run(&plain(), rows_work(cluster.target(&db), sql, [json!([1])])).await);
        assert_eq!((failure.sqlstate.as_deref(), failure.retryable), (Some(code), false), "{sql}");
    }
    let array = "INSERT INTO t VALUES (1) RETURNING ARRAY[a] AS a";
    let failed = failure(run(&plain(), rows_work(cluster.target(&db), array, [json!([])])).await);
    assert!(failed.message.contains("the column \"a\" of type _int4: cast it to text"), "{}", failed.message);
    let trick = "INSERT OR ROLLBACK INTO u VALUES ($1)";
    files.connection().execute_batch("CREATE TABLE u(a UNIQUE)").unwrap();
    let failed = failure(run(&files.executor(), rows_work(file(), trick, [json!([1]), json!([1]), json!([2])])).await);
    assert!(failed.message.contains("undid the transaction"), "{}", failed.message);
    for sql in ["SELECT load_extension($1)", "DELETE FROM drayman_applied WHERE job = $1", "SELECT ?1"] {
        failure(run(&files.executor(), rows_work(file(), sql, [json!(["x"])])).await);
    }
    assert_eq!(count(&client, "SELECT count(*) FROM t").await, 0);
    assert_eq!(files.count("SELECT (SELECT count(*) FROM t) + (SELECT count(*) FROM u)"), 0);
}

#[tokio::test]
async fn an_error_of_the_moment_undoes_the_whole_transaction_and_may_be_retried() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client
        .batch_execute("CREATE TABLE t(a int PRIMARY KEY, n int); INSERT INTO t VALUES (1, 0), (2, 0)")
        .await
        .unwrap();
    let mut other = cluster.client(&db).await;
    other.batch_execute("SET deadlock_timeout = '1h'").await.unwrap();
    let transaction = other.transaction().await.unwrap();
    transaction.batch_execute("UPDATE t SET n = n WHERE a = 2").await.unwrap();
    let sql = "UPDATE t SET n = n + 1 WHERE a = $1";
    let rows = [json!(["bad"]), json!([1]), json!([2])];
    let work = rows_work(cluster.target(&db), sql, rows);
    let executor = plain();
    let (end, ()) = tokio::join!(run(&executor, work.clone()), async {
        in_state(&client, &work, "wait_event_type = 'Lock'").await;
        transaction.batch_execute("UPDATE t SET n = n WHERE a = 1").await.unwrap();
        transaction.commit().await.unwrap();
    });
    let lost = failure(end);
    assert_eq!((lost.sqlstate.as_deref(), lost.retryable, lost.undone), (Some("40P01"), true, true));
    assert_eq!(count(&client, "SELECT sum(n) FROM t").await, 0);
    assert_eq!(ends(&committed(run(&plain(), work).await)), ["22P02", "done", "done"]);

    // A backend that goes away.
    let slow = rows_work(cluster.target(&db), "SELECT pg_sleep($1::float8)", [json!([0]), json!([30])]);
    let (end, ()) = tokio::join!(run(&executor, slow.clone()), async {
        in_state(&client, &slow, "query LIKE '/* %pg_sleep%' AND wait_event = 'PgSleep'").await;
        let end = format!(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'drayman:{}:%'",
            slow.each.job
        );
        client.batch_execute(&end).await.unwrap();
    });
    assert!(failure(end).retryable);
}

/// Runs three rows, of which only the second is endless. However slow this machine is, there is a limit that the others keep to.
async fn second_times_out(executor: &SqlExecutor, rows: impl Fn() -> RowsWork) {
    let mut limit = Duration::from_millis(100);
    testkit::eventually("a limit that is long enough for the short rows", async || {
        let mut work = rows();
        work.each.timeout = limit;
        limit *= 2;
        assert!(limit < testkit::PATIENCE, "no limit is long enough");
        let answers = committed(run(executor, work).await);
        let ends = ends(&answers);
        assert_eq!(ends[1], "57014");
        if ends == ["done", "57014", "done"] { Ok(()) } else { Err(limit) }
    })
    .await;
}

#[tokio::test]
async fn one_row_that_takes_too_long_fails_alone() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client.batch_execute("CREATE TABLE t(a float8)").await.unwrap();
    let sql = "INSERT INTO t SELECT $1 FROM pg_sleep($1)";
    let rows = || rows_work(cluster.target(&db), sql, [json!([0]), json!([600]), json!([0.01])]);
    second_times_out(&plain(), rows).await;
    assert_eq!(count(&client, "SELECT count(*) FROM t WHERE a = 600").await, 0);
    assert!(count(&client, "SELECT count(*) FROM t WHERE a = 0.01").await > 0);

    let files = Files::new();
    files.connection().execute_batch("CREATE TABLE t(a)").unwrap();
    let sql = "INSERT INTO t WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < $1) SELECT max(x) FROM n";
    let rows = || rows_work(file(), sql, [json!([1]), json!([1_000_000_000_000_i64]), json!([2])]);
    second_times_out(&files.executor(), rows).await;
    assert_eq!(files.count("SELECT count(*) FROM t WHERE a > 2"), 0);
    assert!(files.count("SELECT count(*) FROM t WHERE a = 2") > 0);
}

#[tokio::test]
async fn a_row_that_lifts_its_limit_ends_the_chunk_all_the_same() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client.batch_execute("CREATE TABLE t(a float8)").await.unwrap();
    let sql = "INSERT INTO t SELECT $1 FROM set_config('statement_timeout', '0', false), pg_sleep($1)";
    let mut work = rows_work(cluster.target(&db), sql, [json!([0]), json!([600])]);
    work.each.timeout = Duration::from_millis(200);
    let failure = failure(run(&plain(), work.clone()).await);
    assert_eq!((failure.sqlstate.as_deref(), failure.retryable), (Some("57014"), false));
    gone(&client, &work).await;
    assert_eq!(count(&client, "SELECT count(*) FROM t").await, 0);
}

#[tokio::test]
async fn a_stop_in_the_middle_leaves_nothing() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client.batch_execute("CREATE TABLE t(a float8)").await.unwrap();
    let work = rows_work(
        cluster.target(&db),
        "INSERT INTO t SELECT $1 FROM pg_sleep($1)",
        [json!([0]), json!([60]), json!([0])],
    );
    let (stop, chunk, executor) = (CancellationToken::new(), Chunk::new(), plain());
    let (end, ()) = tokio::join!(executor.execute_rows(work.clone(), &chunk, stop.clone()), async {
        in_state(&client, &work, "wait_event = 'PgSleep'").await;
        stop.cancel();
    });
    assert_eq!((end, chunk.noted()), (SqlRowsEnd::Stopped, None));
    gone(&client, &work).await;
    assert_eq!(count(&client, "SELECT count(*) FROM t").await, 0);

    // At any moment at all: what is told is what happened.
    let files = Files::new();
    files.connection().execute_batch("CREATE TABLE t(a)").unwrap();
    for round in 0..40_i64 {
        for (executor, target) in [(plain(), cluster.target(&db)), (files.executor(), file())] {
            let on_file = matches!(target, Target::Named(_));
            let rows = (0..300).map(|_| json!([round]));
            let work = rows_work(target, "INSERT INTO t VALUES ($1)", rows);
            let (stop, chunk) = (CancellationToken::new(), Chunk::new());
            let (end, ()) = tokio::join!(executor.execute_rows(work, &chunk, stop.clone()), async {
                tokio::time::sleep(Duration::from_micros(round as u64 * 500)).await;
                stop.cancel();
            });
            let found = format!("SELECT count(*) FROM t WHERE a = {round}");
            let found = if on_file { files.count(&found) } else { count(&client, &found).await };
            match end {
                SqlRowsEnd::Committed(..) => assert_eq!(found, 300),
                SqlRowsEnd::Stopped => assert_eq!(found, 0),
                other => panic!("{other:?}"),
            }
        }
    }
}

#[tokio::test]
async fn killed_around_its_note_a_chunk_is_run_again_and_each_row_counts_once() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client.batch_execute("CREATE TABLE t(a int UNIQUE)").await.unwrap();
    let files = Files::new();
    files.connection().execute_batch("CREATE TABLE t(a UNIQUE)").unwrap();
    for hang in [Hang::BeforeTheNote, Hang::AfterTheNote] {
        for on_file in [false, true] {
            client.batch_execute("TRUNCATE t").await.unwrap();
            files.connection().execute_batch("DELETE FROM t").unwrap();
            let place = || if on_file { (files.executor(), file()) } else { (plain(), cluster.target(&db)) };
            let (executor, target) = place();
            let work = rows_work(target, "INSERT INTO t VALUES ($1)", [json!([1]), json!([1]), json!([2])]);
            let chunk = Arc::new(Chunk::hanging(hang));
            let dying = tokio::spawn({
                let (work, chunk) = (work.clone(), chunk.clone());
                async move { executor.execute_rows(work, &*chunk, CancellationToken::new()).await }
            });
            chunk.hanging.notified().await;
            dying.abort();
            assert_eq!(chunk.trace().is_some(), hang == Hang::AfterTheNote);
            let answers = committed(run(&place().0, taken_over(&work, chunk.trace())).await);
            assert_eq!(ends(&answers).iter().filter(|end| **end == "done").count(), 2, "{answers:?}");
            assert_eq!(ends(&answers)[0], "done");
            let sum = "SELECT count(*) * 100 + sum(a) FROM t";
            assert_eq!(if on_file { files.count(sum) } else { count(&client, sum).await }, 203);
        }
    }
}

#[tokio::test]
async fn killed_after_its_commit_a_chunk_is_not_run_again_and_its_answers_are_there() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client.batch_execute("CREATE TABLE t(a int UNIQUE)").await.unwrap();
    let proxy = Proxy::start(cluster.port, AtCommit::Hang).await;
    let sql = SqlSettings { tls: TlsMode::Disable, ..SqlSettings::default() };
    let in_clear = executor(Databases { sql, ..Databases::default() });
    let through = |port| Target::Host {
        host: "127.0.0.1".into(),
        port,
        dbname: db.clone(),
        dbuser: "postgres".into(),
        pass: Vec::new(),
    };
    let work = rows_work(through(proxy.port), "INSERT INTO t VALUES ($1)", [json!([1]), json!([1]), json!([2])]);
    let chunk = Arc::new(Chunk::new());
    let dying = tokio::spawn({
        let (work, chunk) = (work.clone(), chunk.clone());
        async move { in_clear.execute_rows(work, &*chunk, CancellationToken::new()).await }
    });
    proxy.reached.notified().await;
    dying.abort();
    let (trace, answers) = chunk.noted().unwrap();
    assert_eq!(ends(&answers), ["done", "23505", "done"]);
    let mut again = taken_over(&work, Some(trace));
    again.each.target = through(cluster.port);
    assert_eq!(run(&plain(), again).await, SqlRowsEnd::EarlierCommitted);
    assert_eq!(count(&client, "SELECT count(*) * 100 + sum(a) FROM t").await, 203);

    let files = Files::new();
    files.connection().execute_batch("CREATE TABLE t(a UNIQUE)").unwrap();
    let work = rows_work(file(), "INSERT INTO t VALUES ($1)", [json!([1]), json!([1]), json!([2])]);
    let chunk = Chunk::new();
    let answers = committed(files.executor().execute_rows(work.clone(), &chunk, CancellationToken::new()).await);
    // It committed, and nobody recorded so.
    assert_eq!(chunk.noted().unwrap().1, answers);
    assert_eq!(run(&files.executor(), taken_over(&work, chunk.trace())).await, SqlRowsEnd::EarlierCommitted);
    assert_eq!(files.count("SELECT count(*) * 100 + sum(a) FROM t"), 203);
}

#[tokio::test]
async fn a_commit_whose_answer_is_lost_is_looked_into() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client.batch_execute("CREATE TABLE t(a int)").await.unwrap();
    let sql = SqlSettings { tls: TlsMode::Disable, ..SqlSettings::default() };
    let in_clear = executor(Databases { sql, ..Databases::default() });
    for (at_commit, found) in [(AtCommit::LoseReply, 2), (AtCommit::LoseCommit, 0)] {
        client.batch_execute("TRUNCATE t").await.unwrap();
        let proxy = Proxy::start(cluster.port, at_commit).await;
        let Target::Host { host, dbname, dbuser, pass, .. } = cluster.target(&db) else { unreachable!() };
        let target = Target::Host { host, port: proxy.port, dbname, dbuser, pass };
        match run(&in_clear, rows_work(target, "INSERT INTO t VALUES ($1)", [json!([1]), json!([2])])).await {
            SqlRowsEnd::Committed(answers, _) => assert_eq!((ends(&answers).len(), found), (2, 2)),
            SqlRowsEnd::Failed(failure) => assert_eq!((failure.retryable, found), (true, 0)),
            other => panic!("{other:?}"),
        }
        assert_eq!(count(&client, "SELECT count(*) FROM t").await, found);
    }
}

#[tokio::test]
async fn who_takes_a_chunk_over_ends_the_execution_that_still_runs() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client.batch_execute("CREATE TABLE t(a int); CREATE TABLE quick()").await.unwrap();
    let sql = "INSERT INTO t SELECT $1 FROM pg_sleep(CASE WHEN EXISTS (SELECT FROM quick) THEN 0 ELSE 60 END)";
    let first = rows_work(cluster.target(&db), sql, [json!([1]), json!([2])]);
    let (sleeper, executor) = (Chunk::new(), plain());
    let (end, later) = tokio::join!(executor.execute_rows(first.clone(), &sleeper, CancellationToken::new()), async {
        in_state(&client, &first, "wait_event = 'PgSleep'").await;
        client.batch_execute("INSERT INTO quick DEFAULT VALUES").await.unwrap();
        sleeper.lost.store(true, Ordering::SeqCst);
        run(&plain(), taken_over(&first, None)).await
    });
    assert_eq!(end, SqlRowsEnd::ClaimLost);
    assert_eq!(ends(&committed(later)), ["done", "done"]);
    assert_eq!(count(&client, "SELECT count(*) FROM t").await, 2);
}

#[tokio::test]
async fn a_lost_claim_leaves_no_row() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client.batch_execute("CREATE TABLE t(a int)").await.unwrap();
    let files = Files::new();
    files.connection().execute_batch("CREATE TABLE t(a)").unwrap();
    for (executor, target) in [(plain(), cluster.target(&db)), (files.executor(), file())] {
        let chunk = Chunk::new();
        chunk.lost.store(true, Ordering::SeqCst);
        let work = rows_work(target, "INSERT INTO t VALUES ($1)", [json!([1])]);
        assert_eq!(executor.execute_rows(work, &chunk, CancellationToken::new()).await, SqlRowsEnd::ClaimLost);
    }
    assert_eq!(count(&client, "SELECT count(*) FROM t").await + files.count("SELECT count(*) FROM t"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_do_not_wait_for_each_other_s_answers() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client.batch_execute("CREATE TABLE t(a int)").await.unwrap();
    let far = testkit::Proxy::start(([127, 0, 0, 1], cluster.port).into());
    let Target::Host { host, dbname, dbuser, pass, .. } = cluster.target(&db) else { unreachable!() };
    let target = Target::Host { host, port: far.addr().port(), dbname, dbuser, pass };
    // A bad row at the beginning, and from then on each has a savepoint of its own.
    for bad in [0, 1] {
        let sql =
            "INSERT INTO t SELECT $1 WHERE CASE WHEN $1 = 62 THEN pg_advisory_xact_lock(7) IS NOT NULL ELSE true END";
        let rows = (0..bad).map(|_| json!(["bad"])).chain((0..200).map(|n| json!([n])));
        let work = rows_work(target.clone(), sql, rows);
        client.batch_execute("SELECT pg_advisory_lock(7)").await.unwrap();
        let executing = tokio::spawn({
            let work = work.clone();
            async move { run(&plain(), work).await }
        });
        in_state(&client, &work, "wait_event_type = 'Lock'").await;
        let begun = cluster.received(work.each.job.as_str()).await;
        // From here on no answer gets through.
        far.delay(testkit::PATIENCE * 1_000);
        client.batch_execute("SELECT pg_advisory_unlock(7)").await.unwrap();
        eventually("the rows behind it are run", || async {
            cluster.received(work.each.job.as_str()).await >= begun + 50
        })
        .await;
        assert!(!executing.is_finished());
        executing.abort();
        assert!(executing.await.unwrap_err().is_cancelled());
        far.cut();
        far.delay(Duration::ZERO);
        gone(&client, &work).await;
        assert_eq!(count(&client, "SELECT count(*) FROM t").await, 0);
    }

    let rows = (0..1000).map(|n| if n % 50 == 49 { json!(["bad"]) } else { json!([n]) });
    let work = rows_work(target, "INSERT INTO t VALUES ($1)", rows);
    let answers = committed(run(&plain(), work).await);
    assert_eq!(ends(&answers).iter().filter(|end| **end == "22P02").count(), 20);
    assert_eq!(count(&client, "SELECT count(*) FROM t").await, 980);
}
