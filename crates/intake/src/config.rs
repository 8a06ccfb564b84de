//! The whole configuration of the intake. Types refuse what they can while it is read; the rest is checked before anything is
//! connected to.

use std::fmt;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use globset::{GlobBuilder, GlobMatcher};
use queue_core::config::{
    ConfigError, Configuration, Fault, Layers, Limits, ObjectsConfig, RedisConfig, TelemetryConfig, load, positive,
};
use queue_core::ids::{App, Op, User};
use queue_core::producer::Priority;
use serde::{Deserialize, Serialize};
use telemetry::LogConfig;

/// The file that is read if no other is named and it exists.
pub const DEFAULT_FILE: &str = "/etc/drayman/intake.toml";

/// The configuration, a field for each section of the file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `[redis]`
    pub redis: RedisConfig,
    /// `[limits]`
    pub limits: Limits,
    /// `[intake]`
    pub intake: IntakeConfig,
    /// `[objects]`
    pub objects: ObjectsConfig,
    /// `[log]`
    pub log: LogConfig,
    /// `[telemetry]`
    pub telemetry: TelemetryConfig,
    /// `[[folders]]`: what becomes of the files of a folder. A file belongs to the first that wants it.
    pub folders: Vec<FolderConfig>,
}

/// How the intake works.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IntakeConfig {
    /// How often the folders are looked through.
    #[serde(with = "humantime_serde")]
    pub poll_interval: Duration,
    /// Files in hand at the same time.
    pub files_at_once: NonZeroUsize,
}

impl Default for IntakeConfig {
    fn default() -> Self {
        Self { poll_interval: Duration::from_secs(2), files_at_once: const { NonZeroUsize::new(8).unwrap() } }
    }
}

/// Which files of a folder become batches, and what batches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FolderConfig {
    /// The folder.
    pub folder: PathBuf,
    /// Which of its files.
    #[serde(default = "all_files")]
    pub pattern: Pattern,
    /// How their rows are written; by the end of the file's name if not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// What stands between the fields of a CSV.
    #[serde(default = "comma")]
    pub delimiter: char,
    /// Whose batches they are.
    pub user: User,
    /// The handler's application.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub app: Option<App>,
    /// Its operation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub op: Option<Op>,
    /// Or a statement for each row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub statement: Option<String>,
    /// At a database that the workers' configuration names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub database: Option<String>,
    /// What else the handler is to know.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub context: serde_json::Value,
    /// The batch waits until it is released.
    #[serde(default)]
    pub held: bool,
    /// Its place among the user's own jobs.
    #[serde(default = "low")]
    pub priority: Priority,
    /// How long it is kept once it is over.
    #[serde(default, with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub keep: Option<Duration>,
    /// How long each row may take.
    #[serde(default, with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub row_timeout: Option<Duration>,
    /// How often a row is tried in all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_attempts: Option<NonZeroU32>,
    /// What it is filed under.
    #[serde(default)]
    pub tags: Vec<String>,
    /// A file that has changed within this time is left alone.
    #[serde(default = "five_seconds", with = "humantime_serde")]
    pub min_age: Duration,
    /// A handler that says whether a file is good.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checker: Option<HandlerName>,
    /// What becomes of a file with lines that can't be used.
    #[serde(default)]
    pub bad_lines: BadLines,
    /// Where files go that have become batches.
    #[serde(default = "archive")]
    pub archive: Destination,
    /// Where files go that can't.
    #[serde(default = "failed")]
    pub failed: Destination,
}

fn all_files() -> Pattern {
    Pattern::new("*".into()).expect("is a pattern")
}

fn comma() -> char {
    ','
}

fn low() -> Priority {
    Priority::Low
}

fn five_seconds() -> Duration {
    Duration::from_secs(5)
}

fn archive() -> Destination {
    Destination::Folder(".archive".into())
}

fn failed() -> Destination {
    Destination::Folder(".failed".into())
}

/// How rows are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// A header, then a row a record; each row becomes an object of strings.
    Csv,
    /// A JSON value a line.
    Jsonl,
    /// A text a line; each becomes a JSON string.
    Lines,
}

/// What becomes of a file with lines that can't be used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BadLines {
    /// The file is bad.
    #[default]
    Refuse,
    /// They are left out and reported beside the file.
    Skip,
}

