//! Doing a conversion again, without writing, and comparing every byte with what is there: proof that a checkpoint came
//! from a source by its recipe.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::checkpoint::{CONFIG_NAME, MANIFEST_NAME, SourceFile};
use crate::error::{Error, IoContext, Result};
use crate::manifest::{LeftOutRecord, TensorRecord};
use crate::ops::model_card;
use crate::ops::options;
use crate::ops::quantize;
use crate::ops::quantize::Conversion;
use crate::ops::verify::conversion::{execute, hash_side_files};
use crate::ops::verify::{Checkpoint, Difference, Options, Report, by_tensor, open, verify};
use crate::pipeline;
use crate::pipeline::{FileOutcome, Output, Outputs};
use crate::plan::{Plan, PlannedFile};
use crate::store::{Location, ReadAt, Sha256Hash, read_exact_at};

/// Checks the checkpoint in `folder` against its manifest, and against what converting `source` by the manifest's recipe
/// gives: every byte, or every tensor if another version wrote it. Memory is bounded as a conversion's is.
///
/// # Errors
/// As [`verify`], and those of opening the source and planning.
pub fn against(
    folder: impl Into<Location>,
    source: impl Into<Location>,
    convert: options::Options,
    options: Options<'_>,
) -> Result<Report> {
    let folder = folder.into();
    let mut report = verify(&folder, Options { quick: true, ..options })?;
    let Some(checkpoint) = open(&folder, &mut Report::default())? else { return Ok(report) };
    let manifest = &checkpoint.manifest;
    let hash_source = manifest.source.files.iter().any(|file| file.sha256.is_some());
    let convert = options::Options { hash_source, ..convert };
    let conversion = quantize::plan(source, manifest.recipe.clone(), convert)?;
    (options.planned)(&conversion);
    if let Some(version) = manifest.other_version() {
        by_tensor::compare(&conversion, &checkpoint, options, &mut report)?;
        report.written_by = Some(version);
    } else {
        compare(&conversion, &checkpoint, options, &mut report)?;
    }
    report.bytes = conversion.plan.output_len();
    report.differences.sort();
    report.differences.dedup();
    Ok(report)
}

/// Compares what this version wrote: every byte.
fn compare(conversion: &Conversion, checkpoint: &Checkpoint, options: Options<'_>, report: &mut Report) -> Result<()> {
    let manifest = &checkpoint.manifest;
    let planned = conversion.plan.files.iter();
    if !{ planned }.all(|planned| manifest.files.iter().any(|file| file.name == planned.name)) {
        let count = conversion.plan.files.len();
        report.differ(MANIFEST_NAME, None, format!("converting the source gives {count} files of weights"));
        return Ok(());
    }
    let (folder, plan) = (checkpoint.folder.clone(), &conversion.plan);
    let compared = Compared { folder, plan, differences: Mutex::default() };
    let executed = execute(conversion, &compared, options);
    let differences = compared.into_differences();
    match executed {
        Ok(outcome) => {
            compare_others(conversion, &outcome, checkpoint, &differences, report)?;
            compare_manifests(conversion, outcome, checkpoint, &differences, report)?;
        }
        Err(Error::Io { source, path, .. }) if source.kind() == std::io::ErrorKind::UnexpectedEof => {
            report.differ(&path.file_name().unwrap_or_default().to_string_lossy(), None, "it is too short");
        }
        Err(error) => return Err(error),
    }
    report.differences.extend(differences);
    Ok(())
}

