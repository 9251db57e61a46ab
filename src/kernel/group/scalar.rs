//! The specification of group quantization, as plainly as it can be said.
//!
//! The references work in the source's dtype: where the rules say "rounded", it is to that dtype, to nearest, ties to even.
//! All other arithmetic is IEEE f32.

use half::{bf16, f16};

use super::Groups;
use crate::dtype::FloatDtype;
use crate::format::{Coding, ElementCode, ScaleCode, TensorScale};
use crate::kernel::block::scalar::{LANES, Lanes, decode};
use crate::kernel::float8::{e4m3, e4m3_value, power_of_two};
use crate::kernel::{BlockErrors, NonFinite};

/// E2M1's largest value.
const FP4_MAX: f32 = 6.0;
/// E4M3's largest value.
const E4M3_MAX: f32 = 448.0;

/// Quantizes whole rows; see [`Groups`] for the layout and [`crate::kernel::Kernel::quantize_groups`] for the contract.
pub(super) fn quantize(groups: Groups<'_>) -> Result<(), NonFinite> {
    let Groups { source, dtype, columns, coding, packed, scales, zero_points, figures } = groups;
    let BlockErrors { absmax, signal, noise, worst } = figures;
    packed.fill(0);
    let (group, scale_size, scale_dtype) = (coding.group, coding.scale_size(dtype), coding.scale.float_dtype(dtype));
    let per_row = columns / group;
    for (i, source) in source.chunks_exact(group * dtype.size()).enumerate() {
        let elements: Vec<f32> = source.chunks_exact(dtype.size()).map(|bytes| decode(bytes, dtype)).collect();
        if !elements.iter().all(|x| x.is_finite()) {
            return Err(NonFinite);
        }
        let chosen = Chosen::new(Extent::of(&elements), dtype, coding, |x| round(x, dtype));
        chosen.stored.write(scale_dtype, &mut scales[i * scale_size..][..scale_size]);
        if let Some(point) = zero_points.get_mut(i) {
            *point = (chosen.zero_point + 8.0) as u8;
        }
        let row = &mut packed[i / per_row * coding.packed_row(columns)..][..coding.packed_row(columns)];
        let first = i % per_row * group;
        (signal[i], noise[i], worst[i]) = chosen.codes(&elements, dtype, coding, first, row);
        absmax[i] = chosen.scale;
    }
    Ok(())
}

/// The largest magnitude among `source`'s elements.
///
/// # Errors
/// [`NonFinite`] when one is a NaN or an infinity.
pub fn absmax(source: &[u8], dtype: FloatDtype) -> Result<f32, NonFinite> {
    let mut elements = source.chunks_exact(dtype.size()).map(|bytes| decode(bytes, dtype));
    elements.try_fold(0.0, |largest: f32, x| if x.is_finite() { Ok(largest.max(x.abs())) } else { Err(NonFinite) })
}

/// The global scale of a tensor, or of all that share one, with this absmax: what brings the largest group's scale to
/// E4M3's largest value.
pub fn global_scale(absmax: f32, dtype: FloatDtype) -> f32 {
    let scale = round(round(1.0 / absmax, dtype) * (E4M3_MAX * FP4_MAX), dtype);
    if scale.is_finite() { scale } else { 1.0 }
}

/// ModelOpt's scale of scales, `weight_scale_2`, of a tensor, or of all that share one, with this absmax: the inverse of what
/// [`global_scale`] aims at, in f32 whatever the dtype.
///
/// ModelOpt's own is 0 when nothing is left of the quotient, and the scales of groups of zeros are then NaN. Not so here.
pub fn scale_2(absmax: f32) -> f32 {
    let scale = absmax / (FP4_MAX * E4M3_MAX);
    if scale > 0.0 { scale } else { 1.0 }
}

