//! Hashes that say they are what only our own scripts make: batches, parts of them, flows. Nothing that stands in the open layout is
//! believed of that: no script loops or fails for it, nobody's books are wrong after it, and whoever stands beside it is served.

use std::time::Duration;

use queue_core::batch::{BatchError, Batches, NewBatch};
use queue_core::calls::{Enqueued, Finished, TakeReply, Verdict};
use queue_core::cancel::{Cancelled, Canceller};
use queue_core::config::Limits;
use queue_core::flow::{FlowStatus, Flows, FlowsError, LaunchOptions, Launched, StepStatus};
use queue_core::ids::{App, JobId, Op, User};
use queue_core::model::Status;
use queue_core::model::batch::{Part, Row, RowEnd, RowResult};
use queue_core::model::flow::{Flow, Step};
use queue_core::reconcile;
use queue_core::session::{Claim, Session};

use crate::flow;
use crate::support::*;

const KEEP: Duration = Duration::from_secs(7_200);

fn job_id(id: &str) -> JobId {
    JobId::new(id).unwrap()
}

/// Plain commands of somebody who may write the open layout alone.
fn submit(rig: &Rig, user: &str, id: &str, fields: &[(&str, &str)]) {
    edit(rig, id, &[("user", user), ("status", "pending")]);
    edit(rig, id, fields);
    push(rig, user, id);
}

fn edit(rig: &Rig, id: &str, fields: &[(&str, &str)]) {
    let (key, mut args) = (job_key(id), vec!["HSET"]);
    args.push(&key);
    args.extend(fields.iter().flat_map(|(name, value)| [*name, *value]));
    rig.redis(&args);
}

fn push(rig: &Rig, user: &str, id: &str) {
    rig.redis(&["LPUSH", &queue_key(user), id]);
    rig.redis(&["SADD", "batch:indexes:queue", user]);
}

fn batches(rig: &Rig) -> Batches {
    Batches::new(rig.store.clone(), Limits::default())
}

/// A batch of ann's for bank.post, of as many rows as said.
async fn real(rig: &Rig, id: &str, rows: u64) -> Batches {
    let (app, op) = (App::new("bank").unwrap(), Op::new("post").unwrap());
    let new = NewBatch { id: job_id(id), ..NewBatch::handler(User::new("ann").unwrap(), app, op) };
    let rows = (1..=rows).map(|line| Row { line, input: b"1".to_vec() }).collect::<Vec<_>>();
    batches(rig).submit(new, rows).await.unwrap();
    batches(rig)
}

/// Has the leader look at everything as it does for ever, and the keys compared.
async fn look(rig: &Rig) {
    let leadership = rig.lead().await;
    for _ in 0..2 {
        scan_index(&leadership).await.unwrap();
        leadership.scan_queues().await.unwrap().unwrap();
        leadership.upkeep(KEEP).await.unwrap().unwrap();
        leadership.clear_wip().await.unwrap().unwrap();
        leadership.sweep(KEEP).await.unwrap().unwrap();
    }
    reconcile::repair(&rig.store, KEEP).await.unwrap();
}

/// Works off all there is, as workers would. The ids of what was run, in their order.
async fn work_off(session: &Session) -> Vec<String> {
    let mut ran = Vec::new();
    loop {
        let claims = take(session, 8).await;
        if claims.is_empty() {
            ran.sort();
            return ran;
        }
        for claim in claims {
            ran.push(id(&claim).to_owned());
            finish(claim).await;
        }
    }
}

async fn finish(claim: Claim) {
    match claim.job().text("part").unwrap().map(|part| part.parse().unwrap()) {
        Some(Part::Rows(chunk)) => {
            let ends = vec![Some(RowResult::of(RowEnd::Done)); chunk.count];
            let fields = queue_core::batch::work::end_fields(&ends);
            claim.finish(Verdict::Part { keep_ms: KEEP_MS }, Duration::ZERO, fields, false).await.unwrap();
        }
        Some(Part::Files(_)) => panic!("no row wrote a file"),
        Some(Part::Done(_)) | None => _ = end(claim, "done").await,
    }
}

/// The hash has failed with this reason, which stands in the rejected list, and will expire.
#[track_caller]
fn set_aside(rig: &Rig, id: &str, reason: &str) {
    assert!(rig.rejected().iter().any(|entry| entry.0 == id && entry.1 == reason), "{id}: {:?}", rig.rejected());
    assert_eq!((rig.status(id).as_str(), rig.hash(id)["failed_reason"].as_str()), ("failed", reason), "{id}");
    assert!(rig.redis(&["PTTL", &job_key(id)]).int() > 0, "{id} stays for ever");
}

