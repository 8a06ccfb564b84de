//! A private PostgreSQL cluster whose log tells which statements were executed.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{self, Signal};
use nix::unistd::{Pid, User, geteuid};
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use crate::ports::Port;
use crate::process::spawn_child;
use crate::scratch::{Scratch, short_temp_dir};
use crate::wait::{eventually, eventually_blocking};

const STOP_LIMIT: Duration = Duration::from_secs(10);

/// Rows of a query: every value as text, NULL as `None`.
pub type Rows = Vec<Vec<Option<String>>>;

/// A PostgreSQL server of its own, on a TCP port of 127.0.0.1. Stopped on drop.
///
/// The superuser `postgres` needs no password; every other role needs its own. Nothing survives a crash of the machine
/// (`fsync` is off); everything survives [`Postgres::restart`]. As root, the server runs as the system's user `postgres` or
/// `nobody`, since it refuses root.
#[derive(Debug)]
pub struct Postgres {
    child: Mutex<Option<Child>>,
    programs: PathBuf,
    account: Option<Account>,
    port: Port,
    // Last: the folder goes after the server.
    scratch: Scratch,
}

/// Whom to become to run the server.
#[derive(Clone, Copy, Debug)]
struct Account {
    uid: u32,
    gid: u32,
}

impl Postgres {
    /// A new empty cluster. The first one on a machine takes a second or two, the others are copies of it.
    pub fn start() -> Self {
        Self::with_config(&[])
    }

    /// The same with settings of postgresql.conf, values as written there (strings in quotes).
    pub fn with_config(config: &[(&str, &str)]) -> Self {
        let programs = find_programs();
        let account = account();
        let scratch = Scratch::in_memory("postgres");
        let data = scratch.path().join("data");
        give(scratch.path(), account);
        copy(&template(&programs, account), &data);
        let postgres = Self { child: Mutex::new(None), programs, account, port: Port::lease(), scratch };
        postgres.configure(&data, config);
        postgres.run(&mut postgres.child());
        postgres
    }

    /// Host and port for clients.
    pub fn host_port(&self) -> (String, u16) {
        ("127.0.0.1".into(), self.port.number())
    }

