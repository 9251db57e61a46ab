"""Golden data for sources that are quantized already: what transformers makes of them, on a CPU, when it loads them.

    scripts/make source-goldens            writes fixtures/source-goldens
    scripts/make source-goldens --check    makes them anew and compares byte for byte

fp8.safetensors      CASE/weight             F8_E4M3 [rows, columns]
                     CASE/SCALES/scale       F32, BF16, F8_E8M0 or U8 (the last two powers of two), one per block
                     CASE/SCALES/DTYPE       what Fp8Dequantize gives, [rows, columns] in DTYPE
mxfp4.safetensors    blocks                  U8 [experts, rows, groups, 16], as gpt-oss stores it: all codes in each group
                     scales                  U8 [experts, rows, groups]: every byte
                     DTYPE                   what its loader gives: [experts, groups * 32, rows] in DTYPE, so transposed

deepseek_v4.safetensors, see coded.py: experts in FP4, two in an I8, and FP8 in blocks, both with exponents as `.scale`.

Fp8Dequantize takes the block's size from the weight's shape and the scales', and refuses what does not divide: there are no
short last blocks.
"""

from __future__ import annotations

from pathlib import Path

import reproducible
from coded import fp8 as fp8_without_nan
from coded import random_bytes, save
from reproducible import bell, seeded

import numpy as np
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def all_bytes(name: str, rows: int, columns: int) -> torch.Tensor:
    """Every byte, as often as it goes, in an order of its own."""
    values = np.arange(rows * columns) % 256
    return torch.from_numpy(seeded(name).permutation(values).astype(np.uint8).reshape(rows, columns))


def float_scales(rows: int, columns: int) -> torch.Tensor:
    """From ones that make all subnormal to ones that overflow, a zero, an infinity and a NaN; F32."""
    rng = seeded("float scales")
    scales = bell(rng, rows * columns) * 2.0 ** rng.integers(-12, 3, rows * columns)
    extremes = [0.0, 2.0**-140, 2.0**-126, 2.0**-24, 2.0**-15, 1.0, 300.0, 2.0**120, np.inf, np.nan]
    scales[: len(extremes)] = extremes
    return torch.from_numpy(scales).to(torch.float32).reshape(rows, columns)


def exponents(rows: int, columns: int) -> torch.Tensor:
    """Powers of two as bytes, the ends among them."""
    scales = seeded("exponents").integers(110, 135, rows * columns)
    scales[:10] = [0, 1, 2, 102, 112, 126, 127, 128, 254, 255]
    return torch.from_numpy(scales.astype(np.uint8).reshape(rows, columns))


def fp8() -> dict[str, torch.Tensor]:
    """Weights of 4 by 4 blocks: small ones, ones of odd columns, and ones as wide as DeepSeek's."""
    tensors = {}
    for case, rows, block in (("small", 8, 32), ("odd", 8, 33), ("wide", 4, 128)):
        weight = all_bytes(case, rows, 4 * block).view(torch.float8_e4m3fn)
        tensors[f"{case}/weight"] = weight
        floats, powers = float_scales(4, 4), exponents(4, 4)
        kinds = {"f32": floats, "bf16": floats.bfloat16(), "e8m0": powers.view(torch.float8_e8m0fnu), "u8": powers.clone()}
        for kind, scale in kinds.items():
            tensors[f"{case}/{kind}/scale"] = scale
            for name, dtype in DTYPES.items():
                tensors[f"{case}/{kind}/{name}"] = Fp8Dequantize(None)._dequantize_one(weight, scale, dtype)
    return tensors


def mxfp4() -> dict[str, torch.Tensor]:
    """Two experts; a group with every code, twice, for each power of two."""
    shape = (2, 16, 8)
    rng = seeded("mxfp4")
    codes = np.stack([rng.permutation(32) % 16 for _ in range(256)]).astype(np.uint8)
    blocks = torch.from_numpy(codes[:, ::2] | codes[:, 1::2] << 4).reshape(*shape, 16)
    scales = torch.from_numpy(rng.permutation(256).astype(np.uint8)).reshape(shape)
    decoded = {name: convert_moe_packed_tensors(blocks, scales, dtype=dtype) for name, dtype in DTYPES.items()}
    return {"blocks": blocks, "scales": scales} | decoded


def deepseek_v4(folder: Path) -> None:
    """A checkpoint of an expert and a projection."""
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    config = {"model_type": "deepseek_v4", "dtype": "bfloat16", "expert_dtype": "fp4", "quantization_config": quantization}
    coded, decoded = {}, {}
    for name, weight, shape in (
        ("layers.0.ffn.experts.0.w1", random_bytes("v4 expert", 16, 128).view(torch.int8), (16, 8)),
        ("layers.0.attn.wq_a", fp8_without_nan("v4 projection", 128, 256), (1, 2)),
    ):
        exponents = seeded(f"{name} scales").integers(100, 140, shape).astype(np.uint8)
        scale = torch.from_numpy(exponents).view(torch.float8_e8m0fnu)
        coded |= {f"{name}.weight": weight, f"{name}.scale": scale}
        decoded[f"{name}.weight"] = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16)
    save(folder / "deepseek_v4.safetensors", config, coded, decoded)


def make(folder: Path) -> None:
    """Writes both files into an empty folder."""
    torch.set_num_threads(1)
    save_file(fp8(), folder / "fp8.safetensors")
    deepseek_v4(folder)
    save_file(mxfp4(), folder / "mxfp4.safetensors")


if __name__ == "__main__":
    reproducible.main(reproducible.ROOT / "fixtures" / "source-goldens", make, __doc__ or "")
