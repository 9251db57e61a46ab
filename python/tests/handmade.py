"""Writes what `prequant convert` writes, with nothing but bitsandbytes: for tests where prequant isn't at hand, and to compare with it.

Only qwen3_moe, in blocks of 64: attention's Linears and experts in NF4, all else in bf16.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from safetensors.torch import load_file, save_file

QUANTIZED = re.compile(r"self_attn\.[qkvo]_proj\.weight$|\.experts\..*_proj(\.weight)?$")
EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")


def convert(source: Path, folder: Path, experts: str, double_quant: bool = False) -> Path:
    """A checkpoint's bf16 tensors in 4 bits.

    Args:
        source: a folder that save_pretrained wrote.
        folder: where to.
        experts: `keep` or `fuse`, as prequant's option.
        double_quant: whether scales are quantized, too.
    """
    tensors = {name: tensor for file in sorted(source.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    kept = [name for name, tensor in tensors.items() if tensor.dim() == 2 and not QUANTIZED.search(name)]
    if experts == "fuse":
        tensors = fused(tensors)
    written: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not QUANTIZED.search(name):
            written[name] = tensor
            continue
        codes, state = quantize_4bit(tensor, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
        written |= {name: codes} | {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}
    folder.mkdir(parents=True)
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [name.removesuffix(".weight") for name in kept if "embed" not in name],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts as the model has them: gate and up in one parameter of a layer, down in another."""
    made, layers = {}, {}
    for name, tensor in tensors.items():
        if found := EXPERT.match(name):
            layers.setdefault(found[1], {})[int(found[2]), found[3]] = tensor
        else:
            made[name] = tensor
    for layer, matrices in layers.items():
        experts = range(1 + max(number for number, _ in matrices))
        gate_up = [torch.cat([matrices[i, "gate"], matrices[i, "up"]]) for i in experts]
        made[f"{layer}.gate_up_proj"] = torch.stack(gate_up)
        made[f"{layer}.down_proj"] = torch.stack([matrices[i, "down"] for i in experts])
    return made


def decoded_experts(folder: Path) -> dict[str, torch.Tensor]:
    """What bitsandbytes decodes a folder's experts to, as the model has them."""
    tensors = load_file(folder / "model.safetensors")
    codes = [name.partition(".quant_state.")[0] for name in tensors if ".experts." in name and ".quant_state." in name]
    decoded = {}
    for name in codes:
        parts = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        decoded[name] = dequantize_4bit(tensors[name], QuantState.from_dict(parts, device=torch.device("cpu")))
    return fused(decoded)
