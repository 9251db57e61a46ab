//! What a quantized weight is on disk: the tensors it becomes, their names and shapes, and config.json's part.

pub mod bitsandbytes;
pub mod compressed_tensors;
pub mod gpt_oss;
pub mod modelopt;
mod output;
pub mod recognize;
mod stored;

use serde_json::Value;

use crate::dtype::FloatDtype;
use crate::format::{Codec, Layout, ScaleCode};

pub use bitsandbytes::{ParsedQuantState, QuantState, quant_state_bytes, quant_state_len, quant_state_suffix};
pub use compressed_tensors::{ZERO_POINT_ROWS, shape_bytes};
pub use output::{OutputDtype, OutputKind, OutputTensor};
pub use recognize::{FP8_METHOD, MXFP4_METHOD, SourceQuantization};
pub use stored::StoredFormat;

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
            None => "llm_int8_skip_modules",
            Some(Layout::GptOss) => "modules_to_not_convert",
            Some(Layout::CompressedTensors | Layout::Modelopt) => "ignore",
        }
    }

    /// A file that the layout has beside config.json: name and content.
    pub fn side_file(&self, kept: &[String]) -> Option<(String, String)> {
        let modelopt = self.layout() == Some(Layout::Modelopt);
        modelopt.then(|| (modelopt::CONFIG_NAME.to_owned(), modelopt::config_text(self, kept)))
    }

    /// The end of the codes' name, after the weight's.
    pub fn codes_suffix(&self) -> &'static str {
        match self.layout() {
            Some(Layout::CompressedTensors) => "_packed",
            Some(Layout::GptOss) => "_blocks",
            None | Some(Layout::Modelopt) => "",
        }
    }

    /// The end of the scales' name, after the weight's.
    pub fn scales_suffix(&self) -> &'static str {
        match self.layout() {
            None => ".absmax",
            Some(Layout::GptOss) => "_scales",
            Some(Layout::CompressedTensors | Layout::Modelopt) => "_scale",
        }
    }

    /// The end of the name of the one scale of all groups' scales, if the format has it.
    pub fn tensor_scale_suffix(&self) -> Option<&'static str> {
        let suffix = if self.layout() == Some(Layout::Modelopt) { "_scale_2" } else { "_global_scale" };
        self.has_tensor_scale().then_some(suffix)
    }

    /// The dtype that the layout's own library decodes to, where scales have the dtype `scales` if they are floats of a
    /// weight's dtypes, and the model is in `model`.
    pub fn decoded_dtype(&self, scales: Option<FloatDtype>, model: FloatDtype) -> Option<FloatDtype> {
        match (self.format.scale, self.layout()) {
            (ScaleCode::SourceFloat, _) => scales,
            (_, Some(Layout::CompressedTensors)) => Some(FloatDtype::Bfloat16),
            _ => Some(model),
        }
    }
}
