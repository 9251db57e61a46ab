//! Tensors of a few numbers, which are read whole while planning.

use super::Span;
use crate::checkpoint::Source;
use crate::error::{IoContext, Result};
use crate::store::{ReadAt, read_exact_at};

/// A checkpoint's files of weights, opened as they are needed.
pub(crate) struct SmallTensors<'a> {
    source: &'a Source,
    files: Vec<Option<Box<dyn ReadAt>>>,
}

impl<'a> SmallTensors<'a> {
    /// None is open yet.
    pub(crate) fn new(source: &'a Source) -> SmallTensors<'a> {
        SmallTensors { source, files: source.files.iter().map(|_| None).collect() }
    }

    /// All bytes of a span; whoever asks has seen that they are few.
    ///
    /// # Errors
    /// When the system refuses to open or read the file.
    pub(crate) fn read(&mut self, span: Span) -> Result<Vec<u8>> {
        let mut bytes = vec![0; span.len as usize];
        self.fill(span, &mut bytes)?;
        Ok(bytes)
    }

    /// Fills `into` with all bytes of a span.
    ///
    /// # Errors
    /// The same.
    pub(crate) fn fill(&mut self, span: Span, into: &mut [u8]) -> Result<()> {
        let source = &self.source.files[span.file];
        let file = match &mut self.files[span.file] {
            Some(file) => file,
            none => none.insert(source.reopen()?),
        };
        read_exact_at(&**file, into, span.offset).at(source.location.path(), "read it")
    }
}
