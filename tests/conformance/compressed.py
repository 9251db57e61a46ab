"""What prequant writes in compressed-tensors' layout, checked against llm-compressor, transformers and vLLM's expectations.

    scripts/conformance compressed [FORMAT]...    such as int4 "int4-asym channel"; all of FORMATS without one

For random checkpoints, converted by both: the same tensors under the same names, byte for byte; config.json equal but for
what is ignored and the group's name; where transformers can load the format, logits equal to the bit; and what vLLM's weight
loader expects (scripts/conformance vllm), which damaged copies do not meet. Experts that are fused on disk are split into the same
names and bytes. llm-compressor forgets some Linears that vLLM puts together and that must share NVFP4's global scale:
SHARED_IN_VLLM.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
import vllm_check
from compressed_tensors.quantization import QuantizationScheme, QuantizationStrategy, preset_name_to_scheme
from llmcompressor import model_free_ptq
from loguru import logger
from mapped import check_mapped
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
)

ROOT = Path(__file__).resolve().parents[2]
PRESETS = {"int4": "W4A16", "int4-asym": "W4A16_ASYM", "mxfp4": "MXFP4A16", "nvfp4": "NVFP4A16"}
# A format, and a group size where it isn't the preset's.
FORMATS = ["int4", "int4 32", "int4 channel", "int4-asym", "int4-asym 64", "int4-asym channel", "mxfp4", "nvfp4"]
SHARED = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


# Of experts, also of shared ones, and of linear attention.
SHARED_IN_VLLM = re.compile(r"\.(experts\.\d+|shared_expert)\.(gate|up)_proj\.|\.linear_attn\.in_proj_")


def models() -> dict[str, tuple[PretrainedConfig, torch.dtype]]:
    """Configurations with the dtype of the checkpoint."""
    experts = {"num_experts_per_tok": 2}
    hybrid = {"num_experts": 4, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
    hybrid |= {"linear_num_value_heads": 8, "linear_num_key_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32}
    return {
        "llama": (LlamaConfig(**SHARED), torch.bfloat16),
        "llama-f16": (LlamaConfig(**SHARED), torch.float16),
        "qwen3_moe": (Qwen3MoeConfig(**SHARED, **experts, num_experts=4, moe_intermediate_size=128), torch.bfloat16),
        "mixtral": (MixtralConfig(**SHARED, **experts, num_local_experts=4), torch.bfloat16),
        "qwen3_5_moe-fused": (Qwen3_5MoeTextConfig(**SHARED | {"num_hidden_layers": 4}, **experts, **hybrid), torch.bfloat16),
    }


def fuse(folder: Path) -> None:
    """Puts experts together, as such models' checkpoints on the hub have them: [experts, 2 * inner, hidden] and down."""
    tensors = stored(folder)
    parts: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    for name in list(tensors):
        if found := re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name):
            parts.setdefault(found[1], {}).setdefault(found[3], {})[int(found[2])] = tensors.pop(name)
    for container, projections in parts.items():
        gate, up, down = (torch.stack([part[i] for i in range(len(part))]) for part in map(projections.get, ("gate", "up", "down")))
        tensors[f"{container}.gate_up_proj"], tensors[f"{container}.down_proj"] = torch.cat([gate, up], dim=1), down
    in_one_file(folder, tensors)


def in_one_file(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replaces a checkpoint's tensors."""
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def scheme_of(format_name: str, size: str) -> QuantizationScheme | str:
    """What llm-compressor is given: its preset's name, or the preset with another group size."""
    if not size:
        return PRESETS[format_name]
    scheme = preset_name_to_scheme(PRESETS[format_name], ["Linear"])
    if size == "channel":
        scheme.weights.strategy, scheme.weights.group_size = QuantizationStrategy.CHANNEL, None
    else:
        scheme.weights.group_size = int(size)
    return scheme


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether dtype, shape and bytes are the same."""
    as_bytes = [tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor for tensor in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*as_bytes)


def config(folder: Path) -> tuple[dict, list[str]]:
    """config.json without what is ignored and the group's name, and what is ignored."""
    values = json.loads((folder / "config.json").read_text())
    quantization = values["quantization_config"]
    quantization["config_groups"] = list(quantization["config_groups"].values())
    return values, quantization.pop("ignore")


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.arange(3, 20)[None]).logits


