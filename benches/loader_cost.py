"""What loading a Mixture-of-Experts model costs: in bf16, quantized on loading, and pre-quantized with prequant-loader.

    scripts/bench-loader [--size 1.2GB] [--runs 5] [--prequant BINARY] [--out FILE] [--check]

Makes target/bench-loader-SIZE once: a random bf16 Qwen3-MoE, and what prequant makes of it with `--experts keep` and
`--experts fuse`. Each load runs in a process of its own, files in the page cache. Seconds are those of the load alone, without
imports. Memory is the most anonymous memory that the process had while it loaded (RssAnon, read every 2 ms), less what it
had after imports: pages of mapped files, which the system can drop at any time, don't count. Prints a table of medians.

--check insists on the bounds of memory that the loader promises, with a margin; never on times.
"""

from __future__ import annotations

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYERS, EXPERTS, HIDDEN = 6, 64, 1024
MIB = 2**20
WAYS = {
    "bf16": ("source", "bf16"),
    "bf16, then quantized": ("source", "bf16, then 4 bits on loading"),
    "keep": ("keep", "pre-quantized, `--experts keep`"),
    "fuse": ("fuse", "pre-quantized, `--experts fuse`"),
}
"""By name: which folder is loaded, and what the table calls it."""

FUSE_LIMIT = 50 * MIB
"""The most anonymous memory of loading fused experts, whatever the model's size."""
KEEP_LIMIT = 0.4
"""The most of loading experts one by one, of that of loading bf16."""
KEEP_FIXED = 32 * MIB
"""What a load takes however small the model is; it matters to --check with a small one."""


@dataclass
class Cost:
    """What one load took."""

    seconds: float
    anonymous: int


class PeakAnonymous:
    """Reads this process's anonymous memory every 2 ms, in a thread; the peak over where it began, in bytes."""

    def __enter__(self) -> PeakAnonymous:
        self.begin = self.peak = anonymous_memory()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.done.wait(0.002):
            self.peak = max(self.peak, anonymous_memory())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.peak = max(self.peak, anonymous_memory())


def anonymous_memory() -> int:
    """RssAnon, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status).group(1)) * 1024


# --- One load, in a process of its own -------------------------------------------------------------------------------


def load_once(way: str, folder: Path) -> None:
    """Loads a folder and prints what it took, as JSON."""
    sys.path.insert(0, str(ROOT / "python" / "src"))
    import bitsandbytes.nn.parametrize as four_bit
    import torch
    import transformers

    import prequant_loader  # noqa: F401

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(2)
    model_class = transformers.Qwen3MoeForCausalLM
    warm_up(model_class, four_bit)
    with PeakAnonymous() as memory:
        start = time.perf_counter()
        if way == "bf16, then quantized":
            config = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
            model = model_class.from_pretrained(folder, quantization_config=config)
            for module in [module for name, module in model.named_modules() if name.endswith("mlp.experts")]:
                for name in ("gate_up_proj", "down_proj"):
                    four_bit.replace_parameter_4bit(module, name, quant_type="nf4")
        else:
            model = model_class.from_pretrained(folder)
        seconds = time.perf_counter() - start
    quantized = any("parametrizations" in name for name, _ in model.named_parameters())
    assert quantized == (way != "bf16"), f"{way}: experts are in 4 bits: {quantized}"
    print(json.dumps({"seconds": seconds, "anonymous": memory.peak - memory.begin}))


def warm_up(model_class: type, four_bit: object) -> None:
    """Imports and tables that the first use of a library makes are no part of a load."""
    import torch
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, num_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = model_class(config).to(torch.bfloat16)
    four_bit.replace_parameter_4bit(model.model.layers[0].mlp.experts, "down_proj", quant_type="nf4")
    model.state_dict()


def in_process(way: str, folder: Path) -> Cost:
    """load_once in a process of its own."""
    command = [sys.executable, __file__, "--load", way, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"loading {folder} ({way}) failed:\n{done.stderr}")
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


# --- The checkpoints -------------------------------------------------------------------------------------------------


def make_checkpoints(size: int, prequant: Path) -> Path:
    """The folder with the bf16 checkpoint and both conversions, made if it isn't there."""
    folder = ROOT / "target" / f"bench-loader-{size}"
    if not (folder / "complete").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        subprocess.run([sys.executable, __file__, "--make", str(folder / "source"), str(size)], check=True)
        (folder / "complete").touch()
    for layout in ("keep", "fuse"):
        command = [prequant, "convert", folder / "source", folder / layout, "--experts", layout, "--quiet", "--force"]
        subprocess.run(command, check=True)
    return folder


