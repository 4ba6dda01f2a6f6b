"""Cross entropy in plain PyTorch, differentiable to any order: oracle, transforms and second derivatives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.reduction import Reduction, accumulator


class Options(NamedTuple):
    """What a cross entropy depends on beside its tensors."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    z_loss: float = 0.0
    divisor: float | None = None  # None: what the reduction divides by
    reduction: int = Reduction.MEAN
    stats: bool = False


class Rows(NamedTuple):
    """Results for each row; only ``loss`` carries the row weights."""

    loss: Tensor
    normalizer: Tensor
    lse: Tensor
    log_prob: Tensor
    entropy: Tensor
    valid: Tensor
    correct: Tensor


def transform(logits: Tensor, options: Options) -> Tensor:
    """Logits after scale and softcap, in the dtype of arithmetic."""
    y = logits.to(accumulator(logits.dtype))
    if options.logit_scale != 1.0:
        y = y * options.logit_scale
    if options.softcap is not None:
        y = options.softcap * torch.tanh(y / options.softcap)
    return y


def labels(target: Tensor, n_classes: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices that are safe to gather with, which rows count, and which of these hold an index out of range."""
    target = target.long()
    valid = target != ignore_index
    outside = valid & ((target < 0) | (target >= n_classes))
    return torch.where(valid & ~outside, target, 0), valid, outside


def smoothed(target: Tensor, weight: Tensor | None, dim: int, options: Options, dtype: torch.dtype) -> Tensor:
    """Coefficients of the log-probabilities for class probabilities."""
    q = target.to(dtype)
    if options.label_smoothing:
        q = q * (1.0 - options.label_smoothing) + options.label_smoothing / target.size(dim)
    return q if weight is None else q * along(weight, target, dim)


def along(weight: Tensor, like: Tensor, dim: int) -> Tensor:
    """``weight`` viewed so that it broadcasts over all dimensions of ``like`` but ``dim``."""
    return weight.view([-1 if d == dim else 1 for d in range(like.dim())])


def rows(
    logits: Tensor, target: Tensor, weight: Tensor | None, row_weight: Tensor | None, options: Options, dim: int = 1
) -> Rows:
    """Loss and statistics of each row; ``dim`` is the class dimension, and ignored rows must be finite for a gradient."""
    dtype = accumulator(logits.dtype)
    weight = None if weight is None else weight.to(dtype)
    y = transform(logits, options)
    log_p = torch.log_softmax(y, dim)
    smoothing, n_classes = options.label_smoothing, logits.size(dim)
    if target.is_floating_point():
        valid = torch.ones(log_p.select(dim, 0).shape, dtype=torch.bool, device=logits.device)
        loss = -(log_p * smoothed(target, weight, dim, options, dtype)).sum(dim)
        normalizer = torch.ones_like(loss)
        log_prob = (log_p * target.to(dtype)).sum(dim) if options.stats else loss
        hit = target.argmax(dim) if options.stats else None
    else:
        index, valid, outside = labels(target, n_classes, options.ignore_index)
        log_prob = log_p.gather(dim, index.unsqueeze(dim)).squeeze(dim)
        log_prob = log_prob * torch.where(outside, float("nan"), 1.0).to(dtype)
        normalizer = torch.ones_like(log_prob) if weight is None else weight[index]
        normalizer = torch.where(valid & ~outside, normalizer, 0.0)
        loss = -log_prob if weight is None else -log_prob * weight[index]
        if smoothing:
            spread = log_p if weight is None else log_p * along(weight, log_p, dim)
            loss = loss * (1.0 - smoothing) - spread.sum(dim) * (smoothing / n_classes)
        hit = target
    lse = torch.logsumexp(y, dim) if options.z_loss or options.stats else loss
    if options.z_loss:
        loss = loss + options.z_loss * lse.square()
    if row_weight is not None:
        loss = loss * row_weight.to(dtype)
        normalizer = normalizer * row_weight.to(dtype)
    loss = torch.where(valid, loss, 0.0)
    normalizer = torch.where(valid, normalizer, 0.0)
    if not options.stats:
        return Rows(loss, normalizer, lse, log_prob, loss, valid, valid)
    p = log_p.exp()
    # 0 * -inf would be NaN, in the gradient too: the masked probability must not see the infinity either.
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(dim)
    correct = valid & (y.argmax(dim) == hit) & ~lse.isnan()
    zero = torch.zeros_like(lse)
    return Rows(
        loss,
        normalizer,
        torch.where(valid, lse, zero),
        torch.where(valid, log_prob, zero),
        torch.where(valid, entropy, zero),
        valid,
        correct,
    )


def reduce(loss: Tensor, normalizer: Tensor, divisor: Tensor | None, options: Options) -> Tensor:
    """The reduced loss of rows, in the dtype of arithmetic."""
    if options.reduction == Reduction.NONE:
        return loss
    if options.reduction == Reduction.SUM:
        return loss.sum()
    if divisor is not None:
        return loss.sum() / divisor.to(loss.dtype)
    return loss.sum() / (normalizer.sum() if options.divisor is None else options.divisor)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    divisor: Tensor | None,
    options: Options,
) -> tuple[Tensor, Rows]:
    """Reduced loss and rows for logits (N, C, d1, ...)."""
    if not target.is_floating_point():
        ignored = target == options.ignore_index
        logits = logits.masked_fill(ignored.unsqueeze(1), 0.0)
    result = rows(logits, target, weight, row_weight, options)
    return reduce(result.loss, result.normalizer, divisor, options), result
