//! What a folder or a file is, and what is in it if it is a checkpoint, converted or not; by names and headers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::checkpoint::{Config, Place, Source};
use crate::converted::{self, FoundWeight};
use crate::error::{Error, Result, Warning};
use crate::layout::{leftover, recognize};
use crate::manifest::{LeftOutRecord, Manifest};
use crate::ops::global_scales::GlobalScales;
use crate::ops::{hub_count, records, relayout};
use crate::plan::{Plan, source_quantization};
use crate::recipe::Recipe;
use crate::store::Location;

/// What is at a path.
#[derive(Debug, Default)]
pub struct Contents {
    /// Where it is, as given.
    pub path: PathBuf,
    /// What it is, in a few words.
    pub what: String,
    /// `model_type` of its config.json.
    pub model_type: Option<String>,
    /// How its weights are quantized, if they are: the method, or the format that prequant wrote.
    pub method: Option<String>,
    /// The layout that quantized weights are stored in, by the library that reads it.
    pub layout: Option<String>,
    /// Names and sizes of its files of weights.
    pub files: Vec<(String, u64)>,
    /// Its weights: files by name, weights in the order of their bytes.
    pub weights: Vec<StoredWeight>,
    /// Tensors and bytes by dtype, scales and all.
    pub dtypes: BTreeMap<String, Stored>,
    /// Parameters by dtype, as the hub's pages count them: packed codes by what they hold, scales not at all.
    pub parameters: BTreeMap<String, u64>,
    /// What of the folder a conversion would leave out.
    pub left_out: Vec<LeftOutRecord>,
    /// What converting it with default options would warn of; of a converted checkpoint, what its source was warned of as a
    /// whole.
    pub warnings: Vec<Warning>,
    /// Why it can't be converted with default options, if it can't.
    pub obstacle: Option<Error>,
}

/// Tensors of one dtype.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stored {
    /// How many.
    pub tensors: usize,
    /// Their bytes.
    pub bytes: u64,
}

/// A weight with all tensors that belong to it.
#[derive(Clone, Debug)]
pub struct StoredWeight {
    /// Its name.
    pub name: String,
    /// The name of the file it is in.
    pub file: String,
    /// Its dtype, or its 4-bit format.
    pub format: String,
    /// The shape of the tensor that holds it, or its codes.
    pub stored_shape: Vec<u64>,
    /// How many numbers it has.
    pub elements: u64,
    /// Bytes, scales included.
    pub bytes: u64,
}

/// Tells what is at `path`; of a checkpoint, a folder or a single safetensors file, all weights.
///
/// # Errors
/// When nothing is there, or what is there is damaged as far as headers tell, or incomplete.
pub fn inspect(path: impl AsRef<Path>) -> Result<Contents> {
    let (path, place) = (path.as_ref().to_owned(), Location::from(path.as_ref()));
    let mut source = match Source::open_any(&place) {
        Ok(source) => source,
        Err(error @ Error::NotACheckpoint { .. }) => {
            let Some(found) = Place::at(&place)? else { return Err(error) };
            return Ok(Contents { path, what: found.what().to_owned(), obstacle: Some(error), ..Contents::default() });
        }
        Err(error) => return Err(error),
    };
    let manifest = relayout::manifest_of(&place)?;
    let obstacle = if manifest.is_some() { None } else { source.check_is_a_model().err() };
    leftover::take_out(&mut source)?;
    let planned = match (&manifest, obstacle) {
        (_, Some(error)) => Err(error),
        (Some(_), None) => Ok(source.notes.clone()),
        (None, None) => warnings(&source),
    };
    let (mut warnings, obstacle) = match planned {
        Ok(warnings) => (warnings, None),
        Err(error) => (source.notes.clone(), Some(error)),
    };
    warnings.extend(GlobalScales::of(&source)?.warning());
    let method = method(&source, manifest.as_ref());
    Ok(Contents {
        path,
        what: what(&source, manifest.as_ref(), method.as_deref()),
        model_type: model_type(&source).map(str::to_owned),
        layout: method.is_some().then(|| layout(&source, manifest.as_ref())).flatten(),
        method,
        files: source.files.iter().map(|file| (file.name.clone(), file.identity.len)).collect(),
        weights: weights(&source),
        dtypes: dtypes(&source),
        parameters: hub_count::count(&source),
        left_out: match &manifest {
            Some(manifest) => manifest.left_out.clone(),
            None => records::left_out(&source, std::iter::empty()),
        },
        warnings,
        obstacle,
    })
}

