"""From each rank's row statistics to the statistics over all classes, and the derivative of that on one rank.

A rank r sends, for a row of transformed logits y of which it holds some classes, sums over these classes alone:

lse     L_r, the log-sum-exp of y; -inf where there are none
target  sum of t * (y - L_r), t being the label's one-hot or the given probabilities
spread  sum of q * (y - L_r), q being the class weights under label smoothing, or the weighted, smoothed probabilities
entropy H_r, that of the rank's own softmax
top     largest y; NaN if this rank holds the label and another of its classes comes first

With the share of a rank ``s_r = exp(L_r - lse)`` its log-probabilities over all classes are its own plus ``log s_r``. The sums
are relative to ``L_r`` and not to 0, so that no digits cancel where one probability is close to 1.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..cross_entropy import reference
from ..cross_entropy.reference import Options, Rows, Sums
from .shard import Layout


def planes(target: Tensor, weight: Tensor | None, options: Options) -> tuple[str, ...]:
    """Names of what a rank sends for each row, in order."""
    if target.is_floating_point():
        # The plain target's sum is the smoothed and weighted one's where it is neither.
        differs = options.stats and (options.label_smoothing != 0.0 or weight is not None)
        moments = ("spread", "target") if differs else ("spread",)
    else:
        moments = ("target", "spread") if options.label_smoothing else ("target",)
    return "lse", *moments, *(("entropy", "top") if options.stats else ())


class Head(NamedTuple):
    """What every rank knows of the rows without asking: the whole target and class weight."""

    target: Tensor
    weight: Tensor | None
    options: Options
    layout: Layout


class _Masses(NamedTuple):
    """Sums of t and of q over each rank's classes, and which ranks take part in these; ranks first, then rows."""

    target: Tensor | None
    target_held: Tensor
    spread: Tensor | None
    spread_held: Tensor


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Made once: a copy from the host in every step would wait for it."""
    return torch.tensor(values, dtype=torch.int64, device=device)


def _by_rank(values: tuple[int, ...], rows: Tensor) -> Tensor:
    return _constant(values, rows.device).view(-1, *[1] * rows.dim())


def holders(label: Tensor, layout: Layout) -> Tensor:
    """Whether each rank holds the class index ``label``."""
    start = _by_rank(layout.starts, label)
    return (label >= start) & (label < start + _by_rank(layout.sizes, label))


def _masses(head: Head, rows: Tensor) -> _Masses:
    target, weight, options, layout = head
    held = _by_rank(layout.sizes, rows) > 0
    weight = None if weight is None else weight.to(rows.dtype)
    parts = [slice(start, start + size) for start, size in zip(layout.starts, layout.sizes, strict=True)]
    if not target.is_floating_point():
        own = holders(target, layout)
        spread = None
        if options.label_smoothing:
            of_shards = _by_rank(layout.sizes, rows) if weight is None else torch.stack([weight[p].sum() for p in parts])
            spread = of_shards.to(rows.dtype).view_as(held)
        return _Masses(own.to(rows.dtype), own, spread, held)
    plain, smoothed = [], []
    for part in parts:
        t = target[:, part]
        plain.append(t.sum(1, dtype=rows.dtype))
        own_weight = None if weight is None else weight[part]
        uniform = options.label_smoothing / layout.vocab_size
        mass = plain[-1] if own_weight is None else (t.to(rows.dtype) * reference.along(own_weight, t, 1)).sum(1)
        whole = t.size(1) if own_weight is None else own_weight.sum()
        smoothed.append(mass * (1.0 - options.label_smoothing) + uniform * whole)
    return _Masses(torch.stack(plain), held, torch.stack(smoothed), held)


class _Shares(NamedTuple):
    lse: Tensor
    log_share: Tensor


def _shares(lse: Tensor) -> _Shares:
    """Log-sum-exp over all classes, and the log of each rank's share of it."""
    top = lse.amax(0)
    # (-inf) - (-inf) would be NaN where no rank has a finite logit.
    shifted = lse - torch.where(top.isinf(), 0.0, top)
    log_total = shifted.exp().sum(0).log()
    return _Shares(torch.where(top.isinf(), top, top + log_total), shifted - log_total)


def _moment(local: Tensor, mass: Tensor, log_share: Tensor, held: Tensor) -> Tensor:
    """Sum of coefficients times log-probabilities over all classes."""
    return torch.where(held, local + mass * log_share, 0.0).sum(0)


def _surplus(entropy: Tensor, log_share: Tensor) -> Tensor:
    """Entropy that a rank adds for each unit of its share."""
    return torch.where(log_share == -float("inf"), 0.0, entropy - log_share)


