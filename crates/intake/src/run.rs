//! The daemon: looks through the folders, takes what it finds, and hands it over.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use daemon::notify::Notify;
use daemon::shutdown::Shutdown;
use queue_core::batch::Batches;
use queue_core::objects::Objects;
use queue_core::producer::Producer;
use queue_core::store::Store;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::claim::{Claim, Verdict};
use crate::config::{Config, Destination, FolderConfig};
use crate::folders::{self, Found};
use crate::hand_over::{Means, Trouble, hand_over};
use crate::place;

/// Most files that are claimed at the same time: most of them wait, for their turn, their checkers, or Redis.
const HANDS_MAX: usize = 256;
/// How often the watchdog is fed at least.
const BEAT: Duration = Duration::from_secs(5);
/// The pause before a file is tried again, and the longest one.
const AGAIN_AFTER: Duration = Duration::from_secs(1);
const AGAIN_AFTER_MAX: Duration = Duration::from_secs(30);

/// Runs until it is told to stop. Files that are in hand then stay claimed, and are gone on with by whoever comes next.
pub async fn run(config: Config, shutdown: Shutdown) -> anyhow::Result<()> {
    let store = Store::connect(&config.redis).await.context("redis can't be reached")?;
    store.keep_library_from_now_on().await.context("the library can't be loaded")?;
    let needs_objects = config
        .folders
        .iter()
        .any(|folder| [&folder.archive, &folder.failed].iter().any(|to| matches!(to, Destination::Objects(_))));
    let objects = needs_objects.then(|| Objects::open(&config.objects)).transpose().context("no object store")?;
    let means = Means {
        batches: Batches::new(store.clone(), config.limits.clone()),
        producer: Producer::new(store.clone(), config.limits.clone()),
        limits: config.limits.clone(),
        turns: Arc::new(Semaphore::new(config.intake.files_at_once.get())),
        store,
    };
    let notify = Notify::default();
    let intake = Arc::new(Intake { folders: config.folders, means, objects, stop: shutdown.drain().clone() });
    tracing::info!(folders = intake.folders.len(), "taking files in");
    notify.ready();
    let mut hands = JoinSet::new();
    let mut waiting = VecDeque::new();
    let mut told = Told::default();
    let mut beats = tokio::time::interval(BEAT);
    let mut looks = tokio::time::interval(config.intake.poll_interval);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        while hands.len() < HANDS_MAX
            && let Some(next) = waiting.pop_front()
        {
            hands.spawn(intake.clone().deal_with(next));
        }
        notify.watchdog();
        notify.status(format!("{} files in hand, {} waiting", hands.len(), waiting.len()));
        tokio::select! {
            () = intake.stop.cancelled() => break,
            Some(done) = hands.join_next(), if !hands.is_empty() => {
                match done {
                    Ok(Some(fault)) => told.tell(fault),
                    Ok(None) => {}
                    Err(error) => tracing::error!(%error, "a file was let go of"),
                }
            }
            _ = beats.tick() => {}
            // As long as some wait that were seen, there is no need to look again.
            _ = looks.tick(), if waiting.is_empty() => {
                let looking = intake.clone();
                let (found, faults) = tokio::task::spawn_blocking(move || looking.look()).await.context("no look")?;
                waiting = found;
                told.all(faults);
            }
        }
    }
    notify.stopping();
    while hands.join_next().await.is_some() {}
    tracing::info!("stopped");
    Ok(())
}

/// Something to do.
enum Next {
    /// A file in its folder.
    Take(Found),
    /// A claim that was left behind.
    GoOn(Claim),
}

/// What can't be done with a path for now, and why.
type Fault = (PathBuf, String);

struct Intake {
    folders: Vec<FolderConfig>,
    means: Means,
    objects: Option<Objects>,
    stop: CancellationToken,
}

