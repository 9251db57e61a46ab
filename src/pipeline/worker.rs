//! One thread's work, task by task.

mod set;

use std::ops::Range;
use std::path::PathBuf;

use super::budget::{NESTED_CHUNK, lane_size};
use super::lane_pool::{Failed, LanePool};
use super::output_files::OutputFiles;
use super::results::Results;
use super::scheduler::{Done, Scheduler, StopOnPanic, Task};
use super::source_files::SourceFiles;
use super::trace::{Span, Subject, ThreadTrace};
use super::{Execution, nonfinite};
use crate::backend::{CpuLane, Lane, Run};
use crate::dtype::FloatDtype;
use crate::error::{Error, IoContext, Result};
use crate::format::Codec;
use crate::plan::{Decision, PlannedTensor};
use crate::stats::AbsmaxAccumulator;
use crate::store::hash_range;

/// A thread with its lane on the processor and the files it has in hand.
pub(crate) struct Worker<'j, 'a> {
    execution: &'j Execution<'a>,
    scheduler: &'j Scheduler<'a>,
    trace: &'j ThreadTrace<'a>,
    codec: Codec,
    source: SourceFiles<'j, 'a>,
    output: OutputFiles<'j, 'a>,
    /// What is copied and hashed goes through its room, too.
    lane: CpuLane,
    /// Numbers as they stand in the file.
    bytes: Vec<u8>,
}

impl<'j, 'a> Worker<'j, 'a> {
    pub(crate) fn new(
        execution: &'j Execution<'a>,
        scheduler: &'j Scheduler<'a>,
        trace: &'j ThreadTrace<'a>,
    ) -> Worker<'j, 'a> {
        let size = lane_size(execution.plan, execution.context.budget.chunk_elements);
        Worker {
            execution,
            scheduler,
            trace,
            codec: execution.plan.recipe.codec(),
            source: SourceFiles::new(execution, trace),
            output: OutputFiles::new(execution, scheduler, trace),
            lane: execution.context.device.cpu().lane(&size),
            bytes: Vec::new(),
        }
    }

    /// Takes tasks until there is none any more.
    pub(crate) fn work(mut self) {
        let scheduler = self.scheduler;
        let _guard = StopOnPanic(scheduler);
        loop {
            let begin = self.trace.begin();
            let Some(task) = scheduler.next(self.output.in_hand()) else { break };
            self.trace.end(begin, Span::Wait, Subject::None, 0);
            match self.perform(&task) {
                Ok(done) => scheduler.finish(task, done),
                Err(error) => scheduler.fail(task.place(self.execution), error),
            }
        }
    }

    fn perform(&mut self, task: &Task) -> Result<Done> {
        let plan = self.execution.plan;
        match task {
            Task::Chunk { tensor, offset, len, tensor_scale } => {
                self.output.turn_to(self.scheduler.file_of(*tensor))?;
                self.chunk(*tensor, *offset, *len, *tensor_scale)
            }
            Task::Set { set, tensors, .. } => self.set(*set, tensors),
            Task::Measure { tensor, offset, len } => self.measure(*tensor, *offset, *len),
            Task::Nested { tensor, absmax, offset, first, len } => {
                self.output.turn_to(self.scheduler.file_of(*tensor))?;
                let absmax = &absmax[*first..][..*len];
                Ok(Done::Nested(self.nested(&plan.tensors[*tensor], absmax, *first, *offset)?))
            }
            Task::HashSource { file } => self.hash_source(*file),
        }
    }

    fn hash_source(&mut self, file: usize) -> Result<Done> {
        let source = &self.execution.source.files[file];
        let opened = source.reopen()?;
        let (scheduler, path) = (self.scheduler, source.location.path());
        let (begin, len) = (self.trace.begin(), source.identity.len);
        let hash = hash_range(&*opened, 0, len, self.lane.buffer(), || !scheduler.stopped());
        self.trace.end(begin, Span::Hash, Subject::Source(file), len);
        let hash = hash.at(path, "read it back")?.ok_or(Error::Stopped)?;
        self.execution.outputs.source_hashed(source, hash)?;
        Ok(Done::Hashed(hash))
    }

    /// Reads a run of a tensor's bytes, and does with them what the plan says.
    fn chunk(&mut self, index: usize, offset: u64, len: usize, tensor_scale: Option<f32>) -> Result<Done> {
        let tensor = &self.execution.plan.tensors[index];
        let done = match tensor.decision {
            Decision::Quantize(dtype) => {
                let first = offset / dtype.size() as u64;
                let done = self.quantize(&Piece { index, tensor, dtype, first, place: 0..len, tensor_scale })?;
                self.quantize_absmax(tensor, len, done)?
            }
            Decision::Keep | Decision::Carry(_) => {
                let bytes = self.lane.source(len);
                self.source.read(index, offset, bytes)?;
                // What is read are the outputs' bytes, one output after the other.
                let (mut begin, end) = (0, offset + len as u64);
                for output in tensor.outputs.iter() {
                    let (from, to) = (begin.max(offset), (begin + output.len).min(end));
                    if from < to || output.len == 0 {
                        let here = &bytes[(from - offset) as usize..(to - offset) as usize];
                        self.output.put(here, output.offset + (from - begin))?;
                    }
                    begin += output.len;
                }
                Done::Written
            }
        };
        self.execution.context.progress.advanced(&tensor.name, len as u64);
        Ok(done)
    }