def make_source(folder: Path, size: int) -> None:
    """A random bf16 Qwen3-MoE of about `size` bytes, nearly all of it experts."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    per_row = LAYERS * EXPERTS * 3 * HIDDEN * 2
    intermediate = max(64, round(size / per_row / 64) * 64)
    config = transformers.Qwen3MoeConfig(
        vocab_size=1024, hidden_size=HIDDEN, intermediate_size=HIDDEN, moe_intermediate_size=intermediate,
        num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=2, head_dim=128, num_experts=EXPERTS,
        num_experts_per_tok=4, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")


def read_all(folder: Path) -> int:
    """Brings a folder into the page cache; returns the bytes of its tensors' files."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            while chunk := file.read(16 * MIB):
                total += len(chunk)
    return total


# --- The table -------------------------------------------------------------------------------------------------------


def measure(folder: Path, runs: int) -> dict[str, Cost]:
    """The median of each way's loads, and their largest memory; the ways alternate."""
    costs: dict[str, list[Cost]] = {way: [] for way in WAYS}
    for _ in range(runs):
        for way, (name, _) in WAYS.items():
            read_all(folder / name)
            costs[way].append(in_process(way, folder / name))
    return {
        way: Cost(statistics.median(cost.seconds for cost in found), max(cost.anonymous for cost in found))
        for way, found in costs.items()
    }


def table(costs: dict[str, Cost], folder: Path) -> str:
    """Markdown."""
    slow = costs["bf16, then quantized"]
    lines = [
        "| | on disk MiB | load s | times faster than quantizing on load | anonymous memory MiB | of quantizing on load's |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for way, cost in costs.items():
        name, title = WAYS[way]
        share = 100 * cost.anonymous / slow.anonymous
        lines.append(
            f"| {title} | {read_all(folder / name) / MIB:,.0f} | {cost.seconds:.2f} | {slow.seconds / cost.seconds:.1f} "
            f"| {cost.anonymous / MIB:,.1f} | {share:.1f} % |"
        )
    return "\n".join(lines) + "\n"


def check(costs: dict[str, Cost]) -> None:
    """The promises about memory."""
    fuse, keep, bf16 = (costs[way].anonymous for way in ("fuse", "keep", "bf16"))
    assert fuse <= FUSE_LIMIT, f"loading fused experts took {fuse / MIB:.1f} MiB, more than {FUSE_LIMIT / MIB:.0f}"
    limit = KEEP_LIMIT * bf16 + KEEP_FIXED
    assert keep <= limit, f"loading experts one by one took {keep / MIB:.1f} MiB, more than {limit / MIB:.1f}"
    assert bf16 > 2 * KEEP_FIXED, "the model is too small to tell"
    print("memory is within its bounds")


def parse_size(text: str) -> int:
    """Bytes of e.g. 1.2GB."""
    number, unit = re.fullmatch(r"([\d.]+)([MG])B", text).groups()
    return int(float(number) * {"M": 10**6, "G": 10**9}[unit])


def main() -> None:
    """Measures and prints."""
    if sys.argv[1:2] == ["--load"]:
        return load_once(sys.argv[2], Path(sys.argv[3]))
    if sys.argv[1:2] == ["--make"]:
        return make_source(Path(sys.argv[2]), int(sys.argv[3]))
    parser = argparse.ArgumentParser(prog="scripts/bench-loader", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default="1.2GB")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prequant", type=Path, default=ROOT / "target" / "release" / "prequant")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    folder = make_checkpoints(arguments.size, arguments.prequant)
    costs = measure(folder, arguments.runs)
    text = table(costs, folder)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)
    if arguments.check:
        check(costs)
    return None


if __name__ == "__main__":
    main()
