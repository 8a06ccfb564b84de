//! Which files lie in the watched folders and are to be taken.
//!
//! Only files are meant: no folders, no links, and nothing whose name, or a folder's on the way, begins with a dot.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use walkdir::{DirEntry, WalkDir};

use crate::claim::changed_at;
use crate::config::FolderConfig;

/// A file that is to be taken.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Found {
    /// The watched folder.
    pub folder: PathBuf,
    /// Its path below.
    pub name: PathBuf,
}

/// What the files of a folder mean: the first that wants one, decides.
pub fn config_of<'a>(folders: &'a [FolderConfig], folder: &Path, name: &Path) -> Option<&'a FolderConfig> {
    folders.iter().find(|config| config.folder == folder && config.pattern.wants(name))
}

/// The folders, each once.
pub fn each(folders: &[FolderConfig]) -> Vec<PathBuf> {
    let mut each: Vec<PathBuf> = Vec::new();
    for config in folders {
        if !each.contains(&config.folder) {
            each.push(config.folder.clone());
        }
    }
    each
}

/// The files of a folder that are old enough, in the order of their names, and what could not be looked at.
pub fn look(folders: &[FolderConfig], folder: &Path, now: SystemTime) -> (Vec<Found>, Vec<String>) {
    let depth = folders.iter().filter(|config| config.folder == folder).map(|config| config.pattern.depth()).max();
    let (mut found, mut faults) = (Vec::new(), Vec::new());
    let walk = WalkDir::new(folder).min_depth(1).max_depth(depth.unwrap_or(1)).sort_by_file_name();
    for entry in walk.into_iter().filter_entry(|entry| entry.depth() == 0 || !is_hidden(entry)) {
        let entry = match entry {
            Ok(entry) => entry,
            // Gone between two looks, as files do here.
            Err(error) if error.io_error().is_some_and(is_gone) && error.depth() > 0 => continue,
            Err(error) => {
                faults.push(error.to_string());
                continue;
            }
        };
        let Ok(name) = entry.path().strip_prefix(folder) else { continue };
        let Some(config) = entry.file_type().is_file().then(|| config_of(folders, folder, name)).flatten() else {
            continue;
        };
        let Ok(metadata) = entry.metadata() else { continue };
        // What was changed in the future will have been changed in the past some day.
        if now.duration_since(changed_at(&metadata)).is_ok_and(|age| age >= config.min_age) {
            found.push(Found { folder: folder.to_owned(), name: name.to_owned() });
        }
    }
    (found, faults)
}

fn is_hidden(entry: &DirEntry) -> bool {
    entry.file_name().as_encoded_bytes().starts_with(b".")
}

fn is_gone(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::NotFound
}
