//! One statement in a SQLite file.
//!
//! The same promise as on PostgreSQL by the same means: the transaction gets an id, the fence of the claim, which is noted
//! with the job before COMMIT. A row of `drayman_applied`, written in that transaction, tells whoever comes later that it
//! committed. `BEGIN IMMEDIATE` keeps other executions out; SQLite rolls back what a dead process left.
//!
//! SQLite blocks, so it runs on a thread of its own; what it must ask of the claim goes through a channel.

pub(in crate::execute) mod chunk;
mod rows;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rusqlite::config::DbConfig;
use rusqlite::fallible_iterator::FallibleIterator;
use rusqlite::hooks::{AuthAction, AuthContext, Authorization};
use rusqlite::limits::Limit;
use rusqlite::{Batch, Connection, ErrorCode, OpenFlags, Params, params};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::classify::sqlite_tag;
use super::databases::LostStatement;
use super::{Book, LOST_UNTRANSACTED, MESSAGE_MAX_BYTES, commented, committed_earlier, cut, timed_out, until};
use crate::execute::{ClaimLost, End, Failure, Report, RowAnswers, SqlRow, Trace, Work};

/// How long another connection's lock is waited for.
const BUSY_MAX: Duration = Duration::from_secs(10);
const BUSY_POLL: Duration = Duration::from_millis(10);
/// How many of SQLite's virtual machine steps pass between two looks at deadline and interrupt: well below a millisecond.
const STEPS_BETWEEN_LOOKS: i32 = 1000;
/// How long a marker is kept, in seconds. Longer than any job is found to be lost after.
const MARKER_AGE_MAX_S: i64 = 7 * 24 * 3600;
/// Longest string or row that a statement may build, in bytes.
const VALUE_MAX_BYTES: i32 = 64 << 20;

/// Tables that no job may write.
const OF_OURS: [&str; 2] = ["drayman_applied", "drayman_checkpoints"];
const CREATE_MARKERS: &str = "CREATE TABLE IF NOT EXISTS main.drayman_applied(\
    job TEXT NOT NULL, step TEXT NOT NULL, fence TEXT NOT NULL, at INTEGER NOT NULL, PRIMARY KEY (job, step))";
const FIND_MARKER: &str = "SELECT count(*) FROM main.drayman_applied WHERE job = ?1 AND step = ?2 AND fence = ?3";
const PRUNE_MARKERS: &str = "DELETE FROM main.drayman_applied WHERE at < unixepoch() - ?1";
const MARK: &str = "INSERT OR REPLACE INTO main.drayman_applied(job, step, fence, at) VALUES (?1, ?2, ?3, unixepoch())";

/// Settings of the whole process or of SQLite's trust in a file: one user's job must not change them.
const FORBIDDEN_PRAGMAS: [&str; 6] = [
    "data_store_directory",
    "hard_heap_limit",
    "soft_heap_limit",
    "temp_store_directory",
    "trusted_schema",
    "writable_schema",
];

/// Where a database is.
#[derive(Clone)]
pub(in crate::execute) struct File {
    pub path: PathBuf,
    /// Make it if it is missing.
    pub create: bool,
}

/// Runs `work` in `file`.
pub(super) async fn execute(
    file: File,
    lost: LostStatement,
    work: &Work,
    book: Book<'_>,
    stop: &CancellationToken,
) -> End {
    on_thread(file, lost, work, book, stop, |run| run.run()).await.unwrap_or_else(|end| end)
}

/// Runs the statement of `work` for each of `rows`, and commits once. `Err` is an end without answers: `Done` means that an earlier
/// execution had committed.
pub(super) async fn execute_rows(
    file: File,
    lost: LostStatement,
    work: &Work,
    rows: Vec<SqlRow>,
    book: Book<'_>,
    stop: &CancellationToken,
) -> Result<(RowAnswers, Duration), End> {
    on_thread(file, lost, work, book, stop, move |run| run.run_rows(&rows)).await
}

