//! Batches from their submission to the end: what workers make of their rows, and what they leave.

mod ends;
mod faults;
mod rows;
mod statements;
#[path = "../support/mod.rs"]
mod support;

use std::sync::{Arc, Mutex};

use queue_core::batch::{BatchView, Batches, NewBatch, RowView, Which};
use queue_core::config::{Limits, Url};
use queue_core::ids::{App, Op, User};
use queue_core::model::Status;
use queue_core::model::batch::{Counts, Row};
use queue_core::objects::Objects;
use serde_json::json;
use support::{DB, config, job_id, store};
use testkit::{RedisServer, end_of, eventually};
use worker::builder::{Worker, WorkerBuilder};
use worker::execute::function::BoxError;
use worker::execute::rows::BatchEnd;
use worker::execute::task::Problem;
use worker::shutdown::Shutdown;

struct House {
    redis: RedisServer,
    batches: Batches,
}

impl House {
    async fn build() -> Self {
        Self::on(RedisServer::start()).await
    }

    async fn on(redis: RedisServer) -> Self {
        let objects = Objects::open(&config_of(&redis).objects).unwrap();
        let batches = Batches::new(store(&redis).await, Limits::default()).with_objects(objects);
        Self { redis, batches }
    }

    fn worker(&self) -> WorkerBuilder {
        let mut config = config_of(&self.redis);
        config.worker.pools.clear();
        config.tasks.threads = Some(4.try_into().unwrap());
        Worker::builder().config(config)
    }

    /// A worker that has so many chunks in hand at most.
    fn small_worker(&self, slots: usize) -> WorkerBuilder {
        self.worker().slots(slots.try_into().unwrap())
    }

    fn batch(&self, op: &str) -> NewBatch {
        NewBatch::handler(User::new("ann").unwrap(), App::new("bank").unwrap(), Op::new(op).unwrap())
    }

    async fn submit(&self, id: &str, op: &str, lines: impl IntoIterator<Item = u64>) {
        let new = NewBatch { id: job_id(id), ..self.batch(op) };
        self.batches.submit(new, rows(lines)).await.unwrap();
    }

    async fn view(&self, id: &str) -> BatchView {
        self.batches.view(&job_id(id)).await.unwrap()
    }

    /// Waits until a batch stands as is wanted.
    async fn until(&self, id: &str, what: &str, wanted: impl Fn(&BatchView) -> bool) -> BatchView {
        eventually(&format!("batch {id}: {what}"), async || Some(self.view(id).await).filter(&wanted)).await
    }

    async fn rows(&self, id: &str) -> Vec<RowView> {
        let (mut rows, mut after) = (Vec::new(), None);
        loop {
            let page = self.batches.rows(&job_id(id), Which::All, after, 1_000).await.unwrap();
            rows.extend(page.rows);
            after = page.next;
            if after.is_none() {
                return rows;
            }
        }
    }

    async fn over(&self, id: &str) -> BatchView {
        let view = end_of("the batch ends", self.batches.wait(&job_id(id), None)).await.expect("redis answers");
        assert!(view.is_over(), "{view:?}");
        view
    }

    async fn file(&self, id: &str, name: &str) -> String {
        let mut content = Vec::new();
        self.batches.file(&job_id(id), name, &mut content).await.unwrap();
        String::from_utf8(content).unwrap()
    }

    /// Nothing of a batch is left but its record and what belongs to it.
    async fn nothing_runs(&self) {
        eventually("nothing to run", async || {
            let state = self.redis.state(DB);
            (state.is_idle() && state.batches_at_work().is_empty()).then_some(())
        })
        .await;
    }
}

fn config_of(redis: &RedisServer) -> worker::config::Config {
    let mut config = config(redis);
    config.objects.url = Url::new(format!("file://{}/objects", redis.dir().display()));
    config
}

struct Running {
    shutdown: Shutdown,
    handle: tokio::task::JoinHandle<Result<(), BoxError>>,
}

impl Running {
    fn start(worker: WorkerBuilder) -> Self {
        let shutdown = Shutdown::new();
        Self { handle: tokio::spawn(worker.run(shutdown.clone())), shutdown }
    }

    async fn stop(self) {
        self.shutdown.drain().cancel();
        end_of("the worker stops", self.handle).await.expect("no panic").expect("no error");
    }
}

fn rows(lines: impl IntoIterator<Item = u64>) -> Vec<Row> {
    lines.into_iter().map(|line| Row { line, input: json!({ "n": line }).to_string().into_bytes() }).collect()
}

/// The application's own record of what it was told.
#[derive(Clone, Default)]
struct Ears(Arc<Mutex<Vec<BatchEnd>>>);

impl Ears {
    fn hear(&self, end: BatchEnd) -> std::future::Ready<Result<(), Problem>> {
        self.0.lock().unwrap().push(end);
        std::future::ready(Ok(()))
    }

    /// Waits until it was told of so many ends, and says them: batch, status, counts.
    async fn heard(&self, count: usize) -> Vec<(String, Status, Counts)> {
        let told =
            |ends: &Vec<BatchEnd>| ends.iter().map(|end| (end.batch.to_string(), end.status, end.counts)).collect();
        eventually(&format!("{count} ends to be told"), async || {
            let ends = self.0.lock().unwrap();
            (ends.len() >= count).then(|| told(&ends))
        })
        .await
    }
}

fn counts(rows: u64, done: u64, failed: u64, aborted: u64) -> Counts {
    Counts { rows, done, failed, aborted, ..Counts::default() }
}
