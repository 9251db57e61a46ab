//! What is known of model architectures.

pub mod architectures;
pub mod experts;
pub mod rules;

pub use rules::Role;
