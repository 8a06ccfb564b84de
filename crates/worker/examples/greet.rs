//! The smallest worker: one operation of one application.

use worker::builder::Worker;
use worker::execute::function::BoxError;
use worker::shutdown::Shutdown;

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let url = std::env::var("REDIS_URL").unwrap_or_else(|_| "redis://127.0.0.1:6379/5".into());
    Worker::builder()
        .redis(url)
        .handler("welcome", "greet", |name: String, _| async move { Ok(format!("Hello, {name}")) })
        .run(Shutdown::on_signals()?)
        .await
}
