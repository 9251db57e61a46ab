//! Codes of four bits that the target holds as they are: copied into its layout, not quantized again.

use safetensors::tensor::Dtype;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::coded_sources::{Coded, command, folders, int4, noise};
use crate::support::{Folder, LINEAR, Tensor, read_tensors};

const GATE: &str = "model.layers.0.mlp.experts.0.gate_proj.weight";
const UP: &str = "model.layers.0.mlp.experts.0.up_proj.weight";

fn compressed(format: &str) -> serde_json::Value {
    json!({"quant_method": "compressed-tensors", "format": format})
}

/// What the output decodes to is what the source does.
pub fn decodes_alike(folder: &Folder) {
    let [source, converted] = [folder.source(), folder.destination()].map(|place| {
        let decoded = folder.beside("alike");
        command(&["dequantize".as_ref(), place.as_ref(), decoded.as_ref(), "--force".as_ref()]).ok();
        read_tensors(&decoded)
    });
    assert!(source.keys().eq(converted.keys()));
    assert!(source.iter().all(|(name, tensor)| tensor.1 == converted[name].1));
}

/// The manifest's word on each tensor that is quantized.
pub fn carried(folder: &Folder) -> Vec<String> {
    let manifest = folder.read_json("prequant.json");
    let quantized = manifest["tensors"].as_array().unwrap().iter().filter(|tensor| tensor["decision"] == "quantize");
    quantized.map(|tensor| tensor["carried"].as_str().unwrap_or("no").to_owned()).collect()
}

pub fn verify(folder: &Folder) {
    let (destination, source) = (folder.destination(), folder.source());
    command(&["verify".as_ref(), destination.as_ref()]).ok();
    command(&["verify".as_ref(), destination.as_ref(), "--against".as_ref(), source.as_ref()]).ok();
}

#[test]
fn integers_of_the_same_groups_are_carried_over() {
    for (asym, format) in [(false, "int4"), (true, "int4-asym"), (false, "int4-asym")] {
        let weights = vec![int4(LINEAR, 24, 256, 32, asym, Dtype::I32), int4(GATE, 16, 128, 32, asym, Dtype::I64)];
        let (coded, _) = folders("llama", compressed("pack-quantized"), weights);
        let stored = read_tensors(&coded.source());
        coded.convert(&["--format", format, "--group-size", "32"]).ok();
        assert_eq!(carried(&coded), ["lossless"; 2]);
        let found = read_tensors(&coded.destination());
        for end in ["_packed", "_scale", "_zero_point"].into_iter().take(if asym { 3 } else { 2 }) {
            assert!(found[&format!("{LINEAR}{end}")].1 == stored[&format!("{LINEAR}{end}")].1, "{end}");
        }
        if format == "int4-asym" && !asym {
            let points = &found[&format!("{LINEAR}_zero_point")].1;
            assert_eq!(*points, (Dtype::I32, vec![3, 8], vec![0x88; 96]), "8 is what no zero point stands for");
        }
        decodes_alike(&coded);
        verify(&coded);
        coded
            .convert(&["--format", format, "--force"])
            .fails(3, &[GATE, "groups of 32", "groups of 128", "--dequantize-source"]);
        coded.convert(&["--format", "mxfp4", "--force"]).fails(3, &[GATE, "INT4", "MXFP4", "--dequantize-source"]);
    }
}

/// E4M3 scales of `bytes`, whatever global scale they are under.
fn nvfp4(name: &str, rows: usize, columns: usize, global: f32, bytes: &[u8]) -> Coded {
    let scales = (0..rows * columns / 16).map(|i| bytes[i % bytes.len()]).collect();
    let stored = vec![
        Tensor::new(&format!("{name}_packed"), Dtype::U8, &[rows, columns / 2], noise(name, rows * columns / 2)),
        Tensor::new(&format!("{name}_scale"), Dtype::F8_E4M3, &[rows, columns / 16], scales),
        Tensor::new(&format!("{name}_global_scale"), Dtype::F32, &[1], global.to_le_bytes().to_vec()),
    ];
    (stored, Tensor::random(name, Dtype::BF16, &[rows, columns]))
}

fn global_scale(folder: &Folder, name: &str) -> f32 {
    let tensors = read_tensors(&folder.destination());
    f32::from_le_bytes(tensors[&format!("{name}_global_scale")].1.2[..].try_into().unwrap())
}

