//! What the user asks for: all that decides the output's bytes, besides the source.

mod options;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use options::RecipeOptions;

use crate::format::{BlockFormat, BlockScheme, BlockSize, Format, GroupFormat, GroupScheme, GroupSize, Layout, Scheme};

/// The choices of a conversion; [`RecipeOptions::build`] makes one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RecipeOptions", into = "RecipeOptions")]
pub struct Recipe {
    /// How weights are quantized.
    pub weights: Weights,
    /// Whether everything but experts is kept.
    pub only_experts: bool,
    /// Regular expressions: tensors to quantize although the rules would keep them.
    pub include: Vec<String>,
    /// Regular expressions: tensors to keep, whatever else says otherwise.
    pub exclude: Vec<String>,
    /// Whether gpt-oss's MXFP4 experts are decoded first.
    pub dequantize_source: bool,
    /// The most bytes of tensors in one file; a weight and its scales stay together even if they exceed it.
    pub max_shard_size: u64,
}

/// The format with its own choices: only those that it has. Values that don't go together can't be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// Blocks of consecutive elements with a codebook: bitsandbytes'.
    #[non_exhaustive]
    Blocks {
        /// The codebook.
        format: BlockFormat,
        /// Consecutive elements that share one absmax.
        block_size: BlockSize,
        /// Whether absmax is quantized too, to 8 bits.
        double_quant: bool,
        /// How weights with a NaN or an infinity are treated.
        nonfinite: NonFinitePolicy,
        /// How the experts of a Mixture-of-Experts model are laid out.
        experts: ExpertLayout,
    },
    /// Groups of a row's columns; experts are one by one, whatever the source has.
    #[non_exhaustive]
    Groups {
        /// The codes.
        format: GroupFormat,
        /// Columns that share one scale.
        group_size: GroupSize,
        /// The tensors they are put in.
        layout: Layout,
    },
}

/// How experts are laid out in the output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ExpertLayout {
    /// As in the source, under the same names.
    #[default]
    Keep,
    /// As transformers' models have them: all of a layer's in one 3-D tensor for each projection.
    Fuse,
}

/// How weights with a NaN or an infinity are treated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum NonFinitePolicy {
    /// They are an error.
    #[default]
    Error,
    /// They are quantized as bitsandbytes does: their whole block decodes to NaN and infinities.
    Keep,
}

impl Weights {
    /// The format.
    pub fn format(&self) -> Format {
        match self {
            Weights::Blocks { format: BlockFormat::Nf4, .. } => Format::Nf4,
            Weights::Blocks { format: BlockFormat::Fp4, .. } => Format::Fp4,
            Weights::Groups { format: GroupFormat::Int4, .. } => Format::Int4,
            Weights::Groups { format: GroupFormat::Int4Asym, .. } => Format::Int4Asym,
            Weights::Groups { format: GroupFormat::Mxfp4, .. } => Format::Mxfp4,
            Weights::Groups { format: GroupFormat::Nvfp4, .. } => Format::Nvfp4,
        }
    }
}

impl Recipe {
    /// The part that decides a quantized tensor's bytes.
    pub fn scheme(&self) -> Scheme {
        match self.weights {
            Weights::Blocks { format, block_size, double_quant, .. } => {
                Scheme::Blocks(BlockScheme { format, block_size, double_quant })
            }
            Weights::Groups { format, group_size, layout } => {
                Scheme::Groups(GroupScheme { format, size: group_size, layout })
            }
        }
    }

    /// The format.
    pub fn format(&self) -> Format {
        self.weights.format()
    }

    /// Whether absmax is quantized too.
    pub fn double_quant(&self) -> bool {
        matches!(self.weights, Weights::Blocks { double_quant: true, .. })
    }

    /// Whether a layer's experts are in one tensor for each projection.
    pub fn fuses_experts(&self) -> bool {
        matches!(self.weights, Weights::Blocks { experts: ExpertLayout::Fuse, .. })
    }

    /// Whether the layout is gpt-oss's own.
    pub fn is_gpt_oss(&self) -> bool {
        matches!(self.weights, Weights::Groups { layout: Layout::GptOss, .. })
    }

    /// Whether blocks with a NaN or an infinity are written as bitsandbytes does; groups can't hold any.
    pub fn keeps_nonfinite(&self) -> bool {
        matches!(self.weights, Weights::Blocks { nonfinite: NonFinitePolicy::Keep, .. })
    }
}

impl Default for Recipe {
    /// bitsandbytes' own defaults (but NF4), in shards of 5 GB.
    fn default() -> Self {
        Recipe {
            weights: Weights::Blocks {
                format: BlockFormat::Nf4,
                block_size: BlockSize::default(),
                double_quant: false,
                nonfinite: NonFinitePolicy::Error,
                experts: ExpertLayout::Keep,
            },
            only_experts: false,
            include: Vec::new(),
            exclude: Vec::new(),
            dequantize_source: false,
            max_shard_size: 5_000_000_000,
        }
    }
}
