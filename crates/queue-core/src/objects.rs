//! The door to the object store, where results and files lie that are too large for Redis: a folder, or a bucket (with the
//! feature `s3`). Only this module knows the client.
//!
//! The name of an object tells its job, so that whoever holds the names of one job can reach nothing of another's, and
//! objects can live exactly as long as their job's record: [`Objects::sweep`] removes those whose record is gone. Names
//! are made of the job's id and its fence alone: the same write twice is one object, and the writes of two holders of
//! a job never meet. In a folder:
//!
//! ```text
//! 3f/j-0193b7c2-…/1-1790000000000000-result
//! 3f/j-0193b7c2-…/1-1790000000000000-file-9b74c9897bac770f…
//! ```

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::TryStreamExt;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{GetResult, ObjectStore, ObjectStoreExt, WriteMultipart};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::config::{Fault, ObjectsConfig};
use crate::error::Error;
use crate::ids::{Fence, JobId};

/// Into how many parts the names of jobs fall. A pass of the sweep looks at one of them.
pub const SHARDS: u16 = 256;

/// Bytes of a file that are in memory at a time.
const PIECE_BYTES: usize = 1 << 18;

/// How many jobs are asked for in one question whether they still have a record.
const ASKED_AT_ONCE: usize = 200;

/// What can go wrong between us and the object store.
#[derive(Debug, thiserror::Error)]
pub enum ObjectsError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] Fault),
    /// It is larger than allowed; nothing was written.
    #[error("{bytes} bytes are too many: at most {limit} are allowed")]
    TooLarge {
        /// Bytes that it has.
        bytes: u64,
        /// Most bytes that are allowed.
        limit: u64,
    },
    /// There is no such object (any more), or it is not the job's.
    #[error("the job has no object {0}")]
    NotFound(String),
    /// Whether jobs still have a record could not be asked.
    #[error(transparent)]
    Redis(#[from] Error),
    /// The store did not do it. Trying again may help.
    #[error("the object store failed: {0}")]
    Failed(String),
}

impl From<object_store::Error> for ObjectsError {
    fn from(error: object_store::Error) -> Self {
        match error {
            object_store::Error::NotFound { path, .. } => ObjectsError::NotFound(path),
            other => ObjectsError::Failed(other.to_string()),
        }
    }
}

/// What a pass of the sweep did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Swept {
    /// Jobs that have objects, in the part that was looked at.
    pub jobs: usize,
    /// Jobs whose objects were removed.
    pub removed: usize,
}

/// A store of objects, cheap to clone.
#[derive(Debug, Clone)]
pub struct Objects {
    store: Arc<dyn ObjectStore>,
    /// What the names stand below.
    root: Path,
    /// The folder, where it is one.
    folder: Option<PathBuf>,
    max_object_bytes: u64,
}

impl Objects {
    /// Opens the store that the configuration names. Nothing is written or connected to yet.
    pub fn open(config: &ObjectsConfig) -> Result<Self, ObjectsError> {
        let max_object_bytes = config.max_object_bytes.0;
        let Some(folder) = config.folder() else { return Self::bucket(config, max_object_bytes) };
        let root = Path::from_absolute_path(&folder)
            .map_err(|fault| Fault::new("objects.url", format!("names no folder: {fault}")))?;
        // Flushed to the disk: a job that says where its result is keeps the promise through a loss of power.
        let store = Arc::new(LocalFileSystem::new().with_fsync(true));
        Ok(Self { store, root, folder: Some(folder), max_object_bytes })
    }

    #[cfg(feature = "s3")]
    fn bucket(config: &ObjectsConfig, max_object_bytes: u64) -> Result<Self, ObjectsError> {
        let url = config.url.expose();
        let fault = |error: object_store::Error| Fault::new("objects.url", format!("cannot be used: {error}"));
        // Credentials, region and endpoint come from the AWS_… variables, or from the machine's role.
        let store = object_store::aws::AmazonS3Builder::from_env().with_url(url).build().map_err(fault)?;
        let prefix = url.strip_prefix("s3://").and_then(|rest| rest.split_once('/')).map_or("", |(_, prefix)| prefix);
        Ok(Self { store: Arc::new(store), root: Path::from(prefix), folder: None, max_object_bytes })
    }

