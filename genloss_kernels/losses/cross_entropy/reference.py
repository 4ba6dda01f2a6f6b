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

    def by_normalizer(self, divisor: Tensor | None) -> bool:
        """Whether the loss is divided by what its rows add up to, and not by a number or a tensor that was given."""
        return self.reduction == Reduction.MEAN and divisor is None and self.divisor is None

    def number(self, divisor: Tensor | None) -> float:
        """The number that divides the loss beside ``divisor``; 1 where none does."""
        return 1.0 if divisor is not None or self.divisor is None else self.divisor


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
        q = q * (1.0 - options.label_smoothing) + options.label_smoothing / max(1, target.size(dim))
    return q if weight is None else q * along(weight, target, dim)


def along(weight: Tensor, like: Tensor, dim: int) -> Tensor:
    """``weight`` viewed so that it broadcasts over all dimensions of ``like`` but ``dim``."""
    return weight.view([-1 if d == dim else 1 for d in range(like.dim())])


class Sums(NamedTuple):
    """What a row's loss takes from its classes; None where the options do not ask for it."""

    log_prob: Tensor | None
    spread: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None
    best: Tensor | None


def class_sums(
    y: Tensor, log_p: Tensor, target: Tensor, index: Tensor | None, weight: Tensor | None, options: Options, dim: int
) -> Sums:
    """Sums over the class dimension of transformed logits ``y``, by class probabilities or, at ``index``, labels.

    ``log_prob`` is that of the target; ``spread`` sums the log-probabilities with their smoothed coefficients.
    """
    spread = None
    if index is None:
        spread = (log_p * smoothed(target, weight, dim, options, log_p.dtype)).sum(dim)
        log_prob = (log_p * target.to(log_p.dtype)).sum(dim) if options.stats else None
    else:
        log_prob = log_p.gather(dim, index.unsqueeze(dim)).squeeze(dim)
        if options.label_smoothing:
            spread = (log_p if weight is None else log_p * along(weight, log_p, dim)).sum(dim)
    lse = torch.logsumexp(y, dim) if options.z_loss or options.stats else None
    if not options.stats:
        return Sums(log_prob, spread, lse, None, None)
    p = log_p.exp()
    # 0 * -inf would be NaN, in the gradient too: the masked probability must not see the infinity either.
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(dim)
    return Sums(log_prob, spread, lse, entropy, y.argmax(dim))


def weighted(
    loss: Tensor, target: Tensor, weight: Tensor | None, row_weight: Tensor | None, options: Options, n_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses times the row weights, what their mean divides by, row by row, and which rows count."""
    valid = torch.ones_like(loss, dtype=torch.bool) if target.is_floating_point() else target != options.ignore_index
    each = normalizer(target, weight, row_weight, n_classes, loss.dtype).expand_as(loss)
    if row_weight is not None:
        loss = loss * row_weight.to(loss.dtype)
    return torch.where(valid, loss, 0.0), torch.where(valid, each, 0.0), valid


def normalizer(
    target: Tensor, weight: Tensor | None, row_weight: Tensor | None, n_classes: int, dtype: torch.dtype
) -> Tensor:
    """What a row that counts adds to the divisor of the mean; one number where that is the same for all."""
    if weight is None or target.is_floating_point():
        return target.new_ones((), dtype=dtype) if row_weight is None else row_weight.to(dtype)
    label = target.long()
    found = torch.where((label >= 0) & (label < n_classes), weight[label.clamp(0, n_classes - 1)], 0.0)
    return found if row_weight is None else found * row_weight.to(dtype)


def mean_divisor(
    target: Tensor, weight: Tensor | None, row_weight: Tensor | None, n_classes: int, valid: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """What the mean divides by, from the targets and weights alone; ``valid`` says which of the labels count."""
    if row_weight is None and (weight is None or valid is None):
        return target.new_full((), target.size(0), dtype=dtype) if valid is None else valid.sum(dtype=dtype)
    weight = None if weight is None else weight.to(dtype)
    each = normalizer(target, weight, row_weight, n_classes, dtype)
    return (each if valid is None else torch.where(valid, each, 0.0)).sum()


def combine(
    sums: Sums, target: Tensor, weight: Tensor | None, row_weight: Tensor | None, options: Options, dim: int, n_classes: int
) -> Rows:
    """Loss and statistics of each row from the sums over its classes."""
    smoothing = options.label_smoothing
    log_prob = sums.log_prob
    if sums.spread is not None and target.is_floating_point():
        loss = -sums.spread
        hit = target.argmax(dim) if options.stats else None
    else:
        assert log_prob is not None
        index, _, outside = labels(target, n_classes, options.ignore_index)
        log_prob = log_prob * torch.where(outside, float("nan"), 1.0).to(log_prob.dtype)
        loss = -log_prob if weight is None else -log_prob * weight[index]
        if sums.spread is not None:
            loss = loss * (1.0 - smoothing) - sums.spread * (smoothing / n_classes)
        hit = target
    if sums.lse is not None and options.z_loss:
        loss = loss + options.z_loss * sums.lse.square()
    loss, normalizer, valid = weighted(loss, target, weight, row_weight, options, n_classes)
    if sums.lse is None or sums.entropy is None or log_prob is None:
        return Rows(loss, normalizer, loss, loss, loss, valid, valid)
    correct = valid & (sums.best == hit) & ~sums.lse.isnan()
    lse, log_prob, entropy = (torch.where(valid, s, 0.0) for s in (sums.lse, log_prob, sums.entropy))
    return Rows(loss, normalizer, lse, log_prob, entropy, valid, correct)


def rows(
    logits: Tensor, target: Tensor, weight: Tensor | None, row_weight: Tensor | None, options: Options, dim: int = 1
) -> Rows:
    """Loss and statistics of each row; ``dim`` is the class dimension, and ignored rows must be finite for a gradient."""
    y = transform(logits, options)
    weight = None if weight is None else weight.to(y.dtype)
    n_classes = logits.size(dim)
    if not n_classes and not target.is_floating_point():
        # One class for the rows, all of them ignored, to look up.
        y, weight, n_classes = y.sum(dim, keepdim=True), None, 1
    index = None if target.is_floating_point() else labels(target, n_classes, options.ignore_index)[0]
    sums = class_sums(y, torch.log_softmax(y, dim), target, index, weight, options, dim)
    return combine(sums, target, weight, row_weight, options, dim, n_classes)


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
