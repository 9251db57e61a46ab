//! The GPU's kernels for groups, as they are committed, against the specification: every byte, on the CPU.

use std::sync::LazyLock;

use half::{bf16, f16};
use prequant::FloatDtype;
use prequant::internal::backend::cuda::{GROUPS_PTX, GroupKernel, THREADS, largest_name};
use prequant::internal::format::{Coding, ElementCode};

use super::launch::Kernels;
use super::launch_groups::{Rows, schemes};
use crate::support::{codings, groups, weights::*};

static KERNELS: LazyLock<Kernels> = LazyLock::new(|| Kernels::parse(GROUPS_PTX));

/// Divisible by every group size, and so long that a row of it is a warp's.
const COLUMNS: usize = 640;

fn assert_equal(rows: Rows<'_>) {
    KERNELS.check_groups(rows).unwrap_or_else(|wrong| panic!("{wrong}"));
}

/// The group sizes that a scheme is used with, in rows of `columns`.
fn sizes(scheme: Coding, columns: usize) -> Vec<usize> {
    match scheme.element {
        ElementCode::Int { .. } => vec![32, 64, 128, columns],
        _ => vec![scheme.group],
    }
}

/// For the source in every scheme and group size.
fn assert_source_equal(source: &[u8], dtype: FloatDtype) {
    assert!(source.len().is_multiple_of(COLUMNS * dtype.size()) && !source.is_empty());
    for scheme in schemes(source, dtype) {
        for group in sizes(scheme, COLUMNS) {
            assert_equal(Rows { source, dtype, columns: COLUMNS, group, scheme });
        }
    }
}

/// For elements given as f32, in every dtype too.
fn assert_equal_for(elements: &[f32]) {
    for dtype in DTYPES {
        assert_source_equal(&encode(dtype, elements), dtype);
    }
}

/// For elements in one row of any length.
fn assert_row_equal(elements: &[f32], columns: usize) {
    for dtype in DTYPES {
        let source = &encode(dtype, elements)[..];
        for scheme in [codings::INT4, codings::INT4_ASYM] {
            assert_equal(Rows { source, dtype, columns, group: columns, scheme });
        }
    }
}

#[test]
fn the_module_has_the_kernels_that_the_library_launches() {
    for kernel in GroupKernel::ALL {
        for name in DTYPES.map(|dtype| kernel.name(dtype)) {
            let entry = KERNELS.entry(&name);
            let sizes: Vec<usize> = entry.params.iter().map(|param| param.size).collect();
            assert_eq!(sizes, [8, 4, 4, 4, 8, 8, 8, 8], "{name}");
            assert_eq!(entry.max_threads, THREADS, "{name}");
        }
    }
    for name in DTYPES.map(largest_name) {
        let entry = KERNELS.entry(&name);
        let sizes: Vec<usize> = entry.params.iter().map(|param| param.size).collect();
        assert_eq!((&sizes[..], entry.max_threads), (&[8, 4, 8][..], THREADS), "{name}");
    }
    assert_eq!(KERNELS.0.entries().count(), 3 * GroupKernel::ALL.len() + 3);
}

#[test]
fn random_heavy_tailed_and_arbitrary_weights() {
    let mut random = Random(1);
    let n = 7 * COLUMNS;
    assert_equal_for(&(0..n).map(|_| random.normal() * 0.02).collect::<Vec<_>>());
    assert_equal_for(&(0..n).map(|_| random.normal() * 0.02 + 0.03).collect::<Vec<_>>());
    assert_equal_for(&(0..n).map(|_| random.normal() / (random.uniform().abs() + 1e-4)).collect::<Vec<_>>());
    assert_equal_for(&(0..n).map(|_| random.any()).collect::<Vec<_>>());
    let exponent = |random: &mut Random| 2f32.powi((random.bits() % 40) as i32 - 30);
    let scales: Vec<f32> = (0..n / 16).map(|_| exponent(&mut random)).collect();
    assert_equal_for(&(0..n).map(|i| random.normal() * scales[i / 16]).collect::<Vec<_>>());
}

#[test]
fn adversarial_groups() {
    let mut random = Random(2);
    let mut pick =
        |from: &[f32]| (0..2 * COLUMNS).map(|_| from[random.bits() as usize % from.len()]).collect::<Vec<_>>();
    for from in groups::ADVERSARIAL {
        assert_equal_for(&pick(from));
    }
}

#[test]
fn a_single_nonzero_at_each_position() {
    for x in [1.0, -3e-5, f32::from_bits(1)] {
        for at in (0..128).step_by(5) {
            let row = |row: usize| (0..128).map(move |i| if i == at + row { x } else { 0.0 });
            let elements: Vec<f32> = (0..5).flat_map(row).collect();
            assert_equal_for(&elements);
        }
    }
}

