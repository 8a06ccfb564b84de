//! A job in the hands of whoever submitted it.

use std::time::Duration;

use queue_core::calls::{Fields, Finished};
use queue_core::cancel::Cancelled;
use queue_core::config::{Limits, ObjectsConfig, Url};
use queue_core::handle::{JobError, JobHandle};
use queue_core::ids::{App, JobId, Op, User};
use queue_core::model::Status;
use queue_core::model::task::{File, Message, Payload, Progress};
use queue_core::objects::Objects;
use queue_core::producer::{NewJob, Producer};
use queue_core::session::Claim;
use serde_json::{Value, json};
use testkit::{Proxy, end_of, eventually};

use crate::support::*;

async fn submitted(rig: &Rig, id: &str) -> JobHandle {
    let input = Payload::json(&id).unwrap();
    let job = NewJob::task(User::new("ann").unwrap(), App::new("bank").unwrap(), Op::new("pay").unwrap(), input);
    let producer = Producer::new(rig.store.clone(), Limits::default());
    producer.submit(NewJob { id: JobId::new(id).unwrap(), ..job }).await.unwrap()
}

async fn finish(claim: Claim, fields: Fields) -> Finished {
    claim.finish(final_verdict(), Duration::ZERO, fields, false).await.unwrap()
}

fn done(result: &Value) -> Fields {
    Fields::new().with("status", "done").with("result", result.to_string()).with("result_encoding", "json")
}

#[tokio::test]
async fn a_job_is_waited_for_and_hands_over_all_that_it_told() {
    let rig = Rig::start().await;
    let handle = submitted(&rig, "a").await;
    assert_eq!(handle.status().await.unwrap(), Status::Pending);
    assert!(matches!(handle.payload().await, Err(JobError::NotOver(Status::Pending))));
    let waiting = tokio::spawn({
        let handle = handle.clone();
        async move { handle.wait(None).await }
    });
    let session = rig.session("bank.pay", 1).await;
    let claim = take_one(&session).await;
    let progress = Progress { done: 1, total: Some(2), note: None };
    claim
        .pen()
        .mark(&Fields::new().with("progress", json!(progress).to_string()).with("log", "one\ntwo"))
        .await
        .unwrap();
    assert_eq!(handle.status().await.unwrap(), Status::Running);
    assert_eq!(handle.progress().await.unwrap(), Some(progress));
    assert_eq!(handle.log().await.unwrap(), ["one", "two"]);
    let message = Message { msgid: 7, errcode: "odd".into(), ..Message::default() };
    finish(claim, done(&json!([1, "x"])).with("messages", json!([message]).to_string())).await;
    let view = waiting.await.unwrap().unwrap();
    assert_eq!(view.stand(), Status::Done);
    assert_eq!(handle.result::<(u8, String)>().await.unwrap(), (1, "x".into()));
    assert_eq!(handle.messages().await.unwrap(), [message]);
    assert!(matches!(handle.result::<String>().await, Err(JobError::Unreadable(_))));
    // Who asks later is answered at once.
    assert_eq!(handle.wait(Some(Duration::ZERO)).await.unwrap().stand(), Status::Done);
}

