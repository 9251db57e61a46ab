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

pub use crate::format::{Coding, ScaleDtype};

use crate::dtype::FloatDtype;

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
        Coding::Blocks { codebook, .. } => {
            let values = |i| blocks::values(codebook, scales, i);
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
