"""Decides how each 4-bit tensor of a checkpoint is loaded into a model, and checks it before anything is loaded."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence, Set
from copy import deepcopy
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .compat import Concatenate, MergeModulelist, Transpose, WeightConverter, route
from .errors import PrequantError
from .layout import CONVERT_AGAIN, EXPERT_NUMBER, STORAGES, Checkpoint, QuantizedTensor
from .parametrization import is_padded, is_transposed

LOAD_AS_WRITTEN = "load it with the model it was converted for, whose config.json lies beside it"


class Assembly(Enum):
    """How a parameter is made of tensors of the checkpoint."""

    WHOLE = "one 3-D tensor, in the parameter's layout"
    EXCHANGEABLE = "one 3-D tensor, which transformers transposes if its shape says so"
    STACKED = "one matrix per expert and projection"
    JOINED = "one 3-D tensor per projection"


@dataclass
class ExpertParameter:
    """A 3-D parameter for all experts of a layer, and the 4-bit tensors it is made of."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """That of the model's own parameter."""
    assembly: Assembly
    converter: WeightConverter | None
    """What transformers makes the parameter with when it is in bf16, if not of one tensor of its shape."""
    sources: list[list[QuantizedTensor]]
    """By the converter's source patterns, then by expert if each has a tensor of its own."""

    @property
    def first(self) -> QuantizedTensor:
        return self.sources[0][0]


@dataclass
class Plan:
    """All expert parameters that are stored in 4 bits, and while a model is loaded their statistics.

    Copies are the same object: transformers copies converters, with all they hold, for every tensor.
    """

    parameters: dict[str, ExpertParameter] = field(default_factory=dict)
    loaded: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By parameter: its quant_state by name, as a file has it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self


def make_plan(checkpoint: Checkpoint, model: PreTrainedModel, conversions: Sequence[Any], linears: Set[str]) -> Plan:
    """Decides for every 4-bit tensor where it goes.

    Args:
        checkpoint: what is on disk.
        model: the model on the meta device.
        conversions: transformers' own conversion of the checkpoint's tensors to the model's.
        linears: the modules of the model that are Linears in 4 bits.

    Raises:
        PrequantError: a tensor doesn't fit the model.
    """
    parameters = model.state_dict()
    prefix = model.base_model_prefix
    converters = {
        pattern: entry for entry in conversions if isinstance(entry, WeightConverter) for pattern in entry.source_patterns
    }
    conversions = deepcopy(conversions)  # they remember what they were used for, and saving goes by that
    groups: dict[str, list[tuple[str | None, QuantizedTensor]]] = defaultdict(list)
    for name, tensor in checkpoint.quantized.items():
        target, pattern = route(name, conversions, prefix, parameters)
        groups[target].append((pattern, tensor))
    plain = {name: route(name, conversions, prefix, parameters)[0] for name in checkpoint.plain}
    weights = {f"{linear}.weight" for linear in linears}
    _check_plain(checkpoint, parameters, weights, plain)
    plan = Plan()
    for target, members in groups.items():
        if target not in parameters:
            _check_absent(model, target, members[0][1])
        elif target in weights:
            _check_linear(model, target, members)
        else:
            plan.parameters[target] = _expert_parameter(target, parameters[target], members, converters)
    _check_complete(checkpoint, model, parameters, weights, plan, groups.keys() | set(plain.values()))
    return plan


