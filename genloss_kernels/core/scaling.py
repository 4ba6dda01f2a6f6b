"""Scaling gradients in place by an upstream gradient, without asking the device what it is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from .backend import traced
from .launch import launch
from .reduction import accumulator, kernel_dtype

_BLOCK, _WARPS = 2**12, 8


def scale_(tensors: Sequence[Tensor], factor: Tensor, *, triton: bool) -> None:
    """Multiply contiguous tensors, empty ones apart, by a number on their device; by 1 at the price of reading it."""
    tensors = [t for t in tensors if t.numel()]
    if not tensors:
        return
    if not triton:
        if factor.device.type != "cpu" or traced(factor) or float(factor) != 1.0:
            for tensor in tensors:
                tensor.mul_(factor)  # not first rounded to half precision, in which it may be infinite
        return
    from .scaling_kernel import _scale_kernel

    sizes = tuple(t.numel() for t in tensors)
    ends = tuple(accumulate(-(-size // _BLOCK) for size in sizes))
    launch(
        _scale_kernel, ends[-1], factor.device, tuple(tensors), sizes, ends, factor,
        DTYPE=kernel_dtype(accumulator(tensors[0].dtype)), BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip
