"""What real clients make of prequant's NF4 and FP4 on a GPU: bytes, load time, peak memory, logits, QLoRA.

    scripts/gpu-clients [--device cuda|cpu] [--size 4GB] [--elements N] [--prequant BINARY] [--build]

bitsandbytes quantizes fresh random data on the device, and every code and scale must be the one that prequant writes: NF4 and FP4,
three sizes of blocks, with double quantization and without, three dtypes, normal, heavy-tailed and arbitrary numbers. Then a random
Qwen3-MoE of --size is loaded in bf16, quantized on load, and from what prequant makes of it with `--experts keep` and `fuse`, each in a
process of its own: seconds, the device's peak memory, logits, and the losses of four QLoRA steps on attention and experts. Logits and
losses of the three in 4 bits must be equal to the last bit. Prints a line for each, and fails if anything differs.

--build puts all of it into target/gpu-clients, to be taken to a machine with a GPU: `target/gpu-clients/run` there needs only a Python
with torch, transformers, peft and accelerate, and takes the same options.
"""

from __future__ import annotations

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WAYS = ("bf16", "on load", "keep", "fuse")
BLOCK_SIZES = (64, 128, 4096)
STEPS = 4

# bitsandbytes' CUDA sums the mean of absmax in another order: with double quantization the last bit of these may differ.
SUMS = ("nested_absmax",)


def convert(prequant: Path, source: Path, to: Path, *flags: str) -> None:
    command = [prequant, "convert", source, to, "--quiet", "--force", *flags]
    subprocess.run([str(word) for word in command], check=True)


# --- Bytes -----------------------------------------------------------------------------------------------------------


def kinds(elements: int, device: str) -> dict[str, Any]:
    """Random tensors by name: three distributions in three dtypes."""
    import torch

    shape = (max(1, elements // 4096), 4096)
    made = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        bits = torch.randint(-(2**15), 2**15 - 1, shape, dtype=torch.int16, device=device)
        any_bits = bits.view(torch.float16 if dtype == torch.float16 else torch.bfloat16).float()
        for kind, values in {
            "normal": torch.randn(shape, device=device) * 0.02,
            "heavy": torch.distributions.StudentT(3.0).sample(shape).to(device) * 0.02,
            # Within what absmax has a reciprocal of.
            "bits": torch.nan_to_num(any_bits, 0.0, 0.0, 0.0).clamp(-(2.0**125), 2.0**125),
        }.items():
            made[f"{kind}_{dtype}".replace("torch.", "")] = torch.nan_to_num(values.to(dtype), 0.0, 0.0, 0.0)
    return made


def compare_bytes(prequant: Path, work: Path, elements: int, device: str) -> int:
    """How many tensors differ."""
    import torch
    from bitsandbytes import functional
    from safetensors import safe_open
    from safetensors.torch import save_file

    torch.manual_seed(time.time_ns() % 2**31)
    tensors, source = kinds(elements, device), work / "bytes"
    source.mkdir()
    prefix = "model.layers.0.mlp."
    save_file({f"{prefix}{name}.weight": tensor.cpu() for name, tensor in tensors.items()}, source / "model.safetensors")
    (source / "config.json").write_text('{"model_type": "x"}')
    wrong = 0
    for quant_type in ("nf4", "fp4"):
        for block_size in BLOCK_SIZES:
            for double in (False, True):
                flags = ["--format", quant_type, "--block-size", str(block_size), "--include", "weight"]
                convert(prequant, source, work / "converted", *flags, *(["--double-quant"] if double else []))
                with safe_open(work / "converted" / "model.safetensors", "pt", device=device) as file:
                    for name, tensor in tensors.items():
                        options = {"blocksize": block_size, "quant_type": quant_type, "compress_statistics": double}
                        codes, state = functional.quantize_4bit(tensor, **options)
                        theirs = {"": codes, ".absmax": state.absmax}
                        if double:
                            theirs[".nested_absmax"] = state.state2.absmax
                        for part, expected in theirs.items():
                            found = file.get_tensor(f"{prefix}{name}.weight{part}").flatten()
                            differ = int((found != expected.flatten()).sum())
                            ignored = part.removeprefix(".") in SUMS or (double and part == ".absmax")
                            # Zeros of FP4 have another sign on a CPU.
                            ignored |= device == "cpu" and quant_type == "fp4"
                            if differ:
                                what = f"{quant_type} {block_size}{' double' if double else ''} {name}{part}"
                                print(f"{'      ' if ignored else 'WRONG '} {what}: {differ} of {found.numel()} differ")
                                wrong += not ignored
    print(f"{'ok    ' if not wrong else 'FAILED'} bitsandbytes on {device}: {wrong} of {108 * 2} sets of codes and scales differ")
    return wrong


# --- Models ----------------------------------------------------------------------------------------------------------


def make_model(folder: Path, size: float, device: str) -> None:
    """A random bf16 Qwen3-MoE of about `size` bytes."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts, hidden, inner = (64, 2048, 768) if size > 1e9 else (8, 256, 128)
    layers = max(1, round(size / (experts * 3 * hidden * inner * 2)))
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=inner, moe_intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=4, head_dim=hidden // 16,
        num_experts=experts, num_experts_per_tok=min(8, experts // 2), max_position_embeddings=512,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="2GB")


def load(way: str, work: Path, device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    place = {"device_map": {"": device}, "dtype": torch.bfloat16}
    if way != "on load":
        return AutoModelForCausalLM.from_pretrained(work / way, **place)
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(work / "bf16", quantization_config=config, **place)
    for module in [module for name, module in model.named_modules() if name.endswith("mlp.experts")]:
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(module, name, compress_statistics=False, quant_type="nf4")
    return model


def train(model: Any, device: str) -> list[float]:
    """The losses of a few steps of QLoRA."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=attention, target_parameters=experts, task_type="CAUSAL_LM")
    model = get_peft_model(model.train(), config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    tokens = (torch.arange(256) * 37 % 64 + 5).reshape(2, 128).to(device)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in parameters), "an adapter has no gradient"
    return losses


def one_way(way: str, work: Path, device: str) -> None:
    """Loads, runs and trains one model, in a process of its own; prints what that took as JSON."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    import prequant_loader.peft

    prequant_loader.peft.fix_peft()
    cuda = device.startswith("cuda")
    if cuda:
        torch.zeros(1, device=device)
    start = time.perf_counter()
    model = load(way, work, device)
    if cuda:
        torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated() if cuda else 0
    with torch.no_grad():
        logits = model.train()(torch.arange(7, 71, device=device).reshape(1, 64)).logits.float().cpu()
    torch.save(logits, work / f"{way}.pt")
    losses = train(model, device) if way != "bf16" else []
    print(json.dumps({"seconds": seconds, "peak": peak, "losses": losses}))


def compare_models(work: Path, device: str) -> int:
    """How many of the models in 4 bits differ from what quantizing on load gives."""
    import torch

    found: dict[str, Any] = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, "--work", str(work), "--device", device]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{way} failed:\n{done.stderr[-3000:]}")
        found[way] = json.loads(done.stdout.splitlines()[-1])
        peak = f", peak {found[way]['peak'] / 2**20:,.0f} MiB" if found[way]["peak"] else ""
        losses = " ".join(map(repr, found[way]["losses"]))
        print(f"       {way:8} loaded in {found[way]['seconds']:.2f} s{peak}{', losses ' + losses if losses else ''}", flush=True)
    logits = {way: torch.load(work / f"{way}.pt", weights_only=True) for way in WAYS}
    wrong = 0
    for way in ("keep", "fuse"):
        is_same = torch.equal(logits[way], logits["on load"]) and found[way]["losses"] == found["on load"]["losses"]
        print(f"{'ok    ' if is_same else 'WRONG '} {way}: logits and losses {'equal' if is_same else 'are not'} those of quantizing on load")
        wrong += not is_same
    assert not torch.equal(logits["bf16"], logits["keep"]), "nothing was quantized"
    return wrong


# --- All of it -------------------------------------------------------------------------------------------------------


def build(prequant: Path, to: Path) -> None:
    """A folder that travels."""
    import bitsandbytes

    shutil.rmtree(to, ignore_errors=True)
    site = to / "site"
    shutil.copytree(HERE.parent / "python" / "src" / "prequant_loader", site / "prequant_loader", ignore=shutil.ignore_patterns("__pycache__"))
    library = Path(bitsandbytes.__file__).parent
    others = [file.name for file in library.glob("*.so") if not file.name.endswith(("_cpu.so", "_cuda130.so"))]
    shutil.copytree(library, site / "bitsandbytes", ignore=shutil.ignore_patterns("__pycache__", *others))
    for distribution in library.parent.glob("bitsandbytes-*.dist-info"):
        shutil.copytree(distribution, site / distribution.name)
    shutil.copy(prequant, to / "prequant")
    subprocess.run(["strip", str(to / "prequant")], check=True)
    shutil.copy(__file__, to / "gpu_clients.py")
    (to / "run").write_text(
        "#!/bin/sh\nhere=$(cd \"$(dirname \"$0\")\" && pwd)\n"
        'PYTHONPATH=$here/site exec "${PYTHON:-python3}" "$here/gpu_clients.py" --prequant "$here/prequant" "$@"\n'
    )
    (to / "run").chmod(0o755)
    size = sum(file.stat().st_size for file in to.rglob("*") if file.is_file())
    print(f"{to}: {size / 2**20:.0f} MiB; run there, where the GPU is: {to.name}/run --size 4GB")


def parse_size(text: str) -> float:
    units = {"MB": 1e6, "GB": 1e9}
    return float(text[:-2]) * units[text[-2:]]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu-clients", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=parse_size, default=4e9)
    parser.add_argument("--elements", type=int, default=1 << 22, help="of each tensor whose bytes are compared")
    parser.add_argument("--prequant", type=Path, default=HERE.parent / "target" / "release" / "prequant")
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build:
        build(arguments.prequant, HERE.parent / "target" / "gpu-clients")
        return 0
    if arguments.way:
        one_way(arguments.way, arguments.work, arguments.device)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        wrong = compare_bytes(arguments.prequant, work, arguments.elements, arguments.device)
        make_model(work / "bf16", arguments.size, arguments.device)
        for layout in ("keep", "fuse"):
            convert(arguments.prequant, work / "bf16", work / layout, "--experts", layout)
        wrong += compare_models(work, arguments.device)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
