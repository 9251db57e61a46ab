//! Putting what quantizing gave where the plan has it.

use super::files::Files;
use super::scheduler::Done;
use crate::dtype::FloatDtype;
use crate::error::Result;
use crate::format::{Codec, NESTED_BLOCK_SIZE, dynamic_map};
use crate::kernel::BlockErrors;
use crate::kernel::block::nested;
use crate::layout::compressed_tensors::pack_zero_points;
use crate::layout::{OutputKind, QuantState, ZERO_POINT_ROWS, quant_state_bytes, shape_bytes};
use crate::plan::PlannedTensor;
use crate::stats::{AbsmaxAccumulator, StatsAccumulator};

/// One tensor's places in the output file that is open.
pub struct Results<'x, 'j, 'a> {
    pub files: &'x Files<'j, 'a>,
    pub tensor: &'x PlannedTensor,
    pub dtype: FloatDtype,
    /// f32 as they stand in the file; a buffer.
    pub encoded: &'x mut Vec<u8>,
}

/// What a run of groups came to.
pub struct GroupRun<'x> {
    /// The run's first element in the tensor.
    pub first_element: u64,
    pub packed: &'x [u8],
    /// As stored.
    pub scales: &'x [u8],
    /// One a group, 0 to 15; none for formats without them.
    pub zero_points: &'x [u8],
    pub figures: BlockErrors<'x>,
}

impl Results<'_, '_, '_> {
    /// A run of blocks that starts at an element: codes, absmax and what is known without the weights.
    pub fn quantized(
        &mut self,
        codec: &Codec,
        first_element: u64,
        packed: &[u8],
        figures: &BlockErrors<'_>,
    ) -> Result<Done> {
        if first_element == 0 {
            self.constants(codec)?;
        }
        self.files.write(packed, self.offset(OutputKind::Packed) + first_element / 2)?;
        let first_block = first_element / codec.block_len(0);
        let absmax = if codec.double_quant() {
            Some((first_block as usize, figures.absmax.to_vec()))
        } else {
            self.floats(figures.absmax, OutputKind::Absmax, first_block)?;
            None
        };
        let mut gathering = Box::<StatsAccumulator>::default();
        gathering.add(figures);
        Ok(Done::Quantized { gathering, absmax })
    }

    /// A run of groups that starts at an element, and what is known without the weights.
    pub fn grouped(&mut self, codec: &Codec, tensor_scale: Option<f32>, run: &GroupRun<'_>) -> Result<Done> {
        let GroupRun { first_element, packed, scales, zero_points, figures } = run;
        if *first_element == 0 {
            self.group_constants(tensor_scale)?;
        }
        let columns = self.tensor.columns();
        let before = codec.packed_len(*first_element, columns);
        self.files.write(packed, self.offset(OutputKind::Packed) + before)?;
        let (group, scale_size) = (codec.block_len(columns), (scales.len() / figures.absmax.len()) as u64);
        self.files.write(scales, self.offset(OutputKind::Scale) + first_element / group * scale_size)?;
        if codec.has_zero_points() {
            let per_row = (columns / group) as usize;
            pack_zero_points(zero_points, per_row, self.encoded);
            let before = first_element / columns / ZERO_POINT_ROWS * per_row as u64 * 4;
            self.files.write(self.encoded, self.offset(OutputKind::ZeroPoint) + before)?;
        }
        let mut gathering = Box::<StatsAccumulator>::default();
        gathering.add(figures);
        Ok(Done::Quantized { gathering, absmax: None })
    }

    /// The outputs that are known without the weights.
    fn group_constants(&self, tensor_scale: Option<f32>) -> Result<()> {
        for output in &self.tensor.outputs {
            match (output.kind, tensor_scale) {
                (Some(OutputKind::Shape), _) => self.files.write(&shape_bytes(&self.tensor.shape), output.offset)?,
                (Some(OutputKind::GlobalScale), Some(scale)) => {
                    self.files.write(&scale.to_le_bytes(), output.offset)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// A run of quantized absmax that starts at entry `first`.
    pub fn nested(
        &mut self,
        codec: &Codec,
        first: usize,
        absmax: &[f32],
        offset: f32,
        codes: &[u8],
        nested_absmax: &[f32],
    ) -> Result<Done> {
        self.files.write(codes, self.offset(OutputKind::Absmax) + first as u64)?;
        self.floats(nested_absmax, OutputKind::NestedAbsmax, (first / NESTED_BLOCK_SIZE) as u64)?;
        if first == 0 {
            self.quant_state(codec, offset)?;
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

    /// The outputs that are known without the weights.
    fn constants(&mut self, codec: &Codec) -> Result<()> {
        if let Some(codebook) = codec.format.codebook() {
            self.floats(&codebook.values(), OutputKind::QuantMap, 0)?;
        }
        if codec.double_quant() {
            self.floats(dynamic_map().values(), OutputKind::NestedQuantMap, 0)
        } else {
            self.quant_state(codec, 0.0)
        }
    }

    fn quant_state(&self, codec: &Codec, nested_offset: f32) -> Result<()> {
        let state = QuantState { codec, dtype: self.dtype, shape: &self.tensor.shape, nested_offset };
        self.files.write(&quant_state_bytes(&state), self.offset(OutputKind::QuantState))
    }

    /// Puts `values` from entry `first` of an output on.
    fn floats(&mut self, values: &[f32], kind: OutputKind, first: u64) -> Result<()> {
        self.encoded.clear();
        self.encoded.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        self.files.write(self.encoded, self.offset(kind) + first * size_of::<f32>() as u64)
    }

    fn offset(&self, kind: OutputKind) -> u64 {
        self.tensor.output(kind).offset
    }
}
