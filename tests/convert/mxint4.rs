//! The test format from end to end: a format of existing codes of elements and scales, which nothing but its own file and its
//! line in `FORMATS` knows of.

use std::process::Command;

use half::bf16;
use safetensors::tensor::Dtype;

use crate::groups::{stored, verify};
use crate::support::{Folder, LINEAR, Run, Tensor, read_tensors, serialize};

const ROWS: usize = 48;
const COLUMNS: usize = 96;

fn prequant(arguments: &[&std::path::Path]) -> Run {
    Run::of(Command::new(env!("CARGO_BIN_EXE_prequant")).args(arguments)).ok()
}

/// A group's scale byte and codes, by the rule: the exponent of the largest magnitude, one higher from a mantissa of 1.75 on, less
/// two; quotients are rounded to bf16 and then to the nearest integer, ties to even.
fn quantize(group: &[f64]) -> (u8, Vec<i32>) {
    let largest = group.iter().fold(0.0f64, |largest, x| largest.max(x.abs()));
    let floor = largest.log2().floor();
    let exponent = if largest / floor.exp2() >= 1.75 { floor + 1.0 } else { floor } - 2.0;
    let code = |x: &f64| bf16::from_f64(x / exponent.exp2()).to_f64().clamp(-8.0, 7.0).round_ties_even() as i32;
    ((exponent + 127.0) as u8, group.iter().map(code).collect())
}

#[test]
fn a_format_of_existing_codes_works_from_end_to_end() {
    let weight = Tensor::random(LINEAR, Dtype::BF16, &[ROWS, COLUMNS]);
    let values: Vec<f64> = weight.data.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f64()).collect();
    let head = Tensor::random("lm_head.weight", Dtype::BF16, &[32, COLUMNS]);
    let folder = Folder::new("llama");
    folder.write("model.safetensors", serialize(&[weight, head]));
    folder.convert(&["--format", "mxint4"]).ok();

    let groups: Vec<(u8, Vec<i32>)> = values.chunks(32).map(quantize).collect();
    let scales: Vec<u8> = groups.iter().map(|(scale, _)| *scale).collect();
    let codes: Vec<i32> = groups.iter().flat_map(|(_, codes)| codes.clone()).collect();
    let packed = codes.chunks(2).map(|pair| (pair[0] + 8) as u8 | ((pair[1] + 8) as u8) << 4).collect();
    let found = read_tensors(&folder.destination());
    assert_eq!(stored(&found, &format!("{LINEAR}_packed")), (Dtype::I32, vec![ROWS, COLUMNS / 8], packed));
    assert_eq!(stored(&found, &format!("{LINEAR}_scale")), (Dtype::U8, vec![ROWS, COLUMNS / 32], scales.clone()));
    assert_eq!(folder.read_json("prequant.json")["recipe"]["format"], "mxint4");

    verify(&folder, &[]).ok();
    verify(&folder, &["--against", folder.source().to_str().unwrap()]).ok();

    let floats = folder.beside("floats");
    prequant(&["dequantize".as_ref(), &folder.destination(), &floats]);
    let (dtype, shape, data) = stored(&read_tensors(&floats), LINEAR);
    assert_eq!((dtype, shape), (Dtype::BF16, vec![ROWS, COLUMNS]));
    for (i, bytes) in data.as_chunks().0.iter().enumerate() {
        let (found, scale) = (bf16::from_le_bytes(*bytes).to_f64(), (f64::from(scales[i / 32]) - 127.0).exp2());
        assert_eq!(found, f64::from(codes[i]) * scale, "element {i}");
        assert!((found - values[i]).abs() <= 0.51 * scale, "element {i}: {found} for {}", values[i]);
    }

    let inspected = prequant(&["inspect".as_ref(), "--json".as_ref(), &folder.destination()]);
    let inspected: serde_json::Value = serde_json::from_str(&inspected.stdout).unwrap();
    assert_eq!(inspected["formats"]["mxint4"]["weights"], ROWS * COLUMNS);
}
