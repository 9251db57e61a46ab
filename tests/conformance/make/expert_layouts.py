"""Writes src/models/data/expert_layouts.txt: how a layer's experts lie in transformers' parameters of all of them.

A class of experts is told by the decorator that lets it run on other implementations, which says whether matrices are
transposed and whether gate and up alternate. A class without it is run: its shapes say which dimension is which, and doubling the
rows of `up` doubles what comes out. A model type is listed where all such classes of its module agree.

Needs torch 2.15.0 and transformers 5.23.0.

    scripts/make expert-layouts [--check]
"""

import argparse
import copy
import importlib
import inspect
import re
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "facts"))

import models
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HEAD = """\
# How experts lie in the parameters that transformers {version} has for all of a layer's: as rows, or transposed, and whether
# gate and up alternate; and the model types whose experts do. Made by scripts/make expert-layouts.
"""


def layout(cls):
    """What the decorator of a class of experts says, if it has one."""
    said = inspect.getclosurevars(inspect.unwrap(cls.__init__, stop=lambda f: "is_transposed" in f.__code__.co_freevars)).nonlocals
    if "is_transposed" not in said:
        return None
    words = ["transposed" if said["is_transposed"] else "rows"]
    return " ".join(words + ([] if said["is_concatenated"] else ["interleaved"]))


def layout_by_running(cls, config):
    """What a class's own code says, if it runs as those with the decorator do."""
    experts, hidden, inner = 4, 32, 24
    for key, value in {"hidden_size": hidden, "moe_intermediate_size": inner, "intermediate_size": inner}.items():
        if key in vars(config):
            setattr(config, key, value)
    for key in models.EXPERT_COUNTS:
        if key in vars(config):
            setattr(config, key, experts)
    module = cls(config)
    orientations = {(experts, 2 * inner, hidden): 1, (experts, hidden, 2 * inner): 2}
    rows = orientations[tuple(module.gate_up_proj.shape)]
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(5, hidden, generator=generator)
    chosen, weights = torch.arange(5)[:, None] % experts, torch.ones(5, 1)

    def output(of_up):
        doubled = gate_up.clone()
        doubled[(slice(None),) * rows + (of_up,)] *= 2
        module.gate_up_proj.data = doubled
        return module(tokens, chosen, weights)

    # So small that nothing is clamped.
    gate_up = torch.randn(module.gate_up_proj.shape, generator=generator) * 0.01
    module.down_proj.data = torch.randn(module.down_proj.shape, generator=generator)
    once = output(slice(0))
    doubling = [name for name, up in (("", slice(inner, None)), (" interleaved", slice(1, None, 2))) if torch.equal(output(up), once * 2)]
    return f"{'transposed' if rows == 2 else 'rows'}{doubling[0]}" if once.any() and len(doubling) == 1 else None


def of_class(cls, config_class):
    """The layout of a class's experts, by what it says or else by what it does; None if neither tells."""
    said = layout(cls)
    if said is not None:
        return said
    for config in models.nested(config_class()):
        try:
            return layout_by_running(cls, copy.deepcopy(config))
        except Exception:  # any: it isn't built from this config, or runs otherwise
            continue
    return None


def layouts(module, config_class):
    """Those of all classes of experts in a module."""
    classes = [cls for _, cls in inspect.getmembers(module, inspect.isclass) if cls.__module__ == module.__name__]
    experts = [cls for cls in classes if re.search(r"Experts$", cls.__name__) and not re.search("Shared", cls.__name__)]
    return {of_class(cls, config_class) for cls in experts}


def main() -> int:
    """Writes the file."""
    parser = argparse.ArgumentParser(prog="scripts/make expert-layouts", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    models.without_packages()
    by_layout = defaultdict(list)
    for model_type in sorted(CONFIG_MAPPING):
        name = CONFIG_MAPPING[model_type].__module__.replace(".configuration_", ".modeling_")
        try:
            found = layouts(importlib.import_module(name), CONFIG_MAPPING[model_type])
        except ImportError:  # a config without a model of its own
            continue
        if len(found) == 1 and None not in found:
            by_layout[found.pop()].append(model_type)
    lines = [f"{words}: {' '.join(types)}\n" for words, types in sorted(by_layout.items())]
    args.out.write_text(HEAD.format(version=transformers.__version__) + "".join(lines))
    print({words: len(types) for words, types in by_layout.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