/// Which files: a path below the folder with `*`, `?`, `[…]`, `{a,b}`, and `**` for folders in between.
#[derive(Debug, Clone)]
pub struct Pattern {
    text: String,
    matcher: GlobMatcher,
}

impl Pattern {
    fn new(text: String) -> Result<Self, globset::Error> {
        let matcher = GlobBuilder::new(&text).literal_separator(true).build()?.compile_matcher();
        Ok(Self { text, matcher })
    }

    /// Whether a path below the folder is meant.
    pub fn wants(&self, path: &Path) -> bool {
        self.matcher.is_match(path)
    }

    /// How many folders deep its files lie at most.
    pub fn depth(&self) -> usize {
        if self.text.contains("**") { usize::MAX } else { self.text.matches('/').count() + 1 }
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

/// The name of a handler: `app.op`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandlerName {
    /// The application.
    pub app: App,
    /// The operation.
    pub op: Op,
}

/// Where a file goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// Into a folder; a relative path is one below the watched folder.
    Folder(PathBuf),
    /// Into the object store, under names that begin so.
    Objects(String),
    /// Nowhere: it is deleted.
    Delete,
}

/// Values that are texts in the file.
macro_rules! as_text {
    ($($name:ty),+) => {$(
        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
            }
        }
    )+};
}

as_text!(Pattern, HandlerName, Destination);

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // The folder is where it begins, whether it says so or not.
        Pattern::new(text.trim_start_matches('/').to_owned()).map_err(|fault| format!("is no pattern: {fault}"))
    }
}

impl fmt::Display for HandlerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.app, self.op)
    }
}

impl FromStr for HandlerName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (app, op) = text.split_once('.').ok_or("is no handler: it is written as app.op")?;
        let fault = |fault: &dyn fmt::Display| format!("is no handler: {fault}");
        Ok(Self { app: App::new(app).map_err(|it| fault(&it))?, op: Op::new(op).map_err(|it| fault(&it))? })
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Destination::Folder(folder) => write!(f, "{}", folder.display()),
            Destination::Objects(prefix) => write!(f, "objects:{prefix}"),
            Destination::Delete => f.write_str("delete"),
        }
    }
}

impl FromStr for Destination {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("objects:") {
            // Names of two hexadecimal digits are those of jobs' objects.
            Some(prefix)
                if prefix.len() > 2
                    && prefix.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte)) =>
            {
                Ok(Destination::Objects(prefix.to_owned()))
            }
            Some(_) => Err("names no place among the objects: it has three letters, digits, - or _ at least".into()),
            None if text == "delete" => Ok(Destination::Delete),
            None if text.is_empty() => Err("is empty".into()),
            None => Ok(Destination::Folder(text.into())),
        }
    }
}

impl Config {
    /// The defaults with `layers` over them, checked.
    pub fn load(layers: &Layers) -> Result<Config, ConfigError> {
        load(&Config::default(), layers)
    }
}

impl Configuration for Config {
    fn validate(&self) -> Result<(), Fault> {
        self.redis.validate()?;
        self.limits.validate()?;
        self.objects.validate()?;
        self.telemetry.validate()?;
        positive("intake.poll_interval", self.intake.poll_interval)?;
        if self.folders.is_empty() {
            return Err(Fault::new("folders", "there are none: nothing would be taken in"));
        }
        for (at, folder) in self.folders.iter().enumerate() {
            let fault = |key: &str, reason: String| Err(Fault::new(format!("folders.{at}.{key}"), reason));
            if !folder.folder.is_absolute() {
                return fault("folder", "is not absolute".into());
            }
            match (&folder.app, &folder.op, &folder.statement, &folder.database) {
                (Some(_), Some(_), None, None) | (None, None, Some(_), Some(_)) => {}
                _ => return fault("app", "say app and op, or statement and database".into()),
            }
            if folder.statement.is_some() && !folder.context.is_null() {
                return fault("context", "is for handlers: a statement would not see it".into());
            }
            if rows::delimiter(folder.delimiter).is_none() {
                return fault("delimiter", "is one character of ASCII, but no quote and no line break".into());
            }
            if folder.failed == Destination::Delete {
                return fault("failed", "a file that can't be used is not deleted".into());
            }
            for (key, to) in [("archive", &folder.archive), ("failed", &folder.failed)] {
                let Destination::Folder(to) = to else { continue };
                let to = folder.folder.join(to);
                if self.folders.iter().any(|other| would_be_found(&to, &other.folder)) {
                    return fault(
                        key,
                        "lies in a watched folder: say one whose name begins with a dot, or another place".into(),
                    );
                }
            }
        }
        Ok(())
    }
}

