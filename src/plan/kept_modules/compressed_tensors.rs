//! `ignore`, and its like: every Linear that stays in its dtype, in formats with groups. [`super::bitsandbytes`] is NF4's and FP4's.

use std::collections::HashSet;

use regex::Regex;

use crate::format::Layout;
use crate::models::{Role, Rules};
use crate::plan::{Decision, PlannedTensor};

/// The Linear modules that are kept: whole names, or a pattern for all experts of a layer if none is quantized.
pub(crate) fn list(rules: &Rules<'_>, tensors: &[PlannedTensor], linear: &[bool], layout: Layout) -> Vec<String> {
    let container = |module: &str| module.find(".experts.").map(|at| module[..at + ".experts".len()].to_owned());
    let quantized = tensors.iter().filter(|tensor| tensor.decision != Decision::Keep);
    let quantized: HashSet<String> = quantized.flat_map(|tensor| names(rules, tensor)).collect();
    let with_quantized: HashSet<String> = quantized.iter().filter_map(|module| container(module)).collect();
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
    let off_disk = rules.off_disk_modules().into_iter().map(str::to_owned).filter(|module| !quantized.contains(module));
    let mut entries: Vec<String> = entries.chain(off_disk).filter(|entry| seen.insert(entry.clone())).collect();
    if layout == Layout::Modelopt {
        entries.sort();
    }
    entries
}

/// A module as transformers calls it, and as the checkpoint does: vLLM maps that to its own names.
fn names(rules: &Rules<'_>, tensor: &PlannedTensor) -> Vec<String> {
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

/// An entry of [`list`] that clients would take to mean a quantized weight's module, and that module.
pub(crate) fn clash(
    rules: &Rules<'_>,
    layout: Layout,
    entries: &[&str],
    quantized: &[&str],
) -> Option<(String, String)> {
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
