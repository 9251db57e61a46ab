//! Filling a destination so that no crash leaves a folder that looks whole, and nothing that isn't ours is touched.
//!
//! Everything is written to a staging folder inside the destination. The order, which every step below keeps:
//!
//! 1. The staging folder is made and marked as ours; `lock` is taken; `job` says what is being made.
//! 2. A file of weights is written and hashed as `partial/NAME`, and synced.
//! 3. The record `sealed/NAME`, which holds its hashes, is written and synced; then `partial/NAME` becomes `ready/NAME`.
//! 4. Side files, config.json, index, manifest and checksums are written and synced.
//! 5. `sealed` and `ready` are synced; the records `replacing` (with `force`) and `publishing` are written; what marks the old
//!    checkpoint as whole is removed, then those of its files that have no successor.
//! 6. The files move to the destination: weights and side files, then, after a sync of the folders, checksums, index,
//!    config.json, and after another the manifest. The staging folder gets another name, and goes.
//!
//! Killed before 5, the destination holds what it held and the staging folder. Killed in 5 or 6, it has no manifest and (but
//! for an instant) no config.json. Either way the same command resumes: sealed files are hashed again and kept, files
//! moved already are taken back, the rest is made anew.

mod disk;
mod ownership;
mod publish;
mod record;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::OFlags;

use crate::error::{Error, Hint, IoContext, Result};
use crate::store::{Location, Sha256Hash};
use publish::REPLACING_NAME;

/// The folder inside the destination that holds what isn't finished.
pub(crate) const STAGING_NAME: &str = ".prequant-staging";

/// The staging folder's name once it has served.
pub(crate) const DONE_NAME: &str = ".prequant-done";

/// Finished files, under the names that they will have.
const READY_FOLDER: &str = "ready";
/// Files of weights being written.
const PARTIAL_FOLDER: &str = "partial";
/// What is known of each finished file of weights.
const SEALED_FOLDER: &str = "sealed";

const LOCK_NAME: &str = "lock";
const JOB_NAME: &str = "job";

/// A destination being filled.
#[derive(Debug)]
pub(crate) struct Staging {
    /// Where files of weights are written through.
    place: Location,
    destination: PathBuf,
    folder: PathBuf,
    /// Folders that weren't there before, the innermost first.
    made: Vec<PathBuf>,
    /// Whether a checkpoint that is there is replaced: asked for now, or by the run that is resumed.
    force: bool,
    /// Held, by the operating system, as long as this process lives.
    _lock: File,
}

impl Staging {
    /// Whether a checkpoint can be put at `destination`; nothing is written.
    ///
    /// # Errors
    /// When it is a file, is `source`, lies in it or holds it, or has something in it already and `force` isn't set.
    pub(crate) fn check(destination: &Location, source: &Location, force: bool) -> Result<()> {
        let place = &resolve(local(destination)?)?;
        let source = match source.local() {
            Some(path) => Some(path.canonicalize().at(path, "open it")?),
            None => None, // in another store, nothing lies in the other
        };
        let overlap = source.and_then(|source| match (place.starts_with(&source), source.starts_with(place)) {
            (true, true) => Some("it is the source itself"),
            (true, false) => Some("it lies in the source"),
            (false, true) => Some("the source lies in it"),
            (false, false) => None,
        });
        let destination = destination.path();
        if let Some(what) = overlap {
            return Err(Error::destination(destination, format!("{what}; choose a folder elsewhere")));
        }
        let ours = [STAGING_NAME, DONE_NAME];
        let is_left_over = |entry: io::Result<fs::DirEntry>| {
            entry.is_ok_and(|entry| ours.iter().any(|name| entry.file_name() == *name))
        };
        match fs::read_dir(place) {
            Ok(mut entries) => {
                let (staging, done) = (place.join(STAGING_NAME), place.join(DONE_NAME));
                let (is_marked, _) = (ownership::is_ours(&staging)?, ownership::is_ours(&done)?);
                if force || is_marked && publish::has_begun(&staging)? || entries.all(is_left_over) {
                    return Ok(());
                }
                let why = "it exists and isn't empty".to_owned();
                Err(Error::Destination { path: destination.to_owned(), why, hint: Some(Hint::Replace) })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
                Err(Error::destination(destination, "it is a file, or below one; the destination is a folder"))
            }
            Err(error) => Err(error).at(destination, "list it"),
        }
    }

    /// The names of files at the destination that an earlier run put there, or was replacing.
    pub(crate) fn known_files(destination: &Location) -> Result<BTreeSet<String>> {
        let folder = resolve(local(destination)?)?.join(STAGING_NAME);
        match ownership::is_ours(&folder)? {
            true => publish::known(&folder),
            false => Ok(BTreeSet::new()),
        }
    }

