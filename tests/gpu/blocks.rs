//! The GPU's kernels, as they are committed, against the specification: every byte, on the CPU.

use std::sync::LazyLock;
use std::time::Instant;

use half::{bf16, f16};
use prequant::FloatDtype;
use prequant::internal::backend::cuda::{PTX, THREADS};
use prequant::internal::format::nf4::CODEBOOK as NF4;
use prequant::internal::format::{Codebook, dynamic_map};

use super::launch::{Kernels, kernel_name};
use crate::support::weights::*;

static KERNELS: LazyLock<Kernels> = LazyLock::new(|| Kernels::parse(PTX));

fn assert_equal(source: &[u8], dtype: FloatDtype, size: u32, codebook: &'static Codebook) {
    KERNELS.check(source, dtype, size, codebook).unwrap_or_else(|wrong| panic!("{wrong}"));
}

/// For elements given as f32, in every dtype and both codebooks.
fn assert_equal_for(elements: &[f32], size: u32) {
    for dtype in DTYPES {
        let source = encode(dtype, elements);
        for codebook in CODEBOOKS {
            assert_equal(&source, dtype, size, codebook);
        }
    }
}

fn assert_absmax_equal(absmax: &[f32], offset: f32) {
    KERNELS.check_absmax(absmax, offset).unwrap_or_else(|wrong| panic!("{wrong}"));
}

#[test]
fn the_module_has_the_kernels_that_the_library_launches() {
    let sizes = |name: &str| -> Vec<usize> { KERNELS.0.entry(name).unwrap().params.iter().map(|p| p.size).collect() };
    for (dtype, codebook) in DTYPES.into_iter().flat_map(|dtype| CODEBOOKS.map(|codebook| (dtype, codebook))) {
        let name = kernel_name(dtype, codebook);
        assert_eq!(sizes(&name), [8, 4, 4, 8, 8, 8, 8, 8, 8], "{name}");
        assert_eq!(KERNELS.0.entry(&name).unwrap().max_threads, THREADS, "{name}");
    }
    assert_eq!(sizes("quantize_absmax"), [8, 4, 4, 8, 8, 8]);
    assert_eq!(sizes("sum_figures"), [8, 8, 8, 8, 4, 8, 8]);
    assert_eq!(KERNELS.0.entry("sum_figures").unwrap().max_threads, THREADS);
    assert_eq!(KERNELS.0.entries().count(), 8);
}

#[test]
fn random_heavy_tailed_and_arbitrary_weights() {
    let mut random = Random(1);
    for size in BLOCK_SIZES {
        // Into the second thread block; a short block at the end.
        let n = 33 * size as usize + (77 % size) as usize;
        let weights: Vec<f32> = (0..n).map(|_| random.normal() * 0.02).collect();
        let heavy: Vec<f32> = (0..n).map(|_| random.normal() / (random.uniform().abs() + 1e-4)).collect();
        let any: Vec<f32> = (0..n).map(|_| random.any()).collect();
        for elements in [weights, heavy, any] {
            assert_equal_for(&elements, size);
        }
    }
}

#[test]
fn adversarial_blocks() {
    let tiny = f32::from_bits(1);
    let edges = [0.0, -0.0, tiny, -tiny, 1e-38, -1e-38, 1.1e-38, 1e-40, f32::MIN_POSITIVE, 6e-8, -6e-5, 1.0, -1.0];
    let huge = [f32::MAX, -f32::MAX, 3.3e38, 65504.0, -65504.0, f32::MIN_POSITIVE, 0.0];
    let mut random = Random(2);
    let mut pick = |from: &[f32], n: usize| (0..n).map(|_| from[random.bits() as usize % from.len()]).collect();
    for size in BLOCK_SIZES {
        let n = 5 * size as usize + size as usize / 2 + 3;
        let (zeros, negative_zeros) = (vec![0.0; n], vec![-0.0; n]);
        let (subnormals, equal): (Vec<f32>, Vec<f32>) = (pick(&[tiny, -tiny, 1e-39, 0.0], n), pick(&[0.3, -0.3], n));
        let equal_tiny = pick(&[tiny, -tiny], n);
        for elements in [zeros, negative_zeros, subnormals, equal, equal_tiny, pick(&edges, n), pick(&huge, n)] {
            assert_equal_for(&elements, size);
        }
    }
}

#[test]
fn a_single_nonzero_at_each_position() {
    for size in [32, 64, 128, 4096] {
        for x in [1.0, -3e-5, f32::from_bits(1)] {
            for positions in (0..size).step_by(if size == 4096 { 123 } else { 1 }).collect::<Vec<_>>().chunks(37) {
                let block = |&at: &u32| (0..size).map(move |i| if i == at { x } else { 0.0 });
                assert_equal_for(&positions.iter().flat_map(block).collect::<Vec<f32>>(), size);
            }
            // In a short block too.
            for at in (0..size - 1).step_by(if size == 4096 { 1001 } else { 5 }) {
                let elements: Vec<f32> = (0..size - 1).map(|i| if i == at { x } else { 0.0 }).collect();
                assert_equal_for(&elements, size);
            }
        }
    }
}

