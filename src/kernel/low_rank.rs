//! Low-rank changes of a weight: the arithmetic of merging an adapter.
//!
//! A change is the product of two narrow matrices times a factor. Each of its elements is a sum of f64 products, from the first term to
//! the last; it is multiplied by the factor, added to the weight in f64, and rounded once to the weight's dtype: to nearest, ties to
//! even. No multiplication is fused with an addition. Every kernel runs the same operations in the same order, so that results are
//! bit-identical.

use super::decode::round;
use super::element::{Bfloat16, Element, Float16, Float32};
use super::{Isa, Kernel};
use crate::dtype::FloatDtype;

/// Rows that are worked on at once.
const ROWS: usize = 4;

/// Two narrow matrices and a factor.
pub(crate) struct LowRank<'a> {
    /// Row by row, `rank` elements each.
    pub left: &'a [f64],
    /// `rank` rows of as many elements as the product has columns.
    pub right: &'a [f64],
    /// Terms of each sum.
    pub rank: usize,
    /// What each sum is multiplied by.
    pub scaling: f64,
}

impl Kernel {
    /// Fills `into` with the scaled product, row by row.
    ///
    /// # Panics
    /// When a slice's length doesn't fit the others'.
    pub(crate) fn multiply(self, factors: &LowRank<'_>, into: &mut [f64]) {
        let LowRank { left, right, rank, .. } = *factors;
        assert!(rank > 0 && left.len().is_multiple_of(rank) && right.len().is_multiple_of(rank), "factors: whole rows");
        assert_eq!(into.len(), left.len() / rank * (right.len() / rank), "into: length");
        match self.0 {
            Isa::Scalar => multiply::<1, 1>(factors, into),
            Isa::Portable => multiply::<ROWS, 4>(factors, into),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::multiply_avx2(factors, into),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => x86::multiply_avx512(factors, into),
        }
    }

    /// Adds to each of the elements of `dtype` in `bytes` the change at its place. Returns whether all elements that were finite
    /// still are.
    ///
    /// # Panics
    /// When there are more or fewer changes than elements.
    pub(crate) fn add(self, dtype: FloatDtype, changes: &[f64], bytes: &mut [u8]) -> bool {
        assert_eq!(changes.len() * dtype.size(), bytes.len(), "changes: length");
        match self.0 {
            Isa::Scalar | Isa::Portable => add(dtype, changes, bytes),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::Avx512 => x86::add_avx2(dtype, changes, bytes),
        }
    }
}

/// Elements of one dtype as f64, which holds them exactly. Returns whether all are finite.
///
/// # Panics
/// When there are more or fewer elements than `into` has room for.
pub(crate) fn widen(dtype: FloatDtype, bytes: &[u8], into: &mut [f64]) -> bool {
    assert_eq!(bytes.len(), into.len() * dtype.size(), "bytes: length");
    match dtype {
        FloatDtype::Bfloat16 => widen_as::<Bfloat16>(bytes, into),
        FloatDtype::Float16 => widen_as::<Float16>(bytes, into),
        FloatDtype::Float32 => widen_as::<Float32>(bytes, into),
    }
}

/// The bytes of the number of `dtype` that is nearest to each of `numbers`, ties to even.
///
/// # Panics
/// When there are more or fewer numbers than elements in `into`.
pub(crate) fn narrow(dtype: FloatDtype, numbers: &[f64], into: &mut [u8]) {
    assert_eq!(into.len(), numbers.len() * dtype.size(), "into: length");
    for (element, number) in into.chunks_exact_mut(dtype.size()).zip(numbers) {
        match dtype {
            FloatDtype::Bfloat16 => element.copy_from_slice(&round::bfloat16(to_odd(*number))),
            FloatDtype::Float16 => element.copy_from_slice(&round::float16(to_odd(*number))),
            FloatDtype::Float32 => element.copy_from_slice(&round::float32(*number as f32)),
        }
    }
}

