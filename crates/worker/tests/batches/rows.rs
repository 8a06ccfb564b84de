//! What becomes of each row.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use queue_core::ids::User;
use queue_core::library::{BATCH_CUT, Version};
use queue_core::model::batch::RowStatus;
use queue_core::model::retry::{Backoff, RetryChoice};
use queue_core::model::task::{Message, Payload};
use queue_core::producer::{NewJob, Producer};
use serde_json::Value;
use worker::execute::function::{Application, Context};

use super::*;

#[tokio::test]
async fn every_row_is_worked_on_once_and_files_come_in_the_order_of_lines() {
    let house = House::build().await;
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = calls.clone();
    let worker = Running::start(house.worker().handler("bank", "post", move |input: Value, context: Context| {
        let calls = counted.clone();
        async move {
            calls.fetch_add(1, Ordering::SeqCst);
            let n = input["n"].as_u64().unwrap();
            context.file(if n.is_multiple_of(2) { "even" } else { "a/b odd*" }, format!("  line {n} "));
            if n % 100 == 7 { Err(Problem::fail("seven")) } else { Ok(json!({ "twice": 2 * n })) }
        }
    }));
    // Of several blocks, not in order, and with a line that comes twice.
    let mut lines: Vec<u64> = (1..=3_500).rev().collect();
    lines.push(12);
    house.submit("b1", "POST", lines.clone()).await;
    let view = house.over("b1").await;
    assert_eq!((view.status, view.counts), (Status::Failed, counts(3_501, 3_466, 35, 0)));
    assert_eq!(calls.load(Ordering::SeqCst), 3_501);
    let names: Vec<&String> = view.files.keys().collect();
    assert_eq!(names, ["a/b odd*", "even"]);
    let wanted: String = (1..=3_500)
        .filter(|n| n % 2 == 0)
        .flat_map(|n| std::iter::repeat_n(format!("line {n}\n"), if n == 12 { 2 } else { 1 }))
        .collect();
    assert_eq!(house.file("b1", "even").await, wanted);

    let read = house.rows("b1").await;
    lines.sort_unstable();
    assert_eq!(read.iter().map(|row| row.at.line).collect::<Vec<_>>(), lines);
    for row in &read {
        let n = row.at.line;
        let failed = n % 100 == 7;
        assert_eq!(row.status, if failed { RowStatus::Failed } else { RowStatus::Done });
        let result = row.result.as_ref().map(|result| serde_json::from_slice::<Value>(result).unwrap());
        assert_eq!(result, (!failed).then(|| json!({ "twice": 2 * n })));
    }
    let failed = house.batches.rows(&job_id("b1"), Which::Failed, None, 1_000).await.unwrap();
    assert_eq!((failed.rows.len(), failed.next), (35, None));
    assert_eq!(failed.rows[0].messages[0].vals, ["seven"]);
    worker.stop().await;
    house.nothing_runs().await;
}

