"""Writes src/models/data/experts.json: how transformers puts experts together when it loads a checkpoint.

For every model_type of its conversion mapping that has experts: the renames, in order, and the converters of experts with
their operations. The rows in src/models/families.rs are tested against this file.

Needs torch 2.15.0 and transformers 5.23.0.

    scripts/make experts [--check]
"""

import argparse
import json
import sys
from pathlib import Path

import transformers
from transformers import conversion_mapping
from transformers.core_model_loading import WeightConverter

# On disk as in the model: experts, but nothing to convert.
FUSED_ON_DISK = ["gemma4", "gpt_oss", "llama4", "qwen3_5_moe"]


def describe(mapping: list) -> dict:
    """One model_type's renames and converters of experts."""
    renames, converters = [], []
    for entry in mapping:
        sources, targets = list(entry.source_patterns), list(entry.target_patterns)
        if not isinstance(entry, WeightConverter):
            renames += [list(pair) for pair in zip(sources, targets, strict=False)]
        elif any(word in source for source in sources for word in ("expert", "moe.")):
            operations = [[type(op).__name__, vars(op)] for op in entry.operations]
            simple = [[name, {key: value for key, value in of.items() if isinstance(value, (int, bool))}] for name, of in operations]
            converters.append({"sources": sources, "targets": targets, "operations": simple})
    return {"renames": renames, "converters": converters}


def main() -> int:
    """Writes the file."""
    parser = argparse.ArgumentParser(prog="scripts/make experts", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    models = {}
    for model_type, mapping in sorted(conversion_mapping._build_checkpoint_conversion_mapping().items()):
        described = describe(mapping)
        renames_experts = any("experts" in to for _, to in described["renames"])
        if described["converters"] or renames_experts or model_type in FUSED_ON_DISK:
            models[model_type] = described
    rows = [f"{json.dumps(name)}: {json.dumps(models[name], separators=(',', ':'))}" for name in models]
    head = f'{{"transformers": "{transformers.__version__}", "models": {{\n'
    args.out.write_text(head + ",\n".join(rows) + "\n}}\n")
    print(f"{len(models)} model types, {args.out.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
