//! Verifying a finished checkpoint: against its manifest, and against its source.

mod by_tensor;
mod contents;
mod conversion;
mod files;
mod hashing;
mod headers;
mod jobs;
mod kept_modules;
mod reconvert;
mod records;

use std::sync::atomic::AtomicBool;
use std::thread;

use serde::Serialize;

pub use reconvert::against;

use crate::checkpoint::{CONFIG_NAME, Config, MANIFEST_NAME, MAX_JSON_LEN, STAGING_NAME};
use crate::dtype::FloatDtype;
use crate::error::{Error, IoContext, Result};
use crate::manifest::{LeftOutRecord, ManifestHead};
use crate::ops::quantize::Conversion;
use crate::ops::verify::kept_modules::KeptModules;
use crate::ops::verify::records::Records;
use crate::store::{Location, Sha256Hash, hash_range, is_no_file};

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

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Difference {
    /// The file, below the checkpoint's folder.
    pub file: String,
    /// The tensor, if it is about one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tensor: Option<String>,
    /// What was found, and what was expected.
    pub what: String,
}

/// What verifying found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Files looked at.
    pub files: usize,
    /// Tensors of the output looked at.
    pub tensors: usize,
    /// Bytes hashed.
    pub bytes: u64,
    /// What wrote the checkpoint, if it was compared with its source and another version had written it: then tensors
    /// were compared, wherever they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub written_by: Option<String>,
    /// What of the source was left out when it was converted, by the manifest.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<LeftOutRecord>,
    /// Everything that is not as it should be, by file; empty if all is well.
    pub differences: Vec<Difference>,
}

impl Report {
    fn differ(&mut self, file: &str, tensor: Option<&str>, what: impl Into<String>) {
        let (file, tensor) = (file.to_owned(), tensor.map(str::to_owned));
        self.differences.push(Difference { file, tensor, what: what.into() });
    }
}

/// A checkpoint's folder and its manifest, as it was found.
struct Checkpoint {
    folder: Location,
    /// Without its records, which stay in the file.
    manifest: ManifestHead,
    manifest_sha256: Sha256Hash,
    records: Records,
}

impl Checkpoint {
    /// The content of a small file, if it is there.
    fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let location = self.folder.join(name);
        location.read_if_there(MAX_JSON_LEN).at(location.path(), "read it")
    }

    /// The SHA-256 of a file, if it is there.
    fn hash_of(&self, name: &str) -> Result<Option<Sha256Hash>> {
        let location = self.folder.join(name);
        let path = location.path();
        let file = match location.open() {
            Err(error) if is_no_file(&error) => return Ok(None),
            opened => opened.at(path, "open it")?,
        };
        let len = file.identity().at(path, "look at it")?.len;
        hash_range(&*file, 0, len, &mut vec![0; 1 << 16], || true).at(path, "read it")
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
    files::check_sums(&checkpoint, &mut report)?;
    files::check_names(&checkpoint, &mut report)?;
    let kept = check_config(&checkpoint, &mut report)?;
    contents::check(&checkpoint, &kept, options, &mut report)?;
    kept.report(&mut report);
    report.differences.sort();
    report.differences.dedup();
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
    match Records::open(&path) {
        Ok((manifest, manifest_sha256, records)) => {
            Ok(Some(Checkpoint { folder: folder.clone(), manifest, manifest_sha256, records }))
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
    const NAME: &str = CONFIG_NAME;
    if !checkpoint.manifest.files.iter().any(|file| file.name == NAME) {
        return Ok(KeptModules::default());
    }
    let Some(config) = if_sound(Config::read(&checkpoint.folder.join(NAME)))? else {
        report.differ(NAME, None, "not a model's config");
        return Ok(KeptModules::default());
    };
    let Some(found) = config.values().get("quantization_config") else {
        report.differ(NAME, None, "has no quantization_config");
        return Ok(KeptModules::default());
    };
    let codec = checkpoint.manifest.recipe.codec();
    let expected = codec.quantization_config(FloatDtype::Bfloat16, &[]);
    for (key, expected) in expected.as_object().into_iter().flatten() {
        let found = found.get(key).unwrap_or(&serde_json::Value::Null);
        if !codec.other_keys().contains(&key.as_str()) && found != expected {
            report.differ(NAME, None, format!("quantization_config's {key} is {found}, expected {expected}"));
        }
    }
    Ok(KeptModules::of(&config, found, codec))
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
