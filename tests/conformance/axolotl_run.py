"""Trains with axolotl from what prequant converts, and does with the adapters what people do with them.

    scripts/conformance axolotl

The YAML is python/examples/qwen3-30b-a3b-qlora.yaml with a tiny checkpoint, a few made-up chats, four steps, and what a CPU needs
(axolotl_cpu.py). The same run starts from `--experts keep`, from `--experts fuse` and from the bf16 checkpoint, quantized while it is
loaded, in one process and in two that share the model by FSDP2. All must give the same losses and the same adapter, to the last bit.

This process never imports prequant_loader: what it loads, plain transformers and PEFT load.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import yaml
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, logging

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "conformance" / "make"))

from merge_goldens import rounded

FIXTURE = ROOT / "fixtures" / "tiny-qwen3-moe"
EXAMPLE = ROOT / "python" / "examples" / "qwen3-30b-a3b-qlora.yaml"
STEPS = 4
TARGETS = 2 * (4 + 2)
"""Two layers, in each attention's four projections and two parameters of experts."""
PREQUANT, ON_CPU, ON_LOAD = "prequant_loader.axolotl.PrequantPlugin", "axolotl_cpu.OnCpu", "axolotl_cpu.QuantizeOnLoad"
FSDP = {
    "fsdp_version": 2,
    "qlora_sharded_model_loading": True,  # rank 0 loads, and hands out shards
    "fsdp_config": {
        "offload_params": False,
        "cpu_ram_efficient_loading": True,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "Qwen3MoeDecoderLayer",
        "state_dict_type": "FULL_STATE_DICT",
        "reshard_after_forward": True,
    },
}


