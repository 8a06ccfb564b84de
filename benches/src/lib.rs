//! What the measuring programs share: how figures are taken and printed.

use std::time::Duration;

use anyhow::Context;

/// The fields of `/proc/PID/stat` behind the program's name, which may hold blanks.
pub fn stat(pid: u32) -> anyhow::Result<Vec<String>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = text.rsplit_once(')').context("a program's name in parentheses")?;
    Ok(fields.split_whitespace().map(str::to_owned).collect())
}

/// What a process and those of its children that have ended have used.
pub fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    // utime, stime, cutime, cstime, in ticks of which Linux has 100 a second.
    let ticks: f64 = stat(pid)?[11..15].iter().map(|field| field.parse().unwrap_or(0.0)).sum();
    Ok(ticks / 100.0)
}

/// Prints the median of some values, with the lowest and the highest.
pub fn line(what: &str, unit: &str, mut values: Vec<f64>) {
    values.sort_by(f64::total_cmp);
    let median = values[values.len() / 2];
    println!(
        "{what:<42} {median:>8.0} {unit} (of {}: {:.0} to {:.0})",
        values.len(),
        values[0],
        values[values.len() - 1]
    );
}

/// Prints percentiles of times.
pub fn percentiles(what: &str, mut samples: Vec<Duration>) {
    samples.sort();
    let at = |share: f64| samples[((samples.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    println!("{what:<42} p50 {:.2} ms, p99 {:.2} ms, max {:.2} ms", at(0.5), at(0.99), at(1.0));
}
