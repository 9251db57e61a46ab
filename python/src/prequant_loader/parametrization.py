"""4-bit parameters of a model: bitsandbytes' own parametrization, and one for codes that lie otherwise than the parameter."""

from __future__ import annotations

import math
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn.parametrize import Bnb4bitParametrization, replace_parameter_4bit_prequantized
from torch import nn
from torch.nn.utils import parametrize


class RelaidParametrization(Bnb4bitParametrization):
    """Decodes codes that bitsandbytes' own parametrization can't make the parameter of.

    What is stored has the quant_state's shape. Three cases:

    - `[experts, columns, rows]` for a parameter `[experts, rows, columns]`: rows and columns are exchanged.
    - `[experts, parts, padded]`: each expert is `parts` matrices in a row, and each matrix has blocks of its own, the last
      of which is filled up.
    - The parameter's own shape, in blocks that go on from row to row: bitsandbytes 0.49 and 0.50 take the wrong scales for
      them on the CPU.
    """

    def __init__(self, quant_state: QuantState, shape: tuple[int, ...]) -> None:
        super().__init__(quant_state)
        self.shape = torch.Size(shape)
        """The parameter's shape."""

    @torch.no_grad()
    def forward(self, quantized_param: torch.Tensor) -> torch.Tensor:
        """The parameter, decoded, from its codes."""
        decoded = dequantize_4bit(quantized_param, _in_rows_of_blocks(self.quant_state))
        return relaid(decoded.reshape(self.quant_state.shape), self.shape)


def relaid(decoded: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A parameter of this shape, from its values in the shape that they are stored in."""
    stored = tuple(decoded.shape)
    if stored == tuple(shape):
        return decoded
    if is_transposed(stored, tuple(shape)):
        return decoded.transpose(1, 2).contiguous()
    elements = math.prod(shape) // math.prod(stored[:2])
    return decoded[..., :elements].reshape(shape)


def _in_rows_of_blocks(state: QuantState) -> QuantState:
    """The same codes as a matrix with a block, or all of them, in a row."""
    elements = math.prod(state.shape)
    rows = elements // state.blocksize if elements % state.blocksize == 0 else 1
    return QuantState(
        absmax=state.absmax,
        shape=torch.Size((rows, elements // rows)),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
        offset=state.offset,
        state2=state.state2,
    )


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
    codes: torch.Tensor = getattr(module, name).requires_grad_(False)  # which is true for codes that are stored as floats
    replace_parameter_4bit_prequantized(module, name, quant_state, codes.device)
    steps: Any = getattr(module.parametrizations, name)
    state: QuantState = steps[0].quant_state
    state.dtype = dtype
    if tuple(state.shape) != tuple(shape) or shape[-1] % state.blocksize:
        steps[0] = RelaidParametrization(state, shape)


@torch.no_grad()
def decode(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Makes ordinary parameters of a module's 4-bit ones, in the order in which they were made 4-bit.

    Args:
        module: any module; its submodules are left alone.
        dtype: of the parameters; that of the decoded values if None.
    """
    steps: Any = getattr(module, "parametrizations", {})
    for name in [name for name, chain in steps.items() if isinstance(chain[0], Bnb4bitParametrization)]:
        value: torch.Tensor = getattr(module, name).to(dtype)
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        delattr(module, name)
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))
