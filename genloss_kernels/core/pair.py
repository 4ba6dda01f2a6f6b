"""Launching a loss of two elementwise terms, each reduced over its own elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .elementwise import Grid, Walk, arithmetic, dense, divisor_of, grid_for, walk, widest
from .launch import REDUCTION_TILE, launch
from .layout import broadcast_shape
from .reduction import Reduction, kernel_dtype


class Term(NamedTuple):
    """An elementwise loss by the name of its formulas, on one or two operands; ``s0`` is the formulas' first scalar."""

    loss: str
    a: Tensor
    b: Tensor | None
    s0: float
    flags: int

    @property
    def operands(self) -> tuple[Tensor, Tensor | None, None, None]:
        return self.a, self.b, None, None

    @property
    def shape(self) -> torch.Size:
        return broadcast_shape((self.a, self.b))


class Sum(NamedTuple):
    """How two terms become a loss: first + beta * second.

    With ``capacity`` the second term is, sample by sample, the distance of its sum from that. ``beta_tensor``, on the
    device, stands in for ``beta``.
    """

    beta: float
    beta_tensor: Tensor | None
    capacity: float | None
    reduction: Reduction

    def by_sample(self) -> tuple[bool, bool]:
        samples = self.reduction == Reduction.SAMPLE
        return samples, samples or self.capacity is not None

    def divisors(self, first: Term, second: Term) -> tuple[float, float]:
        if self.capacity is None:
            return divisor_of(self.reduction, first.shape), divisor_of(self.reduction, second.shape)
        averages = self.reduction in (Reduction.MEAN, Reduction.BATCHMEAN)
        return divisor_of(self.reduction, first.shape), float(second.shape[0]) if averages else 1.0


class _Path(NamedTuple):
    """Where a kernel finds a term's operands, and what its programs cover."""

    walk: Walk
    grid: Grid
    shape: torch.Size

    def sizes(self) -> tuple[int, int, int, int]:
        return self.shape.numel(), self.grid.sample_size, self.grid.segments, self.grid.chunk


def _paths(first: Term, second: Term, rule: Sum) -> tuple[_Path, _Path]:
    itemsize, device = widest([*first.operands, *second.operands]), first.a.device
    found = []
    for term, by_sample in zip((first, second), rule.by_sample(), strict=True):
        grid = grid_for(term.shape, itemsize, by_sample=by_sample, device=device)
        found.append(_Path(walk([*term.operands, None], term.shape, grid.block, by_sample=by_sample), grid, term.shape))
    return found[0], found[1]


def _places(first: _Path, second: _Path) -> tuple[Any, ...]:
    walks = first.walk, second.walk
    return (
        tuple(tuple(w.tensors) for w in walks),
        tuple(w.sizes for w in walks),
        tuple(w.magics for w in walks),
        tuple(tuple(w.strides) for w in walks),
        (first.sizes(), second.sizes()),
    )


def _constants(first: Term, second: Term, paths: tuple[_Path, _Path], rule: Sum, acc: torch.dtype) -> dict[str, Any]:
    walks, grid = [path.walk for path in paths], paths[0].grid
    samples = rule.by_sample()
    return {
        "FIRST_FLAGS": first.flags, "SECOND_FLAGS": second.flags, "FIRST_KINDS": walks[0].kinds,
        "SECOND_KINDS": walks[1].kinds, "FIRST_SMALL": walks[0].small, "SECOND_SMALL": walks[1].small,
        "FIRST_SAMPLE": samples[0], "SECOND_SAMPLE": samples[1],
        "DTYPE": kernel_dtype(acc), "BLOCK": grid.block, "num_warps": grid.num_warps,
    }  # fmt: skip


def forward(
    values: tuple[Any, Any], first: Term, second: Term, rule: Sum, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the values and the reduction; returns loss, first and second term, and with capacity the samples' sums."""
    from .pair_kernel import _pair_forward_kernel, _pair_samples_kernel, _pair_total_kernel

    device, acc = first.a.device, arithmetic([*first.operands, *second.operands])
    paths = _paths(first, second, rule)
    programs = paths[0].grid.programs, paths[1].grid.programs
    partials = tuple(torch.empty(n, dtype=acc, device=device) for n in programs)
    launch(
        _pair_forward_kernel, sum(programs), device, *_places(*paths), partials, programs[0], first.s0, second.s0,
        FIRST_VALUE=values[0], SECOND_VALUE=values[1], **_constants(first, second, paths, rule, acc),
    )  # fmt: skip
    samples = second.shape[0] if rule.by_sample()[1] else 0
    sums = None if rule.capacity is None else torch.empty(samples, dtype=acc, device=device)
    capacity = 0.0 if rule.capacity is None else rule.capacity
    constants = {
        "DTYPE": kernel_dtype(acc), "BLOCK": REDUCTION_TILE.block, "num_warps": REDUCTION_TILE.num_warps,
    }  # fmt: skip
    segments = paths[0].grid.segments, paths[1].grid.segments
    by_sample = rule.reduction == Reduction.SAMPLE
    loss, one, other = (torch.empty(samples if by_sample else (), dtype=dtype, device=device) for _ in range(3))
    outputs = loss, one, other
    if by_sample:
        launch(
            _pair_samples_kernel, -(-samples // REDUCTION_TILE.block), device, partials, outputs, sums, rule.beta_tensor,
            samples, *segments, rule.beta, capacity, **constants,
        )  # fmt: skip
    else:
        launch(
            _pair_total_kernel, 1, device, partials, outputs, sums, rule.beta_tensor,
            programs[0], programs[1] if sums is None else samples, segments[1],
            rule.beta, capacity, *rule.divisors(first, second), **constants,
        )  # fmt: skip
    return loss, one, other, torch.empty(0, dtype=acc, device=device) if sums is None else sums


def backward(
    gradients: tuple[Any, Any],
    first: Term,
    second: Term,
    rule: Sum,
    sums: Tensor,
    upstreams: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Launch the gradients; returns that of each operand that needs one. No program runs for a term that needs none."""
    from .pair_kernel import _pair_backward_kernel

    device, acc = first.a.device, arithmetic([*first.operands, *second.operands])
    paths = _paths(first, second, rule)
    tensors = (first.a, first.b, second.a, second.b)
    places = (paths[0], paths[0], paths[1], paths[1])
    wide = [
        None if t is None or not need else dense(path.walk, path.shape, t.dtype if t.shape == path.shape else acc, device)
        for t, need, path in zip(tensors, needed, places, strict=True)
    ]
    programs = [
        path.grid.programs if any(g is not None for g in wide[at : at + 2]) else 0
        for path, at in zip(paths, (0, 2), strict=True)
    ]
    launch(
        _pair_backward_kernel, sum(programs), device, *_places(*paths),
        ((*wide[:2], None, None), (*wide[2:], None, None)), tuple(upstreams),
        tuple(0 if g is None or g.dim() == 0 else g.stride(0) for g in upstreams),
        None if rule.capacity is None else sums, rule.beta_tensor, programs[0],
        rule.beta, 0.0 if rule.capacity is None else rule.capacity, *rule.divisors(first, second), first.s0, second.s0,
        FIRST_GRADIENT=gradients[0], SECOND_GRADIENT=gradients[1], **_constants(first, second, paths, rule, acc),
    )  # fmt: skip
    return [
        None if w is None or t is None else w.sum_to_size(t.shape).to(t.dtype) for w, t in zip(wide, tensors, strict=True)
    ]
