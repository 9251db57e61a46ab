//! Filling a destination so that no crash leaves a folder that looks whole.
//!
//! Everything is written to a staging folder inside the destination. The order, which every step below keeps:
//!
//! 1. `lock` is taken; `job` says what is being made.
//! 2. A file of weights is written and hashed as `partial/NAME`, and synced.
//! 3. `sealed/NAME`, which holds its hashes, is written and synced; then `partial/NAME` becomes `ready/NAME`.
//! 4. Side files, config.json, index, manifest and checksums are written and synced.
//! 5. `publishing` is written, and with `force` what marks the old checkpoint as whole is removed.
//! 6. The files move to the destination: weights and side files, checksums, index, config.json, then, after a sync of
//!    the folder, the manifest. The staging folder gets another name, and goes.
//!
//! Killed before 5, the destination holds nothing but the staging folder. Killed in 6, it has no manifest and (but for an
//! instant) no config.json. Either way the same command resumes: sealed files are hashed again and kept, files moved
//! already are taken back, the rest is made anew.

use std::fs::{self, File, TryLockError};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Component, Path, PathBuf};

use super::{CONFIG_NAME, INDEX_NAME, MANIFEST_NAME, QUANT_CONFIG_NAME, SUMS_NAME};
use crate::error::{Error, Hint, IoContext, Result};
use crate::store::{HashingWriter, Location, Sha256Hash};

/// The folder inside the destination that holds what isn't finished.
pub(crate) const STAGING_NAME: &str = ".prequant-staging";

/// The staging folder's name once it has served.
pub(super) const DONE_NAME: &str = ".prequant-done";

/// Finished files, under the names that they will have.
const READY_FOLDER: &str = "ready";
/// Files of weights being written.
const PARTIAL_FOLDER: &str = "partial";
/// What is known of each finished file of weights.
const SEALED_FOLDER: &str = "sealed";

const LOCK_NAME: &str = "lock";
const JOB_NAME: &str = "job";
const PUBLISHING_NAME: &str = "publishing";

/// What marks a folder as a checkpoint, the strongest mark first.
const MARKS: [&str; 4] = [MANIFEST_NAME, CONFIG_NAME, INDEX_NAME, SUMS_NAME];

/// A destination being filled.
#[derive(Debug)]
pub(crate) struct Staging {
    /// Where files of weights are written through.
    place: Location,
    destination: PathBuf,
    folder: PathBuf,
    /// Folders that weren't there before, the innermost first.
    made: Vec<PathBuf>,
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
                let moving = is_there(&place.join(STAGING_NAME).join(PUBLISHING_NAME))?;
                if force || moving || entries.all(is_left_over) {
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

    /// Takes the destination, after [`Staging::check`]: makes it and the staging folder in it, or resumes with those of
    /// an earlier run.
    ///
    /// # Errors
    /// When another process is at it.
    pub(crate) fn take(destination: &Location, source: &Location, force: bool) -> Result<Staging> {
        Self::check(destination, source, force)?;
        let path = resolve(local(destination)?)?;
        let (place, destination) = (destination.at(path.clone()), &path);
        let made = destination.ancestors().take_while(|folder| !folder.exists()).map(Path::to_owned).collect();
        let (folder, done) = (destination.join(STAGING_NAME), destination.join(DONE_NAME));
        if is_there(&done)? {
            fs::remove_dir_all(&done).at(&done, "remove what an earlier run left")?;
        }
        fs::create_dir_all(&folder).map_err(|error| {
            let why = format!("can't make a folder in it: {error}; choose a place that you may write to");
            Error::destination(destination, why)
        })?;
        let lock = take_lock(destination, &folder.join(LOCK_NAME))?;
        Ok(Staging { place, destination: destination.to_owned(), folder, made, force, _lock: lock })
    }

    /// Removes what a run left that was killed in its very last step. Best effort: nothing looks at it.
    pub(crate) fn tidy(destination: &Location) {
        let _ = destination.local().map(|folder| fs::remove_dir_all(folder.join(DONE_NAME)));
    }

    /// The folder that is being filled.
    pub(crate) fn destination(&self) -> &Location {
        &self.place
    }

    /// The staging folder itself.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
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

    /// Where what is known of a sealed file is noted.
    fn sealed_path(&self, name: &str) -> PathBuf {
        self.folder.join(SEALED_FOLDER).join(name)
    }

    /// Whether the files called `names` can be moved to the destination later on.
    ///
    /// # Errors
    /// When a folder stands where one of them goes.
    pub(crate) fn check_names<'a>(&self, mut names: impl Iterator<Item = &'a str>) -> Result<()> {
        match names.find(|name| self.destination.join(name).is_dir()) {
            Some(name) => {
                let why = "a folder stands where a file of that name goes; move it away";
                Err(Error::destination(&self.destination.join(name), why))
            }
            None => Ok(()),
        }
    }