def check_config(checkpoint: Checkpoint, config: Any, dtype: torch.dtype) -> None:
    """config.json's quantization_config, as transformers has it, says what every quant_state says.

    Codes that are stored as floats must be loaded in their dtype: transformers would convert them to another, as if they were numbers.

    Raises:
        PrequantError: one says otherwise.
    """
    quant_type = getattr(config, "bnb_4bit_quant_type", None)
    is_double = getattr(config, "bnb_4bit_use_double_quant", None)
    for tensor in checkpoint.quantized.values():
        if tensor.storage not in ("uint8", str(dtype).removeprefix("torch.")):
            way_out = f"load it with dtype=torch.{tensor.storage}, or convert it with --quant-storage"
            raise _misfit(tensor, f"its codes are stored as {tensor.storage}", f"the model's {dtype}", way_out)
        if quant_type is not None and tensor.quant_type != quant_type:
            found, expected = f"it is {tensor.quant_type}", f"{quant_type}, as config.json's bnb_4bit_quant_type says"
            raise _misfit(tensor, found, expected, CONVERT_AGAIN)
        # save_pretrained writes experts that were put together with their scales as they are in the model: restored to f32.
        is_restored = is_double and len(tensor.shape) == 3
        if is_double is not None and not is_restored and (tensor.nested_block_size is not None) != is_double:
            found = f"its scales are {'not ' if is_double else ''}quantized"
            expected = f"what config.json says: bnb_4bit_use_double_quant is {is_double}"
            raise _misfit(tensor, found, expected, CONVERT_AGAIN)


def _expert_parameter(
    target: str,
    parameter: torch.Tensor,
    members: list[tuple[str | None, QuantizedTensor]],
    converters: dict[str, WeightConverter],
) -> ExpertParameter:
    """A parameter and its tensors, known to fit."""
    pattern, first = members[0]
    _check_can_be_experts(target, parameter, [tensor for _, tensor in members])
    converter = converters[pattern] if pattern is not None else None
    assembly = _assembly(first, converter)
    sources = [[tensor for _, tensor in members]]
    if assembly in (Assembly.STACKED, Assembly.JOINED) and converter is not None:
        sources = [
            sorted((tensor for found, tensor in members if found == source), key=_expert)
            for source in converter.source_patterns
        ]
    made = ExpertParameter(target, tuple(parameter.shape), parameter.dtype, assembly, converter, sources)
    if assembly is Assembly.STACKED:
        _check_experts(made)
        _check_matrices(made, [[tensor.shape for tensor in source] for source in sources])
    elif assembly is Assembly.JOINED:
        _check_joined(made)
    else:
        _check_whole(made)
    _check_same_format(made)
    return made


def _expert(tensor: QuantizedTensor) -> int:
    """The expert's number in a name."""
    number = EXPERT_NUMBER.search(tensor.name)
    return int(re.sub(r"\D", "", number.group())) if number else 0


def _assembly(first: QuantizedTensor, converter: WeightConverter | None) -> Assembly:
    operations = converter.operations if converter is not None else []
    match operations:
        case []:
            return Assembly.WHOLE
        case [MergeModulelist(dim=0)] | [MergeModulelist(dim=0), Concatenate(dim=1)]:
            return Assembly.STACKED
        case [Concatenate(dim=1)]:
            return Assembly.JOINED
        case [Transpose(dim0=1, dim1=2, check_dims=True)]:
            return Assembly.EXCHANGEABLE
    raise _misfit(
        first,
        f"transformers makes the model's parameter of it by {operations}, which isn't known for 4-bit tensors",
        "stacking, concatenation of gate and up, or transposition",
        "convert with --exclude for these tensors, or with a version of transformers that stores them otherwise",
    )


# --- Checks ----------------------------------------------------------------------------------------------------------


def _check_plain(
    checkpoint: Checkpoint, parameters: dict[str, torch.Tensor], weights: Set[str], targets: dict[str, str]
) -> None:
    """No tensor that lacks its statistics, no bf16 tensor for a 4-bit Linear."""
    for name, target in targets.items():
        tensor = checkpoint.plain[name]
        if target not in parameters:
            continue
        linear = target in weights
        if tensor.dtype == "U8" and (linear or parameters[target].is_floating_point()):
            found, expected = "it is U8 without any statistics", f"{name}.absmax, {name}.quant_map and its quant_state"
            raise PrequantError(tensor.path, name, found, expected, CONVERT_AGAIN)
        if linear and tensor.dtype != "U8":
            found, expected = f"it is {tensor.dtype}", "4 bits, because config.json doesn't say otherwise"
            way_out = f"name {target.removesuffix('.weight')!r} in llm_int8_skip_modules in config.json"
            raise PrequantError(tensor.path, name, found, expected, way_out)


