//! Flows without a worker: which step is queued when, how a flow ends, what a launch goes on from, and that nothing of it is left.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;
use queue_core::calls::{Budget, Fields, Finished, Verdict};
use queue_core::cancel::{Cancelled, Canceller};
use queue_core::flow::{FlowFilter, FlowStatus, FlowView, Flows, FlowsError, LaunchOptions, Launched, StepStatus};
use queue_core::ids::{JobId, SessionId, User};
use queue_core::model::Status;
use queue_core::model::flow::{Flow, On, Param, ParamKind, Step};
use queue_core::reconcile::{self, Kind};
use queue_core::retry::{Retried, Retrier};
use queue_core::session::{Claim, Session};
use serde_json::{Map, Value, json};

use crate::support::*;

const POOL: &str = "etl.step";
/// Where the steps wait.
const QUEUE: Piece<'_> = Piece::Tasks("ann", POOL, Priority::Normal);
const KEEP: Duration = Duration::from_secs(7_200);

fn user(name: &str) -> User {
    User::new(name).unwrap()
}

fn job_id(id: &str) -> JobId {
    JobId::new(id).unwrap()
}

/// Steps as `name`, `name < before, before`, and `name < before ! failed`.
pub fn flow(steps: &[&str]) -> Flow {
    let mut builder = Flow::builder("nightly").any_params();
    for text in steps {
        let (text, on) = match text.split_once(" ! ") {
            Some((text, "failed")) => (text, On::Failed),
            Some((text, _)) => (text, On::Ended),
            None => (*text, On::Done),
        };
        let (name, after) = match text.split_once(" <") {
            Some((name, after)) => (name, Some(after.split(',').map(str::trim).filter(|name| !name.is_empty()))),
            None => (text, None),
        };
        let step = Step::task(name, "etl", "step").map(|step| step.on(on));
        builder = builder.step(match after {
            Some(after) => step.and_then(|step| step.after(&after.collect::<Vec<_>>())),
            None => step,
        });
    }
    builder.build().unwrap()
}

fn given(value: Value) -> Map<String, Value> {
    value.as_object().cloned().unwrap()
}

fn named(id: &str) -> LaunchOptions {
    LaunchOptions { id: Some(job_id(id)), ..LaunchOptions::default() }
}

pub async fn launch(flows: &Flows, flow: &Flow, id: &str) -> Result<Launched, FlowsError> {
    flows.launch(flow, &user("ann"), &Map::new(), named(id)).await
}

pub async fn view(flows: &Flows, id: &str) -> FlowView {
    flows.view(&job_id(id)).await.unwrap()
}

pub async fn steps(flows: &Flows, id: &str) -> BTreeMap<String, StepStatus> {
    flows.steps(&job_id(id)).await.unwrap().into_iter().map(|step| (step.name, step.status)).collect()
}

fn step_of(claim: &Claim) -> String {
    id(claim).split_once(':').expect("a step").1.to_owned()
}

/// Ends steps until nothing is left to take: those of these names fail. The steps in the order in which they were taken.
pub async fn work(session: &Session, failing: &[&str]) -> Vec<String> {
    let mut taken = Vec::new();
    loop {
        let claims = take(session, 8).await;
        if claims.is_empty() {
            return taken;
        }
        for claim in claims {
            let name = step_of(&claim);
            let fails = failing.contains(&name.as_str());
            taken.push(name);
            finish(claim, fails).await;
        }
    }
}

pub async fn finish(claim: Claim, fails: bool) {
    let fields = match fails {
        true => Fields::new().with("status", "failed").with("failed_reason", "no disk"),
        false => Fields::new().with("status", "done"),
    };
    assert_eq!(claim.finish(final_verdict(), Duration::ZERO, fields, false).await.unwrap(), Finished::Ended);
}