#[tokio::test]
async fn each_other_end_is_an_error_of_its_own() {
    let rig = Rig::start().await;
    let session = rig.session("bank.pay", 8).await;
    for status in ["failed", "ignored", "unknown"] {
        let handle = submitted(&rig, status).await;
        let fields = Fields::new().with("status", status).with("failed_reason", "no money");
        finish(take_one(&session).await, fields.with("messages", r#"[{"msgid":3,"errcode":"poor"}]"#)).await;
        let error = handle.payload().await.unwrap_err();
        let JobError::Failed { status: found, reason, messages } = &error else { panic!("{error}") };
        assert_eq!((found.as_str(), reason.as_str(), messages[0].errcode.as_str()), (status, "no money", "poor"));
    }
    let handle = submitted(&rig, "called-off").await;
    assert_eq!(handle.cancel().await.unwrap(), Cancelled::AtOnce);
    assert_eq!(handle.cancel().await.unwrap(), Cancelled::TooLate("cancelled".into()));
    assert!(matches!(handle.payload().await, Err(JobError::Cancelled)));

    let nobody = JobHandle::new(rig.store.clone(), JobId::new("nobody").unwrap());
    for error in [
        nobody.wait(None).await.unwrap_err(),
        nobody.status().await.unwrap_err(),
        nobody.payload().await.unwrap_err(),
        nobody.cancel().await.unwrap_err(),
    ] {
        assert!(matches!(error, JobError::NotFound), "{error}");
    }

    let handle = submitted(&rig, "open").await;
    assert!(matches!(handle.wait(Some(Duration::from_millis(50))).await, Err(JobError::NotOver(Status::Pending))));
    assert_eq!(finish(take_one(&session).await, Fields::new().with("status", "done")).await, Finished::Ended);
    assert!(matches!(handle.payload().await, Err(JobError::NoResult)));
    // What others have made of the fields is unreadable, and no more than that.
    for (field, value) in
        [("result_encoding", "yaml"), ("result", "{"), ("messages", "{"), ("files", "7"), ("log", "\u{1}")]
    {
        rig.state().set(Piece::Job("open"), &[("result", "1"), (field, value)]);
        assert!(matches!(handle.result::<Value>().await, Err(JobError::Unreadable(_))), "{field}");
    }
    assert!(handle.messages().await.unwrap().is_empty() && handle.files().await.unwrap().is_empty());
    rig.state().set(Piece::Job("open"), &[("result", "x".repeat(70_000).as_str()), ("result_encoding", "json")]);
    assert!(matches!(handle.payload().await, Err(JobError::Unreadable(_))));
}

#[tokio::test]
async fn a_large_result_and_files_come_from_the_object_store() {
    let rig = Rig::start().await;
    let url = Url::new(format!("file://{}/objects", rig.server.dir().display()));
    let objects = Objects::open(&ObjectsConfig { url, ..ObjectsConfig::default() }).unwrap();
    let blind = submitted(&rig, "a").await;
    let handle = blind.clone().with_objects(objects.clone());
    let session = rig.session("bank.pay", 1).await;
    let claim = take_one(&session).await;
    let (id, fence) = (claim.job().id.clone(), claim.job().fence);
    let large = Payload::msgpack(&"x".repeat(200_000)).unwrap();
    let object = objects.put_result(&id, 1, fence, large.bytes.clone()).await.unwrap();
    let file = File { object: objects.put_file(&id, 1, fence, "a/b", b"rows".to_vec()).await.unwrap(), bytes: 4 };
    let fields = Fields::new().with("status", "done").with("result_object", object).with("result_encoding", "msgpack");
    finish(claim, fields.with("files", json!({ "a/b": file }).to_string())).await;
    assert_eq!(handle.payload().await.unwrap(), large);
    assert_eq!(handle.file(&handle.files().await.unwrap()["a/b"]).await.unwrap(), b"rows");
    assert!(matches!(blind.payload().await, Err(JobError::Unreadable(_))));
    objects.delete_of(&id).await.unwrap();
    assert!(matches!(handle.payload().await, Err(JobError::Objects(_))));
}

#[tokio::test]
async fn waiting_survives_a_lost_connection_and_lost_events() {
    let rig = Rig::start().await;
    let proxy = Proxy::start(rig.server.addr());
    submitted(&rig, "a").await;
    let handle = JobHandle::new(rig.connect_through(&proxy).await, JobId::new("a").unwrap());
    let waiting = tokio::spawn(async move { handle.wait(None).await });
    eventually("somebody to listen", async || (rig.state().listeners("ann") > 0).then_some(())).await;
    // It ends while the listener is deaf: nobody tells it.
    proxy.drop_replies(true);
    let session = rig.session("bank.pay", 1).await;
    finish(take_one(&session).await, done(&json!(1))).await;
    proxy.drop_replies(false);
    proxy.cut();
    let view = end_of("it looks again", waiting).await.unwrap().unwrap();
    assert_eq!(view.stand(), Status::Done);
}

#[tokio::test]
async fn nobody_who_waits_asks_all_the_time() {
    let rig = Rig::start().await;
    let handle = submitted(&rig, "a").await;
    rig.redis(&["CONFIG", "RESETSTAT"]);
    assert!(handle.wait(Some(Duration::from_secs(3))).await.is_err());
    let looks = function_calls(&rig);
    assert!((3..=7).contains(&looks), "{looks} looks in 3 s");
}
