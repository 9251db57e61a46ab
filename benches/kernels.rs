//! Every kernel this processor runs, on one core, against a memory copy of the same source bytes.
//!
//! Sources are 1 MiB, as the pipeline hands them out; rates are of source bytes.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime};
use half::{bf16, f16};
use prequant::format::{BlockSize, FloatDtype, Format};
use prequant::kernel::{Blocks, Figures, Kernel};

const SOURCE_BYTES: usize = 1 << 20;

fn kernels(criterion: &mut Criterion) {
    for dtype in [FloatDtype::Bfloat16, FloatDtype::Float16, FloatDtype::Float32] {
        let mut group = criterion.benchmark_group(dtype.torch_name());
        group.throughput(Throughput::Bytes(SOURCE_BYTES as u64));
        group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1)).sample_size(20);
        let source = weights(dtype);
        copy(&mut group, &source);
        for kernel in Kernel::available() {
            for format in [Format::Nf4, Format::Fp4] {
                for size in [32, 64, 256, 4096] {
                    quantize(&mut group, kernel, &source, dtype, format, size);
                }
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
    format: Format,
    size: u32,
) {
    let block_size = BlockSize::try_from(size).expect("a block size");
    let elements = source.len() / dtype.size();
    let blocks = elements / block_size.get();
    let mut packed = vec![0; elements / 2];
    let mut figures: [Vec<f32>; 4] = std::array::from_fn(|_| vec![0.0; blocks]);
    group.bench_function(format!("{}/{}/{size}", kernel.name(), format.name()), |bencher| {
        bencher.iter(|| {
            let [absmax, signal, noise, worst] = &mut figures;
            let figures = Figures { absmax, signal, noise, worst };
            let codebook = format.codebook();
            let packed = &mut packed;
            kernel.quantize(Blocks { source: black_box(source), dtype, block_size, codebook, packed, figures })
        });
    });
}

criterion_group!(benches, kernels);
criterion_main!(benches);