#[tokio::test]
async fn each_step_is_queued_when_the_one_before_it_is_done_and_the_flow_ends_with_the_last() {
    let rig = Rig::start().await;
    let flows = Flows::new(rig.store.clone());
    let session = rig.session(POOL, 8).await;
    let launched = launch(&flows, &flow(&["extract", "transform", "load"]), "f1").await.unwrap();
    assert_eq!(launched, Launched::New { id: job_id("f1"), goes_on_from: None });
    for name in ["extract", "transform", "load"] {
        assert_eq!(view(&flows, "f1").await.status, FlowStatus::Running);
        rig.balanced();
        let mut claims = take(&session, 8).await;
        assert_eq!(ids(&claims), [format!("f1:{name}")]);
        assert_eq!(steps(&flows, "f1").await[name], StepStatus::Running);
        finish(claims.remove(0), false).await;
    }
    let done = view(&flows, "f1").await;
    assert_eq!((done.status, done.flow.as_str(), done.user.as_str()), (FlowStatus::Done, "nightly", "ann"));
    assert!(done.ended_at.is_some() && done.reason.is_none());
    for step in flows.steps(&job_id("f1")).await.unwrap() {
        assert_eq!(step.status, StepStatus::Done);
        assert!(step.queued_at.is_some() && step.ended_at.is_some() && step.error.is_none(), "{step:?}");
    }
    // The same launch again changes nothing.
    let before = rig.dump();
    let again = launch(&flows, &flow(&["other"]), "f1").await;
    assert!(matches!(again, Err(FlowsError::Done(_)) | Ok(Launched::Before { status: Status::Done, .. })), "{again:?}");
    let again = launch(&flows, &flow(&["extract"]), "f1").await.unwrap();
    assert_eq!(again, Launched::Before { id: job_id("f1"), status: Status::Done });
    assert_eq!(rig.dump(), before);
    rig.balanced();
}

#[tokio::test]
async fn steps_split_and_join_and_follow_the_ends_that_they_name() {
    let shape = [
        "start",
        "left < start",
        "right < start",
        "join < left, right",
        "alarm < left, right ! failed",
        "last < join, alarm ! ended",
    ];
    let cases: [(&[&str], &[&str], FlowStatus); 4] = [
        (&[], &["start", "left", "right", "join", "last"], FlowStatus::Done),
        // Whoever follows the failure forgives it.
        (&["left"], &["start", "left", "right", "alarm", "last"], FlowStatus::Done),
        (&["left", "alarm"], &["start", "left", "right", "alarm", "last"], FlowStatus::Failed),
        // What comes after it is not to run; but what follows any end is.
        (&["start"], &["start", "last"], FlowStatus::Failed),
    ];
    for (failing, ran, status) in cases {
        let rig = Rig::start().await;
        let flows = Flows::new(rig.store.clone());
        let session = rig.session(POOL, 8).await;
        launch(&flows, &flow(&shape), "f1").await.unwrap();
        assert_eq!(work(&session, failing).await, ran, "{failing:?}");
        let over = view(&flows, "f1").await;
        assert_eq!(over.status, status, "{failing:?}");
        assert_eq!(over.reason.is_some(), status == FlowStatus::Failed);
        for (name, status) in steps(&flows, "f1").await {
            let wanted = match (ran.contains(&name.as_str()), failing.contains(&name.as_str())) {
                (true, true) => StepStatus::Failed,
                (true, false) => StepStatus::Done,
                (false, _) => StepStatus::Skipped,
            };
            assert_eq!(status, wanted, "{failing:?}: {name}");
        }
        rig.balanced();
    }
}

