//! The SQL executor on SQLite files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::support::{Claim, done, eventually, executor, failed, run};
use queue_core::ids::{Fence, User};
use rusqlite::Connection;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use worker::execute::sql::SqlExecutor;
use worker::execute::sql::databases::{DatabaseSettings, Databases, LostStatement, SqlSettings, SqliteSettings};
use worker::execute::sql::template::{Dialect, Vars, render};
use worker::execute::{End, Executor, Target, Trace, Work};

struct Files {
    folder: TempDir,
    executor: SqlExecutor,
}

fn sqlite(folder: &Path, create: bool, lost_statement: LostStatement) -> SqlExecutor {
    let path = format!("{}/{{user}}.db", folder.display());
    executor(Databases {
        sql: SqlSettings { lost_statement, ..SqlSettings::default() },
        databases: BTreeMap::from([("file".into(), DatabaseSettings::Sqlite(SqliteSettings { path, create }))]),
    })
}

fn files() -> Files {
    let folder = tempfile::tempdir().unwrap();
    let executor = sqlite(folder.path(), true, LostStatement::Unknown);
    Files { folder, executor }
}

impl Files {
    fn path(&self, user: &str) -> PathBuf {
        self.folder.path().join(format!("{user}.db"))
    }

    fn count(&self, sql: &str) -> i64 {
        Connection::open(self.path("ann")).unwrap().query_row(sql, [], |row| row.get(0)).unwrap()
    }

    async fn run(&self, sql: &str) -> End {
        run(&self.executor, work(sql)).await
    }
}

fn work(sql: &str) -> Work {
    crate::support::work(Target::Named("file".into()), sql)
}

const ENDLESS: &str = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n";

#[tokio::test]
async fn tags_and_errors() {
    let files = files();
    for (sql, tag) in [
        ("CREATE TABLE t(a UNIQUE)", Some("CREATE TABLE")),
        ("INSERT INTO t VALUES (1), (2); -- end", Some("INSERT 0 2")),
        ("INSERT INTO t VALUES (3); UPDATE t SET a = a + 10", Some("UPDATE 3")),
        ("SELECT * FROM t", Some("SELECT 3")),
        ("DELETE FROM t WHERE a = 0", Some("DELETE 0")),
        ("SAVEPOINT s; INSERT INTO t VALUES (9); ROLLBACK TO s; RELEASE s", Some("RELEASE")),
        ("", None),
    ] {
        assert_eq!(done(files.run(sql).await).tag.as_deref(), tag, "{sql}");
    }
    for (sql, message) in [
        ("SELECT * FROM missing_1", "no such table: missing_1"),
        ("SELEC 1", "near \"SELEC\": syntax error"),
        ("INSERT INTO t VALUES (5); INSERT INTO t VALUES (11)", "UNIQUE constraint failed: t.a"),
        ("INSERT OR ROLLBACK INTO t VALUES (11); INSERT INTO t VALUES (6)", "UNIQUE constraint failed: t.a"),
        ("SELECT 1\0; SELECT 2", "the SQL text holds a NUL byte"),
        ("SELECT load_extension('x')", "extensions can't be loaded"),
        ("ATTACH '/tmp/other.db' AS x", "a job may use its own database file only"),
        ("ATTACH '/tmp/' || 'other.db' AS x", "a job may use its own database file only"),
        ("VACUUM INTO '/tmp/other.db'", "a job may use its own database file only"),
        ("PRAGMA writable_schema = on", "PRAGMA writable_schema is not allowed in a job"),
        ("PRAGMA Hard_Heap_Limit = 1", "PRAGMA hard_heap_limit is not allowed in a job"),
    ] {
        let failure = failed(files.run(sql).await);
        assert_eq!((failure.message.to_lowercase(), failure.retryable), (message.to_lowercase(), false), "{sql}");
    }
    assert_eq!(files.count("SELECT count(*) FROM t"), 3);
    assert!(!Path::new("/tmp/other.db").exists());
}

#[tokio::test]
async fn nothing_is_created_silently_and_users_are_apart() {
    let files = files();
    let strict = sqlite(files.folder.path(), false, LostStatement::Unknown);
    let failure = failed(run(&strict, work("CREATE TABLE t(a)")).await);
    assert_eq!((failure.message.as_str(), failure.retryable), ("unable to open database file", false));
    assert!(!files.path("ann").exists());
    done(files.run("CREATE TABLE mine(a)").await);
    done(run(&strict, work("INSERT INTO mine VALUES (1)")).await);
    let bob = |sql| Work { user: User::new("bob").unwrap(), ..work(sql) };
    assert_eq!(failed(run(&files.executor, bob("SELECT * FROM mine")).await).message, "no such table: mine");
    for user in ["../ann", "..", "a/b"] {
        let job = Work { user: User::new(user).unwrap(), ..work("SELECT 1") };
        assert_eq!(failed(run(&files.executor, job).await).message, "the user's name can't be part of a file name");
    }
    std::fs::write(files.path("ann"), "no database at all, but long enough to be read as one").unwrap();
    assert_eq!(failed(files.run("SELECT 1").await).message, "file is not a database");
}

