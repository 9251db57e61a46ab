"""Writes src/models/data/kept_for_training.json: the Linears of every model type whose raw weight transformers' own code
reads, which fails, or gives wrong numbers, once the weight is 4-bit; and beside it projections.txt, the last names of modules
that are an nn.Linear wherever transformers has them, and towers.txt, what vision towers, audio encoders and projectors are
called. With --docs also the list as people read it.

Each class is built from its default config on the meta device. A method of a module that reads `self.NAME.weight`, other
than to look at its shape or device or to fill it, hands on what 4-bit modules hold packed codes in; where NAME is an exact
nn.Linear, it belongs in the list. So does one whose input is cast to the weight's dtype, as that is uint8 then.

Needs torch 2.15.0 and transformers 5.23.0.

    scripts/make linears [--check] [--only MODEL_TYPE]...
"""

import argparse
import ast
import functools
import inspect
import json
import re
import sys
import textwrap
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "facts"))

import models
import names
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module


def last_name(path):
    """The last part of a module's name that isn't a number."""
    return next((part for part in reversed(path.split(".")) if not part.isdigit()), "").lower()


# What may be asked of a packed weight as well as of any other.
HARMLESS = {"device", "shape", "size", "ndim", "dim", "is_meta", "requires_grad", "_is_hf_initialized"}

# Methods that fill weights, never run on a quantized model.
FILLING = re.compile(r"init|reset_parameters|tie_weights|resize|set_.*embeddings|load_.*|prune|save")

# Read behind a switch that no released checkpoint sets.
BEHIND_A_SWITCH = {
    "bloom": "sliced only with pretraining_tp > 1 and slow_but_exact",
}

# Not read raw by transformers, and kept beside what is.
ALSO = {
    "jamba": {"mamba.x_proj": "makes the input of mamba.dt_proj, which is read raw: kept with it"},
}


def dotted(node):
    """`a.b.c` of an attribute chain that starts at `self`, without it."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if isinstance(node, ast.Name) and node.id == "self" else None


def guarded(test):
    """Whether a condition asks for a dtype that packed codes don't have."""
    text = ast.unparse(test)
    return "is_floating_point" in text or "uint8" in text


class Reads(ast.NodeVisitor):
    """Chains `self.X.weight` that a function hands on, with the call that gets them."""

    def __init__(self):
        self.found, self.parents = {}, []

    def visit_If(self, node):
        if not guarded(node.test):
            self.generic_visit(node)
        else:
            for child in node.orelse:
                self.visit(child)

    def generic_visit(self, node):
        self.parents.append(node)
        super().generic_visit(node)
        self.parents.pop()

    def visit_Attribute(self, node):
        name = dotted(node)
        if name and name.endswith(".weight"):
            self.note(name.removesuffix(".weight"), node)
        self.generic_visit(node)

    def note(self, owner, node):
        parent = self.parents[-1]
        if isinstance(parent, ast.Attribute):
            if parent.attr in HARMLESS or (parent.attr == "dtype" and not self.is_cast()):
                return
        if isinstance(node.ctx, ast.Store):
            return
        call = next((p for p in reversed(self.parents) if isinstance(p, ast.Call)), None)
        if call is not None and ast.unparse(call.func) in ("isinstance", "getattr", "hasattr", "id"):
            return
        dtype = isinstance(parent, ast.Attribute) and parent.attr == "dtype"
        by = "its input is cast to the weight's dtype" if dtype else self.reader(call)
        self.found.setdefault(owner, by)

    def is_cast(self):
        """Whether a dtype goes into `.to(...)`, or into a variable that may."""
        call = next((p for p in reversed(self.parents) if isinstance(p, ast.Call)), None)
        into_to = call is not None and isinstance(call.func, ast.Attribute) and call.func.attr in ("to", "type")
        return into_to or any(isinstance(p, ast.Assign) for p in self.parents)

    @staticmethod
    def reader(call):
        if call is None:
            return "an expression"
        name = ast.unparse(call.func).rpartition(".")[2]
        return "an expression" if name in ("clamp", "unsqueeze", "squeeze", "view", "reshape", "t", "type", "chunk") else name


@functools.cache
def raw_reads(cls):
    """Of a module's class: names whose weight its methods read raw, and what reads them, with the method."""
    found = {}
    for base in cls.__mro__:
        if not base.__module__.startswith("transformers.models."):
            continue
        for name, function in vars(base).items():
            function = inspect.unwrap(getattr(function, "__func__", function))
            if not inspect.isfunction(function) or FILLING.search(name) or getattr(cls, name, None) is None:
                continue
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
            except (OSError, TypeError, SyntaxError):
                continue
            reads = Reads()
            reads.visit(tree)
            for owner, by in reads.found.items():
                found.setdefault(owner, f"{by} in {base.__name__}.{name}")
    return found


def kept_for_training(model_type, model, rows):
    if model_type in BEHIND_A_SWITCH:
        return
    # A weight that load_in_4bit leaves alone needs no entry.
    skips = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    for path, module in model.named_modules():
        for owner, by in raw_reads(type(module)).items():
            child = functools.reduce(lambda at, name: getattr(at, name, None), owner.split("."), module)
            full = f"{path}.{owner}".lstrip(".")
            if type(child) is nn.Linear and should_convert_module(full, skips):
                # The parent tells Mamba's out_proj from others; a number in its place says nothing.
                parts = [re.sub(r"\d+$", "*", part) for part in full.split(".") if not part.isdigit()]
                rows[".".join(parts[-2:])] = by
    for end, why in ALSO.get(model_type, {}).items():
        if any(path.endswith(end) for path, _ in model.named_modules()):
            rows[end] = why


