//! The files that a thread has in hand: one of the source, and one of the output.

use std::io;
use std::sync::Arc;

use super::coded::{self, Scratch};
use super::{Job, Output, matrix};
use crate::dtype::Dtype;
use crate::error::{Error, IoContext, Result};
use crate::plan::{Part, Place, PlannedTensor};
use crate::store::{ReadAt, read_exact_at};

/// How far ahead of a read the system is told of it.
const READ_AHEAD: u64 = 16 << 20;

/// Open files, kept open from task to task.
pub struct Files<'j, 'a> {
    job: &'j Job<'a>,
    source: Option<(usize, Box<dyn ReadAt>)>,
    output: Option<(usize, Arc<dyn Output + 'a>)>,
    scratch: Scratch,
}

impl<'j, 'a> Files<'j, 'a> {
    pub fn new(job: &'j Job<'a>) -> Files<'j, 'a> {
        Files { job, source: None, output: None, scratch: Scratch::default() }
    }

    /// Turns to an output file, the plan's `file`th; what is written goes there.
    pub fn open_output(&mut self, file: usize) -> Result<Arc<dyn Output + 'a>> {
        if let Some((_, output)) = self.output.as_ref().filter(|(opened, _)| *opened == file) {
            return Ok(output.clone());
        }
        let output = self.job.output(file)?;
        self.output = Some((file, output.clone()));
        Ok(output)
    }

    /// Lets go of the output file.
    pub fn close_output(&mut self) {
        self.output = None;
    }

    /// Puts `bytes` at `offset` of the output file.
    pub fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        match &self.output {
            Some((_, output)) => output.write_at(bytes, offset),
            None => Ok(()),
        }
    }

    /// Fills `into` with `tensor`'s bytes from `offset` on.
    pub fn read(&mut self, tensor: &PlannedTensor, mut offset: u64, mut into: &mut [u8]) -> Result<()> {
        if let Some(bytes) = &tensor.constant {
            into.copy_from_slice(&bytes[offset as usize..][..into.len()]);
            return Ok(());
        }
        for part in &tensor.parts {
            if offset >= part.len {
                offset -= part.len;
                continue;
            }
            let len = (part.len - offset).min(into.len() as u64) as usize;
            let (here, rest) = into.split_at_mut(len);
            self.read_part(part, tensor.dtype, offset, here)?;
            (offset, into) = (0, rest);
            if into.is_empty() {
                break;
            }
        }
        Ok(())
    }

    /// Fills `into` with what a part gives from byte `offset` on.
    fn read_part(&mut self, part: &Part, dtype: Dtype, offset: u64, into: &mut [u8]) -> Result<()> {
        let Some(matrix) = &part.matrix else { return self.read_stored(part, offset, into) };
        let size = dtype.bitsize() / 8;
        matrix::read(matrix, size, offset / size as u64, into, |at, run| self.read_stored(part, at, run))
    }

    /// Fills `into` with the bytes from `offset` on of what a part is stored in, decoded if it is coded.
    fn read_stored(&mut self, part: &Part, offset: u64, into: &mut [u8]) -> Result<()> {
        let Some(coded) = &part.coded else { return self.read_at(part.file, part.offset + offset, into) };
        let codes = Place { file: part.file, tensor: part.tensor, offset: part.offset };
        let first = offset / coded.dtype.size() as u64;
        let mut scratch = std::mem::take(&mut self.scratch);
        let read = |place: Place, bytes: &mut [u8]| self.read_at(place.file, place.offset, bytes);
        let result = coded::read(coded, codes, first, into, &mut scratch, read);
        self.scratch = scratch;
        result
    }

    /// A file of the source.
    pub fn open_source(&mut self, file: usize) -> Result<&dyn ReadAt> {
        if self.source.as_ref().is_none_or(|(opened, _)| *opened != file) {
            self.source = None;
        }
        match &mut self.source {
            Some((_, file)) => Ok(&**file),
            none => Ok(&*none.insert((file, self.job.source.files[file].reopen()?)).1),
        }
    }

    /// Fills `into` with the bytes at `position` of a file of the source.
    pub fn read_at(&mut self, file: usize, position: u64, into: &mut [u8]) -> Result<()> {
        let source = &self.job.source.files[file];
        let (path, source_len, len) = (source.location.path(), source.identity.len, into.len() as u64);
        let file = self.open_source(file)?;
        let ahead = position + READ_AHEAD;
        file.will_read(ahead, len.min(source_len.saturating_sub(ahead)));
        match read_exact_at(file, into, position) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                let why = format!("it ends before byte {}, and had {source_len} bytes", position + len);
                Err(Error::SourceChanged { path: path.to_owned(), why })
            }
            other => other.at(path, "read it"),
        }
    }
}
