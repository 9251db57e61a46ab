//! A lane on a GPU: pinned buffers here, buffers there, and a stream between them.

use std::sync::Arc;

use crate::backend::cuda::driver::{Argument, DeviceBuffer, Fault, Launch, PinnedBuffer, Stream};
use crate::backend::cuda::groups::{GroupKernel, tensor_factor};
use crate::backend::cuda::{BlockKernel, Gpu, THREADS, thread_blocks};
use crate::backend::{self, Encoded, Lane, LaneSize, Run, row_len};
use crate::dtype::FloatDtype;
use crate::format::{BlockSize, Coding, NESTED_BLOCK_SIZE, Scales};
use crate::kernel::BlockErrors;

/// Bytes of a slot's buffers, on the device and here alike.
#[derive(Clone, Copy)]
pub(super) struct SlotSize {
    source: usize,
    results: usize,
}

impl From<&LaneSize> for SlotSize {
    fn from(size: &LaneSize) -> SlotSize {
        let results = size.packed + size.groups * (4 * size_of::<f32>() + size.group_len);
        SlotSize {
            source: size.source.max(size.absmax * size_of::<f32>()),
            results: results.max(nested_len(size.absmax)),
        }
    }
}

impl SlotSize {
    /// Bytes on the device, which are as many as here.
    pub(crate) fn total(self) -> u64 {
        (self.source + self.results) as u64
    }
}

/// Four figures per block, then the codes: what a `quantize_*` kernel leaves behind. The codes start at a multiple of 16.
fn results_len(elements: usize, blocks: usize) -> usize {
    blocks * 4 * size_of::<f32>() + elements.div_ceil(2)
}

/// One f32 for each nested block, then the codes: what `quantize_absmax` leaves behind.
fn nested_len(count: usize) -> usize {
    count.div_ceil(NESTED_BLOCK_SIZE) * size_of::<f32>() + count
}

/// Where the results of a kernel for groups lie, one after the other: four figures per group, codes, scales, zero points.
/// All but zero points start at multiples of 4.
struct GroupResults {
    groups: usize,
    packed: usize,
    scales: usize,
    zero_points: usize,
}

impl GroupResults {
    fn new(elements: usize, dtype: FloatDtype, columns: usize, coding: Coding) -> GroupResults {
        let group = coding.group;
        let rows = elements / columns;
        assert_eq!(elements, rows * columns, "not whole rows");
        assert!(columns.is_multiple_of(group), "group: divides columns");
        let groups = elements / group;
        GroupResults {
            groups,
            packed: rows * coding.packed_row(columns),
            scales: groups * coding.scale_size(dtype),
            zero_points: if coding.has_zero_points() { groups } else { 0 },
        }
    }

    fn figures(&self) -> usize {
        self.groups * 4 * size_of::<f32>()
    }

    fn len(&self) -> usize {
        self.figures() + self.packed + self.scales + self.zero_points
    }
}

/// Pinned buffers, device buffers and a stream.
#[derive(Debug)]
pub(crate) struct Slot {
    stream: Stream,
    source: PinnedBuffer,
    results: PinnedBuffer,
    device_source: DeviceBuffer,
    device_results: DeviceBuffer,
    gpu: Arc<Gpu>,
}

impl Slot {
    /// A slot on `gpu`.
    pub(super) fn new(gpu: &Arc<Gpu>, size: SlotSize) -> Result<Slot, Fault> {
        Ok(Slot {
            stream: Stream::new(&gpu.context)?,
            source: PinnedBuffer::new(&gpu.context, size.source)?,
            results: PinnedBuffer::new(&gpu.context, size.results)?,
            device_source: DeviceBuffer::new(&gpu.context, size.source)?,
            device_results: DeviceBuffer::new(&gpu.context, size.results)?,
            gpu: gpu.clone(),
        })
    }

