"""Golden data for sources that ModelOpt stored: what its own quantized tensors dequantize to, on a CPU.

    scripts/make modelopt-sources            writes fixtures/modelopt-sources
    scripts/make modelopt-sources --check    makes them anew and compares byte for byte

What is in a file: see coded.py. ModelOpt rounds scales of eight-bit floats to the dtype that it decodes to.
"""

from __future__ import annotations

from pathlib import Path

import reproducible
from coded import DTYPES, TORCH_NAMES, floats, fp8, random_bytes, save

import torch
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor


def config(algorithm: str, dtype: str) -> dict:
    """A checkpoint's config.json."""
    quantization = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}
    return {"model_type": "llama", "dtype": TORCH_NAMES[dtype], "quantization_config": quantization}


def make(folder: Path) -> None:
    """Writes all files into an empty folder."""
    torch.set_num_threads(1)
    for dtype_name, dtype in DTYPES.items():
        coded, decoded = {}, {}
        for case, factor in (("q", 1.0 / 2688), ("k", 0.0173), ("v", 3.1e-5)):
            name = f"model.layers.0.self_attn.{case}_proj"
            codes = random_bytes(f"nvfp4 {case}", 16, 32)
            scale = fp8(f"nvfp4 {case} scales", 16, 4).view(torch.uint8).bitwise_and(0x7F).view(torch.float8_e4m3fn)
            double_scale = torch.tensor(factor, dtype=torch.float32)
            stored = NVFP4QTensor(torch.Size((16, 64)), dtype, codes)
            decoded[f"{name}.weight"] = stored.dequantize(
                dtype, scale=scale, double_scale=double_scale, block_sizes={-1: 16}
            )
            coded |= {
                f"{name}.weight": codes,
                f"{name}.weight_scale": scale,
                f"{name}.weight_scale_2": double_scale,
                f"{name}.input_scale": torch.tensor(0.25),
            }
        save(folder / f"nvfp4-{dtype_name}.safetensors", config("NVFP4", dtype_name), coded, decoded)

        coded, decoded = {}, {}
        for case, shape in (("tensor", ()), ("row", (24,))):
            name = f"model.layers.0.{case}_proj"
            codes = fp8(case, 24, 64)
            scale = floats(f"{case} scales", *shape, low=-16, high=-6)
            stored = FP8QTensor(torch.Size((24, 64)), dtype, codes)
            decoded[f"{name}.weight"] = stored.dequantize(dtype, scale=scale[:, None] if shape else scale)
            coded |= {
                f"{name}.weight": codes,
                f"{name}.weight_scale": scale,
                f"{name}.input_scale": torch.tensor(0.25),
            }
        save(folder / f"fp8-{dtype_name}.safetensors", config("FP8", dtype_name), coded, decoded)


if __name__ == "__main__":
    reproducible.main(reproducible.ROOT / "fixtures" / "modelopt-sources", make, __doc__ or "")