impl Intake {
    /// First what was left behind, then what is new.
    fn look(&self) -> (VecDeque<Next>, Vec<Fault>) {
        let (mut next, mut faults) = (VecDeque::new(), Vec::new());
        let mut new = Vec::new();
        for folder in folders::each(&self.folders) {
            match Claim::left_behind(&folder) {
                Ok(claims) => next.extend(claims.into_iter().map(Next::GoOn)),
                Err(error) => faults.push((folder.clone(), error.to_string())),
            }
            let (found, unseen) = folders::look(&self.folders, &folder, SystemTime::now());
            new.extend(found.into_iter().map(Next::Take));
            faults.extend((!unseen.is_empty()).then(|| (folder, unseen.join("; "))));
        }
        next.extend(new);
        (next, faults)
    }

    async fn deal_with(self: Arc<Self>, next: Next) -> Option<Fault> {
        let claim = match next {
            Next::GoOn(claim) => claim,
            Next::Take(Found { folder, name }) => {
                let path = folder.join(&name);
                let taken = tokio::task::spawn_blocking(move || Claim::take(&folder, &name)).await;
                match taken {
                    Ok(Ok(Some(claim))) => claim,
                    // Another daemon's.
                    Ok(Ok(None)) => return None,
                    Ok(Err(error)) => return Some((path, error.to_string())),
                    Err(error) => return Some((path, error.to_string())),
                }
            }
        };
        let path = claim.folder().join(claim.name());
        let Some(config) = folders::config_of(&self.folders, claim.folder(), claim.name()) else {
            return Some((path, "it was taken in before, and no folder of the configuration wants it now".into()));
        };
        let stopped = self.stop.clone();
        tokio::select! {
            () = stopped.cancelled() => None,
            fault = self.see_through(claim, config) => fault,
        }
    }

    /// Goes on until the file is where it belongs.
    async fn see_through(&self, claim: Claim, config: &FolderConfig) -> Option<Fault> {
        let path = claim.folder().join(claim.name());
        let file = path.display();
        let batch = claim.token().clone();
        let decided = match claim.decided() {
            Ok(decided) => decided.map(|decided| decided.verdict),
            Err(error) => return Some((path, format!("what was decided of it can't be read: {error}"))),
        };
        let claim = Arc::new(claim);
        let mut pauses = Pauses::default();
        let verdict = match decided {
            Some(verdict) => verdict,
            None => loop {
                match hand_over(&claim, config, &self.means).await {
                    Ok(verdict) => break verdict,
                    Err(Trouble::Bad(reason)) => break Verdict::Bad { reason },
                    Err(Trouble::Later(reason)) => {
                        tracing::warn!(%file, reason, "it is tried again");
                        pauses.next().await;
                    }
                }
            },
        };
        let mut pauses = Pauses::default();
        let to = loop {
            match place::put(&claim, &verdict, config, self.objects.as_ref()).await {
                Ok(to) => break to,
                Err(error) => {
                    tracing::warn!(%file, %error, "it can't be moved to where it belongs, it is tried again");
                    pauses.next().await;
                }
            }
        };
        let to = to.display();
        match &verdict {
            Verdict::Good { rows, bad_lines } => tracing::info!(%file, %batch, rows, bad_lines, %to, "it is a batch"),
            Verdict::Bad { reason } => tracing::warn!(%file, reason, %to, "it is moved aside"),
        }
        claim.clear().err().map(|error| (path, format!("its claim can't be removed: {error}")))
    }
}

/// Longer and longer pauses.
struct Pauses(Duration);

impl Default for Pauses {
    fn default() -> Self {
        Self(AGAIN_AFTER)
    }
}

impl Pauses {
    async fn next(&mut self) {
        tokio::time::sleep(self.0).await;
        self.0 = (2 * self.0).min(AGAIN_AFTER_MAX);
    }
}

/// Faults that were told: each once, until it is another.
#[derive(Default)]
struct Told(HashMap<PathBuf, String>);

impl Told {
    fn tell(&mut self, (path, fault): Fault) {
        if self.0.get(&path) != Some(&fault) {
            tracing::warn!(path = %path.display(), fault, "left as it is");
            self.0.insert(path, fault);
        }
    }

    /// All faults of one look at the folders: what is not among them is over.
    fn all(&mut self, faults: Vec<Fault>) {
        self.0.retain(|path, _| path.symlink_metadata().is_ok());
        for fault in faults {
            self.tell(fault);
        }
    }
}
