//! Statements for rows, run by workers that are killed: each row takes effect once, or not at all.

use std::time::Duration;

use queue_core::ids::User;
use queue_core::model::batch::RowStatus;
use queue_core::producer::Database;
use serde_json::Value;

use super::*;
use support::house::{DATABASE, House as SqlHouse};

#[tokio::test(flavor = "multi_thread")]
async fn rows_for_a_statement_take_effect_once_however_often_their_workers_are_killed() {
    let house = SqlHouse::build().await;
    let batches = Batches::new(house.store.clone(), Limits::default());
    house.postgres.query(DATABASE, "CREATE TABLE bookings (id int, pause text)").await;
    house.postgres.query(DATABASE, "CREATE UNIQUE INDEX ON bookings (id) WHERE id % 100 = 7").await;
    house.postgres.query(DATABASE, "INSERT INTO bookings VALUES (7), (107)").await;
    let (host, port) = house.postgres.host_port();
    let database =
        Database::Connection { host, port, dbname: DATABASE.into(), dbuser: "postgres".into(), pass: String::new() };
    let statement = "INSERT INTO bookings VALUES (:n::int, pg_sleep(0.001)::text) RETURNING id";
    let new = NewBatch { id: job_id("b1"), ..NewBatch::sql(User::new("ann").unwrap(), database, statement) };
    batches.submit(new, rows(1..=4_000)).await.unwrap();
    let done = async || batches.view(&job_id("b1")).await.unwrap().counts.done;
    // A leader that lives, and takes rows like the others.
    let settings = [("DRAYMAN_WORKER__MAX_UNCLEAN", "10")];
    let survivor = house.daemon(&settings);
    for share in [300, 1_000, 1_700, 2_400] {
        let victim = house.daemon(&settings);
        eventually("some rows", async || (done().await > share).then_some(())).await;
        victim.kill9();
    }
    let view = end_of("the batch ends", batches.wait(&job_id("b1"), None)).await.unwrap();
    assert_eq!((view.status, view.counts), (Status::Failed, counts(4_000, 3_998, 2, 0)));
    let effects = house.postgres.query(DATABASE, "SELECT count(*)::text, count(DISTINCT id)::text FROM bookings").await;
    assert_eq!(effects[0], [Some("4000".to_owned()), Some("4000".to_owned())], "each once");
    let mut after = None;
    let mut lines = 0;
    loop {
        let page = batches.rows(&job_id("b1"), Which::All, after, 1_000).await.unwrap();
        for row in &page.rows {
            lines += 1;
            assert_eq!(row.at.line, lines);
            let wanted = if [7, 107].contains(&lines) { RowStatus::Failed } else { RowStatus::Done };
            assert_eq!(row.status, wanted, "line {lines}");
            if wanted == RowStatus::Done {
                let result: Value = serde_json::from_slice(row.result.as_ref().unwrap()).unwrap();
                assert_eq!(result, json!({ "rows_affected": 1, "rows": [{ "id": lines }] }));
            }
        }
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    drop(survivor);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_for_a_database_that_is_far_away_go_there_many_at_a_time() {
    let house = SqlHouse::build().await;
    let batches = Batches::new(house.store.clone(), Limits::default());
    house.postgres.query(DATABASE, "CREATE TABLE bookings (id int, transaction bigint)").await;
    let far = testkit::Proxy::start(house.postgres.addr());
    far.delay(Duration::from_millis(20));
    let (host, port) = (house.postgres.host_port().0, far.addr().port());
    let database =
        Database::Connection { host, port, dbname: DATABASE.into(), dbuser: "postgres".into(), pass: String::new() };
    let new = NewBatch {
        id: job_id("b1"),
        ..NewBatch::sql(User::new("ann").unwrap(), database, "INSERT INTO bookings VALUES (:n::int, txid_current())")
    };
    batches.submit(new, rows(1..=6_000)).await.unwrap();
    let worker = house.daemon(&[]);
    let view = end_of("the batch ends", batches.wait(&job_id("b1"), None)).await.unwrap();
    assert_eq!((view.status, view.counts), (Status::Done, counts(6_000, 6_000, 0, 0)));
    let found = house.postgres.query(DATABASE, "SELECT count(*), count(DISTINCT transaction) FROM bookings").await;
    let [rows, transactions] = [0, 1].map(|column| found[0][column].as_ref().unwrap().parse::<u64>().unwrap());
    // The first ones have ten, as many at once as the worker has places; none is back to that or less.
    assert!(rows == 6_000 && transactions < 150, "{rows} rows in {transactions} transactions");
    drop(worker);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_for_a_statement_at_a_sqlite_file_end_each_for_itself() {
    let house = House::build().await;
    let path = house.redis.dir().join("shop.db");
    let shop = rusqlite::Connection::open(&path).unwrap();
    shop.execute_batch("CREATE TABLE bookings (id INTEGER PRIMARY KEY)").unwrap();
    let settings = format!("[databases.shop]\nkind = 'sqlite'\npath = '{}'\n", path.display());
    let file = house.redis.dir().join("worker.toml");
    std::fs::write(&file, settings).unwrap();
    let flags = ["--config", file.to_str().unwrap(), "--redis-url", &house.redis.url_db(DB)];
    let daemon = testkit::Daemon::spawn(testkit::bin("drayman-worker"), &flags, &[]);
    let database = Database::Named("shop".into());
    let statement = "INSERT INTO bookings VALUES (:n % 500)";
    let new = NewBatch { id: job_id("b1"), ..NewBatch::sql(User::new("ann").unwrap(), database, statement) };
    house.batches.submit(new, rows(1..=600)).await.unwrap();
    let view = house.over("b1").await;
    assert_eq!((view.status, view.counts), (Status::Failed, counts(600, 500, 100, 0)));
    let count: i64 = shop.query_row("SELECT count(*) FROM bookings", [], |row| row.get(0)).unwrap();
    assert_eq!(count, 500);
    drop(daemon);
}
