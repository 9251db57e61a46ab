//! A file of weights being written, at any offset from any thread.

use std::path::Path;

use crate::error::{IoContext, Result};
use crate::store::{Location, ReadAt, WriteAt, write_all_at};

/// A file with room for all that goes into it.
pub(crate) struct OutputFile {
    file: Box<dyn WriteAt>,
    location: Location,
}

impl OutputFile {
    /// Creates the file, `len` bytes long; what an earlier run left under that name is overwritten.
    pub(crate) fn create(location: Location, len: u64) -> Result<OutputFile> {
        let file = location.create(len).at(location.path(), "create it")?;
        Ok(OutputFile { file, location })
    }

    /// Writes all of `bytes` at `offset`.
    pub(crate) fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        write_all_at(&*self.file, bytes, offset).at(self.path(), "write it")
    }

    /// The file, for reading back.
    pub(crate) fn file(&self) -> &dyn ReadAt {
        &*self.file
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        self.location.path()
    }

    /// Has the disk begin with `len` bytes from `offset` on.
    pub(crate) fn write_back(&self, offset: u64, len: u64) {
        self.file.write_back(offset, len);
    }

    /// Waits until the file's bytes are on the disk.
    pub(crate) fn sync(&self) -> Result<()> {
        self.file.sync().at(self.path(), "sync it")
    }
}
