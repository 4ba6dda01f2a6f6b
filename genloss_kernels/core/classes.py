"""Validation that losses over classes share: shapes of input, target and class weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks
from .reduction import autocasting


def index_target(target: Any) -> Any:
    """Class indices of uint8 as int64: compared with an ``ignore_index`` of another sign or size they would wrap."""
    return target.long() if isinstance(target, Tensor) and target.dtype == torch.uint8 else target


def check_index_target(name: str, input: Tensor, target: Tensor) -> None:
    """Class indices of shape (N, d1, ...) for an input (N, C, d1, ...), or () or (1,) for (C)."""
    if input.dim() == 2 and target.dim() == 1 and target.dtype == torch.int64 and input.size(0) == target.size(0):
        return
    if input.dim() > 1 and (target.dim() == 0 or input.size(0) != target.size(0)):
        got = target.size(0) if target.dim() else "none"
        raise ValueError(f"Expected input batch_size ({input.size(0)}) to match target batch_size ({got}).")
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(
            f"{name}: expected target dtype to be Long or Byte, but got {target.dtype}: class indices are int64; "
            "class probabilities are floating point and have the shape of the input"
        )
    if input.dim() == 1:
        if target.dim() > 1 or target.numel() != 1:
            raise ValueError(f"{name}: target for an input of shape (C) must be one index, got {list(target.shape)}")
        return
    if input.dim() == 2 and target.dim() > 1:
        raise RuntimeError(
            f"{name}: 0D or 1D target tensor expected, multi-target not supported: the input is {list(input.shape)}, "
            f"the target {list(target.shape)}"
        )
    if input.shape[2:] != target.shape[1:]:
        raise RuntimeError(
            f"{name}: size mismatch (got input: {list(input.shape)}, target: {list(target.shape)}): for an input "
            "(N, C, d1, ...) the target is (N, d1, ...)"
        )


def check_class_weight(weight: Any, input: Tensor, *, same_dtype: bool) -> None:
    """One weight a class, on the input's device, with its dtype where torch wants that."""
    if weight is None:
        return
    checks.tensor("weight", weight)
    n_classes = input.size(1) if input.dim() > 1 else input.size(0)
    if weight.dim() != 1 or weight.numel() != n_classes:
        raise RuntimeError(
            f"weight tensor should be defined either for all {n_classes} classes or no classes but got weight tensor of "
            f"shape: {list(weight.shape)}"
        )
    checks.same_device("weight", weight, input)
    if same_dtype and weight.dtype != input.dtype and not autocasting(input.device):
        raise RuntimeError(f"weight must have the input's dtype: expected {input.dtype} but found {weight.dtype}")
    checks.floating("weight", weight)
