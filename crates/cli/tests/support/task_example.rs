use queue_core::config::{Limits, RedisConfig, Url};
use queue_core::handle::JobError;
use queue_core::ids::{App, Op, User};
use queue_core::model::task::Payload;
use queue_core::producer::{NewJob, Producer, Unique, UniqueScope};
use queue_core::store::Store;

pub async fn call(redis_url: &str) -> Result<u32, Box<dyn std::error::Error>> {
    let config = RedisConfig { url: Url::new(redis_url), ..RedisConfig::default() };
    let producer = Producer::new(Store::connect(&config).await?, Limits::default());
    let input = Payload::json(&serde_json::json!({ "invoice": 7 }))?;
    let job = NewJob {
        // Nobody renders it twice at the same time.
        unique: Some(Unique { key: "invoice-7".into(), scope: UniqueScope::UntilDone }),
        tags: vec!["monthly".into()],
        ..NewJob::task(User::new("ana")?, App::new("invoices")?, Op::new("render")?, input)
    };
    let handle = producer.submit(job).await?;
    handle.wait(None).await?;
    match handle.result().await {
        Ok(pages) => Ok(pages),
        Err(JobError::Failed { reason, messages, .. }) => Err(format!("{reason}: {messages:?}").into()),
        Err(other) => Err(other.into()),
    }
}
