//! Filling a destination so that no crash leaves a folder that looks whole.
//!
//! Everything is written to a staging folder inside the destination. The order, which every step below keeps:
//!
//! 1. `lock` is taken; `job` says what is being made.
//! 2. A file of weights is written as `NAME.partial`, synced, and hashed.
//! 3. `NAME.sealed`, which holds its hashes, is written and synced; then `NAME.partial` becomes `NAME`.
//! 4. Side files, config.json, index, manifest and checksums are written and synced.
//! 5. `publishing` is written, and with `force` what marks the old checkpoint as whole is removed.
//! 6. The files move to the destination: weights and side files, checksums, index, config.json, then, after a sync of
//!    the folder, the manifest. The staging folder goes.
//!
//! Killed before 5, the destination holds nothing but the staging folder. Killed in 6, it has no manifest and (but for an
//! instant) no config.json. Either way the same command goes on: sealed files are hashed again and kept, files moved
//! already are taken back, the rest is made anew.

use std::fs::{self, File, TryLockError};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use super::hash::HashingWriter;
use super::{CONFIG_NAME, INDEX_NAME, MANIFEST_NAME, SUMS_NAME, Sha256Hash};
use crate::error::{Error, IoContext, Result};

/// The folder inside the destination that holds what isn't finished.
pub const STAGING_NAME: &str = ".prequant-staging";

const LOCK_NAME: &str = "lock";
const JOB_NAME: &str = "job";
const PUBLISHING_NAME: &str = "publishing";

/// What marks a folder as a checkpoint, the strongest mark first.
const MARKS: [&str; 4] = [MANIFEST_NAME, CONFIG_NAME, INDEX_NAME, SUMS_NAME];

/// A destination being filled.
#[derive(Debug)]
pub struct Staging {
    destination: PathBuf,
    folder: PathBuf,
    made_destination: bool,
    force: bool,
    /// Held, by the operating system, as long as this process lives.
    _lock: File,
}

impl Staging {
    /// Whether a checkpoint can be put at `destination`; nothing is written.
    ///
    /// # Errors
    /// When it is a file, is `source`, lies in it or holds it, or has something in it already and `force` isn't set.
    pub fn check(destination: &Path, source: &Path, force: bool) -> Result<()> {
        let place = existing_part(destination)?;
        let source = source.canonicalize().at(source, "open it")?;
        let overlap = match (place.starts_with(&source), source.starts_with(&place)) {
            (true, true) => Some("it is the source itself"),
            (true, false) => Some("it lies in the source"),
            (false, true) => Some("the source lies in it"),
            (false, false) => None,
        };
        if let Some(what) = overlap {
            return Err(Error::destination(destination, format!("{what}; choose a folder elsewhere")));
        }
        let is_left_over = |entry: io::Result<fs::DirEntry>| entry.is_ok_and(|entry| entry.file_name() == STAGING_NAME);
        match fs::read_dir(destination) {
            Ok(mut entries) => {
                let moving = destination.join(STAGING_NAME).join(PUBLISHING_NAME).exists();
                if force || moving || entries.all(is_left_over) {
                    return Ok(());
                }
                let why =
                    "it exists and isn't empty; choose another destination, or replace what is there with --force";
                Err(Error::destination(destination, why))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
                Err(Error::destination(destination, "it is a file, or below one; the destination is a folder"))
            }
            Err(error) => Err(error).at(destination, "list it"),
        }
    }

    /// Takes the destination, after [`Staging::check`]: makes it and the staging folder in it, or goes on with those of
    /// an earlier run.
    ///
    /// # Errors
    /// When another process is at it.
    pub fn take(destination: &Path, source: &Path, force: bool) -> Result<Staging> {
        Self::check(destination, source, force)?;
        let made_destination = !destination.exists();
        let folder = destination.join(STAGING_NAME);
        fs::create_dir_all(&folder).at(&folder, "make it")?;
        let lock = take_lock(destination, &folder.join(LOCK_NAME))?;
        Ok(Staging { destination: destination.to_owned(), folder, made_destination, force, _lock: lock })
    }

    /// The folder that is being filled.
    pub fn destination(&self) -> &Path {
        &self.destination
    }

    /// Where the file called `name` is written.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// What an earlier run said it was making, if there was one.
    pub fn job(&self) -> Result<Option<Vec<u8>>> {
        read_if_there(&self.path(JOB_NAME))
    }

    /// Forgets what an earlier run left, and says what this one is making.
    pub fn begin(&self, job: &[u8]) -> Result<()> {
        for entry in fs::read_dir(&self.folder).at(&self.folder, "list it")? {
            let path = entry.at(&self.folder, "list it")?.path();
            if path.is_dir() {
                fs::remove_dir_all(&path).at(&path, "remove what an earlier run left")?;
            } else if !path.ends_with(LOCK_NAME) {
                fs::remove_file(&path).at(&path, "remove what an earlier run left")?;
            }
        }
        self.write(JOB_NAME, |file| file.write_all(job)).map(|_| ())
    }

    /// Takes back what an earlier run had moved to the destination before it was stopped.
    pub fn unpublish(&self, names: impl Iterator<Item = String>) -> Result<()> {
        let marker = self.path(PUBLISHING_NAME);
        if !marker.exists() {
            return Ok(());
        }
        for name in MARKS {
            remove_if_there(&self.destination.join(name))?;
        }
        for name in names {
            let (from, to) = (self.destination.join(&name), self.path(&name));
            if from.exists() && !to.exists() {
                fs::rename(&from, &to).at(&from, "take it back")?;
            }
        }
        sync_folder(&self.destination)?;
        remove_if_there(&marker)
    }

