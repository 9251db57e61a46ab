//! Tensors that share a scale, which must be known before the first of them is quantized.
//!
//! A set that a lane takes is read once, and quantized out of it. Of a larger one all tensors are measured first, run by run,
//! while the set before it is quantized, and read again; nothing of them is held.

use std::collections::VecDeque;

use super::{OpenTensor, Scheduler, State, Task};
use crate::kernel::group;
use crate::plan::PlannedTensor;

/// What tensors that share a global scale have for it.
pub(super) struct ScaleSet {
    tasks_left: usize,
    absmax: f32,
}

impl Scheduler<'_> {
    /// Whether a lane takes all of a set.
    pub(super) fn fits(&self, set: usize) -> bool {
        let tensors = self.plan.scale_sets[set].iter().map(|&tensor| &self.plan.tensors[tensor]);
        let elements = tensors.map(PlannedTensor::elements).sum::<u64>();
        elements <= self.context.budget.chunk_elements as u64
    }

    /// All tensors of a set that aren't written yet; it is the turn of `file`.
    pub(super) fn take_set(&self, state: &mut State, file: usize, set: usize) -> Task {
        let tensors = self.plan.scale_sets[set].iter().copied();
        let tensors: Vec<usize> = tensors.filter(|&tensor| !state.files[self.file_of[tensor]].was_sealed).collect();
        for &tensor in &tensors {
            state.open.insert(tensor, OpenTensor { tasks_left: 1, ..OpenTensor::default() });
        }
        state.taken.extend(tensors.iter().copied());
        // Other files that are at one of them have nothing to do with it any more.
        tensors.iter().for_each(|&tensor| self.skip_taken(state, self.file_of[tensor]));
        Task::Set { file, set, tensors }
    }

    /// The scale that a set's tensors share, if all of them are measured. Has that done otherwise, and for the next that is
    /// to be measured, too, so that no thread need wait.
    pub(super) fn tensor_scale(&self, state: &mut State, set: usize) -> Option<f32> {
        let is_left = |set: &usize| {
            let mut files = self.plan.scale_sets[*set].iter().map(|&tensor| &state.files[self.file_of[tensor]]);
            files.any(|file| !file.was_sealed)
        };
        let next = (set + 1..self.plan.scale_sets.len()).find(|set| is_left(set) && !self.fits(*set));
        for set in [Some(set), next].into_iter().flatten() {
            self.measure(state, set);
        }
        let measured = state.sets.get(&set).filter(|set| set.tasks_left == 0)?;
        Some(group::tensor_scale(&self.plan.recipe.codec(), measured.absmax, self.plan.scale_dtype(set)))
    }

    /// Queues the reading of a set's tensors, once.
    fn measure(&self, state: &mut State, set: usize) {
        if state.sets.contains_key(&set) {
            return;
        }
        let mut tasks = VecDeque::new();
        for &tensor in &self.plan.scale_sets[set] {
            let (all, step) = (self.plan.tensors[tensor].source_len(), self.chunk_len(&self.plan.tensors[tensor]));
            let starts = (0..all).step_by(step as usize);
            tasks.extend(starts.map(|offset| Task::Measure { tensor, offset, len: step.min(all - offset) as usize }));
        }
        state.sets.insert(set, ScaleSet { tasks_left: tasks.len(), absmax: 0.0 });
        state.ready.append(&mut tasks);
        self.tell();
    }

    /// Takes the largest magnitude in a run of a tensor.
    pub(super) fn finish_measure(&self, state: &mut State, tensor: usize, absmax: f32) {
        if let Some(set) = self.set_of[tensor].and_then(|set| state.sets.get_mut(&set)) {
            set.absmax = set.absmax.max(absmax);
            set.tasks_left -= 1;
        }
    }
}
