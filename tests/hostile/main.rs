//! What strangers wrote: nothing that reads it panics, or allocates what its size doesn't warrant.

#[path = "../support/mod.rs"]
mod support;

mod allocations;
mod fuzz_corpus;
mod targets;
