"""Kills conversions at random instants and compares what the next run makes of them with an uninterrupted one.

    scripts/crash-test [PREQUANT] [--kills 100] [--seed 1]

Each round starts a conversion, kills it (SIGKILL) after a random while, runs the same command again, kills that too now and
then, and lets the last one finish. Checks on the way that no killed run left what a loader takes for a checkpoint, and at
the end that every file is that of an uninterrupted run. Then, if it may mount a small file system (root, Linux), fills one:
the conversion must say so, keep what is finished, and go on once there is room. Needs Python alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "target" / "crash"
STAGING, DONE = ".prequant-staging", ".prequant-done"
WEIGHTS, SIDE = 64, 512


def main() -> int:
    """Runs the rounds; returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/crash-test", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prequant", nargs="?", type=Path, default=ROOT / "target" / "release" / "prequant")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    make_source(WORK / "source", rng)
    binary, source, whole = str(arguments.prequant.resolve()), str(WORK / "source"), WORK / "whole"
    flags = ["--quiet", "--max-shard-size", "1MB"]
    jobs = {
        "nf4": ([binary, "convert", source], flags),
        # Weights that share a scale lie in several of its files.
        "nvfp4": ([binary, "convert", source], [*flags, "--format", "nvfp4"]),
        "dequantize": ([binary, "dequantize", str(whole / "nf4")], flags),
    }
    for name, (command, flags) in jobs.items():
        start = time.perf_counter()
        subprocess.run([*command, str(whole / name), *flags], check=True)
        whole_run = time.perf_counter() - start
        kill(name, [*command, str(WORK / "converted"), *flags], digests(whole / name), whole_run, arguments, rng)
    disk_full(*jobs["nf4"], digests(whole / "nf4"))
    shutil.rmtree(WORK)
    return 0


def kill(
    name: str, run: list[str], expected: dict[str, str], whole_run: float, arguments: argparse.Namespace, rng: random.Random
) -> None:
    """Kills a command again and again, and has the next run go on."""
    kills = resumed = rounds = 0
    destination = WORK / "converted"
    while kills < arguments.kills:
        rounds += 1
        shutil.rmtree(destination, ignore_errors=True)
        while kills < arguments.kills:
            process = subprocess.Popen(run)
            time.sleep(rng.uniform(0, whole_run * 1.1))
            process.send_signal(signal.SIGKILL)
            if process.wait() == 0:
                break
            kills += 1
            if is_whole(destination, expected) and not (destination / STAGING).exists():
                break  # in its last instant: all is in place
            resumed += bool(list((destination / STAGING).glob("sealed/*.safetensors"))) if destination.exists() else 0
            check_not_a_checkpoint(destination, expected)
            if rng.random() < 0.7:
                break
        else:
            break
        # What came to its end has nothing to be done again; dequantize, which leaves no manifest, would refuse.
        if not is_whole(destination, expected) or (destination / STAGING).exists():
            subprocess.run(run, check=True)
        shutil.rmtree(destination / DONE, ignore_errors=True)
        differences = digests(destination).items() ^ expected.items()
        if differences:
            sys.exit(f"{name}, round {rounds}, seed {arguments.seed}: {sorted(differences)}")
    print(f"{name}: {kills} kills in {rounds} runs of {whole_run:.2f} s, {resumed} with files to go on from: same bytes")


def make_source(folder: Path, rng: random.Random, side: int = SIDE) -> None:
    """Square matrices of random bf16 numbers: all queries, all keys, all values and others; and a tokenizer."""
    folder.mkdir()
    header, begin, size = {}, 0, side * side * 2
    for i in range(WEIGHTS):
        module = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")[i * 4 // WEIGHTS]
        name = f"model.layers.{i % (WEIGHTS // 4)}.{module}.weight"
        header[name] = {"dtype": "BF16", "shape": [side, side], "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(WEIGHTS):
            # Any exponent but the highest, so that all are finite.
            file.write(bytes(byte & 0xBF if i % 2 else byte for i, byte in enumerate(rng.randbytes(size))))
    (folder / "config.json").write_text('{"model_type": "llama"}\n')
    (folder / "tokenizer.json").write_text("{}\n")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder and below."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def is_whole(folder: Path, expected: dict[str, str]) -> bool:
    """Whether a folder has what is put there last: the manifest, or config.json where there is none."""
    return (folder / ("prequant.json" if "prequant.json" in expected else "config.json")).exists()


def check_not_a_checkpoint(folder: Path, expected: dict[str, str]) -> None:
    """A folder that has what is put there last must be whole."""
    if is_whole(folder, expected):
        found = {name: digest for name, digest in digests(folder).items() if not name.startswith((STAGING, DONE))}
        if found != expected:
            sys.exit(f"a killed run left what looks whole beside {sorted(found.items() ^ expected.items())}")


def disk_full(command: list[str], flags: list[str], expected: dict[str, str]) -> None:
    """A file system that fills up while the conversion runs, and then has room."""
    mount = WORK / "small"
    mount.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount")
    options = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(mount)]
    if not mounted or subprocess.run(options, stderr=subprocess.DEVNULL, check=False).returncode:
        print("a full disk: skipped, as no file system can be mounted here")
        return
    try:
        ballast = mount / "ballast"
        run = [*command, str(mount / "converted"), *flags]
        ballast.write_bytes(bytes(12 * 2**20))
        refused = subprocess.run(run, capture_output=True, text=True, check=False)
        if refused.returncode != 4 or "no space" not in refused.stderr or (mount / "converted").exists():
            sys.exit(f"a disk without room: {refused}")
        for _ in range(50):
            # Room when it is asked for, and none a moment later.
            ballast.unlink(missing_ok=True)
            shutil.rmtree(mount / "converted", ignore_errors=True)
            process = subprocess.Popen([*run, "--threads", "1"], stderr=subprocess.PIPE, text=True)
            sealed = mount / "converted" / STAGING / "sealed"
            while process.poll() is None and not list(sealed.glob("*.safetensors")):
                time.sleep(0.0002)
            try:
                ballast.write_bytes(bytes(16 * 2**20))
            except OSError:
                pass  # it is full, as it should be
            message = process.communicate()[1]
            if process.returncode:
                break
        else:
            sys.exit("a disk that fills: the conversion was faster every time")
        kept = len(list(sealed.glob("*.safetensors")))
        if process.returncode != 4 or "make room" not in message or not kept:
            sys.exit(f"a disk that fills: exit code {process.returncode}, {kept} files kept, {message}")
        ballast.unlink()
        subprocess.run(run, check=True)
        if digests(mount / "converted") != expected:
            sys.exit("a disk that was full: other bytes")
        print(f"a full disk: said so, kept {kept} files, went on to the same bytes")
    finally:
        subprocess.run(["umount", str(mount)], check=True)


if __name__ == "__main__":
    raise SystemExit(main())
