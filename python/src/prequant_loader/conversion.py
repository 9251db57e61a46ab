"""Converters for transformers: twins of its own that also take the statistics of 4-bit experts.

transformers loads by patterns: a converter collects the tensors whose names match one of its source patterns and makes
one parameter of them. For experts in 4 bits each such converter is replaced by a twin that collects codes and statistics. The
codes become the model's parameter, as they are; statistics are put by until the model is complete.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from bitsandbytes.utils import pack_dict_to_tensor

from .compat import ConversionOps, WeightConverter, scoped
from .layout import QUANT_STATE, STATISTICS, QuantizedTensor
from .plan import Assembly, ExpertParameter, Plan

Collected = dict[str, list[torch.Tensor]]
"""Tensors by the pattern they were found by; experts in their order."""


def with_twins(conversions: Sequence[Any], plan: Plan, quantizer: Any) -> list[Any]:
    """`conversions`, where the converters that 4-bit experts go through are replaced by twins, and more for experts that
    go through none."""
    replaced: dict[int, WeightConverter] = {}
    direct: dict[str, WeightConverter] = {}
    for made in plan.parameters.values():
        if made.assembly in (Assembly.STACKED, Assembly.JOINED):
            if made.converter is not None and id(made.converter) not in replaced:
                replaced[id(made.converter)] = _twin_of(made.converter, plan, quantizer)
        else:
            target = _after_last_number(made.name)
            if target not in direct:
                direct[target] = _direct(target, made.converter, plan, quantizer)
    twins = [replaced.get(id(entry), entry) for entry in conversions]
    return list(direct.values()) + twins


def _twin_of(converter: WeightConverter, plan: Plan, quantizer: Any) -> WeightConverter:
    """A converter for the same tensors and their statistics."""
    origins: dict[str, tuple[int, str]] = {}
    for i, source in enumerate(converter.source_patterns):
        numbered = source.replace(".*.", r"\.\d+\.")
        origins |= {pattern: (i, part) for pattern, part in _patterns(numbered)}
    return _converter(origins, converter.target_patterns[0], converter, plan, quantizer)


def _direct(target: str, converter: WeightConverter | None, plan: Plan, quantizer: Any) -> WeightConverter:
    """A converter for a parameter that is stored under its own name."""
    anchored = re.escape(target) if target.startswith(".") else f"^{re.escape(target)}"
    origins = {pattern: (0, part) for pattern, part in _patterns(anchored)}
    made = _converter(origins, target, converter, plan, quantizer)
    if converter is None or not hasattr(made, "scope_prefix"):
        return made
    made.scope_prefix = None  # the target is matched by all that follows the layer's number, wherever that is
    return made


def _patterns(source: str) -> Iterator[tuple[str, str]]:
    """A pattern each for the codes and for every statistic. They end where the name ends, so that none is another's begin."""
    for part in sorted(STATISTICS, key=len, reverse=True):
        yield rf"{source}\.{re.escape(part)}$", part
    yield f"{source}$", ""


def _converter(
    origins: dict[str, tuple[int, str]], target: str, like: WeightConverter | None, plan: Plan, quantizer: Any
) -> WeightConverter:
    operation = LoadExperts(origins, like, plan, quantizer)
    return scoped(WeightConverter(list(origins), target, [operation]), like)


def _after_last_number(name: str) -> str:
    """What follows the last number of a name: the part that is the same in every layer."""
    return re.sub(r"^.*\.\d+(?=\.)", "", name)


