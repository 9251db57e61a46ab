//! Tensors: what headers, index and quant_states say of them, and their hashes.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::Ordering;

use crate::checkpoint::{CONFIG_NAME, Config, Header, INDEX_NAME, Index, TensorInfo};
use crate::dtype::FloatDtype;
use crate::error::{Error, IoContext, Result};
use crate::format::Scales;
use crate::layout::bitsandbytes::{MAX_QUANT_STATE, ParsedQuantState, QUANT_STATE};
use crate::layout::gpt_oss;
use crate::manifest::{DecisionRecord, Manifest, OutputRecord, SourceTensorRecord, TensorRecord};
use crate::models::Role;
use crate::ops::verify::{Checkpoint, Options, Report, on_threads};
use crate::store::{Location, ReadAt, Reader, hash_range, read_exact_at};

/// The manifest's tensors: by file, then by name.
type ByFile<'a> = BTreeMap<&'a str, HashMap<&'a str, (&'a OutputRecord, &'a TensorRecord)>>;

/// Every tensor of the manifest must stand in its file's header, and no other, and (but for `quick`) have its hash.
pub(crate) fn check(checkpoint: &Checkpoint, options: Options<'_>, report: &mut Report) -> Result<()> {
    let mut by_file = ByFile::new();
    for tensor in &checkpoint.manifest.tensors {
        for output in &tensor.outputs {
            by_file.entry(&output.file).or_default().insert(&output.name, (output, tensor));
        }
    }
    for (file, expected) in &by_file {
        if !checkpoint.manifest.files.iter().any(|record| record.name == *file) {
            report.differ(file, None, "it holds tensors, but is not among the manifest's files");
            continue;
        }
        check_file(checkpoint, file, expected, options, report)?;
    }
    check_index(checkpoint, &by_file, report);
    Ok(())
}

fn check_file(
    checkpoint: &Checkpoint,
    file: &str,
    expected: &HashMap<&str, (&OutputRecord, &TensorRecord)>,
    options: Options<'_>,
    report: &mut Report,
) -> Result<()> {
    let location = checkpoint.folder.join(file);
    let Some((opened, header)) = open(&location, file, report) else { return Ok(()) };
    report.tensors += header.tensors.len();
    let mut entries = Vec::new();
    for info in &header.tensors {
        match expected.get(info.name.as_str()) {
            Some((record, tensor)) => {
                entries.push(Entry { file, location: &location, opened: &*opened, info, record, tensor });
            }
            None => report.differ(file, Some(&info.name), "is not in the manifest"),
        }
    }
    let found: HashSet<&str> = entries.iter().map(|entry| entry.info.name.as_str()).collect();
    for name in expected.keys().filter(|name| !found.contains(*name)) {
        report.differ(file, Some(name), "is missing from the file");
    }
    for entry in &entries {
        entry.check_header(report);
        if !options.quick && entry.info.name.contains(QUANT_STATE) {
            entry.check_quant_state(&checkpoint.manifest, report)?;
        }
    }
    if !options.quick {
        let differences =
            on_threads(options.threads, &entries, |entry, buffer| entry.hash_difference(options, buffer))?;
        for (entry, what) in entries.iter().zip(differences) {
            what.into_iter().for_each(|what| entry.differ(report, what));
        }
    }
    Ok(())
}

fn open(location: &Location, file: &str, report: &mut Report) -> Option<(Box<dyn ReadAt>, Header)> {
    // A file that is missing has been reported.
    let opened = location.open().ok()?;
    let len = opened.identity().ok()?.len;
    match Header::read(&mut Reader::new(&*opened), len, location.path()) {
        Ok(header) => Some((opened, header)),
        Err(Error::Malformed { why, .. }) => {
            report.differ(file, None, why);
            None
        }
        Err(error) => {
            report.differ(file, None, error.to_string());
            None
        }
    }
}

/// A tensor as its file has it and as the manifest has it.
struct Entry<'a> {
    file: &'a str,
    location: &'a Location,
    opened: &'a dyn ReadAt,
    info: &'a TensorInfo,
    record: &'a OutputRecord,
    tensor: &'a TensorRecord,
}