/// At and beside every border between codes, in groups whose scale is that of `top`.
#[test]
fn at_the_borders_between_codes() {
    let quarters: Vec<f32> = (-32..=32).map(|i| i as f32 / 4.0).collect();
    for (scale, top) in [(1.0, 6.0), (1.0, 7.5), (0.125, 7.0), (0.0371, 8.0), (3.7e-4, 6.0), (1.0e4, 6.0)] {
        for next in [next_f32s, next_bf16s] {
            let mut elements: Vec<f32> = quarters.iter().flat_map(|quarter| next(quarter * scale)).collect();
            elements.resize(COLUMNS, 0.0);
            elements.iter_mut().for_each(|x| *x = x.clamp(-top * scale, top * scale));
            elements.iter_mut().step_by(16).for_each(|x| *x = top * scale);
            assert_equal_for(&elements);
        }
    }
}

/// Scales at and beside every border between E4M3 floats, and far beyond them.
#[test]
fn at_the_borders_between_scales() {
    let bytes = (0..=126u32).chain([400]).map(|byte| match byte >> 3 {
        0 => byte as f32 / 512.0,
        exponent => f32::from_bits((exponent + 120) << 23 | (byte & 7) << 20),
    });
    let values: Vec<f32> = bytes.collect();
    let midpoints = values.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0);
    // Two of a group's elements: what makes the scale, and something to divide by it.
    let group = |x: f32| (0..16).map(move |i| [6.0 * x, 2.6 * x][i % 2]);
    let mut elements: Vec<f32> =
        midpoints.chain(values.iter().copied()).flat_map(next_f32s).filter(|x| x.is_finite()).flat_map(group).collect();
    elements.resize(elements.len().next_multiple_of(COLUMNS), 0.0);
    for dtype in DTYPES {
        let source = &encode(dtype, &elements)[..];
        let nvfp4 = [1.0, 1.0 / 3.0, 0.0].map(codings::nvfp4);
        let modelopt = [1.0, 3.0, 1e30].map(codings::nvfp4_modelopt);
        for scheme in nvfp4.into_iter().chain(modelopt) {
            assert_equal(Rows { source, dtype, columns: COLUMNS, group: 16, scheme });
        }
    }
}

#[test]
fn every_16_bit_pattern() {
    for (dtype, infinity) in
        [(FloatDtype::Bfloat16, bf16::INFINITY.to_bits()), (FloatDtype::Float16, f16::INFINITY.to_bits())]
    {
        // In order: groups of one magnitude each, so that all bits of the numbers matter.
        let mut source: Vec<u8> =
            (0..=u16::MAX).filter(|bits| bits & 0x7fff < infinity).flat_map(u16::to_le_bytes).collect();
        source.resize(source.len().next_multiple_of(2 * COLUMNS), 0);
        for scheme in schemes(&source, dtype) {
            let group = sizes(scheme, COLUMNS)[0];
            assert_equal(Rows { source: &source, dtype, columns: COLUMNS, group, scheme });
        }
    }
}

#[test]
fn every_rounding_of_every_lane() {
    let mut random = Random(3);
    for lane in 0..32 {
        // The other lanes' sums are zero and hide nothing.
        let elements: Vec<f32> = (0..2 * COLUMNS).map(|i| if i % 32 == lane { random.normal() } else { 0.0 }).collect();
        assert_equal_for(&elements);
    }
}

#[test]
fn thread_blocks_that_are_just_full() {
    let mut random = Random(4);
    let elements: Vec<f32> = (0..65 * 128).map(|_| random.normal()).collect();
    for dtype in DTYPES {
        let source = encode(dtype, &elements);
        for scheme in schemes(&source, dtype) {
            for group in sizes(scheme, 128) {
                for groups in [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65] {
                    let source = &source[..groups * group * dtype.size()];
                    assert_equal(Rows { source, dtype, columns: group, group, scheme });
                }
            }
        }
    }
}

#[test]
fn rows_of_any_length() {
    let mut random = Random(5);
    let elements: Vec<f32> = (0..3 * 300).map(|_| random.normal() * 0.1 + 0.02).collect();
    for columns in (1..=70).chain([95, 96, 97, 127, 128, 129, 159, 160, 161, 255, 256, 257, 300]) {
        assert_row_equal(&elements[..3 * columns], columns);
    }
}

#[test]
fn long_rows() {
    let mut random = Random(6);
    let elements: Vec<f32> = (0..4 * 4099).map(|_| random.normal()).collect();
    for columns in [480, 511, 512, 513, 544, 1000, 1024, 2047, 4096, 4099] {
        assert_row_equal(&elements[..4 * columns], columns);
        // The last warp of a thread block has no row.
        assert_row_equal(&elements[..3 * columns], columns);
    }
    let elements: Vec<f32> = (0..200_001).map(|_| random.normal()).collect();
    assert_row_equal(&elements, elements.len());
}

