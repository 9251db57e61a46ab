//! One thread's work, task by task.

use std::fs::File;
use std::path::Path;

use super::files::{Files, open_source};
use super::results::Results;
use super::ring::{Failed, Ring};
use super::scheduler::{Done, Scheduler, Task};
use super::{Job, nonfinite};
use crate::checkpoint::{Sha256Hash, hash_range};
use crate::error::{Error, IoContext, Result};
use crate::format::{BlockScheme, FloatDtype, GroupScheme, NESTED_BLOCK_SIZE, Scheme, dynamic_map};
use crate::kernel::group::{self, Groups};
use crate::kernel::{Blocks, Device, Figures, Kernel, nested, quantize_any};
use crate::plan::{Decision, NonFinitePolicy, PlannedTensor};

/// A thread with its buffers and the files it has in hand.
pub struct Worker<'j, 'a> {
    job: &'j Job<'a>,
    scheme: Scheme,
    files: Files<'j, 'a>,
    buffers: Buffers,
    /// f32 as they stand in the file.
    encoded: Vec<u8>,
}

impl<'j, 'a> Worker<'j, 'a> {
    pub fn new(job: &'j Job<'a>) -> Worker<'j, 'a> {
        Worker {
            job,
            scheme: job.plan.recipe.scheme(),
            files: Files::new(job),
            buffers: Buffers::new(job),
            encoded: Vec::new(),
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
            Task::Chunk { tensor, offset, len, global_scale } => {
                self.files.open_output(scheduler.file_of(*tensor))?;
                self.chunk(&self.job.plan.tensors[*tensor], *offset, *len, *global_scale)
            }
            Task::Measure { tensor, offset, len } => self.measure(&self.job.plan.tensors[*tensor], *offset, *len),
            Task::Nested { tensor, absmax, offset, first, len } => {
                self.files.open_output(scheduler.file_of(*tensor))?;
                self.nested(&self.job.plan.tensors[*tensor], &absmax[*first..][..*len], *first, *offset)
            }
            Task::HashFile { file } => {
                let output = self.files.open_output(*file)?;
                let hash = self.hash(output.file(), output.path(), 0, self.job.plan.files[*file].len, scheduler)?;
                Ok(Done::Hashed(vec![hash]))
            }
            Task::HashTensor { tensor } => {
                let output = self.files.open_output(scheduler.file_of(*tensor))?;
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
                self.files.close_output();
                self.job.seal(*file, outcome)?;
                Ok(Done::Written)
            }
        }
    }

    /// Reads a run of a tensor's bytes, and does with them what the plan says.
    fn chunk(&mut self, tensor: &PlannedTensor, offset: u64, len: usize, global_scale: Option<f32>) -> Result<Done> {
        let done = match (tensor.decision, self.job.means.device, &self.job.ring) {
            (Decision::Quantize(dtype), Device::Cpu(kernel), _) => {
                self.quantize(*kernel, tensor, dtype, offset, len, global_scale)?
            }
            (Decision::Quantize(dtype), Device::Cuda(_), Some(ring)) => {
                self.quantize_on_gpu(ring, tensor, dtype, offset, len)?
            }
            (Decision::Keep, ..) | (_, _, None) => {
                let bytes = &mut self.buffers.bytes[..len];
                self.files.read(tensor, offset, bytes)?;
                self.files.write(bytes, tensor.outputs[0].offset + offset)?;
                Done::Written
            }
        };
        self.job.means.progress.advanced(&tensor.name, len as u64);
        Ok(done)
    }

    fn quantize(
        &mut self,
        kernel: Kernel,
        tensor: &PlannedTensor,
        dtype: FloatDtype,
        offset: u64,
        len: usize,
        global_scale: Option<f32>,
    ) -> Result<Done> {
        self.files.read(tensor, offset, &mut self.buffers.bytes[..len])?;
        let first_element = offset / dtype.size() as u64;
        let (bytes, mut outputs) = self.buffers.split(len, dtype, &self.scheme);
        let (files, encoded) = (&self.files, &mut self.encoded);
        match &self.scheme {
            Scheme::Blocks(scheme) => {
                if kernel.quantize(outputs.blocks(bytes, dtype, scheme)).is_err() {
                    match self.job.plan.recipe.nonfinite {
                        NonFinitePolicy::Error => return Err(self.describe_nonfinite(tensor, dtype)),
                        NonFinitePolicy::Keep => quantize_any(outputs.blocks(bytes, dtype, scheme)),
                    }
                }
                let mut results = Results { files, tensor, dtype, encoded };
                results.quantized(scheme, first_element, outputs.packed, &outputs.figures)
            }
            &Scheme::Groups(scheme) => {
                let mut scales = std::mem::take(encoded);
                let finite = kernel.quantize_groups(outputs.groups(
                    bytes,
                    dtype,
                    kernel_scheme(scheme, global_scale),
                    scheme.group_len(),
                    &mut scales,
                ));
                if finite.is_err() {
                    return Err(self.describe_nonfinite(tensor, dtype));
                }
                let mut results = Results { files, tensor, dtype, encoded };
                let done =
                    results.grouped(scheme, global_scale, first_element, outputs.packed, &scales, &outputs.figures);
                self.encoded = scales;
                done
            }
        }
    }