def check(prequant: str, work: Path, name: str, source: Path, label: str) -> None:
    ours, theirs = work / "ours", work / "theirs"
    for folder in (ours, theirs, work / "whole"):
        shutil.rmtree(folder, ignore_errors=True)
    format_name, _, size = label.partition(" ")
    # What stops transformers at wrong experts is loaded_experts.py's matter.
    command = [prequant, "convert", source, ours, "--format", format_name, "--quiet", "--max-shard-size", "200kB", "--guard", "off"]
    subprocess.run([*command, *(["--group-size", size] if size else [])], check=True)
    subprocess.run([prequant, "verify", ours], check=True, stdout=subprocess.DEVNULL)
    check_mapped(ours)
    our_config, ignored = config(ours)
    found = stored(ours)
    # It has no list of its own, and would quantize embeddings and convolutions too.
    kept = [tensor.removesuffix(".weight") for tensor in found if tensor.endswith(".weight")]
    # With nvfp4 it stops at a shard that holds w1 of two experts and w3 of none.
    whole = shutil.copytree(source, work / "whole")
    in_one_file(whole, stored(source))
    scheme = scheme_of(format_name, size)
    model_free_ptq(str(whole), str(theirs), scheme=scheme, ignore=[*ignored, *kept], device="cpu", max_workers=1)
    their_config, _ = config(theirs)
    assert our_config == their_config, f"{our_config} is not {their_config}"

    expected = stored(theirs)
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:4]
    different = sorted(tensor for tensor in found if not same(found[tensor], expected[tensor]))
    shared = format_name == "nvfp4" and any(map(SHARED_IN_VLLM.search, found))
    unexpected = [tensor for tensor in different if not (shared and SHARED_IN_VLLM.search(tensor))]
    assert not unexpected, f"{len(unexpected)} differ, such as {unexpected[:4]}"
    assert different or not shared, "llm-compressor shares these scales by now"
    # Others are decoded to bf16, which meets f16 in the first product; fused experts aren't what transformers looks for, and it
    # doesn't put experts' zero points together.
    loads = not (format_name == "int4-asym" and any(".experts." in tensor for tensor in found))
    loads = loads and not name.endswith("-fused") and (name != "llama-f16" or format_name.startswith("int4"))
    if loads:
        restored = work / "restored"
        shutil.rmtree(restored, ignore_errors=True)
        subprocess.run([prequant, "dequantize", ours, restored, "--quiet"], check=True)
        expected_logits = logits(ours)
        # transformers 5.23 doesn't divide by the global scales of experts.
        wrong = format_name == "nvfp4" and any(".experts." in tensor for tensor in found)
        assert torch.equal(logits(restored), expected_logits) != wrong, "logits once it is dequantized"
        assert shared or torch.equal(expected_logits, logits(theirs)), "logits differ"
    problems = vllm_check.problems(ours) or vllm_check.self_test(ours)
    assert not problems, "\n".join(problems)


def main(prequant: str, *labels: str) -> None:
    logger.remove()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    faults = list(vllm_check.matching_faults())
    assert not faults, "\n".join(faults)
    work = ROOT / "target" / "compressed-clients"
    shutil.rmtree(work, ignore_errors=True)
    for name, (values, dtype) in models().items():
        torch.manual_seed(11)
        source = work / name
        AutoModelForCausalLM.from_config(values, dtype=dtype).save_pretrained(source, max_shard_size="700KB")
        if name.endswith("-fused"):
            fuse(source)
        for label in labels or FORMATS:
            check(str(Path(prequant).resolve()), work, name, source, label)
            print(f"ok     {name}, {label}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
