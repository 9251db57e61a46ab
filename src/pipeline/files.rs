//! The files that a thread has in hand: one of the source, and one of the output.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::{Job, Output};
use crate::checkpoint::SourceFile;
use crate::error::{Error, IoContext, Result};
use crate::plan::PlannedTensor;
use crate::read::Evaluator;
use crate::store::read_exact_at;

/// How far ahead of a read the system is told of it.
const READ_AHEAD: u64 = 16 << 20;

/// Open files, kept open from task to task.
pub struct Files<'j, 'a> {
    job: &'j Job<'a>,
    source: SourceFiles<'j, 'a>,
    output: Option<(usize, Arc<dyn Output + 'a>)>,
    evaluator: Evaluator,
}

/// The source's file that was read last, open.
struct SourceFiles<'j, 'a> {
    job: &'j Job<'a>,
    open: Option<(usize, File)>,
}

impl<'j, 'a> Files<'j, 'a> {
    pub fn new(job: &'j Job<'a>) -> Files<'j, 'a> {
        Files { job, source: SourceFiles { job, open: None }, output: None, evaluator: Evaluator::default() }
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
    pub fn read(&mut self, tensor: &PlannedTensor, offset: u64, into: &mut [u8]) -> Result<()> {
        let Files { source, evaluator, .. } = self;
        evaluator.read(&tensor.read, offset, into, &mut |span, bytes| source.read_at(span.file, span.offset, bytes))
    }

    /// Fills `into` with the bytes at `position` of a file of the source.
    pub fn read_at(&mut self, file: usize, position: u64, into: &mut [u8]) -> Result<()> {
        self.source.read_at(file, position, into)
    }
}

impl SourceFiles<'_, '_> {
    /// A file of the source.
    fn open(&mut self, file: usize) -> Result<&File> {
        if self.open.as_ref().is_none_or(|(opened, _)| *opened != file) {
            self.open = None;
        }
        match &mut self.open {
            Some((_, file)) => Ok(file),
            none => Ok(&none.insert((file, open_source(&self.job.source.files[file])?)).1),
        }
    }

    /// Fills `into` with the bytes at `position` of a file of the source.
    fn read_at(&mut self, file: usize, position: u64, into: &mut [u8]) -> Result<()> {
        let (disk, source) = (self.job.means.disk, &self.job.source.files[file]);
        let len = into.len() as u64;
        let file = self.open(file)?;
        advise(file, position + READ_AHEAD, len, source.len);
        match read_exact_at(disk, file, &source.path, into, position) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                let why = format!("it ends before byte {}, and had {} bytes", position + len, source.len);
                Err(Error::SourceChanged { path: source.path.clone(), why })
            }
            other => other.at(&source.path, "read it"),
        }
    }
}

/// Opens a source file anew, and holds its size against what it was when its header was read.
pub fn open_source(source: &SourceFile) -> Result<File> {
    let file = File::open(&source.path).at(&source.path, "open it")?;
    let len = file.metadata().at(&source.path, "look at it")?.len();
    if len == source.len {
        return Ok(file);
    }
    let why = format!("it has {len} bytes, and had {}", source.len);
    Err(Error::SourceChanged { path: source.path.clone(), why })
}

/// Tells the system that a run of a file will be read soon, as far as the file goes. A hint: failure changes nothing.
fn advise(file: &File, position: u64, len: u64, file_len: u64) {
    #[cfg(target_os = "linux")]
    if position < file_len {
        let len = std::num::NonZeroU64::new(len.min(file_len - position));
        let _ = rustix::fs::fadvise(file, position, len, rustix::fs::Advice::WillNeed);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, position, len, file_len);
}