#[test]
fn every_rounding_of_every_lane() {
    let mut random = Random(12);
    for (size, lane) in [256, 512, 2048].into_iter().flat_map(|size| (0..32).map(move |lane| (size, lane))) {
        // The other lanes' sums are zero and hide nothing; a whole block and a short one.
        let n = 2 * size as usize - 3;
        let elements: Vec<f32> = (0..n).map(|i| if i % 32 == lane { random.normal() } else { 0.0 }).collect();
        assert_equal_for(&elements, size);
    }
}

#[test]
fn at_every_threshold_and_beside_it() {
    let mut random = Random(3);
    let mut scales = vec![1.0, 2.0, 0.75, 1e-38, 1.5e-38, f32::MAX, 1.999_999_9, 0.019];
    scales.extend((0..100).map(|_| random.any().abs()));
    for (codebook, &absmax) in CODEBOOKS.into_iter().flat_map(|book| scales.iter().map(move |scale| (book, scale))) {
        let exact = around_thresholds(codebook, absmax, next_f32s);
        let coarse = around_thresholds(codebook, bf16::from_f32(absmax.min(3e38)).to_f32(), next_bf16s);
        for size in [32, 64, 256] {
            let exact = with_absmax(&encode(FloatDtype::Float32, &exact), absmax, size, FloatDtype::Float32);
            // The last block, made short, is divided instead of multiplied.
            for source in [&exact[..], &exact[..exact.len() - 4]] {
                assert_equal(source, FloatDtype::Float32, size, codebook);
            }
            for dtype in DTYPES {
                let absmax = coarse.iter().fold(0.0, |a: f32, x| a.max(x.abs())).min(largest(dtype));
                let source = with_absmax(&encode(dtype, &coarse), absmax, size, dtype);
                for source in [&source[..], &source[..source.len() - dtype.size()]] {
                    assert_equal(source, dtype, size, codebook);
                }
            }
        }
        // All of it in one short block.
        assert_equal(&encode(FloatDtype::Float32, &exact), FloatDtype::Float32, 256, codebook);
    }
}

#[test]
fn every_16_bit_pattern() {
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
                    assert_equal(&source, dtype, size, codebook);
                }
            }
        }
        // In order, and each block's largest is its own.
        let source: Vec<u8> = finite().flat_map(u16::to_le_bytes).collect();
        for codebook in CODEBOOKS {
            assert_equal(&source, dtype, 64, codebook);
            // In short blocks: each launch is one.
            for block in source.chunks(2 * 4095) {
                assert_equal(block, dtype, 4096, codebook);
            }
        }
    }
}

#[test]
fn up_to_200_elements() {
    let mut random = Random(4);
    let elements: Vec<f32> = (0..200).map(|_| random.normal()).collect();
    for (n, size) in (1..=200).flat_map(|n| [32, 64].map(|size| (n, size))) {
        assert_equal_for(&elements[..n], size);
    }
}

#[test]
fn last_blocks_of_every_residue() {
    let mut random = Random(5);
    let elements: Vec<f32> = (0..2 * 4096).map(|_| random.normal()).collect();
    for size in BLOCK_SIZES {
        for residue in 0..32 {
            // No, some and all but one of the short block's rows are full.
            for rows in [0, size as usize / 64, size as usize / 32 - 1] {
                assert_equal_for(&elements[..size as usize + 32 * rows + residue], size);
            }
        }
    }
}

#[test]
fn thread_blocks_that_are_just_full() {
    let mut random = Random(6);
    let elements: Vec<f32> = (0..65 * 256 + 1).map(|_| random.normal()).collect();
    for size in [32, 64, 256] {
        for blocks in [1, 7, 8, 9, 31, 32, 33, 63, 64, 65] {
            for n in [blocks * size - 1, blocks * size, blocks * size + 1] {
                assert_equal_for(&elements[..n], size as u32);
            }
        }
    }
}

/// Every element in turn is replaced by `replacement`.
fn assert_non_finite_shows(source: &[u8], replacement: &[u8], dtype: FloatDtype, size: u32) {
    for at in (0..source.len()).step_by(dtype.size()) {
        let mut source = source.to_vec();
        source[at..][..dtype.size()].copy_from_slice(replacement);
        for codebook in CODEBOOKS {
            let checked = KERNELS.check_non_finite(&source, dtype, size, codebook);
            checked.unwrap_or_else(|wrong| panic!("{dtype:?} {replacement:x?} at byte {at}: {wrong}"));
        }
    }
}

#[test]
fn a_nan_or_an_infinity_anywhere_shows_in_its_blocks_absmax() {
    let mut random = Random(7);
    for dtype in DTYPES {
        for (size, n) in [(32, 70), (64, 64), (64, 63), (128, 128 + 39), (64, 5)] {
            let source = encode(dtype, &(0..n).map(|_| random.normal() * 0.02).collect::<Vec<_>>());
            for x in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                assert_non_finite_shows(&source, &encode_one(dtype, x), dtype, size);
            }
        }
    }
}

