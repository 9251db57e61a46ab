//! Verifying a finished checkpoint: against its manifest, and against its source.

mod by_tensor;
mod contents;
mod conversion;
mod files;
mod fresh;
mod hashing;
mod headers;
mod jobs;
mod reconvert;
mod records;
mod report;
mod summary;
mod sums;
mod unlisted;

use std::sync::atomic::AtomicBool;
use std::thread;

pub use reconvert::against;
pub(crate) use reconvert::against_merge;
pub use report::{Difference, DifferenceClass, Report};

use crate::checkpoint::{CONFIG_NAME, Config, MANIFEST_NAME, MAX_JSON_LEN, STAGING_NAME};
use crate::error::{Error, IoContext, Result};
use crate::manifest::ManifestHead;
use crate::ops::kept_modules::KeptModules;
use crate::ops::quantize::Conversion;
use crate::ops::recorded_config;
use crate::ops::verify::records::Records;
use crate::ops::verify::summary::Sums;
use crate::store::{Location, Sha256Hash, is_no_file};

/// How to verify.
#[derive(Clone, Copy)]
pub struct Options<'a> {
    /// Sizes and headers only.
    pub quick: bool,
    /// Threads that hash.
    pub threads: usize,
    /// Set from outside to have it stop.
    pub interrupt: &'a AtomicBool,
    /// Told how many bytes more of the files are about to be hashed (or, of the source, were compared), from any thread.
    pub hashed: &'a (dyn Fn(u64) + Sync),
    /// Told what is compared with, before it begins; of verifying against a source.
    pub planned: &'a (dyn Fn(&Conversion) + Sync),
}

static NEVER: AtomicBool = AtomicBool::new(false);

impl Default for Options<'_> {
    /// All of it, on all cores, in silence.
    fn default() -> Self {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        Options { quick: false, threads, interrupt: &NEVER, hashed: &|_| (), planned: &|_| () }
    }
}

/// A checkpoint's folder and its manifest, as it was found.
struct Checkpoint {
    folder: Location,
    /// Without its records, which stay in the file.
    manifest: ManifestHead,
    manifest_sha256: Sha256Hash,
    records: Records,
    /// What the records add up to.
    sums: Sums,
}

impl Checkpoint {
    /// The content of a small file, if it is there.
    fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let location = self.folder.join(name);
        location.read_if_there(MAX_JSON_LEN).at(location.path(), "read it")
    }

    /// The SHA-256 of a file, if one is there.
    fn hash_of(&self, name: &str) -> Result<Option<Sha256Hash>> {
        let location = self.folder.join(name);
        let path = location.path();
        let is_file = location.is_file().at(path, "look at it")?;
        is_file.then(|| location.sha256().at(path, "read it")).transpose()
    }
}

/// Checks the checkpoint in `folder` against its manifest.
///
/// # Errors
/// When there is no manifest, or the system refuses to read. What is damaged is in the report.
pub fn verify(folder: impl Into<Location>, options: Options<'_>) -> Result<Report> {
    let mut report = Report::default();
    let Some(checkpoint) = open(&folder.into(), &mut report)? else { return Ok(report) };
    report.left_out.clone_from(&checkpoint.manifest.left_out);
    sums::check(&checkpoint, &mut report)?;
    unlisted::check(&checkpoint, &mut report)?;
    summary::check(&checkpoint, &mut report);
    let kept = check_config(&checkpoint, &mut report)?;
    contents::check(&checkpoint, &kept, options, &mut report)?;
    kept.difference().into_iter().for_each(|what| report.differ(CONFIG_NAME, None, what));
    headers::check_index(&checkpoint, &mut report)?;
    checkpoint.records.check_is_unchanged()?;
    report.sort();
    Ok(report)
}

/// Opens a converted checkpoint; a manifest that can't be read is a difference.
fn open(folder: &Location, report: &mut Report) -> Result<Option<Checkpoint>> {
    let path = folder.join(MANIFEST_NAME);
    if !path.is_file().at(path.path(), "look at it")? {
        let staging = folder.join(STAGING_NAME);
        let why = match staging.is_folder().at(staging.path(), "look at it")? {
            true => "its conversion was never finished; run the command it was begun with again",
            false => {
                "not converted by prequant (no prequant.json); verify takes a folder written by `prequant convert`"
            }
        };
        return Err(Error::NotACheckpoint { path: folder.path().to_owned(), why: why.to_owned() });
    }
    let mut sums = Sums::default();
    match Records::open(&path, &mut |record| sums.add(record)) {
        Ok((manifest, manifest_sha256, records)) => {
            Ok(Some(Checkpoint { folder: folder.clone(), manifest, manifest_sha256, records, sums }))
        }
        Err(Error::Malformed { why, .. }) => {
            report.differ(MANIFEST_NAME, None, why);
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// config.json must tell clients what the recipe says. That it is the file that was written is checked by its hash. Returns what it
/// lists as left unquantized.
fn check_config(checkpoint: &Checkpoint, report: &mut Report) -> Result<KeptModules> {
    if !checkpoint.manifest.files.iter().any(|file| file.name == CONFIG_NAME) {
        return Ok(KeptModules::default());
    }
    let Some(config) = if_sound(Config::read(&checkpoint.folder.join(CONFIG_NAME)))? else {
        report.differ(CONFIG_NAME, None, "not a model's config");
        return Ok(KeptModules::default());
    };
    let (differences, kept) = recorded_config::differences(&config, &checkpoint.manifest);
    differences.into_iter().for_each(|what| report.differ(CONFIG_NAME, None, what));
    Ok(kept)
}

/// What was read; none if the file isn't there, or isn't what it should be. What the system refuses is an error.
fn if_sound<T>(read: Result<T>) -> Result<Option<T>> {
    match read {
        Ok(read) => Ok(Some(read)),
        Err(Error::Malformed { .. }) => Ok(None),
        Err(Error::Io { ref source, .. }) if is_no_file(source) => Ok(None),
        Err(error) => Err(error),
    }
}
