//! What a checkpoint tells of its tensors beyond their names: numbers in config.json, and the shapes of other tensors.

use std::collections::{HashMap, HashSet};
use std::sync::OnceLock;

use serde_json::{Map, Value};

use crate::checkpoint::Source;
use crate::models::words::{self, is_number};

/// Configs in configs that are looked into: real ones have three or four.
const DEEPEST: usize = 8;

/// A kind of number in config.json that the rows of a table, a head or a router equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Count {
    Vocabulary,
    Labels,
    Experts,
    Positions,
}

impl Count {
    /// What a number under this key counts.
    fn of(key: &str) -> Option<Count> {
        let has = |words: &[&str]| words.iter().any(|word| key.contains(word));
        let counts = has(&["num", "n_"]) || key.starts_with('n');
        match key {
            _ if has(&["vocab", "codebook_size", "num_embeddings", "ntoken"]) => Some(Count::Vocabulary),
            _ if has(&["num_labels", "num_classes", "n_classes", "n_labels", "num_tags"]) => Some(Count::Labels),
            _ if key.ends_with("_labels") && counts => Some(Count::Labels),
            _ if has(&["per_tok", "topk", "top_k", "shared", "size", "dim", "activated", "group"]) => None,
            _ if has(&["expert"]) && counts => Some(Count::Experts),
            _ if has(&["position_embeddings", "n_positions", "max_seq", "seq_len", "seq_length", "n_ctx"]) => {
                Some(Count::Positions)
            }
            _ if has(&["source_positions", "target_positions", "num_positions"]) => Some(Count::Positions),
            _ => None,
        }
    }
}

/// What is known of one checkpoint; nothing of the default.
#[derive(Debug, Default)]
pub(crate) struct Evidence<'s> {
    /// Numbers that count something, with the keys they stand under.
    counts: Vec<(u64, Count, String)>,
    source: Option<&'s Source>,
    /// Made when it is first asked for: most checkpoints need none.
    shapes: OnceLock<Shapes<'s>>,
}

#[derive(Debug, Default)]
struct Shapes<'s> {
    by_name: HashMap<&'s str, &'s [u64]>,
    /// Of each module, the last names of those in it that have a matrix for a weight.
    inside: HashMap<&'s str, Vec<&'s str>>,
    /// Lengths of rows of all matrices.
    widths: HashSet<u64>,
    /// Rows of tables that are called embeddings.
    tables: HashSet<u64>,
}

impl<'s> Evidence<'s> {
    /// Of a checkpoint's headers and config.json.
    pub(crate) fn of(source: &'s Source) -> Evidence<'s> {
        let mut counts = Vec::new();
        if let Some(config) = &source.config {
            collect(config.values(), DEEPEST, &mut counts);
        }
        Evidence { counts, source: Some(source), shapes: OnceLock::new() }
    }

    /// What there are `rows` of, and config.json's key; of several, the first in the order of [`Count`], which says most.
    pub(super) fn count(&self, rows: u64) -> Option<(Count, &str)> {
        let equal = self.counts.iter().filter(|(number, _, _)| *number == rows);
        equal.min_by_key(|(_, count, _)| *count).map(|(_, count, key)| (*count, key.as_str()))
    }

    /// The numbers of a layer's experts.
    pub(super) fn experts(&self) -> Vec<u64> {
        self.counts.iter().filter(|(_, count, _)| *count == Count::Experts).map(|(number, _, _)| *number).collect()
    }

    /// Whether some matrix takes vectors of this length: then a matrix of as many rows may well make them.
    pub(super) fn is_width(&self, len: u64) -> bool {
        self.shapes().widths.contains(&len)
    }

    /// Whether an embedding has so many rows, which then count a vocabulary.
    pub(super) fn is_a_tables(&self, rows: u64) -> bool {
        self.shapes().tables.contains(&rows)
    }

    /// The shape of the tensor of this name.
    pub(super) fn shape(&self, name: &str) -> Option<&'s [u64]> {
        self.shapes().by_name.get(name).copied()
    }

