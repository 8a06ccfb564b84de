//! Batches without a worker: what a submitter may do and when, what a take deals, what an end counts, and that no order of all
//! these leaves a batch that nobody will ever end.

mod upkeep;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::time::Duration;

use queue_core::batch::work::{Pace, end_fields, partial_fields};
use queue_core::batch::{BatchError, BatchView, Batches, NewBatch, Release, RowView, Which};
use queue_core::calls::{Fields, Finished, Mark, Verdict};
use queue_core::cancel::{Cancelled, Canceller};
use queue_core::config::{ByteSize, Limits};
use queue_core::ids::{App, IdError, JobId, Op, Pool, SessionId, User};
use queue_core::leader::Leadership;
use queue_core::limits::{OfPool, OfUser, Whose};
use queue_core::model::Status;
use queue_core::model::batch::{Chunk, Counts, LINE_MAX, Part, Row, RowEnd, RowResult, RowStatus};
use queue_core::model::task::{Encoding, Payload};
use queue_core::producer::{NewJob, Producer, Submitted};
use queue_core::reconcile;
use queue_core::session::{Claim, Session};
use testkit::{Proxy, eventually};

use crate::support::*;

const POOL: &str = "bank.post";
const KEEP: Duration = Duration::from_secs(7_200);

fn batches(rig: &Rig) -> Batches {
    Batches::new(rig.store.clone(), Limits::default())
}

fn with_limits(rig: &Rig, rows: u64, row_bytes: u64, bytes: u64) -> Batches {
    let limits = Limits {
        max_batch_rows: rows.try_into().unwrap(),
        max_row_bytes: row_bytes.try_into().unwrap(),
        max_batch_bytes: ByteSize(bytes),
        ..Limits::default()
    };
    Batches::new(rig.store.clone(), limits)
}

fn job_id(id: &str) -> JobId {
    JobId::new(id).unwrap()
}

fn of(user: &str, id: &str) -> NewBatch {
    let batch = NewBatch::handler(User::new(user).unwrap(), App::new("bank").unwrap(), Op::new("post").unwrap());
    NewBatch { id: job_id(id), ..batch }
}

fn new(id: &str) -> NewBatch {
    of("ann", id)
}

fn held(id: &str) -> NewBatch {
    NewBatch { held: true, ..new(id) }
}

fn row(line: u64) -> Row {
    Row { line, input: format!("{{\"n\":{line}}}").into_bytes() }
}

fn rows(lines: impl IntoIterator<Item = u64>) -> Vec<Row> {
    lines.into_iter().map(row).collect()
}

fn counts(rows: u64, pending: u64, done: u64, failed: u64, aborted: u64) -> Counts {
    Counts { rows, pending, done, skipped: 0, failed, aborted }
}

async fn append(batches: &Batches, id: &str, lines: &[u64], release: bool) -> Result<u64, BatchError> {
    let mut loader = batches.append(&job_id(id), None, release).await?;
    for line in lines {
        loader.push(row(*line)).await?;
    }
    Ok(loader.finish().await?.rows)
}

async fn view(batches: &Batches, id: &str) -> BatchView {
    batches.view(&job_id(id)).await.unwrap()
}

/// The rows of a batch in pages of so many.
async fn read(batches: &Batches, id: &str, which: Which, most: usize) -> Vec<RowView> {
    let (mut read, mut after) = (Vec::new(), None);
    loop {
        let page = batches.rows(&job_id(id), which, after, most).await.unwrap();
        assert!(page.rows.len() <= most);
        assert!(page.next.is_none() || !page.rows.is_empty(), "a page with others behind it has rows");
        read.extend(page.rows);
        after = page.next;
        if after.is_none() {
            return read;
        }
    }
}

async fn statuses(batches: &Batches, id: &str) -> Vec<(u64, RowStatus)> {
    read(batches, id, Which::All, 7).await.into_iter().map(|row| (row.at.line, row.status)).collect()
}

fn part(claim: &Claim) -> Part {
    claim.job().text("part").unwrap().expect("a part of a batch").parse().unwrap()
}

fn chunk(claim: &Claim) -> Chunk {
    match part(claim) {
        Part::Rows(chunk) => chunk,
        other => panic!("no rows: {other:?}"),
    }
}

fn ended(ends: impl IntoIterator<Item = RowEnd>) -> Vec<Option<RowResult>> {
    ends.into_iter().map(|end| Some(RowResult::of(end))).collect()
}

fn part_verdict() -> Verdict {
    Verdict::Part { keep_ms: KEEP_MS }
}

/// Nobody says how long a row takes, so chunks have ten.
async fn end_rows(claim: Claim, results: &[Option<RowResult>]) -> Finished {
    claim.finish(part_verdict(), Duration::ZERO, end_fields(results), false).await.unwrap()
}

/// Ends all rows of a chunk in one way.
async fn all_ended(claim: Claim, end: RowEnd) -> Finished {
    let count = chunk(&claim).count;
    end_rows(claim, &ended(vec![end; count])).await
}

/// Ends what was told, as one who has heard.
async fn hear(claim: Claim) -> String {
    let Part::Done(batch) = part(&claim) else { panic!("no end of a batch: {:?}", part(&claim)) };
    assert_eq!(end(claim, "done").await, Finished::Ended);
    batch.to_string()
}

/// Takes and ends all there is, with every row done. The batches of which the end was heard.
async fn work_off(session: &Session) -> Vec<String> {
    let mut heard = Vec::new();
    loop {
        let claims = take(session, 8).await;
        if claims.is_empty() {
            return heard;
        }
        for claim in claims {
            match part(&claim) {
                Part::Rows(_) => assert_eq!(all_ended(claim, RowEnd::Done).await, Finished::Ended),
                Part::Files(_) => {
                    let fields = Fields::new().with("files", "{}");
                    assert_eq!(
                        claim.finish(part_verdict(), Duration::ZERO, fields, false).await.unwrap(),
                        Finished::Ended
                    );
                }
                Part::Done(_) => heard.push(hear(claim).await),
            }
        }
    }
}

/// Nothing of any batch is left but its record and what belongs to it.
fn nothing_is_left(rig: &Rig) {
    let state = rig.state();
    assert_eq!(state.batches_at_work(), [""; 0]);
    assert!(!state.is_any_waiting(), "{:?}", state.digest());
    for id in state.jobs() {
        assert!(state.expires_in_ms(Piece::Job(&id)).is_some(), "{id} stays for ever");
    }
}