# What says nothing of a name, or has names of its own: biases, buffers, Linears whose weights are kept or cut by other rules.
NO_MATRIX = {"bias", "buffer", "convolution", "subclass", "fp32", "cut", "last", "tied", "labels", "parameter"}


def count_names(model, linear, other):
    """Into `linear` the last names on disk of what becomes 4-bit by default, into `other` those of other matrices."""
    loaded = names.Loaded(model)
    for name, shape, keys, _ in names.on_disk(loaded):
        kind = names.kind_of(loaded, keys[0])
        if len(shape) == 2 and name.endswith(".weight") and kind not in NO_MATRIX:
            linears = kind in ("linear", "read_raw", "experts") and "." in name.removesuffix(".weight")
            (linear if linears else other).add(last_name(name.removesuffix(".weight")))


# What sub-configs are called that aren't the language model's.
SENSES = re.compile(r"vision|visual|image|audio|speech|video|acoustic|codec|encoder_config|qformer|perceiver|projector|vit")


def towers(model, found):
    """Into `found` the last names of vision towers and audio encoders, and of what joins them to the language model."""
    config = model.config
    of_senses = [getattr(config, key, None) for key in config.sub_configs or () if SENSES.search(key)]
    of_senses = [sub for sub in of_senses if sub is not None]
    text = config.get_text_config()
    if text is config or not of_senses:
        return
    outermost = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{tower}.") for tower in outermost)
        if not path or inside or not isinstance(module, PreTrainedModel) or all(module.config is not sub for sub in of_senses):
            continue
        outermost.append(path)
        parent = path.rpartition(".")[0]
        for name, child in model.get_submodule(parent).named_children():
            if joins(model, child, of_senses):
                outermost.append(f"{parent}.{name}".lstrip("."))
    found.update(last_name(path) for path in outermost)


def joins(model, module, of_senses):
    """Whether a module beside a tower hands its outputs on: it has Linears, and no language model in it."""
    own = [model.lm_head] if hasattr(model, "lm_head") else []
    inside = [one for one in module.modules() if isinstance(one, PreTrainedModel)]
    is_text = any(all(one.config is not sub for sub in of_senses) for one in inside)
    return module not in own and not is_text and any(type(one) is nn.Linear for one in module.modules())


def configs_of(model_type):
    """Each config that shows names which the others don't, and the default as it is."""
    try:
        yield models.CONFIG_MAPPING[model_type]()
        yield from models.configs_of(model_type, None)
    except Exception:  # a default config that doesn't pass its own checks
        return


def page(kept):
    """The list for people: a row for each module and reader, with the types that have it."""
    rows = defaultdict(list)
    for model_type, modules in kept.items():
        for module, reader in modules.items():
            what = reader.split(" in ")[0]
            rows[module, what].append(f"`{model_type}`")
    lines = [f"| `{module}` | {what} | {', '.join(sorted(types))} |" for (module, what), types in sorted(rows.items())]
    return DOCS + "\n".join(lines) + "\n"


DOCS = """\
# Linears that NF4 and FP4 leave alone

transformers makes 4-bit modules of these `nn.Linear`s, and then reads their weight as if it were a matrix, or casts their input
to its dtype: training fails, or numbers are wrong. `--format nf4` and `fp4` keep them, and `llm_int8_skip_modules` names them;
`--include` quantizes them nevertheless. Formats with groups, which are served, quantize them. `*` stands for a number. A name
without a dot is the whole module's.

Made by `scripts/make linears` from the source of every model type of transformers %s; `--dry-run` and the manifest name the
class and method for each tensor.

| module | its weight is read by | model types |
| --- | --- | --- |
""" % transformers.__version__


def main():
    parser = argparse.ArgumentParser(prog="scripts/make linears", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", help="a model type, for trying things out; may be repeated")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path)
    args = parser.parse_args()
    kept, linear, other, senses, built = {}, Counter(), Counter(), {}, 0
    failed = defaultdict(list)
    transformers.logging.set_verbosity_error()
    models.without_packages()
    for model_type in args.only or models.model_types():
        rows, here, elsewhere, around = {}, set(), set(), set()
        for name, cls in models.classes_of(model_type).items():
            for config in list(configs_of(model_type)):
                try:
                    model = models.build(cls, config)
                    kept_for_training(model_type, model, rows)
                    towers(model, around)
                    count_names(model, here, elsewhere)
                    built += 1
                except Exception as error:  # whatever this config can't be built for: another may do
                    failed[model_type].append(f"{name}: {type(error).__name__}: {str(error)[:120]}")
        linear.update(here)
        other.update(elsewhere)
        if around:
            senses[model_type] = sorted(around)
        if rows:
            kept[model_type] = dict(sorted(rows.items()))
    lines = [f"  {json.dumps(name)}: {json.dumps(rows)}" for name, rows in sorted(kept.items())]
    head = f'"transformers": "{transformers.__version__}"'
    args.out.write_text(f'{{{head}, "kept": {{\n' + ",\n".join(lines) + "\n}}\n")
    if args.docs:
        args.docs.write_text(page(kept))
    # A name of one type alone says too little; a few that mean something else by it don't matter.
    projections = sorted(name for name, count in linear.items() if count >= 2 and other[name] * 4 <= count)
    (args.out.parent / "projections.txt").write_text("".join(f"{name}\n" for name in projections))
    print(f"{built} classes built; {len(kept)} types with kept Linears; {len(projections)} projection names")
    print("ambiguous:", {name: (count, other[name]) for name, count in linear.most_common() if other[name]}, file=sys.stderr)
    for model_type, why in failed.items():
        print(f"not built: {model_type}: {'; '.join(why)}", file=sys.stderr)


if __name__ == "__main__":
    main()
