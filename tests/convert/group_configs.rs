//! `--format int4`, `mxfp4` and `nvfp4`: what the configs say beside the weights, and what is kept, refused or warned of.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use super::groups::{linear, stored, verify};
use crate::support::{self, Folder, Tensor, read_tensors, serialize};

/// Experts one by one, a router and weights of all kinds.
fn moe() -> Vec<Tensor> {
    let name = |end: &str| format!("model.layers.0.{end}.weight");
    let mut tensors = vec![
        Tensor::random("model.embed_tokens.weight", Dtype::BF16, &[32, 128]),
        Tensor::random("lm_head.weight", Dtype::BF16, &[32, 128]),
        Tensor::random("model.norm.weight", Dtype::BF16, &[128]),
        Tensor::random(&name("mlp.gate"), Dtype::BF16, &[2, 128]),
        Tensor::random(&name("self_attn.q_proj"), Dtype::BF16, &[64, 128]),
        Tensor::random(&name("self_attn.o_proj"), Dtype::BF16, &[128, 72]),
    ];
    for e in 0..2 {
        for projection in ["gate_proj", "up_proj", "down_proj"] {
            tensors.push(Tensor::random(&name(&format!("mlp.experts.{e}.{projection}")), Dtype::BF16, &[128, 128]));
        }
    }
    tensors
}

#[test]
fn config_json_lists_exactly_the_linears_that_are_kept() {
    let folder = Folder::new("qwen3_moe");
    folder.write("model.safetensors", serialize(&moe()));
    let ignored = |flags: &[&str]| {
        folder.convert(&[&["--format", "int4", "--force"], flags].concat()).ok();
        let config: Value = folder.read_json("config.json");
        assert_eq!(config["experts_implementation"], Value::Null);
        let quantization = &config["quantization_config"];
        assert_eq!(quantization["quant_method"], "compressed-tensors");
        assert_eq!(quantization["config_groups"]["W4A16"]["weights"]["group_size"], 128);
        let mut list: Vec<String> = serde_json::from_value(quantization["ignore"].clone()).unwrap();
        list.sort();
        list
    };
    let layer = "model.layers.0";
    let [gate, odd] = [format!("{layer}.mlp.gate"), format!("{layer}.self_attn.o_proj")];
    let experts = r"re:.*\.layers\.0\.mlp\.experts\..*".to_owned();
    assert_eq!(ignored(&[]), ["lm_head", &gate, &odd]);
    assert_eq!(ignored(&["--exclude", "experts"]), ["lm_head", &gate, &odd, &experts]);
    let one = format!("{layer}.mlp.experts.1.up_proj");
    assert_eq!(ignored(&["--exclude", r"experts\.1\.up"]), ["lm_head", &one, &gate, &odd]);
    let manifest = folder.read_json("prequant.json");
    let record = |name: &str| {
        let of = |record: &&Value| record["sources"][0]["name"] == format!("{name}.weight");
        manifest["tensors"].as_array().unwrap().iter().find(of).unwrap().clone()
    };
    assert_eq!(record(&odd)["reason"], "72 columns aren't a multiple of group size 128: kept in its dtype");
    assert_eq!(manifest["recipe"]["group_size"], 128);
    assert!(!folder.destination().join("README.md").exists());
}

#[test]
fn a_mix_that_vllm_does_not_read_is_warned_of() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny-qwen3-moe");
    let folder = Folder::new("qwen3_moe");
    let warning = |flags: &[&str]| {
        let run = folder.convert_from(&fixture, &[&["--format", "int4", "--force"], flags].concat()).ok();
        let of_mixes = |line: &&str| line.starts_with("warning") && line.contains("such a layer");
        run.stderr.lines().find(of_mixes).unwrap_or_default().to_owned()
    };
    // Down has 64 columns.
    let found = warning(&[]);
    assert!(found.contains("down_proj") && found.contains("--group-size 64") && found.contains("vLLM"), "{found}");
    let fits = &["--group-size", "64"][..];
    assert_eq!(warning(fits), "");
    assert_eq!(warning(&["--only-experts", "--group-size", "64"]), "");
    assert_eq!(warning(&["--exclude", "experts"]), "");
    for (pattern, reason) in [
        ("k_proj", "self_attn.k_proj"),
        (r"experts\.\d\.down", "down_proj"),
        (r"experts\.3\.", "experts.3."),
        (r"layers\.1\.mlp\.experts\.0\.up", "layers.1.mlp.experts.0.up_proj"),
    ] {
        let found = warning(&[fits, &["--exclude", pattern]].concat());
        assert!(
            found.contains(reason) && found.contains("exclude pattern") && !found.contains("--group-size"),
            "{found}"
        );
    }
}

