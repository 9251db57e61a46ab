"""Loads what prequant converts with unsloth-zoo's patches of transformers, and without prequant_loader.

    scripts/conformance unsloth [NAME]...

Each NAME is a checkpoint of python/tests/architectures.py; all if none is given. Every layout is loaded by plain `from_pretrained`. All
weights, decoded, must be those of the folder that `prequant dequantize` makes; and where unsloth puts the same weights in 4 bits when it
loads the bf16 checkpoint, the logits must be the same to the last bit.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# unsloth-zoo's own switches: without unsloth, without a GPU, nothing compiled.
os.environ["UNSLOTH_IS_PRESENT"] = "1"
os.environ["UNSLOTH_ZOO_DISABLE_GPU_INIT"] = "1"
os.environ["UNSLOTH_COMPILE_DISABLE"] = "1"
os.environ["UNSLOTH_COMPILE_LOCATION"] = tempfile.mkdtemp()  # it makes the folder
atexit.register(shutil.rmtree, os.environ["UNSLOTH_COMPILE_LOCATION"])

import argparse
import logging
import subprocess
import sys
import time
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import torch
import torch._inductor.config  # before unsloth-zoo puts its stand-in for Triton in place, which torch 2.15's inductor can't import
import transformers
import unsloth_zoo
from bitsandbytes import functional
from transformers import BitsAndBytesConfig
from unsloth_zoo.temporary_patches.common import TEMPORARY_PATCHES

sys.path.append(str(Path(__file__).resolve().parents[2] / "python" / "tests"))

import architectures

LAYOUTS = {"keep": (), "fuse": (), "keep, double": ("--double-quant",), "fuse, double": ("--double-quant",)}
"""By name, which begins with what --experts is: further flags of `prequant convert`."""

REFUSED = {
    ("qwen3_vl_moe", "keep"),
    ("qwen3_vl_moe", "fuse"),
    ("qwen3_vl_moe", "keep, double"),
    ("qwen3_vl_moe", "fuse, double"),
    ("qwen3_vl_moe-hub", "fuse"),
    ("qwen3_vl_moe-hub", "fuse, double"),
}
"""What unsloth stops at: it has these experts as the hub has them, rows and columns exchanged, and takes them only like that."""

QUANTIZED_ANEW = {("qwen3_moe-ragged", "keep"), ("qwen3_moe-ragged", "keep, double")}
"""Expert matrices that end within a block: unsloth decodes them, and quantizes all of a layer at once, which costs some precision."""
NO_FORWARD = "qwen3_moe-1-expert"
"""unsloth's forward fails with a single expert that has a tensor of its own."""


