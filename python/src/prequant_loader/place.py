"""Where a checkpoint is: a folder here, or a repository on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from .errors import PrequantError

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def local_folder(place: Path | str, revision: str | None = None) -> Path:
    """The folder of a checkpoint, after downloading what isn't in the hub's cache yet if it is on the hub.

    Args:
        place: a folder's path, or a repository as `owner/name`. A folder of that name here is taken first.
        revision: a branch, tag or commit; of repositories only.

    Raises:
        PrequantError: there is no such folder, and the hub gives no such repository.
    """
    folder = Path(place)
    if folder.exists() or not isinstance(place, str) or not _REPOSITORY.fullmatch(place):
        return folder
    try:
        return Path(snapshot_download(place, revision=revision))
    except Exception as error:  # of many kinds, from several packages, by version
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        at = f" at revision {revision!r}" if revision else ""
        found = f"no such folder is here, and the hub doesn't give it{at}: {reason}"
        way_out = "check the name, and that this machine is online and logged in (`hf auth login`) where the repository is private"
        raise PrequantError(place, "", found, "a folder, or a repository on the hub", way_out) from error
