//! What the user asks for: all that decides the output's bytes, besides the source.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::format::{BlockFormat, BlockScheme, BlockSize, Format, GroupFormat, GroupScheme, GroupSize, Layout, Scheme};

/// The choices of a conversion.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Recipe {
    /// The 4-bit format.
    pub format: Format,
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
    pub fn scheme(&self) -> Scheme {
        let blocks = |format| {
            let (block_size, double_quant) = (self.block_size, self.double_quant);
            Scheme::Blocks(BlockScheme { format, block_size, double_quant })
        };
        let groups = |format, size| Scheme::Groups(GroupScheme { format, size, layout: self.layout });
        match self.format {
            Format::Nf4 => blocks(BlockFormat::Nf4),
            Format::Fp4 => blocks(BlockFormat::Fp4),
            Format::Int4 => groups(GroupFormat::Int4, self.group_size),
            Format::Int4Asym => groups(GroupFormat::Int4Asym, self.group_size),
            Format::Mxfp4 => groups(GroupFormat::Mxfp4, GroupSize::Columns(32)),
            Format::Nvfp4 => groups(GroupFormat::Nvfp4, GroupSize::Columns(16)),
        }
    }
}

impl Default for Recipe {
    /// bitsandbytes' own defaults (but NF4), in shards of 5 GB.
    fn default() -> Self {
        Recipe {
            format: Format::Nf4,
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
