"""Golden files of sources that are quantized already: a checkpoint as a library stores it, and what that library decodes it to.

Each file has the tensors of the checkpoint under their own names, what a weight decodes to as `decoded:NAME`, and as metadata
`config` the checkpoint's config.json. `tests/goldens/sources.rs` writes the checkpoint, decodes it and compares every byte.
"""

from __future__ import annotations

import json
from pathlib import Path

from reproducible import bell, seeded

import numpy as np
import torch
from safetensors.torch import save_file

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
TORCH_NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def save(
    path: Path,
    config: dict,
    coded: dict[str, torch.Tensor],
    decoded: dict[str, torch.Tensor],
) -> None:
    """Writes one file; `decoded` is by the names of whole weights."""
    tensors = coded | {f"decoded:{name}": tensor for name, tensor in decoded.items()}
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"config": json.dumps(config, sort_keys=True)})


def random_bytes(name: str, *shape: int) -> torch.Tensor:
    """U8 without a pattern; every byte as often as it goes."""
    count = int(np.prod(shape))
    return torch.from_numpy(seeded(name).permutation(np.arange(count) % 256).astype(np.uint8).reshape(shape))


def random_words(name: str, *shape: int) -> torch.Tensor:
    """I32 without a pattern."""
    return random_bytes(name, *shape[:-1], shape[-1] * 4).view(torch.int32)


def fp8(name: str, *shape: int) -> torch.Tensor:
    """E4M3 floats, all but NaN."""
    codes = random_bytes(name, *shape)
    codes[(codes & 0x7F) == 0x7F] = 0x7E
    return codes.view(torch.float8_e4m3fn)


def floats(name: str, *shape: int, low: int = -12, high: int = 0) -> torch.Tensor:
    """Positive F32 of many magnitudes."""
    rng = seeded(name)
    count = int(np.prod(shape))
    numbers = (np.abs(bell(rng, count)) + 0.01) * 2.0 ** rng.integers(low, high, count)
    return torch.from_numpy(numbers.astype(np.float32).reshape(shape))
