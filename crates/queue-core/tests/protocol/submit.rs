//! What a producer may ask for: delays, bands, unique keys, deadlines, tags; and that a refusal writes nothing.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use queue_core::calls::Verdict;
use queue_core::cancel::{Cancelled, Canceller};
use queue_core::config::Limits;
use queue_core::ids::{App, JobId, Op, SessionId, User};
use queue_core::inspect::{Filter, Inspect};
use queue_core::model::Status;
use queue_core::model::retry::RetryChoice;
use queue_core::model::task::Payload;
use queue_core::producer::{
    Database, EnqueueError, NewJob, Priority, Producer, Submitted, TaskWork, Unique, UniqueScope, Work,
};
use queue_core::retry::{Retried, Retrier};

use crate::support::*;

fn task(id: &str) -> NewJob {
    let input = Payload::json(&id).unwrap();
    let job = NewJob::task(User::new("ann").unwrap(), App::new("bank").unwrap(), Op::new("pay").unwrap(), input);
    NewJob { id: JobId::new(id).unwrap(), ..job }
}

fn unique(id: &str, scope: UniqueScope) -> NewJob {
    NewJob { unique: Some(Unique { key: "k".into(), scope }), ..task(id) }
}

fn producer(rig: &Rig) -> Producer {
    Producer::new(rig.store.clone(), Limits::default())
}

/// The job that a refusal names, after a look at what it wrote.
async fn holder(rig: &Rig, id: &str) -> Option<String> {
    let before = rig.dump();
    match producer(rig).enqueue(unique(id, UniqueScope::UntilDone)).await {
        Err(EnqueueError::Held { holder }) => {
            assert_eq!(rig.dump(), before, "a refusal writes nothing");
            Some(holder)
        }
        Ok(_) => None,
        Err(error) => panic!("{error}"),
    }
}

async fn reclaim(rig: &Rig, lost: &SessionId) {
    let leadership = rig.lead().await;
    let leader = SessionId::new("leader:1:a").unwrap();
    rig.store.session_reclaim(lost.as_str(), 0, &leader, leadership.term()).await.unwrap().unwrap();
}

#[tokio::test]
async fn many_at_once_each_have_their_answer_in_order() {
    let rig = Rig::start().await;
    let mut jobs: Vec<NewJob> = (0..250).map(|number| task(&format!("t{number}"))).collect();
    jobs.insert(100, task("t0"));
    jobs.insert(200, NewJob { tags: vec!["a,b".into()], ..task("bad") });
    let results = producer(&rig).enqueue_many(jobs).await;
    assert_eq!(results.len(), 252);
    for (at, result) in results.iter().enumerate() {
        match at {
            100 => assert!(matches!(result, Ok(Submitted::AlreadyThere(id)) if id.as_str() == "t0")),
            200 => assert!(matches!(result, Err(EnqueueError::Invalid(_))), "{result:?}"),
            _ => assert!(matches!(result, Ok(Submitted::Queued(_))), "{at}: {result:?}"),
        }
    }
    assert_eq!(rig.state().waiting_tasks("ann", "bank.pay", testkit::state::Priority::Normal).len(), 250);
    rig.balanced();
}

#[tokio::test]
async fn a_task_waits_for_the_later_of_its_delay_and_its_time() {
    let rig = Rig::start().await;
    let producer = producer(&rig);
    let now = SystemTime::now();
    let hour = Duration::from_secs(3_600);
    producer.enqueue(NewJob { delay: hour, run_at: Some(now), ..task("delay") }).await.unwrap();
    producer.enqueue(NewJob { delay: Duration::from_secs(1), run_at: Some(now + hour), ..task("time") }).await.unwrap();
    producer.enqueue(NewJob { run_at: Some(now - hour), ..task("past") }).await.unwrap();
    let session = rig.session("bank.pay", 8).await;
    let batch = session.take(8).await.unwrap().unwrap();
    assert_eq!(ids(&batch.claims), ["past"], "a time that has been is no reason to wait");
    assert!(batch.due_in.unwrap() > hour - Duration::from_secs(60), "{:?}", batch.due_in);
    rig.balanced();
    for id in ["delay", "time"] {
        assert_eq!(rig.status(id), "scheduled");
        rig.state().make_due(id);
    }
    assert_eq!(take(&session, 8).await.len(), 2);
    rig.balanced();
}