/// Whether files in a folder would be seen by whoever watches the other: hidden folders are not looked into.
fn would_be_found(folder: &Path, watched: &Path) -> bool {
    let Ok(below) = folder.strip_prefix(watched) else { return false };
    let is_hidden = |part: Component<'_>| part.as_os_str().as_encoded_bytes().starts_with(b".");
    !below.components().any(is_hidden)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULT_FILE_TEXT: &str = include_str!("../../../deploy/intake.toml");

    fn load(text: &str) -> Result<Config, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("intake.toml");
        std::fs::write(&path, text).unwrap();
        let layers = Layers { file: Some(path), default_file: "/nonexistent".into(), variables: vec![], flags: vec![] };
        Config::load(&layers).map_err(|fault| fault.to_string())
    }

    #[test]
    fn the_commented_file_says_what_the_defaults_are() {
        let needed = "[[folders]]\nfolder = '/in'\nuser = 'ann'\napp = 'bank'\nop = 'book'\n";
        let least = load(needed).unwrap();
        let example = load(DEFAULT_FILE_TEXT).unwrap();
        assert_eq!(Config { folders: vec![], ..example.clone() }, Config::default());
        // Each key of a folder, and with its default where it has one.
        let as_comment = |line: &str| {
            line.strip_prefix("# ").filter(|line| line.contains(" = ") && !line.contains(", ")).map(str::to_owned)
        };
        let full: Vec<String> =
            DEFAULT_FILE_TEXT.lines().map(|line| as_comment(line).unwrap_or_else(|| line.to_owned())).collect();
        let full: toml::Table = full.join("\n").parse().unwrap();
        let keys: Vec<&String> = full["folders"][0].as_table().unwrap().keys().collect();
        let every = [
            "folder",
            "pattern",
            "format",
            "delimiter",
            "user",
            "app",
            "op",
            "statement",
            "database",
            "context",
            "held",
            "priority",
            "keep",
            "row_timeout",
            "max_attempts",
            "tags",
            "min_age",
            "checker",
            "bad_lines",
            "archive",
            "failed",
        ];
        let mut sorted = every.map(str::to_owned);
        sorted.sort();
        let mut found: Vec<String> = keys.into_iter().cloned().collect();
        found.sort();
        assert_eq!(found, sorted);
        let FolderConfig { folder, user, app, op, .. } = example.folders[0].clone();
        assert_eq!(example.folders[0], FolderConfig { folder, user, app, op, ..least.folders[0].clone() });
        let sections: toml::Table = DEFAULT_FILE_TEXT.parse().unwrap();
        let whole: toml::Table = queue_core::config::to_toml(&example).unwrap().parse().unwrap();
        assert_eq!(sections.keys().collect::<Vec<_>>(), whole.keys().collect::<Vec<_>>());
    }

    #[test]
    fn what_would_go_wrong_later_is_refused_by_name() {
        let with = |lines: &str| {
            load(&format!("[[folders]]\nfolder = '/in'\nuser = 'ann'\napp = 'bank'\nop = 'book'\n{lines}\n"))
                .unwrap_err()
        };
        for (lines, words) in [
            ("patern = '*'", "patern"),
            ("pattern = '[a'", "is no pattern"),
            ("statement = 'SELECT 1'", "say app and op, or statement and database"),
            ("checker = 'bank'", "it is written as app.op"),
            ("failed = 'delete'", "folders.0.failed"),
            ("archive = 'done'", "folders.0.archive lies in a watched folder"),
            ("archive = 'objects:ab'", "names no place among the objects"),
            ("delimiter = 'é'", "folders.0.delimiter"),
            ("[[folders]]\nfolder = 'in'\nuser = 'ann'\napp = 'a'\nop = 'b'", "folders.1.folder is not absolute"),
        ] {
            let refusal = with(lines);
            assert!(refusal.contains(words), "{lines}: {refusal}");
        }
        assert!(load("").unwrap_err().contains("folders there are none"));
    }
}
