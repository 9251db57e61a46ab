//! `prequant inspect`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use prequant::Error;
use prequant::checkpoint::{Source, TensorInfo};
use prequant::units::Bytes;
use serde_json::{Value, json};

use super::output::{self, Outcome};

/// Show what is in a checkpoint, converted or not: from headers only.
///
/// Lists every weight with its dtype or 4-bit format, its shape, its size with all its statistics, and bits a weight.
#[derive(Args)]
pub struct Arguments {
    /// A checkpoint's folder, or one .safetensors file
    path: PathBuf,

    /// Print one JSON object
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

/// The suffixes of what bitsandbytes puts beside a weight.
const PARTS: [&str; 4] = [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"];

/// Puts the parts of 4-bit weights together.
fn weights(source: &Source) -> Vec<Weight<'_>> {
    let mut formats: BTreeMap<&str, &str> = BTreeMap::new();
    let mut parts: BTreeMap<&str, u64> = BTreeMap::new();
    for (_, info) in source.tensors() {
        if let Some((name, format)) = info.name.split_once(".quant_state.bitsandbytes__") {
            formats.insert(name, format);
            *parts.entry(name).or_default() += info.len;
        }
    }
    let part_of = |info: &TensorInfo| -> Option<&str> {
        let owner = PARTS.iter().find_map(|part| info.name.strip_suffix(part))?;
        formats.get_key_value(owner).map(|(owner, _)| *owner)
    };
    for (_, info) in source.tensors() {
        if let Some(bytes) = part_of(info).and_then(|owner| parts.get_mut(owner)) {
            *bytes += info.len;
        }
    }
    let is_part = |info: &TensorInfo| part_of(info).is_some() || info.name.contains(".quant_state.bitsandbytes__");
    let weights = source.tensors().filter(|(_, info)| !is_part(info));
    weights
        .map(|(file, info)| {
            let format = formats.get(info.name.as_str());
            let elements: u64 = info.shape.iter().product();
            Weight {
                name: &info.name,
                file: &source.files[file].name,
                format: format.map_or(info.dtype.name().to_owned(), |format| (*format).to_owned()),
                shape: info.shape.clone(),
                // Two codes a byte; whether the last one is a pad, only the quant_state knows.
                elements: if format.is_some() { 2 * elements } else { elements },
                bytes: info.len + parts.get(info.name.as_str()).unwrap_or(&0),
            }
        })
        .collect()
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
            "{:6} {:name_width$}  {shape:shape_width$}  {bytes:>8}  {bits:5.2} bits",
            weight.format, weight.name
        );
    }
    text.push('\n');
    for (format, (count, elements, bytes)) in by_format(weights) {
        let (size, bits) = (Bytes(bytes).to_string(), bits(bytes, elements));
        let _ = writeln!(text, "{format:6} {count} tensors, {elements} weights, {size}, {bits:.2} bits a weight");
    }
    let (elements, bytes) = weights.iter().fold((0, 0), |(e, b), weight| (e + weight.elements, b + weight.bytes));
    let files = source.files.len();
    let _ = writeln!(text, "all    {} in {files} files, {:.2} bits a weight", Bytes(bytes), bits(bytes, elements));
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
        "path": source.path.display().to_string(),
        "model_type": source.config.as_ref().and_then(|config| config.model_types().first().map(|&name| name.to_owned())),
        "files": source.files.iter().map(|file| json!({"name": file.name, "size": file.len})).collect::<Vec<_>>(),
        "formats": formats,
        "tensors": weights.iter().map(weight).collect::<Vec<_>>(),
    })
}
