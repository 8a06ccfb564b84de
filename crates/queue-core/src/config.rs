//! Configuration that all binaries share, and the one way in which each of them reads its own.
//!
//! Four layers, later ones win: the defaults in code, a TOML file, `DRAYMAN_*` variables, flags. What no part of Drayman
//! knows is refused by its full name and with the place it came from. A variable names its key by two underscores for each
//! dot: `DRAYMAN_REDIS__URL` is `redis.url`.
//!
//! What comes from a variable or a flag is text. It becomes a number only where a number is wanted, so that a name or
//! password that looks like one is left alone; a list is written `[a, b]`.

use std::ffi::OsString;
use std::fmt;
use std::io::ErrorKind;
use std::num::{NonZeroU32, NonZeroU64};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use figment::providers::{Format, Serialized, Toml};
use figment::value::{Dict, Value};
use figment::{Figment, Profile, Provider};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::job::{PAYLOAD_MAX, RESULT_MAX_BYTES};
use crate::model::batch::ROW_MAX_BYTES;

/// The file that is read when no other is named; it may be missing.
pub const DEFAULT_FILE: &str = "/etc/drayman/worker.toml";
/// The variable that names a file, as `--config` does.
pub const FILE_VARIABLE: &str = "DRAYMAN_CONFIG";
/// The variable that holds a database's password for a job that is submitted. No part of the configuration.
pub const PASS_VARIABLE: &str = "DRAYMAN_PASS";
/// What the names of variables begin with that `drayman track run` gives to the program that it runs. No part of the configuration.
pub const TRACK_PREFIX: &str = "DRAYMAN_TRACK_";
/// What the names of variables begin with that only tests read.
const TEST_PREFIX: &str = "DRAYMAN_TEST_";
/// What the names of all other variables begin with.
pub const PREFIX: &str = "DRAYMAN_";

/// The sections of all programs. One file serves several of them, so each program passes over the sections of the others.
/// [`load`] refuses to work for a program with a section that is missing here.
const SECTIONS: [&str; 17] = [
    "redis",
    "limits",
    "worker",
    "sql",
    "databases",
    "tasks",
    "chunks",
    "handlers",
    "capacity",
    "retry",
    "retention",
    "objects",
    "export",
    "intake",
    "folders",
    "log",
    "telemetry",
];

/// Where Redis is and how long to wait for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RedisConfig {
    /// See [`RedisConfig::address`].
    pub url: Url,
    /// ACL user, instead of one in the URL.
    pub username: Option<String>,
    /// A file that holds the password and nothing else but a line's end.
    pub password_file: Option<PathBuf>,
    /// A variable that holds the password.
    pub password_env: Option<String>,
    /// Certificates of the authorities to trust beside the system's, for `rediss`.
    pub tls_ca_file: Option<PathBuf>,
    /// How long a command may take before its outcome counts as not known.
    #[serde(with = "humantime_serde")]
    pub command_timeout: Duration,
    /// How long to wait for a connection.
    #[serde(with = "humantime_serde")]
    pub connect_timeout: Duration,
    /// Whether the server has functions. Where it has none, or forbids them, each call is a script of its own.
    pub functions: bool,
}

impl Default for RedisConfig {
    fn default() -> Self {
        Self {
            url: Url("redis://127.0.0.1:6379/5".into()),
            username: None,
            password_file: None,
            password_env: None,
            tls_ca_file: None,
            command_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(2),
            functions: true,
        }
    }
}

/// Where a Redis server listens, in the form that the client reads.
#[derive(Clone, PartialEq, Eq)]
pub struct Address {
    /// `redis://`, `rediss://`, `redis-sentinel://`, `rediss-sentinel://` or `redis+unix:///path`.
    pub url: Url,
    /// The database to select, where the URL can't say so.
    pub database: Option<u8>,
}

impl RedisConfig {
    /// The server's address. `url` is `redis://host:port/db`, `rediss://…` with TLS, `redis-sentinel://host:port/db?
    /// sentinelServiceName=name&node=host:port`, `rediss-sentinel://…`, or a Unix socket: `redis+unix:///path`,
    /// `unix:///path` or the path alone, with `?db=5` behind it.
    pub fn address(&self) -> Result<Address, Fault> {
        let fault = |reason: &str| Err(Fault { key: "redis.url".into(), reason: reason.into() });
        let text = self.url.expose();
        let (scheme, rest) = match text.split_once("://") {
            Some(parts) => parts,
            None if text.starts_with('/') => ("unix", text),
            None => return fault("is neither a URL nor the path of a socket"),
        };
        match scheme {
            "redis" | "rediss" | "redis-sentinel" | "rediss-sentinel" => {
                let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
                if authority.rsplit('@').next().unwrap_or_default().is_empty() {
                    return fault("names no host");
                }
                if scheme.ends_with("-sentinel") && !rest.contains("sentinelServiceName=") {
                    return fault("names no sentinelServiceName");
                }
                Ok(Address { url: self.url.clone(), database: None })
            }
            "unix" | "redis+unix" => {
                let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
                if !path.contains('/') || path.ends_with('/') {
                    return fault("names no socket");
                }
                let database = match query.strip_prefix("db=").map(str::parse) {
                    None if query.is_empty() => None,
                    Some(Ok(number)) => Some(number),
                    _ => return fault("may say ?db=NUMBER behind a socket's path, and nothing else"),
                };
                Ok(Address { url: Url(format!("redis+unix://{path}")), database })
            }
            "redis-cluster" | "rediss-cluster" => fault("names a Redis Cluster, which is not served yet"),
            _ => fault("begins with none of redis://, rediss://, redis-sentinel://, rediss-sentinel://, redis+unix://"),
        }
    }