#[tokio::test]
async fn a_submission_that_says_anything_wrong_is_refused_with_its_line_and_stores_nothing() {
    let rig = Rig::start().await;
    let small = with_limits(&rig, 3, 20, 200);
    let text = |line, input: &str| Row { line, input: input.into() };
    let at_line = |fault: BatchError| match fault {
        BatchError::Row { line, reason } => (line, reason),
        other => panic!("{other:?}"),
    };
    for (bad, reason) in [
        (text(0, "1"), "the number of a line is from 1 to 9007199254740991"),
        (text(u64::MAX, "1"), "the number of a line is from 1 to 9007199254740991"),
        (text(LINE_MAX + 1, "1"), "the number of a line is from 1 to 9007199254740991"),
        (text(5, "{\"n\":"), "it is no json: EOF while parsing a value at line 1 column 5"),
        (text(5, ""), "it is no json: EOF while parsing a value at line 1 column 0"),
        (text(5, "1 2"), "it is no json: trailing characters at line 1 column 3"),
        (text(5, "\"12345678901234567890\""), "it has 22 bytes, at most 20 are allowed"),
    ] {
        let line = bad.line;
        let fault = small.submit(new("b1"), vec![row(1), bad]).await.unwrap_err();
        assert_eq!(at_line(fault), (line, reason.to_owned()));
    }
    let fault = small.submit(new("b1"), rows(1..=4)).await.unwrap_err();
    assert!(matches!(&fault, BatchError::TooMany { what, most: 3 } if what == "rows"), "{fault:?}");
    let bytes = with_limits(&rig, 1_000, 20, 200);
    let fault = bytes.submit(new("b1"), rows(1..=40)).await.unwrap_err();
    assert!(matches!(&fault, BatchError::TooMany { what, most: 200 } if what == "bytes"), "{fault:?}");
    let msgpack = NewBatch { encoding: Encoding::MsgPack, ..new("b1") };
    assert_eq!(at_line(small.submit(msgpack.clone(), vec![text(2, "12")]).await.unwrap_err()).0, 2);
    for wrong in [
        NewBatch { context: Some(Payload::msgpack(&1).unwrap()), ..new("b1") },
        NewBatch { context: Some(Payload { encoding: Encoding::Json, bytes: b"{".to_vec() }), ..new("b1") },
        NewBatch { context: Some(Payload::json(&"x".repeat(1 << 19)).unwrap()), ..new("b1") },
        NewBatch { tags: vec!["a,b".into()], ..new("b1") },
        NewBatch { source: Some("x".repeat(2_000)), ..new("b1") },
        NewBatch { id: job_id(&"x".repeat(91)), ..new("b1") },
    ] {
        let fault = small.submit(wrong.clone(), rows(1..=2)).await.unwrap_err();
        assert!(matches!(fault, BatchError::Invalid(_)), "{wrong:?}: {fault:?}");
    }
    assert_eq!(rig.dump(), BTreeMap::new(), "nothing was stored");
    assert!(small.submit(new("b1"), vec![text(LINE_MAX, "1"), text(1, "[]")]).await.is_ok());
    assert_eq!(statuses(&small, "b1").await, [(1, RowStatus::Pending), (LINE_MAX, RowStatus::Pending)]);
}

#[tokio::test]
async fn a_load_that_goes_wrong_after_some_of_it_was_stored_leaves_nothing() {
    let rig = Rig::start().await;
    let batches = with_limits(&rig, 1_000, 60_000, 2_000_000);
    // A block each, so that several calls leave before the end.
    let big = |line| Row { line, input: format!("\"{}\"", "x".repeat(59_000)).into_bytes() };
    let mut loader = batches.open(new("b1")).unwrap();
    for line in 1..=20 {
        loader.push(big(line)).await.unwrap();
    }
    assert_eq!(rig.status("b1"), "held", "some of it has left");
    rig.balanced();
    assert!(loader.push(row(0)).await.is_err());
    assert_eq!(rig.dump(), BTreeMap::new());

    // One that is dropped, and taken up again by the same submission.
    let mut loader = batches.open(new("b2")).unwrap();
    for line in 1..=20 {
        loader.push(big(line)).await.unwrap();
    }
    drop(loader);
    let loaded = batches.submit(new("b2"), (1..=25).map(big).collect()).await.unwrap();
    assert_eq!((loaded.rows, loaded.before), (25, None));
    assert_eq!(view(&batches, "b2").await.counts, counts(25, 25, 0, 0, 0));
    rig.balanced();

    // Others' rows under the same id are not mixed with these.
    let mut loader = batches.open(new("b3")).unwrap();
    for line in 1..=20 {
        loader.push(big(line)).await.unwrap();
    }
    let fault = batches.submit(new("b3"), (2..=22).map(big).collect()).await.unwrap_err();
    assert!(matches!(fault, BatchError::Differs), "{fault:?}");
    for line in 21..=25 {
        // Its rows may be gone: then it hears of it, and nothing of it stays.
        if loader.push(big(line)).await.is_err() {
            break;
        }
    }
    drop(loader);
    rig.balanced();
    batches.abort(&job_id("b3")).await.ok();

    // An append that goes wrong leaves the batch as it was, an append beside it too.
    batches.submit(held("b4"), rows(1..=3)).await.unwrap();
    let before = view(&batches, "b4").await;
    let (mut one, mut two) = (
        batches.append(&job_id("b4"), None, false).await.unwrap(),
        batches.append(&job_id("b4"), None, false).await.unwrap(),
    );
    for line in 10..30 {
        one.push(big(line)).await.unwrap();
        two.push(big(line + 100)).await.unwrap();
    }
    assert_eq!(view(&batches, "b4").await, before, "what is not complete does not count");
    assert_eq!(statuses(&batches, "b4").await.len(), 3);
    one.give_up().await;
    assert_eq!(two.finish().await.unwrap().rows, 23);
    let fault = append(&batches, "b4", &[40, 0, 41], true).await.unwrap_err();
    assert!(matches!(fault, BatchError::Row { line: 0, .. }), "{fault:?}");
    assert_eq!(statuses(&batches, "b4").await.len(), 23, "none of an append with a bad line");
    assert_eq!(view(&batches, "b4").await.status, Status::Held);
    rig.balanced();
}

#[tokio::test]
async fn too_many_over_several_appends_are_refused_and_the_batch_stays_as_it_was() {
    let rig = Rig::start().await;
    let batches = with_limits(&rig, 5, 100, 10_000);
    batches.submit(held("b1"), rows(1..=3)).await.unwrap();
    let fault = append(&batches, "b1", &[4, 5, 6], true).await.unwrap_err();
    assert!(matches!(&fault, BatchError::TooMany { what, most: 5 } if what == "rows"), "{fault:?}");
    assert_eq!(view(&batches, "b1").await.counts, counts(3, 3, 0, 0, 0));
    assert_eq!(append(&batches, "b1", &[4, 5], false).await.unwrap(), 5);
    rig.balanced();
    // Two appends that each fit, and together do not: the one that ends first has the room.
    batches.submit(held("b2"), rows(1..=3)).await.unwrap();
    let open = async || batches.append(&job_id("b2"), None, false).await.unwrap();
    let (mut one, mut two) = (open().await, open().await);
    for line in [4, 5] {
        one.push(row(line)).await.unwrap();
        two.push(row(line)).await.unwrap();
    }
    assert_eq!(two.finish().await.unwrap().rows, 5);
    assert!(matches!(one.finish().await, Err(BatchError::TooMany { .. })));
    assert_eq!(view(&batches, "b2").await.counts, counts(5, 5, 0, 0, 0));
    rig.balanced();
}

#[tokio::test]
async fn a_batch_without_rows_is_over_at_once_and_its_end_is_told() {
    let rig = Rig::start().await;
    let (batches, session) = (batches(&rig), rig.session(POOL, 8).await);
    batches.submit(new("b1"), Vec::new()).await.unwrap();
    assert_eq!((view(&batches, "b1").await.status, rig.status("b1")), (Status::Done, "done".into()));
    batches.submit(held("b2"), Vec::new()).await.unwrap();
    assert_eq!(view(&batches, "b2").await.status, Status::Held);
    assert_eq!(batches.release(&job_id("b2")).await.unwrap(), Release { rows: 0, before: None });
    assert_eq!(view(&batches, "b2").await.status, Status::Done);
    batches.submit(held("b3"), Vec::new()).await.unwrap();
    assert_eq!(batches.abort(&job_id("b3")).await.unwrap().status, Status::Cancelled);
    assert!(read(&batches, "b1", Which::All, 10).await.is_empty());
    rig.balanced();
    let mut heard = work_off(&session).await;
    heard.sort();
    assert_eq!(heard, ["b1", "b2", "b3"]);
    nothing_is_left(&rig);
}

