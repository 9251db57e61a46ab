"""Checks converted checkpoints against what vLLM's weight loader expects: src/models/data/vllm.json, made from its source.

    scripts/conformance vllm CHECKPOINT...                exit code 1 if vLLM could not load one of them, or would load it wrongly
    scripts/conformance vllm --self-test CHECKPOINT...    they are fine, and damaged copies are refused

For each: config.json selects one of our formats; every quantized Linear and expert has exactly the tensors that vLLM creates,
in their dtypes and shapes; Linears that vLLM puts together are quantized together, and share a global scale; its ignore list,
matched as vLLM matches it, names exactly what isn't quantized. Needs Python alone; reads headers and a few scalars.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import re
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dimensions import dimension

ROOT = Path(__file__).resolve().parents[2]
VLLM = json.loads((ROOT / "src" / "models" / "data" / "vllm.json").read_text())
COMPRESSED = ("nvfp4", "mxfp4", "int4", "int4-asym")  # in the order in which vLLM asks
FLOATS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
HEADS = ("lm_head", "embed_out")

# The conditions of src/models/data/vllm.json's "packed_if", by their text in vLLM.
CONDITIONS: dict[str, Callable[[dict], bool]] = {
    "self.use_mha": lambda config: not (config.get("qk_nope_head_dim") or config.get("qk_rope_head_dim")),
    "self.fuse_qkv_a_proj": lambda config: config.get("q_lora_rank") is not None,
    "getattr(config, 'mlp_only_layers', [])": lambda config: bool(config.get("mlp_only_layers")),
    "getattr(config, 'mlp_only_layers', []) or config.shared_expert_intermediate_size > 0": lambda config: bool(
        config.get("mlp_only_layers") or config.get("shared_expert_intermediate_size")
    ),
}


class Refused(Exception):
    """Not worth looking further."""


@dataclass
class Tensor:
    """A tensor of a file."""

    dtype: str
    shape: list[int]
    path: Path
    begin: int
    end: int

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.begin)
            return file.read(self.end - self.begin)


@dataclass
class Checkpoint:
    """A folder, and what is wrong with it."""

    folder: Path
    config: dict
    tensors: dict[str, Tensor]
    format_name: str = ""
    group: int | None = None  # columns; None is the whole row
    problems: list[str] = field(default_factory=list)
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def text_config(self) -> dict:
        return self.config.get("text_config", self.config)

    @property
    def format(self) -> dict:
        return VLLM["formats"][self.format_name]

    @property
    def model(self) -> dict:
        return VLLM["models"][self.config["architectures"][0]]

    @property
    def dtype(self) -> str:
        config = self.text_config
        return FLOATS[config.get("dtype") or config.get("torch_dtype") or self.config.get("dtype")]

    @property
    def modelopt(self) -> bool:
        return self.format_name == "nvfp4 modelopt"

    def own(self, module: str) -> dict[str, Tensor]:
        """A module's tensors, by the last part of their names."""
        if not self.modules:
            for name, tensor in self.tensors.items():
                owner, _, last = name.rpartition(".")
                self.modules.setdefault(owner, {})[last] = tensor
        return self.modules.get(module, {})

    def packed_modules(self) -> dict[str, list[str]]:
        """Which Linears vLLM knows under one name when it looks at the list of what is ignored."""
        given = {into: members for into, (members, test) in self.model["packed_if"].items() if CONDITIONS[test](self.text_config)}
        return self.model["packed"] | given


def main() -> int:
    """Checks all, prints what is wrong."""
    parser = argparse.ArgumentParser(prog="scripts/conformance vllm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--self-test", action="store_true")
    parser.add_argument("checkpoints", nargs="+", type=Path)
    arguments = parser.parse_args()
    failed = 0
    for fault in matching_faults() if arguments.self_test else []:
        failed += 1
        print(f"FAILED {fault}")
    for folder in arguments.checkpoints:
        found = problems(folder)
        if arguments.self_test and not found:
            found = self_test(folder)
        failed += bool(found)
        print(f"{'FAILED' if found else 'ok    '} {folder}" + "".join(f"\n       {each}" for each in found[:20]))
        if len(found) > 20:
            print(f"       and {len(found) - 20} more")
    return 1 if failed else 0


