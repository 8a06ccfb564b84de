//! A private Redis server, and a small client to look into it from outside.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;
use std::{fs, thread};

use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

use crate::ports::Port;
use crate::process::spawn_child;
use crate::scratch::Scratch;
use crate::wait::{PATIENCE, eventually_blocking};

/// A real redis-server (or valkey-server) of its own, on a TCP port and a Unix socket. Killed on drop.
///
/// `DRAYMAN_TEST_REDIS_SERVER` names another server program than those on the PATH.
#[derive(Debug)]
pub struct RedisServer {
    child: Mutex<Option<Child>>,
    config: Vec<(String, String)>,
    port: Port,
    socket: PathBuf,
    /// What stands before the server's own environment: a clock that the test sets.
    env: Vec<(&'static str, PathBuf)>,
    // Last: the folder goes after the server.
    scratch: Scratch,
}

impl RedisServer {
    /// A server without persistence and with `maxmemory-policy noeviction`.
    pub fn start() -> Self {
        Self::with_config(&[])
    }

    /// The same with settings of redis.conf, e.g. `("appendonly", "yes")`; a value of several words is split at blanks.
    pub fn with_config(config: &[(&str, &str)]) -> Self {
        Self::with_config_file(None, config)
    }

    /// The same on top of the settings of a whole redis.conf.
    pub fn with_config_file(file: Option<&Path>, config: &[(&str, &str)]) -> Self {
        let scratch = Scratch::new("redis");
        let base = scratch.path().join("redis.conf");
        let text = file.map_or_else(String::new, |file| {
            fs::read_to_string(file).unwrap_or_else(|error| panic!("cannot read {}: {error}", file.display()))
        });
        fs::write(&base, text).expect("a file in a fresh folder");
        let socket = scratch.path().join("redis.sock");
        let config = config.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        let env = Vec::new();
        let server = Self { child: Mutex::new(None), config, port: Port::lease(), socket, env, scratch };
        server.run(&mut server.child(), file.is_none());
        server
    }

    /// [`RedisServer::with_config`], with a wall clock that [`RedisServer::shift_clock`] sets.
    pub fn with_clock(config: &[(&str, &str)]) -> Self {
        let mut server = Self::with_config(config);
        let (source, library) = (server.dir().join("clock.c"), server.dir().join("clock.so"));
        fs::write(&source, include_str!("clock.c")).expect("a file in a folder of ours");
        let built = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(&source).status();
        assert!(built.is_ok_and(|status| status.success()), "cc builds no library: run scripts/setup");
        server.env = vec![("LD_PRELOAD", library), ("DRAYMAN_TEST_CLOCK", server.dir().join("clock"))];
        server.shift_clock(0);
        server.restart();
        server
    }

    /// From now on the server's wall clock is this many seconds ahead of the machine's, or behind it.
    ///
    /// # Panics
    ///
    /// If the server is none of [`RedisServer::with_clock`].
    pub fn shift_clock(&self, seconds: i64) {
        let (_, file) = self.env.last().expect("a server with a clock of its own");
        // In place: the server has the file mapped.
        let mut file = fs::File::options().create(true).truncate(false).write(true).open(file).expect("a file of ours");
        file.write_all(&seconds.to_ne_bytes()).expect("room for eight bytes");
    }

    /// SIGKILL, as [`RedisServer::kill`], then [`RedisServer::restart`].
    pub fn crash(&self) {
        self.kill();
        self.restart();
    }

    /// How often functions were called since it was started, or since its statistics were reset.
    #[track_caller]
    pub fn function_calls(&self) -> u64 {
        let stats = self.raw(&["INFO", "commandstats"]).text();
        let counts = stats.lines().filter_map(|line| {
            let rest = line.strip_prefix("cmdstat_fcall").and_then(|rest| rest.split_once(":calls="))?.1;
            rest.split(',').next()?.parse::<u64>().ok()
        });
        counts.sum()
    }