const NO_BATCH: &str = "it is no batch that was handed over as one";
const NO_PART: &str = "it is no part of a batch that is known";
const NO_FLOW: &str = "it is no flow that was launched as one";

#[tokio::test]
async fn what_says_that_it_is_a_batch_a_part_or_a_flow_is_set_aside_and_sizes_no_loop() {
    let rig = Rig::start().await;
    let session = rig.session("sql:* db:* bank.post", 8).await;
    let huge = "99999999999999999999";
    let beside = |id: &str| format!("beside-{}", id.replace(':', "-"));
    type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a str);
    let cases: [Case<'_>; 9] = [
        ("loads", &[("kind", "batch"), ("cursor", "0 0 0 1"), ("loads", "1000000000000")], NO_BATCH),
        ("cursor", &[("kind", "batch"), ("cursor", &format!("{huge} 0 0 1")), ("loads", "1e3")], NO_BATCH),
        ("bb", &[("kind", "batch"), ("app", "bank"), ("op", "post")], NO_BATCH),
        ("rows", &[("kind", "part"), ("part", "rows bb 0.0 0 4000000000")], NO_PART),
        ("bb:0.0:0", &[("kind", "part"), ("part", "rows bb 0.0 0 4000000000"), ("unclean", "19")], NO_PART),
        ("files", &[("kind", "part"), ("part", "files bb"), ("app", "bank"), ("op", "post")], NO_PART),
        ("bare", &[("part", "done bb"), ("query", "select 1")], NO_PART),
        ("odd", &[("kind", "odd"), ("part", "rows bb 0.0 0 4000000000")], NO_PART),
        ("flow", &[("kind", "flow"), ("status", "running"), ("definition", "{}")], NO_FLOW),
    ];
    for (id, fields, _) in cases {
        submit(&rig, "eve", id, &[&[("database", "shop")], fields].concat());
        submit(&rig, "ann", &beside(id), &[("database", "shop")]);
    }
    look(&rig).await;
    let wanted: Vec<String> = cases.iter().map(|(id, ..)| beside(id)).collect();
    let mut ran = work_off(&session).await;
    ran.sort_by_key(|id| wanted.iter().position(|wanted| wanted == id));
    assert_eq!(ran, wanted);
    look(&rig).await;
    for (id, _, reason) in cases {
        set_aside(&rig, id, reason);
    }
    rig.balanced();
    // Nor do those who ask for them by name find any.
    let (batches, flows) = (batches(&rig), Flows::new(rig.store.clone()));
    for (id, ..) in cases {
        assert!(matches!(batches.abort(&job_id(id)).await, Err(BatchError::NotFound(_))), "{id}");
        assert!(matches!(batches.release(&job_id(id)).await, Err(BatchError::NotFound(_))), "{id}");
        assert!(matches!(flows.stop(&job_id(id)).await, Err(FlowsError::NotFound(_))), "{id}");
        assert!(matches!(flows.abandon(&job_id(id)).await, Err(FlowsError::NotFound(_))), "{id}");
        assert!(matches!(flows.steps(&job_id(id)).await, Err(FlowsError::NotFound(_))), "{id}");
    }
}

#[tokio::test]
async fn forged_batches_leave_no_pool_that_counts_what_does_not_run() {
    let rig = Rig::start().await;
    let session = rig.session("db:shop", 4).await;
    for number in 0..6 {
        let counts =
            [("kind", "batch"), ("cursor", "0 0 0 1"), ("loads", "1"), ("done", "x"), ("failed", "x"), ("left", "1")];
        submit(&rig, &format!("eve{number}"), &format!("b{number}"), &[&counts[..], &[("database", "shop")]].concat());
    }
    for number in 0..6 {
        submit(&rig, "ann", &format!("a{number}"), &[("database", "shop")]);
    }
    look(&rig).await;
    assert_eq!(work_off(&session).await.len(), 6);
    assert_eq!(rig.redis(&["HGET", "drayman:pool:db:shop", "running"]).text(), "0");
    rig.balanced();
}

#[tokio::test]
async fn of_many_that_are_cancelled_each_has_its_own_answer_whatever_it_says_that_it_is() {
    let rig = Rig::start().await;
    submit(&rig, "mia", "before", &[("host", "h")]);
    edit(&rig, "flow", &[("user", "mia"), ("kind", "flow"), ("status", "running")]);
    edit(&rig, "batch", &[("user", "mia"), ("kind", "batch"), ("status", "running"), ("left", "x")]);
    edit(&rig, "part", &[("user", "mia"), ("kind", "part"), ("part", "rows theirs 0.0 0 1")]);
    rig.redis(&["SET", &job_key("text"), "x"]);
    submit(&rig, "mia", "behind", &[("host", "h")]);
    let theirs = real(&rig, "theirs", 3).await;
    let ids = ["before", "flow", "batch", "part", "text", "gone", "behind"].map(job_id);
    let canceller = Canceller::new(rig.store.clone(), KEEP);
    let (cancelled, missing) = (Cancelled::AtOnce, Cancelled::NotFound);
    let expected =
        [&cancelled, &cancelled, &cancelled, &cancelled, &missing, &missing, &cancelled].map(Cancelled::clone);
    assert_eq!(canceller.cancel_many(&ids).await.unwrap(), expected);
    for id in ["before", "flow", "batch", "part", "behind"] {
        assert_eq!(rig.status(id), "cancelled", "{id}");
    }
    assert_eq!(theirs.view(&job_id("theirs")).await.unwrap().status, Status::Pending);
    look(&rig).await;
    rig.balanced();
}

