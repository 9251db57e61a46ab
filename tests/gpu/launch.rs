//! The GPU's kernels on the CPU: a module's entry points, launched with buffers exactly as large as they must be, and
//! held to the specification.

use prequant::internal::backend::cuda::{THREADS, codebook_table, dynamic_map_table, sum_thread_blocks, thread_blocks};
use prequant::internal::format::{Codebook, NESTED_BLOCK_SIZE, dynamic_map, fp4, nf4};
use prequant::internal::kernel::block::nested;
use prequant::internal::kernel::{BlockErrors, Blocks, Kernel, SUMMED, quantize_any};
use prequant::internal::stats::GroupErrors;
use prequant::{BlockSize, FloatDtype};
use ptx_interpreter::{Entry, Fault, Memory, Module};

use crate::support::weights::{self, Output};

/// A `quantize_*` kernel's name.
pub fn kernel_name(dtype: FloatDtype, codebook: &'static Codebook) -> String {
    let book = if std::ptr::eq(codebook, &nf4::CODEBOOK) { "nf4" } else { "fp4" };
    assert!(book == "nf4" || std::ptr::eq(codebook, &fp4::CODEBOOK), "one of the two codebooks");
    let dtype = match dtype {
        FloatDtype::Bfloat16 => "bf16",
        FloatDtype::Float16 => "f16",
        FloatDtype::Float32 => "f32",
    };
    format!("quantize_{book}_{dtype}")
}

/// A parsed module, mutated or not.
pub struct Kernels(pub Module);

/// What double quantization gives: codes, and the nested absmax as bits.
pub type Nested = (Vec<u8>, Vec<u32>);

impl Kernels {
    pub fn parse(ptx: &str) -> Kernels {
        Kernels(Module::parse(ptx).unwrap())
    }

    pub fn entry(&self, name: &str) -> &Entry {
        self.0.entry(name).unwrap_or_else(|| panic!("no entry {name}"))
    }

    /// What the kernel makes of `source`, or what it did wrong on the way.
    pub fn quantize(
        &self,
        source: &[u8],
        dtype: FloatDtype,
        size: u32,
        codebook: &'static Codebook,
    ) -> Result<Output, Fault> {
        let elements = source.len() / dtype.size();
        let blocks = elements.div_ceil(size as usize);
        let mut memory = Memory::new();
        let from = upload(&mut memory, source)?;
        let table = upload(&mut memory, &little_endian(&codebook_table(codebook)))?;
        let packed = memory.allocate(elements.div_ceil(2));
        let figures: [u64; 4] = std::array::from_fn(|_| memory.allocate(4 * blocks));
        let mut params = vec![from.to_le_bytes().to_vec()];
        params.extend([elements as u32, size].map(|n| n.to_le_bytes().to_vec()));
        params.extend([table, packed].into_iter().chain(figures).map(|address| address.to_le_bytes().to_vec()));
        // Half as many as there could be, so that some take several shares of the blocks.
        let grid = [thread_blocks(blocks).div_ceil(2), 1, 1];
        self.entry(&kernel_name(dtype, codebook)).launch(&mut memory, grid, [THREADS, 1, 1], &params)?;

        let mut output = Output { packed: memory.read(packed, elements.div_ceil(2))?, figures: Default::default() };
        for (figure, address) in output.figures.iter_mut().zip(figures) {
            *figure = words(&memory.read(address, 4 * blocks)?);
        }
        Ok(output)
    }

    /// What the kernel makes of `absmax`, or what it did wrong on the way.
    pub fn quantize_absmax(&self, absmax: &[f32], offset: f32) -> Result<Nested, Fault> {
        let (count, blocks) = (absmax.len(), absmax.len().div_ceil(NESTED_BLOCK_SIZE));
        let mut memory = Memory::new();
        let bits: Vec<u32> = absmax.iter().map(|x| x.to_bits()).collect();
        let from = upload(&mut memory, &little_endian(&bits))?;
        let midpoints = upload(&mut memory, &little_endian(&dynamic_map_table()))?;
        let (codes, nested) = (memory.allocate(count), memory.allocate(4 * blocks));
        let mut params = vec![from.to_le_bytes().to_vec()];
        params.extend([count as u32, offset.to_bits()].map(|n| n.to_le_bytes().to_vec()));
        params.extend([midpoints, codes, nested].map(|address| address.to_le_bytes().to_vec()));
        let block = [NESTED_BLOCK_SIZE as u32, 1, 1];
        self.entry("quantize_absmax").launch(&mut memory, [blocks as u32, 1, 1], block, &params)?;
        Ok((memory.read(codes, count)?, words(&memory.read(nested, 4 * blocks)?)))
    }

    /// The sums of every 16 blocks' figures, absmax, signal, noise and worst; `None` where it says that an absmax is NaN.
    pub fn sum_figures(&self, figures: [&[f32]; 4]) -> Result<Vec<Option<GroupErrors>>, Fault> {
        let (blocks, count) = (figures[0].len(), figures[0].len().div_ceil(SUMMED));
        let mut memory = Memory::new();
        let mut params = Vec::new();
        for figure in figures {
            let bits: Vec<u32> = figure.iter().map(|x| x.to_bits()).collect();
            params.push(upload(&mut memory, &little_endian(&bits))?.to_le_bytes().to_vec());
        }
        let (sums, zeros) = (memory.allocate(24 * count), memory.allocate(count));
        params.push((blocks as u32).to_le_bytes().to_vec());
        params.extend([sums, zeros].map(|address| address.to_le_bytes().to_vec()));
        let grid = [sum_thread_blocks(blocks), 1, 1];
        self.entry("sum_figures").launch(&mut memory, grid, [THREADS, 1, 1], &params)?;
        let sums: Vec<f64> = doubles(&memory.read(sums, 24 * count)?);
        let zeros = memory.read(zeros, count)?;
        let of = |i: usize| GroupErrors {
            signal: sums[i],
            noise: sums[count + i],
            worst: sums[2 * count + i],
            zeros: zeros[i],
        };
        Ok((0..count).map(|i| (zeros[i] != 255).then(|| of(i))).collect())
    }

