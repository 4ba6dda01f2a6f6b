"""Reductions and the dtypes that results take."""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor

from .launch import REDUCTION_TILE, launch
from .warning import warn


class Reduction(enum.IntEnum):
    NONE = 0
    MEAN = 1
    SUM = 2
    BATCHMEAN = 3
    SAMPLE = 4  # one result for each index of dimension 0


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kernel_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of a dtype of arithmetic."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def autocasting(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def loss_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of a loss: the operands', or fp32 under autocast, where torch too computes losses in fp32."""
    if dtype in (torch.float16, torch.bfloat16) and autocasting(device):
        return torch.float32
    return dtype


def parse_reduction(reduction: str, size_average: bool | None, reduce: bool | None) -> str:
    """torch's rules for its two deprecated arguments, with its warning."""
    if size_average is None and reduce is None:
        return reduction
    size_average = True if size_average is None else size_average
    reduce = True if reduce is None else reduce
    chosen = ("mean" if size_average else "sum") if reduce else "none"
    if not torch.compiler.is_compiling():  # which traces no warning
        warn(f"size_average and reduce are deprecated, please use reduction={chosen!r} instead.")
    return chosen


def launch_reduction(
    partials: tuple[Tensor | None, ...],
    outputs: tuple[Tensor | None, ...],
    n: int,
    dtype: torch.dtype,
    *,
    divisor: Tensor | float = 1.0,
    by_normalizer: bool = False,
) -> None:
    """Add up ``n`` partial losses, normalisers and counts into ``outputs``, and divide the loss."""
    from .reduction_kernel import _reduction_kernel

    device = next(t.device for t in outputs if t is not None)
    launch(
        _reduction_kernel,
        1,
        device,
        partials,
        outputs,
        divisor if isinstance(divisor, Tensor) else None,
        n,
        1.0 if isinstance(divisor, Tensor) else divisor,
        BY_NORMALIZER=by_normalizer,
        DTYPE=kernel_dtype(dtype),
        BLOCK=REDUCTION_TILE.block,
        num_warps=REDUCTION_TILE.num_warps,
    )
