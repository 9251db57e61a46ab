//! Every kernel this processor runs, on one core, against a memory copy of the same source bytes.
//!
//! Sources are 1 MiB, as the pipeline hands them out; rates are of source bytes. Decoding is the other way round: rates
//! are of the bytes it writes.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime};
use half::{bf16, f16};
use prequant::internal::format::{Codebook, Coding, ElementCode, fp4, nf4};
use prequant::internal::kernel::decode::Row;
use prequant::internal::kernel::group::Groups;
use prequant::internal::kernel::sha256::{Pairing, Sha256Stream};
use prequant::internal::kernel::{BlockErrors, Blocks, Kernel};
use prequant::{BlockSize, FloatDtype};

#[path = "../tests/support/codings.rs"]
mod codings;

const SOURCE_BYTES: usize = 1 << 20;

/// Elements of a row, where there are rows.
const COLUMNS: usize = 2048;

/// Formats with a scale for each group of a row's columns.
const GROUPS: [(&str, Coding, usize); 5] = [
    ("int4", codings::INT4, 128),
    ("int4-asym", codings::INT4_ASYM, 128),
    ("nvfp4", codings::nvfp4(16384.0), 16),
    ("nvfp4 modelopt", codings::nvfp4_modelopt(6.1e-5), 16),
    ("mxfp4", codings::MXFP4, 32),
];

/// What is decoded.
const CODINGS: [(&str, Coding); 8] = [
    ("nf4/64", codings::blocks(&nf4::CODEBOOK, 64)),
    ("fp4/64", codings::blocks(&fp4::CODEBOOK, 64)),
    ("int4 128", Coding { group: 128, ..codings::INT4 }),
    ("nvfp4 16", codings::nvfp4(16384.0)),
    ("nvfp4 modelopt 16", codings::nvfp4_modelopt(6.1e-5)),
    ("mxfp4 32", codings::MXFP4),
    ("fp8 128", codings::fp8(128, codings::FP8_SCALES[0])),
    ("fp8 e8m0 128", codings::fp8(128, codings::FP8_SCALES[2])),
];

fn kernels(criterion: &mut Criterion) {
    for dtype in [FloatDtype::Bfloat16, FloatDtype::Float16, FloatDtype::Float32] {
        let mut group = criterion.benchmark_group(dtype.torch_name());
        group.throughput(Throughput::Bytes(SOURCE_BYTES as u64));
        group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1)).sample_size(20);
        let source = weights(dtype);
        copy(&mut group, &source);
        for kernel in Kernel::available() {
            for (format, codebook) in [("nf4", &nf4::CODEBOOK), ("fp4", &fp4::CODEBOOK)] {
                for size in [32, 64, 256, 4096] {
                    quantize(&mut group, kernel, &source, dtype, (format, codebook), size);
                }
            }
            for (name, scheme, size) in GROUPS {
                quantize_groups(&mut group, kernel, &source, dtype, name, scheme, size);
            }
        }
    }
}

/// Weights as a trained layer's: normal, a few hundredths large.
fn weights(dtype: FloatDtype) -> Vec<u8> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    let weights = std::iter::repeat_with(|| (0..12).map(|_| uniform()).sum::<f32>() * 0.02);
    let encode = |weight: f32| match dtype {
        FloatDtype::Bfloat16 => bf16::from_f32(weight).to_le_bytes().to_vec(),
        FloatDtype::Float16 => f16::from_f32(weight).to_le_bytes().to_vec(),
        FloatDtype::Float32 => weight.to_le_bytes().to_vec(),
    };
    weights.take(SOURCE_BYTES / dtype.size()).flat_map(encode).collect()
}

fn copy(group: &mut BenchmarkGroup<'_, WallTime>, source: &[u8]) {
    let mut target = vec![0; source.len()];
    group.bench_function("memory copy", |bencher| {
        bencher.iter(|| black_box(&mut target).copy_from_slice(black_box(source)));
    });
}

