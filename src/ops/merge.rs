//! Merging an adapter into a base: open both, plan, and then as any conversion.
//!
//! What is written are floats, or what converting those floats gives: the conversion is planned of the merged checkpoint as if that
//! had been written, and reads what that would have been written from.

use std::collections::HashMap;
use std::sync::Arc;

use crate::adapter::{self, Adapter};
use crate::checkpoint::{AdapterPart, CONFIG_NAME, Config, MANIFEST_NAME, SUMS_NAME, Source, SourceFile, TensorInfo};
use crate::error::{Error, Result};
use crate::manifest::Manifest;
use crate::ops::dequantize::Floats;
use crate::ops::options::Options;
use crate::ops::quantize::{self, Conversion, Origin};
use crate::plan::{Part, Plan, source_quantization};
use crate::read::Span;
use crate::recipe::Recipe;
use crate::store::{Identity, Location, Sha256Hash};

/// Opens a base and an adapter and plans merging them; reads headers and configs only, and writes nothing. The recipe tells what is
/// written: [`Recipe::floats`], or a format, in which the merged weights are quantized.
///
/// # Errors
/// When the base is no checkpoint, the adapter is none that can be merged, a tensor of it doesn't fit the base, or the recipe doesn't
/// fit what is merged.
pub fn plan(
    base: impl Into<Location>,
    adapter: impl Into<Location>,
    recipe: Recipe,
    mut options: Options,
) -> Result<Conversion> {
    let (base, adapter) = (base.into(), Adapter::open(adapter)?);
    let opening = quantize::open_device(&base, &recipe, &options)?;
    let mut source = Source::open_with(base, options.follow_links)?;
    let Floats { inputs, warnings, config, manifest } = Floats::of(&mut source)?;
    source.left_out.retain(|left| ![MANIFEST_NAME, SUMS_NAME].contains(&left.name.as_str()));
    let decoded_from = formats(&source, manifest.as_ref(), inputs.iter().any(|input| input.read.is_decoded()));
    let inputs = Plan::unwrapped(&source, inputs);
    let (inputs, of_adapter) = adapter::merge(&source, inputs, &adapter, source.files.len())?;
    add(&mut source, adapter, decoded_from)?;
    // The order of tensors that are converted is that of merging without options.
    let floats = if recipe.quantizes() { Recipe::floats(Recipe::default().max_shard_size) } else { recipe.clone() };
    let mut plan = Plan::decoded(&source, floats, inputs, config)?;
    plan.warnings.extend(warnings.into_iter().chain(of_adapter));
    if recipe.quantizes() {
        plan = quantized(&source, plan, recipe)?;
    }
    options.hash_source = true; // the manifest vouches for both
    Conversion::new(source, plan, opening, options, Origin::Merged { base: manifest.map(Box::new) })
}

/// The formats that the base's weights are decoded from.
fn formats(source: &Source, manifest: Option<&Manifest>, decodes: bool) -> Vec<String> {
    match manifest.and_then(|manifest| manifest.recipe.format()) {
        Some(format) => vec![format.name.to_owned()],
        None if decodes => source_quantization::formats(source).into_iter().map(str::to_owned).collect(),
        None => Vec::new(),
    }
}

/// Puts the adapter's file behind the source's own.
fn add(source: &mut Source, adapter: Adapter, decoded_from: Vec<String>) -> Result<()> {
    let Adapter { location, config_sha256, file, .. } = adapter;
    if let Some(own) = source.files.iter().find(|own| own.name == file.name) {
        let why = "it is a file of the base's weights, and has the name of an adapter's: which one is meant?";
        return Err(Error::Adapter { path: own.location.path().to_owned(), why: why.to_owned() });
    }
    let config = location.join(adapter::ADAPTER_CONFIG_NAME);
    source.adapter = Some(AdapterPart { config, config_sha256, decoded_from });
    source.files.push(file);
    Ok(())
}

/// The plan of converting what `merged` would write, from what that is made of.
fn quantized(source: &Source, merged: Plan, recipe: Recipe) -> Result<Plan> {
    let (written, places) = as_written(source, &merged)?;
    let mut plan = Plan::new(&written, recipe)?;
    let read = |span: Span| {
        let (tensor, offset) = places[&(span.file, span.tensor)];
        merged.tensors[tensor].read.part(span.offset - offset, span.len)
    };
    for tensor in &mut plan.tensors {
        tensor.read = tensor.read.over(&read)?;
    }
    plan.warnings.splice(0..0, merged.warnings);
    plan.from_floats = true;
    Ok(plan)
}

/// The tensor of a plan, and where its bytes begin, by the file and the tensor that it would be.
type Places = HashMap<(usize, usize), (usize, u64)>;

/// The checkpoint that a plan of floats would write, as it would be opened.
fn as_written(source: &Source, plan: &Plan) -> Result<(Source, Places)> {
    let mut places = Places::new();
    let mut files = Vec::new();
    for (number, planned) in plan.files.iter().enumerate() {
        let of_file = &plan.tensors[planned.tensors.clone()];
        let mut tensors = Vec::new();
        for part in Part::all(of_file) {
            let (tensor, output) = (&of_file[part.tensor as usize], part.of(of_file));
            places.insert((number, tensors.len()), (planned.tensors.start + part.tensor as usize, output.offset));
            let (name, dtype, shape) = (tensor.name.clone(), tensor.dtype, tensor.shape.clone());
            tensors.push(TensorInfo { name, dtype, shape, offset: output.offset, len: output.len });
        }
        let identity = Identity { len: planned.len, version: String::new(), sha256: None };
        let (metadata, header_sha256) = (Default::default(), Sha256Hash([0; 32]));
        let (name, location) = (planned.name.clone(), source.location.clone());
        files.push(SourceFile { name, location, identity, header_sha256, metadata, tensors });
    }
    let path = source.location.join(CONFIG_NAME);
    let config = plan.config.as_ref().map(|text| Config::parse(text.clone().into_bytes(), path.path())).transpose()?;
    let mut written = Source::of_files(source.location.clone(), files, config);
    written.metadata = Arc::clone(&source.metadata);
    Ok((written, places))
}