/// What a conversion with default options would warn of.
fn warnings(source: &Source) -> Result<Vec<Warning>> {
    let recipe = Recipe::default();
    source_quantization::check(source, &recipe)?;
    Plan::new(source, recipe).map(|plan| plan.warnings)
}

fn model_type(source: &Source) -> Option<&str> {
    source.config.as_ref().and_then(|config| config.model_types().first().copied())
}

/// How the weights are quantized, if they are.
fn method(source: &Source, manifest: Option<&Manifest>) -> Option<String> {
    match manifest {
        Some(manifest) => manifest.recipe.format().map(|format| format.name.to_owned()),
        None => recognize::of(source).map(|(_, found)| found.method),
    }
}

/// The library whose layout quantized weights have.
fn layout(source: &Source, manifest: Option<&Manifest>) -> Option<String> {
    if let Some(manifest) = manifest {
        let layout = manifest.recipe.codec().layout();
        manifest.recipe.format()?;
        return Some(layout.map_or("bitsandbytes", |layout| layout.name()).to_owned());
    }
    let (_, config) = recognize::quantization_config(source.config.as_ref()?)?;
    let method = config.get("quant_method")?.as_str()?;
    let format = config.get("format").and_then(|format| format.as_str()).map(|format| format!(", {format}"));
    Some(format!("{method}{}", format.unwrap_or_default()))
}

/// The checkpoint in a few words.
fn what(source: &Source, manifest: Option<&Manifest>, method: Option<&str>) -> String {
    let of = |name: Option<&str>| name.map(|name| format!(" ({name})")).unwrap_or_default();
    let class = source.config.as_ref().and_then(Config::class_name);
    let kind = match (manifest, &source.config) {
        (Some(manifest), _) => {
            format!(
                "a checkpoint converted by {} {}{}",
                manifest.tool.name,
                manifest.tool.version,
                of(model_type(source))
            )
        }
        (None, _) if class.is_some() => format!("a diffusers model{}", of(class)),
        (None, Some(_)) => format!("a checkpoint of transformers' layout{}", of(model_type(source))),
        (None, None) => "safetensors without a model's config".to_owned(),
    };
    let files = match source.files.len() {
        1 => "one file of weights".to_owned(),
        count => format!("{count} files of weights"),
    };
    let quantized = method.map_or("not quantized".to_owned(), |method| format!("quantized: {method}"));
    format!("{kind}, {files}, {quantized}")
}

fn weights(source: &Source) -> Vec<StoredWeight> {
    let weights = converted::weights(source).into_iter();
    let weights = weights.map(|FoundWeight { name, file, codec, codes, beside }| StoredWeight {
        name: name.to_owned(),
        file: source.files[file].name.clone(),
        format: codec.map_or_else(|| codes.dtype.to_string(), |codec| codec.format.name.to_owned()),
        stored_shape: codes.shape.to_vec(),
        // Two codes per byte; whether the last ones are a pad, only what stands beside them knows.
        elements: if codec.is_some() { 2 * codes.len } else { codes.shape.iter().product() },
        bytes: codes.len + beside.iter().map(|info| info.len).sum::<u64>(),
    });
    weights.collect()
}

fn dtypes(source: &Source) -> BTreeMap<String, Stored> {
    let mut dtypes: BTreeMap<String, Stored> = BTreeMap::new();
    for (_, info) in source.tensors() {
        let stored = dtypes.entry(info.dtype.to_string()).or_default();
        *stored = Stored { tensors: stored.tensors + 1, bytes: stored.bytes + info.len };
    }
    dtypes
}
