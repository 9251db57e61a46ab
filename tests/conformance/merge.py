"""Compares what `prequant merge` gives with PEFT's own merge_and_unload, on models large enough to count roundings.

    scripts/conformance merge [-k WORD]

Each case trains an adapter for two steps, saves it with PEFT, merges it with prequant into the bf16 base, and compares with PEFT run in f64
and rounded once: every bit. With PEFT run in f32 and rounded: at most a unit in the last place, in about one of 100,000 elements: f32's error
is that of a number of bf16 that is halfway between two others. Where base and change, or the terms of a change, cancel each other it is
larger than a unit of what is left; it must be small beside what was added up. What was merged is loaded by plain transformers. Adapters of experts are trained on the bf16 model and, with prequant's loader, on 4-bit folders
of both layouts, where PEFT meets parametrized parameters.
"""

from __future__ import annotations

import os

# Before torch is imported: compiled dequantization would take a minute and gives the same numbers.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import argparse
import logging
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "python" / "src"))
sys.path.append(str(ROOT / "tests" / "conformance" / "make"))

import prequant_loader
from merge_goldens import rounded

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

COMMON = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "tie_word_embeddings": False,
}

MODELS = {
    "llama": COMMON | {"hidden_size": 512, "intermediate_size": 1536, "head_dim": 64},
    "qwen3_moe": COMMON | {"intermediate_size": 512, "moe_intermediate_size": 128, "num_experts": 16, "num_experts_per_tok": 4},
    "gpt_oss": COMMON | {"intermediate_size": 128, "num_local_experts": 8, "num_experts_per_tok": 2},
}

MOST_IN_F32 = 2e-5
"""Of the elements, how many may differ from PEFT in f32: half a unit of f32 is this part of the distance between numbers of bf16, and more."""


class Merger:
    """The binary under test, and a folder of its own for each case."""

    def __init__(self, binary: Path, work: Path) -> None:
        self.binary, self.work = binary, work

    def __call__(self, command: str, *names: str) -> None:
        """`prequant COMMAND`; names that are no flags are folders of this case."""
        arguments = [name if name.startswith("--") else str(self.work / name) for name in names]
        subprocess.run([self.binary, command, "--quiet", *arguments], check=True)

    def base(self, model_type: str) -> Path:
        """A random bf16 model, saved."""
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **MODELS[model_type]), dtype=torch.float32)
        model.to(torch.bfloat16).save_pretrained(self.work / "base")
        return self.work / "base"


