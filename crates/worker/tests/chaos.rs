//! Random work under random faults: a hundred jobs here, and as many as wanted by
//! `cargo run -p testkit --bin chaos -- --jobs 10000`, or with handlers in Rust besides by
//! `DRAYMAN_CHAOS_JOBS=10000 cargo test -p worker --test chaos`.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use queue_core::keys::{Holds, TABLE};
use serde::Deserialize;
use telemetry::Telemetry;
use testkit::chaos::{LAYOUT, Options, run};
use worker::builder::Worker;
use worker::config::{Config, Layers};
use worker::execute::function::Context;
use worker::execute::task::Problem;
use worker::shutdown::Shutdown;

/// About a minute of them, on a machine that does nothing else.
const JOBS: usize = 120;

/// What a task is to do.
#[derive(Deserialize)]
struct Task {
    deed: String,
    ms: u64,
    most: usize,
}

/// Each worker of the run is this test once more. It does as `task.py` of the fault harness does.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_of_the_run_below() {
    let Some(path) = std::env::var_os("CHAOS_EFFECTS") else { return };
    let config = Config::load(&Layers::of_process(None)).expect("a configuration");
    let telemetry = Telemetry::start(&config.log, &config.telemetry).expect("a log");
    let lines = path.clone();
    let file = move || File::options().append(true).create(true).open(&path);
    let process = std::process::id();
    let worker = Worker::builder().config(config).handler("chaos", "rust", move |task: Task, context: Context| {
        let (file, lines) = (file(), lines.clone());
        async move {
            let mut file = file?;
            let (job, attempt) = (context.job(), context.attempt());
            file.write_all(format!("{job} {attempt} begun {process}\n").as_bytes())?;
            tokio::time::sleep(Duration::from_millis(task.ms)).await;
            if task.deed == "poison" {
                let (text, own) = (std::fs::read_to_string(lines)?, format!("{job} "));
                let killed = text.lines().filter(|line| line.starts_with(&own) && line.contains(" poison "));
                if killed.count() < task.most {
                    file.write_all(format!("{job} {attempt} poison {process}\n").as_bytes())?;
                    std::process::abort();
                }
            }
            match &*task.deed {
                "fail" => return Err(Problem::fail("planned")),
                "once" if attempt == 1 => return Err(Problem::retry("planned")),
                _ => {}
            }
            file.write_all(format!("{job} {attempt} done {process}\n").as_bytes())?;
            Ok(process)
        }
    });
    let ended = worker.run(Shutdown::on_signals().expect("signals")).await;
    telemetry.stop().await;
    if let Err(error) = ended {
        // As one that finds no Redis at its start. It is no fault of this test.
        eprintln!("{error:#}");
        std::process::exit(1);
    }
}

/// Another seed each time: what one run does not meet, the next may.
#[test]
fn whatever_fails_no_job_is_lost_none_is_recorded_twice_and_every_effect_is_there_once() {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    let seed = std::env::var("DRAYMAN_CHAOS_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or(now.as_nanos() as u64 % 1_000_000);
    println!("DRAYMAN_CHAOS_SEED={seed}");
    let exe = std::env::current_exe().expect("this program").display().to_string();
    let worker = Some([&*exe, "--exact", "--nocapture", "a_worker_of_the_run_below"].map(str::to_owned).to_vec());
    let jobs = std::env::var("DRAYMAN_CHAOS_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(JOBS);
    println!("DRAYMAN_CHAOS_JOBS={jobs}");
    let report = run(&Options { seed, jobs, workers: 4, users: 6, worker });
    println!("{report}");
    assert!(report.violations.is_empty(), "{report}");
    assert!(report.counts.tasks.len() == 3 && report.counts.runs.done > 10, "{report}");
    assert!(report.batches.done > 100 && report.batches.told > 0 && report.batches.files > 0, "{report}");
    assert!(report.flows.executions > 3 && report.flows.steps > 3, "{report}");
    assert!(report.counts.jobs > 50 && report.faults.len() > 5, "{report}");
}

/// The look from outside has a list of its own, so that a key that nobody thought of is noticed.
#[test]
fn the_look_from_outside_knows_every_key_of_the_table() {
    let template = |key: &str| key.replace("{tag}", "");
    let ours: BTreeSet<(String, &str)> = TABLE
        .iter()
        .filter(|key| key.holds != Holds::Channel)
        .map(|key| (template(key.template), key.holds.type_name()))
        .collect();
    let known: BTreeSet<(String, &str)> = LAYOUT.iter().map(|(key, kind)| (key.to_string(), *kind)).collect();
    assert_eq!(known, ours);
}