    /// The password, read now from where the configuration says; none if it says nothing (the URL may hold one then).
    pub fn password(&self) -> Result<Option<Secret>, Fault> {
        secret("redis", self.password_file.as_deref(), self.password_env.as_deref())
    }

    /// Checks what types alone don't.
    pub fn validate(&self) -> Result<(), Fault> {
        self.address()?;
        if self.password_file.is_some() && self.password_env.is_some() {
            return Err(Fault::new("redis.password_env", "stands beside password_file, and only one can count"));
        }
        positive("redis.command_timeout", self.command_timeout)?;
        positive("redis.connect_timeout", self.connect_timeout)
    }
}

/// What a producer may put into the queues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Most jobs that one user may have queued.
    pub max_queued_per_user: NonZeroU32,
    /// Largest payload that is accepted, in bytes.
    pub max_payload_bytes: NonZeroU64,
    /// Most tasks that one user may have queued for one handler.
    pub max_queued_tasks: NonZeroU32,
    /// Largest payload of a task, in bytes.
    pub max_task_bytes: NonZeroU64,
    /// Most rows of a batch.
    pub max_batch_rows: NonZeroU64,
    /// Largest input of a row, in bytes.
    pub max_row_bytes: NonZeroU64,
    /// Most bytes of all rows of a batch.
    pub max_batch_bytes: ByteSize,
    /// How much memory Redis may use before nothing new is accepted.
    pub memory_high_water: HighWater,
}

impl Limits {
    /// Checks what types alone don't.
    pub fn validate(&self) -> Result<(), Fault> {
        for (key, bytes) in
            [("limits.max_payload_bytes", self.max_payload_bytes), ("limits.max_task_bytes", self.max_task_bytes)]
        {
            if bytes.get() > PAYLOAD_MAX {
                return Err(Fault::new(key, format!("is more than {PAYLOAD_MAX}, the most that any job may have")));
            }
        }
        if self.max_row_bytes.get() > ROW_MAX_BYTES as u64 {
            let reason = format!("is more than {ROW_MAX_BYTES}, the most that any row may have");
            return Err(Fault::new("limits.max_row_bytes", reason));
        }
        Ok(())
    }
}

/// A size in bytes, written `16384`, `512KiB`, `2GiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let shift = match unit {
            "" => Some(0),
            "KiB" => Some(10),
            "MiB" => Some(20),
            "GiB" => Some(30),
            "TiB" => Some(40),
            _ => None,
        };
        let bytes = shift.and_then(|shift| number.parse::<u64>().ok()?.checked_mul(1 << shift));
        bytes.map(Self).ok_or_else(|| format!("{text:?} is no size; write a number of bytes, or 512KiB, 64MiB, 2GiB"))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        match units.into_iter().find(|(shift, _)| self.0 > 0 && self.0.is_multiple_of(1 << shift)) {
            Some((shift, unit)) => write!(f, "{}{unit}", self.0 >> shift),
            None => self.0.fmt(f),
        }
    }
}

/// A mark on the memory that Redis uses, written `90%` (of its `maxmemory`), `2GiB`, or `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HighWater {
    /// There is none.
    Off,
    /// In percent of the server's own limit; none where it has none.
    Percent(u8),
    /// In bytes.
    Bytes(ByteSize),
}

impl HighWater {
    /// The mark in bytes on a server with such a limit (0: none); 0 if there is none.
    pub fn bytes(self, maxmemory: u64) -> u64 {
        match self {
            HighWater::Off => 0,
            HighWater::Percent(percent) => (u128::from(maxmemory) * u128::from(percent) / 100) as u64,
            HighWater::Bytes(ByteSize(bytes)) => bytes,
        }
    }
}

impl FromStr for HighWater {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let percent = |number: &str| number.parse().ok().filter(|percent| (1..=100).contains(percent));
        match text.strip_suffix('%') {
            _ if text == "off" => Ok(HighWater::Off),
            Some(number) => {
                percent(number).map(HighWater::Percent).ok_or_else(|| format!("{text:?} is none of 1% to 100%"))
            }
            None => match text.parse()? {
                ByteSize(0) => Err("0 would accept nothing; write off".into()),
                size => Ok(HighWater::Bytes(size)),
            },
        }
    }
}

impl fmt::Display for HighWater {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HighWater::Off => f.write_str("off"),
            HighWater::Percent(percent) => write!(f, "{percent}%"),
            HighWater::Bytes(size) => size.fmt(f),
        }
    }
}

