//! Batches that nobody looks after: records that were kept long enough, loads that were never finished, state
//! that disagrees.

use std::collections::BTreeSet;

use queue_core::calls::Budget;
use queue_core::leader::Leadership;
use queue_core::reconcile::{Fate, Kind};

use super::*;

const HOUR: Duration = Duration::from_secs(3_600);

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
        let mut left = rig.state().left_of_batch(id);
        assert!(left.remove(&Piece::Job(&format!("{id}:done")).name()).is_some(), "{left:?}");
        let its = [Piece::Batch, Piece::BatchBlocks, Piece::BatchResults, Piece::BatchRows, Piece::Job];
        assert_eq!(left.keys().cloned().collect::<BTreeSet<_>>(), its.map(|piece| piece(id).name()).into());
        let kept = keep.as_millis() as u64;
        for (name, ms) in left {
            assert!(ms.is_some_and(|ms| (kept - 60_000..=kept).contains(&ms)), "{name} stays {ms:?} ms");
        }
    }
    let clean = async |hours: i64, stay: &[&str]| {
        rig.server.shift_clock(hours * 3_600);
        let leadership = rig.lead().await;
        leadership.upkeep(KEEP).await.unwrap().unwrap();
        assert_eq!(rig.state().batches(), stay);
        let listed = batches.list(&Default::default(), 10).await.unwrap();
        assert_eq!(listed.iter().rev().map(|view| view.id.as_str()).collect::<Vec<_>>(), stay);
        for id in ["usual", "short"] {
            let left = rig.state().left_of_batch(id);
            assert_eq!(left.is_empty(), !stay.contains(&id), "{id}: {left:?}");
            let found = batches.view(&job_id(id)).await;
            assert_eq!(matches!(found, Err(BatchError::NotFound(_))), !stay.contains(&id), "{found:?}");
        }
    };
    drop(leadership);
    clean(0, &["usual", "short"]).await;
    // The word to the application of the short one is kept as long as any job.
    rig.state().lose(Piece::Job("short:done"));
    clean(1, &["usual"]).await;
    clean(2, &[]).await;
    assert!(!rig.state().has_any(&[Piece::Finished, Piece::FinishedBooks]));
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
            rig.state().move_end(&id, 4_000_000_000_000 + at as u64);
        }
        let (booked, held) = (rig.state().booked_bytes(id).unwrap(), rig.state().occupied_by_batch(id));
        assert!((50_000..=held + 1_000).contains(&booked), "{booked} of {held}");
    }
    let budget = Budget { retention_ms: HOUR.as_millis() as u64, bytes: 130_000, ..Budget::default() };
    assert_eq!(leadership.upkeep_within(&budget).await.unwrap().unwrap().evicted, 1);
    let left = |id: &str| rig.state().left_of_batch(id).len();
    assert_eq!(["b1", "b2", "b3"].map(left), [1, 6, 6], "of the first, only what was told");
    let budget = Budget { count: 4, ..budget };
    assert_eq!(leadership.upkeep_within(&budget).await.unwrap().unwrap().evicted, 1);
    assert_eq!(["b1", "b2", "b3"].map(left), [1, 1, 6]);
    assert_eq!(statuses(&batches, "b3").await.len(), 50);
    assert_eq!(rig.state().batches(), ["b3"]);
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
    assert!(rig.state().has(Piece::BatchRows("left")));
    assert_eq!((view(&batches, "left").await.status, view(&batches, "left").await.counts.rows), (Status::Held, 0));
    batches.submit(held("held"), rows(1..=3)).await.unwrap();
    batches.submit(new("waits"), rows(1..=40)).await.unwrap();
    let session = rig.session(POOL, 8).await;
    let mut claims = Vec::new();
    while rig.state().has_rows_to_deal("waits") {
        claims.extend(take(&session, 8).await);
    }
    assert_eq!(leadership.sweep(untouched).await.unwrap(), Ok(0));
    rig.age();
    rig.state().set_field("held", "updated_at", "2999-01-01T00:00:00.000Z");
    rig.state().leave_untouched(Piece::Job("held"), 100);
    assert_eq!(leadership.sweep(untouched).await.unwrap(), Ok(1));
    assert_eq!(rig.state().left_of_batch("left"), BTreeMap::new());
    assert_eq!(statuses(&batches, "held").await.len(), 3);
    // One that was held for so long is nobody's, too.
    rig.age();
    assert_eq!(leadership.sweep(untouched).await.unwrap(), Ok(1));
    assert_eq!(rig.state().left_of_batch("held"), BTreeMap::new());
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

    /// Loses pieces of which one was there at least.
    #[track_caller]
    fn lose(&self, pieces: &[Piece<'_>]) {
        let state = self.rig.state();
        assert!(state.has_any(pieces), "{pieces:?}: {:?}", state.digest());
        pieces.iter().for_each(|piece| state.lose(*piece));
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
    // What goes, by the name of the session at work.
    type Lost = fn(&str) -> Vec<Piece<'_>>;
    let all_bands: Lost =
        |_| [Priority::Low, Priority::High, Priority::Normal].map(|band| Piece::Tasks("ann", POOL, band)).into();
    let cases: &[(&[Kind], Lost)] = &[
        (&[Kind::BatchLost, Kind::PendingLost, Kind::LineIndex], all_bands),
        (&[Kind::PendingLost, Kind::LineIndex], |_| vec![Piece::Tasks("eve", POOL, Priority::High)]),
        (&[Kind::BatchUnsettled], |_| vec![Piece::Job("files:files")]),
        (&[Kind::BatchUnsettled], |_| vec![Piece::Job("files:files"), Piece::BatchParts("files")]),
        (&[Kind::RunningLost, Kind::PoolMiscount, Kind::UserMiscount], |one| vec![Piece::Claims, Piece::HeldBy(one)]),
        (&[Kind::WorkUnclaimed, Kind::RunningLost, Kind::PoolMiscount, Kind::UserMiscount], |_| vec![Piece::Claims]),
        (&[Kind::SessionGone, Kind::ClaimOrphaned, Kind::ParkedStray], |one| vec![Piece::Session(one)]),
        (&[Kind::ClaimUnlisted], |one| vec![Piece::HeldBy(one)]),
    ];
    for (kinds, lost) in cases {
        let mut scene = Scene::start().await;
        assert_eq!(scene.found(false).await, BTreeSet::new());
        let one = scene.one.id().to_string();
        let lost = lost(&one);
        scene.lose(&lost);
        let found: BTreeSet<Kind> = scene.found(false).await.into_iter().map(|(kind, _)| kind).collect();
        let wanted: BTreeSet<Kind> = kinds.iter().copied().collect();
        assert!(!found.is_empty() && found.is_subset(&wanted), "{lost:?}: {found:?}");
        let repaired = scene.found(true).await;
        assert!(repaired.iter().all(|(_, repaired)| *repaired), "{lost:?}: {repaired:?}");
        assert_eq!(scene.found(false).await, BTreeSet::new(), "{lost:?}");
        scene.rig.balanced();
        scene.end().await;
        for (id, rows) in [("files", 1), ("dealt", 10), ("some", 40)] {
            let view = view(&scene.batches, id).await;
            assert_eq!((view.status, view.counts), (Status::Done, counts(rows, 0, rows, 0, 0)), "{lost:?}: {id}");
        }
        nothing_is_left(&scene.rig);
    }
}

#[tokio::test]
async fn rows_that_nobody_has_any_more_are_reported_and_an_abort_ends_their_batch() {
    let parts = Piece::BatchParts("dealt");
    for lost in [&[parts][..], &[Piece::Job("dealt:0.0:0"), parts]] {
        let mut scene = Scene::start().await;
        scene.lose(lost);
        // Whoever works on them writes down nothing, for want of what would say of which rows.
        let at = scene.claims.iter().position(|claim| id(claim) == "dealt:0.0:0").unwrap();
        let claim = scene.claims.remove(at);
        let ends = ended([RowEnd::Done; 10]);
        let _ = claim.finish(part_verdict(), Duration::ZERO, end_fields(&ends), false).await;
        for _ in 0..2 {
            let found = scene.found(true).await;
            assert!(found.contains(&(Kind::BatchPartsLost, false)), "{lost:?}: {found:?}");
        }
        let view = scene.batches.abort(&job_id("dealt")).await.unwrap();
        assert_eq!((view.status, view.counts), (Status::Cancelled, counts(10, 0, 0, 0, 10)), "{lost:?}");
        assert_eq!(scene.found(false).await, BTreeSet::new(), "{lost:?}");
        scene.end().await;
        nothing_is_left(&scene.rig);
    }
}

#[tokio::test]
async fn a_release_that_broke_off_behind_its_last_row_ends_no_row_that_is_at_work() {
    let rig = Rig::start().await;
    let (batches, leadership) = (batches(&rig), rig.lead().await);
    let session = rig.session(POOL, 8).await;
    batches.submit(new("b"), rows(1..=5)).await.unwrap();
    let claim = take_one(&session).await;
    // All rows are dealt, and the mark of the release is there still.
    rig.state().set(Piece::Batch("b"), &[("releasing", "then".to_owned())]);
    let found = queue_core::reconcile::repair(&rig.store, KEEP).await.unwrap();
    assert_eq!(
        found.iter().map(|finding| (finding.kind, finding.fate)).collect::<Vec<_>>(),
        [(Kind::BatchBroken, Fate::Repaired)]
    );
    assert_eq!(queue_core::reconcile::repair(&rig.store, KEEP).await.unwrap(), []);
    assert_eq!(view(&batches, "b").await.counts, counts(5, 5, 0, 0, 0));
    rig.balanced();
    drop(leadership);
    assert_eq!(all_ended(claim, RowEnd::Done).await, Finished::Ended);
    assert_eq!(work_off(&session).await, ["b"]);
    assert_eq!(view(&batches, "b").await.counts, counts(5, 0, 5, 0, 0));
    rig.balanced();
}
