//! One thread's work, task by task.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::budget::lane_size;
use super::files::Files;
use super::lane_pool::Failed;
use super::results::Results;
use super::scheduler::{Done, Scheduler, Task};
use super::{Execution, nonfinite};
use crate::backend::{CpuLane, Lane, Run};
use crate::dtype::FloatDtype;
use crate::error::{Error, IoContext, Result};
use crate::format::Codec;
use crate::kernel::group;
use crate::plan::{Decision, PlannedTensor};
use crate::store::{ReadAt, Sha256Hash, hash_range};

/// A thread with its lane on the processor and the files it has in hand.
pub(crate) struct Worker<'j, 'a> {
    execution: &'j Execution<'a>,
    codec: Codec,
    files: Files<'j, 'a>,
    /// What is copied and hashed goes through its room, too.
    lane: CpuLane,
    /// Numbers as they stand in the file.
    bytes: Vec<u8>,
}

impl<'j, 'a> Worker<'j, 'a> {
    pub(crate) fn new(execution: &'j Execution<'a>) -> Worker<'j, 'a> {
        Worker {
            execution,
            codec: execution.plan.recipe.codec(),
            files: Files::new(execution),
            lane: execution
                .context
                .device
                .cpu()
                .lane(&lane_size(execution.plan, execution.context.budget.chunk_elements)),
            bytes: Vec::new(),
        }
    }

    /// Takes tasks until there is none any more.
    pub(crate) fn work(mut self, scheduler: &Scheduler<'_>) {
        let _guard = StopOnPanic(scheduler);
        while let Some(task) = scheduler.next() {
            match self.perform(&task, scheduler) {
                Ok(done) => scheduler.finish(task, done),
                Err(error) => scheduler.fail(task.place(self.execution), error),
            }
        }
    }

    fn perform(&mut self, task: &Task, scheduler: &Scheduler<'_>) -> Result<Done> {
        match task {
            Task::Chunk { tensor, offset, len, tensor_scale } => {
                self.files.open_output(scheduler.file_of(*tensor))?;
                self.chunk(&self.execution.plan.tensors[*tensor], *offset, *len, *tensor_scale)
            }
            Task::Set { set, tensors } => self.set(*set, tensors, scheduler),
            Task::Measure { tensor, offset, len } => self.measure(&self.execution.plan.tensors[*tensor], *offset, *len),
            Task::Nested { tensor, absmax, offset, first, len } => {
                self.files.open_output(scheduler.file_of(*tensor))?;
                self.nested(&self.execution.plan.tensors[*tensor], &absmax[*first..][..*len], *first, *offset)
            }
            Task::HashFile { file } => {
                let output = self.files.open_output(*file)?;
                let hash =
                    self.hash(output.file(), output.path(), 0, self.execution.plan.files[*file].len, scheduler)?;
                Ok(Done::Hashed(vec![hash]))
            }
            Task::HashTensor { tensor } => {
                let output = self.files.open_output(scheduler.file_of(*tensor))?;
                let outputs = self.execution.plan.tensors[*tensor].outputs.iter();
                let hashes =
                    outputs.map(|part| self.hash(output.file(), output.path(), part.offset, part.len, scheduler));
                Ok(Done::Hashed(hashes.collect::<Result<_>>()?))
            }
            Task::HashSource { file } => {
                let source = &self.execution.source.files[*file];
                let file = source.reopen()?;
                let hash = self.hash(&*file, source.location.path(), 0, source.identity.len, scheduler)?;
                self.execution.outputs.source_hashed(source, hash)?;
                Ok(Done::Hashed(vec![hash]))
            }
            Task::Seal { file, outcome } => {
                self.files.close_output();
                self.execution.seal(*file, outcome)?;
                Ok(Done::Written)
            }
        }
    }

    /// Reads a run of a tensor's bytes, and does with them what the plan says.
    fn chunk(&mut self, tensor: &PlannedTensor, offset: u64, len: usize, tensor_scale: Option<f32>) -> Result<Done> {
        let done = match tensor.decision {
            Decision::Quantize(dtype) => {
                let first = offset / dtype.size() as u64;
                self.quantize(&Piece { tensor, dtype, first, place: 0..len, tensor_scale })?
            }
            Decision::Keep => {
                let bytes = self.lane.source(len);
                self.files.read(tensor, offset, bytes)?;
                self.files.write(bytes, tensor.outputs[0].offset + offset)?;
                Done::Written
            }
        };
        self.execution.context.progress.advanced(&tensor.name, len as u64);
        Ok(done)
    }