#[tokio::test]
async fn an_operation_is_found_in_whatever_case_it_was_written() {
    let rig = Rig::start().await;
    let (batches, session) = (batches(&rig), rig.session(POOL, 8).await);
    let op = Op::new("PoSt").unwrap();
    let mixed = NewBatch::handler(User::new("ann").unwrap(), App::new("bank").unwrap(), op);
    let loaded = batches.submit(mixed, rows(1..=2)).await.unwrap();
    assert_eq!(batches.view(&loaded.id).await.unwrap().op.as_deref(), Some("post"));
    assert_eq!(work_off(&session).await, [loaded.id.to_string()]);
    // No separator is lost between the two names.
    let other = rig.session("ban.kpost", 8).await;
    batches.submit(new("b1"), rows(1..=2)).await.unwrap();
    assert!(take(&other, 8).await.is_empty());
}

#[tokio::test]
async fn held_rows_wait_for_the_release_and_appended_ones_join_them() {
    let rig = Rig::start().await;
    let (batches, session) = (batches(&rig), rig.session(POOL, 8).await);
    assert_eq!(batches.submit(held("b1"), rows(1..=3)).await.unwrap().rows, 3);
    assert_eq!(append(&batches, "b1", &[5, 4], false).await.unwrap(), 5);
    assert!(take(&session, 8).await.is_empty());
    rig.balanced();
    assert_eq!(append(&batches, "b1", &[9, 3], true).await.unwrap(), 7);
    assert_eq!(view(&batches, "b1").await.status, Status::Pending);
    let fault = append(&batches, "b1", &[10], false).await.unwrap_err();
    assert!(matches!(fault, BatchError::NotHeld(Status::Pending)), "{fault:?}");
    rig.balanced();
    assert_eq!(work_off(&session).await, ["b1"]);
    let fault = append(&batches, "b1", &[10], false).await.unwrap_err();
    assert!(matches!(fault, BatchError::NotHeld(Status::Done)), "{fault:?}");
    assert_eq!(view(&batches, "b1").await.counts, counts(7, 0, 7, 0, 0));
    let lines: Vec<u64> = statuses(&batches, "b1").await.into_iter().map(|(line, _)| line).collect();
    assert_eq!(lines, [1, 2, 3, 3, 4, 5, 9]);
    rig.balanced();
}

#[tokio::test]
async fn a_load_with_a_key_joins_once_however_often_it_is_handed_over() {
    let rig = Rig::start().await;
    let batches = batches(&rig);
    let load = async |key: &str, lines: &[u64], release: bool| {
        let mut loader = batches.append(&job_id("b1"), Some(key), release).await?;
        for line in lines {
            loader.push(row(*line)).await?;
        }
        loader.finish().await
    };
    batches.submit(held("b1"), rows([1])).await.unwrap();
    assert_eq!(load("monday", &[2, 3], false).await.unwrap().rows, 3);
    let again = load("monday", &[2, 3], false).await.unwrap();
    assert_eq!((again.rows, again.before), (3, Some(Status::Held)));
    assert_eq!(load("tuesday", &[4], true).await.unwrap().rows, 4);
    // The answer of the last one was lost: the same again is no error, though the batch is not held any more.
    let again = load("tuesday", &[4], true).await.unwrap();
    assert_eq!((again.rows, again.before), (4, Some(Status::Pending)));
    let fault = load("wednesday", &[5], true).await.unwrap_err();
    assert!(matches!(fault, BatchError::NotHeld(Status::Pending)), "{fault:?}");
    assert!(matches!(load("", &[5], true).await, Err(BatchError::Invalid(_))));
    assert_eq!(statuses(&batches, "b1").await.len(), 4);
    rig.balanced();
}

#[tokio::test]
async fn the_same_submission_again_changes_nothing_and_an_id_belongs_to_one_user_and_kind() {
    let rig = Rig::start().await;
    let batches = batches(&rig);
    batches.submit(new("b1"), rows(1..=3)).await.unwrap();
    let before = rig.dump();
    let again = batches.submit(new("b1"), rows(1..=3)).await.unwrap();
    assert_eq!((again.rows, again.before), (3, Some(Status::Pending)));
    let fault = batches.submit(of("bob", "b1"), rows(1..=3)).await.unwrap_err();
    assert!(matches!(&fault, BatchError::Refused(reason) if reason.contains("another user")), "{fault:?}");
    let producer = Producer::new(rig.store.clone(), Limits::default());
    let task = |id| {
        let input = Payload::json(&1).unwrap();
        let task = NewJob::task(User::new("ann").unwrap(), App::new("bank").unwrap(), Op::new("post").unwrap(), input);
        NewJob { id: job_id(id), ..task }
    };
    assert!(matches!(producer.enqueue(task("b1")).await, Ok(Submitted::AlreadyThere(_))));
    assert_eq!(rig.dump(), before);
    producer.enqueue(task("t1")).await.unwrap();
    let fault = batches.submit(new("t1"), rows(1..=3)).await.unwrap_err();
    assert!(matches!(&fault, BatchError::Refused(reason) if reason.contains("another kind")), "{fault:?}");
    assert_eq!(rig.hash("t1")["kind"], "task");
    // A key of the caller's names the same batch for whoever repeats it, and another one for other users and operations.
    let keyed = |user| of(user, "any").keyed("file 7").id;
    assert_eq!(keyed("ann"), keyed("ann"));
    assert_ne!(keyed("ann"), keyed("bob"));
    rig.balanced();
}

#[tokio::test]
async fn a_release_does_its_work_once_and_is_refused_where_there_is_none() {
    let rig = Rig::start().await;
    let (batches, session) = (batches(&rig), rig.session(POOL, 8).await);
    let b1 = job_id("b1");
    assert!(matches!(batches.release(&b1).await, Err(BatchError::NotFound(_))));
    assert!(matches!(JobId::new("no id"), Err(IdError { .. })));
    batches.submit(held("b1"), rows(1..=3)).await.unwrap();
    assert_eq!(batches.release(&b1).await.unwrap(), Release { rows: 3, before: None });
    assert_eq!(batches.release(&b1).await.unwrap(), Release { rows: 3, before: Some(Status::Pending) });
    rig.balanced();
    let claim = take_one(&session).await;
    assert_eq!(batches.release(&b1).await.unwrap().before, Some(Status::Running));
    put(claim, Verdict::Back).await;
    work_off(&session).await;
    assert!(matches!(batches.release(&b1).await, Err(BatchError::Over(Status::Done))));
    batches.submit(held("b2"), rows(1..=3)).await.unwrap();
    batches.abort(&job_id("b2")).await.unwrap();
    assert!(matches!(batches.release(&job_id("b2")).await, Err(BatchError::Over(Status::Cancelled))));
    // A task is no batch.
    rig.submit("ann", "s1", "h");
    assert!(matches!(batches.release(&job_id("s1")).await, Err(BatchError::NotFound(_))));
    assert!(matches!(batches.abort(&job_id("s1")).await, Err(BatchError::NotFound(_))));
    assert!(matches!(batches.view(&job_id("s1")).await, Err(BatchError::NotFound(_))));
    rig.balanced();
}

