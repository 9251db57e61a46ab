"""Replays the trace of a conversion on any number of simulated cores.

    scripts/replay-trace TRACE [--cores 2,4,8,16] [--files N] [--times K] [--undisturbed]
    scripts/replay-trace --self-check

TRACE is what `prequant convert --trace` wrote: how long each tensor took to be read, quantized, written and hashed. The
replay does the same on N cores, with one thread on each, and hands the work out as prequant does. The threads share two
things only: a file takes one writer at a time, and its SHA-256 goes from front to back, one thread at a time. --files says
how many output files are in flight at most (as many as cores by default, and not more than 16), --times repeats the run's
files K times, for a larger checkpoint of the same kind. Caches, memory and clock rates are taken to be those of the run
that was traced; with --undisturbed, of the half of it that went better, for a machine that had other things to do.

--self-check replays runs that were measured on a machine with 16 cores, with the rates measured there
(benches/results/scale-16-cores.json): of a pipeline that wrote one file at a time and hashed it at the end, and of a
prototype of today's. It fails where the replay is off by more than 20 %. Needs Python alone.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path

MEASURED = Path(__file__).resolve().parent / "results" / "scale-16-cores.json"
TOLERANCE = 0.2
# The prototype: pieces of a file that may wait for its hash, as a multiple of the cores.
PIECES = 2
# Today's pipeline, as in src/pipeline: bytes of all files that may wait, and the most files in progress. Smaller pieces are
# left to the thread that hashes the file.
WINDOW, MAX_FILES, SMALL = 64 << 20, 16, 128 << 10
# How much faster two hashes are computed in one pass than one after the other, where there are instructions for SHA-256.
ONE_PASS = 1.4


@dataclass
class Task:
    """A tensor, or a run of a large one: bytes, and seconds on one core."""

    source_bytes: float
    output_bytes: float
    compute: float  # reading and quantizing
    write: float
    write_contended: float  # while others wait to write to the same file
    tensor_hash: float
    file_hash: float

    @property
    def both_hashes(self) -> float:
        """In one pass."""
        return (self.tensor_hash + self.file_hash) / ONE_PASS


@dataclass
class Outcome:
    """How a replay went."""

    seconds: float
    busy: float  # seconds that cores were at work
    bytes: float

    @property
    def rate(self) -> float:
        """Bytes of the source per second."""
        return self.bytes / self.seconds


# What a simulated thread says next: seconds that it works, a lock that it waits for, or a signal.
Thread = Generator["float | Lock | Signal", None, None]


class Simulation:
    """Threads, each on a core of its own, and a clock."""

    def __init__(self) -> None:
        self.now = self.busy = 0.0
        self._queue: list[tuple[float, int, Thread]] = []
        self._order = itertools.count()

    def start(self, thread: Thread) -> None:
        """Has a thread run from now on."""
        heapq.heappush(self._queue, (self.now, next(self._order), thread))

    def run(self) -> None:
        """Until all threads have ended."""
        while self._queue:
            self.now, _, thread = heapq.heappop(self._queue)
            try:
                wanted = next(thread)
            except StopIteration:
                continue
            if isinstance(wanted, (Lock, Signal)):
                wanted.take(thread)
            else:
                self.busy += wanted
                heapq.heappush(self._queue, (self.now + wanted, next(self._order), thread))


class Lock:
    """Held by one thread at a time, in the order of asking."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation, self._held = simulation, False
        self.waiting: deque[Thread] = deque()

    def take(self, thread: Thread) -> None:
        """Goes on with the thread once it has the lock."""
        if self._held:
            self.waiting.append(thread)
        else:
            self._held = True
            self._simulation.start(thread)

    def release(self) -> None:
        """Hands it to the next."""
        if self.waiting:
            self._simulation.start(self.waiting.popleft())
        else:
            self._held = False


