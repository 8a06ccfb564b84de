//! Any sequence of anything: the books balance after each step, and in the end every job has ended, once.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;
use queue_core::cancel::{Cancelled, Canceller};
use queue_core::ids::{JobId, SessionId};
use queue_core::leader::Leadership;
use queue_core::scripts::{Finished, TakeReply, Verdict};
use queue_core::session::{Claim, Session};

use crate::support::*;

#[derive(Clone, Debug)]
enum Step {
    Submit { user: u8, host: u8, delayed: bool },
    SubmitForeign { user: u8, host: u8, order: u8 },
    PushAgain { job: u8, user: u8, first: bool },
    Take { session: u8, n: usize },
    AskAgain { session: u8 },
    End { session: u8, claim: u8, how: u8 },
    Cancel { job: u8 },
    Close { session: u8 },
    Bury { session: u8 },
    Beat { session: u8 },
    Lead,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..4_u8, 0..3_u8, prop::bool::weighted(0.2))
            .prop_map(|(user, host, delayed)| Step::Submit { user, host, delayed }),
        3 => (0..4_u8, 0..3_u8, 0..4_u8).prop_map(|(user, host, order)| Step::SubmitForeign { user, host, order }),
        2 => (any::<u8>(), 0..4_u8, any::<bool>()).prop_map(|(job, user, first)| Step::PushAgain { job, user, first }),
        6 => (0..3_u8, 1..4_usize).prop_map(|(session, n)| Step::Take { session, n }),
        1 => (0..3_u8).prop_map(|session| Step::AskAgain { session }),
        6 => (0..3_u8, any::<u8>(), 0..6_u8).prop_map(|(session, claim, how)| Step::End { session, claim, how }),
        1 => any::<u8>().prop_map(|job| Step::Cancel { job }),
        1 => (0..3_u8).prop_map(|session| Step::Close { session }),
        1 => (0..3_u8).prop_map(|session| Step::Bury { session }),
        1 => (0..3_u8).prop_map(|session| Step::Beat { session }),
        2 => Just(Step::Lead),
    ];
    prop::collection::vec(step, 1..60)
}

/// What should be true, kept beside Redis.
struct World<'a> {
    rig: &'a Rig,
    leadership: Leadership,
    sessions: Vec<(Session, u64, Vec<Claim>)>,
    /// Claims of sessions that were buried: what they say must not count.
    stale: Vec<Claim>,
    /// Each job's owner, and how it ended.
    jobs: BTreeMap<String, (String, Option<&'static str>)>,
}

