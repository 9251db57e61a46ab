//! `--experts fuse`: the fused tensors against the same experts one by one.

use std::collections::BTreeMap;

use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use crate::support::{self, Folder, Tensor, contents, read_tensors};

/// `experts` experts of `intermediate` x `hidden` in one layer, as the first family has them on disk.
fn per_expert(experts: usize, intermediate: usize, hidden: usize) -> Vec<Tensor> {
    (0..experts)
        .flat_map(|e| {
            [("gate", [intermediate, hidden]), ("up", [intermediate, hidden]), ("down", [hidden, intermediate])].map(
                |(projection, shape)| {
                    let name = format!("model.layers.0.mlp.experts.{e}.{projection}_proj.weight");
                    Tensor::random(&name, Dtype::BF16, &shape)
                },
            )
        })
        .collect()
}

/// Tensors in shards, dealt out in turns.
fn scattered(tensors: &[Tensor], shards: usize) -> Vec<Vec<Tensor>> {
    (0..shards).map(|i| tensors.iter().skip(i).step_by(shards).cloned().collect()).collect()
}

/// Bytes of `name`, and of all its statistics but the JSON.
fn part<'t>(tensors: &'t BTreeMap<String, (String, support::Stored)>, name: &str, suffix: &str) -> &'t [u8] {
    &tensors[&format!("{name}{suffix}")].1.2
}

fn fused_equals_kept(intermediate: usize, hidden: usize, flags: &[&str]) {
    let folder = Folder::new("qwen3_moe");
    // More than nine, so that order by number and order by name differ.
    let experts = 11;
    folder.write_shards(&scattered(&per_expert(experts, intermediate, hidden), 3));
    folder.convert(&[flags, &["--experts", "fuse"]].concat()).ok();
    let fused = read_tensors(&folder.destination());
    folder.convert(&[flags, &["--force"]].concat()).ok();
    let kept = read_tensors(&folder.destination());
    let layer = "model.layers.0.mlp.experts";
    for (target, projections) in [("gate_up_proj", &["gate_proj", "up_proj"][..]), ("down_proj", &["down_proj"])] {
        for suffix in ["", ".absmax"] {
            let of_expert = |e: usize| projections.iter().map(move |p| format!("{layer}.{e}.{p}.weight"));
            let names = (0..experts).flat_map(of_expert);
            let expected: Vec<u8> = names.flat_map(|name| part(&kept, &name, suffix).to_vec()).collect();
            assert_eq!(part(&fused, &format!("{layer}.{target}"), suffix), expected, "{target}{suffix}, {flags:?}");
        }
        let state: Value =
            serde_json::from_slice(part(&fused, &format!("{layer}.{target}"), ".quant_state.bitsandbytes__nf4"))
                .unwrap();
        let matrix = if target == "down_proj" { [hidden, intermediate] } else { [2 * intermediate, hidden] };
        assert_eq!(state["shape"], json!([experts, matrix[0], matrix[1]]));
    }
    assert_eq!(fused.len(), 8, "{:?}", fused.keys());
}

#[test]
fn fused_experts_hold_the_codes_and_absmax_of_each() {
    fused_equals_kept(64, 32, &[]);
    fused_equals_kept(96, 64, &["--block-size", "32", "--threads", "3"]);
    fused_equals_kept(16, 8, &["--block-size", "128", "--max-shard-size", "1kB"]);
}

/// The same weights as one 3-D tensor, converted as they are.
fn as_one(folder: &Folder, model_type: &str, tensors: &[Tensor], flags: &[&str]) -> BTreeMap<String, Vec<u8>> {
    folder.write("config.json", json!({"model_type": model_type}).to_string());
    folder.write("model.safetensors", support::serialize(tensors));
    folder.convert(&[&["--force"], flags].concat()).ok();
    read_tensors(&folder.destination()).into_iter().map(|(name, (_, stored))| (name, stored.2)).collect()
}

fn concatenated(tensors: &[&Tensor], name: &str, shape: &[usize]) -> Tensor {
    Tensor::new(name, tensors[0].dtype, shape, tensors.iter().flat_map(|tensor| tensor.data.clone()).collect())
}

