"""Changes to files of checkpoints and staging folders: of their JSON, of safetensors headers, of their bytes, and of what kind of
thing they are. Each function draws from the generator that it is given alone, so that a seed makes the same change again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Pairs(list):
    """An object's keys with their values: unlike a dict it can have a key twice."""


class Raw(str):
    """JSON as it is to be written, whatever Python could make of it."""


DEEP = 20_000
NUMBERS = [0, 1, -1, 7, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 0.5, -0.0, 1e300]
TEXTS = ["", " ", ".", "..", "../secret", "/etc/passwd", "a/b/../../c", "C:\\x", "a\\b", "a\0b", "\x1b[2J\x1b]0;x\x07", "\u202egpj.exe", "\n",
         "line\nbreak", "BF16", "F8_E4M3", "I64", "model.safetensors", "prequant.json", "config.json", "model", "llama", "nf4", "é" * 300, "x" * 300,
         "x" * 100_000, "(", "(a+)+$", "lm_head", "$ref"]
RAWS = ["1" * 400, "1e999", "-1e999", "1E+400", "NaN", "Infinity", "01", "'x'", '"\\ud800"', '"\\u0000"', "[" * DEEP + "]" * DEEP,
        '{"a":' * DEEP + "1" + "}" * DEEP, "[" * DEEP, "[" + "0," * 50_000 + "0]", "{" + ",".join(f'"{i}":{i}' for i in range(20_000)) + "}", "tru", ""]


def dumps(value: Any) -> str:
    """JSON of a value that may have `Pairs` and `Raw` in it."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {dumps(inner)}" for key, inner in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dumps, value)) + "]"
    return json.dumps(value)


def hostile(rng: random.Random) -> Any:
    """A value that isn't meant."""
    return rng.choice([
        lambda: rng.choice(NUMBERS), lambda: rng.choice(TEXTS), lambda: Raw(rng.choice(RAWS)),
        lambda: rng.choice([None, True, False, [], Pairs(), [[]], [0], [None], Pairs([("", None)])]),
    ])()  # fmt: skip


def json_value(root: Any, rng: random.Random) -> Any:
    """Changes one place of a parsed JSON text."""
    if not isinstance(root, list) or not root or rng.random() < 0.02:
        return hostile(rng)
    holder = root
    while True:
        i = rng.randrange(len(holder))
        inner = holder[i][1] if isinstance(holder, Pairs) else holder[i]
        if not isinstance(inner, list) or not inner or rng.random() < 0.15:
            break
        holder = inner
    _change_entry(holder, i, inner, rng)
    return root


def _change_entry(holder: Any, i: int, inner: Any, rng: random.Random) -> None:
    """Changes an entry of an object or a list."""
    is_object = isinstance(holder, Pairs)
    put = (lambda value: holder.__setitem__(i, (holder[i][0], value))) if is_object else (lambda value: holder.__setitem__(i, value))
    other = rng.randrange(len(holder))
    ways: list[Callable[[], Any]] = [
        lambda: put(hostile(rng)),
        lambda: put(_near(inner, rng)),
        lambda: holder.pop(i),
        lambda: holder.insert(other, holder[i]),
        lambda: holder.__setitem__(slice(None), [*holder[:i], holder[other], *holder[i + 1 :]]),
    ]
    if is_object:
        key = holder[i][0]
        ways += [
            lambda: holder.append((key, hostile(rng))),
            lambda: holder.__setitem__(i, (rng.choice([*TEXTS, key + "x", key.upper(), holder[other][0]]), inner)),
            lambda: holder.append((rng.choice(TEXTS), inner)),
        ]
    rng.choice(ways)()


