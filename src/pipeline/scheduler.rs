//! Who does what next, and what is finished when.

mod files;
mod sets;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::budget::{NESTED_CHUNK, chunk_elements};
use super::frontier::FileHashes;
use super::{ExecutionContext, FileOutcome, Outcome, TensorOutcome};
use crate::error::{Error, Result};
use crate::format::Scales;
use crate::plan::{Plan, PlannedTensor};
use crate::stats::{AbsmaxAccumulator, StatsAccumulator};
use crate::store::Sha256Hash;
use files::FileState;
use sets::ScaleSet;

/// Something for a thread to do.
#[derive(Clone, Debug)]
pub(crate) enum Task {
    /// Read, quantize (or keep) and write a run of a tensor's bytes.
    Chunk { tensor: usize, offset: u64, len: usize, tensor_scale: Option<f32> },
    /// Read tensors that share a scale, all at once; find that, quantize and write these of them. It is the turn of `file`.
    Set { file: usize, set: usize, tensors: Vec<usize> },
    /// Read a run of a tensor's bytes for the largest magnitude in it.
    Measure { tensor: usize, offset: u64, len: usize },
    /// Quantize a run of a tensor's absmax.
    Nested { tensor: usize, absmax: Arc<Vec<f32>>, offset: f32, first: usize, len: usize },
    /// Hash a file of the source.
    HashSource { file: usize },
}

/// What came of a task.
#[derive(Debug)]
pub(crate) enum Done {
    /// Nothing that must be told.
    Written,
    /// A chunk's figures; its absmax too, if double quantization still needs them.
    Quantized { accumulator: Box<StatsAccumulator>, absmax: Option<(usize, Vec<f32>)> },
    /// The figures of a whole tensor and of its absmax, which are quantized too.
    DoubleQuantized { accumulator: Box<StatsAccumulator>, absmax_error: AbsmaxAccumulator },
    /// The figures of tensors that were quantized at once.
    Set(Vec<(usize, Box<StatsAccumulator>)>),
    /// The largest magnitude in a run.
    Measured(f32),
    /// A run of absmax is quantized.
    Nested(AbsmaxAccumulator),
    /// The hash of a file of the source.
    Hashed(Sha256Hash),
}

/// Something for the disk to do.
#[derive(Debug)]
pub(crate) enum DiskTask {
    /// Begin to write what is in the page cache.
    WriteBack { file: usize, offset: u64, len: u64 },
    /// Wait for all of a finished file, note down what is known of it, and give it its name.
    Seal { file: usize, outcome: Box<FileOutcome> },
}

/// Hands out tasks and takes results.
///
/// Several output files are in progress at once, each with its own place in the plan's order, so that its part of the source is
/// read from front to back, and threads don't wait for each other's writes.
pub(crate) struct Scheduler<'a> {
    plan: &'a Plan,
    /// The output file of each tensor.
    file_of: Vec<usize>,
    /// The set that each tensor shares a global scale with.
    set_of: Vec<Option<usize>>,
    context: ExecutionContext<'a>,
    source_files: usize,
    /// Output files that may be begun and not sealed.
    most_begun: usize,
    /// Of each output file, the first byte that isn't written and hashed.
    reached: Vec<AtomicU64>,
    state: Mutex<State>,
    changed: Condvar,
    /// Threads that wait for it.
    waiting: AtomicUsize,
    /// There is something for the disk to do.
    disk_changed: Condvar,
    /// There is nothing to read any more.
    ended: Condvar,
    stopped: AtomicBool,
}