/// What isn't tensors: whole files' hashes, config.json, and the files beside the weights.
fn compare_others(
    conversion: &Conversion,
    outcome: &pipeline::Outcome,
    checkpoint: &Checkpoint,
    different: &[Difference],
    report: &mut Report,
) -> Result<()> {
    // A file with other bytes is told already, and its hash may be that of what was found.
    let weights = conversion.plan.files.iter().zip(&outcome.files);
    let weights = weights.filter(|(file, _)| !different.iter().any(|difference| difference.file == file.name));
    let mut expected: Vec<(String, Sha256Hash)> = weights.map(|(file, sha256)| (file.name.clone(), *sha256)).collect();
    if let Some(config) = &conversion.plan.config {
        expected.push((CONFIG_NAME.to_owned(), Sha256Hash::of(config.as_bytes())));
    }
    expected.extend(hash_side_files(conversion)?);
    let card = model_card::changed(&conversion.source, &conversion.plan, false)?;
    if let Some(card) = card {
        expected.push((model_card::NAME.to_owned(), Sha256Hash::of(&card)));
    }
    let made = conversion.plan.side_files.iter();
    expected.extend(made.map(|(name, text)| (name.clone(), Sha256Hash::of(text.as_bytes()))));
    for (name, sha256) in expected {
        let record = checkpoint.manifest.files.iter().find(|file| file.name == name);
        let is_weights = name.ends_with(".safetensors");
        let on_disk = if is_weights { Some(sha256) } else { checkpoint.hash_of(&name)? };
        if record.map(|record| record.sha256) != Some(sha256) || on_disk != Some(sha256) {
            report.differ(&name, None, "isn't what converting the source gives");
        }
    }
    Ok(())
}

/// What the manifest says of weights and tensors must be what a manifest made now would say.
fn compare_manifests(
    conversion: &Conversion,
    outcome: pipeline::Outcome,
    checkpoint: &Checkpoint,
    different: &[Difference],
    report: &mut Report,
) -> Result<()> {
    let found = &checkpoint.manifest;
    let weights = conversion.plan.files.iter().map(|file| file.name.as_str()).collect::<Vec<_>>();
    let files = found.files.iter().filter(|file| !weights.contains(&file.name.as_str())).cloned().collect();
    let outcome = conversion.relaid(outcome);
    let expected = conversion.manifest(files, &outcome);
    // Tensors rewritten in another layout have no statistics of their own, and the order within the source's files may not have
    // survived.
    let relaid = found.relaid_from.is_some();
    let numbers: HashMap<String, usize> = match relaid {
        true => (0..expected.tensors.len()).filter_map(|i| Some((expected.tensors.name(i)?, i))).collect(),
        false => HashMap::new(),
    };
    // The hashes of tensors with other bytes may be those of what was found.
    let different: HashSet<&str> = different.iter().filter_map(|difference| difference.tensor.as_deref()).collect();
    let mut count = 0;
    checkpoint.records.all(&mut |found| {
        let number = match relaid {
            true => found.outputs.first().and_then(|output| numbers.get(&output.name).copied()),
            false => Some(count).filter(|number| *number < expected.tensors.len()),
        };
        let expected = number.map(|number| expected.tensors.get(number));
        compare_records(&found, expected, relaid, &different, report);
        count += 1;
    })?;
    let same = count == expected.tensors.len()
        && found.source == expected.source
        && (found.summary == expected.summary || relaid)
        && found.tool == expected.tool;
    // What git and the hub leave in a folder isn't the same for everyone who has the source.
    let of_the_model = |left_out: &[LeftOutRecord]| -> Vec<LeftOutRecord> {
        let is_hidden = |record: &LeftOutRecord| record.name.split('/').any(|part| part.starts_with('.'));
        left_out.iter().filter(|record| !is_hidden(record)).cloned().collect()
    };
    if !relaid && of_the_model(&found.left_out) != of_the_model(&expected.left_out) {
        report.differ(MANIFEST_NAME, None, "what it says was left out isn't what converting the source leaves out");
    }
    if !same {
        report.differ(MANIFEST_NAME, None, "isn't what converting the source with this version gives");
    }
    Ok(())
}

