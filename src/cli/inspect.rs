//! `prequant inspect`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use prequant::{Bytes, Contents, Error, Stored, StoredWeight, inspect};
use serde_json::{Value, json};

use super::output::{self, Outcome};
use super::{escape, hints, left_out, words};

/// Show what a folder or a file is, and what a checkpoint contains, converted or not.
///
/// Reads headers only. Lists every weight with its dtype or 4-bit format, shape, size including scales, and bits per weight;
/// says which share of the bytes has which dtype, how many parameters the hub's pages show, and what `prequant convert` would
/// warn of or refuse.
#[derive(Args)]
pub struct Arguments {
    /// Folder or file
    path: PathBuf,

    /// Print a single JSON object
    #[arg(long)]
    json: bool,
}

/// Lines about what would be left out that are printed.
const LEFT_OUT_SHOWN: usize = 20;

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

fn text(contents: &Contents) -> String {
    let Contents { path, what, files, weights, .. } = contents;
    let mut text = format!("{}: {}\n", path.display(), escape::line(what));
    if !weights.is_empty() {
        text += &list(weights);
        text += &totals(files.len(), weights);
        text += &dtypes(contents);
    }
    for line in left_out::lines(&contents.left_out, LEFT_OUT_SHOWN) {
        let _ = writeln!(text, "{line}");
    }
    for warning in &contents.warnings {
        let _ = writeln!(text, "warning: {}", hints::shown_warning(warning));
    }
    if let Some(obstacle) = &contents.obstacle {
        let _ = writeln!(text, "convert refuses it: {}", hints::shown_error(obstacle));
    }
    text
}

/// A line for every weight.
fn list(weights: &[StoredWeight]) -> String {
    let mut text = String::from("\n");
    let name_width = weights.iter().map(|weight| weight.name.len()).max().unwrap_or(0).min(72);
    let shapes: Vec<String> = weights.iter().map(|weight| format!("{:?}", weight.stored_shape)).collect();
    let shape_width = shapes.iter().map(String::len).max().unwrap_or(0);
    for (weight, shape) in weights.iter().zip(&shapes) {
        let (bytes, bits) = (Bytes(weight.bytes).to_string(), bits(weight.bytes, weight.elements));
        let _ = writeln!(
            text,
            "{:9} {:name_width$}  {shape:shape_width$}  {bytes:>8}  {bits:5.2} bits",
            weight.format,
            escape::line(&weight.name)
        );
    }
    text + "\n"
}

/// A line for every format, and one for all.
fn totals(files: usize, weights: &[StoredWeight]) -> String {
    let mut text = String::new();
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
        words::count(files, "file"),
        bits(bytes, elements)
    );
    text
}

/// What is stored in which dtype, and how many parameters the hub's pages show.
fn dtypes(contents: &Contents) -> String {
    let all: u64 = contents.dtypes.values().map(|stored| stored.bytes).sum();
    let share = |bytes: u64| 100.0 * bytes as f64 / all.max(1) as f64;
    let stored = contents.dtypes.iter().map(|(dtype, stored)| format!("{:.1} % {dtype}", share(stored.bytes)));
    let counted = contents.parameters.iter().map(|(dtype, parameters)| format!("{parameters} {dtype}"));
    let mut text = format!("stored    {}\n", stored.collect::<Vec<_>>().join(", "));
    let total: u64 = contents.parameters.values().sum();
    let _ = writeln!(
        text,
        "hub       {total} parameters as its pages count them ({})",
        counted.collect::<Vec<_>>().join(", ")
    );
    let layout = contents.layout.as_ref().map(|layout| format!(", in the layout of {}", escape::line(layout)));
    if let Some(method) = &contents.method {
        let _ = writeln!(text, "quantized {}{}", escape::line(method), layout.unwrap_or_default());
    }
    text
}

fn json(contents: &Contents) -> Value {
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
    let formats: Value = by_format(&contents.weights)
        .into_iter()
        .map(|(format, (count, weights, bytes))| {
            (format.to_owned(), json!({"tensors": count, "weights": weights, "bytes": bytes}))
        })
        .collect::<serde_json::Map<_, _>>()
        .into();
    let all: u64 = contents.dtypes.values().map(|stored| stored.bytes).sum();
    let dtype = |Stored { tensors, bytes }: &Stored| json!({"tensors": tensors, "bytes": bytes, "share": *bytes as f64 / all.max(1) as f64});
    let dtypes = contents.dtypes.iter().map(|(name, stored)| (name.clone(), dtype(stored)));
    json!({
        "path": contents.path.display().to_string(),
        "what": contents.what,
        "model_type": contents.model_type,
        "quantized": contents.method,
        "layout": contents.layout,
        "files": contents.files.iter().map(|(name, size)| json!({"name": name, "size": size})).collect::<Vec<_>>(),
        "formats": formats,
        "dtypes": dtypes.collect::<serde_json::Map<_, _>>(),
        "hub_parameters": {"total": contents.parameters.values().sum::<u64>(), "by_dtype": contents.parameters},
        "left_out": contents.left_out,
        "warnings": contents.warnings.iter().map(hints::warning).collect::<Vec<_>>(),
        "obstacle": contents.obstacle.as_ref().map(|error| output::error_json(error)["error"].clone()),
        "tensors": contents.weights.iter().map(weight).collect::<Vec<_>>(),
    })
}
