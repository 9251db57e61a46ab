//! Quantizing tensors that share a scale, all of them in one lane.

use std::ops::Range;

use super::{Piece, Worker, quantize_in, quantized_from};
use crate::backend::Lane;
use crate::dtype::FloatDtype;
use crate::error::{Error, Result};
use crate::format::Codec;
use crate::kernel::group;
use crate::pipeline::Execution;
use crate::pipeline::lane_pool::Failed;
use crate::pipeline::output_files::OutputFiles;
use crate::pipeline::results::Results;
use crate::pipeline::scheduler::{Done, Scheduler};
use crate::pipeline::source_files::SourceFiles;
use crate::stats::StatsAccumulator;

/// A tensor of a set, and where it is in the lane's source.
struct Member {
    index: usize,
    dtype: FloatDtype,
    place: Range<usize>,
}

/// A worker without its lane, at work on a set.
struct SetRun<'w, 'j, 'a> {
    execution: &'j Execution<'a>,
    scheduler: &'j Scheduler<'a>,
    source: &'w mut SourceFiles<'j, 'a>,
    output: &'w mut OutputFiles<'j, 'a>,
    codec: &'w Codec,
    bytes: &'w mut Vec<u8>,
    set: usize,
    members: Vec<Member>,
    /// Tensors that are written, also if the lane failed after them.
    done: Vec<(usize, Box<StatsAccumulator>)>,
}

impl Worker<'_, '_> {
    /// Reads tensors that share a scale one after the other into a lane, and quantizes there `written` of them: on a device, if there
    /// is one that has kernels for them, to which they are copied once.
    pub(super) fn set(&mut self, set: usize, written: &[usize]) -> Result<Done> {
        let plan = self.execution.plan;
        let lanes = self.lanes_for(plan.scale_sets[set].iter().map(|&tensor| &plan.tensors[tensor]));
        let members = members(self.execution, set)?;
        let Worker { execution, scheduler, source, output, lane, codec, bytes, .. } = self;
        let mut run = SetRun { execution, scheduler, source, output, codec, bytes, set, members, done: Vec::new() };
        let nonfinite = match lanes {
            Some(lanes) => lanes.with(|lane| run.quantize(lane, written))?,
            None => run.quantize(lane, written).map_err(Error::from)?,
        };
        let SetRun { done, members, .. } = run;
        match nonfinite {
            None => Ok(Done::Set(done)),
            Some(member) => Err(self.describe_nonfinite(members[member].index, members[member].dtype)),
        }
    }
}

/// The tensors of a set, one after the other.
fn members(execution: &Execution<'_>, set: usize) -> Result<Vec<Member>> {
    let mut end = 0;
    let member = |&index: &usize| {
        let tensor = &execution.plan.tensors[index];
        let place = end..end + tensor.source_len() as usize;
        end = place.end;
        Ok(Member { index, dtype: quantized_from(tensor)?, place })
    };
    execution.plan.scale_sets[set].iter().map(member).collect()
}

impl SetRun<'_, '_, '_> {
    /// Quantizes what is to be written and isn't yet; the member that holds a NaN or an infinity, if one does.
    fn quantize(&mut self, lane: &mut dyn Lane, written: &[usize]) -> Result<Option<usize>, Failed> {
        let plan = self.execution.plan;
        let len = self.members.last().map_or(0, |last| last.place.end);
        let room = lane.source(len);
        for Member { index, place, .. } in &self.members {
            self.source.read(*index, 0, &mut room[place.clone()])?;
        }
        let mut absmax = 0f32;
        for (i, Member { dtype, place, .. }) in self.members.iter().enumerate() {
            match lane.absmax(place.clone(), *dtype)? {
                Some(found) => absmax = absmax.max(found),
                None => return Ok(Some(i)),
            }
        }
        let tensor_scale = Some(group::tensor_scale(self.codec, absmax, plan.scale_dtype(self.set)));
        for (i, &Member { index, dtype, ref place }) in self.members.iter().enumerate() {
            if !written.contains(&index) || self.done.iter().any(|(done, _)| *done == index) {
                continue;
            }
            let tensor = &plan.tensors[index];
            self.output.turn_to(self.scheduler.file_of(index))?;
            let piece = Piece { index, tensor, dtype, first: 0, place: place.clone(), tensor_scale };
            let mut results = Results { files: self.output, codec: self.codec, tensor, dtype, bytes: self.bytes };
            match quantize_in(lane, &mut results, &piece)? {
                Some(Done::Quantized { accumulator, .. }) => self.done.push((index, accumulator)),
                Some(other) => return Err(Error::internal(format!("{:?} gave {other:?}", tensor.name)).into()),
                None => return Ok(Some(i)),
            }
            self.execution.context.progress.advanced(&tensor.name, tensor.source_len());
        }
        Ok(None)
    }
}