    /// Quantizes blocks of weights. A block with a NaN or an infinity gets such an absmax, and its other results mean nothing.
    fn blocks(
        &mut self,
        run: &Run<'_>,
        kernel: BlockKernel,
        block_size: BlockSize,
    ) -> Result<Option<Encoded<'_>>, Fault> {
        let (elements, blocks) = (run.elements(), run.groups());
        let results = self.device_results.address();
        let figure = |i: usize| Argument::Address(results + (i * blocks * size_of::<f32>()) as u64);
        let launch = Launch {
            function: self.gpu.quantize_function(kernel, run.dtype),
            grid: thread_blocks(blocks),
            threads: THREADS,
            arguments: &[
                Argument::Address(self.device_source.address()),
                Argument::U32(elements as u32),
                Argument::U32(block_size.get() as u32),
                Argument::Address(self.gpu.table(kernel).address()),
                figure(4),
                figure(0),
                figure(1),
                figure(2),
                figure(3),
            ],
        };
        let source = &self.source.bytes()[run.place.clone()];
        let bytes = &mut self.results.bytes()[..results_len(elements, blocks)];
        // SAFETY: these are the parameters in kernels.cu. The kernel reads `elements` elements of the source and the
        // table; it writes four figures per block and then the codes, which together are as long as `bytes`.
        unsafe { self.stream.run((source, &mut self.device_source), &launch, (&self.device_results, bytes))? };
        let (figures, packed) = bytes.split_at_mut(blocks * 4 * size_of::<f32>());
        let figures = as_figures(figures);
        let finite = figures.absmax.iter().all(|absmax| absmax.is_finite());
        Ok(finite.then_some(Encoded { packed, scales: &[], zero_points: &[], figures }))
    }

    /// Quantizes groups of weights. A group with a NaN or an infinity gets NaN for an absmax, and its other results mean
    /// nothing; an infinite absmax is a scale that overflowed.
    fn groups(&mut self, run: &Run<'_>, kernel: GroupKernel) -> Result<Option<Encoded<'_>>, Fault> {
        let (columns, coding) = (row_len(run.codec, run.columns), run.coding());
        let len = GroupResults::new(run.elements(), run.dtype, columns, coding);
        let figures = self.device_results.address();
        let packed = figures + len.figures() as u64;
        let scales = packed + len.packed as u64;
        let launch = Launch {
            function: self.gpu.groups()?.function(kernel, run.dtype),
            grid: kernel.thread_blocks(len.groups),
            threads: THREADS,
            arguments: &[
                Argument::Address(self.device_source.address()),
                Argument::U32(len.groups as u32),
                Argument::U32(coding.group as u32),
                Argument::F32(tensor_factor(coding)),
                Argument::Address(packed),
                Argument::Address(scales),
                Argument::Address(scales + len.scales as u64),
                Argument::Address(figures),
            ],
        };
        let source = &self.source.bytes()[run.place.clone()];
        let bytes = &mut self.results.bytes()[..len.len()];
        // SAFETY: these are the parameters in groups.cu. The kernel reads `groups` groups of the source; it writes what
        // `GroupResults` says, which together is as long as `bytes`.
        unsafe { self.stream.run((source, &mut self.device_source), &launch, (&self.device_results, bytes))? };
        let (figures, rest) = bytes.split_at_mut(len.figures());
        let (packed, rest) = rest.split_at(len.packed);
        let (scales, zero_points) = rest.split_at(len.scales);
        let figures = as_figures(figures);
        let finite = !figures.absmax.iter().any(|absmax| absmax.is_nan());
        Ok(finite.then_some(Encoded { packed, scales, zero_points, figures }))
    }

    fn absmax(&mut self, absmax: &[f32], offset: f32) -> Result<(&[u8], &[f32]), Fault> {
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

impl Lane for Slot {
    fn source(&mut self, len: usize) -> &mut [u8] {
        &mut self.source.bytes()[..len]
    }

    fn quantize(&mut self, run: &Run<'_>) -> Result<Option<Encoded<'_>>, backend::Fault> {
        let gpu = self.gpu.clone();
        let no_kernel = || backend::Fault {
            device: gpu.to_string(),
            why: format!("there is no kernel for {}", run.codec.format.name).into(),
            is_out_of_memory: false,
        };
        let encoded = match run.codec.scales {
            Scales::Blocks { codebook, size, .. } => {
                self.blocks(run, BlockKernel::new(codebook).ok_or_else(no_kernel)?, size)
            }
            Scales::Groups { .. } => self.groups(run, GroupKernel::of(run.codec, run.columns).ok_or_else(no_kernel)?),
        };
        encoded.map_err(|fault| gpu.fault(fault))
    }

    fn quantize_absmax(&mut self, absmax: &[f32], offset: f32) -> Result<(&[u8], &[f32]), backend::Fault> {
        let gpu = self.gpu.clone();
        self.absmax(absmax, offset).map_err(|fault| gpu.fault(fault))
    }
}

/// Four figures per block or group, each figure's one after the other.
fn as_figures(bytes: &mut [u8]) -> BlockErrors<'_> {
    let floats = as_floats(bytes);
    let count = floats.len() / 4;
    let (absmax, rest) = floats.split_at_mut(count);
    let (signal, rest) = rest.split_at_mut(count);
    let (noise, worst) = rest.split_at_mut(count);
    BlockErrors { absmax, signal, noise, worst }
}

/// Whole f32 at a multiple of 4, as the start of pinned memory is.
fn as_floats(bytes: &mut [u8]) -> &mut [f32] {
    // SAFETY: any bits are an f32; what doesn't fit the alignment is left out, and checked to be nothing.
    let (before, floats, after) = unsafe { bytes.align_to_mut::<f32>() };
    assert!(before.is_empty() && after.is_empty(), "pinned memory starts at a page");
    floats
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{ElementCode, Highest, ScaleCode};

    #[test]
    fn a_slot_for_groups_has_room_for_every_coding() {
        let floats = [ScaleCode::E4m3, ScaleCode::E8m0(Highest::Infinite)].map(|scale| (ElementCode::E2m1, scale));
        let integers = [true, false].map(|zero_point| (ElementCode::Int { zero_point }, ScaleCode::SourceFloat));
        let rows = (1..40).flat_map(|columns| integers.map(|codes| (columns, columns, codes)));
        let groups = floats.into_iter().chain(integers).map(|codes| (64, 16, codes));
        for (columns, group, (element, scale)) in rows.chain(groups) {
            let coding = Coding::new(element, scale, group);
            for dtype in [FloatDtype::Bfloat16, FloatDtype::Float32] {
                let elements = 3 * columns;
                let packed = 3 * coding.packed_row(columns);
                let group_len = coding.scale_size(dtype) + 1;
                let (source, groups) = (elements * dtype.size(), elements / group);
                let size = SlotSize::from(&LaneSize { source, packed, groups, group_len, absmax: 0 });
                let needed = GroupResults::new(elements, dtype, columns, coding).len();
                assert!(needed <= size.results, "{columns} {coding:?}: {needed} of {}", size.results);
            }
        }
    }
}
