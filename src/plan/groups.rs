//! What formats with groups ask of a plan: whole groups in every row, experts one by one, and a list of what is left out.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use regex::Regex;

use super::input::Input;
use super::rules::{Rules, Verdict};
use super::split::MAX_EXPERTS;
use super::{Decision, ExpertLayout, NonFinitePolicy, PlannedTensor, Recipe, Role, split};
use crate::checkpoint::Source;
use crate::error::{Error, Result};
use crate::format::{GroupFormat, GroupScheme, Layout, Scheme};

/// # Errors
/// When the recipe has options that the format has no use for.
pub fn check_options(recipe: &Recipe) -> Result<()> {
    let error = |what, why| Err(Error::Options { what, why });
    let default = Recipe::default();
    let scheme = match recipe.scheme() {
        Scheme::Groups(scheme) => scheme,
        Scheme::Blocks(_) if recipe.layout != default.layout => {
            return error("--layout", "nf4 and fp4 have bitsandbytes' layout only: leave it out");
        }
        Scheme::Blocks(_) if recipe.group_size != default.group_size => {
            return error("--group-size", "nf4 and fp4 have blocks, whose size is --block-size");
        }
        Scheme::Blocks(_) => return Ok(()),
    };
    if recipe.double_quant {
        return error("--double-quant", "only nf4 and fp4 have scales that can be quantized: leave it out");
    }
    if recipe.nonfinite == NonFinitePolicy::Keep {
        return error("--nonfinite keep", "only nf4 and fp4 have a way to write such values: leave it out");
    }
    if recipe.experts == ExpertLayout::Fuse {
        let why = "only nf4 and fp4 have fused experts: what reads other formats wants them one by one";
        return error("--experts fuse", why);
    }
    if recipe.block_size != default.block_size {
        return error("--block-size", "only nf4 and fp4 have blocks; int4's groups have --group-size");
    }
    if !scheme.is_integer() && recipe.group_size != default.group_size {
        return error("--group-size", "only int4 and int4-asym have a choice: leave it out");
    }
    match (scheme.layout, scheme.format) {
        (Layout::Modelopt, format) if format != GroupFormat::Nvfp4 => {
            error("--layout modelopt", "it is a layout of nvfp4: give --format nvfp4")
        }
        (Layout::GptOss, format) if format != GroupFormat::Mxfp4 => {
            error("--layout gpt-oss", "it is a layout of mxfp4: give --format mxfp4")
        }
        _ => Ok(()),
    }
}

/// Keeps a weight that the format can't hold: its rows aren't whole groups, or the layout is for others.
///
/// # Errors
/// When gpt-oss's layout is asked of another model, or can't be had of all its experts.
pub fn check(
    source: &Source,
    model_types: &[&str],
    input: &Input,
    scheme: &GroupScheme,
    verdict: &mut Verdict,
) -> Result<()> {
    let keep = |verdict: &mut Verdict, reason: Cow<'static, str>| {
        (verdict.quantize, verdict.reason) = (false, reason);
        Ok(())
    };
    if scheme.layout == Layout::GptOss {
        return match verdict.role {
            Role::FusedExperts => check_gpt_oss(source, model_types, input, scheme, verdict),
            _ if verdict.quantize => keep(verdict, "gpt-oss's layout is of experts only: kept in its dtype".into()),
            _ => Ok(()),
        };
    }
    if !verdict.quantize {
        return Ok(());
    }
    let columns = match verdict.role {
        Role::FusedExperts => split::columns(source, model_types, input)?,
        _ if input.shape.len() != 2 => {
            return keep(verdict, "it isn't a matrix, as what has groups must be: kept in its dtype".into());
        }
        _ if !input.name.ends_with(".weight") => {
            return keep(verdict, "its name doesn't end in .weight, as that of what has groups must: kept".into());
        }
        _ => input.shape[1],
    };
    let group = scheme.group_len(columns);
    if columns.is_multiple_of(group) {
        return Ok(());
    }
    keep(verdict, format!("its {columns} columns aren't whole groups of {group}: kept in its dtype").into())
}

