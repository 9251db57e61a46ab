"""Everything in which a checkpoint differs from what prequant wrote, as `prequant verify` finds it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.quantizers.quantizers_utils import should_convert_module

from .errors import PrequantError
from .expected_config import BLOCK_FORMATS, GUARD_KEY, GUARDS, expected_config, is_named, kept_key
from .file_class import is_loaded, is_whole_model
from .files import is_file, parse_json, read_json
from .layout import MAX_STATE, QUANT_STATE, StoredTensor, read_header
from .manifest import (
    FLOATS,
    MANIFEST,
    SUMS,
    BrokenManifest,
    Manifest,
    byte_len,
    elements_of_sources,
    sums_text,
)

INDEX = "model.safetensors.index.json"
DIFFUSERS = "diffusion_pytorch_model"
"""How diffusers' files of weights begin, and the index beside them."""

CONFIG = "config.json"
DOWNLOAD_AGAIN = "download or convert it again"
CHUNK = 1 << 20
"""Bytes that are read at once."""


def should_diffusers_convert(module: str, skipped: Iterable[str]) -> bool:
    """Whether diffusers makes a 4-bit module of one of this name: it takes entries for names, last parts, and parts before a dot."""
    return not any(entry in (module, module.rsplit(".", 1)[-1]) or f"{entry}." in module for entry in skipped)


@dataclass(frozen=True, order=True)
class Difference:
    """Something that is not as it was written."""

    is_damage: bool
    """Whether clients load it; else it is a file for people, such as README.md, that was edited."""
    file: str
    """Below the checkpoint's folder; a folder's name ends in a slash."""
    tensor: str
    """Empty if it isn't about one."""
    what: str


