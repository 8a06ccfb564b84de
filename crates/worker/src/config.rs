//! The worker's whole configuration. Types refuse what they can while it is read; the rest is checked before anything is
//! connected to.

use std::collections::BTreeMap;
use std::num::{NonZeroU32, NonZeroUsize};
use std::time::Duration;

pub use queue_core::config::{ConfigError, Layers};
use queue_core::config::{
    Configuration, Fault, Limits, RedisConfig, RetentionConfig, TelemetryConfig, load, positive, to_toml,
};
use queue_core::ids::{Pool, PoolPattern};
use queue_core::model::retry::{Backoff, RetryChoice, RetryPolicy, SqlStates, UNCLEAN_MAX};
use queue_core::session::Fairness;
use serde::{Deserialize, Serialize};
use telemetry::LogConfig;

use crate::execute::sql::databases::{DatabaseSettings, Databases, SettingFault, SqlSettings};

/// The commented file that stands for the defaults.
pub const DEFAULT_FILE_TEXT: &str = include_str!("../../../deploy/worker.toml");

/// Shorter session lifetimes would take a busy machine for a dead one. A leader looks once a second, and takes a lifetime
/// without a look for an outage: with lifetimes of a second it would hardly ever call anybody dead.
const SESSION_LIFETIME_MIN: Duration = Duration::from_secs(2);

/// The worker's configuration, a field for each section of the file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `[redis]`
    pub redis: RedisConfig,
    /// `[limits]`
    pub limits: Limits,
    /// `[worker]`
    pub worker: WorkerConfig,
    /// `[sql]`
    pub sql: SqlSettings,
    /// `[capacity]`
    pub capacity: CapacityConfig,
    /// `[retry]`
    pub retry: RetryConfig,
    /// `[retention]`
    pub retention: RetentionConfig,
    /// `[log]`
    pub log: LogConfig,
    /// `[telemetry]`
    pub telemetry: TelemetryConfig,
    /// `[databases.<name>]`: databases that jobs name by a word.
    pub databases: BTreeMap<String, DatabaseSettings>,
}

/// How a worker takes jobs and stops.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkerConfig {
    /// Jobs at the same time, over all pools.
    pub slots: NonZeroUsize,
    /// The pools to take from.
    pub pools: Vec<PoolPattern>,
    /// What the worker is called; its host's name if absent.
    pub name: Option<String>,
    /// How long a worker that is not heard of counts as alive.
    #[serde(with = "humantime_serde")]
    pub session_lifetime: Duration,
    /// How often to look for work that no message told of.
    #[serde(with = "humantime_serde")]
    pub scan_interval: Duration,
    /// How often the leader compares all keys and repairs those that do not agree.
    #[serde(with = "humantime_serde")]
    pub reconcile_interval: Duration,
    /// How long running work may go on once the worker is told to stop.
    #[serde(with = "humantime_serde")]
    pub drain_grace: Duration,
    /// What a job costs its user.
    pub fairness: Fairness,
    /// How many workers a job may end before it is set aside.
    pub max_unclean: NonZeroU32,
}

impl Default for WorkerConfig {
    fn default() -> Self {
        Self {
            slots: const { NonZeroUsize::new(64).unwrap() },
            pools: vec![PoolPattern::new("sql:*").expect("is a pattern")],
            name: None,
            session_lifetime: Duration::from_secs(15),
            scan_interval: Duration::from_secs(5),
            reconcile_interval: Duration::from_secs(60),
            drain_grace: Duration::from_secs(20),
            fairness: Fairness::Jobs,
            max_unclean: const { NonZeroU32::new(5).unwrap() },
        }
    }
}

/// How many jobs run at the same time in a pool, over all workers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CapacityConfig {
    /// For pools that are not named below.
    pub default: NonZeroU32,
    /// Pools of their own capacity.
    pub pools: BTreeMap<Pool, NonZeroU32>,
}

/// When jobs are tried again that do not say so themselves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetryConfig {
    /// How often a statement is tried in all.
    pub max_attempts: NonZeroU32,
    /// Errors that allow another attempt besides.
    pub on: SqlStates,
    /// How the pause grows.
    pub backoff: Backoff,
    /// The pause after the first attempt.
    #[serde(with = "humantime_serde")]
    pub delay: Duration,
    /// The longest pause.
    #[serde(with = "humantime_serde")]
    pub delay_max: Duration,
    /// What single pools say instead.
    pub pools: BTreeMap<Pool, RetryChoice>,
}

impl Default for RetryConfig {
    fn default() -> Self {
        let RetryPolicy { max_attempts, backoff, delay, delay_max, on } = RetryPolicy::default();
        Self { max_attempts, on, backoff, delay, delay_max, pools: BTreeMap::new() }
    }
}

