//! A lane on a GPU: pinned buffers here, buffers there, and a stream between them.

use std::ops::Range;
use std::sync::Arc;

use crate::backend::cuda::driver::{Argument, DeviceBuffer, Download, Fault, Launch, PinnedBuffer, Stream, Upload};
use crate::backend::cuda::groups::{GroupKernel, largest_thread_blocks, tensor_factor};
use crate::backend::cuda::results::{Results, nested_len};
use crate::backend::cuda::{BlockKernel, Gpu, THREADS, sum_thread_blocks, thread_blocks};
use crate::backend::{self, Encoded, Lane, LaneSize, Run};
use crate::dtype::FloatDtype;
use crate::format::{BlockSize, NESTED_BLOCK_SIZE, Scales};
use crate::kernel::decode::scale_values;
use crate::kernel::{ErrorSums, Figures};

/// Elements that the kernels for the largest magnitude take at once.
const ROUND: usize = 8;

/// Where runs must start for the kernels' loads.
const ALIGNMENT: usize = 16;

/// Bytes of a slot's buffers.
#[derive(Clone, Copy)]
pub(super) struct SlotSize {
    /// On the device and here.
    source: usize,
    /// On the device and here.
    results: usize,
    /// On the device: figures of each block, before they are summed.
    figures: usize,
    /// Groups whose scales are decoded here.
    groups: usize,
}

impl From<&LaneSize> for SlotSize {
    fn from(size: &LaneSize) -> SlotSize {
        let is_blocks = size.group_len == 0;
        // Blocks' absmax are results, as they are stored.
        let (group_len, figures) = if is_blocks { (size_of::<f32>(), 3) } else { (size.group_len, 4) };
        let results = Results::room(size.packed, size.groups, group_len);
        SlotSize {
            source: size.source.max(size.absmax * size_of::<f32>()),
            results: results.max(nested_len(size.absmax)),
            figures: size.groups * figures * size_of::<f32>(),
            groups: if is_blocks { 0 } else { size.groups },
        }
    }
}

impl SlotSize {
    /// Bytes on the device; here it is no more.
    pub(crate) fn total(self) -> u64 {
        (self.source + self.results + self.figures) as u64
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
    device_figures: DeviceBuffer,
    /// What of `source` the device has.
    uploaded: Range<usize>,
    /// The scales of groups, decoded.
    scale_values: Vec<f32>,
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
            device_figures: DeviceBuffer::new(&gpu.context, size.figures.max(1))?,
            uploaded: 0..0,
            scale_values: vec![0.0; size.groups],
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
        let len = Results::new(run);
        let (results, figures) = (self.device_results.address(), self.device_figures.address());
        let figure = |i: usize| figures + (i * len.groups * size_of::<f32>()) as u64;
        let absmax = results + len.scales_at() as u64;
        self.check_figures(3 * len.groups);
        let quantize = Launch {
            function: self.gpu.quantize_function(kernel, run.dtype),
            grid: thread_blocks(len.groups),
            threads: THREADS,
            arguments: &[
                Argument::Address(self.device_source.address() + run.place.start as u64),
                Argument::U32(run.elements() as u32),
                Argument::U32(block_size.get() as u32),
                Argument::Address(self.gpu.table(kernel).address()),
                Argument::Address(results),
                Argument::Address(absmax),
                Argument::Address(figure(0)),
                Argument::Address(figure(1)),
                Argument::Address(figure(2)),
            ],
        };
        // SAFETY: these are the parameters in kernels.cu. The kernel reads `elements` elements of the source, which `run` uploads or
        // finds there, and the table; it writes codes and absmax, as `Results` has them, whose room `Stream::run` checks, and three
        // figures per block, whose room is checked above.
        unsafe { self.quantize_and_sum(run, quantize, [absmax, figure(0), figure(1), figure(2)])? };
        let (packed, scales, zero_points, errors) = parts(self.results.bytes(), len);
        debug_assert!(zero_points.is_empty());
        let absmax = as_numbers::<f32>(scales);
        let is_finite = absmax.iter().all(|absmax| absmax.is_finite());
        let figures = Figures::Sums { absmax, errors };
        Ok(is_finite.then_some(Encoded { packed, scales: &[], zero_points: &[], figures }))
    }

