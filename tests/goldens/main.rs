//! Our bytes against the reference libraries' own.

#[path = "../support/mod.rs"]
mod support;

mod blocks;
mod groups;
mod sources;
