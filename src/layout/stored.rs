//! Telling from its tensors what format a weight is in.

use super::{OutputKind, OutputTensor};
use crate::checkpoint::TensorInfo;
use crate::dtype::{self, Dtype};
use crate::format::{Codec, CodecOptions, FORMATS, FormatSpec, Layout, QuantStorage, Sharing};

/// A format in one of its layouts, as files have it.
pub(crate) struct StoredFormat {
    /// The format in its layout; sizes that the format leaves open are the default's.
    pub codec: Codec,
    tensors: Vec<OutputTensor>,
}

impl StoredFormat {
    /// Every format in every layout, with double quantization and without.
    pub(crate) fn all() -> Vec<StoredFormat> {
        let layouts =
            |format: &FormatSpec| if format.layouts.is_empty() { &[Layout::CompressedTensors] } else { format.layouts };
        let all = FORMATS.iter().flat_map(|&format| layouts(format).iter().map(move |&layout| (format, layout)));
        let all = all.flat_map(|of| [false, true].map(|double_quant| (of, double_quant)));
        all.map(|((format, layout), double_quant)| {
            let codec = format.codec(CodecOptions { layout, double_quant, ..CodecOptions::default() });
            StoredFormat { codec, tensors: codec.tensors() }
        })
        .collect()
    }

    /// The weight whose codes this tensor is, and all that is beside them; `None` if its name or dtype is another, its scales are
    /// missing, or they are of groups of another size. `find` gives a checkpoint's tensors by name.
    pub(crate) fn parts<'a>(
        &self,
        codes: &'a TensorInfo,
        find: impl Fn(&str) -> Option<&'a TensorInfo>,
    ) -> Option<(&'a str, Vec<&'a TensorInfo>)> {
        let (own, others) = self.tensors.split_first()?;
        let is_stored_as = |storage: QuantStorage| storage.float().is_some_and(|float| float.dtype() == codes.dtype);
        let fits =
            own.dtype.fits(codes.dtype) || self.codec.is_blocks() && QuantStorage::ALL.into_iter().any(is_stored_as);
        let name = codes.name.strip_suffix(&*own.suffix).filter(|_| fits)?;
        let mut parts = Vec::new();
        for other in others {
            match find(&format!("{name}{}", other.suffix)) {
                // Moonshot AI wrote shapes as I32.
                Some(part) if other.kind == OutputKind::Shape && part.dtype == Dtype::I32 => parts.push(part),
                Some(part) if other.dtype.fits(part.dtype) && self.has_as_many(other.kind, part, codes) => {
                    parts.push(part)
                }
                // Constants may be left out.
                None if matches!(other.kind, OutputKind::Shape | OutputKind::QuantMap | OutputKind::NestedQuantMap) => {
                }
                _ => return None,
            }
        }
        Some((name, parts))
    }

    /// Whether there are as many scales as groups of the format's size, where it has one: formats may differ in that alone.
    fn has_as_many(&self, kind: OutputKind, part: &TensorInfo, codes: &TensorInfo) -> bool {
        match self.codec.format.sharing {
            Sharing::GroupsOf(columns) if kind == OutputKind::Scale => {
                let covered = dtype::elements(&part.shape).and_then(|scales| scales.checked_mul(columns.into()));
                covered.is_some() && covered == codes.len.checked_mul(2)
            }
            Sharing::GroupsOf(_) | Sharing::Groups | Sharing::Blocks => true,
        }
    }
}
