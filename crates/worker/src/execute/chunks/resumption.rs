//! Whatever happens to a source or a target between two attempts: the second one ends with what a whole run would have
//! written, or fails and says that its checkpoint does not agree. Never is it done with anything else.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use async_trait::async_trait;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestCaseResult, TestRunner};
use queue_core::ids::{App, Fence, JobId, Op, User};
use queue_core::model::task::{Payload, Progress};
use serde::{Deserialize, Serialize};
use testkit::Scratch;
use tokio_util::sync::CancellationToken;

use super::files::{csv, csv_to, json_lines, json_lines_to};
use super::sql::{Database, SqlReader, sql_query, sql_to};
use super::sqlite::sqlite;
use super::{Checkpoint, Chunks, Counts, Reader, Writer, call, items, list_to};
use crate::execute::function::Context;
use crate::execute::sql::databases::{DatabaseSettings, SqliteSettings};
use crate::execute::task::{Desk, Problem, Task};

const REFUSED: &str = "it can't go on from its checkpoint: ";

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Order {
    id: i64,
    name: String,
}

/// Keeps the checkpoint of a task whose attempts run here one after the other.
#[derive(Default)]
struct Kept(Mutex<Option<Payload>>);

#[async_trait]
impl Desk for Kept {
    fn progress(&self, _: Progress) {}

    fn log(&self, _: &str) {}

    async fn save(&self, checkpoint: Payload) -> Result<(), Problem> {
        *self.0.lock().unwrap() = Some(checkpoint);
        Ok(())
    }
}

/// A task.
#[derive(Default)]
struct Job(Arc<Kept>);

impl Job {
    fn context(&self) -> Context {
        let task = Task {
            job: JobId::new("t1").unwrap(),
            user: User::new("ann").unwrap(),
            app: App::new("etl").unwrap(),
            op: Op::new("load").unwrap(),
            input: Payload::json(&()).unwrap(),
            context: None,
            checkpoint: self.0.0.lock().unwrap().clone(),
            fence: Fence(1),
            attempt: 1,
            max_attempts: 1,
            timeout: std::time::Duration::from_secs(3600),
            tags: Vec::new(),
            row: None,
            traceparent: None,
        };
        Context::new(task, self.0.clone(), CancellationToken::new(), Instant::now())
    }

    /// An attempt. Its processor fails at the item of this number, from 0 on.
    fn attempt<R, W>(&self, size: usize, fails_at: Option<usize>, reader: R, writer: W) -> Result<Counts, Problem>
    where
        R: Reader,
        R::Item: Clone,
        W: Writer<Item = R::Item>,
    {
        let mut at = 0;
        let process = |item: &R::Item| {
            at += 1;
            match Some(at - 1) == fails_at {
                true => Err(Problem::fail("no such customer")),
                false => Ok(Some(item.clone())),
            }
        };
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let _entered = runtime.enter();
        Chunks::of(size.try_into().unwrap()).run(&self.context(), reader, process, writer)
    }

    fn saved(&self) -> Checkpoint {
        self.context().checkpoint().unwrap().unwrap()
    }
}

fn orders(count: usize) -> Vec<Order> {
    (1..=count as i64).map(|id| Order { id, name: format!("o, {id}\"") }).collect()
}

fn csv_of(orders: &[Order]) -> Vec<u8> {
    let mut writer = ::csv::Writer::from_writer(Vec::new());
    orders.iter().for_each(|order| writer.serialize(order).unwrap());
    writer.into_inner().unwrap()
}

fn lines_of(orders: &[Order]) -> Vec<u8> {
    orders.iter().flat_map(|order| [serde_json::to_vec(order).unwrap(), b"\n".to_vec()].concat()).collect()
}

/// What happens to bytes that lie in a file.
#[derive(Debug, Clone)]
enum Edit {
    Nothing,
    Append(Vec<u8>),
    Replace(Index, Vec<u8>),
    Insert(Index, Vec<u8>),
    Remove(Index, usize),
    Cut(Index),
}

