"""Where versions of transformers differ: the only module that knows.

Held against transformers 5.14.1 and 5.23.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

__all__ = [
    "Concatenate",
    "ConversionOps",
    "MergeModulelist",
    "Transpose",
    "WeightConverter",
    "WeightRenaming",
    "is_reversible",
    "route",
    "scoped",
]


def scoped(converter: WeightConverter, like: WeightConverter | None) -> WeightConverter:
    """`converter` with the scope of another: the part of a model whose tensors it is for."""
    for attribute in ("scope_prefix", "base_model_prefix", "force_cpu"):
        if like is not None and hasattr(like, attribute):
            setattr(converter, attribute, getattr(like, attribute))
    return converter


def route(
    name: str, conversions: Sequence[Any], prefix: str, parameters: dict[str, torch.Tensor]
) -> tuple[str, str | None]:
    """Which parameter a tensor of a checkpoint goes to, and by which converter's pattern, as transformers decides it."""
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    target, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
    if target not in parameters and name in parameters:
        target, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=parameters)
    return target, pattern


def is_reversible(conversion: Any) -> bool:
    """Whether transformers can undo a conversion when it saves a model."""
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True
