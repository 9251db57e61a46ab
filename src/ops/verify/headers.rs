//! Tensors: what headers, index and quant_states say of them.

use std::collections::{BTreeMap, HashSet};
use std::io;

use crate::checkpoint::{CONFIG_NAME, Config, INDEX_NAME, Index, Source, SourceFile, TensorInfo, write_index};
use crate::converted::{self, Converted};
use crate::dtype::{self, FloatDtype, elements};
use crate::error::{Error, IoContext, Result};
use crate::layout::bitsandbytes::{ParsedQuantState, QUANT_STATE};
use crate::manifest::{DecisionRecord, Manifest, OutputRecord, TensorRecord};
use crate::models::Role;
use crate::ops::verify::jobs::TensorJob;
use crate::ops::verify::records::{ByFile, ByName, is_inside};
use crate::ops::verify::{Checkpoint, Report, if_sound, summary};
use crate::store::{HashingWriter, ReadAt, Sha256Hash};

/// A file of tensors whose header was compared with the manifest.
pub(super) struct CheckedFile<'a> {
    /// The file as a checkpoint of its own.
    source: Source,
    expected: &'a ByName<'a>,
}

impl<'a> CheckedFile<'a> {
    /// Every tensor of the manifest must stand in the header as it has it, and no other. None if the file is damaged, which
    /// is reported, or was reported as no file of the folder.
    pub(super) fn open(
        checkpoint: &Checkpoint,
        file: &str,
        expected: &'a ByName<'a>,
        report: &mut Report,
    ) -> Result<Option<CheckedFile<'a>>> {
        let Some(source) = open(checkpoint, file, report)? else { return Ok(None) };
        let checked = CheckedFile { source, expected };
        let tensors = &checked.file().tensors;
        report.tensors += tensors.len();
        let found: HashSet<&str> = tensors.iter().map(|info| &*info.name).collect();
        for name in found.iter().filter(|name| !expected.contains_key(*name)) {
            report.differ(file, Some(name), "is not in the manifest");
        }
        for name in expected.keys().filter(|name| !found.contains(*name)) {
            report.differ(file, Some(name), "is missing from the file");
        }
        for entry in checked.entries() {
            let what = converted::difference(entry.info, entry.record);
            what.into_iter().for_each(|what| entry.differ(report, what));
        }
        Ok(Some(checked))
    }

    /// The file's content.
    pub(super) fn reopen(&self) -> Result<Box<dyn ReadAt>> {
        self.file().reopen()
    }

    /// The tensors that have a hash in the manifest. Those without bytes are compared at once.
    pub(super) fn tensors(&self, report: &mut Report) -> Vec<TensorJob<'a>> {
        let mut jobs = Vec::new();
        for entry in self.entries() {
            let (offset, len, sha256) = (entry.info.offset, entry.info.len, entry.record.sha256);
            if len > 0 {
                jobs.push(TensorJob { name: &entry.record.name, place: offset..offset + len, sha256 });
            } else if sha256 != Sha256Hash::of(&[]) {
                entry.differ(report, format!("its SHA-256 is {}, expected {sha256}", Sha256Hash::of(&[])));
            }
        }
        jobs
    }

    /// The JSON that clients decode by must say what the recipe and the source say.
    pub(super) fn check_quant_states(&self, manifest: &Manifest, report: &mut Report) -> Result<()> {
        let model = self.source.model_dtype();
        let mut converted = Converted::unchecked(&self.source, manifest);
        for entry in self.entries().filter(|entry| entry.info.name.contains(QUANT_STATE)) {
            let state = entry.quant_state(&mut converted, report)?;
            state.into_iter().for_each(|state| entry.check_quant_state(&state, manifest, model, report));
        }
        Ok(())
    }

    fn file(&self) -> &SourceFile {
        &self.source.files[0]
    }

    /// The tensors that both have, in the order of their bytes.
    fn entries(&self) -> impl Iterator<Item = Entry<'_, 'a>> {
        self.file().tensors.iter().filter_map(|info| {
            let (record, tensor) = *self.expected.get(&*info.name)?;
            Some(Entry { file: self.file(), info, record, tensor })
        })
    }
}

