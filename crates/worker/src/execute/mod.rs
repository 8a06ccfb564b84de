//! Executors: each turns one piece of work into an outcome, a value. An executor never sees Redis, a queue or another job;
//! what it may ask of its claim stands in [`Ledger`].

use std::time::Duration;

use async_trait::async_trait;
use queue_core::ids::{Fence, JobId, User};
use queue_core::model::batch::RowResult;
use tokio_util::sync::CancellationToken;

pub mod chunks;
pub mod command;
pub mod function;
pub mod handlers;
pub mod process;
pub mod program;
pub mod rows;
pub mod sql;
pub mod task;

/// One statement to run, once.
#[derive(Debug, Clone)]
pub struct Work {
    /// The job whose statement this is.
    pub job: JobId,
    /// Its owner.
    pub user: User,
    /// The fence of the claim under which it runs.
    pub fence: Fence,
    /// The statement's name within its job, the same at every attempt: `0`, `0.onerror`, `onsuccess`.
    pub step: String,
    /// The SQL text, one or several statements, without the comment that names the job.
    pub sql: String,
    /// How long the whole text may run.
    pub timeout: Duration,
    /// Where it runs.
    pub target: Target,
    /// What an earlier execution of this same step left behind, if nobody recorded how it ended.
    pub earlier: Option<Trace>,
    /// An earlier execution of the job may still be going on: it is to be ended and settled first, even if `stop` has fired.
    pub takes_over: bool,
}

/// Where a statement runs.
#[derive(Clone, PartialEq, Eq)]
pub enum Target {
    /// A PostgreSQL database named by the job's own connection fields.
    Host {
        /// Host name or address.
        host: String,
        /// TCP port.
        port: u16,
        /// Database name.
        dbname: String,
        /// Role.
        dbuser: String,
        /// Password; may be empty, and may hold any byte but NUL.
        pass: Vec<u8>,
    },
    /// A database that the worker's configuration names.
    Named(String),
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Target::Host { host, port, .. } => write!(f, "Host({host}:{port})"),
            Target::Named(name) => write!(f, "Named({name})"),
        }
    }
}

/// What an execution leaves with its job before the moment after which it could have taken effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trace {
    /// The statement runs in this transaction, about to be committed: a name without blanks that only the executor reads.
    Transaction(String),
    /// The statement runs outside any transaction of ours: whether it took effect can't be asked later.
    Untransacted,
}

/// The claim is no longer this worker's: whatever was going on must stop, and its result counts for nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the claim is no longer ours")]
pub struct ClaimLost;

/// What an executor may ask of the claim that it runs under.
#[async_trait]
pub trait Ledger: Send + Sync {
    /// Whether the claim is still held. Asked after the database's lock is ours and before the statement runs, unless a
    /// trace is noted there.
    async fn confirm(&self) -> Result<(), ClaimLost>;
    /// Stores a trace with the job, under the claim.
    async fn note(&self, trace: Trace) -> Result<(), ClaimLost>;
}

/// How one statement ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// It ran to its end and took effect.
    Done(Report),
    /// It failed; nothing of it took effect, or it was not transactional.
    Failed(Failure),
    /// It was interrupted because `stop` was asked for.
    Stopped,
    /// It was interrupted by somebody else ("user request"), not by us and not by a timeout.
    CancelledElsewhere,
    /// The claim was lost on the way: nothing may be recorded.
    ClaimLost,
    /// Whether it took effect can't be known.
    Unknown(String),
}

/// What a statement that ran had to say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Command tag of the last statement, e.g. `UPDATE 3`.
    pub tag: Option<String>,
    /// Notices, at most [`sql::NOTICES_MAX`] of them, each `SEVERITY: message`.
    pub notices: Vec<String>,
}

/// Why a statement failed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Failure {
    /// The database's own message, free of passwords and of SQL text of ours.
    pub message: String,
    /// SQLSTATE, where the database gave one.
    pub sqlstate: Option<String>,
    /// The error proves that nothing was done and that trying again may help (connection refused, 40001, 40P01).
    pub retryable: bool,
    /// Nothing of the statement is left, whatever it did.
    pub undone: bool,
}

/// One statement to run for each of some rows of a batch, all in one transaction.
#[derive(Debug, Clone)]
pub struct RowsWork {
    /// The statement, as it runs for each row: its text names the row's values as parameters, its time is that of one row. The
    /// job is the chunk that the rows are.
    pub each: Work,
    /// The rows, in the order in which they run.
    pub rows: Vec<SqlRow>,
}

/// One row for a statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SqlRow {
    /// Its place in the chunk, to name it in the answer.
    pub place: usize,
    /// The values of the parameters: a JSON array for those with numbers, a JSON object for those with names.
    pub input: Vec<u8>,
}

/// What an executor may ask of the claim to a chunk of rows.
#[async_trait]
pub trait RowsLedger: Send + Sync {
    /// As that of a [`Ledger`].
    async fn confirm(&self) -> Result<(), ClaimLost>;
    /// Stores a trace and the answers to rows with the chunk, in one step, under the claim. Who finds later that the transaction
    /// was committed has the answers.
    async fn note(&self, trace: Trace, answers: &RowAnswers) -> Result<(), ClaimLost>;
}

/// What became of rows, by their places.
pub type RowAnswers = Vec<(usize, RowResult)>;

/// How a statement for rows ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SqlRowsEnd {
    /// The transaction is committed. It holds what these rows did; rows without an answer were not begun. The rows took this long,
    /// without the transaction around them.
    Committed(RowAnswers, Duration),
    /// The transaction of an earlier execution is committed, and nothing was run now: the answers that were noted with it stand.
    EarlierCommitted,
    /// Nothing took effect, of no row.
    Failed(Failure),
    /// Nothing took effect, because `stop` was asked for.
    Stopped,
    /// The claim was lost on the way: nothing may be recorded.
    ClaimLost,
    /// Whether the transaction took effect can't be known.
    Unknown(String),
}

/// Runs work of one kind.
#[async_trait]
pub trait Executor: Send + Sync {
    /// Runs `work` to its end. When `stop` fires, interrupts it, waits until that is settled, and tells what really
    /// happened: a statement that got through first is [`End::Done`].
    async fn execute(&self, work: Work, ledger: &dyn Ledger, stop: CancellationToken) -> End;

    /// Runs a statement for rows. Each row takes effect or fails by itself, and what took effect is committed once, with all the
    /// other rows' effects. When `stop` fires, nothing is committed any more.
    async fn execute_rows(&self, work: RowsWork, ledger: &dyn RowsLedger, stop: CancellationToken) -> SqlRowsEnd;

    /// How SQL is to be quoted for a target.
    fn dialect(&self, target: &Target) -> sql::template::Dialect;
}
