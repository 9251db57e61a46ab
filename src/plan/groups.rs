//! What formats with groups ask of a plan: whole groups in every row, experts one by one, and a list of what is left out.

use std::collections::{HashMap, HashSet};

use super::rules::{Rules, Verdict};
use super::{Decision, ExpertLayout, NonFinitePolicy, PlannedTensor, Recipe, Role};
use crate::checkpoint::{Source, TensorInfo};
use crate::error::{Error, Result};
use crate::format::GroupScheme;

/// # Errors
/// When the recipe has options that are bitsandbytes' alone.
pub fn check_options(recipe: &Recipe) -> Result<()> {
    let error = |what, why| Err(Error::Options { what, why });
    if recipe.double_quant {
        return error("--double-quant", "only nf4 and fp4 have scales that can be quantized: leave it out");
    }
    if recipe.nonfinite == NonFinitePolicy::Keep {
        return error("--nonfinite keep", "only nf4 and fp4 have a way to write such values: leave it out");
    }
    if recipe.experts == ExpertLayout::Fuse {
        return error(
            "--experts fuse",
            "only nf4 and fp4 have fused experts: what reads other formats wants them one by one",
        );
    }
    Ok(())
}

/// Keeps a weight whose rows aren't whole groups.
///
/// # Errors
/// When experts to be quantized are fused.
pub fn check(
    source: &Source,
    file: usize,
    info: &TensorInfo,
    scheme: GroupScheme,
    verdict: &mut Verdict,
) -> Result<()> {
    if !verdict.quantize {
        return Ok(());
    }
    let (columns, group) = (info.shape.last().copied().unwrap_or(0), scheme.group_len() as u64);
    if info.shape.len() != 2 {
        let path = source.files[file].path.clone();
        let why =
            "fused experts can't be written in groups: only nf4 and fp4 take them; --exclude keeps them in their dtype";
        return Err(Error::Experts { path, tensor: info.name.clone(), why: why.to_owned() });
    }
    if !info.name.ends_with(".weight") {
        (verdict.quantize, verdict.reason) = (false, "its name doesn't end in .weight, as groups' must: kept".into());
    } else if !columns.is_multiple_of(group) {
        let reason = format!("its {columns} columns aren't whole groups of {group}: kept in its dtype");
        (verdict.quantize, verdict.reason) = (false, reason.into());
    }
    Ok(())
}

/// The Linear modules that are kept: whole names, or a pattern for all experts of a layer if none is quantized.
pub fn ignored(rules: &Rules, tensors: &[PlannedTensor], linear: &[bool]) -> Vec<String> {
    let container = |module: &str| module.find(".experts.").map(|at| module[..at + ".experts".len()].to_owned());
    let names = |tensor: &PlannedTensor| rules.module_names(&tensor.name).into_iter();
    let quantized = tensors.iter().filter(|tensor| tensor.decision != Decision::Keep);
    let with_quantized: HashSet<String> = quantized.flat_map(names).filter_map(|module| container(&module)).collect();
    let mut seen = HashSet::new();
    let kept = tensors.iter().zip(linear).filter(|(tensor, linear)| {
        tensor.decision == Decision::Keep && (**linear || tensor.role == Role::ExpertLinear)
    });
    let entry = |module: String| match container(&module) {
        Some(container) if !with_quantized.contains(&container) => format!("re:{}\\..*", container.replace('.', "\\.")),
        _ => module,
    };
    let mut entries: Vec<String> =
        kept.flat_map(|(tensor, _)| names(tensor)).map(entry).filter(|entry| seen.insert(entry.clone())).collect();
    for module in rules.off_disk_modules() {
        if seen.insert(module.to_owned()) {
            entries.push(module.to_owned());
        }
    }
    entries
}

/// Linears that clients put together, which must then have one global scale: names of modules beside each other.
const TOGETHER: &[&[&str]] =
    &[&["q_proj", "k_proj", "v_proj"], &["gate_proj", "up_proj"], &["w1", "w3"], &["wq_a", "wkv_a_with_mqa"]];

/// The quantized tensors by what shares a global scale, in the order of each set's first: of an expert or a dense MLP, gate and
/// up; of attention, query, key and value; all others alone.
pub fn scale_sets(tensors: &[PlannedTensor]) -> Vec<Vec<usize>> {
    let mut sets: Vec<Vec<usize>> = Vec::new();
    let mut places: HashMap<(&str, usize), usize> = HashMap::new();
    for (i, tensor) in tensors.iter().enumerate().filter(|(_, tensor)| tensor.decision != Decision::Keep) {
        let module = tensor.name.strip_suffix(".weight").unwrap_or(&tensor.name);
        let (parent, leaf) = module.rsplit_once('.').unwrap_or(("", module));
        let place = TOGETHER.iter().position(|names| names.contains(&leaf)).map(|kind| (parent, kind));
        let next = sets.len();
        let set = place.map_or(next, |place| *places.entry(place).or_insert(next));
        match sets.get_mut(set) {
            Some(set) => set.push(i),
            None => sets.push(vec![i]),
        }
    }
    sets
}
