//! Every kernel against the specification, `Kernel::SCALAR`: the same bytes, and figures the same to the bit.

use half::{bf16, f16};
use prequant::FloatDtype;
use prequant::internal::format::Codebook;
use prequant::internal::format::nf4::CODEBOOK as NF4;
use prequant::internal::kernel::{Kernel, NonFinite};
use proptest::prelude::*;

use crate::support::weights::*;

/// Asserts that every kernel does with `source` what the specification does.
fn assert_all_equal(source: &[u8], dtype: FloatDtype, size: u32, codebook: &'static Codebook) {
    let expected = quantize(Kernel::SCALAR, source, dtype, size, codebook);
    for kernel in Kernel::available() {
        let found = quantize(kernel, source, dtype, size, codebook);
        if found != expected {
            report(kernel, source, dtype, size, expected.as_ref(), found.as_ref());
        }
    }
}

/// Fails with the first difference, as outputs are too long to print.
fn report(
    kernel: Kernel,
    source: &[u8],
    dtype: FloatDtype,
    size: u32,
    expected: Result<&Output, &NonFinite>,
    found: Result<&Output, &NonFinite>,
) -> ! {
    let case = format!("{} {dtype:?}, block size {size}, {} bytes", kernel.name(), source.len());
    let (Ok(expected), Ok(found)) = (expected, found) else {
        panic!("{case}: finite for the specification: {}, for the kernel: {}", expected.is_ok(), found.is_ok());
    };
    panic!("{case}: {}", found.difference(expected).unwrap_or_default());
}

/// [`assert_all_equal`] for elements given as f32, in every dtype and both codebooks.
fn assert_all_equal_for(elements: &[f32], size: u32) {
    for dtype in DTYPES {
        let source = encode(dtype, elements);
        for codebook in CODEBOOKS {
            assert_all_equal(&source, dtype, size, codebook);
        }
    }
}

#[test]
fn kernels_equal_the_specification_on_random_and_heavy_tailed_weights() {
    let mut random = Random(1);
    for size in BLOCK_SIZES {
        let n = 40 * size as usize + 77;
        let weights: Vec<f32> = (0..n).map(|_| random.normal() * 0.02).collect();
        let heavy: Vec<f32> = (0..n).map(|_| random.normal() / (random.uniform().abs() + 1e-4)).collect();
        let any: Vec<f32> = (0..n).map(|_| random.any()).collect();
        for elements in [weights, heavy, any] {
            assert_all_equal_for(&elements, size);
        }
    }
}

#[test]
fn kernels_equal_the_specification_on_adversarial_blocks() {
    let tiny = f32::from_bits(1);
    let edges = [0.0, -0.0, tiny, -tiny, 1e-38, -1e-38, 1.1e-38, 1e-40, f32::MIN_POSITIVE, 6e-8, -6e-5, 1.0, -1.0];
    let huge = [f32::MAX, -f32::MAX, 3.3e38, 65504.0, -65504.0, f32::MIN_POSITIVE, 0.0];
    let mut random = Random(2);
    let mut pick = |from: &[f32], n: usize| (0..n).map(|_| from[random.bits() as usize % from.len()]).collect();
    for size in BLOCK_SIZES {
        let n = 17 * size as usize;
        let (zeros, negative_zeros) = (vec![0.0; n], vec![-0.0; n]);
        let (subnormals, equal): (Vec<f32>, Vec<f32>) = (pick(&[tiny, -tiny, 1e-39, 0.0], n), pick(&[0.3, -0.3], n));
        let equal_tiny = pick(&[tiny, -tiny], n);
        for elements in [zeros, negative_zeros, subnormals, equal, equal_tiny, pick(&edges, n), pick(&huge, n)] {
            assert_all_equal_for(&elements, size);
        }
    }
}

#[test]
fn kernels_equal_the_specification_on_a_single_nonzero_at_each_position() {
    for size in [32, 64, 128, 4096] {
        for x in [1.0, -3e-5, f32::from_bits(1)] {
            // One block a position, in runs that fill groups of blocks and runs that don't.
            for positions in (0..size).step_by(if size == 4096 { 41 } else { 1 }).collect::<Vec<_>>().chunks(21) {
                let block = |&at: &u32| (0..size).map(move |i| if i == at { x } else { 0.0 });
                assert_all_equal_for(&positions.iter().flat_map(block).collect::<Vec<f32>>(), size);
            }
        }
    }
}