#[tokio::test]
async fn another_launch_goes_on_where_the_last_one_failed_and_what_is_done_is_not_repeated() {
    let rig = Rig::start().await;
    let flows = Flows::new(rig.store.clone());
    let session = rig.session(POOL, 8).await;
    let shape = flow(&["extract", "transform", "load"]);
    launch(&flows, &shape, "f1").await.unwrap();
    assert_eq!(work(&session, &["transform"]).await, ["extract", "transform"]);
    let failed = view(&flows, "f1").await;
    assert_eq!(failed.status, FlowStatus::Failed);
    assert_eq!(failed.reason.as_deref(), Some("step transform failed: no disk"));
    // Steps may have come and gone meanwhile: what is done is known by its name.
    let changed = flow(&["prepare", "extract", "transform", "load"]);
    let launched = launch(&flows, &changed, "f2").await.unwrap();
    assert_eq!(launched, Launched::New { id: job_id("f2"), goes_on_from: Some("f1".into()) });
    assert_eq!(work(&session, &["load"]).await, ["prepare", "transform", "load"]);
    let launched = flows.restart(&job_id("f2"), named("f3")).await.unwrap();
    assert_eq!(launched, Launched::New { id: job_id("f3"), goes_on_from: Some("f2".into()) });
    assert_eq!(work(&session, &[]).await, ["load"]);
    assert_eq!(view(&flows, "f3").await.status, FlowStatus::Done);
    let froms: Vec<Option<String>> =
        flows.steps(&job_id("f3")).await.unwrap().into_iter().map(|step| step.from).collect();
    assert_eq!(froms, [Some("f2".into()), Some("f1".into()), Some("f2".into()), None]);

    assert!(matches!(launch(&flows, &shape, "f4").await, Err(FlowsError::Done(id)) if id == "f3"));
    let force = LaunchOptions { force: true, ..named("f5") };
    flows.launch(&shape, &user("ann"), &Map::new(), force).await.unwrap();
    assert_eq!(work(&session, &[]).await, ["extract", "transform", "load"]);
    let again = Flow::builder("nightly").restartable().step(Step::task("only", "etl", "step")).build().unwrap();
    launch(&flows, &again, "f6").await.unwrap();
    assert_eq!(work(&session, &[]).await, ["only"]);
    // The steps' jobs are not retried by themselves.
    let retried = Retrier::new(rig.store.clone()).retry(&[job_id("f1:transform"), job_id("f1")]).await.unwrap();
    assert!(retried.iter().all(|one| matches!(one, Retried::Refused(_))), "{retried:?}");
    rig.balanced();
}

#[tokio::test]
async fn an_instance_runs_once_at_a_time_and_its_identifying_parameters_make_it() {
    let rig = Rig::start().await;
    let flows = Flows::new(rig.store.clone());
    let session = rig.session(POOL, 8).await;
    let chunk = Param { identifying: false, default: Some(json!(10)), ..Param::new(ParamKind::Integer) };
    let flow = Flow::builder("daily")
        .param("day", Param::new(ParamKind::DateTime))
        .param("chunk", chunk)
        .step(Step::task("work", "etl", "step"))
        .build()
        .unwrap();
    let start = async |who: &str, params: Value| {
        flows.launch(&flow, &user(who), &given(params), LaunchOptions::default()).await
    };
    let first = start("ann", json!({ "day": "2026-03-01" })).await.unwrap();
    for _ in 0..2 {
        let refused = start("ann", json!({ "day": "2026-03-01", "chunk": 99 })).await;
        assert!(matches!(&refused, Err(FlowsError::Running(id)) if id == first.id().as_str()), "{refused:?}");
        start("ann", json!({ "day": "2026-03-01" })).await.expect_err("it runs");
    }
    start("ann", json!({ "day": "2026-03-02" })).await.unwrap();
    start("bob", json!({ "day": "2026-03-01" })).await.unwrap();
    assert!(matches!(start("ann", json!({})).await, Err(FlowsError::Flow(_))));
    let bad = flows.launch(&flow, &user("ann"), &given(json!({ "day": "2026-01-01" })), named("a:b")).await;
    assert!(matches!(bad, Err(FlowsError::InvalidId)));
    let listed = async |filter: FlowFilter| flows.list(&filter, 10).await.unwrap().len();
    assert_eq!(listed(FlowFilter::default()).await, 3);
    assert_eq!(listed(FlowFilter { user: Some(user("ann")), ..Default::default() }).await, 2);
    let instance = view(&flows, first.id().as_str()).await.instance;
    assert_eq!(listed(FlowFilter { instance: Some(instance), ..Default::default() }).await, 1);
    let inputs: Vec<Value> = take(&session, 8)
        .await
        .iter()
        .map(|claim| serde_json::from_slice(claim.job().bytes("input").unwrap()).unwrap())
        .collect();
    assert_eq!(inputs[0], json!({ "day": "2026-03-01", "chunk": 10 }), "all parameters, if nothing else is said");
}

