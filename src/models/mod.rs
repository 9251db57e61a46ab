//! What is known of model architectures: names, shapes and dtypes, never formats or files.
//!
//! Where transformers has the model's type, [`facts`] says what each tensor is. The others are told by name and shape
//! ([`roles`], [`rules`]). What a family does otherwise is one row of [`families`]: its experts' names on the hub, renames, exceptions, merged Linears, tied heads. Tables that
//! `scripts/make` takes from transformers and vLLM are in `data/`, and `tests/` compares every row with them.

mod caution;
pub(crate) mod diffusers;
mod evidence;
pub(crate) mod expert_layouts;
pub(crate) mod experts;
pub(crate) mod facts;
pub(crate) mod families;
pub(crate) mod family;
pub(crate) mod kept_for_training;
mod known;
pub(crate) mod merged_linears;
pub(crate) mod names;
pub(crate) mod roles;
pub(crate) mod rules;
pub(crate) mod towers;
mod words;

#[cfg(test)]
mod tests;

pub use roles::Role;
pub(crate) use rules::{Rules, Verdict};