    #[cfg(not(feature = "s3"))]
    fn bucket(_: &ObjectsConfig, _: u64) -> Result<Self, ObjectsError> {
        Err(Fault::new("objects.url", "names a bucket, and this program was built without the feature s3").into())
    }

    /// Keeps a task's result, and returns its name. The same call again does the same.
    pub async fn put_result(
        &self,
        job: &JobId,
        run: u64,
        fence: Fence,
        bytes: Vec<u8>,
    ) -> Result<String, ObjectsError> {
        self.put(job, format!("{run}-{fence}-result"), bytes).await
    }

    /// Keeps one of a task's output files, and returns its name. The same call again does the same. The logical name may be
    /// any text: what is kept under is made of its digest.
    pub async fn put_file(
        &self,
        job: &JobId,
        run: u64,
        fence: Fence,
        logical_name: &str,
        bytes: Vec<u8>,
    ) -> Result<String, ObjectsError> {
        self.put(job, format!("{run}-{fence}-file-{}", digest_of(logical_name)), bytes).await
    }

    /// Keeps an output file of a batch, and returns its name and its size. It is read from a local file, a piece at a time, so
    /// it may be of any size. The name tells of batch and logical name alone: the same again replaces it.
    pub async fn put_batch_file(
        &self,
        batch: &JobId,
        logical_name: &str,
        from: &std::path::Path,
    ) -> Result<(String, u64), ObjectsError> {
        let name = format!("{}/batch-file-{}", home(batch), digest_of(logical_name));
        let bytes = self.put_named(&name, from).await?;
        Ok((name, bytes))
    }

    /// Keeps a local file of any size under a name of the caller's, and returns its size. The same again replaces it. The sweep leaves
    /// names alone that are not those of jobs: their first part has not two letters.
    pub async fn put_named(&self, name: &str, from: &std::path::Path) -> Result<u64, ObjectsError> {
        if let Some(folder) = self.folder.clone() {
            make_folder(folder).await?;
        }
        let failed = |error: std::io::Error| ObjectsError::Failed(error.to_string());
        let mut file = tokio::fs::File::open(from).await.map_err(failed)?;
        let mut upload = WriteMultipart::new(self.store.put_multipart(&self.place(name)).await?);
        let mut piece = vec![0; PIECE_BYTES];
        let mut bytes = 0;
        loop {
            let read = file.read(&mut piece).await.map_err(failed)?;
            if read == 0 {
                break;
            }
            upload.wait_for_capacity(1).await?;
            upload.write(&piece[..read]);
            bytes += read as u64;
        }
        upload.finish().await?;
        Ok(bytes)
    }

    /// Copies an object of a job, a piece at a time. Returns how many bytes it has.
    pub async fn copy_to<W>(&self, job: &JobId, name: &str, into: &mut W) -> Result<u64, ObjectsError>
    where
        W: tokio::io::AsyncWrite + Unpin,
    {
        let mut pieces = self.find(job, name).await?.into_stream();
        let mut bytes = 0;
        while let Some(piece) = pieces.try_next().await? {
            into.write_all(&piece).await.map_err(|error| ObjectsError::Failed(error.to_string()))?;
            bytes += piece.len() as u64;
        }
        into.flush().await.map_err(|error| ObjectsError::Failed(error.to_string()))?;
        Ok(bytes)
    }

    async fn put(&self, job: &JobId, part: String, bytes: Vec<u8>) -> Result<String, ObjectsError> {
        let (size, limit) = (bytes.len() as u64, self.max_object_bytes);
        if size > limit {
            return Err(ObjectsError::TooLarge { bytes: size, limit });
        }
        if let Some(folder) = self.folder.clone() {
            make_folder(folder).await?;
        }
        let name = format!("{}/{part}", home(job));
        self.store.put(&self.place(&name), bytes.into()).await?;
        Ok(name)
    }

