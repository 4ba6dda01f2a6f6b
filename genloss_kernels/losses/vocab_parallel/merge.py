"""From each rank's row statistics to the statistics over all classes.

A rank r sends, for a row of transformed logits y of which it holds some classes, sums over these classes alone:

lse     L_r, the log-sum-exp of y; -inf where there are none
target  sum of t * (y - L_r), t being the label's one-hot or the given probabilities
spread  sum of q * (y - L_r), q being the class weights under label smoothing, or the weighted, smoothed probabilities
entropy H_r, that of the rank's own softmax
top     largest y; -inf if this rank holds the label and another of its classes comes first

With the share of a rank, ``s_r = exp(L_r - lse)``, its log-probabilities over all classes are its own plus ``log s_r``, and
the entropy over all classes is the sum of s_r times a rank's surplus, ``H_r - log s_r``. The sums are relative to ``L_r``,
not to 0, so that no digits cancel where one probability is close to 1.
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


class Masses(NamedTuple):
    """Sums of t and of q over each rank's classes, and which ranks take part in these; ranks first, then rows."""

    target: Tensor
    target_held: Tensor
    spread: Tensor
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


def _masses(head: Head, rows: Tensor) -> Masses:
    target, weight, options, layout = head
    held = _by_rank(layout.sizes, rows) > 0
    weight = None if weight is None else weight.to(rows.dtype)
    parts = [slice(start, start + size) for start, size in zip(layout.starts, layout.sizes, strict=True)]
    if not target.is_floating_point():
        own = holders(target, layout)
        spread = _by_rank(layout.sizes, rows) if weight is None else torch.stack([weight[p].sum() for p in parts])
        spread = spread.to(rows.dtype).view_as(held)
        return Masses(own.to(rows.dtype), own, spread, held)
    plain, smoothed = [], []
    for part in parts:
        t = target[:, part]
        plain.append(t.sum(1, dtype=rows.dtype))
        own_weight = None if weight is None else weight[part]
        uniform = options.label_smoothing / layout.vocab_size
        mass = plain[-1] if own_weight is None else (t.to(rows.dtype) * reference.along(own_weight, t, 1)).sum(1)
        whole = t.size(1) if own_weight is None else own_weight.sum()
        smoothed.append(mass * (1.0 - options.label_smoothing) + uniform * whole)
    return Masses(torch.stack(plain), held, torch.stack(smoothed), held)


def _shares(lse: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over all classes, and the log of each rank's share of it."""
    top = lse.amax(0)
    # (-inf) - (-inf) would be NaN where no rank has a finite logit.
    shifted = lse - torch.where(top.isinf(), 0.0, top)
    log_total = shifted.exp().sum(0).log()
    return torch.where(top.isinf(), top, top + log_total), shifted - log_total


def _moment(local: Tensor, mass: Tensor, log_share: Tensor, held: Tensor) -> Tensor:
    """Sum of coefficients times log-probabilities over all classes."""
    return torch.where(held, local + mass * log_share, 0.0).sum(0)


def _first(top: Tensor, label: Tensor, layout: Layout) -> Tensor:
    """Whether the label's logit is the largest, and the first where some are equal."""
    own = holders(label, layout)
    best = torch.where(own, top, 0.0).sum(0)
    # Of a rank whose classes all come before the label's an equal logit wins.
    before = _by_rank(layout.starts, label) <= label
    return (own | torch.where(before, best > top, best >= top)).all(0) & own.any(0) & (best > -float("inf"))


def hits(target: Tensor) -> Tensor:
    """The class that a row's prediction must be to count as correct."""
    return target.argmax(1) if target.is_floating_point() else target


class Whole(NamedTuple):
    """Sums over all classes, and what each rank's own are to them; ranks first, then rows."""

    sums: Sums
    lse: Tensor
    log_share: Tensor
    surplus: Tensor | None
    masses: Masses


def whole(gathered: Tensor, head: Head) -> Whole:
    """Merge all ranks' planes (ranks, planes, rows...), on every rank to the same bits."""
    target, weight, options, layout = head
    by_name = dict(zip(planes(target, weight, options), gathered.unbind(1), strict=True))
    (lse, log_share), masses = _shares(by_name["lse"]), _masses(head, by_name["lse"][0])
    log_prob = spread = entropy = surplus = best = None
    if "spread" in by_name:
        spread = _moment(by_name["spread"], masses.spread, log_share, masses.spread_held)
    if "target" in by_name:
        log_prob = _moment(by_name["target"], masses.target, log_share, masses.target_held)
    elif options.stats:
        log_prob = spread
    if options.stats:
        surplus = torch.where(log_share == -float("inf"), 0.0, by_name["entropy"] - log_share)
        entropy = (log_share.exp() * surplus).sum(0)
        label = hits(target)
        best = torch.where(_first(by_name["top"], label, layout), label, -1)
    return Whole(Sums(log_prob, spread, lse, entropy, best), lse, log_share, surplus, masses)


def merge(gathered: Tensor, head: Head) -> Rows:
    """Loss and statistics of each row, without row weights, from all ranks' planes (ranks, planes, rows...)."""
    weight = None if head.weight is None else head.weight.to(gathered.dtype)
    sums = whole(gathered, head).sums
    return reference.combine(sums, head.target, weight, None, head.options, 1, head.layout.vocab_size)