    /// Host and port as an address, for a [`crate::Proxy`].
    pub fn addr(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.port.number()).into()
    }

    /// The server's log as CSV, with every statement that it executed.
    pub fn log(&self) -> String {
        let bytes = fs::read(self.scratch.path().join("log/server.csv")).expect("the server writes its log");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Makes a database in whose schema `public` every role may make tables.
    pub async fn create_database(&self, name: &str) {
        self.query("postgres", &format!("CREATE DATABASE {}", identifier(name))).await;
        self.query(name, "GRANT ALL ON SCHEMA public TO PUBLIC").await;
    }

    /// Makes a role that logs in with a password.
    pub async fn create_user(&self, name: &str, password: &str) {
        let password = password.replace('\'', "''");
        self.query("postgres", &format!("CREATE ROLE {} LOGIN PASSWORD '{password}'", identifier(name))).await;
    }

    /// Runs SQL, one statement or more, as superuser on a connection of its own, and gives all rows.
    ///
    /// # Panics
    ///
    /// On any error, with the statement and the server's message.
    pub async fn query(&self, database: &str, sql: &str) -> Rows {
        match self.try_query(database, sql).await {
            Ok(rows) => rows,
            Err(error) => panic!("{sql}: {}", error.as_db_error().map_or(error.to_string(), |e| e.to_string())),
        }
    }

    /// [`Postgres::query`] for statements that may fail.
    ///
    /// # Errors
    ///
    /// The server's, or those of the connection.
    pub async fn try_query(&self, database: &str, sql: &str) -> Result<Rows, tokio_postgres::Error> {
        let messages = self.client(database).await?.simple_query(sql).await?;
        let rows = messages.iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some((0..row.len()).map(|i| row.get(i).map(String::from)).collect()),
            _ => None,
        });
        Ok(rows.collect())
    }

    /// A superuser's connection, `application_name` testkit.
    ///
    /// # Errors
    ///
    /// Those of the connection.
    pub async fn client(&self, database: &str) -> Result<Client, tokio_postgres::Error> {
        let (client, connection) = tokio_postgres::Config::new()
            .host_path(self.scratch.path())
            .port(self.port.number())
            .user("postgres")
            .dbname(database)
            .application_name("testkit")
            .connect(NoTls)
            .await?;
        // Its errors come back from the client's calls too.
        tokio::spawn(connection);
        Ok(client)
    }

    /// The statements that the server was given with the comment `/* <job_id> */ ` before them, in the order in which it
    /// began them, without the comment. All that began before this call are in it.
    pub async fn executed(&self, job_id: &str) -> Vec<String> {
        statements(&self.settled_log().await, &format!("/* {job_id} */ "))
    }

    /// All statements that contain `text`, in the order in which the server began them.
    pub async fn statements_with(&self, text: &str) -> Vec<String> {
        let mut all = statements(&self.settled_log().await, "");
        all.retain(|statement| statement.contains(text));
        all
    }

    /// Ends the connections whose `application_name` begins with `prefix`; says how many there were.
    pub async fn terminate_backends(&self, prefix: &str) -> usize {
        let sql = format!(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
             WHERE starts_with(application_name, '{}') AND pid <> pg_backend_pid()",
            prefix.replace('\'', "''")
        );
        self.query("postgres", &sql).await.len()
    }

    /// Stops the server at once, as by a crash of its process; clients see their connections break.
    pub fn kill(&self) {
        stop(&mut self.child());
    }

    /// Stops the server as [`Postgres::kill`] does, if it runs, and starts it on the same port with the same data.
    pub fn restart(&self) {
        let mut child = self.child();
        stop(&mut child);
        self.run(&mut child);
    }

    fn child(&self) -> MutexGuard<'_, Option<Child>> {
        self.child.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    fn configure(&self, data: &Path, config: &[(&str, &str)]) {
        let dir = self.scratch.path().display();
        let mut conf = format!(
            "listen_addresses = '127.0.0.1'
             port = {}
             unix_socket_directories = '{dir}'
             max_connections = 100
             shared_buffers = 16MB
             fsync = off
             full_page_writes = off
             autovacuum = off
             log_statement = all
             log_destination = csvlog
             logging_collector = on
             log_directory = '{dir}/log'
             log_filename = 'server.log'
             log_rotation_age = 0
             log_rotation_size = 0
            ",
            self.port.number()
        );
        for (key, value) in config {
            conf += &format!("{key} = {value}\n");
        }
        let auth =
            "local all all trust\nhost all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n";
        for (name, text) in [("postgresql.conf", conf.as_str()), ("pg_hba.conf", auth)] {
            let path = data.join(name);
            fs::write(&path, text).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
            give(&path, self.account);
        }
    }

    fn run(&self, child: &mut Option<Child>) {
        let data = self.scratch.path().join("data");
        let pid_file = data.join("postmaster.pid");
        // A killed server leaves it behind, and its text would be taken for the new server's.
        let _ = fs::remove_file(&pid_file);
        let messages = self.scratch.path().join("start.log");
        let out = File::create(&messages).expect("a file in the fixture's folder");
        let mut command = run_as(Command::new(self.programs.join("postgres")), self.account);
        command.arg("-D").arg(&data).current_dir("/").stdin(Stdio::null());
        command.stdout(out.try_clone().expect("a second handle")).stderr(out);
        // SIGQUIT: the server ends all its processes and its shared memory, which it can't on SIGKILL.
        let mut started = spawn_child(command, Signal::SIGQUIT).expect("postgres starts");
        let said = || {
            let log = fs::read(self.scratch.path().join("log/server.csv")).unwrap_or_default();
            fs::read_to_string(&messages).unwrap_or_default() + &String::from_utf8_lossy(&log)
        };
        // Line 8 is the state; this is what `pg_ctl --wait` looks at.
        let ready =
            || fs::read_to_string(&pid_file).is_ok_and(|text| text.lines().nth(7).is_some_and(|s| s.trim() == "ready"));
        let ended = eventually_blocking("postgres to be ready", || {
            if ready() {
                return Ok(None);
            }
            started.try_wait().expect("a child may be waited for").map(Some).ok_or_else(said)
        });
        if let Some(status) = ended {
            panic!("postgres ended with {status}; its log:\n{}", said());
        }
        *child = Some(started);
    }

    /// The log with everything that was executed before this call. A separate process writes it, in order: once the
    /// statement sent here is in it, the earlier ones are.
    async fn settled_log(&self) -> Vec<Vec<String>> {
        static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let marker = format!("SELECT 'log marker {}'", NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
        self.query("postgres", &marker).await;
        let logged = format!("statement: {marker}");
        eventually("the server's log to be written", async || {
            let records = csv(&self.log());
            let end = records.iter().rposition(|record| record.get(MESSAGE) == Some(&logged))?;
            Some(records[..end].to_vec())
        })
        .await
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        stop(&mut self.child());
    }
}

