//! One Redis, one PostgreSQL with the database `shop`, and the jobs that a foreign producer pushes there.

use queue_core::Store;
use queue_core::cancel::{Cancelled, Canceller};
use queue_core::inspect::{Inspect, JobView};
use testkit::state::State;
use testkit::{Daemon, Postgres, RedisServer, Value, eventually};
use tokio_postgres::Client;

use super::{DB, PATIENCE, config, daemon, job_id, store};
use worker::config::Config;

pub const DATABASE: &str = "shop";

pub struct House {
    pub redis: RedisServer,
    pub postgres: Postgres,
    pub store: Store,
    pub inspect: Inspect,
    canceller: Canceller,
}

impl House {
    /// The table `effects` keeps what statements did.
    pub async fn build() -> Self {
        Self::on(RedisServer::start()).await
    }

    pub async fn on(redis: RedisServer) -> Self {
        let postgres = Postgres::start();
        postgres.create_database(DATABASE).await;
        postgres.query(DATABASE, "CREATE TABLE effects (what text)").await;
        let store = store(&redis).await;
        let inspect = Inspect::new(store.clone());
        let canceller = Canceller::new(store.clone(), PATIENCE);
        Self { redis, postgres, store, inspect, canceller }
    }

    /// A worker's configuration, see [`config`].
    pub fn config(&self) -> Config {
        config(&self.redis)
    }

    /// The daemon itself, see [`daemon`].
    pub fn daemon(&self, settings: &[(&str, &str)]) -> Daemon {
        daemon(&self.redis.url_db(DB), settings)
    }

    /// A job of the user `ann` on `shop`, to be changed and then pushed.
    pub fn job(&self, id: &str, query: &str) -> Push<'_> {
        let (host, port) = self.postgres.host_port();
        let push = Push { redis: &self.redis, id: id.into(), user: b"ann".to_vec(), fields: Vec::new() };
        push.with("status", "pending")
            .with("query", query)
            .with("host", host)
            .with("port", port.to_string())
            .with("dbname", DATABASE)
            .with("dbuser", "postgres")
            .with("pass", "")
            .with("created_at", "2026-01-01T00:00:00.000Z")
            .with("updated_at", "2026-01-01T00:00:00.000Z")
    }

    /// Pushes a job that does nothing special and waits until it is done: the worker goes on.
    pub async fn goes_on(&self, id: &str) {
        self.job(id, &format!("INSERT INTO effects VALUES ('{id}')")).of("good").push();
        let view = self.ended(id).await;
        assert_eq!((view.status().as_str(), view.text("failed_reason")), ("done", None));
        assert_eq!(self.effects(id).await, 1);
    }

    pub async fn ended(&self, id: &str) -> JobView {
        super::ended(&self.inspect, id).await
    }

    pub async fn running(&self, id: &str) -> JobView {
        super::running(&self.inspect, id).await
    }

    /// Waits until PostgreSQL executes a statement of the job that contains `part`.
    pub async fn executing(&self, id: &str, part: &str) {
        let sql = format!(
            "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND query LIKE '/* {id} */%' \
             AND position($part${part}$part$ in query) > 0"
        );
        eventually(&format!("a statement of {id} with {part:?}"), async || {
            (!self.postgres.query("postgres", &sql).await.is_empty()).then_some(())
        })
        .await;
    }

    /// How many backends of jobs there are.
    pub async fn backends(&self) -> usize {
        let sql = "SELECT 1 FROM pg_stat_activity WHERE application_name LIKE 'drayman:%'";
        self.postgres.query("postgres", sql).await.len()
    }

    pub async fn cancel(&self, id: &str) -> Cancelled {
        self.canceller.cancel(&job_id(id)).await.expect("redis answers")
    }

    /// How often `what` took effect.
    pub async fn effects(&self, what: &str) -> usize {
        self.postgres.query(DATABASE, &format!("SELECT FROM effects WHERE what = '{what}'")).await.len()
    }

    /// Everything that took effect, in order.
    pub async fn all_effects(&self) -> Vec<String> {
        let rows = self.postgres.query(DATABASE, "SELECT what FROM effects ORDER BY ctid").await;
        rows.into_iter().map(|mut row| row.remove(0).expect("a text")).collect()
    }

    /// Closed until it is opened: [`Gate::PASS`] in a statement waits for it.
    pub async fn gate(&self) -> Gate {
        Gate::shut(&self.postgres, DATABASE, 4711).await
    }

    /// One more, which [`Gate::PASS_2`] waits for.
    pub async fn gate_2(&self) -> Gate {
        Gate::shut(&self.postgres, DATABASE, 4712).await
    }

    pub fn command(&self, args: &[&str]) -> Value {
        self.redis.raw_db(DB, args)
    }

    /// What Redis holds, in the words of the protocol.
    pub fn state(&self) -> State {
        self.redis.state(DB)
    }

    /// A field of a job's record, of whatever kind.
    pub fn field(&self, id: &str, field: &str) -> Option<String> {
        self.state().field(id, field)
    }

    /// What is claimed is being worked on.
    pub fn claims(&self) -> usize {
        self.state().running()
    }
}

pub struct Gate {
    client: Client,
}

impl Gate {
    /// For statements of one row; many may wait at once and all pass together.
    pub const PASS: &str = "pg_advisory_xact_lock_shared(4711)";
    pub const PASS_2: &str = "pg_advisory_xact_lock_shared(4712)";

    pub async fn shut(postgres: &Postgres, database: &str, lock: u32) -> Self {
        let client = postgres.client(database).await.expect("PostgreSQL answers");
        client.batch_execute(&format!("SELECT pg_advisory_lock({lock})")).await.expect("a lock");
        Self { client }
    }

    pub async fn open(self) {
        self.client.batch_execute("SELECT pg_advisory_unlock_all()").await.expect("the lock is ours");
    }
}

/// A submission by plain commands.
#[must_use = "nothing is pushed yet"]
pub struct Push<'a> {
    redis: &'a RedisServer,
    id: Vec<u8>,
    user: Vec<u8>,
    fields: Vec<(String, Vec<u8>)>,
}

impl Push<'_> {
    pub fn of(mut self, user: impl AsRef<[u8]>) -> Self {
        self.user = user.as_ref().to_vec();
        self
    }

    pub fn with(mut self, field: &str, value: impl AsRef<[u8]>) -> Self {
        self = self.without(field);
        self.fields.push((field.into(), value.as_ref().to_vec()));
        self
    }

    pub fn without(mut self, field: &str) -> Self {
        self.fields.retain(|(name, _)| name != field);
        self
    }

    /// On a database that the worker's configuration names.
    pub fn on(mut self, database: &str) -> Self {
        for field in ["host", "port", "dbname", "dbuser", "pass"] {
            self = self.without(field);
        }
        self.with("database", database)
    }

    pub fn push(self) {
        self.hash();
        self.queue();
        self.announce();
    }

    /// The same without the message.
    pub fn push_quietly(self) {
        self.hash();
        self.queue();
    }

    pub fn hash(&self) {
        let mut fields = self.fields.clone();
        if !fields.iter().any(|(name, _)| name == "user") {
            fields.push(("user".into(), self.user.clone()));
        }
        self.redis.state(DB).foreign().write(&self.id, &fields);
    }

    pub fn queue(&self) {
        let state = self.redis.state(DB);
        state.foreign().push(&self.user, &self.id);
        state.foreign().index(&self.user);
    }

    pub fn announce(&self) {
        self.redis.state(DB).foreign().publish(&self.user);
    }
}
