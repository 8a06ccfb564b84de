//! A worker for the flows in `samples/`: each shows one thing that flows can do.
//!
//! ```sh
//! cargo run -p worker --example samples &
//! drayman flow launch crates/worker/examples/samples/chunk_job.toml --user ann --wait
//! ```

use std::num::NonZeroUsize;

use serde_json::{Value, json};
use worker::builder::Worker;
use worker::config::{Config, Layers};
use worker::execute::chunks::{Chunks, call, items};
use worker::execute::function::{Application, BoxError, Context};
use worker::execute::task::Problem;
use worker::shutdown::Shutdown;

const TEN: NonZeroUsize = NonZeroUsize::new(10).unwrap();

async fn hello(params: Value, context: Context) -> Result<Value, Problem> {
    context.log(&format!("hello from {}", context.job()));
    Ok(params)
}

async fn fail(_: Value, _: Context) -> Result<(), Problem> {
    Err(Problem::fail("this step always fails"))
}

/// Goes well at the third attempt.
async fn flaky(_: Value, context: Context) -> Result<Value, Problem> {
    match context.attempt() {
        attempt @ 1..=2 => Err(Problem::retry(format!("attempt {attempt} did not go well"))),
        attempt => Ok(json!({ "attempt": attempt })),
    }
}

/// Fifty numbers are squared, and the even squares are kept, ten numbers at a time.
fn squares(_: Value, context: Context) -> Result<Value, Problem> {
    let mut sum = 0;
    let square = |number: &u64| Ok(Some(number * number).filter(|square| square % 2 == 0));
    let add = |squares: &[u64]| {
        sum += squares.iter().sum::<u64>();
        Ok(())
    };
    let counts = Chunks::of(TEN).run(&context, items(|| 1..=50), square, call(add))?;
    Ok(json!({ "sum": sum, "counts": counts }))
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let mut config = Config::load(&Layers::of_process(None))?;
    config.worker.pools.clear();
    let samples = Application::new("samples")
        .and_then(|samples| samples.handler("hello", |_, params, context| hello(params, context)))
        .and_then(|samples| samples.handler("fail", |_, params, context| fail(params, context)))
        .and_then(|samples| samples.handler("flaky", |_, params, context| flaky(params, context)))
        .and_then(|samples| samples.blocking_handler("squares", |_, params, context| squares(params, context)));
    Worker::builder().config(config).app(samples).run(Shutdown::on_signals()?).await
}