class LoadExperts(ConversionOps):
    """Makes a parameter's codes of those it is stored as, and puts its statistics by. In bf16, it does as transformers does."""

    def __init__(
        self, origins: dict[str, tuple[int, str]], converter: WeightConverter | None, plan: Plan, quantizer: Any
    ) -> None:
        self.origins = origins
        """By pattern: which source of the converter it is for, and which statistic; none for codes."""
        self.converter = converter
        self.plan = plan
        self.hf_quantizer = quantizer
        """transformers leaves the dtype of tensors alone for operations that have this attribute."""

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadExperts:
        return self  # it holds nothing of a single parameter, and transformers copies it for every tensor

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], **context: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """The parameter's codes, by the target pattern; called by transformers.

        Args:
            input_dict: the tensors by pattern.
            context: `full_layer_name`, the parameter's name, and more that transformers tells.
        """
        target = context["target_patterns"][0]
        made = self.plan.parameters.get(context["full_layer_name"])
        if made is None:
            return {target: self._unquantized(input_dict, context)}
        parts: dict[str, list[list[torch.Tensor]]] = {}
        for pattern, tensors in input_dict.items():
            source, part = self.origins[pattern]
            parts.setdefault(part, [[] for _ in made.sources])[source] = tensors
        input_dict.clear()
        codes, quant_state = whole(made, parts) if len(parts[""]) == len(parts[""][0]) == 1 else stacked(made, parts)
        self.plan.loaded[made.name] = quant_state
        return {target: codes}

    def _unquantized(self, input_dict: dict[str, Any], context: dict[str, Any]) -> torch.Tensor:
        """What transformers makes of experts that aren't in 4 bits."""
        name = context["full_layer_name"]
        if self.converter is None:
            made = next(iter(input_dict.values()))
        else:
            patterns = self.converter.source_patterns
            made = {patterns[self.origins[pattern][0]]: tensors for pattern, tensors in input_dict.items()}
            given = context | {"source_patterns": patterns, "target_patterns": self.converter.target_patterns}
            for operation in self.converter.operations:
                made = operation.convert(made, **given)
            made = next(iter(made.values()))
        tensor: torch.Tensor = made[0] if isinstance(made, list) else made
        return tensor.to(context["model"].get_parameter_or_buffer(name).dtype)


def whole(
    made: ExpertParameter, parts: dict[str, list[list[torch.Tensor]]]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A parameter that is stored as one tensor: its codes and statistics as they are, views of the file on the CPU."""
    if made.assembly is Assembly.STACKED:  # a single expert's single matrix
        return stacked(made, parts)
    return parts[""][0][0], {part: tensors[0][0] for part, tensors in parts.items() if part}


def stacked(
    made: ExpertParameter, parts: dict[str, list[list[torch.Tensor]]]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A parameter that is stored in several tensors: their codes and scales, one after the other.

    An expert's matrices follow each other in the order of the sources. Doubly quantized scales are restored to f32, as the
    matrices have offsets of their own. A matrix whose last block isn't full is filled up; the shape then says so.
    """
    block_size = made.first.block_size
    tensors = [[_Part(made, parts, s, e) for e in range(len(parts[""][s]))] for s in range(len(made.sources))]
    if made.assembly is Assembly.JOINED:
        tensors = [joined.split(made.shape[0]) for (joined,) in tensors]
    ordered = [part for expert in zip(*tensors, strict=True) for part in expert]
    elements = math.prod(made.shape) // len(ordered)
    padded = -(-elements // block_size) * block_size
    codes = torch.cat([part.codes(padded // 2) for part in ordered]).view(parts[""][0][0].dtype)
    absmax = torch.cat([part.absmax for part in ordered]).float()
    shape = made.shape if padded == elements else (made.shape[0], len(made.sources), padded)
    quant_type = made.first.quant_type
    state = {
        "quant_type": quant_type,
        "blocksize": block_size,
        "dtype": str(made.dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    return codes.unsqueeze(1), {
        "absmax": absmax,
        "quant_map": parts["quant_map"][0][0],
        f"{QUANT_STATE}{quant_type}": pack_dict_to_tensor(state).to(codes.device),
    }


class _Part:
    """A stored tensor's codes and restored scales."""

    def __init__(self, made: ExpertParameter, parts: dict[str, list[list[torch.Tensor]]], source: int, i: int) -> None:
        tensor: QuantizedTensor = made.sources[source][i]
        self._codes = parts[""][source][i].flatten().view(torch.uint8)
        self.absmax = parts["absmax"][source][i]
        """One per block, in f32."""
        if tensor.nested_block_size is not None:
            # As bitsandbytes does it, without its cost a call: there are thousands of matrices.
            scales = parts["nested_absmax"][source][i].repeat_interleave(tensor.nested_block_size)
            values = parts["nested_quant_map"][source][i][self.absmax.int()]
            offset = torch.tensor(tensor.nested_offset, dtype=torch.float32, device=values.device)
            self.absmax = values * scales[: len(values)] + offset

    def codes(self, length: int) -> torch.Tensor:
        """The codes as bytes, filled up to `length` of them."""
        missing = length - self._codes.numel()
        return torch.nn.functional.pad(self._codes, (0, missing)) if missing else self._codes

    def split(self, experts: int) -> list[_Part]:
        """One for each expert, of one for all of them."""
        halves = zip(self._codes.chunk(experts), self.absmax.chunk(experts), strict=True)
        return [self._of(codes, absmax) for codes, absmax in halves]

    @classmethod
    def _of(cls, codes: torch.Tensor, absmax: torch.Tensor) -> _Part:
        part = cls.__new__(cls)
        part._codes, part.absmax = codes, absmax
        return part
