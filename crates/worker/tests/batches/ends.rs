//! How batches end: aborts, files, and whom that is told.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use queue_core::model::batch::RowStatus;
use serde_json::Value;
use worker::execute::function::Context;

use super::*;

#[tokio::test]
async fn an_abort_is_told_to_rows_at_work_and_what_they_say_afterwards_changes_nothing() {
    let house = House::build().await;
    let (ears, late) = (Ears::default(), Arc::new(AtomicUsize::new(0)));
    let (hearing, saying) = (ears.clone(), late.clone());
    let handler = move |_: Value, context: Context| {
        let late = saying.clone();
        async move {
            let line = context.line().unwrap();
            if line > 60 {
                context.stop().cancelled().await;
                late.fetch_add(1, Ordering::SeqCst);
            }
            context.file("lines", line.to_string());
            Ok::<_, Problem>(())
        }
    };
    let told = move |end| hearing.hear(end);
    let worker = Running::start(house.worker().batch_handler("bank", "post", handler, told));
    house.submit("b1", "post", 1..=1_000).await;
    house.until("b1", "some rows done", |view| view.counts.done > 0).await;
    let view = house.batches.abort(&job_id("b1")).await.unwrap();
    assert_eq!(view.counts.rows, view.counts.done + view.counts.aborted, "{view:?}");
    let over = house.over("b1").await;
    assert_eq!((over.status, over.counts), (Status::Cancelled, view.counts));
    assert!(view.counts.done >= 10 && view.counts.aborted >= 940, "{view:?}");
    eventually("late answers", async || (late.load(Ordering::SeqCst) > 0).then_some(())).await;
    assert_eq!(ears.heard(1).await, [("b1".to_owned(), Status::Cancelled, view.counts)]);
    worker.stop().await;
    house.nothing_runs().await;
    // The rows that were done, and no others, are in the file; and it stays so, also if it is aborted again.
    let again = house.batches.abort(&job_id("b1")).await.unwrap();
    assert_eq!((again.status, again.counts), (Status::Cancelled, view.counts));
    let read = house.rows("b1").await;
    let done: String =
        read.iter().filter(|row| row.status == RowStatus::Done).map(|row| format!("{}\n", row.at.line)).collect();
    assert_eq!(read.iter().filter(|row| row.status == RowStatus::Aborted).count() as u64, view.counts.aborted);
    assert_eq!(done.lines().count() as u64, view.counts.done);
    assert_eq!(house.file("b1", "lines").await, done);
}

#[tokio::test]
async fn every_end_is_told_and_told_again_if_nobody_would_hear() {
    let house = House::build().await;
    let ears = Ears::default();
    let hearing = ears.clone();
    let handler = |_: Value, context: Context| async move {
        match context.line().unwrap() {
            2 => Err(Problem::fail("two")),
            3 => std::future::pending().await,
            _ => Ok(()),
        }
    };
    let told = move |end: BatchEnd| {
        // Once by an error, once by a panic.
        match end.attempt {
            1 => std::future::ready(Err(Problem::retry("not now").after(Duration::from_millis(10)))),
            2 => panic!("not now"),
            _ => hearing.hear(end),
        }
    };
    house.submit("done", "post", [1, 4]).await;
    house.submit("failed", "post", [1, 2]).await;
    house.submit("running", "post", [3]).await;
    house.submit("empty", "post", []).await;
    house.submit("pending", "post", [1]).await;
    let held = NewBatch { id: job_id("held"), held: true, ..house.batch("post") };
    house.batches.submit(held, rows([1])).await.unwrap();
    for batch in ["held", "pending"] {
        assert_eq!(house.batches.abort(&job_id(batch)).await.unwrap().status, Status::Cancelled);
    }
    // Over at once, whoever is there.
    assert_eq!(house.view("empty").await.status, Status::Done);
    let worker = Running::start(house.worker().batch_handler("bank", "post", handler, told));
    house.until("running", "begun", |view| view.status == Status::Running).await;
    house.batches.abort(&job_id("running")).await.unwrap();
    let ends: BTreeMap<String, (Status, Counts)> =
        ears.heard(6).await.into_iter().map(|(batch, status, counts)| (batch, (status, counts))).collect();
    let wanted = [
        ("done", Status::Done, counts(2, 2, 0, 0)),
        ("failed", Status::Failed, counts(2, 1, 1, 0)),
        ("running", Status::Cancelled, counts(1, 0, 0, 1)),
        ("empty", Status::Done, counts(0, 0, 0, 0)),
        ("pending", Status::Cancelled, counts(1, 0, 0, 1)),
        ("held", Status::Cancelled, counts(1, 0, 0, 1)),
    ];
    let wanted: BTreeMap<String, (Status, Counts)> =
        wanted.into_iter().map(|(batch, status, counts)| (batch.to_owned(), (status, counts))).collect();
    assert_eq!(ends, wanted);
    worker.stop().await;
    house.nothing_runs().await;
    assert_eq!(ears.heard(6).await.len(), 6, "each was heard once");
}

