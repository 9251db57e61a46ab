//! Layers and experts that a checkpoint should have and hasn't: what a lost shard leaves behind, and no client reports.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::error::Warning;

const EXPERTS: &str = "experts";

/// What lists of modules are called whose numbers have no gaps.
const LISTS: [&str; 6] = [EXPERTS, "block", "blocks", "h", "layer", "layers"];

/// What a numbered module has: how many tensors, and the sum of their names' hashes, by which those of two are compared.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Contents(usize, u64);

/// A list's modules by number. Lists go by their whole names.
type Lists<'n> = BTreeMap<&'n str, BTreeMap<u64, Contents>>;

/// What is missing among the tensors of these names; `experts` are the numbers of a layer's experts in config.json.
pub(super) fn warning<'n>(names: impl Iterator<Item = &'n str> + Clone, experts: &[u64]) -> Option<Warning> {
    let mut numbers: HashMap<&str, usize> = HashMap::new();
    let mut found: Vec<(&str, BTreeMap<u64, Contents>)> = Vec::new();
    // Most names are in the lists of the one before: those in lists, and those in lists in them.
    let mut last: [Option<(&str, usize)>; 2] = [None; 2];
    for (depth, (list, number, rest)) in names.clone().flat_map(|name| numbered(name).enumerate()) {
        let last = &mut last[depth.min(1)];
        let place = match *last {
            Some((same, place)) if same == list => place,
            _ => *numbers.entry(list).or_insert_with(|| {
                found.push((list, BTreeMap::new()));
                found.len() - 1
            }),
        };
        *last = Some((list, place));
        let Contents(tensors, hashes) = found[place].1.entry(number).or_default();
        let mut hasher = DefaultHasher::new();
        rest.hash(&mut hasher);
        (*tensors, *hashes) = (*tensors + 1, hashes.wrapping_add(hasher.finish()));
    }
    let lists: Lists<'n> = found.into_iter().collect();
    let missing = lists.iter().flat_map(|(list, modules)| missing(list, modules, experts).map(move |n| (*list, n)));
    let incomplete = lists.iter().filter(|(list, _)| list.ends_with(EXPERTS));
    let incomplete = incomplete.flat_map(|(list, modules)| incomplete_in(modules).map(move |number| (*list, number)));
    let mut found: Vec<String> = missing.map(|(list, number)| format!("{list}.{number}")).collect();
    let partly: Vec<(&str, u64)> = incomplete.collect();
    if let Some((list, number)) = partly.first() {
        let lacking = lacking(names, list, *number, lists[list].keys().copied());
        found.push(format!("{lacking} of {list}.{number}"));
    }
    let all = found.len() + partly.len().saturating_sub(1);
    let shown = found.iter().take(3).cloned().collect::<Vec<_>>().join(", ");
    let more = if all > 3 { format!(" and {} more", all - 3) } else { String::new() };
    let message = format!("missing though others like it are there: {shown}{more}; was a shard lost?");
    (all > 0).then(|| message.into())
}

/// The lists that a tensor is in: each list's name, the number in it, and the rest of the tensor's name.
fn numbered(name: &str) -> impl Iterator<Item = (&str, u64, &str)> {
    let mut start = 0;
    let parts = name.split('.').map(move |part| {
        let end = start + part.len();
        start = end + 1;
        (part, end)
    });
    parts.filter(|(part, _)| LISTS.contains(part)).filter_map(move |(_, end)| {
        let (number, rest) = name.get(end + 1..)?.split_once('.')?;
        // What has a weight itself is no layer: nn.Sequential has activations, without any, between its Linears.
        let is_layer = rest.contains('.');
        Some((&name[..end], number.parse().ok().filter(|_| is_layer)?, rest))
    })
}