/// Fields of batches, of parts and of flows that scripts have written, spoiled one after the other while they run.
#[tokio::test]
async fn a_batch_whose_records_others_rewrite_ends_with_its_own_counts() {
    for value in ["-1", "0", "1.5", "1e18", "99999999999999999999", "", "text", "nan"] {
        let rig = Rig::start().await;
        let session = rig.session("bank.post", 8).await;
        let theirs = real(&rig, "b", 25).await;
        let spoil = |id: &str| {
            let fields =
                ["rows", "left", "done", "failed", "skipped", "aborted", "bytes", "cursor", "loads", "pace", "keep"];
            edit(&rig, id, &fields.map(|field| (field, value)));
            edit(
                &rig,
                id,
                &[("part", &format!("rows b 0.0 0 {value}")), ("partial", value), ("partial_counts", value)],
            );
        };
        let claims = take(&session, 1).await;
        spoil("b");
        spoil("b:0.0:0");
        // Given back, it says again what it is: what it was dealt as.
        for claim in claims {
            put(claim, Verdict::Back).await;
        }
        spoil("b:0.0:0");
        let ran = work_off(&session).await;
        assert_eq!(ran, ["b:0.0:0", "b:0.0:10", "b:0.0:20", "b:done"], "{value}");
        let view = theirs.view(&job_id("b")).await.unwrap();
        assert_eq!((view.status, view.counts.done), (Status::Done, 25), "{value}");
        assert!(rig.redis(&["PTTL", &job_key("b")]).int() > 0);
        rig.balanced();
    }
}

#[tokio::test]
async fn nobody_takes_part_in_anothers_batch_or_flow_by_its_ids() {
    let rig = Rig::start().await;
    let session = rig.session("bank.post etl.step", 8).await;
    let theirs = real(&rig, "b", 25).await;
    let flow = Flow::builder("nightly").step(Step::task("one", "etl", "step")).step(Step::task("two", "etl", "step"));
    let (flow, flows) = (flow.build().unwrap(), Flows::new(rig.store.clone()));
    let options = LaunchOptions { id: Some(job_id("f")), ..LaunchOptions::default() };
    let launched = flows.launch(&flow, &User::new("ann").unwrap(), &Default::default(), options).await.unwrap();
    assert!(matches!(launched, Launched::New { .. }));
    let task = [("kind", "task"), ("app", "bank"), ("op", "post")];
    // Where a chunk and a step are to stand; and what is theirs, in one's own queue.
    for id in ["b:0.0:10", "b:0.0:11", "b:files", "b:done", "f:two", "f:three"] {
        submit(&rig, "eve", id, &task);
    }
    rig.redis(&["HDEL", &job_key("b"), "user"]);
    for id in ["b", "f", "f:one"] {
        push(&rig, "eve", id);
    }
    look(&rig).await;
    assert_eq!(work_off(&session).await, ["b:0.0:0", "b:0.0:10", "b:0.0:20", "b:done", "f:one", "f:two"]);
    assert_eq!(flows.view(&job_id("f")).await.unwrap().user, "ann");
    edit(&rig, "b", &[("user", "ann")]);
    assert_eq!(theirs.view(&job_id("b")).await.unwrap().counts.done, 25);
    for id in ["b:0.0:10", "b", "f:one"] {
        assert_ne!(rig.status_or_none(id).as_deref(), Some("failed"), "{id}");
    }
    rig.balanced();
}

