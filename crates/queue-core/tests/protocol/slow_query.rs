//! Slow queries as a client meets them, with a worker made by hand. Each test shows what their users can rely on; those
//! whose names begin with `q` show that a weakness of an earlier design is absent.

use std::collections::BTreeMap;
use std::time::Duration;

use queue_core::calls::{Fields, Finished, Verdict};
use queue_core::config::{Limits, ObjectsConfig, Url};
use queue_core::events::Events;
use queue_core::ids::{App, Op, SessionId, User};
use queue_core::model::Status;
use queue_core::model::task::{File, Message, Payload};
use queue_core::objects::Objects;
use queue_core::producer::{Database, EnqueueError, NewJob, Producer};
use queue_core::session::Claim;
use queue_core::slow_query::{SlowQueries, SlowQueryError, SlowQueryStatus};
use serde_json::{Value, json};
use testkit::end_of;

use crate::support::*;

struct Desk {
    rig: Rig,
    queries: SlowQueries,
}

impl Desk {
    async fn open() -> Self {
        let rig = Rig::start().await;
        let queries = SlowQueries::new(rig.store.clone(), Limits::default(), None);
        Self { rig, queries }
    }

    async fn submit_to(&self, app: &str, op: &str) -> String {
        let (user, app, op) = (User::new("ann").unwrap(), App::new(app).unwrap(), Op::new(op).unwrap());
        let context = Some(Payload::json(&json!({ "lang": "de" })).unwrap());
        let input = Payload::json(&json!({ "line": 0 })).unwrap();
        self.queries.submit(user, app, op, context, input).await.unwrap().to_string()
    }

    async fn submit(&self) -> String {
        self.submit_to("bank", "report").await
    }

    async fn done(&self, id: &str) -> SlowQueryStatus {
        self.queries.done(id).await.unwrap()
    }

    async fn abort(&self, id: &str) -> SlowQueryStatus {
        self.queries.abort(id).await.unwrap()
    }

    async fn listed(&self, app: &str, op: Option<&str>, newer_than: Duration) -> Vec<(String, Status)> {
        let op = op.map(|op| Op::new(op).unwrap());
        let listed = self.queries.list(App::new(app).unwrap(), op, newer_than).await.unwrap();
        listed.into_iter().map(|query| (query.id, query.status)).collect()
    }
}

const HOUR: Duration = Duration::from_secs(3_600);

async fn finish(claim: Claim, fields: Fields) -> Finished {
    claim.finish(final_verdict(), Duration::ZERO, fields, false).await.unwrap()
}

fn succeeded(result: &Value) -> Fields {
    Fields::new().with("status", "done").with("result", result.to_string()).with("result_encoding", "json")
}

fn message() -> Message {
    Message { msgid: 101, errcode: "missing".into(), field: Some("account".into()), vals: vec!["7".into()] }
}

fn success(result: &Value) -> SlowQueryStatus {
    let result = Some(Payload::json(result).unwrap());
    SlowQueryStatus::Success { result, messages: vec![], files: BTreeMap::new() }
}