    /// What an earlier run said it was making, if there was one.
    pub(crate) fn job(&self) -> Result<Option<Vec<u8>>> {
        read_if_there(&self.folder.join(JOB_NAME))
    }

    /// Forgets what an earlier run left, and says what this one is making.
    pub(crate) fn begin(&self, job: &[u8]) -> Result<()> {
        for entry in fs::read_dir(&self.folder).at(&self.folder, "list it")? {
            let path = entry.at(&self.folder, "list it")?.path();
            if path.is_dir() {
                fs::remove_dir_all(&path).at(&path, "remove what an earlier run left")?;
            } else if !path.ends_with(LOCK_NAME) {
                fs::remove_file(&path).at(&path, "remove what an earlier run left")?;
            }
        }
        self.make_folders()?;
        write(&self.folder.join(JOB_NAME), |file| file.write_all(job)).map(|_| ())
    }

    fn make_folders(&self) -> Result<()> {
        for name in [READY_FOLDER, PARTIAL_FOLDER, SEALED_FOLDER] {
            let path = self.folder.join(name);
            fs::create_dir_all(&path).at(&path, "make it")?;
        }
        Ok(())
    }

    /// Takes back what an earlier run had moved to the destination before it was stopped.
    pub(crate) fn unpublish<'a>(&self, names: impl Iterator<Item = &'a str>) -> Result<()> {
        self.make_folders()?;
        let marker = self.folder.join(PUBLISHING_NAME);
        if !is_there(&marker)? {
            return Ok(());
        }
        for name in MARKS {
            remove_if_there(&self.destination.join(name))?;
        }
        for name in names {
            let (from, to) = (self.destination.join(name), self.path(name));
            if is_there(&from)? && !is_there(&to)? {
                make_parent(&to)?;
                fs::rename(&from, &to).at(&from, "take it back")?;
                // Folders that hold nothing else go too; others refuse.
                let parents = Path::new(name).ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty());
                parents.for_each(|parent| drop(fs::remove_dir(self.destination.join(parent))));
            }
        }
        sync_folder(&self.destination)?;
        remove_if_there(&marker)
    }

    /// Writes and syncs a file in one go; returns its size and its hash.
    pub(crate) fn write(
        &self,
        name: &str,
        content: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(u64, Sha256Hash)> {
        let path = self.path(name);
        make_parent(&path)?;
        write(&path, content)
    }

    /// The record of a sealed file, if there is one.
    pub(crate) fn sealed(&self, name: &str) -> Result<Option<Vec<u8>>> {
        read_if_there(&self.sealed_path(name))
    }

    /// Writes the record of a file that is written, synced and hashed; its name comes next.
    pub(crate) fn write_sealed(&self, name: &str, record: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
        write(&self.sealed_path(name), record).map(|_| ())
    }

    /// Puts a file that is written and sealed where it waits to be moved.
    pub(crate) fn name_finished(&self, name: &str) -> Result<()> {
        let to = self.path(name);
        fs::rename(self.partial_path(name), &to).at(&to, "give the finished file its name")
    }

    /// Moves the files called `names` to the destination, what marks it as whole last.
    ///
    /// With `force`, what marks the old checkpoint as whole goes first, and its weights that aren't replaced go too.
    pub(crate) fn publish(self, names: &[String]) -> Result<()> {
        self.check_names(names.iter().map(String::as_str))?;
        write(&self.folder.join(PUBLISHING_NAME), |_| Ok(()))?;
        sync_folder(&self.folder)?;
        if self.force {
            self.remove_old(names)?;
        }
        let rank = |name: &str| MARKS.iter().rev().position(|mark| *mark == name).map_or(0, |position| position + 1);
        let has_manifest = names.iter().any(|name| name == MANIFEST_NAME);
        let mut in_order: Vec<&String> = names.iter().collect();
        in_order.sort_by_key(|name| rank(name));
        for name in in_order {
            let (from, to) = (self.path(name), self.destination.join(name));
            let is_last_mark = name == MANIFEST_NAME || name == CONFIG_NAME && !has_manifest;
            if is_last_mark {
                sync_folder(&self.destination)?;
            }
            make_parent(&to)?;
            fs::rename(&from, &to).at(&to, "move the finished file to it")?;
        }
        sync_folder(&self.destination)?;
        // In one step, so that no run finds half of it.
        let done = self.destination.join(DONE_NAME);
        fs::rename(&self.folder, &done).at(&self.folder, "put it away")?;
        fs::remove_dir_all(&done).at(&done, "remove it")
    }

    /// After a failure: keeps sealed files for the next run, and nothing else. Best effort, since the error that led here
    /// is what the user must see. Returns the number of files kept.
    pub(crate) fn abandon(self) -> usize {
        self.remove_partial();
        let sealed = count_sealed(&self.folder);
        if sealed > 0 {
            return sealed;
        }
        let _ = fs::remove_dir_all(&self.folder);
        self.made.iter().for_each(|folder| drop(fs::remove_dir(folder)));
        0
    }

    /// Removes files that were never finished, so that their room is free. Best effort: they'd be overwritten anyway.
    pub(crate) fn remove_partial(&self) {
        for entry in fs::read_dir(self.folder.join(PARTIAL_FOLDER)).into_iter().flatten().flatten() {
            let _ = fs::remove_file(entry.path());
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
            if (is_shard || name == QUANT_CONFIG_NAME) && !names.contains(&name) && entry.path().is_file() {
                remove_if_there(&entry.path())?;
            }
        }
        Ok(())
    }
}

