//! The SQL executor on a real PostgreSQL.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::cluster::{Cluster, count};
use crate::commit_proxy::{AtCommit, Proxy};
use crate::support::{Claim, done, eventually, executor, failed, run, work};
use queue_core::ids::Fence;
use tokio_util::sync::CancellationToken;
use worker::execute::sql::databases::{Databases, LostStatement, SqlSettings};
use worker::execute::sql::template::{Dialect, Vars, render};
use worker::execute::sql::{NOTICES_MAX, SqlExecutor};
use worker::execute::{End, Executor, Target, Trace, Work};

fn plain() -> SqlExecutor {
    executor(Databases::default())
}

fn with_lost(lost_statement: LostStatement) -> SqlExecutor {
    executor(Databases { sql: SqlSettings { lost_statement, ..SqlSettings::default() }, ..Databases::default() })
}

/// Ends when the job has a backend that runs its text.
async fn running(client: &tokio_postgres::Client, work: &Work) {
    let sql =
        format!("SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '/* {} */%'", work.job);
    eventually("the statement runs", || async { count(client, &sql).await == 1 }).await;
}

/// Ends when a statement in this database waits for a lock that another holds.
async fn waits_for_a_lock(client: &tokio_postgres::Client) {
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    eventually("a statement waits for a lock", || async { count(client, sql).await == 1 }).await;
}

/// No backend of the job is left.
async fn gone(client: &tokio_postgres::Client, work: &Work) {
    let sql = format!("SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'drayman:{}:%'", work.job);
    eventually("the backend is gone", || async { count(client, &sql).await == 0 }).await;
}

#[tokio::test]
async fn tags_are_postgresql_s_own() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client.batch_execute("CREATE TABLE t(a int)").await.unwrap();
    let executor = plain();
    for (sql, tag) in [
        ("INSERT INTO t VALUES (1), (2)", Some("INSERT 0 2")),
        ("UPDATE t SET a = 3", Some("UPDATE 2")),
        ("WITH x AS (DELETE FROM t RETURNING a) INSERT INTO t SELECT a FROM x", Some("INSERT 0 2")),
        ("SELECT 1.5::numeric, 'x'::text, '{1}'::int[], now(), null", Some("SELECT 1")),
        ("CREATE TABLE u AS SELECT generate_series(1, 5)", Some("SELECT 5")),
        ("CREATE TABLE v(a int); INSERT INTO v VALUES (1); -- end", Some("INSERT 0 1")),
        ("VACUUM t", Some("VACUUM")),
        ("BEGIN; UPDATE t SET a = 4; COMMIT", Some("COMMIT")),
        ("-- nothing", None),
        ("", None),
    ] {
        assert_eq!(done(run(&executor, work(cluster.target(&db), sql)).await).tag.as_deref(), tag, "{sql}");
    }
}

#[tokio::test]
async fn rows_of_any_size_and_number_pass_in_bounded_memory() {
    let cluster = Cluster::get();
    let executor = plain();
    let target = || cluster.target("postgres");
    let report = done(run(&executor, work(target(), "SELECT repeat('x', 150000000)")).await);
    assert_eq!(report.tag.as_deref(), Some("SELECT 1"));
    done(run(&executor, work(target(), "SELECT * FROM generate_series(1, 2000000)")).await);
    let peak = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = peak.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak_kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak_kib < 120 * 1024, "{peak_kib} KiB");
}

#[tokio::test]
async fn notices_are_kept_within_bounds() {
    let cluster = Cluster::get();
    let sql = "DO $$ BEGIN RAISE NOTICE 'first'; RAISE WARNING 'second'; FOR i IN 1..50 LOOP RAISE NOTICE '%', \
               repeat('é', 20000); END LOOP; RAISE NOTICE '%', repeat('x', 5000000); END $$";
    let report = done(run(&plain(), work(cluster.target("postgres"), sql)).await);
    assert_eq!(report.notices[..2], ["NOTICE: first", "WARNING: second"]);
    assert_eq!(report.notices.len(), NOTICES_MAX);
    assert!(report.notices.iter().all(|notice| notice.len() <= 8192));
}

