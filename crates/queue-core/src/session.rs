//! A worker's registration, the jobs that it takes under it, and how each of them ends.
//!
//! [`Session::take`] returns [`Claim`]s. A claim is the right to end one taken job; ending it consumes it, so that finishing
//! twice does not compile. What a stale holder writes changes nothing.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use crate::calls::{Beat, Capacity, Fields, Finish, Finished, Mark, TakeReply, Taken, Verdict};
use crate::error::Error;
use crate::group::Group;
use crate::ids::{Fence, JobId, Pool, PoolPattern, SessionId};
use crate::store::Store;

/// Most jobs that a worker should take in one call, and most of which it ends in one: Redis does nothing else meanwhile.
pub const TAKE_MAX: usize = 32;

/// Most pools that one call gives a capacity.
const POOLS_PAGE: usize = 200;

/// What a session serves and how it takes.
#[derive(Debug, Clone)]
pub struct Service {
    /// The pools that it takes from.
    pub pools: Vec<PoolPattern>,
    /// Most jobs that run at once in a pool, over all workers, where the pool has no number of its own.
    pub default_capacity: u32,
    /// Numbers of pools of their own.
    pub capacities: Vec<(Pool, u32)>,
    /// What a job costs its user.
    pub fairness: Fairness,
}

impl Service {
    /// The patterns as one text, as the keys have it.
    pub fn text(&self) -> String {
        service_of(&self.pools)
    }
}

fn service_of(pools: &[PoolPattern]) -> String {
    pools.iter().map(PoolPattern::as_str).collect::<Vec<_>>().join(" ")
}

/// What a job costs its user.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fairness {
    /// Each taken job the same.
    #[default]
    Jobs,
    /// The time that it runs: expected at take, corrected at finish.
    Time,
}

impl Fairness {
    fn word(self) -> &'static str {
        match self {
            Fairness::Jobs => "jobs",
            Fairness::Time => "time",
        }
    }
}

/// The session is not registered any more: it was silent for too long and its jobs are others'.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the session is not registered any more")]
pub struct SessionLost;

/// One registration of a running worker.
#[derive(Debug)]
pub struct Session {
    shared: Arc<Shared>,
    take_number: AtomicU64,
    /// The last take's answer was lost: the same number is asked for again.
    take_open: std::sync::atomic::AtomicBool,
}

#[derive(Debug)]
struct Shared {
    store: Store,
    id: SessionId,
    /// The pools that it serves. A change waits for the take under way.
    service_text: Mutex<String>,
    fairness: Fairness,
    default_capacity: AtomicU32,
    /// The pools to which the configuration gives numbers of their own.
    capacities: Mutex<Vec<(Pool, u32)>>,
    held: AtomicUsize,
    finishes: Group<(Finish, bool), Result<Finished, Error>>,
    /// Fires when nothing more is to be waited for: finishes that Redis has not answered are given up.
    abandon: CancellationToken,
}

/// What a take found.
#[derive(Debug)]
pub struct Batch {
    /// The jobs, each with its claim.
    pub claims: Vec<Claim>,
    /// How long until the next scheduled job of any pool is due.
    pub due_in: Option<Duration>,
}

impl Session {
    /// Registers.
    pub async fn open(store: Store, id: SessionId, service: Service, host: &str, pid: u32) -> Result<Self, Error> {
        let service_text = service.text();
        store.session_open(&id, &service_text, host, pid, &service.capacities).await?;
        let abandon = CancellationToken::new();
        let finishes = {
            let (store, id, abandon) = (store.clone(), id.clone(), abandon.clone());
            Group::start(TAKE_MAX, move |ends: Vec<(Finish, bool)>| {
                let (store, id, abandon) = (store.clone(), id.clone(), abandon.clone());
                async move { send_finishes(&store, &id, &abandon, ends).await }
            })
        };
        let shared = Shared {
            store,
            id,
            service_text: service_text.into(),
            fairness: service.fairness,
            default_capacity: service.default_capacity.into(),
            capacities: service.capacities.into(),
            held: AtomicUsize::new(0),
            finishes,
            abandon,
        };
        Ok(Self { shared: Arc::new(shared), take_number: AtomicU64::new(0), take_open: false.into() })
    }

    /// Its id.
    pub fn id(&self) -> &SessionId {
        &self.shared.id
    }

    /// How many claims are held.
    pub fn held(&self) -> usize {
        self.shared.held.load(Ordering::SeqCst)
    }

