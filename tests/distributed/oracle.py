"""The unsharded loss in plain PyTorch by way of the log-sum-exp, as ranks compute that exchange it rounded to the dtype.

Judged is an error against what one unit in the last place of the log-sum-exp does, whichever way it goes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.core.reduction import Reduction
from genloss_kernels.losses.cross_entropy import reference
from genloss_kernels.losses.cross_entropy.reference import Options, Rows

_REDUCTIONS = {"none": Reduction.NONE, "mean": Reduction.MEAN, "sum": Reduction.SUM}


UP, DOWN = math.inf, -math.inf


class _LogSumExp(torch.autograd.Function):
    """Over dimension 1, and off by one unit in the last place; for the gradient as well."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, toward: float) -> Tensor:
        lse = torch.logsumexp(y, 1)
        lse = torch.where(lse.isfinite(), torch.nextafter(lse, torch.full_like(lse, toward)), lse)
        ctx.save_for_backward(y, lse)
        return lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        y, lse = ctx.saved_tensors
        return (y - lse.unsqueeze(1)).exp() * grads[0].unsqueeze(1), None


def rows(logits: Tensor, target: Tensor, weight: Tensor | None, options: Options, toward: float | None = None) -> Rows:
    """Loss and statistics of each row, whose log-probabilities are differences from the log-sum-exp."""
    if not target.is_floating_point():
        logits = logits.masked_fill((target == options.ignore_index).unsqueeze(1), 0.0)
    y = reference.transform(logits, options)
    weight = None if weight is None else weight.to(y.dtype)
    lse: Any = torch.logsumexp(y, 1) if toward is None else _LogSumExp.apply(y, toward)
    log_p = y - lse.unsqueeze(1)
    index = None if target.is_floating_point() else reference.labels(target, y.size(1), options.ignore_index)[0]
    sums = reference.class_sums(y, log_p, target, index, weight, options, 1)
    sums = sums._replace(lse=None if sums.lse is None else lse)
    return reference.combine(sums, target, weight, None, options, 1, y.size(1))


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    toward: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    divisor: Any = None,
    return_stats: bool = False,
) -> dict[str, Tensor]:
    """Loss and, if asked for, statistics by name, in the dtype of the logits."""
    options = Options(
        ignore_index, label_smoothing, softcap, logit_scale, z_loss, None, _REDUCTIONS[reduction], return_stats
    )
    found = rows(logits, target, weight, options, toward)
    weight = None if weight is None else weight.to(found.loss.dtype)
    loss, normalizer, valid = reference.weighted(found.loss, target, weight, row_weight, options, logits.size(1))
    divisor = None if divisor is None else torch.as_tensor(divisor, dtype=loss.dtype)
    result = {"loss": reference.reduce(loss, normalizer, divisor, options).to(logits.dtype)}
    if return_stats:
        result |= {"lse": found.lse, "log_prob": found.log_prob, "entropy": found.entropy}
        result |= {"n_valid": valid.sum(), "n_correct": found.correct.sum()}
    return result


def named(result: Tensor | gk.CrossEntropyStats) -> dict[str, Tensor]:
    return {"loss": result} if isinstance(result, Tensor) else result._asdict()


def worse(exact: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Of two results, element by element, the one that is further off."""
    return torch.where((first - exact).abs() > (second - exact).abs(), first, second)
