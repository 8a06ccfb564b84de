//! One statement on PostgreSQL 13 or newer: connect, exclude other executions of the job, find out what an earlier one
//! left, run, commit.
//!
//! Whatever happens in between, a statement in a transaction of ours takes effect once: its transaction id is noted with
//! the job before COMMIT, and `pg_xact_status` tells whoever comes later how that ended.

pub(super) mod chunk;
mod exclusion;
mod link;
mod returned;
mod rows;
mod wire;

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::error::SqlState;
use tokio_util::sync::CancellationToken;

use self::exclusion::Identity;
pub(super) use self::link::Link;
pub(super) use self::link::{Address, Server, Tls};
use self::link::{Fault, Interrupt};
use self::wire::COPY_REFUSED;
use super::classify::{Shape, shape};
use super::databases::LostStatement;
use super::{Book, LOST_UNTRANSACTED, commented, committed_earlier, timed_out, until};
use crate::execute::{ClaimLost, End, Failure, Report, RowAnswers, SqlRow, Trace, Work};

/// How long the backends of an earlier execution may take to go.
const EXCLUSION_MAX: Duration = Duration::from_secs(10);
/// How often the lock is tried meanwhile.
const EXCLUSION_POLL: Duration = Duration::from_millis(20);
/// How long a transaction that nobody runs any more may take to end.
const FATE_MAX: Duration = Duration::from_secs(10);
/// How long the fate of a COMMIT whose reply was lost is asked for.
const RESOLVE_MAX: Duration = Duration::from_secs(30);
/// How long a rollback may take before the connection is dropped, which comes to the same.
const ROLLBACK_MAX: Duration = Duration::from_secs(5);
/// PostgreSQL ends a single statement by itself; our own deadline, over the whole text, comes after it.
const DEADLINE_SLACK: Duration = Duration::from_millis(100);

/// How a transaction ended.
enum Fate {
    Committed,
    Aborted,
    InProgress,
    /// A transaction of this id committed, but the server has crashed meanwhile: it may be another's.
    Doubtful,
    Forgotten(String),
}

/// Said of it.
const DOUBTFUL: &str =
    "the database server has crashed meanwhile and may have given the transaction's id to another one";

/// Whether an earlier execution of the job may still have a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Others {
    /// Nothing tells of one: the lock alone is asked.
    Unlikely,
    /// Even one that has given its lock away is looked for.
    Possible,
}

/// How a run within a transaction of ours ended.
enum Transacted {
    Ended(End),
    /// PostgreSQL refuses to run the text in a transaction; nothing of it took effect.
    Refused,
}

/// Runs `work` on `server`.
pub(super) async fn execute(
    server: &Server,
    lost: LostStatement,
    work: &Work,
    book: Book<'_>,
    stop: &CancellationToken,
) -> End {
    let shape = shape(&work.sql);
    if shape == Shape::ClientCopy {
        return End::Failed(Failure { message: COPY_REFUSED.into(), ..Failure::default() });
    }
    let identity = Identity::new(&work.job, work.fence);
    let execution = Execution { server, lost, work, book, stop, identity };
    execution.run(shape).await.unwrap_or_else(|end| end)
}

/// Runs the statement of `work` for each of `rows`, and commits once. `Err` is an end without answers: `Done` means that an earlier
/// execution had committed.
pub(super) async fn execute_rows(
    server: &Server,
    lost: LostStatement,
    work: &Work,
    rows: &[SqlRow],
    book: Book<'_>,
    stop: &CancellationToken,
) -> Result<(RowAnswers, Duration), End> {
    let identity = Identity::new(&work.job, work.fence);
    let execution = Execution { server, lost, work, book, stop, identity };
    execution.run_rows(rows).await
}

struct Execution<'a> {
    server: &'a Server,
    lost: LostStatement,
    work: &'a Work,
    book: Book<'a>,
    stop: &'a CancellationToken,
    identity: Identity,
}

