//! The database of exported records, as leaders that do not know of each other write to it.

use queue_core::ids::User;
use worker::execute::sql::chunk::Database;
use worker::execute::sql::databases::{DatabaseSettings, PostgresSettings, SqliteSettings, TlsMode};
use worker::execute::sql::history::{Cursor, History, Overtaken};

use crate::cluster::{Cluster, count};

const TABLES: &str = "CREATE TABLE IF NOT EXISTS told (what text)";

fn database(settings: DatabaseSettings) -> Database {
    Database::new(settings, &User::new("drayman").unwrap()).unwrap()
}

/// Both have read how far the feed is written before either went on: so a former leader stands that was asleep.
async fn check(database: &Database) {
    let (mut leader, begin) = History::open(database, TABLES).await.unwrap();
    let (mut former, same) = History::open(database, TABLES).await.unwrap();
    assert_eq!(same, begin);
    let first = Cursor { at: "1-0".into(), number: 1, dropped: 0 };
    let told = |what: &str| format!("INSERT INTO told VALUES ('{what}')");
    assert_eq!(leader.append(told("first"), &begin, &first).await, Ok(Ok(())));
    assert_eq!(former.append(told("first"), &begin, &first).await, Ok(Err(Overtaken)));
    // It looks how far the feed is written, and goes on from there as any other.
    let (mut former, at) = History::open(database, TABLES).await.unwrap();
    assert_eq!(at, first);
    let second = Cursor { at: "2-0".into(), number: 2, dropped: 0 };
    assert_eq!(former.append(told("second"), &first, &second).await, Ok(Ok(())));
    assert_eq!(leader.append(told("second"), &first, &second).await, Ok(Err(Overtaken)));
}

#[tokio::test]
async fn of_two_writers_at_one_place_one_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("history.db");
    check(&database(DatabaseSettings::Sqlite(SqliteSettings { path: path.display().to_string(), create: true }))).await;
    let sqlite = rusqlite::Connection::open(path).unwrap();
    let rows: i64 = sqlite.query_row("SELECT count(*) FROM told", [], |row| row.get(0)).unwrap();
    assert_eq!(rows, 2);

    let cluster = Cluster::get();
    let (name, client) = cluster.database().await;
    check(&database(DatabaseSettings::Postgres(PostgresSettings {
        host: cluster.socket_folder().await,
        port: cluster.port,
        dbname: name,
        user: "postgres".into(),
        password_file: None,
        password_env: None,
        tls: TlsMode::Disable,
        ca_file: None,
    })))
    .await;
    assert_eq!(count(&client, "SELECT count(*) FROM told").await, 2);
}