#[tokio::test]
async fn an_abort_in_any_state_leaves_counts_that_are_the_rows_and_its_end_is_told() {
    let rig = Rig::start().await;
    let (batches, session) = (batches(&rig), rig.session(POOL, 1).await);
    let abort = async |id: &str| batches.abort(&job_id(id)).await.unwrap();
    assert!(matches!(batches.abort(&job_id("b0")).await, Err(BatchError::NotFound(_))));

    batches.submit(held("held"), rows(1..=30)).await.unwrap();
    let view = abort("held").await;
    assert_eq!((view.status, view.counts), (Status::Cancelled, counts(30, 0, 0, 0, 30)));
    assert_eq!(hear(take_one(&session).await).await, "held");

    batches.submit(new("pending"), rows(1..=30)).await.unwrap();
    let view = abort("pending").await;
    assert_eq!((view.status, view.counts), (Status::Cancelled, counts(30, 0, 0, 0, 30)));
    assert_eq!(hear(take_one(&session).await).await, "pending");
    rig.balanced();

    // Rows that have ended, rows at work, rows given back, and rows that nobody has had yet.
    batches.submit(new("running"), rows(1..=60)).await.unwrap();
    let mut first = take_one(&session).await;
    while chunk(&first).count < 3 {
        all_ended(first, RowEnd::Done).await;
        first = take_one(&session).await;
    }
    let ended_before = self::view(&batches, "running").await.counts.done;
    let count = chunk(&first).count as u64;
    let mut results = ended(vec![RowEnd::Done; count as usize]);
    results[0] = Some(RowResult::of(RowEnd::Failed));
    end_rows(first, &results).await;
    let (at_work, back) = (take_one(&session).await, take_one(&session).await);
    put(back, Verdict::Back).await;
    rig.balanced();
    let view = abort("running").await;
    let left = 60 - ended_before - count;
    let wanted = counts(60, 0, ended_before + count - 1, 1, left);
    assert_eq!((view.status, view.counts), (Status::Cancelled, wanted), "aborted outranks failed");
    rig.balanced();
    assert_eq!(rig.state().asked_to_cancel(session.id().as_str()), [id(&at_work)], "its worker is told");
    // What comes late does not count.
    assert_eq!(all_ended(at_work, RowEnd::Done).await, Finished::Ended);
    assert_eq!(abort("running").await, view, "again, it changes nothing");
    let all = statuses(&batches, "running").await;
    let of = |status| all.iter().filter(|(_, own)| *own == status).count() as u64;
    assert_eq!((of(RowStatus::Aborted), of(RowStatus::Failed)), (left, 1));
    assert_eq!(work_off(&session).await, ["running"]);
    rig.balanced();

    // One that is over stays as it is.
    batches.submit(new("over"), rows(1..=3)).await.unwrap();
    assert_eq!(work_off(&session).await, ["over"]);
    let view = abort("over").await;
    assert_eq!((view.status, view.counts), (Status::Done, counts(3, 0, 3, 0, 0)));
    // By the way of jobs, through a chunk's id as well as its own.
    batches.submit(new("job"), rows(1..=60)).await.unwrap();
    let claim = take_one(&session).await;
    let canceller = Canceller::new(rig.store.clone(), KEEP);
    assert_eq!(canceller.cancel(&claim.job().id).await.unwrap(), Cancelled::AtOnce);
    assert_eq!(self::view(&batches, "job").await.counts, counts(60, 0, 0, 0, 60));
    drop(claim);
    session.close().await.unwrap();
    let session = rig.session(POOL, 8).await;
    assert_eq!(work_off(&session).await, ["job"]);
    rig.balanced();
    nothing_is_left(&rig);
}

/// Takes a chunk of at least so many rows: chunks grow when it is known how fast rows are.
async fn take_rows(session: &Session, least: usize) -> Claim {
    loop {
        let claim = take_one(session).await;
        if chunk(&claim).count >= least {
            return claim;
        }
        assert_eq!(all_ended(claim, RowEnd::Done).await, Finished::Ended);
    }
}

#[tokio::test]
async fn a_chunk_has_as_many_rows_as_take_a_while_by_themselves_however_long_it_waited() {
    let rig = Rig::start().await;
    let (batches, session) = (batches(&rig), rig.session(POOL, 1).await);
    const MILLI: Duration = Duration::from_millis(1);
    batches.submit(new("b1"), rows(1..=9_000)).await.unwrap();
    // How many rows the next chunk has after this one: its rows took so long each, it cost so much besides, and was out for a minute.
    let after = async |row: Duration, fixed: Duration| {
        let claim = take_one(&session).await;
        let count = chunk(&claim).count;
        let pace = Pace::of(row * count as u32, count, fixed).unwrap();
        let fields = pace.with(end_fields(&ended(vec![RowEnd::Done; count])));
        assert_eq!(claim.finish(part_verdict(), 60_000 * MILLI, fields, false).await.unwrap(), Finished::Ended);
        let next = take_one(&session).await;
        let count = chunk(&next).count;
        next.finish(Verdict::Next, Duration::ZERO, Fields::new(), false).await.unwrap();
        count
    };
    assert_eq!(after(MILLI, Duration::ZERO).await, 50, "50 ms");
    assert_eq!(after(MILLI, 40 * MILLI).await, 50, "which pays for what a chunk costs");
    let settled = async |row, fixed| {
        let mut count = 0;
        for _ in 0..12 {
            count = after(row, fixed).await;
        }
        count
    };
    // What earlier chunks said counts for less each time.
    let so_many = |found: usize, expected: usize| assert!(found.abs_diff(expected) <= 1, "{found} for {expected}");
    // As long as the rest of it, but a quarter of a second at most.
    so_many(settled(MILLI, 120 * MILLI).await, 120);
    so_many(settled(2 * MILLI, 3_000 * MILLI).await, 125);
    assert_eq!(settled(10_000 * MILLI, Duration::ZERO).await, 1);
    let back = settled(MILLI, Duration::ZERO).await;
    so_many(back, 49);
    // A chunk of which nobody says how long it took changes nothing.
    all_ended(take_one(&session).await, RowEnd::Done).await;
    assert_eq!(chunk(&take_one(&session).await).count, back);
}

/// Some rows of a chunk have ended, the others are to be tried later.
async fn later(claim: Claim, ends: &[Option<RowEnd>]) {
    let chunk = chunk(&claim);
    let results: Vec<_> = ends.iter().map(|end| end.map(RowResult::of)).collect();
    assert_eq!(results.len(), chunk.count);
    let fields = partial_fields(&chunk, &results).with("attempts", "1").with("status", "scheduled");
    let finished = claim.finish(Verdict::Later { after_ms: 3_600_000 }, Duration::ZERO, fields, false).await.unwrap();
    assert_eq!(finished, Finished::Ended);
}

#[tokio::test]
async fn rows_that_ended_keep_their_ends_while_others_of_their_chunk_are_tried_again_and_when_these_are_aborted() {
    let rig = Rig::start().await;
    let (batches, session) = (batches(&rig), rig.session(POOL, 1).await);
    // One chunk whose retry waits for its time, one that has come to its second attempt.
    for (id, is_due) in [("waits", false), ("tried", true)] {
        batches.submit(new(id), rows(1..=40)).await.unwrap();
        let claim = take_rows(&session, 4).await;
        let done = view(&batches, id).await.counts.done;
        let name = self::id(&claim).to_owned();
        let first = chunk(&claim);
        let mut ends = vec![None; first.count];
        (ends[0], ends[1]) = (Some(RowEnd::Done), Some(RowEnd::Failed));
        later(claim, &ends).await;
        rig.balanced();
        let again = if is_due {
            rig.state().make_due(&name);
            let again = take_one(&session).await;
            assert_eq!((self::id(&again), chunk(&again).has_partial), (name.as_str(), true));
            Some(again)
        } else {
            None
        };
        let view = batches.abort(&job_id(id)).await.unwrap();
        assert_eq!((view.status, view.counts), (Status::Cancelled, counts(40, 0, done + 1, 1, 38 - done)), "{id}");
        rig.balanced();
        if let Some(again) = again {
            assert_eq!(all_ended(again, RowEnd::Done).await, Finished::Ended);
        }
        assert_eq!(self::view(&batches, id).await.counts, view.counts);
        assert_eq!(work_off(&session).await, [id]);
        rig.balanced();
        nothing_is_left(&rig);
        rig.age();
        assert_eq!(reconcile::check(&rig.store, KEEP).await.unwrap(), []);
    }
}

