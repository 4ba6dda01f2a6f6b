"""The public Gaussian negative log-likelihood: check, choose the path, reduce."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...core import backend, checks, elementwise_op
from ...core.layout import broadcast_shape
from ...core.reduction import Reduction, accumulator, loss_dtype
from .reference import NAME

# Below this many elements on a CPU plain operators with autograd cost less than our operators' bookkeeping.
PLAIN_BELOW = 2**15

_REDUCTIONS = {"none": Reduction.NONE, "mean": Reduction.MEAN, "sum": Reduction.SUM}


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative log-likelihood of a sample under a Gaussian with predicted mean and variance, in nats.

    .. math::
        \ell = \tfrac12 \Big[ \log v + \frac{(x - t)^2}{v} \Big] + c, \qquad v = \max(\mathrm{var}, \epsilon)

    with c = 0, or log(2 pi) / 2 if ``full``.

    Args:
        input: means of any shape; fp32, fp16, bf16 or fp64.
        target: samples, floating point; broadcast with the means.
        var: variances, not negative: a tensor in the shape of the input, in that shape with one dimension of size 1, or in
            that shape without its last dimension; or one number for all.
        full: whether to add the constant.
        eps: least variance. The gradient of ``var`` is that at the clamped variance, also where it was clamped.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Returns:
        0-d tensor for ``mean`` and ``sum``, the broadcast shape for ``none``; in the dtype to which the tensors promote
        (fp32 under autocast).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: unknown reduction, a ``var`` of another shape, or one with a negative entry: on the CPU, on a GPU under
            ``GENLOSS_DEBUG=1`` alone. Without that it counts as ``eps`` there.
        RuntimeError: shapes that do not broadcast, or devices that differ.
        NotImplementedError: an operand is not real floating point.

    Numerics:
        Arithmetic in fp32, fp64 for fp64. ``mean`` over no element is NaN and ``sum`` 0.

    Differs from torch:
        On a GPU nothing waits for the check of ``var``. Integer tensors raise.

    Source:
        Nix and Weigend, "Estimating the mean and variance of the target probability distribution", 1994, equation 3.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> gk.gaussian_nll_loss(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0]))
        tensor(2.5000)
    """
    _check(input, target, var, eps, reduction)
    dtype = torch.promote_types(input.dtype, target.dtype)
    if isinstance(var, Tensor):
        dtype = torch.promote_types(dtype, var.dtype)
        variance = _fitted(var, input)
    else:
        variance = input.new_full((), var, dtype=accumulator(dtype))
    tensors = (input, target, variance, None)
    try:
        shape = broadcast_shape(tensors)
    except RuntimeError:
        raise RuntimeError(
            f"input and target must broadcast together, got input {list(input.shape)}, target {list(target.shape)}"
        ) from None
    triton = backend.use_triton(input, target, variance)
    return elementwise_op.apply(
        NAME,
        tensors,
        None,
        (float(eps), 0.5 * math.log(2.0 * math.pi) if full else 0.0, 0.0),
        0,
        _REDUCTIONS[reduction],
        loss_dtype(dtype, input.device),
        triton=triton,
        by_reference=not triton and (_plain_is_best(input, shape) or backend.composite(*tensors)),
    )


def _plain_is_best(input: Tensor, shape: torch.Size) -> bool:
    return not torch.compiler.is_compiling() and input.device.type == "cpu" and shape.numel() < PLAIN_BELOW


def _fitted(var: Tensor, input: Tensor) -> Tensor:
    """``var`` in a shape that broadcasts to the input's, by torch's rules."""
    if var.shape == input.shape:
        return var
    if var.shape == input.shape[:-1]:
        return var.unsqueeze(-1)
    different = [own for own, size in zip(var.shape, input.shape, strict=False) if own != size]
    if var.dim() == input.dim() and sum(different) == 1:
        return var
    raise ValueError(
        f"var is of incorrect size: it must have the shape {list(input.shape)} of the input, or that with one dimension "
        f"of size 1 or without the last one, got {list(var.shape)}"
    )


def _check(input: Any, target: Any, var: Any, eps: Any, reduction: Any) -> None:
    checks.floating("input", input)
    checks.floating("target", target)
    checks.same_device("target", target, input)
    if isinstance(var, float):
        if var < 0.0:
            raise ValueError(f"var has a negative entry: it must not be negative, got {var}")
    else:
        checks.floating("var", var)
        checks.same_device("var", var, input)
        checks.not_negative("var", var)
    checks.number("eps", eps)
    checks.one_of("reduction", reduction, _REDUCTIONS)