    /// From here on notes how long each function holds it up.
    #[track_caller]
    pub fn watch_calls(&self) {
        self.raw(&["CONFIG", "SET", "slowlog-max-len", "100000"]);
        self.raw(&["CONFIG", "SET", "slowlog-log-slower-than", "1000"]);
        self.raw(&["SLOWLOG", "RESET"]);
    }

    /// The function that did for longest since, and how long; none that took a millisecond at most.
    #[track_caller]
    pub fn longest_call(&self) -> Option<(Duration, String)> {
        let Value::Array(calls) = self.raw(&["SLOWLOG", "GET", "-1"]) else { return None };
        let told = calls.iter().filter_map(|call| {
            let Value::Array(call) = call else { return None };
            let words = call[3].texts();
            let took = Duration::from_micros(u64::try_from(call[2].int()).ok()?);
            words[0].eq_ignore_ascii_case("FCALL").then(|| (took, words[1].clone()))
        });
        told.max()
    }

    /// `redis://127.0.0.1:<port>/0`.
    pub fn url(&self) -> String {
        self.url_db(0)
    }

    /// The URL of one of its databases.
    pub fn url_db(&self, db: u8) -> String {
        format!("redis://127.0.0.1:{}/{db}", self.port.number())
    }

    /// Its TCP address.
    pub fn addr(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.port.number()).into()
    }

    /// The path of its Unix socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The folder of its files.
    pub fn dir(&self) -> &Path {
        self.scratch.path()
    }

    /// Stops the server if it runs (SIGTERM: it writes what its persistence asks for) and starts it on the same
    /// port and folder. Without persistence it comes back empty.
    pub fn restart(&self) {
        let mut child = self.child();
        stop(&mut child, Signal::SIGTERM);
        self.run(&mut child, !self.has_config_file());
    }

    /// SIGKILL: a crash. [`RedisServer::restart`] starts it again.
    pub fn kill(&self) {
        stop(&mut self.child(), Signal::SIGKILL);
    }

    /// SIGSTOP: connections stay open and nothing answers.
    pub fn pause(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Ends a [`RedisServer::pause`].
    pub fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// What the program `redis-cli` (or `valkey-cli`) prints for a command, without the last line end. Other
    /// databases than 0 by its flag: `["-n", "5", "HSET", …]`.
    ///
    /// # Panics
    ///
    /// If it ends with an error.
    #[track_caller]
    pub fn cli(&self, args: &[&str]) -> String {
        let program = find_program(&["redis-cli", "valkey-cli"]);
        let output = Command::new(program).arg("-s").arg(&self.socket).args(args).output().expect("redis-cli starts");
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && errors.is_empty(), "redis-cli {args:?}: {text}{errors}");
        text.trim_end_matches('\n').to_owned()
    }

    /// One command on database 0.
    #[track_caller]
    pub fn raw<A: AsRef<[u8]>>(&self, args: &[A]) -> Value {
        self.raw_db(0, args)
    }

    /// One command on another database.
    #[track_caller]
    pub fn raw_db<A: AsRef<[u8]>>(&self, db: u8, args: &[A]) -> Value {
        self.client(db).call(args)
    }

    /// A connection for many commands.
    #[track_caller]
    pub fn client(&self, db: u8) -> RawClient {
        let mut client = RawClient::connect(self.addr()).unwrap_or_else(|error| panic!("no Redis here: {error}"));
        if db != 0 {
            let reply = client.call(&["SELECT", &db.to_string()]);
            assert_eq!(reply, Value::Simple("OK".into()));
        }
        client
    }

    /// All keys of database 0: see [`RedisServer::dump_db`].
    #[track_caller]
    pub fn dump(&self) -> BTreeMap<String, String> {
        self.dump_db(0)
    }

    /// All keys of a database with their type and contents as text, and the time of expiry in ms since 1970 if they have
    /// one. Two dumps are equal if and only if nothing was changed between them, except by writing the same again.
    #[track_caller]
    pub fn dump_db(&self, db: u8) -> BTreeMap<String, String> {
        dump(&mut self.client(db))
    }

