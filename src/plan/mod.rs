//! What becomes of every tensor, and where it goes: pure functions of headers, config and recipe.
pub mod architectures;
pub mod rules;
