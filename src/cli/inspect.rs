//! `prequant inspect`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use prequant::Error;
use prequant::checkpoint::Source;
use prequant::converted::{self, FoundWeight};
use prequant::units::Bytes;
use serde_json::{Value, json};

use super::output::{self, Outcome};
use super::words;

/// Show what a checkpoint contains, converted or not.
///
/// Reads headers only. Lists every weight with its dtype or 4-bit format, shape, size including scales, and bits per weight.
#[derive(Args)]
pub struct Arguments {
    /// Checkpoint folder, or a single .safetensors file
    path: PathBuf,

    /// Print a single JSON object
    #[arg(long)]
    json: bool,
}

/// A weight with all tensors that belong to it.
struct Weight<'a> {
    name: &'a str,
    file: &'a str,
    /// Its dtype, or its 4-bit format.
    format: String,
    shape: Vec<u64>,
    /// Elements, where they are known.
    elements: u64,
    bytes: u64,
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> ExitCode {
    let result = Source::open(&arguments.path).map(|source| {
        let weights = weights(&source);
        let output = if arguments.json { format!("{}\n", json(&source, &weights)) } else { text(&source, &weights) };
        Outcome { output, error: None::<Error>, code: 0 }
    });
    output::finish(result, arguments.json)
}

/// Puts the parts of 4-bit weights together.
fn weights(source: &Source) -> Vec<Weight<'_>> {
    let found = converted::weights(source).into_iter();
    let weights = found.map(|FoundWeight { name, file, format, codes, beside }| Weight {
        name,
        file: &source.files[file].name,
        format: format.map_or_else(|| codes.dtype.to_string(), |format| format.name.to_owned()),
        shape: codes.shape.clone(),
        // Two codes a byte; whether the last ones are a pad, only what stands beside them knows.
        elements: if format.is_some() { 2 * codes.len } else { codes.shape.iter().product() },
        bytes: codes.len + beside.iter().map(|info| info.len).sum::<u64>(),
    });
    weights.collect()
}

fn bits(bytes: u64, elements: u64) -> f64 {
    bytes as f64 * 8.0 / elements.max(1) as f64
}

/// Formats with their weights, elements and bytes.
fn by_format<'a>(weights: &'a [Weight<'_>]) -> BTreeMap<&'a str, (usize, u64, u64)> {
    let mut totals: BTreeMap<&str, (usize, u64, u64)> = BTreeMap::new();
    for weight in weights {
        let total = totals.entry(&weight.format).or_default();
        *total = (total.0 + 1, total.1 + weight.elements, total.2 + weight.bytes);
    }
    totals
}

fn text(source: &Source, weights: &[Weight<'_>]) -> String {
    let mut text = String::new();
    let name_width = weights.iter().map(|weight| weight.name.len()).max().unwrap_or(0).min(72);
    let shapes: Vec<String> = weights.iter().map(|weight| format!("{:?}", weight.shape)).collect();
    let shape_width = shapes.iter().map(String::len).max().unwrap_or(0);
    for (weight, shape) in weights.iter().zip(&shapes) {
        let (bytes, bits) = (Bytes(weight.bytes).to_string(), bits(weight.bytes, weight.elements));
        let _ = writeln!(
            text,
            "{:9} {:name_width$}  {shape:shape_width$}  {bytes:>8}  {bits:5.2} bits",
            weight.format, weight.name
        );
    }
    text.push('\n');
    for (format, (count, elements, bytes)) in by_format(weights) {
        let (size, bits) = (Bytes(bytes).to_string(), bits(bytes, elements));
        let _ = writeln!(
            text,
            "{format:9} {}, {elements} weights, {size}, {bits:.2} bits per weight",
            words::count(count, "tensor")
        );
    }
    let (elements, bytes) = weights.iter().fold((0, 0), |(e, b), weight| (e + weight.elements, b + weight.bytes));
    let files = source.files.len();
    let _ = writeln!(
        text,
        "all       {} in {}, {:.2} bits per weight",
        Bytes(bytes),
        words::count(files, "file"),
        bits(bytes, elements)
    );
    text
}

fn json(source: &Source, weights: &[Weight<'_>]) -> Value {
    let weight = |weight: &Weight<'_>| {
        json!({
            "name": weight.name,
            "file": weight.file,
            "format": weight.format,
            "stored_shape": weight.shape,
            "bytes": weight.bytes,
            "bits_per_weight": bits(weight.bytes, weight.elements),
        })
    };
    let formats: Value = by_format(weights)
        .into_iter()
        .map(|(format, (count, weights, bytes))| {
            (format.to_owned(), json!({"tensors": count, "weights": weights, "bytes": bytes}))
        })
        .collect::<serde_json::Map<_, _>>()
        .into();
    json!({
        "path": source.location.path().display().to_string(),
        "model_type": source.config.as_ref().and_then(|config| config.model_types().first().map(|&name| name.to_owned())),
        "files": source.files.iter().map(|file| json!({"name": file.name, "size": file.identity.len})).collect::<Vec<_>>(),
        "formats": formats,
        "tensors": weights.iter().map(weight).collect::<Vec<_>>(),
    })
}