/// Written and read as text; a bare number is one, too.
macro_rules! as_text {
    ($($type:ty),+) => {$(
        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                #[derive(Deserialize)]
                #[serde(untagged)]
                enum Raw {
                    Number(u64),
                    Text(String),
                }
                let text = match Raw::deserialize(deserializer)? {
                    Raw::Number(number) => number.to_string(),
                    Raw::Text(text) => text,
                };
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )+};
}

as_text!(ByteSize, HighWater);

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_queued_per_user: const { NonZeroU32::new(64).unwrap() },
            max_payload_bytes: const { NonZeroU64::new(16_384).unwrap() },
            max_queued_tasks: const { NonZeroU32::new(100_000).unwrap() },
            max_task_bytes: const { NonZeroU64::new(1 << 18).unwrap() },
            max_batch_rows: const { NonZeroU64::new(10_000_000).unwrap() },
            max_row_bytes: const { NonZeroU64::new(1 << 16).unwrap() },
            max_batch_bytes: ByteSize(2 << 30),
            memory_high_water: HighWater::Percent(90),
        }
    }
}

/// How long records are kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetentionConfig {
    /// Jobs that have ended.
    #[serde(with = "humantime_serde")]
    pub finished: Duration,
    /// Jobs that have ended after all their attempts, or were set aside: somebody may want to retry them.
    #[serde(with = "humantime_serde")]
    pub ignored: Duration,
    /// Jobs that nothing refers to and nothing has touched.
    #[serde(with = "humantime_serde")]
    pub untouched: Duration,
    /// Most records of ended jobs; the oldest go first.
    pub count: NonZeroU64,
    /// Most bytes of them.
    pub bytes: ByteSize,
}

impl Default for RetentionConfig {
    fn default() -> Self {
        Self {
            finished: Duration::from_secs(2 * 60 * 60),
            ignored: Duration::from_secs(7 * 24 * 60 * 60),
            untouched: Duration::from_secs(2 * 24 * 60 * 60),
            count: const { NonZeroU64::new(1_000_000).unwrap() },
            bytes: ByteSize(512 << 20),
        }
    }
}

impl RetentionConfig {
    /// Checks what types alone don't.
    pub fn validate(&self) -> Result<(), Fault> {
        positive("retention.finished", self.finished)?;
        positive("retention.ignored", self.ignored)?;
        positive("retention.untouched", self.untouched)?;
        if self.bytes.0 == 0 { Err(Fault::new("retention.bytes", "must be more than nothing")) } else { Ok(()) }
    }
}

/// Where traces and metrics go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetryConfig {
    /// An OpenTelemetry collector that takes OTLP over plain HTTP; without one nothing is exported.
    pub otlp_endpoint: Option<Url>,
    /// What this service is called there.
    pub service_name: String,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self { otlp_endpoint: None, service_name: "drayman".into() }
    }
}

impl TelemetryConfig {
    /// Checks what types alone don't.
    pub fn validate(&self) -> Result<(), Fault> {
        match &self.otlp_endpoint {
            // The exporter is built without TLS: its HTTP client would bring a second cryptography library.
            Some(url) if !url.expose().starts_with("http://") => {
                let reason = "does not begin with http://; a collector on this machine can pass everything on with TLS";
                Err(Fault::new("telemetry.otlp_endpoint", reason))
            }
            _ => Ok(()),
        }
    }
}

/// Where results and files of tasks lie that are too large for Redis.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ObjectsConfig {
    /// `file:///folder`, or `s3://bucket/prefix` in programs that were built with the feature `s3`.
    pub url: Url,
    /// Results up to this size stay in the job's hash; at most 64 KiB.
    pub max_inline_bytes: ByteSize,
    /// Most bytes of a result or a file. A larger one fails its task.
    pub max_object_bytes: ByteSize,
}

impl Default for ObjectsConfig {
    fn default() -> Self {
        Self {
            url: Url::new("file:///var/lib/drayman/objects"),
            max_inline_bytes: ByteSize(RESULT_MAX_BYTES),
            max_object_bytes: ByteSize(64 << 20),
        }
    }
}

impl ObjectsConfig {
    /// The folder, where it is one: an absolute path.
    pub fn folder(&self) -> Option<PathBuf> {
        self.url.expose().strip_prefix("file://").map(PathBuf::from)
    }

    /// Checks what types alone don't.
    pub fn validate(&self) -> Result<(), Fault> {
        match (self.folder(), self.url.expose().strip_prefix("s3://")) {
            (Some(folder), _) if folder.is_absolute() && folder.components().count() > 1 => {}
            (Some(_), _) => return Err(Fault::new("objects.url", "names no folder: file:///path/of/it")),
            (None, Some(bucket)) if !bucket.is_empty() && !bucket.starts_with('/') => {}
            (None, _) => return Err(Fault::new("objects.url", "is neither file:///folder nor s3://bucket/prefix")),
        }
        if self.max_inline_bytes.0 > RESULT_MAX_BYTES {
            return Err(Fault::new("objects.max_inline_bytes", format!("is more than {RESULT_MAX_BYTES}")));
        }
        Ok(())
    }
}

