//! One thread's work, task by task.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::budget::Capacity;
use super::files::Files;
use super::results::{GroupRun, Results};
use super::scheduler::{Done, Scheduler, Task};
use super::slot_pool::{Failed, SlotPool};
use super::{Job, nonfinite};
use crate::backend::Device;
use crate::backend::cuda::{BlockKernel, GroupKernel, QuantizedGroups};
use crate::dtype::FloatDtype;
use crate::error::{Error, IoContext, Result};
use crate::format::{BlockSize, Codebook, Codec, NESTED_BLOCK_SIZE, Scales, dynamic_map};
use crate::kernel::block::nested;
use crate::kernel::group;
use crate::kernel::group::Groups;
use crate::kernel::{BlockErrors, Blocks, Kernel, quantize_any};
use crate::plan::{Decision, PlannedTensor};
use crate::store::{ReadAt, Sha256Hash, hash_range};

/// A thread with its buffers and the files it has in hand.
pub struct Worker<'j, 'a> {
    job: &'j Job<'a>,
    codec: Codec,
    files: Files<'j, 'a>,
    buffers: Buffers,
    /// f32 as they stand in the file.
    encoded: Vec<u8>,
}

impl<'j, 'a> Worker<'j, 'a> {
    pub fn new(job: &'j Job<'a>) -> Worker<'j, 'a> {
        Worker {
            job,
            codec: job.plan.recipe.codec(),
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
            Task::Chunk { tensor, offset, len, tensor_scale } => {
                self.files.open_output(scheduler.file_of(*tensor))?;
                self.chunk(&self.job.plan.tensors[*tensor], *offset, *len, *tensor_scale)
            }
            Task::Set { set, tensors } => self.set(*set, tensors, scheduler),
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
                let file = source.reopen()?;
                let hash = self.hash(&*file, source.location.path(), 0, source.identity.len, scheduler)?;
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
    fn chunk(&mut self, tensor: &PlannedTensor, offset: u64, len: usize, tensor_scale: Option<f32>) -> Result<Done> {
        let piece = |dtype: FloatDtype| {
            let first_element = offset / dtype.size() as u64;
            Piece { tensor, dtype, first_element, place: 0..len, tensor_scale }
        };
        let done = match (tensor.decision, self.job.means.device, &self.job.ring) {
            (Decision::Quantize(dtype), Device::Cpu(kernel), _) => self.quantize(*kernel, piece(dtype))?,
            (Decision::Quantize(dtype), Device::Cuda(_), Some(ring)) => match self.codec.scales {
                Scales::Blocks { .. } => self.quantize_blocks_on_gpu(ring, piece(dtype))?,
                Scales::Groups { .. } => self.quantize_groups_on_gpu(ring, piece(dtype))?,
            },
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

    fn quantize(&mut self, kernel: Kernel, piece: Piece<'_>) -> Result<Done> {
        let Piece { tensor, dtype, first_element, .. } = piece;
        self.files.read(tensor, piece.offset(), &mut self.buffers.bytes[piece.place.clone()])?;
        match self.codec.scales {
            Scales::Blocks { codebook, size, .. } => {
                let (bytes, mut outputs) = self.buffers.split(tensor, piece.place, dtype, &self.codec);
                if kernel.quantize(outputs.blocks(bytes, dtype, codebook, size)).is_err() {
                    if !self.job.plan.recipe.keeps_nonfinite() {
                        return Err(self.describe_nonfinite(tensor, dtype));
                    }
                    quantize_any(outputs.blocks(bytes, dtype, codebook, size));
                }
                let mut results = Results { files: &self.files, tensor, dtype, encoded: &mut self.encoded };
                results.quantized(&self.codec, first_element, outputs.packed, &outputs.figures)
            }
            Scales::Groups { .. } => self.quantize_groups(kernel, piece),
        }
    }

    fn quantize_groups(&mut self, kernel: Kernel, piece: Piece<'_>) -> Result<Done> {
        let Piece { tensor, dtype, first_element, place, tensor_scale } = piece;
        let (bytes, mut outputs) = self.buffers.split(tensor, place, dtype, &self.codec);
        if kernel.quantize_groups(outputs.groups(bytes, tensor, dtype, &self.codec, tensor_scale)).is_err() {
            return Err(self.describe_nonfinite(tensor, dtype));
        }
        let ChunkOutputs { packed, scales, zero_points, figures } = outputs;
        let mut results = Results { files: &self.files, tensor, dtype, encoded: &mut self.encoded };
        results.grouped(&self.codec, tensor_scale, &GroupRun { first_element, packed, scales, zero_points, figures })
    }

    /// Reads tensors that share a scale one after the other into the buffer, and quantizes from it `written` of them.
    fn set(&mut self, set: usize, written: &[usize], scheduler: &Scheduler<'_>) -> Result<Done> {
        let (plan, kernel) = (self.job.plan, self.kernel());
        let (mut absmax, mut end, mut places) = (0f32, 0, Vec::new());
        for &tensor in &plan.scale_sets[set] {
            let planned = &plan.tensors[tensor];
            let Some(dtype) = planned.quantized_from() else { continue };
            let place = end..end + planned.source_len() as usize;
            end = place.end;
            let bytes = &mut self.buffers.bytes[place.clone()];
            self.files.read(planned, 0, bytes)?;
            match kernel.absmax(bytes, dtype) {
                Ok(found) => absmax = absmax.max(found),
                Err(_) => return Err(self.describe_nonfinite(planned, dtype)),
            }
            places.push((tensor, dtype, place));
        }
        let mut done = Vec::new();
        let tensor_scale = Some(group::tensor_scale(&self.codec, absmax, plan.scale_dtype(set)));
        for (i, dtype, place) in places.into_iter().filter(|(i, ..)| written.contains(i)) {
            let tensor = &plan.tensors[i];
            self.files.open_output(scheduler.file_of(i))?;
            let piece = Piece { tensor, dtype, first_element: 0, place, tensor_scale };
            if let Done::Quantized { gathering, .. } = self.quantize_groups(kernel, piece)? {
                done.push((i, gathering));
            }
            self.job.means.progress.advanced(&tensor.name, tensor.source_len());
        }
        Ok(Done::Set(done))
    }

    /// The processor's kernel, with a GPU too.
    fn kernel(&self) -> Kernel {
        match self.job.means.device {
            Device::Cpu(kernel) => *kernel,
            Device::Cuda(_) => Kernel::detect(),
        }
    }

    fn quantize_blocks_on_gpu(&mut self, ring: &SlotPool<'_>, piece: Piece<'_>) -> Result<Done> {
        let Piece { tensor, dtype, first_element, .. } = piece;
        let elements = piece.place.len() / dtype.size();
        let Scales::Blocks { codebook, size, .. } = self.codec.scales else {
            return self.quantize(self.kernel(), piece);
        };
        let Some(kernel) = BlockKernel::new(codebook) else { return self.quantize(self.kernel(), piece) };
        ring.with(|slot| {
            self.files.read(tensor, piece.offset(), slot.source(piece.place.len()))?;
            let quantized = slot.quantize(elements, dtype, kernel, size)?;
            let finite = quantized.figures.absmax.iter().all(|absmax| absmax.is_finite());
            if finite {
                let mut results = Results { files: &self.files, tensor, dtype, encoded: &mut self.encoded };
                return Ok(results.quantized(&self.codec, first_element, quantized.packed, &quantized.figures)?);
            }
            if !self.job.plan.recipe.keeps_nonfinite() {
                return Err(Failed::Other(self.describe_nonfinite(tensor, dtype)));
            }
            let (_, mut outputs) = self.buffers.split(tensor, piece.place.clone(), dtype, &self.codec);
            quantize_any(outputs.blocks(slot.source(piece.place.len()), dtype, codebook, size));
            let mut results = Results { files: &self.files, tensor, dtype, encoded: &mut self.encoded };
            Ok(results.quantized(&self.codec, first_element, outputs.packed, &outputs.figures)?)
        })
    }

    fn quantize_groups_on_gpu(&mut self, ring: &SlotPool<'_>, piece: Piece<'_>) -> Result<Done> {
        let Piece { tensor, dtype, first_element, tensor_scale, .. } = piece;
        let elements = piece.place.len() / dtype.size();
        let (columns, coding) = (row_len(&self.codec, tensor), self.codec.coding(tensor.columns(), tensor_scale));
        let Some(kernel) = GroupKernel::new(coding, columns) else { return self.quantize(self.kernel(), piece) };
        ring.with(|slot| {
            self.files.read(tensor, piece.offset(), slot.source(piece.place.len()))?;
            let quantized = slot.quantize_groups(kernel, elements, dtype, columns, coding)?;
            let QuantizedGroups { packed, scales, zero_points, figures } = quantized;
            if figures.absmax.iter().any(|absmax| absmax.is_nan()) {
                return Err(Failed::Other(self.describe_nonfinite(tensor, dtype)));
            }
            let run = GroupRun { first_element, packed, scales, zero_points, figures };
            let mut results = Results { files: &self.files, tensor, dtype, encoded: &mut self.encoded };
            Ok(results.grouped(&self.codec, tensor_scale, &run)?)
        })
    }

    /// The largest magnitude in a run of a tensor's bytes.
    fn measure(&mut self, tensor: &PlannedTensor, offset: u64, len: usize) -> Result<Done> {
        let Some(dtype) = tensor.quantized_from() else { return Ok(Done::Measured(0.0)) };
        self.files.read(tensor, offset, &mut self.buffers.bytes[..len])?;
        match self.kernel().absmax(&self.buffers.bytes[..len], dtype) {
            Ok(absmax) => Ok(Done::Measured(absmax)),
            Err(_) => Err(self.describe_nonfinite(tensor, dtype)),
        }
    }

    /// Quantizes a run of absmax that starts at entry `first`.
    fn nested(&mut self, tensor: &PlannedTensor, absmax: &[f32], first: usize, offset: f32) -> Result<Done> {
        let Some(dtype) = tensor.quantized_from() else {
            return Ok(Done::Written);
        };
        let (files, encoded) = (&self.files, &mut self.encoded);
        let mut results = Results { files, tensor, dtype, encoded };
        if let Some(ring) = &self.job.ring {
            return ring.with(|slot| {
                let (codes, nested_absmax) = slot.quantize_absmax(absmax, offset)?;
                Ok(results.nested(&self.codec, first, absmax, offset, codes, nested_absmax)?)
            });
        }
        let mut codes = vec![0; absmax.len()];
        let mut nested_absmax = vec![0.0; absmax.len().div_ceil(NESTED_BLOCK_SIZE)];
        nested::quantize(absmax, offset, dynamic_map(), &mut codes, &mut nested_absmax);
        results.nested(&self.codec, first, absmax, offset, &codes, &nested_absmax)
    }

    fn hash(
        &mut self,
        file: &dyn ReadAt,
        path: &Path,
        offset: u64,
        len: u64,
        scheduler: &Scheduler<'_>,
    ) -> Result<Sha256Hash> {
        let buffer = &mut self.buffers.bytes;
        hash_range(file, offset, len, buffer, || !scheduler.stopped()).at(path, "read it back")?.ok_or(Error::Stopped)
    }

    fn describe_nonfinite(&mut self, tensor: &PlannedTensor, dtype: FloatDtype) -> Error {
        let buffer = &mut self.buffers.bytes;
        if tensor.is_decoded() {
            let path = self.job.source.files[tensor.read.first_file()].location.path().to_owned();
            let read = |offset, bytes: &mut [u8]| self.files.read(tensor, offset, bytes);
            return nonfinite::describe(&path, &tensor.name, tensor.source_len(), dtype, buffer, read)
                .unwrap_or_else(Some)
                .unwrap_or_else(|| no_longer(path, tensor));
        }
        // Where they are in the source, of which the tensor may have another order.
        let source = self.job.source;
        for span in tensor.read.spans() {
            let (path, info) = (source.files[span.file].location.path(), &source.files[span.file].tensors[span.tensor]);
            let read = |offset, bytes: &mut [u8]| self.files.read_at(span.file, info.offset + offset, bytes);
            match nonfinite::describe(path, &info.name, info.len, dtype, buffer, read) {
                Ok(None) => {}
                Ok(Some(error)) | Err(error) => return error,
            }
        }
        no_longer(source.files[tensor.read.first_file()].location.path().to_owned(), tensor)
    }
}

fn no_longer(path: PathBuf, tensor: &PlannedTensor) -> Error {
    let why = format!("tensor {:?} held values that aren't finite, and no longer does", tensor.name);
    Error::SourceChanged { path, why }
}

/// The length of the rows that kernels take a tensor for. Where a chunk isn't whole rows, rows have no padding: groups lie one
/// after the other, as rows do.
fn row_len(codec: &Codec, tensor: &PlannedTensor) -> usize {
    let columns = tensor.columns();
    (if codec.has_whole_rows() { columns } else { codec.block_len(columns) }) as usize
}

/// A run of whole blocks or groups in a buffer.
struct Piece<'p> {
    tensor: &'p PlannedTensor,
    dtype: FloatDtype,
    /// The run's first element in the tensor.
    first_element: u64,
    /// Where it is in the buffer.
    place: Range<usize>,
    tensor_scale: Option<f32>,
}

impl Piece<'_> {
    /// The run's first byte in the tensor.
    fn offset(&self) -> u64 {
        self.first_element * self.dtype.size() as u64
    }
}

/// What a thread quantizes from and to; also what it hashes and copies through.
struct Buffers {
    bytes: Vec<u8>,
    packed: Vec<u8>,
    scales: Vec<u8>,
    zero_points: Vec<u8>,
    absmax: Vec<f32>,
    signal: Vec<f32>,
    noise: Vec<f32>,
    worst: Vec<f32>,
}

/// The parts of [`Buffers`] that a chunk's results go to.
struct ChunkOutputs<'b> {
    packed: &'b mut [u8],
    /// As stored; of groups only.
    scales: &'b mut [u8],
    zero_points: &'b mut [u8],
    figures: BlockErrors<'b>,
}

impl Buffers {
    fn new(job: &Job<'_>) -> Buffers {
        let Capacity { source, packed, groups } = Capacity::new(job.plan, job.means.budget.chunk_elements);
        Buffers {
            bytes: vec![0; source],
            packed: vec![0; packed],
            scales: vec![0; groups * size_of::<f32>()],
            zero_points: vec![0; groups],
            absmax: vec![0.0; groups],
            signal: vec![0.0; groups],
            noise: vec![0.0; groups],
            worst: vec![0.0; groups],
        }
    }

