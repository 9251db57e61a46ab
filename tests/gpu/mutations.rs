//! Would blocks.rs and groups.rs notice? Faults planted in the PTX, one at a time: each must stop the
//! interpreter or differ from the specification, on a few inputs.

use std::collections::HashMap;
use std::ops::Range;

use regex::Regex;

use prequant::FloatDtype;
use prequant::internal::backend::cuda::{GROUPS_PTX, GroupKernel, PTX, largest_name};
use prequant::internal::format::{Codebook, Coding, dynamic_map};

use super::block_faults::{MUTATIONS, Mutation};
use super::group_faults::GROUP_MUTATIONS;
use super::launch::{Kernels, kernel_name};
use super::launch_groups::{Rows, schemes};
use super::sums::random_figures;
use crate::support::codings;
use crate::support::weights::*;

/// The module with one blank between words, so that what is replaced can be written plainly. Lines stay what they are.
fn plain(ptx: &str) -> String {
    ptx.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ") + "\n").collect()
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

/// What is wrong with `sum_figures`.
fn try_sums(kernels: &Kernels) -> Result<(), String> {
    let mut random = Random(16);
    for blocks in [1, 15, 16, 17, 40, 2049, 4111] {
        let mut figures = random_figures(&mut random, blocks);
        kernels.check_sums(figures.each_ref().map(Vec::as_slice))?;
        for (at, odd) in [(0, f32::NAN), (blocks / 2, f32::INFINITY), (blocks - 1, 0.0)] {
            // A block of zeros, and one that counts nowhere.
            figures[1][at] = 0.0;
            figures[0][at] = odd;
            kernels.check_sums(figures.each_ref().map(Vec::as_slice))?;
            figures[0][at] = 1.0;
        }
    }
    Ok(())
}

/// What is wrong with a kernel that finds the largest magnitude.
fn try_largest(kernels: &Kernels, dtype: FloatDtype) -> Result<(), String> {
    let mut random = Random(17);
    for n in [8, 1016, 1024, 8192, 24_008] {
        let elements: Vec<f32> = (0..n).map(|_| random.normal() * 0.02).collect();
        kernels.check_largest(&encode(dtype, &elements), dtype)?;
        let mut places: Vec<usize> = (0..16).map(|_| random.bits() as usize % n).collect();
        places.extend([n - 1, n - 2, n / 2]);
        for x in [-7.0, f32::NEG_INFINITY] {
            for &at in &places {
                let mut source = encode(dtype, &elements);
                source[at * dtype.size()..][..dtype.size()].copy_from_slice(&encode_one(dtype, x));
                kernels.check_largest(&source, dtype)?;
            }
        }
    }
    Ok(())
}

/// What is wrong with the kernel of this name.
fn try_entry(kernels: &Kernels, entry: &str) -> Result<(), String> {
    match entry {
        "quantize_absmax" => return try_absmax(kernels),
        "sum_figures" => return try_sums(kernels),
        _ => {}
    }
    for dtype in DTYPES {
        if let Some(codebook) = CODEBOOKS.into_iter().find(|codebook| kernel_name(dtype, codebook) == entry) {
            return try_weights(kernels, dtype, codebook);
        }
        if largest_name(dtype) == entry {
            return try_largest(kernels, dtype);
        }
        if let Some(kernel) = GroupKernel::ALL.into_iter().find(|kernel| kernel.name(dtype) == entry) {
            return try_groups(kernels, kernel, dtype);
        }
    }
    panic!("no entry {entry}");
}

/// Numbers to try a kernel for groups with.
fn group_trials() -> Vec<Vec<f32>> {
    let mut random = Random(15);
    let mut trials: Vec<Vec<f32>> = vec![
        (0..1920).map(|_| random.normal() * 0.02).collect(),
        (0..1920).map(|_| random.normal() * 0.02 + 0.03).collect(),
        (0..1920).map(|_| random.normal().abs() * -3.0).collect(),
        (0..1920).map(|i| random.normal() * 2f32.powi(-(i / 64 % 24))).collect(),
    ];
    // The largest, and the least, at each place.
    trials.push((0..1920).map(|i: usize| if i.is_multiple_of(33) { -7.0 } else { 0.5 }).collect());
    trials.push((0..1920).map(|i: usize| if i.is_multiple_of(129) { 5.0 } else { -0.01 }).collect());
    for x in [f32::NAN, f32::NEG_INFINITY] {
        trials.push((0..1920).map(|i: usize| if i.is_multiple_of(129) { x } else { 0.5 }).collect());
    }
    for (scale, top) in [(1.0, 6.0), (0.125, 7.5), (0.0371, 8.0)] {
        let quarters = (-32..=32).flat_map(|i| next_bf16s(i as f32 / 4.0 * scale));
        let mut elements: Vec<f32> = quarters.map(|x| x.clamp(-top * scale, top * scale)).collect();
        elements.iter_mut().step_by(16).for_each(|x| *x = top * scale);
        trials.push(elements.into_iter().cycle().take(1920).collect());
    }
    let tiny = f32::from_bits(1);
    for from in [
        &[0.0, -0.0][..],
        &[tiny, -tiny, 1e-39, 0.0],
        // Scales that lose much in rounding.
        &[-1e-39, 0.0],
        &[-2e-39, 0.0],
        &[6e-8, -6e-8, 6e-5],
        &[f32::MAX, -f32::MAX, 1.0],
    ] {
        // Some groups of one of them only.
        let pick =
            |i: usize| if (i / 128).is_multiple_of(3) { from[0] } else { from[random.bits() as usize % from.len()] };
        trials.push((0..1920).map(pick).collect());
    }
    trials
}

/// What is wrong with a kernel for groups.
fn try_groups(kernels: &Kernels, kernel: GroupKernel, dtype: FloatDtype) -> Result<(), String> {
    let shapes = match kernel {
        GroupKernel::Int4Rows | GroupKernel::Int4AsymRows => &[(33, 33), (131, 131), (640, 640), (5, 5)][..],
        GroupKernel::Int4 | GroupKernel::Int4Asym => &[(640, 32), (640, 128), (640, 160), (32, 32)],
        GroupKernel::Nvfp4 | GroupKernel::Nvfp4ModelOpt => &[(640, 16)],
        GroupKernel::Mxfp4 => &[(640, 32)],
    };
    for elements in group_trials() {
        let bytes = |elements: &[f32]| elements.iter().flat_map(|&x| encode_one(dtype, x)).collect::<Vec<u8>>();
        let finite = if elements.iter().all(|x| x.is_finite()) { encode(dtype, &elements) } else { bytes(&elements) };
        let mut schemes = schemes(&finite, dtype).to_vec();
        schemes.push(codings::nvfp4(1.0));
        schemes.push(codings::nvfp4_modelopt(0.25));
        schemes.push(codings::nvfp4_modelopt(f32::from_bits(1)));
        for &(columns, group) in shapes {
            let source = &finite[..finite.len() / (columns * dtype.size()) * columns * dtype.size()];
            for &scheme in &schemes {
                if GroupKernel::new(Coding { group, ..scheme }, columns) == Some(kernel) {
                    kernels.check_groups(Rows { source, dtype, columns, group, scheme })?;
                }
            }
        }
    }
    Ok(())
}

fn assert_all_pass(ptx: &str) {
    let kernels = Kernels::parse(&plain(ptx));
    for entry in kernels.0.entries() {
        try_entry(&kernels, &entry.name).unwrap_or_else(|wrong| panic!("{wrong}"));
    }
}

fn assert_all_caught(ptx: &str, mutations: &[Mutation]) {
    let ptx = plain(ptx);
    let mut survivors = Vec::new();
    for mutation in mutations {
        match try_entry(&Kernels::parse(&mutated(&ptx, mutation)), mutation.entry) {
            Ok(()) => survivors.push(mutation.name),
            Err(by) => println!("{}: {by}", mutation.name),
        }
    }
    println!("{} of {} caught", mutations.len() - survivors.len(), mutations.len());
    assert!(survivors.is_empty(), "not caught: {survivors:#?}");
}

#[test]
fn the_kernels_without_faults_pass() {
    assert_all_pass(PTX);
}

#[test]
fn the_kernels_for_groups_without_faults_pass() {
    assert_all_pass(GROUPS_PTX);
}

#[test]
fn every_planted_fault_is_caught() {
    assert_all_caught(PTX, MUTATIONS);
}

#[test]
fn every_fault_planted_in_the_kernels_for_groups_is_caught() {
    assert_all_caught(GROUPS_PTX, GROUP_MUTATIONS);
}