#[tokio::test]
async fn errors_are_postgresql_s_own() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client
        .batch_execute("CREATE TABLE t(a int UNIQUE DEFERRABLE INITIALLY DEFERRED); CREATE TABLE u(a int)")
        .await
        .unwrap();
    let executor = plain();
    let target = || cluster.target(&db);
    for (sql, message, code) in [
        ("SELECT * FROM missing_1", "relation \"missing_1\" does not exist", "42P01"),
        ("SELEC 1", "syntax error at or near \"SELEC\"", "42601"),
        ("SELECT 1/0", "division by zero", "22012"),
        ("SELECT 'unterminated", "unterminated quoted string at or near \"'unterminated\"", "42601"),
        ("INSERT INTO u VALUES (1); SELECT 1/0", "division by zero", "22012"),
        ("INSERT INTO t VALUES (1), (1)", "duplicate key value violates unique constraint \"t_a_key\"", "23505"),
        ("VACUUM missing_2", "relation \"missing_2\" does not exist", "42P01"),
        ("VACUUM; SELECT 1", "VACUUM cannot be executed from a function or multi-command string", "25001"),
    ] {
        let failure = failed(run(&executor, work(target(), sql)).await);
        if code == "25001" {
            assert_eq!(failure.sqlstate.as_deref(), Some(code), "{sql}");
        } else {
            assert_eq!((failure.message.as_str(), failure.sqlstate.as_deref()), (message, Some(code)), "{sql}");
        }
        assert!(!failure.retryable, "{sql}");
    }
    assert_eq!(count(&client, "SELECT (SELECT count(*) FROM t) + (SELECT count(*) FROM u)").await, 0);
    let failure = failed(run(&executor, work(target(), "SELECT 1\0")).await);
    assert_eq!(failure.message, "the SQL text holds a NUL byte");
    let raise = "DO $$ BEGIN RAISE '%', repeat('x', 3000000); END $$";
    let failure = failed(run(&executor, work(target(), raise)).await);
    assert_eq!((failure.message.as_str(), failure.retryable), ("the database sent a message that is too long", false));
}

#[tokio::test]
async fn deadlocks_and_serialization_failures_may_be_retried() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client.batch_execute("CREATE TABLE t(a int); INSERT INTO t VALUES (1), (2)").await.unwrap();
    let executor = plain();
    // The other side of the deadlock sleeps first and is never the one that is found.
    let mut other = cluster.client(&db).await;
    other.batch_execute("SET deadlock_timeout = '1h'").await.unwrap();
    let transaction = other.transaction().await.unwrap();
    transaction.batch_execute("UPDATE t SET a = a WHERE a = 2").await.unwrap();
    let job = work(cluster.target(&db), "UPDATE t SET a = a WHERE a = 1; UPDATE t SET a = a WHERE a = 2");
    let (end, _) = tokio::join!(run(&executor, job.clone()), async {
        waits_for_a_lock(&client).await;
        transaction.batch_execute("UPDATE t SET a = a WHERE a = 1").await.unwrap();
        transaction.commit().await.unwrap();
    });
    let failure = failed(end);
    assert_eq!((failure.sqlstate.as_deref(), failure.retryable), (Some("40P01"), true));

    let sql = "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE; SELECT count(*) FROM t; SELECT pg_advisory_xact_lock(99); UPDATE t SET a = a";
    let job = work(cluster.target(&db), sql);
    client.batch_execute("SELECT pg_advisory_lock(99)").await.unwrap();
    let (end, _) = tokio::join!(run(&executor, job.clone()), async {
        waits_for_a_lock(&client).await;
        client.batch_execute("UPDATE t SET a = a; SELECT pg_advisory_unlock(99)").await.unwrap();
    });
    let failure = failed(end);
    assert_eq!((failure.sqlstate.as_deref(), failure.retryable), (Some("40001"), true));
}

