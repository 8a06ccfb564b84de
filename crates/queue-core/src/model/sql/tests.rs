use proptest::prelude::*;
use serde_json::json;

use super::*;

const AT: &str = "2026-11-23T00:00:00.000Z";

fn job(query: Value) -> SqlJob {
    let text = query.as_str().map_or_else(|| query.to_string(), str::to_owned);
    reparse(&text, Status::Pending).unwrap()
}

fn reparse(text: &str, status: Status) -> Result<SqlJob, SqlJobError> {
    SqlJob::parse(text, status, None, None, None, None)
}

/// The job as the next worker would read it.
fn saved(job: &SqlJob) -> SqlJob {
    SqlJob::parse(&job.query_text(), job.status, job.fallback, None, None, job.failed_reason()).unwrap()
}

fn json_of(job: &SqlJob) -> Value {
    let mut json = serde_json::from_str(&job.query_text()).unwrap();
    without_times(&mut json);
    json
}

fn without_times(json: &mut Value) {
    match json {
        Value::Array(list) => list.iter_mut().for_each(without_times),
        Value::Object(object) => {
            object.retain(|name, _| name != "started_at" && name != "ended_at");
            object.values_mut().for_each(without_times);
        }
        _ => {}
    }
}

/// Runs a job to its end; what fails is what asks a table named `missing_…`. Each step is made on the job as it was saved.
fn run(mut job: SqlJob) -> (Vec<String>, SqlJob) {
    let mut steps = Vec::new();
    while let Some(Statement { step, sql, .. }) = job.next() {
        let verdict =
            if sql.contains("missing_") { Verdict::Failed(format!("no {}", sql.trim())) } else { Verdict::Done };
        steps.push(step);
        job.start(AT).unwrap();
        assert!(job.next().is_none() && !job.is_over());
        job.finish(verdict, AT).unwrap();
        job = saved(&job);
    }
    assert!(job.is_over());
    (steps, job)
}

#[test]
fn the_fallbacks_of_entries_run_after_their_entry_and_the_jobs_own_at_the_end() {
    let (steps, job) = run(job(json!({
        "query": [
            {"query": "a", "onsuccess": "b", "onerror": "never"},
            {"query": "c", "onerror": "never"},
            {"query": "d", "onsuccess": "e"},
        ],
        "onsuccess": "f",
        "onerror": "never",
    })));
    assert_eq!(steps, ["0", "0.onsuccess", "1", "2", "2.onsuccess", "onsuccess"]);
    assert_eq!((job.status(), job.fallback_status()), (Status::Done, Some(Status::Done)));
    assert_eq!(json_of(&job)["query"][1]["fallback_status"], "skipped");
}

#[test]
fn the_failure_of_an_entry_runs_its_onerror_then_the_jobs() {
    let (steps, job) = run(job(json!({
        "query": [
            {"query": "a"},
            {"query": "missing_1", "onerror": "b"},
            {"query": "c", "onsuccess": "never"},
        ],
        "onerror": "d",
    })));
    assert_eq!(steps, ["0", "1", "1.onerror", "onerror"]);
    assert_eq!((job.status(), job.fallback_status()), (Status::Failed, Some(Status::Done)));
    assert_eq!(job.failed_reason(), None);
    assert_eq!(
        json_of(&job)["query"],
        json!([
            {"query": "a", "status": "done"},
            {"query": "missing_1", "onerror": "b", "status": "failed", "fallback_status": "done",
             "failed_reason": "no missing_1"},
            {"query": "c", "onsuccess": "never", "status": "skipped", "fallback_status": "skipped"},
        ])
    );
}

