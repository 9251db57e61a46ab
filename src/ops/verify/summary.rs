//! The manifest's own figures: its summary must be what its records add up to.

use std::collections::HashSet;

use crate::checkpoint::MANIFEST_NAME;
use crate::dtype::{self, FloatDtype};
use crate::layout::gpt_oss;
use crate::manifest::{DecisionRecord, Manifest, SourceTensorRecord, Summary, TensorRecord};
use crate::ops::verify::Report;
use crate::stats::Statistics;

/// How far a figure that was rounded in another way may be off, as a part of it.
const ROUNDING: f64 = 1e-9;

/// Records must be of different files and tensors, the summary what they add up to, and statistics possible.
pub(super) fn check(manifest: &Manifest, report: &mut Report) {
    let mut names = HashSet::new();
    for file in manifest.files.iter().filter(|file| !names.insert(file.name.as_str())) {
        report.differ(MANIFEST_NAME, None, format!("it has the file {:?} twice", file.name));
    }
    let mut names = HashSet::new();
    let outputs = manifest.tensors.iter().flat_map(|record| &record.outputs);
    for output in outputs.filter(|output| !names.insert(output.name.as_str())) {
        report.differ(MANIFEST_NAME, Some(&output.name), "it has the tensor twice");
    }
    let mut sums = Sums::default();
    // What one tensor of the source was taken apart into stands together.
    for records in manifest.tensors.chunk_by(|a, b| a.sources == b.sources) {
        sums.add(records);
    }
    let mut wrong = sums.differences(&manifest.summary);
    wrong.extend(sums.impossible);
    for what in wrong {
        report.differ(MANIFEST_NAME, None, what);
    }
}

/// What the records add up to.
#[derive(Default)]
struct Sums {
    quantized: Part,
    kept: Part,
    /// Statistics of quantized tensors, and how many have none.
    statistics: Vec<Statistics>,
    without: u64,
    /// What can't be of records by themselves.
    impossible: Vec<String>,
}

#[derive(Default)]
struct Part {
    tensors: u64,
    bytes: u64,
    /// None once one isn't known without reading it.
    elements: Elements,
}

struct Elements(Option<u64>);

impl Default for Elements {
    fn default() -> Elements {
        Elements(Some(0))
    }
}

impl Elements {
    fn add(&mut self, more: Option<u64>) {
        self.0 = self.0.zip(more).and_then(|(sum, more)| sum.checked_add(more));
    }
}

impl Sums {
    /// Adds the records of one tensor of the source.
    fn add(&mut self, records: &[TensorRecord]) {
        let is_quantized = |record: &TensorRecord| record.decision == DecisionRecord::Quantize;
        for record in records {
            let part = if is_quantized(record) { &mut self.quantized } else { &mut self.kept };
            part.tensors += 1;
            part.bytes = part.bytes.saturating_add(bytes(record));
            if !is_quantized(record) {
                part.elements.add(record.outputs.first().and_then(|output| dtype::elements(&output.shape)));
            }
            match &record.statistics {
                Some(statistics) if is_quantized(record) => {
                    let name = record.outputs.first().map_or("", |output| &output.name);
                    let wrong = impossible(statistics).into_iter();
                    self.impossible.extend(wrong.map(|what| format!("statistics of {name:?}: {what}")));
                    self.statistics.push(statistics.clone());
                }
                Some(_) => self.impossible.push("it has statistics of a tensor that isn't quantized".to_owned()),
                None => self.without += u64::from(is_quantized(record)),
            }
        }
        if records.iter().any(is_quantized) {
            let all = records.iter().all(is_quantized);
            self.quantized.elements.add(elements_of_sources(&records[0].sources).filter(|_| all));
        }
    }

    /// What the summary says otherwise.
    fn differences(&self, summary: &Summary) -> Vec<String> {
        let (quantized, kept) = (&self.quantized, &self.kept);
        let mut wrong = Vec::new();
        let mut exact = |what: &str, found: u64, expected: Option<u64>| {
            if let Some(expected) = expected.filter(|expected| *expected != found) {
                wrong.push(format!("summary's {what} is {found}, and its tensors give {expected}"));
            }
        };
        exact("quantized_tensors", summary.quantized_tensors, Some(quantized.tensors));
        exact("kept_tensors", summary.kept_tensors, Some(kept.tensors));
        exact("quantized_elements", summary.quantized_elements, quantized.elements.0);
        exact("kept_elements", summary.kept_elements, kept.elements.0);
        let all = summary.quantized_elements.saturating_add(summary.kept_elements);
        for (what, found, bytes, elements) in [
            (
                "bits_per_quantized_weight",
                summary.bits_per_quantized_weight,
                quantized.bytes,
                summary.quantized_elements,
            ),
            ("bits_per_weight", summary.bits_per_weight, quantized.bytes.saturating_add(kept.bytes), all),
        ] {
            let expected = bytes as f64 * 8.0 / (elements as f64).max(1.0);
            if !is_near(found, expected) {
                wrong.push(format!("summary's {what} is {found}, and its tensors give {expected}"));
            }
        }
        let found = &summary.statistics;
        let statistics = impossible(found).into_iter().chain(self.unlike(found));
        wrong.extend(statistics.map(|what| format!("summary's statistics: {what}")));
        wrong
    }