def problems(folder: Path) -> list[str]:
    """What vLLM would not load, or load wrongly; a sentence each."""
    checkpoint = Checkpoint(folder, {}, {})
    try:
        checkpoint.config = json.loads((folder / "config.json").read_text())
        checkpoint.tensors = dict(headers(folder))
        architectures = checkpoint.config.get("architectures") or ["no architecture"]
        if architectures[0] not in VLLM["models"]:
            raise Refused(f"{architectures[0]} is not in src/models/data/vllm.json: add it to tests/conformance/make/vllm_expectations.py")
        select(checkpoint)
        if checkpoint.format_name == "mxfp4 gpt-oss":
            check_gpt_oss(checkpoint)
        else:
            check_layers(checkpoint)
    except Refused as refused:
        checkpoint.problems.append(str(refused))
    except KeyError as missing:
        checkpoint.problems.append(f"config.json lacks {missing}")
    return checkpoint.problems


def headers(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                yield name, Tensor(entry["dtype"], entry["shape"], path, begin, end)


# config.json


def select(checkpoint: Checkpoint) -> None:
    """Finds the format that vLLM takes the checkpoint for."""
    quantization = checkpoint.config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        select_compressed(checkpoint, quantization)
    elif method == "modelopt":
        select_modelopt(checkpoint, quantization)
    elif method == "mxfp4" and checkpoint.config.get("model_type") == VLLM["formats"]["mxfp4 gpt-oss"]["select"]["model_type"]:
        checkpoint.format_name, checkpoint.group = "mxfp4 gpt-oss", 32
    else:
        raise Refused(f"config.json's quant_method is {method}, which is none of our formats in vLLM")


def select_compressed(checkpoint: Checkpoint, quantization: dict) -> None:
    """As CompressedTensorsConfig picks a scheme."""
    groups = list(quantization.get("config_groups", {}).values())
    if len(groups) != 1 or groups[0].get("targets") != ["Linear"]:
        raise Refused("config.json's config_groups isn't one group with the target Linear")
    (group,) = groups
    weights = group["weights"]
    if group.get("input_activations") or group.get("output_activations") or weights.get("actorder"):
        raise Refused("config.json asks for quantized activations, or another order of columns")
    for name in COMPRESSED:
        asked = VLLM["formats"][name]["select"]["weights"]
        if all(weights.get(key) in allowed for key, allowed in asked.items()):
            break
    else:
        raise Refused(f"config.json's weights select none of vLLM's schemes: {weights}")
    asked_format = VLLM["formats"][name]["select"].get("format")
    written = group.get("format") or quantization.get("format")
    if asked_format and written != asked_format:
        raise Refused(f"config.json's format is {written}, vLLM asks for {asked_format}")
    checkpoint.format_name, checkpoint.group = name, weights.get("group_size")
    sizes = VLLM["formats"][name].get("group_sizes")
    if (weights["strategy"] == "channel") != (checkpoint.group is None):
        raise Refused(f"config.json's strategy is {weights['strategy']}, its group_size {checkpoint.group}")
    if sizes and (checkpoint.group or -1) not in sizes:
        raise Refused(f"config.json's group_size is {checkpoint.group}, vLLM's kernels take {sizes}")


def select_modelopt(checkpoint: Checkpoint, quantization: dict) -> None:
    """As ModelOptNvFp4Config picks an algorithm: NVFP4 is W4A4 there, unless all groups say that they have no activations."""
    inner = quantization.get("quantization", quantization)
    algorithm, wanted = str(inner.get("quant_algo")).upper(), VLLM["formats"]["nvfp4 modelopt"]["select"]
    groups = quantization.get("config_groups") or {}
    weight_only = groups and all(group.get("input_activations") is None for group in groups.values())
    if algorithm != wanted["quant_algo"] and not (algorithm == "NVFP4" and weight_only):
        raise Refused(f"config.json's quant_algo is {algorithm}, vLLM reads weights alone as {wanted['quant_algo']}")
    if inner is not quantization and (missing := set(wanted["hf_quant_config"]) - inner.keys()):
        raise Refused(f"config.json's quantization lacks {sorted(missing)}")
    checkpoint.format_name, checkpoint.group = "nvfp4 modelopt", int(inner.get("group_size") or 16)
    path = checkpoint.folder / "hf_quant_config.json"
    if path.exists():
        other = json.loads(path.read_text()).get("quantization", {})
        if missing := set(wanted["hf_quant_config"]) - other.keys():
            checkpoint.problems.append(f"hf_quant_config.json lacks {sorted(missing)}")
        elif (other["group_size"], str(other.get("quant_algo")).upper()) != (checkpoint.group, algorithm):
            checkpoint.problems.append("hf_quant_config.json isn't what config.json says")
        elif excluded(checkpoint, quantization) != list(other["exclude_modules"]):
            checkpoint.problems.append("hf_quant_config.json excludes other modules than config.json")


def excluded(checkpoint: Checkpoint, quantization: dict) -> list[str]:
    """The list of what isn't quantized, as vLLM finds it."""
    if not checkpoint.modelopt:
        return quantization.get("ignore", [])
    inner = quantization.get("quantization")
    return inner["exclude_modules"] if inner else quantization.get("ignore", quantization.get("exclude_modules", []))


# Names


def renamed(checkpoint: Checkpoint, name: str, drop: bool = True) -> str | None:
    """A weight's or a module's name in vLLM; None if it isn't loaded."""
    model = checkpoint.model
    for substring, new in model["substr"].items():
        if substring in name:
            if new is None and drop:
                return None
            name = name if new is None else name.replace(substring, new, 1)
    for prefix, new in model["prefix"].items():
        if name.startswith(prefix):
            if new is None and drop:
                return None
            name = name if new is None else name.replace(prefix, new, 1)
    for suffix, new in model["suffix"].items():
        if name.endswith(suffix) and new is not None:
            name = new.join(name.rsplit(suffix, 1))
    return name


def layer_name(checkpoint: Checkpoint, module: str, quantized: set[str]) -> str | None:
    """A module's name in vLLM, by that of its weight; None if it isn't loaded."""
    last = ".weight_packed" if module in quantized and not checkpoint.modelopt else ".weight"
    name = renamed(checkpoint, module + last)
    return name and name.removesuffix(last)


def together(checkpoint: Checkpoint, name: str) -> str:
    """The vLLM layer that a Linear becomes part of."""
    for part, into in checkpoint.model["stacked"].items():
        part, into = part.strip("."), into.strip(".")
        if name.endswith(f".{part}"):
            return name.removesuffix(part) + into
    return name


def listed(checkpoint: Checkpoint, layer: str, patterns: list[str]) -> bool:
    """Whether vLLM takes a layer for one that isn't quantized."""
    packed = checkpoint.packed_modules()
    last = layer.rpartition(".")[2]
    members = [layer.replace(last, member) for member in packed.get(last, ())]
    if not checkpoint.modelopt:
        if any(matches(layer, pattern) for pattern in patterns):
            return True
        found = [any(matches(member, pattern) for pattern in patterns) for member in members]
    else:
        # Parts of names and wildcards count too; of experts, any name that they are part of.
        if layer in patterns or any(pattern in layer or fnmatch.fnmatch(layer, pattern) for pattern in patterns):
            return True
        if last not in packed and "experts" in layer:
            return any(layer in pattern for pattern in patterns if "experts" in pattern)
        found = [member in patterns for member in members]
    if any(found) and not all(found):
        checkpoint.problems.append(f"{layer}: only some of {members} are ignored: vLLM stops there")
    return any(found)


def matches(name: str, pattern: str) -> bool:
    return bool(re.match(pattern[3:], name)) if pattern.startswith("re:") else pattern == name


def patterns_of(checkpoint: Checkpoint) -> list[str]:
    """config.json's list in vLLM's names. Patterns are not renamed."""
    given = excluded(checkpoint, checkpoint.config["quantization_config"])
    if checkpoint.modelopt:
        split = as_two(given)
        return [new for name in split if (new := renamed(checkpoint, name, drop=False))]
    keep = [name for name in given if name.startswith("re:") or "." not in name]
    return keep + [new for name in given if name not in keep and (new := renamed(checkpoint, name, drop=False))]


def as_two(entries: list[str]) -> list[str]:
    """The entries with two for each that ends in a wildcard: the module itself, and what is in it."""
    return [
        each
        for name in entries
        for each in ((name[:-1], f"{name[:-1]}.*") if name.endswith("*") and name[-2:-1] not in ("", ".") else (name,))
    ]


# Layers


def check_layers(checkpoint: Checkpoint) -> None:
    """Every Linear and every layer's experts, as vLLM has them."""
    quantized = {module for name in checkpoint.tensors for module in [quantized_module(checkpoint, name)] if module}
    patterns = patterns_of(checkpoint)
    layers: dict[str, list[str]] = {}
    experts: dict[str, dict[tuple[int, str], str]] = {}
    for module in sorted(quantized | set(kept_modules(checkpoint))):
        name = layer_name(checkpoint, module, quantized)
        if name is None:
            continue
        one = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)", name)
        if one:
            experts.setdefault(one[1], {})[int(one[2]), one[3]] = module
        elif re.search(r"\.experts\.\w+$", name):
            experts.setdefault(name.rpartition(".")[0], {})[0, name.rpartition(".")[2]] = module
        else:
            layers.setdefault(together(checkpoint, name), []).append(module)
    for layer, members in layers.items():
        name = layer if len(members) > 1 else layer_name(checkpoint, members[0], quantized) or layer
        check_together(checkpoint, name, members, quantized)
        check_listed(checkpoint, name, [members[0] in quantized], [listed(checkpoint, name, patterns)])
    for container, parts in experts.items():
        check_experts(checkpoint, container, parts, quantized, patterns)
    for module in sorted(quantized):
        check_module(checkpoint, module)