/// A record must be what a manifest made now would have in its place, if anything.
fn compare_records(
    found: &TensorRecord,
    expected: Option<TensorRecord>,
    relaid: bool,
    different: &HashSet<&str>,
    report: &mut Report,
) {
    let Some(mut expected) = expected else {
        let name = found.sources.first().map(|source| source.name.as_str());
        return report.differ(MANIFEST_NAME, name, "its record isn't what converting the source gives");
    };
    if relaid && found.statistics.is_none() {
        expected.statistics = None;
    }
    let mut sources = expected.sources.iter().map(|source| source.name.as_str());
    if expected.outputs.iter().any(|output| different.contains(output.name.as_str())) {
        // Of what was put together the first part is named, too.
        for name in sources.filter(|name| !different.contains(name)).take(1) {
            report.differ(MANIFEST_NAME, Some(name), "its bytes aren't what converting the source gives");
        }
    } else if *found != expected {
        report.differ(MANIFEST_NAME, sources.next(), "its record isn't what converting the source gives");
    }
}

/// The files that are there, read where a conversion would write.
struct Compared<'a> {
    folder: Location,
    plan: &'a Plan,
    differences: Mutex<Vec<Difference>>,
}

impl Compared<'_> {
    fn into_differences(self) -> Vec<Difference> {
        self.differences.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

struct ComparedFile<'a> {
    file: Box<dyn ReadAt>,
    location: Location,
    planned: PlannedFile,
    /// The lowest offset at which bytes differ, if any do.
    first: AtomicU64,
    /// The tensors whose bytes differ.
    tensors: Mutex<BTreeSet<String>>,
    all: &'a Compared<'a>,
}

impl ComparedFile<'_> {
    /// Notes which tensors differ in bytes at `offset`.
    fn note(&self, found: &[u8], expected: &[u8], offset: u64) {
        let end = offset + expected.len() as u64;
        for tensor in &self.all.plan.tensors[self.planned.tensors.clone()] {
            for output in tensor.outputs.iter() {
                let (from, to) = (output.offset.max(offset), (output.offset + output.len).min(end));
                let here = |bytes: &[u8]| bytes[(from - offset) as usize..(to - offset) as usize].to_vec();
                if from < to && here(found) != here(expected) {
                    let mut tensors = self.tensors.lock().unwrap_or_else(PoisonError::into_inner);
                    tensors.insert(format!("{}{}", tensor.name, output.suffix));
                }
            }
        }
    }
}

impl Outputs for Compared<'_> {
    fn open(&self, file: &PlannedFile) -> Result<Arc<dyn Output + '_>> {
        let location = self.folder.join(&file.name);
        let opened = location.open().at(location.path(), "open it")?;
        Ok(Arc::new(ComparedFile {
            file: opened,
            location,
            planned: file.clone(),
            first: AtomicU64::new(u64::MAX),
            tensors: Mutex::default(),
            all: self,
        }))
    }

    fn seal(&self, _: &PlannedFile, _: &FileOutcome) -> Result<()> {
        Ok(())
    }

    fn source_hashed(&self, _: &SourceFile, _: Sha256Hash) -> Result<()> {
        Ok(())
    }
}

impl Output for ComparedFile<'_> {
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let mut found = vec![0; bytes.len()];
        read_exact_at(&*self.file, &mut found, offset).at(self.path(), "read it")?;
        if let Some(at) = found.iter().zip(bytes).position(|(found, expected)| found != expected) {
            self.first.fetch_min(offset + at as u64, Ordering::Relaxed);
            self.note(&found, bytes, offset);
        }
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn file(&self) -> &dyn ReadAt {
        &*self.file
    }

    fn path(&self) -> &Path {
        self.location.path()
    }
}

impl Drop for ComparedFile<'_> {
    fn drop(&mut self) {
        let first = *self.first.get_mut();
        if first == u64::MAX {
            return;
        }
        let difference = |tensor, what| Difference { file: self.planned.name.clone(), tensor, what };
        let mut differences = self.all.differences.lock().unwrap_or_else(PoisonError::into_inner);
        differences.push(difference(None, format!("isn't what converting the source gives, from byte {first} on")));
        let tensors = self.tensors.lock().unwrap_or_else(PoisonError::into_inner);
        let what = "its bytes aren't what converting the source gives";
        differences.extend(tensors.iter().map(|name| difference(Some(name.clone()), what.to_owned())));
    }
}
