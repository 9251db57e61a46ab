//! Putting what quantizing gave where the plan has it.

use super::output_files::OutputFiles;
use super::scheduler::Done;
use crate::backend::Encoded;
use crate::dtype::FloatDtype;
use crate::error::{Error, Result};
use crate::format::{Codec, NESTED_BLOCK_SIZE, dynamic_map};
use crate::kernel::block::nested;
use crate::layout::{NestedRun, QuantizedRun, Weight};
use crate::plan::PlannedTensor;
use crate::stats::{AbsmaxAccumulator, StatsAccumulator};

/// One tensor's places in the output file that is in hand.
pub(crate) struct Results<'x, 'j, 'a> {
    pub files: &'x OutputFiles<'j, 'a>,
    pub codec: &'x Codec,
    pub tensor: &'x PlannedTensor,
    pub dtype: FloatDtype,
    /// Numbers as they stand in the file; a buffer.
    pub bytes: &'x mut Vec<u8>,
}

impl Results<'_, '_, '_> {
    /// A run that starts at an element: codes, scales and what is known without the weights.
    pub(crate) fn quantized(&mut self, first: u64, tensor_scale: Option<f32>, encoded: &Encoded<'_>) -> Result<Done> {
        let Encoded { packed, scales, zero_points, figures, .. } = encoded;
        let weight = Weight { codec: self.codec, dtype: self.dtype, shape: &self.tensor.shape };
        let run = QuantizedRun { first, packed, scales, absmax: figures.absmax(), zero_points, tensor_scale };
        for output in self.tensor.outputs.iter() {
            let Some(kind) = output.kind else { continue };
            if let Some((at, bytes)) = weight.encode(kind, &run, self.bytes)? {
                self.files.put(bytes, output.offset + at)?;
            }
        }
        let first_block = (first / self.codec.block_len(self.tensor.columns())) as usize;
        let absmax = self.codec.double_quant().then(|| (first_block, figures.absmax().to_vec()));
        let mut accumulator = Box::<StatsAccumulator>::default();
        accumulator.add(figures);
        Ok(Done::Quantized { accumulator, absmax })
    }

    /// A run of quantized absmax that starts at entry `first`.
    pub(crate) fn nested(
        &mut self,
        first: usize,
        absmax: &[f32],
        offset: f32,
        codes: &[u8],
        nested_absmax: &[f32],
    ) -> Result<AbsmaxAccumulator> {
        if !self.codec.double_quant() {
            let name = &self.tensor.name;
            return Err(Error::internal(format!(
                "absmax of tensor {name:?} were to be quantized, by a recipe that doesn't"
            )));
        }
        let weight = Weight { codec: self.codec, dtype: self.dtype, shape: &self.tensor.shape };
        let run = NestedRun { first, codes, nested_absmax, offset };
        for output in self.tensor.outputs.iter() {
            let Some(kind) = output.kind else { continue };
            if let Some((at, bytes)) = weight.encode_nested(kind, &run, self.bytes) {
                self.files.put(bytes, output.offset + at)?;
            }
        }
        let map = dynamic_map().values();
        let mut error = AbsmaxAccumulator::default();
        let blocks = absmax.chunks(NESTED_BLOCK_SIZE).zip(codes.chunks(NESTED_BLOCK_SIZE)).zip(nested_absmax);
        for ((absmax, codes), nested) in blocks {
            let restored = codes.iter().map(|&code| nested::restore(code, *nested, offset, map));
            error.add(absmax.iter().copied().zip(restored));
        }
        Ok(error)
    }
}
