"""Where default configs can't be built, or leave a kind of layer out."""

# A rotary embedding of its own for every kind of layer.
ROPE_BY_LAYER_TYPE = {
    kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
}

QWEN4_INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 64, "indexer_budget": 64, "indexer_compress_ratio": 4,
    "ple_embed_dim": 64,
}

# By model type: what is set. Keys of nested configs come after a dot; a value that ends in Config is such a config by default.
SETTINGS = {
    "nemotron": {"num_key_value_heads": 8},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl": {"text_config.head_dim": 128},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16, "num_hidden_layers": 32},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 16, "layers_block_type": ["mamba", "attention"] * 16,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    # One model has the 26B-A4B's experts and the E4B's per-layer inputs, so that both have rows.
    "gemma4_text": {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64},
    "gemma4": {
        "vision_config": "Gemma4VisionConfig", "text_config.enable_moe_block": True, "text_config.num_experts": 8,
        "text_config.top_k_experts": 2, "text_config.moe_intermediate_size": 64,
    },
    "autoformer": {"prediction_length": 24, "context_length": 24},
    "informer": {"prediction_length": 24, "context_length": 24},
    "ministral": {"head_dim": 128},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "time_series_transformer": {"prediction_length": 24, "context_length": 24},
    "qwen3_omni_moe": {
        "talker_config.text_config.shared_expert_intermediate_size": 768, "talker_config.spatial_merge_size": 2,
    },
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 768},
    "qwen4_exp": {f"text_config.{key}": value for key, value in QWEN4_INDEXER.items()},
    "qwen4_exp_text": QWEN4_INDEXER,
    "vilt": {"num_images": 2},
    "aya_vision": {"vision_config.num_attention_heads": 16},
    "beit": {"out_indices": [3, 5, 7, 11]},
    "bridgetower": {"contrastive_hidden_size": 512},
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "emu3": {"vocabulary_map": {"<image>": 151851}},
    "cohere_compass": {"text_config.rope_parameters": ROPE_BY_LAYER_TYPE},
    "cohere_compass_text": {"rope_parameters": ROPE_BY_LAYER_TYPE},
    "dbrx": {"attn_config.rope_theta": 10000.0},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense"] + ["sparse"] * 31},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense"] + ["sparse"] * 31},
    "diffusion_gemma": {
        "text_config.num_experts": 8, "text_config.top_k_experts": 2, "text_config.moe_intermediate_size": 64,
    },
    "diffusion_gemma_text": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "granite4_vision": {"deepstack_layer_map": [[3, 0], [7, 1]]},
    "hiera": {"decoder_hidden_size": 512, "decoder_depth": 8, "decoder_num_heads": 16},
    "hunyuan_vl_text": {"head_dim": 128},
}