#[tokio::test]
async fn of_25_jobs_of_full_bands_20_are_high_4_are_normal_and_one_is_low() {
    let rig = Rig::start().await;
    let bands = [("h", Priority::High), ("n", Priority::Normal), ("l", Priority::Low)];
    let jobs = bands.iter().flat_map(|(name, priority)| {
        (0..25).map(move |number| NewJob { priority: *priority, ..task(&format!("{name}{number}")) })
    });
    assert!(producer(&rig).enqueue_many(jobs.collect()).await.iter().all(Result::is_ok));
    let session = rig.session("bank.pay", 100).await;
    let claims = take(&session, 25).await;
    let count = |band: &str| ids(&claims).iter().filter(|id| id.starts_with(band)).count();
    assert_eq!((count("h"), count("n"), count("l")), (20, 4, 1));
    let order: Vec<&str> = ids(&claims).into_iter().filter(|id| id.starts_with('h')).collect();
    let expected: Vec<String> = (0..20).map(|number| format!("h{number}")).collect();
    assert_eq!(order, expected, "in the order of submission within a band");
    rig.balanced();
}

#[tokio::test]
async fn bands_do_not_multiply_how_many_may_wait() {
    let rig = Rig::start().await;
    let limits = Limits { max_queued_tasks: 3.try_into().unwrap(), ..Limits::default() };
    let producer = Producer::new(rig.store.clone(), limits);
    producer.enqueue(NewJob { priority: Priority::High, ..task("a") }).await.unwrap();
    producer.enqueue(NewJob { priority: Priority::Low, ..task("b") }).await.unwrap();
    producer.enqueue(NewJob { delay: Duration::from_secs(60), ..task("c") }).await.unwrap();
    for priority in [Priority::High, Priority::Normal, Priority::Low] {
        let before = rig.dump();
        let refused = producer.enqueue(NewJob { priority, ..task("d") }).await;
        assert!(matches!(refused, Err(EnqueueError::Full { limit: 3 })), "{priority:?}: {refused:?}");
        assert_eq!(rig.dump(), before);
    }
}

