//! `ignore`, and its like: every Linear that stays in its dtype, in formats with groups. [`super::bitsandbytes`] is NF4's and FP4's.

use std::collections::{HashMap, HashSet};

use super::matching::Modules;
use super::{Weight, container};
use crate::format::Layout;
use crate::models::{Role, Rules};

/// Lists that are longer are made shorter by patterns.
const LONG: usize = 64;

/// Modules alike that a pattern stands for, at least.
const MANY: usize = 8;

/// The Linear modules that are kept: whole names, and patterns: for all experts of a layer if none is quantized, and in a long list
/// for whole towers and for what is kept in every layer.
pub(crate) fn list(rules: &Rules, weights: &[Weight], layout: Layout) -> Vec<String> {
    let quantized = weights.iter().filter(|weight| weight.quantized);
    let quantized = Modules::new(quantized.flat_map(|weight| names(rules, weight)).collect());
    // vLLM has plain Linears for routers and for what transformers makes of subclasses of nn.Linear.
    let listed = |weight: &&Weight| match weight.role {
        Role::Linear | Role::Router | Role::ExpertLinear | Role::FusedExperts => true,
        Role::Embedding => weight.linear || layout == Layout::Modelopt, // ModelOpt lists them too.
        _ => weight.linear,
    };
    let kept = weights.iter().filter(|weight| !weight.quantized).filter(listed);
    let mut seen = HashSet::new();
    // The first is what the class of config.json calls it. What further classes do may be a quantized module's name in others again:
    // CLIP's two towers have one name each where they are models of their own.
    let names = |weight| names(rules, weight).into_iter().enumerate();
    let modules = kept.flat_map(|weight| names(weight).map(|(i, module)| (i, weight.role, module)));
    let modules = modules.filter(|(i, _, module)| (*i == 0 || !quantized.has(module)) && seen.insert(module.clone()));
    let kept: Vec<(Role, String)> = modules.map(|(_, role, module)| (role, module)).collect();
    let folded = match layout {
        Layout::CompressedTensors if kept.len() > LONG => patterns(&kept, &quantized),
        _ => HashMap::new(),
    };
    let entry = |(role, module): &(Role, String)| match (folded.get(module), container(module), layout) {
        (Some(pattern), ..) => pattern.clone(),
        (_, Some(experts), Layout::CompressedTensors) if !role.is_expert() || quantized.inside(experts).is_some() => {
            module.clone()
        }
        (_, Some(experts), Layout::CompressedTensors) => format!("re:{}", inside_alone(experts, &quantized)),
        (_, Some(experts), Layout::Modelopt) if role.is_expert() && quantized.excluded_by(experts).is_none() => {
            format!("{experts}*")
        }
        (.., Layout::Modelopt) if quantized.excluded_by(module).is_some() => whole(module),
        _ => module.clone(),
    };
    let off_disk = rules.off_disk_modules().into_iter().filter_map(|module| spelled(module, layout));
    let off_disk = off_disk.filter(|entry| matched(entry, layout, &quantized).is_none());
    let mut entries: Vec<String> = kept.iter().map(entry).chain(off_disk).collect();
    let mut seen = HashSet::new();
    entries.retain(|entry| seen.insert(entry.clone()));
    if layout == Layout::Modelopt {
        entries.sort();
    }
    entries
}

/// An entry for modules without a tensor, whose name may be a regular expression.
fn spelled(module: String, layout: Layout) -> Option<String> {
    match (module.contains('\\'), layout) {
        (false, _) => Some(module),
        (true, Layout::CompressedTensors) => Some(format!("re:{module}$")),
        (true, _) => None,
    }
}

/// A wildcard for a module of this name only: as a plain name, vLLM takes it to mean every module whose name it is part of.
fn whole(module: &str) -> String {
    let mut wildcard = module.to_owned();
    if let Some(last) = wildcard.pop() {
        wildcard += &format!("[{last}]");
    }
    wildcard
}