class Run:
    """A folder with a YAML, the model that it begins with as `model`, and what axolotl writes."""

    def __init__(self, folder: Path, model: Path, *plugins: str, processes: int = 1, **options: Any) -> None:
        self.folder, self.processes = folder, processes
        folder.mkdir(parents=True)
        (folder / "model").symlink_to(model)
        (folder / "chats.jsonl").write_text(chats())
        config = yaml.safe_load(EXAMPLE.read_text())
        assert config["plugins"] == [PREQUANT]
        [dataset] = config["datasets"]
        dataset |= {"path": "./chats.jsonl", "ds_type": "json", "split": "train"}
        config |= {"base_model": "./model", "plugins": [*plugins, ON_CPU], "output_dir": "./out", "seed": 42}
        config |= {"max_steps": STEPS, "sequence_len": 256, "attn_implementation": "sdpa", "tf32": False}
        if processes > 1:
            config |= FSDP
        (folder / "run.yaml").write_text(yaml.safe_dump(config | options, sort_keys=False))

    def train(self) -> None:
        """`axolotl train`."""
        command = ["-m", "axolotl.cli.train", "run.yaml"]
        if self.processes > 1:
            program = Path(__file__).with_name("axolotl_cpu.py")
            command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}", program, "run.yaml"]
        self._python(*command)

    def merge(self) -> Path:
        """`axolotl merge-lora`; returns the merged model's folder."""
        self._python("-m", "axolotl.cli.merge_lora", "run.yaml", "--lora_model_dir=./out")
        return self.folder / "out" / "merged"

    def _python(self, *arguments: str | Path) -> None:
        paths = os.pathsep.join([str(ROOT / "python" / "src"), str(Path(__file__).parent)])
        own = {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "WANDB_MODE": "disabled", "ACCELERATE_USE_CPU": "true"}
        own |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=os.environ | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1800,
        )
        if done.returncode or "Failed to load plugin" in done.stdout:
            raise AssertionError(f"{self.folder.name}: {arguments} ended with {done.returncode}:\n{done.stdout[-6000:]}")

    def losses(self) -> list[float]:
        """One per step, with all their digits."""
        state = json.loads((self.folder / "out" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
        losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        assert len(losses) == STEPS, losses
        return losses

    def adapter(self) -> dict[str, torch.Tensor]:
        """What was trained."""
        return load_file(self.folder / "out" / "adapter_model.safetensors")


def chats() -> str:
    """A few dozen, the same at every call."""
    words = "a tensor holds many numbers and each block of them has its own scale so that codes stay small".split()
    choose = random.Random(7)

    def message(role: str) -> dict[str, str]:
        return {"from": role, "value": " ".join(choose.choices(words, k=choose.randint(8, 24)))}

    lines = ({"conversations": [message("human"), message("gpt")]} for _ in range(64))
    return "".join(json.dumps(line) + "\n" for line in lines)


def runs(prequant: Path, work: Path) -> dict[str, Run]:
    """All of them, by name."""
    folders = {layout: work / layout for layout in ("keep", "fuse")}
    for layout, folder in folders.items():
        subprocess.run([prequant, "convert", FIXTURE, folder, "--experts", layout, "--device", "cpu", "--quiet"], check=True)
    plain = {"bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}}
    made = {layout: Run(work / "one" / layout, folder, PREQUANT) for layout, folder in folders.items()}
    made["on load"] = Run(work / "one" / "on-load", FIXTURE, ON_LOAD, **plain)
    for layout, folder in folders.items():
        made[f"{layout}, two processes"] = Run(work / "two" / layout, folder, PREQUANT, processes=2)
    made["on load, two processes"] = Run(work / "two" / "on-load", FIXTURE, processes=2, quantize_moe_experts=True, **plain)
    return made


# --- Checks ----------------------------------------------------------------------------------------------------------


def check_equal(trained: dict[str, Run], reference: str, names: list[str]) -> None:
    """The same losses and the same adapter as those of the run that quantized on load."""
    losses, adapter = trained[reference].losses(), trained[reference].adapter()
    assert len(adapter) == 2 * TARGETS, sorted(adapter)
    untrained = [name for name, tensor in adapter.items() if "lora_B" in name and not tensor.any()]
    assert not untrained, untrained
    for name in names:
        assert trained[name].losses() == losses, f"{name}: {trained[name].losses()}, {reference}: {losses}"
        same_tensors(trained[name].adapter(), adapter, name)
    print(f"{', '.join(names)}: losses and adapter as {reference}: {losses}")


def same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: str) -> None:
    assert found.keys() == expected.keys(), f"{what}: {sorted(found.keys() ^ expected.keys())}"
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), f"{what}: {name} differs"


def load(folder: Path) -> torch.nn.Module:
    """With plain transformers, nothing missing, left over or of another size."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    problems = {what: names for what, names in report.items() if names}
    assert not problems, problems
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 67).reshape(2, 32)
    with torch.no_grad():
        return model(input_ids=ids).logits


def check_plain_peft(run: Run) -> None:
    """The adapter fits the bf16 original: PEFT finds a place for every tensor, and the model changes."""
    base = load(FIXTURE)
    before = logits(base)
    model = PeftModel.from_pretrained(base, run.folder / "out").eval()
    same_tensors(get_peft_model_state_dict(model), run.adapter(), "as plain PEFT loads it")
    assert not torch.equal(logits(model), before)


def check_merged(prequant: Path, run: Run) -> None:
    """`axolotl merge-lora` gives a bf16 model like any other: the decoded base with the adapter added, and nothing about 4 bits."""
    merged = run.merge()
    names = sorted(path.name for path in merged.iterdir())
    assert "prequant.json" not in names and "SHA256SUMS" not in names, names
    assert json.loads((merged / "config.json").read_text()) == json.loads((FIXTURE / "config.json").read_text())
    assert (merged / "README.md").read_text() == (FIXTURE / "README.md").read_text()
    decoded = run.folder / "decoded"
    subprocess.run([prequant, "dequantize", run.folder / "model", decoded, "--quiet"], check=True)
    base = load(decoded)
    untouched = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected = PeftModel.from_pretrained(base, run.folder / "out").merge_and_unload().state_dict()
    found = load(merged).state_dict()
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    changed = [name for name in found if not torch.equal(found[name], untouched[name])]
    assert len(changed) == TARGETS, changed
    for name, tensor in expected.items():
        far = (rank(found[name]) - rank(tensor)).abs() > 1
        assert not far.any(), f"{name}: {int(far.sum())} of {far.numel()} elements aren't the expected bf16 or a neighbor of it"


def check_our_merge(prequant: Path, run: Run) -> None:
    """`prequant merge` puts the adapter into the bf16 original: every element is PEFT's in f64, rounded once."""
    merged = run.folder / "merged-by-prequant"
    for command in (["merge", FIXTURE, run.folder / "out", merged], ["verify", merged, "--against", FIXTURE, run.folder / "out"]):
        subprocess.run([prequant, *command, "--quiet"], check=True)
    base = AutoModelForCausalLM.from_pretrained(FIXTURE, dtype=torch.float64)
    exact = PeftModel.from_pretrained(base, run.folder / "out", autocast_adapter_dtype=False).merge_and_unload()
    found = load(merged).state_dict()
    untouched = load(FIXTURE).state_dict()
    assert len([name for name in found if not torch.equal(found[name], untouched[name])]) == TARGETS
    for name, value in exact.state_dict().items():
        differ = int((found[name] != rounded(value, torch.bfloat16)).sum())
        assert not differ, f"{name}: {differ} of {value.numel()} elements aren't PEFT's in f64, rounded once"


def rank(tensor: torch.Tensor) -> torch.Tensor:
    """The place of each bf16 among all of them, zero being 0."""
    bits = tensor.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prequant", type=Path)
    prequant = parser.parse_args().prequant.resolve()
    sys.stdout.reconfigure(line_buffering=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "Could not find a config file in ./model")  # PEFT's, of where the run began
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        work = Path(folder)
        trained = runs(prequant, work)
        list(pool.map(Run.train, trained.values()))
        print(f"trained {len(trained)} times in {time.monotonic() - start:.0f} s")
        check_equal(trained, "on load", ["keep", "fuse"])
        check_equal(trained, "on load, two processes", ["keep, two processes", "fuse, two processes"])
        for name, run in trained.items():
            check_plain_peft(run)
            print(f"{name}: plain PEFT loads the adapter on the bf16 original")
            check_our_merge(prequant, run)
            print(f"{name}: prequant merges it, to the last bit")
        for name in ("keep", "fuse", "fuse, two processes"):
            check_merged(prequant, trained[name])
            print(f"{name}: plain transformers loads what axolotl merged")
    assert "prequant_loader" not in sys.modules
    print(f"axolotl: passed in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
