//! How much memory a plan takes, and how it is shared out.

use std::borrow::Cow;
use std::sync::atomic::AtomicUsize;

use super::TensorOutcome;
use super::stream::StreamMemory;
use crate::backend::{Backend, Devices, LaneSize};
use crate::checkpoint::TensorInfo;
use crate::error::{Error, Hint, Result};
use crate::format::{BlockSize, NESTED_BLOCK_SIZE, Scales};
use crate::plan::{Plan, PlannedTensor};
use crate::read::{Adapted, Decode, HELD};
use crate::stats::{GROUP, Statistics};
use crate::store::Sha256Hash;

/// Every run of this many elements is whole blocks, and whole groups of blocks for the statistics; of formats with groups
/// too, unless a chunk is whole rows.
const CHUNK_STEP: usize = BlockSize::MAX * GROUP;

/// Entries of absmax that are quantized at once: whole nested blocks.
pub(crate) const NESTED_CHUNK: usize = 256 * NESTED_BLOCK_SIZE;

/// The most elements in a chunk: 4 MiB of bf16. Fewer and larger writes cost the file system less, more than the cache
/// that they miss.
const MAX_CHUNK: usize = 1 << 21;

/// The program itself, its threads' stacks and what libraries hold.
const BASE: u64 = 12 << 20;

/// The limit where none is given, unless that is too little for a source of very many tensors: then it is the second, and the third
/// for each of them, and what the plan needs at least for its buffers.
const DEFAULT: u64 = 256 << 20;
const DEFAULT_FOR_MANY: u64 = 64 << 20;
const DEFAULT_PER_TENSOR: u64 = 1 << 10;

/// What an allocation takes beside its bytes, at most.
const ALLOCATION: usize = 24;

/// What is known of an output file: sums of its statistics, which are long integers.
const OF_FILE: usize = 5 << 10;

/// With devices, chunks of more elements than this are made smaller until each thread has a lane; below it, fewer lanes will do.
const MIN_SHARED_CHUNK: usize = 1 << 19;

/// The same for tensors that share a scale: what a thread's buffer doesn't hold together is read twice, for the scale and
/// for the codes.
const MAX_SET_CHUNK: usize = 4 * MAX_CHUNK;

/// Bytes of a finished piece that may wait for what comes before it in its file, over all files together.
const WINDOW: u64 = 64 << 20;

/// Bytes of absmax, with double quantization, that wait for their tensors' means, if no tensor has more.
const MAX_ABSMAX: u64 = 32 << 20;

/// Bytes of an output file that are gathered, or read back, at once.
const MIN_BUFFER: usize = 16 << 10;
const MAX_BUFFER: usize = 1 << 20;

/// The most output files in progress at once.
const MAX_FILES: usize = 16;

/// What a plan may use.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of memory here, of everything that the process holds; if none are given, as many as are reasonable.
    pub memory: Option<u64>,
    /// Of that, bytes that are held beside the plan and what it reads.
    pub beside: u64,
    /// Tensors of the source.
    pub source_tensors: u64,
    /// Threads.
    pub threads: usize,
    /// Bytes of memory on each device.
    pub device_memory: u64,
}

/// A share of the [`Limits`] for each purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// The most memory that may be taken here, in bytes.
    pub memory: u64,
    /// Threads that quantize and hash.
    pub threads: usize,
    /// Elements that a thread takes at once, at most.
    pub chunk_elements: usize,
    /// The fewest that `chunk_elements` can be.
    step: usize,
    /// Output files in progress at once.
    pub files: usize,
    /// Bytes of finished pieces that wait for what comes before them in their files.
    window: u64,
    /// Bytes for absmax that wait for their tensor's mean, with double quantization.
    pub absmax: u64,
    /// All memory that the plan takes here, by estimate; pinned buffers included.
    pub peak: u64,
    /// The lanes on devices, if there are any.
    pub lanes: Option<LaneBudget>,
}