    /// Holds the sums of figures to the specification.
    pub fn check_sums(&self, figures: [&[f32]; 4]) -> Result<(), String> {
        let blocks = figures[0].len();
        let found = self.sum_figures(figures).map_err(|fault| format!("sum_figures of {blocks}: {fault}"))?;
        let bits = |sums: GroupErrors| {
            // One NaN is as good as another.
            let bits = |x: f64| if x.is_nan() { u64::MAX } else { x.to_bits() };
            ([sums.signal, sums.noise, sums.worst].map(bits), sums.zeros)
        };
        for (i, found) in found.into_iter().enumerate() {
            let group = figures.map(|figure| &figure[i * SUMMED..blocks.min((i + 1) * SUMMED)]);
            let has_nan = group[0].iter().any(|absmax| absmax.is_nan());
            let expected = (!has_nan).then(|| GroupErrors::of(group));
            if found.map(bits) != expected.map(bits) {
                return Err(format!("sum_figures of {blocks}: group {i} is {found:?}, expected {expected:?}"));
            }
        }
        Ok(())
    }

    /// Holds the kernel to the specification.
    pub fn check(
        &self,
        source: &[u8],
        dtype: FloatDtype,
        size: u32,
        codebook: &'static Codebook,
    ) -> Result<(), String> {
        let expected = weights::quantize(Kernel::SCALAR, source, dtype, size, codebook).unwrap();
        let wrong = match self.quantize(source, dtype, size, codebook) {
            Ok(found) => found.difference(&expected),
            Err(fault) => Some(fault.to_string()),
        };
        wrong.map_or(Ok(()), |wrong| {
            let name = kernel_name(dtype, codebook);
            Err(format!("{name}, {} elements, block size {size}: {wrong}", source.len() / dtype.size()))
        })
    }

    /// Holds the kernel to what it promises of weights with NaN or infinities.
    pub fn check_non_finite(
        &self,
        source: &[u8],
        dtype: FloatDtype,
        size: u32,
        codebook: &'static Codebook,
    ) -> Result<(), String> {
        let expected = quantize_whatever(source, dtype, size, codebook);
        let mut found = self.quantize(source, dtype, size, codebook).map_err(|fault| fault.to_string())?;
        for block in 0..expected.figures[0].len() {
            let [found_absmax, expected_absmax] = [&found, &expected].map(|o| f32::from_bits(o.figures[0][block]));
            if expected_absmax.is_finite() != found_absmax.is_finite() {
                return Err(format!("absmax of block {block} is {found_absmax:e}, expected {expected_absmax:e}"));
            }
            if !expected_absmax.is_finite() {
                // Nothing else is promised of this block.
                let bytes = size as usize / 2 * block..(size as usize / 2 * (block + 1)).min(found.packed.len());
                found.packed[bytes.clone()].copy_from_slice(&expected.packed[bytes]);
                for figure in 0..4 {
                    found.figures[figure][block] = expected.figures[figure][block];
                }
            }
        }
        found.difference(&expected).map_or(Ok(()), Err)
    }

    /// Holds double quantization to the specification.
    pub fn check_absmax(&self, absmax: &[f32], offset: f32) -> Result<(), String> {
        let (mut codes, mut nested) = (vec![0; absmax.len()], vec![0.0; absmax.len().div_ceil(NESTED_BLOCK_SIZE)]);
        nested::quantize(absmax, offset, dynamic_map(), &mut codes, &mut nested);
        let case = format!("quantize_absmax, {} numbers, offset {offset:e}", absmax.len());
        let found = self.quantize_absmax(absmax, offset).map_err(|fault| format!("{case}: {fault}"))?;
        if let Some(i) = (0..codes.len()).find(|&i| found.0[i] != codes[i]) {
            return Err(format!("{case}: code {i} is {}, expected {}", found.0[i], codes[i]));
        }
        match (0..nested.len()).find(|&i| found.1[i] != nested[i].to_bits()) {
            Some(i) => Err(format!("{case}: nested absmax {i} is {:e}", f32::from_bits(found.1[i]))),
            None => Ok(()),
        }
    }
}

/// What the specification makes of weights that may hold NaN and infinities.
fn quantize_whatever(source: &[u8], dtype: FloatDtype, size: u32, codebook: &'static Codebook) -> Output {
    let block_size = BlockSize::try_from(size).unwrap();
    let elements = source.len() / dtype.size();
    let blocks = elements.div_ceil(block_size.get());
    let mut packed = vec![0; elements.div_ceil(2)];
    let mut figures: [Vec<f32>; 4] = std::array::from_fn(|_| vec![0.0; blocks]);
    let [absmax, signal, noise, worst] = &mut figures;
    let figures_out = BlockErrors { absmax, signal, noise, worst };
    quantize_any(Blocks { source, dtype, block_size, codebook, packed: &mut packed, figures: figures_out });
    Output { packed, figures: figures.map(|figure| figure.iter().map(|x| x.to_bits()).collect()) }
}

pub fn upload(memory: &mut Memory, bytes: &[u8]) -> Result<u64, Fault> {
    let address = memory.allocate(bytes.len());
    memory.write(address, bytes)?;
    Ok(address)
}

fn little_endian(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn doubles(bytes: &[u8]) -> Vec<f64> {
    bytes.as_chunks().0.iter().map(|&number| f64::from_le_bytes(number)).collect()
}

pub fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect()
}
