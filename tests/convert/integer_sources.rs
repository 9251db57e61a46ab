//! Sources in GPTQ's and AWQ's layouts: what they convert to is what their weights, decoded here one by one, convert to.

use half::f16;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use crate::carried::{carried, decodes_alike, verify};
use crate::coded_sources::{Coded, command, convert_alike, dequantizes, folders, noise};
use crate::support::Tensor;

/// How zero points are stored, and in which groups columns are.
#[derive(Clone, Copy)]
struct Gptq {
    /// What is taken off them when they are stored.
    less: u32,
    symmetric: bool,
    ordered: bool,
}

const V1: Gptq = Gptq { less: 1, symmetric: true, ordered: false };
const V2: Gptq = Gptq { less: 0, ..V1 };

/// f16 numbers of a few magnitudes.
fn scales(name: &str, len: usize) -> Vec<f16> {
    noise(name, len).into_iter().map(|byte| f16::from_f32(1e-3 * (1.0 + f32::from(byte) / 64.0))).collect()
}

/// `[rows, columns]` codes and zero points from 1 to 15 that any layout is made of.
struct Integers {
    rows: usize,
    columns: usize,
    group: usize,
    codes: Vec<u32>,
    zeros: Vec<u32>,
    scales: Vec<f16>,
}

impl Integers {
    fn new(name: &str, rows: usize, columns: usize, group: usize, symmetric: bool) -> Integers {
        let groups = columns / group;
        let codes = noise(name, rows * columns).iter().map(|byte| u32::from(byte & 15)).collect();
        let zeros = noise(&format!("{name} zeros"), rows * groups).into_iter();
        let zeros = zeros.map(|byte| if symmetric { 8 } else { 1 + u32::from(byte) % 15 }).collect();
        Integers { rows, columns, group, codes, zeros, scales: scales(&format!("{name} scales"), rows * groups) }
    }

    fn groups(&self) -> usize {
        self.columns / self.group
    }

    /// The tensor that they stand for, with this group for each column.
    fn decoded(&self, module: &str, group_of: impl Fn(usize) -> usize) -> Tensor {
        let all = (0..self.rows).flat_map(|row| (0..self.columns).map(move |column| (row, column)));
        let value = |(row, column): (usize, usize)| {
            let group = row * self.groups() + group_of(column);
            let code = self.codes[row * self.columns + column] as f32 - self.zeros[group] as f32;
            f16::from_f32(code * self.scales[group].to_f32())
        };
        let data = all.flat_map(|place| value(place).to_le_bytes()).collect();
        Tensor::new(&format!("{module}.weight"), Dtype::F16, &[self.rows, self.columns], data)
    }

    /// Words of eight codes each: `code(i, j, k)` is the `k`th of word `[i, j]`.
    fn words(name: &str, shape: [usize; 2], code: impl Fn(usize, usize, usize) -> u32) -> Tensor {
        let all = (0..shape[0]).flat_map(|i| (0..shape[1]).map(move |j| (i, j)));
        let word = |(i, j)| (0..8).fold(0u32, |word, k| word | code(i, j, k) << (4 * k));
        Tensor::new(name, Dtype::I32, &shape, all.flat_map(|place| word(place).to_le_bytes()).collect())
    }

    fn scale_tensor(&self, module: &str) -> Tensor {
        let all = (0..self.groups()).flat_map(|group| (0..self.rows).map(move |row| row * self.groups() + group));
        let data = all.flat_map(|place| self.scales[place].to_le_bytes()).collect();
        Tensor::new(&format!("{module}.scales"), Dtype::F16, &[self.groups(), self.rows], data)
    }
}

fn gptq(module: &str, rows: usize, columns: usize, group: usize, kind: Gptq) -> Coded {
    let integers = Integers::new(module, rows, columns, group, kind.symmetric);
    let groups = integers.groups();
    let group_of = |column: usize| if kind.ordered { column * 7 % columns / group } else { column / group };
    let order = (0..columns).flat_map(|column| (group_of(column) as i32).to_le_bytes()).collect();
    let code = |word: usize, row: usize, k: usize| integers.codes[row * columns + word * 8 + k];
    let zero = |group: usize, word: usize, k: usize| integers.zeros[(word * 8 + k) * groups + group] - kind.less;
    let stored = vec![
        Integers::words(&format!("{module}.qweight"), [columns / 8, rows], code),
        Integers::words(&format!("{module}.qzeros"), [groups, rows / 8], zero),
        integers.scale_tensor(module),
        Tensor::new(&format!("{module}.g_idx"), Dtype::I32, &[columns], order),
    ];
    (stored, integers.decoded(module, group_of))
}