    /// Takes up to `n` jobs. After an error the next call asks for the same take again, so that no answer is lost.
    pub async fn take(&self, n: usize) -> Result<Result<Batch, SessionLost>, Error> {
        self.take_within(n, &[]).await
    }

    /// The same, and of some pools no more than there is room for here.
    pub async fn take_within(&self, n: usize, room: &[(Pool, usize)]) -> Result<Result<Batch, SessionLost>, Error> {
        let shared = &self.shared;
        if !self.take_open.swap(true, Ordering::SeqCst) {
            self.take_number.fetch_add(1, Ordering::SeqCst);
        }
        let number = self.take_number.load(Ordering::SeqCst);
        let default_capacity = shared.default_capacity.load(Ordering::SeqCst);
        let service_text = shared.service_text.lock().await;
        let reply = shared
            .store
            .take(&shared.id, &service_text, number, n, default_capacity, shared.fairness.word(), room)
            .await?;
        if let TakeReply::Taken { jobs, unreadable, .. } = &reply
            && let Some(reason) = unreadable.first()
        {
            tracing::error!(
                reason,
                jobs = unreadable.len(),
                "jobs were handed out that can't be read, they are set aside"
            );
            shared.store.refuse(&shared.id, number, &format!("a worker can't read it: {reason}"), jobs).await?;
        }
        self.take_open.store(false, Ordering::SeqCst);
        match reply {
            TakeReply::Lost => Ok(Err(SessionLost)),
            TakeReply::Taken { jobs, due_in_ms, .. } => {
                shared.held.fetch_add(jobs.len(), Ordering::SeqCst);
                let claims = jobs.into_iter().map(|job| Claim { job: Arc::new(job), shared: shared.clone() }).collect();
                Ok(Ok(Batch { claims, due_in: due_in_ms.map(Duration::from_millis) }))
            }
        }
    }

    /// Serves other pools from now on. After an error it may or may not.
    pub async fn serve(&self, pools: &[PoolPattern]) -> Result<Result<(), SessionLost>, Error> {
        let mut service_text = self.shared.service_text.lock().await;
        let text = service_of(pools);
        if *service_text == text {
            return Ok(Ok(()));
        }
        if !self.shared.store.session_serve(&self.shared.id, &text).await? {
            return Ok(Err(SessionLost));
        }
        *service_text = text;
        Ok(Ok(()))
    }

    /// Gives pools other capacities from now on. Those that had a number of their own and have none any more get the default.
    pub async fn set_capacities(&self, default: u32, pools: &[(Pool, u32)]) -> Result<(), Error> {
        let mut known = self.shared.capacities.lock().await;
        let gone = known.iter().filter(|(pool, _)| !pools.iter().any(|(named, _)| named == pool));
        let changes: Vec<(Vec<u8>, Capacity)> = pools
            .iter()
            .map(|(pool, capacity)| (pool, Capacity::Of(*capacity)))
            .chain(gone.map(|(pool, _)| (pool, Capacity::Default)))
            .map(|(pool, capacity)| (pool.as_str().into(), capacity))
            .collect();
        let store = &self.shared.store;
        self.shared.default_capacity.store(default, Ordering::SeqCst);
        for changes in changes.chunks(POOLS_PAGE) {
            store.set_capacities(changes).await?;
        }
        // Any that was full by the default runs something.
        let claims = store.keys().claims();
        let mut cursor = Some(b"0".to_vec());
        while let Some(at) = cursor {
            let (next, found) = store.scan("HSCAN", &[claims.as_bytes(), &at, b"COUNT", b"500"]).await?;
            let pool = |claim: &Vec<u8>| claim.split(|byte| *byte == b'\t').nth(2).map(<[u8]>::to_vec);
            let pools: BTreeSet<Vec<u8>> = found.iter().skip(1).step_by(2).filter_map(pool).collect();
            let pools: Vec<(Vec<u8>, Capacity)> = pools.into_iter().map(|pool| (pool, Capacity::AsBefore)).collect();
            for pools in pools.chunks(POOLS_PAGE) {
                store.set_capacities(pools).await?;
            }
            cursor = next;
        }
        *known = pools.to_vec();
        Ok(())
    }

    /// One heartbeat.
    pub async fn beat(&self) -> Result<Beat, Error> {
        self.shared.store.session_beat(&self.shared.id, self.held()).await
    }