def quantized_module(checkpoint: Checkpoint, name: str) -> str | None:
    """The module that a tensor shows to be quantized."""
    module, _, last = name.rpartition(".")
    if last in checkpoint.format["linear"] and last != "weight":
        return module
    return module if last == "weight" and checkpoint.tensors[name].dtype == "U8" else None


def kept_modules(checkpoint: Checkpoint) -> Iterator[str]:
    """Modules with a weight that vLLM would want packed if they weren't ignored: Linears, and fused experts."""
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype not in FLOATS.values():
            continue
        module, _, last = name.rpartition(".")
        head = module.rpartition(".")[2] in HEADS
        # vLLM's classes of embeddings and heads have no Linear in their names; modelopt's heads are meant all the same.
        if last == "weight" and len(tensor.shape) == 2 and (checkpoint.modelopt if head else not is_embedding(module)):
            yield module
        elif len(tensor.shape) == 3 and re.search(r"\.experts\.\w+(\.weight)?$", name):
            yield name.removesuffix(".weight")


def is_embedding(module: str) -> bool:
    last = module.rpartition(".")[2]
    return "embed" in last or last in ("wte", "wpe")


def check_together(checkpoint: Checkpoint, layer: str, members: list[str], quantized: set[str]) -> None:
    """Linears of one vLLM layer are all quantized or none, and share what is one for the layer."""
    states = {module: module in quantized for module in members}
    if len(set(states.values())) > 1:
        checkpoint.problems.append(f"{layer}: vLLM makes one layer of {members}, and not all of them are quantized")
        return
    last = layer.rpartition(".")[2]
    if states[members[0]] and not checkpoint.modelopt and (last in HEADS or is_embedding(layer)):
        checkpoint.problems.append(f"{layer} is quantized, but vLLM's class for it isn't matched by the target Linear")
    if states[members[0]] and len(members) > 1:
        check_shared(checkpoint, layer, members)
        if checkpoint.format_name == "int4-asym":
            for module in members:
                rows = checkpoint.tensors[f"{module}.weight_packed"].shape[0]
                if rows % 8:
                    checkpoint.problems.append(f"{module}: {rows} rows: zero points are packed by 8 and can't be put together")