#[tokio::test]
async fn file_names_may_be_any_text_and_texts_are_trimmed_and_left_out_where_they_are_empty() {
    let house = House::build().await;
    let long = "n".repeat(255);
    let names = ["../../up", "/etc/passwd", "a/b", "tab\t and\n line", ".", &long].map(str::to_owned);
    let given = names.clone();
    let handler = move |_: Value, context: Context| {
        let names = given.clone();
        async move {
            let line = context.line().unwrap();
            match line {
                1..=6 => context.file(names[line as usize - 1].clone(), format!("\n  of {line}\t\n")),
                7 => context.file("nothing", ""),
                8 => context.file("blanks", " \n "),
                9 => context.file("n".repeat(256), "too long a name"),
                10 => {
                    context.file("a/b", "first");
                    context.file("a/b", "second");
                }
                _ => context.file("a/b", "twice on one line"),
            }
            Ok::<_, Problem>(())
        }
    };
    let worker = Running::start(house.worker().handler("bank", "post", handler));
    let mut lines: Vec<u64> = (1..=11).collect();
    lines.push(11);
    house.submit("b1", "post", lines).await;
    let view = house.over("b1").await;
    assert_eq!(
        (view.status, view.counts),
        (Status::Failed, counts(12, 11, 1, 0)),
        "the name that is too long fails its row"
    );
    let mut wanted: Vec<&str> = names.iter().map(String::as_str).chain(["blanks"]).collect();
    wanted.sort_unstable();
    assert_eq!(view.files.keys().collect::<Vec<_>>(), wanted, "a text of blanks makes a file, and no text none");
    assert_eq!(house.file("b1", "blanks").await, "");
    for (name, line) in names.iter().zip(1..) {
        let text = house.file("b1", name).await;
        match name.as_str() {
            "a/b" => assert!(
                text.starts_with("of 3\n") && text.ends_with("twice on one line\ntwice on one line\n"),
                "{text}"
            ),
            _ => assert_eq!(text, format!("of {line}\n")),
        }
    }
    // All of them lie in the place of the batch, under names that are none of theirs.
    let found = objects_of(&house);
    assert_eq!(found.len(), names.len() + 1, "{found:?}");
    assert!(found.iter().all(|path| path.contains("j-b1/batch-file-")), "{found:?}");
    worker.stop().await;
}

/// The files in the object store.
fn objects_of(house: &House) -> Vec<String> {
    fn walk(folder: &std::path::Path, files: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() { walk(&path, files) } else { files.push(path.display().to_string()) }
        }
    }
    let mut files = Vec::new();
    walk(&house.redis.dir().join("objects"), &mut files);
    files
}

#[tokio::test]
async fn files_that_can_not_be_stored_for_a_while_are_stored_later_once_and_leave_no_orphan() {
    let house = House::build().await;
    let objects = house.redis.dir().join("objects");
    std::fs::write(&objects, "in the way").unwrap();
    let ears = Ears::default();
    let hearing = ears.clone();
    let handler = |_: Value, context: Context| async move {
        context.file("lines", context.line().unwrap().to_string());
        Ok::<_, Problem>(())
    };
    let told = move |end| hearing.hear(end);
    let worker = Running::start(house.worker().batch_handler("bank", "post", handler, told));
    house.submit("b1", "post", 1..=300).await;
    let view = house.until("b1", "all rows done", |view| view.finishing).await;
    assert_eq!((view.status, view.counts), (Status::Running, counts(300, 300, 0, 0)));
    // It was tried, in vain.
    eventually("an attempt at the files", async || {
        house.redis.state(DB).field("b1:files", "attempts").filter(|attempts| attempts != "0")
    })
    .await;
    assert!(!house.view("b1").await.is_over());
    std::fs::remove_file(&objects).unwrap();
    let view = house.over("b1").await;
    assert_eq!((view.status, view.files.len()), (Status::Done, 1));
    let wanted: String = (1..=300).map(|line| format!("{line}\n")).collect();
    assert_eq!(house.file("b1", "lines").await, wanted);
    assert_eq!(objects_of(&house).len(), 1, "{:?}", objects_of(&house));
    assert_eq!(ears.heard(1).await.len(), 1);
    worker.stop().await;
    house.nothing_runs().await;
}
