//! How much memory a plan takes, and how it is shared out.

use crate::backend::cuda::{SlotSize, TABLE_BYTES};
use crate::error::{Error, Hint, Result};
use crate::format::{BlockSize, NESTED_BLOCK_SIZE, Scales};
use crate::plan::{Plan, PlannedTensor};
use crate::stats::GROUP;

/// Every run of this many elements is whole blocks, and whole groups of blocks for the statistics; of formats with groups
/// too, unless a chunk is whole rows.
const CHUNK_STEP: usize = BlockSize::MAX * GROUP;

/// Entries of absmax that are quantized at once: whole nested blocks.
pub const NESTED_CHUNK: usize = 256 * NESTED_BLOCK_SIZE;

/// The most elements in a chunk: 4 MiB of bf16. Fewer and larger writes cost the file system less, more than the cache
/// that they miss.
const MAX_CHUNK: usize = 1 << 21;

/// The program itself, its threads' stacks and what libraries hold.
const BASE: u64 = 12 << 20;

/// Threads more than asked for when there is a GPU: as many wait for it while others read, hash and write.
const WAITING: usize = 3;

/// Slots that a GPU needs to copy to the device, run a kernel and copy back at the same time.
const LEAST_SLOTS: usize = 3;

/// The same for tensors that share a scale: what a thread's buffer doesn't hold together is read twice, for the scale and
/// for the codes.
const MAX_SET_CHUNK: usize = 4 * MAX_CHUNK;

/// What a plan may use.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of memory here.
    pub memory: u64,
    /// Threads.
    pub threads: usize,
    /// GPUs.
    pub gpus: usize,
    /// Bytes of memory on each GPU.
    pub device_memory: u64,
}

/// A share of the [`Limits`] for each purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Threads that quantize and hash.
    pub threads: usize,
    /// Elements that a thread takes at once, at most.
    pub chunk_elements: usize,
    /// The fewest that `chunk_elements` can be.
    step: usize,
    /// Bytes for absmax that wait for their tensor's mean, with double quantization.
    pub absmax: u64,
    /// All memory that the plan takes here, by estimate; pinned buffers included.
    pub peak: u64,
    /// The GPUs' ring, if there are any.
    pub ring: Option<SlotPoolBudget>,
}

/// Slots on GPUs; see [`crate::backend::cuda::Slot`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotPoolBudget {
    /// On all GPUs together.
    pub slots: usize,
    /// Each one's size.
    pub slot: SlotSize,
    /// GPUs.
    pub gpus: usize,
}

impl Budget {
    /// Shares out what `limits` allow.
    ///
    /// # Errors
    /// When it is too little.
    pub fn new(plan: &Plan, limits: Limits) -> Result<Budget> {
        let Limits { memory, gpus, .. } = limits;
        let absmax = largest_absmax(plan);
        let step = plan.quantized().map(|tensor| chunk_unit(plan, tensor)).max().unwrap_or(0).max(CHUNK_STEP);
        // A thread, and a slot for it to work in.
        let pair = buffers_len(plan, step).saturating_add(slot_len(plan, step, gpus));
        let least = pair.saturating_add(BASE + absmax);
        check_least(plan, step, least, absmax, limits)?;
        // Names and offsets take what they take; buffers shrink for them as far as they can.
        let plan_len = plan_len(plan);
        let fixed = BASE + plan_len.min(memory - least);
        let room = memory - fixed - absmax;
        let waiting = if gpus > 0 { WAITING } else { 0 };
        let threads = (limits.threads + waiting).clamp(1, usize::try_from(room / pair).unwrap_or(usize::MAX));
        let least_slots = threads.min(LEAST_SLOTS * gpus);
        let fits = |chunk| {
            let here = buffers_len(plan, chunk) * threads as u64 + slot_len(plan, chunk, gpus) * least_slots as u64;
            here <= room && slots_on_device(plan, chunk, limits) >= least_slots
        };
        let mut chunk_elements = MAX_CHUNK.max(largest_set(plan)).max(step);
        while chunk_elements > step && !fits(chunk_elements) {
            chunk_elements = (chunk_elements / 2).max(step);
        }
        let mut buffers = buffers_len(plan, chunk_elements) * threads as u64;
        let ring = (gpus > 0).then(|| {
            let slot_len = slot_len(plan, chunk_elements, gpus);
            let here = usize::try_from((room - buffers) / slot_len).unwrap_or(usize::MAX);
            let slots = threads.min(slots_on_device(plan, chunk_elements, limits)).min(here).max(1);
            buffers += slots as u64 * slot_len;
            SlotPoolBudget { slots, slot: slot_size(plan, chunk_elements), gpus }
        });
        // Two tensors' worth, so that one can be read while the other's absmax are quantized.
        let absmax = (2 * absmax).min(memory - fixed - buffers);
        Ok(Budget { threads, chunk_elements, step, absmax, peak: BASE + plan_len + absmax + buffers, ring })
    }

    /// Bytes that the ring and the kernels' tables take on each GPU.
    pub fn device_peak(&self) -> u64 {
        self.ring.map_or(0, |ring| ring.slots.div_ceil(ring.gpus) as u64 * ring.slot.total() + TABLE_BYTES)
    }

