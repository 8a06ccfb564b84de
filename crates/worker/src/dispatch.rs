//! The one loop of a worker: an event comes in, is handled, and what follows from it is started.
//!
//! The loop itself never waits for Redis or a database: takes, heartbeats and jobs are tasks that report back as events. So a
//! cancel is heard while a take is slow, and the watchdog is fed by takes that were answered, not by a timer.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use queue_core::calls::Beat;
use queue_core::ids::{Fence, JobId, Pool, PoolPattern};
use queue_core::session::{Batch, Claim, Session, SessionLost, TAKE_MAX};
use queue_core::store::Message;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::attempt::{self, Asked, Means, Rules, sleep_until};
use crate::notify::Notify;
use crate::shutdown::Shutdown;
use crate::stop::{Cause, Stop};

/// The pause before Redis is told again what is served, after it did not take it.
const SERVE_AGAIN_AFTER: Duration = Duration::from_millis(250);

/// How many heartbeats a session sends in its lifetime.
const BEATS_A_LIFETIME: u32 = 5;

/// What jobs of a worker are run with, and which it takes.
#[derive(Clone)]
pub struct Service {
    /// Runs them.
    pub means: Means,
    /// The pools that the configuration names; those of handlers that are well join them.
    pub pools: Vec<PoolPattern>,
}

impl Service {
    /// The pools to take from now.
    pub fn pools(&self) -> Vec<PoolPattern> {
        let handlers = self.means.handlers.serving();
        let handlers = handlers.borrow();
        // A pattern that covers others would have it take what it can't run while a handler is not well.
        self.pools.iter().cloned().chain(handlers.iter().map(PoolPattern::exactly)).collect()
    }
}

/// How a worker works.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Most jobs that run at once in this worker.
    pub slots: usize,
    /// Longest time between two takes of an idle worker. Messages make it sooner.
    pub scan_interval: Duration,
    /// How long a silent worker keeps its jobs.
    pub session_lifetime: Duration,
    /// How long running jobs may go on after a stop was asked for.
    pub drain_grace: Duration,
    /// How long results that Redis does not answer for are still sent after that.
    pub last_results: Duration,
}

/// What may change while a worker runs.
#[derive(Debug, Clone)]
pub struct Limits {
    /// What holds for jobs that start from now on.
    pub rules: Arc<Rules>,
    /// Most jobs at once in a pool that has no number of its own.
    pub default_capacity: u32,
    /// Numbers of pools of their own.
    pub capacities: Vec<(Pool, u32)>,
}

/// What a session is told, and where it is told whom to cancel.
#[derive(Debug)]
pub struct Hints {
    /// Messages on all channels of the session.
    pub messages: mpsc::Receiver<Message>,
    /// The channel of ids to cancel; all others wake.
    pub cancel_channel: String,
}

/// Why the loop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// A stop was asked for; everything is given back.
    Stopped,
    /// The session was declared dead: all its jobs are others'. A new one may be opened.
    SessionLost,
}

/// What the loop reacts to.
enum Event {
    /// A take was answered, or was not; when it was asked for.
    Took(SystemTime, Result<Result<Batch, SessionLost>, queue_core::Error>),
    /// A job's task ended; the job's key in the table of running jobs.
    Ended(Fence, JobId),
    /// A heartbeat was answered, or was not; when it was sent.
    Beat(Instant, Result<Beat, queue_core::Error>),
    /// Nobody has confirmed the session for its lifetime.
    Unconfirmed,
    /// A message on one of the session's channels.
    Message(Message),
    /// It is time to look whether there is work.
    Scan,
    /// The limits are others now.
    Limits,
    /// Pools have other capacities now: there may be room.
    Room,
    /// Other handlers are well now.
    Handlers,
    /// The session serves other pools now, or could not be told to.
    Serves(Result<Result<(), SessionLost>, queue_core::Error>),
    /// A stop was asked for.
    Drain,
    /// The grace time is over, or a second stop was asked for.
    StopNow,
    /// Redis has not answered for the last results.
    GiveUp,
}

struct Dispatch {
    session: Arc<Session>,
    service: Service,
    limits: Limits,
    settings: Settings,
    notify: Notify,
    events: mpsc::Sender<Event>,
    cancel_channel: String,
    running: HashMap<JobId, Running>,
    jobs: JoinSet<()>,
    /// A take is under way.
    taking: bool,
    /// The session is being told what it serves.
    telling: bool,
    /// There may be something to take: set by messages and freed slots, cleared by a take.
    hungry: bool,
    draining: bool,
    lost: bool,
    next_scan: Instant,
    /// Until then no other worker has its jobs, unless a heartbeat is answered that moves it on.
    confirmed_until: Instant,
    /// Claims that Redis holds for us and that we did not know at the last heartbeat.
    unknown: HashSet<(String, Fence)>,
    failed_takes: u32,
}

