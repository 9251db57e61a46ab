//! The GPU's bytes against the CPU's, on data that nobody has seen before.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use half::{bf16, f16};
use prequant::backend::cuda::{BlockKernel, Gpu, Slot, SlotSize};
use prequant::dtype::FloatDtype;
use prequant::format::{BlockSize, FP4, FormatSpec, NESTED_BLOCK_SIZE, NF4, dynamic_map, nf4};
use prequant::kernel::block::nested;
use prequant::kernel::{BlockErrors, Blocks, Kernel};
use prequant::units::Bytes;

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
pub fn check(gpu: &Arc<Gpu>, size: u64, report: &mut Report) -> Result<(), Box<dyn std::error::Error>> {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64;
    report.line(&format!("bytes: {} for each format, seed {seed}", Bytes(size)));
    let formats = [&NF4, &FP4].map(Compared::Blocks);
    for format in formats.into_iter().chain(groups::SCHEMES.map(Compared::Groups)) {
        let (next, done) = (AtomicU64::new(0), AtomicU64::new(0));
        let wrong = thread::scope(|scope| {
            let threads = thread::available_parallelism().map_or(4, usize::from);
            let compare = || compare(gpu, format, seed, size, &next, &done);
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
    gpu: &Arc<Gpu>,
    format: Compared,
    seed: u64,
    size: u64,
    next: &AtomicU64,
    done: &AtomicU64,
) -> Option<String> {
    let slot_size = match format {
        Compared::Blocks(_) => SlotSize::new(PIECE, 4, BlockSize::try_from(32).ok()?, PIECE / 32),
        Compared::Groups(_) => SlotSize::for_groups(4 * PIECE, PIECE, PIECE / 16),
    };
    let mut slot = match Slot::new(gpu, slot_size) {
        Ok(slot) => slot,
        Err(fault) => return Some(fault.to_string()),
    };
    let elements = PIECE.min(size as usize / 4).max(1);
    while done.load(Ordering::Relaxed) < size {
        let piece = next.fetch_add(1, Ordering::Relaxed);
        let dtype = DTYPES[piece as usize % 3];
        let mut random = Random(seed ^ piece.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut weights = |elements| weights(&mut random, piece / 2 % KINDS, elements, dtype);
        let compared = match format {
            Compared::Blocks(format) => {
                let block_size = BlockSize::try_from(32 << (piece / 3 % 8)).ok()?;
                // Every other piece ends in a short block.
                let elements = elements - (piece % 2 * (piece * 37 % 4096)).min(elements as u64 - 1) as usize;
                let source = weights(elements);
                slot.source(source.len()).copy_from_slice(&source);
                let compared = compare_piece(&mut slot, &source, dtype, format, block_size);
                compared
                    .map(|()| source.len())
                    .map_err(|what| format!("block size {block_size}, {elements} elements: {what}"))
            }
            Compared::Groups(scheme) => {
                groups::compare_piece(&mut slot, scheme, piece / 3, elements, dtype, &mut weights)
            }
        };
        match compared {
            Ok(len) => done.fetch_add(len as u64, Ordering::Relaxed),
            Err(what) => return Some(format!("piece {piece} ({dtype:?}): {what}")),
        };
    }
    None
}

fn compare_piece(
    slot: &mut Slot,
    source: &[u8],
    dtype: FloatDtype,
    format: &'static FormatSpec,
    block_size: BlockSize,
) -> Result<(), String> {
    let elements = source.len() / dtype.size();
    let blocks = elements.div_ceil(block_size.get());
    let mut packed = vec![0; elements.div_ceil(2)];
    let [mut absmax, mut signal, mut noise, mut worst] = std::array::from_fn(|_| vec![0f32; blocks]);
    let figures = BlockErrors { absmax: &mut absmax, signal: &mut signal, noise: &mut noise, worst: &mut worst };
    let codebook = format.codebook().ok_or("no codebook")?;
    let kernel = BlockKernel::new(codebook).ok_or("no kernel")?;
    Kernel::detect()
        .quantize(Blocks { source, dtype, block_size, codebook, packed: &mut packed, figures })
        .map_err(|_| "not finite".to_owned())?;
    let found = slot.quantize(elements, dtype, kernel, block_size).map_err(|fault| fault.to_string())?;
    if let Some(i) = (0..packed.len()).find(|&i| packed[i] != found.packed[i]) {
        return Err(format!("packed byte {i} is {:#04x}, and {:#04x} on the CPU", found.packed[i], packed[i]));
    }
    let pairs = [
        ("absmax", &absmax, &*found.figures.absmax),
        ("signal", &signal, &*found.figures.signal),
        ("noise", &noise, &*found.figures.noise),
        ("worst", &worst, &*found.figures.worst),
    ];
    for (name, expected, found) in pairs {
        if let Some(i) = (0..blocks).find(|&i| expected[i].to_bits() != found[i].to_bits()) {
            return Err(format!("{name} of block {i} is {:e}, and {:e} on the CPU", found[i], expected[i]));
        }
    }
    let offset = (absmax.iter().map(|&x| f64::from(x)).sum::<f64>() / blocks as f64) as f32;
    let (mut codes, mut nested_absmax) = (vec![0; blocks], vec![0.0; blocks.div_ceil(NESTED_BLOCK_SIZE)]);
    nested::quantize(&absmax, offset, dynamic_map(), &mut codes, &mut nested_absmax);
    let (found_codes, found_absmax) = slot.quantize_absmax(&absmax, offset).map_err(|fault| fault.to_string())?;
    match found_codes == codes && found_absmax == nested_absmax {
        true => Ok(()),
        false => Err("double quantization differs".to_owned()),
    }
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
