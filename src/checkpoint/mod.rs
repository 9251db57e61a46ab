//! Hugging Face checkpoints on disk: headers, indexes, configs and side files; reading ranges, writing files.
//!
//! What is read here comes from strangers: every length, offset and name is checked before it is used, and nothing
//! outside the source's folder is opened. Nothing here knows what quantization is.

mod config;
mod file_class;
mod header;
mod index;
mod output;
mod side_files;
mod source;
mod staging;

pub use config::Config;
pub(crate) use file_class::FileClass;
pub use header::Header;
pub(crate) use header::{ALIGNMENT, Described, MAX_HEADER_LEN, TensorInfo, header_bytes, sort_canonically};
pub use index::Index;
pub(crate) use index::{shard_name, write_index};
pub(crate) use output::OutputFile;
pub(crate) use side_files::SideFile;
pub use source::{Source, SourceFile};
pub(crate) use staging::{DONE_NAME, STAGING_NAME, Staging, free_space};

/// The index beside the shards.
pub(crate) const INDEX_NAME: &str = "model.safetensors.index.json";
/// The model's configuration.
pub(crate) const CONFIG_NAME: &str = "config.json";
/// What says beside config.json how weights are quantized, in some layouts; it goes with the weights it is of.
pub(crate) const QUANT_CONFIG_NAME: &str = "hf_quant_config.json";
/// Our manifest.
pub(crate) const MANIFEST_NAME: &str = "prequant.json";
/// Checksums as `sha256sum -c` takes them.
pub(crate) const SUMS_NAME: &str = "SHA256SUMS";
