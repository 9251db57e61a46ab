//! The files beside the weights: tokenizer, generation config, chat templates, license, code.

use std::path::{Path, PathBuf};

use super::{CONFIG_NAME, MANIFEST_NAME, SUMS_NAME};
use crate::error::{Error, IoContext, Result};

/// Weights in any format, and what indexes them: the converted ones replace them.
const WEIGHT_SUFFIXES: &[&str] = &[
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".msgpack.index.json",
    ".ot",
    ".onnx",
    ".onnx_data",
    ".tflite",
    ".npz",
];

/// Folders deeper than this are no part of a checkpoint.
const MAX_DEPTH: usize = 8;

/// More side files than this are no part of a checkpoint.
const MAX_FILES: usize = 10_000;

/// A file to be copied as it is.
#[derive(Clone, Debug)]
pub struct SideFile {
    /// Its path below the source, with forward slashes.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Its size in bytes.
    pub len: u64,
}

/// Whether a file of this name holds weights (or indexes them).
pub fn is_weight_file(name: &str) -> bool {
    WEIGHT_SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
}

/// All side files below `root`, sorted by name. Hidden files and folders are left out, and so are links to folders and
/// what this tool wrote.
pub fn find(root: &Path) -> Result<Vec<SideFile>> {
    let mut files = Vec::new();
    walk(root, "", 0, &mut files)?;
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}

fn walk(folder: &Path, prefix: &str, depth: usize, files: &mut Vec<SideFile>) -> Result<()> {
    for entry in std::fs::read_dir(folder).at(folder, "list it")? {
        let entry = entry.at(folder, "list it")?;
        let path = entry.path();
        let Ok(name) = entry.file_name().into_string() else {
            return Err(Error::malformed(&path, "its name is not UTF-8: rename it"));
        };
        let ours = depth == 0 && [CONFIG_NAME, MANIFEST_NAME, SUMS_NAME].contains(&name.as_str());
        if name.starts_with('.') || ours || is_weight_file(&name) {
            continue;
        }
        let is_link = entry.file_type().at(&path, "look at it")?.is_symlink();
        let metadata = path.metadata().at(&path, "look at it")?;
        let name = format!("{prefix}{name}");
        if metadata.is_dir() && !is_link && depth < MAX_DEPTH {
            walk(&path, &format!("{name}/"), depth + 1, files)?;
        } else if metadata.is_file() {
            files.push(SideFile { name, path, len: metadata.len() });
        }
        if files.len() > MAX_FILES {
            let why = format!("more than {MAX_FILES} files lie in it beside the weights: is it the right folder?");
            return Err(Error::malformed(folder, why));
        }
    }
    Ok(())
}
