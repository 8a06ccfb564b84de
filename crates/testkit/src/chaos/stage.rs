//! The servers, the proxies between them, and the workers as processes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nix::sys::signal::kill;
use nix::unistd::Pid;

use super::batches::OP;
use super::faults::Fault;
use super::state::{self, Call};
use super::workload::{self, APP, CAPACITY, POISON};
use crate::postgres::{Postgres, Rows};
use crate::process::{Daemon, Signal, bin};
use crate::proxy::{Point, Proxy};
use crate::redis::{RawClient, RedisServer, Value};
use crate::scratch::Scratch;

/// The database of Redis that the programs use when nothing else is said.
pub const DB: u8 = 5;
/// The database of PostgreSQL in which the jobs run.
pub const DATABASE: &str = "chaos";
/// How long a silent worker keeps its jobs where the machine does nothing else: short, so that a run sees many that lose theirs.
const SESSION_LIFETIME: Duration = Duration::from_secs(3);
/// How long a program takes there from its start to its end.
const PROGRAM_TIME: Duration = Duration::from_millis(30);
/// Where the workers' handlers find the file that their tasks write to. Processes that have it are theirs.
const EFFECTS_VARIABLE: &str = "CHAOS_EFFECTS";
/// How many workers may be lost with a job before it is set aside.
pub const MAX_UNCLEAN: usize = 5;
/// How long after the end of its sender's session a late finish comes in: another worker has the job by then.
const LATE: Duration = Duration::from_secs(2);
/// How long a worker has until the call comes at which it is to be killed.
const AIM: Duration = Duration::from_secs(6);
/// How soon a supervisor starts a program again that has ended by itself.
const RESTART_AFTER: Duration = Duration::from_millis(500);

/// All that a run takes place on.
#[derive(Debug)]
pub struct Stage {
    /// Keeps all that it has answered.
    pub redis: RedisServer,
    postgres: Postgres,
    runtime: tokio::runtime::Runtime,
    /// A proxy to Redis for each worker, and the last one for producers and cancellers.
    pub proxies: Vec<Proxy>,
    /// The proxy to PostgreSQL.
    pub to_postgres: Proxy,
    slots: Vec<Mutex<Slot>>,
    /// The handlers' program, the workers' configuration, and what tasks write.
    scratch: Scratch,
    /// The command line of a worker.
    worker: Vec<String>,
    /// How long a silent worker keeps its jobs.
    lifetime: Duration,
    /// Milliseconds after which the next canceller, the next producer is killed.
    pub kill_next: [Mutex<Option<Duration>>; 2],
    /// What ended workers have said, by their names.
    past: Mutex<Vec<(String, Vec<String>)>>,
    /// The names of all workers that there ever were, by their processes.
    names: Mutex<BTreeMap<String, String>>,
    /// The workers whose handlers' processes were killed.
    handlers_killed: Mutex<Vec<String>>,
    /// Workers that have come to the call at which they are to be killed, and how long until others take their places.
    doomed: Arc<Mutex<Vec<(usize, Duration)>>>,
    begin: Instant,
}

/// The place of one worker: of the process that has it now, or of the next one.
#[derive(Debug, Default)]
struct Slot {
    worker: Option<Daemon>,
    generation: u32,
    /// Its end is wanted.
    told: bool,
    start_at: Option<Instant>,
    resume_at: Option<Instant>,
    pause: Duration,
}

/// A worker that was killed: its name, and when.
pub type Killed = (String, Instant);

impl Stage {
    /// Starts the servers, and no worker yet.
    pub fn build(workers: usize, worker: Option<&[String]>) -> Self {
        let redis = RedisServer::with_config(&[("appendonly", "yes"), ("appendfsync", "always")]);
        let postgres = Postgres::with_config(&[("log_statement", "none"), ("log_min_messages", "panic")]);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        runtime.block_on(async {
            postgres.create_database(DATABASE).await;
            postgres.query(DATABASE, &workload::schema()).await;
            postgres.query(DATABASE, super::flows::SCHEMA).await;
        });
        let proxies = (0..=workers).map(|_| Proxy::start(redis.addr())).collect();
        let to_postgres = Proxy::start(postgres.addr());
        let slots = (0..workers).map(|_| Mutex::default()).collect();
        let worker = worker.map_or_else(|| vec![bin("drayman-worker").display().to_string()], <[String]>::to_vec);
        let scratch = Scratch::new("chaos");
        fs::write(scratch.path().join("task.py"), include_str!("task.py")).expect("it can be written");
        fs::write(scratch.path().join("worker.toml"), handlers(&scratch, postgres.addr())).expect("it can be written");
        Self {
            redis,
            postgres,
            runtime,
            proxies,
            to_postgres,
            slots,
            scratch,
            worker,
            lifetime: Duration::from_millis((SESSION_LIFETIME.as_millis() as f64 * slowness()) as u64),
            kill_next: Default::default(),
            past: Mutex::default(),
            names: Mutex::default(),
            handlers_killed: Mutex::default(),
            doomed: Arc::default(),
            begin: Instant::now(),
        }
    }

