//! A claim: one file, in the hands of one daemon at a time, however many look at its folder.
//!
//! Whoever renames a file out of its folder has it. It lies in a place of its own then, beside a lock that its holder keeps:
//!
//! ```text
//! FOLDER/.drayman/0193b7c2-…/lock      held by the living daemon that works on it
//!                            name      where below FOLDER it lay
//!                            file      the file
//!                            bad       lines that could not be used, as they are found
//!                            verdict   what became of it and which name it gets, once that is decided
//! ```
//!
//! The lock of a daemon that dies is free, and whoever gets it goes on where the other was. The name of the place is the id of the
//! batch, so that a file that is handed over twice is one batch; and a file that comes again under the same name is another.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc::O_NOFOLLOW;
use queue_core::ids::JobId;
use serde::{Deserialize, Serialize};

/// The folder of claims, in the watched folder: only there a rename moves a file at once and whole.
const CLAIMS: &str = ".drayman";

/// What became of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// It is a batch now.
    Good {
        /// How many rows it has.
        rows: u64,
        /// How many lines of the file could not be used.
        bad_lines: u64,
    },
    /// It can't be one.
    Bad {
        /// Why.
        reason: String,
    },
}

/// A verdict, and the name with which the file goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decided {
    /// What became of it.
    pub verdict: Verdict,
    /// Its batch's id is put behind its name, for there is another file of that name. Not decided yet, if it is not said.
    pub is_renamed: Option<bool>,
}

/// A file that is ours, until this is dropped or the process ends.
#[derive(Debug)]
pub struct Claim {
    token: JobId,
    folder: PathBuf,
    place: PathBuf,
    name: PathBuf,
    _lock: File,
}

impl Claim {
    /// Takes a file out of its folder. `None` if another was faster.
    pub fn take(folder: &Path, name: &Path) -> io::Result<Option<Self>> {
        if folder.join(CLAIMS).symlink_metadata().is_ok_and(|claims| !claims.is_dir()) {
            return Err(io::Error::new(ErrorKind::NotADirectory, format!("{CLAIMS} is no folder")));
        }
        let token = JobId::generate();
        let place = folder.join(CLAIMS).join(token.as_str());
        DirBuilder::new().recursive(true).mode(0o750).create(&place)?;
        let lock = match OpenOptions::new().write(true).create_new(true).mode(0o640).open(place.join("lock")) {
            Ok(lock) if lock.try_lock().is_ok() => lock,
            // Somebody took the place for one that was left behind, and clears it up.
            Ok(_) => return Ok(None),
            Err(error) if matches!(error.kind(), ErrorKind::AlreadyExists | ErrorKind::NotFound) => return Ok(None),
            Err(error) => return Err(error),
        };
        let claim = Self { token, folder: folder.to_owned(), place, name: name.to_owned(), _lock: lock };
        let renamed =
            claim.write("name", name.as_os_str().as_bytes()).and_then(|()| fs::rename(folder.join(name), claim.file()));
        match renamed {
            Ok(()) => {
                // Through a loss of power, too: a file that is back in its folder would be taken for a new one.
                sync(&claim.place)?;
                sync(folder.join(name).parent().unwrap_or(folder))?;
                Ok(Some(claim))
            }
            Err(error) => {
                claim.clear()?;
                if error.kind() == ErrorKind::NotFound { Ok(None) } else { Err(error) }
            }
        }
    }

    /// The claims of daemons that are gone. They are ours now.
    pub fn left_behind(folder: &Path) -> io::Result<Vec<Self>> {
        let places = match fs::read_dir(folder.join(CLAIMS)) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            places => places?,
        };
        let mut claims = Vec::new();
        for place in places {
            let place = place?.path();
            let token = place.file_name().and_then(OsStr::to_str).and_then(|token| JobId::new(token).ok());
            let Some(token) = token else { continue };
            match Self::adopt(folder, &place, token) {
                Ok(claim) => claims.extend(claim),
                Err(error) => {
                    tracing::warn!(place = %place.display(), %error, "a claim that was left behind can't be taken up")
                }
            }
        }
        Ok(claims)
    }

    fn adopt(folder: &Path, place: &Path, token: JobId) -> io::Result<Option<Self>> {
        let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o640).open(place.join("lock"));
        let lock = match lock {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            lock => lock?,
        };
        // Held: its daemon is alive. That goes for our own, too.
        if lock.try_lock().is_err() {
            return Ok(None);
        }
        let name = match fs::read(place.join("name")) {
            Ok(name) => PathBuf::from(OsStr::from_bytes(&name)),
            // Nothing that a daemon leaves behind: a file without a name keeps that of its place.
            Err(error) if error.kind() == ErrorKind::NotFound => PathBuf::from(token.as_str()),
            Err(error) => return Err(error),
        };
        let claim = Self { token, folder: folder.to_owned(), place: place.to_owned(), name, _lock: lock };
        if claim.has_file() || claim.decided()?.is_some() {
            return Ok(Some(claim));
        }
        // Its daemon had not got as far as the file, or was done with it.
        claim.clear()?;
        Ok(None)
    }

    /// The id of the batch that the file becomes.
    pub fn token(&self) -> &JobId {
        &self.token
    }

    /// The folder that it came into.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where below its folder it lay.
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// Where the file lies now.
    pub fn file(&self) -> PathBuf {
        self.place.join("file")
    }

    /// Where lines are written that could not be used.
    pub fn bad_lines(&self) -> PathBuf {
        self.place.join("bad")
    }

    /// Whether the file lies here, or went where it goes.
    pub fn has_file(&self) -> bool {
        self.file().symlink_metadata().is_ok()
    }

    /// Opens the file. What is no file, but a link to one, is refused.
    pub fn open(&self) -> io::Result<File> {
        if !self.file().symlink_metadata()?.is_file() {
            return Err(io::Error::new(ErrorKind::InvalidInput, "it is no regular file"));
        }
        OpenOptions::new().read(true).custom_flags(O_NOFOLLOW).open(self.file())
    }

    /// What was decided of it, by whoever.
    pub fn decided(&self) -> io::Result<Option<Decided>> {
        match fs::read(self.place.join("verdict")) {
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(io::Error::from),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes down what is decided of it, so that nobody decides again.
    pub fn decide(&self, decided: &Decided) -> io::Result<()> {
        let text = serde_json::to_vec(decided).map_err(io::Error::from)?;
        self.write("verdict.new", &text)?;
        fs::rename(self.place.join("verdict.new"), self.place.join("verdict"))?;
        sync(&self.place)
    }

    /// Removes the place, and what is left there.
    pub fn clear(&self) -> io::Result<()> {
        // First what would be gone on with: who finds the rest has nothing to do.
        match fs::remove_file(self.place.join("verdict")) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => fs::remove_dir_all(&self.place),
        }
    }

    fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o640).open(self.place.join(name))?;
        file.write_all(bytes)?;
        file.sync_all()
    }
}

/// Writes to the disk what stands in a folder.
pub fn sync(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// When a file was last changed in any way, also by whoever gave it an older date.
pub fn changed_at(metadata: &fs::Metadata) -> std::time::SystemTime {
    let since = std::time::Duration::new(metadata.ctime().max(0).cast_unsigned(), metadata.ctime_nsec().max(0) as u32);
    std::time::UNIX_EPOCH + since
}
