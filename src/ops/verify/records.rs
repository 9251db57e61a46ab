//! The manifest's records of tensors, which stay in the file: what is held is where those of each file of weights are.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Component, Path};

use crate::checkpoint::MANIFEST_NAME;
use crate::error::{Error, IoContext, Result};
use crate::manifest::{ManifestHead, OutputRecord, TensorRecord, read_part, read_records};
use crate::store::{Identity, Location, ReadAt, Sha256Hash};

/// A manifest that is read record by record.
pub(super) struct Records {
    location: Location,
    file: Box<dyn ReadAt>,
    /// What the file was known by.
    identity: Identity,
    /// Parts of it, each of whole records, by the file of weights that these are of.
    by_file: BTreeMap<String, Vec<Range<u64>>>,
    /// The tensors that the files are to hold.
    pub tensors: Tensors,
}

impl Records {
    /// Reads a manifest to its end, and hands on its records; gives it without them, as they stay in the file, and its SHA-256.
    ///
    /// # Errors
    /// When it can't be read, or is no manifest; what was handed on until then is void.
    pub(super) fn open(
        location: &Location,
        each: &mut dyn FnMut(TensorRecord),
    ) -> Result<(ManifestHead, Sha256Hash, Records)> {
        let path = location.path();
        let file = location.open().at(path, "open it")?;
        let identity = file.identity().at(path, "look at it")?;
        let mut by_file: BTreeMap<String, Vec<Range<u64>>> = BTreeMap::new();
        let mut tensors = Tensors::default();
        let mut end_before = 0;
        let (head, sha256) = read_records(location, &mut |record: TensorRecord, place| {
            for OutputRecord { name, file, .. } in &record.outputs {
                tensors.add(name, file);
                let parts = match by_file.get_mut(file) {
                    Some(parts) => parts,
                    None => by_file.entry(file.clone()).or_default(),
                };
                match parts.last_mut() {
                    Some(part) if part.end == place.end => {}
                    Some(part) if part.end == end_before => part.end = place.end,
                    _ => parts.push(place.clone()),
                }
            }
            end_before = place.end;
            each(record);
        })?;
        tensors.sort();
        Ok((head, sha256, Records { location: location.clone(), file, identity, by_file, tensors }))
    }

    /// The files of weights that it speaks of.
    pub(super) fn files(&self) -> impl Iterator<Item = &str> {
        self.by_file.keys().map(String::as_str)
    }

    /// Whether it has a tensor in this file.
    pub(super) fn has_tensors_in(&self, file: &str) -> bool {
        self.by_file.contains_key(file)
    }

    /// Hands on the records with a tensor in this file, in their order.
    ///
    /// # Errors
    /// Those of reading the manifest.
    pub(super) fn of_file(&self, file: &str, each: &mut dyn FnMut(TensorRecord)) -> Result<()> {
        for part in self.by_file.get(file).into_iter().flatten() {
            self.check(read_part(&*self.file, part.clone(), each))?;
        }
        Ok(())
    }

    /// Hands on all records, in their order.
    ///
    /// # Errors
    /// Those of reading the manifest.
    pub(super) fn all(&self, each: &mut dyn FnMut(TensorRecord)) -> Result<()> {
        read_records(&self.location, &mut |record, _| each(record)).map(|_| ())
    }

    /// # Errors
    /// When the manifest isn't what was read at first.
    pub(super) fn check_is_unchanged(&self) -> Result<()> {
        let path = self.location.path();
        let changed = self.file.identity().at(path, "look at it")? != self.identity;
        let why = || format!("{MANIFEST_NAME} was written to while it was compared");
        if changed { Err(Error::SourceChanged { path: path.to_owned(), why: why() }) } else { Ok(()) }
    }

    fn check(&self, read: std::io::Result<()>) -> Result<()> {
        self.check_is_unchanged()?;
        read.at(self.location.path(), "read it")
    }
}

/// Tensors with the names of their files, told apart by 128 bits of a hash of both: a checkpoint may have millions.
#[derive(Default)]
pub(super) struct Tensors(Vec<[u8; 16]>);

impl Tensors {
    fn add(&mut self, tensor: &str, file: &str) {
        self.0.push(Tensors::mark(tensor, file));
    }

    fn sort(&mut self) {
        self.0.sort_unstable();
        self.0.dedup();
        self.0.shrink_to_fit();
    }

    /// How many.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The place of a tensor among all, if it is one of them.
    pub(super) fn place(&self, tensor: &str, file: &str) -> Option<usize> {
        self.0.binary_search(&Tensors::mark(tensor, file)).ok()
    }

    fn mark(tensor: &str, file: &str) -> [u8; 16] {
        // No file's name has a NUL in it.
        let text = [tensor.as_bytes(), b"\0", file.as_bytes()].concat();
        let mut mark = [0; 16];
        mark.copy_from_slice(&Sha256Hash::of(&text).0[..16]);
        mark
    }
}

/// Whether a name of the manifest stays inside the folder.
pub(super) fn is_inside(name: &str) -> bool {
    !name.is_empty() && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}
