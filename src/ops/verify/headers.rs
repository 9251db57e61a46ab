//! Tensors: what headers, index and quant_states say of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::checkpoint::{
    CONFIG_NAME, Config, DIFFUSERS, INDEX_NAME, IndexHasher, SourceFile, TensorInfo, read_entries,
};
use crate::converted;
use crate::dtype::{self, FloatDtype, elements};
use crate::error::{Error, IoContext, Result};
use crate::format::Codec;
use crate::layout::OutputKind;
use crate::layout::bitsandbytes::{MAX_QUANT_STATE, ParsedQuantState, QUANT_STATE};
use crate::layout::gpt_oss;
use crate::manifest::{DecisionRecord, ManifestHead, OutputRecord, SourceTensorRecord, TensorRecord};
use crate::models::Role;
use crate::ops::global_scales::GlobalScales;
use crate::ops::verify::jobs::TensorJob;
use crate::ops::verify::records::{Records, is_inside};
use crate::ops::verify::{Checkpoint, Report, if_sound, summary};
use crate::store::{ReadAt, Sha256Hash, read_exact_at};

/// A file of tensors whose header was compared with the manifest.
pub(super) struct CheckedFile {
    file: SourceFile,
    /// What the SHA-256 of each of its tensors should be, of those that are in the manifest.
    expected: Vec<Option<Sha256Hash>>,
    /// Its tensors in the order of their names.
    by_name: Vec<u32>,
    /// Its quant_states, with what they are of by the manifest.
    quant_states: Vec<(u32, Arc<Quantized>)>,
}

/// What is known of a weight from its record. Many have the same.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Quantized {
    decision: DecisionRecord,
    role: Role,
    /// Names say only whether they are of gpt-oss's codes.
    sources: Vec<SourceTensorRecord>,
}

impl Quantized {
    fn of(record: &TensorRecord) -> Quantized {
        let sources = record.sources.iter().map(|source| SourceTensorRecord {
            name: if summary::is_gpt_oss(source) { gpt_oss::BLOCKS.to_owned() } else { String::new() },
            file: String::new(),
            ..source.clone()
        });
        Quantized { decision: record.decision, role: record.role, sources: sources.collect() }
    }
}

impl CheckedFile {
    /// Every tensor of the manifest must stand in the header as it has it, and no other. None if the file is damaged, which
    /// is reported, or was reported as no file of the folder. `each` is told of every record with a tensor in the file.
    pub(super) fn open(
        checkpoint: &Checkpoint,
        name: &str,
        report: &mut Report,
        each: &mut dyn FnMut(&TensorRecord),
    ) -> Result<Option<CheckedFile>> {
        let Some(file) = open(checkpoint, name, report)? else { return Ok(None) };
        let mut by_name: Vec<u32> = (0..file.tensors.len() as u32).collect();
        by_name.sort_unstable_by_key(|&i| &file.tensors[i as usize].name);
        let expected = vec![None; file.tensors.len()];
        let mut checked = CheckedFile { file, expected, by_name, quant_states: Vec::new() };
        let mut known: BTreeSet<Arc<Quantized>> = BTreeSet::new();
        report.tensors += checked.file.tensors.len();
        checkpoint.records.of_file(name, &mut |record| {
            each(&record);
            for output in record.outputs.iter().filter(|output| output.file == name) {
                let Some(i) = checked.find(&output.name) else {
                    report.differ(name, Some(&output.name), "is missing from the file");
                    continue;
                };
                let what = converted::difference(&checked.file.tensors[i], output);
                what.into_iter().for_each(|what| report.differ(name, Some(&output.name), what));
                if checked.expected[i].replace(output.sha256).is_some() {
                    report.differ(name, Some(&output.name), "is in the manifest twice");
                }
                if output.name.contains(QUANT_STATE) {
                    let quantized = Arc::new(Quantized::of(&record));
                    let same = known.get(&quantized).cloned().unwrap_or_else(|| {
                        known.insert(quantized.clone());
                        quantized
                    });
                    checked.quant_states.push((i as u32, same));
                }
            }
        })?;
        for (info, _) in checked.file.tensors.iter().zip(&checked.expected).filter(|(_, expected)| expected.is_none()) {
            report.differ(name, Some(&info.name), "is not in the manifest");
        }
        Ok(Some(checked))
    }