#[tokio::test]
async fn a_stop_begins_no_step_and_lets_those_that_run_come_to_their_ends() {
    let rig = Rig::start().await;
    let flows = Flows::new(rig.store.clone());
    let session = rig.session(POOL, 1).await;
    let shape = flow(&["one <", "two <", "next < one", "last < one, two"]);
    launch(&flows, &shape, "f1").await.unwrap();
    let running = take_one(&session).await;
    assert_eq!(step_of(&running), "one");
    assert_eq!(flows.stop(&job_id("f1")).await.unwrap().status, FlowStatus::Stopping);
    assert_eq!(steps(&flows, "f1").await["two"], StepStatus::Cancelled, "it had waited");
    assert!(matches!(launch(&flows, &shape, "f2").await, Err(FlowsError::Running(_))));
    finish(running, false).await;
    assert_eq!(view(&flows, "f1").await.status, FlowStatus::Stopped);
    assert!(take(&session, 8).await.is_empty());
    assert_eq!(steps(&flows, "f1").await["next"], StepStatus::Waiting, "it could have begun");
    rig.balanced();
    assert!(matches!(flows.stop(&job_id("f1")).await, Err(FlowsError::Over(Status::Cancelled))));

    launch(&flows, &shape, "f2").await.unwrap();
    assert_eq!(work(&session, &[]).await, ["two", "next", "last"]);
    assert_eq!(view(&flows, "f2").await.status, FlowStatus::Done);
    // What has nothing left to do when its last step ends is done, whatever was asked.
    let force = LaunchOptions { force: true, ..named("f3") };
    flows.launch(&flow(&["only"]), &user("ann"), &Map::new(), force).await.unwrap();
    let running = take_one(&session).await;
    flows.stop(&job_id("f3")).await.unwrap();
    finish(running, false).await;
    assert_eq!(view(&flows, "f3").await.status, FlowStatus::Done);
    assert!(matches!(flows.stop(&job_id("nothing")).await, Err(FlowsError::NotFound(_))));
    rig.balanced();
}

#[tokio::test]
async fn a_cancel_of_a_flow_is_one_of_its_steps_and_an_abandoned_one_is_not_gone_on_from() {
    let rig = Rig::start().await;
    let flows = Flows::new(rig.store.clone());
    let session = rig.session(POOL, 1).await;
    let canceller = Canceller::new(rig.store.clone(), KEEP);
    let shape = flow(&["one <", "two <", "last < one, two ! ended"]);
    launch(&flows, &shape, "f1").await.unwrap();
    let running = take_one(&session).await;
    assert_eq!(canceller.cancel(&job_id("f1")).await.unwrap(), Cancelled::Requested);
    assert_eq!(rig.state().asked_to_cancel(session.id().as_str()), ["f1:one"]);
    assert_eq!(end(running, "cancelled").await, Finished::Ended);
    assert_eq!(view(&flows, "f1").await.status, FlowStatus::Stopped);
    assert!(matches!(canceller.cancel(&job_id("f1")).await.unwrap(), Cancelled::TooLate(_)));
    // One that waits as a whole ends at once.
    launch(&flows, &shape, "f2").await.unwrap();
    assert!(matches!(canceller.cancel(&job_id("f2")).await.unwrap(), Cancelled::AtOnce));
    assert_eq!(view(&flows, "f2").await.status, FlowStatus::Stopped);
    assert_eq!(steps(&flows, "f2").await["last"], StepStatus::Waiting);
    assert!(take(&session, 8).await.is_empty());

    assert_eq!(flows.abandon(&job_id("f2")).await.unwrap().status, FlowStatus::Abandoned);
    assert!(matches!(launch(&flows, &shape, "f3").await, Err(FlowsError::Abandoned(id)) if id == "f2"));
    let force = LaunchOptions { force: true, ..named("f3") };
    flows.launch(&shape, &user("ann"), &Map::new(), force).await.unwrap();
    assert!(matches!(flows.abandon(&job_id("f3")).await, Err(FlowsError::Running(_))));
    // A step that somebody cancels is not done, and what follows any end runs.
    assert!(matches!(canceller.cancel(&job_id("f3:two")).await.unwrap(), Cancelled::AtOnce));
    assert_eq!(work(&session, &[]).await, ["one", "last"]);
    assert_eq!(view(&flows, "f3").await.status, FlowStatus::Stopped);
    rig.balanced();
}

