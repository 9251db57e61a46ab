"""What prequant writes in compressed-tensors' layout, held against llm-compressor and transformers.

    scripts/check-compressed PREQUANT

For random checkpoints, converted by both: the same tensors under the same names, byte for byte; config.json equal but for
what is ignored; and, where transformers can load the format, logits equal to the bit. llm-compressor forgets that an
expert's gate and up must share NVFP4's global scale unless they are called w1 and w3, as Mixtral's are.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from llmcompressor import model_free_ptq
from loguru import logger
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PretrainedConfig, Qwen3MoeConfig

ROOT = Path(__file__).resolve().parents[2]
PRESETS = {"int4": "W4A16", "mxfp4": "MXFP4A16", "nvfp4": "NVFP4A16"}
SHARED = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


def models() -> dict[str, tuple[PretrainedConfig, torch.dtype]]:
    """Configurations with the dtype of the checkpoint."""
    experts = {"num_experts_per_tok": 2}
    return {
        "llama": (LlamaConfig(**SHARED), torch.bfloat16),
        "llama-f16": (LlamaConfig(**SHARED), torch.float16),
        "qwen3_moe": (Qwen3MoeConfig(**SHARED, **experts, num_experts=4, moe_intermediate_size=128), torch.bfloat16),
        "mixtral": (MixtralConfig(**SHARED, **experts, num_local_experts=4), torch.bfloat16),
    }


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether dtype, shape and bytes are the same."""
    as_bytes = [tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor for tensor in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*as_bytes)


def config(folder: Path) -> tuple[dict, list[str]]:
    """config.json without what is ignored, and that."""
    values = json.loads((folder / "config.json").read_text())
    return values, values["quantization_config"].pop("ignore")


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.arange(3, 20)[None]).logits


def check(prequant: str, work: Path, name: str, source: Path, format_name: str) -> None:
    ours, theirs = work / "ours", work / "theirs"
    for folder in (ours, theirs):
        shutil.rmtree(folder, ignore_errors=True)
    command = [prequant, "convert", source, ours, "--format", format_name, "--quiet", "--max-shard-size", "200kB"]
    subprocess.run(command, check=True)
    subprocess.run([prequant, "verify", ours], check=True, stdout=subprocess.DEVNULL)
    our_config, ignored = config(ours)
    # It has no list of its own: it would quantize embeddings too.
    ignore = [*ignored, "re:.*embed_tokens.*"]
    model_free_ptq(str(source), str(theirs), scheme=PRESETS[format_name], ignore=ignore, device="cpu", max_workers=1)
    their_config, _ = config(theirs)
    assert our_config == their_config, f"{our_config} is not {their_config}"

    found, expected = stored(ours), stored(theirs)
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:4]
    different = sorted(tensor for tensor in found if not same(found[tensor], expected[tensor]))
    if format_name == "nvfp4" and name == "qwen3_moe":
        assert different and all(".experts." in tensor and ".down_proj" not in tensor for tensor in different), different[:4]
        return
    assert not different, f"{len(different)} differ, such as {different[:4]}"
    if name != "llama-f16" or format_name == "int4":  # others are decoded to bf16, which meets f16 in the first product
        assert torch.equal(logits(ours), logits(theirs)), "logits differ"


def main(prequant: str) -> None:
    logger.remove()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    work = ROOT / "target" / "compressed-clients"
    shutil.rmtree(work, ignore_errors=True)
    for name, (values, dtype) in models().items():
        torch.manual_seed(11)
        source = work / name
        AutoModelForCausalLM.from_config(values, dtype=dtype).save_pretrained(source, max_shard_size="700KB")
        for format_name in PRESETS:
            check(str(Path(prequant).resolve()), work, name, source, format_name)
            print(f"ok     {name}, {format_name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
