//! The files beside the weights: tokenizer, generation config, chat templates, license, code.

use super::{CONFIG_NAME, MANIFEST_NAME, QUANT_CONFIG_NAME, SUMS_NAME};
use crate::error::{Error, IoContext, Result};
use crate::store::{Kind, Location};

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

/// A longer `modules.json` is not sentence-transformers': real ones are a few hundred bytes.
const MAX_MODULES_LEN: u64 = 1 << 20;

/// A file to be copied as it is.
#[derive(Clone, Debug)]
pub struct SideFile {
    /// Its path below the source, with forward slashes.
    pub name: String,
    /// Where it is.
    pub location: Location,
    /// Its size in bytes.
    pub len: u64,
}

/// Whether a file of this name holds weights (or indexes them).
pub(crate) fn is_weight_file(name: &str) -> bool {
    WEIGHT_SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
}

/// All side files below `root`, sorted by name. Hidden files and folders are left out, and so are links to folders and
/// what this tool wrote.
pub(crate) fn find(root: &Location) -> Result<Vec<SideFile>> {
    let mut walk = Walk { parts: parts_of_pipeline(root)?, files: Vec::new() };
    walk.folder(root, "", 0)?;
    walk.files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(walk.files)
}

/// The folders that sentence-transformers' `modules.json` names: further modules, whose weights aren't the model's own
/// in another format.
fn parts_of_pipeline(root: &Location) -> Result<Vec<String>> {
    let modules = root.join("modules.json");
    let is_read = modules.is_file().at(modules.path(), "look at it")?
        && modules.stat().at(modules.path(), "look at it")?.len <= MAX_MODULES_LEN;
    if !is_read {
        return Ok(Vec::new());
    }
    let text = modules.read().at(modules.path(), "read it")?;
    // Not ours to judge: whatever else it is, it is copied as it is.
    let modules: Vec<serde_json::Value> = serde_json::from_slice(&text).unwrap_or_default();
    let folders = modules.iter().filter_map(|module| module.get("path")?.as_str());
    Ok(folders.filter(|folder| !folder.is_empty()).map(|folder| format!("{folder}/")).collect())
}

struct Walk {
    /// Folders whose weights are copied too.
    parts: Vec<String>,
    files: Vec<SideFile>,
}

impl Walk {
    fn folder(&mut self, folder: &Location, prefix: &str, depth: usize) -> Result<()> {
        for entry in folder.list().at(folder.path(), "list it")? {
            let location = folder.join(&entry.name);
            let Ok(name) = entry.name.into_string() else {
                return Err(Error::malformed(location.path(), "its name is not UTF-8: rename it"));
            };
            if name.starts_with('.') || self.is_replaced(prefix, &name) {
                continue;
            }
            let name = format!("{prefix}{name}");
            match entry.stat.kind {
                Kind::File => self.files.push(SideFile { name, location, len: entry.stat.len }),
                Kind::Folder if !entry.is_link && depth < MAX_DEPTH => {
                    self.folder(&location, &format!("{name}/"), depth + 1)?;
                }
                Kind::Folder => {}
                // A link that leads nowhere is an error; a pipe is not copied.
                Kind::Other => location.stat().at(location.path(), "look at it").map(|_| ())?,
            }
            if self.files.len() > MAX_FILES {
                let why = format!("more than {MAX_FILES} files lie in it beside the weights: is it the right folder?");
                return Err(Error::malformed(folder.path(), why));
            }
        }
        Ok(())
    }

    /// Whether the conversion makes its own file in place of this one, or of the weights in it.
    fn is_replaced(&self, prefix: &str, name: &str) -> bool {
        let ours = prefix.is_empty() && [CONFIG_NAME, MANIFEST_NAME, QUANT_CONFIG_NAME, SUMS_NAME].contains(&name);
        let is_part = self.parts.iter().any(|part| prefix.starts_with(part));
        ours || (is_weight_file(name) && !is_part)
    }
}