#[test]
fn a_failing_fallback_overwrites_the_entrys_reason_and_decides_nothing() {
    let (steps, failed) = run(job(json!({"query": [{"query": "missing_1", "onerror": "missing_2"}]})));
    assert_eq!(steps, ["0", "0.onerror"]);
    assert_eq!((failed.status(), failed.failed_reason()), (Status::Failed, None));
    let entry = &json_of(&failed)["query"][0];
    assert_eq!((&entry["fallback_status"], &entry["failed_reason"]), (&json!("failed"), &json!("no missing_2")));

    let (steps, done) = run(job(json!({
        "query": [{"query": "a", "onsuccess": "missing_1"}, {"query": "b"}],
        "onsuccess": "c",
    })));
    assert_eq!(steps, ["0", "0.onsuccess", "1", "onsuccess"]);
    assert_eq!((done.status(), done.failed_reason()), (Status::Done, None));
    assert_eq!(json_of(&done)["query"][0]["failed_reason"], "no missing_1");
}

#[test]
fn a_failing_fallback_of_the_job_leaves_no_reason() {
    let (steps, job) = run(job(json!({"query": [{"query": "missing_1"}], "onerror": "missing_2"})));
    assert_eq!(steps, ["0", "onerror"]);
    assert_eq!((job.status(), job.fallback_status()), (Status::Failed, Some(Status::Failed)));
    assert_eq!(job.failed_reason(), Some("no missing_1"));
}

#[test]
fn a_fallback_that_will_not_run_is_skipped() {
    let (_, done) = run(job(json!({"query": [{"query": "a", "onerror": "b"}], "onerror": "c"})));
    assert_eq!((done.status(), done.fallback_status()), (Status::Done, Some(Status::Skipped)));
    assert_eq!(json_of(&done)["query"][0]["fallback_status"], "skipped");
    let (_, failed) = run(job(json!({"query": ["missing_1"], "onsuccess": "c"})));
    assert_eq!((failed.status(), failed.fallback_status()), (Status::Failed, Some(Status::Skipped)));
}

#[test]
fn later_statements_of_a_list_stay_pending_after_a_failure() {
    let (steps, job) = run(job(json!(["a", "missing_1", "b"])));
    assert_eq!(steps, ["0", "1"]);
    assert_eq!((job.status(), job.failed_reason()), (Status::Failed, Some("no missing_1")));
    assert_eq!(
        json_of(&job),
        json!([
            {"query": "a", "status": "done"},
            {"query": "missing_1", "status": "failed", "failed_reason": "no missing_1"},
            {"query": "b", "status": "pending"},
        ])
    );
}

#[test]
fn cancelling_a_running_statement_of_a_list() {
    let mut job = job(json!(["a", "b", "c"]));
    job.start(AT).unwrap();
    job.finish(Verdict::Done, AT).unwrap();
    assert_eq!(job.status(), Status::Pending);
    job.start(AT).unwrap();
    job.finish(Verdict::Cancelled, AT).unwrap();
    assert!(job.is_over());
    let refused = MoveRefused { from: Status::Cancelled, to: Status::Cancelled };
    assert_eq!(job.cancel_pending(), Err(refused));
    assert_eq!(
        json_of(&job),
        json!([
            {"query": "a", "status": "done"},
            {"query": "b", "status": "cancelled"},
            {"query": "c", "status": "pending"},
        ])
    );
}

#[test]
fn cancelling_while_an_entrys_fallback_runs_leaves_later_entries_alone() {
    let mut job = job(json!({
        "query": [{"query": "a", "onsuccess": "b"}, {"query": "c"}],
        "onsuccess": "d",
    }));
    job.start(AT).unwrap();
    job.finish(Verdict::Done, AT).unwrap();
    assert_eq!(job.next().unwrap().step, "0.onsuccess");
    job.start(AT).unwrap();
    job.finish(Verdict::Cancelled, AT).unwrap();
    assert_eq!(job.status(), Status::Cancelled);
    // As the reference has it: an entry has a statement left, so the job's fallback hears nothing.
    assert_eq!(job.fallback_status(), Some(Status::Pending));
    assert!(job.is_over() && job.next().is_none());
    assert!(job.start(AT).is_err() && job.cancel_pending().is_err() && job.put_back().is_err());
    assert_eq!(
        json_of(&job)["query"],
        json!([
            {"query": "a", "onsuccess": "b", "status": "done", "fallback_status": "cancelled"},
            {"query": "c", "status": "pending"},
        ])
    );
}

