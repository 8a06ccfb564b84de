//! Any sequence of anything, told to the scripts and to a plain model of them: every reply and, after each step, every key
//! that decides is as the model says. In the end every job has ended, once.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use proptest::prelude::*;
use queue_core::calls::{Beat, Enqueued, Fields, Finished, Mark, SessionEnd, TakeReply, Upkeep, Verdict};
use queue_core::cancel::{Cancelled, Canceller};
use queue_core::ids::{JobId, SessionId};
use queue_core::leader::Leadership;
use queue_core::library::{TABLE, Version};
use queue_core::session::{Claim, Session};
use testkit::state::{self, State};

use crate::reference::{CAPACITY, Cancel, End, Job, Pool, Reference};
use crate::support::*;

const FAR: Duration = Duration::from_secs(3_600);

#[derive(Clone, Debug)]
enum Step {
    Submit { user: u8, host: u8, delayed: bool },
    SubmitAgain { job: u8 },
    SubmitForeign { user: u8, host: u8, order: u8 },
    PushAgain { job: u8, user: u8, first: bool },
    Take { session: u8, n: usize },
    AskAgain { session: u8 },
    Mark { session: u8, claim: u8, trace: bool },
    End { session: u8, claim: u8, how: End },
    Cancel { job: u8 },
    Close { session: u8 },
    Bury { session: u8 },
    Beat { session: u8 },
    ComesDue { job: u8 },
    Lead,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let ends = [End::Next, End::Back, End::Later, End::Final("failed"), End::Final("done"), End::Final("done")];
    let how = prop::sample::select(ends.to_vec());
    let step = prop_oneof![
        4 => (0..4_u8, 0..3_u8, prop::bool::weighted(0.2))
            .prop_map(|(user, host, delayed)| Step::Submit { user, host, delayed }),
        1 => any::<u8>().prop_map(|job| Step::SubmitAgain { job }),
        3 => (0..4_u8, 0..3_u8, 0..4_u8).prop_map(|(user, host, order)| Step::SubmitForeign { user, host, order }),
        2 => (any::<u8>(), 0..4_u8, any::<bool>()).prop_map(|(job, user, first)| Step::PushAgain { job, user, first }),
        6 => (0..3_u8, 1..4_usize).prop_map(|(session, n)| Step::Take { session, n }),
        1 => (0..3_u8).prop_map(|session| Step::AskAgain { session }),
        2 => (0..3_u8, any::<u8>(), any::<bool>())
            .prop_map(|(session, claim, trace)| Step::Mark { session, claim, trace }),
        6 => (0..3_u8, any::<u8>(), how).prop_map(|(session, claim, how)| Step::End { session, claim, how }),
        2 => any::<u8>().prop_map(|job| Step::Cancel { job }),
        1 => (0..3_u8).prop_map(|session| Step::Close { session }),
        2 => (0..3_u8).prop_map(|session| Step::Bury { session }),
        1 => (0..3_u8).prop_map(|session| Step::Beat { session }),
        1 => any::<u8>().prop_map(|job| Step::ComesDue { job }),
        2 => Just(Step::Lead),
    ];
    prop::collection::vec(step, 1..60)
}

/// A session with the number of its last take and the claims that it got.
struct Worker {
    session: Session,
    take: u64,
    claims: Vec<Claim>,
}

impl Worker {
    fn name(&self) -> &str {
        self.session.id().as_str()
    }
}

/// Redis, and beside it what it should hold.
struct World<'a> {
    rig: &'a Rig,
    state: State,
    leadership: Leadership,
    workers: Vec<Worker>,
    reference: Reference,
}

