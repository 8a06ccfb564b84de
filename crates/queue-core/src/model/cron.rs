//! When a recurring job is due: a cron expression on the wall clock of a zone, and what that means where the clock is put
//! forward or back.
//!
//! An expression that names times of the day (no `*` and no `/` for second, minute and hour) has each of them once a day,
//! whatever the clock does: one that is left out comes when the clock is put forward, one that happens twice counts the first
//! time. Any other expression follows the wall clock: what it skips does not happen, what it shows twice happens twice.
//!
//! The `croner` crate reads expressions and finds the next match on a calendar without zones. Its own rule for zones counts lists
//! (`30 2,14 * * *`) and ranges of times among the intervals, so that they would miss a day in spring and run twice in autumn.

use std::fmt;

use croner::parser::{CronParser, Year};
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, TimeZone};

/// Longest expression, in bytes.
pub const EXPRESSION_MAX_BYTES: usize = 256;

/// Why there is no such schedule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CronError {
    /// The expression can't be read.
    #[error("no cron expression: {0}")]
    Expression(String),
    /// There is no such zone.
    #[error("no IANA time zone is called {0:?}")]
    Zone(String),
    /// The expression matches no time.
    #[error("the expression {0:?} matches no time")]
    Never(String),
}

/// A cron expression in a zone.
#[derive(Clone)]
pub struct Cron {
    expression: String,
    pattern: croner::Cron,
    zone: TimeZone,
    /// It names times of the day.
    daily: bool,
}

impl fmt::Debug for Cron {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cron({} in {})", self.expression, self.zone())
    }
}

impl PartialEq for Cron {
    fn eq(&self, other: &Self) -> bool {
        self.expression == other.expression && self.zone() == other.zone()
    }
}

impl Eq for Cron {}

impl Cron {
    /// Reads an expression of five or six fields (the first of six is the second), or one of `@hourly`, `@daily`, `@weekly`,
    /// `@monthly`, `@yearly`. Zones are those of the tz database that this program was built with.
    pub fn parse(expression: &str, zone: &str) -> Result<Self, CronError> {
        let expression = expression.trim();
        let fault = |reason: String| Err(CronError::Expression(reason));
        if expression.len() > EXPRESSION_MAX_BYTES {
            return fault(format!("it is {} bytes long, at most {EXPRESSION_MAX_BYTES} are allowed", expression.len()));
        }
        if !expression.chars().all(|c| c.is_ascii_graphic() || c == ' ') {
            return fault("it has characters that no expression has".into());
        }
        let fields: Vec<&str> = expression.split(' ').filter(|field| !field.is_empty()).collect();
        let nickname = fields.len() == 1 && expression.starts_with('@');
        if !nickname && (expression.contains('@') || !matches!(fields.len(), 5 | 6)) {
            return fault(format!("it has {} fields instead of 5 or 6", fields.len()));
        }
        let pattern = match CronParser::builder().year(Year::Disallowed).build().parse(expression) {
            Ok(pattern) => pattern,
            Err(_) if nickname => return fault(format!("there is no nickname {expression}")),
            Err(error) => return fault(error.to_string()),
        };
        let daily = match nickname {
            true => !expression.eq_ignore_ascii_case("@hourly"),
            false => fields[..fields.len() - 3].iter().all(|field| !field.contains(['*', '/', '?'])),
        };
        let zone = match TimeZone::get(zone) {
            Ok(zone) if zone.iana_name().is_some() && !zone.is_unknown() => zone,
            _ => return Err(CronError::Zone(zone.into())),
        };
        let cron = Self { expression: expression.to_owned(), pattern, zone, daily };
        // A leap day comes within eight years of any time.
        match cron.after(0) {
            Some(_) => Ok(cron),
            None => Err(CronError::Never(cron.expression)),
        }
    }

    /// The expression as it was written.
    pub fn expression(&self) -> &str {
        &self.expression
    }

    /// The zone's name.
    pub fn zone(&self) -> &str {
        self.zone.iana_name().unwrap_or_default()
    }

    /// The next tick after a time, both in ms since 1970; `None` if there is none before the year 5000.
    pub fn after(&self, ms: u64) -> Option<u64> {
        let seconds = i64::try_from(ms / 1_000).ok()?;
        let time = Timestamp::from_second(seconds).ok()?;
        let tick = if self.daily { self.daily_after(time) } else { self.interval_after(time) }?;
        u64::try_from(tick.as_millisecond()).ok()
    }

    /// A tick on the zone's wall clock, with the offset from UTC.
    pub fn local(&self, ms: u64) -> String {
        match i64::try_from(ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok()) {
            Some(time) => time.to_zoned(self.zone.clone()).strftime("%Y-%m-%dT%H:%M:%S%:z").to_string(),
            None => String::new(),
        }
    }

    fn next_match(&self, wall: &DateTime, inclusive: bool) -> Option<DateTime> {
        self.pattern.find_next_occurrence(wall, inclusive).ok()
    }

    /// Each time of the wall clock has one moment, and later ones have no earlier moment.
    fn daily_after(&self, time: Timestamp) -> Option<Timestamp> {
        let mut wall = self.zone.to_datetime(time);
        loop {
            wall = self.next_match(&wall, false)?;
            let moment = match self.zone.to_ambiguous_timestamp(wall).offset() {
                AmbiguousOffset::Unambiguous { offset } => offset.to_timestamp(wall).ok()?,
                AmbiguousOffset::Fold { before, .. } => before.to_timestamp(wall).ok()?,
                // By the clock as it was before, this is a moment after the change; the change is the last one up to there.
                AmbiguousOffset::Gap { before, .. } => {
                    let skipped = before.to_timestamp(wall).ok()?;
                    let mut changes =
                        self.zone.preceding(skipped.checked_add(jiff::SignedDuration::from_secs(1)).ok()?);
                    changes.next()?.timestamp()
                }
            };
            // In the second pass of what happens twice, all of it has been.
            if moment > time {
                return Some(moment);
            }
        }
    }

    /// Between two changes of the clock the wall clock is a matter of adding: each such part is looked through on its own.
    fn interval_after(&self, time: Timestamp) -> Option<Timestamp> {
        let (mut from, mut inclusive) = (time, false);
        loop {
            let offset = self.zone.to_offset(from);
            let found = self.next_match(&offset.to_datetime(from), inclusive)?;
            let moment = offset.to_timestamp(found).ok()?;
            match self.zone.following(from).next().map(|change| change.timestamp()) {
                Some(change) if change <= moment => (from, inclusive) = (change, true),
                _ => return Some(moment),
            }
        }
    }
}

#[cfg(test)]
mod tests;
