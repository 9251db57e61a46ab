//! A place for one piece of work on a GPU: pinned buffers here, buffers there, and a stream between them.

use std::sync::Arc;

use super::driver::{Argument, DeviceBuffer, Fault, Launch, PinnedBuffer, Stream};
use super::{Gpu, THREADS, thread_blocks};
use crate::format::{BlockFormat, BlockSize, FloatDtype, NESTED_BLOCK_SIZE};
use crate::kernel::Figures;

/// Bytes of a slot's buffers, on the device and here alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotSize {
    source: usize,
    results: usize,
}

impl SlotSize {
    /// Room for `elements` weights of `element` bytes, in whole blocks; and for `nested` absmax, if that is more.
    pub fn new(elements: usize, element: usize, block_size: BlockSize, nested: usize) -> SlotSize {
        let blocks = elements.div_ceil(block_size.get());
        SlotSize {
            source: (elements * element).max(nested * size_of::<f32>()),
            results: (results_len(elements, blocks)).max(nested_len(nested)),
        }
    }

    /// Bytes on the device, which are as many as here.
    pub fn total(self) -> u64 {
        (self.source + self.results) as u64
    }
}

/// Four figures a block, then the codes: what a `quantize_*` kernel leaves behind. The codes start at a multiple of 16.
fn results_len(elements: usize, blocks: usize) -> usize {
    blocks * 4 * size_of::<f32>() + elements.div_ceil(2)
}

/// One f32 for each nested block, then the codes: what `quantize_absmax` leaves behind.
fn nested_len(count: usize) -> usize {
    count.div_ceil(NESTED_BLOCK_SIZE) * size_of::<f32>() + count
}

/// Pinned buffers, device buffers and a stream.
#[derive(Debug)]
pub struct Slot {
    stream: Stream,
    source: PinnedBuffer,
    results: PinnedBuffer,
    device_source: DeviceBuffer,
    device_results: DeviceBuffer,
    gpu: Arc<Gpu>,
}

/// What quantizing gave, in a slot's pinned memory.
pub struct Quantized<'a> {
    /// Two codes a byte.
    pub packed: &'a [u8],
    /// One figure a block. A block with a NaN or an infinity has such an absmax, and its other results mean nothing.
    pub figures: Figures<'a>,
}

impl Slot {
    /// A slot on `gpu`.
    pub fn new(gpu: &Arc<Gpu>, size: SlotSize) -> Result<Slot, Fault> {
        Ok(Slot {
            stream: Stream::new(&gpu.context)?,
            source: PinnedBuffer::new(&gpu.context, size.source)?,
            results: PinnedBuffer::new(&gpu.context, size.results)?,
            device_source: DeviceBuffer::new(&gpu.context, size.source)?,
            device_results: DeviceBuffer::new(&gpu.context, size.results)?,
            gpu: gpu.clone(),
        })
    }

    /// The GPU it is on.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Where the first `len` bytes of what is to be quantized go.
    ///
    /// # Panics
    /// When the slot is smaller.
    pub fn source(&mut self, len: usize) -> &mut [u8] {
        &mut self.source.bytes()[..len]
    }

    /// Quantizes the first `elements` elements of [`Slot::source`]; as [`crate::kernel::Kernel::quantize`] does, but for
    /// how it tells of what isn't finite.
    ///
    /// # Panics
    /// When the slot is smaller.
    pub fn quantize(
        &mut self,
        elements: usize,
        dtype: FloatDtype,
        format: BlockFormat,
        block_size: BlockSize,
    ) -> Result<Quantized<'_>, Fault> {
        let blocks = elements.div_ceil(block_size.get());
        let results = self.device_results.address();
        let figure = |i: usize| Argument::Address(results + (i * blocks * size_of::<f32>()) as u64);
        let launch = Launch {
            function: self.gpu.quantize_function(format, dtype),
            grid: thread_blocks(blocks),
            threads: THREADS,
            arguments: &[
                Argument::Address(self.device_source.address()),
                Argument::U32(elements as u32),
                Argument::U32(block_size.get() as u32),
                Argument::Address(self.gpu.table(format).address()),
                figure(4),
                figure(0),
                figure(1),
                figure(2),
                figure(3),
            ],
        };
        let source = &self.source.bytes()[..elements * dtype.size()];
        let bytes = &mut self.results.bytes()[..results_len(elements, blocks)];
        // SAFETY: these are the parameters in kernels.cu. The kernel reads `elements` elements of the source and the
        // table; it writes four figures a block and then the codes, which together are as long as `bytes`.
        unsafe { self.stream.run((source, &mut self.device_source), &launch, (&self.device_results, bytes))? };
        let (figures, packed) = bytes.split_at_mut(blocks * 4 * size_of::<f32>());
        let (absmax, rest) = as_floats(figures).split_at_mut(blocks);
        let (signal, rest) = rest.split_at_mut(blocks);
        let (noise, worst) = rest.split_at_mut(blocks);
        Ok(Quantized { packed, figures: Figures { absmax, signal, noise, worst } })
    }

    /// Quantizes `absmax` less `offset`; returns the codes and the nested absmax, as [`crate::kernel::nested::quantize`].
    ///
    /// # Panics
    /// When the slot is smaller.
    pub fn quantize_absmax(&mut self, absmax: &[f32], offset: f32) -> Result<(&[u8], &[f32]), Fault> {
        let blocks = absmax.len().div_ceil(NESTED_BLOCK_SIZE);
        let source = &mut self.source.bytes()[..size_of_val(absmax)];
        for (bytes, x) in source.chunks_exact_mut(4).zip(absmax) {
            bytes.copy_from_slice(&x.to_ne_bytes());
        }
        let results = self.device_results.address();
        let launch = Launch {
            function: self.gpu.absmax_function(),
            grid: blocks as u32,
            threads: NESTED_BLOCK_SIZE as u32,
            arguments: &[
                Argument::Address(self.device_source.address()),
                Argument::U32(absmax.len() as u32),
                Argument::F32(offset),
                Argument::Address(self.gpu.dynamic_map().address()),
                Argument::Address(results + (blocks * size_of::<f32>()) as u64),
                Argument::Address(results),
            ],
        };
        let bytes = &mut self.results.bytes()[..nested_len(absmax.len())];
        // SAFETY: these are the parameters in kernels.cu. The kernel reads the absmax and the midpoints; it writes one f32
        // a nested block and then the codes, which together are as long as `bytes`.
        unsafe { self.stream.run((source, &mut self.device_source), &launch, (&self.device_results, bytes))? };
        let (nested_absmax, codes) = bytes.split_at_mut(blocks * size_of::<f32>());
        Ok((codes, as_floats(nested_absmax)))
    }
}

/// Whole f32 at a multiple of 4, as the start of pinned memory is.
fn as_floats(bytes: &mut [u8]) -> &mut [f32] {
    // SAFETY: any bits are an f32; what doesn't fit the alignment is left out, and checked to be nothing.
    let (before, floats, after) = unsafe { bytes.align_to_mut::<f32>() };
    assert!(before.is_empty() && after.is_empty(), "pinned memory starts at a page");
    floats
}