/// Lanes on devices; see [`crate::backend::Lane`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneBudget {
    /// On all devices together.
    pub count: usize,
    /// What each has room for.
    pub size: LaneSize,
    /// Bytes that each takes on its device, and here.
    pub len: u64,
    /// What they are on.
    pub devices: Devices,
}

impl Budget {
    /// Shares out what `limits` allow.
    ///
    /// # Errors
    /// When it is too little.
    pub fn new(plan: &Plan, limits: Limits, backend: &dyn Backend) -> Result<Budget> {
        let needs = Needs { plan, limits, backend, devices: devices_for(plan, backend) };
        let absmax = largest_absmax(plan);
        let step = plan.quantized().map(|tensor| chunk_unit(plan, tensor)).max().unwrap_or(0).max(CHUNK_STEP);
        // A thread, and a lane on a device for it to work in.
        let pair = needs.buffers_len(step).saturating_add(needs.lane_len(step));
        let buffers_least = pair.saturating_add(absmax);
        // Names, offsets and hashes take what they take; buffers shrink for them as far as they can.
        let fixed = BASE + plan_len(plan).saturating_add(limits.beside);
        let least = buffers_least.saturating_add(fixed);
        let memory = limits.memory.unwrap_or_else(|| {
            let for_many = limits.source_tensors.saturating_mul(DEFAULT_PER_TENSOR).saturating_add(DEFAULT_FOR_MANY);
            let enough = for_many.saturating_add(buffers_least).max(DEFAULT).max(least);
            enough.checked_next_multiple_of(1 << 20).unwrap_or(enough)
        });
        needs.check_least(step, memory, least, absmax)?;
        // Without it, pieces go to the disk and are read back.
        let window = WINDOW.min((memory - fixed - absmax) / 4);
        let room = (memory - fixed - absmax - window).max(pair);
        let (waiting, lanes) = needs.devices.map_or((0, 0), |of| (of.waiting, of.lanes_each * of.count));
        let threads = (limits.threads + waiting).clamp(1, usize::try_from(room / pair).unwrap_or(usize::MAX));
        let fits = |chunk| {
            // A thread keeps its lane until what came of it is written and hashed.
            let wanted = if lanes > 0 && chunk > MIN_SHARED_CHUNK { threads } else { threads.min(lanes) };
            let here = needs.buffers_len(chunk) * threads as u64 + needs.lane_len(chunk) * wanted as u64;
            here <= room && needs.lanes_on_devices(chunk) >= wanted
        };
        let mut chunk_elements = MAX_CHUNK.max(largest_set(plan)).max(step);
        while chunk_elements > step && !fits(chunk_elements) {
            chunk_elements = (chunk_elements / 2).max(step);
        }
        let mut buffers = needs.buffers_len(chunk_elements) * threads as u64;
        let lanes = needs.devices.map(|devices| {
            let len = needs.lane_len(chunk_elements);
            let here = usize::try_from((room - buffers) / len).unwrap_or(usize::MAX);
            let count = threads.min(needs.lanes_on_devices(chunk_elements)).min(here).max(1);
            buffers += count as u64 * len;
            LaneBudget { count, size: lane_size(plan, chunk_elements), len, devices }
        });
        let files = threads.min(MAX_FILES).min(plan.files.len()).max(1);
        let window = window.min(memory - fixed - absmax - buffers);
        // A tensor of each file, but at least two and few enough bytes, so that some are read while others' absmax are quantized.
        let absmax = (absmax * files as u64).min(MAX_ABSMAX).max(2 * absmax).min(memory - fixed - buffers - window);
        let peak = fixed + absmax + buffers + window;
        Ok(Budget { memory, threads, chunk_elements, step, files, window, absmax, peak, lanes })
    }