/// What a program needs that submits, shows or cancels jobs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClientConfig {
    /// `[redis]`
    pub redis: RedisConfig,
    /// `[limits]`
    pub limits: Limits,
    /// `[retention]`
    pub retention: RetentionConfig,
    /// `[objects]`
    pub objects: ObjectsConfig,
    /// `[telemetry]`
    pub telemetry: TelemetryConfig,
}

impl ClientConfig {
    /// The configuration of this process, from the two flags that every program has.
    pub fn of_process(file: Option<PathBuf>, redis_url: Option<String>) -> Result<Self, ConfigError> {
        load(&Self::default(), &Layers::of_process(file).flag("--redis-url", "redis.url", redis_url))
    }
}

impl Configuration for ClientConfig {
    fn validate(&self) -> Result<(), Fault> {
        self.redis.validate()?;
        self.limits.validate()?;
        self.retention.validate()?;
        self.objects.validate()?;
        self.telemetry.validate()
    }
}

/// A URL that may hold a password. Shown, logged and serialised without it.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Url(String);

impl Url {
    /// Wraps a text as it is; who uses it checks it.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The whole text, with its password.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (front, query) = self.0.split_once('?').map_or((&*self.0, None), |(front, query)| (front, Some(query)));
        // The last @ ends the credentials: a password that was not percent-encoded may hold others, and slashes.
        match (front.split_once("://"), front.rsplit_once('@')) {
            (Some((scheme, rest)), Some((credentials, host))) => {
                let user = credentials[scheme.len() + 3..].split(':').next().unwrap_or_default();
                let hidden = if rest.len() > user.len() + host.len() + 1 { ":***" } else { "" };
                write!(f, "{scheme}://{user}{hidden}@{host}")?;
            }
            _ => f.write_str(front)?,
        }
        for (position, pair) in query.into_iter().flat_map(|query| query.split('&')).enumerate() {
            f.write_str(if position == 0 { "?" } else { "&" })?;
            match pair.split_once('=') {
                Some((name, _)) if name.to_ascii_lowercase().contains("password") => write!(f, "{name}=***")?,
                _ => f.write_str(pair)?,
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, database {:?}", self.url, self.database)
    }
}

impl Serialize for Url {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A password: it has no text but for who asks for it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The password itself.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Secret(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Reads the password of `section` from the file or the variable that the configuration names.
pub fn secret(section: &str, file: Option<&Path>, variable: Option<&str>) -> Result<Option<Secret>, Fault> {
    if let Some(path) = file {
        return match std::fs::read_to_string(path) {
            Ok(text) => Ok(Some(Secret(text.trim_end_matches(['\r', '\n']).to_owned()))),
            Err(fault) => {
                let reason = format!("names {}, which cannot be read: {fault}", path.display());
                Err(Fault::new(format!("{section}.password_file"), reason))
            }
        };
    }
    let Some(name) = variable else { return Ok(None) };
    match std::env::var(name) {
        Ok(text) => Ok(Some(Secret(text))),
        Err(_) => {
            Err(Fault::new(format!("{section}.password_env"), format!("names {name}, which is not set to any text")))
        }
    }
}

/// Refuses a length of time that is none.
pub fn positive(key: &str, duration: Duration) -> Result<(), Fault> {
    if duration.is_zero() { Err(Fault::new(key, "must be longer than nothing")) } else { Ok(()) }
}

/// A value that cannot be used, and why. Doesn't repeat the value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key} {reason}")]
pub struct Fault {
    /// The key's full name.
    pub key: String,
    /// What is wrong with its value; reads on from the key.
    pub reason: String,
}

impl Fault {
    /// Says what is wrong with the value of a key.
    pub fn new(key: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { key: key.into(), reason: reason.into() }
    }
}

/// Why no configuration could be made of the layers.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not TOML.
    #[error("{path} is not TOML: {reason}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        reason: String,
    },
    /// A variable's name or value is no text.
    #[error("{name} is not UTF-8")]
    NoText {
        /// The variable, as far as it can be shown.
        name: String,
    },
    /// Nothing has this name.
    #[error("unknown key {key} in {origin}{hint}")]
    UnknownKey {
        /// The key's full name.
        key: String,
        /// The file, variable or flag that has it.
        origin: String,
        /// What could have been meant.
        hint: String,
    },
    /// A value has the wrong type, unit or range.
    #[error("{fault} (in {origin})")]
    Invalid {
        /// The key and what is wrong.
        fault: Fault,
        /// The file, variable or flag that has it.
        origin: String,
    },
}

/// A binary's configuration: its sections as fields.
pub trait Configuration: Serialize + DeserializeOwned {
    /// Checks what types alone don't. Must not depend on anything but the values: files and servers come later.
    fn validate(&self) -> Result<(), Fault>;
}

/// What lies above the defaults.
#[derive(Debug, Clone)]
pub struct Layers {
    /// A file that was asked for; it must exist.
    pub file: Option<PathBuf>,
    /// The file to read otherwise, if it exists.
    pub default_file: PathBuf,
    /// Variables, of which those with our prefix count.
    pub variables: Vec<(OsString, OsString)>,
    /// Values from the command line.
    pub flags: Vec<Flag>,
}

/// A value from the command line.
#[derive(Debug, Clone)]
pub struct Flag {
    /// The flag, for messages: `--redis-url`.
    pub name: &'static str,
    /// The key that it sets: `redis.url`.
    pub key: &'static str,
    /// The value.
    pub value: String,
}

impl Layers {
    /// The layers of this process; `file` is what `--config` says.
    pub fn of_process(file: Option<PathBuf>) -> Self {
        let file = file.or_else(|| std::env::var_os(FILE_VARIABLE).map(PathBuf::from));
        let default_file = DEFAULT_FILE.into();
        Self { file, default_file, variables: std::env::vars_os().collect(), flags: Vec::new() }
    }

