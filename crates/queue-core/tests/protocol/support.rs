//! A server, a connection, what the server holds, and the books that must balance at every moment.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use queue_core::Store;
use queue_core::calls::{Fields, Finished, QueueLimits, Submission, Verdict};
use queue_core::config::{RedisConfig, Url};
use queue_core::ids::{JobId, PoolPattern, SessionId, User};
use queue_core::leader::{self, Leadership, Lengths};
use queue_core::model::batch::{RowEnd, unpack_results};
use queue_core::session::{Claim, Fairness, Service, Session};
pub use testkit::PATIENCE;
pub use testkit::state::{Piece, Priority};
use testkit::state::{RowEnds, State};
use testkit::{Proxy, RedisServer, Value};

pub const DB: u8 = 5;
pub const KEEP_MS: u64 = 7_200_000;

/// A server and a connection to it.
pub struct Rig {
    pub server: RedisServer,
    pub store: Store,
}

impl Rig {
    pub async fn start() -> Self {
        let server = RedisServer::start();
        let store = Store::connect(&config(server.url_db(DB))).await.expect("the server answers");
        Self { server, store }
    }

    /// A connection through a network that can fail, with a short patience.
    pub async fn connect_through(&self, proxy: &Proxy) -> Store {
        let url = format!("redis://{}/{DB}", proxy.addr());
        let config = RedisConfig { command_timeout: Duration::from_millis(800), ..config(url) };
        Store::connect(&config).await.expect("the proxy passes everything")
    }

    /// A session that serves pools (patterns, separated by blanks), each with room for `capacity` jobs.
    pub async fn session(&self, pools: &str, capacity: u32) -> Session {
        open(&self.store, service(pools, capacity)).await
    }

    /// One command; an error is the test's.
    #[track_caller]
    pub fn redis<A: AsRef<[u8]>>(&self, args: &[A]) -> Value {
        let reply = self.server.raw_db(DB, args);
        if let Value::Error(error) = &reply {
            let words: Vec<_> = args.iter().map(|arg| String::from_utf8_lossy(arg.as_ref())).collect();
            panic!("{words:?}: {error}");
        }
        reply
    }

    /// What Redis holds, in the words of the protocol.
    #[track_caller]
    pub fn state(&self) -> State {
        self.server.state(DB)
    }

    /// A whole foreign submission.
    pub fn submit(&self, user: &str, id: &str, host: &str) {
        let fields = [("status", "pending"), ("query", "select 1"), ("host", host)];
        self.state().foreign().submit(user, id, &fields);
    }

    /// What the leader does when it hears users announced.
    pub async fn notice(&self, users: &[&str]) -> u64 {
        let users: Vec<Vec<u8>> = users.iter().map(|user| user.as_bytes().to_vec()).collect();
        self.store.notice(&users).await.expect("users can be looked at")
    }

    /// Makes a key one that nobody has touched for so many seconds.
    pub fn idle(&self, key: &str, seconds: u32) {
        let dump = self.redis(&["DUMP", key]);
        let seconds = seconds.to_string();
        let args = [b"RESTORE", key.as_bytes(), b"0", dump.bytes(), b"REPLACE", b"IDLETIME", seconds.as_bytes()];
        self.redis(&args);
    }

    pub async fn lead(&self) -> Leadership {
        let session = SessionId::new("leader:1:a").unwrap();
        leader::hold(&self.store, &session, Duration::from_secs(3_600))
            .await
            .unwrap()
            .expect("nobody else leads")
            .in_haste()
    }

    pub fn hash(&self, id: &str) -> BTreeMap<String, String> {
        self.state().record(id)
    }

    #[track_caller]
    pub fn status(&self, id: &str) -> String {
        self.state().status(id).unwrap_or_else(|| panic!("{id} has no status"))
    }

    pub fn status_or_none(&self, id: &str) -> Option<String> {
        self.state().status(id)
    }

    /// A user's queue, its head first.
    pub fn queue(&self, user: &str) -> Vec<String> {
        self.state().waiting(user)
    }

    /// Ids that were set aside, with their reasons, the oldest first.
    pub fn rejected(&self) -> Vec<(String, String)> {
        self.state().rejected()
    }

