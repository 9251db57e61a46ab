//! Weights to quantize, many of them awkward, and what a kernel makes of them.

use half::{bf16, f16};
use prequant::internal::format::{Codebook, fp4, nf4};
use prequant::internal::kernel::{BlockErrors, Blocks, Kernel, NonFinite};
use prequant::{BlockSize, FloatDtype};

pub const DTYPES: [FloatDtype; 3] = [FloatDtype::Bfloat16, FloatDtype::Float16, FloatDtype::Float32];
pub const CODEBOOKS: [&Codebook; 2] = [&nf4::CODEBOOK, &fp4::CODEBOOK];
pub const BLOCK_SIZES: [u32; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// The largest finite magnitude that the dtype holds.
pub fn largest(dtype: FloatDtype) -> f32 {
    match dtype {
        FloatDtype::Bfloat16 => bf16::MAX.to_f32(),
        FloatDtype::Float16 => f16::MAX.to_f32(),
        FloatDtype::Float32 => f32::MAX,
    }
}

/// Elements as they stand in a file, each rounded to the dtype and kept finite.
pub fn encode(dtype: FloatDtype, elements: &[f32]) -> Vec<u8> {
    let largest = largest(dtype);
    elements.iter().flat_map(|x| encode_one(dtype, x.clamp(-largest, largest))).collect()
}

pub fn encode_one(dtype: FloatDtype, x: f32) -> Vec<u8> {
    match dtype {
        FloatDtype::Bfloat16 => bf16::from_f32(x).to_le_bytes().to_vec(),
        FloatDtype::Float16 => f16::from_f32(x).to_le_bytes().to_vec(),
        FloatDtype::Float32 => x.to_le_bytes().to_vec(),
    }
}

/// What a kernel wrote; figures as bits.
#[derive(Debug, PartialEq)]
pub struct Output {
    pub packed: Vec<u8>,
    pub figures: [Vec<u32>; 4],
}

impl Output {
    /// The first way in which this differs from what was expected, in words: outputs are too long to print.
    pub fn difference(&self, expected: &Output) -> Option<String> {
        if let Some(i) = (0..expected.packed.len()).find(|&i| expected.packed[i] != self.packed[i]) {
            let (found, expected) = (self.packed[i], expected.packed[i]);
            return Some(format!("packed byte {i} is {found:#04x}, expected {expected:#04x}"));
        }
        for (name, figure) in ["absmax", "signal", "noise", "worst"].iter().zip(0..) {
            let (expected, found) = (&expected.figures[figure], &self.figures[figure]);
            if let Some(i) = (0..expected.len()).find(|&i| expected[i] != found[i]) {
                let (found, expected) = (f32::from_bits(found[i]), f32::from_bits(expected[i]));
                return Some(format!("{name} of block {i} is {found:e}, expected {expected:e}"));
            }
        }
        None
    }

    pub fn extend(&mut self, other: Output) {
        self.packed.extend(other.packed);
        for (mine, others) in self.figures.iter_mut().zip(other.figures) {
            mine.extend(others);
        }
    }
}

pub fn quantize(
    kernel: Kernel,
    source: &[u8],
    dtype: FloatDtype,
    size: u32,
    codebook: &'static Codebook,
) -> Result<Output, NonFinite> {
    let block_size = BlockSize::try_from(size).unwrap();
    let elements = source.len() / dtype.size();
    let blocks = elements.div_ceil(block_size.get());
    // Filled with what no kernel writes, so that what was left out shows.
    let mut packed = vec![0xee; elements.div_ceil(2)];
    let mut figures: [Vec<f32>; 4] = std::array::from_fn(|_| vec![f32::NAN; blocks]);
    let [absmax, signal, noise, worst] = &mut figures;
    let figures_out = BlockErrors { absmax, signal, noise, worst };
    let packed_out = &mut packed;
    kernel.quantize(Blocks { source, dtype, block_size, codebook, packed: packed_out, figures: figures_out })?;
    Ok(Output { packed, figures: figures.map(|figure| figure.iter().map(|x| x.to_bits()).collect()) })
}

/// A small generator (xorshift64*): the tests need many numbers, not good ones.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
    }

    /// In (-1, 1).
    pub fn uniform(&mut self) -> f32 {
        (self.bits() as i32) as f32 / (1u64 << 31) as f32 * 0.999
    }

    /// Nearly Gaussian.
    pub fn normal(&mut self) -> f32 {
        (0..6).map(|_| self.uniform()).sum::<f32>() * 0.707
    }

    /// A finite f32 with any bits.
    pub fn any(&mut self) -> f32 {
        std::iter::repeat_with(|| f32::from_bits(self.bits())).find(|x| x.is_finite()).unwrap()
    }
}

/// The numbers at and beside every threshold and value times `absmax`, then absmax itself.
pub fn around_thresholds(codebook: &Codebook, absmax: f32, next: impl Fn(f32) -> [f32; 5]) -> Vec<f32> {
    let points = codebook.thresholds().into_iter().chain(codebook.values());
    points.flat_map(|point| next(point * absmax)).chain([absmax, -absmax]).map(|x| x.clamp(-absmax, absmax)).collect()
}

/// A number and its four nearest neighbours.
pub fn next_f32s(x: f32) -> [f32; 5] {
    [x.next_down().next_down(), x.next_down(), x, x.next_up(), x.next_up().next_up()]
}

/// A number cut to bf16, and its four nearest neighbours there.
pub fn next_bf16s(x: f32) -> [f32; 5] {
    let magnitude = (x.to_bits() >> 16 & 0x7fff) as i32;
    let rank = if x.is_sign_negative() { -magnitude } else { magnitude };
    [-2, -1, 0, 1, 2].map(|by| f32::from_bits((rank + by).unsigned_abs() << 16).copysign((rank + by) as f32))
}

/// Elements in whole blocks, each beginning with `absmax`: a block only sees the absmax that stands in it.
pub fn with_absmax(elements: &[u8], absmax: f32, size: u32, dtype: FloatDtype) -> Vec<u8> {
    let room = (size as usize - 1) * dtype.size();
    let pad = |block: &[u8]| [&encode_one(dtype, absmax)[..], block, &vec![0; room - block.len()]].concat();
    elements.chunks(room).flat_map(pad).collect()
}
