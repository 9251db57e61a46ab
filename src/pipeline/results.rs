//! Putting what quantizing gave where the plan has it.

use super::files::Files;
use super::scheduler::Done;
use crate::backend::Encoded;
use crate::dtype::FloatDtype;
use crate::error::{Error, Result};
use crate::format::{Codec, NESTED_BLOCK_SIZE, Scales, dynamic_map};
use crate::kernel::block::nested;
use crate::layout::compressed_tensors::pack_zero_points;
use crate::layout::{OutputKind, QuantState, ZERO_POINT_ROWS, quant_state_bytes, shape_bytes};
use crate::plan::PlannedTensor;
use crate::stats::{AbsmaxAccumulator, StatsAccumulator};

/// One tensor's places in the output file that is open.
pub struct Results<'x, 'j, 'a> {
    pub files: &'x Files<'j, 'a>,
    pub codec: &'x Codec,
    pub tensor: &'x PlannedTensor,
    pub dtype: FloatDtype,
    /// Numbers as they stand in the file; a buffer.
    pub bytes: &'x mut Vec<u8>,
}

impl Results<'_, '_, '_> {
    /// A run that starts at an element: codes, scales and what is known without the weights.
    pub fn quantized(&mut self, first: u64, tensor_scale: Option<f32>, encoded: &Encoded<'_>) -> Result<Done> {
        let Encoded { packed, scales, zero_points, figures, .. } = encoded;
        let run = QuantizedRun { first, packed, scales, absmax: figures.absmax, zero_points, tensor_scale };
        for output in &self.tensor.outputs {
            let Some(kind) = output.kind else { continue };
            if let Some((at, bytes)) = self.weight().encode(kind, &run, self.bytes)? {
                self.files.write(bytes, output.offset + at)?;
            }
        }
        let first_block = (first / self.codec.block_len(self.tensor.columns())) as usize;
        let absmax = self.codec.double_quant().then(|| (first_block, figures.absmax.to_vec()));
        let mut gathering = Box::<StatsAccumulator>::default();
        gathering.add(figures);
        Ok(Done::Quantized { gathering, absmax })
    }

    /// A run of quantized absmax that starts at entry `first`.
    pub fn nested(
        &mut self,
        first: usize,
        absmax: &[f32],
        offset: f32,
        codes: &[u8],
        nested_absmax: &[f32],
    ) -> Result<Done> {
        if !self.codec.double_quant() {
            let name = &self.tensor.name;
            return Err(Error::internal(format!(
                "absmax of tensor {name:?} were to be quantized, by a recipe that doesn't"
            )));
        }
        self.files.write(codes, self.offset(OutputKind::Absmax) + first as u64)?;
        self.floats(nested_absmax, OutputKind::NestedAbsmax, (first / NESTED_BLOCK_SIZE) as u64)?;
        if first == 0 {
            self.quant_state(offset)?;
        }
        let map = dynamic_map();
        let mut error = AbsmaxAccumulator::default();
        let blocks = absmax.chunks(NESTED_BLOCK_SIZE).zip(codes.chunks(NESTED_BLOCK_SIZE)).zip(nested_absmax);
        for ((absmax, codes), nested) in blocks {
            let restored = codes.iter().map(|&code| nested::restore(code, *nested, offset, map));
            error.add(absmax.iter().copied().zip(restored));
        }
        Ok(Done::Nested(error))
    }

    fn quant_state(&self, nested_offset: f32) -> Result<()> {
        let state = QuantState { codec: self.codec, dtype: self.dtype, shape: &self.tensor.shape, nested_offset };
        self.files.write(&quant_state_bytes(&state), self.offset(OutputKind::QuantState))
    }

    /// Puts `values` from entry `first` of an output on.
    fn floats(&mut self, values: &[f32], kind: OutputKind, first: u64) -> Result<()> {
        self.bytes.clear();
        self.bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        self.files.write(self.bytes, self.offset(kind) + first * size_of::<f32>() as u64)
    }

    fn offset(&self, kind: OutputKind) -> u64 {
        self.tensor.output(kind).offset
    }
}
