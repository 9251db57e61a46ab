"""Kills conversions at chosen system calls, or has one of these fail, and looks at what is left and at what the next run makes.

    scripts/fault-test [PREQUANT] [--kills 100] [--faults 100] [--reads 100] [--seed 1] [--folder FOLDER]

A conversion, one that replaces another checkpoint, a relayout and a dequantization are run under strace, which ends them at
the k-th call of a kind, or has that call return an error. Afterwards the destination must be the old checkpoint, the new one,
or visibly neither; the process must have ended by itself, with an error that says what failed; and the next run, with the
same options or with --restart or without --force, must end with the bytes of an undisturbed one or refuse and leave
everything as it is. Then calls that read a checkpoint fail, see read_faults.py. Needs Linux, strace and Python alone; without strace it says so and does nothing. All happens in memory if
a file system lies there, so that no disk is waited for.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from crash import DONE, STAGING, digests, make_source  # noqa: E402
from read_faults import Reading, sweep  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
IN_MEMORY = Path("/dev/shm")
SIDE = 128
"""Rows and columns of matrices: files of some 100 kB, since it is calls that count."""
STRACE = ["strace", "-f", "-qq"]
QUICKLY = "--seccomp-bpf"
"""Has it stop at no other calls than those that are asked for. It sends no signals then."""

# What a run may die of, and what may fail how.
CHANGES = ["rename", "unlink", "unlinkat", "fsync", "mkdir", "rmdir", "openat", "pwrite64", "write", "fallocate", "ftruncate"]
READS = ["openat", "pread64", "read", "statx", "getdents64", "fstat", "lseek", "preadv2", "fadvise64", "flock", "fcntl"]
ERRORS = ["EIO", "ENOSPC", "EACCES", "EMFILE", "EINTR"]
SECONDS = 60


@dataclass
class Job:
    """A command, and what it starts from and ends with."""

    name: str
    work: Path
    command: list[str]
    flags: list[str]
    old: Path | None = None
    expected: dict[str, str] | None = None
    before: dict[str, str] | None = None
    calls: dict[str, range] | None = None

    @property
    def destination(self) -> Path:
        """Where it is put."""
        return self.work / "converted"

    def run(self, *flags: str, without: str = "") -> list[str]:
        """The command line."""
        return [*self.command, str(self.destination), *(flag for flag in self.flags if flag != without), *flags]

    def set_up(self) -> None:
        """Puts in place what is there before."""
        shutil.rmtree(self.destination, ignore_errors=True)
        if self.old:
            shutil.copytree(self.old, self.destination)

    def visible(self) -> dict[str, str]:
        """What a client sees at the destination."""
        found = digests(self.destination) if self.destination.exists() else {}
        return {name: digest for name, digest in found.items() if not name.startswith((STAGING, DONE))}


def main() -> int:
    """Runs the rounds; returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/fault-test", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prequant", nargs="?", type=Path, default=ROOT / "target" / "release" / "prequant")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--reads", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to work [default: in memory, or target/]")
    arguments = parser.parse_args()
    if not shutil.which("strace") or subprocess.run([*STRACE, QUICKLY, "-e", "trace=fsync", "true"], check=False).returncode:
        print("SKIPPED: strace isn't here, or can't trace: no system call is made to fail")
        return 0
    rng = random.Random(arguments.seed)
    place = arguments.folder or (IN_MEMORY if IN_MEMORY.is_mount() else ROOT / "target")
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="faults.", dir=place) as work:
        jobs = make_jobs(str(arguments.prequant.resolve()), Path(work), rng)
        for kind, count in (("kill", arguments.kills), ("fault", arguments.faults)):
            tally: collections.Counter[str] = collections.Counter()
            start = time.monotonic()
            for i in range(count):
                tally[disturb(jobs[i % len(jobs)], kind, rng)] += 1
                if (i + 1) % 500 == 0 or i + 1 == count:
                    ended = ", ".join(f"{what} {times}" for what, times in sorted(tally.items()))
                    print(f"{i + 1} {kind}s in {time.monotonic() - start:.0f} s: {ended}", flush=True)
            if kind == "kill" and tally["finished"] > count / 2:
                sys.exit(f"{tally['finished']} of {count} runs weren't disturbed")
        binary = str(arguments.prequant.resolve())
        sweep(Reading(binary, ROOT / "fixtures/tiny-qwen3-moe", Path(work), [*STRACE, QUICKLY]), arguments.reads, rng)
    return 0


