//! The command as users run it.

#[path = "../support/mod.rs"]
mod support;

mod command;
mod destinations;
mod errors;
mod limits;
mod odd_files;
mod streams;
mod trace;
