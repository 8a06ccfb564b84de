//! That no two executions of a job run at once.
//!
//! Every execution holds a session advisory lock on the job and bears the job's id and its own fence as its
//! `application_name`. Who finds the lock taken terminates the backends of the job that have no greater fence, after
//! asking whether its own claim still stands, and waits for the lock: PostgreSQL frees it when the backend is gone. A user's
//! text can give the lock away (`pg_advisory_unlock_all`), so names count too. One that also changes its name is found by
//! nobody; what it wrote is still refused when it notes its transaction under a claim that is gone.
//!
//! Connections must be direct or through a pooler that keeps one server connection for each of ours: session locks mean
//! nothing otherwise.

use queue_core::ids::{Fence, JobId};
use sha2::{Digest, Sha256};

/// PostgreSQL cuts names behind this many bytes (`NAMEDATALEN` - 1).
const NAME_MAX_BYTES: usize = 63;

/// How one execution is known to the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    /// The connection's `application_name`, `drayman:<job>:<fence>`.
    pub name: String,
    /// Key of the advisory lock: the first 64 bits of SHA-256 over `drayman:<job>`, as a big-endian signed integer.
    pub key: i64,
    /// A condition on `pg_stat_activity` for other backends of the same job.
    others: String,
    fence: Fence,
}

impl Identity {
    pub fn new(job: &JobId, fence: Fence) -> Self {
        let digest = Sha256::digest(format!("drayman:{job}"));
        let mut key = [0; 8];
        key.copy_from_slice(&digest[..8]);
        // An id too long for a name is replaced by its hash, which '~' tells from an id: no id holds one. The whole fence
        // must fit always, since it is compared.
        let hashed: String = digest[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        let (plain, short) = (format!("drayman:{job}:"), format!("drayman:~{hashed}:"));
        let name = format!("{plain}{fence}");
        let name = if name.len() <= NAME_MAX_BYTES { name } else { format!("{short}{fence}") };
        // Neither form holds a quote. `left` and not LIKE: an id may hold '_'.
        let is = |prefix: &str| format!("pg_catalog.left(application_name, {}) = '{prefix}'", prefix.len());
        let others = format!("pid <> pg_catalog.pg_backend_pid() AND ({} OR {})", is(&plain), is(&short));
        Self { name, key: i64::from_be_bytes(key), others, fence }
    }

    /// Takes the lock if it is free; tells whether it is ours now. All that is asked where nothing tells of an earlier
    /// execution: a new backend would spend more time on planning a look at the others than on most statements.
    pub fn try_lock(&self) -> String {
        format!("SELECT pg_catalog.pg_try_advisory_lock({})", self.key)
    }

    /// Takes the lock if it is free; tells `(ours, others)`: whether it is ours now, and how many other backends of the job
    /// there are.
    pub fn lock(&self) -> String {
        let Self { key, others, .. } = self;
        format!(
            "SELECT pg_catalog.pg_try_advisory_lock({key}), pg_catalog.count(*) \
             FROM pg_catalog.pg_stat_activity WHERE {others}"
        )
    }

    /// Terminates the other backends of the job, except those of later claims.
    pub fn terminate_others(&self) -> String {
        let Self { others, fence, .. } = self;
        format!(
            "SELECT pg_catalog.count(pg_catalog.pg_terminate_backend(pid)) FROM pg_catalog.pg_stat_activity \
             WHERE {others} AND pg_catalog.substring(application_name, '[0-9]+$')::pg_catalog.numeric <= {fence}"
        )
    }

    /// Gives lock and name back at once, not when the backend is gone: the job's next statement may come sooner.
    pub fn release(&self) -> &'static str {
        "SELECT pg_catalog.set_config('application_name', 'drayman', false), pg_catalog.pg_advisory_unlock_all()"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_keys_are_stable() {
        let uuid = JobId::new("0190c7a2-7f6e-7b4c-8a5d-1f2e3d4c5b6a").unwrap();
        let identity = Identity::new(&uuid, Fence(1_760_000_000_000_000));
        assert_eq!(identity.name, "drayman:0190c7a2-7f6e-7b4c-8a5d-1f2e3d4c5b6a:1760000000000000");
        // Fixed for ever: workers of different versions must agree. `printf drayman:a | sha256sum`.
        assert_eq!(Identity::new(&JobId::new("a").unwrap(), Fence(1)).key, KEY_OF_A);
        for job in ["a".repeat(128), "a".repeat(36), "b".repeat(128)] {
            for fence in [1, u64::MAX] {
                let name = Identity::new(&JobId::new(job.clone()).unwrap(), Fence(fence)).name;
                assert!(name.len() <= NAME_MAX_BYTES && name.ends_with(&format!(":{fence}")), "{name}");
            }
        }
        let name = |job: String| Identity::new(&JobId::new(job).unwrap(), Fence(1)).name;
        assert_ne!(name("a".repeat(128)), name("a".repeat(127)));
    }

    const KEY_OF_A: i64 = 0x0c89_78b3_290e_4d67;
}
