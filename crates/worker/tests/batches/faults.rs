//! Workers that stop, are lost or are ended by their rows, and a Redis that is restarted.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use queue_core::model::batch::RowStatus;
use serde_json::Value;
use testkit::{Daemon, Scratch, bin};
use worker::execute::function::Context;

use super::*;

#[tokio::test]
async fn a_worker_that_stops_ends_the_row_that_it_is_at_and_leaves_the_others() {
    let house = House::build().await;
    let calls = Arc::<Mutex<Vec<u64>>>::default();
    let worker = || {
        let calls = calls.clone();
        Running::start(house.small_worker(1).handler("bank", "post", move |_: Value, context: Context| {
            calls.lock().unwrap().push(context.line().unwrap());
            async {
                tokio::time::sleep(Duration::from_millis(10)).await;
                Ok::<_, Problem>(())
            }
        }))
    };
    house.submit("b1", "post", 1..=300).await;
    for most in [60, 120, 180] {
        let worker = worker();
        eventually("some rows", async || (calls.lock().unwrap().len() > most).then_some(())).await;
        worker.stop().await;
        assert!(!house.view("b1").await.is_over());
    }
    let worker = worker();
    let view = house.over("b1").await;
    assert_eq!((view.status, view.counts), (Status::Done, counts(300, 300, 0, 0)));
    worker.stop().await;
    let mut calls = calls.lock().unwrap().clone();
    calls.sort_unstable();
    assert_eq!(calls, (1..=300).collect::<Vec<_>>(), "each row once");
    house.nothing_runs().await;
}

#[tokio::test]
async fn a_redis_that_is_restarted_with_its_log_loses_no_row_and_no_result() {
    let house = House::on(RedisServer::with_config(&[("appendonly", "yes"), ("appendfsync", "always")])).await;
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = calls.clone();
    let worker = Running::start(house.worker().handler("bank", "post", move |_: Value, context: Context| {
        counted.fetch_add(1, Ordering::SeqCst);
        async move {
            tokio::time::sleep(Duration::from_millis(1)).await;
            context.file("lines", context.line().unwrap().to_string());
            Ok::<_, Problem>(json!(context.line()))
        }
    }));
    house.submit("b1", "post", 1..=3_000).await;
    for share in [500, 1_500] {
        eventually("some rows", async || (calls.load(Ordering::SeqCst) > share).then_some(())).await;
        house.redis.kill();
        house.redis.restart();
    }
    let view = house.over("b1").await;
    assert_eq!((view.status, view.counts), (Status::Done, counts(3_000, 3_000, 0, 0)));
    let lines: String = (1..=3_000).map(|line| format!("{line}\n")).collect();
    assert_eq!(house.file("b1", "lines").await, lines);
    let read = house.rows("b1").await;
    assert!(read.iter().all(|row| row.result.as_deref() == Some(row.at.line.to_string().as_bytes())));
    worker.stop().await;
    house.nothing_runs().await;
}

/// A program that kills its worker, with -9, at the rows that it is asked to do that for.
const KILLER: &str = r#"
import json, os, signal, sys
for line in sys.stdin:
    call = json.loads(line)
    if call["type"] != "rows":
        continue
    for row in call["rows"]:
        if row["input"]["n"] in (7, 33):
            os.kill(os.getppid(), signal.SIGKILL)
    results = [{"result": row["input"]["n"]} for row in call["rows"]]
    print(json.dumps({"type": "rows", "id": call["id"], "results": results}), flush=True)
"#;

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_end_their_workers_are_found_and_fail_and_no_others() {
    let house = House::build().await;
    let folder = Scratch::new("killer");
    let (program, config) = (folder.path().join("killer.py"), folder.path().join("worker.toml"));
    std::fs::write(&program, KILLER).unwrap();
    let handler = format!(
        "[[handlers]]\napp = 'bank'\nop = 'post'\nkind = 'program'\ncommand = ['python3', '{}']\nrows = 100\n",
        program.display()
    );
    std::fs::write(&config, format!("[worker]\nmax_unclean = 2\nsession_lifetime = '2s'\n{handler}")).unwrap();
    let start = || {
        let flags = ["--config", config.to_str().unwrap(), "--redis-url", &house.redis.url_db(DB)];
        Daemon::spawn(bin("drayman-worker"), &flags, &[])
    };
    house.submit("b1", "post", 1..=100).await;
    // One that does not die keeps watch: somebody must see that the others are gone.
    let guard = Running::start(house.worker().handler("bank", "guard", |_: Value, _| async { Ok::<_, Problem>(()) }));
    let mut lives = 0;
    let mut daemon = start();
    eventually("the batch to be over", async || {
        if daemon.try_wait().is_some() {
            lives += 1;
            daemon = start();
        }
        house.view("b1").await.is_over().then_some(())
    })
    .await;
    let view = house.over("b1").await;
    assert_eq!((view.status, view.counts), (Status::Failed, counts(100, 98, 2, 0)), "{lives} workers were ended");
    let failed: BTreeSet<u64> =
        house.rows("b1").await.iter().filter(|row| row.status == RowStatus::Failed).map(|row| row.at.line).collect();
    assert_eq!(failed, BTreeSet::from([7, 33]));
    assert!((3..=6).contains(&lives), "{lives} workers were ended");
    drop(daemon);
    guard.stop().await;
}
