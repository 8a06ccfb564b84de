//! Random work under random faults, and what must be true all the same.
//!
//! Several users hand in jobs of every form, SQL and tasks, by plain commands and by `drayman submit`; some fail, some wait,
//! some are cancelled; others hand in batches of rows, or launch flows. Meanwhile workers, processes of handlers, leaders, cancellers and producers are killed or stopped, Redis
//! and PostgreSQL are killed and started again, and connections are cut, refused and delayed. Then the faults end, what is
//! left is worked off, and the records, the database, what tasks have done, the processes and every key are looked at from
//! outside.
//!
//! What is handed in by whom, and which faults come in which order with which pauses, are functions of the seed. Which job a
//! fault meets is a matter of time, so a seed makes a failure likely again and not certain.

mod batches;
mod faults;
mod flows;
mod random;
mod report;
mod rules;
mod sources;
mod stage;
mod state;
mod trackers;
mod verdict;
mod watch;
mod workload;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

pub use batches::Counts as BatchCounts;
pub use faults::{Fault, Pause, Schedule};
pub use flows::Counts as FlowCounts;
pub use random::Random;
pub use report::Report;
pub use sources::Counts as SourceCounts;
pub use state::{KeyRule, LAYOUT};
pub use trackers::Counts as TrackedCounts;
pub use verdict::Violation;
pub use workload::{Handler, Job, Route};

use crate::process::{Daemon, Signal, bin};
use crate::redis::{RawClient, Value};
use batches::Batches;
use flows::Flows;
use rules::Pauses;
use sources::Intake;
use stage::{Stage, ask, connect_to};
use verdict::{AGREE, STUCK};
use watch::Watch;
use workload::{APP, HOSTS};

/// For so long nothing has moved once the faults have ended: then nothing will.
const STANDSTILL: Duration = Duration::from_secs(90);
/// A fault comes, also where nothing has ended.
const LONGEST_PAUSE: Duration = Duration::from_secs(20);
/// How often whoever waits is told how far it is.
const TELL_EVERY: Duration = Duration::from_secs(15);
/// Takes of one job since then: more of them are no progress.
const TAKES_LIMIT: usize = 60;
/// How long handing in what was begun may take then.
const HAND_IN_LIMIT: Duration = Duration::from_secs(120);
/// Most jobs of one user that have not ended.
const OPEN_PER_USER: usize = 12;

/// How a run goes.
#[derive(Clone, Debug)]
pub struct Options {
    /// What decides over work and faults.
    pub seed: u64,
    /// How many jobs are handed in; the faults go on meanwhile. A batch is one, and so is an execution of a flow.
    pub jobs: usize,
    /// How many workers there are.
    pub workers: usize,
    /// How many users hand in jobs.
    pub users: usize,
    /// The command line of a worker that has a handler in Rust besides, for `rust` of `chaos`. It does as `task.py` does, and
    /// reads its configuration from the environment, as `drayman-worker` does, which it is if absent.
    pub worker: Option<Vec<String>>,
}

/// What all threads of a run share.
struct Run<'a> {
    options: &'a Options,
    stage: Stage,
    watch: Watch,
    /// Jobs that are still to be handed in.
    to_come: AtomicUsize,
    /// Faults have ended.
    calm: AtomicBool,
    over: AtomicBool,
    violations: Mutex<Vec<Violation>>,
    crashes: Mutex<Vec<(Instant, Instant)>>,
    /// When faults of which kind began.
    struck: Mutex<Vec<(Instant, &'static str)>>,
    faults: Mutex<BTreeMap<&'static str, usize>>,
    lasted: Mutex<Duration>,
    drained: Mutex<Duration>,
    batches: Batches,
    flows: Flows,
    pauses: Pauses,
    intake: Intake,
    /// Tracked jobs.
    tracked: Mutex<Vec<String>>,
}

/// What there is to see of progress.
#[derive(Debug, PartialEq, Eq)]
struct State {
    /// What has not ended, and of a batch how many rows have not.
    open: Vec<String>,
    /// Once all has ended: what is left of it.
    leftovers: Vec<String>,
    books: Vec<String>,
    effects: u64,
}