    /// Of a whole tensor, does the second step of double quantization, too: all that it takes is here.
    fn quantize_absmax(&mut self, tensor: &PlannedTensor, len: usize, done: Done) -> Result<Done> {
        match done {
            Done::Quantized { accumulator, absmax: Some((0, absmax)) } if len as u64 == tensor.source_len() => {
                let offset = accumulator.mean_absmax() as f32;
                let mut absmax_error = AbsmaxAccumulator::default();
                for (i, run) in absmax.chunks(NESTED_CHUNK).enumerate() {
                    absmax_error.merge(&self.nested(tensor, run, i * NESTED_CHUNK, offset)?);
                }
                Ok(Done::DoubleQuantized { accumulator, absmax_error })
            }
            done => Ok(done),
        }
    }

    /// Reads and quantizes a run: on a device, if there is one that has a kernel for it.
    fn quantize(&mut self, piece: &Piece<'_>) -> Result<Done> {
        let len = piece.place.len();
        let Some(lanes) = self.lanes_for([piece.tensor]) else {
            self.source.read(piece.index, piece.offset(), self.lane.source(len))?;
            return self.quantize_here(piece);
        };
        lanes.with(|lane| {
            self.source.read(piece.index, piece.offset(), lane.source(len))?;
            let (_, mut results) = self.parts(piece);
            if let Some(done) = quantize_in(lane, &mut results, piece)? {
                return Ok(done);
            }
            self.lane.source(len).copy_from_slice(lane.source(len));
            Ok(self.quantize_nonfinite(piece)?)
        })
    }

    /// The lanes on devices, if these have kernels for all of the tensors.
    fn lanes_for<'t>(&self, tensors: impl IntoIterator<Item = &'t PlannedTensor>) -> Option<&'j LanePool<'a>> {
        let has_kernel =
            |tensor: &PlannedTensor| self.execution.context.device.quantizes(&self.codec, tensor.columns());
        self.execution.lanes.as_ref().filter(|_| tensors.into_iter().all(has_kernel))
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
        Err(self.describe_nonfinite(piece.index, piece.dtype))
    }

    /// The thread's own lane, and where a run's results go.
    fn parts<'s>(&'s mut self, piece: &Piece<'s>) -> (&'s mut CpuLane, Results<'s, 'j, 'a>) {
        let Worker { output, codec, lane, bytes, .. } = self;
        (lane, Results { files: output, codec, tensor: piece.tensor, dtype: piece.dtype, bytes })
    }

    /// The largest magnitude in a run of a tensor's bytes.
    fn measure(&mut self, tensor: usize, offset: u64, len: usize) -> Result<Done> {
        let dtype = quantized_from(&self.execution.plan.tensors[tensor])?;
        self.source.read(tensor, offset, self.lane.source(len))?;
        match self.lane.absmax(0..len, dtype)? {
            Some(absmax) => Ok(Done::Measured(absmax)),
            None => Err(self.describe_nonfinite(tensor, dtype)),
        }
    }

    /// Quantizes a run of absmax that starts at entry `first`.
    fn nested(
        &mut self,
        tensor: &PlannedTensor,
        absmax: &[f32],
        first: usize,
        offset: f32,
    ) -> Result<AbsmaxAccumulator> {
        let (lanes, dtype) = (self.lanes_for([tensor]), quantized_from(tensor)?);
        let Worker { output, codec, lane, bytes, .. } = self;
        let mut results = Results { files: output, codec, tensor, dtype, bytes };
        let mut quantize = |lane: &mut dyn Lane| {
            let (codes, nested_absmax) = lane.quantize_absmax(absmax, offset)?;
            Ok(results.nested(first, absmax, offset, codes, nested_absmax)?)
        };
        match lanes {
            Some(lanes) => lanes.with(quantize),
            None => quantize(lane).map_err(Failed::into),
        }
    }

    fn describe_nonfinite(&mut self, index: usize, dtype: FloatDtype) -> Error {
        let tensor = &self.execution.plan.tensors[index];
        let buffer = self.lane.buffer();
        if tensor.is_decoded() {
            let path = self.execution.source.files[tensor.read.first_file()].location.path().to_owned();
            let read = |offset, bytes: &mut [u8]| self.source.read(index, offset, bytes);
            return nonfinite::describe(&path, &tensor.name, tensor.source_len(), dtype, buffer, read)
                .unwrap_or_else(Some)
                .unwrap_or_else(|| no_longer(path, tensor));
        }
        // Where they are in the source, of which the tensor may have another order.
        let source = self.execution.source;
        for span in tensor.read.spans() {
            let (path, info) = (source.files[span.file].location.path(), &source.files[span.file].tensors[span.tensor]);
            let read = |offset, bytes: &mut [u8]| self.source.read_at(span.file, info.offset + offset, bytes);
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
    let trace = results.files.trace();
    let begin = trace.begin();
    let quantized = lane.quantize(&piece.run(results.codec))?;
    trace.end(begin, Span::Quantize, Subject::Tensor(piece.index), piece.place.len() as u64);
    match quantized {
        Some(encoded) => Ok(Some(results.quantized(piece.first, piece.tensor_scale, &encoded)?)),
        None => Ok(None),
    }
}

/// A run of whole blocks or groups in a lane.
struct Piece<'p> {
    /// Its place in the plan.
    index: usize,
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
            Task::Nested { tensor, .. } => *tensor,
            Task::HashSource { .. } => execution.plan.tensors.len(),
        }
    }
}
