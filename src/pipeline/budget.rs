//! How much memory a plan takes, and how it is shared out.

use crate::error::{Error, Result};
use crate::format::BlockSize;
use crate::plan::{Plan, PlannedTensor};
use crate::stats::GROUP;
use crate::units::Bytes;

/// Every run of this many elements is whole blocks, and whole groups of blocks for the statistics.
const CHUNK_STEP: usize = BlockSize::MAX * GROUP;

/// The most elements in a chunk: 4 MiB of bf16. Fewer and larger writes cost the file system less, more than the cache
/// that they miss.
const MAX_CHUNK: usize = 1 << 21;

/// The program itself, its threads' stacks and what libraries hold.
const BASE: u64 = 12 << 20;

/// A share of `--memory` for each purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Threads that quantize and hash.
    pub threads: usize,
    /// Elements that a thread takes at once, at most.
    pub chunk_elements: usize,
    /// Bytes for absmax that wait for their tensor's mean, with double quantization.
    pub absmax: u64,
    /// All memory that the plan takes, by estimate.
    pub peak: u64,
}

impl Budget {
    /// Shares out `memory` bytes among at most `threads` threads.
    ///
    /// # Errors
    /// When it is too little.
    pub fn new(plan: &Plan, memory: u64, threads: usize) -> Result<Budget> {
        let absmax = largest_absmax(plan);
        let least = BASE + absmax + buffers_len(plan, CHUNK_STEP);
        if least > memory {
            let hint = match absmax > 0 && least - absmax <= memory {
                true => "; double quantization holds one f32 for every block of a tensor: give more, or larger blocks",
                false => "",
            };
            return Err(Error::Memory { available: Bytes(memory).to_string(), needed: Bytes(least).to_string(), hint });
        }
        // Names and offsets take what they take; buffers shrink for them as far as they can.
        let plan_len = plan_len(plan);
        let fixed = BASE + plan_len.min(memory - least);
        let room = memory - fixed - absmax;
        let fitting = usize::try_from(room / buffers_len(plan, CHUNK_STEP)).unwrap_or(usize::MAX);
        let threads = threads.clamp(1, fitting);
        let mut chunk_elements = MAX_CHUNK;
        while chunk_elements > CHUNK_STEP && buffers_len(plan, chunk_elements) * threads as u64 > room {
            chunk_elements /= 2;
        }
        let buffers = buffers_len(plan, chunk_elements) * threads as u64;
        // Two tensors' worth, so that one can be read while the other's absmax are quantized.
        let absmax = (2 * absmax).min(memory - fixed - buffers);
        Ok(Budget { threads, chunk_elements, absmax, peak: BASE + plan_len + absmax + buffers })
    }

    /// The same with chunks of `elements`, rounded to what can be a chunk.
    pub fn with_chunk_elements(self, elements: usize) -> Budget {
        let chunk_elements = elements.next_multiple_of(CHUNK_STEP).clamp(CHUNK_STEP, MAX_CHUNK);
        Budget { chunk_elements, ..self }
    }
}

/// A thread's buffers: source, codes, four figures a block, and absmax as bytes.
fn buffers_len(plan: &Plan, chunk: usize) -> u64 {
    let element = plan.quantized().filter_map(|tensor| Some(tensor.quantized_from()?.size())).max().unwrap_or(2);
    let blocks = chunk / plan.recipe.block_size.get();
    (chunk * element + chunk / 2 + blocks * 5 * size_of::<f32>()) as u64
}

/// The most bytes of absmax that must be held at once.
fn largest_absmax(plan: &Plan) -> u64 {
    let blocks = |tensor: &PlannedTensor| plan.recipe.block_size.blocks(tensor.elements());
    match plan.recipe.double_quant {
        true => plan.quantized().map(blocks).max().unwrap_or(0) * size_of::<f32>() as u64,
        false => 0,
    }
}

/// The source's headers, the plan, the results and the manifest made of them, by estimate.
fn plan_len(plan: &Plan) -> u64 {
    let headers: u64 = plan.files.iter().map(|file| file.header.len() as u64).sum();
    let of_tensor = |tensor: &PlannedTensor| {
        let names = 3 * tensor.info.name.len() + tensor.outputs.len() * (tensor.info.name.len() + 32);
        (names + 600 + tensor.outputs.len() * 300) as u64
    };
    headers + plan.tensors.iter().map(of_tensor).sum::<u64>()
}
