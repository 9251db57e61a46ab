//! Moving finished files to the destination, and taking them back when that was cut short.
//!
//! At every instant the destination is the old checkpoint, whole; or the new one, whole; or has neither a manifest nor, but
//! for the last step, a config.json. What will be moved and what will be removed is recorded first, so that any later run
//! knows which files are ours.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{READY_FOLDER, SEALED_FOLDER, Staging, disk, ownership, record};
use crate::checkpoint::{CONFIG_NAME, INDEX_NAME, MANIFEST_NAME, SUMS_NAME};
use crate::error::{Error, IoContext, Result};

/// What marks a folder as a checkpoint, the strongest mark first.
const MARKS: [&str; 4] = [MANIFEST_NAME, CONFIG_NAME, INDEX_NAME, SUMS_NAME];

/// The record of files that are being moved.
pub(super) const PUBLISHING_NAME: &str = "publishing";

/// The record of a checkpoint that is being replaced. It outlives the runs until one has done so.
pub(super) const REPLACING_NAME: &str = "replacing";

/// The content of the first.
#[derive(Debug, Serialize, Deserialize)]
struct Publishing {
    files: BTreeSet<String>,
}

/// The content of the second.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Replacing {
    /// Files of the old checkpoint, as its manifest listed them.
    files: BTreeSet<String>,
}

/// Whether a run in `folder` has begun to move files or to replace a checkpoint: the destination is not as it was.
pub(super) fn has_begun(folder: &Path) -> Result<bool> {
    Ok(record::read(folder, PUBLISHING_NAME)?.is_some() || record::read(folder, REPLACING_NAME)?.is_some())
}

/// Files at the destination that an earlier run put there or was replacing.
pub(super) fn known(folder: &Path) -> Result<BTreeSet<String>> {
    let moved: Option<Publishing> = read(folder, PUBLISHING_NAME)?;
    let replaced: Option<Replacing> = read(folder, REPLACING_NAME)?;
    Ok(moved.map(|record| record.files).into_iter().chain(replaced.map(|record| record.files)).flatten().collect())
}