    fn child(&self) -> MutexGuard<'_, Option<Child>> {
        self.child.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    fn signal(&self, signal: Signal) {
        let child = self.child();
        let child = child.as_ref().expect("the server runs");
        signal::kill(Pid::from_raw(child.id() as i32), signal).expect("a child may be signalled");
    }

    fn has_config_file(&self) -> bool {
        fs::metadata(self.scratch.path().join("redis.conf")).is_ok_and(|file| file.len() > 0)
    }

    fn run(&self, child: &mut Option<Child>, defaults: bool) {
        let log = self.scratch.path().join("redis.log");
        let log_file = fs::File::options().create(true).append(true).open(&log).expect("a log file");
        let program = std::env::var_os("DRAYMAN_TEST_REDIS_SERVER")
            .map_or_else(|| find_program(&["redis-server", "valkey-server"]), PathBuf::from);
        let mut command = Command::new(&program);
        command.arg(self.scratch.path().join("redis.conf"));
        command.args(["--port", &self.port.number().to_string(), "--bind", "127.0.0.1", "--daemonize", "no"]);
        command.arg("--unixsocket").arg(&self.socket).arg("--dir").arg(self.scratch.path());
        command.args(["--logfile", "", "--pidfile", ""]);
        if defaults {
            command.args(["--save", "", "--maxmemory-policy", "noeviction"]);
        }
        for (key, value) in &self.config {
            command.arg(format!("--{key}"));
            // One argument for an empty value: `save ""`.
            command.args(if value.is_empty() { vec![""] } else { value.split_whitespace().collect() });
        }
        command.envs(self.env.iter().map(|(name, path)| (name, path)));
        command.stdin(Stdio::null()).stdout(log_file.try_clone().expect("a second handle")).stderr(log_file);
        let mut started = spawn_child(command, Signal::SIGKILL)
            .unwrap_or_else(|error| panic!("cannot start {}: {error}", program.display()));
        let said = || fs::read_to_string(&log).unwrap_or_default();
        // By the Unix socket, which is nobody else's. Redis opens the TCP port before it.
        let ended = eventually_blocking(&format!("{} to be ready", program.display()), || {
            if self.answers_ping() {
                return Ok(None);
            }
            started.try_wait().expect("a child may be waited for").map(Some).ok_or_else(said)
        });
        if let Some(status) = ended {
            panic!("{} ended with {status}; its log:\n{}", program.display(), said());
        }
        *child = Some(started);
    }

    fn answers_ping(&self) -> bool {
        let Ok(mut stream) = UnixStream::connect(&self.socket) else { return false };
        let mut reply = [0; 7];
        let _ = stream.set_read_timeout(Some(Duration::from_secs(1)));
        // "-LOADING …" while it reads its files, "-NOAUTH …" when a password is set: it is up then.
        let answered = stream.write_all(b"PING\r\n").is_ok() && stream.read_exact(&mut reply).is_ok();
        answered && (&reply == b"+PONG\r\n" || reply.starts_with(b"-NOAUTH"))
    }
}

impl Drop for RedisServer {
    /// Whoever reads of a failed test learns what its server held.
    fn drop(&mut self) {
        if thread::panicking() {
            // One that the test has paused would be asked in vain.
            if let Some(child) = &*self.child() {
                let _ = signal::kill(Pid::from_raw(child.id() as i32), Signal::SIGCONT);
            }
            for db in [0, 5] {
                // A server that the test has stopped, or filled with the unexpected, must not hide the failure itself.
                let dump = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.dump_db(db)));
                for (key, contents) in dump.unwrap_or_default().into_iter().take(100) {
                    eprintln!("redis {db}: {key} = {}", contents.chars().take(1000).collect::<String>());
                }
            }
        }
        stop(&mut self.child(), Signal::SIGKILL);
    }
}