fn stop(child: &mut Option<Child>) {
    let Some(mut child) = child.take() else { return };
    let pid = Pid::from_raw(child.id() as i32);
    let _ = signal::kill(pid, Signal::SIGQUIT);
    let start = Instant::now();
    while matches!(child.try_wait(), Ok(None)) {
        if start.elapsed() > STOP_LIMIT {
            let _ = child.kill();
        }
        thread::sleep(Duration::from_millis(2));
    }
}

fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// The newest PostgreSQL: Debian's folders first, which are not on the PATH, then the PATH.
fn find_programs() -> PathBuf {
    let has_all = |dir: &Path| ["postgres", "initdb"].iter().all(|program| dir.join(program).is_file());
    let debian = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten().filter_map(|entry| {
        let version: u32 = entry.file_name().to_str()?.parse().ok()?;
        Some((version, entry.path().join("bin")))
    });
    let newest = debian.filter(|(_, dir)| has_all(dir)).max().map(|(_, dir)| dir);
    let path = std::env::var_os("PATH").unwrap_or_default();
    newest
        .or_else(|| std::env::split_paths(&path).find(|dir| has_all(dir)))
        .expect("postgres and initdb are neither in /usr/lib/postgresql/*/bin nor on the PATH: run scripts/setup")
}

fn account() -> Option<Account> {
    if !geteuid().is_root() {
        return None;
    }
    ["postgres", "nobody"].iter().find_map(|name| {
        let user = User::from_name(name).ok()??;
        Some(Account { uid: user.uid.as_raw(), gid: user.gid.as_raw() })
    })
}

fn run_as(mut command: Command, account: Option<Account>) -> Command {
    if let Some(Account { uid, gid }) = account {
        command.uid(uid).gid(gid);
    }
    // A user's settings for clients must not reach the server's tools.
    for (key, _) in std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("PG")) {
        command.env_remove(key);
    }
    command
}

fn give(path: &Path, account: Option<Account>) {
    if let Some(Account { uid, gid }) = account {
        chown(path, Some(uid), Some(gid)).expect("root may give files away");
    }
}

