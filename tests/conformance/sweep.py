"""Converts a small checkpoint of every model type that transformers has, and compares what is quantized with transformers' rules.

Each class is built from its default config on the meta device, and its tensors are written under the hub's names, as zeros, with
their dimensions divided. For each:

- NF4 quantizes the exact `nn.Linear`s that load_in_4bit would, and experts; nothing else, and nothing less but what is
  kept by intent (routers, heads, patch embeddings, what training kernels read raw), whose reasons are listed in `INTENT`;
- `llm_int8_skip_modules`, matched by transformers' own should_convert_module over every module of the loaded model, skips
  no quantized module and misses no kept Linear;
- INT4 converts, and `prequant verify` accepts both;
- transformers finds a parameter for each quantized weight of INT4, or config.json has what stops it, and only then.

    scripts/conformance sweep [--part N/M] [--few] [--classes N] [MODEL_TYPE]...

A line for every difference, and totals; fails if there is any. `--few` takes a model type of every tenth; `--part 1/4` the first
of four parts; `--classes 1` only the first class of each.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

sys.path.insert(0, str(Path(__file__).parent / "make" / "facts"))
import models  # noqa: E402
import names  # noqa: E402
from found import lost as lost_weights  # noqa: E402

# Why a Linear may be kept that load_in_4bit quantizes: parts of our reasons.
INTENT = re.compile(
    r"router|shared expert gate|output head|patch embedding|has one row|not read as a 4-bit weight|_keep_in_fp32_modules|"
    r"nn\.MultiheadAttention|has no elements"
)

# A dimension that is divided stays at least so large.
LEAST = 32

# One class of a type has the names of the others, but these, which add heads and towers.
CLASSES_PER_TYPE = 3


def divided(model):
    """By what dimensions are divided: a power of two that leaves the smallest width of the model's own at 64 or more."""
    widths = [tensor.shape[-1] for tensor in model.state_dict().values() if tensor.dim() == 2 and min(tensor.shape) >= 64]
    common = sorted(widths)[len(widths) // 2] if widths else 64
    factor = 1
    while common // (factor * 2) >= 128 and factor < 32:
        factor *= 2
    return factor


def small(shape, factor):
    return [d // factor if d % factor == 0 and d // factor >= LEAST else d for d in shape]


SIZES = re.compile(r"size|dim|width|channels|hidden|d_model|d_ff|ffn")


def small_config(value, factor, key=""):
    """The config with the same divided, so that shapes go on fitting it."""
    if isinstance(value, dict):
        return {k: small_config(v, factor, k) for k, v in value.items()}
    if isinstance(value, int) and not isinstance(value, bool) and SIZES.search(key):
        return small([value], factor)[0]
    return value


def write(loaded, folder):
    """The checkpoint, and for each tensor the parameters it is made from and whether numbers move."""
    model, factor = loaded.model, divided(loaded.model)
    tensors, made = {}, {}
    for name, shape, keys, moved in names.saved(loaded, prefixes=False):
        dtype = torch.bfloat16 if loaded.state[keys[0]].dtype.is_floating_point else loaded.state[keys[0]].dtype
        shape = small(shape, factor)
        if shape and torch.Size(shape).numel() > 1 << 26:
            shape = [min(d, 4096) for d in shape]
        tensors[name] = torch.zeros(shape, dtype=dtype)
        made[name] = (keys, moved)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = small_config(json.loads(model.config.to_json_string(use_diff=False)), factor)
    config["architectures"] = [type(model).__name__]
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config))
    return made


def run(*arguments):
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, timeout=300)
    if done.returncode:
        # What verify finds, it prints on standard output.
        said = (done.stdout + done.stderr).strip().splitlines() or ["it said nothing"]
        raise RuntimeError(f"{arguments[1]}: exit {done.returncode}: {said[0][:300]}")
    return done


def decisions(folder):
    """Of each tensor of the source: whether it is quantized, and the reason."""
    manifest = json.loads((folder / "prequant.json").read_text())
    return {
        source["name"]: (record["decision"] == "quantize", record["reason"])
        for record in manifest["tensors"]
        for source in record["sources"]
    }


def differences(loaded, made, decided, skipped):
    """What differs from transformers' own rules."""
    quantized_modules, kept_modules = {}, {}
    for name, (keys, moved) in made.items():
        quantized, reason = decided[name]
        kind = names.kind_of(loaded, keys[0])
        is_linear = kind in names.LINEARS
        if quantized and not (is_linear and not moved) and kind != "experts":
            yield f"quantized, but it is {kind}{' that is cut' if moved else ''}: {name}"
        if kind == "linear" and not moved and not quantized and not INTENT.search(reason):
            yield f"kept, though load_in_4bit quantizes it: {name} ({reason})"
        if is_linear or kind == "conv1d":
            into = quantized_modules if quantized else kept_modules
            into.update((names.module_of(key), name) for key in keys)
    for module, name in quantized_modules.items():
        if not should_convert_module(module, skipped):
            yield f"quantized, but the skip list means it: {module} ({name})"
    for module, name in kept_modules.items():
        if should_convert_module(module, skipped):
            yield f"kept, but the skip list misses it: {module} ({name})"
    for module, owner in loaded.model.named_modules():
        on_disk = module in quantized_modules or module in kept_modules
        if (type(owner) is nn.Linear or isinstance(owner, Conv1D)) and not on_disk and should_convert_module(module, skipped):
            yield f"has no tensor of its own, and the skip list misses it: {module}"


