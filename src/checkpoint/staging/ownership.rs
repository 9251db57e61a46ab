//! Whether a staging folder is ours. What we make holds a marker before anything else, and regular files and folders only:
//! a folder without it, or with a link in it, was put there by someone, and isn't touched.

use std::fs::{self, Metadata};
use std::io;
use std::path::Path;

use super::disk;
use crate::error::{Error, IoContext, Result};

/// The marker's name, and what it says.
const MARKER_NAME: &str = "prequant";
const MARKER_TEXT: &[u8] =
    b"A staging folder of prequant. It holds what isn't finished; to start over, remove all of it.\n";

/// More folders in each other than this are none of ours.
const MAX_DEPTH: usize = 16;

/// Marks a folder that was just made as ours.
pub(super) fn mark(folder: &Path) -> Result<()> {
    disk::write(&folder.join(MARKER_NAME), |file| file.write_all(MARKER_TEXT)).map(|_| ())
}

/// Checks that `folder` is a folder of ours, if anything is there; returns whether it is there and marked. One that is
/// empty, or was left while it was being marked, is ours to mark.
///
/// # Errors
/// When it isn't a folder, or holds something and no marker.
pub(super) fn is_ours(folder: &Path) -> Result<bool> {
    match disk::kind(folder)? {
        None => return Ok(false),
        Some(kind) if !kind.is_dir() => return Err(not_ours(folder, "it is a link or a file, and no folder")),
        Some(_) => {}
    }
    let marker = disk::read_if_there(&folder.join(MARKER_NAME))?.unwrap_or_default();
    if marker == MARKER_TEXT {
        return Ok(true);
    }
    let others = fs::read_dir(folder).at(folder, "list it")?.filter(|entry| {
        let is_marker = |entry: &fs::DirEntry| entry.file_name() == MARKER_NAME && MARKER_TEXT.starts_with(&marker);
        !entry.as_ref().is_ok_and(is_marker)
    });
    match others.count() {
        0 => Ok(false),
        _ => Err(not_ours(folder, "it has something in it, but not the marker that prequant writes first")),
    }
}

/// Checks that nothing in `folder`, which is ours, leads out of it.
///
/// # Errors
/// When there is something that we never make: a link, also a hard one, a pipe, a device.
pub(super) fn check_tree(folder: &Path) -> Result<()> {
    check_below(folder, 0)
}

fn check_below(folder: &Path, depth: usize) -> Result<()> {
    for entry in fs::read_dir(folder).at(folder, "list it")? {
        let path = entry.at(folder, "list it")?.path();
        let metadata = path.symlink_metadata().at(&path, "look at it")?;
        if metadata.is_dir() && depth < MAX_DEPTH {
            check_below(&path, depth + 1)?;
        } else if !is_plain_file(&metadata) {
            return Err(not_ours(&path, "it is a link, or something else that prequant never makes"));
        }
    }
    Ok(())
}

/// Whether it is a regular file with one name.
pub(super) fn is_plain_file(metadata: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    metadata.is_file() && metadata.nlink() == 1
}

/// Removes all that is in `folder`, which is ours, but files called one of `kept` and the marker.
pub(super) fn clear(folder: &Path, kept: &[&str]) -> Result<()> {
    for entry in fs::read_dir(folder).at(folder, "list it")? {
        let entry = entry.at(folder, "list it")?;
        let (path, name) = (entry.path(), entry.file_name());
        if name == MARKER_NAME || kept.iter().any(|kept| name == *kept) {
            continue;
        }
        match disk::kind(&path)? {
            Some(kind) if kind.is_dir() => disk::remove_folder(&path)?,
            _ => disk::remove_if_there(&path)?,
        }
    }
    Ok(())
}

/// Removes `folder` if it is ours, the marker last: what is left when this is cut short is still known as ours.
pub(super) fn remove(folder: &Path) -> Result<()> {
    if disk::kind(folder)?.is_none() {
        return Ok(());
    }
    is_ours(folder)?;
    clear(folder, &[])?;
    disk::remove_if_there(&folder.join(MARKER_NAME))?;
    match fs::remove_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.at(folder, "remove it"),
    }
}

#[cfg(test)]
pub(super) fn mark_new(folder: &Path) {
    fs::create_dir(folder).unwrap();
    mark(folder).unwrap();
}

fn not_ours(path: &Path, why: &str) -> Error {
    Error::destination(path, format!("{why}: prequant didn't make it and won't touch it; move it away"))
}
