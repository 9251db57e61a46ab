//! Group quantization: 4-bit formats with one scale for each run of consecutive columns of a row.
//!
//! Rules and rounding are those of llm-compressor 0.14.0.1 with compressed-tensors 0.19.0 on a CPU, which the golden tests
//! hold; ModelOpt 0.47.0's for [`GroupCoder::Nvfp4ModelOpt`]. [`scalar`] is the specification.

#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod scalar;
#[cfg(target_arch = "x86_64")]
mod vector;
#[cfg(target_arch = "x86_64")]
mod x86;

use super::{BlockErrors, Isa, Kernel, NonFinite};
use crate::dtype::FloatDtype;
use crate::format::{Codec, ElementCode, Layout, ScaleCode};

/// How a group's elements become codes and a scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum GroupCoder {
    /// Integers from -8 to 7 times a scale of the source's dtype.
    Int4,
    /// The same, less a zero point.
    Int4Asym,
    /// E2M1 floats times an E4M3 scale, over the tensor's `global_scale`; see [`scalar::global_scale`].
    Nvfp4 {
        /// What scales were multiplied by, and are divided by in decoding.
        global_scale: f32,
    },
    /// The same values as ModelOpt arrives at them: times an E4M3 scale, times `scale_2`.
    Nvfp4ModelOpt {
        /// The tensor's absmax over 6 · 448; see [`scalar::scale_2`].
        scale_2: f32,
    },
    /// E2M1 floats times a power of two (E8M0).
    Mxfp4,
}

impl GroupCoder {
    /// As `codec` has it; `tensor_scale` is [`scalar::global_scale`] or [`scalar::scale_2`], for NVFP4.
    pub fn new(codec: &Codec, tensor_scale: Option<f32>) -> GroupCoder {
        let scale = tensor_scale.unwrap_or(1.0);
        match (codec.format.element, codec.format.scale, codec.layout()) {
            (ElementCode::Int { zero_point: true }, ..) => GroupCoder::Int4Asym,
            (ElementCode::Int { .. }, ..) => GroupCoder::Int4,
            (_, ScaleCode::E4m3, Some(Layout::Modelopt)) => GroupCoder::Nvfp4ModelOpt { scale_2: scale },
            (_, ScaleCode::E4m3, _) => GroupCoder::Nvfp4 { global_scale: scale },
            _ => GroupCoder::Mxfp4,
        }
    }

    /// Whether codes are E2M1 floats, two a byte, and not integers, eight a little-endian i32.
    pub fn is_float(self) -> bool {
        !matches!(self, GroupCoder::Int4 | GroupCoder::Int4Asym)
    }

    /// Bytes of a row's codes: integers fill whole i32s.
    pub fn packed_row(self, columns: usize) -> usize {
        if self.is_float() { columns.div_ceil(2) } else { columns.div_ceil(8) * 4 }
    }

    /// Bytes of a group's scale as it is stored.
    pub fn scale_size(self, dtype: FloatDtype) -> usize {
        if self.is_float() { 1 } else { dtype.size() }
    }
}

/// NVFP4's scale of a tensor, or of all that share one, with this absmax: [`scalar::global_scale`], or [`scalar::scale_2`] in
/// ModelOpt's layout.
pub fn tensor_scale(codec: &Codec, absmax: f32, dtype: FloatDtype) -> f32 {
    match codec.layout() {
        Some(Layout::Modelopt) => scalar::scale_2(absmax),
        _ => scalar::global_scale(absmax, dtype),
    }
}

/// What a kernel is given: whole rows of one matrix, and where they go.
pub struct Groups<'a> {
    /// Elements as they stand in the file: little-endian, without any alignment.
    pub source: &'a [u8],
    /// The elements' dtype.
    pub dtype: FloatDtype,
    /// Elements of a row.
    pub columns: usize,
    /// Elements that share a scale; divides `columns`.
    pub group: usize,
    /// The format.
    pub scheme: GroupCoder,
    /// Out: codes, the first element's in the lowest bits; [`GroupCoder::packed_row`] bytes a row.
    pub packed: &'a mut [u8],
    /// Out: one scale a group, as stored: the source's dtype, E4M3 or E8M0.
    pub scales: &'a mut [u8],
    /// Out, for [`GroupCoder::Int4Asym`] alone: one zero point a group, 0 to 15, and empty for others.
    pub zero_points: &'a mut [u8],
    /// Out: one figure a group; absmax is the scale that decoding multiplies by, and `t` an element over it.
    pub figures: BlockErrors<'a>,
}

impl Groups<'_> {
    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.source.len() / (self.columns * self.dtype.size())
    }

    fn check_lengths(&self) {
        let rows = self.rows();
        assert!(self.group > 0 && self.columns.is_multiple_of(self.group), "group: divides columns");
        let groups = rows * (self.columns / self.group);
        assert_eq!(self.source.len(), rows * self.columns * self.dtype.size(), "source: not whole rows");
        assert_eq!(self.packed.len(), rows * self.scheme.packed_row(self.columns), "packed: length");
        assert_eq!(self.scales.len(), groups * self.scheme.scale_size(self.dtype), "scales: length");
        let points = if self.scheme == GroupCoder::Int4Asym { groups } else { 0 };
        assert_eq!(self.zero_points.len(), points, "zero_points: length");
        let BlockErrors { absmax, signal, noise, worst } = &self.figures;
        assert!([absmax, signal, noise, worst].iter().all(|f| f.len() == groups), "figures: length");
    }
}

impl Kernel {
    /// The largest magnitude among `source`'s elements, which are whole.
    ///
    /// # Errors
    /// [`NonFinite`] when one is a NaN or an infinity.
    pub fn absmax(self, source: &[u8], dtype: FloatDtype) -> Result<f32, NonFinite> {
        match self.0 {
            Isa::Scalar => scalar::absmax(source, dtype),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::absmax_avx2(source, dtype),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => x86::absmax_avx512(source, dtype),
        }
    }

    /// Quantizes whole rows.
    ///
    /// # Errors
    /// [`NonFinite`] when the source holds a NaN or an infinity; what was written then means nothing.
    ///
    /// # Panics
    /// When a slice's length is not what [`Groups`] says.
    pub fn quantize_groups(self, groups: Groups<'_>) -> Result<(), NonFinite> {
        groups.check_lengths();
        match self.0 {
            Isa::Scalar => scalar::quantize(groups),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::quantize_avx2(groups),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => x86::quantize_avx512(groups),
        }
    }
}
