use queue_core::config::{Limits, RedisConfig, Url};
use queue_core::ids::User;
use queue_core::producer::{Database, NewJob, Producer};
use queue_core::store::Store;

pub async fn submit(redis_url: &str) -> Result<String, Box<dyn std::error::Error>> {
    let config = RedisConfig { url: Url::new(redis_url), ..RedisConfig::default() };
    let producer = Producer::new(Store::connect(&config).await?, Limits::default());
    let database = Database::Named("trips".into());
    let job = NewJob::sql(User::new("ana")?, database, "UPDATE trips SET km = 1.6 * miles");
    // If the answer gets lost, the error says so and has the id: the same submission again does no harm.
    let submitted = producer.enqueue(job).await?;
    Ok(submitted.id().to_string())
}
