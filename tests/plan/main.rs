//! What is decided, seen in what is converted.

#[path = "../support/mod.rs"]
mod support;

mod experts;
