"""Loads pre-quantized 4-bit checkpoints, Mixture-of-Experts ones above all, with plain `from_pretrained`.

    import prequant_loader  # this is all
    model = AutoModelForCausalLM.from_pretrained("Qwen3-30B-A3B-nf4")
"""

from __future__ import annotations

from .differences import Difference
from .errors import PrequantError
from .quantizer import PrequantQuantizer, install, installed, uninstall
from .verify import Verified, differences, verify

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
__version__ = "0.1.0"


def fix_peft() -> None:
    """Mends PEFT's `target_parameters` for 4-bit experts; see `prequant_loader.peft`. A second call does nothing.

    Raises ImportError without PEFT, and RuntimeError, changing nothing, if its version isn't one the fixes were tried on.
    """
    try:
        import peft as _  # noqa: F401  not needed to load a checkpoint
    except ModuleNotFoundError as error:
        raise ImportError("fix_peft needs PEFT: pip install 'prequant-loader[peft]'") from error
    from .peft import fix_peft as apply

    apply()


install()
