//! What the command-line programs share: the flags that each has, how they end, and how they write.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use queue_core::config::{ClientConfig, ConfigError};
use queue_core::objects::ObjectsError;
use queue_core::{Error, Store};

/// The flags that every program has.
#[derive(Debug, Clone, clap::Args)]
pub struct Common {
    /// Configuration file [default: /etc/drayman/worker.toml, if it exists]
    #[arg(long, value_name = "FILE", global = true, help_heading = "Flags of every program")]
    pub config: Option<PathBuf>,
    /// Where Redis is: redis://host:port/db, rediss://…, redis-sentinel://… or the path of a socket, with ?db=5 behind it
    #[arg(long, value_name = "URL", global = true, help_heading = "Flags of every program")]
    pub redis_url: Option<String>,
    /// Write JSON, one object a line
    #[arg(long, global = true, help_heading = "Flags of every program")]
    pub json: bool,
}

impl Common {
    /// Reads the configuration and connects.
    pub async fn connect(&self) -> Result<(ClientConfig, Store), Failure> {
        let config = ClientConfig::of_process(self.config.clone(), self.redis_url.clone())?;
        let store = Store::connect(&config.redis).await?;
        Ok((config, store))
    }
}

/// How a program ends, where all went as asked.
pub const OK: u8 = 0;
/// The command line, the configuration or the input is wrong.
pub const USAGE: u8 = 2;
/// There is no such job.
pub const NOT_FOUND: u8 = 3;
/// Redis can't be reached, or refused; what was asked for may have happened or not.
pub const UNREACHABLE: u8 = 5;

/// Why a program ends before it is through.
#[derive(Debug)]
pub struct Failure {
    /// Its exit code.
    pub code: u8,
    /// What it says.
    pub message: String,
}

impl Failure {
    /// Ends with a code and a message.
    pub fn new(code: u8, message: impl Display) -> Self {
        Self { code, message: message.to_string() }
    }

    /// Ends because the program was not used as it can be.
    pub fn usage(message: impl Display) -> Self {
        Self::new(USAGE, message)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let code = match error {
            Error::Config(_) | Error::Version { .. } => USAGE,
            _ => UNREACHABLE,
        };
        Self::new(code, error)
    }
}

impl From<ObjectsError> for Failure {
    fn from(error: ObjectsError) -> Self {
        let code = if matches!(error, ObjectsError::Config(_)) { USAGE } else { UNREACHABLE };
        Self::new(code, error)
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
        Self::usage(format!("{error}{cause}"))
    }
}

/// Says why a program failed, and turns its result into an exit code.
pub fn exit(result: Result<u8, Failure>) -> ExitCode {
    ExitCode::from(result.unwrap_or_else(|failure| {
        complain(&failure.message);
        failure.code
    }))
}

/// Writes a line to standard error. If that is closed, nobody wants to know.
pub fn complain(message: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{}", plain(&message.to_string()));
}

/// Standard output. Who reads it may go at any time: what a program is doing goes on without being told.
#[derive(Debug, Default)]
pub struct Out {
    gone: bool,
}

impl Out {
    /// Writes a line, or several.
    pub fn line(&mut self, text: impl Display) {
        if self.gone {
            return;
        }
        let mut out = io::stdout().lock();
        if let Err(error) = writeln!(out, "{text}").and_then(|()| out.flush()) {
            self.gone = true;
            if error.kind() != ErrorKind::BrokenPipe {
                complain(format_args!("cannot write: {error}"));
            }
        }
    }

    /// Writes a JSON value as one line.
    pub fn json(&mut self, value: &serde_json::Value) {
        self.line(value);
    }

    /// Nobody reads any more.
    pub fn is_gone(&self) -> bool {
        self.gone
    }
}

/// A text that others wrote, without what would move the cursor, colour the terminal or fake another line.
pub fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

/// The same on one line.
pub fn one_line(text: &str) -> String {
    plain(&text.replace(['\n', '\r'], " "))
}

/// A length of time for people: to the millisecond if it is short, to the second if not.
pub fn span(time: Duration) -> String {
    let rounded = match time.as_secs() {
        0..10 => Duration::from_millis(time.as_millis() as u64),
        seconds => Duration::from_secs(seconds),
    };
    humantime::format_duration(rounded).to_string()
}

/// A time in ms since 1970 as ISO 8601, the form that the hash of a job has.
pub fn iso(ms: u64) -> String {
    let time = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(ms.min(253_402_300_799_999)));
    humantime::format_rfc3339_millis(time.unwrap_or(SystemTime::UNIX_EPOCH)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_gets_nothing_to_obey() {
        assert_eq!(one_line("a\x1b[31mb\r\nc\u{9b}d"), "a\u{fffd}[31mb  c\u{fffd}d");
    }

    #[test]
    fn spans_are_short() {
        assert_eq!(span(Duration::from_micros(1_234_567)), "1s 234ms");
        assert_eq!(span(Duration::from_millis(61_900)), "1m 1s");
        assert_eq!(span(Duration::ZERO), "0s");
    }
}
