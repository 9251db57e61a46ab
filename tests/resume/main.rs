//! Conversions that are stopped, and resumed.

#[path = "../support/mod.rs"]
mod support;

mod stopped;
