"""Writes what diffusers says of which modules stay as they are: src/models/data/diffusers.txt, the modules that its classes keep in
f32, and with --matching src/plan/kept_modules/data/diffusers.json, which modules it takes entries of a skip list to mean.

FOLDER holds an unpacked diffusers. The first is read from its source; for the second its own function replaces Linears in a model
of one, for every pair of an entry and a module's name.

Needs diffusers 0.42.1, and torch and bitsandbytes.

    scripts/make diffusers FOLDER [--check]
"""

import argparse
import ast
import importlib
import json
import logging
import sys
import types
from pathlib import Path
from types import SimpleNamespace

MODULES = [
    "proj_out", "x_embedder", "context_embedder", "norm_out.linear", "transformer_blocks.0.norm1.linear",
    "single_transformer_blocks.0.norm1.linear", "single_transformer_blocks.0.proj_out", "single_transformer_blocks.10.proj_mlp",
    "condition_embedder.time_embedder.linear_1", "condition_embedder.time_embedder_x.linear_1", "blocks.1.ffn.net.0.proj",
]

ENTRIES = [
    "proj_out", "proj_out$", "x_embedder", "embedder", "norm_out.linear", "linear", "transformer_blocks.0.norm1.linear",
    "transformer_blocks.0.norm1", "single_transformer_blocks.0", "single_transformer_blocks.1", r"blocks\.1", "time_embedder", "0",
    "proj", "blocks.1.ffn", "",
]

HEAD = """\
# Modules that diffusers {version} keeps in f32, by class (_keep_in_fp32_modules). Made by scripts/make diffusers.
"""


def kept_in_fp32(folder):
    """Of each class that has such modules: their names, by the source."""
    found = {}
    for path in sorted((folder / "diffusers" / "models").rglob("*.py")):
        for cls in ast.walk(ast.parse(path.read_text())):
            for line in cls.body if isinstance(cls, ast.ClassDef) else []:
                if isinstance(line, ast.Assign) and getattr(line.targets[0], "id", "") == "_keep_in_fp32_modules":
                    found[cls.name] = ast.literal_eval(line.value) or []
    return {name: modules for name, modules in sorted(found.items()) if modules}


def means(folder):
    """Whether an entry of a skip list means a module, to diffusers' own function."""
    from torch import nn

    # The file alone, beside what it asks for: its package needs others that no Linear does.
    def provide(name, **content):
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)

    yes = {f"is_{package}_available": lambda: True for package in ("accelerate", "bitsandbytes", "torch")}
    quantizers = folder / "diffusers" / "quantizers"
    provide("diffusers", __path__=[str(folder / "diffusers")])
    provide("diffusers.utils", logging=SimpleNamespace(get_logger=logging.getLogger), **yes)
    provide("diffusers.quantizers", __path__=[str(quantizers)])
    provide("diffusers.quantizers.quantization_config", QuantizationMethod=None)
    provide("diffusers.quantizers.bitsandbytes", __path__=[str(quantizers / "bitsandbytes")])
    replace = importlib.import_module("diffusers.quantizers.bitsandbytes.utils")._replace_with_bnb_linear

    def model_of(module):
        model = nn.Module()
        inner = model
        *outer, last = module.split(".")
        for part in outer:
            inner.add_module(part, nn.Module())
            inner = inner.get_submodule(part)
        inner.add_module(last, nn.Linear(8, 8))
        return model

    def answer(entry, module):
        config = SimpleNamespace(
            quantization_method=lambda: "nf4", llm_int8_skip_modules=[entry], bnb_4bit_quant_storage=None,
            bnb_4bit_compute_dtype=None, bnb_4bit_use_double_quant=False, bnb_4bit_quant_type="nf4",
        )
        model, _ = replace(model_of(module), [entry], quantization_config=config)
        return type(model.get_submodule(module)) is nn.Linear

    return answer


def main() -> int:
    """Writes both."""
    parser = argparse.ArgumentParser(prog="scripts/make diffusers", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--matching", type=Path, required=True)
    args = parser.parse_args()
    version = next(args.folder.glob("diffusers-*.dist-info")).name.split("-")[1].removesuffix(".dist")
    found = kept_in_fp32(args.folder)
    args.out.write_text(HEAD.format(version=version) + "".join(f"{name} {' '.join(of)}\n" for name, of in found.items()))
    answer = means(args.folder)
    answers = {entry: [module for module in MODULES if answer(entry, module)] for entry in ENTRIES}
    table = {"diffusers": version, "modules": MODULES, "entries": answers}
    args.matching.write_text(json.dumps(table, indent=1) + "\n")
    print(f"diffusers {version}: {len(found)} classes, {len(ENTRIES)} entries, {len(MODULES)} modules")
    return 0


if __name__ == "__main__":
    sys.exit(main())