    /// Gives back a claim that Redis holds for this session and that no task of ours knows: the answer of its take got lost.
    pub async fn give_back_unknown(&self, id: JobId, fence: Fence) -> Result<Finished, Error> {
        let finish = Finish { id, fence, verdict: Verdict::Back, ran_us: 0, fields: Fields::new() };
        Ok(self.shared.store.finish(&self.shared.id, true, &[finish]).await?[0])
    }

    /// Ends the registration; what is still held goes back to the queues.
    pub async fn close(&self) -> Result<u64, Error> {
        self.shared.store.session_close(&self.shared.id).await
    }

    /// Stops waiting for Redis to answer the finishes under way.
    pub fn abandon(&self) {
        self.shared.abandon.cancel();
    }
}

/// Sends finishes until they are answered. Repeating them is harmless: each is recorded once.
async fn send_finishes(
    store: &Store,
    session: &SessionId,
    abandon: &CancellationToken,
    ends: Vec<(Finish, bool)>,
) -> Vec<Result<Finished, Error>> {
    let wake = ends.iter().any(|(_, wake)| *wake);
    let ends: Vec<Finish> = ends.into_iter().map(|(finish, _)| finish).collect();
    let mut pause = Duration::from_millis(50);
    loop {
        match store.finish(session, wake, &ends).await {
            Ok(replies) => return replies.into_iter().map(Ok).collect(),
            Err(error) if error.is_worth_repeating() && !abandon.is_cancelled() => {
                tracing::warn!(error = %error, jobs = ends.len(), "results could not be recorded, trying again");
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = abandon.cancelled() => {}
                }
                // Short: until they are recorded, results hold the places of what could run.
                pause = (pause * 2).min(Duration::from_millis(400));
            }
            Err(error) => {
                let text = error.to_string();
                return ends.iter().map(|_| Err(Error::Unavailable(text.clone()))).collect();
            }
        }
    }
}

/// The right to end one taken job.
#[derive(Debug)]
pub struct Claim {
    job: Arc<Taken>,
    shared: Arc<Shared>,
}

impl Claim {
    /// The job.
    pub fn job(&self) -> &Arc<Taken> {
        &self.job
    }

    /// The session that holds it.
    pub fn session(&self) -> &SessionId {
        &self.shared.id
    }

    /// What writes under the claim while the job runs.
    pub fn pen(&self) -> Pen {
        Pen { job: self.job.clone(), shared: self.shared.clone() }
    }

    /// Ends the claim. `wake` tells another session of what becomes free, for when this one will not take again.
    pub async fn finish(self, verdict: Verdict, ran: Duration, fields: Fields, wake: bool) -> Result<Finished, Error> {
        let finish =
            Finish { id: self.job.id.clone(), fence: self.job.fence, verdict, ran_us: ran.as_micros() as u64, fields };
        let finishes = self.shared.finishes.clone();
        let result = finishes.ask((finish, wake)).await;
        result.unwrap_or_else(|stopped| Err(Error::Unavailable(stopped.to_string())))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.shared.held.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Writes into a job's hash under its claim.
#[derive(Debug, Clone)]
pub struct Pen {
    job: Arc<Taken>,
    shared: Arc<Shared>,
}

impl Pen {
    /// Writes fields; with none, asks whether the claim still holds.
    pub async fn mark(&self, fields: &Fields) -> Result<Mark, Error> {
        self.shared.store.mark(&self.shared.id, &self.job.id, self.job.fence, fields).await
    }

    /// The job.
    pub(crate) fn job(&self) -> &JobId {
        &self.job.id
    }

    pub(crate) fn store(&self) -> &Store {
        &self.shared.store
    }

    /// Leaves the rows of a chunk behind the first `keep` to others. Of both sides: what became of them, packed, and the counts of it.
    pub(crate) async fn cut_chunk(
        &self,
        keep: usize,
        kept: (Vec<u8>, String),
        rest: (Vec<u8>, String),
    ) -> Result<Mark, Error> {
        self.shared.store.batch_cut(&self.shared.id, &self.job.id, self.job.fence, keep, kept, rest).await
    }

    /// What a holder has noted in the field `noted`. It is too large to come with each take, and is wanted after the loss of a worker
    /// only.
    pub async fn noted(&self) -> Result<Option<Vec<u8>>, Error> {
        let store = &self.shared.store;
        let key = store.keys().job(self.job.id.as_str());
        Ok(store.command("HGET", &[key.as_bytes(), b"noted"]).await?.into_bytes())
    }
}