/// Runs, and tells what it has shown.
///
/// # Panics
///
/// If the servers can't be set up.
pub fn run(options: &Options) -> Report {
    let run = Run {
        options,
        stage: Stage::build(options.workers, options.worker.as_deref()),
        watch: Watch::default(),
        to_come: AtomicUsize::new(options.jobs),
        calm: AtomicBool::new(false),
        over: AtomicBool::new(false),
        violations: Mutex::default(),
        crashes: Mutex::default(),
        struck: Mutex::default(),
        faults: Mutex::default(),
        lasted: Mutex::default(),
        drained: Mutex::default(),
        batches: Batches::default(),
        flows: Flows::default(),
        pauses: Pauses::default(),
        intake: Intake::default(),
        tracked: Mutex::default(),
    };
    rules::limit_users(&run.stage);
    run.stage.start_workers();
    // What ends before is not written to the database of what has ended.
    while !stage::connect(&run.stage.redis).and_then(|mut redis| state::is_exporting(&mut redis)).unwrap_or(false) {
        run.supervise();
        thread::sleep(Duration::from_millis(50));
    }
    thread::scope(|scope| {
        scope.spawn(|| run.watch.run(&run.stage, options.seed, || run.over.load(Ordering::SeqCst)));
        let users: Vec<_> = (0..options.users)
            .map(|user| {
                scope.spawn({
                    let run = &run;
                    move || run.user(user, scope)
                })
            })
            .collect();
        let batch_users: Vec<_> = (0..batches::USERS)
            .map(|user| {
                scope.spawn({
                    let run = &run;
                    move || run.batch_user(user, scope)
                })
            })
            .collect();
        let flow_users: Vec<_> = (0..flows::USERS)
            .map(|user| {
                scope.spawn({
                    let run = &run;
                    move || run.flow_user(user, scope)
                })
            })
            .collect();
        let others = [
            scope.spawn(|| run.pauser()),
            scope.spawn(|| run.tracker_user()),
            scope.spawn(|| run.scheduler()),
            scope.spawn(|| run.file_user()),
        ];
        run.rage();
        for user in users.into_iter().chain(batch_users).chain(flow_users).chain(others) {
            user.join().expect("a user's thread does not panic");
        }
        run.drain();
        run.over.store(true, Ordering::SeqCst);
    });
    run.judge()
}