    /// Quantizes groups of weights. A group with a NaN or an infinity shows in the counts, and its other results mean
    /// nothing; an infinite scale is one that overflowed.
    fn groups(&mut self, run: &Run<'_>, kernel: GroupKernel) -> Result<Option<Encoded<'_>>, Fault> {
        let (len, coding) = (Results::new(run), run.coding());
        let (results, figures) = (self.device_results.address(), self.device_figures.address());
        let figure = |i: usize| figures + (i * len.groups * size_of::<f32>()) as u64;
        self.check_figures(4 * len.groups);
        let gpu = self.gpu.clone();
        let quantize = Launch {
            function: gpu.groups()?.function(kernel, run.dtype),
            grid: kernel.thread_blocks(len.groups),
            threads: THREADS,
            arguments: &[
                Argument::Address(self.device_source.address() + run.place.start as u64),
                Argument::U32(len.groups as u32),
                Argument::U32(coding.group as u32),
                Argument::F32(tensor_factor(coding)),
                Argument::Address(results),
                Argument::Address(results + len.scales_at() as u64),
                Argument::Address(results + len.zero_points_at() as u64),
                Argument::Address(figures),
            ],
        };
        // SAFETY: these are the parameters in groups.cu. The kernel reads `groups` groups of the source, which `run` uploads or finds
        // there; it writes codes, scales and zero points, as `Results` has them, whose room `Stream::run` checks, and four figures per
        // group, whose room is checked above.
        unsafe { self.quantize_and_sum(run, quantize, [0, 1, 2, 3].map(figure))? };
        let (packed, scales, zero_points, errors) = parts(self.results.bytes(), len);
        let absmax = &mut self.scale_values[..len.groups];
        scale_values(coding, run.dtype, scales, absmax);
        let is_finite = !errors.zeros.contains(&NAN_SEEN);
        let figures = Figures::Sums { absmax, errors };
        Ok(is_finite.then_some(Encoded { packed, scales, zero_points, figures }))
    }

    /// # Panics
    /// Where so many figures are more than there is room for: the run is longer than the lane was made for.
    fn check_figures(&self, figures: usize) {
        assert!(figures * size_of::<f32>() <= self.device_figures.len(), "more blocks or groups than the lane is for");
    }

    /// Has a run quantized, and its figures, at these addresses, summed.
    ///
    /// # Safety
    /// The launch must be sound, and leave [`Results`] but for the sums and counts, and one figure per block or group at each address.
    unsafe fn quantize_and_sum(&mut self, run: &Run<'_>, quantize: Launch<'_>, figures: [u64; 4]) -> Result<(), Fault> {
        let len = Results::new(run);
        let results = self.device_results.address();
        let [absmax, signal, noise, worst] = figures.map(Argument::Address);
        let sum = Launch {
            function: self.gpu.sum_function(),
            grid: sum_thread_blocks(len.groups),
            threads: THREADS,
            arguments: &[
                absmax,
                signal,
                noise,
                worst,
                Argument::U32(len.groups as u32),
                Argument::Address(results + len.sums_at() as u64),
                Argument::Address(results + len.zeros_at() as u64),
            ],
        };
        // SAFETY: of the first launch the caller's promise; of the second, these are the parameters in kernels.cu: it reads what the
        // first has left, and writes sums and counts, as `Results` has them.
        unsafe { self.run(run.place.clone(), &[quantize, sum], len.pieces()) }
    }

    /// Runs kernels on what is at `place` in the source, which the device gets unless it has it. Brings back these pieces of the results.
    ///
    /// # Safety
    /// As [`Stream::run`].
    unsafe fn run(
        &mut self,
        place: Range<usize>,
        launches: &[Launch<'_>],
        pieces: [Range<usize>; 2],
    ) -> Result<(), Fault> {
        assert!(place.start.is_multiple_of(ALIGNMENT), "weights start at a multiple of 16 bytes");
        let is_there = self.uploaded.start <= place.start && place.end <= self.uploaded.end;
        let missing = if is_there { place.end..place.end } else { place.clone() };
        let at = missing.start;
        let upload = Upload { bytes: &self.source.bytes()[missing], to: &mut self.device_source, at };
        let download = Download { from: &self.device_results, bytes: self.results.bytes(), pieces };
        // SAFETY: the launches are the caller's promise. The buffers are this slot's, which is borrowed; the modules are the GPU's, which
        // the slot holds.
        unsafe { self.stream.run(upload, launches, download)? };
        if !is_there {
            let follows = self.uploaded.end == place.start;
            self.uploaded = if follows { self.uploaded.start..place.end } else { place };
        }
        Ok(())
    }

    fn largest(&mut self, place: Range<usize>, dtype: FloatDtype) -> Result<Option<f32>, Fault> {
        let rounds = place.len() / (ROUND * dtype.size());
        assert_eq!(rounds * ROUND * dtype.size(), place.len(), "not whole rounds");
        let grid = largest_thread_blocks(rounds);
        let gpu = self.gpu.clone();
        let launch = Launch {
            function: gpu.groups()?.largest(dtype),
            grid,
            threads: THREADS,
            arguments: &[
                Argument::Address(self.device_source.address() + place.start as u64),
                Argument::U32(rounds as u32),
                Argument::Address(self.device_results.address()),
            ],
        };
        let results = grid as usize * size_of::<u32>();
        // SAFETY: these are the parameters in groups.cu. The kernel reads `rounds` times 8 elements of the source, and writes one
        // word for each thread block.
        unsafe { self.run(place, &[launch], [0..results, 0..0])? };
        let bits = as_numbers::<u32>(&self.results.bytes()[..results]).iter().copied().max().unwrap_or(0);
        Ok(Some(f32::from_bits(bits)).filter(|absmax| absmax.is_finite()))
    }

    fn absmax(&mut self, absmax: &[f32], offset: f32) -> Result<(&[u8], &[f32]), Fault> {
        let blocks = absmax.len().div_ceil(NESTED_BLOCK_SIZE);
        let source = &mut self.source.bytes()[..size_of_val(absmax)];
        for (bytes, x) in source.chunks_exact_mut(4).zip(absmax) {
            bytes.copy_from_slice(&x.to_ne_bytes());
        }
        self.uploaded = 0..0;
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
        // SAFETY: these are the parameters in kernels.cu. The kernel reads the absmax and the midpoints; it writes one f32
        // a nested block and then the codes, which together are as long as what is brought back.
        unsafe { self.run(0..size_of_val(absmax), &[launch], [0..nested_len(absmax.len()), 0..0])? };
        let bytes = &self.results.bytes()[..nested_len(absmax.len())];
        let (nested_absmax, codes) = bytes.split_at(blocks * size_of::<f32>());
        Ok((codes, as_numbers(nested_absmax)))
    }
}

impl Lane for Slot {
    fn source(&mut self, len: usize) -> &mut [u8] {
        self.uploaded = 0..0;
        &mut self.source.bytes()[..len]
    }

    fn absmax(&mut self, place: Range<usize>, dtype: FloatDtype) -> Result<Option<f32>, backend::Fault> {
        let gpu = self.gpu.clone();
        self.largest(place, dtype).map_err(|fault| gpu.fault(fault))
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

/// In place of a count of blocks of zeros: one of the blocks holds a NaN, or what a kernel marks so.
const NAN_SEEN: u8 = 255;

/// Codes, scales, zero points and sums.
fn parts(bytes: &[u8], len: Results) -> (&[u8], &[u8], &[u8], ErrorSums<'_>) {
    let sums = as_numbers::<f64>(&bytes[len.sums_at()..len.scales_at()]);
    let (signal, rest) = sums.split_at(len.summed());
    let (noise, worst) = rest.split_at(len.summed());
    let zeros = &bytes[len.zeros_at()..len.len()];
    let scales = &bytes[len.scales_at()..len.zero_points_at()];
    let zero_points = &bytes[len.zero_points_at()..len.zeros_at()];
    (&bytes[..len.packed], scales, zero_points, ErrorSums { signal, noise, worst, zeros })
}

/// Numbers that any bits are.
trait Number: Copy {}

impl Number for u32 {}
impl Number for f32 {}
impl Number for f64 {}

/// Whole numbers of a kind, at a multiple of their size: pinned memory starts at a page.
fn as_numbers<T: Number>(bytes: &[u8]) -> &[T] {
    // SAFETY: any bits are such a number; what doesn't fit the alignment is left out, and checked to be nothing.
    let (before, numbers, after) = unsafe { bytes.align_to::<T>() };
    assert!(before.is_empty() && after.is_empty(), "results lie at multiples of their size");
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{CodecOptions, FORMATS, GroupSize};

    #[test]
    fn a_slot_has_room_for_every_format() {
        for format in FORMATS {
            for columns in (32usize..70).chain([96, 128, 640]) {
                for group_size in [GroupSize::Channel, GroupSize::default()] {
                    let codec = format.codec(CodecOptions { group_size, ..CodecOptions::default() });
                    if !codec.is_blocks() && !columns.is_multiple_of(codec.block_len(columns as u64) as usize) {
                        continue;
                    }
                    for dtype in [FloatDtype::Bfloat16, FloatDtype::Float32] {
                        let place = 0..3 * columns * dtype.size();
                        let run = Run { codec: &codec, dtype, columns: columns as u64, tensor_scale: None, place };
                        let (packed, groups) = (run.packed_len(), run.groups());
                        let group_len = if codec.is_blocks() { 0 } else { dtype.size() + 1 };
                        let size = LaneSize { source: run.place.len(), packed, groups, group_len, absmax: 0 };
                        let (needed, room) = (Results::new(&run).len(), SlotSize::from(&size).results);
                        assert!(needed <= room, "{} {columns}: {needed} of {room}", format.name);
                    }
                }
            }
        }
    }
}
