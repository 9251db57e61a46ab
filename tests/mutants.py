"""Changes sources, converted checkpoints and staging folders in every way that mutators.py has, and runs prequant on them.

    scripts/mutate-test [PREQUANT] [--mutants 300] [--seed 1] [--only N]

Each mutant is one of a few checkpoints with a change or two, and what takes such a folder is run on it: convert, inspect, verify,
relayout, dequantize, or the command that was stopped. Every run must end within ten seconds, with a documented exit code and
without a panic, within the memory that it was promised, with nothing raw for the terminal and valid JSON where that was asked for.
A result that `verify` calls OK must be the one of the files as they were, or of files that are sound as far as Python can tell;
what was changed must be found, or refused, or have no part in the result. --only N makes mutant N again, keeps its folder and says
what was run. Needs Linux and Python alone; the mutants of staging folders need strace too.
"""

from __future__ import annotations

import argparse
import collections
import functools
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import mutators  # noqa: E402
from crash import DONE, STAGING, digests  # noqa: E402
from mutant_bases import DEFAULT_MEMORY, MANIFEST, SUMS, Base, Program, Ran, Wrong, commands_of, make_bases  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
IN_MEMORY = Path("/dev/shm")
MEMORY = 64 << 20
"""What conversions are allowed."""
DTYPES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
CODES = {"convert": {0, 2, 3, 4}, "dequantize": {0, 2, 3, 4}, "inspect": {0, 3, 4}, "verify": {0, 1, 2, 3, 4}}
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@dataclass
class Mutant:
    """A changed folder."""

    program: Program
    rng: random.Random
    folder: Path
    changes: list[str] = field(default_factory=list)
    ran: list[Ran] = field(default_factory=list)

    def run(self, *words: object, memory: int = DEFAULT_MEMORY) -> Ran:
        """Runs prequant and checks what holds of every run."""
        as_json = self.rng.random() < 0.3
        ran = self.program.run([str(word) for word in words] + ["--json"] * as_json, memory)
        self.ran.append(ran)
        if ran.code not in CODES[ran.words[0]]:
            raise Wrong(f"exit code {ran.code}")
        if "panicked" in ran.err or "defect of prequant" in ran.err + ran.out:
            raise Wrong("a panic")
        text = ran.err if as_json else ran.err + ran.out
        if found := RAW.search(text):
            raise Wrong(f"{found[0]!r} is told as it is")
        if as_json:
            told = json.loads(ran.out)
            if "error" in told and told["error"]["exit_code"] != ran.code:
                raise Wrong(f"JSON says {told['error']['exit_code']}")
        elif ran.code in (2, 3, 4) and "error: " not in ran.err:
            raise Wrong("an exit code without a word")
        return ran


