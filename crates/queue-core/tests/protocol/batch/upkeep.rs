//! Batches that nobody looks after: records that were kept long enough, loads that were never finished, keys that disagree.

use std::collections::BTreeSet;

use queue_core::leader::Leadership;
use queue_core::reconcile::{Fate, Kind};
use queue_core::scripts::Budget;

use super::*;

const HOUR: Duration = Duration::from_secs(3_600);

fn of_batch(rig: &Rig, id: &str) -> BTreeSet<String> {
    let mut keys: BTreeSet<String> = rig.redis(&["KEYS", "drayman:batch*"]).texts().into_iter().collect();
    keys.extend(rig.redis(&["KEYS", "batch:jobs:*"]).texts());
    keys.retain(|key| key.split(':').any(|word| word == id));
    keys
}

/// A batch that is over, with results, and with an end that was heard.
async fn over(batches: &Batches, session: &Session, batch: NewBatch, rows: Vec<Row>) {
    let id = batch.id.to_string();
    batches.submit(batch, rows).await.unwrap();
    assert_eq!(work_off(session).await, [id]);
}

#[tokio::test]
async fn nothing_is_left_of_a_batch_that_was_kept_long_enough() {
    let server = testkit::RedisServer::with_clock(&[]);
    let store = queue_core::Store::connect(&config(server.url_db(DB))).await.unwrap();
    let rig = Rig { server, store };
    let batches = batches(&rig);
    let leadership = rig.lead().await;
    let session = rig.session(POOL, 8).await;
    over(&batches, &session, new("usual"), rows(1..=40)).await;
    over(&batches, &session, NewBatch { keep: Some(HOUR), ..new("short") }, rows(1..=40)).await;
    for (id, keep) in [("usual", KEEP), ("short", HOUR)] {
        let mut keys = of_batch(&rig, id);
        assert!(keys.remove(&job_key(&format!("{id}:done"))), "{keys:?}");
        let wanted =
            ["batch", "batch_blocks", "batch_results", "batch_rows"].map(|what| format!("drayman:{what}:{id}"));
        assert_eq!(keys, wanted.into_iter().chain([job_key(id)]).collect());
        for key in keys {
            let left = rig.redis(&["PTTL", &key]).int() as u128;
            assert!((keep.as_millis() - 60_000..=keep.as_millis()).contains(&left), "{key} stays {left} ms");
        }
    }
    let clean = async |hours: i64, stay: &[&str]| {
        rig.server.shift_clock(hours * 3_600);
        let leadership = rig.lead().await;
        leadership.upkeep(KEEP).await.unwrap().unwrap();
        assert_eq!(rig.redis(&["ZRANGE", "drayman:batches", "0", "-1"]).texts(), stay);
        let listed = batches.list(&Default::default(), 10).await.unwrap();
        assert_eq!(listed.iter().rev().map(|view| view.id.as_str()).collect::<Vec<_>>(), stay);
        for id in ["usual", "short"] {
            assert_eq!(of_batch(&rig, id).is_empty(), !stay.contains(&id), "{id}: {:?}", of_batch(&rig, id));
            let found = batches.view(&job_id(id)).await;
            assert_eq!(matches!(found, Err(BatchError::NotFound(_))), !stay.contains(&id), "{found:?}");
        }
    };
    drop(leadership);
    clean(0, &["usual", "short"]).await;
    // The word to the application of the short one is kept as long as any job.
    rig.redis(&["DEL", &job_key("short:done")]);
    clean(1, &["usual"]).await;
    clean(2, &[]).await;
    assert_eq!(rig.redis(&["EXISTS", "drayman:kept", "drayman:finished", "drayman:expiring"]).int(), 0);
}

