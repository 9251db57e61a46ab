"""4-bit checkpoints in axolotl's staged loading for FSDP2: rank 0 holds the codes on the CPU, and hands them out in shards.

axolotl has codes as plain parameters for it, and scales as buffers of its own parametrization, `BnbNF4Parametrization`. It takes 4-bit
Linears like that from a checkpoint; this takes experts, too.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
import torch.nn.utils.parametrize as parametrize
from axolotl.monkeypatch.moe_quant import record_quantized_expert
from axolotl.utils import nf4
from axolotl.utils.nf4 import BnbNF4Parametrization
from bitsandbytes.functional import QuantState
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from .parametrization import relaid
from .quantizer import PrequantQuantizer

__all__ = ["StagedQuantizer", "keep_16_bits"]


_kept: set[str] = set()
"""While a checkpoint is loaded: the weights of Linears that are in 16 bits in it."""


def keep_16_bits() -> None:
    """Has axolotl leave the weights alone that are in 16 bits in a 4-bit checkpoint. A second call does nothing."""
    original = nf4.nf4_should_quantize
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def should_quantize(name: str, **options: Any) -> bool:
        return name not in _kept and bool(original(name, **options))

    nf4.nf4_should_quantize = should_quantize


class StagedQuantizer(PrequantQuantizer):
    """Loads what is shared out afterwards. Linears stay Linears: axolotl makes them 4-bit as their codes come in."""

    def preprocess_model(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        """Notes which Linears are in 16 bits in the checkpoint: axolotl would quantize those that config.json doesn't name."""
        made = super().preprocess_model(model, *args, **kwargs)
        linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        _kept.clear()
        if self.pre_quantized:
            _kept.update(f"{name}.weight" for name in linears - self.linears_4bit(model).keys())
        return made

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        _kept.clear()
        return super()._process_model_after_weight_loading(model, **kwargs)

    def linears_4bit(self, model: PreTrainedModel) -> dict[str, bool]:
        """The Linears that config.json doesn't keep in 16 bits, and whether axolotl has got their codes."""
        linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
        linears |= {name: module for name, module in model.named_modules() if _has_codes(module)}
        return {
            name: _has_codes(module)
            for name, module in linears.items()
            if should_convert_module(name, self.modules_to_not_convert)
        }

    def parametrize(
        self, model: PreTrainedModel, name: str, shape: tuple[int, ...], dtype: torch.dtype, quant_state: dict[str, Any]
    ) -> None:
        """As bitsandbytes' parametrization, with scales as buffers."""
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        record_quantized_expert(path, module)
        codes: torch.Tensor = getattr(module, leaf).detach().view(torch.uint8).reshape(-1, 1)
        state = QuantState.from_dict(quant_state, device=codes.device)
        state.dtype = dtype
        is_as_stored = tuple(state.shape) == tuple(shape)
        transform = BnbNF4Parametrization(state) if is_as_stored else RelaidNF4Parametrization(state, shape)
        setattr(module, leaf, nn.Parameter(codes, requires_grad=False))
        parametrize.register_parametrization(module, leaf, transform, unsafe=True)


class RelaidNF4Parametrization(BnbNF4Parametrization):  # type: ignore[misc]
    """Decodes codes that are stored in another shape than the parameter's, as `RelaidParametrization` does."""

    def __init__(self, state: QuantState, shape: tuple[int, ...]) -> None:
        super().__init__(state)
        self.parameter_shape = torch.Size(shape)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        """The parameter, decoded, from its codes; on the meta device its shape alone."""
        return relaid(super().forward(data), self.parameter_shape)


def _has_codes(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight")
