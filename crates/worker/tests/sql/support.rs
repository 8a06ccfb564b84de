//! What the tests of the SQL executor share.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use queue_core::ids::{Fence, JobId, User};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use worker::execute::sql::SqlExecutor;
use worker::execute::sql::databases::Databases;
use worker::execute::{ClaimLost, End, Executor, Failure, Ledger, Report, Target, Trace, Work};

/// A claim that does as a test says and keeps what it was told.
#[derive(Default)]
pub struct Claim {
    pub lost: AtomicBool,
    /// Lost once this many questions were answered.
    pub lost_after: Option<usize>,
    pub asked: AtomicU64,
    pub traces: Mutex<Vec<Trace>>,
    /// Notes are kept and then never answered.
    pub hang_at_note: bool,
    pub hanging: Notify,
}

impl Claim {
    pub fn lost_after(count: usize) -> Self {
        Claim { lost_after: Some(count), ..Claim::default() }
    }

    pub fn hang_at_note() -> Self {
        Claim { hang_at_note: true, ..Claim::default() }
    }

    pub fn traces(&self) -> Vec<Trace> {
        self.traces.lock().unwrap().clone()
    }

    fn answer(&self) -> Result<(), ClaimLost> {
        let asked = self.asked.fetch_add(1, Ordering::SeqCst) as usize;
        if self.lost.load(Ordering::SeqCst) || self.lost_after.is_some_and(|count| asked >= count) {
            return Err(ClaimLost);
        }
        Ok(())
    }
}

#[async_trait]
impl Ledger for Claim {
    async fn confirm(&self) -> Result<(), ClaimLost> {
        self.answer()
    }

    async fn note(&self, trace: Trace) -> Result<(), ClaimLost> {
        self.answer()?;
        self.traces.lock().unwrap().push(trace);
        if self.hang_at_note {
            self.hanging.notify_one();
            std::future::pending::<()>().await;
        }
        Ok(())
    }
}

pub fn work(target: Target, sql: &str) -> Work {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    Work {
        job: JobId::generate(),
        user: User::new("ann").unwrap(),
        fence: Fence(1_760_000_000_000_000 + NEXT.fetch_add(1, Ordering::SeqCst)),
        step: "0".into(),
        sql: sql.into(),
        timeout: Duration::from_secs(20),
        target,
        earlier: None,
        takes_over: false,
    }
}

pub fn executor(databases: Databases) -> SqlExecutor {
    SqlExecutor::new(databases).unwrap()
}

pub async fn run(executor: &SqlExecutor, work: Work) -> End {
    executor.execute(work, &Claim::default(), CancellationToken::new()).await
}

pub fn done(end: End) -> Report {
    match end {
        End::Done(report) => report,
        other => panic!("not done: {other:?}"),
    }
}

pub fn failed(end: End) -> Failure {
    match end {
        End::Failed(failure) => failure,
        other => panic!("not failed: {other:?}"),
    }
}

/// Waits until `what` holds.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    testkit::eventually(what, async || holds().await.then_some(())).await;
}
