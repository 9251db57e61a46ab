//! What a checkpoint contains, converted or not, by its headers.

use std::path::{Path, PathBuf};

use crate::checkpoint::Source;
use crate::converted::{self, FoundWeight};
use crate::error::Result;

/// What is in a checkpoint.
#[derive(Clone, Debug)]
pub struct Contents {
    /// Where it is, as given.
    pub path: PathBuf,
    /// `model_type` of its config.json.
    pub model_type: Option<String>,
    /// Names and sizes of its files of weights.
    pub files: Vec<(String, u64)>,
    /// Its weights: files by name, weights in the order of their bytes.
    pub weights: Vec<StoredWeight>,
}

/// A weight with all tensors that belong to it.
#[derive(Clone, Debug)]
pub struct StoredWeight {
    /// Its name.
    pub name: String,
    /// The name of the file it is in.
    pub file: String,
    /// Its dtype, or its 4-bit format.
    pub format: String,
    /// The shape of the tensor that holds it, or its codes.
    pub stored_shape: Vec<u64>,
    /// How many numbers it has.
    pub elements: u64,
    /// Bytes, scales included.
    pub bytes: u64,
}

/// Lists the weights of the checkpoint at `path`, a folder or a single safetensors file.
///
/// # Errors
/// When it isn't there, isn't a checkpoint, or is damaged as far as headers tell.
pub fn inspect(path: impl AsRef<Path>) -> Result<Contents> {
    let source = Source::open(path.as_ref())?;
    let weights = converted::weights(&source).into_iter();
    let weights = weights.map(|FoundWeight { name, file, codec, codes, beside }| StoredWeight {
        name: name.to_owned(),
        file: source.files[file].name.clone(),
        format: codec.map_or_else(|| codes.dtype.to_string(), |codec| codec.format.name.to_owned()),
        stored_shape: codes.shape.clone(),
        // Two codes per byte; whether the last ones are a pad, only what stands beside them knows.
        elements: if codec.is_some() { 2 * codes.len } else { codes.shape.iter().product() },
        bytes: codes.len + beside.iter().map(|info| info.len).sum::<u64>(),
    });
    let config = source.config.as_ref();
    Ok(Contents {
        path: path.as_ref().to_owned(),
        model_type: config.and_then(|config| config.model_types().first().map(|&name| name.to_owned())),
        files: source.files.iter().map(|file| (file.name.clone(), file.identity.len)).collect(),
        weights: weights.collect(),
    })
}
