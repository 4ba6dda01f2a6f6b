"""The adversarial losses on a CPU, block by block in buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.elementwise import arithmetic
from ...core.formulas import Formulas, Scalars, register_formulas
from ...core.scratch import Scratch
from .reference import BOTH, FAKE, GAMES, HINGE, LINEAR, SATURATING, SQUARES, THRESHOLD, reference

NAME = "adversarial"

_softplus = torch.ops.aten.softplus.out


def value(a: Tensor, b: Tensor | None, c: None, d: None, scalars: Scalars, flags: int, scratch: Scratch) -> Tensor:
    return reference(a, b, None, None, scalars, flags)


def total(
    a: Tensor, b: Tensor | None, c: None, d: None, scalars: Scalars, flags: int, scratch: Scratch,
    saved: Sequence[Tensor] = (),
) -> Tensor:  # fmt: skip
    x, game = _score(a, b, flags, scratch), flags & GAMES
    part = scratch.take("part", x.shape, x.dtype, x.device)
    if game == SQUARES:
        return 0.5 * torch.mul(x, x, out=part).sum()
    if game == HINGE:
        return torch.clamp(x, min=0.0, out=part).sum()
    if game == LINEAR:
        return x.sum()
    result = _softplus(x, 1.0, THRESHOLD, out=part).sum()
    return -result if game == SATURATING else result


def gradient(
    a: Tensor, b: Tensor | None, c: None, d: None, scalars: Scalars, flags: int, scratch: Scratch, grad: Tensor | float,
    outputs: Sequence[Tensor | None], saved: Sequence[Tensor] = (),
) -> None:  # fmt: skip
    da, db, *_ = outputs
    if flags & BOTH:
        for operand, output, fake in ((a, da, 0), (b, db, FAKE)):
            if operand is not None and output is not None:
                own = (output, None, None, None)
                gradient(operand, None, None, None, scalars, flags & GAMES | fake, scratch, grad, own)
        return
    x, game = _score(a, b, flags, scratch), flags & GAMES
    slope = scratch.take("slope", x.shape, x.dtype, x.device)
    if game == SQUARES:
        slope.copy_(x)
    elif game == HINGE:
        # 1 at NaN, as of torch's relu.
        slope.copy_((x <= 0.0).logical_not_())
    elif game == LINEAR:
        slope.fill_(1.0)
    else:
        torch.sigmoid(x, out=slope)
    # The score rises with a fake sample's and, but for squares, falls with a real one's.
    sign = 1.0 if flags & FAKE or game == SQUARES else -1.0
    for output, factor in ((da, -sign if game == SATURATING else sign), (db, -sign)):
        if output is not None:
            torch.mul(slope, grad * factor, out=output)


def _score(a: Tensor, b: Tensor | None, flags: int, scratch: Scratch) -> Tensor:
    """What a game is a function of: a fake score, a real one negated, fake minus real, or the distance from a label."""
    dtype, game, fake = arithmetic((a, b)), flags & GAMES, bool(flags & FAKE)
    x = scratch.cast("a", a, dtype)
    score = scratch.take("score", x.shape, dtype, x.device)
    if b is not None:
        return torch.sub(scratch.cast("b", b, dtype), x, out=score)
    if game == SQUARES:
        return x if fake else torch.sub(x, 1.0, out=score)
    if game == HINGE:
        return torch.add(x, 1.0, out=score) if fake else torch.sub(1.0, x, out=score)
    return x if fake else torch.neg(x, out=score)


def _kernels() -> tuple[object, object]:
    from . import kernels

    return kernels.adversarial_value, kernels.adversarial_gradient


register_formulas(NAME, Formulas(_kernels, reference, value, total, gradient))