    /// Reads and quantizes a run: on a device, if there is one that has a kernel for it.
    fn quantize(&mut self, piece: &Piece<'_>) -> Result<Done> {
        let (execution, tensor, len) = (self.execution, piece.tensor, piece.place.len());
        let lanes =
            execution.lanes.as_ref().filter(|_| execution.context.device.quantizes(&self.codec, tensor.columns()));
        let Some(lanes) = lanes else {
            self.files.read(tensor, piece.offset(), self.lane.source(len))?;
            return self.quantize_here(piece);
        };
        lanes.with(|lane| {
            self.files.read(tensor, piece.offset(), lane.source(len))?;
            let (_, mut results) = self.parts(piece);
            if let Some(done) = quantize_in(lane, &mut results, piece)? {
                return Ok(done);
            }
            self.lane.source(len).copy_from_slice(lane.source(len));
            Ok(self.quantize_nonfinite(piece)?)
        })
    }

    /// Quantizes a run that is in the thread's own lane.
    fn quantize_here(&mut self, piece: &Piece<'_>) -> Result<Done> {
        let (lane, mut results) = self.parts(piece);
        match quantize_in(lane, &mut results, piece)? {
            Some(done) => Ok(done),
            None => self.quantize_nonfinite(piece),
        }
    }

    /// Does what the recipe says with a run that holds a NaN or an infinity, and is in the thread's own lane.
    fn quantize_nonfinite(&mut self, piece: &Piece<'_>) -> Result<Done> {
        if self.execution.plan.recipe.keeps_nonfinite() {
            let (lane, mut results) = self.parts(piece);
            if let Some(encoded) = lane.quantize_any(&piece.run(results.codec)) {
                return results.quantized(piece.first, piece.tensor_scale, &encoded);
            }
        }
        Err(self.describe_nonfinite(piece.tensor, piece.dtype))
    }