    fn quantize_on_gpu(
        &mut self,
        ring: &Ring<'_>,
        tensor: &PlannedTensor,
        dtype: FloatDtype,
        offset: u64,
        len: usize,
    ) -> Result<Done> {
        let Scheme::Blocks(scheme) = self.scheme else { unreachable!("GPUs are given blocks only") };
        let (elements, first_element) = (len / dtype.size(), offset / dtype.size() as u64);
        ring.with(|slot| {
            self.files.read(tensor, offset, slot.source(len))?;
            let quantized = slot.quantize(elements, dtype, scheme.format, scheme.block_size)?;
            let finite = quantized.figures.absmax.iter().all(|absmax| absmax.is_finite());
            if finite {
                let mut results = Results { files: &self.files, tensor, dtype, encoded: &mut self.encoded };
                return Ok(results.quantized(&scheme, first_element, quantized.packed, &quantized.figures)?);
            }
            if self.job.plan.recipe.nonfinite == NonFinitePolicy::Error {
                return Err(Failed::Other(self.describe_nonfinite(tensor, dtype)));
            }
            let (_, mut outputs) = self.buffers.split(len, dtype, &self.scheme);
            quantize_any(outputs.blocks(slot.source(len), dtype, &scheme));
            let mut results = Results { files: &self.files, tensor, dtype, encoded: &mut self.encoded };
            Ok(results.quantized(&scheme, first_element, outputs.packed, &outputs.figures)?)
        })
    }

    /// The largest magnitude in a run of a tensor's bytes.
    fn measure(&mut self, tensor: &PlannedTensor, offset: u64, len: usize) -> Result<Done> {
        let Some(dtype) = tensor.quantized_from() else { return Ok(Done::Measured(0.0)) };
        self.files.read(tensor, offset, &mut self.buffers.bytes[..len])?;
        let kernel = match self.job.means.device {
            Device::Cpu(kernel) => *kernel,
            Device::Cuda(_) => Kernel::detect(),
        };
        match kernel.absmax(&self.buffers.bytes[..len], dtype) {
            Ok(absmax) => Ok(Done::Measured(absmax)),
            Err(_) => Err(self.describe_nonfinite(tensor, dtype)),
        }
    }

    /// Quantizes a run of absmax that starts at entry `first`.
    fn nested(&mut self, tensor: &PlannedTensor, absmax: &[f32], first: usize, offset: f32) -> Result<Done> {
        let (Some(dtype), Scheme::Blocks(scheme)) = (tensor.quantized_from(), &self.scheme) else {
            return Ok(Done::Written);
        };
        let (files, encoded) = (&self.files, &mut self.encoded);
        let mut results = Results { files, tensor, dtype, encoded };
        if let Some(ring) = &self.job.ring {
            return ring.with(|slot| {
                let (codes, nested_absmax) = slot.quantize_absmax(absmax, offset)?;
                Ok(results.nested(scheme, first, absmax, offset, codes, nested_absmax)?)
            });
        }
        let mut codes = vec![0; absmax.len()];
        let mut nested_absmax = vec![0.0; absmax.len().div_ceil(NESTED_BLOCK_SIZE)];
        nested::quantize(absmax, offset, dynamic_map(), &mut codes, &mut nested_absmax);
        results.nested(scheme, first, absmax, offset, &codes, &nested_absmax)
    }

    fn hash(
        &mut self,
        file: &File,
        path: &Path,
        offset: u64,
        len: u64,
        scheduler: &Scheduler<'_>,
    ) -> Result<Sha256Hash> {
        let buffer = &mut self.buffers.bytes;
        hash_range(self.job.means.disk, file, path, offset, len, buffer, || !scheduler.stopped())
            .at(path, "read it back")?
            .ok_or(Error::Stopped)
    }

