"""The adversarial losses and penalties in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.elementwise import arithmetic
from ...core.elementwise_op import Scalars, by_slopes, register_formulas

NAME = "adversarial"

# Values of the flags; kernels.py reads the same.
LOGISTIC, SATURATING, SQUARES, HINGE, LINEAR, RELATIVISTIC = range(6)
_GAMES, FAKE, BOTH = 7, 8, 16


def _softplus(x: Tensor) -> Tensor:
    """To the last digit, where torch's own stops at 20."""
    return -F.logsigmoid(-x)


def _side(x: Tensor, game: int, fake: bool) -> Tensor:
    signed = x if fake else -x
    if game == SATURATING:
        return -_softplus(x)
    if game == SQUARES:
        return 0.5 * (x if fake else x - 1.0).square()
    if game == HINGE:
        return F.relu(1.0 + signed)
    return signed if game == LINEAR else _softplus(signed)


def reference(a: Tensor, b: Tensor | None, c: None, d: None, scalars: Scalars, flags: int) -> Tensor:
    dtype, game = arithmetic((a, b)), flags & _GAMES
    a = a.to(dtype)
    if b is None:
        return _side(a, game, bool(flags & FAKE))
    b = b.to(dtype)
    return _softplus(b - a) if game == RELATIVISTIC else _side(a, game, False) + _side(b, game, True)


def _side_slope(x: Tensor, game: int, fake: bool) -> Tensor:
    signed = x if fake else -x
    if game == SATURATING:
        return -torch.sigmoid(x)
    if game == SQUARES:
        return x if fake else x - 1.0
    slope = torch.ones_like(x)
    if game == HINGE:
        slope = torch.where(1.0 + signed <= 0.0, 0.0, slope)
    elif game != LINEAR:
        slope = torch.sigmoid(signed)
    return slope if fake else -slope


def _slopes(a: Tensor, b: Tensor | None, c: None, d: None, scalars: Scalars, flags: int) -> tuple[Tensor | None, ...]:
    dtype, game = arithmetic((a, b)), flags & _GAMES
    a = a.to(dtype)
    if b is None:
        return _side_slope(a, game, bool(flags & FAKE)), None, None, None
    b = b.to(dtype)
    if game == RELATIVISTIC:
        db = torch.sigmoid(b - a)
        return -db, db, None, None
    return _side_slope(a, game, False), _side_slope(b, game, True), None, None


def _kernels() -> tuple[object, object]:
    from . import kernels

    return kernels.adversarial_value, kernels.adversarial_gradient


register_formulas(NAME, by_slopes(_kernels, reference, _slopes))


def norms(grad: Tensor) -> Tensor:
    """Norm of each sample in fp64, where no square of a narrower number is lost; at 0 all its derivatives are 0."""
    squares = squared_norms(grad)
    zero = squares == 0.0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())


def squared_norms(grad: Tensor) -> Tensor:
    wide = grad.double()
    return wide.square().flatten(1).sum(1) if grad.dim() > 1 else wide.square()


def penalties(grad: Tensor, target: float, gamma: float | None) -> Tensor:
    """Of each sample: gamma / 2 times the squared norm if there is a gamma, else the squared distance from ``target``."""
    return (norms(grad) - target).square() if gamma is None else 0.5 * gamma * squared_norms(grad)
