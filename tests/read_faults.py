"""Has calls that read a checkpoint fail, one at a time: each must end the run with exit code 4 and words that name the file. An error
that was taken for "not there", or passed over, ends otherwise. Part of scripts/fault-test; see faults.py."""

from __future__ import annotations

import collections
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

CALLS = ["statx", "newfstatat", "openat", "read", "pread64", "getdents64", "readlink"]
ERRORS = ["EIO", "EACCES", "ESTALE"]
Place = tuple[str, str, str, int]
"""A command's name, a path, a call, and which of those that a thread makes with it."""


class Reading:
    """Commands on a small checkpoint, and the calls that they read it with."""

    def __init__(self, binary: str, source: Path, work: Path, strace: list[str]) -> None:
        self.strace, self.log, self.made = strace, work / "calls", work / "made"
        self.folders = [work / "read", work / "read-nf4"]
        plain, converted = map(str, self.folders)
        shutil.copytree(source, plain)
        (Path(plain) / "code").mkdir()
        (Path(plain) / "code" / "modeling.py").write_text("pass\n")
        flags = ["--max-shard-size", "200kB", "--hash-source", "--threads", "1"]
        subprocess.run([binary, "convert", plain, converted, "--quiet", *flags], check=True)
        made, one = str(self.made), ["--threads", "1"]
        self.commands = {
            "convert": [binary, "convert", plain, made, *one],
            "dry run": [binary, "convert", plain, made, "--dry-run", *one],
            "convert again": [binary, "convert", plain, converted, *flags],
            "relayout": [binary, "convert", converted, made, "--experts", "fuse", *one],
            "dequantize": [binary, "dequantize", converted, made, *one],
            "verify": [binary, "verify", converted, *one],
            "verify --quick": [binary, "verify", converted, "--quick", *one],
            "verify --against": [binary, "verify", converted, "--against", plain, *one],
            "inspect": [binary, "inspect", plain],
            "inspect a converted one": [binary, "inspect", converted],
        }

    def places(self) -> list[Place]:
        """Every call that can be made to fail."""
        places = []
        for name, command in self.commands.items():
            shutil.rmtree(self.made, ignore_errors=True)
            subprocess.run([*self.strace, "-y", "-o", str(self.log), "-e", "trace=" + ",".join(CALLS), *command], capture_output=True, check=True)
            counts: collections.Counter[tuple[str, str, str]] = collections.Counter()
            for line in self.log.read_text(errors="replace").splitlines():
                if match := re.match(r"(\d+)\s+(\w+)\((.*)", line):
                    counts.update((path, match[2], match[1]) for path in self._paths(match[3]))
            most: collections.Counter[tuple[str, str]] = collections.Counter()
            for (path, call, _), count in counts.items():
                most[path, call] = max(most[path, call], count)
            places += [(name, path, call, k) for (path, call), count in sorted(most.items()) for k in range(1, count + 1)]
        return places

    def _paths(self, arguments: str) -> set[str]:
        """Paths of the checkpoints in a call's arguments."""
        folders = "|".join(re.escape(str(folder)) for folder in self.folders)
        return set(re.findall(rf'["<]((?:{folders})(?:/[^">]*)?)[">]', arguments))

    def fail(self, place: Place, error: str) -> str:
        """Has one call fail; returns how that ended."""
        name, path, call, k = place
        shutil.rmtree(self.made, ignore_errors=True)
        inject = ["-o", str(self.log), "-P", path, "-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={k}"]
        ran = subprocess.run([*self.strace, *inject, *self.commands[name]], capture_output=True, text=True, errors="replace", check=False)
        if "INJECTED" not in self.log.read_text(errors="replace"):
            return "wasn't made"
        told = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
        # What isn't the caller's to read is bad input.
        codes = (3, 4) if error == "EACCES" else (4,)
        if ran.returncode not in codes or not any(Path(path).name in line for line in told):
            sys.exit(f"{name}: {call} {k} of {path} {error}: exit code {ran.returncode}: {ran.stderr}")
        return "said so"


def sweep(reading: Reading, count: int, rng: random.Random) -> None:
    """Has so many of all calls fail, each once; all of them if there are fewer."""
    places = reading.places()
    tally: collections.Counter[str] = collections.Counter()
    for place in rng.sample(places, min(count, len(places))):
        tally[reading.fail(place, rng.choice(ERRORS))] += 1
    ended = ", ".join(f"{what} {times}" for what, times in sorted(tally.items()))
    print(f"{sum(tally.values())} of {len(places)} calls that read, failed: {ended}", flush=True)
