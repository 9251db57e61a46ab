"""Measures how conversions use a machine: against copying, against the least that their parts take, and by threads, files
and devices. One table, with a bar where there is one.

    scripts/bench-scale [MODE]... [--size 1GB] [--runs 5] [--pairs 9] [--check] [--out FILE]
    scripts/bench-scale --build     builds target/bench-scale/prequant and floor, for a machine without Rust, where the same
                                    commands then run them; or --prequant and --floor name others

Modes, all by default:
    copy     every format with each vector kernel, in pairs with `cp -r --reflink=never` to the same file system
    floor    processor time against that of reading, the kernel, writing and SHA-256 of files and tensors, each alone
    threads  1, 2, 4, 8 and 16 threads
    files    1, 2, 4, 8 and 16 output files
    devices  GPUs, if there are any
    bnb      a bitsandbytes loop, on a GPU if there is one
    cold     the source's pages dropped, against `cat` and against a run with them
    writers  how many of 16 threads wait in the file system's write path, sampled
    tail     the time from the last write, and from the last weight quantized, to the last hash, from a trace
    verify   `prequant verify` against SHA-256 alone, of as many bytes in memory: many files, and one; one core, and all
    memory   peak RSS of a checkpoint with --tensors tensors, with up to 64 threads
    replay   the trace of a run on 2 to 16 simulated cores; see scripts/replay-trace

Makes --size of bf16 experts (3 MB each, in 4 shards) in --folder once, and the outputs beside it. Before each run the
last output is deleted, the disk is left to settle, the source is read into the page cache, and a scratch file of its
size is written and deleted, so that a virtual machine has the memory. --cores N keeps everything to N cores. --check
fails where a bar is missed. GB/s are bf16 bytes of the source per second. Needs Python alone; bnb needs an environment
with torch and bitsandbytes: --python, or the one that scripts/venv makes. docs/benchmarks.md has the bars.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import replay
from conversions import BENCH, ROOT, Contender, cores, formats, machine, make_apart, parse_size, python, settle

sys.path.insert(0, str(ROOT / "tests"))
import scale as sparse

BUILT = ROOT / "target" / "bench-scale"
MATRIX = 768 * 2048 * 2  # bytes of an expert's matrix
THREADS, FILES, WARMING = (1, 2, 4, 8, 16), (1, 2, 4, 8, 16), 3
PARTS = {"read": 1, "kernel": 1, "write": 1, "hash": 2}  # and how often a conversion does them
# Samples of what threads wait in, and how far apart.
SAMPLES, INTERVAL, MANY = 200, 0.005, 16
FLOOR, COLD, WRITERS, WRITERS_P95, TAIL, VERIFY, MEMORY = 1.3, 1.15, 2.0, 4.0, 0.05, 1 / 0.9, 300.0
# System calls that write, by machine; and functions in which threads wait where these can't be seen.
WRITING = {"x86_64": {1, 18, 20, 296, 328}, "aarch64": {64, 66, 68, 70, 287}}
WAITING = re.compile(r"rwsem_down_write|_write_iter|perform_write|write_(begin|end)|dirty_pages|jbd2|start_this_handle|folio_wait")


@dataclass
class Row:
    """A line of the table."""

    name: str
    seconds: float | None = None
    rate: float | None = None  # bytes per second
    ratio: float | None = None
    of: str = ""  # what the ratio is of
    bar: float | None = None  # the most that the ratio may be
    processor: float | None = None
    system: float | None = None
    peak: float | None = None  # MiB

    def is_missed(self) -> bool:
        """Whether the bar is."""
        return self.bar is not None and self.ratio is not None and self.ratio > self.bar

    def __str__(self) -> str:
        def number(value: float | None, digits: int) -> str:
            return "" if value is None else f"{value:.{digits}f}"

        verdict = "" if self.bar is None or self.ratio is None else f"at most {self.bar:g}: {'missed' if self.is_missed() else 'met'}"
        cells = [
            self.name,
            number(self.seconds, 3),
            number(self.rate and self.rate / 1e9, 2),
            number(self.ratio, 2),
            self.of,
            verdict,
            number(self.processor, 3),
            number(self.system, 3),
            number(self.peak, 0),
        ]
        return f"| {' | '.join(cells)} |"


@dataclass
class Bench:
    """The programs, the source, and where outputs go."""

    arguments: argparse.Namespace
    source: Path
    output: Path
    size: int

    def convert(self, *options: str) -> list[str]:
        """A conversion's words, on the CPU unless the options say otherwise."""
        device = [] if "--device" in options else ["--device", "cpu"]
        return [str(self.arguments.prequant), "convert", str(self.source), "DST", "--quiet", *device, *options]

    def floor(self, part: str, *options: str) -> list[str]:
        """A part's words."""
        return [str(self.arguments.floor), part, str(self.source), "DST", *options]

    def run(self, contender: Contender, before: Callable[[], None] = lambda: None) -> float:
        """One timed run from a settled start; what it took."""
        settle(self.source, self.output)
        before()
        warm_memory(self.output.parent, self.size)
        contender.run(self.output)
        print(f"{contender.name}: {contender.seconds[-1]:.3f} s, {contender.processor[-1]:.3f} s of the processors", file=sys.stderr)
        return contender.seconds[-1]

    def in_turn(self, contenders: list[Contender], runs: int | None = None) -> None:
        """Runs everybody, in turn: a busy machine is busy for all."""
        for _ in range(runs or self.arguments.runs):
            for contender in contenders:
                self.run(contender)

    def row(self, contender: Contender, ratio: float | None = None, of: str = "", bar: float | None = None) -> Row:
        """Medians of its runs."""
        seconds = statistics.median(contender.seconds)
        processor, system = map(statistics.median, (contender.processor, contender.system))
        return Row(contender.name, seconds, self.size / seconds, ratio, of, bar, processor, system, contender.peak_rss / 2**20)

    def trace(self, *options: str) -> Path:
        """The trace of a conversion."""
        path = self.output.with_name("trace.json")
        self.run(Contender(f"traced {' '.join(options)}", self.convert("--trace", str(path), *options)))
        return path

    def in_files(self, count: int) -> list[str]:
        """The option that has so many files written, or one more."""
        return ["--max-shard-size", str(max(MATRIX, int(self.size * 0.29) // count))]


def main() -> None:
    """Runs the modes, prints the table."""
    arguments = parse_arguments()
    folder = arguments.folder.resolve()
    source = folder / f"scale-{arguments.size}"
    if not (source / "config.json").exists():
        make_apart(source, arguments.size, max(32, arguments.size // MATRIX))
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    bench = Bench(arguments, source, folder / "output", size)
    heads = "wall s | GB/s of bf16 | ratio | of | bar | processor s | of it system s | peak RSS MiB"
    lines = [
        f"{size / 1e9:.2f} GB of bf16 experts in page cache, medians of {arguments.runs} runs",
        machine(),
        "",
        f"| | {heads} |",
        "| --- | ---: | ---: | ---: | --- | --- | ---: | ---: | ---: |",
    ]
    print("\n".join(lines), flush=True)
    missed = []
    for row in rows_of(bench):
        print(row, flush=True)
        lines.append(str(row))
        missed += [row.name] if row.is_missed() else []
        if arguments.out:
            arguments.out.write_text("\n".join(lines) + "\n")
    shutil.rmtree(bench.output, ignore_errors=True)
    bench.output.with_name("trace.json").unlink(missing_ok=True)
    if missed and arguments.check:
        sys.exit("missed: " + "; ".join(missed))


def warm_memory(folder: Path, size: int) -> None:
    """Writes a file as large as the largest output, and deletes it before it is on the disk: its memory is free again. A virtual
    machine may have given its host what was free for seconds; getting that back costs the system several times what writing
    to it does, and differs from run to run."""
    available = int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    scratch, piece = folder / "scratch", bytes(1 << 20)
    with scratch.open("wb", buffering=0) as file:
        for _ in range(min(size, available // 16) >> 20):
            file.write(piece)
    scratch.unlink()


class Unavailable(Exception):
    """A mode needs what isn't here."""


def rows_of(bench: Bench) -> Iterator[Row]:
    """Mode by mode, as they are measured."""
    for mode in bench.arguments.modes:
        try:
            yield from MODES[mode](bench)
        except Unavailable as why:
            yield Row(f"{mode}: not measured, {why}")


def parse_arguments() -> argparse.Namespace:
    """The command line, with programs that exist."""
    parser = argparse.ArgumentParser(prog="scripts/bench-scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="*", metavar="MODE", help=", ".join(MODES))
    parser.add_argument("--size", type=parse_size, default="1GB", help="bytes of bf16 weights, such as 1GB or 256MiB")
    parser.add_argument("--runs", type=int, default=5, help="runs of everything but the pairs of copy")
    parser.add_argument("--pairs", type=int, default=9, help="pairs of runs with cp")
    every = ",".join(map(" ".join, formats()))
    parser.add_argument("--formats", default=every, help="those of copy and floor, with commas between them: %(default)s")
    parser.add_argument("--cores", type=int, help="use so many cores, of those there are")
    parser.add_argument("--tensors", type=int, default=150_000, help="tensors of the checkpoint whose conversion's memory is measured")
    parser.add_argument("--folder", type=Path, default=BENCH, help="where source and outputs lie")
    parser.add_argument("--prequant", type=Path, help="the binary to time; default: build this checkout's, or take target/bench-scale's")
    parser.add_argument("--floor", type=Path, help="the program that does a conversion's parts, likewise")
    parser.add_argument("--python", help="a Python with torch and bitsandbytes")
    parser.add_argument("--no-bnb", action="store_true", help="skip the bitsandbytes loop")
    parser.add_argument("--build", action="store_true", help="build the programs, and no more")
    parser.add_argument("--check", action="store_true", help="fail if a bar is missed")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    arguments = parser.parse_args()
    unknown = [mode for mode in arguments.modes if mode not in MODES]
    if unknown:
        parser.error(f"no mode {', '.join(unknown)}: there are {', '.join(MODES)}")
    arguments.modes = [mode for mode in arguments.modes or MODES if not (mode == "bnb" and arguments.no_bnb)]
    arguments.formats = [words.split() for words in arguments.formats.split(",")]
    if arguments.build or (not (arguments.prequant and arguments.floor) and shutil.which("cargo")):
        build()
    if arguments.build:
        sys.exit()
    for name in ("prequant", "floor"):
        path = getattr(arguments, name) or BUILT / name
        if not path.exists():
            parser.error(f"no {path}: run scripts/bench-scale --build where there is Rust, or give --{name}")
        setattr(arguments, name, path.resolve())
    if arguments.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    return arguments


def build() -> None:
    """Both programs, to where a machine without Rust is given them."""
    BUILT.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cargo", "build", "--release", "--locked", "--quiet"], cwd=ROOT, check=True)
    shutil.copy2(ROOT / "target" / "release" / "prequant", BUILT / "prequant")
    command = ["cargo", "bench", "--no-run", "--locked", "--bench", "floor", "--message-format", "json"]
    built = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    messages = map(json.loads, built.splitlines())
    programs = [each["executable"] for each in messages if each.get("target", {}).get("name") == "floor"]
    shutil.copy2(programs[-1], BUILT / "floor")


def copy(bench: Bench) -> Iterator[Row]:
    """Formats by kernels, in pairs with cp."""
    listed = subprocess.run([bench.arguments.floor, "--list-kernels"], stdout=subprocess.PIPE, text=True, check=True).stdout
    kernels = [name for name in listed.splitlines() if name != "scalar"]
    kernels = [name for name in kernels if name != "portable vectors"] or kernels
    copying = Contender("cp -r --reflink=never", ["cp", "-r", "--reflink=never", str(bench.source), "DST"])
    bench.in_turn([copying], WARMING)
    copying.seconds.clear()
    for kernel in kernels:
        for words in bench.arguments.formats:
            ours = Contender(f"{' '.join(words)}, {kernel}", bench.floor("convert", "--kernel", kernel, "--format", *words))
            bench.in_turn([ours], WARMING)
            warmed = len(ours.seconds)
            ratios = []
            for number in range(bench.arguments.pairs):
                pair = [copying, ours] if number % 2 else [ours, copying]  # neither always comes first
                taken = {each.name: bench.run(each) for each in pair}
                ratios.append(taken[ours.name] / taken[copying.name])
            del ours.seconds[:warmed], ours.processor[:warmed], ours.system[:warmed]
            yield bench.row(ours, statistics.median(ratios), f"cp's, median of {bench.arguments.pairs} pairs")
    yield bench.row(copying)


def floor(bench: Bench) -> Iterator[Row]:
    """A conversion's processor time against that of its parts."""
    for words in bench.arguments.formats:
        options, name = ["--format", *words], " ".join(words)
        parts = {part: Contender(f"{name}: {part} alone", bench.floor(part, *options)) for part in [*PARTS, "hash-twice"]}
        whole = Contender(f"{name}: processor time", bench.convert(*options))
        bench.in_turn([whole, *parts.values()])
        # The least of several runs: whatever else a machine does only adds to processor time.
        taken = {part: min(each.processor) for part, each in parts.items()}
        least = sum(times * taken[part] for part, times in PARTS.items())
        ours = min(whole.processor)
        yield from map(bench.row, parts.values())
        one_pass = least - 2 * taken["hash"] + taken["hash-twice"]
        of = f"the parts' {least:.3f} s (files and tensors hashed in one pass: {one_pass:.3f} s), least of all runs each"
        yield bench.row(whole, ours / least, of, FLOOR)


def threads(bench: Bench) -> Iterator[Row]:
    """More and more of them."""
    contenders = [Contender(f"nf4, threads: {count}", bench.convert("--threads", str(count))) for count in THREADS]
    bench.in_turn(contenders)
    yield from against_first(bench, contenders)


def files(bench: Bench) -> Iterator[Row]:
    """More and more output files, which can be in flight together."""
    contenders = [Contender(f"nf4, output files: {count}", bench.convert(*bench.in_files(count))) for count in FILES]
    bench.in_turn(contenders)
    yield from against_first(bench, contenders)


def against_first(bench: Bench, contenders: list[Contender]) -> Iterator[Row]:
    """What each takes of the first one's time."""
    first = statistics.median(contenders[0].seconds)
    for each in contenders:
        yield bench.row(each, statistics.median(each.seconds) / first, f"the time of {contenders[0].name}")


def devices(bench: Bench) -> Iterator[Row]:
    """GPUs against the CPU, in formats that have kernels there."""
    probe = bench.convert("--device", "cuda", "--dry-run")
    if subprocess.run(probe, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
        raise Unavailable("no GPU that can be used")
    for words in (["nf4"], ["nf4", "--double-quant"], ["nvfp4"]):
        name = " ".join(words)
        pair = [Contender(f"{name} --device {each}", bench.convert("--device", each, "--format", *words)) for each in ("cpu", "cuda")]
        bench.in_turn(pair)
        yield from against_first(bench, pair)


def bnb(bench: Bench) -> Iterator[Row]:
    """Tensor by tensor, shard by shard; without hashes."""
    script = str(ROOT / "benches" / "bitsandbytes_loop.py")
    try:
        words = [bench.arguments.python, script] if bench.arguments.python else python("client", "bitsandbytes_loop")
    except subprocess.CalledProcessError:
        raise Unavailable("scripts/venv couldn't make its environment; --python names another") from None
    which = "import bitsandbytes, torch; print('cuda' if torch.cuda.is_available() else 'cpu')"
    probe = subprocess.run([words[0], "-c", which], stdout=subprocess.PIPE, text=True)
    if probe.returncode:
        raise Unavailable(f"{words[0]} has no torch or bitsandbytes")
    device = probe.stdout.split()[-1]
    loop = Contender(f"bitsandbytes nf4 loop on {device}, imports not counted", [*words, str(bench.source), "DST", device])
    ours = Contender("nf4 on all cores", bench.convert())
    bench.in_turn([ours, loop], 1)
    loop.seconds = loop.without_imports
    yield bench.row(ours)
    yield bench.row(loop, statistics.median(loop.seconds) / statistics.median(ours.seconds), "prequant's time")


def cold(bench: Bench) -> Iterator[Row]:
    """Out of the disk, which nothing can be faster than."""
    if file_system(bench.source) in ("tmpfs", "ramfs"):
        raise Unavailable(f"{bench.source} is in memory; --folder names a disk")

    def drop() -> None:
        for path in bench.source.iterdir():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    cat = Contender("cat SRC > /dev/null, cold", ["bash", "-c", 'cat "$1"/* > /dev/null', "bash", str(bench.source)])
    warm, ours = Contender("nf4, warm", bench.convert()), Contender("nf4, cold", bench.convert())
    # What the disk has to do of a conversion: 4 bits and an absmax of 32 for each 64 weights of 16, synced.
    both = 'cat "$1"/* > /dev/null & mkdir "$2"; dd if=/dev/zero of="$2/zeros" bs=1M count="$3" conv=fsync 2> /dev/null; wait'
    written = str(bench.size * 9 // 32 >> 20)
    disk = Contender(f"cat SRC > /dev/null, cold, beside {written} MiB written and synced", ["bash", "-c", both, "bash", str(bench.source), "DST", written])
    for _ in range(bench.arguments.runs):
        bench.run(cat, drop)
        bench.run(disk, drop)
        bench.run(warm)
        bench.run(ours, drop)
    floor, seconds = max(statistics.median(each.seconds) for each in (cat, warm)), statistics.median(ours.seconds)
    yield bench.row(cat)
    yield bench.row(disk)
    yield bench.row(warm)
    yield bench.row(ours, seconds / floor, "the longer of cat and warm", COLD)
    yield Row("nf4, cold", ratio=seconds / statistics.median(disk.seconds), of="cat's beside writing")


def file_system(path: Path) -> str:
    """The type of the one that a path is on."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    found = [(len(point), kind) for _, point, kind, *_ in mounts if path.is_relative_to(point)]
    return max(found)[1] if found else ""


def writers(bench: Bench) -> Iterator[Row]:
    """Threads that wait for a file's lock, or for the file system otherwise, while they write."""
    for name, options in (("", []), (", 8 output files", bench.in_files(8))):
        command = bench.convert("--threads", str(MANY), *options)
        counts: list[int] = []
        while len(counts) < SAMPLES:
            settle(bench.source, bench.output)
            warm_memory(bench.output.parent, bench.size)
            found = sample(command, bench.output)
            counts += found
            if not found:
                raise Unavailable("the run is too short to be sampled")
        counts = sorted(counts[:SAMPLES])
        of = f"of {MANY} threads, {len(counts)} samples"
        what = f"threads that wait in the write path{name}"
        yield Row(f"{what}: mean", ratio=statistics.mean(counts), of=of, bar=WRITERS)
        yield Row(f"{what}: 95th percentile", ratio=counts[len(counts) * 95 // 100 - 1], of=of, bar=WRITERS_P95)


def sample(command: list[str], output: Path) -> list[int]:
    """Runs a conversion, and counts again and again the threads that wait while they write."""
    words = [str(output) if word == "DST" else word for word in command]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    counts, tasks = [], Path(f"/proc/{process.pid}/task")
    while process.poll() is None:
        try:
            states = [is_in_write(task) for task in tasks.iterdir()]
        except OSError:
            break
        if len(states) > MANY // 2:  # before and after it plans, copies and publishes
            counts.append(sum(states))
        time.sleep(INTERVAL)
    if process.wait():
        sys.exit(f"exit code {process.returncode}: {' '.join(words)}")
    return counts


def is_in_write(task: Path) -> bool:
    """Whether a thread sleeps in a system call that writes; by the function it sleeps in, where calls can't be seen."""
    try:
        if (task / "stat").read_text().rpartition(")")[2].split()[0] not in "SD":
            return False
        try:
            call = (task / "syscall").read_text().split()[0]
        except PermissionError:
            return bool(WAITING.search((task / "wchan").read_text()))
        return call.isdigit() and int(call) in WRITING.get(platform.machine(), set())
    except (OSError, IndexError):  # it has ended
        return False


def tail(bench: Bench) -> Iterator[Row]:
    """What is left to be hashed once all is written."""
    for count in (1, 8):
        spans = spans_of(bench.trace(*bench.in_files(count)))
        ends = [(span["name"], span["ts"] + span["dur"]) for span in spans]
        last = {kind: max((end for name, end in ends if name == kind), default=0.0) for kind in ("quantize", "write", "hash")}
        if not all(last.values()):
            raise Unavailable("the trace has no spans of quantizing, writing or hashing")
        written = {span["args"]["file"] for span in spans if span["name"] == "write"}
        run = max(end for _, end in ends) - min(span["ts"] for span in spans)
        in_files, of = f"output files: {len(written)}", f"the run's {run / 1e6:.3f} s"
        for kind, what in (("quantize", "last weight quantized"), ("write", "last write")):
            seconds = max(0.0, last["hash"] - last[kind])
            bar = TAIL if kind == "write" and len(written) >= 4 else None
            yield Row(f"{what} to last hash, {in_files}", seconds / 1e6, None, seconds / run, of, bar)


def spans_of(path: Path) -> list[dict]:
    """A trace's spans."""
    return [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]


def verify(bench: Bench) -> Iterator[Row]:
    """Every file and every tensor; a large file's own hash can't be divided among cores, its tensors' can."""
    folder = bench.output.with_name("verified")
    for name, options in (("16 files", bench.in_files(16)), ("one file", ["--max-shard-size", "1000GB"])):
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([str(folder) if word == "DST" else word for word in bench.convert(*options)], check=True)
        for count in dict.fromkeys((1, int(cores()))):
            is_serial = name == "one file" and count > 1
            hashing, times = (1, 1) if is_serial else (count, 2)
            own = Contender("SHA-256 alone", bench.floor("hash", "--threads", str(hashing)))
            command = [str(bench.arguments.prequant), "verify", str(folder), "--quiet", "--threads", str(count)]
            ours = Contender(f"verify, {name}, threads: {count}", command)
            ratios = []
            for number in range(bench.arguments.pairs):
                settle(folder, bench.output)
                for each in [own, ours] if number % 2 else [ours, own]:
                    each.run(bench.output)
                ratios.append(ours.seconds[-1] / own.seconds[-1] / times)
            of = f"SHA-256's of {'the file' if is_serial else 'files and tensors'}, threads: {hashing}"
            row = bench.row(ours, statistics.median(ratios), f"{of}, median of {bench.arguments.pairs} pairs", VERIFY)
            row.rate = None
            yield row
    shutil.rmtree(folder)


def memory(bench: Bench) -> Iterator[Row]:
    """Many tensors, many threads: buffers and what is kept of each tensor."""
    source = sparse.fresh("source")
    make_apart(source, bench.arguments.tensors, make=make_many)
    for words in (["nf4"], ["nf4", "--double-quant"], ["nvfp4"]):
        for count in (1, 16, 64):
            command = [bench.arguments.prequant, "convert", source, sparse.fresh("converted") / "to", "--quiet"]
            seconds, peak, _ = sparse.run([*command, "--device", "cpu", "--threads", count, "--format", *words])
            name = f"{bench.arguments.tensors} tensors, {' '.join(words)}, threads: {count}: peak MiB"
            yield Row(name, seconds, ratio=peak / 2**20, of="MiB", bar=MEMORY)
    shutil.rmtree(sparse.WORK)


def make_many(source: Path, tensors: int) -> None:
    """A sparse checkpoint of small matrices."""
    names = (f"model.layers.{i // 500}.mlp.experts.{i % 500}.up_proj.weight" for i in range(tensors))
    sparse.write_shard(source / "model.safetensors", {name: [64, 64] for name in names})
    (source / "config.json").write_text('{"model_type": "qwen3_moe"}\n')


def replayed(bench: Bench) -> Iterator[Row]:
    """A run's trace on more cores."""
    try:
        traced = replay.read_trace(json.loads(bench.trace(*bench.in_files(8)).read_text()), undisturbed=True)
    except replay.NothingTraced as why:
        raise Unavailable(str(why)) from None
    name = f"nf4, output files: {len(traced.files)}, as traced with {traced.threads} threads"
    yield Row(name, traced.seconds, bench.size / traced.seconds)
    for number, count, result in replay.forecast(traced.files, [2, 4, 8, 16], None):
        name = f"replayed at its median rates on {number} cores, files in flight: {count}"
        yield Row(name, result.seconds, result.rate, result.seconds / traced.seconds, "the traced run's time")


MODES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "copy": copy,
    "floor": floor,
    "threads": threads,
    "files": files,
    "devices": devices,
    "bnb": bnb,
    "cold": cold,
    "writers": writers,
    "tail": tail,
    "verify": verify,
    "memory": memory,
    "replay": replayed,
}


if __name__ == "__main__":
    main()