impl Execution<'_> {
    /// `Err` is an end as well, reached early.
    async fn run(&self, shape: Shape) -> Result<End, End> {
        let link = self.settled().await?;
        if shape == Shape::Transactional {
            match self.transacted(link).await? {
                Transacted::Ended(end) => Ok(end),
                // Anew, so that nothing of the first try is left in the session.
                Transacted::Refused => self.untransacted(until(self.stop, self.open(self.others())).await??).await,
            }
        } else {
            self.untransacted(link).await
        }
    }

    fn others(&self) -> Others {
        if self.work.takes_over { Others::Possible } else { Others::Unlikely }
    }

    /// A connection on which nothing of earlier executions is left to be found out. `Err` too where one of them had committed.
    async fn settled(&self) -> Result<Link, End> {
        // A takeover is brought to its end even if a stop came first: only then is it known what there is to stop.
        let unstoppable = CancellationToken::new();
        let stop = if self.work.takes_over { &unstoppable } else { self.stop };
        let link = until(stop, self.open(self.others())).await??;
        match &self.work.earlier {
            None => {}
            Some(Trace::Untransacted) => match self.lost {
                LostStatement::RunAgain => {}
                LostStatement::Unknown => return Err(End::Unknown(LOST_UNTRANSACTED.into())),
            },
            Some(Trace::Transaction(id)) => match until(stop, fate(&link, id)).await? {
                Fate::Committed => {
                    link.close().await;
                    return Err(committed_earlier());
                }
                Fate::Aborted => {}
                Fate::InProgress => {
                    return Err(End::Unknown("the transaction of an earlier execution is still in progress".into()));
                }
                Fate::Doubtful => {
                    let text = format!("whether the earlier execution took effect is not known: {DOUBTFUL}");
                    return Err(End::Unknown(text));
                }
                Fate::Forgotten(reason) => {
                    let text = format!("how the transaction of an earlier execution ended can't be known: {reason}");
                    return Err(End::Unknown(text));
                }
            },
        }
        Ok(link)
    }

    /// Connects and waits until no other execution of the job is left.
    async fn open(&self, others: Others) -> Result<Link, End> {
        let link = self.server.connect(&self.identity.name).await.map_err(End::Failed)?;
        let timeout_ms = self.work.timeout.as_millis().clamp(1, i32::MAX as u128);
        let mut settings = format!("SET statement_timeout = {timeout_ms}; SET standard_conforming_strings = on");
        // Since 14 a backend can notice by itself that its client is gone.
        if link.version.is_some_and(|version| version >= 14) {
            settings.push_str("; SET client_connection_check_interval = '2s'");
        }
        let settings = async {
            match link.command(&settings).await {
                // Not every platform that PostgreSQL runs on can notice; then whoever takes over has more to do.
                Err(Fault::Database(error)) if error.code() == &SqlState::INVALID_PARAMETER_VALUE => {
                    link.command(settings.rsplit_once(';').map_or("", |(rest, _)| rest)).await
                }
                done => done,
            }
        };
        let lock = self.identity.lock();
        let first = if others == Others::Possible { lock.clone() } else { self.identity.try_lock() };
        let (set, mut tried) = tokio::join!(settings, link.row(&first));
        set.map_err(unstarted)?;
        if others == Others::Unlikely {
            match tried.map_err(unstarted)?.as_slice() {
                [Some(ours)] if ours == "t" => return Ok(link),
                // Somebody is there all the same.
                _ => tried = link.row(&lock).await,
            }
        }
        let give_up = Instant::now() + EXCLUSION_MAX;
        let mut asked = false;
        loop {
            let row = tried.map_err(unstarted)?;
            if matches!(&row[..], [Some(ours), Some(others)] if ours == "t" && others == "0") {
                return Ok(link);
            }
            if Instant::now() >= give_up {
                return Err(End::Failed(Failure {
                    message: "another execution of this job did not end in time".into(),
                    retryable: true,
                    ..Failure::default()
                }));
            }
            // A worker that was asleep while its job went to another one must not disturb that.
            if !asked {
                self.book.confirm().await.map_err(claim_lost)?;
                asked = true;
            }
            link.row(&self.identity.terminate_others()).await.map_err(unstarted)?;
            sleep(EXCLUSION_POLL).await;
            tried = link.row(&lock).await;
        }
    }

    /// Begins the transaction in which a user's text runs.
    async fn begin(&self, link: &Link, sql: &str) -> Result<(), End> {
        // BEGIN alone does nothing yet, so it need not wait for the claim. It must have succeeded before the text is sent,
        // or the text would commit by itself.
        let (confirmed, begun) =
            until(self.stop, async { tokio::join!(self.book.confirm(), link.command(sql)) }).await?;
        confirmed.map_err(claim_lost)?;
        begun.map_err(unstarted)
    }

    async fn transacted(&self, mut link: Link) -> Result<Transacted, End> {
        self.begin(&link, "BEGIN").await?;
        let mut ran = link.run(&commented(self.work), self.stop, self.deadline()).await;
        let mut id = None;
        if ran.is_ok() {
            match transaction(&link).await {
                Ok(found) => id = found,
                Err(fault) => ran = Err(fault),
            }
        }
        if let Err(fault) = ran {
            let refused = [SqlState::ACTIVE_SQL_TRANSACTION, SqlState::INVALID_TRANSACTION_TERMINATION];
            let refused = link.interrupt.is_none() && fault.code().is_some_and(|code| refused.contains(code));
            let interrupt = link.interrupt;
            self.give_up(link, Some(&fault)).await;
            return if refused { Ok(Transacted::Refused) } else { Err(self.rolled_back(fault, interrupt).await) };
        }
        Ok(Transacted::Ended(self.commit(link, id, &RowAnswers::new()).await))
    }

    /// Notes the transaction, if it has written anything, and commits it. `Done` if that took effect.
    async fn commit(&self, link: Link, id: Option<String>, answers: &RowAnswers) -> End {
        if let Some(id) = &id {
            let noted = until(self.stop, self.book.note(Trace::Transaction(id.clone()), answers)).await;
            if let Err(end) = noted.and_then(|noted| noted.map_err(claim_lost)) {
                self.give_up(link, None).await;
                return end;
            }
        }
        // What is set free is sent along: the server gets to it when it is done with COMMIT.
        let (committed, _) = tokio::join!(link.command("COMMIT"), link.command(self.identity.release()));
        let report = link.report();
        let interrupt = link.interrupt;
        match committed {
            Ok(()) => {
                link.close().await;
                End::Done(report)
            }
            Err(fault) if fault.is_fatal() => {
                drop(link);
                match id {
                    Some(id) => self.resolve(&id, report).await,
                    // It wrote nothing, so nothing is in doubt.
                    None => End::Done(report),
                }
            }
            Err(fault) => {
                link.close().await;
                self.rolled_back(fault, interrupt).await
            }
        }
    }

    async fn untransacted(&self, mut link: Link) -> Result<End, End> {
        // The note is taken under the claim, so it need not be asked for beside.
        until(self.stop, self.book.note(Trace::Untransacted, &RowAnswers::new())).await?.map_err(claim_lost)?;
        let ran = link.run(&commented(self.work), self.stop, self.deadline()).await;
        let (report, interrupt) = (link.report(), link.interrupt);
        let left_open = link.in_transaction();
        match ran {
            Ok(()) => {
                if !left_open {
                    let _ = link.command(self.identity.release()).await;
                }
                link.close().await;
                if left_open {
                    let message = "the statement left a transaction open: it was rolled back".into();
                    return Err(End::Failed(Failure { message, ..Failure::default() }));
                }
                Ok(End::Done(report))
            }
            Err(fault) => {
                self.give_up(link, Some(&fault)).await;
                Err(self.broken_off(fault, interrupt).await)
            }
        }
    }

    fn deadline(&self) -> Instant {
        let far = Duration::from_secs(365 * 24 * 3600);
        Instant::now() + self.work.timeout.min(far) + DEADLINE_SLACK
    }

    /// Leaves nothing of an unfinished transaction and frees the job.
    async fn give_up(&self, link: Link, fault: Option<&Fault>) {
        match fault {
            Some(Fault::Unsettled) => {
                drop(link);
                // The backend goes on by itself: who connects as the same execution terminates it.
                let terminated = async {
                    if let Ok(link) = self.open(Others::Possible).await {
                        link.close().await;
                    }
                };
                let _ = timeout(EXCLUSION_MAX, terminated).await;
            }
            // The backend is gone, or about to be when it finds the socket closed.
            Some(fault) if fault.is_fatal() => {}
            _ => {
                let sql = format!("ROLLBACK; {}", self.identity.release());
                if matches!(timeout(ROLLBACK_MAX, link.command(&sql)).await, Ok(Ok(()))) {
                    link.close().await;
                }
            }
        }
    }

    /// The end of a run of whose effects nothing is left.
    async fn rolled_back(&self, fault: Fault, interrupt: Option<Interrupt>) -> End {
        let canceled = fault.code() == Some(&SqlState::QUERY_CANCELED);
        if canceled || fault.is_fatal() && !matches!(fault, Fault::Broke(_)) {
            match interrupt {
                Some(Interrupt::Stop) => return End::Stopped,
                Some(Interrupt::Deadline) => return timed_out(),
                None if canceled => return canceled_elsewhere(&fault),
                None => {}
            }
            // A worker that took the job over terminates our backend.
            if self.book.confirm().await.is_err() {
                return End::ClaimLost;
            }
            return End::Failed(Failure { retryable: true, undone: true, ..failure(&fault) });
        }
        End::Failed(Failure { retryable: loses_a_race(&fault), undone: true, ..failure(&fault) })
    }

    /// The end of a run outside of any transaction of ours, which may have left anything.
    async fn broken_off(&self, fault: Fault, interrupt: Option<Interrupt>) -> End {
        if fault.code() == Some(&SqlState::QUERY_CANCELED) {
            return match interrupt {
                Some(Interrupt::Stop) => End::Stopped,
                Some(Interrupt::Deadline) => timed_out(),
                None => canceled_elsewhere(&fault),
            };
        }
        if !fault.is_fatal() || matches!(fault, Fault::Broke(_)) {
            return End::Failed(failure(&fault));
        }
        if self.book.confirm().await.is_err() {
            return End::ClaimLost;
        }
        match (self.lost, interrupt) {
            (LostStatement::RunAgain, Some(Interrupt::Stop)) => End::Stopped,
            (LostStatement::RunAgain, Some(Interrupt::Deadline)) => timed_out(),
            (LostStatement::RunAgain, None) => End::Failed(Failure { retryable: true, ..failure(&fault) }),
            (LostStatement::Unknown, _) => End::Unknown(format!(
                "{}; it can't run in a transaction: whether it took effect is not known",
                fault.message()
            )),
        }
    }

    /// Finds out about a COMMIT whose reply was lost.
    async fn resolve(&self, id: &str, report: Report) -> End {
        let asking = async {
            let mut pause = Duration::from_millis(50);
            loop {
                match self.open(Others::Possible).await {
                    Ok(link) => {
                        let fate = fate(&link, id).await;
                        link.close().await;
                        match fate {
                            Fate::Committed => return End::Done(report),
                            Fate::Aborted => {
                                return End::Failed(Failure { retryable: true, undone: true, ..failure(&Fault::Lost) });
                            }
                            Fate::Doubtful => {
                                let text = "the connection was lost during COMMIT: whether it took effect is not known";
                                return End::Unknown(format!("{text}: {DOUBTFUL}"));
                            }
                            Fate::InProgress | Fate::Forgotten(_) => {}
                        }
                    }
                    Err(End::ClaimLost) => return End::ClaimLost,
                    Err(_) => {}
                }
                sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(5));
            }
        };
        timeout(RESOLVE_MAX, asking).await.unwrap_or_else(|_| {
            End::Unknown("the connection was lost during COMMIT: whether it took effect could not be asked".into())
        })
    }
}

