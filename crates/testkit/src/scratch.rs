//! Temporary folders that do not pile up.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::time::Duration;

use nix::sys::statvfs::statvfs;
use tempfile::TempDir;

const PREFIX: &str = "drayman-test-";
const LOCK: &str = ".in-use";

/// A folder for one fixture, removed on drop.
///
/// A test that is killed cannot remove its folders, and a PostgreSQL cluster is not small: each folder holds a file
/// that its process keeps locked, and the first `Scratch` of a process removes the folders that nobody locks.
/// Its path is short enough for a Unix socket in it (108 bytes).
#[derive(Debug)]
pub struct Scratch {
    dir: TempDir,
    _lock: File,
}

impl Scratch {
    /// A new empty folder with `kind` in its name.
    pub fn new(kind: &str) -> Self {
        Self::new_in(&short_temp_dir(), kind)
    }

    /// The same in memory where the machine has a gigabyte to spare, for fixtures of many files: on a disk, making the
    /// thousand files of a PostgreSQL cluster was seen to take a second, in memory less than a tenth of it.
    pub(crate) fn in_memory(kind: &str) -> Self {
        let memory = Path::new("/dev/shm");
        match statvfs(memory) {
            Ok(fs) if fs.blocks_available() * fs.fragment_size() > 1 << 30 => Self::new_in(memory, kind),
            _ => Self::new(kind),
        }
    }

    fn new_in(base: &Path, kind: &str) -> Self {
        static SWEEP: Once = Once::new();
        SWEEP.call_once(|| [short_temp_dir().as_path(), Path::new("/dev/shm")].into_iter().for_each(sweep));
        let dir = tempfile::Builder::new()
            .prefix(&format!("{PREFIX}{kind}-"))
            .tempdir_in(base)
            .unwrap_or_else(|error| panic!("cannot make a folder in {}: {error}", base.display()));
        let lock = File::create(dir.path().join(LOCK)).expect("a lock file in a fresh folder");
        lock.lock().expect("a fresh file is not locked");
        Self { dir, _lock: lock }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// The system's temporary folder, or `/tmp` where that one's path is too long for Unix sockets.
pub(crate) fn short_temp_dir() -> PathBuf {
    let dir = std::env::temp_dir();
    if dir.as_os_str().len() <= 50 { dir } else { PathBuf::from("/tmp") }
}

fn sweep(base: &Path) {
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        // Between the making of a folder and its lock there is a moment.
        let old = entry.metadata().and_then(|m| m.modified()).ok().and_then(|t| t.elapsed().ok());
        if old.is_none_or(|age| age < Duration::from_secs(60)) {
            continue;
        }
        if File::open(entry.path().join(LOCK)).is_ok_and(|lock| lock.try_lock().is_ok()) {
            // What belongs to another account stays: that account's next test run removes it.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_removed_on_drop() {
        let scratch = Scratch::new("gone");
        let path = scratch.path().to_owned();
        fs::write(path.join("file"), "x").unwrap();
        drop(scratch);
        assert!(!path.exists());
    }

    #[test]
    fn the_sweep_removes_old_folders_that_nobody_locks() {
        let base = Scratch::new("sweep");
        let [live, dead, fresh, other] = ["drayman-test-live", "drayman-test-dead", "drayman-test-fresh", "other"]
            .map(|name| base.path().join(name));
        let long_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
        for dir in [&live, &dead, &fresh, &other] {
            fs::create_dir(dir).unwrap();
            fs::write(dir.join(LOCK), "").unwrap();
            if *dir != fresh {
                File::open(dir).unwrap().set_modified(long_ago).unwrap();
            }
        }
        let lock = File::open(live.join(LOCK)).unwrap();
        lock.lock().unwrap();
        sweep(base.path());
        assert!(live.exists() && fresh.exists() && other.exists());
        assert!(!dead.exists());
    }
}
