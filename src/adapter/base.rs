//! A base's tensors by the names that its loaded model has for them, which are those that an adapter is saved with.

use std::collections::HashMap;

use crate::checkpoint::Source;
use crate::dtype::FloatDtype;
use crate::models::experts::{ExpertParameter, Fusion, Shape};
use crate::models::facts::{Facts, Kind};
use crate::models::families::families;
use crate::read::Input;

/// A base's tensors.
pub(super) struct Base<'a> {
    pub(super) source: &'a Source,
    pub(super) inputs: &'a [Input],
    facts: Option<Facts>,
    /// By full names: of the checkpoint, and of the loaded model.
    by_name: HashMap<String, usize>,
    /// Parameters of all experts that the checkpoint has in other tensors.
    of_experts: HashMap<String, Vec<Piece>>,
    /// Full names by their ends.
    by_end: HashMap<String, Vec<String>>,
}

/// A tensor that is a part of a parameter of all experts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    /// Its number among the base's.
    pub input: usize,
    /// The expert whose it is; all experts' if none.
    pub expert: Option<usize>,
    /// Its place among the matrices that follow each other in the parameter.
    pub which: usize,
    /// The shape whose transpose checkpoints may have, if they may.
    pub transposed_unless: Option<Shape>,
}

/// What a name was found to be.
#[derive(Debug)]
pub(super) enum Found<'b> {
    /// A tensor, with its full name.
    Tensor(usize),
    /// A parameter in pieces.
    Pieces(&'b [Piece]),
}

/// Why a name is none of the base's.
#[derive(Debug)]
pub(super) struct NotFound(pub(super) String);

impl<'a> Base<'a> {
    pub(super) fn new(source: &'a Source, inputs: &'a [Input]) -> Base<'a> {
        let model_types = source.config.as_ref().map(|config| config.model_types()).unwrap_or_default();
        let architectures = source.config.as_ref().map(|config| config.architectures()).unwrap_or_default();
        let facts = Facts::new(&model_types).map(|facts| facts.of_classes(&architectures));
        let parameters = families(&model_types).flat_map(|family| family.experts);
        let fusions: Vec<Fusion> = parameters.filter_map(ExpertParameter::fusion).collect();
        let (by_name, of_experts, by_end) = Default::default();
        let mut base = Base { source, inputs, facts, by_name, of_experts, by_end };
        for (number, input) in inputs.iter().enumerate() {
            base.add(number, input, &fusions);
        }
        // A checkpoint's own names are surer than those that they are renamed to.
        for (number, input) in inputs.iter().enumerate() {
            base.by_name.insert(input.name.to_string(), number);
        }
        let names: Vec<String> = base.by_name.keys().chain(base.of_experts.keys()).cloned().collect();
        for name in names {
            base.by_end.entry(end_of(&name).to_owned()).or_default().push(name);
        }
        base
    }

    fn add(&mut self, number: usize, input: &Input, fusions: &[Fusion]) {
        let weight = input.name.ends_with(".weight");
        let modules = self.facts.as_ref().map(|facts| facts.modules(&input.name)).unwrap_or_default();
        let renamed = modules.into_iter().map(|module| if weight { format!("{module}.weight") } else { module });
        for name in renamed.chain([input.name.to_string()]) {
            for fusion in fusions {
                let Some((prefix, which, expert)) = fusion.source_of(&name) else { continue };
                let target =
                    if prefix.is_empty() { fusion.target.to_owned() } else { format!("{prefix}.{}", fusion.target) };
                let transposed_unless = fusion.transposed_unless;
                let pieces = self.of_experts.entry(target).or_default();
                if pieces.iter().all(|piece| piece.input != number) {
                    pieces.push(Piece { input: number, expert, which, transposed_unless });
                }
            }
            self.by_name.entry(name).or_insert(number);
        }
    }

    /// The tensor, or the parameter, that the loaded model calls so. Also whether what comes before the name is another there.
    ///
    /// # Errors
    /// When there is none, or more than one that could be meant.
    pub(super) fn find(&self, name: &str) -> Result<(Found<'_>, bool), NotFound> {
        if let Some(found) = self.get(name) {
            return Ok((found, false));
        }
        match self.by_end.get(end_of(name)).map(Vec::as_slice) {
            Some([only]) => {
                Ok((self.get(only).ok_or_else(|| NotFound("the base has no such tensor".to_owned()))?, true))
            }
            Some(several) => {
                let mut names: Vec<&str> = several.iter().map(String::as_str).collect();
                names.sort_unstable();
                Err(NotFound(format!(
                    "the base has no {name:?}, and more than one that could be meant: {}",
                    names.iter().take(3).map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ")
                )))
            }
            None => Err(NotFound(format!("the base has no {name:?}, under this name or one that it is loaded from"))),
        }
    }

    fn get(&self, name: &str) -> Option<Found<'_>> {
        match (self.of_experts.get(name), self.by_name.get(name)) {
            (Some(pieces), _) => Some(Found::Pieces(pieces)),
            (None, Some(number)) => Some(Found::Tensor(*number)),
            (None, None) => None,
        }
    }

    /// # Errors
    /// When a tensor isn't one of floats, which alone can be merged into.
    pub(super) fn check_is_a_float(&self, number: usize) -> Result<(), String> {
        let input = &self.inputs[number];
        match FloatDtype::of(input.dtype) {
            Some(_) => Ok(()),
            None => Err(format!("{:?} of the base is {}; expected BF16, F16 or F32", input.name, input.dtype)),
        }
    }

    /// Whether a weight is stored as `[in, out]`; `otherwise` where nothing is known of it.
    pub(super) fn is_conv1d(&self, number: usize, otherwise: bool) -> bool {
        let kinds = self.kinds(number);
        if kinds.is_empty() { otherwise } else { kinds.contains(&Kind::Conv1d) }
    }

    /// Whether its rows are put in other places when the model is loaded.
    pub(super) fn is_cut(&self, number: usize) -> bool {
        self.kinds(number).contains(&Kind::Cut)
    }

    fn kinds(&self, number: usize) -> Vec<Kind> {
        let input = &self.inputs[number];
        self.facts.as_ref().map(|facts| facts.kinds(&input.name, input.shape.len())).unwrap_or_default()
    }
}

/// A name from its first number on, and the part before that; of names without one, the last two parts.
fn end_of(name: &str) -> &str {
    let starts: Vec<usize> = std::iter::once(0).chain(name.match_indices('.').map(|(at, _)| at + 1)).collect();
    let is_number = |start: &usize| name[*start..].split('.').next().is_some_and(|part| part.parse::<u32>().is_ok());
    let from = match starts.iter().position(is_number) {
        Some(number) => number.saturating_sub(1),
        None => starts.len().saturating_sub(2),
    };
    &name[starts[from]..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_end_from_their_first_number_on() {
        assert_eq!(end_of("model.language_model.layers.3.mlp.gate.weight"), "layers.3.mlp.gate.weight");
        assert_eq!(end_of("base.lm_head.weight"), "lm_head.weight");
        assert_eq!(end_of("weight"), "weight");
    }
}
