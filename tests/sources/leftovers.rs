//! What says that weights are quantized and was left from before they were cast: the tensors decide.

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::support::{Folder, LINEAR, Run, Tensor, llama, read_tensors, serialize};

fn plain() -> Folder {
    let folder = Folder::llama();
    folder.convert(&[]).ok();
    folder
}

/// Converts to what the plain checkpoint does, with these words in a warning.
#[track_caller]
fn assert_converts_as_plain(folder: &Folder, flags: &[&str], words: &[&str]) {
    let run = folder.convert(flags).ok();
    for word in words {
        assert!(run.stderr.contains("warning: ") && run.stderr.contains(word), "no {word:?} in: {}", run.stderr);
    }
    let tensors = |folder: &Folder| read_tensors(&folder.destination());
    assert!(tensors(folder) == tensors(&plain()));
    let mut verify = std::process::Command::new(env!("CARGO_BIN_EXE_prequant"));
    Run::of(verify.arg("verify").arg(folder.destination()).arg("--against").arg(folder.source())).ok();
}

#[test]
fn a_config_of_any_method_is_taken_out_where_no_weight_is_quantized() {
    let method = |method: &str| json!({"quant_method": method, "weight_block_size": [128, 128], "bits": 4});
    for name in ["fp8", "gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4", "modelopt", "never heard of"] {
        for config in [
            json!({"model_type": "llama", "quantization_config": method(name)}),
            json!({"model_type": "llama", "compression_config": method(name)}),
            json!({"model_type": "llama", "text_config": {"model_type": "llama", "quantization_config": method(name)}}),
        ] {
            let folder = Folder::llama();
            folder.write("config.json", config.to_string());
            assert_converts_as_plain(&folder, &[], &[name, "there are none", "left over"]);
            let written = folder.read_json("config.json");
            assert_eq!(written["quantization_config"]["quant_method"], "bitsandbytes");
            assert!(written.get("compression_config").is_none(), "{written}");
            assert!(written["text_config"].get("quantization_config").is_none(), "{written}");
        }
    }
}