/// It runs on until its files are put together, and takes no more results all the same.
#[tokio::test]
async fn rows_that_end_while_the_files_of_an_aborted_batch_are_put_together_do_not_count() {
    let rig = Rig::start().await;
    let (batches, session) = (batches(&rig), rig.session(POOL, 1).await);
    batches.submit(new("b1"), rows(1..=40)).await.unwrap();
    let first = take_rows(&session, 4).await;
    let mut results = ended(vec![RowEnd::Done; chunk(&first).count]);
    results[0].as_mut().unwrap().files.insert("out".into(), "text".into());
    assert_eq!(end_rows(first, &results).await, Finished::Ended);
    let at_work = take_one(&session).await;
    let view = batches.abort(&job_id("b1")).await.unwrap();
    assert!(view.finishing && view.counts.aborted > 0, "{view:?}");
    assert_eq!(at_work.pen().cut(3, &[]).await.unwrap(), Mark::CancelAsked, "what is cut off would be a new chunk");
    assert_eq!(all_ended(at_work, RowEnd::Done).await, Finished::Ended);
    assert_eq!(self::view(&batches, "b1").await.counts, view.counts);
    rig.balanced();
    assert_eq!(work_off(&session).await, ["b1"]);
    let over = self::view(&batches, "b1").await;
    assert_eq!((over.status, over.counts), (Status::Cancelled, view.counts));
    rig.balanced();
}

#[tokio::test]
async fn an_end_that_does_not_tell_of_all_rows_gives_them_back() {
    let rig = Rig::start().await;
    let (batches, session) = (batches(&rig), rig.session(POOL, 1).await);
    batches.submit(new("b1"), rows(1..=40)).await.unwrap();
    let claim = take_rows(&session, 3).await;
    let (name, count) = (id(&claim).to_owned(), chunk(&claim).count);
    assert_eq!(end_rows(claim, &ended([RowEnd::Done])).await, Finished::Ended);
    rig.balanced();
    let again = take_one(&session).await;
    assert_eq!((id(&again), chunk(&again).count), (name.as_str(), count));
    all_ended(again, RowEnd::Done).await;
    assert_eq!(work_off(&session).await, ["b1"]);
    assert_eq!(view(&batches, "b1").await.counts, counts(40, 0, 40, 0, 0));
    rig.balanced();
}

#[tokio::test]
async fn rows_that_are_cut_off_are_another_chunk_with_what_became_of_them_and_what_it_cost() {
    let rig = Rig::start().await;
    let (batches, session) = (batches(&rig), rig.session(POOL, 1).await);
    batches.submit(new("b1"), rows(1..=60)).await.unwrap();
    let claim = take_rows(&session, 6).await;
    let name = id(&claim).to_owned();
    let mut ends = vec![None; chunk(&claim).count];
    (ends[1], ends[4]) = (Some(RowEnd::Failed), Some(RowEnd::Skipped));
    later(claim, &ends).await;
    rig.state().make_due(&name);
    let claim = take_one(&session).await;
    let whole = chunk(&claim);
    let pen = claim.pen();
    let results = pen.partial().await.unwrap();
    assert_eq!(results.iter().flatten().count(), 2);
    assert_eq!(pen.cut(3, &results).await.unwrap(), Mark::Held);
    assert_eq!(pen.cut(3, &results[..3]).await.unwrap(), Mark::Held, "its answer was lost, and it is sent again");
    rig.balanced();
    let rest = take_one(&session).await;
    let cut = chunk(&rest);
    assert_eq!((cut.first, cut.count), (whole.first + 3, whole.count - 3));
    assert_eq!(rest.job().number("attempts"), 1);
    assert_eq!(rest.pen().partial().await.unwrap()[1], Some(RowResult::of(RowEnd::Skipped)));
    all_ended(rest, RowEnd::Done).await;
    let mut first = ended([RowEnd::Done; 3]);
    first[1] = Some(RowResult::of(RowEnd::Failed));
    end_rows(claim, &first).await;
    assert_eq!(work_off(&session).await, ["b1"]);
    let view = view(&batches, "b1").await;
    assert_eq!((view.status, view.counts), (Status::Failed, counts(60, 0, 59, 1, 0)));
    rig.balanced();
    // A stale holder cuts nothing.
    assert_eq!(pen.cut(1, &[]).await.unwrap(), Mark::Stale);
}

async fn lose(rig: &Rig, leadership: &Leadership, session: &Session) {
    let beat = rig.state().beat(session.id().as_str());
    let leader = SessionId::new("leader:1:a").unwrap();
    let ended = rig.store.session_reclaim(session.id().as_str(), beat, &leader, leadership.term()).await.unwrap();
    ended.expect("the leader leads");
}

#[tokio::test]
async fn a_worker_that_comes_back_after_its_rows_were_given_to_another_writes_nothing() {
    let rig = Rig::start().await;
    let batches = batches(&rig);
    let leadership = rig.lead().await;
    let (paused, other) = (rig.session(POOL, 1).await, rig.session(POOL, 1).await);
    batches.submit(new("b1"), rows(1..=40)).await.unwrap();
    let stale = take_rows(&paused, 4).await;
    let done = view(&batches, "b1").await.counts.done;
    lose(&rig, &leadership, &paused).await;
    rig.balanced();
    // Whoever else reclaims the same session finds nothing to give back: the second taking of the rows is not touched.
    let claim = take_one(&other).await;
    assert_eq!((id(&claim), claim.job().number("unclean")), (id(&stale), 1));
    assert!(claim.job().fence > stale.job().fence);
    lose_again(&rig, &leadership, &paused).await;
    assert_eq!(stale.pen().cut(1, &[]).await.unwrap(), Mark::Stale);
    assert_eq!(all_ended(stale, RowEnd::Failed).await, Finished::Stale);
    assert_eq!(view(&batches, "b1").await.counts.done, done);
    rig.balanced();
    assert_eq!(all_ended(claim, RowEnd::Done).await, Finished::Ended);
    assert_eq!(work_off(&other).await, ["b1"]);
    assert_eq!(view(&batches, "b1").await.counts, counts(40, 0, 40, 0, 0));
    // The same for whoever assembles the files.
    batches.submit(new("b2"), rows([1])).await.unwrap();
    let mut result = RowResult::of(RowEnd::Done);
    result.files.insert("out".into(), "text".into());
    end_rows(take_one(&other).await, &[Some(result)]).await;
    let slow = rig.session(POOL, 1).await;
    let stale = take_one(&slow).await;
    assert_eq!(part(&stale), Part::Files(job_id("b2")));
    assert!(view(&batches, "b2").await.finishing);
    lose(&rig, &leadership, &slow).await;
    let claim = take_one(&other).await;
    let named = |name: &str| Fields::new().with("files", format!("{{\"{name}\":{{\"object\":\"o\",\"bytes\":1}}}}"));
    let stale = stale.finish(part_verdict(), Duration::ZERO, named("stale"), false).await.unwrap();
    assert_eq!(stale, Finished::Stale);
    claim.finish(part_verdict(), Duration::ZERO, named("out"), false).await.unwrap();
    assert_eq!(work_off(&other).await, ["b2"], "once");
    assert_eq!(view(&batches, "b2").await.files.keys().collect::<Vec<_>>(), ["out"]);
    rig.balanced();
}

async fn lose_again(rig: &Rig, leadership: &Leadership, session: &Session) {
    let leader = SessionId::new("leader:1:a").unwrap();
    rig.store.session_reclaim(session.id().as_str(), 0, &leader, leadership.term()).await.unwrap().unwrap();
}

