"""The public Kullback-Leibler divergence: check, choose the path, reduce."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...core import backend, checks, elementwise_op
from ...core.reduction import Reduction, loss_dtype, parse_reduction
from ...core.warning import warn
from ...core.widening import few, narrow, wide
from .reference import LOG_TARGET, NAME

# What torch.nn.functional's calls, without its Python.
_torch_loss = torch.kl_div

# Below this many elements on a CPU the built-in costs no more than ours over blocks: of logarithms at every size, since it
# keeps the exponentials for its backward, as ours does only in half precision.
BUILTIN_BELOW = 2**17
LOGARITHMS_BUILTIN_BELOW = math.inf

_REDUCTIONS = {
    "none": Reduction.NONE,
    "mean": Reduction.MEAN,
    "sum": Reduction.SUM,
    "batchmean": Reduction.BATCHMEAN,
}


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    r"""Kullback-Leibler divergence KL(target || input), in nats, its terms added up.

    .. math::
        \ell = t \, (\log t - x), \qquad \text{or of logarithms } e^{t} (t - x)

    Args:
        input: log-probabilities of any shape; fp32, fp16, bf16 or fp64.
        target: probabilities, or their logarithms, floating point; broadcast with the input.
        size_average: deprecated, see ``reduction``.
        reduce: deprecated, see ``reduction``.
        reduction: ``"none"``: per element; ``"batchmean"``: summed, over the size of the input's dimension 0, which is the
            divergence of a batch of distributions; ``"sum"``; ``"mean"``: over elements, with torch's warning.
        log_target: whether the target holds logarithms.

    Returns:
        0-d tensor for ``batchmean``, ``sum`` and ``mean``; the broadcast shape for ``none``. In the dtype to which input and
        target promote (fp32 under autocast).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: unknown reduction.
        RuntimeError: shapes that do not broadcast, or devices that differ.
        NotImplementedError: an operand is not real floating point.

    Numerics:
        Arithmetic in fp32, fp64 for fp64. A target of 0 adds 0, with a gradient of NaN for the target itself, and NaN where
        the input is -inf, all as in torch. Empty: ``sum`` 0, means NaN.

    Differs from torch:
        Nothing in the numbers, while targets are finite. Integer and complex tensors raise.

    Source:
        Kullback and Leibler, "On Information and Sufficiency", 1951, equation 2.4.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> even, odds = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
        >>> round(gk.kl_div(odds.log(), even, reduction="batchmean").item(), 4)
        0.1438
    """
    mean = size_average is None and reduce is None and reduction == "mean"
    if mean and not torch.compiler.is_compiling():  # which traces no warning
        warn(
            "reduction: 'mean' divides the total loss by both the batch size and the support size."
            "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
            "'mean' will be changed to behave the same as 'batchmean' in the next major release."
        )
    reduction = parse_reduction(reduction, size_average, reduce)
    shape = _check(input, target, reduction, log_target)
    triton = backend.use_triton(input, target)
    # Torch divides by the size of the input alone, and a single number by nothing.
    by_sum = reduction == "batchmean" and (input.shape != shape or not shape)
    chosen = Reduction.SUM if by_sum else _REDUCTIONS[reduction]
    if not triton and _builtin_is_best(input, target, shape, log_target):
        by_sum = reduction == "batchmean"
        loss = _torch_loss(wide(input), wide(target), int(Reduction.SUM if by_sum else chosen), log_target=log_target)
        return narrow(loss / input.size(0) if by_sum and input.dim() else loss, input.dtype)
    tensors = (input, target, None, None)
    loss = elementwise_op.apply(
        NAME,
        tensors,
        None,
        (0.0, 0.0, 0.0),
        LOG_TARGET if log_target else 0,
        chosen,
        loss_dtype(torch.promote_types(input.dtype, target.dtype), input.device),
        triton=triton,
        by_reference=not triton and backend.composite(*tensors),
    )
    return loss / input.size(0) if by_sum and input.dim() else loss


def _builtin_is_best(input: Tensor, target: Tensor, shape: torch.Size, log_target: bool) -> bool:
    limit = LOGARITHMS_BUILTIN_BELOW if log_target else BUILTIN_BELOW
    return (
        not backend.composite(input, target) and few(input, limit) and shape.numel() < limit and input.dtype == target.dtype
    )


def _check(input: Any, target: Any, reduction: Any, log_target: Any) -> torch.Size:
    checks.floating("input", input)
    checks.floating("target", target)
    checks.same_device("target", target, input)
    checks.one_of("reduction", reduction, _REDUCTIONS)
    checks.flag("log_target", log_target)
    return checks.together(input, target)
