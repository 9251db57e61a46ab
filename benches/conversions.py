"""Times prequant against copying the same checkpoint, quantizing it with bitsandbytes and with llm-compressor, and
hashing with sha256sum.

    scripts/bench [--size 1GB] [--runs 5] [--no-bnb] [--no-llmc] [--check] [--synced-copy] [--out FILE]
    scripts/bench --baseline PROGRAM [--runs 15]

Makes target/bench/experts-SIZE once: bf16 expert matrices under Qwen3-MoE's names, 318 for 1 GB, in 4 shards. Both
their sides are multiples of 128, which the group formats ask for. Then runs `cp -r` and prequant (nf4, nf4 with
double quantization, fp4 and the group formats) in turn, as often as --runs says, a bitsandbytes loop (--bnb-runs),
and llm-compressor's model_free_ptq for each group format (--llmc-runs). Before each run the source is read into the
page cache, the last output is deleted and the disk is left to settle. Prints tables of medians and ratios; --out
writes them to a file too. --check fails where a group format misses the bars against llm-compressor.
With --baseline, times nobody but another build of prequant: pairs of runs in turn, and the median of their ratios.

GB/s are bf16 bytes of the source per second (1 GB = 10^9 bytes). Peak RSS is the kernel's figure for the process,
mapped file pages included, and counts this script's own 18 MiB or so from before it starts the process. Needs Python
alone; the bitsandbytes loop runs in the environment of `scripts/venv client`, model_free_ptq in that of
`scripts/venv compressed`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import statistics
import struct
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "target" / "bench"
SHARDS, HIDDEN, LAYERS, PARTS = 4, 2048, 2, ("gate", "up", "down")
MATRICES, GROUP = 318, 128  # as many as that, if their rows come out as whole groups
# Formats with a scale for each group of a row, and what llm-compressor calls them.
GROUP_FORMATS = {"int4": "W4A16", "int4-asym": "W4A16_ASYM", "nvfp4": "NVFP4A16", "mxfp4": "MXFP4A16"}
# What prequant must reach against model_free_ptq: times faster, and of its peak memory.
FASTER, MEMORY = 30.0, 0.25
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass
class Contender:
    """A command to time, and what was measured. DST is replaced by the output folder."""

    name: str
    command: list[str]
    seconds: list[float] = field(default_factory=list)
    without_imports: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    system: list[float] = field(default_factory=list)
    peak_rss: int = 0

    def run(self, destination: Path) -> None:
        """One timed run."""
        command = [str(destination) if word == "DST" else word for word in self.command]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        self.seconds.append(time.perf_counter() - start)
        self.processor.append(usage.ru_utime + usage.ru_stime)
        self.system.append(usage.ru_stime)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{self.name} failed with exit code {process.returncode}: {' '.join(command)}")
        self.peak_rss = max(self.peak_rss, usage.ru_maxrss * 1024)
        last = output.splitlines()[-1:]  # libraries may have written before it
        if last and last[0].startswith(b"seconds without imports: "):
            self.without_imports.append(float(last[0].split()[-1]))


def main() -> None:
    """Makes the source, runs everybody in turn, prints the table."""
    arguments = parse_arguments()
    source = BENCH / f"experts-{arguments.size}"
    if not (source / "config.json").exists():
        make_apart(source, arguments.size)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    if arguments.baseline:
        write(against_baseline(arguments, source), arguments.out)
        return

    contenders, slow, peers = contenders_of(arguments)
    rounds = [(number, each) for number in range(arguments.runs) for each in contenders]
    rounds += [(number, each) for number in range(arguments.bnb_runs) for each in slow]
    rounds += [(number, each) for number in range(arguments.llmc_runs) for each in peers]
    for number, contender in sorted(rounds, key=lambda each: each[0]):  # in turn: a busy machine is busy for all
        settle(source)
        contender.run(BENCH / "output")
        seconds = f"{contender.seconds[-1]:.2f} s, {contender.processor[-1]:.2f} s of the processors"
        print(f"run {number + 1}, {contender.name}: {seconds}", file=sys.stderr)
    shutil.rmtree(BENCH / "output", ignore_errors=True)

    tables, missed = [report(contenders + slow, size, arguments.runs)], []
    if peers:
        table, missed = against_peers(contenders, peers, arguments)
        tables.append(table)
    write("\n\n".join([*tables, verifying(arguments)]), arguments.out)
    if missed and arguments.check:
        sys.exit("missed: " + "; ".join(missed))


def make_apart(source: Path, *arguments: object, make: Callable[..., None] | None = None) -> None:
    """make_source in a process of its own: a child's peak RSS starts at that of the process it is forked from."""
    print(f"making {source}", file=sys.stderr)
    maker = multiprocessing.Process(target=make or make_source, args=(source, *arguments))
    maker.start()
    maker.join()
    if maker.exitcode:
        sys.exit("could not make the source checkpoint")


