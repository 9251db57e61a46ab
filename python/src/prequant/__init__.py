"""The Python side of prequant, under the name of the program: what `prequant_loader` has, and nothing else.

    import prequant
    prequant.verify("owner/Qwen3-30B-A3B-nf4")

Importing it makes 4-bit checkpoints load with plain `from_pretrained`, as importing `prequant_loader` does.
"""

from __future__ import annotations

from prequant_loader import (
    Difference,
    PrequantError,
    PrequantQuantizer,
    Verified,
    __version__,
    differences,
    fix_peft,
    install,
    installed,
    uninstall,
    verify,
)

__all__ = [
    "Difference",
    "PrequantError",
    "PrequantQuantizer",
    "Verified",
    "__version__",
    "differences",
    "fix_peft",
    "install",
    "installed",
    "uninstall",
    "verify",
]