class Differences:
    """What verifying a folder finds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = 0
        self.size = 0
        self.all: list[Difference] = []

    def find(self) -> Differences:
        """Looks at everything.

        Raises:
            PrequantError: there is no manifest.
        """
        manifest = self._manifest()
        if manifest is not None:
            self._sums(manifest)
            self._unlisted(manifest)
            self._misleading(manifest)
            self._consistency(manifest)
            self._config(manifest)
            self._files(manifest)
            self._index(manifest)
        self.all = sorted(set(self.all), key=lambda found: (not found.is_damage, found.file, found.tensor, found.what))
        return self

    def names(self) -> set[str]:
        """The files that the manifest lists."""
        manifest = self._manifest()
        return {name for name, _, _ in manifest.files} if manifest else set()

    def _differ(self, file: str, what: str, tensor: str = "", of: str | None = None) -> None:
        self.all.append(Difference(is_loaded(file if of is None else of), file, tensor, what))

    def _manifest(self) -> Manifest | None:
        path = self.folder / MANIFEST
        if not is_file(path):
            raise PrequantError(path, "", "it does not exist", "the manifest that prequant writes", DOWNLOAD_AGAIN)
        text = path.read_bytes()
        self._manifest_sha256 = hashlib.sha256(text).hexdigest()
        try:
            return Manifest(text)
        except BrokenManifest as error:
            self._differ(MANIFEST, str(error))
            return None

    def _sums(self, manifest: Manifest) -> None:
        """SHA256SUMS says of every file what the manifest says, of the manifest what it is, and nothing else."""
        listed = [(name, digest) for name, _, digest in manifest.files] + [(MANIFEST, self._manifest_sha256)]
        expected = sums_text(listed)
        path = self.folder / SUMS
        if not is_file(path):
            return self._differ(SUMS, "it is missing")
        whole = "".join(f"{line}\n" for line in expected).encode()
        most = 2 * len(whole) + (1 << 20)  # of a longer one the lines that are right don't matter
        with path.open("rb") as file:
            text = file.read(most + 1)
        if text == whole:
            return None
        if len(text) > most:
            return self._differ(SUMS, f"it has more than {most} bytes, expected {len(whole)}")
        lines = text.decode("utf-8", "replace").split("\n")
        lines = [line.removesuffix("\r") for line in (lines[:-1] if not lines[-1] else lines)]
        for line in set(expected) - set(lines):
            self._differ(_name(line), f"{SUMS} and {MANIFEST} don't have the same SHA-256")
        known = {_name(line) for line in expected}
        for line in set(lines) - set(expected):
            if _name(line) not in known:
                self._differ(SUMS, f"it has more than a line for each file: {line[:200]!r}", of=_name(line))
        if set(lines) == set(expected):
            self._differ(SUMS, "it has its lines in another order, or more than once, or other line ends")
        return None

    def _unlisted(self, manifest: Manifest) -> None:
        """No file is there that the manifest doesn't know, in no folder."""
        known = {name for name, _, _ in manifest.files} | {MANIFEST, SUMS}
        folders = [""]
        while folders:
            prefix = folders.pop()
            for entry in os.scandir(self.folder / prefix):
                name = prefix + entry.name
                if name in known:
                    continue
                inside = f"{name}/"
                if not os.path.isdir(entry.path):  # false for a link in a circle, where entry.is_dir() raises
                    self._differ(name, f"is not in {MANIFEST}")
                elif not is_loaded(inside) or entry.is_symlink():
                    self._differ(inside, f"is not in {MANIFEST}")
                else:
                    folders.append(inside)

    def _misleading(self, manifest: Manifest) -> None:
        """No listed file is one that clients could load in place of the weights that the manifest is about."""
        if manifest.schema_version < 2:  # what wrote it had other rules of what is copied
            return
        own = {output["file"] for output, _ in manifest.outputs()} | {_index_name(manifest)}
        for name in {name for name, _, _ in manifest.files} - own:
            if is_whole_model(name):
                self._differ(name, f"is called like all of the model's weights, and holds no tensor of {MANIFEST}")

    def _consistency(self, manifest: Manifest) -> None:
        names = [name for name, _, _ in manifest.files]
        for name in {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ():
            self._differ(MANIFEST, f"it has the file {name!r} twice")
        try:
            for what in manifest.contradictions():
                self._differ(MANIFEST, what)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            self._differ(MANIFEST, f"it can't be read as a manifest ({type(error).__name__}: {error})")

    def _config(self, manifest: Manifest) -> None:
        """config.json tells clients what the manifest says."""
        if all(name != CONFIG for name, _, _ in manifest.files):
            return
        try:
            config = read_json(self.folder / CONFIG)
            found = config.get("quantization_config")
        except (ValueError, AttributeError):
            return self._differ(CONFIG, "not a model's config")
        if manifest.format is None:
            if found is not None:
                self._differ(CONFIG, "has a quantization_config, and nothing is quantized")
            return None
        if not isinstance(found, dict):
            return self._differ(CONFIG, "has no quantization_config")
        try:
            expected = expected_config(manifest.recipe)
        except KeyError as error:
            return self._differ(MANIFEST, f"its recipe has no {error} that is known")
        for key, value in expected.items():
            if key == "bits" and key not in found:  # 0.1.0 didn't write it
                continue
            if key == GUARD_KEY and found.get(key) in GUARDS:
                continue
            if not _is_same(found.get(key), value):
                self._differ(CONFIG, f"quantization_config's {key} is {found.get(key)!r}, expected {value!r}")
        listed = found.get(kept_key(manifest.recipe))
        entries = [entry for entry in listed if isinstance(entry, str)] if isinstance(listed, list) else []
        converts = should_diffusers_convert if "_class_name" in config else should_convert_module
        for module in _quantized_modules(manifest) if entries else ():
            if manifest.format in BLOCK_FORMATS:
                is_kept = not converts(module, entries)
            else:
                is_kept = any(is_named(module, entry, manifest.recipe) for entry in entries)
            if is_kept:
                return self._differ(CONFIG, f"{kept_key(manifest.recipe)} names {module!r}, which is quantized")

    def _files(self, manifest: Manifest) -> None:
        """Every file is there, with its size and hash, and so are the tensors in it."""
        tensors: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {}
        for output, record in manifest.outputs():
            of_file = tensors.setdefault(output["file"], {})
            if output["name"] in of_file:
                self._differ(output["file"], f"is in {MANIFEST} twice", output["name"])
            of_file[output["name"]] = (output, record)
        for file in tensors.keys() - {name for name, _, _ in manifest.files}:
            self._differ(file, f"it holds tensors, but is not among the files of {MANIFEST}")
        self.files, self.size = len(manifest.files), sum(size for _, size, _ in manifest.files)
        with ThreadPoolExecutor() as pool:
            work = pool.map(lambda file: self._file(manifest, file, tensors.get(file[0], {})), manifest.files)
            for found in work:
                self.all.extend(found)

    def _file(self, manifest: Manifest, file: tuple[str, int, str], tensors: dict[str, Any]) -> list[Difference]:
        name, size, expected = file
        found: list[Difference] = []

        def differ(what: str, tensor: str = "") -> None:
            found.append(Difference(is_loaded(name), name, tensor, what))

        path = self.folder / name
        if not is_file(path):
            differ("it does not exist")
            return found
        if (there := path.stat().st_size) != size:
            differ(f"it has {there} bytes, expected {size}")
            return found
        stored = list(self._header(path, size, tensors, differ)) if tensors else []
        digest, digests = _hash(path, stored)
        if digest != expected:
            differ(f"its SHA-256 is {digest}, expected {expected}")
        for tensor, digest in zip(stored, digests, strict=True):
            output, record = tensors[tensor.name]
            if digest != output["sha256"]:
                differ(f"its SHA-256 is {digest}, expected {output['sha256']}", tensor.name)
            if QUANT_STATE in tensor.name:
                for what in _quant_state(tensor, record, manifest):
                    differ(what, tensor.name)
        return found

    def _header(self, path: Path, size: int, tensors: dict[str, Any], differ: Any) -> Iterator[StoredTensor]:
        """The tensors that file and manifest both have, in the order of their bytes."""
        try:
            header = read_header(path)
        except PrequantError as error:
            differ(str(error))
            return
        at = None
        for tensor in sorted(header.values(), key=lambda tensor: (tensor.offset, tensor.size)):
            if tensor.size != byte_len(tensor.dtype, list(tensor.shape)) or at not in (None, tensor.offset):
                differ("its header is damaged: shapes and offsets don't fit", tensor.name)
                return
            at = tensor.offset + tensor.size
            if tensor.name not in tensors:
                differ(f"is not in {MANIFEST}", tensor.name)
                continue
            output, _ = tensors[tensor.name]
            if (tensor.dtype, list(tensor.shape)) != (output["dtype"], output["shape"]):
                expected = f"{output['dtype']} {output['shape']}"
                differ(f"is {tensor.dtype} {list(tensor.shape)}, expected {expected}", tensor.name)
            yield tensor
        if at != size:
            differ(f"its tensors end at byte {at}, expected {size}")
        for name in tensors.keys() - header.keys():
            differ("is missing from the file", name)
        return None

    def _index(self, manifest: Manifest) -> None:
        """The index is what is written for the manifest's tensors: every one in its file, and nothing else."""
        recorded = {name: digest for name, _, digest in manifest.files}
        weight_map = {output["name"]: output["file"] for output, _ in manifest.outputs()}
        index_name = _index_name(manifest)
        if index_name not in recorded:
            if len(set(weight_map.values())) > 1:
                self._differ(index_name, f"is not in {MANIFEST}, though there are several files of weights")
            return
        total = sum(byte_len(output["dtype"], output["shape"]) for output, _ in manifest.outputs())
        in_order = dict(sorted(weight_map.items(), key=lambda entry: entry[0].encode()))
        index = {"metadata": {"total_size": total}, "weight_map": in_order}
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        if hashlib.sha256(text.encode()).hexdigest() != recorded[index_name]:
            self._differ(index_name, f"isn't the index that prequant writes for its tensors, whose total_size is {total}")


def _index_name(manifest: Manifest) -> str:
    """The name of the index that belongs to the files of weights."""
    is_diffusers = any(output["file"].startswith(DIFFUSERS) for output, _ in manifest.outputs())
    return f"{DIFFUSERS}.safetensors.index.json" if is_diffusers else INDEX


def _is_same(found: Any, expected: Any) -> bool:
    """Whether JSON says the same; Python takes 1 for True, and 4.0 for 4."""
    return json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)


