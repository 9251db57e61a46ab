//! Writing a plan's files into a staging folder.

use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::checkpoint::{OutputFile, SourceFile, Staging};
use crate::error::Result;
use crate::manifest::FileRecord;
use crate::ops::job::journal;
use crate::pipeline::{FileOutcome, Output, Outputs};
use crate::plan::PlannedFile;
use crate::store::{ReadAt, Sha256Hash};

/// The files of a staging folder: under temporary names until they are sealed.
pub(crate) struct Staged<'a> {
    /// The folder.
    pub staging: &'a Staging,
}

impl Outputs for Staged<'_> {
    fn open(&self, file: &PlannedFile) -> Result<Arc<dyn Output + '_>> {
        Ok(Arc::new(OutputFile::create(self.staging.partial(&file.name), file.len)?))
    }

    fn seal(&self, file: &PlannedFile, outcome: &FileOutcome) -> Result<()> {
        journal::write_sealed(self.staging, &file.name, outcome)?;
        self.staging.name_finished(&file.name)
    }

    fn source_hashed(&self, file: &SourceFile, sha256: Sha256Hash) -> Result<()> {
        journal::check_source_hash(self.staging, file, sha256)
    }
}

/// Writes a file to the staging folder; returns its record.
pub(crate) fn write(
    staging: &Staging,
    name: &str,
    content: impl FnOnce(&mut dyn io::Write) -> io::Result<()>,
) -> Result<FileRecord> {
    let (size, sha256) = staging.write(name, content)?;
    Ok(FileRecord { name: name.to_owned(), size, sha256 })
}

impl Output for OutputFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        OutputFile::write_at(self, bytes, offset)
    }

    fn write_back(&self, offset: u64, len: u64) {
        OutputFile::write_back(self, offset, len);
    }

    fn sync(&self) -> Result<()> {
        OutputFile::sync(self)
    }

    fn file(&self) -> &dyn ReadAt {
        OutputFile::file(self)
    }

    fn path(&self) -> &Path {
        OutputFile::path(self)
    }
}
