//! Chunks of rows for a statement, with their claims and notes in a real Redis: who takes a chunk after another knows what became of
//! its rows.

mod support;

use std::time::Duration;

use queue_core::Store;
use queue_core::calls::{Fields, Finished, Verdict};
use queue_core::ids::{PoolPattern, SessionId};
use queue_core::model::batch::{Row, RowEnd};
use queue_core::session::{Claim, Fairness, Service, Session};
use support::*;
use testkit::state::Piece;
use testkit::{Postgres, RedisServer};
use worker::attempt::sql_rows::{Facts, Ran, run};
use worker::execute::Target;
use worker::execute::rows::RowAnswer;
use worker::execute::sql::SqlExecutor;
use worker::execute::sql::databases::Databases;
use worker::execute::task::Wish;
use worker::stop::{Cause, Stop};

struct House {
    redis: RedisServer,
    postgres: Postgres,
    store: Store,
    session: Session,
    executor: SqlExecutor,
}

impl House {
    async fn build() -> Self {
        let (redis, postgres) = (RedisServer::start(), Postgres::start());
        postgres.query("postgres", "CREATE TABLE t(a int UNIQUE)").await;
        let store = store(&redis).await;
        let service = Service {
            pools: vec![PoolPattern::new("*").unwrap()],
            default_capacity: 4,
            capacities: Vec::new(),
            fairness: Fairness::Jobs,
        };
        let session = Session::open(store.clone(), SessionId::generate("test", 1), service, "test", 1).await.unwrap();
        let executor = SqlExecutor::new(Databases::default()).unwrap();
        // Any job of SQL does for a chunk: only its claim and its hash are looked at.
        let target = support::Target { postgres: &postgres, dbname: "postgres" };
        push(&redis, "chunk", "ann", "SELECT 1", &target);
        Self { redis, postgres, store, session, executor }
    }

    async fn take(&self) -> Claim {
        self.store.notice(&["ann".into()]).await.unwrap();
        let mut claims = self.session.take(10).await.unwrap().unwrap().claims;
        assert_eq!(claims.len(), 1, "{claims:?}");
        claims.remove(0)
    }

    /// What is left of a chunk whose worker was lost: its hash as it is, and nobody's claim.
    async fn lose(&self, claim: Claim) {
        let ended = claim.finish(Verdict::Back, Duration::ZERO, Fields::new(), false).await.unwrap();
        assert_eq!(ended, Finished::Ended);
    }

    fn set(&self, field: &str, value: &str) {
        self.redis.state(DB).set_field("chunk", field, value);
    }

    fn facts(&self, port: u16) -> Facts {
        let target = Target::Host {
            host: "127.0.0.1".into(),
            port,
            dbname: "postgres".into(),
            dbuser: "postgres".into(),
            pass: Vec::new(),
        };
        Facts {
            statement: "INSERT INTO t VALUES (:a)".into(),
            target,
            row_timeout: Duration::from_secs(20),
            session_lifetime: Duration::from_secs(2),
        }
    }

    async fn run(&self, claim: &Claim) -> Ran {
        let port = self.postgres.host_port().1;
        run(claim, &self.executor, self.facts(port), rows(), &Stop::default()).await
    }

    async fn run_without_database(&self, claim: &Claim) -> Ran {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        run(claim, &self.executor, self.facts(free), rows(), &Stop::default()).await
    }

    async fn effects(&self) -> usize {
        self.postgres.query("postgres", "SELECT a FROM t").await.len()
    }
}

/// The second has ended before, the third is a duplicate of the first.
fn rows() -> Vec<Option<Row>> {
    let row = |line, input: &str| Some(Row { line, input: input.into() });
    vec![row(3, r#"{"a": 1}"#), None, row(4, r#"{"a": 1}"#), row(5, r#"{"a": 2}"#)]
}

fn answers(ran: &Ran) -> &[Option<RowAnswer>] {
    let Ran::Answered(answers, _) = ran else { panic!("not answered: {ran:?}") };
    answers
}

fn ends(ran: &Ran) -> Vec<String> {
    let end = |answer: &Option<RowAnswer>| match answer {
        None => "-".to_owned(),
        Some(RowAnswer::Ended(result)) if result.end == RowEnd::Done => "done".to_owned(),
        Some(RowAnswer::Ended(result)) => result.messages[0].errcode.clone(),
        Some(RowAnswer::Failed(problem)) => panic!("{problem:?}"),
    };
    answers(ran).iter().map(end).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answers_of_a_chunk_whose_worker_was_lost_after_its_commit_are_those_of_its_transaction() {
    let house = House::build().await;
    let claim = house.take().await;
    let first = house.run(&claim).await;
    assert_eq!(ends(&first), ["done", "-", "23505", "done"]);
    house.lose(claim).await;
    let claim = house.take().await;
    assert_eq!(answers(&house.run(&claim).await), answers(&first));
    assert_eq!(house.effects().await, 2);

    // Were they lost, nobody would say that the rows had failed of something else.
    house.redis.state(DB).unset(Piece::Job("chunk"), "noted");
    assert_eq!(ends(&house.run(&claim).await), ["unknown", "-", "unknown", "unknown"]);
    assert_eq!(house.effects().await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_of_which_nothing_is_known_waits_until_the_database_can_be_asked_but_not_for_ever() {
    let house = House::build().await;
    let claim = house.take().await;
    // Nothing was begun before: an outage is a plain failure of all rows, to be tried again.
    let Ran::Failed(problem) = house.run_without_database(&claim).await else { panic!("it can't be asked") };
    assert_eq!(problem.wish, Wish::Retry { after: None });
    house.run(&claim).await;
    house.lose(claim).await;

    let claim = house.take().await;
    assert!(matches!(house.run_without_database(&claim).await, Ran::Unsettled(_)));
    house.set("attempts", "12");
    house.lose(claim).await;
    let claim = house.take().await;
    assert_eq!(ends(&house.run_without_database(&claim).await), ["unknown", "-", "unknown", "unknown"]);
    // It still could be asked.
    assert_eq!(ends(&house.run(&claim).await), ["done", "-", "23505", "done"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_that_is_told_to_stop_or_is_another_s_leaves_nothing_but_what_was_committed_is_told() {
    let house = House::build().await;
    let claim = house.take().await;
    let port = house.postgres.host_port().1;
    let stop = Stop::default();
    stop.ask(Cause::SetAside);
    assert_eq!(run(&claim, &house.executor, house.facts(port), rows(), &stop).await, Ran::Stopped);
    house.redis.state(DB).lose_claim("chunk");
    assert_eq!(house.run(&claim).await, Ran::ClaimLost);
    assert_eq!(house.effects().await, 0);

    let house = House::build().await;
    let claim = house.take().await;
    let first = house.run(&claim).await;
    house.lose(claim).await;
    let claim = house.take().await;
    let port = house.postgres.host_port().1;
    let again = run(&claim, &house.executor, house.facts(port), rows(), &stop).await;
    assert_eq!(answers(&again), answers(&first));
}