/// An f32 between whose neighbours a number is: itself if it is one, or the one beside it whose last bit is set. Rounding that to fewer
/// bits gives what rounding the number itself does: a tie stays one, and nothing else becomes one.
#[inline(always)]
fn to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    let (back, bits) = (f64::from(nearest), nearest.to_bits());
    // Towards zero first, where the nearest is further from it.
    let down = u32::from(back.abs() > x.abs());
    let inexact = u32::from(back != x && !x.is_nan());
    f32::from_bits((bits - down) | inexact)
}

/// [`Kernel::multiply`], `R` rows and `C` columns at a time.
#[inline(always)]
fn multiply<const R: usize, const C: usize>(factors: &LowRank<'_>, into: &mut [f64]) {
    let LowRank { left, right, rank, .. } = *factors;
    let columns = right.len() / rank;
    if columns == 0 {
        return;
    }
    let whole = left.len() / rank / R * R;
    let (blocks, rest) = into.split_at_mut(whole * columns);
    for (left, into) in left.chunks_exact(R * rank).zip(blocks.chunks_exact_mut(R * columns)) {
        rows::<R, C>(factors, left, into);
    }
    for (left, into) in left[whole * rank..].chunks_exact(rank).zip(rest.chunks_exact_mut(columns)) {
        rows::<1, C>(factors, left, into);
    }
}

/// `R` rows of the product.
#[inline(always)]
fn rows<const R: usize, const C: usize>(factors: &LowRank<'_>, left: &[f64], into: &mut [f64]) {
    let LowRank { right, rank, scaling, .. } = *factors;
    let columns = right.len() / rank;
    let whole = columns / C * C;
    for first in (0..whole).step_by(C) {
        let mut sums = [[0.0; C]; R];
        for (k, right) in right.chunks_exact(columns).enumerate() {
            let right: &[f64; C] = right[first..].first_chunk().expect("a whole block");
            for (sums, left) in sums.iter_mut().zip(left.chunks_exact(rank)) {
                let left = left[k];
                for (sum, right) in sums.iter_mut().zip(right) {
                    *sum += left * right;
                }
            }
        }
        for (sums, into) in sums.iter().zip(into.chunks_exact_mut(columns)) {
            for (into, sum) in into[first..].iter_mut().zip(sums) {
                *into = sum * scaling;
            }
        }
    }
    for column in whole..columns {
        for (left, into) in left.chunks_exact(rank).zip(into.chunks_exact_mut(columns)) {
            let terms = left.iter().zip(right.chunks_exact(columns));
            into[column] = terms.fold(0.0, |sum, (left, right)| sum + left * right[column]) * scaling;
        }
    }
}

#[inline(always)]
fn add(dtype: FloatDtype, changes: &[f64], bytes: &mut [u8]) -> bool {
    match dtype {
        FloatDtype::Bfloat16 => add_as::<Bfloat16, 2>(changes, bytes, |x| round::bfloat16(to_odd(x))),
        FloatDtype::Float16 => add_as::<Float16, 2>(changes, bytes, |x| round::float16(to_odd(x))),
        FloatDtype::Float32 => add_as::<Float32, 4>(changes, bytes, |x| round::float32(x as f32)),
    }
}

/// [`Kernel::add`] for one dtype, whose elements `round` makes.
#[inline(always)]
fn add_as<E: Element, const SIZE: usize>(changes: &[f64], bytes: &mut [u8], round: impl Fn(f64) -> [u8; SIZE]) -> bool {
    let mut overflows = false;
    let (elements, _) = bytes.as_chunks_mut::<SIZE>();
    for (element, change) in elements.iter_mut().zip(changes) {
        let weight = E::decode(element);
        *element = round(f64::from(weight) + change);
        overflows |= weight.is_finite() & !E::decode(element).is_finite();
    }
    !overflows
}