impl RetryConfig {
    /// The policy of a pool.
    pub fn of(&self, pool: &Pool) -> RetryPolicy {
        let general = RetryPolicy {
            max_attempts: self.max_attempts,
            backoff: self.backoff,
            delay: self.delay,
            delay_max: self.delay_max,
            on: self.on.clone(),
        };
        self.pools.get(pool).map_or_else(|| general.clone(), |choice| general.with(choice))
    }
}

impl CapacityConfig {
    /// The capacity of a pool.
    pub fn of(&self, pool: &Pool) -> NonZeroU32 {
        self.pools.get(pool).copied().unwrap_or(self.default)
    }
}

impl Default for CapacityConfig {
    fn default() -> Self {
        Self { default: const { NonZeroU32::new(4).unwrap() }, pools: BTreeMap::new() }
    }
}

impl Config {
    /// The defaults with `layers` over them, checked.
    pub fn load(layers: &Layers) -> Result<Config, ConfigError> {
        load(&Config::default(), layers)
    }

    /// `--check-config`: what [`load`](Self::load) checks, and whether the secrets that it points to are there.
    pub fn check(layers: &Layers) -> Result<Config, CheckError> {
        let config = Config::load(layers)?;
        config.redis.password()?;
        if let Some(fault) = config.databases().validate().into_iter().next() {
            return Err(fault.into());
        }
        Ok(config)
    }

    /// What the SQL executor is configured by.
    pub fn databases(&self) -> Databases {
        Databases { sql: self.sql.clone(), databases: self.databases.clone() }
    }

    /// `--print-config`: the configuration as a file that would say the same, without secrets.
    pub fn print(&self) -> String {
        to_toml(self).unwrap_or_else(|fault| format!("# cannot be shown: {fault}\n"))
    }
}

