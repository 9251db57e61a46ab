//! The last lines of a conversion.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use prequant::convert::Conversion;
use prequant::manifest::Manifest;
use prequant::plan::Recipe;
use prequant::stats::Statistics;
use prequant::units::Bytes;
use serde_json::json;

use super::convert::Report;

/// What was done, for people and for machines.
pub fn report(conversion: &Conversion, destination: &Path, manifest: &Manifest, elapsed: Duration) -> Report {
    let read = conversion.plan.source_len();
    let written: u64 = manifest.files.iter().map(|file| file.size).sum();
    let seconds = elapsed.as_secs_f64();
    let rate = read as f64 / seconds.max(1e-9);
    let summary = &manifest.summary;
    let text = [
        format!(
            "{}: {} tensors in {}, {} kept; {} in {} files",
            destination.display(),
            summary.quantized_tensors,
            format_name(&manifest.recipe),
            summary.kept_tensors,
            Bytes(written),
            manifest.files.len() + 2,
        ),
        format!(
            "{:.2} bits a weight ({:.2} over all tensors); {}",
            summary.bits_per_quantized_weight,
            summary.bits_per_weight,
            errors(&summary.statistics)
        ),
        format!("{} in {seconds:.2} s: {:.2} GB/s, hashes included", Bytes(read), rate / 1e9),
    ];
    let json = json!({
        "destination": destination.display().to_string(),
        "recipe": manifest.recipe,
        "files": manifest.files,
        "summary": summary,
        "warnings": conversion.plan.warnings,
        "bytes_read": read,
        "bytes_written": written,
        "seconds": seconds,
        "bytes_per_second": rate,
    });
    Report { text: text.join("\n") + "\n", json }
}

/// The format and its options, in a few words.
pub fn format_name(recipe: &Recipe) -> String {
    let mut name = format!("{} (block {}", recipe.format.name(), recipe.block_size);
    if recipe.double_quant {
        name += ", double quantization";
    }
    name + ")"
}

fn errors(statistics: &Statistics) -> String {
    let mut text = format!("relative squared error {:.5}", statistics.relative_squared_error);
    if let Some(snr) = statistics.snr_db {
        let _ = write!(text, " (SNR {snr:.2} dB)");
    }
    let _ = write!(text, ", largest error {:.3e}", statistics.max_absolute_error);
    if let Some(absmax) = &statistics.double_quantization {
        let _ = write!(text, "; of absmax {:.2e}", absmax.relative_squared_error);
    }
    text
}