def train(model: PreTrainedModel, config: LoraConfig, folder: Path) -> None:
    """Two steps, with factors that are far from where they begin; the change is small beside the weights."""
    torch.manual_seed(11)
    wrapped = get_peft_model(model, config)
    named = {name: parameter for name, parameter in wrapped.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.normal_(std=0.05 if "lora_A" in name else 0.002)
    optimizer = torch.optim.AdamW(named.values(), lr=1e-3)
    tokens = torch.randint(0, 512, (2, 24))
    for _ in range(2):
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped.save_pretrained(folder)


def by_peft(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What PEFT gives, in `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    merged = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).merge_and_unload()
    return dict(merged.named_parameters())


def check(merge: Merger, adapter: str = "adapter", base: str = "base") -> None:
    """Merges, loads what was merged as any model, and compares each parameter."""
    merge("merge", base, adapter, "merged")
    merge("verify", "merged", "--against", base, adapter)
    found = dict(AutoModelForCausalLM.from_pretrained(merge.work / "merged", dtype=torch.bfloat16).named_parameters())
    exact = by_peft(merge.work / base, merge.work / adapter, torch.float64)
    single = by_peft(merge.work / base, merge.work / adapter, torch.float32)
    before = dict(AutoModelForCausalLM.from_pretrained(merge.work / base, dtype=torch.float64).named_parameters())
    assert found.keys() == exact.keys()
    elements = differing = otherwise = 0
    for name, value in exact.items():
        expected = rounded(value, torch.bfloat16)
        otherwise += int((found[name] != expected).sum())
        apart = (found[name].double() - single[name].bfloat16().double()).abs()
        unit = 2.0 ** (torch.maximum(expected.double().abs(), before[name].abs()).clamp_min(1e-30).log2().floor() - 7)
        rounding = (value - before[name]).abs().max() * 2.0**-18
        assert (apart <= unit.clamp_min(rounding)).all(), f"{name}: more than a unit in the last place from PEFT in f32"
        elements, differing = elements + value.numel(), differing + int((apart > 0).sum())
    assert otherwise == 0, f"{otherwise} of {elements} elements aren't PEFT's in f64, rounded once"
    assert differing <= MOST_IN_F32 * elements, f"{differing} of {elements} elements aren't PEFT's in f32"
    print(f"       {elements:,} elements; {differing} are not PEFT's in f32", flush=True)


def dense(merge: Merger, **lora: object) -> None:
    """Linears of a Llama."""
    model = AutoModelForCausalLM.from_pretrained(merge.base("llama"), dtype=torch.float32)
    train(model, LoraConfig(target_modules="all-linear", **lora), merge.work / "adapter")
    check(merge)


def experts(merge: Merger, model_type: str) -> None:
    """Attention and experts, trained on the bf16 model's numbers."""
    model = AutoModelForCausalLM.from_pretrained(merge.base(model_type), dtype=torch.float32)
    train(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], target_parameters=EXPERTS), merge.work / "adapter")
    check(merge)


def trained_in_4_bits(merge: Merger, layout: str) -> None:
    """A QLoRA adapter, merged into the bf16 base and into what it was trained on."""
    merge.base("qwen3_moe")
    merge("convert", "base", "quantized", f"--experts={layout}")
    with prequant_loader.installed():
        prequant_loader.fix_peft()
        model = AutoModelForCausalLM.from_pretrained(merge.work / "quantized")
        train(model, LoraConfig(r=4, target_modules=["q_proj"], target_parameters=EXPERTS), merge.work / "adapter")
    check(merge)
    shutil.rmtree(merge.work / "merged")
    merge("dequantize", "quantized", "decoded")
    merge("merge", "quantized", "adapter", "from-quantized")
    merge("merge", "decoded", "adapter", "from-decoded")
    weights = [(merge.work / folder / "model.safetensors").read_bytes() for folder in ("from-quantized", "from-decoded")]
    assert weights[0] == weights[1]
    check(merge, base="decoded")


CASES: dict[str, Callable[[Merger], None]] = {
    "llama, LoRA": partial(dense, r=16, lora_alpha=32),
    "llama, rsLoRA": partial(dense, r=8, lora_alpha=11, use_rslora=True),
    "qwen3_moe, experts one by one": partial(experts, model_type="qwen3_moe"),
    "gpt_oss, fused experts": partial(experts, model_type="gpt_oss"),
    "qwen3_moe, trained on NF4, keep": partial(trained_in_4_bits, layout="keep"),
    "qwen3_moe, trained on NF4, fuse": partial(trained_in_4_bits, layout="fuse"),
}


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def main() -> int:
    """Runs the cases; prints one line each and the count at the end."""
    parser = argparse.ArgumentParser(prog="scripts/conformance merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prequant", type=Path)
    parser.add_argument("-k", metavar="WORD", default="")
    arguments = parser.parse_args()
    binary = arguments.prequant.resolve()
    if not binary.is_file():
        parser.error(f"{binary} does not exist; build it with `cargo build --release`")

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(2)
    passed = failed = 0
    for name, case in CASES.items():
        if arguments.k not in name:
            continue
        start = time.monotonic()
        try:
            case(Merger(binary, fresh(ROOT / "target" / "merge")))
        except Exception:  # any error is this case's failure; the others still run
            traceback.print_exc()
            failed += 1
            outcome = "FAILED"
        else:
            passed += 1
            outcome = "ok"
        print(f"{outcome:6} {name} ({time.monotonic() - start:.1f} s)", flush=True)
    shutil.rmtree(ROOT / "target" / "merge", ignore_errors=True)
    print(f"\n{passed} passed, {failed} failed")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    raise SystemExit(main())
