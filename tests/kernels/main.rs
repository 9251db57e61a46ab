//! The CPU's kernels, against the specification and against the reference libraries' decoders.

#[path = "../support/mod.rs"]
mod support;

mod blocks;
mod decode;
mod groups;
mod sha256;
