//! What a quantized weight is on disk: the tensors it becomes, their names and shapes, and config.json's part.

pub(crate) mod bitsandbytes;
pub(crate) mod compressed_tensors;
mod encode;
pub(crate) mod gpt_oss;
pub(crate) mod leftover;
pub(crate) mod modelopt;
mod output;
mod reader;
pub(crate) mod recognize;
mod stored;

use std::borrow::Cow;

use serde_json::Value;

use crate::checkpoint::QUANT_CONFIG_NAME;
use crate::dtype::FloatDtype;
use crate::error::Result;
use crate::format::{Codec, Layout};

pub use bitsandbytes::{ParsedQuantState, QuantState, quant_state_bytes};
pub(crate) use encode::{NestedRun, QuantizedRun, Weight};
pub(crate) use output::{OutputDtype, OutputKind, OutputTensor};
pub(crate) use reader::{Stored, StoredWeight};
pub(crate) use recognize::SourceQuantization;
pub(crate) use stored::StoredFormat;

impl Codec {
    /// The tensors that a weight of `shape` becomes; of whole groups, for formats of groups.
    pub fn output_tensors(&self, dtype: FloatDtype, shape: &[u64]) -> Vec<OutputTensor> {
        match self.layout() {
            None => bitsandbytes::output_tensors(self, dtype, shape),
            Some(Layout::CompressedTensors) => compressed_tensors::output_tensors(self, shape),
            Some(Layout::Modelopt) => modelopt::output_tensors(self, shape),
            Some(Layout::GptOss) => gpt_oss::output_tensors(self, shape),
        }
    }

    /// config.json's `quantization_config`: what tells a client how to load the weights.
    ///
    /// `compute_dtype` is the dtype that matrix products run in; `kept` are the Linear modules left unquantized, all of
    /// them.
    pub fn quantization_config(&self, compute_dtype: FloatDtype, kept: &[String]) -> Value {
        match self.layout() {
            None => bitsandbytes::quantization_config(self, compute_dtype, kept),
            Some(Layout::CompressedTensors) => compressed_tensors::quantization_config(self, kept),
            Some(Layout::Modelopt) => modelopt::quantization_config(self, kept),
            Some(Layout::GptOss) => gpt_oss::quantization_config(kept),
        }
    }

    /// The key of [`Codec::quantization_config`] that lists what is kept.
    pub fn kept_modules_key(&self) -> &'static str {
        match self.layout() {
            None => bitsandbytes::KEPT_MODULES,
            Some(Layout::CompressedTensors) => compressed_tensors::KEPT_MODULES,
            Some(Layout::Modelopt) => modelopt::KEPT_MODULES,
            Some(Layout::GptOss) => gpt_oss::KEPT_MODULES,
        }
    }

    /// The keys of [`Codec::quantization_config`] that the codec alone doesn't decide.
    pub fn other_keys(&self) -> [&'static str; 3] {
        [self.kept_modules_key(), bitsandbytes::COMPUTE_DTYPE, modelopt::PRODUCER]
    }

    /// A file that the layout has beside config.json: name and content.
    pub fn side_file(&self, kept: &[String]) -> Option<(String, String)> {
        let modelopt = self.layout() == Some(Layout::Modelopt);
        modelopt.then(|| (QUANT_CONFIG_NAME.to_owned(), modelopt::config_text(self, kept)))
    }

    /// The end of the name of a weight's tensor of this kind, if it has one.
    pub fn suffix(&self, kind: OutputKind) -> Option<Cow<'static, str>> {
        self.tensors().into_iter().find(|tensor| tensor.kind == kind).map(|tensor| tensor.suffix)
    }

    /// The tensors that any weight becomes: names and dtypes. Shapes are those of a small one.
    pub fn tensors(&self) -> Vec<OutputTensor> {
        let shape: &[u64] = if self.layout() == Some(Layout::GptOss) { &[1, 8, 128] } else { &[8, 128] };
        self.output_tensors(FloatDtype::Bfloat16, shape)
    }

    /// What a weight's tensors say of it; `model` is the model's dtype.
    ///
    /// # Errors
    /// When one is missing, or says what can't be.
    pub fn read(&self, weight: &mut dyn StoredWeight, model: FloatDtype) -> Result<Stored> {
        match self.layout() {
            None => bitsandbytes::read(self, weight),
            Some(Layout::CompressedTensors) => compressed_tensors::read(self, weight),
            Some(Layout::Modelopt) => modelopt::read(self, weight, model),
            Some(Layout::GptOss) => gpt_oss::read(self, weight, model),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{CodecOptions, FORMATS};

    /// Each function here and in `format` that knows only some codes stops at others; a new format of such codes fails here.
    #[test]
    fn every_format_can_be_written_in_each_of_its_layouts() {
        for format in FORMATS {
            let layouts = if format.layouts.is_empty() { &[Layout::CompressedTensors][..] } else { format.layouts };
            for (&layout, double_quant) in layouts.iter().flat_map(|layout| [(layout, false), (layout, true)]) {
                let codec = format.codec(CodecOptions { layout, double_quant, ..CodecOptions::default() });
                let tensors = codec.tensors();
                assert_eq!(tensors[0].kind, OutputKind::Packed, "{format:?}");
                let has = |kind| tensors.iter().any(|tensor| tensor.kind == kind);
                assert!(has(OutputKind::Scale) || has(OutputKind::Absmax), "{format:?} {layout:?}");
                assert_eq!(has(OutputKind::GlobalScale), codec.tensor_scale(1.0).is_some(), "{format:?} {layout:?}");
                assert_eq!(has(OutputKind::ZeroPoint), codec.has_zero_points(), "{format:?} {layout:?}");
                let config = codec.quantization_config(FloatDtype::Bfloat16, &[]);
                assert!(config["quant_method"].is_string(), "{format:?} {layout:?}: {config}");
                assert!(config.get(codec.kept_modules_key()).is_some(), "{format:?} {layout:?}: {config}");
                assert_eq!(codec.coding(256, None).packed_row(256), 128, "{format:?}");
            }
        }
    }
}
