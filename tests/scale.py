"""Checks that prequant stays within its memory limit on large checkpoints, and times a plan.

    scripts/check-scale [PREQUANT]

Converts, with default options, a checkpoint whose only weight is one 4 GiB 3-D tensor, and one with 20,000 tensors; both
are sparse files, so that they take no room. Peak RSS must stay below 300 MiB. Then plans (--dry-run) a checkpoint of
1,000 shards and 200,000 tensors, inspects, converts and verifies it, and prints how long each took, and its peak RSS: that
of the last two is for names, offsets and hashes, which are held for every tensor. Needs Python alone.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "target" / "scale"
LIMIT = 300 * 2**20

Shapes = dict[str, list[int]]


def main() -> int:
    """Runs the three cases; returns the exit code."""
    binary = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "target" / "release" / "prequant").resolve()
    huge = {"model.layers.0.mlp.experts.gate_up_proj": [128, 4096, 4096]}
    small = {f"model.layers.{i // 500}.mlp.experts.{i % 500}.up_proj.weight": [64, 64] for i in range(20_000)}
    failed = False
    for name, shapes in {"one tensor of 4 GiB": huge, "20,000 tensors": small}.items():
        for flags in ([], ["--double-quant"], ["--format", "nvfp4"], ["--format", "int4-asym", "--group-size", "channel"]):
            source = fresh("source")
            write_shard(source / "model.safetensors", shapes)
            (source / "config.json").write_text('{"model_type": "qwen3_moe"}\n')
            seconds, peak = run([binary, "convert", source, fresh("converted") / "to", "--quiet", *flags])
            failed |= peak > LIMIT
            verdict = "FAILED" if peak > LIMIT else "ok"
            print(f"{verdict:6} {' '.join([name, *flags])}: {peak / 2**20:.0f} MiB at most, {seconds:.2f} s", flush=True)

    source, converted = fresh("source"), fresh("converted") / "to"
    many_shards(source, shards=1_000, tensors=200_000)
    for what, command in {
        "plan of 1,000 shards, 200,000 tensors": ["convert", source, converted, "--dry-run"],
        "inspecting it": ["inspect", source],
        "converting it": ["convert", source, converted, "--quiet", "--max-shard-size", "500kB"],
        "verifying the result": ["verify", converted],
        "verifying the result, --quick": ["verify", converted, "--quick"],
    }.items():
        seconds, peak = run([binary, *command])
        print(f"       {what}: {seconds:.2f} s, {peak / 2**20:.0f} MiB", flush=True)
    shutil.rmtree(WORK)
    return 1 if failed else 0


def fresh(name: str) -> Path:
    """An empty folder."""
    folder = WORK / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def run(command: list) -> tuple[float, int]:
    """Seconds and peak RSS of a command that must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"exit code {process.returncode}: {' '.join(map(str, command))}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def write_shard(path: Path, shapes: Shapes) -> None:
    """A safetensors file of bf16 zeros, sparse."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, elements = end, 1
        for dimension in shape:
            elements *= dimension
        end += 2 * elements
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def many_shards(folder: Path, shards: int, tensors: int) -> None:
    """Expert matrices in as many files, with their index."""
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}\n')
    names = [f"model.layers.{i // 1_000}.mlp.experts.{i % 1_000}.down_proj.weight" for i in range(tensors)]
    each, weight_map = tensors // shards, {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        inside = names[shard * each : (shard + 1) * each]
        write_shard(folder / file, {name: [64, 64] for name in inside})
        weight_map |= dict.fromkeys(inside, file)
    index = {"metadata": {"total_size": tensors * 2**13}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    raise SystemExit(main())