def main() -> int:
    """Makes the mutants; returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/mutate-test", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prequant", nargs="?", type=Path, default=ROOT / "target" / "release" / "prequant")
    parser.add_argument("--mutants", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--only", type=int, help="make this mutant alone, and keep it")
    parser.add_argument("--report-only", action="store_true", help="go on after a failure")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="mutants.", dir=IN_MEMORY if IN_MEMORY.is_mount() else None))
    program = Program(str(arguments.prequant.resolve()), work)
    numbers = range(arguments.first, arguments.first + arguments.mutants) if arguments.only is None else [arguments.only]
    try:
        return make_all(program, numbers, arguments.seed, goes_on=arguments.report_only, shows=arguments.only is not None)
    finally:
        if arguments.only is None:
            shutil.rmtree(work)
        else:
            print(f"kept in {work}")


def make_all(program: Program, numbers: Sequence[int], seed: int, goes_on: bool, shows: bool) -> int:
    """Makes the mutants with these numbers; returns the exit code."""
    bases = make_bases(program)
    tally: collections.Counter[str] = collections.Counter()
    failed = 0
    for number in numbers:
        base = bases[number % len(bases)]
        mutant = make(program, base, f"{seed}/{number}")
        try:
            CHECKS[base.kind](base, mutant)
            check_victim(program)
        except (Wrong, ValueError) as wrong:
            failed += 1
            print(f"mutant {number} of seed {seed}, {base.name}: {'; '.join(mutant.changes)}: {wrong}", flush=True)
            for ran in mutant.ran:
                print(f"    {ran.code}: {' '.join(ran.words)}: {ran.err[-300:]}{ran.out[-200:] if ran.code else ''}")
            if not goes_on:
                return 1
        tally.update(f"{ran.words[0]} {ran.code}" for ran in mutant.ran)
        for ran in mutant.ran if shows else []:
            print(f"{ran.code}: {program.binary} {' '.join(ran.words)}\n{ran.err}{ran.out}")
    print(f"{len(numbers)} mutants, {failed} failed; ended with: " + ", ".join(f"{what} {times}" for what, times in sorted(tally.items())))
    return int(failed > 0)


def make(program: Program, base: Base, seed: str) -> Mutant:
    """A copy of the folder with a change or two."""
    rng = random.Random(seed)
    folder = program.work / "mutant"
    for left in (folder, program.work / "copy", program.work / "made"):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(base.folder, folder, symlinks=True)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    mutant = Mutant(program, rng, folder)
    for _ in range(rng.choice([1, 1, 1, 2])):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1)
        if base.kind == "stopped":
            files = [path for path in files if rng.random() < 0.1 or STAGING in path.parts] or files
        weighted = [path for path in files for _ in range(weight(path))]
        mutant.changes.append(mutators.change(rng.choice(weighted), program.work / "victim", rng))
    return mutant


def weight(path: Path) -> int:
    """How often a file is chosen."""
    if path.name in (MANIFEST, "config.json") or path.name.endswith(".index.json"):
        return 4
    return 4 if path.suffix == ".safetensors" else 1


def check_victim(program: Program) -> None:
    """What isn't a part of any checkpoint is as it was."""
    victim = program.work / "victim"
    if sorted(path.name for path in victim.iterdir()) != ["model.safetensors", "thesis.tex"] or (victim / "thesis.tex").read_text() != "precious\n":
        raise Wrong("the victim's files aren't as they were")


def check_source(base: Base, mutant: Mutant) -> None:
    """A source is refused, or what is made of it is what is in it."""
    made = mutant.program.work / "made"
    mutant.run("inspect", mutant.folder)
    if mutant.rng.random() < 0.3:
        mutant.run("convert", mutant.folder, made, "--dry-run", *base.flags, memory=DEFAULT_MEMORY)
    ran = mutant.run("convert", mutant.folder, made, *base.flags, "--memory", MEMORY, memory=MEMORY)
    if ran.code:
        if made.exists() and seen(made):
            raise Wrong(f"refused, and left {sorted(seen(made))}")
        return
    for check in (["verify", made], ["verify", made, "--against", mutant.folder]):
        if mutant.run(*check).code:
            raise Wrong("what was made isn't OK")
    check_is_of(mutant, json.loads((made / MANIFEST).read_text()), made)


def check_is_of(mutant: Mutant, manifest: dict, made: Path) -> None:
    """The files that a manifest names as its source are sound, and each of their tensors is accounted for."""
    used = {(source["file"], source["name"]): source for tensor in manifest["tensors"] for source in tensor["sources"]}
    out = {(left["name"], left.get("tensor")) for left in manifest.get("left_out", [])}
    for file in manifest["source"]["files"]:
        content = (mutant.folder / file["name"]).read_bytes()
        tensors = sound_header(content)
        data = 8 + struct.unpack_from("<Q", content)[0]
        for name, (dtype, shape, begin, end) in tensors.items():
            source = used.get((file["name"], name))
            is_shape = name.endswith("weight_shape")  # of codes, which is all that it is read for
            if source is None and (file["name"], name) not in out and not is_shape:
                raise Wrong(f"{name!r} of {file['name']} is nowhere")
            if source is not None and (source["dtype"], source["shape"]) != (dtype, shape):
                raise Wrong(f"{name!r} of {file['name']} is {dtype} {shape}, not {source}")
        for tensor in manifest["tensors"]:
            sources, outputs = tensor["sources"], tensor["outputs"]
            is_copy = tensor["decision"] == "keep" and len(sources) == len(outputs) == 1 and sources[0]["file"] == file["name"]
            if is_copy and sources[0]["dtype"] == outputs[0]["dtype"] and sources[0]["shape"] == outputs[0]["shape"]:
                _, _, begin, end = tensors[sources[0]["name"]]
                if hashlib.sha256(content[data + begin : data + end]).hexdigest() != outputs[0]["sha256"]:
                    raise Wrong(f"{sources[0]['name']!r} was copied, and isn't what it was")


