//! Rows to quantize in groups, and what a kernel makes of them.

use prequant::FloatDtype;
use prequant::internal::format::Coding;
use prequant::internal::kernel::group::Groups;
use prequant::internal::kernel::{BlockErrors, Kernel, NonFinite};

const TINY: f32 = f32::from_bits(1);

/// Numbers that awkward groups are made of: zeros of both signs, subnormal ones of every dtype, single magnitudes, the largest.
pub const ADVERSARIAL: &[&[f32]] = &[
    &[0.0],
    &[-0.0],
    &[0.0, -0.0],
    &[TINY, -TINY, 1e-39, 0.0],
    &[TINY, -TINY, 0.0],
    &[6e-8, -6e-8, 1.2e-7, 6e-5, -6.1e-5],
    &[9.2e-41, -1.8e-40, 0.0],
    &[0.37, -0.37],
    &[0.37],
    &[-0.37],
    &[f32::MAX, -f32::MAX, 3.3e38, 0.0, 1.0],
    &[65504.0, -65504.0, 57344.0, 61440.0, 1.0],
    &[1e-38, 1.1e-38, -1e-40, f32::MIN_POSITIVE],
    &[1e30, 1e-30, -1.0],
];

/// What a kernel wrote; figures as bits.
#[derive(Debug, PartialEq)]
pub struct Quantized {
    pub packed: Vec<u8>,
    pub scales: Vec<u8>,
    pub zero_points: Vec<u8>,
    pub figures: [Vec<u32>; 4],
}

impl Quantized {
    /// The first way in which this differs from what was expected, in words: outputs are too long to print.
    pub fn difference(&self, expected: &Quantized) -> Option<String> {
        let bytes = [
            ("packed", &self.packed, &expected.packed),
            ("scales", &self.scales, &expected.scales),
            ("zero_points", &self.zero_points, &expected.zero_points),
        ];
        for (name, found, expected) in bytes {
            if let Some(i) = (0..expected.len()).find(|&i| expected[i] != found[i]) {
                return Some(format!("{name} byte {i} is {:#04x}, expected {:#04x}", found[i], expected[i]));
            }
        }
        let names = ["scale", "signal", "noise", "worst"].into_iter();
        names.zip(self.figures.iter().zip(&expected.figures)).find_map(|(name, (found, expected))| {
            let i = (0..expected.len()).find(|&i| expected[i] != found[i])?;
            let (found, expected) = (f32::from_bits(found[i]), f32::from_bits(expected[i]));
            Some(format!("{name} of group {i} is {found:e}, expected {expected:e}"))
        })
    }
}

pub fn quantize(
    kernel: Kernel,
    source: &[u8],
    dtype: FloatDtype,
    columns: usize,
    group: usize,
    scheme: Coding,
) -> Result<Quantized, NonFinite> {
    let rows = source.len() / dtype.size() / columns;
    let groups = rows * (columns / group);
    // Filled with what no kernel writes everywhere, so that what was left out shows.
    let mut packed = vec![0xee; rows * scheme.packed_row(columns)];
    let mut scales = vec![0xee; groups * scheme.scale_size(dtype)];
    let mut zero_points = vec![0xee; if scheme.has_zero_points() { groups } else { 0 }];
    let mut figures: [Vec<f32>; 4] = std::array::from_fn(|_| vec![f32::NAN; groups]);
    let [absmax, signal, noise, worst] = &mut figures;
    kernel.quantize_groups(Groups {
        source,
        dtype,
        columns,
        coding: Coding { group, ..scheme },
        packed: &mut packed,
        scales: &mut scales,
        zero_points: &mut zero_points,
        figures: BlockErrors { absmax, signal, noise, worst },
    })?;
    let figures = figures.map(|figure| figure.iter().map(|x| x.to_bits()).collect());
    Ok(Quantized { packed, scales, zero_points, figures })
}
