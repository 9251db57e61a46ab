//! Doing a conversion again, without writing, and comparing every byte with what is there: proof that a checkpoint came
//! from a source by its recipe.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::checkpoint::{MANIFEST_NAME, SourceFile};
use crate::error::{Error, IoContext, Result};
use crate::ops::merge;
use crate::ops::options;
use crate::ops::quantize;
use crate::ops::quantize::Conversion;
use crate::ops::verify::conversion::execute;
use crate::ops::verify::{Checkpoint, Difference, DifferenceClass, Options, Report, by_tensor, fresh, open, verify};
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
    compare_again(folder.into(), source.into(), None, convert, options)
}

/// As [`against`], of a checkpoint that `adapter` was merged into.
///
/// # Errors
/// The same.
pub(crate) fn against_merge(
    folder: impl Into<Location>,
    base: impl Into<Location>,
    adapter: impl Into<Location>,
    convert: options::Options,
    options: Options<'_>,
) -> Result<Report> {
    compare_again(folder.into(), base.into(), Some(adapter.into()), convert, options)
}

fn compare_again(
    folder: Location,
    source: Location,
    adapter: Option<Location>,
    convert: options::Options,
    options: Options<'_>,
) -> Result<Report> {
    let mut report = verify(&folder, Options { quick: true, ..options })?;
    let Some(checkpoint) = open(&folder, &mut Report::default())? else { return Ok(report) };
    let manifest = &checkpoint.manifest;
    let hash_source = manifest.source.files.iter().any(|file| file.sha256.is_some());
    let convert = options::Options { hash_source, ..convert };
    let recipe = manifest.recipe.clone();
    let conversion = match (adapter, &manifest.source.adapter) {
        (Some(adapter), Some(_)) => merge::plan(source, adapter, recipe, convert)?,
        (None, None) => quantize::plan(source, recipe, convert)?,
        (Some(_), None) => return Err(other_origin(&folder, "no adapter was merged into it: give the source alone")),
        (None, Some(_)) => return Err(other_origin(&folder, "an adapter was merged into it: give base and adapter")),
    };
    (options.planned)(&conversion);
    if let Some(version) = manifest.other_version() {
        by_tensor::compare(&conversion, &checkpoint, options, &mut report)?;
        report.written_by = Some(version);
    } else {
        compare(&conversion, &checkpoint, options, &mut report)?;
    }
    report.bytes = conversion.plan.output_len();
    report.sort();
    Ok(report)
}

fn other_origin(folder: &Location, why: &str) -> Error {
    Error::Adapter { path: folder.join(MANIFEST_NAME).path().to_owned(), why: why.to_owned() }
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
            fresh::compare(conversion, outcome, checkpoint, &differences, report)?;
        }
        Err(Error::Io { source, path, .. }) if source.kind() == std::io::ErrorKind::UnexpectedEof => {
            report.differ(&path.file_name().unwrap_or_default().to_string_lossy(), None, "it is too short");
        }
        Err(error) => return Err(error),
    }
    report.differences.extend(differences);
    Ok(())
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
        let class = DifferenceClass::Damage;
        let difference = |tensor, what| Difference { file: self.planned.name.clone(), tensor, what, class };
        let mut differences = self.all.differences.lock().unwrap_or_else(PoisonError::into_inner);
        differences.push(difference(None, format!("isn't what converting the source gives, from byte {first} on")));
        let tensors = self.tensors.lock().unwrap_or_else(PoisonError::into_inner);
        let what = "its bytes aren't what converting the source gives";
        differences.extend(tensors.iter().map(|name| difference(Some(name.clone()), what.to_owned())));
    }
}