def _quantized_modules(manifest: Manifest) -> Iterator[str]:
    """The modules that are quantized: as the source calls them where clients see its names, else as their codes are called."""
    for record in manifest.quantized():
        if manifest.format in BLOCK_FORMATS:
            yield from (source["name"].removesuffix(".weight") for source in record["sources"])
        elif record["outputs"]:
            name = record["outputs"][0]["name"]
            yield name.removesuffix("_packed").removesuffix("_blocks").removesuffix(".weight")


def _name(line: str) -> str:
    """The file that a line of SHA256SUMS is of."""
    return line.partition("  ")[2] or line


def _hash(path: Path, tensors: list[StoredTensor]) -> tuple[str, list[str]]:
    """SHA-256 of a file and of tensors in it, in the order of their bytes, in one pass."""
    whole, digests = hashlib.sha256(), []
    with path.open("rb") as file:

        def read(count: int, *hashes: Any) -> None:
            while count > 0 and (chunk := file.read(min(count, CHUNK))):
                count -= len(chunk)
                for each in hashes:
                    each.update(chunk)

        for tensor in tensors:
            read(tensor.offset - file.tell(), whole)
            part = hashlib.sha256()
            read(tensor.size, whole, part)
            digests.append(part.hexdigest())
        read(1 << 63, whole)
    return whole.hexdigest(), digests


