//! The worker's whole configuration. Types refuse what they can while it is read; the rest is checked before anything is
//! connected to.

use std::collections::BTreeMap;
use std::num::{NonZeroU32, NonZeroU64, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

pub use queue_core::config::{ConfigError, Layers};
use queue_core::config::{
    Configuration, Fault, Limits, ObjectsConfig, RedisConfig, RetentionConfig, TelemetryConfig, load, positive, to_toml,
};
use queue_core::ids::{Pool, PoolPattern};
use queue_core::model::retry::{Backoff, RetryChoice, RetryPolicy, SqlStates, UNCLEAN_MAX};
use queue_core::session::Fairness;
use serde::{Deserialize, Serialize};
use telemetry::LogConfig;

use crate::execute::handlers::Registration;
use crate::execute::sql::databases::{DatabaseSettings, Databases, SettingFault, SqlSettings};

pub mod handlers;

use handlers::HandlerConfig;

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
    /// `[tasks]`
    pub tasks: TasksConfig,
    /// `[chunks]`
    pub chunks: ChunksConfig,
    /// `[capacity]`
    pub capacity: CapacityConfig,
    /// `[retry]`
    pub retry: RetryConfig,
    /// `[retention]`
    pub retention: RetentionConfig,
    /// `[objects]`
    pub objects: ObjectsConfig,
    /// `[export]`
    pub export: ExportConfig,
    /// `[log]`
    pub log: LogConfig,
    /// `[telemetry]`
    pub telemetry: TelemetryConfig,
    /// `[databases.<name>]`: databases that jobs name by a word.
    pub databases: BTreeMap<String, DatabaseSettings>,
    /// `[[handlers]]`: programs and commands that run tasks.
    pub handlers: Vec<HandlerConfig>,
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

/// How tasks are run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TasksConfig {
    /// The longest that a task may run.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// Threads for handlers that run in this process; as many as there are cores if absent.
    pub threads: Option<NonZeroUsize>,
}

impl Default for TasksConfig {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(3600), threads: None }
    }
}

/// How steps of flows that work in chunks are run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ChunksConfig {
    /// Whether this worker takes those that name no handler.
    pub serve: bool,
    /// How many of them at the same time.
    pub concurrency: NonZeroUsize,
    /// Where the files are that they name.
    pub folder: Option<PathBuf>,
}

impl Default for ChunksConfig {
    fn default() -> Self {
        Self { serve: false, concurrency: const { NonZeroUsize::new(2).unwrap() }, folder: None }
    }
}

/// Where records of what has ended are written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExportConfig {
    /// One of the databases below; nowhere if absent.
    pub database: Option<String>,
    /// Most records that wait in Redis to be written. Beyond that the oldest are dropped.
    pub max_pending: NonZeroU64,
}