#[test]
fn nvfp4_of_one_global_scale_keeps_its_scales() {
    let weights = vec![nvfp4(GATE, 16, 64, 1024.0, &[0x38, 0x7e, 1]), nvfp4(UP, 16, 64, 1024.0, &[0x40])];
    let (coded, _) = folders("llama", compressed("nvfp4-pack-quantized"), weights);
    for layout in ["compressed-tensors", "modelopt"] {
        let run = coded.convert(&["--format", "nvfp4", "--layout", layout, "--force"]).ok();
        assert!(!run.stderr.contains("global scale"), "{}", run.stderr);
        assert_eq!(carried(&coded), ["lossless"; 2], "{layout}");
        let (found, stored) = (read_tensors(&coded.destination()), read_tensors(&coded.source()));
        assert!(found[&format!("{GATE}_scale")].1 == stored[&format!("{GATE}_scale")].1);
        verify(&coded);
    }
}

/// The SHA-256 of bytes, as it stands in manifests.
fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Gives a weight another global scale, with all records of what that changes.
fn replace_global_scale(folder: &Folder, weight: &str, end: &str, scale: f32) {
    let place = folder.destination();
    let name = format!("{weight}{end}");
    let old = read_tensors(&place)[&name].1.2.clone();
    let write = |name: &str, from: &str, to: &str| {
        let text = std::fs::read_to_string(place.join(name)).unwrap();
        assert!(text.contains(from), "{name}");
        std::fs::write(place.join(name), text.replacen(from, to, 1)).unwrap();
    };
    let replace = |from: &[u8], to: &[u8]| write("prequant.json", &hex(from), &hex(to));
    let before = std::fs::read(place.join("model.safetensors")).unwrap();
    let (header_len, header) = safetensors::SafeTensors::read_metadata(&before).unwrap();
    let at = 8 + header_len + header.info(&name).unwrap().data_offsets.0;
    let mut after = before.clone();
    after[at..at + 4].copy_from_slice(&scale.to_le_bytes());
    std::fs::write(place.join("model.safetensors"), &after).unwrap();
    let manifest = std::fs::read(place.join("prequant.json")).unwrap();
    replace(&old, &scale.to_le_bytes());
    replace(&before, &after);
    write("SHA256SUMS", &hex(&before), &hex(&after));
    write("SHA256SUMS", &hex(&manifest), &hex(&std::fs::read(place.join("prequant.json")).unwrap()));
}

#[test]
fn verify_warns_of_global_scales_that_readers_get_wrong() {
    let (q, k) = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight");
    let shapes = [GATE, UP, q, k].map(|name| Tensor::random(name, Dtype::BF16, &[64, 64]));
    for (layout, end) in [("compressed-tensors", "_global_scale"), ("modelopt", "_scale_2")] {
        let folder = Folder::new("llama");
        folder.write("model.safetensors", crate::support::serialize(&shapes));
        folder.convert(&["--format", "nvfp4", "--layout", layout]).ok();
        let place = folder.destination();
        let run = |flags: &[&str]| {
            let mut all: Vec<&std::ffi::OsStr> = vec!["verify".as_ref(), place.as_ref()];
            all.extend(flags.iter().map(|flag| std::ffi::OsStr::new(*flag)));
            command(&all)
        };
        for flags in [&[][..], &["--quick"]] {
            assert!(!run(flags).ok().stdout.contains("warning"));
        }
        let old = f32::from_le_bytes(read_tensors(&place)[&format!("{k}{end}")].1.2[..].try_into().unwrap());
        replace_global_scale(&folder, k, end, old / 2.0);
        for flags in [&[][..], &["--quick"]] {
            let found = run(flags).ok().stdout;
            let words = ["warning: ", q, k, "in 1 places", "2.00 times off", "--format nvfp4", ": OK: "];
            assert!(words.iter().all(|word| found.contains(word)), "{found}");
        }
        assert_eq!(run(&["--quiet"]).ok().stdout, "");
        let json: serde_json::Value = serde_json::from_str(&run(&["--json"]).ok().stdout).unwrap();
        assert!(json["warnings"][0].as_str().unwrap().contains("2.00 times off"), "{json}");
    }
}

