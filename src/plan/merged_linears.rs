//! Linears that clients put together when they load them: these must be quantized alike, and share NVFP4's global scale.

use std::collections::HashMap;

use crate::format::{Codec, Sharing};
use crate::models::Role;
use crate::plan::{Decision, PlannedTensor};
use crate::recipe::Recipe;

/// Names of modules beside each other that become one, as vLLM has them; `tests/plan/vllm.rs` holds the list against
/// `tests/data/vllm.json`.
pub const MERGED_LINEARS: &[&[&str]] = &[
    &["q_proj", "k_proj", "v_proj"],
    &["gate_proj", "up_proj"],
    &["w1", "w3"],
    &["wq_a", "wkv_a_with_mqa"],
    &["q_a_proj", "kv_a_proj_with_mqa"],
    &["in_proj_qkv", "in_proj_z"],
    &["in_proj_b", "in_proj_a"],
    &["query", "key", "value"],
];

/// What a weight is put together with: what is before its module's own name, and which row of [`MERGED_LINEARS`] that is in.
fn place(tensor: &PlannedTensor) -> Option<(&str, usize)> {
    let module = tensor.name.strip_suffix(".weight")?;
    let (parent, leaf) = module.rsplit_once('.').unwrap_or(("", module));
    MERGED_LINEARS.iter().position(|names| names.contains(&leaf)).map(|kind| (parent, kind))
}

/// The quantized tensors by what shares a global scale, in the order of each set's first: of an expert or a dense MLP, gate and
/// up; of attention, query, key and value; all others alone.
pub fn scale_sets(tensors: &[PlannedTensor]) -> Vec<Vec<usize>> {
    let mut sets: Vec<Vec<usize>> = Vec::new();
    let mut places: HashMap<(&str, usize), usize> = HashMap::new();
    for (i, tensor) in tensors.iter().enumerate().filter(|(_, tensor)| tensor.decision != Decision::Keep) {
        let next = sets.len();
        let set = place(tensor).map_or(next, |place| *places.entry(place).or_insert(next));
        match sets.get_mut(set) {
            Some(set) => set.push(i),
            None => sets.push(vec![i]),
        }
    }
    sets
}

/// What is to be known before vLLM is given the checkpoint.
pub fn warnings(recipe: &Recipe, model_types: &[&str], tensors: &[PlannedTensor]) -> Vec<String> {
    let codec = recipe.codec();
    if codec.is_blocks() {
        return Vec::new();
    }
    let quantized = |tensor: &PlannedTensor| tensor.decision != Decision::Keep;
    let mut warnings: Vec<String> = mixed(tensors).map(|kept| mix_warning(&codec, kept)).into_iter().collect();
    if model_types.contains(&"gpt_oss") && tensors.iter().any(|t| quantized(t) && t.role == Role::ExpertLinear) {
        let text = "vLLM (0.33) doesn't read a gpt_oss model's experts one by one; --format mxfp4 --layout gpt-oss is what it reads";
        warnings.push(text.to_owned());
    }
    if tensors.iter().any(|tensor| quantized(tensor) && tensor.role == Role::OutputHead) {
        warnings.push("an output head is quantized: vLLM takes none in this layout".to_owned());
    }
    warnings
}

/// The first weight that is kept among others, put together with it, that are quantized: of a layer's experts all are.
fn mixed(tensors: &[PlannedTensor]) -> Option<&PlannedTensor> {
    let mut found: HashMap<(&str, usize), (bool, Option<&PlannedTensor>)> = HashMap::new();
    for tensor in tensors.iter().filter(|tensor| matches!(tensor.role, Role::Linear | Role::ExpertLinear)) {
        let experts = tensor.name.find(".experts.").map(|at| (&tensor.name[..at], MERGED_LINEARS.len()));
        let Some(place) = experts.or_else(|| place(tensor)) else { continue };
        let (any_quantized, kept) = found.entry(place).or_default();
        match tensor.decision {
            Decision::Keep => *kept = kept.or(Some(tensor)),
            Decision::Quantize(_) => *any_quantized = true,
        }
    }
    let kept = found.into_values().filter_map(|(any_quantized, kept)| kept.filter(|_| any_quantized));
    kept.min_by_key(|tensor| &tensor.name)
}

fn mix_warning(codec: &Codec, kept: &PlannedTensor) -> String {
    let (name, dtype, columns) = (&kept.name, kept.dtype, kept.columns());
    let by_columns = codec.format.sharing == Sharing::Groups && !columns.is_multiple_of(codec.block_len(columns));
    let smaller = [64, 32].into_iter().find(|size| by_columns && columns.is_multiple_of(*size));
    let hint = smaller.map_or(String::new(), |size| format!("; --group-size {size} takes it too"));
    format!(
        "{name:?} stays in {dtype} ({}), and others that vLLM puts together with it, or experts of its layer, are quantized: \
         vLLM doesn't read such a mix{hint}",
        kept.reason
    )
}
