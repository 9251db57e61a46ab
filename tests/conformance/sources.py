"""Sources that are quantized themselves, and gpt-oss's layout, checked against transformers.

    scripts/conformance sources

A checkpoint in FP8 blocks, and one with gpt-oss's MXFP4 experts, convert to the bytes that their weights convert to as
transformers dequantizes and saves them. A gpt_oss model in `--layout gpt-oss` loads, and has the logits of what
`prequant dequantize` makes of it. That layout and ModelOpt's are what vLLM's weight loader expects.
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
import vllm_check
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, PretrainedConfig, Qwen3MoeConfig

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 128
SMALL = {"vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def make(folder: Path, config: PretrainedConfig) -> None:
    """A random bf16 checkpoint."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)


def to_fp8(source: Path, folder: Path) -> None:
    """The same in FP8, as DeepSeek-V3's hub has it: a scale for each block of 128 by 128."""
    shutil.copytree(source, folder)
    tensors = {}
    for name, weight in stored(source).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        rows, columns = weight.shape
        blocks = weight.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale = blocks.abs().amax(dim=(1, 3)) / 448.0
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).reshape(rows, columns)
        tensors[name], tensors[f"{name}_scale_inv"] = codes, scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }
    (folder / "config.json").write_text(json.dumps(config))


def dequantized(source: Path, folder: Path) -> None:
    """What transformers makes of a quantized checkpoint on a CPU, saved in one file."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    # One that was never quantized is saved as any other.
    vars(model.config).pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)


def convert(prequant: str, source: Path, folder: Path, *flags: str) -> dict[str, torch.Tensor]:
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([prequant, "convert", source, folder, "--quiet", *flags], check=True)
    subprocess.run([prequant, "verify", folder], check=True, stdout=subprocess.DEVNULL)
    return stored(folder)


def same_conversions(prequant: str, work: Path, coded: Path, plain: Path, *flags: str) -> None:
    """Both convert to the same tensors."""
    for format_flags in (["nf4"], ["int4", "--group-size", "32"], ["nvfp4"], ["mxfp4"]):
        found = convert(prequant, coded, work / "found", "--format", *format_flags, *flags)
        expected = convert(prequant, plain, work / "expected", "--format", *format_flags)
        assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:4]
        for name, tensor in found.items():
            other = expected[name]
            alike = tensor.dtype == other.dtype and tensor.shape == other.shape
            as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, other)]
            assert alike and torch.equal(*as_bytes), f"{name} differs, {format_flags}"


def as_vllm_expects(folder: Path) -> None:
    problems = vllm_check.problems(folder) or vllm_check.self_test(folder)
    assert not problems, "\n".join(problems)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(torch.arange(3, 20)[None]).logits


def main(prequant: str) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    prequant = str(Path(prequant).resolve())
    work = ROOT / "target" / "source-clients"
    shutil.rmtree(work, ignore_errors=True)

    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 128}
    make(work / "qwen3_moe", Qwen3MoeConfig(**SMALL, **experts, hidden_size=256, intermediate_size=384))
    to_fp8(work / "qwen3_moe", work / "fp8")
    dequantized(work / "fp8", work / "fp8-decoded")
    same_conversions(prequant, work, work / "fp8", work / "fp8-decoded")
    print("ok     FP8 in blocks")
    convert(prequant, work / "qwen3_moe", work / "modelopt", "--format", "nvfp4", "--layout", "modelopt")
    as_vllm_expects(work / "modelopt")
    print("ok     ModelOpt's layout, as vLLM expects it")

    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    make(work / "gpt_oss", GptOssConfig(**SMALL, **experts, hidden_size=256, intermediate_size=96))
    convert(prequant, work / "gpt_oss", work / "mxfp4", "--format", "mxfp4", "--layout", "gpt-oss")
    as_vllm_expects(work / "mxfp4")
    subprocess.run([prequant, "dequantize", work / "mxfp4", work / "restored", "--quiet"], check=True)
    assert torch.equal(logits(work / "mxfp4"), logits(work / "restored")), "logits differ"
    dequantized(work / "mxfp4", work / "mxfp4-decoded")
    same_conversions(prequant, work, work / "mxfp4", work / "mxfp4-decoded", "--dequantize-source")
    print("ok     gpt-oss's MXFP4, as layout and as source")


if __name__ == "__main__":
    main(*sys.argv[1:])
