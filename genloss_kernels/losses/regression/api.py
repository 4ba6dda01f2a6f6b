"""The public regression losses: check, choose the path, reduce."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ...core import backend, checks, elementwise_op
from ...core.reduction import Reduction, accumulator, loss_dtype, parse_reduction
from .reference import MSE, torch_mse_loss

_REDUCTIONS = {"none": Reduction.NONE, "mean": Reduction.MEAN, "sum": Reduction.SUM}


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Squared error.

    .. math::
        \ell = w \, (x - t)^2

    Args:
        input: predictions of any shape; fp32, fp16, bf16 or fp64.
        target: targets, floating point, in the shape of the input (other shapes broadcast, with torch's warning).
        size_average: deprecated, see ``reduction``.
        reduce: deprecated, see ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``. With a weight, ``mean`` divides by the sum of the weights.
        weight: factor of each element's loss, in the shape of the input.

    Returns:
        0-d tensor for ``mean`` and ``sum``, the broadcast shape for ``none``; in the dtype to which the operands promote
        (fp32 under autocast).

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: unknown reduction, or a weight that differs from the input in shape.
        RuntimeError: shapes that do not broadcast, or devices that differ.
        NotImplementedError: an operand is not real floating point.

    Numerics:
        Arithmetic in fp32, fp64 for fp64. ``mean`` over no element is NaN and ``sum`` 0.

    Differs from torch:
        Integer tensors raise.

    Source:
        Bishop, "Pattern Recognition and Machine Learning", 2006, equation 1.2, without its half.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> gk.mse_loss(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]))
        tensor(5.)
    """
    reduction = parse_reduction(reduction, size_average, reduce)
    _check(input, target, weight, reduction)
    triton = backend.use_triton(input, target, weight)
    if not triton and input.device.type == "cpu" and input.dtype in (torch.float32, torch.float64):
        return torch_mse_loss(input, target, reduction=reduction, weight=weight)  # pyright: ignore[reportCallIssue]
    dtype = torch.promote_types(input.dtype, target.dtype)
    if weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
    result = loss_dtype(dtype, input.device)
    tensors = (input, target, weight, None)
    weighted = reduction == "mean" and weight is not None
    loss = elementwise_op.apply(
        MSE,
        tensors,
        None,
        (0.0, 0.0, 0.0),
        0,
        Reduction.SUM if weighted else _REDUCTIONS[reduction],
        accumulator(dtype) if weighted else result,
        triton=triton,
        by_reference=not triton and backend.composite(*tensors),
    )
    return (loss / weight.sum(dtype=loss.dtype)).to(result) if weighted and weight is not None else loss


def _check(input: Any, target: Any, weight: Any, reduction: Any) -> None:
    checks.floating("input", input)
    checks.floating("target", target)
    checks.one_of("reduction", reduction, _REDUCTIONS)
    checks.same_device("target", target, input)
    if weight is not None:
        checks.floating("weight", weight)
        checks.same_device("weight", weight, input)
        if weight.shape != input.shape:
            raise ValueError(f"weight must have the shape {list(input.shape)} of the input, got {list(weight.shape)}")
    if target.shape != input.shape:
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. Please ensure they have the same size.",
            stacklevel=3,
        )