#[test]
fn cancelling_an_entry_skips_what_follows() {
    let mut job = job(json!({
        "query": [{"query": "a", "onerror": "b"}, {"query": "c", "onsuccess": "d"}],
        "onerror": "e",
    }));
    job.cancel_pending().unwrap();
    assert!(job.is_over());
    assert_eq!((job.status(), job.fallback_status()), (Status::Cancelled, Some(Status::Skipped)));
    assert_eq!(
        json_of(&job)["query"],
        json!([
            {"query": "a", "onerror": "b", "status": "cancelled", "fallback_status": "skipped"},
            {"query": "c", "onsuccess": "d", "status": "skipped", "fallback_status": "skipped"},
        ])
    );
}

#[test]
fn cancelling_the_jobs_fallback_does_not_touch_the_jobs_status() {
    for running in [true, false] {
        let mut job = job(json!({"query": ["a"], "onsuccess": "b"}));
        job.start(AT).unwrap();
        job.finish(Verdict::Done, AT).unwrap();
        assert_eq!((job.status(), job.fallback_status()), (Status::Done, Some(Status::Pending)));
        assert!(!job.is_over());
        if running {
            job.start(AT).unwrap();
            assert_eq!((job.status(), job.fallback_status()), (Status::Done, Some(Status::Running)));
            assert!(!job.is_over());
            job.finish(Verdict::Cancelled, AT).unwrap();
        } else {
            job.cancel_pending().unwrap();
        }
        assert_eq!((job.status(), job.fallback_status()), (Status::Done, Some(Status::Cancelled)));
        assert!(job.is_over());
    }
}

#[test]
fn what_ran_when_its_worker_stopped_runs_again() {
    let forms = [
        json!("a"),
        json!(["a", "missing_1"]),
        json!({"query": [{"query": "a", "onsuccess": "b"}, {"query": "missing_1", "onerror": "c"}], "onerror": "d"}),
    ];
    for form in forms {
        let (steps, straight) = run(job(form.clone()));
        let mut interrupted = job(form);
        let mut seen = Vec::new();
        while let Some(step) = interrupted.next().map(|statement| statement.step) {
            // Once given back in order, once found running after its worker's death.
            interrupted.start(AT).unwrap();
            interrupted.put_back().unwrap();
            assert_eq!(interrupted.next().unwrap().step, step);
            interrupted.start(AT).unwrap();
            interrupted = saved(&interrupted);
            assert_eq!(interrupted.next().unwrap().step, step);

            let verdict = match interrupted.next().unwrap().sql {
                sql if sql.contains("missing_") => Verdict::Failed(format!("no {sql}")),
                _ => Verdict::Done,
            };
            seen.push(step);
            interrupted.start(AT).unwrap();
            interrupted.finish(verdict, AT).unwrap();
        }
        assert_eq!(seen, steps);
        assert_eq!(interrupted, straight);
    }
}

#[test]
fn an_unknown_end_is_kept_with_its_reason() {
    for form in [json!("a"), json!(["a"]), json!({"query": [{"query": "a", "onerror": "b"}], "onerror": "c"})] {
        let mut job = job(form);
        job.start(AT).unwrap();
        job.finish(Verdict::Unknown("the worker was lost".into()), AT).unwrap();
        assert_eq!((job.status(), job.failed_reason()), (Status::Unknown, Some("the worker was lost")));
        assert!(job.is_over());
    }
}

#[test]
fn an_unknown_end_of_an_entrys_fallback_skips_what_follows() {
    let mut job = job(json!({"query": [{"query": "a", "onsuccess": "b"}, "c"], "onsuccess": "d"}));
    job.start(AT).unwrap();
    job.finish(Verdict::Done, AT).unwrap();
    job.start(AT).unwrap();
    job.finish(Verdict::Unknown("the worker was lost".into()), AT).unwrap();
    assert!(job.is_over());
    let statuses = [job.status(), job.fallback_status().unwrap()];
    assert_eq!(statuses, [Status::Unknown, Status::Skipped]);
    assert_eq!(json_of(&job)["query"][1]["status"], "skipped");
}

