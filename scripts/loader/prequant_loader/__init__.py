"""Loads pre-quantized 4-bit checkpoints, Mixture-of-Experts ones above all, with plain `from_pretrained`.

    import prequant_loader  # this is all
    model = AutoModelForCausalLM.from_pretrained("Qwen3-30B-A3B-nf4")
"""

from __future__ import annotations

from .errors import PrequantError
from .quantizer import PrequantQuantizer, install
from .verify import Verified, verify

__all__ = ["PrequantError", "PrequantQuantizer", "Verified", "install", "verify"]
__version__ = "0.1.0"

install()