/// A folder as `initdb` made it, kept between test runs: that takes a second, a copy a tenth of it.
fn template(programs: &Path, account: Option<Account>) -> PathBuf {
    let version = output(Command::new(programs.join("postgres")).arg("--version"));
    let version: String = version.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '.').collect();
    // In the temporary folder and not in `target`, which the server's account may not be able to enter.
    let dir = short_temp_dir().join(format!("drayman-postgres-{}", geteuid()));
    match DirBuilder::new().mode(0o711).create(&dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => panic!("cannot make {}: {error}", dir.display()),
        _ => {}
    }
    // Others may write in the temporary folder too.
    let owner = fs::symlink_metadata(&dir).expect("it was just made");
    let ours = owner.is_dir() && owner.uid() == geteuid().as_raw() && owner.permissions().mode() & 0o022 == 0;
    assert!(ours, "{} is not ours: remove it", dir.display());

    // The last part changes when `initdb` is called differently.
    let ready = dir.join(format!("{version}-{}-1", account.map_or(geteuid().as_raw(), |a| a.uid)));
    let lock = File::create(dir.join("lock")).expect("a file in our own folder");
    lock.lock().expect("a lock can be waited for");
    if ready.exists() {
        return ready;
    }
    let fresh = Scratch::in_memory("initdb");
    give(fresh.path(), account);
    let made = fresh.path().join("data");
    let mut initdb = run_as(Command::new(programs.join("initdb")), account);
    initdb.arg("-D").arg(&made).current_dir("/");
    initdb.args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync", "--wal-segsize=1"]);
    output(&mut initdb);
    // Under its final name only when it is whole.
    let copied = dir.join("copying");
    let _ = fs::remove_dir_all(&copied);
    copy(&made, &copied);
    fs::rename(&copied, &ready).expect("a rename within a folder");
    ready
}

fn copy(from: &Path, to: &Path) {
    output(Command::new("cp").args(["-a", "--reflink=auto"]).arg(from).arg(to));
}

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?} failed:\n{out}{err}");
    out.into_owned()
}

// Columns of a CSV log record; new ones are added at its end.
const SESSION: usize = 5;
const SEVERITY: usize = 11;
const MESSAGE: usize = 13;
const QUERY: usize = 19;

/// The statements in the log that begin with `start`, without it.
fn statements(log: &[Vec<String>], start: &str) -> Vec<String> {
    let mut found = Vec::new();
    // A statement that can't be parsed is logged with its error only; any other before it begins.
    let mut last_begun = std::collections::HashMap::new();
    for record in log.iter().filter(|record| record.len() > QUERY) {
        let statement = if record[SEVERITY] == "LOG" {
            let Some(statement) = logged_statement(&record[MESSAGE]) else { continue };
            last_begun.insert(record[SESSION].as_str(), statement);
            statement
        } else {
            let query = record[QUERY].as_str();
            let begun = last_begun.get(record[SESSION].as_str()).is_some_and(|begun| *begun == query);
            if begun || record[SEVERITY] != "ERROR" || query.is_empty() {
                continue;
            }
            query
        };
        found.extend(statement.strip_prefix(start).map(String::from));
    }
    found
}

fn logged_statement(message: &str) -> Option<&str> {
    if let Some(simple) = message.strip_prefix("statement: ") {
        return Some(simple);
    }
    // "execute <unnamed>: …", "execute s1: …": the extended protocol.
    message.strip_prefix("execute ")?.split_once(": ").map(|(_, statement)| statement)
}

