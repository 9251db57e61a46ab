"""Writes src/plan/kept_modules/data/vllm.json: which layers vLLM takes entries of `ignore` and `exclude_modules` to mean.

FOLDER holds an unpacked vLLM, which needs a GPU to run. Its own functions are taken out of its source, with what they call, and asked
of every pair of an entry and a layer's name; and of whole lists for layers that are made of several Linears.

Needs vLLM 0.33.0's source, and the package regex.

    scripts/make vllm-matching FOLDER [--check]
"""

import argparse
import ast
import fnmatch
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent))

import matching

QUANTIZATION = Path("vllm", "model_executor", "layers", "quantization")

# By file: the functions, and methods by their class.
FUNCTIONS = {
    "utils/config_utils.py": ["find_matching_patterns", "is_equal_or_regex_match"],
    "utils/quant_utils.py": ["is_layer_skipped"],
    "compressed_tensors/utils.py": ["should_ignore_layer"],
    "modelopt.py": ["ModelOptQuantConfigBase.is_layer_excluded", "ModelOptQuantConfigBase.apply_vllm_mapper"],
}

# Layers as vLLM calls them: some are made of several Linears.
MADE_OF = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

LAYERS = [
    *matching.MODULES, "model.layers.1.mlp.gate_up_proj", "model.layers.1.self_attn.qkv_proj", "model.layers.1.mlp.experts",
    "model.layers.11.mlp.experts", "model.layers.1.mlp.shared_experts.gate_up_proj", "language_model.lm_head",
]

WILDCARDS = [
    "model.layers.1.mlp.experts*", "model.layers.1.mlp.gat[e]", "model.layers.1*", "*.mlp.gate", "model.embed_token[s]",
    "model.layers.?.mlp.gate", "model.layers.[0-9].mlp.gate", "model.visual*", "*embed*", "model.layers.1.mlp.experts.0.w1",
]

# Whole lists, for the layers that several Linears make.
LISTS = [
    ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"], ["model.layers.1.mlp.gate_proj"],
    [r"re:(.*\.)?mlp\.(gate|up)_proj$"], [r"re:(.*\.)?mlp\..*"], [r"re:(.*\.)?gate_proj$"], ["model.layers.1.mlp.gate_up_proj"],
]


HEADER = """from __future__ import annotations  # types in quotes are of what isn't taken

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from types import MappingProxyType
from typing import Literal

import regex as re

"""


def taken(folder):
    """vLLM's functions, as a module of their own."""
    text = HEADER
    for path, functions in FUNCTIONS.items():
        tree = ast.parse((folder / QUANTIZATION / path).read_text())
        for function in functions:
            found = tree
            for part in function.split("."):
                inside = [node for node in found.body if getattr(node, "name", None) == part]
                if not inside:
                    raise SystemExit(f"{QUANTIZATION / path} has no {function}")
                found = inside[-1]
            text += f"{ast.unparse(found)}\n\n"
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "vllm_functions.py")
        file.write_text(text)
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def main() -> int:
    """Writes the file."""
    parser = argparse.ArgumentParser(prog="scripts/make vllm-matching", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    version = next(args.folder.glob("vllm-*.dist-info")).name.split("-")[1].removesuffix(".dist")
    vllm = taken(args.folder)

    def excludes(entry, layer):
        config = SimpleNamespace(exclude_modules=[entry], packed_modules_mapping=MADE_OF)
        # No name becomes another.
        vllm.apply_vllm_mapper(config, SimpleNamespace(apply_list=lambda entries: entries))
        try:
            return vllm.is_layer_excluded(config, layer)
        except ValueError:  # only some of a layer's Linears
            return False

    def ignores(entries, layer):
        try:
            return vllm.should_ignore_layer(layer, entries, MADE_OF)
        except ValueError as error:
            return str(error).split(" for ")[0]

    plain = [entry for entry in matching.ENTRIES if not entry.startswith("re:")]
    single = [layer for layer in LAYERS if layer.split(".")[-1] not in MADE_OF]
    # A layer's experts as a whole are excluded with any of them.
    apart = [layer for layer in LAYERS if not layer.endswith(".experts")]
    wildcards = [entry for entry in plain + WILDCARDS if entry]
    table = {
        "vllm": version,
        "layers": LAYERS,
        "ignore": {entry: [layer for layer in single if ignores([entry], layer)] for entry in matching.ENTRIES},
        "exclude": {entry: [layer for layer in apart if excludes(entry, layer)] for entry in wildcards},
        # As ModelOpt itself has it.
        "wildcards": {entry: [layer for layer in apart if fnmatch.fnmatch(layer, entry)] for entry in wildcards},
        "lists": [[entries, {layer: ignores(entries, layer) for layer in LAYERS if layer not in single}] for entries in LISTS],
    }
    args.out.write_text(json.dumps(table, indent=1) + "\n")
    print(f"vLLM {version}: {len(table['ignore'])} and {len(table['exclude'])} entries, {len(LAYERS)} layers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