    /// When everything began: times in accounts count from here.
    pub fn begin(&self) -> Instant {
        self.begin
    }

    /// Where the jobs' connections lead.
    pub fn database(&self, proxied: bool) -> SocketAddr {
        if proxied { self.to_postgres.addr() } else { self.postgres.addr() }
    }

    /// The URL for producers and cancellers.
    pub fn clients_url(&self) -> String {
        self.proxies.last().expect("the last one is theirs").redis_url(DB)
    }

    /// Asks PostgreSQL, which may be down.
    pub fn sql(&self, sql: &str) -> Result<Rows, tokio_postgres::Error> {
        self.runtime.block_on(self.postgres.try_query(DATABASE, sql))
    }

    /// Starts all workers.
    pub fn start_workers(&self) {
        for at in 0..self.slots.len() {
            self.start(at, &mut self.slot(at));
        }
    }

    fn slot(&self, at: usize) -> MutexGuard<'_, Slot> {
        lock(&self.slots[at])
    }

    fn start(&self, at: usize, slot: &mut Slot) {
        slot.generation += 1;
        (slot.told, slot.start_at, slot.resume_at) = (false, None, None);
        let (name, capacity) = (format!("w{at}.{}", slot.generation), CAPACITY.to_string());
        let lifetime = humantime::format_duration(self.lifetime).to_string();
        let env = [
            ("DRAYMAN_WORKER__NAME", name.as_str()),
            ("DRAYMAN_WORKER__SESSION_LIFETIME", &lifetime),
            ("DRAYMAN_WORKER__SCAN_INTERVAL", "500ms"),
            ("DRAYMAN_WORKER__DRAIN_GRACE", "500ms"),
            ("DRAYMAN_WORKER__SLOTS", "3"),
            ("DRAYMAN_CAPACITY__DEFAULT", &capacity),
            ("DRAYMAN_REDIS__COMMAND_TIMEOUT", "1s"),
            ("DRAYMAN_REDIS__CONNECT_TIMEOUT", "1s"),
            ("DRAYMAN_RETRY__DELAY", "200ms"),
            ("DRAYMAN_RETRY__DELAY_MAX", "1s"),
            ("DRAYMAN_WORKER__MAX_UNCLEAN", &MAX_UNCLEAN.to_string()),
            ("DRAYMAN_SQL__CONNECT_TIMEOUT", "3s"),
            // Longer than any run: the records are looked at in the end.
            ("DRAYMAN_RETENTION__FINISHED", "7d"),
            ("DRAYMAN_OBJECTS__URL", &self.objects_url()),
            ("DRAYMAN_REDIS__URL", &self.proxies[at].redis_url(DB)),
            ("DRAYMAN_CONFIG", &self.scratch.path().join("worker.toml").display().to_string()),
            (EFFECTS_VARIABLE, &self.effects_file().display().to_string()),
        ];
        let worker = Daemon::spawn(&self.worker[0], &self.worker[1..], &env);
        lock(&self.names).insert(worker.pid().to_string(), name);
        slot.worker = Some(worker);
    }

    /// Where output files lie.
    pub fn objects_url(&self) -> String {
        format!("file://{}/objects", self.scratch.path().display())
    }

    /// A folder for files of the run.
    pub fn folder(&self) -> &Path {
        self.scratch.path()
    }

    fn effects_file(&self) -> PathBuf {
        self.scratch.path().join("effects")
    }

    /// The lines that tasks have written.
    pub fn task_effects(&self) -> Vec<String> {
        self.effects(|line| !is_of_a_batch(line) && !is_of_a_flow(line))
    }

    /// The lines that rows of batches, and those who are told of their ends, have written.
    pub fn batch_effects(&self) -> Vec<String> {
        self.effects(is_of_a_batch)
    }

    /// What the tasks of flows' steps have written, without their attempts.
    pub fn flow_effects(&self) -> Vec<String> {
        let told = |line: String| {
            let mut words = line.split(' ');
            Some(format!("{} {}", words.next()?, words.nth(1)?))
        };
        self.effects(is_of_a_flow).into_iter().filter_map(told).collect()
    }

    fn effects(&self, wanted: fn(&str) -> bool) -> Vec<String> {
        let text = fs::read_to_string(self.effects_file()).unwrap_or_default();
        text.lines().filter(|line| wanted(line)).map(str::to_owned).collect()
    }

    /// How much tasks and rows have written: it grows while they work.
    pub fn effects_length(&self) -> u64 {
        fs::metadata(self.effects_file()).map_or(0, |file| file.len())
    }

    /// The process of a place's worker.
    fn pid(&self, at: usize) -> Option<i32> {
        self.slot(at).worker.as_ref().map(|worker| worker.pid() as i32)
    }

    /// The processes of handlers, each with its parent.
    fn processes(&self) -> Vec<(i32, i32)> {
        let mark = format!("{EFFECTS_VARIABLE}={}", self.effects_file().display());
        let workers: BTreeSet<i32> = (0..self.slots.len()).filter_map(|at| self.pid(at)).collect();
        let of_a_handler = |entry: fs::DirEntry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let variables = fs::read(entry.path().join("environ")).ok()?;
            let has_mark = variables.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes());
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            let parent = stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()?;
            (has_mark && !workers.contains(&pid)).then_some((pid, parent))
        };
        fs::read_dir("/proc").expect("it can be read").flatten().filter_map(of_a_handler).collect()
    }

    /// Processes of handlers whose worker is gone.
    pub fn orphans(&self) -> Vec<i32> {
        let workers: BTreeSet<i32> = (0..self.slots.len()).filter_map(|at| self.pid(at)).collect();
        self.processes().into_iter().filter(|(_, parent)| !workers.contains(parent)).map(|(pid, _)| pid).collect()
    }

    /// Ends a process and keeps what it said.
    fn bury(&self, slot: &mut Slot) {
        let Some(worker) = slot.worker.take() else { return };
        lock(&self.past).push((self.name_of(&worker.pid().to_string()).unwrap_or_default(), worker.lines()));
    }

    /// The worker whose process has, or had, this id.
    pub fn name_of(&self, pid: &str) -> Option<String> {
        lock(&self.names).get(pid).cloned()
    }

    /// All that the workers have said so far, by their names.
    pub fn said(&self) -> Vec<(String, Vec<String>)> {
        let mut said = lock(&self.past).clone();
        for at in 0..self.slots.len() {
            if let Some(worker) = &self.slot(at).worker {
                said.push((self.name_of(&worker.pid().to_string()).unwrap_or_default(), worker.lines()));
            }
        }
        said
    }

    /// What the workers have said of something so far.
    pub fn said_of(&self, text: &str) -> Vec<String> {
        self.said().into_iter().flat_map(|(_, lines)| lines).filter(|line| line.contains(text)).collect()
    }

    /// How often the processes of a worker's handlers were killed.
    pub fn handlers_killed(&self, worker: &str) -> usize {
        lock(&self.handlers_killed).iter().filter(|killed| *killed == worker).count()
    }

    /// The names of the workers that run.
    pub fn names(&self) -> Vec<String> {
        let name = |at| {
            let slot = self.slot(at);
            slot.worker.as_ref().map(|_| format!("w{at}.{}", slot.generation))
        };
        (0..self.slots.len()).filter_map(name).collect()
    }

    /// The place of the worker that leads, if anybody does.
    pub fn leader(&self) -> Option<usize> {
        let leader = state::leader(&mut connect(&self.redis).ok()?).ok()??;
        let name = leader.split(':').next()?.to_owned();
        (0..self.slots.len()).find(|at| name == format!("w{at}.{}", self.slot(*at).generation))
    }

    /// Makes a fault happen, and says whom it killed. What asks Redis is left out while that does not answer.
    pub fn strike(&self, fault: Fault, ends: &mut Vec<(Instant, End)>) -> Option<Killed> {
        let at = |after: Duration| Instant::now() + after;
        let asks = matches!(fault, Fault::KillLeader(_) | Fault::StopLeader(_) | Fault::ForgetLibrary);
        if asks && ends.iter().any(|(_, end)| matches!(end, End::StartRedis | End::ResumeRedis)) {
            return None;
        }
        match fault {
            Fault::KillWorker(worker, down) => return self.kill(worker, down),
            Fault::KillHandlers(worker) => {
                let worker = self.pid(worker)?;
                lock(&self.handlers_killed).extend(self.name_of(&worker.to_string()));
                for (pid, _) in self.processes().into_iter().filter(|(_, parent)| *parent == worker) {
                    // It may have ended by itself.
                    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                }
            }
            Fault::KillLeader(down) => return self.kill(self.leader()?, down),
            Fault::EndWorker(worker, down) => {
                let mut slot = self.slot(worker);
                (slot.told, slot.pause) = (true, down);
                if let Some(worker) = &slot.worker {
                    worker.signal(Signal::SIGTERM);
                }
            }
            Fault::StopWorker(worker, pause) => self.pause(worker, pause),
            Fault::StopLeader(pause) => self.pause(self.leader()?, pause),
            Fault::KillCanceller(after) => *self.next(0) = Some(after),
            Fault::KillProducer(after) => *self.next(1) = Some(after),
            Fault::KillRedis(down) => {
                self.redis.kill();
                ends.retain(|(_, end)| *end != End::ResumeRedis);
                ends.push((at(down), End::StartRedis));
            }
            Fault::StopRedis(pause) => {
                if !ends.iter().any(|(_, end)| *end == End::StartRedis) {
                    self.redis.pause();
                    ends.push((at(pause), End::ResumeRedis));
                }
            }
            Fault::ForgetLibrary => {
                if let Ok(mut redis) = connect(&self.redis) {
                    let _ = ask(&mut redis, &["FUNCTION", "FLUSH"]);
                }
            }
            Fault::Cut(proxy) => self.proxies[proxy].cut(),
            Fault::CutAfter(proxy, direction, bytes) => self.proxies[proxy].cut_after_bytes(direction, bytes),
            Fault::DropReplies(proxy, time) => {
                self.proxies[proxy].drop_replies(true);
                ends.push((at(time), End::Pass(proxy)));
            }
            Fault::Refuse(proxy, time) => {
                self.proxies[proxy].refuse(true);
                self.proxies[proxy].cut();
                ends.push((at(time), End::Pass(proxy)));
            }
            Fault::Delay(proxy, time, delay) => {
                self.proxies[proxy].delay(delay);
                ends.push((at(time), End::Pass(proxy)));
            }
            Fault::Terminate(count) => {
                let _ = self.sql(&format!(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                     WHERE application_name LIKE 'drayman:%' ORDER BY backend_start LIMIT {count}"
                ));
            }
            Fault::CutDatabase(direction, bytes) => self.to_postgres.cut_after_bytes(direction, bytes),
            Fault::RestartDatabase => self.postgres.restart(),
            Fault::LoseTakes(worker, time) => {
                let mut lost = None;
                self.gate(worker, at(time), ends, move |call| match call {
                    Call::Take { number } if lost.as_deref() != Some(number) => {
                        lost = Some(number.to_vec());
                        Some(Point::BeforeReply)
                    }
                    _ => None,
                });
            }
            Fault::Double(worker, time) => self.gate(worker, at(time), ends, |_| Some(Point::Twice)),
            Fault::KillAtFinish(worker, down) => {
                let (doomed, mut is_doomed) = (Arc::clone(&self.doomed), false);
                self.gate(worker, at(AIM), ends, move |call| {
                    let Call::Finish { is_statement, .. } = call else { return None };
                    if !is_statement && !is_doomed {
                        return None;
                    }
                    if !std::mem::replace(&mut is_doomed, true) {
                        lock(&doomed).push((worker, down));
                    }
                    Some(Point::BeforeCall)
                });
            }
            Fault::FinishLate(worker, down) => {
                let (doomed, mut is_doomed, late) = (Arc::clone(&self.doomed), false, self.lifetime + LATE);
                self.gate(worker, at(AIM), ends, move |call| match call {
                    // It is sent again, and so may others be, until the worker is dead.
                    Call::Finish { .. } if is_doomed => Some(Point::BeforeCall),
                    Call::Finish { job, .. } if workload::is_long(job) => {
                        is_doomed = true;
                        lock(&doomed).push((worker, down));
                        Some(Point::Late(late))
                    }
                    _ => None,
                });
            }
        }
        None
    }

    /// Has a worker's calls pass a gate until then.
    fn gate(
        &self,
        worker: usize,
        end: Instant,
        ends: &mut Vec<(Instant, End)>,
        mut gate: impl FnMut(Call<'_>) -> Option<Point> + Send + 'static,
    ) {
        let proxy = &self.proxies[worker];
        proxy.gate(move |words| state::call(words).and_then(&mut gate));
        // Connections that are open have none.
        proxy.cut();
        ends.push((end, End::Pass(worker)));
    }

    /// Kills who has come to the call at which it was to be killed, and ends what stands still. Says whom it killed.
    pub fn strike_aimed(&self) -> Vec<Killed> {
        let doomed = std::mem::take(&mut *lock(&self.doomed));
        let killed = doomed.into_iter().filter_map(|(worker, down)| self.kill(worker, down)).collect();
        for proxy in self.proxies.iter().filter(|proxy| proxy.stopped() > 0) {
            proxy.cut();
        }
        killed
    }

    fn next(&self, which: usize) -> MutexGuard<'_, Option<Duration>> {
        lock(&self.kill_next[which])
    }

    /// When the canceller (0) or producer (1) that starts now is to be killed.
    pub fn take_kill(&self, which: usize) -> Option<Duration> {
        self.next(which).take()
    }

    fn kill(&self, at: usize, down: Duration) -> Option<Killed> {
        let mut slot = self.slot(at);
        let worker = slot.worker.as_ref()?;
        let when = Instant::now();
        worker.kill9();
        let name = format!("w{at}.{}", slot.generation);
        self.bury(&mut slot);
        slot.start_at = Some(when + down);
        Some((name, when))
    }

    fn pause(&self, at: usize, pause: Duration) {
        let mut slot = self.slot(at);
        if let Some(worker) = &slot.worker {
            worker.signal(Signal::SIGSTOP);
            slot.resume_at = Some(Instant::now() + pause);
        }
    }

    /// Ends a fault.
    pub fn end(&self, end: End) {
        match end {
            End::StartRedis => self.redis.restart(),
            End::ResumeRedis => self.redis.resume(),
            End::Pass(at) => {
                let proxy = &self.proxies[at];
                proxy.refuse(false);
                proxy.open_gate();
                proxy.delay(Duration::ZERO);
                proxy.drop_replies(false);
                // What was lost on these connections never comes: a network would have lost the connection too.
                proxy.cut();
            }
        }
    }

    /// What a supervisor does: starts what is not there, and tells of what ended unasked, and whom jobs have killed.
    pub fn supervise(&self) -> (Vec<String>, Vec<Killed>) {
        let (mut complaints, mut killed) = (Vec::new(), Vec::new());
        for at in 0..self.slots.len() {
            let mut slot = self.slot(at);
            let now = Instant::now();
            if slot.resume_at.is_some_and(|when| when <= now) {
                slot.resume_at = None;
                if let Some(worker) = &slot.worker {
                    worker.signal(Signal::SIGCONT);
                }
            }
            if let Some(status) = slot.worker.as_ref().and_then(Daemon::try_wait) {
                let worker = slot.worker.as_ref().expect("it has just ended");
                worker.wait();
                let began = worker.line("serving").is_some();
                let mark = format!(" {POISON} {}", worker.pid());
                if !self.effects(|line| line.contains(POISON)).iter().all(|line| !line.ends_with(&mark)) {
                    killed.push((format!("w{at}.{}", slot.generation), now));
                } else if worker.line("panicked").is_some() || (began && !(slot.told && status.success())) {
                    complaints.push(format!(
                        "worker w{at}.{} ended by itself with {status}; its last lines:\n    {}",
                        slot.generation,
                        worker.lines().iter().rev().take(12).rev().cloned().collect::<Vec<_>>().join("\n    ")
                    ));
                }
                let pause = if slot.told { slot.pause } else { RESTART_AFTER };
                self.bury(&mut slot);
                slot.start_at = Some(now + pause);
            }
            if slot.worker.is_none() && slot.start_at.is_some_and(|when| when <= now) {
                self.start(at, &mut slot);
            }
        }
        (complaints, killed)
    }

    /// Ends all faults that last: the servers run, the proxies pass, and every place has a worker that goes on.
    pub fn calm(&self, ends: Vec<(Instant, End)>) {
        lock(&self.doomed).clear();
        for (_, end) in ends {
            self.end(end);
        }
        for proxy in self.proxies.iter().chain([&self.to_postgres]) {
            proxy.cut_after_bytes(crate::Direction::ToServer, u64::MAX);
            proxy.cut_after_bytes(crate::Direction::ToClient, u64::MAX);
        }
        for at in 0..self.slots.len() {
            let mut slot = self.slot(at);
            let now = Instant::now();
            if slot.worker.is_none() {
                slot.start_at = Some(now);
            }
            slot.resume_at = Some(now);
            slot.pause = Duration::ZERO;
        }
    }

    /// Tells all workers to stop and waits until they have.
    pub fn stop_workers(&self) {
        for at in 0..self.slots.len() {
            if let Some(worker) = &self.slot(at).worker {
                worker.signal(Signal::SIGTERM);
            }
        }
        for at in 0..self.slots.len() {
            let mut slot = self.slot(at);
            if let Some(worker) = &slot.worker {
                worker.wait();
            }
            self.bury(&mut slot);
        }
    }
}