/// What a group's scale is chosen by.
pub(super) struct Extent {
    /// The largest magnitude.
    pub absmax: f32,
    /// The least element, or 0 if none is below. For zero points only.
    pub least: f32,
    /// The greatest, or 0 if none is above. For zero points only.
    pub greatest: f32,
}

impl Extent {
    fn of(elements: &[f32]) -> Extent {
        let absmax = elements.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        let (least, greatest) = elements.iter().fold((0.0f32, 0.0f32), |(a, b), &x| (a.min(x), b.max(x)));
        Extent { absmax, least, greatest }
    }
}

/// A group's scale, and how elements are coded with it.
pub(super) struct Chosen {
    /// As it is stored.
    pub stored: Stored,
    /// What decoding multiplies by.
    pub scale: f32,
    /// -8 to 7; 0 without zero points.
    pub zero_point: f32,
}

/// A scale as it is stored.
#[derive(Clone, Copy)]
pub(super) enum Stored {
    Float(f32),
    Byte(u8),
}

impl Stored {
    #[inline(always)]
    pub(crate) fn write(&self, dtype: FloatDtype, into: &mut [u8]) {
        match (*self, dtype) {
            (Stored::Byte(byte), _) => into[0] = byte,
            (Stored::Float(x), FloatDtype::Bfloat16) => into.copy_from_slice(&bf16::from_f32(x).to_le_bytes()),
            (Stored::Float(x), FloatDtype::Float16) => into.copy_from_slice(&f16::from_f32(x).to_le_bytes()),
            (Stored::Float(x), FloatDtype::Float32) => into.copy_from_slice(&x.to_le_bytes()),
        }
    }
}

impl Chosen {
    /// The scale for elements of this extent; `round` rounds to `dtype`.
    #[inline(always)]
    pub(crate) fn new(extent: Extent, dtype: FloatDtype, coding: Coding, round: impl Fn(f32) -> f32) -> Chosen {
        let Extent { absmax, least, greatest } = extent;
        let largest = coding.element.largest();
        match (coding.scale, coding.tensor_scale) {
            (ScaleCode::SourceFloat, _) if coding.has_zero_points() => {
                let scale = round(round(greatest - least) / 15.0);
                let ratio = least / scale;
                let point = round(-8.0 - round(ratio)).clamp(-8.0, 7.0).round_ties_even();
                let zero_point = if ratio.is_nan() { 0.0 } else { point };
                let scale = or_epsilon(scale, dtype);
                Chosen { stored: Stored::Float(scale), scale, zero_point }
            }
            (ScaleCode::SourceFloat, _) => {
                let scale = or_epsilon(round(absmax / largest), dtype);
                Chosen { stored: Stored::Float(scale), scale, zero_point: 0.0 }
            }
            (ScaleCode::RoundedF32, _) => unreachable!("no format has scales that are rounded in decoding"),
            (ScaleCode::Float(own), _) => {
                let scale = or_epsilon(self::round(absmax / largest, own), own);
                Chosen { stored: Stored::Float(scale), scale, zero_point: 0.0 }
            }
            (ScaleCode::E4m3, Some(TensorScale::Factor(factor))) => {
                // 0 for a group of zeros, or for one so small beside the tensor that nothing is left of the quotient.
                let wanted = absmax / (largest * factor);
                let byte = e4m3(if wanted == 0.0 { 1.0 } else { wanted.clamp(1.0 / 512.0, E4M3_MAX) });
                Chosen { stored: Stored::Byte(byte), scale: e4m3_value(byte) * factor, zero_point: 0.0 }
            }
            (ScaleCode::E4m3, divisor) => {
                let divisor = if let Some(TensorScale::Divisor(divisor)) = divisor { divisor } else { 1.0 };
                let byte = e4m3((divisor * round(absmax / largest)).min(E4M3_MAX));
                let byte = if byte == 0 { e4m3(0.125) } else { byte };
                Chosen { stored: Stored::Byte(byte), scale: e4m3_value(byte) / divisor, zero_point: 0.0 }
            }
            (ScaleCode::E8m0(_), _) => {
                // The exponent, one higher from a mantissa of 1.75 on: what is coded is less than 7. The reference takes it in the
                // source's dtype, where that of a group near the largest number overflows, and that of f16's subnormal numbers is
                // none: it then writes zeros. Not so here.
                let exponent = (absmax.to_bits() + (1 << 21)) >> 23;
                let byte = exponent.saturating_sub(2) as u8;
                Chosen { stored: Stored::Byte(byte), scale: power_of_two(byte), zero_point: 0.0 }
            }
        }
    }

