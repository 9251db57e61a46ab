//! The file of the source that a thread reads, kept open from task to task.

use std::io;

use super::Execution;
use super::trace::{Span, Subject, ThreadTrace};
use crate::error::{Error, IoContext, Result};
use crate::read::Evaluator;
use crate::store::{ReadAt, read_exact_at};

/// Reads tensors.
pub(crate) struct SourceFiles<'j, 'a> {
    open: OpenFile<'j, 'a>,
    trace: &'j ThreadTrace<'a>,
    evaluator: Evaluator,
}

/// The file that was read last.
pub(super) struct OpenFile<'j, 'a> {
    execution: &'j Execution<'a>,
    open: Option<(usize, Box<dyn ReadAt>)>,
}

impl<'j, 'a> SourceFiles<'j, 'a> {
    pub(crate) fn new(execution: &'j Execution<'a>, trace: &'j ThreadTrace<'a>) -> SourceFiles<'j, 'a> {
        let kernel = execution.context.device.cpu().kernel();
        SourceFiles { open: OpenFile::new(execution), trace, evaluator: Evaluator::new(kernel) }
    }

    /// Fills `into` with the bytes of the plan's `tensor`th from `offset` on.
    pub(crate) fn read(&mut self, tensor: usize, offset: u64, into: &mut [u8]) -> Result<()> {
        let SourceFiles { open, trace, evaluator } = self;
        let (begin, len) = (trace.begin(), into.len() as u64);
        let read = &open.execution.plan.tensors[tensor].read;
        evaluator.read(read, offset, into, &mut |span, bytes| open.read_at(span.file, span.offset, bytes))?;
        trace.end(begin, Span::Read, Subject::Tensor(tensor), len);
        Ok(())
    }

    /// Fills `into` with the bytes at `position` of a file of the source.
    pub(crate) fn read_at(&mut self, file: usize, position: u64, into: &mut [u8]) -> Result<()> {
        self.open.read_at(file, position, into)
    }
}

impl<'j, 'a> OpenFile<'j, 'a> {
    pub(super) fn new(execution: &'j Execution<'a>) -> OpenFile<'j, 'a> {
        OpenFile { execution, open: None }
    }

    /// A file of the source, open.
    pub(super) fn get(&mut self, file: usize) -> Result<&dyn ReadAt> {
        if self.open.as_ref().is_none_or(|(opened, _)| *opened != file) {
            self.open = None;
        }
        match &mut self.open {
            Some((_, file)) => Ok(&**file),
            none => Ok(&*none.insert((file, self.execution.source.files[file].reopen()?)).1),
        }
    }

    fn read_at(&mut self, file: usize, position: u64, into: &mut [u8]) -> Result<()> {
        let source = &self.execution.source.files[file];
        let (path, source_len, len) = (source.location.path(), source.identity.len, into.len() as u64);
        match read_exact_at(self.get(file)?, into, position) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                let why = format!("it ends before byte {}, and had {source_len} bytes", position + len);
                Err(Error::SourceChanged { path: path.to_owned(), why })
            }
            other => other.at(path, "read it"),
        }
    }
}
