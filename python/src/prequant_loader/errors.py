"""The one error type of this package."""

from __future__ import annotations

from pathlib import Path

from .terminal import plain


class PrequantError(ValueError):
    """A checkpoint that can't be loaded as what it says it is.

    The message is one sentence: the file, the tensor, what was found, what was expected, and the way out. What a terminal would
    obey in names is spelled out in it; the attributes are exact.

    Attributes:
        path: the file or folder.
        tensor: the tensor's name in the file; empty if the error is about more than one tensor.
    """

    def __init__(self, path: Path | str, tensor: str, found: str, expected: str, way_out: str) -> None:
        subject = f"{path}: tensor {tensor!r}" if tensor else f"{path}"
        super().__init__(plain(f"{subject}: {found}; expected {expected}; {way_out}"))
        self.path = Path(path)
        self.tensor = tensor