class Case:
    """A checkpoint, and the class that it is loaded with."""

    def __init__(self, prequant: Path, work: Path, name: str) -> None:
        self.prequant, self.work, self.name = prequant, work / name, name
        self.model_class = architectures.SOURCES[name](self.work / "source")

    def converted(self, layout: str) -> Path:
        """`prequant convert`."""
        folder = self.work / layout.replace(", ", "-")
        flags = ("--experts", layout.partition(",")[0], *LAYOUTS[layout], *architectures.FLAGS.get(self.name, ()))
        if self.name.endswith("-ragged"):
            flags += ("--block-size", str(architectures.BLOCK_SIZES[self.name]))
        self.run("convert", self.work / "source", folder, *flags, "--device", "cpu")
        return folder

    def decoded(self, converted: Path) -> Path:
        """`prequant dequantize`."""
        folder = converted.with_name(f"{converted.name}-decoded")
        self.run("dequantize", converted, folder)
        return folder

    def run(self, *arguments: str | Path) -> None:
        subprocess.run([self.prequant, *arguments, "--quiet"], check=True)

    def load(self, folder: Path, **options: object) -> transformers.PreTrainedModel:
        """Nothing missing, left over or of another size."""
        model, report = self.model_class.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True, **options)
        problems = {what: names for what, names in report.items() if names}
        assert not problems, problems
        return model.train()  # in eval mode bitsandbytes rearranges codes on some CPUs

    def quantized_on_load(self) -> transformers.PreTrainedModel:
        """The bf16 checkpoint, its experts quantized by unsloth."""
        options = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=False,
        )
        return self.load(self.work / "source", quantization_config=options)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters, decoded."""
    return {name: decode(parameter) for name, parameter in model.named_parameters()}


def decode(parameter: torch.Tensor) -> torch.Tensor:
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.detach()
    return functional.dequantize_4bit(parameter.detach().view(torch.uint8).reshape(-1, 1), state).reshape(state.shape)


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 35).reshape(2, 16)
    with torch.no_grad():
        return model(input_ids=ids).logits


def quantized_names(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if getattr(parameter, "quant_state", None) is not None}


def check(case: Case, layout: str, reference: torch.nn.Module) -> str:
    """Loads one layout and compares it with `prequant dequantize` and, if the same is in 4 bits there, with `reference`;
    returns what was compared."""
    folder = case.converted(layout)
    if (case.name, layout) in REFUSED:
        try:
            case.load(folder)
        except RuntimeError:
            return "refused"
        raise AssertionError("unsloth loads it now: take it out of REFUSED")
    model = case.load(folder)
    quantized = quantized_names(model)
    experts = [name for name in quantized if "experts." in name]
    assert experts or case.name == "llama"
    found, expected = weights(model), weights(case.load(case.decoded(folder)))
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    differing = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    if (case.name, layout) in QUANTIZED_ANEW:
        assert sorted(differing) == sorted(experts), differing
        error = max(relative_error(found[name], expected[name]) for name in experts)
        assert error < 0.1, error
        return f"{len(experts)} parameters of experts, quantized anew, are off by {error:.2f}"
    assert not differing, f"not as prequant decodes them: {differing}"
    done = f"{len(quantized)} 4-bit parameters, {len(experts)} of experts, as prequant decodes them"
    if case.name != NO_FORWARD and LAYOUTS[layout] == () and quantized_names(reference) == quantized:
        assert torch.equal(logits(model), logits(reference)), "logits differ from those after quantization on load"
        done += "; logits as when unsloth quantizes on load"
    return done


def check_strict_guard(cases: list[Case]) -> None:
    """`--guard strict` stops unsloth, as docs/cli.md says: whoever uses it leaves that out."""
    for case in cases:
        if case.name == "qwen3_moe":
            folder = case.work / "strict"
            case.run("convert", case.work / "source", folder, "--guard", "strict", "--device", "cpu")
            try:
                case.load(folder)
            except (KeyError, ValueError) as error:
                assert "prequant_loader" in str(error), error
                print("qwen3_moe, --guard strict: refused", flush=True)
            else:
                raise AssertionError("unsloth loads what --guard strict should keep it from: docs/cli.md says otherwise")


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prequant", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args()
    if unknown := set(options.names) - architectures.SOURCES.keys():
        parser.error(f"{', '.join(sorted(unknown))}: not among {', '.join(architectures.SOURCES)}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        names = options.names or list(architectures.SOURCES)
        # Before the patches: unsloth has some models' experts in another layout, and would save them like that.
        cases = [Case(options.prequant.resolve(), Path(folder), name) for name in names]
        for patch in TEMPORARY_PATCHES:
            patch()
        failed, compared = [], 0
        check_strict_guard(cases)
        for case in cases:
            reference = case.quantized_on_load()
            for layout in LAYOUTS:
                try:
                    done = check(case, layout, reference)
                except Exception as error:
                    failed.append(f"{case.name}, {layout}")
                    done = f"FAILED: {type(error).__name__}: {error}"
                compared += "logits" in done
                print(f"{case.name}, {layout}: {done}", flush=True)
    if failed:
        sys.exit(f"unsloth: {len(failed)} failed: {'; '.join(failed)}")
    assert compared or options.names, "no logits were compared"
    print(f"unsloth: passed in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