def _first(top: Tensor, label: Tensor, layout: Layout) -> Tensor:
    """Whether the label's logit is the largest, and the first where some are equal."""
    own = holders(label, layout)
    best = torch.where(own, top, 0.0).sum(0)
    # Of a rank whose classes all come before the label's an equal logit wins.
    before = _by_rank(layout.starts, label) <= label
    return (own | torch.where(before, best > top, best >= top)).all(0) & own.any(0) & ~best.isnan()


def hits(target: Tensor) -> Tensor:
    """The class that a row's prediction must be to count as correct."""
    return target.argmax(1) if target.is_floating_point() else target


def _sums(gathered: Tensor, head: Head) -> tuple[Sums, _Masses, _Shares, dict[str, Tensor]]:
    target, weight, options, layout = head
    by_name = dict(zip(planes(target, weight, options), gathered.unbind(1), strict=True))
    shares, masses = _shares(by_name["lse"]), _masses(head, by_name["lse"][0])
    log_share = shares.log_share
    log_prob = spread = entropy = best = None
    if "spread" in by_name:
        assert masses.spread is not None
        spread = _moment(by_name["spread"], masses.spread, log_share, masses.spread_held)
    if "target" in by_name:
        assert masses.target is not None
        log_prob = _moment(by_name["target"], masses.target, log_share, masses.target_held)
    elif options.stats:
        log_prob = spread
    if options.stats:
        entropy = (log_share.exp() * _surplus(by_name["entropy"], log_share)).sum(0)
        label = hits(target)
        best = torch.where(_first(by_name["top"], label, layout), label, -1)
    return Sums(log_prob, spread, shares.lse, entropy, best), masses, shares, by_name


def merge(gathered: Tensor, head: Head) -> Rows:
    """Loss and statistics of each row, without row weights, from all ranks' planes (ranks, planes, rows...)."""
    sums, *_ = _sums(gathered, head)
    weight = None if head.weight is None else head.weight.to(gathered.dtype)
    return reference.combine(sums, head.target, weight, None, head.options, 1, head.layout.vocab_size)


class Coefficients(NamedTuple):
    """Derivatives of a scalar by one rank's planes, row by row; None where a plane is not sent."""

    lse: Tensor
    target: Tensor | None
    spread: Tensor | None
    entropy: Tensor | None


def coefficients(gathered: Tensor, head: Head, grads: tuple[Tensor | None, ...]) -> Coefficients:
    """What this rank's planes take of the gradients of the rows' loss, lse, log-probability and entropy."""
    target, weight, options, layout = head
    sums, masses, shares, by_name = _sums(gathered, head)
    assert sums.lse is not None
    zero = torch.zeros_like(sums.lse)
    of_loss, of_lse, of_log_prob, of_entropy = (zero if g is None else g.to(zero.dtype) for g in grads)
    rank = layout.rank
    log_share = shares.log_share[rank]
    share = log_share.exp()
    of_lse = of_lse + 2.0 * options.z_loss * sums.lse * of_loss
    if target.is_floating_point():
        of_target, of_spread = of_log_prob, -of_loss
        if "target" not in by_name:
            of_target, of_spread = None, of_spread + of_log_prob
    else:
        index, valid, outside = reference.labels(target, layout.vocab_size, options.ignore_index)
        of_lse, of_log_prob, of_loss = (torch.where(valid, g, 0.0) for g in (of_lse, of_log_prob, of_loss))
        label_weight = 1.0 if weight is None else weight.to(zero.dtype)[index]
        of_target = of_log_prob - (1.0 - options.label_smoothing) * label_weight * of_loss
        of_target = torch.where(outside, float("nan"), of_target)
        of_spread = of_loss * (-options.label_smoothing / layout.vocab_size) if options.label_smoothing else None
    result = of_lse * share
    for of_moment, mass in ((of_target, masses.target), (of_spread, masses.spread)):
        if of_moment is not None and mass is not None:
            own = mass[rank]
            # own - mass.sum(0) * share, without the cancellation at a share near 1.
            result = result - of_moment * (own * torch.expm1(log_share) + (mass.sum(0) - own) * share)
    of_entropy_here = None
    if options.stats:
        assert sums.entropy is not None
        of_entropy_here = of_entropy * share
        result = result + of_entropy_here * (_surplus(by_name["entropy"][rank], log_share) - sums.entropy)
    if of_target is not None:
        of_target = torch.where(masses.target_held[rank], of_target, 0.0)
    return Coefficients(result, of_target, of_spread, of_entropy_here)
