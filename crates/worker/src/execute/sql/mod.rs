//! SQL statements against PostgreSQL and SQLite.

pub mod chunk;
mod classify;
pub mod databases;
pub mod history;
mod postgres;
pub(super) mod rows;
mod sqlite;
pub mod template;

use std::collections::BTreeMap;
use std::future::Future;

use async_trait::async_trait;
use queue_core::ids::User;
use tokio_util::sync::CancellationToken;

use self::databases::{DatabaseSettings, Databases, PostgresSettings, SettingFault, SqlSettings, SqliteSettings};
use self::postgres::{Address, Server, Tls};
pub(super) use self::sqlite::chunk as sqlite_chunk;
use super::{
    ClaimLost, End, Executor, Failure, Ledger, Report, RowAnswers, RowsLedger, RowsWork, SqlRowsEnd, Target, Trace,
    Work,
};

/// How many notices of one statement are kept.
pub const NOTICES_MAX: usize = 20;
/// Longest message of a database that is kept, in bytes.
pub const MESSAGE_MAX_BYTES: usize = 8 * 1024;

/// SQLSTATE of an interrupted statement.
const QUERY_CANCELED: &str = "57014";
/// PostgreSQL's words for a timeout; readers of job records look for them.
const STATEMENT_TIMEOUT: &str = "canceling statement due to statement timeout";
/// Said of a statement of which an earlier execution left no more than that it had begun.
const LOST_UNTRANSACTED: &str = "an earlier execution was lost while this statement ran, which can't run in a transaction: \
                                 whether it took effect is not known";

/// Runs SQL statements: on PostgreSQL, or in a SQLite file.
pub struct SqlExecutor {
    sql: SqlSettings,
    /// For hosts that jobs name.
    tls: Tls,
    databases: BTreeMap<String, Database>,
}

enum Database {
    Postgres(PostgresSettings, Tls),
    Sqlite(SqliteSettings),
}

/// The settings can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
pub struct SettingsError(pub Vec<SettingFault>);

impl SqlExecutor {
    /// Checks the settings and reads the certificates they name. Connects to nothing.
    pub fn new(settings: Databases) -> Result<Self, SettingsError> {
        let faults = settings.validate();
        if !faults.is_empty() {
            return Err(SettingsError(faults));
        }
        let Databases { sql, databases } = settings;
        let tls = |at: String, mode, ca_file: Option<&std::path::Path>| {
            Tls::new(mode, ca_file)
                .map_err(|reason| SettingsError(vec![SettingFault { key: format!("{at}.tls"), reason }]))
        };
        let databases = databases
            .into_iter()
            .map(|(name, settings)| {
                let database = match settings {
                    DatabaseSettings::Postgres(postgres) => {
                        let tls = tls(format!("databases.{name}"), postgres.tls, postgres.ca_file.as_deref())?;
                        Database::Postgres(postgres, tls)
                    }
                    DatabaseSettings::Sqlite(sqlite) => Database::Sqlite(sqlite),
                };
                Ok((name, database))
            })
            .collect::<Result<_, SettingsError>>()?;
        Ok(Self { tls: tls("sql".into(), sql.tls, sql.ca_file.as_deref())?, sql, databases })
    }

    /// The server that a job names by its connection fields.
    fn named_by_job(&self, host: &str, port: u16, dbname: &str, dbuser: &str, pass: &[u8]) -> Result<Server, String> {
        if !self.sql.allows(host) {
            return Err(format!("database host '{host}' is not allowed by this worker (sql.allowed_hosts)"));
        }
        // PostgreSQL would take the role's name for a missing database name.
        if dbname.is_empty() || dbuser.is_empty() || port == 0 {
            return Err("Batch Job DB misconfiguration".into());
        }
        Ok(Server {
            name: format!("{host}:{port}"),
            address: Address::new(host, port),
            tls: self.tls.clone(),
            dbname: dbname.to_owned(),
            role: dbuser.to_owned(),
            password: pass.to_vec(),
            connect_timeout: self.sql.connect_timeout,
        })
    }

    /// Where the work is to be done.
    fn place(&self, work: &Work) -> Result<Place, String> {
        match &work.target {
            Target::Host { host, port, dbname, dbuser, pass } => {
                self.named_by_job(host, *port, dbname, dbuser, pass).map(Place::Postgres)
            }
            Target::Named(name) => self.named(name, &work.user),
        }
    }

    /// The database that the configuration names so, as a user sees it.
    fn named(&self, name: &str, user: &User) -> Result<Place, String> {
        match self.databases.get(name) {
            None => Err(format!("database '{name}' is not known to this worker (databases.{name})")),
            Some(Database::Postgres(settings, tls)) => {
                // Where the password is kept is the operator's business, not the job's.
                let password = settings
                    .password()
                    .map_err(|_| format!("the password of database '{name}' can't be read by this worker"))?;
                Ok(Place::Postgres(Server {
                    name: format!("database '{name}'"),
                    address: Address::new(&settings.host, settings.port),
                    tls: tls.clone(),
                    dbname: settings.dbname_of(user),
                    role: settings.role_of(user),
                    password,
                    connect_timeout: self.sql.connect_timeout,
                }))
            }
            Some(Database::Sqlite(settings)) => {
                Ok(Place::Sqlite(sqlite::File { path: settings.path_of(user)?, create: settings.create }))
            }
        }
    }
}

