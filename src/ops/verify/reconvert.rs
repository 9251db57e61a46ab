//! Doing a conversion again, without writing, and comparing every byte with what is there: proof that a checkpoint came
//! from a source by its recipe.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::checkpoint::{CONFIG_NAME, MANIFEST_NAME, SourceFile};
use crate::error::{Error, IoContext, Result};
use crate::manifest::{Manifest, TensorRecord};
use crate::ops::model_card;
use crate::ops::options;
use crate::ops::quantize;
use crate::ops::quantize::Conversion;
use crate::ops::verify::conversion::{execute, hash_side_files};
use crate::ops::verify::{Checkpoint, Difference, Options, Report, by_tensor, open, verify};
use crate::pipeline;
use crate::pipeline::{FileOutcome, Output, Outputs};
use crate::plan::PlannedFile;
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
    let compared = Compared { folder: checkpoint.folder.clone(), differences: Mutex::default() };
    match execute(conversion, &compared, options) {
        Ok(outcome) => {
            compare_others(conversion, &outcome, checkpoint, report)?;
            compare_manifests(conversion, outcome, manifest, report);
        }
        Err(Error::Io { source, path, .. }) if source.kind() == std::io::ErrorKind::UnexpectedEof => {
            report.differ(&path.file_name().unwrap_or_default().to_string_lossy(), None, "it is too short");
        }
        Err(error) => return Err(error),
    }
    report.differences.extend(compared.into_differences());
    Ok(())
}

/// What isn't tensors: whole files' hashes, config.json, and the files beside the weights.
fn compare_others(
    conversion: &Conversion,
    outcome: &pipeline::Outcome,
    checkpoint: &Checkpoint,
    report: &mut Report,
) -> Result<()> {
    let weights = conversion.plan.files.iter().zip(&outcome.files);
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
fn compare_manifests(conversion: &Conversion, outcome: pipeline::Outcome, found: &Manifest, report: &mut Report) {
    let weights = conversion.plan.files.iter().map(|file| file.name.as_str()).collect::<Vec<_>>();
    let files = found.files.iter().filter(|file| !weights.contains(&file.name.as_str())).cloned().collect();
    let mut expected = conversion.manifest(files, outcome);
    let mut found = found.clone();
    // Tensors rewritten in another layout have no statistics of their own.
    let relaid = found.relaid_from.is_some();
    let statistics = |expected: &TensorRecord, found: &TensorRecord| match &found.statistics {
        None if relaid => None,
        _ => expected.statistics.clone(),
    };
    if relaid {
        // The order within the source's files may not have survived.
        let by_name = |record: &TensorRecord| record.outputs.first().map(|output| output.name.clone());
        found.tensors.sort_by_cached_key(by_name);
        expected.tensors.sort_by_cached_key(by_name);
    }
    for (found, expected) in found.tensors.iter().zip(&expected.tensors) {
        if *found != (TensorRecord { statistics: statistics(expected, found), ..expected.clone() }) {
            let name = expected.sources.first().map(|source| source.name.as_str());
            report.differ(MANIFEST_NAME, name, "its record isn't what converting the source gives");
        }
    }
    let same = found.tensors.len() == expected.tensors.len()
        && found.source == expected.source
        && (found.summary == expected.summary || relaid)
        && found.tool == expected.tool;
    if !same {
        report.differ(MANIFEST_NAME, None, "isn't what converting the source with this version gives");
    }
}

/// The files that are there, read where a conversion would write.
struct Compared {
    folder: Location,
    differences: Mutex<Vec<Difference>>,
}

impl Compared {
    fn into_differences(self) -> Vec<Difference> {
        self.differences.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

struct ComparedFile<'a> {
    file: Box<dyn ReadAt>,
    location: Location,
    name: String,
    /// The lowest offset at which bytes differ, if any do.
    first: AtomicU64,
    differs: AtomicBool,
    all: &'a Compared,
}

impl Outputs for Compared {
    fn open(&self, file: &PlannedFile) -> Result<Arc<dyn Output + '_>> {
        let location = self.folder.join(&file.name);
        let opened = location.open().at(location.path(), "open it")?;
        Ok(Arc::new(ComparedFile {
            file: opened,
            location,
            name: file.name.clone(),
            first: AtomicU64::new(u64::MAX),
            differs: AtomicBool::new(false),
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
            self.differs.store(true, Ordering::Relaxed);
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
        if self.differs.load(Ordering::Relaxed) {
            let first = self.first.load(Ordering::Relaxed);
            let what = format!("isn't what converting the source gives, from byte {first} on");
            let difference = Difference { file: self.name.clone(), tensor: None, what };
            self.all.differences.lock().unwrap_or_else(PoisonError::into_inner).push(difference);
        }
    }
}