#[derive(Default)]
struct State {
    /// The first file of which no task was handed out.
    next_file: usize,
    /// Files that are begun and not sealed.
    begun: usize,
    /// Files in progress of which there is more to hand out.
    active: Vec<usize>,
    next_source_hash: usize,
    ready: VecDeque<Task>,
    disk: VecDeque<DiskTask>,
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

impl<'a> Scheduler<'a> {
    pub(crate) fn new(
        plan: &'a Plan,
        source_files: usize,
        sealed: Vec<Option<FileOutcome>>,
        most_begun: usize,
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
            let Some(mut outcome) = sealed else {
                state.files.push(FileState::new(planned));
                continue;
            };
            state.files_left -= 1;
            let tensors = std::mem::take(&mut outcome.tensors).into_iter();
            state.tensors[planned.tensors.clone()].iter_mut().zip(tensors).for_each(|(place, tensor)| *place = tensor);
            state.files.push(FileState::sealed(planned, outcome));
        }
        let scheduler = Scheduler {
            plan,
            file_of,
            set_of,
            context,
            source_files,
            most_begun,
            reached: plan.files.iter().map(|_| AtomicU64::new(0)).collect(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            waiting: AtomicUsize::new(0),
            disk_changed: Condvar::new(),
            ended: Condvar::new(),
            stopped: AtomicBool::new(false),
        };
        scheduler.check_finished(&mut scheduler.lock());
        scheduler
    }

    /// The output file that `tensor` goes to.
    pub(crate) fn file_of(&self, tensor: usize) -> usize {
        self.file_of[tensor]
    }

    /// Waits for the next task, of `file` rather than of another; `None` once there is none any more.
    pub(crate) fn next(&self, file: Option<usize>) -> Option<Task> {
        let mut state = self.lock();
        if self.goes_on(&mut state)
            && let Some(task) = self.take(&mut state, file)
        {
            return Some(task);
        }
        // Whoever changes anything after this line sees that there is a thread to be told.
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut task = None;
        while self.goes_on(&mut state) {
            task = self.take(&mut state, file);
            if task.is_some() {
                break;
            }
            state = wait(&self.changed, state);
        }
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        task
    }

    /// Waits for the disk's next task; `None` once there is none any more.
    pub(crate) fn next_of_disk(&self) -> Option<DiskTask> {
        let mut state = self.lock();
        while self.goes_on(&mut state) {
            if let Some(task) = state.disk.pop_front() {
                return Some(task);
            }
            state = wait(&self.disk_changed, state);
        }
        // What is complete is kept for the next run, unless the user waits for this one to end.
        let keeps = !self.context.interrupt.load(Ordering::Relaxed);
        std::iter::from_fn(|| state.disk.pop_front()).find(|task| keeps && matches!(task, DiskTask::Seal { .. }))
    }

    /// Takes the result of a task that [`Scheduler::next`] gave out.
    pub(crate) fn finish(&self, task: Task, done: Done) {
        let mut state = self.lock();
        state.running -= 1;
        if let Some(file) = self.turn_of(&task) {
            state.files[file].running -= 1;
        }
        // This thread takes what a chunk makes room for; other tasks let several threads proceed.
        let lets_proceed = !matches!(task, Task::Chunk { .. } | Task::Set { .. });
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
            (Task::HashSource { file }, Done::Hashed(sha256)) => state.source_hashes[file] = Some(sha256),
            (task, done) => unreachable!("{task:?} doesn't give {done:?}"),
        }
        self.check_finished(&mut state);
        if lets_proceed || !state.ready.is_empty() {
            self.tell();
        } else if self.waiting.load(Ordering::SeqCst) > 0 {
            self.changed.notify_one();
        }
    }

    /// Takes the hashes of a file of which all bytes are written.
    pub(crate) fn hashed(&self, file: usize, hashes: FileHashes) {
        let mut state = self.lock();
        for (tensor, sha256) in self.plan.files[file].tensors.clone().zip(hashes.tensors) {
            state.tensors[tensor].sha256 = sha256;
        }
        state.files[file].sha256 = Some(hashes.sha256);
        self.seal_if_complete(&mut state, file);
    }

