//! Any sequence of calls about one tracked job, by holders that are late, lost or say everything twice, told to the scripts and to a
//! plain model of them: every reply and, after each step, the record and its places in the indexes are as the model says.

use std::collections::BTreeMap;

use proptest::prelude::*;
use queue_core::library::{Function, TRACKER_CREATE, TRACKER_END, TRACKER_RENEW, TRACKER_SET, TRACKER_START};
use queue_core::reply::Reply;

use crate::support::*;

/// Attempts are named by the number of their start.
#[derive(Clone, Debug)]
enum Step {
    Create,
    Start { most: u32, ready: bool },
    StartAgain { attempt: u8 },
    Renew { attempt: u8 },
    End { attempt: u8, well: bool },
    Expire,
    Set { to: &'static str },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        1 => Just(Step::Create),
        6 => (0..5_u32, any::<bool>()).prop_map(|(most, ready)| Step::Start { most, ready }),
        2 => any::<u8>().prop_map(|attempt| Step::StartAgain { attempt }),
        2 => any::<u8>().prop_map(|attempt| Step::Renew { attempt }),
        7 => (any::<u8>(), prop::bool::weighted(0.1)).prop_map(|(attempt, well)| Step::End { attempt, well }),
        4 => Just(Step::Expire),
        3 => prop::sample::select(vec!["pending", "ignored", "77"]).prop_map(|to| Step::Set { to }),
    ];
    prop::collection::vec(step, 1..60)
}

/// What the record should say.
#[derive(Clone, Debug)]
struct Job {
    status: String,
    retry: u32,
    lock: Option<usize>,
    expired: bool,
    most: u32,
}

#[derive(Debug, Default)]
struct Model {
    job: Option<Job>,
    /// Attempts that are over, with how they ended; nothing where they were lost.
    over: BTreeMap<usize, Option<(String, u32)>>,
}

impl Model {
    /// The attempt under an expired lock is lost.
    fn lose(job: &mut Job, over: &mut BTreeMap<usize, Option<(String, u32)>>) {
        if let Some(lost) = job.lock.take() {
            over.insert(lost, None);
            job.retry += 1;
        }
    }

    fn start(&mut self, attempt: usize, most: u32, ready: bool) -> String {
        let Some(job) = &mut self.job else { return "missing".into() };
        if job.lock == Some(attempt) {
            job.expired = false;
            return format!("started {}", job.retry);
        }
        if self.over.contains_key(&attempt) {
            return "lost".into();
        }
        match (job.lock, job.status.as_str()) {
            (Some(holder), _) if !job.expired => return format!("locked lock-{holder};"),
            (_, "succeeded" | "ignored") => return job.status.clone(),
            (_, "77") if !ready => return "not_ready 77".into(),
            _ => {}
        }
        if job.lock.is_some() {
            Self::lose(job, &mut self.over);
            if most > 0 && job.retry >= most {
                job.status = "ignored".into();
                return "ignored".into();
            }
        }
        *job = Job { status: "in_progress".into(), retry: job.retry, lock: Some(attempt), expired: false, most };
        format!("started {}", job.retry)
    }

    fn renew(&mut self, attempt: usize) -> String {
        match &mut self.job {
            Some(job) if job.lock == Some(attempt) => {
                job.expired = false;
                "held".into()
            }
            _ => "lost".into(),
        }
    }

    fn end(&mut self, attempt: usize, well: bool) -> String {
        if let Some(job) = self.job.as_mut().filter(|job| job.lock == Some(attempt)) {
            job.lock = None;
            job.retry = if well { 0 } else { job.retry + 1 };
            let ignored = job.most > 0 && job.retry >= job.most;
            job.status = if well {
                "succeeded"
            } else if ignored {
                "ignored"
            } else {
                "failed"
            }
            .into();
            self.over.insert(attempt, Some((job.status.clone(), job.retry)));
        }
        match self.over.get(&attempt) {
            Some(Some((status, retry))) => format!("ended {status} {retry}"),
            _ => "lost".into(),
        }
    }

    fn set(&mut self, to: &str) -> String {
        let Some(job) = &mut self.job else { return "missing".into() };
        if job.status == "succeeded" {
            return "succeeded".into();
        }
        if let Some(holder) = job.lock.filter(|_| !job.expired) {
            return format!("locked lock-{holder};");
        }
        if job.status != to {
            Self::lose(job, &mut self.over);
            job.status = to.into();
            if to == "pending" {
                job.retry = 0;
            }
        }
        "set".into()
    }
}

struct World<'a> {
    rig: &'a Rig,
    model: Model,
    /// Of each start that was made: at how many failures the job is ignored, whether it begins from 77, and its fence.
    starts: Vec<(u32, bool, u64)>,
}