/// The file as a checkpoint of its own; none if it is damaged, which is reported, or was reported as no file of the folder.
fn open(checkpoint: &Checkpoint, file: &str, report: &mut Report) -> Result<Option<Source>> {
    let location = checkpoint.folder.join(file);
    if !is_inside(file) || !location.is_file().at(location.path(), "look at it")? {
        return Ok(None);
    }
    match SourceFile::open(file.to_owned(), location.clone()) {
        Ok(opened) => {
            // A config that can't be read is reported as such.
            let config = if_sound(Config::read(&checkpoint.folder.join(CONFIG_NAME)))?;
            Ok(Some(Source { location, files: vec![opened], config, side_files: Vec::new() }))
        }
        Err(Error::Malformed { why, .. }) => {
            report.differ(file, None, why);
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// A tensor as its file has it and as the manifest has it.
struct Entry<'f, 'a> {
    file: &'f SourceFile,
    info: &'f TensorInfo,
    record: &'a OutputRecord,
    tensor: &'a TensorRecord,
}

impl Entry<'_, '_> {
    fn differ(&self, report: &mut Report, what: String) {
        report.differ(&self.file.name, Some(&self.info.name), what);
    }

    /// The quant_state that it is; what is none is reported.
    fn quant_state(&self, converted: &mut Converted<'_>, report: &mut Report) -> Result<Option<ParsedQuantState>> {
        let state = match converted.quant_state(&self.info.name) {
            Ok(json) => ParsedQuantState::parse(&json).map_err(|error| error.to_string()),
            Err(Error::Malformed { why, .. }) => Err(why),
            Err(error) => return Err(error),
        };
        Ok(state.map_err(|error| self.differ(report, format!("is no quant_state: {error}"))).ok())
    }

    /// The JSON that clients decode by must say what the recipe and the source say.
    fn check_quant_state(&self, state: &ParsedQuantState, manifest: &Manifest, model: FloatDtype, report: &mut Report) {
        let (Some(source), DecisionRecord::Quantize) = (self.tensor.sources.first(), self.tensor.decision) else {
            return self.differ(report, "belongs to a tensor that isn't quantized".to_owned());
        };
        // What was coded was decoded to the model's dtype.
        let dtype = dtype::named(&source.dtype).and_then(FloatDtype::of).unwrap_or(model);
        let codec = manifest.recipe.codec();
        state.differences(&codec, dtype).into_iter().for_each(|what| self.differ(report, what));
        if codec.is_blocks() && !self.is_of_sources(&state.shape, manifest) {
            let shapes: Vec<&[u64]> = self.tensor.sources.iter().map(|source| &*source.shape).collect();
            self.differ(report, format!("says the shape is {:?}, and the source has {shapes:?}", state.shape));
        }
    }

    /// Whether a weight of this shape is what the manifest's sources give.
    fn is_of_sources(&self, shape: &[u64], manifest: &Manifest) -> bool {
        let sources = &self.tensor.sources;
        // Where it was coded, its shape isn't a source's.
        let is_plain = sources.iter().all(|source| dtype::named(&source.dtype).and_then(FloatDtype::of).is_some());
        if !is_plain {
            let all = summary::elements_of_sources(sources);
            return all.is_some() && elements(shape) == all;
        }
        let shapes: Vec<&[u64]> = sources.iter().map(|source| &*source.shape).collect();
        let is_fused = self.tensor.role == Role::FusedExperts && manifest.recipe.fuses_experts();
        shape == shapes[0] || is_fused && is_made_of(shape, &shapes)
    }
}

/// Whether a 3-D shape has as many elements as what was fused into it, and its columns (or rows, if it is transposed).
fn is_made_of(fused: &[u64], shapes: &[&[u64]]) -> bool {
    let all = shapes.iter().try_fold(0u64, |sum, shape| sum.checked_add(elements(shape)?));
    let side = |shape: &&[u64]| shape.last().is_some_and(|columns| fused[1..].contains(columns));
    fused.len() == 3 && all.is_some() && elements(fused) == all && shapes.iter().all(side)
}

/// Bytes of all tensors.
fn total_size(manifest: &Manifest) -> u64 {
    let outputs = manifest.tensors.iter().flat_map(|tensor| &tensor.outputs);
    let len = |output: &OutputRecord| dtype::byte_len(dtype::named(&output.dtype)?, &output.shape);
    outputs.fold(0, |sum, output| sum.saturating_add(len(output).unwrap_or(0)))
}

/// The index must be what is written for the manifest's tensors: every one in its file, and nothing else.
pub(super) fn check_index(checkpoint: &Checkpoint, by_file: &ByFile<'_>, report: &mut Report) -> Result<()> {
    if !checkpoint.manifest.files.iter().any(|file| file.name == INDEX_NAME) {
        if by_file.len() > 1 {
            report.differ(INDEX_NAME, None, "is not in the manifest, though there are several files of weights");
        }
        return Ok(());
    }
    let Some(index) = if_sound(Index::read(&checkpoint.folder.join(INDEX_NAME)))? else {
        report.differ(INDEX_NAME, None, "it is missing, or not an index of tensors");
        return Ok(());
    };
    let expected: BTreeMap<&str, &str> =
        by_file.iter().flat_map(|(file, tensors)| tensors.keys().map(|name| (*name, *file))).collect();
    let found = report.differences.len();
    for (name, file) in &expected {
        match index.file_of(name) {
            Some(found) if found == *file => {}
            found => {
                let found = found.unwrap_or("no file");
                report.differ(INDEX_NAME, Some(name), format!("is said to be in {found}, expected {file}"));
            }
        }
    }
    for name in index.tensors().filter(|name| !expected.contains_key(name)) {
        report.differ(INDEX_NAME, Some(name), "is not in the manifest");
    }
    let total_size = total_size(&checkpoint.manifest);
    if index.total_size != Some(total_size) {
        let found = index.total_size.map_or("none that is a number".to_owned(), |size| size.to_string());
        report.differ(INDEX_NAME, None, format!("its total_size is {found}, expected {total_size}"));
    }
    // Whatever it has besides.
    let mut hasher = HashingWriter::new(io::sink());
    let weight_map = expected.iter().map(|(name, file)| ((*name).to_owned(), *file));
    write_index(weight_map, total_size, &mut hasher).at(checkpoint.folder.join(INDEX_NAME).path(), "write it")?;
    let recorded = checkpoint.manifest.files.iter().find(|file| file.name == INDEX_NAME);
    if report.differences.len() == found && recorded.map(|file| file.sha256) != Some(hasher.finish().1) {
        report.differ(INDEX_NAME, None, "it isn't the index of the manifest's tensors as prequant writes it");
    }
    Ok(())
}