/// A module as transformers calls it, and as the checkpoint does: vLLM maps that to its own names.
fn names(rules: &Rules, weight: &Weight) -> Vec<String> {
    let mut names = rules.module_names(weight.name);
    let on_disk = weight.name.strip_suffix(".weight").unwrap_or(weight.name);
    if names.iter().all(|name| name != on_disk) {
        names.push(on_disk.to_owned());
    }
    names
}

/// Patterns for the modules that many share: for a tower of which nothing is quantized, or for one name in many layers. Each is
/// tried on all that is quantized.
fn patterns(kept: &[(Role, String)], quantized: &Modules) -> HashMap<String, String> {
    let mut alike: HashMap<String, Vec<&str>> = HashMap::new();
    for (_, module) in kept {
        let pattern = tower(module, quantized).unwrap_or_else(|| in_every_layer(module));
        alike.entry(pattern).or_default().push(module);
    }
    let fits = |pattern: &str| quantized.matched_by(pattern).is_none();
    let many = alike.into_iter().filter(|(pattern, modules)| modules.len() >= MANY && fits(pattern));
    many.flat_map(|(pattern, modules)| modules.into_iter().map(move |m| (m.to_owned(), format!("re:{pattern}"))))
        .collect()
}

/// A pattern for all of the largest module around this one that has nothing quantized and isn't one of many.
fn tower(module: &str, quantized: &Modules) -> Option<String> {
    let outside_layers = module.split('.').position(is_number).unwrap_or(0).saturating_sub(1);
    let borders = module.match_indices('.').map(|(at, _)| at).take(outside_layers);
    let largest = borders.map(|at| &module[..at]).find(|outer| quantized.inside(outer).is_none())?;
    Some(inside(largest))
}

/// A pattern for all that is in a module, whatever comes before the layers or the module's own name: vLLM renames that, but not in
/// patterns.
fn inside(outer: &str) -> String {
    let escaped = |part: &str| part.replace('.', "\\.");
    match (outer.find("layers."), outer.rsplit_once('.')) {
        (Some(at), _) if at > 0 => format!(".*\\.{}\\..*", escaped(&outer[at..])),
        (None, Some((_, own))) => format!("(.*\\.)?{}\\..*", escaped(own)),
        _ => format!("{}\\..*", escaped(outer)),
    }
}

/// The same, or with its whole name where the pattern would mean what is quantized: a tower's experts and the language model's.
fn inside_alone(outer: &str, quantized: &Modules) -> String {
    let pattern = inside(outer);
    match quantized.matched_by(&pattern) {
        None => pattern,
        Some(_) => format!("{}\\..*", regex::escape(outer)),
    }
}

/// A pattern for a module of this name in any layer.
fn in_every_layer(module: &str) -> String {
    let parts: Vec<&str> = module.split('.').collect();
    let start = parts.iter().position(|part| is_number(part)).unwrap_or(0).saturating_sub(1);
    let parts = parts[start..].iter().map(|part| if is_number(part) { "\\d+".to_owned() } else { regex::escape(part) });
    format!("(.*\\.)?{}$", parts.collect::<Vec<_>>().join("\\."))
}

fn is_number(part: &str) -> bool {
    part.bytes().all(|byte| byte.is_ascii_digit())
}

/// An entry of [`list`] that clients would take to mean a quantized weight's module, and that module.
pub(crate) fn clash(rules: &Rules, layout: Layout, entries: &[&str], quantized: &[&str]) -> Option<(String, String)> {
    // As the class of config.json calls them.
    let modules =
        Modules::new(quantized.iter().filter_map(|weight| rules.module_names(weight).into_iter().next()).collect());
    entries.iter().find_map(|entry| Some(((*entry).to_owned(), matched(entry, layout, &modules)?)))
}

/// A module that an entry means to the layout's clients.
fn matched(entry: &str, layout: Layout, modules: &Modules) -> Option<String> {
    let found = match (entry.strip_prefix("re:"), layout) {
        (Some(pattern), Layout::CompressedTensors) => modules.matched_by(pattern),
        (_, Layout::Modelopt) => modules.excluded_by(entry),
        _ => return modules.has(entry).then(|| entry.to_owned()),
    };
    found.map(std::borrow::Cow::into_owned)
}
