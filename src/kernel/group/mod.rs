//! Group quantization: 4-bit formats with one scale for each run of consecutive columns of a row.
//!
//! Rules and rounding are those of llm-compressor 0.14.0.1 with compressed-tensors 0.19.0 on a CPU, which the golden tests
//! hold; ModelOpt 0.47.0's for ModelOpt's layout of NVFP4. [`scalar`] is the specification.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod batches;
pub(crate) mod scalar;
mod vector;
#[cfg(target_arch = "x86_64")]
mod x86;

use super::lanes::Portable;
use super::{BlockErrors, Isa, Kernel, NonFinite};
use crate::dtype::FloatDtype;
use crate::format::{Codec, Coding, TensorScale};

/// The scale of the scales of a tensor, or of all that share one, with this absmax: [`scalar::global_scale`] where scales are
/// divided by it in decoding, [`scalar::scale_2`] where they are multiplied.
pub fn tensor_scale(codec: &Codec, absmax: f32, dtype: FloatDtype) -> f32 {
    match codec.tensor_scale(1.0) {
        Some(TensorScale::Factor(_)) => scalar::scale_2(absmax),
        Some(TensorScale::Divisor(_)) | None => scalar::global_scale(absmax, dtype),
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
    /// How they are coded; the length of groups divides `columns`.
    pub coding: Coding,
    /// Out: codes, the first element's in the lowest bits; [`Coding::packed_row`] bytes per row.
    pub packed: &'a mut [u8],
    /// Out: one scale per group, as stored: the source's dtype, E4M3 or E8M0.
    pub scales: &'a mut [u8],
    /// Out, where groups have them: one zero point per group, 0 to 15; else empty.
    pub zero_points: &'a mut [u8],
    /// Out: one figure per group; absmax is the scale that decoding multiplies by, and `t` an element over it.
    pub figures: BlockErrors<'a>,
}

impl Groups<'_> {
    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.source.len() / (self.columns * self.dtype.size())
    }

    fn check_lengths(&self) {
        let rows = self.rows();
        assert!(self.coding.group > 0 && self.columns.is_multiple_of(self.coding.group), "group: divides columns");
        let groups = rows * (self.columns / self.coding.group);
        assert_eq!(self.source.len(), rows * self.columns * self.dtype.size(), "source: not whole rows");
        assert_eq!(self.packed.len(), rows * self.coding.packed_row(self.columns), "packed: length");
        assert_eq!(self.scales.len(), groups * self.coding.scale_size(self.dtype), "scales: length");
        let points = if self.coding.has_zero_points() { groups } else { 0 };
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
            Isa::Portable => vector::absmax(source, dtype),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::Avx512 => x86::absmax_avx2(source, dtype),
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
            Isa::Portable => vector::quantize::<Portable>(groups),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::quantize_avx2(groups),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => x86::quantize_avx512(groups),
        }
    }
}