#[test]
fn a_move_that_the_table_lacks_is_refused_and_changes_nothing() {
    let mut job = job(json!({"query": ["a"], "onsuccess": "b"}));
    let before = job.clone();
    assert_eq!(job.finish(Verdict::Done, AT).unwrap_err().to_string(), "Cannot set status from pending to done");
    assert!(job.put_back().is_err());
    assert_eq!(job, before);
    job.start(AT).unwrap();
    assert_eq!(job.start(AT).unwrap_err().to_string(), "Cannot set status from running to running");
}

#[test]
fn statements_carry_what_their_execution_needs() {
    let mut job = job(json!({"query": [
        {"query": "missing_1", "onerror": "log <%= error_message %>", "timeout": 1500.2, "id": "load"},
    ], "onerror": "<%= kept %>"}));
    let main = job.next().unwrap();
    assert_eq!((main.timeout_ms, main.id, main.templated), (Some(1501), Some("load"), false));
    job.start(AT).unwrap();
    job.finish(Verdict::Failed("it's broken".into()), AT).unwrap();
    let onerror = job.next().unwrap();
    assert_eq!((onerror.timeout_ms, onerror.id, onerror.templated), (None, Some("load"), true));
    assert_eq!(onerror.error_message, Some("it's broken"));
    job.start(AT).unwrap();
    job.finish(Verdict::Done, AT).unwrap();
    let last = job.next().unwrap();
    assert_eq!((last.sql, last.templated, last.error_message), ("<%= kept %>", false, None));
    for none in [json!(0), json!(-1), json!("10"), json!(null)] {
        assert_eq!(self::job(json!({"query": [{"query": "a", "timeout": none}]})).next().unwrap().timeout_ms, None);
    }
}

