//! What quantizing cost: error statistics of a tensor, gathered block by block.
//!
//! Results are bit-identical across kernels, devices, chunk sizes and thread counts. Blocks are taken in groups of
//! [`GROUP`]; each group's figures are added in f64, in order, and the groups' sums exactly. A device may have added up each group's
//! figures itself, in the same order.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

mod exact_sum;

pub(crate) use crate::kernel::SUMMED as GROUP;
use crate::kernel::{BlockErrors, ErrorSums, Figures};
use exact_sum::ExactSum;

/// Groups that are added side by side. NVFP4 has as many blocks as 16 weights, and their statistics are to cost little.
const GROUPS: usize = 8;

/// A quantized tensor's statistics. Errors compare the source with codes times the absmax or scale they were
/// chosen with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Statistics {
    /// Quantization blocks, or groups.
    pub blocks: u64,
    /// Blocks without any element other than zero.
    pub zero_blocks: u64,
    /// Blocks with a NaN or an infinity; no other figure counts them.
    pub nonfinite_blocks: u64,
    /// Of the blocks' absmax; of groups, the scales that decoding multiplies by.
    pub absmax: Range,
    /// Sum of squared errors over sum of squares: 0 is exact, 1 as bad as zeroing everything.
    pub relative_squared_error: f64,
    /// Signal-to-noise ratio, -10·log10 of the relative squared error, in decibels; null if there is no error.
    pub snr_db: Option<f64>,
    /// The largest |element − decoded element|.
    pub max_absolute_error: f64,
    /// What quantizing absmax itself cost, with double quantization.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub double_quantization: Option<AbsmaxError>,
}

/// Least, mean and greatest.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Range {
    /// The least.
    pub min: f32,
    /// The sum, exact, over the count; rounded to f64.
    pub mean: f64,
    /// The greatest.
    pub max: f32,
}

/// How far restored absmax are from the true ones.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AbsmaxError {
    /// Sum of squared differences over sum of squares.
    pub relative_squared_error: f64,
    /// The largest |absmax − restored absmax|.
    pub max_absolute_error: f64,
}

/// Statistics in the making.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StatsAccumulator {
    signal: ExactSum,
    noise: ExactSum,
    absmax: ExactSum,
    absmax_min: f32,
    absmax_max: f32,
    worst: f64,
    blocks: u64,
    zero_blocks: u64,
    nonfinite_blocks: u64,
}

impl Default for StatsAccumulator {
    fn default() -> Self {
        StatsAccumulator {
            signal: ExactSum::default(),
            noise: ExactSum::default(),
            absmax: ExactSum::default(),
            absmax_min: f32::MAX,
            absmax_max: 0.0,
            worst: 0.0,
            blocks: 0,
            zero_blocks: 0,
            nonfinite_blocks: 0,
        }
    }
}

/// The figures of at most [`GROUP`] blocks, added in order; those whose absmax isn't finite count nowhere.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GroupErrors {
    /// Sum of absmax² · signal.
    pub signal: f64,
    /// Sum of absmax² · noise.
    pub noise: f64,
    /// The largest absmax · worst.
    pub worst: f64,
    /// Blocks with a signal of 0.
    pub zeros: u8,
}

impl GroupErrors {
    /// Of these figures: absmax, signal, noise and worst.
    pub fn of([absmax, signal, noise, worst]: [&[f32]; 4]) -> GroupErrors {
        let mut sums = GroupErrors::default();
        for i in (0..absmax.len()).filter(|&i| absmax[i].is_finite()) {
            // Products of two f32 are exact in f64.
            let scale = f64::from(absmax[i]);
            sums.signal += scale * scale * f64::from(signal[i]);
            sums.noise += scale * scale * f64::from(noise[i]);
            sums.worst = sums.worst.max(scale * f64::from(worst[i]));
            sums.zeros += u8::from(signal[i] == 0.0);
        }
        sums
    }
}

impl StatsAccumulator {
    /// Adds a run of blocks that starts at a multiple of [`GROUP`] blocks.
    pub fn add(&mut self, figures: &Figures<'_>) {
        match figures {
            Figures::Blocks(errors) => self.add_blocks(errors),
            Figures::Sums { absmax, errors } => self.add_summed(absmax, errors),
        }
    }