    /// Adds a flag's value, if the flag was given.
    #[must_use]
    pub fn flag(mut self, name: &'static str, key: &'static str, value: Option<String>) -> Self {
        self.flags.extend(value.map(|value| Flag { name, key, value }));
        self
    }
}

/// Lays the layers over `defaults` and checks the result.
pub fn load<T: Configuration>(defaults: &T, layers: &Layers) -> Result<T, ConfigError> {
    let base = Figment::from(Serialized::defaults(defaults));
    let own = sections(&base);
    for section in &own {
        assert!(SECTIONS.contains(&section.as_str()), "SECTIONS lacks {section}: no other program would read its file");
    }
    let mut stack = Stack { own, merged: base.clone(), layers: Vec::new() };
    if let Some((path, text)) = read_file(layers)? {
        let dict = parse_toml(&text).map_err(|reason| ConfigError::Syntax { path: path.clone(), reason })?;
        stack.push(path.display().to_string(), dict);
    }
    for (name, key, text) in overrides(layers)? {
        let value = match base.find_value(&key) {
            Ok(Value::Array(..)) => list(&text),
            Err(_) if text.starts_with('[') && text.ends_with(']') => list(&text),
            _ => Value::from(text),
        };
        stack.push(name, figment::util::nest(&key, value).into_dict().unwrap_or_default());
    }
    // Lossy: a text is read as a number or a truth value where one is wanted; a number is never made a text.
    let config: T = stack.merged.extract_lossy().map_err(|fault| stack.explain(fault))?;
    match config.validate() {
        Ok(()) => Ok(config),
        Err(fault) => {
            let path: Vec<&str> = fault.key.split('.').collect();
            let origin = stack.origin(&path).unwrap_or_else(|| "the defaults".into());
            Err(ConfigError::Invalid { fault, origin })
        }
    }
}

/// A configuration as TOML, in the form of a file that would say the same. Passwords are hidden.
pub fn to_toml<T: Serialize>(config: &T) -> Result<String, toml::ser::Error> {
    toml::to_string_pretty(config)
}

/// The layers above the defaults, kept apart beside their sum so that a fault can be traced to its place.
struct Stack {
    /// The sections of this program.
    own: Vec<String>,
    merged: Figment,
    layers: Vec<(String, Value)>,
}

impl Stack {
    fn push(&mut self, origin: String, mut dict: Dict) {
        dict.retain(|section, _| self.own.contains(section) || !SECTIONS.contains(&section.as_str()));
        self.merged = std::mem::take(&mut self.merged).merge(Serialized::from(&dict, Profile::Default));
        self.layers.push((origin, dict.into()));
    }

    /// The last layer that has the key, or the nearest key above it.
    fn origin(&self, path: &[&str]) -> Option<String> {
        let has = |value: &Value, path: &[&str]| {
            path.iter().try_fold(value, |value, name| value.as_dict()?.get(*name)).is_some()
        };
        (1..=path.len()).rev().find_map(|length| {
            self.layers.iter().rev().find(|(_, value)| has(value, &path[..length])).map(|(origin, _)| origin.clone())
        })
    }

    fn explain(&self, fault: figment::Error) -> ConfigError {
        let path: Vec<&str> = fault.path.iter().map(String::as_str).collect();
        let key = path.join(".");
        let origin = self.origin(&path).unwrap_or_else(|| "the defaults".into());
        match fault.kind {
            figment::error::Kind::UnknownField(_, known) => {
                let is_section = path.len() == 1;
                let known = if is_section { &SECTIONS } else { known };
                let mut hint = match known {
                    [] => String::new(),
                    known => format!("; there {} {}", if known.len() == 1 { "is" } else { "are" }, known.join(", ")),
                };
                if origin.starts_with(PREFIX) && is_section {
                    hint.push_str("; a section and its key are joined by two underscores");
                }
                ConfigError::UnknownKey { key, origin, hint }
            }
            kind => {
                let reason = match kind {
                    figment::error::Kind::Message(text) => format!("cannot be used: {text}"),
                    figment::error::Kind::MissingField(name) => format!("lacks {name}"),
                    kind => format!("has an {kind}"),
                };
                ConfigError::Invalid { fault: Fault { key, reason }, origin }
            }
        }
    }
}

fn sections(defaults: &Figment) -> Vec<String> {
    let data = defaults.data().unwrap_or_default();
    data.into_values().flat_map(Dict::into_keys).collect()
}

fn read_file(layers: &Layers) -> Result<Option<(PathBuf, String)>, ConfigError> {
    let path = layers.file.as_ref().unwrap_or(&layers.default_file);
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some((path.clone(), text))),
        Err(fault) if fault.kind() == ErrorKind::NotFound && layers.file.is_none() => Ok(None),
        Err(source) => Err(ConfigError::Unreadable { path: path.clone(), source }),
    }
}