    /// The thread's own lane, and where a run's results go.
    fn parts<'s>(&'s mut self, piece: &Piece<'s>) -> (&'s mut CpuLane, Results<'s, 'j, 'a>) {
        let Worker { files, codec, lane, bytes, .. } = self;
        (lane, Results { files, codec, tensor: piece.tensor, dtype: piece.dtype, bytes })
    }

    /// Reads tensors that share a scale one after the other into the thread's lane, and quantizes there `written` of them.
    fn set(&mut self, set: usize, written: &[usize], scheduler: &Scheduler<'_>) -> Result<Done> {
        let plan = self.execution.plan;
        let (mut absmax, mut end, mut places) = (0f32, 0, Vec::new());
        for &i in &plan.scale_sets[set] {
            let tensor = &plan.tensors[i];
            let dtype = quantized_from(tensor)?;
            let place = end..end + tensor.source_len() as usize;
            end = place.end;
            self.files.read(tensor, 0, &mut self.lane.buffer()[place.clone()])?;
            match self.lane.absmax(place.clone(), dtype) {
                Ok(found) => absmax = absmax.max(found),
                Err(_) => return Err(self.describe_nonfinite(tensor, dtype)),
            }
            places.push((i, dtype, place));
        }
        let mut done = Vec::new();
        let tensor_scale = Some(group::tensor_scale(&self.codec, absmax, plan.scale_dtype(set)));
        for (i, dtype, place) in places.into_iter().filter(|(i, ..)| written.contains(i)) {
            let tensor = &plan.tensors[i];
            self.files.open_output(scheduler.file_of(i))?;
            let piece = Piece { tensor, dtype, first: 0, place, tensor_scale };
            match self.quantize_here(&piece)? {
                Done::Quantized { accumulator, .. } => done.push((i, accumulator)),
                other => return Err(Error::internal(format!("tensor {:?} gave {other:?}", tensor.name))),
            }
            self.execution.context.progress.advanced(&tensor.name, tensor.source_len());
        }
        Ok(Done::Set(done))
    }

    /// The largest magnitude in a run of a tensor's bytes.
    fn measure(&mut self, tensor: &PlannedTensor, offset: u64, len: usize) -> Result<Done> {
        let dtype = quantized_from(tensor)?;
        self.files.read(tensor, offset, self.lane.source(len))?;
        match self.lane.absmax(0..len, dtype) {
            Ok(absmax) => Ok(Done::Measured(absmax)),
            Err(_) => Err(self.describe_nonfinite(tensor, dtype)),
        }
    }

    /// Quantizes a run of absmax that starts at entry `first`.
    fn nested(&mut self, tensor: &PlannedTensor, absmax: &[f32], first: usize, offset: f32) -> Result<Done> {
        let (execution, dtype) = (self.execution, quantized_from(tensor)?);
        let Worker { files, codec, lane, bytes, .. } = self;
        let mut results = Results { files, codec, tensor, dtype, bytes };
        let mut quantize = |lane: &mut dyn Lane| {
            let (codes, nested_absmax) = lane.quantize_absmax(absmax, offset)?;
            Ok(results.nested(first, absmax, offset, codes, nested_absmax)?)
        };
        match execution.lanes.as_ref().filter(|_| execution.context.device.quantizes(codec, tensor.columns())) {
            Some(lanes) => lanes.with(quantize),
            None => quantize(lane).map_err(Failed::into),
        }
    }

    fn hash(
        &mut self,
        file: &dyn ReadAt,
        path: &Path,
        offset: u64,
        len: u64,
        scheduler: &Scheduler<'_>,
    ) -> Result<Sha256Hash> {
        let buffer = self.lane.buffer();
        hash_range(file, offset, len, buffer, || !scheduler.stopped()).at(path, "read it back")?.ok_or(Error::Stopped)
    }

    fn describe_nonfinite(&mut self, tensor: &PlannedTensor, dtype: FloatDtype) -> Error {
        let buffer = self.lane.buffer();
        if tensor.is_decoded() {
            let path = self.execution.source.files[tensor.read.first_file()].location.path().to_owned();
            let read = |offset, bytes: &mut [u8]| self.files.read(tensor, offset, bytes);
            return nonfinite::describe(&path, &tensor.name, tensor.source_len(), dtype, buffer, read)
                .unwrap_or_else(Some)
                .unwrap_or_else(|| no_longer(path, tensor));
        }
        // Where they are in the source, of which the tensor may have another order.
        let source = self.execution.source;
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

/// The dtype that a tensor is quantized from.
fn quantized_from(tensor: &PlannedTensor) -> Result<FloatDtype> {
    let none = || Error::internal(format!("tensor {:?} is kept, and was to be quantized", tensor.name));
    tensor.quantized_from().ok_or_else(none)
}

/// Quantizes a run that is in a lane, and writes what comes of it; `None` if it holds a NaN or an infinity.
fn quantize_in(
    lane: &mut dyn Lane,
    results: &mut Results<'_, '_, '_>,
    piece: &Piece<'_>,
) -> Result<Option<Done>, Failed> {
    match lane.quantize(&piece.run(results.codec))? {
        Some(encoded) => Ok(Some(results.quantized(piece.first, piece.tensor_scale, &encoded)?)),
        None => Ok(None),
    }
}

/// A run of whole blocks or groups in a lane.
struct Piece<'p> {
    tensor: &'p PlannedTensor,
    dtype: FloatDtype,
    /// The run's first element in the tensor.
    first: u64,
    /// Where it is in the lane's source.
    place: Range<usize>,
    tensor_scale: Option<f32>,
}

impl Piece<'_> {
    /// The run's first byte in the tensor.
    fn offset(&self) -> u64 {
        self.first * self.dtype.size() as u64
    }

    fn run<'s>(&self, codec: &'s Codec) -> Run<'s> {
        let Piece { tensor, dtype, tensor_scale, .. } = *self;
        Run { codec, dtype, columns: tensor.columns(), tensor_scale, place: self.place.clone() }
    }
}

impl Task {
    /// A tensor that the task belongs to: its place in the plan's order.
    fn place(&self, execution: &Execution<'_>) -> usize {
        match self {
            Task::Chunk { tensor, .. } | Task::Measure { tensor, .. } => *tensor,
            Task::Set { set, .. } => execution.plan.scale_sets[*set].iter().copied().min().unwrap_or_default(),
            Task::Nested { tensor, .. } | Task::HashTensor { tensor } => *tensor,
            Task::HashFile { file } | Task::Seal { file, .. } => execution.plan.files[*file].tensors.start,
            Task::HashSource { .. } => execution.plan.tensors.len(),
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
