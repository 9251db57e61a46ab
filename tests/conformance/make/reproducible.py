"""What the generators share: numbers that are the same on every machine, and comparing a folder with a fresh one."""

from __future__ import annotations

import os

# Before torch is imported: sums and thread splits that don't depend on the machine's vector width or its cores.
os.environ["ATEN_CPU_CAPABILITY"] = "default"
os.environ["OMP_NUM_THREADS"] = "1"
# bitsandbytes compiles what it decodes odd lengths with: the same numbers, a minute later.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import filecmp
import logging
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

# Two warnings that an optional package, of no use here, isn't installed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)

ROOT = Path(__file__).resolve().parents[3]


def seeded(name: str) -> np.random.Generator:
    """A generator of its own for each name, so that adding a case leaves the others as they are."""
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def bell(rng: np.random.Generator, n: int) -> np.ndarray:
    """About standard normal, f64: twelve uniforms added up. Exact arithmetic only, so no libm decides a last bit."""
    total = np.full(n, -6.0)
    for _ in range(12):
        total += rng.random(n)
    return total


def main(folder: Path, make: Callable[[Path], None], description: str) -> None:
    """Runs a generator: writes `folder`, or with --check makes it anew under target/ and compares byte for byte."""
    arguments = sys.argv[1:]
    if arguments not in ([], ["--check"]):
        sys.exit(description)
    if not arguments:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(folder)
        report(folder)
        return

    fresh = ROOT / "target" / "check" / folder.name
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    make(fresh)
    names = sorted(
        {str(path.relative_to(base)) for base in (folder, fresh) for path in base.rglob("*") if path.is_file()}
    )
    wrong = [name for name in names if not same(folder / name, fresh / name)]
    for name in wrong:
        print(f"{folder / name}: differs from what the script makes now ({fresh / name})")
    if wrong:
        sys.exit(1)
    report(folder)


def same(left: Path, right: Path) -> bool:
    """Whether both files are there with the same bytes."""
    return left.is_file() and right.is_file() and filecmp.cmp(left, right, shallow=False)


def report(folder: Path) -> None:
    """One line on what the folder holds."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"{folder.relative_to(ROOT)}: {len(files)} files, {size:,} bytes")
