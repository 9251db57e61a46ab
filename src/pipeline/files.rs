//! The files that a thread has in hand: one of the source, and one of the output.

use std::io;
use std::sync::Arc;

use super::{Execution, Output};
use crate::error::{Error, IoContext, Result};
use crate::plan::PlannedTensor;
use crate::read::Evaluator;
use crate::store::{ReadAt, read_exact_at};

/// How far ahead of a read the system is told of it.
const READ_AHEAD: u64 = 16 << 20;

/// Open files, kept open from task to task.
pub(crate) struct Files<'j, 'a> {
    execution: &'j Execution<'a>,
    source: SourceFiles<'j, 'a>,
    output: Option<(usize, Arc<dyn Output + 'a>)>,
    evaluator: Evaluator,
}

/// The source's file that was read last, open.
struct SourceFiles<'j, 'a> {
    execution: &'j Execution<'a>,
    open: Option<(usize, Box<dyn ReadAt>)>,
}

impl<'j, 'a> Files<'j, 'a> {
    pub(crate) fn new(execution: &'j Execution<'a>) -> Files<'j, 'a> {
        Files {
            execution,
            source: SourceFiles { execution, open: None },
            output: None,
            evaluator: Evaluator::new(execution.context.device.cpu().kernel()),
        }
    }

    /// Turns to an output file, the plan's `file`th; what is written goes there.
    pub(crate) fn open_output(&mut self, file: usize) -> Result<Arc<dyn Output + 'a>> {
        if let Some((_, output)) = self.output.as_ref().filter(|(opened, _)| *opened == file) {
            return Ok(output.clone());
        }
        let output = self.execution.output(file)?;
        self.output = Some((file, output.clone()));
        Ok(output)
    }

    /// Lets go of the output file.
    pub(crate) fn close_output(&mut self) {
        self.output = None;
    }

    /// Puts `bytes` at `offset` of the output file.
    pub(crate) fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        match &self.output {
            Some((_, output)) => output.write_at(bytes, offset),
            None => Err(Error::internal(format!("{} bytes for an output file that isn't open", bytes.len()))),
        }
    }

    /// Fills `into` with `tensor`'s bytes from `offset` on.
    pub(crate) fn read(&mut self, tensor: &PlannedTensor, offset: u64, into: &mut [u8]) -> Result<()> {
        let Files { source, evaluator, .. } = self;
        evaluator.read(&tensor.read, offset, into, &mut |span, bytes| source.read_at(span.file, span.offset, bytes))
    }

    /// Fills `into` with the bytes at `position` of a file of the source.
    pub(crate) fn read_at(&mut self, file: usize, position: u64, into: &mut [u8]) -> Result<()> {
        self.source.read_at(file, position, into)
    }
}

impl SourceFiles<'_, '_> {
    /// A file of the source.
    fn open(&mut self, file: usize) -> Result<&dyn ReadAt> {
        if self.open.as_ref().is_none_or(|(opened, _)| *opened != file) {
            self.open = None;
        }
        match &mut self.open {
            Some((_, file)) => Ok(&**file),
            none => Ok(&*none.insert((file, self.execution.source.files[file].reopen()?)).1),
        }
    }

    /// Fills `into` with the bytes at `position` of a file of the source.
    fn read_at(&mut self, file: usize, position: u64, into: &mut [u8]) -> Result<()> {
        let source = &self.execution.source.files[file];
        let (path, source_len, len) = (source.location.path(), source.identity.len, into.len() as u64);
        let file = self.open(file)?;
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
