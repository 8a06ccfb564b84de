//! The worker's settings for SQL: `[sql]` and `[databases.<name>]`. No password stands in them, only where it is found.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use queue_core::ids::User;
use serde::{Deserialize, Serialize};

/// What is replaced by the job's user in `dbname`, `user` and `path`.
const USER_PLACE: &str = "{user}";
/// Longest password that is read from a file, in bytes.
const PASSWORD_MAX_BYTES: u64 = 4096;

/// All that the SQL executor is configured by.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Databases {
    /// The table `[sql]`.
    pub sql: SqlSettings,
    /// The tables `[databases.<name>]`, by name.
    pub databases: BTreeMap<String, DatabaseSettings>,
}

/// `[sql]`: what holds for every SQL statement, and for databases that a job names by its own connection fields.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SqlSettings {
    /// Hosts that a job may name: a name or address, `*.suffix` for all names below it, or the absolute folder of a Unix
    /// socket. Loopback by default.
    pub allowed_hosts: Vec<String>,
    /// How connections to these hosts are encrypted.
    pub tls: TlsMode,
    /// Certificates to trust instead of the system's, PEM; with `tls = "verify-full"` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// How long connecting, TLS and authentication together may take.
    #[serde(with = "humantime_serde")]
    pub connect_timeout: Duration,
    /// What becomes of a statement that can't run in a transaction and whose worker was lost.
    pub lost_statement: LostStatement,
    /// The longest that a statement may run.
    #[serde(with = "humantime_serde")]
    pub statement_timeout: Duration,
}

impl Default for SqlSettings {
    fn default() -> Self {
        Self {
            allowed_hosts: ["127.0.0.1", "::1", "localhost"].map(String::from).to_vec(),
            tls: TlsMode::Prefer,
            ca_file: None,
            connect_timeout: Duration::from_secs(10),
            lost_statement: LostStatement::Unknown,
            statement_timeout: Duration::from_secs(12 * 3600),
        }
    }
}

/// How a connection is encrypted, in PostgreSQL's own words.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TlsMode {
    /// Never.
    Disable,
    /// If the server offers it; its certificate is not verified.
    #[default]
    Prefer,
    /// Always; its certificate is not verified.
    Require,
    /// Always, and the certificate must be valid for the host's name.
    VerifyFull,
}

/// What becomes of a statement that may or may not have taken effect.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LostStatement {
    /// It ends as unknown, for a person to look at.
    #[default]
    Unknown,
    /// It runs again: for statements that may take effect twice.
    RunAgain,
}

/// One table `[databases.<name>]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum DatabaseSettings {
    /// `kind = "postgres"`
    Postgres(PostgresSettings),
    /// `kind = "sqlite"`
    Sqlite(SqliteSettings),
}

impl DatabaseSettings {
    /// Whether each user has one of its own.
    pub fn is_of_each_user(&self) -> bool {
        match self {
            DatabaseSettings::Postgres(PostgresSettings { dbname, user, .. }) => {
                dbname.contains(USER_PLACE) || user.contains(USER_PLACE)
            }
            DatabaseSettings::Sqlite(SqliteSettings { path, .. }) => path.contains(USER_PLACE),
        }
    }
}

/// A PostgreSQL database, or one for each user.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PostgresSettings {
    /// Host name, address, or the absolute folder of a Unix socket.
    pub host: String,
    /// TCP port; also part of a Unix socket's name.
    #[serde(default = "default_port")]
    pub port: u16,
    /// Database name; `{user}` is the job's user.
    pub dbname: String,
    /// Role; `{user}` is the job's user.
    pub user: String,
    /// File that holds the password. A relative path is looked up in `$CREDENTIALS_DIRECTORY`, where systemd puts
    /// credentials. Read at each connection, so that a changed password needs no restart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
    /// Environment variable that holds the password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password_env: Option<String>,
    /// How the connection is encrypted. Never over a Unix socket.
    #[serde(default)]
    pub tls: TlsMode,
    /// Certificates to trust instead of the system's, PEM; with `tls = "verify-full"` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
}

