//! What the user asks for: all that decides the output's bytes, besides the source.

mod options;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use options::RecipeOptions;

use crate::format::{BlockSize, Codec, CodecOptions, FormatSpec, GroupSize, Layout, NF4, QuantStorage};

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
    /// Whether weights that the source has in 4 bits are decoded first.
    pub dequantize_source: bool,
    /// What stops clients that would load experts wrongly.
    pub guard: Guard,
    /// The most bytes of tensors in one file; a weight and its scales stay together even if they exceed it.
    pub max_shard_size: u64,
}

/// The format with its own choices: only those that it has. Values that don't go together can't be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// Blocks of consecutive elements with a codebook: bitsandbytes'.
    #[non_exhaustive]
    Blocks {
        /// The format.
        format: &'static FormatSpec,
        /// Consecutive elements that share one absmax.
        block_size: BlockSize,
        /// Whether absmax is quantized too, to 8 bits.
        double_quant: bool,
        /// The dtype that codes are stored as.
        quant_storage: QuantStorage,
        /// How weights with a NaN or an infinity are treated.
        nonfinite: NonFinitePolicy,
        /// How the experts of a Mixture-of-Experts model are laid out.
        experts: ExpertLayout,
    },
    /// Groups of a row's columns; experts are one by one, whatever the source has.
    #[non_exhaustive]
    Groups {
        /// The format.
        format: &'static FormatSpec,
        /// Columns that share one scale.
        group_size: GroupSize,
        /// The tensors they are put in.
        layout: Layout,
    },
    /// As floats: nothing is quantized.
    Floats,
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

/// What config.json has to stop transformers where it would load 4-bit experts wrongly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Guard {
    /// What stops nobody else: where transformers would say nothing. It stops at NF4 and FP4 experts by itself.
    #[default]
    Auto,
    /// Also what stops transformers at NF4 and FP4 experts if it is told to ignore shapes; it stops unsloth, too.
    Strict,
    /// Nothing.
    Off,
}

impl Recipe {
    /// Of a checkpoint whose weights stay floats.
    pub fn floats(max_shard_size: u64) -> Recipe {
        Recipe { weights: Weights::Floats, max_shard_size, ..Recipe::default() }
    }

    /// Whether something is quantized.
    pub fn quantizes(&self) -> bool {
        self.weights != Weights::Floats
    }

    /// The format, if something is quantized.
    pub fn format(&self) -> Option<&'static FormatSpec> {
        match self.weights {
            Weights::Blocks { format, .. } | Weights::Groups { format, .. } => Some(format),
            Weights::Floats => None,
        }
    }

    /// The part that decides a quantized tensor's bytes; where there is none, any.
    #[doc(hidden)]
    pub fn codec(&self) -> Codec {
        match self.weights {
            Weights::Blocks { format, block_size, double_quant, quant_storage, .. } => {
                format.codec(CodecOptions { block_size, double_quant, quant_storage, ..CodecOptions::default() })
            }
            Weights::Groups { format, group_size, layout } => {
                format.codec(CodecOptions { group_size, layout, ..CodecOptions::default() })
            }
            Weights::Floats => NF4.codec(CodecOptions::default()),
        }
    }

    /// Whether a layer's experts are in one tensor for each projection.
    pub fn fuses_experts(&self) -> bool {
        matches!(self.weights, Weights::Blocks { experts: ExpertLayout::Fuse, .. })
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
                format: &NF4,
                block_size: BlockSize::default(),
                double_quant: false,
                quant_storage: QuantStorage::Uint8,
                nonfinite: NonFinitePolicy::Error,
                experts: ExpertLayout::Keep,
            },
            only_experts: false,
            include: Vec::new(),
            exclude: Vec::new(),
            dequantize_source: false,
            guard: Guard::Auto,
            max_shard_size: 5_000_000_000,
        }
    }
}