/// Has `doing` done on a thread of its own, and asks the claim in its name.
async fn on_thread<T: Send + 'static>(
    file: File,
    lost: LostStatement,
    work: &Work,
    book: Book<'_>,
    stop: &CancellationToken,
    doing: impl FnOnce(&Run) -> Result<T, End> + Send + 'static,
) -> Result<T, End> {
    let brake = Arc::new(Brake::default());
    // A future that is dropped can't stop its thread otherwise.
    let _abandon = Abandon(brake.clone());
    let (asks, mut asked) = mpsc::channel(1);
    let run = Run { file, lost, work: work.clone(), brake: brake.clone(), asks };
    let mut thread = tokio::task::spawn_blocking(move || doing(&run));
    // A takeover first finds out what there is to stop: it asks for the claim when it has.
    let mut stoppable = !work.takes_over;
    loop {
        tokio::select! {
            biased;
            end = &mut thread => {
                return end.unwrap_or_else(|_| {
                    Err(End::Unknown("the executor broke down: whether the statement took effect is not known".into()))
                });
            }
            () = stop.cancelled(), if stoppable && !brake.is_pulled() => brake.pull(Cause::Stop),
            Some(Ask { what, reply }) = asked.recv() => {
                stoppable = true;
                let asking = async {
                    match what {
                        None => book.confirm().await,
                        Some((trace, answers)) => book.note(trace, &answers).await,
                    }
                };
                match until(stop, asking).await {
                    Ok(answer) => drop(reply.send(answer)),
                    // Unanswered, the thread looks at its brake.
                    Err(_) => brake.pull(Cause::Stop),
                }
            }
        }
    }
}

/// A question to the claim: whether it stands, or to note a trace with the answers to rows.
struct Ask {
    what: Option<(Trace, RowAnswers)>,
    reply: oneshot::Sender<Result<(), ClaimLost>>,
}

/// Why the thread is to go no further, whatever its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    Stop = 1,
    Abandoned = 2,
}

/// Stops the thread's statement, for a cause, the first of which stays, or because its time is over.
#[derive(Default)]
struct Brake {
    cause: AtomicU8,
    overdue: AtomicBool,
    deadline: Mutex<Option<Instant>>,
}

impl Brake {
    fn pull(&self, cause: Cause) {
        let _ = self.cause.compare_exchange(0, cause as u8, Ordering::SeqCst, Ordering::SeqCst);
    }

    fn is_pulled(&self) -> bool {
        self.cause.load(Ordering::SeqCst) != 0
    }

    /// Gives what follows its time.
    fn set_deadline(&self, deadline: Option<Instant>) {
        self.overdue.store(false, Ordering::SeqCst);
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner) = deadline;
    }

    /// What follows has no limit. Whether what ran before was overdue can still be asked.
    fn lift_deadline(&self) {
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Whether the time of what ran last was over before it had ended.
    fn is_overdue(&self) -> bool {
        self.overdue.load(Ordering::SeqCst)
    }

    /// Whether to go no further.
    fn look(&self) -> bool {
        let deadline = *self.deadline.lock().unwrap_or_else(PoisonError::into_inner);
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            self.overdue.store(true, Ordering::SeqCst);
        }
        self.is_pulled() || self.is_overdue()
    }

    fn end(&self) -> End {
        match self.cause.load(Ordering::SeqCst) {
            _ if self.is_overdue() => timed_out(),
            cause if cause == Cause::Abandoned as u8 => End::ClaimLost,
            _ => End::Stopped,
        }
    }
}

struct Abandon(Arc<Brake>);

impl Drop for Abandon {
    fn drop(&mut self) {
        self.0.pull(Cause::Abandoned);
    }
}

/// What a text that ran through was.
struct Ran {
    tag: Option<String>,
    read_only: bool,
}

/// Why a text did not run through.
struct Broken {
    error: rusqlite::Error,
    /// What of the text the authorizer denied, in words for its author.
    denied: Option<String>,
    /// The text can't run in a transaction.
    refused: bool,
    /// Nothing of the text had run.
    first: bool,
}