/// Runs until a stop is asked for or the session is lost. Whatever the reason, no job of this session runs when it returns.
pub async fn run(
    session: Arc<Session>,
    service: Service,
    limits: watch::Receiver<Limits>,
    settings: Settings,
    notify: Notify,
    hints: Hints,
    shutdown: &Shutdown,
) -> Ended {
    let (events, inbox) = mpsc::channel(1024);
    let beats = tokio::spawn(beat(session.clone(), settings.session_lifetime / BEATS_A_LIFETIME, events.clone()));
    let mut dispatch = Dispatch {
        session,
        service,
        limits: limits.borrow().clone(),
        notify,
        events,
        cancel_channel: hints.cancel_channel,
        running: HashMap::new(),
        jobs: JoinSet::new(),
        taking: false,
        telling: false,
        hungry: true,
        draining: false,
        lost: false,
        next_scan: Instant::now() + settings.scan_interval,
        confirmed_until: Instant::now() + settings.session_lifetime,
        unknown: HashSet::new(),
        failed_takes: 0,
        settings,
    };
    let ended = dispatch.run(inbox, hints.messages, limits, shutdown).await;
    beats.abort();
    ended
}

impl Dispatch {
    async fn run(
        &mut self,
        mut inbox: mpsc::Receiver<Event>,
        mut messages: mpsc::Receiver<Message>,
        mut limits: watch::Receiver<Limits>,
        shutdown: &Shutdown,
    ) -> Ended {
        let mut serving = self.service.means.handlers.serving();
        let mut serving_open = true;
        serving.mark_changed();
        let mut messages_open = true;
        let mut limits_open = true;
        let mut stopping_now = false;
        // When the grace time ends; once it has, when results are given up.
        let mut patience_ends: Option<Instant> = None;
        loop {
            self.take_if_hungry();
            if (self.draining || self.lost) && self.running.is_empty() && !self.taking {
                while self.jobs.join_next().await.is_some() {}
                return if self.lost { Ended::SessionLost } else { Ended::Stopped };
            }
            let event = tokio::select! {
                biased;
                () = shutdown.stop().cancelled(), if !stopping_now => Event::StopNow,
                () = shutdown.drain().cancelled(), if !self.draining => Event::Drain,
                event = inbox.recv() => event.expect("this loop holds a sender"),
                message = messages.recv(), if messages_open => match message {
                    Some(message) => Event::Message(message),
                    None => { messages_open = false; continue }
                },
                changed = limits.changed(), if limits_open => match changed {
                    Ok(()) => { self.limits = limits.borrow_and_update().clone(); Event::Limits }
                    Err(_) => { limits_open = false; continue }
                },
                changed = serving.changed(), if serving_open && !self.telling => match changed {
                    Ok(()) => { serving.borrow_and_update(); Event::Handlers }
                    Err(_) => { serving_open = false; continue }
                },
                () = sleep_until(patience_ends), if patience_ends.is_some() => {
                    if stopping_now { Event::GiveUp } else { Event::StopNow }
                }
                () = sleep_until(Some(self.confirmed_until)), if !self.lost => Event::Unconfirmed,
                () = sleep_until(Some(self.next_scan)), if !self.lost => Event::Scan,
                Some(_) = self.jobs.join_next() => continue,
            };
            match event {
                Event::Took(asked, result) => self.took(asked, result),
                Event::Ended(fence, id) => {
                    if self.running.get(&id).is_some_and(|running| running.fence == fence) {
                        self.running.remove(&id);
                    }
                    self.hungry = true;
                    self.report();
                }
                Event::Beat(sent, result) => self.beat(sent, result),
                Event::Unconfirmed => self.stop_unconfirmed(),
                Event::Message(message) => self.message(message),
                Event::Scan => {
                    self.next_scan = Instant::now() + self.settings.scan_interval;
                    self.hungry = true;
                    if self.free() == 0 {
                        self.take_nothing();
                    }
                    self.report();
                }
                Event::Limits => self.apply_limits(),
                Event::Room => self.hungry = true,
                Event::Handlers => self.serve(),
                Event::Serves(result) => {
                    self.telling = false;
                    match result {
                        Ok(Ok(())) => self.hungry = true,
                        Ok(Err(SessionLost)) => self.session_lost(),
                        Err(error) => {
                            tracing::warn!(%error, "what this worker serves could not be told, trying again");
                            serving.mark_changed();
                        }
                    }
                }
                Event::Drain => {
                    tracing::info!(
                        running = self.running.len(),
                        grace_s = self.settings.drain_grace.as_secs(),
                        "stopping"
                    );
                    self.draining = true;
                    patience_ends = Some(Instant::now() + self.settings.drain_grace);
                    self.notify.stopping();
                    self.hungry = true;
                }
                Event::StopNow => {
                    stopping_now = true;
                    self.draining = true;
                    patience_ends = Some(Instant::now() + self.settings.last_results);
                    if !self.running.is_empty() {
                        tracing::info!(running = self.running.len(), "giving running jobs back");
                    }
                    self.stop_all(Cause::Draining);
                }
                Event::GiveUp => {
                    patience_ends = None;
                    self.session.abandon();
                }
            }
        }
    }