class Signal:
    """Threads wait for it to be given."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation, self._waiting = simulation, []

    def take(self, thread: Thread) -> None:
        """Goes on with the thread when it is given."""
        self._waiting.append(thread)

    def give(self) -> None:
        """To all who wait."""
        waiting, self._waiting = self._waiting, []
        for thread in waiting:
            self._simulation.start(thread)


def write(task: Task, lock: Lock) -> Thread:
    """One file, one writer."""
    yield lock
    yield task.write_contended if lock.waiting else task.write
    lock.release()


def one_file_at_a_time(files: list[list[Task]], cores: int, read_back: float) -> Outcome:
    """Tensors in order; when the last of a file is written, the file is read back and hashed, whole by one thread and tensor
    by tensor by the others. `read_back` is how much longer a hash takes for it, as a factor."""
    simulation = Simulation()
    changed = Signal(simulation)
    locks = [Lock(simulation) for _ in files]
    chunks = deque((number, task) for number, tasks in enumerate(files) for task in tasks)
    left = [len(tasks) for tasks in files]
    hashes: deque[float] = deque()

    def thread() -> Thread:
        while True:
            if hashes:
                yield hashes.popleft() * read_back
            elif chunks:
                number, task = chunks.popleft()
                yield task.compute
                yield from write(task, locks[number])
                left[number] -= 1
                if not left[number]:
                    hashes.append(sum(task.file_hash for task in files[number]))
                    hashes.extend(task.tensor_hash for task in files[number])
                    changed.give()
            elif any(left):
                yield changed
            else:
                return

    return outcome(simulation, thread, cores, files)


@dataclass
class OpenFile:
    """A file in flight, of the prototype."""

    tasks: list[Task]
    lock: Lock
    taken: int = 0
    hashed: int = 0
    written: set[int] = field(default_factory=set)
    is_hashing: bool = False


def files_in_flight(files: list[list[Task]], cores: int, count: int) -> Outcome:
    """The prototype: threads take tensors of the file that is least far ahead of its hash. What is written is hashed in order,
    by whoever writes what comes next, and all that waits behind it."""
    simulation = Simulation()
    changed = Signal(simulation)
    waiting = deque(files)
    opened: list[OpenFile] = []
    window = max(2, PIECES * cores // count)

    def take() -> OpenFile | None:
        while waiting and sum(file.hashed < len(file.tasks) for file in opened) < count:
            opened.append(OpenFile(waiting.popleft(), Lock(simulation)))
        ready = [file for file in opened if file.taken < min(len(file.tasks), file.hashed + window)]
        return min(ready, key=lambda file: file.taken - file.hashed, default=None)

    def thread() -> Thread:
        while waiting or any(file.hashed < len(file.tasks) for file in opened):
            file = take()
            if not file:
                yield changed
                continue
            number = file.taken
            file.taken += 1
            task = file.tasks[number]
            yield task.compute + task.tensor_hash
            yield from write(task, file.lock)
            file.written.add(number)
            while not file.is_hashing and file.hashed in file.written:
                file.is_hashing = True
                yield file.tasks[file.hashed].file_hash
                file.hashed += 1
                file.is_hashing = False
                changed.give()
            opened[:] = [each for each in opened if each.hashed < len(each.tasks)]

    return outcome(simulation, thread, cores, files)


@dataclass
class Stream:
    """A file in progress: its frontier is the first task that isn't written and hashed."""

    tasks: list[Task]
    begins: list[float]  # each task's first byte
    lock: Lock
    taken: int = 0
    running: int = 0
    frontier: int = 0
    is_moving: bool = False  # a thread is at the frontier
    is_written_early: bool = False  # a thread writes ahead of it
    waiting: dict[int, set[str]] = field(default_factory=dict)  # what is done already of tasks ahead of it


