//! Objects in a bucket. Run with `--features s3` and the `AWS_…` variables of a server that speaks S3; DRAYMAN_TEST_S3 names the
//! place: `s3://bucket/prefix`.

use std::time::Duration;

use queue_core::config::{ByteSize, ObjectsConfig, Url};
use queue_core::ids::{Fence, JobId};
use queue_core::objects::{Objects, ObjectsError, SHARDS};

#[tokio::test]
async fn a_bucket_keeps_gives_and_loses_objects_as_a_folder_does() {
    let place = std::env::var("DRAYMAN_TEST_S3").expect("DRAYMAN_TEST_S3 names the place");
    let config =
        ObjectsConfig { url: Url::new(place), max_object_bytes: ByteSize(1 << 20), ..ObjectsConfig::default() };
    let objects = Objects::open(&config).unwrap();
    let (living, gone) = (JobId::generate(), JobId::new("..").unwrap());
    let mut names = Vec::new();
    for id in [&living, &gone] {
        let name = objects.put_result(id, 1, Fence(7), b"one".to_vec()).await.unwrap();
        assert_eq!(objects.put_result(id, 1, Fence(7), b"one".to_vec()).await.unwrap(), name);
        objects.put_file(id, 1, Fence(7), "../a", b"rows".to_vec()).await.unwrap();
        assert_eq!(objects.get(id, &name).await.unwrap(), b"one");
        names.push(name);
    }
    assert!(matches!(objects.get(&living, &names[1]).await, Err(ObjectsError::NotFound(_))));
    let sweep = async |grace: Duration| {
        let (mut jobs, mut removed) = (0, 0);
        for shard in 0..SHARDS {
            let exists = async |ids: Vec<JobId>| Ok(ids.iter().map(|id| *id == living).collect());
            let swept = objects.sweep(shard, grace, exists).await.unwrap();
            (jobs, removed) = (jobs + swept.jobs, removed + swept.removed);
        }
        (jobs, removed)
    };
    assert_eq!(sweep(Duration::from_secs(3_600)).await, (2, 0));
    // The store tells times in whole seconds, by its own clock: what is just written may be younger than now.
    testkit::eventually("the objects of the job that is gone to go", async || {
        (sweep(Duration::ZERO).await == (2, 1)).then_some(())
    })
    .await;
    assert!(matches!(objects.get(&gone, &names[1]).await, Err(ObjectsError::NotFound(_))));
    objects.delete_of(&living).await.unwrap();
    assert_eq!(sweep(Duration::ZERO).await, (0, 0));
}
