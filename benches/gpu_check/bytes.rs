//! A device's bytes against the CPU's, on data that nobody has seen before.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use half::{bf16, f16};
use prequant::internal::backend::{Backend, Cpu, CpuLane, Encoded, Lane, LaneSize, Run};
use prequant::internal::format::{Codec, CodecOptions, FP4, NESTED_BLOCK_SIZE, NF4, nf4};
use prequant::internal::kernel::{Figures, SUMMED};
use prequant::internal::stats::GroupErrors;
use prequant::{BlockSize, Bytes, FloatDtype, FormatSpec};

use super::{Report, groups};

/// Elements of a piece.
const PIECE: usize = 1 << 21;

const DTYPES: [FloatDtype; 3] = [FloatDtype::Bfloat16, FloatDtype::Float16, FloatDtype::Float32];

/// Ways to make weights.
const KINDS: u64 = 6;

/// What is compared: a format with its own ways to be laid out.
#[derive(Clone, Copy)]
enum Compared {
    Blocks(&'static FormatSpec),
    Groups(&'static str),
}

/// Compares `size` bytes for each format.
pub fn check(backend: &dyn Backend, size: u64, report: &mut Report) -> Result<(), Box<dyn std::error::Error>> {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64;
    report.line(&format!("bytes: {} for each format, seed {seed}", Bytes(size)));
    let formats = [&NF4, &FP4].map(Compared::Blocks);
    for format in formats.into_iter().chain(groups::SCHEMES.map(Compared::Groups)) {
        let (next, done) = (AtomicU64::new(0), AtomicU64::new(0));
        let wrong = thread::scope(|scope| {
            let threads = thread::available_parallelism().map_or(4, usize::from);
            let compare = || compare(backend, format, seed, size, &next, &done);
            let all: Vec<_> = (0..threads).map(|_| scope.spawn(compare)).collect();
            all.into_iter().filter_map(|thread| thread.join().unwrap_or(Some("a panic".to_owned()))).next()
        });
        let (name, what) = match format {
            Compared::Blocks(format) => (format.name, "codes, absmax, figures and double quantization"),
            Compared::Groups(name) => (name, "codes, scales, zero points and figures"),
        };
        let said = wrong.as_deref().map_or(format!("{what} as on the CPU"), str::to_owned);
        let compared = Bytes(done.into_inner());
        report.check(wrong.is_none(), &format!("  {name}: {compared} compared: {said}"));
    }
    Ok(())
}

/// Takes pieces until `size` bytes are done; says what differs.
fn compare(
    backend: &dyn Backend,
    format: Compared,
    seed: u64,
    size: u64,
    next: &AtomicU64,
    done: &AtomicU64,
) -> Option<String> {
    let (groups, absmax) = match format {
        Compared::Blocks(_) => (PIECE / 32, PIECE / 32),
        Compared::Groups(_) => (PIECE / 16, 0),
    };
    // Integers' rows of any length are padded.
    let room = LaneSize { source: 4 * PIECE, packed: PIECE, groups, group_len: 5, absmax };
    let mut cpu = Cpu::detect().lane(&room);
    let mut lane = match backend.open_lane(0, &room) {
        Ok(lane) => lane,
        Err(fault) => return Some(fault.to_string()),
    };
    let elements = PIECE.min(size as usize / 4).max(1);
    while done.load(Ordering::Relaxed) < size {
        let piece = next.fetch_add(1, Ordering::Relaxed);
        let dtype = DTYPES[piece as usize % 3];
        let mut random = Random(seed ^ piece.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut weights = |elements| weights(&mut random, piece / 2 % KINDS, elements, dtype);
        let (source, codec, columns, tensor_scale) = match format {
            Compared::Blocks(format) => {
                let block_size = BlockSize::try_from(32 << (piece / 3 % 8)).ok()?;
                // Every other piece ends in a short block.
                let elements = elements - (piece % 2 * (piece * 37 % 4096)).min(elements as u64 - 1) as usize;
                let codec = format.codec(CodecOptions { block_size, ..CodecOptions::default() });
                (weights(elements), codec, elements as u64, None)
            }
            Compared::Groups(name) => groups::piece(name, piece / 3, elements, dtype, &mut weights),
        };
        let run = Run { codec: &codec, dtype, columns, tensor_scale, place: 0..source.len() };
        if let Err(what) = compare_piece(&mut cpu, &mut *lane, &source, &run) {
            let Codec { format, scales } = codec;
            let elements = format!("{} elements in rows of {columns}, {scales:?}", run.elements());
            return Some(format!("piece {piece} ({dtype:?}) to {}: {elements}: {what}", format.name));
        }
        done.fetch_add(source.len() as u64, Ordering::Relaxed);
    }
    None
}

fn compare_piece(cpu: &mut CpuLane, lane: &mut dyn Lane, source: &[u8], run: &Run<'_>) -> Result<(), String> {
    cpu.source(source.len()).copy_from_slice(source);
    lane.source(source.len()).copy_from_slice(source);
    let not_finite = || "not finite".to_owned();
    let expected = cpu.quantize(run).map_err(|fault| fault.to_string())?.ok_or_else(not_finite)?;
    let found = lane.quantize(run).map_err(|fault| fault.to_string())?.ok_or_else(not_finite)?;
    compare_bytes(&expected, &found)?;
    compare_figures(&expected.figures, &found.figures)?;
    let absmax = expected.figures.absmax().to_vec();
    if !run.codec.is_blocks() {
        return Ok(());
    }
    let offset = (absmax.iter().map(|&x| f64::from(x)).sum::<f64>() / absmax.len() as f64) as f32;
    let expected = cpu.quantize_absmax(&absmax, offset).map_err(|fault| fault.to_string())?;
    let found = lane.quantize_absmax(&absmax, offset).map_err(|fault| fault.to_string())?;
    match expected == found && found.1.len() == absmax.len().div_ceil(NESTED_BLOCK_SIZE) {
        true => Ok(()),
        false => Err("double quantization differs".to_owned()),
    }
}

fn compare_bytes(expected: &Encoded<'_>, found: &Encoded<'_>) -> Result<(), String> {
    let pairs = [
        ("packed", expected.packed, found.packed),
        ("scales", expected.scales, found.scales),
        ("zero_points", expected.zero_points, found.zero_points),
    ];
    for (name, expected, found) in pairs {
        if expected.len() != found.len() {
            return Err(format!("{} bytes of {name}, and {} on the CPU", found.len(), expected.len()));
        }
        if let Some(i) = (0..expected.len()).find(|&i| expected[i] != found[i]) {
            return Err(format!("{name} byte {i} is {:#04x}, and {:#04x} on the CPU", found[i], expected[i]));
        }
    }
    Ok(())
}

/// A device's figures are summed already: held to what the statistics make of the CPU's.
fn compare_figures(expected: &Figures<'_>, found: &Figures<'_>) -> Result<(), String> {
    let (Figures::Blocks(expected), Figures::Sums { absmax, errors }) = (expected, found) else {
        return Err("figures of another kind".to_owned());
    };
    let differs = |x: f32, y: f32| x.to_bits() != y.to_bits() && !(x.is_nan() && y.is_nan());
    if let Some(i) = (0..absmax.len()).find(|&i| differs(expected.absmax[i], absmax[i])) {
        return Err(format!("absmax {i} is {:e}, and {:e} on the CPU", absmax[i], expected.absmax[i]));
    }
    let all: [&[f32]; 4] = [expected.absmax, expected.signal, expected.noise, expected.worst];
    for (i, start) in (0..absmax.len()).step_by(SUMMED).enumerate() {
        let expected = GroupErrors::of(all.map(|figure| &figure[start..figure.len().min(start + SUMMED)]));
        let (signal, noise, worst) = (errors.signal[i], errors.noise[i], errors.worst[i]);
        let found = GroupErrors { signal, noise, worst, zeros: errors.zeros[i] };
        let number = |x: f64| if x.is_nan() { u64::MAX } else { x.to_bits() };
        let bits = |sums: GroupErrors| ([sums.signal, sums.noise, sums.worst].map(number), sums.zeros);
        if bits(found) != bits(expected) {
            return Err(format!("the sums of blocks from {start} on are {found:?}, and {expected:?} on the CPU"));
        }
    }
    Ok(())
}

/// Finite weights of one kind, as they stand in a file.
fn weights(random: &mut Random, kind: u64, elements: usize, dtype: FloatDtype) -> Vec<u8> {
    let thresholds = nf4::CODEBOOK.thresholds();
    let mut bytes = Vec::with_capacity(elements * dtype.size());
    for i in 0..elements {
        let bits = random.next();
        let uniform = bits as i32 as f32 / (1u64 << 31) as f32;
        let x = match kind {
            // As trained weights are: small, with heavy tails.
            0 => uniform * uniform * uniform * 0.1,
            // Any bits.
            1 | 2 => f32::from_bits(bits),
            // Subnormal and hardly more.
            3 => f32::from_bits(bits & 0x80ff_ffff),
            // On thresholds of a block whose absmax is 1, and an ulp beside them.
            4 if i % 32 == 0 => 1.0,
            4 => f32::from_bits(thresholds[bits as usize % 15].to_bits().wrapping_add(bits >> 8 & 3).wrapping_sub(1)),
            // Mostly zero, of either sign.
            _ => {
                if bits.is_multiple_of(61) {
                    uniform
                } else {
                    0.0f32.copysign(uniform)
                }
            }
        };
        match dtype {
            FloatDtype::Bfloat16 => bytes.extend(finite(bf16::from_f32(x), bf16::ONE, bf16::is_finite).to_le_bytes()),
            FloatDtype::Float16 => bytes.extend(finite(f16::from_f32(x), f16::ONE, f16::is_finite).to_le_bytes()),
            FloatDtype::Float32 => bytes.extend(finite(x, 1.0, f32::is_finite).to_le_bytes()),
        }
    }
    bytes
}

fn finite<T: Copy>(x: T, or: T, is_finite: fn(T) -> bool) -> T {
    if is_finite(x) { x } else { or }
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
    }
}
