//! Who does what next, and what is finished when.

mod sets;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::budget::{NESTED_CHUNK, chunk_elements};
use super::{ExecutionContext, FileOutcome, Outcome, TensorOutcome};
use crate::error::{Error, Result};
use crate::format::Scales;
use crate::plan::{Plan, PlannedTensor};
use crate::stats::{AbsmaxAccumulator, StatsAccumulator};
use crate::store::Sha256Hash;
use sets::ScaleSet;

/// Something for a thread to do.
#[derive(Clone, Debug)]
pub(crate) enum Task {
    /// Read, quantize (or keep) and write a run of a tensor's bytes.
    Chunk { tensor: usize, offset: u64, len: usize, tensor_scale: Option<f32> },
    /// Read tensors that share a scale, all at once; find that, quantize and write these of them.
    Set { set: usize, tensors: Vec<usize> },
    /// Read a run of a tensor's bytes for the largest magnitude in it.
    Measure { tensor: usize, offset: u64, len: usize },
    /// Quantize a run of a tensor's absmax.
    Nested { tensor: usize, absmax: Arc<Vec<f32>>, offset: f32, first: usize, len: usize },
    /// Hash a finished output file.
    HashFile { file: usize },
    /// Hash the outputs of a tensor in a finished output file.
    HashTensor { tensor: usize },
    /// Hash a file of the source.
    HashSource { file: usize },
    /// Note down what is known of an output file, and give it its name.
    Seal { file: usize, outcome: Box<FileOutcome> },
}

/// What came of a task.
#[derive(Debug)]
pub(crate) enum Done {
    /// Nothing that must be told.
    Written,
    /// A chunk's figures; its absmax too, if double quantization still needs them.
    Quantized { accumulator: Box<StatsAccumulator>, absmax: Option<(usize, Vec<f32>)> },
    /// The figures of tensors that were quantized at once.
    Set(Vec<(usize, Box<StatsAccumulator>)>),
    /// The largest magnitude in a run.
    Measured(f32),
    /// A run of absmax is quantized.
    Nested(AbsmaxAccumulator),
    /// One hash, or one for each of a tensor's outputs.
    Hashed(Vec<Sha256Hash>),
}

/// Hands out tasks and takes results.
///
/// Chunks go in the plan's order, so that the source is read from front to back. Whatever finishes an output file goes
/// before them, so that it happens while the file is still in the page cache.
pub(crate) struct Scheduler<'a> {
    plan: &'a Plan,
    /// The output file of each tensor.
    file_of: Vec<usize>,
    /// The set that each tensor shares a global scale with.
    set_of: Vec<Option<usize>>,
    context: ExecutionContext<'a>,
    source_files: usize,
    state: Mutex<State>,
    changed: Condvar,
    stopped: AtomicBool,
}

#[derive(Default)]
struct State {
    /// The next chunk: tensor, and bytes of it already handed out.
    next: (usize, u64),
    next_source_hash: usize,
    ready: VecDeque<Task>,
    to_sync: VecDeque<usize>,
    running: usize,
    finished: bool,
    /// Tensors of which chunks have been handed out and aren't all done.
    open: HashMap<usize, OpenTensor>,
    /// Tensors that were handed out with others of their set.
    taken: HashSet<usize>,
    /// The sets that are measured, or being so.
    sets: HashMap<usize, ScaleSet>,
    /// Bytes of absmax held for double quantization.
    absmax_held: u64,
    files: Vec<FileState>,
    /// Files that don't have their name yet.
    files_left: usize,
    tensors: Vec<TensorOutcome>,
    source_hashes: Vec<Option<Sha256Hash>>,
    failure: Option<(usize, Error)>,
}

#[derive(Default)]
struct OpenTensor {
    tasks_left: usize,
    accumulator: StatsAccumulator,
    absmax: Vec<f32>,
    absmax_error: AbsmaxAccumulator,
}

#[derive(Default)]
struct FileState {
    /// It was there before, and nothing of it is to be done.
    was_sealed: bool,
    tensors_left: usize,
    /// Hashing and syncing.
    steps_left: usize,
    sha256: Option<Sha256Hash>,
    total: StatsAccumulator,
    total_absmax: AbsmaxAccumulator,
}

