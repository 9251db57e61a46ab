//! A file of weights being written, at any offset from any thread.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{IoContext, Result};
use crate::store::{Disk, write_all_at};

/// A file with room for all that goes into it.
pub struct OutputFile<'a> {
    disk: &'a dyn Disk,
    file: File,
    path: PathBuf,
}

impl<'a> OutputFile<'a> {
    /// Creates the file, `len` bytes long; what an earlier run left under that name is overwritten.
    pub fn create(disk: &'a dyn Disk, path: PathBuf, len: u64) -> Result<OutputFile<'a>> {
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).truncate(true).open(&path).at(&path, "create it")?;
        reserve(&file, len).at(&path, "reserve room for it")?;
        Ok(OutputFile { disk, file, path })
    }

    /// Writes all of `bytes` at `offset`.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        write_all_at(self.disk, &self.file, &self.path, bytes, offset).at(&self.path, "write it")
    }

    /// The file, for reading back.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until the file's bytes are on the disk.
    pub fn sync(&self) -> Result<()> {
        self.disk.sync(&self.file, &self.path).at(&self.path, "sync it")
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
