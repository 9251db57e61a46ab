"""Mends PEFT's `target_parameters` for experts that bitsandbytes keeps in 4 bits.

Fused experts in 4 bits are parametrized: `module.gate_up_proj` is no parameter but a property that decodes
`module.parametrizations.gate_up_proj.original`. PEFT handles such parameters in part only. Loading a model with 4-bit
experts calls `fix_peft()`; for models that were made otherwise call it before `get_peft_model` or
`PeftModel.from_pretrained`. Parameters that aren't parametrized keep PEFT's behaviour.

Without it, for parametrized experts (fault: versions):

- `target_parameters` match whole names only, no suffixes such as `mlp.experts.down_proj`: 0.19 to 0.21
- wrappers are nested in alphabetical order, other than for bf16 experts, so adapters don't fit both: 0.19 to 0.21
- the adapter's delta is added once more at every forward: 0.21
- with two parameters of a module targeted the inner adapter has no effect and no gradient: 0.19 to 0.21
- `target_modules` such as `down_proj` match inside the parametrization and stop with an error: 0.19 to 0.21
- `merge_and_unload()` drops the experts' adapters in silence; now it is an error: 0.19 to 0.21

And for any experts: a saved adapter can't be loaded with transformers 5.14 and later (a TypeError about
`distributed_operation`): 0.19.

Not fixed here: with bitsandbytes before 0.50 and gradient checkpointing (`use_reentrant=False`) decoded experts that
have no adapter stay in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import peft
import torch.nn.utils.parametrize as parametrize
from peft.tuners.lora import layer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import transformers_weight_conversion
from peft.utils.integrations import init_empty_weights
from peft.utils.other import _get_submodules
from torch import nn
from transformers.core_model_loading import WeightConverter

__all__ = ["fix_peft"]

KNOWN = ((0, 19), (0, 20), (0, 21))
"""PEFT's minor versions that these patches were tried on."""

_originals: dict[tuple[type | ModuleType, str], Any] = {}
"""What was replaced, by where it is and its name; empty while PEFT is as it came."""


def fix_peft() -> None:
    """Applies the fixes to the installed PEFT. A second call does nothing, unless another package, such as axolotl, has put its
    own way of finding parameters in place since.

    Raises RuntimeError, and changes nothing, if PEFT's version isn't among those the fixes were tried on.
    """
    if _originals:
        # The only one that calls nothing of what it replaced: the others may be inside of that package's by now.
        BaseTuner._inject_parameters = _inject_parameters  # type: ignore[assignment,method-assign]
        return
    version = _version()
    if version not in KNOWN:
        known = ", ".join(f"{major}.{minor}" for major, minor in KNOWN)
        raise RuntimeError(
            f"peft {peft.__version__}: prequant_loader.peft.fix_peft knows the versions {known} only; "
            "install one of them, or a newer prequant-loader"
        )
    _replace(BaseTuner, "_inject_parameters", _inject_parameters)
    _replace(BaseTuner, "_check_target_module_exists", staticmethod(_check_target_module_exists))
    _replace(ParamWrapper, "_activate_lora", _activate_lora)
    _replace(ParamWrapper, "_remove_parametrizations", _remove_parametrizations)
    _replace(ParamWrapper, "merge", _merge)
    if version < (0, 20):
        _replace(transformers_weight_conversion, "build_peft_weight_mapping", _build_peft_weight_mapping)


def _restore_peft() -> None:
    """Takes the fixes back, for tests."""
    for (owner, name), original in _originals.items():
        setattr(owner, name, original)
    _originals.clear()


def _replace(owner: type | ModuleType, name: str, replacement: Any) -> None:
    _originals[owner, name] = owner.__dict__[name]
    setattr(owner, name, replacement)


def _version() -> tuple[int, int]:
    major, minor, *_ = peft.__version__.split(".")
    return int(major), int(minor)


# --- Matching and order ----------------------------------------------------------------------------------------------


def _inject_parameters(
    tuner: BaseTuner, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
) -> list[str]:
    """Wraps every parameter that `target_parameters` names, parametrized or not, whole name or suffix."""
    found = list(_matching_parameters(model, set(peft_config.target_parameters)))
    for module_name, parameter_name in found:
        key = f"{module_name}.{parameter_name}"
        if not module_name:
            raise ValueError(f"target_parameters: {parameter_name!r} belongs to the model itself and can't be wrapped")
        parent, target, target_name = _get_submodules(model, module_name)
        if isinstance(target, BaseTunerLayer) and not isinstance(target, ParamWrapper):
            raise ValueError(
                f"target_parameters: {key!r} belongs to a {type(target).__name__} that target_modules also names; "
                "name it in one of the two only"
            )
        tuner._check_target_module_compatiblity(peft_config, model, target_name)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            tuner._create_and_replace(
                peft_config,
                adapter_name,
                _wrapper_of(target, parameter_name) or target,
                target_name,
                parent,
                current_key=key,
                parameter_name=parameter_name,
            )
    names = [f"{module_name}.{parameter_name}" for module_name, parameter_name in found]
    if _version() < (0, 21):  # later versions take the names from the result
        tuner.targeted_parameter_names.extend(names)
    return names


