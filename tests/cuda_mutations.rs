//! Would tests/cuda_kernels.rs notice? Faults planted in the PTX, one at a time: each must stop the interpreter or
//! differ from the specification, on a few inputs.

#[path = "support/cuda.rs"]
mod cuda;
#[path = "support/mutations.rs"]
mod mutations;
#[path = "support/weights.rs"]
mod weights;

use std::collections::HashMap;
use std::ops::Range;

use regex::Regex;

use prequant::format::{Codebook, FloatDtype, dynamic_map};
use prequant::kernel::cuda::PTX;

use cuda::{Kernels, kernel_name};
use mutations::{MUTATIONS, Mutation};
use weights::*;

/// The module with one blank between words, so that what is replaced can be written plainly. Lines stay what they are.
fn plain_ptx() -> String {
    PTX.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ") + "\n").collect()
}

/// The module with the fault in it.
fn mutated(ptx: &str, mutation: &Mutation) -> String {
    let Mutation { name, entry, from, nth, to } = mutation;
    let start = ptx.find(&format!(".entry {entry}(")).unwrap_or_else(|| panic!("{name}: no entry {entry}"));
    let end = ptx[start + 1..].find(".entry ").map_or(ptx.len(), |end| start + 1 + end);
    let places = occurrences(&ptx[start..end], from);
    let at = if *nth < 0 { places.len().wrapping_add_signed(*nth) } else { *nth as usize - 1 };
    let place = places.get(at).unwrap_or_else(|| panic!("{name}: {entry} has `{from}` {} times", places.len()));
    let replaced = start + place.bytes.start..start + place.bytes.end;
    let to = place.names.iter().fold(to.to_string(), |to, (stands_for, name)| to.replace(stands_for, name));
    assert_ne!(to, ptx[replaced.clone()], "{name}: nothing changes");
    [&ptx[..replaced.start], &to, &ptx[replaced.end..]].concat()
}

/// Where a fault's `from` occurs, and the registers and labels that its placeholders stand for there.
struct Occurrence<'a> {
    bytes: Range<usize>,
    names: HashMap<&'a str, &'a str>,
}

fn occurrences<'a>(text: &'a str, from: &'a str) -> Vec<Occurrence<'a>> {
    let placeholder = Regex::new(r"[%$][0-9]").unwrap();
    let placeholders: Vec<&str> = placeholder.find_iter(from).map(|found| found.as_str()).collect();
    let between = placeholder.split(from).map(regex::escape);
    let names =
        placeholders.iter().map(|placeholder| if placeholder.starts_with('%') { r"(%\w+)" } else { r"(\$\w+)" });
    let pattern: String = between.zip(names.chain([""])).flat_map(|(text, name)| [text, name.to_owned()]).collect();
    let pattern = Regex::new(&pattern).unwrap();

    let mut occurrences = Vec::new();
    let mut at = 0;
    while let Some(found) = pattern.captures_at(text, at) {
        let bytes = found.get(0).unwrap().range();
        let mut names = HashMap::new();
        let fits = (placeholders.iter().zip(found.iter().skip(1))).all(|(placeholder, name)| {
            *names.entry(*placeholder).or_insert(name.unwrap().as_str()) == name.unwrap().as_str()
        });
        // What doesn't fit may hold the beginning of what does.
        at = if fits { bytes.end } else { bytes.start + 1 };
        if fits {
            occurrences.push(Occurrence { bytes, names });
        }
    }
    occurrences
}

