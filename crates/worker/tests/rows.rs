//! Rows of batches in all forms of handlers: what they are given, and what becomes of each row.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use queue_core::model::batch::{Row, RowEnd, RowResult};
use queue_core::model::task::{Encoding, Message, Payload};
use serde_json::{Value, json};
use testkit::eventually;
use tokio_util::sync::CancellationToken;
use worker::execute::function::{Application, BoxError, Context};
use worker::execute::rows::{Feed, RowAnswer, RowsEnd, RowsOf};
use worker::execute::task::{Handler, Outcome, Problem, Wish};

use support::handlers::*;

mod support;

fn done(result: Value) -> RowAnswer {
    let result = Some(result).filter(|result| !result.is_null()).map(|result| result.to_string().into_bytes());
    RowAnswer::Ended(RowResult { result, ..RowResult::of(RowEnd::Done) })
}

/// What a row handed back that is done.
#[track_caller]
fn value(answer: &RowAnswer) -> Value {
    match answer {
        RowAnswer::Ended(RowResult { end: RowEnd::Done, result: Some(result), .. }) => {
            serde_json::from_slice(result).unwrap()
        }
        other => panic!("no result: {other:?}"),
    }
}

#[track_caller]
fn not_done(answer: &RowAnswer) -> &Problem {
    match answer {
        RowAnswer::Failed(problem) => problem,
        other => panic!("no problem: {other:?}"),
    }
}

fn message(errcode: &str) -> Message {
    Message { msgid: 5, errcode: errcode.into(), field: None, vals: vec![] }
}

fn files(name: &str, text: &str) -> BTreeMap<String, String> {
    [(name.to_owned(), text.to_owned())].into()
}

/// The one handler of an application.
fn only<R: worker::execute::function::Resource>(application: Application<R>) -> Arc<dyn Handler> {
    application.into_registrations().remove(0).handler
}

async fn behave(shared: usize, what: Value, context: Context) -> Result<Value, Problem> {
    context.message(message("said"));
    match what["do"].as_str() {
        Some("panic") => panic!("no such account"),
        Some("fail") => Err(Problem::fail("no").with(message("no"))),
        Some("ignore") => Err(Problem::ignore("a comment")),
        Some("retry") => Err(Problem::retry("busy").after(Duration::from_secs(9))),
        Some("files") => {
            context.file("out.csv", format!("{:?}", context.line()));
            if what["fails"] == true { Err(Problem::fail("no")) } else { Ok(Value::Null) }
        }
        Some("bytes") => {
            context.file("out.bin", [0xff]);
            Ok(Value::Null)
        }
        _ => {
            let given: Option<Value> = context.context()?;
            let who = format!("{} {} {}", context.job(), context.user(), context.attempt());
            Ok(json!([shared, context.line(), who, given]))
        }
    }
}

