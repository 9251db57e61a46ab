//! What is known of model architectures: names, shapes and dtypes, never formats or files.
//!
//! Most tensors are told by name and shape ([`roles`], [`rules`]). What a family does otherwise is one row of
//! [`families`]: its experts' names on the hub, renames, exceptions, merged Linears, tied heads. Tables that
//! `scripts/make` takes from transformers and vLLM are in `data/`, and `tests/` compares every row with them.

pub mod experts;
pub mod families;
pub mod family;
pub mod merged_linears;
pub mod names;
pub mod roles;
pub mod rules;

#[cfg(test)]
mod tests;

pub use roles::Role;
pub use rules::{Rules, Verdict};