    /// Notes that a file is on the disk and has its name, and takes back what is known of it.
    pub(crate) fn sealed(&self, file: usize, outcome: FileOutcome) {
        let mut state = self.lock();
        let tensors = self.plan.files[file].tensors.clone();
        state.tensors[tensors].iter_mut().zip(outcome.tensors).for_each(|(place, tensor)| *place = tensor);
        state.files_left -= 1;
        if std::mem::take(&mut state.files[file].is_begun) {
            state.begun -= 1;
            // There is room for another.
            self.tell();
        }
        self.check_finished(&mut state);
    }

    /// Has the disk begin with what was written of a file.
    pub(crate) fn write_back(&self, file: usize, offset: u64, len: u64) {
        self.give_to_disk(&mut self.lock(), DiskTask::WriteBack { file, offset, len });
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
        self.wake_all();
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

    /// Has the threads that wait look again, if any do.
    fn tell(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.changed.notify_all();
        }
    }

    /// Wakes every thread, to stop or to end.
    fn wake_all(&self) {
        self.changed.notify_all();
        self.disk_changed.notify_all();
        self.ended.notify_all();
    }

    /// Whether there can be anything more to do.
    fn goes_on(&self, state: &mut State) -> bool {
        if self.context.interrupt.load(Ordering::Relaxed) && state.failure.is_none() && !state.finished {
            state.failure = Some((0, Error::Interrupted));
            self.wake_all();
        }
        state.failure.is_none() && !state.finished
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands out the next task, if there is one.
    fn take(&self, state: &mut State, file: Option<usize>) -> Option<Task> {
        let task = self.choose(state, file)?;
        state.running += 1;
        if let Some(file) = self.turn_of(&task) {
            state.files[file].running += 1;
        }
        Some(task)
    }

    fn choose(&self, state: &mut State, file: Option<usize>) -> Option<Task> {
        if let Some(task) = state.ready.pop_front() {
            return Some(task);
        }
        self.fill_active(state);
        if self.context.hash_source && state.next_source_hash < self.source_files_handed_out(state) {
            state.next_source_hash += 1;
            return Some(Task::HashSource { file: state.next_source_hash - 1 });
        }
        self.by_preference(state, file).into_iter().find_map(|file| self.take_of(state, file))
    }

    /// The next task of a file in progress, if there is room for what must be held of it.
    fn take_of(&self, state: &mut State, file: usize) -> Option<Task> {
        let (tensor, offset) = state.files[file].next;
        let planned = &self.plan.tensors[tensor];
        let tensor_scale = match self.set_of[tensor] {
            None => None,
            Some(set) if self.fits(set) => return Some(self.take_set(state, file, set)),
            Some(set) => match self.tensor_scale(state, set) {
                None => return state.ready.pop_front(),
                scale => scale,
            },
        };
        let chunk_len = self.chunk_len(planned);
        if offset == 0 {
            let absmax = self.absmax_len(planned);
            if state.absmax_held > 0 && absmax > 0 && state.absmax_held + absmax > self.context.budget.absmax {
                return None;
            }
            state.absmax_held += absmax;
            let tasks_left = planned.source_len().div_ceil(chunk_len).max(1) as usize;
            let absmax = vec![0.0; absmax as usize / size_of::<f32>()];
            state.open.insert(tensor, OpenTensor { tasks_left, absmax, ..OpenTensor::default() });
        }
        let len = chunk_len.min(planned.source_len() - offset);
        let is_last = offset + len == planned.source_len();
        state.files[file].next = if is_last { (tensor + 1, 0) } else { (tensor, offset + len) };
        self.skip_taken(state, file);
        Some(Task::Chunk { tensor, offset, len: len as usize, tensor_scale })
    }

    /// Bytes of the source in one chunk of `tensor`.
    fn chunk_len(&self, tensor: &PlannedTensor) -> u64 {
        let elements = chunk_elements(self.plan, tensor, self.context.budget.chunk_elements);
        // A kept tensor's bytes go through the same buffer, which holds this many elements of at least two bytes.
        (elements * tensor.quantized_from().map_or(2, |dtype| dtype.size())) as u64
    }

    /// Bytes of absmax to be held while `tensor` is open: those of one chunk are quantized by the thread that has them.
    fn absmax_len(&self, tensor: &PlannedTensor) -> u64 {
        match self.plan.recipe.codec().scales {
            Scales::Blocks { size, double_quant: true, .. }
                if tensor.quantized_from().is_some() && tensor.source_len() > self.chunk_len(tensor) =>
            {
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
            Done::DoubleQuantized { accumulator, absmax_error } if is_quantized => {
                open.accumulator.merge(&accumulator);
                open.absmax_error.merge(&absmax_error);
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
    }

    fn finish_nested(&self, state: &mut State, tensor: usize, error: &AbsmaxAccumulator) {
        let open = open_tensor(state, tensor);
        open.tasks_left -= 1;
        open.absmax_error.merge(error);
        if open.tasks_left == 0 {
            state.absmax_held -= self.absmax_len(&self.plan.tensors[tensor]);
            self.finish_tensor(state, tensor);
        }
    }

    fn finish_tensor(&self, state: &mut State, tensor: usize) {
        let file = self.file_of[tensor];
        if let Some(open) = state.open.remove(&tensor)
            && self.plan.tensors[tensor].quantized_from().is_some()
        {
            let mut statistics = open.accumulator.finish();
            if self.plan.recipe.codec().double_quant() {
                statistics.double_quantization = Some(open.absmax_error.finish());
            }
            state.tensors[tensor].statistics = Some(Box::new(statistics));
            let file = &mut state.files[file];
            file.total.merge(&open.accumulator);
            file.total_absmax.merge(&open.absmax_error);
        }
        state.files[file].tensors_left -= 1;
        self.seal_if_complete(state, file);
    }

    /// Has a file sealed of which all tensors are done and all bytes hashed.
    fn seal_if_complete(&self, state: &mut State, file: usize) {
        let sha256 = match state.files[file] {
            FileState { tensors_left: 0, sha256: Some(sha256), .. } => sha256,
            FileState { tensors_left: 0, .. } => {
                let name = &self.plan.files[file].name;
                let error = Error::internal(format!("all tensors of {name} are written, and not all of its bytes"));
                state.failure.get_or_insert((self.plan.files[file].tensors.start, error));
                return self.wake_all();
            }
            _ => return,
        };
        let outcome = FileOutcome {
            sha256,
            // Lent until the file is sealed: they are too many for a copy.
            tensors: state.tensors[self.plan.files[file].tensors.clone()].iter_mut().map(std::mem::take).collect(),
            total: state.files[file].total.clone(),
            total_absmax: state.files[file].total_absmax.clone(),
        };
        self.give_to_disk(state, DiskTask::Seal { file, outcome: Box::new(outcome) });
    }

    fn give_to_disk(&self, state: &mut State, task: DiskTask) {
        state.disk.push_back(task);
        self.disk_changed.notify_one();
    }

    fn check_finished(&self, state: &mut State) {
        let hashing = self.context.hash_source && state.next_source_hash < self.source_files;
        if state.files_left == 0 && state.running == 0 && !hashing {
            state.finished = true;
            self.wake_all();
        }
    }
}

/// A thread that panics would leave the others waiting for it.
pub(super) struct StopOnPanic<'s, 'a>(pub &'s Scheduler<'a>);

impl Drop for StopOnPanic<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(usize::MAX, Error::Stopped);
        }
    }
}

/// Waits for news, but not for long: an interrupt brings none.
fn wait<'s>(changed: &Condvar, state: MutexGuard<'s, State>) -> MutexGuard<'s, State> {
    let waited = changed.wait_timeout(state, Duration::from_millis(100));
    waited.unwrap_or_else(PoisonError::into_inner).0
}

/// A tensor of which tasks are under way.
///
/// # Panics
/// When there are none: a task ended that was never given out.
fn open_tensor(state: &mut State, tensor: usize) -> &mut OpenTensor {
    state.open.get_mut(&tensor).expect("tasks are of tensors that were opened for them")
}