    /// Takes the destination, after [`Staging::check`]: makes it and the staging folder in it, or resumes with those of
    /// an earlier run.
    ///
    /// # Errors
    /// When another process is at it.
    pub(crate) fn take(destination: &Location, source: &Location, force: bool) -> Result<Staging> {
        Self::check(destination, source, force)?;
        let path = resolve(local(destination)?)?;
        let (place, destination) = (destination.at(path.clone()), &path);
        ownership::remove(&destination.join(DONE_NAME))?;
        let made = make_folders(destination).map_err(|error| refused(destination, error))?;
        let folder = destination.join(STAGING_NAME);
        if !ownership::is_ours(&folder)? {
            disk::make_folder(&folder).map_err(|error| refused(destination, error))?;
            ownership::mark(&folder)?;
            disk::sync_folder(&folder)?;
            disk::sync_folder(destination)?;
        }
        let lock = take_lock(destination, &folder.join(LOCK_NAME))?;
        ownership::check_tree(&folder)?;
        let force = force || publish::has_begun(&folder)?;
        Ok(Staging { place, destination: destination.to_owned(), folder, made, force, _lock: lock })
    }

    /// Removes what a run left that was killed in its very last step.
    ///
    /// # Errors
    /// When it can't be, or isn't ours.
    pub(crate) fn tidy(destination: &Location) -> Result<()> {
        destination.local().map_or(Ok(()), |folder| ownership::remove(&folder.join(DONE_NAME)))
    }

    /// The folder that is being filled.
    pub(crate) fn destination(&self) -> &Location {
        &self.place
    }

    /// The staging folder itself.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether a checkpoint that is at the destination is replaced.
    pub(crate) fn replaces(&self) -> bool {
        self.force
    }

    /// Where the finished file called `name` waits to be moved.
    pub(crate) fn ready(&self, name: &str) -> Location {
        self.place.at(self.path(name))
    }

    /// Where the file called `name` is written.
    pub(crate) fn partial(&self, name: &str) -> Location {
        self.place.at(self.partial_path(name))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(READY_FOLDER).join(name)
    }

    fn partial_path(&self, name: &str) -> PathBuf {
        self.folder.join(PARTIAL_FOLDER).join(name)
    }