def check_shared(checkpoint: Checkpoint, layer: str, members: list[str]) -> None:
    shared = checkpoint.format.get("shared")
    values = {checkpoint.tensors[name].read() for module in members if (name := f"{module}.{shared}") in checkpoint.tensors}
    if shared and len(values) > 1:
        numbers = sorted(struct.unpack("<f", value)[0] for value in values if len(value) == 4)
        checkpoint.problems.append(f"{layer}: {shared} differs, {numbers}: vLLM takes one of them for all of {members}")


def check_listed(checkpoint: Checkpoint, layer: str, is_quantized: list[bool], is_listed: list[bool]) -> None:
    if layer.rpartition(".")[2] in checkpoint.model["never"]:
        if any(is_quantized):
            checkpoint.problems.append(f"{layer} is quantized, but vLLM never quantizes it")
        return
    if any(is_quantized) and any(is_listed):
        checkpoint.problems.append(f"{layer} is quantized, but config.json says that it isn't")
    if not all(is_quantized) and not all(is_listed):
        checkpoint.problems.append(f"{layer} isn't quantized, but nothing in config.json says so in vLLM's reading")


def check_experts(
    checkpoint: Checkpoint, container: str, parts: dict[tuple[int, str], str], quantized: set[str], patterns: list[str]
) -> None:
    """A layer's experts: all of them, with all three parts, quantized alike."""
    states = [module in quantized for module in parts.values()]
    projections = checkpoint.model["experts"]
    if checkpoint.modelopt:
        decisions = [listed(checkpoint, container, patterns)]
    else:  # the first expert's names decide for all
        decisions = [listed(checkpoint, f"{container}.0.{projection}", patterns) for projection in projections]
    if len(set(decisions)) > 1:
        checkpoint.problems.append(f"{container}: only some of the first expert's parts are ignored: vLLM stops there")
    check_listed(checkpoint, container, states, decisions)
    if not any(states):
        return
    if known := checkpoint.model.get("expert_tensors"):
        checkpoint.problems.append(f"{container}: vLLM passes over these names without a word: it knows {known} alone")
        return
    if not all(states):
        checkpoint.problems.append(f"{container}: only {sum(states)} of {len(states)} weights of experts are quantized")
    config = checkpoint.text_config
    count = next((config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config), None)
    expected = {(expert, projection) for expert in range(count or 0) for projection in projections}
    if parts.keys() != expected:
        wrong = sorted(parts.keys() ^ expected)[:3]
        checkpoint.problems.append(f"{container}: vLLM wants {projections} of each of {count} experts; see {wrong}")
        return
    hidden, inner = config["hidden_size"], config.get("moe_intermediate_size") or config["intermediate_size"]
    for (expert, projection), module in parts.items():
        shape = (hidden, inner) if projection == projections[2] else (inner, hidden)
        if (found := sizes(checkpoint, module)) != shape:
            checkpoint.problems.append(f"{module} is {list(found)}, config.json says {list(shape)}")
        if projection == projections[0]:
            check_shared(checkpoint, f"{container}.{expert}", [module, parts[expert, projections[1]]])


