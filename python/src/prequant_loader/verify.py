"""Verifies a folder against its manifest, as `prequant verify` does: all that clients load must be as it was written.

Files are read piece by piece. The manifest is held in memory as Python has it, about four times its size.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.utils.hub import cached_file

from .differences import CONFIG, DOWNLOAD_AGAIN, INDEX, Difference, Differences
from .errors import PrequantError
from .files import is_file
from .manifest import MANIFEST
from .place import local_folder

VARIABLE = "PREQUANT_VERIFY"
"""Set to 1, every load verifies what it is about to load first, against the manifest."""


@dataclass(frozen=True)
class Verified:
    """What was found right."""

    files: int
    size: int
    """Bytes of all files together."""
    edited: tuple[Difference, ...] = ()
    """What differs in files that no client loads, such as README.md."""


def verify(checkpoint: Path | str, *, revision: str | None = None, strict: bool = False) -> Verified:
    """Compares a checkpoint with the manifest that prequant wrote beside it: every file and tensor, and nothing else.

    Args:
        checkpoint: a folder that `prequant convert` wrote, or a repository on the hub, `owner/name`, whose files are downloaded if they
            aren't in the hub's cache.
        revision: a branch, tag or commit of the repository.
        strict: whether files that no client loads, such as README.md, must be unchanged too.

    Raises:
        PrequantError: there is no such checkpoint, or no manifest; or the first difference, damage before edits.
    """
    folder = local_folder(checkpoint, revision)
    found = Differences(folder).find()
    damage = [difference for difference in found.all if strict or difference.is_damage]
    if damage:
        first, more = damage[0], f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        raise PrequantError(folder / first.file, first.tensor, f"{first.what}{more}", "what was written", DOWNLOAD_AGAIN)
    return Verified(found.files, found.size, tuple(found.all))


def differences(checkpoint: Path | str, *, revision: str | None = None) -> list[Difference]:
    """Everything in which a checkpoint differs from its manifest, damage first.

    Args:
        checkpoint, revision: as for `verify`.

    Raises:
        PrequantError: there is no such checkpoint, or no manifest.
    """
    return Differences(local_folder(checkpoint, revision)).find().all


def verify_if_asked(files: Sequence[str]) -> None:
    """Verifies what is about to be loaded, if the environment variable PREQUANT_VERIFY is 1.

    Damage is an error; but for weights, index and config.json, files may be missing, as they are where transformers has downloaded what
    it needs. What was edited in files that no client loads is warned of. The manifest of a repository on the hub is fetched.

    Args:
        files: the weights.
    """
    if os.environ.get(VARIABLE) != "1":
        return
    folder = Path(files[0]).parent
    if not is_file(folder / MANIFEST) and not _fetch_manifest(folder):
        warnings.warn(f"{VARIABLE} is 1, and {folder} has no {MANIFEST}: nothing was verified", stacklevel=2)
        return
    differences = Differences(folder)
    listed = differences.names()
    for file in map(Path, files):
        if file.parent != folder or file.name not in listed:
            raise PrequantError(file, "", "it is about to be loaded", f"a file that {MANIFEST} lists", DOWNLOAD_AGAIN)
    needed = {Path(file).name for file in files} | {CONFIG, MANIFEST} | ({INDEX} if len(files) > 1 else set())
    found = [each for each in differences.find().all if each.file in needed or os.path.lexists(folder / each.file)]
    for difference in found:
        if difference.is_damage:
            path, what = folder / difference.file, difference.what
            raise PrequantError(path, difference.tensor, what, "what was written", DOWNLOAD_AGAIN)
    if found:
        edited = ", ".join(sorted({difference.file for difference in found}))
        warnings.warn(f"{folder}: what is loaded is as it was written; edited since: {edited}", stacklevel=2)


def _fetch_manifest(folder: Path) -> bool:
    """Downloads the manifest that belongs to what is in the hub's cache; tells whether there is one."""
    snapshot = next((path for path in (folder, *folder.parents) if path.parent.name == "snapshots"), None)
    repository = snapshot.parents[1] if snapshot is not None else folder
    if snapshot is None or not repository.name.startswith("models--"):
        return False
    name = repository.name.removeprefix("models--").replace("--", "/")
    found = cached_file(
        name,
        f"{folder.relative_to(snapshot) / MANIFEST}",
        revision=snapshot.name,
        cache_dir=repository.parent,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found is not None and Path(found).parent == folder
