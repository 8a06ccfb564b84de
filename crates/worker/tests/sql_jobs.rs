//! SQL jobs as producers of the foreign layout write them, from their push to their record: forms, turns, limits, retries,
//! databases by name, capacity and wake-ups.

mod support;

use std::collections::HashMap;
use std::time::Duration;

use serde_json::json;

use queue_core::inspect::JobView;
use support::house::{DATABASE, Gate, House};
use support::*;
use testkit::state::Piece;
use testkit::{Scratch, eventually};
use worker::config::Config;
use worker::execute::sql::databases::{DatabaseSettings, PostgresSettings, SqliteSettings, TlsMode};

const TIMED_OUT: &str = "canceling statement due to statement timeout";

fn effect(what: &str) -> String {
    format!("INSERT INTO effects VALUES ('{what}')")
}

fn narrow(house: &House) -> Config {
    let mut config = house.config();
    config.capacity.default = 1.try_into().unwrap();
    config
}

fn statuses(view: &JobView) -> Vec<String> {
    let pair = |status: Option<String>, fallback: Option<String>| match fallback {
        Some(fallback) => format!("{} {fallback}", status.unwrap_or_default()),
        None => status.unwrap_or_default(),
    };
    view.statements().into_iter().map(|s| pair(s.status, s.fallback_status)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn all_forms_run_their_statements_in_order() {
    let house = House::build().await;
    let worker = Running::start(house.config());
    let (a, b, c) = (effect("a"), effect("b"), effect("c"));
    let bad = "SELECT 1/0";
    let json = |value: serde_json::Value| value.to_string();
    let fourth = |query: serde_json::Value| json(serde_json::json!({ "query": query, "onsuccess": b, "onerror": c }));
    // query, hash fields onsuccess and onerror, status, fallback_status, statements, effects
    let cases = [
        ("simple", a.clone(), false, "done", None, vec!["done"], "a"),
        ("multiple", json(serde_json::json!([a, b])), false, "done", None, vec!["done", "done"], "ab"),
        ("broken", json(serde_json::json!([a, bad, b])), false, "failed", None, vec!["done", "failed", "pending"], "a"),
        (
            "fallback",
            json(
                serde_json::json!({ "query": [{ "query": a, "onsuccess": b }, { "query": bad, "onerror": c }], "onerror": a }),
            ),
            false,
            "failed",
            Some("done"),
            vec!["done done", "failed done"],
            "abca",
        ),
        ("fourth", fourth(a.clone().into()), false, "done", Some("done"), vec!["done"], "ab"),
        ("fourth-bad", fourth(bad.into()), false, "failed", Some("done"), vec!["failed"], "c"),
        (
            "fourth-list",
            fourth(serde_json::json!([a, bad, b])),
            false,
            "failed",
            Some("done"),
            vec!["done", "failed", "skipped"],
            "ac",
        ),
        ("fields", a.clone(), true, "done", Some("done"), vec!["done"], "ab"),
        ("fields-bad", bad.to_owned(), true, "failed", Some("done"), vec!["failed"], "c"),
        (
            "fields-mixed",
            json(serde_json::json!([a, { "query": bad, "onerror": b }])),
            true,
            "failed",
            Some("done"),
            vec!["done", "failed done"],
            "abc",
        ),
    ];
    for (id, query, fields, status, fallback_status, statements, effects) in cases {
        house.postgres.query(DATABASE, "TRUNCATE effects").await;
        let mut job = house.job(id, &query);
        if fields {
            job = job.with("onsuccess", &b).with("onerror", &c);
        }
        job.push();
        let view = house.ended(id).await;
        assert_eq!(view.status(), status, "{id}: {:?}", view.text("failed_reason"));
        assert_eq!(view.text("fallback_status").as_deref(), fallback_status, "{id}");
        assert_eq!(statuses(&view), statements, "{id}");
        assert_eq!(house.all_effects().await.concat(), effects, "{id}");
    }
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_record_tells_when_it_ran_what_it_did_and_is_kept_for_two_hours() {
    let house = House::build().await;
    let worker = Running::start(house.config());
    let gate = house.gate().await;
    let first = format!("INSERT INTO effects SELECT 'a' FROM {}", Gate::PASS);
    let second = "DO $$ BEGIN RAISE NOTICE 'heard'; END $$; UPDATE effects SET what = 'b'";
    house.job("record", &serde_json::json!([first, second]).to_string()).push();
    house.executing("record", "4711").await;
    let view = house.running("record").await;
    assert_eq!(statuses(&view), ["running", "pending"]);
    assert!(view.text("started_at").is_some() && view.text("ended_at").is_none());
    let wip = || {
        let user = house.state().foreign().working("ann");
        (user, house.state().foreign().working_users())
    };
    assert_eq!(wip(), (vec!["record".to_owned()], vec!["ann".to_owned()]));
    let indexed = || house.state().queued_users();
    assert!(indexed().is_empty(), "nothing waits");
    house.job("behind", "SELECT 1").push();
    assert_eq!(indexed(), ["ann"]);
    gate.open().await;

    let view = house.ended("record").await;
    house.ended("behind").await;
    assert_eq!(view.status(), "done");
    let results = view.results().expect("JSON");
    assert_eq!(results["0"]["tag"], "INSERT 0 1");
    assert_eq!(results["1"], serde_json::json!({ "tag": "UPDATE 1", "notices": ["NOTICE: heard"] }));
    let time = |field: &str| view.time_ms(field).unwrap_or_else(|| panic!("no {field}"));
    assert!(time("started_at") <= time("ended_at"));
    assert!(view.text("ended_at").unwrap().ends_with('Z'));
    assert_eq!(house.field("record", "pass"), None);
    assert_eq!((wip(), indexed()), ((vec![], vec![]), vec![]));
    let left_ms = house.state().expires_in_ms(Piece::Job("record")).expect("it has an end");
    assert!((7_100_000..=7_200_000).contains(&left_ms), "{left_ms}");
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_chain_leaves_other_users_their_turn() {
    let house = House::build().await;
    let chain = |user: &str| {
        let statements: Vec<String> = (1..=4).map(|n| effect(&format!("{user}{n}"))).collect();
        serde_json::to_string(&statements).unwrap()
    };
    for user in ["ann", "bob", "cem"] {
        house.job(user, &chain(user)).of(user).push();
    }
    let worker = Running::start(narrow(&house));
    for user in ["ann", "bob", "cem"] {
        assert_eq!(house.ended(user).await.status(), "done");
    }
    // Everybody's n-th before anybody's next one.
    let effects = house.all_effects().await;
    let rounds: Vec<char> = effects.iter().filter_map(|what| what.chars().last()).collect();
    assert_eq!(rounds, "111222333444".chars().collect::<Vec<_>>(), "{effects:?}");
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn users_with_few_jobs_do_not_wait_for_one_with_many() {
    let house = House::build().await;
    for (user, count) in [("ann", 50), ("bob", 5), ("cem", 5)] {
        for n in 0..count {
            house.job(&format!("{user}-{n}"), &effect(user)).of(user).push();
        }
    }
    let mut config = house.config();
    config.capacity.default = 2.try_into().unwrap();
    let worker = Running::start(config);
    let mut runs: HashMap<&str, Vec<(u64, u64)>> = HashMap::new();
    for (user, count) in [("ann", 50), ("bob", 5), ("cem", 5)] {
        for n in 0..count {
            let id = format!("{user}-{n}");
            let view = house.ended(&id).await;
            assert_eq!(view.status(), "done", "{id}");
            let taken_us = house.field(&id, "fence").unwrap().parse().expect("the moment of the take");
            runs.entry(user).or_default().push((taken_us, 1000 * view.time_ms("ended_at").expect("it ended")));
        }
    }
    assert_eq!(house.all_effects().await.len(), 60);
    // From the end of one job of a small user to the take of its next, the big one gets at most its own turn and a tie. (Counted
    // so because a job may take long on a busy machine, and its user has no turn then.)
    for user in ["bob", "cem"] {
        for pair in runs[user].windows(2) {
            let waited = pair[0].1 + 1000..pair[1].0;
            let bigs = runs["ann"].iter().filter(|(taken, _)| waited.contains(taken)).count();
            assert!(bigs <= 2, "{user} waited for {bigs} jobs of ann: {runs:?}");
        }
    }
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn four_workers_never_exceed_a_capacity() {
    let house = House::build().await;
    // A place may be taken once; with three places a fourth statement finds none.
    let sql = "CREATE FUNCTION take_place() RETURNS int LANGUAGE plpgsql AS $$ BEGIN
                 FOR place IN 1..3 LOOP
                   IF pg_try_advisory_xact_lock(77, place) THEN PERFORM pg_sleep(0.01); RETURN place; END IF;
                 END LOOP;
                 RAISE 'over capacity';
               END $$";
    house.postgres.query(DATABASE, sql).await;
    let workers: Vec<Running> = (0..4)
        .map(|_| {
            let mut config = house.config();
            config.capacity.default = 3.try_into().unwrap();
            // None can use it all by itself.
            config.worker.slots = 2.try_into().unwrap();
            Running::start(config)
        })
        .collect();
    let ids: Vec<(String, String)> =
        (0..20).flat_map(|user| (0..5).map(move |n| (format!("{user}-{n}"), format!("user-{user}")))).collect();
    for (id, user) in &ids {
        house.job(id, "SELECT take_place()").of(user).push();
    }
    let mut by = std::collections::BTreeSet::new();
    for (id, _) in &ids {
        let view = house.ended(id).await;
        assert_eq!(view.text("failed_reason"), None);
        by.extend(view.text("worker"));
    }
    assert!(by.len() > 1, "they did race: {by:?}");
    for worker in workers {
        worker.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn statements_end_at_the_least_of_their_limits() {
    let house = House::build().await;
    let with_limit = |limit: Duration| {
        let mut config = house.config();
        config.sql.statement_timeout = limit;
        config.capacity.default = 16.try_into().unwrap();
        Running::start(config)
    };
    let sleep = "SELECT pg_sleep(600)";
    let entry = |timeout: u64| serde_json::json!({ "query": [{ "query": sleep, "timeout": timeout }] }).to_string();
    house.state().set(Piece::Limits("short"), &[("timeout", "100")]);
    house.state().set(Piece::Limits("long"), &[("timeout", "3600000")]);
    house.state().set(Piece::Limits("none"), &[("timeout", "0")]);
    // Each statement alone is within the limit, all of them together are not.
    let many = ["SELECT pg_sleep(0.5)"; 10].join("; ");
    let (hour, worker_limit) = (Duration::from_secs(3_600), Duration::from_secs(2));
    let short = Duration::from_millis(100);
    // Of no other limit one sees an end.
    let by_their_own = [
        ("of-user", "short", sleep.to_owned()),
        ("of-statement", "long", entry(100)),
        ("of-statement-over-user", "short", entry(3_600_000)),
    ];
    let by_the_workers = [
        ("global", "ann", sleep.to_owned()),
        ("of-user-zero", "none", sleep.to_owned()),
        ("of-statement-zero", "bob", entry(0)),
        ("of-statement-over-global", "cem", entry(3_600_000)),
        ("several", "dan", format!("{}; {many}", effect("several"))),
        ("several-bare", "eve", format!("COMMIT; {many}")),
    ];
    let end_by = async |limit: Duration, cases: &[(&str, &str, String)]| {
        for (id, user, query) in cases {
            house.job(id, query).of(user).push();
        }
        for (id, ..) in cases {
            let view = house.ended(id).await;
            let ended = (view.status(), view.text("failed_reason"));
            assert_eq!(ended, ("failed".to_owned(), Some(TIMED_OUT.to_owned())), "{id}");
            let ran = view.ran(0).expect("both times");
            assert!(ran + Duration::from_millis(20) >= limit, "{id}: {ran:?}");
        }
    };
    let patient = with_limit(hour);
    end_by(short, &by_their_own).await;
    patient.stop().await;
    let worker = with_limit(worker_limit);
    end_by(worker_limit, &by_the_workers).await;
    // A user's own limit stands for the worker's, also where it is longer.
    house.job("longer", "SELECT pg_sleep(2.2)").of("long").push();
    assert_eq!(house.ended("longer").await.status(), "done");
    assert_eq!((house.all_effects().await.len(), house.backends().await), (0, 0));
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_connection_properties_fail_the_job() {
    let house = House::build().await;
    let worker = Running::start(house.config());
    for field in ["host", "port", "dbname", "dbuser", "pass"] {
        house.job(field, "SELECT 1").without(field).push();
        let view = house.ended(field).await;
        assert_eq!(view.status(), "failed", "{field}");
        let reason = view.text("failed_reason").unwrap();
        assert_eq!(reason, format!("Batch Job DB misconfiguration: {field} is missing"));
    }
    // Its own fallback will not run either, and says so.
    let query = r#"{"query": ["SELECT 1"], "onerror": "SELECT 2"}"#;
    house.job("fallback", query).with("fallback_status", "pending").without("port").push();
    let view = house.ended("fallback").await;
    assert_eq!((view.status().as_str(), view.text("fallback_status").as_deref()), ("failed", Some("skipped")));
    assert_eq!(house.backends().await, 0);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_did_nothing_is_tried_again_and_only_as_often_as_is_said() {
    let house = House::build().await;
    let mut config = house.config();
    config.retry.delay = Duration::from_millis(20);
    let worker = Running::start(config);
    // A sequence counts although the transaction is rolled back.
    house.postgres.query(DATABASE, "CREATE SEQUENCE tries").await;
    let raise = |code: &str, until: u32| {
        format!(
            "{}; DO $$ BEGIN IF nextval('tries') < {until} THEN RAISE 'again' USING ERRCODE = '{code}'; END IF; END $$",
            effect(code)
        )
    };
    for (id, code, until, most, status, tries) in [
        ("by-default", "40001", 9, None, "failed", 1),
        ("serialization", "40001", 3, Some("5"), "done", 3),
        ("deadlock", "40P01", 3, Some("3"), "done", 3),
        ("in-vain", "40P01", 9, Some("2"), "ignored", 2),
        ("other", "23505", 9, Some("5"), "failed", 1),
    ] {
        house.postgres.query(DATABASE, "ALTER SEQUENCE tries RESTART; TRUNCATE effects").await;
        let mut job = house.job(id, &raise(code, until));
        if let Some(most) = most {
            job = job.with("max_attempts", most);
        }
        job.push();
        let view = house.ended(id).await;
        assert_eq!(view.status(), status, "{id}");
        assert_eq!(house.postgres.executed(id).await.len(), tries, "{id}");
        assert_eq!(house.all_effects().await.len(), usize::from(status == "done"), "{id}");
    }
    // Each statement of a chain has attempts of its own.
    house.postgres.query(DATABASE, "ALTER SEQUENCE tries RESTART").await;
    let every_other =
        "DO $$ BEGIN IF nextval('tries') % 2 = 1 THEN RAISE 'again' USING ERRCODE = '40001'; END IF; END $$";
    house.job("chain", &json!([every_other, every_other]).to_string()).with("max_attempts", "2").push();
    assert_eq!(house.ended("chain").await.status(), "done");
    assert_eq!(house.postgres.executed("chain").await.len(), 4);
    // Nobody listens: refused connections, three of them.
    house.job("refused", "SELECT 1").with("port", "1").with("max_attempts", "3").push();
    let view = house.ended("refused").await;
    assert_eq!((view.status().as_str(), view.text("attempts").as_deref()), ("ignored", Some("3")));
    // And one that is there when it is tried again.
    house.postgres.kill();
    house.job("patient", &effect("patient")).with("max_attempts", "1000").push();
    eventually("a first attempt", async || house.field("patient", "attempts")).await;
    house.postgres.restart();
    assert_eq!(house.ended("patient").await.status(), "done");
    assert_eq!(house.effects("patient").await, 1);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn databases_are_found_by_name_with_a_file_for_each_user() {
    let house = House::build().await;
    house.postgres.create_user("role_ann", "from the file").await;
    house.postgres.create_database("db_ann").await;
    let folder = Scratch::new("databases");
    let password_file = folder.path().join("password");
    std::fs::write(&password_file, "from the file\n").unwrap();
    let (host, port) = house.postgres.host_port();
    let postgres = PostgresSettings {
        host,
        port,
        dbname: "db_{user}".into(),
        user: "role_{user}".into(),
        password_file: Some(password_file),
        password_env: None,
        tls: TlsMode::Prefer,
        ca_file: None,
    };
    let path = |name: &str| folder.path().join(name).display().to_string();
    let sqlite = |path: String, create: bool| DatabaseSettings::Sqlite(SqliteSettings { path, create });
    let mut config = house.config();
    config.databases.insert("main".into(), DatabaseSettings::Postgres(postgres));
    config.databases.insert("files".into(), sqlite(path("{user}.db"), true));
    config.databases.insert("old".into(), sqlite(path("old-{user}.db"), false));
    let worker = Running::start(config);

    let who = "CREATE TABLE who AS SELECT current_user || '@' || current_database() AS name";
    house.job("main", who).on("main").push();
    assert_eq!(house.ended("main").await.text("failed_reason"), None);
    assert_eq!(house.postgres.query("db_ann", "SELECT name FROM who").await, [[Some("role_ann@db_ann".to_owned())]]);
    house.job("stranger", who).on("main").of("bob").push();
    let view = house.ended("stranger").await;
    assert_eq!(view.text("failed_reason").unwrap(), "password authentication failed for user \"role_bob\"");

    for user in ["ann", "bob"] {
        let query = serde_json::json!(["CREATE TABLE t(a)", format!("INSERT INTO t VALUES ('{user}')")]);
        house.job(&format!("file-{user}"), &query.to_string()).on("files").of(user).push();
        assert_eq!(house.ended(&format!("file-{user}")).await.text("failed_reason"), None);
        let file = rusqlite::Connection::open(folder.path().join(format!("{user}.db"))).unwrap();
        let found: String = file.query_row("SELECT a FROM t", [], |row| row.get(0)).unwrap();
        assert_eq!(found, user);
    }
    house.job("climbing", "SELECT 1").on("files").of("../ann").push();
    let reason = house.ended("climbing").await.text("failed_reason").unwrap();
    assert_eq!(reason, "the user's name can't be part of a file name");
    house.job("silent", "SELECT 1").on("old").push();
    assert_eq!(house.ended("silent").await.text("failed_reason").unwrap(), "unable to open database file");
    assert!(!folder.path().join("old-ann.db").exists());
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_is_heard_at_once_and_an_unheard_one_is_found() {
    let house = House::build().await;
    let mut config = house.config();
    config.worker.scan_interval = Duration::from_secs(3600);
    let deaf_to_time = Running::start(config);
    eventually("the leader", async || (house.state().has(Piece::Leader)).then_some(())).await;
    // The first passes of a new leader are scans; what is pushed after them is not found by one.
    eventually("the leader to listen", async || (house.state().foreign().hearers() > 0).then_some(())).await;
    house.goes_on("warm-up").await;
    for n in 0..5 {
        house.goes_on(&format!("heard-{n}")).await;
    }
    // The end of a job is the hint for the next one, whosoever it is.
    house.job("first", "SELECT 1").of("ann").push();
    assert_eq!(house.ended("first").await.status(), "done");
    deaf_to_time.stop().await;

    let worker = Running::start(house.config());
    house.goes_on("before").await;
    house.job("unheard", "SELECT 1").of("bob").push_quietly();
    assert_eq!(house.ended("unheard").await.status(), "done");
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_lost_worker_may_have_done_is_not_called_failed_because_nobody_could_ask() {
    let house = House::build().await;
    let mut config = house.config();
    config.retry.delay = Duration::from_millis(1);
    config.retry.delay_max = Duration::from_millis(1);
    let worker = Running::start(config);
    house.job("host", "SELECT 1").with("trace", "0 transaction 5").with("host", "192.0.2.1").push();
    house.job("database", "SELECT 1").with("trace", "0 transaction 5").with("dbname", "missing").of("bob").push();
    for id in ["host", "database"] {
        let view = house.ended(id).await;
        let reason = view.text("failed_reason").unwrap_or_default();
        assert_eq!(view.status(), "unknown", "{reason}");
        assert!(reason.starts_with("whether the lost worker's execution took effect could not be asked: "), "{reason}");
    }
    worker.stop().await;
}