    /// The file's content.
    pub(super) fn reopen(&self) -> Result<Box<dyn ReadAt>> {
        self.file.reopen()
    }

    /// The tensors that have a hash in the manifest. Those without bytes are compared at once.
    pub(super) fn tensors(&self, report: &mut Report) -> Vec<TensorJob> {
        let mut jobs = Vec::with_capacity(self.expected.len());
        for (info, sha256) in self.file.tensors.iter().zip(&self.expected) {
            let Some(sha256) = *sha256 else { continue };
            let (name, offset, len) = (info.name.clone(), info.offset, info.len);
            if len > 0 {
                jobs.push(TensorJob { name, place: offset..offset + len, sha256 });
            } else if sha256 != Sha256Hash::of(&[]) {
                let what = format!("its SHA-256 is {}, expected {sha256}", Sha256Hash::of(&[]));
                report.differ(&self.file.name, Some(&name), what);
            }
        }
        jobs
    }

    /// The JSON that clients decode by must say what the recipe and the source say.
    pub(super) fn check_quant_states(&self, checkpoint: &Checkpoint, report: &mut Report) -> Result<()> {
        if self.quant_states.is_empty() {
            return Ok(());
        }
        // A config that can't be read is reported as such.
        let config = if_sound(Config::read(&checkpoint.folder.join(CONFIG_NAME)))?;
        let model = config.as_ref().and_then(Config::dtype).unwrap_or(FloatDtype::Bfloat16);
        let opened = self.reopen()?;
        for (i, tensor) in &self.quant_states {
            let entry = Entry { file: &self.file, info: &self.file.tensors[*i as usize], tensor };
            if let Some(state) = entry.quant_state(&*opened, report)? {
                entry.check_quant_state(&state, &checkpoint.manifest, model, report);
            }
        }
        Ok(())
    }

    /// Hands on the global scale of each weight that has one and shares it with others.
    pub(super) fn global_scales(&self, codec: &Codec, each: &mut dyn FnMut(&str, f32)) -> Result<()> {
        let Some(suffix) = codec.suffix(OutputKind::GlobalScale) else { return Ok(()) };
        let mut opened = None;
        for info in self.file.tensors.iter().filter(|info| info.len == 4) {
            let weight = info.name.strip_suffix(&*suffix).filter(|weight| GlobalScales::is_shared(weight));
            let Some(weight) = weight else { continue };
            let file = match &mut opened {
                Some(file) => file,
                None => opened.insert(self.reopen()?),
            };
            let mut bytes = [0; 4];
            read_exact_at(&**file, &mut bytes, info.offset).at(self.file.location.path(), "read it")?;
            each(weight, f32::from_le_bytes(bytes));
        }
        Ok(())
    }

    /// The place of a tensor in the header.
    fn find(&self, name: &str) -> Option<usize> {
        let name_of = |i: &u32| &*self.file.tensors[*i as usize].name;
        let place = self.by_name.binary_search_by(|i| name_of(i).cmp(name)).ok()?;
        Some(self.by_name[place] as usize)
    }
}

