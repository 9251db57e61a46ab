//! The last lines of a conversion.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use prequant::{Bytes, Conversion, GroupSize, Layout, ManifestHead, Recipe, Statistics, Weights};
use serde_json::{Value, json};

use super::output::{Audience, Outcome};
use super::words::{count, rate};
use super::{hints, left_out};

/// Lines about what was left out that are printed.
const LEFT_OUT_SHOWN: usize = 20;

/// A conversion that has come to its end.
pub struct Done<'a> {
    pub conversion: &'a Conversion,
    pub destination: &'a Path,
    pub manifest: &'a ManifestHead,
}

impl Done<'_> {
    /// What was done, and how long it took.
    pub fn report(&self, elapsed: Duration, audience: Audience) -> Outcome {
        let output = match audience {
            Audience::People => self.text(elapsed),
            Audience::Machines => format!("{}\n", self.json(elapsed)),
            Audience::Nobody => String::new(),
        };
        Outcome { output, error: None, code: 0 }
    }

    /// That there was nothing to do.
    pub fn already(&self, weights_compared: bool, audience: Audience) -> Outcome {
        let compared = if weights_compared { "" } else { "weights' content not compared; " };
        let output = match audience {
            Audience::People => format!(
                "{}: already converted from this source with these options; nothing to do ({compared}`prequant verify` \
                 checks it)\n",
                self.destination.display()
            ),
            Audience::Machines => format!("{}\n", self.json(Duration::ZERO)),
            Audience::Nobody => String::new(),
        };
        Outcome { output, error: None, code: 0 }
    }

    fn text(&self, elapsed: Duration) -> String {
        let Done { conversion, destination, manifest, .. } = self;
        let summary = &manifest.summary;
        let read = conversion.plan.source_len();
        let carried = conversion.decisions().tensors.iter().filter(|tensor| tensor.is_carried()).count();
        let carried = if carried == 0 { String::new() } else { format!(" ({carried} carried over from the source)") };
        let written = format!("{} in {}", Bytes(self.written()), count(manifest.files.len() + 2, "file"));
        let merged = conversion.plan.tensors.iter().filter(|tensor| tensor.is_adapted()).count();
        let merged = if merged == 0 { String::new() } else { format!(", {merged} merged") };
        let kept = summary.kept_tensors;
        let mut lines = match manifest.recipe.quantizes() {
            false => vec![format!("{}: {}{merged}; {written}", destination.display(), count(kept, "tensor"))],
            true => vec![
                format!(
                    "{}: {} in {}{carried}, {kept} kept{merged}; {written}",
                    destination.display(),
                    count(summary.quantized_tensors, "tensor"),
                    format_name(&manifest.recipe),
                ),
                format!(
                    "{:.2} bits per quantized weight, {:.2} per weight overall; {}",
                    summary.bits_per_quantized_weight,
                    summary.bits_per_weight,
                    errors(&summary.statistics)
                ),
            ],
        };
        lines.push(format!(
            "{} in {:.2} s, hashes included{}",
            Bytes(read),
            elapsed.as_secs_f64(),
            rate(read, elapsed.as_secs_f64())
        ));
        let left_out = left_out::lines(&manifest.left_out, LEFT_OUT_SHOWN);
        [&lines[..], &left_out].concat().join("\n") + "\n"
    }

    fn json(&self, elapsed: Duration) -> Value {
        let Done { conversion, destination, manifest, .. } = self;
        let (read, seconds) = (conversion.plan.source_len(), elapsed.as_secs_f64());
        json!({
            "destination": destination.display().to_string(),
            "device": conversion.device.backend.name(),
            "device_reason": conversion.device.why,
            "recipe": manifest.recipe,
            "files": manifest.files,
            "summary": manifest.summary,
            "left_out": manifest.left_out,
            "warnings": conversion.plan.warnings.iter().map(hints::warning).chain(self.warnings()).collect::<Vec<_>>(),
            "bytes_read": read,
            "bytes_written": self.written(),
            "seconds": seconds,
            "bytes_per_second": if seconds > 0.0 { read as f64 / seconds } else { 0.0 },
        })
    }

    /// What is known at the end only, or is worth reading last: matrices without a number in them, and how much isn't quantized.
    pub fn warnings(&self) -> Vec<String> {
        // Read again only where some block is: what was just written is in the cache.
        let suspicious = self.manifest.summary.statistics.zero_blocks > 0;
        let location = self.destination.join("prequant.json");
        let zeros = match suspicious.then(|| ManifestHead::matrices_of_zeros(&location.as_path().into())).transpose() {
            Ok(zeros) => zeros.and_then(|(count, first)| Some((count, first?))),
            Err(error) => return vec![format!("whether matrices are all zeros can't be told: {error}")],
        };
        let zeros = zeros.map(|(count, first)| {
            let what = match count {
                1 => format!("{:?} is all zeros", first.name),
                many => format!("{many} matrices are all zeros, {:?} in {:?} first", first.name, first.file),
            };
            format!("{what}: an interrupted download leaves such; compare the source's checksums with the hub's")
        });
        let share = self.conversion.decisions().left_in_16_bits().as_ref().map(hints::warning);
        zeros.into_iter().chain(share).collect()
    }

    /// Bytes of all files but the manifest and SHA256SUMS.
    fn written(&self) -> u64 {
        self.manifest.files.iter().map(|file| file.size).sum()
    }
}

/// The format and its options, in a few words.
pub fn format_name(recipe: &Recipe) -> String {
    let mut name = recipe.format().map_or("floats", |format| format.name).to_owned();
    match recipe.weights {
        Weights::Blocks { block_size, double_quant, .. } => {
            name += &format!(" (block {block_size}");
            name += if double_quant { ", double quantization" } else { "" };
        }
        Weights::Groups { group_size, layout, .. } => {
            name += &match group_size {
                GroupSize::Channel => " (one scale per row".to_owned(),
                size => format!(" (group {size}"),
            };
            if layout != Layout::CompressedTensors {
                name += &format!(", {}'s layout", layout.name());
            }
        }
        Weights::Floats => return name,
    }
    name + ")"
}

fn errors(statistics: &Statistics) -> String {
    let mut text = format!("relative squared error {:.5}", statistics.relative_squared_error);
    if let Some(snr) = statistics.snr_db {
        let _ = write!(text, " (SNR {snr:.2} dB)");
    }
    if statistics.nonfinite_blocks > 0 {
        let _ = write!(text, ", {} blocks with NaN or infinities not counted", statistics.nonfinite_blocks);
    }
    let _ = write!(text, ", largest error {:.3e}", statistics.max_absolute_error);
    if let Some(absmax) = &statistics.double_quantization {
        let _ = write!(text, "; of absmax {:.2e}", absmax.relative_squared_error);
    }
    text
}
