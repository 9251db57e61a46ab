"""What a checkpoint holds, from its headers: 4-bit tensors with their statistics, and all others.

Nothing but the safetensors headers and the small quant_state JSONs is read.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import PrequantError
from .files import parse_json

QUANT_STATE = "quant_state.bitsandbytes__"
"""What the name of a quant_state ends with, before the format's name."""

FORMATS = ("nf4", "fp4")
STATISTICS = ("absmax", "quant_map", *(f"{QUANT_STATE}{name}" for name in FORMATS), "nested_absmax", "nested_quant_map")
"""What is stored beside a 4-bit tensor, under its name and a dot."""

FLOATS = ("F32", "F16", "BF16")
"""What scales may be in: bitsandbytes writes F32."""

STORAGES = {"U8": "uint8", "BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""What codes may be stored as, two to a byte, with torch's names."""

DTYPES = ("bfloat16", "float16", "float32")
"""What weights are decoded to, by torch's names."""

EXPERT_NUMBER = re.compile(r"\.experts\.\d+\.")
MAX_HEADER = 100_000_000
"""The most bytes of a header that safetensors allows."""

MAX_STATE = 1 << 16
"""The most bytes of a quant_state, which has some hundred."""

CONVERT_AGAIN = "convert it again, or download it again (prequant_loader.verify tells which files differ)"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Where its bytes begin, from the file's begin."""
    size: int
    """Its bytes."""

    def read(self) -> bytes:
        """Its bytes: for the small ones."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class QuantizedTensor:
    """A 4-bit tensor: its codes, and what its quant_state says. Its statistics are known to be there and to fit."""

    codes: StoredTensor
    quant_type: str
    block_size: int
    shape: tuple[int, ...]
    nested_block_size: int | None
    nested_offset: float
    statistics: tuple[str, ...]
    """Which of STATISTICS are there."""

    @property
    def name(self) -> str:
        return self.codes.name

    @property
    def storage(self) -> str:
        """What its codes are stored as, by torch's name."""
        return STORAGES.get(self.codes.dtype, self.codes.dtype)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass
class Checkpoint:
    """All tensors of some files."""

    quantized: dict[str, QuantizedTensor] = field(default_factory=dict)
    """By the name of the codes."""
    plain: dict[str, StoredTensor] = field(default_factory=dict)
    """All that is neither a 4-bit tensor nor one's statistic."""

    @property
    def has_single_experts(self) -> bool:
        """Whether experts have numbers in their names: one tensor per expert and projection."""
        return any(EXPERT_NUMBER.search(name) for names in (self.quantized, self.plain) for name in names)

    @property
    def has_fused_experts(self) -> bool:
        """Whether a 4-bit tensor is 3-D: all experts of a layer."""
        return any(len(tensor.shape) == 3 for tensor in self.quantized.values())


def read_checkpoint(files: Iterable[Path | str]) -> Checkpoint:
    """Reads the headers of safetensors files; other files are passed over.

    Raises:
        PrequantError: a header is damaged, or a 4-bit tensor lacks a statistic or has one that doesn't fit it.
    """
    stored: dict[str, StoredTensor] = {}
    for file in files:
        if str(file).endswith(".safetensors"):
            stored.update(read_header(Path(file)))
    statistics = _statistics_by_tensor(stored)
    checkpoint = Checkpoint()
    for name, tensor in stored.items():
        if name in statistics:
            checkpoint.quantized[name] = _quantized(tensor, statistics[name])
        elif not _is_statistic_of(name, statistics):
            checkpoint.plain[name] = tensor
    for name, parts in statistics.items():
        if name not in stored:
            there = next(iter(parts.values()))
            raise _broken(there, "it is there without the codes it belongs to", f"a tensor {name!r}")
    return checkpoint


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name."""
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= MAX_HEADER:
            raise PrequantError(path, "", f"its header has {length} bytes", "a safetensors file", CONVERT_AGAIN)
        try:
            header: Any = parse_json(file.read(length))
        except ValueError as error:
            raise PrequantError(path, "", f"its header is damaged ({error})", "JSON", CONVERT_AGAIN) from None
    if not isinstance(header, dict):
        raise PrequantError(path, "", "its header is damaged", "a JSON object", CONVERT_AGAIN)
    header.pop("__metadata__", None)
    return {name: _stored(path, name, entry, 8 + length) for name, entry in header.items()}


def _stored(path: Path, name: str, entry: Any, data: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in (*shape, begin, end - begin)):
            raise ValueError
        return StoredTensor(path, name, dtype, shape, data + begin, end - begin)
    except (KeyError, TypeError, ValueError):
        raise PrequantError(path, name, f"the header says {entry}", "dtype, shape and offsets", CONVERT_AGAIN) from None


def _statistics_by_tensor(stored: dict[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Statistics by the name of the tensor they belong to, then by which they are."""
    found: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        for part in STATISTICS:
            if name.endswith(f".{part}"):
                found.setdefault(name.removesuffix(f".{part}"), {})[part] = tensor
    return found


def _is_statistic_of(name: str, statistics: dict[str, dict[str, StoredTensor]]) -> bool:
    return any(name.endswith(f".{part}") and name.removesuffix(f".{part}") in statistics for part in STATISTICS)


def _quantized(codes: StoredTensor, parts: dict[str, StoredTensor]) -> QuantizedTensor:
    """Checks that codes and statistics are all there and fit each other."""
    states = [part for part in parts if part.startswith(QUANT_STATE)]
    if len(states) != 1:
        raise _missing(codes, f"{QUANT_STATE}nf4", f"{len(states)} quant_states beside it")
    state = _quant_state(parts[states[0]])
    quant_type = states[0].removeprefix(QUANT_STATE)
    if state.get("quant_type", quant_type) != quant_type:
        found = f"its quant_type is {state['quant_type']!r}"
        raise _broken(parts[states[0]], found, f"{quant_type!r}, as its name says")
    if not isinstance(state.get("dtype", "float32"), str) or state.get("dtype", "float32") not in DTYPES:
        raise _broken(parts[states[0]], f"its dtype is {state['dtype']!r}", " or ".join(DTYPES))
    shape, block_size = tuple(state["shape"]), state["blocksize"]
    blocks = -(-math.prod(shape) // block_size)
    nested = "nested_blocksize" in state
    expected = {"absmax": (("U8",) if nested else FLOATS, blocks), "quant_map": (FLOATS, 16)}
    if nested:
        expected["nested_absmax"] = (FLOATS, -(-blocks // state["nested_blocksize"]))
        expected["nested_quant_map"] = (FLOATS, 256)
    if codes.size != -(-math.prod(shape) // 2):
        found = f"it is {codes.dtype} {list(codes.shape)}, {codes.size} bytes"
        raise _broken(codes, found, f"the codes of {list(shape)}, two per byte, as its quant_state says")
    for part, (dtypes, count) in expected.items():
        if part not in parts:
            raise _missing(codes, part, f"{', '.join(sorted(parts))} only")
        there = parts[part]
        if there.dtype not in dtypes or math.prod(there.shape) != count:
            found = f"it is {there.dtype} {list(there.shape)}"
            raise _broken(there, found, f"{dtypes[0]} [{count}] beside codes of {list(shape)} in blocks of {block_size}")
    for part in parts.keys() - expected.keys() - set(states):
        raise _broken(parts[part], "it is there", f"none: the quant_state of {codes.name!r} isn't double-quantized")
    return QuantizedTensor(
        codes=codes,
        quant_type=quant_type,
        block_size=block_size,
        shape=shape,
        nested_block_size=state.get("nested_blocksize"),
        nested_offset=float(state.get("nested_offset", 0.0)),
        statistics=tuple(part for part in STATISTICS if part in parts),
    )


def _quant_state(stored: StoredTensor) -> dict[str, Any]:
    """The JSON of a quant_state, with the entries that are used known to be there."""
    if stored.size > MAX_STATE:
        raise _broken(stored, f"it has {stored.size} bytes", f"at most {MAX_STATE}")
    try:
        state = parse_json(stored.read())
        shape, block_size, nested = state["shape"], state["blocksize"], state.get("nested_blocksize", 1)
        whole = all(isinstance(number, int) and number > 0 for number in (*shape, block_size, nested))
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise _broken(stored, "it can't be read", "JSON with shape and blocksize")
    return dict(state)


def _missing(codes: StoredTensor, part: str, found: str) -> PrequantError:
    return _broken(codes, f"its statistic {part!r} is missing, found {found}", f"a tensor {f'{codes.name}.{part}'!r}")


def _broken(stored: StoredTensor, found: str, expected: str) -> PrequantError:
    return PrequantError(stored.path, stored.name, found, expected, CONVERT_AGAIN)
