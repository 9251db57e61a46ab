//! What the user asks for: all that decides the output's bytes, besides the source.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::format::{BlockSize, Codec, CodecOptions, FormatSpec, GroupSize, Layout, NF4};

/// The choices of a conversion.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Recipe {
    /// The 4-bit format.
    pub format: &'static FormatSpec,
    /// Consecutive elements that share one absmax, in NF4 and FP4.
    pub block_size: BlockSize,
    /// Columns that share one scale, in INT4.
    #[serde(default)]
    pub group_size: GroupSize,
    /// The tensors that formats with groups are put in.
    #[serde(default)]
    pub layout: Layout,
    /// Whether absmax is quantized too, to 8 bits.
    pub double_quant: bool,
    /// How the experts of a Mixture-of-Experts model are laid out.
    pub experts: ExpertLayout,
    /// Whether everything but experts is kept.
    pub only_experts: bool,
    /// Regular expressions: tensors to be quantized against the rules.
    pub include: Vec<String>,
    /// Regular expressions: tensors to be kept, whatever else says otherwise.
    pub exclude: Vec<String>,
    /// Whether gpt-oss's MXFP4 experts are decoded on the way in.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dequantize_source: bool,
    /// What becomes of weights with a NaN or an infinity.
    pub nonfinite: NonFinitePolicy,
    /// The most bytes of tensors in one file; a weight and its statistics stay together even if they are more.
    pub max_shard_size: u64,
}

/// How experts are laid out in the output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ExpertLayout {
    /// As the source has them, under the same names.
    #[default]
    Keep,
    /// As transformers' models have them: all of a layer's in one 3-D tensor for each projection.
    Fuse,
}

/// What becomes of weights with a NaN or an infinity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum NonFinitePolicy {
    /// They are an error.
    #[default]
    Error,
    /// They are quantized as bitsandbytes does: their whole block decodes to NaN and infinities.
    Keep,
}

impl Recipe {
    /// The part that decides a quantized tensor's bytes.
    pub fn codec(&self) -> Codec {
        let Recipe { block_size, double_quant, group_size, layout, .. } = *self;
        self.format.codec(CodecOptions { block_size, double_quant, group_size, layout })
    }
}

impl Default for Recipe {
    /// bitsandbytes' own defaults (but NF4), in shards of 5 GB.
    fn default() -> Self {
        Recipe {
            format: &NF4,
            block_size: BlockSize::default(),
            group_size: GroupSize::default(),
            layout: Layout::default(),
            double_quant: false,
            experts: ExpertLayout::Keep,
            only_experts: false,
            include: Vec::new(),
            exclude: Vec::new(),
            dequantize_source: false,
            nonfinite: NonFinitePolicy::Error,
            max_shard_size: 5_000_000_000,
        }
    }
}