    fn free(&self) -> usize {
        self.settings.slots.saturating_sub(self.running.len())
    }

    fn take_if_hungry(&mut self) {
        if !self.hungry || self.taking || self.lost {
            return;
        }
        if self.draining {
            // What this worker heard of, or has just made room for, is for somebody else to take.
            self.take(0);
        } else if self.free() > 0 {
            self.take(self.free().min(TAKE_MAX));
        }
    }

    /// How many more tasks each handler has room for that runs only so many.
    fn room(&self) -> Vec<(Pool, usize)> {
        let room = |(pool, most): (&Pool, usize)| {
            let running = self.running.values().filter(|running| running.pool.as_ref() == Some(pool)).count();
            (pool.clone(), most.saturating_sub(running))
        };
        self.service.means.handlers.limited().map(room).collect()
    }

    fn take(&mut self, n: usize) {
        self.taking = true;
        self.hungry = false;
        let (session, events, room) = (self.session.clone(), self.events.clone(), self.room());
        let pause = match self.failed_takes {
            0 => Duration::ZERO,
            // Short: each attempt waits for a connection by itself.
            failed => Duration::from_millis(50 << failed.min(3)),
        };
        tokio::spawn(async move {
            // Even a sleep of no length waits for the timer's next tick.
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
            let asked = SystemTime::now();
            let answer = session.take_within(n, &room).await;
            // The loop has ended: nobody waits for this answer.
            let _ = events.send(Event::Took(asked, answer)).await;
        });
    }

    /// Shows that the loop and Redis are alive though nothing more is wanted. Redis no longer counts on this session to take,
    /// and wakes another one where work is left.
    fn take_nothing(&mut self) {
        if !self.taking && !self.lost {
            self.take(0);
        }
    }

    /// Has the session serve what can be run now.
    fn serve(&mut self) {
        self.telling = true;
        let (pools, session, events) = (self.service.pools(), self.session.clone(), self.events.clone());
        tokio::spawn(async move {
            let answer = session.serve(&pools).await;
            if answer.is_err() {
                // A refusal comes at once, and would again.
                tokio::time::sleep(SERVE_AGAIN_AFTER).await;
            }
            events.send(Event::Serves(answer)).await
        });
    }

    fn apply_limits(&self) {
        let (session, events, limits) = (self.session.clone(), self.events.clone(), self.limits.clone());
        tokio::spawn(async move {
            match session.set_capacities(limits.default_capacity, &limits.capacities).await {
                Ok(()) => drop(events.send(Event::Room).await),
                Err(error) => tracing::warn!(%error, "the capacities of pools could not be changed"),
            }
        });
    }

    fn took(&mut self, asked: SystemTime, result: Result<Result<Batch, SessionLost>, queue_core::Error>) {
        self.taking = false;
        match result {
            Ok(Ok(batch)) => {
                if self.failed_takes > 0 {
                    tracing::info!("redis answers again");
                }
                self.failed_takes = 0;
                self.notify.watchdog();
                if let Some(due) = batch.due_in {
                    self.next_scan = self.next_scan.min(Instant::now() + due);
                }
                let asked = Asked { asked, answered: SystemTime::now() };
                let taken = batch.claims.len();
                if taken > 0 {
                    tracing::debug!(jobs = taken, free = self.free(), "took");
                }
                for claim in batch.claims {
                    self.start(claim, asked);
                }
                // There may be more than one call takes.
                self.hungry |= taken == TAKE_MAX;
                self.report();
            }
            Ok(Err(SessionLost)) => self.session_lost(),
            Err(error) => {
                if self.failed_takes == 0 {
                    tracing::warn!(%error, "nothing can be taken, trying again");
                } else {
                    tracing::debug!(%error, "a take has failed again");
                }
                self.failed_takes = self.failed_takes.saturating_add(1);
                // A worker that stops does not wait for a Redis that is gone.
                self.hungry = !self.draining;
            }
        }
    }

