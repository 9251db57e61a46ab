//! Which of a source's tensors are codes, in which format, and what stands beside them: from headers and config.json alone.

use std::borrow::Cow;
use std::collections::HashSet;

use super::integers::{Integers, Packing};
use crate::checkpoint::{Source, TensorInfo};
use crate::converted::{FoundWeight, stored_weight};
use crate::dtype::Dtype;
use crate::layout::StoredFormat;
use crate::layout::recognize::{self, FP8_SCALES, INPUT_SCALES};
use crate::read::{Span, Tensors};

/// A source's coded weights are looked for here.
pub(crate) struct Coded<'a> {
    pub(super) tensors: Tensors<'a>,
    formats: Vec<StoredFormat>,
    /// Whether floats of eight bits are what weights were cast to: nothing speaks of scales.
    has_casts: bool,
}

/// A weight that stands in the source as codes.
pub(crate) struct CodedWeight<'a> {
    /// The tensor of its codes.
    pub codes: &'a TensorInfo,
    /// What the codes are.
    pub kind: CodedKind<'a>,
}

/// What codes are, and what they decode by.
pub(crate) enum CodedKind<'a> {
    /// One of the formats that are written too, in one of its layouts.
    Stored(FoundWeight<'a>),
    /// Floats of eight bits, with the tensor of their scales.
    Fp8((Span, &'a TensorInfo)),
    /// The same without: a weight, or any other tensor, that was cast.
    Cast,
    /// DeepSeek-V4's experts: E2M1 in bytes that are called integers, with the tensor of their scales.
    Fp4InBytes((Span, &'a TensorInfo)),
    /// GPTQ's or AWQ's.
    Integers(Integers<'a>),
}

impl<'a> Coded<'a> {
    /// Of an opened source.
    pub(crate) fn new(source: &'a Source) -> Coded<'a> {
        let is_quantized = source.config.as_ref().and_then(recognize::in_config).is_some();
        let has_casts = !is_quantized && !source.tensors().any(|(_, info)| info.name.contains("scale"));
        Coded { tensors: Tensors::new(source), formats: StoredFormat::all(), has_casts }
    }

    /// The weight whose codes a tensor of this file is.
    pub(crate) fn weight(&self, file: usize, codes: &'a TensorInfo) -> Option<CodedWeight<'a>> {
        let kind = match codes.dtype {
            Dtype::F8_E4M3 if self.has_casts && codes.len > 0 => CodedKind::Cast,
            Dtype::F8_E4M3 => CodedKind::Fp8(self.scale(codes, FP8_SCALES)?),
            Dtype::I8 => CodedKind::Fp4InBytes(self.scale(codes, &FP8_SCALES[..2]).filter(is_power_of_two)?),
            Dtype::I32 if codes.name.ends_with(super::integers::CODES) => {
                CodedKind::Integers(Integers::of(codes, &self.tensors)?)
            }
            // bitsandbytes stores codes as floats, too.
            Dtype::U8 | Dtype::I32 | Dtype::BF16 | Dtype::F16 | Dtype::F32 => {
                CodedKind::Stored(stored_weight(&self.formats, &self.tensors, file, codes)?)
            }
            _ => return None,
        };
        Some(CodedWeight { codes, kind })
    }

    fn scale(&self, codes: &TensorInfo, ends: &[(&str, &str)]) -> Option<(Span, &'a TensorInfo)> {
        ends.iter().find_map(|(of_codes, of_scale)| {
            let name = codes.name.strip_suffix(of_codes)?;
            self.tensors.get(&format!("{name}{of_scale}"))
        })
    }

    /// The names of all tensors that belong to coded weights, their codes included.
    pub(crate) fn names(&self, source: &'a Source) -> HashSet<Cow<'a, str>> {
        let weights = source.tensors().filter_map(|(file, info)| self.weight(file, info));
        weights.flat_map(|weight| weight.names().collect::<Vec<_>>()).collect()
    }
}

/// Whether scales are exponents: integers of eight bits have floats for scales.
fn is_power_of_two((_, scale): &(Span, &TensorInfo)) -> bool {
    matches!(scale.dtype, Dtype::F8_E8M0 | Dtype::U8)
}

impl<'a> CodedWeight<'a> {
    /// The names of its tensors, whether they are there or not.
    pub(super) fn names(&self) -> impl Iterator<Item = Cow<'a, str>> {
        let (name, beside): (&'a str, Vec<&'a TensorInfo>) = match &self.kind {
            CodedKind::Stored(weight) => (weight.name, weight.beside.clone()),
            CodedKind::Fp8((_, scale)) | CodedKind::Fp4InBytes((_, scale)) => (&self.codes.name, vec![scale]),
            CodedKind::Cast => (&self.codes.name, Vec::new()),
            CodedKind::Integers(integers) => (integers.module, integers.beside()),
        };
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let beside = beside.into_iter().map(|info| Cow::Borrowed(&*info.name));
        let of_inputs = INPUT_SCALES.iter().map(move |end| Cow::Owned(format!("{module}{end}")));
        std::iter::once(Cow::Borrowed(&*self.codes.name)).chain(beside).chain(of_inputs)
    }

    /// Whether its codes have four bits: decoding those loses what another format might have kept.
    pub(crate) fn has_four_bits(&self) -> bool {
        !matches!(self.kind, CodedKind::Fp8(_) | CodedKind::Cast)
    }

    /// The name of its format.
    pub(crate) fn format(&self) -> &'static str {
        match &self.kind {
            CodedKind::Stored(weight) => weight.codec.map_or("", |codec| codec.format.library_name),
            CodedKind::Fp8(_) => "FP8",
            CodedKind::Cast => "FP8 without scales",
            CodedKind::Fp4InBytes(_) => "FP4 (DeepSeek-V4)",
            CodedKind::Integers(Integers { packing: Packing::Gptq, .. }) => "GPTQ",
            CodedKind::Integers(Integers { packing: Packing::Awq, .. }) => "AWQ",
        }
    }
}
