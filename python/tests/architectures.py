"""Tiny random checkpoints of the architectures that the loader is tested with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel


VOCABULARY = 160
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [8, 4, 4],
    "mrope_interleaved": True,
    "partial_rotary_factor": 1.0,
}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 128,
    "patch_size": 4,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
IMAGE_TOKENS = {"image_token_id": 150, "video_token_id": 151, "vision_start_token_id": 152, "vision_end_token_id": 153}

Made = tuple[type[PreTrainedModel], PretrainedConfig]


def llama() -> Made:
    return transformers.LlamaForCausalLM, transformers.LlamaConfig(**TEXT)


def qwen3_moe(**options: object) -> Made:
    return transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig(**TEXT | MOE | options)


def mixtral() -> Made:
    return transformers.MixtralForCausalLM, transformers.MixtralConfig(**TEXT, num_local_experts=4)


def deepseek_v3() -> Made:
    """A dense layer, then one with experts and a shared expert."""
    options = TEXT | MOE | {"num_key_value_heads": 4, "head_dim": 16, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}
    heads = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    del options["num_experts"]
    config = transformers.DeepseekV3Config(**options, **heads, first_k_dense_replace=1)
    return transformers.DeepseekV3ForCausalLM, config


def gpt_oss() -> Made:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    layers = {"layer_types": ["full_attention"] * 2, "rope_parameters": rope}
    return transformers.GptOssForCausalLM, transformers.GptOssConfig(**TEXT, **layers, num_local_experts=4)


def llama4() -> Made:
    text = TEXT | {"intermediate_size_mlp": 128, "num_local_experts": 4, "moe_layers": [0, 1]}
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "vision_output_dim": 64,
        "image_size": 16,
        "patch_size": 8,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
    }
    return transformers.Llama4ForConditionalGeneration, transformers.Llama4Config(text_config=text, vision_config=vision)


def granitemoe() -> Made:
    return transformers.GraniteMoeForCausalLM, transformers.GraniteMoeConfig(**TEXT, num_local_experts=4)


def qwen3_vl_moe() -> Made:
    text = TEXT | MOE | {"rope_parameters": ROPE}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=VISION, **IMAGE_TOKENS)
    return transformers.Qwen3VLMoeForConditionalGeneration, config


def qwen3_5_moe() -> Made:
    linear = {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    }
    text = TEXT | MOE | linear | {"shared_expert_intermediate_size": 64, "rope_parameters": ROPE}
    config = transformers.Qwen3_5MoeConfig(text_config=text, vision_config=VISION, **IMAGE_TOKENS)
    return transformers.Qwen3_5MoeForConditionalGeneration, config


def gemma4() -> Made:
    """Experts beside a dense MLP, fused on disk."""
    text = TEXT | {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64, "enable_moe_block": True}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0}
    text |= {"global_head_dim": 32, "num_kv_shared_layers": 0}
    return transformers.Gemma4ForCausalLM, transformers.Gemma4TextConfig(**text)


def save(folder: Path, made: Made, shard_size: str = "100KB", fused: bool = False) -> type[PreTrainedModel]:
    """Saves a random bf16 model in shards so small that parts of an expert lie in different ones.

    Args:
        folder: where to.
        made: the model's class and configuration.
        shard_size: the size of a shard.
        fused: experts as the model has them, which is how the hub has those of some architectures.
    """
    model_class, config = made
    generator = torch.Generator().manual_seed(17)
    model = model_class(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            # Experts differ in scale, so that one in another's place is noticed, and double quantization has work.
            if parameter.dim() == 3:
                noise *= torch.linspace(0.3, 3.0, len(noise))[:, None, None]
            parameter.copy_(noise + 1.0 if "norm" in name and parameter.dim() == 1 else noise)
    model.save_pretrained(folder, max_shard_size=shard_size, save_original_format=not fused)
    return model_class


def transpose_experts(folder: Path) -> None:
    """Exchanges rows and columns of 3-D experts, as the hub has them for qwen3_vl_moe."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, tensor in tensors.items():
            if tensor.dim() == 3 and ".experts." in name:
                tensors[name] = tensor.transpose(1, 2).contiguous()
        save_file(tensors, path, metadata={"format": "pt"})


def shards_of(folder: Path) -> dict[str, str]:
    """Every tensor's file."""
    return dict(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])


def _plain(make: Callable[[], Made]) -> Callable[[Path], type[PreTrainedModel]]:
    return lambda folder: save(folder, make())


def _fused(make: Callable[[], Made]) -> Callable[[Path], type[PreTrainedModel]]:
    return lambda folder: save(folder, make(), fused=True)


def _transposed(folder: Path) -> type[PreTrainedModel]:
    model_class = save(folder, qwen3_vl_moe(), fused=True)
    transpose_experts(folder)
    return model_class


SOURCES: dict[str, Callable[[Path], type[PreTrainedModel]]] = {
    "llama": _plain(llama),
    "qwen3_moe": _plain(qwen3_moe),
    "mixtral": _plain(mixtral),
    "deepseek_v3": _plain(deepseek_v3),
    "gpt_oss": _plain(gpt_oss),
    "llama4": _plain(llama4),
    "granitemoe": _plain(granitemoe),
    "qwen3_vl_moe": _plain(qwen3_vl_moe),
    "qwen3_vl_moe-hub": _transposed,
    "qwen3_5_moe": _plain(qwen3_5_moe),
    "qwen3_5_moe-hub": _fused(qwen3_5_moe),
    "gemma4": _plain(gemma4),
    "qwen3_moe-1-expert": lambda folder: save(folder, qwen3_moe(num_experts=1, num_experts_per_tok=1)),
    # 24 x 40 elements a matrix: seven and a half blocks of 128.
    "qwen3_moe-ragged": lambda folder: save(folder, qwen3_moe(hidden_size=24, moe_intermediate_size=40)),
    # 64 x 48 elements: 48 blocks of 64, which go on from row to row.
    "qwen3_moe-across": lambda folder: save(folder, qwen3_moe(hidden_size=64, moe_intermediate_size=48)),
}
"""What makes a checkpoint in a folder, by name; returns the model's class."""

BLOCK_SIZES = {"qwen3_moe": 32, "mixtral": 128, "gpt_oss": 32, "granitemoe": 128, "qwen3_moe-ragged": 128}
"""Where it isn't 64."""

FLAGS = {"qwen3_moe-ragged": ("--only-experts",), "qwen3_moe-across": ("--only-experts",)}
"""For Linears too bitsandbytes decodes blocks that go on from row to row wrongly on the CPU."""