#[tokio::test]
async fn a_query_is_asked_for_until_its_result_is_there() {
    let desk = Desk::open().await;
    let id = desk.submit().await;
    assert_eq!((desk.done(&id).await, desk.done(&id).await.code()), (SlowQueryStatus::TryLater, 0));
    let session = desk.rig.session("bank.report", 1).await;
    let claim = take_one(&session).await;
    assert_eq!(claim.job().text("context"), Ok(Some(r#"{"lang":"de"}"#)));
    assert_eq!(desk.done(&id).await, SlowQueryStatus::TryLater);
    // Between two attempts it is not over either.
    put(claim, Verdict::Later { after_ms: 0 }).await;
    assert_eq!(desk.done(&id).await, SlowQueryStatus::TryLater);
    finish(take_one(&session).await, succeeded(&json!({ "sum": 3 }))).await;
    assert_eq!(desk.done(&id).await, success(&json!({ "sum": 3 })));
    assert_eq!(desk.done(&id).await.code(), 1);
    desk.rig.balanced();
}

#[tokio::test]
async fn a_failed_query_tells_its_messages_its_reason_and_what_there_is_of_a_result() {
    let desk = Desk::open().await;
    let session = desk.rig.session("bank.report", 1).await;
    for status in ["failed", "ignored", "unknown"] {
        let id = desk.submit().await;
        let fields = succeeded(&json!([1])).with("status", status).with("failed_reason", "no such account");
        finish(take_one(&session).await, fields.with("messages", json!([message()]).to_string())).await;
        let expected = SlowQueryStatus::Failed {
            messages: vec![message()],
            reason: "no such account".into(),
            result: Some(Payload::json(&json!([1])).unwrap()),
        };
        assert_eq!((desk.done(&id).await, expected.code()), (expected, 2), "{status}");
    }
}

#[tokio::test]
async fn files_are_named_by_their_logical_names_and_large_results_come_from_the_object_store() {
    let desk = Desk::open().await;
    let url = Url::new(format!("file://{}/objects", desk.rig.server.dir().display()));
    let objects = Objects::open(&ObjectsConfig { url, ..ObjectsConfig::default() }).unwrap();
    let queries = SlowQueries::new(desk.rig.store.clone(), Limits::default(), Some(objects.clone()));
    let id = desk.submit().await;
    let claim = take_one(&desk.rig.session("bank.report", 1).await).await;
    let job = claim.job().clone();
    let large = Payload::json(&"x".repeat(100_000)).unwrap();
    let object = objects.put_result(&job.id, 1, job.fence, large.bytes.clone()).await.unwrap();
    let file =
        File { object: objects.put_file(&job.id, 1, job.fence, "a/b.csv", b"1;2".to_vec()).await.unwrap(), bytes: 3 };
    let files = BTreeMap::from([("a/b.csv".to_owned(), file)]);
    let fields = Fields::new().with("status", "done").with("result_object", object).with("result_encoding", "json");
    finish(claim, fields.with("files", json!(files).to_string())).await;
    let expected = SlowQueryStatus::Success { result: Some(large), messages: vec![], files: files.clone() };
    assert_eq!(queries.done(&id).await.unwrap(), expected);
    let listed = queries.list(App::new("bank").unwrap(), None, HOUR).await.unwrap();
    assert_eq!(listed[0].files, files);
    // Without the store, or without the object, that is told: never a result that is none.
    assert!(matches!(desk.queries.done(&id).await, Err(SlowQueryError::Unreadable { .. })));
    objects.delete_of(&job.id).await.unwrap();
    assert!(matches!(queries.done(&id).await, Err(SlowQueryError::Objects(_))));
}

#[tokio::test]
async fn q1a_q1f_q2_asking_keeps_nothing_so_an_end_is_seen_by_the_very_next_question() {
    let desk = Desk::open().await;
    let session = desk.rig.session("bank.report", 1).await;
    let id = desk.submit().await;
    let before = desk.rig.dump();
    for _ in 0..3 {
        assert_eq!(desk.done(&id).await, SlowQueryStatus::TryLater);
    }
    assert_eq!(desk.rig.dump(), before, "a question writes nothing");
    finish(take_one(&session).await, succeeded(&json!({}))).await;
    let before = desk.rig.dump();
    for _ in 0..3 {
        assert_eq!(desk.done(&id).await, success(&json!({})), "and it does not flip back");
    }
    assert_eq!(desk.rig.dump(), before);
}

#[tokio::test]
async fn q1b_an_aborted_query_is_aborted_for_the_first_who_asks() {
    let desk = Desk::open().await;
    let id = desk.submit().await;
    assert_eq!(desk.abort(&id).await, SlowQueryStatus::Aborted);
    assert_eq!((desk.done(&id).await, desk.done(&id).await.code()), (SlowQueryStatus::Aborted, 3));
    assert_eq!(desk.abort(&id).await, SlowQueryStatus::Aborted, "and again");
    assert!(take(&desk.rig.session("bank.report", 1).await, 1).await.is_empty(), "nobody runs it");
}

#[tokio::test]
async fn q1c_an_end_without_result_and_files_is_an_end() {
    let desk = Desk::open().await;
    let session = desk.rig.session("bank.report", 1).await;
    let id = desk.submit().await;
    finish(take_one(&session).await, Fields::new().with("status", "failed")).await;
    assert_eq!(desk.done(&id).await, SlowQueryStatus::Failed { messages: vec![], reason: String::new(), result: None });
    let id = desk.submit().await;
    finish(take_one(&session).await, Fields::new().with("status", "done")).await;
    let nothing = SlowQueryStatus::Success { result: None, messages: vec![], files: BTreeMap::new() };
    assert_eq!(desk.done(&id).await, nothing);
}

#[tokio::test]
async fn q1d_messages_come_with_a_success_too() {
    let desk = Desk::open().await;
    let id = desk.submit().await;
    let fields = succeeded(&json!(1)).with("messages", json!([message()]).to_string());
    finish(take_one(&desk.rig.session("bank.report", 1).await).await, fields).await;
    let SlowQueryStatus::Success { messages, .. } = desk.done(&id).await else { panic!("it is done") };
    assert_eq!(messages, [message()]);
}

#[tokio::test]
async fn q1e_any_value_is_a_result() {
    let desk = Desk::open().await;
    let session = desk.rig.session("bank.report", 1).await;
    for result in [json!([1, 2]), json!("text"), json!(0), json!(false), json!(null), json!([]), json!({ "a": [] })] {
        let id = desk.submit().await;
        finish(take_one(&session).await, succeeded(&result)).await;
        assert_eq!(desk.done(&id).await, success(&result));
    }
    let id = desk.submit().await;
    let packed = Payload::msgpack(&json!(["ä", 1])).unwrap();
    let fields = Fields::new().with("status", "done").with("result", &packed.bytes).with("result_encoding", "msgpack");
    finish(take_one(&session).await, fields).await;
    let SlowQueryStatus::Success { result: Some(result), .. } = desk.done(&id).await else { panic!("it is done") };
    assert_eq!(result.read::<Value>().unwrap(), json!(["ä", 1]));
}

#[tokio::test]
async fn q3_the_case_of_an_operation_does_not_matter_to_anybody() {
    let desk = Desk::open().await;
    let session = desk.rig.session("bank.report", 4).await;
    for op in ["report", "REPORT", "Report"] {
        let id = desk.submit_to("bank", op).await;
        assert_eq!(desk.listed("bank", Some("rePORT"), HOUR).await, [(id.clone(), Status::Pending)]);
        let claim = take_one(&session).await;
        assert_eq!(crate::support::id(&claim), id);
        assert_eq!(claim.job().pool.handler().unwrap().1.as_str(), "report");
        finish(claim, succeeded(&json!(1))).await;
        desk.rig.state().lose(Piece::Job(&id));
    }
    // That of an application does.
    desk.submit_to("Bank", "report").await;
    assert!(take(&session, 4).await.is_empty() && desk.listed("bank", None, HOUR).await.is_empty());
}

#[tokio::test]
async fn q4_names_that_read_the_same_together_are_two_handlers() {
    let desk = Desk::open().await;
    let one = desk.submit_to("ab", "c").await;
    let other = desk.submit_to("a", "bc").await;
    assert_eq!(ids(&take(&desk.rig.session("a.bc", 4).await, 4).await), [other.as_str()]);
    assert_eq!(ids(&take(&desk.rig.session("ab.c", 4).await, 4).await), [one.as_str()]);
}

#[tokio::test]
async fn q5_a_worker_without_the_handler_leaves_the_query_to_one_that_has_it() {
    let desk = Desk::open().await;
    let id = desk.submit().await;
    let other = desk.rig.session("bank.transfer sql:*", 4).await;
    for _ in 0..3 {
        assert!(take(&other, 4).await.is_empty());
    }
    assert_eq!(desk.done(&id).await, SlowQueryStatus::TryLater, "it waits, and nothing has failed it");
    finish(take_one(&desk.rig.session("bank.*", 4).await).await, succeeded(&json!(1))).await;
    assert_eq!(desk.done(&id).await, success(&json!(1)));
}

#[tokio::test]
async fn q6_a_late_result_changes_nothing_after_an_abort() {
    let desk = Desk::open().await;
    let id = desk.submit().await;
    let slow = desk.rig.session("bank.report", 1).await;
    let claim = take_one(&slow).await;
    let pen = claim.pen();
    // Its worker is lost, it waits again, and is aborted while it does.
    let leadership = desk.rig.lead().await;
    let leader = SessionId::new("leader:1:a").unwrap();
    desk.rig.store.session_reclaim(slow.id().as_str(), 0, &leader, leadership.term()).await.unwrap().unwrap();
    assert_eq!(desk.abort(&id).await, SlowQueryStatus::Aborted);
    let before = desk.rig.dump();
    pen.mark(&Fields::new().with("progress", r#"{"done":1}"#)).await.unwrap();
    assert_eq!(finish(claim, succeeded(&json!("late"))).await, Finished::Stale);
    assert_eq!(desk.rig.dump(), before);
    assert_eq!(desk.done(&id).await, SlowQueryStatus::Aborted);
}

#[tokio::test]
async fn q6_an_abort_of_a_running_query_ends_as_its_worker_says_and_once() {
    let desk = Desk::open().await;
    let session = desk.rig.session("bank.report", 1).await;
    for (says, expected) in [("cancelled", SlowQueryStatus::Aborted), ("done", success(&json!(7)))] {
        let id = desk.submit().await;
        let claim = take_one(&session).await;
        assert_eq!(desk.abort(&id).await, SlowQueryStatus::TryLater, "its worker is asked");
        assert_eq!(desk.rig.state().asked_to_cancel(session.id().as_str()), std::slice::from_ref(&id));
        finish(claim, succeeded(&json!(7)).with("status", says)).await;
        assert_eq!(desk.done(&id).await, expected);
        assert_eq!(desk.abort(&id).await, expected, "too late changes nothing");
        assert_eq!(desk.done(&id).await, expected);
    }
}

#[tokio::test]
async fn q8_whatever_races_with_an_abort_there_is_one_end_and_it_stays() {
    let desk = Desk::open().await;
    let session = desk.rig.session("bank.report", 1).await;
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    let mut ends = [0; 4];
    for _ in 0..100 {
        let id = desk.submit().await;
        let (abort_after, take_after, run_for) = (random(1_500), random(1_500), random(1_500));
        let obedient = random(2) == 0;
        let us = |us: u64| tokio::time::sleep(Duration::from_micros(us));
        let aborting = async {
            us(abort_after).await;
            desk.abort(&id).await
        };
        let working = async {
            us(take_after).await;
            let claim = take(&session, 1).await.pop()?;
            us(run_for).await;
            // An obedient worker looks whether it was asked to stop, a deaf one does not.
            let asked = obedient && desk.rig.state().asked_to_cancel(session.id().as_str()).contains(&id);
            let status = if asked { "cancelled" } else { "done" };
            Some(finish(claim, succeeded(&json!(1)).with("status", status)).await)
        };
        let (aborted, worked) = tokio::join!(aborting, working);
        assert!(matches!(worked, None | Some(Finished::Ended)), "{worked:?}");
        let end = desk.done(&id).await;
        match (&aborted, &end) {
            (SlowQueryStatus::Aborted, SlowQueryStatus::Aborted) => {}
            (SlowQueryStatus::Success { .. }, SlowQueryStatus::Success { .. }) => {}
            (SlowQueryStatus::TryLater, SlowQueryStatus::Aborted | SlowQueryStatus::Success { .. }) => {}
            other => panic!("{other:?}"),
        }
        assert!(worked.is_some() || end == SlowQueryStatus::Aborted, "what nobody took is aborted");
        assert_eq!(desk.abort(&id).await, end);
        assert!(take(&session, 1).await.is_empty(), "nothing is left to run");
        ends[usize::from(end.code())] += 1;
    }
    assert!(ends[1] > 0 && ends[3] > 0, "both happen: {ends:?}");
    desk.rig.balanced();
}

#[tokio::test]
async fn q11_what_is_no_ticket_is_told_apart_from_one_that_nobody_knows() {
    let desk = Desk::open().await;
    for id in ["", "not a ticket", "a/b", "a*", "käse", &"x".repeat(129)] {
        assert!(matches!(desk.queries.done(id).await, Err(SlowQueryError::InvalidId(_))), "{id:?}");
        assert!(matches!(desk.queries.abort(id).await, Err(SlowQueryError::InvalidId(_))), "{id:?}");
    }
    let before = desk.rig.dump();
    for id in ["nobody", "0193b7c2-0000-7000-8000-000000000000"] {
        assert!(
            matches!(desk.queries.done(id).await, Err(SlowQueryError::NotFound(unknown)) if unknown.as_str() == id)
        );
        assert!(matches!(desk.queries.abort(id).await, Err(SlowQueryError::NotFound(_))));
    }
    assert_eq!(desk.rig.dump(), before);
    // A statement is no slow query, and is not aborted as one.
    let sql = NewJob::sql(User::new("ann").unwrap(), Database::Named("main".into()), "select 1");
    Producer::new(desk.rig.store.clone(), Limits::default()).enqueue(sql.clone()).await.unwrap();
    assert!(matches!(desk.queries.done(sql.id.as_str()).await, Err(SlowQueryError::NotFound(_))));
    assert!(matches!(desk.queries.abort(sql.id.as_str()).await, Err(SlowQueryError::NotFound(_))));
    assert_eq!(desk.rig.status(sql.id.as_str()), "pending");
}

#[tokio::test]
async fn q15_every_end_is_announced() {
    let desk = Desk::open().await;
    let mut events = Events::listen(&desk.rig.store, &["ann"]).await.unwrap();
    let session = desk.rig.session("bank.report", 1).await;
    for status in ["done", "failed", "cancelled"] {
        let id = desk.submit().await;
        if status == "cancelled" {
            desk.abort(&id).await;
        } else {
            finish(take_one(&session).await, Fields::new().with("status", status)).await;
        }
        let told = async {
            loop {
                let event = events.next().await.unwrap();
                if event.id == id && event.status == status {
                    return;
                }
            }
        };
        end_of("it is told", told).await;
    }
}

#[tokio::test]
async fn q16_a_query_of_a_lost_worker_is_run_by_another() {
    let desk = Desk::open().await;
    let id = desk.submit().await;
    let lost = desk.rig.session("bank.report", 1).await;
    let _claim = take_one(&lost).await;
    let leadership = desk.rig.lead().await;
    let leader = SessionId::new("leader:1:a").unwrap();
    desk.rig.store.session_reclaim(lost.id().as_str(), 0, &leader, leadership.term()).await.unwrap().unwrap();
    assert_eq!(desk.done(&id).await, SlowQueryStatus::TryLater);
    finish(take_one(&desk.rig.session("bank.report", 1).await).await, succeeded(&json!(1))).await;
    assert_eq!(desk.done(&id).await, success(&json!(1)));
    desk.rig.balanced();
}

#[tokio::test]
async fn q18_a_query_starts_soon_behind_another_handler_s_thousand() {
    let desk = Desk::open().await;
    let producer = Producer::new(desk.rig.store.clone(), Limits::default());
    let (user, app) = (User::new("bulk").unwrap(), App::new("bank").unwrap());
    let bulk = || NewJob::task(user.clone(), app.clone(), Op::new("import").unwrap(), Payload::json(&1).unwrap());
    assert!(producer.enqueue_many((0..1_000).map(|_| bulk()).collect()).await.iter().all(Result::is_ok));
    let id = desk.submit().await;
    let session = desk.rig.session("bank.*", 100).await;
    let first = take(&session, 2).await;
    assert!(ids(&first).contains(&id.as_str()), "handlers take turns");
}

#[tokio::test]
async fn q38_what_is_too_large_is_refused_when_it_is_submitted() {
    let desk = Desk::open().await;
    let input = Payload::json(&"x".repeat(300_000)).unwrap();
    let (user, app, op) = (User::new("ann").unwrap(), App::new("bank").unwrap(), Op::new("report").unwrap());
    let before = desk.rig.dump();
    let refused = desk.queries.submit(user, app, op, None, input).await;
    assert!(matches!(refused, Err(EnqueueError::TooLarge { limit: 262_144, .. })), "{refused:?}");
    assert_eq!(desk.rig.dump(), before);
}

#[tokio::test]
async fn a_list_has_the_queries_of_an_application_wherever_they_stand() {
    let desk = Desk::open().await;
    let session = desk.rig.session("bank.report", 8).await;
    let done = desk.submit().await;
    finish(take_one(&session).await, succeeded(&json!(1))).await;
    let old = desk.submit().await;
    finish(take_one(&session).await, succeeded(&json!(1))).await;
    let aborted = desk.submit().await;
    desk.abort(&aborted).await;
    let running = desk.submit().await;
    let _claim = take_one(&session).await;
    let waiting = desk.submit().await;
    let other_op = desk.submit_to("bank", "transfer").await;
    desk.submit_to("banking", "report").await;
    desk.rig.submit("ann", "sql", "h");
    // An hour ago, by the clock of Redis.
    let hour_ago = 3_600_000;
    let now_ms = queue_core::inspect::Inspect::new(desk.rig.store.clone()).now_ms().await.unwrap();
    let then = humantime::format_rfc3339_millis(std::time::UNIX_EPOCH + Duration::from_millis(now_ms - hour_ago));
    desk.rig.state().set_field(&old, "created_at", then.to_string());

    let all = [
        (running, Status::Running),
        (waiting, Status::Pending),
        (aborted, Status::Cancelled),
        (done.clone(), Status::Done),
    ];
    assert_eq!(desk.listed("bank", Some("Report"), HOUR / 2).await, all);
    assert_eq!(desk.listed("bank", Some("transfer"), HOUR).await, [(other_op.clone(), Status::Pending)]);
    assert_eq!(desk.listed("bank", None, HOUR * 2).await.len(), 6);
    assert!(desk.listed("bank", Some("nothing"), HOUR).await.is_empty());
    assert!(desk.listed("Bank", None, HOUR).await.is_empty());

    let listed = desk.queries.list(App::new("bank").unwrap(), None, HOUR).await.unwrap();
    let one = listed.iter().find(|query| query.id == done).unwrap();
    assert_eq!((one.app.as_str(), one.op.as_str()), ("bank", "report"));
    assert!(one.done_ms >= one.requested_ms && one.requested_ms.unwrap().abs_diff(now_ms) < 60_000, "{one:?}");
    assert!(listed.iter().filter(|query| !query.status.is_final()).all(|query| query.done_ms.is_none()));
}