impl Staging {
    /// Takes back what an earlier run had moved to the destination before it was stopped.
    pub(crate) fn unpublish(&self) -> Result<()> {
        let Some(Publishing { files }) = read(&self.folder, PUBLISHING_NAME)? else { return Ok(()) };
        self.make_folders()?;
        let replaced: Replacing = read(&self.folder, REPLACING_NAME)?.unwrap_or_default();
        self.unmark(|name| files.contains(name) || replaced.files.contains(name))?;
        for name in files.iter().filter(|name| !MARKS.contains(&name.as_str())) {
            let (from, to) = (self.inside(name)?, self.path(name));
            // What is ready still wasn't moved: the destination's is another.
            if disk::is_file(&from)? && disk::kind(&to)?.is_none() {
                disk::make_parents(&self.folder, &to)?;
                disk::rename(&from, &to, "take it back")?;
                // Folders that hold nothing else go too; others refuse.
                let parents = Path::new(name).ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty());
                parents.for_each(|parent| drop(std::fs::remove_dir(self.destination.join(parent))));
            }
        }
        self.sync_ready()?;
        disk::sync_folder(&self.destination)?;
        disk::remove_if_there(&self.folder.join(PUBLISHING_NAME))
    }

    /// Moves the files called `names` to the destination, what marks it as whole last. With `force`, the files called
    /// `old` go, which a manifest of the checkpoint that is being replaced lists.
    pub(crate) fn publish(self, names: &[String], old: BTreeSet<String>) -> Result<()> {
        self.check_names(names.iter().map(String::as_str))?;
        let new: BTreeSet<String> = names.iter().cloned().collect();
        let mut replaced: Replacing = read(&self.folder, REPLACING_NAME)?.unwrap_or_default();
        replaced.files.extend(old.into_iter().filter(|name| is_below(name)));
        self.announce(&new, &replaced)?;
        if self.force {
            self.unmark(|name| new.contains(name) || replaced.files.contains(name))?;
            disk::sync_folder(&self.destination)?;
            self.remove_old(&new, &replaced)?;
        }
        self.move_all(&new)?;
        // In one step, so that no run finds half of it.
        let done = self.destination.join(super::DONE_NAME);
        disk::rename(&self.folder, &done, "put it away")?;
        ownership::remove(&done)
    }

    /// Records what comes now, once all that it is about is on the disk.
    fn announce(&self, new: &BTreeSet<String>, replaced: &Replacing) -> Result<()> {
        disk::sync_folder(&self.folder.join(SEALED_FOLDER))?;
        self.sync_ready()?;
        if !replaced.files.is_empty() {
            write(&self.folder, REPLACING_NAME, replaced)?;
        }
        write(&self.folder, PUBLISHING_NAME, &Publishing { files: new.clone() })?;
        disk::sync_folder(&self.folder)
    }

    /// Syncs the folders of finished files.
    fn sync_ready(&self) -> Result<()> {
        sync_tree(&self.folder.join(READY_FOLDER))
    }

    /// Removes the destination's marks that `is_ours`, the strongest first.
    fn unmark(&self, is_ours: impl Fn(&str) -> bool) -> Result<()> {
        MARKS
            .iter()
            .filter(|name| is_ours(name))
            .try_for_each(|name| disk::remove_if_there(&self.destination.join(name)))
    }

    /// Removes the old checkpoint's files that aren't replaced, and folders that are empty without them.
    fn remove_old(&self, new: &BTreeSet<String>, replaced: &Replacing) -> Result<()> {
        for name in replaced.files.difference(new) {
            let path = self.inside(name)?;
            if disk::is_file(&path)? {
                disk::remove_if_there(&path)?;
            }
            let parents = Path::new(name).ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty());
            parents.for_each(|parent| drop(std::fs::remove_dir(self.destination.join(parent))));
        }
        Ok(())
    }

    fn move_all(&self, names: &BTreeSet<String>) -> Result<()> {
        let rank = |name: &str| MARKS.iter().rev().position(|mark| *mark == name);
        let (marks, others): (Vec<_>, Vec<_>) = names.iter().partition(|name| rank(name).is_some());
        let mut folders = BTreeSet::from([self.destination.clone()]);
        for name in others {
            let to = self.move_one(name)?;
            let above = to.ancestors().skip(1).take_while(|folder| *folder != self.destination);
            folders.extend(above.map(Path::to_owned));
        }
        // The innermost first: a folder lasts once the one above it is synced.
        folders.iter().rev().try_for_each(|folder| disk::sync_folder(folder))?;
        let mut marks = marks;
        marks.sort_by_key(|name| rank(name));
        let last = marks.pop();
        marks.into_iter().try_for_each(|name| self.move_one(name).map(|_| ()))?;
        disk::sync_folder(&self.destination)?;
        last.map_or(Ok(()), |name| self.move_one(name).map(|_| ()))?;
        disk::sync_folder(&self.destination)
    }

    fn move_one(&self, name: &str) -> Result<PathBuf> {
        let (from, to) = (self.path(name), self.inside(name)?);
        disk::make_parents(&self.destination, &to)?;
        disk::rename(&from, &to, "move the finished file to it")?;
        Ok(to)
    }

    /// Where the file called `name` lies at the destination.
    ///
    /// # Errors
    /// When that leads out of it, over a link or by `..`.
    fn inside(&self, name: &str) -> Result<PathBuf> {
        let path = self.destination.join(name);
        if !is_below(name) {
            return Err(Error::destination(&path, "its name leads out of the folder"));
        }
        for folder in path.ancestors().skip(1).take_while(|folder| *folder != self.destination) {
            if disk::kind(folder)?.is_some_and(|kind| !kind.is_dir()) {
                let why = "a link or a file stands where a folder of the checkpoint goes; move it away";
                return Err(Error::destination(folder, why));
            }
        }
        Ok(path)
    }
}

/// Syncs a folder and those in it, the innermost first.
fn sync_tree(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder).at(folder, "list it")? {
        let path = entry.at(folder, "list it")?.path();
        if disk::kind(&path)?.is_some_and(|kind| kind.is_dir()) {
            sync_tree(&path)?;
        }
    }
    disk::sync_folder(folder)
}

/// Whether a file of this name lies below the folder that it is looked for in.
fn is_below(name: &str) -> bool {
    use std::path::Component;
    let mut parts = Path::new(name).components().peekable();
    parts.peek().is_some() && parts.all(|part| matches!(part, Component::Normal(_)))
}

fn read<T: for<'a> Deserialize<'a>>(folder: &Path, name: &str) -> Result<Option<T>> {
    Ok(record::read(folder, name)?.and_then(|content| serde_json::from_slice(&content).ok()))
}

fn write(folder: &Path, name: &str, content: &impl Serialize) -> Result<()> {
    record::write(folder, name, |file| serde_json::to_writer(file, content).map_err(Into::into))
}