    /// Rows and columns of a module's weight, if that is a matrix.
    pub(super) fn matrix(&self, module: &str) -> Option<[u64; 2]> {
        self.shape(&format!("{module}.weight"))?.try_into().ok()
    }

    /// The modules beside this one that have a matrix for a weight: last name, rows and columns.
    pub(super) fn beside<'a>(&'a self, module: &'a str) -> impl Iterator<Item = (&'s str, [u64; 2])> + 'a {
        let (parent, own) = split_last(module);
        let others = self.shapes().inside.get(parent).into_iter().flatten().filter(move |name| **name != own);
        others.filter_map(move |name| {
            let sibling = if parent.is_empty() { (*name).to_owned() } else { format!("{parent}.{name}") };
            Some((*name, self.matrix(&sibling)?))
        })
    }

    fn shapes(&self) -> &Shapes<'s> {
        self.shapes.get_or_init(|| {
            let tensors = self.source.into_iter().flat_map(|source| source.tensors());
            let mut shapes = Shapes::default();
            for (_, tensor) in tensors {
                shapes.by_name.insert(&tensor.name, &tensor.shape);
                if let ([rows, columns], Some(module)) = (&tensor.shape[..], tensor.name.strip_suffix(".weight")) {
                    shapes.widths.insert(*columns);
                    let (parent, own) = split_last(module);
                    if words::is_embedding(own) {
                        shapes.tables.insert(*rows);
                    }
                    shapes.inside.entry(parent).or_default().push(own);
                }
            }
            shapes
        })
    }
}

/// The numbers of a config, and of those in it, that count something.
fn collect(config: &Map<String, Value>, depth: usize, counts: &mut Vec<(u64, Count, String)>) {
    let mut add = |number: u64, count: Count, key: &str| {
        if number > 0 {
            counts.push((number, count, key.to_owned()));
        }
    };
    for (key, value) in config {
        match value {
            Value::Number(number) => {
                number.as_u64().zip(Count::of(key)).into_iter().for_each(|(number, count)| add(number, count, key));
            }
            Value::Array(numbers) => {
                numbers
                    .iter()
                    .filter_map(Value::as_u64)
                    .for_each(|number| Count::of(key).into_iter().for_each(|count| add(number, count, key)));
            }
            Value::Object(labels) if matches!(key.as_str(), "id2label" | "label2id") && !labels.is_empty() => {
                add(labels.len() as u64, Count::Labels, key);
            }
            _ => {}
        }
    }
    if depth > 0 {
        config.values().filter_map(Value::as_object).for_each(|nested| collect(nested, depth - 1, counts));
    }
}

/// The module around it, and its own last name.
fn split_last(module: &str) -> (&str, &str) {
    module.rsplit_once('.').unwrap_or(("", module))
}

/// Whether a module is in a numbered layer, or is one of its parts.
pub(super) fn is_in_a_layer(module: &str) -> bool {
    module.split('.').rev().skip(1).any(is_number)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn numbers_that_count_something_are_found_wherever_they_stand() {
        let config = json!({
            "hidden_size": 256,
            "num_labels": 5,
            "max_position_embeddings": 512,
            "text_config": {"vocab_size": 320, "num_experts_per_tok": 3, "moe_num_experts": [4, 6], "num_hidden_layers": 7},
            "audio": {"decoder": {"codebook_size": 2048, "id2label": {"0": "a", "1": "b", "2": "c"}}},
            "n_routed_experts": 512,
            "n_shared_experts": 2,
            "padded_vocab_size": -1,
        });
        let mut found = Vec::new();
        collect(config.as_object().unwrap(), DEEPEST, &mut found);
        let mut found: Vec<(u64, Count)> = found.into_iter().map(|(number, count, _)| (number, count)).collect();
        found.sort();
        let expected = [
            (3, Count::Labels),
            (4, Count::Experts),
            (5, Count::Labels),
            (6, Count::Experts),
            (320, Count::Vocabulary),
            (512, Count::Experts),
            (512, Count::Positions),
            (2048, Count::Vocabulary),
        ];
        assert_eq!(found, expected);
    }
}
