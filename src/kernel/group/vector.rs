//! [`super::scalar`]'s arithmetic on arrays of 32 elements, in loops that compilers turn into vector instructions: on
//! processors without code of their own, and for what avx2/ has no code for.
//!
//! Groups are whole arrays, or one half (NVFP4's 16 columns); others are left to scalar.rs.

use super::Groups;
use super::scalar::{self, Chosen, Extent};
use crate::dtype::FloatDtype;
use crate::format::{Coding, ElementCode, Highest, ScaleCode};
use crate::kernel::block::scalar::LANES;
use crate::kernel::element::{Bfloat16, Element, Float16, Float32};
use crate::kernel::lanes::{AddSquares, Of, fold, larger, largest, tree_sum};
use crate::kernel::{BlockErrors, NonFinite};

/// Elements' codes as types, so that each has its own copy of the loops.
trait Code {
    /// Its elements and scales, known to the compiler.
    const ELEMENT: ElementCode;
    const SCALE: ScaleCode;
    /// Whether the least and the greatest element are needed, not the absmax alone.
    const SIGNED: bool;
    /// The code of an element, in the lowest four bits, and the value that it stands for, in units of the scale; `ratio` is
    /// the element over the scale.
    fn quantize<E: Element>(ratio: f32, zero_point: f32) -> (u32, f32);
    /// The same coding, as what it is known to be.
    #[inline(always)]
    fn known(coding: Coding) -> Coding {
        Coding { element: Self::ELEMENT, scale: Self::SCALE, ..coding }
    }
}

struct Integer;
struct AsymmetricInteger;
struct RoundedFloat;
struct Float;

impl Code for Integer {
    const ELEMENT: ElementCode = ElementCode::Int { zero_point: false };
    const SCALE: ScaleCode = ScaleCode::SourceFloat;
    const SIGNED: bool = false;

    #[inline(always)]
    fn quantize<E: Element>(ratio: f32, _: f32) -> (u32, f32) {
        nearest_integer(E::round(ratio))
    }
}

impl Code for AsymmetricInteger {
    const ELEMENT: ElementCode = ElementCode::Int { zero_point: true };
    const SCALE: ScaleCode = ScaleCode::SourceFloat;
    const SIGNED: bool = true;

    #[inline(always)]
    fn quantize<E: Element>(ratio: f32, zero_point: f32) -> (u32, f32) {
        let (code, integer) = nearest_integer(E::round(E::round(ratio) + zero_point));
        (code, integer - zero_point)
    }
}

impl Code for RoundedFloat {
    const ELEMENT: ElementCode = ElementCode::E2m1;
    const SCALE: ScaleCode = ScaleCode::E8m0(Highest::Infinite);
    const SIGNED: bool = false;

    #[inline(always)]
    fn quantize<E: Element>(ratio: f32, _: f32) -> (u32, f32) {
        // The element is rounded to its dtype before it is coded. Over a power of two, only what rounds to zero is changed
        // by that.
        nearest_e2m1(ratio, -E::NOTHING)
    }
}

impl Code for Float {
    const ELEMENT: ElementCode = ElementCode::E2m1;
    const SCALE: ScaleCode = ScaleCode::E4m3;
    const SIGNED: bool = false;

    #[inline(always)]
    fn quantize<E: Element>(ratio: f32, _: f32) -> (u32, f32) {
        nearest_e2m1(ratio, 0.0)
    }
}

/// The nearest integer from -8 to 7, ties to even, and its code.
#[inline(always)]
fn nearest_integer(x: f32) -> (u32, f32) {
    // 1.5 * 2^23, whose ulp is 1, and the code of 0.
    const CODE_8: f32 = 12_582_920.0;
    let x = if x < -8.0 { -8.0 } else { x };
    let x = if x > 7.0 { 7.0 } else { x };
    let sum = x + CODE_8;
    (sum.to_bits() & 15, sum - CODE_8)
}

/// The nearest E2M1 float, ties to the even mantissa, and its code; what is below `below` is negative.
#[inline(always)]
fn nearest_e2m1(x: f32, below: f32) -> (u32, f32) {
    /// Steps that are added for the power of 1, so that the lowest bits have the code: 2 * (127 + 22) and this are 512. An
    /// even number leaves ties as they are.
    const ORIGIN: u32 = 214;
    let magnitude = x.abs();
    let clamped = if magnitude < 6.0 { magnitude } else { 6.0 };
    // The power of two below the number, or 1. An ulp of 2^22 times that is the step between values here.
    let power = larger(f32::from_bits(clamped.to_bits() & f32::INFINITY.to_bits()), 1.0);
    let steps = f32::from_bits(power.to_bits() + (22 << 23 | ORIGIN));
    let sum = clamped + steps;
    let value = sum - steps;
    // The code is the number of steps, in the sum's lowest bits, and two for each doubling of the power.
    let code = (sum.to_bits() + (sum.to_bits() >> 22)) & 7;
    let sign = if x < below { 8 } else { 0 };
    (code | sign, f32::from_bits(value.to_bits() | x.to_bits() & 0x8000_0000))
}

/// [`crate::kernel::Kernel::quantize_groups`], inlined into a function with an instruction set.
#[inline(always)]
pub(super) fn quantize<S: AddSquares>(groups: Groups<'_>) -> Result<(), NonFinite> {
    match groups.dtype {
        FloatDtype::Bfloat16 => by_coding::<Bfloat16, S>(groups),
        FloatDtype::Float16 => by_coding::<Float16, S>(groups),
        FloatDtype::Float32 => by_coding::<Float32, S>(groups),
    }
}

