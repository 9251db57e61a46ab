//! Linears that clients merge when they load them must be quantized alike, and share NVFP4's global scale.

use std::collections::HashMap;

use crate::error::{Hint, Warning};
use crate::format::{Codec, Sharing};
use crate::models::families::families;
use crate::models::{Role, merged_linears};
use crate::plan::{Decision, PlannedTensor};
use crate::recipe::Recipe;

/// Linears that are merged: what their modules' names begin with, and their last names.
pub(super) type Merged<'a> = (&'a str, &'static [&'static str]);

/// What the weight of this name is merged with.
pub(super) fn merged(weight: &str) -> Option<Merged<'_>> {
    let module = weight.strip_suffix(".weight")?;
    let (parent, last) = module.rsplit_once('.').unwrap_or(("", module));
    merged_linears::set_of(last).map(|names| (parent, names))
}

/// The quantized tensors by what shares a global scale, in the order of each set's first: of an expert or a dense MLP, gate and
/// up; of attention, query, key and value; all others alone.
pub(crate) fn scale_sets(tensors: &[PlannedTensor]) -> Vec<Vec<usize>> {
    let mut sets = sets(tensors);
    // Carried weights have theirs, and are in sets of their own.
    sets.retain(|set| set.iter().all(|&i| !tensors[i].is_carried()));
    sets
}

/// The same, of those that are carried over too.
pub(crate) fn sets(tensors: &[PlannedTensor]) -> Vec<Vec<usize>> {
    let mut sets: Vec<Vec<usize>> = Vec::new();
    let mut places: HashMap<Merged, usize> = HashMap::new();
    for (i, tensor) in tensors.iter().enumerate().filter(|(_, tensor)| tensor.decision != Decision::Keep) {
        let next = sets.len();
        let set = merged(&tensor.name).map_or(next, |with| *places.entry(with).or_insert(next));
        match sets.get_mut(set) {
            Some(set) => set.push(i),
            None => sets.push(vec![i]),
        }
    }
    sets
}

/// What vLLM can't load of the checkpoint.
pub(crate) fn warnings(recipe: &Recipe, model_types: &[&str], tensors: &[PlannedTensor]) -> Vec<Warning> {
    let codec = recipe.codec();
    if codec.is_blocks() {
        return Vec::new();
    }
    let quantized = |tensor: &PlannedTensor| tensor.decision != Decision::Keep;
    let mut warnings: Vec<Warning> = mixed(tensors).map(|kept| mix_warning(&codec, kept)).into_iter().collect();
    if families(model_types).any(|family| family.gpt_oss_layout)
        && tensors.iter().any(|t| quantized(t) && t.role == Role::ExpertLinear)
    {
        let message = "vLLM (0.33) can't load one tensor per expert of a gpt_oss model".to_owned();
        warnings.push(Warning { message, hint: Some(Hint::GptOssLayout) });
    }
    if tensors.iter().any(|tensor| quantized(tensor) && tensor.role == Role::OutputHead) {
        warnings.push("an output head is quantized, which vLLM can't load in this layout".into());
    }
    warnings
}

/// In place of last names: the experts of a layer, which are loaded as one.
const ALL_EXPERTS: &[&str] = &["experts"];

/// The first weight that is kept while others that are merged with it, or other experts of its layer, are quantized.
fn mixed(tensors: &[PlannedTensor]) -> Option<&PlannedTensor> {
    let mut found: HashMap<Merged, (bool, Option<&PlannedTensor>)> = HashMap::new();
    for tensor in tensors.iter().filter(|tensor| matches!(tensor.role, Role::Linear | Role::ExpertLinear)) {
        let experts = tensor.name.find(".experts.").map(|at| (&tensor.name[..at], ALL_EXPERTS));
        let Some(merged) = experts.or_else(|| merged(&tensor.name)) else { continue };
        let (any_quantized, kept) = found.entry(merged).or_default();
        match tensor.decision {
            Decision::Keep => *kept = kept.or(Some(tensor)),
            Decision::Quantize(_) | Decision::Carry(_) => *any_quantized = true,
        }
    }
    let kept = found.into_values().filter_map(|(any_quantized, kept)| kept.filter(|_| any_quantized));
    kept.min_by_key(|tensor| &tensor.name)
}

fn mix_warning(codec: &Codec, kept: &PlannedTensor) -> Warning {
    let (name, dtype, columns) = (&kept.name, kept.dtype, kept.columns());
    let by_columns = codec.format.sharing == Sharing::Groups && !columns.is_multiple_of(codec.block_len(columns));
    let smaller = [64, 32].into_iter().find(|size| by_columns && columns.is_multiple_of(*size));
    let others =
        if kept.role == Role::ExpertLinear { "other experts of its layer" } else { "Linears that vLLM merges with it" };
    let reason = kept.reason.strip_suffix(": kept in its dtype").unwrap_or(&kept.reason);
    Warning {
        message: format!(
            "{name:?} stays {dtype} ({reason}) while {others} are quantized; vLLM can't load such a layer"
        ),
        hint: smaller.map(Hint::GroupSize),
    }
}