    fn add_blocks(&mut self, figures: &BlockErrors<'_>) {
        let BlockErrors { absmax, signal, noise, worst } = figures;
        let all: [&[f32]; 4] = [absmax, signal, noise, worst];
        for start in (0..absmax.len()).step_by(GROUPS * GROUP) {
            let groups = all.map(|figure| &figure[start..absmax.len().min(start + GROUPS * GROUP)]);
            match groups.map(<&[f32; GROUPS * GROUP]>::try_from) {
                [Ok(absmax), Ok(signal), Ok(noise), Ok(worst)] if are_finite(absmax) => {
                    self.add_groups([absmax, signal, noise, worst]);
                }
                _ => (0..groups[0].len()).step_by(GROUP).for_each(|start| {
                    let group = groups.map(|figure| &figure[start..figure.len().min(start + GROUP)]);
                    self.add_absmax(group[0]);
                    self.add_errors(GroupErrors::of(group));
                }),
            }
        }
        self.blocks += absmax.len() as u64;
    }

    /// Adds a run of blocks of which a device has added up each group's errors.
    fn add_summed(&mut self, absmax: &[f32], errors: &ErrorSums<'_>) {
        let (groups, rest) = absmax.as_chunks::<{ GROUPS * GROUP }>();
        for groups in groups {
            match are_finite(groups) {
                true => self.add_absmax_of_groups(groups),
                false => groups.chunks(GROUP).for_each(|group| self.add_absmax(group)),
            }
        }
        rest.chunks(GROUP).for_each(|group| self.add_absmax(group));
        for group in 0..absmax.len().div_ceil(GROUP) {
            let (signal, noise) = (errors.signal[group], errors.noise[group]);
            self.add_errors(GroupErrors { signal, noise, worst: errors.worst[group], zeros: errors.zeros[group] });
        }
        self.blocks += absmax.len() as u64;
    }

    fn add_errors(&mut self, GroupErrors { signal, noise, worst, zeros }: GroupErrors) {
        // Where nothing is left of a scale in f32, what is over it is infinite or NaN, and so is the group's sum: weights of less than
        // 1e-39, which no sum would notice.
        if signal.is_finite() && noise.is_finite() {
            self.signal.add(signal);
            self.noise.add(noise);
        }
        self.worst = self.worst.max(worst);
        self.zero_blocks += u64::from(zeros);
    }

    /// Adds the absmax of a group, or of a tensor's last blocks.
    fn add_absmax(&mut self, absmax: &[f32]) {
        let mut sum = 0.0;
        for &absmax in absmax {
            if absmax.is_finite() {
                sum += f64::from(absmax);
                self.absmax_min = self.absmax_min.min(absmax);
                self.absmax_max = self.absmax_max.max(absmax);
            } else {
                self.nonfinite_blocks += 1;
            }
        }
        self.absmax.add(sum);
    }

    /// [`StatsAccumulator::add_absmax`] of several groups without NaN or infinities, side by side.
    fn add_absmax_of_groups(&mut self, absmax: &[f32; GROUPS * GROUP]) {
        let (mut sums, mut least, mut greatest) = ([0f64; GROUPS], [f32::MAX; GROUPS], [0f32; GROUPS]);
        for i in 0..GROUP {
            for group in 0..GROUPS {
                let x = absmax[group * GROUP + i];
                sums[group] += f64::from(x);
                least[group] = if x < least[group] { x } else { least[group] };
                greatest[group] = if x > greatest[group] { x } else { greatest[group] };
            }
        }
        sums.iter().for_each(|&sum| self.absmax.add(sum));
        self.absmax_min = least.iter().fold(self.absmax_min, |min, &x| min.min(x));
        self.absmax_max = greatest.iter().fold(self.absmax_max, |max, &x| max.max(x));
    }

    /// Adds the figures of several groups without NaN or infinities, side by side: their sums needn't wait for each other, and
    /// compilers make vectors of them.
    fn add_groups(&mut self, [absmax, signal, noise, worst]: [&[f32; GROUPS * GROUP]; 4]) {
        let [mut signals, mut noises, mut scales, mut worsts] = [[0f64; GROUPS]; 4];
        let (mut least, mut greatest, mut zeros) = ([f32::MAX; GROUPS], [0f32; GROUPS], [0; GROUPS]);
        for i in 0..GROUP {
            for group in 0..GROUPS {
                let at = group * GROUP + i;
                let scale = f64::from(absmax[at]);
                signals[group] += scale * scale * f64::from(signal[at]);
                noises[group] += scale * scale * f64::from(noise[at]);
                scales[group] += scale;
                let error = scale * f64::from(worst[at]);
                worsts[group] = if error > worsts[group] { error } else { worsts[group] };
                least[group] = if absmax[at] < least[group] { absmax[at] } else { least[group] };
                greatest[group] = if absmax[at] > greatest[group] { absmax[at] } else { greatest[group] };
                zeros[group] += u32::from(signal[at] == 0.0);
            }
        }
        for group in 0..GROUPS {
            let (signal, noise) = (signals[group], noises[group]);
            self.add_errors(GroupErrors { signal, noise, worst: worsts[group], zeros: zeros[group] as u8 });
            self.absmax.add(scales[group]);
            self.absmax_min = self.absmax_min.min(least[group]);
            self.absmax_max = self.absmax_max.max(greatest[group]);
        }
    }

