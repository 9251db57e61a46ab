//! Schema version 1, which prequant 0.1.0 wrote: options that don't apply to the format stood in its recipe too, with their
//! defaults.

use serde::Deserialize;

use crate::format::{BlockSize, FormatSpec, GroupSize, Layout, Sharing};
use crate::recipe::{ExpertLayout, NonFinitePolicy, Recipe, RecipeOptions};

/// Its recipe.
#[derive(Deserialize)]
pub(super) struct FlatRecipe {
    format: &'static FormatSpec,
    block_size: BlockSize,
    #[serde(default)]
    group_size: GroupSize,
    #[serde(default)]
    layout: Layout,
    double_quant: bool,
    experts: ExpertLayout,
    only_experts: bool,
    include: Vec<String>,
    exclude: Vec<String>,
    #[serde(default)]
    dequantize_source: bool,
    nonfinite: NonFinitePolicy,
    max_shard_size: u64,
}

impl FlatRecipe {
    /// The same in this version's words.
    ///
    /// # Errors
    /// When options don't go together.
    pub(super) fn recipe(self) -> Result<Recipe, String> {
        self.options().build().map_err(|error| error.to_string())
    }

    /// What applies to the format.
    fn options(self) -> RecipeOptions {
        let is_blocks = self.format.sharing == Sharing::Blocks;
        RecipeOptions {
            format: Some(self.format),
            unquantized: None,
            block_size: is_blocks.then_some(self.block_size),
            double_quant: is_blocks.then_some(self.double_quant),
            quant_storage: None,
            nonfinite: is_blocks.then_some(self.nonfinite),
            experts: is_blocks.then_some(self.experts),
            group_size: (self.format.sharing == Sharing::Groups).then_some(self.group_size),
            layout: (!is_blocks).then_some(self.layout),
            only_experts: Some(self.only_experts),
            include: Some(self.include),
            exclude: Some(self.exclude),
            dequantize_source: Some(self.dequantize_source),
            guard: None,
            max_shard_size: Some(self.max_shard_size),
        }
    }
}