impl Run<'_> {
    fn complain(&self, violation: Violation) {
        self.violations.lock().expect("no thread panics").push(violation);
    }

    /// Whether nothing new is handed in.
    fn is_closed(&self) -> bool {
        self.to_come.load(Ordering::SeqCst) == 0
    }

    /// Whether one more job is to be handed in: by whoever asks.
    fn is_wanted(&self) -> bool {
        self.to_come.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
    }

    fn is_calm(&self) -> bool {
        self.calm.load(Ordering::SeqCst)
    }

    /// The faults, until all jobs are handed in.
    fn rage(&self) {
        let mut ends = Vec::new();
        let mut schedule = Schedule::of(self.options.seed, self.options.workers);
        let (mut pause, mut next) = schedule.next().expect("it never ends");
        // The first workers get to work first.
        let (mut from, mut ended) = (Instant::now() + Duration::from_secs(1), 0);
        let (mut last, mut moved) = ((0, 0), Instant::now());
        let mut told = Instant::now();
        while !self.is_closed() {
            self.supervise();
            self.tell(&mut told);
            let progress = (self.to_come.load(Ordering::SeqCst), self.watch.open().len());
            if progress != last {
                (last, moved) = (progress, Instant::now());
            } else if moved.elapsed() > STANDSTILL {
                // Whether that is the faults' doing shows when they have ended.
                self.to_come.store(0, Ordering::SeqCst);
            }
            for (name, when) in self.stage.strike_aimed() {
                self.watch.killed(&name, when);
            }
            let due = |end: &mut (Instant, stage::End)| end.0 <= Instant::now();
            for (_, end) in ends.extract_if(.., due).collect::<Vec<_>>() {
                self.stage.end(end);
            }
            let paused = Instant::now().saturating_duration_since(from);
            let is_due = paused >= pause.time && self.watch.ended() - ended >= pause.ends;
            if is_due || paused >= LONGEST_PAUSE {
                *self.faults.lock().expect("no thread panics").entry(next.kind()).or_default() += 1;
                let begin = Instant::now();
                self.struck.lock().expect("no thread panics").push((begin, next.kind()));
                if let Some((name, when)) = self.stage.strike(next, &mut ends) {
                    self.watch.killed(&name, when);
                }
                if next == Fault::RestartDatabase {
                    self.crashes.lock().expect("no thread panics").push((begin, Instant::now()));
                }
                (pause, next) = schedule.next().expect("it never ends");
                (from, ended) = (Instant::now(), self.watch.ended());
            }
            thread::sleep(Duration::from_millis(10));
        }
        *self.lasted.lock().expect("no thread panics") = self.stage.begin().elapsed();
        self.stage.calm(ends);
        self.supervise();
        self.calm.store(true, Ordering::SeqCst);
    }

    /// Tells whoever waits how far it is, now and then. Whether it did.
    fn tell(&self, told: &mut Instant) -> bool {
        let due = told.elapsed() > TELL_EVERY;
        if due {
            *told = Instant::now();
            let (at, left) = (self.stage.begin().elapsed().as_secs(), self.to_come.load(Ordering::SeqCst));
            eprintln!(
                "{at:4} s: {left} jobs are to be handed in, {} of the others have not ended",
                self.watch.open().len()
            );
        }
        due
    }

    fn supervise(&self) {
        let (complaints, killed) = self.stage.supervise();
        for complaint in complaints {
            self.complain(Violation::new("a worker ends when it is told to", complaint));
        }
        for (name, when) in killed {
            self.watch.killed(&name, when);
        }
    }

    /// Waits until all jobs have ended and nothing is left of workers that are gone, or nothing moves any more.
    fn drain(&self) {
        let begin = Instant::now();
        let (mut last, mut moved, mut told) = (None, begin, begin);
        loop {
            self.supervise();
            self.supervise_intake(false);
            let state = self.state();
            if self.tell(&mut told) {
                match &state {
                    Ok(State { open, leftovers, .. }) => eprintln!(
                        "        open: {:?}, left of what has ended: {:?}",
                        &open[..open.len().min(5)],
                        &leftovers[..leftovers.len().min(5)]
                    ),
                    Err(error) => eprintln!("        a look failed: {error}"),
                }
            }
            if state.as_ref().is_ok_and(|state| state.open.is_empty() && state.leftovers.is_empty()) {
                break;
            }
            // Redis answers all the time by now: what it does not answer is no movement either.
            let state = state.ok();
            if state != last {
                (last, moved) = (state, Instant::now());
            } else if moved.elapsed() > STANDSTILL {
                self.complain(self.standstill(last.as_ref(), "nothing has moved"));
                break;
            }
            if let Some((id, takes)) = self.watch.most_taken_since(begin)
                && takes > TAKES_LIMIT
            {
                let violation = Violation::of(&id, STUCK, format!("stuck: it was taken {takes} times without an end"));
                self.complain(violation);
                break;
            }
            thread::sleep(Duration::from_millis(100));
        }
        *self.drained.lock().expect("no thread panics") = begin.elapsed();
    }

    fn standstill(&self, state: Option<&State>, what: &str) -> Violation {
        let open = state.map_or(&[][..], |state| &state.open);
        let some = open.iter().take(10).cloned().collect::<Vec<_>>().join(", ");
        let seconds = STANDSTILL.as_secs();
        Violation::new(STUCK, format!("stuck: {what} for {seconds} s, and {} have not ended: {some}", open.len()))
    }

    /// Whatever changes while there is progress.
    fn state(&self) -> io::Result<State> {
        let mut open = self.watch.open();
        open.extend(self.batches.open(&self.stage)?);
        open.extend(self.flows.open(&self.stage, None)?);
        open.extend(self.open_files());
        open.extend(self.open_of_sources()?);
        let leftovers = if open.is_empty() { self.leftovers(&self.stage.names())? } else { Vec::new() };
        // In whichever order Redis tells of them.
        let mut leftovers: Vec<String> = leftovers.into_iter().map(|violation| violation.found).collect();
        leftovers.sort_unstable();
        let mut redis = stage::connect(&self.stage.redis)?;
        Ok(State { open, leftovers, books: state::books(&mut redis)?, effects: self.stage.effects_length() })
    }

    /// `workers` are those that may have registrations.
    fn leftovers(&self, workers: &[String]) -> io::Result<Vec<Violation>> {
        let jobs = self.watch.lives().into_iter().map(|life| life.job.id);
        let jobs: BTreeSet<String> =
            jobs.chain(self.batches.ids()).chain(self.flows.ids(&self.stage)?).chain(self.ids_of_sources()?).collect();
        state::leftovers(&self.stage.redis, &jobs, workers)
    }

    /// What a look at all keys finds out of balance, and what the leaders have found meanwhile.
    fn disagreements(&self) -> Vec<Violation> {
        let said = self.stage.said_of("keys disagree").into_iter().map(|line| format!("a leader found: {line}"));
        let url = self.stage.redis.url_db(stage::DB);
        let program = Daemon::spawn(bin("drayman"), &["doctor", "--json", "--redis-url", &url], &[]);
        let status = program.wait();
        let lines = program.lines();
        let mut found: Vec<String> = lines.iter().filter(|line| line.starts_with(r#"{"finding""#)).cloned().collect();
        if found.is_empty() && !status.success() {
            found.push(format!("drayman doctor ended with {status}: {}", program.output()));
        }
        said.chain(found).map(|found| Violation::new(AGREE, found)).collect()
    }

    fn judge(self) -> Report {
        let Self { options, stage, watch, violations, crashes, struck, faults, lasted, drained, .. } = &self;
        let mut violations = violations.lock().expect("no thread panics").clone();
        violations.extend(verdict::of_processes(stage));
        // What is still left of workers that run was waited for.
        let alive = stage.names();
        violations.extend(self.leftovers(&alive).expect("nothing fails any more"));
        self.close_folder();
        // Nothing runs while it is judged. Workers that stop in order take their registrations with them.
        stage.stop_workers();
        violations.extend(verdict::of_processes(stage));
        violations.extend(self.leftovers(&alive).expect("nothing fails any more"));
        violations.extend(self.disagreements());
        let crashes = crashes.lock().expect("no thread panics").clone();
        // All records once more.
        let mut redis = stage::connect(&stage.redis).expect("nothing fails any more");
        let ids: Vec<String> = watch.lives().into_iter().map(|life| life.job.id).collect();
        for page in ids.chunks(100) {
            watch.read(&mut redis, page).expect("nothing fails any more");
        }
        let struck = struck.lock().expect("no thread panics").clone();
        let seen = verdict::Seen { stage, crashes: &crashes, struck: &struck, alive: &alive };
        let (found, counts) = verdict::of_jobs(watch, &seen).expect("nothing fails any more");
        violations.extend(found);
        let (found, batches) = self.judge_batches();
        violations.extend(found);
        let (found, flows) = self.judge_flows();
        violations.extend(found);
        let (found, tracked) = self.judge_tracked();
        violations.extend(found);
        violations.extend(self.judge_rules());
        let (found, sources) = self.judge_sources().expect("nothing fails any more");
        violations.extend(found);
        let mut concerned: Vec<String> = violations.iter().filter_map(|violation| violation.job.clone()).collect();
        concerned.dedup();
        let accounts = concerned.iter().take(8).map(|job| verdict::account(stage, watch, job)).collect();
        let mut routes = BTreeMap::new();
        for life in watch.lives() {
            let route = match life.job.route {
                Route::Transaction => "in a transaction",
                Route::Plain(_) => "by plain commands",
                Route::HashLast => "hash last",
                Route::Native => "native",
            };
            *routes.entry(route.to_owned()).or_default() += 1;
        }
        Report {
            options: (*options).clone(),
            lasted: *lasted.lock().expect("no thread panics"),
            drained: *drained.lock().expect("no thread panics"),
            routes,
            counts,
            batches,
            flows,
            tracked,
            sources,
            faults: faults.lock().expect("no thread panics").clone(),
            recoveries: watch.recoveries(),
            violations,
            accounts,
        }
    }

    /// Hands in one user's jobs, one after the other.
    fn user<'scope>(&'scope self, user: usize, scope: &'scope thread::Scope<'scope, '_>) {
        let mut client = None;
        let rust = self.options.worker.as_ref().map(|_| Handler::Rust);
        let handlers: Vec<Handler> = [Handler::Program, Handler::Command].into_iter().chain(rust).collect();
        for number in 0.. {
            let job = Job::plan(self.options.seed, user, number, &handlers);
            self.wait(job.pause);
            while self.watch.open_of(&job.user) >= OPEN_PER_USER && !self.is_closed() {
                thread::sleep(Duration::from_millis(50));
            }
            if !self.is_wanted() {
                return;
            }
            self.prepare(&job);
            self.watch.enter(&job);
            let begin = Instant::now();
            // After the faults nothing stands in the way any more.
            let mut calm_since = None;
            while !self.hand_in(&job, &mut client) {
                if calm_since.get_or_insert_with(Instant::now).elapsed() > HAND_IN_LIMIT && self.is_calm() {
                    return;
                }
                if !self.is_calm() {
                    calm_since = None;
                }
                thread::sleep(Duration::from_millis(50));
            }
            self.watch.with(&job.id, |life| life.acknowledged = Some(Instant::now()));
            if let Some(after) = job.cancel_after {
                let after = after.saturating_sub(begin.elapsed());
                scope.spawn(move || {
                    self.wait(after);
                    if job.cancelled_plainly { self.cancel_plainly(&job.id) } else { self.cancel(&job.id) }
                });
            }
        }
    }

    fn wait(&self, pause: Duration) {
        let end = Instant::now() + pause;
        while Instant::now() < end && !self.is_closed() {
            thread::sleep(pause.min(Duration::from_millis(20)));
        }
    }

    /// Makes in the database what the job's statements need there.
    fn prepare(&self, job: &Job) {
        for sequence in job.sequences() {
            while self.stage.sql(&format!("CREATE SEQUENCE IF NOT EXISTS {sequence}")).is_err() {
                thread::sleep(Duration::from_millis(50));
            }
        }
    }

    /// Hands a job in, or makes sure that it was; false if nobody knows.
    fn hand_in(&self, job: &Job, client: &mut Option<RawClient>) -> bool {
        if job.route == Route::Native {
            return self.submit(job);
        }
        let pushed = match client {
            Some(client) => self.push(job, client),
            None => connect_to(self.stage.proxies[self.options.workers].addr())
                .and_then(|fresh| self.push(job, client.insert(fresh))),
        };
        if let Err(error) = &pushed {
            self.watch.note(&job.id, format!("could not be pushed: {error}"));
            *client = None;
        }
        pushed.is_ok()
    }

    /// What a foreign producer does, and what a careful one does again after an error: nothing that was done already.
    fn push(&self, job: &Job, redis: &mut RawClient) -> io::Result<()> {
        let (key, queue) = (state::job(&job.id), state::queue(&job.user));
        let target = self.stage.database(job.proxied);
        let (host, port, query, input) = (HOSTS[job.host], target.port().to_string(), job.query(), job.input());
        let op = job.task().map(Handler::op);
        let connection = ["host", host, "port", &port, "dbname", stage::DATABASE, "dbuser", "postgres", "pass", ""];
        let work = match op {
            Some(op) => vec!["kind", "task", "app", APP, "op", op, "input", &input],
            None => [&["query", &query], &connection[..]].concat(),
        };
        let mut hash: Vec<String> = ["HSET", &key, "user", &job.user, "status", "pending"]
            .into_iter()
            .chain(work)
            .chain(["created_at", "2026-01-01T00:00:00.000Z", "updated_at", "2026-01-01T00:00:00.000Z"])
            .map(str::to_owned)
            .collect();
        for (name, text) in job.fields() {
            hash.extend([name.to_owned(), text]);
        }
        if let Some(attempts) = job.max_attempts {
            hash.extend(["max_attempts".to_owned(), attempts.to_string()]);
        }
        let push = ["LPUSH", &queue, &job.id];
        let index = ["SADD", state::QUEUED_USERS, &job.user];
        let announce = ["PUBLISH", state::ANNOUNCEMENTS, &job.user];
        let there = ask(redis, &["EXISTS", &key])?.int() == 1;
        match job.route {
            Route::Transaction => {
                if !there {
                    ask(redis, &["MULTI"])?;
                    ask(redis, &hash)?;
                    ask(redis, &push)?;
                    ask(redis, &index)?;
                    if let Value::Nil = ask(redis, &["EXEC"])? {
                        return Err(io::Error::other("the transaction was refused"));
                    }
                }
                ask(redis, &announce)?;
            }
            Route::Plain(order) => {
                if !there {
                    ask(redis, &hash)?;
                }
                for command in order {
                    match command {
                        "LPUSH" => self.push_id(job, redis, &push)?,
                        "SADD" => drop(ask(redis, &index)?),
                        _ => drop(ask(redis, &announce)?),
                    }
                }
            }
            Route::HashLast => {
                if !there {
                    self.push_id(job, redis, &push)?;
                    ask(redis, &index)?;
                    ask(redis, &announce)?;
                    ask(redis, &hash)?;
                }
            }
            Route::Native => unreachable!("these go another way"),
        }
        Ok(())
    }

    /// Pushes the id unless it was pushed before.
    fn push_id(&self, job: &Job, redis: &mut RawClient, push: &[&str; 3]) -> io::Result<()> {
        if !state::is_queued(redis, &job.user, &job.id)? {
            ask(redis, push)?;
        }
        Ok(())
    }

    fn submit(&self, job: &Job) -> bool {
        let target = self.stage.database(job.proxied);
        let (port, url) = (target.port().to_string(), self.stage.clients_url());
        let work = match job.task() {
            Some(handler) => vec!["--app", APP, "--op", handler.op()],
            None => {
                vec!["--host", HOSTS[job.host], "--port", &port, "--dbname", stage::DATABASE, "--dbuser", "postgres"]
            }
        };
        let mut args: Vec<String> = ["submit", "--redis-url", &url, "--user", &job.user, "--id", &job.id]
            .into_iter()
            .chain(work)
            .map(str::to_owned)
            .collect();
        for (name, text) in job.fields() {
            args.extend([format!("--{name}"), text]);
        }
        if let Some((key, scope)) = &job.unique {
            args.extend(["--unique".into(), format!("{key}={scope}")]);
        }
        if let Some(attempts) = job.max_attempts {
            args.extend(["--max-attempts".into(), attempts.to_string()]);
        }
        if let Some(delay) = job.delay {
            args.extend(["--delay".into(), format!("{}ms", delay.as_millis())]);
        }
        args.push(if job.task().is_some() { job.input() } else { job.query() });
        let env = [("DRAYMAN_REDIS__COMMAND_TIMEOUT", "2s"), ("DRAYMAN_REDIS__CONNECT_TIMEOUT", "2s")];
        let program = Daemon::spawn(bin("drayman"), &args, &env);
        let status = self.until_it_ends(&program, self.stage.take_kill(1));
        match status {
            Some(0) => return true,
            // Another job holds its key: it is none.
            Some(4) if job.unique.is_some() => {
                self.watch.forget(&job.id);
                return true;
            }
            // 5: Redis does not answer, or nobody knows. 4: the queue is full.
            None | Some(5 | 4) => {}
            Some(code) => self.complain(Violation {
                promise: "a producer tells what it may",
                job: Some(job.id.clone()),
                found: format!("drayman submit ended with {code}: {}", program.output()),
            }),
        }
        self.watch.note(&job.id, format!("drayman submit ended with {status:?}: {}", program.output()));
        false
    }

    /// What a foreign canceller does, and one that makes sure that the job has not ended meanwhile.
    fn cancel_plainly(&self, id: &str) {
        let key = state::job(id);
        let cancel = || -> io::Result<bool> {
            let mut redis = connect_to(self.stage.proxies[self.options.workers].addr())?;
            ask(&mut redis, &["WATCH", &key])?;
            let status = state::status(&mut redis, id)?;
            if !matches!(status.as_deref(), Some("pending" | "running")) {
                return Ok(false);
            }
            ask(&mut redis, &["MULTI"])?;
            ask(&mut redis, &["HSET", &key, "status", "cancelled", "updated_at", "2026-01-01T00:00:00.000Z"])?;
            Ok(!ask(&mut redis, &["EXEC"])?.is_nil())
        };
        let cancelled = cancel();
        self.watch.note(id, format!("a foreign canceller: {cancelled:?}"));
        if cancelled.unwrap_or(false) {
            self.watch.with(id, |life| life.told_cancelled = true);
        }
    }

    fn cancel(&self, id: &str) {
        let args = ["--redis-url", &self.stage.clients_url(), "--wait", "5s", id];
        let env = [("DRAYMAN_REDIS__COMMAND_TIMEOUT", "2s"), ("DRAYMAN_REDIS__CONNECT_TIMEOUT", "2s")];
        let program = Daemon::spawn(bin("drayman-canceller"), &args, &env);
        let status = self.until_it_ends(&program, self.stage.take_kill(0));
        self.watch.note(id, format!("drayman-canceller ended with {status:?}: {}", program.output()));
        if status == Some(0) {
            self.watch.with(id, |life| life.told_cancelled = true);
        }
    }

    /// How a program ended; `None` if by a signal.
    fn until_it_ends(&self, program: &Daemon, kill_after: Option<Duration>) -> Option<i32> {
        if let Some(after) = kill_after {
            thread::sleep(after);
            program.signal(Signal::SIGKILL);
        }
        program.wait().code()
    }
}
