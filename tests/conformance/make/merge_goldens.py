"""Golden data for merging adapters: what PEFT makes of small models in f64, rounded once.

    scripts/make merge-goldens            writes fixtures/merge-goldens
    scripts/make merge-goldens --check    makes them anew and compares byte for byte

For each case:

CASE/base/       the model's config.json and model.safetensors, as transformers saves them
CASE/adapter/    adapter_config.json and adapter_model.safetensors, as PEFT saves them
CASE/merged.safetensors    merge_and_unload of both in f64, each element rounded once to the base's dtype, under the base's names

torch rounds f64 to bf16 by way of f32, so rounding is done here, on bits. PEFT in f32 is run, too: no element may be further from
that than a unit in the last place.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import reproducible
from reproducible import bell, seeded

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

DTYPES = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}

TEXT: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
}

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclass
class Case:
    """A model and an adapter."""

    model_type: str
    config: dict[str, Any]
    lora: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype = torch.float32
    save: dict[str, Any] = field(default_factory=dict)
    auto: Any = AutoModelForCausalLM


def moe(**more: Any) -> dict[str, Any]:
    """A model whose layers are mixtures of four experts."""
    return TEXT | {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2} | more


CASES = {
    "linears": Case(
        "llama",
        TEXT,
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, r".*\.(up|down)_proj": 8, "q_proj": 3},
            "alpha_pattern": {"self_attn.q_proj": 5, "^model.layers.0.mlp.up_proj": 32},
        },
    ),
    "rslora": Case(
        "llama",
        TEXT,
        {"r": 8, "use_rslora": True, "target_modules": "all-linear", "modules_to_save": ["lm_head"]},
        dtype=torch.float16,
        adapter_dtype=torch.bfloat16,
    ),
    "embedding": Case("llama", TEXT, {"r": 3, "target_modules": ["embed_tokens", "v_proj"]}, dtype=torch.float32),
    "conv1d": Case(
        "gpt2",
        {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16},
        {"r": 4, "target_modules": ["c_attn", "c_proj"], "lora_bias": True},
    ),
    "experts": Case("qwen3_moe", moe(), {"r": 2, "target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "fused-experts": Case(
        "qwen3_moe",
        moe(),
        {"r": 3, "use_rslora": True, "target_modules": [], "target_parameters": EXPERTS},
        save={"save_original_format": False},
    ),
    "one-parameter": Case(
        "qwen3_moe",
        moe(),
        {"r": 2, "target_modules": [], "target_parameters": EXPERTS[1:], "rank_pattern": {"layers.1.*down_proj": 4}},
    ),
    "mixtral": Case(
        "mixtral",
        TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"r": 2, "target_modules": ["k_proj"], "target_parameters": EXPERTS},
    ),
    "gpt-oss": Case(
        "gpt_oss",
        TEXT | {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
        {"r": 2, "target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
    "renamed": Case(
        "qwen2_vl",
        {
            "text_config": TEXT | {"num_hidden_layers": 1, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
            "tie_word_embeddings": False,
        },
        {"r": 2, "target_modules": ["q_proj", "down_proj", "qkv"]},
        auto=AutoModelForImageTextToText,
    ),
    "granite": Case(
        "granitemoe",
        TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
}


def numbers(name: str, shape: torch.Size, scale: float) -> torch.Tensor:
    """Bell-shaped, of their own for each name."""
    count = int(np.prod(shape))
    return torch.from_numpy((bell(seeded(name), count) * scale).astype(np.float32)).reshape(tuple(shape))


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Each f64 as the nearest number of `dtype`, ties to even: none is subnormal in it, or past its largest."""
    mantissa = DTYPES[dtype]
    bits = values.detach().contiguous().numpy().view(np.uint64)
    drop = np.uint64(52 - mantissa)
    one = np.uint64(1)
    even = (bits >> drop) & one
    bits = ((bits + ((one << (drop - one)) - one) + even) >> drop) << drop
    exact = bits.view(np.float64)
    least = 2.0**-14 if dtype == torch.float16 else 2.0**-126
    # Below that the step is that of the smallest normal numbers.
    step = least * 2.0**-mantissa
    exact = np.where(np.abs(values.detach().numpy()) < least, np.round(values.detach().numpy() / step) * step, exact)
    found = torch.from_numpy(exact).to(torch.float32).to(dtype)
    assert (found.double() == torch.from_numpy(exact)).all()
    return found


def base_of(name: str, case: Case, folder: Path) -> None:
    """Saves the model with weights of its own."""
    config = AutoConfig.for_model(case.model_type, **case.config)
    model = case.auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            value.copy_(numbers(f"{name} {parameter}", value.shape, 0.05))
    model.to(case.dtype).save_pretrained(folder, **case.save)
    for beside in folder.iterdir():
        if beside.name not in ("config.json", "model.safetensors"):
            beside.unlink()


def adapter_of(name: str, case: Case, base: Path, folder: Path) -> None:
    """Saves the adapter with tensors of its own, in its own dtype."""
    model = case.auto.from_pretrained(base, dtype=torch.float32)
    model.name_or_path = model.config._name_or_path = ""
    model = get_peft_model(model, LoraConfig(**case.lora))
    model.save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {key: numbers(f"{name} {key}", value.shape, 0.1).to(case.adapter_dtype) for key, value in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    # A list of a set, in any order.
    for key, value in config.items():
        if isinstance(value, list):
            config[key] = sorted(value)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def merged(case: Case, base: Path, adapter: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model that PEFT gives, in `dtype`."""
    model = case.auto.from_pretrained(base, dtype=dtype)
    model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        assert parameter.dtype == dtype, parameter.dtype
    return model.merge_and_unload()


def make_case(name: str, case: Case, folder: Path) -> None:
    """Base, adapter and what they are merged to."""
    base, adapter, saved = folder / "base", folder / "adapter", folder / "saved"
    base_of(name, case, base)
    adapter_of(name, case, base, adapter)
    model, single = merged(case, base, adapter, torch.float64), merged(case, base, adapter, torch.float32)
    changed = 0
    original = case.auto.from_pretrained(base, dtype=torch.float64).state_dict()
    for (key, value), other in zip(model.named_parameters(), single.parameters(), strict=True):
        # Rounding may be to the other side, and no further.
        near = 2.0 ** (1 - DTYPES[case.dtype])
        assert ((value - other.double()).abs() <= value.abs() * near + 1e-6).all(), key
        changed += bool((value != original[key]).any())
        value.data = rounded(value, case.dtype)
    assert changed, name
    model.to(case.dtype).save_pretrained(saved, **case.save)
    tensors = load_file(saved / "model.safetensors")
    assert tensors.keys() == load_file(base / "model.safetensors").keys(), name
    save_file(tensors, folder / "merged.safetensors")
    for beside in saved.iterdir():
        beside.unlink()
    saved.rmdir()
    print(f"{name}: {changed} parameters merged")


def make(folder: Path) -> None:
    """All cases into an empty folder."""
    torch.set_num_threads(1)
    for name, case in CASES.items():
        make_case(name, case, folder / name)


if __name__ == "__main__":
    reproducible.main(reproducible.ROOT / "fixtures" / "merge-goldens", make, __doc__ or "")
