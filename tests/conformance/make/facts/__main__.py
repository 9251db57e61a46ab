"""Writes src/models/data/facts.txt: what transformers makes of every tensor of every model type that it has.

Each class of each type is built from its default config on the meta device (no weight exists). Its parameters are renamed
to the names that save_pretrained writes, and those that from_pretrained takes besides; numbers become `*`, but those that
decide which module a tensor belongs to; and each row says what module owns the tensor: an exact nn.Linear that `load_in_4bit` quantizes, a head, a router, an
embedding. Types and classes that can't be built are listed in not-built.txt, with why. src/models/facts reads the file, and
the rules go by it.

What was found for a type is kept in target/facts, by the version of transformers and of these scripts: an interrupted run is
resumed, and a run for a newer transformers begins anew.

Needs torch 2.15.0, transformers 5.23.0 and bitsandbytes 0.50.2. Takes some ten minutes on two cores.

    scripts/make facts [--check] [--only MODEL_TYPE]...
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


def main():
    parser = argparse.ArgumentParser(prog="scripts/make facts", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", help="a model_type, for trying things out; may be repeated")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=HERE.parents[3] / "target" / "facts")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()

    import transformers

    import collect
    import encode
    import models

    scripts = b"".join(path.read_bytes() for name in ("models", "names", "collect", "patterns") for path in [HERE / f"{name}.py"])
    cache = args.cache / f"{transformers.__version__}-{hashlib.sha256(scripts).hexdigest()[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    types = args.only or models.model_types()
    places = {model_type: cache / f"{model_type}.{collect.settings_hash(model_type)}.json" for model_type in types}
    missing = [(model_type, place) for model_type, place in places.items() if not place.exists()]
    if missing:
        # A process for a few types only: transformers keeps what it has imported.
        with multiprocessing.get_context("spawn").Pool(min(args.jobs, len(missing)), collect.start, maxtasksperchild=50) as pool:
            for _ in pool.imap_unordered(collect.write, missing):
                pass
    described = [json.loads(place.read_text()) for place in places.values()]
    facts, not_built = encode.text(transformers.__version__, described)
    args.out.write_text(facts)
    args.out.with_name("not-built.txt").write_text(not_built)
    built = sum(bool(one["built"]) for one in described)
    classes = sum(len(one["built"]) for one in described)
    print(f"{built} of {len(types)} model types, {classes} classes, {len(facts)} bytes; {len(missing)} types built anew")


if __name__ == "__main__":
    main()
