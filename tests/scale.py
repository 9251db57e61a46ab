"""Checks that prequant stays within its memory limit on large checkpoints, and that planning them takes little time.

    scripts/check-scale [PREQUANT]

Converts, with default options, a checkpoint whose only weight is one 4 GiB 3-D tensor, one with 20,000 tensors, and two with
150,000, in one file and in 300, with 64 threads; all are sparse files, so that they take no room. Peak RSS of converting and
of verifying must stay below 300 MiB. Then finds the least --memory that 100,000 tensors are converted and decoded with, and
90,000 are relaid out with, and holds them to it. Last plans (--dry-run) a checkpoint of 1,000 shards and 200,000 tensors, and
inspects, converts and verifies it. Planning may take six times the processor time that Python's json module needs to parse the
same headers and index: a ratio, as seconds say as much about the machine (3.3 and 1.2 s on an idle Zen 3). Prints how long each
took, and its peak RSS. Needs Python alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "target" / "scale"
LIMIT = 300 * 2**20
# How many times the processor time of parsing the headers with Python planning may take.
MOST_TIMES_PARSING = 6.0

Shapes = dict[str, list[int]]


def main() -> int:
    """Runs all cases; returns the exit code."""
    binary = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "target" / "release" / "prequant").resolve()
    huge = {"model.layers.0.mlp.experts.gate_up_proj": [128, 4096, 4096]}
    passed = True
    for name, shapes in {"one tensor of 4 GiB": huge, "20,000 tensors": None}.items():
        for flags in ([], ["--double-quant"], ["--format", "nvfp4"], ["--format", "int4-asym", "--group-size", "channel"]):
            source, converted = fresh("source"), fresh("converted") / "to"
            apart(lambda shapes=shapes: one_file(source, shapes or experts(20_000)))
            passed &= check(" ".join([name, *flags]), [binary, "convert", source, converted, "--quiet", *flags], LIMIT)
    for name, write in {
        "150,000 tensors in a file": lambda to: one_file(to, experts(150_000)),
        "150,000 tensors in 300 files": lambda to: many_shards(to, shards=300, tensors=150_000),
    }.items():
        for flags in ([], ["--double-quant"]):
            source, converted = fresh("source"), fresh("converted") / "to"
            apart(lambda write=write: write(source))
            convert = [binary, "convert", source, converted, "--quiet", "--threads", "64", *flags]
            passed &= check(" ".join([name, *flags]), convert, LIMIT)
            shutil.rmtree(source)
            passed &= check("  verifying the result", [binary, "verify", converted], LIMIT)
            passed &= check("  verifying the result, --quick", [binary, "verify", converted, "--quick"], LIMIT)
    passed &= least_memory(binary)
    passed &= thousand_shards(binary)
    shutil.rmtree(WORK)
    return 0 if passed else 1


def least_memory(binary: Path) -> bool:
    """Asks what --memory is needed at least, and holds what is done with that to it."""
    source, converted, other = fresh("source"), fresh("converted") / "to", fresh("other")
    moe, kept, fused = fresh("moe"), other / "kept", other / "fused"
    apart(lambda: one_file(source, experts(100_000, [8, 64])))
    apart(lambda: one_file(moe, whole_experts(30_000)))
    passed = True
    for name, command in {
        "100,000 tensors in the least memory": ["convert", source, converted],
        "  decoding the result": ["dequantize", converted, other / "decoded"],
        "30,000 experts in the least memory": ["convert", moe, kept],
        "  fusing those of each layer": ["convert", kept, fused, "--experts", "fuse"],
        "  taking them apart again": ["convert", fused, other / "apart", "--experts", "keep"],
    }.items():
        refused = subprocess.run([str(word) for word in [binary, *command, "--memory", "14MiB"]], capture_output=True, text=True)
        found = re.search(r"needs at least (\d+)MiB", refused.stderr)
        if not refused.returncode or not found:
            sys.exit(f"expected to be told the least --memory: {refused.stderr}")
        command = [binary, *command, "--quiet", "--threads", "8", "--memory", f"{found[1]}MiB"]
        passed &= check(name, command, int(found[1]) * 2**20)
    return passed


def thousand_shards(binary: Path) -> bool:
    """A checkpoint of 1,000 shards and 200,000 tensors."""
    source, converted = fresh("source"), fresh("converted") / "to"
    apart(lambda: many_shards(source, shards=1_000, tensors=200_000))
    plan = "plan of 1,000 shards, 200,000 tensors"
    parsing = parse_headers(source)
    most = MOST_TIMES_PARSING * parsing
    passed = check(plan, [binary, "convert", source, converted, "--dry-run"], LIMIT, most_seconds=most)
    print(f"         of {most:.2f} s, {MOST_TIMES_PARSING:g} times what Python's json takes for its headers", flush=True)
    for what, command in {
        "  inspecting it": ["inspect", source],
        "  converting it": ["convert", source, converted, "--quiet", "--max-shard-size", "500kB"],
        "  verifying the result": ["verify", converted],
        "  verifying the result, --quick": ["verify", converted, "--quick"],
        "  comparing it with its source": ["verify", converted, "--against", source],
    }.items():
        # The default limit: 64 MiB, 1 KiB for each tensor, and what buffers need at least.
        passed &= check(what, [binary, *command], LIMIT)
    return passed


def parse_headers(folder: Path) -> float:
    """Seconds of processor time for parsing the headers and the index of a checkpoint, in a process of its own."""
    before = os.times()

    def parse() -> None:
        json.loads((folder / "model.safetensors.index.json").read_bytes())
        for path in folder.glob("*.safetensors"):
            with path.open("rb") as file:
                json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))

    apart(parse)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def check(name: str, command: list, limit: int, most_seconds: float | None = None) -> bool:
    """Runs a command that must succeed, and prints what it took; whether that is no more than it may."""
    seconds, peak, processor = run(command)
    passed = peak <= limit and (most_seconds is None or processor <= most_seconds)
    verdict, most = "ok" if passed else "FAILED", limit / 2**20
    peak /= 2**20
    print(f"{verdict:6} {name}: {peak:.0f} of {most:.0f} MiB, {seconds:.2f} s, {processor:.2f} s of processor time", flush=True)
    return passed


def run(command: list) -> tuple[float, float, float]:
    """Runs a command that must succeed. Seconds, bytes of peak RSS, seconds of processor time."""
    start = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"exit code {process.returncode}: {' '.join(map(str, command))}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime


def apart(act: Callable[[], None]) -> None:
    """Does something in a process of its own. A process that is started inherits the peak RSS of the one that starts it: this one
    must stay small."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        sys.exit("a checkpoint could not be written")


def experts(count: int, shape: list[int] | None = None) -> Shapes:
    """So many experts' matrices."""
    shape = shape or [64, 64]
    return {f"model.layers.{i // 500}.mlp.experts.{i % 500}.up_proj.weight": shape for i in range(count)}


def whole_experts(count: int) -> Shapes:
    """So many experts of three matrices, a hundred in a layer."""
    shapes = {}
    for i in range(count):
        for name, shape in {"gate_proj": [8, 64], "up_proj": [8, 64], "down_proj": [64, 8]}.items():
            shapes[f"model.layers.{i // 100}.mlp.experts.{i % 100}.{name}.weight"] = shape
    return shapes


def one_file(folder: Path, shapes: Shapes) -> None:
    """A checkpoint without shards."""
    write_shard(folder / "model.safetensors", shapes)
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}\n')


def fresh(name: str) -> Path:
    """An empty folder."""
    folder = WORK / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


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