    pub fn dump(&self) -> BTreeMap<String, String> {
        self.state().digest()
    }

    /// Checks that all that counts or lists something says the same as what it counts.
    #[track_caller]
    pub fn balanced(&self) {
        self.state().check_books(|packed| {
            let results = unpack_results(packed).map_err(|error| error.to_string())?;
            let is_failed = |end: &RowEnd| *end == RowEnd::Failed;
            let ends: Vec<RowEnd> = results.into_iter().flatten().map(|result| result.end).collect();
            Ok(RowEnds { ended: ends.len() as u64, failed: ends.iter().filter(|end| is_failed(end)).count() as u64 })
        });
    }

    /// Makes what waits one that nobody has touched for a while, so that a comparison of keys looks at it.
    pub fn age(&self) {
        self.state().age();
    }
}

pub fn config(url: String) -> RedisConfig {
    RedisConfig { url: Url::new(url), command_timeout: Duration::from_secs(30), ..RedisConfig::default() }
}

pub fn service(pools: &str, capacity: u32) -> Service {
    Service {
        pools: pools.split(' ').map(|pattern| PoolPattern::new(pattern).unwrap()).collect(),
        default_capacity: capacity,
        capacities: Vec::new(),
        fairness: Fairness::Jobs,
    }
}

pub async fn open(store: &Store, service: Service) -> Session {
    static PID: AtomicU32 = AtomicU32::new(1);
    let pid = PID.fetch_add(1, Ordering::Relaxed);
    let id = SessionId::generate("host", pid);
    Session::open(store.clone(), id, service, "host", pid).await.expect("a session opens")
}

/// What the leader does all the time: it looks at the queues that the index names, as one that knows nothing of them yet, and at the
/// lines of tasks. Returns how many of their users became ready.
pub async fn scan_index(leadership: &Leadership) -> Result<u64, queue_core::Error> {
    let not_leader = "it leads";
    let queues = leadership.scan_changes(&mut Lengths::default()).await?.expect(not_leader);
    Ok(queues + leadership.scan_lines().await?.expect(not_leader))
}

/// For the tests that still name keys.
pub fn job_key(id: &str) -> String {
    Piece::Job(id).name()
}

/// For the tests that still name keys.
pub fn queue_key(user: &str) -> String {
    Piece::Queue(user).name()
}

/// Names and values by turns, as pairs.
pub fn pairs<'a>(flat: &[&'a str]) -> Vec<(&'a str, &'a str)> {
    flat.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect()
}

/// So many jobs may wait in a line, of so many bytes.
pub fn most(jobs: u64, bytes: u64) -> QueueLimits {
    QueueLimits { sql_jobs: jobs, tasks: jobs, sql_bytes: bytes, task_bytes: bytes }
}

/// A native submission of a statement for a host.
pub fn submission(user: &str, id: &str, host: &str) -> Submission {
    let fields = Fields::new().with("query", "select 1").with("host", host);
    Submission { id: JobId::new(id).unwrap(), user: User::new(user).unwrap(), delay_ms: 0, run_at_ms: None, fields }
}

pub async fn take(session: &Session, n: usize) -> Vec<Claim> {
    session.take(n).await.expect("redis answers").expect("the session lives").claims
}

/// Takes one job, which must be there.
pub async fn take_one(session: &Session) -> Claim {
    let mut claims = take(session, 1).await;
    assert_eq!(claims.len(), 1, "there is a job to take");
    claims.remove(0)
}

pub fn ids(claims: &[Claim]) -> Vec<&str> {
    claims.iter().map(id).collect()
}

pub fn id(claim: &Claim) -> &str {
    claim.job().id.as_str()
}

pub fn final_verdict() -> Verdict {
    Verdict::Final { keep_ms: KEEP_MS }
}

pub async fn end(claim: Claim, status: &str) -> Finished {
    claim.finish(final_verdict(), Duration::ZERO, Fields::new().with("status", status), false).await.expect("an answer")
}

pub async fn put(claim: Claim, verdict: Verdict) -> Finished {
    claim.finish(verdict, Duration::ZERO, Fields::new(), false).await.expect("an answer")
}

/// How often functions were called since the statistics were reset.
pub fn function_calls(rig: &Rig) -> u64 {
    rig.server.function_calls()
}
