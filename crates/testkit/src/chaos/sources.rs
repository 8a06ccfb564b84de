//! What makes jobs by itself, a schedule and a folder, and what is made of jobs that have ended: rows in a database.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use serde_json::json;

use super::Run;
use super::batches::OP;
use super::random::Random;
use super::rules::until_done;
use super::stage::connect;
use super::state;
use super::verdict::Violation;
use super::workload::APP;
use crate::process::{Daemon, bin};

/// The schedule, and between two of its ticks.
const SCHEDULE: &str = "ticks";
const TICK: Duration = Duration::from_secs(4);

/// Most files that are not in the archive yet.
const OPEN_FILES: usize = 3;

const TICKS: &str = "each tick of a schedule is one job, and none is left out";
const FILES: &str = "each file that comes into a folder is one batch with all its rows, and goes to the archive";
const EXPORTED: &str = "each end of a job is one row in the database of what has ended";

/// The files that were put into the folder, with how many rows each has, and the daemon that looks at it.
#[derive(Debug, Default)]
pub struct Intake {
    files: Mutex<BTreeMap<String, usize>>,
    daemon: Mutex<Option<Daemon>>,
}

/// What was counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Ticks.
    pub ticks: usize,
    /// Files.
    pub files: usize,
    /// Rows of jobs and batches that have ended.
    pub exported: usize,
}

