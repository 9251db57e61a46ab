//! `model.safetensors.index.json`: which file holds which tensor.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize, Serializer};

use super::TensorInfo;
use crate::error::{Error, IoContext, Result};
use crate::store::Location;

/// The largest index that is read: a thousand times a common one.
const MAX_INDEX_LEN: u64 = 200_000_000;

/// An index as it stands in the file; other keys are ignored.
#[derive(Deserialize)]
pub struct Index {
    weight_map: BTreeMap<String, String>,
}

#[derive(Serialize)]
struct OutputIndex<W> {
    metadata: Metadata,
    weight_map: W,
}

/// Tensors and their files, written one by one.
struct WeightMap<I>(Cell<Option<I>>);

impl<'a, I: Iterator<Item = (String, &'a str)>> Serialize for WeightMap<I> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.take().into_iter().flatten())
    }
}

#[derive(Serialize)]
struct Metadata {
    total_size: u64,
}

impl Index {
    /// Reads the index that lies there; its file names are plain names without a folder.
    pub fn read(location: &Location) -> Result<Index> {
        let path = location.path();
        let len = location.stat().at(path, "read it")?.len;
        if len > MAX_INDEX_LEN {
            return Err(Error::malformed(path, format!("{len} bytes are too many for an index of tensors")));
        }
        Self::parse(&location.read().at(path, "read it")?, path)
    }

    /// As [`Index::read`], from memory; `path` is for errors.
    pub fn parse(text: &[u8], path: &Path) -> Result<Index> {
        let index: Index = serde_json::from_slice(text)
            .map_err(|error| Error::malformed(path, format!("not an index of tensors: {error}")))?;
        for (tensor, file) in &index.weight_map {
            if file.contains(['/', '\\', '\0']) || matches!(file.as_str(), "" | "." | "..") {
                let why = format!("tensor {tensor:?} is said to be in {file:?}: expected the name of a file beside it");
                return Err(Error::malformed(path, why));
            }
        }
        Ok(index)
    }

    /// The files, by name, each once.
    pub fn files(&self) -> BTreeSet<&str> {
        let mut files = BTreeSet::new();
        let mut last = "";
        // Most tensors are in the file of the one before.
        for file in self.weight_map.values().filter(|file| std::mem::replace(&mut last, file) != file.as_str()) {
            files.insert(file.as_str());
        }
        files
    }

    /// The tensors' names.
    pub fn tensors(&self) -> impl Iterator<Item = &str> {
        self.weight_map.keys().map(String::as_str)
    }

    /// The file that is said to hold a tensor.
    pub fn file_of(&self, tensor: &str) -> Option<&str> {
        self.weight_map.get(tensor).map(String::as_str)
    }

    /// Checks the index against the files' headers: each tensor is where the index says, and nowhere else.
    pub fn check<'a>(&self, path: &Path, files: impl Iterator<Item = (&'a str, &'a [TensorInfo])>) -> Result<()> {
        let mut found = HashSet::with_capacity(self.weight_map.len());
        for (file, tensors) in files {
            for TensorInfo { name, .. } in tensors {
                let why = match self.weight_map.get(&**name) {
                    Some(expected) if expected == file => {
                        found.insert(&**name);
                        continue;
                    }
                    Some(expected) => format!("tensor {name:?} is said to be in {expected:?}, but {file:?} has it"),
                    None => format!("tensor {name:?} of {file:?} isn't listed"),
                };
                return Err(Error::malformed(path, format!("{why}; download the index again")));
            }
        }
        match self.weight_map.iter().find(|(tensor, _)| !found.contains(tensor.as_str())) {
            Some((tensor, file)) => {
                let why = format!("tensor {tensor:?} is said to be in {file:?}, which doesn't have it");
                Err(Error::malformed(path, format!("{why}; download the file again")))
            }
            None => Ok(()),
        }
    }
}

/// The name of output file `i` (from 0) of `count`, as the ecosystem has it.
pub(crate) fn shard_name(i: usize, count: usize) -> String {
    match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
    }
}

/// Writes an index of tensors, in the order of their names, and their files, with the sum of the tensors' bytes; as transformers
/// writes it.
///
/// # Errors
/// Those of `writer`.
pub(crate) fn write_index<'a>(
    weight_map: impl Iterator<Item = (String, &'a str)>,
    total_size: u64,
    mut writer: &mut dyn io::Write,
) -> io::Result<()> {
    let index = OutputIndex { metadata: Metadata { total_size }, weight_map: WeightMap(Cell::new(Some(weight_map))) };
    serde_json::to_writer_pretty(&mut writer, &index)?;
    writer.write_all(b"\n")
}
