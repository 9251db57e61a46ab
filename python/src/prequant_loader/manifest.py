"""prequant.json as far as it is verified: its records, and whether they agree with each other."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .expected_config import BLOCK_FORMATS

MANIFEST = "prequant.json"
SUMS = "SHA256SUMS"

SCHEMA_VERSIONS = (1, 2)
"""What is read of a manifest is the same in both, but for the recipe."""

DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Bits of an element, by safetensors' names."""

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""What weights are quantized from, with torch's names."""

ROUNDING = 1e-9
"""How far a figure that was rounded in another way may be off, as a part of it."""


class BrokenManifest(Exception):
    """A manifest that isn't one."""


class Manifest:
    """A manifest whose files and tensors are known to have what is read of them."""

    def __init__(self, text: bytes) -> None:
        try:
            self._read(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BrokenManifest(f"it can't be read as a manifest ({type(error).__name__}: {error})") from None

    def _read(self, manifest: Any) -> None:
        version, tool = manifest["schema_version"], manifest["tool"]
        if version not in SCHEMA_VERSIONS or isinstance(version, bool):
            raise BrokenManifest(f"its schema_version is {version}, expected 1 or 2: update prequant-loader")
        self.schema_version: int = version
        self.wrote = f"{_text(tool['name'])} {_text(tool['version'])}"
        self.recipe: dict[str, Any] = manifest["recipe"]
        for file in manifest["files"]:
            if not is_inside(_text(file["name"])):
                raise BrokenManifest(f"it names {file['name']!r}, expected files of its own folder")
        self.files = [(_text(file["name"]), _size(file["size"]), _sha256(file["sha256"])) for file in manifest["files"]]
        self.tensors: list[dict[str, Any]] = manifest["tensors"]
        self.relaid = manifest.get("relaid_from")
        self.summary: dict[str, Any] = manifest["summary"]
        for file in manifest["source"]["files"]:
            _text(file["name"]), _size(file["size"]), _sha256(file["header_sha256"])
            _sha256(file.get("sha256") or file["header_sha256"])
        for tensor in self.tensors:
            _check_tensor(tensor)
        # None of a merged checkpoint whose weights are floats.
        self.format = None if self.recipe.get("unquantized") is True else _text(self.recipe["format"])
        if self.format in BLOCK_FORMATS:
            self.block_size, self.double_quant = _size(self.recipe["block_size"]), self.recipe["double_quant"]
            if self.block_size not in (32, 64, 128, 256, 512, 1024, 2048, 4096) or not isinstance(self.double_quant, bool):
                raise ValueError("block_size or double_quant")
        if self.relaid not in (None, "keep", "fuse"):
            raise ValueError("relaid_from")

    def outputs(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Every tensor that was written, with the record it belongs to."""
        for record in self.tensors:
            for output in record["outputs"]:
                yield output, record

    def quantized(self) -> Iterator[dict[str, Any]]:
        return (record for record in self.tensors if record["decision"] == "quantize")

    def contradictions(self) -> Iterator[str]:
        """Where the summary isn't what the records add up to."""
        summary, parts = self.summary, {"quantize": [0, 0, 0], "keep": [0, 0, 0]}
        are_known = True
        previous: Any = None
        for record in self.tensors:
            part = parts[record["decision"]]
            part[0] += 1
            part[1] += sum(byte_len(output["dtype"], output["shape"]) for output in record["outputs"])
            if record["decision"] == "keep":
                part[2] += math.prod(record["outputs"][0]["shape"]) if record["outputs"] else 0
            elif previous is None or previous["sources"] != record["sources"]:
                # What one tensor of the source was taken apart into stands together.
                elements = elements_of_sources(record["sources"])
                are_known, part[2] = are_known and elements is not None, part[2] + (elements or 0)
            previous = record
        quantized, kept = parts["quantize"], parts["keep"]
        expected = {"quantized_tensors": quantized[0], "kept_tensors": kept[0], "kept_elements": kept[2]}
        if are_known:
            expected["quantized_elements"] = quantized[2]
        for key, value in expected.items():
            if summary[key] != value:
                yield f"summary's {key} is {summary[key]}, and its tensors give {value}"
        elements, others = summary["quantized_elements"], summary["kept_elements"]
        bits = {
            "bits_per_quantized_weight": quantized[1] * 8 / max(elements, 1),
            "bits_per_weight": (quantized[1] + kept[1]) * 8 / max(elements + others, 1),
        }
        for key, value in bits.items():
            if not near(summary[key], value):
                yield f"summary's {key} is {summary[key]}, and its tensors give {value}"
        yield from (f"summary's statistics: {what}" for what in self._statistics(summary["statistics"]))

    def _statistics(self, total: dict[str, Any]) -> Iterator[str]:
        """What statistics of all tensors together, or those of one, say otherwise."""
        yield from impossible(total)
        each = [record["statistics"] for record in self.tensors if record.get("statistics")]
        for record in self.tensors:
            if record.get("statistics"):
                yield from impossible(record["statistics"])
                if record["decision"] == "keep":
                    yield "a tensor has them that isn't quantized"
        are_all = all(record.get("statistics") for record in self.quantized())
        sums = {key: sum(one[key] for one in each) for key in ("blocks", "zero_blocks", "nonfinite_blocks")}
        worst = max((one["max_absolute_error"] for one in each), default=0.0)
        found = [(key, total[key], value) for key, value in sums.items()]
        found.append(("max_absolute_error", total["max_absolute_error"], worst))
        if each:
            found.append(("absmax's max", total["absmax"]["max"], max(one["absmax"]["max"] for one in each)))
            found.append(("absmax's min", -total["absmax"]["min"], -min(one["absmax"]["min"] for one in each)))
        for key, value, expected in found:
            if value < expected or (are_all and value != expected):
                yield f"{key} is {abs(value)}, and its tensors have {abs(expected)}"
        if are_all and each:
            errors, means = [one["relative_squared_error"] for one in each], [one["absmax"]["mean"] for one in each]
            for key, value, bounds in (
                ("relative_squared_error", total["relative_squared_error"], errors),
                ("absmax's mean", total["absmax"]["mean"], means),
            ):
                least, most = min(bounds), max(bounds)
                if not least - abs(least) * ROUNDING <= value <= most + abs(most) * ROUNDING:
                    yield f"{key} is {value}, and its tensors have {least} to {most}"
            nested = sum(one.get("double_quantization") is not None for one in each)
            if nested != (len(each) if total.get("double_quantization") is not None else 0):
                yield f"{nested} of {len(each)} tensors have a double_quantization"


def impossible(statistics: dict[str, Any]) -> Iterator[str]:
    """What can't be of statistics by themselves."""
    blocks, zeros, nonfinite = (statistics[key] for key in ("blocks", "zero_blocks", "nonfinite_blocks"))
    if zeros + nonfinite > blocks:
        yield f"{zeros} blocks of zeros and {nonfinite} with NaN or infinities of {blocks}"
    error, snr = statistics["relative_squared_error"], statistics["snr_db"]
    expected = -10.0 * math.log10(error) if error > 0 else None
    if (snr is None) != (expected is None) or (snr is not None and expected is not None and not near(snr, expected)):
        yield f"snr_db is {snr}, and a relative_squared_error of {error} gives {expected}"


def near(found: float, expected: float) -> bool:
    return abs(found - expected) <= abs(expected) * ROUNDING


def byte_len(dtype: str, shape: list[int]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * DTYPE_BITS.get(dtype, 0) // 8


def elements_of_sources(sources: list[dict[str, Any]]) -> int | None:
    """Elements of the weight that these tensors of the source are; none if their shapes don't tell."""
    blocks = [source for source in sources if source["name"].endswith("_blocks")]
    if blocks:
        return int(sum(math.prod(source["shape"]) * 2 for source in blocks))
    coded = [source for source in sources if source["dtype"] == "F8_E4M3"]
    others = [source for source in sources if source["dtype"] not in ("F8_E4M3", *FLOATS, *(["F8_E8M0"] if coded else []))]
    return None if others else int(sum(math.prod(source["shape"]) for source in coded or sources))


def _check_tensor(tensor: dict[str, Any]) -> None:
    for source in tensor["sources"]:
        _text(source["name"]), _text(source["file"]), _text(source["dtype"]), _shape(source["shape"])
    for output in tensor["outputs"]:
        _text(output["name"]), _text(output["file"]), _text(output["dtype"]), _shape(output["shape"])
        _sha256(output["sha256"])
    _text(tensor["role"]), _text(tensor["reason"])
    if tensor["decision"] not in ("keep", "quantize"):
        raise ValueError(f"decision {tensor['decision']!r}")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise TypeError(f"{value!r} is no size")
    return value


def _shape(value: Any) -> list[int]:
    return [_size(dimension) for dimension in value]


def _sha256(value: Any) -> str:
    if len(_text(value)) != 64 or not set(value) <= set("0123456789abcdef"):
        raise ValueError(f"{value!r} is no SHA-256")
    return str(value)


def sums_text(files: list[tuple[str, str]]) -> list[str]:
    """The lines of SHA256SUMS, as `sha256sum --check` takes them."""

    def line(name: str, digest: str) -> str:
        if any(character in name for character in "\\\n\r"):
            name = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
            return f"\\{digest}  {name}"
        return f"{digest}  {name}"

    return [line(name, digest) for name, digest in sorted(files, key=lambda file: file[0].encode())]


def is_inside(name: str) -> bool:
    """Whether a file's name stays inside the folder."""
    parts = name.split("/")
    return bool(name) and not Path(name).is_absolute() and not {"..", ".", ""} & set(parts) and "\0" not in name
