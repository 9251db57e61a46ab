//! The manifest's own figures: its summary must be what its records add up to.

use std::collections::HashSet;

use crate::checkpoint::MANIFEST_NAME;
use crate::dtype::{self, FloatDtype};
use crate::layout::gpt_oss;
use crate::manifest::{DecisionRecord, SourceTensorRecord, Summary, TensorRecord};
use crate::ops::verify::{Checkpoint, Report};
use crate::stats::Statistics;

/// How far a figure that was rounded in another way may be off, as a part of it.
const ROUNDING: f64 = 1e-9;

/// Files must be listed once, and the summary must be what the records add up to.
pub(super) fn check(checkpoint: &Checkpoint, report: &mut Report) {
    let mut names = HashSet::new();
    for file in checkpoint.manifest.files.iter().filter(|file| !names.insert(file.name.as_str())) {
        report.differ(MANIFEST_NAME, None, format!("it has the file {:?} twice", file.name));
    }
    for what in checkpoint.sums.differences(&checkpoint.manifest.summary) {
        report.differ(MANIFEST_NAME, None, what);
    }
}

/// What the records add up to.
#[derive(Default)]
pub(super) struct Sums {
    quantized: Part,
    kept: Part,
    statistics: Known,
    /// Quantized tensors without statistics.
    without: u64,
    /// What can't be of a record by itself.
    impossible: Vec<String>,
    /// The sources of the last record, and whether it is quantized.
    last: Option<(Vec<SourceTensorRecord>, bool)>,
}

#[derive(Default)]
struct Part {
    tensors: u64,
    bytes: u64,
    elements: Elements,
}

/// A sum that isn't known any more once a part of it isn't.
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
    /// Bytes of all tensors.
    pub(super) fn tensors_len(&self) -> u64 {
        self.quantized.bytes.saturating_add(self.kept.bytes)
    }

    /// Adds the next record.
    pub(super) fn add(&mut self, record: TensorRecord) {
        let is_quantized = record.decision == DecisionRecord::Quantize;
        let part = if is_quantized { &mut self.quantized } else { &mut self.kept };
        part.tensors += 1;
        part.bytes = part.bytes.saturating_add(bytes(&record));
        // What one tensor of the source was taken apart into stands together, and is quantized or kept together.
        let is_next = self.last.as_ref().is_none_or(|(sources, _)| *sources != record.sources);
        if !is_quantized {
            part.elements.add(record.outputs.first().and_then(|output| dtype::elements(&output.shape)));
        } else if is_next {
            part.elements.add(elements_of_sources(&record.sources));
        }
        if !is_next && self.last.as_ref().is_some_and(|(_, last)| *last != is_quantized) {
            self.quantized.elements = Elements(None);
        }
        match &record.statistics {
            Some(statistics) => {
                let name = record.outputs.first().map_or("", |output| &output.name);
                let mut wrong = impossible(statistics);
                wrong.extend((!is_quantized).then(|| "the tensor isn't quantized".to_owned()));
                self.impossible.extend(wrong.iter().map(|what| format!("statistics of {name:?}: {what}")));
                self.statistics.add(statistics);
            }
            None => self.without += u64::from(is_quantized),
        }
        self.last = Some((record.sources, is_quantized));
    }

    /// What the summary says otherwise, and what can't be of records by themselves.
    fn differences(&self, summary: &Summary) -> Vec<String> {
        let (quantized, kept) = (&self.quantized, &self.kept);
        let mut wrong = self.impossible.clone();
        let mut exact = |what: &str, found: u64, expected: Option<u64>| {
            if let Some(expected) = expected.filter(|expected| *expected != found) {
                wrong.push(format!("summary's {what} is {found}, and its tensors give {expected}"));
            }
        };
        exact("quantized_tensors", summary.quantized_tensors, Some(quantized.tensors));
        exact("kept_tensors", summary.kept_tensors, Some(kept.tensors));
        exact("quantized_elements", summary.quantized_elements, quantized.elements.0);
        exact("kept_elements", summary.kept_elements, kept.elements.0);
        let bits = |bytes: u64, elements: u64| bytes as f64 * 8.0 / (elements as f64).max(1.0);
        let of_quantized = bits(quantized.bytes, summary.quantized_elements);
        let elements = summary.quantized_elements.saturating_add(summary.kept_elements);
        let of_all = bits(quantized.bytes.saturating_add(kept.bytes), elements);
        for (what, found, expected) in [
            ("bits_per_quantized_weight", summary.bits_per_quantized_weight, of_quantized),
            ("bits_per_weight", summary.bits_per_weight, of_all),
        ] {
            if !is_near(found, expected) {
                wrong.push(format!("summary's {what} is {found}, and its tensors give {expected}"));
            }
        }
        let found = &summary.statistics;
        let statistics = impossible(found).into_iter().chain(self.statistics.differences(found, self.without == 0));
        wrong.extend(statistics.map(|what| format!("summary's statistics: {what}")));
        wrong
    }
}

/// What is known of the statistics of all tensors together from those of each: sums, extremes, and bounds of what was rounded.
struct Known {
    tensors: u64,
    blocks: u64,
    zero_blocks: u64,
    nonfinite_blocks: u64,
    absmax_min: f32,
    absmax_max: f32,
    worst: f64,
    /// A ratio of sums lies between those that they are of.
    error: Bounds,
    mean: Bounds,
    with_double_quantization: u64,
}

struct Bounds {
    least: f64,
    most: f64,
}

