//! `model.safetensors.index.json`: which file holds which tensor.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use serde::{Serialize, Serializer};

use super::index_entries::entries;
use super::{TensorInfo, first_bytes};
use crate::error::{Error, IoContext, Result, TooLong};
use crate::json_text::Failure;
use crate::store::{HashingWriter, Location, Reader, Sha256Hash};

/// The largest index of a source that is read: a thousand times a common one.
pub(crate) const MAX_INDEX_LEN: u64 = 256 << 20;

/// Bytes that are read at once.
const BUFFER: usize = 1 << 16;

/// An index as it stands in the file.
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
    /// Reads the index that lies there, of no more than `most` bytes; its files are in its folder or below it.
    ///
    /// It is parsed as it is read: its text is never in memory.
    pub fn read(location: &Location, most: u64) -> Result<Index> {
        let path = location.path();
        let file = location.open().at(path, "open it")?;
        let len = file.identity().at(path, "look at it")?.len;
        if len > most {
            return Err(io::Error::from(TooLong { len, most })).at(path, "read it");
        }
        Self::parse(Reader::new(&*file).take(most), path)
    }

    /// As [`Index::read`], from anywhere; `path` is for errors.
    pub fn parse(text: impl Read, path: &Path) -> Result<Index> {
        let mut text = BufReader::with_capacity(BUFFER, text);
        first_bytes::check_json(text.fill_buf().at(path, "read it")?, path)?;
        let mut index = Index { weight_map: BTreeMap::new() };
        let read = entries(text, &mut |tensor, file| drop(index.weight_map.insert(tensor, file)));
        read.map_err(|failure| match failure {
            Failure::Io(source) => Error::Io { path: path.to_owned(), action: "read it", source },
            Failure::Json(why) => Error::malformed(path, format!("not an index of tensors: {why}")),
        })?;
        let mut last: Option<String> = None;
        for (tensor, file) in &mut index.weight_map {
            // Most tensors are in the file of the one before.
            if last.as_ref() == Some(file) {
                continue;
            }
            match inside(file) {
                Some(name) if name == *file => last = Some(name),
                Some(name) => *file = name,
                None => {
                    let why = format!(
                        "tensor {tensor:?} is said to be in {file:?}: expected the name of a file in this folder or below it"
                    );
                    return Err(Error::malformed(path, why));
                }
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

    /// Checks the index against the files' headers: each tensor that it lists is where it says. Returns how many tensors of
    /// the files it doesn't list, and the first of them; clients load these too.
    ///
    /// # Errors
    /// When a tensor isn't where it should be.
    pub fn check<'a>(
        &'a self,
        path: &Path,
        files: impl Iterator<Item = (&'a str, &'a [TensorInfo])>,
    ) -> Result<Option<(usize, &'a str)>> {
        let mut found = HashSet::with_capacity(self.weight_map.len());
        let mut unlisted = None;
        let mut elsewhere = None;
        for (file, tensors) in files {
            for TensorInfo { name, .. } in tensors {
                match self.weight_map.get(&**name) {
                    Some(expected) if expected == file => drop(found.insert(&**name)),
                    Some(expected) => elsewhere = elsewhere.or(Some((name, expected, file))),
                    None => unlisted = Some(unlisted.map_or((1, &**name), |(count, first)| (count + 1, first))),
                }
            }
        }
        let Some((tensor, file)) = self.weight_map.iter().find(|(tensor, _)| !found.contains(tensor.as_str())) else {
            return Ok(unlisted);
        };
        let why = match elsewhere.filter(|(name, ..)| !found.contains(&***name)) {
            Some((name, expected, file)) => {
                format!("tensor {name:?} is said to be in {expected:?}, but {file:?} has it; download the index again")
            }
            None => {
                format!("tensor {tensor:?} is said to be in {file:?}, which doesn't have it; download the file again")
            }
        };
        Err(Error::malformed(path, why))
    }
}

/// A path below a folder, without `.` and empty parts; none if it leads out of it.
pub(crate) fn inside(name: &str) -> Option<String> {
    if name.starts_with('/') || name.contains(['\\', '\0']) {
        return None;
    }
    let parts: Vec<&str> = name.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    (!parts.is_empty() && !parts.contains(&"..")).then(|| parts.join("/"))
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

/// The text that [`write_index`] writes, of which the hash alone is of interest, entry by entry.
pub(crate) struct IndexHasher {
    hasher: HashingWriter<io::Sink>,
    any: bool,
}

impl IndexHasher {
    /// Of tensors with so many bytes together.
    pub(crate) fn new(total_size: u64) -> IndexHasher {
        let mut index = IndexHasher { hasher: HashingWriter::new(io::sink()), any: false };
        index.add(&format!("{{\n  \"metadata\": {{\n    \"total_size\": {total_size}\n  }},\n  \"weight_map\": {{"));
        index
    }

    /// The next tensor and its file.
    pub(crate) fn entry(&mut self, tensor: &str, file: &str) {
        let [tensor, file] = [tensor, file].map(|name| serde_json::Value::from(name).to_string());
        let comma = if std::mem::replace(&mut self.any, true) { "," } else { "" };
        self.add(&format!("{comma}\n    {tensor}: {file}"));
    }

    /// The hash of the whole.
    pub(crate) fn finish(mut self) -> Sha256Hash {
        let end = if self.any { "\n  }\n}\n" } else { "}\n}\n" };
        self.add(end);
        self.hasher.finish().1
    }

    fn add(&mut self, text: &str) {
        // A sink takes all.
        let _ = io::Write::write_all(&mut self.hasher, text.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_an_index_stay_in_its_folder() {
        for (name, expected) in [("a", "a"), ("./a", "a"), ("sub/a", "sub/a"), ("./sub//./a", "sub/a"), ("..a", "..a")]
        {
            assert_eq!(inside(name).as_deref(), Some(expected), "{name}");
        }
        for name in ["", ".", "./", "..", "../a", "sub/../../a", "sub/..", "/a", "a\\b", "a\0"] {
            assert_eq!(inside(name), None, "{name:?}");
        }
    }

    #[test]
    fn the_hash_is_that_of_what_is_written() {
        for names in [&[][..], &["a"], &["a", "b\"\n", "\u{e9}"]] {
            let mut written = Vec::new();
            write_index(names.iter().map(|name| ((*name).to_owned(), "x.safetensors")), 12, &mut written).unwrap();
            let mut hasher = IndexHasher::new(12);
            names.iter().for_each(|name| hasher.entry(name, "x.safetensors"));
            assert_eq!(hasher.finish(), Sha256Hash::of(&written), "{names:?}");
        }
    }
}