#[tokio::test]
async fn rows_run_through_the_closure_of_tasks_and_each_ends_for_itself() {
    let opened = Arc::new(AtomicUsize::new(0));
    let opening = opened.clone();
    let open = move || {
        let number = opening.fetch_add(1, Ordering::SeqCst) + 1;
        async move { Ok::<_, BoxError>(number) }
    };
    let of = || Application::sharing("App", open.clone()).unwrap();
    let waits = only(of().handler("op", |shared, what, context| behave(*shared, what, context)).unwrap());
    let blocks = of().blocking_handler("op", |shared, what, context| {
        tokio::runtime::Handle::current().block_on(behave(*shared, what, context))
    });
    for (number, handler) in [waits, only(blocks.unwrap())].iter().enumerate() {
        let inputs =
            ["", "panic", "", "fail", "ignore", "retry", "files", "bytes", ""].map(|what| json!({ "do": what }));
        let inputs = [&inputs[..], &[json!({ "do": "files", "fails": true }), json!("no object")]].concat();
        let of = RowsOf { context: Some(Payload::json("a note").unwrap()), ..rows_of() };
        let answers = work(handler, feed_of(of, &inputs)).await;

        let done = |line: Option<usize>, files| {
            let value = line.map(|line| json!([number + 1, line, "batch-1 ana 1", "a note"]).to_string().into_bytes());
            let result =
                RowResult { result: value, files, messages: vec![message("said")], ..RowResult::of(RowEnd::Done) };
            RowAnswer::Ended(result)
        };
        assert_eq!(answers[0], done(Some(1), BTreeMap::new()));
        assert_eq!(answers[1], RowAnswer::Failed(Problem::retry("the handler panicked: no such account")));
        assert_eq!(answers[2], done(Some(3), BTreeMap::new()));
        let with = |problem: Problem| RowAnswer::Failed(problem.with(message("said")));
        assert_eq!(answers[3], RowAnswer::Failed(Problem::fail("no").with(message("said")).with(message("no"))));
        assert_eq!(answers[4], with(Problem::ignore("a comment")));
        assert_eq!(answers[4].clone().last().end, RowEnd::Skipped);
        assert_eq!(answers[5], with(Problem::retry("busy").after(Duration::from_secs(9))));
        assert_eq!(answers[6], done(None, files("out.csv", "Some(7)")));
        assert_eq!(not_done(&answers[7]).reason, "what it writes to the file \"out.bin\" is no UTF-8");
        assert_eq!(answers[8], done(Some(9), BTreeMap::new()));
        // What a failed row writes is kept.
        let RowAnswer::Ended(failed) = &answers[9] else { panic!("{:?}", answers[9]) };
        assert_eq!((failed.end, &failed.files), (RowEnd::Failed, &files("out.csv", "Some(10)")));
        assert_eq!(answers[10], done(Some(11), BTreeMap::new()));
        assert_eq!(opened.load(Ordering::SeqCst), number + 1, "once for all rows");
    }
}

#[tokio::test]
async fn a_row_that_is_not_of_the_type_fails_and_a_result_is_written_as_its_input_was() {
    let application = Application::new("App").unwrap();
    let handler = only(application.handler("op", |_, number: u32, _| async move { Ok(number + 1) }).unwrap());
    let of = RowsOf { encoding: Encoding::MsgPack, ..rows_of() };
    let answers = work(&handler, feed_of(of, &[json!(1), json!("one"), json!(200)])).await;
    let written = |number: u32| {
        let result = Some(Payload::msgpack(&number).unwrap().bytes);
        RowAnswer::Ended(RowResult { result, ..RowResult::of(RowEnd::Done) })
    };
    assert_eq!((&answers[0], &answers[2]), (&written(2), &written(201)));
    let problem = not_done(&answers[1]);
    assert!(problem.wish == Wish::Fail && problem.reason.starts_with("its input is no u32: "), "{}", problem.reason);

    // Programs and commands speak JSON, whatever the batch is written in.
    let echo = json!({ "do": "echo", "ä": [1.5, null] });
    let several = Handled::of_rows("rows = 9");
    let single = Handled::behaving("");
    let command = Handled::command(&["cat"], "stdin = 'json'\noutput = 'json'");
    for handled in [several, single, command] {
        let of = RowsOf { encoding: Encoding::MsgPack, context: Some(Payload::msgpack(&7).unwrap()), ..rows_of() };
        let answer = work(&handled.handler, feed_of(of, std::slice::from_ref(&echo))).await.remove(0);
        let RowAnswer::Ended(RowResult { result: Some(bytes), .. }) = answer else { panic!("{answer:?}") };
        let back: Value = Payload { encoding: Encoding::MsgPack, bytes }.read().unwrap();
        assert!([&back, &back["input"], &back["rows"]["input"]].contains(&&echo), "{back}");
        assert!(back["type"].is_null() || back["context"] == 7, "{back}");
    }
}

