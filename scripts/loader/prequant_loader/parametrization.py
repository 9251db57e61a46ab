"""4-bit parameters of a model: bitsandbytes' own parametrization, and one for codes that lie otherwise than the parameter."""

from __future__ import annotations

import math
from typing import Any

import torch
from bitsandbytes.nn.parametrize import Bnb4bitParametrization, replace_parameter_4bit_prequantized
from torch import nn


class RelaidParametrization(Bnb4bitParametrization):
    """Decodes codes that aren't in the order of the parameter's elements.

    What is decoded has the quant_state's shape. Two cases:

    - `[experts, columns, rows]` for a parameter `[experts, rows, columns]`: rows and columns are exchanged.
    - `[experts, parts, padded]`: each expert is `parts` matrices in a row, and each matrix has blocks of its own, the last
      of which is filled up.
    """

    def __init__(self, quant_state: Any, shape: tuple[int, ...]) -> None:
        super().__init__(quant_state)
        self.shape = torch.Size(shape)
        """The parameter's shape."""

    @torch.no_grad()
    def forward(self, quantized_param: torch.Tensor) -> torch.Tensor:
        """The parameter, decoded, from its codes."""
        decoded = super().forward(quantized_param)
        if is_transposed(tuple(decoded.shape), tuple(self.shape)):
            return decoded.transpose(1, 2).contiguous()
        elements = math.prod(self.shape) // math.prod(decoded.shape[:2])
        return decoded[..., :elements].reshape(self.shape)


def is_transposed(stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a stored shape is the parameter's with the last two dimensions exchanged."""
    return len(shape) == 3 and stored == (shape[0], shape[2], shape[1])


def is_padded(stored: tuple[int, ...], shape: tuple[int, ...], block_size: int) -> bool:
    """Whether a stored shape is `[experts, parts, padded]`: equal parts of the parameter, each filled up to whole blocks."""
    if len(stored) != 3 or len(shape) != 3 or stored[0] != shape[0] or (shape[1] * shape[2]) % stored[1]:
        return False
    elements = shape[1] * shape[2] // stored[1]
    return elements % block_size != 0 and stored[2] == -(-elements // block_size) * block_size


def parametrize_4bit(
    module: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype, quant_state: dict[str, Any]
) -> None:
    """Makes the parameter `name` of `module`, which holds codes, one that is decoded when it is read.

    Args:
        module: the module, with codes (U8) as its parameter.
        name: the parameter.
        shape: the parameter's shape once it is decoded.
        dtype: what it is decoded to.
        quant_state: the statistics by name, as a file has them.
    """
    codes: torch.Tensor = getattr(module, name)
    replace_parameter_4bit_prequantized(module, name, quant_state, codes.device)
    steps: Any = getattr(module.parametrizations, name)
    steps[0].quant_state.dtype = dtype
    if tuple(steps[0].quant_state.shape) != tuple(shape):
        steps[0] = RelaidParametrization(steps[0].quant_state, shape)
