"""The public regression losses: check, choose the path, reduce."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...core import backend, checks, elementwise_op, made
from ...core.reduction import Reduction, accumulator, loss_dtype, parse_reduction
from ...core.warning import warn
from ...core.widening import few, narrow, wide
from . import reference

# Elements on a CPU from which passes through memory cost more than the operators that made gradients take; huber_loss and
# smooth_l1_loss take too many.
MADE_FROM = {reference.L1: 2**17, reference.MSE: 2**20}

# Below this many elements on a CPU weighted losses cost less by plain operators with autograd than over blocks.
PLAIN_BELOW = 2**18

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
    return _loss(reference.MSE, reference.torch_mse_loss, input, target, weight, reduction, weighted_mean=True)


def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Absolute error.

    .. math::
        \ell = w \, |x - t|

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
        Arithmetic in fp32, fp64 for fp64. The gradient is 0 where input and target are equal, and at NaN. ``mean`` over no
        element is NaN and ``sum`` 0.

    Differs from torch:
        Integer and complex tensors raise.

    Source:
        Boscovich, "De litteraria expeditione", 1757: least absolute deviations.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> gk.l1_loss(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]))
        tensor(2.)
    """
    reduction = parse_reduction(reduction, size_average, reduce)
    _check(input, target, weight, reduction)
    return _loss(reference.L1, reference.torch_l1_loss, input, target, weight, reduction, weighted_mean=True)


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    r"""Absolute error that is rounded off to a square near 0.

    .. math::
        \ell = \begin{cases} (x - t)^2 / (2 \beta) & |x - t| < \beta \\ |x - t| - \beta / 2 & \text{else} \end{cases}

    Args:
        input: predictions of any shape; fp32, fp16, bf16 or fp64.
        target: targets, floating point, in the shape of the input (other shapes broadcast, with torch's warning).
        size_average: deprecated, see ``reduction``.
        reduce: deprecated, see ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        beta: error at which the square becomes linear; not negative. 0 is :func:`l1_loss`, and so is less than 1.2e-38, the
            least number that fp32 holds in full, unless an operand is fp64.

    Returns:
        0-d tensor for ``mean`` and ``sum``, the broadcast shape for ``none``; in the dtype to which the operands promote
        (fp32 under autocast).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: unknown reduction.
        RuntimeError: a negative ``beta``, shapes that do not broadcast, or devices that differ.
        NotImplementedError: an operand is not real floating point.

    Numerics:
        Arithmetic in fp32, fp64 for fp64. ``mean`` over no element is NaN and ``sum`` 0.

    Differs from torch:
        Integer tensors raise, and ``beta`` is a number, not a tensor.

    Source:
        Girshick, "Fast R-CNN", 2015, equation 3, with a threshold.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> gk.smooth_l1_loss(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]), beta=2.0)
        tensor(1.1250)
    """
    reduction = parse_reduction(reduction, size_average, reduce)
    _check(input, target, None, reduction)
    checks.number("beta", beta)
    if not beta >= 0.0:
        raise RuntimeError(f"beta must not be negative, got {beta}")
    if beta == 0.0 or (beta < torch.finfo(torch.float32).tiny and torch.float64 not in (input.dtype, target.dtype)):
        return _loss(reference.L1, reference.torch_l1_loss, input, target, None, reduction)
    scalars = (float(beta), 1.0, 1.0 / beta)
    builtin = reference.torch_smooth_l1_loss
    return _loss(reference.SMOOTH_L1, builtin, input, target, None, reduction, scalars, (float(beta),))