impl World<'_> {
    fn pick(&self, number: u8) -> Option<String> {
        let at = usize::from(number).checked_rem(self.reference.jobs.len())?;
        self.reference.jobs.keys().nth(at).cloned()
    }

    /// The claim of one of the worker's jobs.
    fn pick_claim(&self, session: u8, number: u8) -> Option<usize> {
        usize::from(number).checked_rem(self.workers[usize::from(session)].claims.len())
    }

    async fn open(&mut self) -> Worker {
        let session = self.rig.session("sql:*", CAPACITY as u32).await;
        self.reference.session_open(session.id().as_str());
        Worker { session, take: 0, claims: Vec::new() }
    }

    /// The ids that the next call finds due, in their order. Only time knows.
    fn due(&mut self) -> Vec<String> {
        self.state.due()
    }

    /// The start tags of all ready users, by pool and user.
    fn tags(&mut self) -> BTreeMap<(String, String), i64> {
        let pools: Vec<String> = (0..3).map(|host| format!("sql:h{host}")).collect();
        let mut tags = BTreeMap::new();
        for pool in pools {
            let ready = whole(self.state.start_tags(&pool));
            tags.extend(ready.into_iter().map(|(user, start)| ((pool.clone(), user), start)));
        }
        tags
    }

    async fn notice(&mut self, user: &str) {
        let ready = self.rig.notice(&[user]).await;
        assert_eq!(ready, self.reference.notice(&BTreeSet::from([user.to_owned()]), &BTreeMap::new()));
    }

    /// What the leader does again and again.
    async fn lead(&mut self) {
        let due = self.due();
        let mut missed = self.state.missing();
        missed.reverse();
        let done = self.leadership.upkeep(FAR).await.unwrap().unwrap();
        let tags = self.tags();
        let found = self.reference.upkeep(&due, &missed, &tags);
        assert_eq!(done, Upkeep { promoted: due.len() as u64, found, ..Upkeep::default() });

        let indexed: BTreeSet<String> = self.state.queued_users().into_iter().collect();
        let ready = scan_index(&self.leadership).await.unwrap();
        let tags = self.tags();
        assert_eq!(ready, self.reference.notice(&indexed, &tags), "by the index");

        let queued = self.reference.queues.keys().cloned().collect();
        let ready = self.leadership.scan_queues().await.unwrap().unwrap();
        let tags = self.tags();
        assert_eq!(ready, self.reference.notice(&queued, &tags), "by their keys");
    }

    async fn take(&mut self, at: usize, n: usize) {
        let due = self.due();
        let worker = &mut self.workers[at];
        worker.take += 1;
        let expected = self.reference.take(worker.session.id().as_str(), worker.take, n, &due);
        let batch = worker.session.take(n).await.unwrap().expect("the session lives");
        let taken: Vec<_> = (batch.claims.iter().map(Claim::job))
            .map(|job| (job.id.to_string(), job.user.to_string(), job.pool.to_string()))
            .collect();
        assert_eq!(taken, expected);
        assert_eq!(batch.due_in.is_some(), !self.reference.due.is_empty());
        let mut latest = 0;
        for claim in &batch.claims {
            let fence = claim.job().fence.0;
            let job = self.reference.jobs.get_mut(id(claim)).unwrap();
            assert!(fence > job.fence && fence > latest, "the fence {fence} of {} after {}", id(claim), job.fence);
            (job.fence, latest) = (fence, fence);
        }
        worker.claims.extend(batch.claims);
    }

    async fn end(&mut self, claim: Claim, how: End) {
        let name = id(&claim).to_owned();
        let reply = match how {
            End::Next => put(claim, Verdict::Next).await,
            End::Back => put(claim, Verdict::Back).await,
            End::Later => put(claim, Verdict::Later { after_ms: 0 }).await,
            End::Final(status) => end(claim, status).await,
        };
        assert_eq!(reply, Finished::Ended, "{name}");
        self.reference.finish(&name, how);
    }

    /// Ends a session, and lets a new one take its place. What the old one says from then on must not count.
    async fn replace(&mut self, at: usize, lost: bool) {
        let fresh = self.open().await;
        let Worker { session, claims, .. } = std::mem::replace(&mut self.workers[at], fresh);
        let expected = self.reference.session_end(session.id().as_str(), lost);
        if lost {
            let beat = self.state.beat(session.id().as_str());
            let (leader, term) = (SessionId::new("leader:1:a").unwrap(), self.leadership.term());
            let reply = self.rig.store.session_reclaim(session.id().as_str(), beat, &leader, term).await.unwrap();
            assert_eq!(reply, Ok(SessionEnd::Ended(expected)));
        } else {
            assert_eq!(session.close().await.unwrap(), expected);
        }
        for claim in claims {
            assert_eq!(claim.pen().mark(&Fields::new().with("status", "stale")).await.unwrap(), Mark::Stale);
            assert_eq!(end(claim, "done").await, Finished::Stale);
        }
    }

    async fn step(&mut self, step: &Step) {
        let rig = self.rig;
        let next = format!("j{:03}", self.reference.jobs.len());
        match step {
            Step::Submit { user, host, delayed } => {
                let (user, host) = (format!("u{user}"), format!("h{host}"));
                self.submit(&next, &user, &host, *delayed).await;
            }
            Step::SubmitAgain { job } => {
                let Some(id) = self.pick(*job) else { return };
                self.submit(&id, "u0", "h0", false).await;
            }
            Step::SubmitForeign { user, host, order } => {
                let (user, host) = (format!("u{user}"), format!("h{host}"));
                self.reference.push(&user, &next, false);
                if *order == 0 {
                    // The id before its hash, with a look between them.
                    rig.state().foreign().push(&user, &next);
                    self.lead().await;
                    rig.state().set(Piece::Job(&next), &[("user", &user), ("host", &host)]);
                    self.reference.jobs.insert(next, Job::new(&user, &host, None));
                } else {
                    rig.submit(&user, &next, &host);
                    self.reference.jobs.insert(next, Job::new(&user, &host, Some("pending")));
                    if *order == 1 {
                        self.notice(&user).await;
                    }
                }
            }
            Step::PushAgain { job, user, first } => {
                let Some(id) = self.pick(*job) else { return };
                let user = format!("u{user}");
                match first {
                    true => rig.state().foreign().push_first(&user, &id),
                    false => rig.state().foreign().push(&user, &id),
                }
                self.reference.push(&user, &id, *first);
                self.notice(&user).await;
            }
            Step::Take { session, n } => self.take(usize::from(*session), *n).await,
            Step::AskAgain { session } => {
                let Worker { session, take, .. } = &self.workers[usize::from(*session)];
                if *take > 0 {
                    let reply =
                        rig.store.take(session.id(), "sql:*", *take, 4, CAPACITY as u32, "jobs", &[]).await.unwrap();
                    let TakeReply::Taken { jobs, .. } = reply else { panic!("the session lives") };
                    let same: BTreeSet<String> = jobs.iter().map(|job| job.id.to_string()).collect();
                    assert_eq!(same, self.reference.taken_by(session.id().as_str(), *take));
                    assert!(jobs.iter().all(|job| job.fence.0 == self.reference.jobs[job.id.as_str()].fence));
                }
            }
            Step::Mark { session, claim, trace } => {
                let Some(at) = self.pick_claim(*session, *claim) else { return };
                let claim = &self.workers[usize::from(*session)].claims[at];
                let fields = if *trace { Fields::new().with("trace", "0 untransacted") } else { Fields::new() };
                let expected = if self.reference.mark(id(claim), *trace) { Mark::CancelAsked } else { Mark::Held };
                assert_eq!(claim.pen().mark(&fields).await.unwrap(), expected);
            }
            Step::End { session, claim, how } => {
                let Some(at) = self.pick_claim(*session, *claim) else { return };
                let claim = self.workers[usize::from(*session)].claims.remove(at);
                self.end(claim, *how).await;
            }
            Step::Cancel { job } => {
                let Some(name) = self.pick(*job) else { return };
                let canceller = Canceller::new(rig.store.clone(), FAR);
                let expected = match self.reference.cancel(&name) {
                    Cancel::Cancelled => Cancelled::AtOnce,
                    Cancel::Requested => Cancelled::Requested,
                    Cancel::Over(status) => Cancelled::TooLate(status),
                };
                assert_eq!(canceller.cancel(&JobId::new(name.as_str()).unwrap()).await.unwrap(), expected, "{name}");
            }
            Step::Close { session } => self.replace(usize::from(*session), false).await,
            Step::Bury { session } => self.replace(usize::from(*session), true).await,
            Step::Beat { session } => {
                let worker = &self.workers[usize::from(*session)];
                let cancels = self.reference.sessions[worker.name()].cancels.clone();
                let Beat::Alive { cancels: told, claims } = worker.session.beat().await.unwrap() else {
                    panic!("the session lives")
                };
                assert_eq!((told.into_iter().collect::<BTreeSet<_>>(), claims), (cancels, vec![]));
            }
            Step::ComesDue { job } => {
                let Some(id) = self.pick(*job) else { return };
                rig.state().make_due(&id);
            }
            Step::Lead => self.lead().await,
        }
        self.compare();
        rig.balanced();
    }

    async fn submit(&mut self, id: &str, user: &str, host: &str, delayed: bool) {
        let mut job = submission(user, id, host);
        job.delay_ms = if delayed { FAR.as_millis() as u64 } else { 0 };
        let replies = self.rig.store.enqueue(&most(1_000, 16_384), &[job]).await.unwrap();
        let queued = self.reference.enqueue(id, user, host, delayed);
        assert_eq!(replies, [if queued { Enqueued::Queued } else { Enqueued::Exists }]);
    }

    /// Redis holds what the model says.
    fn compare(&mut self) {
        let reference = self.reference.clone();
        let set = |ids: Vec<String>| ids.into_iter().collect::<BTreeSet<_>>();

        for (id, expected) in &reference.jobs {
            let mut hash = self.state.record(id);
            let number = |field| hash.get(field).map_or(0, |text: &String| text.parse().unwrap());
            let job = Job {
                fence: number("fence"),
                unclean: number("unclean"),
                trace: hash.contains_key("trace"),
                cancel_requested: hash.contains_key("cancel_requested_at"),
                pool: format!("sql:{}", hash["host"]),
                status: hash.remove("status"),
                owner: hash.remove("user").unwrap(),
            };
            assert_eq!(&job, expected, "{id}");
        }
        let queues: BTreeMap<String, VecDeque<String>> =
            self.state.queues().into_iter().map(|(user, ids)| (user, ids.into())).collect();
        assert_eq!(queues, reference.queues);

        let expected: Vec<state::Claim> = (reference.claims.iter())
            .map(|(id, claim)| state::Claim {
                id: id.clone(),
                session: claim.session.to_string(),
                fence: reference.jobs[id].fence,
                pool: claim.pool.to_string(),
                user: claim.user.to_string(),
                charged: "1000000".into(),
                finish_tag: claim.tag.to_string(),
                fairness: "jobs".into(),
            })
            .collect();
        assert_eq!(self.state.claims(), expected);

        for (pool, expected) in &reference.pools {
            let hash = self.state.fields(Piece::Pool(pool));
            let number = |field| hash.get(field).map(|text| text.parse::<i64>().unwrap());
            let found = Pool {
                running: number("running").unwrap_or(0) as usize,
                v: number("v").unwrap_or(0),
                newest: number("newest"),
                pass: number("pass").unwrap_or(0),
                ready: whole(self.state.start_tags(pool)),
                debt: whole(self.state.finish_tags(pool)),
                busy: self.state.running_in(pool).into_iter().map(|(user, count)| (user, count as usize)).collect(),
            };
            assert_eq!(&found, expected, "{pool}");
        }
        assert_eq!(self.state.turns(), reference.listed(), "turns");

        for (session, expected) in &reference.sessions {
            assert_eq!(set(self.state.asked_to_cancel(session)), expected.cancels, "{session}");
        }
        assert_eq!(set(self.state.scheduled()), reference.due);
        assert_eq!(set(self.state.finished()), reference.finished);
        let missing: BTreeSet<_> = self.state.missing().into_iter().collect();
        assert_eq!(missing, reference.missing.iter().cloned().collect());
        let (mut rejected, mut expected) = (self.rig.rejected(), reference.rejected);
        rejected.sort();
        expected.sort();
        assert_eq!(rejected, expected);
    }

    /// Whatever waits for a time has waited long enough.
    async fn look_at_all(&mut self) {
        for id in self.reference.due.clone() {
            self.rig.state().make_due(&id);
        }
        self.step(&Step::Lead).await;
        self.step(&Step::Take { session: 0, n: 8 }).await;
    }

    /// All that is held ends, and then all that waits.
    async fn drain(&mut self) {
        for _ in 0..=self.reference.jobs.len() {
            for at in 0..self.workers.len() {
                while !self.workers[at].claims.is_empty() {
                    self.step(&Step::End { session: at as u8, claim: 0, how: End::Final("done") }).await;
                }
            }
            if self.reference.jobs.values().all(|job| job.final_status().is_some()) {
                return;
            }
            self.look_at_all().await;
        }
        panic!("each round ends a job: {:#?}", self.reference);
    }
}

