"""Checkpoints of manifest schema 1, as prequant 0.1.0 wrote them: fixtures/converted-0.1.0.

    scripts/make converted path/to/prequant-0.1.0 [--check]

Writes two tiny sources (random weights, the same each time) and converts them with that program, once per format and layout.
--check compares with what is committed instead.

They are there to prove that newer versions read what 0.1.0 wrote. A newer version writes another manifest, so that they can't be
made anew with it: this refuses to. To have 0.1.0, check out its commit and `cargo build --release`.
"""

import argparse
import filecmp
import json
import math
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "fixtures/converted-0.1.0"

# Folder, source, options.
CONVERTED = [
    ("nf4", "source", ["--format", "nf4"]),
    ("nf4-double-quant", "source", ["--format", "nf4", "--double-quant"]),
    ("nf4-fused", "source", ["--format", "nf4", "--experts", "fuse"]),
    ("fp4", "source", ["--format", "fp4"]),
    ("int4", "source", ["--format", "int4", "--group-size", "32"]),
    ("int4-asym", "source", ["--format", "int4-asym", "--group-size", "32"]),
    ("nvfp4", "source", ["--format", "nvfp4"]),
    ("nvfp4-modelopt", "source", ["--format", "nvfp4", "--layout", "modelopt"]),
    ("mxfp4", "source", ["--format", "mxfp4"]),
    ("mxfp4-gpt-oss", "source-gpt-oss", ["--format", "mxfp4", "--layout", "gpt-oss"]),
]


def qwen3_moe():
    """Two experts, attention with more than a group in a row, and what stays in its dtype."""
    tensors = {"model.embed_tokens.weight": [8, 32], "lm_head.weight": [8, 32], "model.norm.weight": [32]}
    layer = "model.layers.0"
    tensors[f"{layer}.self_attn.o_proj.weight"] = [32, 64]
    tensors[f"{layer}.mlp.gate.weight"] = [2, 32]
    for expert in range(2):
        tensors[f"{layer}.mlp.experts.{expert}.gate_proj.weight"] = [32, 32]
        tensors[f"{layer}.mlp.experts.{expert}.up_proj.weight"] = [32, 32]
        tensors[f"{layer}.mlp.experts.{expert}.down_proj.weight"] = [32, 32]
    config = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16", "hidden_size": 32,
              "moe_intermediate_size": 32, "num_experts": 2, "num_hidden_layers": 1}
    return config, tensors


def gpt_oss():
    """Two experts, fused and transposed as gpt-oss has them."""
    experts = "model.layers.0.mlp.experts"
    tensors = {
        f"{experts}.gate_up_proj": [2, 64, 64],
        f"{experts}.gate_up_proj_bias": [2, 64],
        f"{experts}.down_proj": [2, 32, 64],
        f"{experts}.down_proj_bias": [2, 64],
        "model.layers.0.self_attn.q_proj.weight": [32, 64],
        "lm_head.weight": [8, 64],
    }
    config = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "dtype": "bfloat16", "hidden_size": 64,
              "intermediate_size": 32, "num_local_experts": 2, "num_hidden_layers": 1}
    return config, tensors


def numbers(seed, count):
    """Random bf16 around zero, without a library whose generator may change."""
    state = seed
    data = bytearray()
    for _ in range(count):
        value = 0.1
        for _ in range(2):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            value *= (state >> 40) / 2**23 - 1
        data += struct.pack("<f", value)[2:]
    return bytes(data)


def write_source(folder, config, tensors):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for seed, (name, shape) in enumerate(tensors.items()):
        content = numbers(seed, math.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def make(program, folder):
    write_source(folder / "source", *qwen3_moe())
    write_source(folder / "source-gpt-oss", *gpt_oss())
    for name, source, options in CONVERTED:
        command = [program, "convert", folder / source, folder / name, "--device", "cpu", "--quiet", *options]
        subprocess.run(command, check=True)


def files(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def main():
    parser = argparse.ArgumentParser(prog="scripts/make converted", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="a prequant 0.1.0")
    parser.add_argument("--check", action="store_true", help="compare with what is committed")
    arguments = parser.parse_args()
    version = subprocess.run([arguments.program, "--version"], check=True, capture_output=True, text=True).stdout.strip()
    if version != "prequant 0.1.0":
        sys.exit(f"{arguments.program} is {version!r}: these fixtures are what prequant 0.1.0 wrote")
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "made"
        make(arguments.program, made)
        if not arguments.check:
            shutil.rmtree(FOLDER, ignore_errors=True)
            shutil.copytree(made, FOLDER)
            return
        different = sorted(files(made) ^ files(FOLDER))
        common = [str(path) for path in files(made) & files(FOLDER)]
        different += filecmp.cmpfiles(made, FOLDER, common, shallow=False)[1]
        if different:
            sys.exit(f"fixtures/converted-0.1.0 differs: {', '.join(map(str, different))}")


if __name__ == "__main__":
    main()