/// Why a configuration would not do.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// It cannot be read, or its values don't do.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A secret is not where it says.
    #[error(transparent)]
    Secret(#[from] Fault),
    /// A database can't be used as it is configured.
    #[error(transparent)]
    Database(#[from] SettingFault),
}

impl Configuration for Config {
    fn validate(&self) -> Result<(), Fault> {
        self.redis.validate()?;
        self.limits.validate()?;
        if self.worker.pools.is_empty() {
            return Err(Fault::new("worker.pools", "names no pool"));
        }
        if self.worker.name.as_ref().is_some_and(|name| name.trim().is_empty()) {
            return Err(Fault::new("worker.name", "is blank"));
        }
        if self.worker.session_lifetime < SESSION_LIFETIME_MIN {
            let least = humantime::format_duration(SESSION_LIFETIME_MIN);
            return Err(Fault::new("worker.session_lifetime", format!("must be at least {least}")));
        }
        if u64::from(self.worker.max_unclean.get()) * 2 > UNCLEAN_MAX {
            return Err(Fault::new("worker.max_unclean", format!("must be at most {}", UNCLEAN_MAX / 2)));
        }
        positive("worker.scan_interval", self.worker.scan_interval)?;
        positive("worker.reconcile_interval", self.worker.reconcile_interval)?;
        positive("sql.statement_timeout", self.sql.statement_timeout)?;
        self.retention.validate()?;
        self.telemetry.validate()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(file: &str, variables: &[(&str, &str)]) -> Result<Config, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("worker.toml");
        std::fs::write(&path, file).unwrap();
        let layers = Layers {
            file: Some(path),
            default_file: "/nonexistent".into(),
            variables: variables.iter().map(|(name, value)| (name.into(), value.into())).collect(),
            flags: vec![],
        };
        Config::load(&layers).map_err(|fault| fault.to_string())
    }

    #[test]
    fn the_commented_file_says_what_the_defaults_are() {
        assert_eq!(load(DEFAULT_FILE_TEXT, &[]), Ok(Config::default()));
        // Said, not left out: it has every key that the defaults have.
        let written: toml::Table = DEFAULT_FILE_TEXT.parse().unwrap();
        let mut whole: toml::Table = Config::default().print().parse().unwrap();
        whole.remove("databases");
        assert_eq!(keys(written), keys(whole));
    }

    fn keys(table: toml::Table) -> BTreeMap<String, Vec<String>> {
        let inner = |value: toml::Value| value.as_table().map(|table| table.keys().cloned().collect());
        table.into_iter().map(|(name, section)| (name, inner(section).unwrap_or_default())).collect()
    }

    #[test]
    fn every_key_of_the_file_is_known_even_where_it_is_a_comment() {
        let as_comment = |line: &str| {
            let line = line.strip_prefix("# ")?;
            if line.starts_with("[databases.") {
                return Some(line.to_owned());
            }
            let key = line.split_once(" = ")?.0;
            (!key.trim_matches('"').contains(' ')).then(|| line.to_owned())
        };
        let full: Vec<String> =
            DEFAULT_FILE_TEXT.lines().map(|line| as_comment(line).unwrap_or_else(|| line.to_owned())).collect();
        let full = full.join("\n").replace("password_env = ", "# ");
        let config = load(&full, &[]).unwrap();
        assert_eq!(config.capacity.of(&Pool::of_host("10.0.0.1").unwrap()).get(), 8);
        assert_eq!(config.capacity.of(&Pool::of_host("10.0.0.2").unwrap()).get(), 4);
        assert!(config.worker.name.is_some() && config.redis.username.is_some() && config.redis.tls_ca_file.is_some());
        assert!(config.redis.password_file.is_some() && config.telemetry.otlp_endpoint.is_some());
    }

    #[test]
    fn what_is_printed_says_the_same_and_shows_no_password() {
        let variables = [("DRAYMAN_WORKER__POOLS", "[sql:a, db:*]"), ("DRAYMAN_LOG__FORMAT", "json")];
        let config =
            load("[capacity.pools]\n'sql:a' = 2\n[databases.x]\nkind = 'sqlite'\npath = '/x'", &variables).unwrap();
        assert_eq!(load(&config.print(), &[]), Ok(config));
        let secret = "[redis]\nurl = 'redis://:marker@h'\n[telemetry]\notlp_endpoint = 'http://u:marker@h'";
        let config = load(secret, &[]).unwrap();
        assert!(!format!("{}{config:?}", config.print()).contains("marker"));
    }

    #[test]
    fn values_that_cannot_work_are_refused() {
        let cases = [
            ("[worker]\nslots = 0", "worker.slots has an invalid value"),
            ("[worker]\npools = []", "worker.pools names no pool"),
            ("[worker]\npools = ['a b']", "worker.pools.0 cannot be used: pool pattern has the character"),
            ("[worker]\nname = ''", "worker.name is blank"),
            ("[worker]\nsession_lifetime = '200ms'", "worker.session_lifetime must be at least 2s"),
            ("[worker]\nscan_interval = '0s'", "worker.scan_interval must be longer than nothing"),
            ("[worker]\nreconcile_interval = '0s'", "worker.reconcile_interval must be longer than nothing"),
            ("[sql]\nstatement_timeout = 3", "sql.statement_timeout has an invalid type"),
            ("[retry]\nmax_attempts = 0", "retry.max_attempts has an invalid value"),
            ("[retry]\non = ['4000']", "retry.on"),
            ("[retry]\nmax_attempt = 2", "unknown key retry.max_attempt in "),
            ("[retry.pools.'sql:h']\nbackof = 'fixed'", "unknown key retry.pools.sql:h.backof in "),
            ("[worker]\nmax_unclean = 11", "worker.max_unclean must be at most 10"),
            ("[capacity]\ndefault = 0", "capacity.default has an invalid value"),
            ("[capacity.pools]\n'a b' = 1", "capacity.pools.a b"),
            ("[retention]\nfinished = 'never'", "retention.finished has an invalid value"),
            ("[log]\nformat = 'xml'", "log.format has an unknown variant"),
            ("[log]\nlevel = 'loud'", "log.level cannot be used: \"loud\" is none of"),
            ("[log]\nlevel = 'info,a=loud'", "log.level"),
            ("[telemetry]\notlp_endpoint = 'collector:4317'", "telemetry.otlp_endpoint does not begin with http://"),
            ("[limits]\nmax_payload_bytes = -1", "limits.max_payload_bytes has an invalid"),
            ("[limits]\nmax_payload_bytes = 1048577", "limits.max_payload_bytes is more than 1048576"),
            ("[limits]\nmemory_high_water = '101%'", "limits.memory_high_water cannot be used: \"101%\" is none of"),
            ("[limits]\nmemory_high_water = '2GB'", "limits.memory_high_water cannot be used: \"2GB\" is no size"),
            ("[retention]\nbytes = '0KiB'", "retention.bytes must be more than nothing"),
            ("[retention]\ncount = 0", "retention.count has an invalid"),
            ("[worker]\nnme = 1", "unknown key worker.nme in "),
        ];
        for (file, refusal) in cases {
            let fault = load(file, &[]).unwrap_err();
            assert!(fault.starts_with(refusal), "{file}: {fault}");
        }
    }

    #[test]
    fn a_check_looks_for_the_secrets() {
        let layers = Layers {
            file: None,
            default_file: "/nonexistent".into(),
            variables: vec![("DRAYMAN_REDIS__PASSWORD_FILE".into(), "/nonexistent/password".into())],
            flags: vec![],
        };
        assert!(Config::load(&layers).is_ok());
        let fault = Config::check(&layers).unwrap_err().to_string();
        assert!(fault.starts_with("redis.password_file names /nonexistent/password, which cannot be read"), "{fault}");
    }
}
