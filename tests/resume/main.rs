//! Conversions that are stopped, and gone on with.

#[path = "../support/mod.rs"]
mod support;

mod stopped;