#[test]
fn awkward_rows() {
    let mut random = Random(7);
    let tiny = f32::from_bits(1);
    for from in [
        &[0.0, -0.0][..],
        &[tiny, -tiny, 0.0],
        &[0.37, -0.37],
        &[-0.37],
        &[f32::MAX, -f32::MAX, 1.0],
        &[65504.0, -65504.0, 1.0],
        &[1e-38, -1e-40],
    ] {
        for columns in [33, 131] {
            let pick = |_| from[random.bits() as usize % from.len()];
            assert_row_equal(&(0..5 * columns).map(pick).collect::<Vec<_>>(), columns);
        }
    }
    // The largest, and the least and the greatest, wherever they are.
    for columns in [33, 161] {
        for at in 0..columns {
            let row: Vec<f32> = (0..columns)
                .map(|i| {
                    if i == at {
                        -7.0
                    } else if i == columns - 1 - at {
                        3.0
                    } else {
                        0.5
                    }
                })
                .collect();
            assert_row_equal(&row, columns);
        }
    }
}

/// Every element in turn is replaced by one that isn't finite.
#[test]
fn a_nan_or_an_infinity_anywhere_shows_in_its_groups_absmax() {
    let mut random = Random(8);
    for dtype in DTYPES {
        let (nans, size): (Vec<Vec<u8>>, _) = match dtype {
            FloatDtype::Bfloat16 => ([0x7f81u16, 0xff81, 0x7f80, 0xff80].map(|x| x.to_le_bytes().to_vec()).into(), 2),
            FloatDtype::Float16 => ([0x7c01u16, 0xfc01, 0x7c00, 0xfc00].map(|x| x.to_le_bytes().to_vec()).into(), 2),
            FloatDtype::Float32 => {
                ([0x7f80_0001u32, 0xff80_0001, 0x7f80_0000, 0xff80_0000].map(|x| x.to_le_bytes().to_vec()).into(), 4)
            }
        };
        let clean = encode(dtype, &(0..256).map(|_| random.normal() * 0.02).collect::<Vec<_>>());
        for scheme in schemes(&clean, dtype) {
            for group in sizes(scheme, 33) {
                let whole = &clean[..2 * group * size];
                for (at, nan) in (0..whole.len() / size).zip(nans.iter().cycle()).step_by(3) {
                    let mut source = whole.to_vec();
                    source[at * size..][..size].copy_from_slice(nan);
                    assert_equal(Rows { source: &source, dtype, columns: group, group, scheme });
                }
            }
        }
    }
}

#[test]
fn many_nans_and_infinities() {
    let mut random = Random(9);
    for dtype in DTYPES {
        // Any bits: with 16 bits NaN are frequent, so only some of the runs are drawn so.
        let run = |i: usize, random: &mut Random| -> Vec<u8> {
            let bytes = (0..16 * dtype.size()).map(|_| random.bits() as u8).collect();
            if i.is_multiple_of(9) { bytes } else { encode(dtype, &[random.normal(); 16]) }
        };
        assert_source_equal(&(0..4 * COLUMNS / 16).flat_map(|i| run(i, &mut random)).collect::<Vec<u8>>(), dtype);
    }
}

fn assert_largest_equal(source: &[u8], dtype: FloatDtype) {
    KERNELS.check_largest(source, dtype).unwrap_or_else(|wrong| panic!("{wrong}"));
}

#[test]
fn the_largest_magnitude_of_any_number_of_elements() {
    let mut random = Random(10);
    let elements: Vec<f32> = (0..40_000).map(|_| random.any()).collect();
    let small: Vec<f32> = (0..40_000).map(|_| random.normal() * 0.02).collect();
    for dtype in DTYPES {
        for n in (8..=64).step_by(8).chain([1016, 1024, 1032, 8184, 8192, 8200, 16_384, 16_400, 40_000]) {
            assert_largest_equal(&encode(dtype, &elements[..n]), dtype);
            assert_largest_equal(&encode(dtype, &small[..n]), dtype);
        }
    }
}

#[test]
fn the_largest_magnitude_wherever_it_is_and_whatever_is_not_finite() {
    for dtype in DTYPES {
        for at in (0..8192).step_by(37).chain(8100..8192) {
            for x in [-7.0, f32::NAN, f32::INFINITY, -f32::from_bits(1)] {
                let mut source = encode(dtype, &vec![f32::from_bits(0); 8192]);
                source[at * dtype.size()..][..dtype.size()].copy_from_slice(&encode_one(dtype, x));
                assert_largest_equal(&source, dtype);
            }
        }
    }
}
