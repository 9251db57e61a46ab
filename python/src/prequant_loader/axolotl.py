"""An axolotl plugin: QLoRA from a folder that prequant wrote.

In the run's YAML:

    plugins:
      - prequant_loader.axolotl.PrequantPlugin
    base_model: ./Qwen3-30B-A3B-nf4

`quantize_moe_experts` stays unset: it would have axolotl quantize experts that already are. This is the only module
of the package that needs axolotl, and nothing else of the package imports it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.utils.parametrize as parametrize
from axolotl.integrations.base import BasePlugin
from bitsandbytes.nn.parametrize import Bnb4bitParametrization
from torch import nn

from .files import is_file
from .peft import fix_peft

__all__ = ["PrequantPlugin"]


class PrequantPlugin(BasePlugin):
    """Loads 4-bit experts as they are stored, and lets PEFT put adapters on them."""

    def pre_model_load(self, cfg: Any) -> None:
        """Checks `base_model` and `quantize_moe_experts`, then makes the loader and PEFT's fixes ready.

        axolotl has put its own patches for `lora_target_parameters` in place by now; those of fix_peft come on top.
        """
        check_config(cfg)
        import prequant_loader  # noqa: F401  importing it is what makes transformers load 4-bit experts

        fix_peft()

    def post_model_build(self, cfg: Any, model: nn.Module) -> None:
        """Tells axolotl that experts are in 4 bits, so that it doesn't prepare them by decoding them all.

        A model without 4-bit experts, a dense one for instance, is prepared as ever.
        """
        if has_quantized_experts(model):
            model._moe_experts_quantized = True


def check_config(cfg: Any) -> None:
    """Raises ValueError if a run can't start from the folder that `base_model` names."""
    if cfg.quantize_moe_experts:
        raise ValueError(
            "quantize_moe_experts is set, but the experts of a prequant folder are in 4 bits already; "
            "remove quantize_moe_experts from the YAML"
        )
    base_model = cfg.base_model
    if not base_model or not is_file(Path(base_model) / "prequant.json"):
        raise ValueError(
            f"base_model is {base_model!r}, which holds no prequant.json, so it is no folder that prequant wrote; "
            "convert the checkpoint with `prequant convert` and name its folder, "
            "or remove prequant_loader.axolotl.PrequantPlugin from plugins"
        )


def has_quantized_experts(model: nn.Module) -> bool:
    """Whether bitsandbytes decodes any parameter outside its Linears."""
    return any(
        isinstance(part, Bnb4bitParametrization)
        for module in model.modules()
        if isinstance(module, parametrize.ParametrizationList)
        for part in module
    )