#[tokio::test]
async fn connection_errors_say_whether_to_try_again() {
    let cluster = Cluster::get();
    let executor = plain();
    let refused = |port| Target::Host {
        host: "127.0.0.1".into(),
        port,
        dbname: "postgres".into(),
        dbuser: "postgres".into(),
        pass: b"hush-hush".to_vec(),
    };
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let failure = failed(run(&executor, work(refused(free), "SELECT 1")).await);
    assert!(failure.retryable && failure.message.contains("refused"), "{failure:?}");
    assert!(!failure.message.contains("hush-hush"));

    let client = cluster.client("postgres").await;
    client.batch_execute("CREATE ROLE secretive LOGIN PASSWORD 'right'").await.unwrap();
    for (target, code) in [
        (cluster.target_as("postgres", "secretive", b"hush-hush"), "28P01"),
        (cluster.target_as("postgres", "secretive", b""), "28P01"),
        (cluster.target_as("missing", "postgres", b""), "3D000"),
        (cluster.target_as("postgres", "nobody", b""), "28000"),
    ] {
        let failure = failed(run(&executor, work(target, "SELECT 1")).await);
        assert_eq!((failure.sqlstate.as_deref(), failure.retryable), (Some(code), false), "{failure:?}");
        assert!(!failure.message.contains("hush-hush"));
    }

    let failure = failed(run(&executor, work(Target::Named("nowhere".into()), "SELECT 1")).await);
    assert!(failure.message.contains("'nowhere'"));
    for (host, message) in [
        ("10.9.8.7", "database host '10.9.8.7' is not allowed by this worker (sql.allowed_hosts)"),
        (
            "/var/run/postgresql",
            "database host '/var/run/postgresql' is not allowed by this worker (sql.allowed_hosts)",
        ),
        ("127.0.0.1", "Batch Job DB misconfiguration"),
    ] {
        let target =
            Target::Host { host: host.into(), port: 5432, dbname: "".into(), dbuser: "x".into(), pass: Vec::new() };
        let failure = failed(run(&executor, work(target, "SELECT 1")).await);
        assert_eq!((failure.message.as_str(), failure.retryable), (message, false));
    }

    // A server that accepts and says nothing.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let sql = SqlSettings { connect_timeout: Duration::from_millis(200), ..SqlSettings::default() };
    let hasty = crate::support::executor(Databases { sql, ..Databases::default() });
    let failure = failed(run(&hasty, work(refused(silent.local_addr().unwrap().port()), "SELECT 1")).await);
    assert!(failure.retryable && failure.message.contains("too long"), "{failure:?}");
}

#[tokio::test]
async fn passwords_of_odd_bytes_work() {
    let cluster = Cluster::get();
    let client = cluster.client("postgres").await;
    client.batch_execute("CREATE ROLE oldfashioned LOGIN").await.unwrap();
    client.batch_execute("SET password_encryption = md5").await.unwrap();
    let odd = " a'b\"c\\d%e{}:/@?#&=;\t\né\u{7f} ";
    let set = |role: &str| format!("ALTER ROLE {role} PASSWORD E'{}'", odd.replace('\\', "\\\\").replace('\'', "''"));
    client.batch_execute(&set("oldfashioned")).await.unwrap();
    done(run(&plain(), work(cluster.target_as("postgres", "oldfashioned", odd.as_bytes()), "SELECT 1")).await);
    // Bytes that are no text, or end a string in C, fail as any wrong password does, or by name.
    for pass in [&b"\xff\xfe"[..], b"a\0b", &[b'x'; 5000]] {
        let failure =
            failed(run(&plain(), work(cluster.target_as("postgres", "oldfashioned", pass), "SELECT 1")).await);
        assert!(!failure.retryable, "{failure:?}");
    }
}

