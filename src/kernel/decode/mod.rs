//! Decoding: stored codes back to floats, byte for byte as the libraries that wrote them do it.
//!
//! Every rule is "a value times a scale, in f32, rounded once": to nearest, ties to even, infinite past the largest
//! number. What differs is how the scale comes about. The dtype that the references decode to:
//!
//! | coding | dtype |
//! | --- | --- |
//! | [`Coding::Blocks`] | the quant_state's, which was the source's |
//! | [`Coding::Int`] | the scales', which was the source's |
//! | [`Coding::Nvfp4`], [`Coding::Mxfp4`] | bf16, whatever the source was |
//! | [`Coding::Nvfp4ModelOpt`], [`Coding::Mxfp4GptOss`], [`Coding::Fp8`] | the client's choice: the model's |
//!
//! A NaN is written as the dtype's plain one (bf16 0x7fc0, f16 0x7e00, f32 0x7fc00000). Its bits in the references depend
//! on the processor.

mod blocks;
mod fp4;
mod fp8;
mod int;
mod nibbles;
mod round;

pub use blocks::restore_absmax;

use std::ops::Range;

use crate::format::{BlockFormat, FloatDtype};

/// How the elements of a row are stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Coding {
    /// bitsandbytes'. A row is the whole tensor, flattened; scales are absmax, f32, one a block; the even element is in the
    /// high half of a byte.
    Blocks {
        /// NF4 or FP4.
        format: BlockFormat,
        /// Elements that share one absmax.
        block_size: usize,
    },
    /// Integers of four bits, stored with 8 added, times a scale of the dtype decoded to. With zero points, one byte of 0 to
    /// 15 a group, that is what is taken off in place of 8.
    Int {
        /// Columns that share a scale.
        group: usize,
    },
    /// E2M1 floats in groups of 16, times an E4M3 scale over the tensor's.
    Nvfp4 {
        /// What scales are divided by.
        global_scale: f32,
    },
    /// The same as ModelOpt stores it: scales are multiplied by the tensor's.
    Nvfp4ModelOpt {
        /// What scales are multiplied by.
        scale_2: f32,
    },
    /// E2M1 floats in groups of 32, times a power of two (E8M0). The byte 255 is infinity.
    Mxfp4,
    /// The same in gpt-oss's blocks; differs in the byte 255, which is 2^128: the half of it is still a number.
    Mxfp4GptOss,
    /// E4M3 floats, one a byte, times their block's scale.
    Fp8 {
        /// Columns that share a scale.
        block: usize,
        /// How scales are stored.
        scale: ScaleDtype,
    },
}

/// How the scales of [`Coding::Fp8`] are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleDtype {
    /// IEEE single precision, little-endian.
    F32,
    /// bfloat16, little-endian.
    Bf16,
    /// Powers of two in safetensors' own dtype: 2^(byte - 127), and 255 is NaN.
    E8m0,
    /// The same as plain bytes, which clients raise two to: 255 is infinity.
    U8,
}

impl Coding {
    /// Elements that share a scale.
    pub fn group(self) -> usize {
        match self {
            Coding::Blocks { block_size, .. } => block_size,
            Coding::Int { group } => group,
            Coding::Nvfp4 { .. } | Coding::Nvfp4ModelOpt { .. } => 16,
            Coding::Mxfp4 | Coding::Mxfp4GptOss => 32,
            Coding::Fp8 { block, .. } => block,
        }
    }

    /// Bytes of a scale, for elements decoded to `dtype`.
    pub fn scale_size(self, dtype: FloatDtype) -> usize {
        match self {
            Coding::Blocks { .. } | Coding::Fp8 { scale: ScaleDtype::F32, .. } => 4,
            Coding::Int { .. } => dtype.size(),
            Coding::Fp8 { scale: ScaleDtype::Bf16, .. } => 2,
            _ => 1,
        }
    }

