//! The tensors that one weight becomes.

use std::borrow::Cow;

use crate::dtype::{Dtype, FloatDtype};

/// Which part of a quantized weight an output tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputKind {
    /// The codes, two per byte.
    Packed,
    /// One f32 per block; with double quantization its 8-bit code.
    Absmax,
    /// The codebook's sixteen values.
    QuantMap,
    /// One f32 for every 256 entries of absmax.
    NestedAbsmax,
    /// The dynamic map's 256 values.
    NestedQuantMap,
    /// JSON, as bytes.
    QuantState,
    /// One scale per group.
    Scale,
    /// One for all groups' scales.
    GlobalScale,
    /// Zero points, of eight rows in an integer.
    ZeroPoint,
    /// The weight's shape, as integers.
    Shape,
}

/// An output tensor's dtype.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputDtype {
    /// Bytes.
    U8,
    /// Four bytes, eight codes.
    I32,
    /// Integers.
    I64,
    /// 8-bit floats.
    F8E4M3,
    /// Floats of this dtype.
    Float(FloatDtype),
    /// The weight's own.
    Source,
}

impl OutputDtype {
    /// The dtype in headers, for a weight of dtype `source`.
    pub fn dtype(self, source: Dtype) -> Dtype {
        match self {
            OutputDtype::U8 => Dtype::U8,
            OutputDtype::I32 => Dtype::I32,
            OutputDtype::I64 => Dtype::I64,
            OutputDtype::F8E4M3 => Dtype::F8_E4M3,
            OutputDtype::Float(dtype) => dtype.dtype(),
            OutputDtype::Source => source,
        }
    }

    /// Whether it is this dtype for some weight.
    pub fn fits(self, found: Dtype) -> bool {
        match self {
            OutputDtype::Source => FloatDtype::of(found).is_some(),
            other => other.dtype(found) == found,
        }
    }
}

/// A tensor that quantizing a weight yields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputTensor {
    /// What it holds.
    pub kind: OutputKind,
    /// Appended to the weight's own name.
    pub suffix: Cow<'static, str>,
    /// Its dtype.
    pub dtype: OutputDtype,
    /// Its shape.
    pub shape: Vec<u64>,
}