def front_to_back(files: list[list[Task]], cores: int, count: int) -> Outcome:
    """Today's pipeline: the thread that brings what comes next of a file writes and hashes it, and what waits behind it. One
    that comes early leaves its piece in memory; if the frontier is far behind, it hashes and writes it before that."""
    simulation = Simulation()
    changed = Signal(simulation)
    begins = [[0.0, *itertools.accumulate(task.output_bytes for task in tasks)] for tasks in files]
    pending = deque(Stream(tasks, at, Lock(simulation)) for tasks, at in zip(files, begins, strict=True))
    streams = list(pending)
    active: list[Stream] = []
    window = WINDOW / count

    def is_far_ahead(file: Stream) -> bool:
        return file.running > 0 and file.begins[file.taken] > file.begins[file.frontier] + window

    def take(in_hand: Stream | None) -> Stream | None:
        active[:] = [file for file in active if file.taken < len(file.tasks)]
        while pending and len(active) < count:
            active.append(pending.popleft())
        ready = [file for file in active if not is_far_ahead(file)]
        return min(ready, key=lambda file: (file is not in_hand, file.running), default=None)

    def move(file: Stream) -> Thread:
        """Writes and hashes what comes next, as long as it is there."""
        file.is_moving = True
        while file.frontier in file.waiting:
            done, task = file.waiting.pop(file.frontier), file.tasks[file.frontier]
            if "written" not in done:
                yield from write(task, file.lock)
            yield task.file_hash if "hashed" in done else task.both_hashes
            file.frontier += 1
            changed.give()
        file.is_moving = False

    def put(file: Stream, number: int) -> Thread:
        task, done = file.tasks[number], set()
        is_far = file.begins[number] > file.begins[file.frontier] + window / 4
        if number != file.frontier and file.is_moving and is_far and task.output_bytes >= SMALL:
            yield task.tensor_hash
            done.add("hashed")
            if not file.is_written_early:
                file.is_written_early = True
                yield from write(task, file.lock)
                file.is_written_early = False
                done.add("written")
        file.waiting[number] = done
        if not file.is_moving:
            yield from move(file)

    def thread() -> Thread:
        in_hand = None
        while any(file.taken < len(file.tasks) for file in streams):
            file = take(in_hand)
            if not file:
                yield changed
                continue
            number, in_hand = file.taken, file
            file.taken += 1
            file.running += 1
            yield file.tasks[number].compute
            yield from put(file, number)
            file.running -= 1
            changed.give()

    return outcome(simulation, thread, cores, files)


def outcome(simulation: Simulation, thread: Callable[[], Thread], cores: int, files: list[list[Task]]) -> Outcome:
    """Runs a thread on each core."""
    for _ in range(cores):
        simulation.start(thread())
    simulation.run()
    return Outcome(simulation.now, simulation.busy, sum(task.source_bytes for tasks in files for task in tasks))


class NothingTraced(Exception):
    """A trace has no work in it."""


@dataclass
class Traced:
    """What a trace has of a run."""

    files: list[list[Task]]
    threads: int  # that quantized or copied
    seconds: float


def read_trace(trace: dict, undisturbed: bool = False) -> Traced:
    """What each tensor took, file by file. What is known of a file alone, or of the whole run, is shared out among its tensors
    by their bytes. An undisturbed run does each kind of work at the median rate."""
    spans = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    ends = [span["ts"] + span["dur"] for span in spans]
    run = (max(ends) - min(span["ts"] for span in spans)) / 1e6 if spans else 0.0
    write_rate = rate_alone([span for span in spans if span["name"] == "write"])
    without_inner(spans)
    if undisturbed:
        at_median_rates(spans)
        write_rate = rate_of([span for span in spans if span["name"] == "write"]) or write_rate
    # By kind, and by what they are of: bytes, seconds, and how many.
    sizes, seconds, counts = (defaultdict(lambda: defaultdict(float)) for _ in range(3))
    tensors: dict[str, dict[str, None]] = defaultdict(dict)  # of each file, in order
    for span in sorted(spans, key=lambda span: span["ts"]):
        kind, tensor, file = span["name"], span["args"].get("tensor"), span["args"].get("file")
        if tensor and file:
            tensors[file][tensor] = None
        subject = (file if kind == "write" else tensor or file) or ""
        sizes[kind][subject] += span["args"]["bytes"]
        seconds[kind][subject] += span["dur"] / 1e6
        counts[kind][subject] += 1
    if not tensors:
        raise NothingTraced("no tensor was read or quantized in this trace")
    # A tensor that was copied wasn't quantized, and one that shares a scale may have been read twice.
    size_of = {name: sizes["quantize"][name] or sizes["read"][name] or 1.0 for each in tensors.values() for name in each}
    total = sum(size_of.values())
    files = []
    for file, names in tensors.items():
        whole, tasks = sum(size_of[name] for name in names), []
        output, one_hash = sizes["write"][file], seconds_of_a_hash(seconds["hash"][file], sizes["hash"][file], sizes["write"][file])
        for name in names:
            of_file, of_all = size_of[name] / whole, size_of[name] / total
            compute = sum(seconds[kind][name] + seconds[kind][file] * of_file for kind in ("read", "quantize"))
            compute += seconds["hash"][name] + sum(seconds[kind][""] * of_all for kind in ("read", "quantize", "hash"))
            write, hashed = output * of_file / write_rate, one_hash * of_file
            task = [size_of[name], output * of_file, compute, write, write, hashed, hashed]
            runs = int(counts["quantize"][name]) or 1
            tasks += [Task(*(each / runs for each in task))] * runs
        files.append(tasks)
    workers = {span["tid"] for span in spans if span["name"] in ("read", "quantize")}
    return Traced(files, len(workers), run)