    /// Writes and syncs a file in one go; returns its size and its hash.
    pub fn write(
        &self,
        name: &str,
        content: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(u64, Sha256Hash)> {
        let path = self.path(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).at(parent, "make it")?;
        }
        let file = File::create(&path).at(&path, "create it")?;
        let mut writer = BufWriter::with_capacity(1 << 16, HashingWriter::new(&file));
        content(&mut writer).and_then(|()| writer.flush()).at(&path, "write it")?;
        file.sync_all().at(&path, "sync it")?;
        Ok(writer.get_ref().finish())
    }

    /// The record of a sealed file, if there is one.
    pub fn sealed(&self, name: &str) -> Result<Option<Vec<u8>>> {
        read_if_there(&self.path(&sealed_name(name)))
    }

    /// Writes the record of a file that is written, synced and hashed; its name comes next.
    pub fn write_sealed(&self, name: &str, record: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
        self.write(&sealed_name(name), record).map(|_| ())
    }

    /// Gives a file that was written as `NAME.partial` its name.
    pub fn name_finished(&self, name: &str) -> Result<()> {
        let to = self.path(name);
        fs::rename(self.path(&partial_name(name)), &to).at(&to, "give the finished file its name")
    }

    /// Moves the files called `names` to the destination, what marks it as whole last.
    ///
    /// With `force`, what marks the old checkpoint as whole goes first, and its weights that aren't replaced go too.
    pub fn publish(self, names: &[String]) -> Result<()> {
        self.write(PUBLISHING_NAME, |_| Ok(()))?;
        sync_folder(&self.folder)?;
        if self.force {
            self.remove_old(names)?;
        }
        let rank = |name: &str| MARKS.iter().rev().position(|mark| *mark == name).map_or(0, |position| position + 1);
        let mut in_order: Vec<&String> = names.iter().collect();
        in_order.sort_by_key(|name| rank(name));
        for name in in_order {
            let (from, to) = (self.path(name), self.destination.join(name));
            if name == MANIFEST_NAME {
                sync_folder(&self.destination)?;
            }
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent).at(parent, "make it")?;
            }
            fs::rename(&from, &to).at(&to, "move the finished file to it")?;
        }
        sync_folder(&self.destination)?;
        fs::remove_dir_all(&self.folder).at(&self.folder, "remove it")
    }

    /// After a failure: keeps sealed files for the next run, and nothing else. Best effort, since the error that led here
    /// is what the user must see. Returns the number of files kept.
    pub fn abandon(self) -> usize {
        self.remove_partial();
        let sealed = count_sealed(&self.folder);
        if sealed > 0 {
            return sealed;
        }
        let _ = fs::remove_dir_all(&self.folder);
        if self.made_destination {
            let _ = fs::remove_dir(&self.destination);
        }
        0
    }

    /// Removes files that were never finished, so that their room is free. Best effort: they'd be overwritten anyway.
    pub fn remove_partial(&self) {
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().ends_with(PARTIAL_SUFFIX) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn remove_old(&self, names: &[String]) -> Result<()> {
        for name in MARKS {
            remove_if_there(&self.destination.join(name))?;
        }
        for entry in fs::read_dir(&self.destination).at(&self.destination, "list it")? {
            let entry = entry.at(&self.destination, "list it")?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_shard = name.starts_with("model") && name.ends_with(".safetensors");
            if is_shard && !names.contains(&name) && entry.path().is_file() {
                remove_if_there(&entry.path())?;
            }
        }
        Ok(())
    }
}

const PARTIAL_SUFFIX: &str = ".partial";
const SEALED_SUFFIX: &str = ".sealed";

/// A file's name while it is written.
pub fn partial_name(name: &str) -> String {
    format!("{name}{PARTIAL_SUFFIX}")
}

fn sealed_name(name: &str) -> String {
    format!("{name}{SEALED_SUFFIX}")
}

fn count_sealed(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_name().to_string_lossy().ends_with(".safetensors.sealed")).count()
}

/// Takes the lock file, which the system frees when its holder dies, however it dies. The holder's pid is in it.
fn take_lock(destination: &Path, path: &Path) -> Result<File> {
    let mut lock =
        File::options().read(true).write(true).create(true).truncate(false).open(path).at(path, "create it")?;
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

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).at(path, "read it"),
    }
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).at(path, "remove it"),
        _ => Ok(()),
    }
}

/// Waits until the names in a folder are on the disk.
pub fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).at(folder, "sync it")
}

/// `path` with links resolved, as far as it exists, and the rest as it is.
fn existing_part(path: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(path).at(path, "resolve it")?;
    for ancestor in absolute.ancestors() {
        if let Ok(resolved) = ancestor.canonicalize() {
            let rest = absolute.strip_prefix(ancestor).unwrap_or(Path::new(""));
            return Ok(resolved.join(rest));
        }
    }
    Ok(absolute)
}

/// Bytes that may still be written at `path`, or at its nearest ancestor that exists; `None` where the file system keeps
/// no count.
pub fn free_space(path: &Path) -> Result<Option<u64>> {
    let place = existing_part(path)?;
    let there = place.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
    let status = rustix::fs::statvfs(there).at(there, "ask for its free space")?;
    Ok((status.f_blocks > 0).then(|| status.f_bavail.saturating_mul(status.f_frsize)))
}
