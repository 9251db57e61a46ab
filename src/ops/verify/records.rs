//! The manifest's records of files and tensors, by name.

use std::collections::{BTreeMap, HashMap};
use std::path::{Component, Path};

use crate::manifest::{Manifest, OutputRecord, TensorRecord};

/// The manifest's tensors: by file, then by name.
pub(super) type ByFile<'a> = BTreeMap<&'a str, ByName<'a>>;

/// The manifest's tensors of one file, with what each belongs to.
pub(super) type ByName<'a> = HashMap<&'a str, (&'a OutputRecord, &'a TensorRecord)>;

/// The tensors that the manifest has.
pub(super) fn by_file(manifest: &Manifest) -> ByFile<'_> {
    let mut by_file = ByFile::new();
    for tensor in &manifest.tensors {
        for output in &tensor.outputs {
            by_file.entry(&output.file).or_default().insert(&output.name, (output, tensor));
        }
    }
    by_file
}

/// Whether a name of the manifest stays inside the folder.
pub(super) fn is_inside(name: &str) -> bool {
    !name.is_empty() && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}