/// What is to be known of experts before vLLM is given them.
pub fn warnings(recipe: &Recipe, model_types: &[&str], tensors: &[PlannedTensor]) -> Vec<String> {
    let Scheme::Groups(scheme) = recipe.scheme() else { return Vec::new() };
    let quantized = |tensor: &PlannedTensor| tensor.decision != Decision::Keep && tensor.role == Role::ExpertLinear;
    let one_by_one = model_types.contains(&"gpt_oss") && tensors.iter().any(quantized);
    let of_gpt_oss = one_by_one.then(|| {
        "vLLM (0.33) doesn't read a gpt_oss model's experts one by one; --format mxfp4 --layout gpt-oss is what it reads".to_owned()
    });
    mix(&scheme, tensors).into_iter().chain(of_gpt_oss).collect()
}

/// Experts of which only some have whole groups.
fn mix(scheme: &GroupScheme, tensors: &[PlannedTensor]) -> Option<String> {
    let experts = || tensors.iter().filter(|tensor| tensor.role == Role::ExpertLinear);
    let group = |tensor: &PlannedTensor| scheme.group_len(tensor.columns());
    let kept = experts().find(|tensor| !tensor.columns().is_multiple_of(group(tensor)))?;
    if experts().all(|tensor| tensor.decision == Decision::Keep) {
        return None;
    }
    let smaller = [64, 32].into_iter().find(|size| scheme.is_integer() && kept.columns().is_multiple_of(*size));
    let hint = smaller.map_or(String::new(), |size| format!("; --group-size {size} takes all of them"));
    Some(format!(
        "experts such as {:?} stay in {}, for {} columns aren't whole groups of {}, and vLLM doesn't read layers of which \
         some experts' matrices are quantized and others aren't{hint}",
        kept.name,
        kept.dtype,
        kept.columns(),
        group(kept),
    ))
}

/// Its loader takes all experts for MXFP4.
fn check_gpt_oss(
    source: &Source,
    model_types: &[&str],
    input: &Input,
    scheme: &GroupScheme,
    verdict: &Verdict,
) -> Result<()> {
    let error = |why: String| {
        let path = source.files[input.parts[0].file].path.clone();
        Err(Error::Experts { path, tensor: input.name.clone(), why })
    };
    if !model_types.contains(&"gpt_oss") {
        let other = "only gpt_oss models are read in gpt-oss's layout; leave --layout out for compressed-tensors'";
        return error(other.to_owned());
    }
    if !verdict.quantize {
        return error(format!("{}: in gpt-oss's layout all experts are quantized, or none", verdict.reason));
    }
    match input.shape[..] {
        [experts, columns, _] if columns.is_multiple_of(scheme.group_len(columns)) && experts <= MAX_EXPERTS => Ok(()),
        _ => error(format!("its shape is {:?}: the second dimension must be whole groups of 32", input.shape)),
    }
}

/// The Linear modules that are kept: whole names, or a pattern for all experts of a layer if none is quantized.
pub fn ignored(rules: &Rules, tensors: &[PlannedTensor], linear: &[bool], layout: Layout) -> Vec<String> {
    let container = |module: &str| module.find(".experts.").map(|at| module[..at + ".experts".len()].to_owned());
    let quantized = tensors.iter().filter(|tensor| tensor.decision != Decision::Keep);
    let quantized = quantized.flat_map(|tensor| names(rules, tensor));
    let with_quantized: HashSet<String> = quantized.filter_map(|module| container(&module)).collect();
    // ModelOpt lists them too.
    let listed = |tensor: &PlannedTensor| layout == Layout::Modelopt && tensor.role == Role::Embedding;
    let mut seen = HashSet::new();
    let kept = tensors.iter().zip(linear).filter(|(tensor, linear)| {
        tensor.decision == Decision::Keep && (**linear || tensor.role.is_expert() || listed(tensor))
    });
    let entry = |module: String| match (container(&module), layout) {
        (Some(container), Layout::CompressedTensors) if !with_quantized.contains(&container) => pattern(&container),
        (Some(container), Layout::Modelopt) if !with_quantized.contains(&container) => format!("{container}*"),
        _ => module,
    };
    let entries = kept.flat_map(|(tensor, _)| names(rules, tensor)).map(entry);
    let off_disk = rules.off_disk_modules().into_iter().map(str::to_owned);
    let mut entries: Vec<String> = entries.chain(off_disk).filter(|entry| seen.insert(entry.clone())).collect();
    if layout == Layout::Modelopt {
        entries.sort();
    }
    entries
}