    /// Adds what was gathered elsewhere.
    pub(crate) fn merge(&mut self, other: &StatsAccumulator) {
        self.signal.merge(&other.signal);
        self.noise.merge(&other.noise);
        self.absmax.merge(&other.absmax);
        self.absmax_min = self.absmax_min.min(other.absmax_min);
        self.absmax_max = self.absmax_max.max(other.absmax_max);
        self.worst = self.worst.max(other.worst);
        self.blocks += other.blocks;
        self.zero_blocks += other.zero_blocks;
        self.nonfinite_blocks += other.nonfinite_blocks;
    }

    /// The mean of absmax; 0 if there is none.
    pub(crate) fn mean_absmax(&self) -> f64 {
        let blocks = self.blocks - self.nonfinite_blocks;
        if blocks == 0 { 0.0 } else { self.absmax.value() / blocks as f64 }
    }

    /// The statistics so far.
    pub fn finish(&self) -> Statistics {
        let error = ratio(&self.noise, &self.signal);
        Statistics {
            blocks: self.blocks,
            zero_blocks: self.zero_blocks,
            nonfinite_blocks: self.nonfinite_blocks,
            // Of no block, all are 0.
            absmax: Range { min: self.absmax_min.min(self.absmax_max), mean: self.mean_absmax(), max: self.absmax_max },
            relative_squared_error: error,
            snr_db: (error > 0.0).then(|| -10.0 * libm::log10(error)),
            max_absolute_error: self.worst,
            double_quantization: None,
        }
    }
}

/// An [`AbsmaxError`] in the making.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct AbsmaxAccumulator {
    squares: ExactSum,
    squared_errors: ExactSum,
    worst: f64,
}

impl AbsmaxAccumulator {
    /// Adds a nested block: true absmax and what they are restored to, summed in order.
    pub(crate) fn add(&mut self, block: impl Iterator<Item = (f32, f32)>) {
        let (mut squares, mut squared_errors) = (0.0, 0.0);
        for (absmax, restored) in block {
            let (absmax, error) = (f64::from(absmax), f64::from(absmax) - f64::from(restored));
            squares += absmax * absmax;
            squared_errors += error * error;
            self.worst = self.worst.max(error.abs());
        }
        self.squares.add(squares);
        self.squared_errors.add(squared_errors);
    }

    /// Adds what was gathered elsewhere.
    pub(crate) fn merge(&mut self, other: &AbsmaxAccumulator) {
        self.squares.merge(&other.squares);
        self.squared_errors.merge(&other.squared_errors);
        self.worst = self.worst.max(other.worst);
    }

    /// The error so far.
    pub(crate) fn finish(&self) -> AbsmaxError {
        AbsmaxError {
            relative_squared_error: ratio(&self.squared_errors, &self.squares),
            max_absolute_error: self.worst,
        }
    }
}

/// Whether none is a NaN or an infinity; none is negative.
fn are_finite<const N: usize>(all: &[f32; N]) -> bool {
    all.iter().fold(true, |finite, x| finite & (x.to_bits() < f32::INFINITY.to_bits()))
}

