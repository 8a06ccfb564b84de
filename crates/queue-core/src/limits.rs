//! Limits of users and pools, and pauses: set and cleared while everything runs, by operators.
//!
//! The take looks at them for all workers, so a change counts from the next start on: what was kept from its turn is given
//! another one in the same step, and who is parked hears of it. What runs goes on. A value that is wrong is refused here; what
//! others write into the keys and is no number within its bounds counts for nothing, and is told.

use std::fmt;
use std::num::{NonZeroU32, NonZeroU64};
use std::str::FromStr;
use std::time::Duration;

use serde::Serialize;

use crate::calls::Limited;
use crate::error::Error;
use crate::ids::{Pool, User};
use crate::job::{CONCURRENCY_MAX, PERIOD_MAX_MS, RATE_MAX, WEIGHTS};
use crate::store::Store;

/// Most bytes of the reason of a pause.
pub const REASON_MAX_BYTES: usize = 256;
/// How many users or pools one call looks at.
const PAGE: usize = 100;

/// Why a value is no limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NoLimit(String);

/// The share of a user among those of a pool, or of a pool among those of a worker: 1 for who has none. `0.001` to `1000`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Weight(f64);

impl FromStr for Weight {
    type Err = NoLimit;
    fn from_str(text: &str) -> Result<Self, NoLimit> {
        let (least, most) = WEIGHTS;
        match text.parse::<f64>() {
            Ok(weight) if (least..=most).contains(&weight) => Ok(Self(weight)),
            _ => Err(NoLimit(format!("a weight is a number from {least} to {most}"))),
        }
    }
}

impl fmt::Display for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Most jobs that run at once, at least one: to run none, pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Concurrency(NonZeroU32);

impl FromStr for Concurrency {
    type Err = NoLimit;
    fn from_str(text: &str) -> Result<Self, NoLimit> {
        match text.parse::<NonZeroU32>() {
            Ok(most) if most.get() <= CONCURRENCY_MAX => Ok(Self(most)),
            _ => Err(NoLimit(format!("must be a number from 1 to {CONCURRENCY_MAX}; to run nothing, pause"))),
        }
    }
}

