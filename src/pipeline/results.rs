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
        if first == 0 {
            self.constants(tensor_scale)?;
        }
        let (codec, columns) = (self.codec, self.tensor.columns());
        let before = codec.packed_len(first, columns);
        self.files.write(encoded.packed, self.offset(OutputKind::Packed) + before)?;
        let first_group = first / codec.block_len(columns);
        let mut absmax = None;
        if codec.double_quant() {
            absmax = Some((first_group as usize, encoded.figures.absmax.to_vec()));
        } else if codec.is_blocks() {
            self.floats(encoded.figures.absmax, OutputKind::Absmax, first_group)?;
        } else {
            let scale_size = codec.scale_size(self.dtype) as u64;
            self.files.write(encoded.scales, self.offset(OutputKind::Scale) + first_group * scale_size)?;
        }
        if codec.has_zero_points() {
            self.zero_points(first, encoded.zero_points)?;
        }
        let mut gathering = Box::<StatsAccumulator>::default();
        gathering.add(&encoded.figures);
        Ok(Done::Quantized { gathering, absmax })
    }

    /// Zero points of whole rows that start at an element.
    fn zero_points(&mut self, first: u64, points: &[u8]) -> Result<()> {
        let columns = self.tensor.columns();
        let per_row = columns / self.codec.block_len(columns);
        pack_zero_points(points, per_row as usize, self.bytes);
        let before = first / columns / ZERO_POINT_ROWS * per_row * 4;
        self.files.write(self.bytes, self.offset(OutputKind::ZeroPoint) + before)
    }

    /// The outputs that are known without the weights.
    fn constants(&mut self, tensor_scale: Option<f32>) -> Result<()> {
        if let Scales::Blocks { codebook, double_quant, .. } = self.codec.scales {
            self.floats(&codebook.values(), OutputKind::QuantMap, 0)?;
            return match double_quant {
                true => self.floats(dynamic_map().values(), OutputKind::NestedQuantMap, 0),
                false => self.quant_state(0.0),
            };
        }
        for output in &self.tensor.outputs {
            match (output.kind, tensor_scale) {
                (Some(OutputKind::Shape), _) => self.files.write(&shape_bytes(&self.tensor.shape), output.offset)?,
                (Some(OutputKind::GlobalScale), Some(scale)) => {
                    self.files.write(&scale.to_le_bytes(), output.offset)?;
                }
                (Some(OutputKind::GlobalScale), None) => {
                    let name = &self.tensor.name;
                    return Err(Error::internal(format!("tensor {name:?} was quantized without its set's scale")));
                }
                _ => {}
            }
        }
        Ok(())
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