#[tokio::test]
async fn a_timeout_holds_over_several_statements() {
    let cluster = Cluster::get();
    let executor = plain();
    for sql in [
        "SELECT pg_sleep(600)",
        "SELECT pg_sleep(0.2); SELECT pg_sleep(0.2); SELECT pg_sleep(0.2); SELECT pg_sleep(600)",
        "SET statement_timeout = 0; SELECT pg_sleep(600)",
        "BEGIN; SELECT pg_sleep(0.2); COMMIT; SELECT pg_sleep(0.2); SELECT pg_sleep(0.2); SELECT pg_sleep(600)",
    ] {
        let job = Work { timeout: Duration::from_millis(300), ..work(cluster.target("postgres"), sql) };
        let failure = failed(run(&executor, job).await);
        assert_eq!(failure.message, "canceling statement due to statement timeout", "{sql}");
        assert_eq!((failure.sqlstate.as_deref(), failure.retryable), (Some("57014"), false));
    }
}

#[tokio::test]
async fn a_stop_is_heeded_before_during_and_not_after() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client.batch_execute("CREATE TABLE t(a int)").await.unwrap();
    let executor = plain();
    let stop = CancellationToken::new();
    stop.cancel();
    let job = work(cluster.target(&db), "INSERT INTO t VALUES (1)");
    assert_eq!(executor.execute(job.clone(), &Claim::default(), stop).await, End::Stopped);
    assert_eq!(cluster.received(job.job.as_str()).await, 0);

    for sql in [
        "INSERT INTO t VALUES (2); SELECT pg_sleep(600)",
        "BEGIN; INSERT INTO t VALUES (2); SELECT pg_sleep(600); COMMIT",
    ] {
        let stop = CancellationToken::new();
        let job = work(cluster.target(&db), sql);
        let claim = Claim::default();
        let (end, ()) = tokio::join!(executor.execute(job.clone(), &claim, stop.clone()), async {
            running(&client, &job).await;
            stop.cancel();
        });
        assert_eq!(end, End::Stopped, "{sql}");
        gone(&client, &job).await;
    }
    assert_eq!(count(&client, "SELECT count(*) FROM t").await, 0);

    // At any moment at all: what is told is what happened.
    for delay_us in (0..20_000).step_by(500) {
        let stop = CancellationToken::new();
        let job = work(cluster.target(&db), &format!("INSERT INTO t VALUES ({delay_us}) -- any moment"));
        let claim = Claim::default();
        let (end, ()) = tokio::join!(executor.execute(job, &claim, stop.clone()), async {
            tokio::time::sleep(Duration::from_micros(delay_us)).await;
            stop.cancel();
        });
        let rows = count(&client, &format!("SELECT count(*) FROM t WHERE a = {delay_us}")).await;
        match end {
            End::Done(_) => assert_eq!(rows, 1),
            End::Stopped => assert_eq!(rows, 0),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_statement_cancelled_from_elsewhere_is_told_apart() {
    let cluster = Cluster::get();
    let client = cluster.client("postgres").await;
    for sql in ["SELECT pg_sleep(600)", "BEGIN; SELECT pg_sleep(600); COMMIT"] {
        let job = work(cluster.target("postgres"), sql);
        let executor = plain();
        let (end, ()) = tokio::join!(run(&executor, job.clone()), async {
            running(&client, &job).await;
            let cancel =
                format!("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE query LIKE '/* {} */%'", job.job);
            client.batch_execute(&cancel).await.unwrap();
        });
        assert_eq!(end, End::CancelledElsewhere);
    }
}

#[tokio::test]
async fn a_terminated_backend_is_tried_again_unless_it_may_have_had_effect() {
    let cluster = Cluster::get();
    let client = cluster.client("postgres").await;
    let terminated = async |executor: &SqlExecutor, sql: &str| {
        let job = work(cluster.target("postgres"), sql);
        let (end, ()) = tokio::join!(run(executor, job.clone()), async {
            running(&client, &job).await;
            let end =
                format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '/* {} */%'", job.job);
            client.batch_execute(&end).await.unwrap();
        });
        end
    };
    let failure = failed(terminated(&plain(), "SELECT pg_sleep(600)").await);
    assert_eq!((failure.sqlstate.as_deref(), failure.retryable), (Some("57P01"), true));
    let bare = "BEGIN; SELECT pg_sleep(600); COMMIT";
    assert!(matches!(terminated(&plain(), bare).await, End::Unknown(_)));
    assert!(failed(terminated(&with_lost(LostStatement::RunAgain), bare).await).retryable);
}

#[tokio::test]
async fn who_takes_over_ends_the_earlier_execution() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client.batch_execute("CREATE TABLE t(a int); CREATE TABLE quick()").await.unwrap();
    let slow_at_first = "INSERT INTO t VALUES (1); SELECT pg_sleep(600) WHERE NOT EXISTS (SELECT FROM quick)";
    // The second gives its lock away.
    for sql in [slow_at_first, &format!("SELECT pg_advisory_unlock_all(); {slow_at_first}")] {
        client.batch_execute("TRUNCATE t, quick").await.unwrap();
        let first = work(cluster.target(&db), sql);
        let later = Work { takes_over: true, fence: Fence(first.fence.0 + 1), ..first.clone() };
        let lost = Claim::default();
        let (end, later_end) =
            tokio::join!(async { plain().execute(first.clone(), &lost, CancellationToken::new()).await }, async {
                running(&client, &first).await;
                client.batch_execute("INSERT INTO quick DEFAULT VALUES").await.unwrap();
                lost.lost.store(true, Ordering::SeqCst);
                run(&plain(), later).await
            });
        assert_eq!(end, End::ClaimLost, "{sql}");
        done(later_end);
        assert_eq!(count(&client, "SELECT count(*) FROM t").await, 1, "{sql}");
    }
}

#[tokio::test]
async fn a_late_sleeper_does_not_disturb_who_took_over() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client.batch_execute("CREATE TABLE gate()").await.unwrap();
    let mut other = cluster.client(&db).await;
    let gate = other.transaction().await.unwrap();
    gate.batch_execute("LOCK TABLE gate").await.unwrap();
    let holder = work(cluster.target(&db), "SELECT count(*) FROM gate");
    let sleeper = Work { fence: Fence(holder.fence.0 - 1), ..holder.clone() };
    let executor = plain();
    let (end, late) = tokio::join!(run(&executor, holder.clone()), async {
        running(&client, &holder).await;
        let lost = Claim::lost_after(0);
        let end = plain().execute(sleeper.clone(), &lost, CancellationToken::new()).await;
        // Even one that was told yes just before it fell asleep.
        let (executor, claim) = (plain(), Claim::lost_after(1));
        let waiting = executor.execute(sleeper.clone(), &claim, CancellationToken::new());
        let has_tried = eventually("it has tried more than once to end the others", || async {
            cluster.asked(&["pg_terminate_backend", sleeper.job.as_str()]).await > 1
        });
        tokio::select! {
            end = waiting => panic!("it did not wait: {end:?}"),
            () = has_tried => {}
        }
        gate.commit().await.unwrap();
        end
    });
    done(end);
    assert_eq!(late, End::ClaimLost);
}