    fn describe_nonfinite(&mut self, tensor: &PlannedTensor, dtype: FloatDtype) -> Error {
        let (disk, source) = (self.job.means.disk, self.job.source);
        for part in &tensor.parts {
            let (path, info) = (&source.files[part.file].path, &source.files[part.file].tensors[part.tensor]);
            let file = self.files.open_source(part.file);
            let buffer = &mut self.buffers.bytes;
            match file.and_then(|file| nonfinite::describe(disk, file, path, info, dtype, buffer)) {
                Ok(None) => {}
                Ok(Some(error)) | Err(error) => return error,
            }
        }
        let path = source.files[tensor.parts[0].file].path.clone();
        let why = format!("tensor {:?} held values that aren't finite, and no longer does", tensor.name);
        Error::SourceChanged { path, why }
    }
}

/// What a thread quantizes from and to; also what it hashes and copies through.
struct Buffers {
    bytes: Vec<u8>,
    packed: Vec<u8>,
    absmax: Vec<f32>,
    signal: Vec<f32>,
    noise: Vec<f32>,
    worst: Vec<f32>,
}

/// The parts of [`Buffers`] that a chunk's results go to.
struct ChunkOutputs<'b> {
    packed: &'b mut [u8],
    figures: Figures<'b>,
}

impl Buffers {
    fn new(job: &Job<'_>) -> Buffers {
        let elements = job.means.budget.chunk_elements;
        let element = job.plan.quantized().filter_map(|t| t.quantized_from()).map(FloatDtype::size).max().unwrap_or(2);
        let blocks = elements / job.plan.recipe.scheme().block_len();
        Buffers {
            bytes: vec![0; elements * element],
            packed: vec![0; elements / 2],
            absmax: vec![0.0; blocks],
            signal: vec![0.0; blocks],
            noise: vec![0.0; blocks],
            worst: vec![0.0; blocks],
        }
    }

    /// A chunk of `len` bytes, and room for its results.
    fn split(&mut self, len: usize, dtype: FloatDtype, scheme: &Scheme) -> (&[u8], ChunkOutputs<'_>) {
        let elements = len / dtype.size();
        let blocks = elements.div_ceil(scheme.block_len());
        let figures = Figures {
            absmax: &mut self.absmax[..blocks],
            signal: &mut self.signal[..blocks],
            noise: &mut self.noise[..blocks],
            worst: &mut self.worst[..blocks],
        };
        (&self.bytes[..len], ChunkOutputs { packed: &mut self.packed[..elements.div_ceil(2)], figures })
    }
}

impl ChunkOutputs<'_> {
    fn blocks<'s>(&'s mut self, source: &'s [u8], dtype: FloatDtype, scheme: &BlockScheme) -> Blocks<'s> {
        let Figures { absmax, signal, noise, worst } = &mut self.figures;
        Blocks {
            source,
            dtype,
            block_size: scheme.block_size,
            codebook: scheme.format.codebook(),
            packed: self.packed,
            figures: Figures { absmax, signal, noise, worst },
        }
    }

    /// Groups, each as a row of its own: rows are whole groups, and lie one after the other as they do.
    fn groups<'s>(
        &'s mut self,
        source: &'s [u8],
        dtype: FloatDtype,
        scheme: group::GroupScheme,
        group: usize,
        scales: &'s mut Vec<u8>,
    ) -> Groups<'s> {
        let Figures { absmax, signal, noise, worst } = &mut self.figures;
        scales.clear();
        scales.resize(absmax.len() * scheme.scale_size(dtype), 0);
        let (packed, figures) = (&mut *self.packed, Figures { absmax, signal, noise, worst });
        Groups { source, dtype, columns: group, group, scheme, packed, scales, zero_points: &mut [], figures }
    }
}

fn kernel_scheme(scheme: GroupScheme, global_scale: Option<f32>) -> group::GroupScheme {
    match scheme {
        GroupScheme::Nvfp4 => group::GroupScheme::Nvfp4 { global_scale: global_scale.unwrap_or(1.0) },
        GroupScheme::Int4(_) => group::GroupScheme::Int4,
        GroupScheme::Mxfp4 => group::GroupScheme::Mxfp4,
    }
}

impl Task {
    /// A tensor that the task belongs to: its place in the plan's order.
    fn place(&self, job: &Job<'_>) -> usize {
        match self {
            Task::Chunk { tensor, .. } | Task::Measure { tensor, .. } => *tensor,
            Task::Nested { tensor, .. } | Task::HashTensor { tensor } => *tensor,
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
