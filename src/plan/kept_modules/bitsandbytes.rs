//! `llm_int8_skip_modules`: every Linear that stays in its dtype, as clients call it, and nothing else.

use std::collections::{BTreeSet, HashSet};

use crate::error::{Error, Result};
use crate::models::{Role, Rules};
use crate::plan::{Decision, PlannedTensor};

/// The list for `tensors`; `linear` says of each whether the model makes, or may make, a Linear of it.
///
/// # Errors
/// When an entry would also match a module that is quantized.
pub(crate) fn list(rules: &Rules<'_>, tensors: &[PlannedTensor], linear: &[bool]) -> Result<Vec<String>> {
    let mut kept = Vec::new();
    let mut quantized = Vec::new();
    for (tensor, linear) in tensors.iter().zip(linear) {
        let modules = if tensor.role == Role::ExpertLinear || *linear {
            rules.module_names(&tensor.name)
        } else {
            continue;
        };
        if tensor.decision == Decision::Keep { &mut kept } else { &mut quantized }.extend(modules);
    }
    let kept = with_containers_of_experts(kept, &quantized);
    let quantized = Modules::new(quantized);
    if let Some((kept, quantized)) = kept.iter().find_map(|entry| Some((entry.clone(), quantized.matched_by(entry)?))) {
        return Err(Error::AmbiguousSkipEntry { kept, quantized });
    }
    let mut entries = kept;
    for module in rules.off_disk_modules() {
        if !entries.iter().any(|entry| entry == module) && quantized.matched_by(module).is_none() {
            entries.push(module.to_owned());
        }
    }
    Ok(entries)
}

/// An entry of a skip list that clients would take to mean a quantized tensor's module, and that module.
pub(crate) fn clash(rules: &Rules<'_>, entries: &[&str], quantized: &[&str]) -> Option<(String, String)> {
    let modules = Modules::new(quantized.iter().flat_map(|tensor| rules.module_names(tensor)).collect());
    entries.iter().find_map(|entry| Some(((*entry).to_owned(), modules.matched_by(entry)?)))
}

/// One entry for all experts of a layer in place of one for each, where none of them is quantized. Each entry once.
fn with_containers_of_experts(kept: Vec<String>, quantized: &[String]) -> Vec<String> {
    let container = |module: &str| module.find(".experts.").map(|at| module[..at + ".experts".len()].to_owned());
    let with_quantized: HashSet<String> = quantized.iter().filter_map(|module| container(module)).collect();
    let mut seen = HashSet::new();
    let entries = kept.into_iter().map(|module| match container(&module) {
        Some(container) if !with_quantized.contains(&container) => container,
        _ => module,
    });
    entries.filter(|entry| seen.insert(entry.clone())).collect()
}

/// Modules' names, forwards and backwards in order: those inside an entry, and those that end like it, lie together.
struct Modules {
    names: BTreeSet<String>,
    reversed: BTreeSet<String>,
}

impl Modules {
    fn new(modules: Vec<String>) -> Modules {
        let reversed = modules.iter().map(|module| reverse(module)).collect();
        Modules { names: modules.into_iter().collect(), reversed }
    }

    /// A module that `entry` matches, as [`skip_entry_matches`] has it.
    fn matched_by(&self, entry: &str) -> Option<String> {
        let first = |set: &BTreeSet<String>, start: String| {
            set.range(start.clone()..).next().filter(|name| name.starts_with(&start)).cloned()
        };
        let ends_alike = first(&self.reversed, reverse(entry)).map(|name| reverse(&name));
        ends_alike.or_else(|| first(&self.names, format!("{entry}.")))
    }
}

fn reverse(name: &str) -> String {
    name.chars().rev().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::names::skip_entry_matches;

    #[test]
    fn modules_are_matched_as_clients_match_them() {
        let names = ["lm_head", "model.pre_classifier", "a.b.c", "a.b", "a.bc", "x.lm_head.y", "model.layers.11.q"];
        let entries = ["lm_head", "classifier", "a.b", "b", "c", "a", "model.layers.1", "q", "x.lm", "y.z", "head.y"];
        for entry in entries {
            let expected = names.iter().any(|name| skip_entry_matches(entry, name));
            let modules = Modules::new(names.iter().map(|&name| name.to_owned()).collect());
            assert_eq!(modules.matched_by(entry).is_some(), expected, "{entry}");
        }
    }

    #[test]
    fn experts_of_a_layer_are_one_entry_unless_some_are_quantized() {
        let own = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let kept = own(&["l.0.experts.0.w1", "l.0.experts.0.w2", "l.1.experts.0.w1", "lm_head"]);
        let quantized = own(&["l.1.experts.1.w1"]);
        assert_eq!(with_containers_of_experts(kept, &quantized), ["l.0.experts", "l.1.experts.0.w1", "lm_head"]);
    }
}