impl Run<'_> {
    fn folder(&self) -> PathBuf {
        self.stage.folder().join("in")
    }

    /// Has a schedule make jobs until everything is handed in.
    pub(super) fn scheduler(&self) {
        let expression = format!("*/{} * * * * *", TICK.as_secs());
        let input = json!({ "deed": "work", "ms": 10, "most": 0 }).to_string();
        let args = ["cron", "add", SCHEDULE, "--cron", &expression, "--missed", "catch-up", "--user", "schedules"];
        until_done(&self.stage, &[&args[..], &["--app", APP, "--op", "program", &input]].concat());
        while !self.is_closed() {
            self.wait(TICK);
        }
        until_done(&self.stage, &["cron", "remove", SCHEDULE]);
    }

    /// Puts files into a folder, one after the other, and kills the daemon that looks at it.
    pub(super) fn file_user(&self) {
        fs::create_dir_all(self.folder()).expect("a folder of ours");
        let config = self.stage.folder().join("intake.toml");
        let text = format!(
            "[redis]\nurl = '{}'\ncommand_timeout = '1s'\n[intake]\npoll_interval = '200ms'\n[objects]\nurl = '{}'\n\
             [[folders]]\nfolder = '{}'\npattern = '*.jsonl'\nuser = 'files'\napp = '{APP}'\nop = '{OP}'\nmin_age = '0s'\n",
            self.stage.clients_url(),
            self.stage.objects_url(),
            self.folder().display()
        );
        fs::write(&config, text).expect("a file of ours");
        let mut random = Random::of(self.options.seed, &[23]);
        for number in 0.. {
            self.supervise_intake(random.chance(40));
            self.wait(random.ms(500, 4_000));
            while self.open_files().len() >= OPEN_FILES && !self.is_closed() {
                self.supervise_intake(false);
                self.wait(Duration::from_millis(200));
            }
            if !self.is_wanted() {
                break;
            }
            let (name, rows) = (format!("file-{number}.jsonl"), random.between(1, 120) as usize);
            let text = (0..rows).fold(String::new(), |mut text, n| {
                let _ = writeln!(text, "{}", json!({ "n": n, "deed": "done" }));
                text
            });
            self.intake.files.lock().expect("no thread panics").insert(name.clone(), rows);
            // Nobody looks at a file whose name begins with a dot.
            let hidden = self.folder().join(format!(".{name}"));
            fs::write(&hidden, text)
                .and_then(|()| fs::rename(&hidden, self.folder().join(&name)))
                .expect("a file of ours");
        }
    }

    /// Starts the daemon where there is none: it ends where it finds no Redis at its start.
    pub(super) fn supervise_intake(&self, is_killed: bool) {
        let mut daemon = self.intake.daemon.lock().expect("no thread panics");
        if let Some(daemon) = daemon.as_ref().filter(|_| is_killed) {
            daemon.kill9();
        }
        if daemon.as_ref().is_none_or(|daemon| daemon.try_wait().is_some()) {
            let config = self.stage.folder().join("intake.toml").display().to_string();
            *daemon = Some(Daemon::spawn(bin("drayman-intake"), &["--config", &config], &[]));
        }
    }

    /// The files that are not in the archive yet.
    pub(super) fn open_files(&self) -> Vec<String> {
        let archive = self.folder().join(".archive");
        let files = self.intake.files.lock().expect("no thread panics");
        files.keys().filter(|name| !archive.join(name).exists()).cloned().collect()
    }

    /// Ends the daemon: the folder is empty.
    pub(super) fn close_folder(&self) {
        *self.intake.daemon.lock().expect("no thread panics") = None;
    }

    /// The ids of the jobs of the schedule, and of the batches of the folder with the jobs that tell of their ends.
    pub(super) fn ids_of_sources(&self) -> io::Result<Vec<String>> {
        let mut redis = connect(&self.stage.redis)?;
        let mut ids = state::jobs_of(&mut redis, &format!("{SCHEDULE}:"))?;
        ids.extend(state::batches_of_files(&mut redis)?.into_iter().flat_map(|(id, _)| [format!("{id}:done"), id]));
        Ok(ids)
    }

    /// Those of them that have not ended.
    pub(super) fn open_of_sources(&self) -> io::Result<Vec<String>> {
        let mut redis = connect(&self.stage.redis)?;
        let mut open = Vec::new();
        for id in self.ids_of_sources()? {
            let status = state::status(&mut redis, &id)?.unwrap_or_default();
            if !["done", "failed", "ignored", "cancelled"].contains(&&*status) {
                open.push(id);
            }
        }
        Ok(open)
    }

    /// Looks at the jobs of ticks, the batches of files, and the rows of all that has ended.
    pub(super) fn judge_sources(&self) -> io::Result<(Vec<Violation>, Counts)> {
        let (mut found, mut counts) = (Vec::new(), Counts::default());
        let mut redis = connect(&self.stage.redis)?;
        let effects: Vec<String> = self.stage.flow_effects();
        let mut last: Option<SystemTime> = None;
        let mut ticks = state::jobs_of(&mut redis, &format!("{SCHEDULE}:"))?;
        ticks.sort();
        for id in &ticks {
            counts.ticks += 1;
            let at = id.split_once(':').and_then(|(_, at)| humantime::parse_rfc3339(at).ok());
            if let (Some(last), Some(at)) = (last, at)
                && last + TICK != at
            {
                found.push(Violation::of(
                    id,
                    TICKS,
                    format!("the tick before it was at {}", humantime::format_rfc3339(last)),
                ));
            }
            last = at;
            let status = state::status(&mut redis, id)?.unwrap_or_default();
            if status != "done" || !effects.contains(&format!("{id} done")) {
                found.push(Violation::of(id, TICKS, format!("it is {status:?}, and it was to be done")));
            }
        }
        let mut batches: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (id, source) in state::batches_of_files(&mut redis)? {
            batches.entry(source).or_default().push(id);
        }
        for (name, rows) in self.intake.files.lock().expect("no thread panics").iter() {
            counts.files += 1;
            let ids = batches.remove(name).unwrap_or_default();
            if ids.len() != 1 || !self.folder().join(".archive").join(name).exists() {
                let text = format!("{name} is {ids:?}; files that are not in the archive: {:?}", self.open_files());
                found.push(Violation::new(FILES, text));
            }
            for id in ids {
                let hash = state::hash(&mut redis, &id)?;
                let says = ["status", "rows", "done", "failed"].map(|name| hash.get(name).map_or("", String::as_str));
                if says[1] != rows.to_string() || says[0] == "cancelled" {
                    found.push(Violation::of(
                        &id,
                        FILES,
                        format!("{name} has {rows} rows, and its batch says {says:?}"),
                    ));
                }
            }
        }
        let rows = self.stage.sql(
            "SELECT id, count(*)::text FROM (SELECT id FROM drayman_jobs UNION ALL SELECT id FROM drayman_batches) AS ended \
             GROUP BY 1",
        );
        let row = |row: Vec<Option<String>>| {
            let mut texts = row.into_iter().flatten();
            Some((texts.next()?, texts.next()?.parse::<usize>().ok()?))
        };
        let exported: HashMap<String, usize> = rows.map_err(io::Error::other)?.into_iter().filter_map(row).collect();
        counts.exported = exported.values().sum();
        let lives = self.watch.lives();
        let ended = lives.iter().filter(|life| life.ended.is_some()).map(|life| &life.job.id);
        for id in ended.chain(&ticks) {
            let count = exported.get(id).copied().unwrap_or(0);
            if count != 1 {
                found.push(Violation::of(id, EXPORTED, format!("it has {count} rows")));
            }
        }
        Ok((found, counts))
    }
}

/// What has ended is written to this database.
pub fn export() -> String {
    format!("[export]\ndatabase = '{}'\n\n", super::flows::DATABASE)
}