/// All keys of a connection's database: see [`RedisServer::dump_db`].
#[track_caller]
pub(crate) fn dump(client: &mut RawClient) -> BTreeMap<String, String> {
    let Value::Array(keys) = client.call(&["KEYS", "*"]) else { panic!("KEYS gave no array") };
    let mut all = BTreeMap::new();
    for key in keys.iter().map(Value::bytes) {
        let kind = client.call(&[b"TYPE", key]).text();
        let contents = match kind.as_str() {
            "string" => client.call(&[b"GET", key]).to_string(),
            "list" => client.call(&[b"LRANGE", key, b"0", b"-1"]).to_string(),
            "set" => client.call(&[b"SMEMBERS", key]).in_order(1),
            "hash" => client.call(&[b"HGETALL", key]).in_order(2),
            "zset" => client.call(&[b"ZRANGE", key, b"0", b"-1", b"WITHSCORES"]).to_string(),
            "stream" => client.call(&[b"XRANGE", key, b"-", b"+"]).to_string(),
            // Expired since KEYS.
            "none" => continue,
            other => panic!("a key of the unexpected type {other}"),
        };
        let expiry = match client.call(&[b"PEXPIRETIME", key]) {
            Value::Int(at @ 0..) => format!(" expires at {at}"),
            _ => String::new(),
        };
        all.insert(printable(key), format!("{kind} {contents}{expiry}"));
    }
    all
}

fn stop(child: &mut Option<Child>, signal: Signal) {
    let Some(mut child) = child.take() else { return };
    let pid = Pid::from_raw(child.id() as i32);
    let _ = signal::kill(pid, signal);
    // A paused process sees other signals than SIGKILL only after this one.
    let _ = signal::kill(pid, Signal::SIGCONT);
    let _ = child.wait();
}

pub(crate) fn find_program(names: &[&str]) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    names
        .iter()
        .flat_map(|name| std::env::split_paths(&path).map(move |dir| dir.join(name)))
        .find(|program| program.is_file())
        .unwrap_or_else(|| panic!("none of {names:?} is on the PATH: run scripts/setup"))
}

/// A reply of Redis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// No value, or no array.
    Nil,
    /// `:1`
    Int(i64),
    /// A string of any bytes.
    Bulk(Vec<u8>),
    /// `+OK`
    Simple(String),
    /// `-ERR …`, without the dash.
    Error(String),
    /// A list of replies.
    Array(Vec<Value>),
}

impl Value {
    /// The bytes of a string.
    ///
    /// # Panics
    ///
    /// If it is none.
    #[track_caller]
    pub fn bytes(&self) -> &[u8] {
        match self {
            Value::Bulk(bytes) => bytes,
            Value::Simple(text) => text.as_bytes(),
            other => panic!("not a string: {other}"),
        }
    }

    /// A string as text, with U+FFFD for what is no UTF-8.
    ///
    /// # Panics
    ///
    /// If it is none.
    #[track_caller]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(self.bytes()).into_owned()
    }

    /// A number.
    ///
    /// # Panics
    ///
    /// If it is none.
    #[track_caller]
    pub fn int(&self) -> i64 {
        match self {
            Value::Int(number) => *number,
            other => panic!("not a number: {other}"),
        }
    }

    /// Whether there is nothing.
    pub fn is_nil(&self) -> bool {
        *self == Value::Nil
    }

    /// The items of an array as texts.
    ///
    /// # Panics
    ///
    /// If it is none, or holds something else than strings.
    #[track_caller]
    pub fn texts(&self) -> Vec<String> {
        match self {
            Value::Array(items) => items.iter().map(Value::text).collect(),
            other => panic!("not an array: {other}"),
        }
    }

    /// The pairs of an array like that of HGETALL.
    ///
    /// # Panics
    ///
    /// As [`Value::texts`].
    #[track_caller]
    pub fn map(&self) -> BTreeMap<String, String> {
        self.texts().chunks(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect()
    }

    /// As text, with the groups of `size` items sorted: Redis gives the members of a set in any order.
    fn in_order(&self, size: usize) -> String {
        let Value::Array(items) = self else { return self.to_string() };
        let join = |group: &[Value]| group.iter().map(Value::to_string).collect::<Vec<_>>().join(": ");
        let mut groups: Vec<_> = items.chunks(size).map(join).collect();
        groups.sort();
        format!("[{}]", groups.join(", "))
    }
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Value::Nil => f.write_str("nil"),
            Value::Int(number) => number.fmt(f),
            Value::Bulk(bytes) => write!(f, "\"{}\"", printable(bytes)),
            Value::Simple(text) => f.write_str(text),
            Value::Error(text) => write!(f, "error: {text}"),
            Value::Array(items) => {
                f.write_str("[")?;
                for (index, item) in items.iter().enumerate() {
                    write!(f, "{}{item}", if index == 0 { "" } else { ", " })?;
                }
                f.write_str("]")
            }
        }
    }
}