    /// Writes the codes of a group that begins at column `first` of a row of zeros; gives its signal, noise and worst.
    pub(super) fn codes(
        &self,
        elements: &[f32],
        dtype: FloatDtype,
        coding: Coding,
        first: usize,
        row: &mut [u8],
    ) -> (f32, f32, f32) {
        let first_high = matches!(coding.element, ElementCode::Codebook(_));
        let mut sums = Lanes::default();
        for (j, &x) in elements.iter().enumerate() {
            let (code, value) = self.code(x, dtype, coding);
            let column = first + j;
            let is_high = (column % 2 == 1) != first_high;
            row[column / 2] |= if is_high { code << 4 } else { code };
            sums.add(j % LANES, x / self.scale, value);
        }
        sums.finish()
    }

    /// An element's code, and the value that it stands for, in units of the scale.
    fn code(&self, x: f32, dtype: FloatDtype, coding: Coding) -> (u8, f32) {
        match (coding.element, coding.scale) {
            (ElementCode::Int { .. }, _) => {
                let shifted = round(round(x / self.scale, dtype) + self.zero_point, dtype);
                let code = shifted.clamp(-8.0, 7.0).round_ties_even();
                ((code + 8.0) as u8, code - self.zero_point)
            }
            (ElementCode::E2m1, ScaleCode::E4m3) => e2m1(x / self.scale),
            (ElementCode::E2m1, _) => e2m1(round(x / self.scale, dtype)),
            (ElementCode::Codebook(codebook), _) => codebook.nearest(x / self.scale),
            (ElementCode::E4m3, _) => unreachable!("codes of eight bits are only decoded: no format is made of them"),
        }
    }
}

/// `x` rounded to a dtype.
fn round(x: f32, dtype: FloatDtype) -> f32 {
    match dtype {
        FloatDtype::Bfloat16 => bf16::from_f32(x).to_f32(),
        FloatDtype::Float16 => f16::from_f32(x).to_f32(),
        FloatDtype::Float32 => x,
    }
}

/// A scale of 0 would divide by it: the dtype's epsilon in its place.
#[inline(always)]
fn or_epsilon(scale: f32, dtype: FloatDtype) -> f32 {
    if scale == 0.0 { epsilon(dtype) } else { scale }
}

#[inline(always)]
pub(super) fn epsilon(dtype: FloatDtype) -> f32 {
    match dtype {
        FloatDtype::Bfloat16 => bf16::EPSILON.to_f32(),
        FloatDtype::Float16 => f16::EPSILON.to_f32(),
        FloatDtype::Float32 => f32::EPSILON,
    }
}

/// The code of the E2M1 float nearest to `x` (ties to the even mantissa), and its value. Zeros of either sign have code 0.
fn e2m1(x: f32) -> (u8, f32) {
    const VALUES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let magnitude = x.abs();
    let above = [magnitude > 0.25, magnitude >= 0.75, magnitude > 1.25, magnitude >= 1.75, magnitude > 2.5];
    let higher = [magnitude >= 3.5, magnitude > 5.0];
    let code = above.into_iter().chain(higher).filter(|&is_above| is_above).count();
    if x < 0.0 { (code as u8 | 8, -VALUES[code]) } else { (code as u8, VALUES[code]) }
}