fn awq(module: &str, rows: usize, columns: usize, group: usize, symmetric: bool) -> Coded {
    const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
    let integers = Integers::new(module, rows, columns, group, symmetric);
    let groups = integers.groups();
    let code = |column: usize, word: usize, k: usize| integers.codes[(word * 8 + ORDER[k]) * columns + column];
    let zero = |group: usize, word: usize, k: usize| integers.zeros[(word * 8 + ORDER[k]) * groups + group];
    let stored = vec![
        Integers::words(&format!("{module}.qweight"), [columns, rows / 8], code),
        Integers::words(&format!("{module}.qzeros"), [groups, rows / 8], zero),
        integers.scale_tensor(module),
    ];
    (stored, integers.decoded(module, |column| column / group))
}

const DOWN: &str = "model.layers.0.mlp.down_proj";

fn config(method: &str, more: Value) -> Value {
    let mut config = json!({"quant_method": method, "bits": 4});
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

#[test]
fn gptq_converts_as_what_it_decodes_to() {
    for (kind, format) in [
        (V1, "gptq"),
        (V2, "gptq_v2"),
        (Gptq { symmetric: false, ..V1 }, "gptq"),
        (Gptq { symmetric: false, ..V2 }, "gptq_v2"),
        (Gptq { symmetric: false, ordered: true, ..V1 }, "gptq"),
    ] {
        let weights = vec![gptq("model.layers.0.mlp.up_proj", 128, 64, 32, kind), gptq(DOWN, 64, 128, 128, kind)];
        let more = json!({"sym": kind.symmetric, "checkpoint_format": format, "desc_act": kind.ordered});
        let (coded, plain) = folders("llama", config("gptq", more), weights);
        coded.convert(&[]).fails(3, &["already quantized", "gptq", "--dequantize-source"]);
        convert_alike(&coded, &plain, &["--dequantize-source"]);
        dequantizes(&coded, &plain, "GPTQ");
    }
}

#[test]
fn awq_converts_as_what_it_decodes_to() {
    let weights = vec![awq("model.layers.0.mlp.up_proj", 128, 64, 64, false), awq(DOWN, 64, 96, 32, false)];
    let (coded, plain) = folders("llama", config("awq", json!({"version": "gemm", "zero_point": true})), weights);
    coded.convert(&[]).fails(3, &["already quantized", "awq", "--dequantize-source"]);
    convert_alike(&coded, &plain, &["--dequantize-source"]);
    dequantizes(&coded, &plain, "AWQ");
}

/// What is stored decides, where it can; config.json is then said to be wrong.
#[test]
fn symmetric_zero_points_beat_the_checkpoint_format() {
    for (kind, format, version) in [(V1, "gptq_v2", "V1"), (V2, "gptq", "V2")] {
        let more = json!({"sym": true, "checkpoint_format": format});
        let (coded, plain) = folders("llama", config("gptq", more), vec![gptq(DOWN, 64, 128, 128, kind)]);
        let run = coded.convert(&["--dequantize-source"]).ok();
        assert!(run.stderr.contains("checkpoint_format") && run.stderr.contains(version), "{}", run.stderr);
        dequantizes(&coded, &plain, "GPTQ");
    }
}

/// The codes as they are, in int4 and in int4-asym; a single zero point that isn't 8 leaves int4-asym alone.
#[test]
fn symmetric_integers_are_carried_over_with_zero_points_and_without() {
    const UP: &str = "model.layers.0.mlp.up_proj";
    let ordered = Gptq { ordered: true, ..V1 };
    let of_gptq = |kind| [gptq(UP, 128, 64, 32, kind), gptq(DOWN, 64, 128, 32, kind)];
    let of_awq = [awq(UP, 128, 64, 32, true), awq(DOWN, 64, 128, 32, true)];
    for (method, weights) in [("gptq", of_gptq(V1)), ("gptq", of_gptq(V2)), ("awq", of_awq)] {
        let (mut coded, _) = folders("llama", config(method, json!({})), weights.to_vec());
        for format in ["int4", "int4-asym"] {
            coded.convert(&["--format", format, "--group-size", "32", "--force"]).ok();
            assert_eq!(carried(&coded), ["lossless"; 2], "{method} {format}");
            decodes_alike(&coded);
            verify(&coded);
        }
        let mut weights = weights.to_vec();
        *weights[1].0[1].data.last_mut().unwrap() ^= 0x10;
        (coded, _) = folders("llama", config(method, json!({"sym": false})), weights);
        coded.convert(&["--format", "int4-asym", "--group-size", "32"]).ok();
        decodes_alike(&coded);
        let run = coded.convert(&["--format", "int4", "--group-size", "32", "--force"]);
        run.fails(3, &[DOWN, "INT4 with zero points", "--dequantize-source"]);
    }
    let (coded, _) = folders("llama", config("gptq", json!({})), of_gptq(ordered).to_vec());
    coded.convert(&["--format", "int4", "--group-size", "32"]).fails(3, &[DOWN, "order of their own"]);
}

#[test]
fn rotated_integers_are_refused() {
    let with = |more: Value| {
        let (coded, _) = folders("llama", config("gptq", more), vec![gptq(DOWN, 64, 128, 128, V1)]);
        coded.convert(&["--dequantize-source"])
    };
    for more in [
        json!({"rotation": "hadamard"}),
        json!({"rotation": {"mode": "random"}}),
        json!({"meta": {"rotation": "random"}}),
    ] {
        with(more).fails(3, &["config.json", "\"rotation\"", "rotated"]);
    }
    for more in [json!({"rotation": null}), json!({"rotation": false}), json!({"meta": {}})] {
        with(more).ok();
    }
}

#[test]
fn integers_that_do_not_fit_are_named_with_what_was_found() {
    let (stored, decoded) = gptq(DOWN, 64, 128, 32, Gptq { symmetric: false, ..V1 });
    let convert = |change: &dyn Fn(&mut Vec<Tensor>), more: Value| {
        let mut stored = stored.clone();
        change(&mut stored);
        let (coded, _) = folders("llama", config("gptq", more), vec![(stored, decoded.clone())]);
        coded.convert(&["--dequantize-source"])
    };
    let group = |stored: &mut Vec<Tensor>, group: i32| stored[3].data[20..24].copy_from_slice(&group.to_le_bytes());
    for found in [4, -1, i32::MIN] {
        convert(&|stored| group(stored, found), json!({}))
            .fails(3, &[DOWN, "column 5", &found.to_string(), "4 groups"]);
    }
    // Eight bits.
    let wider = |stored: &mut Vec<Tensor>| {
        stored[1] = Tensor::new(&stored[1].name, Dtype::I32, &[4, 16], vec![0; 256]);
    };
    convert(&wider, json!({})).fails(3, &[DOWN, "already quantized", "I32 [4, 16]", "4 bits"]);
    convert(&|stored| drop(stored.remove(2)), json!({})).fails(3, &[DOWN, "already quantized", ".scales"]);
    let short = |stored: &mut Vec<Tensor>| stored[3] = Tensor::new(&stored[3].name, Dtype::I32, &[100], vec![0; 400]);
    convert(&short, json!({})).fails(3, &[DOWN, "g_idx", "[100]", "[128]"]);
    let uneven = |stored: &mut Vec<Tensor>| {
        stored[1] = Tensor::new(&stored[1].name, Dtype::I32, &[5, 8], vec![0; 160]);
        stored[2] = Tensor::new(&stored[2].name, Dtype::F16, &[5, 64], vec![0; 640]);
    };
    convert(&uneven, json!({"group_size": 32})).fails(3, &[DOWN, "128 columns", "5 groups"]);
    convert(&|_| (), json!({"checkpoint_format": "marlin"})).fails(3, &["config.json", "marlin"]);
}

/// Planning reads zero points and order, which the output doesn't have any more.
#[test]
fn experts_of_what_was_made_of_four_bits_are_rewritten_from_the_source_alone() {
    let (coded, _) = folders("llama", config("gptq", json!({})), vec![gptq(DOWN, 64, 128, 128, V1)]);
    coded.convert(&["--dequantize-source"]).ok();
    let (converted, fused) = (coded.destination(), coded.beside("fused"));
    let flags: [&std::ffi::OsStr; 2] = ["--experts".as_ref(), "fuse".as_ref()];
    let run = command(&["convert".as_ref(), converted.as_ref(), fused.as_ref(), flags[0], flags[1]]);
    run.fails(3, &["prequant.json", "four bits", "convert the source again"]);
}
