"""Changes to converted checkpoints as tests/data/mutations.json has them; tests/conformance/make/mutations.py says what each is."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

MANIFEST, SUMS = "prequant.json", "SHA256SUMS"


def apply(folder: Path, operations: list[list[Any]]) -> None:
    """Makes a case's changes."""
    for operation, *arguments in operations:
        OPERATIONS[operation](folder, *arguments)


def _new(folder: Path, file: str) -> Path:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write(folder: Path, file: str, text: str) -> None:
    _new(folder, file).write_bytes(text.encode())


def _append(folder: Path, file: str, text: str) -> None:
    (folder / file).write_bytes((folder / file).read_bytes() + text.encode())


def _flip(folder: Path, file: str, at: int, bit: int) -> None:
    content = bytearray((folder / file).read_bytes())
    content[at] ^= 1 << bit
    (folder / file).write_bytes(content)


def _truncate(folder: Path, file: str, length: int) -> None:
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[:length])


def _replace(folder: Path, file: str, old: str, new: str) -> None:
    content = (folder / file).read_bytes()
    assert old.encode() in content, f"{file} has no {old!r}"
    (folder / file).write_bytes(content.replace(old.encode(), new.encode(), 1))


def _edit(folder: Path, file: str, path: list[Any], change: Any) -> None:
    whole = json.loads((folder / file).read_text(encoding="utf-8"))
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    change(inner, path[-1])
    (folder / file).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def _set(folder: Path, file: str, path: list[Any], value: Any) -> None:
    _edit(folder, file, path, lambda inner, key: inner.__setitem__(key, value))


def _unset(folder: Path, file: str, path: list[Any]) -> None:
    _edit(folder, file, path, lambda inner, key: inner.__delitem__(key))


def _repeat(folder: Path, file: str, path: list[Any]) -> None:
    _edit(folder, file, path, lambda inner, key: inner.insert(key, inner[key]))


def _lines(folder: Path, file: str, how: str) -> None:
    lines = (folder / file).read_bytes().decode().removesuffix("\n").split("\n")
    text = {
        "reversed": "".join(f"{line}\n" for line in reversed(lines)),
        "doubled": "".join(f"{line}\n" for line in lines + lines[:1]),
        "crlf": "".join(f"{line}\r\n" for line in lines),
        "unended": "\n".join(lines),
    }[how]
    (folder / file).write_bytes(text.encode())


def _sums(folder: Path) -> None:
    text = (folder / MANIFEST).read_bytes()
    sums = {file["name"]: file["sha256"] for file in json.loads(text)["files"]}
    sums[MANIFEST] = hashlib.sha256(text).hexdigest()
    (folder / SUMS).write_bytes("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode())


def _seal(folder: Path, *more: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_bytes())
    if not isinstance(manifest, dict):
        return
    before = json.dumps(manifest)
    files = manifest["files"]
    if "more" in more:
        listed = {file["name"] for file in files} | {MANIFEST, SUMS}
        files += [{"name": path.name} for path in folder.iterdir() if path.name not in listed]
        files.sort(key=lambda file: file["name"])
    for file in files:
        path = folder / file["name"]
        if path.is_file():
            content = path.read_bytes()
            file |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if "tensors" in more:
        for tensor in manifest["tensors"]:
            for output in tensor["outputs"]:
                content = (folder / output["file"]).read_bytes()
                (length,) = struct.unpack_from("<Q", content)
                begin, end = json.loads(content[8 : 8 + length])[output["name"]]["data_offsets"]
                output["sha256"] = hashlib.sha256(content[8 + length + begin : 8 + length + end]).hexdigest()
    if json.dumps(manifest) != before:
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    _sums(folder)


OPERATIONS = {
    "write": _write,
    "append": _append,
    "flip": _flip,
    "truncate": _truncate,
    "remove": lambda folder, file: (folder / file).unlink(),
    "move": lambda folder, file, to: (folder / file).rename(folder / to),
    "copy": lambda folder, file, to: shutil.copyfile(folder / file, _new(folder, to)),
    "link": lambda folder, file, to: os.symlink(to, folder / file),
    "folder": lambda folder, file: (folder / file).mkdir(),
    "replace": _replace,
    "set": _set,
    "unset": _unset,
    "repeat": _repeat,
    "lines": _lines,
    "sums": _sums,
    "seal": _seal,
}
