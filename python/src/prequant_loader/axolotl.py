"""An axolotl plugin: QLoRA from what prequant wrote, a folder or a repository on the hub.

In the run's YAML:

    plugins:
      - prequant_loader.axolotl.PrequantPlugin
    base_model: ./Qwen3-30B-A3B-nf4

`quantize_moe_experts` stays unset: it would have axolotl quantize experts that already are. With `qlora_sharded_model_loading` and FSDP2
rank 0 loads, and hands out shards (axolotl_staged.py). Only these two modules of the package need axolotl, and nothing else imports them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.nn.utils.parametrize as parametrize
from axolotl.integrations.base import BasePlugin
from bitsandbytes.nn.parametrize import Bnb4bitParametrization
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from .compat import GUARD
from .files import is_file
from .layout import QUANT_STATE, read_header
from .manifest import MANIFEST, SUMS
from .peft import fix_peft
from .quantizer import PrequantQuantizer, install_quantizer

__all__ = ["PrequantPlugin"]

STAGED_PARAMETRIZATIONS = ("BnbNF4Parametrization", "RelaidNF4Parametrization")
"""By name: not all versions of axolotl have them."""

ADDED_TO_CARD = b"## Loading the 4-bit experts\n"
"""How what prequant adds at the end of a model card begins."""


class PrequantPlugin(BasePlugin):  # type: ignore[misc]
    """Loads 4-bit experts as they are stored, and lets PEFT put adapters on them."""

    def pre_model_load(self, cfg: Any) -> None:
        """Checks `base_model` and `quantize_moe_experts`, then makes the loader ready."""
        check_config(cfg)
        if is_staged(cfg):
            try:
                from .axolotl_staged import StagedQuantizer, keep_16_bits
            except ImportError as error:
                raise ImportError(
                    f"this axolotl's staged loading isn't the one of 0.21 that prequant_loader knows: {error}; "
                    "remove qlora_sharded_model_loading from the YAML, or install axolotl 0.21"
                ) from error
            keep_16_bits()
            install_quantizer(StagedQuantizer)
        else:
            install_quantizer(PrequantQuantizer)

    def post_model_build(self, cfg: Any, model: Any) -> None:
        """Tells axolotl that experts are in 4 bits, so that it doesn't prepare them by decoding them all.

        A model without 4-bit experts, a dense one for instance, is prepared as ever.
        """
        if has_quantized_experts(model):
            model._moe_experts_quantized = True

    def pre_lora_load(self, cfg: Any, model: nn.Module) -> None:
        """Makes PEFT's fixes ready.

        axolotl has put its own patches for `lora_target_parameters` in place by now; those of fix_peft come on top.
        """
        fix_peft()

    def post_lora_merge(self, cfg: Any, adapter_path: str, output_path: str) -> None:
        """Takes out of a merged model, which is in 16 bits, what axolotl copied of the 4-bit folder that it began with."""
        clean(Path(output_path))


def check_config(cfg: Any) -> None:
    """Raises ValueError if a run can't start from what `base_model` names."""
    if cfg.quantize_moe_experts:
        raise ValueError(
            "quantize_moe_experts is set, but the experts of a prequant checkpoint are in 4 bits already; "
            "remove quantize_moe_experts from the YAML"
        )
    if not cfg.base_model or not is_quantized(str(cfg.base_model), cfg.revision_of_model):
        raise ValueError(
            f"base_model is {cfg.base_model!r}, whose weights aren't 4-bit ones as prequant and bitsandbytes write them; "
            "convert the checkpoint with `prequant convert` and name what it wrote, "
            "or remove prequant_loader.axolotl.PrequantPlugin from plugins"
        )


def is_staged(cfg: Any) -> bool:
    """Whether axolotl loads on rank 0 and hands the codes out in shards, which it does from 0.21 on."""
    try:
        from axolotl.loaders.nf4 import uses_staged_nf4
    except ModuleNotFoundError:
        return False
    return bool(uses_staged_nf4(cfg))


def is_quantized(base_model: str, revision: str | None = None) -> bool:
    """Whether a folder, or a repository on the hub, has 4-bit weights: its index names a quant_state, or its only file has one."""
    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": False}
    index = cached_file(base_model, SAFE_WEIGHTS_INDEX_NAME, revision=revision, **quietly)
    if index is not None:
        names = json.loads(Path(index).read_bytes()).get("weight_map", {})
    else:
        file = cached_file(base_model, SAFE_WEIGHTS_NAME, revision=revision, **quietly)
        names = read_header(Path(file)) if file is not None else {}
    return any(QUANT_STATE in name for name in names)


def clean(folder: Path) -> None:
    """Removes what speaks of 4 bits from a folder of 16-bit weights: manifest, sums, what prequant added to the model card, and the
    entry of config.json that stops clients without this package."""
    for name in (MANIFEST, SUMS):
        (folder / name).unlink(missing_ok=True)
    card = folder / "README.md"
    if is_file(card):
        own, added, _ = card.read_bytes().partition(ADDED_TO_CARD)
        if added and own.strip():
            card.write_bytes(own.rstrip(b"\n") + b"\n")
        elif added:
            card.unlink()
    path = folder / "config.json"
    if is_file(path):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("experts_implementation") == GUARD:
            del config["experts_implementation"]
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def has_quantized_experts(model: nn.Module) -> bool:
    """Whether any parameter outside Linears is decoded from 4 bits, by bitsandbytes' parametrization or by axolotl's own."""
    modules: Any = (module for module in model.modules() if parametrize.is_parametrized(module))
    return any(
        isinstance(chain[0], Bnb4bitParametrization) or type(chain[0]).__name__ in STAGED_PARAMETRIZATIONS
        for module in modules
        if not isinstance(module, nn.Linear)
        for chain in module.parametrizations.values()
    )