#[tokio::test]
async fn of_more_batches_than_may_be_kept_the_oldest_go_with_their_rows_and_their_rows_count() {
    let rig = Rig::start().await;
    let batches = batches(&rig);
    let leadership = rig.lead().await;
    let session = rig.session(POOL, 8).await;
    let large = |lines| (1..=lines).map(|line| Row { line, input: vec![b'1'; 1_000] }).collect::<Vec<_>>();
    for (at, id) in ["b1", "b2", "b3"].into_iter().enumerate() {
        over(&batches, &session, new(id), large(50)).await;
        for (id, at) in [(id.to_owned(), at), (format!("{id}:done"), at + 10)] {
            rig.redis(&["ZADD", "drayman:finished", "XX", &format!("{}", 4_000_000_000_000_u64 + at as u64), &id]);
        }
        let booked: u64 = rig.redis(&["HGET", "drayman:kept", id]).text().parse().unwrap();
        let held: i64 =
            of_batch(&rig, id).iter().map(|key| rig.redis(&["MEMORY", "USAGE", key, "SAMPLES", "0"]).int()).sum();
        assert!((50_000..=held as u64 + 1_000).contains(&booked), "{booked} of {held}");
    }
    let budget = Budget { retention_ms: HOUR.as_millis() as u64, bytes: 130_000, ..Budget::default() };
    assert_eq!(leadership.upkeep_within(&budget).await.unwrap().unwrap().evicted, 1);
    let left = |id: &str| of_batch(&rig, id).len();
    assert_eq!(["b1", "b2", "b3"].map(left), [1, 6, 6], "of the first, only what was told");
    let budget = Budget { count: 4, ..budget };
    assert_eq!(leadership.upkeep_within(&budget).await.unwrap().unwrap().evicted, 1);
    assert_eq!(["b1", "b2", "b3"].map(left), [1, 1, 6]);
    assert_eq!(statuses(&batches, "b3").await.len(), 50);
    assert_eq!(rig.redis(&["ZRANGE", "drayman:batches", "0", "-1"]).texts(), ["b3"]);
    rig.balanced();
}

#[tokio::test]
async fn a_load_that_nobody_finished_goes_once_nobody_has_touched_it_for_long_and_a_batch_that_waits_for_rows_at_work_stays()
 {
    let rig = Rig::start().await;
    let batches = batches(&rig);
    let leadership = rig.lead().await;
    let untouched = Duration::from_secs(7 * 86_400);
    // Whoever submitted is gone.
    let mut loader = batches.open(new("left")).unwrap();
    for line in 1..=2_000 {
        loader.push(Row { line, input: vec![b'1'; 1_000] }).await.unwrap();
    }
    drop(loader);
    assert!(rig.redis(&["HLEN", "drayman:batch_rows:left"]).int() > 0);
    assert_eq!((view(&batches, "left").await.status, view(&batches, "left").await.counts.rows), (Status::Held, 0));
    batches.submit(held("held"), rows(1..=3)).await.unwrap();
    batches.submit(new("waits"), rows(1..=40)).await.unwrap();
    let session = rig.session(POOL, 8).await;
    let mut claims = Vec::new();
    while rig.redis(&["HEXISTS", "drayman:batch:waits", "cursor"]).int() == 1 {
        claims.extend(take(&session, 8).await);
    }
    assert_eq!(leadership.sweep(untouched).await.unwrap(), Ok(0));
    rig.age();
    rig.redis(&["HSET", &job_key("held"), "updated_at", "2999-01-01T00:00:00.000Z"]);
    rig.idle(&job_key("held"), 100);
    assert_eq!(leadership.sweep(untouched).await.unwrap(), Ok(1));
    assert_eq!(of_batch(&rig, "left"), BTreeSet::new());
    assert_eq!(statuses(&batches, "held").await.len(), 3);
    // One that was held for so long is nobody's, too.
    rig.age();
    assert_eq!(leadership.sweep(untouched).await.unwrap(), Ok(1));
    assert_eq!(of_batch(&rig, "held"), BTreeSet::new());
    for claim in claims {
        all_ended(claim, RowEnd::Done).await;
    }
    assert_eq!(work_off(&session).await, ["waits"]);
    assert_eq!(view(&batches, "waits").await.counts, counts(40, 0, 40, 0, 0));
    rig.balanced();
}

/// One batch with a chunk at work, another one that was given back, and rows that are not dealt; one whose rows are all at work; one
/// whose files are to be assembled.
struct Scene {
    rig: Rig,
    batches: Batches,
    one: Session,
    leadership: Leadership,
    claims: Vec<Claim>,
}

impl Scene {
    async fn start() -> Self {
        let rig = Rig::start().await;
        let batches = batches(&rig);
        let leadership = rig.lead().await;
        let one = rig.session(POOL, 8).await;
        batches.submit(of("eve", "files"), rows([1])).await.unwrap();
        let mut result = RowResult::of(RowEnd::Done);
        result.files.insert("out".into(), "text".into());
        end_rows(take_one(&one).await, &[Some(result)]).await;
        batches.submit(of("bob", "dealt"), rows(1..=10)).await.unwrap();
        batches.submit(new("some"), rows(1..=40)).await.unwrap();
        let mut claims = Vec::new();
        for claim in take(&one, 4).await {
            match id(&claim) {
                "files:files" | "some:0.0:10" => {
                    put(claim, Verdict::Next).await;
                }
                _ => claims.push(claim),
            }
        }
        assert_eq!(claims.iter().map(id).collect::<BTreeSet<_>>(), ["dealt:0.0:0", "some:0.0:0"].into());
        rig.balanced();
        Self { rig, batches, one, leadership, claims }
    }

