"""Which weights of a checkpoint transformers finds no parameter for: by its own renames and conversions, over a model without weights."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

PACKED = "_packed"
"""The end of the name of a weight's codes in compressed-tensors' layout."""


def headers(folder: Path) -> list[str]:
    """The names of all tensors."""
    names: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            names += json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return [name for name in names if name != "__metadata__"]


def lost(model: PreTrainedModel, folder: Path, source: Path) -> list[str]:
    """The quantized weights of a converted checkpoint that the source has under other names, and of which the model takes nothing."""
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    # Of these, a quantized model has a module for each expert.
    patched = [name for name, part in model.named_modules() if type(part).__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION]

    def is_found(name: str) -> bool:
        target, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        return target in state or name in state or any(target.startswith(f"{module}.") for module in patched)

    before = set(headers(source))
    weights = [name.removesuffix(PACKED) for name in headers(folder) if name.endswith(PACKED)]
    return [name for name in weights if name not in before and not is_found(name)]