#[tokio::test]
async fn each_row_ends_as_its_handler_says_and_is_tried_again_while_that_may_help() {
    let house = House::build().await;
    let tries: Arc<Mutex<Vec<(u64, u64)>>> = Arc::default();
    let (noted, ears) = (tries.clone(), Ears::default());
    let handler = move |_: Value, context: Context| {
        let tries = noted.clone();
        async move {
            let line = context.line().unwrap();
            tries.lock().unwrap().push((line, context.attempt()));
            match line {
                2 => Err(Problem::fail("two").with(Message {
                    msgid: 7,
                    errcode: "two".into(),
                    field: None,
                    vals: vec![],
                })),
                3 => panic!("three"),
                4 => std::future::pending().await,
                5 if context.attempt() == 1 => Err(Problem::retry("not yet")),
                6 => Err(Problem::ignore("a comment")),
                7 if context.is_last_attempt() => Ok(json!("at last")),
                7 => Err(Problem::retry("not yet").after(Duration::from_millis(20))),
                _ => Ok(json!(line)),
            }
        }
    };
    let hearing = ears.clone();
    let told = move |end| hearing.hear(end);
    let worker = Running::start(house.worker().batch_handler("bank", "post", handler, told));
    let retry = RetryChoice {
        max_attempts: Some(3.try_into().unwrap()),
        backoff: Some(Backoff::Fixed),
        delay: Some(Duration::from_millis(50)),
        ..RetryChoice::default()
    };
    let row_timeout = Some(Duration::from_millis(200));
    let new = NewBatch { id: job_id("b1"), retry, row_timeout, ..house.batch("post") };
    house.batches.submit(new, rows(1..=8)).await.unwrap();
    let view = house.over("b1").await;
    let wanted = Counts { skipped: 1, ..counts(8, 5, 3, 0) };
    assert_eq!((view.status, view.counts), (Status::Failed, wanted));
    let read = house.rows("b1").await;
    let statuses: Vec<RowStatus> = read.iter().map(|row| row.status).collect();
    use RowStatus::{Done, Failed, Skipped};
    assert_eq!(statuses, [Done, Failed, Failed, Failed, Done, Skipped, Done, Done]);
    assert_eq!(read[6].result.as_deref(), Some(&b"\"at last\""[..]));
    let messages = |row: usize| {
        read[row].messages.iter().map(|m| m.errcode.clone() + ": " + &m.vals.join(" ")).collect::<Vec<_>>()
    };
    assert_eq!(read[1].messages[0].msgid, 7, "{:?}", read[1].messages);
    assert!(messages(2).iter().any(|told| told.contains("three")), "{:?}", messages(2));
    assert!(messages(3).iter().any(|told| told.contains("longer than 200ms")), "{:?}", messages(3));
    let mut tries = tries.lock().unwrap().clone();
    tries.sort_unstable();
    let each = |line: u64| tries.iter().filter(|(at, _)| *at == line).map(|(_, attempt)| *attempt).collect::<Vec<_>>();
    assert_eq!((each(1), each(2), each(6)), (vec![1], vec![1], vec![1]), "neighbours are not tried again");
    assert_eq!((each(3), each(4), each(5), each(7)), (vec![1, 2, 3], vec![1, 2, 3], vec![1, 2], vec![1, 2, 3]));
    assert_eq!(ears.heard(1).await, [("b1".to_owned(), Status::Failed, wanted)]);
    worker.stop().await;
    house.nothing_runs().await;
}

#[tokio::test]
async fn many_workers_share_batches_and_each_row_is_worked_on_once() {
    let house = House::build().await;
    let (ears, calls) = (Ears::default(), Arc::<Mutex<Vec<(usize, String, u64)>>>::default());
    let busy = Arc::new([const { AtomicUsize::new(0) }; 2]);
    let mut workers = Vec::new();
    for number in 0..3 {
        let (hearing, calls, busy) = (ears.clone(), calls.clone(), busy.clone());
        let handler = move |_: Value, context: Context| {
            let (calls, busy) = (calls.clone(), busy.clone());
            async move {
                let now = busy[0].fetch_add(1, Ordering::SeqCst) + 1;
                busy[1].fetch_max(now, Ordering::SeqCst);
                calls.lock().unwrap().push((number, context.job().to_string(), context.line().unwrap()));
                // The work of a row.
                tokio::time::sleep(Duration::from_millis(3)).await;
                busy[0].fetch_sub(1, Ordering::SeqCst);
                Ok::<_, Problem>(())
            }
        };
        let told = move |end| hearing.hear(end);
        workers.push(Running::start(house.small_worker(2).batch_handler("bank", "post", handler, told)));
    }
    for batch in ["a", "b", "c"] {
        house.submit(batch, "post", 1..=200).await;
    }
    for batch in ["a", "b", "c"] {
        let view = house.over(batch).await;
        assert_eq!((view.status, view.counts), (Status::Done, counts(200, 200, 0, 0)));
    }
    let mut told = ears.heard(3).await;
    for worker in workers {
        worker.stop().await;
    }
    told.sort_by(|a, b| a.0.cmp(&b.0));
    let told: Vec<&str> = told.iter().map(|(batch, ..)| batch.as_str()).collect();
    assert_eq!(told, ["a", "b", "c"], "each end is told once");
    let mut calls = calls.lock().unwrap().clone();
    assert!((0..3).all(|number| calls.iter().any(|call| call.0 == number)), "each worker had a part");
    assert!(busy[1].load(Ordering::SeqCst) > 1, "they worked at the same time");
    calls.iter_mut().for_each(|call| call.0 = 0);
    calls.sort_unstable();
    let wanted: Vec<_> =
        ["a", "b", "c"].iter().flat_map(|batch| (1..=200).map(|line| (0, batch.to_string(), line))).collect();
    assert_eq!(calls, wanted);
    house.nothing_runs().await;
}

