"""The public negative log-likelihood: check, choose the path, reduce."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...core import autograd, backend, checks
from ...core.classes import check_class_weight, check_index_target, index_target
from ...core.reduction import Reduction, loss_dtype, parse_reduction
from ...core.widening import few, narrow, wide
from . import reference
from .op import NLLLoss

_REDUCTIONS = {"none": Reduction.NONE, "mean": Reduction.MEAN, "sum": Reduction.SUM}


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative log-likelihood of class indices under given log-probabilities.

    .. math::
        \ell = -w_t \, x_t

    Args:
        input: log-probabilities, shape (C), (N, C) or (N, C, d1, ...), in any memory layout; fp32, fp16, bf16 or fp64.
        target: class indices, int64 or uint8, shape (), (N) or (N, d1, ...).
        weight: one factor a class, shape (C). Takes no gradient.
        size_average: deprecated, see ``reduction``.
        ignore_index: rows with this label have loss 0 and gradient 0. Any integer.
        reduce: deprecated, see ``reduction``.
        reduction: ``"none"``, ``"mean"``, which divides by the sum of ``weight[target]`` over valid rows, or ``"sum"``.

    Returns:
        0-d tensor for ``mean`` and ``sum``; for ``none`` shape (), (N) or (N, d1, ...). In the input's dtype (fp32 under
        autocast).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: unknown reduction, a 0-d input, or batch sizes that differ.
        RuntimeError: shapes, dtypes or devices that do not fit, or a weight that requires a gradient.
        IndexError: a class index out of range, on the CPU, or on a GPU under ``GENLOSS_DEBUG=1``. Without that a GPU gives
            the row a loss and a gradient of NaN.

    Numerics:
        Sums in fp32, fp64 for fp64, in a fixed order. ``mean`` over no valid row is NaN, as in torch, and ``sum`` 0.

    Differs from torch:
        Nothing on the CPU, whose path is the built-in; on a GPU a label out of range does not end the context.

    Source:
        Bishop, "Pattern Recognition and Machine Learning", 2006, equation 4.108.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> gk.nll_loss(torch.tensor([[-0.5, -1.0]]), torch.tensor([1]))
        tensor(1.)
    """
    reduction = parse_reduction(reduction, size_average, reduce)
    target = index_target(target)
    _check(input, target, weight, ignore_index, reduction)
    weight = None if weight is None else weight.contiguous()
    triton = backend.use_triton(input, target, weight)
    checked = input.device.type == "cpu" and (backend.reads_values(target) or torch.compiler.is_compiling())
    # Many in half precision are not cast: without weights and reduction the built-in only gathers, which is exact.
    gathers = not few(input, math.inf)
    if not triton and checked and not (gathers and weight is not None):
        # The built-in checks the labels itself; its backward wants spatial inputs contiguous.
        input = input.contiguous() if input.dim() > 2 else input
        operand, chosen = (input, Reduction.NONE) if gathers else (wide(input), _REDUCTIONS[reduction])
        try:
            loss = reference.torch_nll_loss(operand, target, wide(weight), int(chosen), ignore_index)
        except IndexError:
            # Torch's message says what it got; ours, what is accepted as well.
            checks.class_indices(target, input.size(min(1, input.dim() - 1)), ignore_index)
            raise
        if gathers and reduction != "none":
            loss = loss.sum(dtype=torch.float32)
            loss = loss / (target != ignore_index).sum() if reduction == "mean" else loss
        return narrow(loss, input.dtype)
    single = input.dim() == 1
    checks.class_indices(target, input.size(0) if single else input.size(1), ignore_index)
    if single:
        input, target = input.unsqueeze(0), target.reshape(1)
    dtype = loss_dtype(input.dtype, input.device)
    if triton:
        loss, _ = autograd.apply(NLLLoss, input, target, weight, ignore_index, int(_REDUCTIONS[reduction]), dtype)
    else:
        loss = reference.nll_loss(input, target, weight, ignore_index, reduction, checked=checked).to(dtype)
    return loss.squeeze(0) if single and reduction == "none" else loss


def _check(input: Any, target: Any, weight: Any, ignore_index: Any, reduction: Any) -> None:
    checks.floating("input", input)
    checks.tensor("target", target)
    checks.one_of("reduction", reduction, _REDUCTIONS)
    checks.integer("ignore_index", ignore_index)
    if input.dim() == 0:
        raise ValueError("Expected 1 or more dimensions (got 0): input must have shape (C), (N, C) or (N, C, d1, ...)")
    checks.same_device("target", target, input)
    check_index_target("nll_loss", input, target)
    check_class_weight(weight, input, same_dtype=True)
    if weight is not None:
        checks.no_gradient("weight", weight)
