"""Few elements of half precision on a CPU, which torch's own operators take after one cast to fp32 of the whole."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from .reduction import loss_dtype

# From this many elements on, writing whole operands in fp32 costs more than calling operators for each block.
WIDE_BELOW = 2**17

_HALF = (torch.float16, torch.bfloat16)

_Operand = TypeVar("_Operand", Tensor, "Tensor | None")


def few(tensor: Tensor, limit: float) -> bool:
    """Whether a CPU's operators on all of ``tensor`` cost less than ours: below ``limit``, and once cast ``WIDE_BELOW``."""
    if tensor.device.type != "cpu":
        return False
    if tensor.dtype in _HALF:
        # A comparison would bind a compiled program to sizes.
        return not torch.compiler.is_compiling() and tensor.numel() < min(limit, WIDE_BELOW)
    return tensor.numel() < limit and tensor.dtype in (torch.float32, torch.float64)


def wide(tensor: _Operand) -> _Operand:
    """``tensor`` in the dtype of arithmetic; its gradient is rounded once, on the way back."""
    return tensor.float() if tensor is not None and tensor.dtype in _HALF else tensor


def narrow(loss: Tensor, dtype: torch.dtype) -> Tensor:
    """The loss that was computed of ``wide`` operands, in the dtype that those of ``dtype`` give."""
    return loss if loss.dtype == dtype else loss.to(loss_dtype(dtype, loss.device))