def sound_header(content: bytes) -> dict[str, tuple[str, list[int], int, int]]:
    """The tensors of a safetensors file, by its specification.

    Raises:
        Wrong: it isn't sound, and was taken.
    """
    (length,) = struct.unpack_from("<Q", content)
    if length > 100_000_000 or 8 + length > len(content) or content[8:9] != b"{":
        raise Wrong(f"a header of {length} bytes was taken")
    header = json.loads(content[8 : 8 + length], object_pairs_hook=mutators.Pairs)
    names = [name for name, _ in header]
    if len(set(names)) != len(names):
        raise Wrong("a header with a name twice was taken")
    tensors, at = {}, 0
    places = sorted((dict(entry)["data_offsets"], name, dict(entry)) for name, entry in header if name != "__metadata__")
    for (begin, end), name, entry in places:
        size = DTYPES.get(entry["dtype"])
        for dimension in entry["shape"]:
            size = None if size is None else size * dimension
        if begin != at or end < begin or size not in (None, end - begin):
            raise Wrong(f"{name!r}: {entry} was taken")
        at = end
        tensors[name] = (entry["dtype"], entry["shape"], begin, end)
    if 8 + length + at != len(content):
        raise Wrong("a file that its tensors don't fill was taken")
    return tensors


def load_file_class() -> object:
    """The table of which files clients load."""
    spec = importlib.util.spec_from_file_location("file_class", ROOT / "python/src/prequant_loader/file_class.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.is_loaded


IS_LOADED = load_file_class()


def contents(folder: Path) -> dict[str, str]:
    """What is at every path below a folder, whatever it is."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif not path.is_dir():
            found[name] = "no file"
    return found


def loaded(found: dict[str, str]) -> dict[str, str]:
    """Those that clients load."""
    return {name: what for name, what in found.items() if IS_LOADED(name)}


def check_converted(base: Base, mutant: Mutant) -> None:
    """A changed checkpoint is told to be, and nothing else is made of it than of the checkpoint as it was."""
    forged = mutant.rng.random() < 0.3 and forge(mutant)
    before, now = loaded(contents(base.folder)), loaded(contents(mutant.folder))
    if forged:  # as Python writes JSON; and SHA256SUMS says the same
        before, now = ({**found, MANIFEST: meaning(folder), SUMS: ""} for found, folder in ((before, base.folder), (now, mutant.folder)))
    is_changed = now != before
    # What SHA256SUMS says of files for people is as they are themselves.
    either = {name for name, _ in now.items() ^ before.items()} == {SUMS} and sums_of_loaded(mutant.folder) == sums_of_loaded(base.folder)
    quick = ["--quick"] * (mutant.rng.random() < 0.2)
    verified = mutant.run("verify", mutant.folder, *quick)
    if is_changed and not verified.code and not forged and not quick and not either:
        raise Wrong("verify finds nothing")
    if not is_changed and verified.code:
        raise Wrong("verify finds what no client loads")
    against = mutant.run("verify", mutant.folder, "--against", base.source)
    # Python writes some numbers otherwise into a forged manifest.
    if is_changed != bool(against.code) and not either and not is_of_another(mutant) and (is_changed or not forged):
        raise Wrong(f"verify --against ends with {against.code}")
    mutant.run("inspect", mutant.folder)
    for command in commands_of(base):
        made = mutant.program.work / "made"
        shutil.rmtree(made, ignore_errors=True)
        ran = mutant.run(command[0], mutant.folder, made, *command[1:], "--memory", MEMORY, memory=MEMORY)
        if ran.code:
            if made.exists() and seen(made):
                raise Wrong(f"refused, and left {sorted(seen(made))}")
            continue
        different = dict(set(digests(made).items()) ^ set(base.expected[" ".join(command)].items()))
        if len(loaded(different)) < len(different):
            different.pop(SUMS, None)  # it has the hashes of files for people, too
            different.pop(MANIFEST, None)
        if not forged and (mutant.folder / MANIFEST).is_file() and loaded(different):
            raise Wrong(f"{command[0]} gives other files: {sorted(different)}")


def meaning(folder: Path) -> str:
    """What a manifest says of all that clients load."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["files"] = [file for file in manifest["files"] if IS_LOADED(file["name"])]
    return json.dumps(manifest)


def sums_of_loaded(folder: Path) -> set[bytes] | None:
    """What SHA256SUMS says of files that clients load."""
    path = folder / SUMS
    if not path.is_file():
        return None
    return {line for line in path.read_bytes().split(b"\n") if IS_LOADED(line.partition(b"  ")[2].decode(errors="replace"))}


def is_of_another(mutant: Mutant) -> bool:
    """Whether the manifest says that another version wrote the checkpoint, whose text can be another."""
    try:
        return json.loads((mutant.folder / MANIFEST).read_bytes())["tool"] != {"name": "prequant", "version": version(mutant.program.binary)}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


@functools.cache
def version(binary: str) -> str:
    """That of the program."""
    return subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]