def _matching_parameters(model: nn.Module, targets: set[str]) -> Iterator[tuple[str, str]]:
    """(module, parameter) for each parameter named by a whole name or a suffix; names are without wrappers."""
    for wrapped_name, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, parametrize.ParametrizationList)):
            continue
        module_name = wrapped_name.replace(".base_layer", "")
        for parameter_name in _parameters_in_order(module):
            key = f"{module_name}.{parameter_name}"
            if key in targets or any(key.endswith(f".{target}") for target in targets):
                yield module_name, parameter_name


def _parameters_in_order(module: nn.Module) -> list[str]:
    """A module's own parameters, parametrized ones included, in the order in which PEFT wraps them.

    A parametrized parameter has lost its place among the module's own, so the order is set here: as registered, and
    down_proj after the projections before it. That is how every experts module of transformers defines them.
    """
    plain = [name for name, _ in module.named_parameters(recurse=False)]
    if not parametrize.is_parametrized(module):
        return plain
    parametrized: Any = module.parametrizations
    return sorted([*parametrized, *plain], key=lambda name: name == "down_proj")


def _wrapper_of(module: nn.Module, parameter_name: str) -> ParamWrapper | None:
    """The wrapper that another adapter already has around this parameter."""
    while isinstance(module, ParamWrapper):
        if module.parameter_name == parameter_name:
            return module
        module = module.base_layer
    return None


def _check_target_module_exists(peft_config: Any, key: str) -> Any:
    """`experts.parametrizations.down_proj` is no module that `target_modules` could mean."""
    if ".parametrizations." in key:
        return False
    return _originals[BaseTuner, "_check_target_module_exists"].__func__(peft_config, key)


# --- Forward ---------------------------------------------------------------------------------------------------------


@contextmanager
def _activate_lora(wrapper: ParamWrapper, active_adapters: list[str]) -> Iterator[None]:
    """PEFT's, with no value left in torch's parametrization cache from before the adapter was put in, or from after.

    While PEFT puts it in, the cache is on: what the parameter is without the adapter is then decoded only once.
    """
    original = _originals[ParamWrapper, "_activate_lora"]
    base, name = wrapper.get_base_layer(), wrapper.parameter_name
    if not parametrize.is_parametrized(base, name):
        with original(wrapper, active_adapters):
            yield
        return
    cached = (id(base), name)
    try:
        with parametrize.cached(), original(wrapper, active_adapters):
            parametrize._cache.pop(cached, None)
            yield
    finally:
        parametrize._cache.pop(cached, None)


def _remove_parametrizations(wrapper: ParamWrapper) -> None:
    """PEFT's, but finds a proxy that holds the two factors, too. PEFT looks for one that holds their product."""
    factors = getattr(layer, "_LoraFactorsProxy", None)  # from 0.21 on
    base: Any = wrapper.get_base_layer()
    chain = base.parametrizations[wrapper.parameter_name]
    if factors is not None and len(chain) > 1 and isinstance(chain[-1], factors):
        del chain[-1]
    else:
        _originals[ParamWrapper, "_remove_parametrizations"](wrapper)


def _merge(wrapper: ParamWrapper, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """PEFT's, but an error where it would add the delta to a decoded copy that is then thrown away."""
    if parametrize.is_parametrized(wrapper.get_base_layer(), wrapper.parameter_name):
        raise ValueError(
            f"{wrapper.parameter_name}: an adapter can't be merged into 4-bit experts; "
            "load the original bf16 checkpoint, put the adapter on it and merge there"
        )
    _originals[ParamWrapper, "merge"](wrapper, safe_merge=safe_merge, adapter_names=adapter_names)


# --- Loading adapters ------------------------------------------------------------------------------------------------


class _OperationsByName(WeightConverter):
    """A WeightConverter that can still be given two of its attributes when it is made, as PEFT 0.19 does."""

    __slots__ = ()

    def __init__(
        self,
        source_patterns: Any,
        target_patterns: Any,
        operations: Any,
        distributed_operation: Any = None,
        quantization_operation: Any = None,
    ) -> None:
        super().__init__(source_patterns, target_patterns, operations)
        self.distributed_operation = distributed_operation
        self.quantization_operation = quantization_operation


def _build_peft_weight_mapping(weight_conversions: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT's, which makes new converters of the class of those that it is given."""
    converters = []
    for conversion in weight_conversions or ():
        if type(conversion) is WeightConverter:
            conversion = copy.copy(conversion)
            conversion.__class__ = _OperationsByName
        converters.append(conversion)
    return _originals[transformers_weight_conversion, "build_peft_weight_mapping"](converters, *args, **kwargs)
