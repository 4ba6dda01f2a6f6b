"""The unsharded loss in plain PyTorch by way of the log-sum-exp, as ranks that exchange it in the dtype must compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.core.reduction import Reduction
from genloss_kernels.losses.cross_entropy import reference
from genloss_kernels.losses.cross_entropy.reference import Options, Rows

_REDUCTIONS = {"none": Reduction.NONE, "mean": Reduction.MEAN, "sum": Reduction.SUM}


def rows(logits: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Rows:
    """Loss and statistics of each row, whose log-probabilities are differences from a rounded log-sum-exp."""
    if not target.is_floating_point():
        logits = logits.masked_fill((target == options.ignore_index).unsqueeze(1), 0.0)
    y = reference.transform(logits, options)
    weight = None if weight is None else weight.to(y.dtype)
    log_p = y - torch.logsumexp(y, 1, keepdim=True)
    index = None if target.is_floating_point() else reference.labels(target, y.size(1), options.ignore_index)[0]
    sums = reference.class_sums(y, log_p, target, index, weight, options, 1)
    return reference.combine(sums, target, weight, None, options, 1, y.size(1))


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
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
    found = rows(logits, target, weight, options)
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
