//! The SQL executor's connections: TLS, Unix sockets, databases named in the configuration.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::cluster::Cluster;
use crate::support::{done, executor, failed, run, work};
use worker::execute::Target;
use worker::execute::sql::databases::{DatabaseSettings, Databases, PostgresSettings, SqlSettings, TlsMode};

fn settings(tls: TlsMode, ca_file: Option<PathBuf>) -> Databases {
    Databases { sql: SqlSettings { tls, ca_file, ..SqlSettings::default() }, ..Databases::default() }
}

fn target(host: &str, role: &str) -> Target {
    let cluster = Cluster::get();
    Target::Host {
        host: host.into(),
        port: cluster.port,
        dbname: "postgres".into(),
        dbuser: role.into(),
        pass: b"right".to_vec(),
    }
}

const USES_TLS: &str =
    "DO $$ BEGIN IF NOT (SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()) THEN RAISE 'no TLS'; END IF; END $$";

#[tokio::test]
async fn tls_is_used_and_verified_as_configured() {
    let cluster = Cluster::get();
    let client = cluster.client("postgres").await;
    // SCRAM binds to the channel over TLS.
    client.batch_execute("CREATE ROLE tlsonly LOGIN PASSWORD 'right'").await.unwrap();
    let ca = Some(cluster.folder().join("ca.crt"));
    for (mode, ca, host) in [
        (TlsMode::Prefer, None, "127.0.0.1"),
        (TlsMode::Require, None, "127.0.0.1"),
        (TlsMode::VerifyFull, ca.clone(), "localhost"),
    ] {
        let executor = executor(settings(mode, ca));
        done(run(&executor, work(target(host, "tlsonly"), USES_TLS)).await);
        // A cancel travels the same way.
        let mut sleeper = work(target(host, "tlsonly"), "SET statement_timeout = 0; SELECT pg_sleep(20)");
        sleeper.timeout = std::time::Duration::from_millis(100);
        let failure = failed(run(&executor, sleeper).await);
        assert_eq!(failure.message, "canceling statement due to statement timeout");
    }
    let failure = failed(
        run(&executor(settings(TlsMode::Disable, None)), work(target("127.0.0.1", "tlsonly"), "SELECT 1")).await,
    );
    assert_eq!(failure.sqlstate.as_deref(), Some("28000"));
    // A name that the certificate does not bear; an authority that did not sign it.
    for (ca, host) in [(ca, "127.0.0.1"), (Some(cluster.folder().join("other.crt")), "localhost")] {
        let executor = executor(settings(TlsMode::VerifyFull, ca));
        let failure = failed(run(&executor, work(target(host, "tlsonly"), "SELECT 1")).await);
        assert!(failure.message.contains("certificate") && !failure.retryable, "{failure:?}");
    }
}

#[tokio::test]
async fn a_server_without_tls_is_refused_where_tls_is_required() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let mut request = [0; 8];
            socket.read_exact(&mut request).await.unwrap();
            socket.write_all(b"N").await.unwrap();
        }
    });
    let target = match target("127.0.0.1", "postgres") {
        Target::Host { host, dbname, dbuser, pass, .. } => Target::Host { host, port, dbname, dbuser, pass },
        named => named,
    };
    let failure = failed(run(&executor(settings(TlsMode::Require, None)), work(target, "SELECT 1")).await);
    assert!(failure.message.contains("does not support TLS"), "{failure:?}");
}

#[tokio::test]
async fn sockets_are_served_when_listed() {
    let cluster = Cluster::get();
    let folder = cluster.socket_folder().await;
    let folder = folder.as_str();
    let sql = SqlSettings { allowed_hosts: vec![folder.into()], tls: TlsMode::Require, ..SqlSettings::default() };
    let executor = executor(Databases { sql, ..Databases::default() });
    done(run(&executor, work(target(folder, "postgres"), "SELECT 1")).await);
    failed(run(&executor, work(target("127.0.0.1", "postgres"), "SELECT 1")).await);
}

#[tokio::test]
async fn a_database_named_in_the_configuration_follows_the_user() {
    let cluster = Cluster::get();
    let client = cluster.client("postgres").await;
    client
        .batch_execute(
            "CREATE ROLE role_ann SUPERUSER LOGIN PASSWORD 'right'; CREATE ROLE reserved LOGIN PASSWORD 'other'",
        )
        .await
        .unwrap();
    client.batch_execute("CREATE DATABASE db_ann").await.unwrap();
    let password_file = cluster.folder().join("password");
    std::fs::write(&password_file, "other\n").unwrap();
    let postgres = |dbname: &str, user: &str, password_file| {
        DatabaseSettings::Postgres(PostgresSettings {
            host: "localhost".into(),
            port: cluster.port,
            dbname: dbname.into(),
            user: user.into(),
            password_file,
            password_env: None,
            tls: TlsMode::VerifyFull,
            ca_file: Some(cluster.folder().join("ca.crt")),
        })
    };
    let databases = BTreeMap::from([
        ("each".to_owned(), postgres("db_{user}", "role_{user}", None)),
        ("secret".to_owned(), postgres("postgres", "reserved", Some(password_file.clone()))),
    ]);
    let executor = executor(Databases { databases, ..Databases::default() });
    let check = "DO $$ BEGIN IF current_database() <> 'db_ann' OR current_user <> 'role_ann' THEN RAISE 'wrong'; END IF; END $$";
    done(run(&executor, work(Target::Named("each".into()), check)).await);
    done(run(&executor, work(Target::Named("secret".into()), "SELECT 1")).await);
    std::fs::write(&password_file, "hush-hush").unwrap();
    let failure = failed(run(&executor, work(Target::Named("secret".into()), "SELECT 1")).await);
    assert_eq!(failure.sqlstate.as_deref(), Some("28P01"));
    assert!(!failure.message.contains("hush-hush"));
    std::fs::remove_file(&password_file).unwrap();
    let failure = failed(run(&executor, work(Target::Named("secret".into()), "SELECT 1")).await);
    assert!(!failure.message.contains(password_file.to_str().unwrap()), "{failure:?}");
}