#[test]
fn fusing_is_quantizing_what_transformers_would_have_put_together() {
    let (experts, intermediate, hidden) = (5, 3, 7);
    let layer = "model.layers.0.mlp.experts";
    let tensors = per_expert(experts, intermediate, hidden);
    let of =
        |projection: &str| tensors.iter().filter(move |tensor| tensor.name.contains(projection)).collect::<Vec<_>>();
    let gate_up: Vec<&Tensor> = of("gate").into_iter().zip(of("up")).flat_map(|(gate, up)| [gate, up]).collect();
    let together = [
        concatenated(&gate_up, &format!("{layer}.gate_up_proj"), &[experts, 2 * intermediate, hidden]),
        concatenated(&of("down"), &format!("{layer}.down_proj"), &[experts, hidden, intermediate]),
    ];
    for flags in [&["--block-size", "32"][..], &["--double-quant"], &["--format", "fp4", "--block-size", "64"]] {
        let folder = Folder::new("");
        let expected = as_one(&folder, "qwen3_5_moe", &together, flags);
        let fuse = [flags, &["--experts", "fuse"]].concat();
        assert_eq!(as_one(&folder, "qwen3_moe", &tensors, &fuse), expected, "{flags:?}");
        assert_eq!(as_one(&folder, "qwen3_5_moe", &together, &fuse), expected, "{flags:?}");
    }
}

#[test]
fn stacked_projections_are_concatenated_expert_by_expert() {
    let (experts, rows, columns) = (3, 4, 16);
    let [gate, up] = ["gate", "up"].map(|p| {
        Tensor::random(&format!("model.layers.4.moe.{p}_proj.weight"), Dtype::BF16, &[experts, rows, columns])
    });
    let size = rows * columns * 2;
    let data = (0..experts).flat_map(|e| [&gate, &up].map(|t| t.data[e * size..][..size].to_vec()).concat()).collect();
    let name = "model.layers.4.mlp.experts.gate_up_proj";
    let together = Tensor::new(name, Dtype::BF16, &[experts, 2 * rows, columns], data);
    let folder = Folder::new("");
    let expected = as_one(&folder, "qwen3_5_moe", &[together], &[]);
    assert_eq!(as_one(&folder, "step3p7", &[gate, up], &["--experts", "fuse"]), expected);
}

#[test]
fn matrices_are_transposed_where_the_model_wants_it() {
    let (experts, hidden, intermediate) = (3, 24, 20);
    let config = json!({"model_type": "qwen3_vl_moe",
        "text_config": {"model_type": "qwen3_vl_moe_text", "hidden_size": hidden, "moe_intermediate_size": intermediate}});
    let name = "model.language_model.layers.0.mlp.experts.gate_up_proj";
    let stored = Tensor::random(name, Dtype::BF16, &[experts, hidden, 2 * intermediate]);
    let element = |e: usize, row: usize, column: usize| {
        let at = ((e * hidden + row) * 2 * intermediate + column) * 2;
        [stored.data[at], stored.data[at + 1]]
    };
    let data = (0..experts)
        .flat_map(|e| (0..2 * intermediate).flat_map(move |c| (0..hidden).map(move |r| (e, r, c))))
        .flat_map(|(e, r, c)| element(e, r, c))
        .collect();
    let model = Tensor::new(name, Dtype::BF16, &[experts, 2 * intermediate, hidden], data);
    let folder = Folder::new("");
    let convert = |tensor: &Tensor, flags: &[&str]| {
        folder.write("config.json", config.to_string());
        folder.write("model.safetensors", support::serialize(std::slice::from_ref(tensor)));
        folder.convert(&[&["--force"], flags].concat()).ok();
        let mut files = contents(&folder.destination());
        files.retain(|name, _| name.ends_with(".safetensors"));
        files
    };
    let expected = convert(&model, &[]);
    assert_eq!(convert(&stored, &["--experts", "fuse"]), expected);
    assert_eq!(convert(&model, &["--experts", "fuse"]), expected);
    let odd = Tensor::random(name, Dtype::BF16, &[experts, hidden, intermediate]);
    folder.write("model.safetensors", support::serialize(&[odd]));
    folder.convert(&["--experts", "fuse", "--force"]).fails(3, &["gate_up_proj", "[3, 24, 20]", "[_, 40, 24]", "keep"]);
}

#[test]
fn what_has_no_experts_is_converted_as_ever() {
    let folder = Folder::llama();
    folder.convert(&[]).ok();
    let kept = folder.read("model.safetensors");
    folder.convert(&["--experts", "fuse", "--force"]).ok();
    assert_eq!(folder.read("model.safetensors"), kept);
}

#[test]
fn experts_that_are_kept_stay_as_they_are() {
    let folder = Folder::new("qwen3_moe");
    let mut tensors = per_expert(2, 8, 8);
    tensors.push(Tensor::random("model.layers.0.self_attn.q_proj.weight", Dtype::BF16, &[8, 8]));
    folder.write("model.safetensors", support::serialize(&tensors));
    folder.convert(&["--experts", "fuse", "--exclude", "experts"]).ok();
    let names: Vec<String> = read_tensors(&folder.destination()).into_keys().collect();
    assert!(names.contains(&"model.layers.0.mlp.experts.1.down_proj.weight".to_owned()), "{names:?}");
}