/// 0x38 is 1, 0x39 is 1.125: three quarters of these are 0.75 (0x34) and 0.84375, a tie between 0x35 and 0x36.
#[test]
fn global_scales_that_differ_in_a_set_become_that_of_its_largest_weight() {
    let weights = vec![nvfp4(GATE, 16, 64, 4000.0, &[0x38, 0x39, 0x38, 0x38]), nvfp4(UP, 16, 64, 3000.0, &[0x40])];
    let (coded, _) = folders("llama", compressed("nvfp4-pack-quantized"), weights);
    let inspect = |place: std::path::PathBuf| command(&["inspect".as_ref(), place.as_ref()]).ok().stdout;
    let found = inspect(coded.source());
    assert!([GATE, UP, "1.33 times", "--format nvfp4"].iter().all(|word| found.contains(word)), "{found}");
    let run = coded.convert(&["--format", "nvfp4"]).ok();
    assert!(!inspect(coded.destination()).contains("warning"));
    assert!(run.stderr.contains("1 of them") && run.stderr.contains("16 of their block scales"), "{}", run.stderr);
    assert_eq!([GATE, UP].map(|name| global_scale(&coded, name)), [3000.0; 2]);
    let found = read_tensors(&coded.destination());
    assert_eq!(found[&format!("{GATE}_scale")].1.2[..4], [0x34, 0x36, 0x34, 0x34]);
    assert!(found[&format!("{GATE}_packed")].1 == read_tensors(&coded.source())[&format!("{GATE}_packed")].1);
    assert_eq!(carried(&coded), ["scales-rounded", "lossless"]);
    verify(&coded);
    // The least scale has nothing below it.
    let weights = vec![nvfp4(GATE, 16, 64, 4000.0, &[1]), nvfp4(UP, 16, 64, 1000.0, &[0x40])];
    let (coded, _) = folders("llama", compressed("nvfp4-pack-quantized"), weights);
    coded
        .convert(&["--format", "nvfp4"])
        .fails(3, &[GATE, "64 of its block scales", "underflow", "--dequantize-source"]);
    coded.convert(&["--format", "nvfp4", "--dequantize-source"]).ok();
}

fn mxfp4(name: &str, rows: usize, columns: usize, exponents: &[u8], zeros: bool) -> Coded {
    let scales = (0..rows * columns / 32).map(|i| exponents[i % exponents.len()]).collect();
    let mut codes = noise(name, rows * columns / 2);
    if zeros {
        // The first group of each row, of zeros in both signs.
        codes.chunks_mut(columns / 2).for_each(|row| row[..16].fill(0x80));
    }
    let stored = vec![
        Tensor::new(&format!("{name}_packed"), Dtype::U8, &[rows, columns / 2], codes),
        Tensor::new(&format!("{name}_scale"), Dtype::U8, &[rows, columns / 32], scales),
    ];
    (stored, Tensor::random(name, Dtype::BF16, &[rows, columns]))
}

#[test]
fn mxfp4_is_carried_to_nvfp4_if_its_exponents_span_17_at_most() {
    let convert = |exponents: &[u8], zeros: bool, flags: &[&str]| {
        let weights = vec![mxfp4(GATE, 16, 128, exponents, zeros), mxfp4(UP, 16, 128, &[117], false)];
        let (coded, _) = folders("llama", compressed("mxfp4-pack-quantized"), weights);
        (coded.convert(&[&["--format", "nvfp4"], flags].concat()), coded)
    };
    for layout in ["compressed-tensors", "modelopt"] {
        for (exponents, zeros) in
            [(&[120u8, 110, 120, 103][..], false), (&[0, 110, 120, 103], true), (&[127, 110, 120, 103], true)]
        {
            let (run, coded) = convert(exponents, zeros, &["--layout", layout]);
            run.ok();
            assert_eq!(carried(&coded), ["lossless"; 2]);
            if layout == "compressed-tensors" {
                assert_eq!(global_scale(&coded, UP), 2f32.powi(15), "the largest exponent, 2^-7, becomes 2^8");
            }
            if layout == "compressed-tensors" {
                decodes_alike(&coded);
            }
            verify(&coded);
        }
    }
    convert(&[120, 102], false, &[]).0.fails(3, &[GATE, "span 18", "--dequantize-source"]);
}

#[test]
fn mxfp4_keeps_its_own_format_and_what_is_kept_is_decoded() {
    let weights = vec![mxfp4(GATE, 16, 64, &[120, 90], false), mxfp4(UP, 16, 64, &[117], false)];
    let (coded, _) = folders("llama", compressed("mxfp4-pack-quantized"), weights);
    coded.convert(&["--format", "mxfp4", "--exclude", "up_proj"]).ok();
    assert_eq!(carried(&coded), ["lossless"]);
    let found = read_tensors(&coded.destination());
    assert!(found.contains_key(UP) && found.contains_key(&format!("{GATE}_packed")));
    decodes_alike(&coded);
    verify(&coded);
}