def forge(mutant: Mutant) -> bool:
    """Has manifest and SHA256SUMS say what the files are now, as far as there is a manifest; whether there is."""
    path = mutant.folder / MANIFEST
    if not path.is_file():  # a link to zeros has no end
        return False
    try:
        manifest = json.loads(path.read_bytes())
        for file in manifest["files"]:
            if (mutant.folder / file["name"]).is_file():
                content = (mutant.folder / file["name"]).read_bytes()
                file |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        text = (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()
        sums = {file["name"]: file["sha256"] for file in manifest["files"]} | {MANIFEST: hashlib.sha256(text).hexdigest()}
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        if (mutant.folder / SUMS).is_file():
            for name, content in ((MANIFEST, text), (SUMS, lines.encode())):
                (mutant.folder / name).unlink()  # which may be a link, or the victim's other name
                (mutant.folder / name).write_bytes(content)
            mutant.changes.append("forged")
            return True
    except (OSError, ValueError, LookupError, TypeError, RecursionError, AttributeError):
        pass
    return False


def check_stopped(base: Base, mutant: Mutant) -> None:
    """The command that was stopped ends with what it should, or refuses and leaves all as it is."""
    resealed = reseal(mutant)
    words = [word.format(mutant.folder) for word in base.command]
    for more in ([], ["--restart"], ["--restart", "--force"]):
        before = seen(mutant.folder)
        ran = mutant.run(*words, *more, "--memory", MEMORY, memory=MEMORY)
        found = seen(mutant.folder)
        if ran.code == 0:
            different = set(found.items()) ^ set(base.expected["convert"].items())
            if different and not resealed and not all("victim" in what or name not in base.expected["convert"] for name, what in different):
                raise Wrong(f"it ends with other files: {sorted(different)}")
            return
        if ran.code == 3 and found != before and not set(found) < set(before) | set(base.expected["convert"]):
            raise Wrong(f"refused, and changed {sorted(set(found.items()) ^ set(before.items()))}")


def seen(folder: Path) -> dict[str, str]:
    """What a client sees."""
    return {name: what for name, what in contents(folder).items() if not name.startswith((STAGING, DONE))}


def reseal(mutant: Mutant) -> bool:
    """Gives changed records the hash of what they are now, at times."""
    resealed = False
    if mutant.rng.random() < 0.3:
        for path in sorted((mutant.folder / STAGING).rglob("*")):
            is_record = path.parent.name == "sealed" or path.name in ("job", "publishing", "replacing")
            if is_record and path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1:
                content = path.read_bytes()
                sealed = mutators.sealed_as(path.name, content.rpartition(b"\n")[0])
                if sealed != content:
                    path.write_bytes(sealed)
                    resealed = True
    if resealed:
        mutant.changes.append("resealed")
    return resealed


CHECKS = {"source": check_source, "converted": check_converted, "stopped": check_stopped}


if __name__ == "__main__":
    raise SystemExit(main())