def seconds_of_a_hash(seconds: float, hashed: float, written: float) -> float:
    """What one hash of a file's bytes takes, when this is what hashing them took. Most were hashed for the file and their tensor
    in one pass; those that count twice in `hashed` once for each."""
    twice = min(max(hashed / written - 1, 0.0), 1.0) if written else 0.0
    return seconds / ((1 - twice) * 2 / ONE_PASS + twice * 2)


def rate_alone(spans: list[dict]) -> float:
    """Bytes per second while nobody else writes to the same file: a span that overlaps with another may be one that waits."""
    alone = []
    spans = sorted(spans, key=lambda span: (span["args"].get("file", ""), span["ts"]))
    for _, same_file in itertools.groupby(spans, key=lambda span: span["args"].get("file", "")):
        last_end, group = 0.0, list(same_file)
        for span, following in zip(group, [*group[1:], None]):
            end = span["ts"] + span["dur"]
            if span["ts"] >= last_end and not (following and following["ts"] < end):
                alone.append(span)
            last_end = max(last_end, end)
    return rate_of(alone) or rate_of(spans) or float("inf")


def without_inner(spans: list[dict]) -> None:
    """Takes the time of spans that lie in others off theirs."""
    around: dict[int, list[tuple[float, dict]]] = defaultdict(list)  # ends of spans that may hold more, by thread
    for span in sorted(spans, key=lambda span: (span["ts"], -span["dur"])):
        begin, end, outer = span["ts"], span["ts"] + span["dur"], around[span["tid"]]
        while outer and outer[-1][0] <= begin:
            outer.pop()
        if outer:
            outer[-1][1]["dur"] -= end - begin
        outer.append((end, span))


def at_median_rates(spans: list[dict]) -> None:
    """Has each span take what its bytes take at the rate that half of all bytes of its kind reach."""
    for kind in ("read", "quantize", "write", "hash"):
        those = [span for span in spans if span["name"] == kind and span["args"]["bytes"]]
        slowness = sorted((span["dur"] / span["args"]["bytes"], span["args"]["bytes"]) for span in those)
        left = sum(size for _, size in slowness) / 2
        for median, size in slowness:
            left -= size
            if left <= 0:
                break
        for span in those:
            span["dur"] = median * span["args"]["bytes"]


def rate_of(spans: list[dict]) -> float:
    """Bytes per second."""
    seconds = sum(span["dur"] for span in spans) / 1e6
    return sum(span["args"]["bytes"] for span in spans) / seconds if seconds else 0.0


def forecast(files: list[list[Task]], cores: list[int], count: int | None) -> list[tuple[int, int, Outcome]]:
    """Cores, files in flight, and how that goes."""
    counts = [min(count or number, MAX_FILES, len(files)) for number in cores]
    return [(number, each, front_to_back(files, number, each)) for number, each in zip(cores, counts, strict=True)]


def measured_files(measured: dict, file_bytes: float | None, layers: list[int], hashes: str = "both") -> list[list[Task]]:
    """The checkpoint of the measurements; in files of so many bytes if given, or one for each number of layers."""
    source, rates = measured["source"], measured["rates"]
    size = source["bytes_of_a_matrix"]
    output = size * source["output_for_a_byte"]
    seconds = output / rates["sha256"]
    task = Task(
        size,
        output,
        size / rates["read_and_quantize"],
        output / rates["write"],
        output / rates["write_contended"],
        seconds if hashes == "both" else 0.0,
        seconds if hashes != "none" else 0.0,
    )
    count = source["matrices_of_a_layer"]
    if file_bytes is None:
        return [[task] * (each * count) for each in layers]
    each, left = max(1, int(file_bytes / output)), sum(layers) * count
    return [[task] * min(each, left - begin) for begin in range(0, left, each)]