#[tokio::test]
async fn a_lost_claim_leaves_nothing() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client.batch_execute("CREATE TABLE t(a int)").await.unwrap();
    let bare = "BEGIN; INSERT INTO t VALUES (1); COMMIT";
    for (sql, answers) in [("INSERT INTO t VALUES (1)", 0), ("INSERT INTO t VALUES (1)", 1), (bare, 0)] {
        let claim = Claim::lost_after(answers);
        let job = work(cluster.target(&db), sql);
        assert_eq!(plain().execute(job.clone(), &claim, CancellationToken::new()).await, End::ClaimLost);
        assert_eq!(claim.traces(), []);
        gone(&client, &job).await;
    }
    assert_eq!(count(&client, "SELECT count(*) FROM t").await, 0);
}

#[tokio::test]
async fn what_is_noted_is_what_may_take_effect() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client
        .batch_execute("CREATE TABLE t(a int); CREATE PROCEDURE p() LANGUAGE plpgsql AS $$ BEGIN COMMIT; END $$")
        .await
        .unwrap();
    let noted = async |sql: &str| {
        let claim = Claim::default();
        done(plain().execute(work(cluster.target(&db), sql), &claim, CancellationToken::new()).await);
        claim.traces()
    };
    assert_eq!(noted("SELECT 1").await, []);
    assert!(
        matches!(&noted("INSERT INTO t VALUES (1)").await[..], [Trace::Transaction(id)] if id.split_once('@').is_some_and(|(id, _)| id.parse::<u64>().is_ok()))
    );
    for sql in [
        "VACUUM t",
        "CREATE INDEX CONCURRENTLY i ON t(a)",
        "BEGIN; INSERT INTO t VALUES (1); COMMIT; INSERT INTO t VALUES (2)",
        "CALL p()",
        "DO $$ BEGIN INSERT INTO t VALUES (3); COMMIT; INSERT INTO t VALUES (4); END $$",
        "/* x */ CREATE DATABASE other",
        "ALTER SYSTEM SET work_mem = '5MB'",
        "DISCARD ALL",
        "DROP DATABASE IF EXISTS missing_3",
    ] {
        assert_eq!(noted(sql).await, [Trace::Untransacted], "{sql}");
    }
    assert_eq!(count(&client, "SELECT count(*) FROM t").await, 5);
    // Those that the tokenizer sees are sent once, the others once more after PostgreSQL's refusal.
    assert_eq!(cluster.received("CREATE DATABASE other").await, 1);
    assert_eq!(cluster.received("CALL p()").await, 2);
}