/// Tags as whole numbers, which they are where each job costs the same.
fn whole(tags: BTreeMap<String, f64>) -> BTreeMap<String, i64> {
    let number = |tag: f64| {
        assert_eq!(tag.fract(), 0.0, "a whole number");
        tag as i64
    };
    tags.into_iter().map(|(user, tag)| (user, number(tag))).collect()
}

/// Has a call break off somewhere, in another database: nothing of it may be left in the library for the next.
fn break_off(rig: &Rig, at: usize) {
    // Keys of ours that hold something else, which a call meets when it has begun.
    let state = rig.server.state(DB + 1);
    for piece in [Piece::Claims, Piece::Job("a"), Piece::Queue("a")] {
        state.spoil(piece);
    }
    state.set(Piece::Session("s"), &[("take", "1"), ("beat", "1")]);
    let function = TABLE[at % TABLE.len()].qualified(Version::OURS);
    let args = ["s", "sql:*", "2", "5", "9", "jobs", "a", "a", "0", "x"];
    rig.server.raw_db(
        DB + 1,
        &[&["FCALL", &*function, "1", &rig.store.keys().prefix(), "0"][..], &args[..at % (args.len() + 1)]].concat(),
    );
}

async fn check(rig: &Rig, steps: &[Step]) {
    rig.redis(&["FLUSHDB"]);
    let (state, leadership) = (rig.state(), rig.lead().await);
    let mut world = World { rig, state, leadership, workers: Vec::new(), reference: Reference::default() };
    for _ in 0..3 {
        let worker = world.open().await;
        world.workers.push(worker);
    }
    for (at, step) in steps.iter().enumerate() {
        break_off(rig, 31 * at + steps.len());
        world.step(step).await;
    }
    world.drain().await;
    // What has ended may still have stood somewhere.
    world.look_at_all().await;
    assert!(!rig.state().has_any(&[Piece::Scheduled, Piece::Missing, Piece::Claims]));
}

#[test]
fn whatever_happens_no_job_is_lost_none_ends_twice_and_the_books_balance() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let rig = runtime.block_on(Rig::start());
    let config =
        ProptestConfig { cases: 40, failure_persistence: None, max_shrink_iters: 300, ..ProptestConfig::default() };
    proptest!(config, |(steps in steps())| {
        runtime.block_on(check(&rig, &steps));
    });
}
