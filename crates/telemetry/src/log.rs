//! What of the log is configured.

use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;

/// What is logged, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// How a line looks.
    pub format: LogFormat,
    /// Which lines are written.
    pub level: LogLevel,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { format: LogFormat::Text, level: LogLevel("info".into()) }
    }
}

/// How a line of the log looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// A level (`info`) or filters by module (`info,queue_core=debug`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LogLevel(String);

impl LogLevel {
    /// No lines at all.
    pub fn off() -> Self {
        Self("off".into())
    }

    /// The filter that the text describes.
    pub fn filter(&self) -> EnvFilter {
        EnvFilter::new(&self.0)
    }
}

impl TryFrom<String> for LogLevel {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        // A lone word that is no level would be taken for a module's name, and silence everything else.
        let first = text.split(',').next().unwrap_or_default().trim();
        if !first.contains(['=', '[', ':']) && first.parse::<tracing_subscriber::filter::LevelFilter>().is_err() {
            return Err(format!("{first:?} is none of off, error, warn, info, debug, trace"));
        }
        match EnvFilter::try_new(&text) {
            Ok(_) => Ok(Self(text)),
            Err(fault) => Err(fault.to_string()),
        }
    }
}

impl From<LogLevel> for String {
    fn from(level: LogLevel) -> String {
        level.0
    }
}