#[tokio::test]
async fn rows_that_were_at_work_outlast_any_outage() {
    let server = testkit::RedisServer::with_clock(&[]);
    let store = queue_core::Store::connect(&config(server.url_db(DB))).await.unwrap();
    let rig = Rig { server, store };
    let batches = batches(&rig);
    let lost = rig.session(POOL, 1).await;
    batches.submit(new("b1"), rows(1..=40)).await.unwrap();
    let claim = take_rows(&lost, 3).await;
    rig.server.shift_clock(400 * 86_400);
    assert_eq!(rig.status("b1"), "running");
    assert_eq!(statuses(&batches, "b1").await.len(), 40);
    let leadership = rig.lead().await;
    lose(&rig, &leadership, &lost).await;
    drop(claim);
    let session = rig.session(POOL, 8).await;
    assert_eq!(work_off(&session).await, ["b1"]);
    assert_eq!(view(&batches, "b1").await.counts, counts(40, 0, 40, 0, 0));
    rig.balanced();
}

#[tokio::test]
async fn a_submission_over_a_network_that_loses_answers_stores_each_row_once() {
    let rig = Rig::start().await;
    let proxy = Proxy::start(rig.server.addr());
    let cut = Batches::new(rig.connect_through(&proxy).await, Limits::default());
    let mut loader = cut.open(new("b1")).unwrap();
    let (pushed, over) = (Cell::new(0), Cell::new(false));
    let trouble = async {
        for _ in 0..4 {
            // What was sent arrives, and its answer does not.
            let before = proxy.dropped_bytes();
            proxy.drop_replies(true);
            eventually("an answer is lost", async || (proxy.dropped_bytes() > before).then_some(())).await;
            proxy.cut();
            proxy.drop_replies(false);
            let reached = pushed.get() + 2_500;
            eventually("it goes on", async || (pushed.get() >= reached).then_some(()).ok_or(pushed.get())).await;
        }
        over.set(true);
    };
    let push = async {
        while !over.get() {
            let line = pushed.get() + 1;
            loader.push(Row { line, input: format!("\"{line:0100}\"").into_bytes() }).await.unwrap();
            pushed.set(line);
        }
    };
    tokio::join!(trouble, push);
    assert_eq!(loader.finish().await.unwrap().rows, pushed.get());
    let lines: Vec<u64> =
        read(&batches(&rig), "b1", Which::All, 5_000).await.into_iter().map(|row| row.at.line).collect();
    assert_eq!(lines, (1..=pushed.get()).collect::<Vec<_>>());
    rig.balanced();
}

#[tokio::test]
async fn pages_of_any_size_give_each_row_once_in_the_order_of_lines() {
    let rig = Rig::start().await;
    let (batches, session) = (batches(&rig), rig.session(POOL, 1).await);
    let mut random = Random(7);
    let lines: Vec<u64> = (0..2_500).map(|_| 1 + random.below(900)).collect();
    let packed = |line: u64, number: usize| Row { line, input: rmp_serde_of(number) };
    let msgpack = NewBatch { encoding: Encoding::MsgPack, held: true, ..new("b1") };
    let (first, second) = lines.split_at(1_700);
    let numbered = lines.iter().zip(0..).map(|(line, number)| packed(*line, number)).collect::<Vec<_>>();
    batches.submit(msgpack, numbered[..first.len()].to_vec()).await.unwrap();
    let mut loader = batches.append(&job_id("b1"), None, true).await.unwrap();
    for row in &numbered[numbered.len() - second.len()..] {
        loader.push(row.clone()).await.unwrap();
    }
    loader.finish().await.unwrap();
    let mut failed = Vec::new();
    // Some have ended, some have not.
    for _ in 0..20 {
        let claim = take_one(&session).await;
        let rows = claim.pen().block(&job_id("b1"), chunk(&claim).block).await.unwrap().unwrap();
        let own = chunk(&claim);
        let results: Vec<_> = rows[own.first..own.first + own.count]
            .iter()
            .map(|row| {
                let end = if row.line % 5 == 0 { RowEnd::Failed } else { RowEnd::Done };
                if end == RowEnd::Failed {
                    failed.push(row.line);
                }
                Some(RowResult { result: Some(row.input.clone()), ..RowResult::of(end) })
            })
            .collect();
        end_rows(claim, &results).await;
    }
    rig.balanced();
    // Of rows with the same line, the one that came first is first.
    let mut wanted: Vec<(u64, Vec<u8>)> = numbered.into_iter().map(|row| (row.line, row.input)).collect();
    wanted.sort_by_key(|(line, _)| *line);
    for most in [1_usize << 20, 1_000, 333, 7] {
        let read = read(&batches, "b1", Which::All, most).await;
        for row in &read {
            assert!(row.result.as_ref().is_none_or(|result| *result == row.input), "each has its own result");
        }
        let read: Vec<_> = read.into_iter().map(|row| (row.at.line, row.input)).collect();
        assert_eq!(read, wanted, "in pages of {most}");
    }
    failed.sort_unstable();
    for most in [1_000, 3] {
        let read = read(&batches, "b1", Which::Failed, most).await;
        assert_eq!(read.iter().map(|row| row.at.line).collect::<Vec<_>>(), failed, "in pages of {most}");
    }
    // A cursor comes back from its text, and behind the last row there is nothing.
    let page = batches.rows(&job_id("b1"), Which::All, None, 100).await.unwrap();
    let cursor = page.next.unwrap().to_string().parse().unwrap();
    let next = batches.rows(&job_id("b1"), Which::All, Some(cursor), 1).await.unwrap();
    assert_eq!((next.rows[0].at.line, &next.rows[0].input), (wanted[100].0, &wanted[100].1));
    let beyond = "99999:0.0:0".parse().unwrap();
    assert!(batches.rows(&job_id("b1"), Which::All, Some(beyond), 10).await.unwrap().rows.is_empty());
}

#[tokio::test]
async fn pages_that_are_full_by_their_bytes_leave_no_small_row_out() {
    let rig = Rig::start().await;
    let (batches, session) = (batches(&rig), rig.session(POOL, 1).await);
    batches.submit(new("b1"), rows(1..=40)).await.unwrap();
    while view(&batches, "b1").await.counts.pending > 0 {
        let claim = take_one(&session).await;
        let own = chunk(&claim);
        let results: Vec<_> = (own.first..own.first + own.count)
            .map(|place| {
                let mut result = RowResult::of(RowEnd::Done);
                let text = "x".repeat(if place % 3 == 0 { 900_000 } else { 10 });
                result.files.insert("out".into(), text);
                Some(result)
            })
            .collect();
        end_rows(claim, &results).await;
    }
    for which in [Which::All, Which::WithFiles] {
        let read = read(&batches, "b1", which, 1_000).await;
        assert_eq!(read.iter().map(|row| row.at.line).collect::<Vec<_>>(), (1..=40).collect::<Vec<_>>(), "{which:?}");
    }
}

fn rmp_serde_of(number: usize) -> Vec<u8> {
    Payload::msgpack(&number).unwrap().bytes
}

/// The peak of this process's memory in bytes, or what it uses now.
fn memory(line: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|found| found.strip_prefix(line)).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1_024
}