#[tokio::test]
async fn the_text_is_one_message_behind_its_comment() {
    let cluster = Cluster::get();
    let sql = "SELECT 4711; SELECT '4712; x'";
    let job = work(cluster.target("postgres"), sql);
    done(run(&plain(), job.clone()).await);
    assert_eq!(cluster.received(&format!("/* {} */ {sql}", job.job)).await, 1);
}

#[tokio::test]
async fn a_transaction_left_open_is_no_success() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client.batch_execute("CREATE TABLE t(a int)").await.unwrap();
    let failure = failed(run(&plain(), work(cluster.target(&db), "BEGIN; INSERT INTO t VALUES (1)")).await);
    assert!(failure.message.contains("left a transaction open"));
    assert_eq!(count(&client, "SELECT count(*) FROM t").await, 0);
}

#[tokio::test]
async fn copies_with_the_client_are_refused_and_with_files_run() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client.batch_execute("CREATE TABLE t(a text)").await.unwrap();
    let executor = plain();
    for sql in [
        "COPY t FROM STDIN",
        "INSERT INTO t VALUES ('x'); COPY (SELECT 1) TO STDOUT",
        "BEGIN; COPY t TO STDOUT; COMMIT",
    ] {
        let job = work(cluster.target(&db), sql);
        let failure = failed(run(&executor, job.clone()).await);
        assert!(failure.message.starts_with("COPY to or from the client is not supported"), "{sql}: {failure:?}");
        assert_eq!(cluster.received(job.job.as_str()).await, 0, "{sql}");
    }
    assert_eq!(
        done(run(&executor, work(cluster.target(&db), "COPY t FROM PROGRAM 'echo a; echo b'")).await).tag.unwrap(),
        "COPY 2"
    );
    assert_eq!(count(&client, "SELECT count(*) FROM t").await, 2);
}

#[tokio::test]
async fn a_death_before_commit_is_run_again_once() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client.batch_execute("CREATE TABLE t(a int)").await.unwrap();
    let job = work(cluster.target(&db), "INSERT INTO t VALUES (1)");

    // While the statement runs: nothing was noted.
    let slow = Work { sql: "INSERT INTO t VALUES (1); SELECT pg_sleep(60)".into(), ..job.clone() };
    let dying = tokio::spawn({
        let slow = slow.clone();
        async move { plain().execute(slow, &Claim::default(), CancellationToken::new()).await }
    });
    running(&client, &slow).await;
    dying.abort();
    // The backend does not outlive it by much.
    gone(&client, &job).await;

    // Between note and COMMIT.
    let claim = Arc::new(Claim::hang_at_note());
    let dying = tokio::spawn({
        let (job, claim) = (job.clone(), claim.clone());
        async move { plain().execute(job, &*claim, CancellationToken::new()).await }
    });
    claim.hanging.notified().await;
    dying.abort();
    let again = Work { earlier: claim.traces().pop(), fence: Fence(job.fence.0 + 1), ..job.clone() };
    assert!(matches!(again.earlier, Some(Trace::Transaction(_))));
    assert_eq!(done(run(&plain(), again).await).tag.as_deref(), Some("INSERT 0 1"));
    assert_eq!(count(&client, "SELECT count(*) FROM t").await, 1);
}

