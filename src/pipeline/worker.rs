//! One thread's work, task by task.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::scheduler::{Done, Scheduler, Task};
use super::{Job, Output, nonfinite};
use crate::checkpoint::{Sha256Hash, SourceFile, hash_range, read_exact_at};
use crate::error::{Error, IoContext, Result};
use crate::format::{FloatDtype, NESTED_BLOCK_SIZE, OutputKind, QuantState, Scheme, dynamic_map, quant_state_bytes};
use crate::kernel::{Blocks, Figures, nested, quantize_any};
use crate::plan::{Decision, NonFinitePolicy, PlannedTensor};
use crate::stats::{AbsmaxGathering, Gathering};

/// How far ahead of a read the system is told of it.
const READ_AHEAD: u64 = 16 << 20;

/// A thread with its buffers and the files it has in hand.
pub struct Worker<'j, 'a> {
    job: &'j Job<'a>,
    scheme: Scheme,
    source: Option<(usize, File)>,
    output: Option<(usize, Arc<dyn Output + 'a>)>,
    bytes: Vec<u8>,
    packed: Vec<u8>,
    absmax: Vec<f32>,
    signal: Vec<f32>,
    noise: Vec<f32>,
    worst: Vec<f32>,
    /// f32 as they stand in the file.
    encoded: Vec<u8>,
}

impl<'j, 'a> Worker<'j, 'a> {
    pub fn new(job: &'j Job<'a>) -> Worker<'j, 'a> {
        let elements = job.means.budget.chunk_elements;
        let element = job.plan.quantized().filter_map(|t| t.quantized_from()).map(FloatDtype::size).max().unwrap_or(2);
        let blocks = elements / job.plan.recipe.block_size.get();
        Worker {
            job,
            scheme: job.plan.recipe.scheme(),
            source: None,
            output: None,
            bytes: vec![0; elements * element],
            packed: vec![0; elements / 2],
            absmax: vec![0.0; blocks],
            signal: vec![0.0; blocks],
            noise: vec![0.0; blocks],
            worst: vec![0.0; blocks],
            encoded: Vec::with_capacity(blocks * size_of::<f32>()),
        }
    }

    /// Takes tasks until there is none any more.
    pub fn work(mut self, scheduler: &Scheduler<'_>) {
        let _guard = StopOnPanic(scheduler);
        while let Some(task) = scheduler.next() {
            match self.perform(&task, scheduler) {
                Ok(done) => scheduler.finish(task, done),
                Err(error) => scheduler.fail(task.place(self.job), error),
            }
        }
    }

    fn perform(&mut self, task: &Task, scheduler: &Scheduler<'_>) -> Result<Done> {
        match task {
            Task::Chunk { tensor, offset, len } => {
                self.open_output(scheduler.file_of(*tensor))?;
                self.chunk(&self.job.plan.tensors[*tensor], *offset, *len)
            }
            Task::Nested { tensor, absmax, offset, first, len } => {
                self.open_output(scheduler.file_of(*tensor))?;
                self.nested(&self.job.plan.tensors[*tensor], &absmax[*first..][..*len], *first, *offset)
            }
            Task::HashFile { file } => {
                let output = self.open_output(*file)?;
                let hash = self.hash(output.file(), output.path(), 0, self.job.plan.files[*file].len, scheduler)?;
                Ok(Done::Hashed(vec![hash]))
            }
            Task::HashTensor { tensor } => {
                let output = self.open_output(scheduler.file_of(*tensor))?;
                let outputs = self.job.plan.tensors[*tensor].outputs.iter();
                let hashes =
                    outputs.map(|part| self.hash(output.file(), output.path(), part.offset, part.len, scheduler));
                Ok(Done::Hashed(hashes.collect::<Result<_>>()?))
            }
            Task::HashSource { file } => {
                let source = &self.job.source.files[*file];
                let file = open_source(source)?;
                let hash = self.hash(&file, &source.path, 0, source.len, scheduler)?;
                self.job.outputs.source_hashed(source, hash)?;
                Ok(Done::Hashed(vec![hash]))
            }
            Task::Seal { file, outcome } => {
                self.output = None;
                self.job.seal(*file, outcome)?;
                Ok(Done::Written)
            }
        }
    }