#[tokio::test]
async fn rows_in_no_order_are_handed_over_and_read_in_little_memory() {
    const ROWS: u64 = 60_000;
    let rig = Rig::start().await;
    let batches = batches(&rig);
    // A first page warms up what is kept for ever.
    batches.submit(new("b0"), rows(1..=2_000)).await.unwrap();
    read(&batches, "b0", Which::All, 1_000).await;
    std::fs::write("/proc/self/clear_refs", "5").expect("the peak begins anew");
    let before = memory("VmRSS:");
    let mut loader = batches.open(new("b1")).unwrap();
    // Each line once, far from its neighbours.
    for number in 0..ROWS {
        let line = 1 + number * 38_653 % ROWS;
        loader.push(Row { line, input: format!("\"{line:0600}\"").into_bytes() }).await.unwrap();
    }
    loader.finish().await.unwrap();
    let (mut line, mut after) = (0, None);
    loop {
        let page = batches.rows(&job_id("b1"), Which::All, after, 6_000).await.unwrap();
        for row in page.rows {
            line += 1;
            assert_eq!(row.at.line, line);
        }
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(line, ROWS);
    // The rows alone have 36 MB.
    let grown = memory("VmHWM:") - before;
    assert!(grown < 16 << 20, "{} KiB", grown >> 10);
}

#[tokio::test]
async fn two_batches_of_a_user_take_turns_and_a_job_behind_a_large_one_is_next() {
    let rig = Rig::start().await;
    let (batches, session) = (batches(&rig), rig.session(POOL, 1).await);
    let first = NewBatch { priority: queue_core::producer::Priority::Low, ..new("b1") };
    batches.submit(first, rows(1..=50_000)).await.unwrap();
    batches.submit(new("b2"), rows(1..=50_000)).await.unwrap();
    let mut turns = Vec::new();
    for _ in 0..8 {
        let claim = take_one(&session).await;
        turns.push(chunk(&claim).batch.to_string());
        all_ended(claim, RowEnd::Done).await;
    }
    assert_eq!(turns, ["b1", "b2", "b1", "b2", "b1", "b2", "b1", "b2"]);
    // A single job of the same user, and one of another, wait for no chunk but those at work.
    let producer = Producer::new(rig.store.clone(), Limits::default());
    for (user, id) in [("ann", "own"), ("bob", "other")] {
        let input = Payload::json(&1).unwrap();
        let app = App::new("bank").unwrap();
        let job = NewJob::task(User::new(user).unwrap(), app, Op::new("post").unwrap(), input);
        producer.enqueue(NewJob { id: job_id(id), ..job }).await.unwrap();
    }
    let claims = take(&session, 2).await;
    let mut next = ids(&claims);
    next.sort_unstable();
    assert_eq!(next, ["other", "own"]);
    for claim in claims {
        end(claim, "done").await;
    }
    rig.balanced();
}

#[tokio::test]
async fn limits_of_users_and_pools_hold_for_chunks() {
    let rig = Rig::start().await;
    let (batches, session) = (batches(&rig), rig.session(POOL, 8).await);
    let limits = queue_core::limits::Limits::new(rig.store.clone());
    let (ann, pool) = (User::new("ann").unwrap(), Pool::new(POOL).unwrap());
    let set = |text: &str| OfUser { concurrency: text.parse().unwrap(), ..OfUser::default() };
    limits.set_user(&ann, set("2")).await.unwrap();
    batches.submit(new("b1"), rows(1..=10_000)).await.unwrap();
    let mut claims = take(&session, 8).await;
    assert_eq!(claims.len(), 2);
    assert!(take(&session, 8).await.is_empty());
    all_ended(claims.remove(0), RowEnd::Done).await;
    claims.extend(take(&session, 8).await);
    assert_eq!(claims.len(), 2);
    limits.set_user(&ann, set("none")).await.unwrap();
    limits.set_pool(&pool, OfPool { rate: "3/1h".parse().unwrap(), ..OfPool::default() }).await.unwrap();
    claims.extend(take(&session, 8).await);
    assert_eq!(claims.len(), 5, "three starts in an hour");
    limits.set_pool(&pool, OfPool { rate: "none".parse().unwrap(), ..OfPool::default() }).await.unwrap();
    let whose = Whose::User(ann.clone());
    limits.pause(&whose, &"busy".parse().unwrap()).await.unwrap();
    assert!(take(&session, 8).await.is_empty());
    limits.resume(&whose).await.unwrap();
    assert_eq!(take_one(&session).await.job().user, ann);
    rig.balanced();
}

/// Numbers that are the same in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, most: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % most
    }
}

/// What a batch should be like, told by nothing but what was done to it.
#[derive(Default, Clone)]
struct Plain {
    is_released: bool,
    is_aborted: bool,
    has_files: bool,
    is_over: bool,
    rows: u64,
    done: u64,
    skipped: u64,
    failed: u64,
    aborted: u64,
    told: u64,
    /// Rows that ended at an attempt after which others of their chunk were tried again, by chunk.
    partial: BTreeMap<String, Ends>,
}

impl Plain {
    fn left(&self) -> u64 {
        self.rows - self.done - self.failed - self.aborted
    }

    /// All rows have ended, or none is to.
    fn settle(&mut self) {
        if self.is_released && self.left() == 0 && !self.has_files {
            self.is_over = true;
        }
    }

    fn takes_results(&self) -> bool {
        self.is_released && !self.is_over && !self.is_aborted
    }

    fn count(&mut self, Ends { done, skipped, failed, writes }: Ends) {
        self.has_files |= writes;
        self.done += done;
        self.skipped += skipped;
        self.failed += failed;
    }

    fn check(&self, id: &str, view: &BatchView) {
        let Plain { rows, done, skipped, failed, aborted, .. } = *self;
        let wanted = Counts { rows, pending: self.left(), done, skipped, failed, aborted };
        assert_eq!(view.counts, wanted, "{id}");
        let end = if self.is_aborted {
            Status::Cancelled
        } else if failed > 0 {
            Status::Failed
        } else {
            Status::Done
        };
        match (self.is_over, self.is_released) {
            (true, _) => assert_eq!(view.status, end, "{id}"),
            (false, false) => assert_eq!(view.status, Status::Held, "{id}"),
            (false, true) => assert!(matches!(view.status, Status::Pending | Status::Running), "{id}: {view:?}"),
        }
    }
}

/// A Redis in which a random order of everything is played, and beside it what it should hold.
struct Play<'a> {
    rig: &'a Rig,
    batches: Batches,
    leadership: Leadership,
    random: Random,
    sessions: Vec<(Session, Vec<Claim>)>,
    plain: BTreeMap<String, Plain>,
}

