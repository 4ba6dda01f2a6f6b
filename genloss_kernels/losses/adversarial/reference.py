"""The adversarial losses and penalties in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.elementwise import arithmetic
from ...core.formulas import Scalars

# Values of the flags; kernels.py reads the same.
LOGISTIC, SATURATING, SQUARES, HINGE, LINEAR, RELATIVISTIC = range(6)
GAMES, FAKE, BOTH = 7, 8, 16


# Beyond it softplus is its argument, in fp64 too, for which torch's own of 20 is too small.
THRESHOLD = 40.0


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=THRESHOLD)


def _side(x: Tensor, game: int, fake: bool) -> Tensor:
    if game == SATURATING:
        return -_softplus(x)
    if game == SQUARES:
        distance = x if fake else x - 1.0
        # The square's own derivative, 2 x, overflows before half of it.
        return (0.5 * distance) * distance
    signed = x if fake else -x
    if game == HINGE:
        return F.relu(1.0 + signed)
    return signed if game == LINEAR else _softplus(signed)


def reference(a: Tensor, b: Tensor | None, c: None, d: None, scalars: Scalars, flags: int) -> Tensor:
    dtype, game = arithmetic((a, b)), flags & GAMES
    a = a.to(dtype)
    if b is None:
        return _side(a, game, bool(flags & FAKE))
    b = b.to(dtype)
    return _softplus(b - a) if game == RELATIVISTIC else _side(a, game, False) + _side(b, game, True)


def norms(squares: Tensor) -> Tensor:
    """Roots of squared norms; at 0 all their derivatives are 0."""
    zero = squares == 0.0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())


def squared_norms(grad: Tensor) -> Tensor:
    """Squared norm of each sample in fp64, where no square of a narrower number is lost."""
    wide = grad.double()
    return wide.square().flatten(1).sum(1) if grad.dim() > 1 else wide.square()


def roots(grad: Tensor) -> Tensor:
    """Norm of each sample in fp64; differentiable, to any order where it is not 0."""
    return torch.linalg.vector_norm(grad.flatten(1), dim=1, dtype=torch.float64)


def penalties(squares: Tensor, target: float, gamma: float | None) -> Tensor:
    """Half of gamma times the squared norms if there is a gamma, else the squared distance of the norms from ``target``."""
    return (norms(squares) - target).square() if gamma is None else 0.5 * gamma * squares


def of_norms(found: Tensor, target: float, gamma: float | None) -> Tensor:
    """The same of the norms themselves."""
    return (found - target).square() if gamma is None else found.square() * (0.5 * gamma)