#[tokio::test]
async fn a_context_that_is_kept_stays_that_of_its_row() {
    let kept = Arc::new(Mutex::new(Vec::new()));
    let keeping = kept.clone();
    let handler = Application::new("App").unwrap().handler("op", move |_, keep: bool, context: Context| {
        if keep {
            keeping.lock().unwrap().push(context.clone());
        }
        async { Ok(()) }
    });
    let inputs = [true, true, false, false, true, false].map(|keep| json!(keep));
    let answers = work(&only(handler.unwrap()), feed(&inputs)).await;
    assert_eq!(answers, vec![done(Value::Null); 6]);
    let lines: Vec<_> = kept.lock().unwrap().iter().map(|context| context.line().unwrap()).collect();
    assert_eq!(lines, [1, 2, 5]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_hangs_is_dropped_at_the_stop_and_one_that_hears_it_may_still_be_done() {
    struct Dropped(Arc<AtomicBool>);
    impl Drop for Dropped {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    for (hears, ends_well) in [(false, false), (true, true), (true, false)] {
        let (up, dropped) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (hanging, dropping) = (up.clone(), dropped.clone());
        let handler = Application::new("App").unwrap().handler("op", move |_, hangs: bool, context: Context| {
            let mut dropping = hangs.then(|| Dropped(dropping.clone()));
            hanging.fetch_or(hangs, Ordering::SeqCst);
            async move {
                match (hangs, hears) {
                    (false, _) => {}
                    (true, false) => std::future::pending().await,
                    (true, true) => context.stop().cancelled().await,
                }
                drop(dropping.take());
                // An attempt that is cut short is none.
                if hangs && !ends_well { Err(Problem::retry("told to stop")) } else { Ok(()) }
            }
        });
        let handler = only(handler.unwrap());
        let feed = feed(&[json!(false), json!(true), json!(false)]);
        let (stop, end) = start_rows(&handler, &feed);
        eventually("a row to hang", async || up.load(Ordering::SeqCst).then_some(())).await;
        stop.cancel();
        assert_eq!(end_of_rows(end).await, RowsEnd::Over);
        assert!(dropped.load(Ordering::SeqCst) && feed.has_more());
        let answers = feed.take_answers();
        assert_eq!((&answers[0], &answers[2]), (&Some(done(Value::Null)), &None));
        assert_eq!(answers[1].is_some(), ends_well);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn blocking_rows_stop_after_the_one_that_they_are_at() {
    let (up, release) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (telling, released) = (up.clone(), release.clone());
    let handler = Application::new("App").unwrap().blocking_handler("op", move |_, number: u32, _| {
        while number == 1 && !released.load(Ordering::SeqCst) {
            telling.store(true, Ordering::SeqCst);
            std::thread::park_timeout(Duration::from_millis(1));
        }
        Ok(number)
    });
    let handler = only(handler.unwrap());
    let feed = feed(&[json!(0), json!(1), json!(2)]);
    let (stop, end) = start_rows(&handler, &feed);
    eventually("the second row", async || up.load(Ordering::SeqCst).then_some(())).await;
    stop.cancel();
    release.store(true, Ordering::SeqCst);
    assert_eq!(end_of_rows(end).await, RowsEnd::Over);
    assert_eq!(feed.take_answers(), [Some(done(json!(0))), Some(done(json!(1))), None]);
}

#[tokio::test]
async fn rows_of_an_application_that_cannot_be_opened_are_not_begun() {
    let application = Application::sharing("App", || async { Err::<(), BoxError>("the database is away".into()) });
    let handler = only(application.unwrap().handler("op", |_, (): (), _| async { Ok(()) }).unwrap());
    let feed = feed(&[json!(null)]);
    let end = handler.run_rows(feed.clone(), CancellationToken::new()).await;
    assert_eq!(end, RowsEnd::NotReady("the database is away".into()));
    assert_eq!(feed.next().unwrap().line, 1);
}

#[tokio::test]
async fn an_application_is_told_of_the_end_of_a_batch_by_its_own_function() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let telling = told.clone();
    let application = Application::sharing("App", || async { Ok::<_, BoxError>("a pool") }).unwrap();
    let application = application
        .handler("rows", |_, (): (), _| async { Ok(()) })
        .map(|it| {
            it.mark_done(move |shared, end| {
                telling.lock().unwrap().push((*shared, end.status.as_str(), end.counts.failed));
                async move { if end.attempt == 1 { Err(Problem::retry("busy")) } else { Ok(()) } }
            })
        })
        .and_then(|it| it.handler("other", |_, (): (), _| async { Ok(()) }));
    let handlers: Vec<_> = application.unwrap().into_registrations().into_iter().map(|it| it.handler).collect();
    let tell = async |handler: &Arc<dyn Handler>, attempt| {
        let end = worker::execute::rows::BatchEnd { attempt, ..batch_end() };
        handler.mark_done(end, CancellationToken::new()).await
    };
    assert_eq!(tell(&handlers[0], 1).await, Outcome::Failed(Problem::retry("busy")));
    assert_eq!(tell(&handlers[0], 2).await, Outcome::Done(Default::default()));
    assert_eq!(tell(&handlers[1], 1).await, Outcome::Done(Default::default()));
    assert_eq!(*told.lock().unwrap(), [("a pool", "failed", 2); 2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_gets_several_rows_in_a_line_and_says_of_each_what_became_of_it() {
    let handled = Handled::of_rows("rows = 10");
    let message = json!({ "msgid": 5, "errcode": "no" });
    let inputs = [
        json!({ "do": "echo" }),
        json!({ "do": "be", "answer": {} }),
        json!({ "do": "be", "answer": { "status": "done", "result": 1.50, "messages": [message], "files": { "a.csv": "1,2" } } }),
        json!({ "do": "be", "answer": { "status": "failed", "error": "why", "files": { "a.csv": "3" } } }),
        json!({ "do": "be", "answer": { "status": "failed", "messages": [message], "result": [1] } }),
        json!({ "do": "be", "answer": { "status": "skipped" } }),
        json!({ "do": "be", "answer": { "status": "retry", "error": "busy", "after_ms": 1500 } }),
    ];
    let context = Some(Payload { encoding: Encoding::Json, bytes: b"{\n\"page\": 7}".into() });
    let of = RowsOf { context, traceparent: Some("00-1-2-01".into()), ..rows_of() };
    let answers = work(&handled.handler, feed_of(of, &inputs)).await;
    let mut arrived = value(&answers[0]);
    assert!(arrived["id"].take().is_u64());
    let expected = json!({
        "type": "rows", "v": 1, "id": null, "batch": "batch-1", "user": "ana", "app": "App", "op": "op", "fence": 7,
        "attempt": 1, "max_attempts": 3, "timeout_ms": 30_000, "traceparent": "00-1-2-01", "context": { "page": 7 },
        "rows": { "line": 1, "input": { "do": "echo" } },
    });
    assert_eq!(arrived, expected);
    assert_eq!(answers[1], done(Value::Null));
    let plain = RowResult::of(RowEnd::Done);
    let messages = vec![self::message("no")];
    let said =
        RowResult { result: Some(b"1.5".into()), messages: messages.clone(), files: files("a.csv", "1,2"), ..plain };
    assert_eq!(answers[2], RowAnswer::Ended(said));
    let failed = RowResult::failed("processing_error", "why");
    assert_eq!(answers[3], RowAnswer::Ended(RowResult { files: files("a.csv", "3"), ..failed }));
    let ended = answers[4].clone().last();
    assert_eq!((ended.end, ended.messages, ended.result), (RowEnd::Failed, messages, Some(b"[1]".into())));
    assert_eq!(answers[5].clone().last(), RowResult::of(RowEnd::Skipped));
    assert_eq!(answers[6], RowAnswer::Failed(Problem::retry("busy").after(Duration::from_millis(1500))));
    assert_eq!(handled.processes().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_program_of_the_page_works_on_rows_as_it_stands() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("book.py");
    std::fs::write(&path, example("python rows")).unwrap();
    let handled = Handled::program(&[&PYTHON, path.to_str().unwrap()], "rows = 200\nmark_done = true");
    let inputs = [5, 0, -1].map(|cents| json!({ "cents": cents }));
    let answers = work(&handled.handler, feed(&[&inputs[..], &[json!({})]].concat())).await;
    let ends: Vec<RowResult> = answers.into_iter().map(RowAnswer::last).collect();
    assert_eq!((&ends[0].result, &ends[0].files), (&Some(b"{\"booked\": 5}".into()), &files("booked.csv", "1,5")));
    assert_eq!(ends[1], RowResult::of(RowEnd::Skipped));
    assert_eq!((ends[2].end, &*ends[2].messages[0].errcode), (RowEnd::Failed, "negative"));
    assert_eq!(ends[3], RowResult::failed("processing_error", "KeyError('cents')"));
    let outcome = handled.handler.mark_done(batch_end(), CancellationToken::new()).await;
    assert_eq!(outcome, Outcome::Done(Default::default()));
}

/// How many rows came together, row by row.
async fn together(handled: &Handled, feed: Arc<Feed>) -> Vec<u64> {
    work(&handled.handler, feed).await.iter().map(|answer| value(answer)[0].as_u64().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_in_a_line_are_limited_in_number_and_bytes_and_those_tried_before_come_one_by_one() {
    let handled = Handled::of_rows("rows = 10");
    let count = |more: usize| json!({ "do": "count", "more": "x".repeat(more) });
    let lines = [vec![10; 20], vec![5; 5]].concat();
    assert_eq!(together(&handled, feed(&vec![count(0); 25])).await, lines);
    let again = RowsOf { attempt: 2, ..rows_of() };
    assert_eq!(together(&handled, feed_of(again, &vec![count(0); 3])).await, [1; 3]);
    assert_eq!(together(&handled, feed(&vec![count(100 << 10); 5])).await, [3, 3, 3, 2, 2]);
    assert_eq!(together(&handled, feed(&vec![count(300 << 10); 2])).await, [1; 2]);
    assert_eq!(handled.processes().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_does_not_ask_for_rows_gets_each_as_a_task() {
    let handled = Handled::behaving("");
    let inputs =
        [json!({ "do": "echo" }), json!({ "do": "echo" }), json!({ "do": "exit", "code": 3 }), json!({ "do": "" })];
    let answers = work(&handled.handler, feed(&inputs)).await;
    for (line, answer) in answers[..2].iter().enumerate() {
        let arrived = value(answer);
        let words = ["type", "job", "batch", "line", "attempt"].map(|word| arrived[word].clone());
        assert_eq!(words, [json!("job"), json!("batch-1"), json!("batch-1"), json!(line + 1), json!(1)]);
    }
    assert_eq!(not_done(&answers[2]).wish, Wish::Retry { after: None });
    assert!(value(&answers[3])["pid"].is_i64(), "by another process");
    // A task that is no row says nothing of a batch.
    let arrived = handled.result(json!({ "do": "echo" })).await;
    assert!(arrived.get("batch").is_none() && arrived.get("line").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_breaks_the_rules_fails_the_rows_of_its_line_and_no_others() {
    let handled = Handled::of_rows("rows = 2\nmax_output = 10000");
    let again = Wish::Retry { after: None };
    let one = |row: &str| format!(r#"{{"type":"rows","id":$ID,"results":[{{}},{row}]}}"#);
    let cases = [
        ("Traceback".into(), Wish::Fail, "wrote what is no message: \"Traceback"),
        (one(r#"{"status":"good"}"#), Wish::Fail, "unknown variant `good`"),
        (one(r#"{"status":"done","error":"why"}"#), Wish::Fail, "says of a row that it is done, and has an error"),
        (one(r#"{"after_ms":3}"#), Wish::Fail, "says when to try a row again that is not to be tried again"),
        (one(r#"{"reslut":1}"#), Wish::Fail, "unknown field `reslut`"),
        (one(r#"{"result":NaN}"#), Wish::Fail, "wrote what is no message"),
        (one(r#"{"files":{"a":7}}"#), Wish::Fail, "wrote what is no message"),
        (one("7"), Wish::Fail, "wrote what is no message"),
        (one("{},{}"), Wish::Fail, "was given 2 rows, and says what became of 3"),
        (
            r#"{"type":"rows","id":$ID,"results":[{}]}"#.into(),
            Wish::Fail,
            "was given 2 rows, and says what became of 1",
        ),
        (r#"{"type":"rows","id":$ID}"#.into(), Wish::Fail, "missing field `results`"),
        (r#"{"type":"rows","id":999,"results":[{},{}]}"#.into(), again, "the program spoke of call 999, and call "),
        (r#"{"type":"result","id":$ID,"result":1}"#.into(), Wish::Fail, "answered rows as if they were one task"),
        (r#"{"type":"dance","id":$ID}"#.into(), Wish::Fail, "unknown variant `dance`"),
        ("x".repeat(10_001), Wish::Fail, "wrote a line of more than 10000 bytes"),
        // No breach, and of both rows.
        (r#"{"type":"error","id":$ID,"error":"away","wish":"retry"}"#.into(), again, "away"),
    ];
    for (instead, wish, reason) in cases {
        let count = json!({ "do": "count" });
        let bad = json!({ "do": "count", "instead": instead });
        let answers = work(&handled.handler, feed(&[&count, &count, &bad, &count, &count].map(Value::clone))).await;
        for answer in &answers[2..4] {
            let problem = not_done(answer);
            assert_eq!(problem.wish, wish, "{}", problem.reason);
            assert!(problem.reason.contains(reason) && problem.reason.len() < 1000, "{reason}: {}", problem.reason);
        }
        let others = [0, 1, 4].map(|at| value(&answers[at])[0].clone());
        assert_eq!(others, [2, 2, 1].map(|count| json!(count)), "{reason}");
        let replaced = value(&answers[0])[1] != value(&answers[4])[1];
        assert_eq!(replaced, reason != "away", "{reason}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_ends_in_the_middle_costs_the_rows_of_its_line_an_attempt_and_then_the_one_alone() {
    let handled = Handled::of_rows("rows = 3");
    let count = || json!({ "do": "count" });
    let mut inputs = vec![count(); 9];
    inputs[4] = json!({ "do": "kill" });
    let answers = work(&handled.handler, feed(&inputs)).await;
    for (at, answer) in answers.iter().enumerate() {
        if (3..6).contains(&at) {
            let reason = "the program was ended by SIGKILL before it had answered";
            assert_eq!(answer, &RowAnswer::Failed(Problem::retry(reason)), "{at}");
        } else {
            assert_eq!(value(answer)[0], 3, "{at}");
        }
    }
    let again = RowsOf { attempt: 2, ..rows_of() };
    let answers = work(&handled.handler, feed_of(again, &inputs[3..6])).await;
    assert_eq!((&value(&answers[0])[0], &value(&answers[2])[0]), (&json!(1), &json!(1)));
    assert_eq!(not_done(&answers[1]).wish, Wish::Retry { after: None });
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_no_process_has_read_lose_no_attempt() {
    // It ends behind its answer, mostly when the next line is on its way to it.
    let handled = Handled::of_rows("rows = 2");
    let leaves = json!({ "do": "count", "afterwards": "exit" });
    let answers = work(&handled.handler, feed(&vec![leaves; 40])).await;
    assert!(answers.iter().all(|answer| value(answer)[0] == 2));
    // It can't even start.
    let handled = Handled::program(&["sh", "-c", "exit 1"], "rows = 2");
    let feed = feed(&[json!(1), json!(2), json!(3)]);
    let end = handled.handler.run_rows(feed.clone(), CancellationToken::new()).await;
    assert_eq!(end, RowsEnd::NotReady("the program ended with exit code 1 before it had answered".into()));
    assert_eq!(feed.take_answers(), [None, None, None]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_said_in_json_fails_its_row_alone() {
    let handled = Handled::of_rows("rows = 9");
    let row = |line, input: &[u8]| Some(Row { line, input: input.into() });
    let count = Payload::msgpack(&json!({ "do": "count" })).unwrap().bytes;
    let of = || RowsOf { encoding: Encoding::MsgPack, ..rows_of() };
    let bad = [0xc4, 1, 0xff];
    let feed = Feed::new(of(), vec![row(1, &count), row(2, &bad), row(3, &count)]);
    let answers = work(&handled.handler, Arc::new(feed)).await;
    let two = Payload::msgpack(&[2, *handled.processes().first().unwrap()]).unwrap().bytes;
    let counted = RowAnswer::Ended(RowResult { result: Some(two), ..RowResult::of(RowEnd::Done) });
    assert_eq!((&answers[0], &answers[2]), (&counted, &counted));
    let problem = not_done(&answers[1]);
    assert!(problem.wish == Wish::Fail && problem.reason.contains("cannot be handed over as JSON"), "{problem:?}");
    // A context that can't be said is said to all of them.
    let of = RowsOf { context: Some(Payload { encoding: Encoding::MsgPack, bytes: bad.into() }), ..of() };
    let answers = work(&handled.handler, Arc::new(Feed::new(of, vec![row(1, &count), row(2, &count)]))).await;
    for answer in &answers {
        assert!(not_done(answer).reason.starts_with("the context cannot be handed over as JSON: "), "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_are_to_stop_are_answered_if_the_program_hears_it_and_left_open_if_not() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("up");
    let handled = Handled::of_rows("rows = 2\ncancel_grace = '1m'");
    let count = json!({ "do": "count" });
    // It waits for a line of which it knows that it will be a cancel.
    let feed = feed(&[json!({ "do": "wait" }), json!({ "do": "be", "answer": { "status": "retry" } }), count.clone()]);
    let (stop, end) = start_rows(&handled.handler, &feed);
    eventually("a row to be begun", async || feed.overdue_at()).await;
    stop.cancel();
    assert_eq!(end_of_rows(end).await, RowsEnd::Over);
    let answers = feed.take_answers();
    assert_eq!(value(answers[0].as_ref().unwrap()), json!("cancel"));
    assert_eq!(answers[1..], [None, None], "an attempt that is cut short is none");
    assert_eq!(handled.processes().len(), 1, "it goes on");

    let handled = Handled::of_rows("rows = 2\ncancel_grace = '50ms'");
    let hang = json!({ "do": "hang", "file": file });
    let feed = support::handlers::feed(&[count.clone(), count.clone(), count, hang]);
    let (stop, end) = start_rows(&handled.handler, &feed);
    eventually("a row to hang", async || file.exists().then_some(())).await;
    stop.cancel();
    assert_eq!(end_of_rows(end).await, RowsEnd::Over);
    let answered: Vec<bool> = feed.take_answers().iter().map(Option::is_some).collect();
    assert_eq!(answered, [true, true, false, false]);
    handled.nobody_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_in_node_ends_its_rows_by_a_word() {
    let script = r#"
        let line = 0;
        require("node:readline").createInterface({ input: process.stdin }).on("line", (text) => {
            const { type, id, rows } = JSON.parse(text);
            if (type === "cancel") return console.log(JSON.stringify({ type: "stopped", id }));
            if (rows.some((row) => row.input === "hang")) return;
            const results = rows.map((row) => ({ result: row.line * 10, files: { "out.txt": `Ä${row.line}` } }));
            console.log(JSON.stringify({ type: "rows", id, results }));
        });"#;
    let handled = Handled::program(&["node", "-e", script], "rows = 2\ncancel_grace = '1m'");
    let feed = feed(&[json!(""), json!(""), json!("hang"), json!("")]);
    let (stop, end) = start_rows(&handled.handler, &feed);
    // The line behind the first two is begun.
    eventually("rows to hang", async || (!feed.has_more()).then_some(())).await;
    stop.cancel();
    assert_eq!(end_of_rows(end).await, RowsEnd::Over);
    let result = |line: i64| RowResult {
        result: Some((line * 10).to_string().into_bytes()),
        files: files("out.txt", &format!("Ä{line}")),
        ..RowResult::of(RowEnd::Done)
    };
    let answers = feed.take_answers();
    assert_eq!(answers, [Some(result(1).into()), Some(result(2).into()), None, None]);
    assert_eq!(handled.processes().len(), 1, "it goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_is_told_of_the_end_of_a_batch_if_it_asks_for_that() {
    let tell = async |handled: &Handled, context: Option<Value>| {
        let context = context.map(|context| Payload::json(&context).unwrap());
        let end = worker::execute::rows::BatchEnd { context, ..batch_end() };
        handled.handler.mark_done(end, CancellationToken::new()).await
    };
    let handled = Handled::of_rows("mark_done = true");
    let mut told = result(tell(&handled, None).await);
    assert!(told["id"].take().is_u64());
    let counts = json!({ "rows": 3, "pending": 0, "done": 1, "skipped": 0, "failed": 2, "aborted": 0 });
    let expected = json!({
        "type": "mark_done", "v": 1, "id": null, "batch": "batch-1", "user": "ana", "app": "App", "op": "op",
        "attempt": 1, "status": "failed", "counts": counts, "files": { "out.csv": { "object": "o1", "bytes": 9 } },
        "context": null,
    });
    assert_eq!(told, expected);
    let outcome = tell(&handled, Some(json!({ "error": "not now" }))).await;
    assert_eq!(outcome, Outcome::Failed(Problem::retry("not now")));
    let unasked = Handled::of_rows("");
    assert_eq!(tell(&unasked, None).await, Outcome::Done(Default::default()));
    assert!(unasked.processes().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_runs_for_each_row_and_another_at_the_end() {
    let keys = "retry_codes = [75]\nignore_codes = [8]\nstdin = 'row'\noutput = 'json'";
    let script = "test {input.code} = 0 || exit {input.code}; read text; echo \"[\\\"{batch}\\\",{line},$text]\"";
    let handled = Handled::command(&["sh", "-c", script], keys);
    let inputs = [0, 75, 8, 9, 0].map(|code| json!({ "code": code }));
    let answers = work(&handled.handler, feed(&inputs)).await;
    let given = |line: u64| json!(["batch-1", line, { "batch": "batch-1", "line": line, "input": { "code": 0 } }]);
    assert_eq!((value(&answers[0]), value(&answers[4])), (given(1), given(5)));
    let wishes = [1, 2, 3].map(|at| not_done(&answers[at]).wish);
    assert_eq!(wishes, [Wish::Retry { after: None }, Wish::Ignore, Wish::Fail]);
    // A task is no row.
    let problem = handled.problem(json!({ "code": 0 })).await;
    assert_eq!((problem.wish, &*problem.reason), (Wish::Fail, "it belongs to no batch"));

    let script = "cat > {context.file}; echo {batch} {input.status} >> {context.file}; exit {context.code}";
    let keys = format!("mark_done = ['sh', '-c', {script:?}]");
    let handled = Handled::command(&["true"], &keys);
    handled.handler.start().await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("told");
    for (code, expected) in [(0, None), (75, Some(Wish::Retry { after: None })), (1, Some(Wish::Fail))] {
        let context = Some(Payload::json(&json!({ "file": file, "code": code })).unwrap());
        let end = worker::execute::rows::BatchEnd { context, ..batch_end() };
        let whole = end.to_json_line().unwrap();
        let outcome = handled.handler.mark_done(end, CancellationToken::new()).await;
        let wish = if let Outcome::Failed(problem) = outcome { Some(problem.wish) } else { None };
        assert_eq!(wish, expected);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), format!("{whole}batch-1 failed\n"));
    }
    let lacks = Handled::command(&["true"], "mark_done = ['no-such-program']");
    assert_eq!(lacks.handler.start().await.unwrap_err(), "there is no program no-such-program");
    // Without one there is nothing to be told.
    let outcome = Handled::command(&["true"], "").handler.mark_done(batch_end(), CancellationToken::new()).await;
    assert_eq!(outcome, Outcome::Done(Default::default()));
}