    /// Memory for the pieces of output files that wait, of which `held` is taken.
    pub(crate) fn stream_memory<'a>(&self, held: &'a AtomicUsize) -> StreamMemory<'a> {
        let each = self.window as usize / self.files;
        let buffer = (each / 4).clamp(MIN_BUFFER, MAX_BUFFER);
        // One is gathered, another read back.
        let window = each.saturating_sub(2 * buffer);
        StreamMemory { window, of_all: window * self.files, held, buffer }
    }

    /// Bytes of one output file that may be on their way, handed out and not hashed.
    pub(crate) fn file_window(&self) -> u64 {
        self.window / self.files as u64
    }

    /// Bytes that are taken on each device.
    pub fn device_peak(&self) -> u64 {
        self.lanes.map_or(0, |lanes| {
            let LaneBudget { count, len, devices, .. } = lanes;
            count.div_ceil(devices.count) as u64 * len + devices.reserved
        })
    }

    /// The same with chunks of `elements` at most, rounded to what can be a chunk.
    pub fn with_chunk_elements(self, elements: usize) -> Budget {
        let chunk_elements = elements.next_multiple_of(CHUNK_STEP).clamp(self.step, self.chunk_elements);
        Budget { chunk_elements, ..self }
    }
}

/// What chunks of so many elements take.
struct Needs<'a> {
    plan: &'a Plan,
    limits: Limits,
    backend: &'a dyn Backend,
    devices: Option<Devices>,
}

impl Needs<'_> {
    /// Whether the least that the plan can be executed with is there.
    fn check_least(&self, step: usize, memory: u64, least: u64, absmax: u64) -> Result<()> {
        let device_memory = self.limits.device_memory;
        if least > memory {
            let hint = (absmax > 0 && least - absmax <= memory).then_some(Hint::LargerBlocks);
            return Err(Error::Memory { limit: memory, needed: least, hint });
        }
        if let Some(devices) = self.devices.filter(|_| self.lanes_on_devices(step) == 0) {
            let needed = self.lane_len(step) + devices.reserved;
            return Err(Error::DeviceMemory { limit: device_memory, needed });
        }
        Ok(())
    }

    /// Lanes for chunks of `chunk` elements that fit on all devices together.
    fn lanes_on_devices(&self, chunk: usize) -> usize {
        let Some(devices) = self.devices else { return 0 };
        let each = self.limits.device_memory.saturating_sub(devices.reserved) / self.lane_len(chunk);
        usize::try_from(each).unwrap_or(usize::MAX).saturating_mul(devices.count)
    }

    /// Bytes of a lane on a device, which are as many here; none without devices.
    fn lane_len(&self, chunk: usize) -> u64 {
        self.devices.map_or(0, |_| self.backend.lane_len(&lane_size(self.plan, chunk)).max(1))
    }

    /// A thread's buffers.
    fn buffers_len(&self, chunk: usize) -> u64 {
        let lane = self.backend.cpu().lane_len(&lane_size(self.plan, chunk));
        let decodes = self.plan.tensors.iter().any(PlannedTensor::is_decoded);
        // Codes and scales take less than a byte and a quarter for each element.
        let coded = if decodes { chunk.saturating_add(chunk / 4) } else { 0 };
        let adapts = self.plan.tensors.iter().any(PlannedTensor::is_adapted);
        lane.saturating_add(coded as u64).saturating_add(if adapts { HELD as u64 } else { 0 })
    }
}

/// The devices, if they have a kernel for any of the plan's tensors.
fn devices_for(plan: &Plan, backend: &dyn Backend) -> Option<Devices> {
    let codec = plan.recipe.codec();
    backend.devices().filter(|_| plan.quantized().any(|tensor| backend.quantizes(&codec, tensor.columns())))
}

/// Bytes of the largest element that is quantized.
fn element_size(plan: &Plan) -> usize {
    plan.quantized().filter_map(|tensor| Some(tensor.quantized_from()?.size())).max().unwrap_or(2)
}

/// Room for chunks of `chunk` elements at most, and for runs of absmax if there will be any.
pub(crate) fn lane_size(plan: &Plan, chunk: usize) -> LaneSize {
    let codec = plan.recipe.codec();
    let element = element_size(plan);
    let group_len = if codec.is_blocks() { 0 } else { element + 1 };
    let absmax = if codec.double_quant() { NESTED_CHUNK } else { 0 };
    // Tensors that are kept go through the same room.
    let mut size = LaneSize { source: chunk.saturating_mul(element), packed: 0, groups: 0, group_len, absmax };
    for tensor in plan.quantized() {
        let elements = tensor.elements().min(chunk_elements(plan, tensor, chunk) as u64);
        let groups = elements.div_ceil(codec.block_len(tensor.columns()));
        size.groups = size.groups.max(groups as usize);
        size.packed = size.packed.max(codec.packed_len(elements, tensor.columns()) as usize);
    }
    size
}