def sizes(checkpoint: Checkpoint, module: str) -> tuple[int, int]:
    """Rows and columns of a quantized weight."""
    name = f"{module}.{'weight' if checkpoint.modelopt else 'weight_packed'}"
    shape = checkpoint.tensors[name].shape if name in checkpoint.tensors else []
    if len(shape) != 2:
        return (0, 0)
    rows, packed = shape
    given = checkpoint.tensors.get(f"{module}.weight_shape")
    if "weight_shape" in checkpoint.format["linear"]:
        # Eight columns an integer: how many the last one holds stands in weight_shape.
        if given and given.dtype == "I64" and given.shape == [2]:
            columns = struct.unpack("<2q", given.read())[1]
            return rows, columns if math.ceil(columns / 8) == packed else packed * 8
        return rows, packed * 8
    return rows, packed * 2


def check_module(checkpoint: Checkpoint, module: str) -> None:
    """A quantized module has exactly the tensors that vLLM creates for it."""
    expert = re.search(r"\.experts\.\d+\.\w+$", module)
    expected = checkpoint.format["expert" if expert else "linear"]
    found = checkpoint.own(module)
    for name in sorted(expected.keys() - found.keys()):
        checkpoint.problems.append(f"{module}.{name} is missing")
    for name in sorted(found.keys() - expected.keys() - {"bias"}):
        checkpoint.problems.append(f"{module}.{name} is nothing that vLLM has a place for")
    rows, columns = sizes(checkpoint, module)
    words = {"R": rows, "C": columns, "G": checkpoint.group or columns or 1}
    if columns % words["G"]:
        checkpoint.problems.append(f"{module}: {columns} columns aren't whole groups of {words['G']}")
    for name in expected.keys() & found.keys():
        dtype = expected[name]["dtype"] or checkpoint.format["linear"][name]["dtype"]
        dtype = checkpoint.dtype if dtype == "source" else dtype
        shape = [dimension(size, words) for size in expected[name]["shape"]]
        # A scalar may have a dimension or none.
        shapes = ([], [1]) if shape == [1] else (shape,)
        if found[name].dtype != dtype or found[name].shape not in shapes:
            are = f"{found[name].dtype} {found[name].shape}"
            checkpoint.problems.append(f"{module}.{name} is {are}, vLLM creates {dtype} {shape} ({expected[name]['at']})")
    given = found.get("weight_shape")
    if given and given.dtype == "I64" and given.shape == [2] and (said := struct.unpack("<2q", given.read())) != (rows, columns):
        checkpoint.problems.append(f"{module}.weight_shape says {list(said)}, its other tensors {[rows, columns]}")


