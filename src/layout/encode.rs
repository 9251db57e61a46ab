//! What a run of a weight comes to in each of its tensors: bytes, and their place.

use super::compressed_tensors::{ZERO_POINT_ROWS, pack_zero_points, shape_bytes};
use super::{OutputKind, QuantState, quant_state_bytes};
use crate::dtype::FloatDtype;
use crate::error::{Error, Result};
use crate::format::{Codec, NESTED_BLOCK_SIZE, Scales, dynamic_map};

/// A weight that is quantized.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weight<'w> {
    /// How.
    pub codec: &'w Codec,
    /// Its dtype.
    pub dtype: FloatDtype,
    /// Its shape.
    pub shape: &'w [u64],
}

/// What quantizing a run of it gave: whole blocks, groups or rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QuantizedRun<'r> {
    /// The run's first element in the weight.
    pub first: u64,
    /// Codes.
    pub packed: &'r [u8],
    /// As stored; of groups only.
    pub scales: &'r [u8],
    /// One per block or group.
    pub absmax: &'r [f32],
    /// One per group, for formats that have them.
    pub zero_points: &'r [u8],
    /// The scale of all scales, for formats that have it.
    pub tensor_scale: Option<f32>,
}

/// What quantizing a run of its absmax gave.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NestedRun<'r> {
    /// The run's first entry.
    pub first: usize,
    /// One byte an entry.
    pub codes: &'r [u8],
    /// One for every [`NESTED_BLOCK_SIZE`] entries.
    pub nested_absmax: &'r [f32],
    /// The mean that was taken off all entries.
    pub offset: f32,
}

/// Bytes for a tensor, and where in it they start.
pub(crate) type Placed<'b> = (u64, &'b [u8]);

impl Weight<'_> {
    /// What a run gives to the weight's tensor of a kind. What doesn't depend on the weights' values comes with the first run,
    /// and nothing for what waits until all absmax are known.
    ///
    /// # Errors
    /// When the scale of all scales is missing; that is a defect.
    pub(crate) fn encode<'b>(
        &self,
        kind: OutputKind,
        run: &QuantizedRun<'b>,
        buffer: &'b mut Vec<u8>,
    ) -> Result<Option<Placed<'b>>> {
        let Weight { codec, dtype, shape } = *self;
        let columns = shape.last().copied().unwrap_or(1);
        let group = run.first / codec.block_len(columns);
        buffer.clear();
        let at = match kind {
            OutputKind::Packed => return Ok(Some((codec.packed_len(run.first, columns), run.packed))),
            OutputKind::Scale => return Ok(Some((group * codec.scale_size(dtype) as u64, run.scales))),
            OutputKind::ZeroPoint => {
                let per_row = columns / codec.block_len(columns);
                pack_zero_points(run.zero_points, per_row as usize, buffer);
                run.first / columns / ZERO_POINT_ROWS * per_row * 4
            }
            OutputKind::Absmax if !codec.double_quant() => {
                put(run.absmax, buffer);
                group * 4
            }
            OutputKind::Absmax | OutputKind::NestedAbsmax => return Ok(None),
            OutputKind::QuantState if codec.double_quant() => return Ok(None),
            _ if run.first > 0 => return Ok(None),
            OutputKind::QuantMap => {
                let Scales::Blocks { codebook, .. } = codec.scales else {
                    return Err(Error::internal("a weight of groups has a codebook among its tensors".to_owned()));
                };
                put(&codebook.values(), buffer);
                0
            }
            OutputKind::NestedQuantMap => {
                put(dynamic_map().values(), buffer);
                0
            }
            OutputKind::QuantState => {
                *buffer = quant_state_bytes(&QuantState { codec, dtype, shape, nested_offset: 0.0 });
                0
            }
            OutputKind::Shape => {
                *buffer = shape_bytes(shape);
                0
            }
            OutputKind::GlobalScale => {
                let missing = || Error::internal("a weight was quantized without the scale of its scales".to_owned());
                put(&[run.tensor_scale.ok_or_else(missing)?], buffer);
                0
            }
        };
        Ok(Some((at, buffer)))
    }

    /// The same of a run of absmax, with double quantization.
    pub(crate) fn encode_nested<'b>(
        &self,
        kind: OutputKind,
        run: &NestedRun<'b>,
        buffer: &'b mut Vec<u8>,
    ) -> Option<Placed<'b>> {
        let Weight { codec, dtype, shape } = *self;
        match kind {
            OutputKind::Absmax => Some((run.first as u64, run.codes)),
            OutputKind::NestedAbsmax => {
                buffer.clear();
                put(run.nested_absmax, buffer);
                Some(((run.first / NESTED_BLOCK_SIZE * 4) as u64, buffer))
            }
            OutputKind::QuantState if run.first == 0 => {
                *buffer = quant_state_bytes(&QuantState { codec, dtype, shape, nested_offset: run.offset });
                Some((0, buffer))
            }
            OutputKind::QuantState => None,
            // These don't wait for it.
            OutputKind::Packed
            | OutputKind::QuantMap
            | OutputKind::NestedQuantMap
            | OutputKind::Scale
            | OutputKind::GlobalScale
            | OutputKind::ZeroPoint
            | OutputKind::Shape => None,
        }
    }
}

/// Appends numbers as they stand in files.
fn put(values: &[f32], buffer: &mut Vec<u8>) {
    let start = buffer.len();
    buffer.resize(start + size_of_val(values), 0);
    for (bytes, value) in buffer[start..].as_chunks_mut().0.iter_mut().zip(values) {
        *bytes = value.to_le_bytes();
    }
}
