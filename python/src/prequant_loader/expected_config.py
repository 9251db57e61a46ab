"""What config.json must tell clients of a checkpoint that was made by a recipe: its `quantization_config`."""

from __future__ import annotations

import fnmatch
import re
from typing import Any

BLOCK_FORMATS = ("nf4", "fp4")

GUARD_KEY = "global_compression_ratio"
"""What stops transformers where it would load experts wrongly, in compressed-tensors' layout: a number, or one of GUARDS."""

GUARDS = (
    "transformers would load random experts: use vLLM",
    "transformers misreads NVFP4 experts: use vLLM",
)


def expected_config(recipe: dict[str, Any]) -> dict[str, Any]:
    """The keys of `quantization_config` that the recipe alone decides, with their values.

    Raises:
        KeyError: the recipe lacks what its format has.
    """
    if recipe["format"] in BLOCK_FORMATS:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": recipe["format"],
            "bnb_4bit_use_double_quant": recipe["double_quant"],
            "bnb_4bit_quant_storage": recipe.get("quant_storage", "uint8"),
        }
    return {"compressed-tensors": _compressed_tensors, "modelopt": _modelopt, "gpt-oss": _gpt_oss}[recipe["layout"]](recipe)


def kept_key(recipe: dict[str, Any]) -> str:
    """The key that lists what is left unquantized."""
    if recipe["format"] in BLOCK_FORMATS:
        return "llm_int8_skip_modules"
    return "modules_to_not_convert" if recipe["layout"] == "gpt-oss" else "ignore"


def is_named(module: str, entry: str, recipe: dict[str, Any]) -> bool:
    """Whether an entry of that list means a module of a format with groups, called as its tensors are."""
    if recipe["layout"] == "modelopt":
        return fnmatch.fnmatchcase(module, entry)
    if recipe["layout"] == "compressed-tensors" and entry.startswith("re:"):
        try:
            return re.match(entry.removeprefix("re:"), module) is not None
        except re.error:
            return False  # what clients do with it is theirs; that it is there is found by the file's hash
    return module == entry


_NAMES = {"int4": "W4A16", "int4-asym": "W4A16_ASYM", "nvfp4": "NVFP4A16", "mxfp4": "MXFP4A16"}
_COMPRESSORS = {"nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized"}
_SCALES = {"nvfp4": "torch.float8_e4m3fn", "mxfp4": "torch.uint8"}


def _group_size(recipe: dict[str, Any]) -> Any:
    fixed = {"nvfp4": 16, "mxfp4": 32}
    return fixed.get(recipe["format"]) or recipe["group_size"]


def _compressed_tensors(recipe: dict[str, Any]) -> dict[str, Any]:
    form, size = recipe["format"], _group_size(recipe)
    compressor = _COMPRESSORS.get(form, "pack-quantized")
    weights = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None if size == "channel" else size,
        "num_bits": 4,
        "observer": None,
        "observer_kwargs": {},
        "scale_dtype": _SCALES.get(form),
        "strategy": "channel" if size == "channel" else "tensor_group" if form == "nvfp4" else "group",
        "symmetric": form != "int4-asym",
        "type": "int" if form.startswith("int4") else "float",
        "zp_dtype": "torch.int8" if form == "int4-asym" else None,
    }
    group = {
        "format": compressor,
        "input_activations": None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    return {
        "config_groups": {_NAMES[form]: group},
        "format": compressor,
        GUARD_KEY: None,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "transform_config": {},
        "version": "0.19.0",
    }


def _modelopt(recipe: dict[str, Any]) -> dict[str, Any]:
    weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": _group_size(recipe)}
    groups = {"group_0": {"weights": weights, "targets": ["Linear"]}}
    return {"config_groups": groups, "quant_algo": "NVFP4", "quant_method": "modelopt", "bits": 4}


def _gpt_oss(_: dict[str, Any]) -> dict[str, Any]:
    return {"quant_method": "mxfp4"}
