"""Verifies a folder against its manifest, as `prequant verify` does: all that clients load must be as it was written.

Files are read piece by piece. The manifest is held in memory as Python has it, about four times its size.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .differences import DOWNLOAD_AGAIN, Difference, Differences
from .errors import PrequantError
from .files import is_file
from .manifest import MANIFEST

VARIABLE = "PREQUANT_VERIFY"
"""Set to 1, every load of a folder with a manifest verifies it first."""


@dataclass(frozen=True)
class Verified:
    """What was found right."""

    files: int
    size: int
    """Bytes of all files together."""
    edited: tuple[Difference, ...] = ()
    """What differs in files that no client loads, such as README.md."""


def verify(folder: Path | str, *, strict: bool = False) -> Verified:
    """Compares a checkpoint with the manifest that prequant wrote beside it: every file and tensor, and nothing else.

    Args:
        folder: what `prequant convert` wrote.
        strict: whether files that no client loads, such as README.md, must be unchanged too.

    Raises:
        PrequantError: there is no manifest, or the first difference, damage before edits.
    """
    folder = Path(folder)
    found = Differences(folder).find()
    damage = [difference for difference in found.all if strict or difference.is_damage]
    if damage:
        first, more = damage[0], f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        raise PrequantError(folder / first.file, first.tensor, f"{first.what}{more}", "what was written", DOWNLOAD_AGAIN)
    return Verified(found.files, found.size, tuple(found.all))


def differences(folder: Path | str) -> list[Difference]:
    """Everything in which a checkpoint differs from its manifest, damage first.

    Raises:
        PrequantError: there is no manifest.
    """
    return Differences(Path(folder)).find().all


def verify_if_asked(folder: Path, files: Iterable[str] = ()) -> None:
    """Verifies a folder if the environment variable PREQUANT_VERIFY is 1 and there is a manifest.

    Args:
        folder: the checkpoint.
        files: what is about to be loaded: nothing but what the manifest lists.
    """
    if os.environ.get(VARIABLE) != "1" or not is_file(folder / MANIFEST):
        return
    verify(folder)
    listed = Differences(folder).names()
    for file in map(Path, files):
        if file.parent != folder or file.name not in listed:
            raise PrequantError(file, "", "it is about to be loaded", f"a file that {MANIFEST} lists", DOWNLOAD_AGAIN)