impl World<'_> {
    fn pick(&self, number: u8) -> Option<String> {
        let at = usize::from(number).checked_rem(self.jobs.len())?;
        self.jobs.keys().nth(at).cloned()
    }

    fn ended(&mut self, id: &str, how: &'static str) {
        let job = self.jobs.get_mut(id).expect("a job that was submitted");
        assert_eq!(job.1, None, "{id} ended before");
        job.1 = Some(how);
    }

    async fn look(&self) {
        self.leadership.upkeep(Duration::from_secs(3_600)).await.unwrap().unwrap();
        self.leadership.scan_index().await.unwrap().unwrap();
        self.leadership.scan_queues().await.unwrap().unwrap();
    }

    fn take_in(&mut self, at: usize, claims: Vec<Claim>) {
        for claim in claims {
            let job = &self.jobs[id(&claim)];
            assert_eq!((claim.job().user.as_str(), job.1), (job.0.as_str(), None), "{}", id(&claim));
            let held = self.sessions.iter().flat_map(|session| &session.2);
            assert!(held.into_iter().all(|other| id(other) != id(&claim)), "{} is held twice", id(&claim));
            self.sessions[at].2.push(claim);
        }
    }

    async fn end(&mut self, claim: Claim, how: u8) {
        let name = id(&claim).to_owned();
        let reply = match how {
            0 => put(claim, Verdict::Next).await,
            1 => put(claim, Verdict::Back).await,
            2 => put(claim, Verdict::Later { after_ms: 0 }).await,
            3 => end(claim, "failed").await,
            _ => end(claim, "done").await,
        };
        assert_eq!(reply, Finished::Ended, "{name}");
        match how {
            0..=2 => {}
            3 => self.ended(&name, "failed"),
            _ => self.ended(&name, "done"),
        }
    }

    async fn step(&mut self, step: &Step) {
        let rig = self.rig;
        let next = format!("j{:03}", self.jobs.len());
        match step {
            Step::Submit { user, host, delayed } => {
                let mut job = submission(&format!("u{user}"), &next, &format!("h{host}"));
                job.delay_ms = u64::from(*delayed);
                rig.store.enqueue(1_000, 16_384, &[job]).await.unwrap();
                self.jobs.insert(next, (format!("u{user}"), None));
            }
            Step::SubmitForeign { user, host, order } => {
                let (user, host) = (format!("u{user}"), format!("h{host}"));
                if *order == 0 {
                    // The id before its hash, with a look between them.
                    rig.redis(&["LPUSH", &queue_key(&user), &next]);
                    self.look().await;
                    rig.redis(&["HSET", &job_key(&next), "user", &user, "host", &host]);
                } else {
                    rig.submit(&user, &next, &host);
                    if *order == 1 {
                        rig.notice(&[&user]).await;
                    }
                }
                self.jobs.insert(next, (user, None));
            }
            Step::PushAgain { job, user, first } => {
                let Some(id) = self.pick(*job) else { return };
                let user = format!("u{user}");
                rig.redis(&[if *first { "RPUSH" } else { "LPUSH" }, &queue_key(&user), &id]);
                rig.notice(&[&user]).await;
            }
            Step::Take { session, n } => {
                let at = usize::from(*session);
                self.sessions[at].1 += 1;
                let claims = take(&self.sessions[at].0, *n).await;
                assert!(claims.len() <= *n);
                self.take_in(at, claims);
            }
            Step::AskAgain { session } => {
                let (session, number, held) = &self.sessions[usize::from(*session)];
                if *number > 0 {
                    let reply = rig.store.take(session.id(), "sql:*", *number, 4, 2, "jobs").await.unwrap();
                    let TakeReply::Taken { jobs, .. } = reply else { panic!("the session lives") };
                    for job in jobs {
                        assert!(held.iter().any(|claim| claim.job().id == job.id && claim.job().fence == job.fence));
                    }
                }
            }
            Step::End { session, claim, how } => {
                let claims = &mut self.sessions[usize::from(*session)].2;
                let Some(at) = usize::from(*claim).checked_rem(claims.len()) else { return };
                let claim = claims.remove(at);
                self.end(claim, *how).await;
            }
            Step::Cancel { job } => {
                let Some(name) = self.pick(*job) else { return };
                let canceller = Canceller::new(rig.store.clone(), Duration::from_secs(3_600));
                let running = self.sessions.iter().flat_map(|session| &session.2).any(|claim| id(claim) == name);
                let ended = self.jobs[&name].1;
                match canceller.cancel(&JobId::new(name.as_str()).unwrap()).await.unwrap() {
                    Cancelled::AtOnce => {
                        assert!(!running, "{name} runs");
                        self.ended(&name, "cancelled");
                    }
                    Cancelled::Requested => assert!(running, "{name} does not run"),
                    Cancelled::TooLate(status) => assert_eq!(Some(status.as_str()), ended, "{name}"),
                    Cancelled::NotFound => panic!("{name} was submitted"),
                }
            }
            Step::Close { session } => {
                let fresh = (rig.session("sql:*", 2).await, 0, Vec::new());
                let (session, _, claims) = std::mem::replace(&mut self.sessions[usize::from(*session)], fresh);
                assert_eq!(session.close().await.unwrap(), claims.len() as u64);
                self.stale.extend(claims);
            }
            Step::Bury { session } => {
                let fresh = (rig.session("sql:*", 2).await, 0, Vec::new());
                let (session, _, claims) = std::mem::replace(&mut self.sessions[usize::from(*session)], fresh);
                let key = format!("drayman:session:{}", session.id());
                let beat = rig.redis(&["HGET", &key, "beat"]).text().parse().unwrap();
                let leader = SessionId::new("leader:1:a").unwrap();
                let term = self.leadership.term();
                rig.store.session_reclaim(session.id().as_str(), beat, &leader, term).await.unwrap().unwrap();
                self.stale.extend(claims);
            }
            Step::Beat { session } => drop(self.sessions[usize::from(*session)].0.beat().await.unwrap()),
            Step::Lead => self.look().await,
        }
        while let Some(claim) = self.stale.pop() {
            assert_eq!(end(claim, "done").await, Finished::Stale);
        }
        rig.balanced();
    }
}

async fn check(rig: &Rig, steps: &[Step]) {
    rig.redis(&["FLUSHDB"]);
    let mut sessions = Vec::new();
    for _ in 0..3 {
        sessions.push((rig.session("sql:*", 2).await, 0, Vec::new()));
    }
    let leadership = rig.lead().await;
    let mut world = World { rig, leadership, sessions, stale: Vec::new(), jobs: BTreeMap::new() };
    for step in steps {
        world.step(step).await;
    }
    // All that is held ends, and then all that waits.
    for at in 0..3 {
        for claim in std::mem::take(&mut world.sessions[at].2) {
            world.end(claim, 5).await;
        }
    }
    testkit::eventually("every job to end", LIMIT, async || {
        world.look().await;
        for claim in take(&world.sessions[0].0, 8).await {
            world.end(claim, 5).await;
        }
        world.jobs.values().all(|job| job.1.is_some()).then_some(())
    })
    .await;
    for (id, (_, how)) in &world.jobs {
        assert_eq!(rig.status(id), how.unwrap(), "{id}");
    }
    assert!(take(&world.sessions[0].0, 8).await.is_empty());
    assert_eq!(rig.redis(&["EXISTS", "drayman:due", "drayman:missing", "drayman:claims"]).int(), 0);
    rig.balanced();
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
