//! Writing a checkpoint: under temporary names in a staging folder, then, once all of it is there, under its own.
//!
//! The order that makes a crash harmless: every file is written and synced in the staging folder, then moved to the
//! destination: weights first, then side files, checksums, index and config.json, and the manifest last. A folder with
//! a manifest is whole; one without has no manifest to be trusted, and a loader finds no config.json in it.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::hash::HashingWriter;
use super::{CONFIG_NAME, INDEX_NAME, MANIFEST_NAME, SUMS_NAME, Sha256Hash};
use crate::error::{Error, IoContext, Result};

/// The folder inside the destination that holds what isn't finished.
const STAGING_NAME: &str = ".prequant-staging";

/// A destination being filled. Dropped before [`Staging::publish`], it removes what it wrote.
#[derive(Debug)]
pub struct Staging {
    destination: PathBuf,
    folder: PathBuf,
    made_destination: bool,
    force: bool,
    published: bool,
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
                if force || entries.all(is_left_over) {
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

    /// Makes the destination and the staging folder in it, after [`Staging::check`].
    pub fn create(destination: &Path, source: &Path, force: bool) -> Result<Staging> {
        Self::check(destination, source, force)?;
        let made_destination = !destination.exists();
        fs::create_dir_all(destination).at(destination, "make it")?;
        let folder = destination.join(STAGING_NAME);
        if folder.exists() {
            fs::remove_dir_all(&folder).at(&folder, "remove what an earlier run left")?;
        }
        fs::create_dir(&folder).at(&folder, "make it")?;
        Ok(Staging { destination: destination.to_owned(), folder, made_destination, force, published: false })
    }

    /// Where the file called `name` is written.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
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
        let file = File::options().write(true).create_new(true).open(&path).at(&path, "create it")?;
        let mut writer = BufWriter::with_capacity(1 << 16, HashingWriter::new(&file));
        content(&mut writer).and_then(|()| writer.flush()).at(&path, "write it")?;
        file.sync_all().at(&path, "sync it")?;
        Ok(writer.get_ref().finish())
    }

    /// Moves the files called `names` to the destination, what marks it as whole last.
    ///
    /// With `force`, what marks the old checkpoint as whole goes first, and its weights that aren't replaced go too.
    pub fn publish(mut self, names: &[String]) -> Result<()> {
        if self.force {
            self.remove_old(names)?;
        }
        let rank = |name: &str| match name {
            MANIFEST_NAME => 4,
            CONFIG_NAME => 3,
            INDEX_NAME => 2,
            SUMS_NAME => 1,
            _ => 0,
        };
        let mut in_order: Vec<&String> = names.iter().collect();
        in_order.sort_by_key(|name| rank(name));
        sync_folder(&self.folder)?;
        for name in in_order {
            let (from, to) = (self.path(name), self.destination.join(name));
            if rank(name) == 4 {
                sync_folder(&self.destination)?;
            }
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent).at(parent, "make it")?;
            }
            fs::rename(&from, &to).at(&to, "move the finished file to it")?;
        }
        sync_folder(&self.destination)?;
        self.published = true;
        fs::remove_dir_all(&self.folder).at(&self.folder, "remove it")
    }

    fn remove_old(&self, names: &[String]) -> Result<()> {
        for name in [MANIFEST_NAME, CONFIG_NAME, INDEX_NAME, SUMS_NAME] {
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

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.published {
            // Best effort: the error that led here is what the user must see.
            let _ = fs::remove_dir_all(&self.folder);
            if self.made_destination {
                let _ = fs::remove_dir(&self.destination);
            }
        }
    }
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).at(path, "remove it"),
        _ => Ok(()),
    }
}

fn sync_folder(folder: &Path) -> Result<()> {
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

/// A file of weights being written, at any offset from any thread.
#[derive(Debug)]
pub struct OutputFile {
    file: File,
    path: PathBuf,
}

impl OutputFile {
    /// Creates the file with room for `len` bytes.
    pub fn create(path: PathBuf, len: u64) -> Result<OutputFile> {
        let file = File::options().read(true).write(true).create_new(true).open(&path).at(&path, "create it")?;
        reserve(&file, len).at(&path, "reserve room for it")?;
        Ok(OutputFile { file, path })
    }

    /// Writes all of `bytes` at `offset`.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.file.write_all_at(bytes, offset).at(&self.path, "write it")
    }

    /// The file, for reading back.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the file another name in the same folder.
    pub fn rename(&self, to: &Path) -> Result<()> {
        fs::rename(&self.path, to).at(to, "give the finished file its name")
    }

    /// Waits until the file's bytes are on the disk.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_all().at(&self.path, "sync it")
    }
}

/// Sets the length, and has the blocks allocated at once where the file system can: a full disk then shows early, and
/// the file is in one piece.
fn reserve(file: &File, len: u64) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    if len > 0 {
        match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, len) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS | rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
    }
    file.set_len(len)
}