    /// The bytes of `tensor` at a place, and room for their results.
    fn split(
        &mut self,
        tensor: &PlannedTensor,
        place: Range<usize>,
        dtype: FloatDtype,
        codec: &Codec,
    ) -> (&[u8], ChunkOutputs<'_>) {
        let (elements, columns) = ((place.len() / dtype.size()) as u64, tensor.columns());
        let groups = elements.div_ceil(codec.block_len(columns)) as usize;
        let (scale_size, points) = match codec.is_blocks() {
            true => (0, false),
            false => (codec.scale_size(dtype), codec.has_zero_points()),
        };
        let outputs = ChunkOutputs {
            packed: &mut self.packed[..codec.packed_len(elements, columns) as usize],
            scales: &mut self.scales[..groups * scale_size],
            zero_points: &mut self.zero_points[..if points { groups } else { 0 }],
            figures: BlockErrors {
                absmax: &mut self.absmax[..groups],
                signal: &mut self.signal[..groups],
                noise: &mut self.noise[..groups],
                worst: &mut self.worst[..groups],
            },
        };
        (&self.bytes[place], outputs)
    }
}

impl ChunkOutputs<'_> {
    fn blocks<'s>(
        &'s mut self,
        source: &'s [u8],
        dtype: FloatDtype,
        codebook: &'static Codebook,
        block_size: BlockSize,
    ) -> Blocks<'s> {
        let BlockErrors { absmax, signal, noise, worst } = &mut self.figures;
        Blocks {
            source,
            dtype,
            block_size,
            codebook,
            packed: self.packed,
            figures: BlockErrors { absmax, signal, noise, worst },
        }
    }

    fn groups<'s>(
        &'s mut self,
        source: &'s [u8],
        tensor: &PlannedTensor,
        dtype: FloatDtype,
        codec: &Codec,
        tensor_scale: Option<f32>,
    ) -> Groups<'s> {
        let BlockErrors { absmax, signal, noise, worst } = &mut self.figures;
        Groups {
            source,
            dtype,
            columns: row_len(codec, tensor),
            coding: codec.coding(tensor.columns(), tensor_scale),
            packed: self.packed,
            scales: self.scales,
            zero_points: self.zero_points,
            figures: BlockErrors { absmax, signal, noise, worst },
        }
    }
}

impl Task {
    /// A tensor that the task belongs to: its place in the plan's order.
    fn place(&self, job: &Job<'_>) -> usize {
        match self {
            Task::Chunk { tensor, .. } | Task::Measure { tensor, .. } => *tensor,
            Task::Set { set, .. } => job.plan.scale_sets[*set].iter().copied().min().unwrap_or_default(),
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