    /// An object of a job. Names come from hashes that others can write: one that is not the job's is not looked for.
    pub async fn get(&self, job: &JobId, name: &str) -> Result<Vec<u8>, ObjectsError> {
        let found = self.find(job, name).await?;
        let (bytes, limit) = (found.meta.size, self.max_object_bytes);
        if bytes > limit {
            return Err(ObjectsError::TooLarge { bytes, limit });
        }
        Ok(found.bytes().await?.to_vec())
    }

    async fn find(&self, job: &JobId, name: &str) -> Result<GetResult, ObjectsError> {
        let missing = || ObjectsError::NotFound(name.to_owned());
        let part = name.strip_prefix(&format!("{}/", home(job))).ok_or_else(missing)?;
        if part.is_empty() || !part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
            return Err(missing());
        }
        match self.store.get(&self.place(name)).await {
            Err(object_store::Error::NotFound { .. }) => Err(missing()),
            found => Ok(found?),
        }
    }

    /// Removes all objects of a job, also what a writer that was killed has left.
    pub async fn delete_of(&self, job: &JobId) -> Result<(), ObjectsError> {
        let mut found = self.store.list(Some(&self.place(&home(job))));
        while let Some(object) = found.try_next().await? {
            match self.store.delete(&object.location).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        // What was begun and not finished is no object, and no folder is one.
        if let Some(folder) = &self.folder {
            match tokio::fs::remove_dir_all(folder.join(home(job))).await {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(ObjectsError::Failed(error.to_string()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// One pass over one part of the store: removes the objects of jobs that have no record any more, where none of them was
    /// written within `grace`. `exists` says for each id whether there is a record; an error leaves the rest to another
    /// pass. After [`SHARDS`] passes, each with its own `shard`, all objects were looked at.
    ///
    /// A store belongs to one Redis: another's jobs have no record in this one.
    pub async fn sweep<F>(
        &self,
        shard: u16,
        grace: Duration,
        exists: impl Fn(Vec<JobId>) -> F,
    ) -> Result<Swept, ObjectsError>
    where
        F: Future<Output = Result<Vec<bool>, Error>>,
    {
        let shard = self.place(&format!("{:02x}", shard % SHARDS));
        let homes = match self.store.list_with_delimiter(Some(&shard)).await {
            Err(object_store::Error::NotFound { .. }) => return Ok(Swept::default()),
            found => found?.common_prefixes,
        };
        // What is no home of a job was put there by others, and is left alone.
        let id = |place: &Path| JobId::new(place.filename()?.strip_prefix("j-")?).ok();
        let ids: Vec<JobId> = homes.iter().filter_map(id).collect();
        let mut swept = Swept { jobs: ids.len(), removed: 0 };
        for page in ids.chunks(ASKED_AT_ONCE) {
            let there = exists(page.to_vec()).await?;
            for (id, _) in page.iter().zip(there).filter(|(_, there)| !there) {
                if !self.written_since(id, SystemTime::now() - grace).await? {
                    self.delete_of(id).await?;
                    swept.removed += 1;
                }
            }
        }
        Ok(swept)
    }

    /// Whether anything of a job was written since a time.
    async fn written_since(&self, job: &JobId, time: SystemTime) -> Result<bool, ObjectsError> {
        let mut found = self.store.list(Some(&self.place(&home(job))));
        while let Some(object) = found.try_next().await? {
            if SystemTime::from(object.last_modified) >= time {
                return Ok(true);
            }
        }
        // Of what is being written just now, the folder tells.
        let Some(folder) = &self.folder else { return Ok(false) };
        let about = tokio::fs::metadata(folder.join(home(job))).await.and_then(|about| about.modified());
        Ok(about.is_ok_and(|modified| modified >= time))
    }

    fn place(&self, name: &str) -> Path {
        name.split('/').fold(self.root.clone(), |place, part| place.join(part))
    }
}

/// A part of an object's name that stands for a logical name, which may be any text.
fn digest_of(logical_name: &str) -> String {
    Sha256::digest(logical_name).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What the names of a job's objects begin with. Its first part spreads jobs evenly; the `j-` makes an id of dots a name.
fn home(job: &JobId) -> String {
    format!("{:02x}/j-{job}", Sha256::digest(job.as_str())[0])
}

/// Makes the folder, for our own user alone, if it is not there.
async fn make_folder(folder: PathBuf) -> Result<(), ObjectsError> {
    if tokio::fs::try_exists(&folder).await.unwrap_or(false) {
        return Ok(());
    }
    let mut builder = tokio::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    builder.mode(0o700);
    let made = builder.create(&folder).await;
    made.map_err(|fault| ObjectsError::Failed(format!("cannot make the folder {}: {fault}", folder.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ByteSize, Url};

    struct Rig {
        folder: tempfile::TempDir,
        objects: Objects,
    }

    fn rig() -> Rig {
        let folder = tempfile::tempdir().unwrap();
        let url = Url::new(format!("file://{}/a b/objects", folder.path().display()));
        let config = ObjectsConfig { url, max_object_bytes: ByteSize(1_000), ..ObjectsConfig::default() };
        config.validate().unwrap();
        let objects = Objects::open(&config).unwrap();
        Rig { folder, objects }
    }

    impl Rig {
        /// All files below the folder.
        fn files(&self) -> Vec<PathBuf> {
            let mut folders = vec![self.folder.path().to_owned()];
            let mut files = Vec::new();
            while let Some(folder) = folders.pop() {
                for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
                    if path.is_dir() { folders.push(path) } else { files.push(path) }
                }
            }
            files
        }

        fn home(&self, job: &JobId) -> PathBuf {
            self.folder.path().join("a b/objects").join(home(job))
        }

        async fn sweep(&self, grace: Duration, living: &[&JobId]) -> usize {
            let exists = async |ids: Vec<JobId>| Ok(ids.iter().map(|id| living.contains(&id)).collect());
            let mut removed = 0;
            for shard in 0..SHARDS {
                removed += self.objects.sweep(shard, grace, exists).await.unwrap().removed;
            }
            removed
        }
    }

    fn job(id: &str) -> JobId {
        JobId::new(id).unwrap()
    }

    #[tokio::test]
    async fn what_is_kept_is_given_back_under_a_name_that_depends_on_job_and_fence_alone() {
        let rig = rig();
        for id in ["0193b7c2-aaaa", ".", "..", "a:b", &"x".repeat(128)] {
            let id = job(id);
            let name = rig.objects.put_result(&id, 1, Fence(7), b"one".to_vec()).await.unwrap();
            assert_eq!(rig.objects.put_result(&id, 1, Fence(7), b"one".to_vec()).await.unwrap(), name);
            let later = rig.objects.put_result(&id, 1, Fence(8), b"two".to_vec()).await.unwrap();
            assert_eq!(rig.objects.get(&id, &name).await.unwrap(), b"one");
            assert_eq!(rig.objects.get(&id, &later).await.unwrap(), b"two");
        }
        assert_eq!(rig.files().len(), 10);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let about = std::fs::metadata(rig.folder.path().join("a b/objects")).unwrap();
            assert_eq!(about.permissions().mode() & 0o777, 0o700);
        }
    }

    #[tokio::test]
    async fn no_logical_name_leads_out_of_the_job_s_own_place() {
        let rig = rig();
        let id = job("j");
        for name in ["report.csv", "../../../x", "/etc/passwd", "a/b", "*", "", "\0", "käse", &"x".repeat(10_000)] {
            let object = rig.objects.put_file(&id, 1, Fence(7), name, name.as_bytes().to_vec()).await;
            let object = match name.len() {
                10_000 => {
                    assert!(matches!(object, Err(ObjectsError::TooLarge { bytes: 10_000, limit: 1_000 })));
                    rig.objects.put_file(&id, 1, Fence(7), name, b"long".to_vec()).await.unwrap()
                }
                _ => object.unwrap(),
            };
            assert!(rig.objects.get(&id, &object).await.is_ok(), "{name}");
        }
        assert_eq!(rig.files().len(), 9);
        assert!(rig.files().iter().all(|file| file.parent() == Some(&rig.home(&id))));
    }

    #[tokio::test]
    async fn a_name_that_a_hash_claims_reaches_nothing_of_others() {
        let rig = rig();
        let (mine, other) = (job("mine"), job("other"));
        let name = rig.objects.put_result(&other, 1, Fence(7), b"secret".to_vec()).await.unwrap();
        rig.objects.put_result(&mine, 1, Fence(7), b"mine".to_vec()).await.unwrap();
        let home = home(&mine);
        std::fs::write(rig.folder.path().join("outside"), "secret").unwrap();
        for name in [
            name.clone(),
            format!("{home}/../../{name}"),
            format!("{home}/../../../../outside"),
            format!("{home}//etc/passwd"),
            "/etc/passwd".into(),
            home.clone(),
            format!("{home}/"),
            format!("{home}/1-8-result"),
            String::new(),
        ] {
            let refused = rig.objects.get(&mine, &name).await;
            assert!(matches!(refused, Err(ObjectsError::NotFound(_))), "{name}: {refused:?}");
        }
    }

    #[tokio::test]
    async fn objects_live_as_long_as_their_job_has_a_record() {
        let rig = rig();
        let (living, gone, begun) = (job("living"), job("gone"), job("begun"));
        for id in [&living, &gone] {
            rig.objects.put_result(id, 1, Fence(7), b"r".to_vec()).await.unwrap();
            rig.objects.put_file(id, 1, Fence(7), "f", b"f".to_vec()).await.unwrap();
        }
        // What a killed writer leaves is no object, and goes like one.
        std::fs::create_dir_all(rig.home(&begun)).unwrap();
        std::fs::write(rig.home(&begun).join("1-7-result#1"), "half").unwrap();
        assert!(rig.objects.get(&begun, &format!("{}/1-7-result", home(&begun))).await.is_err());
        // What is not ours is left alone.
        let stranger = rig.home(&living).parent().unwrap().join("notes.txt");
        std::fs::write(&stranger, "x").unwrap();

        assert_eq!(rig.sweep(Duration::from_secs(3_600), &[&living]).await, 0, "all is young");
        assert_eq!(rig.files().len(), 6);
        let unknown = async |_: Vec<JobId>| Err(Error::Unavailable("away".into()));
        let shard = u16::from(Sha256::digest("gone")[0]);
        assert!(rig.objects.sweep(shard, Duration::ZERO, unknown).await.is_err());
        assert_eq!(rig.files().len(), 6, "who can't ask removes nothing");
        assert_eq!(rig.sweep(Duration::ZERO, &[&living]).await, 2);
        assert!(rig.files().iter().all(|file| *file == stranger || file.parent() == Some(&rig.home(&living))));
        assert_eq!(rig.files().len(), 3);
        rig.objects.delete_of(&living).await.unwrap();
        rig.objects.delete_of(&living).await.unwrap();
        assert_eq!(rig.files(), [stranger]);
        // Where nothing was ever kept there is nothing to sweep.
        let empty = super::tests::rig();
        assert_eq!(empty.sweep(Duration::ZERO, &[]).await, 0);
    }

    #[test]
    fn places_that_can_not_be_used_are_refused_by_their_key() {
        let of = |url: &str| ObjectsConfig { url: Url::new(url), ..ObjectsConfig::default() };
        for bad in ["", "file://", "file:///", "file://x/y", "s3://", "s3:///x", "/var/lib", "http://h/b"] {
            assert_eq!(of(bad).validate().unwrap_err().key, "objects.url", "{bad}");
        }
        for good in ["file:///var/lib/drayman/objects", "s3://bucket", "s3://bucket/prefix"] {
            assert_eq!(of(good).validate(), Ok(()), "{good}");
        }
        let large = ObjectsConfig { max_inline_bytes: ByteSize(65_537), ..ObjectsConfig::default() };
        assert_eq!(large.validate().unwrap_err().key, "objects.max_inline_bytes");
        #[cfg(not(feature = "s3"))]
        {
            let refused = Objects::open(&of("s3://bucket")).unwrap_err();
            assert!(refused.to_string().contains("without the feature s3"), "{refused}");
        }
    }
}
