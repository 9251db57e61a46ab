"""Writes src/models/data/tied_by_default.txt: the model types whose config ties the output embedding to the input's where it says
nothing of it.

Needs torch 2.15.0 and transformers 5.23.0.

    scripts/make tied-by-default [--check]
"""

import argparse
import sys
from pathlib import Path

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HEAD = """\
# Model types whose config ties the head to the embedding where "tie_word_embeddings" isn't given, in transformers {version}. Made
# by scripts/make tied-by-default.
"""


def ties(model_type):
    """Whether a default config does, or that of the language model in it."""
    try:
        config = CONFIG_MAPPING[model_type]()
        text = config.get_text_config(decoder=True)
    except Exception:  # what has no default
        return False
    return bool(getattr(config, "tie_word_embeddings", False) or getattr(text, "tie_word_embeddings", False))


def main() -> int:
    """Writes the file."""
    parser = argparse.ArgumentParser(prog="scripts/make tied-by-default", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found = [model_type for model_type in sorted(CONFIG_MAPPING) if ties(model_type)]
    args.out.write_text(HEAD.format(version=transformers.__version__) + "".join(f"{name}\n" for name in found))
    print(f"{len(found)} model types")
    return 0


if __name__ == "__main__":
    sys.exit(main())