fn count_sealed(folder: &Path) -> usize {
    let entries = fs::read_dir(folder.join(SEALED_FOLDER)).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_name().to_string_lossy().ends_with(".safetensors")).count()
}

/// Writes and syncs a file in one go; returns its size and its hash.
fn write(path: &Path, content: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(u64, Sha256Hash)> {
    let file = File::create(path).at(path, "create it")?;
    let mut writer = BufWriter::with_capacity(1 << 16, HashingWriter::new(&file));
    content(&mut writer).and_then(|()| writer.flush()).at(path, "write it")?;
    file.sync_all().at(path, "sync it")?;
    Ok(writer.get_ref().finish())
}

fn make_parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), |parent| fs::create_dir_all(parent).at(parent, "make it"))
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

/// Whether anything is there, links followed; what the system can't tell is an error.
fn is_there(path: &Path) -> Result<bool> {
    match path.try_exists() {
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => Ok(false),
        other => other.at(path, "look at it"),
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
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).at(folder, "sync it")
}

/// Staging and publishing are renames, locks and syncs of folders: they need the file system.
fn local(destination: &Location) -> Result<&Path> {
    let why = "a checkpoint can be written to a folder of the file system only";
    destination.local().ok_or_else(|| Error::destination(destination.path(), why))
}

/// `path` with its links and dots resolved. What doesn't exist yet has no links, and `..` leads back out of it.
fn resolve(path: &Path) -> Result<PathBuf> {
    let mut resolved = PathBuf::new();
    for part in std::path::absolute(path).at(path, "resolve it")?.components() {
        match part {
            Component::ParentDir => {
                resolved.pop();
            }
            Component::CurDir => {}
            part => {
                resolved.push(part);
                if let Ok(canonical) = resolved.canonicalize() {
                    resolved = canonical;
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
    let there = place.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
    let status = rustix::fs::statvfs(there).at(there, "ask for its free space")?;
    Ok((status.f_blocks > 0).then(|| status.f_bavail.saturating_mul(status.f_frsize)))
}
