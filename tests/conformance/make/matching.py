"""Writes src/plan/kept_modules/data/matching.json: which modules clients take entries of their lists to mean.

Each client's own function is asked of every pair of an entry and a module's name. It is run in the environments of two releases
of transformers, whose rules differ, and of compressed-tensors; each adds its answers to the file.

Needs transformers (5.23.0 and 5.14.1), or compressed-tensors 0.19.0.

    scripts/make matching [--check]
"""

import argparse
import json
import sys
from importlib import metadata
from pathlib import Path

MODULES = [
    "lm_head", "model.embed_tokens", "model.embed_tokens_extend.image_embed.q_proj", "model.layers.1.mlp.gate",
    "model.layers.1.mlp.gate_proj", "model.layers.11.mlp.gate", "model.layers.1.mlp.experts.0.w1", "model.layers.1xmlp.gate",
    "pre_classifier", "classifier", "model.classifier.out_proj", "decoder", "decoder_head", "model.visual.blocks.0.attn.qkv",
    "visual.blocks.10.attn.qkv", "model.visual_x.q_proj", "layers.0.shared_transformer.q_proj",
    "model.layers.7.shared_transformer.q_proj",
]

ENTRIES = [
    "lm_head", "head", "model.embed_tokens", r"model\.embed_tokens$", "model.layers.1", "model.layers.1.mlp.gate",
    r"model\.layers\.1\.mlp\.gate$", "model.layers.1.mlp.experts", "classifier", "classifier$", "decoder", "decoder$",
    r"model\.layers\.\d+\.shared_transformer", "model.visual", "visual", r"layers\.0", "gate", "",
    r"re:.*\.layers\.1\.mlp\.experts\..*", r"re:(.*\.)?visual\..*", r"re:(.*\.)?blocks\.\d+\.attn\.qkv$", "re:.*gate$", "re:gate",
    r"re:model\.layers\.1", "re:lm_head",
]


def client():
    """The client of this environment and its rule."""
    try:
        from compressed_tensors.utils.match import match_name
    except ImportError:
        from transformers.quantizers.quantizers_utils import should_convert_module

        name = f"transformers {metadata.version('transformers')}"
        return name, lambda entry, module: not should_convert_module(module, [entry])
    return f"compressed-tensors {metadata.version('compressed-tensors')}", lambda entry, module: match_name(module, entry)


def main() -> int:
    """Adds one client's answers."""
    parser = argparse.ArgumentParser(prog="scripts/make matching", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--first", action="store_true", help="begin the file anew")
    args = parser.parse_args()
    name, means = client()
    asked = [entry for entry in ENTRIES if name.startswith("compressed") or not entry.startswith("re:")]
    answers = {entry: [module for module in MODULES if means(entry, module)] for entry in asked}
    clients = {} if args.first else json.loads(args.out.read_text())["clients"]
    clients[name] = answers
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"modules": MODULES, "clients": clients}, indent=1) + "\n")
    print(f"{name}: {len(asked)} entries, {len(MODULES)} modules")
    return 0


if __name__ == "__main__":
    sys.exit(main())