impl Play<'_> {
    fn pick(&mut self) -> String {
        let at = self.random.below(self.plain.len() as u64) as usize;
        self.plain.keys().nth(at).unwrap().clone()
    }

    fn plain(&mut self, id: &str) -> &mut Plain {
        self.plain.get_mut(id).unwrap()
    }

    fn lines(&mut self) -> Vec<u64> {
        let many = [0, 1, 3, 20][self.random.below(4) as usize];
        (0..many).map(|_| 1 + self.random.below(30)).collect()
    }

    async fn step(&mut self) {
        match self.random.below(12) {
            0 if self.plain.len() < 4 => {
                let id = format!("b{}", self.plain.len());
                let (held, lines) = (self.random.below(2) == 0, self.lines());
                let user = ["ann", "bob"][self.random.below(2) as usize];
                let batch = NewBatch { held, ..of(user, &id) };
                self.batches.submit(batch, rows(lines.iter().copied())).await.unwrap();
                let mut plain = Plain { rows: lines.len() as u64, is_released: !held, ..Plain::default() };
                plain.settle();
                self.plain.insert(id, plain);
            }
            _ if self.plain.is_empty() => {}
            1 => {
                let (id, lines, release) = (self.pick(), self.lines(), self.random.below(3) == 0);
                let appended = append(&self.batches, &id, &lines, release).await;
                let plain = self.plain(&id);
                if plain.is_released || plain.is_over {
                    assert!(matches!(appended, Err(BatchError::NotHeld(_))), "{appended:?}");
                } else {
                    plain.rows += lines.len() as u64;
                    assert_eq!(appended.unwrap(), plain.rows);
                    plain.is_released = release;
                    plain.settle();
                }
            }
            2 => {
                let id = self.pick();
                let released = self.batches.release(&job_id(&id)).await;
                let plain = self.plain(&id);
                if plain.is_over || plain.is_aborted {
                    assert!(matches!(released, Err(BatchError::Over(_))), "{released:?}");
                } else {
                    assert_eq!(released.unwrap().before.is_some(), plain.is_released);
                    plain.is_released = true;
                    plain.settle();
                }
            }
            3 => {
                let id = self.pick();
                self.batches.abort(&job_id(&id)).await.unwrap();
                let plain = self.plain(&id);
                if !(plain.is_over || plain.is_aborted || plain.is_released && plain.left() == 0) {
                    for (_, ends) in std::mem::take(&mut plain.partial) {
                        plain.count(ends);
                    }
                    plain.aborted = plain.left();
                    (plain.is_released, plain.is_aborted) = (true, true);
                    plain.settle();
                }
            }
            4 | 5 => {
                let (at, n) = (self.random.below(2) as usize, 1 + self.random.below(3) as usize);
                let taken = take(&self.sessions[at].0, n).await;
                self.sessions[at].1.extend(taken);
            }
            6 if self.random.below(3) == 0 => {
                let at = self.random.below(2) as usize;
                let new = self.rig.session(POOL, 8).await;
                let (session, claims) = std::mem::replace(&mut self.sessions[at], (new, Vec::new()));
                lose(self.rig, &self.leadership, &session).await;
                for claim in claims {
                    assert_eq!(end(claim, "done").await, Finished::Stale);
                }
            }
            7 => self.all_due(),
            _ => {
                let at = self.random.below(2) as usize;
                let held = self.sessions[at].1.len() as u64;
                if held > 0 {
                    let claim = self.random.below(held) as usize;
                    let claim = self.sessions[at].1.swap_remove(claim);
                    self.end(claim).await;
                }
            }
        }
    }

    fn all_due(&self) {
        let state = self.rig.state();
        state.scheduled().iter().for_each(|id| state.make_due(id));
    }

    async fn end(&mut self, claim: Claim) {
        let finished = match part(&claim) {
            _ if self.random.below(8) == 0 => put(claim, Verdict::Back).await,
            Part::Done(batch) => {
                let plain = self.plain(batch.as_str());
                assert!(plain.is_over, "{batch} is told of before it is over");
                plain.told += 1;
                end(claim, "done").await
            }
            Part::Files(batch) => {
                let plain = self.plain(batch.as_str());
                assert!(plain.left() == 0 && !plain.is_over, "{batch} is not at its end");
                plain.is_over = true;
                claim.finish(part_verdict(), Duration::ZERO, Fields::new().with("files", "{}"), false).await.unwrap()
            }
            Part::Rows(chunk) => self.end_rows(claim, chunk).await,
        };
        assert_eq!(finished, Finished::Ended);
    }

    async fn end_rows(&mut self, claim: Claim, mut chunk: Chunk) -> Finished {
        let (id, name) = (chunk.batch.to_string(), self::id(&claim).to_owned());
        let mut results = if chunk.has_partial { claim.pen().partial().await.unwrap() } else { Vec::new() };
        results.resize_with(chunk.count, || None);
        if chunk.count > 1 && self.random.below(4) == 0 {
            let keep = 1 + self.random.below(chunk.count as u64 - 1) as usize;
            let mark = claim.pen().cut(keep, &results).await.unwrap();
            let takes_results = self.plain(&id).takes_results();
            assert_eq!(mark, if takes_results { Mark::Held } else { Mark::CancelAsked });
            if takes_results {
                let rest = results.split_off(keep);
                let plain = self.plain(&id);
                plain.partial.remove(&name);
                plain.partial.insert(name.clone(), ends_of(&results));
                let rest_name = format!("{id}:{}:{}", chunk.block, chunk.first + keep);
                plain.partial.insert(rest_name, ends_of(&rest));
                chunk.count = keep;
            }
        }
        let tries_again = self.random.below(4) == 0;
        for result in results.iter_mut().filter(|result| result.is_none()) {
            let mut ended = RowResult::of(
                [RowEnd::Done, RowEnd::Done, RowEnd::Failed, RowEnd::Skipped][self.random.below(4) as usize],
            );
            if self.random.below(10) == 0 {
                ended.files.insert("out".into(), "text".into());
            }
            *result = Some(ended);
        }
        let plain = self.plain.get_mut(&id).unwrap();
        if tries_again {
            results[0] = None;
            let fields = partial_fields(&chunk, &results).with("status", "scheduled");
            if plain.takes_results() {
                plain.partial.insert(name, ends_of(&results));
            }
            return claim.finish(Verdict::Later { after_ms: 3_600_000 }, Duration::ZERO, fields, false).await.unwrap();
        }
        plain.partial.remove(&name);
        if plain.takes_results() {
            plain.count(ends_of(&results));
            plain.settle();
        }
        end_rows(claim, &results).await
    }

    async fn look(&self) {
        for (id, plain) in &self.plain {
            plain.check(id, &view(&self.batches, id).await);
        }
    }
}

/// How rows of a chunk have ended.
#[derive(Clone, Copy)]
struct Ends {
    done: u64,
    skipped: u64,
    failed: u64,
    writes: bool,
}

fn ends_of(results: &[Option<RowResult>]) -> Ends {
    let of = |end| results.iter().flatten().filter(|result| result.end == end).count() as u64;
    let (skipped, failed) = (of(RowEnd::Skipped), of(RowEnd::Failed));
    let writes = results.iter().flatten().any(|result| !result.files.is_empty());
    Ends { done: of(RowEnd::Done) + skipped, skipped, failed, writes }
}

#[tokio::test]
async fn no_order_of_releases_appends_aborts_and_ends_leaves_a_batch_that_nobody_ends() {
    let rig = Rig::start().await;
    for seed in 0..100 {
        println!("seed {seed}");
        rig.redis(&["FLUSHDB"]);
        let mut play = Play {
            rig: &rig,
            batches: batches(&rig),
            leadership: rig.lead().await,
            random: Random(seed),
            sessions: vec![(rig.session(POOL, 8).await, Vec::new()), (rig.session(POOL, 8).await, Vec::new())],
            plain: BTreeMap::new(),
        };
        for number in 0..50 {
            play.step().await;
            play.look().await;
            if number == 30 {
                rig.balanced();
            }
        }
        // Whatever has happened, all comes to its end once nothing holds it.
        for id in play.plain.clone().into_keys() {
            let _ = play.batches.release(&job_id(&id)).await;
            let plain = play.plain(&id);
            plain.is_released = true;
            plain.settle();
        }
        for round in 0.. {
            assert!(round < 500, "it comes to no end: {:?}", rig.dump());
            play.all_due();
            let mut claims: Vec<Claim> = play.sessions.iter_mut().flat_map(|(_, held)| std::mem::take(held)).collect();
            for at in 0..2 {
                claims.extend(take(&play.sessions[at].0, 8).await);
            }
            if claims.is_empty() && !rig.state().has(Piece::Scheduled) {
                break;
            }
            for claim in claims {
                play.end(claim).await;
            }
        }
        play.look().await;
        for (id, plain) in &play.plain {
            assert!(plain.is_over && plain.told == 1, "{id} is over, and that was heard {} times", plain.told);
        }
        rig.balanced();
        nothing_is_left(&rig);
        assert_eq!(rig.rejected(), []);
        if seed % 10 == 0 {
            rig.age();
            assert_eq!(reconcile::check(&rig.store, KEEP).await.unwrap(), []);
        }
    }
}