fn printable(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains(|c: char| c.is_control() || c == '\\' || c == '"') => text.to_owned(),
        _ => bytes.escape_ascii().to_string(),
    }
}

/// A blocking connection that speaks RESP2 and knows nothing else.
#[derive(Debug)]
pub struct RawClient {
    stream: BufReader<TcpStream>,
}

impl RawClient {
    /// Connects; through a [`crate::Proxy`], say.
    ///
    /// # Errors
    ///
    /// Those of the connection.
    pub fn connect(addr: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&addr, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Sends a command and waits for its reply. Redis's own errors are a [`Value::Error`].
    ///
    /// # Panics
    ///
    /// If the connection breaks or no reply comes for 30 s.
    #[track_caller]
    pub fn call<A: AsRef<[u8]>>(&mut self, args: &[A]) -> Value {
        match self.try_call(args) {
            Ok(value) => value,
            Err(error) => panic!("no reply from Redis: {error}"),
        }
    }

    /// [`RawClient::call`] for a connection that may break.
    ///
    /// # Errors
    ///
    /// Those of the connection.
    pub fn try_call<A: AsRef<[u8]>>(&mut self, args: &[A]) -> io::Result<Value> {
        self.send(args)?;
        self.receive()
    }

    /// Sends a command only.
    ///
    /// # Errors
    ///
    /// Those of the connection.
    pub fn send<A: AsRef<[u8]>>(&mut self, args: &[A]) -> io::Result<()> {
        let mut message = format!("*{}\r\n", args.len()).into_bytes();
        for arg in args {
            let arg = arg.as_ref();
            message.extend_from_slice(format!("${}\r\n", arg.len()).as_bytes());
            message.extend_from_slice(arg);
            message.extend_from_slice(b"\r\n");
        }
        self.stream.get_mut().write_all(&message)
    }

    /// Waits for the next reply, or for the next message of a subscription.
    ///
    /// # Errors
    ///
    /// Those of the connection; `InvalidData` for what is not RESP2.
    pub fn receive(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        // A connection that was cut in mid-line gives what came before.
        let line = line.strip_suffix("\r\n").ok_or(io::ErrorKind::UnexpectedEof)?;
        let bad = || io::Error::new(io::ErrorKind::InvalidData, format!("not RESP2: {line:?}"));
        let (kind, rest) = line.split_at_checked(1).ok_or_else(bad)?;
        let number = || rest.parse::<i64>().map_err(|_| bad());
        Ok(match kind {
            "+" => Value::Simple(rest.to_owned()),
            "-" => Value::Error(rest.to_owned()),
            ":" => Value::Int(number()?),
            "$" | "*" if number()? < 0 => Value::Nil,
            "$" => {
                let mut bytes = vec![0; number()? as usize + 2];
                self.stream.read_exact(&mut bytes)?;
                bytes.truncate(bytes.len() - 2);
                Value::Bulk(bytes)
            }
            "*" => Value::Array((0..number()?).map(|_| self.receive()).collect::<io::Result<_>>()?),
            _ => return Err(bad()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serves_tcp_and_the_socket() {
        let server = RedisServer::start();
        assert_eq!(server.cli(&["HSET", "job", "user", "ann"]), "1");
        assert_eq!(server.raw(&["HGET", "job", "user"]).text(), "ann");
        assert_eq!(server.raw_db(5, &["EXISTS", "job"]), Value::Int(0));
        assert_eq!(server.cli(&["-n", "5", "SET", "a", "b"]), "OK");
        assert_eq!(server.raw_db(5, &["GET", "a"]).text(), "b");
        assert_eq!(server.raw(&["CONFIG", "GET", "maxmemory-policy"]).map()["maxmemory-policy"], "noeviction");
        assert_eq!(server.raw(&["CONFIG", "GET", "save"]).map()["save"], "");
        assert_eq!(server.raw(&["GET", "missing"]), Value::Nil);
        assert!(matches!(server.raw(&["LPUSH", "job", "x"]), Value::Error(text) if text.starts_with("WRONGTYPE")));
        assert!(server.url_db(5).ends_with(&format!(":{}/5", server.addr().port())));
    }

    #[test]
    fn any_bytes_pass() {
        let server = RedisServer::start();
        let bytes: Vec<u8> = (0..=255).chain(*b"\r\n$3\r\n").collect();
        server.raw(&[b"SET", &b"key\r\n"[..], &bytes]);
        assert_eq!(server.raw(&[b"GET", &b"key\r\n"[..]]).bytes(), bytes);
        assert_eq!(server.dump().keys().collect::<Vec<_>>(), ["key\\r\\n"]);
    }

    #[test]
    fn comes_back_on_the_same_port_with_what_it_kept() {
        let server = RedisServer::with_config(&[("appendonly", "yes"), ("appendfsync", "always")]);
        server.raw(&["SET", "a", "1"]);
        server.kill();
        assert!(RawClient::connect(server.addr()).is_err());
        server.restart();
        assert_eq!(server.raw(&["GET", "a"]).text(), "1");
        server.restart();
        assert_eq!(server.raw(&["GET", "a"]).text(), "1");

        let forgetful = RedisServer::start();
        forgetful.raw(&["SET", "a", "1"]);
        forgetful.restart();
        assert!(forgetful.dump().is_empty());
    }

    #[test]
    fn a_paused_server_does_not_answer_until_it_is_resumed() {
        let server = RedisServer::start();
        let mut client = server.client(0);
        server.pause();
        client.send(&["PING"]).unwrap();
        client.stream.get_mut().set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        assert!(client.receive().is_err());
        server.resume();
        client.stream.get_mut().set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(client.receive().unwrap(), Value::Simple("PONG".into()));
        server.pause();
        // Dropping a paused server must not hang.
    }

    #[test]
    fn a_server_with_a_clock_of_its_own_has_the_time_that_it_is_given() {
        let server = RedisServer::with_clock(&[]);
        let now = || server.raw(&["TIME"]).texts()[0].parse::<i64>().unwrap();
        let start = now();
        server.shift_clock(3_600);
        assert!((3_600..3_660).contains(&(now() - start)));
        server.shift_clock(-3_600);
        assert!((-3_600..-3_540).contains(&(now() - start)));
    }

    #[test]
    fn the_dump_shows_every_type_sorted() {
        let server = RedisServer::start();
        for command in [
            "SET string text",
            "RPUSH list b a",
            "SADD set b c a",
            "HSET hash b 2 a 1",
            "ZADD zset 2 two 1 one",
            "XADD stream 1-1 field value",
            "SET expiring x PXAT 4102444800000",
        ] {
            server.raw(&command.split(' ').collect::<Vec<_>>());
        }
        let dump = server.dump();
        let lines: Vec<_> = dump.iter().map(|(key, value)| format!("{key}: {value}")).collect();
        assert_eq!(
            lines,
            [
                r#"expiring: string "x" expires at 4102444800000"#,
                r#"hash: hash ["a": "1", "b": "2"]"#,
                r#"list: list ["b", "a"]"#,
                r#"set: set ["a", "b", "c"]"#,
                r#"stream: stream [["1-1", ["field", "value"]]]"#,
                r#"string: string "text""#,
                r#"zset: zset ["one", "1", "two", "2"]"#,
            ]
        );
        server.raw(&["HSET", "hash", "a", "3"]);
        assert_ne!(server.dump(), dump);
    }

    #[test]
    #[should_panic(expected = "Bad directive or wrong number of arguments")]
    fn a_server_that_cannot_start_shows_its_log() {
        RedisServer::with_config(&[("no-such-setting", "1")]);
    }
}