def _near(value: Any, rng: random.Random) -> Any:
    """Something that could be meant."""
    match value:
        case bool():
            return not value
        case int():
            return rng.choice([value + 1, value - 1, value * 2, value // 2, -value, value + 64])
        case float():
            return rng.choice([value * 2, -value, 0.0, int(value)])
        case str() if value:
            at = rng.randrange(len(value))
            return rng.choice([value[:at] + value[at + 1 :], value[:at] + rng.choice("0a./") + value[at + 1 :], value + value, value.upper()])
        case list():
            return rng.choice([value[:-1], value + value, value[::-1]])
    return hostile(rng)


def json_text(content: bytes, rng: random.Random) -> bytes:
    """Changes JSON: a place of what it says, or how it is written."""
    try:
        root = json.loads(content, object_pairs_hook=Pairs)
    except (ValueError, RecursionError):  # changed before
        return any_bytes(content, rng)
    if rng.random() < 0.75:
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            root = json_value(root, rng)
        return dumps(root).encode("utf-8", "surrogatepass")
    return rng.choice([
        lambda: b"\xef\xbb\xbf" + content, lambda: b"\xff\xfe" + content.decode().encode("utf-16-le"), lambda: content + b"x",
        lambda: content + content, lambda: content.rstrip()[:-1] + b",}", lambda: b" " * 100_000 + content, lambda: b"[" * DEEP + content,
        lambda: content.replace(b'"', b"'"), lambda: content[:-1] + b"\0", lambda: re.sub(rb"\d+", lambda found: found[0] * 30, content, count=1),
        lambda: any_bytes(content, rng),
    ])()  # fmt: skip


def any_bytes(content: bytes, rng: random.Random) -> bytes:
    """Changes bytes, whatever they are."""
    at = rng.randrange(len(content) + 1)
    end = min(len(content), at + rng.choice([1, 8, 100, 5000]))
    flipped = bytearray(content)
    if content:
        flipped[min(at, len(content) - 1)] ^= 1 << rng.randrange(8)
    return rng.choice([
        lambda: bytes(flipped), lambda: bytes(flipped), lambda: content[:at], lambda: content[:at] + content[end:], lambda: b"",
        lambda: content[:at] + bytes(end - at) + content[end:], lambda: content[:at] + rng.randbytes(8) + content[at:], lambda: bytes(len(content)),
        lambda: content + b"\0", lambda: content[:-1], lambda: rng.randbytes(rng.choice([1, 7, 8, 9, 1000])), lambda: content + content,
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 4976698672\n", lambda: b"<!DOCTYPE html><html></html>",
    ])()  # fmt: skip


def safetensors(content: bytes, rng: random.Random) -> bytes:
    """Changes a safetensors file: mostly what its header says."""
    if len(content) < 8 or rng.random() < 0.15:
        return any_bytes(content, rng)
    (length,) = struct.unpack_from("<Q", content)
    text, data = content[8 : 8 + length], content[8 + length :]
    if rng.random() < 0.12:
        wrong = rng.choice([0, 1, 2, length - 1, length + 1, length + 8, len(content) - 8, len(content), 99_999_999, 100_000_000, 100_000_001, 2**31, 2**63, 2**64 - 1])
        return struct.pack("<Q", wrong) + content[8:]
    try:
        header = json.loads(text, object_pairs_hook=Pairs)
        entries = [(name, entry) for name, entry in header if name != "__metadata__" and isinstance(entry, Pairs)]
    except (ValueError, TypeError, RecursionError):
        return any_bytes(content, rng)
    changed = header_text(text, header, entries, rng) if entries else json_text(text, rng)
    if rng.random() < 0.3:
        changed += b" " * rng.choice([-len(changed) % 8, 1, 1000])
    return struct.pack("<Q", len(changed)) + changed + data


def header_text(text: bytes, header: Pairs, entries: list[Any], rng: random.Random) -> bytes:
    """Changes a header: a tensor's name, dtype, shape or place, or any JSON."""
    (name, one), (other_name, other) = rng.choice(entries), rng.choice(entries)
    i = header.index((name, one))

    def field(key: str, change: Callable[[Any], Any]) -> None:
        one[:] = [(found, change(value) if found == key else value) for found, value in one]

    shape, place = dict(one).get("shape"), dict(one).get("data_offsets")
    ways: list[Callable[[], Any]] = [
        lambda: field("dtype", lambda _: rng.choice(["F16", "F32", "BF16", "F64", "I8", "U8", "BOOL", "I32", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64", "bf16", "", 7])),
        lambda: field("shape", lambda _: rng.choice([shape[::-1], [*shape, 1], [1, *shape], shape[1:], [shape[0] * 2, *shape[1:]], [0], [], [2**63, 2], [2**32, 2**32], [-1], [1.0], [2**64], Pairs(), "x", [1] * 5000])),
        lambda: field("data_offsets", lambda _: rng.choice([place[::-1], [place[0], place[0]], [place[0] + 1, place[1] + 1], [place[0], place[1] + 2], [place[0] - 2, place[1]], [0, 2**64 - 1], [2**64 - 2, 2**64 - 1], [-1, 1], [place[0]], [*place, place[1]], place[0], [0, 2**63]])),
        lambda: field("data_offsets", lambda _: dict(other)["data_offsets"]),
        lambda: header.__setitem__(i, (other_name, one)),
        lambda: header.__setitem__(i, (rng.choice([*TEXTS, name + ".", name.removesuffix(".weight"), name.replace("0", "1", 1), name.upper(), "_orig_mod." + name]), one)),
        lambda: header.__setitem__(slice(None), [(other_name, inner) if found == name else (name, inner) if found == other_name else (found, inner) for found, inner in header]),
        lambda: header.append((name, one)),
        lambda: header.pop(i),
        lambda: header.append((rng.choice(TEXTS), Pairs([("dtype", "BF16"), ("shape", [0]), ("data_offsets", [place[1], place[1]])]))),
        lambda: header.append(("__metadata__", rng.choice([None, [], Pairs([("format", 1)]), Pairs([("format", "pt"), ("format", "tf")]), Pairs([("a", "x" * 200_000)]), Pairs([("\x1b[2J", "\u202e")]) ]))),
        lambda: rng.shuffle(header),
    ]  # fmt: skip
    if rng.random() < 0.2:
        return json_text(text, rng)
    try:
        rng.choice(ways)()
    except (TypeError, IndexError, KeyError):  # of a field that isn't what it should be
        return json_text(text, rng)
    return dumps(header).encode("utf-8", "surrogatepass")


def record(content: bytes, rng: random.Random) -> bytes:
    """Changes a record of the staging folder, its hash too at times: see `sealed_as`."""
    body, _, _ = content.rpartition(b"\n")
    return rng.choice([any_bytes, json_text, lambda content, rng: json_text(body, rng) + content[len(body) :]])(content, rng)


def sealed_as(name: str, content: bytes) -> bytes:
    """A record with the hash that one of this name and content has."""
    digest = hashlib.sha256(name.encode() + b"\0" + hashlib.sha256(content).digest()).hexdigest()
    return content + b"\n" + digest.encode()


def thing(path: Path, victim: Path, rng: random.Random) -> str:
    """Puts something else in a file's place, or beside it; returns what."""
    content = path.read_bytes()
    beside = sorted(inner for inner in path.parent.iterdir() if inner.is_file() and inner != path)
    other = rng.choice(beside) if beside else None
    odd = path.parent / rng.choice(["a\nb.json", "\x1b[2J.txt", "\u202etxt.nimda", "y" * 255, "model.safetensors", "model-00009-of-00009.safetensors", "adapter_config.json", "x.py", ".hidden", "sub"])

    def replace(make: Callable[[], Any]) -> None:
        path.unlink()
        make()

    ways: dict[str, Callable[[], Any]] = {
        "is gone": path.unlink,
        "is a folder": lambda: replace(path.mkdir),
        "is a folder with the file": lambda: replace(lambda: (path.mkdir(), (path / path.name).write_bytes(content))),
        "is a pipe": lambda: replace(lambda: os.mkfifo(path)),
        "is a link to itself": lambda: replace(lambda: path.symlink_to(path.name)),
        "is a link to nothing": lambda: replace(lambda: path.symlink_to("nothing")),
        "is a link to zeros": lambda: replace(lambda: path.symlink_to("/dev/zero")),
        "is a link to a victim": lambda: replace(lambda: path.symlink_to(victim / "thesis.tex")),
        "is a link to a folder": lambda: replace(lambda: path.symlink_to(victim)),
        "is the victim's other name": lambda: replace(lambda: os.link(victim / "thesis.tex", path)),
        "is another's content": lambda: path.write_bytes(other.read_bytes() if other else b"x"),
        "has another's name": lambda: path.rename(other if other else path.with_name("x")),
        f"lies beside {odd.name!r}": lambda: odd.exists() or odd.write_bytes(content),
        f"is called {odd.name!r}": lambda: path.rename(odd) if not odd.is_dir() else path.unlink(),
        "lies beside a folder of its name and more": lambda: shutil.copytree(path.parent, path.with_name("copy"), symlinks=True),
    }  # fmt: skip
    what = rng.choice(sorted(ways))
    ways[what]()
    return what


def change(path: Path, victim: Path, rng: random.Random) -> str:
    """Changes a file by what it is; returns how."""
    if rng.random() < 0.12:
        return f"{path.name} {thing(path, victim, rng)}"
    content = path.read_bytes()
    in_staging = any(part.startswith(".prequant") for part in path.parts)
    for _ in range(9):  # some change nothing
        if path.suffix == ".safetensors" and not (in_staging and path.parent.name == "sealed"):
            changed, what = safetensors(content, rng), "a header"
        elif in_staging:
            changed, what = record(content, rng), "a record"
        elif path.suffix == ".json" and rng.random() < 0.8:
            changed, what = json_text(content, rng), "JSON"
        else:
            changed, what = any_bytes(content, rng), "bytes"
        if changed != content:
            break
    path.write_bytes(changed)
    return f"{path.name}: {what}, {len(content)} to {len(changed)} bytes"
