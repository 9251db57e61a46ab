//! A converted checkpoint that is read again: all of it must be what its manifest says before a new manifest vouches for it.
//!
//! Weights are hashed while they are read; everything beside them is looked at before anything is written.

use std::collections::HashMap;

use crate::checkpoint::{CONFIG_NAME, FileClass, MANIFEST_NAME, MAX_JSON_LEN, SUMS_NAME, Source};
use crate::error::{Error, Hint, IoContext, Result, Warning};
use crate::manifest::{FileRecord, Manifest};
use crate::ops::recorded_config;
use crate::pipeline::Outcome;
use crate::store::{Kind, Location, Sha256Hash, is_no_file};

/// What to do about a file that isn't what the manifest says.
const WAY_OUT: &str = "download it again, or convert the source again";

/// Checks config.json and all files beside the weights. What people may have edited, and no client loads, is told as a warning.
///
/// # Errors
/// When one that clients load is missing, differs, or isn't in the manifest, or the manifest isn't what was written.
pub(crate) fn check(source: &Source, manifest: &Manifest) -> Result<Vec<Warning>> {
    let mut warnings = Vec::new();
    let mut differs = |location: &Location, name: &str, what: String| match FileClass::of(name) {
        FileClass::Loaded => Err(malformed(location, &what)),
        FileClass::ForPeople => {
            warnings.push(format!("{name}: {what}; it is taken as it is").into());
            Ok(())
        }
    };
    if let Some(config) = &source.config {
        let (mut differences, kept) = recorded_config::differences(config, manifest);
        let mut quantized = kept.quantized();
        manifest.tensors.iter().for_each(|record| quantized.add(record));
        quantized.check();
        differences.extend(kept.difference());
        if let Some(what) = differences.first() {
            return Err(malformed(&source.location.join(CONFIG_NAME), &format!("{what}, as {MANIFEST_NAME} says")));
        }
    }
    let is_weights = |name: &str| source.files.iter().any(|file| file.name == name);
    for record in manifest.files.iter().filter(|record| !is_weights(&record.name)) {
        let location = source.location.join(&record.name);
        if let Some(what) = difference(&location, record)? {
            differs(&location, &record.name, what)?;
        }
    }
    let records = by_name(manifest);
    for side in source.side_files.iter().filter(|side| !records.contains_key(side.name.as_str())) {
        differs(&side.location, &side.name, format!("it isn't in {MANIFEST_NAME}"))?;
    }
    check_manifest(source)?;
    Ok(warnings)
}

/// Checks the manifest itself, of which SHA256SUMS speaks if it is there.
fn check_manifest(source: &Source) -> Result<()> {
    let sums = source.location.join(SUMS_NAME);
    let Some(text) = sums.read_if_there(MAX_JSON_LEN).at(sums.path(), "read it")? else { return Ok(()) };
    let manifest = source.location.join(MANIFEST_NAME);
    let sha256 = manifest.sha256().at(manifest.path(), "read it")?;
    let expected = format!("{sha256}  {MANIFEST_NAME}");
    match text.split(|byte| *byte == b'\n').any(|line| line.trim_ascii_end() == expected.as_bytes()) {
        true => Ok(()),
        false => Err(malformed(&manifest, &format!("its SHA-256 is {sha256}, which isn't {SUMS_NAME}'s"))),
    }
}

/// What a file is otherwise than the manifest says.
fn difference(location: &Location, record: &FileRecord) -> Result<Option<String>> {
    let path = location.path();
    let stat = match location.stat() {
        Err(error) if is_no_file(&error) => return Ok(Some(format!("it is missing, and {MANIFEST_NAME} has it"))),
        stat => stat.at(path, "look at it")?,
    };
    if stat.kind != Kind::File {
        return Ok(Some("it is not a regular file".to_owned()));
    }
    if stat.len != record.size {
        return Ok(Some(format!("it has {} bytes, and {} in {MANIFEST_NAME}", stat.len, record.size)));
    }
    let sha256 = location.sha256().at(path, "read it")?;
    Ok((sha256 != record.sha256).then(|| other_hash(sha256)))
}

/// Checks what was read since then: weights, and the files that were copied beside them.
///
/// # Errors
/// When one that clients load isn't what the manifest says.
pub(crate) fn check_read(source: &Source, manifest: &Manifest, outcome: &Outcome, copied: &[FileRecord]) -> Result<()> {
    let records = by_name(manifest);
    let expected = |name: &str| records.get(name).map(|record| record.sha256);
    for (file, sha256) in source.own_files().iter().zip(outcome.source_files.iter().flatten()) {
        if expected(&file.name) != Some(*sha256) {
            let why = format!("{}; {WAY_OUT}", other_hash(*sha256));
            let path = file.location.path().to_owned();
            return Err(Error::Malformed { path, why, hint: Some(Hint::Restart) });
        }
    }
    let mut loaded = copied.iter().filter(|file| FileClass::of(&file.name) == FileClass::Loaded);
    match loaded.find(|file| expected(&file.name).is_some_and(|sha256| sha256 != file.sha256)) {
        Some(file) => Err(malformed(&source.location.join(&file.name), &other_hash(file.sha256))),
        None => Ok(()),
    }
}

fn by_name(manifest: &Manifest) -> HashMap<&str, &FileRecord> {
    manifest.files.iter().map(|file| (file.name.as_str(), file)).collect()
}

fn other_hash(sha256: Sha256Hash) -> String {
    format!("its SHA-256 is {sha256}, which isn't {MANIFEST_NAME}'s")
}

fn malformed(location: &Location, what: &str) -> Error {
    let (path, why) = (location.path().to_owned(), format!("{what}; {WAY_OUT}"));
    Error::Malformed { path, why, hint: Some(Hint::Verify) }
}