#[test]
fn a_column_alone_is_no_group_that_saves_room() {
    let folder = Folder::new("llama");
    let column = Tensor::random("model.layers.0.mlp.down_proj.weight", Dtype::BF16, &[64, 1]);
    folder.write("model.safetensors", serialize(&[[column.clone()].to_vec(), support::llama()].concat()));
    for format in ["int4", "int4-asym"] {
        folder.convert(&["--format", format, "--group-size", "channel", "--force"]).ok();
        assert_eq!(stored(&read_tensors(&folder.destination()), &column.name).2, column.data);
    }
}

/// Whatever a source or an older checkpoint has by this name: it would speak of other weights.
#[test]
fn hf_quant_config_goes_with_the_weights_it_is_of() {
    const NAME: &str = "hf_quant_config.json";
    let folder = Folder::new("llama");
    folder.write("model.safetensors", serialize(&support::llama()));
    folder.write(NAME, "{}");
    let modelopt = ["--format", "nvfp4", "--layout", "modelopt"];
    folder.convert(&modelopt).ok();
    assert!(folder.read_json(NAME)["quantization"]["quant_algo"] == "NVFP4");
    folder.convert(&["--format", "int4", "--group-size", "32", "--force"]).ok();
    assert!(!folder.destination().join(NAME).exists());
    verify(&folder, &[]).ok();
    std::fs::write(folder.destination().join(NAME), "{}").unwrap();
    let run = verify(&folder, &[]);
    assert!(run.code == 1 && run.stdout.contains(NAME), "{}", run.stdout);
}

/// Whichever comes first in the file.
#[test]
fn a_scale_shared_by_weights_of_several_dtypes_does_not_depend_on_their_order() {
    let name = |part: &str| format!("model.layers.0.self_attn.{part}_proj.weight");
    let dtypes = [("q", Dtype::BF16), ("k", Dtype::F32), ("v", Dtype::F16)];
    let tensors = dtypes.map(|(part, dtype)| Tensor::random(&name(part), dtype, &[32, 64]));
    let mut all = Vec::new();
    for order in [[0, 1, 2], [1, 2, 0], [2, 0, 1]] {
        let folder = Folder::new("llama");
        folder.write_shards(&order.map(|i| vec![tensors[i].clone()]));
        folder.convert(&["--format", "nvfp4", "--include", "self_attn"]).ok();
        let found = read_tensors(&folder.destination()).into_iter().map(|(name, (_, stored))| (name, stored));
        all.push(found.collect::<BTreeMap<_, _>>());
    }
    assert!(all.iter().all(|found| *found == all[0]));
    let scale = |part: &str| all[0][&format!("{}_global_scale", name(part))].clone();
    assert!(scale("q") == scale("k") && scale("k") == scale("v"));
}

/// What is quantized against the rules must not be listed as kept.
#[test]
fn a_head_that_is_included_is_not_ignored() {
    for (model_type, flags) in [
        ("llama", &["--format", "int4", "--group-size", "32"][..]),
        ("qwen3_moe", &["--format", "mxfp4"]),
        ("deepseek_v3", &["--format", "nvfp4"]),
        ("llama", &["--format", "nvfp4", "--layout", "modelopt"]),
    ] {
        let folder = Folder::new(model_type);
        folder.write("model.safetensors", serialize(&support::llama()));
        let run = folder.convert(&[flags, &["--include", "lm_head"]].concat()).ok();
        assert!(run.stderr.contains("vLLM"), "{}", run.stderr);
        let ignore = &folder.read_json("config.json")["quantization_config"]["ignore"];
        assert!(!ignore.as_array().unwrap().contains(&json!("lm_head")), "{ignore}");
        verify(&folder, &[]).ok();
    }
}