    fn open_output(&mut self, file: usize) -> Result<Arc<dyn Output + 'a>> {
        if let Some((_, output)) = self.output.as_ref().filter(|(opened, _)| *opened == file) {
            return Ok(output.clone());
        }
        let output = self.job.output(file)?;
        self.output = Some((file, output.clone()));
        Ok(output)
    }

    fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        match &self.output {
            Some((_, output)) => output.write_at(bytes, offset),
            None => Ok(()),
        }
    }

    /// Reads a run of a tensor's bytes, and does with them what the plan says.
    fn chunk(&mut self, tensor: &PlannedTensor, offset: u64, len: usize) -> Result<Done> {
        self.read(tensor, offset, len)?;
        let done = match tensor.decision {
            Decision::Keep => {
                self.write(&self.bytes[..len], tensor.outputs[0].offset + offset)?;
                Done::Written
            }
            Decision::Quantize(dtype) => self.quantize(tensor, dtype, offset, len)?,
        };
        self.job.means.progress.advanced(&tensor.info.name, len as u64);
        Ok(done)
    }

    fn read(&mut self, tensor: &PlannedTensor, offset: u64, len: usize) -> Result<()> {
        let source = &self.job.source.files[tensor.source_file];
        if self.source.as_ref().is_none_or(|(opened, _)| *opened != tensor.source_file) {
            self.source = Some((tensor.source_file, open_source(source)?));
        }
        let Some((_, file)) = &self.source else { return Ok(()) };
        let position = tensor.info.offset + offset;
        advise(file, position + READ_AHEAD, len as u64, source.len);
        match read_exact_at(self.job.means.disk, file, &source.path, &mut self.bytes[..len], position) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                let why = format!("it ends before byte {}, and had {} bytes", position + len as u64, source.len);
                Err(Error::SourceChanged { path: source.path.clone(), why })
            }
            other => other.at(&source.path, "read it"),
        }
    }

    fn quantize(&mut self, tensor: &PlannedTensor, dtype: FloatDtype, offset: u64, len: usize) -> Result<Done> {
        let elements = len / dtype.size();
        let blocks = elements.div_ceil(self.scheme.block_size.get());
        let first_element = offset / dtype.size() as u64;
        let first_block = first_element / self.scheme.block_size.get() as u64;
        if self.job.means.kernel.quantize(self.blocks(dtype, len)).is_err() {
            match self.job.plan.recipe.nonfinite {
                NonFinitePolicy::Error => return Err(self.describe_nonfinite(tensor, dtype)),
                NonFinitePolicy::Keep => quantize_any(self.blocks(dtype, len)),
            }
        }
        if offset == 0 {
            self.write_constants(tensor, dtype)?;
        }
        self.write(&self.packed[..elements.div_ceil(2)], tensor.output(OutputKind::Packed).offset + first_element / 2)?;
        let absmax = if self.scheme.double_quant {
            Some((first_block as usize, self.absmax[..blocks].to_vec()))
        } else {
            encode(&self.absmax[..blocks], &mut self.encoded);
            self.write(&self.encoded, tensor.output(OutputKind::Absmax).offset + first_block * 4)?;
            None
        };
        let mut gathering = Box::<Gathering>::default();
        gathering.add(&self.blocks(dtype, len).figures);
        Ok(Done::Quantized { gathering, absmax })
    }

    /// The first `len` bytes in hand, and where their codes and figures go.
    fn blocks(&mut self, dtype: FloatDtype, len: usize) -> Blocks<'_> {
        let elements = len / dtype.size();
        let blocks = elements.div_ceil(self.scheme.block_size.get());
        Blocks {
            source: &self.bytes[..len],
            dtype,
            block_size: self.scheme.block_size,
            codebook: self.scheme.format.codebook(),
            packed: &mut self.packed[..elements.div_ceil(2)],
            figures: Figures {
                absmax: &mut self.absmax[..blocks],
                signal: &mut self.signal[..blocks],
                noise: &mut self.noise[..blocks],
                worst: &mut self.worst[..blocks],
            },
        }
    }

    /// Writes the outputs that are known without the weights.
    fn write_constants(&mut self, tensor: &PlannedTensor, dtype: FloatDtype) -> Result<()> {
        encode(&self.scheme.format.codebook().values(), &mut self.encoded);
        self.write(&self.encoded, tensor.output(OutputKind::QuantMap).offset)?;
        if self.scheme.double_quant {
            encode(dynamic_map().values(), &mut self.encoded);
            self.write(&self.encoded, tensor.output(OutputKind::NestedQuantMap).offset)
        } else {
            self.write_quant_state(tensor, dtype, 0.0)
        }
    }

    fn write_quant_state(&self, tensor: &PlannedTensor, dtype: FloatDtype, nested_offset: f32) -> Result<()> {
        let state = QuantState { scheme: &self.scheme, dtype, shape: &tensor.info.shape, nested_offset };
        self.write(&quant_state_bytes(&state), tensor.output(OutputKind::QuantState).offset)
    }

    /// Quantizes a run of absmax that starts at entry `first`.
    fn nested(&mut self, tensor: &PlannedTensor, absmax: &[f32], first: usize, offset: f32) -> Result<Done> {
        let map = dynamic_map();
        let mut codes = vec![0; absmax.len()];
        let mut nested_absmax = vec![0.0; absmax.len().div_ceil(NESTED_BLOCK_SIZE)];
        nested::quantize(absmax, offset, map, &mut codes, &mut nested_absmax);
        self.write(&codes, tensor.output(OutputKind::Absmax).offset + first as u64)?;
        encode(&nested_absmax, &mut self.encoded);
        let nested_offset = (first / NESTED_BLOCK_SIZE * size_of::<f32>()) as u64;
        self.write(&self.encoded, tensor.output(OutputKind::NestedAbsmax).offset + nested_offset)?;
        if let (0, Some(dtype)) = (first, tensor.quantized_from()) {
            self.write_quant_state(tensor, dtype, offset)?;
        }
        let mut error = AbsmaxGathering::default();
        let blocks = absmax.chunks(NESTED_BLOCK_SIZE).zip(codes.chunks(NESTED_BLOCK_SIZE)).zip(&nested_absmax);
        for ((absmax, codes), nested) in blocks {
            let restored = codes.iter().map(|&code| nested::restore(code, *nested, offset, map));
            error.add(absmax.iter().copied().zip(restored));
        }
        Ok(Done::Nested(error))
    }

    fn hash(
        &mut self,
        file: &File,
        path: &Path,
        offset: u64,
        len: u64,
        scheduler: &Scheduler<'_>,
    ) -> Result<Sha256Hash> {
        hash_range(self.job.means.disk, file, path, offset, len, &mut self.bytes, || !scheduler.stopped())
            .at(path, "read it back")?
            .ok_or(Error::Stopped)
    }

    fn describe_nonfinite(&mut self, tensor: &PlannedTensor, dtype: FloatDtype) -> Error {
        let path = &self.job.source.files[tensor.source_file].path;
        let Some((_, file)) = &self.source else { return Error::Stopped };
        nonfinite::describe(self.job.means.disk, file, path, &tensor.info, dtype, &mut self.bytes)
            .unwrap_or_else(|error| error)
    }
}

impl Task {
    /// A tensor that the task belongs to: its place in the plan's order.
    fn place(&self, job: &Job<'_>) -> usize {
        match self {
            Task::Chunk { tensor, .. } | Task::Nested { tensor, .. } | Task::HashTensor { tensor } => *tensor,
            Task::HashFile { file } | Task::Seal { file, .. } => job.plan.files[*file].tensors.start,
            Task::HashSource { .. } => job.plan.tensors.len(),
        }
    }
}

/// A thread that panics would leave the others waiting for it.
struct StopOnPanic<'a>(&'a Scheduler<'a>);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(usize::MAX, Error::Stopped);
        }
    }
}

/// Opens a source file anew, and holds its size against what it was when its header was read.
fn open_source(source: &SourceFile) -> Result<File> {
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

fn encode(values: &[f32], bytes: &mut Vec<u8>) {
    bytes.clear();
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
}