#[tokio::test]
async fn a_hash_that_claims_to_be_a_step_of_anothers_flow_moves_nothing() {
    let rig = Rig::start().await;
    let flows = Flows::new(rig.store.clone());
    let session = rig.session("etl.* sql:*", 8).await;
    // Somebody has taken the id of the second step.
    rig.submit("eve", "f1:two", "h");
    flow::launch(&flows, &flow::flow(&["one", "two"]), "f1").await.unwrap();
    for id in ["x:y", "f1:onex", "eve"] {
        rig.submit("eve", id, "h");
        edit(&rig, id, &[("flow", "f1"), ("flow_step", "1")]);
    }
    rig.notice(&["eve"]).await;
    // A flow in a queue is nothing to run, and nothing to fail.
    rig.state().foreign().push_first("ann", "f1");
    rig.notice(&["ann"]).await;
    let mut ours = Vec::new();
    loop {
        let claims = take(&session, 8).await;
        if claims.is_empty() {
            break;
        }
        for claim in claims {
            match id(&claim) {
                "f1:one" => ours.push(claim),
                _ => assert_eq!(end(claim, "done").await, Finished::Ended),
            }
        }
    }
    assert_eq!(flow::view(&flows, "f1").await.status, FlowStatus::Running);
    let wanted = [("one".to_owned(), StepStatus::Running), ("two".to_owned(), StepStatus::Waiting)];
    assert_eq!(flow::steps(&flows, "f1").await, wanted.into());
    flow::finish(ours.remove(0), false).await;
    assert_eq!(flow::work(&session, &[]).await, ["two"]);
    assert_eq!(flow::view(&flows, "f1").await.status, FlowStatus::Done);
    rig.balanced();
}

#[tokio::test]
async fn what_a_take_hands_out_and_its_worker_cannot_read_is_set_aside_and_the_worker_goes_on() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 8).await;
    rig.submit("ann", "good", "h");
    rig.notice(&["ann"]).await;
    let reply = rig.store.take(session.id(), "sql:*", 1, 1, 8, "jobs", &[]).await.unwrap();
    assert!(matches!(reply, TakeReply::Taken { jobs, .. } if jobs.len() == 1));
    // In the same take, one with an id that no worker knows how to read.
    let odd = "o d d";
    let claim = rig.redis(&["HGET", "drayman:claims", "good"]).text().replace("ann", "eve");
    rig.redis(&["HSET", "drayman:claims", odd, &claim]);
    rig.redis(&["HSET", &format!("drayman:work:{}", session.id()), odd, "1"]);
    edit(&rig, odd, &[("user", "eve"), ("status", "running")]);
    for (key, field) in [("drayman:pool:sql:h", "running"), ("drayman:busy:sql:h", "eve"), ("drayman:active", "eve")] {
        rig.redis(&["HINCRBY", key, field, "1"]);
    }
    rig.redis(&["LPUSH", "batch:wip:user:eve", odd]);
    rig.redis(&["SADD", "batch:wip:users", "eve"]);
    rig.balanced();
    assert_eq!(ids(&take(&session, 8).await), ["good"]);
    let rejected = rig.rejected();
    assert!(rejected.len() == 1 && rejected[0].0 == odd && rejected[0].1.contains("a worker can't read it"));
    assert_eq!(rig.status(odd), "failed");
    rig.balanced();
    rig.submit("ann", "next", "h2");
    rig.notice(&["ann"]).await;
    assert_eq!(work_off(&session).await, ["next"]);
}

/// What parts of batches and steps of flows are called, nobody else's job is: else it would be lost once there is such a batch.
#[tokio::test]
async fn no_job_is_where_a_part_or_a_step_is_to_be_and_none_is_lost_for_one() {
    let rig = Rig::start().await;
    let session = rig.session("sql:* bank.post etl.step", 8).await;
    let ids = ["b:0.0:0", "b:files", "b:done"];
    for id in ids {
        let refused = rig.store.enqueue(&most(64, 16_384), &[submission("eve", id, "h")]).await.unwrap().remove(0);
        assert!(matches!(&refused, Enqueued::Refused(why) if why.contains("parts of batches")), "{id}: {refused:?}");
        assert_eq!(rig.status_or_none(id), None);
        rig.submit("eve", id, "h");
    }
    rig.notice(&["eve"]).await;
    assert!(take(&session, 8).await.is_empty());
    for id in ids {
        assert_eq!(rig.status(id), "failed");
        assert!(rig.hash(id)["failed_reason"].contains("parts of batches"), "{id}");
    }
    // A step's id is anybody's until there is such a flow.
    rig.store.enqueue(&most(64, 16_384), &[submission("eve", "f:two", "h")]).await.unwrap();
    let flow = Flow::builder("f").step(Step::task("one", "etl", "step")).step(Step::task("two", "etl", "step"));
    let options = LaunchOptions { id: Some(JobId::new("f").unwrap()), ..LaunchOptions::default() };
    let launched = Flows::new(rig.store.clone())
        .launch(&flow.build().unwrap(), &User::new("ann").unwrap(), &Default::default(), options)
        .await;
    let error = launched.expect_err("a job has the id of a step").to_string();
    assert!(error.contains("there is a job f:two"), "{error}");
    assert_eq!(work_off(&session).await, ["f:two"]);
    rig.balanced();
}
