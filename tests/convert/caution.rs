//! Tensors that no table knows: what certainly is a Linear is quantized, all else is kept and can be included.

use serde_json::json;

use crate::support::decisions::{assert_decided, decisions, dense, dry_run, folder, quantized, tensors};
use crate::support::read_tensors;

/// A model type that nobody knows: its Linears are those that are called so.
fn unknown(more: serde_json::Value) -> serde_json::Value {
    let mut config = json!({"model_type": "never_heard_of", "hidden_size": 128, "vocab_size": 320});
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

#[test]
fn tables_in_lists_and_under_other_names_are_embeddings() {
    let mut all = dense("model.language_model.", 128);
    all.extend(tensors([
        ("model.language_model.layers.0.ple.ple_embedding.ngram_embedding.shard_0.weight", &[1000, 64][..]),
        ("model.language_model.layers.0.ple.ple_embedding.ngram_embedding.shard_1.weight", &[1000, 64]),
        ("talker.code_predictor.model.codec_embedding.2.weight", &[2048, 128]),
        ("talker.code_predictor.lm_head.2.weight", &[2048, 128]),
        ("encoder.layers.0.attn.rel_pos_emb.weight", &[1025, 128]),
        ("encoder.layers.0.attn.to_q.weight", &[128, 128]),
    ]));
    for config in [unknown(json!({})), json!({"model_type": "llama"})] {
        let decided = decisions(&folder(&config, &all), &[]);
        let kept = [
            ("model.language_model.layers.0.ple.ple_embedding.ngram_embedding.shard_0.weight", "an embedding"),
            ("model.language_model.layers.0.ple.ple_embedding.ngram_embedding.shard_1.weight", "an embedding"),
            ("talker.code_predictor.model.codec_embedding.2.weight", "an embedding"),
            ("talker.code_predictor.lm_head.2.weight", "an output head"),
            ("encoder.layers.0.attn.rel_pos_emb.weight", "an embedding"),
        ];
        let linears = ["model.language_model.layers.0.mlp.up_proj.weight", "encoder.layers.0.attn.to_q.weight"];
        assert_decided(&decided, &kept, &linears);
    }
}

#[test]
fn parameters_that_may_be_a_layers_experts_are_kept_in_doubt_unless_they_are_called_so() {
    let mut all = dense("model.", 128);
    all.extend(tensors([
        ("model.layers.0.mlp.experts.w13", &[8, 256, 128][..]),
        ("model.layers.0.mlp.experts.w2_weight", &[8, 128, 128]),
        ("model.layers.0.mlp.experts.both", &[8, 256, 128]),
        ("model.layers.0.ffn.moe_w1", &[8, 256, 128]),
        ("model.layers.0.conv_state", &[3, 128, 128]),
    ]));
    let folder = folder(&unknown(json!({"num_experts": 8})), &all);
    let kept = [
        ("model.layers.0.mlp.experts.both", "in doubt: it may be all of a layer's experts"),
        ("model.layers.0.ffn.moe_w1", "in doubt: it may be all of a layer's experts"),
        ("model.layers.0.conv_state", "parameter or buffer"),
    ];
    let experts = ["model.layers.0.mlp.experts.w13", "model.layers.0.mlp.experts.w2_weight"];
    assert_decided(&decisions(&folder, &[]), &kept, &experts);
    assert_decided(&decisions(&folder, &["--include", "moe_w1"]), &[], &["model.layers.0.ffn.moe_w1"]);
}

#[test]
fn rows_that_config_json_counts_are_heads_and_routers() {
    let config = unknown(json!({
        "padded_vocab_size": 384, "id2label": {"0": "a"}, "ffn": {"moe_num_experts": 48, "hidden": 256}, "num_classes": 40,
    }));
    let mut all = dense("transformer.", 128);
    all.extend(tensors([
        ("transformer.output_layer.weight", &[384, 128][..]),
        ("transformer.last.linear.weight", &[384, 128]),
        ("transformer.layers.0.mlp.linear_a.linear.weight", &[48, 128]),
        ("transformer.layers.0.mlp.other.linear.weight", &[64, 128]),
        ("project_out.weight", &[40, 128]),
        ("model.v_head.summary.weight", &[1, 128]),
        ("transformer.layers.0.mlp.gain.weight", &[1, 128]),
    ]));
    let kept = [
        ("transformer.output_layer.weight", "an output head"),
        ("transformer.last.linear.weight", "384 rows, which is config.json's padded_vocab_size"),
        ("transformer.layers.0.mlp.linear_a.linear.weight", "moe_num_experts"),
        ("project_out.weight", "num_classes"),
        ("model.v_head.summary.weight", "an output head"),
        ("transformer.layers.0.mlp.gain.weight", "one row"),
    ];
    let linears = ["transformer.layers.0.mlp.other.linear.weight", "transformer.layers.0.self_attn.k_proj.weight"];
    assert_decided(&decisions(&folder(&config, &all), &[]), &kept, &linears);
    // Keys and values may have as many rows as there are experts: they are two.
    let config = unknown(json!({"num_experts": 64, "vocab_size": 256}));
    let linears = ["transformer.layers.0.self_attn.k_proj.weight", "transformer.layers.0.mlp.up_proj.weight"];
    assert_decided(&decisions(&folder(&config, &dense("transformer.", 128)), &[]), &[], &linears);
}

#[test]
fn heads_and_routers_that_are_added_to_a_known_model_are_kept() {
    let mut all = dense("model.", 128);
    all.extend(tensors([
        ("score.0.weight", &[128, 128][..]),
        ("score.2.weight", &[1, 128]),
        ("v_head.summary.weight", &[1, 128]),
        ("model.layers.0.mlp.gate.gate_network.0.weight", &[4, 128]),
        ("model.layers.0.mlp.gate.gate_network.2.weight", &[4, 4]),
        ("model.layers.0.mlp.gate.weight_noise.weight", &[4, 128]),
        ("model.layers.0.mlp.calculator.experts.weight_gate.0", &[64, 128]),
    ]));
    for config in [json!({"model_type": "qwen2"}), unknown(json!({"num_experts": 4}))] {
        let folder = folder(&config, &all);
        assert_eq!(quantized(&folder, &[]).len(), 7, "{:?}", quantized(&folder, &[]));
        let kept = [
            ("score.0.weight", "head"),
            ("score.2.weight", "head"),
            ("v_head.summary.weight", "head"),
            ("model.layers.0.mlp.gate.gate_network.0.weight", "router"),
            ("model.layers.0.mlp.gate.gate_network.2.weight", "router"),
            ("model.layers.0.mlp.gate.weight_noise.weight", "router"),
            ("model.layers.0.mlp.calculator.experts.weight_gate.0", "parameter"),
        ];
        assert_decided(&decisions(&folder, &[]), &kept, &[]);
    }
}

#[test]
fn matrices_that_may_lie_the_other_way_round_are_kept() {
    let layer = |rows: usize, columns: usize| {
        tensors([
            ("transformer.wte.weight", &[320, 128][..]),
            ("transformer.h.0.attn.c_attn.weight", &[rows, columns]),
            ("transformer.h.0.attn.c_attn.bias", &[384]),
            ("transformer.h.0.attn.c_proj.weight", &[128, 128]),
            ("transformer.h.0.mlp.w1.weight", &[256, 128]),
            ("transformer.h.0.mlp.w2.weight", &[256, 128]),
            ("transformer.h.0.mlp.c_proj.weight", &[128, 256]),
            ("transformer.h.0.mlp.qkv_proj.weight", &[128, 512]),
            ("transformer.h.0.mlp.qkv_proj.bias", &[512]),
        ])
    };
    let decided = decisions(&folder(&unknown(json!({})), &layer(128, 384)), &[]);
    let kept = [
        ("transformer.h.0.attn.c_attn.weight", "[in, out]"),
        ("transformer.h.0.attn.c_proj.weight", "nothing beside it"),
        ("transformer.h.0.mlp.qkv_proj.weight", "[in, out]"),
    ];
    assert_decided(&decided, &kept, &["transformer.h.0.mlp.w1.weight"]);
    // With its bias along its rows it is a Linear; so is what w1 and w2 feed.
    let decided = decisions(&folder(&unknown(json!({})), &layer(384, 128)), &[]);
    assert_decided(&decided, &[], &["transformer.h.0.attn.c_attn.weight", "transformer.h.0.mlp.c_proj.weight"]);
}

#[test]
fn names_that_nobody_knows_are_linears_if_those_beside_them_say_so() {
    let mut all = dense("model.", 128);
    all.extend(tensors([
        ("model.layers.0.self_attn.W_pack.weight", &[384, 128][..]),
        ("model.layers.0.self_attn.codes.weight", &[1000, 128]),
        ("model.layers.0.memory.keys.weight", &[512, 128]),
        ("model.layers.0.moe.experts.0.inner.weight", &[256, 128]),
        ("model.layers.0.moe.experts.1.inner.weight", &[256, 128]),
    ]));
    let decided = decisions(&folder(&unknown(json!({})), &all), &[]);
    let kept = [("model.layers.0.self_attn.codes.weight", "nothing"), ("model.layers.0.memory.keys.weight", "nothing")];
    let linears = ["model.layers.0.self_attn.W_pack.weight", "model.layers.0.moe.experts.1.inner.weight"];
    assert_decided(&decided, &kept, &linears);
}

#[test]
fn what_is_kept_in_doubt_is_listed_with_the_pattern_that_includes_it() {
    let mut all = dense("model.", 128);
    all.extend(tensors([
        ("model.layers.0.memory.0.keys.weight", &[512, 128][..]),
        ("model.layers.0.memory.1.keys.weight", &[512, 128]),
    ]));
    let folder = folder(&unknown(json!({})), &all);
    let pattern = r"^model\.layers\.\d+\.memory\.\d+\.keys\.weight$";
    let report = dry_run(&folder, &[]);
    assert_eq!(report["in_doubt"], json!([{"include": pattern, "tensors": 2, "bytes": 2 * 2 * 512 * 128}]));
    let text = folder.convert(&["--dry-run", "--force"]).ok().stdout;
    assert!(text.contains(&format!("in doubt: 2 tensors of 262 kB, which --include '{pattern}' quantizes")), "{text}");
    let run = folder.convert(&[]).ok();
    assert!(run.stderr.contains("2 tensors (262 kB) are kept because they may be no Linear's"), "{}", run.stderr);
    let names = |flags: &[&str]| {
        folder.convert(&[&["--force"], flags].concat()).ok();
        read_tensors(&folder.destination()).into_keys().collect::<Vec<_>>()
    };
    let absmax = "model.layers.0.memory.1.keys.weight.absmax".to_owned();
    assert!(!names(&[]).contains(&absmax));
    assert!(names(&["--include", pattern]).contains(&absmax));
    assert_eq!(dry_run(&folder, &["--include", pattern])["in_doubt"], json!([]));
    let skipped = folder.read_json("config.json")["quantization_config"]["llm_int8_skip_modules"].clone();
    assert_eq!(skipped, json!(["lm_head"]));
}

/// MiniCPM's resampler: torch's own attention has its other weights in one parameter.
#[test]
fn output_projections_of_torchs_own_attention_are_kept() {
    let mut all = dense("llm.model.", 128);
    all.extend(tensors([
        ("resampler.attn.in_proj_weight", &[384, 128][..]),
        ("resampler.attn.out_proj.weight", &[128, 128]),
        ("resampler.kv_proj.weight", &[128, 128]),
    ]));
    let decided = decisions(&folder(&unknown(json!({})), &all), &[]);
    let kept = [("resampler.attn.out_proj.weight", "nn.MultiheadAttention")];
    assert_decided(&decided, &kept, &["resampler.kv_proj.weight", "llm.model.layers.0.self_attn.q_proj.weight"]);
}