#[test]
fn options_of_other_formats_are_refused() {
    let folder = Folder::new("qwen3_moe");
    folder.write("model.safetensors", serialize(&moe()));
    for (flags, word) in [
        (&["--double-quant"][..], "--double-quant"),
        (&["--nonfinite", "keep"], "--nonfinite"),
        (&["--experts", "fuse"], "--experts fuse"),
    ] {
        folder.convert(&[&["--format", "mxfp4"], flags].concat()).fails(2, &[word, "nf4 and fp4"]);
    }
    for flags in [
        &["--format", "int4", "--group-size", "96"][..],
        &["--format", "nvfp4", "--group-size", "32"],
        &["--format", "int4", "--block-size", "32"],
        &["--format", "nf4", "--group-size", "32"],
        &["--format", "nf4", "--layout", "modelopt"],
        &["--format", "int4", "--layout", "modelopt"],
        &["--format", "nvfp4", "--layout", "gpt-oss"],
        // With their defaults, too.
        &["--format", "mxfp4", "--block-size", "64"],
        &["--format", "fp4", "--group-size", "128"],
        &["--format", "nf4", "--layout", "compressed-tensors"],
    ] {
        folder.convert(flags).fails(2, &[flags[2]]);
    }
    assert!(!folder.destination().exists());
}

#[test]
fn fused_experts_of_unknown_models_are_refused_and_can_be_kept() {
    let name = "model.layers.0.mlp.experts.gate_up_proj";
    let folder = Folder::new("some_moe");
    let tensors =
        [Tensor::random(name, Dtype::BF16, &[2, 64, 128]), Tensor::random(&linear(0), Dtype::BF16, &[64, 128])];
    folder.write("model.safetensors", serialize(&tensors));
    folder.convert(&["--format", "int4"]).fails(3, &[name, "some_moe", "--exclude"]);
    folder.convert(&["--format", "int4", "--exclude", "experts"]).ok();
    let found = read_tensors(&folder.destination());
    assert_eq!(stored(&found, name).2, tensors[0].data);
    let ignore = &folder.read_json("config.json")["quantization_config"]["ignore"];
    assert_eq!(*ignore, json!([r"re:.*\.layers\.0\.mlp\.experts\..*", "lm_head"]));
}

#[test]
fn what_was_converted_is_not_converted_again() {
    let folder = Folder::new("qwen3_moe");
    folder.write("model.safetensors", serialize(&moe()));
    folder.convert(&["--format", "int4"]).ok();
    let converted = folder.beside("source2");
    std::fs::rename(folder.destination(), &converted).unwrap();
    folder.convert_from(&converted, &["--experts", "fuse"]).fails(3, &["already quantized", "compressed-tensors"]);
    folder.convert_from(&converted, &[]).fails(3, &["already quantized", "compressed-tensors"]);
}

#[test]
fn a_nan_is_an_error_that_says_where() {
    let folder = Folder::new("llama");
    let mut weight = Tensor::random(&linear(0), Dtype::BF16, &[64, 128]);
    weight.data[300..302].copy_from_slice(&half::bf16::NAN.to_le_bytes());
    folder.write("model.safetensors", serialize(&[weight]));
    folder.convert(&["--format", "int4"]).fails(3, &[&linear(0), "element 150"]);
    folder.convert(&["--format", "mxfp4"]).fails(3, &[&linear(0), "element 150"]);
    folder.convert(&["--format", "nvfp4"]).fails(3, &[&linear(0), "element 150"]);
}

#[test]
fn a_dry_run_says_what_would_be_written() {
    let folder = Folder::new("qwen3_moe");
    folder.write("model.safetensors", serialize(&moe()));
    let run = folder.convert(&["--format", "int4", "--dry-run"]).ok();
    assert!(run.stdout.contains("int4 (group 128)"), "{}", run.stdout);
    let json: Value =
        serde_json::from_str(&folder.convert(&["--format", "int4", "--dry-run", "--json"]).ok().stdout).unwrap();
    folder.convert(&["--format", "int4"]).ok();
    let written = std::fs::metadata(folder.destination().join("model.safetensors")).unwrap().len();
    assert_eq!(json["files"][0], json!({"name": "model.safetensors", "size": written, "tensors": moe().len()}));
}
