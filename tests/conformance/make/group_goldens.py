"""Golden data for group quantization: what llm-compressor's model-free path makes, on a CPU, of awkward inputs.

    scripts/make group-goldens            writes fixtures/group-goldens
    scripts/make group-goldens --check    makes them anew and compares byte for byte

input-DTYPE.safetensors     CASE                   a weight [rows, columns] in DTYPE
SCHEME-DTYPE.safetensors    CASE/gSIZE/packed      as compressed-tensors stores it: I32 or U8
                            CASE/gSIZE/scale       the source's dtype, E4M3 or U8
                            CASE/gSIZE/zero_point  I32, int4-asym only: packed along rows
                            CASE/gSIZE/global      F32 [1], nvfp4 only
                            CASE/gSIZE/restored    what compressed-tensors' decompress gives

SIZE is the group's columns; `channel` is a whole row. Without padding, a group's size divides the columns.
"""

from __future__ import annotations

from pathlib import Path

import reproducible
from reproducible import bell, seeded

import numpy as np
import torch
from compressed_tensors.compressors import compress_module, decompress_module
from compressed_tensors.quantization import QuantizationScheme, QuantizationStrategy, preset_name_to_scheme
from llmcompressor.entrypoints.model_free.lifecycle import calibrate_weight, initialize_quantized_linear
from safetensors.torch import save_file

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
PRESETS = {"int4": "W4A16", "int4-asym": "W4A16_ASYM", "nvfp4": "NVFP4A16", "mxfp4": "MXFP4A16"}
COLUMNS = 256


def cases(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights, by name."""
    info = torch.finfo(dtype)
    rng = seeded("group goldens")

    def normal(rows: int, columns: int = COLUMNS) -> np.ndarray:
        return bell(rng, rows * columns).reshape(rows, columns)

    zeros = normal(4) * 0.02
    zeros[0] = 0.0
    zeros[1, :160] = -0.0
    zeros[2, ::3] = -0.0
    single = np.zeros((4, COLUMNS))
    single[[0, 1, 2], [5, 131, 255]] = [0.37, -2e-4, 7.0]
    # Every quarter from -8 to 8 in a group whose largest magnitude makes the scale 1, or a power of two.
    quarters = np.arange(COLUMNS).reshape(1, -1) % 65 / 4.0 - 8.0
    ties = np.concatenate([np.clip(quarters, -limit, limit) for limit in (7.5, 6.0, 7.0, 4.0)])
    ties[:, ::16] = np.abs(ties).max(axis=1, keepdims=True)
    tiny = normal(6) * float(info.tiny) * 2.0 ** np.arange(-8, 16, 4).reshape(6, 1)
    huge = np.clip(normal(4) / 3.0, -1.0, 1.0) * float(info.max) * np.array([[1.0], [0.5], [2.0**-6], [2.0**-12]])
    spread = normal(8) * 2.0 ** rng.integers(-12, 4, (8, COLUMNS // 16)).repeat(16, axis=1)
    mantissas = (1.0 + np.arange(COLUMNS) / 128.0 % 1.0).reshape(1, -1) * 2.0 ** np.arange(-3, 5).repeat(32)
    named = {
        "normal": normal(8) * 0.02,
        "heavy_tailed": normal(8) * 0.01 / (rng.random((8, COLUMNS)) + 1e-2),
        "spread": spread,
        "zeros": zeros,
        "all_zero": np.zeros((2, COLUMNS)),
        "single_nonzero": single,
        "ties": ties,
        "scaled_ties": ties * 2.0**-7,
        "mantissas": np.concatenate([mantissas, -mantissas, mantissas * 2.0**-6]),
        "equal_magnitudes": np.where(rng.random((4, COLUMNS)) < 0.5, -0.37, 0.37),
        "positive": np.abs(normal(4)) * 0.02 + 0.01,
        "negative": -np.abs(normal(4)) * 0.02 - 0.01,
        "skewed": normal(4) * 0.02 + 0.05,
        "subnormal": tiny,
        "huge": huge,
        "nine_rows": normal(9) * 0.3,
        "narrow": normal(3, 96) * 0.02,
        "odd": normal(5, 100) * 0.02,
        "one_row": normal(1, 33),
    }
    return {name: torch.tensor(values, dtype=torch.float64).to(dtype) for name, values in named.items()}


def schemes(name: str) -> dict[str, QuantizationScheme]:
    """The preset in its group sizes."""
    made = {}
    for size in (32, 64, 128, "channel") if name.startswith("int4") else (None,):
        scheme = preset_name_to_scheme(PRESETS[name], ["Linear"])
        if size == "channel":
            scheme.weights.strategy, scheme.weights.group_size = QuantizationStrategy.CHANNEL, None
        elif size:
            scheme.weights.group_size = size
        made[str(size or scheme.weights.group_size)] = scheme
    return made


def quantize(weight: torch.Tensor, scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
    """What the model-free path stores for a weight, and what is read back."""
    module = initialize_quantized_linear(weight, scheme, "cpu")
    calibrate_weight(module)
    compress_module(module)
    kinds = {"weight_packed": "packed", "weight_scale": "scale", "weight_zero_point": "zero_point",
             "weight_global_scale": "global"}  # fmt: skip
    stored = {kinds[key]: value.clone() for key, value in module.state_dict().items() if key in kinds}
    decompress_module(module)
    return stored | {"restored": module.weight.data.clone()}


def make(folder: Path) -> None:
    for dtype_name, dtype in DTYPES.items():
        inputs = cases(dtype)
        save_file(inputs, folder / f"input-{dtype_name}.safetensors")
        for name in PRESETS:
            outputs = {}
            for case, weight in inputs.items():
                for size, scheme in schemes(name).items():
                    if size == "channel" or weight.shape[1] % int(size) == 0:
                        stored = quantize(weight, scheme)
                        outputs |= {f"{case}/g{size}/{kind}": value.contiguous() for kind, value in stored.items()}
            save_file(outputs, folder / f"{name}-{dtype_name}.safetensors")


if __name__ == "__main__":
    reproducible.main(reproducible.ROOT / "fixtures" / "group-goldens", make, __doc__ or "")