/// RFC 4180 as PostgreSQL writes it; a last record that is not whole yet is left out.
fn csv(text: &str) -> Vec<Vec<String>> {
    let (mut records, mut record, mut field) = (Vec::new(), Vec::new(), String::new());
    let mut quoted = false;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => field.extend(chars.next()),
            '"' => quoted = !quoted,
            ',' if !quoted => record.push(std::mem::take(&mut field)),
            '\n' if !quoted => {
                record.push(std::mem::take(&mut field));
                records.push(std::mem::take(&mut record));
            }
            c => field.push(c),
        }
    }
    records
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    async fn login(postgres: &Postgres, user: &str, password: &str) -> Result<Client, tokio_postgres::Error> {
        let (host, port) = postgres.host_port();
        let (client, connection) = tokio_postgres::Config::new()
            .host(host)
            .port(port)
            .user(user)
            .password(password)
            .dbname("shop")
            .application_name("drayman:1")
            .connect(NoTls)
            .await?;
        tokio::spawn(connection);
        Ok(client)
    }

    #[tokio::test]
    async fn users_need_their_password_and_may_make_tables() {
        let postgres = Postgres::start();
        postgres.create_database("shop").await;
        postgres.create_user("ann", "it's \"odd\" \\ ü%").await;
        let client = login(&postgres, "ann", "it's \"odd\" \\ ü%").await.unwrap();
        client.batch_execute("CREATE TABLE t (a int); INSERT INTO t VALUES (1), (NULL)").await.unwrap();
        let rows = postgres.query("shop", "SELECT a, 'x' FROM t").await;
        assert_eq!(rows, [[Some("1".into()), Some("x".into())], [None, Some("x".into())]]);
        assert!(login(&postgres, "ann", "wrong").await.is_err());
        assert!(login(&postgres, "postgres", "").await.is_ok());
        assert!(postgres.try_query("shop", "SELECT * FROM missing").await.is_err());
        assert_eq!(postgres.terminate_backends("drayman:").await, 1);
        assert!(client.batch_execute("SELECT 1").await.is_err());
    }

    #[tokio::test]
    async fn executed_statements_are_told_exactly_and_in_order() {
        let postgres = Postgres::start();
        let client = postgres.client("postgres").await.unwrap();
        let odd = "SELECT 'a \"quoted\", text',\n\t1;\n-- two\nSELECT 2";
        for statement in [odd, "SELECT 1/0", "SELEKT", "SELEKT", "SELECT * FROM missing", "COMMIT"] {
            let _ = client.simple_query(&format!("/* job-1 */ {statement}")).await;
            let _ = client.simple_query(&format!("/* job-2 */ {statement}")).await;
        }
        client.query("/* job-1 */ SELECT $1::text", &[&"extended"]).await.unwrap();
        client.simple_query("SELECT '/* job-1 */ not at the start'").await.unwrap();
        let expected = [odd, "SELECT 1/0", "SELEKT", "SELEKT", "SELECT * FROM missing", "COMMIT", "SELECT $1::text"];
        assert_eq!(postgres.executed("job-1").await, expected);
        assert_eq!(postgres.executed("job").await, [""; 0]);
        assert_eq!(postgres.statements_with("not at the start").await.len(), 1);
    }

    #[tokio::test]
    async fn a_statement_is_told_as_soon_as_it_began() {
        let postgres = Postgres::start();
        let client = Arc::new(postgres.client("postgres").await.unwrap());
        let waiting = tokio::spawn({
            let client = Arc::clone(&client);
            async move { client.simple_query("/* job-3 */ SELECT pg_sleep(60)").await.map(|_| ()) }
        });
        eventually("the statement to begin", async || {
            (postgres.executed("job-3").await == ["SELECT pg_sleep(60)"]).then_some(())
        })
        .await;
        postgres.terminate_backends("testkit").await;
        assert!(waiting.await.unwrap().is_err());
    }

    #[tokio::test]
    async fn a_restart_keeps_port_data_and_log() {
        let postgres = Postgres::with_config(&[("max_connections", "33")]);
        let port = postgres.host_port();
        postgres.query("postgres", "/* job-4 */ CREATE TABLE kept AS SELECT 1 AS a").await;
        postgres.kill();
        assert!(postgres.try_query("postgres", "SELECT 1").await.is_err());
        postgres.restart();
        assert_eq!(postgres.host_port(), port);
        assert_eq!(postgres.query("postgres", "SELECT a FROM kept").await, [[Some("1".into())]]);
        assert_eq!(postgres.query("postgres", "SHOW max_connections").await, [[Some("33".into())]]);
        assert_eq!(postgres.executed("job-4").await.len(), 1);
    }

    #[test]
    fn csv_reads_quotes_commas_and_line_ends() {
        let text = "a,\"b \"\"c\"\", d\n\",,e\n\"\",f\nnot whole";
        assert_eq!(csv(text), [vec!["a", "b \"c\", d\n", "", "e"], vec!["", "f"]]);
    }
}