def _quant_state(tensor: StoredTensor, record: dict[str, Any], manifest: Manifest) -> Iterator[str]:
    """What the JSON that clients decode by says otherwise than manifest and source."""
    if record["decision"] != "quantize" or manifest.format not in BLOCK_FORMATS:
        yield "belongs to a tensor that isn't quantized"
        return
    try:
        state = parse_json(tensor.read() if tensor.size <= MAX_STATE else b"")
        shape, nested = list(state["shape"]), state.get("nested_offset")
        found = (state["quant_type"], state["blocksize"])
        dtype = state["dtype"]
    except (ValueError, KeyError, TypeError, AttributeError):
        yield "is no quant_state"
        return
    if found != (manifest.format, manifest.block_size) or not tensor.name.endswith(f"{QUANT_STATE}{manifest.format}"):
        yield f"says {found}, expected {(manifest.format, manifest.block_size)}"
    if (nested is not None) != manifest.double_quant:
        yield f"and {MANIFEST} don't agree on double quantization"
    sources = record["sources"]
    if sources and sources[0]["dtype"] in FLOATS and dtype != FLOATS[sources[0]["dtype"]]:
        yield f"says {dtype}, and the source is {sources[0]['dtype']}"
    elements, product = elements_of_sources(sources), 1
    for dimension in shape:
        product *= dimension if isinstance(dimension, int) and dimension > 0 else 0
    shapes = [source["shape"] for source in sources]
    fused = len(shape) == 3 and shapes and all(source and source[-1] in shape[1:] for source in shapes)
    plain = all(source["dtype"] in FLOATS for source in sources)
    if (elements is not None and product != elements) or (plain and shape != shapes[0] and not fused):
        yield f"says the shape is {shape}, and the source has {shapes}"