fn default_port() -> u16 {
    5432
}

/// A SQLite database file, or one for each user.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SqliteSettings {
    /// Absolute path of the file; `{user}` is the job's user.
    pub path: String,
    /// Whether a missing file is created.
    #[serde(default)]
    pub create: bool,
}

/// A setting that can't be used, named by its key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {reason}")]
pub struct SettingFault {
    /// The key as it stands in the file, e.g. `databases.main.port`.
    pub key: String,
    /// What is wrong with it.
    pub reason: String,
}

impl Databases {
    /// Everything that is wrong with the settings; looks at the files they name, connects to nothing.
    pub fn validate(&self) -> Vec<SettingFault> {
        let mut faults = Vec::new();
        let mut fault = |key: String, reason: &str| faults.push(SettingFault { key, reason: reason.into() });
        for host in &self.sql.allowed_hosts {
            let suffix = host.strip_prefix("*.");
            if host.is_empty() || suffix.unwrap_or(host).contains(['*', ' ', ',']) || suffix == Some("") {
                fault(
                    "sql.allowed_hosts".into(),
                    &format!("{host:?} is no host name, address, \"*.suffix\" or socket folder"),
                );
            }
        }
        if self.sql.connect_timeout.is_zero() {
            fault("sql.connect_timeout".into(), "must be longer than nothing");
        }
        check_ca("sql", self.sql.tls, self.sql.ca_file.as_deref(), &mut fault);
        for (name, database) in &self.databases {
            let at = format!("databases.{name}");
            if name.is_empty() || name.chars().any(|c| c.is_control() || c == ' ') {
                fault(at.clone(), "a database's name may hold neither blanks nor control characters");
            }
            match database {
                DatabaseSettings::Postgres(settings) => settings.validate(&at, &mut fault),
                DatabaseSettings::Sqlite(settings) => settings.validate(&at, &mut fault),
            }
        }
        faults
    }
}

fn check_ca(at: &str, tls: TlsMode, ca_file: Option<&Path>, fault: &mut impl FnMut(String, &str)) {
    let Some(file) = ca_file else { return };
    if tls != TlsMode::VerifyFull {
        fault(format!("{at}.ca_file"), "is of use with tls = \"verify-full\" only");
    } else if let Err(error) = std::fs::File::open(file) {
        fault(format!("{at}.ca_file"), &format!("can't be read: {error}"));
    }
}

/// A template is text with `{user}` in it, any number of times, and no other brace.
fn check_template(key: String, template: &str, fault: &mut impl FnMut(String, &str)) {
    if template.is_empty() {
        fault(key, "is empty");
    } else if template.replace(USER_PLACE, "").contains(['{', '}', '\0']) {
        fault(key, "may hold {user} and no other brace");
    }
}

impl SqlSettings {
    /// Whether a job may name this host.
    pub fn allows(&self, host: &str) -> bool {
        let address: Option<IpAddr> = host.parse().ok();
        self.allowed_hosts.iter().any(|allowed| match allowed.strip_prefix('*') {
            // ".suffix": the dot keeps "evildb.internal" out of "*.db.internal".
            Some(suffix) => {
                host.len() > suffix.len()
                    && host.is_char_boundary(host.len() - suffix.len())
                    && host[host.len() - suffix.len()..].eq_ignore_ascii_case(suffix)
            }
            None if allowed.starts_with('/') => allowed == host,
            None => allowed.eq_ignore_ascii_case(host) || (address.is_some() && address == allowed.parse().ok()),
        })
    }
}