#[tokio::test]
async fn a_frozen_execution_is_ended_and_run_again_once() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client.batch_execute("CREATE TABLE t(a int)").await.unwrap();
    let job = work(cluster.target(&db), "INSERT INTO t VALUES (1)");
    let claim = Arc::new(Claim::hang_at_note());
    let frozen = tokio::spawn({
        let (job, claim) = (job.clone(), claim.clone());
        async move { plain().execute(job, &*claim, CancellationToken::new()).await }
    });
    claim.hanging.notified().await;
    let again = Work { earlier: claim.traces().pop(), fence: Fence(job.fence.0 + 1), ..job.clone() };
    done(run(&plain(), again).await);
    assert_eq!(count(&client, "SELECT count(*) FROM t").await, 1);
    frozen.abort();
}

fn through(proxy: &Proxy, cluster: &Cluster, db: &str) -> Target {
    match cluster.target(db) {
        Target::Host { host, dbname, dbuser, pass, .. } => {
            Target::Host { host, port: proxy.port, dbname, dbuser, pass }
        }
        named => named,
    }
}

/// The proxy must be able to read along.
fn in_clear() -> SqlExecutor {
    let tls = worker::execute::sql::databases::TlsMode::Disable;
    executor(Databases { sql: SqlSettings { tls, ..SqlSettings::default() }, ..Databases::default() })
}

#[tokio::test]
async fn a_death_after_commit_is_recognised() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client.batch_execute("CREATE TABLE t(a int)").await.unwrap();
    let proxy = Proxy::start(cluster.port, AtCommit::Hang).await;
    let job = work(through(&proxy, &cluster, &db), "INSERT INTO t VALUES (1)");
    let claim = Arc::new(Claim::default());
    let dying = tokio::spawn({
        let (job, claim) = (job.clone(), claim.clone());
        async move { in_clear().execute(job, &*claim, CancellationToken::new()).await }
    });
    proxy.reached.notified().await;
    dying.abort();
    assert_eq!(count(&client, "SELECT count(*) FROM t").await, 1);
    let earlier = claim.traces().pop();
    let again = Work { earlier, fence: Fence(job.fence.0 + 1), target: cluster.target(&db), ..job.clone() };
    let report = done(run(&plain(), again.clone()).await);
    assert_eq!((report.tag, report.notices.len()), (None, 1));
    assert_eq!(cluster.received(job.job.as_str()).await, 1);
    assert_eq!(count(&client, "SELECT count(*) FROM t").await, 1);

    // Traces that can't be asked about.
    for id in ["18446744073709551615", "1", "x'; DROP TABLE t; --", ""] {
        let again = Work { earlier: Some(Trace::Transaction(id.into())), ..again.clone() };
        let end = run(&plain(), again).await;
        assert!(matches!(end, End::Unknown(_) | End::Done(_)), "{id}: {end:?}");
    }
    assert_eq!(count(&client, "SELECT count(*) FROM t").await, 1);
}

#[tokio::test]
async fn a_connection_lost_in_commit_is_looked_into() {
    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client.batch_execute("CREATE TABLE t(a int)").await.unwrap();
    let proxy = Proxy::start(cluster.port, AtCommit::LoseReply).await;
    let job = work(through(&proxy, &cluster, &db), "INSERT INTO t VALUES (1)");
    assert_eq!(done(run(&in_clear(), job).await).tag.as_deref(), Some("INSERT 0 1"));
    assert_eq!(count(&client, "SELECT count(*) FROM t").await, 1);

    let proxy = Proxy::start(cluster.port, AtCommit::LoseCommit).await;
    let job = work(through(&proxy, &cluster, &db), "INSERT INTO t VALUES (2)");
    let failure = failed(run(&in_clear(), job).await);
    assert!(failure.retryable, "{failure:?}");
    assert_eq!(count(&client, "SELECT count(*) FROM t").await, 1);
}

