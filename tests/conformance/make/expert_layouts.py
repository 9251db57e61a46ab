"""Writes src/models/data/expert_layouts.txt: how a layer's experts lie in transformers' parameters of all of them.

A class of experts is told by the decorator that lets it run on other implementations, which says whether matrices are
transposed and whether gate and up alternate. A model type is listed where all such classes of its module agree; a class whose
own code runs its experts isn't.

Needs torch 2.15.0 and transformers 5.23.0.

    scripts/make expert-layouts [--check]
"""

import argparse
import importlib
import inspect
import re
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "facts"))

import models
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


def layouts(module):
    """Those of all classes of experts in a module."""
    classes = [cls for _, cls in inspect.getmembers(module, inspect.isclass) if cls.__module__ == module.__name__]
    # Experts that aren't decorated run by their own code, which may read them in any way.
    experts = [cls for cls in classes if re.search(r"Experts$", cls.__name__) and not re.search("Shared", cls.__name__)]
    return {layout(cls) for cls in experts}


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
            found = layouts(importlib.import_module(name))
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