impl Entry<'_> {
    fn differ(&self, report: &mut Report, what: String) {
        report.differ(self.file, Some(&self.info.name), what);
    }

    fn check_header(&self, report: &mut Report) {
        let (found, expected) = (self.info.dtype.to_string(), &self.record.dtype);
        if found != *expected || self.info.shape != self.record.shape {
            let (found_shape, expected_shape) = (&self.info.shape, &self.record.shape);
            self.differ(report, format!("is {found} {found_shape:?}, expected {expected} {expected_shape:?}"));
        }
    }

    fn hash_difference(&self, options: Options<'_>, buffer: &mut [u8]) -> Result<Option<String>> {
        let keep_going = || !options.interrupt.load(Ordering::Relaxed);
        let TensorInfo { offset, len, .. } = *self.info;
        let hash = hash_range(self.opened, offset, len, buffer, keep_going);
        let hash = hash.at(self.location.path(), "read it")?.ok_or(Error::Interrupted)?;
        Ok((hash != self.record.sha256).then(|| format!("its SHA-256 is {hash}, expected {}", self.record.sha256)))
    }

    /// The JSON that clients decode by must say what the recipe and the source say.
    fn check_quant_state(&self, manifest: &Manifest, report: &mut Report) -> Result<()> {
        let mut json = vec![0; self.info.len.min(MAX_QUANT_STATE) as usize];
        read_exact_at(self.opened, &mut json, self.info.offset).at(self.location.path(), "read it")?;
        let state = match ParsedQuantState::parse(&json) {
            Ok(state) => state,
            Err(error) => {
                self.differ(report, format!("is no quant_state: {error}"));
                return Ok(());
            }
        };
        let (Some(source), DecisionRecord::Quantize) = (self.tensor.sources.first(), self.tensor.decision) else {
            self.differ(report, "belongs to a tensor that isn't quantized".to_owned());
            return Ok(());
        };
        let dtype = match source.dtype.as_str() {
            "BF16" => FloatDtype::Bfloat16,
            "F16" => FloatDtype::Float16,
            "F32" => FloatDtype::Float32,
            // It was coded, and decoded to the model's.
            _ => {
                let config = Config::read(&self.location.with_file_name(CONFIG_NAME)).ok();
                config.and_then(|config| config.dtype()).unwrap_or(FloatDtype::Bfloat16)
            }
        };
        let codec = manifest.recipe.codec();
        let Scales::Blocks { size, double_quant, .. } = codec.scales else {
            self.differ(report, format!("is bitsandbytes', and the recipe is of {}", codec.format.name));
            return Ok(());
        };
        let block_size = u64::from(u32::from(size));
        let (found, expected) = (
            (state.quant_type.as_str(), state.blocksize, state.dtype.as_str()),
            (codec.format.library_name, block_size, dtype.torch_name()),
        );
        if found != expected {
            self.differ(report, format!("says {found:?}, expected {expected:?}"));
        }
        if !self.is_of_sources(&state.shape, manifest) {
            let shapes: Vec<&[u64]> = self.tensor.sources.iter().map(|source| &*source.shape).collect();
            self.differ(report, format!("says the shape is {:?}, and the source has {shapes:?}", state.shape));
        }
        if state.nested_offset.is_some() != double_quant {
            self.differ(report, "and the recipe don't agree on double quantization".to_owned());
        }
        Ok(())
    }
}

impl Entry<'_> {
    /// Whether a weight of this shape is what the manifest's sources give.
    fn is_of_sources(&self, shape: &[u64], manifest: &Manifest) -> bool {
        let sources = &self.tensor.sources;
        let is_coded =
            |source: &&SourceTensorRecord| source.dtype == "F8_E4M3" || source.name.ends_with(gpt_oss::BLOCKS);
        if sources.iter().any(|source| is_coded(&source)) {
            // Two of gpt-oss's codes are a byte; scales are no part of the shape.
            let elements = sources.iter().filter(is_coded).map(|source| {
                let codes = if source.dtype == "F8_E4M3" { 1 } else { 2 };
                elements(&source.shape)?.checked_mul(codes)
            });
            let all = elements.into_iter().try_fold(0u64, |sum, elements| sum.checked_add(elements?));
            return all.is_some() && self::elements(shape) == all;
        }
        let shapes: Vec<&[u64]> = sources.iter().map(|source| &*source.shape).collect();
        let is_fused = self.tensor.role == Role::FusedExperts && manifest.recipe.fuses_experts();
        shape == shapes[0] || is_fused && is_made_of(shape, &shapes)
    }
}

fn elements(shape: &[u64]) -> Option<u64> {
    shape.iter().try_fold(1u64, |product, &dimension| product.checked_mul(dimension))
}

/// Whether a 3-D shape has as many elements as what was fused into it, and its columns (or rows, if it is transposed).
fn is_made_of(fused: &[u64], shapes: &[&[u64]]) -> bool {
    let all = shapes.iter().try_fold(0u64, |sum, shape| sum.checked_add(elements(shape)?));
    let side = |shape: &&[u64]| shape.last().is_some_and(|columns| fused[1..].contains(columns));
    fused.len() == 3 && all.is_some() && elements(fused) == all && shapes.iter().all(side)
}

/// The index must have every tensor in its file.
fn check_index(checkpoint: &Checkpoint, by_file: &ByFile<'_>, report: &mut Report) {
    if !checkpoint.manifest.files.iter().any(|file| file.name == INDEX_NAME) {
        if by_file.len() > 1 {
            report.differ(INDEX_NAME, None, "is not in the manifest, though there are several files of weights");
        }
        return;
    }
    let Ok(index) = Index::read(&checkpoint.folder.join(INDEX_NAME)) else {
        return report.differ(INDEX_NAME, None, "it is missing, or not an index of tensors");
    };
    let expected: BTreeMap<&str, &str> =
        by_file.iter().flat_map(|(file, tensors)| tensors.keys().map(|name| (*name, *file))).collect();
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
}
