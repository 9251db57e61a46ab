//! Decoding: stored codes back to floats, byte for byte as the libraries that wrote them do it.
//!
//! Every rule is "a value times a scale, in f32, rounded once": to nearest, ties to even, infinite past the largest
//! number. What differs is how the scale comes about. The dtype that the references decode to:
//!
//! | elements and scales | dtype |
//! | --- | --- |
//! | codebooks | the quant_state's, which was the source's |
//! | integers | the scales', which was the source's |
//! | E2M1, in compressed-tensors' layout | bf16, whatever the source was |
//! | E2M1, in ModelOpt's and gpt-oss's; E4M3 | the client's choice: the model's |
//!
//! A NaN is written as the dtype's plain one (bf16 0x7fc0, f16 0x7e00, f32 0x7fc00000). Its bits in the references depend
//! on the processor.

mod absmax;
#[cfg(target_arch = "x86_64")]
mod avx2;
mod codebook;
mod e2m1;
mod e4m3;
mod int;
mod nibbles;
mod ordered;
pub(super) mod round;
mod scale;

pub use absmax::restore_absmax;
#[cfg(feature = "cuda")]
pub(crate) use scale::scale_values;

use std::ops::Range;

use nibbles::{LookUp, OneByOne};
use scale::Scales;

use super::{Isa, Kernel};
use crate::dtype::FloatDtype;
use crate::format::{Coding, ElementCode, ScaleCode};

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
    /// Where columns of one group don't stand together, which group each is in. Scales and zero points are then all of the row's.
    pub order: Option<Order<'a>>,
    /// Out: elements of `dtype`, little-endian.
    pub into: &'a mut [u8],
}

/// The groups of a row's columns in any order.
#[derive(Clone, Copy)]
pub struct Order<'a> {
    /// Groups of the row.
    pub groups: usize,
    /// The group of each column, from `first` on.
    pub of_columns: &'a [u32],
}

impl Row<'_> {
    fn check_lengths(&self) {
        let Row { coding, dtype, first, .. } = *self;
        let (elements, group) = (self.into.len() / dtype.size(), coding.group);
        assert!(group > 0, "group: not empty");
        assert_eq!(self.into.len(), elements * dtype.size(), "into: not whole elements");
        let Some(last) = (first + elements).checked_sub(1).filter(|_| elements > 0) else { return };
        let groups = match self.order {
            None => last / group - first / group + 1,
            Some(Order { groups, of_columns }) => {
                assert!(matches!(coding.element, ElementCode::Int { .. }), "order: of integers only");
                assert!(of_columns.len() >= elements, "order: length");
                groups
            }
        };
        assert!(self.codes.len() > coding.code_byte(last) - coding.code_byte(first), "codes: length");
        assert!(self.scales.len() >= groups * coding.scale_size(dtype), "scales: length");
        assert!(self.zero_points.is_empty() || self.zero_points.len() >= groups, "zero_points: length");
    }
}

impl Kernel {
    /// Decodes a run of elements.
    ///
    /// # Panics
    /// When a slice is too short for [`Row::into`], or that is not whole elements.
    pub fn decode(self, row: Row<'_>) {
        row.check_lengths();
        match self.0 {
            Isa::Scalar | Isa::Portable => decode_by::<OneByOne>(row),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::Avx512 => avx2::decode(row),
        }
    }
}

/// [`Kernel::decode`], inlined into a function with an instruction set.
#[inline(always)]
fn decode_by<L: LookUp>(row: Row<'_>) {
    match row.dtype {
        FloatDtype::Bfloat16 => to_elements::<L, 2>(row, round::bfloat16),
        FloatDtype::Float16 => to_elements::<L, 2>(row, round::float16),
        FloatDtype::Float32 => to_elements::<L, 4>(row, round::float32),
    }
}

/// [`decode_by`] for elements of `SIZE` bytes, which `round` makes.
#[inline(always)]
fn to_elements<L: LookUp, const SIZE: usize>(row: Row<'_>, round: impl Fn(f32) -> [u8; SIZE]) {
    let Row { coding, first, codes, scales, zero_points, order, .. } = row;
    let (into, _) = row.into.as_chunks_mut();
    let run = Run { first, group: coding.group, codes, into };
    let scales = Scales { coding, dtype: row.dtype, bytes: scales };
    if let Some(order) = order {
        let values = |i| int::values(scales.of(i), zero_points.get(i).copied());
        return ordered::decode(run, order, values, round);
    }
    match coding.element {
        ElementCode::Codebook(codebook) => {
            let values = codebook::values(codebook);
            nibbles::decode::<L, SIZE, true>(run, |i| nibbles::times(&values, scales.of(i)), round);
        }
        ElementCode::Int { .. } => {
            let values = |i| int::values(scales.of(i), zero_points.get(i).copied());
            nibbles::decode::<L, SIZE, false>(run, values, round);
        }
        ElementCode::E2m1 if coding.scale == ScaleCode::E4m3 => {
            let nvfp4 = e2m1::Nvfp4::new(coding.tensor_scale);
            nibbles::decode::<L, SIZE, false>(run, |i| nvfp4.values(scales.bytes[i]), round);
        }
        ElementCode::E2m1 => nibbles::decode::<L, SIZE, false>(run, |i| e2m1::values(scales, i), round),
        ElementCode::E4m3 => e4m3::decode(run, scales, round),
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