#[tokio::test]
async fn timeouts_and_stops_interrupt() {
    let files = files();
    done(files.run("CREATE TABLE t(a)").await);
    for sql in [ENDLESS, "BEGIN; INSERT INTO t VALUES (1); "] {
        let sql = format!("{sql}; {ENDLESS}");
        let failure = failed(run(&files.executor, Work { timeout: Duration::from_millis(200), ..work(&sql) }).await);
        assert_eq!(failure.message, "canceling statement due to statement timeout");
        let (stop, claim) = (CancellationToken::new(), Claim::default());
        let (end, ()) = tokio::join!(files.executor.execute(work(&sql), &claim, stop.clone()), async {
            eventually("it is about to run", async || claim.asked.load(Ordering::SeqCst) > 0).await;
            stop.cancel();
        });
        assert_eq!(end, End::Stopped);
    }
    for delay_us in (0..10_000).step_by(250) {
        let (stop, claim) = (CancellationToken::new(), Claim::default());
        let job = work(&format!("INSERT INTO t VALUES ({delay_us})"));
        let (end, ()) = tokio::join!(files.executor.execute(job, &claim, stop.clone()), async {
            tokio::time::sleep(Duration::from_micros(delay_us)).await;
            stop.cancel();
        });
        let rows = files.count(&format!("SELECT count(*) FROM t WHERE a = {delay_us}"));
        match end {
            End::Done(_) => assert_eq!(rows, 1),
            End::Stopped => assert_eq!(rows, 0),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_locked_file_is_waited_for_within_bounds() {
    let files = files();
    done(files.run("CREATE TABLE t(a)").await);
    let other = Connection::open(files.path("ann")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE; INSERT INTO t VALUES (0)").unwrap();
    let (end, ()) = tokio::join!(files.run("INSERT INTO t VALUES (1)"), async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        other.execute_batch("COMMIT").unwrap();
    });
    done(end);
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let (stop, claim) = (CancellationToken::new(), Claim::default());
    let (end, ()) = tokio::join!(files.executor.execute(work("SELECT 1"), &claim, stop.clone()), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        stop.cancel();
    });
    assert_eq!(end, End::Stopped);
    let failure = failed(files.run("INSERT INTO t VALUES (2)").await);
    assert_eq!((failure.message.as_str(), failure.retryable), ("database is locked", true));
    assert_eq!(files.count("SELECT count(*) FROM t"), 2);
}

#[tokio::test]
async fn a_lost_claim_leaves_nothing() {
    let files = files();
    done(files.run("CREATE TABLE t(a)").await);
    for (sql, answers) in [
        ("INSERT INTO t VALUES (1)", 0),
        ("INSERT INTO t VALUES (1)", 1),
        ("BEGIN; INSERT INTO t VALUES (1); COMMIT", 1),
    ] {
        let claim = Claim::lost_after(answers);
        assert_eq!(files.executor.execute(work(sql), &claim, CancellationToken::new()).await, End::ClaimLost, "{sql}");
        assert_eq!(claim.traces(), []);
    }
    assert_eq!(files.count("SELECT count(*) FROM t"), 0);
}

#[tokio::test]
async fn a_death_before_or_after_commit_is_told_apart() {
    let files = files();
    done(files.run("CREATE TABLE t(a)").await);
    let job = work("INSERT INTO t VALUES (1)");
    let claim = Arc::new(Claim::hang_at_note());
    let dying = tokio::spawn({
        let (job, claim) = (job.clone(), claim.clone());
        let executor = sqlite(files.folder.path(), false, LostStatement::Unknown);
        async move { executor.execute(job, &*claim, CancellationToken::new()).await }
    });
    claim.hanging.notified().await;
    dying.abort();
    let earlier = claim.traces().pop();
    assert_eq!(earlier, Some(Trace::Transaction(job.fence.to_string())));
    let again = Work { earlier, fence: Fence(job.fence.0 + 1), ..job.clone() };
    let claim = Claim::default();
    done(files.executor.execute(again.clone(), &claim, CancellationToken::new()).await);
    assert_eq!(files.count("SELECT count(*) FROM t"), 1);

    // It committed, and nobody recorded so.
    let third = Work { earlier: claim.traces().pop(), fence: Fence(job.fence.0 + 2), ..again.clone() };
    let report = done(run(&files.executor, third).await);
    assert_eq!((report.tag, report.notices.len()), (None, 1));
    assert_eq!(files.count("SELECT count(*) FROM t"), 1);
    // A new run of the same job is no repetition.
    done(run(&files.executor, Work { earlier: None, fence: Fence(job.fence.0 + 3), ..job }).await);
    assert_eq!(files.count("SELECT count(*) FROM t"), 2);
}

#[tokio::test]
async fn what_can_t_run_in_a_transaction_runs_bare() {
    let files = files();
    done(files.run("CREATE TABLE t(a); INSERT INTO t VALUES (1)").await);
    let noted = async |sql: &str| {
        let claim = Claim::default();
        done(files.executor.execute(work(sql), &claim, CancellationToken::new()).await);
        claim.traces()
    };
    assert_eq!(noted("SELECT * FROM t").await, []);
    assert!(matches!(&noted("INSERT INTO t VALUES (2)").await[..], [Trace::Transaction(_)]));
    for sql in [
        "VACUUM",
        "BEGIN; INSERT INTO t VALUES (3); COMMIT",
        "/* x */ PRAGMA journal_mode = wal",
        "INSERT INTO t VALUES (4); COMMIT; BEGIN",
    ] {
        let end = files.executor.execute(work(sql), &Claim::default(), CancellationToken::new()).await;
        if sql.ends_with("BEGIN") {
            // COMMIT without BEGIN is SQLite's to refuse.
            assert_eq!(failed(end).message, "cannot commit - no transaction is active");
        } else {
            done(end);
        }
    }
    assert_eq!(noted("VACUUM").await, [Trace::Untransacted]);
    let failure = failed(files.run("BEGIN; INSERT INTO t VALUES (5)").await);
    assert!(failure.message.contains("left a transaction open"));
    assert_eq!(files.count("SELECT count(*) FROM t WHERE a = 5"), 0);

    let lost = Work { earlier: Some(Trace::Untransacted), ..work("VACUUM") };
    assert!(matches!(run(&files.executor, lost.clone()).await, End::Unknown(_)));
    done(run(&sqlite(files.folder.path(), false, LostStatement::RunAgain), lost).await);
}

#[tokio::test]
async fn the_markers_are_out_of_reach() {
    let files = files();
    done(files.run("CREATE TABLE t(a); INSERT INTO t VALUES (1)").await);
    for sql in [
        "DELETE FROM drayman_applied",
        "DROP TABLE main.Drayman_Applied",
        "UPDATE drayman_applied SET job = ''",
        "ALTER TABLE drayman_applied RENAME TO x",
        "CREATE TEMP TABLE drayman_applied(a)",
        "CREATE TRIGGER x AFTER INSERT ON drayman_applied BEGIN DELETE FROM t; END",
        "BEGIN; DELETE FROM drayman_applied; COMMIT",
        "CREATE TRIGGER y AFTER INSERT ON t BEGIN DELETE FROM drayman_applied; END; INSERT INTO t VALUES (2)",
    ] {
        let failure = failed(files.run(sql).await);
        assert_eq!(failure.message, "the table drayman_applied is Drayman's own", "{sql}");
    }
    assert_eq!(files.count("SELECT count(*) FROM t"), 1);
    assert_eq!(files.count("SELECT count(*) FROM drayman_applied"), 1);
    // Old ones go.
    Connection::open(files.path("ann")).unwrap().execute("UPDATE drayman_applied SET at = at - 8 * 86400", []).unwrap();
    done(files.run("INSERT INTO t VALUES (3)").await);
    assert_eq!(files.count("SELECT count(*) FROM drayman_applied"), 1);
}

#[tokio::test]
async fn a_rendered_value_comes_back_as_it_was() {
    let files = files();
    done(files.run("CREATE TABLE seen(value)").await);
    for value in ["it's", "a\\'b", "'; DROP TABLE seen; --", "\"", "]", "`", "*/", "é\n\r", "''", "\\"] {
        for template in [
            "INSERT INTO seen VALUES ('<%= error_message %>') -- <%= error_message %>",
            "INSERT INTO seen VALUES (<%= error_message %>) /* <%= error_message %> */",
            "INSERT INTO seen SELECT '<%= error_message %>' AS \"x<%= error_message %>\"",
            "INSERT INTO seen SELECT '<%= error_message %>' AS `x<%= error_message %>`",
        ] {
            let vars = Vars { job_id: "x", error_message: Some(value), params: None };
            let sql = render(template, Dialect::Sqlite, &vars).unwrap();
            done(files.run(&sql).await);
            let connection = Connection::open(files.path("ann")).unwrap();
            let seen: String =
                connection.query_row("SELECT group_concat(value, '|') FROM seen", [], |row| row.get(0)).unwrap();
            assert_eq!(seen, value, "{sql}");
            connection.execute("DELETE FROM seen", []).unwrap();
        }
    }
}