    /// The byte of a row that holds the code of `column`.
    pub fn code_byte(self, column: usize) -> usize {
        if matches!(self, Coding::Fp8 { .. }) { column } else { column / 2 }
    }
}

/// A run of a row's elements: what they are decoded from, and where they go.
pub struct Row<'a> {
    /// How the row is stored.
    pub coding: Coding,
    /// The dtype decoded to.
    pub dtype: FloatDtype,
    /// The column of the first element.
    pub first: usize,
    /// Codes, from the byte that holds `first`'s on.
    pub codes: &'a [u8],
    /// Scales, from that of the group that holds `first` on.
    pub scales: &'a [u8],
    /// Zero points, likewise; empty where there are none.
    pub zero_points: &'a [u8],
    /// Out: elements of `dtype`, little-endian.
    pub into: &'a mut [u8],
}

impl Row<'_> {
    fn check_lengths(&self) {
        let Row { coding, dtype, first, .. } = *self;
        let (elements, group) = (self.into.len() / dtype.size(), coding.group());
        assert!(group > 0, "group: not empty");
        assert_eq!(self.into.len(), elements * dtype.size(), "into: not whole elements");
        let Some(last) = (first + elements).checked_sub(1).filter(|_| elements > 0) else { return };
        let groups = last / group - first / group + 1;
        assert!(self.codes.len() > coding.code_byte(last) - coding.code_byte(first), "codes: length");
        assert!(self.scales.len() >= groups * coding.scale_size(dtype), "scales: length");
        assert!(self.zero_points.is_empty() || self.zero_points.len() >= groups, "zero_points: length");
    }
}

/// Decodes a run of elements.
///
/// # Panics
/// When a slice is too short for [`Row::into`], or that is not whole elements.
pub fn decode(row: Row<'_>) {
    row.check_lengths();
    match row.dtype {
        FloatDtype::Bfloat16 => to_elements(row, round::bfloat16),
        FloatDtype::Float16 => to_elements(row, round::float16),
        FloatDtype::Float32 => to_elements(row, round::float32),
    }
}

/// [`decode`] for elements of `SIZE` bytes, which `round` makes.
fn to_elements<const SIZE: usize>(row: Row<'_>, round: impl Fn(f32) -> [u8; SIZE]) {
    let Row { coding, first, codes, scales, zero_points, .. } = row;
    let (into, _) = row.into.as_chunks_mut();
    let group = coding.group();
    match coding {
        Coding::Blocks { format, .. } => {
            let values = |i| blocks::values(format, scales, i);
            nibbles::decode::<SIZE, true>(Run { first, group, codes, into }, values, round);
        }
        Coding::Int { .. } => {
            let values = |i| int::values(row.dtype, scales, zero_points, i);
            nibbles::decode::<SIZE, false>(Run { first, group, codes, into }, values, round);
        }
        Coding::Fp8 { scale, .. } => {
            fp8::decode(Run { first, group, codes, into }, |i| fp8::scale(scale, scales, i), round)
        }
        _ => {
            let values = |i: usize| fp4::values(coding, scales[i]);
            nibbles::decode::<SIZE, false>(Run { first, group, codes, into }, values, round);
        }
    }
}

/// A run of elements to decode, and what they have in common whatever the coding.
struct Run<'a, const SIZE: usize> {
    first: usize,
    group: usize,
    codes: &'a [u8],
    into: &'a mut [[u8; SIZE]],
}

impl<const SIZE: usize> Run<'_, SIZE> {
    /// The columns, cut where groups end.
    fn groups(&self) -> impl Iterator<Item = Range<usize>> + use<SIZE> {
        let (mut start, end, group) = (self.first, self.first + self.into.len(), self.group);
        let mut boundary = (start / group).saturating_add(1).saturating_mul(group);
        std::iter::from_fn(move || {
            let columns = start..end.min(boundary);
            boundary = boundary.saturating_add(group);
            start = columns.end;
            (!columns.is_empty()).then_some(columns)
        })
    }
}
