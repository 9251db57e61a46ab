//! Turn a bf16 Hugging Face safetensors checkpoint into a pre-quantized 4-bit one: once, offline, in constant memory, without a
//! model definition.
//!
//! [`plan`] reads headers and decides where every byte of the output goes; [`Conversion::execute`] writes it, and resumes what was
//! stopped; [`verify`] checks the result. A [`Recipe`] holds the choices that decide the output's bytes, [`Options`] those that
//! don't: memory, threads, devices.
//!
//! ```
//! use prequant::{Options, Recipe, VerifyOptions, plan, verify};
//!
//! # let folder = tempfile::tempdir()?;
//! # std::env::set_current_dir(env!("CARGO_MANIFEST_DIR"))?;
//! # let destination = folder.path().join("converted");
//! let conversion = plan("fixtures/tiny-qwen3-moe", Recipe::default(), Options::default())?;
//! let manifest = conversion.execute(&destination, &())?;
//! println!("{:.2} bits per weight", manifest.summary.bits_per_weight);
//!
//! let report = verify(&destination, VerifyOptions::default())?;
//! assert!(report.differences.is_empty());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Other ways in: [`plan_merge`] merges an adapter, [`plan_dequantize`] decodes a converted checkpoint, [`verify_against`] converts a source again and compares every
//! byte, [`inspect`] lists the weights of any checkpoint, and [`Manifest`] is what a conversion writes down of itself. An [`Error`]
//! says what was found and what was expected, and carries ways out as [`Hint`]s.
//!
//! Output depends on the source's bytes and the recipe only: not on threads, memory, devices or the machine.
//!
//! # Examples
//! `examples/plan.rs` prints every decision before anything is written:
//! ```no_run
#![doc = include_str!("../examples/plan.rs")]
//! ```
//! `examples/convert.rs` converts, and tells of each file:
//! ```no_run
#![doc = include_str!("../examples/convert.rs")]
//! ```
//! `examples/verify.rs` checks the result:
//! ```no_run
#![doc = include_str!("../examples/verify.rs")]
//! ```
#![deny(unreachable_pub, clippy::print_stdout, clippy::print_stderr)]

mod adapter;
mod backend;
mod checkpoint;
mod converted;
mod dtype;
mod error;
mod format;
#[doc(hidden)]
pub mod internal;
mod json_text;
mod kernel;
mod layout;
mod manifest;
mod models;
mod ops;
mod pipeline;
mod plan;
mod read;
mod recipe;
mod shape;
mod stats;
mod store;
mod threads;
mod units;

use std::path::Path;

pub use backend::{Backend, ChosenDevice, Device, DeviceChoice};
pub use dtype::{Dtype, FloatDtype};
pub use error::{Error, ErrorKind, Hint, Result, Setting, Warning};
pub use format::{BlockSize, FORMATS, FormatSpec, GroupSize, Layout, QuantStorage};
pub use manifest::{
    AdapterRecord, DecisionRecord, FileRecord, LeftOutRecord, Manifest, ManifestHead, NotHeld, OutputRecord,
    SourceFileRecord, SourceRecord, SourceTensorRecord, Summary, TensorRecord, Tool,
};
pub use models::Role;
pub use ops::dequantize::Dequantization;
pub use ops::inspect::{Contents, Stored, StoredWeight, inspect};
pub use ops::job::finished::Finished;
pub use ops::options::Options;
pub use ops::quantize::Conversion;
pub use ops::verify::{Difference, DifferenceClass, Options as VerifyOptions, Report};
pub use pipeline::{Budget, Progress, Trace};
pub use plan::{Decision, Plan, PlannedFile, PlannedTensor};
pub use recipe::{ExpertLayout, Guard, NonFinitePolicy, Recipe, RecipeOptions, Weights};
pub use stats::{AbsmaxError, Range, Statistics};
pub use store::Sha256Hash;
pub use units::Bytes;

/// Opens the checkpoint at `source`, a folder or a single safetensors file, and plans its conversion; reads headers only, and
/// writes nothing.
///
/// If `source` is a converted checkpoint itself and `recipe` is its own but for the layout of its experts, these are
/// rewritten: bytes are copied, and nothing is quantized. [`recipe_of`] gives its recipe.
///
/// # Errors
/// When the source is no checkpoint or damaged, or the recipe doesn't fit it; or there is too little memory.
pub fn plan(source: impl AsRef<Path>, recipe: Recipe, options: Options) -> Result<Conversion> {
    ops::quantize::plan(source.as_ref(), recipe, options)
}

/// Opens the converted checkpoint at `source` and plans its decoding into files of at most `max_shard_size` bytes of tensors;
/// [`Dequantization::execute`] carries it out.
///
/// # Errors
/// When it is no checkpoint that prequant converted, or isn't what its manifest says.
pub fn plan_dequantize(source: impl AsRef<Path>, max_shard_size: u64, options: Options) -> Result<Dequantization> {
    ops::dequantize::plan(source.as_ref(), max_shard_size, options)
}

/// Opens a base and an adapter and plans merging them; reads headers and configs only, and writes nothing. What is written are floats
/// ([`Recipe::floats`]), or what converting these by another recipe gives.
///
/// # Errors
/// When the base is no checkpoint, the adapter can't be merged or doesn't fit it, or the recipe doesn't fit what is merged.
pub fn plan_merge(
    base: impl AsRef<Path>,
    adapter: impl AsRef<Path>,
    recipe: Recipe,
    options: Options,
) -> Result<Conversion> {
    ops::merge::plan(base.as_ref(), adapter.as_ref(), recipe, options)
}

/// Checks the converted checkpoint in `folder` against its manifest.
///
/// # Errors
/// When there is no manifest, or the system refuses to read. What is damaged is in the report.
pub fn verify(folder: impl AsRef<Path>, options: VerifyOptions<'_>) -> Result<Report> {
    ops::verify::verify(folder.as_ref(), options)
}

/// Converts `source` again without writing, by the recipe of the checkpoint in `folder`, and compares every byte.
///
/// # Errors
/// When there is no manifest, the source can't be converted, or the system refuses to read. Differences are in the report.
pub fn verify_against(
    folder: impl AsRef<Path>,
    source: impl AsRef<Path>,
    conversion: Options,
    options: VerifyOptions<'_>,
) -> Result<Report> {
    ops::verify::against(folder.as_ref(), source.as_ref(), conversion, options)
}

/// As [`verify_against`], of a checkpoint that an adapter was merged into: merges again without writing.
///
/// # Errors
/// The same, and those of [`plan_merge`].
pub fn verify_against_merge(
    folder: impl AsRef<Path>,
    base: impl AsRef<Path>,
    adapter: impl AsRef<Path>,
    conversion: Options,
    options: VerifyOptions<'_>,
) -> Result<Report> {
    ops::verify::against_merge(folder.as_ref(), base.as_ref(), adapter.as_ref(), conversion, options)
}

/// The recipe of the converted checkpoint at `path`, if that is what it is, and its experts can be rewritten.
///
/// # Errors
/// When it has a manifest that can't be read.
pub fn recipe_of(path: impl AsRef<Path>) -> Result<Option<Recipe>> {
    ops::recipe_of(path.as_ref())
}