    /// What statistics of all tensors together say otherwise than those of each. Ratios of sums lie between those that they are
    /// of; where tensors have none, all together are no less than what is known.
    fn unlike(&self, found: &Statistics) -> Vec<String> {
        let all = &self.statistics;
        let (is_known, mut wrong) = (self.without == 0, Vec::new());
        let sum = |of: fn(&Statistics) -> u64| all.iter().fold(0u64, |sum, one| sum.saturating_add(of(one)));
        for (what, found, expected) in [
            ("blocks", found.blocks, sum(|one| one.blocks)),
            ("zero_blocks", found.zero_blocks, sum(|one| one.zero_blocks)),
            ("nonfinite_blocks", found.nonfinite_blocks, sum(|one| one.nonfinite_blocks)),
        ] {
            if found < expected || is_known && found != expected {
                wrong.push(format!("{what} is {found}, and its tensors have {expected}"));
            }
        }
        let least = |of: fn(&Statistics) -> f64| all.iter().map(of).fold(f64::INFINITY, f64::min);
        let most = |of: fn(&Statistics) -> f64| all.iter().map(of).fold(f64::NEG_INFINITY, f64::max);
        if all.is_empty() {
            return wrong;
        }
        let mut bound = |what: &str, found: f64, least: f64, most: f64| {
            let (least, most) = if is_known { (least, most) } else { (f64::NEG_INFINITY, f64::INFINITY) };
            if !(least - least.abs() * ROUNDING <= found && found <= most + most.abs() * ROUNDING) {
                wrong.push(format!("{what} is {found}, and its tensors have {least} to {most}"));
            }
        };
        type Of = fn(&Statistics) -> f64;
        let (error, mean): (Of, Of) = (|one| one.relative_squared_error, |one| one.absmax.mean);
        bound("relative_squared_error", found.relative_squared_error, least(error), most(error));
        bound("absmax's mean", found.absmax.mean, least(mean), most(mean));
        let smallest = least(|one| f64::from(one.absmax.min));
        bound("absmax's min", f64::from(found.absmax.min), smallest, smallest);
        let largest = most(|one| f64::from(one.absmax.max));
        bound("absmax's max", f64::from(found.absmax.max), largest, largest);
        let worst = most(|one| one.max_absolute_error);
        bound("max_absolute_error", found.max_absolute_error, worst, worst);
        if found.double_quantization.is_some() != all[0].double_quantization.is_some() {
            wrong
                .push("double_quantization is there for all tensors together or for each, and not for both".to_owned());
        }
        wrong
    }
}

/// What can't be of statistics by themselves.
fn impossible(statistics: &Statistics) -> Vec<String> {
    let Statistics { blocks, zero_blocks, nonfinite_blocks, relative_squared_error, snr_db, .. } = statistics;
    let mut wrong = Vec::new();
    if zero_blocks.saturating_add(*nonfinite_blocks) > *blocks {
        wrong.push(format!("{zero_blocks} blocks of zeros and {nonfinite_blocks} with NaN or infinities of {blocks}"));
    }
    let snr = (*relative_squared_error > 0.0).then(|| -10.0 * libm::log10(*relative_squared_error));
    let is_same = match (snr_db, snr) {
        (Some(found), Some(expected)) => is_near(*found, expected),
        (found, expected) => found.is_none() && expected.is_none(),
    };
    if !is_same {
        wrong.push(format!(
            "snr_db is {snr_db:?}, and a relative_squared_error of {relative_squared_error} gives {snr:?}"
        ));
    }
    wrong
}

fn is_near(found: f64, expected: f64) -> bool {
    (found - expected).abs() <= expected.abs() * ROUNDING
}

/// Bytes of what was written for it.
fn bytes(record: &TensorRecord) -> u64 {
    let len = |dtype: &str, shape: &[u64]| dtype::byte_len(dtype::named(dtype)?, shape);
    let outputs = record.outputs.iter().map(|output| len(&output.dtype, &output.shape).unwrap_or(0));
    outputs.fold(0, u64::saturating_add)
}

/// Elements of the weight that these tensors of the source are; none if their shapes don't tell.
pub(super) fn elements_of_sources(sources: &[SourceTensorRecord]) -> Option<u64> {
    let is_coded = |source: &&SourceTensorRecord| source.dtype == "F8_E4M3" || source.name.ends_with(gpt_oss::BLOCKS);
    let is_float = |source: &SourceTensorRecord| dtype::named(&source.dtype).and_then(FloatDtype::of).is_some();
    if sources.iter().any(|source| is_coded(&source)) {
        // Two of gpt-oss's codes are a byte; scales are no part of the shape.
        let elements = sources.iter().filter(is_coded).map(|source| {
            let codes = if source.dtype == "F8_E4M3" { 1 } else { 2 };
            dtype::elements(&source.shape)?.checked_mul(codes)
        });
        return elements.into_iter().try_fold(0u64, |sum, elements| sum.checked_add(elements?));
    }
    let all = sources.iter().try_fold(0u64, |sum, source| sum.checked_add(dtype::elements(&source.shape)?));
    all.filter(|_| sources.iter().all(is_float))
}