#[test]
fn what_cant_be_fused_is_named() {
    let all = per_expert(3, 8, 8);
    let name = |end: &str| format!("model.layers.0.mlp.experts.{end}");
    let folder = Folder::new("qwen3_moe");
    let refused = |tensors: &[Tensor], flags: &[&str], words: &[&str]| {
        folder.write("model.safetensors", support::serialize(tensors));
        folder.convert(&[&["--experts", "fuse"], flags].concat()).fails(3, words);
        assert!(!folder.destination().exists());
    };
    let without = |gone: &str| all.iter().filter(|tensor| tensor.name != name(gone)).cloned().collect::<Vec<_>>();
    let with = |tensor: Tensor| [&without(tensor.name.rsplit("experts.").next().unwrap())[..], &[tensor]].concat();

    refused(&without("1.up_proj.weight"), &[], &["model.safetensors", &name("1.up_proj.weight"), "missing", "keep"]);
    refused(&without("0.down_proj.weight"), &[], &[&name("0.down_proj.weight"), "missing"]);
    let far = Tensor::random(&name("18446744073709551615.up_proj.weight"), Dtype::BF16, &[8, 8]);
    refused(&[&all[..], &[far]].concat(), &[], &[&name("3.gate_proj.weight"), "missing"]);
    let odd = Tensor::random(&name("2.up_proj.weight"), Dtype::BF16, &[8, 16]);
    refused(&with(odd), &[], &[&name("2.up_proj.weight"), "[8, 16]", "[8, 8]"]);
    let half = Tensor::random(&name("2.up_proj.weight"), Dtype::F16, &[8, 8]);
    refused(&with(half), &[], &[&name("2.up_proj.weight"), "F16", "BF16"]);
    refused(&all, &["--exclude", r"1\.down"], &[&name("1.down_proj.weight"), "exclude all"]);
    let taken = Tensor::random(&name("down_proj"), Dtype::BF16, &[3, 8, 8]);
    refused(&[&all[..], &[taken]].concat(), &[], &[&name("down_proj")]);
    let other = Tensor::random(&name("0.w7.weight"), Dtype::BF16, &[8, 8]);
    // Left in doubt, unless it is asked for.
    refused(&[&all[..], &[other]].concat(), &["--include", "w7"], &[&name("0.w7.weight"), "qwen3_moe", "keep"]);

    folder.write("config.json", r#"{"model_type": "brand_new_moe"}"#);
    refused(&all, &[], &["brand_new_moe", "isn't known", "--experts keep"]);
}

#[test]
fn a_nan_is_told_of_the_experts_own_tensor() {
    let folder = Folder::new("qwen3_moe");
    let mut tensors = per_expert(3, 8, 8);
    let damaged = tensors.iter_mut().find(|tensor| tensor.name.contains("2.up_proj")).unwrap();
    damaged.data[10..12].copy_from_slice(&half::bf16::NAN.to_le_bytes());
    folder.write_shards(&scattered(&tensors, 2));
    folder.convert(&["--experts", "fuse"]).fails(3, &["experts.2.up_proj.weight", "1 values", "element 5"]);
}

#[test]
fn verify_knows_where_fused_experts_come_from() {
    let folder = Folder::new("mixtral");
    let tensors: Vec<Tensor> = (0..2)
        .flat_map(|e| ["w1", "w2", "w3"].map(|w| format!("model.layers.0.block_sparse_moe.experts.{e}.{w}.weight")))
        .map(|name| Tensor::random(&name, Dtype::BF16, &[32, 32]))
        .collect();
    folder.write("model.safetensors", support::serialize(&tensors));
    folder.convert(&["--experts", "fuse"]).ok();
    let manifest = folder.read_json("prequant.json");
    let record = &manifest["tensors"].as_array().unwrap()[0];
    let sources: Vec<&str> =
        record["sources"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap()).collect();
    let name = |e, w| format!("model.layers.0.block_sparse_moe.experts.{e}.{w}.weight");
    assert_eq!(sources, [name(0, "w1"), name(0, "w3"), name(1, "w1"), name(1, "w3")]);
    assert_eq!(record["outputs"][0]["name"], "model.layers.0.mlp.experts.gate_up_proj");
    let verify = |flags: &[&std::ffi::OsStr]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_prequant"));
        support::Run::of(command.arg("verify").arg(folder.destination()).args(flags))
    };
    verify(&[]).ok();
    let verify = |source: &std::path::Path| verify(&["--against".as_ref(), source.as_os_str()]);
    verify(&folder.source()).ok();
    let mut changed = tensors;
    changed[4].data[0] ^= 0x80;
    folder.write("model.safetensors", support::serialize(&changed));
    let report = verify(&folder.source());
    assert_eq!(report.code, 1, "{}", report.stderr);
    assert!(report.stdout.contains("experts.0.w2.weight"), "{}", report.stdout);
}