#[tokio::test]
async fn a_worker_without_the_handler_leaves_a_batch_to_one_that_has_it() {
    let house = House::build().await;
    let other = Running::start(house.worker().handler("bank", "other", |_: Value, _| async { Ok::<_, Problem>(()) }));
    house.submit("b1", "post", 1..=20).await;
    house.submit("o1", "other", 1..=20).await;
    assert_eq!(house.over("o1").await.status, Status::Done);
    assert_eq!(house.view("b1").await.status, Status::Pending);
    // Its application cannot be opened for a while, and that costs no row an attempt.
    let opened = AtomicUsize::new(0);
    let open = move || {
        let is_well = opened.fetch_add(1, Ordering::SeqCst) > 1;
        async move { if is_well { Ok(()) } else { Err(BoxError::from("not yet")) } }
    };
    let attempts = Arc::new(AtomicUsize::new(0));
    let noted = attempts.clone();
    let handler = move |_, _: Value, context: Context| {
        noted.fetch_max(context.attempt() as usize, Ordering::SeqCst);
        async { Ok::<_, Problem>(()) }
    };
    let bank = Application::sharing("bank", open).and_then(|bank| bank.handler("post", handler));
    let worker = Running::start(house.worker().app(bank));
    let view = house.over("b1").await;
    assert_eq!((view.status, view.counts), (Status::Done, counts(20, 20, 0, 0)));
    assert_eq!(attempts.load(Ordering::SeqCst), 1);
    worker.stop().await;
    other.stop().await;
}

#[tokio::test]
async fn a_single_job_behind_a_large_batch_is_next() {
    let house = House::build().await;
    // With a slot alone, it waits for the chunk that is at work.
    let handler = |_: Value, context: Context| async move {
        if context.line().is_some() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok::<_, Problem>(())
    };
    let worker = Running::start(house.small_worker(1).handler("bank", "post", handler));
    house.submit("large", "post", 1..=100_000).await;
    house.until("large", "some rows done", |view| view.counts.done > 0).await;
    let producer = Producer::new(store(&house.redis).await, Limits::default());
    for _ in 0..5 {
        let (app, op) = (App::new("bank").unwrap(), Op::new("post").unwrap());
        let job = NewJob::task(User::new("bob").unwrap(), app, op, Payload::json(&1).unwrap());
        let handle = producer.submit(job).await.unwrap();
        end_of("the task ends", handle.wait(None)).await.unwrap();
    }
    let view = house.view("large").await;
    assert!(!view.is_over(), "the batch is still at work: {:?}", view.counts);
    worker.stop().await;
}