impl PostgresSettings {
    fn validate(&self, at: &str, fault: &mut impl FnMut(String, &str)) {
        if self.host.is_empty() || self.host.contains(['\0', ' ', ',']) {
            fault(format!("{at}.host"), "is no host name, address or socket folder");
        }
        if self.port == 0 {
            fault(format!("{at}.port"), "must not be 0");
        }
        check_template(format!("{at}.dbname"), &self.dbname, fault);
        check_template(format!("{at}.user"), &self.user, fault);
        if self.password_file.is_some() && self.password_env.is_some() {
            fault(format!("{at}.password_env"), "is given beside password_file: one of them is enough");
        } else if let Err(reason) = self.password() {
            let key = if self.password_file.is_some() { "password_file" } else { "password_env" };
            fault(format!("{at}.{key}"), &reason);
        }
        check_ca(at, self.tls, self.ca_file.as_deref(), fault);
    }

    /// The database's name for one user.
    pub(super) fn dbname_of(&self, user: &User) -> String {
        self.dbname.replace(USER_PLACE, user.as_str())
    }

    /// The role for one user.
    pub(super) fn role_of(&self, user: &User) -> String {
        self.user.replace(USER_PLACE, user.as_str())
    }

    /// The password as it is now; empty without one. The error names the place, never the content.
    pub(super) fn password(&self) -> Result<Vec<u8>, String> {
        use std::io::Read;
        use std::os::unix::ffi::OsStringExt;

        if let Some(name) = &self.password_env {
            let value = std::env::var_os(name).ok_or_else(|| format!("the variable {name} is not set"))?;
            return Ok(value.into_vec());
        }
        let Some(path) = &self.password_file else { return Ok(Vec::new()) };
        let path = if path.is_absolute() {
            path.clone()
        } else {
            let folder = std::env::var_os("CREDENTIALS_DIRECTORY")
                .ok_or("is a relative path, and $CREDENTIALS_DIRECTORY is not set")?;
            PathBuf::from(folder).join(path)
        };
        let mut password = Vec::new();
        std::fs::File::open(&path)
            .and_then(|file| file.take(PASSWORD_MAX_BYTES + 1).read_to_end(&mut password))
            .map_err(|error| format!("{} can't be read: {error}", path.display()))?;
        if password.len() as u64 > PASSWORD_MAX_BYTES {
            return Err(format!("{} is longer than {PASSWORD_MAX_BYTES} bytes", path.display()));
        }
        // Editors and `echo` end a file with a line end that is no part of the secret.
        if password.ends_with(b"\n") {
            password.pop();
        }
        Ok(password)
    }
}

impl SqliteSettings {
    fn validate(&self, at: &str, fault: &mut impl FnMut(String, &str)) {
        check_template(format!("{at}.path"), &self.path, fault);
        if !self.path.starts_with('/') {
            fault(format!("{at}.path"), "must be absolute");
        }
    }