impl fmt::Display for Concurrency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Most starts in any period of a length, whenever it begins: `100/1m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    starts: NonZeroU64,
    period: Period,
}

impl FromStr for Rate {
    type Err = NoLimit;
    fn from_str(text: &str) -> Result<Self, NoLimit> {
        let wrong = || NoLimit(format!("a rate is a number of starts from 1 to {RATE_MAX} and a period: 100/1m"));
        let (starts, period) = text.split_once('/').ok_or_else(wrong)?;
        let starts = starts.trim().parse::<NonZeroU64>().map_err(|_| wrong())?;
        if starts.get() > RATE_MAX {
            return Err(wrong());
        }
        Ok(Self { starts, period: period.trim().parse()? })
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.starts, self.period)
    }
}

/// A length of time in whole milliseconds, from one to thirty days.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Period(NonZeroU64);

impl Period {
    /// The time.
    pub fn duration(self) -> Duration {
        Duration::from_millis(self.0.get())
    }
}

impl FromStr for Period {
    type Err = NoLimit;
    fn from_str(text: &str) -> Result<Self, NoLimit> {
        let wrong = || NoLimit("a time is written as 500ms, 10s, 1m, 1h, from 1ms to 30d".into());
        let time = humantime::parse_duration(text).map_err(|_| wrong())?;
        let ms = u64::try_from(time.as_millis()).ok().filter(|ms| *ms <= PERIOD_MAX_MS).and_then(NonZeroU64::new);
        ms.map(Self).ok_or_else(wrong)
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.duration()).fmt(f)
    }
}

/// Why something is paused: one line, for people. It may be empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reason(String);

impl FromStr for Reason {
    type Err = NoLimit;
    fn from_str(text: &str) -> Result<Self, NoLimit> {
        if text.len() > REASON_MAX_BYTES || text.chars().any(char::is_control) {
            return Err(NoLimit(format!("a reason is one line of at most {REASON_MAX_BYTES} bytes")));
        }
        Ok(Self(text.to_owned()))
    }
}

/// What becomes of one limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Set<T> {
    /// It stays as it is.
    #[default]
    Keep,
    /// There is none any more.
    Clear,
    /// It is this.
    To(T),
}

/// A value, or `none`.
impl<T: FromStr> FromStr for Set<T> {
    type Err = T::Err;
    fn from_str(text: &str) -> Result<Self, T::Err> {
        if text == "none" { Ok(Set::Clear) } else { text.parse().map(Set::To) }
    }
}

impl<T> Set<T> {
    fn fields<const N: usize>(self, names: [&'static str; N], texts: impl Fn(T) -> [String; N], changes: &mut Changes) {
        match self {
            Set::Keep => {}
            Set::Clear => changes.extend(names.map(|name| (name, None))),
            Set::To(value) => changes.extend(names.into_iter().zip(texts(value).map(Some))),
        }
    }
}

type Changes = Vec<(&'static str, Option<String>)>;

/// A change of what limits a user, over all pools and workers.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct OfUser {
    /// Its share of a pool's starts. Counts from its next job in each pool on.
    pub weight: Set<Weight>,
    /// Most of its jobs that run at once.
    pub concurrency: Set<Concurrency>,
    /// Most starts of its jobs in a period.
    pub rate: Set<Rate>,
    /// How long each of its statements may run.
    pub timeout: Set<Period>,
}

/// A change of what limits a pool, over all workers.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct OfPool {
    /// Its share among pools that the same worker serves.
    pub weight: Set<Weight>,
    /// Most jobs that run at once. Comes before the capacity that workers' configurations state.
    pub concurrency: Set<Concurrency>,
    /// Most starts in a period.
    pub rate: Set<Rate>,
    /// Most jobs of one user that run at once. Without it one in a pool of SQL jobs, and any number in that of a handler.
    pub per_user: Set<Concurrency>,
}

/// Changes and shows limits and pauses.
#[derive(Debug, Clone)]
pub struct Limits {
    store: Store,
}

impl Limits {
    /// On a connection.
    pub fn new(store: Store) -> Self {
        Self { store }
    }

    /// Changes what limits a user. [`Error::Request`] where its key can't hold limits.
    pub async fn set_user(&self, user: &User, change: OfUser) -> Result<(), Error> {
        let mut changes = common(change.weight, change.concurrency, change.rate);
        change.timeout.fields(["timeout"], |time| [time.0.to_string()], &mut changes);
        self.change("user", user.as_str(), &changes).await
    }

    /// Changes what limits a pool. [`Error::Request`] where its key can't hold limits.
    pub async fn set_pool(&self, pool: &Pool, change: OfPool) -> Result<(), Error> {
        let mut changes = common(change.weight, change.concurrency, change.rate);
        change.per_user.fields(["user_limit"], |most| [most.to_string()], &mut changes);
        self.change("pool", pool.as_str(), &changes).await
    }

    /// Starts nothing more of what is named until it is resumed, however long that is. What runs goes on.
    pub async fn pause(&self, whose: &Whose, reason: &Reason) -> Result<(), Error> {
        self.change(whose.kind(), whose.name(), &[("paused", Some(format!("={}", reason.0)))]).await
    }

    /// Ends a pause, if there is one.
    pub async fn resume(&self, whose: &Whose) -> Result<(), Error> {
        self.change(whose.kind(), whose.name(), &[("paused", None)]).await
    }

    async fn change(
        &self,
        kind: &'static str,
        name: &str,
        changes: &[(&'static str, Option<String>)],
    ) -> Result<(), Error> {
        self.store.change_limits(kind, name, changes).await?.map_err(Error::Request)
    }

    /// All that is set: each user and pool with a limit or a pause, by name, and the pause of everything.
    pub async fn all(&self) -> Result<InForce, Error> {
        let keys = self.store.keys();
        let key = keys.paused();
        let paused = match self.store.command("GET", &[key.as_bytes()]).await {
            Ok(reply) => reply.lossy(),
            // It pauses all the same: the take asks whether the key is there.
            Err(error) if error.is_wrong_type() => Some(String::new()),
            Err(error) => return Err(error),
        };
        let users = self.set_of("user", &keys.limits("*"), keys.limits("").len()).await?;
        let pools = self.set_of("pool", &keys.pool("*"), keys.pool("").len()).await?;
        Ok(InForce { paused: paused.map(|text| Pause::parse(&text)), users, pools })
    }

    /// One user's limits, be there some or not.
    pub async fn user(&self, user: &User) -> Result<View, Error> {
        Ok(self.views("user", &[user.as_str().into()]).await?.remove(0))
    }

    /// One pool's limits, be there some or not.
    pub async fn pool(&self, pool: &Pool) -> Result<View, Error> {
        Ok(self.views("pool", &[pool.as_str().into()]).await?.remove(0))
    }

    async fn set_of(&self, kind: &'static str, pattern: &str, prefix: usize) -> Result<Vec<View>, Error> {
        let mut names = std::collections::BTreeSet::new();
        let mut cursor = Some(b"0".to_vec());
        while let Some(at) = cursor {
            let args: [&[u8]; 5] = [&at, b"MATCH", pattern.as_bytes(), b"COUNT", b"500"];
            let (next, found) = self.store.scan("SCAN", &args).await?;
            names.extend(found.into_iter().map(|key| key[prefix..].to_vec()));
            cursor = next;
        }
        let names: Vec<Vec<u8>> = names.into_iter().collect();
        let mut views = Vec::new();
        for page in names.chunks(PAGE) {
            views.extend(self.views(kind, page).await?.into_iter().filter(View::is_set));
        }
        Ok(views)
    }

    async fn views(&self, kind: &'static str, names: &[Vec<u8>]) -> Result<Vec<View>, Error> {
        let found = self.store.limited(kind, names).await?;
        Ok(names.iter().zip(found).map(|(name, found)| View::new(kind, name, found)).collect())
    }
}

fn common(weight: Set<Weight>, concurrency: Set<Concurrency>, rate: Set<Rate>) -> Changes {
    let mut changes = Vec::new();
    weight.fields(["weight"], |weight| [weight.to_string()], &mut changes);
    concurrency.fields(["concurrency"], |most| [most.to_string()], &mut changes);
    let texts = |rate: Rate| [rate.starts.to_string(), rate.period.0.to_string()];
    rate.fields(["rate", "period"], texts, &mut changes);
    changes
}

/// What can be paused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Whose {
    /// Everybody's jobs in all pools.
    All,
    /// A user's jobs.
    User(User),
    /// The jobs of a pool.
    Pool(Pool),
}

impl Whose {
    fn kind(&self) -> &'static str {
        match self {
            Whose::All => "all",
            Whose::User(_) => "user",
            Whose::Pool(_) => "pool",
        }
    }

    fn name(&self) -> &str {
        match self {
            Whose::All => "",
            Whose::User(user) => user.as_str(),
            Whose::Pool(pool) => pool.as_str(),
        }
    }
}

/// All limits and pauses.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct InForce {
    /// Nothing at all starts.
    pub paused: Option<Pause>,
    /// What limits users.
    pub users: Vec<View>,
    /// What limits pools.
    pub pools: Vec<View>,
}

/// A pause.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Pause {
    /// Since when, by the clock of Redis, in ISO 8601; unknown of one that was written by hand.
    pub since: Option<String>,
    /// Why.
    pub reason: String,
}

impl Pause {
    fn parse(text: &str) -> Self {
        let (since, reason) = text.split_once(' ').unwrap_or((text, ""));
        match humantime::parse_rfc3339(since) {
            Ok(_) => Self { since: Some(since.to_owned()), reason: reason.to_owned() },
            Err(_) => Self { since: None, reason: text.to_owned() },
        }
    }
}

impl fmt::Display for Pause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.since {
            Some(since) => write!(f, "paused since {since}")?,
            None => f.write_str("paused")?,
        }
        if self.reason.is_empty() { Ok(()) } else { write!(f, ": {}", self.reason) }
    }
}

/// What limits a user or a pool, and where it stands.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct View {
    /// `user` or `pool`.
    pub kind: &'static str,
    /// Its name.
    pub name: String,
    /// Its weight, if one is set.
    pub weight: Option<f64>,
    /// Most of its jobs that may run at once.
    pub concurrency: Option<u64>,
    /// Most starts in a period.
    pub rate: Option<u64>,
    /// That period, in ms.
    pub period_ms: Option<u64>,
    /// Of a user: how long a statement may run, in ms.
    pub timeout_ms: Option<u64>,
    /// Of a pool: most jobs of one user at once.
    pub per_user: Option<u64>,
    /// Its pause.
    pub paused: Option<Pause>,
    /// Its jobs that run now.
    pub running: u64,
    /// Starts in the period that ends now, since it has a rate.
    pub starts: u64,
    /// What keeps it from its turn now: `paused`, `concurrency` or `rate`.
    pub kept_by: Option<String>,
    /// When its rate allows another start, in Unix time in ms.
    pub kept_until_ms: Option<u64>,
    /// What stands in its key and counts for nothing: it is no number within its bounds.
    pub ignored: Vec<String>,
}

impl View {
    fn new(kind: &'static str, name: &[u8], found: Limited) -> Self {
        let Limited { weight, concurrency, rate, own, paused, running, starts, kept_by, kept_until_ms, ignored } =
            found;
        Self {
            kind,
            name: String::from_utf8_lossy(name).into_owned(),
            weight,
            concurrency,
            rate: rate.map(|(starts, _)| starts),
            period_ms: rate.map(|(_, period)| period),
            timeout_ms: own.filter(|_| kind == "user"),
            per_user: own.filter(|_| kind == "pool"),
            paused: paused.map(|text| Pause::parse(&text)),
            running,
            starts,
            kept_by,
            kept_until_ms,
            ignored,
        }
    }

    /// Whether anything is set.
    pub fn is_set(&self) -> bool {
        let numbers = [self.concurrency, self.rate, self.timeout_ms, self.per_user];
        numbers.iter().any(Option::is_some)
            || self.weight.is_some()
            || self.paused.is_some()
            || !self.ignored.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_within_its_bounds_or_none_at_all() {
        let refused = |wrong: &[&str], parse: fn(&str) -> bool| {
            wrong.iter().for_each(|text| assert!(!parse(text), "{text}"));
        };
        refused(&["", "0", "-1", "nan", "inf", "1001", "0.0009", "much"], |text| text.parse::<Weight>().is_ok());
        refused(&["", "0", "-1", "1.5", "1000000001", "99999999999999999999"], |text| {
            text.parse::<Concurrency>().is_ok()
        });
        let wrong = ["", "5", "5/", "/1s", "0/1s", "-1/1s", "10001/1s", "5/0s", "5/1us", "5/31d", "nan/1s", "5/1s/1s"];
        refused(&wrong, |text| text.parse::<Rate>().is_ok());
        refused(&["a\nb", "\x1b[31m", &"x".repeat(257)], |text| text.parse::<Reason>().is_ok());
        for text in ["1/1ms", "10000/30days", "100/1m"] {
            assert_eq!(text.parse::<Rate>().unwrap().to_string(), text);
        }
        assert_eq!("none".parse(), Ok(Set::<Rate>::Clear));
        assert_eq!("2.5".parse::<Set<Weight>>().map(|set| matches!(set, Set::To(_))), Ok(true));
    }
}