def check_gpt_oss(checkpoint: Checkpoint) -> None:
    """gpt-oss' own layout: a layer's experts in six tensors, all else unquantized."""
    config, expected = checkpoint.config, checkpoint.format["layer"]
    experts, hidden, inner = config["num_local_experts"], config["hidden_size"], config["intermediate_size"]
    containers = {name.rpartition(".")[0] for name in checkpoint.tensors if name.rpartition(".")[2] in expected}
    wanted = {f"model.layers.{layer}.mlp.experts" for layer in range(config["num_hidden_layers"])}
    for container in sorted(wanted ^ containers):
        checkpoint.problems.append(f"{container} {'has no' if container in wanted else 'is no layer with'} packed experts")
    for name, tensor in checkpoint.tensors.items():
        container, _, last = name.rpartition(".")
        if last not in expected and (tensor.dtype not in FLOATS.values() or container in containers):
            checkpoint.problems.append(f"{name} is nothing that vLLM has a place for")
    for container in sorted(wanted & containers):
        for last, fact in expected.items():
            tensor = checkpoint.tensors.get(f"{container}.{last}")
            if not tensor:
                checkpoint.problems.append(f"{container}.{last} is missing")
                continue
            rows, columns = (2 * inner, hidden) if last.startswith("gate_up") else (hidden, inner)
            words = {"E": experts, "R": rows, "C": columns}
            shape = [dimension(size, words) for size in fact["shape"]]
            # The loader views what comes after rows as one dimension.
            viewed = tensor.shape[:2] + ([math.prod(tensor.shape[2:])] if len(tensor.shape) > 2 else [])
            if viewed != shape or tensor.dtype != (fact["dtype"] or checkpoint.dtype):
                checkpoint.problems.append(f"{container}.{last} is {tensor.dtype} {tensor.shape}, vLLM creates {shape}")


# Damaged copies


def matching_faults() -> Iterator[str]:
    """Where a list means other layers than to vLLM's own functions, as `scripts/make vllm-matching` has asked them."""
    answers = json.loads((ROOT / "src/plan/kept_modules/data/vllm.json").read_text())
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    asked = [([entry], True, layer, layer in found) for entry, found in answers["exclude"].items() for layer in answers["layers"]]
    asked = [each for each in asked if not each[2].endswith(".experts")]
    asked += [(entries, False, layer, said) for entries, found in answers["lists"] for layer, said in found.items()]
    for entries, modelopt, layer, said in asked:
        checkpoint: Any = SimpleNamespace(modelopt=modelopt, problems=[], packed_modules=lambda: packed)
        is_listed = listed(checkpoint, layer, as_two(entries) if modelopt else entries)
        found = "Found different quantization schemes" if checkpoint.problems else is_listed
        # One of a layer's Linears alone stops vLLM in either layout.
        if found != said and not (modelopt and checkpoint.problems):
            yield f"{entries} of {layer}: {found}, and vLLM says {said}"


def self_test(folder: Path) -> list[str]:
    """Damages that are not noticed."""
    unnoticed = []
    for name, damage in DAMAGES.items():
        with tempfile.TemporaryDirectory() as work:
            copy = Path(work) / "copy"
            shutil.copytree(folder, copy)
            if damage(copy) and not problems(copy):
                unnoticed.append(f"not noticed: {name}")
    return unnoticed


