"""Where versions of transformers differ: the only module that knows.

Compared with transformers 5.14.1 and 5.23.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any

import torch
from transformers import PreTrainedModel
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
    "GUARD",
    "ConversionOps",
    "MergeModulelist",
    "Transpose",
    "WeightConverter",
    "WeightRenaming",
    "accept_guard",
    "is_reversible",
    "refuse_guard",
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


GUARD = "prequant_loader"
"""What config.json has as `experts_implementation` after `prequant convert --guard strict`: transformers alone doesn't know it
and stops, even if it is told to ignore sizes that don't match."""


def accept_guard() -> None:
    """Lets transformers take GUARD for its own default."""
    original = PreTrainedModel.get_correct_experts_implementation
    if getattr(original, "accepts_guard", False):
        return

    @wraps(original)
    def accepting(self: PreTrainedModel, requested_experts: str | None) -> str:
        return str(original(self, None if requested_experts == GUARD else requested_experts))

    accepting.accepts_guard = True  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_experts_implementation = accepting  # type: ignore[method-assign]


def refuse_guard() -> None:
    """Has transformers stop at GUARD again, unless another package has changed the same since."""
    accepting: Any = PreTrainedModel.get_correct_experts_implementation
    if "accepts_guard" in vars(accepting):
        PreTrainedModel.get_correct_experts_implementation = accepting.__wrapped__  # type: ignore[method-assign]


def is_reversible(conversion: Any) -> bool:
    """Whether transformers can undo a conversion when it saves a model."""
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True