/// What the authorizer saw.
#[derive(Default)]
struct Watch {
    transaction_control: AtomicBool,
    denied: Mutex<Option<String>>,
}

/// The part that runs on its own thread.
struct Run {
    file: File,
    lost: LostStatement,
    work: Work,
    brake: Arc<Brake>,
    asks: mpsc::Sender<Ask>,
}

impl Run {
    /// `Err` is an end as well, reached early. Whatever is open is rolled back when the connection goes.
    fn run(&self) -> Result<End, End> {
        let mut connection = self.open()?;
        match self.transacted(&mut connection)? {
            Some(end) => Ok(end),
            None => {
                // Anew, so that nothing of the first try is left in the session.
                drop(connection);
                self.bare(&mut self.open()?)
            }
        }
    }

    fn open(&self) -> Result<Connection, End> {
        if self.work.earlier == Some(Trace::Untransacted) && self.lost == LostStatement::Unknown {
            return Err(End::Unknown(LOST_UNTRANSACTED.into()));
        }
        let mut connection =
            open(&self.file).map_err(|message| End::Failed(Failure { message, ..Failure::default() }))?;
        self.prepare(&mut connection).map_err(|error| self.failed(&error, true))?;
        Ok(connection)
    }

    fn prepare(&self, connection: &mut Connection) -> rusqlite::Result<()> {
        guarded(connection)?;
        let brake = self.brake.clone();
        connection.progress_handler(STEPS_BETWEEN_LOOKS, Some(move || brake.look()))?;
        let brake = self.brake.clone();
        let waits = (BUSY_MAX.as_millis() / BUSY_POLL.as_millis()) as i32;
        connection.busy_handler(Some(move |count: i32| {
            std::thread::sleep(BUSY_POLL);
            count < waits && !brake.look()
        }))
    }

    /// SQL of ours.
    fn ours(&self, connection: &Connection, sql: &str, params: impl Params) -> Result<(), End> {
        let done = connection.prepare_cached(sql).and_then(|mut statement| statement.execute(params));
        done.map(drop).map_err(|error| self.failed(&error, true))
    }

    /// Begins the transaction in which a user's text runs. `Err` too where that of an earlier execution had been committed.
    fn begin(&self, connection: &Connection) -> Result<(), End> {
        let (job, step) = (self.work.job.as_str(), self.work.step.as_str());
        self.ours(connection, "BEGIN IMMEDIATE", [])?;
        self.ours(connection, CREATE_MARKERS, [])?;
        if let Some(Trace::Transaction(id)) = &self.work.earlier {
            let found = connection.query_row(FIND_MARKER, params![job, step, id], |row| row.get::<_, i64>(0));
            if found.map_err(|error| self.failed(&error, true))? > 0 {
                return Err(committed_earlier());
            }
        }
        self.ask(None)
    }

    /// Notes the transaction and commits it.
    fn commit(&self, connection: &Connection, answers: RowAnswers) -> Result<(), End> {
        let (job, step, id) = (self.work.job.as_str(), self.work.step.as_str(), self.work.fence.to_string());
        self.ask(Some((Trace::Transaction(id.clone()), answers)))?;
        self.ours(connection, PRUNE_MARKERS, [MARKER_AGE_MAX_S])?;
        self.ours(connection, MARK, params![job, step, id])?;
        self.ours(connection, "COMMIT", [])
    }

    /// Runs the text in a transaction of ours; nothing if it can't be run so.
    fn transacted(&self, connection: &mut Connection) -> Result<Option<End>, End> {
        self.begin(connection)?;
        let ran = match self.run_text(connection, true) {
            Ok(ran) => ran,
            Err(broken) if broken.refused => return Ok(None),
            Err(broken) => return Err(self.broken(broken, true)),
        };
        let done = End::Done(Report { tag: ran.tag, notices: Vec::new() });
        if !ran.read_only {
            self.commit(connection, RowAnswers::new())?;
        }
        Ok(Some(done))
    }