def edit_tensors(folder: Path, edit: Callable[[dict, bytearray], bool]) -> bool:
    """Lets `edit` change headers and data until it says that it did."""
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
        if edit(header, data):
            text = json.dumps(header).encode()
            path.write_bytes(struct.pack("<Q", len(text)) + text + data)
            return True
    return False


def edit_entry(ending: str, change: Callable[[dict, str, bytearray], None]) -> Callable[[Path], bool]:
    """Damages the first tensor whose name ends so."""

    def edit(header: dict, data: bytearray) -> bool:
        name = next((name for name in sorted(header) if re.search(ending, name)), None)
        if name:
            change(header, name, data)
        return name is not None

    return lambda folder: edit_tensors(folder, edit)


def edit_config(change: Callable[[dict], bool]) -> Callable[[Path], bool]:
    """Damages config.json's quantization_config."""

    def damage(folder: Path) -> bool:
        config = json.loads((folder / "config.json").read_text())
        done = change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))
        return done

    return damage


def set_dtype(header: dict, name: str, _: bytearray) -> None:
    """Another dtype of the same size."""
    header[name]["dtype"] = {"U8": "I8", "F8_E4M3": "U8", "BF16": "F16", "F16": "BF16", "I32": "U32"}[header[name]["dtype"]]


def transpose(header: dict, name: str, _: bytearray) -> None:
    header[name]["shape"] = [*header[name]["shape"][:-2], header[name]["shape"][-1] + 1, header[name]["shape"][-2]]


def double(header: dict, name: str, data: bytearray) -> None:
    begin = header[name]["data_offsets"][0]
    data[begin : begin + 4] = struct.pack("<f", 2 * struct.unpack("<f", data[begin : begin + 4])[0])


def unlist(folder: Path) -> bool:
    """Takes the last Linear that isn't a head off the list, under all its names."""
    never = VLLM["models"][json.loads((folder / "config.json").read_text())["architectures"][0]]["never"]
    matrices = [name.removesuffix(".weight") for name, tensor in headers(folder) if len(tensor.shape) == 2]
    matrices = [name for name in matrices if name.rpartition(".")[2] not in never]

    def change(quantization: dict) -> bool:
        for key in ("ignore", "exclude_modules"):
            names = [name for name in quantization.get(key, []) if name in matrices and name not in HEADS]
            if names:
                end = ".".join(names[-1].split(".")[-4:])
                quantization[key] = [name for name in quantization[key] if not name.endswith(end)]
                return True
        return False

    return edit_config(change)(folder)


def list_packed(folder: Path) -> bool:
    """Puts a quantized module on the list."""
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    key = next((key for key in ("ignore", "exclude_modules") if key in quantization), None)
    packed = [name.rpartition(".")[0] for name, _ in headers(folder) if name.endswith(".weight_scale")]
    if key and packed:
        quantization[key].append(min(packed))
        (folder / "config.json").write_text(json.dumps(config))
    return bool(key and packed)


def set_bits(quantization: dict) -> bool:
    for group in quantization.get("config_groups", {}).values():
        group["weights"]["num_bits"] = 8
    if "quant_algo" in quantization:
        quantization["quant_algo"] = "NVFP4"
        quantization.pop("config_groups", None)
    return bool(quantization.get("config_groups") or "quant_algo" in quantization)


SCALE = r"\.(weight_scale|\w+_scales)$"
DAMAGES: dict[str, Callable[[Path], bool]] = {
    "a scale of another dtype": edit_entry(SCALE, set_dtype),
    "no scale": edit_entry(SCALE, lambda header, name, _: header.pop(name)),
    "a scale of another shape": edit_entry(SCALE, transpose),
    "packed weights of another dtype": edit_entry(r"(weight_packed|_blocks)$", set_dtype),
    "a tensor too much": edit_entry(SCALE, lambda header, name, _: header.update({f"{name}_2x": header[name]})),
    "a global scale that isn't shared": edit_entry(r"(k_proj|up_proj|w3)\.weight_(global_scale|scale_2)$", double),
    "an expert's global scale that isn't shared": edit_entry(r"experts\.1\.(up_proj|w3)\.weight_(global_scale|scale_2)$", double),
    "a bit width that selects nothing": edit_config(set_bits),
    "an unquantized Linear that isn't listed": unlist,
    "a quantized Linear that is listed": list_packed,
}


if __name__ == "__main__":
    sys.exit(main())