impl World<'_> {
    async fn call(&self, function: &'static Function, args: &[&str]) -> Vec<String> {
        let args = ["t", "job"].iter().chain(args).map(|arg| arg.as_bytes().to_vec()).collect();
        match self.rig.store.call(function, args).await.unwrap() {
            Reply::Array(items) => items.into_iter().map(|item| item.lossy().unwrap()).collect(),
            word => vec![word.lossy().unwrap()],
        }
    }

    /// Sends a start, and returns its reply without the numbers that only the server knows.
    async fn start(&mut self, attempt: usize) -> String {
        let (most, ready, fence) = self.starts[attempt];
        let (lock, most) = (format!("lock-{attempt};"), most.to_string());
        let args = [lock.as_str(), "60000", &most, if ready { "77" } else { "78" }];
        let reply = self.call(&TRACKER_START, &args).await;
        match reply[0].as_str() {
            "started" => {
                let given: u64 = reply[1].parse().unwrap();
                let others = self.starts.iter().map(|start| start.2).max().unwrap_or(0);
                assert!(given == fence || given > others, "a later holder has the greater fence");
                self.starts[attempt].2 = given;
                format!("started {}", reply[2])
            }
            "locked" | "not_ready" => format!("{} {}", reply[0], reply[1]),
            _ => reply[0].clone(),
        }
    }

    async fn step(&mut self, step: &Step) {
        let nth = |attempt: u8| usize::from(attempt) % self.starts.len().max(1);
        let (found, wanted) = match *step {
            Step::Create => {
                let found = self.call(&TRACKER_CREATE, &["pending", "10 20 30 40 50", "0", "{}"]).await.remove(0);
                let wanted = if self.model.job.is_some() { "exists" } else { "created" };
                self.model.job.get_or_insert_with(|| Job {
                    status: "pending".into(),
                    retry: 0,
                    lock: None,
                    expired: false,
                    most: 0,
                });
                (found, wanted.to_owned())
            }
            Step::Start { most, ready } => {
                let attempt = self.starts.len();
                self.starts.push((most, ready, 0));
                (self.start(attempt).await, self.model.start(attempt, most, ready))
            }
            _ if self.starts.is_empty() => return,
            Step::StartAgain { attempt } => {
                let attempt = nth(attempt);
                let (most, ready, _) = self.starts[attempt];
                (self.start(attempt).await, self.model.start(attempt, most, ready))
            }
            Step::Renew { attempt } => {
                let attempt = nth(attempt);
                let (lock, fence) = (format!("lock-{attempt};"), self.starts[attempt].2.to_string());
                (self.call(&TRACKER_RENEW, &[&lock, &fence, "60000"]).await.join(" "), self.model.renew(attempt))
            }
            Step::End { attempt, well } => {
                let attempt = nth(attempt);
                let (lock, fence) = (format!("lock-{attempt};"), self.starts[attempt].2.to_string());
                let outcome = if well { "succeeded" } else { "failed" };
                let found = self.call(&TRACKER_END, &[&lock, &fence, outcome, "", "{}", "x"]).await;
                (found.join(" "), self.model.end(attempt, well))
            }
            Step::Expire => {
                if let Some(job) = self.model.job.as_mut().filter(|job| job.lock.is_some()) {
                    job.expired = true;
                    self.rig.state().expire_lock("t", "job");
                }
                return;
            }
            Step::Set { to } => {
                let mut found = self.call(&TRACKER_SET, &[to]).await;
                found.truncate(2);
                (found.join(" "), self.model.set(to))
            }
        };
        assert_eq!(found, wanted, "{step:?}");
        self.compare();
    }

    /// The record, and the indexes in which it stands.
    fn compare(&self) {
        let Some(job) = &self.model.job else {
            assert!(self.rig.dump().is_empty());
            return;
        };
        let state = self.rig.state();
        let record = state.fields(Piece::Tracked("t", "job"));
        let lock = job.lock.map(|attempt| format!("lock-{attempt};"));
        assert_eq!(
            (&record["status"], &record["retry"], record.get("lock")),
            (&job.status, &job.retry.to_string(), lock.as_ref())
        );
        let code = match job.status.as_str() {
            "pending" => "10",
            "in_progress" => "20",
            "failed" => "30",
            "succeeded" => "40",
            "ignored" => "50",
            own => own,
        };
        assert_eq!(record["code"], code);
        assert_eq!(state.tracked("t"), BTreeMap::from([(job.status.clone(), vec!["job".to_owned()])]));
        assert_eq!(!state.tracked_locks("t").is_empty(), job.lock.is_some());
    }
}

async fn check(rig: &Rig, steps: &[Step]) {
    rig.redis(&["FLUSHDB"]);
    let mut world = World { rig, model: Model::default(), starts: Vec::new() };
    for step in [&[Step::Start { most: 0, ready: false }, Step::Create], steps].concat() {
        world.step(&step).await;
    }
}

#[test]
fn whatever_holders_do_the_books_of_a_tracked_job_are_right() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let rig = runtime.block_on(Rig::start());
    let config =
        ProptestConfig { cases: 100, failure_persistence: None, max_shrink_iters: 300, ..ProptestConfig::default() };
    proptest!(config, |(steps in steps())| {
        runtime.block_on(check(&rig, &steps));
    });
}