/// A file of weights; none if it is damaged, which is reported, or was reported as no file of the folder.
fn open(checkpoint: &Checkpoint, file: &str, report: &mut Report) -> Result<Option<SourceFile>> {
    let location = checkpoint.folder.join(file);
    if !is_inside(file) || !location.is_file().at(location.path(), "look at it")? {
        return Ok(None);
    }
    match SourceFile::open(file.to_owned(), location) {
        Ok(opened) => Ok(Some(opened)),
        Err(Error::Malformed { why, .. }) => {
            report.differ(file, None, why);
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// A tensor as its file has it, and what it belongs to by the manifest.
struct Entry<'f> {
    file: &'f SourceFile,
    info: &'f TensorInfo,
    tensor: &'f Quantized,
}

impl Entry<'_> {
    fn differ(&self, report: &mut Report, what: String) {
        report.differ(&self.file.name, Some(&self.info.name), what);
    }

    /// The quant_state that it is; what is none is reported.
    fn quant_state(&self, file: &dyn ReadAt, report: &mut Report) -> Result<Option<ParsedQuantState>> {
        let TensorInfo { offset, len, .. } = *self.info;
        if len > MAX_QUANT_STATE {
            self.differ(report, format!("is no quant_state: {len} bytes, expected {MAX_QUANT_STATE} at most"));
            return Ok(None);
        }
        let mut json = vec![0; len as usize];
        read_exact_at(file, &mut json, offset).at(self.file.location.path(), "read it")?;
        let state = ParsedQuantState::parse(&json);
        Ok(state.map_err(|error| self.differ(report, format!("is no quant_state: {error}"))).ok())
    }

    /// The JSON that clients decode by must say what the recipe and the source say.
    fn check_quant_state(
        &self,
        state: &ParsedQuantState,
        manifest: &ManifestHead,
        model: FloatDtype,
        report: &mut Report,
    ) {
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
    fn is_of_sources(&self, shape: &[u64], manifest: &ManifestHead) -> bool {
        let sources = &self.tensor.sources;
        // Where it was coded, its shape isn't a source's.
        let is_plain = sources.iter().all(|source| dtype::named(&source.dtype).and_then(FloatDtype::of).is_some());
        if !is_plain {
            let all = summary::elements_of_sources(sources);
            return all.is_none() || elements(shape) == all;
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

/// The name of the index that belongs to the files of weights.
pub(super) fn index_name(records: &Records) -> &'static str {
    let is_diffusers = records.files().any(|file| file.starts_with(DIFFUSERS.stem));
    if is_diffusers { DIFFUSERS.index } else { INDEX_NAME }
}

/// The index must be what is written for the manifest's tensors: every one in its file, and nothing else.
pub(super) fn check_index(checkpoint: &Checkpoint, report: &mut Report) -> Result<()> {
    let (records, tensors_len) = (&checkpoint.records, checkpoint.sums.tensors_len());
    let index_name = index_name(records);
    let Some(recorded) = checkpoint.manifest.files.iter().find(|file| file.name == index_name) else {
        if records.files().count() > 1 {
            report.differ(index_name, None, "is not in the manifest, though there are several files of weights");
        }
        return Ok(());
    };
    let mut text = IndexHasher::new(tensors_len);
    let mut found = vec![false; records.tensors.len()];
    // Entries that the manifest doesn't have so: there are none unless something is wrong.
    let mut others: BTreeMap<String, String> = BTreeMap::new();
    let read = read_entries(&checkpoint.folder.join(index_name), &mut |name, file| {
        text.entry(name, file);
        match records.tensors.place(name, file) {
            Some(place) => found[place] = true,
            None => drop(others.insert(name.to_owned(), file.to_owned())),
        }
    });
    if if_sound(read)?.is_none() {
        report.differ(index_name, None, "it is missing, or not an index of tensors");
        return Ok(());
    }
    if others.is_empty() && found.iter().all(|found| *found) {
        if text.finish() != recorded.sha256 {
            let what =
                format!("isn't the index that prequant writes for its tensors, whose total_size is {tensors_len}");
            report.differ(INDEX_NAME, None, what);
        }
        return Ok(());
    }
    records.all(&mut |record| {
        for OutputRecord { name, file, .. } in &record.outputs {
            if records.tensors.place(name, file).is_some_and(|place| !found[place]) {
                let found = others.remove(name).unwrap_or("no file".to_owned());
                report.differ(index_name, Some(name), format!("is said to be in {found}, expected {file}"));
            }
        }
    })?;
    for name in others.keys() {
        report.differ(index_name, Some(name), "is not in the manifest");
    }
    Ok(())
}