#[inline(always)]
fn widen_as<E: Element>(bytes: &[u8], into: &mut [f64]) -> bool {
    let mut finite = true;
    for (element, into) in bytes.chunks_exact(E::SIZE).zip(into) {
        let value = E::decode(element);
        finite &= value.is_finite();
        *into = f64::from(value);
    }
    finite
}

/// The same loops, compiled for more instructions. Neither has fused multiplications: compilers make none unasked.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{LowRank, ROWS};
    use crate::dtype::FloatDtype;
    use crate::kernel::block::x86::{avx2_available, avx512_available};

    pub(super) fn multiply_avx2(factors: &LowRank<'_>, into: &mut [f64]) {
        #[target_feature(enable = "avx2")]
        fn multiply(factors: &LowRank<'_>, into: &mut [f64]) {
            super::multiply::<ROWS, 8>(factors, into);
        }
        assert!(avx2_available());
        // SAFETY: the processor has the features, as just asserted.
        unsafe { multiply(factors, into) }
    }

    pub(super) fn multiply_avx512(factors: &LowRank<'_>, into: &mut [f64]) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
        fn multiply(factors: &LowRank<'_>, into: &mut [f64]) {
            super::multiply::<ROWS, 16>(factors, into);
        }
        assert!(avx512_available());
        // SAFETY: the processor has the features, as just asserted.
        unsafe { multiply(factors, into) }
    }

    pub(super) fn add_avx2(dtype: FloatDtype, changes: &[f64], bytes: &mut [u8]) -> bool {
        #[target_feature(enable = "avx2")]
        fn add(dtype: FloatDtype, changes: &[f64], bytes: &mut [u8]) -> bool {
            super::add(dtype, changes, bytes)
        }
        assert!(avx2_available());
        // SAFETY: the processor has the features, as just asserted.
        unsafe { add(dtype, changes, bytes) }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    fn random(count: usize, mut state: u64) -> Vec<f64> {
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 11) as f64 / (1u64 << 52) as f64 - 1.0) * f64::from(((state >> 5) % 7) as u32 + 1)
        };
        (0..count).map(|_| next()).collect()
    }

    /// Each element as its definition has it.
    fn plainly(factors: &LowRank<'_>) -> Vec<f64> {
        let (rank, columns) = (factors.rank, factors.right.len() / factors.rank);
        let mut product = Vec::new();
        for row in factors.left.chunks(rank) {
            for column in 0..columns {
                let mut sum = 0.0;
                for (k, left) in row.iter().enumerate() {
                    sum += left * factors.right[k * columns + column];
                }
                product.push(sum * factors.scaling);
            }
        }
        product
    }

    #[test]
    fn every_kernel_multiplies_to_the_same_bits() {
        for (rows, columns, rank) in [(1, 1, 1), (3, 5, 2), (4, 16, 8), (9, 37, 16), (5, 100, 3), (8, 15, 64)] {
            let (left, right) = (random(rows * rank, 1), random(rank * columns, 2));
            let factors = LowRank { left: &left, right: &right, rank, scaling: 0.3 };
            let expected = plainly(&factors);
            for kernel in Kernel::available() {
                let mut found = vec![f64::NAN; rows * columns];
                kernel.multiply(&factors, &mut found);
                let bits = |all: &[f64]| all.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&found), bits(&expected), "{kernel:?} {rows} {columns} {rank}");
            }
        }
    }

    /// A number's neighbours by exact comparison: what rounding once means.
    fn nearest(x: f64, decode: impl Fn(u16) -> f64) -> u16 {
        let magnitudes = 0..0x7f80u16;
        let (mut best, mut distance) = (0, f64::INFINITY);
        // Numbers of a sign lie in the order of their bits: only those around the place matter.
        let place = magnitudes.clone().collect::<Vec<_>>().partition_point(|&bits| decode(bits) < x.abs()) as u16;
        for bits in place.saturating_sub(1)..=place.min(0x7f7f) {
            let away = (decode(bits) - x.abs()).abs();
            if away < distance || (away == distance && bits % 2 == 0) {
                (best, distance) = (bits, away);
            }
        }
        best | if x.is_sign_negative() { 0x8000 } else { 0 }
    }

    #[test]
    fn what_would_round_otherwise_by_way_of_f32_is_rounded_once() {
        let value = |bits: u16| bf16::from_bits(bits).to_f64();
        for bits in [0x3f80u16, 0x3f81, 0x0001, 0x0000, 0x7f00, 0x4049, 0x0080] {
            let (low, high) = (value(bits), value(bits + 1));
            let tie = (low + high) / 2.0;
            for nudge in [0.0, 1.0, -1.0] {
                for sign in [1.0, -1.0] {
                    let x = sign * (tie + nudge * (high - low) * 2f64.powi(-40));
                    let mut found = [0; 2];
                    narrow(FloatDtype::Bfloat16, &[x], &mut found);
                    assert_eq!(u16::from_le_bytes(found), nearest(x, value), "{x:e}");
                }
            }
        }
        let mut found = [0; 2];
        let tie = f64::from(f16::from_bits(0x3c00).to_f32() + f16::from_bits(0x3c01).to_f32()) / 2.0;
        narrow(FloatDtype::Float16, &[tie + 2f64.powi(-45)], &mut found);
        assert_eq!(u16::from_le_bytes(found), 0x3c01);
        narrow(FloatDtype::Float16, &[tie], &mut found);
        assert_eq!(u16::from_le_bytes(found), 0x3c00);
        narrow(FloatDtype::Float16, &[65_519.99], &mut found);
        assert_eq!(u16::from_le_bytes(found), 0x7bff);
        narrow(FloatDtype::Float16, &[65_520.0], &mut found);
        assert_eq!(u16::from_le_bytes(found), 0x7c00);
    }

    #[test]
    fn every_number_of_a_dtype_stays_what_it_is_when_nothing_is_added() {
        for kernel in Kernel::available() {
            for dtype in [FloatDtype::Bfloat16, FloatDtype::Float16] {
                let finite = |bits: &u16| match dtype {
                    FloatDtype::Bfloat16 => bf16::from_bits(*bits).is_finite() && *bits != 0x8000,
                    _ => f16::from_bits(*bits).is_finite() && *bits != 0x8000,
                };
                let bytes: Vec<u8> = (0..=u16::MAX).filter(finite).flat_map(u16::to_le_bytes).collect();
                let mut found = bytes.clone();
                assert!(kernel.add(dtype, &vec![0.0; bytes.len() / 2], &mut found));
                assert!(found == bytes, "{kernel:?} {dtype:?}");
            }
        }
    }

    #[test]
    fn kernels_add_to_the_same_bits_and_tell_of_overflows() {
        let changes: Vec<f64> = random(1003, 3).iter().map(|x| x * 1e-3).collect();
        for dtype in [FloatDtype::Bfloat16, FloatDtype::Float16, FloatDtype::Float32] {
            let mut weights = vec![0; 1003 * dtype.size()];
            narrow(dtype, &random(1003, 4), &mut weights);
            let add = |kernel: Kernel| {
                let mut bytes = weights.clone();
                assert!(kernel.add(dtype, &changes, &mut bytes));
                bytes
            };
            let mut expected = vec![0.0; 1003];
            assert!(widen(dtype, &weights, &mut expected));
            expected.iter_mut().zip(&changes).for_each(|(weight, change)| *weight += change);
            let mut rounded = vec![0; weights.len()];
            narrow(dtype, &expected, &mut rounded);
            for kernel in Kernel::available() {
                assert!(add(kernel) == rounded, "{kernel:?} {dtype:?}");
                let mut largest = vec![0; dtype.size()];
                narrow(dtype, &[if dtype == FloatDtype::Float16 { 65_504.0 } else { 3e38 }], &mut largest);
                assert!(!kernel.add(dtype, &[3.4e38], &mut largest), "{kernel:?} {dtype:?}");
            }
        }
    }
}