fn quantize(
    group: &mut BenchmarkGroup<'_, WallTime>,
    kernel: Kernel,
    source: &[u8],
    dtype: FloatDtype,
    (format, codebook): (&str, &'static Codebook),
    size: u32,
) {
    let block_size = BlockSize::try_from(size).expect("a block size");
    let elements = source.len() / dtype.size();
    let blocks = elements / block_size.get();
    let mut packed = vec![0; elements / 2];
    let mut figures: [Vec<f32>; 4] = std::array::from_fn(|_| vec![0.0; blocks]);
    group.bench_function(format!("{}/{format}/{size}", kernel.name()), |bencher| {
        bencher.iter(|| {
            let [absmax, signal, noise, worst] = &mut figures;
            let figures = BlockErrors { absmax, signal, noise, worst };
            let packed = &mut packed;
            kernel.quantize(Blocks { source: black_box(source), dtype, block_size, codebook, packed, figures })
        });
    });
}

fn quantize_groups(
    group: &mut BenchmarkGroup<'_, WallTime>,
    kernel: Kernel,
    source: &[u8],
    dtype: FloatDtype,
    name: &str,
    scheme: Coding,
    size: usize,
) {
    let elements = source.len() / dtype.size();
    let groups = elements / size;
    let mut packed = vec![0; elements / 2];
    let mut scales = vec![0; groups * scheme.scale_size(dtype)];
    let mut points = vec![0; if scheme.has_zero_points() { groups } else { 0 }];
    let [mut absmax, mut signal, mut noise, mut worst] = std::array::from_fn(|_| vec![0.0; groups]);
    group.bench_function(format!("{} {name} {size}", kernel.name()), |bencher| {
        bencher.iter(|| {
            let figures =
                BlockErrors { absmax: &mut absmax, signal: &mut signal, noise: &mut noise, worst: &mut worst };
            let (packed, scales, zero_points) = (&mut packed[..], &mut scales[..], &mut points[..]);
            let (source, columns) = (black_box(source), COLUMNS);
            kernel.quantize_groups(Groups {
                source,
                dtype,
                columns,
                coding: Coding { group: size, ..scheme },
                packed,
                scales,
                zero_points,
                figures,
            })
        });
    });
}

fn decoding(criterion: &mut Criterion) {
    for dtype in [FloatDtype::Bfloat16, FloatDtype::Float16, FloatDtype::Float32] {
        let mut group = criterion.benchmark_group(format!("decode to {}", dtype.torch_name()));
        group.throughput(Throughput::Bytes(SOURCE_BYTES as u64));
        group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1)).sample_size(20);
        let elements = SOURCE_BYTES / dtype.size();
        let codes: Vec<u8> = (0..elements as u32).map(|i| (i.wrapping_mul(2654435761) >> 24) as u8).collect();
        let mut into = vec![0; SOURCE_BYTES];
        for (name, coding) in CODINGS {
            // 0x3c in every byte: a number near 0.01 or 1 in every dtype that scales have.
            let scales = vec![0x3c; elements / coding.group * coding.scale_size(dtype)];
            for kernel in Kernel::available() {
                group.bench_function(format!("{} {name}", kernel.name()), |bencher| {
                    bencher.iter(|| decode_rows(kernel, coding, dtype, black_box(&codes), &scales, &mut into));
                });
            }
        }
    }
}

/// Row by row where there are rows, all at once where there are none.
fn decode_rows(kernel: Kernel, coding: Coding, dtype: FloatDtype, codes: &[u8], scales: &[u8], into: &mut [u8]) {
    let elements = into.len() / dtype.size();
    let columns = if matches!(coding.element, ElementCode::Codebook(_)) { elements } else { COLUMNS };
    let scales_of_row = columns / coding.group * coding.scale_size(dtype);
    for (row, into) in into.chunks_exact_mut(columns * dtype.size()).enumerate() {
        let codes = &codes[row * coding.code_byte(columns)..][..coding.code_byte(columns)];
        let scales = &scales[row * scales_of_row..][..scales_of_row];
        kernel.decode(Row { coding, dtype, first: 0, codes, scales, zero_points: &[], order: None, into });
    }
}

/// Rates are of all bytes hashed: those of a pair count twice.
fn hashing(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("SHA-256");
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1)).sample_size(20);
    let bytes: Vec<u8> = (0..SOURCE_BYTES as u32).map(|i| (i.wrapping_mul(2654435761) >> 24) as u8).collect();
    let [mut file, mut tensor] = [Sha256Stream::new(), Sha256Stream::new()];
    file.update(&[0; 24]); // a header ends inside of a block
    group.throughput(Throughput::Bytes(SOURCE_BYTES as u64));
    group.bench_function("one stream", |bencher| bencher.iter(|| file.update(black_box(&bytes))));
    group.throughput(Throughput::Bytes(2 * SOURCE_BYTES as u64));
    for pairing in Pairing::available() {
        group.bench_function(format!("two streams, {pairing:?}"), |bencher| {
            bencher.iter(|| pairing.update(&mut file, black_box(&bytes), &mut tensor, black_box(&bytes)));
        });
    }
}

criterion_group!(benches, kernels, decoding, hashing);
criterion_main!(benches);
