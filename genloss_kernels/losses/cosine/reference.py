"""The cosine embedding loss in plain PyTorch: differentiable to any order."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.elementwise import arithmetic
from ...core.reduction import Reduction

# What torch adds to squared norms, 1e-12 in fp32, in fp64 too; and the least scale of a row: at its root no square counts
# any more. kernels.py has the same.
EPSILON = 9.999999960041972e-13
LEAST_SCALE = 1e-6


def scale(x: Tensor) -> Tensor:
    """The largest absolute value of each row (..., 1), a constant."""
    if not x.size(-1):
        return x.new_ones(*x.shape[:-1], 1)
    return x.detach().abs().amax(-1, keepdim=True).clamp(min=LEAST_SCALE)


def direction(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by their scale, and the root of their squares' sum then."""
    by = scale(x)
    x = x / by
    return x, (x.square().sum(-1) + EPSILON / by.squeeze(-1).square()).sqrt()


def cosine(first: Tensor, second: Tensor) -> Tensor:
    dtype = arithmetic((first, second))
    x, x_norm = direction(first.to(dtype))
    y, y_norm = direction(second.to(dtype))
    return (x * y).sum(-1) / x_norm / y_norm


def of_cosine(found: Tensor, target: Tensor, margin: float) -> Tensor:
    """Loss of pairs by their cosine."""
    unlike = torch.where(target == -1, (found - margin).clamp(min=0.0), 0.0)
    return torch.where(target == 1, 1.0 - found, unlike)


def reduced(loss: Tensor, reduction: Reduction) -> Tensor:
    if reduction == Reduction.NONE:
        return loss
    return loss.sum() / (loss.numel() if reduction == Reduction.MEAN else 1)


def composed(first: Tensor, second: Tensor, target: Tensor, margin: float, reduction: Reduction) -> Tensor:
    return reduced(of_cosine(cosine(first, second), target, margin), reduction)