/// The link's transaction, if it has written anything: its id and, behind an `@`, the life of the server that gave it.
///
/// Ids are counted in memory. After a crash the server goes on behind the last id that it finds in its log, so one of which
/// nothing had got there is given again.
async fn transaction(link: &Link) -> Result<Option<String>, Fault> {
    let sql = format!("SELECT pg_catalog.pg_current_xact_id_if_assigned(), {}", life(link));
    Ok(match &link.row(&sql).await?[..] {
        [Some(id), life] => Some(format!("{id}@{}", life.as_deref().unwrap_or_default())),
        _ => None,
    })
}

/// An expression that is another after each crash of the server.
fn life(link: &Link) -> &'static str {
    // The statistics are kept over an orderly restart and begin anew after a crash, also after one that the postmaster
    // survives. Before 15 they are too slow to be asked for with every statement; there each restart counts as a crash.
    match link.version {
        Some(15..) => "pg_catalog.date_part('epoch', pg_catalog.pg_stat_get_bgwriter_stat_reset_time())",
        _ => "pg_catalog.date_part('epoch', pg_catalog.pg_postmaster_start_time())",
    }
}

/// Asks how a transaction ended.
async fn fate(link: &Link, transaction: &str) -> Fate {
    let (id, life_then) = transaction.split_once('@').unwrap_or((transaction, ""));
    // It comes from the job's record, and goes into SQL.
    let Ok(id) = id.parse::<u64>() else { return Fate::Forgotten("its id can't be read".into()) };
    let life_now = match link.row(&format!("SELECT {}", life(link))).await {
        Ok(row) => row.into_iter().next().flatten().unwrap_or_default(),
        Err(fault) => return Fate::Forgotten(fault.message()),
    };
    let crashed = !life_then.is_empty() && life_then != life_now;
    let sql = format!("SELECT pg_catalog.pg_xact_status('{id}'::pg_catalog.xid8)");
    let give_up = Instant::now() + FATE_MAX;
    loop {
        let status = match link.row(&sql).await {
            Ok(row) => row.into_iter().next().flatten(),
            // An id of the future: nothing of it survived the crash, and nobody has got it yet.
            Err(fault) if crashed && fault.code() == Some(&SqlState::INVALID_PARAMETER_VALUE) => return Fate::Aborted,
            Err(fault) => return Fate::Forgotten(fault.message()),
        };
        match status.as_deref() {
            Some("committed") if crashed => return Fate::Doubtful,
            Some("committed") => return Fate::Committed,
            // Whoever's it is: what has committed stays committed.
            Some("aborted") => return Fate::Aborted,
            Some("in progress") if crashed => return Fate::Aborted,
            Some("in progress") if Instant::now() < give_up => sleep(EXCLUSION_POLL).await,
            Some("in progress") => return Fate::InProgress,
            _ => return Fate::Forgotten("the database no longer remembers it".into()),
        }
    }
}

fn failure(fault: &Fault) -> Failure {
    let sqlstate = fault.code().map(|code| code.code().to_owned());
    Failure { message: fault.message(), sqlstate, ..Failure::default() }
}

/// The end when SQL of ours fails before the user's text was sent.
fn unstarted(fault: Fault) -> End {
    let canceled = fault.code() == Some(&SqlState::QUERY_CANCELED);
    if canceled {
        return canceled_elsewhere(&fault);
    }
    End::Failed(Failure { retryable: fault.is_fatal(), undone: true, ..failure(&fault) })
}

/// SQLSTATE 57014 without our doing: a timeout of the server, or somebody's `pg_cancel_backend`.
fn canceled_elsewhere(fault: &Fault) -> End {
    let message = fault.message();
    if message.contains("user request") { End::CancelledElsewhere } else { End::Failed(failure(fault)) }
}

/// Whether others' transactions are to blame, so that the same one may go well when it is run again.
fn loses_a_race(fault: &Fault) -> bool {
    let again = [SqlState::T_R_SERIALIZATION_FAILURE, SqlState::T_R_DEADLOCK_DETECTED];
    fault.code().is_some_and(|code| again.contains(code))
}

fn claim_lost(_: ClaimLost) -> End {
    End::ClaimLost
}