/// Numbers that a list skips, or experts that it should go on with.
fn missing(list: &str, modules: &BTreeMap<u64, Contents>, experts: &[u64]) -> impl Iterator<Item = u64> {
    let last = modules.keys().last().copied().unwrap_or(0);
    // Another model in the same checkpoint may have fewer.
    let fitting = experts.iter().all(|count| *count > last.saturating_add(1)).then(|| experts.iter().min()).flatten();
    let end = fitting.filter(|_| list.ends_with(EXPERTS)).copied().unwrap_or(last.saturating_add(1));
    // Numbers are the source's to choose: a list is walked by what it has.
    let present: HashSet<u64> = modules.keys().copied().collect();
    let end = end.min(modules.len() as u64 * 2 + 1024);
    (0..end).filter(move |number| !present.contains(number)).collect::<Vec<_>>().into_iter()
}

/// Experts whose tensors aren't those that most have.
fn incomplete_in(modules: &BTreeMap<u64, Contents>) -> impl Iterator<Item = u64> {
    let mut counts: BTreeMap<Contents, usize> = BTreeMap::new();
    modules.values().for_each(|contents| *counts.entry(*contents).or_default() += 1);
    // Of equally common ones, the one with more.
    let usual = counts.iter().max_by_key(|(contents, count)| (**count, contents.0)).map(|(contents, _)| *contents);
    modules.iter().filter(move |(_, contents)| Some(**contents) != usual).map(|(number, _)| *number)
}

/// A tensor that another of the list has and this one hasn't.
fn lacking<'n>(
    names: impl Iterator<Item = &'n str>,
    list: &str,
    number: u64,
    others: impl Iterator<Item = u64>,
) -> String {
    let others: HashSet<u64> = others.filter(|other| *other != number).collect();
    let (mut own, mut theirs) = (HashSet::new(), Vec::new());
    for (_, found, rest) in names.flat_map(numbered).filter(|(of, _, _)| *of == list) {
        if found == number {
            own.insert(rest);
        } else if others.contains(&found) {
            theirs.push(rest);
        }
    }
    theirs.into_iter().find(|rest| !own.contains(rest)).map_or_else(|| "a part".to_owned(), |rest| format!("{rest:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(layer: usize, experts: &[usize]) -> Vec<String> {
        let expert = |expert: &usize| {
            ["gate", "up", "down"].map(|name| format!("model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"))
        };
        let norm = format!("model.layers.{layer}.input_layernorm.weight");
        experts.iter().flat_map(expert).chain([norm]).collect()
    }

    fn found(names: &[String], experts: &[u64]) -> Option<String> {
        warning(names.iter().map(String::as_str), experts).map(|warning| warning.message)
    }

    #[test]
    fn whole_checkpoints_miss_nothing() {
        let mut names: Vec<String> = (0..3).flat_map(|number| layer(number, &[0, 1, 2, 3])).collect();
        assert_eq!(found(&names, &[4]), None);
        assert_eq!(found(&names, &[]), None);
        // A second model with fewer experts, a list that isn't of layers, and a dense layer.
        names.extend(["score.0.weight".to_owned(), "score.2.weight".to_owned()]);
        names.extend(["aligner.layers.0.weight".to_owned(), "aligner.layers.2.weight".to_owned()]);
        names.push("model.layers.3.mlp.up_proj.weight".to_owned());
        assert_eq!(found(&names, &[4, 64]), None);
    }

    #[test]
    fn missing_layers_and_experts_and_parts_of_them_are_named() {
        let mut names: Vec<String> = [0, 1, 3].into_iter().flat_map(|number| layer(number, &[0, 1, 2])).collect();
        assert!(found(&names, &[3]).unwrap().contains("model.layers.2;"));
        assert!(found(&names, &[4]).unwrap().contains("model.layers.0.mlp.experts.3,"));
        names = layer(0, &[0, 1, 3]);
        assert!(found(&names, &[]).unwrap().contains("model.layers.0.mlp.experts.2;"));
        names = layer(0, &[0, 1, 2]);
        names.remove(7);
        let said = found(&names, &[3]).unwrap();
        assert!(said.contains("\"up_proj.weight\" of model.layers.0.mlp.experts.2;"), "{said}");
    }

    #[test]
    fn numbers_from_strangers_cost_nothing() {
        let names = ["model.layers.18446744073709551614.a.weight", "model.layers.99999999999999999999999.a.weight"];
        assert!(warning(names.into_iter(), &[u64::MAX]).is_some());
    }
}