    fn start(&mut self, claim: Claim, asked: Asked) {
        let (id, fence) = (claim.job().id.clone(), claim.job().fence);
        let stop = Stop::default();
        if self.lost {
            stop.ask(Cause::ClaimLost);
        } else if self.draining {
            stop.ask(Cause::Draining);
        }
        let pool = claim.job().pool.handler().map(|_| claim.job().pool.clone());
        self.running.insert(id.clone(), Running { fence, pool, stop: stop.clone() });
        let (means, rules, events) = (self.service.means.clone(), self.limits.rules.clone(), self.events.clone());
        self.jobs.spawn(async move {
            let end = End { events, job: Some((fence, id)) };
            attempt::run(claim, asked, means, rules, stop).await;
            drop(end);
        });
    }

    fn beat(&mut self, sent: Instant, result: Result<Beat, queue_core::Error>) {
        match result {
            Ok(Beat::Alive { cancels, claims }) => {
                // From when it was sent: the leader's patience may have begun as early.
                self.confirmed_until = sent + self.settings.session_lifetime;
                for id in cancels {
                    self.cancel(&id);
                }
                self.reconcile(claims);
            }
            Ok(Beat::Lost) => self.session_lost(),
            Err(error) => tracing::debug!(%error, "a heartbeat was not answered"),
        }
    }

    /// Others may run its jobs by now, and nothing keeps a handler from doing one twice. A statement may go on: who takes over
    /// ends the earlier backend first.
    fn stop_unconfirmed(&mut self) {
        // What is taken before the next heartbeat is answered is looked at, too.
        self.confirmed_until = Instant::now() + self.settings.session_lifetime / BEATS_A_LIFETIME;
        let unguarded =
            self.running.values().filter(|running| running.pool.is_some() && running.stop.cause().is_none());
        let stopped = unguarded.inspect(|running| running.stop.ask(Cause::ClaimLost)).count();
        if stopped > 0 {
            tracing::warn!(stopped, "the session could not be confirmed for its lifetime, tasks are stopped");
        }
    }

    /// Gives back what Redis has twice running said is ours and no task of ours knows: the answer of its take got lost, or
    /// its task gave up.
    fn reconcile(&mut self, claims: Vec<(String, Fence)>) {
        let unknown: HashSet<(String, Fence)> = claims
            .into_iter()
            .filter(|(id, fence)| {
                !JobId::new(id.clone())
                    .is_ok_and(|id| self.running.get(&id).is_some_and(|running| running.fence == *fence))
            })
            .collect();
        if !self.taking {
            for (id, fence) in unknown.intersection(&self.unknown) {
                let Ok(id) = JobId::new(id.clone()) else { continue };
                tracing::warn!(job = %id, "giving back a job that nothing here works on");
                let (session, fence) = (self.session.clone(), *fence);
                tokio::spawn(async move {
                    if let Err(error) = session.give_back_unknown(id, fence).await {
                        tracing::warn!(%error, "it could not be given back");
                    }
                });
            }
        }
        self.unknown = unknown;
    }

    fn message(&mut self, message: Message) {
        if message.channel == self.cancel_channel {
            self.cancel(&message.text);
        } else {
            self.hungry = true;
        }
    }

    fn cancel(&mut self, id: &str) {
        if let Some(Running { stop, .. }) = JobId::new(id).ok().and_then(|id| self.running.get(&id)) {
            if stop.cause().is_none() {
                tracing::info!(job = id, "cancelling");
            }
            stop.ask(Cause::Cancelled);
        }
    }

    fn session_lost(&mut self) {
        if !self.lost {
            tracing::warn!(
                running = self.running.len(),
                "the session is lost: it was silent for too long, or the data is gone"
            );
            self.lost = true;
            self.stop_all(Cause::ClaimLost);
        }
    }

    fn stop_all(&self, cause: Cause) {
        for running in self.running.values() {
            running.stop.ask(cause);
        }
    }

    fn report(&self) {
        self.notify.status(format!("{} of {} slots busy", self.running.len(), self.settings.slots));
    }
}

/// One job that runs.
struct Running {
    fence: Fence,
    /// A task's pool.
    pool: Option<Pool>,
    stop: Stop,
}

/// Reports the end of a job's task however it ends.
struct End {
    events: mpsc::Sender<Event>,
    job: Option<(Fence, JobId)>,
}

impl Drop for End {
    fn drop(&mut self) {
        if let Some((fence, id)) = self.job.take() {
            let events = self.events.clone();
            // The channel may be full, and a drop can't wait.
            tokio::spawn(async move { events.send(Event::Ended(fence, id)).await });
        }
    }
}

async fn beat(session: Arc<Session>, interval: Duration, events: mpsc::Sender<Event>) {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let sent = Instant::now();
        if events.send(Event::Beat(sent, session.beat().await)).await.is_err() {
            return;
        }
    }
}
