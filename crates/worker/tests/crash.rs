//! Workers that die or stop at the worst moments: each statement is applied exactly once, never by two backends at a time, and
//! the record tells what happened.

mod support;

use std::time::Duration;

use queue_core::inspect::{Inspect, JobView};
use support::house::Gate;
use support::*;
use testkit::{Daemon, Postgres, Proxy, RedisServer, Signal, eventually};

const DATABASE: &str = "crash";
const AT_THE_GATE: &str = "wait_event_type = 'Lock' AND query LIKE '%pg_advisory%'";
const COMMITTING: &str = "wait_event_type = 'Lock' AND query = 'COMMIT'";

struct House {
    redis: RedisServer,
    postgres: Postgres,
    inspect: Inspect,
}

impl House {
    async fn build() -> Self {
        let redis = RedisServer::start();
        let postgres = Postgres::start();
        postgres.create_database(DATABASE).await;
        // `enter` fails when another transaction that entered has not ended: two backends of one job at a time.
        postgres
            .query(
                DATABASE,
                &format!(
                    "CREATE TABLE effects (what text);
                 CREATE FUNCTION enter(what text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
                   IF NOT pg_try_advisory_xact_lock(42) THEN RAISE 'two backends at a time'; END IF;
                   INSERT INTO effects VALUES (what);
                 END $$;
                 CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                   IF current_setting('crash.waits', true) = 'yes' THEN PERFORM {}; END IF; RETURN NULL;
                 END $$;
                 CREATE CONSTRAINT TRIGGER late AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED
                   FOR EACH ROW EXECUTE FUNCTION late()",
                    Gate::PASS
                ),
            )
            .await;
        let inspect = Inspect::new(store(&redis).await);
        Self { redis, postgres, inspect }
    }

    fn push(&self, id: &str, query: &str) {
        let target = Target { postgres: &self.postgres, dbname: DATABASE };
        push(&self.redis, id, "user", query, &target);
    }

    fn worker(&self) -> Daemon {
        daemon(&self.redis.url_db(DB), &[])
    }

    async fn effects(&self) -> usize {
        self.postgres.query(DATABASE, "SELECT what FROM effects").await.len()
    }

    /// Closed until it is opened: [`Gate::PASS`] in a statement waits for it.
    async fn gate(&self) -> Gate {
        Gate::shut(&self.postgres, DATABASE, 4711).await
    }

    /// Whether commits of what begins from now on wait for the gate.
    async fn commits_wait(&self, waits: bool) {
        let waits = if waits { "yes" } else { "no" };
        self.postgres.query("postgres", &format!("ALTER DATABASE {DATABASE} SET crash.waits = '{waits}'")).await;
    }

    /// Waits until a backend of ours does something.
    async fn backend_in(&self, condition: &str) {
        let sql = format!(
            "SELECT 1 FROM pg_stat_activity WHERE application_name LIKE 'drayman:%' AND state = 'active' AND {condition}"
        );
        eventually(&format!("a backend with {condition}"), async || {
            (!self.postgres.query("postgres", &sql).await.is_empty()).then_some(())
        })
        .await;
    }

    async fn assert_done_once(&self, id: &str) -> JobView {
        let view = ended(&self.inspect, id).await;
        assert_eq!(view.status(), "done", "{:?}", view.text("failed_reason"));
        assert_eq!(self.effects().await, 1);
        view
    }

    /// A stopped worker whose job `other` has ended notices when it is woken, and goes on as a new session.
    async fn wakes_and_goes_on(&self, sleeper: &Daemon, other: &Daemon) {
        sleeper.signal(Signal::SIGCONT);
        sleeper.wait_for_line("the session is lost");
        other.signal(Signal::SIGTERM);
        other.wait();
        self.push("next", "SELECT 1");
        assert_eq!(ended(&self.inspect, "next").await.status(), "done");
    }

    fn claims(&self) -> usize {
        self.redis.state(DB).running()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_before_its_commit_the_statement_runs_again_and_counts_once() {
    let house = House::build().await;
    let gate = house.gate().await;
    let first = house.worker();
    house.push("before-commit", &format!("SELECT enter('x'); SELECT {}", Gate::PASS));
    house.backend_in(AT_THE_GATE).await;
    first.kill9();
    let _second = house.worker();
    eventually("another execution", async || (house.postgres.executed("before-commit").await.len() == 2).then_some(()))
        .await;
    gate.open().await;
    let view = house.assert_done_once("before-commit").await;
    assert_eq!(view.text("unclean").as_deref(), Some("1"));
    assert_eq!(house.postgres.executed("before-commit").await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_during_its_commit_the_statement_counts_once() {
    let house = House::build().await;
    let gate = house.gate().await;
    house.commits_wait(true).await;
    let first = house.worker();
    house.push("during-commit", "SELECT enter('x')");
    house.backend_in(COMMITTING).await;
    first.kill9();
    house.commits_wait(false).await;
    let _second = house.worker();
    gate.open().await;
    house.assert_done_once("during-commit").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_right_after_its_commit_the_statement_is_recognised_and_not_run_again() {
    let house = House::build().await;
    let gate = house.gate().await;
    house.commits_wait(true).await;
    let proxy = Proxy::start(house.redis.addr());
    let first = daemon(&proxy.redis_url(DB), &[]);
    house.push("after-commit", "SELECT enter('x')");
    house.backend_in(COMMITTING).await;
    // From here on the worker can't record anything.
    proxy.refuse(true);
    proxy.cut();
    gate.open().await;
    eventually("the commit", async || (house.effects().await == 1).then_some(())).await;
    first.kill9();
    let _second = house.worker();
    house.assert_done_once("after-commit").await;
    assert_eq!(house.postgres.executed("after-commit").await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn stopped_for_longer_than_its_session_the_worker_loses_the_job_and_its_late_result_is_refused() {
    let house = House::build().await;
    let first = house.worker();
    first.wait_for_line("serving");
    let gate = house.gate().await;
    house.push("stopped", &format!("SELECT enter('x'); SELECT {}", Gate::PASS));
    house.backend_in(AT_THE_GATE).await;
    first.signal(Signal::SIGSTOP);
    gate.open().await;
    let second = house.worker();
    let view = house.assert_done_once("stopped").await;
    let winner = view.text("worker").expect("the record names the worker");
    house.wakes_and_goes_on(&first, &second).await;
    let view = house.assert_done_once("stopped").await;
    assert_eq!(view.text("worker"), Some(winner));
    assert_eq!(house.claims(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn stopped_before_its_statement_the_worker_finds_its_claim_gone_and_runs_nothing() {
    let house = House::build().await;
    let to_postgres = Proxy::start(house.postgres.addr());
    to_postgres.delay(Duration::from_secs(600));
    let first = house.worker();
    let (host, port) = (to_postgres.addr().ip().to_string(), to_postgres.addr().port().to_string());
    let fields = [
        ("user", "user"),
        ("status", "pending"),
        ("query", "SELECT enter('x')"),
        ("host", &host),
        ("port", &port),
        ("dbname", DATABASE),
        ("dbuser", "postgres"),
        ("pass", ""),
    ];
    let state = house.redis.state(DB);
    state.foreign().write("early", &fields);
    state.foreign().push("user", "early");
    state.foreign().index("user");
    running(&house.inspect, "early").await;
    eventually("the connection", async || (to_postgres.connections() > 0).then_some(())).await;
    first.signal(Signal::SIGSTOP);
    to_postgres.delay(Duration::ZERO);
    let second = house.worker();
    house.assert_done_once("early").await;
    house.wakes_and_goes_on(&first, &second).await;
    house.assert_done_once("early").await;
    assert_eq!(house.postgres.executed("early").await.len(), 1);
}

/// A server that crashes may give a transaction's id, as long as nothing of it was on disk, to another one.
#[tokio::test(flavor = "multi_thread")]
async fn another_transaction_that_got_its_id_after_a_crash_of_the_server_is_not_taken_for_it() {
    let house = House::build().await;
    house.postgres.query("postgres", "CHECKPOINT").await;
    let gate = house.gate().await;
    house.commits_wait(true).await;
    let worker = house.worker();
    house.push("crashed", "SELECT enter('x')");
    house.backend_in(COMMITTING).await;
    // It asks what became of its transaction only once another one has its id.
    worker.signal(Signal::SIGSTOP);
    house.postgres.restart();
    drop(gate);
    // Commits with the id that the crash set free.
    house.commits_wait(false).await;
    worker.signal(Signal::SIGCONT);
    let view = ended(&house.inspect, "crashed").await;
    let reason = view.text("failed_reason").unwrap_or_default();
    assert_eq!((view.status().as_str(), house.effects().await), ("unknown", 0), "{reason}");
}