#[test]
fn fallbacks_beside_one_text_or_a_list_make_a_fallback_job() {
    let normal = json!({"query": [{"query": "a", "status": "pending"}], "onerror": "b"});
    let inside = job(json!({"query": "a", "onerror": "b"}));
    let beside = SqlJob::parse("a", Status::Pending, None, None, Some("b"), None).unwrap();
    for job in [inside, beside] {
        assert_eq!((job.kind(), job.fallback_status()), (Kind::Fallback, Some(Status::Pending)));
        assert_eq!(json_of(&job), normal);
        assert_eq!(saved(&job), job);
    }

    let normal = json!({"query": [{"query": "a", "status": "pending"}, {"query": "b", "status": "pending"}],
        "onsuccess": "c"});
    let inside = job(json!({"query": ["a", "b"], "onsuccess": "c"}));
    let beside = SqlJob::parse(r#"["a", "b"]"#, Status::Pending, None, Some("c"), Some(""), None).unwrap();
    // The fields of the hash are still there when the job is read again.
    let again = SqlJob::parse(&beside.query_text(), Status::Pending, None, Some("c"), None, None).unwrap();
    for job in [inside, beside, again] {
        assert_eq!(json_of(&job), normal);
    }

    let timed = job(json!({"query": "a", "timeout": 7, "onerror": "b"}));
    assert_eq!(timed.next().unwrap().timeout_ms, Some(7));
}

#[test]
fn lists_may_mix_texts_and_entries() {
    let (steps, mixed) = run(job(json!(["a", {"query": "missing_1", "onerror": "b"}, "c"])));
    assert_eq!(steps, ["0", "1", "1.onerror"]);
    assert_eq!(mixed.kind(), Kind::Fallback);
    assert_eq!((mixed.status(), mixed.fallback_status()), (Status::Failed, None));
    assert_eq!(json_of(&mixed)["query"][2], json!({"query": "c", "status": "skipped"}));

    assert_eq!(job(json!([{"query": "a"}, {"query": "b", "status": "pending"}])).kind(), Kind::Multiple);
    assert_eq!(job(json!([{"query": "a", "timeout": 5}])).kind(), Kind::Fallback);
}

#[test]
fn fields_that_we_do_not_know_are_kept_in_their_order() {
    let text = concat!(
        r#"{"note":1,"query":[{"tag":[2],"query":"a","x":null,"id":"i","status":"done","started_at":"t0","#,
        r#""ended_at":"t1"},{"onsuccess":"c","query":"b","status":"pending","fallback_status":"pending"}],"z":"y"}"#
    );
    assert_eq!(reparse(text, Status::Pending).unwrap().query_text(), text);
}

#[test]
fn times_stand_in_the_entries_of_fallback_jobs_only() {
    let mut fallback = job(json!({"query": [{"query": "a", "onsuccess": "b"}]}));
    fallback.start("t0").unwrap();
    fallback.finish(Verdict::Done, "t1").unwrap();
    fallback.start("t2").unwrap();
    fallback.finish(Verdict::Done, "t3").unwrap();
    assert_eq!(
        fallback.query_text(),
        concat!(
            r#"{"query":[{"query":"a","onsuccess":"b","status":"done","fallback_status":"done","#,
            r#""started_at":"t0","ended_at":"t1"}]}"#
        )
    );
    let mut multiple = job(json!(["a"]));
    multiple.start("t0").unwrap();
    multiple.finish(Verdict::Done, "t1").unwrap();
    assert_eq!(multiple.query_text(), r#"[{"query":"a","status":"done"}]"#);
}

#[test]
fn a_job_said_to_be_pending_with_nothing_left_has_ended() {
    let ended = reparse(r#"[{"query":"a","status":"failed"}]"#, Status::Running).unwrap();
    assert_eq!((ended.status(), ended.is_over()), (Status::Failed, true));
    let ended = reparse(r#"{"query":[{"query":"a","status":"done"}],"onsuccess":"b"}"#, Status::Pending).unwrap();
    assert_eq!((ended.status(), ended.next().unwrap().step.as_str()), (Status::Done, "onsuccess"));
}

#[test]
fn what_is_no_sql_job_is_refused_with_a_reason() {
    let too_many = json!(vec!["a"; ENTRIES_MAX + 1]).to_string();
    let cases = [
        ("", "the text is blank"),
        (" \n\t", "the text is blank"),
        ("SELECT\0 1", "the text has a NUL byte"),
        ("[", "malformed JSON"),
        (" {not json}", "malformed JSON"),
        ("[]", "the list is empty"),
        (r#"{"query": []}"#, "the list is empty"),
        ("[1]", "entry 0 is neither a text nor an object"),
        (r#"["a", " "]"#, "entry 1 is blank"),
        (r#"["a", {"id": "b"}]"#, "entry 1 has no query"),
        (r#"["a\u0000b"]"#, "entry 0 has a NUL byte"),
        (r#"[["a"]]"#, "entry 0 is neither a text nor an object"),
        ("{}", "the object has no query"),
        (r#"{"query": 7}"#, "the object's query is neither a text nor a list"),
        (r#"{"query": {"query": "a"}}"#, "the object's query is neither a text nor a list"),
        (r#"{"query": "a", "onerror": ""}"#, "onerror of the job is blank"),
        (r#"{"query": [{"query": "a", "onsuccess": 1}]}"#, "onsuccess of entry 0 is no text"),
        (r#"{"query": [{"query": "a", "status": "nice"}]}"#, "entry 0 has a status that no statement can have"),
        (r#"[{"query": "a", "status": "held"}]"#, "entry 0 has a status that no statement can have"),
        (&too_many, "the list has 1001 entries, at most 1000 are allowed"),
    ];
    for (text, reason) in cases {
        let fault = reparse(text, Status::Pending).unwrap_err().to_string();
        assert!(fault.starts_with(&format!("You must indicate a valid SQL: {reason}")), "{text:.40}: {fault}");
    }
    assert!(reparse(&"[".repeat(100_000), Status::Pending).is_err());
}

#[test]
fn debug_output_shows_no_sql() {
    let job = job(json!({"query": [{"query": "marker"}], "onerror": "marker"}));
    assert!(!format!("{job:?} {:?}", job.next()).contains("marker"));
}

fn any_json() -> impl Strategy<Value = Value> {
    let word = prop_oneof![
        Just("a".to_owned()),
        Just("missing_1".to_owned()),
        Just("pending".to_owned()),
        Just("running".to_owned()),
        Just("done".to_owned()),
        Just("failed".to_owned()),
        Just("skipped".to_owned()),
        ".{0,4}",
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        (-9i32..9).prop_map(|n| (f64::from(n) / 2.0).into()),
        word.prop_map(Value::from)
    ];
    leaf.prop_recursive(4, 40, 5, |inner| {
        let name = proptest::sample::select(vec![
            "query",
            "query",
            "query",
            "onsuccess",
            "onerror",
            "timeout",
            "id",
            "status",
            "fallback_status",
            "other",
        ]);
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            proptest::collection::vec((name, inner), 0..6)
                .prop_map(|fields| Value::from(Map::from_iter(fields.into_iter().map(|(n, v)| (n.to_owned(), v))))),
        ]
    })
}

fn any_form() -> impl Strategy<Value = Value> {
    let sql = || prop_oneof![Just("a"), Just("missing_1")].prop_map(Value::from);
    let fields = move |query: BoxedStrategy<Value>| {
        let hook = || proptest::option::of(sql());
        (query, hook(), hook()).prop_map(|(query, onsuccess, onerror)| {
            let mut object = Map::from_iter([(QUERY.to_owned(), query)]);
            object.extend(onsuccess.map(|sql| (ON_SUCCESS.to_owned(), sql)));
            object.extend(onerror.map(|sql| (ON_ERROR.to_owned(), sql)));
            Value::from(object)
        })
    };
    let item = prop_oneof![1 => sql(), 3 => fields(sql().boxed())];
    let list = || proptest::collection::vec(item.clone(), 1..5).prop_map(Value::from);
    prop_oneof![sql(), list(), fields(list().boxed()), fields(sql().boxed())]
}

fn any_status() -> impl Strategy<Value = Status> {
    proptest::sample::select(Status::ALL.to_vec())
}

#[derive(Debug, Clone, Copy)]
enum Deed {
    Start,
    Done,
    Fail,
    Cancel,
    Lose,
    CancelPending,
    PutBack,
    Save,
}

fn any_deed() -> impl Strategy<Value = Deed> {
    use Deed::*;
    proptest::sample::select(vec![
        Start,
        Start,
        Start,
        Done,
        Done,
        Fail,
        Fail,
        Cancel,
        Lose,
        CancelPending,
        PutBack,
        Save,
    ])
}

/// Every status in the job, in a fixed order.
fn statuses(job: &SqlJob) -> Vec<Status> {
    let entries = job.entries.iter().flat_map(|entry| [Some(entry.main), entry.fallback]);
    [Some(job.status), job.fallback].into_iter().chain(entries).flatten().collect()
}

proptest! {
    #[test]
    fn no_text_panics(text in prop_oneof![any_json().prop_map(|json| json.to_string()), ".{0,40}", "[\\[{].{0,40}"],
                      status in any_status(), fallback in proptest::option::of(any_status()),
                      onsuccess in proptest::option::of(".{0,3}"), onerror in proptest::option::of(".{0,3}")) {
        if let Ok(job) = SqlJob::parse(&text, status, fallback, onsuccess.as_deref(), onerror.as_deref(), None) {
            prop_assert!(saved(&job) == job);
            let (steps, _) = if job.status == Status::Pending { run(job.clone()) } else { (vec![], job.clone()) };
            prop_assert!(steps.len() <= 2 * job.entries.len() + 1);
        }
    }

    #[test]
    fn every_form_ends_and_runs_each_statement_once(form in any_form()) {
        let (steps, ended) = run(job(form));
        prop_assert!(steps.len() <= 2 * ended.entries.len() + 1);
        let distinct: std::collections::HashSet<_> = steps.iter().collect();
        prop_assert_eq!(distinct.len(), steps.len());
        prop_assert!(matches!(ended.status(), Status::Done | Status::Failed));
        prop_assert!(!statuses(&ended).contains(&Status::Running));
    }

    #[test]
    fn whatever_is_done_to_a_job_every_move_is_in_the_table(form in any_form(),
                                                            deeds in proptest::collection::vec(any_deed(), 0..40)) {
        let mut job = job(form);
        for deed in deeds {
            let before = job.clone();
            let accepted = match deed {
                Deed::Start => job.start(AT),
                Deed::Done => job.finish(Verdict::Done, AT),
                Deed::Fail => job.finish(Verdict::Failed("f".into()), AT),
                Deed::Cancel => job.finish(Verdict::Cancelled, AT),
                Deed::Lose => job.finish(Verdict::Unknown("u".into()), AT),
                Deed::CancelPending => job.cancel_pending(),
                Deed::PutBack => job.put_back(),
                Deed::Save => {
                    let running = statuses(&job).contains(&Status::Running);
                    job = saved(&job);
                    prop_assert!(running || job == before);
                    continue;
                }
            };
            prop_assert!(accepted.is_ok() || job == before);
            for (from, to) in statuses(&before).into_iter().zip(statuses(&job)) {
                prop_assert!(from == to || from.may_become(to), "{deed:?}: {from} to {to}");
            }
            // What readers of the record take for the end: they see these two fields.
            let waits = matches!(job.fallback_status(), Some(Status::Pending | Status::Running));
            let reads_over = job.status().is_final() && (job.status() == Status::Cancelled || !waits);
            prop_assert_eq!(job.is_over(), reads_over, "{:?}: {:?}", deed, job);
            let at_work = statuses(&job).iter().skip(1).filter(|status| **status == Status::Running).count();
            prop_assert!(at_work <= 2 && (job.next().is_none() || at_work == 0));
            prop_assert_eq!(job.is_over(), job.next().is_none() && !statuses(&job).contains(&Status::Running));
        }
    }
}

/// A job with these statuses of its entries and of itself, each `main` or `main/fallback`.
fn ended(entries: &[&str], status: &str, fallback: Option<&str>) -> SqlJob {
    let entry = |statuses: &&str| {
        let (main, fallback) = statuses.split_once('/').unwrap_or((statuses, ""));
        let mut entry = serde_json::json!({ "query": "q", "status": main, "failed_reason": "r" });
        if !fallback.is_empty() {
            entry["fallback_status"] = fallback.into();
            entry["onsuccess"] = "s".into();
            entry["onerror"] = "e".into();
        }
        entry
    };
    let mut object = serde_json::json!({ "query": entries.iter().map(entry).collect::<Vec<_>>() });
    if fallback.is_some() {
        object["onsuccess"] = "s".into();
        object["onerror"] = "e".into();
    }
    let fallback = fallback.map(|text| text.parse().unwrap());
    SqlJob::parse(&object.to_string(), status.parse().unwrap(), fallback, None, None, Some("r")).unwrap()
}

#[test]
fn a_new_run_begins_with_the_first_statement_that_is_not_done() {
    for (entries, status, fallback, next) in [
        (&["failed"][..], "failed", None, Some("0")),
        (&["done", "failed", "skipped"], "failed", None, Some("1")),
        (&["done/done", "failed/done", "skipped/skipped"], "failed", None, Some("1")),
        // The entry did its work; what should have followed did not.
        (&["done/failed", "done/done"], "done", None, Some("0.onsuccess")),
        (&["done", "cancelled"], "cancelled", Some("skipped"), Some("1")),
        (&["done", "done"], "done", Some("failed"), Some("onsuccess")),
        (&["done", "done"], "done", Some("done"), None),
        (&["done"], "done", None, None),
        (&["unknown", "skipped"], "unknown", None, Some("0")),
        (&["pending"], "ignored", Some("skipped"), Some("0")),
    ] {
        let mut job = ended(entries, status, fallback);
        assert_eq!(job.rerun(false), next.is_some(), "{entries:?} {fallback:?}");
        if let Some(next) = next {
            assert_eq!(job.next().unwrap().step, next, "{entries:?} {fallback:?}");
            assert!(!job.is_over() && job.failed_reason().is_none());
        }
        let mut job = ended(entries, status, fallback);
        assert!(job.rerun(true));
        assert_eq!((job.next().unwrap().step.as_str(), job.status()), ("0", Status::Pending));
    }
}