fn parse_toml(text: &str) -> Result<Dict, String> {
    let data = Toml::string(text).data().map_err(|fault| {
        // The first line says where, the last one what. Those between show the text, which may hold a password.
        let text = fault.to_string();
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        match lines.as_slice() {
            [where_, .., what] => format!("{}, {what}", where_.trim_start_matches("TOML parse error ")),
            _ => text,
        }
    })?;
    Ok(data.into_values().next().unwrap_or_default())
}

/// What variables and flags set, in the order in which they count: origin, key, text.
fn overrides(layers: &Layers) -> Result<Vec<(String, String, String)>, ConfigError> {
    let mut found = Vec::new();
    for (name, value) in &layers.variables {
        let begins = |prefix: &str| name.as_encoded_bytes().starts_with(prefix.as_bytes());
        let of_others = begins(TEST_PREFIX) || begins(TRACK_PREFIX) || name == FILE_VARIABLE || name == PASS_VARIABLE;
        if !begins(PREFIX) || of_others {
            continue;
        }
        let (Some(name), Some(value)) = (name.to_str(), value.to_str()) else {
            return Err(ConfigError::NoText { name: name.to_string_lossy().into_owned() });
        };
        let key = name[PREFIX.len()..].to_ascii_lowercase().replace("__", ".");
        found.push((name.to_owned(), key, value.to_owned()));
    }
    found.sort();
    found.extend(layers.flags.iter().map(|flag| (flag.name.into(), flag.key.into(), flag.value.clone())));
    Ok(found)
}