fn ratio(part: &ExactSum, whole: &ExactSum) -> f64 {
    let whole = whole.value();
    if whole == 0.0 { 0.0 } else { part.value() / whole }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(gathering: &mut StatsAccumulator, figures: [&[f32]; 4]) {
        let [mut absmax, mut signal, mut noise, mut worst] = figures.map(<[f32]>::to_vec);
        let figures = BlockErrors { absmax: &mut absmax, signal: &mut signal, noise: &mut noise, worst: &mut worst };
        gathering.add(&Figures::Blocks(figures));
    }

    /// As a device hands them in.
    fn add_summed(gathering: &mut StatsAccumulator, figures: [&[f32]; 4]) {
        let groups = (0..figures[0].len()).step_by(GROUP);
        let group = |start: usize| figures.map(|figure| &figure[start..figure.len().min(start + GROUP)]);
        let sums: Vec<GroupErrors> = groups.map(|start| GroupErrors::of(group(start))).collect();
        let each = |of: fn(&GroupErrors) -> f64| sums.iter().map(of).collect::<Vec<f64>>();
        let (signal, noise, worst) = (each(|sums| sums.signal), each(|sums| sums.noise), each(|sums| sums.worst));
        let zeros: Vec<u8> = sums.iter().map(|sums| sums.zeros).collect();
        let errors = ErrorSums { signal: &signal, noise: &noise, worst: &worst, zeros: &zeros };
        gathering.add(&Figures::Sums { absmax: figures[0], errors });
    }

    #[test]
    fn figures_of_blocks_become_statistics_of_the_tensor() {
        let mut gathering = StatsAccumulator::default();
        add(&mut gathering, [&[2.0, 0.0], &[10.0, 0.0], &[0.1, 0.0], &[0.25, 0.0]]);
        add(&mut gathering, [&[4.0], &[1.0], &[0.0], &[0.0]]);
        let statistics = gathering.finish();
        assert_eq!((statistics.blocks, statistics.zero_blocks), (3, 1));
        assert_eq!(statistics.absmax, Range { min: 0.0, mean: 2.0, max: 4.0 });
        let error = 4.0 * f64::from(0.1f32) / 56.0;
        assert_eq!(statistics.relative_squared_error, error);
        assert!((statistics.snr_db.unwrap() + 10.0 * error.log10()).abs() < 1e-12);
        assert_eq!(statistics.max_absolute_error, 0.5);
    }

    #[test]
    fn an_exact_tensor_has_no_error_and_no_ratio() {
        let mut gathering = StatsAccumulator::default();
        add(&mut gathering, [&[0.0], &[0.0], &[0.0], &[0.0]]);
        let statistics = gathering.finish();
        assert_eq!((statistics.relative_squared_error, statistics.snr_db), (0.0, None));
    }

    #[test]
    fn groups_added_side_by_side_give_what_each_gives_alone() {
        let figure = |i: usize, salt: usize| ((i * 7919 + salt * 131) % 997) as f32 * 1e-3;
        let mut figures: [Vec<f32>; 4] = std::array::from_fn(|salt| (0..1000).map(|i| figure(i, salt)).collect());
        for odd in [f32::NAN, f32::INFINITY, f32::MAX, 0.0] {
            for place in [0, 127, 200, 999] {
                let normal = std::mem::replace(&mut figures[0][place], odd);
                let (mut together, mut alone) = (StatsAccumulator::default(), StatsAccumulator::default());
                add(&mut together, figures.each_ref().map(Vec::as_slice));
                for start in (0..1000).step_by(GROUP) {
                    add(&mut alone, figures.each_ref().map(|figure| &figure[start..1000.min(start + GROUP)]));
                }
                assert_eq!(together.finish(), alone.finish(), "{odd} at {place}");
                for len in [1000, 999, 993, 128, 16, 15, 1] {
                    let (mut blocks, mut summed) = (StatsAccumulator::default(), StatsAccumulator::default());
                    add(&mut blocks, figures.each_ref().map(|figure| &figure[..len]));
                    add_summed(&mut summed, figures.each_ref().map(|figure| &figure[..len]));
                    assert_eq!(blocks.finish(), summed.finish(), "{len}: {odd} at {place}");
                }
                figures[0][place] = normal;
            }
        }
    }

    #[test]
    fn a_scale_of_zero_for_what_is_not_zero_adds_nothing() {
        for len in [1, 16, 128, 200] {
            for odd in [f32::NAN, f32::INFINITY] {
                let (zeros, odd) = (vec![0.0; len], vec![odd; len]);
                let figures = [&zeros[..], &odd, &odd, &odd];
                let (mut blocks, mut summed) = (StatsAccumulator::default(), StatsAccumulator::default());
                add(&mut blocks, figures);
                add_summed(&mut summed, figures);
                assert_eq!(blocks.finish(), summed.finish());
                assert_eq!((blocks.finish().relative_squared_error, blocks.finish().max_absolute_error), (0.0, 0.0));
            }
        }
    }

    #[test]
    fn statistics_do_not_depend_on_where_the_tensor_is_cut() {
        let values: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 997) as f32 * 1e-3 + 1e-5).collect();
        let whole = {
            let mut gathering = StatsAccumulator::default();
            add(&mut gathering, [&values; 4]);
            gathering.finish()
        };
        for cut in [16, 320, 992] {
            let (mut left, mut right) = (StatsAccumulator::default(), StatsAccumulator::default());
            add(&mut left, [&values[..cut]; 4]);
            add(&mut right, [&values[cut..]; 4]);
            right.merge(&left);
            assert_eq!(right.finish(), whole);
        }
    }
}