#[test]
fn scales_of_weights_that_are_floats_are_left_out_by_name() {
    for end in ["_scale_inv", "_scale", "_scale_2"] {
        let scale = Tensor::random(&format!("{LINEAR}{end}"), Dtype::F32, &[1, 1]);
        for config in [
            json!({"model_type": "llama"}),
            json!({"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}),
        ] {
            let folder = Folder::new("llama");
            folder.write("config.json", config.to_string());
            folder.write("model.safetensors", serialize(&[llama(), vec![scale.clone()]].concat()));
            assert_converts_as_plain(&folder, &[], &["1 scales and the like", &scale.name]);
            let left_out = folder.read_json("prequant.json")["left_out"].clone();
            assert_eq!(
                (&left_out[0]["tensor"], &left_out[0]["name"]),
                (&json!(scale.name), &json!("model.safetensors"))
            );
        }
    }
}

#[test]
fn files_that_say_how_the_source_was_quantized_are_left_out() {
    let folder = Folder::llama();
    for name in ["hf_quant_config.json", "quantize_config.json", "quant_config.json"] {
        folder.write(name, "{}");
    }
    assert_converts_as_plain(&folder, &[], &[]);
    assert_eq!(folder.read_json("prequant.json")["left_out"].as_array().map(Vec::len), Some(3));
}

/// What is quantized is: one matrix of codes among many floats.
#[test]
fn a_source_of_which_little_is_quantized_is_none_without() {
    for (name, dtype, config) in [
        ("model.layers.1.mlp.up_proj.weight", Dtype::F8_E5M2, "fp8"),
        ("model.layers.1.mlp.up_proj.weight", Dtype::I8, "bitsandbytes"),
        ("model.layers.1.mlp.up_proj.weight_packed", Dtype::I32, "compressed-tensors"),
        ("model.layers.1.mlp.up_proj.qweight", Dtype::I32, "gptq"),
    ] {
        let folder = Folder::new("llama");
        folder.write(
            "config.json",
            json!({"model_type": "llama", "quantization_config": {"quant_method": config}}).to_string(),
        );
        folder.write("model.safetensors", serialize(&[llama(), vec![Tensor::random(name, dtype, &[2, 8])]].concat()));
        let run = folder.convert(&[]);
        assert!(run.code == 3 && run.stderr.to_lowercase().contains(config), "{name}: {}", run.stderr);
    }
}

#[test]
fn tables_of_integers_are_no_codes_of_weights() {
    let folder = Folder::new("llama");
    folder.write(
        "config.json",
        json!({"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}).to_string(),
    );
    let table = Tensor::random("model.layers.0.ffn.gate.tid2eid", Dtype::I32, &[8, 2]);
    folder.write("model.safetensors", serialize(&[llama(), vec![table.clone()]].concat()));
    let run = folder.convert(&[]).ok();
    assert!(run.stderr.contains("there are none"), "{}", run.stderr);
    assert!(read_tensors(&folder.destination()).contains_key(&table.name));
}

#[test]
fn a_config_nested_in_a_models_is_replaced_where_it_stood() {
    let folder = Folder::new("mistral3");
    let quantization = json!({"quant_method": "fp8", "weight_block_size": [64, 64]});
    let config = json!({"model_type": "mistral3", "text_config": {"model_type": "mistral", "dtype": "bfloat16", "quantization_config": quantization}});
    folder.write("config.json", config.to_string());
    // Rows that are no whole blocks: 200 are four blocks of 64, of which the last is short.
    let name = "language_model.model.layers.0.mlp.gate_proj.weight";
    let codes: Vec<u8> = (0..200 * 256).map(|i| 0x30 + (i % 16) as u8).collect();
    let scales: Vec<f32> = (0..16).map(|i| (i + 1) as f32).collect();
    let bytes = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
    folder.write(
        "model.safetensors",
        serialize(&[
            Tensor::new(name, Dtype::F8_E4M3, &[200, 256], codes),
            Tensor::new(&format!("{name}_scale_inv"), Dtype::F32, &[4, 4], bytes),
        ]),
    );
    folder.convert(&[]).ok();
    let written: Value = folder.read_json("config.json");
    assert_eq!(written["quantization_config"]["quant_method"], "bitsandbytes");
    assert_eq!(written["text_config"], json!({"model_type": "mistral", "dtype": "bfloat16"}));
    // The scale of each row's first block of 64 is largest, so that absmax tells which was used.
    let absmax = &read_tensors(&folder.destination())[&format!("{name}.absmax")].1.2;
    let absmax: Vec<f32> = absmax.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect();
    let highest = 0.9375 * 1.0; // the largest code, 0x3f, is 1.875
    for (row, of_row) in absmax.chunks_exact(4).enumerate() {
        for (block, found) in of_row.iter().enumerate() {
            let scale = scales[row / 64 * 4 + block];
            assert_eq!(*found, 2.0 * highest * scale, "row {row}, block {block}");
        }
    }
}

/// However few they are: what is left of the config is what they decode by.
#[test]
fn codes_of_any_method_in_place_of_a_weight_are_no_leftover() {
    let module = LINEAR.strip_suffix(".weight").unwrap();
    let with = |tensors: Vec<Tensor>, method: &str| {
        let folder = Folder::llama();
        let config = json!({"model_type": "llama", "quantization_config": {"quant_method": method}});
        folder.write("config.json", config.to_string());
        folder.write("model.safetensors", serialize(&tensors));
        folder
    };
    let codes = |end: &str, dtype: Dtype, size: usize| {
        let others = llama().into_iter().filter(|tensor| tensor.name != LINEAR);
        let stored = Tensor::new(&format!("{module}.{end}"), dtype, &[4, 2], vec![1; 8 * size]);
        others.chain([stored, Tensor::random(&format!("{module}.decodes.by"), Dtype::F16, &[4])]).collect()
    };
    for (method, end, dtype, size) in
        [("aqlm", "codes", Dtype::I8, 1), ("hqq", "W_q", Dtype::U8, 1), ("vptq", "indices", Dtype::I32, 4)]
    {
        let run = with(codes(end, dtype, size), method).convert(&[]);
        run.fails(3, &[&format!("already quantized with {method}"), "config.json"]);
    }
    // Masks and the like are no codes.
    let mask = Tensor::new("model.layers.0.self_attn.causal_mask", Dtype::U8, &[4, 4], vec![1; 16]);
    let index = Tensor::new("model.relative_position_index", Dtype::I32, &[2, 2], vec![0; 16]);
    let run = with(llama().into_iter().chain([mask, index]).collect(), "gptq").convert(&[]).ok();
    assert!(run.stderr.contains("left over"), "{}", run.stderr);
}