/// A database that work can be done on.
#[derive(Clone)]
enum Place {
    Postgres(Server),
    Sqlite(sqlite::File),
}

impl Place {
    /// What tells it from others that no configuration names.
    fn label(&self) -> String {
        match self {
            Place::Postgres(Server { address: Address::Tcp { host, port }, dbname, .. }) => {
                format!("{host}:{port}/{dbname}")
            }
            Place::Postgres(Server { address: Address::Unix(socket), dbname, .. }) => {
                format!("{}/{dbname}", socket.display())
            }
            Place::Sqlite(file) => file.path.display().to_string(),
        }
    }
}

/// What an execution asks of its claim, for a single statement or for rows.
#[derive(Clone, Copy)]
enum Book<'a> {
    Statement(&'a dyn Ledger),
    Rows(&'a dyn RowsLedger),
}

impl Book<'_> {
    async fn confirm(self) -> Result<(), ClaimLost> {
        match self {
            Book::Statement(ledger) => ledger.confirm().await,
            Book::Rows(ledger) => ledger.confirm().await,
        }
    }

    /// A single statement has no answers.
    async fn note(self, trace: Trace, answers: &RowAnswers) -> Result<(), ClaimLost> {
        match self {
            Book::Statement(ledger) => ledger.note(trace).await,
            Book::Rows(ledger) => ledger.note(trace, answers).await,
        }
    }
}

#[async_trait]
impl Executor for SqlExecutor {
    async fn execute(&self, work: Work, ledger: &dyn Ledger, stop: CancellationToken) -> End {
        // PostgreSQL would refuse it, SQLite read no further.
        if work.sql.contains('\0') {
            return refused("the SQL text holds a NUL byte".into());
        }
        let (book, lost) = (Book::Statement(ledger), self.sql.lost_statement);
        match self.place(&work) {
            Ok(Place::Postgres(server)) => postgres::execute(&server, lost, &work, book, &stop).await,
            Ok(Place::Sqlite(file)) => sqlite::execute(file, lost, &work, book, &stop).await,
            Err(reason) => refused(reason),
        }
    }

    async fn execute_rows(&self, work: RowsWork, ledger: &dyn RowsLedger, stop: CancellationToken) -> SqlRowsEnd {
        let RowsWork { each: work, rows } = work;
        let (book, lost) = (Book::Rows(ledger), self.sql.lost_statement);
        let ended = match self.place(&work) {
            Ok(Place::Postgres(server)) => postgres::execute_rows(&server, lost, &work, &rows, book, &stop).await,
            Ok(Place::Sqlite(file)) => sqlite::execute_rows(file, lost, &work, rows, book, &stop).await,
            Err(reason) => Err(refused(reason)),
        };
        match ended {
            Ok((answers, took)) => SqlRowsEnd::Committed(answers, took),
            Err(End::Done(_)) => SqlRowsEnd::EarlierCommitted,
            Err(End::Failed(failure)) => SqlRowsEnd::Failed(failure),
            Err(End::Stopped) => SqlRowsEnd::Stopped,
            // It was SQL of ours that somebody cancelled. A row's statement fails its row.
            Err(End::CancelledElsewhere) => SqlRowsEnd::Failed(Failure {
                message: "canceling statement due to user request".into(),
                sqlstate: Some(QUERY_CANCELED.into()),
                retryable: true,
                undone: true,
            }),
            Err(End::ClaimLost) => SqlRowsEnd::ClaimLost,
            Err(End::Unknown(reason)) => SqlRowsEnd::Unknown(reason),
        }
    }

    fn dialect(&self, target: &Target) -> template::Dialect {
        match target {
            Target::Named(name) if matches!(self.databases.get(name), Some(Database::Sqlite(_))) => {
                template::Dialect::Sqlite
            }
            _ => template::Dialect::Postgres,
        }
    }
}

/// Nothing was to be done any more.
fn committed_earlier() -> End {
    let notices = vec!["NOTICE: an earlier execution of this statement had committed it".into()];
    End::Done(Report { tag: None, notices })
}

/// Nothing was tried, and trying again would not help.
fn refused(message: String) -> End {
    End::Failed(Failure { message: cut(&message, MESSAGE_MAX_BYTES), ..Failure::default() })
}

fn timed_out() -> End {
    let sqlstate = Some(QUERY_CANCELED.into());
    End::Failed(Failure { message: STATEMENT_TIMEOUT.into(), sqlstate, ..Failure::default() })
}

/// The text as the database gets it: whoever looks for the job's statement looks for this comment.
fn commented(work: &Work) -> String {
    format!("/* {} */ {}", work.job, work.sql)
}

/// Waits for `what`, or for `stop`.
async fn until<T>(stop: &CancellationToken, what: impl Future<Output = T>) -> Result<T, End> {
    tokio::select! {
        biased;
        () = stop.cancelled() => Err(End::Stopped),
        done = what => Ok(done),
    }
}

/// At most `max` bytes of a text.
fn cut(text: &str, max: usize) -> String {
    if text.len() <= max { text.to_owned() } else { text[..text.floor_char_boundary(max)].to_owned() }
}