    /// Runs the text by itself.
    fn bare(&self, connection: &mut Connection) -> Result<End, End> {
        self.ask(Some((Trace::Untransacted, RowAnswers::new())))?;
        let ran = self.run_text(connection, false).map_err(|broken| self.broken(broken, false))?;
        if !connection.is_autocommit() {
            let message = "the statement left a transaction open: it was rolled back".into();
            return Err(End::Failed(Failure { message, ..Failure::default() }));
        }
        Ok(End::Done(Report { tag: ran.tag, notices: Vec::new() }))
    }

    /// Runs every statement of the user's text, under the authorizer and the deadline.
    fn run_text(&self, connection: &mut Connection, in_transaction: bool) -> Result<Ran, Broken> {
        let watch = Arc::new(Watch::default());
        let watching = watch.clone();
        let broken = |error, first| Broken { error, denied: None, refused: false, first };
        connection
            .authorizer(Some(move |context: AuthContext<'_>| watching.judge(&context, in_transaction)))
            .map_err(|error| broken(error, true))?;
        self.brake.set_deadline(self.deadline());
        let ran = self.run_statements(connection);
        self.brake.lift_deadline();
        let cleared = connection.authorizer(None::<fn(AuthContext<'_>) -> Authorization>);
        match (ran, cleared) {
            (Ok(ran), Ok(())) => Ok(ran),
            (Ok(_), Err(error)) => Err(broken(error, false)),
            (Err((error, first)), _) => {
                let refusal = ["within a transaction", "inside a transaction", "within transaction"];
                let text = describe(&error);
                let refused =
                    watch.transaction_control.load(Ordering::Relaxed) || refusal.iter().any(|r| text.ends_with(r));
                Err(Broken { error, denied: watch.denied(), refused: refused && in_transaction, first })
            }
        }
    }

    /// The error tells whether it was the first statement's.
    fn run_statements(&self, connection: &Connection) -> Result<Ran, (rusqlite::Error, bool)> {
        let text = commented(&self.work);
        let mut batch = Batch::new(connection, &text);
        let mut ran = Ran { tag: None, read_only: true };
        let mut first = true;
        while let Some(mut statement) = batch.next().map_err(|error| (error, first))? {
            ran.read_only &= statement.readonly();
            let mut found = 0;
            let mut rows = statement.raw_query();
            while rows.next().map_err(|error| (error, first))?.is_some() {
                found += 1;
            }
            drop(rows);
            let sql = statement.expanded_sql().unwrap_or_default();
            ran.tag = sqlite_tag(&sql, connection.changes(), found).or(ran.tag);
            first = false;
        }
        Ok(ran)
    }

    /// When what begins now has taken too long.
    fn deadline(&self) -> Option<Instant> {
        Instant::now().checked_add(self.work.timeout)
    }

    fn ask(&self, what: Option<(Trace, RowAnswers)>) -> Result<(), End> {
        if self.brake.is_pulled() {
            return Err(self.brake.end());
        }
        let (reply, answer) = oneshot::channel();
        let _ = self.asks.blocking_send(Ask { what, reply });
        match answer.blocking_recv() {
            Ok(Ok(())) => Ok(()),
            Ok(Err(ClaimLost)) => Err(End::ClaimLost),
            // Nobody answers: whoever would is stopping, or gone.
            Err(_) if self.brake.is_pulled() => Err(self.brake.end()),
            Err(_) => Err(End::ClaimLost),
        }
    }

    fn broken(&self, broken: Broken, in_transaction: bool) -> End {
        match broken.denied {
            Some(message) => End::Failed(Failure { message, ..Failure::default() }),
            None => self.failed(&broken.error, in_transaction || broken.first),
        }
    }

    /// The end that an error means; `undone` if it left nothing.
    fn failed(&self, error: &rusqlite::Error, undone: bool) -> End {
        let busy = matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked));
        let interrupted = error.sqlite_error_code() == Some(ErrorCode::OperationInterrupted);
        if (busy || interrupted) && (self.brake.is_pulled() || self.brake.is_overdue()) {
            return self.brake.end();
        }
        End::Failed(Failure { message: describe(error), sqlstate: None, retryable: busy && undone, undone })
    }
}

impl Watch {
    /// What was denied last, if that was not asked for yet.
    fn denied(&self) -> Option<String> {
        self.denied.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Says what a user's text may do. SQLite asks while it reads a statement, so nothing can be hidden from this.
    fn judge(&self, context: &AuthContext<'_>, in_transaction: bool) -> Authorization {
        // Other databases: attached to memory, or VACUUM's copy.
        let elsewhere = context.database_name.is_some_and(|name| name != "main" && name != "temp");
        let of_ours = |name: &str| OF_OURS.into_iter().find(|ours| name.eq_ignore_ascii_case(ours) && !elsewhere);
        let denied = match context.action {
            AuthAction::Transaction { .. } if in_transaction => {
                self.transaction_control.store(true, Ordering::Relaxed);
                return Authorization::Deny;
            }
            // No name is a private file without one, as VACUUM needs.
            AuthAction::Attach { filename: "" | ":memory:" } => None,
            AuthAction::Attach { .. } => Some("a job may use its own database file only".into()),
            // A file name that is computed comes without one.
            AuthAction::Unknown { code: rusqlite::ffi::SQLITE_ATTACH, .. } => {
                Some("a job may use its own database file only".into())
            }
            AuthAction::Function { function_name } if function_name.eq_ignore_ascii_case("load_extension") => {
                Some("extensions can't be loaded".into())
            }
            AuthAction::Pragma { pragma_name, .. }
                if FORBIDDEN_PRAGMAS.iter().any(|name| name.eq_ignore_ascii_case(pragma_name)) =>
            {
                Some(format!("PRAGMA {pragma_name} is not allowed in a job"))
            }
            AuthAction::Insert { table_name }
            | AuthAction::Update { table_name, .. }
            | AuthAction::Delete { table_name }
            | AuthAction::CreateTable { table_name }
            | AuthAction::CreateTempTable { table_name }
            | AuthAction::DropTable { table_name }
            | AuthAction::AlterTable { table_name, .. }
            | AuthAction::CreateIndex { table_name, .. }
            | AuthAction::CreateTrigger { table_name, .. }
            | AuthAction::CreateTempTrigger { table_name, .. }
            | AuthAction::CreateView { view_name: table_name }
            | AuthAction::CreateTempView { view_name: table_name }
            | AuthAction::CreateVtable { table_name, .. } => {
                of_ours(table_name).map(|name| format!("the table {name} is Drayman's own"))
            }
            _ => None,
        };
        if denied.is_none() {
            return Authorization::Allow;
        }
        *self.denied.lock().unwrap_or_else(PoisonError::into_inner) = denied;
        Authorization::Deny
    }
}

/// Opens a file, or says why not.
pub(super) fn open(file: &File) -> Result<Connection, String> {
    let mut flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    flags.set(OpenFlags::SQLITE_OPEN_CREATE, file.create);
    Connection::open_with_flags(&file.path, flags).map_err(|error| {
        // SQLite's message would tell where the file is.
        let missing = error.sqlite_error_code() == Some(ErrorCode::CannotOpen);
        if missing { "unable to open database file".into() } else { describe(&error) }
    })
}

/// What holds for every connection on which others' SQL runs.
fn guarded(connection: &Connection) -> rusqlite::Result<()> {
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    connection.set_limit(Limit::SQLITE_LIMIT_LENGTH, VALUE_MAX_BYTES)?;
    connection.set_limit(Limit::SQLITE_LIMIT_WORKER_THREADS, 0)?;
    Ok(())
}

/// SQLite's own message, without the SQL that rusqlite adds.
fn describe(error: &rusqlite::Error) -> String {
    let message = match error {
        rusqlite::Error::SqliteFailure(_, Some(message)) => message.clone(),
        rusqlite::Error::SqlInputError { msg, .. } => msg.clone(),
        rusqlite::Error::SqliteFailure(error, None) => error.to_string(),
        other => other.to_string(),
    };
    cut(&message, MESSAGE_MAX_BYTES)
}