def _check_absent(model: PreTrainedModel, target: str, tensor: QuantizedTensor) -> None:
    """Experts that the model has no place for, unless transformers leaves them out on purpose, and its report has them."""
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    is_expert = len(tensor.shape) == 3 or EXPERT_NUMBER.search(tensor.name)
    if is_expert and not _is_of_another_layer(model, target) and not any(re.search(pattern, name) for pattern in ignored for name in (target, tensor.name)):
        found = f"it holds experts, and {type(model).__name__} has no parameter {target!r}"
        raise _misfit(tensor, found, "a model with these experts")


def _is_of_another_layer(model: nn.Module, target: str) -> bool:
    """Whether a name is of a layer after the model's last: one for multi-token prediction, or the model was made shorter."""
    module, owner = model, ""
    for part in target.split(".")[:-1]:
        children = dict(module.named_children())
        if part not in children:
            return part.isdigit() and owner != "experts" and int(part) >= len(children) > 0
        module, owner = children[part], part
    return False


def _check_linear(model: PreTrainedModel, target: str, members: list[tuple[str | None, QuantizedTensor]]) -> None:
    pattern, tensor = members[0]
    if pattern is not None or len(members) > 1:
        raise _misfit(
            tensor,
            f"transformers makes the model's Linear {target!r} of it by a conversion that isn't known for 4-bit tensors",
            "a Linear that is stored as the model has it",
            "convert with --exclude for these tensors",
        )
    module: Any = model.get_submodule(target.rpartition(".")[0])
    expected = (module.out_features, module.in_features)
    if tensor.shape != expected:
        raise _misfit(tensor, f"its shape is {list(tensor.shape)}{_swapped(tensor.shape, expected)}", f"{list(expected)}")


def _check_can_be_experts(target: str, parameter: torch.Tensor, tensors: list[QuantizedTensor]) -> None:
    for tensor in tensors:
        if parameter.dim() != 3:
            found = f"it is in 4 bits, and the model's parameter {target!r} is no 4-bit Linear and no 3-D experts"
            way_out = "remove it from llm_int8_skip_modules in config.json if it is a Linear, or convert with --exclude"
            raise _misfit(tensor, found, "a tensor that the model can have in 4 bits", way_out)
        if tensor.codes.dtype not in STORAGES:
            raise _misfit(tensor, f"its codes are {tensor.codes.dtype}", " or ".join(STORAGES), CONVERT_AGAIN)


def _check_same_format(made: ExpertParameter) -> None:
    """All tensors of a parameter are alike, but for their shapes."""
    first = made.first
    for source in made.sources:
        for tensor in source:
            for what in ("quant_type", "block_size", "nested_block_size", "storage"):
                found, expected = getattr(tensor, what), getattr(first, what)
                if found != expected:
                    raise _misfit(tensor, f"its {what} is {found}", f"{expected}, as that of {first.name!r}", CONVERT_AGAIN)


def _check_experts(made: ExpertParameter) -> None:
    """Every expert has every matrix."""
    experts = made.shape[0]
    for i, source in enumerate(made.sources):
        numbers = [_expert(tensor) for tensor in source]
        if numbers == list(range(experts)):
            continue
        pattern = made.converter.source_patterns[i] if made.converter is not None else made.name
        absent = sorted(set(range(experts)) - set(numbers))
        found = f"{pattern!r} beside it is there for {len(numbers)} experts in 4 bits"
        if absent:
            found += f", and not for expert {absent[0]}"
        raise _misfit(made.first, found, f"{experts} experts, 0 to {experts - 1}, all in 4 bits or none", CONVERT_AGAIN)