#[inline(always)]
fn by_coding<E: Element, S: AddSquares>(groups: Groups<'_>) -> Result<(), NonFinite> {
    let Coding { element, scale, group, .. } = groups.coding;
    match (element, scale, group % LANES, group) {
        (ElementCode::Int { zero_point: false }, ScaleCode::SourceFloat, 0, _) => rows::<E, Integer, S, LANES>(groups),
        (ElementCode::Int { zero_point: true }, ScaleCode::SourceFloat, 0, _) => {
            rows::<E, AsymmetricInteger, S, LANES>(groups)
        }
        (ElementCode::E2m1, ScaleCode::E8m0(_), 0, _) => rows::<E, RoundedFloat, S, LANES>(groups),
        (ElementCode::E2m1, ScaleCode::E4m3, _, 16) => rows::<E, Float, S, 16>(groups),
        _ => scalar::quantize(groups),
    }
}

/// [`Kernel::absmax`](crate::kernel::Kernel::absmax).
pub(super) fn absmax(source: &[u8], dtype: FloatDtype) -> Result<f32, NonFinite> {
    let whole = source.len() / (LANES * dtype.size()) * LANES * dtype.size();
    let (arrays, rest) = source.split_at(whole);
    let largest = match dtype {
        FloatDtype::Bfloat16 => largest::<Bfloat16, LANES>(arrays, Of::Either),
        FloatDtype::Float16 => largest::<Float16, LANES>(arrays, Of::Either),
        FloatDtype::Float32 => largest::<Float32, LANES>(arrays, Of::Either),
    };
    let rest = scalar::absmax(rest, dtype)?;
    if largest.is_finite() { Ok(larger(largest, rest)) } else { Err(NonFinite) }
}

/// Groups of whole arrays of `N`: rows then follow each other without padding, and so do groups.
#[inline(always)]
fn rows<E: Element, C: Code, S: AddSquares, const N: usize>(groups: Groups<'_>) -> Result<(), NonFinite> {
    let Groups { source, coding, packed, scales, zero_points, figures, .. } = groups;
    let group = coding.group;
    let BlockErrors { absmax, signal, noise, worst } = figures;
    let scale_size = coding.scale_size(E::DTYPE);
    let each = source.chunks_exact(group * E::SIZE).zip(packed.chunks_exact_mut(group / 2));
    for (i, ((source, packed), scale)) in each.zip(scales.chunks_exact_mut(scale_size)).enumerate() {
        let extent = extent::<E, C, N>(source).ok_or(NonFinite)?;
        let chosen = Chosen::new(extent, E::DTYPE, C::known(coding), E::round);
        chosen.stored.write(E::DTYPE, scale);
        if C::SIGNED {
            zero_points[i] = (chosen.zero_point + 8.0) as u8;
        }
        absmax[i] = chosen.scale;
        (signal[i], noise[i], worst[i]) = match chosen.scale {
            0.0 => over_zero::<E>(source, &chosen, coding, packed),
            _ => codes::<E, C, S, N>(source, &chosen, packed),
        };
    }
    Ok(())
}

/// [`codes`] where elements are infinite or NaN over their scale.
#[cold]
fn over_zero<E: Element>(source: &[u8], chosen: &Chosen, coding: Coding, packed: &mut [u8]) -> (f32, f32, f32) {
    let elements: Vec<f32> = source.chunks_exact(E::SIZE).map(E::decode).collect();
    packed.fill(0);
    chosen.codes(&elements, E::DTYPE, coding, 0, packed)
}

/// What scales are chosen by; `None` with a NaN or an infinity.
#[inline(always)]
fn extent<E: Element, C: Code, const N: usize>(source: &[u8]) -> Option<Extent> {
    if !C::SIGNED {
        let absmax = largest::<E, N>(source, Of::Either);
        return absmax.is_finite().then_some(Extent { absmax, least: 0.0, greatest: 0.0 });
    }
    let (below, greatest) = (largest::<E, N>(source, Of::Negative), largest::<E, N>(source, Of::Positive));
    let extent = Extent { absmax: larger(below, greatest), least: -below, greatest };
    (below.is_finite() && greatest.is_finite()).then_some(extent)
}

/// Writes a group's codes; gives its signal, noise and worst.
#[inline(always)]
fn codes<E: Element, C: Code, S: AddSquares, const N: usize>(
    source: &[u8],
    chosen: &Chosen,
    packed: &mut [u8],
) -> (f32, f32, f32) {
    let (mut signal, mut noise, mut worst) = ([0f32; N], [0f32; N], [0f32; N]);
    let arrays = source.chunks_exact(N * E::SIZE).zip(packed.chunks_exact_mut(N / 2));
    for (i, (array, packed)) in arrays.enumerate() {
        let (mut codes, mut ratios, mut errors) = ([0u32; N], [0f32; N], [0f32; N]);
        for lane in 0..N {
            ratios[lane] = E::decode(&array[lane * E::SIZE..][..E::SIZE]) / chosen.scale;
            let value;
            (codes[lane], value) = C::quantize::<E>(ratios[lane], chosen.zero_point);
            errors[lane] = ratios[lane] - value;
            worst[lane] = larger(worst[lane], errors[lane].abs());
        }
        for (i, byte) in packed.iter_mut().enumerate() {
            *byte = (codes[2 * i] | codes[2 * i + 1] << 4) as u8;
        }
        if i == 0 {
            // To zeros, nothing has to be added.
            (signal, noise) = (ratios.map(|x| x * x), errors.map(|x| x * x));
        } else {
            S::add_squares(&mut signal, &ratios);
            S::add_squares(&mut noise, &errors);
        }
    }
    (tree_sum(signal), tree_sum(noise), fold(worst, larger))
}