/// A module as transformers calls it, and as the checkpoint does: vLLM maps that to its own names.
fn names(rules: &Rules, tensor: &PlannedTensor) -> Vec<String> {
    let mut names = rules.module_names(&tensor.name);
    let on_disk = tensor.name.strip_suffix(".weight").unwrap_or(&tensor.name);
    if names.iter().all(|name| name != on_disk) {
        names.push(on_disk.to_owned());
    }
    names
}

/// All that is in a module, whatever comes before the layers: vLLM renames that, but not in patterns.
fn pattern(container: &str) -> String {
    match container.find("layers.") {
        Some(at) if at > 0 => format!("re:.*\\.{}\\..*", container[at..].replace('.', "\\.")),
        _ => format!("re:{}\\..*", container.replace('.', "\\.")),
    }
}

/// An entry of [`ignored`]'s list that clients would take to mean a quantized weight's module, and that module.
pub fn clash(rules: &Rules, layout: Layout, entries: &[&str], quantized: &[&str]) -> Option<(String, String)> {
    let modules: Vec<String> = quantized.iter().flat_map(|weight| rules.module_names(weight)).collect();
    entries.iter().find_map(|entry| {
        let pattern = match (entry.strip_prefix("re:"), layout) {
            (Some(pattern), Layout::CompressedTensors) => format!("^(?:{pattern})"),
            (_, Layout::Modelopt) => format!("^{}$", regex::escape(entry).replace("\\*", ".*")),
            _ => format!("^{}$", regex::escape(entry)),
        };
        let pattern = Regex::new(&pattern).ok()?;
        let module = modules.iter().find(|module| pattern.is_match(module))?;
        Some(((*entry).to_owned(), module.clone()))
    })
}

/// Linears that clients put together, which must then have one global scale: names of modules beside each other.
const TOGETHER: &[&[&str]] = &[
    &["q_proj", "k_proj", "v_proj"],
    &["gate_proj", "up_proj"],
    &["w1", "w3"],
    &["wq_a", "wkv_a_with_mqa"],
    &["q_a_proj", "kv_a_proj_with_mqa"],
    &["in_proj_qkv", "in_proj_z"],
    &["in_proj_b", "in_proj_a"],
    &["query", "key", "value"],
];

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_matched_as_clients_match_them() {
        let rules = Rules::new(&["llama"]);
        let quantized = ["model.layers.1.mlp.experts.0.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"];
        let found = |layout, entry: &str| clash(&rules, layout, &[entry], &quantized).is_some();
        for (entry, compressed, modelopt, gpt_oss) in [
            ("model.layers.1.self_attn.q_proj", true, true, true),
            ("model.layers.1.self_attn", false, false, false),
            ("re:model\\.layers\\.1\\.mlp\\.experts\\..*", true, false, false),
            ("re:.*q_proj", true, false, false),
            ("re:q_proj", false, false, false),
            ("model.layers.1.mlp.experts*", false, true, false),
            ("q_proj", false, false, false),
        ] {
            let expected = [compressed, modelopt, gpt_oss];
            let layouts = [Layout::CompressedTensors, Layout::Modelopt, Layout::GptOss];
            assert_eq!(layouts.map(|layout| found(layout, entry)), expected, "{entry}");
        }
    }
}