#[test]
fn kernels_equal_the_specification_at_every_threshold_and_beside_it() {
    let mut random = Random(3);
    let mut scales = vec![1.0, 2.0, 0.75, 1e-38, 1.5e-38, f32::MAX, 1.999_999_9, 0.019];
    scales.extend((0..200).map(|_| random.any().abs()));
    for codebook in CODEBOOKS {
        for &absmax in &scales {
            let exact = encode(FloatDtype::Float32, &around_thresholds(codebook, absmax, next_f32s));
            let coarse = around_thresholds(codebook, bf16::from_f32(absmax.min(3e38)).to_f32(), next_bf16s);
            for size in [32, 64, 256] {
                let source = with_absmax(&exact, absmax, size, FloatDtype::Float32);
                assert_all_equal(&source, FloatDtype::Float32, size, codebook);
                for dtype in DTYPES {
                    let absmax = coarse.iter().fold(0.0, |a: f32, x| a.max(x.abs())).min(largest(dtype));
                    let source = with_absmax(&encode(dtype, &coarse), absmax, size, dtype);
                    assert_all_equal(&source, dtype, size, codebook);
                }
            }
        }
    }
}

#[test]
fn kernels_equal_the_specification_for_every_16_bit_pattern() {
    for dtype in [FloatDtype::Bfloat16, FloatDtype::Float16] {
        let infinity = if dtype == FloatDtype::Bfloat16 { bf16::INFINITY.to_bits() } else { f16::INFINITY.to_bits() };
        let finite = || (0..=u16::MAX).filter(|bits| bits & 0x7fff < infinity);
        for absmax in [infinity - 1, infinity / 2, infinity / 2 + 37, 0x0080, 0x0081, 1] {
            for size in [32, 64] {
                let below: Vec<u16> = finite().filter(|bits| bits & 0x7fff <= absmax).collect();
                let with_absmax = |block: &[u16]| [&[absmax], block].concat();
                let elements = below.chunks(size as usize - 1).flat_map(with_absmax);
                let source: Vec<u8> = elements.flat_map(u16::to_le_bytes).collect();
                for codebook in CODEBOOKS {
                    assert_all_equal(&source, dtype, size, codebook);
                }
            }
        }
        // In order, and each block's largest is its own.
        let source: Vec<u8> = finite().flat_map(u16::to_le_bytes).collect();
        for codebook in CODEBOOKS {
            assert_all_equal(&source, dtype, 64, codebook);
        }
    }
}

#[test]
fn kernels_equal_the_specification_for_tails_of_every_length() {
    let mut random = Random(4);
    let elements: Vec<f32> = (0..64 * 20).map(|_| random.normal()).collect();
    for size in [32, 64, 128, 4096] {
        for n in (1..=64).chain([65, 127, 129]).chain(64 * 17..64 * 18) {
            assert_all_equal_for(&elements[..n], size);
        }
    }
}

#[test]
fn kernels_take_unaligned_sources() {
    let mut random = Random(5);
    let elements: Vec<f32> = (0..64 * 19 + 5).map(|_| random.normal()).collect();
    for dtype in DTYPES {
        let source = encode(dtype, &elements);
        let expected = quantize(Kernel::SCALAR, &source, dtype, 64, &NF4);
        for offset in 0..64 {
            let moved = [&vec![0xff; offset], &source[..]].concat();
            for kernel in Kernel::available() {
                assert_eq!(quantize(kernel, &moved[offset..], dtype, 64, &NF4), expected, "{}", kernel.name());
            }
        }
    }
}

#[test]
fn kernels_find_a_nan_or_an_infinity_anywhere() {
    let mut random = Random(6);
    for dtype in DTYPES {
        for (size, blocks) in [(32, 18), (64, 1), (64, 17), (256, 3)] {
            let n = blocks * size as usize + 13;
            let source = encode(dtype, &(0..n).map(|_| random.normal()).collect::<Vec<_>>());
            for x in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for (at, kernel) in
                    (0..n).flat_map(|at| Kernel::available().into_iter().map(move |kernel| (at, kernel)))
                {
                    let mut source = source.clone();
                    source[at * dtype.size()..][..dtype.size()].copy_from_slice(&encode_one(dtype, x));
                    let found = quantize(kernel, &source, dtype, size, &NF4);
                    assert_eq!(found, Err(NonFinite), "{} {dtype:?} {x} at {at} of {n}", kernel.name());
                }
            }
        }
    }
}

#[test]
fn kernels_find_nans_with_any_payload() {
    for (dtype, nans) in [
        (FloatDtype::Bfloat16, [0x7f81, 0xff81, 0x7fff, 0xffff].map(u16::to_le_bytes)),
        (FloatDtype::Float16, [0x7c01, 0xfc01, 0x7fff, 0xffff].map(u16::to_le_bytes)),
    ] {
        for nan in nans {
            let source = [&encode(dtype, &[1.0; 63])[..], &nan].concat();
            for kernel in Kernel::available() {
                assert_eq!(quantize(kernel, &source, dtype, 64, &NF4), Err(NonFinite), "{}", kernel.name());
            }
        }
    }
}

