//! The processor, by its fastest kernels.

use super::{Backend, Devices, Encoded, Fault, Lane, LaneSize, Run, row_len};
use crate::dtype::FloatDtype;
use crate::error::Result;
use crate::format::{BlockSize, Codebook, Codec, NESTED_BLOCK_SIZE, Scales, dynamic_map};
use crate::kernel::block::nested;
use crate::kernel::group::Groups;
use crate::kernel::{BlockErrors, Blocks, Figures, Kernel, quantize_any};
use std::ops::Range;

/// The processor, with one of its kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    kernel: Kernel,
}

impl Cpu {
    /// With this kernel.
    pub fn new(kernel: Kernel) -> Cpu {
        Cpu { kernel }
    }

    /// With its fastest kernel.
    pub fn detect() -> Cpu {
        Cpu::new(Kernel::detect())
    }

    /// Its kernel.
    pub fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// Makes a lane.
    pub fn lane(&self, size: &LaneSize) -> CpuLane {
        CpuLane {
            kernel: self.kernel,
            source: vec![0; size.source],
            packed: vec![0; size.packed],
            scales: vec![0; size.groups * size_of::<f32>()],
            zero_points: vec![0; size.groups],
            figures: std::array::from_fn(|_| vec![0.0; size.groups]),
            codes: Vec::new(),
            nested_absmax: Vec::new(),
        }
    }
}

impl Backend for Cpu {
    fn name(&self) -> String {
        format!("CPU ({})", self.kernel.name())
    }

    fn cpu(&self) -> Cpu {
        *self
    }

    fn devices(&self) -> Option<Devices> {
        None
    }

    fn quantizes(&self, _: &Codec, _: u64) -> bool {
        true
    }

    fn prepare(&self, _: &Codec, _: u64) -> Result<()> {
        Ok(())
    }

    fn lane_len(&self, size: &LaneSize) -> u64 {
        // Four figures, the scale as bytes, and a zero point that is packed into half a byte more.
        let group = 5 * size_of::<f32>() + 2;
        let groups = size.groups.saturating_mul(group);
        [size.source, size.packed, groups].into_iter().fold(0u64, |sum, len| sum.saturating_add(len as u64))
    }

    fn open_lane(&self, _: usize, size: &LaneSize) -> Result<Box<dyn Lane>, Fault> {
        Ok(Box::new(self.lane(size)))
    }
}

/// Buffers for a thread.
pub struct CpuLane {
    kernel: Kernel,
    source: Vec<u8>,
    packed: Vec<u8>,
    scales: Vec<u8>,
    zero_points: Vec<u8>,
    /// absmax, signal, noise and worst.
    figures: [Vec<f32>; 4],
    /// Of absmax.
    codes: Vec<u8>,
    nested_absmax: Vec<f32>,
}

impl CpuLane {
    /// All of its room for weights; a buffer for other things, too.
    pub fn buffer(&mut self) -> &mut [u8] {
        &mut self.source
    }

    /// Quantizes a run of blocks whatever is in them; see [`quantize_any`]. `None` if the codec has groups, which can't hold
    /// what isn't finite.
    pub fn quantize_any(&mut self, run: &Run<'_>) -> Option<Encoded<'_>> {
        let Scales::Blocks { codebook, size, .. } = run.codec.scales else { return None };
        let (source, mut outputs) = self.split(run);
        quantize_any(outputs.blocks(source, run, codebook, size));
        Some(outputs.into())
    }

    /// A run's weights, and room for what they become.
    fn split(&mut self, run: &Run<'_>) -> (&[u8], Outputs<'_>) {
        let groups = run.groups();
        let (scale_size, points) = match run.codec.is_blocks() {
            true => (0, false),
            false => (run.codec.scale_size(run.dtype), run.codec.has_zero_points()),
        };
        let [absmax, signal, noise, worst] = self.figures.each_mut().map(|figure| &mut figure[..groups]);
        let outputs = Outputs {
            packed: &mut self.packed[..run.packed_len()],
            scales: &mut self.scales[..groups * scale_size],
            zero_points: &mut self.zero_points[..if points { groups } else { 0 }],
            figures: BlockErrors { absmax, signal, noise, worst },
        };
        (&self.source[run.place.clone()], outputs)
    }
}

impl Lane for CpuLane {
    fn source(&mut self, len: usize) -> &mut [u8] {
        &mut self.source[..len]
    }

    fn absmax(&mut self, place: Range<usize>, dtype: FloatDtype) -> Result<Option<f32>, Fault> {
        Ok(self.kernel.absmax(&self.source[place], dtype).ok())
    }

    fn quantize(&mut self, run: &Run<'_>) -> Result<Option<Encoded<'_>>, Fault> {
        let kernel = self.kernel;
        let (source, mut outputs) = self.split(run);
        let quantized = match run.codec.scales {
            Scales::Blocks { codebook, size, .. } => kernel.quantize(outputs.blocks(source, run, codebook, size)),
            Scales::Groups { .. } => kernel.quantize_groups(outputs.groups(source, run)),
        };
        Ok(quantized.ok().map(|()| outputs.into()))
    }

    fn quantize_absmax(&mut self, absmax: &[f32], offset: f32) -> Result<(&[u8], &[f32]), Fault> {
        self.codes.resize(absmax.len(), 0);
        self.nested_absmax.resize(absmax.len().div_ceil(NESTED_BLOCK_SIZE), 0.0);
        nested::quantize(absmax, offset, dynamic_map(), &mut self.codes, &mut self.nested_absmax);
        Ok((&self.codes, &self.nested_absmax))
    }
}

/// [`Encoded`] to be written to.
struct Outputs<'a> {
    packed: &'a mut [u8],
    scales: &'a mut [u8],
    zero_points: &'a mut [u8],
    figures: BlockErrors<'a>,
}

impl Outputs<'_> {
    fn blocks<'s>(
        &'s mut self,
        source: &'s [u8],
        run: &Run<'_>,
        codebook: &'static Codebook,
        block_size: BlockSize,
    ) -> Blocks<'s> {
        let BlockErrors { absmax, signal, noise, worst } = &mut self.figures;
        Blocks {
            source,
            dtype: run.dtype,
            block_size,
            codebook,
            packed: self.packed,
            figures: BlockErrors { absmax, signal, noise, worst },
        }
    }

    fn groups<'s>(&'s mut self, source: &'s [u8], run: &Run<'_>) -> Groups<'s> {
        let BlockErrors { absmax, signal, noise, worst } = &mut self.figures;
        Groups {
            source,
            dtype: run.dtype,
            columns: row_len(run.codec, run.columns),
            coding: run.coding(),
            packed: self.packed,
            scales: self.scales,
            zero_points: self.zero_points,
            figures: BlockErrors { absmax, signal, noise, worst },
        }
    }
}

impl<'a> From<Outputs<'a>> for Encoded<'a> {
    fn from(Outputs { packed, scales, zero_points, figures }: Outputs<'a>) -> Encoded<'a> {
        Encoded { packed, scales, zero_points, figures: Figures::Blocks(figures) }
    }
}