    /// The same with chunks of `elements` at most, rounded to what can be a chunk.
    pub fn with_chunk_elements(self, elements: usize) -> Budget {
        let chunk_elements = elements.next_multiple_of(CHUNK_STEP).clamp(self.step, self.chunk_elements);
        Budget { chunk_elements, ..self }
    }
}

/// Whether the least that `plan` can be executed with is there.
fn check_least(plan: &Plan, step: usize, least: u64, absmax: u64, limits: Limits) -> Result<()> {
    if least > limits.memory {
        let hint = (absmax > 0 && least - absmax <= limits.memory).then_some(Hint::LargerBlocks);
        return Err(Error::Memory { limit: limits.memory, needed: least, hint });
    }
    if limits.gpus > 0 && slots_on_device(plan, step, limits) == 0 {
        let needed = slot_len(plan, step, limits.gpus) + TABLE_BYTES;
        return Err(Error::DeviceMemory { limit: limits.device_memory, needed });
    }
    Ok(())
}

/// Slots for chunks of `chunk` elements that fit on all GPUs together.
fn slots_on_device(plan: &Plan, chunk: usize, limits: Limits) -> usize {
    let each = limits.device_memory.saturating_sub(TABLE_BYTES) / slot_size(plan, chunk).total();
    usize::try_from(each).unwrap_or(usize::MAX).saturating_mul(limits.gpus)
}

/// Bytes of a slot here, which are as many as there; none without a GPU.
fn slot_len(plan: &Plan, chunk: usize, gpus: usize) -> u64 {
    if gpus > 0 { slot_size(plan, chunk).total() } else { 0 }
}

/// A slot that takes chunks, and runs of absmax if there will be any.
fn slot_size(plan: &Plan, chunk: usize) -> SlotSize {
    match plan.recipe.codec().scales {
        Scales::Blocks { size, double_quant, .. } => {
            let nested = if double_quant { NESTED_CHUNK } else { 0 };
            SlotSize::new(chunk, element_size(plan), size, nested)
        }
        Scales::Groups { .. } => {
            let Capacity { source, packed, groups } = Capacity::new(plan, chunk);
            SlotSize::for_groups(source, packed, groups)
        }
    }
}

/// Bytes of the largest element that is quantized.
fn element_size(plan: &Plan) -> usize {
    plan.quantized().filter_map(|tensor| Some(tensor.quantized_from()?.size())).max().unwrap_or(2)
}

/// A thread's buffers.
fn buffers_len(plan: &Plan, chunk: usize) -> u64 {
    let Capacity { source, packed, groups } = Capacity::new(plan, chunk);
    // Four figures, the scale as bytes, and a zero point that is packed into half a byte more.
    let group = 5 * size_of::<f32>() + 2;
    let decodes = plan.tensors.iter().any(PlannedTensor::is_decoded);
    // Codes and scales take less than a byte and a quarter for each element.
    let coded = if decodes { chunk.saturating_add(chunk / 4) } else { 0 };
    [source, packed, groups.saturating_mul(group), coded]
        .into_iter()
        .fold(0u64, |sum, len| sum.saturating_add(len as u64))
}

/// What a thread's buffers must hold.
#[derive(Clone, Copy, Debug)]
pub struct Capacity {
    /// Bytes of the source.
    pub source: usize,
    /// Bytes of codes.
    pub packed: usize,
    /// Blocks or groups.
    pub groups: usize,
}

impl Capacity {
    /// For chunks of `chunk` elements at most.
    pub fn new(plan: &Plan, chunk: usize) -> Capacity {
        let codec = plan.recipe.codec();
        // Tensors that are kept go through the same buffer.
        let mut capacity = Capacity { source: chunk.saturating_mul(element_size(plan)), packed: 0, groups: 0 };
        for tensor in plan.quantized() {
            let elements = tensor.elements().min(chunk_elements(plan, tensor, chunk) as u64);
            let groups = elements.div_ceil(codec.block_len(tensor.columns()));
            capacity.groups = capacity.groups.max(groups as usize);
            capacity.packed = capacity.packed.max(codec.packed_len(elements, tensor.columns()) as usize);
        }
        capacity
    }
}

/// Elements of `tensor` in a chunk, where buffers hold `most`.
pub fn chunk_elements(plan: &Plan, tensor: &PlannedTensor, most: usize) -> usize {
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

/// The source's headers, the plan, the results and the manifest made of them, by estimate.
fn plan_len(plan: &Plan) -> u64 {
    let headers: u64 = plan.files.iter().map(|file| file.header.len() as u64).sum();
    let of_tensor = |tensor: &PlannedTensor| {
        let (name, outputs) = (tensor.name.len(), tensor.outputs.len());
        let parts = tensor.read.parts().iter().filter(|part| part.spans().next().is_some()).count();
        // The header, the plan and the manifest know every part by its name.
        (outputs * (name + 332) + parts * (3 * name + 300) + 300) as u64
    };
    headers + plan.tensors.iter().map(of_tensor).sum::<u64>()
}
