//! Attempts: which errors allow another one, how it is waited for, what is kept of each, and what becomes of a job whose
//! attempts are used up or that keeps ending its workers. And the new run that an operator starts then.

mod support;

use std::time::Duration;

use queue_core::ids::Pool;
use queue_core::model::retry::RetryChoice;
use queue_core::retry::{Retried, Retrier};
use support::house::{DATABASE, House};
use support::*;
use testkit::eventually;
use testkit::state::Piece;

/// Raises an error for as long as `tries` has not been asked so many times. Sequences count in what is rolled back, too.
fn raise(code: &str, until: u32) -> String {
    format!("DO $$ BEGIN IF nextval('tries') < {until} THEN RAISE 'not yet' USING ERRCODE = '{code}'; END IF; END $$")
}

async fn house_with_tries() -> House {
    let house = House::build().await;
    house.postgres.query(DATABASE, "CREATE SEQUENCE tries").await;
    house
}

fn quick(house: &House) -> worker::config::Config {
    let mut config = house.config();
    config.retry.delay = Duration::from_millis(5);
    config
}

#[tokio::test(flavor = "multi_thread")]
async fn every_attempt_is_told_of_and_after_the_last_one_a_job_is_ignored_and_kept_for_longer() {
    let house = house_with_tries().await;
    let mut config = quick(&house);
    config.retention.ignored = Duration::from_secs(50_000);
    let worker = Running::start(config);
    house.job("in-vain", &raise("40001", 99)).with("max_attempts", "3").push();
    let view = house.ended("in-vain").await;
    assert_eq!((view.status().as_str(), view.text("failed_reason").as_deref()), ("ignored", Some("not yet")));
    let history = view.history();
    assert_eq!(history.len(), 3);
    let worker_name = view.text("worker").unwrap();
    for pair in history.windows(2) {
        assert!(pair[0].ended_at <= *pair[1].started_at.as_ref().unwrap(), "{history:?}");
    }
    for one in &history {
        let told = (one.step.as_deref(), one.worker.as_str(), one.error.as_str(), one.unclean);
        assert_eq!(told, (Some("0"), worker_name.as_str(), "not yet", false));
        assert!(*one.started_at.as_ref().unwrap() <= one.ended_at);
    }
    let left_ms = house.state().expires_in_ms(Piece::Job("in-vain")).expect("it has an end");
    assert!((49_000_000..=50_000_000).contains(&left_ms), "{left_ms}");

    // What succeeds in the end keeps its history, and nothing else of it.
    house.postgres.query(DATABASE, "ALTER SEQUENCE tries RESTART").await;
    house.job("at-last", &raise("40P01", 3)).with("max_attempts", "9").push();
    let view = house.ended("at-last").await;
    assert_eq!((view.status().as_str(), view.history().len(), view.text("failed_reason")), ("done", 2, None));

    // Its own fallback takes care of a failure: that is no job to be looked after by anybody else.
    house.postgres.query(DATABASE, "ALTER SEQUENCE tries RESTART").await;
    house
        .job("cared-for", &raise("40001", 99))
        .with("max_attempts", "2")
        .with("onerror", "INSERT INTO effects VALUES ('cared-for')")
        .push();
    let view = house.ended("cared-for").await;
    assert_eq!((view.status().as_str(), view.text("fallback_status").as_deref()), ("failed", Some("done")));
    assert_eq!(house.effects("cared-for").await, 1);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_errors_that_a_job_or_its_pool_names_allow_another_attempt_if_they_left_nothing() {
    let house = house_with_tries().await;
    let mut config = quick(&house);
    let choice = RetryChoice { max_attempts: 3.try_into().ok(), on: "22012".parse().ok(), ..RetryChoice::default() };
    config.retry.pools.insert(Pool::of_host(&house.postgres.host_port().0).unwrap(), choice);
    let worker = Running::start(config);
    for (id, code, fields, status, tries) in [
        ("of-the-pool", "22012", &[][..], "ignored", 3),
        ("of-the-job", "23505", &[("retry_on", "23 55P03")][..], "ignored", 3),
        ("nobodys", "23505", &[], "failed", 1),
        ("one-attempt", "22012", &[("max_attempts", "1")], "failed", 1),
        ("fixed", "22012", &[("backoff", "fixed"), ("retry_delay", "1"), ("max_attempts", "5")], "ignored", 5),
    ] {
        let mut job = house.job(id, &raise(code, 99));
        for (name, value) in fields {
            job = job.with(name, value);
        }
        job.push();
        let view = house.ended(id).await;
        assert_eq!((view.status().as_str(), house.postgres.executed(id).await.len()), (status, tries), "{id}");
    }
    // A procedure that commits on its way leaves what it committed: that error proves nothing.
    house
        .postgres
        .query(
            DATABASE,
            "CREATE PROCEDURE half() LANGUAGE plpgsql AS $$ BEGIN
               INSERT INTO effects VALUES ('half'); COMMIT; RAISE 'half' USING ERRCODE = '22012'; END $$",
        )
        .await;
    house.job("half", "CALL half()").push();
    assert_eq!((house.ended("half").await.status().as_str(), house.effects("half").await), ("failed", 1));
    house.job("idempotent", "CALL half()").with("idempotent", "1").push();
    assert_eq!((house.ended("idempotent").await.status().as_str(), house.effects("half").await), ("ignored", 4));

    for (field, value, reason) in [
        ("backoff", "linear", "backoff is neither fixed nor exponential"),
        ("retry_on", "23505;", "retry_on: \"23505;\" is neither a SQLSTATE of five characters nor a class of two"),
    ] {
        house.job(field, "SELECT 1").with(field, value).push();
        let view = house.ended(field).await;
        assert_eq!((view.status().as_str(), view.text("failed_reason").as_deref()), ("failed", Some(reason)));
    }
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_outcome_is_tried_again_only_of_an_idempotent_job() {
    let house = House::build().await;
    let worker = Running::start(quick(&house));
    // Its backend is ended while it runs outside of any transaction of ours.
    let bare = "COMMIT; SELECT pg_sleep(60) WHERE NOT EXISTS (SELECT FROM effects WHERE what = 'go')";
    for (id, idempotent) in [("once", "0"), ("idempotent", "1")] {
        house.job(id, bare).with("idempotent", idempotent).with("max_attempts", "2").push();
        house.executing(id, "pg_sleep").await;
        house.postgres.query(DATABASE, "INSERT INTO effects VALUES ('go')").await;
        let end = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '/* {id} */%'");
        house.postgres.query("postgres", &end).await;
        let view = house.ended(id).await;
        let expected = if idempotent == "1" { ("done", 1) } else { ("unknown", 1) };
        assert_eq!((view.status().as_str(), view.history().len()), expected, "{:?}", view.text("failed_reason"));
        house.postgres.query(DATABASE, "TRUNCATE effects").await;
    }
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_values_of_what_a_job_says_of_its_retries_harm_nobody() {
    let house = house_with_tries().await;
    let worker = Running::start(quick(&house));
    let junk = "x\n".repeat(32_700);
    for (id, fields, status) in [
        ("negative", &[("max_attempts", "-1"), ("retry_delay", "-1"), ("attempts", "-9")][..], "failed"),
        ("spent", &[("max_attempts", "3"), ("attempts", "9999999999999999")], "ignored"),
        ("junk", &[("max_attempts", "2"), ("history", junk.as_str()), ("lost_worker", "\u{0}\t")], "ignored"),
        ("late", &[("max_attempts", "3"), ("retry_delay", "1000000000000000")], "scheduled"),
        (
            "never",
            &[("max_attempts", "3"), ("retry_delay", "9999999999999999"), ("retry_delay_max", "9999999999999999")],
            "scheduled",
        ),
    ] {
        let mut job = house.job(id, &raise("40001", 99));
        for (name, value) in fields {
            job = job.with(name, value);
        }
        job.push();
        let reached = async || (house.field(id, "status").as_deref() == Some(status)).then_some(());
        eventually(id, reached).await;
    }
    house.job("after", "SELECT 1").push();
    assert_eq!(house.ended("after").await.status(), "done");
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_has_ended_too_many_workers_is_set_aside_and_what_it_did_is_told() {
    let house = House::build().await;
    let mut config = house.config();
    config.worker.max_unclean = 3.try_into().unwrap();
    let worker = Running::start(config);
    let killer = |id: &str, unclean: &str| {
        house
            .job(id, &format!("INSERT INTO effects VALUES ('{id}')"))
            .with("unclean", unclean)
            .with("lost_worker", "other:1:abc")
            .of(id)
    };
    killer("killer", "3").push();
    killer("suspect", "2").push();
    let query = r#"{"query": ["SELECT 1", "SELECT 2"], "onerror": "SELECT 3"}"#;
    killer("chain", "4").with("query", query).with("fallback_status", "pending").push();
    let view = house.ended("killer").await;
    let reason = "set aside: it ended 3 workers, the last one other:1:abc";
    assert_eq!((view.status().as_str(), view.text("failed_reason").as_deref()), ("ignored", Some(reason)));
    assert_eq!(house.effects("killer").await, 0);
    let view = house.ended("chain").await;
    assert_eq!((view.status().as_str(), view.text("fallback_status").as_deref()), ("ignored", Some("skipped")));
    assert_eq!(house.ended("suspect").await.status(), "done");
    assert_eq!(house.effects("suspect").await, 1);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ended_can_be_run_anew_from_where_it_failed_or_from_the_start() {
    let house = house_with_tries().await;
    let worker = Running::start(quick(&house));
    let retrier = Retrier::new(house.store.clone()).password(Some(String::new().into()));
    let retry = async |id: &str| retrier.retry(&[job_id(id)]).await.unwrap().remove(0);
    let insert = |what: &str| format!("INSERT INTO effects VALUES ('{what}')");
    let query = serde_json::json!([insert("first"), raise("23505", 2), insert("last")]).to_string();
    house.job("chain", &query).push();
    assert_eq!(house.ended("chain").await.status(), "failed");
    assert_eq!(house.all_effects().await, ["first"]);
    assert_eq!(retry("chain").await, Retried::Queued);
    let view = house.ended("chain").await;
    assert_eq!((view.status().as_str(), view.text("run").as_deref()), ("done", Some("2")));
    assert_eq!(house.all_effects().await, ["first", "last"]);
    assert_eq!(retry("chain").await, Retried::NothingFailed);
    let from_start = retrier.clone().from_start(true);
    assert_eq!(from_start.retry(&[job_id("chain")]).await.unwrap(), [Retried::Queued]);
    eventually("the third run", async || {
        let view = house.inspect.job("chain").await.unwrap().unwrap();
        (view.is_over() && view.text("run").as_deref() == Some("3")).then_some(())
    })
    .await;
    assert_eq!(house.all_effects().await, ["first", "last", "first", "last"]);
    assert_eq!(retry("nobody").await, Retried::NotFound);
    house.job("waits", "SELECT pg_sleep(60)").push();
    house.running("waits").await;
    assert_eq!(retry("waits").await, Retried::NotOver("running".into()));
    house.cancel("waits").await;
    assert_eq!(house.ended("waits").await.status(), "cancelled");
    // A password leaves the hash at the end of its job.
    let without = Retrier::new(house.store.clone());
    assert_eq!(without.retry(&[job_id("waits")]).await.unwrap(), [Retried::PasswordMissing]);
    worker.stop().await;
}