    /// The file of one user, or why that user can't have one.
    pub(super) fn path_of(&self, user: &User) -> Result<PathBuf, &'static str> {
        let name = user.as_str();
        if self.path.contains(USER_PLACE) && (name.contains(['/', '\0']) || name.contains("..") || name == ".") {
            return Err("the user's name can't be part of a file name");
        }
        let path = self.path.replace(USER_PLACE, name);
        // SQLite's own names for the files beside a database: one user's database must not be another one's journal.
        if ["-wal", "-shm", "-journal"].iter().any(|suffix| path.ends_with(suffix)) {
            return Err("the user's name makes the file name of a journal");
        }
        Ok(PathBuf::from(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sqlite(path: &str) -> SqliteSettings {
        SqliteSettings { path: path.into(), create: false }
    }

    fn path_of(path: &str, user: &str) -> Result<PathBuf, &'static str> {
        sqlite(path).path_of(&User::new(user).unwrap())
    }

    #[test]
    fn hosts_are_allowed_by_name_address_suffix_or_folder() {
        let settings = SqlSettings {
            allowed_hosts: ["localhost", "::1", "*.db.internal", "/run/pg"].map(String::from).to_vec(),
            ..SqlSettings::default()
        };
        for host in ["localhost", "LOCALHOST", "::1", "0:0:0:0:0:0:0:1", "a.db.internal", "a.b.DB.internal", "/run/pg"]
        {
            assert!(settings.allows(host), "{host}");
        }
        for host in
            ["", "127.0.0.1", "db.internal", ".db.internalx", "evildb.internal", "/run/pg/", "/run/PG", "ö.internal"]
        {
            assert!(!settings.allows(host), "{host}");
        }
        let loopback = SqlSettings::default();
        assert!(loopback.allows("127.0.0.1") && loopback.allows("::1") && loopback.allows("localhost"));
        assert!(!loopback.allows("127.0.0.2") && !loopback.allows("/var/run/postgresql"));
    }

    #[test]
    fn a_user_cannot_reach_another_file() {
        assert_eq!(path_of("/d/{user}.db", "ann").unwrap(), PathBuf::from("/d/ann.db"));
        assert_eq!(path_of("/d/{user}/x.db", "a.b c").unwrap(), PathBuf::from("/d/a.b c/x.db"));
        for user in ["../ann", "a/b", "..", ".", "a..b"] {
            assert!(path_of("/d/{user}.db", user).is_err(), "{user}");
        }
        for user in ["ann-wal", "ann-shm", "ann-journal"] {
            assert!(path_of("/d/{user}", user).is_err(), "{user}");
            assert!(path_of("/d/{user}.db", user).is_ok(), "{user}");
        }
        assert_eq!(path_of("/d/one.db", "../ann").unwrap(), PathBuf::from("/d/one.db"));
    }

    #[test]
    fn faults_are_named_by_key() {
        let text = r#"{"kind": "postgres", "host": "", "port": 0, "dbname": "{name}", "user": "",
            "password_file": "/nonexistent/secret", "ca_file": "/x"}"#;
        let databases = Databases {
            sql: SqlSettings {
                allowed_hosts: vec!["*".into(), "*.".into(), "a,b".into()],
                connect_timeout: Duration::ZERO,
                ..SqlSettings::default()
            },
            databases: BTreeMap::from([
                ("main".into(), serde_json::from_str(text).unwrap()),
                ("file".into(), DatabaseSettings::Sqlite(sqlite("relative/{user}"))),
            ]),
        };
        let keys: Vec<String> = databases.validate().into_iter().map(|fault| fault.key).collect();
        let expected = [
            "sql.allowed_hosts",
            "sql.allowed_hosts",
            "sql.allowed_hosts",
            "sql.connect_timeout",
            "databases.file.path",
            "databases.main.host",
            "databases.main.port",
            "databases.main.dbname",
            "databases.main.user",
            "databases.main.password_file",
            "databases.main.ca_file",
        ];
        assert_eq!(keys, expected);
        assert!(Databases::default().validate().is_empty());
    }

    #[test]
    fn unknown_keys_and_inline_passwords_are_refused() {
        for text in [
            r#"{"kind": "sqlite", "path": "/x", "pth": 1}"#,
            r#"{"kind": "postgres", "host": "h", "dbname": "d", "user": "u", "password": "secret"}"#,
            r#"{"kind": "mysql", "path": "/x"}"#,
        ] {
            assert!(serde_json::from_str::<DatabaseSettings>(text).is_err(), "{text}");
        }
        assert!(serde_json::from_str::<SqlSettings>(r#"{"statement_timeouts": "1s"}"#).is_err());
        let read: SqlSettings =
            serde_json::from_str(r#"{"connect_timeout": "3s", "lost_statement": "run-again"}"#).unwrap();
        assert_eq!(read.connect_timeout, Duration::from_secs(3));
        assert_eq!(read.lost_statement, LostStatement::RunAgain);
    }

    #[test]
    fn a_password_file_loses_one_line_end_and_nothing_else() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b" p\xff'\"\n\n").unwrap();
        let text = r#"{"host": "h", "dbname": "d", "user": "u"}"#;
        let mut settings: PostgresSettings = serde_json::from_str(text).unwrap();
        settings.password_file = Some(file.path().into());
        assert_eq!(settings.password().unwrap(), b" p\xff'\"\n");
    }
}