#[tokio::test]
async fn a_key_until_done_is_held_while_its_job_waits_and_runs_and_dies_with_it_in_every_way() {
    let rig = Rig::start().await;
    let producer = producer(&rig);
    let session = rig.session("bank.pay", 8).await;
    let canceller = Canceller::new(rig.store.clone(), Duration::from_secs(60));
    let job = |id: &str| JobId::new(id).unwrap();

    for status in ["done", "failed", "ignored", "unknown", "cancelled"] {
        producer.enqueue(unique(status, UniqueScope::UntilDone)).await.unwrap();
        assert_eq!(holder(&rig, "other").await.as_deref(), Some(status), "while it waits");
        let claim = take_one(&session).await;
        assert_eq!(holder(&rig, "other").await.as_deref(), Some(status), "while it runs");
        end(claim, status).await;
        assert!(!rig.state().has(Piece::Unique("k")), "{status}");
    }
    // Cancelled while it waits, for its turn or for a time.
    producer.enqueue(unique("waits", UniqueScope::UntilDone)).await.unwrap();
    assert_eq!(canceller.cancel(&job("waits")).await.unwrap(), Cancelled::AtOnce);
    producer
        .enqueue(NewJob { delay: Duration::from_secs(60), ..unique("later", UniqueScope::UntilDone) })
        .await
        .unwrap();
    assert_eq!(holder(&rig, "other").await.as_deref(), Some("later"));
    assert_eq!(canceller.cancel(&job("later")).await.unwrap(), Cancelled::AtOnce);
    assert!(!rig.state().has(Piece::Unique("k")));
    // Between two attempts it is held.
    producer.enqueue(unique("again", UniqueScope::UntilDone)).await.unwrap();
    put(take_one(&session).await, Verdict::Later { after_ms: 60_000 }).await;
    assert_eq!(holder(&rig, "other").await.as_deref(), Some("again"));
    assert_eq!(canceller.cancel(&job("again")).await.unwrap(), Cancelled::AtOnce);
    // Cancelled by a foreign canceller, who knows the hash alone.
    producer.enqueue(unique("foreign", UniqueScope::UntilDone)).await.unwrap();
    rig.state().set_field("foreign", "status", "cancelled");
    assert_eq!(holder(&rig, "next").await, None, "and the key goes to the next");
    // While it runs that is no end: somebody works on it still.
    let runs = take_one(&session).await;
    rig.state().set_field(id(&runs), "status", "cancelled");
    assert_eq!(holder(&rig, "other").await.as_deref(), Some("next"));
    end(runs, "done").await;
    assert!(!rig.state().has(Piece::Unique("k")));
    // Its hash is gone.
    producer.enqueue(unique("gone", UniqueScope::UntilDone)).await.unwrap();
    rig.state().lose(Piece::Job("gone"));
    assert_eq!(holder(&rig, "heir").await, None);
    end(take_one(&session).await, "done").await;
    // Set aside.
    producer.enqueue(unique("huge", UniqueScope::UntilDone)).await.unwrap();
    rig.state().set_field("huge", "input", "x".repeat((1 << 20) + 1));
    assert!(take(&session, 1).await.is_empty());
    assert_eq!(rig.status("huge"), "failed");
    assert!(!rig.state().has(Piece::Unique("k")));
    // Its worker is lost: it waits again and holds the key.
    producer.enqueue(unique("lost", UniqueScope::UntilDone)).await.unwrap();
    let dies = rig.session("bank.pay", 8).await;
    let claim = take_one(&dies).await;
    reclaim(&rig, dies.id()).await;
    assert_eq!(holder(&rig, "other").await.as_deref(), Some("lost"));
    assert_eq!(end(claim, "done").await, queue_core::calls::Finished::Stale);
    assert_eq!(holder(&rig, "other").await.as_deref(), Some("lost"), "a stale end gives nothing up");
    end(take_one(&session).await, "done").await;
    assert!(!rig.state().has(Piece::Unique("k")));
    rig.balanced();
}

#[tokio::test]
async fn a_key_while_queued_is_free_from_the_take_on() {
    let rig = Rig::start().await;
    let producer = producer(&rig);
    let session = rig.session("bank.pay", 8).await;
    producer.enqueue(unique("a", UniqueScope::WhileQueued)).await.unwrap();
    let before = rig.dump();
    let refused = producer.enqueue(unique("b", UniqueScope::WhileQueued)).await;
    assert!(matches!(&refused, Err(EnqueueError::Held { holder }) if holder == "a"), "{refused:?}");
    assert_eq!(rig.dump(), before);
    let a = take_one(&session).await;
    producer.enqueue(unique("b", UniqueScope::WhileQueued)).await.expect("free");
    // The first one waits again: the key is the second one's all the same.
    put(a, Verdict::Back).await;
    assert!(
        matches!(producer.enqueue(unique("c", UniqueScope::WhileQueued)).await, Err(EnqueueError::Held { holder }) if holder == "b")
    );
    let claims = take(&session, 8).await;
    assert_eq!(ids(&claims), ["a", "b"]);
    assert!(!rig.state().has(Piece::Unique("k")));
    rig.balanced();
}

#[tokio::test]
async fn a_key_for_a_period_outlives_its_job_and_ends_by_itself() {
    let rig = Rig::start().await;
    let producer = producer(&rig);
    let session = rig.session("bank.pay", 8).await;
    let period = UniqueScope::For(Duration::from_secs(3_600));
    producer.enqueue(unique("a", period)).await.unwrap();
    end(take_one(&session).await, "done").await;
    let refused = producer.enqueue(unique("b", period)).await;
    assert!(matches!(&refused, Err(EnqueueError::Held { holder }) if holder == "a"), "{refused:?}");
    let left = rig.state().expires_in_ms(Piece::Unique("k")).expect("it ends by itself");
    assert!((3_500_000..=3_600_000).contains(&left), "{left}");
    rig.state().expire(Piece::Unique("k"));
    testkit::eventually("the key to expire", async || (!rig.state().has(Piece::Unique("k"))).then_some(())).await;
    producer.enqueue(unique("b", period)).await.expect("free");

    let endless = unique("c", UniqueScope::For(Duration::MAX));
    let before = rig.dump();
    assert!(matches!(producer.enqueue(endless).await, Err(EnqueueError::Invalid(_))));
    assert_eq!(rig.dump(), before);
}