def make_jobs(binary: str, work: Path, rng: random.Random) -> list[Job]:
    """The jobs, each run once undisturbed."""
    source, other = work / "source", work / "other"
    make_source(source, rng, SIDE)
    (source / "code").mkdir()
    (source / "code" / "modeling.py").write_text("pass\n")
    shutil.copytree(source, other)
    (other / "added_tokens.json").write_text("{}\n")
    flags = ["--quiet", "--max-shard-size", "125kB", "--threads", "2"]
    old, converted = work / "old", work / "whole-convert"
    subprocess.run([binary, "convert", str(other), str(old), "--format", "fp4", "--quiet"], check=True)
    convert = Job("convert", work, [binary, "convert", str(source)], flags)
    replace = Job("replace", work, [binary, "convert", str(source)], [*flags, "--force", "--hash-source"], old=old)
    dequantize = Job("dequantize", work, [binary, "dequantize", str(converted)], flags)
    relayout = Job("relayout", work, [binary, "convert", str(converted)], [*flags, "--experts", "fuse"])
    jobs = [convert, replace, dequantize, relayout]
    for job in jobs:
        job.set_up()
        job.before = job.visible()
        subprocess.run(job.run(), check=True)
        job.expected = job.visible()
        shutil.copytree(job.destination, work / f"whole-{job.name}")
    return jobs


def calls_of(job: Job) -> dict[str, range]:
    """Which calls of each kind there are to choose from: those of the busiest thread of an undisturbed run, but for the first
    ones, which the loader and the runtime make before anything of the source is looked at."""
    if job.calls is None:
        log, names = job.work / "calls", sorted({*CHANGES, *READS})
        job.set_up()
        subprocess.run([*STRACE, QUICKLY, "-o", str(log), "-e", "trace=" + ",".join(names), *job.run()], check=True)
        counts: collections.Counter[tuple[str, str]] = collections.Counter()
        before: collections.Counter[str] = collections.Counter()
        begun = False
        for line in log.read_text(errors="replace").splitlines():
            begun = begun or str(job.work) in line
            if match := re.match(r"(\d+)\s+(\w+)\(", line):
                counts[match[1], match[2]] += 1
                before[match[2]] += not begun
        busiest = {name: max((count for (_, call), count in counts.items() if call == name), default=0) for name in names}
        job.calls = {name: range(before[name] + 1, busiest[name] + 1) for name in names if busiest[name] > before[name]}
    return job.calls


def disturb(job: Job, kind: str, rng: random.Random) -> str:
    """One round; returns how the disturbed run ended."""
    calls = calls_of(job)
    call = rng.choice([name for name in calls if kind == "fault" or name in CHANGES])
    at = rng.choice(calls[call])
    what = "signal=KILL" if kind == "kill" else f"error={rng.choice(ERRORS)}"
    where = f"{job.name}: {call} {at} {what}"
    job.set_up()
    log = job.work / "calls"
    inject = [*STRACE, *([QUICKLY] if kind == "fault" else []), "-o", str(log), "-e", f"trace={call}", "-e", f"inject={call}:{what}:when={at}"]
    try:
        run = subprocess.run([*inject, *job.run()], capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        sys.exit(f"{where}: hangs")
    code = run.returncode
    if kind == "kill":
        ended = "finished" if code == 0 else "killed"
    elif code == 0:
        ended = "finished"
    elif code in (3, 4) and ("error: " in run.stderr or re.search(r"write\(2, .*INJECTED", log.read_text(errors="replace"))):
        ended = "said so"
    else:
        sys.exit(f"{where}: exit code {code}: {run.stderr}")
    if "panicked" in run.stderr:
        sys.exit(f"{where}: {run.stderr}")
    check_left(job, where, finished=code == 0)
    check_next(job, where, rng)
    return ended


def check_left(job: Job, where: str, finished: bool) -> None:
    """The destination is the old checkpoint, the new one, or visibly neither."""
    found = job.visible()
    last = "prequant.json" if "prequant.json" in job.expected else "config.json"
    versions = [version for version in (job.before, job.expected) if version]
    if finished and found != job.expected:
        sys.exit(f"{where}: ended well, and isn't what it should be: {sorted(found.items() ^ job.expected.items())}")
    if last in found and found not in versions:
        sys.exit(f"{where}: looks whole, and is neither: {sorted(found)}")
    if "config.json" in found and not any(version.items() - found.items() <= {(last, version[last])} for version in versions):
        sys.exit(f"{where}: has a config.json, and is neither: {sorted(found)}")


def check_next(job: Job, where: str, rng: random.Random) -> None:
    """The next run ends with the right bytes, or refuses and changes nothing."""
    ways = [job.run(), job.run("--restart")] + ([job.run(without="--force")] if "--force" in job.flags else [])
    run = rng.choice(ways)
    before = job.visible()
    result = subprocess.run(run, capture_output=True, text=True, timeout=SECONDS, check=False)
    if result.returncode == 3 and job.visible() == before:
        # Refused: a checkpoint is there already, or the other way is the right one.
        result = subprocess.run(job.run("--restart", "--force", without="--force"), capture_output=True, text=True, timeout=SECONDS, check=False)
    if result.returncode or job.visible() != job.expected:
        difference = sorted(job.visible().items() ^ job.expected.items())
        sys.exit(f"{where}: then {run[1:]} gave {result.returncode}, {json.dumps(result.stderr)}, {difference}")
    left = [path.name for path in (job.destination / STAGING, job.destination / DONE) if path.exists()]
    if left == [STAGING]:
        sys.exit(f"{where}: then {run[1:]} left its staging folder")


if __name__ == "__main__":
    raise SystemExit(main())