def check_reading() -> None:
    """A trace of two tensors in a file, and what it must replay to: each is quantized in 6 µs, written in 4 and hashed in 5."""
    spans = []
    for number, name in enumerate("ab"):
        begin = 100 * number
        spans += [
            {"name": "quantize", "ts": begin, "dur": 10, "args": {"tensor": name, "file": "f", "bytes": 100}},
            {"name": "write", "ts": begin + 2, "dur": 4, "args": {"file": "f", "bytes": 40}},  # within the first
            {"name": "hash", "ts": begin + 10, "dur": 5, "args": {"file": "f", "bytes": 40}},
            {"name": "wait", "ts": begin + 15, "dur": 80, "args": {"bytes": 0}},
        ]
    traced = read_trace({"traceEvents": [{"ph": "X", "tid": 1, **span} for span in spans]})
    found = [round(front_to_back(traced.files, count, 1).seconds * 1e6, 6) for count in (1, 2)]
    # On two cores the second is quantized meanwhile, and waits for the first.
    if found != [30.0, 24.0]:
        sys.exit(f"a trace of 30 µs on one core and 24 on two is replayed in {found}")


def self_check() -> int:
    """Replays what was measured, and compares."""
    check_reading()
    measured = json.loads(MEASURED.read_text())
    layers, rates = measured["source"]["layers_of_shards"], measured["rates"]
    read_back = 1 + rates["sha256"] / rates["read_back"]
    rows = []
    for run in measured["one_file_at_a_time"]:
        processes = run.get("processes", 1)
        mine = [sum(layers) // processes]
        files = measured_files(measured, run.get("file_bytes"), mine)
        replayed = one_file_at_a_time(files, run["cores"], read_back).rate * processes
        in_files = f", files of {run['file_bytes'] / 1e6:.0f} MB" if "file_bytes" in run else ""
        several = f"{processes} processes on each " if processes > 1 else ""
        name = f"one file at a time, {several}{run['cores']} cores{in_files}"
        rows.append((name, run["gb_per_s"], replayed / 1e9, run.get("not_in_the_model", "")))
    for run in measured["files_in_flight"]:
        hashes = run.get("hashes", "both")
        replayed = files_in_flight(measured_files(measured, None, layers, hashes), run["cores"], run["files"]).rate
        name = f"{run['files']} in flight, {run['cores']} cores, hashes: {hashes}"
        rows.append((name, run["gb_per_s"], replayed / 1e9, ""))
    print(f"GB/s of bf16, {measured['machine']}, and replayed\n\n| | measured | replayed | ratio | |\n| --- | ---: | ---: | ---: | --- |")
    failed = False
    for name, expected, found, missing in rows:
        is_off = abs(found / expected - 1) > TOLERANCE and not missing
        failed |= is_off
        verdict = f"not in the model: {missing}" if missing else "OFF" if is_off else ""
        print(f"| {name} | {expected:.1f} | {found:.1f} | {found / expected:.2f} | {verdict} |")
    return 1 if failed else 0


def report(traced: Traced, times: int, cores: list[int], count: int | None) -> str:
    """A table of forecasts."""
    size = sum(task.source_bytes for tasks in traced.files for task in tasks)
    files = traced.files * times
    lines = [
        f"Traced: {size / 1e9:.3f} GB, tensors: {sum(map(len, traced.files))}, output files: {len(traced.files)},"
        f" threads: {traced.threads}, {traced.seconds:.3f} s, {size / traced.seconds / 1e9:.2f} GB/s."
        f" Replayed, {times} of it in a row:",
        "",
        "| cores | files in flight | seconds | GB/s of source | cores at work |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for number, each, result in forecast(files, cores, count):
        share = result.busy / result.seconds / number
        lines.append(f"| {number} | {each} | {result.seconds:.3f} | {result.rate / 1e9:.2f} | {share:.0%} |")
    return "\n".join(lines)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="scripts/replay-trace", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, nargs="?", help="a file that --trace wrote")
    parser.add_argument("--cores", default="2,4,8,16", help="numbers of cores, with commas between them")
    parser.add_argument("--files", type=int, help="output files in flight")
    parser.add_argument("--times", type=int, default=1, help="how often the traced run's files are replayed")
    undisturbed = "take each kind of work at its median rate: for a trace from a busy machine"
    parser.add_argument("--undisturbed", action="store_true", help=undisturbed)
    parser.add_argument("--self-check", action="store_true", help="replay measured runs and compare")
    arguments = parser.parse_args()
    if arguments.self_check:
        return self_check()
    if not arguments.trace:
        parser.error("a trace or --self-check is needed")
    cores = [int(number) for number in arguments.cores.split(",")]
    try:
        traced = read_trace(json.loads(arguments.trace.read_text()), arguments.undisturbed)
    except NothingTraced as why:
        sys.exit(f"{arguments.trace}: {why}")
    print(report(traced, arguments.times, cores, arguments.files))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
