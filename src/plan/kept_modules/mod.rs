//! The Linear modules that stay unquantized, as config.json lists them for clients.
//!
//! Every list is checked with the matching of the clients that read it ([`matching`]), over all modules that are quantized.

pub(crate) mod bitsandbytes;
pub(crate) mod compressed_tensors;
mod matching;
#[cfg(test)]
mod tests;

use crate::models::Role;
use crate::plan::{Decision, PlannedTensor};

/// What the lists need to know of a tensor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weight<'a> {
    name: &'a str,
    role: Role,
    quantized: bool,
    /// Whether the model makes, or may make, a Linear of it.
    linear: bool,
}

/// The plan's tensors; `linear` says of each whether the model makes, or may make, a Linear of it.
pub(crate) fn weights<'a>(tensors: &'a [PlannedTensor], linear: &[bool]) -> Vec<Weight<'a>> {
    let weight = |(tensor, linear): (&'a PlannedTensor, &bool)| Weight {
        name: &tensor.name,
        role: tensor.role,
        quantized: tensor.decision != Decision::Keep,
        linear: *linear,
    };
    tensors.iter().zip(linear).map(weight).collect()
}

/// The module that has all of a layer's experts, of one of them.
fn container(module: &str) -> Option<&str> {
    module.find(".experts.").map(|at| &module[..at + ".experts".len()])
}
