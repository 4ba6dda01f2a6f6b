"""How linear cross entropy cuts its batch; torch's options, on every torch, and two more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...core import checks, tuned
from ...core.reduction import accumulator

# Rows at a time. On a GPU fewer would read the whole weight and write its gradient too often for the products to hide it;
# on a CPU more would not be faster, and takes more memory.
DEFAULT_ROWS = {"cuda": 4096, "cpu": 256}

# In place of a number of rows: the device's own, which only operators look up, since compilers see through the rest.
BY_DEVICE = 0

# Up to here a batch may be one chunk.
WHOLE_BATCH = 256

_ACC_POLICIES = ("auto", "accurate", "balanced", "compact")


@dataclass(frozen=True)
class LinearCrossEntropyOptions:
    """Those of ``torch.nn.LinearCrossEntropyOptions``, on every torch, and two more.

    Args:
        allow_retain_graph: accepted for torch's sake; a second backward always works.
        batch_chunk_size: rows of logits at a time.
        chunking_method: torch's ``"auto"``, ``"aspect_ratio"``, ``"aspect_ratio:N"`` or None; validated, and a hint only.
        acc_policy: torch's ``"auto"``, ``"accurate"``, ``"balanced"`` or ``"compact"``; validated, and a hint only.
        acc_dtype: dtype in which the gradients of weight and bias are summed over chunks: fp32 (fp64 for fp64) if None. Half
            precision takes its own dtype too, which halves that sum's memory and rounds it once a chunk.
        memory_budget: bytes that a chunk's logits and their gradient may take; chooses the rows of a chunk.
        gather_rows: drop the ignored rows before the products, at the price of one synchronisation with the device.

    Raises:
        ValueError: an option has a value that it does not accept.
    """

    allow_retain_graph: bool = False
    batch_chunk_size: int | None = None
    chunking_method: str | None = "auto"
    acc_policy: str = "auto"
    acc_dtype: torch.dtype | None = None
    memory_budget: int | None = None
    gather_rows: bool = False

    def __post_init__(self) -> None:
        if self.acc_policy not in _ACC_POLICIES:
            raise ValueError(f"invalid acc_policy: {self.acc_policy!r}: it must be one of {', '.join(_ACC_POLICIES)}")
        method, separator, factor = (self.chunking_method or "aspect_ratio").partition(":")
        known = method == "aspect_ratio" and (not separator or (factor.isdigit() and int(factor) > 0))
        if not known and self.chunking_method != "auto":
            raise ValueError(
                f"invalid chunking_method: {self.chunking_method!r}: 'auto', 'aspect_ratio', 'aspect_ratio:N' or None"
            )
        for name in ("batch_chunk_size", "memory_budget"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be positive int or None, got {value!r}")
        if self.acc_dtype is not None and (
            not isinstance(self.acc_dtype, torch.dtype) or not self.acc_dtype.is_floating_point
        ):
            raise ValueError(f"acc_dtype must be None or a floating point dtype, got {self.acc_dtype!r}")
        checks.flag("gather_rows", self.gather_rows)


def check_options(options: Any) -> None:
    if options is not None and not hasattr(options, "batch_chunk_size"):
        raise TypeError(f"options must be a LinearCrossEntropyOptions, torch's or ours, not {type(options).__name__}")


def accumulation(options: Any, dtype: torch.dtype) -> torch.dtype:
    """Dtype in which the gradients of the layer are summed over chunks, for a product in ``dtype``."""
    widest = accumulator(dtype)
    chosen = getattr(options, "acc_dtype", None) or widest
    if chosen not in (dtype, widest):
        choices = f"{dtype} or {widest}" if dtype != widest else str(dtype)
        raise RuntimeError(f"acc_dtype must be {choices} where logits are of {dtype}, got {chosen}")
    return chosen


def limits_rows(options: Any) -> bool:
    """Whether the caller has said how many rows of logits may exist at a time."""
    return any(getattr(options, name, None) is not None for name in ("batch_chunk_size", "memory_budget"))


def check_fit(options: Any, n_classes: int, input: torch.Tensor, *, triton: bool) -> None:
    """Raise for options that do not fit the operands, also where nothing depends on them."""
    if options is not None:
        accumulation(options, input.dtype)
        rows_at_a_time(options, n_classes, input, triton=triton)


def rows_of_chunk(most: int, input: torch.Tensor) -> int:
    """Most rows of a chunk: ``most``, unless that leaves it to the device."""
    if most != BY_DEVICE:
        return most
    default = DEFAULT_ROWS.get(input.device.type, DEFAULT_ROWS["cuda"])
    return tuned.entry(input.device, "rows of a chunk", input.element_size(), default)


def rows_at_a_time(options: Any, n_classes: int, input: torch.Tensor, *, triton: bool) -> int:
    """Most rows of a chunk, from torch's options or ours."""
    device, itemsize = input.device, input.element_size()
    # The kernels write the gradient over the logits. Operators have both, and of half precision a copy of the gradient in
    # fp32, for the product that is summed in fp32.
    buffers = 1 if triton else 2 if itemsize > 2 else 4
    size = getattr(options, "batch_chunk_size", None)
    budget = getattr(options, "memory_budget", None)
    if size is None:
        size = DEFAULT_ROWS.get(device.type, DEFAULT_ROWS["cuda"])
        if budget is not None:
            row = buffers * n_classes * itemsize
            if budget < row:
                raise ValueError(
                    f"memory_budget of {budget} bytes is too small for one row of {n_classes} logits: {row} bytes"
                )
            size = budget // row
    return size