fn edit(alphabet: &'static str) -> impl Strategy<Value = Edit> {
    let text = move |most| proptest::collection::vec(proptest::sample::select(alphabet.as_bytes()), 1..most);
    prop_oneof![
        1 => Just(Edit::Nothing),
        2 => text(12).prop_map(Edit::Append),
        3 => (any::<Index>(), text(3)).prop_map(|(at, text)| Edit::Replace(at, text)),
        3 => (any::<Index>(), text(6)).prop_map(|(at, text)| Edit::Insert(at, text)),
        3 => (any::<Index>(), 1..12_usize).prop_map(|(at, count)| Edit::Remove(at, count)),
        2 => any::<Index>().prop_map(Edit::Cut),
    ]
}

impl Edit {
    fn of(&self, bytes: &[u8]) -> Vec<u8> {
        let mut edited = bytes.to_vec();
        let place = |at: &Index| at.index(bytes.len() + 1);
        match self {
            Edit::Nothing => {}
            Edit::Append(text) => edited.extend_from_slice(text),
            Edit::Replace(at, text) => {
                let at = place(at);
                edited.splice(at..(at + text.len()).min(bytes.len()), text.iter().copied()).for_each(drop);
            }
            Edit::Insert(at, text) => edited.splice(place(at)..place(at), text.iter().copied()).for_each(drop),
            Edit::Remove(at, count) => drop(edited.drain(place(at)..(place(at) + count).min(bytes.len()))),
            Edit::Cut(at) => edited.truncate(place(at)),
        }
        edited
    }
}

/// The second attempt is as a whole run over what it found, or says that it can't go on. What a whole run refuses, it
/// does too.
fn assert_whole_or_refused<T: PartialEq + std::fmt::Debug>(
    second: Result<T, Problem>,
    whole: Result<T, Problem>,
    may_refuse: bool,
) -> TestCaseResult {
    match (second, whole) {
        (Ok(second), Ok(whole)) => prop_assert_eq!(second, whole),
        (Ok(second), Err(problem)) => prop_assert!(false, "{second:?}, but a whole run fails: {}", problem.reason),
        (Err(problem), Ok(_)) => {
            prop_assert!(may_refuse && problem.reason.starts_with(REFUSED), "{}", problem.reason);
        }
        (Err(_), Err(_)) => {}
    }
    Ok(())
}

