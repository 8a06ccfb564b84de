//! What must not be told: passwords nowhere, SQL texts and the data in them not in logs, whatever happens to a job and however
//! much is logged.

mod support;

use support::house::House;
use support::*;
use testkit::{Daemon, Postgres, Signal};

const PASSWORD: &str = "pazzw0rd-marker";
const SQL: &str = "sqlmarker";

/// Jobs that end in every way, all with both markers.
async fn run_jobs(house: &House) {
    let query = |sql: &str| format!("SELECT '{SQL}'; {sql}");
    let list = |entry: &str| format!(r#"{{"query": [{entry}], "onerror": "SELECT '{SQL}'"}}"#);
    let cases = [
        ("succeeds", query("SELECT 1"), "done"),
        ("notices", query(&format!("DO $$ BEGIN RAISE NOTICE '{SQL}'; END $$")), "done"),
        ("fails", query("SELECT 1/0"), "failed"),
        ("raises", query(&format!("DO $$ BEGIN RAISE '{SQL}'; END $$")), "failed"),
        ("syntax", format!("{SQL} 1"), "failed"),
        ("retries", query(&format!("DO $$ BEGIN RAISE '{SQL}' USING ERRCODE = '40001'; END $$")), "ignored"),
        ("list", format!(r#"["SELECT '{SQL}'", "{SQL}"]"#), "failed"),
        ("template", list(&format!(r#"{{"query": "{SQL}", "onerror": "SELECT '<%= error_message %>'"}}"#)), "failed"),
        ("json", format!(r#"{{"query": ["{SQL}"#), "failed"),
        ("copy", format!("COPY {SQL} FROM STDIN"), "failed"),
        ("bare", format!("COMMIT; SELECT '{SQL}'"), "done"),
        ("vacuum", format!("VACUUM {SQL}"), "failed"),
    ];
    for (id, query, end) in &cases {
        let retries = if *id == "retries" { "2" } else { "1" };
        house
            .job(id, query)
            .with("dbuser", "ann")
            .with("pass", PASSWORD)
            .with("max_attempts", retries)
            .with("onsuccess", format!("SELECT '{SQL}'"))
            .push();
        assert_eq!(house.ended(id).await.status(), *end, "{id}");
    }
    let odd = [
        ("times-out", house.job("times-out", &query("SELECT pg_sleep(600)")).with("timeout", "50")),
        ("wrong-password", house.job("wrong-password", &query("")).with("pass", format!("{PASSWORD}-wrong"))),
        ("no-host", house.job("no-host", &query("")).with("host", "192.0.2.1")),
        ("no-port", house.job("no-port", &query("")).with("port", "1").with("max_attempts", "2")),
        ("no-database", house.job("no-database", &query("")).with("dbname", "missing")),
        ("no-name", house.job("no-name", &query("")).without("dbname")),
    ];
    for (id, job) in odd {
        let job = if id == "wrong-password" { job } else { job.with("pass", PASSWORD) };
        job.with("dbuser", "ann").push();
        let end = if id == "no-port" { "ignored" } else { "failed" };
        assert_eq!(house.ended(id).await.status(), end, "{id}");
    }
    house.job("cancelled", &query("SELECT pg_sleep(600)")).with("dbuser", "ann").with("pass", PASSWORD).push();
    house.executing("cancelled", "pg_sleep").await;
    house.cancel("cancelled").await;
    assert_eq!(house.ended("cancelled").await.status(), "cancelled");
    // A password in a field that is too long is not repeated either.
    house.job("too-long", &query("")).with("pass", PASSWORD.repeat(1000)).push();
    assert_eq!(house.ended("too-long").await.status(), "failed");
}

fn tells_nothing(daemon: &Daemon) {
    let output = daemon.output();
    for marker in [PASSWORD, SQL] {
        let line = output.lines().find(|line| line.contains(marker));
        assert_eq!(line, None);
    }
}

async fn nothing_is_told(format: &str) {
    let house = House::build().await;
    house.postgres.create_user("ann", PASSWORD).await;
    let acl = ["ACL", "SETUSER", "worker", "on", &format!(">{PASSWORD}"), "~*", "&*", "+@all"];
    house.command(&acl);
    let url = house.redis.url_db(DB).replace("redis://", &format!("redis://worker:{PASSWORD}@"));
    let daemon = daemon(
        &url,
        &[("DRAYMAN_LOG__LEVEL", "trace"), ("DRAYMAN_LOG__FORMAT", format), ("DRAYMAN_RETRY__DELAY", "10ms")],
    );
    run_jobs(&house).await;
    daemon.signal(Signal::SIGTERM);
    daemon.wait();
    assert!(daemon.line("execution ended").is_some(), "it logs");
    assert!(daemon.line("it failed and will be tried again").is_some(), "it logs failures");
    tells_nothing(&daemon);

    // Nor is a password left in any record; SQL is, for those who may read it.
    for (key, text) in house.redis.dump_db(DB) {
        assert!(!text.contains(PASSWORD), "{key}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_of_text_tells_no_password_and_no_sql() {
    nothing_is_told("text").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_of_json_tells_no_password_and_no_sql() {
    nothing_is_told("json").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_connection_and_a_takeover_tell_nothing_either() {
    let house = House::build().await;
    house.postgres.create_user("ann", PASSWORD).await;
    let settings = [("DRAYMAN_LOG__LEVEL", "trace")];
    let first = house.daemon(&settings);
    let submit = |id: &str| {
        let query = format!("INSERT INTO effects VALUES ('{SQL}'); SELECT pg_sleep(600)");
        house.job(id, &query).with("dbuser", "ann").with("pass", PASSWORD).push();
    };
    house.postgres.query(support::house::DATABASE, "GRANT ALL ON effects TO ann").await;
    submit("broken");
    house.executing("broken", "pg_sleep").await;
    let ended = async |postgres: &Postgres| postgres.terminate_backends("drayman:").await;
    assert!(ended(&house.postgres).await > 0);
    assert_eq!(house.ended("broken").await.status(), "failed");
    submit("orphan");
    house.executing("orphan", "pg_sleep").await;
    first.kill9();
    let second = house.daemon(&settings);
    testkit::eventually("the takeover", async || (house.postgres.executed("orphan").await.len() == 2).then_some(()))
        .await;
    house.cancel("orphan").await;
    assert_eq!(house.ended("orphan").await.status(), "cancelled");
    tells_nothing(&first);
    tells_nothing(&second);
}