def quantizable(loaded, made):
    """Tensors of Linears that load_in_4bit quantizes, and that are no model's last: those are heads, as classifiers are."""
    linears = [name for name, (keys, moved) in made.items() if not moved and names.kind_of(loaded, keys[0]) == "linear"]
    return [name for name in linears if "." in name.removesuffix(".weight") and not re.match(r"classifier\.\d+\.", name)]


def check(prequant, model, folder):
    loaded = names.Loaded(model)
    source = folder / "source"
    source.mkdir()
    made = write(loaded, source)
    found = []
    for format in ("nf4", "int4"):
        out = folder / format
        options = ["--group-size", "32"] if format == "int4" else []
        try:
            run(prequant, "convert", source, out, "--format", format, "--quiet", "--threads", "1", *options)
        except RuntimeError as error:
            # A model of convolutions, or with a head alone, has nothing to quantize, and is refused with that.
            if "nothing to quantize" not in str(error):
                found.append(f"{format}: {error}")
            elif format == "nf4" and (linears := quantizable(loaded, made)):
                found.append(f"nothing is quantized, but load_in_4bit quantizes {linears[0]}: {error}")
            continue
        if format == "nf4":
            config = json.loads((out / "config.json").read_text())
            skipped = config["quantization_config"]["llm_int8_skip_modules"]
            found += differences(loaded, made, decisions(out), skipped)
            if len(skipped) > 1000:
                found.append(f"{len(skipped)} entries in the skip list")
        else:
            found += guarded(model, out, source)
        try:
            run(prequant, "verify", out, "--quiet")
        except RuntimeError as error:
            found.append(f"{format}: {error}")
    return found


def guarded(model, out, source):
    """What config.json stops transformers at must be what it would leave out."""
    stops = json.loads((out / "config.json").read_text())["quantization_config"]["global_compression_ratio"]
    lost = lost_weights(model, out, source)
    if lost and not stops:
        yield f"transformers finds no parameter for it, and nothing in config.json stops it: {lost[0]}"
    if stops and not lost:
        yield f"config.json stops transformers ({stops}), which has a parameter for every weight"


def classes(model_type, most):
    """The first few classes of a type that can be built: what is loaded first."""
    built = 0
    ordered = sorted(models.classes_of(model_type).items(), key=lambda item: not re.search(r"For(CausalLM|Conditional)", item[0]))
    for name, cls in ordered:
        try:
            model = models.build(cls, next(models.configs_of(model_type, None)))
            names.Loaded(model)
        except Exception:  # whatever a default config can't be built for
            continue
        yield name, model
        built += 1
        if built == most:
            return


# What is known to differ, and why: parts of the lines that are printed. None of it is silent: the command refuses, or says that a
# tensor is kept. A type that no longer differs fails, so that it is taken out here.
KNOWN = {
    "inkling2": ("layout of the fused experts", "as inkling_mm_model"),
    "inkling2_text": ("layout of the fused experts", "as inkling_mm_model"),
    "inkling_mm_model": (
        "layout of the fused experts", "group formats refuse its fused experts: gate and up alternate on the hub, and no client has one"
    ),
    "jetmoe": ("layout of the fused experts", "group formats refuse its fused experts: no client has one of them alone"),
}


def main():
    parser = argparse.ArgumentParser(prog="scripts/conformance sweep", description=__doc__.splitlines()[0])
    parser.add_argument("prequant", type=Path)
    parser.add_argument("model_types", nargs="*")
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--classes", type=int, default=CLASSES_PER_TYPE, help="of each type, at most")
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    os.environ["PYTHONWARNINGS"] = "ignore"
    import transformers

    transformers.logging.set_verbosity_error()
    models.without_packages()
    part, parts = map(int, args.part.split("/"))
    types = args.model_types or models.model_types()
    types = types[:: 10 if args.few else 1][part - 1 :: parts]
    totals, wrong, seen = Counter(), Counter(), set()
    for model_type in types:
        built = 0
        for name, model in classes(model_type, args.classes):
            built += 1
            totals["classes"] += 1
            try:
                with tempfile.TemporaryDirectory() as folder:
                    found = check(args.prequant, model, Path(folder))
            except Exception:
                found = [f"sweep.py: {traceback.format_exc().strip().splitlines()[-1]}"]
            # Layers are alike: one line for all that differ by their numbers only.
            lines = Counter(re.sub(r"\.\d+(?=\.)|\.\d+$", ".N", line) for line in found)
            for line, times in lines.items():
                print(f"{model_type} {name}: {line}" + (f" (x{times})" if times > 1 else ""), flush=True)
            part_of_known, why = KNOWN.get(model_type, (None, None))
            known = [line for line in lines if part_of_known and part_of_known in line]
            if known:
                print(f"{model_type}: known: {why}", flush=True)
            wrong[model_type] += len(lines) > len(known)
            seen.update([model_type] if known else [])
        if built and model_type in KNOWN and model_type not in seen:
            print(f"{model_type}: no longer differs: take it out of KNOWN in sweep.py", flush=True)
            wrong[model_type] += 1
        totals["types" if built else "types not built"] += 1
    bad = sum(bool(count) for count in wrong.values())
    print(f"{totals['types']} types, {totals['classes']} classes; {totals['types not built']} not built; {bad} types differ")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