#[tokio::test]
async fn of_jobs_that_ask_for_a_key_at_the_same_time_one_gets_it() {
    let rig = Rig::start().await;
    let producer = producer(&rig);
    let asking: Vec<_> = (0..50)
        .map(|number| {
            let producer = producer.clone();
            tokio::spawn(async move { producer.enqueue(unique(&format!("t{number}"), UniqueScope::UntilDone)).await })
        })
        .collect();
    let mut queued = Vec::new();
    let mut holders = Vec::new();
    for asked in asking {
        match asked.await.unwrap() {
            Ok(submitted) => queued.push(submitted.id().to_string()),
            Err(EnqueueError::Held { holder }) => holders.push(holder),
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!((queued.len(), holders.len()), (1, 49));
    assert!(holders.iter().all(|holder| *holder == queued[0]));
    // The same submission again is no other job.
    let again = unique(&queued[0], UniqueScope::UntilDone);
    assert!(matches!(producer.enqueue(again).await, Ok(Submitted::AlreadyThere(_))));
}

#[tokio::test]
async fn a_new_run_takes_the_key_again_or_is_refused() {
    let rig = Rig::start().await;
    let producer = producer(&rig);
    let session = rig.session("bank.pay", 8).await;
    let retrier = Retrier::new(rig.store.clone());
    let retry = async |id: &str| retrier.retry(&[JobId::new(id).unwrap()]).await.unwrap().remove(0);
    producer.enqueue(unique("a", UniqueScope::UntilDone)).await.unwrap();
    end(take_one(&session).await, "failed").await;
    producer.enqueue(unique("b", UniqueScope::UntilDone)).await.unwrap();
    let before = rig.dump();
    assert!(matches!(retry("a").await, Retried::Refused(reason) if reason.contains("b")));
    assert_eq!(rig.dump(), before);
    end(take_one(&session).await, "done").await;
    assert_eq!(retry("a").await, Retried::Queued);
    assert_eq!(holder(&rig, "other").await.as_deref(), Some("a"));
    end(take_one(&session).await, "done").await;
    assert!(!rig.state().has(Piece::Unique("k")));

    // What is refused for another reason takes no key.
    let database =
        Database::Connection { host: "h".into(), port: 1, dbname: "d".into(), dbuser: "u".into(), pass: "p".into() };
    let mut job = NewJob::sql(User::new("ann").unwrap(), database, "select 1");
    job.unique = Some(Unique { key: "k".into(), scope: UniqueScope::UntilDone });
    producer.enqueue(job.clone()).await.unwrap();
    let sql = rig.session("sql:*", 8).await;
    end(take_one(&sql).await, "failed").await;
    let before = rig.dump();
    assert_eq!(retry(job.id.as_str()).await, Retried::PasswordMissing);
    assert_eq!(rig.dump(), before);
}

#[tokio::test]
async fn a_swept_job_gives_its_key_up() {
    let rig = Rig::start().await;
    producer(&rig).enqueue(unique("old", UniqueScope::UntilDone)).await.unwrap();
    rig.state().lose(Piece::Tasks("ann", "bank.pay", testkit::state::Priority::Normal));
    rig.state().set_field("old", "updated_at", "2020-01-01T00:00:00.000Z");
    rig.state().leave_untouched(Piece::Job("old"), 3_600_000);
    let leadership = rig.lead().await;
    let leader = SessionId::new("leader:1:a").unwrap();
    let removed = rig.store.sweep(&leader, leadership.term(), 1_000, &[b"old".to_vec()]).await.unwrap().unwrap();
    assert_eq!(removed, 1);
    assert!(!rig.state().has(Piece::Unique("k")));
}

#[tokio::test]
async fn deadline_and_tags_stand_in_the_hash_and_jobs_are_found_by_their_tags() {
    let rig = Rig::start().await;
    let producer = producer(&rig);
    let deadline = UNIX_EPOCH + Duration::from_millis(1_900_000_000_123);
    let tags = vec!["nightly".to_owned(), "käse run".to_owned()];
    producer.enqueue(NewJob { deadline: Some(deadline), tags: tags.clone(), ..task("a") }).await.unwrap();
    producer.enqueue(NewJob { tags: vec!["night".into()], ..task("b") }).await.unwrap();
    let session = rig.session("bank.pay", 1).await;
    let claim = take_one(&session).await;
    assert_eq!(claim.job().text("deadline"), Ok(Some("1900000000123")));
    assert_eq!(claim.job().text("tags"), Ok(Some("nightly,käse run")));
    let inspect = Inspect::new(rig.store.clone());
    assert_eq!(inspect.job("a").await.unwrap().unwrap().tags(), tags);
    let found = inspect.list(&Filter { tag: Some("nightly".into()), ..Filter::default() }, 10).await.unwrap();
    assert_eq!(found.iter().map(|view| view.id.as_str()).collect::<Vec<_>>(), ["a"]);
    assert_eq!(found[0].stand(), Status::Running);

    let too_many: Vec<String> = (0..300).map(|number| format!("tag{number}")).collect();
    for tags in [vec!["".to_owned()], vec!["a,b".to_owned()], vec!["a\nb".to_owned()], too_many] {
        let before = rig.dump();
        assert!(matches!(producer.enqueue(NewJob { tags, ..task("c") }).await, Err(EnqueueError::Invalid(_))));
        assert_eq!(rig.dump(), before);
    }
}

#[tokio::test]
async fn what_is_too_large_is_refused_with_the_limit_that_it_exceeds() {
    let rig = Rig::start().await;
    let producer = producer(&rig);
    let before = rig.dump();
    let of = |bytes: usize| {
        let mut job = task("big");
        let Work::Task(work) = &mut job.work else { unreachable!() };
        work.input = Payload::json(&"x".repeat(bytes)).unwrap();
        job
    };
    let refused = producer.enqueue(of(262_144)).await.unwrap_err();
    assert!(matches!(refused, EnqueueError::TooLarge { bytes: 262_161, limit: 262_144 }), "{refused:?}");
    // The limit of all is that of all fields with their names.
    let limits = Limits { max_task_bytes: (1 << 20).try_into().unwrap(), ..Limits::default() };
    let generous = Producer::new(rig.store.clone(), limits);
    let refused = generous.enqueue(of((1 << 20) - 30)).await.unwrap_err();
    assert!(matches!(refused, EnqueueError::TooLarge { bytes, limit: 1_048_576 } if bytes > 1_048_576), "{refused:?}");
    // What a worker would set aside for one of its fields is never queued.
    let mut job = task("big");
    let Work::Task(TaskWork { context, .. }) = &mut job.work else { unreachable!() };
    *context = Some(Payload::json(&"x".repeat(262_143)).unwrap());
    let refused = generous.enqueue(job).await.unwrap_err();
    assert_eq!(refused.to_string(), "context has 262145 bytes, at most 262144 are allowed");
    let refused = generous.enqueue(NewJob { traceparent: Some("x".repeat(129)), ..task("big") }).await.unwrap_err();
    assert!(matches!(refused, EnqueueError::Invalid(_)), "{refused:?}");
    assert_eq!(rig.dump(), before, "refusals write nothing");
    generous.enqueue(of(1 << 19)).await.expect("this one fits");
}

#[test]
fn a_time_that_is_said_and_is_shorter_than_a_millisecond_is_one_and_not_none() {
    let job = NewJob {
        timeout: Some(Duration::from_micros(100)),
        retry: RetryChoice { delay: Some(Duration::ZERO), ..RetryChoice::default() },
        ..task("a")
    };
    let fields = job.into_submission().unwrap().fields;
    assert_eq!((fields.get("timeout"), fields.get("retry_delay")), (Some(&b"1"[..]), Some(&b"1"[..])));
    assert_eq!(task("a").into_submission().unwrap().fields.get("timeout"), None);
}
