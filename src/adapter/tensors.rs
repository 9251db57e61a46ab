//! An adapter's tensors by their names: pairs of factors, and whole tensors.

use std::collections::BTreeMap;

use super::Adapter;
use crate::error::Result;

/// What PEFT puts before every name.
const PREFIX: &str = "base_model.model.";

/// What a wrapped module is called in its wrapper: once for each that it is in.
const WRAPPED: &str = ".base_layer";

/// Ends of names.
const ENDS: [(&str, End); 5] = [
    (".lora_A.weight", End::A),
    (".lora_B.weight", End::B),
    (".lora_B.bias", End::Bias),
    (".lora_embedding_A", End::EmbeddingA),
    (".lora_embedding_B", End::EmbeddingB),
];

#[derive(Clone, Copy)]
enum End {
    A,
    B,
    Bias,
    EmbeddingA,
    EmbeddingB,
}

/// What two factors are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// A Linear, or a parameter.
    Matrix,
    /// An embedding, whose product is transposed.
    Embedding,
}

/// Two factors, by their numbers among the adapter's tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pair {
    /// `[rank, in]`.
    pub a: usize,
    /// `[out, rank]`.
    pub b: usize,
    /// Of the module's bias, `[out]`.
    pub bias: Option<usize>,
}

/// What an adapter holds.
#[derive(Debug, Default)]
pub(super) struct Tensors {
    /// By module: the pairs of its wrappers, outermost first.
    pub pairs: BTreeMap<(String, Kind), Vec<Pair>>,
    /// Tensors in place of the base's: the base's name by PEFT, and the number.
    pub whole: Vec<(String, usize)>,
}

/// What was found of a pair.
#[derive(Default)]
struct Found {
    a: Option<usize>,
    b: Option<usize>,
    bias: Option<usize>,
}

impl Tensors {
    /// Tells all tensors of an adapter apart.
    ///
    /// # Errors
    /// When one is of another kind of adapter, or of a pair that isn't whole.
    pub(super) fn of(adapter: &Adapter) -> Result<Tensors> {
        let mut found: BTreeMap<(String, Kind), BTreeMap<usize, Found>> = BTreeMap::new();
        let mut whole = Vec::new();
        for (number, info) in adapter.file.tensors.iter().enumerate() {
            let name = info.name.strip_prefix(PREFIX).unwrap_or(&info.name);
            let Some((module, end)) = ENDS.iter().find_map(|(end, kind)| Some((name.strip_suffix(end)?, *kind))) else {
                check_is_whole(name).map_err(|why| adapter.error(&info.name, why))?;
                let own = name.replace(&format!("{WRAPPED}."), ".").replace(".modules_to_save.", ".");
                whole.push((own, number));
                continue;
            };
            let (module, depth) = unwrapped(module);
            let kind = if matches!(end, End::EmbeddingA | End::EmbeddingB) { Kind::Embedding } else { Kind::Matrix };
            let pair = found.entry((module, kind)).or_default().entry(depth).or_default();
            let place = match end {
                End::A | End::EmbeddingA => &mut pair.a,
                End::B | End::EmbeddingB => &mut pair.b,
                End::Bias => &mut pair.bias,
            };
            if let Some(other) = place.replace(number) {
                let other = &adapter.file.tensors[other].name;
                return Err(adapter.error(&info.name, format!("{other:?} is of the same module")));
            }
        }
        let mut pairs = BTreeMap::new();
        for (module, by_depth) in found {
            let whole =
                by_depth.into_iter().enumerate().map(|(expected, (depth, pair))| {
                    let pair = pair.whole(adapter)?;
                    let name = &adapter.file.tensors[pair.a].name;
                    match depth == expected {
                        true => Ok(pair),
                        false => Err(adapter
                            .error(name, format!("no tensors are there of the wrapper number {expected} around it"))),
                    }
                });
            pairs.insert(module, whole.collect::<Result<Vec<_>>>()?);
        }
        Ok(Tensors { pairs, whole })
    }
}

impl Found {
    fn whole(self, adapter: &Adapter) -> Result<Pair> {
        let name = |number: usize| adapter.file.tensors[number].name.to_string();
        match (self.a, self.b, self.bias) {
            (Some(a), Some(b), bias) => Ok(Pair { a, b, bias }),
            (Some(a), None, _) => Err(adapter.error(&name(a), "the lora_B that goes with it is missing")),
            (None, Some(b), _) | (None, None, Some(b)) => {
                Err(adapter.error(&name(b), "the lora_A that goes with it is missing"))
            }
            (None, None, None) => Err(crate::Error::internal("a pair of no tensors")),
        }
    }
}

/// A module's name without its wrappers', and how many there are.
fn unwrapped(module: &str) -> (String, usize) {
    let depth = module.matches(WRAPPED).count();
    (module.replace(WRAPPED, ""), depth)
}

/// Whether a name can be a tensor's of the base.
fn check_is_whole(name: &str) -> Result<(), &'static str> {
    if name.contains("lora_magnitude_vector") {
        return Err("it is of DoRA, which can't be merged; merge it with PEFT's merge_and_unload");
    }
    if name.contains(".token_adapter.") || name.contains("trainable_tokens_") {
        return Err("it is of trainable tokens, which can't be merged; merge it with PEFT's merge_and_unload");
    }
    if name.contains(".lora_") || name.contains(".default.") {
        return Err("expected a name that ends in lora_A.weight or lora_B.weight, as PEFT's save_pretrained writes it");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrappers_are_counted_and_taken_out_of_names() {
        assert_eq!(unwrapped("model.layers.0.mlp.experts"), ("model.layers.0.mlp.experts".to_owned(), 0));
        assert_eq!(unwrapped("mlp.experts.base_layer.base_layer"), ("mlp.experts".to_owned(), 2));
    }

    #[test]
    fn names_of_other_adapters_are_told_from_the_bases() {
        for name in ["a.lora_magnitude_vector", "a.token_adapter.trainable_tokens_delta", "a.lora_A.default.weight"] {
            assert!(check_is_whole(name).is_err(), "{name}");
        }
        assert!(check_is_whole("model.embed_tokens.weight").is_ok());
    }
}
