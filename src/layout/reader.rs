//! Reading a quantized weight back: what its tensors say, whatever the layout.

use crate::checkpoint::TensorInfo;
use crate::dtype::{self, FloatDtype};
use crate::error::{Error, Result};
use crate::format::Coding;
use crate::layout::OutputKind;

/// A quantized weight in a checkpoint: headers, and the content of small tensors.
pub trait StoredWeight {
    /// The header of its tensor of this kind.
    fn info(&self, kind: OutputKind) -> Result<&TensorInfo>;
    /// All bytes of its tensor of this kind, if these are `most` at most.
    fn bytes(&mut self, kind: OutputKind, most: u64) -> Result<Vec<u8>>;
    /// The error that it isn't what it should be.
    fn malformed(&self, why: String) -> Error;
}

/// What a quantized weight's tensors say of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// Its shape.
    pub shape: Vec<u64>,
    /// What the layout's own library decodes it to.
    pub dtype: FloatDtype,
    /// What codes and scales mean.
    pub coding: Coding,
    /// Rows of codes with scales of their own.
    pub rows: u64,
    /// Elements of such a row.
    pub columns: u64,
    /// The mean that was taken off absmax, with double quantization.
    pub nested_offset: Option<f32>,
    /// Whether the model has each matrix with rows and columns exchanged.
    pub transposed: bool,
}

impl Stored {
    /// Of a weight of groups with this shape: a row is its last dimension.
    pub(super) fn of_rows(
        weight: &dyn StoredWeight,
        shape: Vec<u64>,
        dtype: FloatDtype,
        coding: impl FnOnce(u64) -> Coding,
    ) -> Result<Stored> {
        let (Some(elements @ 1..), Some(&columns)) = (dtype::elements(&shape), shape.last()) else {
            let codes = weight.info(OutputKind::Packed)?;
            return Err(weight.malformed(format!("a shape of {shape:?}: {:?} has {:?}", codes.name, codes.shape)));
        };
        let (coding, rows) = (coding(columns), elements / columns);
        Ok(Stored { shape, dtype, coding, rows, columns, nested_offset: None, transposed: false })
    }
}

/// The one f32 that the weight's tensor of this kind holds.
pub(super) fn number(weight: &mut dyn StoredWeight, kind: OutputKind) -> Result<f32> {
    let bytes = weight.bytes(kind, 4)?;
    let number = <[u8; 4]>::try_from(&bytes[..]).map(f32::from_le_bytes);
    number.map_err(|_| weight.malformed(format!("its {kind:?} has {} bytes, expected one f32", bytes.len())))
}