fn list(text: &str) -> Value {
    let inner = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let items = inner.split(',').map(|item| item.trim().trim_matches('"')).filter(|item| !item.is_empty());
    items.map(Value::from).collect::<Vec<_>>().into()
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes_and_marks_are_read_as_they_are_written() {
        for (text, bytes) in [("0", 0), ("16384", 16_384), ("3KiB", 3 << 10), ("512MiB", 512 << 20), ("2TiB", 2 << 40)]
        {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)));
        }
        assert_eq!(ByteSize(512 << 20).to_string(), "512MiB");
        for text in ["", "MiB", "1.5GiB", "-1", "1MB", "99999999TiB", "1 KiB"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
        for (text, on_a_gibibyte, without_limit) in
            [("off", 0, 0), ("90%", 966_367_641, 0), ("100%", 1 << 30, 0), ("2GiB", 2 << 30, 2 << 30)]
        {
            let mark: HighWater = text.parse().unwrap();
            assert_eq!((mark.bytes(1 << 30), mark.bytes(0)), (on_a_gibibyte, without_limit));
            assert_eq!(mark.to_string(), text);
        }
        for text in ["0%", "101%", "%", "0", "on"] {
            assert!(text.parse::<HighWater>().is_err(), "{text}");
        }
    }

    use std::collections::BTreeMap;

    use super::*;

    #[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Sample {
        redis: RedisConfig,
        worker: Section,
    }

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Section {
        slots: u16,
        verbose: bool,
        name: Option<String>,
        pools: Vec<String>,
        weights: BTreeMap<String, u32>,
        #[serde(with = "humantime_serde")]
        grace: Duration,
    }

    impl Default for Section {
        fn default() -> Self {
            let pools = vec!["sql:*".into()];
            let grace = Duration::from_secs(20);
            Self { slots: 64, verbose: false, name: None, pools, weights: BTreeMap::new(), grace }
        }
    }

    impl Configuration for Sample {
        fn validate(&self) -> Result<(), Fault> {
            self.redis.validate()?;
            positive("worker.grace", self.worker.grace)
        }
    }

    struct Setting {
        folder: tempfile::TempDir,
        layers: Layers,
    }

    impl Setting {
        fn new(file: &str, variables: &[(&str, &str)]) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("worker.toml");
            std::fs::write(&path, file).unwrap();
            let variables = variables.iter().map(|(name, value)| (name.into(), value.into())).collect();
            let layers = Layers { file: Some(path), default_file: DEFAULT_FILE.into(), variables, flags: vec![] };
            Self { folder, layers }
        }

        fn load(&self) -> Result<Sample, String> {
            load(&Sample::default(), &self.layers).map_err(|fault| fault.to_string())
        }

        fn refusal(&self) -> String {
            self.load().unwrap_err().replace(&*self.folder.path().to_string_lossy(), "DIR")
        }
    }

    fn refusal(file: &str, variables: &[(&str, &str)]) -> String {
        Setting::new(file, variables).refusal()
    }

    #[test]
    fn later_layers_win_key_by_key() {
        let mut setting = Setting::new(
            "[worker]\nslots = 1\nname = 'file'\ngrace = '1m 30s'\n[redis]\nurl = 'redis://file:1/2'\n",
            &[("DRAYMAN_WORKER__NAME", "variable"), ("DRAYMAN_REDIS__URL", "redis://variable:1"), ("HOME", "/")],
        );
        setting.layers = setting.layers.flag("--redis-url", "redis.url", Some("redis://flag:1/5".into()));
        setting.layers = setting.layers.flag("--slots", "worker.slots", None);
        let sample = setting.load().unwrap();
        assert_eq!(sample.redis.url.expose(), "redis://flag:1/5");
        let worker =
            Section { slots: 1, name: Some("variable".into()), grace: Duration::from_secs(90), ..Section::default() };
        assert_eq!(sample.worker, worker);
    }

    #[test]
    fn texts_from_variables_are_not_taken_for_numbers() {
        let sample = Setting::new(
            "",
            &[
                ("DRAYMAN_WORKER__NAME", "0123456"),
                ("DRAYMAN_REDIS__USERNAME", "true"),
                ("DRAYMAN_REDIS__PASSWORD_ENV", "[x]"),
                ("DRAYMAN_WORKER__SLOTS", "12"),
                ("DRAYMAN_WORKER__VERBOSE", "true"),
                ("DRAYMAN_WORKER__POOLS", "[007, \"b\"]"),
                ("DRAYMAN_WORKER__GRACE", "5s"),
                ("DRAYMAN_WORKER__WEIGHTS__A", "3"),
            ],
        )
        .load()
        .unwrap();
        assert_eq!(sample.worker.name.as_deref(), Some("0123456"));
        assert_eq!(sample.redis.username.as_deref(), Some("true"));
        assert_eq!(sample.redis.password_env.as_deref(), Some("[x]"));
        assert_eq!((sample.worker.slots, sample.worker.verbose), (12, true));
        assert_eq!(sample.worker.pools, ["007", "b"]);
        assert_eq!(sample.worker.grace, Duration::from_secs(5));
        assert_eq!(sample.worker.weights["a"], 3);
    }

    #[test]
    fn unknown_keys_are_refused_by_full_name_and_origin() {
        assert_eq!(
            refusal("[worker]\nslotz = 1\n", &[]),
            "unknown key worker.slotz in DIR/worker.toml; there are slots, verbose, name, pools, weights, grace"
        );
        assert_eq!(
            refusal("[worker]\nslots = 1\n", &[("DRAYMAN_REDIS_URL", "redis://h")]),
            format!(
                "unknown key redis_url in DRAYMAN_REDIS_URL; there are {}; a section and its key are joined by two \
                 underscores",
                SECTIONS.join(", ")
            )
        );
        assert!(refusal("[worke]\n", &[]).starts_with("unknown key worke in DIR/worker.toml"));
        let mut setting = Setting::new("", &[]);
        setting.layers = setting.layers.flag("--url", "redis.uri", Some("x".into()));
        assert!(setting.refusal().starts_with("unknown key redis.uri in --url"));
    }

    #[test]
    fn sections_of_other_binaries_are_passed_over() {
        let setting = Setting::new("[sql]\nanything = 1\n", &[("DRAYMAN_LOG__LEVEL", "debug")]);
        assert_eq!(setting.load(), Ok(Sample::default()));
    }

    #[test]
    #[should_panic(expected = "SECTIONS lacks newcomer")]
    fn a_section_that_the_other_programs_would_not_know_is_found_at_once() {
        #[derive(Default, Serialize, Deserialize)]
        struct Program {
            newcomer: u16,
        }
        impl Configuration for Program {
            fn validate(&self) -> Result<(), Fault> {
                Ok(())
            }
        }
        let _ = load(&Program::default(), &Setting::new("", &[]).layers);
    }

    #[test]
    fn wrong_types_and_units_are_refused_by_key_and_origin() {
        let fault = refusal("[worker]\nslots = 'many'\n", &[]);
        assert!(
            fault.starts_with("worker.slots has an invalid type") && fault.ends_with("(in DIR/worker.toml)"),
            "{fault}"
        );
        let fault = refusal("", &[("DRAYMAN_WORKER__SLOTS", "70000")]);
        assert!(
            fault.starts_with("worker.slots has an invalid") && fault.ends_with("(in DRAYMAN_WORKER__SLOTS)"),
            "{fault}"
        );
        for bad in ["5", "'5 parsecs'", "'5'"] {
            let fault = refusal(&format!("[worker]\ngrace = {bad}\n"), &[]);
            assert!(fault.starts_with("worker.grace has an invalid"), "{fault}");
        }
        assert_eq!(
            refusal("[worker]\ngrace = '0s'\n", &[]),
            "worker.grace must be longer than nothing (in DIR/worker.toml)"
        );
        assert_eq!(
            refusal("", &[("DRAYMAN_REDIS__URL", "nonsense:pw@x")]),
            "redis.url is neither a URL nor the path of a socket (in DRAYMAN_REDIS__URL)"
        );
        let fault = refusal("[worker]\npools = ['a', 7]\n", &[]);
        assert!(fault.starts_with("worker.pools.1 has an invalid") && fault.ends_with("worker.toml)"), "{fault}");
    }

    #[test]
    fn a_broken_file_is_shown_by_place_and_not_by_content() {
        let fault = refusal("[redis]\nurl = 'redis://:marker@h\n", &[]);
        assert!(fault.starts_with("DIR/worker.toml is not TOML: at line 2, column"), "{fault}");
        assert!(!fault.contains("marker"), "{fault}");
    }

    #[test]
    fn a_file_that_was_asked_for_must_exist() {
        let mut setting = Setting::new("", &[]);
        let missing = setting.folder.path().join("none.toml");
        setting.layers.file = Some(missing.clone());
        assert_eq!(setting.refusal(), "cannot read DIR/none.toml");
        setting.layers = Layers { file: None, default_file: missing, ..setting.layers };
        assert_eq!(setting.load(), Ok(Sample::default()));
        setting.layers.default_file = setting.folder.path().to_owned();
        assert!(setting.refusal().starts_with("cannot read"));
    }

    #[cfg(unix)]
    #[test]
    fn a_variable_that_is_no_text_is_named() {
        use std::os::unix::ffi::OsStringExt;
        let mut setting = Setting::new("", &[]);
        setting.layers.variables.push(("DRAYMAN_WORKER__NAME".into(), OsString::from_vec(vec![0xff])));
        assert_eq!(setting.refusal(), "DRAYMAN_WORKER__NAME is not UTF-8");
    }

    #[test]
    fn passwords_are_not_shown() {
        let cases = [
            ("redis://127.0.0.1:6379/5", "redis://127.0.0.1:6379/5"),
            ("redis://:marker@h:1/2", "redis://:***@h:1/2"),
            ("redis://u:mar/@ker@h:1/2", "redis://u:***@h:1/2"),
            ("redis://u@h", "redis://u@h"),
            (
                "redis-sentinel://u:marker@h:1?node=b:2&sentinelPassword=marker",
                "redis-sentinel://u:***@h:1?node=b:2&sentinelPassword=***",
            ),
            ("/run/redis.sock?db=5", "/run/redis.sock?db=5"),
        ];
        for (url, shown) in cases {
            assert_eq!(Url::new(url).to_string(), shown);
        }
        let sample = Sample {
            redis: RedisConfig { url: Url::new("redis://u:marker@h"), ..RedisConfig::default() },
            ..Sample::default()
        };
        let printed = format!("{sample:?}{}{:?}", to_toml(&sample).unwrap(), sample.redis.address());
        assert!(!printed.contains("marker") && printed.contains("redis://u:***@h"), "{printed}");
    }

    #[test]
    fn what_is_printed_can_be_read_again() {
        let setting = Setting::new(&to_toml(&Sample::default()).unwrap(), &[]);
        assert_eq!(setting.load(), Ok(Sample::default()));
    }

    #[test]
    fn addresses_are_checked_and_sockets_have_several_spellings() {
        let of = |url: &str| RedisConfig { url: Url::new(url), ..RedisConfig::default() }.address();
        for same in [
            "redis://h",
            "rediss://u:p@h:1/5",
            "redis-sentinel://h:1/5?sentinelServiceName=s",
            "redis+unix:///run/r.sock",
        ] {
            assert_eq!(of(same).unwrap(), Address { url: Url::new(same), database: None });
        }
        for socket in ["/run/r.sock?db=5", "unix:///run/r.sock?db=5", "redis+unix:///run/r.sock?db=5"] {
            assert_eq!(of(socket).unwrap(), Address { url: Url::new("redis+unix:///run/r.sock"), database: Some(5) });
        }
        for bad in [
            "",
            "localhost:6379",
            "http://h",
            "redis://",
            "redis://u:p@/5",
            "redis-sentinel://h:1",
            "redis-cluster://h",
            "unix://",
            "/run/",
            "/run/r.sock?db=x",
            "/run/r.sock?x=1",
        ] {
            assert_eq!(of(bad).unwrap_err().key, "redis.url", "{bad}");
        }
    }

    #[test]
    fn a_password_comes_from_its_file_without_the_lines_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("password");
        std::fs::write(&path, " 0123 \n").unwrap();
        let config = RedisConfig { password_file: Some(path.clone()), ..RedisConfig::default() };
        assert_eq!(config.password().unwrap().unwrap().expose(), " 0123 ");
        assert_eq!(format!("{:?}", config.password().unwrap().unwrap()), "***");
        std::fs::remove_file(path).unwrap();
        assert_eq!(config.password().unwrap_err().key, "redis.password_file");

        assert_eq!(RedisConfig::default().password(), Ok(None));
        let config = RedisConfig { password_env: Some("NO_SUCH_VARIABLE".into()), ..RedisConfig::default() };
        assert_eq!(config.password().unwrap_err().key, "redis.password_env");
    }
}
