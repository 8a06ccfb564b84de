//! Where a file goes once it is known what became of it: into the archive, or to those that failed, with a note beside it.
//!
//! A file never takes the place of another: where there is one of its name, it gets its batch's id behind it.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use queue_core::objects::Objects;

use crate::claim::{Claim, Decided, Verdict, sync};
use crate::config::{Destination, FolderConfig};

/// Moves the file to where it belongs, and writes a note beside it; says where. Whatever was done of that before, by this daemon or one
/// that is gone, is not done again.
pub async fn put(
    claim: &Arc<Claim>,
    verdict: &Verdict,
    config: &FolderConfig,
    objects: Option<&Objects>,
) -> io::Result<PathBuf> {
    // First of all: what follows may fail for days, and who comes back then must not hand the file over again.
    if claim.decided()?.is_none() {
        claim.decide(&Decided { verdict: verdict.clone(), is_renamed: None })?;
    }
    let destination = match verdict {
        Verdict::Good { .. } => &config.archive,
        Verdict::Bad { .. } => &config.failed,
    };
    match destination {
        Destination::Folder(to) => {
            let (claim, verdict, to) = (claim.clone(), verdict.clone(), config.folder.join(to));
            tokio::task::spawn_blocking(move || put_in_folder(&claim, &verdict, &to)).await.map_err(io::Error::other)?
        }
        Destination::Objects(prefix) => {
            let objects = objects.ok_or_else(|| io::Error::other("there is no object store"))?;
            let name = format!("{prefix}/{}/{}", claim.token(), shown(claim.name()));
            let put = |name: String, from: PathBuf| async move {
                objects.put_named(&name, &from).await.map(drop).map_err(io::Error::other)
            };
            if let Some(note) = note(claim, verdict)? {
                put(format!("{name}{}", note.ending), note.file).await?;
            }
            // What a link points to is nobody's to copy.
            if claim.open().is_ok() {
                put(name.clone(), claim.file()).await?;
            }
            Ok(name.into())
        }
        Destination::Delete => Ok(PathBuf::new()),
    }
}

fn put_in_folder(claim: &Claim, verdict: &Verdict, folder: &Path) -> io::Result<PathBuf> {
    let plain = folder.join(safe(claim.name()));
    let own = with_ending(&plain, &format!(".{}", claim.token()));
    let decide = |is_renamed| claim.decide(&Decided { verdict: verdict.clone(), is_renamed: Some(is_renamed) });
    let mut is_renamed = match claim.decided()?.and_then(|decided| decided.is_renamed) {
        Some(is_renamed) => is_renamed,
        None => {
            let is_renamed = plain.symlink_metadata().is_ok();
            decide(is_renamed)?;
            is_renamed
        }
    };
    let parent = plain.parent().unwrap_or(folder);
    fs::create_dir_all(parent)?;
    if claim.has_file() {
        if !is_renamed {
            match rename(&claim.file(), &plain, claim) {
                // Another has come here a moment ago.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    decide(true)?;
                    is_renamed = true;
                }
                renamed => renamed?,
            }
        }
        if is_renamed {
            rename(&claim.file(), &own, claim)?;
        }
    }
    let to = if is_renamed { own } else { plain.clone() };
    if let Some(note) = note(claim, verdict)? {
        move_over(&note.file, &with_ending(&to, note.ending), claim)?;
    }
    sync(parent)?;
    Ok(to)
}

/// What is to be known of a file beside its content.
struct Note {
    file: PathBuf,
    ending: &'static str,
}

/// The note, in a file of the claim's place.
fn note(claim: &Claim, verdict: &Verdict) -> io::Result<Option<Note>> {
    match verdict {
        Verdict::Bad { reason } => {
            let file = claim.bad_lines();
            let mut text = OpenOptions::new().write(true).create(true).truncate(true).mode(0o640).open(&file)?;
            writeln!(text, "{reason}")?;
            text.sync_all()?;
            Ok(Some(Note { file, ending: ".reason" }))
        }
        Verdict::Good { bad_lines: 0, .. } => Ok(None),
        // Moved already, if it is not there.
        Verdict::Good { .. } => {
            let file = claim.bad_lines();
            Ok(file.exists().then_some(Note { file, ending: ".bad.jsonl" }))
        }
    }
}

/// Moves a file where there is none.
fn rename(from: &Path, to: &Path, claim: &Claim) -> io::Result<()> {
    match rename_to_free(from, to) {
        Err(error) if error.kind() == ErrorKind::CrossesDevices => {
            claim.open()?;
            let part = part_of(to, claim);
            copy(from, &part)?;
            rename_to_free(&part, to)?;
            fs::remove_file(from)
        }
        renamed => renamed,
    }
}

fn rename_to_free(from: &Path, to: &Path) -> io::Result<()> {
    match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
        // A file system that can't say "where there is none": two daemons that give a name away at once are not told apart there.
        Err(Errno::EINVAL | Errno::ENOSYS) if to.symlink_metadata().is_err() => fs::rename(from, to),
        Err(Errno::EINVAL | Errno::ENOSYS) => Err(ErrorKind::AlreadyExists.into()),
        renamed => renamed.map_err(io::Error::from),
    }
}

/// Moves a file, also over one of the same name: notes are the file's whose name they begin with.
fn move_over(from: &Path, to: &Path, claim: &Claim) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() == ErrorKind::CrossesDevices => {
            let part = part_of(to, claim);
            copy(from, &part)?;
            fs::rename(part, to)?;
            fs::remove_file(from)
        }
        renamed => renamed,
    }
}

/// A hidden name beside the one that a file gets once it is whole.
fn part_of(to: &Path, claim: &Claim) -> PathBuf {
    let mut name = OsString::from(format!(".{}.", claim.token()));
    name.push(to.file_name().unwrap_or_default());
    to.with_file_name(name)
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::copy(from, to)?;
    File::open(to)?.sync_all()
}

fn with_ending(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// A name as people read it.
pub fn shown(name: &Path) -> String {
    name.to_string_lossy().into_owned()
}

/// A path that leads nowhere but down. What was read back from a claim's place may have been written by anybody.
fn safe(name: &Path) -> PathBuf {
    let parts: PathBuf = name.components().filter(|part| matches!(part, std::path::Component::Normal(_))).collect();
    if parts.as_os_str().is_empty() { "file".into() } else { parts }
}