#[test]
fn nans_with_any_payload_show() {
    let nans = |nans: [u16; 4]| nans.map(|bits| bits.to_le_bytes().to_vec()).to_vec();
    let f32_nans = [0x7f80_0001u32, 0xff80_0001, 0x7fff_ffff, 0xffff_ffff].map(|bits| bits.to_le_bytes().to_vec());
    for (dtype, nans) in [
        (FloatDtype::Bfloat16, nans([0x7f81, 0xff81, 0x7fff, 0xffff])),
        (FloatDtype::Float16, nans([0x7c01, 0xfc01, 0x7fff, 0xffff])),
        (FloatDtype::Float32, f32_nans.to_vec()),
    ] {
        for nan in nans {
            assert_non_finite_shows(&encode(dtype, &[1.0; 37]), &nan, dtype, 32);
        }
    }
}

#[test]
fn many_nans_and_infinities() {
    let mut random = Random(8);
    for (size, dtype) in [32, 64, 256].into_iter().flat_map(|size| DTYPES.map(|dtype| (size, dtype))) {
        // Any bits: with 16 bits NaN are frequent, so only some of the blocks are drawn so.
        let block = |i: usize, random: &mut Random| -> Vec<u8> {
            let bytes = (0..size as usize * dtype.size()).map(|_| random.bits() as u8).collect();
            if i.is_multiple_of(3) { bytes } else { encode(dtype, &vec![random.normal(); size as usize]) }
        };
        let source: Vec<u8> = (0..70).flat_map(|i| block(i, &mut random)).collect();
        for end in [source.len(), source.len() - dtype.size(), 64 * size as usize * dtype.size() - 4] {
            for codebook in CODEBOOKS {
                KERNELS
                    .check_non_finite(&source[..end], dtype, size, codebook)
                    .unwrap_or_else(|wrong| panic!("{wrong}"));
            }
        }
    }
}

#[test]
fn absmax_of_every_count() {
    let mut random = Random(9);
    let absmax: Vec<f32> = (0..1030).map(|_| random.normal().abs() * 0.1).collect();
    let mean = absmax.iter().sum::<f32>() / absmax.len() as f32;
    for n in (1..=300).chain(500..=520).chain(1020..=1030) {
        assert_absmax_equal(&absmax[..n], mean);
    }
}

#[test]
fn adversarial_absmax() {
    let mut random = Random(10);
    let any: Vec<f32> = (0..5000).map(|_| random.any()).collect();
    let tiny: Vec<f32> = (0..700).map(|_| f32::from_bits(random.bits() % 5000)).collect();
    let subnormal: Vec<f32> = (0..700).map(|_| f32::from_bits(random.bits() % 0x0090_0000)).collect();
    let equal = vec![0.25; 300];
    let zeros = [vec![0.0; 150], vec![-0.0; 150]].concat();
    let huge: Vec<f32> = (0..600).map(|i| if i % 7 == 0 { f32::MAX } else { 1e38 * (i % 3) as f32 }).collect();
    for absmax in [any, tiny, subnormal, equal, zeros, huge] {
        for offset in [0.0, 0.25, 1e-40, 1e-3] {
            assert_absmax_equal(&absmax, offset);
        }
    }
}

#[test]
fn a_single_absmax_at_each_position() {
    for at in 0..300 {
        for x in [1.0, -2.5, f32::from_bits(1)] {
            let absmax: Vec<f32> = (0..300).map(|i| if i == at { x } else { 0.0 }).collect();
            assert_absmax_equal(&absmax, 0.0);
        }
    }
}

#[test]
fn absmax_at_every_midpoint_and_beside_it() {
    let points = || dynamic_map().midpoints().iter().chain(dynamic_map().values()).copied();
    for scale in [1.0, 3.7, 0.019, 1e30, 1e-30, 1.999_999_9] {
        let around = points().flat_map(|point| next_f32s(point * scale)).map(|x| x.clamp(-scale, scale));
        let around: Vec<f32> = around.collect();
        // A block's largest is its first.
        let absmax: Vec<f32> = around.chunks(255).flat_map(|block| [&[scale], block].concat()).collect();
        assert_absmax_equal(&absmax, 0.0);
    }
}

#[test]
fn how_fast_the_interpreter_is() {
    let mut random = Random(11);
    let source = encode(FloatDtype::Bfloat16, &(0..1 << 20).map(|_| random.normal()).collect::<Vec<_>>());
    let start = Instant::now();
    KERNELS.quantize(&source, FloatDtype::Bfloat16, 64, &NF4).unwrap();
    let rate = (1 << 20) as f64 / start.elapsed().as_secs_f64();
    println!("{:.1} million elements a second", rate / 1e6);
}
