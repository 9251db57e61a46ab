//! Codes of elements and scales: what kernels and decoders go by, whatever the format is called.

use super::Codebook;
use crate::dtype::FloatDtype;

/// What a code stands for, in units of its scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ElementCode {
    /// One of sixteen values from -1 to 1; as bitsandbytes stores them, the even element is in the high half of a byte.
    Codebook(&'static Codebook),
    /// An integer from -8 to 7, stored with 8 added.
    Int {
        /// Whether a group has an integer that is taken off: one of 0 to 15, in place of 8.
        zero_point: bool,
    },
    /// A float of four bits: sign, two bits of exponent, one of mantissa.
    E2m1,
    /// A float of eight bits. Only decoded: no format is made of it.
    E4m3,
}

/// What a scale is stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleCode {
    /// A float of this dtype, little-endian.
    Float(FloatDtype),
    /// A float of the weight's dtype, little-endian.
    SourceFloat,
    /// An f32 that is rounded to the dtype decoded to before codes are multiplied by it. Only decoded: no format has such.
    RoundedF32,
    /// A float of eight bits, with one scale more for the whole tensor.
    E4m3,
    /// A power of two, 2^(byte - 127).
    E8m0(Highest),
}

/// What E8M0's highest byte, 255, stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Highest {
    /// Infinity: 2^128, as an f32.
    Infinite,
    /// 2^128, of which the half is still a number.
    Finite,
    /// NaN.
    Nan,
}

/// The scale of a tensor's scales.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TensorScale {
    /// compressed-tensors': scales were multiplied by it, and are divided in decoding.
    Divisor(f32),
    /// ModelOpt's: scales were divided by it, and are multiplied in decoding.
    Factor(f32),
}

/// How a tensor's elements are coded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Coding {
    /// Its codes.
    pub element: ElementCode,
    /// Its scales.
    pub scale: ScaleCode,
    /// Elements of a row that share a scale; bitsandbytes' row is the whole tensor, flattened.
    pub group: usize,
    /// The scale of scales, with [`ScaleCode::E4m3`]; 1 if there is none.
    pub tensor_scale: Option<TensorScale>,
}

impl ElementCode {
    /// Bytes of a row's codes: integers are eight to an i32, of which a row fills whole ones.
    pub fn packed_row(self, columns: u64) -> u64 {
        match self {
            ElementCode::Int { .. } => columns.div_ceil(8) * 4,
            ElementCode::Codebook(_) | ElementCode::E2m1 => columns.div_ceil(2),
            ElementCode::E4m3 => columns,
        }
    }

    /// What a group's largest magnitude comes to, in units of a scale that uses all codes.
    pub fn largest(self) -> f32 {
        match self {
            ElementCode::Codebook(_) => 1.0,
            ElementCode::Int { .. } => 7.5,
            ElementCode::E2m1 => 6.0,
            ElementCode::E4m3 => 448.0,
        }
    }
}

impl ScaleCode {
    /// Bytes of a scale, of a weight in `dtype`.
    pub fn size(self, dtype: FloatDtype) -> usize {
        match self {
            ScaleCode::Float(_) | ScaleCode::SourceFloat => self.float_dtype(dtype).size(),
            ScaleCode::RoundedF32 => size_of::<f32>(),
            ScaleCode::E4m3 | ScaleCode::E8m0(_) => 1,
        }
    }

    /// The dtype of scales that are floats of a weight's dtypes, of a weight in `dtype`.
    pub fn float_dtype(self, dtype: FloatDtype) -> FloatDtype {
        if let ScaleCode::Float(own) = self { own } else { dtype }
    }
}

impl Coding {
    /// Without a scale of scales.
    pub const fn new(element: ElementCode, scale: ScaleCode, group: usize) -> Coding {
        Coding { element, scale, group, tensor_scale: None }
    }

    /// Whether groups have zero points.
    pub fn has_zero_points(self) -> bool {
        matches!(self.element, ElementCode::Int { zero_point: true })
    }

    /// Bytes of a row's codes.
    pub fn packed_row(self, columns: usize) -> usize {
        self.element.packed_row(columns as u64) as usize
    }

    /// Bytes of a scale, for elements of `dtype`.
    pub fn scale_size(self, dtype: FloatDtype) -> usize {
        self.scale.size(dtype)
    }

    /// The byte of a row that holds the code of `column`.
    pub fn code_byte(self, column: usize) -> usize {
        if self.element == ElementCode::E4m3 { column } else { column / 2 }
    }
}
