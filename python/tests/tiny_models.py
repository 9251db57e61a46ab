"""Tiny random Mixture-of-Experts models with experts in 4 bits, for the tests of PEFT."""

from __future__ import annotations

import torch
import transformers
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from torch import nn

# Such small products gain nothing from threads, and threads that wait for a core make the tests several times slower.
torch.set_num_threads(1)

VOCABULARY = 96
EXPERTS = 4

SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def configs() -> dict[str, transformers.PretrainedConfig]:
    """One configuration a model type."""
    return {
        "qwen3_moe": transformers.Qwen3MoeConfig(
            **SHARED, num_experts=EXPERTS, moe_intermediate_size=64, decoder_sparse_step=1, norm_topk_prob=True
        ),
        "mixtral": transformers.MixtralConfig(**SHARED, num_local_experts=EXPERTS, sliding_window=None),
        "gpt_oss": transformers.GptOssConfig(
            **SHARED,
            num_local_experts=EXPERTS,
            layer_types=["full_attention", "full_attention"],
            sliding_window=16,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    }


MODEL_TYPES = ["qwen3_moe", "mixtral", "gpt_oss"]


def bf16_model(model_type: str = "qwen3_moe") -> transformers.PreTrainedModel:
    """A random model, the same at every call."""
    torch.manual_seed(17)
    config = configs()[model_type]
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(18)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(noise + 1.0 if "norm" in name and parameter.dim() == 1 else noise)
    return model


def quantized_model(model_type: str = "qwen3_moe") -> transformers.PreTrainedModel:
    """The same model with its experts in 4 bits, alphabetically, as loading does it."""
    model = bf16_model(model_type).requires_grad_(False)
    for module in experts(model):
        for name in ("down_proj", "gate_up_proj"):
            replace_parameter_4bit(module, name, quant_type="nf4")
    return model.train()


def experts(model: nn.Module) -> list[nn.Module]:
    """The modules that hold a layer's experts, without the wrappers of PEFT."""
    found = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            while hasattr(module, "base_layer"):
                module = module.base_layer
            found.append(module)
    assert found, "no experts"
    return found


def tokens(rows: int = 2) -> torch.Tensor:
    """Random tokens, the same at every call."""
    return torch.randint(3, VOCABULARY, (rows, 24), generator=torch.Generator().manual_seed(19))
