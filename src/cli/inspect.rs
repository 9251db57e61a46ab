//! `prequant inspect`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use prequant::{Bytes, Contents, Error, StoredWeight, inspect};
use serde_json::{Value, json};

use super::hints;
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

/// Runs the command.
pub fn run(arguments: &Arguments) -> ExitCode {
    let result = inspect(&arguments.path).map(|contents| {
        let output = if arguments.json { format!("{}\n", json(&contents)) } else { text(&contents) };
        Outcome { output, error: None::<Error>, code: 0 }
    });
    output::finish(result, arguments.json)
}

fn bits(bytes: u64, elements: u64) -> f64 {
    bytes as f64 * 8.0 / elements.max(1) as f64
}

/// Formats with their weights, elements and bytes.
fn by_format(weights: &[StoredWeight]) -> BTreeMap<&str, (usize, u64, u64)> {
    let mut totals: BTreeMap<&str, (usize, u64, u64)> = BTreeMap::new();
    for weight in weights {
        let total = totals.entry(&weight.format).or_default();
        *total = (total.0 + 1, total.1 + weight.elements, total.2 + weight.bytes);
    }
    totals
}

fn text(Contents { files, weights, warnings, .. }: &Contents) -> String {
    let mut text = String::new();
    let name_width = weights.iter().map(|weight| weight.name.len()).max().unwrap_or(0).min(72);
    let shapes: Vec<String> = weights.iter().map(|weight| format!("{:?}", weight.stored_shape)).collect();
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
    let _ = writeln!(
        text,
        "all       {} in {}, {:.2} bits per weight",
        Bytes(bytes),
        words::count(files.len(), "file"),
        bits(bytes, elements)
    );
    warnings.iter().for_each(|warning| text += &format!("warning: {}\n", hints::warning(warning)));
    text
}

fn json(Contents { path, model_type, files, weights, warnings }: &Contents) -> Value {
    let weight = |weight: &StoredWeight| {
        json!({
            "name": weight.name,
            "file": weight.file,
            "format": weight.format,
            "stored_shape": weight.stored_shape,
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
        "path": path.display().to_string(),
        "model_type": model_type,
        "files": files.iter().map(|(name, size)| json!({"name": name, "size": size})).collect::<Vec<_>>(),
        "formats": formats,
        "tensors": weights.iter().map(weight).collect::<Vec<_>>(),
        "warnings": warnings.iter().map(hints::warning).collect::<Vec<_>>(),
    })
}
