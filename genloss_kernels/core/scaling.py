"""Scaling gradients in place by an upstream gradient, without asking the device what it is."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .backend import multiprocessors, traced
from .launch import launch
from .reduction import accumulator, kernel_dtype
from .row_plan import extent

_BLOCK, _WARPS = 2**12, 8

# To a multiprocessor, as many as it holds at once.
_PROGRAMS = 8


def scale_(tensors: Sequence[Tensor], factor: Tensor, *, triton: bool) -> None:
    """Multiply tensors whose elements share no memory by a number on their device; by 1 at the price of reading it."""
    tensors = [t for t in tensors if t.numel()]
    if not tensors:
        return
    if not triton:
        if factor.device.type != "cpu" or traced(factor) or float(factor) != 1.0:
            for tensor in tensors:
                tensor.mul_(factor)  # not first rounded to half precision, in which it may be infinite
        return
    from .scaling_kernel import _scale_kernel

    # Whose memory does not hold the number where it is lazily negated, or zero.
    factor = factor.clone() if factor._is_zerotensor() else factor.resolve_neg()
    # In the order of memory, gaps included.
    sizes = tuple(extent(t) or t.numel() for t in tensors)
    # As many as run at once, since mostly they have nothing to do but start.
    programs = min(sum(-(-size // _BLOCK) for size in sizes), _PROGRAMS * multiprocessors(factor.device))
    launch(
        _scale_kernel, programs, factor.device, tuple(tensors), sizes, programs, factor,
        DTYPE=kernel_dtype(accumulator(tensors[0].dtype)), BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip
