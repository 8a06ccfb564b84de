//! `drayman doctor`: what there is to see of server, workers and work, and which keys do not agree.

use std::time::Duration;

use console::{Common, Failure, Out, complain, one_line, span};
use queue_core::overview::{self, Overview};
use queue_core::reconcile::{self, Fate, Finding};
use queue_core::{Error, Store};
use serde_json::json;

use crate::cli::{DoctorArgs, WRONG};
use crate::limits;

/// Looks at everything, and repairs if told to.
pub async fn run(common: &Common, args: DoctorArgs) -> Result<u8, Failure> {
    let (config, store) = common.connect().await?;
    let retention = config.retention.finished;
    let mut overview = overview::look(&store).await?;
    let mut out = Out::default();
    let findings = match compare(&store, args.repair, retention).await {
        Ok(findings) => Some(findings),
        Err(error @ Error::Refused(_)) if !error.is_transient() => {
            overview.unseen.push(format!("whether keys agree: {error}"));
            None
        }
        Err(error) => return Err(error.into()),
    };
    if common.json {
        out.json(&json!({ "overview": overview }));
        for finding in findings.iter().flatten() {
            out.json(&json!({ "finding": finding }));
        }
    } else {
        show(&overview, &mut out);
        show_findings(findings.as_deref(), &mut out);
    }
    let Some(findings) = findings else {
        complain("keys could not be compared: the user of Redis needs the rights that docs/cli.md names");
        return Ok(console::UNREACHABLE);
    };
    Ok(if findings.iter().any(|finding| finding.fate != Fate::Repaired) { WRONG } else { console::OK })
}

async fn compare(store: &Store, repair: bool, retention: Duration) -> Result<Vec<Finding>, Error> {
    // Where the server can, looking counts as no touch: so a second look finds the same.
    let _ = store.command("CLIENT", &[b"NO-TOUCH", b"ON"]).await;
    if repair { reconcile::repair(store, retention).await } else { reconcile::check(store, retention).await }
}

fn show(overview: &Overview, out: &mut Out) {
    let mut line = |name: &str, text: String| out.line(format_args!("{name:<14}{}", one_line(&text)));
    let or_unknown = |text: Option<String>| text.unwrap_or_else(|| "?".into());
    let count = |number: Option<u64>| or_unknown(number.map(|number| number.to_string()));
    let ms = |ms: u64| span(Duration::from_millis(ms));

    let server = &overview.server;
    line("server", or_unknown(server.version.clone()));
    line(
        "memory",
        format!(
            "{} bytes of {}, maxmemory-policy {}",
            count(server.used_memory),
            match server.maxmemory {
                Some(0) => "no limit".into(),
                most => count(most),
            },
            or_unknown(server.maxmemory_policy.clone()),
        ),
    );
    line(
        "durability",
        format!(
            "appendonly {}, appendfsync {}, replicas {}",
            or_unknown(server.appendonly.clone()),
            or_unknown(server.appendfsync.clone()),
            count(server.replicas),
        ),
    );
    line("library", server.library.clone().unwrap_or_else(|| "none".into()));
    line(
        "clock",
        match server.clock_ahead_ms {
            Some(ahead) => format!("{ahead} ms ahead of this machine's"),
            None => "?".into(),
        },
    );
    line(
        "leader",
        match &overview.leader {
            Some(leader) => format!("{}, for {} ms unless renewed", leader.session, leader.ttl_ms),
            None => "none".into(),
        },
    );
    for session in &overview.sessions {
        let heard = session.silent_ms.map_or("not heard".into(), |silent| format!("heard {} ago", ms(silent)));
        line("session", format!("{}, {heard}, serves {}, holds {}", session.session, session.service, session.held));
    }
    let jobs = &overview.jobs;
    line(
        "jobs",
        format!(
            "{} queued, {} running, {} scheduled, {} ended, {} without a hash, {} rejected",
            count(jobs.queued),
            count(jobs.running),
            count(jobs.scheduled),
            count(jobs.finished),
            count(jobs.missing),
            count(jobs.rejected),
        ),
    );
    if let Some(oldest) = &overview.oldest_waiting {
        line("oldest", format!("{} of {}, waits for {}", oldest.id, oldest.user, ms(oldest.waited_ms)));
    }
    for pool in &overview.pools {
        let capacity = pool.capacity.map_or(String::new(), |most| format!(" of {most}"));
        line("pool", format!("{}, {}{capacity} running, {} users ready", pool.pool, pool.running, pool.ready));
    }
    for pool in &overview.unserved {
        let oldest = pool.oldest_waited_ms.map_or(String::new(), |waited| format!(", the oldest for {}", ms(waited)));
        line("unserved", format!("{}, {} jobs of {} users wait{oldest}", pool.pool, pool.jobs, pool.users));
    }
    for view in overview.limits.users.iter().chain(&overview.limits.pools) {
        line("limited", format!("{} {}: {}", view.kind, view.name, limits::now(view)));
    }
    for unseen in &overview.unseen {
        line("not seen", unseen.clone());
    }
    for warning in &overview.warnings {
        line("warning", warning.clone());
    }
}

fn show_findings(findings: Option<&[Finding]>, out: &mut Out) {
    let Some(findings) = findings else { return };
    for finding in findings {
        let fate = match finding.fate {
            Fate::Reported => "",
            Fate::Repairable => " [--repair]",
            Fate::Repaired => " [repaired]",
        };
        let what = one_line(&finding.what);
        out.line(format_args!("{:<14}{} {what}: {}{fate}", "found", finding.kind, one_line(&finding.sentence)));
    }
    let repaired = findings.iter().filter(|finding| finding.fate == Fate::Repaired).count();
    let summary = match (findings.len(), repaired) {
        (0, _) => "all agree".to_owned(),
        (all, 0) => format!("{all} disagreements"),
        (all, repaired) => format!("{all} disagreements, {repaired} repaired"),
    };
    out.line(format_args!("{:<14}{summary}", "keys"));
}