    /// What is found, and whether it was repaired.
    async fn found(&self, repair: bool) -> BTreeSet<(Kind, bool)> {
        self.rig.age();
        let found = match repair {
            true => reconcile::repair(&self.rig.store, KEEP).await,
            false => reconcile::check(&self.rig.store, KEEP).await,
        };
        found.unwrap().into_iter().map(|finding| (finding.kind, finding.fate == Fate::Repaired)).collect()
    }

    /// Ends what is left, with a leader at work.
    async fn end(&mut self) {
        for claim in self.claims.drain(..) {
            all_ended(claim, RowEnd::Done).await;
        }
        self.leadership.upkeep(KEEP).await.unwrap().unwrap();
        let other = self.rig.session(POOL, 8).await;
        work_off(&other).await;
        self.rig.balanced();
    }
}

#[tokio::test]
async fn what_disagrees_about_batches_is_found_and_repaired_and_each_row_ends_once() {
    let cases: &[(&[Kind], &str)] = &[
        (
            &[Kind::BatchLost, Kind::PendingLost],
            "DEL drayman:low:bank.post:ann drayman:high:bank.post:ann drayman:tasks:bank.post:ann",
        ),
        (&[Kind::PendingLost], "DEL drayman:high:bank.post:eve"),
        (&[Kind::BatchUnsettled], "DEL batch:jobs:files:files"),
        (&[Kind::BatchUnsettled], "DEL batch:jobs:files:files drayman:batch_parts:files"),
        (&[Kind::RunningLost, Kind::PoolMiscount, Kind::UserMiscount], "DEL drayman:claims drayman:work:{one}"),
        (&[Kind::WorkUnclaimed, Kind::RunningLost, Kind::PoolMiscount, Kind::UserMiscount], "DEL drayman:claims"),
        (&[Kind::SessionGone, Kind::ClaimOrphaned, Kind::ParkedStray], "DEL drayman:session:{one}"),
        (&[Kind::ClaimUnlisted], "DEL drayman:work:{one}"),
    ];
    for (kinds, command) in cases {
        let mut scene = Scene::start().await;
        assert_eq!(scene.found(false).await, BTreeSet::new());
        let words = command.replace("{one}", scene.one.id().as_str());
        let removed = scene.rig.redis(&words.split(' ').collect::<Vec<_>>()).int();
        assert!(removed > 0, "{command}: {:?}", scene.rig.dump());
        let found: BTreeSet<Kind> = scene.found(false).await.into_iter().map(|(kind, _)| kind).collect();
        let wanted: BTreeSet<Kind> = kinds.iter().copied().collect();
        assert!(!found.is_empty() && found.is_subset(&wanted), "{command}: {found:?}");
        let repaired = scene.found(true).await;
        assert!(repaired.iter().all(|(_, repaired)| *repaired), "{command}: {repaired:?}");
        assert_eq!(scene.found(false).await, BTreeSet::new(), "{command}");
        scene.rig.balanced();
        scene.end().await;
        for (id, rows) in [("files", 1), ("dealt", 10), ("some", 40)] {
            let view = view(&scene.batches, id).await;
            assert_eq!((view.status, view.counts), (Status::Done, counts(rows, 0, rows, 0, 0)), "{command}: {id}");
        }
        nothing_is_left(&scene.rig);
    }
}

#[tokio::test]
async fn rows_that_nobody_has_any_more_are_reported_and_an_abort_ends_their_batch() {
    for command in ["DEL drayman:batch_parts:dealt", "DEL batch:jobs:dealt:0.0:0 drayman:batch_parts:dealt"] {
        let mut scene = Scene::start().await;
        scene.rig.redis(&command.split(' ').collect::<Vec<_>>());
        // Whoever works on them writes down nothing, for want of what would say of which rows.
        let at = scene.claims.iter().position(|claim| id(claim) == "dealt:0.0:0").unwrap();
        let claim = scene.claims.remove(at);
        let ends = ended([RowEnd::Done; 10]);
        let _ = claim.finish(part_verdict(), Duration::ZERO, end_fields(&ends), false).await;
        for _ in 0..2 {
            let found = scene.found(true).await;
            assert!(found.contains(&(Kind::BatchPartsLost, false)), "{command}: {found:?}");
        }
        let view = scene.batches.abort(&job_id("dealt")).await.unwrap();
        assert_eq!((view.status, view.counts), (Status::Cancelled, counts(10, 0, 0, 0, 10)), "{command}");
        assert_eq!(scene.found(false).await, BTreeSet::new(), "{command}");
        scene.end().await;
        nothing_is_left(&scene.rig);
    }
}
