//! The sums of figures that come back from a GPU, against those of the statistics: every bit, on the CPU.

use std::sync::LazyLock;

use prequant::FloatDtype;
use prequant::internal::backend::cuda::PTX;
use prequant::internal::kernel::Kernel;
use prequant::internal::stats::GroupErrors;

use super::launch::Kernels;
use super::launch_groups::schemes;
use crate::support::{groups, weights::*};

static KERNELS: LazyLock<Kernels> = LazyLock::new(|| Kernels::parse(PTX));

fn assert_sums_equal(figures: &[Vec<f32>; 4]) {
    KERNELS.check_sums(figures.each_ref().map(Vec::as_slice)).unwrap_or_else(|wrong| panic!("{wrong}"));
}

fn floats(figures: [Vec<u32>; 4]) -> [Vec<f32>; 4] {
    figures.map(|figure| figure.into_iter().map(f32::from_bits).collect())
}

/// Figures that sums round at every step: of about the same size, with all of their bits.
pub fn random_figures(random: &mut Random, blocks: usize) -> [Vec<f32>; 4] {
    std::array::from_fn(|_| (0..blocks).map(|_| random.normal().abs() + 1e-3).collect())
}

#[test]
fn of_every_count_of_blocks() {
    let mut random = Random(20);
    for blocks in (1..=70).chain([127, 128, 129, 2047, 2048, 2049, 2063, 2064, 2065, 4111]) {
        assert_sums_equal(&random_figures(&mut random, blocks));
    }
}

#[test]
fn of_every_format_and_dtype() {
    let mut random = Random(21);
    let elements: Vec<f32> = (0..37 * 640).map(|_| random.normal() / (random.uniform().abs() + 1e-4)).collect();
    for dtype in DTYPES {
        let source = encode(dtype, &elements);
        for (size, codebook) in [32, 64, 512].into_iter().flat_map(|size| CODEBOOKS.map(|codebook| (size, codebook))) {
            // An odd tail: a last group of fewer than 16 blocks, and a short block.
            let source = &source[..source.len() - 5 * dtype.size()];
            assert_sums_equal(&floats(quantize(Kernel::SCALAR, source, dtype, size, codebook).unwrap().figures));
        }
        for scheme in schemes(&source, dtype) {
            let found = groups::quantize(Kernel::SCALAR, &source, dtype, 640, scheme.group, scheme).unwrap();
            assert_sums_equal(&floats(found.figures));
        }
    }
}

#[test]
fn of_scales_that_overflowed() {
    let wide = [f32::MAX, -f32::MAX, 1.0, 0.0];
    let mut random = Random(22);
    let elements: Vec<f32> = (0..33 * 640).map(|_| wide[random.bits() as usize % 4]).collect();
    for dtype in [FloatDtype::Bfloat16, FloatDtype::Float16] {
        let source = encode(dtype, &elements);
        let scheme = schemes(&source, dtype)[1];
        let found = groups::quantize(Kernel::SCALAR, &source, dtype, 640, 32, scheme).unwrap();
        let figures = floats(found.figures);
        assert!(figures[0].iter().any(|scale| scale.is_infinite()), "{dtype:?}");
        assert_sums_equal(&figures);
    }
}

#[test]
fn of_extreme_figures() {
    let mut random = Random(23);
    let tiny = f32::from_bits(1);
    for from in [
        &[0.0, -0.0, 1.0][..],
        &[tiny, 2.0 * tiny, 1e-39, 0.0],
        &[f32::MAX, 1e30, 1e-30],
        &[f32::INFINITY, 1.0, 0.5],
        &[f32::NAN, 1.0],
        &[1.0, 1.0 + f32::EPSILON, 16_777_216.0],
    ] {
        let figure = |_| (0..333).map(|_| from[random.bits() as usize % from.len()]).collect();
        assert_sums_equal(&[0, 1, 2, 3].map(figure));
    }
}

#[test]
fn a_nan_or_an_infinity_at_each_place() {
    let mut random = Random(24);
    let figures = random_figures(&mut random, 45);
    for at in 0..45 {
        for odd in [f32::NAN, -f32::NAN, f32::INFINITY] {
            let mut figures = figures.clone();
            figures[0][at] = odd;
            let found = KERNELS.sum_figures(figures.each_ref().map(Vec::as_slice)).unwrap();
            let marked: Vec<bool> = found.iter().map(Option::<GroupErrors>::is_none).collect();
            assert_eq!(marked, [0, 1, 2].map(|group| odd.is_nan() && group == at / 16), "{odd} at {at}");
            assert_sums_equal(&figures);
        }
    }
}