    /// Whether the files called `names` can be moved to the destination later on.
    ///
    /// # Errors
    /// When a folder stands where one of them goes.
    pub(crate) fn check_names<'a>(&self, mut names: impl Iterator<Item = &'a str>) -> Result<()> {
        names.try_for_each(|name| {
            let path = self.destination.join(name);
            match disk::kind(&path)? {
                Some(kind) if kind.is_dir() => {
                    Err(Error::destination(&path, "a folder stands where a file of that name goes; move it away"))
                }
                _ => Ok(()),
            }
        })
    }

    /// What an earlier run said it was making, if there was one.
    pub(crate) fn job(&self) -> Result<Option<Vec<u8>>> {
        record::read(&self.folder, JOB_NAME)
    }

    /// Forgets what an earlier run left, and says what this one is making.
    pub(crate) fn begin(&self, job: &[u8]) -> Result<()> {
        // Nothing is discarded while the destination has some of it.
        self.unpublish()?;
        ownership::clear(&self.folder, &[LOCK_NAME, REPLACING_NAME])?;
        record::write(&self.folder, JOB_NAME, |file| file.write_all(job))?;
        self.make_folders()
    }

    /// Makes the folders in it that aren't there.
    pub(crate) fn make_folders(&self) -> Result<()> {
        for name in [READY_FOLDER, PARTIAL_FOLDER, SEALED_FOLDER] {
            disk::make_folder(&self.folder.join(name))?;
        }
        disk::sync_folder(&self.folder)
    }

    /// Writes and syncs a file in one go; returns its size and its hash.
    pub(crate) fn write(
        &self,
        name: &str,
        content: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(u64, Sha256Hash)> {
        let path = self.path(name);
        disk::make_parents(&self.folder, &path)?;
        disk::write(&path, content)
    }

    /// The record of a sealed file, if there is one, as it was written.
    pub(crate) fn sealed(&self, name: &str) -> Result<Option<Vec<u8>>> {
        record::read(&self.folder.join(SEALED_FOLDER), name)
    }

    /// The same, to be read piece by piece.
    pub(crate) fn open_sealed(&self, name: &str) -> Result<Option<impl Read + use<>>> {
        record::open(&self.folder.join(SEALED_FOLDER), name)
    }

    /// Writes the record of a file that is written, synced and hashed; its name comes next.
    pub(crate) fn write_sealed(&self, name: &str, record: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
        record::write(&self.folder.join(SEALED_FOLDER), name, record)
    }

    /// Puts a file that is written and sealed where it waits to be moved.
    pub(crate) fn name_finished(&self, name: &str) -> Result<()> {
        let to = self.path(name);
        disk::make_parents(&self.folder, &to)?;
        disk::rename(&self.partial_path(name), &to, "give the finished file its name")
    }

    /// After a failure: keeps sealed files for the next run, and nothing else. Best effort, since the error that led here
    /// is what the user must see. Returns the number of files kept.
    pub(crate) fn abandon(self) -> usize {
        self.remove_partial();
        let sealed = count_sealed(&self.folder);
        // What is known of a checkpoint that was being replaced must outlast this run.
        if sealed > 0 || publish::has_begun(&self.folder).unwrap_or(true) {
            return sealed;
        }
        let _ = ownership::remove(&self.folder);
        self.made.iter().for_each(|folder| drop(fs::remove_dir(folder)));
        0
    }

    /// Removes files that were never finished, so that their room is free. Best effort: they'd be overwritten anyway.
    pub(crate) fn remove_partial(&self) {
        for entry in fs::read_dir(self.folder.join(PARTIAL_FOLDER)).into_iter().flatten().flatten() {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn count_sealed(folder: &Path) -> usize {
    let entries = fs::read_dir(folder.join(SEALED_FOLDER)).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_name().to_string_lossy().ends_with(".safetensors")).count()
}

/// Makes a folder and those above it that aren't there, each one's name on the disk before the next; returns them, the
/// innermost first.
fn make_folders(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut made = Vec::new();
    for above in folder.ancestors() {
        if disk::kind(above)?.is_some() {
            break;
        }
        made.push(above.to_owned());
    }
    for folder in made.iter().rev() {
        disk::make_folder(folder)?;
        folder.parent().map_or(Ok(()), disk::sync_folder)?;
    }
    Ok(made)
}

/// Why nothing can be put there.
fn refused(destination: &Path, error: Error) -> Error {
    match error {
        Error::Io { ref source, .. } if is_for_the_user(source) => {
            let why = format!("can't make a folder in it: {source}; choose a place that you may write to");
            Error::destination(destination, why)
        }
        other => other,
    }
}

/// Whether another place would help, rather than another disk.
fn is_for_the_user(error: &io::Error) -> bool {
    use io::ErrorKind::{NotADirectory, NotFound, PermissionDenied, ReadOnlyFilesystem};
    matches!(error.kind(), PermissionDenied | ReadOnlyFilesystem | NotADirectory | NotFound)
}

/// Takes the lock file, which the system frees when its holder dies, however it dies. The holder's pid is in it.
fn take_lock(destination: &Path, path: &Path) -> Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false).custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
    let mut lock = match options.open(path) {
        Err(error) if disk::kind(path)?.is_some_and(|kind| !kind.is_file()) => {
            let why = format!("it is no regular file ({error}): prequant didn't make it; move it away");
            return Err(Error::destination(path, why));
        }
        opened => opened.at(path, "create it")?,
    };
    if !ownership::is_plain_file(&lock.metadata().at(path, "look at it")?) {
        return Err(Error::destination(path, "it has other names too: prequant didn't make it; move it away"));
    }
    match lock.try_lock() {
        Ok(()) => {
            let pid = format!("{}\n", std::process::id());
            lock.set_len(0).and_then(|()| lock.write_all(pid.as_bytes())).at(path, "write it")?;
            Ok(lock)
        }
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            let _ = lock.read_to_string(&mut pid);
            let why = format!("process {} is converting into it; wait for it, or choose another one", pid.trim());
            Err(Error::destination(destination, why))
        }
        // Some network file systems have no locks; better unlocked than not at all.
        Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => Ok(lock),
        Err(TryLockError::Error(error)) => Err(error).at(path, "lock it"),
    }
}

/// Staging and publishing are renames, locks and syncs of folders: they need the file system.
fn local(destination: &Location) -> Result<&Path> {
    let why = "a checkpoint can be written to a folder of the file system only";
    destination.local().ok_or_else(|| Error::destination(destination.path(), why))
}

/// `path` with its links and dots resolved. What doesn't exist yet has no links, and `..` leads back out of it.
///
/// # Errors
/// When the system refuses to tell.
pub(crate) fn resolve(path: &Path) -> Result<PathBuf> {
    let mut resolved = PathBuf::new();
    for part in std::path::absolute(path).at(path, "resolve it")?.components() {
        match part {
            Component::ParentDir => {
                resolved.pop();
            }
            Component::CurDir => {}
            part => {
                resolved.push(part);
                match resolved.canonicalize() {
                    Ok(canonical) => resolved = canonical,
                    Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
                    Err(error) => return Err(error).at(&resolved, "resolve it"),
                }
            }
        }
    }
    Ok(resolved)
}

/// Bytes that may still be written there, or at its nearest ancestor that exists; `None` where the file system keeps
/// no count.
pub(crate) fn free_space(place: &Location) -> Result<Option<u64>> {
    let place = resolve(local(place)?)?;
    let mut there = Path::new("/");
    for above in place.ancestors() {
        // Followed, since what a link leads to is what is filled.
        if above.try_exists().at(above, "look at it")? {
            there = above;
            break;
        }
    }
    let status = rustix::fs::statvfs(there).at(there, "ask for its free space")?;
    Ok((status.f_blocks > 0).then(|| status.f_bavail.saturating_mul(status.f_frsize)))
}
