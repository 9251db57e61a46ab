"""Golden data for sources in GPTQ's and AWQ's layouts: what GPTQModel's torch modules dequantize them to, on a CPU.

    scripts/make gptq-sources            writes fixtures/gptq-sources
    scripts/make gptq-sources --check    makes them anew and compares byte for byte

What is in a file: see coded.py. Zero points of GPTQ's first version are what GPTQModel makes of them when it loads them.
"""

from __future__ import annotations

import os
from pathlib import Path

import reproducible
from coded import DTYPES, TORCH_NAMES, floats, random_words, save
from reproducible import seeded

os.environ["GPTQ_TORCH_TRITON_DEQUANT"] = "0"

import numpy as np
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

ROWS, COLUMNS = 24, 128


def config(dtype: str, **quantization: object) -> dict:
    """A checkpoint's config.json."""
    return {"model_type": "llama", "dtype": TORCH_NAMES[dtype], "quantization_config": {"bits": 4} | quantization}


def order(name: str, groups: int) -> torch.Tensor:
    """The group of each column: as many of each, in an order of their own."""
    of_columns = np.arange(COLUMNS) // (COLUMNS // groups)
    return torch.from_numpy(seeded(name).permutation(of_columns).astype(np.int32))


def module(kind: type, group: int, parts: dict[str, torch.Tensor], **settings: object) -> torch.nn.Module:
    """A module of GPTQModel with these tensors."""
    linear = kind(
        bits=4, group_size=group, in_features=COLUMNS, out_features=ROWS, bias=False, register_buffers=True, **settings
    )
    for name, tensor in parts.items():
        assert getattr(linear, name).shape == tensor.shape, name
        setattr(linear, name, tensor.clone())
    return linear.eval()


def gptq(folder: Path) -> None:
    """Both versions, symmetric and not, with groups in order and out of it, and one group for a row."""
    for dtype_name in ("f16", "bf16"):
        dtype = DTYPES[dtype_name]
        for version in (1, 2):
            for symmetric in (True, False):
                coded, decoded = {}, {}
                for case, group, ordered in (("g32", 32, False), ("g64_ordered", 64, True), ("row", COLUMNS, False)):
                    name = f"model.layers.0.{case}_proj"
                    groups = COLUMNS // group
                    zeros = random_words(f"{case} zeros", groups, ROWS // 8)
                    if symmetric:
                        zeros = torch.full_like(zeros, 0x77777777 if version == 1 else 0x88888888 - 2**32)
                    parts = {
                        "qweight": random_words(f"{case} codes", COLUMNS // 8, ROWS),
                        "qzeros": zeros,
                        "scales": floats(f"{case} scales", groups, ROWS).to(dtype),
                        "g_idx": order(case, groups) if ordered else torch.arange(COLUMNS, dtype=torch.int32) // group,
                    }
                    coded |= {f"{name}.{end}": tensor for end, tensor in parts.items()}
                    linear = module(TorchLinear, group, parts, sym=symmetric, desc_act=ordered)
                    if version == 1:
                        convert_gptq_v1_to_v2_format_module(linear, bits=4, pack_dtype=torch.int32)
                    decoded[f"{name}.weight"] = linear.dequantize_weight().T
                checkpoint_format = "gptq" if version == 1 else "gptq_v2"
                says = config(dtype_name, quant_method="gptq", sym=symmetric, checkpoint_format=checkpoint_format)
                symmetry = "sym" if symmetric else "asym"
                save(folder / f"gptq-v{version}-{symmetry}-{dtype_name}.safetensors", says, coded, decoded)


def awq(folder: Path) -> None:
    """Groups of two sizes, and one for a row."""
    for dtype_name in ("f16", "bf16"):
        dtype = DTYPES[dtype_name]
        coded, decoded = {}, {}
        for case, group in (("g32", 32), ("g64", 64), ("row", COLUMNS)):
            name = f"model.layers.0.{case}_proj"
            groups = COLUMNS // group
            parts = {
                "qweight": random_words(f"awq {case} codes", COLUMNS, ROWS // 8),
                "qzeros": random_words(f"awq {case} zeros", groups, ROWS // 8),
                "scales": floats(f"awq {case} scales", groups, ROWS).to(dtype),
            }
            coded |= {f"{name}.{end}": tensor for end, tensor in parts.items()}
            linear = module(AwqTorchLinear, group, parts, sym=False, desc_act=False, dtype=dtype)
            decoded[f"{name}.weight"] = dequantize_gemm(
                linear.qweight, linear.qzeros, linear.scales, linear.bits, linear.group_size
            ).T
        says = config(dtype_name, quant_method="awq", version="gemm", zero_point=True)
        save(folder / f"awq-{dtype_name}.safetensors", says, coded, decoded)


def make(folder: Path) -> None:
    """Writes all files into an empty folder."""
    torch.set_num_threads(1)
    gptq(folder)
    awq(folder)


if __name__ == "__main__":
    reproducible.main(reproducible.ROOT / "fixtures" / "gptq-sources", make, __doc__ or "")
