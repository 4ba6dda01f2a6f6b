"""The cosine embedding loss in operators on blocks of rows that the cache holds, scaled only where squares overflowed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...core.scratch import Scratch
from .reference import EPSILON, direction, scale

# Elements of a block for each thread: three of them in fp32 are what a second-level cache holds.
_BLOCK_ELEMENTS = 2**17

# Squared norms up to which neither they nor products of their roots leave the range of fp32. Small ones need no scale, as
# epsilon hides what their squares lose.
_LARGEST_SQUARE = 1e30


def _blocks(tensors: Sequence[Tensor], shape: torch.Size) -> Iterator[Sequence[Tensor]]:
    """Blocks of rows of tensors with as many."""
    n_rows, n_cols = shape
    step = max(1, _BLOCK_ELEMENTS * torch.get_num_threads() // max(1, n_cols))
    if n_rows <= step:
        yield tensors
        return
    for start in range(0, n_rows, step):
        yield [t[start : start + step] for t in tensors]


def statistics(first: Tensor, second: Tensor, acc: torch.dtype) -> Tensor:
    """Inverse norms and cosine (3, N) of the rows."""
    found, scratch = torch.empty(3, first.size(0), dtype=acc, device=first.device), Scratch()
    squares, product = found[:2], found[2]
    for a, b, *sums in _blocks([first, second, *found], first.shape):
        x, y = scratch.cast("x", a, acc), scratch.cast("y", b, acc)
        buffer = scratch.take("buffer", x.shape, acc, x.device)
        for pair, total in zip(((x, x), (y, y), (x, y)), sums, strict=True):
            torch.sum(torch.mul(*pair, out=buffer), 1, out=total)
    # The size of numbers is a CPU's to look at. NaN is not below anything.
    if first.device.type == "cpu" and first.size(0) and squares.max().item() < _LARGEST_SQUARE:
        squares.add_(EPSILON).rsqrt_()
        product.mul_(squares[0]).mul_(squares[1])
        return found
    for x, y, *outputs in _blocks([first, second, *found], first.shape):
        _scaled(x.to(acc), y.to(acc), outputs)
    return found


def _scaled(x: Tensor, y: Tensor, outputs: Sequence[Tensor]) -> None:
    x_scale, y_scale = scale(x)[:, 0], scale(y)[:, 0]
    (x, x_norm), (y, y_norm) = direction(x), direction(y)
    results = 1.0 / x_scale / x_norm, 1.0 / y_scale / y_norm, (x * y).sum(1) / x_norm / y_norm
    for output, result in zip(outputs, results, strict=True):
        output.copy_(result)


def slopes(cosine: Tensor, target: Tensor, margin: float) -> Tensor:
    """Derivative of the loss in the cosine."""
    active = (cosine >= margin).logical_and_(target == -1)
    return torch.where(target == 1, -1.0, active.to(cosine.dtype))


def gradients(first: Tensor, second: Tensor, stats: Tensor, slope: Tensor, outputs: Sequence[Tensor | None]) -> None:
    """Write the gradients: each the other's direction less what of it lies along its own, times ``slope``, over its norm."""
    acc, scratch, n_rows = stats.dtype, Scratch(), stats.size(1)
    cosine, cpu = stats[2], first.device.type == "cpu"
    # Where no norm is so large that the product of two inverse ones is lost, a pass is saved.
    plain = cpu and n_rows and stats[:2].min().item() ** 2 > 1.0 / _LARGEST_SQUARE
    operands = (first, second)
    for place, output in enumerate(outputs):
        if output is None:
            continue
        own_inverse, other_inverse = stats[place], stats[1 - place]
        whole = slope * own_inverse
        along = cosine * own_inverse
        across = other_inverse
        if plain:
            across, along = whole * across, whole * along
        factors = [factor[:, None] for factor in (across, along, whole)]
        for x, y, target, *parts in _blocks([operands[place], operands[1 - place], output, *factors], first.shape):
            own, other = scratch.cast("own", x, acc), scratch.cast("other", y, acc)
            part = target if target.dtype == acc else scratch.take("buffer", own.shape, acc, own.device)
            torch.mul(other, parts[0], out=part).addcmul_(own, parts[1], value=-1.0)
            if not plain:
                part.mul_(parts[2])
            if part is not target:
                target.copy_(part)
