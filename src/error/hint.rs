//! Ways out of an error as data: the command turns them into options to give, a program into fields to set.

use std::fmt;

/// What to do about an error or a warning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hint {
    /// Leave the tensor unquantized, by a pattern of the recipe's `exclude`.
    Exclude,
    /// Choose tensors, by a pattern of the recipe's `include`.
    Include,
    /// Quantize what was kept in doubt too, by a pattern of the recipe's `include`: [`Plan::in_doubt`](crate::Plan::in_doubt) has them.
    IncludeDoubtful,
    /// Leave experts as they are in the source: [`ExpertLayout::Keep`](crate::ExpertLayout::Keep).
    KeepExperts,
    /// Rewrite fused experts as one tensor per expert: [`ExpertLayout::Keep`](crate::ExpertLayout::Keep) too.
    SplitExperts,
    /// Rewrite experts as fused tensors: [`ExpertLayout::Fuse`](crate::ExpertLayout::Fuse).
    FuseExperts,
    /// Quantize NaN and infinities as bitsandbytes does: [`NonFinitePolicy::Keep`](crate::NonFinitePolicy::Keep).
    KeepNonFinite,
    /// Decode the source's 4-bit experts: the recipe's `dequantize_source`.
    DequantizeSource,
    /// Convert the source to NVFP4: codes are copied and global scales rewritten.
    RewriteScales,
    /// Use this group size.
    GroupSize(u64),
    /// Use a larger block size: double quantization holds one f32 for every block of a tensor.
    LargerBlocks,
    /// Use MXFP4 in the gpt-oss layout.
    GptOssLayout,
    /// Use the compressed-tensors layout.
    CompressedTensorsLayout,
    /// Don't give this setting.
    Remove(Setting),
    /// Don't give the setting at fault with the format of this name.
    RemoveFor(&'static str),
    /// Plan without executing to see each tensor's name and decision.
    ListTensors,
    /// The same with `only_experts` unset.
    ListAllTensors,
    /// Replace what is at the destination: [`Options::force`](crate::Options::force).
    Replace,
    /// The same, of what another version wrote; or keep it, and verify it against its source.
    ReplaceOther,
    /// Copy what links beside the weights lead to, wherever that is: [`Options::follow_links`](crate::Options::follow_links).
    FollowLinks,
    /// Run again to resume with what is finished.
    Resume,
    /// Discard what an unfinished run left: [`Options::restart`](crate::Options::restart).
    Restart,
    /// Verify the converted checkpoint: [`verify`](crate::verify()) finds all that is wrong with it.
    Verify,
    /// Quantize on the CPU; the output is the same.
    UseCpu,
}

/// A choice that an error is about, named as in a recipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setting {
    /// Weights per scale of formats with blocks.
    BlockSize,
    /// Columns per scale of formats with groups.
    GroupSize,
    /// The tensors that a format with groups is written as.
    Layout,
    /// Whether scales are quantized too.
    DoubleQuant,
    /// The dtype that codes are stored as.
    QuantStorage,
    /// How experts are stored.
    Experts,
    /// Patterns of tensors to quantize.
    Include,
    /// Patterns of tensors to leave unquantized.
    Exclude,
    /// Whether 4-bit experts of the source are decoded.
    DequantizeSource,
    /// How NaN and infinities are treated.
    NonFinite,
}

impl Setting {
    /// Its name in a recipe.
    pub fn name(self) -> &'static str {
        match self {
            Setting::BlockSize => "block_size",
            Setting::GroupSize => "group_size",
            Setting::Layout => "layout",
            Setting::DoubleQuant => "double_quant",
            Setting::QuantStorage => "quant_storage",
            Setting::Experts => "experts",
            Setting::Include => "include",
            Setting::Exclude => "exclude",
            Setting::DequantizeSource => "dequantize_source",
            Setting::NonFinite => "nonfinite",
        }
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a user should know before using the output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// One sentence.
    pub message: String,
    /// What to do about it, if anything.
    pub hint: Option<Hint>,
}

impl From<String> for Warning {
    fn from(message: String) -> Warning {
        Warning { message, hint: None }
    }
}

impl From<&str> for Warning {
    fn from(message: &str) -> Warning {
        message.to_owned().into()
    }
}