/// Elements of `tensor` in a chunk, where buffers hold `most`.
pub(crate) fn chunk_elements(plan: &Plan, tensor: &PlannedTensor, most: usize) -> usize {
    let unit = chunk_unit(plan, tensor);
    most / unit * unit
}

/// Elements of `tensor` that a chunk is whole multiples of.
fn chunk_unit(plan: &Plan, tensor: &PlannedTensor) -> usize {
    match plan.recipe.codec().has_whole_rows() {
        true if tensor.quantized_from().is_some() => {
            // Rows in a multiple of what share an integer for their zero points.
            usize::try_from(tensor.columns()).unwrap_or(usize::MAX).saturating_mul(GROUP)
        }
        _ => CHUNK_STEP,
    }
}

/// Elements, as a power of two, of the largest set of tensors that share a scale; of those too large to be held, none.
fn largest_set(plan: &Plan) -> usize {
    let elements = |set: &Vec<usize>| set.iter().map(|&tensor| plan.tensors[tensor].elements()).sum::<u64>();
    let held = plan.scale_sets.iter().map(elements).filter(|&elements| elements <= MAX_SET_CHUNK as u64);
    held.max().map_or(0, |elements| (elements as usize).next_power_of_two())
}

/// The most bytes of absmax that must be held at once.
fn largest_absmax(plan: &Plan) -> u64 {
    match plan.recipe.codec().scales {
        Scales::Blocks { size, double_quant: true, .. } => {
            let blocks = plan.quantized().map(|tensor| size.blocks(tensor.elements()));
            blocks.max().unwrap_or(0) * size_of::<f32>() as u64
        }
        Scales::Blocks { .. } | Scales::Groups { .. } => 0,
    }
}

/// The source's headers, the plan and the results, by estimate: rather too much than too little.
fn plan_len(plan: &Plan) -> u64 {
    let of_tensor = |tensor: &PlannedTensor| {
        let outputs = tensor.outputs.len();
        let parts = tensor.read.parts();
        // A part is of a tensor of the source, with a name; where there is one part, that name may be the tensor's own.
        let part = size_of::<TensorInfo>() + 2 * ALLOCATION + tensor.name.len();
        let reads = if parts.len() > 1 { size_of_val(parts) + ALLOCATION + tensor.name.len() } else { 0 };
        let decodes = if tensor.is_decoded() { parts.len() * (size_of::<Decode>() + part) } else { 0 };
        let adapts = if tensor.is_adapted() { parts.len() * (size_of::<Adapted>() + ALLOCATION) } else { 0 };
        let reason = if let Cow::Owned(reason) = &tensor.reason { reason.len() + ALLOCATION } else { 0 };
        let planned = size_of::<PlannedTensor>() + outputs * size_of::<u64>() + ALLOCATION + reason;
        let statistics = tensor.quantized_from().map_or(0, |_| size_of::<Statistics>() + ALLOCATION);
        let outcome = size_of::<TensorOutcome>() + outputs * size_of::<Sha256Hash>() + ALLOCATION + statistics;
        // While it is written; the order of names, at the end; and what lies between allocations.
        let in_progress = 160 + outputs * 16;
        (parts.len() * part + reads + decodes + adapts + planned + outcome + in_progress) as u64
    };
    let of_sets: usize = plan.scale_sets.iter().map(|set| (set.len() + 3) * size_of::<usize>() + ALLOCATION).sum();
    let of_files = plan.files.len() * OF_FILE;
    plan.tensors.iter().map(of_tensor).sum::<u64>() + (of_sets + of_files) as u64
}
