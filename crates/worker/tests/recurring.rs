//! Recurring jobs with real workers: whoever of them leads, and however often that changes, each tick is made once.

mod support;

use std::collections::BTreeSet;

use queue_core::calls::Fields;
use queue_core::config::Limits;
use queue_core::ids::{ScheduleName, User};
use queue_core::model::cron::Cron;
use queue_core::schedule::{Definition, Missed, Schedules};
use support::*;
use testkit::{Daemon, RedisServer, Signal, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn while_leaders_are_killed_and_stopped_each_tick_is_made_once() {
    let server = RedisServer::start();
    let start = || daemon(&server.url_db(DB), &[("DRAYMAN_LIMITS__MAX_QUEUED_PER_USER", "10000")]);
    let mut workers: Vec<Daemon> = (0..3).map(|_| start()).collect();
    let schedules = Schedules::new(store(&server).await);
    let name = ScheduleName::new("tick").unwrap();
    let definition = Definition {
        cron: Cron::parse("* * * * * *", "Europe/Berlin").unwrap(),
        missed: Missed::CatchUp,
        grace: PATIENCE,
        user: User::new("ana").unwrap(),
        // Nobody serves it: its jobs stay where they can be counted.
        job: Fields::new().with("query", "select 1").with("database", "nowhere"),
    };
    let made = || server.state(DB).waiting("ana");
    let more = async |what: &str| {
        let before = made().len();
        eventually(what, async || (made().len() >= before + 3).then_some(())).await;
    };
    let leader = async || {
        let session = eventually("somebody to lead", async || server.state(DB).leader()).await;
        session.split(':').nth(1).and_then(|pid| pid.parse::<u32>().ok()).expect("a session's name has its pid")
    };

    // The workers run and have nothing to do when the schedule comes.
    leader().await;
    schedules.put(&name, &definition, &Limits::default()).await.unwrap();
    let first = schedules.get(&name).await.unwrap().unwrap().due_ms.unwrap();
    more("ticks of a schedule that has just been defined").await;
    for end in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGSTOP] {
        let pid = leader().await;
        let at = workers.iter().position(|worker| worker.pid() == pid).expect("one of the workers leads");
        workers[at].signal(end);
        more(&format!("ticks after {end}")).await;
        if end == Signal::SIGSTOP {
            // It goes on in the belief that it leads.
            workers[at].signal(Signal::SIGCONT);
            more("ticks beside one that was stopped").await;
        } else {
            workers[at] = start();
        }
    }

    assert!(schedules.remove(&name).await.unwrap());
    let queue = made();
    let ticks: BTreeSet<&String> = queue.iter().collect();
    assert_eq!(ticks.len(), queue.len(), "none is made twice: {queue:?}");
    let all = std::iter::successors(Some(first), |tick| definition.cron.after(*tick));
    let all: BTreeSet<String> = all.take(queue.len()).map(|tick| format!("tick:{}", time(tick))).collect();
    assert_eq!(ticks, all.iter().collect(), "none is left out");
}

fn time(ms: u64) -> humantime::Rfc3339Timestamp {
    humantime::format_rfc3339_seconds(std::time::UNIX_EPOCH + std::time::Duration::from_millis(ms))
}