impl<'a> Scheduler<'a> {
    pub(crate) fn new(
        plan: &'a Plan,
        source_files: usize,
        sealed: Vec<Option<FileOutcome>>,
        context: ExecutionContext<'a>,
    ) -> Scheduler<'a> {
        let file_of =
            plan.files.iter().enumerate().flat_map(|(i, file)| file.tensors.clone().map(move |_| i)).collect();
        let mut set_of = vec![None; plan.tensors.len()];
        for (i, set) in plan.scale_sets.iter().enumerate() {
            set.iter().for_each(|&tensor| set_of[tensor] = Some(i));
        }
        let mut state = State {
            tensors: vec![TensorOutcome::default(); plan.tensors.len()],
            source_hashes: vec![None; source_files],
            files_left: plan.files.len(),
            ..State::default()
        };
        for (planned, sealed) in plan.files.iter().zip(sealed) {
            let Some(FileOutcome { sha256, tensors, total, total_absmax }) = sealed else {
                state.files.push(FileState { tensors_left: planned.tensors.len(), ..FileState::default() });
                continue;
            };
            state.files_left -= 1;
            state.tensors[planned.tensors.clone()].clone_from_slice(&tensors);
            let sha256 = Some(sha256);
            state.files.push(FileState { was_sealed: true, sha256, total, total_absmax, ..FileState::default() });
        }
        let (state, changed, stopped) = (Mutex::new(state), Condvar::new(), AtomicBool::new(false));
        let scheduler = Scheduler { plan, file_of, set_of, context, source_files, state, changed, stopped };
        scheduler.check_finished(&mut scheduler.lock());
        scheduler
    }

    /// The output file that `tensor` goes to.
    pub(crate) fn file_of(&self, tensor: usize) -> usize {
        self.file_of[tensor]
    }

    /// Waits for the next task; `None` once there is none any more.
    pub(crate) fn next(&self) -> Option<Task> {
        let mut state = self.lock();
        loop {
            self.heed_interrupt(&mut state);
            if state.failure.is_some() || state.finished {
                return None;
            }
            if let Some(task) = self.take(&mut state) {
                state.running += 1;
                return Some(task);
            }
            state = self.wait(state);
        }
    }

    /// Takes the result of a task that [`Scheduler::next`] gave out.
    pub(crate) fn finish(&self, task: Task, done: Done) {
        let mut state = self.lock();
        state.running -= 1;
        match (task, done) {
            (Task::Chunk { tensor, .. }, done) => self.finish_chunk(&mut state, tensor, done),
            (Task::Set { .. }, Done::Set(tensors)) => {
                for (tensor, accumulator) in tensors {
                    self.finish_chunk(&mut state, tensor, Done::Quantized { accumulator, absmax: None });
                }
            }
            (Task::Measure { tensor, .. }, Done::Measured(absmax)) => {
                self.finish_measure(&mut state, tensor, absmax);
            }
            (Task::Nested { tensor, absmax, .. }, Done::Nested(error)) => {
                drop(absmax);
                self.finish_nested(&mut state, tensor, &error);
            }
            (Task::HashFile { file }, Done::Hashed(hashes)) => {
                state.files[file].sha256 = hashes.first().copied();
                self.finish_step(&mut state, file);
            }
            (Task::HashTensor { tensor }, Done::Hashed(hashes)) => {
                state.tensors[tensor].sha256 = hashes;
                self.finish_step(&mut state, self.file_of[tensor]);
            }
            (Task::HashSource { file }, Done::Hashed(hashes)) => state.source_hashes[file] = hashes.first().copied(),
            (Task::Seal { .. }, Done::Written) => state.files_left -= 1,
            (task, done) => unreachable!("{task:?} doesn't give {done:?}"),
        }
        self.check_finished(&mut state);
    }

    /// Notes that `file` is on the disk.
    pub(crate) fn synced(&self, file: usize) {
        let mut state = self.lock();
        self.finish_step(&mut state, file);
    }

    /// Waits for the next file to be synced; `None` once there is none any more.
    pub(crate) fn next_to_sync(&self) -> Option<usize> {
        let mut state = self.lock();
        loop {
            self.heed_interrupt(&mut state);
            if state.failure.is_some() || state.finished {
                return None;
            }
            if let Some(file) = state.to_sync.pop_front() {
                return Some(file);
            }
            state = self.wait(state);
        }
    }

    /// Has all threads stop. Of several failures, the one that is first in the plan's order is kept.
    pub(crate) fn fail(&self, tensor: usize, error: Error) {
        let mut state = self.lock();
        let stopped_only = matches!(error, Error::Stopped);
        // Work that is cut short by an interrupt says only that it was.
        let interrupted = stopped_only && self.context.interrupt.load(Ordering::Relaxed);
        let error = if interrupted { Error::Interrupted } else { error };
        if state.failure.as_ref().is_none_or(|(first, _)| tensor < *first && !stopped_only) {
            state.failure = Some((tensor, error));
        }
        self.stopped.store(true, Ordering::Relaxed);
        self.changed.notify_all();
    }

    /// Whether threads should stop what they are doing.
    pub(crate) fn stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed) || self.context.interrupt.load(Ordering::Relaxed)
    }

    /// All results, once every thread is done.
    pub(crate) fn into_outcome(self) -> Result<Outcome> {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, error)) = state.failure {
            return Err(error);
        }
        let all =
            |hashes: Vec<Option<Sha256Hash>>| hashes.into_iter().collect::<Option<Vec<_>>>().ok_or(Error::Stopped);
        let (mut total, mut total_absmax) = (StatsAccumulator::default(), AbsmaxAccumulator::default());
        for file in &state.files {
            total.merge(&file.total);
            total_absmax.merge(&file.total_absmax);
        }
        let mut total = total.finish();
        if self.plan.recipe.codec().double_quant() {
            total.double_quantization = Some(total_absmax.finish());
        }
        Ok(Outcome {
            tensors: state.tensors,
            files: all(state.files.iter().map(|file| file.sha256).collect())?,
            source_files: self.context.hash_source.then(|| all(state.source_hashes)).transpose()?,
            total,
        })
    }

    /// Waits for news, but not for long: an interrupt brings none.
    fn wait<'s>(&self, state: MutexGuard<'s, State>) -> MutexGuard<'s, State> {
        let waited = self.changed.wait_timeout(state, Duration::from_millis(100));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn heed_interrupt(&self, state: &mut State) {
        if self.context.interrupt.load(Ordering::Relaxed) && state.failure.is_none() && !state.finished {
            state.failure = Some((0, Error::Interrupted));
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, state: &mut State) -> Option<Task> {
        if let Some(task) = state.ready.pop_front() {
            return Some(task);
        }
        let reading = self
            .plan
            .tensors
            .get(state.next.0)
            .map_or(self.source_files, |tensor| tensor.read.spans().next().map_or(0, |span| span.file + 1));
        if self.context.hash_source && state.next_source_hash < reading.min(self.source_files) {
            state.next_source_hash += 1;
            return Some(Task::HashSource { file: state.next_source_hash - 1 });
        }
        self.take_chunk(state)
    }

    /// The next chunk in the plan's order, if there is room for what must be held of it.
    fn take_chunk(&self, state: &mut State) -> Option<Task> {
        while self.file_of.get(state.next.0).is_some_and(|&file| state.files[file].was_sealed)
            || state.taken.remove(&state.next.0)
        {
            state.next.0 += 1;
        }
        let (tensor, offset) = state.next;
        let planned = self.plan.tensors.get(tensor)?;
        let chunk_len = self.chunk_len(planned);
        let tensor_scale = match self.set_of[tensor] {
            None => None,
            Some(set) if self.fits(set) => return Some(self.take_set(state, set)),
            Some(set) => match self.tensor_scale(state, set) {
                None => return state.ready.pop_front(),
                scale => scale,
            },
        };
        if offset == 0 {
            let absmax = self.absmax_len(planned);
            if state.absmax_held > 0 && state.absmax_held + absmax > self.context.budget.absmax {
                return None;
            }
            state.absmax_held += absmax;
            let tasks_left = planned.source_len().div_ceil(chunk_len).max(1) as usize;
            let absmax = vec![0.0; absmax as usize / size_of::<f32>()];
            state.open.insert(tensor, OpenTensor { tasks_left, absmax, ..OpenTensor::default() });
        }
        let len = chunk_len.min(planned.source_len() - offset);
        state.next = if offset + len == planned.source_len() { (tensor + 1, 0) } else { (tensor, offset + len) };
        Some(Task::Chunk { tensor, offset, len: len as usize, tensor_scale })
    }

    /// Bytes of the source in one chunk of `tensor`.
    fn chunk_len(&self, tensor: &PlannedTensor) -> u64 {
        let elements = chunk_elements(self.plan, tensor, self.context.budget.chunk_elements);
        // A kept tensor's bytes go through the same buffer, which holds this many elements of at least two bytes.
        (elements * tensor.quantized_from().map_or(2, |dtype| dtype.size())) as u64
    }

    /// Bytes of absmax to be held while `tensor` is open.
    fn absmax_len(&self, tensor: &PlannedTensor) -> u64 {
        match self.plan.recipe.codec().scales {
            Scales::Blocks { size, double_quant: true, .. } if tensor.quantized_from().is_some() => {
                size.blocks(tensor.elements()) * size_of::<f32>() as u64
            }
            Scales::Blocks { .. } | Scales::Groups { .. } => 0,
        }
    }

    fn finish_chunk(&self, state: &mut State, tensor: usize, done: Done) {
        let is_quantized = self.plan.tensors[tensor].quantized_from().is_some();
        let open = open_tensor(state, tensor);
        open.tasks_left -= 1;
        match done {
            Done::Quantized { accumulator, absmax } if is_quantized => {
                open.accumulator.merge(&accumulator);
                if let Some((first, absmax)) = absmax {
                    open.absmax[first..][..absmax.len()].copy_from_slice(&absmax);
                }
            }
            Done::Written if !is_quantized => {}
            done => unreachable!("a chunk of tensor {tensor} doesn't give {done:?}"),
        }
        if open.tasks_left > 0 {
            return;
        }
        if open.absmax.is_empty() {
            self.finish_tensor(state, tensor);
        } else {
            self.queue_nested(state, tensor);
        }
    }

    /// All absmax of the tensor are there, and so is their mean: they can be quantized.
    fn queue_nested(&self, state: &mut State, tensor: usize) {
        let open = open_tensor(state, tensor);
        let offset = open.accumulator.mean_absmax() as f32;
        let absmax = Arc::new(std::mem::take(&mut open.absmax));
        let starts = (0..absmax.len()).step_by(NESTED_CHUNK);
        open.tasks_left = starts.len();
        state.ready.extend(starts.map(|first| {
            let len = NESTED_CHUNK.min(absmax.len() - first);
            Task::Nested { tensor, absmax: absmax.clone(), offset, first, len }
        }));
        self.changed.notify_all();
    }

    fn finish_nested(&self, state: &mut State, tensor: usize, error: &AbsmaxAccumulator) {
        let open = open_tensor(state, tensor);
        open.tasks_left -= 1;
        open.absmax_error.merge(error);
        if open.tasks_left == 0 {
            state.absmax_held -= self.absmax_len(&self.plan.tensors[tensor]);
            self.finish_tensor(state, tensor);
            self.changed.notify_all();
        }
    }

    fn finish_tensor(&self, state: &mut State, tensor: usize) {
        if let Some(open) = state.open.remove(&tensor)
            && self.plan.tensors[tensor].quantized_from().is_some()
        {
            let mut statistics = open.accumulator.finish();
            if self.plan.recipe.codec().double_quant() {
                statistics.double_quantization = Some(open.absmax_error.finish());
            }
            state.tensors[tensor].statistics = Some(statistics);
            let file = &mut state.files[self.file_of[tensor]];
            file.total.merge(&open.accumulator);
            file.total_absmax.merge(&open.absmax_error);
        }
        let file = self.file_of[tensor];
        state.files[file].tensors_left -= 1;
        if state.files[file].tensors_left == 0 {
            let tensors = self.plan.files[file].tensors.clone();
            state.files[file].steps_left = tensors.len() + 2;
            state.to_sync.push_back(file);
            state.ready.push_back(Task::HashFile { file });
            state.ready.extend(tensors.map(|tensor| Task::HashTensor { tensor }));
            self.changed.notify_all();
        }
    }

    /// One step less until the file is hashed and synced; after the last one it is sealed.
    fn finish_step(&self, state: &mut State, file: usize) {
        state.files[file].steps_left -= 1;
        let FileState { steps_left: 0, sha256: Some(sha256), .. } = state.files[file] else { return };
        let outcome = FileOutcome {
            sha256,
            tensors: state.tensors[self.plan.files[file].tensors.clone()].to_vec(),
            total: state.files[file].total.clone(),
            total_absmax: state.files[file].total_absmax.clone(),
        };
        state.ready.push_front(Task::Seal { file, outcome: Box::new(outcome) });
        self.changed.notify_one();
    }

    fn check_finished(&self, state: &mut State) {
        let hashing = self.context.hash_source && state.next_source_hash < self.source_files;
        if state.files_left == 0 && state.running == 0 && !hashing {
            state.finished = true;
            self.changed.notify_all();
        }
    }
}

/// A tensor that tasks are under way for.
///
/// # Panics
/// When there are none: a task ended that was never given out.
fn open_tensor(state: &mut State, tensor: usize) -> &mut OpenTensor {
    state.open.get_mut(&tensor).expect("tasks are of tensors that were opened for them")
}