def _check_matrices(made: ExpertParameter, shapes: list[list[tuple[int, ...]]]) -> None:
    """Each expert's matrices are the parameter's rows, one after the other."""
    _, rows, columns = made.shape
    expected = (rows // len(shapes), columns)
    for source, tensors in zip(shapes, made.sources, strict=True):
        for shape, tensor in zip(source, tensors, strict=True):
            if shape != expected:
                found = f"its shape is {list(shape)}{_swapped(shape, expected)}"
                raise _misfit(tensor, found, f"{list(expected)} for the model's {made.name!r} {list(made.shape)}")


def _check_joined(made: ExpertParameter) -> None:
    """Each source is all experts' matrices, and their blocks end where an expert ends."""
    for source in made.sources:
        if len(source) != 1 or len(source[0].shape) != 3 or source[0].shape[0] != made.shape[0]:
            tensor = source[0] if source else made.first
            raise _misfit(tensor, f"its shape is {list(tensor.shape)}", f"one tensor [{made.shape[0]}, _, _]")
        matrix = source[0].shape[1] * source[0].shape[2]
        if matrix % source[0].block_size or source[0].nested_block_size is not None:
            found = f"an expert has {matrix} elements in blocks of {source[0].block_size} that go on into the next expert"
            way_out = "convert with --experts fuse"
            raise _misfit(source[0], found, "whole blocks an expert, without double quantization", way_out)
    _check_matrices(made, [[tensor.shape[1:] for tensor in source] for source in made.sources])


def _check_whole(made: ExpertParameter) -> None:
    """One tensor of the parameter's shape, or of one that RelaidParametrization decodes."""
    first = made.first
    if len(made.sources[0]) > 1:
        other = made.sources[0][1]
        raise _misfit(other, f"it becomes {made.name!r}, and so does {first.name!r}", "one of the two", CONVERT_AGAIN)
    fits = first.shape == made.shape or is_padded(first.shape, made.shape, first.block_size)
    if made.assembly is Assembly.EXCHANGEABLE:
        fits = fits or is_transposed(first.shape, made.shape)
    if not fits:
        found = f"its shape is {list(first.shape)}{_swapped(first.shape, made.shape)}"
        raise _misfit(first, found, f"{list(made.shape)}, that of the model's {made.name!r}")


def _check_complete(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    parameters: dict[str, torch.Tensor],
    weights: Set[str],
    plan: Plan,
    filled: set[str],
) -> None:
    """Every parameter that is 4-bit in this model gets its codes: transformers would fill it with random numbers.

    That is each weight of a 4-bit Linear, and each 3-D parameter of experts: of a module that has others in 4 bits, of a layer
    beside one that has, or by its name.
    """
    modules = {name.rpartition(".")[0] for name in plan.parameters}
    alike = {_in_any_layer(name) for name in plan.parameters}
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or []
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, parameter in parameters.items():
        module, _, leaf = name.rpartition(".")
        is_expert = parameter.dim() == 3 and (module in modules or re.search(r"(^|\.)experts(\.|$)", module))
        if name in filled or not (name in weights or is_expert or _in_any_layer(name) in alike):
            continue
        if name in tied or any(re.search(pattern, name) for pattern in ignored):
            continue
        there = next(iter([*checkpoint.quantized.values()]), None)
        plain = next(iter(checkpoint.plain.values()), None)
        path = there.codes.path if there else plain.path if plain else Path()
        expected = "all of the experts" if is_expert else "its codes and statistics"
        raise PrequantError(path.parent, "", f"nothing is there for {name!r}", expected, CONVERT_AGAIN)


def _in_any_layer(name: str) -> str:
    """A parameter's name without its layer's number."""
    return re.sub(r"\.\d+\.", ".*.", name)


def _swapped(found: Sequence[int], expected: Sequence[int]) -> str:
    same = list(found[:-2]) == list(expected[:-2]) and list(found[-2:]) == list(expected[-2:])[::-1]
    return " (rows and columns are exchanged)" if same and list(found) != list(expected) else ""


def _misfit(tensor: QuantizedTensor, found: str, expected: str, way_out: str = LOAD_AS_WRITTEN) -> PrequantError:
    path: Path = tensor.codes.path
    return PrequantError(path, tensor.name, found, expected, way_out)