#[tokio::test]
async fn a_lost_worker_and_a_retry_are_no_end_of_a_step() {
    let rig = Rig::start().await;
    let flows = Flows::new(rig.store.clone());
    let leadership = rig.lead().await;
    let (lost, other) = (rig.session(POOL, 1).await, rig.session(POOL, 8).await);
    launch(&flows, &flow(&["one", "two"]), "f1").await.unwrap();
    let stale = take_one(&lost).await;
    let beat = rig.state().beat(lost.id().as_str());
    let leader = SessionId::new("leader:1:a").unwrap();
    rig.store.session_reclaim(lost.id().as_str(), beat, &leader, leadership.term()).await.unwrap().unwrap();
    assert_eq!(steps(&flows, "f1").await["one"], StepStatus::Pending);
    let claim = take_one(&other).await;
    assert_eq!(end(stale, "done").await, Finished::Stale);
    assert_eq!(steps(&flows, "f1").await["two"], StepStatus::Waiting);
    let tried = Fields::new().with("status", "scheduled").with("attempts", "1").with("history", r#"{"error":"busy"}"#);
    claim.finish(Verdict::Later { after_ms: 0 }, Duration::ZERO, tried, false).await.unwrap();
    let step = flows.steps(&job_id("f1")).await.unwrap().remove(0);
    assert_eq!((step.status, step.attempts.len()), (StepStatus::Scheduled, 1));
    assert_eq!(work(&other, &[]).await, ["one", "two"]);
    let step = flows.steps(&job_id("f1")).await.unwrap().remove(0);
    assert_eq!(step.attempts, [json!({ "error": "busy" })], "the record of each attempt stays");
    assert_eq!(view(&flows, "f1").await.status, FlowStatus::Done);
    rig.balanced();
}

/// Whoever knows the layout can have the job of a step run once more; its flow has heard of its end.
#[tokio::test]
async fn a_step_whose_job_others_run_again_has_ended_once() {
    let rig = Rig::start().await;
    let flows = Flows::new(rig.store.clone());
    let session = rig.session(POOL, 8).await;
    launch(&flows, &flow(&["one", "two", "three"]), "f1").await.unwrap();
    finish(take_one(&session).await, false).await;
    let two = take_one(&session).await;
    rig.state().foreign().write("f1:one", &[("status", "pending")]);
    rig.state().foreign().push("ann", "f1:one");
    rig.notice(&["ann"]).await;
    let again = take_one(&session).await;
    assert_eq!(id(&again), "f1:one");
    finish(again, true).await;
    assert_eq!(steps(&flows, "f1").await["one"], StepStatus::Done);
    finish(two, false).await;
    assert_eq!(work(&session, &[]).await, ["three"]);
    assert_eq!(view(&flows, "f1").await.status, FlowStatus::Done);
    rig.balanced();
}

#[tokio::test]
async fn a_step_that_was_not_done_goes_on_from_what_it_has_saved_in_whatever_execution_that_is() {
    let rig = Rig::start().await;
    let flows = Flows::new(rig.store.clone());
    let session = rig.session(POOL, 8).await;
    let shape = flow(&["one", "two"]);
    let saved = |claim: &Claim| claim.job().text("checkpoint").unwrap().map(str::to_owned);
    let save = async |claim: &Claim, text: &str| {
        claim.pen().mark(&Fields::new().with("checkpoint", text)).await.unwrap();
    };
    launch(&flows, &shape, "f1").await.unwrap();
    let claim = take_one(&session).await;
    assert_eq!(saved(&claim), None);
    save(&claim, r#"{"at":5}"#).await;
    finish(claim, true).await;
    // It goes on, saves, and is stopped for that: whoever can go on later need not come to an end.
    launch(&flows, &shape, "f2").await.unwrap();
    let claim = take_one(&session).await;
    assert_eq!(saved(&claim).as_deref(), Some(r#"{"at":5}"#));
    save(&claim, r#"{"at":9}"#).await;
    flows.stop(&job_id("f2")).await.unwrap();
    assert_eq!(rig.state().asked_to_cancel(session.id().as_str()), ["f2:one"]);
    assert_eq!(end(claim, "cancelled").await, Finished::Ended);
    assert_eq!(view(&flows, "f2").await.status, FlowStatus::Stopped);
    // Where its turn did not come, it is kept for the next one.
    let before = flow(&["zero", "one", "two"]);
    launch(&flows, &before, "f3").await.unwrap();
    assert_eq!(work(&session, &["zero"]).await, ["zero"]);
    launch(&flows, &before, "f4").await.unwrap();
    flows.stop(&job_id("f4")).await.unwrap();
    launch(&flows, &shape, "f5").await.unwrap();
    let claim = take_one(&session).await;
    assert_eq!(saved(&claim).as_deref(), Some(r#"{"at":9}"#));
    save(&claim, r#"{"at":20}"#).await;
    finish(claim, false).await;
    assert_eq!(work(&session, &[]).await, ["two"]);
    let step = flows.steps(&job_id("f5")).await.unwrap().remove(0);
    assert_eq!(
        (step.status, step.checkpoint),
        (StepStatus::Done, Some(json!({ "at": 20 }))),
        "what is done tells of it"
    );
    // What is forced begins at the beginning.
    let force = LaunchOptions { force: true, ..named("f6") };
    flows.launch(&shape, &user("ann"), &Map::new(), force).await.unwrap();
    assert_eq!(saved(&take_one(&session).await), None);
    rig.balanced();
}

#[tokio::test]
async fn nothing_is_left_of_a_flow_that_was_kept_long_enough() {
    let server = testkit::RedisServer::with_clock(&[]);
    let store = queue_core::Store::connect(&config(server.url_db(DB))).await.unwrap();
    let rig = Rig { server, store };
    let flows = Flows::new(rig.store.clone());
    let session = rig.session(POOL, 8).await;
    let short = Flow::builder("short").keep(Duration::from_secs(4 * 3_600)).step(Step::task("one", "etl", "step"));
    launch(&flows, &short.build().unwrap(), "f1").await.unwrap();
    launch(&flows, &flow(&["one", "two"]), "f2").await.unwrap();
    assert_eq!(work(&session, &["two"]).await.len(), 3);
    rig.server.shift_clock(3 * 3_600);
    rig.lead().await.upkeep(KEEP).await.unwrap().unwrap();
    rig.balanced();
    // The jobs of its steps are gone before it, and it tells what became of them.
    assert!(!rig.state().has_any(&[Piece::Job("f2:one"), Piece::Job("f2:two")]));
    assert_eq!(steps(&flows, "f2").await["two"], StepStatus::Failed);
    assert_eq!(flows.list(&FlowFilter::default(), 10).await.unwrap().len(), 2);
    rig.server.shift_clock(5 * 3_600);
    rig.lead().await.upkeep(KEEP).await.unwrap().unwrap();
    assert!(matches!(flows.view(&job_id("f1")).await, Err(FlowsError::NotFound(_))));
    assert_eq!(rig.state().flows(), ["f2"]);
    let left = rig.state().left_of_flows();
    assert_eq!(left.len(), 3, "the index, its steps and its instance: {left:?}");
    // What it goes on from is remembered as long.
    let session = rig.session(POOL, 8).await;
    launch(&flows, &flow(&["one", "two"]), "f3").await.unwrap();
    assert_eq!(work(&session, &[]).await, ["two"]);
    rig.server.shift_clock(31 * 86_400);
    rig.lead().await.upkeep(KEEP).await.unwrap().unwrap();
    assert_eq!((rig.state().left_of_flows(), rig.state().jobs()), (vec![], vec![]));
}

#[tokio::test]
async fn records_of_flows_are_removed_whole_and_a_running_flow_is_nobodys_litter() {
    let rig = Rig::start().await;
    let flows = Flows::new(rig.store.clone());
    let leadership = rig.lead().await;
    let session = rig.session(POOL, 8).await;
    launch(&flows, &flow(&["one"]), "f1").await.unwrap();
    work(&session, &[]).await;
    let budget = Budget { retention_ms: 3_600_000, bytes: 1, ..Budget::default() };
    assert!(leadership.upkeep_within(&budget).await.unwrap().unwrap().evicted > 0);
    assert!(!rig.state().has_any(&[Piece::Job("f1"), Piece::FlowSteps("f1"), Piece::Flows]));
    // Whoever launches it again begins anew: nobody knows what was done.
    launch(&flows, &flow(&["one"]), "f2").await.unwrap();
    rig.age();
    assert_eq!(leadership.sweep(Duration::from_secs(60)).await.unwrap(), Ok(0));
    assert_eq!(work(&session, &[]).await, ["one"]);
    assert_eq!(view(&flows, "f2").await.status, FlowStatus::Done);
    rig.balanced();
}

#[tokio::test]
async fn a_flow_that_missed_the_end_of_a_step_is_found_and_goes_on() {
    let cases: [(Option<&str>, FlowStatus, &[&str]); 3] = [
        // The job is gone: nobody knows how it ended.
        (None, FlowStatus::Failed, &[]),
        // It ended, and the flow was not told.
        (Some("done"), FlowStatus::Done, &["two"]),
        (Some("failed"), FlowStatus::Failed, &[]),
    ];
    for (end, status, ran) in cases {
        let rig = Rig::start().await;
        let flows = Flows::new(rig.store.clone());
        let session = rig.session(POOL, 8).await;
        launch(&flows, &flow(&["one", "two"]), "f1").await.unwrap();
        rig.age();
        assert_eq!(reconcile::check(&rig.store, KEEP).await.unwrap(), []);
        match end {
            None => rig.state().lose(Piece::Job("f1:one")),
            Some(end) => rig.state().set_field("f1:one", "status", end),
        }
        rig.state().lose(QUEUE);
        for _ in 0..2 {
            rig.age();
            let found = reconcile::check(&rig.store, KEEP).await.unwrap();
            assert!(found.iter().any(|finding| finding.kind == Kind::FlowStuck), "{end:?}: {found:?}");
        }
        rig.age();
        reconcile::repair(&rig.store, KEEP).await.unwrap();
        assert_eq!(work(&session, &[]).await, ran, "{end:?}");
        assert_eq!(view(&flows, "f1").await.status, status, "{end:?}");
        rig.age();
        assert_eq!(reconcile::check(&rig.store, KEEP).await.unwrap(), [], "{end:?}");
        rig.balanced();
    }
}

#[tokio::test]
async fn a_step_that_cannot_be_queued_fails_its_flow() {
    let rig = Rig::start().await;
    let flows = Flows::new(rig.store.clone());
    let session = rig.session(POOL, 8).await;
    launch(&flows, &flow(&["one", "two"]), "f1").await.unwrap();
    let claim = take_one(&session).await;
    rig.state().spoil(QUEUE);
    finish(claim, false).await;
    let over = view(&flows, "f1").await;
    assert_eq!(over.status, FlowStatus::Failed);
    assert_eq!(over.reason.as_deref(), Some("step two failed: its queue holds a string, not a list"));
    rig.state().lose(QUEUE);
    launch(&flows, &flow(&["one", "two"]), "f2").await.unwrap();
    assert_eq!(work(&session, &[]).await, ["two"]);
}

/// A flow's steps: what each comes after, on which end, and whether it fails if it runs.
type Shape = Vec<(Vec<usize>, u8, bool)>;

fn shapes() -> impl Strategy<Value = Shape> {
    let step = (prop::collection::vec(any::<prop::sample::Index>(), 0..4), 0..3_u8, prop::bool::weighted(0.3));
    prop::collection::vec(step, 1..9).prop_map(|steps| {
        let indexed = steps.into_iter().enumerate().map(|(at, (after, on, fails))| {
            let mut after: Vec<usize> =
                if at == 0 { Vec::new() } else { after.into_iter().map(|index| index.index(at)).collect() };
            after.sort_unstable();
            after.dedup();
            (after, on, fails)
        });
        indexed.collect()
    })
}

/// How each step ends, and the flow, by the words of the documentation.
fn plainly(shape: &[(Vec<usize>, u8, bool)]) -> (Vec<StepStatus>, FlowStatus) {
    let mut ends: Vec<StepStatus> = Vec::new();
    for (after, on, fails) in shape {
        let any = |status| after.iter().any(|before| ends[*before] == status);
        let runs = after.is_empty()
            || match on {
                0 => !any(StepStatus::Failed) && any(StepStatus::Done),
                1 => any(StepStatus::Failed),
                _ => true,
            };
        ends.push(match (runs, fails) {
            (false, _) => StepStatus::Skipped,
            (true, true) => StepStatus::Failed,
            (true, false) => StepStatus::Done,
        });
    }
    let is_forgiven = |at: usize| {
        shape.iter().zip(&ends).any(|((after, on, _), end)| *on == 1 && *end == StepStatus::Done && after.contains(&at))
    };
    let fails = (0..ends.len()).any(|at| ends[at] == StepStatus::Failed && !is_forgiven(at));
    (ends, if fails { FlowStatus::Failed } else { FlowStatus::Done })
}

#[test]
fn flows_of_any_shape_end_as_their_definition_says_in_whatever_order_their_steps_end() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let rig = runtime.block_on(Rig::start());
    let flows = Flows::new(rig.store.clone());
    let session = runtime.block_on(rig.session(POOL, 8));
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig { cases: 150, ..ProptestConfig::default() });
    let mut number = 0;
    let one = |(shape, order): (Shape, Vec<usize>)| {
        number += 1;
        let execution = format!("f{number}");
        runtime.block_on(async {
            let mut builder = Flow::builder(&format!("any{number}"));
            for (at, (after, on, _)) in shape.iter().enumerate() {
                let names: Vec<String> = after.iter().map(|before| format!("s{before}")).collect();
                let names: Vec<&str> = names.iter().map(String::as_str).collect();
                let on = match on {
                    _ if after.is_empty() => On::Done,
                    0 => On::Done,
                    1 => On::Failed,
                    _ => On::Ended,
                };
                let step = Step::task(&format!("s{at}"), "etl", "step");
                builder = builder.step(step.and_then(|step| step.on(on).after(&names)));
            }
            launch(&flows, &builder.build().unwrap(), &execution).await.unwrap();
            let mut running: Vec<Claim> = Vec::new();
            let mut picks = order.iter().cycle();
            loop {
                running.extend(take(&session, 8).await);
                if running.is_empty() {
                    break;
                }
                let claim = running.remove(picks.next().unwrap() % running.len());
                let at: usize = step_of(&claim)[1..].parse().unwrap();
                finish(claim, shape[at].2).await;
            }
            let (ends, status) = plainly(&shape);
            let stand = steps(&flows, &execution).await;
            for (at, end) in ends.iter().enumerate() {
                assert_eq!(stand[&format!("s{at}")], *end, "step {at} of {shape:?}");
            }
            assert_eq!(view(&flows, &execution).await.status, status, "{shape:?}");
            rig.balanced();
        });
        Ok(())
    };
    let input = (shapes(), prop::collection::vec(0..8_usize, 1..9));
    let one = std::cell::RefCell::new(one);
    runner.run(&input, |input| (one.borrow_mut())(input)).unwrap();
}
