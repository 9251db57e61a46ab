//! Hugging Face checkpoints on disk: headers, indexes, configs and side files; reading ranges, writing files.
//!
//! What is read here comes from strangers: every length, offset and name is checked before it is used, and nothing
//! outside the source's folder is copied. Nothing here knows what quantization is.

mod config;
mod duplicates;
mod file_class;
mod first_bytes;
mod folder;
mod header;
mod header_text;
mod index;
mod index_entries;
mod json_values;
mod links;
mod output;
mod parts;
mod place;
mod side_files;
mod source;
mod staging;
mod unchanged;
mod weight_files;
mod wrappers;

pub use config::Config;
pub(crate) use config::{MAX_JSON_LEN, WEIGHTS_KEY};
pub(crate) use file_class::FileClass;
pub use header::Header;
pub(crate) use header::{MAX_HEADER_LEN, Metadata, TensorInfo, sort_canonically};
pub(crate) use header_text::{ALIGNMENT, HeaderLen, HeaderText};
pub use index::Index;
pub(crate) use index::{IndexHasher, write_index};
pub(crate) use index_entries::read_entries;
pub(crate) use json_values::parse as parse_json;
pub(crate) use output::OutputFile;
pub(crate) use parts::is_whole_model;
pub(crate) use place::Place;
pub(crate) use side_files::{SideFile, needs_an_index};
pub(crate) use source::{AdapterPart, LeftOut};
pub use source::{Source, SourceFile};
pub(crate) use staging::{DONE_NAME, STAGING_NAME, Staging, free_space, resolve};
pub(crate) use weight_files::DIFFUSERS;

/// The index beside the shards, but diffusers'.
pub(crate) const INDEX_NAME: &str = "model.safetensors.index.json";
/// The model's configuration.
pub(crate) const CONFIG_NAME: &str = "config.json";
/// What says beside config.json how weights are quantized, in some layouts; it goes with the weights it is of.
pub(crate) const QUANT_CONFIG_NAME: &str = "hf_quant_config.json";
/// Our manifest.
pub(crate) const MANIFEST_NAME: &str = "prequant.json";
/// Checksums as `sha256sum -c` takes them.
pub(crate) const SUMS_NAME: &str = "SHA256SUMS";
