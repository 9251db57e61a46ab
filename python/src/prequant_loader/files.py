"""Looking at files of a checkpoint that may be anything: what can't be looked at is an error, and not a file that isn't there."""

from __future__ import annotations

import errno
import json
import stat
from pathlib import Path
from typing import Any

MAX_JSON = 64 << 20
"""The most bytes of JSON that are read, as in `prequant`."""

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def is_file(path: Path) -> bool:
    """Whether a regular file is there, links followed. A pipe or a device isn't one: opening it could wait for ever.

    Raises:
        OSError: the system refuses to tell. `Path.is_file` would say no.
    """
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        if error.errno in _NOT_THERE:
            return False
        raise


def read_json(path: Path, most: int = MAX_JSON) -> Any:
    """What a JSON file says.

    Raises:
        ValueError: there is no such file, it has more than `most` bytes, or it isn't JSON.
        OSError: the system refuses to read it.
    """
    if not is_file(path):
        raise ValueError("it isn't there, or is no regular file")
    with path.open("rb") as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise ValueError(f"it has more than {most} bytes")
    return parse_json(text)


def parse_json(text: bytes) -> Any:
    """What JSON says.

    Raises:
        ValueError: it isn't JSON, or is nested too deep.
    """
    try:
        return json.loads(text.decode())  # strictly: of bytes Python takes UTF-16, and byte order marks
    except RecursionError:
        raise ValueError("it is nested too deep") from None