def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    r"""Squared error that grows linearly from a threshold on.

    .. math::
        \ell = w \begin{cases} (x - t)^2 / 2 & |x - t| < \delta \\ \delta \, (|x - t| - \delta / 2) & \text{else} \end{cases}

    Args:
        input: predictions of any shape; fp32, fp16, bf16 or fp64.
        target: targets, floating point, in the shape of the input (other shapes broadcast, with torch's warning).
        reduction: ``"none"``, ``"mean"`` or ``"sum"``. ``mean`` divides by the number of elements, with a weight too.
        delta: error at which the square becomes linear; positive.
        weight: factor of each element's loss, in the shape of the input.

    Returns:
        0-d tensor for ``mean`` and ``sum``, the broadcast shape for ``none``; in the dtype to which the operands promote
        (fp32 under autocast).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: unknown reduction, or a weight that differs from the input in shape.
        RuntimeError: a ``delta`` that is not positive, shapes that do not broadcast, or devices that differ.
        NotImplementedError: an operand is not real floating point.

    Numerics:
        Arithmetic in fp32, fp64 for fp64. ``mean`` over no element is NaN and ``sum`` 0.

    Differs from torch:
        Integer tensors raise, and ``delta`` is a number, not a tensor.

    Source:
        Huber, "Robust Estimation of a Location Parameter", 1964, section 1.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> gk.huber_loss(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]), delta=2.0)
        tensor(2.2500)
    """
    _check(input, target, weight, reduction)
    checks.number("delta", delta)
    if not delta > 0.0:
        raise RuntimeError(f"delta must be positive, got {delta}")
    scalars = (float(delta), float(delta), 1.0)
    builtin = reference.torch_huber_loss
    return _loss(reference.HUBER, builtin, input, target, weight, reduction, scalars, (float(delta),))


def _loss(
    name: str,
    builtin: Callable[..., Tensor],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    scalars: tuple[float, float, float] = (0.0, 0.0, 0.0),
    options: tuple[float, ...] = (),
    *,
    weighted_mean: bool = False,
) -> Tensor:
    """The loss on its path; ``weighted_mean`` says that the mean divides by the sum of the weights.

    Weights are never left to the built-in: that of ``l1_loss`` loses them under ``torch.compile`` in torch 2.13.
    """
    triton = backend.use_triton(input, target, weight)
    if not triton and weight is None and _builtin_is_best(name, input, target, reduction):
        return narrow(builtin(wide(input), wide(target), int(_REDUCTIONS[reduction]), *options), input.dtype)
    dtype = torch.promote_types(input.dtype, target.dtype)
    if weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
    result, arithmetic = loss_dtype(dtype, input.device), accumulator(dtype)
    by_weights = weighted_mean and reduction == "mean" and weight is not None
    if by_weights and weight is not None and weight.requires_grad:
        # Its gradient is the difference of two, which half precision would round one by one.
        weight = weight.to(arithmetic)
    tensors = (input, target, weight, None)
    # An infinite scalar would turn what it does not apply to into NaN.
    largest = torch.finfo(arithmetic).max
    loss = elementwise_op.apply(
        name,
        tensors,
        None,
        (min(scalars[0], largest), min(scalars[1], largest), min(scalars[2], largest)),
        0,
        Reduction.SUM if by_weights else _REDUCTIONS[reduction],
        arithmetic if by_weights else result,
        triton=triton,
        by_reference=not triton and (_plain_is_best(input, weight) or backend.composite(*tensors)),
    )
    return (loss / weight.sum(dtype=loss.dtype)).to(result) if by_weights and weight is not None else loss


def _builtin_is_best(name: str, input: Tensor, target: Tensor, reduction: str) -> bool:
    """On a CPU, unless operands are to be converted, or broadcast with the warning that was given, or many are summed."""
    return (
        few(input, math.inf)
        and input.dtype == target.dtype
        and input.shape == target.shape
        and (torch.compiler.is_compiling() or not _many(name, input, target, reduction))
    )


def _many(name: str, input: Tensor, target: Tensor, reduction: str) -> bool:
    return input.numel() >= MADE_FROM.get(name, math.inf) and made.fits((input, target), _REDUCTIONS[reduction])


def _plain_is_best(input: Tensor, weight: Tensor | None) -> bool:
    small = input.device.type == "cpu" and input.numel() < PLAIN_BELOW
    return weight is not None and small and not torch.compiler.is_compiling()


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
    checks.together(input, target)
    if target.shape != input.shape and not torch.compiler.is_compiling():  # which traces no warning
        warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. Please ensure they have the same size."
        )