impl Default for ExportConfig {
    fn default() -> Self {
        Self { database: None, max_pending: const { NonZeroU64::new(1_000_000).unwrap() } }
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

    /// The handlers that the file registers, without a process yet.
    pub fn handlers(&self) -> Result<Vec<Registration>, Fault> {
        handlers::build(&self.handlers, self.tasks.timeout)
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
        let serves_tasks = self.chunks.serve || !self.handlers.is_empty();
        if self.worker.pools.is_empty() && !serves_tasks && self.databases.is_empty() {
            return Err(Fault::new("worker.pools", "names no pool, and there are no databases and handlers"));
        }
        self.check_values()
    }
}

impl Config {
    /// What holds for a worker whose handlers stand in no file, too.
    pub(crate) fn check_values(&self) -> Result<(), Fault> {
        self.redis.validate()?;
        self.limits.validate()?;
        for (at, pool) in self.worker.pools.iter().enumerate() {
            if !["sql:", "db:"].iter().any(|kind| pool.as_str().starts_with(kind)) {
                let reason = "begins neither with sql: nor with db: (a worker serves the handlers that it has)";
                return Err(Fault::new(format!("worker.pools.{at}"), reason));
            }
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
        positive("tasks.timeout", self.tasks.timeout)?;
        if self.chunks.folder.as_ref().is_some_and(|folder| !folder.is_absolute()) {
            return Err(Fault::new("chunks.folder", "must be absolute"));
        }
        if let Some(name) = &self.export.database {
            match self.databases.get(name) {
                None => {
                    return Err(Fault::new(
                        "export.database",
                        format!("names no database: there is no databases.{name}"),
                    ));
                }
                Some(database) if database.is_of_each_user() => {
                    return Err(Fault::new("export.database", "names a database of each user: it must have no {user}"));
                }
                Some(_) => {}
            }
        }
        self.handlers()?;
        self.retention.validate()?;
        self.objects.validate()?;
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
        whole.remove("handlers");
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
            if line.starts_with("[databases.") || line == "[[handlers]]" {
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
        // Each key of a handler, and with its default where it has one.
        let written: toml::Table = full.parse().unwrap();
        let written: Vec<&toml::Table> =
            written["handlers"].as_array().unwrap().iter().flat_map(|h| h.as_table()).collect();
        let bare =
            |kind| load(&format!("[[handlers]]\napp='a'\nop='o'\nkind='{kind}'\ncommand=['x']"), &[]).unwrap().print();
        for (written, kind) in written.iter().zip(["program", "command"]) {
            let bare: toml::Table = bare(kind).parse().unwrap();
            for (key, default) in bare["handlers"][0].as_table().unwrap() {
                let own = ["app", "op", "kind", "command", "set_env"].contains(&&**key);
                assert!(own || kind == "command" || written.get(key) == Some(default), "{key}");
            }
        }
    }

    #[test]
    fn what_is_printed_says_the_same_and_shows_no_password() {
        let variables = [("DRAYMAN_WORKER__POOLS", "[sql:a, db:*]"), ("DRAYMAN_LOG__FORMAT", "json")];
        let file = "[capacity.pools]\n'sql:a' = 2\n[databases.x]\nkind = 'sqlite'\npath = '/x'\n\
                    [[handlers]]\napp = 'a'\nop = 'O'\nkind = 'program'\ncommand = ['x']\nmemory = '1GiB'\ncancel_grace = '1s'\nrows = 9\nmark_done = true\n\
                    [[handlers]]\napp = 'a'\nop = 'p'\nkind = 'command'\ncommand = ['x', '{job}']\nstdin = 'field:a.0'\nmark_done = ['y', '{batch}']\n";
        let config = load(file, &variables).unwrap();
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
            ("[worker]\npools = ['*']", "worker.pools.0 begins neither with sql: nor with db:"),
            ("[worker]\npools = ['bank.pay']", "worker.pools.0 begins neither with sql: nor with db:"),
            ("[worker]\nname = ''", "worker.name is blank"),
            ("[worker]\nsession_lifetime = '200ms'", "worker.session_lifetime must be at least 2s"),
            ("[worker]\nscan_interval = '0s'", "worker.scan_interval must be longer than nothing"),
            ("[worker]\nreconcile_interval = '0s'", "worker.reconcile_interval must be longer than nothing"),
            ("[sql]\nstatement_timeout = 3", "sql.statement_timeout has an invalid type"),
            ("[tasks]\ntimeout = '0s'", "tasks.timeout must be longer than nothing"),
            ("[tasks]\nthreads = 0", "tasks.threads has an invalid value"),
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
        let program = "[[handlers]]\napp = 'a'\nop = 'o'\nkind = 'program'\ncommand = ['x']\n";
        let command = "[[handlers]]\napp = 'a'\nop = 'P'\nkind = 'command'\ncommand = ['x', '{input.f}']\n";
        let of_handlers = [
            (program, "sise = 1", "unknown key handlers.0.sise in "),
            (program, "size = 0", "handlers.0.size has an invalid value"),
            (program, "memory = '1GB'", "handlers.0.memory cannot be used: \"1GB\" is no size"),
            (program, "memory = 0", "handlers.0.memory must be more than nothing"),
            (program, "timeout = '0s'", "handlers.0.timeout must be longer than nothing"),
            (program, "timeout = '61m'", "handlers.0.timeout is longer than tasks.timeout"),
            (program, "max_output = 0", "handlers.0.max_output must be more than nothing"),
            (program, "env = ['A=1']", "handlers.0.env has \"A=1\""),
            (program, "set_env = { '' = '1' }", "handlers.0.set_env cannot set \"\""),
            (program, "stdin = 'json'", "handlers.0.stdin is for handlers with kind = \"command\""),
            (program, "[[handlers]]\napp = 'a.b'", "handlers.1.app cannot be used: app has the character"),
            (program, "[[handlers]]\napp = 'b'\nop = 'o'\nkind = 'x'", "handlers.1.kind has an unknown variant"),
            (program, "[[handlers]]\napp = 'b'\nop = 'o'\nkind = 'program'", "handlers.1 lacks command"),
            (program, "rows = 0", "handlers.0.rows has an invalid value"),
            (
                program,
                "mark_done = ['x']",
                "handlers.0.mark_done is true or false for handlers with kind = \"program\"",
            ),
            (command, "rows = 2", "handlers.0.rows is for handlers with kind = \"program\""),
            (
                command,
                "mark_done = true",
                "handlers.0.mark_done is a command and its arguments for handlers with kind =",
            ),
            (command, "mark_done = []", "handlers.0.mark_done names no program"),
            (command, "mark_done = ['{app}']", "handlers.0.mark_done must name its program itself"),
            (command, "mark_done = ['x', '{line}']", "handlers.0.mark_done names a {line}, and is about a whole batch"),
            (command, "mark_done = ['x', '{lines}']", "handlers.0.mark_done cannot be used: \"{lines}\" has a brace"),
            (
                command,
                "mark_done = 7",
                "handlers.0.mark_done cannot be used: it is neither true or false nor a command",
            ),
            (command, "size = 2", "handlers.0.size is for handlers with kind = \"program\""),
            (command, "retry_codes = [0]", "handlers.0.retry_codes has 0"),
            (command, "retry_codes = [256]", "handlers.0.retry_codes.0 has an invalid"),
            (command, "ignore_codes = [75]", "handlers.0.ignore_codes has 75, which is one of retry_codes"),
            (command, "stdin = 'file'", "handlers.0.stdin cannot be used: \"file\" is none of none, json, row, field:"),
            (command, "stdin = 'field:'", "handlers.0.stdin cannot be used: \"\" is no path"),
            (command, "output = 'xml'", "handlers.0.output has an unknown variant"),
        ];
        let cases = cases.map(|(file, refusal)| (file.to_owned(), refusal)).into_iter();
        let mut cases: Vec<_> =
            cases.chain(of_handlers.map(|(handler, line, refusal)| (format!("{handler}{line}"), refusal))).collect();
        cases.push((program.replace("['x']", "[]"), "handlers.0.command names no program"));
        cases.push((program.replace("'x'", "'bin/x'"), "handlers.0.command begins with neither"));
        cases.push((command.replace("'x'", "'{input.x}'"), "handlers.0.command must name its program"));
        for place in ["{input}", "{job", "}", "{print $1}", "{input.a..b}"] {
            cases.push((command.replace("{input.f}", place), "handlers.0.command cannot be used"));
        }
        // An operation's letters are of no case, an application's are.
        let twice = |app: &str| format!("{program}{}", program.replace("'o'", "'O'").replace("'a'", app));
        assert_eq!(load(&twice("'A'"), &[]).unwrap().handlers().unwrap().len(), 2);
        cases.push((twice("'a'"), "handlers.1.op is a second handler for o of a"));
        for (file, refusal) in cases {
            let fault = load(&file, &[]).unwrap_err();
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
