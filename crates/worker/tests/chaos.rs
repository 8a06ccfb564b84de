//! Random work under random faults, for less than a minute here and for hours by
//! `cargo run -p testkit --bin chaos -- --duration 1h`.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use queue_core::keys::{Holds, TABLE};
use testkit::chaos::{LAYOUT, Options, run};

/// Another seed each time: what one run does not meet, the next may.
#[test]
fn whatever_fails_no_job_is_lost_none_is_recorded_twice_and_every_effect_is_there_once() {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    let seed = std::env::var("DRAYMAN_CHAOS_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or(now.as_nanos() as u64 % 1_000_000);
    println!("DRAYMAN_CHAOS_SEED={seed}");
    let report = run(&Options { seed, duration: Duration::from_secs(30), workers: 4, users: 6 });
    println!("{report}");
    assert!(report.violations.is_empty(), "{report}");
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