def write(text: str, out: Path | None) -> None:
    """To standard output, and to the file if there is one."""
    print(text)
    if out:
        out.write_text(text + "\n")


def against_baseline(arguments: argparse.Namespace, source: Path) -> str:
    """Every recipe with two builds in turn, and how much longer this one takes: medians over pairs."""
    lines = [
        f"Next to {arguments.baseline.name}: medians of {arguments.runs} pairs of runs",
        machine(),
        "",
        "| | its wall s | wall s | ratio of a pair, median | its processor s | processor s | ratio |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for options in formats():
        words = ["convert", str(source), "DST", "--quiet", "--format", *options]
        pair = [Contender(name, [str(each.resolve()), *words]) for name, each in (("its", arguments.baseline), ("ours", arguments.prequant))]
        for number in range(arguments.runs):
            for contender in pair if number % 2 else reversed(pair):  # neither always comes first
                settle(source)
                contender.run(BENCH / "output")
        its, ours = pair
        figures = []
        for before, after in ((its.seconds, ours.seconds), (its.processor, ours.processor)):
            ratio = statistics.median(b / a for a, b in zip(before, after, strict=True))
            figures.append(f"{statistics.median(before):.3f} | {statistics.median(after):.3f} | {ratio:.3f}")
        lines.append(f"| {' '.join(options)} | {' | '.join(figures)} |")
        print(lines[-1], file=sys.stderr)
    shutil.rmtree(BENCH / "output", ignore_errors=True)
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """The command line, with size in bytes and the binary built if it was not given."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default="1GB", help="bytes of bf16 weights, such as 1GB or 256MiB")
    parser.add_argument("--runs", type=int, default=5, help="runs of cp and prequant")
    parser.add_argument("--bnb-runs", type=int, default=1, help="runs of the bitsandbytes loop")
    parser.add_argument("--no-bnb", dest="bnb_runs", action="store_const", const=0, help="skip the bitsandbytes loop")
    parser.add_argument("--llmc-runs", type=int, default=1, help="runs of llm-compressor for each group format")
    parser.add_argument("--no-llmc", dest="llmc_runs", action="store_const", const=0, help="skip llm-compressor")
    parser.add_argument("--check", action="store_true", help="fail if a bar against llm-compressor is missed")
    parser.add_argument("--synced-copy", action="store_true", help="also time cp -r followed by sync of its files")
    parser.add_argument("--prequant", type=Path, help="the binary to time; default: build this checkout's")
    parser.add_argument("--baseline", type=Path, help="another build of prequant: time it and this one in pairs, and nobody else")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    arguments = parser.parse_args()
    if arguments.runs < 1:
        parser.error("--runs must be at least 1")
    if not arguments.prequant:
        subprocess.run(["cargo", "build", "--release", "--locked", "--quiet"], cwd=ROOT, check=True)
        arguments.prequant = ROOT / "target" / "release" / "prequant"
    return arguments


def parse_size(text: str) -> int:
    """Bytes from a number with a unit."""
    match = re.fullmatch(r"([\d.]+)\s*([KMG]?I?B?)", text.strip().upper())
    if not match or match[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1GB or 256MiB")
    return int(float(match[1]) * UNITS[match[2]])


def contenders_of(arguments: argparse.Namespace) -> tuple[list[Contender], list[Contender], list[Contender]]:
    """Those that run in turn, and the slow ones that run after them: bitsandbytes; llm-compressor, format by format."""
    source = str(BENCH / f"experts-{arguments.size}")
    convert = [str(arguments.prequant.resolve()), "convert", source, "DST", "--quiet", "--format"]
    contenders = [
        Contender("cp -r", ["cp", "-r", source, "DST"]),
        *(Contender(f"prequant {' '.join(words)}", [*convert, *words]) for words in formats()),
    ]
    if arguments.synced_copy:
        script = 'cp -r "$1" "$2" && sync "$2"/*'
        contenders.insert(1, Contender("cp -r, synced", ["bash", "-c", script, "bash", source, "DST"]))
    slow, peers = [], []
    if arguments.bnb_runs:
        slow.append(Contender("bitsandbytes nf4 loop", [*python("client", "bitsandbytes_loop"), source, "DST"]))
    if arguments.llmc_runs:
        # One worker per core, one thread each: on two cores faster than one worker of two threads, or four workers.
        command = ["env", "OMP_NUM_THREADS=1", *python("compressed", "model_free_ptq"), source, "DST"]
        peers += [Contender(scheme, [*command, scheme, cores()]) for scheme in GROUP_FORMATS.values()]
    return contenders, slow, peers


def cores() -> str:
    """How many may be used."""
    return str(len(os.sched_getaffinity(0)))


def formats() -> list[list[str]]:
    """What `--format` is given, and the options that go with it: every recipe that is timed."""
    return [["nf4"], ["nf4", "--double-quant"], ["fp4"], *([name] for name in GROUP_FORMATS)]


def python(environment: str, script: str) -> list[str]:
    """The words that run a script beside this one in a virtual environment, which is made if it isn't there."""
    made = subprocess.run([ROOT / "scripts" / "venv", environment], stdout=subprocess.PIPE, text=True, check=True)
    return [f"{made.stdout.strip()}/bin/python", str(ROOT / "benches" / f"{script}.py")]


def against_peers(
    contenders: list[Contender], peers: list[Contender], arguments: argparse.Namespace
) -> tuple[str, list[str]]:
    """Each group format next to llm-compressor's, and the bars that are missed."""
    ours = {each.name: each for each in contenders}
    columns = "wall s | its wall s | without imports s | times faster | without imports | peak MiB | its MiB | ratio"
    lines = [
        f"Against llm-compressor's model_free_ptq with {cores()} workers, medians of {arguments.llmc_runs} of its runs;"
        f" bars: {FASTER:.0f} times faster, {MEMORY:.0%} of its peak memory",
        "",
        f"| | {columns} | bars |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    missed = []
    for name, peer in zip(GROUP_FORMATS, peers, strict=True):
        each = ours[f"prequant {name}"]
        wall, whole, bare = map(statistics.median, (each.seconds, peer.seconds, peer.without_imports))
        faster, memory = whole / wall, each.peak_rss / peer.peak_rss
        misses = [f"{name} is {faster:.1f} times faster"] if faster < FASTER else []
        misses += [f"{name} takes {memory:.0%} of the memory"] if memory > MEMORY else []
        figures = f"{wall:.2f} | {whole:.2f} | {bare:.2f} | {faster:.1f} | {bare / wall:.1f}"
        sizes = f"{each.peak_rss / 2**20:.0f} | {peer.peak_rss / 2**20:.0f} | {memory:.3f}"
        lines.append(f"| {name}, {peer.name} | {figures} | {sizes} | {'missed' if misses else 'met'} |")
        missed += misses
    return "\n".join(lines), missed


def verifying(arguments: argparse.Namespace) -> str:
    """`prequant verify` against sha256sum, on as many files at a time as there are cores, over the same checkpoint."""
    output, prequant = BENCH / "output", str(arguments.prequant.resolve())
    source = str(BENCH / f"experts-{arguments.size}")
    shard = str(max(arguments.size // 16, 10**6))
    subprocess.run([prequant, "convert", source, str(output), "--quiet", "--max-shard-size", shard], check=True)
    script = 'ls "$1"/*.safetensors | xargs -P "$2" -n 1 sha256sum'
    contenders = [
        Contender("sha256sum, in parallel", ["bash", "-c", script, "bash", "DST", cores()]),
        Contender("prequant verify", [prequant, "verify", "DST", "--quiet"]),
        Contender("prequant verify --quick", [prequant, "verify", "DST", "--quiet", "--quick"]),
        Contender("prequant verify --against", [prequant, "verify", "DST", "--quiet", "--against", source]),
    ]
    for _, contender in itertools.product(range(arguments.runs), contenders):
        contender.run(output)
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    shutil.rmtree(output)
    medians = [statistics.median(each.seconds) for each in contenders]
    lines = [
        f"Verifying the result, {size / 1e9:.2f} GB, every file and every tensor; medians of {arguments.runs} runs",
        "",
        "| | wall s | time / sha256sum's | peak RSS MiB |",
        "| --- | ---: | ---: | ---: |",
    ]
    for each, median in zip(contenders, medians):
        ratio = median / medians[0]
        lines.append(f"| {each.name} | {median:.3f} | {ratio:.2f} | {each.peak_rss / 2**20:.0f} |")
    return "\n".join(lines)


def settle(source: Path, output: Path = BENCH / "output") -> None:
    """The same start for everybody: no output, nothing left to write back, the source in the page cache."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    buffer = bytearray(1 << 20)
    for path in source.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def report(contenders: list[Contender], size: int, runs: int) -> str:
    """The machine in a line, and the table."""
    medians = {each.name: statistics.median(each.seconds) for each in contenders}
    copy, loop = medians["cp -r"], medians.get("bitsandbytes nf4 loop")
    lines = [
        f"{size / 1e9:.2f} GB of bf16 expert matrices in {SHARDS} shards, in page cache; medians of {runs} runs",
        machine(),
        "",
        "| | wall s | min s | GB/s of bf16 | time / cp's | times faster than bitsandbytes | peak RSS MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for each in contenders:
        median = medians[each.name]
        faster = f"{loop / median:.1f}" if loop else "-"
        figures = f"{median:.2f} | {min(each.seconds):.2f} | {size / median / 1e9:.2f} | {median / copy:.2f} | {faster}"
        lines.append(f"| {each.name} | {figures} | {each.peak_rss / 2**20:.0f} |")
    for each in contenders:
        if each.without_imports:
            bare = statistics.median(each.without_imports)
            rate = f"{bare:.2f} s, {size / bare / 1e9:.2f} GB/s"
            ratios = ", ".join(f"{name} {bare / medians[name]:.1f}" for name in medians if name.startswith("prequant"))
            lines += [
                "",
                f"{each.name}, imports not counted: {rate}; times faster: {ratios}",
            ]
    return "\n".join(lines)


def machine() -> str:
    """Processor, cores and memory."""
    model, memory = platform.processor() or platform.machine(), ""
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = found[1] if found else model
        kibibytes = int(re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())[1])
        memory = f", {kibibytes / 2**20:.0f} GiB of memory"
    return f"{model}, {cores()} cores{memory}, {platform.system()} {platform.release()}"


def make_source(folder: Path, size: int, matrices: int = MATRICES) -> None:
    """The checkpoint: matrices cut from a pool of normal numbers, each from a place of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = max(1, round(size / (matrices * HIDDEN * 2 * GROUP))) * GROUP
    experts = max(1, round(size / (rows * HIDDEN * 2 * LAYERS * len(PARTS))))
    rng = random.Random(2)
    pool = bf16_bytes(array("f", (rng.gauss(0.0, 0.02) for _ in range(1 << 21))))
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer, expert, part in itertools.product(range(LAYERS), range(experts), PARTS)
    ]
    weight_map = {
        name: f"model-{1 + i * SHARDS // len(names):05}-of-{SHARDS:05}.safetensors" for i, name in enumerate(names)
    }
    for shard in sorted(set(weight_map.values())):
        inside = [name for name in names if weight_map[name] == shard]
        write_shard(folder / shard, {name: shape_of(name, rows) for name in inside}, pool, rng)
    index = {"metadata": {"total_size": len(names) * rows * HIDDEN * 2}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "model_type": "qwen3_moe",
        "moe_intermediate_size": rows,
        "num_experts": experts,
        "num_hidden_layers": LAYERS,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def shape_of(name: str, rows: int) -> list[int]:
    """gate and up are [intermediate, hidden]; down is the other way round."""
    return [HIDDEN, rows] if "down" in name else [rows, HIDDEN]


def bf16_bytes(values: array) -> bytes:
    """The upper halves of little-endian f32s."""
    if sys.byteorder == "big":
        values.byteswap()
    raw = values.tobytes()
    half = bytearray(len(raw) // 2)
    half[::2], half[1::2] = raw[2::4], raw[3::4]
    return bytes(half)


def write_shard(path: Path, shapes: dict[str, list[int]], pool: bytes, rng: random.Random) -> None:
    """A safetensors file of bf16 tensors."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + shape[0] * shape[1] * 2
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            left = shape[0] * shape[1] * 2
            while left:
                begin = rng.randrange(len(pool) // 4) * 2
                piece = memoryview(pool)[begin : begin + left]
                file.write(piece)
                left -= len(piece)


if __name__ == "__main__":
    main()
