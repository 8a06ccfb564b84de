//! Cancels of jobs that wait, run, end at the same moment, or have lost their worker: one of them wins, the record says
//! which, and no other job is hit.

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use queue_core::cancel::Cancelled;
use queue_core::inspect::JobView;
use support::house::{DATABASE, Gate, House};
use support::*;
use testkit::{Daemon, Proxy, Scratch, Signal, eventually};
use worker::execute::sql::databases::{DatabaseSettings, SqliteSettings};

const ENDLESS: &str = "SELECT pg_sleep(600)";

fn statements(view: &JobView) -> Vec<(String, Option<String>)> {
    view.statements().into_iter().map(|s| (s.status.unwrap_or_default(), s.fallback_status)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_job_is_cancelled_at_once_and_never_runs() {
    let house = House::build().await;
    house.job("waiting", "INSERT INTO effects VALUES ('waiting')").push();
    assert_eq!(house.cancel("waiting").await, Cancelled::AtOnce);
    assert_eq!(house.ended("waiting").await.status(), "cancelled");
    let worker = Running::start(house.config());
    house.job("next", "INSERT INTO effects VALUES ('next')").push();
    assert_eq!(house.ended("next").await.status(), "done");
    assert_eq!(house.ended("waiting").await.status(), "cancelled");
    assert_eq!(house.cancel("waiting").await, Cancelled::TooLate("cancelled".into()));
    assert_eq!(house.all_effects().await, ["next"]);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_statement_of_postgresql_stops_within_a_moment() {
    let house = House::build().await;
    let worker = Running::start(house.config());
    house.job("running", &format!("INSERT INTO effects VALUES ('running'); {ENDLESS}")).push();
    house.executing("running", "pg_sleep").await;
    assert_eq!(house.cancel("running").await, Cancelled::Requested);
    eventually("the backend to go", async || (house.backends().await == 0).then_some(())).await;
    let view = house.ended("running").await;
    assert_eq!((view.status().as_str(), view.text("failed_reason")), ("cancelled", None));
    assert!(view.text("ended_at").is_some() && view.text("cancel_requested_at").is_some());
    assert_eq!(house.effects("running").await, 0);
    assert_eq!(house.claims(), 0);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_statement_of_sqlite_stops_within_a_moment() {
    let house = House::build().await;
    let folder = Scratch::new("sqlite");
    let path = folder.path().join("{user}.db").display().to_string();
    let mut config = house.config();
    config.databases.insert("files".into(), DatabaseSettings::Sqlite(SqliteSettings { path, create: true }));
    let worker = Running::start(config);
    house.job("table", "CREATE TABLE t(a)").on("files").push();
    assert_eq!(house.ended("table").await.status(), "done");
    let endless = "INSERT INTO t VALUES (1); \
                   WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n";
    house.job("running", endless).on("files").push();
    house.running("running").await;
    let is_claimed = || house.state().claim("running").is_some();
    assert_eq!(house.cancel("running").await, Cancelled::Requested);
    eventually("the claim to end", async || (!is_claimed()).then_some(())).await;
    assert_eq!(house.ended("running").await.status(), "cancelled");
    let file = folder.path().join("ann.db");
    let rows: i64 =
        rusqlite::Connection::open(file).unwrap().query_row("SELECT count(*) FROM t", [], |row| row.get(0)).unwrap();
    assert_eq!(rows, 0);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_whose_message_is_lost_comes_with_the_heartbeat() {
    let house = House::build().await;
    let worker = Running::start(house.config());
    house.job("unheard", ENDLESS).push();
    let session = house.running("unheard").await.text("worker").expect("the record names the session");
    house.executing("unheard", "pg_sleep").await;
    // What the canceller writes, without what it says.
    house.state().ask_to_cancel_quietly(&session, "unheard");
    assert_eq!(house.ended("unheard").await.status(), "cancelled");
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_that_somebody_writes_into_the_hash_comes_with_the_heartbeat_and_stays() {
    let house = House::build().await;
    let worker = Running::start(house.config());
    let list = format!(
        r#"["INSERT INTO effects VALUES ('one')", "INSERT INTO effects VALUES ('two'); {ENDLESS}", "SELECT 3"]"#
    );
    house.job("written", &list).push();
    house.executing("written", "pg_sleep").await;
    house.state().set_field("written", "status", "cancelled");
    eventually("the claim to end", async || (house.claims() == 0).then_some(())).await;
    let view = house.ended("written").await;
    assert_eq!(view.status(), "cancelled");
    let statuses: Vec<String> = statements(&view).into_iter().map(|(status, _)| status).collect();
    assert_eq!(statuses, ["done", "cancelled", "pending"]);
    house.goes_on("next").await;
    assert_eq!(house.all_effects().await, ["one", "next"]);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_may_hear_no_message_works_and_cancels_all_the_same() {
    let house = House::build().await;
    let acl = ["ACL", "SETUSER", "deaf", "on", ">secret", "~*", "&*", "+@all", "-subscribe", "-psubscribe"];
    house.command(&acl);
    let mut config = house.config();
    config.redis.url = queue_core::config::Url::new(house.redis.url_db(DB).replace("redis://", "redis://deaf:secret@"));
    let worker = Running::start(config);
    house.job("deaf", ENDLESS).push();
    house.executing("deaf", "pg_sleep").await;
    assert_eq!(house.cancel("deaf").await, Cancelled::Requested);
    assert_eq!(house.ended("deaf").await.status(), "cancelled");
    house.goes_on("next").await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_outlives_the_worker_that_should_have_heard_it() {
    let house = House::build().await;
    let first = house.daemon(&[]);
    house.job("orphan", &format!("INSERT INTO effects VALUES ('orphan'); {ENDLESS}")).push();
    house.executing("orphan", "pg_sleep").await;
    first.signal(Signal::SIGSTOP);
    assert_eq!(house.cancel("orphan").await, Cancelled::Requested);
    first.kill9();
    let second = Running::start(house.config());
    let view = house.ended("orphan").await;
    assert_eq!((view.status().as_str(), view.text("unclean").as_deref()), ("cancelled", Some("1")));
    assert_eq!(house.effects("orphan").await, 0);
    assert_eq!(house.postgres.executed("orphan").await.len(), 1);
    house.goes_on("next").await;
    second.stop().await;
}

/// A daemon that has committed a job's first statement, that can't tell anybody, and that is about to be killed.
async fn committed_by_a_mute_daemon(house: &House, query: &str) -> Daemon {
    let proxy = Proxy::start(house.redis.addr());
    let daemon = daemon(&proxy.redis_url(DB), &[]);
    let gate = house.gate().await;
    house
        .postgres
        .query(
            DATABASE,
            &format!(
                "CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS
                   $$ BEGIN PERFORM {}; RETURN NULL; END $$;
                 CREATE CONSTRAINT TRIGGER late AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED
                   FOR EACH ROW EXECUTE FUNCTION late()",
                Gate::PASS
            ),
        )
        .await;
    house.job("committed", query).push();
    let committing = "SELECT 1 FROM pg_stat_activity WHERE query = 'COMMIT' AND wait_event_type = 'Lock'";
    eventually("the commit to wait", async || {
        (!house.postgres.query("postgres", committing).await.is_empty()).then_some(())
    })
    .await;
    proxy.refuse(true);
    proxy.cut();
    gate.open().await;
    eventually("the commit", async || (house.effects("committed").await == 1).then_some(())).await;
    daemon
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_that_comes_after_the_commit_of_a_lost_worker_is_too_late() {
    let house = House::build().await;
    let first = committed_by_a_mute_daemon(&house, "INSERT INTO effects VALUES ('committed')").await;
    assert_eq!(house.cancel("committed").await, Cancelled::Requested);
    first.kill9();
    let second = Running::start(house.config());
    assert_eq!(house.ended("committed").await.status(), "done");
    assert_eq!(house.effects("committed").await, 1);
    assert_eq!(house.postgres.executed("committed").await.len(), 1);
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn statements_tell_what_a_lost_worker_did_though_somebody_wrote_that_the_job_is_cancelled() {
    let house = House::build().await;
    let query = r#"["INSERT INTO effects VALUES ('committed')", "INSERT INTO effects VALUES ('two')"]"#;
    let first = committed_by_a_mute_daemon(&house, query).await;
    house.state().set_field("committed", "status", "cancelled");
    first.kill9();
    let second = Running::start(house.config());
    let view = eventually("what was done to be found out", async || {
        let view = house.ended("committed").await;
        view.text("ended_at").is_some().then_some(view)
    })
    .await;
    let statuses: Vec<String> = statements(&view).into_iter().map(|(status, _)| status).collect();
    assert_eq!((view.status().as_str(), statuses), ("cancelled", vec!["done".to_owned(), "cancelled".into()]));
    assert_eq!(house.all_effects().await, ["committed"]);
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_cancel_and_an_end_at_the_same_moment_one_wins_and_the_next_job_is_never_hit() {
    let house = House::build().await;
    let mut config = house.config();
    config.capacity.default = 16.try_into().unwrap();
    let worker = Running::start(config);
    let mut ends: BTreeMap<String, usize> = BTreeMap::new();
    let mut round: u64 = 0;
    // Until both have won often enough.
    while round < 20 || ["done", "cancelled"].iter().any(|end| ends.get(*end).is_none_or(|n| *n < 10)) {
        assert!(round < 200, "only one of them ever wins: {ends:?}");
        let race = async |user: u64| {
            let (first, next) = (format!("first-{round}-{user}"), format!("next-{round}-{user}"));
            // Both are queued at once, so that the second starts as the first ends.
            let effect = |id: &str| format!("INSERT INTO effects VALUES ('{id}'); SELECT pg_sleep(0.005)");
            house.job(&next, &effect(&next)).of(format!("user-{user}")).hash();
            house.job(&first, &effect(&first)).of(format!("user-{user}")).push_quietly();
            house.job(&next, &effect(&next)).of(format!("user-{user}")).push();
            // No waiting for a state: the moment is what is tried.
            tokio::time::sleep(Duration::from_millis((round * 4 + user) * 3 % 50)).await;
            house.cancel(&first).await;
            (house.ended(&first).await.status(), house.ended(&next).await.status(), first, next)
        };
        for (first_end, next_end, first, next) in futures::future::join_all((0..4).map(race)).await {
            assert_eq!((next_end.as_str(), house.effects(&next).await), ("done", 1), "{next}");
            assert_eq!(house.effects(&first).await, usize::from(first_end == "done"), "{first} ended {first_end}");
            *ends.entry(first_end).or_default() += 1;
        }
        round += 1;
    }
    assert_eq!(ends.keys().collect::<Vec<_>>(), ["cancelled", "done"]);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_canceller_that_finds_the_statement_by_its_comment_cancels_the_job() {
    let house = House::build().await;
    let worker = Running::start(house.config());
    for (id, query) in [
        ("simple", ENDLESS.to_owned()),
        ("bare", format!("COMMIT; {ENDLESS}")),
        ("listed", format!(r#"{{"query": [{{"query": "{ENDLESS}", "onerror": "SELECT 1"}}], "onerror": "SELECT 2"}}"#)),
    ] {
        house.job(id, &query).push();
        house.executing(id, "pg_sleep").await;
        let sql = format!("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE query LIKE '/* {id} */%'");
        assert_eq!(house.postgres.query("postgres", &sql).await, [[Some("t".to_owned())]], "{id}");
        let view = house.ended(id).await;
        assert_eq!((view.status().as_str(), view.text("failed_reason")), ("cancelled", None), "{id}");
        assert_eq!(house.postgres.executed(id).await.len(), 1, "{id}");
    }
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_of_several_statements_is_cancelled_between_them() {
    let house = House::build().await;
    let mut config = house.config();
    config.capacity.default = 1.try_into().unwrap();
    let worker = Running::start(config);
    let pass = format!("SELECT {}", Gate::PASS);
    let list = format!(r#"["{pass}", "SELECT 2", "SELECT 3"]"#);
    let fallbacks = format!(
        r#"{{"query": [{{"query": "{pass}", "onsuccess": "SELECT 2"}}, {{"query": "SELECT 3"}}], "onerror": "SELECT 4"}}"#
    );
    let pair = |main: &str, fallback: Option<&str>| (main.to_owned(), fallback.map(str::to_owned));
    for (id, query, expected) in [
        ("list", list, vec![pair("done", None), pair("cancelled", None), pair("pending", None)]),
        ("fallbacks", fallbacks, vec![pair("done", Some("cancelled")), pair("pending", None)]),
    ] {
        let gate = house.gate().await;
        house.job(id, &query).push();
        house.executing(id, "advisory").await;
        // The only place goes to the other user in between.
        let other = format!("{id}-other");
        house.job(&other, ENDLESS).of("bob").push();
        gate.open().await;
        house.executing(&other, "pg_sleep").await;
        assert_eq!(house.cancel(id).await, Cancelled::AtOnce, "{id}");
        let view = house.ended(id).await;
        assert_eq!(view.status(), "cancelled", "{id}");
        assert_eq!(statements(&view), expected, "{id}");
        assert_eq!(house.cancel(&other).await, Cancelled::Requested);
        assert_eq!(house.ended(&other).await.status(), "cancelled");
        house.goes_on(&format!("{id}-next")).await;
        assert_eq!(house.postgres.executed(id).await, [pass.as_str()], "{id}");
    }
    worker.stop().await;
}