/// Weights to try a kernel with.
fn trials(codebook: &'static Codebook) -> Vec<(u32, Vec<f32>)> {
    let mut random = Random(12);
    let tiny = f32::from_bits(1);
    let mut trials = Vec::new();
    for size in [32, 64, 128, 256, 512] {
        let mut normal = |n: usize| -> Vec<f32> { (0..n).map(|_| random.normal()).collect() };
        // Past one thread block; whole blocks alone; short blocks with and without full rows.
        for n in [33 * size as usize + 21, 2 * size as usize, 15, size as usize - 1, size as usize / 2 + 8] {
            trials.push((size, normal(n)));
        }
        let points: Vec<f32> = around_thresholds(codebook, 1.0, next_f32s);
        let mut pick = |from: &[f32], n: usize| (0..n).map(|_| from[random.bits() as usize % from.len()]).collect();
        trials.push((size, pick(&points, 40 * size as usize - 1)));
        trials.push((size, pick(&[tiny, -tiny, 1e-39, 1.1e-38, 0.0], 3 * size as usize - 3)));
        trials.push((size, pick(&[tiny, -tiny, 1e-39, 0.0], 3 * size as usize - 3)));
        // The largest at each place of a short row.
        for at in 0..32.min(size as usize - 1) {
            trials.push((size, (0..=at).map(|i| if i == at { -7.0 } else { 0.5 }).collect()));
        }
    }
    // Thread blocks that take several groups of blocks.
    trials.push((32, (0..300 * 32 - 11).map(|_| random.normal()).collect()));
    // Only one lane's sum, so that its every rounding shows: in a whole block and in a short one.
    for lane in (0..32).flat_map(|lane| [lane; 3]) {
        trials.push((512, (0..1021).map(|i| if i % 32 == lane { random.normal() } else { 0.0 }).collect()));
    }
    trials
}

/// What is wrong with a `quantize_*` kernel.
fn try_weights(kernels: &Kernels, dtype: FloatDtype, codebook: &'static Codebook) -> Result<(), String> {
    for (size, elements) in trials(codebook) {
        kernels.check(&encode(dtype, &elements), dtype, size, codebook)?;
    }
    let mut random = Random(14);
    for x in [f32::NAN, f32::INFINITY] {
        // In a whole block and in the short one.
        for at in [40, 70] {
            // Small, or what a NaN leaves of the scale makes them infinite, and they'd all be in bin 0.
            let elements: Vec<f32> = (0..77).map(|_| random.normal() * 0.02).collect();
            let mut source = encode(dtype, &elements);
            source[at * dtype.size()..][..dtype.size()].copy_from_slice(&encode_one(dtype, x));
            kernels.check_non_finite(&source, dtype, 32, codebook)?;
        }
    }
    Ok(())
}

/// What is wrong with `quantize_absmax`.
fn try_absmax(kernels: &Kernels) -> Result<(), String> {
    let mut random = Random(13);
    let normal: Vec<f32> = (0..600).map(|_| random.normal().abs()).collect();
    let tiny: Vec<f32> = (0..300).map(|i| f32::from_bits(i % 5)).collect();
    let single = |at: usize| -> Vec<f32> { (0..256).map(|i| if i == at { -3.0 } else { 0.25 }).collect() };
    let ties: Vec<f32> = dynamic_map().midpoints().iter().copied().chain([1.0]).collect();
    for n in [1, 31, 255, 256, 257, 600] {
        kernels.check_absmax(&normal[..n], 0.5)?;
    }
    for absmax in [tiny, ties].into_iter().chain((0..256).step_by(15).map(single)) {
        kernels.check_absmax(&absmax, 0.0)?;
    }
    Ok(())
}

/// What is wrong with the kernel of this name.
fn try_entry(kernels: &Kernels, entry: &str) -> Result<(), String> {
    if entry == "quantize_absmax" {
        return try_absmax(kernels);
    }
    let all = DTYPES.into_iter().flat_map(|dtype| CODEBOOKS.map(|codebook| (dtype, codebook)));
    let found = all.into_iter().find(|(dtype, codebook)| kernel_name(*dtype, codebook) == entry);
    let (dtype, codebook) = found.unwrap_or_else(|| panic!("no entry {entry}"));
    try_weights(kernels, dtype, codebook)
}

#[test]
fn the_kernels_without_faults_pass() {
    let kernels = Kernels::parse(&plain_ptx());
    for entry in kernels.0.entries() {
        try_entry(&kernels, &entry.name).unwrap_or_else(|wrong| panic!("{wrong}"));
    }
}

#[test]
fn every_planted_fault_is_caught() {
    let ptx = plain_ptx();
    let mut survivors = Vec::new();
    for mutation in MUTATIONS {
        match try_entry(&Kernels::parse(&mutated(&ptx, mutation)), mutation.entry) {
            Ok(()) => survivors.push(mutation.name),
            Err(by) => println!("{}: {by}", mutation.name),
        }
    }
    println!("{} of {} caught", MUTATIONS.len() - survivors.len(), MUTATIONS.len());
    assert!(survivors.is_empty(), "not caught: {survivors:#?}");
}
