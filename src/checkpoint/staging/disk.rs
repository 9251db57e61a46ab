//! The calls on the file system between which a crash can fall. Nothing here follows a link in its last part, and no
//! error is taken for "not there". In tests every call is recorded.

use std::fs::{self, File, FileType};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use crate::error::{IoContext, Result};
use crate::store::{HashingWriter, Sha256Hash};

/// What is at `path` itself, links not followed; `None` if nothing is.
pub(super) fn kind(path: &Path) -> Result<Option<FileType>> {
    match path.symlink_metadata() {
        Ok(metadata) => Ok(Some(metadata.file_type())),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(error).at(path, "look at it"),
    }
}

/// Whether a regular file is at `path`, and no link to one.
pub(super) fn is_file(path: &Path) -> Result<bool> {
    Ok(kind(path)?.is_some_and(|kind| kind.is_file()))
}

/// The content of a file; `None` if there is none. A link is none.
pub(super) fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>> {
    match is_file(path)? {
        true => fs::read(path).at(path, "read it").map(Some),
        false => Ok(None),
    }
}

/// Makes a folder, unless it is there.
pub(super) fn make_folder(path: &Path) -> Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => {
            record("mkdir", path);
            made.at(path, "make it")
        }
    }
}

/// Makes the folders above `path` that aren't there, below `root`, which is.
pub(super) fn make_parents(root: &Path, path: &Path) -> Result<()> {
    let Some(parent) = path.parent().filter(|parent| *parent != root && parent.starts_with(root)) else {
        return Ok(());
    };
    make_parents(root, parent)?;
    make_folder(parent)
}

/// Writes and syncs a new file in one go; what was there before is removed, not written into. Returns its size and its
/// hash.
pub(super) fn write(path: &Path, content: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(u64, Sha256Hash)> {
    remove_if_there(path)?;
    let file = File::options().write(true).create_new(true).open(path).at(path, "create it")?;
    record("create", path);
    let mut writer = BufWriter::with_capacity(1 << 16, HashingWriter::new(&file));
    content(&mut writer).and_then(|()| writer.flush()).at(path, "write it")?;
    file.sync_all().at(path, "sync it")?;
    record("fsync", path);
    Ok(writer.get_ref().finish())
}

/// Gives a file another name, in whatever folder; what had that name is gone.
pub(super) fn rename(from: &Path, to: &Path, action: &'static str) -> Result<()> {
    fs::rename(from, to).at(from, action)?;
    record("rename", to);
    Ok(())
}

/// Removes a file or a link.
pub(super) fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => {
            record("unlink", path);
            removed.at(path, "remove it")
        }
    }
}

/// Removes a folder with all that is in it; a link is removed, and nothing behind it.
pub(super) fn remove_folder(path: &Path) -> Result<()> {
    record("rmdir", path);
    fs::remove_dir_all(path).at(path, "remove what an earlier run left")
}

/// Waits until the names in a folder are on the disk.
pub(super) fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).at(folder, "sync it")?;
    record("fsync", folder);
    Ok(())
}

#[cfg(not(test))]
fn record(_: &'static str, _: &Path) {}

#[cfg(test)]
pub(super) use recorded::{calls, die_after, record};

#[cfg(test)]
mod recorded {
    use std::cell::{Cell, RefCell};
    use std::path::{Path, PathBuf};

    thread_local! {
        static CALLS: RefCell<Vec<(&'static str, PathBuf)>> = const { RefCell::new(Vec::new()) };
        static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
    }

    pub(in crate::checkpoint::staging) fn record(call: &'static str, path: &Path) {
        CALLS.with_borrow_mut(|calls| calls.push((call, path.to_owned())));
        let Some(left) = LEFT.get() else { return };
        match left.checked_sub(1) {
            Some(left) => LEFT.set(Some(left)),
            None => std::panic::resume_unwind(Box::new("killed")), // without a word, unlike `panic!`
        }
    }

    /// What this thread has called since it was last asked.
    pub(in crate::checkpoint::staging) fn calls() -> Vec<(&'static str, PathBuf)> {
        CALLS.take()
    }

    /// Has this thread panic once it has made so many calls; the one that it dies of is made.
    pub(in crate::checkpoint::staging) fn die_after(calls: Option<usize>) {
        LEFT.set(calls);
    }
}