/// Interrupts a run over a file at each place, edits the file, and goes on.
fn files<R: Reader<Item = Order>>(bytes: fn(&[Order]) -> Vec<u8>, alphabet: &'static str, reader: fn(PathBuf) -> R) {
    let scratch = Scratch::new("resumption");
    let (source, target) = (scratch.path().join("in"), scratch.path().join("out"));
    let strategy = (2..12_usize, any::<Index>(), 1..4_usize, edit(alphabet));
    let mut runner = TestRunner::new(Config { cases: 250, failure_persistence: None, ..Config::default() });
    let case = |(count, cut, size, edit): (usize, Index, usize, Edit)| {
        let before = bytes(&orders(count));
        std::fs::write(&source, &before).unwrap();
        let job = Job::default();
        job.attempt(size, Some(cut.index(count)), reader(source.clone()), json_lines_to(&target)).unwrap_err();
        let read = job.saved().reader.map_or(0, |position| position.length as usize);
        let after = edit.of(&before);
        std::fs::write(&source, &after).unwrap();
        let result = |job: &Job| {
            job.attempt(size, None, reader(source.clone()), json_lines_to(&target))?;
            Ok(std::fs::read_to_string(&target).unwrap())
        };
        let second = result(&job);
        // Whoever has touched nothing that was read, is not refused.
        let may_refuse = after.get(..read) != Some(&before[..read]);
        assert_whole_or_refused(second, result(&Job::default()), may_refuse)
    };
    runner.run(&strategy, case).unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn a_csv_file_that_was_edited_is_read_as_a_whole_run_would_or_refused() {
    files(csv_of, "1,\"\nx\r", csv);
}

#[test]
fn lines_of_json_that_were_edited_are_read_as_a_whole_run_would_or_refused() {
    files(lines_of, "1{}\":\nx", json_lines);
}

#[test]
fn a_list_that_was_edited_is_read_as_a_whole_run_would_or_refused() {
    let strategy = (2..12_usize, any::<Index>(), 1..4_usize, edit("\u{1}\u{2}"));
    let mut runner = TestRunner::new(Config { cases: 250, failure_persistence: None, ..Config::default() });
    let case = |(count, cut, size, edit): (usize, Index, usize, Edit)| {
        let before: Vec<u8> = (1..=count as u8).collect();
        let after = edit.of(&before);
        let run = |job: &Job, list: &[u8], fails_at| {
            job.attempt(size, fails_at, items(|| list.iter().copied()), list_to())?;
            Ok(job.saved().writer)
        };
        let job = Job::default();
        run(&job, &before, Some(cut.index(count))).unwrap_err();
        let read = job.saved().reader.map_or(0, |position| position.length as usize);
        let may_refuse = after.get(..read) != Some(&before[..read]);
        assert_whole_or_refused(run(&job, &after, None), run(&Job::default(), &after, None), may_refuse)
    };
    runner.run(&strategy, case).unwrap_or_else(|error| panic!("{error}"));
}

fn database(path: &Path) -> Database {
    let settings = SqliteSettings { path: path.display().to_string(), create: true };
    Database::new(DatabaseSettings::Sqlite(settings), &User::new("ann").unwrap()).unwrap()
}

fn query(path: &Path) -> SqlReader<Order> {
    sql_query(&database(path), "SELECT id, name FROM orders", &["id".to_owned()], CancellationToken::new())
}

fn table(path: &Path, orders: &[Order]) -> rusqlite::Connection {
    let connection = rusqlite::Connection::open(path).unwrap();
    let table = "PRAGMA journal_mode = MEMORY; PRAGMA synchronous = OFF; DROP TABLE IF EXISTS orders; \
        DROP TABLE IF EXISTS drayman_checkpoints; CREATE TABLE orders (id INTEGER PRIMARY KEY, name TEXT)";
    connection.execute_batch(table).unwrap();
    for Order { id, name } in orders {
        connection.execute("INSERT INTO orders VALUES (?1, ?2)", rusqlite::params![id, name]).unwrap();
    }
    connection
}

#[test]
fn rows_of_a_query_that_were_edited_are_read_as_a_whole_run_would_or_refused() {
    let scratch = Scratch::new("resumption");
    let path = scratch.path().join("in.db");
    let strategy = (2..12_usize, any::<Index>(), 1..4_usize, 0..5_usize, any::<Index>());
    let mut runner = TestRunner::new(Config { cases: 120, failure_persistence: None, ..Config::default() });
    let case = |(count, cut, size, edit, at): (usize, Index, usize, usize, Index)| {
        // Every second number is free.
        let all: Vec<Order> = orders(count).into_iter().map(|order| Order { id: order.id * 2, ..order }).collect();
        let connection = table(&path, &all);
        let run = |job: &Job, fails_at| {
            job.attempt(size, fails_at, query(&path), list_to())?;
            Ok(job.saved().writer)
        };
        let job = Job::default();
        run(&job, Some(cut.index(count))).unwrap_err();
        let at = 2 * (at.index(count) as i64 + 1);
        let sql = match edit {
            0 => "SELECT ?1".to_owned(),
            1 => "DELETE FROM orders WHERE id = ?1".to_owned(),
            2 => "UPDATE orders SET name = 'other' WHERE id = ?1".to_owned(),
            3 => "INSERT INTO orders VALUES (?1 + 1, 'new')".to_owned(),
            _ => "UPDATE orders SET id = id - 1 WHERE id = ?1".to_owned(),
        };
        let _ = connection.prepare(&sql).unwrap().query([at]).unwrap().next();
        let read = job.saved().reader.map_or(0, |position| position.length as i64) * 2;
        let may_refuse = edit > 0 && at <= read;
        assert_whole_or_refused(run(&job, None), run(&Job::default(), None), may_refuse)
    };
    runner.run(&strategy, case).unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn a_query_whose_rows_go_once_they_are_read_goes_on_behind_its_key_if_nothing_is_to_be_compared() {
    let scratch = Scratch::new("resumption");
    let path = scratch.path().join("in.db");
    let connection = table(&path, &orders(9));
    let job = Job::default();
    job.attempt(2, Some(5), query(&path), list_to()).unwrap_err();
    connection.execute("DELETE FROM orders WHERE id <= 4", []).unwrap();
    let refused = job.attempt(2, None, query(&path), list_to()).unwrap_err();
    assert!(
        refused.reason.starts_with(&format!("{REFUSED}the first 4 rows of what its reader reads are not what")),
        "{refused:?}"
    );
    let attempt = |fails_at| job.attempt(2, fails_at, query(&path).uncompared(), list_to());
    attempt(Some(3)).unwrap_err();
    connection.execute("DELETE FROM orders WHERE id <= 6", []).unwrap();
    let refused = job.attempt(2, None, query(&path), list_to());
    assert_eq!(refused.unwrap().read_count, 9, "what was not compared once is not compared later");
    let ids: Vec<u64> =
        job.saved().writer.as_array().unwrap().iter().map(|order| order["id"].as_u64().unwrap()).collect();
    assert_eq!(ids, (1..=9).collect::<Vec<u64>>());
}

/// Interrupts a run into a file, edits what was written, and goes on.
fn targets<W: Writer<Item = Order>>(alphabet: &'static str, writer: fn(PathBuf) -> W) {
    let scratch = Scratch::new("resumption");
    let target = scratch.path().join("out");
    let strategy = (2..12_usize, any::<Index>(), 1..4_usize, edit(alphabet));
    let mut runner = TestRunner::new(Config { cases: 120, failure_persistence: None, ..Config::default() });
    let case = |(count, cut, size, edit): (usize, Index, usize, Edit)| {
        let run = |job: &Job, fails_at| {
            job.attempt(size, fails_at, items(|| orders(count).into_iter()), writer(target.clone()))?;
            Ok(std::fs::read_to_string(&target).unwrap())
        };
        let job = Job::default();
        run(&job, Some(cut.index(count))).unwrap_err();
        let before = std::fs::read(&target).unwrap();
        let after = edit.of(&before);
        std::fs::write(&target, &after).unwrap();
        let may_refuse = !after.starts_with(&before);
        assert_whole_or_refused(run(&job, None), run(&Job::default(), None), may_refuse)
    };
    runner.run(&strategy, case).unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn a_file_that_was_edited_while_it_was_written_is_whole_or_refused() {
    targets("1,\"\nx\r", csv_to);
    targets("1{}\":\nx", json_lines_to);
}

#[test]
fn another_reader_or_writer_does_not_go_on_where_one_stood() {
    let scratch = Scratch::new("resumption");
    let path = |name: &str| -> PathBuf { scratch.path().join(name) };
    let shown = |name: &str| path(name).display().to_string();
    let (all, stop) = (orders(6), CancellationToken::new());
    std::fs::write(path("a"), csv_of(&all)).unwrap();
    std::fs::write(path("b"), csv_of(&all)).unwrap();
    std::fs::write(path("lines"), lines_of(&all)).unwrap();
    table(&path("db"), &all);
    table(&path("db2"), &all);
    type AnyReader = Box<dyn Reader<Item = Order>>;
    type AnyWriter = Box<dyn Writer<Item = Order>>;
    let key = |name: &str| vec![name.to_owned()];
    let sql = |db: &str, text: &str, by: &str| -> AnyReader {
        Box::new(sql_query(&database(&path(db)), text, &key(by), stop.clone()))
    };
    const ALL: &str = "SELECT id, name FROM orders";
    const INSERT: &str = "INSERT INTO out VALUES (:id)";
    let insert = |db: &str, text: &str| -> AnyWriter { Box::new(sql_to(&database(&path(db)), text, stop.clone())) };
    let by_hand = |db: &str, text: &str| -> AnyWriter {
        Box::new(sqlite(path(db), text.to_owned(), |statement, order: &Order| statement.execute([order.id]).map(drop)))
    };
    let csv_a = || -> AnyReader { Box::new(csv(path("a"))) };
    let list = || -> AnyWriter { Box::new(list_to()) };
    let refused = |first: (AnyReader, AnyWriter), second: (AnyReader, AnyWriter), wanted: &str| {
        let job = Job::default();
        job.attempt(2, Some(4), first.0, first.1).unwrap_err();
        let saved = job.saved();
        assert_eq!(saved.counts.read_count, 4);
        let problem = job.attempt(2, None, second.0, second.1).expect_err(wanted);
        assert!(problem.reason.starts_with(&format!("{REFUSED}{wanted}. Put back")), "{} / {wanted}", problem.reason);
        assert_eq!((problem.wish, job.saved()), (crate::execute::task::Wish::Fail, saved), "nothing was touched");
    };
    for (first, second, wanted) in [
        (
            csv_a(),
            Box::new(csv(path("b"))) as AnyReader,
            format!("its reader's file was {:?}, and is {:?} now", shown("a"), shown("b")),
        ),
        (csv_a(), Box::new(json_lines(path("lines"))), "its reader was csv, and is json-lines now".into()),
        (csv_a(), Box::new(items(|| orders(6).into_iter())), "its reader was csv, and is items now".into()),
        (csv_a(), sql("db", ALL, "id"), "its reader was csv, and is sql now".into()),
        (
            sql("db", ALL, "id"),
            sql("db", "SELECT id, name FROM orders WHERE id > 0", "id"),
            "its reader's query is another one than before".into(),
        ),
        (sql("db", ALL, "id"), sql("db", ALL, "name"), r#"its reader's key was ["id"], and is ["name"] now"#.into()),
        (
            sql("db", ALL, "id"),
            sql("db2", ALL, "id"),
            format!("its reader's database was {:?}, and is {:?} now", shown("db"), shown("db2")),
        ),
    ] {
        refused((first, list()), (second, list()), &wanted);
    }
    let out = |db: &str| {
        let connection = rusqlite::Connection::open(path(db)).unwrap();
        connection.execute_batch("DROP TABLE IF EXISTS out; CREATE TABLE out (id INTEGER)").unwrap();
    };
    out("db");
    out("db2");
    let other = "INSERT INTO out VALUES (:id + 1)";
    let by = "INSERT INTO out VALUES (?1)";
    let lines = |name: &str| -> AnyWriter { Box::new(json_lines_to(path(name))) };
    for (first, second, wanted) in [
        (
            lines("out"),
            lines("out2"),
            format!("its writer's file was {:?}, and is {:?} now", shown("out"), shown("out2")),
        ),
        (lines("out"), Box::new(csv_to(path("out"))) as AnyWriter, "its writer was json-lines, and is csv now".into()),
        (lines("out"), list(), "its writer was json-lines, and is list now".into()),
        (list(), Box::new(call(|_: &[Order]| Ok(()))), "its writer was list, and is call now".into()),
        (insert("db", INSERT), insert("db", other), "its writer's statement is another one than before".into()),
        (
            insert("db", INSERT),
            insert("db2", INSERT),
            format!("its writer's database was {:?}, and is {:?} now", shown("db"), shown("db2")),
        ),
        (
            by_hand("db", by),
            by_hand("db", "INSERT INTO out VALUES (?1 + 1)"),
            "its writer's statement is another one than before".into(),
        ),
        (
            by_hand("db", by),
            by_hand("db2", by),
            format!("its writer's file was {:?}, and is {:?} now", shown("db"), shown("db2")),
        ),
        (by_hand("db", by), insert("db", INSERT), "its writer was sqlite, and is sql now".into()),
    ] {
        refused((csv_a(), first), (csv_a(), second), &wanted);
    }
    assert!(!path("out2").exists(), "what is not gone on with is not begun");
}

#[test]
fn what_a_database_knows_of_a_run_is_of_the_same_source() {
    let scratch = Scratch::new("resumption");
    let path = |name: &str| scratch.path().join(name);
    std::fs::write(path("a"), csv_of(&orders(6))).unwrap();
    std::fs::write(path("b"), csv_of(&orders(9))).unwrap();
    table(&path("db"), &[]);
    let job = Job::default();
    let attempt = |fails_at, name| {
        let insert = "INSERT INTO orders VALUES (:id, :name)";
        let write = sql_to::<Order>(&database(&path("db")), insert, CancellationToken::new());
        job.attempt(2, fails_at, csv(path(name)), write)
    };
    attempt(Some(4), "a").unwrap_err();
    // As if the worker had ended before it could save its first chunk.
    let begun = Checkpoint::beginning(&job.saved());
    *job.0.0.lock().unwrap() = Some(Payload::json(&begun).unwrap());
    let refused = attempt(None, "b").unwrap_err().reason;
    assert!(refused.starts_with(&format!("{REFUSED}its reader's file was ")), "{refused}");
    assert_eq!(attempt(None, "a").unwrap().write_count, 6);
}

#[test]
fn what_was_not_begun_may_be_mended_in_any_way() {
    let scratch = Scratch::new("resumption");
    let path = |name: &str| scratch.path().join(name);
    std::fs::write(path("a"), csv_of(&orders(3))).unwrap();
    std::fs::write(path("b"), lines_of(&orders(5))).unwrap();
    let job = Job::default();
    job.attempt(4, Some(1), csv::<Order>(path("a")), json_lines_to(path("out"))).unwrap_err();
    let done = job.attempt(4, None, json_lines::<Order>(path("b")), csv_to(path("out2")));
    assert_eq!(done.unwrap().write_count, 5);
}

#[test]
fn a_record_of_other_fields_is_not_added_to_a_file() {
    #[derive(Clone, Serialize)]
    struct Renamed {
        id: i64,
        customer: String,
    }
    let scratch = Scratch::new("resumption");
    let out = scratch.path().join("out.csv");
    let job = Job::default();
    job.attempt(2, Some(3), items(|| orders(6).into_iter()), csv_to(&out)).unwrap_err();
    let written = std::fs::read(&out).unwrap();
    let source = || orders(6).into_iter();
    let renamed = RefCell::new(|order: &Order| Ok(Some(Renamed { id: order.id, customer: order.name.clone() })));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let _entered = runtime.enter();
    let chunks = Chunks::of(2.try_into().unwrap());
    let refused = chunks.run(&job.context(), items(source), |order| (renamed.borrow_mut())(order), csv_to(&out));
    let wanted = format!("{REFUSED}the columns of {:?} are not those of the items. Put", out.display().to_string());
    assert!(refused.unwrap_err().reason.starts_with(&wanted));
    assert_eq!(std::fs::read(&out).unwrap(), written);
}

#[test]
fn a_last_line_that_went_on_is_not_read_in_two_parts() {
    let scratch = Scratch::new("resumption");
    let source = scratch.path().join("in");
    let write = |text: &str| std::fs::write(&source, text).unwrap();
    // The chunk is committed and what follows is not: its worker ended there.
    for (text, more, wanted) in [
        ("id,name\n1,a\n2,b", "c\n3,d\n", Err(())),
        ("id,name\n1,a\n2,b", "\n3,d\n", Ok(3)),
        ("id,name\r1,a\r2,b\r", "\n3,d", Ok(3)),
    ] {
        write(text);
        let job = Job::default();
        let mut is_written = false;
        let write_once = call(|_: &[Order]| {
            is_written = true;
            Ok(())
        });
        assert_eq!(job.attempt(9, None, csv::<Order>(&source), write_once).unwrap().read_count, 2);
        write(&format!("{text}{more}"));
        let second = job.attempt(9, None, csv::<Order>(&source), call(|_: &[Order]| Ok(())));
        let read = second.map(|counts| counts.read_count).map_err(|problem| {
            assert!(
                problem.reason.contains("line 3 of ") && problem.reason.contains(" was the last, and is longer now")
            );
        });
        assert_eq!(read, wanted, "{text:?} {more:?}");
    }
}