fn dtypes() -> impl Strategy<Value = FloatDtype> {
    prop::sample::select(DTYPES.to_vec())
}

fn codebooks() -> impl Strategy<Value = &'static Codebook> {
    prop::sample::select(CODEBOOKS.to_vec())
}

fn block_sizes() -> impl Strategy<Value = u32> {
    prop::sample::select(BLOCK_SIZES.to_vec())
}

proptest! {
    #[test]
    fn kernels_equal_the_specification_for_any_bytes(
        bytes in prop::collection::vec(any::<u8>(), 0..6000),
        dtype in dtypes(),
        codebook in codebooks(),
        size in block_sizes(),
    ) {
        assert_all_equal(&bytes[..bytes.len() / dtype.size() * dtype.size()], dtype, size, codebook);
    }

    #[test]
    fn kernels_equal_the_specification_for_any_shape(
        seed in 1u64..,
        n in 0usize..20_000,
        dtype in dtypes(),
        codebook in codebooks(),
        size in block_sizes(),
    ) {
        let mut random = Random(seed);
        let elements: Vec<f32> = (0..n).map(|_| random.normal() / (random.uniform().abs() + 1e-3)).collect();
        assert_all_equal(&encode(dtype, &elements), dtype, size, codebook);
    }

    #[test]
    fn a_run_split_between_any_blocks_gives_the_same_output(
        seed in 1u64..,
        n in 1usize..20_000,
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..5),
        dtype in dtypes(),
        codebook in codebooks(),
        size in block_sizes(),
    ) {
        let mut random = Random(seed);
        let source = encode(dtype, &(0..n).map(|_| random.normal()).collect::<Vec<_>>());
        let bytes = size as usize * dtype.size();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(n.div_ceil(size as usize)) * bytes).collect();
        cuts.extend([0, source.len()]);
        cuts.sort();
        for kernel in Kernel::available() {
            let whole = quantize(kernel, &source, dtype, size, codebook).unwrap();
            let mut parts = Output { packed: vec![], figures: Default::default() };
            for cut in cuts.windows(2) {
                parts.extend(quantize(kernel, &source[cut[0]..cut[1]], dtype, size, codebook).unwrap());
            }
            prop_assert!(parts == whole, "{}", kernel.name());
        }
    }
}

/// Midpoints taken another way, as other backends may: an ulp beside ours in four places.
const OTHER_NF4_THRESHOLDS: [u32; 15] = [
    0xbf591cd9, 0xbf1c5270, 0xbeeb8480, 0xbeadea76, 0xbe703cec, 0xbe0d38bc, 0xbd3a7871, 0x3d22faff, 0x3df64863,
    0x3e5067e0, 0x3e9582d4, 0x3ec753f9, 0x3f006d03, 0x3f248daf, 0x3f5c89d9,
];

/// Backends scale by the reciprocal, by an approximate reciprocal, or divide; for bf16 none of it can change an NF4
/// code, as no quotient of two 8-bit significands falls within such an error of a threshold.
///
/// Only the distance between two numbers' exponents matters, so this is every pair, as long as the reciprocal is a
/// normal number (absmax from 2^-126 to 2^126). Below 2^-13 all elements are far within the code of zero.
#[test]
fn nf4_codes_equal_whatever_the_reciprocal_for_every_bf16_pair() {
    let tables = [NF4.thresholds(), OTHER_NF4_THRESHOLDS.map(f32::from_bits)];
    let rank = |thresholds: &[f32; 15], t: f32| thresholds.iter().filter(|&&threshold| t > threshold).count();
    let mantissas = || (0..128).map(|mantissa| f32::from_bits(0x3f80_0000 | mantissa << 16));
    for (absmax, x) in mantissas().flat_map(|absmax| mantissas().map(move |x| (absmax, x))) {
        let reciprocal = 1.0 / absmax;
        for x in (0..=13).map(|distance| x / f32::from(1u16 << distance)).filter(|&x| x <= absmax) {
            for x in [x, -x] {
                let scaled = [reciprocal, reciprocal.next_up(), reciprocal.next_down()].map(|inverse| x * inverse);
                let expected = rank(&tables[0], scaled[0]);
                for t in scaled.into_iter().chain([x / absmax]) {
                    for thresholds in &tables {
                        assert_eq!(rank(thresholds, t), expected, "{x:e} in a block of absmax {absmax:e}");
                    }
                }
            }
        }
    }
}