#[tokio::test]
async fn rows_that_take_long_are_shared_with_whoever_is_free() {
    let house = House::build().await;
    let calls = Arc::<Mutex<Vec<(usize, u64)>>>::default();
    let shared = Arc::new(tokio::sync::Semaphore::new(0));
    let worker = |number: usize| {
        let (calls, shared) = (calls.clone(), shared.clone());
        let handler = move |_: Value, context: Context| {
            calls.lock().unwrap().push((number, context.line().unwrap()));
            // The row that the first worker is at takes until the other has rows too.
            if number == 1 {
                shared.add_permits(10);
            }
            let shared = shared.clone();
            async move {
                shared.acquire().await.expect("never closed").forget();
                Ok::<_, Problem>(())
            }
        };
        Running::start(house.small_worker(1).handler("bank", "post", handler))
    };
    // One worker has all ten rows in hand before the other is there.
    let first = worker(0);
    house.submit("b1", "post", 1..=10).await;
    house.until("b1", "begun", |view| view.status == Status::Running).await;
    let second = worker(1);
    let view = house.over("b1").await;
    assert_eq!((view.status, view.counts), (Status::Done, counts(10, 10, 0, 0)));
    let mut calls = calls.lock().unwrap().clone();
    assert!(calls.iter().any(|call| call.0 == 1), "{calls:?}");
    calls.sort_by_key(|call| call.1);
    assert_eq!(calls.iter().map(|call| call.1).collect::<Vec<_>>(), (1..=10).collect::<Vec<_>>(), "each once");
    first.stop().await;
    second.stop().await;
    house.nothing_runs().await;
}

#[tokio::test]
async fn an_id_that_is_given_to_another_batch_has_the_rows_and_the_context_of_that_one() {
    let house = House::build().await;
    let worker = Running::start(
        house.worker().handler("bank", "post", |input: Value, _: Context| async move { Ok::<_, Problem>(input) }),
    );
    for lines in [1..=3, 7..=8] {
        let new = NewBatch { id: job_id("b1"), keep: Some(Duration::from_millis(1)), ..house.batch("post") };
        let held = NewBatch { held: true, keep: Some(Duration::from_secs(600)), ..new.clone() };
        let new = if *lines.start() == 1 { new } else { held };
        house.batches.submit(new, rows(lines.clone())).await.unwrap();
        if *lines.start() == 7 {
            house.batches.release(&job_id("b1")).await.unwrap();
            house.over("b1").await;
            let read = house.rows("b1").await;
            assert!(read.iter().all(|row| row.result.as_ref() == Some(&row.input)), "{read:?}");
        } else {
            eventually("its record is gone", async || house.batches.view(&job_id("b1")).await.err()).await;
        }
    }
    worker.stop().await;
}

#[tokio::test]
async fn a_cut_whose_answer_is_lost_leaves_each_row_to_one_chunk() {
    let house = House::build().await;
    let proxy = testkit::Proxy::start(house.redis.addr());
    // Those of the first two calls: that of the cut after a second, and that of the one when the handler has stopped.
    let (lost, mut cuts) = (Arc::new(AtomicUsize::new(0)), 0);
    let seen = lost.clone();
    proxy.gate_calls(BATCH_CUT.qualified(Version::OURS), move || {
        cuts += 1;
        let lose = cuts <= 2;
        seen.fetch_add(usize::from(lose), Ordering::SeqCst);
        lose.then_some(testkit::Point::BeforeReply)
    });
    let mut config = config_of(&house.redis);
    config.worker.pools.clear();
    config.redis.url = Url::new(proxy.redis_url(DB));
    let calls = Arc::<Mutex<Vec<u64>>>::default();
    let called = calls.clone();
    let slow = Worker::builder().config(config).slots(1.try_into().unwrap()).handler(
        "bank",
        "post",
        move |_: Value, context: Context| {
            called.lock().unwrap().push(context.line().unwrap());
            async {
                tokio::time::sleep(Duration::from_millis(400)).await;
                Ok::<_, Problem>(())
            }
        },
    );
    house.submit("b1", "post", 1..=10).await;
    let worker = Running::start(slow);
    for count in [1, 2] {
        eventually("a cut", async || (lost.load(Ordering::SeqCst) >= count).then_some(())).await;
        proxy.cut();
    }
    let view = house.over("b1").await;
    assert_eq!(view.counts, counts(10, 10, 0, 0));
    let mut calls = calls.lock().unwrap().clone();
    calls.sort_unstable();
    assert_eq!(calls, (1..=10).collect::<Vec<_>>(), "each once");
    worker.stop().await;
    house.nothing_runs().await;
}