impl Default for Bounds {
    fn default() -> Bounds {
        Bounds { least: f64::INFINITY, most: f64::NEG_INFINITY }
    }
}

impl Bounds {
    fn add(&mut self, figure: f64) {
        self.least = self.least.min(figure);
        self.most = self.most.max(figure);
    }

    fn hold(&self, figure: f64) -> bool {
        let slack = |bound: f64| bound.abs() * ROUNDING;
        self.least - slack(self.least) <= figure && figure <= self.most + slack(self.most)
    }
}

impl Default for Known {
    fn default() -> Known {
        let (tensors, blocks, zero_blocks, nonfinite_blocks, with_double_quantization) = Default::default();
        let (error, mean) = Default::default();
        let (absmax_min, absmax_max, worst) = (f32::MAX, 0.0, 0.0);
        Known {
            tensors,
            blocks,
            zero_blocks,
            nonfinite_blocks,
            absmax_min,
            absmax_max,
            worst,
            error,
            mean,
            with_double_quantization,
        }
    }
}

impl Known {
    fn add(&mut self, one: &Statistics) {
        self.tensors += 1;
        self.blocks = self.blocks.saturating_add(one.blocks);
        self.zero_blocks = self.zero_blocks.saturating_add(one.zero_blocks);
        self.nonfinite_blocks = self.nonfinite_blocks.saturating_add(one.nonfinite_blocks);
        self.absmax_min = self.absmax_min.min(one.absmax.min);
        self.absmax_max = self.absmax_max.max(one.absmax.max);
        self.worst = self.worst.max(one.max_absolute_error);
        self.error.add(one.relative_squared_error);
        self.mean.add(one.absmax.mean);
        self.with_double_quantization += u64::from(one.double_quantization.is_some());
    }

    /// What statistics of all tensors together say otherwise. Unless those of all tensors are known, what is known is the least
    /// there can be.
    fn differences(&self, found: &Statistics, are_all: bool) -> Vec<String> {
        let mut wrong = Vec::new();
        for (what, found, expected) in [
            ("blocks", found.blocks, self.blocks),
            ("zero_blocks", found.zero_blocks, self.zero_blocks),
            ("nonfinite_blocks", found.nonfinite_blocks, self.nonfinite_blocks),
        ] {
            if found < expected || are_all && found != expected {
                wrong.push(format!("{what} is {found}, and its tensors have {expected}"));
            }
        }
        let extremes = [
            ("absmax's min", -f64::from(found.absmax.min), -f64::from(self.absmax_min)),
            ("absmax's max", f64::from(found.absmax.max), f64::from(self.absmax_max)),
            ("max_absolute_error", found.max_absolute_error, self.worst),
        ];
        for (what, found, expected) in extremes {
            let expected = if are_all && self.tensors == 0 { 0.0 } else { expected };
            if found < expected || are_all && found != expected {
                wrong.push(format!("{what} is {}, and its tensors have {}", found.abs(), expected.abs()));
            }
        }
        if !are_all || self.tensors == 0 {
            return wrong;
        }
        for (what, found, bounds) in [
            ("relative_squared_error", found.relative_squared_error, &self.error),
            ("absmax's mean", found.absmax.mean, &self.mean),
        ] {
            if !bounds.hold(found) {
                wrong.push(format!("{what} is {found}, and its tensors have {} to {}", bounds.least, bounds.most));
            }
        }
        let expected = if found.double_quantization.is_some() { self.tensors } else { 0 };
        if self.with_double_quantization != expected {
            let tensors = self.with_double_quantization;
            wrong
                .push(format!("{tensors} of {} tensors have a double_quantization, expected {expected}", self.tensors));
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
        let error = relative_squared_error;
        wrong.push(format!("snr_db is {snr_db:?}, and a relative_squared_error of {error} gives {snr:?}"));
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

/// Whether a tensor of the source has gpt-oss's codes.
pub(super) fn is_gpt_oss(source: &SourceTensorRecord) -> bool {
    source.name.ends_with(gpt_oss::BLOCKS)
}

/// Elements of the weight that these tensors of the source are; none if their shapes don't tell.
pub(super) fn elements_of_sources(sources: &[SourceTensorRecord]) -> Option<u64> {
    let of = |source: &SourceTensorRecord| dtype::elements(&source.shape);
    if sources.iter().any(is_gpt_oss) {
        // Two codes are a byte; scales are no part of the shape.
        let mut codes = sources.iter().filter(|source| is_gpt_oss(source));
        return codes.try_fold(0u64, |sum, source| sum.checked_add(of(source)?.checked_mul(2)?));
    }
    let is_float = |source: &SourceTensorRecord| dtype::named(&source.dtype).and_then(FloatDtype::of).is_some();
    let is_coded = |source: &SourceTensorRecord| source.dtype == "F8_E4M3";
    let is_scale = |source: &SourceTensorRecord| is_float(source) || source.dtype == "F8_E8M0";
    let mut weights: Box<dyn Iterator<Item = &SourceTensorRecord>> = match sources.iter().any(is_coded) {
        // Whatever else is coded has codes of other sizes.
        true if sources.iter().all(|source| is_coded(source) || is_scale(source)) => {
            Box::new(sources.iter().filter(|source| is_coded(source)))
        }
        false if sources.iter().all(is_float) => Box::new(sources.iter()),
        _ => return None,
    };
    weights.try_fold(0u64, |sum, source| sum.checked_add(of(source)?))
}
