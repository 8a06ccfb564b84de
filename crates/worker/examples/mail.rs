//! A worker that posts letters: what an application shares, and what a handler may say.

use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use worker::builder::Worker;
use worker::config::{Config, Layers};
use worker::execute::function::{Application, BoxError, Context, Resource, Shared};
use worker::execute::task::Problem;
use worker::shutdown::Shutdown;

/// How to reach the post office. What is opened is shared by all handlers of the application.
struct PostOffice;

/// In life a pool of connections.
struct Counter {
    open: bool,
}

#[async_trait]
impl Resource for PostOffice {
    type Of = Counter;

    async fn open(&self) -> Result<Counter, BoxError> {
        Ok(Counter { open: true })
    }

    async fn check(&self, counter: &Counter) -> Result<(), BoxError> {
        if counter.open { Ok(()) } else { Err("the counter is closed".into()) }
    }

    async fn close(&self, _: Counter) {
        println!("the counter is closed");
    }
}

#[derive(Deserialize)]
struct Letter {
    to: Vec<String>,
    text: String,
}

#[derive(Serialize)]
struct Posted {
    letters: usize,
}

async fn post(counter: Shared<PostOffice>, letter: Letter, context: Context) -> Result<Posted, Problem> {
    if letter.to.is_empty() {
        return Err(Problem::fail("nobody is to get it"));
    }
    if letter.text.is_empty() {
        return Err(Problem::ignore("there is nothing to say"));
    }
    if !counter.open {
        return Err(Problem::retry("the counter is closed").after(Duration::from_secs(60)));
    }
    for (at, to) in letter.to.iter().enumerate() {
        // Whoever is told to stop leaves here, or is dropped at the next `await` once the grace is over.
        tokio::select! {
            () = context.stop().cancelled() => return Err(Problem::retry("not all letters were posted")),
            () = tokio::time::sleep(Duration::from_millis(1)) => {}
        }
        context.log(&format!("posted to {to}"));
        context.progress(at as u64 + 1, Some(letter.to.len() as u64), None);
    }
    Ok(Posted { letters: letter.to.len() })
}

/// Code that blocks: it gets a thread of its own, and looks by itself whether it is to stop.
fn count(_: Shared<PostOffice>, text: String, context: Context) -> Result<usize, Problem> {
    let mut words = 0;
    for _ in text.split_whitespace() {
        if context.stop().is_cancelled() {
            return Err(Problem::retry("not all words were counted"));
        }
        words += 1;
    }
    Ok(words)
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    // As the daemon does: /etc/drayman/worker.toml, then variables such as DRAYMAN_REDIS__URL.
    let mut config = Config::load(&Layers::of_process(None))?;
    // Its own handlers and nothing else.
    config.worker.pools.clear();
    let mail = Application::sharing("mail", PostOffice)
        .and_then(|mail| mail.handler("post", post))
        .map(|mail| mail.timeout(Duration::from_secs(600)).stop_grace(Duration::from_secs(10)))
        .and_then(|mail| mail.blocking_handler("count", count));
    Worker::builder().config(config).app(mail).run(Shutdown::on_signals()?).await
}