/// How many times slower than one that does nothing else the machine is. Workers that it does not let beat in time would lose their
/// jobs for ever.
fn slowness() -> f64 {
    let begin = Instant::now();
    for _ in 0..3 {
        Daemon::spawn(bin("drayman"), &["--help"], &[]).wait();
    }
    (begin.elapsed().as_secs_f64() / 3.0 / PROGRAM_TIME.as_secs_f64()).clamp(1.0, 10.0)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poison| poison.into_inner())
}

fn is_of_a_batch(line: &str) -> bool {
    line.starts_with("row ") || line.starts_with("end ")
}

/// The id of a step's job is made of two.
fn is_of_a_flow(line: &str) -> bool {
    !is_of_a_batch(line) && line.split(' ').next().is_some_and(|job| job.contains(':'))
}

/// The workers' configuration file.
fn handlers(scratch: &Scratch, database: SocketAddr) -> String {
    let program = scratch.path().join("task.py");
    // Without what it loads for people at a prompt, it starts in half the time.
    let python = format!("'python3', '-I', '-S', '{}'", program.display());
    let common = format!("app = '{APP}'\nenv = ['PATH', '{EFFECTS_VARIABLE}']\nkill_grace = '100ms'");
    let (flows, host, port) = (super::flows::DATABASE, database.ip(), database.port());
    format!(
        "{}[chunks]\nserve = true\n\n[databases.{flows}]\nkind = 'postgres'\nhost = '{host}'\nport = {port}\n\
         dbname = '{DATABASE}'\nuser = 'postgres'\ntls = 'disable'\n\n\
         [[handlers]]\n{common}\nop = 'program'\nkind = 'program'\ncommand = [{python}]\nsize = 2\n\
         cancel_grace = '100ms'\n\n\
         [[handlers]]\n{common}\nop = '{OP}'\nkind = 'program'\ncommand = [{python}]\nsize = 2\n\
         cancel_grace = '100ms'\nrows = 50\nmark_done = true\n\n\
         [[handlers]]\n{common}\nop = 'command'\nkind = 'command'\n\
         command = [{python}, '{{job}}', '{{attempt}}', \
         '{{{{\"deed\":\"{{input.deed}}\",\"ms\":{{input.ms}},\"most\":{{input.most}}}}}}']\n",
        super::sources::export()
    )
}

/// The end of a fault that lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Redis starts again.
    StartRedis,
    /// Redis goes on.
    ResumeRedis,
    /// A proxy lets everything pass.
    Pass(usize),
}

/// A connection to the server itself, on the database of the jobs.
pub fn connect(redis: &RedisServer) -> io::Result<RawClient> {
    connect_to(redis.addr())
}

/// A connection on the database of the jobs.
pub fn connect_to(addr: SocketAddr) -> io::Result<RawClient> {
    let mut client = RawClient::connect(addr)?;
    ask(&mut client, &["SELECT", &DB.to_string()])?;
    Ok(client)
}

/// A command whose refusal counts as a broken connection: a server that has just started refuses what it will serve soon.
pub fn ask<A: AsRef<[u8]>>(client: &mut RawClient, args: &[A]) -> io::Result<Value> {
    match client.try_call(args)? {
        Value::Error(text) => Err(io::Error::other(text)),
        value => Ok(value),
    }
}
