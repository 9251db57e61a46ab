"""Verifies a folder against its manifest: every file that it names, by size and SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .errors import PrequantError

MANIFEST = "prequant.json"
VARIABLE = "PREQUANT_VERIFY"
"""Set to 1, every load of a folder with a manifest verifies it first."""

SCHEMA_VERSIONS = (1, 2)
"""What is read of a manifest is the same in both."""
DOWNLOAD_AGAIN = "download or convert it again"


@dataclass(frozen=True)
class Verified:
    """What was found right."""

    files: int
    size: int
    """Bytes of all files together."""


def verify(folder: Path | str) -> Verified:
    """Compares every file of a checkpoint with the manifest that prequant wrote beside it.

    Args:
        folder: what `prequant convert` wrote.

    Raises:
        PrequantError: there is no manifest, or the first file that isn't there, or has another size or hash.
    """
    folder = Path(folder)
    records = _records(folder)
    for name, (size, _) in records.items():
        _check_size(folder / name, size)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda name: _sha256(folder / name), records)
        for (name, (_, expected)), digest in zip(records.items(), digests, strict=True):
            if digest != expected:
                found = f"its SHA-256 is {digest}"
                raise PrequantError(folder / name, "", found, f"{expected}, as {MANIFEST} says", DOWNLOAD_AGAIN)
    return Verified(len(records), sum(size for size, _ in records.values()))


def verify_if_asked(folder: Path) -> None:
    """Verifies a folder if the environment variable PREQUANT_VERIFY is 1 and there is a manifest."""
    if os.environ.get(VARIABLE) == "1" and (folder / MANIFEST).is_file():
        verify(folder)


def _records(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of every file, by name."""
    path = folder / MANIFEST
    if not path.is_file():
        raise PrequantError(path, "", "it does not exist", "the manifest that prequant writes", DOWNLOAD_AGAIN)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["schema_version"]
        records = {file["name"]: (int(file["size"]), str(file["sha256"])) for file in manifest["files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise PrequantError(path, "", f"it can't be read ({error})", "a manifest", DOWNLOAD_AGAIN) from None
    if version not in SCHEMA_VERSIONS:
        expected = " or ".join(map(str, SCHEMA_VERSIONS))
        raise PrequantError(path, "", f"its schema_version is {version}", expected, "update prequant-loader")
    for name in records:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise PrequantError(path, "", f"it names {name!r}", "files of its own folder", DOWNLOAD_AGAIN)
    return records


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise PrequantError(path, "", "it does not exist", f"{size} bytes, as {MANIFEST} says", DOWNLOAD_AGAIN)
    found = path.stat().st_size
    if found != size:
        raise PrequantError(path, "", f"it has {found} bytes", f"{size}, as {MANIFEST} says", DOWNLOAD_AGAIN)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