#[tokio::test]
async fn a_lost_statement_outside_of_transactions_ends_by_setting() {
    let cluster = Cluster::get();
    let lost = || Work { earlier: Some(Trace::Untransacted), ..work(cluster.target("postgres"), "VACUUM") };
    let job = lost();
    assert!(matches!(run(&plain(), job.clone()).await, End::Unknown(_)));
    assert_eq!(cluster.received(job.job.as_str()).await, 0);
    done(run(&with_lost(LostStatement::RunAgain), lost()).await);
}

#[tokio::test]
async fn statements_of_one_job_follow_each_other_without_a_kill() {
    let cluster = Cluster::get();
    let executor = plain();
    let first = work(cluster.target("postgres"), "SELECT 1");
    for fence in 0..20 {
        let next = Work { fence: Fence(first.fence.0 + fence), ..first.clone() };
        let sql = if fence % 3 == 0 { "SELECT 1/0" } else { "CREATE TEMP TABLE x(a int)" };
        run(&executor, Work { sql: sql.into(), ..next }).await;
    }
    let killed = format!("drayman:{}", first.job);
    let log = cluster.log();
    assert!(!log.lines().any(|line| line.contains("terminating connection") && line.contains(&killed)));
}

#[tokio::test]
async fn a_rendered_value_comes_back_as_it_was() {
    use proptest::prelude::*;
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    let cluster = Cluster::get();
    let (db, client) = cluster.database().await;
    client
        .batch_execute(
            "CREATE TABLE seen(place text, value text); CREATE ROLE backslashes LOGIN SUPERUSER; \
             ALTER ROLE backslashes SET standard_conforming_strings = off",
        )
        .await
        .unwrap();
    let executor = in_clear();
    let mut runner = TestRunner::deterministic();
    let parts = vec![
        "'",
        "''",
        "\\",
        "\\'",
        "\"",
        "$$",
        "$a$",
        "--",
        "/*",
        "*/",
        ";",
        "\n",
        "\r",
        "x",
        " ",
        "é",
        "DROP TABLE seen",
    ];
    let strategy = prop_oneof![
        any::<String>(),
        proptest::collection::vec(proptest::sample::select(parts), 0..8).prop_map(|parts| parts.concat())
    ];
    for round in 0..120 {
        let value = strategy.new_tree(&mut runner).unwrap().current();
        let kept = value.replace('\0', "");
        let role = if round % 2 == 0 { "postgres" } else { "backslashes" };
        for (place, template) in [
            ("plain", "INSERT INTO seen VALUES ('plain', '<%= error_message %>') -- <%= error_message %>\n"),
            ("escaped", "INSERT INTO seen VALUES ('escaped', E'<%= error_message %>') /* <%= error_message %>*/"),
            ("bare", "INSERT INTO seen VALUES ('bare', <%= error_message %>)"),
            ("continued", "INSERT INTO seen VALUES ('continued', E'' -- <%= error_message %>\n'<%= error_message %>')"),
            ("dollar", "INSERT INTO seen VALUES ('dollar', $some_tag$<%= error_message %>$some_tag$)"),
            ("name", "INSERT INTO seen SELECT 'name', '<%= error_message %>' AS \"x<%= error_message %>\""),
            ("code", "DO $code$ BEGIN INSERT INTO seen VALUES ('code', '<%= error_message %>'); END $code$"),
        ] {
            let vars = Vars { job_id: "x", error_message: Some(&value), params: None };
            let sql = render(template, Dialect::Postgres, &vars).unwrap();
            done(run(&executor, work(cluster.target_as(&db, role, b""), &sql)).await);
            let rows = client.query("DELETE FROM seen RETURNING place, value", &[]).await.unwrap();
            let rows: Vec<(String, String)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
            assert_eq!(rows, [(place.to_owned(), kept.clone())], "{sql:?}");
        }
    }
}
